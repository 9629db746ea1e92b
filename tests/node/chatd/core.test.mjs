// The state machine of chatd.js: no network, and time passes only when a test lets it.
import assert from "node:assert/strict";
import { test } from "node:test";
import { Log } from "../../../chatd/static/chatd.js";
import { history, message, online, said, start, turn } from "./doubles.mjs";

const texts = ({ room }) => room.snapshot().messages.map(({ id, data }) => `${id} ${data.message}`);
const labels = ({ room }) => room.snapshot().outbox.map(({ frame }) => frame.message);
const probes = ({ sent }) => sent().filter(({ label }) => label === "probe").length;

// The log

const entry = (number, text, more) => ({ id: `abcd-${number}`, data: said("ann", text), ...more });
function log(...entries) {
  const log = new Log();
  log.replace({ id: `abcd-${entries.length}`, more: false, entries });
  return log;
}
const read = ({ entries }) => entries.map(({ id, data }) => `${id} ${data.message}`);

test("log takes each entry once, in order", () => {
  const known = log(entry(1, "one"));
  assert.deepEqual(known.append([entry(1, "one"), entry(2, "two")]), [entry(2, "two")]);
  assert.deepEqual(known.append([entry(2, "two")]), []);
  for (const one of [entry(4, "four"), { ...entry(3, "three"), id: "wxyz-3" }, { ...entry(1, "new"), id: "wxyz-1" }])
    assert.throws(() => known.append([one]), /does not follow abcd-2/);
  assert.deepEqual([read(known), known.last], [["abcd-1 one", "abcd-2 two"], "abcd-2"]);
});

test("edit replaces the text, and keeps the name and the time", () => {
  const known = log(entry(1, "one"), entry(2, "two"));
  const other = { ...said("bob", "better"), timestamp: "later" };
  known.append([{ id: "abcd-3", data: other, replaces: "abcd-1" }, entry(4, "best", { replaces: "abcd-1" })]);
  const [first, , edit] = known.entries;
  assert.deepEqual(first.data, said("ann", "best"));
  assert.equal(first.replaced, "abcd-4");
  assert.equal(edit.data.message, "better");
});

test("removal erases the message and its edits", () => {
  const known = log(entry(1, "one"), entry(2, "two"));
  known.append([entry(3, "secret", { replaces: "abcd-1" })]);
  known.append([entry(4, "[removed]", { replaces: "abcd-1", removed: true })]);
  assert.deepEqual(read(known), ["abcd-1 [removed]", "abcd-2 two", "abcd-3 [removed]", "abcd-4 [removed]"]);
  assert.deepEqual(known.entries.map(({ removed }) => !!removed), [true, false, true, true]);
});

test("older page gets the edits that came after it, and loses no newer text", () => {
  const known = new Log();
  known.replace({ id: "abcd-4", more: true, entries: [entry(3, "three"), entry(4, "new", { replaces: "abcd-1" })] });
  const newest = entry(2, "newest", { replaced: "abcd-9" });
  const page = { id: "abcd-2", more: false, entries: [entry(1, "old"), newest] };
  known.append([entry(5, "not so new", { replaces: "abcd-2" })]);
  assert.equal(known.prepend(page), true);
  assert.deepEqual(read(known).slice(0, 3), ["abcd-1 new", "abcd-2 newest", "abcd-3 three"]);
  assert.equal(known.more, false);
  assert.equal(known.prepend({ ...page, more: true }), false);
  assert.equal(known.entries.length, 5);
});

test("other tabs are answered as by the server", () => {
  const leader = log(...Array.from({ length: 150 }, (_, at) => entry(at + 1, `m${at + 1}`)));
  for (const [last, resumed, count] of [
    [undefined, false, 150],
    ["abcd-0", true, 150],
    ["abcd-149", true, 1],
    ["abcd-150", true, 0],
    ["abcd-160", true, 0],
    ["wxyz-9", false, 150],
  ]) {
    const frame = leader.after(last);
    assert.deepEqual([frame.resumed, frame.entries.length, frame.id], [resumed, count, "abcd-150"], last);
  }
  leader.entries.splice(0, 100);
  assert.equal(leader.after("abcd-99").resumed, false);
  assert.equal(leader.after("abcd-100").entries.length, 50);
});

