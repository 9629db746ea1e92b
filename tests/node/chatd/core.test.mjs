// The pure core of chatd.js: no network, and time passes only when a test lets it.
import assert from "node:assert/strict";
import { test } from "node:test";
import { createCore, secondsToRenewal } from "../../../chatd/static/chatd.js";

const said = (username, message) => ({ username, message, timestamp: "2026-01-01T00:00:00.000Z" });
const texts = (core) => core.view.entries.map(({ id, data }) => `${id} ${data.message}`);

/** A core with a host that records what it is told; `random` is always one half. */
function start(last) {
  const told = { sent: [], connects: [], closes: 0, events: [] };
  const clock = { now: 1000 };
  const host = {
    now: () => clock.now,
    random: () => 0.5,
    arm() {},
    connect: (last) => told.connects.push(last),
    send: (frame) => told.sent.push(frame),
    close: () => (told.closes += 1),
    emit: (type, detail) => told.events.push([type, detail]),
  };
  const core = createCore(host, last);
  /** Let time pass, and call what becomes due at its time. */
  const pass = (seconds) => {
    const end = clock.now + seconds;
    while (core.deadline() <= end) {
      clock.now = Math.max(clock.now, core.deadline());
      core.tick();
    }
    clock.now = end;
  };
  const events = (type) => told.events.filter(([name]) => name === type).map(([, detail]) => detail);
  core.start();
  return { core, told, pass, events, view: core.view };
}
const history = (id, ...messages) => ({ type: "history", id, data: messages.map((text) => said("ann", text)) });
const message = (id, text, more) => ({ type: "message", id, data: said("bob", text), ...more });
const post = (label, at = 0) => ({ label, at, frame: { username: "ann", message: label, label } });
function online(last) {
  const room = start(last);
  room.core.receive({ ...history("abcd-2", "one", "two"), more: true });
  return room;
}

test("first history counts back from its id", () => {
  const { core, events, view } = start();
  assert.equal(view.state, "connecting");
  core.receive(JSON.stringify(history("abcd-9", "a", "b")));
  assert.deepEqual(texts(core), ["abcd-8 a", "abcd-9 b"]);
  core.receive(message("abcd-10", "c"));
  assert.equal(view.last, "abcd-10");
  assert.equal(view.state, "online");
  assert.equal(events("history").length, 1);
  assert.deepEqual(events("entries").map(({ entries }) => entries.length), [1]);
});

test("resume appends what was missed", () => {
  const { core, told, pass, events } = online();
  core.lost({ reason: "gone" });
  pass(1);
  assert.deepEqual(told.connects, [undefined, "abcd-2"]);
  core.receive({ ...history("abcd-3", "three"), resumed: true });
  core.receive(message("abcd-4", "four"));
  assert.deepEqual(texts(core), ["abcd-1 one", "abcd-2 two", "abcd-3 three", "abcd-4 four"]);
  assert.equal(events("history").length, 1);
});

test("resume with nothing missed changes nothing", () => {
  const { core, view } = online();
  core.lost({ reason: "gone" });
  core.start();
  core.receive({ ...history("abcd-2"), resumed: true });
  assert.deepEqual(texts(core), ["abcd-1 one", "abcd-2 two"]);
  assert.equal(view.more, true);
});

test("resumed false replaces everything, at first and in mid-stream", () => {
  const { core, told, events, view } = online();
  core.lost({ reason: "gone" });
  core.start();
  core.receive({ ...history("wxyz-1", "new"), resumed: false });
  assert.deepEqual(texts(core), ["wxyz-1 new"]);
  assert.equal(view.more, false);
  core.post(post("p1"));
  core.receive({ ...history("mnop-7", "newer"), resumed: false, more: true });
  assert.deepEqual(texts(core), ["mnop-7 newer"]);
  assert.equal(view.more, true);
  assert.equal(events("history").length, 3);
  assert.deepEqual(told.sent.map(({ label }) => label), ["p1", "p1"], "the ack of a lost log never arrives");
});

const BROKEN = {
  "not JSON": "{",
  "no object": "null",
  "a gap": JSON.stringify(message("abcd-4", "four")),
  "a repetition": JSON.stringify(message("abcd-2", "two")),
  "another epoch": JSON.stringify(message("wxyz-3", "three")),
  "a second history": JSON.stringify(history("abcd-3", "three")),
};
for (const [name, text] of Object.entries(BROKEN))
  test(`protocol broken by ${name}`, () => {
    const { core, told, pass, events, view } = online();
    assert.equal(core.receive(text), undefined);
    assert.equal(view.state, "waiting");
    assert.match(events("disconnect")[0].reason, /broke the protocol/);
    pass(1);
    assert.equal(told.connects.at(-1), "abcd-2");
    assert.deepEqual(texts(core), ["abcd-1 one", "abcd-2 two"]);
  });

