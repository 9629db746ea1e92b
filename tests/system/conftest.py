import pytest
from support import cloud


@pytest.fixture(scope="session")
def baked(tmp_path_factory):
    """The image, baked once for all tests."""
    return cloud.baked(tmp_path_factory.mktemp("baked"))
