"""Bounds of a schema of messages: the size of the longest message, and the time of a check.

The size is that of a message in which every character is escaped.  The time is that of the document
that costs most.  Patterns are matched in time that is linear in the text, but the factor may be large.  If its bound is
not good enough, a pattern is measured on texts that are made of its own characters.

This module is pure, except for the clock: schemas without references in, numbers out.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from random import Random
from typing import Any, Final, NamedTuple

import jsonschema_rs

from chatd.transport.explainer import Schema, compile_schema

MOST_BYTES: Final = 104 << 10
"""The largest payload limit in bytes: to parse a document of this size takes nearly a millisecond."""
ANY_ESCAPE: Final = 12
"""The bytes of a code point as two escaped surrogates, such as `\\ud83d\\udc4b`."""
NUMBER: Final = 32
"""The bytes for a number, true, false or null, which a client may write in many ways."""
KEYWORD: Final = 5.0
"""Nanoseconds for a keyword."""
KEY: Final = 30.0
"""Nanoseconds to look for a key."""
MEMBER: Final = 100.0
"""Nanoseconds for a key that a client chooses: an explanation copies it."""
COMPARISON: Final = 200.0
"""Nanoseconds to compare an array or an object with another one."""
DISTINCT: Final = 100.0
"""Nanoseconds for an item that must differ from the others."""
FRACTION: Final = 10_000.0
"""Nanoseconds to compare a number with one that may have a fraction: the engine computes with exact fractions."""
WHOLE: Final = 3_000.0
"""The same if both numbers are whole, one of which may be written as 1e308."""
LIMIT: Final = 1_000.0
"""Nanoseconds to compare any number with a limit that is whole."""
PAIR: Final = 500.0
"""Nanoseconds to compare two whole numbers, because the engine gives many large ones the same hash."""
FEW: Final = 15
"""The most numbers that the engine compares in pairs to find out whether they are distinct."""
BYTE: Final = 0.05
"""Nanoseconds for each character of a text that is compared."""
SEARCH: Final = 20.0
"""Nanoseconds to ask one schema whether it has evaluated a key or an item."""
FORMAT: Final = 3.0
"""Nanoseconds for each character of a format."""
IDN: Final = 45.0
"""Nanoseconds for each character of an internationalized host name."""
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
_IN_PLACE: Final = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
"""The keywords with lists of schemas for one value."""
_SCALARS: Final = frozenset({"boolean", "integer", "null", "number", "string"})
_LIMITS: Final = "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"


# The longest message


def longest(schema: Schema) -> int | None:
    """Return the size in bytes of the longest value that a schema accepts, however it is escaped; None if unbounded."""
    if isinstance(schema, bool):
        return None if schema else 0
    sizes: list[int | None] = []
    if "const" in schema:
        sizes.append(_size(schema["const"]))
    if "enum" in schema:
        sizes.append(max(map(_size, schema["enum"]), default=0))
    if "type" in schema:
        types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        sizes.append(_most([_SIZES[name](schema) for name in types]))
    sizes += map(longest, schema.get("allOf", ()))
    sizes += [_most([*map(longest, schema[name])]) for name in ("anyOf", "oneOf") if name in schema]
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


def _string(schema: dict[str, Any]) -> int | None:
    return 2 + ANY_ESCAPE * int(schema["maxLength"]) if "maxLength" in schema else None


def _array(schema: dict[str, Any]) -> int | None:
    before = [*map(longest, schema.get("prefixItems", ()))]
    further = schema.get("items", True)
    items = 0 if further is False else max(int(schema.get("maxItems", 0)) - len(before), 0)
    if further is not False and "maxItems" not in schema:
        return None
    one = longest(further) if items else 0
    return _sum([2, *(size and 1 + size for size in before), None if one is None else items * (1 + one)])


def _object(schema: dict[str, Any]) -> int | None:
    if schema.get("additionalProperties") is not False or "patternProperties" in schema:
        return None
    return _sum(
        [
            2,
            *(
                size
                for name, inner in schema.get("properties", {}).items()
                for size in (2 + _size(name), longest(inner))
            ),
        ]
    )


_SIZES: Final = {
    "string": _string,
    "array": _array,
    "object": _object,
    **dict.fromkeys(("boolean", "integer", "null", "number"), lambda _: NUMBER),
}


# The cost of a validation


class Cost(NamedTuple):
    """The most nanoseconds that a validation takes: some for every value, and some for each byte of it."""

    fixed: float = 0.0
    each: float = 0.0
    levels: int = 0
    """The number of schemas inside each other."""

    def total(self, size: int) -> float:
        """Return the cost for a value of so many bytes."""
        return self.fixed + self.each * size

    def repeated(self, most: float | None, least_bytes: int, extra: float) -> "Cost":
        """Return the cost for each item of a value that has at most so many, of at least so many bytes."""
        one = self.fixed + extra
        by_bytes, by_number = one / least_bytes, None if most is None else most * one
        if by_number is not None and by_number < by_bytes * MOST_BYTES:
            return Cost(by_number, self.each, self.levels)
        return Cost(0.0, by_bytes + self.each, self.levels)


class Estimate:
    """The cost of validations of values that have at most so many bytes."""

    def __init__(self, size: int, clock: Callable[[], float]) -> None:
        self._size = size
        self._clock = clock

    def explanation(self, schema: Schema) -> float:
        """Return the most nanoseconds that it takes to explain a refusal: two validations for each level, and two."""
        cost = self.cost(schema)
        return 2 * (1 + cost.levels) * cost.total(self._size)

    def cost(self, schema: Schema) -> Cost:
        """Return the most that a validation can cost."""
        if isinstance(schema, bool):
            return Cost(KEYWORD, levels=1)
        parts = [self._own(schema), *self._inner(schema)]
        inner = [*map(self.cost, schema.get("properties", {}).values())]
        if inner:  # which share the bytes of the object
            fixed, each, levels = zip(*inner, strict=True)
            parts.append(Cost(KEY * len(inner) + sum(fixed), max(each), max(levels)))
        again = 2 if schema.keys() & {"unevaluatedItems", "unevaluatedProperties"} else 1
        fixed, each, levels = zip(*parts, strict=True)
        return Cost(again * sum(fixed), again * sum(each), 1 + max(levels))

    def _own(self, schema: dict[str, Any]) -> Cost:
        """Return the cost of the keywords that look at one value."""
        fixed, each = KEYWORD * (1 + len(schema)), 0.0
        fixed += KEY * len(schema.get("required", ()))
        fixed += KEY * sum(1 + len(names) for names in schema.get("dependentRequired", {}).values())
        values = [*schema.get("enum", ()), *([schema["const"]] if "const" in schema else ())]
        exact = _exact(schema)
        fixed += sum(_comparison(value, exact) for value in values) + _numbers(schema, exact)
        length = min(int(schema.get("maxLength", self._size)), self._size)
        if "format" in schema:
            fixed += (IDN if schema["format"] == "idn-hostname" else FORMAT) * length
        if "pattern" in schema:
            fixed += self._pattern(schema["pattern"], length)
        if schema.get("uniqueItems"):
            distinct = self._distinct(schema)
            fixed, each = fixed + distinct.fixed, distinct.each
        return Cost(fixed, each)

    def _distinct(self, schema: dict[str, Any]) -> Cost:
        """Return the cost to find out whether all items of an array differ."""
        kinds = [schema.get("items", True), *schema.get("prefixItems", ())]
        if not all(map(_is_scalar, kinds)):
            return Cost(each=DISTINCT)
        found = Cost().repeated(schema.get("maxItems"), 2, DISTINCT)
        exact = max(map(_exact, kinds))
        if exact:
            most = min(int(schema.get("maxItems", self._size)), self._size)
            few = min(most, FEW)
            further = 2 * FRACTION if exact == FRACTION else PAIR
            pairs = PAIR * most * (most - 1) / 2 + further * few * (few - 1) / 2
            found = found._replace(fixed=found.fixed + pairs)
        return found

    def _inner(self, schema: dict[str, Any]) -> Iterator[Cost]:
        """Yield the costs of the schemas inside a schema, except for those of `properties`."""
        for name in _IN_PLACE:
            yield from map(self.cost, schema.get(name, ()))
        yield from (self.cost(schema[name]) for name in ("not", "if", "then", "else") if name in schema)
        yield from map(self.cost, schema.get("dependentSchemas", {}).values())
        for name in ("items", "contains", "unevaluatedItems"):
            if name in schema:
                search = SEARCH * _in_place(schema) if name == "unevaluatedItems" else KEYWORD
                yield self.cost(schema[name]).repeated(schema.get("maxItems"), 2, search)
        keys = schema.get("maxProperties")
        for name in ("propertyNames", "unevaluatedProperties", "additionalProperties"):
            if schema.get(name, False) is not False:
                yield self.cost(schema[name]).repeated(keys, 4, MEMBER)
        if "unevaluatedProperties" in schema:
            yield Cost().repeated(keys, 4, SEARCH * _in_place(schema))
        for pattern, inner in schema.get("patternProperties", {}).items():
            yield self.cost(inner).repeated(keys, 4, MEMBER)
            yield Cost(self._pattern(pattern, self._size))

    def _pattern(self, pattern: str, length: int) -> float:
        """Return the nanoseconds to match a text of so many characters: the bound, or what is measured instead."""
        bound = STEP * _pattern_size(pattern) * length
        if bound <= CHEAP:
            return bound
        found = [*texts(pattern, length)]
        measured = zip(*(self._measure(pattern, found) for _ in range(TRIES)), strict=True)
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


def texts(pattern: str, length: int) -> Iterator[str]:
    """Yield texts that are likely to keep many states of a pattern alive, always the same ones."""
    chance = Random(length)  # noqa: S311 -- repeatable
    letters = [*dict.fromkeys(re.sub(r"\\[pP]\{\w+\}|\W", "", pattern) + "aZ0\u00e9\u8a9e")][:LETTERS]
    for some in (*letters, *map("".join, combinations(letters, 2)), "".join(letters)):
        block = "".join(chance.choices(some, k=min(length, BLOCK)))
        yield (block * (length // BLOCK + 1))[:length]


def _types(schema: Schema) -> frozenset[str]:
    """Return the types that a schema names; without names, and for True, those of all values."""
    if isinstance(schema, bool):
        return frozenset({"number", "object"} if schema else ())
    types = schema.get("type", ["number", "object"])
    return frozenset(types if isinstance(types, list) else [types])


def _is_scalar(schema: Schema) -> bool:
    """Return whether a schema accepts no arrays and objects."""
    return _types(schema) <= _SCALARS


def _exact(schema: Schema) -> float:
    """Return the nanoseconds to compare a number with one that a schema accepts, of which the type is checked first."""
    types = _types(schema)
    return FRACTION if "number" in types else WHOLE if "integer" in types else 0.0


def _is_fraction(value: object) -> bool:
    return isinstance(value, float)


def _numbers(schema: dict[str, Any], exact: float) -> float:
    """Return the nanoseconds for the keywords that look at a number."""
    limits = sum(max(exact, LIMIT) if _is_fraction(schema[name]) else LIMIT for name in _LIMITS if name in schema)
    divided = 2 * FRACTION if _is_fraction(schema.get("multipleOf")) else WHOLE
    return (limits + divided * ("multipleOf" in schema)) * bool(exact)


def _comparison(value: object, exact: float = FRACTION) -> float:
    """Return the nanoseconds to compare a value of a schema with one of a document, in which a number costs `exact`."""
    if isinstance(value, dict):
        return COMPARISON + sum(_comparison(key) + _comparison(inner) for key, inner in value.items())
    if isinstance(value, list):
        return COMPARISON + sum(map(_comparison, value))
    if isinstance(value, str):
        return KEYWORD + BYTE * len(value)
    if isinstance(value, bool) or value is None:
        return KEYWORD
    return 2 * exact if _is_fraction(value) else exact


def _in_place(schema: Schema) -> int:
    """Return the number of schemas that look at the same value as this one, with itself."""
    if isinstance(schema, bool):
        return 1
    inside = [*(one for name in ("allOf", "anyOf", "oneOf") for one in schema.get(name, ()))]
    inside += [schema[name] for name in ("not", "if", "then", "else") if name in schema]
    inside += [*schema.get("dependentSchemas", {}).values(), *schema.get("patternProperties", {}).values()]
    return 1 + sum(map(_in_place, inside))


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
