// chatd.js against real servers.
import assert from "node:assert/strict";
import { createHmac } from "node:crypto";
import { writeFile, mkdtemp } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, test as run } from "node:test";
import WebSocket from "ws";
import { Client, ClientStopped, Rejected } from "../../../chatd/static/chatd.js";
import { Blocked, memory, proxy, serve, stored, tabbed, until } from "./server.mjs";

const test = (name, call) => run(name, { timeout: 60_000 }, call);
const quick = { WebSocket, locks: null };
Math.random = () => 0.05; // the pauses of the client are short
function join_(test, url, options, name = "main") {
  const client = new Client(url, { username: "ann", ...quick, ...options });
  test.after(() => client.stop());
  return client.room(name);
}
const ends = [];
after(() => Promise.all(ends.map((end) => end())));
let rooms = 0;
let server;
/** Return the address of a server that tests share, and the name of a room of its own for this test. */
async function shared() {
  server ??= serve({ after: (end) => ends.push(end) });
  rooms += 1;
  return [(await server).url, `room-${rooms}`];
}
const texts = (room) => room.snapshot().messages.map(({ data }) => data.message);
const is = (state) => (snapshot) => snapshot.state === state;
const event = (room, type) => new Promise((resolve) => room.addEventListener(type, resolve, { once: true }));
for (const Socket of [WebSocket, Blocked])
  test(`${Socket.name}: two people chat`, async (t) => {
    const [url, name] = await shared();
    const ann = join_(t, url, { WebSocket: Socket }, name);
    const bob = join_(t, url, { username: "bob" }, name);
    await until(bob, ({ presence }) => presence?.users?.includes("ann"));
    const posted = await ann.post("hi");
    assert.match(posted.id, /^\w+-1$/);
    assert.equal(posted.duplicate, false);
    await bob.post("hello");
    await until(ann, ({ messages }) => messages.length === 2);
    assert.deepEqual(texts(ann), ["hi", "hello"]);
    assert.deepEqual(ann.snapshot().outbox, []);
    assert.equal(ann.snapshot(), ann.snapshot());
    bob.typing();
    await until(ann, ({ typing }) => typing.includes("bob"));
    assert.equal(ann.snapshot().last, posted.id.replace(/1$/, "2"));
    const read = [];
    for await (const entry of bob) {
      read.push(entry.data.message);
      if (read.length === 2) bob.post("bye");
      if (read.length === 3) bob.stop();
    }
    assert.deepEqual(read, ["hi", "hello", "bye"]);
    await assert.rejects(bob.post("late"), ClientStopped);
  });

for (const Socket of [WebSocket, Blocked])
  test(`${Socket.name}: a killed server loses and doubles nothing`, async (t) => {
    const first = await serve(t);
    const room = join_(t, first.url, { WebSocket: Socket }, "a");
    const seen = [];
    for (const type of ["history", "entries"])
      room.addEventListener(type, ({ detail }) => seen.push(...detail.entries.map(({ data }) => data.message)));
    const posts = Array.from({ length: 40 }, (_, number) => room.post(`m${number}`));
    await posts[20];
    await first.kill();
    posts.push(room.post("offline"));
    await until(room, is("waiting"));
    const second = await serve(t, first);
    await Promise.all(posts);
    const expected = [...Array.from({ length: 40 }, (_, number) => `m${number}`), "offline"];
    await until(room, ({ messages }) => messages.length === 41);
    assert.deepEqual(seen, expected);
    assert.deepEqual((await stored(second.url, "a")).map(({ message }) => message), expected);
  });

for (const Socket of [WebSocket, Blocked])
  test(`${Socket.name}: a drained server names the pause`, async (t) => {
    const first = await serve(t);
    const room = join_(t, first.url, { WebSocket: Socket });
    await until(room, is("online"));
    const waiting = ({ state, reason, retryAt }) =>
      state === "waiting" && { reason, wait: (retryAt - Date.now()) / 1000 };
    const paused = until(room, waiting);
    await first.stop();
    const { reason, wait } = await paused;
    assert.match(reason, Socket === Blocked ? /the stream ended/ : /closed with 1012 retry_after/);
    if (Socket === WebSocket) assert.ok(Math.abs(Number(reason.split("retry_after=")[1]) - wait) < 1);
    else assert.ok(wait > 0);
    await serve(t, first);
    await until(room, is("online"));
    assert.deepEqual(texts(room), ["Hello!", "Hi Alice!"]);
  });

