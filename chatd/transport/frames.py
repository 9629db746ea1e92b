"""The JSON of the wire: text from and to typed frames.

`schemas/` is the single source of the frames that clients may send: `message.json` for a post, `page.json`,
`typing.json`, `remove.json` and `token.json` for the frames with a `type`.  An operator may replace `message.json`
(`chatd.transport.operator_schema`).  A compiled validator accepts or refuses a frame in a fraction of a microsecond.
`chatd.transport.explainer` then finds the reason for a refusal.

Every message is encoded once, for all readers.  It becomes its WebSocket frame here, and a room keeps nothing
else of it.  The frames of a server are not masked, so the bytes are the same for every client (RFC 6455,
section 5.1).  Readers of Server-Sent Events get the same JSON, taken out of the frame again.

This module is pure: bytes in, values out.
"""

import datetime as dt
import importlib.resources
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, NoReturn

import orjson

from chatd.messages import REMOVED, Code, Entry, Id, Join, Leave, PageRequest, Post, Renewal, Typing
from chatd.room.moderation import is_room
from chatd.room.presence import PRESENCE, TYPING
from chatd.transport import deflate
from chatd.transport.explainer import Part
from chatd.transport.framing import payload, server_frame_at, text_frame

_NOT_JSON: Final = "Invalid JSON format."
_HINTS: Final = {_NOT_JSON: 'Send a JSON object such as {"username":"ann","message":"hi"}'}
"""How to correct a frame, by the words of its error."""
MAX_MESSAGE: Final = 16 << 10
"""The largest size of a posted frame in bytes by default: 530 code points, each escaped in twelve bytes, fit twice."""
MAX_BRACKETS: Final = 8192
"""The most `[` and `{` in a frame with an operator's schema, because each of them may cost 60 ns to parse."""
SAFE_DEPTH: Final = 200
"""The number of `[` and `{` up to which a frame is certainly not nested too deeply to be encoded again."""
_FIXED: Final = "username", "message", "label", "replaces"
"""The fields of a post that every server knows."""
_TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,3})?Z")
_LABEL = re.compile(r"[!-~]{1,64}")


class FrameError(ValueError):
    """A refused frame; the text of the error is sent to the client.

    `label` is the frame's, if it has a good one, so that the client knows which was meant.
    """

    room: str | None = None
    """The room of the frame, on a connection that may be in many, if the frame names one."""

    def __init__(self, message: str, label: str | None = None) -> None:
        super().__init__(message)
        self.label = label


class SchemaError(FrameError):
    """A frame that breaks its schema; the fault is looked for only when the text is read."""

    def __init__(self, form: "Form", document: object) -> None:
        super().__init__("", _label(document))
        self._form = form
        self._document = document

    def __str__(self) -> str:
        """Name the fault."""
        return f"Validation error: {self._form.explain(self._document)}"


Frame = Post | PageRequest | Renewal | Typing
"""A valid frame of a client."""


class Form:
    """One kind of frame that clients send, as a JSON Schema (2020-12) without references defines it."""

    def __init__(self, schema: dict[str, Any]) -> None:
        self.schema = schema
        self._part = Part(schema)
        self.accepts = self._part.accepts

    @classmethod
    def load(cls, name: str) -> "Form":
        """Return the form that `schemas/NAME.json` defines."""
        return cls(orjson.loads(importlib.resources.files("chatd").joinpath(f"schemas/{name}.json").read_bytes()))

    def explain(self, document: object) -> str | None:
        """Name the first fault in the order of the schema's properties, unknown keys last, or return None."""
        return None if self.accepts(document) else self._part.fault(document)


MESSAGE: Final = Form.load("message")
FORMS: Final = {
    "history": Form.load("page"),
    "remove": Form.load("remove"),
    "token": Form.load("token"),
    "typing": Form.load("typing"),
}
"""The kinds of frames with a `type`, by that type."""
JOIN: Final = Form.load("join")
LEAVE: Final = Form.load("leave")
PAGE_LIMIT: Final[int] = FORMS["history"].schema["properties"]["limit"]["maximum"]
"""The largest number of messages in a page."""
PAGE_DEFAULT: Final[int] = FORMS["history"].schema["properties"]["limit"]["default"]
"""The number of messages in a page by default."""


