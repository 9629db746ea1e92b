"""`twistd chatd`: the composition of the server from its parts.

Only this module knows every part by name, and only this module uses the global reactor.
"""

import gc

gc.disable()  # a fifth of the time that the imports take, for nothing: all that they make is still in use

import os
import pathlib
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, ClassVar, Final

from twisted.application.service import IService
from twisted.internet.interfaces import IStreamServerEndpoint
from twisted.logger import Logger
from twisted.python import usage
from typing_extensions import override

from chatd import config
from chatd.config import ConfigError
from chatd.operate import check, logging
from chatd.operate.admin_token import AdminToken
from chatd.operate.clock import use_monotonic_clock
from chatd.operate.drain import Drain
from chatd.operate.listening import Entrance, Ports
from chatd.operate.machine import ThisMachine
from chatd.operate.metrics import Metrics
from chatd.operate.process import ServerProcess, obstacle
from chatd.operate.systemd import Notifier
from chatd.room.registry import Registry
from chatd.service import ChatService, Readiness
from chatd.store.base import Store, new_epoch
from chatd.store.memory import MemoryStore
from chatd.store.sqlite import SqliteStore, ThreadWorker
from chatd.transport import frames, http
from chatd.transport.admin import ModerationApi, check_token
from chatd.transport.admission import Addresses, Admission, Rate, origin_pattern, room_pattern
from chatd.transport.api import Api
from chatd.transport.connections import Connections
from chatd.transport.documents import Documents
from chatd.transport.export import ExportQueue
from chatd.transport.frames import FORMS, MESSAGE, Vocabulary
from chatd.transport.jwks import KeyFile, KeySource, KeyUrl
from chatd.transport.keyring import read_jwks, read_key
from chatd.transport.limits import Limits
from chatd.transport.listing import RoomList
from chatd.transport.moderator import Moderator
from chatd.transport.operator_schema import SchemaFile, check_schema
from chatd.transport.page import ChatPage
from chatd.transport.static import Stylesheet
from chatd.transport.tokens import Tokens
from chatd.transport.websocket import ChatFactory
from chatd.webhooks.delivery import PARALLEL, Webhook
from chatd.webhooks.fanout import Fanout
from chatd.webhooks.sender import Sender
from chatd.webhooks.signature import SigningKeys

gc.enable()

GARBAGE: Final = 50_000
"""Number of new objects that start a garbage collection.  Python's default of 700 suits smaller programs."""

Reloadable = AdminToken | KeySource | SchemaFile | Stylesheet | Fanout
"""What reads its file again at SIGHUP."""

_logger = Logger()


def _reactor() -> Any:
    """Return the reactor, which twistd has installed by the time of the call."""
    from twisted.internet import reactor

    use_monotonic_clock(reactor)
    logging.drop_contexts(reactor)
    return reactor


class Options(usage.Options):
    """The options of `twistd chatd`, as twistd asks for them."""

    environ: ClassVar[Mapping[str, str]] = os.environ
    machine: ClassVar[check.Machine] = ThisMachine()
    settings: config.Settings
    ports: Ports
    listen: Mapping[str, IStreamServerEndpoint]
    """Endpoints for clients, by their text."""
    admin: Mapping[str, IStreamServerEndpoint]
    """Endpoints for operators, by their text."""

    @override
    def parseOptions(self, options: Sequence[str] | None = None) -> None:
        twistd: Mapping[str, Any] = self.parent or {}
        try:
            found = config.Configuration(options or (), self.environ)
            self.ports = Ports(_reactor(), self.machine.open_files)
            self.listen, self.admin = (found.each(name, self.ports.endpoint) for name in ("listen", "admin"))
        except ConfigError as error:
            raise SystemExit(f"chatd: {error}") from None
        self.settings = found.settings._replace(folder=pathlib.Path(twistd.get("rundir") or "."))
        if found.check:
            findings = check.findings(self.settings, self.machine)
            notes = [f"note: {line}" for line in check.exposures(self.settings)]
            print(*notes, *(findings or ([] if notes else [check.NOTHING])), sep="\n")  # noqa: T201 -- the output
            raise SystemExit(1 if findings else 0)

    @override
    def __str__(self) -> str:
        return config.OptionParser().format_help()


def _store(settings: config.Settings, reactor: Any) -> Store:
    """Make the store that the options name."""
    kind, _, rest = settings.store.partition(":")
    if kind == "memory":
        return MemoryStore(settings.retain, time.time, time.monotonic)
    if kind == "sqlite":
        writer, reader = ThreadWorker(reactor, "chatd-write"), ThreadWorker(reactor, "chatd-read")
        path = pathlib.Path(rest)
        return SqliteStore(path, settings.retain, time.time, writer, reader, clock=reactor, steady=time.monotonic)
    # Imported late: txredisapi imports the reactor, which twistd must have installed before.
    from chatd.store.redis.link import Link, RedisAddress
    from chatd.store.redis.store import RedisStore

    file = settings.store_password_file
    address = RedisAddress.parse(settings.store, password_elsewhere=file is not None)
    return RedisStore(Link(address, reactor, file), settings.retain)


