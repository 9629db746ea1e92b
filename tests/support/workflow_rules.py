"""Rules for the workflows of GitHub that no linter knows."""

import re

import yaml
from support.servers import ROOT

FOLDER = ROOT / ".github" / "workflows"
TOOLS = [*(ROOT / "packer" / "tools").glob("*/go.mod"), *(ROOT / "tests" / "tools").glob("*/go.mod")]
"""The modules that are built with Go."""
LOCKS = [*ROOT.glob("requirements*.txt"), ROOT / "packer" / "requirements.txt"]
PINNED = re.compile(r"[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+")
OURS = re.compile(r"\./\.github/workflows/\w+\.yml\b")
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]
DEBIANS = ["bookworm", "trixie"]
SIGNING = {"id-token", "attestations"}
"""The permissions with which a job gets an identity, and signs with it."""
OUTSIDERS = {"pull_request_target", "workflow_run", "issue_comment", "issues"}
"""Triggers by which somebody from outside runs something with the repository's rights."""


PUBLISHER = 1, 14, 2
"""The first version of pypa/gh-action-pypi-publish that reads METADATA: earlier ones have Twine 6, which refuses it."""
METADATA = "2.5"
"""The version of the metadata in the wheel, which the build backend chooses."""


def texts():
    """Return the workflows, by the names of their files."""
    return {path.name: path.read_text() for path in sorted(FOLDER.iterdir())}


class Loader(yaml.SafeLoader):
    """YAML as GitHub reads it, in which `on` is a word."""


Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool" or letter in "tTfF"]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read(text):
    return yaml.load(text, Loader)


def uses(job, action):
    """Return the inputs of the step of a job that uses an action; empty without such a step."""
    steps = [step for step in job.get("steps", []) if step.get("uses", "").startswith(f"{action}@")]
    return steps[0].get("with", {}) if steps else {}


def attests(job):
    """Return whether the identity of a job signs what it built, and does nothing else but push it."""
    signs = bool(uses(job, "actions/attest-build-provenance"))
    return {*job["permissions"]} - {"packages"} == {"contents", *SIGNING} and signs


def writes(job):
    """Return what a job may write, apart from its signatures, and from the image that it pushes and signs."""
    pushes = attests(job) and uses(job, "actions/attest-build-provenance").get("push-to-registry") is True
    own = SIGNING | ({"packages"} if pushes else set())
    return {name for name, value in job["permissions"].items() if value != "read" and name not in own}


def version(text):
    return tuple(int(part) for part in str(text).split("."))


def faults(workflows):
    """Return the rules that workflows break."""
    found = {name: read(text) for name, text in workflows.items()}
    jobs = {f"{name}: {job}": one for name, whole in found.items() for job, one in whole["jobs"].items()}
    used = [line for text in workflows.values() for line in re.findall(r"^[\s-]*uses: (.*)$", text, re.MULTILINE)]
    runs = [step["run"] for job in jobs.values() for step in job.get("steps", []) if "run" in step]
    wanted = {
        "actions are pinned by commit and say their version": all(
            PINNED.fullmatch(line) or OURS.match(line) for line in used
        ),
        "nobody from outside triggers them": not any(OUTSIDERS & set(whole["on"]) for whole in found.values()),
        "no expression is written into a script": not any("${{" in run for run in runs),
        "no secret is used": not any("secrets." in text for text in workflows.values()),
        "nothing is permitted to all jobs": all(whole["permissions"] == {} for whole in found.values()),
        "a job reads alone": not any(writes(job) for job in jobs.values()),
        "who is given a role names an environment": all(
            "environment" in job or attests(job) for job in jobs.values() if SIGNING & {*job["permissions"]}
        ),
        "each job ends": all("timeout-minutes" in job or "uses" in job for job in jobs.values()),
        **audit_rules(found["audit.yml"]),
        **ci_rules(found["ci.yml"]),
        **deploy_rules(found["deploy.yml"], workflows["deploy.yml"]),
    }
    return [text for text, holds in wanted.items() if not holds]


def audit_rules(whole):
    script = whole["jobs"]["audit"]["steps"][-1]["run"]
    return {
        "what an operator or a developer installs is audited": all(
            f"--requirement {path.relative_to(ROOT)}" in script for path in LOCKS
        )
        and "|| true" not in script,
        "the audit runs without a change": "schedule" in whole["on"],
    }


