"""HTTP and Server-Sent Events of real servers, with third-party clients, beside members over WebSocket."""

import asyncio
import contextlib
import http.client
import json
import socket
import ssl
from urllib.parse import urljoin

import aiohttp
import pytest
from support.loops import asynchronous
from support.servers import LONG, Raw, Server, certificate_for, numbered, post, stored, upgrade
from support.web_doubles import EventParser

SEED = [(1, "Alice", "Hello!"), (2, "Bob", "Hi Alice!")]


def base(server):
    return f"http://127.0.0.1:{server.port}"


class Reader:
    """Follows a room over Server-Sent Events or WebSocket, and reconnects with its last id."""

    def __init__(self, session, kind):
        self.session = session
        self.kind = kind
        self.seen = []
        """The messages as (number, username, message), each once."""
        self.last = None
        self.histories = []
        self._grown = asyncio.Event()

    def _take(self, frame):
        self.last = frame["id"]
        if frame["type"] == "history":
            self.histories.append(frame)
        for entry in numbered(frame):
            assert entry[0] == len(self.seen) + 1, "in order, each once"
            self.seen.append(entry)
        self._grown.set()

    async def follow(self, server, room="main"):
        """Read until the server ends it; that it was killed is no fault of ours."""
        with contextlib.suppress(aiohttp.ClientError, ConnectionError):
            await {"events": self._events, "websocket": self._websocket}[self.kind](server, room)

    async def _events(self, server, room):
        parser = EventParser()
        headers = {"Last-Event-ID": self.last} if self.last else {}
        async with self.session.get(f"{base(server)}/rooms/{room}/events", headers=headers) as answer:
            assert answer.status == 200
            async for data in answer.content.iter_any():
                for event in parser.feed(data):
                    assert event.id == event.json["id"]
                    self._take(event.json)

    async def _websocket(self, server, room):
        query = f"?last_event_id={self.last}" if self.last else ""
        async with self.session.ws_connect(f"{base(server)}/rooms/{room}{query}") as websocket:
            async for message in websocket:
                self._take(message.json())

    async def until(self, count):
        """Wait until so many messages were seen."""
        while len(self.seen) < count:
            self._grown.clear()
            await self._grown.wait()


@contextlib.asynccontextmanager
async def sessions():
    """Open a session of aiohttp without a limit of connections."""
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None, sock_read=LONG)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        yield session


@contextlib.asynccontextmanager
async def following(server, *readers):
    """Run readers that follow a server's room meanwhile."""
    tasks = [asyncio.create_task(reader.follow(server)) for reader in readers]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
    for result in done:
        if isinstance(result, Exception):
            raise result


async def post_over_http(session, server, username, message, key=None):
    """Post, and answer the status and the document."""
    headers = {"Idempotency-Key": f'"{key}"'} if key else {}
    document = {"username": username, "message": message}
    async with session.post(f"{base(server)}/rooms/main/messages", json=document, headers=headers) as answer:
        return answer.status, await answer.json(content_type=None)


# One order

EACH = 60


async def post_each_over_http(session, server, name):
    """Post one after the other; answers the id of each message."""
    ids = {}
    for number in range(EACH):
        status, document = await post_over_http(session, server, name, f"{number}", f"{name}-{number}")
        assert status == 201
        ids[name, f"{number}"] = document["id"]
    return ids


async def post_all_over_websocket(session, server, name):
    """Post all at once; answers the id of each message, as it is acknowledged."""
    ids = {}
    async with session.ws_connect(f"{base(server)}/") as websocket:
        for number in range(EACH):
            await websocket.send_json({"username": name, "message": f"{number}", "label": f"{name}-{number}"})
        while len(ids) < EACH:
            frame = await websocket.receive_json()
            if frame["type"] == "ack":
                ids[name, frame["label"].rpartition("-")[2]] = frame["id"]
    return ids


async def all_pages(session, server):
    """Return all messages, by the links of the pages."""
    entries, url = [], f"{base(server)}/rooms/main/messages?limit=7"
    while url:
        async with session.get(url) as answer:
            assert answer.status == 200
            entries = numbered(await answer.json()) + entries
            url = answer.links["prev"]["url"] if "prev" in answer.links else None
    return entries


