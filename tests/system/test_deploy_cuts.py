"""scripts/deploy when AWS, the connection or the process itself fails at any point."""

import signal
import sys

import pytest
from support.deployments import (
    BACK,
    DEPLOY,
    DONE,
    FAILED,
    INTERRUPTED,
    REFUSED,
    REGION,
    STACK,
    STUCK,
    WRONG,
    deploy,
    end,
    runs,
)
from support.wire import Fault

sys.path.append(str(DEPLOY.parent))

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
        (Fault("InvalidClientTokenId", "The security token is invalid", 403), "enable the region"),
        (Fault("AccessDenied", "no, with an explicit deny in a service control policy", 403), "a policy denies this"),
    ],
    ids=["expired", "throttled", "unavailable", "cut", "disabled region", "explicit"],
)
def test_errors_are_one_line_with_the_remedy(account, fault, remedy):
    account.fault("DescribeStacks", fault, times=9)
    result = deploy(account, "plan", account.new)
    end(account, result, FAILED)
    assert len(result.stderr.splitlines()) == 1
    assert remedy in result.stderr


def test_denied_role_is_named(account):
    """AWS may refuse another action than that of the call, such as passing the role, and the error names that one."""
    role = f"arn:aws:iam::{account.owner}:role/chatd.chatd"
    words = (
        f"User: arn:aws:iam::{account.owner}:user/ops is not authorized to perform: iam:PassRole on resource: {role}"
    )
    account.fault("CreateChangeSet", Fault("AccessDenied", words, 403))
    result = deploy(account, "plan", account.new, f"--role-arn={role}")
    end(account, result, FAILED)
    assert "access denied: iam:PassRole: the role needs this action" in result.stderr


def test_unreachable_region(account):
    """A region that does not exist has no host, and the error names the host."""
    result = deploy(account, "plan", account.new, AWS_ENDPOINT_URL="http://127.0.0.1:1")
    end(account, result, FAILED)
    assert '"http://127.0.0.1:1/": check the region and the network' in result.stderr


def test_lost_network_is_passing():
    """A network that is lost for a moment is no reason to cancel a rollout, whatever botocore calls it."""
    from botocore import exceptions
    from deploying.aws import _plain

    place, proxy, why = {"endpoint_url": "https://a/"}, {"proxy_url": "https://p/"}, {"error": "reset"}
    errors = [
        exceptions.EndpointConnectionError(**place),
        exceptions.ConnectTimeoutError(**place),
        exceptions.ProxyConnectionError(**proxy),
        exceptions.SSLError(**place, **why),
        exceptions.ReadTimeoutError(**place),
        exceptions.ConnectionClosedError(**place),
        exceptions.HTTPClientError(**why),
    ]
    assert [type(one) for one in errors if not _plain("ec2", "describe_images", one).passing] == []
    assert not _plain("ec2", "describe_images", exceptions.NoCredentialsError()).passing


@pytest.mark.parametrize(
    "name", ["Chat_1", "chat-", "chat--a", "1chat", "c" * 33, "arn:aws:cloudformation:a:b:stack/c/d"]
)
def test_impossible_name_of_a_stack(account, name):
    """A name that MemoryDB or the group cannot have is wrong usage, before any call."""
    result = deploy(account, "plan", account.new, f"--stack={name}")
    assert (result.returncode, account.asked) == (WRONG, [])
    assert "single hyphens" in result.stderr


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


def test_change_set_that_was_executed_by_a_lost_call(account):
    """AWS may answer a repeated call that its token exists; the rollout continues."""
    account.fault("ExecuteChangeSet", Fault("TokenAlreadyExistsException", "exists"), done=True)
    result = deploy(account, "ship", "--image", account.new)
    end(account, result, DONE, runs=account.new, good=account.new, record=[account.old, account.new])


def test_failed_change_set_of_an_earlier_run(account):
    """A change set that failed after a kill is replaced, and its reason is not that of this run."""
    account.fault("CreateChangeSet", "kill", done=True)
    assert deploy(account, "ship", "--image", account.new).returncode == -signal.SIGKILL
    account.stack.change_sets[f"chatd-{account.new}"].fault = "something that was resolved since"
    result = deploy(account, "ship", "--image", account.new)
    end(account, result, DONE, runs=account.new, good=account.new, record=[account.old, account.new])


def test_deletion_is_not_the_rollout_before_it(account):
    """A stack that is being deleted refuses the image of its last rollout, instead of waiting for it."""
    assert deploy(account, "ship", "--image", account.new).returncode == DONE
    account.stack.deleting()
    result = deploy(account, "ship", "--image", account.new)
    assert (result.returncode, "is DELETE_IN_PROGRESS by another operation" in result.stderr) == (REFUSED, True)
    result = deploy(account, "abort")
    assert (result.returncode, "nothing to cancel\n" in result.stderr) == (FAILED, True), result.stderr


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


def test_interrupt_leaves_an_earlier_plan(account):
    """SIGINT while a plan replaces another one leaves the earlier one, and no change set of its own."""
    name = f"chatd-{account.new}"
    end(account, deploy(account, "plan", account.new), DONE, planned=[name])
    earlier = account.stack.change_sets[name].id
    account.fault("CreateChangeSet", lambda: account.process.send_signal(signal.SIGINT), after=1)
    end(account, deploy(account, "plan", account.new, "--parameter=Retain=30d"), INTERRUPTED, planned=[name])
    assert account.stack.change_sets[name].id == earlier
