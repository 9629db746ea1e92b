"""States, people and refusals in words."""

import pytest
from support.fake_rooms import FakeRoom, pending, presence

from chatd.client.protocol import Rejected
from chatd.client.terminal.display import cells
from chatd.client.terminal.status import (
    connection_words,
    people_words,
    reason_words,
    refusal_words,
    stays_words,
    toolbar,
    typing_words,
)


def snapshot(**fields):
    room = FakeRoom()
    room.change(**fields)
    return room.snapshot()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"state": "online"}, "online"),
        ({"state": "connecting"}, "connecting"),
        ({"state": "waiting", "retry_at": 103.2, "reason": "a\x1b"}, "offline (a␛), reconnecting in 3 s"),
        ({"state": "waiting", "retry_at": 99, "reason": "so"}, "offline (so), reconnecting in 0 s"),
        ({"state": "waiting"}, "offline (the connection was lost), reconnecting in 0 s"),
        ({"state": "rejected"}, "refused by the server"),
        ({"state": "stopped"}, "stopped"),
    ],
)
def test_state_in_words(fields, words):
    assert connection_words(snapshot(**fields), 100.0) == words


def test_reason_with_its_remedy():
    assert reason_words("connection refused") == "connection refused"
    assert "SSL_CERT_FILE" in reason_words("certificate verify failed")


def test_people_as_many_as_fit():
    assert people_words(None, 60) == ""
    assert people_words(presence(1200), 60) == "1,200 here"
    assert people_words(presence(3, ["ann", "bea"]), 60) == "3 here: ann, bea"
    assert people_words(presence(3, ["ann", "b\x1bea"]), 60) == "3 here: ann, b␛ea"
    assert people_words(presence(4, ["ann", "bea", "cyril"]), 18) == "4 here"
    assert people_words(presence(4, ["ann", "bea", "cyril"]), 22) == "4 here: ann and 2 more"


def test_people_who_type():
    assert typing_words([], "ann") == ""
    assert typing_words(["ann"], "ann") == ""
    assert typing_words(["ann", "bea"], "ann") == "bea is typing"
    assert typing_words(["bea", "cy"], "ann") == "bea and cy are typing"
    assert typing_words(["bea", "cy", "dee"], "ann") == "3 people are typing"


@pytest.mark.parametrize("width", [1, 10, 20, 40, 80])
def test_toolbar_fits(width):
    names = ["日" * 30 for _ in range(9)]
    words = toolbar(snapshot(presence=presence(9, names), typing=["bea"]), "ann", width, 100.0)
    assert cells(words) <= width


def test_toolbar_in_full():
    shown = snapshot(presence=presence(2, ["ann", "bea"]), typing=["bea"])
    assert toolbar(shown, "ann", 80, 100.0) == "online · 2 here: ann, bea · bea is typing"
    assert toolbar(snapshot(), "ann", 80, 100.0) == "online"


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (400, "the URL and --name"),
        (401, "use --token-file FILE"),
        ("TOKEN_REFUSED", "use --token-file FILE"),
        (403, "check --name and the token"),
        ("FORBIDDEN", "check --name and the token"),
        (404, "'team'"),
        (None, "the server refuses this client (so)"),
    ],
)
def test_refusal_names_the_remedy(code, remedy):
    words = refusal_words(Rejected("so", code), "team")
    assert remedy in words
    assert "(so)" in words


def test_what_stays_in_the_outbox():
    refused = pending("1", ValueError("no"))
    assert stays_words([refused], kept=True) == ""
    assert stays_words([refused, pending("2")], kept=True).startswith("1 message is in the outbox")
    assert stays_words([pending("2"), pending("3")], kept=True).startswith("2 messages are in the outbox")
    assert stays_words([pending("2")], kept=False) == "1 message is lost, because the outbox could not be kept"
