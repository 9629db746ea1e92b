"""The client against real servers."""

from support.loops import drive
from support.servers import Server, certificate_for, stored
from support.watches import Watch

from chatd.client.client import Client
from chatd.client.protocol import Backoff
from chatd.messages import Entry, Id


def at(loop, url, watch, **options):
    client = Client(loop, url, watch, backoff=Backoff(0.05, 0.2), **options)
    client.start()
    return client


def test_killed_server_loses_and_doubles_nothing(tmp_path):
    async def run(loop):
        watch = Watch()
        with Server(tmp_path) as server:
            port = server.port
            client = at(loop, f"ws://127.0.0.1:{port}/rooms/a", watch)
            posts = [client.post("ann", f"m{number}") for number in range(100)]
            await watch.until("on_entries", lambda event: len(watch.numbers) > 40)
            server.kill()
        await watch.until("on_disconnect", lambda event: event[1] == "connection refused")
        posts += [client.post("ann", f"m{number}") for number in range(100, 120)]
        with Server(tmp_path, listen=f"tcp:{port}:interface=127.0.0.1"):
            acks = [await post for post in posts]
            page = await client.page(limit=100)
            await client.stop()
        return watch, acks, page

    watch, acks, page = drive(run)
    epoch, rows = stored(tmp_path / "chatd.sqlite", "a")
    assert sorted(row[2] for row in rows) == sorted(f"m{number}" for number in range(120))
    assert watch.numbers == [*range(1, 121)]
    assert watch.kinds().count("on_history") == 1
    assert [rows[ack.id.number - 1][2] for ack in acks] == [f"m{number}" for number in range(120)]
    assert page.end == Id(epoch, 120)
    assert page.entries == [Entry(*row) for row in rows[20:]]


def test_rate_limited_posts_are_all_stored(tmp_path):
    async def run(loop):
        watch = Watch()
        with Server(tmp_path, "--rate=50:2") as server:
            client = at(loop, server.url, watch, window=1)
            for post in [client.post("ann", f"m{number}") for number in range(20)]:
                assert not (await post).duplicate
            await client.stop()

    drive(run)
    assert [row[2] for row in stored(tmp_path / "chatd.sqlite")[1][2:]] == [f"m{number}" for number in range(20)]


def test_client_of_a_stopped_server_resumes_on_the_next(tmp_path):
    async def run(loop):
        watch = Watch()
        with Server(tmp_path) as server:
            port = server.port
            client = at(loop, server.url, watch)
            await client.post("ann", "hi")
            server.terminate()
            lost = await watch.until("on_disconnect")
        with Server(tmp_path, listen=f"tcp:{port}:interface=127.0.0.1"):
            await watch.until("on_connect")
            await client.stop()
        return lost, watch

    (_, reason, _), watch = drive(run)
    assert reason.startswith("closed with 1012")
    assert watch.kinds().count("on_history") == 1
    assert watch.numbers == [1, 2, 3]


def test_server_that_lost_its_store(tmp_path):
    """The client starts over with the history of the new log."""

    async def run(loop):
        watch = Watch()
        with Server(tmp_path, "--store=memory:") as server:
            port = server.port
            client = at(loop, server.url, watch)
            await client.post("ann", "hi")
            server.kill()
        with Server(tmp_path, "--store=memory:", listen=f"tcp:{port}:interface=127.0.0.1") as server:
            _, history = await watch.until("on_history")
            await client.stop()
            return history, server.epoch

    history, epoch = drive(run)
    assert history.resumed is False
    assert history.end == Id(epoch, 2)


def test_tls_with_the_trust_of_the_machine(tmp_path, monkeypatch):
    arguments, _ = certificate_for(tmp_path)

    async def run(loop):
        watch = Watch()
        with Server(tmp_path, listen=f"ssl:0:interface=127.0.0.1:{arguments}") as server:
            url = f"wss://127.0.0.1:{server.port}/"
            stranger = at(loop, url, watch)
            _, reason, _ = await watch.until("on_disconnect")
            await stranger.stop()
            monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
            client = at(loop, url, watch)
            posted = await client.post("ann", "hi")
            await client.stop()
            return reason, posted

    reason, posted = drive(run)
    assert "certificate" in reason
    assert posted.id.number == 3
