"""The problems that would stop the creation of a stack, or a rollout, after minutes or silently.

Each check yields one line with the remedy, as `chatd --check` does.  A check that the credentials do not permit, or
that AWS does not answer, is skipped and reported.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from deploying.aws import DENIED, INVALID, Account, AwsError, CallDenied, DeployError, say
from deploying.images import find
from deploying.stack import NO_CLUSTER, NO_SNAPSHOT, NO_SUBNETS, REVIEW, Stack, State

QUOTA: Final = "L-1216C47A"
"""The quota of vCPU for running on-demand instances of the standard families."""
STANDARD: Final = re.compile(r"(?:[acdhimrtz]|im|is)\d")
"""The families that the quota covers."""
WITHOUT_MEMORYDB: Final = frozenset(("apne1-az3", "apne2-az4", "use1-az3"))
"""The ids of zones without MemoryDB: https://docs.aws.amazon.com/memorydb/latest/devguide/subnetgroups.html."""
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
TYPES: Final = ("InstanceType", "SecondInstanceType", "ThirdInstanceType")
LACKING: Final = re.compile(r"Invalid|Validation|.*NotFound")
"""How the error code begins for a parameter that names nothing in the account."""
UNSEEN: Final = "Unseen"
"""The code of an error for what nobody can see with these credentials."""


@dataclass(frozen=True)
class Target:
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
    def creates_store(self) -> bool:
        """True if the stack is about to get a MemoryDB."""
        other = self.state is not None and self.state.parameters.get("StoreParameter")
        return not self["StoreParameter"] and (self.fresh or bool(other))

    @property
    def types(self) -> list[str]:
        """The types of the instances, each once."""
        return list(dict.fromkeys(self[name] for name in TYPES if self[name]))

    @cached_property
    def described(self) -> list[dict[str, Any]]:
        """The descriptions of these types by EC2."""
        found = self.account.call("ec2", "describe_instance_types", InstanceTypes=self.types)
        return list(found["InstanceTypes"])

    @cached_property
    def subnets(self) -> dict[str, dict[str, Any]]:
        """The descriptions of the subnets of an existing network, by their ids."""
        wanted = {one for name in ("SubnetIds", "NodeSubnetIds") for one in self[name].split(",")}
        found = self.account.call("ec2", "describe_subnets", SubnetIds=sorted(wanted - {""}))["Subnets"]
        return {one["SubnetId"]: one for one in found}

    @cached_property
    def described_image(self) -> dict[str, Any]:
        """The description of the image, which must be known; raises DeployError if it is not available."""
        return find(self.account, str(self.image))

    @cached_property
    def caller(self) -> dict[str, Any]:
        """The identity of the credentials, with `Account` and `Arn`."""
        return self.account.call("sts", "get_caller_identity")


def parameters(target: Target) -> Iterator[str]:
    """Check that the template has the parameters given, and that numbers are numbers."""
    yield from target.faults


def state(target: Target) -> Iterator[str]:
    """Check that the stack can be updated now, which a rollout needs; raises CallDenied."""
    yield from ()
    target.stack.free(target.state)
    if target.state is not None and not target.fresh:
        target.stack.quiet(target.state)


def sizes(target: Target) -> Iterator[str]:
    """Check that the group can have a size."""
    least, most = int(target["MinSize"]), int(target["MaxSize"])
    if least > most:
        yield f"MinSize={least} is more than MaxSize={most}: raise MaxSize"


def types(target: Target) -> Iterator[str]:
    """Check that the types of the instances differ and exist, and have the architecture of the image, or share one."""
    names: dict[str, str] = {}
    for name in TYPES:
        first = names.setdefault(target[name], name)
        if target[name] and first != name:
            yield f"{name}={target[name]} repeats {first}: use another type, or leave it out"
    supported = {one["InstanceType"]: {*one["ProcessorInfo"]["SupportedArchitectures"]} for one in target.described}
    common = set.intersection(*supported.values())
    if not common:
        words = ", ".join(f"{kind} is {'/'.join(sorted(names))}" for kind, names in supported.items())
        yield f"no image runs on all types of the instances ({words}): use types of one architecture"
    elif target.image:
        image = target.described_image["Architecture"]
        for kind in sorted(kind for kind, names in supported.items() if image not in names):
            yield f"the image {target.image} is {image}, and cannot run on {kind}: use another type or --arch"


