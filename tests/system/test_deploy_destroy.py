"""scripts/deploy destroy, changes that CloudFormation cannot make, and stacks from a snapshot."""

import signal
import sys

import pytest
from support.change_sets import deployed, fixed_name, parsed
from support.deployments import (
    BACK,
    DEPLOY,
    DONE,
    FAILED,
    REFUSED,
    REGION,
    STACK,
    STUCK,
    VERSION,
    DeploymentAccount,
    deploy,
    end,
)
from support.formation import TEMPLATE
from support.wire import Fault
from system.test_deploy_check import empty_outcome
from system.test_deploy_controls import outcome

ORDER = ["UpdateAutoScalingGroup", "DeleteCluster", "DeleteSubnetGroup", "DeleteParameter", "DeleteStack"]


@pytest.fixture
def stored(account):
    """An account whose stack has its own store."""
    account.fleet.store()
    return account


def gone(account):
    """Return whether nothing but a final snapshot is left."""
    snapshots = [*account.memorydb.snapshots]
    assert [one[:13] for one in snapshots] == ["chatd-final-2"]
    left = account.memorydb.clusters or STACK in account.memorydb.subnet_groups or account.recorded()[0]
    return account.stack.deleted and not left


def test_destroy_keeps_a_final_snapshot(stored):
    """The instances end before the snapshot, and the store before the stack; a second run finds no stack."""
    result = deploy(stored, "destroy", "--json", typed=STACK)
    assert (result.returncode, gone(stored)) == (DONE, True), result.stderr
    assert [one.partition(":")[2] for one in stored.asked if one.partition(":")[2] in ORDER] == ORDER
    assert result.json["snapshot"] == next(iter(stored.memorydb.snapshots))
    again = deploy(stored, "destroy", typed=STACK)
    assert (again.returncode, "no stack chatd" in again.stderr) == (FAILED, True)


@pytest.mark.parametrize("typed", ["", "yes", "CHATD", None])
def test_destroy_needs_the_name(stored, typed):
    """Whatever else is typed, or nothing, changes nothing."""
    result = deploy(stored, "destroy", typed=typed)
    assert (result.returncode, "not confirmed" in result.stderr) == (FAILED, True), result.stderr
    assert STACK in stored.memorydb.clusters
    end(stored, result, FAILED)


@pytest.mark.parametrize("step", ORDER)
def test_destroy_continues_after_a_kill(stored, step):
    """After a kill at any step a second run removes the rest, with one snapshot."""
    stored.fault(step, "kill", done=True)
    assert deploy(stored, "destroy", typed=STACK).returncode == -signal.SIGKILL
    again = deploy(stored, "destroy", typed=STACK)
    assert (again.returncode, gone(stored)) == (DONE, True), again.stderr


def test_destroy_asks_with_the_account_and_the_region(stored):
    """The name of a stack may be the same in another account."""
    result = deploy(stored, "destroy", typed="")
    assert f"the stack chatd in {REGION} of the account {stored.owner} and everything in it" in result.stderr


def refused(account, why):
    """Destroy, and check that it is refused with a reason before anything changes."""
    result = deploy(account, "destroy", typed=STACK)
    assert (result.returncode, why in result.stderr) == (REFUSED, True), result.stderr
    assert not {one.partition(":")[2] for one in account.asked} & {*ORDER}


def test_destroy_respects_the_termination_protection(stored):
    """CloudFormation would refuse the stack only after its instances and its store were gone."""
    stored.stack.protected = True
    refused(stored, "--no-enable-termination-protection --stack-name chatd")
    stored.stack.protected = False
    assert deploy(stored, "destroy", typed=STACK).returncode == DONE


def test_destroy_refuses_a_stack_of_something_else(stored):
    """A stack of another template may have a group and a cluster of its name."""
    template = {"Parameters": {"ImageId": {"Type": "String"}}, "Resources": {"Topic": {"Type": "AWS::SNS::Topic"}}}
    stored.stack.deployed = deployed(template, {"ImageId": stored.old}, STACK)
    refused(stored, "chatd is not a stack of scripts/deploying/stack.yaml")


