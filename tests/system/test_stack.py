"""The template of the stack: its rules, the linters, and its timings with those of units and options.

Each check has negative controls, templates that break it.
"""

import copy
import re

import pytest
from support import imds
from support.stack_role import statement
from support.stack_rules import DELAY, IDLE, LARGEST, UNITS, faults, timing_faults, trigger
from support.stacks import TEMPLATE, attribute, cfn_lint, checkov, group, launch, mutant, properties, refresh, written
from support.stacks import template as read


@pytest.fixture(scope="module")
def template():
    return read()


# A mutation changes a template in place.


def policy(template):
    """Return what a group of more than one instance type has."""
    return group(template)["MixedInstancesPolicy"]["Fn::If"][1]


def ingress(template, name, port, **source):
    """Permit connections from anywhere."""
    rule = {"Description": "A hole", "IpProtocol": "tcp", "FromPort": port, "ToPort": port, "CidrIp": "0.0.0.0/0"}
    properties(template, name).setdefault("SecurityGroupIngress", []).append(rule | source)


NEW_ALARM = ["each alarm is in RolloutAlarm", "each alarm is in RolloutAlarms"]
MUTATIONS = [
    (
        lambda t: attribute(t, "TargetGroup", "stickiness.enabled", Key="stickyness.enabled"),
        [
            "TargetGroup has attributes that there are: stickyness.enabled",
            "TargetGroup has the attribute stickiness.enabled",
        ],
    ),
    (
        lambda t: attribute(t, "Balancer", IDLE, Value="4001"),
        [f"Balancer has attributes in their range: {IDLE}", f"Balancer has the attribute {IDLE}"],
    ),
    (
        lambda t: attribute(t, "Balancer", IDLE, Value="20"),
        [f"Balancer has the attribute {IDLE}", "ping < idle time-out"],
    ),
    (
        lambda t: attribute(t, "Balancer", "client_keep_alive.seconds", Value="3600"),
        ["Balancer has the attribute client_keep_alive.seconds"],
    ),
    (
        lambda t: attribute(t, "Balancer", "client_keep_alive.seconds", Value="604801"),
        [
            "Balancer has attributes in their range: client_keep_alive.seconds",
            "Balancer has the attribute client_keep_alive.seconds",
        ],
    ),
    (
        lambda t: attribute(t, "TargetGroup", DELAY, Value="301"),
        [f"TargetGroup has the attribute {DELAY}", "deregistration delay < heartbeat"],
    ),
    (
        lambda t: attribute(t, "TargetGroup", DELAY, Value="140"),
        [f"TargetGroup has the attribute {DELAY}", "the last stop time-out < deregistration delay"],
    ),
    (
        lambda t: launch(t)["UserData"]["Fn::Base64"]["Fn::Join"][1].append("CHATD_PING=130\n"),
        ["ping < idle time-out"],
    ),
    (
        lambda t: properties(t, "TargetGroup").update(HealthCheckPath="/healthz"),
        ["the load balancer asks /readyz on 8085 every 5 s"],
    ),
    (
        lambda t: properties(t, "TargetGroup").update(HealthCheckTimeoutSeconds=5),
        ["a health check ends before the next"],
    ),
    (
        lambda t: group(t).update(HealthCheckType="ELB"),
        ["the load balancer's health checks terminate no instance"],
    ),
    (lambda t: group(t)["LifecycleHookSpecificationList"].pop(0), ["the group has the hook chatd-launch"]),
    (lambda t: group(t)["LifecycleHookSpecificationList"].pop(1), ["the group has the hook chatd-terminate"]),
    (
        lambda t: group(t)["LifecycleHookSpecificationList"][0].update(DefaultResult="CONTINUE"),
        ["the group has the hook chatd-launch"],
    ),
    (
        lambda t: group(t)["LaunchTemplate"]["Fn::If"][2].update(Version="$Latest"),
        [
            "the group names a version of the launch template",
            "nothing changes by itself: $Latest",
            "a group of 1 types launches them",
        ],
    ),
    (
        lambda t: policy(t)["LaunchTemplate"]["Overrides"].pop(),
        ["a group of 3 types launches them"],
    ),
    (
        lambda t: policy(t)["InstancesDistribution"].update(OnDemandPercentageAboveBaseCapacity=50),
        ["instances are on demand: 2 types", "instances are on demand: 3 types"],
    ),
    (
        lambda t: launch(t).update(ImageId="{{resolve:ssm:/chatd/image}}"),
        ["the image is an id", "nothing changes by itself: resolve:ssm"],
    ),
    (lambda t: launch(t).update(KeyName="ops"), ["there is no key pair"]),
    (
        lambda t: launch(t)["BlockDeviceMappings"][0]["Ebs"].update(Encrypted=False),
        ["the disk is encrypted"],
    ),
    (
        lambda t: launch(t)["MetadataOptions"].update(HttpTokens="optional"),
        ["the instance's metadata need a token, which stays there"],
    ),
    (
        lambda t: ingress(t, "BalancerSecurityGroup", 22),
        ["nobody can try SSH: BalancerSecurityGroup"],
    ),
    (
        lambda t: ingress(t, "StoreSecurityGroup", 0, ToPort=65535),
        ["nobody can try SSH: StoreSecurityGroup", "the instances alone reach the store"],
    ),
    (
        lambda t: ingress(t, "NodeSecurityGroup", 8085),
        ["the load balancer alone reaches the instances, on 8085"],
    ),
    (
        lambda t: properties(t, "TlsListener").update(SslPolicy="ELBSecurityPolicy-2016-08"),
        ["TLS 1.3 is spoken"],
    ),
    (
        lambda t: properties(t, "RedirectListener").update(
            DefaultActions=properties(t, "PlainListener")["DefaultActions"]
        ),
        ["HTTP is redirected"],
    ),
    (
        lambda t: t["Resources"]["Group"]["UpdatePolicy"].update(AutoScalingRollingUpdate={"MaxBatchSize": 1}),
        ["there is one way to update"],
    ),
    (
        lambda t: refresh(t).update(MinHealthyPercentage=50),
        ["new instances come before old ones go"],
    ),
    (
        lambda t: refresh(t).update(CheckpointPercentages=[100]),
        ["a rollout stops to look after the first instances, and replaces all"],
    ),
    (
        lambda t: refresh(t).pop("BakeTime") and refresh(t).update(BakeTime=0),
        ["a rollout watches the alarms for a time"],
    ),
    (
        lambda t: trigger(t).pop(),
        ["each alarm is in RolloutAlarm"],
    ),
    (
        lambda t: refresh(t).update(AlarmSpecification={"Alarms": [{"Ref": "ErrorsAlarm"}]}),
        ["no alarm keeps a rollback from starting"],
    ),
    (
        lambda t: t["Outputs"]["RolloutAlarm"].update(Value={"Ref": "RolloutAlarm"}),
        ["the trigger of a rollout is an ARN"],
    ),
    (
        lambda t: t["Outputs"]["RolloutAlarms"]["Value"]["Fn::Join"][1].pop(),
        ["each alarm is in RolloutAlarms"],
    ),
    (
        lambda t: properties(t, "ErrorsAlarm").update(TreatMissingData="missing"),
        ["an alarm comes to rest without data: ErrorsAlarm"],
    ),
    (
        lambda t: properties(t, "StoreAlarm").update(MetricName="store_up"),
        ["an alarm watches what it says: StoreAlarm", "a metric is told: store_up"],
    ),
    (lambda t: group(t).pop("MetricsCollection"), ["the group tells its metrics"]),
    (lambda t: t["Resources"].pop("FullAlarm"), ["an alarm watches what it says: FullAlarm"]),
    (
        lambda t: properties(t, "FullAlarm").update(Threshold={"Ref": "MinSize"}),
        ["an alarm watches what it says: FullAlarm"],
    ),
    (
        lambda t: properties(t, "StoreProcessorAlarm").update(ComparisonOperator="LessThanThreshold"),
        ["an alarm watches what it says: StoreProcessorAlarm"],
    ),
    (
        lambda t: properties(t, "StoreMemoryAlarm")["Metrics"][0].update(
            Expression={"Fn::Sub": 'SELECT MAX(DatabaseMemoryUsagePercentage) FROM "AWS/MemoryDB"'}
        ),
        ["an alarm watches what it says: StoreMemoryAlarm"],
    ),
    (lambda t: properties(t, "StoreProcessorAlarm").pop("OKActions"), ["an alarm notifies: StoreProcessorAlarm"]),
    (lambda t: t["Resources"].update(NewAlarm=t["Resources"]["ErrorsAlarm"]), NEW_ALARM),
    (lambda t: t["Parameters"]["MaxSize"].pop("Description"), ["a parameter is described: MaxSize"]),
    (lambda t: t["Parameters"]["VpcId"].pop("ConstraintDescription"), ["a parameter is checked, in words too: VpcId"]),
    (lambda t: t["Parameters"]["MaxSize"].pop("Default"), ["a parameter has a default: MaxSize"]),
    (lambda t: t["Parameters"]["Retain"].update(Default="forever"), ["a default is allowed: Retain"]),
    (lambda t: t["Rules"].pop("NodeSubnetsNeedAVpc"), ["NodeSubnetIds needs VpcId"]),
    (lambda t: t["Rules"].pop("AVpcNeedsSubnets"), ["VpcId needs SubnetIds"]),
    (lambda t: t["Rules"].pop("TlsNeedsAName"), ["CertificateArn needs DomainName"]),
    (lambda t: t["Rules"].pop("ZonesComeInPairs"), ["ZoneA needs ZoneB", "ZoneB needs ZoneA"]),
    (
        lambda t: properties(t, "SubnetB").update(AvailabilityZone={"Ref": "ZoneA"}),
        ["a subnet is in its zone: SubnetB"],
    ),
    (
        lambda t: t["Resources"]["WebAcl"].pop("Condition"),
        ["options are there if asked for: none", "options are there if asked for: AccessLogBucket"],
    ),
    (
        lambda t: attribute(t, "Balancer", "access_logs.s3.enabled", Value="false"),
        ["options are there if asked for: AccessLogBucket"],
    ),
    (lambda t: t["Outputs"].pop("WebSocketURL"), ["it tells WebSocketURL"]),
    (lambda t: properties(t, "Store").update(TLSEnabled=False), ["the store speaks TLS"]),
    (
        lambda t: properties(t, "StoreUrl").update(Name={"Fn::Sub": "/chatd/store"}),
        ["the role reads the parameter that has the store's URL"],
    ),
    (lambda t: t["Resources"]["Store"].pop("DeletionPolicy"), ["what was said outlives the stack: DeletionPolicy"]),
]


