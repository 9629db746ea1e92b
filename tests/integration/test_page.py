"""The page as people use it: they write, read, scroll, edit and leave for a while."""

import re

import pytest
from support.browser import expect
from support.people import Person, join, post, room_url
from support.servers import Server
from support.tokens import SECRET, token

HIDE = """({ hidden }) => {
    Object.defineProperty(document, "hidden", { configurable: true, value: hidden });
    Object.defineProperty(document, "visibilityState", { configurable: true, value: hidden ? "hidden" : "visible" });
    document.dispatchEvent(new Event("visibilitychange"));
}"""


@pytest.fixture
def server(tmp_path):
    with Server(tmp_path) as server:
        yield server


def test_two_people_chat(server, visit):
    """Each person sees the messages of both, who is in the room, and who is typing."""
    ann, bob = (join(visit, room_url(server.port), name) for name in ("ann", "bob"))
    for person in (ann, bob):
        expect(person.people).to_have_text(["ann", "bob"])
    ann.write("hello", "are you there?")
    bob.shows("hello", "are you there?")
    bob.box.press_sequentially("yes")
    expect(ann.page.get_by_text(re.compile("bob.? is typing"))).to_be_visible()
    bob.box.press("Enter")
    for person in (ann, bob):
        person.shows("hello", "are you there?", "yes")
    expect(ann.page.locator("article.own")).to_have_count(2)
    bob.page.close()
    expect(ann.people).to_have_text(["ann"])


def test_name_and_draft_are_kept(server, visit):
    """The page asks for a name once, keeps what is typed over a reload, and lets one change the name."""
    ann = join(visit, room_url(server.port), "ann")
    ann.box.fill("not finished")
    ann.page.reload()
    ann.online()
    expect(ann.box).to_have_value("not finished")
    ann.page.get_by_role("button", name="Change name").click()
    ann.introduce("anna")
    expect(ann.people).to_have_text(["anna"])
    ann.box.press("Enter")
    ann.shows("not finished")
    expect(ann.articles.locator(".name")).to_have_text("anna")


def test_names_that_are_not_possible(server, visit):
    """The page states why, and asks again."""
    page = visit(room_url(server.port))
    box = page.get_by_role("textbox", name="Your name")
    for name in ("", " ", "x" * 31):
        box.fill(name)
        box.press("Enter")
        expect(box).to_have_attribute("aria-invalid", "true")
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    Person(page).introduce("\U0001f642" * 30)


def test_rooms(server, visit):
    """One goes from room to room without a reload, and sees what is new in the others."""
    ann = join(visit, room_url(server.port), "ann")
    ann.write("in a")
    ann.shows("in a")
    field = ann.page.get_by_role("textbox", name="Open another room")
    for name in ("<img src=x onerror=owned()>", "../a", "A"):
        field.fill(name)
        field.press("Enter")
        expect(field).to_have_attribute("aria-invalid", "true")
    field.fill("b")
    field.press("Enter")
    ann.online()
    assert ann.page.url == room_url(server.port, "b")
    ann.write("in b")
    ann.shows("in b")
    post(server.port, ("bob", "news"), ("bob", "more news"))
    rooms = ann.page.get_by_role("navigation", name="Rooms")
    link = rooms.get_by_role("link", name=re.compile("a 2 new"))
    expect(link).to_be_visible()
    link.click()
    ann.shows("in a", "news", "more news")
    expect(ann.article("more news")).to_be_in_viewport()
    expect(rooms.get_by_role("link", name=re.compile(r"\ba$"))).to_have_attribute("aria-current", "page")
    ann.page.go_back()
    ann.shows("in b")
    assert ann.page.url == room_url(server.port, "b")


@pytest.fixture
def private(tmp_path):
    """A server that asks for tokens."""
    (tmp_path / "jwt.key").write_bytes(SECRET)
    with Server(tmp_path, "--jwt-key=jwt.key") as server:
        yield server


def sign_in(server, visit, name, **claims):
    return Person(visit(f"{room_url(server.port)}#token={token(name, **claims)}")).online()


def test_edit_and_remove(private, visit):
    """An author changes a message, which everyone sees in its place, and removes another."""
    ann, bob = (sign_in(private, visit, name) for name in ("ann", "bob"))
    ann.write("helo", "spam")
    bob.shows("helo", "spam")
    ann.act("helo", "Edit")
    expect(ann.box).to_have_value("helo")
    ann.write("hello")
    bob.shows("hello", "spam")
    expect(bob.article("hello")).to_contain_text("edited")
    expect(ann.box).to_have_value("")
    ann.act("spam", "Edit")
    ann.page.keyboard.press("Escape")
    expect(ann.box).to_have_value("")
    ann.act("spam", "Remove")
    ann.page.get_by_role("dialog", name="Remove this message?").get_by_role("button", name="Remove it").click()
    bob.shows("hello", "message removed")
    expect(bob.articles.get_by_role("button", name="Edit")).to_have_count(0)


