"""Rules for scripts/deploying/stack.yaml that no linter knows; `faults` lists those that a template breaks.

A rule is a generator of faults.  A template is data, as stacks.template() reads it; what is in it but `!Ref` and the
like is compared as it stands.
"""

import json
import re

from support.change_sets import Deployed, Rejected, deployed
from support.servers import ROOT
from support.stack_role import role_faults, statement
from support.stacks import attributes, of_type, plain, properties

import chatd.config

# Attributes of an Application Load Balancer and of its target groups, with the range of what is a number, by the
# reference of the Elastic Load Balancing API, LoadBalancerAttribute and TargetGroupAttribute, 2026.  CloudFormation
# takes any key, and the update fails only at the load balancer.
SECONDS_OF_A_WEEK = 604800
BALANCER_ATTRIBUTES = {
    "access_logs.s3.bucket": None,
    "access_logs.s3.enabled": None,
    "access_logs.s3.prefix": None,
    "client_keep_alive.seconds": range(60, SECONDS_OF_A_WEEK + 1),
    "connection_logs.s3.bucket": None,
    "connection_logs.s3.enabled": None,
    "connection_logs.s3.prefix": None,
    "deletion_protection.enabled": None,
    "health_check_logs.s3.bucket": None,
    "health_check_logs.s3.enabled": None,
    "health_check_logs.s3.prefix": None,
    "idle_timeout.timeout_seconds": range(1, 4001),
    "ipv6.deny_all_igw_traffic": None,
    "load_balancing.cross_zone.enabled": None,
    "routing.http.desync_mitigation_mode": None,
    "routing.http.drop_invalid_header_fields.enabled": None,
    "routing.http.preserve_host_header.enabled": None,
    "routing.http.x_amzn_tls_version_and_cipher_suite.enabled": None,
    "routing.http.xff_client_port.enabled": None,
    "routing.http.xff_header_processing.mode": None,
    "routing.http2.enabled": None,
    "waf.fail_open.enabled": None,
    "zonal_shift.config.enabled": None,
}
TARGET_GROUP_ATTRIBUTES = {
    "deregistration_delay.timeout_seconds": range(3601),
    "load_balancing.algorithm.anomaly_mitigation": None,
    "load_balancing.algorithm.type": None,
    "load_balancing.cross_zone.enabled": None,
    "slow_start.duration_seconds": range(901),
    "stickiness.app_cookie.cookie_name": None,
    "stickiness.app_cookie.duration_seconds": range(1, SECONDS_OF_A_WEEK + 1),
    "stickiness.enabled": None,
    "stickiness.lb_cookie.duration_seconds": range(1, SECONDS_OF_A_WEEK + 1),
    "stickiness.type": None,
    "target_group_health.dns_failover.minimum_healthy_targets.count": None,
    "target_group_health.dns_failover.minimum_healthy_targets.percentage": None,
    "target_group_health.unhealthy_state_routing.minimum_healthy_targets.count": None,
    "target_group_health.unhealthy_state_routing.minimum_healthy_targets.percentage": None,
}
IDLE, DELAY = "idle_timeout.timeout_seconds", "deregistration_delay.timeout_seconds"
BALANCER = {
    "access_logs.s3.enabled": "false",
    "client_keep_alive.seconds": str(SECONDS_OF_A_WEEK),
    "idle_timeout.timeout_seconds": "120",
    "routing.http.drop_invalid_header_fields.enabled": "true",
    "routing.http.desync_mitigation_mode": "defensive",
}
TARGETS = {
    "deregistration_delay.timeout_seconds": "180",
    "load_balancing.algorithm.type": "least_outstanding_requests",
    "stickiness.enabled": "false",
}
NEWEST = {"Fn::GetAtt": ["LaunchTemplate", "LatestVersionNumber"]}
HOOKS = {
    "chatd-launch": ("autoscaling:EC2_INSTANCE_LAUNCHING", 300, "ABANDON"),
    "chatd-terminate": ("autoscaling:EC2_INSTANCE_TERMINATING", 300, "CONTINUE"),
}
NOTIFYING = {"FullAlarm", "StoreMemoryAlarm", "StoreProcessorAlarm"}
"""Alarms that roll nothing back, because another image would not help."""
_STORE = "SELECT MAX({}) FROM \"AWS/MemoryDB\" WHERE ClusterName = '${{Store}}'"
LESS, MORE, MOST = "LessThanThreshold", "GreaterThanThreshold", "GreaterThanOrEqualToThreshold"
WATCHED = {
    "ErrorsAlarm": ("HTTPCode_Target_5XX_Count", "Sum", MORE, 10),
    "FullAlarm": ("GroupInServiceInstances", "Minimum", MOST, {"Ref": "MaxSize"}),
    "LaunchesAlarm": ("GroupPendingInstances", "Maximum", MOST, 1),
    "MissingNodesAlarm": ("GroupInServiceInstances", "Minimum", LESS, {"Ref": "MinSize"}),
    "NoNodesAlarm": ("HealthyHostCount", "Maximum", LESS, 1),
    "StoreAlarm": ("chatd_store_up", "Minimum", LESS, 1),
    "StoreMemoryAlarm": (_STORE.format("DatabaseMemoryUsagePercentage"), None, MORE, 80),
    "StoreProcessorAlarm": (_STORE.format("EngineCPUUtilization"), None, MORE, 80),
    "UnhealthyNodesAlarm": ("UnHealthyHostCount", "Maximum", MOST, 1),
}
"""What each alarm watches: a metric or a query, its statistic, and when it goes off."""
ALARMS = {"errors", "launches", "missing-nodes", "no-nodes", "store", "unhealthy-nodes"}
OUTPUTS = {
    "AutoScalingGroup",
    "BalancerName",
    "Encryption",
    "LogGroup",
    "RolloutAlarm",
    "RolloutAlarms",
    "TargetGroup",
    "WebSocketURL",
}
LARGEST = 51200
"""Bytes of a template that CloudFormation takes in a request."""


