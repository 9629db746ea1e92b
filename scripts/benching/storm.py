"""The storm: the kill of a server under all its clients, which then reconnect all at once.

SIGKILL leaves a server no time to write anything.  So every message that any client has received must be in the file
already.  A post without an ack may or may not be there.  Senders label their posts, and repeat those without an ack
after they reconnect.  Then each post must be in the log exactly once.  Every client names the last message that it has,
and must receive the messages after it exactly once and in order.

Senders post by the clock all the time, also while no server runs.  A second after the kill the server starts again.  As
soon as it listens, all clients connect.  A client has *caught up* when it has joined and has every message that any
client had before the kill.  This time counts from the start of the new process.

The kernel queues connections that the server has not accepted yet, at most `net.core.somaxconn` of them.  It drops the
others without a word, and their clients try again a second later.  A queue of 4,096 therefore adds a second to the time
of the clients behind it, in which the server may be idle.

The same text reaches most clients.  So each text is parsed once, and recognized by its bytes afterwards.
"""

import contextlib
import errno
import json
import select
import socket
import time
from collections.abc import Callable
from typing import Any, Final, Self

from benching.load import JOINING, SENDERS, STALL, Case, Row, check_answer, connect
from benching.messages import Inflater, StreamError, cut, document, facts, number_of, post_frame, upgrade
from benching.server import STARTING, BenchError, Clock, Server, per_cpu, percentile

DOWN: Final = 1.0
"""The seconds without a server."""
ACK: Final = b'{"type":"ack"'
HISTORY: Final = b'{"type":"history"'


class Overdue(StreamError):
    """Something did not happen in time."""


class Ledger:
    """The messages of the room by number, as all clients together have received them."""

    def __init__(self) -> None:
        self.epoch = ""
        self.head = 0
        """The newest number that any client has received."""
        self.texts: dict[int, str] = {}
        self.places: dict[tuple[int, int], int] = {}
        """The number of each post, by its sender and its place among the posts of it."""
        self.doubled = 0
        """The posts that are in the log more than once."""
        self._known: dict[bytes, range] = {}

    def read(self, text: bytes) -> range:
        """Return the numbers of the messages in a frame of the server."""
        numbers = self._known.get(text)
        if numbers is None:
            numbers = self._known[text] = self._parse(text)
        return numbers

    def _parse(self, text: bytes) -> range:
        if text.startswith(HISTORY):
            history: dict[str, Any] = document(text, "history")
            last, messages = self._number(history["id"]), [one["message"] for one in history["data"]]
            if "resumed" not in history:  # the greeting, with what was there before
                self.head = max(self.head, last)
                return range(last, last + 1)
            if not history["resumed"]:
                raise StreamError("the log began again: a client could not resume")
        else:
            message: dict[str, Any] = document(text, "message")
            last, messages = self._number(message["id"]), [message["data"]["message"]]
        numbers = range(last - len(messages) + 1, last + 1)
        for number, one in zip(numbers, messages, strict=True):
            self._enter(number, one)
        self.head = max(self.head, last)
        return numbers

    def _number(self, frame_id: str) -> int:
        epoch = frame_id.rpartition("-")[0]
        self.epoch = self.epoch or epoch
        if epoch != self.epoch:
            raise StreamError(f"the log began again: its epoch was {self.epoch} and is {epoch}")
        return number_of(frame_id)

    def _enter(self, number: int, message: str) -> None:
        if self.texts.setdefault(number, message) != message:
            raise StreamError(f"message {number} was {self.texts[number]!r}, and is {message!r}")
        self.doubled += self.places.setdefault(facts(message)[:2], number) != number


class Reader:
    """The messages that one client has received, over all its connections."""

    def __init__(self, ledger: Ledger) -> None:
        self.number: int | None = None
        """The number of its newest message; None before its first history."""
        self.lost = self.doubled = 0
        self.joined = False
        """True if this connection has its history."""
        self.acked: set[str] = set()
        """The labels of its posts that the server has stored."""
        self._ledger = ledger
        self._rest, self._inflater = b"", Inflater()

    def connected(self) -> None:
        """Begin a connection, whose handshake is over."""
        self.joined, self._rest, self._inflater = False, b"", Inflater()

    def take(self, data: bytes) -> bytes:
        """Check received bytes; return the pongs to send."""
        frames, self._rest, pongs = cut(self._rest + data)
        for first, payload, _ in frames:
            self._text(self._inflater.text(first, payload))
        return pongs

    def _text(self, text: bytes) -> None:
        if text.startswith(ACK):
            self.acked.add(json.loads(text)["label"])
            return
        if text.startswith(HISTORY) == self.joined:
            raise StreamError(f"the server sent {text[:200]!r}")
        numbers = self._ledger.read(text)
        self.joined = True
        if self.number is None:
            self.number = numbers.stop - 1
            return
        for number in numbers:
            self.doubled += number <= self.number
            self.lost += max(0, number - self.number - 1)
            self.number = max(self.number, number)


