"""The baked image: its contents, its boot, its service and drain, and what keeps it out of service.

The image comes from a whole bake (tests/support/cloud.py) and boots unchanged: under systemd-nspawn on networks that
the test makes, and once with its own kernel under qemu.
"""

import contextlib
import json
import re
import subprocess
import sys
import time

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from support import imds
from support.booted import nspawn, succeed
from support.cloud import AGENT, FOLDER, NOTHING_LEFT, REGION, UPGRADED, request_faults
from support.imds import FILES, GROUP, TARGET_GROUP
from support.instances import Host, boot, surroundings
from support.servers import LONG, ROOT, Lines, need, numbered, post, upgrade

import chatd

SEED = [(1, "Alice", "Hello!"), (2, "Bob", "Hi Alice!")]
SOON = 15
"""Within how many seconds an instance is to serve."""
EXPOSURE = 2.0
PARAMETER = "/chatd/store"
USER_DATA = f"CHATD_STORE_PARAMETER={PARAMETER}\nCHATD_GROUP={GROUP}\nCHATD_TARGET_GROUP={TARGET_GROUP}\n"
LAUNCH, TERMINATE = "chatd-launch", "chatd-terminate"
UNITS = "/usr/lib/systemd/system"


# The bake


def test_bake_leaves_only_the_image(baked):
    (image,) = baked.made["images"]
    assert (image["architecture"], image["region"]) == ("amd64", REGION)
    assert request_faults(baked.account) == []
    assert baked.account.denied == []
    (snapshot,) = baked.left["snapshots"]
    assert baked.left == NOTHING_LEFT | {"images": [image["image"]], "snapshots": [snapshot]}
    assert baked.tags == {
        "Name": f"chatd-{chatd.__version__}",
        "chatd:version": chatd.__version__,
        "chatd:git-sha": baked.made["git_sha"],
        "chatd:base-image": "ami-amd640debian13",
        "chatd:base-name": "debian-13-amd64-20260912-2000",
        "chatd:built": baked.made["built"],
    }
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", baked.made["git_sha"])


def test_smoke_test_covers_both_units(baked):
    assert len(re.findall(rf"(?m): chatd/{re.escape(chatd.__version__)}$", baked.told)) == 2


# Contents

KEYS = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----|AKIA[0-9A-Z]{16}|rediss?://[^\s/@]*:[^\s/@]+@[^\s/]*\.")
OWN = ("etc", "root", "home", "opt/chatd/bin", "var", "srv", "usr/lib/systemd", "usr/share/chatd")
"""Folders that could hold files of the builder or ours; the rest are packages of Debian and wheels."""


def faults(root):
    """Return the files of an image that should not exist, or are not as they should be."""
    found = [
        *root.glob("etc/ssh/ssh_host_*"),
        *root.glob("home/*/.ssh/authorized_keys"),
        *root.glob("root/.ssh/authorized_keys"),
        *root.glob("root/.*_history"),
        *root.glob("home/*/.*_history"),
        *root.glob("var/lib/private/chatd*"),
        *root.glob("var/lib/chatd*"),
        *root.glob("var/lib/systemd/random-seed"),
        *root.glob("tmp/*"),
        *root.glob("etc/chatd/*.env"),
        *(path for path in root.rglob("var/log/**/*") if path.is_file() and not path.is_symlink()),
    ]
    if (root / "etc" / "machine-id").read_text():
        found.append(root / "etc" / "machine-id")
    for folder in OWN:
        files = (path for path in (root / folder).rglob("*") if path.is_file() and not path.is_symlink())
        found += [path for path in files if KEYS.search(path.read_bytes())]
    cached = root.glob("opt/chatd/lib/python3.*/site-packages/twisted/plugins/dropin.cache")
    if [(path.stat().st_uid, path.stat().st_mode & 0o022) for path in cached] != [(0, 0)]:
        found.append(root / "opt" / "chatd")
    return sorted({str(path.relative_to(root)) for path in found})


PRIVATE = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEA\n"


