"""The images that scripts/deploy bakes and removes, its permissions, and its command line."""

import datetime as dt
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
    PROVING,
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
from support.wire import Fault

COMMANDS = "bake", "check", "plan", "rollout", "verify", "rollback", "abort", "destroy", "gc", "prove", "share", "ship"
BAKE = """#!/bin/sh
echo "$@" >>"$0.asked"
cat "$0.made"
"""


# Removing images


def test_gc_keeps_images_in_use(account):
    """`gc` keeps images that run, are configured, are verified for a stack or are recent; --yes removes the others."""
    launched, parameter, staging, stopped = (account.image(VERSION, days=days) for days in (20, 21, 22, 23))
    account.fleet.aim(launched)
    account.stack.set(ImageId=parameter)
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


def test_gc_keeps_an_image_that_ec2_protects(account):
    """A protection against deregistration keeps its image, and not those that follow."""
    protected, gone = (account.image(VERSION, days=days) for days in (9, 10))
    account.fault("DeregisterImage", Fault("OperationNotPermitted", "the image is protected", 400))
    result = deploy(account, "gc", "--keep=2", "--yes", "--json")
    assert (result.returncode, result.json["images"]) == (DONE, [gone]), result.stderr
    assert {"image": protected, "why": "ec2:DeregisterImage: the image is protected"} in result.json["kept"]
    assert f"{protected} is not removed: ec2:DeregisterImage: the image is protected" in result.stderr


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("UnauthorizedOperation", "access denied: ec2:DeregisterImage"),
        ("AuthFailure", "ec2:DeregisterImage: the credentials are invalid in this region"),
    ],
)
def test_gc_ends_when_it_may_not_remove(account, code, words):
    account.image(VERSION, days=9)
    account.fault("DeregisterImage", Fault(code, "no", 403))
    result = deploy(account, "gc", "--keep=2", "--yes")
    assert (result.returncode, words in result.stderr) == (FAILED, True)


def test_gc_keeps_shared_images_until_they_are_deprecated(account):
    """Another account may run an image that is shared with it, and this account cannot see that."""
    gone, lent, lent_until, expired = (account.image(VERSION, days=days) for days in (20, 21, 22, 23))
    for image in (lent, lent_until, expired):
        account.call("ec2", "modify_image_attribute", ImageId=image, LaunchPermission={"Add": [{"UserId": CONSUMER}]})
    now = dt.datetime.now(dt.UTC)
    account.deprecated = {lent_until: now + dt.timedelta(days=9), expired: now - dt.timedelta(days=1)}
    result = deploy(account, "gc", "--keep=2", "--json")
    assert (result.returncode, result.json.get("images")) == (DONE, [gone, expired]), result.stderr
    why = {one["image"]: one["why"] for one in result.json["kept"]}
    assert why[lent] == f"it is shared with {CONSUMER}"
    assert why[lent_until].startswith(f"it is shared with {CONSUMER} until 20")


def test_gc_of_several_regions(account):
    """`gc` looks for the needs and the newest images of each region by itself."""
    old = [account.image(VERSION, days=days) for days in (30, 31)]
    result = deploy(account, "share", old[1], "--to", OTHER, "--json")
    assert result.returncode == DONE, result.stderr
    copy = result.json["images"][OTHER]
    result = deploy(account, "gc", "--keep=1", "--in", OTHER, "--in", REGION, "--yes", "--json")
    assert (result.returncode, result.json["images"]) == (DONE, [*old]), result.stderr
    assert copy in {one["image"] for one in result.json["kept"]}
    assert copy in account.region(OTHER).amis


# Sharing


OTHER, THIRD, CONSUMER = "eu-west-1", "ap-south-1", "111122223333"


def key(account, region, manager="CUSTOMER"):
    """Make a key in a region, of the customer or of AWS; return its ARN."""
    from moto.kms import kms_backends

    made = kms_backends[account.owner][region].create_key(
        policy=None, key_usage="ENCRYPT_DECRYPT", key_spec="SYMMETRIC_DEFAULT", description="", tags=[]
    )
    made.key_manager = manager
    return made.arn


def encrypted(account, image, manager="CUSTOMER"):
    """Have the snapshot of an image be encrypted with a key, of the customer or of AWS."""
    (one,) = account.call("ec2", "describe_images", ImageIds=[image])["Images"]
    arn = key(account, REGION, manager)
    account.keys |= {two["Ebs"]["SnapshotId"]: arn for two in one["BlockDeviceMappings"]}


def permitted(account, region, image):
    return {one.get("UserId") for one in account.region(region).amis[image].launch_permissions}