def test_question_before_a_removal(private, visit):
    """The keyboard answers it: Escape and Enter keep the message, and the focus returns to its button."""
    ann, bob = (sign_in(private, visit, name) for name in ("ann", "bob"))
    ann.write("one", "two")
    bob.shows("one", "two")
    button = ann.article("one").get_by_role("button", name="Remove")
    question = ann.page.get_by_role("dialog", name="Remove this message?")
    for key in ("Escape", "Enter"):
        ann.act("one", "Remove")
        expect(question).to_have_accessible_description(re.compile("erased for everyone"))
        expect(question.get_by_role("button", name="Keep it")).to_be_focused()
        ann.page.keyboard.press(key)
        expect(question).to_be_hidden()
        expect(button).to_be_focused()
    ann.write("three")
    bob.shows("one", "two", "three")
    ann.act("one", "Remove")
    for key in ("Tab", "Enter"):
        ann.page.keyboard.press(key)
    bob.shows("message removed", "two", "three")
    ann.shows("message removed", "two", "three")
    expect(ann.articles.first).to_be_focused()


def test_focus_after_the_message_changed(private, visit):
    """If another tab changed the message during the question, its button is another one, and the focus goes to it."""
    ann, other = (sign_in(private, visit, "ann") for _ in range(2))
    ann.write("helo")
    other.shows("helo")
    ann.act("helo", "Remove")
    other.act("helo", "Edit")
    other.write("hello")
    ann.shows("hello")
    ann.page.keyboard.press("Escape")
    expect(ann.article("hello")).to_be_focused()


def test_message_that_is_refused(private, visit):
    """The reason stands below the message, which stays until one discards it."""
    ann = sign_in(private, visit, "ann", chatd={"post": []})
    bob = sign_in(private, visit, "bob")
    ann.write("may I?")
    refused = ann.article("may I?")
    expect(refused).to_contain_text("Not sent")
    ann.page.reload()
    expect(refused).to_contain_text("Not sent")
    ann.act("may I?", "Retry")
    expect(refused).to_contain_text("Not sent")
    ann.act("may I?", "Discard")
    expect(ann.articles).to_have_count(0)
    bob.shows()


def test_days_links_and_names(server, visit):
    """The list has a heading for each day, links that are safe, and a name for each group."""
    ann = join(visit, room_url(server.port, "main"), "ann")
    ann.write("see https://example.com/a?b=c.", "and www.example.com")
    expect(ann.texts).to_have_count(4)
    headings = ann.page.get_by_role("main").get_by_role("heading")
    expect(headings).to_have_text([re.compile("20.*October 2024|October 20, 2024"), "Today"])
    link = ann.page.get_by_role("link", name="https://example.com/a?b=c")
    expect(link).to_have_attribute("href", "https://example.com/a?b=c")
    expect(link).to_have_attribute("rel", re.compile("noopener"))


def test_new_messages_while_one_reads_above(server, visit):
    """The text that one reads stays in its place, and a button leads to the new messages."""
    post(server.port, *(("bob", f"message {number}\n\n") for number in range(100)))
    ann = join(visit, room_url(server.port), "ann")
    expect(ann.texts.last).to_have_text("message 99")
    expect(ann.texts.last).to_be_in_viewport()
    post(server.port, ("bob", "at the end"))
    expect(ann.texts.last).to_have_text("at the end")
    expect(ann.texts.last).to_be_in_viewport()
    read = ann.article("message 60")
    read.scroll_into_view_if_needed()
    place = read.bounding_box()
    post(server.port, ("bob", "one"), ("cy", "two"), ("bob", "three"))
    button = ann.page.get_by_role("button", name="3 new")
    expect(button).to_be_visible()
    assert read.bounding_box() == place
    button.click()
    expect(ann.texts.last).to_be_in_viewport()
    expect(button).to_be_hidden()


def test_messages_that_came_while_one_was_away(server, visit):
    """A line divides what is new since the tab was hidden."""
    ann = join(visit, room_url(server.port), "ann")
    ann.write("seen")
    ann.shows("seen")
    ann.page.evaluate(HIDE, {"hidden": True})
    post(server.port, ("bob", "unseen"))
    ann.shows("seen", "unseen")
    ann.page.evaluate(HIDE, {"hidden": False})
    expect(ann.article("unseen").get_by_text("New since you looked")).to_be_visible()


def test_older_messages(server, visit):
    """They are loaded as one scrolls up, without an announcement."""
    post(server.port, *(("bob", f"message {number}") for number in range(300)))
    ann = join(visit, room_url(server.port), "ann")
    expect(ann.texts.last).to_have_text("message 299")
    ann.texts.last.hover()
    first = ann.articles.and_(ann.page.locator("[aria-posinset='1']"))
    for _ in range(100):
        ann.page.mouse.wheel(0, -1500)
        ann.page.evaluate("new Promise(requestAnimationFrame)")
        if first.count():
            break
    expect(first.locator(".text")).to_have_text("message 0")
    expect(first).to_have_attribute("aria-setsize", "300")
    expect(ann.page.locator("#announcer")).to_be_empty()