def test_image_has_no_secrets_state_or_logs(baked):
    assert faults(baked.root) == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("etc/ssh/ssh_host_ed25519_key", PRIVATE),
        ("home/admin/.ssh/authorized_keys", "ssh-ed25519 AAAA"),
        ("root/.ssh/id_ed25519", PRIVATE),
        ("root/.bash_history", "ls"),
        ("etc/chatd/chatd.env", "CHATD_STORE=sqlite:x"),
        ("srv/settings", "url=rediss://chatd:hunter2@redis.internal:6379/0"),
        ("srv/settings", "aws_access_key_id = AKIAIOSFODNN7EXAMPLE"),
        ("var/lib/private/chatd/chatd.sqlite", "SQLite"),
        ("var/log/journal/0/system.journal", "LPKSHHRH"),
        ("etc/machine-id", "0123456789abcdef0123456789abcdef\n"),
        ("tmp/bundle.tar", ""),
    ],
)
def test_planted_file_is_detected(baked, path, text):
    planted = baked.root / path
    before = planted.read_bytes() if planted.exists() else None
    made = [folder for folder in planted.parents if not folder.exists()]
    planted.parent.mkdir(parents=True, exist_ok=True)
    try:
        planted.write_text(text)
        assert [fault for fault in faults(baked.root) if path.startswith(fault)]
    finally:
        planted.unlink()
        for folder in made:
            folder.rmdir()
        if before is not None:
            planted.write_bytes(before)


def told(root, command):
    """Run a command in a machine of the image and return its output."""
    return succeed(*nspawn(root), "sh", "-ec", command)


def differences(root, first="true"):
    """Return the components by which the lists in an image differ from the installation, after a command."""
    script = (
        f"{{ {first}; }} >/dev/null 2>&1; /opt/chatd/bin/pip --disable-pip-version-check list --format=json; echo; "
        "dpkg-query --show --showformat='${Package}\\t${Version}\\t${Architecture}\\n'"
    )
    installed, _, packages = told(root, script).partition("\n")
    listed = json.loads((root / "usr" / "share" / "chatd" / "sbom.cdx.json").read_text())
    components = [listed["metadata"]["component"], *listed["components"]]
    python = {(re.sub(r"[-_.]+", "-", one["name"]).lower(), one["version"]) for one in json.loads(installed)}
    debian = (root / "usr" / "share" / "chatd" / "packages.tsv").read_text()
    names = {(one["name"], one["version"]) for one in components}
    return (python ^ names) | ({*packages.strip().splitlines()} ^ {*debian.strip().splitlines()})


def test_component_lists_match_the_image(baked):
    assert differences(baked.root) == set()


def test_component_lists_reveal_changes(baked):
    remove = f"/opt/chatd/bin/pip uninstall --quiet --yes attrs; dpkg --purge {AGENT}"
    assert {one if isinstance(one, str) else one[0] for one in differences(baked.root, remove)} == {
        f"{AGENT}\t1\tall",
        "attrs",
    }


PINNED = r"(?m)^([a-z0-9-]+)(?:\[.*\])?==\S+ (; .* )?\\\n((?: +--hash=.*\n)+)"
"""A pinned package in a lock file: its name, its marker and its hashes."""


def test_sbom_is_cyclonedx_with_locked_hashes(baked):
    text = (baked.root / "usr" / "share" / "chatd" / "sbom.cdx.json").read_text()
    validator = JsonStrictValidator(SchemaVersion.V1_6)
    assert validator.validate_str(text) is None
    assert validator.validate_str(text.replace('"SHA-256"', '"SHA-255"', 1)) is not None
    listed = json.loads(text)
    assert listed["metadata"]["component"]["version"] == chatd.__version__
    locks = (ROOT / "requirements.txt").read_text() + (ROOT / "packer" / "requirements.txt").read_text()
    locked = {
        name: {*re.findall(r"sha256:([0-9a-f]{64})", hashes)}
        for name, marker, hashes in re.findall(PINNED, locks)
        if "== 'PyPy'" not in marker and "!= 'CPython'" not in marker
    }
    held = {component["name"]: component for component in listed["components"]}
    assert held.keys() - {"pip"} == locked.keys()
    assert {name for name in locked if held[name]["hashes"][0]["content"] not in locked[name]} == set()


