// Real servers for the tests of chatd.js, and a proxy that cuts connections. test_chatd_js.py runs the tests.
import { spawn } from "node:child_process";
import { mkdtemp, rm } from "node:fs/promises";
import { createServer, connect } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";

/** Start a server, and return its port, its URL and how to end it. For a restart, give the store's folder. */
export async function serve(test, { folder, port = 0, options = [] } = {}) {
  if (!folder) {
    folder = await mkdtemp(join(tmpdir(), "chatd-js-"));
    test.after(() => rm(folder, { recursive: true, force: true }));
  }
  const [program, ...first] = JSON.parse(process.env.CHATD_TEST_COMMAND);
  const listen = `--listen=tcp:${port}:interface=127.0.0.1`;
  const rest = ["-n", "--pidfile=", "chatd", listen, "--admin=", "--rate=0", "--drain=1", ...options];
  const child = spawn(program, [...first, ...rest], { cwd: folder, stdio: ["ignore", "pipe", "inherit"] });
  const ended = new Promise((resolve) => child.on("exit", resolve));
  let log = "";
  await new Promise((resolve, reject) => {
    child.stdout.on("data", (data) => /ready, with the log/.test((log += data)) && resolve());
    child.on("exit", () => reject(new Error(log)));
  });
  const found = Number(/ChatFactory starting on (\d+)/.exec(log)[1]);
  const stop = (signal) => async () => {
    child.kill(signal);
    await ended;
  };
  test.after(stop("SIGKILL"));
  const url = `http://127.0.0.1:${found}`;
  return { folder, port: found, url, kill: stop("SIGKILL"), stop: stop("SIGTERM") };
}

/** Read all messages of a room. */
export async function stored(url, room = "main") {
  const all = [];
  for (let query = ""; ; ) {
    const page = await (await fetch(`${url}/rooms/${room}/messages?limit=100${query}`)).json();
    all.unshift(...page.data);
    if (!page.more) return all;
    const [epoch, number] = page.id.split("-");
    query = `&before=${epoch}-${number - page.data.length + 1}`;
  }
}

/** A source of numbers between 0 and 1 that a seed determines (mulberry32). */
export function seeded(seed) {
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let mixed = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** A proxy before a port. `filter(data, up)` returns the bytes to pass on, or null for none.
 * With fewer bytes, or undefined, it cuts the connection. */
export async function proxy(test, target, filter) {
  const sockets = new Set();
  const server = createServer((client) => {
    const upstream = connect(target(), "127.0.0.1");
    const cut = () => {
      client.destroy();
      upstream.destroy();
    };
    for (const [from, to, up] of [
      [client, upstream, true],
      [upstream, client, false],
    ]) {
      sockets.add(from);
      from.on("data", (data) => {
        const passed = filter(data, up);
        if (passed === null) return;
        if (passed?.length) to.write(passed);
        if (passed?.length !== data.length) cut();
      });
      from.on("error", cut);
      from.on("close", cut);
    }
  });
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  const cutAll = () => sockets.forEach((socket) => socket.destroy());
  test.after(() => {
    cutAll();
    server.close();
  });
  return { url: `http://127.0.0.1:${server.address().port}`, cutAll };
}

/** Wait until a condition holds, which is checked at each change of a room. */
export function until(room, condition) {
  return new Promise((resolve) => {
    const look = () => {
      const value = condition(room.snapshot());
      if (!value) return;
      unsubscribe();
      resolve(value);
    };
    const unsubscribe = room.subscribe(look);
    look();
  });
}

/** A WebSocket that never opens, as behind a proxy that blocks them. */
export class Blocked {
  constructor() {
    setTimeout(() => this.onclose?.({ code: 1006, reason: "" }));
  }
  close() {}
}

/** A storage of the outbox that outlives a client, as IndexedDB outlives a page. */
export function memory() {
  const posts = new Map();
  let empty = () => {};
  return {
    posts,
    emptied: () => new Promise((resolve) => (posts.size ? (empty = resolve) : resolve())),
    list: async (key) => [...posts.values()].filter((post) => post.key === key),
    put: async (post) => posts.set(post.label, structuredClone(post)),
    delete: async (label) => {
      posts.delete(label);
      if (!posts.size) empty();
    },
  };
}

/** Web Locks and an outbox for the tabs of one test. */
export function tabbed() {
  const queue = [];
  let held = false;
  const grant = async () => {
    if (held || !queue.length) return;
    held = true;
    const { call, resolve } = queue.shift();
    await call();
    held = false;
    resolve();
    grant();
  };
  const locks = {
    request: (name, { signal }, call) =>
      new Promise((resolve, reject) => {
        const entry = { call, resolve };
        queue.push(entry);
        signal.addEventListener("abort", () => {
          if (queue.includes(entry)) queue.splice(queue.indexOf(entry), 1);
          reject(signal.reason);
        });
        queueMicrotask(grant);
      }),
  };
  return { locks, storage: memory() };
}
