"""The image: its template, and whole bakes with the real Packer against a cloud without an account.

The builder is a Debian that boots here and is provisioned over SSH, as one of EC2 is.  What EC2 itself does, such as
the encryption of a copy, is not tried: the tests hold Packer to asking for it.
"""

import json
import os
import re
import shutil
import subprocess
import tarfile

import pytest
from support import cloud
from support.cloud import Account, Builder, agent, bake, packer, settings, tags
from support.servers import LONG, ROOT, Lines, program

import chatd

TEMPLATE = ROOT / "packer" / "ami.pkr.hcl"
EMPTY = {"images": [], "snapshots": [], "groups": [], "keys": [], "instances": [], "volumes": []}
CALLER = {"ec2:GetCallerIdentity"}
"""What everyone may ask, of STS."""


@pytest.fixture
def account():
    with Account() as account:
        yield account


@pytest.fixture
def builder():
    with Builder() as builder:
        yield builder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """The folder of what scripts/bake has Packer put on the builder of each architecture."""
    folder = tmp_path_factory.mktemp("bundle")
    program(ROOT / "scripts" / "bake").bundle(folder, ["arm64", "amd64"])
    return folder


# The template


def run_packer(folder, *arguments, account=None):
    """What Packer says, and its exit code."""
    result = subprocess.run(
        [packer() / "packer", *arguments],
        env=settings(folder, account),
        capture_output=True,
        text=True,
        timeout=4 * LONG,
        check=False,
        cwd=folder,
    )
    return result.stdout + result.stderr, result.returncode


def variables(folder, **changes):
    """The arguments that give the template's variables, with empty bundles."""
    for name in ("arm64", "amd64"):
        tarfile.open(folder / f"{name}.tar", "w").close()
    given = {
        "version": "1.2.3",
        "git_sha": "c0ffee",
        "built": "2026-01-01T00:00:00Z",
        "bundle": folder,
        "manifest": folder / "manifest.json",
        "region": cloud.REGION,
    }
    return [f"-var={name}={value}" for name, value in (given | changes).items()]


def test_the_template_is_formatted_and_valid(tmp_path):
    assert run_packer(tmp_path, "fmt", "-check", "-diff", TEMPLATE) == ("", 0)
    said, code = run_packer(tmp_path, "validate", *variables(tmp_path), TEMPLATE)
    assert code == 0, said


@pytest.mark.parametrize(
    ("agent", "fault"),
    [
        ({"url": "https://example.com/a.deb", "sha256": "latest"}, "SHA-256"),
        ({"url": "http://example.com/a.deb", "sha256": "0" * 64}, "https: URL"),
        ({"url": "https://example.com/a.deb'; reboot '", "sha256": "0" * 64}, "https: URL"),
    ],
)
def test_an_agent_without_a_hash_or_with_another_url_is_refused(tmp_path, agent, fault):
    agents = json.dumps({"arm64": [agent]})
    said, code = run_packer(tmp_path, "validate", *variables(tmp_path, agents=agents), TEMPLATE)
    assert code == 1
    assert fault in said


# What is asked of EC2


