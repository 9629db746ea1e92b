"""scripts/deploy prove, rehearsed against doubles.  tests/system/test_deploy_replay.py replays what it records."""

import contextlib
import functools
import signal
import sys

import pytest
from support.deployments import (
    ALLOWED,
    DEPLOY,
    FAILED,
    INTERRUPTED,
    PROVING,
    VERSION,
    DeploymentAccount,
    deploy,
    settings,
)
from support.formation import TEMPLATE, ChangeSet
from support.wire import Fault

sys.path.append(str(DEPLOY.parent))
NAME = "chatd-prove-test"
STEPS = ["images", "create", "ship", "bad-image", "alarm", "abort", "roll-back", "destroy"]
DEBIAN = "136693071363"
CHANGING = ("Create", "Copy", "Delete", "Execute", "Set", "Put", "Update", "Cancel", "Deregister")
"""How the names of calls begin that change something."""


class WithoutChatd:
    """The images without chatd: their instances never become healthy."""

    def __init__(self, account):
        self._account = account

    def __contains__(self, image):
        return self._account.ec2.amis[image].name == f"{NAME}-bad"


@contextlib.contextmanager
def empty():
    """Lend an account with an image of chatd and one of Debian, and no stack."""
    with DeploymentAccount("ws://127.0.0.1:1/", name=NAME) as account, pytest.MonkeyPatch.context() as patch:
        from deploying import verify

        for name, value in settings(account).items():
            if name.startswith(("AWS_", "CHATD_DEPLOY_")):
                patch.setenv(name, value)
        patch.setattr(verify, "echo", lambda url, expected: "")
        patch.setattr("botocore.session.create_loader", loader)
        account.first, account.debian = account.image(VERSION), account.image(None)
        debian = account.ec2.amis[account.debian]
        debian.name, debian.owner_id, debian.public = "debian-13-arm64-20260912-2000", DEBIAN, True
        account.stack.unhealthy, account.stack.page = WithoutChatd(account), 100
        create = account.fleet.create

        def create_with_store(*arguments):
            create(*arguments)
            account.fleet.store()

        account.fleet.create = create_with_store
        yield account


@functools.cache
def loader(path=None):
    """botocore's loader of models, which keeps them for all tests."""
    from botocore.loaders import create_loader

    return create_loader()


def proving(account, **given):
    """Return a proof in an account that runs in this process."""
    return proof(lambda: account.first, "us-east-1", NAME, within=0, **given)


def proof(image, region, name, *, record=None, keep=False, **given):
    """Return a proof; `given` has options of the pipeline that are not the default ones."""
    from deploying.aws import Account, Counted
    from deploying.prove import Proof
    from deploying.ship import Pipeline
    from deploying.stack import Stack

    usual = {"template": None, "parameters": {}, "allow": [], "role": None, "tags": {}, "timeout": 3600, "within": 600}
    stack = Stack(Account(region), name, Counted())
    pipeline = Pipeline(stack, default=TEMPLATE, begun=lambda: None, **usual | given)
    return Proof(pipeline, image, record, keep=keep)


@pytest.fixture
def account():
    with empty() as account:
        yield account


@pytest.fixture(scope="module")
def proved():
    """A whole proof: the account, the result, and what was asked before the confirmation."""
    with empty() as account:
        before = []

        def confirm(question):
            before.extend((question, *account.asked))
            return True

        yield account, proving(account).run(confirm), before


def images(account):
    """Return the images of the account but the first and Debian's."""
    return sorted(account.ec2.amis.keys() - {account.first, account.debian})


# The whole


def test_whole_proof(proved):
    """Each step is proved, and only a snapshot of the messages is left, with the command that removes it."""
    account, done, _ = proved
    assert [one["step"] for one in done["steps"]] == STEPS
    assert (account.stack.deleted, account.recorded(NAME)[0], images(account)) == (True, [], [])
    (snapshot,) = account.memorydb.snapshots
    remove = f"aws memorydb delete-snapshot --region us-east-1 --snapshot-name {snapshot}"
    assert done["left"] == f"what still exists: the snapshot {snapshot}: {remove}"
    assert {*account.asked} <= ALLOWED | PROVING


