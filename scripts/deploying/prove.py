"""The proof: one stack of its own that is created, changed, broken, repaired and destroyed at AWS.

The other modules are rehearsed against doubles, which answer as AWS documents it.  Only AWS can show that it does.  The
proof has no code that deploys.  It calls the functions of the commands, as a person does.  After each it asks AWS in
another way for what must be true now: the status, the image and the record of the stack, and a client that posts and
reads.

Commands wait in `Clock.sleep`.  An alarm or an abort during a rollout happens in a clock that acts in each pause.
The commands need no other entrance, and the proof no thread.

Whatever goes wrong, the proof ends with the removal of its stack and of its images, or with a line that states what
still exists and how to remove it.  The name of the stack is new, so the proof touches nothing else.

The calls of the steps can be recorded.  The tests replay the answers, and compare the doubles with them.
"""

import contextlib
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from deploying.aws import POLL_SECONDS, AwsError, CallDenied, Clock, DeployError, RolledBack, Stuck, say
from deploying.check import SURGE, aim
from deploying.destroy import Removal
from deploying.images import COMMIT, TAG, find, tags
from deploying.recording import Recording
from deploying.rollout import abort
from deploying.sharing import COPY_SECONDS
from deploying.ship import Pipeline
from deploying.stack import Stack, body_of
from deploying.verify import verify

HOURS: Final = 4
"""The hours that the estimate counts.  The steps take about three."""
DISK_GB: Final = 8
MONTH_HOURS: Final = 730
IMAGES: Final = 3
"""The images: the one to prove, its copy, and one without chatd."""
PRICES: Final = {
    "t4g.small": 0.0168,
    "c8g.large": 0.07976,
    "db.t4g.small": 0.0336,
    "db.t4g.medium": 0.0679,
    "db.r7g.large": 0.2163,
}
"""Dollars an hour in us-east-1; docs/deploy.md has the sources and dates of all prices here."""
BALANCER: Final = 0.0225 + 0.008
"""Dollars an hour, with one LCU."""
ADDRESS: Final = 0.005
GP3: Final = 0.08
SNAPSHOT: Final = 0.05
"""Dollars for a GB and a month, as GP3."""
DEBIAN: Final = "136693071363"
"""The account of Debian, whose image is the bad one: it boots, and has no chatd."""
CALM_SECONDS: Final = 900
"""How long an alarm may take to become OK."""
REFRESHING: Final = frozenset(("Pending", "InProgress", "Baking"))


class Unproved(DeployError):
    """A step failed, and the stack is gone."""

    status = 4


class Interrupted(KeyboardInterrupt):
    """An interrupt; the argument states what still exists."""


class Unlike(DeployError):
    """AWS did something else than the step expects."""


class Between(Clock):
    """A clock that acts in each pause of a command.  After a passing error it acts again in the next."""

    def __init__(self, clock: Clock, act: Callable[[], None]) -> None:
        self._clock = clock
        self._act = act

    def now(self) -> float:
        return self._clock.now()

    def sleep(self, seconds: float) -> None:
        try:
            self._act()
        except AwsError as error:
            if not error.passing:
                raise
            say(f"retrying: {error}")
        self._clock.sleep(seconds)


# The estimate


def estimate(parameters: Mapping[str, str]) -> tuple[list[str], float]:
    """Return what the proof costs: a line for each part, and the sum in dollars."""
    size = int(parameters["MinSize"])
    instances = size + max(1, math.ceil(SURGE * size))
    kind, node = parameters["InstanceType"], parameters["StoreNodeType"]
    nodes = 0 if parameters.get("StoreParameter") else 1 + int(parameters["StoreReplicas"])
    hourly = {
        f"{instances} instances of {kind}, of which a rollout starts {instances - size}": _price(kind, instances),
        f"{instances} disks of {DISK_GB} GB": instances * DISK_GB * GP3 / MONTH_HOURS,
        "a load balancer with one LCU": BALANCER,
        f"{nodes} nodes of MemoryDB, {node}": _price(node, nodes),
        f"{instances + 2} public addresses": (instances + 2) * ADDRESS,
    }
    parts = {f"{HOURS} hours of {what}": None if price is None else HOURS * price for what, price in hourly.items()}
    parts[f"a day of snapshots: {IMAGES} images of {DISK_GB} GB, one of MemoryDB"] = (
        IMAGES * DISK_GB * SNAPSHOT * 24 / MONTH_HOURS
    )
    lines = [f"  {'not known' if dollars is None else f'${dollars:.2f}'}  {what}" for what, dollars in parts.items()]
    return lines, sum(dollars or 0 for dollars in parts.values())


