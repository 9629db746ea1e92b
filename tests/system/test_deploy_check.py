"""scripts/deploy check: each problem of an account is one line with its remedy."""

import json

import pytest
from support.change_sets import parsed
from support.deployments import DONE, FAILED, GIVEN, REFUSED, REGION, VERSION, DeploymentAccount, deploy, end
from support.formation import TEMPLATE
from support.wire import Fault
from system.test_deploy_controls import outcome

LAUNCHER = "role/aws-service-role/autoscaling.amazonaws.com/AWSServiceRoleForAutoScaling"


@pytest.fixture
def empty(chat):
    """An account without a stack and without problems."""
    with DeploymentAccount(chat.url) as account:
        account.old = None
        yield account


def found(account, *arguments):
    """Return what is found, as pairs of a check and its text."""
    result = deploy(account, "check", "--json", *arguments)
    assert "findings" in result.json, result.stderr
    assert result.returncode == (FAILED if result.json["findings"] else DONE), result.stderr
    assert result.json["skipped"] == []
    return [(one["check"], one["text"]) for one in result.json["findings"]]


def certificate(account, name):
    """Make a certificate in the account."""
    arn = account.call("acm", "request_certificate", DomainName=name, ValidationMethod="DNS")["CertificateArn"]
    return [f"--parameter=CertificateArn={arn}", "--parameter=DomainName=chat.example.com"], arn


def test_account_without_problems(empty):
    result = deploy(empty, "check")
    assert (result.returncode, result.stdout) == (DONE, "no problem found\n"), result.stderr
    assert empty.stack.status is None


def test_quota_of_a_new_account(empty):
    """A new account may run 5 vCPU.  Both sizes are reported, and one request is enough for both."""
    empty.vcpu = 5.0
    least, most = [text for check, text in found(empty) if check == "quota"]
    assert "MinSize=2 needs 6 vCPU, others use 0, and the quota is 5" in least
    assert "MaxSize=6 needs 16 vCPU, others use 0, and the quota is 5" in most
    assert [text.partition("--quota-code ")[2] for text in (least, most)] == ["L-1216C47A --desired-value 16"] * 2
    assert found(empty, "--parameter=MinSize=1", "--parameter=MaxSize=1") == []
    ((_, text),) = found(empty, "--parameter=MaxSize=2")
    assert "MinSize=2 needs 6 vCPU" in text, "one line for one size"


def test_quota_of_the_largest_type(empty):
    """EC2 may launch any of the types, so the one with the most vCPU counts."""
    empty.vcpu = 16.0
    assert found(empty, "--parameter=SecondInstanceType=c7g.medium") == []
    ((_, text),) = found(empty, "--parameter=SecondInstanceType=t4g.xlarge")
    assert "MaxSize=6 needs 32 vCPU" in text


def test_group_needs_a_size(empty):
    assert found(empty, "--parameter=MinSize=8", "--parameter=MaxSize=4") == [
        ("sizes", "MinSize=8 is more than MaxSize=4: raise MaxSize")
    ]


def test_types_must_have_the_architecture_of_the_image(empty):
    """Auto Scaling notices another architecture only when it launches an instance of that type."""
    image = empty.image(VERSION)
    assert found(empty, "--image", image, "--parameter=SecondInstanceType=t4g.medium") == []
    given = "--parameter=InstanceType=t3.small"
    assert found(empty, given) == []
    ((check, text),) = found(empty, "--image", image, given)
    assert (check, text) == (
        "types",
        f"the image {image} is arm64, and cannot run on t3.small: use another type or --arch",
    )
    ((_, text),) = found(empty, "--parameter=SecondInstanceType=t3.small")
    assert "(t3.small is x86_64, t4g.small is arm64): use types of one architecture" in text


def test_unknown_type(empty):
    """A type that does not exist is one problem, and the other checks go on."""
    empty.fleet.store()
    result = found(empty, "--parameter=InstanceType=t4g.smal")
    assert ("types", True) in [(check, "t4g.smal" in text) for check, text in result]
    assert [text for check, text in result if check == "names"]


