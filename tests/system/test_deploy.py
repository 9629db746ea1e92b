"""scripts/deploy as a program, against doubles of an AWS account.

tests/support/formation.py is the double of CloudFormation and of the group.  A real server runs behind the URL.
"""

import copy
import re
import signal

import pytest
from support.change_sets import parsed
from support.deployments import (
    BACK,
    DONE,
    FAILED,
    GIVEN,
    REFUSED,
    STACK,
    STUCK,
    VERSION,
    DeploymentAccount,
    deploy,
    end,
    parameters,
)
from support.formation import TEMPLATE
from support.wire import Fault


@pytest.fixture
def empty(chat):
    """An account without a stack."""
    with DeploymentAccount(chat.url) as account:
        account.old = None
        yield account


@pytest.fixture
def creating():
    """The arguments that a new stack needs."""
    return [f"--parameter={name}={value}" for name, value in GIVEN.items()]


# Success


def test_ship_rolls_out_verifies_and_labels(account):
    """`ship` replaces the instances, verifies them and records the image; a second run changes nothing."""
    result = deploy(account, "ship", "--image", account.new, "--json")
    end(account, result, DONE, runs=account.new, good=account.new, record=[account.old, account.new])
    assert account.recorded() == ([account.old, account.new], account.new)
    assert result.json == {
        "command": "ship",
        "status": 0,
        "error": None,
        "image": account.new,
        "version": VERSION,
        "commit": "",
        "instances": sorted(account.fleet.images),
        "url": account.url_of_chat,
    }
    assert account.stack.parameters == parameters(account.new)
    assert re.search(r"instances of chatd: InProgress, 50 %", result.stderr)
    again = deploy(account, "ship", "--image", account.new)
    end(account, again, DONE, runs=account.new, good=account.new, record=[account.old, account.new])
    assert again.stdout == f"{account.new} is verified: chatd {VERSION} on 2 instances, at {account.url_of_chat}\n"
    assert account.recorded()[0] == [account.old, account.new]
    assert len(account.stack.executed) == 1


def test_single_steps(account):
    """`plan`, `rollout` and `verify` do the steps of `ship` one by one, and can be repeated."""
    result = deploy(account, "plan", account.new, "--json")
    end(account, result, DONE, planned=[f"chatd-{account.new}"])
    assert result.json["change_set"] == f"chatd-{account.new}"
    changed = [(one["Action"], one["ResourceType"].rpartition(":")[2]) for one in result.json["changes"]]
    assert changed == [("Modify", "LaunchTemplate"), ("Modify", "AutoScalingGroup")]
    result = deploy(account, "rollout", account.new)
    end(account, result, DONE, runs=account.new)
    assert result.stdout == f"{account.new} is rolled out\n"
    result = deploy(account, "rollout", account.new, "--json")
    end(account, result, DONE, runs=account.new)
    assert result.json["rolled_out"] is False
    end(account, deploy(account, "verify"), DONE, runs=account.new, good=account.new, record=[account.old, account.new])
    result = deploy(account, "plan", account.new)
    end(account, result, DONE, runs=account.new, good=account.new, record=[account.old, account.new])
    assert result.stdout == "nothing to do: the stack already runs this image\n"


def test_rollback_to_last_good_ignores_alarms(account):
    """`rollback` works while an alarm is on, and the next `ship` is guarded by alarms again."""
    trigger = [account.fleet.outputs["RolloutAlarm"]]
    account.stack.triggers = trigger
    account.stack.runs(account.new)
    account.fleet.alarm("ALARM")
    end(account, deploy(account, "rollback"), DONE)
    end(account, deploy(account, "rollback"), DONE)
    assert len(account.stack.executed) == 1
    assert account.stack.triggers == []
    account.fleet.alarm("OK")
    result = deploy(account, "ship", "--image", account.new)
    end(account, result, DONE, runs=account.new, good=account.new, record=[account.old, account.new])
    assert account.stack.parameters == parameters(account.new)
    assert account.stack.triggers == trigger


def test_rollback_to_named_image(account):
    """`rollback --image` rolls out any image, and records it after its verification."""
    end(
        account,
        deploy(account, "rollback", "--image", account.new),
        DONE,
        runs=account.new,
        good=account.new,
        record=[account.old, account.new],
    )


def test_failed_rollback_needs_manual_action(account):
    """A rollback that fails ends with exit status 5."""
    account.stack.unhealthy.add(account.new)
    result = deploy(account, "rollback", "--image", account.new)
    end(account, result, STUCK)


