"""The commands of scripts/deploy against replayed answers, and the doubles against the same recording.

A recording in the folder `recorded` replaces AWS.  `scripts/deploy prove --record` makes one.  As long as the folder
has one of the doubles, `PYTHONPATH=tests .venv/bin/python -m system.test_deploy_replay` makes it again.
"""

import json
import pathlib

import pytest
from support.deployments import GIVEN
from support.recordings import Replay, differences, read
from system.test_deploy_prove import STEPS, empty, loader, proof, proving

ROLE = "arn:aws:iam::999988887777:role/chatd-deployer"
RECORDED = pathlib.Path(__file__).parent / "recorded"
"""A recording.  This one was made from the doubles.  The first that is made at AWS replaces it."""


@pytest.fixture(scope="module")
def recorded():
    return read(RECORDED)


def rehearse(folder):
    """Record a proof against the doubles, with a parameter, a tag and a role of its own; return the recording."""
    given = {"parameters": {"InstanceType": "t4g.small"}, "tags": {"team": "secret"}, "role": ROLE}
    with empty() as account:
        proving(account, record=folder, **given).run(lambda _: True)
        assert account.owner not in json.dumps(read(folder))
    return read(folder)


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """A recording of the doubles, made now."""
    return rehearse(tmp_path_factory.mktemp("record") / "answers")


def called(recording, operation):
    """Return the lines of an operation."""
    return [line for lines in recording.values() for line in lines if line["call"].endswith(f":{operation}")]


def replayed(recording, number):
    """Replay a step; returns why it is not proved, or an empty text."""
    from deploying import verify

    step, given = [*recording][number], called(recording, "CreateChangeSet")[0]["arguments"]
    copies = called(recording, "CopyImage")
    source = copies[0]["arguments"]
    parameters = {one["ParameterKey"]: one["ParameterValue"] for one in given["Parameters"]}
    del parameters["ImageId"]
    replay = Replay(recording, step)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "echo", lambda url, expected: "")
        patch.setattr("botocore.session.create_loader", loader)
        patch.setattr("botocore.session.Session", lambda: replay.session)
        one = proof(
            lambda: source["SourceImageId"],
            source["SourceRegion"],
            given["StackName"],
            parameters=parameters,
            role=given.get("RoleARN"),
        )
        one.first, (one.next, one.bad) = source["SourceImageId"], (copy["answer"]["ImageId"] for copy in copies)
        failed = one.attempt(one.all_steps[number], [])
    if not failed:
        replay.end()
    return failed


# The commands


@pytest.mark.parametrize("step", STEPS)
def test_step_works_with_the_recorded_answers(recorded, step):
    """The commands of each step ask and change what they did when the answers were recorded, and prove it again."""
    assert [name.partition("-")[2] for name in recorded] == STEPS
    assert replayed(recorded, STEPS.index(step)) == ""


def test_fresh_recording_can_be_replayed(rehearsed):
    assert [replayed(rehearsed, number) for number in range(len(STEPS))] == [""] * len(STEPS)


def replaced(old, new):
    """Return an edit of lines that replaces a text."""
    return lambda lines: json.loads(json.dumps(lines).replace(old, new))


def without(call):
    """Return an edit of lines that removes a call."""
    return lambda lines: [line for line in lines if line["call"] != call]


EDITS = {
    "an alarm that is on": ("ship", replaced('"StateValue": "OK"', '"StateValue": "ALARM"'), "an alarm is not OK: "),
    "another end of the update": (
        "ship",
        replaced('"UPDATE_COMPLETE"', '"UPDATE_ROLLBACK_COMPLETE"'),
        "3-ship: asked for cloudformation:DeleteChangeSet {",
    ),
    "a replacement of the group": (
        "alarm",
        replaced('"Attribute": "Properties", "Name": "LaunchTemplate"', '"Attribute": "Properties", "Name": "Other"'),
        ", and the recording has cloudformation:ExecuteChangeSet {",
    ),
    "an update without a rollback": (
        "bad-image",
        replaced("UPDATE_ROLLBACK_COMPLETE", "UPDATE_COMPLETE"),
        "4-bad-image: asked for ec2:DescribeImages {",
    ),
    "a missing answer": (
        "abort",
        without("cloudwatch:DescribeAlarms"),
        "6-abort: asked for cloudwatch:DescribeAlarms {",
    ),
    "a missing change": (
        "destroy",
        without("ssm:DeleteParameter"),
        "8-destroy: asked for ssm:DeleteParameter {",
    ),
    "no further change": (
        "destroy",
        without("ec2:DeregisterImage"),
        ", and the recording has no further change",
    ),
    "a further change": (
        "roll-back",
        lambda lines: [*lines, {"call": "ec2:RunInstances", "arguments": {}, "answer": {}}],
        "7-roll-back: the step ends without ec2:RunInstances {}",
    ),
}
"""For each control the step, the edit of its lines, and a part of the failure."""


