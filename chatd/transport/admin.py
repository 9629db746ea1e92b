"""Moderation on the admin port: JSON for scripts/moderate and other tools of operators.

GET    /sanctions          the sanctions in force
POST   /sanctions          add one: kind, and username, subject or address; perhaps room, seconds and reason
GET    /sanctions/ID       one sanction
DELETE /sanctions/ID       lift it
GET    /rooms              the rooms that hold messages: ?after=NAME, ?limit=N
GET    /rooms/NAME/export  all messages as JSON Lines, each with its author's subject: ?after=ID
POST   /rooms/NAME/clear   remove the messages of a room; its numbers go on, and clients stay
DELETE /rooms/NAME         also lift the sanctions in it
DELETE /rooms/NAME/messages/ID  remove one message, as a moderator would

Each change is one line of the log with the namespace AUDIT.
"""

import re
from collections.abc import Callable
from hmac import compare_digest
from http import HTTPStatus
from io import BytesIO
from typing import Any, Final, cast

import orjson
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.http import Request
from twisted.web.server import NOT_DONE_YET
from typing_extensions import override

from chatd.messages import Code, Id
from chatd.room.log import LogUnavailable
from chatd.room.moderation import MAX_SANCTIONS, ModerationStore, Sanction, is_room
from chatd.room.registry import Registry
from chatd.transport.admission import HttpError
from chatd.transport.api import Posting, Reply, export, message_id
from chatd.transport.export import ExportQueue, operator_line
from chatd.transport.frames import removal
from chatd.transport.heads import Head
from chatd.transport.http import ChatResource, answer, problem_answer
from chatd.transport.listing import RoomList, RoomPage
from chatd.transport.moderator import moment

AUDIT: Final = "chatd.audit"
"""The namespace of the lines about what operators have changed."""
MAX_PAGE_ROOMS: Final = 1000
"""The most rooms in an answer."""
OPEN_PATHS: Final = frozenset({"/healthz", "/readyz"})
"""The paths that need no token, because load balancers have none."""

OPERATOR: Final = "operator"
"""The username of a removal by an operator."""

_ROUTE = re.compile(
    r"/(?P<kind>sanctions|rooms)(?:/(?P<name>[^/]+)(?P<rest>/clear|/export|/messages/(?P<message>[^/]+))?)?"
)
_CHALLENGE = {"WWW-Authenticate": 'Bearer realm="chatd admin"'}
_audit = Logger(namespace=AUDIT)
_logger = Logger()


def check_token(head: Head, token: bytes | None) -> None:
    """Raise HttpError 401 for a request without the token of the admin port, if it has one (RFC 6750, section 2.1)."""
    if token is None or head.target.partition("?")[0] in OPEN_PATHS:
        return
    scheme, _, given = head.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not compare_digest(given.strip().encode("latin-1"), token):
        detail = "the admin port needs its token: send Authorization: Bearer TOKEN"
        raise HttpError(HTTPStatus.UNAUTHORIZED, detail, headers=_CHALLENGE)