def faults(account):
    """What is wrong with the requests of a bake."""
    (launch,) = account.requests("RunInstances")
    (copy,) = account.requests("CopyImage") or [{}]
    modified = {key: value for form in account.requests("ModifyImageAttribute") for key, value in form.items()}
    (ingress,) = account.requests("AuthorizeSecurityGroupIngress")
    wanted = {
        "the builder's metadata needs a token": launch.get("MetadataOptions.HttpTokens") == "required",
        "the token stays on the builder": launch.get("MetadataOptions.HttpPutResponseHopLimit") == "1",
        "the builder's disk is encrypted": launch.get("BlockDeviceMapping.1.Ebs.Encrypted") == "true",
        "the disk is gp3": launch.get("BlockDeviceMapping.1.Ebs.VolumeType") == "gp3",
        "the disk goes with the builder": launch.get("BlockDeviceMapping.1.Ebs.DeleteOnTermination") == "true",
        "the image is encrypted": copy.get("Encrypted") == "true",
        "instances of the image need a token": modified.get("ImdsSupport.Value") == "v2.0",
        "the image is nobody else's": not any("LaunchPermission" in key for key in modified),
        "only one address may connect": "192.0.2.7/32" in ingress.values() and "0.0.0.0/0" not in ingress.values(),
        "the builder has tags": "chatd:git-sha" in tags(launch, "instance") and "Name" in tags(launch, "volume"),
    }
    return [text for text, holds in wanted.items() if not holds]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (("", ""), None),
        (('"required"', '"optional"'), "the builder's metadata needs a token"),
        (("encrypt_boot = true", "encrypt_boot = false"), "the image is encrypted"),
        (("encrypted             = true", "encrypted             = false"), "the builder's disk is encrypted"),
        (('"gp3"', '"gp2"'), "the disk is gp3"),
        (("imds_support = ", "# "), "instances of the image need a token"),
        (("run_tags        = local.tags", ""), "the builder has tags"),
        (("  imds_support = ", '  ami_groups = ["all"]\n  imds_support = '), "the image is nobody else's"),
    ],
)
def test_a_template_that_asks_for_less_is_found(account, builder, tmp_path, change, fault):
    text = TEMPLATE.read_text()
    assert change[0] in text
    (tmp_path / "ami.pkr.hcl").write_text(text.replace(*change))
    (tmp_path / "provision.sh").write_text("#!/bin/sh\n")
    account.launched = builder.authorize
    given = variables(tmp_path, rehearsal=builder.place, ssh_from='["192.0.2.7/32"]')
    said, code = run_packer(
        tmp_path, "build", "-only=amazon-ebs.arm64", *given, tmp_path / "ami.pkr.hcl", account=account
    )
    assert code == 0, (said, account.asked)
    assert faults(account) == ([fault] if fault else [])


# Whole bakes


def allowed():
    """What the policy in docs/image.md allows."""
    (policy,) = re.findall(r"```json\n(\{\n  \"Version.*?)```", (ROOT / "docs" / "image.md").read_text(), re.DOTALL)
    return {action for statement in json.loads(policy)["Statement"] for action in statement["Action"]}


def test_a_bake_leaves_an_image_and_nothing_else(baked):
    (image,) = baked.made["images"]
    assert (image["architecture"], image["region"]) == ("amd64", cloud.REGION)
    assert faults(baked.account) == []
    assert {f"ec2:{form['Action']}" for form in baked.account.asked if "Action" in form} - CALLER <= allowed()
    (snapshot,) = baked.left["snapshots"]
    assert baked.left == EMPTY | {"images": [image["image"]], "snapshots": [snapshot]}
    assert baked.tags == {
        "Name": f"chatd-{chatd.__version__}",
        "chatd:version": chatd.__version__,
        "chatd:git-sha": baked.made["git_sha"],
        "chatd:base-image": "ami-amd640debian13",
        "chatd:base-name": "debian-13-amd64-20260912-2000",
        "chatd:built": baked.made["built"],
    }
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", baked.made["git_sha"])


def test_the_builder_tries_both_units(baked):
    assert baked.told.count("joined, posted and read") == 2


def drop_in(*lines):
    text = "\\n".join(["[Service]", *lines])
    folder = "/etc/systemd/system/chatd.service.d"
    return f"mkdir -p {folder} && printf '{text}\\n' >{folder}/z-broken.conf"


def instead(name, *lines):
    """Put a script before a command of the machine's."""
    text = "\\n".join(["#!/bin/sh", *lines])
    return f"printf '{text}\\n' >/usr/local/bin/{name} && chmod +x /usr/local/bin/{name}"


@pytest.mark.parametrize(("architecture", "machine"), [("arm64", "aarch64"), ("amd64", "x86_64")])
def test_each_architecture_has_its_own_wheels_of_all_that_is_locked(bundle, architecture, machine):
    with tarfile.open(bundle / f"{architecture}.tar") as tar:
        names = [name.partition("/")[2] for name in tar.getnames() if name.startswith("wheels/")]
    platforms = {name.removesuffix(".whl").rpartition("-")[2] for name in names}
    native = platforms - {"any"}
    assert native
    assert [platform for platform in native if not platform.endswith(machine)] == []
    locks = "".join((ROOT / path).read_text() for path in ("requirements.txt", "packer/requirements.txt"))
    pins = re.findall(r"(?m)^[a-z0-9].*?==.*", locks)
    assert len(names) == len([pin for pin in pins if "== 'PyPy'" not in pin and "!= 'CPython'" not in pin])


