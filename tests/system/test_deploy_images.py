"""The images that scripts/deploy bakes and removes, its permissions, and its command line."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
from support.deployments import (
    ALLOWED,
    DEPLOY,
    DONE,
    FAILED,
    INTERRUPTED,
    REGION,
    VERSION,
    WRONG,
    checkout,
    deploy,
    deploying,
    end,
    named,
)
from support.servers import LONG, ROOT, Lines

COMMANDS = "bake", "plan", "rollout", "verify", "rollback", "abort", "gc", "ship"
BAKE = """#!/bin/sh
echo "$@" >>"$0.asked"
cat "$0.made"
"""


# Removing images


def test_gc_keeps_images_in_use(account):
    """`gc` keeps images that run, are configured, are verified for a stack or are recent; --yes removes the others."""
    launched, parameter, staging, stopped = (account.image(VERSION, days=days) for days in (20, 21, 22, 23))
    account.fleet.aim(launched)
    account.stack.parameters = account.stack.parameters | {"ImageId": parameter}
    account.label(staging, stack="staging")
    account.label(account.image(VERSION), stack="testing")
    (instance,) = account.call("ec2", "run_instances", ImageId=stopped, MinCount=1, MaxCount=1)["Instances"]
    account.call("ec2", "stop_instances", InstanceIds=[instance["InstanceId"]])
    account.image(None, days=30)
    kept, *gone = (account.image(VERSION, "amd64", days=days) for days in (11, 12))
    gone = [account.new, *gone, account.image(VERSION, days=13)]
    before = {*account.ec2.amis}, len(account.ec2.snapshots)

    result = deploy(account, "gc", "--keep=1", "--json")
    assert (result.returncode, result.json["images"], result.json["removed"]) == (DONE, gone, False), result.stderr
    assert ({*account.ec2.amis}, len(account.ec2.snapshots)) == before
    why = {one["image"]: one["why"] for one in result.json["kept"]}
    assert why.keys() >= {launched, parameter, staging, stopped, kept, account.old}
    assert why[staging] == "it is verified for staging"
    assert "runs it" in why[stopped]
    assert "launches it" in why[launched]
    assert "names it" in why[parameter]

    result = deploy(account, "gc", "--keep=1", "--yes")
    assert result.returncode == DONE, result.stderr
    assert {*account.ec2.amis} == before[0] - {*gone}
    assert len(account.ec2.snapshots) == before[1] - len(gone)
    assert deploy(account, "gc", "--keep=1", "--yes", "--json").json["images"] == []


def test_gc_reports_a_remaining_snapshot(account):
    """A snapshot that cannot be deleted is reported, and `gc` succeeds."""
    account.image(VERSION, days=9)
    account.snapshots = "missing-permissions"
    result = deploy(account, "gc", "--keep=1", "--yes")
    assert (result.returncode, "was not deleted: missing-permissions" in result.stderr) == (DONE, True)


# Baking


def baker(folder, image, script=BAKE):
    """Make a committed checkout whose scripts/bake reports an image."""
    command = checkout(folder)
    (folder / "scripts" / "bake").write_text(script)
    (folder / "scripts" / "bake").chmod(0o755)
    made = {"version": VERSION, "images": [{"architecture": "arm64", "region": REGION, "image": image}]}
    (folder / "scripts" / "bake.made").write_text(json.dumps(made))
    (folder / ".gitignore").write_text("*.asked\n__pycache__\n")
    git = ["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@example.com"]
    for arguments in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "All"]):
        subprocess.run([*git, *arguments], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    return command, commit, lambda: (folder / "scripts" / "bake.asked").read_text().splitlines()


def test_ship_bakes_each_commit_once(account, tmp_path):
    """`ship` bakes an image for the commit unless there is one, and a dirty checkout bakes again."""
    account.script, commit, asked = baker(tmp_path, account.new)
    result = deploy(account, "ship", "--", "--no-agents")
    end(account, result, DONE, runs=account.new, good=account.new, record=[account.old, account.new])
    assert asked() == [f"--json --region {REGION} --arch arm64 --no-agents"]
    made = account.image(VERSION, **{"git-sha": commit})
    result = deploy(account, "ship", "--", "--no-agents")
    end(account, result, DONE, runs=made, good=made, record=[account.old, account.new, made])
    assert len(asked()) == 1
    (tmp_path / "README.md").write_text("a change\n")
    (tmp_path / "scripts" / "bake").write_text("#!/bin/sh\necho 'bake: no' >&2\nexit 1\n")
    result = deploy(account, "ship", "--json")
    assert (result.returncode, result.json["error"]) == (FAILED, "scripts/bake failed, see above")
    assert "bake: no" in result.stderr


def test_bake_runs_scripts_bake(account, tmp_path):
    """`bake` passes its options on to scripts/bake, and reports its images and its failure."""
    account.script, _, asked = baker(tmp_path, "ami-1")
    result = deploy(account, "bake", "--agents", "agents.json", "--arch=arm64")
    assert (result.returncode, result.stdout) == (DONE, f"ami-1 {REGION} arm64\n"), result.stderr
    assert asked() == [f"--json --region {REGION} --agents agents.json --arch=arm64"]
    assert deploy(account, "bake", "--json").json["images"][0]["image"] == "ami-1"
    account.script = DEPLOY
    result = deploy(account, "bake", "--no-agents", "--packer=no-such-packer")
    assert (result.returncode, "no-such-packer is not installed" in result.stderr) == (FAILED, True)


def test_interrupt_waits_for_the_bake(account, tmp_path):
    """An interrupt reaches scripts/bake, and the command ends after it."""
    script = """#!/bin/sh
