"""The page under hostile, clumsy and unlucky use."""

import re

import pytest
from support.browser import expect
from support.people import Person, join, room_url
from support.redises import Proxy
from support.servers import Server

BLOCKED = """for (const name of ["localStorage", "sessionStorage", "indexedDB"])
    Object.defineProperty(globalThis, name, { get() { throw new DOMException("blocked", "SecurityError"); } });"""


@pytest.fixture
def server(tmp_path):
    with Server(tmp_path, "--rooms=a", "--rooms=b") as server:
        yield server


def go(person, room):
    field = person.page.get_by_role("textbox", name="Open another room")
    field.fill(room)
    field.press("Enter")


def test_name_dialog_that_is_dismissed(server, visit):
    """The page asks again, because it shows no room without a name."""
    page = visit(room_url(server.port))
    box = page.get_by_role("textbox", name="Your name")
    for _ in range(3):
        expect(box).to_be_visible()
        page.keyboard.press("Escape")
    Person(page).introduce("ann")


def test_room_that_is_refused(server, visit):
    """The other rooms stay usable, and another visit tries again."""
    ann = join(visit, room_url(server.port), "ann")
    ann.write("before")
    for _ in range(2):
        go(ann, "c")
        expect(ann.status).to_have_text("Rejected: this server does not have this room")
        expect(ann.box).to_be_hidden()
        go(ann, "a")
        ann.online()
        ann.write("after")
    ann.shows("before", "after", "after")
    visit.errors[:] = [error for error in visit.errors if "status of 404" not in error]


def test_storage_that_is_blocked(server, visit):
    """One can chat, and the page remembers nothing."""
    page = visit()
    page.context.add_init_script(BLOCKED)
    page.goto(room_url(server.port))
    ann = Person(page).introduce("ann")
    ann.write("hello")
    ann.shows("hello")


@pytest.mark.parametrize("fragment", ["token=%E0%A4%A", "token=", "%"])
def test_fragment_that_is_broken(server, visit, fragment):
    """A broken fragment does not stop the page, whether it is there at the start or later."""
    page = visit(f"{room_url(server.port)}#{fragment}")
    Person(page).introduce("ann")
    page.goto(f"{room_url(server.port)}#{fragment}")
    Person(page).online()
    assert "token=%" not in page.url


def test_skip_link(server, visit):
    """It leads to the field for a message, and the list stays as it is."""
    ann = join(visit, room_url(server.port), "ann")
    ann.write("hello")
    ann.shows("hello")
    node = ann.articles.element_handle()
    ann.page.locator(".skip").press("Enter")
    expect(ann.page).to_have_url(re.compile("#box$"))
    expect(ann.box).to_be_focused()
    assert node.evaluate("node => node.isConnected")


NO_SOCKETS = """WebSocket = class {
    constructor() { setTimeout(() => this.onclose({ code: 1006, reason: "" })); }
    close() {}
};"""


def test_many_rooms_without_websockets(tmp_path, visit):
    """The streams of the rooms that one has visited leave a connection for posts."""
    with Server(tmp_path) as server:
        page = visit()
        page.context.add_init_script(NO_SOCKETS)
        page.goto(room_url(server.port, "r0"))
        ann = Person(page).introduce("ann")
        for number in range(1, 8):
            go(ann, f"r{number}")
            ann.online()
            ann.write("hello")
            ann.shows("hello")


def test_small_screen_with_a_long_title(tmp_path, visit):
    """At 400 % of zoom, the title leaves room for the messages."""
    with Server(tmp_path, f"--title={'A long title ' * 7}") as server:
        ann = join(visit, room_url(server.port), "ann", viewport={"width": 320, "height": 256})
        ann.write("hello")
        expect(ann.texts.last).to_be_in_viewport(ratio=1)
        assert ann.page.get_by_role("main").bounding_box()["height"] > 60


def test_unsent_message_of_another_room(tmp_path, visit):
    """It is sent after a reload at another room, and when one has left its room for many others."""
    with Server(tmp_path) as server, Proxy(server.port) as proxy:
        ann = join(visit, room_url(proxy.port, "main"), "ann")
        bob = join(visit, room_url(server.port, "b"), "bob")
        browser = ann.page.context
        kept = re.compile(r"/rooms/\w+$|/static/")  # as by a cache
        browser.route(kept, lambda route: route.fulfill(response=route.fetch()))
        browser.set_offline(True)
        proxy.cut()
        go(ann, "b")
        ann.write("from the tunnel")
        expect(ann.pending).to_have_count(1)
        for number in range(6):
            go(ann, f"r{number}")
        ann.page.reload()
        ann.offline()
        browser.set_offline(False)
        ann.online()
        bob.shows("from the tunnel")
