"""A double of CloudFormation and of the instance refresh, which advances one step each time the stack is described.

It holds one stack, whose instances, targets, alarms and launch template are moto's.  The template is parsed, and
tests/support/change_sets.py derives what a change set shows.

An operation on the stack is a generator.  An update replaces the instances one by one.  It rolls back when a new one
does not become healthy, an alarm fires, or it is cancelled, as CloudFormation does with an
`AutoScalingInstanceRefresh`.
"""

import datetime as dt
import itertools
import json
import uuid

from support.change_sets import Rejected, changes, deployed, fixed_name, parsed
from support.servers import ROOT
from support.wire import Fault

NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
PATIENCE = 3
"""Steps after which an instance that is not healthy ends a refresh."""
TEMPLATE = ROOT / "scripts" / "deploying" / "stack.yaml"
GROUP = "Group"
COMPOSITE = "AWS::CloudWatch::CompositeAlarm"
"""The type of the trigger of a rollback."""


class Failed(Exception):
    """The failure of an update."""


class ChangeSet:
    def __init__(self, name, stack, request, becomes):
        self.name = name
        self.id = f"arn:aws:cloudformation:{stack.region}:{stack.owner}:changeSet/{name}/{uuid.uuid4()}"
        self.request = request
        self.becomes = becomes
        fresh = request["ChangeSetType"] == "CREATE"
        self.changes = changes(None if fresh else stack.deployed, becomes)
        self.rollback = request.get("RollbackConfiguration")
        self.steps = iter(["CREATE_PENDING", "CREATE_IN_PROGRESS"])
        self.status = "CREATE_PENDING"
        self.execution = "UNAVAILABLE"
        self.reason = None
        self.fault = None
        """Why it failed, if not for want of changes."""

    def triggers(self, saved):
        """Return the alarms that roll back its execution, given those that the stack has."""
        if self.rollback is None or "RollbackTriggers" not in self.rollback:
            return saved
        return [one["Arn"] for one in self.rollback["RollbackTriggers"]]

    def step(self):
        self.status = next(self.steps, None) or ("CREATE_COMPLETE" if self.changes and not self.fault else "FAILED")
        if self.status == "CREATE_COMPLETE" and self.execution == "UNAVAILABLE":
            self.execution = "AVAILABLE"
        if self.status == "FAILED":
            self.reason = self.fault or (
                "The submitted information didn't contain changes. Submit different information to create a change set."
            )