def test_missing_stack_is_created(empty, creating):
    """`ship` with a template and parameters creates a missing stack."""
    image = empty.image(VERSION)
    end(empty, deploy(empty, "ship", "--image", image, *creating), DONE, runs=image, good=image, record=[image])
    assert empty.stack.statuses == ["REVIEW_IN_PROGRESS", "CREATE_IN_PROGRESS", "CREATE_COMPLETE"]
    assert empty.stack.parameters == parameters(image)


def test_stack_has_tags(empty, creating):
    """--tag tags a new stack, and a later run keeps the tags and adds others."""
    image, newer = empty.image(VERSION), empty.image(VERSION)
    result = deploy(empty, "ship", "--image", image, *creating, "--tag=team=chat", "--tag=note=a=b")
    assert (result.returncode, dict(empty.stack.deployed.tags)) == (DONE, {"team": "chat", "note": "a=b"}), (
        result.stderr
    )
    assert deploy(empty, "ship", "--image", newer).returncode == DONE
    assert dict(empty.stack.deployed.tags) == {"team": "chat", "note": "a=b"}
    allowed = [f"--allow={name}" for name in empty.stack.deployed.template["Resources"]]
    result = deploy(empty, "ship", "--image", image, "--tag=team=ops", *allowed)
    assert (result.returncode, dict(empty.stack.deployed.tags)) == (DONE, {"team": "ops", "note": "a=b"}), result.stderr
    result = deploy(empty, "plan", newer, "--tag=aws:a=b")
    assert (result.returncode, "aws: prefixed" in result.stderr) == (FAILED, True)


def test_failed_creation_is_reported(empty, creating):
    """A stack whose creation failed must be deleted before the next attempt."""
    image = empty.image(VERSION)
    empty.stack.unhealthy.add(image)
    result = deploy(empty, "ship", "--image", image, *creating)
    assert (result.returncode, "delete the stack" in result.stderr) == (BACK, True), result.stderr
    assert empty.recorded() == ([], None)
    again = deploy(empty, "ship", "--image", image, *creating)
    assert (again.returncode, "delete it first" in again.stderr) == (REFUSED, True), again.stderr


# Failures


def test_unhealthy_image_is_rolled_back(account):
    """CloudFormation rolls back an image whose instances do not become healthy."""
    account.stack.unhealthy.add(account.new)
    result = deploy(account, "ship", "--image", account.new, "--json")
    end(account, result, BACK)
    assert "did not become healthy" in result.json["error"]
    assert account.stack.statuses[-1] == "UPDATE_ROLLBACK_COMPLETE"
    end(account, deploy(account, "rollout", account.new), BACK)


def test_alarm_during_rollout_rolls_back(account):
    """An alarm during the rollout rolls it back, though it stays on, and the error names the alarm."""
    account.stack.alarming.add(account.new)
    result = deploy(account, "ship", "--image", account.new)
    end(account, result, BACK)
    assert account.fleet.errors in account.fleet.alarms("ALARM")
    assert f"went to the state ALARM: {account.fleet.errors}" in result.stderr


def test_lost_trigger_refuses_the_rollout(account):
    """CloudFormation fails an update whose trigger does not exist, so the plan needs the alarm."""
    account.call("cloudwatch", "delete_alarms", AlarmNames=["chatd-rollout"])
    result = deploy(account, "plan", account.new)
    end(account, result, REFUSED)
    assert "chatd-rollout (does not exist)" in result.stderr


def test_update_policy_with_alarms_cannot_roll_back(account):
    """The control: a refresh that names its alarms cannot be rolled back while one is on."""
    account.stack.deployed = account.stack.deployed._replace(template=with_alarms(account.stack.deployed.template))
    account.stack.alarming.add(account.new)
    result = deploy(account, "ship", "--image", account.new)
    assert (result.returncode, account.stack.status) == (STUCK, "UPDATE_ROLLBACK_FAILED"), result.stderr
    assert (
        "cannot start: the alarm chatd-errors is not in the OK state" in account.stack.events[0]["ResourceStatusReason"]
    )


def with_alarms(template):
    """Return a template whose update policy names the alarms, as it once did."""
    changed = copy.deepcopy(template)
    policy = changed["Resources"]["Group"]["UpdatePolicy"]["AutoScalingInstanceRefresh"]
    alarms = template["Outputs"]["RolloutAlarms"]["Value"]["Fn::Join"][1]
    policy["Preferences"]["AlarmSpecification"] = {"Alarms": alarms}
    return changed


def test_stuck_refresh_is_cancelled(account):
    """A rollout that is not complete after --timeout is cancelled."""
    account.stack.stuck.add(account.new)
    result = deploy(account, "ship", "--image", account.new, "--timeout=2")
    end(account, result, BACK)
    assert "not complete after 2 minutes" in result.stderr
    assert "CancelUpdateStack" in " ".join(account.asked)


