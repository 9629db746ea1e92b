"""The current state of the stack, and the change set for another image.

A *plan* is a change set that holds only the changes expected of a new image: a version of the launch template, and the
Auto Scaling group, whose instances are replaced.  It is named after the image, so an interrupted run finds it again.
The token of its execution has the same name, and stays in the events of the stack.
"""

import contextlib
import json
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final, NamedTuple

from deploying.aws import POLL_SECONDS, Account, AwsError, CallDenied, Clock, DeployError, say

IMAGE: Final = "ImageId"
"""The stack parameter that holds the image."""
COMPOSITE: Final = "AWS::CloudWatch::CompositeAlarm"
"""The type of the alarm that rolls back a rollout."""
UPDATABLE: Final = frozenset(
    ("CREATE_COMPLETE", "UPDATE_COMPLETE", "UPDATE_ROLLBACK_COMPLETE", "IMPORT_COMPLETE", "IMPORT_ROLLBACK_COMPLETE")
)
REVIEW: Final = "REVIEW_IN_PROGRESS"
"""The status of a stack that was never created, and only had a change set."""
MIXED: Final = "MixedInstancesPolicy"
VERSION: Final = "LaunchTemplate.LatestVersionNumber"
"""The cause of a change of MixedInstancesPolicy that is only a new version of the launch template."""
NAMES: Final = {
    "AWS::AutoScaling::AutoScalingGroup": "AutoScalingGroupName",
    "AWS::CloudWatch::Alarm": "AlarmName",
    "AWS::CloudWatch::CompositeAlarm": "AlarmName",
    "AWS::Logs::LogGroup": "LogGroupName",
    "AWS::MemoryDB::Cluster": "ClusterName",
    "AWS::MemoryDB::SubnetGroup": "SubnetGroupName",
    "AWS::SSM::Parameter": "Name",
}
"""The properties by which the template names resources.  CloudFormation cannot replace one under the same name."""
NO_CLUSTER: Final = frozenset(("ClusterNotFoundFault", "ClusterNotFound"))
"""Error codes of MemoryDB for a cluster that does not exist, under its two names."""
NO_SUBNETS: Final = frozenset(("SubnetGroupNotFoundFault", "SubnetGroupNotFound"))
"""Those for a subnet group."""
NO_SNAPSHOT: Final = frozenset(("SnapshotNotFoundFault", "SnapshotNotFound"))
"""Error codes of MemoryDB for a missing snapshot, under its two names."""
BEGINNINGS: Final = frozenset(("CREATE_IN_PROGRESS", "DELETE_IN_PROGRESS", "IMPORT_IN_PROGRESS", "UPDATE_IN_PROGRESS"))
"""The statuses with which an operation on a stack begins."""
REFRESHING: Final = frozenset(("Pending", "InProgress", "Cancelling", "RollbackInProgress", "Baking"))
LAUNCH_TEMPLATE: Final = "AWS::EC2::LaunchTemplate"
GROUP: Final = "AWS::AutoScaling::AutoScalingGroup"
IN_PLACE: Final = frozenset(("LaunchTemplate", "UpdatePolicy"))
"""What of a group changes in place, although CloudFormation reports that the group may be replaced.

The template gives the group a name, and CloudFormation replaces no resource that keeps its name.
"""
GONE: Final = frozenset(("ChangeSetNotFound", "ChangeSetNotFoundException", "ValidationError"))
"""Error codes for a missing change set or stack."""
PENDING: Final = frozenset(("CREATE_PENDING", "CREATE_IN_PROGRESS"))
"""The statuses of a change set that is being created."""
UNCHANGED: Final = ("didn't contain changes", "No updates are to be performed")
"""Reasons that CloudFormation gives for a change set without changes."""
LARGEST: Final = 51200
"""The largest template outside S3, in bytes."""
PLAN_SECONDS: Final = 600


class _Planned(Exception):
    """A change set of this name exists, and can be executed."""


class State(NamedTuple):
    """The state of a stack."""

    id: str
    status: str
    parameters: Mapping[str, str]
    outputs: Mapping[str, str]
    tags: Mapping[str, str]
    protected: bool
    """True if AWS refuses to delete it (termination protection)."""

    @property
    def busy(self) -> bool:
        """True while an operation is in progress."""
        return self.status.endswith("_IN_PROGRESS") and self.status != REVIEW

    @property
    def image(self) -> str | None:
        """The image that its instances are launched from."""
        return self.parameters.get(IMAGE)

    def output(self, name: str) -> str:
        """Return an output of the stack; raises DeployError if it is missing."""
        if name not in self.outputs:
            raise DeployError(f"the stack has no output {name}: was it made from scripts/deploying/stack.yaml?")
        return self.outputs[name]


