"""The words of the wire: JSON text from and to typed frames.

`schemas/` is the single source of what a client may send: `message.json` for a post, `page.json` and
`typing.json` for the frames that carry a `type`.  A frame is judged twice at most: a compiled
validator says yes or no in a fraction of a microsecond, and only a frame that it refuses is read again by
the slow one, which knows why.  A property test holds the two to one opinion.

What leaves is encoded once, whoever reads it: a message becomes its WebSocket frame here, and
that frame is all that a room keeps of it.  A server's frames are not masked, so the bytes are
the same for every client (RFC 6455, section 5.1).  A reader of Server-Sent Events gets the same JSON,
taken out of the frame again.

This module is pure: bytes in, values out.
"""

import datetime as dt
import importlib.resources
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, NoReturn

import jsonschema
import jsonschema_rs
import orjson
from jsonschema.validators import extend

from chatd.messages import Code, Entry, Id, PageRequest, Post, Typing
from chatd.transport.framing import payload, text_frame

_WORDS: Final = {
    "required": '"{name}" is required',
    "minLength": '"{name}" is not allowed to be empty',
    "maxLength": '"{name}" length must be less than or equal to {limit} characters long',
    "pattern": '"{name}" fails to match the required pattern: /{limit}/',
    "minimum": '"{name}" must be greater than or equal to {limit}',
    "maximum": '"{name}" must be less than or equal to {limit}',
    "string": '"{name}" must be a string',
    "integer": '"{name}" must be an integer',
}
_NOT_JSON: Final = "Invalid JSON format."
_HINTS: Final = {_NOT_JSON: 'Send a JSON object such as {"username":"ann","message":"hi"}'}
"""How to correct a frame, by the words of its error."""
_CONFLICT: Final = '"value" contains a conflict between optional exclusive peers [before, after]'
_TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,3})?Z")
_LABEL = re.compile(r"[!-~]{1,64}")


class FrameError(ValueError):
    """A frame that is refused; its text is the one that clients know.

    `label` is the frame's, if it has a good one, so that the client knows which was meant.
    """

    def __init__(self, message: str, label: str | None = None) -> None:
        super().__init__(message)
        self.label = label


def _pattern(_: object, pattern: str, instance: object, __: object) -> Iterator[jsonschema.ValidationError]:
    """`pattern` as JSON Schema means it: `$` is the end of the text, not also the place before a last newline."""
    if isinstance(instance, str) and not re.search(pattern.replace("$", r"\Z"), instance):
        yield jsonschema.ValidationError("")


_Explainer: Any = extend(jsonschema.Draft202012Validator, {"pattern": _pattern})


class Form:
    """One kind of frame that clients send: `schemas/NAME.json`, and what it has against a document."""

    def __init__(self, name: str) -> None:
        text = importlib.resources.files("chatd").joinpath(f"schemas/{name}.json").read_bytes()
        self.schema: dict[str, Any] = orjson.loads(text)
        """The JSON Schema (2020-12)."""
        self.accepts = jsonschema_rs.validator_for(self.schema).is_valid
        self._explainer = _Explainer(self.schema)

    def explain(self, document: object) -> str | None:
        """Say what is wrong: the first fault in the schema's property order, unknown keys last; None if nothing is."""
        if not isinstance(document, dict):
            return '"value" must be of type object'
        # The schemas ask of a value no more than its type: what is inside is left out, since the explainer
        # would quote it, however deep it is.
        shallow = {
            name: type(value)() if isinstance(value, (dict, list)) else value for name, value in document.items()
        }
        faults: dict[str | None, str] = {}
        known = self.schema["properties"]
        for error in self._explainer.iter_errors(shallow):
            keyword, limit = str(error.validator), error.validator_value
            if keyword == "additionalProperties":
                continue
            if keyword == "not":
                faults[None] = _CONFLICT
                continue
            if keyword == "required":
                name = next(name for name in limit if name not in error.instance and name not in faults)
            else:
                name = str(error.absolute_path[0])
            words = _WORDS[limit if keyword == "type" else keyword]
            faults.setdefault(name, words.format(name=name, limit=limit))
        faults |= {name: f'"{name}" is not allowed' for name in document if name not in known}
        return next((faults[name] for name in [*known, None, *document] if name in faults), None)


MESSAGE: Final = Form("message")
FORMS: Final = {"history": Form("page"), "typing": Form("typing")}
"""By the `type` of the frames that have one."""
PAGE_LIMIT: Final[int] = FORMS["history"].schema["properties"]["limit"]["maximum"]
"""How many messages a page holds at most."""
PAGE_DEFAULT: Final[int] = FORMS["history"].schema["properties"]["limit"]["default"]
"""How many it holds if the client does not say."""

_accepts = MESSAGE.accepts


def parse(text: bytes) -> Post | PageRequest | Typing:
    """Read what a client sent over WebSocket.

    Raises FrameError when it is not JSON (RFC 8259: neither NaN nor a lone surrogate is; of
    duplicate keys the last counts) or not what its schema asks for.
    """
    document = _load(text)
    if _accepts(document):
        return Post(document["username"], document["message"], document.get("label"))
    if not isinstance(document, dict) or "type" not in document:
        return _refuse(MESSAGE, document)
    kind = document["type"]
    if not isinstance(kind, str) or kind not in FORMS:
        raise FrameError(f'Validation error: "type" must be one of [{", ".join(FORMS)}]', _label(document))
    if kind == "history":
        return page_request(document)
    if not FORMS[kind].accepts(document):
        _refuse(FORMS[kind], document)
    return Typing(document["username"])


