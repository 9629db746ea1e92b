"""How the page and the instructions reach a browser: sign-in, looks, proxies, and browsers that lack something."""

import json
import re
from urllib.parse import parse_qs, urlsplit

from support.browser import expect, site
from support.firefox import Firefox
from support.people import Person, room_url
from support.redises import Proxy, free_port
from support.servers import LONG, Server, certificate_for, numbered
from support.tokens import SECRET, token
from websockets.sync.client import connect


def test_instructions_in_a_browser_without_modules(tmp_path, visit):
    """A browser that lacks modules, or all scripts, gets the instructions."""
    with Server(tmp_path) as server:
        url = f"http://127.0.0.1:{server.port}/"
        page = visit()
        page.add_init_script("delete HTMLScriptElement.prototype.noModule")
        page.goto(f"{url}rooms/a", wait_until="commit")
        page.wait_for_url(f"{url}about")
        plain = visit(java_script_enabled=False)
        plain.goto(url, wait_until="commit")
        plain.wait_for_url(f"{url}about")
        for one in (page, plain):
            expect(one.get_by_role("heading")).to_have_text("A chat room")
            expect(one.locator("body")).to_contain_text(f"ws://127.0.0.1:{server.port}/")


def test_instructions_behind_a_tls_proxy(tmp_path, visit):
    """The instructions name a wss: URL where the browser came by https:."""
    certificate_for(tmp_path)
    with Server(tmp_path) as server, Proxy(server.port, tls=tmp_path) as proxy:
        page = visit(f"https://127.0.0.1:{proxy.port}/about", ignore_https_errors=True)
        expect(page.locator("body")).to_contain_text(f"wss://127.0.0.1:{proxy.port}/")


def test_page_behind_a_tls_proxy(tmp_path, visit):
    """The page connects by wss: where the browser came by https:."""
    certificate_for(tmp_path)
    with Server(tmp_path) as server, Proxy(server.port, tls=tmp_path) as proxy:
        sockets = []
        page = visit(ignore_https_errors=True)
        page.on("websocket", lambda socket: sockets.append(socket.url))
        page.goto(f"https://127.0.0.1:{proxy.port}/rooms/a")
        ann = Person(page).introduce("ann")
        ann.write("secret")
        ann.shows("secret")
        assert {urlsplit(url).scheme for url in sockets} == {"wss"}


def test_looks_of_a_team(tmp_path, visit):
    """The title and the stylesheet are those of the operator."""
    (tmp_path / "team.css").write_text("body { background: rgb(1, 2, 3) }")
    with Server(tmp_path, "--title=Team <chat>", "--stylesheet=team.css") as server:
        page = visit(f"http://127.0.0.1:{server.port}/")
        expect(page.get_by_role("heading", name="Team <chat>", level=1)).to_be_visible()
        assert "Team <chat>" in page.title()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(1, 2, 3)"


def test_token_in_the_fragment(tmp_path, visit):
    """It signs in, leaves the address bar, survives a reload, and its claim is the name."""
    (tmp_path / "jwt.key").write_bytes(SECRET)
    with Server(tmp_path, "--jwt-key=jwt.key") as server:
        url = room_url(server.port)
        page = visit(f"{url}#token={token('<b>ann')}")
        assert page.url == url
        ann = Person(page).online()
        ann.write("hi")
        ann.shows("hi")
        expect(ann.articles.locator(".name")).to_have_text("<b>ann")
        page.reload()
        ann.online()
        ann.shows("hi")
        page.go_back(wait_until="commit")
        assert "token" not in page.url


def test_sign_in_at_the_application(tmp_path, visit):
    """The page links to the login URL, also when a token is no longer valid. The unsent message is sent afterwards."""
    keys = SECRET, SECRET[::-1]
    for number, key in enumerate(keys):
        (tmp_path / f"{number}.key").write_bytes(key)
    listen = f"tcp:{free_port()}:interface=127.0.0.1"
    with site({"/": ("text/html", b"")}) as application:
        login = f"--login-url={application}login?app=chat"
        with Server(tmp_path, "--jwt-key=0.key", login, listen=listen) as server:
            url = room_url(server.port)
            page = visit(url)
            page.get_by_role("link", name="Sign in").click()
            page.wait_for_url(f"{application}login?*")
            assert parse_qs(urlsplit(page.url).query) == {"app": ["chat"], "return_to": [url]}
            page.goto(f"{url}#token={token()}")
            ann = Person(page).online()
            ann.write("hi")
            ann.shows("hi")
        ann.offline()
        ann.write("kept")
        with Server(tmp_path, "--jwt-key=1.key", login, listen=listen) as server:
            again = page.get_by_role("link", name="Sign in again")
            expect(again).to_have_attribute("href", re.compile("return_to"))
            expect(ann.pending).to_have_text(["kept"])
            page.goto(f"{url}#token={token(secret=keys[1])}")
            ann.online()
            ann.shows("hi", "kept")
            expect(again).to_be_hidden()
    assert all("401" in error for error in visit.errors), visit.errors  # the browser reports them by itself
    visit.errors.clear()


def test_firefox(tmp_path):
    """People chat in Firefox too."""
    with Server(tmp_path) as server, Firefox(tmp_path / "profile") as firefox, connect(f"{server.url}rooms/a") as bob:
        bob.recv(LONG)
        firefox.open(room_url(server.port))
        firefox.click("textbox", "Your name")
        firefox.type("ann\ue007")
        firefox.wait("document.querySelector('[role=status]').textContent === 'Online'")
        firefox.click("textbox", "Message")
        firefox.type("hi\ue007")
        assert numbered(json.loads(bob.recv(LONG))) == [(1, "ann", "hi")]
        bob.send('{"username":"bob","message":"hello"}')
        firefox.wait(
            "[...document.querySelectorAll('article .text')].map((one) => one.textContent).join() === 'hi,hello'"
        )
        assert firefox.errors == []
