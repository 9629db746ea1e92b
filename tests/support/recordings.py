"""Recordings of scripts/deploy prove: their replay in place of AWS, and how the answers of the doubles differ.

A replay has a session of botocore, whose handler of `before-call` gives the answers, as botocore's Stubber does.  The
Stubber wants all calls of a service in one order.  Here only the calls that change something have an order.  A read
has the answers that it had in the recording between the same two changes, in their order, and then the last one again.
So a state changes after as many looks as it did, however the commands mix their reads.  A call that the recording does
not hold fails the test, with its name.

AWS answers more than the doubles: more attributes, and more events of the resources.  It must answer all that they
answer.  The calls that change something, the changes of a change set, and the statuses of the stack must be the same.
"""

import json
import operator
import types

import pytest

STACK = "AWS::CloudFormation::Stack"
SAME = ("calls", "changes", "stack")
"""Kinds that must be the same on both sides.  Of the rest the doubles answer a part."""


def read(folder):
    """Return a recording: the lines of each step."""
    return {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(folder.glob("*.jsonl"))
    }


# The replay


class Replay:
    """The answers in one step of a recording.  The clients of `session` get them."""

    def __init__(self, recording, step):
        from botocore.session import Session
        from deploying.recording import EVENTS, changes, question

        self.session = Session()
        self.session.set_credentials("replay", "replay")
        self.session.register("provide-client-params", self._ask)
        self.session.register("before-call", self._reply)
        self._step = step
        self._changes = []
        """The calls that change something, as questions with their lines."""
        self._reads = [{}]
        """Before the first change and after each of them, the lines of each read by its question."""
        self._made = 0
        """The number of changes so far."""
        self._fault = None
        """The first failure, which the commands may answer with more calls."""
        events = []
        for name, lines in recording.items():
            for line in lines:
                answer = line["answer"]
                if EVENTS in answer:  # the new ones
                    events = sorted([*answer[EVENTS], *events], key=operator.itemgetter("Timestamp"), reverse=True)
                    answer = {EVENTS: events}
                asked = question(line["call"], line["arguments"])
                if name == step and changes(line["call"]):
                    self._changes.append((asked, line))
                    self._reads.append({})
                elif name == step:
                    self._reads[-1].setdefault(asked, []).append(line | {"answer": answer})

    def end(self):
        """Fail unless all changes of the step were made."""
        if self._made < len(self._changes):
            self._fail(f"the step ends without {self._changes[self._made][0]}")

    def _ask(self, params, context, **_):
        context["replayed"] = {**params}

    def _reply(self, model, context, **_):
        from deploying.recording import anonymous, changes, question

        call = f"{model.service_model.service_name}:{model.name}"
        asked = question(call, anonymous(context["replayed"]))
        line = (self._change if changes(call) else self._read)(asked)
        status = line.get("status", 200)
        answer = line["answer"] | {"ResponseMetadata": {"HTTPStatusCode": status}}
        return types.SimpleNamespace(status_code=status), answer

    def _change(self, asked):
        expected, line = self._changes[self._made] if self._made < len(self._changes) else ("no further change", {})
        if asked != expected:
            self._fail(f"asked for {asked}, and the recording has {expected}")
        self._made += 1
        return line

    def _read(self, asked):
        lines = self._reads[self._made].get(asked)
        if not lines:
            after = f"after {self._changes[self._made - 1][0]}" if self._made else "before the first change"
            self._fail(f"asked for {asked}, and the recording has no answer {after}")
        line = lines[0]
        line["times"] -= 1
        if not line["times"] and len(lines) > 1:
            lines.pop(0)
        return line

    def _fail(self, text):
        self._fault = self._fault or f"{self._step}: {text}"
        pytest.fail(self._fault, pytrace=False)


# The doubles


def differences(recorded, answered):
    """Return how the answers of doubles differ from a recording, as lines."""
    recorded, answered = _seen(recorded), _seen(answered)
    found = [f"{step}: only one side has this step" for step in sorted(recorded.keys() ^ answered.keys())]
    for step in recorded.keys() & answered.keys():
        for kind, answers in answered[step].items():
            expected = recorded[step][kind]
            found += [f"{step}: AWS does not answer: {kind}: {one}" for one in sorted(answers - expected)]
            if kind in SAME:
                found += [f"{step}: only AWS answers: {kind}: {one}" for one in sorted(expected - answers)]
    return sorted(found)


def _seen(recording):
    """Return what a recording holds: for each step, sets of shapes and statuses."""
    known = set()
    return {step: _step(lines, known) for step, lines in recording.items()}


def _step(lines, known):
    """Return what the lines of a step hold; `known` has the ids of the refreshes of earlier steps."""
    from deploying.recording import changes

    names = ("calls", "errors", "shapes", "changes", "planned", "stack", "resources", "refreshes", "alarms")
    kinds = {kind: set() for kind in names}
    new = set()
    for line in lines:
        call, answer = line["call"], line["answer"]
        kinds["calls"] |= {call} if changes(call) else set()
        if "Error" in answer:
            kinds["errors"].add(f"{call}: {line['status']} {answer['Error']['Code']}")
            continue
        kinds["shapes"] |= {f"{call}{path}" for path in _paths(answer)}
        if "ExecutionStatus" in answer:
            kinds["planned"].add(f"{answer['Status']}, {answer['ExecutionStatus']}")
            found = [one["ResourceChange"] for one in answer.get("Changes", [])]
            kinds["changes"] |= {_change(one) for one in found if one["Action"] != "Add"}  # a template adds what it has
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
