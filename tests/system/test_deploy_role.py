"""scripts/deploying/role.yaml permits what CloudFormation calls for stack.yaml, as the schemas say, and little else."""

import copy
import fnmatch
import re

import pytest
from support.change_sets import parsed, schema
from support.deployments import DEPLOY
from support.formation import TEMPLATE
from support.stack_role import listed
from support.stacks import cfn_lint, written

ROLE = TEMPLATE.with_name("role.yaml")
UNUSED = {
    "amplify:*": "a web ACL filters the load balancer, and no application of Amplify",
    "apigateway:*": "a web ACL filters no API",
    "apprunner:*": "a web ACL filters no service of App Runner",
    "appsync:*": "a web ACL filters no GraphQL",
    "bedrock-agentcore:*": "a web ACL filters no agent",
    "ec2:*VerifiedAccess*": "a web ACL filters no Verified Access",
    "wafv2:*PermissionPolicy": "the ACL belongs to the account",
    "cognito-idp:*": "the load balancer logs in nobody",
    "autoscaling:*NotificationConfiguration": "the group notifies nobody",
    "autoscaling:*LoadBalancers": "it has no Classic Load Balancer",
    "ec2:*Vpn*": "the network has no VPN",
    "ec2:*CidrBlock": "it has one range of addresses",
    "ec2:*Ipam*": "the range is a parameter",
    "ec2:*VpcEncryptionControl*": "the network has no encryption control",
    "ec2:Get[*]": "the launch template names no other source of its data",
    "ec2:ModifyVpcTenancy": "the tenancy stays",
    "elasticloadbalancing:*CapacityReservation": "no capacity is reserved",
    "elasticloadbalancing:*IpPools": "AWS chooses the addresses",
    "elasticloadbalancing:SetIpAddressType": "the type of addresses stays",
    "firehose:*": "no log goes to Firehose",
    "iam:*tachRolePolicy": "the role has only its own policy",
    "iam:DeleteRolePermissionsBoundary": "a boundary stays",
    "kms:*": "the store and the logs are encrypted with keys of AWS",
    "logs:*BearerTokenAuthentication": "no log is sent with a token",
    "logs:*DataProtectionPolicy": "logs have no such policy",
    "logs:*DeletionProtection": "logs have no such protection",
    "logs:*IndexPolic*": "logs have no index",
    "logs:*KmsKey": "logs are encrypted with a key of AWS",
    "logs:*ResourcePolic*": "logs have no such policy",
    "logs:CreateLogDelivery": "AWS delivers no logs here",
    "managed-fleets:*": "the instances are not in a managed fleet",
    "s3:REST.PUT.OBJECT": "the log group sends nothing to S3",
    "ssm:Get[*]": "no image is named by a parameter",
    "vpc-lattice:*": "the targets are those of a load balancer",
}
"""What handlers may call only for properties that the template does not have, with the reason."""
MORE = {
    "autoscaling:CancelInstanceRefresh": "an update that is cancelled cancels its refresh",
    "autoscaling:RollbackInstanceRefresh": "a refresh may be rolled back",
}
"""What no handler of the template's resources calls, with the reason."""


@pytest.fixture(scope="module")
def template():
    return parsed(TEMPLATE.read_text())


@pytest.fixture(scope="module")
def role():
    return parsed(ROLE.read_text())


def policy(role):
    (one,) = role["Resources"]["Role"]["Properties"]["Policies"]
    return one["PolicyDocument"]["Statement"]


def needed(template):
    """Return what the handlers of the resources call, without what they call only for other properties."""
    handlers = [schema(one["Type"])["handlers"] for one in template["Resources"].values()]
    steps = [one.get(step, {}) for one in handlers for step in ("create", "read", "update", "delete")]
    found = {action for step in steps for action in step.get("permissions", [])}
    return {one for one in found if not any(fnmatch.fnmatchcase(one, pattern) for pattern in UNUSED)}


def faults(role, template):
    """Return the actions that the role lacks, and those that it has without need."""
    actions = {action for one in policy(role) for action in listed(one["Action"])}
    wanted = needed(template)
    lacking = {one for one in wanted if not any(fnmatch.fnmatchcase(one, action) for action in actions)}
    spare = {action for action in actions if not any(fnmatch.fnmatchcase(one, action) for one in wanted | MORE.keys())}
    return sorted(lacking), sorted(spare)


