// What chatd.js does in a page, with doubles of its window, its document and the network.
import assert from "node:assert/strict";
import { test } from "node:test";
import { Client } from "../../../chatd/static/chatd.js";

const HISTORY = { type: "history", id: "abcd-2", data: [] };

class Socket {
  static all = [];
  sent = [];
  closed = false;
  constructor(url, protocols) {
    Object.assign(this, { url, protocols });
    Socket.all.push(this);
  }
  send(text) {
    this.sent.push(JSON.parse(text));
  }
  close() {
    this.closed = true;
  }
  /** Open the connection, with an empty history. */
  open() {
    this.onopen();
    this.onmessage({ data: JSON.stringify(HISTORY) });
  }
}
const turn = () => new Promise((resolve) => setImmediate(resolve));

/** A room that is online, and the window and document of its page. */
async function online(t, options) {
  const [window, document] = [new EventTarget(), Object.assign(new EventTarget(), { hidden: false })];
  Object.assign(globalThis, { document, addEventListener: window.addEventListener.bind(window) });
  t.mock.timers.enable({ apis: ["setTimeout"] });
  Socket.all = [];
  const client = new Client("http://server", { username: "ann", WebSocket: Socket, locks: null, ...options });
  const room = client.room("a");
  t.after(() => {
    client.stop();
    delete globalThis.document;
    delete globalThis.addEventListener;
  });
  await turn();
  Socket.all[0].open();
  assert.equal(room.snapshot().state, "online");
  return { room, window, document, socket: Socket.all[0] };
}
const happen = (target, type, fields) => target.dispatchEvent(Object.assign(new Event(type), fields));
const probe = { type: "history", limit: 1, label: "probe" };

test("connection is checked when the network or the page is back", async (t) => {
  const { window, document, socket } = await online(t);
  happen(window, "online");
  happen(document, "visibilitychange");
  document.hidden = true;
  happen(document, "visibilitychange");
  assert.deepEqual(socket.sent, [probe, probe]);
});

test("connection is checked after the machine slept", async (t) => {
  const { socket } = await online(t);
  t.mock.timers.tick(10_000);
  assert.deepEqual(socket.sent, []);
  const now = Date.now;
  t.after(() => (Date.now = now));
  Date.now = () => now() + 3_600_000;
  t.mock.timers.tick(10_000);
  assert.deepEqual(socket.sent, [probe]);
});

test("page in the back/forward cache leaves, and resumes when it is back", async (t) => {
  const { room, window, socket } = await online(t);
  happen(window, "pagehide");
  assert.equal(socket.closed, true);
  happen(window, "pageshow", { persisted: false });
  await turn();
  assert.equal(Socket.all.length, 1);
  happen(window, "pageshow", { persisted: true });
  await turn();
  assert.match(Socket.all[1].url, /^ws:\/\/server\/rooms\/a\?.*last_event_id=abcd-2$/);
  assert.equal(room.snapshot().state, "connecting");
});

test("token goes into a subprotocol, and never into the address", async (t) => {
  const { socket } = await online(t, { token: async () => "x.y.z" });
  assert.deepEqual(socket.protocols, ["chat.v1", "bearer.x.y.z"]);
  assert.equal(socket.url.includes("x.y.z"), false);
});

test("frames of an old connection are ignored", async (t) => {
  const { room, window, socket } = await online(t);
  happen(window, "pagehide");
  happen(window, "pageshow", { persisted: true });
  socket.onmessage({ data: JSON.stringify({ type: "message", id: "abcd-3", data: { username: "bob", message: "late" } }) });
  socket.onclose({ code: 1008, reason: "" });
  assert.deepEqual(room.snapshot().messages, []);
  assert.equal(room.snapshot().state, "connecting");
});

test("typing is shown once in three seconds", async (t) => {
  const { room, socket } = await online(t);
  room.typing();
  room.typing();
  const now = Date.now;
  t.after(() => (Date.now = now));
  Date.now = () => now() + 3000;
  room.typing();
  assert.deepEqual(socket.sent, [1, 2].map(() => ({ type: "typing", username: "ann" })));
});

test("post that cannot be stored on this machine is sent all the same", async (t) => {
  const fail = async () => {
    throw new Error("no space");
  };
  const { room, socket } = await online(t, { storage: { list: fail, put: fail, delete: fail } });
  const post = room.post("hi");
  const [{ label }] = socket.sent;
  socket.onmessage({ data: JSON.stringify({ type: "ack", label, id: "abcd-3" }) });
  assert.deepEqual(await post, { id: "abcd-3", duplicate: false });
});
