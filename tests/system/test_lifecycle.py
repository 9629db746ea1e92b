"""How an EC2 instance enters service and leaves it: chatd-lifecycle amid doubles, with AWS's requests, and whole.

Each scenario is a function of the program, so that the same is run with a program that was changed, and must fail.
"""

import shutil
import subprocess
import sys
from collections import defaultdict
from functools import partial
from itertools import pairwise
from random import Random

import pytest
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionClosedError,
    EndpointConnectionError,
    NoCredentialsError,
)
from botocore.parsers import ResponseParserError
from botocore.session import Session
from support import imds
from support.helpers import Longest
from support.imds import FILES, GROUP, INSTANCE, REGION, TARGET_GROUP, Cloud, settings, surroundings
from support.loops import drive
from support.servers import LONG, LOOPBACK, Lines, Raw, Server
from twisted.internet.defer import CancelledError, Deferred, fail, maybeDeferred
from twisted.internet.task import Clock
from twisted.python.failure import Failure

import chatd
from chatd.client.protocol import Backoff, History, Rejected
from chatd.messages import Entry, Id

LAUNCH, TERMINATE = "chatd-launch", "chatd-terminate"
STEP = 0.5
DOUBT = 32
"""The seconds in which chatd-lifecycle asks the load balancer, if no client connects."""
ROUTED = 20
"""The seconds for which a load balancer may send clients to a target that it deregisters."""
THROTTLED = ClientError({"Error": {"Code": "Throttling", "Message": "Rate exceeded"}}, "CompleteLifecycleAction")


def load(*changes):
    """Return the program, with parts of its text changed, and the longest waits that it may have."""
    program = imds.load("chatd-lifecycle", *changes)
    program.Backoff = partial(Backoff, chance=Longest())
    program.Random = Longest
    return program


lifecycle = load()


class Life:
    """A Lifecycle in surroundings that the test changes, on a clock that it moves.

    `did` has what was asked of them, each with the second.  `faults` has by the name of what is asked the errors that
    come first.
    """

    def __init__(self, program=lifecycle, ports=(1,), chance=None):
        self.terminated = self.deregistered = False
        self.waiting = {LAUNCH, TERMINATE}
        self.unready = set()
        self.clients = dict.fromkeys(ports, 0)
        self.arriving = range(0)
        """The seconds in each of which a client connects to each chatd."""
        self.draining = set()
        self.heard = Deferred()
        self.faults = defaultdict(list)
        self.did, self.said, self.ended = [], [], []
        self.clock = Clock()
        self._life = program.Lifecycle(
            self,
            self,
            ports,
            120,
            echo=self._echo,
            clock=self.clock,
            call=maybeDeferred,
            say=self.said.append,
            chance=chance,
        )

    def begin(self):
        self._life.run().addBoth(self.ended.append)
        return self

    def passes(self, seconds):
        """Let time pass."""
        self.clock.pump([STEP] * int(seconds / STEP))

    def when(self, *what):
        """Return the seconds at which something was asked."""
        return [second for second, *one in self.did if one[: len(what)] == [*what]]

    def completed(self, hook):
        """Return whether a hook was completed."""
        return bool(self.when("complete", hook, "in time"))

    def over(self):
        """Check that it has ended well, and leaves nothing to come."""
        assert self.ended == [None], self.said
        assert self.clock.getDelayedCalls() == []
        return True

    def _asked(self, name, *about):
        self.did.append((self.clock.seconds(), name, *about))
        if self.faults[name]:
            raise self.faults[name].pop(0)

    async def _echo(self):
        self._asked("echo")
        try:
            await self.heard
        except CancelledError:
            self._asked("echo given up")
            raise

    # A Group

    def ending(self):
        self._asked("ending")
        return self.terminated

    def leaving(self):
        self._asked("leaving")
        return self.deregistered

    def complete(self, hook, result):
        waits = hook in self.waiting and (hook == LAUNCH or self.terminated)
        self._asked("complete", hook, "in vain" if not waits else "in time" if result == "CONTINUE" else result)
        return waits

    def heartbeat(self, hook):
        self._asked("heartbeat", hook)
        return hook in self.waiting

    # A Local

    def ready(self, port):
        return port not in self.unready

    def arrivals(self, port):
        self._asked("arrivals", port)
        return len([second for second in self.arriving if second <= self.clock.seconds()])

    def drained(self, port):
        self._asked("drain", port)
        self.draining.add(port)
        return not self.clients[port]


