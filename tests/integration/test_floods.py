"""One client that floods a real server: counts, not times.

In each test a good client posts during the flood and gets its acknowledgement, and the admin port answers.
"""

import json
import urllib.request

import pytest
from support.metrics import Scrape
from support.servers import LOOPBACK, Raw, Server
from support.websocket_frames import CLOSE, PING, PONG, TEXT, close_code, frame

from chatd.transport.session import MAX_REFUSALS

READ = 64 << 10
"""The size of one flood: what the server reads at once."""
RATE = "--rate=100:40"
MOST = READ // 16
"""More answers or throttles than a flood may cause: at this rate they take half a minute."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("floods"), "--store=memory:", RATE, admin=LOOPBACK) as server:
        yield server


def scrape(server):
    with urllib.request.urlopen(f"http://127.0.0.1:{server.admin_port}/metrics", timeout=60) as answer:
        return Scrape(answer.read().decode())


@pytest.fixture
def good(server):
    """Call to post as a client within the rate; it returns when the post is acknowledged."""
    with Raw(server.port) as client:
        client.join()

        def post(label):
            client.send(frame(TEXT, json.dumps({"username": "ann", "message": "hi", "label": label}).encode()))
            while client.json().get("label") != label:
                pass

        yield post


@pytest.fixture
def flooder(server):
    """A client that is alone in its room."""
    with Raw(server.port) as client:
        client.join(f"/rooms/flood-{client.socket.getsockname()[1]}")
        yield client


def fill(part):
    """A flood of parts."""
    return part * (READ // len(part))


def test_flood_of_invalid_frames(server, good, flooder):
    """The client gets a bounded number of errors and is closed, and the log has a few lines about it."""
    before = len([*server.log])
    flooder.send(fill(frame(TEXT, b"{}")))
    good("invalid")
    errors = 0
    while (answer := flooder.frame())[0] == TEXT:
        errors += json.loads(answer[1])["type"] == "error"
    assert (answer[0], close_code(answer[1]), errors) == (CLOSE, 1008, MAX_REFUSALS - 1)
    good("after")
    assert len([*server.log]) - before < 10


def test_flood_of_valid_posts(server, good, flooder):
    """Above the rate every second post is rejected, and the rest waits."""
    before = scrape(server)
    flooder.send(fill(frame(TEXT, b'{"username":"bob","message":"hi"}')))
    codes = []
    while codes.count("RATE_LIMITED") < 5:
        codes.append(flooder.json().get("code"))
    good("posts")
    after = scrape(server)
    refused = after("chatd_refusals_total", kind="frame", reason="RATE_LIMITED")
    assert 5 <= refused - before("chatd_refusals_total", kind="frame", reason="RATE_LIMITED") < MOST
    assert after("chatd_throttles_total", transport="websocket") > before(
        "chatd_throttles_total", transport="websocket"
    )


@pytest.mark.parametrize("opcode", [PING, PONG], ids=["pings", "pongs"])
def test_flood_of_control_frames(server, good, flooder, opcode):
    """Pings above the rate are answered at the rate, and pongs are read at the rate."""
    before = scrape(server)("chatd_throttles_total", transport="websocket")
    flooder.send(fill(frame(opcode)))
    good(f"control-{opcode}")
    if opcode == PING:
        for _ in range(45):
            assert flooder.frame()[0] == PONG
    while not 0 < scrape(server)("chatd_throttles_total", transport="websocket") - before < MOST:
        good("again")


def test_flood_of_empty_fragments(server, good, flooder):
    """The message is failed after 128 fragments, at the rate."""
    flooder.send(frame(TEXT, fin=False) + fill(frame(0, fin=False)))
    good("fragments")
    opcode, payload = flooder.frame()
    assert (opcode, close_code(payload)) == (CLOSE, 1008)
    good("after-fragments")


def test_flood_of_pipelined_requests(server, good):
    """A client that does not read gets a bounded number of answers."""
    before = scrape(server)("chatd_throttles_total", transport="http")
    with Raw(server.port) as flooder:
        flooder.send(fill(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"))
        good("requests")
        while not 0 < scrape(server)("chatd_throttles_total", transport="http") - before < MOST:
            good("again")
        assert flooder.head()[0] == 200
    good("after-requests")
