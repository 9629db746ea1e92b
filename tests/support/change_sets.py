"""What CloudFormation answers for a change set, from two templates, their parameters and the schemas of the resources.

The schemas are those of the CloudFormation registry, as cfn-lint carries them.  They decide for every property whether
its change replaces the resource: `createOnlyProperties` always, and `conditionalCreateOnlyProperties` perhaps.

What cannot be known before the execution is `Dynamic`, as at AWS: `Fn::GetAtt` of a resource that is modified may have
another value, and so may `Ref` of a resource that is replaced.
"""

import functools
import json
import pathlib
import re
import tempfile
from typing import Any, NamedTuple

from support.servers import missing

NOTHING = object()
"""The value of `AWS::NoValue`."""
PLACE = re.compile(r"\$\{([^!}][^}]*)\}")
IMPACT = ["Never", "Conditionally", "Always"]
FALLBACK = "us-east-1"


class Rejected(Exception):
    """The reason for which CloudFormation rejects a template or its parameters."""


@functools.cache
def schema(kind):
    """Return the schema of a type of resources."""
    try:
        from cfnlint.schema import PROVIDER_SCHEMA_MANAGER
    except ImportError as error:
        missing(f"cfn-lint is not installed: {error}")
    return PROVIDER_SCHEMA_MANAGER.get_resource_schema(FALLBACK, kind).schema


@functools.cache
def parsed(text):
    """Return the text of a template as JSON has it."""
    try:
        from cfnlint.decode import cfn_yaml
    except ImportError as error:
        missing(f"cfn-lint is not installed: {error}")
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(text)
        file.flush()
        return json.loads(json.dumps(cfn_yaml.load(file.name)))


def read(path):
    """Return a template from a file."""
    return parsed(pathlib.Path(path).read_text())


def fixed_name(resource):
    """Return the property with the name that a template gives a resource, or None if AWS names it."""
    rules = schema(resource["Type"])
    for pointer in rules["primaryIdentifier"]:
        name = pointer.rpartition("/")[2]
        if (
            len(rules["primaryIdentifier"]) == 1
            and name in resource.get("Properties", {})
            and pointer in rules.get("createOnlyProperties", [])
        ):
            return name
    return None


class Deployed(NamedTuple):
    """A template with its parameters, and the tags of the stack."""

    template: dict[str, Any]
    parameters: dict[str, str]
    name: str = "chatd"
    tags: tuple[tuple[str, str], ...] = ()

    # Values

    def holds(self, condition):
        """Return whether a condition of the template, or an expression of one, is true."""
        if isinstance(condition, str):
            return self.holds(self.template["Conditions"][condition])
        ((function, given),) = condition.items()
        if function == "Condition":
            return self.holds(given)
        if function == "Fn::Not":
            return not self.holds(given[0])
        if function in ("Fn::And", "Fn::Or"):
            return (all if function == "Fn::And" else any)([self.holds(one) for one in given])
        assert function == "Fn::Equals", function
        return str(self.value(given[0])) == str(self.value(given[1]))

    def value(self, raw):
        """Return a value; what is known only to AWS stays the name of a function."""
        if isinstance(raw, list):
            return [one for one in map(self.value, raw) if one is not NOTHING]
        if not isinstance(raw, dict):
            return raw
        if len(raw) == 1:
            ((function, given),) = raw.items()
            if function == "Ref":
                return self._named(given)
            if function.startswith("Fn::"):
                return self._function(function, given)
        found = {key: self.value(one) for key, one in raw.items()}
        return {key: one for key, one in found.items() if one is not NOTHING}

    def _named(self, name):
        if name == "AWS::NoValue":
            return NOTHING
        if name == "AWS::StackName":
            return self.name
        return self.parameters.get(name, {"Ref": name})

    def _function(self, function, given):
        if function == "Fn::If":
            return self.value(given[1] if self.holds(given[0]) else given[2])
        if function == "Fn::Sub":
            text, own = given if isinstance(given, list) else (given, {})
            values = {name: self.value(own.get(name, {"Ref": name})) for name in PLACE.findall(text)}
            return PLACE.sub(
                lambda match: value if isinstance(value := values[match[1]], str) else json.dumps(value), text
            )
        inner = self.value(given)
        if function == "Fn::Split" and isinstance(inner[1], str):
            return inner[1].split(inner[0])
        if function == "Fn::Join" and all(isinstance(one, str) for one in inner[1]):
            return inner[0].join(inner[1])
        return {function: inner}

    def names(self, raw):
        """Yield what a value names, on the branches that apply: parameters, resources, and `RESOURCE.ATTRIBUTE`."""
        if isinstance(raw, list):
            for one in raw:
                yield from self.names(one)
        if not isinstance(raw, dict):
            return
        for key, given in raw.items():
            if key == "Ref":
                yield given
            elif key == "Fn::GetAtt":
                yield ".".join(given) if isinstance(given, list) else given
            elif key == "Fn::If":
                yield from self.names(given[1] if self.holds(given[0]) else given[2])
            elif key == "Fn::Sub":
                text, own = given if isinstance(given, list) else (given, {})
                yield from (name for name in PLACE.findall(text) if name not in own)
                yield from self.names([*own.values()])
            else:
                yield from self.names(given)

    @property
    def resources(self):
        """The resources whose condition holds."""
        return {
            name: one
            for name, one in self.template["Resources"].items()
            if "Condition" not in one or self.holds(one["Condition"])
        }


