"""The files of chatd.js: its pure core, its size, its types and its package."""

import gzip
import json
import pathlib
import re
import subprocess
import tarfile

import pytest
from support.servers import LONG, NODE, ROOT, need

import chatd

STATIC = ROOT / "chatd" / "static"
LIBRARY = STATIC / "chatd.js"
LARGEST = 23_500, 8_000
"""The most bytes of the library with its comments: as it is, and compressed. docs/clients.md names both."""


def node(*arguments):
    return subprocess.run(
        [need("node"), *arguments], cwd=NODE, capture_output=True, text=True, timeout=LONG, check=False
    )


@pytest.mark.parametrize("name", ["core", "page"])
def test_library_in_node(name):
    """The room keeps the protocol and reacts to the page, with the clock and the socket of a test."""
    result = node("--test", f"chatd/{name}.test.mjs")
    assert result.returncode == 0, result.stdout


def test_library_is_small():
    text = LIBRARY.read_bytes()
    sizes = len(text), len(gzip.compress(text, 9))
    assert all(size <= most for size, most in zip(sizes, LARGEST, strict=True)), sizes
    figures = "at most {:,} bytes long, and {:,} compressed".format(*LARGEST)
    assert figures in " ".join((ROOT / "docs" / "clients.md").read_text("utf-8").split())


def test_library_depends_on_nothing():
    text = LIBRARY.read_text("utf-8")
    assert re.findall(r"^import |\bimport\((?!\")|\brequire\(|https?://", text, re.MULTILINE) == []


def test_types_name_what_the_library_has():
    """Each exported value has a type, and the room has the methods that its type names."""
    types = (STATIC / "chatd.d.ts").read_text("utf-8")
    declared = set(re.findall(r"^export (?:class|function) (\w+)", types, re.MULTILINE))
    script = """
        import(process.argv[1]).then((library) => {
            const { Client, Log } = library;
            globalThis.fetch = async () => { throw Error(); };
            const client = new Client("http://127.0.0.1:9", { WebSocket: null, username: "ann" });
            const room = client.room("a");
            client.stop();
            console.log(JSON.stringify({
                exports: Object.keys(library),
                Room: Object.keys(room),
                Log: [...Object.keys(new Log()), ...Object.getOwnPropertyNames(Log.prototype)],
                Client: Object.getOwnPropertyNames(Client.prototype),
            }));
        });
    """
    result = node("-e", script, LIBRARY.as_uri())
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert set(found["exports"]) == declared
    for name in ("Room", "Log", "Client"):
        body = re.search(rf"export (?:class|interface) {name}\b.*?\{{\n(.*?)^\}}", types, re.DOTALL | re.MULTILINE)[1]
        members = set(re.findall(r"^  (?:readonly )?(\w+)\??[(:]", body, re.MULTILINE)) - {"addEventListener"}
        assert {*found[name]} - {"isTrusted"} == members, name


USE = """
import { Client, Log, Rejected, type Entry, type Room } from "LIBRARY";
const room: Room = new Client("http://x", { username: "ann", token: async () => "x" }).room("a");
room.addEventListener("entries", ({ detail }) => detail.entries[0].data.message.length);
export async function use(): Promise<Entry | undefined> {
  const { id, duplicate } = await room.post("x", { color: "red" });
  await room.edit(id, duplicate ? "y" : "z");
  for await (const entry of room) return entry;
}
// @ts-expect-error
room.post(5);
// @ts-expect-error
room.snapshot().nothing;
export { Log, Rejected };
"""


def check_types(*arguments):
    """Run the compiler of TypeScript; return its status and what it prints."""
    compiler = pathlib.Path(need("typescript")) / "bin" / "tsc"
    options = ["--noEmit", "--target", "es2023", "--lib", "es2023,dom,dom.iterable", "--module", "nodenext"]
    result = node(compiler, *options, *arguments)
    return result.returncode, result.stdout


def compile_use(folder, library):
    """Check a program that imports the library by a name."""
    (folder / "use.mts").write_text(USE.replace("LIBRARY", library))
    return check_types("--strict", folder / "use.mts")


def test_types_are_valid(tmp_path):
    """TypeScript accepts the types, and what they allow."""
    assert compile_use(tmp_path, str(LIBRARY)) == (0, "")


def test_library_keeps_its_types():
    """TypeScript finds in the library what its types promise."""
    assert check_types("--allowJs", "--checkJs", LIBRARY) == (0, "")


def test_package_is_complete(tmp_path):
    """A project that installs the tarball of `npm pack` imports the library and its types."""
    command = [need("npm"), "pack", "--json", "--offline", "--pack-destination", tmp_path]
    result = subprocess.run(command, cwd=STATIC, capture_output=True, text=True, timeout=LONG, check=True)
    (package,) = json.loads(result.stdout)
    with tarfile.open(tmp_path / package["filename"]) as tarball:
        names = {"package/chatd.js", "package/chatd.d.ts", "package/package.json"}
        assert set(tarball.getnames()) == names
        tarball.extractall(tmp_path, filter="data")
    (tmp_path / "node_modules").mkdir()
    (tmp_path / "package").rename(tmp_path / "node_modules" / "chatd")
    script = 'import * as chatd from "chatd"; console.log(Object.keys(chatd).join());'
    (tmp_path / "use.mjs").write_text(script)
    assert node(tmp_path / "use.mjs").stdout == "Client,ClientStopped,Log,Rejected\n"
    assert compile_use(tmp_path, "chatd") == (0, "")


def test_package_names_its_files_and_the_version():
    package = json.loads((STATIC / "package.json").read_text("utf-8"))
    assert all((STATIC / package[name]).is_file() for name in ("main", "types"))
    assert package["version"] == chatd.__version__
    assert package.keys().isdisjoint({"dependencies", "peerDependencies"})