class ModerationApi(ChatResource):
    """The resources below /sanctions and /rooms; `now` returns the seconds since 1970, and `word` a new id."""

    isLeaf = True

    def __init__(
        self,
        store: ModerationStore,
        rooms: Registry,
        now: Callable[[], float],
        word: Callable[[], str],
        *,
        listing: RoomList,
        exports: ExportQueue,
    ) -> None:
        super().__init__()
        self._listing = listing
        self._exports = exports
        self._store = store
        self._rooms = rooms
        self._now = now
        self._word = word

    @override
    def render(self, request: Request) -> Any:
        """Route a request, and answer an HttpError with a problem."""
        try:
            return self._route(request)
        except HttpError as refused:
            return problem_answer(request, refused)

    def _route(self, request: Request) -> Any:
        path, _, query = request.uri.decode("latin-1").partition("?")
        match = _ROUTE.fullmatch(path)
        handlers = {} if match is None else self._handlers(request, query, **match.groupdict())
        if not handlers:
            raise HttpError(HTTPStatus.NOT_FOUND, "there is nothing here")
        method = request.method.decode("latin-1")
        handler = handlers.get("GET" if method == "HEAD" else method)
        if handler is None:
            request.setHeader("allow", ", ".join(sorted({*handlers} | ({"HEAD"} if "GET" in handlers else set()))))
            raise HttpError(HTTPStatus.METHOD_NOT_ALLOWED, f"{method} is not for this")
        return handler()

    def _handlers(
        self, request: Request, query: str, *, kind: str, name: str | None, rest: str | None, message: str | None
    ) -> dict[str, Callable[[], Any]]:
        """Return the functions for a path, by method."""
        if name is None and kind == "rooms":
            return {"GET": lambda: self._list_rooms(request, query)}
        if name is None:
            return {"GET": lambda: self._list_sanctions(request), "POST": lambda: self._sanction(request)}
        if kind == "rooms":
            return self._room_handlers(request, query, name, rest, message) if is_room(name) else {}
        sanction = None if rest else self._store.sanctions.get(name)
        if sanction is None:
            return {}
        body = _encode(_shown(sanction))
        return {
            "GET": lambda: answer(request, HTTPStatus.OK, body),
            "DELETE": lambda: self._lift(request, sanction),
        }

    def _room_handlers(
        self, request: Request, query: str, room: str, rest: str | None, message: str | None
    ) -> dict[str, Callable[[], Any]]:
        """Return the functions for a room and for what is below it, by method."""
        if message is not None:
            return {"DELETE": lambda: self._remove(request, room, message)}
        if rest == "/export":
            return {"GET": lambda: export(request, self._exports, room, query, encode=operator_line)}
        change = self._clear if rest else self._delete
        return {"POST" if rest else "DELETE": lambda: change(request, room)}

    # Sanctions

    def _list_sanctions(self, request: Request) -> bytes:
        now = self._now()
        found = [_shown(sanction) for sanction in self._store.sanctions if sanction.holds(now)]
        return answer(request, HTTPStatus.OK, _encode({"sanctions": found}))

    def _sanction(self, request: Request) -> int:
        try:
            document = orjson.loads(cast(BytesIO, request.content).read())
        except orjson.JSONDecodeError:
            document = None
        if not isinstance(document, dict):
            raise HttpError(HTTPStatus.BAD_REQUEST, 'send a JSON object such as {"kind":"ban","username":"ann"}')
        try:
            sanction = Sanction.parse(document, self._word(), self._now())
        except ValueError as error:
            raise HttpError(HTTPStatus.BAD_REQUEST, str(error)) from None
        if len(self._store.sanctions) >= MAX_SANCTIONS:
            detail = f"there are {MAX_SANCTIONS} sanctions, and no more fit: lift some, or ban a network"
            raise HttpError(HTTPStatus.CONFLICT, detail)
        reply, operator = Reply(request), _operator(request)

        def stored(_: object) -> None:
            _log(sanction.kind, operator, sanction)
            body = _encode(_shown(sanction))
            reply.send(HTTPStatus.CREATED, body, location=f"/sanctions/{sanction.id}")

        self._store.sanction(sanction).addCallback(stored).addErrback(_failed, reply)
        return NOT_DONE_YET

    def _lift(self, request: Request, sanction: Sanction) -> int:
        reply, operator = Reply(request), _operator(request)

        def lifted(_: object) -> None:
            _log("lift", operator, sanction)
            reply.send(HTTPStatus.NO_CONTENT, b"", "")

        self._store.lift([sanction.id]).addCallback(lifted).addErrback(_failed, reply)
        return NOT_DONE_YET

    # Rooms

    def _list_rooms(self, request: Request, query: str) -> int:
        reply = Reply(request)

        def listed(page: RoomPage) -> None:
            reply.send(HTTPStatus.OK, page.body, **page.headers)

        self._listing.page(query, MAX_PAGE_ROOMS).addCallback(listed).addErrback(reply.failed)
        return NOT_DONE_YET

    def _clear(self, request: Request, room: str) -> int:
        reply, operator = Reply(request), _operator(request)

        def cleared(removed: int) -> None:
            _log_room("clear", operator, room, removed)
            reply.send(HTTPStatus.OK, _encode({"room": room, "removed": removed}))

        self._store.clear_room(room).addCallback(cleared).addErrback(_failed, reply)
        return NOT_DONE_YET

    def _delete(self, request: Request, room: str) -> int:
        reply, operator = Reply(request), _operator(request)
        sanctions = [sanction for sanction in self._store.sanctions if sanction.room == room]

        def deleted(_: object, removed: int) -> None:
            _log_room("delete", operator, room, removed)
            for sanction in sanctions:
                _log("lift", operator, sanction)
            reply.send(HTTPStatus.OK, _encode({"room": room, "removed": removed, "lifted": len(sanctions)}))

        def cleared(removed: int) -> Any:
            return self._store.lift([sanction.id for sanction in sanctions]).addCallback(deleted, removed)

        self._store.clear_room(room).addCallback(cleared).addErrback(_failed, reply)
        return NOT_DONE_YET

    def _remove(self, request: Request, room: str, text: str) -> int:
        """Remove a message, and answer with the id of the removal."""
        message, operator = message_id(text), _operator(request)

        def stored(_: int) -> None:
            _log_removal(operator, room, message)

        post = removal(message, None)._replace(username=OPERATOR, moderated=True)
        self._rooms.post(room, post, Posting(Reply(request), lambda: self._rooms.epoch, stored, HTTPStatus.OK))
        return NOT_DONE_YET


