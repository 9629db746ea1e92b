"""The road of an image: planned, rolled out, verified and recorded; and the same road back.

Whatever goes wrong once the change set is under way ends with the image that ran before, or with Stuck.
"""

import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, NoReturn

from deploying.aws import DeployError, RolledBack, Stuck, say
from deploying.images import version
from deploying.record import Record
from deploying.rollout import Watch, roll_out, under_way
from deploying.stack import IMAGE, REVIEW, Plan, Stack, described, named
from deploying.verify import running, verify


class Road(NamedTuple):
    """How an image goes to a stack."""

    stack: Stack
    default: pathlib.Path
    """The template of a stack that is not there."""
    template: pathlib.Path | None
    parameters: Mapping[str, str]
    allow: Collection[str]
    role: str | None
    timeout: float
    """Seconds that a rollout may take."""
    within: float
    """Seconds after it within which it must be verified."""
    begun: Callable[[], None]
    """Called when it cannot be told any longer that nothing was changed."""

    @property
    def record(self) -> Record:
        """What is known to be good."""
        return Record(self.stack.account, self.stack.name)

    # The commands; each answers what was done

    def plan(self, image: str) -> dict[str, Any]:
        """Make the change set for an image, and leave it there; DeployError or Refused."""
        plan = self._plan(image)
        return {"image": image, "change_set": plan and plan.name, "changes": plan.changes if plan else []}

    def roll_out(self, image: str) -> dict[str, Any]:
        """Roll out what was planned for an image, or go on watching; DeployError, Refused, RolledBack or Stuck."""
        return {"image": image, "rolled_out": self._roll_out(image)}

    def verify(self, image: str | None) -> dict[str, Any]:
        """Verify and record an image, that of the stack if none is named; DeployError."""
        image = image or self.stack.there().image
        if not image:
            raise DeployError(f"the stack {self.stack.name} has no parameter {IMAGE}: is it one of scripts/stack.yaml?")
        return self._prove(image)

    def rollback(self, image: str | None) -> dict[str, Any]:
        """Go back to an image, the last good one if none is named; DeployError, Refused or Stuck."""
        image = image or self.record.last_good()
        if not image:
            raise DeployError(f"no image of {self.stack.name} is known to be good: name one with --image")
        return self._back(image)

    def ship(self, image: str) -> dict[str, Any]:
        """Roll out, verify and record an image; answers what was seen.

        DeployError or Refused if it was not begun; else RolledBack or Stuck if it went wrong.
        """
        state = self.stack.look()
        before = self.record.last_good() or (state.image if state else None)
        if state and state.outputs and state.image:
            # What may not be asked later shows now, before anything is done.
            running(self.stack.account, state, state.image)
        moved = self._move(image)
        try:
            return self._prove(image)
        except DeployError as error:
            if before in (None, image):
                if not moved:
                    raise
                raise Stuck(f"{error}; there is no image to go back to") from error
            former = {name: state.parameters[name] for name in self.parameters if state and name in state.parameters}
            self._replace(template=None, parameters=former).undo(str(before), error)

    # The steps

    def _plan(self, image: str, *, guarded: bool = True) -> Plan | None:
        """Make the change set for an image; as Stack.plan."""
        version(self.stack.account, image)
        plan = self.stack.plan(
            image,
            template=self.template,
            default=self.default,
            parameters=self.parameters,
            allow=self.allow,
            role=self.role,
            guarded=guarded,
        )
        for change in plan.changes if plan else ():
            say(described(change))
        return plan

    def _roll_out(self, image: str) -> bool:
        """Roll out what was planned for an image, or go on watching; answers whether there was anything to do."""
        token = under_way(self.stack, image)
        if token:
            self._watch(image, token)
            return True
        plan = self.stack.planned(image)
        state = self.stack.there()
        if plan:
            self.stack.free(state)
            if state.status != REVIEW:
                self.stack.expect(plan, self.allow)
                self.stack.quiet(state)
            self._execute(plan)
            return True
        if self.stack.began(image) and "ROLLBACK" in state.status:
            raise RolledBack(f"{image} was rolled back: the events of the stack say why")
        if state.image == image:
            return False
        raise DeployError(f"nothing is planned for {image}: scripts/deploy plan {image} --stack {self.stack.name}")

    def _move(self, image: str, *, guarded: bool = True) -> bool:
        """Plan and roll out, or go on watching; answers whether there was anything to do.

        DeployError, Refused, RolledBack or Stuck; no change set is left.
        """
        token = under_way(self.stack, image)
        if token:
            self._watch(image, token)
            return True
        plan = self._plan(image, guarded=guarded)
        if plan:
            self._execute(plan)
        return plan is not None

    def _prove(self, image: str) -> dict[str, Any]:
        """Verify an image, and record it; answers what was seen.  NotVerified or AwsError."""
        seen = verify(self.stack, image, self.within)
        self.record.keep(image)
        return seen

    def _back(self, image: str) -> dict[str, Any]:
        """Roll back to an image; answers what was seen.  DeployError if it was not begun, or Stuck."""
        moved = False
        try:
            moved = self._move(image, guarded=False)
            return self._prove(image)
        except DeployError as error:
            if moved or isinstance(error, RolledBack):
                raise Stuck(f"{image} is not back: {error}") from error
            raise

    def undo(self, before: str, why: DeployError) -> NoReturn:
        """Bring back an image; RolledBack when it is back, or Stuck."""
        say(f"{why}: rolling back to {before}")
        try:
            self._back(before)
        except DeployError as error:
            raise Stuck(f"{why}; and then: {error}") from error
        raise RolledBack(f"{why}; rolled back to {before}")

    def _watch(self, image: str, token: str) -> None:
        """Go on watching; as Watch.run."""
        say("it is under way, and is watched from here")
        self.begun()
        try:
            Watch(self.stack, token, self.timeout).run()
        except RolledBack:
            self.stack.drop(named(image))
            raise

    def _execute(self, plan: Plan) -> None:
        """Roll out; a change set of which nothing can come any longer is removed."""
        try:
            roll_out(self.stack, plan, self.timeout, self.begun)
        except DeployError as error:
            if not isinstance(error, Stuck):
                self.stack.drop(plan.name)
            raise