def _price(kind: str, number: int) -> float | None:
    """Return the price of a number of machines, or None if it is not known."""
    if not number:
        return 0.0
    return number * PRICES[kind] if kind in PRICES else None


# The steps


class Step(NamedTuple):
    """A step of the proof."""

    name: str
    proves: str
    run: Callable[[], str]
    """Does the step and checks it; returns what was seen, or raises DeployError."""


class Proof:
    """One run of the proof.  `image` returns the image to prove, and may bake it."""

    def __init__(
        self, pipeline: Pipeline, image: Callable[[], str], record: pathlib.Path | None, *, keep: bool
    ) -> None:
        self._pipeline = pipeline
        self._stack = pipeline.stack
        self._call = pipeline.stack.account.call
        self._clock = pipeline.stack.clock
        self._image = image
        self._keep = keep
        self._recording = Recording(pipeline.stack.account, record, pipeline.parameters)
        self.first = ""
        """The image to prove, which is last-good at the end."""
        self.next = ""
        """Its copy."""
        self.bad = ""
        """The image without chatd."""
        self._acted = False
        """True once the alarm or the abort of the present step has happened."""
        self._refresh = ""
        """The refresh of the instances in which it happens."""
        self._snapshot: str | None = None

    @property
    def all_steps(self) -> list[Step]:
        """The steps, in order.  The last is the removal."""
        return [
            Step("images", "a copy of an image can be made", self._images),
            Step("create", "a new account gets a stack that serves an image", self._create),
            Step("ship", "a new image replaces every instance", self._ship),
            Step("bad-image", "CloudFormation rolls back an image whose instances never become ready", self._bad_image),
            Step("alarm", "an alarm during a rollout rolls it back", self._alarm),
            Step("abort", "an abort during a rollout rolls it back", self._abort),
            Step("roll-back", "an earlier image returns in spite of an alarm", self._roll_back),
            Step("destroy", "the removal leaves only a snapshot of the messages", self._destroy),
        ]

    def run(self, confirm: Callable[[str], bool]) -> dict[str, Any]:
        """Run all steps after `confirm` returns true; returns what was seen.

        Raises DeployError if nothing was begun, Unproved if a step failed and the stack is gone, Stuck if it is left,
        and Interrupted.
        """
        name = self._stack.name
        if self._stack.look() is not None:
            raise CallDenied(f"the stack {name} exists: the proof needs a stack of its own")
        if not confirm(self._question()):
            raise DeployError(f"not confirmed: type the name of the stack, {name}")
        self._pipeline.begun()
        seen: list[dict[str, str]] = []
        *steps, removal = self.all_steps
        failed = ""
        try:
            for step in steps:
                failed = self.attempt(step, seen)
                if failed:
                    break
            if not self._keep:
                failed = "; ".join(filter(None, (failed, self.attempt(removal, seen))))
        except KeyboardInterrupt as stop:
            raise Interrupted(self.left()) from stop
        left = self.left()
        if failed and self._stack_left():
            raise Stuck(f"{failed}; {left}")
        if failed:
            raise Unproved(f"{failed}; {left}")
        return {"stack": name, "steps": seen, "left": left}

    def _question(self) -> str:
        body = self._pipeline.template or body_of(self._pipeline.default)
        target = aim(self._stack, None, body, self._pipeline.parameters, None)
        lines, dollars = estimate(target.parameters)
        return "\n".join(
            (
                f"The proof makes the stack {self._stack.name}, works on it for about three hours, and removes it.",
                "It costs about, at the prices of us-east-1:",
                *lines,
                f"  ${dollars:.2f}  together; not counted: a bake, logs and alarms (some cents), and tax",
                "Each hour more costs a quarter of the first lines.",
            )
        )

    def attempt(self, step: Step, seen: list[dict[str, str]]) -> str:
        """Run a step, print it and append it to `seen`; returns why it failed, or an empty text."""
        say(f"{step.name}: to prove: {step.proves}")
        self._acted, self._refresh = False, ""
        failed = ""
        self._recording.begin()
        try:
            text = step.run()
        except DeployError as error:
            failed = f"{step.name} is not proved: seen: {error}"
        except Exception as error:  # noqa: BLE001 -- an answer that nobody expected must not keep the stack alive
            failed = f"{step.name} is not proved: seen: {type(error).__name__}: {error}"
        finally:
            self._recording.write(step.name)
        if not failed:
            seen.append({"step": step.name, "proves": step.proves, "seen": text})
        say(failed or f"{step.name}: proved: {text}")
        return failed

    def _images(self) -> str:
        """Make the images: a copy of the first, and a copy of Debian's, which has no chatd."""
        self.first = self._image()
        source = find(self._stack.account, self.first)
        # Without the commit, by which `ship` would find the copy for another stack, before the proof removes it.
        tagged = {name: value for name, value in tags(source).items() if name != COMMIT}
        self.next = self._copy(self.first, "next", tagged)
        filters = [
            {"Name": "name", "Values": ["debian-13-*"]},
            {"Name": "architecture", "Values": [source["Architecture"]]},
        ]
        found = self._stack.account.pages("ec2", "describe_images", "Images", Owners=[DEBIAN], Filters=filters)
        newest = max(found, key=lambda one: (one["CreationDate"], one["ImageId"]), default=None)
        if newest is None:
            raise Unlike(f"Debian has no image for {source['Architecture']} in this region")
        self.bad = self._copy(newest["ImageId"], "bad", {TAG: "none"})
        until = self._clock.now() + COPY_SECONDS
        while pending := {self.next, self.bad} - {
            one["ImageId"] for one in self._copies() if one["State"] != "pending"
        }:
            if self._clock.now() >= until:
                raise Unlike(f"{', '.join(sorted(pending))} is still pending")
            self._clock.sleep(POLL_SECONDS)
        for image in (self.next, self.bad):
            find(self._stack.account, image)
        return f"{self.next} is a copy of {self.first}, and {self.bad} has no chatd"

    def _copy(self, image: str, word: str, tagged: Mapping[str, str]) -> str:
        """Copy an image within the region."""
        given = [{"Key": key, "Value": value} for key, value in tagged.items()]
        answer = self._call(
            "ec2",
            "copy_image",
            Name=f"{self._stack.name}-{word}",
            SourceImageId=image,
            SourceRegion=self._stack.account.region,
            Encrypted=True,
            TagSpecifications=[{"ResourceType": kind, "Tags": given} for kind in ("image", "snapshot")],
        )
        return str(answer["ImageId"])

    def _copies(self) -> list[dict[str, Any]]:
        """Return the images that the proof made, by their names."""
        filters = [{"Name": "name", "Values": [f"{self._stack.name}-*"]}]
        return [*self._stack.account.pages("ec2", "describe_images", "Images", Owners=["self"], Filters=filters)]

    def _create(self) -> str:
        self._pipeline.ship(self.first)
        return self._serves(self.first, "CREATE_COMPLETE")

    def _ship(self) -> str:
        self._pipeline.ship(self.next)
        return self._serves(self.next, "UPDATE_COMPLETE")

    def _bad_image(self) -> str:
        why = self._rolled_back(lambda: self._pipeline.ship(self.bad))
        return f"{self._serves(self.next, 'UPDATE_ROLLBACK_COMPLETE')}; {why}"

    def _alarm(self) -> str:
        why = self._rolled_back(lambda: self._during(self._ring_in_refresh).ship(self.first))
        if not self._acted:
            raise Unlike(f"it was rolled back before the alarm: {why}")
        self._set_alarm("OK")
        return f"{self._serves(self.next, 'UPDATE_ROLLBACK_COMPLETE')}; {why}"

    def _abort(self) -> str:
        why = self._rolled_back(lambda: self._during(self._abort_in_refresh).ship(self.first))
        if not self._acted:
            raise Unlike(f"it was rolled back before the abort: {why}")
        return f"{self._serves(self.next, 'UPDATE_ROLLBACK_COMPLETE')}; {why}"

    def _roll_back(self) -> str:
        self._ring()
        self._during(self._ring).rollback(self.first)
        if not self._acted:
            raise Unlike("no alarm was on")
        self._set_alarm("OK")
        return self._serves(self.first, "UPDATE_COMPLETE")

    def _destroy(self) -> str:
        if self._stack.look() is not None:
            with contextlib.suppress(DeployError):  # most often nothing is in progress
                abort(self._stack, self._pipeline.timeout)
            removal = Removal(self._stack, self._pipeline.timeout, self._pipeline.role, self._pipeline.begun)
            self._snapshot = removal.run(lambda _: True)["snapshot"]
        for one in self._copies():
            self._call("ec2", "deregister_image", ImageId=one["ImageId"], DeleteAssociatedSnapshots=True)
        groups = self._call("autoscaling", "describe_auto_scaling_groups", AutoScalingGroupNames=[self._stack.name])
        wrong = ["the group"] if groups["AutoScalingGroups"] else []
        wrong += ["the record"] if self._pipeline.record.last_good() else []
        wrong += ["the stack"] if self._stack.look() is not None else []
        wrong += [one["ImageId"] for one in self._copies()]
        if wrong:
            raise Unlike(f"{', '.join(wrong)} still exists")
        return "no stack, no instance, no image of the proof"

    # Actions during a command

    def _during(self, act: Callable[[], None]) -> Pipeline:
        """Return the pipeline with a clock that acts in each pause."""
        clock = Between(self._clock, act)
        return self._pipeline._replace(stack=Stack(self._stack.account, self._stack.name, clock))

    def _refreshing(self) -> bool:
        """Return whether the rollout replaces instances now; the refresh that rolls it back is another one."""
        arguments = {"AutoScalingGroupName": self._stack.name, "MaxRecords": 1}
        for one in self._call("autoscaling", "describe_instance_refreshes", **arguments)["InstanceRefreshes"]:
            if one["Status"] in REFRESHING:
                self._refresh = self._refresh or one["InstanceRefreshId"]
                return bool(self._refresh == one["InstanceRefreshId"])
        return False

    def _ring(self) -> None:
        """Set an alarm off.  CloudWatch evaluates it again within a minute, so this is repeated."""
        self._set_alarm("ALARM")
        self._acted = True

    def _ring_in_refresh(self) -> None:
        if self._refreshing():
            self._ring()

    def _abort_in_refresh(self) -> None:
        if not self._acted and self._refreshing():
            self._acted = True
            abort(self._stack, self._pipeline.timeout)

    def _set_alarm(self, state: str) -> None:
        name = f"{self._stack.name}-errors"
        why = "scripts/deploy prove"
        self._call("cloudwatch", "set_alarm_state", AlarmName=name, StateValue=state, StateReason=why)

    # Checks

    def _serves(self, image: str, status: str) -> str:
        """Check the status of the stack, the image that it runs, serves and has on record, and its alarms."""
        state = self._stack.there()
        good = self._pipeline.record.last_good()
        wrong = [f"the stack is {state.status}, not {status}"] if state.status != status else []
        wrong += [f"its image is {state.image}, not {image}"] if state.image != image else []
        wrong += [f"last-good is {good}, not {image}"] if good != image else []
        if wrong:
            raise Unlike(", ".join(wrong))
        self._calm()
        found = verify(self._stack, image, self._pipeline.within)
        return f"{status}, {image} on {len(found['instances'])} instances"

    def _calm(self) -> None:
        """Wait until all alarms are OK, which the next rollout needs; raises Unlike.

        Those of a new stack have no data at first, and one that went off needs minutes.
        """
        until = self._clock.now() + CALM_SECONDS
        while True:
            try:
                self._stack.quiet(self._stack.there())
            except CallDenied as error:
                if self._clock.now() >= until:
                    raise Unlike(f"after {CALM_SECONDS // 60} minutes {error}") from error
            else:
                return
            self._clock.sleep(POLL_SECONDS)

    @staticmethod
    def _rolled_back(act: Callable[[], Any]) -> str:
        """Return why a rollout was rolled back; raises Unlike if it was not, or if it only took too long."""
        try:
            act()
        except RolledBack as error:
            if "not complete after" in str(error):
                raise Unlike(str(error)) from error
            return str(error)
        raise Unlike("the rollout succeeded")

    # Leftovers

    def _stack_left(self) -> bool:
        """Return whether the stack exists, or AWS does not answer."""
        try:
            return self._stack.look() is not None
        except AwsError:
            return True

    def left(self) -> str:
        """Return what still exists, and the commands that remove it."""
        region = f"--region {self._stack.account.region}"
        name = self._stack.name
        parts = []
        if self._stack_left():
            arguments = f"--stack {name} {region}" + (
                f" --role-arn {self._pipeline.role}" if self._pipeline.role else ""
            )
            parts.append(
                f"the stack {name} (if a rollout is in progress, first scripts/deploy abort --stack {name}): "
                f"scripts/deploy destroy {arguments}"
            )
        try:
            copies = [str(one["ImageId"]) for one in self._copies()]
        except AwsError:
            copies = [one for one in (self.next, self.bad) if one]
        remove = f"aws ec2 deregister-image {region} --delete-associated-snapshots --image-id"
        parts += [f"the image {image}: {remove} {image}" for image in copies]
        if self._snapshot:
            parts.append(
                f"the snapshot {self._snapshot}: aws memorydb delete-snapshot {region} --snapshot-name {self._snapshot}"
            )
        return f"what still exists: {'; '.join(parts)}" if parts else "nothing of the proof still exists"