def _attributes(template):
    for name, kind, known, wanted in (
        ("Balancer", "LoadBalancer", BALANCER_ATTRIBUTES, BALANCER),
        ("TargetGroup", "TargetGroup", TARGET_GROUP_ATTRIBUTES, TARGETS),
    ):
        found = attributes(template, name, kind)
        for key, value in found.items():
            if key not in known:
                yield f"{name} has attributes that there are: {key}"
            elif known[key] is not None and int(value) not in known[key]:
                yield f"{name} has attributes in their range: {key}"
        for key in wanted:
            if found.get(key) != wanted[key]:
                yield f"{name} has the attribute {key}"


def _health(template):
    target = properties(template, "TargetGroup")
    if (target["HealthCheckPath"], target["HealthCheckIntervalSeconds"], target["Port"]) != ("/readyz", 5, 8085):
        yield "the load balancer asks /readyz on 8085 every 5 s"
    if not target["HealthCheckTimeoutSeconds"] < target["HealthCheckIntervalSeconds"]:
        yield "a health check ends before the next"
    if properties(template, "Group")["HealthCheckType"] != "EC2":
        yield "the load balancer's health checks terminate no instance"


def _hooks(template):
    found = properties(template, "Group").get("LifecycleHookSpecificationList", [])
    hooks = {
        one["LifecycleHookName"]: (one["LifecycleTransition"], one["HeartbeatTimeout"], one["DefaultResult"])
        for one in found
    }
    for name, wanted in HOOKS.items():
        if hooks.get(name) != wanted:
            yield f"the group has the hook {name}"


