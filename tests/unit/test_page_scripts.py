"""The parts of the page that need no browser, and what a stylesheet may set."""

import re
import subprocess

import pytest
from support.needs import need
from support.servers import LONG, NODE, ROOT


@pytest.mark.parametrize("part", ["start", "shell", "messages"])
def test_scripts_of_the_page(part):
    """The tests of a part: what runs before the page, what stands around the messages, or the messages."""
    result = subprocess.run(
        [need("node"), "--test", f"chatd/{part}.test.mjs"],
        cwd=NODE,
        capture_output=True,
        text=True,
        timeout=LONG,
        check=False,
    )
    assert result.returncode == 0, result.stdout


def test_documented_properties_are_set():
    """Each custom property that docs/operations.md promises to operators is one of the theme."""
    section = (ROOT / "docs/operations.md").read_text("utf-8").partition("\n## The page\n")[2].partition("\n## ")[0]
    promised = set(re.findall(r"`(--[a-z-]+)`", section.partition("| property |")[2].partition("\n\n")[0]))
    assert promised >= {"--accent", "--background", "--font", "--text"}
    for theme in (ROOT / "chatd/static").glob("page/page.css"):
        assert promised - set(re.findall(r"^\s*(--[a-z-]+):", theme.read_text("utf-8"), re.MULTILINE)) == set()
