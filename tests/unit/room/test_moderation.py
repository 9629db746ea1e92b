"""Sanctions: what an operator may ask for, and whom they meet."""

import re

import pytest
from support.helpers import NEW_YEAR

from chatd.room.moderation import (
    MAX_SECONDS,
    Sanction,
    SanctionKind,
    Sanctions,
    Target,
    Visitor,
    fold,
    is_room,
    parse_network,
)

BAN, MUTE = SanctionKind.BAN, SanctionKind.MUTE
ANN = Visitor("ann", "auth0|7", "203.0.113.7")


def sanction(word="s1", kind="ban", **document):
    """Return a sanction that an operator asks for at the new year."""
    return Sanction.parse({"kind": kind, **document}, word, NEW_YEAR)


def find(*given, kind=BAN, room="team", visitor=ANN, now=NEW_YEAR):
    """Return the id of the sanction that meets a client, or None."""
    sanctions = Sanctions()
    for one in given:
        sanctions.add(one)
    found = sanctions.find(kind, room, visitor, now)
    return found and found.id


# Parsing


def test_request_becomes_a_sanction():
    """An expiry counts from the server's clock."""
    document = {"kind": "mute", "username": "Ann", "room": "team", "seconds": 60, "reason": "spam"}
    found = Sanction.parse(document, "s1", NEW_YEAR)
    assert found == Sanction("s1", MUTE, Target.USERNAME, "Ann", "team", NEW_YEAR + 60, "spam")
    assert Sanction.parse({"kind": "ban", "subject": "x"}, "s2", 0) == Sanction(
        "s2", BAN, Target.SUBJECT, "x", None, None, ""
    )


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"username": "ann"}, "kind: choose ban or mute"),
        ({"kind": "kick", "username": "ann"}, "kind: choose ban or mute"),
        ({"kind": ["ban"], "username": "ann"}, "kind: a text of 255 characters at most, in one line"),
        ({"kind": "ban"}, "name the client by one of username, subject, address"),
        ({"kind": "ban", "username": "a", "subject": "b"}, "name the client by one of"),
        ({"kind": "ban", "username": ""}, "username: 1 to 255 visible characters"),
        ({"kind": "ban", "username": " \u200b"}, "username: a text of 255"),
        ({"kind": "ban", "username": " "}, "username: 1 to 255 visible characters"),
        ({"kind": "ban", "subject": ""}, "subject: 1 to 255 visible characters"),
        ({"kind": "ban", "username": 7}, "username: a text"),
        ({"kind": "ban", "username": "a" * 256}, "username: a text"),
        ({"kind": "ban", "address": "nowhere"}, "address: 'nowhere' does not appear"),
        ({"kind": "ban", "address": "10.0.0.1/8"}, "has host bits set; write 203.0.113.7"),
        ({"kind": "ban", "address": "0.0.0.0/0"}, "0.0.0.0/0 stands for everyone"),
        ({"kind": "ban", "username": "ann", "room": "Team A"}, "room: a name such as team-a"),
        ({"kind": "ban", "username": "ann", "room": 7}, "room: a name such as team-a"),
        ({"kind": "ban", "username": "ann", "seconds": 0}, "seconds: a number above 0"),
        ({"kind": "ban", "username": "ann", "seconds": True}, "seconds: a number above 0"),
        ({"kind": "ban", "username": "ann", "seconds": "60"}, "seconds: a number above 0"),
        ({"kind": "ban", "username": "ann", "seconds": float("nan")}, "seconds: a number above 0"),
        ({"kind": "ban", "username": "ann", "seconds": MAX_SECONDS + 1}, "seconds: a number above 0"),
        ({"kind": "ban", "username": "ann", "reason": "a\nb"}, "reason: a text of 200 characters at most, in one line"),
        ({"kind": "ban", "username": "ann", "until": 7}, "there is no field 'until'"),
        ({"kind": "ban", "username": "\u3164\ufe0f"}, "username: 1 to 255 visible characters"),
        ({"kind": "ban", "address": "::ffff:0:0/96"}, "stands for everyone"),
    ],
)
def test_wrong_request_is_refused_in_one_line(document, words):
    with pytest.raises(ValueError, match=re.escape(words)) as refused:
        Sanction.parse(document, "s1", NEW_YEAR)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "network"),
    [
        ("203.0.113.7", "203.0.113.7/32"),
        ("203.0.113.0/24", "203.0.113.0/24"),
        ("::ffff:203.0.113.7", "203.0.113.7/32"),
        ("::ffff:203.0.113.0/120", "203.0.113.0/24"),
        ("2001:db8:0:1::7", "2001:db8:0:1::/64"),
        ("2001:db8::/32", "2001:db8::/32"),
        ("2001:db8::7/128", "2001:db8::7/128"),
    ],
)
def test_address_stands_for_a_network(text, network):
    """One host can have all addresses of an IPv6 network, unless the operator names a longer prefix."""
    assert str(parse_network(text)) == network


def test_dumped_fields_are_loaded():
    """A field that a later version adds is ignored."""
    given = sanction(address="203.0.113.0/24", room="team", seconds=9, reason="spam")
    assert Sanction.load({**given._asdict(), "by": "someone"}) == given


