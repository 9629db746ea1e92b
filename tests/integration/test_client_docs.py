"""The examples of docs/clients.md, as a reader would run them."""

import contextlib
import inspect
import json
import pathlib
import re
import shlex
import subprocess
import sys

from support.browser import expect, site
from support.servers import LONG, NODE, ROOT, Lines, Server, environment, need, stored
from support.terminals import Tty, terminal_environment
from support.tokens import SECRET, token

from chatd.client import aio, tx
from chatd.client.chatroom import ChatRoom
from chatd.client.storage import FileStorage
from chatd.client.terminal.conversation import COMMANDS
from chatd.client.view import EntryPage, RoomEntry, Snapshot

STATIC = ROOT / "chatd" / "static"
TRANSPILE = """
const compilerOptions = { jsx: "react-jsx", module: "commonjs", target: "es2022" };
const text = require("fs").readFileSync(0, "utf-8");
console.log(require("typescript").transpileModule(text, { compilerOptions }).outputText);
"""
MODULES = {
    "react": "react/cjs/react.production.js",
    "react/jsx-runtime": "react/cjs/react-jsx-runtime.production.js",
    "react-dom": "react-dom/cjs/react-dom.production.js",
    "react-dom/client": "react-dom/cjs/react-dom-client.production.js",
    "scheduler": "scheduler/cjs/scheduler.production.js",
}
"""The files of React, by the names under which modules require them."""
REACT = """<!doctype html><main></main><script type="module">
const found = { chatd: await import("/chatd.js") };
const sources = SOURCES;
function require(name) {
  if (!found[name]) {
    const module = { exports: {} };
    new Function("require", "module", "exports", sources[name])(require, module, module.exports);
    found[name] = module.exports;
  }
  return found[name];
}
const { Chat } = require("example");
const root = require("react-dom/client").createRoot(document.querySelector("main"));
root.render(require("react/jsx-runtime").jsx(Chat, {}));
</script>"""