def test_estimate_comes_before_the_confirmation(proved):
    """Nothing is changed before the name is typed, and the question has hours, parts and the sum."""
    question, *asked = proved[2]
    assert [one for one in asked if one.partition(":")[2].startswith(CHANGING)] == []
    assert NAME in question
    for text in (
        "4 hours of 3 instances of t4g.small",
        "load balancer",
        "2 nodes of MemoryDB",
        "snapshots",
        "together",
    ):
        assert text in question


# Each step with its negative control


def at_work(account, proof):
    """Have the stack and the images be as they are after the step `ship`."""
    proof.first, proof.next, proof.bad = account.first, account.image(VERSION), account.image("none")
    account.ec2.amis[proof.bad].name = f"{NAME}-bad"
    account.stack.exists(ImageId=proof.next)
    account.label(proof.next, NAME)
    account.stack.triggers = [account.fleet.outputs["RolloutAlarm"]]


def without_debian(account, proof):
    del account.ec2.amis[account.debian]


def never_ready(account, proof):
    proof.first = account.first
    account.stack.unhealthy = {account.first}


def without_data(account, proof):
    """An alarm of the new stack never gets data."""
    proof.first = account.first
    create = account.fleet.create

    def silent(*arguments):
        create(*arguments)
        account.fleet.alarm_named(account.fleet.errors, "INSUFFICIENT_DATA")

    account.fleet.create = silent


def not_replaced(account, proof):
    at_work(account, proof)
    proof.next = account.image(VERSION)
    account.fleet.replace = lambda one: None


def healthy(account, proof):
    at_work(account, proof)
    account.stack.unhealthy = set()


def without_trigger(account, proof):
    at_work(account, proof)
    account.fleet.combine = lambda: None


def deaf(account, proof):
    at_work(account, proof)
    account.stack.CancelUpdateStack = lambda params: None


def faithful(account, proof):
    """An empty list does not replace the triggers of an earlier update."""
    at_work(account, proof)
    account.patch.setattr(ChangeSet, "triggers", lambda change_set, saved: saved)


def with_images(account, proof):
    at_work(account, proof)
    account.ec2.amis[account.image(VERSION)].name = f"{NAME}-next"
    account._deregister = lambda params: {"Return": True}


CONTROLS = [
    ("images", without_debian, "Debian has no image for arm64"),
    ("create", never_ready, "delete the stack before you create it again"),
    ("create", without_data, "minutes an alarm is not OK"),
    ("ship", not_replaced, "runs ami-"),
    ("bad-image", healthy, "the rollout succeeded"),
    ("alarm", without_trigger, "the rollout succeeded"),
    ("abort", deaf, "completed before it could be cancelled"),
    ("roll-back", faithful, "is not restored: rolled back"),
    ("destroy", with_images, "still exists"),
]
"""For each step an account where it must fail, and what is seen."""


@pytest.mark.parametrize(("name", "prepare", "seen"), CONTROLS)
def test_step_can_fail(account, monkeypatch, name, prepare, seen):
    """Each step fails, and names what was seen, if AWS does not do what it proves."""
    from deploying import prove

    account.patch = monkeypatch
    monkeypatch.setattr(prove, "CALM_SECONDS", 60)
    proof = proving(account)
    prepare(account, proof)
    (step,) = [one for one in proof.all_steps if one.name == name]
    failed = proof.attempt(step, done := [])
    assert failed.startswith(f"{name} is not proved: seen: "), failed
    assert (seen in failed, done) == (True, []), failed


def test_every_step_has_a_control():
    assert [*dict.fromkeys(name for name, *_ in CONTROLS)] == STEPS


# The end


@pytest.mark.parametrize("keep", [False, True])
def test_failed_step_goes_on_to_destroy(account, keep):
    """After a failed step the stack is destroyed and the rest is skipped; --keep leaves it, and the error says how."""
    from deploying.aws import Stuck
    from deploying.prove import Unproved

    account.stack.unhealthy = {account.first}
    with pytest.raises(Stuck if keep else Unproved) as error:
        proving(account, keep=keep).run(lambda question: True)
    assert str(error.value).startswith("create is not proved: seen: ")
    assert (account.stack.deleted, bool(images(account)), len(account.stack.executed)) == (not keep, keep, 1)
    assert (f"scripts/deploy destroy --stack {NAME} --region us-east-1" in str(error.value)) == keep
    assert str(error.value).count("aws ec2 deregister-image") == 2 * keep