@asynchronous
async def test_all_transports_have_one_order(tmp_path):
    async with sessions() as session:
        readers = [Reader(session, kind) for kind in ("events", "websocket") * 3]
        with Server(tmp_path) as server:
            async with following(server, *readers):
                for reader in readers:
                    await reader.until(len(SEED))
                posting = [post_each_over_http(session, server, name) for name in ("h1", "h2", "h3")]
                posting += [post_all_over_websocket(session, server, name) for name in ("w1", "w2")]
                acknowledged = dict(item for ids in await asyncio.gather(*posting) for item in ids.items())
                for reader in readers:
                    await reader.until(len(SEED) + 5 * EACH)
            paged = await all_pages(session, server)
            server.stop()
    epoch, rows = stored(tmp_path / "chatd.sqlite")
    log = [row[:3] for row in rows]
    assert paged == log
    assert all(reader.seen == log for reader in readers)
    assert {(username, message): f"{epoch}-{number}" for number, username, message in log[2:]} == acknowledged
    for name in ("h1", "h2", "h3", "w1", "w2"):
        assert [message for _, username, message in log if username == name] == [f"{n}" for n in range(EACH)]


KILLS = 4


@asynchronous
async def test_resume_and_retry_after_a_kill(tmp_path):
    """Nothing is lost, and nothing is stored twice."""
    async with sessions() as session:
        readers = [Reader(session, kind) for kind in ("events", "websocket") * 2]
        acknowledged = {}
        posters = {name: [f"{number}" for number in range(200)] for name in ("ann", "bob", "cy")}
        duplicates = 0

        async def keep_posting(server, name):
            """Post the remaining messages, each with its key, until the server has stopped."""
            with contextlib.suppress(aiohttp.ClientError, ConnectionError):
                while posters[name]:
                    key = f"{name}-{posters[name][0]}"
                    status, document = await post_over_http(session, server, name, posters[name][0], key)
                    assert status in (200, 201)
                    acknowledged[key] = document["id"]
                    posters[name].pop(0)

        for kill in range(KILLS + 1):
            with Server(tmp_path) as server:
                for key, message in acknowledged.items():  # what was acknowledged is known after the kill
                    name, _, text = key.partition("-")
                    if int(text) % 25 == 0:
                        status, document = await post_over_http(session, server, name, text, key)
                        assert (status, document["id"], document["duplicate"]) == (200, message, True)
                        duplicates += 1
                async with following(server, *readers) as tasks:
                    posting = [asyncio.create_task(keep_posting(server, name)) for name in posters]
                    if kill < KILLS:
                        await readers[kill % len(readers)].until(len(SEED) + 50 * (kill + 1))
                        server.kill()
                    await asyncio.gather(*posting)
                    if kill == KILLS:
                        for reader in readers:
                            await reader.until(len(SEED) + 600)
                    else:
                        await asyncio.gather(*tasks)
    epoch, rows = stored(tmp_path / "chatd.sqlite")
    log = [row[:3] for row in rows]
    assert len(log) == len(SEED) + 600
    assert {f"{username}-{message}": f"{epoch}-{number}" for number, username, message in log[2:]} == acknowledged
    for reader in readers:
        assert reader.seen == log
        assert len(reader.histories) == KILLS + 1
        assert [history.get("resumed") for history in reader.histories] == [None] + [True] * KILLS
    assert duplicates > KILLS


# By hand, with the standard library


@pytest.fixture(scope="module")
def common(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("common")) as server:
        yield server
        server.stop()


@pytest.fixture
def connection(common):
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", common.port, timeout=LONG)) as connection:
        yield connection


def ask(connection, method, path, body=None, **headers):
    """Return the answer that the client of the standard library gets."""
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, fields)
    answer = connection.getresponse()
    data = answer.read()
    kind = answer.headers.get_content_type()
    return answer, json.loads(data) if kind.endswith("json") and data else data.decode()


def say(connection, room, message="hi", **headers):
    body = json.dumps({"username": "ann", "message": message})
    return ask(connection, "POST", f"/rooms/{room}/messages", body, Content_Type="application/json", **headers)


