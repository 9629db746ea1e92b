"""chatd.js in Node, against real servers and through a proxy that cuts connections."""

import json
import subprocess
import sys

import pytest
from support.servers import LONG, NODE, WATCHED, environment, need


@pytest.mark.parametrize("name", ["room", "faults"])
def test_library_against_real_servers(name):
    need("ws")
    command = json.dumps([sys.executable, str(WATCHED)])
    result = subprocess.run(
        [need("node"), "--test", f"chatd/{name}.test.mjs"],
        cwd=NODE,
        env=environment(CHATD_TEST_COMMAND=command),
        capture_output=True,
        text=True,
        timeout=5 * LONG,
        check=False,
    )
    assert result.returncode == 0, result.stdout
