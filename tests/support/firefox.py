"""Firefox as Debian has it, driven by WebDriver BiDi (W3C).

Playwright calls a command of BiDi that this version of Firefox lacks.
"""

import contextlib
import itertools
import json
import os
import signal
import subprocess

from support.needs import need
from support.servers import LONG, Lines, environment
from websockets.sync.client import connect

PREFERENCES = {"network.proxy.type": 1, "network.proxy.http": "127.0.0.1", "network.proxy.http_port": 9}
"""A proxy that nobody serves, through which everything would go that is not of this machine."""


class Firefox:
    """A tab in a browser of its own; a context manager. `folder` becomes the profile, `errors` what pages logged."""

    def __init__(self, folder):
        self._folder = folder
        self._ids = itertools.count(1)
        self.errors = []

    def __enter__(self):
        command = [need("firefox-esr"), "--headless", "--remote-debugging-port=0", "--profile", self._folder]
        self._folder.mkdir()
        lines = [f"user_pref({json.dumps(name)}, {json.dumps(value)});" for name, value in PREFERENCES.items()]
        for name in ("ssl", "socks"):
            lines += [line.replace("proxy.http", f"proxy.{name}") for line in lines[1:3]]
        (self._folder / "user.js").write_text("\n".join(lines))
        with contextlib.ExitStack() as stack:
            self._process = subprocess.Popen(
                command,
                env=environment(MOZ_CRASHREPORTER_DISABLE="1", HOME=str(self._folder)),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            output = Lines(self._process.stderr)
            stack.callback(self._end, output)
            address = output.wait(r"^WebDriver BiDi listening on (ws://.*)$")[0][1]
            self._socket = stack.enter_context(connect(f"{address}/session", max_size=None, proxy=None))
            self.call("session.new", capabilities={})
            self.call("session.subscribe", events=["log.entryAdded"])
            self._tab = self.call("browsingContext.getTree")["contexts"][0]["context"]
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *_):
        self._exit.close()

    def _end(self, output):
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(LONG)
        output.close()

    def call(self, method, **params):
        """Call a method of the protocol, and return its result."""
        own = next(self._ids)
        self._socket.send(json.dumps({"id": own, "method": method, "params": params}))
        while True:
            said = json.loads(self._socket.recv(LONG))
            if said.get("method") == "log.entryAdded" and said["params"]["level"] == "error":
                self.errors.append(said["params"]["text"])
            elif said.get("id") == own:
                assert said["type"] == "success", said
                return said["result"]

    def open(self, url):
        """Open a page, and wait until it is loaded."""
        self.call("browsingContext.navigate", context=self._tab, url=url, wait="complete")

    def wait(self, condition):
        """Wait until an expression is true, whenever the page changes."""
        script = f"""new Promise((resolve, reject) => {{
            const look = () => ({condition}) && resolve(observer.disconnect());
            const observer = new MutationObserver(look);
            observer.observe(document, {{ subtree: true, childList: true, characterData: true, attributes: true }});
            setTimeout(() => reject(new Error(document.body.innerText)), {LONG // 2 * 1000});
            look();
        }})"""
        done = self.call("script.evaluate", expression=script, target={"context": self._tab}, awaitPromise=True)
        assert done["type"] == "success", done

    def type(self, text):
        """Type a text where the focus is."""
        keys = [{"type": kind, "value": key} for key in text for kind in ("keyDown", "keyUp")]
        self.call("input.performActions", context=self._tab, actions=[{"type": "key", "id": "keys", "actions": keys}])

    def click(self, role, name):
        """Click an element, found by its role and its name."""
        locator = {"type": "accessibility", "value": {"role": role, "name": name}}
        (node,) = self.call("browsingContext.locateNodes", context=self._tab, locator=locator)["nodes"]
        origin = {"type": "element", "element": {"sharedId": node["sharedId"]}}
        moves = [{"type": "pointerMove", "x": 0, "y": 0, "origin": origin}]
        moves += [{"type": kind, "button": 0} for kind in ("pointerDown", "pointerUp")]
        actions = [{"type": "pointer", "id": "mouse", "actions": moves}]
        self.call("input.performActions", context=self._tab, actions=actions)
