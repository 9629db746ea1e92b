"""Make the files that tests keep in `build/` before the tests need them; a test that needs one earlier waits.

Failures here are left to the test, which reports them.
"""

import contextlib

import pytest
from support import booted, cloud, stacks

for make in (
    cloud.packer,
    lambda: stacks.tools(stacks.CHECKERS),
    lambda: stacks.tools(stacks.DOUBLE),
    booted.debian,
    booted.wheels,
):
    with contextlib.suppress(AssertionError, pytest.fail.Exception, pytest.skip.Exception):
        make()
