"""A double of CloudFormation and of the instance refresh, which advances one step each time the stack is described.

It holds one stack, whose instances, targets, alarms and launch template are moto's.  An operation on the stack is a
generator.  An update replaces the instances one by one.  It rolls back when a new one does not become healthy, an alarm
fires, or it is cancelled, as CloudFormation does with an `AutoScalingInstanceRefresh`.
"""

import datetime as dt
import itertools
import uuid

from support.wire import Fault

NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
PATIENCE = 3
"""Steps after which an instance that is not healthy ends a refresh."""
TEMPLATE = "LaunchTemplate", "AWS::EC2::LaunchTemplate"
GROUP = "Group", "AWS::AutoScaling::AutoScalingGroup"
PARAMETERS = {
    "ImageId": [(*TEMPLATE, "False"), (*GROUP, "False")],
    "InstanceType": [(*TEMPLATE, "False"), (*GROUP, "False")],
    "CertificateArn": [("Listener", "AWS::ElasticLoadBalancingV2::Listener", "False")],
    "SubnetIds": [(*GROUP, "Conditional")],
    "GuardRollouts": [(*GROUP, "False")],
    "VpcId": [("TargetGroup", "AWS::ElasticLoadBalancingV2::TargetGroup", "True")],
    "StoreParameter": [(*TEMPLATE, "False"), (*GROUP, "False")],
}
"""The changes by each parameter of the template: the resource, its type, and whether it is replaced."""


class Failed(Exception):
    """The failure of an update."""


class ChangeSet:
    def __init__(self, name, stack, request, changes):
        self.name = name
        self.id = f"arn:aws:cloudformation:{stack.region}:{stack.owner}:changeSet/{name}/{uuid.uuid4()}"
        self.request = request
        self.changes = changes
        self.steps = iter(["CREATE_PENDING", "CREATE_IN_PROGRESS"])
        self.status = "CREATE_PENDING"
        self.execution = "UNAVAILABLE"
        self.reason = None

    def step(self):
        self.status = next(self.steps, None) or ("CREATE_COMPLETE" if self.changes else "FAILED")
        if self.status == "CREATE_COMPLETE" and self.execution == "UNAVAILABLE":
            self.execution = "AVAILABLE"
        if self.status == "FAILED":
            self.reason = (
                "The submitted information didn't contain changes. Submit different information to create a change set."
            )


