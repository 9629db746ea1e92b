"""The clients of a server, and the loads on it.

The *open loop* posts by the clock, however slow the server is.  A load that waits for answers would slow down with the
server, and would not measure what clients wait for when it cannot keep up (coordinated omission).  Latency therefore
runs from the time at which a message was due until one of the sampled clients has it.  It includes the time in which
the load reads.

A *saturated* server gets the next message as soon as it has delivered one, so the load finds the rate that it carries.
In one room ten senders keep eight messages in flight each, and the server sends several of them with one call.  In many
rooms each room has one sender with one message in flight.  No two messages can be sent together, so each delivery costs
a call.
"""

import json
import math
import os
import select
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple, Self

from benching.messages import KEY, Inflater, StreamError, accepts, number_of, upgrade
from benching.server import BenchError, Clock, Server, per_cpu, percentile
from benching.streams import Client, First, Reference
from chatd.transport.framing import accept_token, server_frame_at

SENDERS: Final = 10
"""The senders of a server with one room."""
UNECHOED: Final = 8
"""The messages that each of them keeps in flight."""
SAMPLED: Final = 20
"""The clients whose latency is measured."""
JOINING: Final = 50
"""The handshakes in flight at a time."""
STALL: Final = 10.0
"""The seconds without a byte after which the run fails."""
CROWD: Final = 100
"""The clients below which the memory of one is noise."""
Row = dict[str, Any]


class Case(NamedTuple):
    """The conditions of a measurement with one server."""

    store: str
    clients: int
    rooms: int
    compress: bool
    """True if the server compresses and its clients offer it."""

    def name(self, room: int) -> str:
        """Return the name of a room."""
        return "main" if self.rooms == 1 else f"r{room}"


def connect(port: int, number: int) -> socket.socket:
    """Connect client `number`."""
    try:
        sock = socket.create_connection(("127.0.0.1", port), STALL)
    except OSError as error:
        raise BenchError(f"client {number} cannot connect ({error.strerror}): ask for fewer --clients") from None
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def check_answer(head: bytes, *, compress: bool) -> None:
    """Raise BenchError unless the head of an answer accepts the handshake, and compression if it was offered."""
    if not head.startswith(b"HTTP/1.1 101 ") or accept_token(KEY) not in head:
        raise BenchError(f"the server refused the handshake: {head[:200]!r}")
    if accepts(head) != compress:
        raise BenchError(f"the server answered about permessage-deflate: {head[:400]!r}")


