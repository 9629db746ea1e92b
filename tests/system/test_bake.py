"""The image: its template, and whole bakes with the real Packer against a cloud without an account.

The builder is a Debian that boots here, provisioned over SSH like one on EC2.  EC2's own work, such as the encryption
of a copy, is not tested: the tests check that Packer requests it.
"""

import datetime as dt
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile

import pytest
from support import baking_role, cloud
from support.booted import pip_settings
from support.cloud import NOTHING_LEFT, BakeAccount, Builder, agent, bake, packer, request_faults, settings
from support.servers import LONG, ROOT, Lines, program

TEMPLATE = ROOT / "packer" / "ami.pkr.hcl"
SESSION = TEMPLATE.with_name("session.sh")
SCRIPTS = "upgrade.sh", "provision.sh"
KEY = "arn:aws:kms:us-east-1:123456789012:key/mrk-1234abcd12ab34cd56ef1234567890ab"
FROM = '["192.0.2.7/32"]'


@pytest.fixture
def account():
    with BakeAccount() as account:
        yield account


@pytest.fixture
def builder():
    with Builder() as builder:
        builder.path("/etc/pip.conf").write_text("[install]\nno-compile = true\n")  # sooner done; nothing runs for long
        yield builder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """The folder of what scripts/bake has Packer put on the builder of each architecture."""
    folder = tmp_path_factory.mktemp("bundle")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in pip_settings().items():
            patch.setenv(name, value)
        program(ROOT / "scripts" / "bake").bundle(folder, ["arm64", "amd64"])
    return folder


# The template


def run_packer(folder, *arguments, account=None, **changes):
    """Run Packer; returns its output and exit status."""
    result = subprocess.run(
        [packer() / "packer", *arguments],
        env=settings(folder, account) | changes,
        capture_output=True,
        text=True,
        timeout=4 * LONG,
        check=False,
        cwd=folder,
    )
    return result.stdout + result.stderr, result.returncode


def variables(folder, **changes):
    """Return the arguments that give the template's variables, with empty bundles."""
    for name in ("arm64", "amd64"):
        tarfile.open(folder / f"{name}.tar", "w").close()
    given = {
        "version": "1.2.3",
        "git_sha": "c0ffee",
        "built": f"{dt.datetime.now(dt.UTC):%Y-%m-%dT%H:%M:%SZ}",
        "bundle": folder,
        "manifest": folder / "manifest.json",
        "region": cloud.REGION,
    }
    return [f"-var={name}={value}" for name, value in (given | changes).items()]


def emptied(folder):
    """Put scripts that do nothing beside a template in a folder, and the one that the template reads."""
    shutil.copy(SESSION, folder)
    for name in SCRIPTS:
        (folder / name).write_text("#!/bin/sh\n")


def test_template_is_formatted_and_valid(tmp_path):
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
def test_agent_needs_hash_and_https_url(tmp_path, agent, fault):
    agents = json.dumps({"arm64": [agent]})
    said, code = run_packer(tmp_path, "validate", *variables(tmp_path, agents=agents), TEMPLATE)
    assert code == 1
    assert fault in said


@pytest.mark.parametrize("days", [-1, 0.5, 3651])
def test_deprecation_must_be_possible(tmp_path, days):
    """EC2 would refuse the date only after the image is made."""
    said, code = run_packer(tmp_path, "validate", *variables(tmp_path, deprecate_days=days), TEMPLATE)
    assert (code, "whole number from 0 to 3650" in said) == (1, True), said


# Requests to EC2


