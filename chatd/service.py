"""The life of the server: the order of its start and of its stop.

Start: the store opens, then the ports.  A step that fails ends the process with one line, before any client connects.
If twistd gives up root in between, the ports open first, and nothing is accepted until the store is open.
Stop: the server drains its clients (see `chatd.operate.drain`), ends its deliveries to webhooks in the time that the
drain has left, and then the store closes.  A drain can also be
requested without a stop.  The process then stays, unready, until a signal ends it.
"""

import signal
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Final, Protocol

from twisted.application.service import Service
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import Deferred, DeferredList, inlineCallbacks, maybeDeferred, succeed
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import (
    IListeningPort,
    IProtocolFactory,
    IReactorTime,
    IStreamServerEndpoint,
)
from twisted.internet.task import LoopingCall
from twisted.logger import ILogObserver, Logger
from twisted.python.components import Componentized
from twisted.python.failure import Failure
from typing_extensions import override

from chatd.messages import Entry
from chatd.operate.drain import Drain
from chatd.operate.process import ServerProcess
from chatd.operate.systemd import Notifier
from chatd.store.base import Store, StoreError
from chatd.transport import limits
from chatd.transport.connections import Connections
from chatd.transport.limits import Lateness

LOOK_SECONDS: Final = 1
"""The interval between two checks of the deadlines."""
TRIM_SECONDS: Final = 600
"""The interval at which rooms without new posts are trimmed."""

_logger = Logger()


def page_url(endpoint: str, address: object) -> str | None:
    """Return the URL of the page on a port, for a browser on this machine, or None if the port is not TCP."""
    if not isinstance(address, (IPv4Address, IPv6Address)):
        return None
    host = f"[{address.host}]" if isinstance(address, IPv6Address) else address.host
    if host in ("0.0.0.0", "[::]"):  # noqa: S104 -- all interfaces
        host = "localhost"
    return f"{'https' if endpoint.startswith('ssl:') else 'http'}://{host}:{address.port}/"


class Readiness:
    """The readiness of the server for load balancers, in words.

    `fault` returns the current problem of the log, or None.  A problem makes the server degraded, but not unready: all
    nodes share the log, and a load balancer that removes every node helps nobody.
    """

    def __init__(self, fault: Callable[[], str | None]) -> None:
        self.why_not: str | None = "starting"
        """The reason against it; None if clients should come here."""
        self._fault = fault

    def __call__(self) -> tuple[bool, str]:
        """Return whether clients should come here, and `ready`, `degraded: ...` or the reason against it."""
        fault = self._fault()
        if self.why_not == "starting" and fault:
            return False, f"starting: {fault}"
        if self.why_not:
            return False, self.why_not
        return True, f"degraded: {fault}" if fault else "ready"


class Deliveries(Protocol):
    """What sends messages to other programs while the store is open."""

    def start(self) -> None:
        """Begin."""

    def stop(self, seconds: float) -> "Deferred[Any]":
        """End within some seconds; fire when that is done."""


