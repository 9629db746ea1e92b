"""The table of tools that tests need."""

import re
import subprocess
import sys

import pytest
from support import needs

FOLDER = needs.ROOT / "tests"
CALL = re.compile(r"\bneed\(\"([^\"]+)\"\)")


def test_need_of_a_tool_that_is_here():
    """A tool in PATH is found, and the test goes on."""
    assert needs.find("git") is None or needs.need("git").endswith("/git")


def test_need_of_a_missing_tool_skips(monkeypatch):
    """The reason of the skip names the tool and its package."""
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="promtool is missing: apt-get install prometheus"):
        needs.need("promtool")


def test_need_of_a_missing_tool_fails_in_ci(monkeypatch):
    """Continuous integration has every tool."""
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="promtool is missing"):
        needs.need("promtool")


def test_every_needed_tool_is_in_the_table():
    """scripts/test lists each tool that any test asks for, and no other."""
    asked = {tool for path in FOLDER.rglob("*.py") for tool in CALL.findall(path.read_text())}
    assert asked == needs.NEEDS.keys()


def test_list_of_a_bare_machine():
    """The list runs on a bare Python, and has one line for each tool that is missing."""
    command = [sys.executable, "-I", FOLDER / "support" / "needs.py"]
    done = subprocess.run(command, env={"PATH": "/nonexistent"}, capture_output=True, text=True, check=True)
    heading, *lines = done.stdout.splitlines()
    assert "skipped" in heading
    listed = {line.split()[0] for line in lines}
    assert listed >= {"git", "node", "promtool", "mmdebstrap", "go"}
    assert listed <= needs.NEEDS.keys()
