"""scripts/deploy as people and pipelines run it, rehearsed against an account that is none.

tests/support/formation.py is the double of CloudFormation and of the group. A real server runs behind the URL.
"""

import re
import signal

import pytest
from support.deployments import (
    BACK,
    DONE,
    FAILED,
    REFUSED,
    REST,
    STACK,
    STUCK,
    VERSION,
    Account,
    ahead,
    beginning,
    deploy,
    end,
    running,
)
from support.servers import Server


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("chat"), "--store=memory:") as server:
        yield server


@pytest.fixture(scope="module")
def ends(request, chat):
    with beginning(request, chat) as ends:
        yield ends


@pytest.fixture
def account(chat):
    with running(chat) as account:
        yield account


@pytest.fixture
def empty(chat):
    """An account without a stack."""
    with Account(chat.url) as account:
        account.old = None
        yield account


@pytest.fixture
def creating(tmp_path):
    """The arguments that a new stack needs."""
    template = tmp_path / "stack.yaml"
    template.write_text("Resources: {}\n")
    return ["--template", template, *(f"--parameter={name}={value}" for name, value in REST.items())]


# The road


@ahead
def test_ship_rolls_out_verifies_and_labels(account):
    result = deploy(account, "ship", "--image", account.new, "--json")
    end(account, result, DONE, runs=account.new, good=account.new, record=[account.old, account.new])
    assert account.recorded() == ([account.old, account.new], account.new)
    assert result.json == {
        "command": "ship",
        "status": 0,
        "error": None,
        "image": account.new,
        "version": VERSION,
        "instances": sorted(account.fleet.images),
        "url": account.url_of_chat,
    }
    assert account.stack.parameters == {"ImageId": account.new, **REST}
    assert re.search(r"instances of chatd: InProgress, 50 %", result.stderr)
    again = deploy(account, "ship", "--image", account.new)
    end(account, again, DONE, runs=account.new, good=account.new, record=[account.old, account.new])
    assert again.stdout == f"{account.new} is verified: chatd {VERSION} on 2 instances, at {account.url_of_chat}\n"
    assert account.recorded()[0] == [account.old, account.new]
    assert len(account.stack.executed) == 1


@ahead
def test_the_steps_by_themselves(account):
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
    assert result.stdout == "nothing to do: the stack is of this image\n"


@ahead
def test_rollback_goes_to_the_last_good_image_whatever_the_alarms_say(account):
    account.stack.runs(account.new)
    account.fleet.alarm("ALARM")
    end(account, deploy(account, "rollback"), DONE)
    end(account, deploy(account, "rollback"), DONE)
    assert len(account.stack.executed) == 1
    assert account.stack.parameters == {"ImageId": account.old, **REST, "GuardRollouts": "no"}
    account.fleet.alarm("OK")
    result = deploy(account, "ship", "--image", account.new)
    end(account, result, DONE, runs=account.new, good=account.new, record=[account.old, account.new])
    assert account.stack.parameters == {"ImageId": account.new, **REST}


@ahead
def test_rollback_goes_to_another_image_that_is_named(account):
    end(
        account,
        deploy(account, "rollback", "--image", account.new),
        DONE,
        runs=account.new,
        good=account.new,
        record=[account.old, account.new],
    )


@ahead
def test_a_rollback_that_is_rolled_back_needs_a_person(account):
    account.stack.unhealthy.add(account.new)
    result = deploy(account, "rollback", "--image", account.new)
    end(account, result, STUCK)


def test_a_stack_that_is_not_there_is_created(empty, creating):
    image = empty.image(VERSION)
    end(empty, deploy(empty, "ship", "--image", image, *creating), DONE, runs=image, good=image, record=[image])
    assert empty.stack.statuses == ["REVIEW_IN_PROGRESS", "CREATE_IN_PROGRESS", "CREATE_COMPLETE"]
    assert empty.stack.parameters == {"ImageId": image, **REST}


def test_a_stack_that_cannot_be_created_is_said(empty, creating):
    image = empty.image(VERSION)
    empty.stack.unhealthy.add(image)
    result = deploy(empty, "ship", "--image", image, *creating)
    assert (result.returncode, "delete the stack" in result.stderr) == (BACK, True), result.stderr
    assert empty.recorded() == ([], None)
    again = deploy(empty, "ship", "--image", image, *creating)
    assert (again.returncode, "delete it first" in again.stderr) == (REFUSED, True), again.stderr


# What goes wrong


@ahead
def test_an_image_whose_instances_do_not_become_healthy_is_rolled_back(account):
    account.stack.unhealthy.add(account.new)
    result = deploy(account, "ship", "--image", account.new, "--json")
    end(account, result, BACK)
    assert "did not become healthy" in result.json["error"]
    assert account.stack.statuses[-1] == "UPDATE_ROLLBACK_COMPLETE"
    end(account, deploy(account, "rollout", account.new), BACK)


@ahead
def test_an_alarm_during_the_rollout_rolls_back(account):
    account.stack.alarming.add(account.new)
    result = deploy(account, "ship", "--image", account.new)
    end(account, result, BACK)
    assert "the alarm chatd-faults went off" in result.stderr


@ahead
def test_a_refresh_that_is_stuck_for_ever_is_called_off(account):
    account.stack.stuck.add(account.new)
    result = deploy(account, "ship", "--image", account.new, "--timeout=2")
    end(account, result, BACK)
    assert "not done after 2 minutes" in result.stderr
    assert "CancelUpdateStack" in " ".join(account.asked)


