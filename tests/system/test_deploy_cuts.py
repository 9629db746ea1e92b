"""scripts/deploy when AWS, the connection or the process itself fails at any point."""

import signal

import pytest
from support.deployments import (
    BACK,
    DONE,
    FAILED,
    INTERRUPTED,
    REGION,
    STACK,
    STUCK,
    deploy,
    end,
    runs,
)
from support.wire import Fault

DENIED = Fault("AccessDenied", "User: arn:aws:iam::123456789012:user/operator is not authorized", 403)


# AWS


@pytest.mark.parametrize("operation", ["CreateChangeSet", "ExecuteChangeSet", "DescribeStackEvents", "PutParameter"])
def test_access_denied_ends_with_the_old_image(account, operation):
    """Denied access at any step leaves the old image, and the error names the missing action."""
    account.fault(operation, DENIED, times=99)
    result = deploy(account, "ship", "--image", account.new, "--json")
    begun = operation not in ("CreateChangeSet", "ExecuteChangeSet")
    end(account, result, BACK if begun else FAILED)
    assert f":{operation}: the role needs this action" in result.json["error"]


@pytest.mark.parametrize(
    ("fault", "remedy"),
    [
        (Fault("ExpiredToken", "The security token included in the request is expired", 403), "log in again"),
        (Fault("Throttling", "Rate exceeded"), "in a minute"),
        (Fault("ServiceUnavailable", "no", 503), "run this again"),
        ("cut", "run this again"),
    ],
    ids=["expired", "throttled", "unavailable", "cut"],
)
def test_errors_are_one_line_with_the_remedy(account, fault, remedy):
    account.fault("DescribeStacks", fault, times=9)
    result = deploy(account, "plan", account.new)
    end(account, result, FAILED)
    assert len(result.stderr.splitlines()) == 1
    assert remedy in result.stderr


def test_missing_credentials_stack_or_image(account):
    """Each missing precondition has its own error."""
    result = deploy(account, "plan", account.new, AWS_ACCESS_KEY_ID="", AWS_SECRET_ACCESS_KEY="")
    assert (result.returncode, "AWS_PROFILE" in result.stderr) == (FAILED, True)
    result = deploy(account, "verify", "--stack=other")
    assert (result.returncode, "no stack other" in result.stderr) == (FAILED, True)
    result = deploy(account, "plan", "ami-0123456789abcdef0")
    assert (result.returncode, "is missing" in result.stderr) == (FAILED, True)
    other = account.image(None)
    result = deploy(account, "plan", other)
    assert (result.returncode, "has no tag chatd:version" in result.stderr) == (FAILED, True)


def test_expired_credentials_during_rollout(account):
    """Credentials that expire during a rollout leave it to CloudFormation, and the error names `abort`."""
    account.stack.unhealthy.add(account.new)
    account.fault("DescribeStackEvents", Fault("ExpiredToken", "expired", 403), times=9, after=2)
    account.fault("CancelUpdateStack", Fault("ExpiredToken", "expired", 403), times=9)
    result = deploy(account, "ship", "--image", account.new)
    assert (result.returncode, "log in again" in result.stderr) == (STUCK, True), result.stderr
    assert "scripts/deploy abort" in result.stderr
    account.stack.run_out()
    assert (runs(account), account.recorded()[1]) == (account.old, account.old)


# Cuts


def test_lost_connections_are_retried(account):
    """Lost connections and throttling are retried, and the rollout happens once."""
    for operation in ("CreateChangeSet", "ExecuteChangeSet", "LabelParameterVersion"):
        account.fault(operation, "cut", done=True)
    account.fault("DescribeStackEvents", "cut", times=3)
    account.fault("DescribeTargetHealth", Fault("Throttling", "Rate exceeded"), times=3, after=1)
    result = deploy(account, "ship", "--image", account.new, AWS_MAX_ATTEMPTS="2")
    end(account, result, DONE, runs=account.new, good=account.new, record=[account.old, account.new])
    assert len(account.stack.executed) == 1


@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
def test_lasting_outage_during_rollout(account, done):
    """An outage that lasts ends the command, and CloudFormation rolls back a bad image by itself."""
    account.stack.unhealthy.add(account.new)
    account.fault("ExecuteChangeSet", "cut", done=done)
    account.fault("*", "cut", times=999, after=18)
    result = deploy(account, "ship", "--image", account.new)
    assert result.returncode in (FAILED, STUCK), result.stderr
    assert result.returncode == STUCK or not account.stack.executed
    account._rules.clear()
    account.stack.run_out()
    assert (runs(account), account.recorded()[1]) == (account.old, account.old)


STEPS = {
    "after the change set is created": ("CreateChangeSet", 0, True),
    "while the change set is created": ("DescribeChangeSet", 2, False),
    "after the change set is executed": ("ExecuteChangeSet", 0, True),
    "while instances are replaced": ("DescribeStackEvents", 5, False),
    "during the verification": ("DescribeTargetHealth", 1, False),
    "before the label": ("PutParameter", 0, True),
}


@pytest.mark.parametrize("step", STEPS)
def test_rerun_after_kill(account, step):
    """After a kill at any step the same command finishes the rollout, once."""
    operation, after, done = STEPS[step]
    account.fault(operation, "kill", after=after, done=done)
    assert deploy(account, "ship", "--image", account.new).returncode == -signal.SIGKILL
    again = deploy(account, "ship", "--image", account.new)
    end(account, again, DONE, runs=account.new, good=account.new, record=[account.old, account.new])
    assert account.recorded()[0] == [account.old, account.new]
    assert len(account.stack.executed) == 1


def test_rerun_after_kill_with_bad_image(account):
    """A second run after a kill reports that the image was rolled back."""
    account.stack.unhealthy.add(account.new)
    account.fault("DescribeStackEvents", "kill", after=4)
    assert deploy(account, "ship", "--image", account.new).returncode == -signal.SIGKILL
    end(account, deploy(account, "ship", "--image", account.new), BACK)


def test_interrupt_reports_the_running_rollout(account):
    """SIGTERM during a rollout ends the command only; the error names `abort`."""
    account.fault("DescribeStackEvents", lambda: account.process.send_signal(signal.SIGTERM), after=2)
    result = deploy(account, "ship", "--image", account.new, "--json")
    assert (result.returncode, result.json["status"]) == (INTERRUPTED, INTERRUPTED)
    assert "continues in the account" in result.json["error"]
    assert f"scripts/deploy abort --stack {STACK} --region {REGION}" in result.json["error"]
    account.stack.run_out()
    assert runs(account) == account.new


def test_early_interrupt_leaves_nothing(account):
    """SIGINT before the rollout deletes the change set."""
    account.fault("DescribeChangeSet", lambda: account.process.send_signal(signal.SIGINT), after=2)
    result = deploy(account, "ship", "--image", account.new)
    end(account, result, INTERRUPTED)
    assert result.stderr == "deploy: interrupted\n"
