"""chatd-boot, which configures and starts chatd on an EC2 instance, and the units that it starts."""

import os
import re
import runpy
import subprocess
import sys
from functools import partial

import pytest
from support import imds, stack_role
from support.imds import FILES, GROUP, INSTANCE, REGION, TARGET_GROUP, Cloud, settings, surroundings
from support.servers import LONG
from support.units import analyze, unit

from chatd import config

boot = imds.load("chatd-boot")
boot_instance = sys.modules["chatd_instance"]

NAME = "/chatd/store"
LAUNCH_HOOK = "chatd-launch"
URL = "rediss://chatd:p%40ss$w\"o'r\\d`@redis.internal:6379/0"
SAYS = f"CHATD_STORE_PARAMETER={NAME}\n"
IN_GROUP = f"{SAYS}CHATD_GROUP={GROUP}\nCHATD_TARGET_GROUP={TARGET_GROUP}\n"


@pytest.fixture
def cloud():
    with Cloud() as cloud:
        cloud.user_data, cloud.parameters = SAYS, {NAME: URL}
        yield cloud


SYSTEMCTL = """#!/bin/sh
echo "$@" >>"${0%/*}/started"
exit "${SYSTEMCTL:-0}"
"""


class Booted:
    """The result of a run of chatd-boot: its exit status, its error, the units it started and the files it left."""

    def __init__(self, code, said, folder):
        self.code, self.line = code, said.rstrip("\n")
        started = folder / "started"
        self.started = started.read_text().split() if started.exists() else None
        files = [*(folder / "run").iterdir()]
        self.files = {path.name: path.read_text() for path in files}
        self.modes = {path.stat().st_mode & 0o777 for path in files}

    def values(self, name):
        """Return the environment in a file, as systemd reads it."""
        said = re.findall(r'(?m)^(\w+)="(.*)"$', self.files[name])
        return {key: re.sub(r"\\(.)", r"\1", value) for key, value in said}


@pytest.fixture
def folder(tmp_path):
    """A folder for the files, with a systemctl that records the units to start."""
    systemctl = tmp_path / "systemctl"
    systemctl.write_text(SYSTEMCTL)
    systemctl.chmod(0o755)
    (tmp_path / "run").mkdir()
    return tmp_path


@pytest.fixture
def here(cloud, folder, monkeypatch):
    """Let this process run on the instance of the cloud, in that folder."""
    for name, value in settings(cloud).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(folder / "run"))
    return folder


class Runner:
    """Runs `program`, which is chatd-boot or a changed copy, in this process."""

    def __init__(self, folder, capsys, monkeypatch):
        self.program = boot
        self._folder, self._capsys, self._monkeypatch = folder, capsys, monkeypatch

    def __call__(self, cores=1):
        self._monkeypatch.setattr(self.program, "LOG_SECONDS", 0)
        self._monkeypatch.setattr(self.program, "ABANDON_SECONDS", 0)
        self._monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*range(cores)})
        return Booted(self.program.main(), self._capsys.readouterr().err, self._folder)


@pytest.fixture
def run(here, capsys, monkeypatch):
    return Runner(here, capsys, monkeypatch)


def program(cloud, folder):
    """Run chatd-boot as a process."""
    env = surroundings(cloud, RUNTIME_DIRECTORY=str(folder / "run"))
    env["PATH"] = f"{folder}:{env['PATH']}"
    command = [sys.executable, FILES / "chatd-boot"]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LONG, check=False)
    assert ended.stdout == ""
    return Booted(ended.returncode, ended.stderr, folder)


def test_program_writes_the_environment_and_starts_chatd(cloud, folder):
    """chatd-boot as a process writes both environment files and starts the units."""
    cloud.user_data = IN_GROUP
    ran = program(cloud, folder)
    assert (ran.code, ran.line) == (0, "")
    assert ran.started[:2] == ["--no-block", "start"]
    assert ran.started[-1] == "chatd-lifecycle.service"
    assert ran.values("chatd.env") == {"CHATD_STORE": URL}
    assert ran.values("lifecycle.env")["CHATD_INSTANCE"] == INSTANCE