def test_image_is_copied_and_shared(account):
    """The copies have the key, the tags and the date of the image, and the accounts may start all of them."""
    encrypted(account, account.new)
    at = dt.datetime(2099, 1, 2, 3, 4, 5, tzinfo=dt.UTC)
    account.deprecated[account.new] = at
    account.looks = 3
    keys = {region: key(account, region) for region in (OTHER, THIRD)}
    to = *(f"--to={region}={arn}" for region, arn in keys.items()), f"--to={REGION}"
    result = deploy(account, "share", account.new, "--account", CONSUMER, *to, "--json")
    assert result.returncode == DONE, result.stderr
    made = result.json["images"]
    assert made.keys() == {REGION, OTHER, THIRD}
    for region, image in made.items():
        own = account.region(region)
        assert permitted(account, region, image) == {CONSUMER}
        assert account.deprecated.get(image) == at
        given = {tag["key"]: tag["value"] for tag in own.amis[image].get_tags()}
        assert given["chatd:version"] == VERSION
        assert own.amis[image].state == "available"
        if region != REGION:
            assert given["chatd:copy-of"] == account.new
            assert account.keys[own.amis[image].ebs_snapshot.id] == keys[region]
            kept = {tag["key"] for tag in own.amis[image].ebs_snapshot.get_tags()}
            assert {"chatd:version", "chatd:copy-of"} <= kept, "so that gc may remove it"


def test_repeated_share_makes_no_second_copy(account):
    """An interrupted run continues: the copy that began is awaited."""
    account.fault("DescribeImages", "kill", after=4)
    deploy(account, "share", account.new, "--to", OTHER)
    begun = {*account.region(OTHER).amis}
    assert len(begun) == 1
    result = deploy(account, "share", account.new, "--to", OTHER, "--json")
    assert (result.returncode, {result.json["images"][OTHER]}) == (DONE, begun), result.stderr
    assert {*account.region(OTHER).amis} == begun


def test_share_refuses_keys_that_others_cannot_use(account):
    """Nothing is copied if the accounts could not start the image."""
    encrypted(account, account.new, "AWS")
    result = deploy(account, "share", account.new, "--account", CONSUMER)
    assert (result.returncode, "bake with --var kms_key_id=KEY" in result.stderr) == (FAILED, True), result.stderr
    encrypted(account, account.new)
    result = deploy(account, "share", account.new, "--account", CONSUMER, "--to", OTHER)
    assert (result.returncode, f"--to {OTHER}=KEY" in result.stderr) == (FAILED, True), result.stderr
    assert not account.region(OTHER).amis
    assert permitted(account, REGION, account.new) == set()


def test_share_refuses_an_earlier_copy_with_another_key(account):
    """A copy that was made with the key of EBS would be shared, and could start nowhere else."""
    encrypted(account, account.new)
    result = deploy(account, "share", account.new, "--to", OTHER, "--json")
    copy = result.json["images"][OTHER]
    account.keys[account.region(OTHER).amis[copy].ebs_snapshot.id] = key(account, OTHER, "AWS")
    result = deploy(account, "share", account.new, "--account", CONSUMER, "--to", f"{OTHER}={key(account, OTHER)}")
    assert result.returncode == FAILED, result.stdout
    assert f"the image {copy} in {OTHER} is encrypted with a key of AWS" in result.stderr
    assert f"deregister it, and run this again with --to {OTHER}=KEY" in result.stderr
    assert permitted(account, OTHER, copy) == permitted(account, REGION, account.new) == set()


def test_share_refuses_a_deprecated_image(account):
    """EC2 gives a copy no date in the past, so it would never be deprecated."""
    account.deprecated[account.new] = dt.datetime(2020, 1, 2, tzinfo=dt.UTC)
    result = deploy(account, "share", account.new, "--to", OTHER)
    assert (result.returncode, "is deprecated since 2020-01-02" in result.stderr) == (FAILED, True), result.stderr
    assert not account.region(OTHER).amis


def test_share_reports_a_failed_copy(account, tmp_path):
    """A copy that fails is named with the remedy, and one that lasts too long too."""
    account.looks = 10**6
    account.script = checkout(
        tmp_path, ("deploying/sharing.py", "COPY_SECONDS: Final = 3600", "COPY_SECONDS: Final = 60")
    )
    result = deploy(account, "share", account.new, "--to", OTHER)
    assert (result.returncode, "is still pending: run this again" in result.stderr) == (FAILED, True), result.stderr
    (copy,) = account.region(OTHER).amis.values()
    account.fault("DescribeImages", lambda: setattr(copy, "state", "failed"), after=4)
    result = deploy(account, "share", account.new, "--to", OTHER)
    assert (result.returncode, "is failed: deregister it" in result.stderr) == (FAILED, True), result.stderr


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("chatd-1.2.3-arm64-20261129-200000", "1.2.3"),
        ("chatd-2.0.0rc1-amd64-20261129-200000", "2.0.0rc1"),
        ("chatd-arm64", None),
        ("debian-13-arm64-20261129-2000", None),
    ],
)
def test_version_of_an_image_without_visible_tags(account, name, version):
    """An account to which an image is shared does not see its tags, so the name tells the version."""
    image = account.image(None)
    account.ec2.amis[image].name = name
    account.call("ec2", "create_tags", Resources=[image], Tags=[{"Key": "team", "Value": "its own"}])
    result = deploy(account, "share", image, "--to", OTHER)
    assert (result.returncode == DONE) == (version is not None), result.stderr
    assert ("has no tag chatd:version" in result.stderr) == (version is None)