@pytest.mark.parametrize("what", EDITS)
def test_other_answer_fails_the_replay(rehearsed, what):
    """The control: with one other answer the step is not proved, or asks what the recording does not hold."""
    step, edit, seen = EDITS[what]
    number = STEPS.index(step)
    name = f"{number + 1}-{step}"
    recording = rehearsed | {name: edit(rehearsed[name])}
    assert recording != rehearsed
    try:
        failed = replayed(recording, number)
    except pytest.fail.Exception as error:
        failed = str(error)
    assert seen in failed


# The doubles


def test_doubles_answer_as_recorded(recorded, rehearsed):
    """The recording has all that the doubles answer in each step, and the same changes and statuses of the stack."""
    found = differences(recorded, rehearsed)
    assert not found, "\n".join(found)


DRIFT = {
    "a replacement": (
        replaced('"Replacement": "Conditional"', '"Replacement": "True"'),
        [
            "3-ship: AWS does not answer: changes: Modify Group AWS::AutoScaling::AutoScalingGroup True;",
            "3-ship: only AWS answers: changes: Modify Group AWS::AutoScaling::AutoScalingGroup Conditional;",
        ],
    ),
    "a status of the stack": (
        replaced('"UPDATE_COMPLETE_CLEANUP_IN_PROGRESS"', '"UPDATE_FAILED"'),
        [
            "3-ship: AWS does not answer: stack: UPDATE_FAILED",
            "3-ship: only AWS answers: stack: UPDATE_COMPLETE_CLEANUP_IN_PROGRESS",
        ],
    ),
    "an attribute": (
        replaced('"PercentageComplete": 50', '"PercentageComplete": "50"'),
        ["3-ship: AWS does not answer: shapes: autoscaling:DescribeInstanceRefreshes.InstanceRefreshes[].Percentage"],
    ),
    "a status of a refresh": (
        replaced('"Baking"', '"Stopped"'),
        ["3-ship: AWS does not answer: refreshes: Stopped"],
    ),
    "a state of an alarm": (
        replaced('"StateValue": "OK"', '"StateValue": "NONE"'),
        ["3-ship: AWS does not answer: alarms: "],
    ),
    "a call": (
        without("ssm:LabelParameterVersion"),
        ["3-ship: only AWS answers: calls: ssm:LabelParameterVersion"],
    ),
    "an error": (
        lambda lines: [
            *lines,
            {"call": "ec2:GetIt", "arguments": {}, "answer": {"Error": {"Code": "No"}}, "status": 400},
        ],
        ["3-ship: AWS does not answer: errors: ec2:GetIt: 400 No"],
    ),
}
"""For each control the edit of the lines of the step `ship`, and the beginnings of the differences."""


@pytest.mark.parametrize("what", DRIFT)
def test_drift_of_the_doubles_is_seen(rehearsed, what):
    """The control: what only one side answers is a difference."""
    edit, expected = DRIFT[what]
    found = differences(rehearsed, rehearsed | {"3-ship": edit(rehearsed["3-ship"])})
    assert found
    assert [one for one in found if not one.startswith(tuple(expected))] == []
    assert [one for one in expected if not any(line.startswith(one) for line in found)] == []


def test_missing_step_is_seen(rehearsed):
    less = {name: lines for name, lines in rehearsed.items() if name != "8-destroy"}
    assert differences(rehearsed, less) == ["8-destroy: only one side has this step"]


# The recordings


def test_recording_can_be_published(recorded, rehearsed):
    """A recording holds only members that the commands read, and no text that would be replaced."""
    from deploying.recording import anonymous, kept

    for lines in (*recorded.values(), *rehearsed.values()):
        for line in lines:
            assert (anonymous(line["arguments"]), anonymous(kept(line["answer"]))) == (
                line["arguments"],
                line["answer"],
            )
    texts = json.dumps(rehearsed)
    found = [one for one in ("AWSTemplate", "t4g.small", "secret", "deployer", "127.0.0.1") if one in texts]
    assert found == []