class Formation:
    """CloudFormation, with one stack; `fleet` has its instances."""

    def __init__(self, name, fleet, region, owner):
        self.name, self.region, self.owner = name, region, owner
        self.id = f"arn:aws:cloudformation:{region}:{owner}:stack/{name}/{uuid.uuid4()}"
        self.fleet = fleet
        self.status = None
        self.parameters = {}
        self.events = []
        self.change_sets = {}
        self.refreshes = []
        self.executed = []
        """The tokens of all change sets that were executed."""
        self.statuses = []
        self.unhealthy = set()
        """Images whose instances never become healthy."""
        self.stuck = set()
        """Images whose refresh never goes on."""
        self.alarming = set()
        """Images that set off an alarm once one instance runs them."""
        self.trapped = False
        """True if a rollback fails."""
        self._cancelled = False
        self._token = None
        """The token of the current or latest operation."""
        self._course = iter(())
        self._count = itertools.count(1)

    # Interface of the tests

    def exists(self, **parameters):
        """The stack is there, done."""
        self.parameters = parameters
        self._become("CREATE_COMPLETE")
        self.fleet.create(parameters["ImageId"])

    def runs(self, image):
        """It was updated to an image, done."""
        self.parameters = self.parameters | {"ImageId": image}
        self._become("UPDATE_COMPLETE")
        self.fleet.aim(image)
        for one in self.fleet.others(image):
            self.fleet.replace(one)

    def run_out(self):
        """Go on until what is under way has ended, if it ever does."""
        for _ in range(100):
            self.step()

    def step(self):
        next(self._course, None)

    # Operations on the stack

    def _become(self, status, reason=None):
        self.status = status
        self.statuses.append(status)
        self._event((self.name, "AWS::CloudFormation::Stack"), status, reason)

    def _event(self, resource, status, reason=None):
        logical, kind = resource
        event = {
            "StackId": self.id,
            "EventId": f"{logical}-{next(self._count)}",
            "StackName": self.name,
            "LogicalResourceId": logical,
            "PhysicalResourceId": self.id if logical == self.name else f"{logical}-1",
            "ResourceType": kind,
            "Timestamp": NOW,
            "ResourceStatus": status,
        }
        event |= {"ResourceStatusReason": reason} if reason else {}
        event |= {"ClientRequestToken": self._token} if self._token else {}
        self.events.insert(0, event)

    def _update(self, change_set, token):
        old, new = self.parameters, change_set.request["Parameters"]
        yield  # what was asked for has not begun yet
        self._token, self._cancelled = token, False
        self.parameters = new
        self._become("UPDATE_IN_PROGRESS", "User Initiated")
        yield
        try:
            yield from self._resources(new["ImageId"])
        except Failed as failed:
            reason = str(failed)
            change_set.execution = "EXECUTE_FAILED"
            self._event(GROUP, "UPDATE_FAILED", reason)
            self.parameters = old
            self._become(
                "UPDATE_ROLLBACK_IN_PROGRESS", f"The following resource(s) failed to update: [Group]. {reason}"
            )
            yield
            if self.trapped:
                self._become("UPDATE_ROLLBACK_FAILED", "the old instances cannot be launched")
                return
            self.fleet.aim(old["ImageId"])
            for one in self.fleet.others(old["ImageId"]):
                yield
                self.fleet.replace(one)
            self._become("UPDATE_ROLLBACK_COMPLETE_CLEANUP_IN_PROGRESS")
            yield
            self._become("UPDATE_ROLLBACK_COMPLETE")
            return
        change_set.execution = "EXECUTE_COMPLETE"
        self._become("UPDATE_COMPLETE_CLEANUP_IN_PROGRESS")
        yield
        self._become("UPDATE_COMPLETE")

    def _resources(self, image):
        self._event(TEMPLATE, "UPDATE_IN_PROGRESS")
        self.fleet.aim(image)
        self._event(TEMPLATE, "UPDATE_COMPLETE")
        self._event(GROUP, "UPDATE_IN_PROGRESS")
        refresh = {
            "InstanceRefreshId": str(uuid.uuid4()),
            "AutoScalingGroupName": self.name,
            "Status": "Pending",
            "StartTime": NOW,
            "PercentageComplete": 0,
        }
        self.refreshes.insert(0, refresh)
        try:
            yield from self._refresh(image, refresh)
        except Failed as failed:
            refresh |= {
                "Status": "Cancelled" if self._cancelled else "Failed",
                "StatusReason": str(failed),
                "EndTime": NOW,
            }
            raise
        refresh |= {"Status": "Successful", "PercentageComplete": 100, "EndTime": NOW}
        self._event(GROUP, "UPDATE_COMPLETE")

    def _refresh(self, image, refresh):
        others = self.fleet.others(image)
        for done, one in enumerate(others, start=1):
            refresh["Status"] = "InProgress"
            yield
            self._go_on(image)
            while image in self.stuck:
                yield
                self._go_on(image)
            self.fleet.replace(one)
            for _ in range(PATIENCE):
                if image not in self.unhealthy:
                    break
                yield
                self._go_on(image)
            else:
                raise Failed("Instance refresh failed: an instance did not become healthy.")
            refresh["PercentageComplete"] = 100 * done // len(others)
            self._go_on(image)
        refresh["Status"] = "Baking"
        yield
        self._go_on(image)

    def _go_on(self, image):
        if self._cancelled:
            raise Failed("Resource update cancelled")
        if image in self.alarming and image in self.fleet.images.values():
            self.fleet.alarm("ALARM")
        alarms = self.fleet.alarms("ALARM") if self.parameters["GuardRollouts"] == "yes" else []
        if alarms:
            raise Failed(f"Instance refresh failed: the alarm {alarms[0]} went off.")

    def _create(self, change_set, token):
        yield
        self._token = token
        self.parameters = change_set.request["Parameters"]
        self._become("CREATE_IN_PROGRESS", "User Initiated")
        yield
        image = self.parameters["ImageId"]
        while image in self.stuck:
            yield
        if image in self.unhealthy:
            self._event(GROUP, "CREATE_FAILED", "no instance became healthy")
            change_set.execution = "EXECUTE_FAILED"
            self._become("ROLLBACK_IN_PROGRESS")
            yield
            self._become("ROLLBACK_COMPLETE")
            return
        self.fleet.create(image)
        change_set.execution = "EXECUTE_COMPLETE"
        self._become("CREATE_COMPLETE")

    # Calls of CloudFormation

    def _known(self, params):
        if self.status is None or params["StackName"] not in (self.name, self.id):
            raise Fault("ValidationError", f"Stack [{params['StackName']}] does not exist")

    def _set(self, params):
        self._known(params)
        for one in self.change_sets.values():
            if params["ChangeSetName"] in (one.name, one.id):
                return one
        raise Fault("ChangeSetNotFound", f"ChangeSet [{params['ChangeSetName']}] does not exist", 404)

    def DescribeStacks(self, params):
        if "StackName" in params:
            if self.status is None or params["StackName"] not in (self.name, self.id):
                raise Fault("ValidationError", f"Stack with id {params['StackName']} does not exist")
            self.step()
        stack = {
            "StackId": self.id,
            "StackName": self.name,
            "CreationTime": NOW,
            "StackStatus": self.status,
            "Parameters": pairs("Parameter", self.parameters),
        }
        if self.fleet.there:
            stack["Outputs"] = pairs("Output", self.fleet.outputs)
        return {"Stacks": [stack] if self.status else []}

    def DescribeStackEvents(self, params):
        self._known(params)
        return self._page("StackEvents", self.events, params, 3)

    def CreateChangeSet(self, params):
        fresh = params.get("ChangeSetType") == "CREATE"
        self._may_change(params, fresh)
        if self.status is None:
            self._become("REVIEW_IN_PROGRESS", "User Initiated")
        name = params["ChangeSetName"]
        if name in self.change_sets:
            raise Fault("AlreadyExistsException", f"ChangeSet {name} cannot be created due to a mismatch")
        wanted = {}
        for one in params["Parameters"]:
            key = one["ParameterKey"]
            if key not in PARAMETERS:
                raise Fault("ValidationError", f"Parameters: [{key}] do not exist in the template")
            wanted[key] = self.parameters[key] if one.get("UsePreviousValue") else one["ParameterValue"]
        if set(wanted) != set(PARAMETERS):
            raise Fault("ValidationError", f"Parameters: {sorted(set(PARAMETERS) - set(wanted))} must have values")
        changed = [key for key in PARAMETERS if fresh or wanted[key] != self.parameters[key]]
        resources = {one[0]: one for key in changed for one in PARAMETERS[key]}
        if not fresh and "TemplateBody" in params:
            resources["Extra"] = ("Extra", "AWS::Logs::LogGroup", None)
        changes = [change(*one[:2], None if fresh else one[2]) for one in resources.values()]
        made = self.change_sets[name] = ChangeSet(name, self, params | {"Parameters": wanted}, changes)
        return {"Id": made.id, "StackId": self.id}

    def _may_change(self, params, fresh):
        """See that a change set can be made for the stack as it is."""
        if fresh and self.status not in (None, "REVIEW_IN_PROGRESS"):
            raise Fault("ValidationError", f"Stack [{self.name}] already exists and cannot be created again")
        if not fresh:
            self._known(params)
            if not self.status.endswith("_COMPLETE"):
                raise Fault("ValidationError", f"Stack:{self.id} is in {self.status} state and can not be updated.")
        if bool(params.get("UsePreviousTemplate")) == ("TemplateBody" in params):
            raise Fault("ValidationError", "Either Template URL or Template Body must be specified.")
        if not {"CAPABILITY_IAM", "CAPABILITY_NAMED_IAM"} & set(params.get("Capabilities", [])):
            raise Fault("InsufficientCapabilitiesException", "Requires capabilities : [CAPABILITY_IAM]")

    def DescribeChangeSet(self, params):
        one = self._set(params)
        one.step()
        answer = {
            "ChangeSetName": one.name,
            "ChangeSetId": one.id,
            "StackId": self.id,
            "StackName": self.name,
            "Parameters": pairs("Parameter", one.request["Parameters"]),
            "CreationTime": NOW,
            "ExecutionStatus": one.execution,
            "Status": one.status,
        }
        answer |= {"StatusReason": one.reason} if one.reason else {}
        return answer | self._page("Changes", one.changes if one.execution != "UNAVAILABLE" else [], params, 1)

    def DeleteChangeSet(self, params):
        one = self._set(params)
        if one.status in ("CREATE_PENDING", "CREATE_IN_PROGRESS") or one.execution == "EXECUTE_IN_PROGRESS":
            raise Fault("InvalidChangeSetStatus", f"ChangeSet [{one.id}] cannot be deleted in its current status")
        del self.change_sets[one.name]
        return {}

    def ExecuteChangeSet(self, params):
        one = self._set(params)
        if one.execution != "AVAILABLE":
            raise Fault(
                "InvalidChangeSetStatus",
                f"ChangeSet [{one.id}] cannot be executed in its current execution status of [{one.execution}]",
            )
        token = params["ClientRequestToken"]
        one.execution = "EXECUTE_IN_PROGRESS"
        self.executed.append(token)
        self.change_sets = {one.name: one}  # the others no longer fit
        self._course = (self._create if one.request["ChangeSetType"] == "CREATE" else self._update)(one, token)
        return {}

    def CancelUpdateStack(self, params):
        self._known(params)
        if self.status != "UPDATE_IN_PROGRESS":
            raise Fault(
                "ValidationError", f"CancelUpdateStack cannot be called from current stack status {self.status}"
            )
        self._cancelled = True

    def GetTemplateSummary(self, params):
        assert params["TemplateBody"]
        return {"Parameters": [{"ParameterKey": name, "ParameterType": "String"} for name in PARAMETERS]}

    def DescribeInstanceRefreshes(self, params):
        return {
            "InstanceRefreshes": [
                one for one in self.refreshes if one["AutoScalingGroupName"] == params["AutoScalingGroupName"]
            ][:1]
        }

    @staticmethod
    def _page(key, items, params, size):
        start = int(params.get("NextToken", "0"))
        end = start + size
        return {key: items[start:end]} | ({"NextToken": str(end)} if end < len(items) else {})


def change(logical, kind, replacement):
    """Return a change of a resource; without a `replacement` the resource is new."""
    modified = {"Replacement": replacement, "PhysicalResourceId": f"{logical}-1"} if replacement else {}
    what = {"Action": "Modify" if replacement else "Add", "LogicalResourceId": logical, "ResourceType": kind}
    scope = {"Scope": ["Properties"] if replacement else [], "Details": []}
    return {"Type": "Resource", "ResourceChange": what | modified | scope}


def pairs(kind, values):
    return [{f"{kind}Key": name, f"{kind}Value": value} for name, value in values.items()]
