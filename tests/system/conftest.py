import pytest
from support import cloud, deployments
from support.servers import Server


@pytest.fixture(scope="session")
def baked(tmp_path_factory):
    """The image, baked once for all tests."""
    return cloud.baked(tmp_path_factory.mktemp("baked"))


@pytest.fixture(scope="session")
def chat(tmp_path_factory):
    """A real server that stands for the instances behind the URL of a stack."""
    with Server(tmp_path_factory.mktemp("chat"), "--store=memory:") as server:
        yield server


@pytest.fixture
def account(chat):
    """An account whose stack runs an old image, with a new image to roll out."""
    with deployments.running(chat) as account:
        yield account
