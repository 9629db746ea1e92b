"""Identities: what a client may do in which room."""

import re

import pytest

from chatd.transport.identity import ANYONE, NO_ROOMS, AllowedRooms, Identity, Permissions

TEAM = AllowedRooms(frozenset({"lobby"}), (re.compile(r"team-.*\Z"),))


@pytest.mark.parametrize(
    ("identity", "room", "allowed"),
    [
        (ANYONE, "main", (True, True, False)),
        (Identity(permissions=Permissions(NO_ROOMS, NO_ROOMS)), "main", (False, False, False)),
        (Identity("s", "ann", 0.0, Permissions()), "main", (True, True, False)),
        (Identity("s", "ann", 0.0, Permissions(TEAM, NO_ROOMS, TEAM)), "team-a", (True, False, True)),
        (Identity("s", "ann", 0.0, Permissions(TEAM, None, None)), "main", (False, True, True)),
        (Identity("s", "ann", 0.0, Permissions(TEAM, TEAM, TEAM)), "lobby", (True, True, True)),
        (Identity("s", "ann", 0.0, Permissions(TEAM, TEAM, TEAM)), "lobby-2", (False, False, False)),
    ],
)
def test_permissions(identity, room, allowed):
    """A permission lists rooms by name and pattern; without a list it is for every room, with an empty one for none."""
    assert (identity.may_read(room), identity.may_post(room), identity.may_moderate(room)) == allowed