// Histories

test("first history counts back from its id", async (t) => {
  const client = await start(t);
  assert.equal(client.room.snapshot().state, "connecting");
  client.receive(history("abcd-9", "a", "b"));
  assert.deepEqual(texts(client), ["abcd-8 a", "abcd-9 b"]);
  client.receive(message("abcd-10", "c"));
  const { last, state } = client.room.snapshot();
  assert.deepEqual([last, state], ["abcd-10", "online"]);
  assert.equal(client.events.history.length, 1);
  assert.deepEqual(client.events.entries.map(({ entries }) => entries.length), [1]);
});

test("history names its edits and removals", async (t) => {
  const client = await start(t);
  const frame = { ...history("abcd-3", "new", "new", "[removed]"), removed: [3] };
  client.receive({ ...frame, replaced: { 1: "abcd-2" }, replaces: { 2: "abcd-1" } });
  const [one, two, three] = client.events.history[0].entries;
  assert.deepEqual([one.replaced, two.replaces, three.removed], ["abcd-2", "abcd-1", true]);
  assert.deepEqual(texts(client), ["abcd-1 new", "abcd-3 [removed]"]);
});

test("resume appends what was missed", async (t) => {
  const client = await online(t);
  client.lose();
  await client.pass(1);
  assert.deepEqual(client.connects(), [undefined, "abcd-2"]);
  client.receive({ ...history("abcd-3", "three"), resumed: true });
  client.receive(message("abcd-4", "four"));
  assert.deepEqual(texts(client), ["abcd-1 one", "abcd-2 two", "abcd-3 three", "abcd-4 four"]);
  assert.equal(client.events.history.length, 1);
});

test("resume with nothing missed changes nothing", async (t) => {
  const client = await online(t);
  client.lose();
  await client.pass(1);
  client.receive({ ...history("abcd-2"), resumed: true });
  assert.deepEqual(texts(client), ["abcd-1 one", "abcd-2 two"]);
  const { more, last } = client.room.snapshot();
  assert.deepEqual([more, last], [true, "abcd-2"]);
});

test("resumed false replaces everything, at first and in mid-stream", async (t) => {
  const client = await online(t);
  client.lose();
  await client.pass(1);
  client.receive({ ...history("wxyz-1", "new"), resumed: false });
  assert.deepEqual(texts(client), ["wxyz-1 new"]);
  assert.equal(client.room.snapshot().more, false);
  client.room.post("p1");
  client.receive({ ...history("mnop-7", "newer"), resumed: false, more: true });
  assert.deepEqual(texts(client), ["mnop-7 newer"]);
  assert.equal(client.room.snapshot().more, true);
  assert.equal(client.events.history.length, 3);
  const [first, second] = client.sent();
  assert.deepEqual(first, second, "the ack of a lost log never arrives");
});

test("client continues after the last id of an earlier one", async (t) => {
  const client = await start(t, { last: "abcd-2" });
  assert.deepEqual(client.connects(), ["abcd-2"]);
  assert.equal(client.room.snapshot().more, true);
  client.receive({ ...history("abcd-3", "three"), resumed: true });
  assert.deepEqual(texts(client), ["abcd-3 three"]);
});

const BROKEN = {
  "not JSON": "{",
  "no object": "null",
  "a gap": message("abcd-4", "four"),
  "another epoch": message("wxyz-3", "three"),
  "a second history": history("abcd-3", "three"),
};
for (const [name, frame] of Object.entries(BROKEN))
  test(`protocol broken by ${name}`, async (t) => {
    const client = await online(t);
    client.receive(frame);
    const { state, reason } = client.room.snapshot();
    assert.equal(state, "waiting");
    assert.match(reason, /broke the protocol/);
    await client.pass(1);
    assert.equal(client.connects().at(-1), "abcd-2");
    assert.deepEqual(texts(client), ["abcd-1 one", "abcd-2 two"]);
  });

test("message before the history breaks the protocol", async (t) => {
  const client = await start(t);
  client.receive(message("abcd-1", "one"));
  assert.equal(client.room.snapshot().state, "waiting");
});