def deployed(template, given, name="chatd", tags=()):
    """Return a template with parameters; raises Rejected as CloudFormation rejects them."""
    declared = template.get("Parameters", {})
    unknown = sorted(given.keys() - declared.keys())
    if unknown:
        raise Rejected(f"Parameters: [{', '.join(unknown)}] do not exist in the template")
    values = {key: str(given.get(key, one.get("Default", NOTHING))) for key, one in declared.items()}
    absent = [key for key, one in declared.items() if key not in given and "Default" not in one]
    if absent:
        raise Rejected(f"Parameters: [{', '.join(absent)}] must have values")
    for key, one in declared.items():
        if not _allowed(one, values[key]):
            raise Rejected(
                f"Parameter '{key}' failed to satisfy constraint: {one.get('ConstraintDescription', values[key])}"
            )
    made = Deployed(template, values, name, tuple(tags))
    for rule in template.get("Rules", {}).values():
        if "RuleCondition" not in rule or made.holds(rule["RuleCondition"]):
            for one in rule["Assertions"]:
                if not made.holds(one["Assert"]):
                    raise Rejected(f"Template validation error: {one['AssertDescription']}")
    return made


def _allowed(declared, value):
    if declared["Type"] == "AWS::EC2::Image::Id":
        return bool(re.fullmatch(r"ami-[0-9a-f]{8}([0-9a-f]{9})?", value))
    if declared["Type"] == "Number":
        number = float(value) if re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", value) else None
        if number is None or not declared.get("MinValue", number) <= number <= declared.get("MaxValue", number):
            return False
    if "AllowedValues" in declared and value not in map(str, declared["AllowedValues"]):
        return False
    return "AllowedPattern" not in declared or bool(re.fullmatch(declared["AllowedPattern"], value))


# Changes


def changes(old, new):
    """Return the `ResourceChange` of each resource that differs; without `old` each is new."""
    before, after = (old.resources if old else {}), new.resources
    found = {}
    for name, one in after.items():
        if name not in before:
            found[name] = {"Action": "Add", "LogicalResourceId": name, "ResourceType": one["Type"]}
            found[name] |= {"Scope": [], "Details": []}
    while True:  # until no change causes another
        more = {}
        for name in before.keys() & after.keys():
            details = [*_details(old, new, name, found)]
            if details:
                more[name] = _modified(name, after[name], details)
        if all(found.get(name) == one for name, one in more.items()):
            break
        found |= more
    for name, one in before.items():
        if name not in after:
            policy = "Retain" if str(one.get("DeletionPolicy", "")).startswith("Retain") else "Delete"
            found[name] = {"Action": "Remove", "LogicalResourceId": name, "ResourceType": one["Type"]}
            found[name] |= {"PhysicalResourceId": f"{name}-1", "PolicyAction": policy, "Scope": [], "Details": []}
    order = [*new.template["Resources"], *before]
    return [found[name] for name in dict.fromkeys(order) if name in found]