test("message before the history breaks the protocol", () => {
  const { core, view } = start();
  core.receive(message("abcd-1", "one"));
  assert.equal(view.state, "waiting");
});

test("pauses are random, double, and start again after a success", () => {
  const { core, events } = start();
  for (let attempt = 0; attempt < 7; attempt++) core.lost({ reason: "refused" });
  core.start();
  core.receive(history("abcd-0"));
  core.lost({ reason: "gone" });
  assert.deepEqual(events("disconnect").map(({ wait }) => wait), [0.5, 1, 2, 4, 8, 15, 15, 0.5]);
});

test("the time that the server names is kept, even if the network is back", () => {
  const { core, told, pass, view } = online();
  core.lost({ reason: "closed with 1012 retry_after=7", code: 1012, retryAfter: 7 });
  core.wake();
  pass(6.9);
  assert.equal(view.state, "waiting");
  pass(0.1);
  assert.equal(told.connects.length, 2);
});

test("wake shortens a pause of the client", () => {
  const { core, told, pass } = start();
  for (let attempt = 0; attempt < 7; attempt++) core.lost({ reason: "refused" });
  core.wake();
  pass(0.5);
  assert.equal(told.connects.length, 2);
});

for (const [code, reason, state] of [
  [1008, "banned", "rejected"],
  [1008, "the token has expired", "waiting"],
  [1009, "", "rejected"],
  [1012, "", "waiting"],
  [1013, "", "waiting"],
  [1006, "", "waiting"],
  [401, "", "rejected"],
  [404, "", "rejected"],
  [429, "", "waiting"],
  [503, "", "waiting"],
])
  test(`end with ${code} ${reason}`, () => {
    const { core, view, told, pass } = online();
    core.lost({ code, reason });
    assert.equal(view.state, state);
    pass(60);
    assert.equal(told.connects.length > 1, state === "waiting");
    if (state === "rejected") assert.equal(view.error.code, code);
  });

test("silence is probed, and ends the connection", () => {
  const { core, told, pass, view } = online();
  pass(44);
  core.receive(message("abcd-3", "three"));
  pass(45);
  assert.deepEqual(told.sent, [{ type: "history", limit: 1, label: "probe" }]);
  core.receive({ ...history("abcd-3", "three"), label: "probe" });
  assert.equal(view.last, "abcd-3");
  pass(45 + 9);
  assert.equal(view.state, "online");
  pass(1.5);
  assert.deepEqual(told.connects, [undefined, "abcd-3"]);
});

test("wake probes a connection", () => {
  const { core, told, pass, view } = online();
  core.wake();
  assert.equal(told.sent[0].label, "probe");
  pass(10);
  assert.equal(view.state, "waiting");
});

test("an attempt that hangs is given up", () => {
  const { pass, view, told } = start();
  pass(10);
  assert.equal(view.state, "waiting");
  pass(0.5);
  assert.equal(told.connects.length, 2);
});

test("posts are sent one at a time, in order", () => {
  const { core, told, events, view } = start();
  core.post(post("p1", 1), post("p2", 2));
  assert.deepEqual(told.sent, []);
  core.receive(history("abcd-0"));
  assert.deepEqual(told.sent, [post("p1").frame]);
  core.receive({ type: "ack", label: "p1", id: "abcd-1" });
  assert.deepEqual(told.sent, [post("p1").frame, post("p2").frame]);
  assert.deepEqual(events("settle"), [{ label: "p1", ack: { type: "ack", label: "p1", id: "abcd-1" } }]);
  assert.deepEqual(view.outbox.map(({ label }) => label), ["p2"]);
});

test("a post without an ack is sent again on the next connection", () => {
  const { core, told, view } = online();
  core.post(post("p1"));
  core.post(post("p1"));
  core.lost({ reason: "gone" });
  core.start();
  core.receive({ ...history("abcd-3", "p1"), resumed: true });
  assert.deepEqual(told.sent, [post("p1").frame, post("p1").frame]);
  core.receive({ type: "ack", label: "p1", id: "abcd-3", duplicate: true });
  assert.deepEqual(view.outbox, []);
  core.receive({ type: "ack", label: "p1", id: "abcd-3" });
});

test("posts of an earlier page keep their place", () => {
  const { core, view } = start();
  core.post(post("new", 5));
  core.post(post("old", 1), post("new", 5));
  assert.deepEqual(view.outbox.map(({ label }) => label), ["old", "new"]);
});