test("frame of an unknown type is ignored", async (t) => {
  const client = await online(t);
  client.receive({ type: "news", data: 7 });
  assert.equal(client.room.snapshot().state, "online");
});

// Pauses

test("pauses are random, double, and start again after a success", async (t) => {
  const client = await start(t);
  const waits = [];
  client.room.addEventListener("state", () => {
    const { state, retryAt } = client.room.snapshot();
    if (state === "waiting") waits.push((retryAt - Date.now()) / 1000);
  });
  for (const pause of [0.5, 1, 2, 4, 8, 15, 15]) {
    client.lose();
    await client.pass(pause);
  }
  client.receive(history("abcd-0"));
  client.lose();
  assert.deepEqual(waits, [0.5, 1, 2, 4, 8, 15, 15, 0.5]);
});

test("the time that the server names is kept, even if the network or the user is back", async (t) => {
  const client = await online(t);
  client.lose(1012, "retry_after=7");
  client.window.dispatchEvent(new Event("online"));
  client.room.reconnect();
  await client.pass(6.9);
  assert.equal(client.room.snapshot().state, "waiting");
  await client.pass(0.1);
  assert.equal(client.connects().length, 2);
});

test("network or user that is back shortens a pause of the client", async (t) => {
  const client = await start(t);
  for (const pause of [0.5, 1, 2, 4, 8]) {
    client.lose();
    await client.pass(pause);
  }
  client.lose();
  client.window.dispatchEvent(new Event("online"));
  await client.pass(0.5);
  assert.equal(client.connects().length, 7);
  client.lose();
  client.room.reconnect();
  await client.pass(0.1);
  assert.equal(client.connects().length, 8);
});

for (const [code, reason, state] of [
  [1008, "banned", "rejected"],
  [1008, "the token has expired", "waiting"],
  [1009, "", "rejected"],
  [1012, "", "waiting"],
  [1013, "", "waiting"],
  [1006, "", "waiting"],
])
  test(`end with ${code} ${reason}`, async (t) => {
    const client = await online(t);
    client.lose(code, reason);
    assert.equal(client.room.snapshot().state, state);
    await client.pass(60);
    assert.equal(client.connects().length > 1, state === "waiting");
    if (state === "rejected") assert.equal(client.room.snapshot().error.code, code);
  });

for (const [status, state] of [
  [401, "rejected"],
  [404, "rejected"],
  [429, "waiting"],
  [500, "waiting"],
  [503, "waiting"],
])
  test(`stream refused with ${status}`, async (t) => {
    const headers = status === 503 ? { "Retry-After": "9" } : {};
    t.mock.method(globalThis, "fetch", async () => new Response("", { status, headers }));
    const client = await start(t, { WebSocket: null });
    await client.pass(0.1);
    const { state: found, error, reason, retryAt } = client.room.snapshot();
    assert.deepEqual([found, reason], [state, `refused with ${status}`]);
    assert.equal(error?.code, state === "rejected" ? status : undefined);
    if (status === 503) assert.ok(retryAt - Date.now() > 8000);
  });

// Silence

test("silence is probed, and ends the connection", async (t) => {
  const client = await online(t);
  await client.pass(44);
  client.receive(message("abcd-3", "three"));
  await client.pass(45);
  assert.deepEqual(client.sent(), [{ type: "history", limit: 1, label: "probe" }]);
  client.receive({ ...history("abcd-3", "three"), label: "probe" });
  assert.equal(client.room.snapshot().last, "abcd-3");
  await client.pass(45 + 9);
  assert.equal(client.room.snapshot().state, "online");
  await client.pass(1.5);
  assert.deepEqual(client.connects(), [undefined, "abcd-3"]);
});

test("network that is back probes a connection", async (t) => {
  const client = await online(t);
  client.window.dispatchEvent(new Event("online"));
  assert.equal(probes(client), 1);
  await client.pass(10);
  assert.equal(client.room.snapshot().state, "waiting");
});

