"""The check that all instances run the image and serve.

Three things must hold at once.  Each instance in service was launched from the image.  Each of them is a healthy
target, and no other target gets new clients.  A client that joins through the load balancer posts, reads its message
back, and sees the version that the image is tagged with.
"""

import os
import pathlib
import subprocess
import sys
from typing import Any, Final

from deploying.aws import POLL_SECONDS, Account, AwsError, DeployError, say
from deploying.images import COMMIT, find, tags, version
from deploying.stack import Stack, State

ROOT: Final = pathlib.Path(__file__).resolve().parent.parent.parent
ECHO_SECONDS: Final = 20
"""The time limit for a client to join, post and read."""
ROOM: Final = "rooms/launch"
"""The room of the test message, which nobody reads."""
LEAVING: Final = "draining"
"""The state of a target that gets no new clients."""


class NotVerified(DeployError):
    """The instances do not run the image, or do not serve."""


def verify(stack: Stack, image: str, within: float) -> dict[str, Any]:
    """Wait, at most `within` seconds, until all instances run the image and serve; returns the details.

    Raises NotVerified or AwsError.
    """
    expected = version(stack.account, image)
    commit = tags(find(stack.account, image)).get(COMMIT, "")
    state = stack.there()
    url = state.output("WebSocketURL")
    deadline = stack.clock.now() + within
    reported = ""
    while True:
        try:
            wrong, instances = running(stack.account, state, image)
            wrong = wrong or echo(url, expected)
        except AwsError as error:
            if not error.passing:
                raise
            wrong = str(error)
        if not wrong:
            return {"image": image, "version": expected, "commit": commit, "instances": instances, "url": url}
        if stack.clock.now() >= deadline:
            raise NotVerified(f"{image} is not verified: {wrong}")
        if wrong != reported:
            say(f"not yet: {wrong}")
            reported = wrong
        stack.clock.sleep(POLL_SECONDS)


def running(account: Account, state: State, image: str) -> tuple[str, list[str]]:
    """Return the faults of the instances and their targets (empty if none), and the instances in service."""
    group, target_group = state.output("AutoScalingGroup"), state.output("TargetGroup")
    groups = account.call("autoscaling", "describe_auto_scaling_groups", AutoScalingGroupNames=[group])
    if not groups["AutoScalingGroups"]:
        return f"there is no group {group}", []
    members = groups["AutoScalingGroups"][0]["Instances"]
    serving = sorted(one["InstanceId"] for one in members if one["LifecycleState"] == "InService")
    if not serving:
        return f"no instance of {group} is in service", []
    images = {
        one["InstanceId"]: one["ImageId"]
        for reservation in account.pages("ec2", "describe_instances", "Reservations", InstanceIds=serving)
        for one in reservation["Instances"]
    }
    health = {
        one["Target"]["Id"]: one["TargetHealth"]["State"]
        for one in account.call("elbv2", "describe_target_health", TargetGroupArn=target_group)[
            "TargetHealthDescriptions"
        ]
    }
    wrong = [f"{one} runs {images.get(one, 'nothing')}" for one in serving if images.get(one) != image]
    wrong += [f"{one} is not a target" for one in serving if one not in health]
    wrong += [f"{one} is {word}" for one, word in sorted(health.items()) if word not in ("healthy", LEAVING)]
    wrong += [f"{one} is {LEAVING}" for one in serving if health.get(one) == LEAVING]
    return ", ".join(wrong), serving


def echo(url: str, expected: str) -> str:
    """Return the fault that a client sees (empty if none)."""
    script = ROOT / "packer" / "files" / "chatd_echo.py"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(  # noqa: S603 -- our own script
        [sys.executable, script, f"{url.rstrip('/')}/{ROOM}", str(ECHO_SECONDS)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        return f"{url}: {(result.stderr.strip().splitlines() or ['the client ended'])[-1]}"
    server = result.stdout.strip()
    return "" if server == f"chatd/{expected}" else f"{url} is {server}, not chatd/{expected}"
