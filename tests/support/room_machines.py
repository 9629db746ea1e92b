"""The base of the state machines that put rooms through any order of events."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from support.helpers import ScriptedLog, Turns

from chatd.room.registry import Registry
from chatd.transport import frames

MOST_TURNS = 2000
"""The turns in which rooms must have nothing left to do."""


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

    def run_out(self, readers, pause=0):
        """Let the log answer and every member read, until nothing is due.

        `readers` returns the members that read, each with its room.  `pause` is the time in seconds within which
        nothing may be due; a twentieth of it passes in each turn.
        """
        self.log.release()
        for _ in range(MOST_TURNS):
            for member, room in readers():
                if not member.ready:
                    member.drain(room)
            if self.clock.idle_for(pause):
                break
            self.clock.turn()
            self.clock.rightNow += pause / 20

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
