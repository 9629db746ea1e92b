"""README's two commands on a new machine: bare Debian, an ordinary user, an empty home, and no compiler."""

import ast
import contextlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from support.booted import bootable, kept, succeed
from support.checkouts import copy_checkout
from support.needs import ROOT, need
from support.servers import LONG, Lines, numbered
from websockets.sync.client import connect

PACKAGES = "python3,python3-venv,git,ca-certificates"
UID = 1000
USER = f'echo "ann:x:{UID}:{UID}::/home/ann:/bin/sh" >>"$1/etc/passwd" && mkdir "$1/home/ann"'
REGISTRY = ("index-url", "extra-index-url", "trusted-host", "proxy", "cert", "client-cert", "default-timeout")
"""What pip must know to reach the package registry of this machine, by its own names."""
INHERITED = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
SECONDS = 10 * LONG


def debian(suite):
    """Return the folder of a bare Debian with an ordinary user, made once."""
    command = [need("mmdebstrap"), "--quiet", "--variant=essential", f"--include={PACKAGES}"]
    command += [f"--customize-hook={USER}", suite]
    return bootable(lambda: kept(f"fresh-{suite}", lambda folder: succeed(*command, folder), PACKAGES, USER))


def registry():
    """Return the environment with which pip on another machine reaches the package registry that pip reaches here."""
    listed = succeed(sys.executable, "-m", "pip", "config", "list")
    found = {}
    for name, text in re.findall(r"^\S*?\.([a-z-]+)=(.*)$", listed, re.MULTILINE):
        if name in REGISTRY:
            found[f"PIP_{name.upper().replace('-', '_')}"] = ast.literal_eval(text)
    found |= {name: os.environ[name] for name in INHERITED if name in os.environ}
    return found, {value for name, value in found.items() if name in ("PIP_CERT", "PIP_CLIENT_CERT")}


