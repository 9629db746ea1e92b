"""The guide docs/embedding.md and its example, a helpdesk: people in browsers, webhooks, a bot and nginx."""

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from support.browser import expect
from support.redises import free_port
from support.servers import LONG, ROOT, Lines, Server, certificate_for, environment, need

from chatd.webhooks.signature import parse_secrets, sign

GUIDE = (ROOT / "docs" / "embedding.md").read_text("utf-8")
EXAMPLE = ROOT / "docs" / "examples" / "helpdesk"
DELIVERED = r'"POST /webhook HTTP/1.1" 204'


def blocks():
    """Yield the kind, the name and the code of each block of the guide."""
    for marker, code in re.findall(r"(?:^<!-- ([^\n]*) -->\n)?^```\w*\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL):
        kind, _, name = marker.partition(": ")
        yield kind, name, code


def block(kind, name):
    (code,) = [code for one, other, code in blocks() if (one, other) == (kind, name)]
    return code


class Helpdesk:
    """The example on free ports, started as the guide starts it; a context manager."""

    def __init__(self, folder):
        self.folder = folder / "desk"
        self.port, self.chat, self.admin = (free_port() for _ in range(3))
        self.url = f"http://localhost:{self.port}/"
        for name in ("docs", ".venv"):
            (folder / name).symlink_to(ROOT / name)
        self._start(["sh", "-euc", block("run", "start")], folder)

    def _start(self, command, folder):
        ports = {"PORT": self.port, "CHAT_PORT": self.chat, "ADMIN_PORT": self.admin}
        self._process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment(**{name: str(port) for name, port in ports.items()}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.log = Lines(self._process.stdout)

    def __enter__(self):
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _wait(self):
        for pattern in ("^the helpdesk is at ", "ready, with the log ", "this node delivers"):
            self.log.wait(pattern)

    def restart(self):
        """Press Ctrl-C, which ends both programs, and start them again in their folder."""
        os.killpg(self._process.pid, signal.SIGINT)
        self._process.wait(LONG)
        self.log.close()
        self._start([EXAMPLE / "start"], self.folder)
        self._wait()

    def __exit__(self, *_):
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(LONG)
        self.log.close()

    def local(self, text):
        """Return a text with the ports of this helpdesk."""
        for port, own in ((8000, self.port), (8085, self.chat), (8086, self.admin)):
            text = text.replace(f":{port}", f":{own}")
        return text

    def start_page(self, name):
        """Return the start page of an account, after a new login."""
        browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        with browser.open(f"{self.url}login", f"name={name}&password={name}-1".encode()) as page:
            return page.read().decode()

    def wait_for_page(self, name, text):
        """Wait for requests to the application until the start page of an account has a text."""
        requests = 0
        while text not in self.start_page(name):
            requests += 1
            self.log.wait(r'"POST /(webhook|seen) HTTP/1.1" 204', requests)

    def deliver(self, webhook_id, body, *, secret=None, age=0):
        """Post a delivery as chatd did some seconds ago, and return the status."""
        keys = parse_secrets(secret or (self.folder / "webhook.key").read_text("ascii"))
        sent = int(time.time()) - age
        signature = sign(keys, webhook_id, sent, body)
        headers = {"webhook-id": webhook_id, "webhook-timestamp": str(sent), "webhook-signature": signature}
        return status(urllib.request.Request(f"{self.url}webhook", body, headers))


def status(request):
    """Send a request, and return the status of the answer."""
    try:
        with urllib.request.urlopen(request, timeout=LONG) as response:
            return response.status
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


@pytest.fixture
def desk(tmp_path):
    with Helpdesk(tmp_path) as desk:
        yield desk


def person(visit, name, url, room="help", **options):
    """Log a person in, in a browser of their own, and open a room."""
    page = visit(url, **options)
    page.get_by_label("Name").fill(name)
    page.get_by_label("Password").fill(f"{name}-1")
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("heading")).to_have_text(f"Hello, {name}")
    page.goto(f"{url}room/{room}")
    expect(page.locator("#state")).to_have_text("online")
    return page


def shows(page, *texts):
    """Wait until a page shows these messages."""
    expect(page.locator("#messages span")).to_have_text(texts)


def write(page, text):
    page.locator("[name=text]").fill(text)
    page.keyboard.press("Enter")


def message_at(page, place):
    """Return a message as the page shows it."""
    return page.locator("#messages > li").nth(place)


def press(page, label, place):
    """Press a button beside a message."""
    message_at(page, place).get_by_role("button", name=label).click()


def buttons(page, place):
    return message_at(page, place).get_by_role("button").all_text_contents()


def test_people_in_browsers(desk, visit):
    """A customer and an agent chat, edit, remove and moderate. A third one sees how many messages are new."""
    ann, bob = (person(visit, name, desk.url) for name in ("ann", "bob"))
    for page in (ann, bob):
        expect(page.locator("#people")).to_have_text("ann, bob")

    attack = "<img src=x onerror=\"document.body.textContent = 'owned'\">"
    write(ann, attack)
    shows(bob, attack)
    write(bob, "hi")
    for page in (ann, bob):
        shows(page, attack, "hi")
        assert page.locator("#messages b").all_text_contents() == ["ann", "bob"]
    assert buttons(ann, 0) == ["Edit", "Remove"]
    assert buttons(ann, 1) == []
    assert buttons(bob, 0) == ["Remove", "Mute"]

    press(ann, "Edit", 0)
    write(ann, "hello")
    shows(bob, "hello", "hi")
    press(ann, "Remove", 0)
    for page in (ann, bob):
        shows(page, "[removed]", "hi")
    assert buttons(ann, 0) == []

    write(ann, "spam")
    shows(bob, "[removed]", "hi", "spam")
    press(bob, "Remove", 2)
    shows(ann, "[removed]", "hi", "[removed]")
    write(bob, "no spam please")
    shows(ann, "[removed]", "hi", "[removed]", "no spam please")
    write(ann, "sorry")
    shows(bob, "[removed]", "hi", "[removed]", "no spam please", "sorry")
    desk.wait_for_page("cy", "help</a>: 3 new")
    desk.wait_for_page("bob", "help</a>: 0 new")

    press(bob, "Mute", 4)
    desk.log.wait('"POST /mute HTTP/1.1" 204')
    write(ann, "why?")
    refused = ann.locator("#outbox > li")
    expect(refused).to_contain_text("why? (")
    refused.get_by_role("button").click()
    expect(refused).to_have_count(0)


def test_page_outlives_a_restart(desk, visit):
    """A page reconnects with a new token, and what was typed meanwhile is stored once."""
    ann = person(visit, "ann", desk.url)
    write(ann, "before")
    shows(ann, "before")
    desk.restart()
    write(ann, "after")
    shows(ann, "before", "after")
    expect(ann.locator("#state")).to_have_text("online")
    expect(ann.locator("#outbox > li")).to_have_count(0)
    assert ann.url == f"{desk.url}room/help"


def test_rooms_of_customers_and_agents(desk, visit):
    """An agent uses both rooms. A customer gets neither the page nor the messages of the other one."""
    bob = person(visit, "bob", desk.url, "staff")
    write(bob, "for agents")
    shows(bob, "for agents")
    desk.wait_for_page("bob", "staff</a>: 0 new")
    assert "staff" not in desk.start_page("cy")
    login = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
    login.open(f"{desk.url}login", b"name=cy&password=cy-1").close()
    for method, path in (("GET", "room/staff"), ("POST", "mute")):
        data = b"ann" if method == "POST" else None
        with pytest.raises(urllib.error.HTTPError, match="403") as refused:
            login.open(f"{desk.url}{path}", data)
        refused.value.close()
    assert status(urllib.request.Request(f"{desk.url}token", b"")) == 401
    assert status(urllib.request.Request(f"{desk.url}login", b"name=cy&password=")) == 403
    foreign = {"Sec-Fetch-Site": "cross-site"}
    assert status(urllib.request.Request(f"{desk.url}login", b"name=cy&password=cy-1", foreign)) == 403


def message(number, **fields):
    return {"id": f"k7Q2xe-{number}", "data": {"username": "ann", "message": "hi"}} | fields


def test_receiver_counts_once(desk):
    """Repeated deliveries change nothing, removed messages do not count, and a start replaces the room."""

    def deliver(*messages, **fields):
        body = json.dumps({"type": "messages", "room": "help", "messages": messages} | fields).encode()
        return desk.deliver(f"help:{messages[0]['id']}:9", body)

    assert deliver(message(1), message(2), start=True) == 204
    assert deliver(message(2), message(3, replaces="k7Q2xe-1"), message(4)) == 204
    assert deliver(message(2), message(3, replaces="k7Q2xe-1"), message(4)) == 204
    assert "help</a>: 3 new" in desk.start_page("cy")
    assert "help</a>: 0 new" in desk.start_page("ann")
    assert deliver(message(5, replaces="k7Q2xe-1", removed=True)) == 204
    assert "help</a>: 2 new" in desk.start_page("cy")
    assert deliver(message(1) | {"id": "newone-1"}, start=True) == 204
    assert "help</a>: 1 new" in desk.start_page("cy")
    assert desk.deliver("help:1:1", b'{"type":"another"}') == 204
    assert desk.deliver("help:1:1", b"{}", secret="whsec_" + "A" * 32) == 401
    assert desk.deliver("help:1:1", b'{"type":"another"}', age=900) == 401
    assert status(urllib.request.Request(f"{desk.url}webhook", b"{}")) == 401


def test_commands_of_the_guide(desk, tmp_path):
    """Each check prints what the guide shows. The test waits for a delivery where a person waits for a second."""
    need("curl")
    names = ["refused", "token", "mute", "count", "bot"]
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    steps = "".join(f"echo '# {name}'\n{block('run', name)}" for name in names)
    script = f'sleep() {{ read -r _ <"{gate}"; }}\n{desk.local(steps)}'
    shell = subprocess.Popen(
        ["sh", "-euc", script], cwd=desk.folder, env=environment(), stdout=subprocess.PIPE, text=True
    )
    opened = os.open(gate, os.O_RDWR)
    try:
        for deliveries in range(1, steps.count("\nsleep 1\n") + 1):
            desk.log.wait(DELIVERED, deliveries)
            os.write(opened, b"\n")
        printed, _ = shell.communicate(timeout=LONG)
    finally:
        os.close(opened)
        shell.kill()
        shell.wait(LONG)
    assert shell.returncode == 0, printed
    printed = re.sub(r"[0-9A-Za-z]{6}-(\d+)", r"k7Q2xe-\1", printed)
    assert printed == "".join(f"# {name}\n{block('output', name)}" for name in names)


def test_token_in_node(desk):
    program = f"""
        import {{ makeToken }} from "{EXAMPLE}/token.mjs";
        process.stdout.write(makeToken("dee", {{ read: ["help"] }}));
    """
    command = [need("node"), "--input-type=module", "-e", program]
    made = subprocess.run(command, cwd=desk.folder, capture_output=True, text=True, timeout=LONG, check=True)
    headers = {"Authorization": f"Bearer {made.stdout}"}
    for room, expected in (("help", 200), ("staff", 403)):
        url = f"http://127.0.0.1:{desk.chat}/rooms/{room}/messages"
        assert status(urllib.request.Request(url, headers=headers)) == expected


def test_blocks_are_run_or_part_of_a_file():
    """Each block of code stands in a file of the example, or is run by a test of this module."""
    found = [*blocks()]
    assert len(found) > 20
    source = pathlib.Path(__file__).read_text("utf-8")
    for kind, name, code in found:
        if kind == "file":
            assert code in (EXAMPLE / name).read_text("utf-8"), code
        else:
            assert kind in ("run", "output"), code
            assert f'"{name}"' in source
    assert {name for kind, name, _ in found if kind == "run"} >= {name for kind, name, _ in found if kind == "output"}


def settings(name):
    """Return the settings of a block for systemd, as (key, value)."""
    return [line.split("=", 1) for line in block("run", name).splitlines() if "=" in line]


@contextlib.contextmanager
def process(command, folder, *, ready=None, **changes):
    """A process of a test, and its output, with a line that it prints when it is ready."""
    running = subprocess.Popen(
        command,
        cwd=folder,
        env=environment(**changes),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = Lines(running.stdout)
    try:
        if ready:
            lines.wait(ready)
        yield lines
    finally:
        running.terminate()
        running.wait(LONG)
        lines.close()


NGINX = """
user root;
daemon off;
pid nginx.pid;
error_log stderr notice;
events {}
http {
    access_log off;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    include site.conf;
}
"""
"""What Debian has around a site. Started by root, the workers keep root, because the folder of a test is private."""


def test_site_behind_nginx(tmp_path, visit):
    """The site of the guide: nginx with TLS, chatd with the options of its unit, and the application."""
    nginx = need("nginx")
    need("curl")
    certificate_for(tmp_path)
    ports = {number: free_port() for number in ("443", "8000", "8085")}
    site = f"https://127.0.0.1:{ports['443']}"

    def local(text):
        text = text.replace("/etc/ssl/desk.example/fullchain.pem", f"{tmp_path}/cert.pem")
        text = text.replace("/etc/ssl/desk.example/privkey.pem", f"{tmp_path}/key.pem")
        text = text.replace("listen 443", f"listen 127.0.0.1:{ports['443']}").replace("https://desk.example", site)
        return re.sub(r"(127\.0\.0\.1:)(8000|8085)\b", lambda found: found[1] + str(ports[found[2]]), text)

    chatd = {}
    for key, value in settings("unit"):
        if key == "LoadCredential":
            assert re.fullmatch(r"([a-z.]+):/etc/desk/\1", value)
        else:
            chatd |= dict(one.split("=", 1) for one in local(value).replace("%d", str(tmp_path)).split())
    (tmp_path / "jwt.key").write_text("a secret of at least 32 bytes, for tests\n")
    (tmp_path / "webhook.key").write_text("whsec_" + "A" * 43 + "=\n")
    (tmp_path / "site.conf").write_text(local((EXAMPLE / "nginx.conf").read_text("utf-8")))
    (tmp_path / "nginx.conf").write_text(NGINX)
    address, _, port = local(settings("socket")[-1][1]).partition(":")
    listen = f"tcp:{port}:interface={address}"
    program = block("run", "application") + f"exec {sys.executable} {EXAMPLE}/app.py"
    with contextlib.ExitStack() as stack:
        own = {"PORT": str(ports["8000"]), "CHAT_SERVER": f"http://127.0.0.1:{ports['8085']}"}
        application = process(["sh", "-euc", program], tmp_path, ready="^the helpdesk is at", **own)
        requests = stack.enter_context(application)
        stack.enter_context(Server(tmp_path, listen=listen, env=environment(**chatd)))
        command = [nginx, "-e", "stderr", "-p", tmp_path, "-c", "nginx.conf"]
        stack.enter_context(process(command, tmp_path, ready="start worker processes"))
        checks = subprocess.run(
            ["sh", "-euc", local(block("run", "site"))],
            env=environment(CURL_CA_BUNDLE=str(tmp_path / "cert.pem")),
            capture_output=True,
            text=True,
            timeout=LONG,
            check=True,
        )
        assert checks.stdout == block("output", "site")
        ann, bob = (person(visit, name, f"{site}/", ignore_https_errors=True) for name in ("ann", "bob"))
        write(ann, "!hours")
        for page in (ann, bob):
            shows(page, "!hours", "We are here from 9 to 17.")
        (cookie,) = ann.context.cookies()
        assert (cookie["secure"], cookie["httpOnly"], cookie["sameSite"]) == (True, True, "Lax")
        requests.wait(DELIVERED)