def test_types_are_described_once(empty):
    """The checks share the descriptions."""
    assert found(empty, "--parameter=SecondInstanceType=t4g.medium") == []
    assert empty.asked.count("ec2:DescribeInstanceTypes") == 1


def test_types_differ(empty):
    """A type that is given twice is no alternative, and the line names both parameters."""
    assert found(empty, "--parameter=SecondInstanceType=t4g.small") == [
        ("types", "SecondInstanceType=t4g.small repeats InstanceType: use another type, or leave it out")
    ]
    given = "--parameter=SecondInstanceType=t4g.medium", "--parameter=ThirdInstanceType=t4g.medium"
    assert found(empty, *given) == [
        ("types", "ThirdInstanceType=t4g.medium repeats SecondInstanceType: use another type, or leave it out")
    ]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("MinSizes=3", "the template has no parameter MinSizes: docs/deploy.md lists them"),
        ("MinSize=two", "MinSize is a number, and not 'two': --parameter MinSize=NUMBER"),
        ("MinSize=", "MinSize is a number, and not '': --parameter MinSize=NUMBER"),
        ("InstanceType=", "InstanceType is empty: give it a value, or leave it out"),
        ("Origins=", None),
    ],
)
def test_wrong_parameters(empty, given, text):
    """CloudFormation would refuse them only after the bake."""
    assert found(empty, "--parameter", given) == ([("parameters", text)] if text else [])


def test_parameters_of_the_present_template(account, tmp_path):
    """A stack that keeps its template has its parameters; another template may have others."""
    (tmp_path / "stack.yaml").write_text(TEMPLATE.read_text().replace("  LogDays:\n", "  KeptDays:\n", 1))
    fault = ("parameters", "the template has no parameter KeptDays: docs/deploy.md lists them")
    assert fault in found(account, "--parameter=KeptDays=30")
    assert fault not in found(account, "--parameter=KeptDays=30", "--template", tmp_path / "stack.yaml")


def test_missing_template(empty, tmp_path):
    result = deploy(empty, "check", "--template", tmp_path / "none.yaml")
    assert (result.returncode, "none.yaml: No such file or directory" in result.stderr) == (FAILED, True)


def test_state_of_the_stack(account):
    """What refuses a rollout is found before an image is baked for it."""
    account.fleet.alarm("ALARM")
    assert [text for check, text in found(account) if check == "state"] == [
        "an alarm is not OK: chatd-errors (ALARM), chatd-rollout (ALARM): resolve that first"
    ]
    account.stack.status = "UPDATE_ROLLBACK_FAILED"
    assert [text for check, text in found(account) if check == "state"] == [
        "chatd is UPDATE_ROLLBACK_FAILED, and cannot be updated: repair it first"
    ]


def test_missing_image(empty):
    """A wrong image is one problem, and the other checks go on."""
    empty.fleet.store()
    result = found(empty, "--image", "ami-0123456789abcdef0")
    assert [check for check, text in result if "is missing: use one that scripts/deploy bake made" in text] == ["types"]
    assert "names" in dict(result)


def test_missing_subnets(empty):
    given = "--parameter=VpcId=vpc-01234567", "--parameter=SubnetIds=subnet-01234567,subnet-89abcdef"
    ((check, text),) = found(empty, *given)
    assert (check, "The subnet ID" in text) == ("zones", True), text


def test_quota_counts_other_instances(empty):
    """Instances of others count, and the largest size is checked too."""
    empty.vcpu = 16.0
    assert found(empty) == []
    image = empty.image(VERSION)
    empty.call("ec2", "run_instances", ImageId=image, InstanceType="t3.micro", MinCount=1, MaxCount=1)
    ((_, text),) = found(empty)
    assert "MaxSize=6 needs 16 vCPU, others use" in text