def provision(builder, bundle, agent=None):
    """Run provision.sh in a machine as Packer does; answers its exit code and what it said."""
    shutil.copy(bundle / "amd64.tar", builder.path("/tmp/bundle.tar"))
    shutil.copy(TEMPLATE.with_name("provision.sh"), builder.path("/run/provision.sh"))
    agents = f"AGENTS={agent['sha256']} {agent['url']}" if agent else "AGENTS="
    alone = "env", "-i", "PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", agents
    command = builder.command(*alone, "sh", "/run/provision.sh")
    result = subprocess.run(command, capture_output=True, text=True, timeout=4 * LONG, check=False)
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("broken", "fault"),
    [
        (drop_in("ExecStart=", "ExecStart=/bin/false", "Restart=no"), "chatd.service failed"),
        (drop_in("Environment=CHATD_ROOMS=kitchen"), "no WebSocket"),
        (drop_in("TimeoutStopSec=1ms", "ExecStop=/bin/sleep 9"), "did not stop cleanly"),
        (instead("tar", '/usr/bin/tar "$@"', "echo >>$(ls /tmp/tmp.*/wheels/attrs-*.whl)"), "DO NOT MATCH THE HASHES"),
    ],
    ids=["does not start", "does not serve", "does not stop", "a wheel of another hash"],
)
def test_what_is_not_as_it_should_be_is_not_provisioned(builder, bundle, broken, fault):
    builder.run("sh", "-ec", broken)
    code, said = provision(builder, bundle)
    assert code
    assert fault in said


def test_an_agent_of_another_hash_is_not_installed(builder, bundle, tmp_path):
    code, said = provision(builder, bundle, agent(builder, tmp_path) | {"sha256": "0" * 64})
    assert code
    assert "did NOT match" in said
    assert not builder.path(cloud.FOLDER).exists()


def test_a_provisioner_that_exits_7_is_no_image_and_leaves_nothing(account, builder, tmp_path):
    builder.run("sh", "-ec", instead("tar", "exit 7"))
    result = bake(account, builder, tmp_path, "--no-agents")
    assert (result.returncode, result.stdout) == (1, ""), result.stderr
    assert "exit status: 7" in result.stderr
    assert len(account.requests("RunInstances")) == 1
    assert account.requests("CreateImage") == account.requests("CopyImage") == []
    assert account.left() == EMPTY


def test_a_bake_that_is_told_to_stop_leaves_nothing(account, builder, tmp_path):
    builder.run("sh", "-ec", instead("sync", "echo here", "read -r _ </run/go") + "; mkfifo /run/go")
    with cloud.baking(account, builder, tmp_path, "--no-agents") as process:
        told = Lines(process.stderr)
        told.wait("here$")
        process.terminate()
        told.wait("Cancelling build after receiving")
        builder.run("sh", "-ec", "echo >/run/go")  # Packer lets the script end
        code = process.wait(LONG)
        told.close()
    assert code == 130, told.text
    assert account.left() == EMPTY


# The command


def command(*arguments):
    return subprocess.run(
        [ROOT / "scripts" / "bake", *arguments],
        env={name: value for name, value in os.environ.items() if not name.startswith("AWS_")},
        capture_output=True,
        text=True,
        timeout=LONG,
        check=False,
    )


def test_help_has_examples():
    result = command("--help")
    assert result.returncode == 0
    assert "scripts/bake --region" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ([], "--agents --no-agents is required"),
        (["--no-agents"], "say where"),
        (["--no-agents", "--region=r", "--arch=mips"], "invalid choice"),
        (["--agents=/nowhere", "--region=r"], "/nowhere"),
    ],
)
def test_what_is_asked_wrongly_is_said(arguments, fault):
    result = command(*arguments)
    assert result.returncode == 2
    assert fault in result.stderr


def test_without_packer_it_says_so():
    result = command("--no-agents", "--region=r", "--packer=no-such-packer")
    assert result.returncode == 1
    assert "no-such-packer is not installed" in result.stderr