@pytest.mark.parametrize(
    ("name", "good"), [("main", True), ("a" * 64, True), ("a" * 65, False), ("A", False), ("", False)]
)
def test_names_of_rooms(name, good):
    assert is_room(name) is good


# Finding


HIDDEN = [
    f"a{letter}nn"
    for letter in "\0\n\x7f\x9f\xad\u034f\u115f\u180c\u200b\u202e\u2065\u2800\u3164\ufe0f\uffa0\U000e0100"
]


@pytest.mark.parametrize("name", ["ann", "Ann", "ANN", " ann ", "\uff41\uff4e\uff4e", *HIDDEN])
def test_spellings_of_one_username(name):
    """Case, width, outer spaces and invisible characters do not make another user."""
    assert find(sanction(username="Ann"), visitor=ANN._replace(username=name)) == "s1"


def test_folding_is_stable():
    """A folded name folds to itself."""
    for name in ("Straße", "İ", "ﬁ", "ϓ", "Å", "a\u3164", "\u2800 a\0 "):
        assert fold(fold(name)) == fold(name)


@pytest.mark.parametrize(
    ("document", "met"),
    [
        ({"username": "ann"}, True),
        ({"username": "bob"}, False),
        ({"subject": "auth0|7"}, True),
        ({"subject": "AUTH0|7"}, False),
        ({"subject": "ann"}, False),
        ({"address": "203.0.113.7"}, True),
        ({"address": "203.0.113.8"}, False),
        ({"address": "203.0.113.0/24"}, True),
        ({"address": "203.0.112.0/24"}, False),
        ({"address": "2001:db8::/32"}, False),
        ({"address": "2001:db8::/48"}, False),
        ({"username": "ann", "room": "team"}, True),
        ({"username": "ann", "room": "other"}, False),
        ({"username": "ann", "seconds": 1}, True),
    ],
)
def test_sanction_meets_its_clients_alone(document, met):
    assert find(sanction(**document)) == ("s1" if met else None)


@pytest.mark.parametrize(
    ("given", "address", "met"),
    [
        ("203.0.113.7", "::ffff:203.0.113.7", True),
        ("2001:db8:0:1::7", "2001:db8:0:1:ffff::1", True),
        ("2001:db8:0:1::7", "2001:db8:0:2::7", False),
        ("2001:db8::/32", "2001:db8:5::1", True),
        ("203.0.113.7", "/run/chatd.sock", False),
        ("203.0.113.7", None, False),
    ],
)
def test_addresses_in_every_form(given, address, met):
    assert find(sanction(address=given), visitor=Visitor(None, None, address)) == ("s1" if met else None)


def test_kinds_are_apart():
    assert find(sanction(kind="mute", username="ann")) is None
    assert find(sanction(kind="mute", username="ann"), kind=MUTE) == "s1"


def test_expired_sanction_meets_nobody():
    one = sanction(username="ann", seconds=60)
    assert find(one, now=NEW_YEAR + 59) == "s1"
    assert find(one, now=NEW_YEAR + 60) is None


def test_longest_sanction_is_found():
    """A client learns when the last of its sanctions ends."""
    short, long = sanction("short", username="ann", seconds=60), sanction("long", username="ann", seconds=90)
    assert find(short, long) == find(long, short) == "long"
    assert find(long, sanction("forever", address="203.0.113.0/24")) == "forever"
    assert find(sanction("room", username="ann", room="team", seconds=99), long) == "room"


def test_client_without_a_name_is_not_met():
    given = [sanction(username="ann"), sanction("s2", subject="x")]
    assert find(*given, visitor=Visitor(None, None, "203.0.113.7")) is None


# The set


def test_removed_sanction_is_gone():
    """Nothing is left of it, and other sanctions of the same client stay."""
    sanctions = Sanctions()
    for one in (sanction("s1", address="203.0.113.0/24"), sanction("s2", address="203.0.113.0/24")):
        sanctions.add(one)
        sanctions.add(one)  # once more has no effect
    sanctions.remove("s1")
    sanctions.remove("unknown")
    assert sanctions.get("s1") is None
    assert sanctions.find(BAN, "team", ANN, NEW_YEAR).id == "s2"
    sanctions.remove("s2")
    assert sanctions.find(BAN, "team", ANN, NEW_YEAR) is None
    assert (len(sanctions), [*sanctions]) == (0, [])


def test_listener_gets_each_new_sanction():
    """Replacing the set reports what is new in it."""
    sanctions, heard = Sanctions(), []
    first, second, third = (sanction(word, username="ann") for word in ("s1", "s2", "s3"))
    sanctions.add(first)
    sanctions.follow(heard.append)
    sanctions.add(first)
    sanctions.add(second)
    sanctions.replace([second, third])
    assert heard == [second, third]
    assert [*sanctions] == [second, third]


def test_sanctions_in_force_are_counted():
    sanctions = Sanctions()
    for one in (
        sanction("s1", username="a", seconds=1),
        sanction("s2", username="b"),
        sanction("s3", "mute", username="c"),
    ):
        sanctions.add(one)
    assert sanctions.count(NEW_YEAR) == {BAN: 2, MUTE: 1}
    assert sanctions.count(NEW_YEAR + 1) == {BAN: 1, MUTE: 1}
    assert sanctions.expired(NEW_YEAR + 1) == ["s1"]
