"""Recordings of scripts/deploy prove: what AWS answered in each step, and how the answers of the doubles differ.

AWS answers more than the doubles: more attributes, and more events of the resources.  It must answer all that they
answer.  The changes of a change set, and the statuses of the stack, must be the same.
"""

import json

STACK = "AWS::CloudFormation::Stack"
SAME = ("changes", "stack")
"""Kinds that must be the same on both sides.  Of the rest the doubles answer a part."""


def read(folder):
    """Return what a recording holds: for each step, sets of shapes and statuses."""
    found, known = {}, set()
    for path in sorted(folder.glob("*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found[path.stem] = _step(lines, known)
    return found


def differences(recorded, answered):
    """Return how the doubles differ from a recording."""
    found = [f"{step}: only one side has this step" for step in sorted(recorded.keys() ^ answered.keys())]
    for step in recorded.keys() & answered.keys():
        for kind, answers in answered[step].items():
            expected = recorded[step][kind]
            found += [f"{step}: AWS does not answer: {kind}: {one}" for one in sorted(answers - expected)]
            if kind in SAME:
                found += [f"{step}: only AWS answers: {kind}: {one}" for one in sorted(expected - answers)]
    return found


def _step(lines, known):
    """Return what the lines of a step hold; `known` has the ids of the refreshes of earlier steps."""
    kinds = {kind: set() for kind in ("shapes", "changes", "planned", "stack", "resources", "refreshes", "alarms")}
    new = set()
    for line in lines:
        operation, answer = line["operation"], line["answer"]
        kinds["shapes"] |= {f"{operation}{path}" for path in _paths(answer)}
        if operation == "DescribeChangeSet":
            kinds["planned"].add(f"{answer['Status']}, {answer['ExecutionStatus']}")
            kinds["changes"] |= {_change(one["ResourceChange"]) for one in answer.get("Changes", [])}
        for one in answer.get("StackEvents", []):
            own = one["ResourceType"] == STACK
            status = one["ResourceStatus"]
            kinds["stack" if own else "resources"].add(status if own else f"{one['LogicalResourceId']} {status}")
        for one in answer.get("InstanceRefreshes", []):
            if one["InstanceRefreshId"] not in known:
                new.add(one["InstanceRefreshId"])
                kinds["refreshes"].add(one["Status"])
        for one in (*answer.get("MetricAlarms", []), *answer.get("CompositeAlarms", [])):
            kinds["alarms"].add(f"{one['AlarmName'].rpartition('-')[2]} {one['StateValue']}")
    known |= new
    return kinds


def _paths(value, path=""):
    """Yield the path and the type of each value of an answer."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from _paths(one, f"{path}.{key}")
    elif isinstance(value, list):
        for one in value:
            yield from _paths(one, f"{path}[]")
    else:
        yield f"{path}: {type(value).__name__}"


def _change(change):
    """Return a change as a line, with what causes it."""
    head = [change["Action"], change["LogicalResourceId"], change["ResourceType"], change.get("Replacement", "")]
    details = [
        " ".join(
            (*map(str, one["Target"].values()), one["Evaluation"], one["ChangeSource"], one.get("CausingEntity", ""))
        )
        for one in change.get("Details", [])
    ]
    return "; ".join([" ".join(head), *sorted(details)])
