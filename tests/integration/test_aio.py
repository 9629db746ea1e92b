"""The client on asyncio against real servers."""

import asyncio
import signal
import ssl
import subprocess
import sys
import time
from random import Random

import pytest
from support.loops import quiet
from support.proxies import CuttingProxy
from support.servers import Server, certificate_for, environment, stored
from support.tokens import SECRET, token

from chatd.client.aio import Client, ClientStopped, FileStorage, Id, Posted, Rejected
from chatd.client.protocol import Backoff
from chatd.messages import Code
from chatd.transport.framing import EXPIRED
from chatd.transport.identity import LEEWAY_SECONDS

SOON = 3 - LEEWAY_SECONDS
"""The seconds until the expiry of a token whose connection closes in three."""


def user(url, username="ann", **options):
    """Return a client that reconnects soon."""
    return Client(url, username=username, backoff=lambda: Backoff(0.02, 0.1), **options)


def http(server):
    return f"http://127.0.0.1:{server.port}"


def texts(room):
    return [entry.message for entry in room.snapshot().messages]


async def until(room, condition):
    """Wait until a snapshot meets a condition, and return it."""
    while not condition(snapshot := room.snapshot()):
        await room.changed()
    return snapshot


def messages(folder, room="main"):
    return [row[2] for row in stored(folder / "chatd.sqlite", room)[1]]


@quiet
async def test_two_people_chat(tmp_path):
    """They see each other's messages, names and typing, and a stopped room ends its iterator."""
    with Server(tmp_path) as server:
        async with user(http(server)) as client, user(server.url, "bob") as other:
            ann, bob = client.room("a"), other.room("a")
            assert client.room("a") is ann
            await until(bob, lambda shown: shown.presence and "ann" in shown.presence.users)
            posted = await ann.post("hi")
            assert posted == Posted(Id(server.epoch, 1))
            await bob.post("hello")
            await until(ann, lambda shown: len(shown.messages) == 2)
            assert texts(ann) == ["hi", "hello"]
            bob.typing()
            await until(ann, lambda shown: shown.typing == ("bob",))
            read = []
            async for entry in bob:
                read.append(entry.message)
                if len(read) == 2:
                    await ann.post("bye")
                elif len(read) == 3:
                    bob.stop()
            assert read == ["hi", "hello", "bye"]
            with pytest.raises(ClientStopped):
                await bob.post("late")
            again = other.room("a")
            assert again is not bob
            await until(again, lambda shown: len(shown.messages) == 3)


@quiet
async def test_killed_server_loses_and_doubles_nothing(tmp_path):
    """Posts keep their order, and an iterator yields each entry once."""
    expected = [f"m{number}" for number in range(60)]
    seen = []

    async def read(room):
        seen.extend([(entry.id.number, entry.message) async for entry in room])

    with Server(tmp_path) as server:
        port = server.port
        client = user(http(server))
        room = client.room("a")
        reading = asyncio.create_task(read(room))
        posts = [room.post(text) for text in expected[:40]]
        await posts[20]
        server.kill()
    posts += [room.post(text) for text in expected[40:]]
    shown = await until(room, lambda shown: shown.state == "waiting" and shown.reason == "connection refused")
    assert shown.retry_at > time.time() - 10
    with Server(tmp_path, listen=f"tcp:{port}:interface=127.0.0.1"):
        assert [(await post).id.number for post in posts] == [*range(1, 61)]
        assert room.snapshot().outbox == ()
        await client.close()
        await reading
    assert messages(tmp_path, "a") == expected
    assert seen == [*enumerate(expected, 1)]


@quiet
async def test_stopped_server_names_the_pause(tmp_path):
    with Server(tmp_path) as server:
        port = server.port
        client = user(http(server))
        room = client.room()
        await until(room, lambda shown: shown.state == "online")
        waiting = asyncio.create_task(until(room, lambda shown: shown.state == "waiting"))  # it may wait a moment only
        await asyncio.to_thread(server.terminate)
        shown = await waiting
        assert shown.reason.startswith("closed with 1012 retry_after=")
    with Server(tmp_path, listen=f"tcp:{port}:interface=127.0.0.1"):
        await until(room, lambda shown: shown.state == "online")
        assert len(texts(room)) == 2
        await client.close()


@quiet
async def test_server_that_lost_its_log(tmp_path):
    """Everything is replaced, and a post without an answer is stored in the new log."""
    with Server(tmp_path, "--store=memory:") as server:
        port = server.port
        client = user(http(server))
        room = client.room("a")
        await room.post("lost")
        server.kill()
    post = room.post("kept")
    with Server(tmp_path, "--store=memory:", listen=f"tcp:{port}:interface=127.0.0.1") as server:
        assert await post == Posted(Id(server.epoch, 1))
        assert texts(room) == ["kept"]
        await client.close()


