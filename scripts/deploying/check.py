"""The problems that would stop the creation of a stack, or a rollout, after minutes or silently.

Each check yields one line with the remedy, as `chatd --check` does.  A check that the credentials do not permit is
skipped and reported.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

from deploying.aws import DENIED, Account, AwsError, CallDenied, say
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


class Target(NamedTuple):
    """What is checked: a stack with the parameters that it would have, and an image if one is known."""

    stack: Stack
    state: State | None
    parameters: Mapping[str, str]
    image: str | None
    role: str | None = None
    """The role of CloudFormation."""

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


def quota(target: Target) -> Iterator[str]:
    """Check that the group fits into the quota of vCPU, with the additional instances of a rollout."""
    kind = target["InstanceType"]
    if not STANDARD.match(kind):
        return
    account = target.account
    arguments = {"ServiceCode": "ec2", "QuotaCode": QUOTA}
    limit = account.call("service-quotas", "get_service_quota", **arguments)["Quota"]["Value"]
    (found,) = account.call("ec2", "describe_instance_types", InstanceTypes=[kind])["InstanceTypes"]
    each = found["VCpuInfo"]["DefaultVCpus"]
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
    """Check that the zones of the stack are two, and have MemoryDB and the type of the instances."""
    account = target.account
    kind = [{"Name": "instance-type", "Values": [target["InstanceType"]]}]
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
            faults[name] = f"has no {target['InstanceType']}"
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
    """Check that the region has a default VPC, in which scripts/bake builds."""
    own = [{"Name": "is-default", "Values": ["true"]}]
    if not target.account.call("ec2", "describe_vpcs", Filters=own)["Vpcs"]:
        yield "the region has no default VPC, in which scripts/bake builds: aws ec2 create-default-vpc"


def keys(target: Target) -> Iterator[str]:
    """Check that Auto Scaling may use the key of an encrypted image."""
    if not target.image:
        return
    account = target.account
    disks = find(account, target.image).get("BlockDeviceMappings", [])
    snapshots = [one["Ebs"]["SnapshotId"] for one in disks if "SnapshotId" in one.get("Ebs", {})]
    found = account.call("ec2", "describe_snapshots", SnapshotIds=snapshots)["Snapshots"] if snapshots else []
    for key in sorted({one["KmsKeyId"] for one in found if one.get("KmsKeyId")}):
        about = account.call("kms", "describe_key", KeyId=key)["KeyMetadata"]
        if about["KeyManager"] != "CUSTOMER":
            continue
        launcher = f"arn:{key.split(':')[1]}:iam::{key.split(':')[4]}:role/{LAUNCHER}"
        grants = account.pages("kms", "list_grants", "Grants", KeyId=key)
        granted = {name for one in grants if one["GranteePrincipal"] == launcher for name in one["Operations"]}
        if not {"CreateGrant", "Decrypt"} <= granted and not _permitted(account, key, launcher):
            remedy = f"aws kms create-grant --key-id {key} --grantee-principal {launcher}"
            yield (
                f"Auto Scaling cannot launch {target.image}, because it may not use its key: {remedy} "
                f"--operations {' '.join(OPERATIONS)}"
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
    try:
        found = target.account.call("acm", "describe_certificate", CertificateArn=arn)["Certificate"]
    except AwsError as error:
        if error.code != "ResourceNotFoundException":
            raise
        yield f"there is no certificate {arn} in this region: request it here"
        return
    if found["Status"] != "ISSUED":
        yield (
            f"the certificate is {found['Status']}: create the CNAME of its validation in the zone of {name}: aws acm "
            f"describe-certificate --certificate-arn {arn}"
        )
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
    if name.startswith("assumed-role/"):
        caller = account.call("iam", "get_role", RoleName=name.split("/")[1])["Role"]["Arn"]
    here = f"{account.region}:{owner}"
    wanted: dict[str, tuple[str, ...]] = {"*": READS}
    for resource, actions in CHANGES.items():
        wanted[f"arn:{partition}:{resource.format(here=here, stack=target.stack.name)}"] = actions
    if target.role:
        wanted[target.role] = ("iam:PassRole",)
    denied = []
    for resource, actions in wanted.items():
        arguments = {"PolicySourceArn": caller, "ActionNames": [*actions], "ResourceArns": [resource]}
        results = account.pages("iam", "simulate_principal_policy", "EvaluationResults", **arguments)
        denied += [one["EvalActionName"] for one in results if one["EvalDecision"] != "allowed"]
    if denied:
        yield f"{caller} may not call {', '.join(denied)}: give it the policy of docs/deploy.md"


CHECKS: Final[dict[str, Callable[[Target], Iterator[str]]]] = {
    "quota": quota,
    "zones": zones,
    "default VPC": network,
    "key grants": keys,
    "names": names,
    "certificate": certificate,
    "permissions": permissions,
}


def aim(stack: Stack, image: str | None, template: str, given: Mapping[str, str], role: str | None) -> Target:
    """Return what to check: a stack with its parameters, or else the template's, and those given."""
    state = stack.look()
    summary = stack.account.call("cloudformation", "get_template_summary", TemplateBody=template)["Parameters"]
    defaults = {one["ParameterKey"]: one.get("DefaultValue", "") for one in summary}
    return Target(stack, state, {**defaults, **(state.parameters if state else {}), **given}, image, role)


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
    """Run all checks; returns the findings, and the checks that were skipped with the reason."""
    found, skipped = [], []
    for name, check in CHECKS.items():
        try:
            found += [{"check": name, "text": text} for text in check(target)]
        except AwsError as error:
            if error.code not in DENIED:
                raise
            skipped.append({"check": name, "text": str(error)})
    return found, skipped
