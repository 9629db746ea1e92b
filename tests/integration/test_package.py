"""The wheel and the editable install, each in an environment of its own."""

import email.policy
import json
import pathlib
import re
import site
import subprocess
import sys
import tomllib
import venv
import zipfile

import pytest
from support.checkouts import copy_checkout
from support.redises import Redis
from support.servers import LONG, ROOT, TWISTD, Raw, Server, environment, numbered, run
from support.workflow_rules import METADATA

WHEEL = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
CARRIED = [ROOT / place for place in WHEEL["only-include"] if place.startswith("scripts/")]
"""The programs outside the package that the wheel carries."""
FOUND = """
import importlib.resources, json, chatd
files = importlib.resources.files("chatd")
print(chatd.__file__)
print(json.loads(files.joinpath("schemas/message.json").read_bytes())["title"])
print(len(json.loads(files.joinpath("seed/messages.json").read_bytes())))
print(files.joinpath("static/index.html").is_file())
"""


def clean():
    """Return the environment without this checkout."""
    return {name: value for name, value in environment().items() if name != "PYTHONPATH"}


def check_run(*command, cwd):
    """Run a command that must not fail; return its output."""
    result = subprocess.run(
        command, cwd=cwd, env=clean(), capture_output=True, text=True, timeout=4 * LONG, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the files that git tracks or would track."""
    folder = copy_checkout(tmp_path_factory.mktemp("package") / "copy")
    assert (folder / "chatd" / "schemas").is_symlink()
    return folder


@pytest.fixture(scope="module")
def wheel(copy):
    """The wheel built from that copy."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    check_run(*pip, "--no-deps", "--no-build-isolation", f"--wheel-dir={copy.parent}", copy, cwd=copy.parent)
    (path,) = copy.parent.glob("*.whl")
    return path


def sums(wheel):
    """Return the check sums of the files in a wheel, by their names."""
    with zipfile.ZipFile(wheel) as archive:
        return {one.filename: one.CRC for one in archive.infolist()}


def make_venv(tmp_path, *what):
    """Return a Python with chatd, by these words for pip, and its dependencies installed."""
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    missing = subprocess.run(
        [python, "-c", "import chatd"], cwd=tmp_path, env=clean(), capture_output=True, check=False
    )
    assert b"No module named 'chatd'" in missing.stderr, "nothing but the installation can bring it here"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check"]
    check_run(*install, "--no-deps", "--no-index", *what, cwd=tmp_path)
    return python


@pytest.fixture(params=["wheel", "editable"])
def installed(request, copy, tmp_path):
    """A Python with chatd and its dependencies installed in both ways."""
    if request.param == "wheel":
        return make_venv(tmp_path, request.getfixturevalue("wheel"))
    return make_venv(tmp_path, "--no-build-isolation", "--editable", copy)


def test_wheel_content(wheel):
    """The wheel has its data, and no file of Twisted's own packages."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
        schema = archive.read("chatd/schemas/message.json")
    assert metadata.startswith(f"Metadata-Version: {METADATA}\n"), "the job that publishes it must read this version"
    assert schema == (ROOT / "schemas" / "message.json").read_bytes()
    static = {str(path.relative_to(ROOT)) for path in (ROOT / "chatd" / "static").rglob("*") if path.is_file()}
    assert (
        names >= static >= {f"chatd/static/{name}" for name in ("index.html", "about.html", "page/boot.js", "chatd.js")}
    )
    assert names >= {"chatd/seed/messages.json", "twisted/plugins/chatd_plugin.py"}
    assert {name for name in names if name.startswith("chatd/scripts/")} == {
        f"chatd/{path.relative_to(ROOT)}" for place in CARRIED for path in [*place.glob("*.py")] or [place]
    }
    modules = {str(path.relative_to(ROOT)) for kind in ("*.py", "*.lua") for path in (ROOT / "chatd").rglob(kind)}
    assert modules <= names
    assert names.isdisjoint({"twisted/__init__.py", "twisted/plugins/__init__.py"})
    kinds = {name.split("/")[0] for name in names}
    assert {kind for kind in kinds if not kind.endswith(".dist-info")} == {"chatd", "twisted"}
    assert not [name for name in names if name.endswith((".pyc", "dropin.cache", ".sqlite"))]


def test_description_has_no_relative_link(wheel):
    """The description is all of README.md but its pictures, and each link in it leads somewhere on a package index."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name), policy=email.policy.default)
    assert metadata["Description-Content-Type"] == "text/markdown"
    text = metadata.get_content()
    parts = re.compile(r"^#.*|^```.*|^\|[^|]*\|", re.MULTILINE)
    assert parts.findall(text) == parts.findall((ROOT / "README.md").read_text("utf-8"))
    assert "\ndocs/compare.md helps to choose" in text, "the words of a link stay"
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)]*)\)|^\[[^]]+\]: *(.*)|(?:src|srcset|href)=\"([^\"]*)\"", outside, re.MULTILINE)
    assert len(targets) > 3
    assert [target for groups in targets for target in groups if target and not target.startswith("https://")] == []


