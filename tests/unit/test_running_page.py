"""docs/running.md: each way to run chatd has its first commands, and they name programs and files that exist."""

import re
import shlex

import pytest
from support.needs import ROOT

from chatd.__main__ import PROGRAMS

PAGE = ROOT / "docs" / "running.md"
OTHERS = {"pipx", "cp", "systemctl", "docker", "kubectl"}
"""Programs that are not chatd's."""


def ways(text):
    """Return the first commands of each section, by the anchor of the section."""
    found = {}
    for heading, body in re.findall(r"^## (.+)\n((?:(?!^## ).*\n?)*)", text, re.MULTILINE):
        (block,) = re.findall(r"^```sh\n(.*?)^```$", body, re.MULTILINE | re.DOTALL)
        found[heading.lower().replace(" ", "-")] = [shlex.split(line) for line in block.splitlines()]
    return found


def faults(text):
    """Return what is wrong with a page."""
    found = []
    commands = ways(text)
    rows = re.findall(r"^\| \[[^\]]+\]\(#([a-z-]+)\)", text, re.MULTILINE)
    if rows != [*commands]:
        found.append("the table names other ways than the sections")
    for way, lines in commands.items():
        if len(lines) != 2:
            found.append(f"{way}: it has not two commands")
        for program, *words in lines:
            if program == "chatd" and words[0] not in PROGRAMS:
                found.append(f"{way}: there is no chatd {words[0]}")
            elif program.startswith("scripts/") and not (ROOT / program).exists():
                found.append(f"{way}: there is no {program}")
            elif program not in OTHERS | {"chatd"} and not program.startswith("scripts/"):
                found.append(f"{way}: {program} is unknown")
            here = [word for word in words if re.match(r"(docs|packer)/", word)]
            found += [f"{way}: there is no {word}" for word in here if not (ROOT / word).exists()]
    return found


def test_page_holds():
    """The README leads to the page."""
    assert faults(PAGE.read_text()) == []
    assert len(ways(PAGE.read_text())) == 5
    assert "](docs/running.md)" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("](#aws)", "](#amazon)", "the table names other ways than the sections"),
        ("pipx install .\n", "", "a-laptop: it has not two commands"),
        ("chatd serve\n", "chatd run\n", "a-laptop: there is no chatd run"),
        ("scripts/deploy verify", "scripts/verify", "aws: there is no scripts/verify"),
        ("pipx install .", "pip3 install .", "a-laptop: pip3 is unknown"),
        ("packer/files/chatd.socket ", "packer/chatd.socket ", "one-server: there is no packer/chatd.socket"),
        ("docs/kubernetes.yaml\n", "docs/k8s.yaml\n", "kubernetes: there is no docs/k8s.yaml"),
    ],
)
def test_fault_of_the_page_is_found(old, new, fault):
    text = PAGE.read_text()
    assert old in text
    assert fault in faults(text.replace(old, new))
