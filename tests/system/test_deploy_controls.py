"""Negative controls: a scripts/deploy without one of its safeties fails its test, and so do doubles that drift."""

import datetime as dt

import pytest
from support.deployments import checkout, running
from support.wire import Wire
from system import test_deploy as road
from system import test_deploy_cuts as cuts
from system import test_deploy_images as images

UNSAFE = {
    "the alarms do not matter": (
        ("deploying/stack.py", "        if loud:", "        if False:"),
        road.test_rollout_needs_all_alarms_ok,
    ),
    "an alarm undoes a roll-back": (
        ("deploying/stack.py", '"yes" if guarded else "no"', '"yes"'),
        road.test_rollback_to_last_good_ignores_alarms,
    ),
    "more than the image may change": (
        ("deploying/stack.py", "        if more:", "        if False:"),
        road.test_allowed_resource_may_change,
    ),
    "a refused change set stays": (
        ("deploying/stack.py", "            self.drop(name)\n            raise", "            raise"),
        cuts.test_early_interrupt_leaves_nothing,
    ),
    "what is replaced by hand does not matter": (
        ("deploying/stack.py", 'if one["Status"] in REFRESHING', "if False"),
        road.test_instance_refresh_in_progress_is_refused,
    ),
    "what has not begun has ended": (
        ("deploying/rollout.py", "if self._begun and self._ended(state)", "if self._ended(state)"),
        road.test_alarm_during_rollout_rolls_back,
    ),
    "nothing is called off": (
        ("deploying/rollout.py", "if self._off and not self._cancelled", "if False"),
        road.test_stuck_refresh_is_cancelled,
    ),
    "what goes on elsewhere is not found": (
        ("deploying/rollout.py", "        token = stack.began(image)\n", '        token = "other"\n'),
        road.test_operation_in_progress_is_refused,
    ),
    "the label comes before the proof": (
        (
            "deploying/ship.py",
            "        seen = verify(self.stack, image, self.within)\n        self.record.keep(image)\n",
            "        self.record.keep(image)\n        seen = verify(self.stack, image, self.within)\n",
        ),
        road.test_wrong_version_is_rolled_back,
    ),
    "it is not rolled back": (
        (
            "deploying/ship.py",
            "            self._replace(template=None, parameters=former).undo",
            "            raise\n            self.undo",
        ),
        road.test_wrong_version_is_rolled_back,
    ),
    "any image will do": (
        ("deploying/verify.py", "if images.get(one) != image", "if False"),
        road.test_instance_of_another_image_is_not_verified,
    ),
    "any health will do": (
        ("deploying/verify.py", 'if word not in ("healthy", LEAVING)', "if False"),
        road.test_unhealthy_targets_are_not_verified,
    ),
    "any version will do": (
        ("deploying/verify.py", 'if server == f"chatd/{expected}"', "if server"),
        road.test_wrong_version_is_not_verified,
    ),
    "what is needed goes": (
        ("deploying/images.py", "        if image in why:", "        if False:"),
        images.test_gc_keeps_images_in_use,
    ),
    "what others know to be good goes": (
        ("deploying/images.py", "    for stack in stacks(account):", "    for stack in ():"),
        images.test_gc_keeps_images_in_use,
    ),
}
"""A change of a script, and the test that then must fail."""


def outcome(chat, folder, change, test):
    """How a test ends with scripts that are changed."""
    try:
        with running(chat, checkout(folder, change)) as account:
            test(account)
    except AssertionError as error:
        return "breaks" if "Traceback" in str(error) else "fails"
    return "passes"


@pytest.mark.parametrize("safety", UNSAFE)
def test_removed_safety_fails_its_test(chat, tmp_path, safety):
    assert outcome(chat, tmp_path / "unsafe", *UNSAFE[safety]) == "fails"


def test_unchanged_checkout_passes(chat, tmp_path):
    change = ("deploy", "import argparse\n", "import argparse\n")
    assert outcome(chat, tmp_path / "same", change, road.test_rollout_needs_all_alarms_ok) == "passes"


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
def test_double_must_follow_the_model(changes):
    wire = Wire("cloudformation")
    assert b"UPDATE_COMPLETE" in wire.write("DescribeStacks", {"Stacks": [STACK]})
    stack = {name: value for name, value in (STACK | changes).items() if value is not None}
    with pytest.raises(AssertionError):
        wire.write("DescribeStacks", {"Stacks": [stack]})