def test_source_distribution_is_the_checkout(copy, wheel, tmp_path):
    """It holds every file that git has, and a wheel built from it has the same files."""
    check_run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", tmp_path, cwd=copy)
    (path,) = tmp_path.glob("chatd-*.tar.gz")
    check_run("tar", "--extract", "--file", path, cwd=tmp_path)
    (made,) = tmp_path.glob("chatd-*/")
    files = {path.relative_to(copy) for path in copy.rglob("*") if path.is_file() and not path.is_symlink()}
    tracked = {path for path in files if "__pycache__" not in path.parts}  # a build compiles its hook
    found = {path.relative_to(made) for path in made.rglob("*") if path.is_file()}
    assert tracked - found == set()
    copies = {pathlib.Path("chatd", path) for path in tracked if path.parts[0] in ("schemas", "seed")}
    assert copies
    assert found - tracked == copies | {pathlib.Path("PKG-INFO")}, "the links of chatd/ are copies here"
    check_run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path, cwd=made)
    (again,) = tmp_path.glob("*.whl")
    assert sums(again) == sums(wheel)


def test_installed_chatd_runs_from_any_folder(installed, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = (installed, TWISTD)
    assert " chatd " in check_run(*command, "--help", cwd=elsewhere)
    helped = run("--help", cwd=elsewhere, env=clean(), command=command)
    assert helped.returncode == 0, helped.stderr
    assert "--listen" in helped.stdout
    file, *found = check_run(installed, "-c", FOUND, cwd=elsewhere).split()
    assert pathlib.Path(file).is_relative_to(tmp_path / "venv") or "copy" in pathlib.Path(file).parts
    assert found == ["Message", "2", "True"]
    with Redis(tmp_path / "redis") as redis:
        for store in ("sqlite:chatd.sqlite", redis.url):
            options = f"--store={store}"
            with Server(elsewhere, options, env=clean(), command=command) as server, Raw(server.port) as client:
                assert numbered(client.join()) == [(1, "Alice", "Hello!"), (2, "Bob", "Hi Alice!")]
    assert all(path.name.startswith("chatd.sqlite") for path in elsewhere.iterdir())


def test_installed_command(installed, tmp_path):
    """The command `chatd` of the installation runs the server, the load, and the programs that are scripts."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    chatd = installed.with_name("chatd")
    assert re.fullmatch(r"chatd \d+\.\d+\.\d+\n", check_run(chatd, "--version", cwd=elsewhere))
    for name in ("serve", "load", "client", "bench", "backup", "restore", "moderate", "erase"):
        text = check_run(chatd, name, "--help", cwd=elsewhere)
        assert text.startswith(f"usage: chatd {name} "), name
        assert not re.search(r"scripts/|python -m", text), name
        wrong = subprocess.run(
            [chatd, name, "--nonsense"], env=clean(), capture_output=True, text=True, timeout=LONG, check=False
        )
        assert wrong.returncode != 0
        assert wrong.stderr.startswith(f"{'chatd' if name == 'serve' else name}: "), wrong.stderr
    assert check_run(chatd, "moderate", "ban", "--help", cwd=elsewhere).startswith("usage: chatd moderate ban ")
    with Server(elsewhere, "--store=sqlite:a.sqlite", env=clean(), command=[chatd], words=["serve"]) as server:
        proof = check_run(chatd, "load", server.url, "--clients=2", "--messages=4", "--json", cwd=elsewhere)
        assert json.loads(proof)["proved"] is True
        copied = check_run(chatd, "backup", "--store=a.sqlite", "b.sqlite", cwd=elsewhere)
        server.stop()
    assert server.epoch in copied
    assert check_run(chatd, "restore", "b.sqlite", "c.sqlite", cwd=elsewhere).startswith("c.sqlite: the log ")


def test_installed_bench(wheel, tmp_path):
    """Outside a checkout it measures the server that is installed beside it."""
    python = make_venv(tmp_path, wheel)
    options = "--clients=2", "--seconds=0.05", "--rounds=1", "--stores=memory:"
    assert " yes" in check_run(python.with_name("chatd"), "bench", *options, cwd=tmp_path)
