"""The base of the state machines that put rooms through any order of events."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from support.helpers import ScriptedLog, Turns

from chatd.room.registry import Registry
from chatd.transport import frames


class RoomMachine(RuleBasedStateMachine):
    """Rooms with short tails, runs and slices, on a clock that turns by rule and a log whose reads may wait."""

    make_log = ScriptedLog

    @initialize(tail=st.integers(200, 2000), history=st.integers(1, 5))
    def begin(self, tail, history):
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr("chatd.room.tail.TAIL_BYTES", tail)
        self.patch.setattr("chatd.room.tail.RUN_BYTES", 400)
        self.patch.setattr("chatd.room.sweep.SLICE_MEMBERS", 2)
        self.patch.setattr("chatd.room.sweep.SLICE_SECONDS", -1)
        self.clock, self.log = Turns(), self.make_log()
        self.rooms = Registry(self.log, frames, self.clock, history)
        self.prepare()

    def prepare(self):
        """Begin without clients."""
        raise NotImplementedError

    def teardown(self):
        if hasattr(self, "patch"):
            self.patch.undo()

    @rule()
    def turn(self):
        self.clock.turn()

    @rule()
    def hold(self):
        self.log.held = True

    @rule()
    @precondition(lambda self: self.log.waiting)
    def answer(self):
        self.log.answer()
