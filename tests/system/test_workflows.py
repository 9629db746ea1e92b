"""The workflows of GitHub: linters, rules, and the way they call scripts/deploy.

GitHub itself is not tested.  The script of a step runs here in bash, with a double of scripts/deploy that records its
arguments.  Each check has negative controls, workflows that break it.
"""

import functools
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from support.booted import succeed
from support.go_tools import go_tool
from support.servers import LONG, ROOT, missing
from support.workflow_rules import faults, read, texts

ZIZMOR = pathlib.Path(sys.executable).with_name("zizmor")
COMMANDS = "ship", "verify", "rollback", "abort"
AGENTS = "--agents TEMP/agents.json"
ROLE = "arn:aws:iam::123456789012:role/cloudformation"
GIVEN = {"STACK": "lab", "IMAGE": "ami-0123", "CLOUDFORMATION_ROLE": ROLE, "ARCH": "amd64"}


def changed(name, old, new):
    """Return the workflows, with something else in one of them."""
    found = texts()
    assert old in found[name]
    return found | {name: found[name].replace(old, new)}


def written(folder, workflows):
    """Put them where linters look for them."""
    place = folder / ".github" / "workflows"
    place.mkdir(parents=True)
    (folder / ".git").mkdir()
    for name, text in workflows.items():
        (place / name).write_text(text)
    return [place / name for name in workflows]


# Linters


def actionlint(folder, workflows):
    """Return the names of the rules that actionlint reports, without the linters that it can run."""
    tool = go_tool("actionlint")
    command = [tool, "-shellcheck=", "-pyflakes=", "-format={{json .}}", *written(folder, workflows)]
    said = succeed(*command, statuses=(0, 1), cwd=folder)
    return sorted({one["kind"] for one in json.loads(said)})


def zizmor(folder, workflows):
    """Return the names of the audits that zizmor reports without a network."""
    if not ZIZMOR.exists():
        missing("zizmor is not installed")
    command = [ZIZMOR, "--offline", "--no-config", "--strict-collection", "--no-exit-codes", "--format=json"]
    command += written(folder, workflows)
    return sorted({one["ident"] for one in json.loads(succeed(*command)) if not one["ignored"]})


@pytest.mark.parametrize("linter", [actionlint, zizmor])
def test_linters_accept_the_workflows(tmp_path, linter):
    assert linter(tmp_path, texts()) == []


@pytest.mark.parametrize(
    ("linter", "change", "found"),
    [
        (actionlint, ("ci.yml", "timeout-minutes:", "timeout-minute:"), "syntax-check"),
        (actionlint, ("ci.yml", "runs-on: ubuntu-24.04", "runs-on: ubuntu-23.04"), "runner-label"),
        (actionlint, ("ci.yml", "github.event_name ==", "github.event_nam =="), "expression"),
        (actionlint, ("ci.yml", "contents: read", "content: read"), "permissions"),
        (actionlint, ("deploy.yml", "needs: tests", "needs: test"), "job-needs"),
        (actionlint, ("deploy.yml", "inputs.image", "inputs.ami"), "expression"),
        (actionlint, ("deploy.yml", "type: choice", "type: choices"), "syntax-check"),
        (actionlint, ("deploy.yml", "workflows/ci.yml", "workflows/ci.yml@v1"), "workflow-call"),
        (zizmor, ("deploy.yml", "@3d3c42e5aac5ba805825da76410c181273ba90b1", "@v7"), "unpinned-uses"),
        (zizmor, ("deploy.yml", '"$COMMAND" --json', "${{ inputs.image }} --json"), "template-injection"),
        (zizmor, ("ci.yml", "          .ci/run", "          : ${{ github.head_ref }}"), "template-injection"),
        (
            zizmor,
            (
                "deploy.yml",
                "permissions:\n      contents: read\n      id-token: write # to assume the role",
                "permissions: write-all # to assume the role",
            ),
            "excessive-permissions",
        ),
        (zizmor, ("deploy.yml", "persist-credentials: false", "persist-credential: false"), "artipacked"),
        (zizmor, ("ci.yml", "  pull_request:\n", "  pull_request_target:\n"), "dangerous-triggers"),
        (zizmor, ("ci.yml", "debian:trixie", "debian"), "unpinned-images"),
    ],
)
def test_linters_find_a_mistake(tmp_path, linter, change, found):
    assert found in linter(tmp_path, changed(*change))