def test_image_does_not_update_itself(baked):
    packages = (baked.root / "usr" / "share" / "chatd" / "packages.tsv").read_text()
    assert "unattended-upgrades" not in packages
    assert f"{AGENT}\t1\tall\n" in packages
    assert f"{UPGRADED}\t2\tall\n" in packages, "the base was upgraded"
    assert baked.reboots == 1
    for name in ("apt-daily.timer", "apt-daily-upgrade.timer", "apt-daily.service", "apt-daily-upgrade.service"):
        assert (baked.root / "etc" / "systemd" / "system" / name).readlink().as_posix() == "/dev/null"


@pytest.mark.parametrize("change", ["", "CapabilityBoundingSet=~\nNoNewPrivileges=no\nSystemCallFilter=\n"])
def test_units_of_the_image_have_low_exposure(baked, change):
    folder = "/run/systemd/system/chatd.service.d"
    units = "chatd.service", "chatd@1.service", "chatd-lifecycle.service"
    script = f"export SYSTEMD_COLORS=0; mkdir -p {folder}; printf '[Service]\\n{change}' >{folder}/z.conf; "
    script += "; ".join(f"systemd-analyze security --offline=true --no-pager {name}" for name in units)
    said = told(baked.root, script)
    levels = [float(level) for level in re.findall(r"Overall exposure level for \S+: (\d+\.\d)", said)]
    assert len(levels) == len(units)
    assert [level <= EXPOSURE for level in levels] == [not change, True, True]


# An instance of it


@pytest.fixture
def host():
    with Host() as host:
        yield host


@pytest.fixture
def cloud(host):
    """The surroundings of an instance that a group launches: a Redis, and a parameter that names it."""
    with surroundings(host) as cloud:
        cloud.user_data, cloud.parameters, cloud.waiting = USER_DATA, {PARAMETER: host.redis()}, {LAUNCH}
        yield cloud


def units(machine):
    """Return the units of chatd on a machine, one a core."""
    cores = int(machine.run("nproc"))
    return ["chatd.service"] if cores == 1 else [f"chatd@{name}.service" for name in range(1, min(cores, 9) + 1)]


def serves(host, machine):
    """Wait until chatd-boot has ended, and answer whether a client can then join, post and read."""
    with contextlib.suppress(AssertionError):
        machine.run("systemctl", "start", "chatd-boot.service")
    with contextlib.suppress(AssertionError):
        machine.run("systemctl", "start", *units(machine))
    try:
        with host.connect() as client:
            client.socket.settimeout(SOON)  # the socket unit of a service that fails may accept, and answer nothing
            number = numbered(client.join())[-1][0]
            client.send(post("ann", "hi"))
            return numbered(client.json()) == [(number + 1, "ann", "hi")]
    except (ConnectionError, EOFError, TimeoutError):
        return False


def test_instance_serves_and_enters_service(baked, host, cloud):
    began = time.monotonic()
    with boot(baked.root, host, cloud) as machine:
        assert serves(host, machine)
        seconds = time.monotonic() - began
        sys.stdout.write(f"\nserved after {seconds:.1f} s\n")
        assert seconds < SOON
        cloud.wait("CompleteLifecycleAction")
        (completed,) = cloud.taken("CompleteLifecycleAction")
        assert completed == {
            "LifecycleHookName": LAUNCH,
            "AutoScalingGroupName": GROUP,
            "InstanceId": cloud.instance,
            "LifecycleActionResult": "CONTINUE",
        }
        agents = "chatd-lifecycle.service", f"{AGENT}.service"
        machine.run("systemctl", "is-active", "chatd-boot.service", *agents, *units(machine))
        settings = json.loads(machine.path(f"{FOLDER}/{AGENT}.json").read_text())
        assert settings["logs"]["metrics_collected"]["prometheus"]["log_group_name"] == f"/chatd/{GROUP}"
        assert machine.run("cat", "/etc/machine-id").strip() not in ("", baked.machine_id)
        assert machine.run("systemctl", "--failed", "--plain", "--no-legend") == ""


def test_one_process_on_one_core(baked, host, cloud):
    with boot(baked.root, host, cloud, more=["systemd.cpu_affinity=0"]) as machine:
        cloud.wait("CompleteLifecycleAction")
        machine.run("systemctl", "is-active", "chatd.service", "chatd.socket")
        assert machine.run("systemctl", "list-units", "--plain", "--no-legend", "chatd@*") == ""
        with host.connect(8086) as admin:
            admin.send(b"GET /readyz HTTP/1.0\r\n\r\n")
            assert admin.head()[0] == 200


