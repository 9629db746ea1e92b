"""A real browser: Debian's Chromium, headless, driven by Playwright.

One browser serves all tests of a worker. Each visit has a profile of its own, as the browser of another person has.
The policy of chatd's pages allows no `wait_for_function`: wait for what people see, or for a message of the console.
"""

import asyncio
import contextlib
import http.server
import re
import threading

import pytest
from support.needs import need
from support.servers import LONG

try:
    from playwright.sync_api import expect, sync_playwright
except ImportError:  # it needs libstdc++, which a machine without a browser may lack
    expect = sync_playwright = None

FLAGS = (
    "--disable-gpu",
    "--disable-quic",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
)
UNLIKE_PEOPLE = ("--disable-back-forward-cache",)
"""Playwright's flags without which the browser is more like those of people."""
OUTAGE = re.compile(r"WebSocket connection to |Failed to load resource: (net::|.* a status of 503 )")
"""Reports of the browser itself while a server cannot be reached or sends its clients elsewhere."""

PATIENCE = 20_000
"""Milliseconds after which a page that does not show what it should is a fault."""

if expect is not None:
    expect.set_options(timeout=PATIENCE)


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


@pytest.fixture(scope="session")
def browser():
    """The browser of this worker, and the event loop by which Playwright drives it.

    Playwright leaves its loop marked as the running one, with which no other test of the worker could run its own.
    """
    path = need("chromium")
    with sync_playwright() as playwright:
        loop = asyncio.get_running_loop()
        with playwright.chromium.launch(
            executable_path=path, args=FLAGS, ignore_default_args=UNLIKE_PEOPLE, timeout=LONG * 1000
        ) as chromium:
            asyncio._set_running_loop(None)
            yield chromium, loop
            asyncio._set_running_loop(loop)


class Visits:
    """Opens pages. `errors` has what the pages and the browser reported of them, without outages."""

    def __init__(self, browser):
        self._browser = browser
        self._contexts = []
        self.errors = []

    def __call__(self, url=None, **options):
        """Return a page in a new profile. Options are those of Playwright's `new_context`."""
        context = self._browser.new_context(**options)
        self._contexts.append(context)
        context.set_default_timeout(PATIENCE)
        context.on("console", self._report)
        context.on("weberror", lambda failure: self.errors.append(str(failure.error)))
        page = context.new_page()
        if url is not None:
            page.goto(url)
        return page

    def _report(self, message):
        if message.type == "error" and not OUTAGE.match(message.text):
            self.errors.append(f"{message.location['url']}: {message.text}")

    def close(self):
        """Close all pages."""
        for context in self._contexts:
            # Chromium rarely does not answer, and Playwright would wait without end.  The browser ends what is left.
            with contextlib.suppress(TimeoutError):
                context._sync(asyncio.wait_for(context._impl_obj.close(None), PATIENCE / 1000))


@pytest.fixture
def visit(browser):
    """Opens pages, as Visits does, that must report no error, such as a violation of their policy."""
    chromium, loop = browser
    asyncio._set_running_loop(loop)
    visits = Visits(chromium)
    yield visits
    visits.close()
    asyncio._set_running_loop(None)
    assert not visits.errors, visits.errors