# Rules


def test_workflows_follow_the_rules():
    assert faults(texts()) == []


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (("ci.yml", " # v7.0.1", ""), "actions are pinned by commit and say their version"),
        (
            ("deploy.yml", "@1aa358be5cf73883762b302a3a03abd66e75b232", "@v3"),
            "actions are pinned by commit and say their version",
        ),
        (
            ("ci.yml", "  pull_request:\n", "  pull_request:\n  pull_request_target:\n"),
            "nobody from outside triggers them",
        ),
        (
            ("ci.yml", "\n          .ci/run", "\n          echo ${{ github.ref }}\n          .ci/run"),
            "no expression is written into a script",
        ),
        (("deploy.yml", "vars.AGENTS", "secrets.AGENTS"), "no secret is used"),
        (("deploy.yml", "permissions: {}", "permissions:\n  id-token: write"), "nothing is permitted to all jobs"),
        (("ci.yml", "contents: read", "contents: write"), "a job reads alone"),
        (
            ("ci.yml", "contents: read\n", "contents: read\n      id-token: write\n"),
            "who is given a role names an environment",
        ),
        (("deploy.yml", "    environment: production\n", ""), "who is given a role names an environment"),
        (("deploy.yml", "attestations: write", "packages: write"), "a job reads alone"),
        (("deploy.yml", "actions/attest-build-provenance@", "actions/attest@"), "what is uploaded is attested"),
        (
            ("deploy.yml", "            requirements.txt\n          if-no", "          if-no"),
            "what is uploaded is attested",
        ),
        (
            ("audit.yml", " --requirement packer/requirements.txt", ""),
            "what an operator or a developer installs is audited",
        ),
        (("audit.yml", '  schedule:\n    - cron: "17 4 * * 1"\n', ""), "the audit runs without a change"),
        (("ci.yml", "    timeout-minutes: 90\n", ""), "each job ends"),
        (("ci.yml", "  pull_request:\n", ""), "the tests run on a push and for a pull request"),
        (("ci.yml", '"tests/$WING"\n', '"tests/$WING" || true\n'), "the tests are those of .ci/run"),
        (("ci.yml", "wing: [integration, system]", "wing: [integration]"), "every wing of the tests is run"),
        (("ci.yml", "run: scripts/check", "run: scripts/check || true"), "every wing of the tests is run"),
        (("ci.yml", '"3.13", "3.14"', '"3.13"'), "every Python that is supported is tested"),
        (("ci.yml", "debian: [bookworm, trixie]", "debian: [trixie]"), "both commands run on each Debian"),
        (("ci.yml", "scripts/serve >", "true >"), "both commands run on each Debian"),
        (("ci.yml", "ann scripts/test", "ann scripts/test tests/unit"), "both commands run on each Debian"),
        (("ci.yml", "          scripts/lock\n", ""), "stale locks are found"),
        (("ci.yml", 'CI: "true"', 'CI: "yes"'), "what a test lacks is a failure"),
        (("ci.yml", "options: --privileged", "options: --cpus 2"), "the tests can boot machines"),
        (("ci.yml", "go-version: 1.26.8", "go-version: 1.24.4"), "Go is new enough"),
        (("ci.yml", "cache: false", "cache: true"), "nothing comes from a cache"),
        (("deploy.yml", "    environment: pypi\n", ""), "PyPI trusts the workflow in an environment"),
        (
            ("deploy.yml", " # v1.14.2", " # v1.14.2\n        with:\n          password: ${{ vars.PASSWORD }}"),
            "PyPI trusts the workflow in an environment",
        ),
        (("deploy.yml", " # v1.14.2", " # v1.14.0"), "the publisher reads the metadata of the wheel"),
        (("deploy.yml", "    needs: wheel\n", "    needs: tests\n"), "what is published is what was attested"),
        (
            ("deploy.yml", " && contains(vars.PUBLISH, 'pypi')", ""),
            "nothing is published unless the owner asks for it",
        ),
        (
            ("deploy.yml", "github.event_name == 'push' && contains(vars.PUBLISH, 'ghcr')", "always()"),
            "nothing is published unless the owner asks for it",
        ),
        (("deploy.yml", "push-to-registry: true", "push-to-registry: false"), "a job reads alone"),
        (("deploy.yml", "steps.push.outputs.digest", "github.sha"), "the image that is pushed is attested"),
        (("deploy.yml", "create-storage-record: false", "show-summary: true"), "the image that is pushed is attested"),
        (
            ("deploy.yml", " --provenance mode=max", ""),
            "the image has its provenance and runs on both architectures",
        ),
        (("ci.yml", "docker compose up --build --detach", "echo"), "the containers are tried with Docker itself"),
        (("deploy.yml", 'tags: ["v*"]', 'branches: ["main"]'), "a tag ships"),
        (
            ("deploy.yml", " && (github.event_name != 'schedule' || vars.REBAKE == 'true')", ""),
            "each week a release ships again, if somebody chose so",
        ),
        (("deploy.yml", "'0' || '1'", "'1' || '1'"), "each week a release ships again, if somebody chose so"),
        (("deploy.yml", "    needs: tests\n", ""), "it is shipped once the tests have passed"),
        (("deploy.yml", "!failure() && ", ""), "it is shipped once the tests have passed"),
        (("deploy.yml", "rollback, abort]", "rollback, abort, ship]"), "each command can be run by hand but ship"),
        (
            ("deploy.yml", "role-to-assume: ${{ vars.AWS_ROLE }}", "aws-access-key-id: ${{ vars.KEY }}"),
            "there are no lasting keys",
        ),
        (("deploy.yml", "vars.AWS_ROLE", "inputs.image"), "the role comes from the environment"),
        (("deploy.yml", "aws-region:", "region:"), "the region comes from the environment"),
        (
            ("deploy.yml", "role-duration-seconds: 10800", "role-duration-seconds: 3600"),
            "the role lasts as long as the job",
        ),
        (("deploy.yml", "          role-duration-seconds: 10800", ""), "the role lasts as long as the job"),
        (
            ("deploy.yml", "timeout-minutes: 175", "timeout-minutes: 60"),
            "a job has time for a rollout and its rollback",
        ),
        (("deploy.yml", "'rollout' }}", "github.ref }}"), "no two rollouts run at once"),
        (
            ("deploy.yml", "cancel-in-progress: false", "cancel-in-progress: true"),
            "a running rollout is never cancelled",
        ),
        (
            ("deploy.yml", "group: ${{ inputs.command == 'abort' && 'abort' || 'rollout' }}", "group: rollout"),
            "a rollout under way can be aborted",
        ),
        (("deploy.yml", "version: 1.15.0", "version: latest"), "Packer is the one that is rehearsed"),
    ],
)
def test_broken_rule_is_found(change, found):
    assert found in faults(changed(*change))


