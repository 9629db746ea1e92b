"""One delivery as JSON."""

import json
import re

import pytest
from support.documented import SCHEMAS, check_delivery
from support.helpers import stamped

from chatd.messages import REMOVED, Entry
from chatd.room.log import Page
from chatd.webhooks import batch
from chatd.webhooks.batch import MAX_BYTES, make_batch


def entries(first, last, text="x", **fields):
    return [Entry(number, "ann", text, stamped(number), **fields) for number in range(first, last + 1)]


POST = json.loads((SCHEMAS / "openapi.json").read_text("utf-8"))["webhooks"]["messages"]["post"]


def make(cursor, page, last=None):
    return make_batch("k7Q2xe", "team", cursor, page, last)


def made(cursor, page, last=None):
    """Make a batch, which the OpenAPI document must describe; return it and its document."""
    found = make(cursor, page, last)
    document = json.loads(found.body)
    check_delivery(document)
    (pattern,) = (one["schema"]["pattern"] for one in POST["parameters"] if one["name"] == "webhook-id")
    assert re.fullmatch(pattern, found.id)
    return found, document


def test_batch():
    """The data of a message is the one that members get."""
    found, document = made(40, Page(entries(41, 42, '"ü'), 1, 42))
    assert (found.id, found.last, found.messages, found.missed) == ("team:k7Q2xe-41:42", 42, 2, 0)
    assert found.timestamp == stamped(41)
    assert document == {
        "type": "messages",
        "room": "team",
        "messages": [
            {"id": f"k7Q2xe-{number}", "data": {"username": "ann", "message": '"ü', "timestamp": stamped(number)}}
            for number in (41, 42)
        ],
    }


def test_edit_and_removal():
    """They are entries, and an entry that was edited names the edit."""
    page = Page([*entries(1, 1, replaced=2), *entries(2, 2, replaces=1)], 1, 2)
    _, document = made(0, page)
    assert [(one.get("replaced"), one.get("replaces")) for one in document["messages"]] == [
        ("k7Q2xe-2", None),
        (None, "k7Q2xe-1"),
    ]
    _, document = made(2, Page(entries(3, 3, REMOVED, replaces=1, removed=True), 1, 3))
    assert document["messages"][0]["removed"] is True


def test_text_that_looks_like_the_type():
    _, document = made(1, Page(entries(2, 2, '"type":"message",'), 1, 2))
    assert document["messages"][0]["data"]["message"] == '"type":"message",'


def test_start_of_a_room():
    """The first batch of a room in an epoch has `start`."""
    assert made(0, Page(entries(1, 1), 1, 1))[1]["start"] is True
    assert "start" not in made(1, Page(entries(2, 2), 1, 2))[1]


@pytest.mark.parametrize(
    ("cursor", "first", "head", "last", "missed"),
    [(3, 4, 6, None, 0), (3, 5, 6, None, 1), (3, 7, 6, None, 3), (3, 9, 9, 5, 2)],
)
def test_gap(cursor, first, head, last, missed):
    """A batch states that entries of its range are missing, and names the first one left."""
    found, document = made(cursor, Page(entries(max(first, cursor + 1), head), first, head), last)
    assert found.missed == missed
    assert document.get("first") == (f"k7Q2xe-{first}" if missed else None)
    assert document.get("missed", False) == bool(missed)
    assert found.id == f"team:k7Q2xe-4:{last or head}"
    assert found.messages == (last or head) - cursor - missed


def test_nothing_to_deliver():
    assert make(6, Page([], 1, 6)) is None


def test_fixed_range():
    """A retry takes no entry that was appended meanwhile."""
    found, document = made(1, Page(entries(2, 9), 1, 9), 4)
    assert (found.id, len(document["messages"])) == ("team:k7Q2xe-2:4", 3)


def test_size_is_bounded():
    """A batch ends with the entry that fills it, and a fixed range has no such limit."""
    text = "x" * (MAX_BYTES // 3)
    found = make(0, Page(entries(1, 9, text), 1, 9))
    assert (found.last, found.messages) == (3, 3)
    assert len(found.body) < 2 * MAX_BYTES
    assert make(0, Page(entries(1, 4, text), 1, 9), 4).messages == 4
    assert batch.MAX_ENTRIES == 100
