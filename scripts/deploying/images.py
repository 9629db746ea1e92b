"""The images, and the removal of old ones.

An image is ours if this account owns it, its name begins with chatd-, and it has the tag `chatd:version`.  It is kept
while anything needs it: an instance, the launch template of a group, a stack, or a record of verified images.
"""

import datetime as dt
import re
from collections.abc import Iterator
from typing import Any, Final

from deploying.aws import DENIED, INVALID, Account, AwsError, DeployError, say
from deploying.record import Record, stacks
from deploying.stack import IMAGE

TAG: Final = "chatd:version"
COMMIT: Final = "chatd:git-sha"
ABSENT: Final = frozenset(("InvalidAMIID.NotFound", "InvalidAMIID.Malformed", "InvalidAMIID.Unavailable"))
ALIVE: Final = ["pending", "running", "shutting-down", "stopping", "stopped"]
NAME: Final = re.compile(r"chatd-(.+)-(?:arm64|amd64)-\d{8}-\d{6}")
"""The name of an image.  An account to which an image is shared sees its name, and only tags of its own."""
MACHINES: Final = {"arm64": "arm64", "amd64": "x86_64"}
"""Names of architectures in EC2."""


def tags(image: dict[str, Any]) -> dict[str, str]:
    """Return the tags of an image."""
    return {one["Key"]: one["Value"] for one in image.get("Tags", [])}


def find(account: Account, image: str) -> dict[str, Any]:
    """Return the description of an image; raises DeployError if it does not exist or is not available."""
    try:
        found = account.call("ec2", "describe_images", ImageIds=[image])["Images"]
    except AwsError as error:
        if error.code not in ABSENT:
            raise
        found = []
    if not found or found[0]["State"] != "available":
        state = found[0]["State"] if found else "missing"
        raise DeployError(f"the image {image} is {state}: use one that scripts/deploy bake made in this region")
    return dict(found[0])


def version(account: Account, image: str) -> str:
    """Return the version of chatd in an image; raises DeployError if the image is not ours."""
    found = find(account, image)
    tagged, name = tags(found), NAME.fullmatch(found.get("Name", ""))
    if TAG not in tagged and name:
        return name[1]
    if TAG not in tagged:
        raise DeployError(f"the image {image} has no tag {TAG}: use one that scripts/deploy bake made")
    return tagged[TAG]


def ours(account: Account) -> list[dict[str, Any]]:
    """Return the images that are ours, newest first."""
    filters = [{"Name": "name", "Values": ["chatd-*"]}, {"Name": "tag-key", "Values": [TAG]}]
    found = account.pages("ec2", "describe_images", "Images", Owners=["self"], Filters=filters)
    return sorted(found, key=lambda one: (one["CreationDate"], one["ImageId"]), reverse=True)


def of_commit(account: Account, commit: str, architecture: str) -> str | None:
    """Return the newest image made from a commit, or None."""
    for one in ours(account):
        wanted = tags(one).get(COMMIT) == commit and one["Architecture"] == MACHINES[architecture]
        if wanted and one["State"] == "available":
            return str(one["ImageId"])
    return None


def needed(account: Account) -> Iterator[tuple[str, str]]:
    """Yield the images in use, each with the reason.  Some are not ours, and some occur more than once."""
    alive = [{"Name": "instance-state-name", "Values": ALIVE}]
    for reservation in account.pages("ec2", "describe_instances", "Reservations", Filters=alive):
        yield from ((one["ImageId"], f"{one['InstanceId']} runs it") for one in reservation["Instances"])
    for template, number in _templates(account):
        arguments = {"LaunchTemplateId": template, "Versions": [number]}
        for one in account.call("ec2", "describe_launch_template_versions", **arguments)["LaunchTemplateVersions"]:
            yield one["LaunchTemplateData"].get("ImageId", ""), f"{template}, version {number}, launches it"
    for one in account.pages("cloudformation", "describe_stacks", "Stacks"):
        values = {two["ParameterKey"]: two.get("ParameterValue", "") for two in one.get("Parameters", [])}
        yield values.get(IMAGE, ""), f"the stack {one['StackName']} names it"
    for stack in stacks(account):
        yield from ((image, f"it is verified for {stack}") for image in Record(account, stack).images())


def _templates(account: Account) -> set[tuple[str, str]]:
    """Return the launch templates of all groups, with the versions in use."""
    found = set()
    for group in account.pages("autoscaling", "describe_auto_scaling_groups", "AutoScalingGroups"):
        mixed = group.get("MixedInstancesPolicy", {}).get("LaunchTemplate", {})
        overrides = [one.get("LaunchTemplateSpecification") for one in mixed.get("Overrides", [])]
        for one in (group.get("LaunchTemplate"), mixed.get("LaunchTemplateSpecification"), *overrides):
            if one and "LaunchTemplateId" in one:
                found.add((one["LaunchTemplateId"], one.get("Version", "$Default")))
    return found


def shared(account: Account, image: dict[str, Any]) -> str:
    """Return why an image that other accounts may start is kept, or "": they may need it until its deprecation date."""
    until = image.get("DeprecationTime")
    if until and dt.datetime.fromisoformat(until) <= dt.datetime.now(dt.UTC):
        return ""
    answer = account.call("ec2", "describe_image_attribute", ImageId=image["ImageId"], Attribute="launchPermission")
    users = sorted(
        str(one.get("UserId") or one.get("Group") or "others") for one in answer.get("LaunchPermissions", [])
    )
    return f"it is shared with {', '.join(users)}" + (f" until {until}" if until else "") if users else ""


def collect(account: Account, keep: int, *, really: bool) -> dict[str, Any]:
    """Deregister our images and their snapshots, except the newest of each architecture and all that are in use.

    Without `really` nothing is removed.  Returns the images to remove, and those kept with the reason.
    """
    candidates = ours(account)
    why: dict[str, str] = {}
    for image, reason in needed(account):
        why.setdefault(image, reason)
    newest: dict[str, int] = {}
    gone = []
    kept = []
    for one in candidates:
        image, architecture = one["ImageId"], one["Architecture"]
        newest[architecture] = newest.get(architecture, 0) + 1
        if newest[architecture] <= keep:
            why.setdefault(image, f"it is one of the {keep} newest for {architecture}")
        if image not in why and (reason := shared(account, one)):
            why[image] = reason
        if image in why:
            kept.append({"image": image, "why": why[image]})
            continue
        if really and (reason := _remove(account, image)):
            kept.append({"image": image, "why": reason})
            continue
        gone.append(image)
        say(f"{image} {one['Name']} " + ("removed" if really else "would be removed: --yes removes it"))
    return {"images": gone, "removed": really, "kept": kept}


def _remove(account: Account, image: str) -> str:
    """Deregister an image and delete its snapshots; returns why EC2 refuses it, or "".

    EC2 may protect an image against deregistration, which says nothing about the next one.
    """
    try:
        answer = account.call("ec2", "deregister_image", ImageId=image, DeleteAssociatedSnapshots=True)
    except AwsError as error:
        if error.passing or error.code in DENIED | INVALID or not error.code:
            raise
        say(f"{image} is not removed: {error}")
        return str(error)
    for result in answer.get("DeleteSnapshotResults", []):
        if result.get("ReturnCode") not in ("success", None):
            say(f"the snapshot {result.get('SnapshotId')} was not deleted: {result['ReturnCode']}")
    return ""