for (const code of ["RATE_LIMITED", "UNAVAILABLE"])
  test(`post refused for now with ${code}`, () => {
    const { core, told, pass } = online();
    core.post(post("p1", 1), post("p2", 2));
    core.receive({ type: "error", message: "later", code, label: "p1", retry_after: 3 });
    pass(2.9);
    assert.equal(told.sent.length, 1);
    pass(0.1);
    assert.deepEqual(told.sent.map(({ label }) => label), ["p1", "p1"]);
  });

test("post refused for good stays in the outbox, with its error", () => {
  const { core, told, events, view } = online();
  core.post(post("p1", 1), post("p2", 2));
  core.receive({ type: "error", message: "no", code: "FORBIDDEN", label: "p1" });
  assert.deepEqual(view.outbox.map(({ error }) => error), [{ message: "no", code: "FORBIDDEN" }, undefined]);
  assert.equal(events("refuse")[0].label, "p1");
  assert.equal(told.sent.at(-1).label, "p2");
  core.discard("p1");
  assert.deepEqual(view.outbox.map(({ label }) => label), ["p2"]);
});

test("a post without an answer probes the server", () => {
  const { core, told, pass } = online();
  core.post(post("p1"));
  pass(10);
  assert.equal(told.sent.at(-1).label, "probe");
});

test("edit replaces the text, and keeps the name and the time", () => {
  const { core } = online();
  core.receive(message("abcd-3", "better", { replaces: "abcd-1" }));
  core.receive(message("abcd-4", "best", { replaces: "abcd-1" }));
  const [first, , edit] = core.view.entries;
  assert.deepEqual([first.data.message, first.data.username, first.replaced], ["best", "ann", "abcd-4"]);
  assert.equal(edit.data.message, "better");
});

test("removal erases the message and its edits", () => {
  const { core } = online();
  core.receive(message("abcd-3", "secret", { replaces: "abcd-1" }));
  core.receive(message("abcd-4", "[removed]", { replaces: "abcd-1", removed: true }));
  assert.deepEqual(texts(core), ["abcd-1 [removed]", "abcd-2 two", "abcd-3 [removed]", "abcd-4 [removed]"]);
  assert.deepEqual(core.view.entries.map(({ removed }) => !!removed), [true, false, true, true]);
});

test("history names its edits and removals", () => {
  const { core } = start();
  const frame = { ...history("abcd-3", "new", "new", "[removed]"), removed: [3] };
  core.receive({ ...frame, replaced: { 1: "abcd-2" }, replaces: { 2: "abcd-1" } });
  const [one, two, three] = core.view.entries;
  assert.deepEqual([one.replaced, two.replaces, three.removed], ["abcd-2", "abcd-1", true]);
});

test("older page goes before the entries, with the edits that came after it", () => {
  const { core, view } = start();
  core.receive({ ...history("abcd-4", "three", "four"), more: true });
  core.receive(message("abcd-5", "new", { replaces: "abcd-1" }));
  const entries = [1, 2].map((number) => ({ id: `abcd-${number}`, data: said("ann", `old ${number}`) }));
  core.prepend({ id: "abcd-2", more: false, entries });
  assert.deepEqual(texts(core).slice(0, 3), ["abcd-1 new", "abcd-2 old 2", "abcd-3 three"]);
  assert.equal(view.more, false);
  core.prepend({ id: "abcd-2", more: true, entries });
  assert.equal(view.entries.length, 5);
});

test("presence is a snapshot and its changes", () => {
  const { core, view } = online();
  core.receive({ type: "presence", data: { count: 2, users: ["ann", "cy"] } });
  core.receive({ type: "presence", data: { count: 2, join: ["bob"], leave: ["cy"] } });
  assert.deepEqual(view.presence, { count: 2, users: ["ann", "bob"] });
  core.receive({ type: "presence", data: { count: 900 } });
  core.receive({ type: "presence", data: { count: 901, join: ["dee"], leave: [] } });
  assert.deepEqual(view.presence, { count: 901, users: undefined });
});

test("typing names are shown for five seconds, or until their message", () => {
  const { core, pass, view } = online();
  core.receive({ type: "typing", data: { users: ["ann", "bob"] } });
  pass(3);
  core.receive({ type: "typing", data: { users: ["ann", "cy"] } });
  pass(2);
  assert.deepEqual([...view.typing], ["ann", "cy"]);
  core.receive({ ...message("abcd-3", "hi"), data: said("cy", "hi") });
  assert.deepEqual([...view.typing], ["ann"]);
  pass(3);
  assert.deepEqual([...view.typing], []);
});