@pytest.mark.parametrize(("days", "dates"), [(90, [90]), (0, [])])
def test_image_is_deprecated_some_day(account, builder, tmp_path, days, dates):
    shutil.copy(TEMPLATE, tmp_path)
    emptied(tmp_path)
    account.launched = builder.authorize
    given = variables(tmp_path, rehearsal=builder.place, ssh_from=FROM, deprecate_days=days, kms_key_id=KEY)
    said, code = run_packer(
        tmp_path, "build", "-only=amazon-ebs.arm64", *given, tmp_path / TEMPLATE.name, account=account
    )
    assert code == 0, said
    now = dt.datetime.now(dt.UTC)
    assert [round((at - now) / dt.timedelta(days=1)) for at in account.deprecated.values()] == dates
    (launch,) = account.requests("RunInstances")
    assert launch["BlockDeviceMapping.1.Ebs.KmsKeyId"] == KEY, "the image is encrypted with the key of its disk"
    assert account.denied == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (("", ""), None),
        (('"required"', '"optional"'), "the builder's metadata needs a token"),
        (("ena_support  = true", "ena_support  = true\n  encrypt_boot = true"), "the image is made once"),
        (("encrypted             = true", "encrypted             = false"), "the builder's disk is encrypted"),
        (('"gp3"', '"gp2"'), "the disk is gp3"),
        (("imds_support = ", "# "), "instances of the image need a token"),
        (("run_volume_tags = local.tags", ""), "the builder has tags"),
        (("  imds_support = ", '  ami_groups = ["all"]\n  imds_support = '), "the image is nobody else's"),
    ],
)
def test_weaker_template_is_detected(account, builder, tmp_path, change, fault):
    text = TEMPLATE.read_text()
    assert change[0] in text
    (tmp_path / "ami.pkr.hcl").write_text(text.replace(*change))
    emptied(tmp_path)
    account.launched, account.policy = builder.authorize, None
    given = variables(tmp_path, rehearsal=builder.place, ssh_from=FROM)
    said, code = run_packer(
        tmp_path, "build", "-only=amazon-ebs.arm64", *given, tmp_path / "ami.pkr.hcl", account=account
    )
    assert code == 0, (said, account.asked)
    assert request_faults(account) == ([fault] if fault else [])


# The baking role


def test_role_permits_a_bake_and_nothing_else(account, builder, tmp_path):
    """EC2's double refuses what the documented policy does not permit; each statement is needed."""
    (tmp_path / "ami.pkr.hcl").write_text(TEMPLATE.read_text())
    emptied(tmp_path)
    account.launched = builder.authorize
    arguments = "build", "-only=amazon-ebs.arm64", *variables(tmp_path, rehearsal=builder.place, ssh_from=FROM)
    said, code = run_packer(tmp_path, *arguments, tmp_path / "ami.pkr.hcl", account=account)
    assert (account.denied, code) == ([], 0), said
    asked = [form for form in account.asked if form.get("Action") in baking_role.reference()]
    for statement in account.policy:
        rest = [one for one in account.policy if one is not statement]
        assert any(baking_role.denied(rest, form, account.tags_of) for form in asked), statement["Sid"]


FOREIGN = [
    {"Action": "TerminateInstances", "InstanceId.1": "i-0foreign"},
    {"Action": "StopInstances", "InstanceId.1": "i-0foreign"},
    {"Action": "ModifyInstanceAttribute", "InstanceId": "i-0foreign"},
    {"Action": "CreateImage", "InstanceId": "i-0foreign"},
    {"Action": "DeregisterImage", "ImageId": "ami-0foreign"},
    {"Action": "ModifyImageAttribute", "ImageId": "ami-0foreign"},
    {"Action": "DeleteSnapshot", "SnapshotId": "snap-0foreign"},
    {"Action": "DeleteVolume", "VolumeId": "vol-0foreign"},
    {"Action": "DeleteSecurityGroup", "GroupId": "sg-0foreign"},
    {"Action": "AuthorizeSecurityGroupIngress", "GroupId": "sg-0foreign"},
    {"Action": "DeleteKeyPair", "KeyName": "foreign"},
    {"Action": "CreateTags", "ResourceId.1": "i-0foreign", "Tag.1.Key": "chatd:git-sha", "Tag.1.Value": "x"},
    {"Action": "RunInstances", "ImageId": "ami-0foreign", "KeyName": "foreign"},
    {"Action": "CreateKeyPair", "KeyName": "untagged"},
]


