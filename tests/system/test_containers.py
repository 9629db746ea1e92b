"""The image of the Dockerfile, built and run, and the services of compose.yaml in networks of their own.

tests/support/containers.py states what stands for Docker.  HAProxy and Valkey are those of this machine, with the
configuration and the command line of compose.yaml, and names come from a name server of Twisted.
"""

import contextlib
import json
import os
import re
import subprocess
import sys

import pytest
import yaml
from support import kubernetes_schemas
from support.booted import succeed
from support.container_rules import COMPOSE, MANIFEST, PORT, haproxy_of, pod, seconds, variables
from support.containers import Container, built
from support.go_tools import go_tool
from support.instances import Host
from support.redises import BINARY
from support.servers import LONG, TWISTD, Lines, missing, need, numbered, post

HOME = "/var/lib/chatd"
STOP = 10
"""Seconds after which `docker stop` kills."""


def test_haproxy_accepts_its_configuration(tmp_path):
    (tmp_path / "haproxy.cfg").write_text(haproxy_of(yaml.safe_load(COMPOSE.read_text())))
    succeed(need("haproxy"), "-c", "-f", tmp_path / "haproxy.cfg")


def compose_spec(folder, text):
    """Return what the parser of Docker Compose makes of a compose file, and what it reports."""
    (folder / "compose.yaml").write_text(text)
    command = [go_tool("compose"), "-format=json", "compose.yaml"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=LONG, check=False)
    return json.loads(result.stdout) if result.returncode == 0 else None, result.stdout + result.stderr


def test_compose_accepts_its_file(tmp_path):
    """The library of Docker Compose reads what the rules read."""
    model, said = compose_spec(tmp_path, COMPOSE.read_text())
    assert model is not None, said
    whole = yaml.safe_load(COMPOSE.read_text())
    assert model["services"].keys() == whole["services"].keys()
    assert model["configs"]["haproxy"]["content"] == haproxy_of(whole)
    assert [port["host_ip"] for port in model["services"]["haproxy"]["ports"]] == ["127.0.0.1"]
    assert {model["services"][f"chatd-{number}"]["stop_grace_period"] for number in (1, 2, 3)} == {"45s"}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("stop_grace_period:", "stop_grace:"),
        ("    content: |", "    contents: |"),
        ("chatd-1: { condition: service_healthy }", "chatd-1: { condition: healthy }"),
        ("ulimits: { nofile: 20000 }", "ulimits: 20000"),
        ("[CMD, valkey-cli, -e, ping]", "{ cmd: ping }"),
    ],
)
def test_compose_refuses_a_mistake(tmp_path, old, new):
    """It looks at the form of the file alone, not at the names in it: the rules do that."""
    text = COMPOSE.read_text()
    assert old in text
    model, said = compose_spec(tmp_path, text.replace(old, new))
    assert model is None
    assert said


@pytest.mark.parametrize("version", [0, -1], ids=["oldest", "newest"])
def test_manifest_fits_the_schemas(version):
    """Each document of docs/kubernetes.yaml has only fields that Kubernetes knows, with values of their types."""
    name = kubernetes_schemas.versions()[version]
    documents = [*yaml.safe_load_all(MANIFEST.read_text())]
    assert len(documents) == 5
    assert kubernetes_schemas.faults(name, documents) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("terminationGracePeriodSeconds:", "terminationGraceSeconds:"),
        ("replicas: 3", 'replicas: "three"'),
        ("periodSeconds: 2", "period: 2"),
        ("maxUnavailable: 1", "atMost: 1"),
        ("targetPort:", "target:"),
        ("kind: PodDisruptionBudget", "kind: Deployment"),
    ],
)
def test_mistake_in_the_manifest_is_found(old, new):
    text = MANIFEST.read_text()
    assert old in text
    name = kubernetes_schemas.versions()[-1]
    assert kubernetes_schemas.faults(name, yaml.safe_load_all(text.replace(old, new))) != []


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    with built(tmp_path_factory.mktemp("image")) as image:
        yield image


@pytest.fixture
def host():
    with Host() as host:
        yield host


@pytest.fixture
def volume(tmp_path):
    """A folder as Docker makes a volume: with the owner and the mode of the folder in the image."""
    folder = tmp_path / "volume"
    folder.mkdir(mode=0o700)
    os.chown(folder, 10001, 10001)
    return folder