class Survivor:
    """A client that outlives its server; the first few also post."""

    def __init__(self, name: int, ledger: Ledger, *, compress: bool) -> None:
        self.name, self.reader = name, Reader(ledger)
        self.sock: socket.socket | None = None
        self.caught_up = 0.0
        """When it had caught up, on the clock."""
        self.repeated = 0
        self._ledger, self._compress = ledger, compress
        self._head: bytes | None = None  # what it has received of the answer to its handshake
        self._posts: list[tuple[str, bytes]] = []  # without an ack: label and frame
        self._posted, self._unsent = 0, b""

    def open(self, sock: socket.socket) -> None:
        """Begin a connection, and ask for what follows the newest message."""
        number = self.reader.number
        last = None if number is None else f"{self._ledger.epoch}-{number}"
        self.sock, self._head = sock, b""
        self.reader.joined = False
        self._unsent = upgrade("main", last, compress=self._compress)

    def lose(self) -> None:
        """End the connection."""
        if self.sock is not None:
            self.sock.close()
        self.sock, self._unsent, self.reader.joined = None, b"", False

    def post(self, due: int) -> None:
        """Post a message with a label, now or after it has joined."""
        label = f"{self.name}-{self._posted}"
        frame = post_frame(self.name, self._posted, due, label=label, compress=self._compress)
        self._posted += 1
        self._posts.append((label, frame))
        if self.reader.joined:
            self.send(frame)

    def unanswered(self) -> list[bytes]:
        """Return the posts without an ack."""
        acked = self.reader.acked
        if acked:
            self._posts = [post for post in self._posts if post[0] not in acked]
            acked.clear()
        return [frame for _, frame in self._posts]

    def take(self, data: bytes) -> None:
        """Check received bytes; repeat the posts without an ack after the history."""
        if self._head is not None:
            head, end, data = (self._head + data).partition(b"\r\n\r\n")
            if not end:
                self._head = head
                return
            check_answer(head, compress=self._compress)
            self._head = None
            self.reader.connected()
        joined = self.reader.joined
        pongs = self.reader.take(data)
        if self.reader.joined and not joined:
            posts = self.unanswered()
            self.repeated += len(posts)
            pongs += b"".join(posts)
        if pongs:
            self.send(pongs)

    def send(self, data: bytes) -> None:
        """Send the unsent bytes and then these, until the socket is full."""
        self._unsent += data
        if self.sock is not None and self._unsent:
            with contextlib.suppress(BlockingIOError, ConnectionError):  # reading reports a lost connection
                self._unsent = self._unsent[self.sock.send(self._unsent) :]