def test_failed_stack_rollback_needs_manual_action(account):
    """A stack whose rollback fails needs a repair, and refuses the next plan."""
    account.stack.unhealthy.add(account.new)
    account.stack.trapped = True
    result = deploy(account, "ship", "--image", account.new, "--json")
    assert (result.returncode, account.recorded()[1]) == (STUCK, account.old)
    assert "ContinueUpdateRollback" in result.json["error"]
    result = deploy(account, "plan", account.new)
    assert (result.returncode, "repair it first" in result.stderr) == (REFUSED, True)


def test_wrong_version_is_rolled_back(account):
    """An image that serves another version than its tag is rolled back."""
    bad = account.image("9.9.9")
    result = deploy(account, "ship", "--image", bad, "--within=0.2", "--json")
    end(account, result, BACK)
    assert f"is chatd/{VERSION}, not chatd/9.9.9" in result.json["error"]
    assert len(account.stack.executed) == 2


def other_template(folder):
    """Return a file with a template that has another name for a parameter."""
    path = folder / "other.yaml"
    path.write_text(TEMPLATE.read_text().replace("LogDays", "KeptDays"))
    return path


@pytest.mark.parametrize("form", ["YAML", "JSON"])
def test_unverified_template_is_rolled_back(account, tmp_path, form):
    """The former template returns with the former image, and with the parameters that the other one lacks."""
    account.stack.set(LogDays="60")
    account.stack.text = TEMPLATE.read_text() if form == "YAML" else None  # botocore parses JSON
    bad = account.image("9.9.9")
    given = "--template", other_template(tmp_path), "--allow=LogGroup", "--within=0.2"
    result = deploy(account, "ship", "--image", bad, *given)
    end(account, result, BACK)
    assert result.stderr.endswith(f"; rolled back to {account.old}\n")
    assert account.stack.deployed.template == parsed(TEMPLATE.read_text())
    assert account.stack.parameters == parameters(account.old, LogDays="60")


@pytest.mark.parametrize("what", ["a template", "a parameter"])
def test_unverified_change_of_the_same_image(account, tmp_path, what):
    """A change of the template or of parameters is rolled back, although the image is the last-good one."""
    given = ["--parameter=Retain=30d"]
    if what == "a template":
        other = tmp_path / "other.yaml"
        other.write_text(TEMPLATE.read_text().replace("HealthCheckGracePeriod: 60", "HealthCheckGracePeriod: 90"))
        given = ["--template", other, "--allow=Group"]
    account.fault("DescribeTargetHealth", Fault("AccessDenied", "no", 403), after=1)
    result = deploy(account, "ship", "--image", account.old, *given)
    end(account, result, BACK)
    assert len(account.stack.executed) == 2
    assert account.stack.deployed.template == parsed(TEMPLATE.read_text())
    assert account.stack.parameters == parameters(account.old)


KILLED = {"rolling out": ("DescribeStackEvents", 2), "rolled out": ("DescribeTargetHealth", 1)}


@pytest.mark.parametrize("why", ["large", *KILLED])
def test_template_that_stays_is_reported(account, tmp_path, why):
    """A former template that is too large, or not known to a second run, is reported with the remedy."""
    bad, other = account.image("9.9.9"), other_template(tmp_path)
    given = "ship", "--image", bad, "--template", other, "--within=0.2"
    if why in KILLED:
        operation, after = KILLED[why]
        account.fault(operation, "kill", after=after)
        assert deploy(account, *given).returncode == -signal.SIGKILL
    else:
        account.stack.text = TEMPLATE.read_text() + "#" * 51200
    result = deploy(account, *given)
    end(account, result, BACK)
    assert f"--stack {STACK} --image {account.old} --template FILE" in result.stderr.splitlines()[-1]
    assert account.stack.deployed.template == parsed(other.read_text())


def test_wrong_version_is_not_verified(account):
    """`verify` fails if the service has another version than the tag of the image."""
    account.call("ec2", "create_tags", Resources=[account.old], Tags=[{"Key": "chatd:version", "Value": "9.9.9"}])
    result = deploy(account, "verify", "--within=0")
    end(account, result, FAILED)
    assert f"is chatd/{VERSION}, not chatd/9.9.9" in result.stderr


def test_unverified_rollback_needs_manual_action(account):
    """A rollback to an image that is not verified ends with exit status 5."""
    bad = account.image("9.9.9")
    end(account, deploy(account, "rollback", "--image", bad, "--within=0"), STUCK, runs=bad)


