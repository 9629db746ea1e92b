"""scripts/deploying/stack.yaml as data, its linters, and a double of AWS that creates it.

cfn-lint and checkov read it, and ministack creates it.  Each runs in an environment of its own, made once and kept in
`build/`, because their requirements conflict with ours and with each other's.

ministack does not know all that the stack consists of.  `rehearsed` leaves out and rewrites what it lacks, and a test
holds that list to what ministack says.
"""

import contextlib
import copy
import functools
import itertools
import json
import pathlib
import re
import signal
import socket
import subprocess
import sys

from support.booted import kept, succeed
from support.servers import LONG, ROOT, Lines, environment, missing

TEMPLATE = ROOT / "scripts" / "deploying" / "stack.yaml"
REGION = "eu-west-1"
ACCOUNT = "000000000000"
CHECKERS, DOUBLE = (ROOT / "tests" / f"{name}.txt" for name in ("checkers", "ministack"))

UNKNOWN = {"AWS::CloudWatch::CompositeAlarm", "AWS::EC2::SecurityGroupEgress", "AWS::EC2::SecurityGroupIngress"}
"""The types of resources that ministack refuses.  It refuses MemoryDB too, which is not made where a store is named."""
OFTEN = {"Delay": 0.1, "MaxAttempts": 10 * LONG}
HOOKS = "LifecycleHookSpecificationList"
"""The property of a group that ministack ignores; it supports hooks that are separate resources."""

SCAN = "import sys; from checkov.main import Checkov; sys.exit(Checkov().run())"
LINT = "from cfnlint.runner import main; main()"
AS_JSON = "import json, sys; from cfnlint.decode import cfn_yaml; print(json.dumps(cfn_yaml.load(sys.argv[1])))"


