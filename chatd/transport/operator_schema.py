"""An operator's own schema of a message, which replaces `schemas/message.json`: the checks before it is used.

The schema decides what a post costs, because every post is checked against it in the reactor thread.  So it is refused
at the start if one post could keep the thread for long.  References lead to other places of the same file, and are
replaced by what they name: nothing is fetched, and nothing is recursive.  `schema_cost` bounds the rest.

`SchemaFile` reads the file again at SIGHUP.
"""

import time
from collections.abc import Callable, Iterator
from math import ceil
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import unquote

import jsonschema_rs
import orjson
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from twisted.logger import Logger

from chatd.transport.frames import MAX_MESSAGE, MESSAGE, Form, Vocabulary
from chatd.transport.schema_cost import MOST_BYTES, Estimate, longest

DRAFT: Final = "https://json-schema.org/draft/2020-12/schema"
"""The `$schema` of the one draft that is understood."""
RESERVED: Final = "type", "label", "replaces", "timestamp", "room", "id", "removed"
"""The names that the protocol needs.  `label` and `replaces` are added to every schema, as `message.json` has them."""
OURS: Final = {name: MESSAGE.schema["properties"][name] for name in ("label", "replaces")}
"""The fields that are added to every schema."""
MAX_ID: Final = 33
"""The largest length of an id in characters."""
MAX_FILE: Final = 1 << 20
"""The largest size of a schema in bytes."""
MAX_PARTS: Final = 500
"""The most schemas inside a schema, with those behind references counted each time."""
MAX_DEPTH: Final = 24
"""The deepest nesting of schemas, with references followed."""
MAX_NESTING: Final = 100
"""The deepest nesting of arrays and objects in the file, values such as a `const` included."""
MAX_REASON: Final = 500
"""The most characters of a reason, which may name a pattern or a keyword of the file."""
BUDGET: Final = 1_000_000
"""The most nanoseconds that an explanation may take by its bound, of which few come near."""
SPACE: Final = 1 << 10
"""The bytes for white space in the longest frame."""

_ANNOTATIONS: Final = frozenset(
    {"$comment", "contentEncoding", "contentMediaType", "default", "deprecated", "description"}
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
    {"additionalProperties", "contains", "contentSchema", "else", "if", "items", "not", "propertyNames", "then"}
    | {"unevaluatedItems", "unevaluatedProperties"}
)
"""The keywords whose value is a schema."""
_LISTS: Final = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
"""The keywords whose value is a list of schemas."""
_NAMED: Final = frozenset({"dependentSchemas", "patternProperties", "properties"})
"""The keywords whose value has schemas by name."""
_REFERENCES: Final = "$ref", "$dynamicRef"
_FORMATS: Final = frozenset(
    {"date", "date-time", "duration", "email", "hostname", "idn-email", "idn-hostname", "ipv4", "ipv6", "iri", "time"}
    | {"iri-reference", "json-pointer", "relative-json-pointer", "uri", "uri-reference", "uri-template", "uuid"}
)
"""The formats that are checked.  With `regex`, clients would choose patterns to compile."""

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
    whole = expand({**written, "properties": {**written["properties"], **OURS}})
    own = {name: field for name, field in whole["properties"].items() if name not in OURS}
    posted = {**own, "label": OURS["label"], "replaces": {"type": "string", "maxLength": MAX_ID}}
    size = longest({**whole, "properties": posted})
    limit = max_bytes or _payload_limit(size)
    cost = Estimate(limit, clock).explanation({**whole, "properties": own})
    if cost > BUDGET:
        raise ValueError(
            f"may take {cost / 1000:.0f} microseconds to refuse a frame of {limit} bytes, and the most is "
            f"{BUDGET // 1000}: give arrays a maxItems, objects a maxProperties and strings with a pattern "
            "a maxLength; and compare few numbers"
        )
    # The server writes six bytes for what a client may write in twelve.
    return OperatorSchema(_form(whole), limit, limit if size is None else size // 2)


def _payload_limit(size: int | None) -> int:
    """Return the payload limit for messages of at most so many bytes, or of any size; raise ValueError if too large."""
    limit = 0 if size is None else ceil((size + SPACE) / 1024) * 1024
    if limit > MOST_BYTES:
        raise ValueError(
            f"allows frames of {size} bytes, and the most is {MOST_BYTES}: shorten its fields, or give --max-message"
        )
    return max(limit, MAX_MESSAGE)


def _form(schema: dict[str, Any]) -> Form:
    try:
        return Form(schema)
    except (jsonschema_rs.ValidationError, ValueError) as error:
        raise ValueError(f"cannot be used ({_line(error)})") from None


def _line(error: Exception) -> str:
    return getattr(error, "message", str(error)).partition("\n")[0]


def check_schema(schema: dict[str, Any]) -> None:
    """Raise ValueError with the most relevant fault of a document that is no JSON Schema (2020-12)."""
    validator = Draft202012Validator(Draft202012Validator.META_SCHEMA)
    fault = best_match(validator.iter_errors(schema))
    if fault is not None:
        place = "/".join(map(str, fault.absolute_path))
        raise ValueError(f"is not a JSON Schema: /{place}: {_line(fault)}")


def _check_document(written: object) -> None:
    """Raise ValueError unless a document is a schema of the right draft."""
    if not isinstance(written, dict):
        raise ValueError("is not a JSON object")  # noqa: TRY004 -- a value, for a caller that reads files
    if written.get("$schema", DRAFT) != DRAFT:
        raise ValueError(f"has another $schema than {DRAFT}")
    _check_nesting(written)
    check_schema(written)


def _check_nesting(written: object) -> None:
    """Raise ValueError if a document is nested so deeply that a walk through it, or its encoding, could fail."""
    level = [written]
    for _ in range(MAX_NESTING):
        level = [
            inner
            for one in level
            for inner in (one.values() if isinstance(one, dict) else one if isinstance(one, list) else ())
        ]
        if not level:
            return
    raise ValueError(f"is nested deeper than {MAX_NESTING}")


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


def expand(document: dict[str, Any]) -> Any:
    """Return a schema without references; raise ValueError if they lead away, or make it too large."""
    return _Expansion(document).expand(document)


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
    if schema.get("format", "date") not in _FORMATS:
        raise ValueError(f'has the format "{schema["format"]}", which is not one of {", ".join(sorted(_FORMATS))}')


# The file


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
        raise ValueError(f"{path} {str(error)[:MAX_REASON]}") from None