# The launch


def launches(program):
    life = Life(program, ports=(1, 2))
    life.unready = {1, 2}
    life.begin().passes(10)
    life.unready = {2}
    life.passes(10)
    assert life.when("echo") == [], "one is not ready"
    life.unready = set()
    life.passes(10)
    assert len(life.when("echo")) == 1
    assert life.when("complete") == [], "nothing was heard"
    life.heard.callback(None)
    assert life.completed(LAUNCH)
    assert life.said == ["ready: waiting for an echo from the room launch", f"serving: completed {LAUNCH}"]
    life.passes(3600)
    assert len(life.when("complete")) == 1
    assert life.draining == set()
    assert life.ended == []


def does_not_launch_unheard(program):
    life = Life(program).begin()
    life.passes(3600)
    assert life.when("complete") == []
    assert life.said == ["ready: waiting for an echo from the room launch"]


def is_refused_an_echo(program):
    life = Life(program)
    life.waiting.discard(LAUNCH)
    life.begin().heard.errback(Rejected("refused with 404", 404))
    assert life.when("complete", LAUNCH, "in vain") == [0]
    life.waiting.add(LAUNCH)
    life.passes(3600)
    assert life.when("complete", LAUNCH, "ABANDON") == [4]
    assert not life.completed(LAUNCH)
    assert life.said[1:] == [f"{LAUNCH} is abandoned: chatd rejects posts to the room launch: refused with 404"]
    life.terminated = True
    life.passes(10)
    assert life.completed(TERMINATE)
    assert life.over()


def finds_that_no_hook_waits(program):
    life = Life(program)
    life.waiting.discard(LAUNCH)
    life.begin().heard.callback(None)
    life.passes(3600)
    assert life.when("complete") == [0, 4, 10, 20, 37, 54, 71], "ever less often"
    assert life.said[1:] == [f"serving: {LAUNCH} is not waiting for this instance"]
    late = Life(program)
    late.waiting.discard(LAUNCH)
    late.begin().heard.callback(None)
    late.passes(10)
    late.waiting.add(LAUNCH)
    late.passes(10)
    assert late.completed(LAUNCH)


# The end


def launched(program, ports=(1,)):
    life = Life(program, ports).begin()
    life.heard.callback(None)
    life.passes(100)
    life.clients = dict.fromkeys(ports, 5)
    return life


def is_terminated(program):
    """The metadata are first."""
    life = launched(program, ports=(1, 2))
    life.terminated = True
    life.passes(3)
    assert life.draining == {1, 2}
    life.deregistered = True
    life.clients[1] = 0
    life.passes(60)
    assert not life.completed(TERMINATE), "the other has clients"
    life.clients[2] = 0
    life.passes(3)
    assert life.completed(TERMINATE)
    assert life.said[2:] == [
        "draining: the instance is to be terminated",
        "port 1: drained",
        "port 2: drained",
        f"completed {TERMINATE}",
    ]
    assert life.over()


def is_deregistered_first(program):
    """The load balancer is first."""
    life = launched(program)
    life.deregistered = True
    life.passes(DOUBT)
    assert life.draining == {1}
    life.clients = {1: 0}
    life.passes(120)
    assert life.when("complete", TERMINATE) == life.when("heartbeat") == []
    life.terminated = True
    life.passes(3)
    assert life.completed(TERMINATE)
    assert life.said[2:] == [
        "draining: the load balancer sends no more clients",
        "port 1: drained",
        f"completed {TERMINATE}",
    ]
    assert life.over()


