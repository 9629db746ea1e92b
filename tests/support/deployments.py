"""A double of an AWS account to deploy to: moto with additions, at a local port, and faults on demand.

moto simulates EC2, the targets of the load balancer, the group, the alarms and the parameters.  Its CloudFormation is
too lenient, so tests/support/formation.py replaces it.
"""

import contextlib
import datetime as dt
import functools
import io
import itertools
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import threading
import urllib.parse

from support.change_sets import deployed, parsed
from support.fleet import Fleet
from support.formation import TEMPLATE, Formation
from support.servers import LONG, ROOT, environment, missing
from support.threads import serving, wsgi
from support.wire import Fault, WireFormat

import chatd

REGION = "us-east-1"
STACK = "chatd"
DEPLOY = ROOT / "scripts" / "deploy"
OWN = "testing"
"""The access key of the test itself, whose calls are not on record."""
SCOPES = {"servicequotas": "service-quotas", "monitoring": "cloudwatch", "elasticloadbalancing": "elbv2"}
"""Names of services in signatures that differ from those in botocore."""
PREFIXES = {"elbv2": "elasticloadbalancing", "service-quotas": "servicequotas"}
"""Names of services in IAM that differ from those in botocore."""
DONE, FAILED, WRONG, REFUSED, BACK, STUCK, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130
"""The exit statuses of scripts/deploy."""
VERSION = chatd.__version__
GIVEN = {
    "CertificateArn": "arn:aws:acm:us-east-1:123456789012:certificate/01234567-89ab-cdef-0123-456789abcdef",
    "DomainName": "chat.example.com",
}
"""The parameters of the stack, besides the image, that are not the default ones."""
ALLOWED = {
    "autoscaling:DescribeAutoScalingGroups",
    "autoscaling:DescribeInstanceRefreshes",
    "autoscaling:UpdateAutoScalingGroup",
    "cloudformation:CancelUpdateStack",
    "cloudformation:CreateChangeSet",
    "cloudformation:DeleteChangeSet",
    "cloudformation:DeleteStack",
    "cloudformation:DescribeChangeSet",
    "cloudformation:DescribeStackEvents",
    "cloudformation:DescribeStackResources",
    "cloudformation:DescribeStacks",
    "cloudformation:ExecuteChangeSet",
    "cloudformation:GetTemplate",
    "cloudformation:GetTemplateSummary",
    "cloudwatch:DescribeAlarms",
    "ec2:DeregisterImage",
    "acm:DescribeCertificate",
    "ec2:DescribeAvailabilityZones",
    "ec2:DescribeImages",
    "ec2:DescribeInstanceTypeOfferings",
    "ec2:DescribeInstanceTypes",
    "ec2:DescribeSnapshots",
    "ec2:DescribeSubnets",
    "ec2:DescribeVpcs",
    "iam:GetRole",
    "iam:SimulatePrincipalPolicy",
    "kms:DescribeKey",
    "kms:GetKeyPolicy",
    "kms:ListGrants",
    "logs:DescribeLogGroups",
    "memorydb:DescribeSubnetGroups",
    "route53:GetHostedZone",
    "servicequotas:GetServiceQuota",
    "sts:GetCallerIdentity",
    "ec2:DescribeInstances",
    "ec2:DescribeLaunchTemplateVersions",
    "elasticloadbalancing:DescribeTargetHealth",
    "memorydb:DeleteCluster",
    "memorydb:DeleteSubnetGroup",
    "memorydb:DescribeClusters",
    "memorydb:DescribeSnapshots",
    "ssm:DeleteParameter",
    "ssm:DescribeParameters",
    "ssm:GetParameter",
    "ssm:LabelParameterVersion",
    "ssm:PutParameter",
}
"""The calls of scripts/deploy.  `DeregisterImage` also needs ec2:DeleteSnapshot, and a service role iam:PassRole."""
SHARING = {
    "ec2:CopyImage",
    "ec2:DescribeImageAttribute",
    "ec2:DescribeSnapshots",
    "ec2:EnableImageDeprecation",
    "ec2:ModifyImageAttribute",
    "kms:DescribeKey",
}
"""The calls of scripts/deploy for shared images.  `CopyImage` also needs ec2:CreateTags."""
ALLOWED |= SHARING
PROVING = {"cloudwatch:SetAlarmState"}
"""The calls of `prove` that no other command makes."""
XML = [("Content-Type", "text/xml")]
CREATING = threading.Lock()
"""A lock: only one thread may use a session of botocore."""
OWNERS = itertools.count(100000000001)