def _modified(name, resource, details):
    impact = "False"
    for one in details:
        recreated = one["Target"].get("RequiresRecreation", "Never")
        if recreated == "Always" and one["Evaluation"] == "Static":
            impact = "True"
        elif recreated != "Never" and impact == "False":
            impact = "Conditional"
    change = {
        "Action": "Modify",
        "LogicalResourceId": name,
        "PhysicalResourceId": f"{name}-1",
        "ResourceType": resource["Type"],
        "Replacement": impact,
        "Scope": sorted({one["Target"]["Attribute"] for one in details}),
        "Details": details,
    }
    if impact != "False":
        retained = str(resource.get("UpdateReplacePolicy", "")).startswith("Retain")
        change["PolicyAction"] = "ReplaceAndRetain" if retained else "ReplaceAndDelete"
    return change


def _details(old, new, name, found):
    """Yield the details of the changes of a resource, given the changes of others that are known by now."""
    was, becomes = old.resources[name], new.resources[name]
    rules = schema(becomes["Type"])
    tagging = rules.get("tagging", {})
    tags = tagging.get("tagProperty", "/properties/Tags").rpartition("/")[2] if tagging.get("taggable", True) else None
    former, present = was.get("Properties", {}), becomes.get("Properties", {})
    for key in dict.fromkeys([*former, *present]):
        values = old.value(former.get(key)), new.value(present.get(key))
        target = {"Attribute": "Properties", "Name": key, "RequiresRecreation": _recreation(rules, key, *values)}
        if key == tags:
            target = {"Attribute": "Tags"}
        yield from _causes(old, new, target, present.get(key), found, differs=values[0] != values[1])
    if old.tags != new.tags and tagging.get("cloudFormationSystemTags"):
        yield {"Target": {"Attribute": "Tags"}, "Evaluation": "Static", "ChangeSource": "DirectModification"}
    for attribute in ("CreationPolicy", "UpdatePolicy", "DeletionPolicy", "UpdateReplacePolicy", "Metadata"):
        differ = old.value(was.get(attribute)) != new.value(becomes.get(attribute))
        yield from _causes(old, new, {"Attribute": attribute}, becomes.get(attribute), found, differs=differ)


def _recreation(rules, key, was, becomes):
    """Return whether the change of a property replaces the resource."""

    def concerns(pointer):
        steps = pointer.split("/")[2:]
        return steps[0] == key and _inside(was, steps[1:]) != _inside(becomes, steps[1:])

    same = f"/properties/{key}"
    for kind, word in (("createOnlyProperties", "Always"), ("conditionalCreateOnlyProperties", "Conditionally")):
        if any(pointer == same or concerns(pointer) for pointer in rules.get(kind, [])):
            return word
    return "Never"


def _inside(value, steps):
    """Return the part of a value that a pointer of a schema names."""
    for place, step in enumerate(steps):
        if step == "*":
            return [_inside(one, steps[place + 1 :]) for one in value] if isinstance(value, list) else value
        value = value.get(step) if isinstance(value, dict) else None
    return value


def _causes(old, new, target, raw, found, *, differs):
    """Yield the details of the change of one property, one for each cause."""
    names = [*dict.fromkeys(new.names(raw))]
    if differs:
        causes = [one for one in names if one in new.parameters and old.parameters.get(one) != new.parameters[one]]
        for one in causes:
            yield {
                "Target": target,
                "Evaluation": "Static",
                "ChangeSource": "ParameterReference",
                "CausingEntity": one,
            }
        evaluation = "Dynamic" if causes else "Static"
        yield {"Target": target, "Evaluation": evaluation, "ChangeSource": "DirectModification"}
    for one in names:
        resource = one.partition(".")[0]
        change = found.get(resource, {})
        if change.get("Action") != "Modify":
            continue
        if "." in one:
            evaluation, source = "Dynamic", "ResourceAttribute"
        elif change["Replacement"] != "False":
            evaluation, source = "Static" if change["Replacement"] == "True" else "Dynamic", "ResourceReference"
        else:
            continue
        yield {"Target": target, "Evaluation": evaluation, "ChangeSource": source, "CausingEntity": one}