@pytest.mark.parametrize("form", FOREIGN, ids=lambda form: form["Action"])
def test_role_leaves_other_resources_alone(form):
    """The policy permits no change of a resource without the tag; one with the tag shows that the check can pass."""
    statements = baking_role.policy()

    def tags_of(name):
        return ({} if "foreign" in name else {"chatd:git-sha": "x"}), cloud.DEBIAN

    assert baking_role.denied(statements, form, tags_of)
    own = {key: value.replace("0foreign", "0own").replace("foreign", "own") for key, value in form.items()}
    if form["Action"] not in ("CreateTags", "CreateKeyPair", "RunInstances", "CreateImage"):
        assert baking_role.denied(statements, own, tags_of) == []


def test_former_policy_permits_other_instances():
    """The negative control: without conditions, the check finds that any instance may be ended."""
    statements = [{"Effect": "Allow", "Action": ["ec2:TerminateInstances"], "Resource": "*"}]
    assert baking_role.denied(statements, FOREIGN[0], lambda name: ({}, baking_role.OWNER)) == []


@pytest.mark.parametrize(
    "condition", [{"StringLike": {"aws:ResourceTag/chatd:git-sha": "*"}}, {"StringLike": {"ec2:Vpc": "*"}}]
)
def test_condition_on_a_key_that_an_action_lacks_denies_it(condition):
    """EC2 does not send every key with every action: CreateKeyPair has no tags of a resource."""
    statements = [{"Effect": "Allow", "Action": "ec2:CreateKeyPair", "Resource": "*", "Condition": condition}]
    form = {"Action": "CreateKeyPair", "KeyName": "own"}
    assert baking_role.denied(statements, form, lambda name: ({"chatd:git-sha": "x"}, baking_role.OWNER))


# The upgrade of Debian


def upgrade(account, builder, folder):
    """Bake with the script that upgrades Debian, and no other; return Packer's output and status."""
    shutil.copy(TEMPLATE, folder)
    emptied(folder)
    shutil.copy(TEMPLATE.with_name("upgrade.sh"), folder)
    account.launched = builder.authorize
    given = variables(folder, rehearsal=builder.place, ssh_from=FROM)
    return run_packer(folder, "build", "-only=amazon-ebs.arm64", *given, folder / TEMPLATE.name, account=account)


def version(builder):
    return builder.run("dpkg-query", "--show", "--showformat=${Version}", cloud.UPGRADED)


def test_builder_is_upgraded_and_rebooted(account, builder, tmp_path):
    """The bake installs Debian's upgrades, and continues after one reboot."""
    assert version(builder) == "1"
    said, code = upgrade(account, builder, tmp_path)
    assert code == 0, said
    assert version(builder) == "2"
    assert builder.reboots() == 1
    assert len(account.requests("CreateImage")) == 1


CUT = r"""
for process in /proc/[0-9]*; do
    case $(tr '\0' ' ' <"$process/cmdline") in sshd*admin@*) kill -9 "${process#/proc/}" ;; esac
done
exit 1
"""
"""Ends the connections of Packer, and the script."""


@pytest.mark.parametrize("marked", [True, False])
def test_lost_connection_does_not_end_the_upgrade(account, builder, tmp_path, marked):
    """A bake whose connection breaks during the upgrade makes no image; without the early mark it would."""
    account.launched = builder.authorize
    text = TEMPLATE.with_name("upgrade.sh").read_text()
    mark = ": >/run/chatd-upgrading\n"
    assert mark in text
    place = text.index('say "upgrading Debian"')
    text = text[:place] + CUT + text[place:]
    shutil.copy(TEMPLATE, tmp_path)
    emptied(tmp_path)
    (tmp_path / "upgrade.sh").write_text(text if marked else text.replace(mark, ""))
    template = tmp_path / TEMPLATE.name
    retries = "max_retries = 60"
    assert retries in template.read_text()
    template.write_text(template.read_text().replace(retries, "max_retries = 1"))
    given = variables(tmp_path, rehearsal=builder.place, ssh_from=FROM)
    said, code = run_packer(tmp_path, "build", "-only=amazon-ebs.arm64", *given, template, account=account)
    assert (code, len(account.requests("CreateImage"))) == ((1, 0) if marked else (0, 1)), said