def test_post_read_and_page_on_one_connection(connection):
    sock = None
    for number in range(1, 6):
        answer, document = say(connection, "pages", f"{number}")
        assert answer.status == 201
        _, message = ask(connection, "GET", urljoin("/rooms/pages/messages", answer.headers["Location"]))
        assert (message["id"], message["data"]["message"]) == (document["id"], f"{number}")
        sock = sock or connection.sock
    answer, page = ask(connection, "GET", "/rooms/pages/messages?limit=2")
    assert [entry["message"] for entry in page["data"]] == ["4", "5"]
    assert page["more"] is True
    answer, nothing = ask(connection, "HEAD", "/rooms/pages/messages?limit=2")
    assert (answer.status, nothing) == (200, "")
    assert ask(connection, "GET", "/rooms/pages/messages/nonsense")[0].status == 404
    assert ask(connection, "OPTIONS", "/rooms/pages/messages")[0].status == 204
    assert ask(connection, "GET", "/healthz")[1] == "ok\n"
    assert connection.sock is sock, "all on one connection"


@pytest.mark.parametrize("times", range(5))
def test_half_closed_client_gets_its_answer(common, times):
    """A client may finish sending with its request, as `nc -N` does, and gets the answer to its post."""
    body = json.dumps({"username": "ann", "message": f"{times}"}).encode()
    head = (
        b"POST /rooms/half/messages HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    )
    with Raw(common.port) as client:
        client.socket.sendall(head % len(body) + body)
        client.socket.shutdown(socket.SHUT_WR)
        assert client.rest().startswith(b"HTTP/1.1 201 Created\r\n")


def test_room_has_a_page(connection):
    answer, page = ask(connection, "GET", "/rooms/team-1")
    assert answer.status == 200
    assert ' data-room="team-1" ' in page


def test_instructions_name_the_port(connection, common):
    answer, page = ask(connection, "GET", "/about")
    assert answer.status == 200
    assert common.url in page
    with Raw(common.port) as client:
        assert client.join("/rooms/team-1")["data"] == []


@pytest.mark.parametrize("size", [17 << 10, 1 << 20])
def test_body_too_large(common, size):
    """It is refused, and the server keeps running."""
    head = f"POST /rooms/main/messages HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {size}"
    with Raw(common.port) as client:
        client.send(f"{head}\r\nExpect: 100-continue\r\n\r\n".encode())
        assert client.head()[0] == 413
        client.rest()
    with Raw(common.port) as client:
        client.send(f"{head}\r\n\r\n".encode() + b" " * size)
        assert client.head()[0] == 413


@asynchronous
async def test_body_without_a_length_is_refused(common):
    async def chunks():
        yield b"{}"

    async with sessions() as session:
        headers = {"Content-Type": "application/json"}
        async with session.post(f"{base(common)}/rooms/main/messages", data=chunks(), headers=headers) as answer:
            assert answer.status == 411
            assert answer.content_type == "application/problem+json"


@asynchronous
async def test_forms_are_refused(common):
    async with sessions() as session:
        form = aiohttp.FormData({"username": "ann", "message": "hi"})
        parts = aiohttp.MultipartWriter("form-data")
        parts.append("hi")
        for data in (form, parts):
            async with session.post(f"{base(common)}/rooms/main/messages", data=data) as answer:
                assert answer.status == 415
                assert answer.content_type == "application/problem+json"


class Events(Raw):
    """A reader of events over a plain HTTP connection."""

    def __init__(self, port, room, *, small=False, **headers):
        if small:
            self.socket = socket.socket()
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            self.socket.settimeout(LONG)
            self.socket.connect(("127.0.0.1", port))
            self._data = bytearray()
        else:
            super().__init__(port)
        fields = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        # In HTTP/1.0 the stream is plain, and the end of the connection its end.
        self.send(f"GET /rooms/{room}/events HTTP/1.0\r\n{fields}\r\n".encode())
        self.parser = EventParser()
        status, _ = self.head()
        assert status == 200

    def next(self):
        """Return the next event."""
        while not self.parser.events:
            assert self._data or self._more(), "the stream has ended"
            self.parser.feed(bytes(self._data))
            self._data.clear()
        return self.parser.events.pop(0)

    def end(self):
        """Read to the end; answers the events that still came."""
        self.parser.feed(self.rest())
        return self.parser.events


def test_stream_resumes_at_the_next_server(tmp_path):
    """A drain ends the stream in order."""
    with Server(tmp_path) as server, Raw(server.port) as member:
        member.join()
        with Events(server.port, "main") as reader:
            assert numbered(reader.next().json) == SEED
            member.send(b"".join(post("ann", f"{number}") for number in range(300)))
            for _ in range(300):
                member.json()
            server.terminate()
            events = reader.end()
            assert [numbered(event.json)[0][0] for event in events] == [*range(3, 303)]
            assert reader.parser.retries[0] == 2000
            assert 0 <= reader.parser.retries[1] < 1000
            assert len(reader.parser.retries) == 2
            last = reader.parser.last
        assert member.closed() == 1012
        server.stopped()
    with Server(tmp_path) as server:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=LONG)) as connection:
            say(connection, "main", "after")
        with Events(server.port, "main", Last_Event_ID=last) as reader:
            history = reader.next().json
            assert history["resumed"] is True
            assert numbered(history) == [(303, "ann", "after")]