# Steps


def step(workflows, start):
    """Return the step of the deployment whose name starts so."""
    (found,) = (
        one for one in read(workflows["deploy.yml"])["jobs"]["deploy"]["steps"] if one.get("name", "").startswith(start)
    )
    return found


def called(folder, workflows, **given):
    """Run a step; return its calls of scripts/deploy, its words and its status, and leave the checkout as it was."""
    checkout, temporary = folder / "checkout", folder / "temporary"
    (checkout / "scripts").mkdir(parents=True)
    temporary.mkdir()
    double = checkout / "scripts" / "deploy"
    double.write_text('#!/bin/sh\nprintf "%s\\0" "$@" >"$RUNNER_TEMP/called"\necho \'{"status": 0}\'\nexit 4\n')
    double.chmod(0o755)
    run = step(workflows, "Run")
    env = {"PATH": os.environ["PATH"], "RUNNER_TEMP": str(temporary)} | dict.fromkeys(run["env"], "") | given
    result = subprocess.run(
        ["bash", "-e", "-c", run["run"]],
        cwd=checkout,
        env=env,
        capture_output=True,
        text=True,
        timeout=LONG,
        check=False,
    )
    assert sorted(checkout.rglob("*")) == [double.parent, double]
    record = temporary / "called"
    arguments = record.read_text().split("\0")[:-1] if record.exists() else []
    return [text.replace(str(temporary), "TEMP") for text in arguments], result.stderr, result.returncode


