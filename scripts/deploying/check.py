"""The problems that would stop the creation of a stack, or a rollout, after minutes or silently.

Each check yields one line with the remedy, as `chatd --check` does.  A check that the credentials do not permit, or
that AWS does not answer, is skipped and reported.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

from deploying.aws import DENIED, INVALID, Account, AwsError, CallDenied, DeployError, say
from deploying.images import find
from deploying.stack import REVIEW, Stack, State

QUOTA: Final = "L-1216C47A"
"""The quota of vCPU for running on-demand instances of the standard families."""
STANDARD: Final = re.compile(r"[acdhimrtz]\d")
"""The families that the quota covers."""
WITHOUT_MEMORYDB: Final = frozenset(("use1-az3",))
"""The ids of zones without MemoryDB."""
SURGE: Final = 0.2
"""The share of additional instances during a rollout: MaxHealthyPercentage of the template, less 100 %."""
LAUNCHER: Final = "aws-service-role/autoscaling.amazonaws.com/AWSServiceRoleForAutoScaling"
"""The role with which Auto Scaling launches instances."""
OPERATIONS: Final = (
    *("CreateGrant", "Decrypt", "DescribeKey", "Encrypt", "GenerateDataKey", "GenerateDataKeyWithoutPlaintext"),
    *("ReEncryptFrom", "ReEncryptTo"),
)
"""The operations of KMS that an encrypted disk needs."""
ZONES: Final = 2
NO_CLUSTER: Final = frozenset(("ClusterNotFoundFault", "ClusterNotFound"))
NO_SUBNETS: Final = frozenset(("SubnetGroupNotFoundFault", "SubnetGroupNotFound"))
TYPES: Final = ("InstanceType", "SecondInstanceType", "ThirdInstanceType")
LACKING: Final = re.compile(r"Invalid|Validation|.*NotFound")
"""How the error code begins for a parameter that names nothing in the account."""
UNSEEN: Final = "Unseen"
"""The code of an error for what nobody can see with these credentials."""


class Target(NamedTuple):
    """What is checked: a stack with the parameters that it would have, and an image if one is known."""

    stack: Stack
    state: State | None
    parameters: Mapping[str, str]
    image: str | None
    role: str | None = None
    """The role of CloudFormation."""
    faults: tuple[str, ...] = ()
    """What is wrong with the parameters given; they are not among `parameters`."""

    @property
    def account(self) -> Account:
        """The account of the stack."""
        return self.stack.account

    @property
    def fresh(self) -> bool:
        """True if the stack does not exist yet."""
        return self.state is None or self.state.status == REVIEW

    def __getitem__(self, name: Any) -> Any:
        """Return a parameter; empty if the template has none of this name."""
        return self.parameters.get(name, "")

    @property
    def types(self) -> list[str]:
        """The types of the instances."""
        return [self[name] for name in TYPES if self[name]]


def parameters(target: Target) -> Iterator[str]:
    """Check that the template has the parameters given, and that numbers are numbers."""
    yield from target.faults


def state(target: Target) -> Iterator[str]:
    """Check that the stack can be updated now, which a rollout needs; raises CallDenied."""
    yield from ()
    target.stack.free(target.state)
    if target.state is not None and not target.fresh:
        target.stack.quiet(target.state)


def types(target: Target) -> Iterator[str]:
    """Check that the types of the instances exist, and have the architecture of the image, or else one in common."""
    account = target.account
    found = account.call("ec2", "describe_instance_types", InstanceTypes=target.types)["InstanceTypes"]
    supported = {one["InstanceType"]: {*one["ProcessorInfo"]["SupportedArchitectures"]} for one in found}
    common = set.intersection(*supported.values())
    if not common:
        words = ", ".join(f"{kind} is {'/'.join(sorted(names))}" for kind, names in supported.items())
        yield f"no image runs on all types of the instances ({words}): use types of one architecture"
    elif target.image:
        image = find(account, target.image)["Architecture"]
        for kind in sorted(kind for kind, names in supported.items() if image not in names):
            yield f"the image {target.image} is {image}, and cannot run on {kind}: use another type or --arch"


def quota(target: Target) -> Iterator[str]:
    """Check that the group fits into the quota of vCPU, with the additional instances of a rollout."""
    kinds = [kind for kind in target.types if STANDARD.match(kind)]
    if not kinds:
        return
    account = target.account
    arguments = {"ServiceCode": "ec2", "QuotaCode": QUOTA}
    limit = account.call("service-quotas", "get_service_quota", **arguments)["Quota"]["Value"]
    found = account.call("ec2", "describe_instance_types", InstanceTypes=kinds)["InstanceTypes"]
    each = max(one["VCpuInfo"]["DefaultVCpus"] for one in found)
    used = sum(_others(target))
    for name in ("MinSize", "MaxSize"):
        size = int(target[name])
        needed = each * (size + max(1, math.ceil(SURGE * size)))
        if used + needed > limit:
            remedy = "aws service-quotas request-service-quota-increase --service-code ec2"
            yield (
                f"a rollout of {name}={size} needs {needed} vCPU, others use {used}, and the quota is {limit:g}: "
                f"{remedy} --quota-code {QUOTA} --desired-value {used + needed}"
            )
            return


def _others(target: Target) -> Iterator[int]:
    """Yield the vCPU of each running instance that is not of the stack."""
    filters = [{"Name": "instance-state-name", "Values": ["pending", "running"]}]
    for reservation in target.account.pages("ec2", "describe_instances", "Reservations", Filters=filters):
        for one in reservation["Instances"]:
            tags = {tag["Key"]: tag["Value"] for tag in one.get("Tags", [])}
            own = tags.get("aws:autoscaling:groupName") == target.stack.name
            if not own and STANDARD.match(one["InstanceType"]) and one.get("InstanceLifecycle") != "spot":
                cpu = one.get("CpuOptions", {})
                yield cpu.get("CoreCount", 1) * cpu.get("ThreadsPerCore", 1)


def zones(target: Target) -> Iterator[str]:
    """Check that the zones of the stack are two, and have MemoryDB and a type of the instances."""
    account = target.account
    kind = [{"Name": "instance-type", "Values": target.types}]
    arguments = {"LocationType": "availability-zone", "Filters": kind}
    pages = account.pages("ec2", "describe_instance_type_offerings", "InstanceTypeOfferings", **arguments)
    offering = {one["Location"] for one in pages}
    only = [{"Name": "zone-type", "Values": ["availability-zone"]}]
    found = account.call("ec2", "describe_availability_zones", Filters=only)["AvailabilityZones"]
    ids = {one["ZoneName"]: one["ZoneId"] for one in found if one["State"] == "available"}
    faults = {name: "is not available" for name in _zones_of(target, sorted(ids)) if name not in ids}
    for name in _zones_of(target, sorted(ids)):
        if name in ids and not target["StoreParameter"] and ids[name] in WITHOUT_MEMORYDB:
            faults[name] = f"({ids[name]}) has no MemoryDB"
        elif name in ids and name not in offering:
            faults[name] = f"has no {' or '.join(target.types)}"
    good = sorted(name for name in ids if name in offering and ids[name] not in WITHOUT_MEMORYDB)[:ZONES]
    remedy = "use subnets in other zones" if target["VpcId"] else "use another InstanceType or region"
    if len(good) == ZONES and not target["VpcId"]:
        remedy = "use ZoneA={} ZoneB={}".format(*good)
    yield from (f"the zone {name} {fault}: {remedy}" for name, fault in faults.items())
    if len(set(_zones_of(target, sorted(ids)))) < ZONES:
        yield "the load balancer needs subnets in two zones: give SubnetIds of two"


def _zones_of(target: Target, available: list[str]) -> list[str]:
    """Return the zones that the stack is in."""
    if not target["VpcId"]:
        return [target["ZoneA"], target["ZoneB"]] if target["ZoneA"] else available[:ZONES]
    subnets = f"{target['SubnetIds']},{target['NodeSubnetIds']}".strip(",").split(",")
    found = target.account.call("ec2", "describe_subnets", SubnetIds=subnets)["Subnets"]
    return sorted({one["AvailabilityZone"] for one in found})


def network(target: Target) -> Iterator[str]:
    """Check that the region has a default VPC, in which scripts/bake builds, unless there is an image already."""
    own = [{"Name": "is-default", "Values": ["true"]}]
    if not target.image and not target.account.call("ec2", "describe_vpcs", Filters=own)["Vpcs"]:
        yield (
            "the region has no default VPC, in which scripts/bake builds: aws ec2 create-default-vpc, or bake with "
            "--var subnet_id=subnet-..., and give its --image to this check"
        )


def keys(target: Target) -> Iterator[str]:
    """Check that Auto Scaling may use the key of an encrypted image."""
    if not target.image:
        return
    account = target.account
    image = find(account, target.image)
    caller = account.call("sts", "get_caller_identity")
    launcher = f"arn:{caller['Arn'].split(':')[1]}:iam::{caller['Account']}:role/{LAUNCHER}"
    remedy = f"--grantee-principal {launcher} --operations {' '.join(OPERATIONS)}"
    disks = image.get("BlockDeviceMappings", [])
    if image["OwnerId"] != caller["Account"]:
        raise AwsError(
            f"the image belongs to the account {image['OwnerId']}, and only that sees its key. If it is a key of KMS, "
            f"let Auto Scaling here use it: aws kms create-grant --key-id KEY {remedy}",
            UNSEEN,
        )
    snapshots = [one["Ebs"]["SnapshotId"] for one in disks if "SnapshotId" in one.get("Ebs", {})]
    found = account.call("ec2", "describe_snapshots", SnapshotIds=snapshots)["Snapshots"] if snapshots else []
    for key in sorted({one["KmsKeyId"] for one in found if one.get("KmsKeyId")}):
        about = account.call("kms", "describe_key", KeyId=key)["KeyMetadata"]
        if about["KeyManager"] != "CUSTOMER":
            continue
        grants = account.pages("kms", "list_grants", "Grants", KeyId=key)
        granted = {name for one in grants if one["GranteePrincipal"] == launcher for name in one["Operations"]}
        if not {"CreateGrant", "Decrypt"} <= granted and not _permitted(account, key, launcher):
            yield (
                f"Auto Scaling cannot launch {target.image}, because it may not use its key: aws kms create-grant "
                f"--key-id {key} {remedy}"
            )


def _permitted(account: Account, key: str, principal: str) -> bool:
    """Return whether the policy of a key names a principal."""
    text = account.call("kms", "get_key_policy", KeyId=key, PolicyName="default")["Policy"]
    return principal in json.dumps(json.loads(text))


def names(target: Target) -> Iterator[str]:
    """Check that nothing else has the names that a new stack gives."""
    name, account = target.stack.name, target.account
    if not re.fullmatch(r"[a-z][a-z0-9-]{0,31}", name):
        yield f"the name {name} is not of at most 32 lower-case letters, digits and hyphens: choose another"
    if not target.fresh:
        return
    groups = account.call("logs", "describe_log_groups", logGroupNamePrefix=f"/chatd/{name}")["logGroups"]
    if any(one["logGroupName"] == f"/chatd/{name}" for one in groups):
        yield f"the log group /chatd/{name} exists: aws logs delete-log-group --log-group-name /chatd/{name}"
    found = account.call("autoscaling", "describe_auto_scaling_groups", AutoScalingGroupNames=[name])
    if found["AutoScalingGroups"]:
        yield f"the group {name} exists, and is not of this stack: choose another name for the stack"
    if not target["StoreParameter"]:
        yield from leftover(target)
        parameter = f"/chatd/{name}/store"
        wanted = [{"Key": "Name", "Option": "Equals", "Values": [parameter]}]
        if account.call("ssm", "describe_parameters", ParameterFilters=wanted)["Parameters"]:
            yield f"the SSM parameter {parameter} exists: aws ssm delete-parameter --name {parameter}"


def leftover(target: Target) -> Iterator[str]:
    """Check that no MemoryDB of an earlier stack has the name."""
    name = target.stack.name
    remedy = "aws memorydb delete-cluster --cluster-name"
    try:
        target.account.call("memorydb", "describe_clusters", ClusterName=name)
    except AwsError as error:
        if error.code not in NO_CLUSTER:
            raise
    else:
        final = f"--final-snapshot-name {name}-final"
        yield f"an earlier stack left the cluster {name} in MemoryDB: {remedy} {name} {final}"
    remedy = "aws memorydb delete-subnet-group --subnet-group-name"
    try:
        target.account.call("memorydb", "describe_subnet_groups", SubnetGroupName=name)
    except AwsError as error:
        if error.code not in NO_SUBNETS:
            raise
    else:
        yield f"an earlier stack left the subnet group {name} in MemoryDB: {remedy} {name}"


def certificate(target: Target) -> Iterator[str]:
    """Check that the certificate is issued and covers the name."""
    arn, name = target["CertificateArn"], target["DomainName"]
    if not arn:
        return
    if not name:
        yield "a certificate needs the name that clients use: give DomainName with CertificateArn"
        return
    try:
        found = target.account.call("acm", "describe_certificate", CertificateArn=arn)["Certificate"]
    except AwsError as error:
        if error.code != "ResourceNotFoundException":
            raise
        yield f"there is no certificate {arn} in this region: request it here"
        return
    if found["Status"] == "PENDING_VALIDATION":
        yield (
            f"the certificate is {found['Status']}: create the CNAME of its validation in the zone of {name}: aws acm "
            f"describe-certificate --certificate-arn {arn}"
        )
    elif found["Status"] != "ISSUED":
        yield f"the certificate is {found['Status']}: request another, or import it again"
    covered = [found["DomainName"], *found.get("SubjectAlternativeNames", [])]
    if name not in covered and f"*.{name.partition('.')[2]}" not in covered:
        yield f"the certificate is for {', '.join(sorted(set(covered)))}, not for {name}: request another"


READS: Final = (
    *("autoscaling:DescribeAutoScalingGroups", "autoscaling:DescribeInstanceRefreshes"),
    *("cloudformation:DescribeStacks", "cloudformation:GetTemplateSummary", "cloudwatch:DescribeAlarms"),
    *("ec2:DescribeImages", "ec2:DescribeInstances", "elasticloadbalancing:DescribeTargetHealth"),
)
CHANGES: Final = {
    "cloudformation:{here}:stack/{stack}/*": (
        *("cloudformation:CancelUpdateStack", "cloudformation:CreateChangeSet", "cloudformation:DeleteChangeSet"),
        *("cloudformation:DescribeChangeSet", "cloudformation:DescribeStackEvents", "cloudformation:ExecuteChangeSet"),
    ),
    "ssm:{here}:parameter/chatd/{stack}/image": (
        *("ssm:GetParameter", "ssm:LabelParameterVersion", "ssm:PutParameter"),
    ),
}
"""What `ship` calls, by the resource; a test holds it to the documented policy."""


def permissions(target: Target) -> Iterator[str]:
    """Check, by a simulation, that the credentials permit what `ship` calls."""
    account = target.account
    caller = account.call("sts", "get_caller_identity")["Arn"]
    _, partition, _, _, owner, name = caller.split(":", 5)
    if name == "root":
        return
    if not name.startswith(("user/", "assumed-role/")):
        raise AwsError(f"IAM simulates only users and roles, and not {caller}", UNSEEN)
    if name.startswith("assumed-role/"):
        caller = account.call("iam", "get_role", RoleName=name.split("/")[1])["Role"]["Arn"]
    here = f"{account.region}:{owner}"
    wanted: dict[str, tuple[str, ...]] = {"*": READS}
    for resource, actions in CHANGES.items():
        wanted[f"arn:{partition}:{resource.format(here=here, stack=target.stack.name)}"] = actions
    if target.role:
        wanted[target.role] = ("iam:PassRole",)
    denied = []
    context = {"aws:RequestedRegion": account.region, "iam:PassedToService": "cloudformation.amazonaws.com"}
    entries = [
        {"ContextKeyName": key, "ContextKeyValues": [value], "ContextKeyType": "string"}
        for key, value in context.items()
    ]
    for resource, actions in wanted.items():
        arguments = {"PolicySourceArn": caller, "ActionNames": [*actions], "ResourceArns": [resource]}
        arguments["ContextEntries"] = entries
        results = account.pages("iam", "simulate_principal_policy", "EvaluationResults", **arguments)
        denied += [one["EvalActionName"] for one in results if one["EvalDecision"] != "allowed"]
    if denied:
        yield f"{caller} may not call {', '.join(denied)}: give it the policy of docs/deploy.md"


CHECKS: Final[dict[str, Callable[[Target], Iterator[str]]]] = {
    "parameters": parameters,
    "state": state,
    "types": types,
    "quota": quota,
    "zones": zones,
    "default VPC": network,
    "key grants": keys,
    "names": names,
    "certificate": certificate,
    "permissions": permissions,
}


def aim(
    stack: Stack,
    image: str | None,
    template: str,
    given: Mapping[str, str],
    role: str | None,
    *,
    replaces: bool = False,
) -> Target:
    """Return what to check: a stack with its parameters, or else the template's, and those given.

    A stack that exists keeps its template, unless the one given `replaces` it.
    """
    found = stack.look()
    summary = stack.account.call("cloudformation", "get_template_summary", TemplateBody=template)["Parameters"]
    former = found.parameters if found else {}
    known = {one["ParameterKey"] for one in summary} if replaces or not former else {*former}
    numbers = {one["ParameterKey"] for one in summary if one["ParameterType"] == "Number"}
    wrong = {name: f"the template has no parameter {name}: docs/deploy.md lists them" for name in given.keys() - known}
    wrong |= {
        name: f"{name} is a number, and not {given[name]!r}: --parameter {name}=NUMBER"
        for name in (given.keys() & numbers) - wrong.keys()
        if not re.fullmatch(r"[0-9]{1,9}", given[name])
    }
    defaults = {one["ParameterKey"]: one.get("DefaultValue", "") for one in summary}
    wrong |= {
        name: f"{name} is empty: give it a value, or leave it out"
        for name in given.keys() - wrong.keys()
        if not given[name] and defaults.get(name)
    }
    good = {name: value for name, value in given.items() if name not in wrong}
    faults = tuple(wrong[name] for name in sorted(wrong))
    return Target(stack, found, {**defaults, **former, **good}, image, role, faults)


def launchable(stack: Stack, image: str) -> None:
    """Check that Auto Scaling can launch an image; raises CallDenied.  Prints a line if that cannot be read."""
    try:
        found = [*keys(Target(stack, None, {}, image))]
    except AwsError as error:
        say(f"the key of {image} is not checked: {error}")
        return
    if found:
        raise CallDenied(found[0])


def findings(target: Target) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Run all checks; returns the findings, and the checks that were skipped with the reason.

    What several checks find is reported once.  Raises AwsError if no check can be made: AWS cannot be reached, or the
    credentials are invalid.
    """
    found: dict[str, str] = {}
    skipped = []
    for name, check in CHECKS.items():
        try:
            for text in check(target):
                found.setdefault(text, name)
        except AwsError as error:
            if error.passing or error.code in INVALID or not error.code:
                raise
            if error.code not in DENIED and LACKING.match(error.code):
                found.setdefault(str(error), name)
            else:
                skipped.append({"check": name, "text": str(error)})
        except DeployError as error:
            found.setdefault(str(error), name)
    return [{"check": name, "text": text} for text, name in found.items()], skipped