def test_stalled_stream_gets_every_message(tmp_path):
    count = 9000
    with Server(tmp_path, "--store=memory:") as server, Raw(server.port) as ann:
        ann.join()
        with Events(server.port, "main", small=True) as reader:
            reader.next()
            for begin in range(0, count, 250):
                ann.send(b"".join(post("ann", f"{number} " + "x" * 480) for number in range(begin, begin + 250)))
                for _ in range(250):
                    ann.json()
            reader.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            assert [numbered(reader.next().json)[0][0] for _ in range(count)] == [*range(3, count + 3)]
            assert reader.parser.retries == [2000]


def test_readers_that_come_and_go_leave_nothing_behind(tmp_path):
    count = 100
    with Server(tmp_path, "--drain=3600") as server:
        for number in range(count):
            with Events(server.port, f"room-{number % 3}") as reader:
                reader.next()
        server.log.wait(r"\d left room-\d$", count)
        server.stop()


def test_rate_by_the_address_of_a_trusted_proxy(tmp_path):
    with (
        Server(tmp_path, "--rate=1:3", "--proxy-hops=1") as server,
        contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=LONG)) as connection,
    ):
        for _ in range(4):
            answer, document = say(connection, "main", X_Forwarded_For="9.9.9.9, 192.0.2.1")
            assert answer.status in (201, 429)
        while answer.status != 429:  # on a machine so slow that a token came meanwhile
            answer, document = say(connection, "main", X_Forwarded_For="9.9.9.9, 192.0.2.1")
        assert document["code"] == "RATE_LIMITED"
        assert answer.headers["Retry-After"] == "1"
        assert say(connection, "main", X_Forwarded_For="192.0.2.1, 192.0.2.2")[0].status == 201


def test_http_over_tls(tmp_path):
    """Posts, events and a body that is too large behave as on plain TCP."""
    arguments, trust = certificate_for(tmp_path)
    with Server(tmp_path, listen=f"ssl:0:interface=127.0.0.1:{arguments}") as server:

        def connect():
            connection = http.client.HTTPSConnection("127.0.0.1", server.port, timeout=LONG, context=trust)
            return contextlib.closing(connection)

        with connect() as connection:
            assert say(connection, "main")[0].status == 201
            assert "wss://" in ask(connection, "GET", "/about")[1]
            connection.request("GET", "/rooms/main/events")
            stream = connection.getresponse()
            parser = EventParser()
            while not parser.events:
                parser.feed(stream.read1())
            assert numbered(parser.events[0].json) == [*SEED, (3, "ann", "hi")]
            for _ in range(3):
                with connect() as other, contextlib.suppress(ConnectionError, ssl.SSLError):
                    # It is refused at its head, and goes on coming.
                    ask(other, "POST", "/rooms/main/messages", b" " * (1 << 20), Content_Type="application/json")
            with connect() as other:
                assert say(other, "main", "still there")[0].status == 201
            server.terminate()
            while data := stream.read1():
                parser.feed(data)
            assert numbered(parser.events[1].json) == [(4, "ann", "still there")]
            assert len(parser.retries) == 2
        server.stopped()