def test_unreachable_service_needs_manual_action(account):
    """If neither image can be reached, the command ends with exit status 5."""
    account.fleet.outputs["WebSocketURL"] = "ws://127.0.0.1:1/"
    result = deploy(account, "ship", "--image", account.new, "--within=0")
    end(account, result, STUCK)
    assert "connection refused" in result.stderr


def test_unhealthy_targets_are_not_verified(account):
    """`verify` needs healthy targets; a draining target counts only if it is in the group."""
    account.stack.unhealthy.add(account.old)
    result = deploy(account, "verify", "--within=0.5")
    assert (result.returncode, result.stderr.count(" is unhealthy")) == (FAILED, 4), result.stderr
    account.stack.unhealthy.clear()
    account.leaving = ["i-0123456789abcdef0"]
    assert deploy(account, "verify").returncode == DONE
    account.leaving = [*account.fleet.images][:1]
    result = deploy(account, "verify", "--within=0")
    assert (result.returncode, "is draining" in result.stderr) == (FAILED, True)


def test_instance_of_another_image_is_not_verified(account):
    """`verify` fails if an instance runs another image."""
    result = deploy(account, "verify", "--image", account.new, "--within=0", "--json")
    end(account, result, FAILED)
    assert f"runs {account.old}" in result.json["error"]


def test_first_image_has_no_rollback(empty, creating):
    """Without a verified image there is nothing to roll back to."""
    image = empty.image(VERSION)
    empty.url_of_chat = "ws://127.0.0.1:1/"
    result = deploy(empty, "ship", "--image", image, "--within=0", *creating)
    assert (result.returncode, empty.recorded()) == (STUCK, ([], None)), result.stderr
    assert "no image to go back to" in result.stderr
    result = deploy(empty, "rollback")
    assert (result.returncode, "no image of chatd is verified" in result.stderr) == (FAILED, True)


# Refusals


@pytest.mark.parametrize("state", ["INSUFFICIENT_DATA", None])
def test_plan_needs_all_alarms_ok(account, state):
    """An alarm with too little data, or that does not exist, refuses the plan."""
    if state:
        account.fleet.alarm_named(account.fleet.errors, state)
    else:
        account.fleet.outputs["RolloutAlarms"] += ",chatd-lost"
    result = deploy(account, "plan", account.new)
    end(account, result, REFUSED)
    assert f"({state or 'does not exist'})" in result.stderr


def test_rollout_needs_all_alarms_ok(account):
    """An alarm that goes off after the plan refuses the rollout."""
    deploy(account, "plan", account.new)
    account.fleet.alarm("ALARM")
    result = deploy(account, "rollout", account.new)
    end(account, result, REFUSED, planned=[f"chatd-{account.new}"])
    assert account.stack.executed == []


OTHER_CERTIFICATE = GIVEN["CertificateArn"].replace("89ab", "ba98")
SUBNETS = "subnet-0123456789abcdef0,subnet-0123456789abcdef1"
OTHER = {
    "a replaced target group": ({"VpcId": "vpc-0123456789abcdef0", "SubnetIds": SUBNETS}, "TargetGroup"),
    "another certificate": ({"CertificateArn": OTHER_CERTIFICATE}, "TlsListener"),
    "a role": ({"StoreParameter": "/chatd/other"}, "Role"),
}


@pytest.mark.parametrize("what", OTHER)
def test_other_changes_are_refused(account, what):
    """A plan that changes more than the image is refused."""
    changed, name = OTHER[what]
    result = deploy(account, "plan", account.new, *(f"--parameter={key}={value}" for key, value in changed.items()))
    end(account, result, REFUSED)
    assert f"--allow {name}" in result.stderr


def test_subnets_may_replace_the_group(account):
    """AWS reports that new subnets may replace the group, so the plan is refused."""
    account.stack.set(VpcId="vpc-0123456789abcdef0", SubnetIds=SUBNETS)
    others = ",".join(reversed(SUBNETS.split(",")))
    result = deploy(account, "plan", account.new, f"--parameter=SubnetIds={others}")
    end(account, result, REFUSED)
    assert "Modify Group (AWS::AutoScaling::AutoScalingGroup, perhaps replaced)" in result.stderr


def test_mixed_types_change_with_the_image_only(account):
    """A group of more types gets a new version in place, but other types may replace it."""
    account.stack.set(SecondInstanceType="t4g.medium")
    end(account, deploy(account, "plan", account.new), DONE, planned=[f"chatd-{account.new}"])
    account.stack.change_sets.clear()
    result = deploy(account, "plan", account.new, "--parameter=SecondInstanceType=t4g.large")
    end(account, result, REFUSED)
    assert "Modify Group (AWS::AutoScaling::AutoScalingGroup, perhaps replaced)" in result.stderr


