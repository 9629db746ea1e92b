"""chatd.js in a real browser: reloads, IndexedDB, tabs, and pages of another origin."""

import contextlib

import pytest
from support.browser import site
from support.servers import LONG, ROOT, Server, stored
from websockets.sync.client import connect

LIBRARY = ROOT / "chatd" / "static" / "chatd.js"
HTML = """<!doctype html><title>chatd.js</title><script type="module">
import { Client } from "/chatd.js";
const room = new Client("http://127.0.0.1:PORT", { username: "ann" }).room("a");
window.room = room;
window.seen = [];
for (const type of ["history", "entries"])
  room.addEventListener(type, ({ detail }) => window.seen.push(...detail.entries.map(({ data }) => data.message)));
/** Return the number of posts in the database. */
window.saved = async () => {
  const result = (request) => new Promise((resolve) => (request.onsuccess = () => resolve(request.result)));
  const database = await result(indexedDB.open("chatd", 1));
  return result(database.transaction("outbox").objectStore("outbox").count());
};
</script>"""
TEXTS = "room.snapshot().messages.map(({ data }) => data.message)"


def until(page, condition):
    """Wait until a condition holds for the fields of the snapshot."""
    fields = "{ state, messages, outbox, presence }"
    page.wait_for_function(f"window.room && (({fields}) => {condition})(room.snapshot())")


def post(page, *texts):
    """Begin to post."""
    for text in texts:
        page.evaluate("(text) => void room.post(text)", text)


def saved(page, count):
    """Wait until the database holds so many posts."""
    page.wait_for_function(f"saved().then((count) => count === {count})")


@pytest.fixture
def opened(tmp_path, visit):
    """A server, and a page whose client is online."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Server(tmp_path, "--origin=*"))
        html = HTML.replace("PORT", str(server.port)).encode()
        pages = {"/": ("text/html", html), "/chatd.js": ("text/javascript", LIBRARY.read_bytes())}
        page = visit(stack.enter_context(site(pages)))
        until(page, "state === 'online'")
        yield server, page, stack


def again(stack, server, folder):
    """Start a server on the port of a server that was killed."""
    return stack.enter_context(Server(folder, "--origin=*", listen=f"tcp:{server.port}:interface=127.0.0.1"))


def messages(folder):
    return [row[2] for row in stored(folder / "chatd.sqlite", "a")[1]]


def test_posts_typed_offline_survive_a_reload(opened, tmp_path):
    """Each is sent once, in order, by the page that comes after."""
    server, page, stack = opened
    post(page, "online")
    until(page, "messages.length === 1 && !outbox.length")
    server.kill()
    until(page, "state === 'waiting'")
    post(page, "one", "two")
    saved(page, 2)
    page.reload()
    post(page, "three")
    saved(page, 3)
    page.reload()
    until(page, "outbox.map(({ frame }) => frame.message).join() === 'one,two,three'")
    again(stack, server, tmp_path)
    until(page, "messages.length === 4 && !outbox.length")
    page.reload()
    until(page, "messages.length === 4")
    assert page.evaluate(TEXTS) == messages(tmp_path) == ["online", "one", "two", "three"]
    saved(page, 0)


def test_ten_tabs_are_one_connection(opened, tmp_path):
    """Each message is seen once in each tab, also when the leader closes."""
    _, first, _ = opened
    tabs = [first, *(first.context.new_page() for _ in range(9))]
    for number, tab in enumerate(tabs):
        if number:
            tab.goto(first.url)
        until(tab, "state === 'online'")
        post(tab, f"from {number}")
        until(tab, f"messages.length === {number + 1}")
    for tab in tabs:
        until(tab, "messages.length === 10 && presence?.count === 1")
    post(tabs[9], "last")
    first.close()
    expected = [*(f"from {number}" for number in range(10)), "last"]
    for tab in tabs[1:]:
        until(tab, "messages.length === 11 && !outbox.length")
        assert tab.evaluate("window.seen") == tab.evaluate(TEXTS) == expected
    assert messages(tmp_path) == expected
    until(tabs[5], "presence?.count === 1")


def test_page_that_comes_back_goes_on(opened):
    """A page from the back/forward cache has what was posted meanwhile."""
    server, page, _ = opened
    page.evaluate("window.kept = true")
    page.goto("about:blank")
    with connect(f"{server.url}rooms/a") as other:
        other.send('{"username":"bob","message":"meanwhile"}')
        for _ in range(2):
            other.recv(LONG)
        page.go_back(wait_until="commit")  # the page does not load again
        assert page.evaluate("window.kept")
        until(page, "messages.length === 1")
        other.send('{"username":"bob","message":"after"}')
        until(page, "messages.length === 2")
    assert page.evaluate(TEXTS) == ["meanwhile", "after"]


def test_import_from_the_server(opened):
    """A page of another origin imports the library from the server itself."""
    server, page, _ = opened
    page.wait_for_function(f"import('http://127.0.0.1:{server.port}/static/chatd.js').then(({{ Client }}) => Client)")