test("a server that lost its log replaces everything", async (t) => {
  const options = ["--store=memory:"];
  const first = await serve(t, { options });
  const room = join_(t, first.url);
  await room.post("lost");
  await first.kill();
  const post = room.post("kept");
  const replaced = event(room, "history");
  const second = await serve(t, { ...first, options });
  assert.equal((await replaced).detail.entries.length, 2);
  await post;
  assert.deepEqual(texts(room), ["Hello!", "Hi Alice!", "kept"]);
  assert.equal((await stored(second.url)).length, 3);
});

test("older pages", async (t) => {
  const { url } = await serve(t, { options: ["--history=10"] });
  const room = join_(t, url, {}, "a");
  for (let number = 1; number <= 25; number++) room.post(`m${number}`);
  await until(room, ({ messages }) => messages.length === 25);
  const other = join_(t, url, { username: "bob" }, "a");
  await until(other, ({ messages }) => messages.length === 10);
  await Promise.all([other.older(5), other.older(5)]);
  assert.equal(texts(other)[0], "m11");
  await other.older();
  assert.deepEqual(texts(other), texts(room));
  assert.equal(other.snapshot().more, false);
  await other.older();
  const page = await other.page({ before: other.snapshot().messages[3].id, limit: 2 });
  assert.deepEqual(page.entries.map(({ data }) => data.message), ["m2", "m3"]);
  assert.equal(page.more, true);
  await assert.rejects(other.page({ before: "abcd-1" }), { code: "UNKNOWN_ID" });
});

test("refused posts", async (t) => {
  const [url, name] = await shared();
  for (const options of [{}, { WebSocket: Blocked }]) {
    const storage = memory();
    const room = join_(t, url, { storage, ...options }, name);
    await assert.rejects(room.post(""), { constructor: Rejected, message: /not allowed to be empty/ });
    const [{ error, label, frame }] = room.snapshot().outbox;
    assert.match(error.message, /not allowed to be empty/);
    assert.equal(frame.message, "");
    assert.deepEqual(storage.posts.get(label).error, error);
    room.discard(label);
    assert.deepEqual(room.snapshot().outbox, []);
    assert.equal(storage.posts.size, 0);
    await room.post("fine");
    room.stop();
  }
});

test("outbox outlives the client", async (t) => {
  const first = await serve(t);
  const storage = memory();
  const room = join_(t, first.url, { storage });
  await until(room, is("online"));
  await first.kill();
  const lost = Promise.all(["one", "two", "three"].map((text) => room.post(text)));
  room.stop();
  await assert.rejects(lost, ClientStopped);
  assert.equal(storage.posts.size, 3);
  const second = await serve(t, first);
  const again = join_(t, second.url, { storage });
  await until(again, ({ messages }) => messages.length === 5);
  assert.deepEqual(texts(again).slice(2), ["one", "two", "three"]);
  await storage.emptied();
});

test("a post whose ack was lost with the page is stored once", async (t) => {
  const { url, port } = await serve(t);
  const storage = memory();
  let mute = false;
  const { url: through } = await proxy(t, () => port, (data, up) => (mute && !up ? null : data));
  const room = join_(t, through, { storage });
  await until(room, is("online"));
  mute = true;
  room.post("once").catch(() => {});
  const other = join_(t, url, { username: "bob" });
  await until(other, ({ messages }) => messages.length === 3);
  room.stop();
  mute = false;
  const again = join_(t, through, { storage });
  await storage.emptied();
  assert.deepEqual(texts(again), ["Hello!", "Hi Alice!", "once"]);
});

// Tokens

const SECRET = "a secret of at least 32 bytes, for tests";
function sign(sub, lasts, claims) {
  const encode = (value) => Buffer.from(JSON.stringify(value)).toString("base64url");
  const exp = Math.floor(Date.now() / 1000) + lasts;
  const text = `${encode({ alg: "HS256", typ: "JWT" })}.${encode({ sub, exp, ...claims })}`;
  return `${text}.${createHmac("sha256", SECRET).update(text).digest("base64url")}`;
}
async function guarded(t) {
  const folder = await mkdtemp(join(tmpdir(), "chatd-js-"));
  await writeFile(join(folder, "jwt.key"), SECRET);
  return serve(t, { folder, options: ["--jwt-key=jwt.key"] });
}

