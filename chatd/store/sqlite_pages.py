"""The pages of an SQLite file, and what they hold beside the data: https://www.sqlite.org/fileformat2.html.

SQLite zeroes what it deletes (`secure_delete`), but not what it moves.  When a page of a table is full, SQLite moves
some of its rows to another page, and their old bytes can stay in the *gap* of the first page, which is its unused
space.  A row that is deleted later is zeroed in its new place only.

This module is pure: bytes in, values out.
"""

import struct
from collections.abc import Iterator
from typing import Final

MOST_PAGES: Final = 2 << 24
"""The number of pages from which the first byte of an overflow page may look like that of a page of a table."""

PENDING_BYTE: Final = 1 << 30
"""The place of the bytes that SQLite locks; the page there holds nothing."""

_HEADERS: Final = {2: 12, 5: 12, 10: 8, 13: 8}
"""The size of the header of each kind of page of a table or an index, by the first byte of the page."""
_MOST_START: Final = 65536
"""Stands in a header as 0."""


def stale_gaps(data: bytes, size: int) -> Iterator[tuple[int, int]]:
    """Find the gaps with old bytes in whole pages of this size; yield where each begins and ends in `data`.

    The first page of a file must not be among them.  Pages that do not look valid are left out.
    """
    for place in range(0, len(data) - size + 1, size):
        header = _HEADERS.get(data[place])
        if header is None:
            continue
        cells, start = struct.unpack_from(">HH", data, place + 3)
        start = start or _MOST_START
        begin = header + 2 * cells
        if not begin < start <= size or not data[place + begin : place + start].strip(b"\0"):
            continue
        if min(struct.unpack_from(f">{cells}H", data, place + header), default=start) >= start:
            yield place + begin, place + start


def is_pointer_map(page: int, size: int) -> bool:
    """Return whether a page, of which the first is 1, is a pointer map in a file with `auto_vacuum` (section 1.8).

    A pointer map has five bytes for each page after it, up to the next one.
    """
    map_and_pages = size // 5 + 1
    first = (page - 2) // map_and_pages * map_and_pages + 2
    return page == (first + 1 if (first - 1) * size == PENDING_BYTE else first)
