"""The permissions of an instance: the allow list, and the check of a policy against it."""

import json
import re

from support.stacks import of_type, plain, properties

_ARN = "arn:${AWS::Partition}"
_HERE = "${AWS::Region}:${AWS::AccountId}"
_FROM_HERE = {"ArnLike": {"ec2:SourceInstanceARN": f"{_ARN}:ec2:{_HERE}:instance/*"}}
_GROUP = f"{_ARN}:autoscaling:{_HERE}:autoScalingGroup:*:autoScalingGroupName/${{AWS::StackName}}"
_LOGS = f"{_ARN}:logs:{_HERE}:log-group:/chatd/${{AWS::StackName}}:*"
ALLOWED = {
    "autoscaling:CompleteLifecycleAction": (_GROUP, None),
    "autoscaling:RecordLifecycleActionHeartbeat": (_GROUP, None),
    "elasticloadbalancing:DescribeTargetHealth": ("*", None),
    "kms:Decrypt": ("StoreKeyArn", {"StringEquals": {"kms:ViaService": "ssm.${AWS::Region}.${AWS::URLSuffix}"}}),
    "logs:CreateLogStream": (_LOGS, None),
    "logs:PutLogEvents": (_LOGS, None),
    "ssm:GetParameter": (f"{_ARN}:ssm:{_HERE}:parameter${{Name}}", None),
    "ssm:UpdateInstanceInformation": ("*", _FROM_HERE),
    "ssmmessages:CreateControlChannel": ("*", _FROM_HERE),
    "ssmmessages:CreateDataChannel": ("*", _FROM_HERE),
    "ssmmessages:OpenControlChannel": ("*", _FROM_HERE),
    "ssmmessages:OpenDataChannel": ("*", _FROM_HERE),
}
"""All that an instance may do: by action, the resource and the condition."""


def listed(value):
    return value if isinstance(value, list) else [value]


def statements(template):
    """Yield the statements of the role's policy, those under a condition of the template too."""
    for policy in properties(template, "Role")["Policies"]:
        for one in policy["PolicyDocument"]["Statement"]:
            yield one["Fn::If"][1] if "Fn::If" in one else one


def statement(template, sid):
    """Return the statement of this name."""
    return next(one for one in statements(template) if one.get("Sid") == sid)


def granted(statements):
    """Return the grants of statements in the form of ALLOWED, duplicates included."""
    found = {}
    for one in statements:
        for action in listed(one["Action"]):
            for resource in listed(one["Resource"]):
                found.setdefault(action, []).append((plain(resource), plain(one.get("Condition"))))
    return found


def made(values):
    """Return ALLOWED for a created stack, with values for the references of its template."""
    text = json.dumps(ALLOWED)
    for name, value in values.items():
        text = text.replace(f"${{{name}}}", value).replace(f'"{name}"', f'"{value}"')
    return {action: [tuple(one)] for action, one in json.loads(text).items()}


def role_faults(template):
    found = granted(statements(template))
    differ = [action for action in found.keys() | ALLOWED.keys() if found.get(action) != [ALLOWED.get(action)]]
    if differ:
        yield f"the role may do what is on the list, and no more: {', '.join(sorted(differ))}"
    for one in statements(template):
        for action in listed(one["Action"]):
            reads = re.fullmatch(r"[a-z0-9]+:(Describe|List)\w+", action)
            if "*" in action or ("*" in listed(one["Resource"]) and not reads and "Condition" not in one):
                yield f"what changes something is narrowed: {action}"
    for kind in ("AWS::IAM::Policy", "AWS::IAM::ManagedPolicy", "AWS::IAM::RolePolicy"):
        for name in of_type(template, kind):
            yield f"the role has one policy: {name}"
    bounded = {"Fn::If": ["Bounded", {"Ref": "PermissionsBoundaryArn"}, {"Ref": "AWS::NoValue"}]}
    for name, one in of_type(template, "AWS::IAM::Role").items():
        if one.get("PermissionsBoundary") != bounded:
            yield f"a role has the boundary that is given: {name}"
    if "ManagedPolicyArns" in properties(template, "Role"):
        yield "the role has one policy: ManagedPolicyArns"
