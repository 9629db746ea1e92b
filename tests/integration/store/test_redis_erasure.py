"""A removal erases: Redis has the text neither in its memory nor in what it saves, and every node goes on."""

import pytest
from support.helpers import RecordingPoster
from support.redis_nodes import outcome
from support.redises import Redis, until, wait_in
from support.store_contract import REUSED

from chatd.messages import REMOVED, Id, Post
from chatd.store.redis import store as redis_store

SECRET = "sesame"
EDITS, ERASURES = "{chatd}:edits:main", "{chatd}:erase"


@pytest.fixture
def durable(tmp_path):
    """A server that logs every write, and saves texts as they are."""
    with Redis(tmp_path / "data", appendonly=True, fsync="always", rdbcompression="no") as server:
        yield server


def send(node, *posts):
    """Append posts one after the other; return their outcomes."""
    outcomes = []
    for post in posts:
        poster = RecordingPoster()
        node.store.append("main", post, poster)
        node.settle()
        outcomes.append(outcome(poster))
    return outcomes


def say(text, label=None):
    return Post("ann", text, label, "a", extra={"note": text})


def edit(node, number, text):
    return Post("ann", text, None, "a", Id(node.store.epoch, number), extra={"note": text})


def removal(node, number):
    return Post("ann", REMOVED, None, "a", Id(node.store.epoch, number), removed=True)


def memory(server):
    """Return all keys with all bytes of their values, those of deleted entries too."""
    dumps = {key: server.call("DUMP", key) for key in server.call("KEYS", "*")}
    return {key.decode() for key, dump in dumps.items() if dump is not None and SECRET.encode() in dump}


def saved(server, loop):
    """Rewrite the append-only file; return whether any file has the text then."""
    server.call("BGREWRITEAOF")
    until(loop, lambda: server.info("persistence")["aof_rewrite_in_progress"] == "0")
    assert server.info("persistence")["aof_last_bgrewrite_status"] == "ok"
    files = [file.read_bytes() for file in server.folder.rglob("*.aof*") if file.is_file()]
    assert files
    return any(SECRET.encode() in data for data in files)


def erased(node, server):
    """Wait until a node has erased what was removed."""
    until(node.loop, lambda: not server.call("EXISTS", ERASURES), "it was not erased")


def test_removal_leaves_no_text(durable, node, loop):
    """Neither a key nor the rewritten file has the text of the message or of its edits; all else is as before."""
    node = node(durable.url)
    send(node, say(SECRET, "l"), *(say(f"text {number}") for number in range(300)), edit(node, 3, f"{SECRET} 2"))
    assert memory(durable) == {"{chatd}:room:main", "{chatd}:feed"}
    assert saved(durable, loop)
    before = node.read()
    assert send(node, removal(node, 3)) == [("posted", 305)]
    assert SECRET not in str(node.read()), "no page shows it at once"
    erased(node, durable)
    assert memory(durable) == set()
    assert not saved(durable, loop)
    after = node.read()
    assert (after.first, after.head) == (1, 305)
    assert [entry.number for entry in after.entries] == [*range(1, 306)]
    assert [entry for entry in after.entries if not entry.removed] == [
        one for one in before.entries if one.number not in (3, 304)
    ]
    assert [entry.number for entry in after.entries if entry.removed] == [3, 304, 305]
    assert durable.call("HGETALL", EDITS) == [b"3", b"304 305"]
    assert not durable.call("KEYS", "*copy*")
    assert durable.call("PTTL", "{chatd}:room:main") == -1
    assert send(node, say(SECRET, "l"), edit(node, 3, "x"))[0] == ("duplicate", 3)


def test_every_node_goes_on(one, node, loop):
    """Replacing the feed costs no node an entry, and interrupts none that has read it."""
    first, second = node(one.url), node(one.url)
    send(first, say(SECRET), removal(first, 3))
    erased(first, one)
    assert SECRET not in str(second.read())
    texts = [str(number) for number in range(50)]
    first.post(*texts)
    second.hears(SECRET, REMOVED, *texts)
    assert first.interruptions == second.interruptions == 0
    second.post("more")
    first.hears(SECRET, REMOVED, *texts, "more")