def asks_the_balancer_only_in_doubt(program):
    """While clients connect, nobody asks the load balancer; a deregistration is noticed in time all the same."""
    for offset in range(40):
        life = launched(program, ports=(1, 2))
        asked, begin = len(life.when("leaving")), int(life.clock.seconds())
        end = begin + 600 + offset
        life.arriving = range(begin, end + ROUTED, 5)
        life.passes(end - begin)
        assert len(life.when("leaving")) <= asked + 1, "at most before the first arrival was seen"
        assert len(life.when("ending")) > (end - begin) / 3
        life.deregistered = True
        life.passes(45.5)
        assert life.draining == {1, 2}


def asks_the_balancer_rarely(program):
    """Without new clients, the load balancer is asked less than twice a minute."""
    life = Life(program).begin()
    life.passes(3600)
    times = life.when("leaving")
    assert {later - earlier for earlier, later in pairwise(times)} == {31.5}, "25 s, the jitter, and a step"


def asks_the_balancer_without_an_answer_of_chatd(program):
    life = launched(program)
    life.arriving = range(100, 4000)
    life.faults["arrivals"] = [OSError("refused")] * 1000
    life.deregistered = True
    life.passes(DOUBT)
    assert life.draining == {1}


def asks_at_its_own_times(program):
    """Instances that start together do not ask together."""
    lives = [Life(program, chance=Random(seed)).begin() for seed in range(20)]
    times = []
    for life in lives:
        life.passes(600)
        own = life.when("leaving")
        assert all(25 * 0.75 <= later - earlier <= 25 * 1.25 + STEP for earlier, later in pairwise(own))
        times += own
    late = [time for time in times if time > 200]
    assert max(late.count(time) for time in late) <= 5, "of 20"
    assert len(late) / 400 < 1, "a tenth of the account's limit of ten a second"


def is_only_taken_out_of_its_target_group(program):
    life = launched(program)
    life.deregistered = True
    life.passes(DOUBT)
    life.clients, life.deregistered = {1: 0}, False
    life.passes(2 * 3600)
    assert life.draining == {1}
    assert life.when("complete", TERMINATE) == life.when("heartbeat") == life.ended == []


def beats_while_it_drains(program):
    life = launched(program)
    life.terminated = True
    life.passes(131)
    beats = life.when("heartbeat", TERMINATE)
    assert beats == [102, 162, 222]
    life.passes(3)
    assert life.over()
    life.passes(600)
    assert life.when("heartbeat") == beats


def has_clients_that_stay(program):
    life = launched(program)
    life.terminated = True
    life.passes(131)
    assert not life.completed(TERMINATE)
    life.passes(3)
    assert life.completed(TERMINATE)
    assert "port 1: not drained in 130 s" in life.said
    assert life.over()


def has_a_chatd_that_does_not_answer(program):
    life = launched(program)
    life.faults["drain"] = [OSError("refused")] * 1000
    life.terminated = True
    life.passes(140)
    assert life.said[3:] == ["port 1: refused: retrying", "port 1: not drained in 130 s", f"completed {TERMINATE}"]
    assert life.over()


def has_a_chatd_that_is_started_anew(program):
    life = launched(program)
    life.terminated = True
    life.passes(10)
    life.draining.clear()
    life.faults["drain"] = [OSError("refused")]
    life.passes(3)
    assert life.draining == {1}
    life.clients = {1: 0}
    life.passes(2)
    assert life.over()


def has_a_hook_that_waits_late(program):
    life = launched(program)
    life.waiting.clear()
    life.clients, life.terminated = {1: 0}, True
    life.passes(60)
    life.waiting.add(TERMINATE)
    life.passes(17)
    assert life.completed(TERMINATE)
    assert life.over()


def ends_before_it_is_ready(program):
    life = Life(program)
    life.unready, life.clients = {1}, {1: 5}
    life.begin().passes(10)
    life.terminated = True
    life.passes(5)
    life.unready = set()
    life.passes(5)
    assert life.when("echo") == []
    life.clients = {1: 0}
    life.passes(3)
    assert life.completed(TERMINATE)
    assert life.when("complete", LAUNCH) == []
    assert life.over()


def ends_before_it_is_heard(program):
    life = Life(program)
    life.clients = {1: 5}
    life.begin().terminated = True
    life.passes(2)
    assert life.when("echo given up") == [2]
    life.clients = {1: 0}
    life.passes(3)
    assert life.when("complete", LAUNCH) == []
    assert life.completed(TERMINATE)
    assert life.over()


