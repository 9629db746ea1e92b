"""chatd-agent, as a program: it writes the configuration of an EC2 instance's CloudWatch agent.

The agent itself is not here.  Its configuration's keys are those of the schema in its sources (1.300071), which
tells journald from version 1.300070 on.
"""

import contextlib
import json
import re
import subprocess
import sys
import urllib.request

import pytest
from support import booted, imds
from support.imds import FILES, GROUP, Cloud, surroundings
from support.servers import LONG, LOOPBACK, Lines, Server, need

program = imds.load("chatd-agent")

SAYS = f"CHATD_STORE_PARAMETER=/chatd/store\nCHATD_GROUP={GROUP}\n"


@pytest.fixture
def cloud():
    with Cloud() as cloud:
        cloud.user_data = SAYS
        yield cloud


def agent(cloud, folder):
    """Run chatd-agent; answers its exit status and what it said."""
    result = subprocess.run(
        [sys.executable, FILES / "chatd-agent", folder],
        env=surroundings(cloud),
        capture_output=True,
        text=True,
        timeout=LONG,
        check=False,
    )
    return result.returncode, result.stderr


def test_configuration_names_group_and_log(cloud, tmp_path):
    assert agent(cloud, tmp_path) == (0, "")
    logs = json.loads((tmp_path / "amazon-cloudwatch-agent.json").read_text())["logs"]
    (journal,) = logs["logs_collected"]["journald"]["collect_list"]
    metrics = logs["metrics_collected"]["prometheus"]
    assert journal["log_group_name"] == metrics["log_group_name"] == f"/chatd/{GROUP}"
    assert metrics["prometheus_config_path"] == str(tmp_path / "prometheus.yml")
    scraped = (tmp_path / "prometheus.yml").read_text()
    assert f'AutoScalingGroupName: "{GROUP}"' in scraped
    assert "@" not in scraped.replace("chatd@", "")
    assert re.findall(r"127\.0\.0\.1:(\d+)", scraped) == ["8086", *(f"809{digit}" for digit in range(1, 10))]


def journal():
    """Return the units whose log the agent reads."""
    text = (FILES / "cloudwatch-agent.json").read_text()
    (journal,) = json.loads(text)["logs"]["logs_collected"]["journald"]["collect_list"]
    return journal["units"]


def units():
    """Return the units of all instances, those of chatd@.service by their names."""
    names = range(1, imds.load("chatd-boot").MOST + 1)
    files = [path.name for path in FILES.glob("chatd*.service")]
    return sorted(file.replace("@.", f"@{name}.") for file in files for name in (names if "@." in file else [""]))


def test_log_names_all_units_of_an_instance():
    """The agent names each unit, because journalctl expands a pattern only once, from units already in the journal."""
    assert sorted(journal()) == units()


UNIT = "[Service]\nType=oneshot\nExecStart=/bin/echo line of %n\n"


def followed(machine, patterns):
    """Return the units whose lines journalctl follows, if it starts before any of them, as the agent starts it."""
    folder = machine.path("/run/systemd/system")
    folder.mkdir(parents=True, exist_ok=True)
    for file in FILES.glob("chatd*.service"):
        (folder / file.name).write_text(UNIT)
    machine.run("systemctl", "daemon-reload")
    first, last = "chatd-boot.service", "chatd-lifecycle.service"
    options = "--utc", "--output=json", "--follow", "--priority=info", *(f"--unit={name}" for name in patterns)
    command = machine.command("systemd-run", "--quiet", "--unit=agent", "--pipe", "journalctl", *options)
    agent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    said = Lines(agent.stdout)
    try:
        # journalctl does not say when it begins to follow, and misses what is written in that moment.
        while f"line of {first}" not in said.text and agent.poll() is None:
            machine.run("systemctl", "start", first)
            with contextlib.suppress(AssertionError):
                said.wait(f"line of {first}", seconds=1)
        machine.run("systemctl", "start", *[name for name in units() if name not in (first, last)])
        machine.run("systemctl", "start", last)
        said.wait(f"line of {last}")
    finally:
        machine.run("systemctl", "stop", "agent.service")
        agent.wait(LONG)
        said.close()
    return sorted({*re.findall(r"line of (chatd[\w@-]*\.service)", said.text)})


@pytest.fixture
def machine():
    with booted.Machine(booted.debian(), [], booted.NO_NETWORK) as machine:
        yield machine


def test_journalctl_follows_units_that_start_later(machine):
    assert followed(machine, journal()) == units()


def test_journalctl_follows_no_later_unit_of_a_pattern(machine):
    """The negative control: a pattern misses every unit that starts after journalctl."""
    patterns = sorted({re.sub(r"@\d", "@*", name) for name in journal()})
    assert followed(machine, patterns) == [name for name in units() if "@" not in name]


def test_promtool_accepts_the_configuration(cloud, tmp_path):
    promtool = [need("promtool"), "check", "config", tmp_path / "prometheus.yml"]
    assert agent(cloud, tmp_path) == (0, "")
    assert subprocess.run(promtool, capture_output=True, timeout=LONG, check=False).returncode == 0
    (tmp_path / "prometheus.yml").write_text((tmp_path / "prometheus.yml").read_text().replace("labels", "label"))
    assert subprocess.run(promtool, capture_output=True, timeout=LONG, check=False).returncode == 1


def test_published_metrics_are_chatds(tmp_path):
    configuration = json.loads((FILES / "cloudwatch-agent.json").read_text())
    (declared,) = configuration["logs"]["metrics_collected"]["prometheus"]["emf_processor"]["metric_declaration"]
    names = {name.strip("^$") for name in declared["metric_selectors"]}
    (kept,) = re.findall(r"regex: (\S+)", (FILES / "prometheus.yml").read_text())
    assert {*kept.split("|")} == names
    with Server(tmp_path, "--store=memory:", admin=LOOPBACK) as server:
        url = f"http://127.0.0.1:{server.admin_port}/metrics"
        with urllib.request.urlopen(url, timeout=LONG) as answer:
            told = re.findall(r"(?m)^# TYPE (\w+) gauge$", answer.read().decode())
    assert names <= {*told}


@pytest.mark.parametrize("said", [None, "", "CHATD_RETAIN=1\n", "CHATD_GROUP=\n", "CHATD_GROUP=a b\n", b"\xff\xfe"])
def test_agent_does_not_start_without_a_group(cloud, tmp_path, said):
    cloud.user_data = said
    code, line = agent(cloud, tmp_path)
    assert code == 1
    assert line == "chatd-agent: no group: set CHATD_GROUP=NAME in user data\n"
    assert [*tmp_path.iterdir()] == []


def test_retry_without_metadata(cloud, tmp_path):
    cloud.away = True
    code, line = agent(cloud, tmp_path)
    assert code == 255
    assert re.fullmatch(r"chatd-agent: .+\n", line)
    cloud.away = False
    assert agent(cloud, tmp_path) == (0, "")


@pytest.mark.parametrize("name", ["chatd", "chatd-2", "a.b_c", "Chatd"])
def test_group_among_other_settings(cloud, monkeypatch, name):
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", cloud.url)
    cloud.user_data = f"# CHATD_GROUP=no\nCHATD_RETAIN=10\n CHATD_GROUP= {name} \nCHATD_PING=9"
    assert program.group() == name


def test_unit_runs_it_before_the_agent():
    unit = (FILES / "amazon-cloudwatch-agent.service.conf").read_text()
    assert "\nExecCondition=/opt/chatd/bin/chatd-agent /opt/aws/amazon-cloudwatch-agent/etc\n" in unit
