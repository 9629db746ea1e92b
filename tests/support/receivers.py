"""An application that receives webhooks, verifies them as Standard Webhooks says, and misbehaves as a test asks."""

import base64
import contextlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from support.documented import check_delivery
from support.servers import LONG

SECRET, OTHER = (f"whsec_{base64.b64encode(bytes([number] * 32)).decode()}" for number in (1, 2))


class Receiver(ThreadingHTTPServer):
    """A server on a free port, or on the port of an earlier one.

    `replies` are the next answers: each is a status, a status with headers, a function of the handler that returns one,
    or a word.  `slow` is 204 when the test releases it, `hang` is none, `cut` ends in the body of the answer, `drop`
    before any answer.  After the replies the answer is 204.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, *replies, port=0, secret=SECRET):
        from standardwebhooks import Webhook

        super().__init__(("127.0.0.1", port), ReceiverHandler)
        self.url = f"http://127.0.0.1:{self.server_port}/hook?secret=1"
        self.replies = [*replies]
        self.webhook = Webhook(secret)
        self.deliveries = []
        """Verified deliveries: (id, document, whether it was answered with 2xx)."""
        self.headers = []
        self.changed = threading.Condition()
        self.released = threading.Event()
        """Ends every `hang` and `slow`."""
        self.connections = 0
        """The number of connections so far."""

    def process_request(self, request, client_address):
        self.connections += 1
        super().process_request(request, client_address)

    def note(self, webhook_id, document, taken):
        with self.changed:
            self.deliveries.append((webhook_id, document, taken))
            self.changed.notify_all()

    def wait(self, enough, what="deliveries"):
        """Wait until `enough`, a function of this object, holds."""
        with self.changed:
            assert self.changed.wait_for(lambda: enough(self), LONG), f"{what}: {self.deliveries}"

    @property
    def ids(self):
        return [webhook_id for webhook_id, _, _ in self.deliveries]

    def texts(self, room):
        """Return the texts of a room as an application that ignores what it has already sees them."""
        last, texts = 0, []
        for _, document, taken in [*self.deliveries]:
            if document["room"] != room or not taken:
                continue
            for message in document["messages"]:
                number = int(message["id"].partition("-")[2])
                if number > last:
                    assert number == last + 1 or document.get("missed"), f"{number} follows {last}"
                    last = number
                    texts.append(message["data"]["message"])
        return texts

    def check_ids(self):
        """Check that no delivery was repeated after it was answered with 2xx."""
        taken = set()
        for webhook_id, _, answered in self.deliveries:
            assert webhook_id not in taken, f"{webhook_id} was taken before"
            if answered:
                taken.add(webhook_id)

    def handle_error(self, *_):
        """Print no traceback of a connection that the server has dropped."""


class ReceiverHandler(BaseHTTPRequestHandler):
    """Verifies a delivery, and answers as the next reply says."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        body = self.rfile.read(int(self.headers["content-length"]))
        document = server.webhook.verify(body, dict(self.headers))
        check_delivery(document)
        with server.changed:
            server.headers.append(dict(self.headers))
            server.changed.notify_all()
            reply = server.replies.pop(0) if server.replies else 204
        status, headers = reply if isinstance(reply, tuple) else (reply, {})
        if callable(status):
            status = status(self)
        if status == "slow":
            server.released.wait(LONG)
            status = 204
        if status in ("hang", "drop"):
            server.note(self.headers["webhook-id"], document, taken=False)
            if status == "hang":
                server.released.wait(LONG)
            self.close_connection = True
            return
        cut, status = status == "cut", 200 if status == "cut" else status
        content = headers.pop("body", b"" if status == 204 else b"fine")
        server.note(self.headers["webhook-id"], document, taken=200 <= status < 300)
        with contextlib.suppress(OSError):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if status != 204:
                self.send_header("Content-Length", str(len(content) + cut))
            self.end_headers()
            self.wfile.write(content)
            self.wfile.flush()
        self.close_connection |= cut

    def log_message(self, *_):
        pass
