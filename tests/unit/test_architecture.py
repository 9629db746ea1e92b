"""The structure of the package: imports run one way, and every name stands for one thing."""

import ast
import pathlib
from collections import Counter

import grimp
import pytest

import chatd

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = pathlib.Path(chatd.__file__).parent
LAYERS = (
    "chatd.__main__",
    "chatd.tap",
    "chatd.load",
    "chatd.service",
    "chatd.operate",
    "chatd.client",
    "chatd.config",
    "chatd.webhooks",
    {"chatd.transport", "chatd.store"},
    "chatd.room",
    {"chatd.messages", "chatd.histogram"},
)
"""The layers, top first: each imports only what is below it, and the parts of one layer do not import each other."""
PURE = {
    "chatd.messages": {"collections.abc", "enum", "re", "typing"},
    "chatd.room": {
        *("collections", "collections.abc", "functools", "itertools", "operator", "sys", "typing", "typing_extensions"),
        *("enum", "ipaddress", "re", "unicodedata"),
        *("twisted.internet.defer", "twisted.internet.interfaces", "twisted.logger", "twisted.python.failure"),
    },
}
"""The packages without input or output, and the modules outside chatd that they may import."""
SINGULAR_AND_PLURAL = {"Connection", "connection", "Option", "PendingPost", "Sanction"}
"""Names that may exist with an `s` too: one of them and the set of all; twistd itself names a class Options."""
COMMON = {"Client", "Room"}
"""Names that the clients on asyncio and on Twisted have in common."""
CLIENT_RULES = {f"chatd.client.{name}" for name in ("protocol", "core", "connector", "view", "outbox", "chatroom")}
"""The modules of the client that every event loop can drive."""
EVENT_LOOPS = {"asyncio", "autobahn", "socket", "threading", "twisted", "websockets"}
AUTOBAHN_ADAPTERS = {"chatd.transport.autobahn_adapter", "chatd.client.connection"}
"""The modules that hold every use of Autobahn, one for the server and one for the client."""


@pytest.fixture(scope="module")
def graph():
    return grimp.build_graph("chatd", include_external_packages=True, cache_dir=None)


@pytest.fixture(scope="module")
def trees():
    """The syntax trees of all modules by name; a package counts under its own name."""
    trees = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        trees[name] = ast.parse(path.read_text(encoding="utf-8"))
    return trees


def imported(tree):
    """Yield the modules that a tree imports, wherever the import stands; names imported from a module count too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_run_downwards(graph):
    """No module imports one of a layer above its own."""
    illegal = graph.find_illegal_dependencies_for_layers(LAYERS)
    assert [f"{found.importer} imports {found.imported}" for found in illegal] == []


def test_layers_cover_every_module(graph):
    """Every part of the package belongs to a layer, so that the rule above has no gap."""
    named = set().union(*({layer} if isinstance(layer, str) else layer for layer in LAYERS))
    assert graph.find_children("chatd") - named == set()


def impure(trees, package):
    """Return the imports of a package from outside chatd that PURE does not allow."""
    modules = [tree for name, tree in trees.items() if f"{name}.".startswith(f"{package}.")]
    foreign = {name for tree in modules for name in imported(tree) if not name.startswith("chatd.")}
    return {name for name in foreign if PURE[package].isdisjoint({name, name.rpartition(".")[0]})}


@pytest.mark.parametrize("package", PURE)
def test_pure_packages_import_no_library(trees, package):
    """The domain and the rooms use no socket, no file, no encoder, and no clock or reactor but their arguments."""
    assert impure(trees, package) == set()


@pytest.mark.parametrize("package", PURE)
@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("import json", "json"),
        ("import os.path", "os.path"),
        ("from time import monotonic", "time.monotonic"),
        ("from twisted.internet import reactor", "twisted.internet.reactor"),
        ("import autobahn", "autobahn"),
    ],
)
def test_impure_import_is_found(trees, package, line, name):
    """The rule above fails for any other module, of the standard library too."""
    assert impure(trees | {f"{package}.added": ast.parse(line)}, package) == {name}


def test_rules_of_the_client_know_no_event_loop(trees):
    """The clients on asyncio and on Twisted share them."""
    assert {*trees} >= CLIENT_RULES
    found = {(module, name) for module in CLIENT_RULES for name in imported(trees[module])}
    assert {(module, name) for module, name in found if name.partition(".")[0] in EVENT_LOOPS} == set()


def test_only_programs_import_the_global_reactor(trees):
    """Everything but the plugin and the command lines gets a reactor as an argument, so that tests hand in a clock."""
    users = {name for name, tree in trees.items() if "twisted.internet.reactor" in imported(tree)}
    assert {name for name in users if not name.endswith(".__main__")} == {"chatd.tap"}


def test_only_adapters_import_autobahn(graph):
    """A new version of Autobahn needs a look at two modules, and at no other."""
    users = [graph.find_modules_that_directly_import(library) for library in ("autobahn", "txaio")]
    assert set().union(*users) == AUTOBAHN_ADAPTERS


@pytest.mark.parametrize("folder", ["", "plugins"])
def test_twisted_is_a_namespace(folder):
    """An `__init__.py` beside the plugin would hide Twisted itself."""
    assert not (ROOT / "twisted" / folder / "__init__.py").exists()


def test_architecture_names_every_module(trees):
    """The table of wings in docs/architecture.md leaves out no module."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    wings = text.partition("## The wings")[2].partition("interfaces")[0]
    rows = [line for line in wings.splitlines() if line.startswith("| `")]
    packages = {name.rpartition(".")[0] for name in trees}
    for name in trees.keys() - packages:
        _, wing, *_ = name.split(".")
        module = name.rpartition(".")[2]
        assert any(f"`{wing}" in row.split("|")[1] and f"`{module}`" in row.split("|")[3] for row in rows), name


def test_names_are_unique(trees):
    """No two modules and no two classes share a name, private ones too, nor do they differ by an `s` alone.

    Only the modules of command lines share one, which Python gives them.
    """
    packages = {name.rpartition(".")[0] for name in trees}
    modules = [name.rpartition(".")[2] for name in trees if name not in packages and not name.endswith(".__main__")]
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    classes = [node.name for node in nodes if isinstance(node, ast.ClassDef)]
    assert {name for name, count in Counter([*modules, *classes]).items() if count > 1} == COMMON
    names = {*modules, *classes}
    assert {name for name in names if f"{name}s" in names} <= SINGULAR_AND_PLURAL


def loggers(trees):
    """Yield the names of the module globals that are a Logger, each with its module."""
    for module, tree in trees.items():
        for node in tree.body:
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value and ast.unparse(node.value) == "Logger()":
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                yield from ((module, ast.unparse(target)) for target in targets)


def test_loggers_have_one_name(trees):
    """The logger of every module is `_logger`: `log` is the durable order of entries."""
    named = list(loggers(trees))
    assert {module for module, _ in named} >= {"chatd.store.memory", "chatd.transport.session"}
    assert [(module, name) for module, name in named if name != "_logger"] == []