def example(kind, server):
    """Return an example, with the port of a server."""
    text = (ROOT / "docs" / "clients.md").read_text("utf-8")
    (code,) = re.findall(rf"^<!-- test: {kind} -->\n```[^\n]*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert "://localhost:8085" in code
    return code.replace("localhost:8085", f"127.0.0.1:{server.port}")


def messages(folder):
    return [row[2] for row in stored(folder / "chatd.sqlite")[1]]


def run_node(code, folder, *, before=""):
    """Run a program as a package of its own that depends on chatd, in a Node with a WebSocket; return its output."""
    modules = folder / "node_modules"
    modules.mkdir()
    (modules / "chatd").symlink_to(STATIC)
    (modules / "ws").symlink_to(pathlib.Path(need("ws")))
    (folder / "before.mjs").write_text(f'import WebSocket from "ws"; globalThis.WebSocket ??= WebSocket;\n{before}')
    (folder / "example.mjs").write_text(code, "utf-8")
    result = subprocess.run(
        [need("node"), "--import", "./before.mjs", "example.mjs"],
        cwd=folder,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LONG,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_page_in_ten_lines(tmp_path, visit):
    with Server(tmp_path, "--origin=*") as server:
        html = example("page", server)
        assert len(html.splitlines()) <= 10
        with site({"/": ("text/html", html.encode())}) as url:
            expected = ["Hello!", "Hi Alice!", "Hello from a page!"]
            expect(visit(url).locator("#list > *")).to_have_text(expected)
    assert messages(tmp_path) == expected


def test_program_in_node(tmp_path):
    with Server(tmp_path) as server:
        lines = run_node(example("node", server), tmp_path).splitlines()
        assert lines[-1] == f"{server.epoch}-3 ann Hello from Node!"
    assert len(lines) == 3


def test_token_from_the_application(tmp_path):
    (tmp_path / "jwt.key").write_bytes(SECRET)
    with Server(tmp_path, "--jwt-key=jwt.key") as server:
        before = """
            const { fetch: real } = globalThis;
            globalThis.fetch = async (url, ...rest) =>
              url === "/chat-token" ? new Response("TOKEN") : real(url, ...rest);
        """.replace("TOKEN", token())
        code = 'import { Client } from "chatd";\n' + example("token", server)
        run_node(f'{code}await client.room("main").post("with a token");\nclient.stop();\n', tmp_path, before=before)
    assert messages(tmp_path)[-1] == "with a token"


def test_component_of_react(tmp_path, visit):
    """It shows the messages and their changes, and posts."""
    modules = pathlib.Path(need("react-dom")).parent
    need("typescript")
    with Server(tmp_path, "--origin=*") as server:
        code = example("react", server)
        transpiled = subprocess.run(
            [need("node"), "-e", TRANSPILE],
            cwd=NODE,
            input=code,
            capture_output=True,
            text=True,
            timeout=LONG,
            check=True,
        )
        texts = {name: (modules / path).read_text("utf-8") for name, path in MODULES.items()}
        texts["example"] = transpiled.stdout
        html = REACT.replace("SOURCES", json.dumps(texts).replace("</", "<\\/"))
        pages = {
            "/": ("text/html", html.encode()),
            "/chatd.js": ("text/javascript", (STATIC / "chatd.js").read_bytes()),
        }
        with site(pages) as url:
            page = visit(url)
            expect(page.get_by_role("paragraph")).to_have_count(2)
            page.get_by_placeholder("online").fill("Hello from React!")
            page.keyboard.press("Enter")
            expect(page.get_by_role("paragraph").nth(2)).to_have_text("ann: Hello from React!")
    assert messages(tmp_path)[-1] == "Hello from React!"


@contextlib.contextmanager
def running_python(code, folder):
    """Run a program; yield its lines, and kill it at the end."""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=folder, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        lines = Lines(process.stdout)
        try:
            yield lines
        finally:
            process.kill()
            lines.close()


def test_program_on_asyncio(tmp_path):
    """It has ten lines, apart from empty ones."""
    with Server(tmp_path) as server:
        code = example("asyncio", server)
        assert len([line for line in code.splitlines() if line.strip()]) <= 10
        with running_python(code, tmp_path) as lines:
            lines.wait(f"{server.epoch}-3 ann Hello from Python!")
            assert len([*lines]) == 3


def test_outbox_of_the_page(tmp_path):
    """The program waits for a server, and ends when the post is stored and out of the file."""
    with Server(tmp_path) as server:
        port = server.port
        code = example("outbox", server)
    with (
        subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment()) as process,
        Server(tmp_path, listen=f"tcp:{port}:interface=127.0.0.1"),
    ):
        assert process.wait(LONG) == 0
    assert messages(tmp_path)[2:] == ["stored once, whatever happens"]
    assert FileStorage(tmp_path / "outbox.sqlite").list(f"chatd ws://127.0.0.1:{port}/rooms/main ann") == []


def test_program_on_twisted(tmp_path):
    with Server(tmp_path) as server, running_python(example("twisted", server), tmp_path) as lines:
        lines.wait("^3$")
    assert messages(tmp_path)[-1] == "Hello from Twisted!"


def members(*classes):
    """Return the public names of classes."""
    return {name for one in classes for name in vars(one) if not name.startswith("_")}


def test_page_names_the_interface_of_python():
    """The Python part names each method, option and field, and the hosts have the same methods."""
    text = (ROOT / "docs" / "clients.md").read_text("utf-8").partition("\n## Python\n")[2]
    inside = {"follow", "following", "wake"}
    for host in (aio, tx):
        names = members(host.Room, ChatRoom, host.Client) - inside
        for call in (host.Client, host.Client.room):
            names |= {*inspect.signature(call).parameters} - {"self", "url", "name", "reactor"}
        names |= {*RoomEntry._fields, *EntryPage._fields, *Snapshot.__dataclass_fields__}
        assert len(names) > 30
        assert {name for name in names if not re.search(rf"`[^`\n]*\b{name}\b", text)} == set()
    assert members(aio.Room) - members(tx.Room) == {"changed"}
    assert members(tx.Room) <= members(aio.Room)
    assert {*aio.__all__} == {*tx.__all__}


# The terminal chat


def shell(code, folder):
    """Run a line of a shell as a reader would, to its end; return its output."""
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-euc", code.replace("python ", f"'{sys.executable}' ")],
        env=terminal_environment(folder),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LONG,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_chat_in_a_terminal(tmp_path):
    with Server(tmp_path) as server:
        python, module, name, *words = shlex.split(example("terminal", server))
        assert (python, module, name) == ("python", "-m", "chatd.client")
        tty = Tty(tmp_path, *words)
        tty.wait("1 here: ann")  # the words before it may be painted earlier
        tty.type("hi\r/quit\r")
        assert tty.end() == (0, True)
    assert [row[1:3] for row in stored(tmp_path / "chatd.sqlite", "team")[1]] == [("ann", "hi")]


def test_pipes_of_a_shell(tmp_path):
    """One pipe prints the messages that another one posts."""
    with Server(tmp_path) as server:
        assert shell(example("post", server), tmp_path) == ""
        first, *_ = rows = [row[1:3] for row in stored(tmp_path / "chatd.sqlite", "team")[1]]
        assert first[0] == "bot"
        assert first[1].startswith("Filesystem")
        assert len(rows) > 1
        read = example("read", server).replace("grep --line-buffered deploy", "head -n 1")
        assert shell(read, tmp_path).split("\t")[1:] == ["bot", first[1] + "\n"]


def test_table_names_each_command():
    text = (ROOT / "docs" / "clients.md").read_text("utf-8")
    assert {command for command in COMMANDS if f"`{command}`" not in text} == set()


def test_page_names_each_method_and_field():
    """The tables name the methods of a room, its options and the fields of a snapshot as the types have them."""
    text = (ROOT / "docs" / "clients.md").read_text("utf-8")
    types = (STATIC / "chatd.d.ts").read_text("utf-8")
    for name, left in (("Room", {"addEventListener"}), ("Options", set()), ("Snapshot", set())):
        body = re.search(rf"export interface {name}\b.*?\{{\n(.*?)^\}}", types, re.DOTALL | re.MULTILINE)[1]
        members = set(re.findall(r"^  (\w+)\??[(:<]", body, re.MULTILINE)) - left
        assert len(members) > 5
        assert {member for member in members if f"`{member}" not in text} == set(), name