@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        ("UPDATE_IN_PROGRESS", "scripts/deploy abort"),
        ("CREATE_IN_PROGRESS", "aws cloudformation delete-stack --stack-name chatd"),
    ],
)
def test_destroy_refuses_a_stack_that_changes(stored, status, remedy):
    stored.stack.status = status
    refused(stored, f"chatd is {status}: wait, or ")
    refused(stored, remedy)


@pytest.mark.parametrize("status", ["ROLLBACK_COMPLETE", "REVIEW_IN_PROGRESS"])
def test_destroy_spares_what_is_not_of_the_stack(stored, status):
    """What made the creation of a stack fail because of its name is not deleted with it."""
    stored.stack.status = status
    stored.stack.held = lambda: None
    if status == "REVIEW_IN_PROGRESS":
        stored.stack.deployed = None
    result = deploy(stored, "destroy", typed=STACK)
    assert (result.returncode, stored.stack.deleted) == (DONE, True), result.stderr
    assert (STACK in stored.memorydb.clusters, STACK in stored.memorydb.subnet_groups) == (True, True)
    assert "autoscaling:UpdateAutoScalingGroup" not in stored.asked


def spares_others(account):
    """Fail the creation of a stack because of a cluster, make a group of its name, and destroy only the stack."""
    image = account.image(VERSION)
    account.fleet.store()
    assert deploy(account, "ship", "--image", image).returncode == BACK
    account.call("ec2", "create_launch_template", LaunchTemplateName="other", LaunchTemplateData={"ImageId": image})
    group = {"AvailabilityZones": [f"{REGION}a"], "LaunchTemplate": {"LaunchTemplateName": "other"}}
    arguments = {"AutoScalingGroupName": STACK, "MinSize": 1, "MaxSize": 1, **group}
    account.call("autoscaling", "create_auto_scaling_group", **arguments)
    result = deploy(account, "destroy", "--json", typed=STACK)
    assert (result.returncode, account.stack.deleted, result.json.get("snapshot")) == (DONE, True, None), result.stderr
    assert (account.fleet.group["MinSize"], STACK in account.memorydb.clusters) == (1, True)


def test_failed_creation_leaves_what_others_own(chat):
    """The group and the store of another owner, whose names kept a stack from being created, stay."""
    with DeploymentAccount(chat.url) as account:
        spares_others(account)


def test_removed_care_for_others_fails_the_test(chat, tmp_path):
    """The control: without the list of the stack's resources they are deleted."""
    change = ("deploying/destroy.py", 'if "Group" not in mine:', "if False:")
    assert empty_outcome(chat, tmp_path / "unsafe", change, spares_others) == "fails"


def test_destroy_spares_another_store(account):
    """A stack with a store of its own address deletes no cluster, whatever its name."""
    account.stack.set(StoreParameter="/chatd/store")
    account.fleet.store()
    account.stack.held = lambda: None
    result = deploy(account, "destroy", typed=STACK)
    assert (result.returncode, account.stack.deleted) == (DONE, True), result.stderr
    assert (STACK in account.memorydb.clusters, account.memorydb.snapshots) == (True, {})


def test_failed_deletion_needs_manual_action(stored):
    """A deletion that fails ends with exit status 5, and its reason."""
    stored.stack.held = lambda: "[Vpc]. it has dependencies"
    result = deploy(stored, "destroy", typed=STACK)
    assert (result.returncode, "[Vpc]. it has dependencies" in result.stderr) == (STUCK, True), result.stderr
    stored.stack.held = lambda: None
    assert deploy(stored, "destroy", typed=STACK).returncode == DONE


def test_denied_deletion_can_be_continued(stored):
    """A denied call after the first change ends with exit status 5, and the error names the action."""
    stored.fault("DeleteCluster", Fault("AccessDeniedException", "not authorized", 400))
    result = deploy(stored, "destroy", typed=STACK)
    assert (result.returncode, "memorydb:DeleteCluster" in result.stderr) == (STUCK, True), result.stderr


# What cannot be changed