class Load:
    """The clients of one server."""

    def __init__(self, server: Server, case: Case) -> None:
        server.wait()
        self._server, self._case = server, case
        self._clients: dict[int, Client] = {}
        self._references: list[Reference] = []
        self._ready: set[Client] = set()
        self._epoll = select.epoll()
        self._heard = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for client in self._clients.values():
            client.sock.close()
        self._epoll.close()

    # Joining

    def join(self) -> Row:
        """Connect all clients; return the cost of a connection."""
        count, rooms = self._case.clients, self._case.rooms
        sampled = {math.ceil(place * (count - 1) / (SAMPLED - 1)) for place in range(SAMPLED)}
        for room in range(rooms):
            self._first(room, sampled=room in sampled)
        time.sleep(0.1)  # for late work of the server's start
        cpu, memory, new = self._server.cpu(), self._server.memory(), count - rooms
        waiting: list[Client] = []
        for number in range(rooms, count):
            reference = self._references[number % rooms]
            sock = self._connect(number % rooms)
            waiting.append(self._add(Client, sock, reference, number // rooms, sampled=number in sampled))
            while len(waiting) >= (JOINING if number < count - 1 else 1):
                self._turn(0.1)
                waiting = [client for client in waiting if client.position < client.reference.begin]
        idle = (self._server.memory() - memory) / 1024 / new if new >= CROWD - 1 else None
        return {"idle_kb": idle, "connections_per_cpu_s": per_cpu(new, self._server.cpu() - cpu)}

    def _connect(self, room: int) -> socket.socket:
        sock = connect(self._server.port, len(self._clients) + 1)
        sock.send(upgrade(self._case.name(room), compress=self._case.compress))
        self._heard = time.monotonic()
        return sock

    def _first(self, room: int, *, sampled: bool) -> None:
        """Connect the first client of a room, and check its handshake."""
        data, frame, sock = b"", None, self._connect(room)
        while frame is None:
            more = sock.recv(1 << 16)
            data += more
            head, end, rest = data.partition(b"\r\n\r\n")
            if end or not more:
                check_answer(head, compress=self._case.compress)
            if not more:
                raise BenchError("the server ended the connection after the handshake")
            frame = server_frame_at(rest, 0)
        history = json.loads(Inflater().text(frame.first, rest[frame.begin : frame.end]))
        senders = 1 if self._case.rooms > 1 else min(SENDERS, self._case.clients)
        reference = Reference(data, number_of(history["id"]), senders, self._case.name(room))
        reference.ready = self._ready
        self._references.append(reference)
        self._add(First, sock, reference, 0, sampled=sampled)

    def _add(
        self, kind: type[Client], sock: socket.socket, reference: Reference, name: int, *, sampled: bool
    ) -> Client:
        client = kind(sock, reference, name, sampled=sampled, compress=self._case.compress)
        sock.settimeout(0)
        self._clients[sock.fileno()] = client
        self._epoll.register(sock, select.EPOLLIN)
        return client

    # Loads

    def _turn(self, timeout: float) -> None:
        """Read once from each client that has received something."""
        select.select([self._epoll], [], [], timeout)  # epoll's own wait is in whole milliseconds
        ready = self._epoll.poll(0)
        for number, _ in ready:
            client = self._clients[number]
            try:
                data = client.sock.recv(1 << 16)
            except BlockingIOError:
                continue
            except ConnectionError:
                data = b""
            if not data:
                raise StreamError(f"the server ended the connection of {client}")
            client.take(data)
        now = time.monotonic()
        if ready:
            self._heard = now
        elif now > self._heard + STALL:
            raise StreamError(f"nothing came in {STALL:g} seconds, and something is missing")

    def run(self, seconds: float, rate: float) -> Row:
        """Load the server for some seconds, saturated if the rate is 0; return the figures."""
        clients = [*self._clients.values()]
        senders = [client for client in clients if client.name < len(client.reference.echoes)]
        before, received = self._deliveries(), sum(client.received for client in clients)
        messages = sum(reference.posted for reference in self._references)
        for client in clients:
            client.latencies.clear()
        clock = Clock(self._server)
        self._heard, late = clock.start, clock.start + 10 * seconds + 60
        for timeout in self._open_loop(senders, seconds, rate) if rate else self._saturated(senders, seconds):
            self._turn(timeout)
        behind = [*clients]
        while behind:
            self._turn(0.01)
            for client in senders:
                client.send(b"")
            while behind and behind[-1].complete:
                behind.pop()
            if time.monotonic() > late:
                raise StreamError("the messages took more than ten times as long to come as to post")
        spent = self._heard - clock.start
        shares = clock.shares(spent)
        deliveries = self._deliveries() - before
        messages = sum(reference.posted for reference in self._references) - messages
        latencies = sorted(latency for client in clients for latency in client.latencies) or [math.nan]
        self._turn(0.1)  # for duplicates
        if any(reference.ahead for reference in self._references):
            raise StreamError("a client got more than the first client")
        return {
            "messages_per_s": messages / spent,
            "deliveries_per_s": deliveries / spent,
            "work": per_cpu(deliveries, shares["server_cpu_s"]),
            "bytes_per_delivery": (sum(client.received for client in clients) - received) / deliveries,
            **{f"p{percent}_ms": percentile(latencies, percent) for percent in (50, 95, 99)},
            "max_ms": latencies[-1],
            "rss_mb": self._server.memory() / 1e6,
            **shares,
        }

    def _deliveries(self) -> int:
        """Return the messages that all clients together must have received."""
        count, rooms = self._case.clients, self._case.rooms
        members = [len(range(room, count, rooms)) for room in range(rooms)]
        return sum(one.posted * each for one, each in zip(self._references, members, strict=True))

    def _saturated(self, senders: Sequence[Client], seconds: float) -> Iterator[float]:
        """Fill the window of each sender, and yield the time to wait for messages."""
        end, window = time.monotonic() + seconds, UNECHOED if self._case.rooms == 1 else 1
        self._ready.update(senders)
        while time.monotonic() < end:
            ready = [*self._ready]
            self._ready.clear()
            for client in ready:
                client.post(time.monotonic_ns(), window - client.posted + client.echoed)
            yield 0.01

    @staticmethod
    def _open_loop(senders: Sequence[Client], seconds: float, rate: float) -> Iterator[float]:
        """Post by the clock, and yield the time to wait for messages."""
        start = time.monotonic_ns()
        for number in range(max(1, round(seconds * rate))):
            due = start + int(number / rate * 1e9)
            while (early := due - time.monotonic_ns()) > 0:
                yield early / 1e9
            senders[number % len(senders)].post(due)


def measure(case: Case, rates: Sequence[float], seconds: float, core: int) -> list[Row]:
    """Run one round with one server: return a row for each rate, without figures from the first fault on."""
    rows: list[Row] = [{"fault": "an earlier load failed"} for _ in rates]
    with Server(case.store, core, compress=case.compress) as server, Load(server, case) as load:
        try:
            joined = load.join()
            for place, rate in enumerate(rates):
                rows[place] = load.run(seconds, rate) | joined
        except StreamError as fault:
            rows[next(place for place, row in enumerate(rows) if "fault" in row)] = {"fault": str(fault)}
    return rows


def cores() -> tuple[int, int]:
    """Pin this process to the last core that it may use; return the server's core and its own."""
    mine = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {mine[-1]})
    return mine[0], mine[-1]
