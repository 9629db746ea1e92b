import pytest
from twisted.logger import globalLogPublisher


@pytest.fixture
def events():
    """What is logged, as it is logged."""
    seen = []
    globalLogPublisher.addObserver(seen.append)
    yield seen
    globalLogPublisher.removeObserver(seen.append)
