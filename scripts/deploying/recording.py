"""A recording of what AWS answers: the calls of the proof, as one file of JSON lines for each step.

A line has a call with its arguments and its answer.  It has only those members of the answer that the commands read, as
`KEPT` lists them.  Account numbers, names and hosts are replaced in the same way wherever they occur.  So people
can publish a recording, and the tests can replay it, because they replace the same texts in what they ask.

A read that gets the same answer again before the next change makes no new line: `times` of its line counts it.  The
events of the stack are in the lines once, although each poll has all of them again.
"""

import datetime as dt
import json
import pathlib
import re
from collections.abc import Collection, Mapping
from typing import Any, Final

from deploying.aws import Account
from deploying.images import TAG
from deploying.stack import IMAGE

EVENTS: Final = "StackEvents"
"""The member with the events of a stack, the newest first."""
KEPT: Final = frozenset(
    (
        *(
            "Code",
            "Error",
            "Id",
            "Key",
            "Message",
            "Name",
            "NextToken",
            "State",
            "Status",
            "StatusReason",
            "Tags",
            "Value",
        ),
        *("OutputKey", "OutputValue", "Outputs", "ParameterKey", "ParameterValue", "Parameters"),
        *("StackId", "StackStatus", "StackStatusReason", "Stacks"),
        *("ClientRequestToken", "EventId", "ResourceStatus", "ResourceStatusReason", "Timestamp", EVENTS),
        *("ChangeSetId", "ChangeSetName", "Changes", "ExecutionStatus", "ResourceChange"),
        *("Action", "LogicalResourceId", "PhysicalResourceId", "Replacement", "ResourceType"),
        *("Attribute", "CausingEntity", "ChangeSource", "Details", "Evaluation", "RequiresRecreation"),
        *("AlarmName", "CompositeAlarms", "MetricAlarms", "StateValue"),
        *("AutoScalingGroups", "InstanceRefreshId", "InstanceRefreshes", "LifecycleState", "PercentageComplete"),
        *("ImageId", "InstanceId", "Instances", "Reservations", "Target", "TargetHealth", "TargetHealthDescriptions"),
        *("Architecture", "BlockDeviceMappings", "CreationDate", "Ebs", "Images", "SnapshotId", "Snapshots"),
        *("GranteePrincipal", "Grants", "KeyManager", "KeyMetadata", "KmsKeyId", "Operations", "Policy"),
        *("Account", "Arn", "Clusters", "OwnerId", "Parameter", "StackResources", "Version"),
    ),
)
"""The members of answers that a recording has."""
HIDDEN: Final = "HIDDEN"
ACCOUNT: Final = "123456789012"
REPLACED: Final = (
    (re.compile(r"(?<!\d)\d{12}(?!\d)"), ACCOUNT),
    (re.compile(r"(?<!\d)20\d{12}(?!\d)"), "20260101000000"),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), HIDDEN),
    (re.compile(r"(arn:aws[a-z-]*:(?:iam|sts)::\d{12}:[a-z-]+/)(?!aws-service-role/)[^\s\"',)]+"), rf"\1{HIDDEN}"),
    (re.compile(r"(://)[^/\s\"',)]+"), r"\1host.example"),
    (re.compile(r"\b(?:[\w-]+\.){2,}amazonaws\.com"), "host.example"),
    (re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}\b"), "192.0.2.1"),
)
"""Replacements in each text, in this order: account numbers, times in names, keys, people, hosts and addresses."""
SECRET: Final = 8
"""The length from which a given parameter is replaced in every text: shorter ones are numbers and words."""
READS: Final = ("Describe", "Get", "List")
"""How the names of operations begin that change nothing."""


def changes(call: str) -> bool:
    """Return whether a call changes something."""
    return not call.partition(":")[2].startswith(READS)


def anonymous(value: Any, secrets: Collection[str] = ()) -> Any:
    """Return arguments or an answer without what tells an account from others, and without templates."""
    if isinstance(value, Mapping):
        found = {key: anonymous(one, secrets) for key, one in value.items() if key != "TemplateBody"}
        if found.get("ParameterValue") and found.get("ParameterKey") != IMAGE:
            found["ParameterValue"] = HIDDEN
        if "Tags" in found:
            prefix = TAG.partition(":")[0]
            found["Tags"] = [one for one in found["Tags"] if one["Key"].partition(":")[0] == prefix]
        return {key: one for key, one in found.items() if key != "Tags" or one}
    if isinstance(value, list):
        return [anonymous(one, secrets) for one in value]
    if isinstance(value, dt.datetime):
        return value.isoformat()
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, HIDDEN)
        for pattern, text in REPLACED:
            value = pattern.sub(text, value)
    return value


def kept(answer: Any) -> Any:
    """Return an answer with only the members in `KEPT`."""
    if isinstance(answer, Mapping):
        return {key: kept(one) for key, one in answer.items() if key in KEPT}
    return [kept(one) for one in answer] if isinstance(answer, list) else answer


def question(call: str, arguments: Mapping[str, Any]) -> str:
    """Return a call with its arguments as a text, by which a replay finds the answer."""
    return f"{call} {json.dumps(arguments, sort_keys=True)}"


class Recording:
    """The lines of the present step.  `given` has the parameters of the stack.  Without a folder nothing is written."""

    def __init__(self, account: Account, folder: pathlib.Path | None, given: Mapping[str, str]) -> None:
        self._folder = folder
        self._secrets = [text for text in given.values() if len(text) >= SECRET]
        self._lines: list[dict[str, Any]] = []
        self._latest: dict[str, dict[str, Any]] = {}
        """The latest line of each read since the latest change, by its question."""
        self._events: set[str] = set()
        self._number = 0
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            account.listen(self._hear)

    def begin(self) -> None:
        """Begin a step: forget what was heard between the steps."""
        self._lines.clear()
        self._latest.clear()

    def write(self, step: str) -> None:
        """Write the lines of the step."""
        self._number += 1
        if self._folder:
            text = "".join(f"{json.dumps(line, separators=(',', ':'))}\n" for line in self._lines)
            (self._folder / f"{self._number}-{step}.jsonl").write_text(text, encoding="utf-8")

    def _hear(self, call: str, arguments: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
        """Note an answer."""
        if EVENTS in answer:
            answer = {EVENTS: [one for one in answer[EVENTS] if one["EventId"] not in self._events]}
            self._events |= {one["EventId"] for one in answer[EVENTS]}
        asked, told = anonymous(arguments, self._secrets), anonymous(kept(answer), self._secrets)
        more = EVENTS in told and "NextToken" in asked
        if more:  # a further page of the latest answer
            del asked["NextToken"]
        line = {"call": call, "arguments": asked, "answer": told}
        if "Error" in answer:
            line["status"] = answer["ResponseMetadata"]["HTTPStatusCode"]
        key = question(call, asked)
        latest = self._latest.get(key)
        if changes(call):
            self._latest.clear()
            self._lines.append(line)
        elif latest and more:
            latest["answer"][EVENTS] += told[EVENTS]
        elif latest and told in (latest["answer"], {EVENTS: []}):
            latest["times"] += 1
        else:
            self._latest[key] = line | {"times": 1}
            self._lines.append(self._latest[key])
