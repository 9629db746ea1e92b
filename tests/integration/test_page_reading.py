"""How people read and use the page: by keyboard, with a screen reader, in large text, from right to left, at length."""

import json
import re
import sys

import pytest
from support.browser import expect
from support.needs import MODULES, need
from support.people import Person, join, post, room_url
from support.redises import Proxy
from support.servers import LONG, Server

ATTACKS = (
    "<img src=x onerror=owned()>",
    "<script>owned()</script>",
    "'\"><svg onload=owned()>",
    "javascript:owned()",
    'https://x/"onclick=owned()',
    "</title><script>owned()",
    "{{owned()}}${owned()}%3Cb%3E",
)


@pytest.fixture
def server(tmp_path):
    with Server(tmp_path) as server:
        yield server


def violations(page):
    """Return what axe-core finds on a page, when nothing moves."""
    page.evaluate("Promise.allSettled(document.getAnimations().map(({ finished }) => finished))")
    page.evaluate((MODULES / "axe-core" / "axe.min.js").read_text("utf-8"))
    found = page.evaluate("axe.run(document, { resultTypes: ['violations'] })")["violations"]
    return [(one["id"], [node["html"] for node in one["nodes"]]) for one in found]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_accessibility(server, visit, theme):
    """axe-core finds no violation: with each dialog, with messages, offline, and with each panel on a phone."""
    need("axe-core")
    with Proxy(server.port) as proxy:
        page = visit(room_url(proxy.port), color_scheme=theme)
        expect(page.get_by_role("dialog")).to_be_visible()
        assert violations(page) == []
        ann = Person(page).introduce("ann")
        post(server.port, ("bob", "see https://example.com"))
        ann.write("hi")
        expect(ann.texts).to_have_count(2)
        assert violations(page) == []
        page.get_by_role("button", name="Change name").click()
        assert violations(page) == []
        page.keyboard.press("Escape")
        page.locator("#removal").evaluate("(dialog) => dialog.showModal()")
        assert violations(page) == []
        page.keyboard.press("Escape")
        page.set_viewport_size({"width": 390, "height": 780})
        for panel in ("Rooms", "People"):
            page.get_by_role("button", name=re.compile(f"^{panel}")).click()
            assert violations(page) == []
            page.keyboard.press("Escape")
        proxy.refuse()
        proxy.cut()
        ann.offline()
        ann.write("not sent", "x" * 1000)
        expect(ann.pending).to_have_text("not sent")
        assert violations(page) == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_accessibility_of_the_instructions(server, visit, theme):
    """axe-core finds no violation."""
    need("axe-core")
    assert violations(visit(f"http://127.0.0.1:{server.port}/about", color_scheme=theme)) == []


def test_markup_in_every_field(tmp_path, visit):
    """Names, messages and the title are text, whatever is in them."""
    with Server(tmp_path, f"--title={ATTACKS[5]}") as server:
        post(server.port, *((attack[:30], attack) for attack in ATTACKS))
        page = visit()
        page.add_init_script("window.owned = () => { window.isOwned = true }")
        page.goto(room_url(server.port))
        ann = Person(page).introduce(ATTACKS[0][:30])
        ann.shows(*ATTACKS)
        ann.write(*ATTACKS)
        ann.shows(*ATTACKS, *ATTACKS)
        assert page.title().count(ATTACKS[5])
        assert page.evaluate("window.isOwned") is None
        assert page.locator("main :is(img, script, svg)").count() == 0
        assert all(re.match("https?:", link.get_attribute("href")) for link in page.locator("main a").all())


SCROLL = """(limit) => new Promise((resolve, reject) => {
    setTimeout(() => reject(new Error(`${seen.size} messages seen`)), limit * 1000);
    const scroller = document.querySelector("main .scroller");
    const seen = new Set();
    const frames = [];
    const blocked = [];
    new PerformanceObserver((list) => blocked.push(...list.getEntries().map(({ duration }) => duration)))
        .observe({ type: "longtask" });
    let most = 0;
    let last = performance.now();
    const step = (now) => {
        frames.push(now - last);
        last = now;
        const articles = document.querySelectorAll("main article");
        most = Math.max(most, articles.length);
        for (const article of articles) seen.add(article.getAttribute("aria-posinset"));
        if (seen.has("1")) resolve({ seen: seen.size, most, blocked, frames: frames.sort((a, b) => b - a) });
        else {
            scroller.scrollBy(0, -2000);
            requestAnimationFrame(step);
        }
    };
    requestAnimationFrame(step);
})"""
"""Scrolls to the oldest message, and measures the document, the frames and the long tasks on the way."""


def test_ten_thousand_messages(tmp_path, visit):
    """One scrolls through all of them, while the document stays small."""
    texts = [f"message {number} " + "word " * (number % 40) for number in range(1, 10_001)]
    seed = [
        {
            "username": f"user {number // 3 % 7}",
            "message": text,
            "timestamp": f"2026-01-{number // 400 + 1:02}T00:00:00Z",
        }
        for number, text in enumerate(texts)
    ]
    (tmp_path / "seed.json").write_text(json.dumps(seed))
    with Server(tmp_path, "--seed=seed.json") as server:
        ann = join(visit, room_url(server.port, "main"), "ann")
        expect(ann.texts.last).to_have_text(texts[-1].strip())
        result = ann.page.evaluate(SCROLL, LONG)
        sys.stdout.write(f"\n{result['frames'][:10]} {result['blocked']}\n")  # which pytest -s shows
        assert result["most"] <= 400
        assert result["seen"] == 10_000
        expect(ann.texts.first).to_have_text(texts[0].strip())