class Formation:
    """CloudFormation, with one stack; `fleet` has its instances."""

    def __init__(self, name, fleet, region, owner):
        self.name, self.region, self.owner = name, region, owner
        self.id = f"arn:aws:cloudformation:{region}:{owner}:stack/{name}/{uuid.uuid4()}"
        self.fleet = fleet
        self.status = None
        self.deployed = None
        """The template and the parameters of the stack; None before its first operation."""
        self.text = None
        """The text of the template of the stack; None before an update has given one."""
        self.triggers = []
        """The ARNs of the alarms that roll back an update; they stay until a change set has others."""
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
        self.held = lambda: None
        """Returns why the stack cannot be deleted, or None."""
        self.page = 1
        """The changes in a page of an answer.  At AWS pages are larger."""
        self.deleted = False
        self.protected = False
        """True while its termination protection is on."""
        self.reason = None
        self._course = iter(())
        self._count = itertools.count(1)

    # Interface of the tests

    @property
    def alarms(self):
        """The names of the alarms of the template, by that of the resource."""
        return {
            name: self.deployed.value(one["Properties"]["AlarmName"])
            for name, one in self.deployed.resources.items()
            if one["Type"] in ("AWS::CloudWatch::Alarm", COMPOSITE)
        }

    @property
    def guards(self):
        """The names of the alarms that the template lists for a rollout."""
        listed = self.deployed.template["Outputs"]["RolloutAlarms"]["Value"]["Fn::Join"][1]
        return [self.alarms[one["Ref"]] for one in listed]

    @property
    def refusing(self):
        """The names of the alarms that the update policy of the group names."""
        policy = self.deployed.value(self.deployed.template["Resources"][GROUP]["UpdatePolicy"])
        preferences = policy["AutoScalingInstanceRefresh"]["Preferences"]
        named = preferences.get("AlarmSpecification", {"Alarms": []})["Alarms"]
        return [self.alarms[one["Ref"]] for one in named]

    @property
    def parameters(self):
        """All parameters of the stack, the default ones too."""
        return dict(self.deployed.parameters) if self.deployed else {}

    def set(self, **parameters):
        """Have the stack have other parameters."""
        self.deployed = deployed(self.deployed.template, self.parameters | parameters, self.name, self.deployed.tags)

    def exists(self, *, template=None, **parameters):
        """The stack is there, done."""
        self.deployed = deployed(template or parsed(TEMPLATE.read_text()), parameters, self.name)
        self._become("CREATE_COMPLETE")
        self.fleet.create(parameters["ImageId"], self.alarms, self.guards)

    def runs(self, image):
        """It was updated to an image, done."""
        self.set(ImageId=image)
        self._become("UPDATE_COMPLETE")
        self.fleet.aim(image)
        for one in self.fleet.others(image):
            self.fleet.replace(one)

    def deleting(self):
        """It is being deleted, and stays so."""
        self._token = None
        self._become("DELETE_IN_PROGRESS", "User Initiated")

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
        self._event(self.name, status, reason)

    def _event(self, logical, status, reason=None):
        own = logical == self.name
        kind = "AWS::CloudFormation::Stack" if own else self.deployed.template["Resources"][logical]["Type"]
        event = {
            "StackId": self.id,
            "EventId": f"{logical}-{next(self._count)}",
            "StackName": self.name,
            "LogicalResourceId": logical,
            "PhysicalResourceId": self.id if own else f"{logical}-1",
            "ResourceType": kind,
            "Timestamp": NOW,
            "ResourceStatus": status,
        }
        event |= {"ResourceStatusReason": reason} if reason else {}
        event |= {"ClientRequestToken": self._token} if self._token else {}
        self.events.insert(0, event)

    def _update(self, change_set, token):
        old, new = self.deployed, change_set.becomes
        former = self.text
        yield  # what was asked for has not begun yet
        self._token, self._cancelled = token, False
        self.deployed, self.text = new, change_set.request.get("TemplateBody", former)
        self.triggers = change_set.triggers(self.triggers)
        self._become("UPDATE_IN_PROGRESS", "User Initiated")
        yield
        try:
            self._go_on(new.parameters["ImageId"])
            yield from self._resources(change_set.changes)
        except Failed as failed:
            change_set.execution = "EXECUTE_FAILED"
            self.deployed, self.text = old, former
            self._become("UPDATE_ROLLBACK_IN_PROGRESS", f"The following resource(s) failed to update: {failed}")
            yield
            try:
                self._may_refresh(back=True)
            except Failed as again:
                self._event(GROUP, "UPDATE_FAILED", str(again))
                self._become("UPDATE_ROLLBACK_FAILED", f"The following resource(s) failed to update: [Group]. {again}")
                return
            image = old.parameters["ImageId"]
            self.fleet.aim(image)
            for one in self.fleet.others(image):
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

    def _resources(self, changes):
        """Update the resources that a change set names, and the group last."""
        for one in sorted(changes, key=lambda one: one["LogicalResourceId"] == GROUP):
            name = one["LogicalResourceId"]
            doing = {"Add": "CREATE", "Modify": "UPDATE", "Remove": "DELETE"}[one["Action"]]
            if doing == "DELETE":
                continue  # after the update, without an event that a test looks at
            self._event(name, f"{doing}_IN_PROGRESS")
            try:
                self._may_replace(one)
                if name == GROUP:
                    yield from self._group()
            except Failed as failed:
                self._event(name, f"{doing}_FAILED", str(failed))
                raise Failed(f"[{name}]. {failed}") from failed
            self._event(name, f"{doing}_COMPLETE")

    def _may_replace(self, change):
        """A resource with a fixed name cannot be replaced: the new one would have the name of the old one."""
        if change["Action"] == "Modify" and change["Replacement"] == "True":
            named = fixed_name(self.deployed.template["Resources"][change["LogicalResourceId"]])
            renamed = any(one["Target"].get("Name") == named for one in change["Details"])
            if named and not renamed:
                raise Failed(
                    "CloudFormation cannot update a stack when a custom-named resource requires replacing. "
                    f"Rename {change['PhysicalResourceId']} and update the stack again."
                )

    def _may_refresh(self, *, back=False):
        """AWS starts no refresh while an alarm that it names is not OK, not even to go back."""
        if back and self.trapped:
            raise Failed("the old instances cannot be launched")
        bad = [name for name in self.refusing if name not in self.fleet.alarms("OK")]
        if bad:
            raise Failed(f"Instance refresh cannot start: the alarm {bad[0]} is not in the OK state.")

    def _group(self):
        self._may_refresh()
        image = self.deployed.parameters["ImageId"]
        self.fleet.aim(image)
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
        on = self.fleet.alarms("ALARM")
        if [name for name in self.refusing if name in on]:
            raise Failed(f"Instance refresh failed: the alarm {on[0]} went off.")
        for arn in self.triggers:
            name = arn.rpartition(":")[2]
            if name not in self.fleet.alarms("ALARM", "OK", "INSUFFICIENT_DATA"):
                raise Failed(f"The rollback trigger {arn} does not exist.")
            if name in on:
                raise Failed(f"The rollback trigger {arn} went to the state ALARM: {', '.join(on)}.")

    def _create(self, change_set, token):
        yield
        self._token = token
        self.deployed = change_set.becomes
        self.triggers = change_set.triggers([])
        if self.triggers:
            raise AssertionError("no trigger exists before the stack")
        self._become("CREATE_IN_PROGRESS", "User Initiated")
        yield
        image = self.parameters["ImageId"]
        while image in self.stuck:
            yield
        taken = self.held() if "Store" in self.deployed.resources else None
        if taken:
            self._event("Store", "CREATE_FAILED", f"{self.name} already exists in stack {self.name}: {taken}")
        if image in self.unhealthy:
            self._event(GROUP, "CREATE_FAILED", "no instance became healthy")
        if taken or image in self.unhealthy:
            change_set.execution = "EXECUTE_FAILED"
            self._become("ROLLBACK_IN_PROGRESS")
            yield
            self._become("ROLLBACK_COMPLETE")
            return
        self.fleet.create(image, self.alarms, self.guards)
        change_set.execution = "EXECUTE_COMPLETE"
        self._become("CREATE_COMPLETE")

    def _remove(self):
        yield
        self._become("DELETE_IN_PROGRESS", "User Initiated")
        yield
        self.fleet.destroy()
        why = self.held() if "CREATE_COMPLETE" in self.statuses else None
        if why:
            self._become("DELETE_FAILED", f"The following resource(s) failed to delete: {why}")
            self.reason = f"The following resource(s) failed to delete: {why}"
            return
        self._become("DELETE_COMPLETE")
        self.deleted = True

    # Calls of CloudFormation

    def DeleteStack(self, params):
        if self.deleted or params["StackName"] not in (self.name, self.id):
            return {}
        if self.status.endswith("IN_PROGRESS") and self.status != "REVIEW_IN_PROGRESS":
            raise Fault("ValidationError", f"Stack [{self.id}] cannot be deleted while in status {self.status}")
        if self.protected:
            raise Fault(
                "ValidationError", f"Stack [{self.name}] cannot be deleted while TerminationProtection is enabled"
            )
        self._course = self._remove()
        return {}

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
            names = (self.id,) if self.deleted else (self.name, self.id)
            if self.status is None or params["StackName"] not in names:
                raise Fault("ValidationError", f"Stack with id {params['StackName']} does not exist")
            self.step()
        stack = {
            "StackId": self.id,
            "StackName": self.name,
            "CreationTime": NOW,
            "StackStatus": self.status,
            "Parameters": pairs("Parameter", self.parameters),
            "EnableTerminationProtection": self.protected,
        }
        if self.deployed and self.deployed.tags:
            stack["Tags"] = [{"Key": key, "Value": text} for key, text in self.deployed.tags]
        stack["EnableTerminationProtection"] = self.protected
        stack |= {"StackStatusReason": self.reason} if self.reason else {}
        if self.fleet.there:
            stack["Outputs"] = pairs("Output", self.fleet.outputs)
        return {"Stacks": [stack] if self.status else []}

    def DescribeStackEvents(self, params):
        self._known(params)
        return self._page("StackEvents", self.events, params, 3 * self.page)

    def DescribeStackResources(self, params):
        """The resources of a stack whose creation was rolled back are deleted; those that are retained stay."""
        self._known(params)
        there = not self.status.startswith("ROLLBACK_")
        status = "CREATE_COMPLETE" if there else "DELETE_COMPLETE"
        resources = self.deployed.resources if self.deployed else {}
        return {
            "StackResources": [
                {
                    "StackId": self.id,
                    "StackName": self.name,
                    "LogicalResourceId": name,
                    "PhysicalResourceId": self.name,
                    "ResourceType": one["Type"],
                    "Timestamp": NOW,
                    "ResourceStatus": status,
                }
                for name, one in resources.items()
            ]
        }

    def CreateChangeSet(self, params):
        fresh = params.get("ChangeSetType") == "CREATE"
        self._may_change(params, fresh)
        if self.status is None:
            self._become("REVIEW_IN_PROGRESS", "User Initiated")
        name = params["ChangeSetName"]
        if name in self.change_sets:
            raise Fault("AlreadyExistsException", f"ChangeSet {name} cannot be created due to a mismatch")
        template = parsed(params["TemplateBody"]) if "TemplateBody" in params else self.deployed.template
        given = {
            one["ParameterKey"]: self.parameters[one["ParameterKey"]] if one.get("UsePreviousValue") else value(one)
            for one in params["Parameters"]
        }
        for one in params.get("RollbackConfiguration", {}).get("RollbackTriggers", []):
            if one["Type"] != COMPOSITE:
                raise Fault("ValidationError", f"{one['Arn']} is not of the type {one['Type']}")
        try:
            becomes = deployed(template, given, self.name, self._tags(params))
        except Rejected as error:
            raise Fault("ValidationError", str(error)) from error
        made = self.change_sets[name] = ChangeSet(name, self, params, becomes)
        return {"Id": made.id, "StackId": self.id}

    def _tags(self, params):
        """Return the tags of the stack: those of the request, which replace all, or else those that it has."""
        if "Tags" not in params:
            return self.deployed.tags if self.deployed else ()
        if [one for one in params["Tags"] if one["Key"].startswith("aws:")]:
            raise Fault("ValidationError", "aws: prefixed tag key names are not allowed for external use")
        return tuple((one["Key"], one["Value"]) for one in params["Tags"])

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
            "Parameters": pairs("Parameter", one.becomes.parameters),
            "CreationTime": NOW,
            "ExecutionStatus": one.execution,
            "Status": one.status,
        }
        answer |= {"StatusReason": one.reason} if one.reason else {}
        answer |= {"RollbackConfiguration": one.rollback} if one.rollback is not None else {}
        found = one.changes if one.execution != "UNAVAILABLE" else []
        listed = [{"Type": "Resource", "ResourceChange": change} for change in found]
        return answer | self._page("Changes", listed, params, self.page)

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

    def GetTemplate(self, params):
        """Return the template that the stack has or, while it is updated, is getting."""
        self._known(params)
        assert params["TemplateStage"] == "Original"
        return {"TemplateBody": self.text or json.dumps(self.deployed.template)}

    def GetTemplateSummary(self, params):
        declared = parsed(params["TemplateBody"])["Parameters"]
        found = [{"ParameterKey": name, "ParameterType": one["Type"]} for name, one in declared.items()]
        for one in found:
            if "Default" in declared[one["ParameterKey"]]:
                one["DefaultValue"] = str(declared[one["ParameterKey"]]["Default"])
        return {"Parameters": found}

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


def value(given):
    return given["ParameterValue"]


def pairs(kind, values):
    return [{f"{kind}Key": name, f"{kind}Value": value} for name, value in values.items()]
