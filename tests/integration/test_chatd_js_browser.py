"""chatd.js in a real browser: reloads, IndexedDB, tabs, and pages of another origin."""

import contextlib

import pytest
from support.browser import Page, site
from support.servers import ROOT, Server, stored

LIBRARY = ROOT / "chatd" / "static" / "chatd.js"
HTML = """<!doctype html><title>chatd.js</title><script type="module">
import { Client } from "/chatd.js";
const room = new Client("http://127.0.0.1:PORT", { username: "ann" }).room("a");
window.room = room;
window.seen = [];
for (const type of ["history", "entries"])
  room.addEventListener(type, ({ detail }) => window.seen.push(...detail.entries.map(({ data }) => data.message)));
/** Wait until a condition holds for the snapshot, and return its value. */
window.until = (condition) => new Promise((resolve) => {
  const look = () => {
    const value = condition(room.snapshot());
    if (value) resolve(value);
  };
  room.subscribe(look);
  look();
});
/** Wait until the database holds so many posts. */
window.saved = async (count) => {
  const result = (request) => new Promise((resolve) => (request.onsuccess = () => resolve(request.result)));
  const database = await result(indexedDB.open("chatd", 1));
  while ((await result(database.transaction("outbox").objectStore("outbox").count())) !== count);
};
</script>"""
TEXTS = "room.snapshot().messages.map(({ data }) => data.message)"


@pytest.fixture
def opened(tmp_path):
    """A server, and a page whose client is online."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Server(tmp_path, "--origin=*"))
        html = HTML.replace("PORT", str(server.port)).encode()
        pages = {"/": ("text/html", html), "/chatd.js": ("text/javascript", LIBRARY.read_bytes())}
        page = stack.enter_context(Page(tmp_path / "profile", stack.enter_context(site(pages))))
        page.run("await until(({ state }) => state === 'online')")
        yield server, page, stack


def again(stack, server, folder):
    """Start a server on the port of a server that was killed."""
    return stack.enter_context(Server(folder, "--origin=*", listen=f"tcp:{server.port}:interface=127.0.0.1"))


def messages(folder):
    return [row[2] for row in stored(folder / "chatd.sqlite", "a")[1]]


def test_posts_typed_offline_survive_a_reload(opened, tmp_path):
    """Each is sent once, in order, by the page that comes after."""
    server, page, stack = opened
    page.run("await room.post('online')")
    server.kill()
    page.run("await until(({ state }) => state === 'waiting'); room.post('one'); room.post('two'); await saved(2)")
    page.load("Page.reload")
    page.run("room.post('three'); await saved(3)")
    page.load("Page.reload")
    outbox = "await until(({ outbox }) => outbox.length === 3 && outbox.map(({ frame }) => frame.message))"
    assert page.run(outbox) == ["one", "two", "three"]
    again(stack, server, tmp_path)
    page.run("await until(({ messages, outbox }) => messages.length === 4 && !outbox.length)")
    page.load("Page.reload")
    page.run("await until(({ messages }) => messages.length === 4)")
    assert page.run(TEXTS) == messages(tmp_path) == ["online", "one", "two", "three"]
    page.run("await saved(0)")


def test_ten_tabs_are_one_connection(opened, tmp_path):
    """Each message is seen once in each tab, also when the leader closes."""
    _, first, _ = opened
    tabs = [first, *(first.tab() for _ in range(9))]
    for number, tab in enumerate(tabs):
        tab.run("await until(({ state }) => state === 'online')")
        tab.run(f"await room.post('from {number}')")
    for tab in tabs:
        tab.run("await until(({ messages }) => messages.length === 10)")
        assert tab.run("(await until(({ presence }) => presence)).count") == 1
    post = "window.posted = room.post('last'); 0"
    tabs[9].run(post)
    first.close_tab()
    tabs[9].run("await window.posted")
    expected = [*(f"from {number}" for number in range(10)), "last"]
    for tab in tabs[1:]:
        tab.run("await until(({ messages }) => messages.length === 11)")
        assert tab.run("window.seen") == tab.run(TEXTS) == expected
    assert messages(tmp_path) == expected
    tabs[5].run("await until(({ presence }) => presence?.count === 1)")


def test_page_that_comes_back_goes_on(opened):
    """A page from the back/forward cache, or loaded again, has what was posted meanwhile."""
    _, page, _ = opened
    other = page.tab()
    page.load("Page.navigate", url="about:blank")
    other.run("await room.post('meanwhile')")
    visited = page.call("Page.getNavigationHistory")
    page.load("Page.navigateToHistoryEntry", entryId=visited["entries"][visited["currentIndex"] - 1]["id"])
    other.run("await room.post('after')")
    assert page.run(f"await until(({{ messages }}) => messages.length === 2); {TEXTS}") == ["meanwhile", "after"]


def test_import_from_the_server(opened):
    """A page of another origin imports the library from the server itself."""
    server, page, _ = opened
    script = "Object.keys(await import('http://127.0.0.1:PORT/static/chatd.js')).includes('Client')"
    assert page.run(script.replace("PORT", str(server.port)))