def _network(template):
    rules = [
        (name, rule)
        for name, group in of_type(template, "AWS::EC2::SecurityGroup").items()
        for rule in group.get("SecurityGroupIngress", [])
    ]
    rules += [
        (rule["GroupId"]["Fn::GetAtt"][0], rule)
        for rule in of_type(template, "AWS::EC2::SecurityGroupIngress").values()
    ]
    for name, rule in rules:
        ports = [port for key in ("FromPort", "ToPort") for port in _ports(rule.get(key, -1))]
        if rule["IpProtocol"] != "tcp" or any(port == -1 for port in ports) or min(ports) <= 22 <= max(ports):
            yield f"nobody can try SSH: {name}"
    to_nodes = [rule for name, rule in rules if name == "NodeSecurityGroup"]
    balancer = {"Fn::GetAtt": ["BalancerSecurityGroup", "GroupId"]}
    if [(one.get("SourceSecurityGroupId"), one["FromPort"], one["ToPort"]) for one in to_nodes] != [
        (balancer, 8085, 8085)
    ]:
        yield "the load balancer alone reaches the instances, on 8085"
    to_store = [rule for name, rule in rules if name == "StoreSecurityGroup"]
    if [one.get("SourceSecurityGroupId") for one in to_store] != [{"Fn::GetAtt": ["NodeSecurityGroup", "GroupId"]}]:
        yield "the instances alone reach the store"


def _ports(value):
    if isinstance(value, dict) and "Fn::If" in value:
        return value["Fn::If"][1:]
    return [6379 if value == {"Ref": "StorePort"} else value]


def _listeners(template):
    tls, redirect = properties(template, "TlsListener"), properties(template, "RedirectListener")
    if "TLS13" not in tls["SslPolicy"]:
        yield "TLS 1.3 is spoken"
    if redirect["DefaultActions"][0].get("RedirectConfig", {}).get("Protocol") != "HTTPS":
        yield "HTTP is redirected"


def _instances(template):
    data = properties(template, "LaunchTemplate")["LaunchTemplateData"]
    disks = data["BlockDeviceMappings"]
    metadata = data["MetadataOptions"]
    if data["ImageId"] != {"Ref": "ImageId"} or template["Parameters"]["ImageId"]["Type"] != "AWS::EC2::Image::Id":
        yield "the image is an id"
    version = {"LaunchTemplateId": {"Ref": "LaunchTemplate"}, "Version": NEWEST}
    if properties(template, "Group")["LaunchTemplate"]["Fn::If"][2] != version:
        yield "the group names a version of the launch template"
    if "KeyName" in data:
        yield "there is no key pair"
    if not all(one["Ebs"].get("Encrypted") is True and one["Ebs"]["VolumeType"] == "gp3" for one in disks):
        yield "the disk is encrypted"
    if (metadata["HttpTokens"], metadata["HttpPutResponseHopLimit"]) != ("required", 1):
        yield "the instance's metadata need a token, which stays there"
    text = json.dumps(template)
    for word in ("$Latest", "$Default", "resolve:ssm", "AWS::SSM::Parameter::Value"):
        if word in text:
            yield f"nothing changes by itself: {word}"


def _mixed(template):
    """Check that a group of more than one type has the same launch template, and only instances on demand."""
    for given, types in (
        ({}, []),
        ({"SecondInstanceType": "t4g.medium"}, ["t4g.small", "t4g.medium"]),
        (
            {"SecondInstanceType": "t4g.medium", "ThirdInstanceType": "c7g.medium"},
            ["t4g.small", "t4g.medium", "c7g.medium"],
        ),
    ):
        defaults = {key: str(one.get("Default", "")) for key, one in template["Parameters"].items()}
        group = Deployed(template, {**defaults, **given}).value(properties(template, "Group"))
        policy = group.get("MixedInstancesPolicy", {"LaunchTemplate": {"Overrides": []}})
        found = [one["InstanceType"] for one in policy["LaunchTemplate"]["Overrides"]]
        plain_ = policy["LaunchTemplate"].get("LaunchTemplateSpecification", group.get("LaunchTemplate"))
        if found != types or not plain_ or plain_["Version"] != NEWEST or bool(types) == ("LaunchTemplate" in group):
            yield f"a group of {len(types) or 1} types launches them"
        if types and policy["InstancesDistribution"]["OnDemandPercentageAboveBaseCapacity"] != 100:
            yield f"instances are on demand: {len(types)} types"