@functools.cache
def moto():
    """moto, as a WSGI application, and botocore's session for the tests' own calls."""
    command = [ROOT / "scripts" / "venv", "requirements.txt", "packer/requirements.txt"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        missing(f"what scripts/deploy needs is not installed: {result.stderr[-500:]}")
    try:
        import botocore.session
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    except ImportError as error:
        missing(f"moto is not installed: {error}")
    os.environ["MOTO_EC2_LOAD_DEFAULT_AMIS"] = "false"  # hundreds of them, for each account
    session = botocore.session.Session()
    session.set_credentials(OWN, OWN)
    return DomainDispatcherApplication(create_backend_app), session


@functools.cache
def wire(service):
    return WireFormat(service)


def named(service, operation):
    """Return the name of an operation in IAM."""
    return f"{PREFIXES.get(service, service)}:{operation}"


class DeploymentAccount:
    """A new account; a context manager.  `asked` has what it was asked for, as IAM names it."""

    def __init__(self, url_of_chat, script=DEPLOY, name=STACK):
        with CREATING:
            self._moto, self._session = moto()
        from moto.cloudwatch.models import cloudwatch_backends
        from moto.ec2 import ec2_backends
        from moto.memorydb.models import memorydb_backends

        self.owner = str(next(OWNERS))
        self.name = name
        self.ec2 = ec2_backends[self.owner][REGION]
        self.cloudwatch = cloudwatch_backends[self.owner][REGION]
        self.script = script
        self.url_of_chat = url_of_chat
        """The URL in the outputs of the stack."""
        self.asked = []
        self.leaving = []
        """Targets that are draining."""
        self.snapshots = "success"
        """The result of deleting the snapshots of an image."""
        self.keys = {}
        """The KMS keys of snapshots."""
        self.deprecated = {}
        """The dates at which images become deprecated."""
        self.looks = 1
        """How often a copy is pending when it is looked at."""
        self._pending = {}
        self._here = REGION
        self.process = None
        """The scripts/deploy that runs."""
        self.fleet = Fleet(self, name, REGION)
        self.stack = Formation(name, self.fleet, REGION, self.owner)
        self.memorydb = memorydb_backends[self.owner][REGION]
        self.stack.held = self._held
        self._fading = 0
        self.snapshot_key = None
        """The key of KMS that encrypts the snapshots without one of their own."""
        self.vcpu = 64.0
        """The quota of vCPU."""
        self.denied = set()
        """What a simulation of the caller's policy denies."""
        self.caller = "user/ops"
        """The name of the caller in its ARN."""
        self._rules = []
        self._broken = []
        self._clients = {}
        self._lock = threading.RLock()
        self._server = wsgi(self._serve)
        self._stack = contextlib.ExitStack()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        self._stack.enter_context(serving(self._server))
        return self

    def __exit__(self, *_):
        for client in self._clients.values():
            client.close()
        self._stack.close()
        if self._broken:  # a double failed
            raise self._broken[0]

    def call(self, service, operation, **arguments):
        """Call moto, off the record."""
        if service not in self._clients:
            with CREATING:
                self._clients[service] = self._session.create_client(service, region_name=REGION, endpoint_url=self.url)
        return getattr(self._clients[service], operation)(**arguments)

    # Images and parameters

    def image(self, version, architecture="arm64", days=0, **tags):
        """Have an image of a version of chatd, made so many days ago; without one it has no such tag."""
        volume = self.call("ec2", "create_volume", AvailabilityZone=f"{REGION}a", Size=8)["VolumeId"]
        snapshot = self.call("ec2", "create_snapshot", VolumeId=volume)["SnapshotId"]
        image = self.call(
            "ec2",
            "register_image",
            Name=f"chatd-{version}-{architecture}-{len(self.ec2.amis)}",
            RootDeviceName="/dev/xvda",
            BlockDeviceMappings=[{"DeviceName": "/dev/xvda", "Ebs": {"SnapshotId": snapshot}}],
        )["ImageId"]
        given = {"chatd:version": version, **{f"chatd:{name}": text for name, text in tags.items()}}
        listed = [{"Key": name, "Value": text} for name, text in given.items() if text is not None]
        if listed:
            self.call("ec2", "create_tags", Resources=[image], Tags=listed)
        made = dt.datetime(2026, 1, 31, tzinfo=dt.UTC) - dt.timedelta(days=days)
        self.ec2.amis[image].creation_date = made
        self.ec2.amis[image].architecture = {"amd64": "x86_64"}.get(architecture, architecture)
        return image

    def label(self, image, stack=STACK):
        """Have an image be last-good."""
        name = f"/chatd/{stack}/image"
        version = self.call("ssm", "put_parameter", Name=name, Value=image, Type="String", Overwrite=True)["Version"]
        self.call("ssm", "label_parameter_version", Name=name, ParameterVersion=version, Labels=["last-good"])

    def recorded(self, stack=STACK):
        """Return all images on record, the oldest first, and the one that is last-good."""
        try:
            history = self.call("ssm", "get_parameter_history", Name=f"/chatd/{stack}/image")["Parameters"]
        except self._clients["ssm"].exceptions.ParameterNotFound:
            return [], None
        good = [one["Value"] for one in history if "last-good" in one.get("Labels", [])]
        return [one["Value"] for one in history], good[0] if good else None

    # Faults

    def fault(self, operation, effect, *, times=1, after=0, done=False):
        """Have an operation fail so many times, after some calls went well; with `done` it has its effect first.

        The effect is a Fault, `cut` for a connection that ends without an answer, `kill` for the end of scripts/deploy,
        or something to call.
        """
        self._rules.append({"operation": operation, "effect": effect, "times": times, "after": after, "done": done})

    def _rule(self, operation):
        for rule in self._rules:
            if rule["operation"] in (operation, "*") and rule["times"]:
                if rule["after"]:
                    rule["after"] -= 1
                else:
                    rule["times"] -= 1
                    return rule
        return None

    def _serve(self, environ, start_response):
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ |= {"wsgi.input": io.BytesIO(body), "HTTP_X_MOTO_ACCOUNT_ID": self.owner}
        key, _, region, scope, _ = re.search(r"Credential=([^,]*)", environ["HTTP_AUTHORIZATION"])[1].split("/")
        if key == OWN:
            return self._moto(environ, start_response)
        with self._lock:
            self._here = region
            try:
                status, headers, body = self._answer(environ, SCOPES.get(scope, scope), body)
            except Exception as error:
                self._broken.append(error)
                raise
        start_response(status, headers)
        return [body]

    def _answer(self, environ, service, body):
        json_target = environ.get("HTTP_X_AMZ_TARGET")
        form = [] if json_target else urllib.parse.parse_qsl(body.decode(), keep_blank_values=True)
        if service == "route53":  # its operations are methods and paths
            assert environ["REQUEST_METHOD"] == "GET"
            assert environ["PATH_INFO"].startswith("/2013-04-01/hostedzone/")
            operation = "GetHostedZone"
        else:
            operation = json_target.rpartition(".")[2] if json_target else dict(form)["Action"]
        self.asked.append(named(service, operation))
        format_ = wire(service)

        def answered():
            own = self._own(service, operation)
            if own is None:
                return self._by_moto(environ, operation)
            try:
                return (
                    "200 OK",
                    XML,
                    format_.write(operation, own(json.loads(body) if json_target else format_.read(operation, form))),
                )
            except Fault as fault:
                return f"{fault.status} No", XML, format_.fault(fault)

        rule = self._rule(operation)
        if rule is None:
            return self._memorydb(operation, answered) if service == "memorydb" else answered()
        if callable(rule["effect"]):
            rule["effect"]()
            return answered()
        if rule["done"]:
            answered()
        if isinstance(rule["effect"], Fault):
            return f"{rule['effect'].status} No", XML, format_.fault(rule["effect"])
        if rule["effect"] == "kill":
            self.process.kill()
            self.process.wait(LONG)
        with contextlib.suppress(OSError):
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        return "500 No", [], b""

    def _by_moto(self, environ, operation):
        """Return the answer of moto, with what it does not know."""
        head = []
        parts = self._moto(environ, lambda status, headers, *_: head.append((status, headers)))
        whole = b"".join(parts)
        if operation == "SetAlarmState":
            self.fleet.combine()
        if operation == "DescribeImages":
            return head[0][0], XML, self._aged(whole)
        return *head[0], whole

    def _identity(self, params):
        service = "iam" if self.caller.startswith("user/") else "sts"
        return {"Arn": f"arn:aws:{service}::{self.owner}:{self.caller}", "Account": self.owner}

    def _simulate(self, params):
        """Policies may depend on keys of a request, which only the caller of the simulation knows."""
        context = {one["ContextKeyName"]: one["ContextKeyValues"] for one in params["ContextEntries"]}
        assert context == {
            "aws:RequestedRegion": [REGION],
            "iam:PassedToService": ["cloudformation.amazonaws.com"],
        }
        results = [
            {"EvalActionName": one, "EvalDecision": "implicitDeny" if one in self.denied else "allowed"}
            for one in params["ActionNames"]
        ]
        return {"EvaluationResults": results, "IsTruncated": False}

    def _held(self):
        """Return what cannot be deleted with the stack, as at AWS: what its cluster or its subnet group uses."""
        if self.name in self.memorydb.clusters:
            return "[StoreSecurityGroup, SubnetA]. resource sg-1 has a dependent object"
        return "[SubnetA]. The subnet is in use by a subnet group" if self.name in self.memorydb.subnet_groups else None

    def _memorydb(self, operation, answered):
        """Delete a cluster as AWS does: it has the status `deleting` until the snapshot is made."""
        if operation == "DescribeClusters" and self._fading:
            self._fading -= 1
            if not self._fading:
                self.memorydb.clusters.pop(self.name, None)
        cluster = self.memorydb.clusters.get(self.name)
        if operation == "DeleteCluster" and cluster and self._fading:
            return "400 No", [], json.dumps({"__type": "InvalidClusterStateFault", "message": "not available"}).encode()
        answer = answered()
        if operation == "DeleteCluster" and cluster:
            self.memorydb.clusters[self.name], self._fading = cluster, 3
        return answer

    def _own(self, service, operation):
        """Return the function that answers an operation instead of moto, or None."""
        if service == "cloudformation" or operation == "DescribeInstanceRefreshes":
            return getattr(self.stack, operation)
        if (service, operation) == ("ec2", "DescribeSnapshots"):
            return self._snapshots
        return {
            "DescribeTargetHealth": lambda params: self.fleet.health(self.stack.unhealthy, self.leaving),
            "CopyImage": self._copy,
            "DeregisterImage": self._deregister,
            "EnableImageDeprecation": self._deprecate,
            "GetCallerIdentity": self._identity,
            "GetServiceQuota": lambda params: {"Quota": {"QuotaCode": params["QuotaCode"], "Value": self.vcpu}},
            "SimulatePrincipalPolicy": self._simulate,
        }.get(operation)

    def key(self, name):
        """Return a KMS key."""
        from moto.kms import kms_backends

        return kms_backends[self.owner][REGION].keys[name.rpartition("/")[2]]

    def region(self, name):
        """Return the EC2 of a region."""
        from moto.ec2 import ec2_backends

        return ec2_backends[self.owner][name]

    def _copy(self, params):
        """moto gives a copy no tags, and has it at once."""
        assert params["Encrypted"] is True, "a copy of an encrypted image is encrypted"
        assert {one["ResourceType"] for one in params["TagSpecifications"]} == {"image", "snapshot"}
        given = {
            one["ResourceType"]: {tag["Key"]: tag["Value"] for tag in one["Tags"]}
            for one in params["TagSpecifications"]
        }
        copy = self.region(self._here).copy_image(params["SourceImageId"], params["SourceRegion"], params["Name"], "")
        copy.add_tags(given["image"])
        copy.ebs_snapshot.add_tags(given["snapshot"])
        copy.architecture = self.region(params["SourceRegion"]).amis[params["SourceImageId"]].architecture
        copy.state = "pending"
        self._pending[copy.id] = self.looks
        self.keys[copy.ebs_snapshot.id] = params.get("KmsKeyId")
        return {"ImageId": copy.id}

    def _aged(self, answer):
        """Return an answer with deprecation dates, which moto does not know, and have the copies grow older."""
        for image, left in [*self._pending.items()]:
            self._pending[image] = left - 1
            if left <= 1 and image in self.region(self._here).amis:
                del self._pending[image]
                self.region(self._here).amis[image].state = "available"
        text = answer.decode()
        for image, at in self.deprecated.items():
            name = f"<imageId>{image}</imageId>"
            text = text.replace(name, f"{name}<deprecationTime>{at:%Y-%m-%dT%H:%M:%S}.000Z</deprecationTime>")
        return text.encode()

    def _snapshots(self, params):
        """moto does not tell the keys."""
        keys = {name: self.keys.get(name, self.snapshot_key) for name in params["SnapshotIds"]}
        return {
            "Snapshots": [
                {"SnapshotId": name, "Encrypted": True, **({"KmsKeyId": key} if key else {})}
                for name, key in keys.items()
            ]
        }

    def _deprecate(self, params):
        assert params["ImageId"] in self.region(self._here).amis
        assert params["DeprecateAt"].replace(tzinfo=dt.UTC) > dt.datetime.now(dt.UTC), "EC2 refuses a date in the past"
        self.deprecated[params["ImageId"]] = params["DeprecateAt"].replace(tzinfo=dt.UTC)
        return {"Return": True}

    def _deregister(self, params):
        """moto keeps the snapshots, which EC2 removes when it is asked to."""
        image = params["ImageId"]
        if image not in self.ec2.amis:
            raise Fault("InvalidAMIID.NotFound", f"The image id '[{image}]' does not exist")
        found = self.call("ec2", "describe_images", ImageIds=[image])["Images"][0]["BlockDeviceMappings"]
        self.call("ec2", "deregister_image", ImageId=image)
        results = []
        for snapshot in [one["Ebs"]["SnapshotId"] for one in found] if params["DeleteAssociatedSnapshots"] else []:
            if self.snapshots == "success":
                self.call("ec2", "delete_snapshot", SnapshotId=snapshot)
            results.append({"SnapshotId": snapshot, "ReturnCode": self.snapshots})
        return {"Return": True, "DeleteSnapshotResults": results}


def checkout(folder, *changes):
    """Make a checkout with changes, each a file, a text of it and its replacement; return its scripts/deploy."""
    (folder / "scripts").mkdir(parents=True)
    shutil.copytree(ROOT / "scripts" / "deploying", folder / "scripts" / "deploying")
    for name in ("deploy", "venv"):
        shutil.copy(ROOT / "scripts" / name, folder / "scripts" / name)
    for name in (
        *(".venv", "chatd", "packer", "schemas", "seed"),
        *("pyproject.toml", "requirements.txt", "requirements-build.txt"),
    ):
        (folder / name).symlink_to(ROOT / name)
    for name, old, new in changes:
        path = folder / "scripts" / name
        text = path.read_text()
        assert text.count(old) == 1, (name, old)
        path.write_text(text.replace(old, new))
    return folder / "scripts" / "deploy"


def settings(account, **changes):
    """Return the environment of a scripts/deploy that knows of no other account, and does not wait."""
    kept = {
        name: value for name, value in environment().items() if not name.startswith("AWS_") and name != "PYTHONPATH"
    }
    return (
        kept
        | {
            "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",  # some python3 take long to start
            "AWS_ACCESS_KEY_ID": "operator",
            "AWS_SECRET_ACCESS_KEY": "operator",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_ENDPOINT_URL": account.url,
            "AWS_MAX_ATTEMPTS": "1",
            "AWS_REGION": REGION,
            "CHATD_DEPLOY_CLOCK": "counted",
        }
        | changes
    )


def deploying(account, *arguments, typed=None, **changes):
    """Start scripts/deploy, with a line on its standard input if one is typed."""
    account.process = subprocess.Popen(
        [account.script, *arguments],
        env=settings(account, **changes),
        stdin=subprocess.DEVNULL if typed is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if typed is not None:
        account.process.stdin.write(f"{typed}\n")
        account.process.stdin.flush()
    return account.process


def deploy(account, *arguments, **more):
    """Run scripts/deploy; answers the ended process, and with --json what it said."""
    with deploying(account, *arguments, **more) as process:
        said, told = process.communicate(timeout=2 * LONG)
    assert "Traceback" not in told, told
    assert {*account.asked} <= ALLOWED
    result = subprocess.CompletedProcess(process.args, process.returncode, said, told)
    result.json = json.loads(said) if said and "--json" in arguments else None
    return result


@contextlib.contextmanager
def running(chat, script=DEPLOY):
    """Lend an account whose stack runs an old image, which is last-good, and which has a new image too."""
    with DeploymentAccount(chat.url, script) as account:
        account.old, account.new = (account.image(VERSION, days=days) for days in (2, 1))
        account.stack.exists(ImageId=account.old, **GIVEN)
        account.label(account.old)
        yield account


def parameters(image, **changes):
    """Return all parameters of a stack that runs an image."""
    return deployed(parsed(TEMPLATE.read_text()), {"ImageId": image, **GIVEN, **changes}).parameters


def runs(account):
    """Return the one image that all instances run."""
    (image,) = set(account.fleet.images.values())
    return image


def end(account, result, status, **expected):
    """Assert how it ended: with which status, and what runs, is last-good, and is on record; no change set is left.

    Unless it is said otherwise all is as it was before.
    """
    wanted = {"runs": account.old, "good": account.old, "record": [account.old], "planned": []} | expected
    record, good = account.recorded()
    planned = [one.name for one in account.stack.change_sets.values() if one.execution != "EXECUTE_COMPLETE"]
    seen = {"runs": runs(account), "good": good, "record": record, "planned": planned}
    told = result.stdout + result.stderr
    assert (result.returncode, seen) == (status, wanted), told
    if status:
        assert result.stderr.splitlines()[-1].startswith("deploy: "), told