test("other tabs are answered as by the server", () => {
  const { core: leader } = online();
  for (let number = 3; number <= 150; number++) leader.receive(message(`abcd-${number}`, `m${number}`));
  for (const last of [undefined, "abcd-1", "abcd-149", "abcd-150", "wxyz-9"]) {
    const { core } = start();
    if (last) core.receive(history(last, "mine"));
    if (last) core.start();
    core.receive(structuredClone(leader.welcome(last)));
    assert.equal(core.view.last, "abcd-150");
    assert.equal(core.view.entries.at(-1).data.message, last === "abcd-150" ? "mine" : "m150");
    const first = last?.startsWith("abcd") ? Number(last.slice(5)) : 51;
    assert.equal(core.view.entries.length, 151 - first);
  }
});

test("end of a connection closes it, and forgets who is there", () => {
  const { core, told, view } = online();
  core.receive({ type: "presence", data: { count: 2, users: ["ann", "cy"] } });
  core.receive({ type: "typing", data: { users: ["cy"] } });
  const { closes } = told;
  core.lost({ reason: "gone" });
  assert.deepEqual([view.presence, view.typing.size, told.closes], [undefined, 0, closes + 1]);
});

test("each change is announced once", () => {
  const { core, told, pass } = online();
  const announced = (act) => {
    told.events.length = 0;
    act();
    return told.events.map(([type]) => type);
  };
  assert.deepEqual(announced(() => core.receive({ type: "presence", data: { count: 1, users: [] } })), ["presence"]);
  assert.deepEqual(announced(() => core.receive({ type: "typing", data: { users: ["cy"] } })), ["typing"]);
  assert.deepEqual(announced(() => pass(5)), ["typing"]);
  assert.deepEqual(announced(() => core.receive({ type: "news", data: 7 })), ["news"]);
  assert.deepEqual(announced(() => core.post(post("p1"))), ["outbox"]);
  assert.deepEqual(announced(() => core.prepend({ id: "abcd-0", entries: [], more: false })), ["older"]);
  assert.deepEqual(announced(() => core.lost({ reason: "gone" })), ["disconnect", "state"]);
  assert.deepEqual(announced(() => core.end("stopped", new Error("enough"))), ["state"]);
});

test("another tab learns whether the log has older messages", () => {
  const { core, view } = start();
  core.receive(history("abcd-2", "one", "two"));
  assert.equal(core.welcome().more, false);
  view.more = true;
  assert.equal(core.welcome().more, true);
});

test("tab that has newer entries waits until its leader has them", () => {
  const { core } = online();
  assert.equal(core.welcome("abcd-3"), undefined);
  assert.equal(core.welcome("wxyz-3").resumed, false);
});

test("listener may stop the room at any event", () => {
  for (const stopping of ["state", "history", "disconnect", "entries"]) {
    const { core, told, view } = start();
    told.events.push = ([type]) => type === stopping && core.end("stopped", new Error("enough"));
    const before = told.connects.length;
    core.lost({ reason: "gone" });
    core.start();
    core.receive(history("abcd-1", "one"));
    core.receive(message("abcd-2", "two"));
    core.lost({ reason: "gone" });
    assert.equal(view.state, "stopped", stopping);
    assert.ok(told.connects.length <= before + 1);
    assert.equal(core.deadline(), Infinity);
  }
});

test("tab follows the state of its leader", () => {
  const { core, told, pass, view } = online();
  core.follow({ state: "waiting" });
  pass(600);
  assert.equal(view.state, "waiting");
  core.follow({ state: "online" });
  assert.equal(told.connects.length, 2);
  core.follow({ state: "rejected", error: { message: "banned", code: 1008 } });
  assert.equal(view.error.message, "banned");
});

test("end is final", () => {
  const { core, told, pass, view } = online();
  core.end("stopped", new Error("enough"));
  core.start();
  core.follow({ state: "waiting" });
  pass(100);
  assert.equal(view.state, "stopped");
  assert.equal(told.connects.length, 1);
});

test("renewal comes a minute before the expiry, or in half of the time", () => {
  const token = (exp) => `x.${Buffer.from(JSON.stringify({ exp, name: "ÿ?>" })).toString("base64url")}.y`;
  const seconds = [1000, 100, 0.5, -1, 1e9].map((left) => secondsToRenewal(token(1000 + left), 1000));
  assert.deepEqual(seconds, [940, 50, 1, undefined, 86400]);
  assert.deepEqual(["", "a.b.c", token()].map((text) => secondsToRenewal(text, 0)), [undefined, undefined, undefined]);
});
