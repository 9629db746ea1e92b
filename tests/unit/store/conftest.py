"""Fixtures that the tests of the stores share."""

import os
import pathlib
import tempfile

import pytest

MEMORY = pathlib.Path("/dev/shm")


@pytest.fixture
def tmp_path(tmp_path):
    """A folder in memory if the machine has one, because each commit syncs and disks make that slow."""
    if not os.access(MEMORY, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="chatd-", dir=MEMORY) as folder:
        yield pathlib.Path(folder)