class Fresh:
    """A machine with nothing but Python and git, on this machine's network, and a checkout in its user's home."""

    def __init__(self, name, root, home):
        self.name = name
        alone = () if pathlib.Path("/run/systemd/system").is_dir() else ("--keep-unit",)
        environment, files = registry()
        succeed(need("git"), "init", "--quiet", copy_checkout(home / "chatd"))
        for path in (home, *home.rglob("*")):
            os.chown(path, UID, UID, follow_symlinks=False)
        self.checkout = home / "chatd"
        self._command = [
            *(need("systemd-nspawn"), "--quiet", "--register=no", *alone, f"--directory={root}", "--volatile=overlay"),
            *("--resolv-conf=bind-host", "--bind-ro=/etc/hosts", f"--bind={home}:/home/ann"),
            *(f"--bind-ro={path}" for path in files),
            *(f"--setenv={name}={value}" for name, value in environment.items()),
            *("--user=ann", "--chdir=/home/ann/chatd", "--pipe"),
        ]

    @contextlib.contextmanager
    def start(self, *command):
        """Start a command in the checkout; gives its lines, and kills it at the end."""
        with subprocess.Popen(
            [*self._command, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            lines = Lines(process.stdout)
            try:
                yield process, lines
            finally:
                process.terminate()
                process.wait(LONG)
                lines.close()

    def run(self, *command, seconds=SECONDS):
        """Run a command in the checkout, which must succeed; returns what it printed."""
        with self.start(*command) as (process, lines):
            code = process.wait(seconds)
            lines.close()
        assert code == 0, lines.text
        return lines.text


DEBIANS = {"bookworm": "enforced", "trixie": "not enforced"}
"""Whether the coverage is enforced: PyPI has a Redis for the Python of Debian 12, and none for that of Debian 13."""


@pytest.fixture(scope="module", params=DEBIANS)
def fresh(request, tmp_path_factory):
    """A machine of each Debian whose Python chatd supports."""
    root = debian(request.param)
    home = tmp_path_factory.mktemp(request.param) / "home"
    home.mkdir()
    yield Fresh(request.param, root, home)
    shutil.rmtree(home)


def test_serve(fresh):
    """scripts/serve says what it installs, then the URL, and serves there."""
    with fresh.start("scripts/serve", "--listen=tcp:0", "--admin=") as (_, lines):
        url = lines.wait(r"Open http://(localhost:\d+/)$", seconds=SECONDS)[0][1]
        steps = [line for line in lines if line.startswith(("Making", "Installing"))]
        assert [step.split()[1] for step in steps] == [".venv", "requirements.txt", "requirements-build.txt", "chatd"]
        with connect(f"ws://{url}", proxy=None) as room:
            assert json.loads(room.recv(LONG))["type"] == "history"
            room.send('{"username":"ann","message":"hi"}')
            assert numbered(json.loads(room.recv(LONG))) == [(3, "ann", "hi")]


def test_readme_commands(fresh):
    """The programs that README names run as printed, once scripts/serve has installed them."""
    assert "--store" in fresh.run("scripts/serve", "--help")
    assert "--store" in fresh.run(".venv/bin/chatd", "check", "--help")
    assert "--posters" in fresh.run(".venv/bin/chatd", "load", "--help")
    assert "moderate" in fresh.run(".venv/bin/chatd", "--help")


def test_install(fresh):
    """The commands of the chapter "Install" build the wheel and install the server, in a folder of the user's own."""
    text = (ROOT / "docs" / "operations.md").read_text("utf-8")
    chapter = re.search(r"^## Install\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)[1]
    build, install = re.findall(r"^```sh\n(.*?)^```$", chapter, re.MULTILINE | re.DOTALL)
    fresh.run("sh", "-euxc", build)
    there = install.replace("/opt/chatd", "~/opt/chatd")
    help_ = "~/opt/chatd/bin/twistd -n chatd --help && ~/opt/chatd/bin/chatd backup --help"
    text = fresh.run("sh", "-euxc", f"mkdir ~/opt && cp requirements.txt dist && cd dist\n{there}\n{help_}")
    assert "--store" in text


@pytest.mark.whole
def test_pipx(fresh):
    """pipx installs the wheel with what PyPI has now, and runs its command, also in an environment for one run."""
    fresh.run("sh", "-euxc", "python3 -m venv ~/pipx && ~/pipx/bin/pip install --quiet pipx")
    text = fresh.run("sh", "-euxc", "~/pipx/bin/pipx run --spec . chatd --version && ~/pipx/bin/pipx install .")
    assert re.search(r"^chatd \d+\.\d+\.\d+$", text, re.MULTILINE)
    with fresh.start("sh", "-c", "exec ~/.local/bin/chatd serve --listen=tcp:0 --admin=") as (_, lines):
        url = lines.wait(r"Open http://(localhost:\d+/)$")[0][1]
        with connect(f"ws://{url}", proxy=None) as room:
            assert json.loads(room.recv(LONG))["type"] == "history"


def test_test(fresh):
    """scripts/test lists first what the machine lacks, and needs nothing but Python."""
    text = fresh.run("scripts/test", "tests/unit/room", "-q")
    first, *rest = text.splitlines()
    assert first.startswith("This machine lacks these tools")
    listed = {line.split()[0] for line in rest if line.startswith("  ")}
    assert {"root", "node", "mmdebstrap"} <= listed
    assert "git" not in listed
    assert re.search(r"^\d+ passed", text, re.MULTILINE)


@pytest.mark.whole
def test_whole_suite(fresh):
    """scripts/test passes as README prints it, without options, for an ordinary user who has nothing but Python."""
    text = fresh.run("scripts/test", seconds=3 * SECONDS)
    assert re.search(r"^=+ \d{4,} passed, \d+ skipped", text, re.MULTILINE), text
    assert ("Coverage is not enforced" in text) == (DEBIANS[fresh.name] == "not enforced")