@pytest.mark.parametrize(
    ("given", "arguments"),
    [
        ({"COMMAND": "verify"}, "verify --json --stack chatd"),
        ({"COMMAND": "verify"} | GIVEN, "verify --json --stack lab --image ami-0123"),
        ({"COMMAND": "abort"} | GIVEN, "abort --json --stack lab"),
        (
            {"COMMAND": "rollback"} | GIVEN,
            f"rollback --json --stack lab --image ami-0123 --role-arn {ROLE}",
        ),
        (
            {"COMMAND": "ship", "AGENTS": "{}"},
            f"ship --json --stack chatd --arch arm64 -- {AGENTS}",
        ),
        (
            {"COMMAND": "ship", "AGENTS": "{}", "PARAMETERS": "A=1\r\n\nB=2\n"} | GIVEN | {"IMAGE": ""},
            f"ship --json --stack lab --role-arn {ROLE} --parameter A=1 --parameter B=2 --arch amd64 -- {AGENTS}",
        ),
        (
            {"COMMAND": "ship", "AGENTS": "{}", "REBAKE": "yes", "BAKE": "subnet_id=s\r\n\nsession_profile=b\n"},
            f"ship --json --stack chatd --rebake --arch arm64 -- {AGENTS} --var subnet_id=s --var session_profile=b",
        ),
    ],
)
def test_scripts_deploy_is_called(tmp_path, given, arguments):
    assert called(tmp_path, texts(), **given) == (arguments.split(), "", 4)
    assert json.loads((tmp_path / "temporary" / "done.json").read_text()) == {"status": 0}


def test_values_are_single_arguments(tmp_path):
    image = f"$(touch {tmp_path}/owned) `id` ; --yes *"
    arguments, _, _ = called(tmp_path, texts(), COMMAND="rollback", IMAGE=image, STACK="a b")
    assert arguments == ["rollback", "--json", "--stack", "a b", "--image", image]
    assert not (tmp_path / "owned").exists()


def test_agents_are_written_unchanged(tmp_path):
    agents = '{"arm64": [{"url": "https://example.com/a%20b.deb", "sha256": "\\n"}]}'
    called(tmp_path, texts(), COMMAND="ship", AGENTS=agents)
    assert (tmp_path / "temporary" / "agents.json").read_text() == agents


def test_ship_needs_agents(tmp_path):
    arguments, said, code = called(tmp_path, texts(), COMMAND="ship")
    assert arguments == []
    assert code != 0
    assert "AGENTS: set this variable of the environment" in said


def chosen(folder, workflows, commit, status=0):
    """Run the step that chooses a commit, in a repository with three; return what is checked out, and the status."""
    git = ["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@example.com"]
    succeed("git", "init", "--quiet", folder)
    (folder / "scripts").mkdir()
    (folder / "scripts" / "deploy").write_text(
        f'#!/bin/sh\necho "$@" >"$RUNNER_TEMP/called"\ncat "$RUNNER_TEMP/said"\nexit {status}\n'
    )
    (folder / "scripts" / "deploy").chmod(0o755)
    for tag in ("v1.9.0", "v1.10.0", "v2.0.0"):
        succeed(*git, "add", ".")
        succeed(*git, "commit", "--quiet", "--allow-empty", "--message", tag)
        succeed(*git, "tag", tag)
    temporary = folder / ".git" / "temporary"
    temporary.mkdir()
    sha = succeed(*git, "rev-parse", commit).strip() if commit.startswith("v") else commit
    (temporary / "said").write_text(json.dumps({"status": status} | ({} if status else {"commit": sha})))
    env = {"PATH": os.environ["PATH"], "RUNNER_TEMP": str(temporary), "STACK": "lab"}
    run = ["bash", "-e", "-c", step(workflows, "Choose")["run"]]
    result = subprocess.run(run, cwd=folder, env=env, capture_output=True, timeout=LONG, check=False)
    assert (temporary / "called").read_text() == "verify --json --stack lab\n"
    return succeed(*git, "log", "-1", "--format=%s").strip(), result.returncode


@pytest.mark.parametrize("tag", ["v1.9.0", "v2.0.0"])
def test_commit_in_service_is_chosen(tmp_path, tag):
    """A release that was rolled back, or whose tests failed, does not come back each week."""
    assert chosen(tmp_path, texts(), tag) == (tag, 0)