@ahead
def test_a_roll_back_that_fails_needs_a_person(account):
    account.stack.unhealthy.add(account.new)
    account.stack.trapped = True
    result = deploy(account, "ship", "--image", account.new, "--json")
    assert (result.returncode, account.recorded()[1]) == (STUCK, account.old)
    assert "ContinueUpdateRollback" in result.json["error"]
    result = deploy(account, "plan", account.new)
    assert (result.returncode, "mend it first" in result.stderr) == (REFUSED, True)


@ahead
def test_an_image_of_another_version_than_its_tag_is_rolled_back(account):
    bad = account.image("9.9.9")
    result = deploy(account, "ship", "--image", bad, "--within=0.2", "--json")
    end(account, result, BACK)
    assert f"is chatd/{VERSION}, not chatd/9.9.9" in result.json["error"]
    assert len(account.stack.executed) == 2


@ahead
def test_another_version_is_not_verified(account):
    account.call("ec2", "create_tags", Resources=[account.old], Tags=[{"Key": "chatd:version", "Value": "9.9.9"}])
    result = deploy(account, "verify", "--within=0")
    end(account, result, FAILED)
    assert f"is chatd/{VERSION}, not chatd/9.9.9" in result.stderr


@ahead
def test_a_rollback_to_what_is_not_verified_needs_a_person(account):
    bad = account.image("9.9.9")
    end(account, deploy(account, "rollback", "--image", bad, "--within=0"), STUCK, runs=bad)


@ahead
def test_what_cannot_be_reached_before_or_after_needs_a_person(account):
    account.fleet.outputs["WebSocketURL"] = "ws://127.0.0.1:1/"
    result = deploy(account, "ship", "--image", account.new, "--within=0")
    end(account, result, STUCK)
    assert "connection refused" in result.stderr


@ahead
def test_targets_that_are_not_healthy_are_not_verified(account):
    account.stack.unhealthy.add(account.old)
    result = deploy(account, "verify", "--within=0.5")
    assert (result.returncode, result.stderr.count(" is unhealthy")) == (FAILED, 4), result.stderr
    account.stack.unhealthy.clear()
    account.leaving = ["i-0123456789abcdef0"]
    assert deploy(account, "verify").returncode == DONE
    account.leaving = [*account.fleet.images][:1]
    result = deploy(account, "verify", "--within=0")
    assert (result.returncode, "is draining" in result.stderr) == (FAILED, True)


@ahead
def test_an_instance_of_another_image_is_not_verified(account):
    result = deploy(account, "verify", "--image", account.new, "--within=0", "--json")
    end(account, result, FAILED)
    assert f"runs {account.old}" in result.json["error"]


def test_the_first_image_has_nothing_to_go_back_to(empty, creating):
    image = empty.image(VERSION)
    empty.url_of_chat = "ws://127.0.0.1:1/"
    result = deploy(empty, "ship", "--image", image, "--within=0", *creating)
    assert (result.returncode, empty.recorded()) == (STUCK, ([], None)), result.stderr
    assert "no image to go back to" in result.stderr
    result = deploy(empty, "rollback")
    assert (result.returncode, "no image of chatd is known to be good" in result.stderr) == (FAILED, True)


# What is refused


@pytest.mark.parametrize("state", ["INSUFFICIENT_DATA", None])
def test_an_alarm_that_is_not_ok_is_refused(account, state):
    if state:
        account.fleet.alarm_named("chatd-faults", state)
    else:
        account.fleet.outputs["RolloutAlarms"] += ",chatd-lost"
    result = deploy(account, "plan", account.new)
    end(account, result, REFUSED)
    assert f"({state or 'does not exist'})" in result.stderr


@ahead
def test_an_alarm_between_plan_and_rollout_is_refused(account):
    deploy(account, "plan", account.new)
    account.fleet.alarm("ALARM")
    result = deploy(account, "rollout", account.new)
    end(account, result, REFUSED, planned=[f"chatd-{account.new}"])
    assert account.stack.executed == []


@pytest.mark.parametrize("name", ["VpcId", "SubnetIds"])
def test_more_than_the_image_is_refused(account, name):
    result = deploy(account, "plan", account.new, f"--parameter={name}=other")
    end(account, result, REFUSED)


@ahead
def test_what_is_allowed_may_change_too(account):
    result = deploy(account, "plan", account.new, "--parameter=CertificateArn=other", "--allow=Listener")
    end(account, result, DONE, planned=[f"chatd-{account.new}"])
    result = deploy(account, "rollout", account.new)
    end(account, result, REFUSED, planned=[f"chatd-{account.new}"])
    assert "--allow Listener" in result.stderr
    end(account, deploy(account, "rollout", account.new, "--allow=Listener"), DONE, runs=account.new)
    assert account.stack.parameters["CertificateArn"] == "other"


def test_another_template_may_not_add_anything(account, tmp_path):
    template = tmp_path / "stack.yaml"
    template.write_text("Resources: {}\n")
    result = deploy(account, "plan", account.new, "--template", template)
    end(account, result, REFUSED)
    assert "Add Extra (AWS::Logs::LogGroup)" in result.stderr


@ahead
def test_while_something_else_is_under_way_it_is_refused(account):
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


@ahead
def test_while_instances_are_being_replaced_it_is_refused(account):
    refresh = {"InstanceRefreshId": "r-1", "AutoScalingGroupName": STACK, "Status": "InProgress"}
    account.stack.refreshes.append(refresh)
    result = deploy(account, "plan", account.new)
    end(account, result, REFUSED)
    assert "wait until r-1 ends" in result.stderr


@ahead
def test_there_is_nothing_to_abort_once_it_is_done(account):
    result = deploy(account, "abort")
    end(account, result, FAILED)
    assert "scripts/deploy rollback" in result.stderr
