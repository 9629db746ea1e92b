"""The receivers in docs/webhooks.md: each verifies what a server sends, and prints every message once."""

import re
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from support.receivers import SECRET
from support.servers import LONG, ROOT, Lines, Server, environment, need

from chatd.webhooks.signature import parse_secrets, sign

PAGE = (ROOT / "docs" / "webhooks.md").read_text("utf-8")
LANGUAGES = {"python": ("receiver.py", sys.executable), "js": ("receiver.mjs", "node")}


def example(language):
    (code,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return code


@pytest.fixture(params=[*LANGUAGES])
def receiver(request, tmp_path):
    """Run a receiver on a free port; return its lines and its URL."""
    name, program = LANGUAGES[request.param]
    file = tmp_path / name
    file.write_text(example(request.param))
    process = subprocess.Popen(
        [program if program == sys.executable else need(program), file],
        env=environment(WEBHOOK_KEY=SECRET, PORT="0", PYTHONPATH=":".join(sys.path)),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    lines = Lines(process.stdout)
    try:
        (listening,) = lines.wait(r"^listening on (\d+)$")
        yield lines, f"http://127.0.0.1:{listening[1]}/"
    finally:
        process.kill()
        process.wait(LONG)
        lines.close()


def post(url, webhook_id, body, *, timestamp=None, secret=SECRET, **changes):
    """Post a delivery as the server does; return the status."""
    timestamp = int(time.time()) if timestamp is None else timestamp
    headers = {
        "webhook-id": webhook_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": sign(parse_secrets(secret), webhook_id, timestamp, body),
    }
    request = urllib.request.Request(url, body, headers | changes)
    try:
        with urllib.request.urlopen(request, timeout=LONG) as response:
            return response.status
    except urllib.error.HTTPError as refused:
        return refused.code


def body(*numbers, epoch="k7Q2xe"):
    one = '{{"id":"{}-{}","data":{{"username":"ann","message":"m{}"}}}}'
    entries = ",".join(one.format(epoch, number, number) for number in numbers)
    return f'{{"type":"messages","room":"team","messages":[{entries}]}}'.encode()


def test_receiver_of_a_server(receiver, tmp_path):
    """A receiver prints what is posted, in order."""
    lines, url = receiver
    (tmp_path / "keys").write_text(SECRET)
    with Server(tmp_path, f"--webhook={url}hook", "--webhook-key=keys") as server:
        server.log.wait("this node delivers")
        for text in ("one", "two"):
            data = f'{{"username":"ann","message":"{text}"}}'.encode()
            target = f"http://127.0.0.1:{server.port}/rooms/tea/messages"
            urllib.request.urlopen(urllib.request.Request(target, data, {"Content-Type": "application/json"})).close()
        lines.wait("^tea ann two$")
        server.stop()
    assert [*lines][1:] == ["tea ann one", "tea ann two"]


def test_receiver_verifies_and_skips(receiver):
    """A receiver rejects what is forged or old, and prints no message twice."""
    lines, url = receiver
    assert post(url, "team:k7Q2xe-1:2", body(1, 2)) == 204
    assert post(url, "team:k7Q2xe-1:2", body(1, 2)) == 204
    assert post(url, "team:k7Q2xe-2:3", body(2, 3)) == 204
    forged = "whsec_" + "A" * 32
    assert post(url, "a", body(4), secret=forged) == 401
    assert post(url, "a", body(4), timestamp=int(time.time()) - 900) == 401
    assert post(url, "a", body(4), **{"webhook-id": "b"}) == 401
    assert post(url, "a", body(4), **{"webhook-signature": "v1,"}) == 401
    assert post(url, "team:newone-1:1", body(1, epoch="newone")) == 204
    lines.wait("^team ann m1$", 2)
    assert [*lines][1:] == ["team ann m1", "team ann m2", "team ann m3", "team ann m1"]