class Plan(NamedTuple):
    """A change set that can be executed."""

    id: str
    name: str
    changes: list[dict[str, Any]]

    @property
    def token(self) -> str:
        """The client request token of its execution, the same in every run."""
        return f"{self.name}-{self.id.rpartition('/')[2]}"


class Stack:
    """A stack in an account; it does not have to exist."""

    def __init__(self, account: Account, name: str, clock: Clock) -> None:
        self.account = account
        self.name = name
        self.clock = clock

    def look(self) -> State | None:
        """Return the state of the stack, or None if it does not exist."""
        try:
            (found,) = self.account.call("cloudformation", "describe_stacks", StackName=self.name)["Stacks"]
        except AwsError as error:
            if error.code == "ValidationError" and "does not exist" in str(error):
                return None
            raise
        parameters = {one["ParameterKey"]: one["ParameterValue"] for one in found.get("Parameters", [])}
        outputs = {one["OutputKey"]: one["OutputValue"] for one in found.get("Outputs", [])}
        tags = {one["Key"]: one["Value"] for one in found.get("Tags", [])}
        protected = bool(found.get("EnableTerminationProtection"))
        return State(found["StackId"], found["StackStatus"], parameters, outputs, tags, protected)

    def there(self) -> State:
        """Return the state of the stack; raises DeployError if it does not exist."""
        state = self.look()
        if state is None:
            raise DeployError(f"there is no stack {self.name} in this region: use --stack and --region")
        return state

    def operation(self) -> str:
        """Return the token of the latest operation; empty if it had none."""
        events = self.account.pages("cloudformation", "describe_stack_events", "StackEvents", StackName=self.name)
        for event in events:
            begins = event.get("ResourceStatus") in BEGINNINGS
            if event.get("PhysicalResourceId") == event["StackId"] and begins:
                return str(event.get("ClientRequestToken", ""))
        return ""

    def began(self, image: str) -> str | None:
        """Return the token of the latest operation if it is the rollout of an image, otherwise None."""
        token = self.operation()
        return token if token.startswith(f"{named(image)}-") else None

    def template(self) -> str | None:
        """Return the template of the stack; None if it is too large to be given outside S3."""
        arguments = {"StackName": self.name, "TemplateStage": "Original"}
        found = self.account.call("cloudformation", "get_template", **arguments)["TemplateBody"]
        text = found if isinstance(found, str) else json.dumps(found, separators=(",", ":"))  # botocore parses JSON
        return text if len(text.encode()) <= LARGEST else None

    def declared(self, template: str) -> set[str]:
        """Return the names of the parameters of a template."""
        summary = self.account.call("cloudformation", "get_template_summary", TemplateBody=template)
        return {one["ParameterKey"] for one in summary["Parameters"]}

    # Preconditions of a rollout

    def quiet(self, state: State) -> None:
        """Check that all rollout alarms are OK and no instances are being replaced; raises CallDenied."""
        trigger = state.output("RolloutAlarm").rpartition(":")[2]
        names = [name for name in (*state.output("RolloutAlarms").split(","), trigger) if name]
        types = ["MetricAlarm", "CompositeAlarm"]
        answer = self.account.call("cloudwatch", "describe_alarms", AlarmNames=names, AlarmTypes=types)
        found = {one["AlarmName"]: one["StateValue"] for kind in types for one in answer.get(f"{kind}s", [])}
        loud = [f"{name} ({found.get(name, 'does not exist')})" for name in names if found.get(name) != "OK"]
        if loud:
            raise CallDenied(f"an alarm is not OK: {', '.join(loud)}: resolve that first")
        self.settled(state)

    def settled(self, state: State) -> None:
        """Check that no other operation is replacing instances; raises CallDenied."""
        group = state.output("AutoScalingGroup")
        arguments = {"AutoScalingGroupName": group, "MaxRecords": 1}
        for one in self.account.call("autoscaling", "describe_instance_refreshes", **arguments)["InstanceRefreshes"]:
            if one["Status"] in REFRESHING:
                raise CallDenied(
                    f"the instances of {group} are being replaced: wait until {one['InstanceRefreshId']} ends"
                )

    def free(self, state: State | None) -> None:
        """Check that an operation may begin; raises CallDenied."""
        if state is None or state.status == REVIEW:
            return
        if state.busy:
            raise CallDenied(f"{self.name} is {state.status}: wait, or cancel it with scripts/deploy abort")
        if state.status not in UPDATABLE:
            remedy = "delete it first" if state.status in ("ROLLBACK_COMPLETE", "CREATE_FAILED") else "repair it first"
            raise CallDenied(f"{self.name} is {state.status}, and cannot be updated: {remedy}")

    # Change sets

    def plan(
        self,
        image: str,
        *,
        template: str | None = None,
        default: pathlib.Path,
        parameters: Mapping[str, str] | None = None,
        allow: Collection[str] = (),
        role: str | None = None,
        tags: Mapping[str, str] | None = None,
        guarded: bool = True,
    ) -> Plan | None:
        """Make the change set for an image; returns None if it would change nothing.

        The stack keeps its template, parameters and tags, except those given.  `default` is the template of a new
        stack.  Without `guarded` alarms neither refuse the change set nor roll it back.  Raises DeployError or
        CallDenied, and then leaves the change set of an earlier run, but none of its own.
        """
        state = self.look()
        self.free(state)
        fresh = state is None or state.status == REVIEW
        if state is not None and not fresh:
            (self.quiet if guarded else self.settled)(state)
        request: dict[str, Any] = {"ChangeSetType": "CREATE" if fresh else "UPDATE"}
        given = {**(parameters or {}), IMAGE: image}
        kept: set[str] = set()
        if fresh or template:
            body = request["TemplateBody"] = template or body_of(default)
            if state is not None and not fresh:
                kept = self.declared(body) & state.parameters.keys()
        else:
            request["UsePreviousTemplate"] = True
            kept = {*(state.parameters if state else ())}
        request["Parameters"] = [
            *({"ParameterKey": name, "ParameterValue": value} for name, value in sorted(given.items())),
            *({"ParameterKey": name, "UsePreviousValue": True} for name in sorted(kept - given.keys())),
        ]
        if state is not None and not fresh:
            request["RollbackConfiguration"] = _triggers(state.output("RolloutAlarm") if guarded else None)
        if role:
            request["RoleARN"] = role
        if tags:  # they replace all tags of the stack
            kept_tags = {} if state is None else state.tags
            request["Tags"] = [{"Key": key, "Value": value} for key, value in sorted({**kept_tags, **tags}.items())]

        def check(plan: Plan) -> None:
            if not fresh:
                self.expect(plan, allow)

        return self._replace(named(image), request, check)

    def planned(self, image: str, status: str = "AVAILABLE") -> Plan | None:
        """Return the change set of an image if its execution has a status, otherwise None."""
        try:
            found = self._describe(named(image))
        except AwsError as error:
            if error.code in GONE:
                return None
            raise
        if found["ExecutionStatus"] != status:
            return None
        return Plan(found["ChangeSetId"], named(image), found["Changes"])

    def expect(self, plan: Plan, allow: Collection[str]) -> None:
        """Check that a change set is possible, and holds only expected and allowed changes; raises CallDenied."""
        stuck = [one for one in plan.changes if _impossible(one)]
        if stuck:
            text = "; ".join(f"{described(one)} for {', '.join(sorted(_touched(one)))}" for one in stuck)
            raise CallDenied(
                f"CloudFormation cannot replace what has a fixed name: {text}: create another stack for that "
                '(docs/deploy.md, "Another store")'
            )
        more = [one for one in plan.changes if one["LogicalResourceId"] not in allow and not _expected(one)]
        if more:
            allowing = " ".join(f"--allow {one['LogicalResourceId']}" for one in more)
            text = "; ".join(described(one) for one in more)
            raise CallDenied(f"it would change more than the image: {text}: to permit that, use {allowing}")

    def drop(self, name: str) -> None:
        """Remove a change set if it exists; prints a line if that fails."""
        try:
            self.account.call("cloudformation", "delete_change_set", StackName=self.name, ChangeSetName=name)
        except AwsError as error:
            if error.code not in GONE:
                say(f"the change set {name} may still exist: {error}")

    def _replace(self, name: str, request: dict[str, Any], check: Callable[[Plan], None]) -> Plan | None:
        """Make a change set as `_offer` does; one that can be executed stays until another has passed the check."""
        try:
            return self._offer(name, request, check, keep=True)
        except _Planned:
            trial = self._offer(f"{name}-trial", request, check)
        if trial is None:
            self.drop(name)
            return None
        self.drop(trial.name)
        return self._offer(name, request, check)

    def _offer(
        self, name: str, request: dict[str, Any], check: Callable[[Plan], None], *, keep: bool = False
    ) -> Plan | None:
        """Make a change set and check it; returns None if it would change nothing.

        Raises what `_create` and `check` raise, and then removes what it made.
        """
        made = False
        try:
            self._create(name, request, keep=keep)
            made = True
            found = self._made(name)
            plan = None if found is None else Plan(found["ChangeSetId"], name, found["Changes"])
            if plan:
                check(plan)
        except BaseException:
            if made or self._pending(name):  # the answer to its creation may be lost
                with contextlib.suppress(DeployError):
                    self._made(name)  # it cannot be removed before it is complete
                self.drop(name)
            raise
        if plan is None:
            self.drop(name)
        return plan

    def _create(self, name: str, request: dict[str, Any], *, keep: bool) -> None:
        """Create a change set in place of one that an earlier run left; raises AwsError.

        With `keep` it raises _Planned if the one in its place can be executed.
        """
        description = "made by scripts/deploy"
        arguments = {"StackName": self.name, "ChangeSetName": name, "Description": description, **request}
        for last in (False, True):
            try:
                self.account.call("cloudformation", "create_change_set", Capabilities=["CAPABILITY_IAM"], **arguments)
            except AwsError as error:
                if last or error.code not in ("AlreadyExists", "AlreadyExistsException"):
                    raise
                with contextlib.suppress(DeployError):
                    self._made(name)  # whatever became of it
                if keep and self._describe(name)["ExecutionStatus"] == "AVAILABLE":
                    raise _Planned from error
                self.drop(name)
            else:
                return

    def _made(self, name: str) -> dict[str, Any] | None:
        """Wait for a change set; returns None if it has no changes, raises DeployError if it failed."""
        until = self.clock.now() + PLAN_SECONDS
        while (found := self._describe(name))["Status"] in PENDING:
            if self.clock.now() >= until:
                raise DeployError(f"the change set {name} is still {found['Status']}: run this again")
            self.clock.sleep(POLL_SECONDS / 5)
        if found["Status"] == "CREATE_COMPLETE":
            return found
        reason = found.get("StatusReason", found["Status"])
        if any(words in reason for words in UNCHANGED):
            return None
        raise DeployError(f"the change set failed: {' '.join(reason.split())}")

    def _pending(self, name: str) -> bool:
        """Return whether a change set is being created."""
        try:
            return self._describe(name)["Status"] in PENDING
        except AwsError:
            return False

    def _describe(self, name: str) -> dict[str, Any]:
        """Return a change set, with the resource changes of all pages."""
        arguments = {"StackName": self.name, "ChangeSetName": name}
        answer = page = self.account.call("cloudformation", "describe_change_set", **arguments)
        changes = [*answer.get("Changes", [])]
        while "NextToken" in page:
            page = self.account.call("cloudformation", "describe_change_set", NextToken=page["NextToken"], **arguments)
            changes += page.get("Changes", [])
        return answer | {"Changes": [one["ResourceChange"] for one in changes]}