def test_program_fails_with_one_line(cloud, folder):
    """chatd-boot as a process reports a wrong store in one line, and starts nothing."""
    cloud.parameters[NAME] = "sqlite:/var/lib/chatd/chatd.sqlite"
    check_refused(program(cloud, folder), f"{NAME} names a sqlite: store, which is lost with the instance: set it to")


def test_environment_of_chatd_is_readable_by_root_alone(cloud, run):
    """The options of user data and the decrypted URL are in one file with mode 0600."""
    cloud.user_data = f"# of the stack\n\n{SAYS}CHATD_PROXY_HOPS=1\nCHATD_ORIGIN=https://chat.example *.example\n"
    cloud.parameters[NAME] += "\n"
    ran = run()
    assert (ran.code, ran.line) == (0, "")
    assert ran.started == ["--no-block", "start", "chatd.service"]
    assert [*ran.files] == ["chatd.env"]
    assert ran.modes == {0o600}
    assert ran.values("chatd.env") == {
        "CHATD_PROXY_HOPS": "1",
        "CHATD_ORIGIN": "https://chat.example *.example",
        "CHATD_STORE": URL,
    }
    assert cloud.taken("GetParameter") == [{"Name": NAME, "WithDecryption": True}]


def test_options_that_the_image_sets_exist():
    """A renamed option would otherwise become one that user data may set."""
    assert {option.name for option in config.OPTIONS} >= boot.FIXED


def test_page_names_the_options_that_the_image_sets():
    """docs/image.md names every option that user data may not set, and no other."""
    page = (FILES.parents[1] / "docs/image.md").read_text("utf-8")
    [sentence] = re.findall(r"except (`--[^.]*?),\s+which are not allowed", page)
    assert set(re.findall(r"`--([a-z-]+)`", sentence)) == boot.FIXED


def test_page_names_the_endpoints_of_an_instance():
    """docs/deploy.md names an endpoint for each service that an instance may call; SSM itself calls KMS."""
    page = (FILES.parents[1] / "docs/deploy.md").read_text("utf-8")
    [sentence] = re.findall(r"interface endpoints for\s(.*?) in those subnets", page, re.DOTALL)
    services = {action.partition(":")[0] for action in stack_role.ALLOWED}
    assert set(re.findall(r"`([a-z]+)`", sentence)) == services - {"kms"}


def test_room_of_the_lifecycle_is_added_to_the_rooms(cloud, run):
    """If user data limit the rooms, the room that chatd-lifecycle joins is allowed too."""
    cloud.user_data = f"{SAYS}CHATD_ROOMS=main team-*\n"
    assert run().values("chatd.env")["CHATD_ROOMS"] == "main team-* launch"


def test_lifecycle_starts_in_a_group(cloud, run):
    """If user data name a group, chatd-lifecycle starts too, and has an environment file."""
    cloud.user_data, cloud.waiting = IN_GROUP, {LAUNCH_HOOK}
    ran = run()
    assert cloud.taken("CompleteLifecycleAction") == [], "that is for chatd-lifecycle"
    assert ran.started == ["--no-block", "start", "chatd.service", "chatd-lifecycle.service"]
    assert ran.modes == {0o600}
    assert ran.values("lifecycle.env") == {
        "CHATD_INSTANCE": INSTANCE,
        "CHATD_REGION": REGION,
        "CHATD_ADMIN_PORTS": "8086",
        "CHATD_DRAIN": "120",
        "CHATD_GROUP": GROUP,
        "CHATD_TARGET_GROUP": TARGET_GROUP,
    }


def test_group_without_a_load_balancer(cloud, run):
    """A group without a target group is enough for chatd-lifecycle."""
    cloud.user_data = f"{SAYS}CHATD_GROUP={GROUP}"
    assert "CHATD_TARGET_GROUP" not in run().values("lifecycle.env")


