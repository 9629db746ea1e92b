"""Make what the tests keep in `build/`, ahead of them, as .ci/run has it; a test that needs it before then waits.

What cannot be made here is left to the test, which says why.
"""

import contextlib

import pytest
from support import booted, cloud, stacks

for make in (
    cloud.packer,
    cloud.guest,
    lambda: stacks.tools(stacks.CHECKERS),
    lambda: stacks.tools(stacks.DOUBLE),
    booted.debian,
):
    with contextlib.suppress(AssertionError, pytest.fail.Exception, pytest.skip.Exception):
        make()