def _shown(sanction: Sanction) -> dict[str, object]:
    """Return a sanction as operators see it."""
    expires = None if sanction.expires is None else moment(sanction.expires)
    return {
        "id": sanction.id,
        "kind": sanction.kind,
        sanction.target.value: sanction.whom,
        "room": sanction.room,
        "expires": expires,
        "reason": sanction.reason,
    }


def _encode(document: object) -> bytes:
    return orjson.dumps(document) + b"\n"


def _failed(failure: Failure, reply: Reply) -> None:
    """Answer that a change has failed."""
    failure.trap(LogUnavailable)
    _logger.error("an operator's change failed: {error}", error=failure.value)
    detail = "the log cannot be written now; look whether the change is there, and try again"
    reply.refuse(HttpError(HTTPStatus.SERVICE_UNAVAILABLE, detail, Code.UNAVAILABLE))


# The audit log


def _operator(request: Request) -> str:
    """Return the address of the connection of an operator."""
    address = request.getClientAddress()
    return f"{address.host}:{address.port}" if hasattr(address, "port") else str(address)


def _log(action: str, operator: str, sanction: Sanction) -> None:
    """Write one line about a sanction that was added or lifted."""
    _audit.info(
        "{operator}: {action} {id} of {target} {whom!r} in {room} until {expires}: {reason!r}",
        operator=operator,
        action=str(action),
        id=sanction.id,
        kind=str(sanction.kind),
        target=str(sanction.target),
        whom=sanction.whom,
        room=sanction.room or "all rooms",
        expires="it is lifted" if sanction.expires is None else moment(sanction.expires),
        reason=sanction.reason,
    )


def _log_room(action: str, operator: str, room: str, removed: int) -> None:
    """Write one line about a room that was cleared or deleted."""
    _audit.info(
        "{operator}: {action} the room {room}, which held {removed} messages",
        operator=operator,
        action=action,
        room=room,
        removed=removed,
    )


def _log_removal(operator: str, room: str, message: Id) -> None:
    """Write one line about a message that was removed."""
    _audit.info(
        "{operator}: remove the message {id} of {room}", operator=operator, action="remove", id=str(message), room=room
    )
