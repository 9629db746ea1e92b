"""scripts/deploy when AWS, the connection or the process itself fails it at any point."""

import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.deployments import (
    BACK,
    DONE,
    FAILED,
    INTERRUPTED,
    REGION,
    STACK,
    STUCK,
    ahead,
    beginning,
    deploy,
    end,
    running,
    runs,
)
from support.servers import Server
from support.wire import Fault

DENIED = Fault("AccessDenied", "User: arn:aws:iam::123456789012:user/operator is not authorized", 403)


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


# AWS


@pytest.mark.parametrize("operation", ["CreateChangeSet", "ExecuteChangeSet", "DescribeStackEvents", "PutParameter"])
def test_access_denied_ends_with_the_old_image(account, operation):
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


@ahead
def test_without_credentials_or_an_account_it_is_said(account):
    result = deploy(account, "plan", account.new, AWS_ACCESS_KEY_ID="", AWS_SECRET_ACCESS_KEY="")
    assert (result.returncode, "AWS_PROFILE" in result.stderr) == (FAILED, True)
    result = deploy(account, "verify", "--stack=other")
    assert (result.returncode, "no stack other" in result.stderr) == (FAILED, True)
    result = deploy(account, "plan", "ami-0123456789abcdef0")
    assert (result.returncode, "is not there" in result.stderr) == (FAILED, True)
    other = account.image(None)
    result = deploy(account, "plan", other)
    assert (result.returncode, "has no tag chatd:version" in result.stderr) == (FAILED, True)


@ahead
def test_credentials_that_expire_on_the_way_leave_it_to_cloudformation(account):
    account.stack.unhealthy.add(account.new)
    account.fault("DescribeStackEvents", Fault("ExpiredToken", "expired", 403), times=9, after=2)
    account.fault("CancelUpdateStack", Fault("ExpiredToken", "expired", 403), times=9)
    result = deploy(account, "ship", "--image", account.new)
    assert (result.returncode, "log in again" in result.stderr) == (STUCK, True), result.stderr
    assert "scripts/deploy abort" in result.stderr
    account.stack.run_out()
    assert (runs(account), account.recorded()[1]) == (account.old, account.old)


# Cuts


@ahead
def test_connections_that_are_cut_are_made_up_for(account):
    for operation in ("CreateChangeSet", "ExecuteChangeSet", "LabelParameterVersion"):
        account.fault(operation, "cut", done=True)
    account.fault("DescribeStackEvents", "cut", times=3)
    account.fault("DescribeTargetHealth", Fault("Throttling", "Rate exceeded"), times=3, after=1)
    result = deploy(account, "ship", "--image", account.new, AWS_MAX_ATTEMPTS="2")
    end(account, result, DONE, runs=account.new, good=account.new, record=[account.old, account.new])
    assert len(account.stack.executed) == 1


@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
def test_a_connection_that_stays_cut_leaves_it_to_cloudformation(account, done):
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
    "after the change set is made": ("CreateChangeSet", 0, True),
    "while it is being made": ("DescribeChangeSet", 2, False),
    "after it is executed": ("ExecuteChangeSet", 0, True),
    "while instances are replaced": ("DescribeStackEvents", 5, False),
    "while it is verified": ("DescribeTargetHealth", 1, False),
    "before the label": ("PutParameter", 0, True),
}


def killed(chat, operation, after, done):
    """How it ends when it is killed at a call of AWS, and run again."""
    with running(chat) as account:
        account.fault(operation, "kill", after=after, done=done)
        assert deploy(account, "ship", "--image", account.new).returncode == -signal.SIGKILL
        end(
            account,
            deploy(account, "ship", "--image", account.new),
            DONE,
            runs=account.new,
            good=account.new,
            record=[account.old, account.new],
        )
        assert account.recorded()[0] == [account.old, account.new]
        assert len(account.stack.executed) == 1


def test_killed_at_any_step_it_can_be_run_again(chat):
    with ThreadPoolExecutor(4) as pool:
        ends = {step: pool.submit(killed, chat, *where) for step, where in STEPS.items()}
    assert {step: one.exception() for step, one in ends.items()} == dict.fromkeys(STEPS)


@ahead
def test_killed_while_a_bad_image_is_rolled_out_it_ends_with_the_old_one(account):
    account.stack.unhealthy.add(account.new)
    account.fault("DescribeStackEvents", "kill", after=4)
    assert deploy(account, "ship", "--image", account.new).returncode == -signal.SIGKILL
    end(account, deploy(account, "ship", "--image", account.new), BACK)


@ahead
def test_interrupted_it_says_what_goes_on(account):
    account.fault("DescribeStackEvents", lambda: account.process.send_signal(signal.SIGTERM), after=2)
    result = deploy(account, "ship", "--image", account.new, "--json")
    assert (result.returncode, result.json["status"]) == (INTERRUPTED, INTERRUPTED)
    assert "goes on in the account" in result.json["error"]
    assert f"scripts/deploy abort --stack {STACK} --region {REGION}" in result.json["error"]
    account.stack.run_out()
    assert runs(account) == account.new


@ahead
def test_interrupted_before_anything_began_it_leaves_nothing(account):
    account.fault("DescribeChangeSet", lambda: account.process.send_signal(signal.SIGINT), after=2)
    result = deploy(account, "ship", "--image", account.new)
    end(account, result, INTERRUPTED)
    assert result.stderr == "deploy: interrupted\n"
