"""The stack as a double of AWS makes it: what is created, what is read back, and what another image changes.

The double has no MemoryDB, so the tests name a store, and it replaces no instances.  The behaviour of AWS itself, and
errors that only AWS reports, are not tested.
"""

import base64
import itertools
import re

import pytest
from support import imds, stack_rules
from support.stack_role import granted, made, statement
from support.stack_rules import DELAY, IDLE
from support.stacks import (
    ACCOUNT,
    REGION,
    UNKNOWN,
    MinistackAccount,
    Stack,
    attribute,
    group,
    launch,
    mutant,
    properties,
    rehearsed,
)
from support.stacks import template as read

IMAGE, NEXT = "ami-0123456789abcdef0", "ami-0123456789abcdef1"


@pytest.fixture(scope="module")
def template():
    return read()


@pytest.fixture(scope="module")
def account():
    with MinistackAccount() as account:
        yield account


numbers = itertools.count()
GIVEN = {"ImageId": IMAGE, "StoreParameter": "/chatd/store"}
SECURE = {
    "CertificateArn": f"arn:aws:acm:{REGION}:{ACCOUNT}:certificate/01234567-89ab-cdef-0123-456789abcdef",
    "DomainName": "chat.example.com",
    "VpcId": "vpc-0123456789abcdef0",
    "SubnetIds": "subnet-0123456789abcdef0,subnet-0123456789abcdef1",
    "NodeSubnetIds": "subnet-0123456789abcdef2,subnet-0123456789abcdef3",
    "StoreKeyArn": f"arn:aws:kms:{REGION}:{ACCOUNT}:key/01234567-89ab-cdef-0123-456789abcdef",
    "AlarmTopicArn": f"arn:aws:sns:{REGION}:{ACCOUNT}:ops",
    "Origins": "https://chat.example.com https://*.example.com",
}


@pytest.mark.parametrize(
    ("given", "unknown"),
    [
        (GIVEN, UNKNOWN),
        ({"ImageId": IMAGE}, UNKNOWN | {"AWS::MemoryDB::Cluster", "AWS::MemoryDB::SubnetGroup"}),
    ],
)
def test_double_rejects_omitted_resources(template, account, given, unknown):
    with pytest.raises(Exception, match="Unrecognized resource types") as refused:
        Stack(account, "whole").change(template, "CREATE", **given)
    assert {*re.findall(r"AWS::\w+::\w+", str(refused.value))} == unknown


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"CertificateArn": SECURE["CertificateArn"]}, "Give DomainName with CertificateArn"),
        ({"HostedZoneId": "Z0123456789ABCDEFGHIJ"}, "Give DomainName with HostedZoneId"),
        ({"VpcId": SECURE["VpcId"]}, "Give SubnetIds with VpcId"),
        ({"SubnetIds": SECURE["SubnetIds"]}, "Give VpcId with SubnetIds"),
        ({"NodeSubnetIds": SECURE["NodeSubnetIds"]}, "Give VpcId with NodeSubnetIds"),
        ({"VpcId": SECURE["VpcId"], "SubnetIds": "subnet-0123456789abcdef0"}, "must be the ids of two subnets or more"),
        ({"Retain": "10 days"}, "must be a number of messages such as 10000, of days such as 30d, or all"),
        ({"MinSize": "0"}, "must be 1 to 100"),
    ],
)
def test_conflicting_parameters_are_rejected(template, account, given, said):
    with pytest.raises(Exception, match=said):
        Stack(account, f"refused-{next(numbers)}").change(rehearsed(template), "CREATE", **GIVEN | given)


@pytest.mark.parametrize(
    ("name", "given", "holds"),
    [
        ("plain", {}, {"Plain", "OwnVpc", "Scales"}),
        ("secure", SECURE, {"Tls", "Scales"}),
    ],
)
def test_created_stack_matches_the_template(template, account, name, given, holds):
    body = rehearsed(template)
    stack = Stack(account, name)
    stack.change(body, "CREATE", **GIVEN, **given)
    wanted = {name: one["Type"] for name, one in body["Resources"].items() if one.get("Condition") in {None, *holds}}
    assert {name: kind for name, (kind, _) in stack.resources().items()} == wanted
    assert differences(stack, template) == []
    url = stack.outputs()["WebSocketURL"]
    assert re.fullmatch(r"wss://chat\.example\.com/" if given else r"ws://[\w.-]+\.elb\.amazonaws\.com:8085/", url)
    assert stack.outputs()["Encryption"].startswith("TLS" if given else "none")


@pytest.mark.parametrize(
    ("mutate", "found"),
    [
        (lambda t: group(t)["LifecycleHookSpecificationList"].pop(0), ["hooks"]),
        (lambda t: group(t).pop("LifecycleHookSpecificationList"), ["hooks"]),
        (lambda t: attribute(t, "TargetGroup", DELAY, Value="60"), ["target group"]),
        (lambda t: attribute(t, "Balancer", IDLE, Value="60"), ["load balancer"]),
        (lambda t: group(t).update(HealthCheckType="ELB"), ["group"]),
        (lambda t: launch(t)["MetadataOptions"].update(HttpTokens="optional"), ["metadata"]),
        (lambda t: properties(t, "StoreAlarm").update(AlarmName="store"), ["alarms"]),
        (lambda t: statement(t, "Health").update(Action="ec2:DescribeInstances"), ["role"]),
        (
            lambda t: launch(t)["UserData"]["Fn::Base64"]["Fn::Join"][1].append("CHATD_STORE=redis://h/0\n"),
            ["user data"],
        ),
    ],
)
def test_readback_detects_another_template(template, account, mutate, found):
    stack = Stack(account, f"other-{next(numbers)}")
    stack.change(rehearsed(mutant(template, mutate)), "CREATE", **GIVEN)
    assert differences(stack, template) == found


