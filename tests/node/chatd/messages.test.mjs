// The parts of the message list that need no document: texts, the window, and how messages are set.
import assert from "node:assert/strict";
import { test } from "node:test";
import { announcement, begins, firstUnread, isMessage } from "../../../chatd/static/page/groups.js";
import { News } from "../../../chatd/static/page/news.js";
import { dayOf, formats, nameOf, partsOf } from "../../../chatd/static/page/text.js";
import { around, follow, indexOf, MOST, reserve, search, slide } from "../../../chatd/static/page/window.js";

const links = (text) => partsOf(text).filter(({ href }) => href).map(({ text }) => text);
const at = (time) => new Date(`2026-01-${time}`).getTime();
const message = (n, username = "bob", text = "x", time = "01T12:00:00") => ({
  id: `abcd-${n}`,
  data: { username, message: text, timestamp: new Date(at(time)).toISOString() },
});

test("links end before the punctuation of a sentence", () => {
  for (const [text, ...expected] of [
    ["see https://a.example.", "https://a.example"],
    ["(https://a.example/b)", "https://a.example/b"],
    ["https://a.example/b_(c)", "https://a.example/b_(c)"],
    ["(https://a.example/b_(c)).", "https://a.example/b_(c)"],
    ["<https://a.example/?b=c&d>,", "https://a.example/?b=c&d"],
    ["https://a.example, HTTP://B.example!", "https://a.example", "HTTP://B.example"],
    ["「https://a.example/」。", "https://a.example/"],
    ["xhttps://a.example http:// https://"],
    ["https://[::1]:80/x]", "https://[::1]:80/x"],
  ]) assert.deepEqual(links(text), expected, text);
});

test("parts are the whole text", () => {
  const text = "a https://b.example/c, (d)\n https://e.example";
  assert.equal(partsOf(text).map(({ text }) => text).join(""), text);
  assert.deepEqual(partsOf(""), []);
});

test("only addresses of the web are links", () => {
  for (const text of [
    "javascript:alert(1)",
    "data:text/html,x",
    "ftp://a.example",
    "https://ann:secret@a.example/",
    "https://a.example@b.example",
    `https://a.example/${"b".repeat(5000)}`,
    "https://a b",
    "https://%",
  ]) assert.deepEqual(links(text), text === "https://a b" ? ["https://a"] : [], text);
});

test("an address cannot look like another", () => {
  const [part] = partsOf("https://\u0430pple.com/x");
  assert.deepEqual(part, { text: "https://xn--pple-43d.com/x", href: "https://xn--pple-43d.com/x" });
  assert.deepEqual(links("https://münchen.example/"), ["https://münchen.example/"]);
  assert.deepEqual(links("https://a.example/\u202egpj"), ["https://a.example/"]);
});

test("splitting takes linear time", () => {
  // If it took quadratic time, this would not end.
  for (const one of ["https://", ")", "(", ".", "https://a.b)", "a"]) {
    const text = `https://a.b/${one.repeat(400_000)}`;
    assert.equal(partsOf(text).map(({ text }) => text).join(""), text);
  }
});

test("a name that nobody can see gets a word", () => {
  for (const name of ["", "\u200b\u200d", "\u202e", " ", "\u0301", "\u3164", undefined])
    assert.equal(nameOf(name), "(no name)");
  assert.equal(nameOf("ann\u200b"), "ann\u200b");
});

test("days are those of the reader", () => {
  const { day, time, full } = formats("en", ["de-DE", "en-GB"]);
  const now = at("15T00:30:00");
  assert.equal(day(at("15T00:00:00"), now), "Today");
  assert.equal(day(at("14T23:59:59"), now), "Yesterday");
  assert.equal(day(at("13T23:59:59"), now), "Tuesday 13 January");
  assert.match(day(new Date("2025-01-13T12:00").getTime(), now), /2025/);
  assert.equal(time(at("13T15:04:05")), "15:04");
  assert.match(full(at("13T15:04:05")), /2026/);
  assert.deepEqual([day(NaN, now), time(NaN), full(NaN)], ["", "", ""]);
  assert.equal(dayOf(at("03T00:00:00")), "2026-01-03");
  assert.equal(formats("en").day(now, now), "Today");
});

test("search finds where a test becomes true", () => {
  for (let place = 0; place <= 7; place += 1) assert.equal(search(7, (index) => index >= place), place);
  const messages = [2, 3, 7].map((n) => message(n));
  assert.deepEqual([1, 2, 3, 4, 7, 8].map((n) => indexOf(messages, n)), [0, 0, 1, 2, 2, 3]);
});

test("a new window holds its index", () => {
  assert.deepEqual(around(0, 5), { start: 0, end: 5 });
  assert.deepEqual(around(0, 0), { start: 0, end: 0 });
  for (const index of [0, 1, 60, 500, 999]) {
    const { start, end } = around(index, 1000);
    assert.ok(start <= index && index < end && end <= 1000 && end - start === 100, index);
  }
});

test("the window follows the end", () => {
  assert.deepEqual(follow({ start: 0, end: 100 }, 101), { start: 0, end: 101 });
  assert.deepEqual(follow({ start: 0, end: MOST }, MOST + 5), { start: 5, end: MOST + 5 });
  assert.deepEqual(follow({ start: 0, end: 100 }, 5000), around(5000, 5000));
});