@pytest.mark.parametrize("seed", range(4))
@quiet
async def test_cut_connections(tmp_path, seed):
    """Whatever is cut, each post is stored once and in order, and each reader gets all messages in order."""
    chance = Random(seed)
    with Server(tmp_path, "--history=5") as server:
        async with (
            CuttingProxy(lambda: server.port, lambda: chance.randrange(200, 3000)) as proxy,
            user(proxy.url, "ann", storage=FileStorage(tmp_path / "ann.sqlite")) as ann,
            user(proxy.url, "bob") as bob,
        ):
            rooms = ann.room("a"), bob.room("a")
            posts = []
            for number in range(25):
                posts += [room.post(f"{room.username} {number}") for room in rooms]
                if number % 5 == 0:
                    await posts[chance.randrange(len(posts))]
                    proxy.cut()
            numbers = [(await post).id.number for post in posts]
            assert sorted(numbers) == [*range(1, 51)]
            for room in rooms:
                read = []
                async for entry in room:
                    read.append(entry.id.number)
                    if entry.id.number == 50:
                        break
                assert read == [*range(read[0], 51)]
            for name in ("ann", "bob"):
                mine = [text for text in messages(tmp_path, "a") if text.startswith(name)]
                assert mine == [f"{name} {number}" for number in range(25)]
            assert proxy.cuts > 0


@quiet
async def test_older_pages(tmp_path):
    with Server(tmp_path, "--history=3") as server:
        async with user(http(server)) as client, user(http(server), "bob") as other:
            room = client.room("a", events=())
            for number in range(1, 11):
                await room.post(f"m{number}")
            late = other.room("a")
            await until(late, lambda shown: len(shown.messages) == 3)
            await asyncio.gather(late.older(3), late.older(3))
            assert texts(late) == [f"m{number}" for number in range(5, 11)]
            await late.older()
            assert texts(late) == texts(room)
            page = await late.page(before=Id(server.epoch, 4), limit=2)
            assert [entry.message for entry in page.entries] == ["m2", "m3"]
            assert page.more
            with pytest.raises(Rejected) as error:
                await late.page(after="abcd-1")
            assert error.value.code == Code.UNKNOWN_ID
            other.stop()
            resumed = other.room("a", last=str(Id(server.epoch, 9)))
            async for entry in resumed:
                assert entry.message == "m10"
                break


PROGRAM = """
import asyncio, os, signal, sys
from chatd.client.aio import Client, FileStorage
async def main():
    room = Client(sys.argv[1], username="ann", storage=FileStorage(sys.argv[2])).room("a")
    for text in ("one", "two", "three"):
        room.post(text)
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""


@quiet
async def test_outbox_survives_the_program(tmp_path):
    """Posts of a program that was killed without a server are stored once, by two later programs at once."""
    path = tmp_path / "outbox.sqlite"
    with Server(tmp_path) as server:
        port = server.port
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-c", PROGRAM, url, str(path)]
    killed = await asyncio.to_thread(subprocess.run, command, env=environment(), check=False)
    assert killed.returncode == -signal.SIGKILL
    with Server(tmp_path, listen=f"tcp:{port}:interface=127.0.0.1"):
        async with user(url, storage=FileStorage(path)) as one, user(url, storage=FileStorage(path)) as two:
            for room in (one.room("a"), two.room("a")):
                await until(room, lambda shown: len(shown.messages) == 3 and not shown.outbox)
        assert FileStorage(path).list(f"chatd ws://127.0.0.1:{port}/rooms/a ann") == []
    assert messages(tmp_path, "a") == ["one", "two", "three"]


@quiet
async def test_refused_posts(tmp_path):
    """A post that nobody awaits raises no error; it is retried or discarded when the user asks for that."""
    with Server(tmp_path) as server:
        async with user(http(server)) as client:
            room = client.room("a")
            room.post("")
            (post,) = (await until(room, lambda shown: shown.outbox and shown.outbox[0].error)).outbox
            assert "not allowed to be empty" in str(post.error)
            with pytest.raises(Rejected, match="not allowed to be empty"):
                await room.retry(post.label)
            room.discard(post.label)
            assert room.retry(post.label) is None
            assert room.snapshot().outbox == ()
            with pytest.raises(Rejected) as error:
                await room.edit((await room.post("fine")).id, "better")
            assert error.value.code == Code.FORBIDDEN


@quiet
async def test_cancelled_tasks(tmp_path):
    """A cancelled wait ends at once, and the room goes on; a post is taken back by `discard` alone."""
    with Server(tmp_path) as server:
        async with user(http(server)) as client, CuttingProxy(lambda: server.port) as proxy, user(proxy.url) as slow:
            room = slow.room("a")
            await until(room, lambda shown: shown.state == "online")
            proxy.silent = True
            asked = [asyncio.ensure_future(each) for each in (room.page(), room.older(), anext(aiter(room)))]
            posted = room.post("hi")
            await until(other := client.room("a"), lambda shown: len(shown.messages) == 1)
            for each in (*asked, posted):
                each.cancel()
            results = await asyncio.gather(*asked, posted, return_exceptions=True)
            assert [type(result) for result in results] == [
                asyncio.CancelledError,
                type(None),
                *[asyncio.CancelledError] * 2,
            ]
            proxy.silent = False
            proxy.cut()
            assert (await room.post("ho")).id.number == 2
            assert texts(other) == ["hi", "ho"]


@quiet
async def test_end_of_a_cancelled_program(tmp_path):
    """A task that is cancelled in `async with` leaves no connection."""
    with Server(tmp_path) as server:
        online = asyncio.Event()

        async def main():
            async with user(http(server)) as client:
                await until(client.room(), lambda shown: shown.state == "online")
                online.set()
                async for _ in client.room():
                    pass

        running = asyncio.create_task(main())
        await online.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running


# Tokens


class Issuer:
    """A function that returns the next token in a while, and the last one again and again."""

    def __init__(self, *tokens):
        self._tokens = tokens
        self._changed = asyncio.Condition()
        self.calls = 0

    async def __call__(self):
        async with self._changed:
            self.calls += 1
            self._changed.notify_all()
        found = self._tokens[min(self.calls, len(self._tokens)) - 1]
        if found is None:
            raise RuntimeError("the login is gone")
        return found

    async def called(self, count):
        """Wait until so many tokens were asked for."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.calls >= count)


