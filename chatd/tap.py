"""`twistd chatd`: the options, and the composition of the server from its parts.

This is the one place that knows every part by name and the only one that uses the global reactor.
"""

import gc
import os
import pathlib
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final, NoReturn, TypeVar

from twisted.application.service import IService
from twisted.internet.endpoints import serverFromString
from twisted.internet.interfaces import IStreamServerEndpoint
from twisted.logger import LogEvent
from twisted.python import usage

import chatd
from chatd.messages import Entry
from chatd.operate import check
from chatd.operate import logging as logs
from chatd.operate.drain import Drain
from chatd.operate.machine import ThisMachine
from chatd.operate.metrics import Metrics
from chatd.operate.systemd import Notifier
from chatd.room.registry import Registry
from chatd.room.room import MAX_LAG
from chatd.service import ChatService, Readiness
from chatd.store.base import Retention, Store
from chatd.store.memory import MemoryStore
from chatd.store.sqlite import SqliteStore, ThreadWorker
from chatd.transport import frames
from chatd.transport import http as web
from chatd.transport.admission import Addresses, Admission, Rate, origin_pattern, room_pattern
from chatd.transport.api import Api
from chatd.transport.connections import Connections
from chatd.transport.frames import FrameError
from chatd.transport.websocket import ChatFactory

_T = TypeVar("_T")
GARBAGE: Final = 50_000
"""How many more young objects are reason to look for cycles among them; Python's own 700 is for smaller programs."""
_SEED: Final = pathlib.Path(chatd.__file__).parent / "seed" / "messages.json"


def _reactor() -> Any:
    """The reactor that twistd installed by now."""
    from twisted.internet import reactor

    return reactor


def _whole(least: int, most: int) -> Callable[[str], int]:
    """A parser of whole numbers between two bounds."""

    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not least <= int(text) <= most:
            raise ValueError(f"{text!r} is not a whole number from {least} to {most}")
        return int(text)

    return parse


def _rate(text: str) -> tuple[int, int]:
    """Read N[:BURST]; without a burst it is twice the rate."""
    rate, colon, burst = text.partition(":")
    number = _whole(0, 1_000_000)
    return number(rate), number(burst) if colon else 2 * number(rate)


def _log_format(text: str) -> Callable[[LogEvent], str]:
    if text not in logs.FORMATS:
        raise ValueError(f"{text!r} is neither text nor json")
    return logs.FORMATS[text]


def _store(url: str) -> Callable[[Retention], Store]:
    """Read a store's URL; what it answers makes the store."""
    reactor = _reactor()
    kind, colon, rest = url.partition(":")
    if kind == "memory" and colon and not rest:
        return lambda retain: MemoryStore(retain, time.time)
    if kind == "sqlite" and rest:
        path = pathlib.Path(rest)
        return lambda retain: SqliteStore(
            path, retain, time.time, ThreadWorker(reactor, "chatd-write"), ThreadWorker(reactor, "chatd-read")
        )
    if kind in ("redis", "rediss"):
        # With the reactor that twistd installed, which txredisapi takes when it is imported.
        from chatd.store.redis.link import Link, RedisAddress
        from chatd.store.redis.store import RedisStore

        file = _password_file()
        try:
            address = RedisAddress.parse(url, password_elsewhere=file is not None)
        except ValueError as error:
            raise ValueError(f"{check.veiled(url)!r} {error}") from None
        link = Link(address, reactor, file)
        return lambda retain: RedisStore(link, retain)
    raise ValueError(f"{check.veiled(url)!r} is neither memory: nor sqlite:PATH nor redis://HOST:PORT/DATABASE")


def _password_file() -> pathlib.Path | None:
    """Where the password of a store is, which is no option, since all can see a command line."""
    path = Options.environ.get("CHATD_STORE_PASSWORD_FILE")
    return pathlib.Path(path) if path else None


