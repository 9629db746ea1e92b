"""The identity of a client: who it is, and in which rooms it may read, post and moderate.

Without tokens every client is ANYONE.  With tokens, `chatd.transport.tokens` makes the identity of each client from
the claims of its token.

This module is pure.
"""

import re
from typing import Final, NamedTuple

from chatd.messages import Post

LEEWAY_SECONDS: Final = 60
"""The difference between the clocks of the issuer and of this server that is tolerated.

Machines that follow NTP differ by less than a second.  A minute also covers one that has just started.
"""


class AllowedRooms(NamedTuple):
    """The rooms with these names, and those whose names match one of the patterns."""

    names: frozenset[str] = frozenset()
    patterns: tuple[re.Pattern[str], ...] = ()

    def include(self, name: str) -> bool:
        """Return whether a room is among them."""
        return name in self.names or any(pattern.match(name) for pattern in self.patterns)


NO_ROOMS: Final = AllowedRooms()


class Permissions(NamedTuple):
    """The rooms in which a client may read, post and moderate; None: every room."""

    read: AllowedRooms | None = None
    post: AllowedRooms | None = None
    moderate: AllowedRooms | None = NO_ROOMS


class Identity(NamedTuple):
    """A client, as the server knows it."""

    subject: str | None = None
    """The claim `sub` of the token, the stable name of an account; None without tokens."""
    username: str | None = None
    """The only username of the client; None without tokens: any name."""
    expires: float | None = None
    """The time at which the token expires, in seconds since 1970; None without tokens: never."""
    permissions: Permissions = Permissions()

    def may_read(self, room: str) -> bool:
        """Return whether the client may read a room."""
        return _includes(self.permissions.read, room)

    def may_post(self, room: str) -> bool:
        """Return whether the client may post to a room."""
        return _includes(self.permissions.post, room)

    def sign(self, post: Post, room: str) -> Post:
        """Return a post with its author, and with whether that one may replace the messages of others in the room."""
        if self is ANYONE:
            return post
        username = post.username or self.username or ""  # a removal names nobody
        return post._replace(username=username, author=self.subject, moderated=self.may_moderate(room))

    def may_moderate(self, room: str) -> bool:
        """Return whether the client may replace and remove the messages of others in a room."""
        return _includes(self.permissions.moderate, room)


def refusal(identity: Identity, room: str, username: str) -> str | None:
    """Return why a client may not post in a room under a name; None if it may.  A removal has no name."""
    if not identity.may_post(room):
        return "The token does not permit posting in this room."
    if username and identity.username not in (None, username):
        return "The username is not that of the token."
    return None


def _includes(rooms: AllowedRooms | None, name: str) -> bool:
    return rooms is None or rooms.include(name)


ANYONE: Final = Identity()
"""The identity of every client of a server without tokens: it reads and posts everywhere, and moderates nothing."""