def test_zone_without_memorydb(empty):
    """A zone may lack MemoryDB, which matters only for a created store; the remedy names zones that have it."""
    answer = empty.call("ec2", "describe_availability_zones")["AvailabilityZones"]
    zones = {one["ZoneId"]: one["ZoneName"] for one in answer}
    bad = zones["use1-az3"]
    given = [f"--parameter=ZoneA={bad}", f"--parameter=ZoneB={zones['use1-az1']}"]
    ((check, text),) = found(empty, *given)
    assert (check, "has no MemoryDB: use ZoneA=" in text, f"={bad}" in text) == ("zones", True, False), text
    assert "MemoryDB" not in str(found(empty, *given, "--parameter=StoreParameter=/store"))


def test_missing_zone(empty):
    ((_, text),) = found(empty, f"--parameter=ZoneA={REGION}z", f"--parameter=ZoneB={REGION}a")
    assert f"the zone {REGION}z is not available" in text


def without_default(account, *zones):
    """Delete the default subnets of all other zones."""
    for one in account.call("ec2", "describe_subnets")["Subnets"]:
        if one["AvailabilityZone"] not in zones:
            account.call("ec2", "delete_subnet", SubnetId=one["SubnetId"])


def test_default_zones_are_those_of_default_subnets(empty):
    """Without ZoneA the template takes zones that have a default subnet, if any has one."""
    without_default(empty, f"{REGION}e", f"{REGION}f")
    ((check, text),) = found(empty)
    assert (check, f"the zone {REGION}e (use1-az3) has no MemoryDB" in text) == ("zones", True), text
    without_default(empty, f"{REGION}f")
    assert found(empty) == [("zones", "the load balancer needs subnets in two zones: give ZoneA and ZoneB")]
    without_default(empty)
    assert found(empty) == []


def subnets(account, public, private=""):
    """Make a network with subnets in zones; return its parameters."""
    vpc = account.call("ec2", "create_vpc", CidrBlock="10.9.0.0/16")["Vpc"]["VpcId"]
    made = [
        account.call(
            "ec2", "create_subnet", VpcId=vpc, CidrBlock=f"10.9.{number}.0/24", AvailabilityZone=f"{REGION}{zone}"
        )["Subnet"]["SubnetId"]
        for number, zone in enumerate(public + private)
    ]
    given = {"VpcId": vpc, "SubnetIds": ",".join(made[: len(public)]), "NodeSubnetIds": ",".join(made[len(public) :])}
    return [f"--parameter={name}={value}" for name, value in given.items() if value]


@pytest.mark.parametrize(
    ("public", "private", "words"),
    [
        ("ab", "", []),
        ("ab", "ab", []),
        ("abe", "ab", []),  # the store is not in the zone without MemoryDB
        ("ae", "", ["(use1-az3) has no MemoryDB: use subnets in other zones"]),
        ("aa", "", ["needs subnets in two zones: give SubnetIds of two"]),
        ("aa", "ab", ["needs subnets in two zones", f"no clients to the zone {REGION}b"]),
        ("ab", "ac", [f"no clients to the zone {REGION}c of NodeSubnetIds"]),
    ],
)
def test_subnets_have_the_zones(empty, public, private, words):
    """A load balancer needs two zones and sends to no others, and the store needs zones with MemoryDB."""
    texts = [text for check, text in found(empty, *subnets(empty, public, private)) if check == "zones"]
    assert [word in text for word, text in zip(words, texts, strict=True)] == [True] * len(words), texts


def test_subnets_are_of_the_network(empty):
    """CloudFormation finds subnets of two networks only while it creates the load balancer."""
    vpc, own, _ = subnets(empty, "ab", "ab")
    assert found(empty, vpc, own) == []
    ids = own.rpartition("=")[2].split(",")
    (other,) = {
        one["SubnetId"]: one["VpcId"]
        for one in empty.call("ec2", "describe_subnets")["Subnets"]
        if one["AvailabilityZone"] == f"{REGION}c"
    }.items()
    own = f"--parameter=SubnetIds={ids[0]},{ids[1]},{other[0]}"
    text = f"the subnet {other[0]} is of {other[1]}, and not of {vpc.rpartition('=')[2]}: use only subnets of VpcId"
    assert found(empty, vpc, own) == [("subnets", text)]
    nodes = f"--parameter=NodeSubnetIds={ids[0]},{other[0]}"
    assert found(empty, vpc, own, nodes) == [("subnets", text)]