def test_secrets_are_readable_only_by_root(baked, host, cloud):
    cloud.parameters[PARAMETER] = cloud.parameters[PARAMETER].replace("//", "//:hunter2@")
    host.password("hunter2")
    with boot(baked.root, host, cloud) as machine:
        assert serves(host, machine)
        folder, file = machine.path("/run/chatd").stat(), machine.path("/run/chatd/chatd.env").stat()
        assert (folder.st_mode & 0o777, file.st_mode & 0o777, file.st_uid - folder.st_uid) == (0o700, 0o600, 0)
        assert "hunter2" not in machine.run("systemctl", "show", *units(machine))
        assert "hunter2" not in machine.run("journalctl", "--output=export")
        process = machine.run("systemctl", "show", "--property=MainPID", "--value", units(machine)[0]).strip()
        assert "hunter2" in machine.run("sh", "-c", f"tr '\\0' '\\n' </proc/{process}/environ")
        command = ["setpriv", "--reuid=65534", "--clear-groups", "cat", f"/proc/{process}/environ"]
        assert subprocess.run(machine.command(*command), capture_output=True, check=False).returncode


@pytest.mark.parametrize(
    "fault",
    [
        (None, "redis://127.0.0.1", "no store is named"),
        (USER_DATA, None, "ParameterNotFound"),
        (USER_DATA, "sqlite:/var/lib/chatd/chatd.sqlite", "names a sqlite: store, which is lost with the instance"),
        (USER_DATA, "memory:", "names a memory: store, which is lost with the instance"),
    ],
    ids=["no user data", "no parameter", "sqlite", "memory"],
)
def test_instance_needs_a_durable_store(baked, host, cloud, tmp_path, fault):
    cloud.user_data, url, line = fault
    cloud.parameters = {PARAMETER: url} if url else {}
    program = tmp_path / "chatd-boot"
    hasty = (
        ("LOG_SECONDS: Final = 15", "LOG_SECONDS: Final = 0"),
        ("ABANDON_SECONDS: Final = 40", "ABANDON_SECONDS: Final = 0"),
    )
    program.write_text(imds.changed("chatd-boot", *hasty))
    program.chmod(0o755)
    with boot(baked.root, host, cloud, ("/opt/chatd/bin/chatd-boot", program)) as machine:
        assert not serves(host, machine)
        said = machine.run("journalctl", "--output=cat", "--unit=chatd-boot.service", "_COMM=chatd-boot").splitlines()
        assert said
        assert [one for one in said if one.startswith("chatd-boot: ") and line in one] == said
        assert len({*said}) == 1
        # The units that this test started, and its client, may have started chatd-boot again: let that end.
        machine.run("systemctl", "stop", *(name.replace(".service", ".socket") for name in units(machine)))
        with contextlib.suppress(AssertionError):
            machine.run("systemctl", "start", "chatd-boot.service")
        result = machine.run("systemctl", "show", "--property=Result,ExecMainStatus", "chatd-boot.service")
        assert result.split() == ["Result=exit-code", "ExecMainStatus=1"]
        states = machine.run("systemctl", "show", "--property=ActiveState", "--value", *units(machine)).split()
        assert {*states} == {"inactive"}
    results = [one["LifecycleActionResult"] for one in cloud.taken("CompleteLifecycleAction")]
    assert results == (["ABANDON", "CONTINUE"] if cloud.user_data else []), "without user data it is in no group"


@pytest.mark.parametrize("name", ["chatd", "chatd@"])
def test_units_need_the_environment_file(baked, host, cloud, name):
    unit = f"{name.replace('@', '@1')}.service"
    with boot(baked.root, host, cloud) as machine:
        assert serves(host, machine)
        machine.run("systemctl", "stop", "chatd-lifecycle.service", "chatd*.socket")
        machine.run("sh", "-c", "systemctl kill --signal=KILL 'chatd@*.service' chatd.service; rm /run/chatd/chatd.env")
        machine.run("systemctl", "stop", "chatd@*.service", "chatd.service")  # until systemd has noticed their end
        with pytest.raises(AssertionError, match="chatd"):
            machine.run("systemctl", "start", unit)
        assert "sqlite" not in machine.run("systemctl", "show", "--property=Environment", unit)


