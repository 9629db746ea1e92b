"""The state that the connections to a port share."""

import pytest
from support.helpers import Turns

from chatd.messages import Code
from chatd.transport.intake import Intake


@pytest.fixture
def clock():
    return Turns()


def test_counts_begin_at_zero(clock):
    """A scrape shows every reason from the start."""
    intake = Intake(clock)
    assert intake.refusals == dict.fromkeys(["schema", *Code], 0)
    assert {"FORBIDDEN", "NOT_REPLACEABLE", "RATE_LIMITED", "UNKNOWN_ID"} < intake.refusals.keys()
    assert intake.throttles == {"websocket": 0, "http": 0}