# Errors


def tries_again(program):
    """All errors of AWS are retried with growing waits, and logged once."""
    life = Life(program)
    endpoint = {"endpoint_url": "http://127.0.0.1"}
    errors = [THROTTLED, THROTTLED, ConnectionClosedError(**endpoint), ConnectionClosedError(**endpoint)]
    life.faults["complete"] = [*errors, *[EndpointConnectionError(**endpoint)] * 3, ResponseParserError("no XML:\n<")]
    life.begin().heard.callback(None)
    life.passes(300)
    times = [0, 2, 5, 10, 19, 36, 67, 98, 129]
    assert life.when("complete", LAUNCH) == times
    about = f"completing {LAUNCH}"
    cut = "Connection was closed before we received a valid response from endpoint URL"
    assert life.said[1:] == [
        f"{about}: {THROTTLED}: retrying",
        f'{about}: {cut}: "http://127.0.0.1".: retrying',
        f'{about}: Could not connect to the endpoint URL: "http://127.0.0.1": retrying',
        f"{about}: no XML: <: retrying",
        f"serving: completed {LAUNCH}",
    ]


def logs_it_again(program):
    """An error that returns after a success is logged again."""
    life = launched(program)
    life.faults["leaving"] = [THROTTLED]
    life.passes(DOUBT + 5)
    life.faults["leaving"] = [THROTTLED]
    life.passes(DOUBT + 5)
    assert len([line for line in life.said if line.startswith("target health: An error")]) == 2
    life.faults["ending"] = [OSError("away")] * 1000
    life.deregistered = True
    life.passes(DOUBT)
    assert life.draining == {1}, "one that cannot be asked does not stop the other"
    assert "metadata: away: retrying" in life.said


SCENARIOS = [
    launches,
    does_not_launch_unheard,
    is_refused_an_echo,
    finds_that_no_hook_waits,
    is_terminated,
    is_deregistered_first,
    asks_the_balancer_only_in_doubt,
    asks_the_balancer_rarely,
    asks_the_balancer_without_an_answer_of_chatd,
    asks_at_its_own_times,
    is_only_taken_out_of_its_target_group,
    beats_while_it_drains,
    has_clients_that_stay,
    has_a_chatd_that_does_not_answer,
    has_a_chatd_that_is_started_anew,
    has_a_hook_that_waits_late,
    ends_before_it_is_ready,
    ends_before_it_is_heard,
    tries_again,
    logs_it_again,
]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario(scenario):
    scenario(lifecycle)


def test_unexpected_error_ends_the_run():
    life = launched(lifecycle)
    life.faults["drain"] = [ZeroDivisionError()]
    life.terminated = True
    life.passes(10)
    (failure,) = life.ended
    assert isinstance(failure, Failure)
    assert life.clock.getDelayedCalls() == []
    assert not life.completed(TERMINATE)


def test_slow_drain_fits_the_deregistration_delay():
    budget = imds.load("chatd-boot").DRAIN_SECONDS
    deregistration_delay, hook = 180, 300  # the stack's
    most = 1 + lifecycle.JITTER
    after_clients = ROUTED + 2 * lifecycle.ARRIVAL_SECONDS * most
    after_answer = (lifecycle.HEALTH_SECONDS + lifecycle.ARRIVAL_SECONDS) * most
    drained = max(after_clients, after_answer) + budget + lifecycle.SLACK_SECONDS
    assert drained < deregistration_delay < hook


# Requests to AWS, with real signatures


@pytest.fixture
def cloud(monkeypatch):
    with Cloud() as cloud:
        for name, value in settings(cloud).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("chatd_instance.ATTEMPTS", 1)
        yield cloud


def environ(**changes):
    """Return the settings that chatd-boot writes."""
    own = {"CHATD_INSTANCE": INSTANCE, "CHATD_REGION": REGION, "CHATD_ADMIN_PORTS": "8086", "CHATD_DRAIN": "120"}
    return own | {"CHATD_GROUP": GROUP, "CHATD_TARGET_GROUP": TARGET_GROUP} | changes


