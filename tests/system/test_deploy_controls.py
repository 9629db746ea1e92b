"""Negative controls: without each of its safeties scripts/deploy fails its rehearsal; and so do doubles that drift."""

import datetime as dt
from concurrent.futures import ThreadPoolExecutor

import pytest
import test_deploy as road
import test_deploy_cuts as cuts
import test_deploy_images as images
from support.deployments import checkout, running
from support.servers import Server
from support.wire import Wire

UNSAFE = {
    "the alarms do not matter": (
        ("deploying/stack.py", "        if loud:", "        if False:"),
        road.test_an_alarm_between_plan_and_rollout_is_refused.rehearsal,
    ),
    "an alarm undoes a roll-back": (
        ("deploying/stack.py", '"yes" if guarded else "no"', '"yes"'),
        road.test_rollback_goes_to_the_last_good_image_whatever_the_alarms_say.rehearsal,
    ),
    "more than the image may change": (
        ("deploying/stack.py", "        if more:", "        if False:"),
        road.test_what_is_allowed_may_change_too.rehearsal,
    ),
    "a refused change set stays": (
        ("deploying/stack.py", "            self.drop(name)\n            raise", "            raise"),
        cuts.test_interrupted_before_anything_began_it_leaves_nothing.rehearsal,
    ),
    "what is replaced by hand does not matter": (
        ("deploying/stack.py", 'if one["Status"] in REFRESHING', "if False"),
        road.test_while_instances_are_being_replaced_it_is_refused.rehearsal,
    ),
    "what has not begun has ended": (
        ("deploying/rollout.py", "if self._begun and self._ended(state)", "if self._ended(state)"),
        road.test_an_alarm_during_the_rollout_rolls_back.rehearsal,
    ),
    "nothing is called off": (
        ("deploying/rollout.py", "if self._off and not self._cancelled", "if False"),
        road.test_a_refresh_that_is_stuck_for_ever_is_called_off.rehearsal,
    ),
    "what goes on elsewhere is not found": (
        ("deploying/rollout.py", "        token = stack.began(image)\n", '        token = "other"\n'),
        road.test_while_something_else_is_under_way_it_is_refused.rehearsal,
    ),
    "the label comes before the proof": (
        (
            "deploying/ship.py",
            "        seen = verify(self.stack, image, self.within)\n        self.record.keep(image)\n",
            "        self.record.keep(image)\n        seen = verify(self.stack, image, self.within)\n",
        ),
        road.test_an_image_of_another_version_than_its_tag_is_rolled_back.rehearsal,
    ),
    "it is not rolled back": (
        (
            "deploying/ship.py",
            "            self._replace(template=None, parameters=former).undo",
            "            raise\n            self.undo",
        ),
        road.test_an_image_of_another_version_than_its_tag_is_rolled_back.rehearsal,
    ),
    "any image will do": (
        ("deploying/verify.py", "if images.get(one) != image", "if False"),
        road.test_an_instance_of_another_image_is_not_verified.rehearsal,
    ),
    "any health will do": (
        ("deploying/verify.py", 'if word not in ("healthy", LEAVING)', "if False"),
        road.test_targets_that_are_not_healthy_are_not_verified.rehearsal,
    ),
    "any version will do": (
        ("deploying/verify.py", 'if server == f"chatd/{expected}"', "if server"),
        road.test_another_version_is_not_verified.rehearsal,
    ),
    "what is needed goes": (
        ("deploying/images.py", "        if image in why:", "        if False:"),
        images.test_gc_keeps_what_is_needed_and_removes_the_rest_if_it_is_told_to,
    ),
    "what others know to be good goes": (
        ("deploying/images.py", "    for stack in stacks(account):", "    for stack in ():"),
        images.test_gc_keeps_what_is_needed_and_removes_the_rest_if_it_is_told_to,
    ),
}
"""A change of a script, and the test that then must fail."""


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("chat"), "--store=memory:") as server:
        yield server


def outcome(chat, folder, change, test):
    """How a test ends with scripts that are changed."""
    try:
        with running(chat, checkout(folder, change)) as account:
            test(account)
    except AssertionError as error:
        return "breaks" if "Traceback" in str(error) else "fails"
    return "passes"


def test_without_its_safeties_it_fails_the_rehearsal(chat, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        ends = {
            safety: pool.submit(outcome, chat, tmp_path / str(number), *case)
            for number, (safety, case) in enumerate(UNSAFE.items())
        }
    assert {safety: one.result() for safety, one in ends.items()} == dict.fromkeys(UNSAFE, "fails")


def test_a_checkout_without_a_change_passes(chat, tmp_path):
    change = ("deploy", "import argparse\n", "import argparse\n")
    assert (
        outcome(chat, tmp_path / "same", change, road.test_an_alarm_between_plan_and_rollout_is_refused.rehearsal)
        == "passes"
    )


STACK = {"StackName": "chatd", "CreationTime": dt.datetime(2026, 1, 1, tzinfo=dt.UTC), "StackStatus": "UPDATE_COMPLETE"}


@pytest.mark.parametrize(
    "changes",
    [
        {"StackStatus": "UPDATED"},
        {"StackName": None},
        {"Image": "ami-1"},
        {"Parameters": [{"Key": "a"}]},
        {"StackId": 1},
    ],
)
def test_a_double_that_drifts_is_found(changes):
    wire = Wire("cloudformation")
    assert b"UPDATE_COMPLETE" in wire.write("DescribeStacks", {"Stacks": [STACK]})
    stack = {name: value for name, value in (STACK | changes).items() if value is not None}
    with pytest.raises(AssertionError):
        wire.write("DescribeStacks", {"Stacks": [stack]})