def ci_rules(whole):
    job = whole["jobs"]["tests"]
    go = uses(job, "actions/setup-go")
    return {
        "the tests run on a push and for a pull request": {"push", "pull_request"} <= set(whole["on"]),
        "the tests are those of .ci/run": job["steps"][-1]["run"].split("\n")[-2]
        == '.ci/run --numprocesses=auto --dist=loadfile "tests/$WING"',
        "every wing of the tests is run": sorted(job["strategy"]["matrix"]["wing"]) == ["integration", "system"]
        and whole["jobs"]["check"]["steps"][-1]["run"] == "scripts/check",
        "every Python that is supported is tested": whole["jobs"]["check"]["strategy"]["matrix"]["python"] == PYTHONS,
        "both commands run on each Debian": whole["jobs"]["fresh"]["strategy"]["matrix"]["debian"] == DEBIANS
        and "scripts/serve >" in whole["jobs"]["fresh"]["steps"][-2]["run"]
        and whole["jobs"]["fresh"]["steps"][-1]["run"].endswith(" scripts/test"),
        "stale locks are found": whole["jobs"]["locks"]["steps"][-1]["run"].split("\n")[-3:-1]
        == ["scripts/lock", "git diff --exit-code"],
        "what a test lacks is a failure": job["env"].get("CI") == "true",
        "the tests can boot machines": "--privileged" in job["container"].get("options", ""),
        "the containers are tried with Docker itself": [
            "docker compose up --build" in step.get("run", "") or "--force-recreate" in step.get("run", "")
            for step in whole["jobs"]["compose"]["steps"]
        ][1:3]
        == [True, True],
        "Go is new enough": version(go["go-version"])
        >= max(version(re.search(r"^go (\S+)", path.read_text(), re.MULTILINE)[1]) for path in TOOLS),
        "nothing comes from a cache": go.get("cache") is False and "actions/cache" not in str(job),
    }


def deploy_rules(whole, text):
    (publisher,) = re.findall(r"gh-action-pypi-publish@\w+ # v(\S+)", text)
    job, wheel, pypi, container = (whole["jobs"][name] for name in ("deploy", "wheel", "pypi", "container"))
    image = uses(container, "actions/attest-build-provenance")
    push = next(step for step in container["steps"] if step.get("id") == "push")
    signed = uses(wheel, "actions/attest-build-provenance").get("subject-path")
    role = uses(job, "aws-actions/configure-aws-credentials")
    concurrency = job.get("concurrency", {})
    (packer,) = re.findall(r"hashicorp/packer v(\S+)", (ROOT / "packer/tools/packer/go.mod").read_text())
    commands = whole["on"]["workflow_dispatch"]["inputs"]["command"]["options"]
    return {
        "what is uploaded is attested": signed is not None
        and signed == uses(wheel, "actions/upload-artifact").get("path")
        and wheel.get("needs") == "tests",
        "PyPI trusts the workflow in an environment": pypi.get("environment") == "pypi"
        and pypi["permissions"] == {"contents": "read", "id-token": "write"}
        and pypi["steps"][-1]["uses"].startswith("pypa/gh-action-pypi-publish@")
        and "with" not in pypi["steps"][-1],
        "the publisher reads the metadata of the wheel": version(publisher) >= PUBLISHER,
        "what is published is what was attested": pypi.get("needs") == "wheel"
        and uses(pypi, "actions/download-artifact") == {"name": uses(wheel, "actions/upload-artifact").get("name")},
        "nothing is published unless the owner asks for it": [
            re.findall(r"contains\(vars\.PUBLISH, '(\w+)'\)", one["if"]) for one in (pypi, container)
        ]
        == [["pypi"], ["ghcr"]]
        and all(one["if"].startswith("github.event_name == 'push' && ") for one in (pypi, container)),
        "the image that is pushed is attested": container.get("needs") == "tests"
        and image.get("subject-digest") == "${{ steps.push.outputs.digest }}"
        and image.get("subject-name") == "${{ steps.push.outputs.image }}"
        and image.get("create-storage-record") == ("artifact-metadata" in container["permissions"])
        and "containerimage.digest" in push["run"],
        "the image has its provenance and runs on both architectures": "--provenance mode=max --sbom true"
        in push["run"]
        and "--platform linux/amd64,linux/arm64" in push["run"],
        "each week a release ships again, if somebody chose so": len(whole["on"]["schedule"]) == 1
        and "github.event_name != 'schedule' || vars.REBAKE == 'true'" in job["if"]
        and uses(job, "actions/checkout").get("fetch-depth") == "${{ github.event_name == 'schedule' && '0' || '1' }}",
        "a tag ships": whole["on"]["push"] == {"tags": ["v*"]},
        "it is shipped once the tests have passed": job.get("needs") == "tests"
        and "!failure()" in job["if"]
        and whole["jobs"]["tests"]["uses"] == "./.github/workflows/ci.yml",
        "each command can be run by hand but ship": sorted(commands) == ["abort", "rollback", "verify"],
        "the role comes from the environment": role.get("role-to-assume") == "${{ vars.AWS_ROLE }}",
        "the region comes from the environment": role.get("aws-region") == "${{ vars.AWS_REGION }}",
        "there are no lasting keys": not any("key" in name for name in role),
        "the role lasts as long as the job": role.get("role-duration-seconds", 3600) >= job["timeout-minutes"] * 60,
        "a job has time for a rollout and its rollback": job["timeout-minutes"] >= 2 * (60 + 10),
        "no two rollouts run at once": "github." not in concurrency.get("group", "github."),
        "a running rollout is never cancelled": concurrency.get("cancel-in-progress") is False,
        "a rollout under way can be aborted": "inputs.command == 'abort' && 'abort'" in concurrency.get("group", ""),
        "Packer is the one that is rehearsed": uses(job, "hashicorp/setup-packer").get("version") == packer,
    }
