"""The record of verified images: the SSM parameter `/chatd/STACK/image`.

Each verified image is a version of the parameter.  The label `last-good` marks the latest one.
"""

from collections.abc import Iterator

from deploying.aws import Account, AwsError, say

LABEL = "last-good"
ABSENT = frozenset(("ParameterNotFound", "ParameterVersionNotFound"))


class Record:
    """The record of a stack."""

    def __init__(self, account: Account, stack: str) -> None:
        self._account = account
        self._name = f"/chatd/{stack}/image"

    def last_good(self) -> str | None:
        """Return the image labelled last-good, or None."""
        return self._read(f"{self._name}:{LABEL}")[0]

    def keep(self, image: str) -> bool:
        """Record and label a verified image; returns False if it had the label already."""
        if self.last_good() == image:
            return False
        latest, version = self._read(self._name)
        if latest != image:  # otherwise an earlier run was interrupted before the label
            arguments = {"Name": self._name, "Value": image, "Type": "String", "Overwrite": True}
            version = self._account.call("ssm", "put_parameter", **arguments)["Version"]
        arguments = {"Name": self._name, "ParameterVersion": version, "Labels": [LABEL]}
        self._account.call("ssm", "label_parameter_version", **arguments)
        say(f"{image} is {LABEL} in {self._name}")
        return True

    def forget(self) -> None:
        """Delete the record of a stack that no longer exists."""
        try:
            self._account.call("ssm", "delete_parameter", Name=self._name)
        except AwsError as error:
            if error.code not in ABSENT:
                raise

    def images(self) -> Iterator[str]:
        """Yield the image labelled last-good, and the latest one on record."""
        for name in (f"{self._name}:{LABEL}", self._name):
            image, _ = self._read(name)
            if image:
                yield image

    def _read(self, name: str) -> tuple[str | None, int]:
        """Return the value and the number of a version of the parameter."""
        try:
            found = self._account.call("ssm", "get_parameter", Name=name)["Parameter"]
        except AwsError as error:
            if error.code in ABSENT:
                return None, 0
            raise
        return found["Value"], found["Version"]


def stacks(account: Account) -> Iterator[str]:
    """Yield the names of the stacks that have a record."""
    filters = [{"Key": "Path", "Option": "Recursive", "Values": ["/chatd"]}]
    for one in account.pages("ssm", "describe_parameters", "Parameters", ParameterFilters=filters):
        parts = one["Name"].split("/")
        if len(parts) == 4 and parts[3] == "image":  # noqa: PLR2004 -- of /chatd/STACK/image
            yield parts[2]
