"""A double of EC2, moto with a record of the requests, and Packer from the Go module proxy.

moto records instances and boots nothing.  A machine of tests/support/booted.py stands for the builder: when an instance
is launched, that machine gets its key, as from cloud-init, and Packer connects to it over SSH.
"""

import base64
import contextlib
import dataclasses
import datetime as dt
import hashlib
import io
import json
import pathlib
import shutil
import socket
import subprocess
import threading
import urllib.parse
from typing import Any

from support import baking_role, booted
from support.baking_role import given
from support.booted import kept, succeed
from support.servers import LONG, ROOT, environment, missing, need
from support.threads import serving, wsgi

REGION = "us-east-1"
DEBIAN = "136693071363"
"""Debian's account at AWS."""
NOTHING_LEFT = {"images": [], "snapshots": [], "groups": [], "keys": [], "instances": [], "volumes": []}
"""The result of BakeAccount.left when a bake has left nothing."""
DENIED = (
    "403 Forbidden",
    [("Content-Type", "text/xml")],
    [
        b"<Response><Errors><Error><Code>UnauthorizedOperation</Code><Message>You may not.</Message></Error></Errors>",
        b"<RequestID>1</RequestID></Response>",
    ],
)
TOOLS = ROOT / "packer" / "tools"


def packer():
    """Return the folder with Packer and its plugin, built once."""
    need("go")
    recipe = [path.read_text() for path in sorted(TOOLS.rglob("*")) if path.is_file()]

    def make(folder):
        result = subprocess.run([TOOLS / "build", folder], capture_output=True, text=True, check=False)
        if result.returncode:
            missing(f"Packer could not be built: {result.stderr[-500:]}")

    return kept("packer", make, *recipe)