def _updates(template):
    policy = template["Resources"]["Group"]["UpdatePolicy"]
    ways = sorted(
        policy.keys() & {"AutoScalingInstanceRefresh", "AutoScalingReplacingUpdate", "AutoScalingRollingUpdate"}
    )
    if ways != ["AutoScalingInstanceRefresh"]:
        yield "there is one way to update"
        return
    how = policy["AutoScalingInstanceRefresh"]["Preferences"]
    if how["MinHealthyPercentage"] != 100 or not 100 < how["MaxHealthyPercentage"] <= 200:
        yield "new instances come before old ones go"
    points = how["CheckpointPercentages"]
    if points != sorted(points) or points[0] > 50 or points[-1] != 100:
        yield "a rollout stops to look after the first instances, and replaces all"
    if (how["BakeTime"], how["CheckpointDelay"]) != ({"Ref": "SoakSeconds"},) * 2:
        yield "a rollout watches the alarms for a time"


def trigger(template):
    """Return what the alarm that rolls back a rollout asks for, as `ALARM("${NAME}")`."""
    separator, asked = properties(template, "RolloutAlarm")["AlarmRule"]["Fn::Join"]
    assert separator == " OR "
    return asked


def _notifications(template):
    alarms = of_type(template, "AWS::CloudWatch::Alarm")
    for name, wanted in WATCHED.items():
        one = alarms.get(name, {})
        query = [metric["Expression"]["Fn::Sub"] for metric in one.get("Metrics", [])]
        metric = one.get("MetricName") or "".join(query)
        if (metric, one.get("Statistic"), one.get("ComparisonOperator"), one.get("Threshold")) != wanted:
            yield f"an alarm watches what it says: {name}"
    notify = {"Fn::If": ["Notify", [{"Ref": "AlarmTopicArn"}], {"Ref": "AWS::NoValue"}]}
    for name, one in alarms.items():
        if [one.get("AlarmActions"), one.get("OKActions")] != [notify, notify]:
            yield f"an alarm notifies: {name}"


def _alarms(template):
    alarms = of_type(template, "AWS::CloudWatch::Alarm")
    names = sorted(alarms.keys() - NOTIFYING)
    refresh = template["Resources"]["Group"]["UpdatePolicy"].get("AutoScalingInstanceRefresh", {"Preferences": {}})
    if sorted(one["Fn::Sub"] for one in trigger(template)) != [f'ALARM("${{{name}}}")' for name in names]:
        yield "each alarm is in RolloutAlarm"
    if sorted(one["Ref"] for one in template["Outputs"]["RolloutAlarms"]["Value"]["Fn::Join"][1]) != names:
        yield "each alarm is in RolloutAlarms"
    if "AlarmSpecification" in refresh["Preferences"]:
        yield "no alarm keeps a rollback from starting"
    if template["Outputs"]["RolloutAlarm"]["Value"] != {"Fn::GetAtt": ["RolloutAlarm", "Arn"]}:
        yield "the trigger of a rollout is an ARN"
    for name, alarm in of_type(template, "AWS::CloudWatch::Alarm").items():
        if alarm.get("TreatMissingData") not in ("breaching", "notBreaching"):
            yield f"an alarm comes to rest without data: {name}"
        if any(value == {"Ref": "Group"} for one in alarm.get("Dimensions", []) for value in one.values()):
            yield f"an alarm is there before the group: {name}"


def _metrics(template):
    """Check that the agent publishes the metrics that the template uses."""
    from_image = json.loads((ROOT / "packer" / "files" / "cloudwatch-agent.json").read_text())
    told = from_image["logs"]["metrics_collected"]["prometheus"]["emf_processor"]
    (declared,) = told["metric_declaration"]
    known = {(told["metric_namespace"], name.strip("^$")) for name in declared["metric_selectors"]}
    asked = [one for one in of_type(template, "AWS::CloudWatch::Alarm").values() if one.get("Namespace") == "chatd"]
    tracked = properties(template, "Scaling")["TargetTrackingConfiguration"]["CustomizedMetricSpecification"]["Metrics"]
    asked += [one["MetricStat"]["Metric"] for one in tracked if "MetricStat" in one]
    for one in asked:
        own = one["Namespace"] == "chatd"
        if own and (one["Namespace"], one["MetricName"]) not in known:
            yield f"a metric is told: {one['MetricName']}"
        if own and [[dimension["Name"] for dimension in one["Dimensions"]]] != declared["dimensions"]:
            yield f"a metric has the dimensions that are asked for: {one['MetricName']}"
    if not properties(template, "Group").get("MetricsCollection"):
        yield "the group tells its metrics"