class Storm:
    """One server, its end and its return, under its clients."""

    def __init__(self, server: Server, case: Case, rate: float) -> None:
        server.wait()
        self._server, self._case, self._rate = server, case, rate
        self._ledger = Ledger()
        self._clients = [Survivor(name, self._ledger, compress=case.compress) for name in range(case.clients)]
        self._senders = self._clients[:SENDERS]
        self._by_file: dict[int, Survivor] = {}
        self._epoll = select.epoll()
        self._heard = self._start = time.monotonic()
        self._posted = 0
        self._posting = self._killed = False
        self._target = 0  # the newest number that anyone had before the kill
        self._behind: set[Survivor] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for client in self._clients:
            client.lose()
        self._epoll.close()

    def join(self) -> None:
        """Connect all clients, some at a time."""
        waiting: list[Survivor] = []
        for client in self._clients:
            sock = connect(self._server.port, client.name + 1)
            sock.settimeout(0)
            self._add(client, sock, select.EPOLLIN)
            client.send(b"")
            waiting.append(client)
            while len(waiting) >= (JOINING if client is not self._clients[-1] else 1):
                self._turn(0.1)
                waiting = [one for one in waiting if not one.reader.joined]

    def _add(self, client: Survivor, sock: socket.socket, events: int) -> None:
        client.open(sock)
        self._by_file[sock.fileno()] = client
        self._epoll.register(sock, events)

    def _lose(self, client: Survivor, file: int) -> None:
        if not self._killed:
            raise StreamError(f"the server ended the connection of client {client.name}")
        self._epoll.unregister(file)
        del self._by_file[file]
        client.lose()

    def _turn(self, timeout: float) -> None:
        """Post what is due, and read once from each client that has received something."""
        self._post()
        select.select([self._epoll], [], [], timeout)
        ready = self._epoll.poll(0)
        now = time.monotonic()
        for file, events in ready:
            client = self._by_file[file]
            if events & select.EPOLLOUT:
                self._epoll.modify(file, select.EPOLLIN)
                client.send(b"")
                continue
            try:
                data = client.sock.recv(1 << 16) if client.sock else b""
            except BlockingIOError:
                continue
            except ConnectionError:
                data = b""
            if not data:
                self._lose(client, file)
                continue
            client.take(data)
            if client in self._behind and client.reader.joined and (client.reader.number or 0) >= self._target:
                client.caught_up = time.monotonic()
                self._behind.discard(client)
        if ready or self._killed:
            self._heard = now
        elif now > self._heard + STALL:
            raise StreamError(f"nothing came in {STALL:g} seconds, and something is missing")

    def _post(self) -> None:
        while self._posting and self._start + self._posted / self._rate <= time.monotonic():
            due = int((self._start + self._posted / self._rate) * 1e9)
            self._senders[self._posted % len(self._senders)].post(due)
            self._posted += 1

    def _until(self, done: Callable[[], bool], seconds: float, what: str) -> None:
        late = time.monotonic() + seconds
        while not done():
            self._turn(0.01)
            if time.monotonic() > late:
                raise Overdue(f"{what} took more than {seconds:g} seconds")

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        self._until(lambda: time.monotonic() >= end, seconds + STALL, "waiting")

    def run(self, seconds: float) -> Row:
        """Post for some seconds, kill the server, and let everyone return; return the figures."""
        self._posting, self._start = True, time.monotonic()
        self._wait(seconds)
        self._killed = True
        self._server.kill()
        self._wait(DOWN)
        self._until(lambda: not self._by_file, STALL, "the end of all connections")
        self._target = self._ledger.head
        restart = time.monotonic()
        self._server.start()
        self._until(self._server.ready, STARTING, "the start of the server")
        self._killed = False
        clock, self._heard = Clock(self._server), time.monotonic()
        self._return()
        self._until(lambda: not self._behind, 10 * STALL, "catching up")
        shares = clock.shares(time.monotonic() - clock.start)
        self._wait(seconds)
        self._posting = False
        missing = self._settle()
        times = sorted(client.caught_up - restart for client in self._clients)
        lost = sum(client.reader.lost for client in self._clients) + missing
        doubled = sum(client.reader.doubled for client in self._clients) + self._ledger.doubled
        row = {
            "ready_s": clock.start - restart,
            **{f"p{percent}_s": percentile(times, percent) for percent in (50, 99)},
            "max_s": times[-1],
            "connections_per_cpu_s": per_cpu(len(self._clients), shares["server_cpu_s"]),
            "messages": self._posted,
            "repeated": sum(client.repeated for client in self._senders),
            "lost": lost,
            "doubled": doubled,
            **shares,
        }
        return row | ({"fault": f"{lost} lost and {doubled} doubled"} if lost or doubled else {})

    def _return(self) -> None:
        """Connect all clients again, as fast as one process can."""
        self._behind = {*self._clients}
        for place, client in enumerate(self._clients):
            sock = socket.socket()
            sock.settimeout(0)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if sock.connect_ex(("127.0.0.1", self._server.port)) not in (0, errno.EINPROGRESS):
                raise BenchError(f"client {client.name} cannot connect again: ask for fewer --clients")
            self._add(client, sock, select.EPOLLIN | select.EPOLLOUT)
            if place % JOINING == JOINING - 1:
                self._turn(0)

    def _settle(self) -> int:
        """Wait until everyone has everything; return how many messages are missing if that does not happen."""
        with contextlib.suppress(Overdue):
            self._until(self._settled, 3 * STALL, "the last messages")
            self._wait(0.1)  # for duplicates
        head = self._ledger.head
        missing = sum(head - (client.reader.number or 0) for client in self._clients)
        return missing + (self._posted - len(self._ledger.places)) * len(self._clients)

    def _settled(self) -> bool:
        if any(client.unanswered() for client in self._senders):
            for client in self._senders:
                client.send(b"")
            return False
        head = self._ledger.head
        return len(self._ledger.places) == self._posted and all(one.reader.number == head for one in self._clients)


def measure(case: Case, rate: float, seconds: float, core: int) -> Row:
    """Run one storm; return its figures, or the fault that ended it."""
    with Server(case.store, core, compress=case.compress) as server, Storm(server, case, rate) as storm:
        try:
            storm.join()
            return storm.run(seconds)
        except StreamError as fault:
            return {"fault": str(fault)}