def _tokens(settings: config.Settings, reactor: Any, vocabulary: Vocabulary) -> Tokens | None:
    """Make what verifies tokens, if the options ask for them."""
    keys: KeySource
    if settings.jwt_key is not None:
        keys = KeyFile(settings.jwt_key.absolute(), read_key)
    elif "://" in settings.jwks:
        keys = KeyUrl(settings.jwks, reactor)
    elif settings.jwks:
        keys = KeyFile(pathlib.Path(settings.jwks).absolute(), read_jwks)
    else:
        return None
    return Tokens(
        keys,
        now=reactor.seconds,
        audience=settings.jwt_audience or None,
        issuer=settings.jwt_issuer or None,
        username=settings.jwt_username,
        cookie=settings.jwt_cookie or None,
        vocabulary=vocabulary,
    )


def _fanout(settings: config.Settings, store: Store, reactor: Any) -> Fanout | None:
    """Make what posts to webhooks, if the options ask for it."""
    if settings.webhook_key is None:
        return None
    keys = SigningKeys(settings.webhook_key.absolute())
    webhooks: dict[str, Webhook] = {}
    for address in settings.webhook:
        number = sum(other.origin == address.origin for other in settings.webhook[: settings.webhook.index(address)])
        name = f"{address.origin} {number + 1}" if number else address.origin
        sender = Sender(reactor, address, keys, time.time, PARALLEL)
        webhooks[name] = Webhook(name, address.reader, sender, log=store, cursors=store, clock=reactor, now=time.time)
    fanout = Fanout([*webhooks.values()], keys)
    store.follow(fanout)
    return fanout


def _vocabulary(settings: config.Settings) -> Vocabulary:
    """Make the frames that clients may send."""
    vocabulary, message = Vocabulary(), settings.message
    for form in (MESSAGE, *FORMS.values()):
        check_schema(form.schema)  # of this version; an operator's is checked already
    if message is not None:
        vocabulary.use(message.form, message.max_bytes)
    elif settings.max_message:
        vocabulary.use(MESSAGE, settings.max_message)
    return vocabulary


def _page(settings: config.Settings, vocabulary: Vocabulary) -> ChatPage:
    """Make the page for browsers; end the process with one line if the stylesheet of the operator cannot be read."""
    try:
        stylesheet = None if settings.stylesheet is None else Stylesheet(settings.stylesheet.absolute())
    except ValueError as error:
        raise SystemExit(f"chatd: --stylesheet: {error}") from None
    return ChatPage(
        title=settings.title,
        login=settings.login_url,
        claim=settings.jwt_username if settings.tokens else "",
        personal=bool(settings.jwt_cookie),
        shown=not settings.no_page,
        proxied=settings.proxied,
        stylesheet=stylesheet,
        vocabulary=vocabulary,
    )


