"""One delivery: consecutive entries of one room, as JSON.

A batch is named by its range and not by its content.  A retry therefore has the same id, although entries in it may
have been edited or removed meanwhile: the text is read from the log for each attempt.
"""

from typing import Final, NamedTuple

from chatd.messages import Entry
from chatd.room.log import Page
from chatd.transport.frames import message_frame
from chatd.transport.framing import payload

MAX_ENTRIES: Final = 100
"""The most entries of one batch."""
MAX_BYTES: Final = 256 << 10
"""The size in bytes after which a batch takes no further entry."""

_TYPE: Final = b'"type":"message",'


class Batch(NamedTuple):
    """Entries to deliver in one request."""

    id: str
    """The id of the delivery, `ROOM:EPOCH-FIRST:LAST`; it has no full stop, which delimits what is signed."""
    body: bytes
    last: int
    """The number of the last entry of the range."""
    messages: int
    """The number of entries in the body."""
    missed: int
    """The number of entries of the range that the log no longer holds."""
    timestamp: str
    """The timestamp of the first entry; "" without one."""


def make_batch(epoch: str, room: str, cursor: int, page: Page, last: int | None) -> Batch | None:
    """Encode the entries after a cursor, of which the page holds the first ones; None if there is nothing to deliver.

    `last` is the end of the range if an earlier attempt has fixed it.
    """
    until = page.head if last is None else last
    if until <= cursor:
        return None
    entries = [entry for entry in page.entries if cursor < entry.number <= until]
    pieces: list[bytes] = []
    size = 0
    for entry in entries:
        pieces.append(_encode(epoch, entry))
        size += len(pieces[-1])
        if last is None and size >= MAX_BYTES:
            break
    if pieces and last is None:
        until = entries[len(pieces) - 1].number
    missed = min(page.first - 1, until) - cursor
    notes = ""
    if cursor == 0:
        notes += '"start":true,'
    if missed > 0:
        notes += f'"missed":true,"first":"{epoch}-{page.first}",'
    head = f'{{"type":"messages","room":"{room}",{notes}"messages":['
    return Batch(
        id=f"{room}:{epoch}-{cursor + 1}:{until}",
        body=b"%b%b]}" % (head.encode(), b",".join(pieces)),
        last=until,
        messages=len(pieces),
        missed=max(0, missed),
        timestamp=entries[0].timestamp if entries else "",
    )


def _encode(epoch: str, entry: Entry) -> bytes:
    """Encode an entry as members get it, without the type of the frame."""
    return payload(message_frame(epoch, entry)).replace(_TYPE, b"", 1)
