"""Check everything that a server sends, in any test, against the documents in `schemas/`.

`install` watches the places that send frames and HTTP answers: the WebSocket connection, the event stream and the
HTTP request.  It reports everything that the AsyncAPI or the OpenAPI document does not describe, down to a single
field or header.  In this process a report fails the test.  A real server is run by this file in place of twistd's own
script, and a report ends it.
"""

import functools
import gzip
import json
import os
import pathlib
import re
import sys
import traceback

import jsonschema_rs

SCHEMAS = pathlib.Path(__file__).resolve().parents[2] / "schemas"
BASE = "chatd:/"
STATUS = 99
"""The exit status of a server that sent something undocumented."""

_documents = {path.name: json.loads(path.read_text("utf-8")) for path in SCHEMAS.glob("*.json")}
_registry = jsonschema_rs.Registry(
    [(BASE + name, document) for name, document in _documents.items()], draft=jsonschema_rs.Draft202012
)
_openapi = _documents["openapi.json"]
_routes = [
    (
        re.compile(re.sub(r"\{\w+\}", "[^/]+", path.replace("{name}", "[a-z0-9][a-z0-9_-]{0,63}"))),
        methods,
    )
    for path, methods in _openapi["paths"].items()
]


class Undocumented(AssertionError):
    """Something that the documents do not describe."""


@functools.cache
def _validator(place):
    """Return the validator of what a pointer into the documents names."""
    return jsonschema_rs.validator_for({"$ref": BASE + place}, registry=_registry)


def check_delivery(document):
    """Check what is posted to a webhook."""
    _check("openapi.json#/webhooks/messages/post/requestBody/content/application~1json/schema", document)


_frames = {
    message["name"]: message["payload"]["$ref"].removeprefix("#")
    for message in _documents["asyncapi.json"]["components"]["messages"].values()
    if message["payload"]["$ref"].startswith("#")
}
"""The server's frames, by their type."""


_own = {}
"""The fields that operators' schemas have in this process, which the documents in `schemas/` do not know."""


def _without_own(document):
    """Return a frame or a page without the fields of an operator's own, and with short texts."""
    if not _own or not isinstance(document, dict) or "data" not in document:
        return document
    data = document["data"]
    if isinstance(data, list):
        return document | {"data": [_usual(one) for one in data]}
    return document | {"data": _usual(data)}


def _usual(data):
    if not isinstance(data, dict) or "timestamp" not in data:
        return data
    usual = {name: value for name, value in data.items() if name not in _own}
    return usual | {"username": data["username"][:30], "message": data["message"][:500]}


def _check(place, document):
    for error in _validator(place).iter_errors(document):
        raise Undocumented(f"{place}: {error.message}: {json.dumps(document)[:500]}")


@functools.lru_cache(maxsize=4096)
def check_text(text):
    """Judge the JSON of one frame."""
    document = json.loads(text)
    kind = document.get("type")
    if kind not in _frames:
        raise Undocumented(f"a frame of the type {kind!r}: {text[:500]}")
    _check(f"asyncapi.json#{_frames[kind]}", _without_own(document))


@functools.lru_cache(maxsize=4096)
def check_stream(data):
    """Judge whole WebSocket frames, or what begins a connection: an HTTP answer and whole frames."""
    if data.startswith(b"HTTP/1.1 "):
        head, _, data = data.partition(b"\r\n\r\n")
        status, headers = read_head(head)
        body, data = (b"", data) if status == 101 else (data, b"")
        check_answer("GET", "/", status, headers, body)
    while data:
        size, begin = data[1], 2
        if size > 125:
            begin = 4 if size == 126 else 10
            size = int.from_bytes(data[2:begin])
        if data[0] == 0x81:
            check_text(data[begin : begin + size])
        data = data[begin + size :]


def read_head(head):
    """Return the status and the headers of an HTTP answer."""
    first, *lines = head.decode("latin-1").split("\r\n")
    return int(first.split(" ")[1]), [tuple(line.split(": ", 1)) for line in lines]


def check_answer(method, path, status, headers, body):
    """Judge one HTTP answer; the path may have a query."""
    path = path.partition("?")[0]
    found = next((methods for pattern, methods in _routes if pattern.fullmatch(path)), None)
    if found is None:
        responses = _openapi["x-other-paths"]
    else:
        operation = found.get(method.lower()) if method.isupper() else None
        responses = found["x-other-methods"] if operation is None else operation["responses"]
    what = f"{method} {path}: {status}"
    if str(status) not in responses:
        raise Undocumented(what)
    place = responses[str(status)]["$ref"].removeprefix("#/components/responses/")
    response = _openapi["components"]["responses"][place]
    _check_headers(f"{what} ({place})", response, headers)
    given = {name.lower(): value for name, value in headers}
    kind = given.get("content-type", "").partition(";")[0]
    if not body:
        return
    if given.get("content-encoding") == "gzip":
        body = gzip.decompress(body)
    if kind not in response.get("content", {}):
        raise Undocumented(f"{what}: content of the type {kind!r}")
    document = json.loads(body) if kind.endswith("json") else body.decode()
    pointer = kind.replace("~", "~0").replace("/", "~1")
    _check(f"openapi.json#/components/responses/{place}/content/{pointer}/schema", _without_own(document))


def check_lines(data):
    """Judge whole lines of an export."""
    if data and not data.endswith(b"\n"):
        raise Undocumented(f"a part of a line: {data[-500:]}")
    for line in data.splitlines():
        _check(
            "openapi.json#/components/responses/Export/content/application~1x-ndjson/schema",
            _without_own(json.loads(line)),
        )


