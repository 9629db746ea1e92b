import pathlib
import signal

import pytest
from support import documented
from support.browser import browser, visit  # noqa: F401 -- fixtures of all tests
from twisted.logger import globalLogPublisher

# What a shell runs in the background ignores Ctrl-C, and so would all that is started here.
signal.signal(signal.SIGINT, signal.default_int_handler)

undocumented = []
documented.install(undocumented.append)


@pytest.fixture
def events():
    """The list of events that are logged during the test."""
    seen = []
    globalLogPublisher.addObserver(seen.append)
    yield seen
    globalLogPublisher.removeObserver(seen.append)


@pytest.fixture(autouse=True)
def _everything_is_documented():
    """Fail a test in which something was sent that the documents in `schemas/` do not describe."""
    yield
    found, undocumented[:] = [*undocumented], []
    assert found == []


WINGS = ("system", "integration", "unit")


def pytest_collection_modifyitems(items):
    """Run the slow wings first, so that the quick unit tests fill what is left of each worker's time."""

    def place(item):
        wing = item.path.relative_to(pathlib.Path(__file__).parent).parts[0]
        return WINGS.index(wing) if wing in WINGS else 0

    items.sort(key=place)
