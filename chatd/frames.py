"""The words of the wire: JSON text from and to typed frames.

`schemas/message.json` is the single source of what a client may post.  A frame is judged
twice at most: a compiled validator says yes or no in a fraction of a microsecond, and only a
frame that it refuses is read again by the slow one, which knows why.  A property test holds the
two to one opinion.

What leaves is encoded once, whoever reads it: a message becomes its WebSocket frame here, and
that frame is all that a room keeps of it.  A server's frames are not masked, so the bytes are
the same for every client (RFC 6455, section 5.1).

This module is pure: bytes in, values out.
"""

import datetime as dt
import importlib.resources
import re
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

import jsonschema
import jsonschema_rs
import orjson

SCHEMA: Final[dict[str, Any]] = orjson.loads(
    importlib.resources.files("chatd").joinpath("schemas/message.json").read_bytes()
)
"""The JSON Schema (2020-12) of a posted message."""

_accepts = jsonschema_rs.validator_for(SCHEMA).is_valid
_explainer = jsonschema.Draft202012Validator(SCHEMA)

_WORDS: Final = {
    "required": '"{name}" is required',
    "type": '"{name}" must be a string',
    "minLength": '"{name}" is not allowed to be empty',
    "maxLength": '"{name}" length must be less than or equal to {limit} characters long',
}
_TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,3})?Z")


class Post(NamedTuple):
    """What a client asks to be said, already checked."""

    username: str
    message: str


class Entry(NamedTuple):
    """One message of a room's log."""

    number: int
    """1, 2, 3 ... in its room, without gaps."""
    username: str
    message: str
    timestamp: str
    """RFC 3339 in UTC, as `YYYY-MM-DDTHH:MM:SS.mmmZ`."""


class FrameError(ValueError):
    """A frame that is refused; its text is the one that clients know."""


def parse_post(text: bytes) -> Post:
    """Read a posted frame.

    Raises FrameError when it is not JSON (RFC 8259: neither NaN nor a lone surrogate is; of
    duplicate keys the last counts) or not what the schema asks for.
    """
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError:
        raise FrameError("Invalid JSON format.") from None
    if not _accepts(document):
        raise FrameError(f"Validation error: {explain(document)}")
    return Post(document["username"], document["message"])


def explain(document: object) -> str | None:
    """Say what the schema has against a document: the first fault in its property order, then unknown keys."""
    if not isinstance(document, dict):
        return '"value" must be of type object'
    # The schema asks of a value no more than its type: what is inside is left out, since the explainer
    # would quote it, however deep it is.
    shallow = {name: type(value)() if isinstance(value, (dict, list)) else value for name, value in document.items()}
    faults: dict[str, str] = {}
    for error in _explainer.iter_errors(shallow):
        if error.validator == "required":
            name = next(name for name in error.validator_value if name not in error.instance and name not in faults)
        elif error.validator == "additionalProperties":
            continue
        else:
            name = str(error.absolute_path[0])
        faults.setdefault(name, _WORDS[str(error.validator)].format(name=name, limit=error.validator_value))
    faults |= {name: f'"{name}" is not allowed' for name in document if name not in SCHEMA["properties"]}
    return next((faults[name] for name in [*SCHEMA["properties"], *document] if name in faults), None)


def parse_seed(text: bytes) -> tuple[Entry, ...]:
    """Read the messages that a new log begins with: a list of `{"username", "message", "timestamp"}`, oldest first.

    Raises FrameError with the place and the reason.
    """
    try:
        documents = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise FrameError(f"is not JSON: {error}") from None
    if not isinstance(documents, list):
        raise FrameError("must be a list of messages")
    entries: list[Entry] = []
    for number, document in enumerate(documents, 1):
        timestamp = document.pop("timestamp", None) if isinstance(document, dict) else None
        fault = explain(document)
        if fault:
            raise FrameError(f"message {number}: {fault}")
        if not isinstance(timestamp, str) or not _TIMESTAMP.fullmatch(timestamp) or not _seconds(timestamp):
            raise FrameError(f'message {number}: "timestamp" must be a time such as 2024-10-20T12:30:00Z')
        if entries and _seconds(timestamp) < _seconds(entries[-1].timestamp):
            raise FrameError(f'message {number}: "timestamp" is before that of message {number - 1}')
        entries.append(Entry(number, document["username"], document["message"], timestamp))
    return tuple(entries)


def _seconds(timestamp: str) -> float:
    """Seconds since 1970, or 0 for a time that no calendar has."""
    try:
        return dt.datetime.fromisoformat(timestamp).timestamp()
    except ValueError:
        return 0.0


def text_frame(payload: bytes) -> bytes:
    """Wrap a text in one unmasked, unfragmented WebSocket frame (RFC 6455, section 5.2)."""
    size = len(payload)
    if size < 126:
        return b"\x81%c%b" % (size, payload)
    if size < 65536:
        return b"\x81\x7e" + size.to_bytes(2) + payload
    return b"\x81\x7f" + size.to_bytes(8) + payload


def message_frame(epoch: str, entry: Entry) -> bytes:
    """The WebSocket frame that carries one message to every member."""
    number, username, message, timestamp = entry
    data = orjson.dumps({"username": username, "message": message, "timestamp": timestamp})
    return text_frame(b'{"type":"message","id":"%b-%d","data":%b}' % (epoch.encode(), number, data))


def history_frame(epoch: str, number: int, messages: Iterable[bytes], *, more: bool) -> bytes:
    """The WebSocket frame with which a member begins.

    `messages` are the frames of message_frame, oldest first, the last of them numbered `number`;
    `more` says that the log holds older ones.  What is encoded already is not encoded again.
    """
    head = b'{"type":"history","id":"%b-%d",%b"data":[' % (epoch.encode(), number, b'"more":true,' if more else b"")
    return text_frame(head + b",".join([frame[frame.index(b'"data":') + 7 : -1] for frame in messages]) + b"]}")


def error_frame(message: str, code: str | None = None) -> bytes:
    """The WebSocket frame that tells one client why its frame was refused."""
    return text_frame(orjson.dumps({"type": "error", "message": message} | ({"code": code} if code else {})))
