"""The words for what a JSON Schema refuses: the first fault of a document, in the order of the schema.

A compiled validator accepts or refuses a document in a fraction of a microsecond.  It can also describe a fault, but
then it copies the document, which takes milliseconds for a long one.  Here each keyword of a schema is a validator of
its own.  To explain a refusal, `Part.fault` asks them one after the other, and descends where one refuses.  Arrays and
objects are searched by halves.  An explanation therefore costs a few validations, whatever the document contains.

The same engine accepts and explains, so the two agree.  Patterns are matched in linear time (`compile_schema`).

The words are those of Joi, with which the first version of the protocol was written.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import jsonschema_rs
import orjson

Schema = dict[str, Any] | bool
_Accepts = Callable[[Any], bool]
_Words = Callable[[Any, str | None], str]
"""Returns the words for a refused value and its place; the place of the whole document is None."""

_LIMITS: Final = {
    "maxLength": "length must be less than or equal to {limit} characters long",
    "pattern": "fails to match the required pattern: /{limit}/",
    "format": "must be a valid {limit}",
    "minimum": "must be greater than or equal to {limit}",
    "maximum": "must be less than or equal to {limit}",
    "exclusiveMinimum": "must be greater than {limit}",
    "exclusiveMaximum": "must be less than {limit}",
    "multipleOf": "must be a multiple of {limit}",
    "minItems": "must contain at least {limit} items",
    "maxItems": "must contain less than or equal to {limit} items",
    "uniqueItems": "contains a duplicate value",
    "minProperties": "must have at least {limit} keys",
    "maxProperties": "must have less than or equal to {limit} keys",
}
"""The words for keywords that look at one value, and not inside it."""
_TYPES: Final = {
    "string": "must be a string",
    "integer": "must be an integer",
    "number": "must be a number",
    "boolean": "must be a boolean",
    "array": "must be an array",
    "object": "must be of type object",
    "null": "must be null",
}
MAX_WORDS: Final = 1000
"""The most characters of a schema in the words of a fault, such as those of a long `enum`; more are cut off."""
_NOT_ALLOWED: Final = "is not allowed"
_NO_MATCH: Final = "does not match any of the allowed types"
_MATCHES: Final = "matches more than one allowed type"
_EMPTY: Final = "is not allowed to be empty"


def compile_schema(schema: Schema) -> _Accepts:
    """Compile a schema (2020-12) without references to a function that accepts or refuses a document.

    It asserts formats, fetches nothing, and matches patterns in linear time.
    """
    return jsonschema_rs.Draft202012Validator(
        schema,
        validate_formats=True,
        ignore_unknown_formats=False,
        pattern_options=jsonschema_rs.RegexOptions(),
        offline=True,
    ).is_valid


class Part:
    """One schema inside a schema, which explains why it refuses a value."""

    def __init__(self, schema: Schema) -> None:
        self.accepts = compile_schema(schema)
        self._checks: list[tuple[_Accepts, _Words]] = []
        if schema is False:
            self._checks.append((self.accepts, _says(_NOT_ALLOWED)))
        elif schema is not True:
            for names, words in _checks(schema):
                self._checks.append((compile_schema({name: schema[name] for name in names if name in schema}), words))
            # Only what no other keyword has evaluated is left to refuse.
            inside = "item" if "unevaluatedItems" in schema else "key"
            self._checks.append((self.accepts, _says(f"contains an unknown {inside}")))

    def fault(self, value: object, place: str | None = None) -> str:
        """Return the words for the first fault of a value that this part refuses."""
        return next(words(value, place) for accepts, words in self._checks if not accepts(value))


def _says(words: str) -> _Words:
    if len(words) > MAX_WORDS:
        words = f"{words[: MAX_WORDS - 1]}…"
    return lambda _, place: f'"{_name(place)}" {words}'


def _name(place: str | None) -> str:
    return "value" if place is None else place


def _item(place: str | None, index: int) -> str:
    return f"{_name(place)}[{index}]"


def _inside(place: str | None, name: str) -> str:
    return name if place is None else f"{place}.{name}"


def _json(value: object) -> str:
    return value if isinstance(value, str) else orjson.dumps(value).decode()


def _list(values: Sequence[object]) -> str:
    return f"[{', '.join(map(_json, values))}]"


def _checks(schema: dict[str, Any]) -> list[tuple[Sequence[str], _Words]]:
    """Return the keywords of a schema that are validated together, each group with its words, in order."""
    found: list[tuple[Sequence[str], _Words]] = [
        ((name,), _VALUES[name](schema[name])) for name in sorted(schema, key="type".__ne__) if name in _VALUES
    ]
    if "properties" in schema or "required" in schema:
        found.append((("properties", "required"), _properties(schema)))
    for names, words in _INSIDE:
        if names[0] in schema:
            found.append((names, words(schema)))
    return found


# Keywords that look at one value


def _type(allowed: str | Sequence[str]) -> _Words:
    return _says(_TYPES[allowed] if isinstance(allowed, str) else f"must be one of {_list(allowed)}")


def _limit(words: str, limit: object) -> _Words:
    text = words.format(limit=_json(limit))
    return _says(text.removesuffix("s") if limit == 1 and text.endswith(("keys", "items")) else text)


def _least_length(least: int) -> _Words:
    short = _says(f"length must be at least {least} characters long")
    return lambda value, place: short(value, place) if value else _says(_EMPTY)(value, place)


_VALUES: Final[dict[str, Callable[[Any], _Words]]] = {
    "type": _type,
    "enum": lambda values: _says(f"must be one of {_list(values)}"),
    "const": lambda value: _says(f"must be {_list([value])}"),
    "minLength": _least_length,
    **{
        name: lambda limit, words=words: _limit(words, limit)  # type: ignore[misc]
        for name, words in _LIMITS.items()
    },
}
"""Makes the words of a keyword from its value."""


# Keywords that look inside a value


def first_refused(accepts: _Accepts, items: Sequence[Any], make: Callable[[Sequence[Any]], object]) -> int:
    """Return the index of the first item that is refused; one of them is.

    The search takes steps that double, and then halves: a fault near the start costs little, however many items follow.
    """
    low, high = 0, 1
    while high < len(items) and accepts(make(items[low:high])):
        low, high = high, 2 * high + 1
    while high - low > 1:
        middle = (low + high) // 2
        if accepts(make(items[low:middle])):
            low = middle
        else:
            high = middle
    return low


def _first_key(accepts: _Accepts, value: Mapping[str, Any]) -> str:
    """Return the first key of an object that is refused."""
    keys = [*value]
    return keys[first_refused(accepts, keys, lambda some: {key: value[key] for key in some})]


def _properties(schema: dict[str, Any]) -> _Words:
    parts = {name: Part(inner) for name, inner in schema.get("properties", {}).items()}
    required = schema.get("required", ())
    names = [*parts, *(name for name in required if name not in parts)]

    def words(value: dict[str, Any], place: str | None) -> str:
        name = next(
            name
            for name in names
            if (
                not parts[name].accepts(value[name])
                if name in value and name in parts
                else name in required and name not in value
            )
        )
        inside = _inside(place, name)
        return parts[name].fault(value[name], inside) if name in value else f'"{inside}" is required'

    return words


def _dependent_required(schema: dict[str, Any]) -> _Words:
    def words(value: dict[str, Any], place: str | None) -> str:
        missing = next(
            name
            for key, names in schema["dependentRequired"].items()
            for name in names
            if key in value and name not in value
        )
        return f'"{_inside(place, missing)}" is required'

    return words


def _dependent_schemas(schema: dict[str, Any]) -> _Words:
    parts = {name: Part(inner) for name, inner in schema["dependentSchemas"].items()}
    return lambda value, place: next(
        part.fault(value, place) for name, part in parts.items() if name in value and not part.accepts(value)
    )


def _pattern_properties(schema: dict[str, Any]) -> _Words:
    parts = [
        (compile_schema({"patternProperties": {pattern: inner}}), Part(inner))
        for pattern, inner in schema["patternProperties"].items()
    ]

    def words(value: dict[str, Any], place: str | None) -> str:
        accepts, part = next(one for one in parts if not one[0](value))
        key = _first_key(accepts, value)
        return part.fault(value[key], _inside(place, key))

    return words


def _property_names(schema: dict[str, Any]) -> _Words:
    accepts = compile_schema({"propertyNames": schema["propertyNames"]})
    return lambda value, place: f'"{_inside(place, _first_key(accepts, value))}" {_NOT_ALLOWED}'


_ADDITIONAL: Final = "additionalProperties", "properties", "patternProperties"


def _additional(schema: dict[str, Any]) -> _Words:
    """Return the words for keys that neither `properties` nor `patternProperties` know."""
    inner = schema["additionalProperties"]
    known: dict[str, Any] = {
        name: dict.fromkeys(schema[name], True) for name in ("properties", "patternProperties") if name in schema
    }
    accepts, part = compile_schema({**known, "additionalProperties": inner}), Part(inner)

    def words(value: dict[str, Any], place: str | None) -> str:
        key = _first_key(accepts, value)
        return part.fault(value[key], _inside(place, key))

    return words


def _prefix_items(schema: dict[str, Any]) -> _Words:
    parts = [Part(inner) for inner in schema["prefixItems"]]
    return lambda value, place: next(
        part.fault(item, _item(place, index))
        for index, (item, part) in enumerate(zip(value, parts, strict=False))
        if not part.accepts(item)
    )


def _items(schema: dict[str, Any]) -> _Words:
    accepts, part = compile_schema({"items": schema["items"]}), Part(schema["items"])
    skipped = len(schema.get("prefixItems", ()))

    def words(value: list[Any], place: str | None) -> str:
        index = skipped + first_refused(accepts, value[skipped:], lambda some: some)
        return part.fault(value[index], _item(place, index))

    return words


def _contains(schema: dict[str, Any]) -> _Words:
    least = schema.get("minContains", 1)
    enough = compile_schema({"contains": schema["contains"], "minContains": least})
    few = _says(f"must contain at least {least} required matches" if least > 1 else "does not contain a required match")
    many = _says(f"contains more than {schema.get('maxContains')} required matches")
    return lambda value, place: (many if enough(value) else few)(value, place)


def _all_of(schema: dict[str, Any]) -> _Words:
    parts = [Part(inner) for inner in schema["allOf"]]
    return lambda value, place: next(part.fault(value, place) for part in parts if not part.accepts(value))


def _one_of(schema: dict[str, Any]) -> _Words:
    any_of = compile_schema({"anyOf": schema["oneOf"]})
    return lambda value, place: _says(_MATCHES if any_of(value) else _NO_MATCH)(value, place)


def _not(schema: dict[str, Any]) -> _Words:
    inner = schema["not"]
    if isinstance(inner, dict) and [*inner] == ["required"]:
        return _says(f"contains a conflict between optional exclusive peers {_list(inner['required'])}")
    return _says("contains an invalid value")


def _conditional(schema: dict[str, Any]) -> _Words:
    condition = compile_schema(schema["if"])
    then, otherwise = Part(schema.get("then", True)), Part(schema.get("else", True))
    return lambda value, place: (then if condition(value) else otherwise).fault(value, place)


_INSIDE: Final[tuple[tuple[Sequence[str], Callable[[dict[str, Any]], _Words]], ...]] = (
    (("dependentRequired",), _dependent_required),
    (("patternProperties",), _pattern_properties),
    (("propertyNames",), _property_names),
    (("prefixItems",), _prefix_items),
    (("items", "prefixItems"), _items),
    (("contains", "minContains", "maxContains"), _contains),
    (("dependentSchemas",), _dependent_schemas),
    (("allOf",), _all_of),
    (("anyOf",), lambda _: _says(_NO_MATCH)),
    (("oneOf",), _one_of),
    (("not",), _not),
    (("if", "then", "else"), _conditional),
    (_ADDITIONAL, _additional),
)
"""The keywords that are validated together, and what makes their words from the schema, in the order of the faults."""