def test_unforeseen_answer_goes_on_to_destroy(account, monkeypatch):
    """An exception that is no error of AWS fails the step too, and the stack and the images go."""
    from deploying import verify
    from deploying.prove import Unproved

    monkeypatch.setattr(verify, "echo", lambda url, expected: {}["NextToken"])
    seen = "create is not proved: seen: KeyError: 'NextToken'; what still exists: the snapshot"
    with pytest.raises(Unproved, match=seen):
        proving(account).run(lambda question: True)
    assert (account.stack.deleted, images(account)) == (True, [])


def test_existing_stack_is_refused(account):
    """The proof touches no stack that exists, and does not even ask."""
    from deploying.aws import CallDenied

    account.stack.exists(ImageId=account.first)
    with pytest.raises(CallDenied, match="exists: the proof needs a stack of its own"):
        proving(account).run(lambda question: pytest.fail("asked"))


@pytest.mark.parametrize(("typed", "status"), [("yes", FAILED), (NAME, INTERRUPTED)])
def test_program_is_not_confirmed_or_interrupted(account, typed, status):
    """Another name changes nothing; an interrupt ends with what still exists and the commands that remove it."""
    account.fault("DescribeStackEvents", lambda: account.process.send_signal(signal.SIGINT), after=1)
    result = deploy(account, "prove", "--name=test", f"--image={account.first}", typed=typed)
    last = result.stderr.splitlines()[-1]
    assert result.returncode == status, result.stderr
    if status == FAILED:
        assert (last, account.stack.status) == (f"deploy: not confirmed: type the name of the stack, {NAME}", None)
    else:
        assert last.startswith("deploy: interrupted: what still exists: the stack chatd-prove-test")
        assert f"scripts/deploy destroy --stack {NAME} --region us-east-1" in last
        assert [one for one in images(account) if f"--image-id {one}" not in last] == []


# Before the confirmation


def test_problem_of_the_account_stops_the_proof(account):
    """What `check` finds is printed as by `check`, and nothing is asked or changed."""
    account.vcpu = 5.0
    result = deploy(account, "prove", "--name=test", f"--image={account.first}", typed=NAME)
    assert (result.returncode, account.stack.status) == (FAILED, None), result.stderr
    assert (result.stderr, len(result.stdout.splitlines())) == ("deploy: 2 problems found\n", 2)
    assert result.stdout.startswith("quota: a rollout of MinSize=2 needs 6 vCPU")
    checked = deploy(account, "check", "--stack", NAME, f"--image={account.first}")
    assert (checked.returncode, checked.stdout) == (FAILED, result.stdout)


def test_check_that_is_not_permitted_is_reported(account):
    account.fault("GetServiceQuota", Fault("AccessDenied", "no", 403), times=9)
    result = deploy(account, "prove", "--name=test", f"--image={account.first}", typed="no")
    assert (result.returncode, account.stack.status) == (FAILED, None), result.stderr
    assert "quota: not checked: access denied: servicequotas:GetServiceQuota" in result.stderr


# The parts


def test_estimate_counts_the_parts():
    """The sum follows the parameters, and a type without a price is not guessed."""
    from deploying.prove import estimate

    given = {"MinSize": "2", "InstanceType": "t4g.small", "StoreNodeType": "db.t4g.small", "StoreReplicas": "1"}
    lines, dollars = estimate(given)
    assert (len(lines), round(dollars, 2)) == (6, 0.74)
    assert estimate(given | {"StoreParameter": "/s"})[1] == pytest.approx(dollars - 4 * 2 * 0.0336)
    assert estimate(given | {"MinSize": "10"})[0][0] == (
        "  $0.81  4 hours of 12 instances of t4g.small, of which a rollout starts 2"
    )
    assert "not known" in estimate(given | {"InstanceType": "m8g.large"})[0][0]
