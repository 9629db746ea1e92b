"""The double's change sets: what they report for each property follows from the schemas of the resources.

The facts here are those of AWS's documentation (the update behaviour of a property, and the examples of change sets in
the user guide), so that they hold the double and the schemas to something else than each other.
"""

import copy

import pytest
from support import change_sets
from support.change_sets import Rejected, changes, deployed, fixed_name, parsed, schema
from support.formation import TEMPLATE

IMAGE, NEXT = "ami-0123456789abcdef0", "ami-0123456789abcdef1"
NETWORK = {"VpcId": "vpc-0123456789abcdef0", "SubnetIds": "subnet-0123456789abcdef0,subnet-0123456789abcdef1"}


@pytest.fixture(scope="module")
def template():
    return parsed(TEMPLATE.read_text())


def changed(template, before, after):
    """Return what two sets of parameters report: for each resource, the action or whether it is replaced."""
    old, new = (deployed(template, {"ImageId": IMAGE, **given}) for given in (before, after))
    return {one["LogicalResourceId"]: one.get("Replacement", one["Action"]) for one in changes(old, new)}


ROLLOUT = {"LaunchTemplate": "False", "Group": "Conditional"}
REPORTED = {
    "an image": ({}, {"ImageId": NEXT}, ROLLOUT),
    "user data": ({}, {"Retain": "30d"}, ROLLOUT),
    "a size": ({}, {"MinSize": "3"}, {"Group": "False", "MissingNodesAlarm": "False"}),
    "the update policy": ({}, {"SoakSeconds": "60"}, {"Group": "False"}),
    "subnets": (
        {**NETWORK, "StoreParameter": "/store"},
        {"StoreParameter": "/store", **NETWORK, "SubnetIds": "subnet-0123456789abcdef2,subnet-0123456789abcdef3"},
        {"Balancer": "False", "Group": "Conditional"}
        | dict.fromkeys(("NoNodesAlarm", "UnhealthyNodesAlarm", "ErrorsAlarm"), "False"),
    ),
    "nodes of the store": ({}, {"StoreNodeType": "db.t4g.medium"}, {"Store": "False", "StoreUrl": "False"}),
    "the days of the log": ({}, {"LogDays": "7"}, {"LogGroup": "False"}),
    "nothing": ({}, {"LogDays": "30"}, {}),
}


@pytest.mark.parametrize("what", REPORTED)
def test_reported_replacements(template, what):
    """A parameter changes the documented resources, in the documented way."""
    before, after, reported = REPORTED[what]
    found = changed(template, before, after)
    assert {name: found[name] for name in reported} == reported
    assert found.keys() == reported.keys()


def test_details_name_the_cause(template):
    """An image changes the group only through the version of the launch template, which is not known yet."""
    old, new = (deployed(template, {"ImageId": image}) for image in (IMAGE, NEXT))
    launch, group = changes(old, new)
    assert {one["CausingEntity"] for one in launch["Details"] if "CausingEntity" in one} == {"ImageId"}
    assert group["Details"] == [
        {
            "Target": {"Attribute": "Properties", "Name": "LaunchTemplate", "RequiresRecreation": "Conditionally"},
            "Evaluation": "Dynamic",
            "ChangeSource": "ResourceAttribute",
            "CausingEntity": "LaunchTemplate.LatestVersionNumber",
        }
    ]
    assert group["Scope"] == ["Properties"]


def test_replacement_spreads_to_references(template):
    """What names a replaced resource changes too, and what is created with it is replaced."""
    found = changed(template, {}, {"VpcCidr": "10.0.0.0/16"})
    assert {found[name] for name in ("Vpc", "SubnetA", "TargetGroup", "NodeSecurityGroup")} == {"True"}
    assert {found[name] for name in ("NodeIngress", "Group")} == {"Conditional"}
    assert {found[name] for name in ("PlainListener", "StoreSubnets", "NoNodesAlarm")} == {"False"}


def test_condition_adds_and_removes(template):
    """A resource whose condition changes is added or removed, and the store is retained."""
    old, new = (deployed(template, {"ImageId": IMAGE, **given}) for given in ({}, {"StoreParameter": "/store"}))
    found = {one["LogicalResourceId"]: (one["Action"], one.get("PolicyAction")) for one in changes(old, new)}
    assert found["NodeToOtherStore"] == ("Add", None)
    assert (found["Store"], found["StoreUrl"]) == (("Remove", "Retain"), ("Remove", "Delete"))


def test_schemas_have_all_properties(template):
    """A misspelt property would look like one that never replaces anything."""
    for name, one in template["Resources"].items():
        assert one.get("Properties", {}).keys() <= schema(one["Type"])["properties"].keys(), name