trap 'kill $!; echo cleaned >&2; exit 130' TERM
sleep 60 >/dev/null 2>&1 &
echo began >&2
wait
"""
    account.script, _, _ = baker(tmp_path, "ami-1", script)
    with deploying(account, "ship") as process:
        printed = Lines(process.stderr)
        printed.wait("began")
        process.send_signal(signal.SIGINT)
        code = process.wait(LONG)
        printed.close()
    assert (code, [*printed][-2:]) == (INTERRUPTED, ["cleaned", "deploy: interrupted"])


# Permissions


def test_calls_match_the_allow_list():
    """The calls in the scripts are the allowed ones.  Each account double asserts that it gets no others."""
    text = "".join(path.read_text() for path in (DEPLOY.parent / "deploying").glob("*.py"))
    called = re.findall(r"\.(?:call|pages)\(\s*\"([a-z0-9]+)\", \"([a-z_]+)\"", text)
    assert {named(service, operation.title().replace("_", "")) for service, operation in called} == ALLOWED


def test_documented_policy_matches_the_calls():
    """The policy allows the calls of the scripts, and the deletion of snapshots with their image."""
    (policy,) = re.findall(r"```json\n(\{\n  \"Version.*?)```", (ROOT / "docs" / "deploy.md").read_text(), re.DOTALL)
    statements = json.loads(policy)["Statement"]
    actions = [action for statement in statements for action in statement["Action"]]
    assert sorted(actions) == sorted({*ALLOWED, "ec2:DeleteSnapshot"})
    reads = re.compile(r"\w+:(Describe|Get)\w+")
    free = [one for statement in statements if statement["Resource"] == "*" for one in statement["Action"]]
    assert [action for action in free if not reads.fullmatch(action)] == []


# The command line


def command(*arguments, **environment):
    """Run scripts/deploy with a Python that has no packages."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "PYTHON"))}
    return subprocess.run(
        [sys.executable, "-I", "-S", DEPLOY, *arguments],
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=LONG,
        check=False,
    )


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_help_has_examples_and_needs_no_packages(name):
    """--help of every command runs with the standard library alone."""
    result = command(*([name] if name else []), "--help")
    assert result.returncode == DONE, result.stderr
    assert f"  scripts/deploy {name or 'ship'}" in result.stdout
    if not name:
        assert all(f"\n  {status} " in result.stdout for status in (0, 1, 2, 3, 4, 5, 130))


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ([], "COMMAND"),
        (["plan", "ami-1"], "no region: use --region or AWS_REGION"),
        (["plan", "--region=r"], "IMAGE"),
        (["rollback", "--region=r", "--frob"], "unrecognized arguments: --frob"),
        (["ship", "--region=r", "--parameter=VpcId"], "expected NAME=VALUE"),
        (["ship", "--region=r", "--image=ami-1", "--", "--no-agents"], "scripts/bake, which is not run"),
        (["ship", "--region=r", "--timeout=soon"], "--timeout"),
        (["ship", "--region=r", "--timeout=-1"], "is not a number of minutes"),
        (["gc", "--region=r", "--keep=0"], "must be at least 1"),
    ],
)
def test_wrong_usage_is_reported(arguments, fault):
    """The last line of standard error names the fault of the command line."""
    result = command(*arguments)
    assert (result.returncode, fault in result.stderr.splitlines()[-1]) == (WRONG, True), result.stderr