class BakeAccount:
    """An account at moto, with Debian's images in it; a context manager.

    `asked` has the requests as they came, each a dictionary of the fields of EC2's query protocol.
    """

    def __init__(self):
        self.asked = []
        self._one = threading.Lock()
        self.policy = baking_role.policy()
        """The statements of the policy of the role that bakes; None permits everything."""
        self.denied = []
        """What the role was denied."""
        self._tags = {}
        self.slow = False
        """Whether new images become available only some time after they are first looked at."""
        self._seen = set()
        """The new images that somebody has looked at."""
        self._answers = {}
        """By call: one that is made again, since its answer was lost, is not done twice."""
        self.launched = lambda key: None
        """Called with the public key of each instance that is launched."""
        self.booted = lambda script: None
        """Called with the user data of each instance that has some."""
        self.deprecated = {}
        """The dates at which images become deprecated."""
        self.connected = set()
        """The instances whose SSM agent is connected."""
        self.sessions = []
        """The sessions that were started with Session Manager."""
        try:
            from moto.ec2.models import ec2_backends
            from moto.ec2.models.amis import Ami
            from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        except ImportError as error:
            missing(f"moto is not installed: {error}")
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._backends = ec2_backends
        ec2_backends.reset()
        for architecture, machine in (("arm64", "arm64"), ("amd64", "x86_64")):
            image = f"ami-{architecture}0debian13"
            self.backend.amis[image] = Ami(
                self.backend,
                image,
                name=f"debian-13-{architecture}-20260912-2000",
                owner_id=DEBIAN,
                public=True,
                virtualization_type="hvm",
                architecture=machine,
                root_device_type="ebs",
                root_device_name="/dev/xvda",
                hypervisor="xen",
            )
        self._own = set(self.backend.amis), set(self.backend.snapshots), set(self.groups)
        self._known = self._ids()
        self._server = wsgi(self._serve)
        self._stack = contextlib.ExitStack()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        self._stack.enter_context(serving(self._server))
        return self

    def __exit__(self, *_):
        self._stack.close()
        self._backends.reset()

    def _serve(self, environ, start_response):
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        form = dict(urllib.parse.parse_qsl(body.decode()))
        if form.get("Action") == "CreateImage":  # moto knows no tags of its snapshots
            places = [name.removesuffix("ResourceType") for name, value in form.items() if value == "snapshot"]
            body = urllib.parse.urlencode(
                {name: value for name, value in form.items() if not name.startswith(tuple(places))}
            ).encode()
        environ |= {"wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body))}
        if environ.get("HTTP_X_AMZ_TARGET", "").startswith("AmazonSSM."):
            status, answer = self._ssm(environ["HTTP_X_AMZ_TARGET"].rpartition(".")[2], json.loads(body))
            start_response(status, [("Content-Type", "application/x-amz-json-1.1")])
            return [json.dumps(answer).encode()]
        call = environ.get("HTTP_AMZ_SDK_INVOCATION_ID", object())
        with self._one:  # moto is of one thread
            if call not in self._answers:
                self.asked.append(form)
                denied = self._denied(form)
                self.denied += denied
                if denied:
                    self._answers[call] = DENIED
                elif form.get("Action") == "EnableImageDeprecation":
                    self._answers[call] = self._deprecate(form)
                else:
                    self._answers[call] = self._answer(environ)
                self._mark(form)
                self._age(form.get("Action"))
                if form.get("Action") == "RunInstances":
                    self.launched(self.backend.key_pairs[form["KeyName"]].public_key)
                    if "UserData" in form:
                        self.booted(base64.b64decode(form["UserData"]).decode())
            status, headers, answer = self._answers[call]
            if status.startswith("5"):
                self.asked.append({"moto failed": status, "answer": answer})
                del self._answers[call]
        start_response(status, headers)
        return answer

    def _ssm(self, action, asked):
        """Answer a request to Session Manager: a session needs an instance whose agent is connected."""
        if action == "TerminateSession":
            return "200 OK", {"SessionId": asked["SessionId"]}
        assert action == "StartSession", action
        if asked["Target"] not in self.connected:
            return "400 Bad Request", {
                "__type": "TargetNotConnected",
                "message": f"{asked['Target']} is not connected.",
            }
        self.sessions.append(asked)
        return "200 OK", {"SessionId": "packer-0", "TokenValue": "token", "StreamUrl": "wss://ssm.invalid/"}

    @property
    def instance(self):
        """The id of the instance that runs."""
        (found,) = (one.id for one in self.backend.all_instances() if one.state != "terminated")
        return found

    @property
    def subnet(self):
        """The id of a subnet."""
        return self.backend.describe_subnets()[0].id

    def profile(self, name):
        """Have an instance profile."""
        from moto.iam.models import iam_backends

        iam_backends[baking_role.OWNER]["aws"].create_instance_profile(name, "/", [])

    def close_network(self):
        """Have no default VPC, and subnets without public addresses."""
        for vpc in self.backend.vpcs.values():
            vpc.is_default = "false"
        for subnet in self.backend.describe_subnets():
            subnet.map_public_ip_on_launch = "false"
            subnet.default_for_az = "false"

    def _denied(self, form):
        """Return what the role may not do of a request."""
        if self.policy is None or form.get("Action") not in baking_role.reference():  # it is of another service
            return []
        return baking_role.denied(self.policy, form, self.tags_of)

    def tags_of(self, name):
        """Return the tags and the owner of a resource."""
        return self._tags.get(name, {}), DEBIAN if name in self._own[0] else baking_role.OWNER

    def _ids(self):
        """Return the ids of all resources, those of key pairs by their names."""
        found = {*self.backend.amis, *self.backend.snapshots, *self.groups, *self.backend.volumes}
        keys = {f"key-{name}" for name in self.backend.key_pairs}
        return found | keys | {one.id for one in self.backend.all_instances()}

    def _mark(self, form):
        """Note the tags that a request gave to the resources that it created."""
        for name in self._ids() - self._known:
            self._known.add(name)
            self._tags[name] = given(form, baking_role.KINDS[name.partition("-")[0]])

    def _age(self, action):
        """Have a new image be pending when it is first looked at, as at EC2."""
        own = [image for name, image in self.backend.amis.items() if name not in self._own[0]]
        for image in own:
            if self.slow and action in ("CreateImage", "CopyImage") and image.id not in self._seen:
                image.state = "pending"
            elif action == "DescribeImages" and image.state == "pending":
                self._seen.add(image.id)
                image.state = "available"

    def _deprecate(self, form):
        """Answer EnableImageDeprecation, which moto does not know: the date must be in the future."""
        at = dt.datetime.fromisoformat(form["DeprecateAt"])
        if at <= dt.datetime.now(dt.UTC) or form["ImageId"] not in self.backend.amis:
            return (
                "400 Bad Request",
                DENIED[1],
                [b"<Response><Errors><Error><Code>InvalidParameter</Code></Error></Errors></Response>"],
            )
        self.deprecated[form["ImageId"]] = at
        return (
            "200 OK",
            DENIED[1],
            [b"<EnableImageDeprecationResponse><return>true</return></EnableImageDeprecationResponse>"],
        )

    def _answer(self, environ):
        """Return the answer of moto: status, headers and body."""
        told = []
        answer = [*self._moto(environ, lambda status, headers, *_: told.extend((status, headers)))]
        return *told, answer

    @property
    def backend(self):
        return self._backends["123456789012"][REGION]

    @property
    def groups(self):
        return [name for vpc in self.backend.groups.values() for name in vpc]

    def requests(self, action):
        """Return the requests of one kind, in order."""
        return [form for form in self.asked if form.get("Action") == action]

    def left(self):
        """Return what was created and not removed: images, snapshots, groups, keys, running instances, disks."""
        images, snapshots, groups = self._own
        running = [one.id for one in self.backend.all_instances() if one.state != "terminated"]
        return {
            "images": sorted(set(self.backend.amis) - images),
            "snapshots": sorted(set(self.backend.snapshots) - snapshots),
            "groups": sorted(set(self.groups) - groups),
            "keys": sorted(self.backend.key_pairs),
            "instances": running,
            "volumes": sorted(self.backend.volumes),
        }


def request_faults(account):
    """Return the faults in the requests of a bake."""
    (launch,) = account.requests("RunInstances")
    modified = {key: value for form in account.requests("ModifyImageAttribute") for key, value in form.items()}
    (create,) = account.requests("CreateImage")
    (ingress,) = account.requests("AuthorizeSecurityGroupIngress")
    wanted = {
        "the builder's metadata needs a token": launch.get("MetadataOptions.HttpTokens") == "required",
        "the token stays on the builder": launch.get("MetadataOptions.HttpPutResponseHopLimit") == "1",
        "the builder's disk is encrypted": launch.get("BlockDeviceMapping.1.Ebs.Encrypted") == "true",
        "the disk is gp3": launch.get("BlockDeviceMapping.1.Ebs.VolumeType") == "gp3",
        "the disk goes with the builder": launch.get("BlockDeviceMapping.1.Ebs.DeleteOnTermination") == "true",
        "the image is made once": len(account.requests("CreateImage")) == 1 and not account.requests("CopyImage"),
        "instances of the image need a token": modified.get("ImdsSupport.Value") == "v2.0",
        "the image is nobody else's": not any("LaunchPermission" in key for key in modified),
        "only one address may connect": "192.0.2.7/32" in ingress.values() and "0.0.0.0/0" not in ingress.values(),
        "the builder has tags": "chatd:git-sha" in given(launch, "instance") and "Name" in given(launch, "volume"),
        "the image has tags": {"chatd:version", "chatd:built"} <= given(create, "image").keys(),
        "the snapshot has tags": "chatd:version" in given(create, "snapshot"),
    }
    return [text for text, holds in wanted.items() if not holds]


UPGRADED = "upgraded"
"""A package of the base, in version 1, of which Debian has version 2."""
CONTROL = "Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: nobody\nDescription: a package\n"
DEBIAN_FILES = {
    "/etc/apt/sources.list": "deb [trusted=yes] file:/srv/debian ./\n",
    "/etc/tmpfiles.d/reboot.conf": "r! /run/chatd-upgrading\n",  # a soft reboot keeps /run
    "/usr/local/bin/systemctl": '#!/bin/sh\n[ "$*" = reboot ] && set -- soft-reboot\nexec /usr/bin/systemctl "$@"\n',
}
"""What makes a machine here a builder at EC2, by path."""


def package(folder, name, version=1, **files):
    """Build a package of Debian in a folder; return its path."""
    for path, text in {"DEBIAN/control": CONTROL.format(name=name, version=version), **files}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
        if path == "DEBIAN/postinst":
            (folder / path).chmod(0o755)
    deb = folder.with_name(f"{folder.name}.deb")
    succeed("dpkg-deb", "--build", "--root-owner-group", folder, deb)
    return deb


class Builder(booted.Machine):
    """A Debian that has booted, with SSH at a port of this machine; it has no network of its own."""

    def __init__(self):
        super().__init__(booted.debian(), [], booted.NO_NETWORK)
        self._sockets = [socket.create_server(("127.0.0.1", 0))]
        self._threads = []
        self.port = self._sockets[0].getsockname()[1]
        self._run(self._accept)

    def __enter__(self):
        super().__enter__()
        self._debian()
        return self

    def _debian(self):
        """Have a server of Debian with an upgrade, and a reboot after which the machine still has its files."""
        folder = self.path("/srv/debian")
        folder.mkdir()
        for name, text in DEBIAN_FILES.items():
            self.path(name).parent.mkdir(parents=True, exist_ok=True)
            self.path(name).write_text(text)
        self.path("/usr/local/bin/systemctl").chmod(0o755)
        for version in (1, 2):
            deb = package(folder / str(version), UPGRADED, version)
            deb.rename(folder / f"{version}.deb")
        data = (folder / "2.deb").read_bytes()
        index = f"{CONTROL.format(name=UPGRADED, version=2)}Filename: ./2.deb\nSize: {len(data)}\n"
        (folder / "Packages").write_text(f"{index}SHA256: {hashlib.sha256(data).hexdigest()}\n")
        self.run("dpkg", "--install", "/srv/debian/1.deb")

    def reboots(self):
        """Return how often it was rebooted."""
        return int(self.run("systemctl", "show", "--property=SoftRebootsCount", "--value"))

    def cleaned(self):
        """Remove what makes it a double."""
        self.run("rm", "-r", "/srv/debian", *DEBIAN_FILES)

    def __exit__(self, *_):
        for one in [*self._sockets]:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        while self._threads:
            self._threads.pop().join(LONG)
        for one in self._sockets:
            one.close()
        super().__exit__()

    def _run(self, *call):
        thread = threading.Thread(target=call[0], args=call[1:])
        self._threads.append(thread)
        thread.start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                outer, _ = self._sockets[0].accept()
                self._sockets.append(outer)
                try:
                    inner = self.connect(22).socket
                except OSError:  # it reboots
                    outer.close()
                    continue
                self._sockets.append(inner)
                inner.settimeout(None)
                self._run(self._pump, outer, inner)
                self._run(self._pump, inner, outer)

    @staticmethod
    def _pump(source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    @property
    def place(self):
        """The address for Packer, as a value of the template's variable."""
        return json.dumps({"ssh_host": "127.0.0.1", "ssh_port": self.port})

    def user_data(self, script):
        """Run a script as cloud-init does at the first boot; it must not fail."""
        self.path("/run/user-data").write_text(script)
        self.run("sh", "-ec", "chmod +x /run/user-data && /run/user-data 2>&1")

    def authorize(self, key):
        """Let the owner of a public key log in, as cloud-init does."""
        folder = "/home/admin/.ssh"
        self.run("install", "-d", "-o", "admin", "-g", "admin", "-m", "700", folder)
        write = f'echo "$1" >{folder}/authorized_keys; chown admin: {folder}/authorized_keys'
        self.run("sh", "-ec", write, "sh", key.strip())


def settings(folder, account=None):
    """Return the environment of a Packer that finds this account and the built plugin, and no others."""
    kept_ = {name: value for name, value in environment().items() if not name.startswith(("AWS_", "PACKER_", "PKR_"))}
    del kept_["PYTHONPATH"]
    return kept_ | {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_ENDPOINT_URL": account.url if account else "http://127.0.0.1:9",
        "CHECKPOINT_DISABLE": "1",
        "PACKER_CONFIG_DIR": str(folder),
        "PACKER_PLUGIN_PATH": str(packer() / "plugins"),
        **booted.pip_settings(),
    }


def baking(account, builder, folder, *options):
    """Start scripts/bake against an account, with a machine for the builder."""
    builder.run("systemctl", "is-active", "ssh.service")
    account.launched, account.slow = builder.authorize, True
    variables = [f"--var=rehearsal={builder.place}", '--var=ssh_from=["192.0.2.7/32"]']
    where = ["--region", REGION, "--arch", "amd64", "--packer", packer() / "packer"]
    return subprocess.Popen(
        [ROOT / "scripts" / "bake", *where, *variables, *options],
        env=settings(folder, account) | {"AWS_MAX_ATTEMPTS": "1"},  # as an operator may set it for other tools
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def bake(account, builder, folder, *options):
    """Run scripts/bake so; answers the ended process."""
    with baking(account, builder, folder, *options) as process:
        said, told = process.communicate(timeout=4 * LONG)
    return subprocess.CompletedProcess(process.args, process.returncode, said, told)


def copied(machine, folder):
    """Return the files of a machine as they are now, in a folder: what a snapshot of its disk holds."""
    folder.mkdir()
    tar = ["tar", "--one-file-system", "--numeric-owner", "--xattrs"]
    read = subprocess.Popen([*tar, "-C", machine.path("/"), "-cf", "-", "."], stdout=subprocess.PIPE)
    succeed(*tar, "-C", folder, "-xpf", "-", stdin=read.stdout)
    read.stdout.close()
    assert read.wait(LONG) == 0
    return folder


AGENT = "amazon-cloudwatch-agent"
FOLDER = f"/opt/aws/{AGENT}/etc"
UNIT = """
[Service]
ExecStart=/bin/sleep infinity
Restart=on-failure
[Install]
WantedBy=multi-user.target
"""


def agent(builder, folder, name=AGENT):
    """Put a package that stands for an agent into a machine; return its URL and digest."""
    files = {f"usr/lib/systemd/system/{name}.service": UNIT, f"{FOLDER[1:]}/.keep": ""}
    if name != AGENT:
        files["DEBIAN/postinst"] = f"#!/bin/sh\nsystemctl restart {name}.service\n"
    deb = package(folder / name, name, **files)
    shutil.copy(deb, builder.path(f"/srv/{name}.deb"))
    digest = hashlib.sha256(deb.read_bytes()).hexdigest()
    return {"url": f"file:///srv/{name}.deb", "sha256": digest}


def agents(folder, agent):
    """Return the option that has bakes install an agent."""
    path = folder / "agents.json"
    path.write_text(json.dumps({"amd64": [agent]}))
    return f"--agents={path}"


@dataclasses.dataclass(frozen=True)
class Baked:
    """The result of a bake: `made` is its JSON, `told` its progress, `root` the files on the disk of the image."""

    made: dict[str, Any]
    told: str
    account: BakeAccount
    left: dict[str, list[str]]
    tags: dict[str, str]
    root: pathlib.Path
    machine_id: str
    """The builder's."""
    reboots: int
    """How often the builder was rebooted."""


def baked(folder):
    """Bake the image of this checkout in a folder."""
    with BakeAccount() as account, Builder() as builder:
        machine_id = builder.run("cat", "/etc/machine-id").strip()
        result = bake(account, builder, folder, agents(folder, agent(builder, folder)), "--json")
        assert result.returncode == 0, result.stderr
        made = json.loads(result.stdout)
        tags = account.backend.describe_tags({"resource-id": [image["image"] for image in made["images"]]})
        named = {tag["key"]: tag["value"] for tag in tags}
        reboots, left = builder.reboots(), account.left()
        builder.cleaned()
        return Baked(made, result.stderr, account, left, named, copied(builder, folder / "root"), machine_id, reboots)