def quota(target: Target) -> Iterator[str]:
    """Check that the group fits into the quota of vCPU, with the additional instances of a rollout."""
    kinds = [one for one in target.described if STANDARD.match(one["InstanceType"])]
    if not kinds:
        return
    arguments = {"ServiceCode": "ec2", "QuotaCode": QUOTA}
    limit = target.account.call("service-quotas", "get_service_quota", **arguments)["Quota"]["Value"]
    each = max(one["VCpuInfo"]["DefaultVCpus"] for one in kinds)
    used = sum(_others(target))
    names = {int(target[name]): name for name in ("MaxSize", "MinSize")}  # one name if they are the same
    needs = {size: each * (size + max(1, math.ceil(SURGE * size))) for size in sorted(names)}
    remedy = (
        f"aws service-quotas request-service-quota-increase --service-code ec2 --quota-code {QUOTA} --desired-value "
        f"{used + max(needs.values())}"
    )
    for size, needed in needs.items():
        if used + needed > limit:
            yield (
                f"a rollout of {names[size]}={size} needs {needed} vCPU, others use {used}, and the quota is "
                f"{limit:g}: {remedy}"
            )


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
    if target["VpcId"] and not target["SubnetIds"]:
        return
    account = target.account
    kind = [{"Name": "instance-type", "Values": target.types}]
    arguments = {"LocationType": "availability-zone", "Filters": kind}
    pages = account.pages("ec2", "describe_instance_type_offerings", "InstanceTypeOfferings", **arguments)
    offering = {one["Location"] for one in pages}
    only = [{"Name": "zone-type", "Values": ["availability-zone"]}]
    found = account.call("ec2", "describe_availability_zones", Filters=only)["AvailabilityZones"]
    ids = {one["ZoneName"]: one["ZoneId"] for one in found if one["State"] == "available"}
    balancer, nodes = _zones_of(target, sorted(ids))
    faults = {name: "is not available" for name in sorted(nodes) if name not in ids}
    for name in sorted(nodes & {*ids}):
        if not target["StoreParameter"] and ids[name] in WITHOUT_MEMORYDB:
            faults[name] = f"({ids[name]}) has no MemoryDB"
        elif name not in offering:
            faults[name] = f"has no {' or '.join(target.types)}"
    good = sorted(name for name in ids if name in offering and ids[name] not in WITHOUT_MEMORYDB)[:ZONES]
    remedy = "use subnets in other zones" if target["VpcId"] else "use another InstanceType or region"
    if len(good) == ZONES and not target["VpcId"]:
        remedy = "use ZoneA={} ZoneB={}".format(*good)
    yield from (f"the zone {name} {fault}: {remedy}" for name, fault in faults.items())
    if len(balancer) < ZONES:
        remedy = "SubnetIds of two" if target["VpcId"] else "ZoneA and ZoneB"
        yield f"the load balancer needs subnets in two zones: give {remedy}"
    for name in sorted(nodes - balancer):
        yield f"the load balancer sends no clients to the zone {name} of NodeSubnetIds: add a subnet of it to SubnetIds"


def _zones_of(target: Target, available: list[str]) -> tuple[set[str], set[str]]:
    """Return the zones of the load balancer, and those of the instances and the store."""
    account = target.account
    if target["VpcId"]:
        public, private = (target[name].split(",") for name in ("SubnetIds", "NodeSubnetIds"))
        nodes = private if private != [""] else public
        zone = {name: one["AvailabilityZone"] for name, one in target.subnets.items()}
        return {zone[one] for one in public}, {zone[one] for one in nodes}
    both = {target["ZoneA"], target["ZoneB"]}
    if not target["ZoneA"]:
        default = [{"Name": "default-for-az", "Values": ["true"]}]
        found = {one["AvailabilityZone"] for one in account.call("ec2", "describe_subnets", Filters=default)["Subnets"]}
        both = {*sorted(found & {*available} or available)[:ZONES]}  # as Fn::GetAZs
    return both, both