class Vocabulary:
    """The frames that clients of one server may send, which change if the operator changes the schema of a message.

    Its attributes are functions, made for the schema in force.  Each raises FrameError for a text that is not JSON
    (RFC 8259: neither NaN nor a lone surrogate is; of duplicate keys the last counts) or not what its schema asks for.
    """

    parse: Callable[[bytes], Frame]
    """Parses the text of a frame."""
    parse_post: Callable[[bytes], Post]
    """Parses a post over HTTP."""

    def __init__(self) -> None:
        self.use(MESSAGE, MAX_MESSAGE)

    def use(self, message: Form, max_bytes: int) -> None:
        """Accept these messages from now on, in frames of at most so many bytes."""
        self.message, self.max_bytes = message, max_bytes
        self._typing, self.join = FORMS["typing"], JOIN
        if message is not MESSAGE:
            self._typing, self.join = (_renamed(form, message) for form in (self._typing, JOIN))
        plain = message is MESSAGE and max_bytes <= MAX_MESSAGE
        self.parse, self.parse_post = _readers(message, self._typing, plain=plain)

    @property
    def usernames(self) -> str:
        """The length of usernames, in words."""
        schema = self._typing.schema["properties"]["username"]
        return f"{schema.get('minLength', 0)} to {schema['maxLength']} characters"

    def is_username(self, value: str) -> bool:
        """Check a username against the schema."""
        return self._typing.accepts({"type": "typing", "username": value})


def _renamed(form: Form, message: Form) -> Form:
    """Return a form whose usernames are those of messages."""
    named = {**form.schema["properties"], "username": message.schema["properties"]["username"]}
    return Form({**form.schema, "properties": named})


def _readers(message: Form, typing: Form, *, plain: bool) -> tuple[Callable[[bytes], Frame], Callable[[bytes], Post]]:
    """Make the functions of a Vocabulary; the `plain` ones are for messages without fields of the operator's own."""
    accepts = message.accepts
    load, post = (orjson.loads, _post) if plain else (_load_bounded, _extended_post)

    def parse(text: bytes) -> Frame:
        try:
            document = load(text)
        except orjson.JSONDecodeError:
            raise FrameError(_NOT_JSON) from None
        if accepts(document):
            return post(document)
        if not isinstance(document, dict) or "type" not in document:
            return _refuse(message, document)
        return _typed(document, typing)

    def parse_post(text: bytes) -> Post:
        try:
            document = load(text)
        except orjson.JSONDecodeError:
            raise FrameError(_NOT_JSON) from None
        if not accepts(document):
            _refuse(message, document)
        return post(document)

    return parse, parse_post


def _typed(document: dict[str, Any], typing: Form) -> Frame:
    """Read a frame that has a type."""
    kind = document["type"]
    if not isinstance(kind, str) or kind not in FORMS:
        raise FrameError(f'Validation error: "type" must be one of [{", ".join(FORMS)}]', _label(document))
    if kind == "history":
        return page_request(document)
    form = typing if kind == "typing" else FORMS[kind]
    if not form.accepts(document):
        _refuse(form, document)
    if kind == "token":
        return Renewal(document["token"], document.get("label"))
    if kind == "remove":
        return removal(Id.parse(document["id"]), document.get("label"))
    return Typing(document["username"])


def _post(document: dict[str, Any]) -> Post:
    """Read a document that its schema accepts."""
    post = Post(document["username"], document["message"], document.get("label"))
    return post._replace(replaces=Id.parse(document["replaces"])) if "replaces" in document else post


def _extended_post(document: dict[str, Any]) -> Post:
    """Read a document that an operator's schema accepts."""
    extra = {name: value for name, value in document.items() if name not in _FIXED}
    replaces = Id.parse(document["replaces"]) if "replaces" in document else None
    return Post(
        document["username"], document["message"], document.get("label"), replaces=replaces, extra=extra or None
    )


def removal(message: Id, label: str | None) -> Post:
    """Return the post that removes a message; the caller adds the username."""
    return Post("", REMOVED, label, replaces=message, removed=True)


def page_request(document: dict[str, Any]) -> PageRequest:
    """Read a frame of the type `history`; raises FrameError for what its schema does not allow."""
    form = FORMS["history"]
    if not form.accepts(document):
        _refuse(form, document)
    before, after = (Id.parse(document[name]) if name in document else None for name in ("before", "after"))
    # A limit of 5.0 is an integer too (JSON Schema 2020-12, validation, section 6.1.1).
    return PageRequest(before, after, int(document.get("limit", PAGE_DEFAULT)), document.get("label"))


