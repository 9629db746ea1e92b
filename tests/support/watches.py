"""A listener of the client, for tests."""

from twisted.internet.defer import Deferred

from chatd.client.core import Listener


class Watch(Listener):
    """A listener that records its events."""

    def __init__(self):
        self.events = []
        self.numbers = []
        self._waits = []

    def _told(self, *event):
        self.events.append(event)
        for wait in [*self._waits]:
            if wait[0](event):
                self._waits.remove(wait)
                wait[1].callback(event)

    def until(self, kind, test=lambda event: True):
        """Wait for the next such event."""
        done = Deferred()
        self._waits.append((lambda event: event[0] == kind and test(event), done))
        return done

    def kinds(self):
        return [event[0] for event in self.events]

    def on_history(self, history):
        self.numbers = [entry.number for entry in history.entries]
        self._told("on_history", history)

    def on_entries(self, epoch, entries):
        self.numbers += [entry.number for entry in entries]
        self._told("on_entries", epoch, entries)

    def on_event(self, notice):
        self._told("on_event", notice)

    def on_connect(self):
        self._told("on_connect")

    def on_protocol_error(self, fault):
        self._told("on_protocol_error", fault)

    def on_disconnect(self, reason, wait):
        self._told("on_disconnect", reason, wait)

    def on_reject(self, reason):
        self._told("on_reject", reason)