def test_template_has_no_faults(template):
    assert faults(template) == []


@pytest.mark.parametrize(
    ("mutate", "found"), MUTATIONS, ids=lambda value: value[0][:60] if isinstance(value, list) else ""
)
def test_template_faults_are_found(template, mutate, found):
    assert faults(mutant(template, mutate)) == found


KEY = "arn:aws:kms:eu-west-1:000000000000:key/"


@pytest.mark.parametrize(
    ("key", "accepted"),
    [
        ("01234567-89ab-cdef-0123-456789abcdef", True),
        ("mrk-0123456789abcdef0123456789abcdef", True),
        ("alias/chatd", False),
        ("mrk-", False),
        ("mrk-mrk-0123456789abcdef0123456789abcdef", False),
    ],
)
def test_store_key_may_be_multi_region(template, key, accepted):
    """Both kinds of keys in KMS are accepted, and an alias is not."""
    pattern = template["Parameters"]["StoreKeyArn"]["AllowedPattern"]
    assert bool(re.fullmatch(pattern, KEY + key)) is accepted


def test_template_fits_into_a_request():
    assert TEMPLATE.stat().st_size <= LARGEST


# Linters

LINTED = {
    "a property that there is not": (lambda t: properties(t, "TargetGroup").update(HealthCheckIntervall=5), {"E3002"}),
    "two ways to update": (
        lambda t: t["Resources"]["Group"]["UpdatePolicy"].update(AutoScalingRollingUpdate={"MaxBatchSize": 1}),
        {"E3016"},
    ),
    "a bake time without end": (lambda t: refresh(t).update(BakeTime=172801), {"E3016"}),
    "a reference to nothing": (lambda t: properties(t, "Name").update(Name={"Ref": "Domain"}), {"E1020"}),
    "no excuse": (lambda t: t["Resources"]["Balancer"]["Metadata"].pop("cfn-lint"), {"W1033"}),
    "a parameter of no use": (lambda t: t["Parameters"].update(Unused={"Type": "String"}), {"W2001"}),
}
SCANNED = {
    "IMDSv1": (
        lambda t: launch(t)["MetadataOptions"].update(HttpTokens="optional"),
        {("CKV_AWS_79", "LaunchTemplate")},
    ),
    "SSH from anywhere": (lambda t: ingress(t, "NodeSecurityGroup", 22), {("CKV_AWS_24", "NodeSecurityGroup")}),
    "smuggled headers": (
        lambda t: attribute(t, "Balancer", "routing.http.drop_invalid_header_fields.enabled", Value="false"),
        {("CKV_AWS_131", "Balancer")},
    ),
    "a role that may do all": (
        lambda t: statement(t, "Lifecycle").update(Action="*", Resource="*"),
        {("CKV_AWS_62", "Role")},
    ),
}


