"""Third-party clients, in other languages and libraries, and the examples in the README."""

import ast
import asyncio
import contextlib
import json
import pathlib
import re
import subprocess
import sys

import aiohttp
import pytest
import websockets
from support.browser import site
from support.servers import LONG, LOOPBACK, NODE, ROOT, Lines, Raw, Server, environment, need, numbered, stored
from websockets.sync.client import connect

WS = """
const WebSocket = require('ws');
const room = new WebSocket(process.argv[1], 'chat.v1');
room.on('message', data => console.log(data.toString()));
require('readline').createInterface({input: process.stdin}).on('line', line => room.send(line));
"""
POSTS = 25


class Program:
    """A client in its own process: it posts each line that it reads and prints each frame that it receives."""

    def __init__(self, stack, *command):
        self._process = subprocess.Popen(
            command, cwd=NODE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
        )
        self._lines = Lines(self._process.stdout)
        stack.callback(self._end)

    def _end(self):
        self._process.kill()
        self._process.wait(LONG)
        self._process.stdin.close()
        self._lines.close()

    async def send(self, text):
        self._process.stdin.write(f"{text}\n")
        self._process.stdin.flush()

    async def receive(self, count):
        """Return the first `count` frames, including the history, without wscat's prompts."""
        found = await asyncio.to_thread(self._lines.wait, r"^(?:> )*(\{.*)", count)
        return [match[1] for match in found]


class Library:
    """A client in this process: how to send, and how to receive one text."""

    def __init__(self, send, receive):
        self.send = send
        self._receive = receive
        self._frames = []

    async def receive(self, count):
        while len(self._frames) < count:
            self._frames.append(await self._receive())
        return self._frames[:count]


async def room_full(url, stack, programs):
    """Connect all clients; each posts once it has its history. Return what each of them received."""
    async with contextlib.AsyncExitStack() as libraries:
        session = await libraries.enter_async_context(aiohttp.ClientSession())
        of_aiohttp = await libraries.enter_async_context(session.ws_connect(url))
        of_websockets = await libraries.enter_async_context(websockets.connect(url, subprotocols=["chat.v1"]))
        clients = {name: Program(stack, *command) for name, command in programs.items()} | {
            "aiohttp": Library(of_aiohttp.send_str, of_aiohttp.receive_str),
            "websockets": Library(of_websockets.send, of_websockets.recv),
        }
        for client in clients.values():
            await client.receive(1)

        async def chat(name, client):
            for number in range(POSTS):
                await client.send(json.dumps({"username": name, "message": f"Привет 👋 {number}"}))
            return await client.receive(1 + POSTS * len(clients))

        got = await asyncio.gather(*(chat(*client) for client in clients.items()))
        assert of_websockets.subprotocol == "chat.v1"
        assert of_aiohttp.protocol is None
    return dict(zip(clients, got, strict=True))


def test_wscat_ws_websockets_and_aiohttp_see_one_order(tmp_path):
    node = need("node")
    need("ws")
    with Server(tmp_path) as server, contextlib.ExitStack() as stack:
        programs = {
            "wscat": (node, need("wscat"), "--connect", server.url, "--subprotocol", "chat.v1"),
            "ws": (node, "-e", WS, server.url),
        }

        async def everyone():
            async with asyncio.timeout(LONG):
                return await room_full(server.url, stack, programs)

        got = asyncio.run(everyone())
    assert got.keys() == {"wscat", "ws", "websockets", "aiohttp"}
    one = got["websockets"][1:]
    for name, texts in got.items():
        frames = [json.loads(text) for text in texts]
        assert numbered(frames[0]) == [(1, "Alice", "Hello!"), (2, "Bob", "Hi Alice!")]
        assert texts[1:] == one, f"{name} saw what websockets saw, to the byte"
    seen = [numbered(json.loads(text))[0] for text in one]
    assert [number for number, _, _ in seen] == list(range(3, 3 + POSTS * len(got)))
    assert all(json.loads(text)["id"] == f"{server.epoch}-{number}" for number, text in enumerate(one, 3))
    for name in got:
        assert [text for _, username, text in seen if username == name] == [f"Привет 👋 {n}" for n in range(POSTS)]


