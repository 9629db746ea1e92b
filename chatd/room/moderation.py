"""Sanctions: which clients may not connect, and which may only read.

A *ban* keeps a client out, and a *mute* lets it read and not post.  Each sanction names its clients in one of three
ways: by the username of their posts, by the subject of their token, or by their network.  It holds in one room or in
all of them, until it expires or an operator lifts it.

This module keeps the set in memory, where each handshake, request and post looks.  A store keeps it durable and shares
it between the nodes.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any, Final, NamedTuple, Protocol

from twisted.internet.defer import Deferred

MAX_SANCTIONS: Final = 10_000
"""The most sanctions; one network may stand for many clients."""
MAX_SECONDS: Final = 100 * 365 * 86_400
"""The longest time, in seconds, after which a sanction may expire."""
MAX_NAME: Final = 255
"""The most characters of a username or a subject; OpenID Connect has this limit for `sub`."""
MAX_REASON: Final = 200
"""The most characters of a reason."""
HOST_BITS: Final = {4: 32, 6: 64}
"""The bits of an address that name a host or its network, by version (RFC 4291, section 2.5.4)."""

IPV4_BITS: Final = 96
"""The bits of an IPv6 address before the IPv4 address that is mapped into it (RFC 4291, section 2.5.5.2)."""

_ROOM = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2065\u2800\u3164\ufe00-\ufe0f\uffa0\ufff0-\ufff8\U000e0000-\U000e0fff]"
)
"""The ignorable characters that are no controls (Unicode's Default_Ignorable_Code_Point), and the blank of braille."""

IPAddress = IPv4Address | IPv6Address


class SanctionKind(StrEnum):
    """A kind of sanction, by what it forbids."""

    BAN = "ban"
    """Connecting, reading and posting."""
    MUTE = "mute"
    """Posting."""


class Target(StrEnum):
    """A way to name the clients of a sanction."""

    USERNAME = "username"
    """The username of a post, or the one that a client connects with."""
    SUBJECT = "subject"
    """The subject of a token."""
    ADDRESS = "address"
    """An IP address or a network in CIDR notation."""


def is_room(name: str) -> bool:
    """Return whether a text can be the name of a room."""
    return _ROOM.fullmatch(name) is not None


def fold(username: str) -> str:
    """Return the form in which usernames are compared, so that `Ann`, `ANN` and full-width letters are one name.

    This is Unicode's caseless matching (NFKC, case folding, NFKC), without invisible characters and outer spaces.
    """
    if username.isascii() and username.isprintable():
        return username.strip().lower()
    folded = unicodedata.normalize("NFKC", _visible(username)).casefold()
    return _visible(unicodedata.normalize("NFKC", folded)).strip()


def _visible(text: str) -> str:
    """Return a text without the characters that are shown as nothing."""
    return "".join(
        letter for letter in text if unicodedata.category(letter) not in ("Cc", "Cf") and not _INVISIBLE.match(letter)
    )


def parse_address(text: str) -> IPAddress | None:
    """Read an IP address; one that is mapped into IPv6 is the IPv4 address itself.  None for any other text."""
    try:
        address = ip_address(text)
    except ValueError:
        return None
    return (isinstance(address, IPv6Address) and address.ipv4_mapped) or address


def parse_network(text: str) -> IPv4Network | IPv6Network:
    """Read a network in CIDR notation, or an address; an IPv6 address stands for the network of its first 64 bits.

    Raises ValueError with one line.
    """
    address = parse_address(text)
    try:
        if address is None:
            network = ip_network(text)
            mapped = isinstance(network, IPv6Network) and network.network_address.ipv4_mapped
            if mapped and network.prefixlen >= IPV4_BITS:
                network = ip_network(f"{mapped}/{network.prefixlen - IPV4_BITS}")
        else:
            network = ip_network(f"{address}/{HOST_BITS[address.version]}", strict=False)
    except ValueError as error:
        raise ValueError(f"address: {error}; write 203.0.113.7, 203.0.113.0/24 or 2001:db8::/64") from None
    if not network.prefixlen:
        raise ValueError(f"address: {text} stands for everyone; name a smaller network")
    return network


class Visitor(NamedTuple):
    """A client as sanctions see it: everything that may identify it, where the server knows it."""

    username: str | None
    subject: str | None
    """The subject of its token; None without tokens."""
    address: str | None
    """Its IP address; None over a Unix socket."""


class Sanction(NamedTuple):
    """One ban or mute."""

    id: str
    kind: SanctionKind
    target: Target
    whom: str
    """The username, the subject or the network that names the clients."""
    room: str | None
    """The room in which it holds; None: in all rooms."""
    expires: float | None
    """Seconds since 1970; None: it holds until it is lifted."""
    reason: str

    @classmethod
    def parse(cls, document: Mapping[str, object], word: str, now: float) -> "Sanction":
        """Read the request of an operator, which gets the id `word`; raise ValueError with one line.

        The keys are `kind`, one of `username`, `subject` and `address`, and perhaps `room`, `seconds` and `reason`.
        """
        unknown = document.keys() - {"kind", *Target, "room", "seconds", "reason"}
        if unknown:
            raise ValueError(
                f"there is no field {min(unknown)!r}: choose kind, {', '.join(Target)}, room, seconds, reason"
            )
        kind = _text(document, "kind", MAX_NAME)
        if kind not in [*SanctionKind]:
            raise ValueError("kind: choose ban or mute")
        targets = [target for target in Target if document.get(target) is not None]
        if len(targets) != 1:
            raise ValueError(f"name the client by one of {', '.join(Target)}")
        target = targets[0]
        whom = _text(document, target, MAX_NAME)
        if target is Target.ADDRESS:
            whom = str(parse_network(whom))
        elif not (fold(whom) if target is Target.USERNAME else whom):
            raise ValueError(f"{target}: 1 to {MAX_NAME} visible characters")
        room, seconds = document.get("room"), document.get("seconds")
        if room is not None and not (isinstance(room, str) and is_room(room)):
            raise ValueError("room: a name such as team-a, or none for all rooms")
        if seconds is not None and not (type(seconds) in (int, float) and 0 < seconds <= MAX_SECONDS):  # type: ignore[operator]
            raise ValueError(f"seconds: a number above 0 and up to {MAX_SECONDS}, or none for no end")
        expires = None if seconds is None else now + seconds  # type: ignore[operator]
        return cls(word, SanctionKind(kind), target, whom, room, expires, _text(document, "reason", MAX_REASON))

    @classmethod
    def load(cls, fields: Mapping[str, Any]) -> "Sanction":
        """Restore a sanction from its fields, without those that a later version adds."""
        known = {name: fields[name] for name in cls._fields}
        return cls(**known | {"kind": SanctionKind(known["kind"]), "target": Target(known["target"])})

    def holds(self, now: float) -> bool:
        """Return whether it has not expired."""
        return self.expires is None or self.expires > now


def _text(document: Mapping[str, object], name: str, most: int) -> str:
    """Return a text of a request, "" without one; raise ValueError with one line."""
    text = document.get(name)
    if text is None:
        return ""
    if not isinstance(text, str) or len(text) > most or not text.isprintable():
        raise ValueError(f"{name}: a text of {most} characters at most, in one line")
    return text


_Key = tuple[object, ...]


def _network_key(address: IPAddress, bits: int) -> _Key:
    """Return the key of the network that the first bits of an address name."""
    return address.version, bits, int(address) >> (address.max_prefixlen - bits)


class Sanctions:
    """The sanctions that this node knows.

    A lookup costs a few dictionary accesses, however many sanctions there are, and nothing to speak of without any.
    Expired ones count as missing, and stay until the store removes them.
    """

    def __init__(self) -> None:
        self._by_id: dict[str, Sanction] = {}
        self._index: dict[tuple[SanctionKind, str | None, _Key], dict[str, Sanction]] = {}
        """The sanctions by kind, room and key."""
        self._breadths: Counter[tuple[int, int]] = Counter()
        """The number of sanctions by address, by the version and the bits of their networks."""
        self._listeners: list[Callable[[Sanction], object]] = []

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Sanction]:
        """Iterate over the sanctions, oldest first, including expired ones."""
        return iter(self._by_id.values())

    def follow(self, listener: Callable[[Sanction], object]) -> None:
        """Call a function with each sanction that is added from now on."""
        self._listeners.append(listener)

    def get(self, word: str) -> Sanction | None:
        """Return the sanction of an id."""
        return self._by_id.get(word)

    def add(self, sanction: Sanction) -> None:
        """Add a sanction, and call the listeners, unless it is known."""
        if sanction.id in self._by_id:
            return
        self._by_id[sanction.id] = sanction
        key, breadth = _key_of(sanction)
        self._index.setdefault((sanction.kind, sanction.room, key), {})[sanction.id] = sanction
        if breadth is not None:
            self._breadths[breadth] += 1
        for listener in self._listeners:
            listener(sanction)

    def remove(self, word: str) -> None:
        """Remove the sanction of an id, if there is one."""
        sanction = self._by_id.pop(word, None)
        if sanction is None:
            return
        key, breadth = _key_of(sanction)
        place = sanction.kind, sanction.room, key
        del self._index[place][word]
        if not self._index[place]:
            del self._index[place]
        if breadth is not None:
            self._breadths[breadth] -= 1
            self._breadths += Counter()  # drops what is 0

    def replace(self, sanctions: Sequence[Sanction]) -> None:
        """Replace the whole set, and call the listeners for those that are new."""
        for word in self._by_id.keys() - {sanction.id for sanction in sanctions}:
            self.remove(word)
        for sanction in sanctions:
            self.add(sanction)

    def find(self, kind: SanctionKind, room: str, visitor: Visitor, now: float) -> Sanction | None:
        """Return the sanction of this kind that keeps this client out of a room for the longest; None without one."""
        if not self._index:
            return None
        found = [
            sanction
            for key in self._keys(visitor)
            for where in (room, None)
            for sanction in self._index.get((kind, where, key), {}).values()
            if sanction.holds(now)
        ]
        return max(found, key=lambda one: float("inf") if one.expires is None else one.expires, default=None)

    def _keys(self, visitor: Visitor) -> Iterator[_Key]:
        """Return the keys under which sanctions of this client are."""
        if visitor.username is not None:
            yield Target.USERNAME, fold(visitor.username)
        if visitor.subject is not None:
            yield Target.SUBJECT, visitor.subject
        if visitor.address is not None and self._breadths:
            address = parse_address(visitor.address)
            if address is not None:
                yield from (
                    _network_key(address, bits) for version, bits in self._breadths if version == address.version
                )

    def count(self, now: float) -> Counter[SanctionKind]:
        """Return the number of sanctions in force, by kind."""
        return Counter(sanction.kind for sanction in self if sanction.holds(now))

    def expired(self, now: float) -> list[str]:
        """Return the ids of the sanctions that have expired."""
        return [sanction.id for sanction in self if not sanction.holds(now)]