@pytest.mark.parametrize(
    ("parameter", "reason"), [("StorePort=7000", "Port"), ("SnapshotName=chatd-final-20260101000000", "SnapshotName")]
)
def test_impossible_changes_are_refused(account, parameter, reason):
    """A plan that would replace what has a fixed name is refused, whatever is allowed."""
    allowed = [f"--allow={name}" for name in account.stack.deployed.template["Resources"]]
    result = deploy(account, "plan", account.new, f"--parameter={parameter}", *allowed)
    end(account, result, REFUSED)
    assert f"Store (AWS::MemoryDB::Cluster, replaced) for {reason}" in result.stderr
    assert "create another stack" in result.stderr


def test_new_nodes_of_the_store_may_be_allowed(account):
    """A change of the store in place needs only permission."""
    arguments = ["--parameter=StoreNodeType=db.t4g.medium", "--allow=Store", "--allow=StoreUrl"]
    end(account, deploy(account, "plan", account.new, *arguments), DONE, planned=[f"chatd-{account.new}"])


def test_fixed_names_are_known():
    """scripts/deploy knows every type of resource that the template names."""
    sys.path.insert(0, str(DEPLOY.parent))
    try:
        from deploying.stack import NAMES
    finally:
        sys.path.pop(0)
    resources = parsed(TEMPLATE.read_text())["Resources"].values()
    assert {one["Type"]: name for one in resources if (name := fixed_name(one))} == NAMES


UNSAFE = {
    "an impossible change is planned": (
        ("deploying/stack.py", "        if stuck:", "        if False:"),
        lambda account: test_impossible_changes_are_refused(account, "StorePort=7000", "Port"),
    ),
    "any name confirms": (
        ("deploying/destroy.py", "if not confirm(", "if not confirm and confirm("),
        lambda account: test_destroy_needs_the_name(with_store(account), "yes"),
    ),
    "the store goes while instances write": (
        ("deploying/destroy.py", "                self._stop(mine)\n", ""),
        lambda account: test_destroy_keeps_a_final_snapshot(with_store(account)),
    ),
    "the store stays": (
        ("deploying/destroy.py", "                self._drop_store(mine)\n", ""),
        lambda account: test_destroy_keeps_a_final_snapshot(with_store(account)),
    ),
    "another store is deleted": (
        ("deploying/destroy.py", 'if "Store" in mine else None', "if True else None"),
        test_destroy_spares_another_store,
    ),
    "the group of another stack ends": (
        ("deploying/destroy.py", 'if "Group" not in mine:', "if False:"),
        lambda account: test_destroy_spares_what_is_not_of_the_stack(with_store(account), "ROLLBACK_COMPLETE"),
    ),
    "a failed resource counts": (
        ("deploying/destroy.py", 'if one["ResourceStatus"] not in ABSENT', "if True"),
        lambda account: test_destroy_spares_what_is_not_of_the_stack(with_store(account), "ROLLBACK_COMPLETE"),
    ),
    "the protection shows too late": (
        ("deploying/destroy.py", "if state.protected:", "if False:"),
        lambda account: test_destroy_respects_the_termination_protection(with_store(account)),
    ),
    "any stack is destroyed": (
        ("deploying/destroy.py", "{IMAGE, STORE} <= state", "set() <= state"),
        lambda account: test_destroy_refuses_a_stack_of_something_else(with_store(account)),
    ),
    "the record goes last": (
        (
            "deploying/destroy.py",
            'self._until(lambda: self._gone(state), "the stack is being deleted")\n',
            (
                'self._until(lambda: self._gone(state), "the stack is being deleted")\n'
                "            Record(self._stack.account, self._stack.name).forget()\n"
            ),
        ),
        lambda account: test_destroy_keeps_a_final_snapshot(with_store(account)),
    ),
    "the snapshot is not awaited": (
        ("deploying/destroy.py", "        if cluster:\n", "        if False:\n"),
        lambda account: test_destroy_keeps_a_final_snapshot(with_store(account)),
    ),
}


def with_store(account):
    account.fleet.store()
    return account


@pytest.mark.parametrize("safety", UNSAFE)
def test_removed_safety_of_destroy_fails_its_test(chat, tmp_path, safety):
    assert outcome(chat, tmp_path / "unsafe", *UNSAFE[safety]) == "fails"
