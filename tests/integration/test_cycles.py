"""Ten thousand cycles: connect, post, be cut, resume from the last id and retry, while the server is killed at times.

The clients are sockets in one process.  There are enough of them that the server commits and delivers for some
whenever one is cut.  A cut is at any byte of the requests or the answers, with a reset or an orderly end.
Nothing sleeps: a client that finds no server waits until the next one is ready.
"""

import asyncio
import contextlib
import json
import random
import socket
import struct
import sys

from support.servers import LONG, Server, stored, upgrade
from support.websocket_frames import TEXT, frame, take_frames

CYCLES = 10_000
CLIENTS = 50
ROOMS = 5
KILLS = 20
HISTORY = 20
"""Fewer than some clients miss, so that missed messages are in the history frame and after it."""

NO_LINGER = struct.pack("ii", 1, 0)
"""The socket is to be closed with a reset, and what it has not sent thrown away."""


class Cut(Exception):
    """Raised when the connection has ended."""


class Client:
    """A program that keeps its room's messages by their ids, and posts with a label until that is acknowledged."""

    def __init__(self, place, number):
        self.place = place
        self.chance = random.Random(number)
        self.name = f"c{number}"
        self.room = f"room-{number % ROOMS}"
        self.posts = 0
        self.pending = {}
        self.acked = {}
        self.epoch = None
        self.first = self.cursor = None
        self.entries = []
        self.resumed = 0
        self.repeated = 0

    # One connection

    async def connect(self, limit=sys.maxsize):
        """Join the room where this was left; when so many bytes were heard the connection is cut."""
        await self.place.ready.wait()
        loop = asyncio.get_running_loop()
        self.socket = socket.socket()
        self.socket.settimeout(0)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.data = bytearray()
        self.limit = limit
        self.place.connections += 1
        self.asked = self.cursor
        self.greeted = False
        query = "" if self.cursor is None else f"?last_event_id={self.epoch}-{self.cursor}"
        try:
            await loop.sock_connect(self.socket, ("127.0.0.1", self.place.port))
        except OSError:
            raise Cut from None
        await self.send(upgrade(f"/rooms/{self.room}{query}"))
        while b"\r\n\r\n" not in self.data:
            await self.more()
        head, _, self.data = self.data.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 "), head
        self.take()
        while not self.greeted:
            await self.hear()

    async def send(self, data):
        try:
            await asyncio.get_running_loop().sock_sendall(self.socket, data)
        except OSError:
            raise Cut from None

    async def more(self):
        if not self.limit:
            raise Cut
        try:
            data = await asyncio.get_running_loop().sock_recv(self.socket, min(self.limit, 1 << 16))
        except OSError:
            raise Cut from None
        if not data:
            raise Cut
        self.data += data
        self.limit -= len(data)

    async def hear(self):
        await self.more()
        self.take()

    def close(self):
        if self.chance.random() < 0.5:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
        self.socket.close()

    # Reading

    def take(self):
        """Take the frames that are whole by now."""
        found, self.data = take_frames(self.data)
        for one in found:
            assert one.first == 0x80 | TEXT, one
            text = json.loads(one.payload)
            if text["type"] == "ack":
                self.acknowledged(text)
            else:
                self.given(text)

    def given(self, text):
        """Check that messages arrive once each, without gaps and in the order of their ids."""
        epoch, _, number = text["id"].partition("-")
        number = int(number)
        entries = [text["data"]] if text["type"] == "message" else text["data"]
        first = number - len(entries) + 1
        if text["type"] == "history":
            assert not self.greeted
            self.greeted = True
            if self.asked is None:
                self.epoch, self.first, self.cursor = epoch, first, first - 1
            else:
                assert text["resumed"] is True
                self.resumed += 1
        assert epoch == self.epoch
        assert first == self.cursor + 1, f"{self.name} has {self.cursor}, and was given {first} of {text['type']}"
        self.entries += [(entry["username"], entry["message"]) for entry in entries]
        self.cursor = number

    def acknowledged(self, text):
        label = text["label"]
        number = int(text["id"].partition("-")[2])
        assert text["id"] == f"{self.epoch}-{number}"
        self.repeated += text.get("duplicate", False)
        if label in self.pending:
            self.acked[label] = number, self.pending.pop(label)
        assert self.acked[label][0] == number, "the first id, whenever it is said"
        if "duplicate" not in text:
            assert number <= self.cursor, "after the message itself"

    # Posting

    def said(self):
        """Return every post that has no ack, oldest first."""
        return b"".join(
            frame(TEXT, json.dumps({"username": self.name, "message": text, "label": label}).encode())
            for label, text in self.pending.items()
        )

    def post(self):
        self.posts += 1
        self.pending[f"l{self.posts}"] = f"{self.name} says {self.posts} {'.' * self.chance.randrange(100)}"

    async def cycle(self):
        """Reconnect, send unacknowledged posts and a new one, and be cut; return whether the new post was made.

        The cut is in the handshake, amid the posts, after them, amid the answers, or after them.
        """
        chance = self.chance
        where = chance.choice(["beginning", "said", "end", "answers", "acknowledged"])
        posted = False
        try:
            await self.connect(chance.randrange(600) if where == "beginning" else sys.maxsize)
            self.post()
            posted = True
            said = self.said()
            await self.send(said[: chance.randrange(len(said))] if where == "said" else said)
            if where == "answers":
                self.limit = chance.randrange(400)
            while self.pending and where not in ("said", "end"):
                await self.hear()
        except Cut:
            pass
        finally:
            self.close()
        return posted

    async def settle(self):
        """Reconnect until every post is acknowledged."""
        while self.pending:
            with contextlib.suppress(Cut):
                await self.connect()
                await self.send(self.said())
                while self.pending:
                    await self.hear()
            self.close()

    async def catch_up(self, heads):
        """Reconnect, and receive the missed messages."""
        await self.connect()
        while self.cursor < heads[self.room]:
            await self.hear()
        self.close()