def _load_bounded(text: bytes) -> Any:
    """Parse JSON that an operator's schema may accept at any depth; refuse what takes long or cannot be encoded."""
    brackets = text.count(b"[") + text.count(b"{")
    if brackets > MAX_BRACKETS:
        raise FrameError(f'Validation error: "value" contains more than {MAX_BRACKETS} brackets')
    document = orjson.loads(text)
    if brackets > SAFE_DEPTH:
        _encode(document)
    return document


def _encode(document: Any) -> bytes:
    """Encode a document that a client sent; orjson reads deeper ones than it encodes."""
    try:
        return orjson.dumps(document)
    except orjson.JSONEncodeError:
        raise FrameError('Validation error: "value" is nested too deeply', _label(document)) from None


def _refuse(form: Form, document: object) -> NoReturn:
    raise SchemaError(form, document)


def _label(document: object) -> str | None:
    label = document.get("label") if isinstance(document, dict) else None
    return label if is_label(label) else None


def is_label(value: object) -> bool:
    """Check that a value is a label: 1 to 64 visible ASCII characters."""
    return isinstance(value, str) and _LABEL.fullmatch(value) is not None


STANDARD: Final = Vocabulary()
"""The frames that clients may send to a server without a schema of the operator's own."""


def parse_seed(text: bytes, message: Form = MESSAGE) -> tuple[Entry, ...]:
    """Parse the messages of a new log: a list of posts with a `timestamp` each, oldest first.

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
        fault = message.explain(document)
        if not fault:
            fault = next((f'"{name}" is not allowed' for name in ("label", "replaces") if name in document), None)
        if fault:
            raise FrameError(f"message {number}: {fault}")
        if not isinstance(timestamp, str) or not _TIMESTAMP.fullmatch(timestamp) or not _seconds(timestamp):
            raise FrameError(f'message {number}: "timestamp" must be a time such as 2024-10-20T12:30:00Z')
        if entries and _seconds(timestamp) < _seconds(entries[-1].timestamp):
            raise FrameError(f'message {number}: "timestamp" is before that of message {number - 1}')
        post = _extended_post(document)
        entries.append(Entry(number, post.username, post.message, timestamp, extra=post.extra))
    return tuple(entries)


def _seconds(timestamp: str) -> float:
    """Return the seconds since 1970, or 0 for a time that does not exist."""
    try:
        return dt.datetime.fromisoformat(timestamp).timestamp()
    except ValueError:
        return 0.0


def message_frame(epoch: str, entry: Entry) -> bytes:
    """Encode the frame that carries one message to every member."""
    number, username, message, timestamp, _, replaces, removed, replaced, extra = entry
    fields = {"username": username, "message": message, "timestamp": timestamp}
    if extra is not None:
        fields |= extra
    data = orjson.dumps(fields)
    if replaces is None and replaced is None:
        return text_frame(b'{"type":"message","id":"%b-%d","data":%b}' % (epoch.encode(), number, data))
    notes = [f'"{name}":"{epoch}-{id_}",' for name, id_ in (("replaces", replaces), ("replaced", replaced)) if id_]
    notes += ['"removed":true,'] * removed
    head = f'{{"type":"message","id":"{epoch}-{number}",{"".join(notes)}"data":'
    return text_frame(b"%b%b}" % (head.encode(), data))


def compressor() -> Callable[[bytes], bytes]:
    """Return a function that compresses frames of message_frame, each with reference to all before it."""
    return deflate.compressor()


_NOTES = re.compile(
    rb'"id":"[^"]*-(\d+)"(?:,"replaces":"([^"]*-(\d+))")?(?:,"replaced":"([^"]*-(\d+))")?(,"removed":true)?,"data":'
)
"""What stands before the data in the frame of an entry that was edited, or is an edit."""


def entry_of(frame: bytes) -> Entry:
    """Return the entry that message_frame() encoded, without its author."""
    text = payload(frame)
    match: Any = _NOTES.search(text)
    number, _, replaces, _, replaced, removed = match.groups()
    data = orjson.loads(text[match.end() : -1])
    return Entry(
        int(number),
        data.pop("username"),
        data.pop("message"),
        data.pop("timestamp"),
        replaces=replaces and int(replaces),
        removed=removed is not None,
        replaced=replaced and int(replaced),
        extra=data or None,
    )


def _envelope(frame: bytes, notes: dict[str, Any]) -> None:
    """Add to the notes of a history what stands beside the data in the frame of an entry."""
    match: Any = _NOTES.search(frame)
    number, replaces, _, replaced, _, removed = match.groups()
    for name, id_ in (("replaced", replaced), ("replaces", replaces)):
        if id_:
            notes.setdefault(name, {})[number.decode()] = id_.decode()
    if removed:
        notes.setdefault("removed", []).append(int(number))


def history_frame(
    epoch: str,
    number: int,
    messages: Iterable[bytes],
    *,
    more: bool = False,
    resumed: bool | None = None,
    label: str | None = None,
) -> bytes:
    """Encode the first frame of a member, or a page.

    The messages are frames of message_frame, oldest first, and the last of them has the number `number`.
    With `more`, the log holds older ones (or newer ones, for a page that goes forward).  `resumed` answers a
    client that named its last message.  `label` is the label of the page request.  Encoded messages are not
    encoded again.
    """
    said = b""
    if more:
        said += b'"more":true,'
    if resumed is not None:
        said += b'"resumed":true,' if resumed else b'"resumed":false,'
    if label is not None:
        said += b'"label":%b,' % orjson.dumps(label)
    # Only the frame of an edit, or of an entry that was edited, has more before its data than the id.
    longest = 10 + len(f'{{"type":"message","id":"{epoch}-{number}",')
    data: list[bytes] = []
    notes: dict[str, Any] = {}
    for frame in messages:
        start = frame.index(b'"data":')
        if start > longest:
            _envelope(frame, notes)
        data.append(frame[start + 7 : -1])
    if notes:
        said += orjson.dumps(notes)[1:-1] + b","
    head = b'{"type":"history","id":"%b-%d",%b"data":[' % (epoch.encode(), number, said)
    return text_frame(head + b",".join(data) + b"]}")


def ack_frame(message: Id, label: str | None, *, duplicate: bool) -> bytes:
    """Encode the frame that acknowledges a post; `duplicate` means that it was stored before."""
    document: dict[str, object] = {"type": "ack"}
    if label is not None:
        document["label"] = label
    document["id"] = str(message)
    if duplicate:
        document["duplicate"] = True
    return text_frame(orjson.dumps(document))


def token_frame(expires: float, label: str | None) -> bytes:
    """Encode the frame that accepts a new token, which expires at a time in seconds since 1970."""
    labelled = {} if label is None else {"label": label}
    return text_frame(orjson.dumps({"type": "token", **labelled, "expires": int(expires)}))


def error_frame(
    message: str, code: Code | None = None, label: str | None = None, retry_after: float | None = None
) -> bytes:
    """Encode the frame that refuses a frame of one client; `retry_after` is in seconds."""
    optional = {"hint": _HINTS.get(message), "code": code, "label": label, "retry_after": retry_after}
    document = {"type": "error", "message": message}
    return text_frame(orjson.dumps(document | {name: value for name, value in optional.items() if value is not None}))


def presence_frame(count: int, **names: Sequence[str]) -> bytes:
    """Encode the number of members with their names: all `users`, or those that `join` and `leave`."""
    return text_frame(orjson.dumps({"type": "presence", "data": {"count": count, **names}}))


def typing_frame(users: Sequence[str]) -> bytes:
    """Encode the names of the users that are typing."""
    return text_frame(orjson.dumps({"type": "typing", "data": {"users": users}}))


_TYPE_AND_ID = re.compile(rb'\{"type":"([a-z]+)"(?:,"id":"([^"]+)")?')


def event(frame: bytes) -> bytes:
    """Convert a frame to a Server-Sent Event (HTML Living Standard, section 9.2.5): its type, its id, its JSON."""
    text = payload(frame)
    match = _TYPE_AND_ID.match(text)
    kind, number = match.groups() if match else (b"message", None)
    return b"event: %b\n%bdata: %b\n\n" % (kind, b"id: %b\n" % number if number else b"", text)


# Frames of connections that may be in many rooms


ADDRESSED: Final = sorted({*FORMS, "join", "leave"})
"""The types of frames on a connection that may be in many rooms."""
_EVENTS: Final = {
    events: events
    for events in map(frozenset, ((), (PRESENCE,), (TYPING,), (PRESENCE, TYPING)))  # each set once
}


def parse_addressed(text: bytes, vocabulary: Vocabulary) -> tuple[str | None, Join | Leave | Frame]:
    """Parse the text of a frame on a connection that may be in many rooms; return its room too.

    A frame without a room, which only a new token may be, has the room None.  Raises FrameError as Vocabulary.parse
    does.
    """
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError:
        raise FrameError(_NOT_JSON) from None
    kind = document.get("type") if isinstance(document, dict) else None
    if not isinstance(document, dict) or kind == "token":
        return None, vocabulary.parse(text)
    room = document.get("room")
    named = room if isinstance(room, str) and is_room(room) else None
    if "type" in document and (not isinstance(kind, str) or kind not in ADDRESSED):
        unknown = FrameError(f'Validation error: "type" must be one of [{", ".join(ADDRESSED)}]', _label(document))
        unknown.room = named
        raise unknown
    if named is None:
        error = SchemaError(LEAVE, {"type": "leave", **({"room": room} if "room" in document else {})})
        error.label = _label(document)
        raise error
    try:
        return named, _parse_for_room(document, vocabulary)
    except FrameError as error:
        error.room = named
        raise


def _parse_for_room(document: dict[str, Any], vocabulary: Vocabulary) -> Join | Leave | Frame:
    """Read the document of a frame that names a room."""
    kind = document.get("type")
    if kind == "join":
        if not vocabulary.join.accepts(document):
            _refuse(vocabulary.join, document)
        last = Id.parse(document["last_event_id"]) if "last_event_id" in document else None
        events = _EVENTS[frozenset(document.get("events", ()))]
        return Join(last, events, document.get("username"), document.get("label"))
    if kind == "leave":
        if not LEAVE.accepts(document):
            _refuse(LEAVE, document)
        return Leave(document.get("label"))
    del document["room"]
    return vocabulary.parse(_encode(document))


def left_frame(
    label: str | None = None, message: str | None = None, code: Code | None = None, retry_after: float | None = None
) -> bytes:
    """Encode the frame after which no frame of a room follows; `message` and `code` state why the server ends it."""
    optional = {"message": message, "code": code, "label": label, "retry_after": retry_after}
    said = {name: value for name, value in optional.items() if value is not None}
    return text_frame(orjson.dumps({"type": "left", **said}))


def labelled(frame: bytes, label: str | None) -> bytes:
    """Add the label of a join to the history frame that answers it."""
    if label is None:
        return frame
    text = payload(frame)
    place = text.index(b'"data":[')
    return text_frame(b'%b"label":%b,%b' % (text[:place], orjson.dumps(label), text[place:]))


def addressed(room: str) -> Callable[[bytes], bytes]:
    """Return the form for connections in many rooms: it adds the name of this room to a frame, after the type."""
    named = b',"room":"%b"' % room.encode()

    def form(frame: bytes) -> bytes:
        text = payload(frame)
        place = text.index(b'"', _TYPE_BEGINS) + 1
        return text_frame(text[:place] + named + text[place:])

    return form


_TYPE_BEGINS: Final = len('{"type":"')


def each_frame(frames: bytes) -> Iterator[bytes]:
    """Iterate over whole frames of a server that are joined."""
    start = 0
    while found := server_frame_at(frames, start):
        yield frames[start : found.end]
        start = found.end


def shared_event(frame: bytes, form: Callable[[bytes], bytes], ids: Callable[[str], Sequence[str]]) -> bytes:
    """Convert a frame to a Server-Sent Event of a stream of many rooms.

    `form` adds its room, and `ids` returns the ids of all rooms from that of the frame.  An id has no epoch if its
    epoch is that of the id before it.
    """
    match: Any = _TYPE_AND_ID.match(payload(frame))
    kind, own = match.groups()
    head = b""
    if own:
        texts, epoch = [], ""
        for text in ids(own.decode()):
            before, (epoch, _, number) = epoch, text.partition("-") if text else (epoch, "", "")
            texts.append(number if epoch == before else text)
        head = b"id: %b\n" % ",".join(texts).encode()
    return b"event: %b\n%bdata: %b\n\n" % (kind, head, payload(form(frame)))