def test_large_room_is_copied_in_pieces(durable, node, monkeypatch):
    """Posts, trims and removals go on while a room is copied, and each of them is in the copy."""
    monkeypatch.setattr(redis_store, "ERASE_PIECE", 7)
    node = node(durable.url, retain="100")
    send(node, *(say(f"{SECRET} {number}") for number in range(120)))
    for number in (30, 50, 120):
        send(node, removal(node, number), *(say(f"new {number}.{place}") for place in range(9)))
    erased(node, durable)
    page = node.read()
    assert [entry.number for entry in page.entries] == [*range(page.first, page.head + 1)]
    assert {entry.number for entry in page.entries if entry.removed} == {120, 123, 133, 143}
    assert SECRET not in str([entry for entry in page.entries if entry.removed])
    assert page.first == page.head - 99


def test_removal_of_what_is_copied_already(one, node, monkeypatch):
    """A copy that began before a removal is followed by another one."""
    monkeypatch.setattr(redis_store, "ERASE_PIECE", 1)
    node = node(one.url)
    send(node, *(say(f"{SECRET} {number}" if number < 2 else "x") for number in range(100)))
    send(node, removal(node, 4))
    copy = f"{{chatd}}:copy:{node.store.epoch}:main"
    until(node.loop, lambda: one.call("XLEN", copy) > 5)
    node.store.append("main", removal(node, 3), RecordingPoster())
    node.settle()
    assert one.call("XLEN", copy)
    erased(node, one)
    assert memory(one) == set()
    assert [entry.number for entry in node.read().entries if entry.removed] == [3, 4, 103, 104]


def test_another_node_erases_what_a_node_left(one, node):
    """A node that dies before it erases leaves that to the next start or trim."""
    first, second = node(one.url), node(one.url)
    first.store.append("main", say(SECRET), RecordingPoster())
    first.settle()
    first.store.append("main", removal(first, 3), RecordingPoster())
    first.settle()
    wait_in(second.loop, second.store.trim())
    assert memory(one) == set()
    assert not one.call("EXISTS", ERASURES)


def test_close_erases(one, node):
    node = node(one.url)
    send(node, say(SECRET), removal(node, 3))
    node.close()
    assert memory(one) == set()


def test_start_erases(one, node, monkeypatch):
    monkeypatch.setattr(redis_store, "ERASE_SECONDS", 1e9)
    first = node(one.url)
    send(first, say(SECRET), removal(first, 3))
    assert memory(one)
    node(one.url)
    assert memory(one) == set()


def test_refused_erasure_is_repeated(one, node, events):
    """A user without the permission is named in the log, and the erasure follows when it has it."""
    one.call("ACL", "SETUSER", "default", "-rename")
    another, node = node, node(one.url)
    send(node, say(SECRET), removal(node, 3))
    until(node.loop, lambda: any("was not erased yet" in str(event.get("log_format")) for event in events))
    assert memory(one)
    other = another(one.url)
    assert other.read().head == 4, "a start does not depend on it"
    one.call("ACL", "SETUSER", "default", "+rename")
    erased(node, one)
    events.clear()
    assert memory(one) == set()


def test_removal_in_doubt_is_erased(one, proxy, node):
    """A removal whose answer was lost is erased all the same."""
    node = node(proxy.url())
    send(node, say(SECRET))
    proxy.mute()
    node.start("x")
    node.store.append("main", removal(node, 3), RecordingPoster())
    until(node.loop, lambda: one.call("EXISTS", ERASURES) == 1)
    proxy.cut()
    proxy.go_on()
    node.up()
    erased(node, one)
    assert memory(one) == set()


def test_labels_of_what_an_older_version_erased(one, node):
    """An older version marks erased texts like removals, and retries of both are still told apart."""
    node = node(one.url)
    posts = [say("old", "l"), edit(node, 3, "new")._replace(label="e"), removal(node, 3)._replace(label="r")]
    send(node, *posts)
    erased(node, one)
    room = "{chatd}:room:main"
    entries = one.call("XRANGE", room, "-", "+")
    one.call("DEL", room)
    for place, fields in entries:
        one.call("XADD", room, place, *(b"1" if field == b"2" else field for field in fields))
    assert one.call("XRANGE", room, "-", "+") != entries
    others = [posts[1]._replace(label="r"), posts[2]._replace(label="e"), posts[2]._replace(label="l")]
    assert send(node, *posts, *others) == [*(("duplicate", number) for number in (3, 4, 5)), *[REUSED] * 3]


def test_trimmed_edits_are_forgotten(one, node):
    node = node(one.url, retain="2")
    send(node, say("old"), edit(node, 3, "new"), say("a"), say("b"))
    assert one.call("EXISTS", EDITS)
    wait_in(node.loop, node.store.trim())
    assert not one.call("EXISTS", EDITS)