test("the window moves with the reader, and never past what is visible", () => {
  for (const seen of [1, 5, 20, 60, 120, 200])
    for (const total of [10, 150, 1000]) {
      let window = follow({ start: 0, end: total }, total);
      let first = Math.max(total - seen, 0);
      const settle = () => {
        const visible = { first, last: Math.min(first + seen, total) - 1 };
        for (let turn = 0; ; turn += 1) {
          const next = slide(window, total, visible);
          assert.ok(next.start <= visible.first && visible.last < next.end && next.end <= total && next.start >= 0);
          assert.ok(next.end - next.start <= MOST, JSON.stringify([seen, total, next]));
          if (next.start === window.start && next.end === window.end) break;
          assert.ok(turn < 20, "the window comes to rest");
          window = next;
        }
        const space = reserve(visible);
        assert.ok(window.start === 0 || visible.first - window.start > space);
        assert.ok(window.end === total || window.end - 1 - visible.last > space);
      };
      for (; first > 0; first = Math.max(first - 7, 0)) settle();
      for (; first + seen < total; first += 5) settle();
    }
});

test("consecutive messages of one user are a group", () => {
  const one = message(1, "bob", "x", "01T23:50:00");
  assert.deepEqual(begins(one), { day: true, group: true });
  assert.deepEqual(begins(message(2, "bob", "x", "01T23:55:00"), one), { day: false, group: false });
  assert.deepEqual(begins(message(2, "bob", "x", "01T23:55:01"), one), { day: false, group: true });
  assert.deepEqual(begins(message(2, "cat", "x", "01T23:50:00"), one), { day: false, group: true });
  const late = message(1, "bob", "x", "01T23:59:00");
  assert.deepEqual(begins(message(2, "bob", "x", "02T00:00:00"), late), { day: true, group: true });
});

test("unread is the first message of another", () => {
  const messages = [message(1), message(2), message(3, "ann"), message(5)];
  assert.deepEqual([0, 1, 2, 5].map((n) => firstUnread(messages, n, "ann")), [1, 2, 5, undefined]);
});

test("edits and removals are no messages", () => {
  const frames = [{}, { replaces: "abcd-1" }, { type: "remove", id: "abcd-1" }];
  assert.deepEqual(frames.map((frame) => isMessage({ frame })), [true, false, false]);
});

test("many messages are announced as a number", () => {
  const several = (count) => Array.from({ length: count }, (_, n) => message(n, "bob", `m${n}`));
  assert.equal(announcement(several(2)), "bob: m0\nbob: m1");
  assert.equal(announcement(several(4)), "4 new messages");
  assert.equal(announcement([message(1, "bob", "x".repeat(1000))]).length, 306);
});

/** What is new for ann, who has seen some messages; `pass` lets the time of an announcement pass. */
function news(seen) {
  const said = [];
  const timers = [];
  const pass = () => timers.splice(0).forEach((call) => call());
  const later = (_, call) => timers.push(call);
  const list = new News({ username: "ann", announce: (text) => said.push(text), later, seen });
  return { list, said, pass };
}
const log = (count, username) => Array.from({ length: count }, (_, n) => message(n + 1, username));

test("new messages of others are counted and announced, once", () => {
  const { list, said, pass } = news();
  list.restart("abcd-2");
  list.arrived([...log(2), message(3, "ann"), message(4)], "abcd-4");
  list.arrived([...log(2), message(3, "ann"), message(4), message(6)], "abcd-6");
  list.arrived([...log(2), message(3, "ann"), message(4), message(6)], "abcd-6");
  pass();
  pass();
  assert.deepEqual([list.fresh, list.head, said], [2, 6, ["bob: x\nbob: x"]]);
  list.read("abcd-6");
  assert.deepEqual([list.fresh, list.seen], [0, "abcd-6"]);
});

test("a fresh history is not announced", () => {
  const { list, said, pass } = news();
  list.restart("abcd-2");
  list.arrived(log(3), "abcd-3");
  list.restart("efgh-9");
  pass();
  assert.deepEqual([list.fresh, list.head, said], [0, 9, []]);
});

test("messages are unread that came while the user was away", () => {
  const { list } = news();
  list.restart("abcd-2");
  list.read("abcd-2");
  list.leave();
  list.find(log(2), false);
  assert.equal(list.unread, undefined);
  list.find(log(4), false);
  assert.equal(list.unread, 3);
  list.leave(); // again, before these were seen
  assert.equal(list.unread, 3);
  list.find(log(5), true);
  assert.equal(list.unread, 3);
  list.read("abcd-5");
  list.leave();
  list.find(log(5), true); // the user is back, and nothing was missed
  list.find(log(6), true);
  assert.equal(list.unread, undefined);
});

test("messages are unread since an earlier list of the room", () => {
  for (const [seen, expected] of [["abcd-2", 3], ["abcd-4", undefined], ["efgh-2", undefined]]) {
    const { list } = news(seen);
    list.find([], true);
    list.restart("abcd-4");
    list.find(log(4), true);
    assert.equal(list.unread, expected);
  }
});

test("the window never reaches beyond the last message", () => {
  assert.deepEqual(slide({ start: 1, end: 1 }, 1, { first: 1, last: 1 }), { start: 0, end: 1 });
});
