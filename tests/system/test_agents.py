"""scripts/agents, which locks the packages of AWS's agents after their signatures were checked.

The server is a folder, and the keys are made here.  AWS's own keys and packages are not tested.
"""

import json
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from http.client import IncompleteRead
from io import BytesIO
from tempfile import TemporaryDirectory

import pytest
from support.booted import succeed
from support.servers import LONG, ROOT, need, program

VERSIONS = {"ssm": "3.3.3270.0", "cloudwatch": "1.300070.0b1453"}
ARCHITECTURES = "arm64", "amd64"


class Signer:
    """A signer with a key of its own; it serves packages from a folder."""

    def __init__(self, folder, name, home):
        self.folder = folder / name
        self.folder.mkdir(parents=True)
        self._home = home
        self.key = folder / f"{name}.asc"
        self.gpg("--passphrase=", "--quick-generate-key", f"{name} <{name}@example.com>", "ed25519", "sign")
        self.key.write_text(self.gpg("--armor", "--export"))

    def gpg(self, *arguments):
        return succeed(need("gpg"), "--homedir", self._home, "--batch", "--no-tty", "--yes", *arguments)

    @property
    def fingerprint(self):
        lines = self.gpg("--with-colons", "--list-keys").splitlines()
        return next(line.split(":")[9] for line in lines if line.startswith("fpr:"))

    def place(self):
        """Return the place of the packages, as the program has it."""
        return f"file://{self.folder}/{{version}}-{{arch}}.deb"

    def sign(self, version, arch, *options):
        """Sign a package, and return its path."""
        path = self.folder / f"{version}-{arch}.deb"
        path.write_text(f"the package for {arch}")
        self.gpg(*options, "--detach-sign", "--output", f"{path}.sig", path)
        return path


@contextmanager
def gpg_home():
    """A folder for gpg, whose agent would outlive the test.  Its path is short, because it holds a Unix socket."""
    with TemporaryDirectory(prefix="gpg-") as home:
        try:
            yield home
        finally:
            subprocess.run(["gpgconf", "--homedir", home, "--kill", "all"], check=False, timeout=LONG)


@pytest.fixture
def signers(tmp_path):
    with ExitStack() as homes:
        yield {name: Signer(tmp_path, name, homes.enter_context(gpg_home())) for name in VERSIONS}


@pytest.fixture
def agents(signers, monkeypatch):
    """The program, with the places of these signers."""
    module = program(ROOT / "scripts" / "agents")
    monkeypatch.setattr(module, "PLACES", {name: signer.place() for name, signer in signers.items()})
    for name, signer in signers.items():
        for arch in ARCHITECTURES:
            signer.sign(VERSIONS[name], arch)
    return module


@pytest.fixture
def run(capsys, monkeypatch):
    """A function that runs the program, and returns its exit status, its output and its errors."""

    def call(module, *arguments):
        monkeypatch.setattr(sys, "argv", ["agents", *map(str, arguments)])
        try:
            code = module.main()
        except SystemExit as ended:
            code = ended.code
        return code, *capsys.readouterr()

    return call


def arguments(signers, *names):
    return [part for name in names for part in (f"--{name}", VERSIONS[name], f"--{name}-key", signers[name].key)]


def test_packages_of_both_architectures_are_locked(agents, signers, run):
    """The output is what scripts/bake reads, with the hashes of the signed files."""
    code, said, told = run(agents, *arguments(signers, *VERSIONS))
    assert code == 0, told
    made = json.loads(said)
    assert {*made} == {*ARCHITECTURES}
    for arch, entries in made.items():
        paths = [signers[name].folder / f"{VERSIONS[name]}-{arch}.deb" for name in VERSIONS]
        sums = [succeed("sha256sum", path).split()[0] for path in paths]
        assert entries == [{"url": f"file://{path}", "sha256": sum_} for path, sum_ in zip(paths, sums, strict=True)]
    assert all(signer.fingerprint in told for signer in signers.values())