def _check_headers(what, response, headers):
    shared = _openapi["components"]["headers"]
    known = {
        name.lower(): shared[header["$ref"].rpartition("/")[2]] if "$ref" in header else header
        for name, header in response.get("headers", {}).items()
    }
    for name, value in headers:
        if name.lower() not in known:
            raise Undocumented(f"{what}: the header {name}: {value}")
        schema = known[name.lower()]["schema"]
        if "pattern" in schema and not re.search(schema["pattern"], value):
            raise Undocumented(f"{what}: the header {name} is no {schema['pattern']}: {value}")
    given = {name.lower() for name, _ in headers}
    for name, header in known.items():
        if header.get("required") and name not in given:
            raise Undocumented(f"{what}: no header {name}")


def install(report):
    """Watch what leaves this process; `report` is called with what was undocumented."""
    from chatd.transport import frames, http, websocket

    def watching(check):
        def checked(*args):
            try:
                check(*args)
            except Undocumented as error:
                report(error)
                raise

        return checked

    streamed = {"text/event-stream": watching(check_event), "application/x-ndjson": watching(check_lines)}
    _watch_schemas(frames.Vocabulary)
    _watch_connections(websocket.WebSocketConnection, watching(check_stream))
    _watch_requests(http.ChatSite.requestFactory, watching(check_answer), streamed)
    _watch_channels(http.ChatSite.protocol, watching(check_answer))


def _watch_schemas(vocabulary):
    """Learn which fields operators' schemas have."""
    use = vocabulary.use

    @functools.wraps(use)
    def used(self, message, max_bytes):
        _own.update(dict.fromkeys(message.schema["properties"].keys() - {"username", "message", "label", "replaces"}))
        return use(self, message, max_bytes)

    vocabulary.use = used


def _watch_connections(connection, check):
    """See what a WebSocket connection is to write."""
    for name in ("write", "send_frame"):
        setattr(connection, name, _before(getattr(connection, name), check))


def _before(method, check):
    @functools.wraps(method)
    def checked(self, data, *args, **named):
        check(data)
        return method(self, data, *args, **named)

    return checked


def _watch_requests(request, check, checks):
    """See what is answered to an HTTP request, when it is whole, or begins to stream."""
    write, finish = request.write, request.finish

    def streams(self):
        (kind,) = self.responseHeaders.getRawHeaders("content-type") or [""]
        return checks.get(kind)

    def judge(self, body):
        given = self.responseHeaders.getAllRawHeaders()
        headers = [(name.decode(), value.decode()) for name, values in given for value in values]
        check(self.method.decode("latin-1"), self.uri.decode("latin-1"), self.code, headers, body)

    def written(self, data):
        if not self.startedWriting:
            self.watched = b""
            if streams(self):
                judge(self, b"")
        if streams(self):
            streams(self)(data)
        else:
            self.watched += data
        return write(self, data)

    def finished(self):
        if not streams(self) and not getattr(self, "of_a_double", False):
            judge(self, getattr(self, "watched", b"") if self.method != b"HEAD" else b"")
        return finish(self)

    request.write, request.finish = written, finished


def _watch_channels(channel, check):
    """See what is answered to a request that is not read to its end."""
    refuse = channel._refuse

    def refused(self, *args, **named):
        transport = self.transport
        self.transport = Tap(transport, lambda data: check("POST", _refused_path(data), *parts(data)))
        try:
            refuse(self, *args, **named)
        finally:
            self.transport = transport

    channel._refuse = refused


def _refused_path(data):
    """Return a path that has such an answer; only the admin port asks for a token before it reads a request."""
    return "/drain" if data.startswith(b"HTTP/1.1 401 ") else "/rooms/main/messages"


def parts(data):
    """Return the status, the headers and the body of a whole HTTP answer."""
    head, _, body = data.partition(b"\r\n\r\n")
    return *read_head(head), body


class Tap:
    """A transport that shows what is written to it."""

    def __init__(self, transport, see):
        self._transport = transport
        self._see = see

    def __getattr__(self, name):
        return getattr(self._transport, name)

    def write(self, data):
        self._see(data)
        self._transport.write(data)


_EVENT = re.compile(rb"(?:event: ([a-z]+)\n(?:id: ([^\n]+)\n)?data: ([^\n]+)|retry: [0-9]+|:)\n\n")


@functools.lru_cache(maxsize=4096)
def check_event(data):
    """Judge whole Server-Sent Events: each is a documented frame under its own name and id, or a time, or a comment."""
    while data:
        match = _EVENT.match(data)
        if not match:
            raise Undocumented(f"no event: {data[:500]}")
        kind, number, text = match.groups()
        if text is not None:
            check_text(text)
            document = json.loads(text)
            named = None if number is None else number.decode()
            if kind.decode() not in _events or document["type"] != kind.decode() or not _is_id_of(document, named):
                raise Undocumented(f"an event that is not what it says: {match[0][:500]}")
        data = data[match.end() :]


def _is_id_of(document, named):
    """Return whether an event may have this id; in a stream of many rooms it has the ids of all of them."""
    if "room" not in document or "id" not in document:
        return document.get("id") == named
    epoch, _, number = document["id"].partition("-")
    return epoch in named and number in re.split("[,-]", named)


_events = _openapi["components"]["responses"]["Events"]["content"]["text/event-stream"]["x-events"]


def die(error):
    """Print an undocumented frame or answer, and end the process."""
    traceback.print_exception(error)
    sys.stderr.flush()
    os._exit(STATUS)


if __name__ == "__main__":
    install(die)
    from twisted.scripts.twistd import run

    sys.argv[0] = "twistd"
    run()