def test_new_image_changes_only_template_and_group(template, account):
    body = rehearsed(template)
    stack = Stack(account, "rollout")
    stack.change(body, "CREATE", **GIVEN)
    before = stack.resources()
    assert stack.change(body, **GIVEN | {"ImageId": NEXT}) == {"LaunchTemplate": "Modify", "Group": "Modify"}
    assert stack.resources() == before
    versions = stack.client("ec2").describe_launch_template_versions(LaunchTemplateId=before["LaunchTemplate"][1])
    images = {one["VersionNumber"]: one["LaunchTemplateData"]["ImageId"] for one in versions["LaunchTemplateVersions"]}
    assert images == {1: IMAGE, 2: NEXT}
    assert differences(stack, template) == []
    more = stack.change(body, **GIVEN | {"ImageId": NEXT, "MinSize": "3"})
    assert more == {"Group": "Modify", "MissingNodesAlarm": "Modify"}


def test_fixed_template_version_is_detected(template, account):
    body = rehearsed(mutant(template, lambda t: group(t)["LaunchTemplate"]["Fn::If"][2].update(Version="1")))
    stack = Stack(account, "stuck")
    stack.change(body, "CREATE", **GIVEN)
    assert stack.change(body, **GIVEN | {"ImageId": NEXT}) == {"LaunchTemplate": "Modify", "Group": "Modify"}
    assert differences(stack, template) == ["group"]


def differences(stack, template):
    """Return where the account differs from the template."""
    ids = {name: identity for name, (_, identity) in stack.resources().items()}
    scaling, balancing = stack.client("autoscaling"), stack.client("elbv2")
    (found,) = scaling.describe_auto_scaling_groups(AutoScalingGroupNames=[stack.name])["AutoScalingGroups"]
    hooks = scaling.describe_lifecycle_hooks(AutoScalingGroupName=stack.name)["LifecycleHooks"]
    listeners = balancing.describe_listeners(LoadBalancerArn=ids["Balancer"])["Listeners"]
    targets = balancing.describe_target_group_attributes(TargetGroupArn=ids["TargetGroup"])["Attributes"]
    balancer = balancing.describe_load_balancer_attributes(LoadBalancerArn=ids["Balancer"])["Attributes"]
    versions = stack.client("ec2").describe_launch_template_versions(LaunchTemplateId=ids["LaunchTemplate"])
    newest = max(versions["LaunchTemplateVersions"], key=lambda one: one["VersionNumber"])
    data, metadata = newest["LaunchTemplateData"], newest["LaunchTemplateData"]["MetadataOptions"]
    named = stack.outputs()["RolloutAlarms"].split(",")
    alarms = stack.client("cloudwatch").describe_alarms(AlarmNames=named)["MetricAlarms"]
    policy = stack.client("iam").get_role_policy(RoleName=ids["Role"], PolicyName="chatd")["PolicyDocument"]
    same = {
        "group": (found["HealthCheckType"], found["LaunchTemplate"]["Version"])
        == ("EC2", str(newest["VersionNumber"])),
        "hooks": {
            one["LifecycleHookName"]: (one["LifecycleTransition"], one["HeartbeatTimeout"], one["DefaultResult"])
            for one in hooks
        }
        == stack_rules.HOOKS,
        "target group": {one["Key"]: one["Value"] for one in targets} == stack_rules.TARGETS,
        "load balancer": {one["Key"]: one["Value"] for one in balancer} == stack_rules.BALANCER,
        "listeners": {one["Port"] for one in listeners} == ({443, 80} if "TlsListener" in ids else {8085}),
        "metadata": (metadata["HttpTokens"], metadata["HttpPutResponseHopLimit"]) == ("required", 1),
        "disks": [one["Ebs"]["Encrypted"] for one in data["BlockDeviceMappings"]] == [True],
        "security group": data["NetworkInterfaces"][0]["Groups"] == [ids["NodeSecurityGroup"]],
        "alarms": {one["AlarmName"] for one in alarms} == {f"{stack.name}-{name}" for name in stack_rules.ALARMS},
        "role": granted(policy["Statement"]) == allowed(stack.name, own_key="TlsListener" in ids),
        "user data": understood(base64.b64decode(data["UserData"]).decode(), stack.name, ids["TargetGroup"]),
    }
    return [what for what, holds in same.items() if not holds]


def allowed(name, *, own_key):
    """Return the permissions that the role of a stack should have."""
    values = {"AWS::Partition": "aws", "AWS::Region": REGION, "AWS::AccountId": ACCOUNT, "AWS::StackName": name}
    values |= {"AWS::URLSuffix": "amazonaws.com", "Name": GIVEN["StoreParameter"], "StoreKeyArn": SECURE["StoreKeyArn"]}
    found = made(values)
    if not own_key:
        del found["kms:Decrypt"]
    return found


def understood(text, name, target_group):
    """Return whether chatd-boot accepts user data and finds its settings."""
    boot = imds.load("chatd-boot")
    try:
        settings = boot.parse(text)
    except boot.BootError:
        return False
    needed = {boot.PARAMETER: GIVEN["StoreParameter"], boot.GROUP: name, boot.TARGET_GROUP: target_group}
    return needed.items() <= settings.items()