test("WebSocket that hangs is given up, for a stream and then for another", async (t) => {
  const asked = [];
  t.mock.method(globalThis, "fetch", async (url) => {
    asked.push(url);
    throw new Error("offline");
  });
  const client = await start(t);
  await client.pass(10);
  assert.equal(client.room.snapshot().state, "waiting");
  await client.pass(0.5);
  assert.equal(client.sockets.length, 1);
  assert.match(asked[0], /^http:\/\/server\/rooms\/a\/events\?/);
  await client.pass(2);
  assert.equal(client.sockets.length, 2);
});

for (const [newest, state] of [[2, "online"], [3, "waiting"]])
  test(`stream that is silent while the log is at ${newest} is ${state}`, async (t) => {
    const text = `data: ${JSON.stringify(history("abcd-2", "one", "two"))}\n\n`;
    const answers = {
      events: () => new Response(new ReadableStream({ start: (stream) => stream.enqueue(Buffer.from(text)) })),
      messages: () => Response.json(history(`abcd-${newest}`, "newest")),
    };
    const asked = [];
    t.mock.method(globalThis, "fetch", async (url) => {
      asked.push(url.split("/").at(-1).split("?")[0]);
      return answers[asked.at(-1)]();
    });
    const client = await start(t, { WebSocket: null });
    while (client.room.snapshot().state !== "online") await turn();
    client.window.dispatchEvent(new Event("online"));
    await client.pass(10.1);
    assert.deepEqual(asked, ["events", "messages"]);
    assert.equal(client.room.snapshot().state, state);
  });

test("connection that the page closes does not lead to streams", async (t) => {
  const client = await start(t);
  for (const [type, persisted] of [["pagehide"], ["pageshow", true]])
    client.window.dispatchEvent(Object.assign(new Event(type), { persisted }));
  client.sockets[0].onclose({ code: 1006, reason: "" });
  await turn();
  assert.equal(client.sockets.length, 2);
});

// Posts

const ack = ({ label }, number, more) => ({ type: "ack", label, id: `abcd-${number}`, ...more });

test("posts are sent one at a time, in order", async (t) => {
  const client = await start(t);
  const [one, two] = [client.room.post("p1"), client.room.post("p2", { color: "red" })];
  assert.deepEqual(client.sent(), []);
  client.receive(history("abcd-0"));
  const [first, ...others] = client.sent();
  assert.deepEqual([first.username, first.message, others], ["ann", "p1", []]);
  client.receive(ack(first, 1));
  const [, second] = client.sent();
  assert.deepEqual([second.message, second.color], ["p2", "red"]);
  assert.deepEqual(labels(client), ["p2"]);
  client.receive(ack(second, 2, { duplicate: true }));
  assert.deepEqual(await one, { id: "abcd-1", duplicate: false });
  assert.deepEqual(await two, { id: "abcd-2", duplicate: true });
});

test("a post without an ack is sent again on the next connection", async (t) => {
  const client = await online(t);
  client.room.post("p1");
  client.lose();
  await client.pass(1);
  client.receive({ ...history("abcd-3", "p1"), resumed: true });
  const [first, second] = client.sent();
  assert.deepEqual(first, second);
  client.receive(ack(first, 3, { duplicate: true }));
  assert.deepEqual(labels(client), []);
  client.receive(ack(first, 3, { duplicate: true }));
});

test("posts of an earlier page keep their place", async (t) => {
  const old = { label: "old", key: "", at: 1, frame: { username: "ann", message: "old", label: "old" } };
  const list = async () => [old];
  const client = await start(t, { storage: { list, put: async () => {}, delete: async () => {} } });
  client.room.post("new");
  await turn();
  assert.deepEqual(labels(client), ["old", "new"]);
});

for (const code of ["RATE_LIMITED", "UNAVAILABLE"])
  test(`post refused for now with ${code}`, async (t) => {
    const client = await online(t);
    client.room.post("p1");
    client.room.post("p2");
    const [{ label }] = client.sent();
    client.receive({ type: "error", message: "later", code, label, retry_after: 3 });
    await client.pass(2.9);
    assert.equal(client.sent().length, 1);
    await client.pass(0.1);
    assert.deepEqual(client.sent().map(({ message }) => message), ["p1", "p1"]);
  });