def test_texts_are_anonymous():
    """Accounts, people, keys, hosts, addresses, times, parameters, foreign tags and templates are replaced."""
    from deploying.recording import anonymous

    texts = {
        "arn:aws:iam::999988887777:user/Jo may not": "arn:aws:iam::123456789012:user/HIDDEN may not",
        "arn:aws:sts::999988887777:assumed-role/ops/jo": "arn:aws:sts::123456789012:assumed-role/HIDDEN",
        "arn:aws:iam::999988887777:role/aws-service-role/autoscaling.amazonaws.com/AWSServiceRole": (
            "arn:aws:iam::123456789012:role/aws-service-role/autoscaling.amazonaws.com/AWSServiceRole"
        ),
        "AKIAABCDEFGHIJKLMNOP": "HIDDEN",
        "rediss://jo:secret@store.example.org:6379/0": "rediss://host.example/0",
        "chatd-1234.us-east-1.elb.amazonaws.com": "host.example",
        "10.1.2.3 refuses": "192.0.2.1 refuses",
        "chatd-prove-test-final-20261129201500": "chatd-prove-test-final-20260101000000",
        "no zone for chat.example.com": "no zone for HIDDEN",
        "UPDATE_FAILED": "UPDATE_FAILED",
        "ami-0123456789abcdef0": "ami-0123456789abcdef0",
    }
    assert {text: anonymous(text, [GIVEN["DomainName"]]) for text in texts} == texts
    tags = [{"Key": "chatd:version", "Value": "1"}, {"Key": "team", "Value": "secret"}]
    parameters = [
        {"ParameterKey": "ImageId", "ParameterValue": "ami-1"},
        {"ParameterKey": "KeyName", "ParameterValue": "jo"},
        {"ParameterKey": "VpcId", "ParameterValue": ""},
    ]
    given = {"Images": [{"Tags": tags}, {"Tags": tags[1:]}], "Parameters": parameters, "TemplateBody": "secret"}
    parameters = [one | ({"ParameterValue": "HIDDEN"} if one["ParameterValue"] == "jo" else {}) for one in parameters]
    assert anonymous(given) == {"Images": [{"Tags": tags[:1]}, {}], "Parameters": parameters}


class Listening:
    """An account that has a recording hear what a test says."""

    def listen(self, heard):
        self.heard = heard


def event(number):
    return {"EventId": f"e-{number}", "Timestamp": f"2026-01-01T00:00:0{number}+00:00"}


def test_answers_return_in_their_order(tmp_path):
    """Reads get their answers as often as they came, and then the last one; all pages of events are one."""
    from botocore.exceptions import ClientError
    from deploying.recording import Recording

    account, stack = Listening(), {"StackName": "one"}
    recording = Recording(account, tmp_path, {"DomainName": "chat.example.com"})

    def told(operation, answer, **more):
        account.heard(f"cloudformation:{operation}", stack | more, answer)

    def events(*numbers, **more):
        told("DescribeStackEvents", {"StackEvents": [event(number) for number in numbers]}, **more)

    told("DescribeStacks", {"Stacks": []})
    recording.begin()
    missing = {"Error": {"Code": "ValidationError", "Message": "chat.example.com does not exist", "Type": "Sender"}}
    told("DescribeStacks", missing | {"ResponseMetadata": {"HTTPStatusCode": 400}})
    events(2)
    told("DeleteStack", {})
    for status in ("A", "A", "B"):
        told("DescribeStacks", {"Stacks": [{"StackStatus": status, "Description": "secret"}]})
    events(4, 3, NextToken="mine")
    events(2, 1, NextToken="next")
    events(4, 3)
    recording.write("step")
    found = read(tmp_path)
    assert [line.get("times") for line in found["1-step"]] == [1, 1, None, 2, 1, 2]
    assert "secret" not in json.dumps(found)
    replay = Replay(found, "1-step")
    client = replay.session.create_client("cloudformation", region_name="us-east-1")
    with pytest.raises(ClientError, match=r"ValidationError.*HIDDEN does not exist") as error:
        client.describe_stacks(**stack)
    assert error.value.response["ResponseMetadata"]["HTTPStatusCode"] == 400
    client.delete_stack(**stack)
    seen = [client.describe_stacks(**stack)["Stacks"][0]["StackStatus"] for _ in range(5)]
    assert seen == ["A", "A", "B", "B", "B"]
    for _ in range(2):
        assert client.describe_stack_events(**stack)["StackEvents"] == [event(number) for number in (4, 3, 2, 1)]
    replay.end()


if __name__ == "__main__":
    rehearse(RECORDED)