def test_no_image_without_debians_servers(account, builder, tmp_path):
    """A bake that cannot upgrade its base leaves no image."""
    with builder.path("/etc/apt/sources.list").open("a") as file:
        file.write("deb [trusted=yes] file:/srv/nothing ./\n")
    said, code = upgrade(account, builder, tmp_path)
    assert code == 1
    assert "does not have a Release file" in said or "Failed to fetch" in said
    assert account.requests("CreateImage") == []
    assert account.left() == NOTHING_LEFT


# Session Manager


SSM_AGENT = "amazon-ssm-agent"
PLUGIN = """#!{python}
import json, os, socket, sys, threading
session, region, operation, profile, asked, url = sys.argv[1:]
assert (operation, json.loads(session)["SessionId"]) == ("StartSession", "packer-0"), sys.argv
parameters = json.loads(asked)["Parameters"]
assert parameters["portNumber"] == ["22"], parameters
def pump(source, target):
    while data := source.recv(1 << 16):
        target.sendall(data)
    target.shutdown(socket.SHUT_WR)
with socket.create_server(("127.0.0.1", int(parameters["localPortNumber"][0]))) as server:
    while True:
        outer = server.accept()[0]
        inner = socket.create_connection(("127.0.0.1", {port}))
        for pair in ((outer, inner), (inner, outer)):
            threading.Thread(target=pump, args=pair, daemon=True).start()
"""
"""A double of AWS's session-manager-plugin, which forwards a port to the builder."""


def through_session(account, builder, folder, *changes):
    """Bake through Session Manager in a network without public addresses; return Packer's output and status."""
    text = TEMPLATE.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / "ami.pkr.hcl").write_text(text)
    emptied(folder)
    (folder / "bin").mkdir()
    plugin = folder / "bin" / "session-manager-plugin"
    plugin.write_text(PLUGIN.format(python=sys.executable, port=builder.port))
    plugin.chmod(0o755)
    account.launched = builder.authorize
    account.booted = lambda script: builder.user_data(script) or account.connected.add(account.instance)
    account.profile("builder")
    account.close_network()
    ssm = agent(builder, folder, SSM_AGENT)
    given = variables(
        folder,
        agents=json.dumps({"arm64": [ssm]}),
        session_profile="builder",
        subnet_id=account.subnet,
    )
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    return run_packer(
        folder, "build", "-only=amazon-ebs.arm64", *given, folder / "ami.pkr.hcl", account=account, PATH=path
    )


def test_bake_through_session_manager(account, builder, tmp_path):
    """A builder without a public address installs the SSM agent at boot, and no port is opened to it."""
    said, code = through_session(account, builder, tmp_path)
    assert code == 0, (said, account.asked[-3:])
    (launch,) = account.requests("RunInstances")
    assert launch["IamInstanceProfile.Name"] == "builder"
    assert account.subnet in launch.values()
    assert "true" not in [value for name, value in launch.items() if name.endswith("AssociatePublicIpAddress")]
    assert account.requests("AuthorizeSecurityGroupIngress") == []
    assert len(account.requests("CreateImage")) == 1
    assert account.denied == []
    assert [one["DocumentName"] for one in account.sessions] == ["AWS-StartPortForwardingSession"]
    builder.run("systemctl", "is-active", f"{SSM_AGENT}.service")


def test_session_manager_needs_the_agent(account, builder, tmp_path):
    """The negative control: a builder whose agent is not installed is never connected."""
    changes = ("user_data     = local.session ? local.install.arm64 : null", ""), ('"10m"', '"3s"')
    said, code = through_session(account, builder, tmp_path, *changes)
    assert code == 1
    assert account.sessions == []
    assert "Timeout waiting for SSH" in said


