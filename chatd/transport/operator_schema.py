"""An operator's own schema of a message, which replaces `schemas/message.json`: the checks before it is used.

The schema decides what a post costs, because every post is checked against it in the reactor thread.  So it is refused
at the start if one post could keep the thread for long.  References lead to other places of the same file, and are
replaced by what they name: nothing is fetched, and nothing is recursive.  The cost of a validation is estimated from
above, for the document that costs most.  Patterns are matched in time that is linear in the text, but the factor may be
large.  If its bound is not good enough, the pattern is measured on texts that are made of its own characters.

`SchemaFile` reads the file again at SIGHUP.
"""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from math import ceil
from pathlib import Path
from random import Random
from typing import Any, Final, NamedTuple
from urllib.parse import unquote

import jsonschema_rs
import orjson
from twisted.logger import Logger

from chatd.transport.explainer import Schema, compile_schema
from chatd.transport.frames import MAX_MESSAGE, MESSAGE, Form, Vocabulary

DRAFT: Final = "https://json-schema.org/draft/2020-12/schema"
"""The `$schema` of the one draft that is understood."""
RESERVED: Final = "type", "label", "replaces", "timestamp", "room", "id", "removed"
"""The names that the protocol needs.  `label` and `replaces` are added to every schema, as `message.json` has them."""
OURS: Final = {name: MESSAGE.schema["properties"][name] for name in ("label", "replaces")}
"""The fields that are added to every schema."""
MAX_ID: Final = 33
"""The largest length of an id in characters."""
MOST_BYTES: Final = 104 << 10
"""The largest payload limit in bytes: to parse a document of this size takes nearly a millisecond."""
MAX_FILE: Final = 1 << 20
"""The largest size of a schema in bytes."""
MAX_PARTS: Final = 500
"""The most schemas inside a schema, with those behind references counted each time."""
MAX_DEPTH: Final = 24
"""The deepest nesting of schemas, with references followed."""
BUDGET: Final = 300_000
"""The most nanoseconds that a validation may take: an explanation costs three, and parsing comes to it."""
SPACE: Final = 1 << 10
"""The bytes for white space in the longest frame."""
ANY_ESCAPE: Final = 12
"""The bytes of a code point as two escaped surrogates, such as `\\ud83d\\udc4b`."""

_ANNOTATIONS: Final = frozenset(
    {"$comment", "contentEncoding", "contentMediaType", "contentSchema", "default", "deprecated", "description"}
    | {"examples", "readOnly", "title", "writeOnly"}
)
"""The keywords that refuse nothing."""
_PLACES: Final = frozenset({"$anchor", "$defs", "$dynamicAnchor", "$id", "$schema", "definitions"})
"""The keywords that have no meaning in a schema without references."""
_VALUES: Final = frozenset(
    {"const", "dependentRequired", "enum", "exclusiveMaximum", "exclusiveMinimum", "format", "maxContains", "maxItems"}
    | {"maxLength", "maxProperties", "maximum", "minContains", "minItems", "minLength", "minProperties", "minimum"}
    | {"multipleOf", "pattern", "required", "type", "uniqueItems"}
)
"""The keywords whose values are not schemas."""
_ONE: Final = frozenset(
    {"additionalProperties", "contains", "else", "if", "items", "not", "propertyNames", "then", "unevaluatedItems"}
    | {"unevaluatedProperties"}
)
"""The keywords whose value is a schema."""
_LISTS: Final = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
"""The keywords whose value is a list of schemas."""
_NAMED: Final = frozenset({"dependentSchemas", "patternProperties", "properties"})
"""The keywords whose value has schemas by name."""
_REFERENCES: Final = "$ref", "$dynamicRef"
_REFUSED_FORMATS: Final = frozenset({"regex"})
"""The formats that may cost too much: clients would choose patterns to compile."""
_SCALARS: Final = frozenset({"boolean", "integer", "null", "number", "string"})

_logger = Logger()


class OperatorSchema(NamedTuple):
    """A schema of messages that may be used."""

    form: Form
    """The schema with `label` and `replaces`, and without references."""
    max_bytes: int
    """The largest size of a frame."""
    longest: int
    """The size of the longest message as the server encodes it, or a bound of it."""