# By the same port


@pytest.mark.parametrize("offered", [["http/1.1"], ["h2", "http/1.1"]])
def test_over_tls_a_browser_joins_which_offers_its_protocols(tmp_path, offered):
    arguments, trust = certificate_for(tmp_path)
    trust.set_alpn_protocols(offered)
    with Server(tmp_path, listen=f"ssl:0:interface=127.0.0.1:{arguments}") as server, Raw(server.port) as client:
        client.socket = trust.wrap_socket(client.socket, server_hostname="127.0.0.1")
        assert client.socket.selected_alpn_protocol() == "http/1.1"
        client.join()


def secured(client, trust):
    """Return a raw client over TLS."""
    client.socket = trust.wrap_socket(client.socket, server_hostname="127.0.0.1")
    return client


@contextlib.contextmanager
def kept(tmp_path, transport):
    """Lend a server and a raw client whose connection has answered one request."""
    with contextlib.ExitStack() as stack:
        if transport == "tcp":
            server = stack.enter_context(Server(tmp_path))
            client, other = (stack.enter_context(Raw(server.port)) for _ in range(2))
        else:
            arguments, trust = certificate_for(tmp_path)
            server = stack.enter_context(Server(tmp_path, listen=f"ssl:0:interface=127.0.0.1:{arguments}"))
            client, other = (secured(stack.enter_context(Raw(server.port)), trust) for _ in range(2))
        client.send(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert client.head()[0] == 200
        assert client.take(3) == b"ok\n"
        yield server, client, other


TRANSPORTS = pytest.mark.parametrize("transport", ["tcp", "ssl"])


@TRANSPORTS
@pytest.mark.parametrize("pieces", [1, 7, 1000])
def test_upgrade_after_a_request(tmp_path, pieces, transport):
    # As those of proxies that keep them do.
    with kept(tmp_path, transport) as (server, client, other):
        request = upgrade("/rooms/team?username=ann")
        for begin in range(0, len(request), pieces):
            client.send(request[begin : begin + pieces])
        assert client.head()[0] == 101
        assert client.json()["type"] == "history"
        other.join("/rooms/team")
        other.send(post("bob", "hi"))
        assert client.json() == other.json()
        client.send(post("ann", "hello"))
        assert client.json() == other.json()
        server.terminate()
        assert client.closed() == other.closed() == 1012
        server.stopped()


@TRANSPORTS
@pytest.mark.parametrize("more", [0, 100], ids=["", "and more requests than are read at once"])
def test_upgrade_behind_unread_answers(tmp_path, more, transport):
    """The upgrade waits for its client to read the answers before it."""
    with Server(tmp_path) as server, Raw(server.port) as writer:
        writer.join()
        for number in range(200):
            writer.send(post("bob", f"{number} " + "x" * 480))
        for _ in range(200):
            writer.json()
        server.stop()
    with kept(tmp_path, transport) as (server, client, other):
        other.join()
        count = 150  # of pages that are on the disk
        page = b"GET /rooms/main/messages?limit=100&after=%b-0 HTTP/1.1\r\nHost: localhost\r\nX: %b\r\n\r\n" % (
            server.epoch.encode(),
            b"x" * more,
        )
        client.send(page * count + upgrade("/rooms/main") + post("ann", "behind"))
        for _ in range(count):
            status, head = client.head()
            assert status == 200
            size = int(head.lower().partition("content-length: ")[2].split("\r\n")[0])
            assert len(json.loads(client.take(size))["data"]) == 100
        assert client.head()[0] == 101
        assert len(client.json()["data"]) == 100
        assert numbered(client.json())[0][1:] == numbered(other.json())[0][1:] == ("ann", "behind")
        for number in range(3):
            client.send(post("ann", f"{number}"))
            assert numbered(client.json())[0][1:] == ("ann", f"{number}")
