"""The scripts that decide whether a browser gets the page or the instructions."""

import subprocess

from support.needs import need
from support.servers import LONG, NODE


def test_scripts_before_the_page():
    """A browser that cannot start the page gets the instructions, with the URL that it sees itself."""
    result = subprocess.run(
        [need("node"), "--test", "chatd/start.test.mjs"],
        cwd=NODE,
        capture_output=True,
        text=True,
        timeout=LONG,
        check=False,
    )
    assert result.returncode == 0, result.stdout
