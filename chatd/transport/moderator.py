"""Sanctions in force: the one place that refuses a banned or muted client.

A ban refuses handshakes and requests with 403, and closes connections that exist when it is added.  A ban by username
also meets a client at its first post under that name.  A mute refuses posts and hides that the client types.
"""

import datetime as dt
from collections import Counter
from collections.abc import Callable, Collection
from http import HTTPStatus
from math import ceil

from chatd.messages import Code
from chatd.room.moderation import Sanction, SanctionKind, Sanctions, Visitor
from chatd.transport.admission import HttpError, client_address
from chatd.transport.connections import Connection

_WHERE = {
    SanctionKind.BAN: ("banned from this room", "banned from this server"),
    SanctionKind.MUTE: ("muted in this room", "muted on this server"),
}


def sanction_words(sanction: Sanction) -> str:
    """Return what a client learns of its sanction: until when, and why, but not what it names the client by."""
    here, everywhere = _WHERE[sanction.kind]
    until = "" if sanction.expires is None else f" until {moment(sanction.expires)}"
    reason = f": {sanction.reason}" if sanction.reason else ""
    return f"You are {here if sanction.room else everywhere}{until}{reason}"


def moment(seconds: float) -> str:
    """Format seconds since 1970 as RFC 3339 in UTC, rounded up to whole seconds."""
    return f"{dt.datetime.fromtimestamp(ceil(seconds), dt.UTC):%Y-%m-%dT%H:%M:%SZ}"


class Moderator:
    """Applies sanctions to clients.

    `clients` are those that are connected, and `now` returns the seconds since 1970.  `hops` is as in client_address().
    """

    def __init__(
        self, sanctions: Sanctions, clients: Collection[Connection], now: Callable[[], float], hops: int = 0
    ) -> None:
        self._sanctions = sanctions
        self._clients = clients
        self._now = now
        self._hops = hops
        self.refusals: Counter[str] = Counter(dict.fromkeys(SanctionKind, 0))
        """The number of refused handshakes, requests and posts, by the kind of the sanction."""
        sanctions.follow(self._enforce)

    @property
    def active(self) -> bool:
        """True if there are sanctions."""
        return len(self._sanctions) > 0

    def address(self, peer: object, forwarded: str | None) -> str | None:
        """Return the IP address of a client, from that of its connection and the header X-Forwarded-For."""
        return client_address(peer, forwarded, self._hops)

    def admit(self, room: str, visitor: Visitor) -> None:
        """Raise HttpError 403 for a client that is banned from a room."""
        sanction = self.find_ban(room, visitor)
        if sanction is not None:
            raise self._error(sanction)

    def find_ban(self, room: str, visitor: Visitor) -> Sanction | None:
        """Return the ban that keeps a client out of a room."""
        return self._sanctions.find(SanctionKind.BAN, room, visitor, self._now())

    def admit_post(self, room: str, visitor: Visitor) -> None:
        """Raise HttpError 403 for a client that may not post to a room."""
        sanction = self.find(room, visitor)
        if sanction is not None:
            raise self._error(sanction)

    def find(self, room: str, visitor: Visitor) -> Sanction | None:
        """Return the sanction that forbids a client to post to a room."""
        kinds, now = (SanctionKind.BAN, SanctionKind.MUTE), self._now()
        return next(filter(None, (self._sanctions.find(kind, room, visitor, now) for kind in kinds)), None)

    def retry_after(self, sanction: Sanction) -> int | None:
        """Return the seconds until a sanction expires; None if it does not."""
        return None if sanction.expires is None else max(ceil(sanction.expires - self._now()), 1)

    def _error(self, sanction: Sanction) -> HttpError:
        self.refusals[sanction.kind] += 1
        wait = self.retry_after(sanction)
        headers = {} if wait is None else {"Retry-After": str(wait)}
        return HttpError(HTTPStatus.FORBIDDEN, sanction_words(sanction), Code.FORBIDDEN, headers)

    def _enforce(self, sanction: Sanction) -> None:
        """Remove the clients that a new ban meets."""
        if sanction.kind is not SanctionKind.BAN:
            return
        alone = Sanctions()
        alone.add(sanction)
        for client in [*self._clients]:
            for member in client.member.memberships():
                if alone.find(sanction.kind, member.room_name, member.visitor, self._now()):
                    member.ban(sanction, sanction_words(sanction))
