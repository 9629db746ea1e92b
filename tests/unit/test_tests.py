"""The tests themselves: they know chatd by its behaviour."""

import ast
import collections
import pathlib
import re

import pytest
from support.loops import drive

import chatd

TESTS = pathlib.Path(__file__).parents[1]
PACKAGE = pathlib.Path(chatd.__file__).parent
PRIVATE = re.compile(r"_(?!_)\w+")
OWN = {"self", "cls", "super"}
BY_NAME = {"getattr", "setattr", "delattr", "hasattr", "object", "patch"}
"""The functions to which a name may be given as a text."""
ALLOWED = {
    ("support/documented.py", "_refuse"): "the one answer that leaves without a request, seen in every test",
    ("unit/test_schemas.py", "_ID"): "the documents show the pattern of the program, letter for letter",
    ("unit/test_schemas.py", "_PATH"): "the documents show the pattern of the program, letter for letter",
    ("unit/transport/test_websocket.py", "_fail_connection"): "Autobahn calls it, with reasons that are shorter",
}
"""The private names that a file of tests may use, each with the reason."""


def defined(tree):
    """Yield the private names that a module of chatd defines: globals, classes, functions, methods and attributes."""
    for node in ast.walk(tree):
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                yield name
        if isinstance(node, ast.Module | ast.ClassDef):
            for statement in node.body:
                targets = getattr(statement, "targets", None) or [getattr(statement, "target", None)]
                names = [name for target in targets if target for name in ast.walk(target)]
                yield from (name.id for name in names if isinstance(name, ast.Name))


def used(tree):
    """Yield the line and the name of each private name that a file takes from another object, by any spelling."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id=owner)) if owner in OWN:
                pass
            case ast.Attribute(value=ast.Call(func=ast.Name(id=owner))) if owner in OWN:
                pass
            case ast.Attribute(attr=name):
                yield node.lineno, name
            case ast.ImportFrom(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.Call(func=ast.Name(id=by) | ast.Attribute(attr=by), args=arguments) if by in BY_NAME:
                words = [word.value for word in arguments if isinstance(word, ast.Constant)]
                yield from ((node.lineno, word.rpartition(".")[2]) for word in words if isinstance(word, str))


def parsed(folder):
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.py"))}


@pytest.fixture(scope="module")
def privates():
    """The private names that chatd defines."""
    return {name for tree in parsed(PACKAGE).values() for name in defined(tree) if PRIVATE.fullmatch(name)}


def test_tests_use_no_privates(privates):
    """Tests know chatd by its public names, so that its insides can change without them."""
    found = [
        (path.relative_to(TESTS).as_posix(), line, name)
        for path, tree in parsed(TESTS).items()
        for line, name in used(tree)
        if name in privates
    ]
    assert [f"{file}:{line}: {name}" for file, line, name in found if (file, name) not in ALLOWED] == []
    assert ALLOWED.keys() - {(file, name) for file, _, name in found} == set()


@pytest.mark.parametrize(
    "use",
    [
        "store._rooms.clear()",
        "Room(log)._runs[0] = 1",
        "from chatd.load.proof import _ID",
        'monkeypatch.setattr(store, "_rooms", {})',
        'patch("chatd.load.proof._ID")',
    ],
)
def test_uses_of_privates_are_seen(privates, use):
    """The measure sees each way to name a private."""
    assert [name for _, name in used(ast.parse(use)) if name in privates] != []
    assert [name for _, name in used(ast.parse("self._rooms = super()._room")) if name in privates] == []


def shared(trees):
    """Return the names of classes that more than one module defines, each with its modules."""
    modules = collections.defaultdict(set)
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                modules[node.name].add(path.name)
    return {name: sorted(found) for name, found in modules.items() if len(found) > 1}


def test_doubles_have_names_of_their_own():
    """No two helper modules define a class of one name, so that a name means one double."""
    assert shared(parsed(TESTS / "support")) == {}


def test_shared_names_of_doubles_are_seen():
    """The measure sees a name in two modules, wherever it is defined there, and not one that is imported."""
    inner = "def make():\n    class Disk: pass"
    texts = {"a.py": "class Disk: pass\nclass Wire: pass", "b.py": inner, "c.py": "from a import Wire"}
    trees = {pathlib.Path(name): ast.parse(text) for name, text in texts.items()}
    assert shared(trees) == {"Disk": ["a.py", "b.py"]}


def test_reactors_leave_no_files_open():
    """Hundreds of tests run a reactor in one process, which may have few files open."""

    async def nothing(_):
        pass

    drive(nothing)
    before = {*pathlib.Path("/proc/self/fd").iterdir()}
    drive(nothing)
    assert {*pathlib.Path("/proc/self/fd").iterdir()} == before
