// Doubles for a client without a network: its WebSocket, its window and document, and a clock that tests move.
import { Client } from "../../../chatd/static/chatd.js";

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
  receive(frame) {
    this.onmessage({ data: typeof frame === "string" ? frame : JSON.stringify(frame) });
  }
}
export const turn = () => new Promise((resolve) => setImmediate(resolve));

/** A room that connects, over sockets that the test answers. Its pauses are half of what they may be. */
export async function start(t, options) {
  const [window, document] = [new EventTarget(), Object.assign(new EventTarget(), { hidden: false })];
  Object.assign(globalThis, { document, addEventListener: window.addEventListener.bind(window) });
  t.mock.timers.enable({ apis: ["setTimeout", "setInterval", "Date"], now: 1_700_000_000_000 });
  t.mock.method(Math, "random", () => 0.5);
  Socket.all = [];
  const client = new Client("http://server", { username: "ann", WebSocket: Socket, locks: null, ...options });
  const room = client.room("a");
  t.after(() => {
    client.stop();
    delete globalThis.document;
    delete globalThis.addEventListener;
  });
  await turn();
  const newest = () => Socket.all.at(-1);
  const states = [];
  const events = { history: [], entries: [], older: [] };
  room.addEventListener("state", () => states.push(room.snapshot()));
  for (const [type, list] of Object.entries(events)) room.addEventListener(type, ({ detail }) => list.push(detail));
  return {
    room,
    window,
    document,
    sockets: Socket.all,
    states,
    events,
    socket: newest,
    sent: () => Socket.all.flatMap(({ sent }) => sent),
    /** The ids with which the room has connected. */
    connects: () => Socket.all.map(({ url }) => new URL(url).searchParams.get("last_event_id") ?? undefined),
    /** Take a frame of the server, on a connection that is open. */
    receive(frame) {
      newest().onopen();
      newest().receive(frame);
    },
    /** Lose the connection, after it was open. */
    lose(code = 1006, reason = "") {
      newest().onopen();
      newest().onclose({ code, reason });
    },
    /** Let time pass. */
    async pass(seconds) {
      for (let left = Math.round(seconds * 10); left > 0; left -= 1) {
        t.mock.timers.tick(100);
        await turn();
      }
    },
  };
}
export const said = (username, message) => ({ username, message, timestamp: "2026-01-01T00:00:00.000Z" });
export const history = (id, ...messages) => ({ type: "history", id, data: messages.map((text) => said("ann", text)) });
export const message = (id, text, more) => ({ type: "message", id, data: said("bob", text), ...more });

/** A room that has the entries 1 and 2. */
export async function online(t, options) {
  const room = await start(t, options);
  room.receive({ ...history("abcd-2", "one", "two"), more: true });
  return room;
}
