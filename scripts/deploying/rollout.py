"""Watching and cancelling the execution of a change set.

CloudFormation does the work.  It rolls back by itself when new instances do not become healthy or an alarm fires.  This
module watches it, and cancels the update when it takes too long or when its progress can no longer be seen.
CloudFormation owns the refresh of the instances, so it is cancelled only through the stack.
"""

from collections.abc import Callable
from typing import Any, Final

from deploying.aws import POLL_SECONDS, AwsError, CallDenied, DeployError, RolledBack, Stuck, say
from deploying.stack import BEGINNINGS, Plan, Stack, State, named

PATIENCE_SECONDS: Final = 600
"""How long AWS may be unreachable."""
DONE: Final = frozenset(("CREATE_COMPLETE", "UPDATE_COMPLETE"))
UNDONE: Final = frozenset(("UPDATE_ROLLBACK_COMPLETE", "ROLLBACK_COMPLETE"))
EXECUTED: Final = frozenset(("InvalidChangeSetStatus", "TokenAlreadyExistsException"))
"""Error codes for a change set that is executed already, perhaps by a call whose answer was lost."""
UNDOING: Final = frozenset(("UPDATE_ROLLBACK_IN_PROGRESS", "UPDATE_ROLLBACK_COMPLETE_CLEANUP_IN_PROGRESS"))


class Watch:
    """Watches an update or the creation of a stack until it ends.

    The timeout, in seconds, runs from the start of the watch.  When it expires the update is cancelled, and the
    rollback gets the same time.  `off` is a reason to cancel the update at once.
    """

    def __init__(self, stack: Stack, token: str, timeout: float, off: str = "") -> None:
        self._stack = stack
        self._clock = stack.clock
        self._token = token
        self._timeout = timeout
        self._seen: set[str] = set()
        self._begun = False
        self._refresh = "", ""
        self._fault = ""
        """The first failure that CloudFormation reports."""
        self._off = off
        """The reason to cancel the update; empty while it may continue."""
        self._cancelled = False
        self._told = ""
        """The last error that was printed while AWS was unreachable."""
        self._sighted = True
        """False once events and progress cannot be read, but only the status of the stack."""

    def run(self) -> None:
        """Watch until the update is complete; raises RolledBack if it was rolled back, Stuck if it is neither."""
        reached = self._clock.now()
        deadline = reached + self._timeout
        while True:
            try:
                state = self._look()
                reached, self._told = self._clock.now(), ""
                if self._begun and self._ended(state):
                    return
                if reached >= deadline:
                    self._late(state)
                    deadline = reached + self._timeout
                if self._off and not self._cancelled and state.status == "UPDATE_IN_PROGRESS":
                    self._cancel()
            except AwsError as error:
                self._blind(error, reached)
            self._clock.sleep(POLL_SECONDS)

    def _cancel(self) -> None:
        """Cancel the update; the rollback takes about as long as the update has taken.  Raises AwsError."""
        say(f"{self._off}: cancelling the update")
        arguments = {"StackName": self._stack.name, "ClientRequestToken": f"off-{self._token}"[:128]}
        try:
            self._stack.account.call("cloudformation", "cancel_update_stack", **arguments)
        except AwsError as error:
            if error.code != "ValidationError":  # the update has just ended, or is being rolled back already
                raise
        self._cancelled = True

    def _look(self) -> State:
        """Read the state of the stack and print what is new."""
        state = self._stack.look()
        if state is None:
            raise Stuck(f"the stack {self._stack.name} no longer exists")
        self._begun = self._begun or state.busy
        if self._sighted:
            self._events(state)
            group = state.outputs.get("AutoScalingGroup")
            if group:
                self._progress(group)
        return state

    def _events(self, state: State) -> None:
        """Print the events of the stack since the last poll."""
        news: list[dict[str, Any]] = []
        pages = self._stack.account.pages(
            "cloudformation", "describe_stack_events", "StackEvents", StackName=self._stack.name
        )
        for event in pages:  # the newest first
            if event["EventId"] in self._seen:
                break
            news.append(event)
            own = event["PhysicalResourceId"] == state.id
            if own and event["ResourceStatus"] in BEGINNINGS:
                self._begun = self._begun or event.get("ClientRequestToken", "") == self._token
                break  # older events belong to earlier operations
        if not self._begun:
            return
        self._seen.update(event["EventId"] for event in news)
        for event in reversed(news):
            reason = " ".join(event.get("ResourceStatusReason", "").split())
            text = f"{event['LogicalResourceId']} {event['ResourceStatus']}" + (f": {reason}" if reason else "")
            if event["ResourceStatus"].endswith("_FAILED"):
                self._fault = self._fault or text
            say(text)

    def _progress(self, group: str) -> None:
        """Print how many instances have been replaced, if the number has changed."""
        answer = self._stack.account.call(
            "autoscaling", "describe_instance_refreshes", AutoScalingGroupName=group, MaxRecords=1
        )
        for one in answer["InstanceRefreshes"]:
            news = f"{one['Status']}, {one.get('PercentageComplete', 0)} %"
            if one.get("StatusReason"):
                news += f": {one['StatusReason']}"
            if self._begun and (one["InstanceRefreshId"], news) != self._refresh:
                say(f"instances of {group}: {news}")
                self._refresh = one["InstanceRefreshId"], news

    def _ended(self, state: State) -> bool:
        """Return whether the update is complete; raises RolledBack or Stuck if it has ended otherwise."""
        if state.status in DONE:
            return True
        why = ": ".join(text for text in (self._off, self._fault) if text) or state.status
        if state.status in UNDONE:
            remedy = ": delete the stack before you create it again" if state.status == "ROLLBACK_COMPLETE" else ""
            raise RolledBack(f"rolled back: {why}{remedy}")
        if not state.busy:
            remedy = "scripts/deploy cannot repair that: see the events of the stack, and ContinueUpdateRollback"
            raise Stuck(f"{self._stack.name} is {state.status} ({why}): {remedy}")
        return False

    def _late(self, state: State) -> None:
        """Handle the timeout: cancel the update, or raise Stuck."""
        minutes = f"after {self._timeout / 60:g} minutes"
        if not self._begun:
            raise Stuck(f"{minutes} the update has not begun: run this again")
        if self._off or state.status != "UPDATE_IN_PROGRESS":
            raise Stuck(f"{self._stack.name} is still {state.status} {minutes}: run this again to continue watching")
        self._off = f"not complete {minutes}"

    def _blind(self, error: AwsError, reached: float) -> None:
        """Handle an unreadable state: wait if the error is passing, otherwise cancel the update; raises Stuck."""
        if error.passing:
            if self._clock.now() - reached < PATIENCE_SECONDS:
                if str(error) != self._told:
                    say(f"retrying: {error}")
                    self._told = str(error)
                return
        elif self._sighted:
            self._sighted, self._off = False, self._off or str(error)
            return
        again = f"run this again, or scripts/deploy abort --stack {self._stack.name}"
        remedy = f"the rollout continues in the account: {again}"
        raise Stuck(f"{error}; {remedy}") from error