@pytest.mark.whole
def test_image_contains_the_environment_alone(image):
    """No pip, no source and no lock is in it beside the base, and nothing can be written by the server's user."""
    opt = image.root / "opt"
    assert [path.name for path in opt.iterdir()] == ["chatd"]
    packages = next(opt.glob("chatd/lib/python*/site-packages"))
    assert not (packages / "pip").exists()
    assert (packages / "twisted/plugins/dropin.cache").exists()
    assert not (image.root / "src").exists()
    assert not (image.root / "wheel").exists()
    assert {path.stat().st_uid for path in opt.rglob("*") if not path.is_symlink()} == {0}
    folder = (image.root / HOME[1:]).stat()
    assert (folder.st_uid, folder.st_mode & 0o777) == (10001, 0o700)


@pytest.mark.whole
def test_container_serves_and_stops(image, host, volume):
    """It serves from a read-only root without root's rights, and ends by itself before `docker stop` kills it."""
    volumes = {HOME: volume}
    with Container(image, host, volumes=volumes) as one:
        one.ready()
        assert one.healthy()
        status = one.execute("cat", "/proc/1/status").stdout
        assert re.search(r"^Uid:\s+10001\s", status, re.MULTILINE)
        assert re.search(r"^CapEff:\s+0+$", status, re.MULTILINE)
        assert one.execute("touch", "/opt/chatd/x", "/tmp/x").returncode != 0
        with host.connect(PORT) as client:
            client.join()
            client.send(post("ann", "hello"))
            assert numbered(client.json()) == [(3, "ann", "hello")]
            copied = one.execute("chatd", "backup", f"{HOME}/copy.sqlite")
            assert "messages: 3" in copied.stdout, copied.stderr
            assert one.stop(STOP) == 0
            assert client.closed() == 1012
        assert "stopped" in one.log.text
        assert "Traceback" not in one.log.text
        assert "plugin cache" not in one.log.text
    with Container(image, host, volumes=volumes) as again:
        again.ready()
        with host.connect(PORT) as client:
            assert numbered(client.join())[-1] == (3, "ann", "hello")


@pytest.mark.whole
def test_container_takes_commands(image, host, volume):
    """`docker run IMAGE COMMAND` runs each program; a fault is one line and status 1."""
    with Container(image, host, "--version") as one:
        assert one.wait() == 0
    assert one.log.text.startswith("chatd ")
    with Container(image, host, "serve", "--history=0", volumes={HOME: volume}) as one:
        assert one.wait() == 1
    assert one.log.text == "chatd: --history: '0' is not a whole number from 1 to 10000"
    with Container(image, host, "check", volumes={HOME: volume}) as one:
        assert one.wait() == 0, one.log.text