@pytest.mark.parametrize(
    ("kind", "name", "recreated"),
    [
        ("AWS::AutoScaling::AutoScalingGroup", "LaunchTemplate", "Conditionally"),
        ("AWS::AutoScaling::AutoScalingGroup", "AutoScalingGroupName", "Always"),
        ("AWS::AutoScaling::AutoScalingGroup", "MaxSize", "Never"),
        ("AWS::EC2::LaunchTemplate", "LaunchTemplateData", "Never"),
        ("AWS::ElasticLoadBalancingV2::TargetGroup", "Port", "Always"),
        ("AWS::ElasticLoadBalancingV2::TargetGroup", "HealthCheckPath", "Never"),
        ("AWS::MemoryDB::Cluster", "SnapshotName", "Always"),
        ("AWS::MemoryDB::Cluster", "NodeType", "Never"),
    ],
)
def test_schemas_agree_with_the_documentation(kind, name, recreated):
    assert change_sets._recreation(schema(kind), name, "a", "b") == recreated


def test_schema_without_the_condition_is_detected(template, monkeypatch):
    """The control: with schemas that know no conditional replacement the double reports what it did before."""
    kind = template["Resources"]["Group"]["Type"]
    kinder = {key: value for key, value in schema(kind).items() if key != "conditionalCreateOnlyProperties"}
    monkeypatch.setattr(change_sets, "schema", lambda one: kinder if one == kind else schema(one))
    assert changed(template, {}, {"ImageId": NEXT}) == {"LaunchTemplate": "False", "Group": "False"}


def test_fixed_names(template):
    """Resources that the template names cannot be replaced under the same name."""
    named = {name: found for name, one in template["Resources"].items() if (found := fixed_name(one))}
    assert named["Group"] == "AutoScalingGroupName"
    assert (named["Store"], named["StoreSubnets"]) == ("ClusterName", "SubnetGroupName")
    assert "TargetGroup" not in named


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({}, "[ImageId] must have values"),
        ({"ImageId": IMAGE, "Imageid": IMAGE}, "[Imageid] do not exist"),
        ({"ImageId": "newest"}, "'ImageId' failed to satisfy constraint"),
        ({"ImageId": IMAGE, "MinSize": "0"}, "must be 1 to 100"),
        ({"ImageId": IMAGE, "MinSize": "few"}, "must be 1 to 100"),
        ({"ImageId": IMAGE, "LogDays": "8"}, "must be a number of days"),
        ({"ImageId": IMAGE, "Retain": "10 days"}, "or all"),
        ({"ImageId": IMAGE, "VpcId": NETWORK["VpcId"]}, "Give SubnetIds with VpcId"),
        ({"ImageId": IMAGE, "SnapshotName": "chat", "StoreParameter": "/store"}, "Give no SnapshotName"),
        ({"ImageId": IMAGE, "ZoneA": "us-east-1a", "ZoneB": "us-east-1a"}, "Give two different zones"),
        ({"ImageId": IMAGE, "ZoneA": "us-east-1a", "ZoneB": "us-east-1b", **NETWORK}, "Give no zones with VpcId"),
    ],
)
def test_wrong_parameters_are_rejected(template, given, reason):
    with pytest.raises(Rejected) as rejected:
        deployed(template, given)
    assert reason in str(rejected.value)


def test_tags_of_the_stack_change_its_resources(template):
    """A tag of the stack changes the resources that CloudFormation tags, in place."""
    old = deployed(template, {"ImageId": IMAGE})
    found = {
        one["LogicalResourceId"]: (one["Replacement"], one["Scope"])
        for one in changes(old, old._replace(tags=(("team", "chat"),)))
    }
    assert found["LogGroup"] == found["StoreSubnets"] == ("False", ["Tags"])
    assert "True" not in {replacement for replacement, _ in found.values()}
    assert "RoutesOfA" not in found


def test_property_inside_another_replaces():
    """A pointer of a schema into a property replaces only if the value there differs."""
    rules = {"createOnlyProperties": ["/properties/Endpoint/Port"]}
    assert change_sets._recreation(rules, "Endpoint", {"Port": 1}, {"Port": 2}) == "Always"
    assert change_sets._recreation(rules, "Endpoint", {"Port": 1}, {"Port": 1, "Name": "a"}) == "Never"


def test_change_of_the_template_itself(template):
    """A changed property without a parameter is a direct modification."""
    other = copy.deepcopy(template)
    other["Resources"]["TargetGroup"]["Properties"]["Port"] = 8086
    old, new = (deployed(one, {"ImageId": IMAGE}) for one in (template, other))
    (found,) = [one for one in changes(old, new) if one["LogicalResourceId"] == "TargetGroup"]
    assert (found["Replacement"], found["Details"][0]["ChangeSource"]) == ("True", "DirectModification")