def _seed(path: str) -> tuple[Entry, ...]:
    """Read the messages that a new log begins with."""
    try:
        return frames.parse_seed(pathlib.Path(path).read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    except FrameError as error:
        raise ValueError(f"{path} {error}") from None


def _endpoint(text: str) -> IStreamServerEndpoint:
    """Read a Twisted server endpoint."""
    reactor = _reactor()
    try:
        endpoint: IStreamServerEndpoint = serverFromString(reactor, text)
    except Exception as error:  # noqa: BLE001 -- each kind of endpoint is a plug-in with errors of its own
        reason = " ".join(str(error).split())
        raise ValueError(f"{text!r} is no server endpoint such as tcp:8085 ({reason})") from None
    return endpoint


class Options(usage.Options):
    """The command line; what it does not say is read from CHATD_NAME in the environment."""

    environ: ClassVar[dict[str, str]] = dict(os.environ)
    machine: ClassVar[check.Machine] = ThisMachine()
    checking = False
    """Whether nothing more is asked than what would bite."""
    synopsis = "[options]"
    longdesc = (
        "A chat-room server over WebSocket that keeps every message. Each option can also be given in "
        "the environment, as CHATD_STORE for --store; the command line wins. "
        "CHATD_STORE_PASSWORD_FILE names a file with the password of a Redis. "
        "Connect with: npx wscat -c ws://localhost:8085/"
    )
    optParameters: list[list[Any]] = [  # noqa: RUF012 -- usage.Options asks for it so
        [
            "store",
            None,
            "sqlite:chatd.sqlite",
            "where messages are kept: sqlite:PATH, redis[s]://HOST:PORT/DATABASE for many nodes, or memory: to forget",
        ],
        ["seed", None, str(_SEED), "a JSON list of messages that a new log begins with"],
        ["history", None, "100", f"how many messages a client gets when it connects, 1 to {MAX_LAG}"],
        ["retain", None, "all", "how much of a room is kept: a number of messages (5000), of days (30d), or all"],
        [
            "rate",
            None,
            "20:40",
            "frames a second per connection, and HTTP posts per address, and the burst; 0: no limit",
        ],
        ["max-per-address", None, "0", "connections per address; 0: no limit (accepted, not yet in force)"],
        ["proxy-hops", None, "0", "how many proxies before this server are trusted to add to X-Forwarded-For"],
        ["ping", None, "25", "how often a client is pinged, in seconds, and how long it may take to answer"],
        ["drain", None, "30", "how many seconds it may take to send the clients elsewhere when stopping"],
        ["log-format", None, "text", "text, or json for one object a line"],
    ]
    parsers: ClassVar[dict[str, Callable[[str], Any]]] = {
        "store": _store,
        "seed": _seed,
        "history": _whole(1, MAX_LAG),
        "retain": Retention.parse,
        "rate": _rate,
        "max-per-address": _whole(0, 1_000_000),
        "proxy-hops": _whole(0, 100),
        "ping": _whole(1, 3600),
        "drain": _whole(0, 3600),
        "log-format": _log_format,
    }
    repeated: ClassVar[dict[str, tuple[Callable[[str], Any], str]]] = {
        "listen": (_endpoint, "tcp:8085:backlog=4096"),
        "admin": (_endpoint, "tcp:8086:interface=127.0.0.1"),
        "rooms": (room_pattern, ""),
        "origin": (origin_pattern, ""),
    }
    """Options that may be given more than once: how each is read, and the default."""

    def __init__(self) -> None:
        super().__init__()
        for name in self.parsers:
            self[name] = self._environment(name) or self[name]
        for name in self.repeated:
            self[name] = []

    def _environment(self, name: str) -> str | None:
        return self.environ.get(f"CHATD_{name.upper().replace('-', '_')}")

    def opt_listen(self, text: str) -> None:
        """A Twisted server endpoint for clients; may be repeated [default: tcp:8085:backlog=4096]."""
        self["listen"].append(text)

    def opt_admin(self, text: str) -> None:
        """A Twisted server endpoint for health checks; empty: none [default: tcp:8086:interface=127.0.0.1]."""
        self["admin"].append(text)

    def opt_rooms(self, pattern: str) -> None:
        """Which names of rooms there may be, such as team-*; may be repeated [default: any]."""
        self["rooms"].append(pattern)

    def opt_origin(self, pattern: str) -> None:
        """Whose pages may connect: https://chat.example, or *.example; may be repeated [default: any]."""
        self["origin"].append(pattern)

    def opt_check(self) -> None:
        """Say what would bite, of the options and of this machine, and exit; nothing is started."""
        self.checking = True

    def opt_version(self) -> None:
        """Print the version and exit."""
        print(f"chatd {chatd.__version__}")  # noqa: T201 -- what was asked for
        raise SystemExit(0)

    def parseOptions(self, options: list[str] | None = None) -> None:
        """Read the command line; SystemExit with one line for what is wrong with it."""
        try:
            super().parseOptions(options)
        except usage.UsageError as error:
            raise SystemExit(f"chatd: {error}: `twistd chatd --help` explains every option") from None

    def postOptions(self) -> None:
        """Turn every text into its value."""
        for name, (parse, default) in self.repeated.items():
            said = self._environment(name)
            texts = self[name] or (default if said is None else said).split()
            self[name] = {text: self._value(name, parse, text) for text in texts if text}
        if not self["listen"]:
            raise SystemExit("chatd: --listen: give at least one server endpoint such as tcp:8085")
        store = self["store"]
        for name, parse in self.parsers.items():
            self[name] = self._value(name, parse, self[name])
        if self.checking:
            self._check(store)

    def _check(self, store: str) -> NoReturn:
        """Print what would bite, and exit with 1 if anything would."""
        twistd: Mapping[str, Any] = self.parent or {}
        settings = check.Settings(
            listen=tuple(self["listen"]),
            admin=tuple(self["admin"]),
            store=store,
            history=self["history"],
            retain=self["retain"],
            rooms=tuple(self["rooms"]),
            origin=tuple(self["origin"]),
            rate=self["rate"],
            ping=self["ping"],
            drain=self["drain"],
            proxy_hops=self["proxy-hops"],
            folder=pathlib.Path(twistd.get("rundir") or "."),
            password_file=_password_file(),
        )
        found = check.findings(settings, self.machine)
        print(*(found or [check.NOTHING]), sep="\n")  # noqa: T201 -- what was asked for
        raise SystemExit(1 if found else 0)

    @staticmethod
    def _value(name: str, parse: Callable[[str], _T], text: str) -> _T:
        try:
            return parse(text)
        except ValueError as error:
            raise SystemExit(f"chatd: --{name}: {error}") from None


def makeService(options: Options) -> IService:
    """Compose the server."""
    reactor = _reactor()
    # What is here now stays: it need not be searched for garbage again, nor each few hundred messages be an occasion.
    gc.freeze()
    gc.set_threshold(GARBAGE)
    store: Store = options["store"](options["retain"])
    rooms = Registry(store, frames, reactor, options["history"], store.lobby)
    connections = Connections(reactor, options["ping"])
    admission = Admission(options["rooms"].values(), options["origin"].values())
    a_second, burst = options["rate"]
    rate = Rate(a_second, burst, reactor.seconds) if a_second else None
    addresses = Addresses(rate, options["proxy-hops"], reactor.seconds)
    readiness = Readiness(lambda: store.fault)
    api = Api(rooms, connections, admission, addresses)
    site = web.site(readiness, reactor, {"": api, "rooms": api})
    factory = ChatFactory(
        rooms=rooms, connections=connections, admission=admission, site=site, reactor=reactor, rate=rate
    )
    metrics = Metrics(
        store=store,
        rooms=rooms,
        connections=connections,
        refusals={"frame": factory.refused_frames, "handshake": factory.refused_handshakes, "request": site.refused},
        clock=reactor,
    )
    twistd: Mapping[str, Any] = options.parent or {}
    service = ChatService(
        store=store,
        seed=options["seed"],
        connections=connections,
        factory=factory,
        admin_factory=web.admin(
            readiness,
            reactor,
            drain=lambda: service.drain(expecting=True),  # a load balancer may not know of it yet
            metrics=metrics,
        ),
        listen=options["listen"],
        admin=options["admin"],
        readiness=readiness,
        drain=Drain(connections, store, site, options["drain"], reactor),
        clock=reactor,
        observer=logs.observer(options["log-format"], twistd.get("logfile"), daemon=not twistd.get("nodaemon")),
        notify=Notifier(options.environ),
    )
    reactor.callWhenRunning(_heed_signals, reactor, service)
    return service


def _heed_signals(reactor: Any, service: ChatService) -> None:
    """Let the service know of the signals that end the process; at the second, twistd would only log."""
    theirs = {signal.SIGTERM: reactor.sigTerm, signal.SIGHUP: reactor.sigTerm, signal.SIGINT: reactor.sigInt}
    stopping: list[int] = []

    def heed(number: int, frame: Any) -> None:
        reactor.callFromThread(service.signalled, number)
        if not stopping:
            stopping.append(number)
            theirs[signal.Signals(number)](number, frame)

    for number in theirs:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it for SIGHUP
            signal.signal(number, heed)