def named(image: str) -> str:
    """Return the name of the change set for an image."""
    return f"chatd-{image}"


def _triggers(alarm: str | None) -> dict[str, Any]:
    """Return the rollback configuration of an update.

    CloudFormation saves it with the stack, so an empty list must replace the triggers of an earlier update.
    """
    return {"RollbackTriggers": [{"Arn": alarm, "Type": COMPOSITE}] if alarm else []}


def described(change: Mapping[str, Any]) -> str:
    """Describe a change in a few words."""
    replacement = {"True": ", replaced", "Conditional": ", perhaps replaced"}.get(change.get("Replacement", ""), "")
    if _expected(change):
        replacement = ""
    return f"{change['Action']} {change['LogicalResourceId']} ({change['ResourceType']}{replacement})"


def _expected(change: Mapping[str, Any]) -> bool:
    """Return whether a new image causes this change."""
    kind, replacement = change["ResourceType"], change.get("Replacement")
    if change["Action"] != "Modify" or kind not in (LAUNCH_TEMPLATE, GROUP):
        return False
    if kind == GROUP and replacement == "Conditional":
        mixed = {one.get("CausingEntity") for one in change["Details"] if one["Target"].get("Name") == MIXED}
        return _touched(change) - ({MIXED} if mixed == {VERSION} else set()) <= IN_PLACE
    return replacement == "False"


def _impossible(change: Mapping[str, Any]) -> bool:
    """Return whether a change must replace a resource, but keeps its name."""
    name = NAMES.get(change["ResourceType"])
    if change["Action"] != "Modify" or name is None or name in _touched(change):
        return False
    return change.get("Replacement") == "True"


def _touched(change: Mapping[str, Any]) -> set[str]:
    """Return the properties of a resource that a change names, and its other attributes such as UpdatePolicy."""
    targets = [one.get("Target", {}) for one in change.get("Details", [])]
    return {str(one.get("Name") or one.get("Attribute")) for one in targets} or {"unknown"}


def body_of(path: pathlib.Path) -> str:
    """Return the text of a template; raises DeployError."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DeployError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DeployError(f"{path}: is not a template, because it is not text in UTF-8") from error
    if len(text.encode()) > LARGEST:
        raise DeployError(f"{path}: CloudFormation accepts at most {LARGEST} bytes")
    return text