@pytest.mark.parametrize(
    ("cores", "units", "ports"),
    [
        (1, ["chatd.service"], "8086"),
        (2, ["chatd@1.service", "chatd@2.service"], "8091 8092"),
        (64, [f"chatd@{name}.service" for name in range(1, 10)], " ".join(str(8090 + name) for name in range(1, 10))),
    ],
)
def test_one_instance_per_core(cloud, run, cores, units, ports):
    """One core runs chatd.service; several run one chatd@.service each, nine at most."""
    cloud.user_data = IN_GROUP
    ran = run(cores)
    assert ran.started[2:] == [*units, "chatd-lifecycle.service"]
    assert ran.values("lifecycle.env")["CHATD_ADMIN_PORTS"] == ports


REFUSED = [
    (None, f"no store is named: set {SAYS.strip()} in user data"),
    ("", "no store is named"),
    ("#cloud-config\nruncmd: [x]\n", "line 2 is not KEY=VALUE"),
    (b"\x1f\x8b\xff", "user data is not text"),
    (f"{SAYS}CHATD_STORE=redis://:hunter2@x\n", "line 2: CHATD_STORE is secret"),
    (f"{SAYS}CHATD_STORE_PASSWORD_FILE=/x\n", "CHATD_STORE_PASSWORD_FILE cannot be set: use CHATD_STORE_PARAMETER"),
    *((f"{SAYS}CHATD_{name}=1\n", f"CHATD_{name} cannot be set") for name in ("LISTEN", "ADMIN", "DRAIN", "SEED")),
    (f"{SAYS}PATH=/x\n", "PATH cannot be set"),
    (f"{SAYS}{SAYS}", "line 2: CHATD_STORE_PARAMETER is set twice: remove one"),
    ("CHATD_STORE_PARAMETER=\n", "line 1: CHATD_STORE_PARAMETER is empty"),
    ("CHATD_STORE_PARAMETER=redis://:hunter2@x\n", "is neither the name nor the ARN of an SSM parameter"),
    (f"{SAYS}CHATD_HISTORY=some\n", "line 2: CHATD_HISTORY: 'some' is not a whole number"),
    (f"{SAYS}CHATD_ROOMS=main A!\n", "CHATD_ROOMS: 'A!' is not a pattern"),
    (f"{SAYS}CHATD_TARGET_GROUP={TARGET_GROUP}\n", "CHATD_TARGET_GROUP needs CHATD_GROUP"),
    (f"{SAYS}CHATD_TARGET_GROUP=chatd\n", "line 2: CHATD_TARGET_GROUP is not the ARN of a target group"),
]


@pytest.mark.parametrize(("user_data", "line"), REFUSED)
def test_wrong_user_data(cloud, user_data, line, run):
    """Wrong user data are refused in one line, before AWS is called."""
    cloud.user_data = user_data
    check_refused(run(), line)
    assert cloud.asked == []


def check_refused(ran, line):
    """Check that a run failed with one line without secrets, started no unit and left no file."""
    assert ran.code == 1
    assert line in ran.line
    assert re.fullmatch(r"chatd-boot: [^\n]+: [^\n]+|chatd-boot: [^\n]+, such as [^\n]+", ran.line), "names the remedy"
    assert "hunter2" not in ran.line
    assert (ran.started, ran.files) == (None, {})


@pytest.mark.parametrize(
    ("value", "line"),
    [
        (
            "sqlite:/var/lib/chatd/chatd.sqlite",
            f"{NAME} names a sqlite: store, which is lost with the instance: set it",
        ),
        ("memory:", "names a memory: store"),
        ("Memory:", "names a memory: store"),
        ("", "is not a redis://HOST:PORT/DATABASE: set it"),
        ("hunter2", "is not a redis://HOST:PORT/DATABASE"),
        ("https://:hunter2@redis.internal", "is not a redis://"),
        ("redis://:hunter2@redis.internal/zero", "is not a redis://"),
        ("redis://:hunter2@redis.internal:x/0", "is not a redis://"),
        ("redis://:hunter2\n@redis.internal/0", "is not a redis://"),
        ("redis://chatd@redis.internal", "names a user and no password"),
    ],
)
def test_wrong_store(cloud, value, line, run):
    """A wrong store is refused in one line that does not contain the value."""
    cloud.parameters[NAME] = value
    check_refused(run(), line)


