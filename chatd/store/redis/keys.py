"""The keys of the log in Redis, and what their entries look like.

`lua/prelude.lua` describes each key.  All of them share the hash tag `{chatd}`, so that a cluster
keeps them in one slot and scripts may use them together.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Final

from chatd.messages import Entry
from chatd.store.base import load_extra, timestamp

_MARKS: Final = {b"a", b"p", b"x", b"d", b"j"}
"""The fields of an entry that has an author or fields of the operator's own, or was edited."""
LOG, HEADS, FEED = KEYS = [f"{{chatd}}:{name}" for name in ("log", "heads", "feed")]
"""The keys that every script of the log takes first."""
ERASURES: Final = "{chatd}:erase"
"""The key of the rooms from which a removed text is still to be erased."""
NO_ENTRY: Final = b"0-0"
"""The id that stands for the newest entry of an empty stream."""
MICROSECONDS: Final = 1_000_000
"""Microseconds in a second; the second part of an entry's id is its time in microseconds."""


def room_key(room: str) -> str:
    """Return the key of a room's stream."""
    return f"{{chatd}}:room:{room}"


def copy_key(epoch: str, room: str) -> str:
    """Return the key of the stream that is to replace a room's."""
    return f"{{chatd}}:copy:{epoch}:{room}"


def lease_key(reader: str) -> str:
    """Return the key that names the claim on a reader outside, such as a webhook."""
    return f"{{chatd}}:lease:{reader}"


def cursors_key(reader: str) -> str:
    """Return the key of the cursors of a reader outside."""
    return f"{{chatd}}:cursors:{reader}"


def label_key(room: str, username: str, label: str) -> str:
    """Return the key that remembers a label."""
    return f"{{chatd}}:label:{digest(room, username, label)}"


def digest(*parts: str) -> str:
    """Return forty characters that identify a list of texts; the lengths keep different lists apart."""
    return hashlib.sha1("".join(f"{len(part)}:{part}" for part in parts).encode()).hexdigest()  # noqa: S324 -- a key


def number_of(stream_id: bytes) -> int:
    """Return the number in an entry's id, `NUMBER-MICROSECONDS`."""
    return int(stream_id.partition(b"-")[0])


def fields_of(flat: Sequence[bytes]) -> dict[bytes, bytes]:
    """Return the fields of an entry, which Redis sends as names and values in turn."""
    return dict(zip(flat[::2], flat[1::2], strict=True))


def message_of(stream_id: bytes, number: int, fields: Mapping[bytes, bytes]) -> Entry:
    """Return the message in an entry of a room or of the feed."""
    written = fields.get(b"t")
    stamp = written.decode() if written else timestamp(int(stream_id.partition(b"-")[2]) / MICROSECONDS)
    entry = Entry(number, fields[b"u"].decode(), fields[b"m"].decode(), stamp)
    if fields.keys() & _MARKS:
        author, replaces, replaced = (fields.get(name) for name in (b"a", b"p", b"d"))
        entry = entry._replace(
            author=None if author is None else author.decode(),
            replaces=None if replaces is None else int(replaces),
            removed=b"x" in fields,
            replaced=None if replaced is None else int(replaced),
            # An older version leaves the field beside what it removed.
            extra=None if b"x" in fields else load_extra(fields.get(b"j")),
        )
    return entry