@pytest.mark.parametrize(("commit", "status"), [("", 0), ("0" * 40, 0), ("0" * 40 + "-dirty", 0), ("v1.9.0", 1)])
def test_without_a_commit_in_service_nothing_ships(tmp_path, commit, status):
    """An unhealthy stack, an image that does not tell its commit, and an unknown commit fail the run."""
    at, code = chosen(tmp_path, texts(), commit, status)
    assert (at, code != 0) == ("v2.0.0", True)


def test_ignored_commit_is_found(tmp_path):
    """The negative control: the newest release instead."""
    workflows = changed("deploy.yml", '--detach "${commit:?the image in service has no tag chatd:git-sha}"', "v2.0.0")
    with pytest.raises(AssertionError):
        assert chosen(tmp_path, workflows, "v1.9.0") == ("v1.9.0", 0)


@functools.cache
def options(*command):
    """Return the options that a program, or a command of it, lists in its help."""
    if not (ROOT / command[0]).exists():
        missing(f"there is no {command[0]}")
    help_text = succeed(sys.executable, *command, "--help", cwd=ROOT)
    return {*re.findall(r"^  (?:-h, )?(--[a-z-]+)", help_text, re.MULTILINE)}


def unknown(folder, workflows, command):
    """Return the options in the workflow that scripts/deploy, or scripts/bake, does not have."""
    given = GIVEN | {"COMMAND": command, "AGENTS": "{}", "PARAMETERS": "A=1", "REBAKE": "yes", "BAKE": "A=1"}
    arguments, _, _ = called(folder, workflows, **given)
    place = arguments.index("--") if "--" in arguments else len(arguments)
    ours, theirs = ({text for text in part if text[:2] == "--"} for part in (arguments[:place], arguments[place + 1 :]))
    return ours - options("scripts/deploy", command) | theirs - options("scripts/bake")


@pytest.mark.parametrize("command", COMMANDS)
def test_scripts_deploy_has_the_options(tmp_path, command):
    assert unknown(tmp_path, texts(), command) == set()


@pytest.mark.parametrize(
    ("command", "change", "found"),
    [
        ("abort", (' && [ "$COMMAND" != abort ]', ""), "--image"),
        ("verify", ("@(ship|rollback)", "@(ship|verify)"), "--role-arn"),
        ("ship", ("--parameter", "--param"), "--param"),
        ("ship", ("-- --agents", "-- --agent"), "--agent"),
        ("ship", ("--var ", "--variable "), "--variable"),
    ],
)
def test_unknown_option_is_found(tmp_path, command, change, found):
    assert unknown(tmp_path, changed("deploy.yml", *change), command) == {found}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('--image "$IMAGE"', "--image $IMAGE"),
        ("agents=$RUNNER_TEMP/agents.json", "agents=agents.json"),
        ("printf '%s' \"${AGENTS:?", 'echo -e "${AGENTS:?'),
        ('--parameter "$parameter"', '"$parameter"'),
        ("exec scripts/deploy", "scripts/deploy || true; : exec scripts/deploy"),
    ],
)
def test_changed_step_is_found(tmp_path, old, new):
    workflows = changed("deploy.yml", old, new)
    agents = '{"a": "\\n"}'
    given = {"COMMAND": "ship", "IMAGE": "a b", "AGENTS": agents, "PARAMETERS": "A=1"}
    good = called(tmp_path / "good", texts(), **given), (tmp_path / "good/temporary/agents.json").read_text()
    assert good[1] == agents
    with pytest.raises((AssertionError, FileNotFoundError)):
        assert (
            called(tmp_path / "bad", workflows, **given),
            (tmp_path / "bad/temporary/agents.json").read_text(),
        ) == good


@pytest.mark.parametrize(("done", "summary"), [('{"status":0}', '```json\n{\n    "status": 0\n}\n```\n'), ("", "")])
def test_summary_shows_the_result(tmp_path, done, summary):
    (tmp_path / "done.json").write_text(done)
    (tmp_path / "summary").touch()
    env = {"PATH": os.environ["PATH"], "RUNNER_TEMP": str(tmp_path), "GITHUB_STEP_SUMMARY": str(tmp_path / "summary")}
    say = step(texts(), "Summarize")
    subprocess.run(["bash", "-e", "-c", say["run"]], env=env, timeout=LONG, check=True)
    assert (tmp_path / "summary").read_text() == summary
    assert say["if"] == "always()"
