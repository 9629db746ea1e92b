"""scripts/check, scripts/test and scripts/serve: the arguments that they pass on, in a checkout of doubles."""

import os
import shutil
import subprocess
import sys

import pytest
from support.needs import ROOT
from support.servers import LONG

ECHO = '#!/bin/sh\necho "$(basename "$0")" "$@"\n'


@pytest.fixture
def checkout(tmp_path):
    """A checkout whose programs print their arguments, and which lacks Redis."""
    root = tmp_path / "checkout"
    for folder in ("scripts", "tests/support", "tests/unit/room"):
        (root / folder).mkdir(parents=True)
    bin_ = tmp_path / "installed" / "bin"
    bin_.mkdir(parents=True)
    (root / ".venv").symlink_to(bin_.parent)  # so that scripts/venv installs nothing
    for name in ("check", "serve", "test", "venv"):
        shutil.copy(ROOT / "scripts" / name, root / "scripts")
    shutil.copy(ROOT / "tests/support/needs.py", root / "tests/support")
    for name in ("pytest", "ruff", "mypy", "twistd"):
        program = bin_ / name
        program.write_text(ECHO)
        program.chmod(0o755)
    (bin_ / "python").symlink_to(sys.executable)
    return root


def run(command, *arguments, path=os.defpath, code=0):
    done = subprocess.run(
        [command, *arguments],
        env={"PATH": str(path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LONG,
        check=False,
    )
    assert done.returncode == code, done.stdout
    return done.stdout


@pytest.mark.parametrize(
    ("arguments", "selected"),
    [
        ([], ["tests/unit"]),
        (["-x"], ["-x", "tests/unit"]),
        (["-k", "resume"], ["-k", "resume", "tests/unit"]),
        (["tests/unit/room"], ["tests/unit/room"]),
        (["tests/unit/room::test_join", "-x"], ["tests/unit/room::test_join", "-x"]),
    ],
)
def test_check_runs_unit_tests_unless_told_otherwise(checkout, arguments, selected):
    """Options alone select no tests, and pytest would then run all of them."""
    *_, pytest_ = run(checkout / "scripts/check", *arguments).splitlines()
    assert pytest_.split() == ["pytest", "--quiet", "--numprocesses=auto", "--dist=worksteal", *selected]


def bare(folder, *names):
    """Return a folder with the few programs that the scripts need, and a Python under each of these names."""
    folder.mkdir()
    for name in ("sh", "dirname", "basename", "readlink"):
        (folder / name).symlink_to(shutil.which(name))
    for name in names:
        (folder / name).symlink_to(sys.executable)
    return folder


def test_coverage_is_not_enforced_without_redis(checkout, tmp_path):
    """The Redis store cannot be covered then; the run says so, and passes."""
    text = run(checkout / "scripts/test", path=bare(tmp_path / "bin", "python3"))
    assert text.startswith("This machine lacks these tools")
    assert "Coverage is not enforced" in text
    assert text.splitlines()[-1].endswith("--cov --cov-report=term --cov-fail-under=0")


def test_coverage_is_enforced_with_redis(checkout, tmp_path):
    folder = bare(tmp_path / "bin", "python3")
    (folder / "redis-server").symlink_to(shutil.which("true"))
    text = run(checkout / "scripts/test", path=folder)
    assert "Coverage is not enforced" not in text
    assert text.splitlines()[-1].endswith("--cov --cov-report=term")


def test_python_may_have_another_name(checkout, tmp_path):
    """scripts/test asks the Python that scripts/venv chooses for the list of tools."""
    text = run(checkout / "scripts/test", "-x", path=bare(tmp_path / "bin", "python3.13"))
    assert text.startswith("This machine lacks these tools")
    assert text.splitlines()[-1] == "pytest -x"


def test_no_python(checkout, tmp_path):
    """The remedy is the only line."""
    text = run(checkout / "scripts/test", path=bare(tmp_path / "bin"), code=1)
    assert text == "chatd needs Python 3.11 or newer: install it and run this again\n"


def test_serve_through_a_link(checkout, tmp_path):
    link = tmp_path / "serve"
    link.symlink_to(checkout / "scripts/serve")
    assert run(link, "--ping=9").splitlines() == ["twistd --nodaemon --pidfile= chatd --ping=9"]
