"""The state of a connection, the people in a room and the refusals of a server, in words."""

from collections.abc import Iterable, Sequence
from typing import Final

from chatd.client.protocol import Rejected
from chatd.client.storage import PendingPost
from chatd.client.terminal.display import cells, safe, shorten
from chatd.client.view import REJECTED, WAITING, RoomPresence, Snapshot
from chatd.messages import Code

SEPARATOR: Final = " · "
TYPISTS: Final = 2
"""The most names of people that type; more are counted."""


def connection_words(snapshot: Snapshot, now: float) -> str:
    """Return the state of the connection; `now` is in seconds since 1970."""
    if snapshot.state != WAITING:
        return "refused by the server" if snapshot.state == REJECTED else snapshot.state
    left = max(0, round((snapshot.retry_at or now) - now))
    return f"offline ({reason_words(snapshot.reason)}), reconnecting in {left} s"


def reason_words(reason: str | None) -> str:
    """Return why a connection ended, with the remedy if this side has one."""
    text = safe(reason or "the connection was lost")
    remedies = {
        "certificate": "SSL_CERT_FILE names the authorities to trust",
        "there is no token": "check the file of --token-file",
        "ame or service not known": "check the host in the URL",
    }
    return next((f"{text}: {remedy}" for part, remedy in remedies.items() if part in text), text)


def people_words(presence: RoomPresence | None, width: int) -> str:
    """Return the people in the room, with as many names as fit."""
    if presence is None:
        return ""
    text = f"{presence.count:,} here"
    names = [safe(name) for name in presence.users or ()]
    for count in range(len(names), 0, -1):
        rest = f" and {len(names) - count} more" if count < len(names) else ""
        words = f"{text}: {', '.join(names[:count])}{rest}"
        if cells(words) <= width:
            return words
    return text


def typing_words(names: Iterable[str], username: str) -> str:
    """Return who types, except the user."""
    others = [safe(name) for name in names if name != username]
    if len(others) > TYPISTS:
        return f"{len(others)} people are typing"
    return f"{' and '.join(others)} {'are' if len(others) > 1 else 'is'} typing" if others else ""


def toolbar(snapshot: Snapshot, username: str, width: int, now: float) -> str:
    """Return the line below the prompt."""
    parts = [connection_words(snapshot, now), typing_words(snapshot.typing, username)]
    parts = [part for part in parts if part]
    left = width - cells(SEPARATOR.join([*parts, ""]))
    parts.insert(1, people_words(snapshot.presence, left))
    return shorten(SEPARATOR.join(part for part in parts if part), width)


def refusal_words(error: Exception | None, room: str) -> str:
    """Return why a server refuses the client for good, with the remedy, in one line."""
    code, text = error.code if isinstance(error, Rejected) else None, safe(str(error))
    match code:
        case 401 | Code.TOKEN_REFUSED:
            return f"the server needs a valid token ({text}): use --token-file FILE, or CHATD_TOKEN"
        case 403 | Code.FORBIDDEN:
            return f"the server refuses this client ({text}): check --name and the token, or ask the operator"
        case 404:
            return f"the server has no room {room!r} ({text}): check the URL"
        case 400:
            return f"the server does not accept the request ({text}): check the URL and --name"
    return f"the server refuses this client ({text})"


def unsent(outbox: Iterable[PendingPost]) -> int:
    """Return the number of posts that wait for an answer."""
    return sum(post.error is None for post in outbox)


def stays_words(outbox: Sequence[PendingPost], *, kept: bool) -> str:
    """Return the fate of the posts that were not sent before the end; empty without any."""
    count = unsent(outbox)
    if not count:
        return ""
    what = "1 message is" if count == 1 else f"{count} messages are"
    if kept:
        return f"{what} in the outbox, and will be sent when you start again with the same URL and name"
    return f"{what} lost, because the outbox could not be kept"
