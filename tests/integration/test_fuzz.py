"""scripts/fuzz: a short run, and its judgement of servers that have faults."""

import json
import random
import re
import socket
import subprocess
import sys
import threading
import zlib

import pytest
from support.servers import LONG, ROOT, program

sys.path.append(str(ROOT / "scripts"))

from attacking import answers, inputs

fuzz = program(ROOT / "scripts" / "fuzz")
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"
COMPRESSED = b"HTTP/1.1 101 Switching Protocols\r\nSec-WebSocket-Extensions: permessage-deflate; x\r\n\r\n"
SWITCHED = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: WebSocket\r\n\r\n"


def running(*texts):
    """Compress texts in one stream, as the frames of a server."""
    stream = zlib.compressobj(wbits=-12)
    for text in texts:
        data = stream.compress(text) + stream.flush(zlib.Z_SYNC_FLUSH)
        yield inputs.frame(inputs.TEXT, data.removesuffix(inputs.FLUSHED), masked=False, reserved=inputs.COMPRESSED)


RUNNING = [*running(b'{"type": "a long name"}', b'{"type": "a long name!"}')]


def test_server_survives():
    """The same seed repeats the same inputs."""
    command = [ROOT / "scripts" / "fuzz", "--count=1500", "--seed=tests"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=LONG, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1500 inputs of the seed tests, " in result.stdout
    counts = dict(re.findall(r"(\d{3}) (\d+)", result.stdout))
    assert {"101", "200", "201", "204", "400", "404"} <= counts.keys()
    chance, again = random.Random("tests"), random.Random("tests")
    assert [inputs.mutated(chance) for _ in range(50)] == [inputs.mutated(again) for _ in range(50)]


def test_bad_arguments():
    command = [ROOT / "scripts" / "fuzz", "--count=0"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=LONG, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("fuzz: ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("data", "wrong"),
    [
        (b"", None),
        (OK + b"hi", None),
        (OK, None),  # the answer to HEAD
        (OK + OK + b"hi", None),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"hi", None),
        (OK + b"hi" + b"x", "no response"),
        (OK + b"h", "the body is cut"),
        (OK[:-2], "no response"),
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", None),
        (b"HTTP/1.1 500 Internal Server Error\r\n\r\n", "status 500"),
        (SWITCHED, None),
        (SWITCHED + b"\x81\x0d" + b'{"type": "a"}', None),
        (SWITCHED + b"\x81\x02{}", "a text has no type"),
        (SWITCHED + b"\x81\x0d" + b'{"type": "a"', "a frame is cut"),
        (SWITCHED + b"\x81", "a frame is cut"),
        (SWITCHED + b"\xc1\x02{}", "a frame has a mask or reserved bits, or is a fragment"),
        (SWITCHED + b"\x81\x80" + bytes(4), "a frame has a mask or reserved bits, or is a fragment"),
        (SWITCHED + b"\x01\x02{}", "a frame has a mask or reserved bits, or is a fragment"),
        (SWITCHED + b"\x83\x00", "opcode 3"),
        (SWITCHED + b"\x88\x00\x89\x00", "a frame follows the close frame"),
        (SWITCHED + b"\x88\x7e\x00\x02\x03\xe8", None),
        (COMPRESSED + RUNNING[0] + b"\x81\x0d" + b'{"type": "a"}' + RUNNING[1], None),
        (COMPRESSED + RUNNING[1], "a text cannot be inflated"),
        (COMPRESSED + RUNNING[0][:-1], "a frame is cut"),
        (COMPRESSED + b"\xc1\x04" + inputs.deflated(b"{}"), "a text has no type"),
        (COMPRESSED + b"\xc9\x00", "a frame has a mask or reserved bits, or is a fragment"),
    ],
)
def test_judgement(data, wrong):
    assert answers.fault(data) == wrong


class Fake:
    """A server that gives each connection the same answer and closes it, but serves the first one, the witness."""

    def __init__(self, answer, documents=()):
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.port = self.listener.getsockname()[1]
        self.running = True
        self.faults = []
        self.last = ""
        self._answer, self._documents = answer, documents
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        witness, _ = self.listener.accept()
        texts = [json.dumps(document).encode() for document in self._documents]
        witness.sendall(SWITCHED + b"".join(inputs.frame(inputs.TEXT, text, masked=False) for text in texts))
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return witness.close()
            with client:
                client.sendall(self._answer)
                client.shutdown(socket.SHUT_WR)
                while client.recv(1 << 16):
                    pass


@pytest.mark.parametrize(
    ("answer", "documents", "found"),
    [
        (OK + b"hi", [], set()),
        (b"HTTP/1.1 500 Internal Server Error\r\n\r\n", [], {"status N"}),
        (SWITCHED + b"\x81\x02{", [], {"a frame is cut"}),
        (
            OK + b"hi",
            [{"type": "history", "id": "abcdef-2"}, {"type": "message", "id": "abcdef-4"}],
            {"message N follows message N"},
        ),
    ],
)
def test_faults_are_found(capsys, answer, documents, found):
    server = Fake(answer, documents)
    with server.listener:
        run = fuzz.Run(server, random.Random("tests"))
        run.send(20)
        run.close()
    assert {*run.faults} == found
    assert capsys.readouterr().out.count("FAULT") == min(sum(run.faults.values()), fuzz.SHOWN)
