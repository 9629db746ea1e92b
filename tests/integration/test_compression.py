"""Independent clients inflate the shared stream of a room, whenever they join it and however slowly they read."""

import asyncio
import contextlib
import json
import random
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
import websockets
from support.loops import asynchronous
from support.servers import LONG, NODE, Server, environment, need
from websockets.extensions.permessage_deflate import PerMessageDeflate

from chatd.room.keyframes import KEYFRAME, LEAST_MEMBERS

MESSAGES = 4 * KEYFRAME
LATE = 12
"""The number of connections that join one after the other, besides those that join at once."""
SOCKETS = LEAST_MEMBERS + LATE
APART = MESSAGES // (LATE + 1)
"""The number of messages between two of them."""

COLLECT = """
const url = URL, apart = APART, last = LAST, sockets = [];
function open() {
  const socket = new WebSocket(url), texts = [];
  sockets.push({socket, texts});
  socket.onmessage = ({data}) => {
    texts.push(data);
    const {type, data: {message}} = JSON.parse(data);
    if (type === 'history') socket.send(JSON.stringify({username: 'NAME', message: 'joined'}));
    if (socket === sockets[0].socket && texts.length % apart === 0 && sockets.length < SOCKETS) open();
    if (message === last) finished();
  };
}
let left = SOCKETS;
function finished() {
  if (--left === 0) DONE;
}
for (let at_once = 0; at_once < LEAST; at_once++) open();
"""
"""The program of a client in JavaScript: more and more connections, each of which posts once."""


def collect(url, name, done):
    script = COLLECT.replace("URL", json.dumps(url)).replace("NAME", name).replace("DONE", done)
    for word, number in (
        ("APART", APART),
        ("SOCKETS", SOCKETS),
        ("LEAST", LEAST_MEMBERS),
        ("LAST", json.dumps("the last")),
    ):
        script = script.replace(word, str(number))
    return script


def is_of_room(text):
    return text.startswith('{"type":"message"')


def check(texts, witnessed):
    """Check that a client has the messages of the witness from its first one on, to the byte."""
    history, *others = texts
    assert json.loads(history)["type"] == "history"
    messages = [text for text in others if is_of_room(text)]
    assert messages == witnessed[len(witnessed) - len(messages) :]
    return len(messages)


@pytest.fixture
def compressed(monkeypatch):
    """The number of compressed frames that python-websockets received."""
    frames = []
    decode = PerMessageDeflate.decode

    def decode_and_count(extension, frame, **options):
        if frame.rsv1:
            frames.append(frame)
        return decode(extension, frame, **options)

    monkeypatch.setattr(PerMessageDeflate, "decode", decode_and_count)
    return frames


def post(text):
    return json.dumps({"username": "ann", "message": text}, ensure_ascii=False)


async def until_last(client):
    """Receive texts up to the last message."""
    texts = [await client.recv()]
    while '"message":"the last"' not in texts[-1]:
        texts.append(await client.recv())
    return texts


@contextlib.asynccontextmanager
async def witness(url):
    """A client without compression: its connection, and the texts of the messages that it received."""
    async with websockets.connect(url, compression=None) as client:
        await client.recv()
        yield client, []


async def say(client, witnessed, text):
    """Post, and take what the room sends up to this message."""
    await client.send(post(text))
    while f'"message":"{text}"' not in (received := await client.recv()):
        witnessed.append(received)
    witnessed.append(received)


@asynchronous
async def test_websockets_joins_at_random_moments(tmp_path, compressed):
    """Some of its connections end and resume."""
    moments = random.Random(20)
    with Server(tmp_path) as server:
        async with witness(server.url) as (client, witnessed):
            reading, resuming = [], []
            for number in range(MESSAGES):
                for _ in range(LEAST_MEMBERS if number == 0 else number % APART == 0):
                    one = await websockets.connect(server.url)
                    assert one.protocol.extensions
                    reading.append((one, asyncio.create_task(until_last(one))))
                if number % APART == 5 and moments.random() < 0.5:
                    one, task = reading.pop(moments.randrange(len(reading)))
                    task.cancel()
                    await one.close()
                    query = f"?last_event_id={json.loads(witnessed[-1])['id']}"
                    again = await websockets.connect(server.url + query)
                    resuming.append((again, asyncio.create_task(until_last(again))))
                await say(client, witnessed, f"message {number} of {moments.random()}")
            await say(client, witnessed, "the last")
            received = [(one, await task) for one, task in [*reading, *resuming]]
            for one, texts in received:
                assert check(texts, witnessed) > 0
                await one.close()
        assert len(resuming) > 2
        assert len(compressed) > MESSAGES