def test_broken_server_never_enters_service(baked, host, cloud, tmp_path):
    broken = tmp_path / "broken.conf"
    broken.write_text("[Service]\nExecStart=\nExecStart=/bin/false\nRestart=no\n")
    folders = f"{UNITS}/chatd.service.d/z.conf", f"{UNITS}/chatd@.service.d/z.conf"
    with boot(baked.root, host, cloud, *((path, broken) for path in folders)) as machine:
        assert not serves(host, machine)
    assert cloud.taken("CompleteLifecycleAction") == []


# Three instances, of which one is terminated

DRAIN_SECONDS = 6
"""Here; on instances it is 120."""
CLIENTS = 60
HAPROXY = """
global
    maxconn 4096
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    timeout tunnel 60s
frontend clients
    bind {address}:8085
    default_backend nodes
backend nodes
    balance leastconn
    option httpchk GET /readyz
    default-server check inter 200ms fall 1 rise 1
{servers}
"""


class Node:
    """An instance in the group."""

    def __init__(self, baked, hub, stack, number, drop_in):
        self.host = stack.enter_context(Host(hub))
        self.cloud = stack.enter_context(surroundings(self.host, number))
        self.cloud.user_data, self.cloud.waiting = USER_DATA, {LAUNCH}
        self.cloud.parameters = {PARAMETER: f"redis://{hub.address}:6379/0"}
        changes = [(f"{UNITS}/{name}.service.d/z.conf", path) for name, path in drop_in.items()]
        self.machine = stack.enter_context(boot(baked.root, self.host, self.cloud, *changes))

    def members(self):
        """Return the number of members on this node."""
        text = ""
        for port in [8086] if len(units(self.machine)) == 1 else range(8091, 8091 + len(units(self.machine))):
            with self.host.connect(port) as admin:
                admin.send(b"GET /metrics HTTP/1.0\r\n\r\n")
                text += admin.rest().decode()
        return sum(int(float(count)) for count in re.findall(r"(?m)^chatd_members (\S+)$", text))

    def completed(self):
        """Return the hooks that were completed, with the instance that each was completed for."""
        asked = self.cloud.taken("CompleteLifecycleAction")
        return [(fields["LifecycleHookName"], fields["InstanceId"]) for fields in asked]


@pytest.fixture
def hub():
    with Host() as hub:
        hub.bridge()
        hub.redis()
        yield hub


@pytest.fixture
def nodes(baked, hub, tmp_path):
    """Three nodes in service, behind a proxy on the hub."""
    drop_in = {}
    for name in ("chatd", "chatd@"):
        (command,) = re.findall(r"(?m)^ExecStart=(/.*)$", (FILES / f"{name}.service.conf").read_text())
        drop_in[name] = tmp_path / f"{name}.conf"
        shorter = re.sub(r"--drain \d+", f"--drain {DRAIN_SECONDS}", command)
        drop_in[name].write_text(f"[Service]\nExecStart=\nExecStart={shorter}\n")
    with contextlib.ExitStack() as stack:
        nodes = [Node(baked, hub, stack, number, drop_in) for number in range(3)]
        for node in nodes:
            node.cloud.wait("CompleteLifecycleAction")
        servers = "\n".join(f"    server n{place} {node.host.address}:8085" for place, node in enumerate(nodes))
        config = tmp_path / "haproxy.cfg"
        config.write_text(HAPROXY.format(address=hub.address, servers=servers))
        hub.run(need("haproxy"), "-q", "-f", config)
        yield nodes


def load(hub, nodes):
    """Start clients that write down what they post and hear, and answer when all of them are in."""
    url = f"ws://{hub.address}:8085/"
    options = f"--clients={CLIENTS}", "--rate=20", "--cut=0", f"--seconds={3 * DRAIN_SECONDS}", "--json"
    ledger = hub.run(sys.executable, "-m", "chatd.load", url, *options, stdout=subprocess.PIPE, text=True)
    all_are_in(ledger, nodes)
    return ledger


def all_are_in(ledger, nodes):
    """Wait until each client is on one of the nodes."""
    while sum(node.members() for node in nodes) < CLIENTS:
        assert ledger.poll() is None