def test_keyboard_alone(server, visit):
    """F6 goes from region to region, arrows through messages, and Escape back to the text."""
    post(server.port, ("bob", "one"), ("bob", "two"), ("bob", "see https://example.com/x"))
    ann = join(visit, room_url(server.port), "ann")
    ann.shows("one", "two", "see https://example.com/x")
    expect(ann.box).to_be_focused()
    keyboard = ann.page.keyboard
    regions = [
        ann.page.get_by_role("navigation", name="Rooms"),
        ann.articles.last,
        ann.page.get_by_role("complementary", name="People"),
        ann.box,
    ]
    for region in regions:
        keyboard.press("F6")
        expect(region).to_be_focused()
    for region in reversed(regions[:-1]):
        keyboard.press("Shift+F6")
        expect(region).to_be_focused()
    keyboard.press("F6")
    keyboard.press("ArrowUp")
    expect(ann.articles.nth(1)).to_be_focused()
    keyboard.press("Home")
    expect(ann.articles.nth(0)).to_be_focused()
    keyboard.press("End")
    keyboard.press("Tab")
    expect(ann.page.get_by_role("link", name="https://example.com/x")).to_be_focused()
    keyboard.press("Escape")
    expect(ann.articles.last).to_be_focused()
    keyboard.press("Escape")
    expect(ann.box).to_be_focused()
    keyboard.type("typed blind")
    keyboard.press("Shift+Enter")
    keyboard.type("in two lines")
    keyboard.press("Enter")
    expect(ann.texts.last).to_have_text("typed blind in two lines")


def test_panels_on_a_phone(server, visit):
    """Escape closes a panel, and the focus returns to its button."""
    ann = join(visit, room_url(server.port), "ann", viewport={"width": 390, "height": 780})
    for name, role in (("Rooms", "navigation"), ("People", "complementary")):
        button = ann.page.get_by_role("button", name=re.compile(f"^{name}"))
        panel = ann.page.get_by_role(role, name=name)
        expect(panel).to_be_hidden()
        button.press("Enter")
        expect(panel).to_be_focused()
        expect(button).to_have_attribute("aria-expanded", "true")
        ann.page.keyboard.press("Escape")
        expect(panel).to_be_hidden()
        expect(button).to_be_focused()


def test_enter_while_an_input_method_composes(server, visit):
    """Enter accepts the candidate of an input method and sends nothing. The next one sends."""
    ann = join(visit, room_url(server.port), "ann")
    ann.box.focus()
    devtools = ann.page.context.new_cdp_session(ann.page)
    devtools.send("Input.imeSetComposition", {"text": "にほんご", "selectionStart": 4, "selectionEnd": 4})
    enter = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 229}
    devtools.send("Input.dispatchKeyEvent", {"type": "rawKeyDown", **enter})
    devtools.send("Input.insertText", {"text": "日本語"})
    devtools.send("Input.dispatchKeyEvent", {"type": "keyUp", **enter})
    expect(ann.box).to_have_value("日本語")
    ann.page.keyboard.press("Enter")
    ann.shows("日本語")


def test_text_from_right_to_left(server, visit):
    """Each message has the direction of its own text."""
    post(server.port, ("דנה", "שלום לכולם"), ("bob", "hello"))
    ann = join(visit, room_url(server.port), "ann")
    ann.shows("שלום לכולם", "hello")
    directions = [text.evaluate("(one) => getComputedStyle(one).direction") for text in ann.texts.all()]
    assert directions == ["rtl", "ltr"]


@pytest.mark.parametrize("width", [320, 1280])
def test_text_at_twice_its_size(server, visit, width):
    """All controls stay in the window, nothing overlaps, and nothing scrolls sideways."""
    post(server.port, ("bob", "word " * 60), ("bob", "https://example.com/" + "long" * 40))
    page = visit(viewport={"width": width, "height": 720})
    page.add_init_script(
        "document.addEventListener('DOMContentLoaded', () => document.documentElement.style.fontSize = '200%')"
    )
    page.goto(room_url(server.port))
    ann = Person(page).introduce("ann")
    expect(ann.texts).to_have_count(2)
    sideways = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(sideways) == 0
    assert ann.page.locator("main .scroller").evaluate("(one) => one.scrollWidth - one.clientWidth") == 0
    for control in (ann.box, ann.status):
        expect(control).to_be_in_viewport(ratio=1)


def test_reduced_motion(server, visit):
    """Nothing moves for people who ask for that."""
    post(server.port, ("bob", "hello"))
    ann = join(visit, room_url(server.port), "ann", reduced_motion="reduce")
    ann.write("hi")
    ann.shows("hello", "hi")
    assert ann.page.evaluate("document.getAnimations().length") == 0
    moves = """[...document.querySelectorAll("*")].filter((one) => {
        const { transitionDuration, animationName, scrollBehavior } = getComputedStyle(one);
        const still = /^0(\\\\.0+1)?s(, 0s)*$/.test(transitionDuration) && scrollBehavior !== "smooth";
        return !still || animationName !== "none";
    }).map((one) => one.outerHTML)"""
    assert ann.page.evaluate(moves) == []
