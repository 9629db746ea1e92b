"""The server's life: what is started before what, and what must have ended before what ends.

Start: the store is opened, then the ports; a step that fails ends the process with one line that
says why, before any client has come.  Stop: the ports close, what was read is committed and
delivered, the clients are told to come back (1012), and when the last is gone, or the time is
over, the store is closed.
"""

from collections.abc import Generator, Mapping, Sequence
from typing import Any, Final

from twisted.application.service import Service
from twisted.internet.defer import Deferred, inlineCallbacks, maybeDeferred
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import (
    IListeningPort,
    IProtocolFactory,
    IReactorTime,
    IStreamServerEndpoint,
)
from twisted.internet.task import LoopingCall, deferLater
from twisted.logger import ILogObserver, Logger
from twisted.python.components import Componentized
from twisted.python.failure import Failure

from chatd.clients import Clients
from chatd.frames import Entry
from chatd.protocol import RESTART
from chatd.rooms import Rooms
from chatd.store.base import Store, StoreError

LOOK_SECONDS: Final = 1
"""How often deadlines are looked at."""
TRIM_SECONDS: Final = 600
"""How often rooms in which nothing is posted are trimmed."""

_log = Logger()


class Readiness:
    """Whether clients should be sent here."""

    def __init__(self) -> None:
        self.why_not: str | None = "starting"
        """None when they should."""

    def __call__(self) -> str | None:
        """Why not, or None."""
        return self.why_not


class ChatService(Service):
    """Starts and stops the store, the ports and the clients, in order.

    `listen` and `admin` are endpoints by the text that names them, for the messages; `drain` is the
    number of seconds that stopping may take; `observer` gets the log instead of twistd's own.
    """

    name = "chatd"

    def __init__(
        self,
        *,
        store: Store,
        seed: Sequence[Entry],
        rooms: Rooms,
        clients: Clients,
        factory: IProtocolFactory,
        admin_factory: IProtocolFactory,
        listen: Mapping[str, IStreamServerEndpoint],
        admin: Mapping[str, IStreamServerEndpoint],
        readiness: Readiness,
        drain: float,
        clock: IReactorTime,
        observer: ILogObserver,
    ) -> None:
        self._store = store
        self._seed = seed
        self._rooms = rooms
        self._clients = clients
        self._ports_to_open = [
            *((text, endpoint, factory) for text, endpoint in listen.items()),
            *((text, endpoint, admin_factory) for text, endpoint in admin.items()),
        ]
        self._ports: list[IListeningPort] = []
        self._readiness = readiness
        self._drain = drain
        self._clock = clock
        self._observer = observer
        self._loops = [(LoopingCall(clients.look), LOOK_SECONDS), (LoopingCall(store.trim), TRIM_SECONDS)]

    def setServiceParent(self, parent: Any) -> None:
        """Join the application, which twistd asks for its log observer."""
        super().setServiceParent(parent)
        if isinstance(parent, Componentized):
            parent.setComponent(ILogObserver, self._observer)

    def startService(self) -> None:
        """Open the store and the ports; SystemExit with one line when one cannot be opened."""
        try:
            self._store.open(self._seed)
        except StoreError as error:
            raise SystemExit(f"chatd: {error}") from None
        faults: list[str] = []
        for text, endpoint, factory in self._ports_to_open:
            endpoint.listen(factory).addCallbacks(
                self._listening, self._not_listening, callbackArgs=(text,), errbackArgs=(text, faults)
            )
        if faults:
            self._store.close()
            raise SystemExit(f"chatd: {faults[0]}")
        super().startService()
        for loop, interval in self._loops:
            loop.clock = self._clock
            self._repeat(loop, interval)

    def _repeat(self, loop: LoopingCall, interval: float) -> None:
        """Go on with a loop that failed, since connections rely on it."""

        def failed(failure: Failure) -> None:
            _log.failure("what is done every {interval} s failed", failure, interval=interval)
            self._repeat(loop, interval)

        loop.start(interval, now=False).addErrback(failed)

    def _listening(self, port: IListeningPort, text: str) -> None:
        self._ports.append(port)
        _log.info("listening on {endpoint}", endpoint=text)
        if len(self._ports) == len(self._ports_to_open):
            self._readiness.why_not = None
            _log.info("ready, with the log {epoch}", epoch=self._store.epoch)

    def _not_listening(self, failure: Failure, text: str, faults: list[str]) -> None:
        """Most endpoints fail at once, and that ends the process; for those that fail later it stays unready."""
        error = failure.value
        reason = error.socketError if isinstance(error, CannotListenError) else error
        faults.append(f"cannot listen on {text} ({reason}): choose another with --listen or --admin")
        if self.running:
            _log.error("{fault}", fault=faults[-1])

    @inlineCallbacks
    def stopService(self) -> Generator[Deferred[Any], Any, None]:
        """Stop in order; fires when all is closed."""
        super().stopService()
        self._readiness.why_not = "stopping"
        _log.info("stopping")
        for port in self._ports:
            yield maybeDeferred(port.stopListening)
        over = self._clock.callLater(self._drain, self._clients.abort)
        yield self._store.settled()
        while self._rooms.busy and over.active():
            yield deferLater(self._clock, 0)
        self._clients.close(RESTART, "restarting")
        yield self._clients.empty()
        if over.active():
            over.cancel()
        for loop, _ in self._loops:
            loop.stop()
        yield self._store.close()
        _log.info("stopped")
