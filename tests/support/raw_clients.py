"""Raw clients that follow a room: a member over WebSocket, and a reader of events."""

import contextlib
import json
import re

from support.servers import Raw
from support.web_doubles import EventParser
from support.websocket_frames import CLOSE, TEXT, close_code, frame


def moment(reason):
    """Return the seconds after which a close frame asks the client to reconnect."""
    return float(re.fullmatch(r"retry_after=(\d+\.\d)", reason)[1])


class RawMember(Raw):
    """A member over WebSocket that has read its history."""

    def __init__(self, port, path="/", **headers):
        super().__init__(port)
        self.history = self.join(path, **headers)

    def answer(self):
        """Return the next frame, except presence and typing, which may arrive at any time."""
        while (text := self.json())["type"] in ("presence", "typing"):
            pass
        return text

    def ends(self):
        """Read to the close, if there is one, and answer it."""
        with contextlib.suppress(EOFError):
            while self.frame()[0] != CLOSE:
                pass
            self.send(frame(CLOSE))
            self.rest()

    def goes(self):
        """Read to the end: the frames, and the time to reconnect."""
        texts = []
        while True:
            opcode, payload = self.frame()
            if opcode == TEXT:
                texts.append(json.loads(payload))
            elif opcode == CLOSE:
                break
        self.send(frame(CLOSE, payload[:2]))
        assert self.rest() == b""
        assert close_code(payload) == 1012
        return texts, moment(payload[2:].decode())


class EventReader(Raw):
    """A reader of events, which has the head of its stream.  HTTP/1.0 has no chunks, and `goes` reads none."""

    def __init__(self, port, path="/rooms/main/events", version="1.0", **headers):
        super().__init__(port)
        lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self.send("\r\n".join([f"GET {path} HTTP/{version}", "Host: localhost", *lines, "", ""]).encode())
        assert self.head()[0] == 200

    def goes(self):
        """Read to the end: the frames, and the time to reconnect."""
        parser = EventParser()
        parser.feed(self.rest())
        first, last = parser.retries
        assert first == 2000
        return [event.json for event in parser.events], last / 1000
