"""The removal of a stack.  The messages of its MemoryDB stay in a final snapshot.

The order loses no acknowledged message: the instances drain and stop before the snapshot begins, and the stack is
deleted last, because the cluster keeps its security group and its network from being deleted.  Each step is skipped if
an earlier run did it.

Only what CloudFormation lists as resources of the stack is changed.  Something else may have the name of the stack, for
example a cluster because of which the creation of the stack failed.
"""

import time
from collections.abc import Callable, Collection
from typing import Any, Final

from deploying.aws import POLL_SECONDS, AwsError, CallDenied, DeployError, Stuck, say
from deploying.record import Record
from deploying.stack import GONE, IMAGE, NO_CLUSTER, NO_SUBNETS, REVIEW, Stack, State

DELETING: Final = "DELETE_IN_PROGRESS"
STORE: Final = "StoreParameter"
"""The stack parameter that names another store, instead of an own MemoryDB."""
ABSENT: Final = frozenset(("CREATE_FAILED", "DELETE_COMPLETE"))
"""The statuses of resources that do not exist."""
FINAL: Final = "-final-"
"""The part between the names of the stack and the time in the name of a final snapshot."""


class Removal:
    """One run of the removal.  The timeout, in seconds, is that of each step."""

    def __init__(self, stack: Stack, timeout: float, role: str | None, begun: Callable[[], None]) -> None:
        self._stack = stack
        self._call = stack.account.call
        self._timeout = timeout
        self._role = role
        self._begun = begun
        self._deleting = False
        """True once the deletion was seen; before, a failure is that of an earlier run."""

    def run(self, confirm: Callable[[str], bool]) -> dict[str, Any]:
        """Remove everything after `confirm` returns true; returns the name of the snapshot.

        Raises CallDenied or DeployError if nothing was removed, and Stuck if something is left.
        """
        state = self._stack.there()
        self._check(state)
        mine = self._resources(state)
        own = "Store" in mine
        kept = "its messages stay in a snapshot" if own else "a store that it did not create stays"
        _, _, _, region, account, _ = state.id.split(":", 5)
        where = f"the stack {self._stack.name} in {region} of the account {account}"
        if not confirm(f"This deletes {where} and everything in it; {kept}."):
            raise DeployError(f"not confirmed: type the name of the stack, {self._stack.name}")
        self._begun()
        try:
            if state.status != DELETING:
                self._stop(mine)
                self._drop_store(mine)
            # Before the stack is gone, so that a run after an interruption finds the stack.
            Record(self._stack.account, self._stack.name).forget()
            if state.status != DELETING:
                self._delete()
            self._until(lambda: self._gone(state), "the stack is being deleted")
            snapshot = self._snapshot() if own else None
        except Stuck:
            raise
        except DeployError as error:
            raise Stuck(f"{error}: run this again to continue") from error
        return {"stack": self._stack.name, "snapshot": snapshot}

    def _check(self, state: State) -> None:
        """Check that the stack may be deleted, before anything else is; raises CallDenied."""
        name = self._stack.name
        if state.busy and state.status != DELETING:
            remedy = "cancel it with scripts/deploy abort"
            if state.status == "CREATE_IN_PROGRESS":
                remedy = f"stop it with aws cloudformation delete-stack --stack-name {name}, and run this again"
            raise CallDenied(f"{name} is {state.status}: wait, or {remedy}")
        if state.status != REVIEW and not {IMAGE, STORE} <= state.parameters.keys():
            raise CallDenied(
                f"{name} is not a stack of scripts/deploying/stack.yaml, because it lacks the parameters {IMAGE} and "
                f"{STORE}: use --stack"
            )
        if state.protected:
            raise CallDenied(
                f"the termination protection of {name} is on: to turn it off, aws cloudformation "
                f"update-termination-protection --no-enable-termination-protection --stack-name {name}"
            )

    def _resources(self, state: State) -> set[str]:
        """Return the logical names of the resources that exist."""
        found = self._call("cloudformation", "describe_stack_resources", StackName=state.id)["StackResources"]
        return {one["LogicalResourceId"] for one in found if one["ResourceStatus"] not in ABSENT}

    def _stop(self, mine: Collection[str]) -> None:
        """Drain and end all instances."""
        name = self._stack.name
        if "Group" not in mine:
            return

        def running() -> int:
            groups = self._call("autoscaling", "describe_auto_scaling_groups", AutoScalingGroupNames=[name])
            return sum(len(one["Instances"]) for one in groups["AutoScalingGroups"])

        if running():
            none = {"MinSize": 0, "MaxSize": 0, "DesiredCapacity": 0}
            self._call("autoscaling", "update_auto_scaling_group", AutoScalingGroupName=name, **none)
            self._until(lambda: not running(), "the instances drain")

    def _drop_store(self, mine: Collection[str]) -> None:
        """Delete the cluster with a final snapshot, and its subnet group."""
        cluster = self._cluster() if "Store" in mine else None
        if cluster and cluster["Status"] != "deleting":
            final = f"{self._stack.name}{FINAL}{time.strftime('%Y%m%d%H%M%S', time.gmtime())}"
            self._call("memorydb", "delete_cluster", ClusterName=self._stack.name, FinalSnapshotName=final)
        if cluster:
            self._until(lambda: self._cluster() is None, "MemoryDB takes the final snapshot")
        if "StoreSubnets" not in mine:
            return
        try:
            self._call("memorydb", "delete_subnet_group", SubnetGroupName=self._stack.name)
        except AwsError as error:
            if error.code not in NO_SUBNETS:
                raise

    def _cluster(self) -> dict[str, Any] | None:
        try:
            found = self._call("memorydb", "describe_clusters", ClusterName=self._stack.name)
        except AwsError as error:
            if error.code in NO_CLUSTER:
                return None
            raise
        return dict(found["Clusters"][0])

    def _snapshot(self) -> str | None:
        """Return the name of the newest final snapshot."""
        arguments = {"ClusterName": self._stack.name}
        found = self._stack.account.pages("memorydb", "describe_snapshots", "Snapshots", **arguments)
        names = [str(one["Name"]) for one in found if str(one["Name"]).startswith(f"{self._stack.name}{FINAL}")]
        return max(names, default=None)

    def _delete(self) -> None:
        say(f"deleting the stack {self._stack.name}")
        role = {"RoleARN": self._role} if self._role else {}
        self._call("cloudformation", "delete_stack", StackName=self._stack.name, **role)

    def _gone(self, before: State) -> bool:
        """Return whether the stack is deleted; raises Stuck if its deletion failed."""
        try:
            (found,) = self._call("cloudformation", "describe_stacks", StackName=before.id)["Stacks"]
        except AwsError as error:
            if error.code in GONE:
                return True
            raise
        self._deleting = self._deleting or found["StackStatus"] == DELETING
        if found["StackStatus"] == "DELETE_FAILED" and (self._deleting or before.status != "DELETE_FAILED"):
            why = " ".join(found.get("StackStatusReason", "see its events").split())
            raise Stuck(f"{self._stack.name} is DELETE_FAILED: {why}: resolve that, and run this again")
        return bool(found["StackStatus"] == "DELETE_COMPLETE")

    def _until(self, done: Callable[[], bool], what: str) -> None:
        """Poll until a step is done; raises Stuck after the timeout."""
        say(what)
        until = self._stack.clock.now() + self._timeout
        while True:
            try:
                if done():
                    return
            except AwsError as error:
                if not error.passing:
                    raise
            if self._stack.clock.now() >= until:
                raise Stuck(f"after {self._timeout / 60:g} minutes {what} still: run this again to continue")
            self._stack.clock.sleep(POLL_SECONDS)
