"""The pipeline of an image: planned, rolled out, verified and recorded; and the rollback.

Any failure after the execution of the change set has begun ends with the previous image in service, or with Stuck.
"""

import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, NoReturn

from deploying.aws import DeployError, RolledBack, Stuck, say
from deploying.check import aim, findings, launchable
from deploying.images import version
from deploying.record import Record
from deploying.rollout import Watch, roll_out, under_way
from deploying.stack import IMAGE, REVIEW, Plan, Stack, State, body_of, described, named
from deploying.verify import running, verify


class Pipeline(NamedTuple):
    """The stages of an image on its way to a stack."""

    stack: Stack
    default: pathlib.Path
    """The template for a new stack."""
    template: str | None
    """The text of the template that replaces the stack's."""
    parameters: Mapping[str, str]
    allow: Collection[str]
    role: str | None
    tags: Mapping[str, str]
    timeout: float
    """The time limit of a rollout in seconds."""
    within: float
    """The time limit of the verification in seconds."""
    begun: Callable[[], None]
    """Called before the first change in the account."""

    @property
    def record(self) -> Record:
        """The record of verified images."""
        return Record(self.stack.account, self.stack.name)

    # The commands; each returns its result

    def plan(self, image: str) -> dict[str, Any]:
        """Make the change set for an image and leave it in place; raises DeployError or CallDenied."""
        plan = self._plan(image)
        return {"image": image, "change_set": plan and plan.name, "changes": plan.changes if plan else []}

    def check(self, image: str | None) -> dict[str, Any]:
        """Return what would stop the stack or a rollout, and what was not checked."""
        body, replaces = self.template or body_of(self.default), self.template is not None
        found, skipped = findings(aim(self.stack, image, body, self.parameters, self.role, replaces=replaces))
        return {"findings": found, "skipped": skipped}

    def roll_out(self, image: str) -> dict[str, Any]:
        """Roll out a planned image, or continue watching; raises DeployError, CallDenied, RolledBack or Stuck."""
        return {"image": image, "rolled_out": self._roll_out(image)}

    def verify(self, image: str | None) -> dict[str, Any]:
        """Verify and record an image, by default that of the stack; raises DeployError."""
        image = image or self.stack.there().image
        if not image:
            raise DeployError(
                f"the stack {self.stack.name} has no parameter {IMAGE}: was it made from scripts/deploying/stack.yaml?"
            )
        return self._prove(image)

    def rollback(self, image: str | None) -> dict[str, Any]:
        """Roll back to an image, by default the last-good one; raises DeployError, CallDenied or Stuck."""
        image = image or self.record.last_good()
        if not image:
            raise DeployError(f"no image of {self.stack.name} is verified: name one with --image")
        return self._back(image)

    def ship(self, image: str) -> dict[str, Any]:
        """Roll out, verify and record an image; returns the details of the verification.

        Raises DeployError or CallDenied if the rollout did not begin, RolledBack or Stuck if it failed.
        """
        state = self.stack.look()
        before = self.record.last_good() or (state.image if state else None)
        if state and state.outputs and state.image:
            # A missing permission to verify shows now, before anything is changed.
            running(self.stack.account, state, state.image)
        former = self._former(state)
        moved = self._move(image)
        try:
            return self._prove(image)
        except DeployError as error:
            if before is None or (before == image and not (moved and (former.template or former.parameters))):
                if not moved:
                    raise
                raise Stuck(f"{error}; there is no image to go back to") from error
            stays = self.template is not None and not (moved and former.template)
            former.undo(before, error, stays=stays)

    # The steps

    def _former(self, state: State | None) -> "Pipeline":
        """Return a pipeline that restores the template and the parameters of the stack; raises AwsError.

        It has neither if they are not known, and no template if the stack keeps its own.
        """
        if state is None or state.busy:  # a busy stack may have the new ones already
            return self._replace(template=None, parameters={})
        parameters, names, template = state.parameters, {*self.parameters}, None
        if self.template and state.status != REVIEW:
            template = self.stack.template()
        if self.template and template:
            names |= parameters.keys() - self.stack.declared(self.template)
        former = {name: parameters[name] for name in names & parameters.keys()}
        return self._replace(template=template, parameters=former)

    def _plan(self, image: str, *, guarded: bool = True) -> Plan | None:
        """Make the change set for an image with the options given; raises as Stack.plan does."""
        version(self.stack.account, image)
        launchable(self.stack, image)
        plan = self.stack.plan(
            image,
            template=self.template,
            default=self.default,
            parameters=self.parameters,
            allow=self.allow,
            role=self.role,
            tags=self.tags,
            guarded=guarded,
        )
        for change in plan.changes if plan else ():
            say(described(change))
        return plan

    def _roll_out(self, image: str) -> bool:
        """Roll out a planned image, or continue watching; returns False if there was nothing to do."""
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
            raise RolledBack(f"{image} was rolled back: see the events of the stack")
        if state.image == image:
            return False
        raise DeployError(f"no change set for {image}: scripts/deploy plan {image} --stack {self.stack.name}")

    def _move(self, image: str, *, guarded: bool = True) -> bool:
        """Plan and roll out, or continue watching; returns False if there was nothing to do.

        Raises DeployError, CallDenied, RolledBack or Stuck, and leaves no change set but one that was there before.
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
        """Verify an image and record it; returns the details.  Raises NotVerified or AwsError."""
        seen = verify(self.stack, image, self.within)
        self.record.keep(image)
        return seen

    def _back(self, image: str) -> dict[str, Any]:
        """Roll back to an image; returns the details.  Raises DeployError if it did not begin, or Stuck."""
        moved = False
        try:
            moved = self._move(image, guarded=False)
            return self._prove(image)
        except DeployError as error:
            if moved or isinstance(error, RolledBack):
                raise Stuck(f"{image} is not restored: {error}") from error
            raise

    def undo(self, before: str, why: DeployError, *, stays: bool = False) -> NoReturn:
        """Restore an image; raises RolledBack when it is restored, otherwise Stuck.

        `stays` is true if the template remains that the run was given.
        """
        say(f"{why}: rolling back to {before}")
        try:
            self._back(before)
        except DeployError as error:
            raise Stuck(f"{why}; and then: {error}") from error
        remedy = f": to replace it, scripts/deploy ship --stack {self.stack.name} --image {before} --template FILE"
        more = f", but the stack keeps the template that was given{remedy}" if stays else ""
        raise RolledBack(f"{why}; rolled back to {before}{more}")

    def _watch(self, image: str, token: str) -> None:
        """Continue watching; raises as Watch.run does."""
        say("the rollout is in progress: watching it")
        self.begun()
        try:
            Watch(self.stack, token, self.timeout).run()
        except RolledBack:
            self.stack.drop(named(image))
            raise

    def _execute(self, plan: Plan) -> None:
        """Execute a plan, and remove its change set if it fails for good."""
        try:
            roll_out(self.stack, plan, self.timeout, self.begun)
        except DeployError as error:
            if not isinstance(error, Stuck):
                self.stack.drop(plan.name)
            raise