def subnets(target: Target) -> Iterator[str]:
    """Check that all subnets are of the VPC, and that the load balancer has no two in one zone."""
    vpc = target["VpcId"]
    if not vpc:
        return
    if not target["SubnetIds"]:
        yield f"{vpc} needs subnets for the load balancer: give SubnetIds with VpcId"
        return
    for name, one in sorted(target.subnets.items()):
        if one["VpcId"] != vpc:
            yield f"the subnet {name} is of {one['VpcId']}, and not of {vpc}: use only subnets of VpcId"
    zones: dict[str, list[str]] = {}
    for name in target["SubnetIds"].split(","):
        zones.setdefault(target.subnets[name]["AvailabilityZone"], []).append(name)
    for zone, those in sorted(zones.items()):
        if len(zones) >= ZONES and len(those) > 1:
            yield f"the load balancer takes one subnet of a zone, and {', '.join(those)} are of {zone}: use one of them"


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
    image, caller = target.described_image, target.caller
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
    """Return whether the policy of a key allows something to a principal, or to everyone."""
    text = account.call("kms", "get_key_policy", KeyId=key, PolicyName="default")["Policy"]
    for one in _listed(json.loads(text)["Statement"]):
        named = one.get("Principal", [])
        allowed = _listed(named.get("AWS", []) if isinstance(named, dict) else named)
        if one["Effect"] == "Allow" and {principal, "*"} & {*allowed}:
            return True
    return False


def _listed(value: Any) -> list[Any]:
    """Return a list of what IAM writes as a list or as its only item."""
    return value if isinstance(value, list) else [value]


def names(target: Target) -> Iterator[str]:
    """Check that nothing else has the names that the stack is about to give."""
    name, account = target.stack.name, target.account
    if target.creates_store:
        yield from leftover(target)
    if not target.fresh:
        return
    groups = account.call("logs", "describe_log_groups", logGroupNamePrefix=f"/chatd/{name}")["logGroups"]
    if any(one["logGroupName"] == f"/chatd/{name}" for one in groups):
        yield f"the log group /chatd/{name} exists: aws logs delete-log-group --log-group-name /chatd/{name}"
    found = account.call("autoscaling", "describe_auto_scaling_groups", AutoScalingGroupNames=[name])
    if found["AutoScalingGroups"]:
        yield f"the group {name} exists, and is not of this stack: choose another name for the stack"


def leftover(target: Target) -> Iterator[str]:
    """Check that no store of an earlier stack has the name."""
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
    parameter = f"/chatd/{name}/store"
    wanted = [{"Key": "Name", "Option": "Equals", "Values": [parameter]}]
    if target.account.call("ssm", "describe_parameters", ParameterFilters=wanted)["Parameters"]:
        yield f"the SSM parameter {parameter} exists: aws ssm delete-parameter --name {parameter}"


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


def zone(target: Target) -> Iterator[str]:
    """Check that the hosted zone exists, and that the name of the stack belongs to it."""
    hosted, name = target["HostedZoneId"], target["DomainName"]
    if not hosted:
        return
    if not name:
        yield "a hosted zone needs the name that clients use: give DomainName with HostedZoneId"
        return
    try:
        found = target.account.call("route53", "get_hosted_zone", Id=hosted)["HostedZone"]
    except AwsError as error:
        if error.code != "NoSuchHostedZone":
            raise
        yield f"there is no hosted zone {hosted}: aws route53 list-hosted-zones lists those of the account"
        return
    domain = found["Name"].rstrip(".")
    if not f".{name}".endswith(f".{domain}"):
        yield f"{name} does not belong to {domain}, the name of the hosted zone {hosted}: use the zone of {name}"


def snapshot(target: Target) -> Iterator[str]:
    """Check that the snapshot from which the store is created exists and is available."""
    name = target["SnapshotName"]
    if not name or not target.creates_store:
        return
    found = []
    try:
        found = target.account.call("memorydb", "describe_snapshots", SnapshotName=name)["Snapshots"]
    except AwsError as error:
        if error.code not in NO_SNAPSHOT:
            raise
    if not found:
        yield f"there is no snapshot {name} in this region: aws memorydb describe-snapshots lists them"
    for one in found:
        if one["Status"] != "available":
            yield f"the snapshot {name} is {one['Status']}: wait until it is available, or use another"


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
    caller = target.caller["Arn"]
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
    "sizes": sizes,
    "types": types,
    "quota": quota,
    "zones": zones,
    "subnets": subnets,
    "default VPC": network,
    "key grants": keys,
    "names": names,
    "snapshot": snapshot,
    "certificate": certificate,
    "hosted zone": zone,
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