def test_agent_of_the_session_is_not_installed_again(builder, bundle, tmp_path):
    """A second installation would restart the agent that carries the connection, and so does its stop."""
    ssm = agent(builder, tmp_path, SSM_AGENT)
    builder.user_data("\n".join(["#!/bin/sh", f"AGENT='{ssm['sha256']} {ssm['url']}'", SESSION.read_text()]))
    since = builder.run("systemctl", "show", "--property=ActiveEnterTimestampMonotonic", f"{SSM_AGENT}.service")
    builder.run("sh", "-ec", "mkdir -p /var/lib/amazon/ssm/i-0123 /var/log/amazon/ssm")
    code, said = provision(builder, bundle, ssm)
    assert code == 0, said
    now = builder.run("systemctl", "show", "--property=ActiveEnterTimestampMonotonic", f"{SSM_AGENT}.service")
    assert now == since
    builder.run("systemctl", "stop", f"{SSM_AGENT}.service")  # as at the end of the builder
    assert builder.run("ls", "/var/lib/amazon/ssm", "/var/log/amazon").split() == [
        "/var/lib/amazon/ssm:",
        "/var/log/amazon:",
    ]


def test_wrong_agent_is_not_installed_at_boot(builder, tmp_path):
    ssm = agent(builder, tmp_path, SSM_AGENT)
    script = "\n".join(["#!/bin/sh", f"AGENT='{'0' * 64} {ssm['url']}'", SESSION.read_text()])
    with pytest.raises(AssertionError, match="did NOT match"):
        builder.user_data(script)
    assert "not-found" in builder.run("systemctl", "show", "--property=LoadState", f"{SSM_AGENT}.service")


SSM_URL = "https://example.com/arm64/amazon-ssm-agent.deb"


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({}, "needs the subnet of the builder: --var subnet_id="),
        ({"subnet_id": "subnet-1"}, "needs the SSM agent for arm64 and amd64: add it to agents.json"),
        (
            {"subnet_id": "subnet-1", "agents": json.dumps({"arm64": [{"url": SSM_URL}]})},
            "needs the SSM agent for amd64: add it",
        ),
        (
            {"subnet_id": "subnet-1", "agents": json.dumps({key: [{"url": SSM_URL}] for key in ("arm64", "amd64")})},
            "needs session-manager-plugin: https://",
        ),
    ],
)
def test_needs_of_a_session_are_reported(monkeypatch, given, fault):
    monkeypatch.setenv("PATH", "")
    script = program(ROOT / "scripts" / "bake")
    with pytest.raises(script.BakeError, match=fault):
        script.check_session({"session_profile": "builder"} | given, ["arm64", "amd64"])
    script.check_session({}, ["arm64"])


# Whole bakes


def drop_in(*lines):
    text = "\\n".join(["[Service]", *lines])
    folder = "/etc/systemd/system/chatd.service.d"
    return f"mkdir -p {folder} && printf '{text}\\n' >{folder}/z-broken.conf"


def instead(name, *lines):
    """Put a script before a command of the machine's."""
    text = "\\n".join(["#!/bin/sh", *lines])
    return f"printf '{text}\\n' >/usr/local/bin/{name} && chmod +x /usr/local/bin/{name}"


@pytest.mark.parametrize(("architecture", "machine"), [("arm64", "aarch64"), ("amd64", "x86_64")])
def test_bundle_has_all_locked_wheels(bundle, architecture, machine):
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
        (drop_in("Environment=CHATD_ROOMS=kitchen"), "refused with 404"),
        (drop_in("TimeoutStopSec=1ms", "ExecStop=/bin/sleep 9"), "did not stop cleanly"),
        (instead("tar", '/usr/bin/tar "$@"', "echo >>$(ls /tmp/tmp.*/wheels/attrs-*.whl)"), "DO NOT MATCH THE HASHES"),
    ],
    ids=["does not start", "does not serve", "does not stop", "a wheel of another hash"],
)
def test_provisioning_fails_on_a_broken_machine(builder, bundle, broken, fault):
    builder.run("sh", "-ec", broken)
    code, said = provision(builder, bundle)
    assert code
    assert fault in said


def test_agent_with_another_hash_is_not_installed(builder, bundle, tmp_path):
    code, said = provision(builder, bundle, agent(builder, tmp_path) | {"sha256": "0" * 64})
    assert code
    assert "did NOT match" in said
    assert not builder.path(cloud.FOLDER).exists()