def report(ledger):
    """Return the report of the clients."""
    said, _ = ledger.communicate(timeout=4 * LONG)
    return json.loads(said)


def test_terminated_node_loses_no_message(hub, nodes):
    first, *others = nodes
    ledger = load(hub, nodes)
    leaving = first.members()
    assert leaving > CLIENTS // 6
    first.cloud.waiting, first.cloud.state = {TERMINATE}, "Terminated"
    first.cloud.wait("CompleteLifecycleAction", 2)
    assert first.members() == 0
    all_are_in(ledger, others)
    first.machine.__exit__()  # as EC2 ends it
    told = report(ledger)
    figures = ("posted", "acknowledged", "delivered", "came_back", "lost")
    counted = " ".join(f"{name}={told[name]}" for name in figures)
    sys.stdout.write(f"\nclients={CLIENTS} left={leaving} {counted}\n")
    assert told["proved"]
    assert (told["lost"], told["logs_lost"]) == (0, 0)
    assert told["acknowledged"] == told["posted"] > 0
    assert leaving <= told["came_back"] < CLIENTS
    assert [node.completed() for node in nodes] == [
        [(LAUNCH, first.cloud.instance), (TERMINATE, first.cloud.instance)],
        *([(LAUNCH, node.cloud.instance)] for node in others),
    ]


def test_no_drain_without_chatd_lifecycle(hub, nodes):
    first, *_ = nodes
    ledger = load(hub, nodes)
    leaving = first.members()
    first.machine.run("systemctl", "stop", "chatd-lifecycle.service")
    first.cloud.waiting, first.cloud.state = {TERMINATE}, "Terminated"
    told = report(ledger)  # which takes three times as long as a drain
    assert leaving > 0
    assert told["came_back"] == 0
    assert first.completed() == [(LAUNCH, first.cloud.instance)]


# With its own kernel


def answers(host, version):
    """Return whether a client can join, post and read, and the server has this version."""
    with host.connect() as client:
        client.send(upgrade())
        status, head = client.head()
        number = numbered(client.json())[-1][0]
        client.send(post("ann", "hi"))
        heard = numbered(client.json()) == [(number + 1, "ann", "hi")]
        return (status, re.findall(r"(?m)^Server: (\S+)\r?$", head), heard) == (101, [f"chatd/{version}"], True)


@pytest.mark.emulated
def test_boot_with_own_kernel(baked, host, cloud, tmp_path):
    qemu, disk = need("qemu-system-x86_64"), tmp_path / "disk"
    succeed(need("mkfs.ext4"), "-q", "-d", baked.root, disk, "1200M")
    (kernel,), (initrd,) = baked.root.glob("boot/vmlinuz-*"), baked.root.glob("boot/initrd.img-*")
    cloud.parameters[PARAMETER] = "redis://10.0.2.2:6379/0"  # this host, as the machine sees it
    command_line = f"root=/dev/vda rw console=ttyS0 quiet {SPARE} systemd.setenv=AWS_ENDPOINT_URL={cloud.url}"
    console = host.run(
        *(qemu, "-accel", "tcg,thread=multi", "-m", "1024", "-nographic", "-no-reboot"),
        *("-kernel", kernel, "-initrd", initrd, "-append", command_line),
        *("-drive", f"file={disk},if=virtio,format=raw,cache=unsafe", "-device", "virtio-net-pci,netdev=net"),
        *("-netdev", "user,id=net,hostfwd=tcp:127.0.0.1:8085-:8085"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    lines = Lines(console.stdout)
    began = time.monotonic()
    try:
        cloud.wait("CompleteLifecycleAction", seconds=EMULATED_SECONDS)
        sys.stdout.write(f"\nin service after {time.monotonic() - began:.0f} s\n")
        assert answers(host, chatd.__version__)
        assert not answers(host, "0.0.0")
    except AssertionError as error:
        raise AssertionError(lines.text) from error


SPARE = "mitigations=off module_blacklist=kvm,kvm_amd systemd.mask=getty.target systemd.mask=systemd-logind.service"
"""Parts of the boot that cost an emulated machine seconds, and that chatd does not use."""
EMULATED_SECONDS = 170
"""Within how long it must have booted; an emulated machine is some twenty times slower."""
