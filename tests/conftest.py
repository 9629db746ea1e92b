import signal

import pytest
from support import documented
from twisted.logger import globalLogPublisher

# What a shell runs in the background ignores Ctrl-C, and so would all that is started here.
signal.signal(signal.SIGINT, signal.default_int_handler)

undocumented = []
documented.install(undocumented.append)


@pytest.fixture
def events():
    """What is logged, as it is logged."""
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
