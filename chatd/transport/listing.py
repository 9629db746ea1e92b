"""The list of rooms, for operators and for clients with a token."""

import re
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Final, NamedTuple, cast

import orjson
from twisted.internet.defer import Deferred, DeferredLock, FirstError, gatherResults
from twisted.python.failure import Failure

from chatd.messages import Id
from chatd.room.moderation import ModerationStore, RoomSummary, every_room
from chatd.room.presence import Occupancy
from chatd.room.registry import Registry
from chatd.transport.admission import HttpError, read_query

PAGE_ROOMS: Final = 100
"""The number of rooms in an answer, unless the request names another."""

_LIMIT = re.compile(r"[1-9][0-9]{0,3}")


class RoomPage(NamedTuple):
    """A page of rooms, encoded."""

    body: bytes
    headers: dict[str, str]
    """The link to the next page, if there is one (RFC 8288)."""


class RoomList:
    """The rooms that hold messages, with their members on all nodes.

    One page is read at a time, because a store may look at every room for it.
    """

    def __init__(self, store: ModerationStore, rooms: Registry) -> None:
        self._store = store
        self._rooms = rooms
        self._turn = DeferredLock()

    def page(
        self,
        query: str,
        most: int,
        wanted: Callable[[str], bool] = every_room,
        shown: Callable[[str], bool] = every_room,
    ) -> "Deferred[RoomPage]":
        """Return the page of rooms that a query names, at most `most` of them.

        The store finds rooms with `wanted` names and may ask in another thread.  A room that is not `shown` is left out
        of its page.  Raises HttpError for an invalid query, and fails with LogUnavailable.
        """
        asked = {name: values[-1] for name, values in read_query(query).items()}
        text = asked.get("limit", str(PAGE_ROOMS))
        limit = int(text) if _LIMIT.fullmatch(text) else 0
        if not 1 <= limit <= most:
            raise HttpError(HTTPStatus.BAD_REQUEST, f"limit: a whole number from 1 to {most}")

        def listed(found: Sequence[RoomSummary]) -> "Deferred[RoomPage]":
            rooms = [room for room in found[:limit] if shown(room.name)]
            last = found[limit - 1].name if len(found) > limit else None
            counted = gatherResults([self._rooms.occupancy(room.name) for room in rooms], consumeErrors=True)
            return counted.addCallbacks(self._encode, _cause, callbackArgs=(rooms, last, limit))

        after = asked.get("after", "")
        found: Deferred[Sequence[RoomSummary]] = self._turn.run(self._store.list_rooms, after, limit + 1, wanted)
        return found.addCallback(listed)

    def _encode(
        self, counts: Sequence[Occupancy], rooms: Sequence[RoomSummary], last: str | None, limit: int
    ) -> RoomPage:
        found = [
            {
                "name": room.name,
                "messages": room.head - room.first + 1,
                "bytes": room.bytes,
                "members": occupancy.members,
                "first": room.first,
                "head": room.head,
                "id": str(Id(self._rooms.epoch, room.head)),
                "timestamp": room.timestamp,
            }
            for room, occupancy in zip(rooms, counts, strict=True)
        ]
        if last is None:
            return RoomPage(orjson.dumps({"rooms": found}) + b"\n", {})
        link = f'<?after={last}&limit={limit}>; rel="next"'
        return RoomPage(orjson.dumps({"rooms": found, "next": last}) + b"\n", {"link": link})


def _cause(failure: Failure) -> Failure:
    """Return the failure of the first room that could not be counted."""
    failure.trap(FirstError)
    cause: Failure = cast(FirstError, failure.value).subFailure
    return cause