test("post refused for good stays in the outbox, until it is retried or discarded", async (t) => {
  const client = await online(t);
  const refused = client.room.post("p1");
  client.room.post("p2");
  const [{ label }] = client.sent();
  const refuse = { type: "error", message: "muted", code: "FORBIDDEN", label };
  client.receive(refuse);
  await assert.rejects(refused, { message: "muted", code: "FORBIDDEN" });
  const errors = () => client.room.snapshot().outbox.map(({ error }) => error);
  assert.deepEqual(errors(), [{ message: "muted", code: "FORBIDDEN" }, undefined]);
  const other = client.sent().at(-1);
  assert.equal(other.message, "p2");
  assert.equal(client.room.retry(other.label), undefined);
  client.receive(ack(other, 3));
  const retried = client.room.retry(label);
  assert.deepEqual(errors(), [undefined]);
  assert.deepEqual(client.sent().at(-1), client.sent()[0]);
  client.receive(refuse);
  await assert.rejects(retried, { code: "FORBIDDEN" });
  const again = client.room.retry(label);
  client.receive(ack({ label }, 4));
  assert.deepEqual(await again, { id: "abcd-4", duplicate: false });
  assert.deepEqual(errors(), []);
});

test("refused post is discarded", async (t) => {
  const client = await online(t);
  const post = client.room.post("p1");
  const [{ label }] = client.sent();
  client.room.discard(label);
  assert.deepEqual(labels(client), []);
  await assert.rejects(post, { message: "the post was discarded" });
});

test("a post without an answer probes the server", async (t) => {
  const client = await online(t);
  client.room.post("p1");
  await client.pass(10);
  assert.equal(client.sent().at(-1).label, "probe");
});

test("own message is never in the messages and in the outbox", async (t) => {
  const client = await online(t);
  const shown = () => {
    const { messages, outbox } = client.room.snapshot();
    return [messages.length - 2, outbox.length].join();
  };
  const mine = (number, text) => client.receive({ ...message(`abcd-${number}`), data: said("ann", text) });
  const [first] = [client.room.post("again"), client.room.post("again"), client.room.post("one")];
  assert.equal(shown(), "0,3");
  client.receive({ ...message("abcd-3"), data: said("bob", "again") });
  assert.equal(shown(), "1,3", "another user said the same");
  mine(4, "again");
  assert.equal(shown(), "2,2", "its ack follows");
  client.lose();
  await client.pass(1);
  client.receive({ ...history("abcd-4"), resumed: true });
  assert.equal(shown(), "2,2", "its ack was lost");
  client.receive(ack(client.sent()[0], 4, { duplicate: true }));
  assert.equal(shown(), "2,2", "the second one has the same text, and is not stored");
  mine(5, "again");
  assert.equal(shown(), "3,1");
  client.receive(ack(client.sent().at(-1), 5));
  assert.equal(shown(), "3,1", "the text of the third one was stored before it was typed");
  assert.deepEqual(await first, { id: "abcd-4", duplicate: true });
});

// Presence and typing

test("presence is a snapshot and its changes", async (t) => {
  const client = await online(t);
  const presence = (data) => {
    client.receive({ type: "presence", data });
    return client.room.snapshot().presence;
  };
  presence({ count: 2, users: ["ann", "cy"] });
  assert.deepEqual(presence({ count: 2, join: ["bob"], leave: ["cy"] }), { count: 2, users: ["ann", "bob"] });
  presence({ count: 900 });
  assert.deepEqual(presence({ count: 901, join: ["dee"], leave: [] }), { count: 901, users: undefined });
});

test("typing names are shown for five seconds, or until their message", async (t) => {
  const client = await online(t);
  const typing = () => client.room.snapshot().typing;
  client.receive({ type: "typing", data: { users: ["ann", "bob"] } });
  await client.pass(3);
  client.receive({ type: "typing", data: { users: ["ann", "cy"] } });
  await client.pass(2);
  assert.deepEqual(typing(), ["ann", "cy"]);
  client.receive({ ...message("abcd-3", "hi"), data: said("cy", "hi") });
  assert.deepEqual(typing(), ["ann"]);
  await client.pass(3);
  assert.deepEqual(typing(), []);
});