def ends_when_its_metadata_say_so(program, cloud):
    group = program.Group(environ())
    for state in (None, "InService", "Standby", "Detached", "Warmed:Stopped", "Warmed:Running", "Warmed:Hibernated"):
        cloud.state = state
        assert group.ending() is False
    for state in ("Terminated", "Warmed:Terminated"):
        cloud.state = state
        assert group.ending() is True


def leaves_when_its_target_drains(program, cloud):
    group = program.Group(environ())
    states = Session().get_service_model("elbv2").shape_for("TargetHealthStateEnum").enum
    assert len(states) > 5
    for state in states:
        cloud.health = state
        assert group.leaving() == (state == "draining"), state
    assert cloud.taken("DescribeTargetHealth")


def completes_its_hooks(program, cloud):
    group = program.Group(environ())
    cloud.waiting = {LAUNCH, TERMINATE}
    about = {"AutoScalingGroupName": GROUP, "InstanceId": INSTANCE}
    assert group.heartbeat(program.TERMINATE_HOOK) is True
    assert group.complete(program.LAUNCH_HOOK, "CONTINUE") is True
    assert group.complete(program.LAUNCH_HOOK, "CONTINUE") is False, "it was completed"
    assert group.complete(program.TERMINATE_HOOK, "CONTINUE") is True
    assert group.heartbeat(program.TERMINATE_HOOK) is False
    assert cloud.taken("RecordLifecycleActionHeartbeat") == [{**about, "LifecycleHookName": TERMINATE}]
    assert cloud.taken("CompleteLifecycleAction") == [
        {**about, "LifecycleHookName": hook, "LifecycleActionResult": "CONTINUE"} for hook in (LAUNCH, TERMINATE)
    ]


ASKED = [ends_when_its_metadata_say_so, leaves_when_its_target_drains, completes_its_hooks]


@pytest.mark.parametrize("scenario", ASKED)
def test_requests_to_aws(scenario, cloud):
    scenario(lifecycle, cloud)


def test_no_balancer_requests_without_target_group(cloud):
    own = environ()
    del own["CHATD_TARGET_GROUP"]
    assert lifecycle.Group(own).leaving() is False
    assert cloud.asked == []


@pytest.mark.parametrize(
    "fault", [("AccessDenied", 403), ("Throttling", 400), ("ServiceUnavailable", 503), ("cut", None)]
)
def test_aws_errors_are_one_line(cloud, fault):
    group = lifecycle.Group(environ())
    cloud.waiting = {LAUNCH}
    for action, ask in (
        ("CompleteLifecycleAction", lambda hook: group.complete(hook, "CONTINUE")),
        ("DescribeTargetHealth", lambda _: group.leaving()),
    ):
        cloud.faults[action] = [fault]
        with pytest.raises((ClientError, BotoCoreError)) as refused:
            ask(LAUNCH)
        assert isinstance(refused.value, lifecycle.TROUBLE)
        assert "\n" not in lifecycle.words(refused.value)
        assert imds.SECRET not in str(refused.value)
    assert group.complete(LAUNCH, "CONTINUE") is True


def test_botocore_retries(cloud, monkeypatch):
    monkeypatch.setattr("chatd_instance.ATTEMPTS", 2)
    cloud.waiting, cloud.faults["CompleteLifecycleAction"] = {LAUNCH}, [("ServiceUnavailable", 503)]
    assert lifecycle.Group(environ()).complete(LAUNCH, "CONTINUE") is True


def test_missing_role_is_a_transient_error(cloud):
    group, cloud.role, cloud.waiting = lifecycle.Group(environ()), None, {LAUNCH}
    with pytest.raises(NoCredentialsError):
        group.complete(LAUNCH, "CONTINUE")
    cloud.role = imds.ROLE
    assert group.complete(LAUNCH, "CONTINUE") is True


def test_double_rejects_a_wrong_signature(cloud, monkeypatch):
    group, cloud.waiting = lifecycle.Group(environ()), {LAUNCH}
    assert group.heartbeat(LAUNCH) is True
    monkeypatch.setattr(imds, "SECRET", "another")
    with pytest.raises(ResponseParserError):  # the double says nothing
        group.complete(LAUNCH, "CONTINUE")
    assert cloud.taken("CompleteLifecycleAction") == []
    assert [one.split(":")[0] for one in cloud.wrong] == ["not signed"]
    cloud.wrong.clear()


