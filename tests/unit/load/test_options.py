"""The limit of open files that the load tool raises for its clients."""

import os
import resource

import pytest

from chatd.load.options import allow_files


@pytest.fixture
def limits(monkeypatch):
    """The soft and the hard limit of open files of a process that has three open, in place of this process."""
    limits = [1024, 4096]
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.__setitem__(slice(None), new))
    monkeypatch.setattr(os, "listdir", {"/proc/self/fd": ["0", "1", "2"]}.__getitem__)
    return limits


REMEDY = "4097 open files are needed, and 4096 are allowed: use fewer --clients, or raise `ulimit -Hn`"


@pytest.mark.parametrize(
    ("before", "count", "problem", "after"),
    [
        ((1024, 4096), 1021, None, (1024, 4096)),
        ((1024, 4096), 1022, None, (1025, 4096)),
        ((1024, 4096), 4093, None, (4096, 4096)),
        ((1024, 4096), 4094, REMEDY, (1024, 4096)),
        ((1024, resource.RLIM_INFINITY), 1 << 20, None, ((1 << 20) + 3, resource.RLIM_INFINITY)),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), 1 << 20, None, (resource.RLIM_INFINITY,) * 2),
    ],
)
def test_file_limit_is_raised_up_to_the_hard_limit(limits, before, count, problem, after):
    """The files that are open already count too.

    A process without privileges cannot exceed the hard limit, so the tool names the remedy and changes nothing.
    """
    limits[:] = before
    assert allow_files(count) == problem
    assert tuple(limits) == after
