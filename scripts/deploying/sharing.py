"""Images for other accounts and regions of an organisation: copies, and permissions to start them.

A copy has the name, the tags and the deprecation date of its image, and the tag `chatd:copy-of`.  The account holds all
state, so that an interrupted run is repeated and makes no second copy.
"""

import datetime as dt
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from deploying.aws import POLL_SECONDS, Account, AwsError, Clock, DeployError, say
from deploying.images import find, tags, version

COPY: Final = "chatd:copy-of"
COPY_SECONDS: Final = 3600
"""The time limit for all copies."""


class Sharing:
    """The copies of one image, by region.  `account` returns a region of the account."""

    def __init__(self, account: Callable[[str], Account], region: str, image: str, clock: Clock) -> None:
        self._account, self._region, self._image, self._clock = account, region, image, clock
        version(account(region), image)
        self._source = find(account(region), image)

    def run(self, to: Mapping[str, str], users: Sequence[str]) -> dict[str, Any]:
        """Copy the image to regions, each with a key or "" for the default one, and let accounts start all of them."""
        self._check_date()
        if users:
            self._check_keys(to)
        made = {self._region: self._image}
        made |= {region: self._copy(region, key) for region, key in to.items() if region != self._region}
        self._wait(made)
        if users:  # an earlier run may have made a copy with another key
            for region, image in made.items():
                self._check_key(region, image)
        for region, image in made.items():
            self._deprecate(region, image)
            self._permit(region, image, users)
        return {"images": made, "accounts": list(users)}

    def _check_keys(self, to: Mapping[str, str]) -> None:
        """Raise DeployError if an image would be encrypted with a key that no other account may use."""
        lacking = [region for region, key in to.items() if not key and region != self._region]
        if lacking:
            raise DeployError(f"copies for other accounts need keys of your own: --to {lacking[0]}=KEY")
        self._check_key(self._region, self._image)

    def _check_key(self, region: str, image: str) -> None:
        """Raise DeployError if an image is encrypted with a key that no other account may use."""
        account = self._account(region)
        disks = find(account, image)["BlockDeviceMappings"]
        snapshots = [one["Ebs"]["SnapshotId"] for one in disks if "Ebs" in one]
        remedy = "bake with --var kms_key_id=KEY"
        if region != self._region:
            remedy = f"deregister it, and run this again with --to {region}=KEY"
        for snapshot in account.call("ec2", "describe_snapshots", SnapshotIds=snapshots)["Snapshots"]:
            key = snapshot.get("KmsKeyId")
            if key and account.call("kms", "describe_key", KeyId=key)["KeyMetadata"]["KeyManager"] == "AWS":
                raise DeployError(
                    f"the image {image} in {region} is encrypted with a key of AWS, which other accounts cannot use: "
                    f"{remedy}"
                )

    def _check_date(self) -> None:
        """Raise DeployError if the image is deprecated: EC2 gives no copy a date in the past."""
        at = self._source.get("DeprecationTime")
        if at and dt.datetime.fromisoformat(at) <= dt.datetime.now(dt.UTC):
            raise DeployError(f"the image {self._image} is deprecated since {at}: bake another")

    def _copy(self, region: str, key: str) -> str:
        """Return the copy of the image in a region; start a copy unless one exists."""
        account = self._account(region)
        filters = [{"Name": f"tag:{COPY}", "Values": [self._image]}]
        for one in account.pages("ec2", "describe_images", "Images", Owners=["self"], Filters=filters):
            if one["State"] in ("pending", "available"):
                return str(one["ImageId"])
        given = [{"Key": name, "Value": value} for name, value in (tags(self._source) | {COPY: self._image}).items()]
        about = {
            "Name": self._source["Name"],
            "SourceImageId": self._image,
            "SourceRegion": self._region,
            "Encrypted": True,
            "TagSpecifications": [{"ResourceType": kind, "Tags": given} for kind in ("image", "snapshot")],
        }
        answer = account.call("ec2", "copy_image", **about, **({"KmsKeyId": key} if key else {}))
        say(f"copying {self._image} to {region}: {answer['ImageId']}")
        return str(answer["ImageId"])

    def _wait(self, made: Mapping[str, str]) -> None:
        """Wait until all images are available."""
        end = self._clock.now() + COPY_SECONDS
        for region, image in made.items():
            while (state := self._state(region, image)) == "pending":
                if self._clock.now() >= end:
                    raise DeployError(f"the image {image} in {region} is still pending: run this again")
                self._clock.sleep(POLL_SECONDS)
            if state != "available":
                raise DeployError(f"the image {image} in {region} is {state}: deregister it, and run this again")

    def _state(self, region: str, image: str) -> str:
        """Return the state of an image; after a passing error, and before EC2 knows the image, it is pending."""
        try:
            found = self._account(region).call("ec2", "describe_images", ImageIds=[image])["Images"]
        except AwsError as error:
            if error.passing or error.code == "InvalidAMIID.NotFound":
                return "pending"
            raise
        return str(found[0]["State"]) if found else "pending"

    def _deprecate(self, region: str, image: str) -> None:
        """Give a copy the deprecation date of its image, which EC2 does not copy."""
        if region != self._region and "DeprecationTime" in self._source:
            at = self._source["DeprecationTime"]
            self._account(region).call("ec2", "enable_image_deprecation", ImageId=image, DeprecateAt=at)

    def _permit(self, region: str, image: str, users: Sequence[str]) -> None:
        """Let accounts start an image."""
        if users:
            add = [{"UserId": user} for user in users]
            self._account(region).call("ec2", "modify_image_attribute", ImageId=image, LaunchPermission={"Add": add})
            say(f"{image} in {region} is shared with {', '.join(users)}")