@pytest.mark.parametrize("status", [None, 401, 503])
def test_metadata_errors_are_transient(cloud, status):
    group, cloud.faults["meta-data/autoscaling/target-lifecycle-state"] = lifecycle.Group(environ()), [("", status)]
    with pytest.raises(lifecycle.TROUBLE):
        group.ending()
    assert group.ending() is False


# Requests to chatd


@pytest.fixture(scope="module")
def options():
    """Options of an instance that could reject its own client."""
    names = ("--rooms=main", "--rooms=launch", "--origin=https://chat.example", "--rate=1:1")
    return [*names, "--proxy-hops=1"]


def test_requests_to_chatd(tmp_path):
    with Server(tmp_path, admin=LOOPBACK) as server, Raw(server.port) as client:
        port = server.admin_port
        assert lifecycle.Local.ready(port)
        assert lifecycle.Local.arrivals(port) == 0, "a health check is not a client"
        client.join()
        with Raw(server.port) as other:
            other.join()
            assert lifecycle.Local.arrivals(port) == 2
        server.log.wait(r"\b1006\b|disconnect")
        assert lifecycle.Local.arrivals(port) == 2, "also after one has left"
        assert not lifecycle.Local.drained(port)
        assert not lifecycle.Local.ready(port)
        assert client.closed() == 1012
        server.log.wait(r"\bdrained\b")
        assert lifecycle.Local.drained(port)
    assert not lifecycle.Local.ready(port), "nobody listens"
    for ask in (lifecycle.Local.drained, lifecycle.Local.arrivals):
        with pytest.raises(lifecycle.TROUBLE):
            ask(port)


def echo(reactor, url):
    return lifecycle.echo(reactor, url, "chatd", lifecycle.Echo())


def test_echo_reads_its_message_back(tmp_path, options):
    with Server(tmp_path, *options) as server, Raw(server.port) as client:
        client.join("/rooms/launch")
        assert drive(lambda reactor: echo(reactor, f"{server.url}rooms/launch")) == f"chatd/{chatd.__version__}"
        data = client.json()["data"]
        assert data["username"] == "chatd"
        with pytest.raises(Rejected, match="404"):
            drive(lambda reactor: echo(reactor, f"{server.url}rooms/elsewhere"))


def test_rejected_post_fails_the_echo(monkeypatch):
    class Client:
        def __init__(self, reactor, url, listener):
            del reactor, url, listener

        def start(self):
            pass

        def post(self, username, message):
            return fail(Rejected("not this", None))

        def stop(self):
            stopped.append(self)

    stopped = []
    monkeypatch.setattr("chatd_echo.Client", Client)
    failed = []
    Deferred.fromCoroutine(echo(None, "ws://127.0.0.1/")).addErrback(failed.append)
    assert failed[0].check(Rejected)
    assert len(stopped) == 1


def test_echo_ignores_other_messages():
    def said(*messages):
        return [
            Entry(number, "chatd", message, "2026-01-01T00:00:00.000Z") for number, message in enumerate(messages, 1)
        ]

    member, other = lifecycle.Echo(), lifecycle.Echo()
    assert member.message != other.message
    member.on_history(History(Id("abcd", 2), said("hi", other.message)))
    member.on_entries("abcd", said(member.message + "0"))
    assert not member.heard.called
    member.on_entries("abcd", said("hi", member.message))
    assert member.heard.called
    member.on_entries("abcd", said(member.message))
    other.on_history(History(Id("abcd", 1), said(other.message)))
    assert other.heard.called, "it was told with the history, after a connection was lost"


# Whole


def less_patient(folder):
    """Write a chatd-lifecycle that polls ten times a second, and return its path."""
    intervals = {"ARRIVAL_SECONDS": 10, "HEALTH_SECONDS": 25, "STATE_SECONDS": 2, "LOOK_SECONDS": 1}
    faster = [(f"{name}: Final = {seconds}", f"{name}: Final = 0.1") for name, seconds in intervals.items()]
    (folder / "chatd-lifecycle").write_text(imds.changed("chatd-lifecycle", *faster))
    for name in ("chatd_echo.py", "chatd_instance.py"):
        shutil.copy(FILES / name, folder)
    return folder / "chatd-lifecycle"


