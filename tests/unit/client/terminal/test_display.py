"""Text of other people, as a terminal may show it."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import REPEATABLE

from chatd.client.terminal.display import cells, name_style, plain, safe, safe_lines, shorten, shown_name, wrap

HOSTILE = [
    "\x1b[2J\x1b[H",  # clears the screen
    "\x1b]0;owned\x07",  # sets the title
    "\x1b]52;c;cm0=\x07",  # writes the clipboard
    "\x9b31m",  # a control sequence of one character
    "\x90q\x9c",  # a device control string
    "back\b\b\b\bspace",
    "12:00   bea: hi\r12:01   ann: forged",
    "\u202eesrever\u202c",
    "\u2067\u2066\u2069",
    "\u2028forged\u2029",
    "bell\a\x00\x7f",
    "\ud800",
    "\ufeff\u200b\u00ad",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_cannot_move_the_cursor(text):
    for shown in (safe(text), *safe_lines(text), shown_name(text, 40)):
        assert {unicodedata.category(one) for one in shown}.isdisjoint({"Cc", "Cf", "Cs", "Zl", "Zp"})


@given(st.text())
@REPEATABLE
def test_any_text_is_printable_and_fits(text):
    for line in safe_lines(text):
        pieces = wrap(line, 20, 9)
        assert "".join(pieces) == line
        assert all(cells(piece) <= 20 for piece in pieces)
        assert cells(pieces[0]) <= 9
        assert cells(shorten(line, 20)) <= 20
        for character in line:
            assert character in "\u200c\u200d" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def test_control_characters_become_pictures():
    assert safe("\x1b[31m\t\x7f") == "␛[31m␉␡"


@pytest.mark.parametrize(
    "text", ["Алиса 👋", "\u0645\u06cc\u200c\u062e\u0648", "👩\u200d💻", "日本語", "e\u0301", "👍🏽", "\ue0b0"]
)
def test_honest_text_stays(text):
    assert safe(text) == text
    assert safe_lines(text) == [text]


def test_joiners_that_hide_a_difference():
    """A name with an invisible character looks different from the name without it."""
    assert safe("an\u200dn") == safe("an\u200bn") == "an\ufffdn"
    assert safe("ann\u200c") == "ann\ufffd"


def test_long_text_is_shortened_in_one_look(monkeypatch):
    """A draft of a megabyte must not stop the screen."""
    looks = []
    monkeypatch.setattr("chatd.client.terminal.display.get_cwidth", lambda character: looks.append(character) or 1)
    assert shorten("x" * 5000, 20) == "x" * 19 + "…"
    assert len(looks) <= 2 * 5000


def test_directions_of_honest_texts_are_dropped():
    assert safe_lines("\u2067\u05e9\u05dc\u2069\u200f") == ["\u05e9\u05dc"]


def test_lines_of_a_message():
    assert safe_lines("a\r\n\tb\n") == ["a", "    b", ""]


def test_wide_characters_count_twice():
    assert cells("日本") == 4
    assert cells("\u2764\ufe0f") == 2
    assert wrap("日本語", 4) == ["日本", "語"]
    assert shorten("日本語", 5) == "日本…"
    assert shorten("日本語", 6) == "日本語"


def test_lines_break_at_spaces():
    assert wrap("one two three", 8) == ["one two ", "three"]
    assert wrap("one twothreefour", 8) == ["one ", "twothree", "four"]
    assert wrap("a 日日日日", 8) == ["a ", "日日日日"]
    assert wrap("", 8) == [""]


def test_wide_character_after_a_full_line():
    """The rest after the last space can itself be too long for the next line."""
    assert wrap(" abcdefg日", 8) == [" ", "abcdefg", "日"]


def test_style_of_a_name_is_stable():
    assert name_style("ann") == name_style("ann") == "bold ansibrightblue"
    assert len({name_style(f"user {number}") for number in range(100)}) == 6


def test_names_that_look_like_more():
    """A colon ends a name, so a name with one is in quotes, and an empty one is seen."""
    assert shown_name("ann", 20) == "ann"
    assert shown_name("ann: hi", 20) == '"ann: hi"'
    assert shown_name(" ", 20) == "\ufffd"
    assert shown_name("a" * 30, 10) == "a" * 9 + "…"


def test_line_without_styles():
    assert plain([("bold", "a"), ("", "b")]) == "ab"
