"""Clients that stop reading, over real sockets with tiny buffers: they lose nothing, and cost the others nothing."""

import socket

import pytest
from support.servers import Raw, Server, post, upgrade
from support.websocket_frames import CLOSE, TEXT, close_code

from chatd.room.room import MAX_LAG
from chatd.room.tail import TAIL_BYTES

MESSAGE = "x" * 480
CHUNK = 250


class Stalled(Raw):
    """A client that has joined, with as small a buffer as the kernel gives, and reads nothing more."""

    def __init__(self, port):
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.settimeout(60)
        self.socket.connect(("127.0.0.1", port))
        self._data = bytearray()
        self.send(upgrade())
        assert self.head()[0] == 101
        self.history = self.json()

    def wakes(self):
        """Read all there is: the numbers of the messages, and the code of the close if one came."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)  # else the rest comes by the spoonful
        numbers = []
        while True:
            opcode, payload = self.frame()
            if opcode == CLOSE:
                return numbers, close_code(payload)
            assert opcode == TEXT
            numbers.append(int(payload[: payload.index(b'","data"')].rpartition(b"-")[2]))
            if payload.endswith(b'"message":"last"' + payload[payload.rindex(b',"timestamp"') :]):
                return numbers, None


def posts(client, count):
    """Post so many messages, and read each back."""
    for done in range(0, count, CHUNK):
        client.send(b"".join([post("ann", MESSAGE)] * min(CHUNK, count - done)))
        for _ in range(min(CHUNK, count - done)):
            assert client.json()["type"] == "message"


@pytest.mark.parametrize("store", ["memory:", "sqlite:chatd.sqlite"])
def test_client_that_stalled_gets_every_message_in_order(tmp_path, store):
    count = MAX_LAG - 1000
    assert count * len(MESSAGE) > TAIL_BYTES, "so that the log is needed too"
    with Server(tmp_path, f"--store={store}") as server, Raw(server.port) as ann, Stalled(server.port) as stalled:
        ann.join()
        posts(ann, count)
        ann.send(post("ann", "last"))
        assert stalled.wakes() == ([*range(3, count + 4)], None)


def test_client_too_far_behind(tmp_path):
    """It gets messages without a gap and is then asked to reconnect."""
    # The kernel takes up to 4 MiB for a client that does not read, and that much it is not behind.
    count = MAX_LAG + 2 * (4 << 20) // len(MESSAGE)
    with Server(tmp_path, "--store=memory:") as server, Raw(server.port) as ann, Stalled(server.port) as stalled:
        ann.join()
        posts(ann, count)
        numbers, code = stalled.wakes()
        assert code == 1013
        assert numbers == [*range(3, 3 + len(numbers))]
        with Raw(
            server.port
        ) as again:  # a client that missed so much starts over, and its history frame has resumed:false
            history = again.join(f"/?last_event_id={server.epoch}-{numbers[-1]}")
            assert history["resumed"] is False
            assert history["id"] == f"{server.epoch}-{count + 2}"


def test_stalled_clients(tmp_path):
    """They delay no other client and hold no memory."""
    with Server(tmp_path, "--store=memory:") as server, Raw(server.port) as ann:
        ann.join()
        posts(ann, MAX_LAG)  # the tail and the store are full
        stalled = [Stalled(server.port) for _ in range(50)]
        posts(ann, 1000)  # their sockets are full
        before = server.memory()
        posts(ann, MAX_LAG)
        assert server.memory() - before < 8 << 20
        for client in stalled:
            client.socket.close()