test("end of a connection closes it, and forgets who is there", async (t) => {
  const client = await online(t);
  client.receive({ type: "presence", data: { count: 2, users: ["ann", "cy"] } });
  client.receive({ type: "typing", data: { users: ["cy"] } });
  client.receive("{");
  const { presence, typing } = client.room.snapshot();
  assert.deepEqual([presence, typing, client.socket().closed], [undefined, [], true]);
});

// Events

test("each change is announced once", async (t) => {
  const client = await online(t);
  let told = [];
  for (const type of ["history", "entries", "older", "presence", "typing", "state", "outbox"])
    client.room.addEventListener(type, () => told.push(type));
  let changes = 0;
  client.room.subscribe(() => (changes += 1));
  const announced = async (act) => {
    told = [];
    changes = 0;
    await act();
    assert.equal(changes, told.length);
    return told;
  };
  const receive = (frame) => announced(() => client.receive(frame));
  assert.deepEqual(await receive({ type: "presence", data: { count: 1, users: [] } }), ["presence"]);
  assert.deepEqual(await receive({ type: "typing", data: { users: ["cy"] } }), ["typing"]);
  assert.deepEqual(await announced(() => client.pass(5)), ["typing"]);
  assert.deepEqual(await announced(() => void client.room.post("p1")), ["outbox"]);
  assert.deepEqual(await receive(ack(client.sent()[0], 3)), ["outbox"]);
  t.mock.method(globalThis, "fetch", async () => Response.json({ ...history("abcd-0") }));
  assert.deepEqual(await announced(() => client.room.older()), ["older"]);
  assert.deepEqual(await announced(() => client.lose()), ["state"]);
  assert.deepEqual(await announced(() => client.room.stop()), ["state"]);
});

test("listener may stop the room at any event", async (t) => {
  for (const stopping of ["connecting", "online", "waiting", "history", "entries"]) {
    const client = await start(t);
    const stop = ({ detail }) => [detail, detail.entries && stopping].includes(stopping) && client.room.stop();
    for (const type of ["state", "history", "entries"].filter((type) => type === stopping || type === "state"))
      client.room.addEventListener(type, stop);
    client.lose();
    await client.pass(1);
    if (client.room.snapshot().state !== "stopped") {
      client.receive(history("abcd-1", "one"));
      client.receive(message("abcd-2", "two"));
      client.lose();
    }
    assert.equal(client.room.snapshot().state, "stopped", stopping);
    const count = client.sockets.length;
    await client.pass(60);
    assert.equal(client.sockets.length, count);
    t.mock.timers.reset();
    t.mock.restoreAll();
  }
});

test("end is final", async (t) => {
  const client = await online(t);
  client.room.stop();
  client.room.reconnect();
  client.window.dispatchEvent(new Event("online"));
  client.socket().receive(message("abcd-3", "late"));
  await client.pass(100);
  assert.equal(client.room.snapshot().state, "stopped");
  assert.equal(client.sockets.length, 1);
  assert.deepEqual(texts(client), ["abcd-1 one", "abcd-2 two"]);
});

// Tokens

test("token is renewed a minute before its expiry, or in half of the time", async (t) => {
  for (const [left, renewal] of [[1000, 940], [100, 50], [0.5, 1], [-1], [undefined]]) {
    const times = [];
    const token = () => {
      times.push(Date.now() / 1000);
      const exp = times.length === 1 ? Date.now() / 1000 + left : undefined;
      return `x.${Buffer.from(JSON.stringify({ exp, name: "ÿ?>" })).toString("base64url")}.y`;
    };
    const client = await start(t, { token });
    client.receive(history("abcd-0"));
    await client.pass(45 - 0.1);
    for (let rest = 1000; rest > 0; rest -= 40) {
      client.socket().receive({ ...history("abcd-0"), label: "probe" });
      await client.pass(40);
    }
    const [first, second] = times;
    assert.equal(renewal ? Math.abs(second - first - renewal) < 0.2 : second === undefined, true, `${left} ${times}`);
    client.room.stop();
    t.mock.timers.reset();
    t.mock.restoreAll();
  }
});
