"""Text of other people as a terminal may show it: without control characters, and in lines that fit.

Everything here returns text, or fragments: pairs of a prompt_toolkit style and a text.
"""

import re
import unicodedata
import zlib
from itertools import accumulate
from typing import Final

from prompt_toolkit.utils import get_cwidth

Fragments = list[tuple[str, str]]
"""One line: texts, each with its style before it."""

REPLACEMENT: Final = "\ufffd"
"""The sign for a character that is not shown."""
ELLIPSIS: Final = "…"
COLOURS: Final = ("ansired", "ansigreen", "ansiyellow", "ansibrightblue", "ansimagenta", "ansicyan")
"""The colours of names, which are legible on light and on dark terminals."""
_TAB: Final = 4
_DELETE: Final = "\x7f"
_WIDE_SIGN: Final = "\ufe0f"
"""The variation selector that makes the character before it as wide as an emoji."""
_DIRECTIONS: Final = dict.fromkeys(map(ord, "\u061c\u200e\u200f\u2066\u2067\u2068\u2069"))
"""Marks and isolates, which texts from right to left hold for good reasons.  A terminal orders text without them."""
_LOOSE_JOINER = re.compile(r"(?<![^\x00-\x7f])[\u200c\u200d]|[\u200c\u200d](?![^\x00-\x7f])")
"""Joiners that join nothing: in emoji and in many scripts they stand between characters that are not ASCII."""


def _safe_character(character: str) -> str:
    if character in "\u200c\u200d":
        return character
    match unicodedata.category(character):
        case "Cc" if character < " ":
            return chr(0x2400 + ord(character))
        case "Cc" if character == _DELETE:
            return "␡"
        case "Cc" | "Cf" | "Cs" | "Zl" | "Zp":
            return REPLACEMENT
    return character


def safe(text: str) -> str:
    """Return a name or a text as one line without control, bidirectional or invisible characters.

    Control characters become their pictures, as ␛ for ESC.  Others become the replacement character, so that two
    names that differ look different.
    """
    return "".join(map(_safe_character, _LOOSE_JOINER.sub(REPLACEMENT, text)))


def safe_lines(text: str) -> list[str]:
    """Return the lines of a message, each of them safe."""
    lines = text.translate(_DIRECTIONS).replace("\r\n", "\n").split("\n")
    return [safe(line.expandtabs(_TAB)) for line in lines]


def cells(text: str) -> int:
    """Return the width of a safe text in cells of the terminal, rather too much than too little."""
    return sum(map(get_cwidth, text)) + text.count(_WIDE_SIGN)


def shorten(text: str, width: int) -> str:
    """Return a safe text in at most `width` cells, with an ellipsis if it is longer."""
    if cells(text) <= width:
        return text
    fit = sum(end < width for end in accumulate(map(cells, text)))
    return text[:fit] + ELLIPSIS


def wrap(text: str, width: int, first: int | None = None) -> list[str]:
    """Break a safe line into lines of at most `width` cells, at spaces where possible; the first line may differ.

    A terminal would continue a long line at its left edge, where the text could look like another message.
    """
    lines: list[str] = []
    start = used = space = 0
    room = width if first is None else first
    for place, character in enumerate(text):
        size = cells(character)
        while used + size > room and place > start:
            cut = space if space > start else place
            lines.append(text[start:cut])
            start, room = cut, width
            used = cells(text[start:place])
        used += size
        if character == " ":
            space = place + 1
    return [*lines, text[start:]]


def name_style(name: str) -> str:
    """Return the style of a name, which is the same everywhere and in each run."""
    return f"bold {COLOURS[zlib.crc32(name.encode('utf-8', 'surrogatepass')) % len(COLOURS)]}"


def shown_name(name: str, width: int) -> str:
    """Return a name as a line begins with it; a name with a colon is in quotes, since a colon ends a name."""
    text = shorten(safe(name).strip() or REPLACEMENT, width)
    return f'"{text}"' if ":" in text else text


def plain(fragments: Fragments) -> str:
    """Return a line without its styles."""
    return "".join(text for _, text in fragments)