def _key_of(sanction: Sanction) -> tuple[_Key, tuple[int, int] | None]:
    """Return the key of a sanction and, if it is about a network, its version and bits."""
    if sanction.target is Target.ADDRESS:
        network = ip_network(sanction.whom)
        return _network_key(network.network_address, network.prefixlen), (network.version, network.prefixlen)
    return (sanction.target, fold(sanction.whom) if sanction.target is Target.USERNAME else sanction.whom), None


class RoomSummary(NamedTuple):
    """A room that holds messages, for operators."""

    name: str
    first: int
    """The number of the oldest message stored."""
    head: int
    """The number of the newest message."""
    bytes: int | None
    """The approximate size of its messages; None if the store does not know it."""
    timestamp: str
    """The timestamp of the newest message."""


def every_room(_: str) -> bool:
    """Return True, for a list of all rooms."""
    return True


class ModerationStore(Protocol):
    """The store that moderation needs."""

    sanctions: Sanctions
    """The sanctions in the store, as this node knows them."""

    def sanction(self, sanction: Sanction) -> "Deferred[None]":
        """Store a sanction, on which every node acts within a second; fails with LogUnavailable."""

    def lift(self, words: Sequence[str]) -> "Deferred[None]":
        """Remove the sanctions of these ids; fails with LogUnavailable."""

    def list_rooms(
        self, after: str, limit: int, wanted: Callable[[str], bool] = every_room
    ) -> "Deferred[Sequence[RoomSummary]]":
        """Return at most `limit` rooms that hold messages and whose names follow `after`, in the order of names.

        `wanted` returns whether a room of this name may be among them.  A store may call it in another thread.
        Fails with LogUnavailable.
        """

    def clear_room(self, room: str) -> "Deferred[int]":
        """Remove all messages of a room, whose numbers go on; return how many; fails with LogUnavailable."""