def test_allowed_resource_may_change(account):
    """--allow permits the change of a resource, and the rollout needs it too."""
    result = deploy(
        account, "plan", account.new, f"--parameter=CertificateArn={OTHER_CERTIFICATE}", "--allow=TlsListener"
    )
    end(account, result, DONE, planned=[f"chatd-{account.new}"])
    result = deploy(account, "rollout", account.new)
    end(account, result, REFUSED, planned=[f"chatd-{account.new}"])
    assert "--allow TlsListener" in result.stderr
    end(account, deploy(account, "rollout", account.new, "--allow=TlsListener"), DONE, runs=account.new)
    assert account.stack.parameters["CertificateArn"] == OTHER_CERTIFICATE


def test_refused_plan_leaves_an_earlier_one(account):
    """A plan that is refused or fails leaves the earlier one, and a plan that is accepted replaces it."""
    name = f"chatd-{account.new}"
    end(account, deploy(account, "plan", account.new), DONE, planned=[name])
    earlier = account.stack.change_sets[name].id
    more = f"--parameter=CertificateArn={OTHER_CERTIFICATE}"
    end(account, deploy(account, "plan", account.new, more), REFUSED, planned=[name])
    end(account, deploy(account, "ship", "--image", account.new, more), REFUSED, planned=[name])
    end(account, deploy(account, "plan", account.new, "--parameter=MinSize=0"), FAILED, planned=[name])
    account.fault("CreateChangeSet", Fault("Throttling", "Rate exceeded"))
    end(account, deploy(account, "plan", account.new), FAILED, planned=[name])
    assert account.stack.change_sets[name].id == earlier
    end(account, deploy(account, "plan", account.new, "--parameter=Retain=30d"), DONE, planned=[name])
    assert account.stack.change_sets[name].id != earlier
    end(account, deploy(account, "rollout", account.new), DONE, runs=account.new)
    assert account.stack.parameters["Retain"] == "30d"


def test_plan_without_changes_removes_an_earlier_one(account):
    """After `plan` has found nothing to do, `rollout` does nothing."""
    end(account, deploy(account, "plan", account.new), DONE, planned=[f"chatd-{account.new}"])
    account.stack.runs(account.new)
    end(account, deploy(account, "plan", account.new), DONE, runs=account.new)
    result = deploy(account, "rollout", account.new)
    end(account, result, DONE, runs=account.new)
    assert "nothing to do" in result.stdout


def test_template_may_not_add_resources(account, tmp_path):
    """A template that adds a resource is refused."""
    template = tmp_path / "stack.yaml"
    more = "Resources:\n  Extra:\n    Type: AWS::Logs::LogGroup\n"
    template.write_text(TEMPLATE.read_text().replace("Resources:\n", more, 1))
    result = deploy(account, "plan", account.new, "--template", template)
    end(account, result, REFUSED)
    assert "Add Extra (AWS::Logs::LogGroup)" in result.stderr


def test_operation_in_progress_is_refused(account):
    """While another rollout runs, plans are refused, and `abort` rolls it back."""
    other = account.image(VERSION)
    account.stack.stuck.add(other)
    deploy(account, "plan", other)
    account.fault("DescribeStackEvents", "kill", after=2)
    assert deploy(account, "rollout", other).returncode == -signal.SIGKILL
    for arguments in (["plan", account.new], ["ship", "--image", account.new]):
        result = deploy(account, *arguments)
        assert (result.returncode, "UPDATE_IN_PROGRESS" in result.stderr) == (REFUSED, True), result.stderr
    result = deploy(account, "abort", "--json")
    end(account, result, DONE, planned=[f"chatd-{other}"])
    assert result.json["stack_status"] == "UPDATE_ROLLBACK_COMPLETE"


def test_instance_refresh_in_progress_is_refused(account):
    """An instance refresh that someone else started refuses the plan."""
    refresh = {"InstanceRefreshId": "r-1", "AutoScalingGroupName": STACK, "Status": "InProgress"}
    account.stack.refreshes.append(refresh)
    result = deploy(account, "plan", account.new)
    end(account, result, REFUSED)
    assert "wait until r-1 ends" in result.stderr


def test_nothing_to_abort_after_completion(account):
    """`abort` after the rollout fails, and names `rollback` as the remedy."""
    result = deploy(account, "abort")
    end(account, result, FAILED)
    assert "scripts/deploy rollback" in result.stderr
