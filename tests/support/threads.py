"""HTTP servers that run in a thread while a test talks to them."""

import contextlib
import threading

from support.servers import LONG, missing

POLL_SECONDS = 0.01
"""How soon a server notices that it is to stop."""


@contextlib.contextmanager
def serving(server):
    """Serve from a thread until the context ends; the server is a `socketserver` one."""
    thread = threading.Thread(target=server.serve_forever, args=[POLL_SECONDS], daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join(LONG)
        server.server_close()


def wsgi(application):
    """Make a server of a WSGI application on a free port of this machine; it logs nothing."""
    try:
        from werkzeug.serving import WSGIRequestHandler, make_server
    except ImportError as error:
        missing(f"moto is not installed: {error}")

    class Quiet(WSGIRequestHandler):
        def log(self, *_):
            pass

    return make_server("127.0.0.1", 0, application, threaded=True, request_handler=Quiet)