def test_wscat_posts_from_its_command_line(tmp_path):
    node, wscat = need("node"), need("wscat")
    with Server(tmp_path) as server, connect(server.url) as other, contextlib.ExitStack() as stack:
        other.recv(LONG)
        message = '{"username":"ann","message":"hi"}'
        Program(stack, node, wscat, "-c", server.url.removeprefix("ws://"), "-x", message, "-w", "-1")
        assert numbered(json.loads(other.recv(LONG))) == [(3, "ann", "hi")]


def test_client_of_another_subprotocol_is_served_all_the_same(tmp_path):
    with Server(tmp_path) as server, connect(server.url, subprotocols=["graphql-ws", "chat.v1"]) as client:
        assert client.subprotocol == "chat.v1"
        with connect(server.url, subprotocols=["graphql-ws"]) as other:
            assert other.subprotocol is None
            other.recv(LONG)


# The README

KINDS = ["python", "node", "wscat"]


def snippets():
    """Return the kind and the text of each example in the README that is marked as tested."""
    text = (ROOT / "README.md").read_text("utf-8")
    return re.findall(r"^<!-- test: (\S+) -->\s*\n```[^\n]*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def command_of(kind, code, folder):
    """Write an example down as a reader would, and answer how it is run."""
    if kind == "python":
        (folder / "example.py").write_text(code, "utf-8")
        return sys.executable, "-u", "example.py"
    node = need("node")
    if kind == "wscat":
        assert "npx wscat" in code
        return "sh", "-euc", code.replace("npx wscat", f"'{node}' '{need('wscat')}'")
    (folder / "node_modules").symlink_to(pathlib.Path(need("ws")).parent)
    (folder / "example.mjs").write_text(code, "utf-8")
    return node, "example.mjs"


def test_readme_has_one_example_of_each_kind():
    assert sorted(kind for kind, _ in snippets()) == sorted([*KINDS, "browser", "resume", "curl"])


def example(kind):
    (code,) = [code for found, code in snippets() if found == kind]
    return code


def run_example(command, folder):
    """Run an example to its end, and answer what it printed."""
    environ = environment() | {"PYTHONPATH": ""}
    done = subprocess.run(
        command,
        cwd=folder,
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LONG,
        check=True,
    )
    return done.stdout


def test_readme_client_that_loses_nothing(tmp_path):
    """Its post is acknowledged once."""
    with Server(tmp_path) as server:
        code = example("resume").replace("localhost:8085", f"127.0.0.1:{server.port}")
        lines = run_example((sys.executable, "-c", code), tmp_path).splitlines()
        ack = ast.literal_eval(lines[-1])
        assert ack == {"type": "ack", "label": "c1", "id": f"{server.epoch}-1", "duplicate": True}
        server.stop()
    assert [row[1:3] for row in stored(tmp_path / "chatd.sqlite", "kitchen")[1]] == [("cy", "tea?")]


def test_readmes_example_over_http_reads_posts_and_follows(tmp_path):
    need("curl")
    with Server(tmp_path) as server:
        code = example("curl").replace("localhost:8085", f"127.0.0.1:{server.port}")
        page, ack, *events = run_example(("sh", "-euc", code), tmp_path).splitlines()
        assert numbered(json.loads(page)) == [(1, "Alice", "Hello!"), (2, "Bob", "Hi Alice!")]
        assert json.loads(ack) == {"type": "ack", "label": "d81f", "id": f"{server.epoch}-3"}
        assert [line for line in events if line.startswith("data: ") and "hi from curl" in line]


@pytest.mark.parametrize("kind", KINDS)
def test_readme_example(kind, tmp_path):
    """It prints the history, posts a message and prints it."""
    code = example(kind)
    assert "localhost:8085" in code
    with Server(tmp_path) as server, connect(server.url) as other:
        other.recv(LONG)
        command = command_of(kind, code.replace("localhost:8085", f"127.0.0.1:{server.port}"), tmp_path)
        with subprocess.Popen(
            command,
            cwd=tmp_path,
            env=environment() | {"PYTHONPATH": ""},
            stdin=subprocess.PIPE,  # as a terminal's, it has no end: at that wscat goes
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            lines = Lines(process.stdout)
            try:
                ((number, _, message),) = numbered(json.loads(other.recv(LONG)))
                assert number == 3
                lines.wait(re.escape("Hi Alice!"))
                lines.wait(re.escape(message))
                assert process.wait(LONG) == 0
            finally:
                process.kill()
                process.wait(LONG)
                lines.close()
        with pytest.raises(TimeoutError):
            other.recv(0)


@pytest.mark.parametrize("source", ["README", "page"])
def test_example_in_a_browser(source, tmp_path, visit):
    """The example works in the console of the server's instructions, under their policy."""
    with Server(tmp_path) as server, connect(server.url) as other:
        other.recv(LONG)
        host = f"localhost:{server.port}"
        page = visit(f"http://{host}/about")
        if source == "README":
            code = example("browser").replace("localhost:8085", host)
        else:
            code = page.locator("pre").nth(1).text_content()
        assert f"ws://{host}/" in code
        logged = []
        with page.expect_console_message(lambda one: one.type == "log" and (logged.append(one) or len(logged) == 2)):
            page.evaluate(f"{code}\n0")  # Playwright would call a function
        ((number, username, message),) = numbered(json.loads(other.recv(LONG)))
        history, posted = (message.args[0].json_value() for message in logged)
        assert numbered(history) == [(1, "Alice", "Hello!"), (2, "Bob", "Hi Alice!")]
        assert numbered(posted) == [(number, username, message)] == [(3, username, message)]


def test_page_reaches_no_other_host(tmp_path, visit):
    """The page's policy lets its scripts connect to its own host alone."""
    with Server(tmp_path) as server:
        page = visit(f"http://localhost:{server.port}/about")
        with page.expect_console_message(lambda message: message.type == "log"):
            page.evaluate(f"(room = new WebSocket('ws://127.0.0.1:{server.port}/')).onerror = () => console.log(1); 0")
    (refused,) = visit.errors
    assert "Content Security Policy" in refused
    visit.errors.clear()


ATTACK = """
void (async () => {
const drained = await fetch("http://HOST:ADMIN/drain", {method: "POST", mode: "no-cors"}).then(() => 1, () => 1);
const read = await fetch("http://HOST:ADMIN/metrics").then(() => 1, () => 0);
const form = document.createElement("form");
form.method = "post";
form.target = "frame";
form.action = "http://HOST:ADMIN/drain";
const frame = document.createElement("iframe");
frame.name = "frame";
document.body.append(frame, form);
const loaded = new Promise((done) => (frame.onload = done));
form.submit();
await loaded;
const joined = await new Promise((done) => {
  const room = new WebSocket("ws://HOST:PORT/");
  room.onopen = () => done(1);
  room.onerror = () => done(0);
});
window.result = {drained, read, joined};
})();
"""


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_page_of_another_server(host, tmp_path, visit):
    """It can neither drain the server, by a script or a form, nor read its metrics, nor join a room."""
    with Server(tmp_path, admin=LOOPBACK) as server, site({"/": ("text/html", b"")}) as url:
        script = ATTACK.replace("HOST", host).replace("ADMIN", f"{server.admin_port}").replace("PORT", f"{server.port}")
        page = visit(url)
        page.evaluate(script)
        result = page.wait_for_function("window.result").json_value()
        assert result == {"drained": 1, "read": 0, "joined": 0}
        with Raw(server.admin_port) as operator:
            operator.send(b"GET /readyz HTTP/1.0\r\n\r\n")
            assert operator.rest().endswith(b"\r\n\r\nready\n")
        with connect(server.url) as client:
            client.recv(LONG)
    assert {"403", "CORS"} == {word for word in ("403", "CORS") if word in str(visit.errors)}
    visit.errors.clear()