def test_cfn_lint_accepts_only_the_template(template, tmp_path):
    written(tmp_path, {"stack": template} | {name: mutant(template, mutate) for name, (mutate, _) in LINTED.items()})
    assert cfn_lint(tmp_path) == {"stack": set()} | {name: found for name, (_, found) in LINTED.items()}


def test_cfn_lint_reads_the_yaml(tmp_path):
    (tmp_path / "stack.yaml").write_text(TEMPLATE.read_text())
    assert cfn_lint(tmp_path) == {"stack": set()}


def test_checkov_accepts_only_the_template(template, tmp_path):
    without = copy.deepcopy(template)
    excused = set()
    for name, one in without["Resources"].items():
        for skip in one.get("Metadata", {}).pop("checkov", {"skip": []})["skip"]:
            assert len(skip["comment"]) > 6
            excused.add((skip["id"], name))
    templates = {"stack": template, "without": without}
    written(tmp_path, templates | {name: mutant(template, mutate) for name, (mutate, _) in SCANNED.items()})
    found = {name: found for name, (_, found) in SCANNED.items()}
    assert checkov(tmp_path) == {"stack": set(), "without": excused} | found


# The timings, over the template, the units and chatd's own options


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        (r"--drain 120", "--drain 150", ["drain < the first stop time-out"]),
        (r"TimeoutStopSec=150", "TimeoutStopSec=120", ["drain < the first stop time-out"]),
        (r"TimeoutStopSec=150", "TimeoutStopSec=180", ["the last stop time-out < deregistration delay"]),
    ],
)
@pytest.mark.parametrize("place", [0, 1], ids=[path.name for path in UNITS])
def test_unit_timings_fit_the_stack(template, place, old, new, found):
    units = [path.read_text() for path in UNITS]
    assert timing_faults(template, units) == []
    units[place], times = re.subn(old, new, units[place])
    assert times == 1
    assert timing_faults(template, units) == found


def test_ping_fits_the_stack(template):
    assert timing_faults(template, ping="119.9") == []
    assert timing_faults(template, ping="120") == ["ping < idle time-out"]


def test_boot_and_units_agree_on_the_drain():
    boot = imds.load("chatd-boot")
    for path in UNITS:
        assert re.findall(r"--drain (\d+)", path.read_text()) == [str(boot.DRAIN_SECONDS)]