def test_load_balancer_takes_one_subnet_of_a_zone(empty):
    """Instances may be in several subnets of a zone."""
    vpc, public, private = subnets(empty, "aab", "aab")
    ids = public.rpartition("=")[2].split(",")
    text = f"the load balancer takes one subnet of a zone, and {ids[0]}, {ids[1]} are of {REGION}a: use one of them"
    assert found(empty, vpc, public) == [("subnets", text)]
    assert found(empty, vpc, f"--parameter=SubnetIds={ids[0]},{ids[2]}", private) == []


def test_network_needs_subnets(empty):
    vpc, _ = subnets(empty, "ab")
    text = f"{vpc.rpartition('=')[2]} needs subnets for the load balancer: give SubnetIds with VpcId"
    assert found(empty, vpc) == [("subnets", text)]


def test_region_without_default_vpc(empty):
    (vpc,) = empty.call("ec2", "describe_vpcs", Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"]
    for one in empty.call("ec2", "describe_subnets")["Subnets"]:
        empty.call("ec2", "delete_subnet", SubnetId=one["SubnetId"])
    empty.call("ec2", "delete_vpc", VpcId=vpc["VpcId"])
    assert [check for check, text in found(empty) if "create-default-vpc" in text] == ["default VPC"]
    assert found(empty, "--image", empty.image(VERSION)) == [], "nothing is baked"


def test_leftover_store(empty):
    """A cluster that an earlier stack left has the name of the new one, so the creation would fail."""
    empty.fleet.store()
    assert [text.partition(" in MemoryDB")[0] for _, text in found(empty)] == [
        "an earlier stack left the cluster chatd",
        "an earlier stack left the subnet group chatd",
    ]
    assert found(empty, "--parameter=StoreParameter=/store") == []


def test_leftover_store_of_a_stack_that_had_another(account):
    """The cluster keeps a stack from returning to a store of its own after it has used another."""
    account.fleet.store()
    account.stack.set(StoreParameter="/chatd/store")
    assert "names" not in dict(found(account))
    assert "left the subnet group" in dict(found(account, "--parameter=StoreParameter="))["names"]


def test_leftover_store_fails_the_creation(empty):
    """The control: the double, as AWS, creates no second cluster of the name."""
    empty.fleet.store()
    image = empty.image(VERSION)
    result = deploy(empty, "ship", "--image", image)
    assert (result.returncode, "already exists" in result.stderr, empty.stack.status) == (4, True, "ROLLBACK_COMPLETE")


def test_snapshot(empty):
    """MemoryDB creates a cluster only from a snapshot that exists and is available."""
    given = "--parameter=SnapshotName=chat-final-1"
    missing = "there is no snapshot chat-final-1 in this region: aws memorydb describe-snapshots lists them"
    assert found(empty, given) == [("snapshot", missing)]
    empty.fault("DescribeSnapshots", lambda: setattr(empty.memorydb, "describe_snapshots", lambda **_: []))
    assert found(empty, given) == [("snapshot", missing)], "an empty answer"
    del empty.memorydb.describe_snapshots
    empty.fleet.store()
    empty.call("memorydb", "create_snapshot", ClusterName="chatd", SnapshotName="chat-final-1")
    empty.memorydb.clusters.clear()
    empty.memorydb.subnet_groups.clear()
    empty.memorydb.snapshots["chat-final-1"].status = "creating"
    assert found(empty, given) == [
        ("snapshot", "the snapshot chat-final-1 is creating: wait until it is available, or use another")
    ]
    empty.memorydb.snapshots["chat-final-1"].status = "available"
    assert found(empty, given) == []


def test_snapshot_of_a_store_that_exists(account):
    """A snapshot may be deleted after the creation, and is needed again if the stack returns to an own store."""
    account.stack.set(SnapshotName="chat-final-1")
    assert "snapshot" not in dict(found(account))
    account.stack.set(SnapshotName="", StoreParameter="/chatd/store")
    given = "--parameter=StoreParameter=", "--parameter=SnapshotName=chat-final-1"
    assert "there is no snapshot" in dict(found(account, *given))["snapshot"]


def test_taken_names(empty):
    empty.call("logs", "create_log_group", logGroupName="/chatd/chatd")
    empty.call("logs", "create_log_group", logGroupName="/chatd/chatd2")
    ((check, text),) = found(empty)
    assert (check, "aws logs delete-log-group" in text) == ("names", True)
    empty.call("logs", "delete_log_group", logGroupName="/chatd/chatd")
    empty.call("ssm", "put_parameter", Name="/chatd/chatd/store", Value="redis://h", Type="String")
    assert found(empty) == [
        ("names", "the SSM parameter /chatd/chatd/store exists: aws ssm delete-parameter --name /chatd/chatd/store")
    ]
    assert found(empty, "--parameter=StoreParameter=/store") == []


def test_certificate(empty):
    """A certificate must be issued, and be for the name."""
    arguments, arn = certificate(empty, "*.example.com")
    certificates(empty)[arn].status = "ISSUED"
    assert found(empty, *arguments) == []
    certificates(empty)[arn].status = "PENDING_VALIDATION"
    ((_, text),) = found(empty, *arguments)
    assert "PENDING_VALIDATION: create the CNAME" in text
    certificates(empty)[arn].status = "EXPIRED"
    ((_, text),) = found(empty, *arguments)
    assert text == "the certificate is EXPIRED: request another, or import it again"
    ((_, text),) = found(empty, arguments[0])
    assert text.endswith("give DomainName with CertificateArn")
    arguments, arn = certificate(empty, "other.example.com")
    certificates(empty)[arn].status = "ISSUED"
    ((_, text),) = found(empty, *arguments)
    assert text == "the certificate is for other.example.com, not for chat.example.com: request another"


def test_certificate_of_another_region(empty):
    """A certificate that this region does not have is a problem, and not an error."""
    arn = f"arn:aws:acm:{REGION}:{empty.owner}:certificate/01234567-89ab-cdef-0123-456789abcdef"
    ((_, text),) = found(empty, f"--parameter=CertificateArn={arn}", "--parameter=DomainName=chat.example.com")
    assert "in this region: request it here" in text


def certificates(account):
    from moto.acm.models import acm_backends

    return acm_backends[account.owner][REGION]._certificates


@pytest.mark.parametrize(
    ("domain", "name", "belongs"),
    [
        ("example.com", "chat.example.com", True),
        ("chat.example.com", "chat.example.com", True),
        ("other.com", "chat.example.com", False),
        ("ample.com", "chat.example.com", False),
        ("a.chat.example.com", "chat.example.com", False),
    ],
)
def test_hosted_zone_of_the_name(empty, domain, name, belongs):
    """Route 53 refuses the record of a name in another zone, after minutes."""
    made = empty.call("route53", "create_hosted_zone", Name=domain, CallerReference=domain)["HostedZone"]["Id"]
    zone = made.rpartition("/")[2]
    given = f"--parameter=HostedZoneId={zone}", f"--parameter=DomainName={name}"
    text = f"{name} does not belong to {domain}, the name of the hosted zone {zone}: use the zone of {name}"
    assert found(empty, *given) == ([] if belongs else [("hosted zone", text)])


def test_missing_hosted_zone(empty):
    given = "--parameter=HostedZoneId=Z0123456789ABCDEFGHIJ"
    assert found(empty, given, "--parameter=DomainName=chat.example.com") == [
        (
            "hosted zone",
            "there is no hosted zone Z0123456789ABCDEFGHIJ: aws route53 list-hosted-zones lists those of the account",
        )
    ]
    assert found(empty, given) == [
        ("hosted zone", "a hosted zone needs the name that clients use: give DomainName with HostedZoneId")
    ]


@pytest.mark.parametrize(("operation", "check"), [("GetHostedZone", "hosted zone"), ("DescribeSnapshots", "snapshot")])
def test_unseen_zone_or_snapshot_is_skipped(empty, operation, check):
    """Without the permission to look, nothing is reported as missing."""
    empty.fault(operation, Fault("AccessDenied", "no", 403))
    given = "HostedZoneId=Z0123456789ABCDEFGHIJ", "DomainName=chat.example.com", "SnapshotName=chat-final-1"
    result = deploy(empty, "check", *(f"--parameter={one}" for one in given))
    assert f"{check}: not checked: access denied" in result.stdout


def test_permissions(empty):
    """What the caller may not do is named before anything is done."""
    empty.denied = {"cloudformation:ExecuteChangeSet", "iam:PassRole"}
    ((check, text),) = found(empty)
    assert (check, "may not call cloudformation:ExecuteChangeSet:" in text) == ("permissions", True), text
    ((_, text),) = found(empty, f"--role-arn=arn:aws:iam::{empty.owner}:role/chatd.chatd")
    assert "cloudformation:ExecuteChangeSet, iam:PassRole" in text


def test_forbidden_check_is_skipped(empty):
    """A check that is not permitted is reported as such, and the others run."""
    empty.fault("GetServiceQuota", Fault("AccessDeniedException", "no", 400), times=9)
    empty.fleet.store()
    result = deploy(empty, "check")
    assert result.returncode == FAILED
    assert "quota: not checked: access denied: servicequotas:GetServiceQuota" in result.stdout
    assert "names: an earlier stack left" in result.stdout


def test_unanswered_check_is_skipped(empty):
    """A quota that was never changed may have no value, which says nothing about the account."""
    empty.fault("GetServiceQuota", Fault("NoSuchResourceException", "no such quota", 400))
    result = deploy(empty, "check")
    assert (result.returncode, "quota: not checked: servicequotas:GetServiceQuota: no such quota" in result.stdout) == (
        DONE,
        True,
    ), result.stdout


@pytest.mark.parametrize("code", ["Throttling", "ExpiredToken", "OptInRequired", "InvalidClientTokenId"])
def test_check_ends_without_answers(empty, code):
    """While AWS throttles, with invalid credentials, or in a region that is not enabled, nothing can be checked."""
    empty.fault("DescribeInstanceTypes", Fault(code, "no", 400), times=9)
    result = deploy(empty, "check")
    assert (result.returncode, result.stdout) == (FAILED, ""), result.stdout
    assert "ec2:DescribeInstanceTypes" in result.stderr.splitlines()[-1]


def test_caller_that_iam_cannot_simulate(empty):
    empty.caller = "federated-user/ops"
    result = deploy(empty, "check")
    assert result.returncode == DONE, result.stderr
    assert "permissions: not checked: IAM simulates only users and roles, and not arn:aws:" in result.stdout


# Keys


@pytest.fixture
def locked(account):
    """An account whose images are encrypted with a key of its own."""
    account.snapshot_key = account.call("kms", "create_key")["KeyMetadata"]["Arn"]
    return account


def test_plan_refuses_a_key_without_grant(locked):
    """Auto Scaling cannot launch an image whose key it may not use, and the remedy creates the grant."""
    result = deploy(locked, "plan", locked.new)
    end(locked, result, REFUSED)
    assert f"--grantee-principal arn:aws:iam::{locked.owner}:{LAUNCHER} --operations CreateGrant" in result.stderr
    ((check, _),) = [one for one in found(locked, "--image", locked.new) if one[0] == "key grants"]
    assert check == "key grants"


def test_key_of_an_image_of_another_account_is_not_checked(locked):
    """Only the account of an image sees its key, so the command with which this one may use it is shown."""
    locked.ec2.amis[locked.new].owner_id = "111122223333"
    result = deploy(locked, "plan", locked.new)
    end(locked, result, DONE, planned=[f"chatd-{locked.new}"])
    assert "belongs to the account 111122223333" in result.stderr
    assert f"--key-id KEY --grantee-principal arn:aws:iam::{locked.owner}:{LAUNCHER}" in result.stderr
    assert "ec2:DescribeSnapshots" not in locked.asked


def test_granted_key_is_accepted(locked):
    grantee = f"arn:aws:iam::{locked.owner}:{LAUNCHER}"
    locked.call(
        "kms",
        "create_grant",
        KeyId=locked.snapshot_key,
        GranteePrincipal=grantee,
        Operations=["CreateGrant", "Decrypt"],
    )
    end(locked, deploy(locked, "plan", locked.new), DONE, planned=[f"chatd-{locked.new}"])


@pytest.mark.parametrize(
    ("effect", "principal", "accepted"),
    [
        ("Allow", {"AWS": LAUNCHER}, True),
        ("Allow", {"AWS": ["arn:aws:iam::123456789012:root", LAUNCHER]}, True),
        ("Allow", {"AWS": "*"}, True),
        ("Allow", "*", True),
        ("Allow", {"Service": "ec2.amazonaws.com"}, False),
        ("Deny", {"AWS": LAUNCHER}, False),
    ],
)
def test_key_policy_for_the_role(locked, effect, principal, accepted):
    """A key whose policy allows the role, or everyone under a condition, needs no grant."""
    whom = json.loads(json.dumps(principal).replace(LAUNCHER, f"arn:aws:iam::{locked.owner}:{LAUNCHER}"))
    statement = {"Effect": effect, "Principal": whom, "Action": "kms:Decrypt", "Resource": "*"}
    text = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    locked.call("kms", "put_key_policy", KeyId=locked.snapshot_key, PolicyName="default", Policy=text)
    result = deploy(locked, "plan", locked.new)
    if accepted:
        end(locked, result, DONE, planned=[f"chatd-{locked.new}"])
    else:
        end(locked, result, REFUSED)


def test_key_of_another_account(locked):
    """The grant is for the role of the account that launches, and not for that of the account with the key."""
    locked.snapshot_key = locked.snapshot_key.replace(locked.owner, "999999999999")
    result = deploy(locked, "plan", locked.new)
    end(locked, result, REFUSED)
    assert f"--grantee-principal arn:aws:iam::{locked.owner}:{LAUNCHER}" in result.stderr


UNSAFE = {
    "a rollout needs no more instances": (
        ("deploying/check.py", "each * (size + max(1, math.ceil(SURGE * size)))", "each * size"),
        test_quota_of_a_new_account,
    ),
    "all zones have MemoryDB": (
        ("deploying/check.py", "ids[name] in WITHOUT_MEMORYDB:", "False:"),
        test_zone_without_memorydb,
    ),
    "the first zones of the region are taken": (
        ("deploying/check.py", "sorted(found & {*available} or available)", "sorted(available)"),
        test_default_zones_are_those_of_default_subnets,
    ),
    "instances are where the load balancer is not": (
        ("deploying/check.py", "sorted(nodes - balancer)", "()"),
        lambda account: test_subnets_have_the_zones(account, "ab", "ac", ["no clients to the zone"]),
    ),
    "the store is where the load balancer is": (
        ("deploying/check.py", "{zone[one] for one in nodes}", "{*zone.values()}"),
        lambda account: test_subnets_have_the_zones(account, "abe", "ab", []),
    ),
    "any group can have a size": (("deploying/check.py", "if least > most:", "if False:"), test_group_needs_a_size),
    "another region is only skipped": (
        ("deploying/aws.py", "INVALID: Final = ELSEWHERE | {", "INVALID: Final = {"),
        lambda account: test_check_ends_without_answers(account, "OptInRequired"),
    ),
    "any certificate will do": (
        ("deploying/check.py", 'found["Status"] == "PENDING_VALIDATION"', "False"),
        test_certificate,
    ),
    "an expired certificate will do": (
        ("deploying/check.py", 'found["Status"] != "ISSUED"', "False"),
        test_certificate,
    ),
    "a type may be given twice": (
        ("deploying/check.py", "if target[name] and first != name:", "if False:"),
        test_types_differ,
    ),
    "subnets may be of any network": (
        ("deploying/check.py", 'if one["VpcId"] != vpc:', "if False:"),
        test_subnets_are_of_the_network,
    ),
    "the load balancer takes any subnets": (
        ("deploying/check.py", "and len(those) > 1:", "and False:"),
        test_load_balancer_takes_one_subnet_of_a_zone,
    ),
    "any snapshot will do": (
        ("deploying/check.py", 'one["Status"] != "available"', "False"),
        test_snapshot,
    ),
    "a deleted snapshot is a problem for ever": (
        ("deploying/check.py", "if not name or not target.creates_store:", "if not name:"),
        lambda account: test_snapshot_of_a_store_that_exists(with_stack(account)),
    ),
    "any end of a name is its domain": (
        ("deploying/check.py", 'f".{name}".endswith(f".{domain}")', "name.endswith(domain)"),
        lambda account: test_hosted_zone_of_the_name(account, "ample.com", "chat.example.com", belongs=False),
    ),
    "the first size is enough": (
        ("deploying/check.py", "for size in sorted(names)}", "for size in sorted(names)[:1]}"),
        test_quota_of_a_new_account,
    ),
    "the first type counts": (
        ("deploying/check.py", "each = max(one", "each = min(one"),
        test_quota_of_the_largest_type,
    ),
    "any architecture will do": (
        ("deploying/check.py", "if image not in names", "if False"),
        test_types_must_have_the_architecture_of_the_image,
    ),
    "a wrong type ends all checks": (
        ("deploying/check.py", "or not error.code:", "or True:"),
        test_unknown_type,
    ),
    "what nobody answered is a problem": (
        ("deploying/check.py", " and LACKING.match(error.code)", ""),
        test_unanswered_check_is_skipped,
    ),
}


UNSAFE_KEYS = {
    "keys are not checked": (
        ("deploying/ship.py", "        launchable(self.stack, image)\n", ""),
        test_plan_refuses_a_key_without_grant,
    ),
    "any statement of a policy counts": (
        ("deploying/check.py", 'one["Effect"] == "Allow" and ', ""),
        lambda account: test_key_policy_for_the_role(account, "Deny", {"AWS": LAUNCHER}, accepted=False),
    ),
    "the account of the key launches": (
        (
            "deploying/check.py",
            'f"--key-id {key} {remedy}"',
            'f"--key-id {key} {remedy}".replace(caller["Account"], key.split(":")[4])',
        ),
        test_key_of_another_account,
    ),
}


@pytest.mark.parametrize("safety", UNSAFE_KEYS)
def test_removed_check_of_keys_fails_its_test(chat, tmp_path, safety):
    (change, test) = UNSAFE_KEYS[safety]
    assert outcome(chat, tmp_path / "unsafe", change, lambda account: test(with_key(account))) == "fails"


@pytest.mark.parametrize("safety", UNSAFE)
def test_removed_check_fails_its_test(chat, tmp_path, safety):
    assert empty_outcome(chat, tmp_path / "unsafe", *UNSAFE[safety]) == "fails"


def with_key(account):
    account.snapshot_key = account.call("kms", "create_key")["KeyMetadata"]["Arn"]
    return account


def with_stack(account):
    account.stack.exists(ImageId=account.image(VERSION), **GIVEN)
    return account


def empty_outcome(chat, folder, change, test):
    """Return how a test of an account without a stack ends with changed scripts."""
    from support.deployments import checkout

    with DeploymentAccount(chat.url, checkout(folder, change)) as account:
        try:
            test(account)
        except (AssertionError, ValueError):
            return "fails"
    return "passes"


def test_surge_is_that_of_the_template():
    """The share of additional instances is that of the update policy."""
    policy = parsed(TEMPLATE.read_text())["Resources"]["Group"]["UpdatePolicy"]["AutoScalingInstanceRefresh"]
    assert policy["Preferences"]["MaxHealthyPercentage"] == 120
