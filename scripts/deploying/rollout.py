"""A change set under way: what is seen of it, and how it is called off.

CloudFormation does the work, and undoes it by itself when new instances do not come up or an alarm goes off.  Here it
is only watched, and told to undo it when that takes too long, or when it can no longer be seen how it goes.  The
refresh of the instances is CloudFormation's: it is cancelled through the stack alone.
"""

from collections.abc import Callable
from typing import Any, Final

from deploying.aws import POLL_SECONDS, AwsError, CallDenied, DeployError, RolledBack, Stuck, say
from deploying.stack import Plan, Stack, State, named

PATIENCE_SECONDS: Final = 600
"""How long AWS may be out of reach."""
DONE: Final = frozenset(("CREATE_COMPLETE", "UPDATE_COMPLETE"))
UNDONE: Final = frozenset(("UPDATE_ROLLBACK_COMPLETE", "ROLLBACK_COMPLETE"))
UNDOING: Final = frozenset(("UPDATE_ROLLBACK_IN_PROGRESS", "UPDATE_ROLLBACK_COMPLETE_CLEANUP_IN_PROGRESS"))


class Watch:
    """The one that watches what is done to a stack until it ends.

    `timeout` is in seconds, and runs from when the watch begins; once it is over the update is called off, and has as
    long again to be undone.  With `off`, a reason, it is called off at once.
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
        """What CloudFormation says went wrong first."""
        self._off = off
        """Why the update is to be undone, if it is."""
        self._cancelled = False
        self._told = ""
        """What was said last of why it cannot be seen how it is."""
        self._sighted = True
        """Whether more than the stack's own status can be seen."""

    def run(self) -> None:
        """Watch until it is done; RolledBack if it was undone, Stuck if it is neither."""
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
        """Have the update undone, which takes as long as it has been under way; AwsError."""
        say(f"{self._off}: the update is called off")
        arguments = {"StackName": self._stack.name, "ClientRequestToken": f"off-{self._token}"[:128]}
        try:
            self._stack.account.call("cloudformation", "cancel_update_stack", **arguments)
        except AwsError as error:
            if error.code != "ValidationError":  # it has just ended, or is being undone already
                raise
        self._cancelled = True

    def _look(self) -> State:
        """See how it is, and tell what is new."""
        state = self._stack.look()
        if state is None:
            raise Stuck(f"the stack {self._stack.name} is gone")
        self._begun = self._begun or state.busy
        if self._sighted:
            self._events(state)
            group = state.outputs.get("AutoScalingGroup")
            if group:
                self._progress(group)
        return state

    def _events(self, state: State) -> None:
        """Tell what happened to the stack since it was last looked at."""
        news: list[dict[str, Any]] = []
        pages = self._stack.account.pages(
            "cloudformation", "describe_stack_events", "StackEvents", StackName=self._stack.name
        )
        for event in pages:  # the newest first
            if event["EventId"] in self._seen:
                break
            news.append(event)
            own = event["PhysicalResourceId"] == state.id
            if own and event["ResourceStatus"] in ("CREATE_IN_PROGRESS", "UPDATE_IN_PROGRESS"):
                self._begun = self._begun or event.get("ClientRequestToken", "") == self._token
                break  # what is older belongs to what was done before
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
        """Tell how many instances have been replaced, if that is others than before."""
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
        """Whether it is done; RolledBack or Stuck if it is over, but not done."""
        if state.status in DONE:
            return True
        why = ": ".join(text for text in (self._off, self._fault) if text) or state.status
        if state.status in UNDONE:
            remedy = ": delete the stack before you create it again" if state.status == "ROLLBACK_COMPLETE" else ""
            raise RolledBack(f"rolled back: {why}{remedy}")
        if not state.busy:
            remedy = "scripts/deploy cannot mend that: see the stack's events, and ContinueUpdateRollback"
            raise Stuck(f"{self._stack.name} is {state.status} ({why}): {remedy}")
        return False

    def _late(self, state: State) -> None:
        """The time is over."""
        minutes = f"after {self._timeout / 60:g} minutes"
        if not self._begun:
            raise Stuck(f"{minutes} nothing has begun: run this again")
        if self._off or state.status != "UPDATE_IN_PROGRESS":
            raise Stuck(f"{self._stack.name} is still {state.status} {minutes}: run this again to go on watching")
        self._off = f"not done {minutes}"

    def _blind(self, error: AwsError, reached: float) -> None:
        """It cannot be seen how it is: wait if that may pass; else have it undone, as long as that can be seen to."""
        if error.passing:
            if self._clock.now() - reached < PATIENCE_SECONDS:
                if str(error) != self._told:
                    say(f"trying again: {error}")
                    self._told = str(error)
                return
        elif self._sighted:
            self._sighted, self._off = False, self._off or str(error)
            return
        remedy = f"it goes on in the account: run this again, or scripts/deploy abort --stack {self._stack.name}"
        raise Stuck(f"{error}; {remedy}") from error


def roll_out(stack: Stack, plan: Plan, timeout: float, begun: Callable[[], None]) -> None:
    """Execute a plan and watch it; DeployError if it did not begin, else as Watch.run.

    `begun` is called once it cannot be told any longer that nothing was changed.
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
    """Whether a plan is under way although its execution seemed to fail; Stuck if that cannot be told."""
    if not error.passing and error.code != "InvalidChangeSetStatus":
        return False
    image = plan.name.removeprefix(named(""))
    until = stack.clock.now() + PATIENCE_SECONDS
    while True:
        try:
            return stack.began(image) == plan.token or stack.planned(image, "EXECUTE_IN_PROGRESS") is not None
        except AwsError as blind:
            if not blind.passing or stack.clock.now() >= until:
                raise Stuck(f"{blind}: it may have begun all the same: run this again") from blind
        stack.clock.sleep(POLL_SECONDS)


def under_way(stack: Stack, image: str) -> str | None:
    """The token of the rollout of an image that is under way; None if nothing is; Refused if something else is."""
    state = stack.look()
    if state is None:
        return None
    if state.busy:
        token = stack.began(image)
        if token is None:
            raise CallDenied(f"{stack.name} is {state.status}, of something else: wait, or scripts/deploy abort")
        return token
    plan = stack.planned(image, "EXECUTE_IN_PROGRESS")
    return plan.token if plan else None


def abort(stack: Stack, timeout: float) -> str:
    """Call off the update that is under way, and wait until it is undone; answers the stack's status.

    DeployError if there is none to call off, Stuck if it is not undone.
    """
    state = stack.there()
    if state.status in UNDONE:
        return state.status
    if state.status not in {"UPDATE_IN_PROGRESS", *UNDOING}:
        remedy = "scripts/deploy rollback brings back the last good image"
        if state.status == "CREATE_IN_PROGRESS":
            remedy = "to stop its creation, delete it"
        raise DeployError(f"{stack.name} is {state.status}, and nothing can be called off: {remedy}")
    try:
        Watch(stack, stack.operation(), timeout, "as asked").run()
    except RolledBack:
        return stack.there().status
    raise DeployError(f"{stack.name} was done before it could be called off: scripts/deploy rollback undoes it")