# The proof


def test_copy_of_the_proof_is_not_that_of_the_commit(account):
    """`ship` finds an image by its commit, and would roll out a copy that the proof removes soon."""
    image, made, copy = account.image(VERSION, **{"git-sha": "0" * 40}), [], account._copy

    def copying(params):
        made.append({tag["Key"] for tag in params["TagSpecifications"][0]["Tags"]})
        return copy(params)

    account._copy = copying
    result = deploy(account, "prove", "--name=test", "--image", image, typed="chatd-prove-test")
    assert "Debian has no image" in result.stderr, result.stderr
    assert made == [{"chatd:version"}]


def test_proof_with_a_wrong_parameter(account):
    result = deploy(account, "prove", "--name=test", "--parameter=MinSize=two", typed="chatd-prove-test")
    assert (result.returncode, result.stderr.splitlines()[-1]) == (FAILED, "deploy: 1 problem found")
    assert "MinSize is a number, and not 'two': --parameter MinSize=NUMBER" in result.stdout


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
    """The calls in the scripts are the allowed ones, and `prove` needs one more.  Each account double asserts that."""
    called, proving = set(), set()
    for path in (DEPLOY.parent / "deploying").glob("*.py"):
        found = re.findall(r"\.(?:_?call|pages)\(\s*\"([a-z0-9-]+)\", \"([a-z_]+)\"", path.read_text())
        names = {named(service, operation.title().replace("_", "")) for service, operation in found}
        (proving if path.stem == "prove" else called).update(names)
    assert called == ALLOWED
    assert proving - ALLOWED == PROVING


def test_documented_policy_matches_the_calls():
    """The policy allows the calls of the scripts, and the deletion of snapshots with their image."""
    (policy,) = re.findall(r"```json\n(\{\n  \"Version.*?)```", (ROOT / "docs" / "deploy.md").read_text(), re.DOTALL)
    statements = json.loads(policy)["Statement"]
    actions = [action for statement in statements for action in statement["Action"]]
    assert sorted(actions) == sorted({*ALLOWED, "ec2:CreateTags", "ec2:DeleteSnapshot", "memorydb:CreateSnapshot"})
    reads = re.compile(r"\w+:(Describe|Get|List|Simulate)\w+")
    free = [one for statement in statements if statement["Resource"] == "*" for one in statement["Action"]]
    assert [action for action in free if not reads.fullmatch(action)] == []


def test_simulated_permissions_are_documented():
    """`check` simulates calls of the scripts on resources that the documented policy names."""
    sys.path.insert(0, str(DEPLOY.parent))
    try:
        from deploying.check import CHANGES, READS
    finally:
        sys.path.pop(0)
    (policy,) = re.findall(r"```json\n(\{\n  \"Version.*?)```", (ROOT / "docs" / "deploy.md").read_text(), re.DOTALL)
    documented = {}
    for one in json.loads(policy)["Statement"]:
        documented |= dict.fromkeys(one["Action"], one["Resource"])
    assert {documented[action] for action in READS} == {"*"}
    for resource, actions in CHANGES.items():
        pattern = "arn:aws:" + resource.format(here="*:ACCOUNT", stack="*" if "ssm" in resource else "chat")
        assert {documented[action] for action in actions} == {pattern}


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
        (["ship", "--region=r", "--tag=team"], "expected KEY=VALUE"),
        (["ship", "--region=r", "--image=ami-1", "--", "--no-agents"], "scripts/bake, which is not run"),
        (["ship", "--region=r", "--timeout=soon"], "--timeout"),
        (["ship", "--region=r", "--timeout=-1"], "is not a number of minutes"),
        (["gc", "--region=r", "--keep=0"], "must be at least 1"),
        (["prove", "--region=r", "--name=PROD"], "'PROD' is not four lower-case letters and digits"),
        (["prove", "--region=r", "--image=ami-1", "--", "--no-agents"], "scripts/bake, which is not run"),
        (["share", "ami-1", "--region=r"], "nothing to do: use --account or --to"),
        (["share", "ami-1", "--region=r", "--account=me"], "'me' is not the number of an account"),
    ],
)
def test_wrong_usage_is_reported(arguments, fault):
    """The last line of standard error names the fault of the command line."""
    result = command(*arguments)
    assert (result.returncode, fault in result.stderr.splitlines()[-1]) == (WRONG, True), result.stderr
