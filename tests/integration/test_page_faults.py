"""The page while servers, networks and machines fail: nothing is lost, doubled or disordered."""

import itertools
import random
import re
import urllib.request

import pytest
from support.browser import expect
from support.people import Person, join, post, room_url
from support.redises import Proxy, Redis, free_port
from support.servers import LONG, LOOPBACK, Server, stored

QUICK = "Math.random = () => 0.02"
"""Short pauses before each attempt, for short tests."""


def start(folder, port=0, *options):
    return Server(folder, *options, listen=f"tcp:{port}:interface=127.0.0.1")


def stored_texts(folder):
    return [row[2] for row in stored(folder / "chatd.sqlite", "a")[1]]


def test_server_that_is_killed(tmp_path, visit):
    """Messages that are written during the outage are stored once, when the server is back."""
    port = free_port()
    with start(tmp_path, port):
        ann, bob = (join(visit, room_url(port), name) for name in ("ann", "bob"))
        ann.write("before")
        bob.shows("before")
    ann.offline()
    ann.write("meanwhile", "and more")
    expect(ann.pending).to_have_text(["meanwhile", "and more"])
    with start(tmp_path, port):
        for person in (ann, bob):
            person.online()
            person.shows("before", "meanwhile", "and more")
        assert stored_texts(tmp_path) == ["before", "meanwhile", "and more"]


def test_text_written_offline_survives_a_reload(tmp_path, visit):
    """It is still there after a reload without a network, then it is sent once and shown once."""
    with Server(tmp_path) as server, Proxy(server.port) as proxy:
        ann = join(visit, room_url(proxy.port), "ann")
        bob = join(visit, room_url(server.port), "bob")
        ann.write("online")
        ann.shows("online")
        browser = ann.page.context
        browser.route(re.compile(r"/rooms/a$|/static/"), lambda route: route.fulfill(response=route.fetch()))  # a cache
        browser.set_offline(True)
        proxy.cut()
        ann.offline()
        ann.write("one", "two")
        expect(ann.pending).to_have_text(["one", "two"])
        ann.page.reload()
        expect(ann.pending).to_have_text(["one", "two"])
        ann.offline()
        browser.set_offline(False)
        ann.online()
        for person in (ann, bob):
            person.shows("online", "one", "two")
        assert stored_texts(tmp_path) == ["online", "one", "two"]


def test_node_that_is_drained(tmp_path, visit):
    """Its clients go to the other node, without a visible gap, and write on."""
    folders = [tmp_path / name for name in ("redis", "a", "b")]
    for folder in folders:
        folder.mkdir()
    with Redis(folders[0]) as redis:
        nodes = [Server(folder, f"--store={redis.url}") for folder in folders[1:]]
        with nodes[0], nodes[1], Proxy(nodes[0].port) as proxy:
            ann, bob = (join(visit, room_url(proxy.port), name) for name in ("ann", "bob"))
            ann.write("to the first node")
            bob.shows("to the first node")
            proxy.target = nodes[1].port
            nodes[0].stop()
            ann.write("to the second node")
            for person in (ann, bob):
                person.online()
                person.shows("to the first node", "to the second node")


def test_ten_tabs(tmp_path, visit):
    """They are one connection, and each message is shown once in each of them, also when the first tab is closed."""
    with Server(tmp_path, admin=LOOPBACK) as server:
        first = join(visit, room_url(server.port), "ann")
        tabs = [first]
        for _ in range(9):
            page = first.page.context.new_page()
            page.goto(first.page.url)
            tabs.append(Person(page).online())
        texts = [f"from tab {number}" for number in range(10)]
        for tab, text in zip(tabs, texts, strict=True):
            tab.write(text)
            tab.shows(*texts[: texts.index(text) + 1])
        for tab in tabs:
            tab.shows(*texts)
        with urllib.request.urlopen(f"http://127.0.0.1:{server.admin_port}/metrics", timeout=LONG) as metrics:
            assert b"\nchatd_members 1.0\n" in metrics.read()
        tabs[9].write("the end")
        first.page.close()
        for tab in tabs[1:]:
            tab.shows(*texts, "the end")
        assert stored_texts(tmp_path) == [*texts, "the end"]


def test_machine_that_slept(tmp_path, visit):
    """A page finds when it wakes that its connection is dead, which nobody told it, and has what it missed."""
    with Server(tmp_path) as server, Proxy(server.port) as proxy:
        page = visit()
        page.clock.install()
        page.goto(room_url(proxy.port))
        ann = Person(page).introduce("ann")
        proxy.forget()
        post(server.port, ("bob", "good morning"))
        page.clock.fast_forward("08:00:00")  # it asks the server
        page.clock.fast_forward(11_000)  # and has no answer
        ann.shows("good morning")


def lengths(seed):
    """Yield after how many bytes connections are cut, first in the server's direction."""
    chance = random.Random(seed)
    while True:
        yield chance.randrange(1, 3000)
        yield chance.randrange(600, 3000)


@pytest.mark.parametrize("seed", range(3))
def test_connections_cut_at_random(tmp_path, visit, seed):
    """Two people write while each of their connections is cut after random bytes."""
    with Server(tmp_path) as server, Proxy(server.port) as proxy:
        people = []
        for name in ("ann", "bob"):
            page = visit()
            page.add_init_script(QUICK)
            page.goto(room_url(proxy.port))
            people.append(Person(page).introduce(name))
        proxy.lengths = lengths(seed)
        proxy.cut()
        written = [f"{number} of {name}" for number in range(25) for name in ("ann", "bob")]
        for person, text in zip(itertools.cycle(people), written):
            person.write(text)
        proxy.lengths = itertools.repeat(1 << 30)
        proxy.cut()
        for person in people:
            expect(person.texts).to_have_count(50)
            expect(person.pending).to_have_count(0)
        logged = stored_texts(tmp_path)
        assert sorted(logged) == sorted(written)
        for person, name in zip(people, ("ann", "bob"), strict=True):
            person.shows(*logged)
            assert [text for text in logged if text.endswith(name)] == [text for text in written if text.endswith(name)]
