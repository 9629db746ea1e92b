"""The instances of a stack, their targets and the alarms at moto, and how the group replaces instances."""

TRIGGER = "RolloutAlarm"
"""The resource of the alarm that stands for the others."""


class Fleet:
    """The instances of the stack, its targets and alarms, at moto."""

    def __init__(self, account, name, region):
        self._account = account
        self._name = name
        self._region = region
        self._call = account.call
        self.there = False
        self.outputs = {}

    def create(self, image, alarms, guards, size=2):
        """Make all that a stack has, with so many instances of an image.

        `alarms` has the names of all alarms by resource, and `guards` those that a rollout needs.
        """
        call = self._call
        vpc = call("ec2", "create_vpc", CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
        zone = f"{self._region}a"
        subnet = call("ec2", "create_subnet", VpcId=vpc, CidrBlock="10.0.0.0/24", AvailabilityZone=zone)["Subnet"][
            "SubnetId"
        ]
        made = call("elbv2", "create_target_group", Name=self._name, Protocol="HTTP", Port=8085, VpcId=vpc)
        target_group = made["TargetGroups"][0]["TargetGroupArn"]
        data = {"ImageId": image, "InstanceType": "t4g.small"}
        template = call("ec2", "create_launch_template", LaunchTemplateName=self._name, LaunchTemplateData=data)
        self._template = template["LaunchTemplate"]["LaunchTemplateId"]
        call(
            "autoscaling",
            "create_auto_scaling_group",
            AutoScalingGroupName=self._name,
            LaunchTemplate={"LaunchTemplateId": self._template, "Version": "1"},
            MinSize=size,
            MaxSize=2 * size,
            VPCZoneIdentifier=subnet,
            TargetGroupARNs=[target_group],
        )
        self._target_group = target_group
        self._trigger, self._guards = alarms[TRIGGER], guards
        self.alarm_named(self._trigger, "OK", composite=True)
        for name in alarms.values():
            if name != self._trigger:
                self.alarm_named(name, "OK")
        self.there = True
        self.outputs = {
            "WebSocketURL": self._account.url_of_chat,
            "AutoScalingGroup": self._name,
            "TargetGroup": target_group,
            "RolloutAlarm": f"arn:aws:cloudwatch:{self._region}:{self._account.owner}:alarm:{self._trigger}",
            "RolloutAlarms": ",".join(guards),
        }

    def destroy(self):
        """Remove the group with its instances."""
        if self.there:
            arguments = {"AutoScalingGroupName": self._name, "ForceDelete": True}
            self._call("autoscaling", "delete_auto_scaling_group", **arguments)
        self.there = False

    def store(self):
        """Make the MemoryDB of the stack, as it is when it is available."""
        subnets = [one["SubnetId"] for one in self._call("ec2", "describe_subnets")["Subnets"]]
        self._call("memorydb", "create_subnet_group", SubnetGroupName=self._name, SubnetIds=subnets)
        how = {"NodeType": "db.t4g.small", "ACLName": "open-access", "SubnetGroupName": self._name}
        self._call("memorydb", "create_cluster", ClusterName=self._name, **how)

    def alarm_named(self, name, state, *, composite=False):
        """Have an alarm be in a state; the composite alarm follows those that guard a rollout."""
        how = {"MetricName": "m", "Namespace": "n", "Period": 60, "EvaluationPeriods": 1, "Threshold": 1.0}
        how |= {"Statistic": "Sum", "ComparisonOperator": "GreaterThanThreshold"}
        self._call("cloudwatch", "put_metric_alarm", AlarmName=name, **how)
        if composite:  # moto stores such an alarm, and has no call that makes it
            self._account.cloudwatch.alarms[name].rule = "TRUE"
        self._call("cloudwatch", "set_alarm_state", AlarmName=name, StateValue=state, StateReason="test")
        if not composite:
            self.combine()

    def combine(self):
        """Have the composite alarm be as those are that guard a rollout."""
        on = set(self.alarms("ALARM")) & {*self._guards}
        whole = {"StateValue": "ALARM" if on else "OK", "StateReason": "test"}
        self._call("cloudwatch", "set_alarm_state", AlarmName=self._trigger, **whole)

    def alarm(self, state):
        """Have an alarm of the instances go off, or be quiet."""
        self.alarm_named(self.errors, state)

    @property
    def errors(self):
        """The name of an alarm that guards a rollout."""
        return f"{self._name}-errors"

    def alarms(self, *states):
        """Return the alarms that are in one of some states."""
        kinds = ["MetricAlarm", "CompositeAlarm"]
        answer = self._call("cloudwatch", "describe_alarms", AlarmTypes=kinds)
        found = [one for kind in kinds for one in answer[f"{kind}s"]]
        return [one["AlarmName"] for one in found if one["StateValue"] in states]

    @property
    def group(self):
        (group,) = self._call("autoscaling", "describe_auto_scaling_groups", AutoScalingGroupNames=[self._name])[
            "AutoScalingGroups"
        ]
        return group

    @property
    def images(self):
        """The image of each instance that is in service."""
        members = [one["InstanceId"] for one in self.group["Instances"]] if self.there else []
        found = self._call("ec2", "describe_instances", InstanceIds=members)["Reservations"] if members else []
        return {one["InstanceId"]: one["ImageId"] for reservation in found for one in reservation["Instances"]}

    def aim(self, image):
        """Have the group launch another image from now on."""
        data = {"ImageId": image, "InstanceType": "t4g.small"}
        arguments = {"LaunchTemplateId": self._template, "LaunchTemplateData": data}
        version = self._call("ec2", "create_launch_template_version", **arguments)["LaunchTemplateVersion"][
            "VersionNumber"
        ]
        template = {"LaunchTemplateId": self._template, "Version": str(version)}
        self._call("autoscaling", "update_auto_scaling_group", AutoScalingGroupName=self._name, LaunchTemplate=template)

    def others(self, image):
        """Return the instances that run something else."""
        return [one for one, runs in self.images.items() if runs != image]

    def replace(self, instance):
        """Have the group launch one in place of an instance."""
        self._call("elbv2", "deregister_targets", TargetGroupArn=self._target_group, Targets=[{"Id": instance}])
        self._call(
            "autoscaling",
            "terminate_instance_in_auto_scaling_group",
            InstanceId=instance,
            ShouldDecrementDesiredCapacity=False,
        )
        targets = [{"Id": one} for one in self.images]
        self._call("elbv2", "register_targets", TargetGroupArn=self._target_group, Targets=targets)

    def health(self, unhealthy, leaving):
        """Return the health of the targets: unhealthy are those of some images."""
        images = self.images
        states = {one: "unhealthy" if image in unhealthy else "healthy" for one, image in images.items()}
        states |= dict.fromkeys(leaving, "draining")
        return {
            "TargetHealthDescriptions": [
                {"Target": {"Id": one, "Port": 8085}, "HealthCheckPort": "8085", "TargetHealth": {"State": state}}
                for one, state in states.items()
            ]
        }