def test_failed_provisioner_leaves_nothing(account, builder, tmp_path):
    builder.run("sh", "-ec", instead("tar", "exit 7"))
    result = bake(account, builder, tmp_path, "--no-agents")
    assert (result.returncode, result.stdout) == (1, ""), result.stderr
    assert "exit status: 7" in result.stderr
    assert len(account.requests("RunInstances")) == 1
    assert account.requests("CreateImage") == account.requests("CopyImage") == []
    assert account.left() == NOTHING_LEFT


def test_stopped_bake_leaves_nothing(account, builder, tmp_path):
    """Packer lets the script on the builder end, here with success, and then removes all the same."""
    script = instead("sudo", "echo here", "read -r _ </run/go")
    builder.run("sh", "-ec", f"{script}; mkfifo --mode=666 /run/go")
    with cloud.baking(account, builder, tmp_path, "--no-agents") as process:
        told = Lines(process.stderr)
        told.wait("here$")
        process.terminate()
        told.wait("Cancelling build after receiving")
        builder.run("sh", "-ec", "echo >/run/go")
        code = process.wait(LONG)
        told.close()
    assert code == 130, told.text
    assert account.left() == NOTHING_LEFT


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
        (["--no-agents"], "no region"),
        (["--no-agents", "--region=r", "--arch=mips"], "invalid choice"),
        (["--agents=/nowhere", "--region=r"], "/nowhere"),
    ],
)
def test_wrong_usage_is_reported(arguments, fault):
    result = command(*arguments)
    assert result.returncode == 2
    assert fault in result.stderr


PACKAGES = [{"url": "https://example.com/a.deb", "sha256": "0" * 64}]


@pytest.mark.parametrize(
    ("agents", "arch", "lacking"),
    [
        ({"arm64": PACKAGES}, "arm64", None),
        ({"arm64": PACKAGES, "amd64": PACKAGES}, None, None),
        ({"amd64": PACKAGES}, "arm64", "arm64"),
        ({"arm64": PACKAGES}, None, "amd64"),
        ({"arm64": []}, "arm64", "arm64"),
        ([], "arm64", "arm64"),
        ({"arm64": "a.deb"}, "arm64", "arm64"),
        ({"arm64": ["a.deb"]}, "arm64", "arm64"),
        ({"arm64": [{"url": "https://example.com/a.deb"}]}, "arm64", "arm64"),
    ],
)
def test_agents_need_packages_for_each_architecture(tmp_path, agents, arch, lacking):
    """Packer would make an image without agents, whose group cannot scale."""
    path = tmp_path / "agents.json"
    path.write_text(json.dumps(agents))
    result = command(f"--agents={path}", "--region=r", "--packer=no-such-packer", *([f"--arch={arch}"] if arch else []))
    if lacking is None:
        assert "no-such-packer is not installed" in result.stderr
        return
    assert result.returncode == 2
    assert f"agents.json: no packages for {lacking}, each with url and sha256: use scripts/agents" in result.stderr


def test_limits_of_other_tools_do_not_reach_packer(tmp_path, monkeypatch):
    """AWS_MAX_ATTEMPTS, the retries of botocore, would limit how often Packer looks at the image."""
    tool = tmp_path / "packer"
    tool.write_text('#!/bin/sh\nenv >"$1"\n')
    tool.chmod(0o755)
    for name in ("AWS_MAX_ATTEMPTS", "AWS_TIMEOUT_SECONDS", "AWS_PROFILE"):
        monkeypatch.setenv(name, "1")
    program(ROOT / "scripts" / "bake").packer(str(tool), str(tmp_path / "env"))
    given = (tmp_path / "env").read_text()
    assert re.findall("AWS_(?:MAX_ATTEMPTS|TIMEOUT_SECONDS|PROFILE)=", given) == ["AWS_PROFILE="]


def test_missing_packer_is_reported():
    result = command("--no-agents", "--region=r", "--packer=no-such-packer")
    assert result.returncode == 1
    assert "no-such-packer is not installed" in result.stderr