def parse_post(text: bytes) -> Post:
    """Read what is posted where nothing else can be asked; raises FrameError as parse does."""
    document = _load(text)
    if not _accepts(document):
        _refuse(MESSAGE, document)
    return Post(document["username"], document["message"], document.get("label"))


def page_request(document: dict[str, Any]) -> PageRequest:
    """Read a frame of the type `history`; raises FrameError for what its schema does not allow."""
    form = FORMS["history"]
    if not form.accepts(document):
        _refuse(form, document)
    before, after = (Id.parse(document[name]) if name in document else None for name in ("before", "after"))
    # A limit of 5.0 is an integer too (JSON Schema 2020-12, validation, section 6.1.1).
    return PageRequest(before, after, int(document.get("limit", PAGE_DEFAULT)), document.get("label"))


def _load(text: bytes) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        raise FrameError(_NOT_JSON) from None


def _refuse(form: Form, document: object) -> NoReturn:
    raise FrameError(f"Validation error: {form.explain(document)}", _label(document))


def _label(document: object) -> str | None:
    label = document.get("label") if isinstance(document, dict) else None
    return label if is_label(label) else None


def is_label(value: object) -> bool:
    """Whether something is a good label: 1 to 64 visible ASCII characters."""
    return isinstance(value, str) and _LABEL.fullmatch(value) is not None


def is_username(value: str) -> bool:
    """Whether the schema takes this for a username."""
    return FORMS["typing"].accepts({"type": "typing", "username": value})


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
        fault = MESSAGE.explain(document)
        if not fault and "label" in document:
            fault = '"label" is not allowed'
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


def message_frame(epoch: str, entry: Entry) -> bytes:
    """The WebSocket frame that carries one message to every member."""
    number, username, message, timestamp = entry
    data = orjson.dumps({"username": username, "message": message, "timestamp": timestamp})
    return text_frame(b'{"type":"message","id":"%b-%d","data":%b}' % (epoch.encode(), number, data))


def history_frame(
    epoch: str,
    number: int,
    messages: Iterable[bytes],
    *,
    more: bool = False,
    resumed: bool | None = None,
    label: str | None = None,
) -> bytes:
    """The WebSocket frame with which a member begins, or which answers a page.

    `messages` are the frames of message_frame, oldest first, the last of them numbered `number`.
    `more` says that the log holds older ones (or newer, for a page that goes forward); `resumed` answers a
    client that named the last message it has; `label` is that of a page's request.  What is
    encoded already is not encoded again.
    """
    said = b""
    if more:
        said += b'"more":true,'
    if resumed is not None:
        said += b'"resumed":true,' if resumed else b'"resumed":false,'
    if label is not None:
        said += b'"label":%b,' % orjson.dumps(label)
    head = b'{"type":"history","id":"%b-%d",%b"data":[' % (epoch.encode(), number, said)
    return text_frame(head + b",".join([frame[frame.index(b'"data":') + 7 : -1] for frame in messages]) + b"]}")


def ack_frame(message: Id, label: str | None, *, duplicate: bool) -> bytes:
    """The WebSocket frame that tells one client that its post is in the log, or was."""
    document: dict[str, object] = {"type": "ack"}
    if label is not None:
        document["label"] = label
    document["id"] = str(message)
    if duplicate:
        document["duplicate"] = True
    return text_frame(orjson.dumps(document))


def error_frame(
    message: str, code: Code | None = None, label: str | None = None, retry_after: float | None = None
) -> bytes:
    """The WebSocket frame that tells one client why its frame was refused; `retry_after` is in seconds."""
    optional = {"hint": _HINTS.get(message), "code": code, "label": label, "retry_after": retry_after}
    document = {"type": "error", "message": message}
    return text_frame(orjson.dumps(document | {name: value for name, value in optional.items() if value is not None}))


def presence_frame(count: int, **names: Sequence[str]) -> bytes:
    """The WebSocket frame that says how many are here, and who: all `users`, or those that `join` and `leave`."""
    return text_frame(orjson.dumps({"type": "presence", "data": {"count": count, **names}}))


def typing_frame(users: Sequence[str]) -> bytes:
    """The WebSocket frame that says who is typing."""
    return text_frame(orjson.dumps({"type": "typing", "data": {"users": users}}))


_TYPE_AND_ID = re.compile(rb'\{"type":"([a-z]+)"(?:,"id":"([^"]+)")?')


def event(frame: bytes) -> bytes:
    """The same frame as a Server-Sent Event (HTML Living Standard, section 9.2.5): its type, its id, its JSON."""
    text = payload(frame)
    match = _TYPE_AND_ID.match(text)
    kind, number = match.groups() if match else (b"message", None)
    return b"event: %b\n%bdata: %b\n\n" % (kind, b"id: %b\n" % number if number else b"", text)