def test_role_permits_what_the_handlers_call(role, template):
    assert faults(role, template) == ([], [])


def test_each_missing_permission_is_found(role, template):
    """The control: without any of its actions the role lacks that action, but for those of MORE."""
    for number, one in enumerate(policy(role)):
        for action in listed(one["Action"]):
            less = copy.deepcopy(role)
            policy(less)[number]["Action"] = [other for other in listed(one["Action"]) if other != action]
            lacking, spare = faults(less, template)
            assert spare == []
            assert lacking or action in MORE, action


def test_unneeded_permission_is_found(role, template):
    more = copy.deepcopy(role)
    policy(more)[0]["Action"].append("s3:GetObject")
    assert faults(more, template) == ([], ["s3:GetObject"])


def test_new_resource_needs_permissions(role, template):
    """A resource that the template gets later fails the test until the role may make it."""
    more = copy.deepcopy(template)
    more["Resources"]["Topic"] = {"Type": "AWS::SNS::Topic"}
    assert "sns:CreateTopic" in faults(role, more)[0]


def test_no_reason_is_obsolete(template):
    handlers = [schema(one["Type"])["handlers"] for one in template["Resources"].values()]
    called = {action for one in handlers for step in one.values() for action in step.get("permissions", [])}
    assert [one for one in UNUSED if not any(fnmatch.fnmatchcase(action, one) for action in called)] == []


def test_changes_are_narrowed(role):
    """What changes something is limited to the name of the stack, or else to the region."""
    reads = re.compile(r"[a-z0-9]+:(Describe|Get|List)\w*\*?")
    for one in policy(role):
        everywhere = [resource for resource in listed(one["Resource"]) if resource == "*"]
        if one["Sid"] == "Region":
            assert one["Condition"] == {"StringEquals": {"aws:RequestedRegion": {"Ref": "AWS::Region"}}}
        elif everywhere:
            assert [action for action in listed(one["Action"]) if not reads.fullmatch(action)] == []


def test_role_cannot_change_itself(role):
    """Its name is none of the names that it may change, whatever the stack is called."""
    name = role["Resources"]["Role"]["Properties"]["RoleName"]["Fn::Sub"]
    stacks = re.compile(role["Parameters"]["Stack"]["AllowedPattern"])
    assert name == "chatd.${Stack}.${AWS::Region}"
    assert not stacks.fullmatch(name.partition(".")[0] + ".x")


def test_boundary_is_required_where_given(role):
    """With a boundary the role makes no role without it, and never removes it."""
    (create,) = [one for one in policy(role) if "iam:CreateRole" in listed(one["Action"])]
    bounded = {"StringEquals": {"iam:PermissionsBoundary": {"Ref": "PermissionsBoundaryArn"}}}
    assert create["Condition"] == {"Fn::If": ["Bounded", bounded, {"Ref": "AWS::NoValue"}]}
    assert {"iam:PutRolePolicy", "iam:PutRolePermissionsBoundary"} <= {*listed(create["Action"])}


def test_cloudformation_may_assume_the_role(role):
    """A condition on a key that CloudFormation does not send would deny everything."""
    trust = role["Resources"]["Role"]["Properties"]["AssumeRolePolicyDocument"]["Statement"]
    principal = {"Service": "cloudformation.amazonaws.com"}
    assert trust == [{"Effect": "Allow", "Principal": principal, "Action": "sts:AssumeRole"}]


def test_cfn_lint_accepts_the_role(tmp_path, role):
    written(tmp_path, {"role": ROLE.read_text()})
    assert cfn_lint(tmp_path) == {"role": set()}


def test_names_of_stacks_have_one_rule(role):
    """The role, the module for Terraform and scripts/deploy take the same names of stacks."""
    rule = role["Parameters"]["Stack"]
    pattern, longest = rule["AllowedPattern"], rule["MaxLength"]
    module = (ROLE.parent / "terraform" / "variables.tf").read_text()
    assert f'regex("^{pattern}$", var.stack_name)) && length(var.stack_name) <= {longest}' in module
    assert f'len(text) > {longest} or not re.fullmatch(r"{pattern}", text)' in DEPLOY.read_text()
