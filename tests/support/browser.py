"""A real browser: headless Chromium, driven by the DevTools protocol."""

import contextlib
import copy
import http.server
import itertools
import json
import shutil
import subprocess
import threading
import time

from support.needs import need
from support.servers import LONG, Lines
from websockets.sync.client import connect

FLAGS = (
    "--headless",
    "--no-sandbox",  # which root cannot have
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
)


@contextlib.contextmanager
def site(pages):
    """The URL of a server of pages, which are media types and contents in bytes by their path."""

    class Files(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            kind, body = pages.get(self.path, ("text/plain", b""))
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            """Log nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join(LONG)


class Page:
    """A page in a browser of its own; a context manager. `folder` holds the browser's profile.

    `logged` has what the page logged, each value as JSON has it, and `refused` what the browser itself reported.
    """

    def __init__(self, folder, url):
        self._folder = folder
        self._url = url
        self._ids = itertools.count(1)
        self._session = {}
        self.logged = []
        self.refused = []

    def __enter__(self):
        command = [need("chromium"), *FLAGS, f"--user-data-dir={self._folder}", "about:blank"]
        with contextlib.ExitStack() as stack:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            lines = Lines(self._process.stderr)
            stack.callback(shutil.rmtree, self._folder, ignore_errors=True)
            stack.callback(self._end, lines)
            browser = lines.wait(r"^DevTools listening on (ws://.*)$")[0][1]
            self._socket = stack.enter_context(connect(browser, max_size=None, proxy=None))
            (target,) = [one for one in self.call("Target.getTargets")["targetInfos"] if one["type"] == "page"]
            self._attach(target["targetId"])
            self.load("Page.navigate", url=self._url)
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *_):
        self._exit.close()

    def _end(self, lines):
        self._process.kill()
        self._process.wait(LONG)
        lines.close()

    def _attach(self, target):
        self._session = {}
        self._target = target
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Log", "Runtime", "Page"):
            self.call(f"{domain}.enable")

    def load(self, method, **params):
        """Call a method that loads a page, and wait until it is loaded."""
        self._loaded = False
        self.call(method, **params)
        while not self._loaded:
            self._next(LONG)

    def tab(self):
        """Open the page in another tab of the same browser."""
        tab = copy.copy(self)
        tab._attach(self.call("Target.createTarget", url="about:blank")["targetId"])
        tab.load("Page.navigate", url=self._url)
        return tab

    def close_tab(self):
        """Close this tab, as a person does."""
        self.call("Target.closeTarget", targetId=self._target)

    def call(self, method, **params):
        """Call a method of the DevTools protocol, and return its result."""
        own = next(self._ids)
        self._socket.send(json.dumps({"id": own, "method": method, "params": params} | self._session))
        while True:
            said = self._next(LONG)
            if said.get("id") == own:
                assert "error" not in said, said
                return said["result"]

    def _next(self, seconds):
        """Take the next message, and keep what it says if it is an event."""
        said = json.loads(self._socket.recv(seconds))
        loaded = said.get("method") == "Page.loadEventFired" or (
            said.get("method") == "Page.frameNavigated" and said["params"]["type"] == "BackForwardCacheRestore"
        )
        if loaded and said["sessionId"] == self._session["sessionId"]:
            self._loaded = True
        elif said.get("method") == "Log.entryAdded":
            self.refused.append(said["params"]["entry"]["text"])
        elif said.get("method") == "Runtime.consoleAPICalled":
            (value,) = said["params"]["args"]
            self.logged.append(value.get("value", value.get("objectId")))
        return said

    def run(self, script):
        """Run a script as the page's console does, and return its value, for which it may wait."""
        options = {"replMode": True, "returnByValue": True, "awaitPromise": True}
        done = self.call("Runtime.evaluate", expression=script, **options)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def wait(self, count):
        """Wait until the page has logged so many objects, and return them."""
        end = time.monotonic() + LONG
        while len(self.logged) < count:
            try:
                self._next(max(0.0, end - time.monotonic()))
            except TimeoutError:
                raise AssertionError(f"no {count} values were logged: {self.logged}, {self.refused}") from None
        as_json = "function() { return JSON.stringify(this); }"
        texts = [
            self.call("Runtime.callFunctionOn", objectId=one, functionDeclaration=as_json)["result"]["value"]
            for one in self.logged[:count]
        ]
        return [json.loads(text) for text in texts]