def test_missing_parameter(cloud, run):
    """A missing SSM parameter is a final error, so there is no retry."""
    cloud.parameters.clear()
    check_refused(run(), f"the SSM parameter {NAME}: An error occurred (ParameterNotFound)")
    assert len(cloud.asked) == 1


class Time:
    """A clock that only `sleep` advances."""

    def __init__(self):
        self.now, self.slept = 0.0, []

    def clock(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


def learned(time):
    return boot.patiently(boot.learn, time.clock, time.sleep)


def test_metadata_retries_back_off(cloud, here, capsys):
    """Unavailable metadata are retried with growing pauses, and logged once."""
    time, cloud.away = Time(), True

    def sleep(seconds):
        time.sleep(seconds)
        cloud.away = len(time.slept) < 7

    learnt = boot.patiently(boot.learn, time.clock, sleep)
    assert learnt == ({boot.PARAMETER: NAME}, URL, INSTANCE, REGION)
    assert time.slept == [1, 2, 4, 8, 15, 15, 15]
    assert re.fullmatch(rf"chatd-boot: {cloud.url}/latest/api/token: [^\n]*: trying again\n", capsys.readouterr().err)


def test_metadata_retries_end(cloud, here):
    """Metadata that stay unavailable end the program after PATIENCE_SECONDS."""
    time, cloud.away = Time(), True
    with pytest.raises(boot.BootError, match=r"gave up after 240 s: .*: correct it and reboot"):
        learned(time)
    assert 220 < time.now <= boot.PATIENCE_SECONDS


@pytest.mark.parametrize("name", ["instance", "region"])
def test_metadata_without_the_instance(cloud, here, name):
    """Metadata without an instance id or a region end the program after the retries."""
    setattr(cloud, name, None)
    with pytest.raises(boot.BootError, match="lack its id or region: correct it"):
        learned(Time())


def test_transient_errors_of_ssm_are_retried(cloud, here, monkeypatch):
    """Throttling, server errors and lost connections are retried with growing pauses."""
    monkeypatch.setattr("chatd_instance.ATTEMPTS", 1)
    time = Time()
    cloud.faults["GetParameter"] = [("ThrottlingException", 400), ("InternalServerError", 500), ("cut", None)]
    assert learned(time).url == URL
    assert time.slept == [1, 2, 4]


def test_failing_metadata_are_retried(cloud, here):
    """Server errors of the metadata service are retried."""
    time, cloud.faults["user-data"] = Time(), [("", 500), ("", 503)]
    assert learned(time).url == URL
    assert time.slept == [1, 2]


def test_denied_access_is_retried(cloud, here, capsys):
    """Denied access is retried, because a new role takes time to become effective, and ends the program later."""
    time, cloud.denied = Time(), True

    def sleep(seconds):
        time.sleep(seconds)
        cloud.denied = False

    assert boot.patiently(boot.learn, time.clock, sleep).url == URL
    assert re.fullmatch(r"chatd-boot: .*AccessDeniedException.*: trying again\n", capsys.readouterr().err)
    cloud.denied = True
    with pytest.raises(boot.BootError, match=r"gave up after 240 s: .*AccessDeniedException"):
        learned(Time())


def test_missing_role_is_retried(cloud, here):
    """An instance whose role is not attached yet is retried."""
    time, cloud.role = Time(), None

    def sleep(seconds):
        time.sleep(seconds)
        cloud.role = imds.ROLE

    assert boot.patiently(boot.learn, time.clock, sleep).url == URL
    assert time.slept == [1]


def abandons(cloud, run):
    """Check that a run fails with one line, abandons the launch hook of its instance once, and leaves none waiting."""
    cloud.waiting = {LAUNCH_HOOK}
    ran = run()
    assert ran.code == 1
    assert re.fullmatch(r"chatd-boot: [^\n]+", ran.line)
    about = {"AutoScalingGroupName": GROUP, "InstanceId": INSTANCE}
    assert cloud.taken("CompleteLifecycleAction") == [
        about | {"LifecycleHookName": LAUNCH_HOOK, "LifecycleActionResult": "ABANDON"},
        about | {"LifecycleHookName": "chatd-terminate", "LifecycleActionResult": "CONTINUE"},
    ]
    assert cloud.waiting == set()


@pytest.mark.parametrize("line", ["CHATD_HISTORY=some", "#cloud-config\nruncmd: [x]", "CHATD_STORE_PARAMETER="])
def test_wrong_user_data_abandon_the_launch(cloud, run, line):
    """Of wrong user data too, the line with the group is read."""
    cloud.user_data = f"{line}\nCHATD_GROUP={GROUP}\n"
    abandons(cloud, run)


@pytest.mark.parametrize("value", [None, "sqlite:/x"])
def test_wrong_store_abandons_the_launch(cloud, run, value):
    """A missing or wrong parameter ends the launch at once."""
    cloud.user_data, cloud.parameters = IN_GROUP, {NAME: value} if value else {}
    abandons(cloud, run)


def test_failing_systemctl_abandons_the_launch(cloud, run, monkeypatch):
    """Units that cannot be started end the launch at once."""
    monkeypatch.setenv("SYSTEMCTL", "5")
    cloud.user_data = IN_GROUP
    abandons(cloud, run)


def test_end_of_the_retries_abandons_the_launch(cloud, run, monkeypatch):
    """After PATIENCE_SECONDS of denied access the launch ends, and does not wait for the timeout of the hook."""
    monkeypatch.setattr(boot, "PATIENCE_SECONDS", 0)
    cloud.user_data, cloud.denied = IN_GROUP, True
    abandons(cloud, run)


def test_no_launch_to_abandon_without_a_group(cloud, run):
    """Without a group, and on an instance that is in service, a failure leaves the hooks alone."""
    cloud.user_data, cloud.parameters = SAYS, {}
    run()
    assert len(cloud.asked) == 1
    cloud.user_data = IN_GROUP
    assert re.fullmatch(r"chatd-boot: [^\n]+ParameterNotFound[^\n]+", run().line)
    assert cloud.taken("CompleteLifecycleAction") == []
    cloud.waiting = {"chatd-terminate"}
    run()
    assert cloud.waiting == {"chatd-terminate"}, "it may be serving"


def test_launch_hook_becomes_active_late(cloud, here, capsys):
    """The hook is abandoned as soon as it is active; before the first attempt the agent sends the log."""
    time, cloud.user_data = Time(), IN_GROUP

    def sleep(seconds):
        time.sleep(seconds)
        if len(time.slept) == 4:
            cloud.waiting = {LAUNCH_HOOK}

    boot.abandon(time.clock, sleep)
    assert time.slept == [boot.LOG_SECONDS, 1, 2, 4]
    hooks = [one["LifecycleHookName"] for one in cloud.taken("CompleteLifecycleAction")]
    assert hooks == [LAUNCH_HOOK, "chatd-terminate"]
    assert capsys.readouterr().err == ""


def test_launch_that_cannot_be_abandoned(cloud, here, capsys, monkeypatch):
    """Errors are retried for ABANDON_SECONDS, and the last one is logged."""
    monkeypatch.setattr("chatd_instance.ATTEMPTS", 1)
    time, cloud.user_data, cloud.waiting = Time(), IN_GROUP, {LAUNCH_HOOK}
    cloud.faults["CompleteLifecycleAction"] = [("AccessDenied", 403)] * 100
    boot.abandon(time.clock, time.sleep)
    assert time.now - boot.LOG_SECONDS <= boot.ABANDON_SECONDS
    said = capsys.readouterr().err
    assert re.fullmatch(
        r"chatd-boot: cannot complete chatd-launch, which will time out: [^\n]*AccessDenied[^\n]*\n", said
    )
    cloud.away = True
    boot.abandon(time.clock, time.sleep)
    assert capsys.readouterr().err == ""


def test_metadata_ignore_the_proxy(cloud, here, monkeypatch):
    """Requests for metadata do not use the proxy in the environment."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    assert boot.metadata("meta-data/instance-id") == INSTANCE


def test_refused_connection_to_the_metadata(here, monkeypatch):
    """The error names the URL that refused the connection."""
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(boot.BootError, match=r"http://127.0.0.1:1/latest/api/token: Connection refused"):
        learned(Time())


def test_failing_systemctl(cloud, run, monkeypatch):
    """If systemctl fails, the program fails with its exit status in the line."""
    monkeypatch.setenv("SYSTEMCTL", "5")
    ran = run()
    assert ran.code == 1
    assert re.fullmatch(r"chatd-boot: [^\n]* returned non-zero exit status 5\.", ran.line)


def test_missing_command_or_folder(run, monkeypatch):
    """A missing command or folder is reported in one line."""
    monkeypatch.setenv("PATH", "")
    assert re.fullmatch(r"chatd-boot: \[Errno 2\][^\n]*: 'systemctl'", run().line)
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/nowhere")
    assert re.fullmatch(r"chatd-boot: \[Errno 2\][^\n]*: '/nowhere/chatd.new'", run().line)


@pytest.mark.parametrize(("said", "code"), [(SAYS, 0), ("", 1)])
def test_exit_status_of_the_script(cloud, here, said, code):
    """The script's exit status is that of its main function."""
    cloud.user_data = said
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(FILES / "chatd-boot"), run_name="__main__")
    assert ended.value.code == code