for (const Socket of [WebSocket, Blocked])
  test(`${Socket.name}: edits and removals with tokens`, async (t) => {
    const { url } = await guarded(t);
    const ann = join_(t, url, { WebSocket: Socket, token: async () => sign("ann", 600) });
    const bob = join_(t, url, { username: "bob", token: sign("bob", 600) });
    const { id } = await ann.post("helo");
    await ann.edit(id, "hello");
    await until(bob, ({ messages }) => messages.at(-1)?.data.message === "hello");
    assert.equal(bob.snapshot().messages.length, 3);
    await assert.rejects(bob.edit(id, "mine"), { code: "FORBIDDEN" });
    await assert.rejects(bob.remove(id), { code: "FORBIDDEN" });
    await ann.remove(id);
    await until(bob, ({ messages }) => messages.at(-1).removed);
    await assert.rejects(ann.edit(id, "back"), { code: "NOT_REPLACEABLE" });
    assert.equal(JSON.stringify(bob.snapshot().messages).includes("hello"), false);
  });

test("token is renewed before its expiry, on the same connection", async (t) => {
  const { url } = await guarded(t);
  let calls = 0;
  const renewed = Promise.withResolvers?.() ?? {};
  const third = new Promise((resolve) => (renewed.resolve = resolve));
  const room = join_(t, url, {
    token() {
      if (++calls === 3) renewed.resolve();
      return sign("ann", 2);
    },
  });
  let ends = 0;
  room.addEventListener("state", ({ detail }) => detail === "waiting" && (ends += 1));
  await third;
  await room.post("still here");
  assert.equal(ends, 0);
});

test("a refused token is asked for again, and once only", async (t) => {
  const { url } = await guarded(t);
  const tokens = [sign("ann", -600), sign("ann", 600)];
  const sockets = [];
  class Recorded extends WebSocket {
    constructor(...given) {
      super(...given);
      sockets.push(this);
    }
  }
  const room = join_(t, url, { WebSocket: Recorded, token: () => tokens.shift() });
  await room.post("in");
  assert.deepEqual(sockets.map(({ readyState }) => readyState), [WebSocket.CLOSED, WebSocket.OPEN]);
  const other = join_(t, url, { username: "bob", token: () => "x.y.z" });
  const { error } = await until(other, (snapshot) => snapshot.state === "rejected" && snapshot);
  assert.equal(error.code, 401);
  await assert.rejects(other.post("out"), { code: 401 });
  await assert.rejects(other[Symbol.asyncIterator]().next(), { code: 401 });
});

test("a tab whose token is refused leaves the lead to another, which has its own", async (t) => {
  const { url } = await guarded(t);
  const shares = tabbed();
  const refused = join_(t, url, { ...shares, token: () => "x.y.z" });
  const other = join_(t, url, { ...shares, token: sign("ann", 600) });
  await until(refused, ({ error }) => error);
  await other.post("in");
});

test("a token function that fails is called again", async (t) => {
  const { url } = await guarded(t);
  let calls = 0;
  const room = join_(t, url, {
    async token() {
      if (++calls < 3) throw new Error("offline");
      return sign("ann", 600);
    },
  });
  await room.post("in");
  assert.equal(calls, 3);
});

test("a room that does not exist is final", async (t) => {
  const { url } = await serve(t, { options: ["--rooms=main"] });
  const room = join_(t, url, {}, "other");
  assert.equal((await until(room, ({ error }) => error)).code, 404);
});

test("a token that is refused at a post ends the client, and the post stays", async (t) => {
  const [url, name] = await shared();
  const { fetch } = globalThis;
  t.after(() => (globalThis.fetch = fetch));
  globalThis.fetch = (url, init) => (init.method === "POST" ? new Response("{}", { status: 401 }) : fetch(url, init));
  const room = join_(t, url, { WebSocket: null }, name);
  await until(room, is("online"));
  await assert.rejects(room.post("hi"), { code: 401 });
  const { state, outbox } = room.snapshot();
  assert.equal(state, "rejected");
  assert.deepEqual(outbox.map(({ error }) => error), [undefined]);
});

test("a room that has ended is joined again", async (t) => {
  const [url] = await shared();
  const client = new Client(url, { username: "ann", ...quick });
  t.after(() => client.stop());
  const room = client.room();
  assert.equal(client.room("main"), room);
  room.stop();
  const next = client.room();
  assert.notEqual(next, room);
  await next.post("again");
});