class ChatService(Service):
    """Starts and stops the store, the ports, the clients and the webhooks, in order.

    `listen` and `admin` are endpoints by the text that names them, for the messages.  `process` ends if the start
    fails.  `observer` gets the log instead of twistd's own; None leaves that to twistd.  `each_second` are functions to
    call every second besides the check of the deadlines.
    """

    name = "chatd"

    def __init__(
        self,
        *,
        store: Store,
        seed: Sequence[Entry],
        connections: Connections,
        factory: Any,
        admin_factory: IProtocolFactory,
        listen: Mapping[str, IStreamServerEndpoint],
        admin: Mapping[str, IStreamServerEndpoint],
        readiness: Readiness,
        drain: Drain,
        clock: IReactorTime,
        process: ServerProcess,
        lateness: Lateness,
        observer: ILogObserver | None,
        notify: Notifier,
        each_second: Sequence[Callable[[], object]] = (),
        webhooks: Deliveries | None = None,
    ) -> None:
        self._store = store
        self._seed = seed
        self._ports: list[Any] = []
        self._urls: list[str] = []
        self._admin_ports: list[IListeningPort] = []
        self._ports_to_open = [(text, endpoint, factory, self._ports) for text, endpoint in listen.items()]
        self._admin_ports_to_open = [
            (text, endpoint, admin_factory, self._admin_ports) for text, endpoint in admin.items()
        ]
        self._stored = False
        """True if the store is open."""
        self._readiness = readiness
        self._drain = drain
        self._drained = False
        self._draining: list[Deferred[None]] = []
        self._stop_requested = False
        self._clock = clock
        self._process = process
        self._observer = observer
        self._notify = notify
        self._webhooks = webhooks
        self._loops: list[tuple[LoopingCall, float]] = [
            *((LoopingCall(look), LOOK_SECONDS) for look in (connections.check_deadlines, *each_second)),
            (LoopingCall(lateness.look), limits.LOOK_SECONDS),
            (LoopingCall(store.trim), TRIM_SECONDS),
        ]
        if notify.watchdog:
            self._loops.append((LoopingCall(notify.alive), notify.watchdog))

    @override
    def setServiceParent(self, parent: Any) -> None:
        """Join the application, which twistd asks for its log observer."""
        super().setServiceParent(parent)
        if isinstance(parent, Componentized) and self._observer is not None:
            parent.setComponent(ILogObserver, self._observer)

    @override
    def privilegedStartService(self) -> None:
        """Open the ports if twistd is about to give up root, because only root may open a port below 1024."""
        super().privilegedStartService()
        if self._process.sheds_privileges:
            faults = self._listen([*self._ports_to_open, *self._admin_ports_to_open])
            if faults:
                self._process.fail(faults[0])

    @override
    def startService(self) -> None:
        """Open the store, and then the ports; end the process with one line when one cannot be opened.

        A remote store may take time to open.  Meanwhile only the admin port is open, and unready.
        """
        try:
            opened = self._store.open(self._seed)
        except StoreError as error:
            self._process.fail(str(error))
        except Exception as error:  # noqa: BLE001 -- the process ends in any case, and its starter must not wait
            _logger.failure("unexpected error")
            self._process.fail(f"the store cannot be opened ({error!r})")
        self._stored = opened.called
        to_open = [*self._ports_to_open] if self._stored else []
        if not self._process.sheds_privileges:
            faults = self._listen([*to_open, *self._admin_ports_to_open])
            if faults:
                self._store.close()
                self._process.fail(faults[0])
        elif not self._stored:
            for port in self._ports:
                port.stopReading()
        super().startService()
        for loop, interval in self._loops:
            loop.clock = self._clock
            self._repeat(loop, interval)
        if self._stored:
            self._start_webhooks()
            self._check_ready()
        else:
            opened.addCallback(self._opened)
        self._process.started()

    def _opened(self, _: None) -> None:
        self._stored = True
        if self._readiness.why_not != "starting":
            return
        self._start_webhooks()
        if self._process.sheds_privileges:
            for port in self._ports:
                port.startReading()
            self._check_ready()
        else:
            self._listen(self._ports_to_open)

    def _start_webhooks(self) -> None:
        if self._webhooks is not None:
            self._webhooks.start()

    def _listen(self, to_open: Sequence[tuple[str, IStreamServerEndpoint, IProtocolFactory, list[Any]]]) -> list[str]:
        """Open ports, and return a line for each that cannot be opened."""
        faults: list[str] = []
        for text, endpoint, factory, ports in to_open:
            endpoint.listen(factory).addCallbacks(
                self._listening, self._not_listening, callbackArgs=(text, ports), errbackArgs=(text, faults)
            )
        return faults

    def _repeat(self, loop: LoopingCall, interval: float) -> None:
        """Run a loop, and start it again after a failure, since connections rely on it."""

        def failed(failure: Failure) -> None:
            _logger.failure("a call that runs every {interval} s failed", failure, interval=interval)
            self._repeat(loop, interval)

        loop.start(interval, now=False).addErrback(failed)

    def _listening(self, port: IListeningPort, text: str, ports: list[Any]) -> None:
        if ports is self._ports and (self._draining or self._drained):  # too late
            maybeDeferred(port.stopListening)
            return
        ports.append(port)
        _logger.info("listening on {endpoint}", endpoint=text)
        url = page_url(text, port.getHost())
        if ports is self._ports and url:
            self._urls.append(url)
        self._check_ready()

    def _check_ready(self) -> None:
        """Report that the server is ready if it has become so."""
        opened = len(self._ports) == len(self._ports_to_open)
        if (
            self._stored
            and opened
            and len(self._admin_ports) == len(self._admin_ports_to_open)
            and self._readiness.why_not == "starting"
        ):
            self._readiness.why_not = None
            _logger.info("ready, with the log {epoch}", epoch=self._store.epoch)
            for one in self._urls:
                _logger.info("Open {url}", url=one)
            self._notify(READY="1", STATUS="ready")

    def _not_listening(self, failure: Failure, text: str, faults: list[str]) -> None:
        """Note a port that cannot be opened; the process ends."""
        error = failure.value
        reason = error.socketError if isinstance(error, CannotListenError) else error
        faults.append(f"cannot listen on {text} ({reason}): choose another with --listen or --admin")
        if self.running and not self._stop_requested:
            self._stop_requested = True
            self._process.fail_later(faults[-1])

    def signalled(self, number: int) -> None:
        """Note a signal that ends the process.  The second one, or SIGINT, makes the drain immediate."""
        if self._stop_requested or number == signal.SIGINT:
            _logger.info("skipping the paced drain")
            self._drain.skip_pace()
        self._stop_requested = True

    def drain(self, *, expecting: bool = False) -> "Deferred[None]":
        """Drain once; fire when all clients are disconnected.  `expecting` is as in `Drain.run`."""
        if self._drained:
            return succeed(None)
        done: Deferred[None] = Deferred()
        self._draining.append(done)
        if len(self._draining) == 1:
            self._readiness.why_not = "draining"
            _logger.info("draining")
            self._notify(STATUS="draining")
            self._drain.run(self._close_ports, expecting=expecting).addBoth(self._finish_drain)
        return done

    def _close_ports(self) -> "Deferred[Any]":
        """Close the ports for clients.  The admin port stays open."""
        return DeferredList([maybeDeferred(port.stopListening) for port in self._ports])

    def _finish_drain(self, result: object) -> None:
        self._drained = True
        self._readiness.why_not = "drained"
        if isinstance(result, Failure):
            _logger.failure("the drain failed", result)
        _logger.info("drained")
        draining, self._draining = self._draining, []
        for done in draining:
            done.callback(None)

    @override
    @inlineCallbacks
    def stopService(self) -> Generator[Deferred[Any], Any, None]:
        """Drain, and close everything; fire when that is done."""
        super().stopService()
        _logger.info("stopping")
        self._notify(STOPPING="1", STATUS="stopping")
        over = self._clock.seconds() + self._drain.budget
        yield self.drain()
        if self._webhooks is not None:
            yield self._webhooks.stop(max(0.0, over - self._clock.seconds()))
        for loop, _ in self._loops:
            loop.stop()
        yield self._store.close()
        for port in self._admin_ports:
            yield maybeDeferred(port.stopListening)
        _logger.info("stopped")