class Composition:
    """The services of compose.yaml, each on a network of its own; a context manager."""

    def __init__(self, stack, image, folder):
        self._stack, self._image, self._folder = stack, image, folder
        self._whole = yaml.safe_load(COMPOSE.read_text())
        self.hub = stack.enter_context(Host())
        self.hub.bridge()
        self._addresses = {}
        self.nodes = {}

    def _host(self, name):
        """Return a new network for a service, whose name leads there from now on, as Docker's name server does."""
        host = self._stack.enter_context(Host(self.hub))
        self._addresses[name] = host.address
        self.names = "".join(f"{address} {name}\n" for name, address in self._addresses.items())
        (self._folder / "names").write_text(self.names)
        return host

    def _run(self, host, *command):
        process = host.run(*command, cwd=self._folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return Lines(process.stdout)

    def valkey(self, *more, name="valkey"):
        """Start this machine's Valkey or Redis with the command of the compose file, and more words."""
        _, *words = self._whole["services"]["valkey"]["command"]
        host = self._host(name)
        # The image of Valkey listens on every address.
        own = "--bind", host.address, "--protected-mode", "no"
        self._run(host, BINARY, *own, *words, *more).wait("Ready to accept connections")

    def node(self, name):
        """Start a node, or start it again, with another address, as `docker compose up --force-recreate` does."""
        service = self._whole["services"][name]
        place, _, options = service["tmpfs"].partition(":")
        host = self._host(name)
        node = Container(
            self._image,
            host,
            environment=service["environment"],
            tmpfs={place: options},
            names=self.names,
            files=service["ulimits"]["nofile"],
        )
        self.nodes[name] = self._stack.enter_context(node).ready()
        assert self.nodes[name].healthy()

    def haproxy(self):
        """Start HAProxy and its name server; return its lines."""
        host = self._host("haproxy")
        dns = "dns", f"--hosts-file={self._folder / 'names'}", "--port=53", "--interface=127.0.0.11"
        self._run(host, sys.executable, TWISTD, "-n", "--pidfile=", *dns).wait("DNSDatagramProtocol starting on 53")
        (self._folder / "haproxy.cfg").write_text(haproxy_of(self._whole))
        self.url = f"ws://{host.address}:{PORT}/"
        return self._run(host, need("haproxy"), "-db", "-f", self._folder / "haproxy.cfg")

    def grace(self, name):
        """Return the seconds after which Docker kills a service."""
        return seconds(self._whole["services"][name]["stop_grace_period"])


@pytest.mark.whole
def test_composition_loses_nothing(image, tmp_path):
    """Behind HAProxy one node is replaced and another one is killed, and every client gets every message once."""
    if BINARY is None:
        missing("there is no Redis")
    with contextlib.ExitStack() as stack:
        compose = Composition(stack, image, tmp_path)
        compose.valkey()
        for number in (1, 2, 3):
            compose.node(f"chatd-{number}")
        haproxy = compose.haproxy()
        haproxy.wait(r"nodes/chatd-\d.* is UP", count=3)
        load = compose.hub.run(
            *(sys.executable, "-m", "chatd.load", compose.url, "--json", "--cut=0"),
            *("--clients=60", "--rate=40", "--seconds=60"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        Lines(load.stderr).wait("%")
        assert compose.nodes["chatd-1"].stop(compose.grace("chatd-1")) == 0
        assert "drained" in compose.nodes["chatd-1"].log.text
        compose.node("chatd-1")
        haproxy.wait("chatd-1 changed its IP", count=2)
        compose.nodes["chatd-2"].kill()
        haproxy.wait("nodes/chatd-2 is DOWN")
        compose.node("chatd-2")
        out, _ = load.communicate(timeout=2 * LONG)
        report = json.loads(out)
        assert report["proved"] is True, report
        assert report["came_back"] > 0


@pytest.mark.whole
def test_pod_lives_while_its_store_is_away(image, host, volume):
    """A pod that waits for its store at the start gets no clients, and its livenessProbe does not kill it."""
    _, container = pod(MANIFEST.read_text())
    environment = variables(container) | {"CHATD_STORE": "redis://127.0.0.1:6379/0"}
    environment.pop("CHATD_STORE_PASSWORD_FILE")
    with Container(image, host, environment=environment, volumes={HOME: volume}) as one:
        one.log.wait("cannot be reached")
        probe = one.execute(*container["livenessProbe"]["exec"]["command"])
        assert probe.returncode == 0, probe.stderr
        assert not one.healthy(), "the readinessProbe asks as the health check does"
        assert one.stop(STOP) == 0


@pytest.mark.whole
def test_pod_drains_before_it_stops(image, tmp_path, volume):
    """The preStop hook starts the drain, which still accepts clients, and the pod ends within its grace period."""
    if BINARY is None:
        missing("there is no Redis")
    specification, container = pod(MANIFEST.read_text())
    environment = variables(container)
    (secret := tmp_path / "secret").mkdir()
    (secret / "password").write_text("word\n")
    os.chown(secret / "password", 0, 10001)
    (secret / "password").chmod(0o440)
    with contextlib.ExitStack() as stack:
        compose = Composition(stack, image, tmp_path)
        compose.valkey("--requirepass", "word", name="chatd-store")
        host = stack.enter_context(Host(compose.hub))
        volumes = {HOME: volume, "/etc/chatd": secret}
        one = stack.enter_context(
            Container(image, host, environment=environment, volumes=volumes, names=compose.names)
        ).ready()
        hook = one.execute(*container["lifecycle"]["preStop"]["exec"]["command"])
        assert hook.returncode == 0, hook.stderr
        one.log.wait("draining")
        assert not one.healthy()
        client = stack.enter_context(host.connect(PORT))
        client.join()
        assert one.stop(specification["terminationGracePeriodSeconds"]) == 0
        assert client.closed() == 1012