def tools(lock):
    """Return the folder of the programs that a lock file pins."""
    version = "{}.{}".format(*sys.version_info)

    def make(folder):
        succeed(sys.executable, "-m", "venv", folder)
        pip = [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        try:
            succeed(*pip, "--require-hashes", f"--requirement={lock}")
        except AssertionError as error:
            missing(f"{lock.name} cannot be installed: {str(error)[-500:]}")

    return kept(lock.stem, make, version, lock.read_text()) / "bin"


def run(lock, *arguments, cwd=None):
    """Run a Python module or text of an environment, whatever its exit status, and return its output."""
    env = environment(AWS_EC2_METADATA_DISABLED="true", LOG_LEVEL="ERROR")
    said = succeed(tools(lock) / "python", *arguments, statuses=range(256), env=env, cwd=cwd)
    assert said.strip()
    return said


@functools.cache
def template():
    """Return the template as JSON has it: `!Ref X` is {"Ref": "X"}.  Change no other than a copy."""
    return json.loads(run(CHECKERS, "-c", AS_JSON, TEMPLATE))


def of_type(template, kind):
    """Return the resources of a type, by name."""
    return {name: one["Properties"] for name, one in template["Resources"].items() if one["Type"] == kind}


def properties(template, name):
    return template["Resources"][name]["Properties"]


def attributes(template, name, kind):
    """Return the attributes of a load balancer or a target group, those of a condition with their default."""
    found = {}
    for one in properties(template, name)[f"{kind}Attributes"]:
        entry = one["Fn::If"][1] if "Fn::If" in one else one
        value = entry["Value"]
        found[entry["Key"]] = value["Fn::If"][2] if isinstance(value, dict) and "Fn::If" in value else value
    return found


def plain(value):
    """Return a value without CloudFormation's functions."""
    if isinstance(value, dict) and len(value) == 1:
        ((key, inner),) = value.items()
        if key in ("Ref", "Fn::Sub"):
            return plain(inner[0] if isinstance(inner, list) else inner)
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return value


def group(template):
    return properties(template, "Group")


def launch(template):
    return properties(template, "LaunchTemplate")["LaunchTemplateData"]


def refresh(template):
    """Return how an update replaces the instances."""
    return template["Resources"]["Group"]["UpdatePolicy"]["AutoScalingInstanceRefresh"]["Preferences"]


def attribute(template, name, key, **changes):
    """Change an attribute of the load balancer or the target group."""
    kind = "LoadBalancer" if name == "Balancer" else name
    (one,) = [one for one in properties(template, name)[f"{kind}Attributes"] if one.get("Key") == key]
    one.update(changes)


def mutant(template, mutate):
    """Return a copy of a template that is changed."""
    changed = copy.deepcopy(template)
    mutate(changed)
    return changed


def written(folder, templates):
    """Write templates by name into a folder."""
    for name, body in templates.items():
        (folder / f"{name}.json").write_text(body if isinstance(body, str) else json.dumps(body, indent=1))


def cfn_lint(folder):
    """Return the ids of the rules that cfn-lint reports for each template of a folder, by name."""
    paths = sorted(folder.iterdir())
    said = run(CHECKERS, "-c", LINT, "--format", "json", "--include-checks", "I", "--regions", REGION, "--", *paths)
    found = {path.stem: set() for path in paths}
    for match in json.loads(said):
        found[pathlib.Path(match["Filename"]).stem].add(match["Rule"]["Id"])
    return found


def checkov(folder):
    """Return the checks, with their resources, that checkov reports for each template of a folder, by name."""
    said = run(
        CHECKERS,
        *("-c", SCAN, "--directory", ".", "--framework", "cloudformation", "--output", "json"),
        *("--compact", "--quiet", "--skip-download", "--soft-fail"),
        cwd=folder,
    )
    report = json.loads(said)
    assert report["summary"]["parsing_errors"] == 0
    assert report["summary"]["passed"] > 0
    found = {path.stem: set() for path in folder.glob("*.json")}
    for one in report["results"]["failed_checks"]:
        found[pathlib.Path(one["file_path"]).stem].add((one["check_id"], one["resource"].rpartition(".")[2]))
    return found


def rehearsed(body):
    """Return a template as ministack can make it."""
    body = copy.deepcopy(body)
    resources = body["Resources"]
    gone = {name for name, one in resources.items() if one["Type"] in UNKNOWN}
    for name in gone:
        del resources[name]
    outputs = body["Outputs"]
    body["Outputs"] = {
        name: one
        for name, one in outputs.items()
        if one["Value"] not in [{"Fn::GetAtt": [lost, "Arn"]} for lost in gone]
    }
    for one in resources.values():
        if isinstance(one.get("DependsOn"), list):
            one["DependsOn"] = [name for name in one["DependsOn"] if name not in gone]
    for hook in resources["Group"]["Properties"].pop(HOOKS, []):
        name = re.sub(r"\W", "", hook["LifecycleHookName"].title())
        own = {"AutoScalingGroupName": {"Ref": "AWS::StackName"}, **hook}
        resources[name] = {"Type": "AWS::AutoScaling::LifecycleHook", "DependsOn": "Group", "Properties": own}
    return body


class MinistackAccount:
    """An account at ministack; a context manager.  It is on the loopback, at a port that was free."""

    def __enter__(self):
        for _ in range(5):  # another program may take the port meanwhile
            self._start()
            with contextlib.suppress(AssertionError):
                self.log.wait(r"Running on http://127\.0\.0\.1:")
                return self
            self._process.wait(LONG)
            self.log.close()
        raise AssertionError(f"ministack does not start:\n{self.log.text}")

    def __exit__(self, *_):
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(LONG)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(LONG)
        self.log.close()

    def _start(self):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        kept_ = {name: value for name, value in environment().items() if not name.startswith(("AWS_", "MINISTACK_"))}
        self._process = subprocess.Popen(
            [tools(DOUBLE) / "python", "-m", "ministack"],
            env=kept_ | {"BIND_HOST": "127.0.0.1", "GATEWAY_PORT": str(port), "DOCKER_HOST": "unix:///nowhere"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.log = Lines(self._process.stdout)
        self.url = f"http://127.0.0.1:{port}"

    def client(self, service):
        """Return a client of one of its services."""
        return client(service, self.url)


@functools.cache
def session():
    """Return a session of botocore, which caches the models."""
    try:
        import botocore.session
    except ImportError:
        missing("botocore is not installed: pip install --require-hashes --requirement packer/requirements.txt")
    return botocore.session.Session()


@functools.cache
def client(service, url="http://127.0.0.1:9"):
    """Return a client of a service of AWS that talks to a double."""
    return session().create_client(
        service, region_name=REGION, endpoint_url=url, aws_access_key_id="testing", aws_secret_access_key="testing"
    )


class Stack:
    """A stack in an account, by its name; it does not have to exist."""

    def __init__(self, account, name):
        self.name = name
        self.client = account.client
        self._changes = itertools.count(1)
        self._formation = account.client("cloudformation")

    def change(self, body, kind="UPDATE", **parameters):
        """Make a change set and carry it out; answers which resources it names, and what was done to each."""
        name = f"change-{next(self._changes)}"
        given = [{"ParameterKey": key, "ParameterValue": value} for key, value in parameters.items()]
        made = self._formation.create_change_set(
            StackName=self.name,
            ChangeSetName=name,
            ChangeSetType=kind,
            TemplateBody=json.dumps(body),
            Parameters=given,
            Capabilities=["CAPABILITY_IAM"],
        )
        self._formation.get_waiter("change_set_create_complete").wait(
            ChangeSetName=made["Id"], StackName=self.name, WaiterConfig=OFTEN
        )
        told = self._formation.describe_change_set(ChangeSetName=made["Id"], StackName=self.name)
        self._formation.execute_change_set(ChangeSetName=made["Id"], StackName=self.name)
        self._formation.get_waiter(f"stack_{kind.lower()}_complete").wait(StackName=self.name, WaiterConfig=OFTEN)
        changes = [change["ResourceChange"] for change in told["Changes"]]
        return {change["LogicalResourceId"]: change["Action"] for change in changes}

    def resources(self):
        """Return the type and the id of each resource, by name."""
        found = self._formation.describe_stack_resources(StackName=self.name)["StackResources"]
        return {one["LogicalResourceId"]: (one["ResourceType"], one["PhysicalResourceId"]) for one in found}

    def outputs(self):
        """Return the outputs of the stack."""
        (stack,) = self._formation.describe_stacks(StackName=self.name)["Stacks"]
        return {one["OutputKey"]: one["OutputValue"] for one in stack["Outputs"]}
