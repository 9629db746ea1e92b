"""The rooms over plain HTTP, with the ids and the checks that WebSocket clients know.

GET  /rooms                     the rooms that a token may read: ?after=NAME, ?limit=N
GET  /rooms/NAME                the page of the room: see chatd.transport.page (handshakes never arrive here)
GET  /rooms/NAME/messages       a page of the log: ?before=ID, ?after=ID, ?limit=N
GET  /rooms/NAME/messages/ID    one message
POST /rooms/NAME/messages       post a message, or an edit of one; Idempotency-Key is the label
DELETE /rooms/NAME/messages/ID  remove one message
GET  /rooms/NAME/presence       who is in the room
GET  /rooms/NAME/export         all messages as JSON Lines, or those after an ID: see chatd.transport.export
GET  /rooms/NAME/events         Server-Sent Events: see chatd.transport.sse
GET  /events                    Server-Sent Events of many rooms: ?room=NAME&room=NAME
"""

import re
from collections.abc import Callable
from http import HTTPStatus
from io import BytesIO
from math import ceil
from typing import Any, Final, cast

from twisted.internet.defer import Deferred, maybeDeferred
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.http import Request
from twisted.web.server import NOT_DONE_YET
from typing_extensions import override

from chatd.messages import Code, Entry, Id, PageRequest, Post
from chatd.room.log import (
    EncodedPage,
    Forbidden,
    InDoubt,
    LabelReused,
    LogUnavailable,
    NotReplaceable,
    Refusal,
    UnknownId,
)
from chatd.room.moderation import Visitor
from chatd.room.presence import Occupancy
from chatd.room.registry import JoinTicket, Registry
from chatd.transport.admission import Addresses, Admission, HttpError, last_id, read_query, server_stopping
from chatd.transport.connections import Connections
from chatd.transport.export import JSON_LINES, Export, ExportQueue, client_line
from chatd.transport.frames import (
    FrameError,
    ack_frame,
    history_frame,
    is_label,
    page_request,
    presence_frame,
    removal,
)
from chatd.transport.framing import payload
from chatd.transport.http import PROBLEM, ChatResource, answer, begin, header, problem, retry_after
from chatd.transport.identity import ANYONE, Identity, refusal
from chatd.transport.intake import Intake
from chatd.transport.limits import Limits
from chatd.transport.listing import RoomList, RoomPage
from chatd.transport.moderator import Moderator
from chatd.transport.page import ChatPage
from chatd.transport.session import NEW_ROOMS_EXCEEDED
from chatd.transport.sse import MAX_STREAM_ROOMS, EventStream, SharedStream
from chatd.transport.tokens import Tokens, admit, check_reading

EVENT_STREAM_TYPE: Final = "text/event-stream"
"""The media type of Server-Sent Events."""
MAX_CLIENT_ROOMS: Final = 100
"""The most rooms in an answer to a client, which may ask often."""
IDENTITY: Final = "identity"
"""The content coding of a body that is not encoded (RFC 9110, section 12.5.3)."""
PREFLIGHT_SECONDS: Final = 7200
"""The time for which a browser may cache the answer to a preflight request."""

_ROUTE = re.compile(
    r"/|/rooms|/events|(?P<room>/rooms/[^/]*)(?P<rest>/messages|/messages/(?P<id>[^/]+)|/events|/presence|/export)?"
)
_NUMBER = re.compile(r"-?[0-9]{1,15}")
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')
_logger = Logger()

_REFUSALS: Final[dict[type[Exception], tuple[HTTPStatus, str, Code]]] = {
    Forbidden: (HTTPStatus.FORBIDDEN, "only its author or a moderator may replace a message", Code.FORBIDDEN),
    LabelReused: (
        HTTPStatus.UNPROCESSABLE_ENTITY,
        "Idempotency-Key: it was given to another message",
        Code.LABEL_REUSED,
    ),
    NotReplaceable: (
        HTTPStatus.CONFLICT,
        "the message is an edit or was removed, and cannot be replaced",
        Code.NOT_REPLACEABLE,
    ),
    UnknownId: (HTTPStatus.NOT_FOUND, "there is no message of this id", Code.UNKNOWN_ID),
}
"""The errors when the log refuses a post; session.REFUSALS has their twins as frames."""

_Handler = Callable[[Identity], Any]
"""Handles a request of a client, and returns the body of the answer or NOT_DONE_YET."""


