"""Webhooks of real servers: an application that misbehaves, a server that is killed, and two nodes on one Redis."""

import http.client
import json
import signal
import sys

import pytest
from support.metrics import Scrape
from support.receivers import OTHER, SECRET, Receiver
from support.redises import Redis
from support.servers import LONG, TWISTD, Server
from support.threads import serving

from chatd.store.redis.keys import LOG

ADMIN = "tcp:0:interface=127.0.0.1"
BRISK = """
import runpy, sys
from chatd.webhooks import delivery, lease
lease.LEASE_SECONDS, lease.RENEW_SECONDS, lease.MARGIN_SECONDS = 2.0, 0.2, 0.5
delivery.BACKOFF_SECONDS = 0.1, 0.5
sys.argv[0] = sys.path[0] = {!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
COMMAND = (sys.executable, "-c", BRISK.format(str(TWISTD)))
"""A server with shorter pauses."""


class Posting(Server):
    """A server with webhooks, in a folder whose store outlives it."""

    def __init__(self, folder, *apps, options=(), keys=(SECRET,)):
        self.keys = folder / "keys"
        self.keys.write_text("\n".join(keys))
        urls = [f"--webhook={getattr(app, 'url', app)}" for app in apps]
        super().__init__(folder, *urls, "--webhook-key=keys", *options, admin=ADMIN, command=COMMAND)

    def say(self, *texts, room="team"):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LONG)
        for text in texts:
            body = json.dumps({"username": "ann", "message": text})
            connection.request("POST", f"/rooms/{room}/messages", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            assert (response.status, response.read())[0] == 201
        connection.close()

    def scrape(self):
        connection = http.client.HTTPConnection("127.0.0.1", self.admin_port, timeout=LONG)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        return Scrape(text)

    def counts(self, name, **samples):
        """Scrape until a metric has these samples that are not 0, by the first of their labels."""
        for _ in range(1000):
            found = {labels[0]: number for labels, number in self.scrape().some(name).items()}
            if found == samples:
                return
        raise AssertionError(f"{name}: {found}")


def numbers(*bounds):
    return [f"{number}" for number in range(*bounds)]


def test_messages_arrive_in_order(tmp_path):
    """Every application gets every room, from the first start on; the log holds no part of a URL but the origin."""
    with serving(Receiver()) as app, serving(Receiver()) as other:
        url = app.url.replace("//", "//ann:geheim@")
        with Posting(tmp_path, url, other) as server:
            server.log.wait("this node delivers", 2)
            server.say(*numbers(50))
            server.say("x", room="tea")
            for one in (app, other):
                one.wait(lambda one: one.texts("team") == numbers(50) and one.texts("tea") == ["x"])
                one.check_ids()
                assert len(one.ids) < 30, "what is posted together is delivered together"
            origins = [one.url.partition("/hook")[0] for one in (app, other)]
            server.counts("chatd_webhook_messages_total", **dict.fromkeys(origins, 51))
            server.counts("chatd_webhook_active", **dict.fromkeys(origins, 1))
            server.stop()
            for word in ("geheim", "secret", "/hook"):
                assert word not in server.log.text + server.errors.text


def test_application_that_is_down(tmp_path):
    """Messages wait in the log, also over a restart, until the application is back."""
    with serving(Receiver()) as app:
        port = app.server_port
    with Posting(tmp_path, app.url) as server:
        server.log.wait("this node delivers")
        server.say(*numbers(10))
        server.log.wait("cannot be reached: retrying")
        assert server.scrape().sum("chatd_webhook_lag_messages") == 10
        server.stop()
    with Posting(tmp_path, app.url) as server:
        server.say(*numbers(10, 20))
        with serving(Receiver(port=port)) as app:
            app.wait(lambda app: app.texts("team") == numbers(20))
        server.stop()


def test_slow_room(tmp_path):
    """A room whose delivery takes long does not hold up another one, and gets its next messages together."""
    with serving(Receiver("slow")) as app, Posting(tmp_path, app) as server:
        server.log.wait("this node delivers")
        server.say("a", room="slow")
        app.wait(lambda app: app.headers)
        server.say(*numbers(20), room="quick")
        server.say(*"bcdef", room="slow")
        app.wait(lambda app: app.texts("quick") == numbers(20))
        assert app.texts("slow") == []
        app.released.set()
        app.wait(lambda app: app.texts("slow") == [*"abcdef"])
        assert len([webhook_id for webhook_id in app.ids if webhook_id.startswith("slow")]) == 2
        app.check_ids()
        server.stop()


def test_application_that_fails(tmp_path):
    """Each failure is followed by a retry with the same id; a redirect is not followed."""
    replies = 500, "drop", (302, {"Location": "/other"}), (429, {"Retry-After": "1"}), 404, "cut"
    with serving(Receiver(*replies)) as app, Posting(tmp_path, app) as server:
        server.log.wait("this node delivers")
        server.say("a")
        app.wait(lambda app: app.texts("team") == ["a"])
        assert len({*app.ids}) == 1
        server.say("b")
        app.wait(lambda app: app.texts("team") == ["a", "b"])
        app.check_ids()
        server.log.wait(r"answers with a redirect \(302\), which is not followed")
        server.counts("chatd_webhook_deliveries_total", rejected=4, unanswered=1, taken=2)
        server.stop()


def test_server_killed_during_a_delivery(tmp_path):
    """The next process delivers what was not answered once more, and nothing else twice."""
    with serving(Receiver(204, "hang")) as app:
        with Posting(tmp_path, app) as server:
            server.log.wait("this node delivers")
            server.say("a")
            app.wait(lambda app: len(app.ids) == 1)
            server.say("b")
            app.wait(lambda app: len(app.ids) == 2)
            server.say("c")
            server.kill()
        app.released.set()
        with Posting(tmp_path, app) as server:
            app.wait(lambda app: app.texts("team") == ["a", "b", "c"])
            server.say("d")
            app.wait(lambda app: app.texts("team") == ["a", "b", "c", "d"])
            app.check_ids()
            server.stop()


def test_server_killed_again_and_again(tmp_path):
    """Every message arrives, in order; a kill repeats at most the delivery whose answer it cut off, in each room."""
    kills, rooms, said = 4, ("one", "two"), 0
    with serving(Receiver()) as app:
        for _ in range(kills):
            with Posting(tmp_path, app) as server:
                server.log.wait("this node delivers")
                before = len(app.ids)
                while len(app.ids) < before + 4:
                    for room in rooms:
                        server.say(f"{said}", room=room)
                    said += 1
                server.kill()
        with Posting(tmp_path, app) as server:
            server.log.wait("this node delivers")  # until then a signal ends the process at once
            app.wait(lambda app: all(app.texts(room) == numbers(said) for room in rooms))
            server.stop()
        assert len(app.ids) - len({*app.ids}) <= kills * len(rooms)


def test_stop_during_a_delivery(tmp_path):
    """The stop does not wait for an application that hangs, and the next process delivers it."""
    with serving(Receiver("hang")) as app:
        with Posting(tmp_path, app) as server:
            server.log.wait("this node delivers")
            server.say("a")
            app.wait(lambda app: app.ids)
            server.stop()
        app.released.set()
        with Posting(tmp_path, app) as server:
            app.wait(lambda app: app.texts("team") == ["a"])
            assert app.ids[0] == app.ids[1]
            server.stop()


def test_gone_and_reload(tmp_path):
    """410 ends the webhook until a reload, which also reads the keys: the old and the new one sign."""
    with serving(Receiver(410)) as app, Posting(tmp_path, app) as server:
        server.log.wait("this node delivers")
        server.say("a")
        server.log.wait("answers 410 and gets nothing more")
        server.say("b")
        assert server.scrape().sum("chatd_webhook_stopped") == 1
        assert len(app.ids) == 1
        server.keys.write_text(f"{OTHER}\n{SECRET}\n")
        server.terminate(signal.SIGHUP)
        app.wait(lambda app: app.texts("team") == ["a", "b"])
        assert len(app.headers[-1]["Webhook-Signature"].split()) == 2
        server.stop()


@pytest.fixture(scope="module")
def redis(tmp_path_factory):
    with Redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


def pair(folder, app, redis):
    """Make the folders of two nodes, and their arguments."""
    redis.flush()
    for name in ("one", "two"):
        (folder / name).mkdir()
    options = [f"--store={redis.url}"]
    return [(folder / name, app) for name in ("one", "two")], options


def test_suspended_node(tmp_path, redis):
    """While a node is suspended in mid-delivery, the other one goes on, and the first one sends nothing afterwards."""
    with serving(Receiver(204, "hang")) as app:
        (one, two), options = pair(tmp_path, app, redis)
        with Posting(*one, options=options) as first:
            first.log.wait("this node delivers")
            with Posting(*two, options=options) as second:
                first.say("a")
                app.wait(lambda app: app.texts("team") == ["a"])
                first.say("b")
                app.wait(lambda app: len(app.ids) == 2)
                first.terminate(signal.SIGSTOP)
                second.say(*numbers(20))
                second.log.wait("this node delivers")
                app.wait(lambda app: app.texts("team") == ["a", "b", *numbers(20)])
                first.terminate(signal.SIGCONT)
                app.released.set()
                first.log.wait("this node no longer delivers")
                first.say(*numbers(20, 30))
                app.wait(lambda app: app.texts("team") == ["a", "b", *numbers(30)])
                app.check_ids()
                second.stop()
            first.log.wait("this node delivers", 2)
            first.say("z")
            app.wait(lambda app: app.texts("team")[-1] == "z")
            app.check_ids()
            first.stop()


def test_new_epoch(tmp_path, redis):
    """After a new epoch, the application gets every room from its start."""
    with serving(Receiver()) as app:
        (one, _), options = pair(tmp_path, app, redis)
        with Posting(*one, options=options) as server:
            server.log.wait("this node delivers")
            server.say("a", "b")
            app.wait(lambda app: app.texts("team") == ["a", "b"])
            redis.call("HSET", LOG, "epoch", "byhand")
            app.wait(lambda app: any(webhook_id.startswith("team:byhand-1:2") for webhook_id in app.ids))
            (again,) = (document for webhook_id, document, _ in app.deliveries if webhook_id == "team:byhand-1:2")
            assert again["start"] is True
            app.check_ids()
            server.stop()


def test_killed_node(tmp_path, redis):
    """The other node goes on when the lease of a killed one is over."""
    with serving(Receiver(204, "hang")) as app:
        (one, two), options = pair(tmp_path, app, redis)
        with Posting(*one, options=options) as first:
            first.log.wait("this node delivers")
            with Posting(*two, options=options) as second:
                first.say("a")
                app.wait(lambda app: app.texts("team") == ["a"])
                first.say("b", "c")
                app.wait(lambda app: len(app.ids) == 2)
                first.kill()
                app.released.set()
                app.wait(lambda app: app.texts("team") == ["a", "b", "c"])
                app.check_ids()
                second.stop()