def roll_out(stack: Stack, plan: Plan, timeout: float, begun: Callable[[], None]) -> None:
    """Execute a plan and watch it; raises DeployError if it did not begin, otherwise as Watch.run.

    `begun` is called before the first change.
    """
    arguments = {"StackName": stack.name, "ChangeSetName": plan.id, "ClientRequestToken": plan.token}
    begun()
    try:
        stack.account.call("cloudformation", "execute_change_set", **arguments)
    except AwsError as error:
        if not _executed(stack, plan, error):
            raise
    Watch(stack, plan.token, timeout).run()


def _executed(stack: Stack, plan: Plan, error: AwsError) -> bool:
    """Return whether a plan is in progress although its execution seemed to fail; raises Stuck if unknown."""
    if not error.passing and error.code not in EXECUTED:
        return False
    image = plan.name.removeprefix(named(""))
    until = stack.clock.now() + PATIENCE_SECONDS
    while True:
        try:
            return stack.began(image) == plan.token or stack.planned(image, "EXECUTE_IN_PROGRESS") is not None
        except AwsError as blind:
            if not blind.passing or stack.clock.now() >= until:
                raise Stuck(f"{blind}: the rollout may have begun: run this again") from blind
        stack.clock.sleep(POLL_SECONDS)


def under_way(stack: Stack, image: str) -> str | None:
    """Return the token of the rollout of an image in progress, or None; raises CallDenied for another operation."""
    state = stack.look()
    if state is None:
        return None
    if state.busy:
        token = stack.began(image)
        if token is None:
            raise CallDenied(f"{stack.name} is {state.status} by another operation: wait, or scripts/deploy abort")
        return token
    plan = stack.planned(image, "EXECUTE_IN_PROGRESS")
    return plan.token if plan else None


def abort(stack: Stack, timeout: float) -> str:
    """Cancel the update in progress and wait until it is rolled back; returns the status of the stack.

    Raises DeployError without an update to cancel, and Stuck if it is not rolled back.
    """
    state = stack.there()
    if state.status in UNDONE:
        return state.status
    if state.status not in {"UPDATE_IN_PROGRESS", *UNDOING}:
        remedies = dict.fromkeys(DONE, ": scripts/deploy rollback restores the last-good image")
        remedies["CREATE_IN_PROGRESS"] = ": delete the stack to stop its creation"
        remedy = remedies.get(state.status, "")
        raise DeployError(f"{stack.name} is {state.status}, so there is nothing to cancel{remedy}")
    try:
        Watch(stack, stack.operation(), timeout, "as requested").run()
    except RolledBack:
        return stack.there().status
    raise DeployError(f"the update of {stack.name} completed before it could be cancelled: use scripts/deploy rollback")