class Reply:
    """The answer to one request, whose client may have disconnected by then."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._disconnected = False
        request.notifyFinish().addErrback(self._left)

    def _left(self, _: Failure) -> None:
        self._disconnected = True

    def send(self, status: HTTPStatus, body: bytes, kind: str = "application/json", **headers: str) -> None:
        """Send the answer, if the client is still connected."""
        if not self._disconnected:
            self._request.write(answer(self._request, status, body, kind, **headers))
            self._request.finish()

    def send_all(self, handler: _Handler, identity: Identity) -> None:
        """Call a handler late, if the client is still connected, and send the answer that it returns."""
        if self._disconnected:
            return
        body = handler(identity)
        if body is not NOT_DONE_YET:
            self._request.write(body)
            self._request.finish()

    def refuse(self, refused: HttpError) -> None:
        """Answer with a problem."""
        status, body, kind = _refusal(self._request, refused)
        self.send(status, body, kind)

    def failed(self, failure: Failure) -> None:
        """Answer with the HTTP error of a failure."""
        self.refuse(_meaning(failure))


def _refusal(request: Request, refused: HttpError) -> tuple[HTTPStatus, bytes, str]:
    """Set the headers of the answer that refuses a request, and return its status, body and media type.

    An EventSource gives up for good on any status but 200 (HTML Living Standard, section 9.2.3).  It gets a
    stream that ends instead of a 503 or 429, and reconnects.
    """
    headers = {**retry_after(refused), **refused.headers}
    streams = request.path.endswith(b"/events") and EVENT_STREAM_TYPE in (header(request, b"accept") or "")
    if streams and refused.status in (HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.TOO_MANY_REQUESTS):
        return HTTPStatus.OK, b"retry: %d\n\n" % (int(headers["Retry-After"]) * 1000), EVENT_STREAM_TYPE
    for name, value in headers.items():
        request.setHeader(name, value)
    return refused.status, problem(refused.status, str(refused), refused.code), PROBLEM


def _meaning(failure: Failure) -> HttpError:
    """Return the HTTP error of a failure."""
    if isinstance(failure.value, HttpError):
        return failure.value
    if failure.check(UnknownId):
        return HttpError(*_REFUSALS[UnknownId])
    failure.trap(LogUnavailable)
    _logger.error("the log cannot be read: {error}", error=failure.value)
    return HttpError(HTTPStatus.SERVICE_UNAVAILABLE, "the log cannot be read now", Code.UNAVAILABLE)


class Posting:
    """A post in flight, whose outcome is the answer to a request (chatd.room.log.Poster).

    `stored` is called with the number of a new entry, and `status` answers for it.
    """

    def __init__(
        self,
        reply: Reply,
        epoch: Callable[[], str],
        stored: Callable[[int], None],
        status: HTTPStatus = HTTPStatus.CREATED,
    ) -> None:
        self._reply = reply
        self._epoch = epoch
        self._stored = stored
        self._status = status

    def posted(self, post: Post, number: int, *, duplicate: bool = False) -> None:
        if not duplicate:
            self._stored(number)
        message = Id(self._epoch(), number)
        status = HTTPStatus.OK if duplicate else self._status
        body = payload(ack_frame(message, post.label, duplicate=duplicate)) + b"\n"
        location = {} if post.removed else {"location": f"messages/{message}"}
        self._reply.send(status, body, **location)

    def refused(self, post: Post, error: Refusal) -> None:
        if not isinstance(error, LogUnavailable):
            self._reply.refuse(HttpError(*_REFUSALS[type(error)]))
            return
        in_doubt = isinstance(error, InDoubt)
        why = "may not have been stored; try again with the same key" if in_doubt else "was not stored; try again"
        self._reply.refuse(HttpError(HTTPStatus.SERVICE_UNAVAILABLE, f"the message {why}", Code.UNAVAILABLE))


class Api(ChatResource):
    """All resources below /rooms, and the page at /."""

    isLeaf = True

    def __init__(
        self,
        rooms: Registry,
        connections: Connections,
        admission: Admission,
        addresses: Addresses,
        tokens: Tokens | None = None,
        *,
        listing: RoomList,
        exports: ExportQueue,
        page: ChatPage | None = None,
    ) -> None:
        super().__init__()
        self._room_page = page or ChatPage()
        self._listing = listing
        self._exports = exports
        self._tokens = tokens
        self._rooms = rooms
        self._connections = connections
        self._admission = admission
        self._addresses = addresses

    @override
    def render(self, request: Request) -> Any:
        """Route a request, and answer an HttpError with a problem."""
        try:
            self._allow(request)
            return self._route(request)
        except HttpError as refused:
            return answer(request, *_refusal(request, refused))

    def _allow(self, request: Request) -> None:
        """Check the origin, and let its page read the answer (Fetch, section 3.2)."""
        origin = header(request, b"origin")
        if not self._admission.any_origin:
            request.setHeader("vary", "Origin")
        hosts = header(request, b"host"), header(request, b"x-forwarded-host")
        self._admission.check_origin(origin, *hosts)
        allowed = "*" if self._admission.any_origin else origin
        if allowed is not None:
            request.setHeader("access-control-allow-origin", allowed)
            exposed = "Link, Location, Retry-After"
            if self._tokens is not None:
                exposed += ", WWW-Authenticate"
                if self._tokens.cookie:
                    request.setHeader("access-control-allow-credentials", "true")
            request.setHeader("access-control-expose-headers", exposed)

    def _route(self, request: Request) -> Any:
        """Call the handler of this method and path; the path is not decoded."""
        if self._connections.stopping:
            raise server_stopping()
        path, _, query = request.uri.decode("latin-1").partition("?")
        match = _ROUTE.fullmatch(path)
        if match is None:
            raise HttpError(HTTPStatus.NOT_FOUND, "there is nothing here")
        many = {
            "/rooms": lambda reader: self._list_rooms(request, reader, query),
            "/events": lambda reader: self._shared_events(request, reader, query),
        }
        lists = path in many
        named = match["room"] or "/"
        room = "" if lists else self._admission.room(named)
        rest = match["rest"] or ""
        if lists:
            resource: dict[str, _Handler] = {"GET": many[path]}
        elif rest:
            resource = self._resource(request, room, match, query)
        else:
            resource = {"GET": lambda _: self._show(request, named, room)}
        method = request.method.decode("latin-1")
        if method == "OPTIONS":
            return self._preflight(request, _methods(resource))
        found = resource.get("GET" if method == "HEAD" else method)
        if found is None:
            request.setHeader("allow", _methods(resource))
            raise HttpError(HTTPStatus.METHOD_NOT_ALLOWED, f"{method} is not for this")
        _moderator(request).admit(room, _visitor(request))
        if not path.endswith("/events"):  # browsers never repeat a stream that was refused
            self._limit(request, reading=method not in {"POST", "DELETE"})
        return self._identified(request, room, found) if rest or lists else found(ANYONE)

    def _resource(self, request: Request, room: str, match: re.Match[str], query: str) -> dict[str, _Handler]:
        """Return the handlers of what is below a room, by method."""
        if match["id"] is not None:
            return {
                "GET": lambda reader: self._message(request, reader, room, match["id"]),
                "DELETE": lambda poster: self._remove(request, poster, room, match["id"]),
            }
        read = {
            "/messages": lambda reader: self._page(request, reader, room, query),
            "/events": lambda reader: self._events(request, reader, match["room"], query),
            "/presence": lambda reader: self._presence(request, reader, room),
            "/export": lambda reader: self._export(request, reader, room, query),
        }
        resource: dict[str, _Handler] = {"GET": read[match["rest"]]}
        if match["rest"] == "/messages":
            resource["POST"] = lambda poster: self._post(request, poster, room)
        return resource

    def _identified(self, request: Request, room: str, handler: _Handler) -> Any:
        """Call a handler with the identity of the client, at once or when the key of its token is there."""
        if self._tokens is None:
            return handler(ANYONE)

        def admitted(known: Identity) -> Any:
            _moderator(request).admit(room, _visitor(request, known.username, known))
            return handler(known)

        identity = self._tokens.identify(header(request, b"authorization"), header(request, b"cookie"))
        if isinstance(identity, Identity):
            return admitted(identity)
        reply = Reply(request)
        identity.addCallback(lambda known: reply.send_all(admitted, known)).addErrback(reply.failed)
        return NOT_DONE_YET

    def _limit(self, request: Request, *, reading: bool) -> None:
        """Count a request of the address behind the connection; raise HttpError 429 above the rate."""
        address = request.getClientAddress()
        peer = str(getattr(address, "host", address))
        wait = self._addresses.take(peer, header(request, b"x-forwarded-for"), reading=reading)
        if wait:
            status, headers = HTTPStatus.TOO_MANY_REQUESTS, {"Retry-After": str(ceil(wait))}
            raise HttpError(status, "Rate limit exceeded", Code.RATE_LIMITED, headers)
        cast(Any, request.channel).counted = True

    def _preflight(self, request: Request, methods: str) -> int:
        """Answer a preflight request (Fetch, section 3.2.3)."""
        request.setHeader("allow", methods)
        if header(request, b"origin"):
            request.setHeader("access-control-allow-methods", methods)
            allowed = "Content-Type, Idempotency-Key, Last-Event-ID"
            request.setHeader(
                "access-control-allow-headers", allowed if self._tokens is None else f"Authorization, {allowed}"
            )
            request.setHeader("access-control-max-age", str(PREFLIGHT_SECONDS))
        Reply(request).send(HTTPStatus.NO_CONTENT, b"", "")
        return NOT_DONE_YET

    # The page

    def _show(self, request: Request, path: str, room: str) -> Any:
        """Answer with the page of a room, which needs no token; it names the user of a valid one in a cookie."""

        def show(reader: Identity) -> Any:
            return self._room_page.render(request, path, room, reader.username)

        cookies = header(request, b"cookie")
        if self._tokens is None or not cookies or not self._room_page.personal:
            return show(ANYONE)
        try:
            identity = self._tokens.identify(None, cookies)
        except HttpError:
            return show(ANYONE)
        if isinstance(identity, Identity):
            return show(identity)
        reply = Reply(request)

        def refused(failure: Failure) -> Identity:
            failure.trap(HttpError)
            return ANYONE

        identity.addErrback(refused).addCallback(lambda known: reply.send_all(show, known)).addErrback(reply.failed)
        return NOT_DONE_YET

    # Reading

    def _page(self, request: Request, reader: Identity, room: str, query: str) -> int:
        """Answer with a page and links to its neighbours (RFC 8288)."""
        check_reading(reader, room)
        asked: dict[str, Any] = {
            name: values[-1] for name, values in read_query(query).items() if name in ("before", "after", "limit")
        }
        if _NUMBER.fullmatch(asked.get("limit", "")):
            asked["limit"] = int(asked["limit"])
        try:
            wanted = page_request({"type": "history", **asked})
        except FrameError as error:
            raise HttpError(HTTPStatus.BAD_REQUEST, str(error)) from None
        reply = Reply(request)

        def paged(encoded: EncodedPage) -> None:
            more = encoded.older if wanted.after is None else encoded.newer
            frame = history_frame(self._rooms.epoch, encoded.end, encoded.frames, more=more)
            links = ", ".join(self._links(encoded, wanted.limit))
            reply.send(HTTPStatus.OK, payload(frame) + b"\n", **({"link": links} if links else {}))

        self._rooms.page(room, wanted).addCallback(paged).addErrback(reply.failed)
        return NOT_DONE_YET

    def _links(self, encoded: EncodedPage, limit: int) -> list[str]:
        """Compose the links to the pages before and after this one, if the log has them."""
        epoch, links = self._rooms.epoch, []
        if encoded.older:
            first = Id(epoch, encoded.end - len(encoded.frames) + 1)
            links.append(f'<?before={first}&limit={limit}>; rel="prev"')
        if encoded.newer:
            links.append(f'<?after={Id(epoch, encoded.end)}&limit={limit}>; rel="next"')
        return links

    def _message(self, request: Request, reader: Identity, room: str, text: str) -> int:
        """Answer with one message."""
        check_reading(reader, room)
        wanted = message_id(text)
        reply = Reply(request)

        def found(encoded: EncodedPage) -> None:
            if encoded.end == wanted.number and encoded.frames:
                reply.send(HTTPStatus.OK, payload(encoded.frames[0]) + b"\n")
            else:
                raise UnknownId

        before = Id(wanted.epoch, wanted.number + 1)
        reading = self._rooms.page(room, PageRequest(before, None, 1, None))
        reading.addCallback(found).addErrback(reply.failed)
        return NOT_DONE_YET

    def _list_rooms(self, request: Request, reader: Identity, query: str) -> int:
        """Answer with the rooms that a token may read."""
        if self._tokens is None:
            detail = "without tokens the rooms are listed for operators only: GET /rooms on the admin port"
            raise HttpError(HTTPStatus.FORBIDDEN, detail, Code.FORBIDDEN)
        moderator, visitor = _moderator(request), _visitor(request, reader.username, reader)

        reply = Reply(request)

        def listed(page: RoomPage) -> None:
            reply.send(HTTPStatus.OK, page.body, **page.headers)

        def wanted(room: str) -> bool:
            return self._admission.allows(room) and reader.may_read(room)

        def shown(room: str) -> bool:
            return moderator.find_ban(room, visitor) is None

        self._listing.page(query, MAX_CLIENT_ROOMS, wanted, shown).addCallback(listed).addErrback(reply.failed)
        return NOT_DONE_YET

    def _presence(self, request: Request, reader: Identity, room: str) -> int:
        """Answer with the members of a room, as the first presence frame shows them."""
        check_reading(reader, room)
        reply = Reply(request)

        def counted(occupancy: Occupancy) -> None:
            frame = presence_frame(occupancy.members, **occupancy.shown)
            reply.send(HTTPStatus.OK, payload(frame) + b"\n")

        self._rooms.occupancy(room).addCallback(counted).addErrback(reply.failed)
        return NOT_DONE_YET

    def _export(self, request: Request, reader: Identity, room: str, query: str) -> Any:
        """Answer with all messages of a room."""
        check_reading(reader, room)
        moderator, visitor = _moderator(request), _visitor(request, reader.username, reader)
        return export(
            request,
            self._exports,
            room,
            query,
            encode=client_line,
            admit=lambda: moderator.admit(room, visitor),
            seconds_left=self._connections.seconds_left(reader),
        )

    # Posting

    def _post(self, request: Request, poster: Identity, room: str) -> int:
        """Post a message, and answer with its location."""
        if (header(request, b"content-type") or "").partition(";")[0].strip().lower() != "application/json":
            # No HTML form sends this type, so pages of other origins need a preflight request.
            raise HttpError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send application/json")
        if (header(request, b"content-encoding") or IDENTITY).lower() != IDENTITY:
            accepted = {"Accept-Encoding": IDENTITY}
            raise HttpError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send it without Content-Encoding", headers=accepted)
        try:
            post = _intake(request).vocabulary.parse_post(cast(BytesIO, request.content).read())
        except FrameError as error:
            raise HttpError(HTTPStatus.BAD_REQUEST, str(error)) from None
        label = _idempotency_key(header(request, b"idempotency-key"))
        if label is not None:
            if post.label not in (None, label):
                raise HttpError(HTTPStatus.BAD_REQUEST, 'Idempotency-Key and "label" differ')
            post = post._replace(label=label)
        return self._append(request, poster, room, post, HTTPStatus.CREATED)

    def _remove(self, request: Request, poster: Identity, room: str, text: str) -> int:
        """Remove a message, and answer with the id of the removal."""
        label = _idempotency_key(header(request, b"idempotency-key"))
        return self._append(request, poster, room, removal(message_id(text), label), HTTPStatus.OK)

    def _append(self, request: Request, poster: Identity, room: str, post: Post, status: HTTPStatus) -> int:
        """Hand a post to the log, with its author."""
        forbidden = refusal(poster, room, post.username)
        if forbidden is not None:
            raise HttpError(HTTPStatus.FORBIDDEN, forbidden, Code.FORBIDDEN)
        post = poster.sign(post, room)
        _moderator(request).admit_post(room, _visitor(request, post.username, poster))
        limits = _limits(request)
        place = limits.place(request.getClientAddress(), header(request, b"x-forwarded-for"))
        wait = 0.0 if self._rooms.holds_entries(room) else limits.room_wait(place)
        if wait:
            headers = {"Retry-After": str(ceil(wait))}
            raise HttpError(HTTPStatus.TOO_MANY_REQUESTS, NEW_ROOMS_EXCEEDED, Code.RATE_LIMITED, headers)

        def stored(number: int) -> None:
            if number == 1:
                limits.room_created(place)

        self._rooms.post(room, post, Posting(Reply(request), lambda: self._rooms.epoch, stored, status))
        return NOT_DONE_YET

    # Events

    def _events(self, request: Request, reader: Identity, path: str, query: str) -> Any:
        """Answer with a stream of events."""
        wanted = self._admission.join_request(path, read_query(query))
        if reader is not ANYONE:
            wanted = admit(wanted, reader)
        last = last_id(header(request, b"last-event-id")) or wanted.last
        if request.method == b"HEAD":
            return begin(request, EVENT_STREAM_TYPE)
        cast(Any, request.channel).begin_stream(header(request, b"x-forwarded-for"))
        stream = EventStream(request, self._rooms, self._connections, wanted)
        visitor = _visitor(request, wanted.username, wanted.identity)
        stream.member.address = visitor.address
        reply = Reply(request)

        moderator = _moderator(request)

        def join(ticket: JoinTicket) -> None:
            moderator.admit(wanted.room, visitor)
            stream.join(ticket)

        opening = self._rooms.open(wanted.room, last).addCallbacks(join, _limits(request).too_many_rooms)
        opening.addErrback(reply.failed)
        return NOT_DONE_YET

    def _shared_events(self, request: Request, reader: Identity, query: str) -> Any:
        """Answer with a stream of the events of many rooms, which are joined one after another."""
        wanted = self._admission.join_requests(read_query(query), header(request, b"last-event-id"), MAX_STREAM_ROOMS)
        if reader is not ANYONE:
            wanted = [admit(one, reader) for one in wanted]
        moderator, visitor = _moderator(request), _visitor(request, wanted[0].username, reader)
        for one in wanted:
            moderator.admit(one.room, visitor)
        if request.method == b"HEAD":
            return begin(request, EVENT_STREAM_TYPE)
        cast(Any, request.channel).begin_stream(header(request, b"x-forwarded-for"))
        stream = SharedStream(request, self._rooms, self._connections, wanted)
        stream.member.address = visitor.address
        reply, limits = Reply(request), _limits(request)
        parts = iter(zip(stream.member.parts, wanted, strict=True))

        def open_next(_: object = None) -> "Deferred[Any] | None":
            part, one = next(parts, (None, None))
            if part is None or one is None:
                return None

            def join(ticket: JoinTicket) -> None:
                moderator.admit(one.room, visitor)
                stream.join_part(part, ticket)

            return self._rooms.open(one.room, one.last).addCallbacks(join, limits.too_many_rooms).addCallback(open_next)

        def failed(failure: Failure) -> None:
            refused = _meaning(failure)
            if stream.begun:  # the client reconnects, and is answered with the status
                stream.evict()
            else:
                reply.refuse(refused)

        maybeDeferred(open_next).addErrback(failed)
        return NOT_DONE_YET


def export(
    request: Request,
    queue: ExportQueue,
    room: str,
    query: str,
    *,
    encode: Callable[[str, Entry], bytes],
    admit: Callable[[], None] = lambda: None,
    seconds_left: float | None = None,
) -> Any:
    """Begin an export of the entries after the id in the query, or of all entries; HEAD reads nothing.

    `encode`, `admit` and `seconds_left` are those of Export.
    """
    after = read_query(query).get("after", [])[-1:]
    try:
        wanted = page_request({"type": "history", **({"after": after[0]} if after else {})})
    except FrameError as error:
        raise HttpError(HTTPStatus.BAD_REQUEST, str(error)) from None
    if request.method == b"HEAD":
        return begin(request, JSON_LINES)
    cast(Any, request.channel).begin_stream(header(request, b"x-forwarded-for"))
    first, refuse = wanted.after or Id(queue.rooms.epoch, 0), Reply(request).failed
    Export(queue, request, room, first, encode=encode, admit=admit, refuse=refuse, seconds_left=seconds_left)
    return NOT_DONE_YET


def _intake(request: Request) -> Intake:
    """Return what the connections to the port of a request share."""
    return cast(Intake, cast(Any, request.channel).site.intake)


def _limits(request: Request) -> Limits:
    return _intake(request).limits


def _moderator(request: Request) -> Moderator:
    return _intake(request).moderator


def _visitor(request: Request, username: str | None = None, identity: Identity = ANYONE) -> Visitor:
    """Return what identifies the client of a request to sanctions."""
    address = _moderator(request).address(request.getClientAddress(), header(request, b"x-forwarded-for"))
    return Visitor(username, identity.subject, address)


def message_id(text: str) -> Id:
    """Parse the id in a path; raises HttpError 404."""
    try:
        return Id.parse(text)
    except ValueError as error:
        raise HttpError(HTTPStatus.NOT_FOUND, str(error), Code.UNKNOWN_ID) from None


def _methods(resource: dict[str, _Handler]) -> str:
    return ", ".join(sorted({*resource, "HEAD", "OPTIONS"}))


def _idempotency_key(value: str | None) -> str | None:
    """Read the header: a quoted string (draft-ietf-httpapi-idempotency-key-header), or the bare label."""
    if value is None:
        return None
    quoted = _QUOTED.fullmatch(value.strip())
    label = re.sub(r"\\(.)", r"\1", quoted[1]) if quoted else value.strip()
    if not is_label(label):
        raise HttpError(HTTPStatus.BAD_REQUEST, "Idempotency-Key: 1 to 64 visible ASCII characters")
    return label
