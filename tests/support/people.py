"""People who chat on the page, each in a browser of their own."""

import json
import re

from support.browser import expect
from support.servers import LONG
from websockets.sync.client import connect


class Person:
    """A person on the page. The elements are found by roles and names, as screen readers find them."""

    def __init__(self, page):
        self.page = page
        self.status = page.get_by_role("status")
        self.box = page.get_by_role("textbox", name="Message")
        self.articles = page.get_by_role("main").get_by_role("article")
        self.texts = self.articles.locator(".text")
        self.people = page.get_by_role("complementary", name="People").get_by_role("listitem")
        self.pending = page.locator("article.pending").locator(".text")

    def introduce(self, name):
        """Give the name that the page asks for, and wait until it is online."""
        box = self.page.get_by_role("textbox", name="Your name")
        box.fill(name)
        box.press("Enter")
        return self.online()

    def online(self):
        expect(self.status).to_have_text("Online")
        return self

    def offline(self):
        expect(self.status).to_have_text(re.compile("Offline|Connecting|Reconnecting"))

    def write(self, *texts):
        for text in texts:
            self.box.fill(text)
            self.box.press("Enter")

    def shows(self, *texts):
        """Wait until exactly these messages are shown, in this order, and none of them is unsent."""
        expect(self.texts).to_have_text(texts)
        expect(self.pending).to_have_count(0)

    def article(self, text):
        return self.articles.filter(has_text=text)

    def act(self, text, button):
        """Press a button of a message."""
        self.article(text).hover()
        self.article(text).get_by_role("button", name=button).click()


def join(visit, url, name, **options):
    """Open the page in a new browser, with the name."""
    return Person(visit(url, **options)).introduce(name)


def room_url(port, room="a"):
    """Return the URL of the page of a room."""
    return f"http://127.0.0.1:{port}/rooms/{room}"


def post(port, *posts, room="a"):
    """Post as other clients do; each post is a username and a text."""
    with connect(f"ws://127.0.0.1:{port}/rooms/{room}") as client:
        client.recv(LONG)
        for username, text in posts:
            client.send(json.dumps({"username": username, "message": text}))
            client.recv(LONG)
