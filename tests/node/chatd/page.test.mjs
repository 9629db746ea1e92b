// What chatd.js does in a page, with doubles of its window, its document and the network.
import assert from "node:assert/strict";
import { test } from "node:test";
import { history, message, online, start, turn } from "./doubles.mjs";

const happen = (target, type, fields) => target.dispatchEvent(Object.assign(new Event(type), fields));
const probe = { type: "history", limit: 1, label: "probe" };

test("connection is checked when the network or the page is back", async (t) => {
  const { window, document, sent } = await online(t);
  happen(window, "online");
  happen(document, "visibilitychange");
  document.hidden = true;
  happen(document, "visibilitychange");
  assert.deepEqual(sent(), [probe, probe]);
});

test("connection is checked after the machine slept", async (t) => {
  const { sent, pass } = await online(t);
  await pass(10);
  assert.deepEqual(sent(), []);
  const now = Date.now;
  t.mock.method(Date, "now", () => now() + 3_600_000);
  await pass(10);
  assert.deepEqual(sent(), [probe]);
});

test("page in the back/forward cache leaves, and resumes when it is back", async (t) => {
  const { room, window, sockets } = await online(t);
  happen(window, "pagehide");
  assert.equal(sockets[0].closed, true);
  happen(window, "pageshow", { persisted: false });
  await turn();
  assert.equal(sockets.length, 1);
  happen(window, "pageshow", { persisted: true });
  await turn();
  assert.match(sockets[1].url, /^ws:\/\/server\/rooms\/a\?.*last_event_id=abcd-2$/);
  assert.equal(room.snapshot().state, "connecting");
});

test("token goes into a subprotocol, and never into the address", async (t) => {
  const { sockets } = await start(t, { token: async () => "x.y.z" });
  assert.deepEqual(sockets[0].protocols, ["chat.v1", "bearer.x.y.z"]);
  assert.equal(sockets[0].url.includes("x.y.z"), false);
});

test("frames of an old connection are ignored", async (t) => {
  const { room, window, sockets } = await online(t);
  happen(window, "pagehide");
  happen(window, "pageshow", { persisted: true });
  sockets[0].receive(message("abcd-3", "late"));
  sockets[0].onclose({ code: 1008, reason: "" });
  assert.equal(room.snapshot().messages.length, 2);
  assert.equal(room.snapshot().state, "connecting");
});

test("typing is shown once in three seconds", async (t) => {
  const { room, sent, pass } = await online(t);
  room.typing();
  room.typing();
  await pass(3);
  room.typing();
  assert.deepEqual(sent(), [1, 2].map(() => ({ type: "typing", username: "ann" })));
});

test("post that cannot be stored on this machine is sent all the same", async (t) => {
  const fail = async () => {
    throw new Error("no space");
  };
  const { room, sent, receive } = await online(t, { storage: { list: fail, put: fail, delete: fail } });
  const post = room.post("hi");
  const [{ label }] = sent();
  receive({ type: "ack", label, id: "abcd-3" });
  assert.deepEqual(await post, { id: "abcd-3", duplicate: false });
});

test("room names its user", async (t) => {
  const { room } = await start(t);
  assert.equal(room.username, "ann");
});

test("frame without locks and databases connects by itself", async (t) => {
  const denied = () => {
    throw new Error("denied");
  };
  globalThis.indexedDB = { open: denied };
  t.after(() => delete globalThis.indexedDB);
  const { room } = await online(t, { locks: { request: async () => denied() } });
  assert.equal(room.snapshot().state, "online");
});