def test_one_agent_is_enough(agents, signers, run):
    code, said, _ = run(agents, *arguments(signers, "ssm"))
    assert code == 0
    assert {len(entries) for entries in json.loads(said).values()} == {1}


def change_package(signers):
    (signers["ssm"].folder / f"{VERSIONS['ssm']}-amd64.deb").write_text("another package")


def sign_with_another_key(signers):
    path = signers["ssm"].folder / f"{VERSIONS['ssm']}-amd64.deb"
    signers["cloudwatch"].gpg("--detach-sign", "--output", f"{path}.sig", path)


def empty_signature(signers):
    (signers["ssm"].folder / f"{VERSIONS['ssm']}-amd64.deb.sig").write_bytes(b"")


def expire_key(signers):
    signer = signers["ssm"]
    signer.gpg(
        "--faked-system-time=20200101T000000!", "--passphrase=", "--quick-generate-key", "old", "ed25519", "sign", "1d"
    )
    for arch in ARCHITECTURES:
        signer.sign(VERSIONS["ssm"], arch, "--faked-system-time=20200101T010000!", "--local-user=old")
    signer.key.write_text(signer.gpg("--armor", "--export"))


def no_key(signers):
    signers["ssm"].key.write_text("-----BEGIN PGP PUBLIC KEY BLOCK-----\n")


def no_package(signers):
    (signers["ssm"].folder / f"{VERSIONS['ssm']}-amd64.deb").unlink()


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (change_package, "amd64.deb: the signature is not good (BADSIG): do not use this package"),
        (sign_with_another_key, "the signature is not good (ERRSIG, NO_PUBKEY)"),
        (empty_signature, "the signature is not good"),
        (expire_key, "the signature is not good (EXPKEYSIG"),
        (no_key, "is not a public key of OpenPGP"),
        (no_package, "No such file"),
    ],
)
def test_bad_package_is_refused(agents, signers, run, fault, reason):
    """Nothing is printed that scripts/bake could use."""
    fault(signers)
    code, said, told = run(agents, *arguments(signers, *VERSIONS))
    assert (code, said) == (1, "")
    assert reason in told.splitlines()[-1]


def test_package_that_ends_early_is_refused(agents, signers, run, monkeypatch):
    """A connection that ends within a package is a failure of one line."""

    class Cut(BytesIO):
        def read(self, *_):
            raise IncompleteRead(b"the", 20)

    monkeypatch.setattr(agents.urllib.request, "urlopen", lambda *_, **__: Cut())
    code, said, told = run(agents, *arguments(signers, "ssm"))
    assert (code, said) == (1, "")
    assert "arm64.deb: IncompleteRead(3 bytes read, 20 more expected)" in told.splitlines()[-1]


def test_program_without_the_check_is_found(agents, signers, run, monkeypatch):
    """The negative control: without the check of the status, a changed package would be locked."""
    monkeypatch.setattr(agents, "check", lambda *_: "nobody")
    change_package(signers)
    code, _, _ = run(agents, *arguments(signers, *VERSIONS))
    assert code == 0


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ([], "no agent: use --ssm or --cloudwatch"),
        (["--ssm", "latest"], "'latest' is not a version"),
        (["--ssm", "3.3.3270.0"], "--ssm needs --ssm-key"),
        (["--cloudwatch", "1.300069.2b1", "--cloudwatch-key", "k"], "cannot read the journal: use 1.300070.0 or later"),
    ],
)
def test_wrong_usage(run, given, reason):
    code, _, told = run(program(ROOT / "scripts" / "agents"), *given)
    assert code == 2
    assert reason in told


def test_missing_gpg(agents, signers, run, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    code, _, told = run(agents, *arguments(signers, "ssm"))
    assert code == 1
    assert "install GnuPG" in told


def test_places_are_those_of_the_page():
    """docs/image.md shows the same URLs, and AWS's own hosts serve them."""
    page = (ROOT / "docs" / "image.md").read_text()
    for place in program(ROOT / "scripts" / "agents").PLACES.values():
        assert place.format(version="VERSION", arch="arm64") in page
        assert place.startswith("https://")