def test_environment_file_is_replaced_atomically(tmp_path):
    """A file is written beside the old one and renamed; leftovers of an interrupted write are overwritten."""
    path = tmp_path / "chatd.env"
    path.with_suffix(".new").write_text("half")
    boot.write(path, {"A": "1", "B": "2"})
    boot.write(path, {"A": 'x"y'})
    assert path.read_text() == 'A="x\\"y"\n'
    assert [*tmp_path.iterdir()] == [path]


# Negative controls


def finds_sqlite(cloud, run):
    test_wrong_store_abandons_the_launch(cloud, run, "sqlite:/x")


def finds_nonsense(cloud, run):
    test_wrong_user_data_abandon_the_launch(cloud, run, "CHATD_HISTORY=some")


def refuses(value, line):
    return partial(test_wrong_store, value=value, line=line)


MUTATIONS = [
    (refuses("sqlite:/x", "names a sqlite: store"), '    kind = url.partition(":")', '    return url\n    kind = ""'),
    (refuses("memory:", "names a memory: store"), 'if kind in ("sqlite", "memory")', 'if kind == "sqlite"'),
    (refuses("redis://:hunter2\n@h", "is not a redis://"), 're.fullmatch(r"[!-~]+", url)', "url"),
    (refuses("https://:hunter2@h", "is not a redis://"), "{name} {error}: {remedy}", "{name} {error}: {remedy} {url}"),
    (refuses("", "is not a redis://"), "        return 1\n", ""),
    (test_missing_parameter, "in FINAL", "in FINAL and name == ''"),
    (test_environment_of_chatd_is_readable_by_root_alone, "0o600", "0o644"),
    (test_environment_of_chatd_is_readable_by_root_alone, "WithDecryption=True", "WithDecryption=False"),
    (test_environment_of_chatd_is_readable_by_root_alone, "quoted.items())", "values.items())"),
    (test_room_of_the_lifecycle_is_added_to_the_rooms, '+= f" {ROOM}"', '+= ""'),
    (test_lifecycle_starts_in_a_group, '        units.append("chatd-lifecycle.service")\n', ""),
    (test_lifecycle_starts_in_a_group, '"CHATD_INSTANCE": instance', '"CHATD_INSTANCE": region'),
    (finds_sqlite, "        abandon()\n", ""),
    (
        finds_sqlite,
        '"AutoScalingGroupName": name, "InstanceId": instance',
        '"AutoScalingGroupName": name, "InstanceId": region',
    ),
    (finds_sqlite, 'LAUNCH_HOOK, "ABANDON"', 'LAUNCH_HOOK, "CONTINUE"'),
    (finds_sqlite, '        complete(TERMINATE_HOOK, "CONTINUE")', "        pass"),
    (finds_sqlite, "    if complete(LAUNCH_HOOK", "    if not complete(LAUNCH_HOOK"),
    (
        test_no_launch_to_abandon_without_a_group,
        '    if complete(LAUNCH_HOOK, "ABANDON"):\n',
        '    complete(LAUNCH_HOOK, "ABANDON")\n    if True:\n',
    ),
    (finds_nonsense, "group(), metadata(", 'parse(metadata("user-data") or "")["CHATD_GROUP"], metadata('),
    (
        test_lifecycle_starts_in_a_group,
        "        return 1\n    return 0\n",
        "        return 1\n    abandon()\n    return 0\n",
    ),
]
"""Each is a test, a part of the program, and the faulty text that replaces it."""