class Place:
    """The server, which is killed and restarted while clients connect and disconnect."""

    def __init__(self, folder):
        self.folder = folder
        self.ready = asyncio.Event()
        self.wanted = asyncio.Event()
        self.cycles = self.connections = self.kills = 0
        self.clients = [Client(self, number) for number in range(CLIENTS)]
        self.epochs = set()

    def start(self):
        server = Server(self.folder, "--rate=0", f"--history={HISTORY}", "--log-format=json").__enter__()
        self.port = server.port
        self.epochs.add(server.epoch)
        return server

    def heads(self):
        return {f"room-{room}": len(self.rows(f"room-{room}")) for room in range(ROOMS)}

    def rows(self, room):
        return stored(self.folder / "chatd.sqlite", room)[1]

    async def keep_up(self, server):
        """Kill the server whenever that is wanted, and start another."""
        try:
            while True:
                self.ready.set()
                await self.wanted.wait()
                self.wanted.clear()
                self.ready.clear()
                await asyncio.to_thread(server.kill)
                self.kills += 1
                server = await asyncio.to_thread(self.start)
        finally:
            server.kill()

    async def live(self, client):
        for _ in range(CYCLES // CLIENTS):
            while not await client.cycle():
                pass
            self.cycles += 1
            if self.cycles % (CYCLES // (KILLS + 1)) == 0 and self.kills < KILLS:
                self.wanted.set()


async def everyone(does):
    async with asyncio.TaskGroup() as group:
        for one in does:
            group.create_task(one)


async def run(folder):
    place = Place(folder)
    keeper = asyncio.create_task(place.keep_up(place.start()))
    try:
        async with asyncio.timeout(4 * LONG):
            await everyone(place.live(client) for client in place.clients)
            await everyone(client.settle() for client in place.clients)
            heads = place.heads()
            await everyone(client.catch_up(heads) for client in place.clients)
    finally:
        keeper.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await keeper
    return place


def test_ten_thousand_cuts_and_twenty_kills(tmp_path, capsys):
    """Nothing is lost, stored twice or out of order."""
    place = asyncio.run(run(tmp_path))
    assert len(place.epochs) == 1
    lost = doubled = entries = 0
    for room in range(ROOMS):
        rows = place.rows(f"room-{room}")
        assert [row[0] for row in rows] == list(range(1, len(rows) + 1)), "dense"
        log = [row[1:3] for row in rows]
        doubled += len(log) - len({*log})
        entries += len(log)
        for client in place.clients[room::ROOMS]:
            lost += sum(log[number - 1] != (client.name, text) for number, text in client.acked.values())
            lost += sum(had != kept for had, kept in zip(client.entries, log[client.first - 1 :], strict=True))
    clients = place.clients
    posts = sum(client.posts for client in clients)
    figures = {
        "cycles": place.cycles,
        "connections": place.connections,
        "kills": place.kills,
        "posts": posts,
        "logged": entries,
        "acked": sum(len(client.acked) for client in clients),
        "retried": sum(client.repeated for client in clients),
        "resumed": sum(client.resumed for client in clients),
        "delivered": sum(len(client.entries) for client in clients),
        "lost": lost,
        "doubled": doubled,
    }
    with capsys.disabled():
        sys.stdout.write("\n" + " ".join(f"{name}={number}" for name, number in figures.items()) + "\n")
    assert (lost, doubled) == (0, 0)
    assert posts == entries == figures["acked"]
    assert place.kills == KILLS
    assert figures["retried"] > 0, "some acknowledgements were cut off"