class Program:
    """chatd-lifecycle by itself, on an instance with one chatd; a context manager."""

    def __init__(self, cloud, server, path=FILES / "chatd-lifecycle"):
        ports = {"CHATD_ADMIN_PORTS": str(server.admin_port), "CHATD_PORT": str(server.port)}
        own = environ(**ports, CHATD_DRAIN="1", CHATD_INSTANCE=cloud.instance)
        self._process = subprocess.Popen(
            [sys.executable, path],
            env=surroundings(cloud, **own),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.log = Lines(self._process.stdout)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self.wait()

    def wait(self):
        code = self._process.wait(LONG)
        self.log.close()
        return code


@pytest.mark.parametrize(("first", "name"), [("metadata", INSTANCE), ("target health", "i-00000000000000007")])
def test_instance_from_launch_to_termination(first, name, tmp_path, options):
    with (
        Cloud(name) as cloud,
        Server(tmp_path, *options, admin=LOOPBACK) as server,
        Program(cloud, server, *([less_patient(tmp_path)] if first == "target health" else [])) as program,
    ):
        cloud.waiting = {LAUNCH}
        cloud.wait("CompleteLifecycleAction")
        assert cloud.taken("CompleteLifecycleAction")[0]["LifecycleHookName"] == LAUNCH
        program.log.wait(f"^serving: completed {LAUNCH}$")
        with Raw(server.port) as client:
            client.join()
            if first == "metadata":
                cloud.waiting, cloud.state = {TERMINATE}, "Terminated"
            else:
                cloud.health = "draining"
            assert client.closed() == 1012
        program.log.wait("^port .*: drained$")
        if first != "metadata":
            assert len(cloud.taken("CompleteLifecycleAction")) == 1
            cloud.waiting, cloud.state = {TERMINATE}, "Terminated"
        assert program.wait() == 0
        assert cloud.taken("CompleteLifecycleAction")[1:] == [
            {
                "AutoScalingGroupName": GROUP,
                "InstanceId": name,
                "LifecycleHookName": TERMINATE,
                "LifecycleActionResult": "CONTINUE",
            }
        ]
        reason = (
            "the instance is to be terminated" if first == "metadata" else "the load balancer sends no more clients"
        )
        assert [*program.log] == [
            "ready: waiting for an echo from the room launch",
            f"serving: completed {LAUNCH}",
            f"draining: {reason}",
            f"port {server.admin_port}: drained",
            f"completed {TERMINATE}",
        ]


def test_no_launch_without_the_room(tmp_path):
    with Cloud() as cloud, Server(tmp_path, "--rooms=main", admin=LOOPBACK) as server:
        cloud.waiting = {LAUNCH}
        with Program(cloud, server) as program:
            program.log.wait(f"^{LAUNCH} is abandoned: chatd rejects posts to the room launch: refused with 404")
            cloud.wait("CompleteLifecycleAction")
        assert [one["LifecycleActionResult"] for one in cloud.taken("CompleteLifecycleAction")] == ["ABANDON"]


@pytest.mark.parametrize("name", ["CHATD_GROUP", "CHATD_ADMIN_PORTS"])
def test_missing_setting_is_one_line(name):
    own = environ()
    del own[name]
    with pytest.raises(SystemExit, match=f"^chatd-lifecycle: {name} is not set: start chatd-lifecycle.service$"):
        lifecycle.main(Clock(), own)


# Negative controls

MUTATIONS = [
    (launches, "            await self._echo()\n", "            pass\n"),
    (does_not_launch_unheard, "            await self._echo()\n", "            self._start(self._echo())\n"),
    (launches, "while not await self._call(self._local.ready, port)", "while False"),
    (
        launches,
        "for port in self._ports:\n            while",
        "for port in self._ports[:1]:\n            while",
    ),
    (
        launches,
        "await self._complete(LAUNCH_HOOK, HOOK_SECONDS):",
        "await self._complete(TERMINATE_HOOK, HOOK_SECONDS):",
    ),
    (is_refused_an_echo, 'HOOK_SECONDS, "ABANDON")', "HOOK_SECONDS)"),
    (finds_that_no_hook_waits, "HOOK_SECONDS: Final = 60", "HOOK_SECONDS: Final = 0"),
    (is_refused_an_echo, "except Rejected as error", "except ArithmeticError as error"),
    (is_terminated, "if await self._call(self._local.drained, port)", "if True"),
    (is_terminated, "await gatherResults(drains, consumeErrors=True)", "pass"),
    (is_terminated, "for port in self._ports]", "for port in self._ports[:1]]"),
    (is_terminated, "self._complete(TERMINATE_HOOK)", 'self._complete("terminate")'),
    (is_terminated, "        self._start(self._see_ending())\n", ""),
    (is_deregistered_first, "        self._start(self._see_leaving())\n", ""),
    (
        is_only_taken_out_of_its_target_group,
        "        await self._until_ending()\n        await self._complete",
        "        await self._complete",
    ),
    (beats_while_it_drains, "        self._start(self._beat())\n", ""),
    (is_deregistered_first, "        await self._until_ending()\n        while True", "        while True"),
    (asks_the_balancer_only_in_doubt, "if now > before", "if False"),
    (asks_the_balancer_only_in_doubt, "elif await self._insist", "elif False and await self._insist"),
    (asks_the_balancer_only_in_doubt, "ARRIVAL_SECONDS: Final = 10", "ARRIVAL_SECONDS: Final = 25"),
    (asks_the_balancer_rarely, "HEALTH_SECONDS: Final = 25", "HEALTH_SECONDS: Final = 5"),
    (
        asks_the_balancer_without_an_answer_of_chatd,
        "except TROUBLE:\n                continue",
        "except OverflowError:\n                continue",
    ),
    (asks_at_its_own_times, "JITTER: Final = 0.25", "JITTER: Final = 0"),
    (finds_that_no_hook_waits, "STATE_SECONDS + backoff.next()", "STATE_SECONDS"),
    (has_clients_that_stay, "self._clock.seconds() < end", "True"),
    (
        has_a_hook_that_waits_late,
        "await self._complete(TERMINATE_HOOK)",
        "await self._complete(TERMINATE_HOOK, 0)",
    ),
    (ends_before_it_is_ready, "        launch.cancel()\n", ""),
    (ends_before_it_is_heard, "        launch.cancel()\n", ""),
    (tries_again, "LOOK_SECONDS + backoff.next()", "LOOK_SECONDS"),
    (tries_again, "if self._said.get(what) != text", "if True"),
    (logs_it_again, "self._said.pop(what, None)", "pass"),
]
"""Each is a scenario, and a text of the program with its replacement."""
MUTATIONS_ASKED = [
    (ends_when_its_metadata_say_so, '"Warmed:Terminated"', '"Warmed:Stopped"'),
    (leaves_when_its_target_drains, '["State"] == "draining"', '["State"] != "healthy"'),
    (leaves_when_its_target_drains, '["State"] == "draining"', '["State"] == "unhealthy"'),
    (completes_its_hooks, '"InstanceId": self._instance', '"InstanceId": "i-0123456789abcdef1"'),
    (completes_its_hooks, '"AutoScalingGroupName": environ["CHATD_GROUP"]', '"AutoScalingGroupName": "chatd"'),
    (completes_its_hooks, "LifecycleActionResult=result", 'LifecycleActionResult="ABANDON"'),
]


@pytest.mark.parametrize(("scenario", "old", "new"), MUTATIONS)
def test_changed_program_fails_its_scenario(scenario, old, new):
    program = load((old, new))
    with pytest.raises((AssertionError, ArithmeticError)):
        scenario(program)


@pytest.mark.parametrize(("scenario", "old", "new"), MUTATIONS_ASKED)
def test_changed_requests_fail_their_scenario(scenario, old, new, cloud):
    program = load((old, new))
    with pytest.raises(AssertionError):
        scenario(program, cloud)
