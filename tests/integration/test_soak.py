"""scripts/soak: a short attack, and what its witnesses find at servers that have faults."""

import asyncio
import json
import subprocess
import sys

import pytest
from support.servers import LONG, ROOT

sys.path.append(str(ROOT / "scripts"))

from attacking import inputs, witnesses

SWITCHED = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: WebSocket\r\n\r\n"
SECONDS = 1


def soak(*arguments):
    return subprocess.run(
        [ROOT / "scripts" / "soak", "--worst-ms=60000", *arguments],
        capture_output=True,
        text=True,
        timeout=LONG,
        check=False,
    )


def test_server_stands_an_attack(tmp_path):
    """Every promise is checked, and the figures are in a file."""
    result = soak("joins", "--clients=5", f"--seconds={SECONDS}", "--interval=0.2", f"--json={tmp_path}/figures.json")
    assert result.returncode == 0, result.stdout + result.stderr
    ((found,), python) = (json.loads((tmp_path / "figures.json").read_text())[key] for key in ("attacks", "python"))
    assert python == "{}.{}.{}".format(*sys.version_info)
    assert (found["attack"], found["faults"], found["disconnects"]) == ("joins", [], 0)
    assert found["posts"] > 5
    assert 0 < found["p50"] <= found["p99"]


def test_witnesses_inflate_what_an_attack_compresses(tmp_path):
    """Half of them take compressed messages, which is enough for the room to compress."""
    arguments = "--clients=12", f"--seconds={SECONDS}", "--interval=0.2", f"--json={tmp_path}/figures.json"
    result = soak("bombs", *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    (found,) = json.loads((tmp_path / "figures.json").read_text())["attacks"]
    assert (found["faults"], found["disconnects"]) == ([], 0)
    assert found["inflated"] > 6 * found["posts"] / 2


def test_server_stands_ordeals(tmp_path):
    """Its disk is full for a second, and its clock is set; every post is acknowledged at last."""
    if subprocess.run(["unshare", "--mount", "--map-root-user", "true"], capture_output=True, check=False).returncode:
        pytest.skip("a mount namespace is not permitted here")
    arguments = "--clients=5", f"--seconds={SECONDS}", "--interval=0.2", f"--json={tmp_path}/figures.json"
    result = soak("disk", "clock", *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    disk, clock = json.loads((tmp_path / "figures.json").read_text())["attacks"]
    assert (disk["faults"], disk["disconnects"], clock["faults"], clock["disconnects"]) == ([], 0, [], 0)
    assert disk["p99"] > 1000 * SECONDS / 2  # the posts waited for the disk


def test_unknown_attack():
    result = soak("nothing")
    assert result.returncode == 2
    assert result.stderr.startswith("soak: there is no attack 'nothing', only connect, head, ")
    assert len(result.stderr.splitlines()) == 1


def text(**document):
    return inputs.frame(inputs.TEXT, json.dumps(document, separators=(",", ":")).encode(), masked=False)


def message(number, message):
    return text(type="message", id=f"abcdef-{number}", data={"username": "ann", "message": message})


HISTORY = text(type="history", id="abcdef-0", data=[])


def watched(sent):
    """Return what a witness finds at a server that sends frames and nothing else."""

    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(SWITCHED + HISTORY + sent)
        await reader.read(1 << 16)
        writer.close()

    async def run():
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            crowd = witnesses.Witnesses(1, server.sockets[0].getsockname()[1])
            await crowd.begin()
            await crowd.end(witnesses.RETRY_SECONDS)
            return dict(crowd.faults)

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("sent", "found"),
    [
        (message(1, "hi") + message(2, "hi"), {}),
        (message(1, "hi") + message(3, "hi"), {"message N follows message N": 1}),
        (message(1, "hi") + message(1, "hi"), {"message N follows message N": 1}),
        (message(1, "witness0 9") + message(2, "witness0 9"), {"'witnessN N' came as N and as N": 1}),
        (text(type="error", message="No."), {"an error: No.": 1}),
        (text(type="error", message="Later.", code="RATE_LIMITED", retry_after=9), {}),
    ],
)
def test_faults_are_found(sent, found):
    assert watched(sent) == found


def test_missing_ack_is_found():
    """A witness that posts gets no ack here."""

    async def run():
        crowd = witnesses.Witnesses(1, 1)
        (witness,) = crowd.everyone
        posting = asyncio.create_task(witness.post(0))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        posting.cancel()
        return dict(crowd.faults)

    assert asyncio.run(run()) == {"a post has no ack": 1}