def _parameters(template):
    for name, one in template["Parameters"].items():
        if len(one.get("Description", "")) < 20:
            yield f"a parameter is described: {name}"
        if ("Default" in one) == (name == "ImageId"):
            yield f"a parameter has a default: {name}"
        bounds = one.keys() & {"AllowedPattern", "AllowedValues", "MinValue", "MaxValue"}
        if not one["Type"].startswith("AWS::") and not ("ConstraintDescription" in one and bounds):
            yield f"a parameter is checked, in words too: {name}"
        if "AllowedPattern" in one and not re.fullmatch(one["AllowedPattern"], one["Default"]):
            yield f"a default is allowed: {name}"
        if "NoEcho" in one:
            yield f"nothing secret goes through the template: {name}"


EXAMPLES = {
    "CertificateArn": "arn:aws:acm:eu-west-1:000000000000:certificate/01234567-89ab-cdef-0123-456789abcdef",
    "HostedZoneId": "Z0123456789ABCDEFGHIJ",
    "NodeSubnetIds": "subnet-0123456789abcdef2,subnet-0123456789abcdef3",
    "StoreKeyArn": "arn:aws:kms:eu-west-1:000000000000:key/01234567-89ab-cdef-0123-456789abcdef",
    "SubnetIds": "subnet-0123456789abcdef0,subnet-0123456789abcdef1",
    "ThirdInstanceType": "c7g.medium",
    "VpcId": "vpc-0123456789abcdef0",
    "WebAclArn": "arn:aws:wafv2:eu-west-1:000000000000:regional/webacl/chat/01234567-89ab-cdef-0123-456789abcdef",
    "ZoneA": "eu-west-1a",
    "ZoneB": "eu-west-1b",
}
NEEDS = {
    "CertificateArn": "DomainName",
    "HostedZoneId": "DomainName",
    "NodeSubnetIds": "VpcId",
    "StoreKeyArn": "StoreParameter",
    "SubnetIds": "VpcId",
    "ThirdInstanceType": "SecondInstanceType",
    "VpcId": "SubnetIds",
    "ZoneA": "ZoneB",
    "ZoneB": "ZoneA",
}
"""Parameters that are ignored, or fail late, without another."""


def _needs(template):
    """Check that a parameter is rejected without the one that it needs."""
    for name, needed in NEEDS.items():
        try:
            deployed(template, {"ImageId": "ami-0123456789abcdef0", name: EXAMPLES[name]})
        except Rejected:
            continue
        yield f"{name} needs {needed}"


def _optional(template):
    """Check that the access log and the web ACL are there only if they are asked for."""
    for given, wanted in (
        ({}, (False, None)),
        ({"AccessLogBucket": "logs"}, (False, "logs")),
        ({"WebAclArn": EXAMPLES["WebAclArn"]}, (True, None)),
    ):
        defaults = {key: str(one.get("Default", "")) for key, one in template["Parameters"].items()}
        made = Deployed(template, {**defaults, **given})
        listed = made.value(properties(template, "Balancer")["LoadBalancerAttributes"])
        values = {one["Key"]: one["Value"] for one in listed}
        on = values.get("access_logs.s3.enabled") == "true"
        if ("WebAcl" in made.resources, values.get("access_logs.s3.bucket")) != wanted or on != bool(wanted[1]):
            yield f"options are there if asked for: {', '.join(given) or 'none'}"