@pytest.mark.parametrize(("test", "old", "new"), MUTATIONS)
def test_changed_program_fails_its_test(cloud, run, test, old, new):
    """Each test above fails for a chatd-boot with a fault that it is meant to detect."""
    run.program = imds.load("chatd-boot", (old, new), ("PATIENCE_SECONDS: Final = 240", "PATIENCE_SECONDS: Final = 0"))
    with pytest.raises((AssertionError, run.program.BootError)):
        test(cloud=cloud, run=run)


# The units


@pytest.mark.parametrize("name", ["chatd", "chatd@"])
def test_units_of_an_instance_read_the_environment_file(name):
    """On EC2 the units wait for chatd-boot, and the environment file alone names their store."""
    plain, changed = unit(f"{name}.service"), unit(f"{name}.service.conf")
    assert changed["EnvironmentFile"] == ["", "/run/chatd/chatd.env"]
    assert changed["Environment"][0] == ""
    assert "STORE" not in "".join(changed["Environment"])
    assert changed["Requires"] == changed["After"] == ["chatd-boot.service"]
    command = re.sub(r"--drain \d+", f"--drain {boot.DRAIN_SECONDS}", plain["ExecStart"][0])
    assert changed["ExecStart"] == ["", command]
    assert boot.DRAIN_SECONDS < int(changed["TimeoutStopSec"][0]) < 180


