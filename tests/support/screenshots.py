"""Take the pictures of the page in `docs/`: PYTHONPATH=tests .venv/bin/python -m support.screenshots"""

import contextlib
import datetime as dt
import json
import pathlib
import re
import sys
import tempfile

from playwright.sync_api import expect, sync_playwright
from support.browser import FLAGS
from support.needs import need
from support.people import Person, room_url
from support.servers import LONG, ROOT, Server
from support.tokens import SECRET, token
from websockets.sync.client import connect

SIZES = {"phone": (390, 780), "tablet": (768, 900), "desktop": (1200, 750)}
NOW = dt.datetime(2026, 5, 12, 10, 4, tzinfo=dt.UTC)
TALK = (
    (1060, "Jonas", "Release 2.4 is on the staging server. Could somebody try the export?"),
    (1052, "Maya", "Mine works, also with the 40 MB file."),
    (31, "Amira", "Good morning! I am looking at the export of invoices now."),
    (29, "Jonas", "Thanks. The notes are at https://wiki.example/releases/2.4"),
    (28, "Jonas", "Everything below “Known issues” is fixed by now."),
    (22, "Maya", "صباح الخير!"),
    (21, "Maya", "I can take the customers with two currencies. They were broken last time."),
    (12, "Amira", "Invoices are fine. One thing: the totals are rounded before the tax, not after."),
    (9, "Jonas", "Good catch. Does that change any amount?"),
    (7, "Amira", "One cent in 3 of 1,200 invoices."),
    (3, "Maya", "Two currencies work now. We could ship after the rounding is fixed."),
)
"""The messages: the minutes since then, the name and the text."""
EDITED = 3
"""The place of a message that is edited."""


def seed(folder):
    """Write a file with the conversation."""
    entries = [
        {"username": name, "message": text, "timestamp": (NOW - dt.timedelta(minutes=ago)).strftime("%FT%TZ")}
        for ago, name, text in TALK
    ]
    (folder / "seed.json").write_text(json.dumps(entries), "utf-8")


@contextlib.contextmanager
def member(server, name):
    """A member of the room, who is present. The context is a function that sends a frame."""
    headers = {"Authorization": f"Bearer {token(name, chatd={'moderate': ['main']})}"}
    url = f"{server.url}rooms/main?events=presence,typing"
    with connect(url, additional_headers=headers) as client:
        yield lambda **frame: client.send(json.dumps(frame))


def take(browser, server, folder):
    """Take all pictures: each size in both themes."""
    with member(server, "Maya"), member(server, "Jonas") as jonas:
        _, name, text = TALK[EDITED]
        jonas(username=name, message=text.replace("notes", "release notes"), replaces=f"{server.epoch}-{EDITED + 1}")
        for name, (width, height) in SIZES.items():
            for theme in ("light", "dark"):
                page = browser.new_page(
                    viewport={"width": width, "height": height}, color_scheme=theme, locale="en-GB", timezone_id="UTC"
                )
                page.add_init_script("localStorage.setItem('chatd rooms', 'main releases support')")
                page.clock.set_fixed_time(NOW)
                page.goto(f"{room_url(server.port, 'main')}#token={token('Amira')}")
                person = Person(page).online()
                expect(page.locator("#room-list > li")).to_have_count(3)
                expect(person.texts).to_have_count(len(TALK))
                expect(person.articles.nth(EDITED)).to_contain_text("edited")
                person.box.fill("I will fix it before noon")
                jonas(type="typing", username="Jonas")
                expect(page.get_by_text(re.compile("Jonas.? is typing"))).to_be_visible()
                page.screenshot(path=folder / f"page-{name}-{theme}.png")
                page.close()


def main(folder):
    """Take the pictures into a folder."""
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        own = pathlib.Path(name)
        (own / "jwt.key").write_bytes(SECRET)
        seed(own)
        browser = playwright.chromium.launch(executable_path=need("chromium"), args=FLAGS, timeout=LONG * 1000)
        options = ("--jwt-key=jwt.key", "--seed=seed.json", "--title=Team chat")
        with browser, Server(own, *options) as server:
            take(browser, server, folder)


if __name__ == "__main__":
    main(pathlib.Path(*sys.argv[1:]) if sys.argv[1:] else ROOT / "docs")
