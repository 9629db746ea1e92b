"""The permissions of an instance: the allow list, and the needs of its programs."""

import ast

import pytest
from support import imds
from support.stack_role import granted, listed, statement, statements
from support.stack_rules import faults
from support.stacks import client, mutant, properties
from support.stacks import template as read


@pytest.fixture(scope="module")
def template():
    return read()


COMPLETE, HEARTBEAT = "autoscaling:CompleteLifecycleAction", "autoscaling:RecordLifecycleActionHeartbeat"


@pytest.mark.parametrize(
    ("sid", "change", "found"),
    [
        (
            "Lifecycle",
            {"Resource": "*"},
            [
                f"the role may do what is on the list, and no more: {COMPLETE}, {HEARTBEAT}",
                f"what changes something is narrowed: {COMPLETE}",
                f"what changes something is narrowed: {HEARTBEAT}",
            ],
        ),
        (
            "Store",
            {"Action": ["ssm:GetParameter", "ssm:Put*"]},
            [
                "the role may do what is on the list, and no more: ssm:Put*",
                "what changes something is narrowed: ssm:Put*",
            ],
        ),
        (
            "Health",
            {"Action": ["elasticloadbalancing:DescribeTargetHealth", "ec2:DescribeInstances"]},
            ["the role may do what is on the list, and no more: ec2:DescribeInstances"],
        ),
        (
            "Logs",
            {"Action": ["logs:PutLogEvents"]},
            ["the role may do what is on the list, and no more: logs:CreateLogStream"],
        ),
    ],
)
def test_role_additions_are_found(template, sid, change, found):
    assert faults(mutant(template, lambda t: statement(t, sid).update(change))) == found


def test_second_grant_is_found(template):
    def again(template):
        everywhere = {"Effect": "Allow", "Action": "ssm:GetParameter", "Resource": "arn:aws:ssm:*:*:parameter/*"}
        properties(template, "Role")["Policies"][0]["PolicyDocument"]["Statement"].insert(0, everywhere)

    assert faults(mutant(template, again)) == ["the role may do what is on the list, and no more: ssm:GetParameter"]


def test_role_without_boundary_is_found(template):
    """An organisation that requires a boundary permits no role without it."""
    less = mutant(template, lambda t: properties(t, "Role").pop("PermissionsBoundary"))
    assert faults(less) == ["a role has the boundary that is given: Role"]


PREFIXES = {"autoscaling": "autoscaling", "elbv2": "elasticloadbalancing", "ssm": "ssm"}


def called():
    """Return the actions that the programs of the image call, by what they name of botocore's clients."""
    trees = [ast.parse((imds.FILES / name).read_text()) for name in ("chatd-boot", "chatd-lifecycle")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    services = {
        node.args[0].value
        for node in nodes
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "service"
    }
    names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return {
        f"{PREFIXES[service]}:{action}"
        for service in services
        for method, action in client(service).meta.method_to_api_mapping.items()
        if method in names
    }


def test_role_permits_the_calls_of_the_image(template):
    needed = called()
    assert needed == {
        COMPLETE,
        HEARTBEAT,
        "elasticloadbalancing:DescribeTargetHealth",
        "ssm:GetParameter",
    }
    assert needed <= granted(statements(template)).keys()
    for action in needed:
        less = mutant(template, lambda t, action=action: withdraw(t, action))
        assert needed - granted(statements(less)).keys() == {action}


def withdraw(template, action):
    for one in statements(template):
        one["Action"] = [other for other in listed(one["Action"]) if other != action]