def makeService(options: Options) -> IService:
    """Compose the server."""
    reactor = _reactor()
    settings = options.settings
    # Objects alive now live forever: exclude them from garbage collection.
    gc.freeze()
    gc.set_threshold(GARBAGE)
    store: Store = _store(settings, reactor)
    rooms = Registry(store, frames, reactor, settings.history, store.lobby)
    connections = Connections(reactor, settings.ping)
    rooms_allowed, origins = [*map(room_pattern, settings.rooms)], [*map(origin_pattern, settings.origin)]
    vocabulary = _vocabulary(settings)
    admission = Admission(rooms_allowed, origins, proxied=settings.proxied, vocabulary=vocabulary)
    rate = Rate(*settings.rate, reactor.seconds) if settings.rate[0] else None
    addresses = Addresses(rate, settings.proxy_hops, reactor.seconds)
    limits = Limits(reactor, settings.max_per_address, settings.proxy_hops)
    tokens = _tokens(settings, reactor, vocabulary)
    readiness = Readiness(lambda: store.fault or (None if tokens is None else tokens.fault))
    admin_token = _admin_token(settings)
    exports = ExportQueue(rooms, connections, reactor)
    page, documents = _page(settings, vocabulary), Documents(vocabulary)
    listing = RoomList(store, rooms)
    api = Api(rooms, connections, admission, addresses, tokens, listing=listing, exports=exports, page=page)
    resources = {"": api, "rooms": api, "events": api, **page.resources, **documents.resources}
    site = http.site(readiness, reactor, resources, rate, limits, tokens=tokens, proxied=settings.proxied)
    moderator = Moderator(store.sanctions, connections.connected, time.time, settings.proxy_hops)
    site.intake.moderator = moderator
    site.intake.vocabulary = vocabulary
    operating = ModerationApi(store, rooms, time.time, new_epoch, listing=RoomList(store, rooms), exports=exports)
    factory = ChatFactory(
        rooms=rooms,
        connections=connections,
        admission=admission,
        site=site,
        reactor=reactor,
        compress=settings.compress,
    )

    def schema_changed() -> None:
        factory.allow(vocabulary.max_bytes)
        documents.refresh()
        page.refresh()

    schema_changed()
    refused_operators: Counter[str] = Counter()
    fanout = _fanout(settings, store, reactor)
    metrics = Metrics(
        store=store,
        rooms=rooms,
        connections=connections,
        refusals={
            "frame": site.intake.refusals,
            "handshake": factory.refused_handshakes,
            "request": site.refused,
            "admin": refused_operators,
        },
        throttles=site.intake.throttles,
        limits=limits,
        sanctioned=moderator.refusals,
        clock=reactor,
        webhooks=() if fanout is None else fanout,
    )
    twistd = {} if options.parent is None else options.parent
    process = ServerProcess(twistd, reactor)
    observer = _observer(settings, twistd, reactor)
    entrance = Entrance(factory, reactor, options.machine.open_files)
    limits.is_full = entrance.is_full
    service = ChatService(
        store=store,
        seed=settings.seed,
        connections=connections,
        factory=entrance,
        admin_factory=http.admin(
            readiness,
            reactor,
            drain=lambda: service.drain(expecting=True),  # a load balancer may still send clients
            metrics=metrics,
            resources={"sanctions": operating, "rooms": operating},
            check=lambda head: check_token(head, admin_token.value),
            hostname=socket.gethostname(),
            refused=refused_operators,
        ),
        listen=options.listen,
        admin=options.admin,
        readiness=readiness,
        drain=Drain(connections, store, site, settings.drain, reactor),
        clock=reactor,
        process=process,
        lateness=limits.lateness,
        observer=observer,
        notify=Notifier(options.environ),
        each_second=[] if tokens is None else [tokens.keys.look],
        webhooks=fanout,
    )
    for line in check.exposures(settings):
        _logger.warn("{exposure}", exposure=line)
    process.daemonize()
    found = (admin_token, None if tokens is None else tokens.keys, page.stylesheet, fanout)
    files: list[Reloadable] = [file for file in found if file is not None]
    if settings.schema is not None:
        files.append(SchemaFile(settings.schema.absolute(), settings.max_message, vocabulary, schema_changed))
    _heed_upkeep(reactor, observer, options.ports, files)
    reactor.callWhenRunning(_heed_signals, reactor, service)
    return service


def _observer(settings: config.Settings, twistd: MutableMapping[str, Any], reactor: Any) -> logging.LineObserver | None:
    """Make the log observer; None if the options of twistd name another one.  Refuse options that cannot work."""
    reason = obstacle(twistd)
    if reason:
        raise SystemExit(f"chatd: {reason}")
    if twistd.get("logger"):
        return None

    def later(seconds: float, function: Callable[[], None]) -> None:
        reactor.callFromThread(reactor.callLater, seconds, function)

    try:
        observer = logging.open_log(logging.FORMATS[settings.log_format], twistd, later)
    except ValueError as error:
        raise SystemExit(f"chatd: {error}") from None
    reactor.callWhenRunning(observer.gather)
    reactor.addSystemEventTrigger("after", "shutdown", observer.drain)
    return observer


def _admin_token(settings: config.Settings) -> AdminToken:
    """Read the token of the admin port; end the process with one line if that fails."""
    file = settings.admin_token_file
    try:
        return AdminToken(None if file is None else (settings.folder / file).absolute())
    except ValueError as error:
        raise SystemExit(f"chatd: {error}") from None


def _heed_upkeep(
    reactor: Any, observer: logging.LineObserver | None, ports: Ports, files: Sequence[Reloadable]
) -> None:
    """Reload at SIGHUP, and rotate the log at SIGUSR1, as twistd does."""

    def reload() -> None:
        _logger.info("reloading")
        if observer is not None:
            observer.reopen()
        ports.reload()
        for file in files:
            file.reload()

    actions = {signal.SIGHUP: reload, signal.SIGUSR1: (lambda: None) if observer is None else observer.rotate}

    def heed(number: int, _: Any) -> None:
        reactor.callFromThread(actions[signal.Signals(number)])

    for number in actions:
        signal.signal(number, heed)


def _heed_signals(reactor: Any, service: ChatService) -> None:
    """Report to the service every signal that ends the process; twistd would only log the second one."""
    handlers = {signal.SIGTERM: reactor.sigTerm, signal.SIGINT: reactor.sigInt}
    stopping: list[int] = []

    def heed(number: int, frame: Any) -> None:
        reactor.callFromThread(service.signalled, number)
        if not stopping:
            stopping.append(number)
            handlers[signal.Signals(number)](number, frame)

    for number in handlers:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, heed)
