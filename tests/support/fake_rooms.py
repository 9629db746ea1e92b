"""A room of the asyncio client without a server: what the test puts into its snapshot is what the terminal shows."""

import asyncio
from dataclasses import replace

from chatd.client.storage import PendingPost
from chatd.client.view import ONLINE, RoomEntry, RoomPresence, Snapshot
from chatd.messages import Id

NOON = "2026-01-01T12:00:00.000Z"


def id_of(number):
    return None if number is None else Id("k7Q2xe", number)


def entry(number, username="bea", message="hi", timestamp=NOON, *, replaces=None, replaced=None, removed=False):
    return RoomEntry(id_of(number), username, message, timestamp, id_of(replaces), id_of(replaced), removed)


def pending(label, error=None, **frame):
    return PendingPost(label, "key", 0, frame, None, error)


def presence(count, users=None):
    return RoomPresence(count, users)


class FakeRoom:
    """Records what is asked of it in `asked`; posts stay in the outbox until the test answers them."""

    def __init__(self, *entries):
        self.asked = []
        self.answers = {}
        self._calls = []
        self._older = []
        self._change = asyncio.Event()
        self.failing = None
        self.view = Snapshot(
            state=ONLINE, reason=None, error=None, retry_at=None, messages=(), entries=(), more=False, last=None,
            outbox=(), presence=None, typing=(),
        )  # fmt: skip
        self.receive(*entries, last=id_of(0))

    # For the test

    def change(self, **fields):
        self.view = replace(self.view, **fields)
        for call in [*self._calls]:
            call()
        self._change.set()
        self._change = asyncio.Event()

    def receive(self, *entries, last=None):
        kept = [*self.view.entries, *entries]
        last = kept[-1].id if kept else last
        self.change(entries=kept, messages=[one for one in kept if one.replaces is None], last=last)

    def restart(self, *entries):
        self.change(entries=())
        self.receive(*entries)

    def refuse(self, label, error):
        self.answers.pop(label).set_exception(error)
        self.change(outbox=[replace(post, error=error) if post.label == label else post for post in self.view.outbox])

    def fail(self, label, error):
        self.answers.pop(label).set_exception(error)

    def accept(self, label):
        self.answers.pop(label).set_result(None)
        self.change(outbox=[post for post in self.view.outbox if post.label != label])

    def hold_older(self, *entries):
        self._older = entries

    # As a room has it

    def snapshot(self):
        return self.view

    def subscribe(self, call):
        self._calls.append(call)
        return lambda: self._calls.remove(call)

    async def changed(self):
        await self._change.wait()

    def _ask(self, kind, **frame):
        self.asked.append((kind, *frame.values()))
        if self.failing:
            raise self.failing
        label = f"p{len(self.asked)}"
        if kind == "remove":
            frame["type"] = kind
        self.answers[label] = asyncio.get_running_loop().create_future()
        self.change(outbox=[*self.view.outbox, pending(label, **frame)])
        return self.answers[label]

    def post(self, message):
        return self._ask("post", message=message)

    def edit(self, id_, message):
        return self._ask("edit", replaces=str(id_), message=message)

    def remove(self, id_):
        return self._ask("remove", id=str(id_))

    async def older(self):
        self.asked.append(("older",))
        if self.failing:
            raise self.failing
        older, self._older = self._older, []
        self.change(messages=[*older, *self.view.messages], entries=[*older, *self.view.entries])

    def typing(self):
        self.asked.append(("typing",))

    def retry(self, label):
        self.asked.append(("retry", label))

    def discard(self, label):
        self.asked.append(("discard", label))
        self.change(outbox=[post for post in self.view.outbox if post.label != label])
        if label in self.answers:
            self.answers.pop(label).cancel()
