"""The storages of the outbox."""

import stat
import subprocess
import sys
from dataclasses import replace

import pytest
from support.servers import environment

from chatd.client.protocol import Rejected
from chatd.client.storage import FileStorage, MemoryStorage, PendingPost
from chatd.messages import Id

FIRST = PendingPost("one", "a", 7, {"username": "ann", "message": "hé", "tags": [1]}, Id("abcd", 3))
SECOND = PendingPost("two", "a", 8, {"type": "remove", "id": "abcd-1"})
OTHER = PendingPost("three", "b", 6, {"message": "hi"})


@pytest.fixture(params=["memory", "file"])
def storage(request, tmp_path):
    return MemoryStorage() if request.param == "memory" else FileStorage(tmp_path / "outbox.sqlite")


def facts(posts):
    """Return posts as values that can be compared."""
    return sorted(
        (post.label, post.key, post.at, dict(post.frame), post.since, post.error and (str(post.error), post.error.code))
        for post in posts
    )


def test_posts_are_kept_by_key(storage):
    for post in (FIRST, SECOND, OTHER):
        storage.put(post)
    assert facts(storage.list("a")) == facts([FIRST, SECOND])
    assert facts(storage.list("b")) == facts([OTHER])
    assert storage.list("c") == []


def test_post_is_replaced_and_deleted(storage):
    """The reason of a refusal is kept with the post."""
    storage.put(FIRST)
    refused = replace(FIRST, error=Rejected("muted", "FORBIDDEN"))
    storage.put(refused)
    assert facts(storage.list("a")) == facts([refused])
    storage.delete("one")
    storage.delete("one")
    assert storage.list("a") == []


def test_file_outlives_the_program(tmp_path):
    """Two programs use one file at once, and a post is durable when `put` returns, even if the program is killed."""
    path = tmp_path / "outbox.sqlite"
    program = (
        "import os, signal, sys; from chatd.client.storage import *; storage = FileStorage(sys.argv[1]);"
        "[storage.put(PendingPost(f'{sys.argv[2]}{n}', 'a', n, {'message': 'hi'})) for n in range(20)];"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", program, str(path), name], env=environment()) for name in ("x", "y")
    ]
    assert [process.wait(60) for process in running] == [-9, -9]
    assert len(FileStorage(path).list("a")) == 40


def test_file_is_private(tmp_path):
    """Others must not read what was typed."""
    FileStorage(tmp_path / "outbox.sqlite")
    assert stat.S_IMODE((tmp_path / "outbox.sqlite").stat().st_mode) == 0o600