@asynchronous
async def test_node_ws_joins_a_busy_room(tmp_path):
    need("ws")
    found = "sockets.map(({socket, texts}) => [socket.extensions, socket._socket.bytesRead, texts])"
    done = f"console.log(JSON.stringify({found})), sockets.forEach(({{socket}}) => socket.close())"
    with Server(tmp_path) as server:
        script = "const WebSocket = require('ws');" + collect(server.url, "node", done)
        program = await asyncio.create_subprocess_exec(
            need("node"), "-e", script, cwd=NODE, env=environment(), stdout=subprocess.PIPE, limit=1 << 26
        )
        async with witness(server.url) as (client, witnessed):
            await busy(client, witnessed)
            found = json.loads(await program.stdout.readline())
    assert await program.wait() == 0
    assert len(found) == SOCKETS
    for extensions, size, texts in found:
        assert extensions == "permessage-deflate"
        if check(texts, witnessed) > 2 * KEYFRAME:
            assert size < sum(len(text.encode()) for text in texts)
    assert sum('"username":"node"' in text for text in witnessed) == SOCKETS


async def busy(client, witnessed):
    """Post until every connection of a client has joined, and then the last message."""
    number = 0
    while sum('"joined"' in text for text in witnessed) < SOCKETS or number < MESSAGES:
        number += 1
        assert number < 100 * MESSAGES, "a client does not join"
        await say(client, witnessed, f"message {number}")
    await say(client, witnessed, "the last")


def test_chromium_joins_a_busy_room(tmp_path, visit):
    """The browser also compresses what it posts."""

    async def keep_busy(server):
        async with witness(server.url) as (client, witnessed):
            await busy(client, witnessed)
        return witnessed

    with Server(tmp_path) as server, ThreadPoolExecutor(1) as thread:  # Playwright has the loop of this one
        page, url = visit(f"http://localhost:{server.port}/about"), f"ws://localhost:{server.port}/"
        begin = collect(url, "chromium", "done(sockets)")
        page.evaluate(f"""
            window.found = new Promise((done) => {{
              const first = new WebSocket("{url}");
              first.onmessage = ({{ data }}) => {{
                if (JSON.parse(data).type !== "message") return; // the witness has joined
                first.close();
                {begin}
              }};
            }});
            0""")
        witnessed = thread.submit(asyncio.run, keep_busy(server)).result(LONG)
        found = page.evaluate("found.then((all) => all.map(({socket, texts}) => [socket.extensions, texts]))")
    assert len(found) == SOCKETS
    for extensions, texts in found:
        assert extensions == "permessage-deflate; server_max_window_bits=12; client_no_context_takeover"
        assert check(texts, witnessed) > 0
    assert sum('"username":"chromium"' in text for text in witnessed) == SOCKETS


@asynchronous
async def test_client_that_falls_behind(tmp_path, compressed):
    """Its transport is full for so long that the tail overruns it; it then reads every message."""
    letters = random.Random(20)
    with Server(tmp_path, "--history=5") as server:
        small = socket.socket()
        small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        small.connect(("127.0.0.1", server.port))
        async with witness(server.url) as (client, witnessed), contextlib.AsyncExitStack() as stack:
            takers = [await stack.enter_async_context(websockets.connect(server.url)) for _ in range(LEAST_MEMBERS)]
            slow = await stack.enter_async_context(websockets.connect(server.url, sock=small, max_queue=1))
            reading = [asyncio.create_task(until_last(one)) for one in takers]
            await say(client, witnessed, "the first")
            for _ in range(60):
                for _ in range(80):
                    await client.send(post("".join(chr(letters.randrange(0x4E00, 0x9FFF)) for _ in range(500))))
                await say(client, witnessed, str(len(witnessed)))
            await say(client, witnessed, "the last")
            for task in reading:
                assert check(await task, witnessed) == len(witnessed)
            before = len(compressed)
            assert check(await until_last(slow), witnessed) == len(witnessed)
            assert len(compressed) > before