def _zones(template):
    """Check that the created subnets are in the zones given, and otherwise in the first ones."""
    for place, name in enumerate(("A", "B")):
        first = {"Fn::Select": [place, {"Fn::GetAZs": ""}]}
        wanted = {"Fn::If": ["Zoned", {"Ref": f"Zone{name}"}, first]}
        if properties(template, f"Subnet{name}")["AvailabilityZone"] != wanted:
            yield f"a subnet is in its zone: Subnet{name}"


def _outputs(template):
    for name in sorted(OUTPUTS - template["Outputs"].keys()):
        yield f"it tells {name}"


def _store(template):
    store = properties(template, "Store")
    if store["TLSEnabled"] is not True or not properties(template, "StoreUrl")["Value"]["Fn::Sub"].startswith(
        "rediss:"
    ):
        yield "the store speaks TLS"
    name = properties(template, "StoreUrl")["Name"]
    read = statement(template, "Store")["Resource"]["Fn::Sub"][1]["Name"]
    if read != {"Fn::If": ["OwnStore", name, {"Ref": "StoreParameter"}]}:
        yield "the role reads the parameter that has the store's URL"
    for key in ("DeletionPolicy", "UpdateReplacePolicy"):
        if not str(template["Resources"]["Store"].get(key)).startswith("Retain"):
            yield f"what was said outlives the stack: {key}"


def seconds(template, units, ping):
    """Return the timings that hold together, by name: of the template, the units' texts and chatd's default."""
    options = user_data(template)
    drains = [int(number) for unit in units for number in re.findall(r"--drain (\d+)", unit)]
    stops = [int(number) for unit in units for number in re.findall(r"TimeoutStopSec=(\d+)", unit)]
    assert len(drains) == len(stops) == len(units)
    hooks = {
        one["LifecycleHookName"]: one for one in properties(template, "Group").get("LifecycleHookSpecificationList", [])
    }
    terminate = hooks.get("chatd-terminate")
    return {
        "drain": max(drains),
        "the first stop time-out": min(stops),
        "the last stop time-out": max(stops),
        "deregistration delay": int(
            attributes(template, "TargetGroup", "TargetGroup")["deregistration_delay.timeout_seconds"]
        ),
        "heartbeat": terminate["HeartbeatTimeout"] if terminate else None,
        "ping": float(options.get("CHATD_PING", ping)),
        "idle time-out": int(attributes(template, "Balancer", "LoadBalancer")["idle_timeout.timeout_seconds"]),
    }


def user_data(template):
    """Return the settings in user data, with what CloudFormation puts in left out."""
    parts = properties(template, "LaunchTemplate")["LaunchTemplateData"]["UserData"]["Fn::Base64"]["Fn::Join"][1]
    texts = [plain(one["Fn::If"][1] if isinstance(one, dict) and "Fn::If" in one else one) for one in parts]
    return dict(line.split("=", 1) for line in "".join(texts).splitlines())


PING = next(int(option.default) for option in chatd.config.OPTIONS if option.name == "ping")
UNITS = [ROOT / "packer" / "files" / name for name in ("chatd.service.conf", "chatd@.service.conf")]


def timing_faults(template, units=None, ping=None):
    """Return the pairs that are in the wrong order."""
    units = [path.read_text() for path in UNITS] if units is None else units
    found = seconds(template, units, PING if ping is None else ping)
    order = [
        ("drain", "the first stop time-out"),
        ("the last stop time-out", "deregistration delay"),
        ("deregistration delay", "heartbeat"),
        ("ping", "idle time-out"),
    ]
    return [f"{less} < {more}" for less, more in order if found[more] is not None and not found[less] < found[more]]


RULES = (
    _attributes,
    _health,
    _hooks,
    _network,
    _listeners,
    _instances,
    _mixed,
    _updates,
    _notifications,
    _alarms,
    _metrics,
    _parameters,
    _needs,
    _optional,
    _zones,
    _outputs,
    _store,
    role_faults,
    timing_faults,
)


def faults(template):
    """Return the rules that a template breaks, one line each."""
    return [fault for rule in RULES for fault in rule(template)]