@pytest.fixture
def guarded(tmp_path):
    """A server that asks for tokens."""
    (tmp_path / "jwt.key").write_bytes(SECRET)
    with Server(tmp_path, "--jwt-key=jwt.key") as server:
        yield server


@quiet
async def test_edits_and_removals(guarded):
    async with user(http(guarded), token=token()) as client:
        room = client.room("a")
        posted = await room.post("helo")
        await room.edit(posted.id, "hello")
        assert texts(room) == ["hello"]
        await room.remove(str(posted.id))
        assert texts(room) == ["[removed]"]
        assert [entry.removed for entry in room.snapshot().entries] == [True] * 3


@quiet
async def test_renewal_before_the_expiry(guarded):
    """The next token is sent on the same connection, and its permissions hold from then on; a failure is retried."""
    issuer = Issuer(token(lasts=3, chatd={"post": []}), None, token())
    async with user(http(guarded), token=issuer) as client:
        room = client.room("a")
        await until(room, lambda shown: shown.state == "online")
        states = set()
        room.subscribe(lambda: states.add(room.snapshot().state))
        with pytest.raises(Rejected):
            await room.post("too early")
        (post,) = room.snapshot().outbox
        await issuer.called(3)
        await room.retry(post.label)
        assert states == {"online"}


@quiet
async def test_expired_and_refused_tokens(guarded):
    """The client gets another token after the close, and once after a 401."""
    expired = token(lasts=-2 * LEEWAY_SECONDS)
    issuer = Issuer(None, expired, token(lasts=SOON), expired, token())
    async with user(http(guarded), token=issuer) as client:
        room = client.room("a")
        reasons = []
        room.subscribe(lambda: reasons.append(room.snapshot().reason))
        await until(room, lambda shown: issuer.calls == 5 and shown.state == "online")
        await room.post("hi")
    found = [reason for reason in dict.fromkeys(reasons) if reason]
    assert found == ["there is no token", "refused with 401 Unauthorized", f"closed with 1008 {EXPIRED}"]


@quiet
async def test_token_that_is_refused_for_good(guarded):
    """The iterator and all requests raise the reason."""
    for tokens in (token(lasts=-2 * LEEWAY_SECONDS), Issuer(token(lasts=-2 * LEEWAY_SECONDS))):
        async with user(http(guarded), token=tokens) as client:
            room = client.room("a")
            post = room.post("hi")
            with pytest.raises(Rejected) as error:
                async for _ in room:
                    pass
            assert error.value.code == 401
            for request in (post, room.page(), room.post("late")):
                with pytest.raises(Rejected):
                    await request
            assert room.snapshot().state == "rejected"


@quiet
async def test_tls(tmp_path):
    """A stranger to the authority gets the reason, and a context of the user's own is used."""
    arguments, _ = certificate_for(tmp_path)
    with Server(tmp_path, listen=f"ssl:0:interface=127.0.0.1:{arguments}") as server:
        url = f"https://127.0.0.1:{server.port}"
        trusting = ssl.create_default_context(cafile=tmp_path / "cert.pem")
        async with user(url) as stranger, user(url, ssl=trusting) as client:
            shown = await until(stranger.room(), lambda shown: shown.state == "waiting")
            assert "certificate" in shown.reason.lower()
            await client.room().post("hi")