def read(text: bytes, max_bytes: int = 0, clock: Callable[[], float] = time.perf_counter) -> OperatorSchema:
    """Read a schema; raise ValueError with the reason in one line if it may not be used.

    `max_bytes` is the payload limit.  0 derives it from the schema.  `clock` returns seconds.
    """
    if len(text) > MAX_FILE:
        raise ValueError(f"is larger than {MAX_FILE >> 20} MiB")
    try:
        written = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error})") from None
    _check_document(written)
    _check_root(written)
    document = {**written, "properties": {**written["properties"], **OURS}}
    whole = _Expansion(document).expand(document)
    longest = _longest(
        {**whole, "properties": {**whole["properties"], "replaces": {"type": "string", "maxLength": MAX_ID}}}
    )
    derived = MAX_MESSAGE if longest is None else max(MAX_MESSAGE, ceil((longest + SPACE) / 1024) * 1024)
    if not max_bytes and derived > MOST_BYTES:
        raise ValueError(
            f"allows frames of {longest} bytes, and the most is {MOST_BYTES}: shorten its fields, or give --max-message"
        )
    size = max_bytes or derived
    own = {name: field for name, field in whole["properties"].items() if name not in OURS}
    cost = _Estimate(size, clock).cost({**whole, "properties": own}).total(size)
    if cost > BUDGET:
        raise ValueError(
            f"may take {cost / 1000:.0f} microseconds to check a frame of {size} bytes, and the most is "
            f"{BUDGET // 1000}: give arrays a maxItems, objects a maxProperties and strings with a pattern a maxLength"
        )
    # The server writes six bytes for what a client may write in twelve.
    return OperatorSchema(_form(whole), size, size if longest is None else longest // 2)


def _form(schema: dict[str, Any]) -> Form:
    try:
        return Form(schema)
    except (jsonschema_rs.ValidationError, ValueError) as error:
        raise ValueError(f"cannot be used ({_line(error)})") from None


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _check_document(written: object) -> None:
    """Raise ValueError unless a document is a schema of the right draft."""
    if not isinstance(written, dict):
        raise ValueError("is not a JSON object")  # noqa: TRY004 -- a value, for a caller that reads files
    if written.get("$schema", DRAFT) != DRAFT:
        raise ValueError(f"has another $schema than {DRAFT}")
    try:
        jsonschema_rs.meta.validate({**written, "$schema": DRAFT})
    except jsonschema_rs.ValidationError as error:
        place = "/".join(map(str, error.instance_path))
        raise ValueError(f"is not a JSON Schema: /{place}: {_line(error)}") from None


def _check_root(schema: dict[str, Any]) -> None:
    """Raise ValueError unless a schema is closed and requires a username and a message."""
    if schema.get("type") != "object" or schema.get("additionalProperties") is not False:
        raise ValueError('must have "type": "object" and "additionalProperties": false')
    reserved = next((name for name in RESERVED if name in schema.get("properties", {})), None)
    if reserved is not None:
        raise ValueError(f'has a property "{reserved}", which is a name of the protocol: choose another')
    if "patternProperties" in schema:
        raise ValueError("must name its fields in properties, not in patternProperties")
    fields, required = schema.get("properties", {}), schema.get("required", ())
    for name in ("username", "message"):
        field = fields.get(name)
        text = isinstance(field, dict) and field.get("type") == "string" and "maxLength" in field
        if not text or name not in required:
            raise ValueError(f'must require "{name}", a string with a maxLength')
    unknown = next((name for name in required if name not in fields), None)
    if unknown is not None:
        raise ValueError(f'requires "{unknown}", which its properties lack')


# References


class _Expansion:
    """Replaces the references of a document by what they name."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._document = document
        self._anchors = dict(_anchors(document))
        self._parts = 0

    def expand(self, schema: Any, trail: tuple[str, ...] = (), depth: int = 0) -> Any:
        """Return a schema without references; raise ValueError if that is too large."""
        if not isinstance(schema, dict):
            return schema
        self._parts += 1
        if self._parts > MAX_PARTS or depth > MAX_DEPTH:
            raise ValueError(f"has more than {MAX_PARTS} schemas in it, or nests them deeper than {MAX_DEPTH}")
        found: dict[str, Any] = {}
        for name, value in schema.items():
            if name in _VALUES | _ANNOTATIONS or name.startswith("x-"):
                found[name] = value
            elif name in _ONE:
                found[name] = self.expand(value, trail, depth + 1)
            elif name in _LISTS:
                found[name] = [self.expand(one, trail, depth + 1) for one in value]
            elif name in _NAMED:
                found[name] = {key: self.expand(one, trail, depth + 1) for key, one in value.items()}
            elif name not in _REFERENCES and name not in _PLACES:
                raise ValueError(f'has the unknown keyword "{name}"')
        named = [self._follow(schema[name], trail, depth) for name in _REFERENCES if name in schema]
        if named:
            found["allOf"] = [*named, *found.get("allOf", ())]
        _check_format(found)
        return found

    def _follow(self, reference: str, trail: tuple[str, ...], depth: int) -> Any:
        if reference in trail or reference == "#":
            raise ValueError(f'refers to itself by "{reference}"')
        if not reference.startswith("#"):
            raise ValueError(f'refers to "{reference}", and must stay within its own file')
        target = self._find(unquote(reference[1:]))
        if not isinstance(target, (dict, bool)):
            raise ValueError(f'refers to "{reference}", where no schema is')  # noqa: TRY004 -- as above
        return self.expand(target, (*trail, reference), depth + 1)

    def _find(self, pointer: str) -> Any:
        """Return what an anchor or a JSON pointer (RFC 6901) names, or None."""
        if not pointer.startswith("/"):
            return self._anchors.get(pointer)
        found: Any = self._document
        for key in pointer[1:].split("/"):
            name = key.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and name.isdecimal() and int(name) < len(found):
                found = found[int(name)]
            else:
                found = found.get(name) if isinstance(found, dict) else None
        return found


def _anchors(node: object, *, root: bool = True) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each schema that has an anchor, after its name; raise ValueError for a schema that is a file of its own."""
    inside: Iterator[Any] = iter(())
    if isinstance(node, dict):
        if not root and isinstance(node.get("$id"), str):
            raise ValueError("has an $id inside, and may have one at its top only")
        yield from ((node[name], node) for name in ("$anchor", "$dynamicAnchor") if isinstance(node.get(name), str))
        inside = iter(node.values())
    elif isinstance(node, list):
        inside = iter(node)
    for one in inside:
        yield from _anchors(one, root=False)


def _check_format(schema: dict[str, Any]) -> None:
    if schema.get("format") in _REFUSED_FORMATS:
        raise ValueError(f'has the format "{schema["format"]}", which clients could make expensive')


# The longest frame


def _longest(schema: Schema) -> int | None:
    """Return the size in bytes of the longest value that a schema accepts, however it is escaped; None if unbounded."""
    if isinstance(schema, bool):
        return None if schema else 0
    sizes: list[int | None] = []
    if "const" in schema:
        sizes.append(_size(schema["const"]))
    if "enum" in schema:
        sizes.append(max(map(_size, schema["enum"])))
    if "type" in schema:
        types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        sizes.append(_most([_SIZES[name](schema) for name in types]))
    sizes += map(_longest, schema.get("allOf", ()))
    sizes += [_most([*map(_longest, schema[name])]) for name in ("anyOf", "oneOf") if name in schema]
    return min((size for size in sizes if size is not None), default=None)


def _most(sizes: Sequence[int | None]) -> int | None:
    known = [size for size in sizes if size is not None]
    return max(known, default=0) if len(known) == len(sizes) else None


def _sum(sizes: Sequence[int | None]) -> int | None:
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None


def _size(value: object) -> int:
    """Return the size in bytes of a value in which every character is escaped."""
    if isinstance(value, str):
        return 2 + 3 * len(value.encode("utf-16-le"))  # six bytes for each unit
    if isinstance(value, list):
        return 2 + sum(1 + _size(item) for item in value)
    if isinstance(value, dict):
        return 2 + sum(2 + _size(key) + _size(item) for key, item in value.items())
    return NUMBER


NUMBER: Final = 32
"""The bytes for a number, true, false or null, which a client may write in many ways."""


def _longest_string(schema: dict[str, Any]) -> int | None:
    return 2 + ANY_ESCAPE * int(schema["maxLength"]) if "maxLength" in schema else None


def _longest_array(schema: dict[str, Any]) -> int | None:
    before = [*map(_longest, schema.get("prefixItems", ()))]
    further = schema.get("items", True)
    items = 0 if further is False else max(int(schema.get("maxItems", 0)) - len(before), 0)
    if further is not False and "maxItems" not in schema:
        return None
    one = _longest(further) if items else 0
    return _sum([2, *(size and 1 + size for size in before), None if one is None else items * (1 + one)])


def _longest_object(schema: dict[str, Any]) -> int | None:
    if schema.get("additionalProperties") is not False or "patternProperties" in schema:
        return None
    return _sum(
        [
            2,
            *(
                size
                for name, inner in schema.get("properties", {}).items()
                for size in (2 + _size(name), _longest(inner))
            ),
        ]
    )


_SIZES: Final = {
    "string": _longest_string,
    "array": _longest_array,
    "object": _longest_object,
    **dict.fromkeys(("boolean", "integer", "null", "number"), lambda _: NUMBER),
}


# The cost of a validation


class _Cost(NamedTuple):
    """The most nanoseconds that a validation takes: some for every value, and some for each byte of it."""

    fixed: float = 0.0
    each: float = 0.0

    def total(self, size: int) -> float:
        """Return the cost for a value of so many bytes."""
        return self.fixed + self.each * size

    def repeated(self, most: float | None, least_bytes: int, extra: float) -> "_Cost":
        """Return the cost for each item of a value that has at most so many, of at least so many bytes."""
        one = self.fixed + extra
        by_bytes, by_number = one / least_bytes, None if most is None else most * one
        if by_number is not None and by_number < by_bytes * MOST_BYTES:
            return _Cost(by_number, self.each)
        return _Cost(0.0, by_bytes + self.each)


KEYWORD: Final = 10.0
"""Nanoseconds for a keyword."""
KEY: Final = 30.0
"""Nanoseconds to look for a key."""
MEMBER: Final = 100.0
"""Nanoseconds for a key that a client chooses: an explanation copies it."""
COMPARISON: Final = 200.0
"""Nanoseconds to compare an array or an object with another one."""
DISTINCT: Final = 100.0
"""Nanoseconds for an item that must differ from the others."""
FORMAT: Final = 15.0
"""Nanoseconds for each character of a format."""
STEP: Final = 0.1
"""Nanoseconds for each character and each byte of a compiled pattern, if every state of it is alive."""
CHEAP: Final = 10_000.0
"""The bound in nanoseconds up to which a pattern is not measured."""
MOST_PATTERN: Final = 4 << 20
"""The most bytes of a compiled pattern."""
TRIES: Final = 2
"""The number of times that a text is measured, because a busy machine may interrupt one."""
BLOCK: Final = 2000
"""The characters of such a text that are drawn; longer ones repeat them."""
LETTERS: Final = 8
"""The characters of a pattern of which texts are made."""


class _Estimate:
    """The cost of validations of values that have at most so many bytes."""

    def __init__(self, size: int, clock: Callable[[], float]) -> None:
        self._size = size
        self._clock = clock

    def cost(self, schema: Schema) -> _Cost:
        """Return the most that a validation can cost."""
        if isinstance(schema, bool):
            return _Cost(KEYWORD)
        parts = [self._own(schema), *self._inner(schema)]
        if "properties" in schema:  # which share the bytes of the object
            inner = [*map(self.cost, schema["properties"].values())]
            parts.append(_Cost(sum(KEY + one.fixed for one in inner), max((one.each for one in inner), default=0.0)))
        again = 2 if schema.keys() & {"unevaluatedItems", "unevaluatedProperties"} else 1
        return _Cost(again * sum(one.fixed for one in parts), again * sum(one.each for one in parts))

    def _own(self, schema: dict[str, Any]) -> _Cost:
        """Return the cost of the keywords that look at one value."""
        fixed, each = KEYWORD * (1 + len(schema.keys() & _VALUES)), 0.0
        fixed += KEY * len(schema.get("required", ()))
        fixed += KEY * sum(1 + len(names) for names in schema.get("dependentRequired", {}).values())
        values = [*schema.get("enum", ()), *([schema["const"]] if "const" in schema else ())]
        fixed += COMPARISON * sum(isinstance(value, (dict, list)) for value in values) + len(values)
        length = min(int(schema.get("maxLength", self._size)), self._size)
        if "format" in schema:
            fixed += FORMAT * length
        if "pattern" in schema:
            fixed += self._pattern(schema["pattern"], length)
        if schema.get("uniqueItems"):
            scalars = _is_scalar(schema.get("items", True)) and all(map(_is_scalar, schema.get("prefixItems", ())))
            distinct = _Cost().repeated(schema.get("maxItems"), 2, DISTINCT) if scalars else _Cost(each=DISTINCT)
            fixed, each = fixed + distinct.fixed, distinct.each
        return _Cost(fixed, each)

    def _inner(self, schema: Mapping[str, Any]) -> Iterator[_Cost]:
        """Yield the costs of the schemas inside a schema, except for those of `properties`."""
        for name in _LISTS:
            yield from map(self.cost, schema.get(name, ()))
        yield from (self.cost(schema[name]) for name in ("not", "if", "then", "else") if name in schema)
        yield from map(self.cost, schema.get("dependentSchemas", {}).values())
        for name in ("items", "contains", "unevaluatedItems"):
            if name in schema:
                yield self.cost(schema[name]).repeated(schema.get("maxItems"), 2, KEYWORD)
        keys = schema.get("maxProperties")
        for name in ("propertyNames", "unevaluatedProperties", "additionalProperties"):
            if schema.get(name, False) is not False:
                yield self.cost(schema[name]).repeated(keys, 4, MEMBER)
        for pattern, inner in schema.get("patternProperties", {}).items():
            yield self.cost(inner).repeated(keys, 4, MEMBER)
            yield _Cost(self._pattern(pattern, self._size))

    def _pattern(self, pattern: str, length: int) -> float:
        """Return the nanoseconds to match a text of so many characters: the bound, or what is measured instead."""
        bound = STEP * _pattern_size(pattern) * length
        if bound <= CHEAP:
            return bound
        texts = [*_texts(pattern, length)]
        measured = zip(*(self._measure(pattern, texts) for _ in range(TRIES)), strict=True)
        slowest: float = max(min(times) for times in measured)
        return min(bound, slowest)

    def _measure(self, pattern: str, texts: Sequence[str]) -> list[float]:
        """Return the nanoseconds to match each text with a pattern that was never used."""
        accepts = compile_schema({"pattern": pattern})
        found = []
        for text in texts:
            begun = self._clock()
            accepts(text)
            found.append((self._clock() - begun) * 1e9)
        return found


def _texts(pattern: str, length: int) -> Iterator[str]:
    """Yield texts that are likely to keep many states of a pattern alive, always the same ones."""
    chance = Random(length)  # noqa: S311 -- repeatable
    letters = [*dict.fromkeys(re.sub(r"\\[pP]\{\w+\}|\W", "", pattern) + "aZ0\u00e9\u8a9e")][:LETTERS]
    for some in (*letters, *map("".join, combinations(letters, 2)), "".join(letters)):
        block = "".join(chance.choices(some, k=min(length, BLOCK)))
        yield (block * (length // BLOCK + 1))[:length]


def _is_scalar(schema: Schema) -> bool:
    """Return whether a schema accepts no arrays and objects."""
    if isinstance(schema, bool):
        return not schema
    types = schema.get("type", ["object"])
    return {*(types if isinstance(types, list) else [types])} <= _SCALARS


def _pattern_size(pattern: str) -> int:
    """Return about how many bytes a compiled pattern has; raise ValueError if they are too many."""
    size = 256
    while size <= MOST_PATTERN:
        try:
            jsonschema_rs.Draft202012Validator(
                {"pattern": pattern}, pattern_options=jsonschema_rs.RegexOptions(size_limit=size)
            )
        except (jsonschema_rs.ValidationError, ValueError):
            size *= 2
        else:
            return size
    raise ValueError(f"has the pattern {pattern}, which looks around or back, or is too large")


class SchemaFile:
    """A file with an operator's schema, which is in force in a vocabulary.

    It calls `changed` whenever the schema changes.
    """

    def __init__(self, path: Path, max_bytes: int, vocabulary: Vocabulary, changed: Callable[[], object]) -> None:
        self._path, self._max_bytes = path, max_bytes
        self._vocabulary, self._changed = vocabulary, changed

    def reload(self) -> None:
        """Read the file again; if that fails, the old schema stays in force."""
        try:
            schema = read_file(self._path, self._max_bytes)
        except ValueError as error:
            _logger.error("the old schema stays in force: {reason}", reason=error)  # noqa: TRY400 -- the line says it all
            return
        self._vocabulary.use(schema.form, schema.max_bytes)
        self._changed()
        _logger.info("read the schema in {path}", path=self._path)


def read_file(path: Path, max_bytes: int = 0) -> OperatorSchema:
    """Read a file with a schema, as read() does; the line names the file."""
    try:
        return read(path.read_bytes(), max_bytes)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None