test("abort signal stops the rooms", async (t) => {
  const [url] = await shared();
  const abort = new AbortController();
  const room = join_(t, url, { signal: abort.signal });
  await until(room, is("online"));
  abort.abort();
  assert.equal(room.snapshot().state, "stopped");
  assert.equal(join_(t, url, { signal: abort.signal }, "b").snapshot().state, "stopped");
});

// Tabs

test("ten tabs are one connection, and each message is seen once", async (t) => {
  const [url, name] = await shared();
  let sockets = 0;
  class Counted extends WebSocket {
    constructor(...given) {
      super(...given);
      sockets += 1;
    }
  }
  const shares = { ...tabbed(), WebSocket: Counted };
  const tabs = Array.from({ length: 10 }, () => join_(t, url, shares, name));
  const seen = tabs.map(() => []);
  const breaks = [];
  tabs.forEach((tab, at) => {
    tab.addEventListener("state", ({ detail }) => detail === "waiting" && breaks.push(at));
    for (const type of ["history", "entries"])
      tab.addEventListener(type, ({ detail }) => seen[at].push(...detail.entries.map(({ data }) => data.message)));
  });
  await Promise.all(tabs.map((tab) => until(tab, is("online"))));
  assert.equal(sockets, 1);
  const other = join_(t, url, { username: "bob" }, name);
  const { users, count } = await until(other, ({ presence }) => presence?.users?.includes("ann") && presence);
  assert.deepEqual([users, count], [["ann", "bob"], 2]);
  await Promise.all(tabs.map((tab, at) => tab.post(`from ${at}`)));
  await Promise.all(tabs.map((tab) => until(tab, ({ messages }) => messages.length === 10)));
  await shares.storage.emptied();
  other.typing();
  await until(tabs[9], ({ typing }) => typing.includes("bob"));
  tabs[5].typing();
  await until(other, ({ typing }) => typing.includes("ann"));

  // The leader leaves without a word, between two messages.
  const post = tabs[9].post("to nobody");
  tabs[0].stop();
  await post;
  await other.post("after");
  await Promise.all(tabs.slice(1).map((tab) => until(tab, ({ messages }) => messages.length === 12)));
  assert.equal(sockets, 2);
  const all = (await stored(url, name)).map(({ message }) => message);
  for (const one of seen.slice(1)) assert.deepEqual(one, all);

  assert.deepEqual(breaks, []);

  // A new tab gets the history of its leader.
  const late = join_(t, url, shares, name);
  await until(late, ({ messages }) => messages.length === 12);
  await until(late, ({ presence }) => presence?.count === 2);
  assert.equal(sockets, 2);
});

test("tabs need no events besides messages", async (t) => {
  const [url, name] = await shared();
  const shares = { ...tabbed(), events: "" };
  const [one, other] = [join_(t, url, shares, name), join_(t, url, shares, name)];
  const breaks = [];
  other.addEventListener("state", ({ detail }) => detail === "waiting" && breaks.push(detail));
  await until(other, is("online"));
  await other.post("hi");
  await until(one, ({ messages }) => messages.length === 1);
  await until(other, ({ messages }) => messages.length === 1);
  assert.deepEqual(breaks, []);
});

test("tabs show the pause of their leader, and its refusals", async (t) => {
  const first = await serve(t);
  const shares = tabbed();
  const [leader, tab] = [join_(t, first.url, shares), join_(t, first.url, shares)];
  await until(tab, is("online"));
  await first.kill();
  await until(tab, is("waiting"));
  assert.equal(typeof tab.snapshot().retryAt, "number");
  const post = tab.post("later");
  await serve(t, first);
  await post;
  await until(leader, ({ messages }) => messages.length === 3);
  await assert.rejects(tab.post(""), Rejected);
  const [{ label }] = await until(leader, ({ outbox }) => outbox.length && outbox);
  leader.discard(label);
  await until(tab, ({ outbox }) => !outbox.length);
});

test("posts of a closed tab are sent by the next one", async (t) => {
  const first = await serve(t);
  const shares = tabbed();
  const [, tab] = [join_(t, first.url, shares), join_(t, first.url, shares)];
  await until(tab, is("online"));
  await first.kill();
  await until(tab, is("waiting"));
  tab.post("from the closed tab").catch(() => {});
  tab.stop();
  const second = await serve(t, first);
  const next = join_(t, second.url, shares);
  await until(next, ({ messages }) => messages.length === 3);
  assert.equal(texts(next)[2], "from the closed tab");
});