def test_retries_end_before_systemd_and_the_launch_hook():
    """chatd-boot abandons the launch hook before the hook and TimeoutStartSec expire."""
    call = boot_instance.ATTEMPTS * (boot_instance.CONNECT_SECONDS + boot_instance.READ_SECONDS + 20)
    longest = boot.PATIENCE_SECONDS + boot.LOG_SECONDS + boot.ABANDON_SECONDS
    assert longest < 300
    assert longest + call + boot.ABANDON_SECONDS + call < int(unit("chatd-boot.service")["TimeoutStartSec"][0])


def test_systemd_accepts_the_units_of_an_instance(tmp_path):
    """systemd-analyze verify reports nothing about the units and their drop-ins."""
    for path in FILES.iterdir():
        if path.suffix in (".service", ".socket"):
            text = re.sub(r"/opt/chatd/bin/\S+", "/bin/true", path.read_text())
            (tmp_path / path.name.replace("@", "@1")).write_text(text)
    for name in ("chatd.service", "chatd@.service"):
        folder = tmp_path / f"{name.replace('@', '@1')}.d"
        folder.mkdir()
        (folder / "ec2.conf").write_text(re.sub(r"/opt\S+", "/bin/true", (FILES / f"{name}.conf").read_text()))
    verify = ("verify", "--man=no", "--recursive-errors=no")
    assert analyze(*verify, *sorted(tmp_path.glob("*.service"))) == ("", 0)
    (folder / "ec2.conf").write_text("[Service]\nEnvironmentFiles=x\n")
    assert "Unknown key" in analyze(*verify, *sorted(tmp_path.glob("*.service")))[0]


@pytest.mark.parametrize(("name", "most"), [("chatd-boot", 35), ("chatd-lifecycle", 20)])
def test_sandboxes_have_low_exposure(name, most):
    """systemd-analyze security scores both units below their limits."""
    said, code = analyze("security", "--offline=true", f"--threshold={most}", FILES / f"{name}.service")
    assert code == 0, said
