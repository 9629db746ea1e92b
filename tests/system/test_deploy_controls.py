"""Negative controls: a scripts/deploy without one of its safeties fails its test, and so do doubles that drift."""

import datetime as dt

import pytest
from support.deployments import checkout, running
from support.wire import WireFormat
from system import test_deploy as road
from system import test_deploy_cuts as cuts
from system import test_deploy_images as images

UNSAFE = {
    "alarms are ignored": (
        ("deploying/stack.py", "        if loud:", "        if False:"),
        road.test_rollout_needs_all_alarms_ok,
    ),
    "an alarm reverts a rollback": (
        ("deploying/stack.py", 'state.output("RolloutAlarm") if guarded else None', 'state.output("RolloutAlarm")'),
        road.test_rollback_to_last_good_ignores_alarms,
    ),
    "no alarm rolls back a rollout": (
        ("deploying/stack.py", 'state.output("RolloutAlarm") if guarded else None', "None"),
        road.test_alarm_during_rollout_rolls_back,
    ),
    "the triggers of an earlier update stay": (
        (
            "deploying/stack.py",
            "        if state is not None and not fresh:\n            request",
            "        if guarded and state and not fresh:\n            request",
        ),
        road.test_rollback_to_last_good_ignores_alarms,
    ),
    "more than the image may change": (
        ("deploying/stack.py", "        if more:", "        if False:"),
        road.test_allowed_resource_may_change,
    ),
    "any possible replacement of the group is accepted": (
        (
            "deploying/stack.py",
            "        return _touched(change) - ({MIXED} if mixed == {VERSION} else set()) <= IN_PLACE",
            "        return True",
        ),
        road.test_subnets_may_replace_the_group,
    ),
    "a possible replacement by a new version is refused": (
        (
            "deploying/stack.py",
            "        return _touched(change) - ({MIXED} if mixed == {VERSION} else set()) <= IN_PLACE",
            "        return False",
        ),
        road.test_ship_rolls_out_verifies_and_labels,
    ),
    "a refused change set remains": (
        ("deploying/stack.py", "            if made or self._pending(name):", "            if False:"),
        cuts.test_early_interrupt_leaves_nothing,
    ),
    "a change set remains whose creation was not answered": (
        ("deploying/stack.py", "            if made or self._pending(name):", "            if made:"),
        cuts.test_interrupt_leaves_an_earlier_plan,
    ),
    "a refused plan replaces an earlier one": (
        ("deploying/stack.py", "check, keep=True)", "check)"),
        road.test_refused_plan_leaves_an_earlier_one,
    ),
    "a failed creation removes an earlier plan": (
        ("deploying/stack.py", "            if made or self._pending(name):", "            if True:"),
        road.test_refused_plan_leaves_an_earlier_one,
    ),
    "an instance refresh is ignored": (
        ("deploying/stack.py", 'if one["Status"] in REFRESHING', "if False"),
        road.test_instance_refresh_in_progress_is_refused,
    ),
    "a rollout that has not begun counts as complete": (
        ("deploying/rollout.py", "if self._begun and self._ended(state)", "if self._ended(state)"),
        road.test_alarm_during_rollout_rolls_back,
    ),
    "a stuck rollout is not cancelled": (
        ("deploying/rollout.py", "if self._off and not self._cancelled", "if False"),
        road.test_stuck_refresh_is_cancelled,
    ),
    "the operation of another run is not found": (
        ("deploying/rollout.py", "        token = stack.began(image)\n", '        token = "other"\n'),
        road.test_operation_in_progress_is_refused,
    ),
    "the image is recorded before its verification": (
        (
            "deploying/ship.py",
            "        seen = verify(self.stack, image, self.within)\n        self.record.keep(image)\n",
            "        self.record.keep(image)\n        seen = verify(self.stack, image, self.within)\n",
        ),
        road.test_wrong_version_is_rolled_back,
    ),
    "a failed verification is not rolled back": (
        (
            "deploying/ship.py",
            "            former.undo(",
            "            raise\n            former.undo(",
        ),
        road.test_wrong_version_is_rolled_back,
    ),
    "a template that is not verified stays": (
        ("deploying/ship.py", "self._replace(template=template, parameters=former)", "self._replace(template=None)"),
        lambda account: road.test_unverified_template_is_rolled_back(account, account.script.parent, "YAML"),
    ),
    "parameters that the template lacks are lost": (
        ("deploying/ship.py", "names |= parameters.keys() - self.stack.declared(self.template)", "pass"),
        lambda account: road.test_unverified_template_is_rolled_back(account, account.script.parent, "YAML"),
    ),
    "the same image needs no rollback": (
        ("deploying/ship.py", "not (moved and (former.template or former.parameters))", "True"),
        lambda account: road.test_unverified_change_of_the_same_image(account, account.script.parent, "a parameter"),
    ),
    "a template stays without a word": (
        ("deploying/ship.py", "stays=stays)", "stays=False)"),
        lambda account: road.test_template_that_stays_is_reported(account, account.script.parent, "large"),
    ),
    "any image is accepted": (
        ("deploying/verify.py", "if images.get(one) != image", "if False"),
        road.test_instance_of_another_image_is_not_verified,
    ),
    "any health is accepted": (
        ("deploying/verify.py", 'if word not in ("healthy", LEAVING)', "if False"),
        road.test_unhealthy_targets_are_not_verified,
    ),
    "any version is accepted": (
        ("deploying/verify.py", 'if server == f"chatd/{expected}"', "if server"),
        road.test_wrong_version_is_not_verified,
    ),
    "images in use are removed": (
        ("deploying/images.py", "        if image in why:", "        if False:"),
        images.test_gc_keeps_images_in_use,
    ),
    "images verified for other stacks are removed": (
        ("deploying/images.py", "    for stack in stacks(account):", "    for stack in ():"),
        images.test_gc_keeps_images_in_use,
    ),
    "shared images are removed": (
        ("deploying/images.py", "if image not in why and (reason", "if False and (reason"),
        images.test_gc_keeps_shared_images_until_they_are_deprecated,
    ),
    "an image is shared whose key is AWS's": (
        ("deploying/sharing.py", '["KeyManager"] == "AWS"', '["KeyManager"] == "NOBODY"'),
        images.test_share_refuses_keys_that_others_cannot_use,
    ),
    "a copy is shared whose key is AWS's": (
        ("deploying/sharing.py", "                self._check_key(region, image)\n", "                pass\n"),
        images.test_share_refuses_an_earlier_copy_with_another_key,
    ),
    "a deprecated image is copied": (
        ("deploying/sharing.py", "        self._check_date()\n", ""),
        images.test_share_refuses_a_deprecated_image,
    ),
    "the proof's copy has the commit": (
        ("deploying/prove.py", "if name != COMMIT}", "if name}"),
        images.test_copy_of_the_proof_is_not_that_of_the_commit,
    ),
    "a repeated run copies again": (
        ("deploying/sharing.py", 'if one["State"] in ("pending", "available"):', "if False:"),
        images.test_repeated_share_makes_no_second_copy,
    ),
    "a copy that is pending is shared": (
        ("deploying/sharing.py", "        self._wait(made)\n", ""),
        images.test_image_is_copied_and_shared,
    ),
    "a copy has no deprecation date": (
        ("deploying/sharing.py", "            self._deprecate(region, image)\n", ""),
        images.test_image_is_copied_and_shared,
    ),
}
"""Each is a change of a script, and the test that must then fail."""


def outcome(chat, folder, change, test):
    """Return how a test ends with changed scripts."""
    try:
        with running(chat, checkout(folder, change)) as account:
            test(account)
    except AssertionError as error:
        return "breaks" if "Traceback" in str(error) else "fails"
    return "passes"


@pytest.mark.parametrize("safety", UNSAFE)
def test_removed_safety_fails_its_test(chat, tmp_path, safety):
    """Each change of UNSAFE makes its test fail by an assertion, and not by a traceback of the script."""
    assert outcome(chat, tmp_path / "unsafe", *UNSAFE[safety]) == "fails"


def test_unchanged_checkout_passes(chat, tmp_path):
    """The test passes for a copy of the scripts that is not changed."""
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
    """A response that differs from the model of the AWS API fails the test that gets it."""
    wire = WireFormat("cloudformation")
    assert b"UPDATE_COMPLETE" in wire.write("DescribeStacks", {"Stacks": [STACK]})
    stack = {name: value for name, value in (STACK | changes).items() if value is not None}
    with pytest.raises(AssertionError):
        wire.write("DescribeStacks", {"Stacks": [stack]})
