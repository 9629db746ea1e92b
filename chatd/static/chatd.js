/**
 * chatd.js, the client of a chatd server: see docs/clients.md, docs/protocol.md, and chatd.d.ts for the types.
 *
 * A room is a log, and a client is a cursor in it. Frames arrive by a WebSocket, by a stream of events where none
 * opens, or from another tab. One tab, the leader, holds a Web Lock. It alone is connected, and answers the others as a
 * server does. All tabs have the same outbox. The leader sends it, one post at a time to keep the order, and after each
 * break again under the same labels, so that the server stores each post once.
 */
const ANSWER = 10; // seconds, as all of these
const IDLE = 45; // the silence after which the server is probed
const TYPING = 5;
const STREAMS = 600; // no WebSocket is tried so long after one that did not open
const PROBE = { type: "history", limit: 1, label: "probe" };

export class Rejected extends Error {
  constructor(message, code) {
    super(message);
    this.code = code;
  }
}
export class ClientStopped extends Error {}

const epochOf = (id) => id?.split("-")[0];
const numberOf = (id) => Number(id?.split("-")[1] ?? 0);
const shift = (id, by) => `${epochOf(id)}-${numberOf(id) + by}`;
const follows = (id, other) => epochOf(id) !== epochOf(other) || numberOf(id) > numberOf(other);
const temporary = (status) => status >= 500 || [408, 425, 429].includes(status);

function entriesOf({ id: end, data, replaces, replaced, removed }) {
  return data.map((one, place) => {
    const id = shift(end, place + 1 - data.length);
    const n = numberOf(id);
    return { id, data: one, replaces: replaces?.[n], replaced: replaced?.[n], removed: removed?.includes(n) };
  });
}

export class Log {
  entries = [];
  constructor(last) {
    this.last = last;
    this.more = !!last;
  }
  replace({ id, more, entries }) {
    Object.assign(this, { entries, more: !!more, last: id });
  }
  append(entries) {
    const fresh = entries.filter(({ id }) => follows(id, this.last));
    if (this.last && fresh.length && fresh[0].id !== shift(this.last, 1))
      throw new Error(`${fresh[0].id} does not follow ${this.last}`);
    this.last = fresh.at(-1)?.id ?? this.last;
    this.entries.push(...fresh);
    for (const entry of fresh) this.#edit(entry);
    return fresh;
  }
  /** Put the text of an edit in place of the old one; a removal also erases the earlier edits. */
  #edit({ id, data, replaces, removed }) {
    if (!replaces) return;
    const { entries } = this;
    const change = (place, fields) => {
      const { username, timestamp } = entries[place].data;
      entries[place] = { ...entries[place], ...fields, removed, data: { ...data, username, timestamp } };
    };
    const place = numberOf(replaces) - numberOf(this.first);
    if (entries[place] && follows(id, entries[place].replaced)) change(place, { replaced: id });
    if (removed) entries.forEach((entry, place) => entry.replaces === replaces && change(place));
  }
  get first() {
    return this.entries[0]?.id ?? shift(this.last, 1);
  }
  prepend({ id, more, entries }) {
    if (entries.length && shift(this.first, -1) !== id) return false;
    this.more = more;
    this.entries.unshift(...entries);
    for (const entry of [...this.entries]) this.#edit(entry);
    return true;
  }
  after(id) {
    const known = this.entries.length + numberOf(id) - numberOf(this.last);
    const resumed = epochOf(id) === epochOf(this.last) && known >= 0;
    const entries = this.entries.slice(resumed ? known : 0);
    return { type: "history", id: this.last, resumed, more: this.more, entries };
  }
}

const timeIn = (seconds) => Date.now() + seconds * 1000;
const unique = () => crypto.getRandomValues(new Uint32Array(4)).join("-");

/** The outbox in IndexedDB; without that, all its promises reject. */
function database() {
  const done = (request) =>
    new Promise((resolve, reject) => {
      request.onsuccess = () => resolve(request.result);
      request.onerror = () => reject(request.error);
    });
  const open = async () => {
    const request = indexedDB.open("chatd", 1); // throws in Node.js, in some frames, and where storage is blocked
    request.onupgradeneeded = () => request.result.createObjectStore("outbox", { keyPath: "label" });
    return done(request);
  };
  const opened = open();
  const run = async (method, given) =>
    done((await opened).transaction("outbox", "readwrite").objectStore("outbox")[method](given));
  return {
    list: async (key) => (await run("getAll")).filter((post) => post.key === key),
    put: (post) => run("put", post),
    delete: (label) => run("delete", label),
  };
}

/** The seconds until a minute before the end of a token, or until half of its time; undefined if it names none. */
function secondsToRenewal(token) {
  try {
    const { exp } = JSON.parse(atob(token.split(".")[1].replaceAll("-", "+").replaceAll("_", "/")));
    const left = exp - Date.now() / 1000;
    return left > 0 ? Math.max(left - 60, left / 2, 1) : undefined;
  } catch {
    return undefined;
  }
}

/**
 * Join the room at a URL.
 * @param {string} url
 * @param {import("./chatd.d.ts").Options} options
 * @returns {import("./chatd.d.ts").Room}
 */
function join(url, options) {
  const { username, token, signal, events = "presence,typing", WebSocket = globalThis.WebSocket } = options;
  const { locks = globalThis.navigator?.locks, storage = database() } = options;
  const log = new Log(options.last);
  const key = `chatd ${url} ${username}`; // of the outbox and the tabs
  const channel = locks && new BroadcastChannel(key);
  const answers = new Map(); // the promises of this tab's posts, by label
  const settled = new Map(); // the labels of posts that have left the outbox, and their ids
  const typists = new Set();
  const timers = {};
  const stopped = new AbortController();
  let visit; // aborted when the page is left
  let connection = new AbortController(); // aborted at its end
  let status = { state: "connecting" };
  let leads = false;
  let outbox = [];
  let sent; // the label of the newest post that was sent
  let attempts = 0;
  let paced = false; // the server named the time of the next attempt
  let streams = 0; // the time until which no WebSocket is tried
  let typed = 0; // the time of the newest typing notice
  let beaten = Date.now();
  let send, error, presence, shown, bearer, paging, greeting;

  const is = (state) => status.state === state;
  const tell = (...note) => channel?.postMessage(note);
  const ignore = () => {};
  function emit(type, detail) {
    shown = undefined;
    for (const name of [type, "change"]) room.dispatchEvent(new CustomEvent(name, { detail }));
  }
  const change = () => new Promise((resolve) => room.addEventListener("change", resolve, { once: true }));
  /** Call a function later, unless the connection ends before. */
  function after(name, seconds, call) {
    clearTimeout(timers[name]);
    timers[name] = setTimeout(call, Math.min(seconds, 86400) * 1000);
  }

  // Connections

  function setStatus(next) {
    if (error) return;
    status = next;
    if (is("rejected")) error = new Rejected(status.reason, status.code);
    if (is("stopped")) error = new ClientStopped("the room was stopped");
    if (leads && !error) tell("follow", status); // the next leader may have a better token
    if (error) {
      disconnect();
      clearInterval(beat);
      for (const end of [visit, stopped]) end?.abort();
      channel?.close();
      for (const { reject } of answers.values()) reject(error);
    }
    emit("state", status.state);
  }
  function disconnect() {
    connection.abort();
    connection = new AbortController();
    Object.values(timers).forEach(clearTimeout);
    typists.clear();
    presence = sent = undefined;
  }
  function start() {
    disconnect();
    setStatus({ state: "connecting" });
    if (error) return; // a listener has stopped the room
    if (!leads) return tell("hello", (greeting = unique()), log.last, unsent());
    after("watch", ANSWER, silent);
    connect(connection.signal);
  }
  /**
   * Take the end of a connection or of an attempt, and reconnect later if that may succeed.
   * @param {{reason: string, code?: number, retryAfter?: string | number}} ending
   */
  function lost({ reason, code, retryAfter }) {
    if (is("connecting")) streams = 0;
    const expired = code === 1008 && reason.includes("token has expired");
    const refused = [1002, 1003, 1007, 1008, 1009].includes(code) || (code >= 400 && !temporary(code));
    if (refused && !expired) return setStatus({ state: "rejected", reason, code });
    disconnect();
    paced = Number(retryAfter) > 0;
    const wait = paced ? Number(retryAfter) : Math.random() * Math.min(2 ** attempts++, 30);
    after("start", wait, start);
    setStatus({ state: "waiting", reason, retryAt: timeIn(wait) });
  }
  /** The network, the machine or the user is back: connect soon, or check the connection. */
  function wake(soon = Math.random()) {
    if (!leads) tell("wake", soon);
    else if (is("online")) probe();
    else if (is("waiting") && !paced) after("start", soon, start);
  }
  const beat = setInterval(() => {
    if (Date.now() - beaten > 15_000) wake(); // the machine slept
    beaten = Date.now();
  }, 10_000);
  const heard = () => leads && after("watch", IDLE, probe);
  function probe() {
    after("watch", ANSWER, silent);
    send(PROBE);
  }
  function silent() {
    const mute = is("connecting") && !streams; // some proxies never answer a WebSocket
    lost({ reason: "the server did not answer in time" });
    if (mute) streams = timeIn(STREAMS);
  }
  function connect(signal) {
    const end = (ending) => signal.aborted || lost(ending);
    const fail = ({ message }) => end({ reason: message });
    const query = encode({ events, username, last_event_id: log.last });

    function open() {
      const protocols = bearer ? ["chat.v1", `bearer.${bearer}`] : ["chat.v1"];
      const socket = new WebSocket(`${url.replace("http", "ws")}?${query}`, protocols);
      let opened = false;
      signal.onabort = () => socket.close();
      send = (frame) => socket.send(JSON.stringify(frame));
      socket.onopen = () => {
        opened = true;
        renewLater();
      };
      socket.onmessage = ({ data }) => signal.aborted || receive(data);
      socket.onerror = ignore;
      socket.onclose = ({ code, reason }) => {
        const retryAfter = /retry_after=([\d.]+)/.exec(reason)?.[1];
        if (opened || signal.aborted) return end({ code, reason: `closed with ${code} ${reason}`, retryAfter });
        streams = timeIn(STREAMS);
        stream().catch(fail); // HTTP shows the status that a WebSocket conceals
      };
    }
    function renewLater() {
      const seconds = typeof token === "function" && secondsToRenewal(bearer);
      const renew = async () => {
        bearer = await newToken().catch(() => bearer);
        if (signal.aborted) return;
        send({ type: "token", token: bearer, label: "token" });
        renewLater();
      };
      if (seconds) after("renew", seconds, renew);
    }
    async function stream() {
      send = (frame) => deliver(frame).catch(fail);
      const used = bearer;
      const { ok, status, headers, body } = await request(`/events?${query}`, { signal });
      if (ok && bearer !== used && WebSocket) return body.cancel().then(open); // the token was refused, and not the way
      if (!ok) return end({ code: status, reason: `refused with ${status}`, retryAfter: headers.get("Retry-After") });
      const reader = body.pipeThrough(new TextDecoderStream()).getReader();
      for (let text = "", retryAfter; ; ) {
        const { done, value } = await reader.read();
        if (done) return end({ reason: "the stream ended", retryAfter });
        const lines = (text + value).split("\n");
        text = lines.pop();
        heard();
        for (const line of lines) {
          if (signal.aborted) return;
          if (line.startsWith("data: ")) receive(line.slice(6));
          if (line.startsWith("retry: ") && is("online")) retryAfter = Number(line.slice(7)) / 1000;
        }
      }
    }
    /** Send a frame over HTTP, and take the answer as a frame. There is no way for typing notices. */
    async function deliver(frame) {
      const { type, id, label } = frame;
      if (!label) return;
      if (frame === PROBE) {
        const { id } = await page({ limit: 1 });
        if (!signal.aborted && !follows(id, log.last)) heard(); // a stream that stays behind is lost
        return;
      }
      const headers = { "Content-Type": "application/json", "Idempotency-Key": label };
      const response = await (type === "remove"
        ? request(`/messages/${id}`, { method: "DELETE", signal, headers })
        : request("/messages", { method: "POST", signal, headers, body: JSON.stringify(frame) }));
      const { ok, status } = response;
      if (status === 401) return end({ code: status, reason: `refused with ${status}` });
      const answer = await response.json();
      const code = temporary(status) ? "UNAVAILABLE" : answer.code;
      const retry_after = response.headers.get("Retry-After") ?? 1;
      // The answer may overtake the entry, which comes in the stream.
      while (ok && !signal.aborted && follows(answer.id, log.last)) await change();
      if (!signal.aborted) receive(ok ? answer : { type: "error", label, code, message: answer.detail, retry_after });
    }
    newToken()
      .then((given) => {
        bearer = given;
        if (!signal.aborted) return WebSocket && Date.now() > streams ? open() : stream();
      })
      .catch(fail);
  }
  const newToken = async () => (typeof token === "function" ? token() : token);
  const encode = (fields) => new URLSearchParams(Object.entries(fields).filter(([, value]) => value));
  /** Send an HTTP request with the token, and again with a new one if that is refused. */
  async function request(path, init, again) {
    if (again || !bearer) bearer = await newToken();
    const headers = { ...init?.headers, ...(bearer && { Authorization: `Bearer ${bearer}` }) };
    const limit = AbortSignal.timeout(ANSWER * 1000);
    const response = await fetch(url + path, { cache: "no-store", signal: limit, ...init, headers });
    return response.status === 401 && bearer && !again ? request(path, init, true) : response;
  }

  // Frames

  function receive(given) {
    try {
      const frame = typeof given === "string" ? JSON.parse(given) : given;
      heard();
      handlers[frame.type]?.(frame);
      if (leads && frame.type !== "history") tell("receive", frame);
    } catch ({ message }) {
      lost({ reason: `the server broke the protocol: ${message}` });
    }
  }
  const handlers = {
    message({ type, ...entry }) {
      if (is("online")) append([entry]);
      else if (leads) throw new Error("a message before the history");
    },
    history(frame) {
      if (frame.label) return; // the answer to a probe
      if (is("online") && frame.resumed !== false) throw new Error("a second history is no fresh start");
      const entries = frame.entries ?? entriesOf(frame);
      if (frame.resumed && log.last) append(entries);
      else {
        log.replace({ ...frame, entries });
        emit("history", { entries: [...entries], more: log.more });
      }
      attempts = 0;
      setStatus({ state: "online" }); // after a fresh start too, at which the other tabs begin again
      resend(); // the acks of a lost log never arrive
    },
    ack({ label, id, duplicate = false }) {
      drop(label, id);
      settle(label, "resolve", { id, duplicate });
    },
    error({ label, message, code, retry_after = 1 }) {
      if (code === "RATE_LIMITED" || code === "UNAVAILABLE") return after("send", retry_after, resend);
      const post = find(label);
      if (!post) return;
      sent = undefined;
      keep({ ...post, error: { message, code } });
      settle(label, "reject", new Rejected(message, code));
    },
    presence({ data: { count, users, join, leave } }) {
      const here = presence?.users?.filter((name) => !leave?.includes(name));
      presence = { count, users: join ? here?.concat(join).sort() : users };
      emit("presence", presence);
    },
    typing({ data }) {
      for (const name of data.users) {
        typists.add(name);
        after(`typing ${name}`, TYPING, () => typists.delete(name) && showTyping());
      }
      showTyping();
    },
  };
  const showTyping = () => emit("typing", [...typists]);
  function append(given) {
    const entries = log.append(given);
    for (const { data } of entries) typists.delete(data.username);
    if (entries.length) emit("entries", { entries });
  }

  // Posts

  const find = (label) => outbox.find((post) => post.label === label);
  const unsent = () => outbox.filter(({ error }) => !error);
  /** Add posts, or put them in place of those with the same labels. */
  function add(posts) {
    const all = new Map([...outbox, ...posts].map((post) => [post.label, post]));
    outbox = [...all.values()].filter(({ label }) => !settled.has(label)).sort((one, other) => one.at - other.at);
    emit("outbox", outbox);
    sendNext();
  }
  function keep(post) {
    storage.put(post).catch(ignore);
    add([post]);
  }
  function drop(label, id) {
    settled.set(label, id);
    storage.delete(label).catch(ignore);
    add([]);
  }
  function sendNext() {
    const [next] = unsent();
    if (!leads || !is("online") || !next || next.label === sent) return;
    sent = next.label;
    after("watch", ANSWER, probe);
    send(next.frame);
  }
  function resend() {
    sent = undefined;
    sendNext();
  }
  function settle(label, how, outcome) {
    answers.get(label)?.[how](outcome);
    answers.delete(label);
  }
  /** Keep a post until its answer, and return the promise of that. */
  function submit(post) {
    const answer = new Promise((resolve, reject) => answers.set(post.label, { resolve, reject }));
    answer.catch(ignore); // the snapshot shows it too, so nobody has to wait for it
    if (error) settle(post.label, "reject", error);
    else {
      tell("add", [post]);
      keep(post);
    }
    return answer;
  }
  function ask(fields) {
    const label = unique();
    const at = Math.max(Date.now(), (outbox.at(-1)?.at ?? 0) + 1);
    return submit({ label, key, at, since: log.last, frame: { ...fields, label } });
  }
  /** Return the posts whose entries have not arrived. An ack follows its entry, or gets lost on the way. */
  function missing() {
    const taken = new Set(settled.values());
    return outbox.filter(({ error, since, frame }) => {
      const same = ({ id, data, replaces }) =>
        data.message === frame.message &&
        data.username === frame.username &&
        replaces === frame.replaces &&
        !taken.has(id);
      const own = !error && log.after(since).entries.find(same);
      if (own) taken.add(own.id);
      return !own;
    });
  }
  function discard(label) {
    drop(label);
    settle(label, "reject", new ClientStopped("the post was discarded"));
  }

  // Tabs

  function hello(from, last, posts) {
    add(posts);
    if (!is("online")) return tell("follow", status);
    tell("welcome", from, log.after(last));
    if (presence) tell("receive", { type: "presence", data: presence });
  }
  const welcome = (to, frame) => to === greeting && receive(frame);
  function follow(next) {
    if (next.state === "online") return start();
    disconnect();
    setStatus(next);
  }
  function lead() {
    leads = true;
    start();
  }
  function enter() {
    visit = new AbortController();
    const { signal } = visit;
    const hold = (resolve) => {
      signal.onabort = resolve;
      lead();
    };
    if (!channel) return lead();
    locks.request(key, { signal }, () => new Promise(hold)).catch(() => signal.aborted || lead());
    start();
  }
  function leave() {
    visit.abort();
    leads = false;
    follow({ state: "waiting" });
  }

  // For the user

  async function page(range = {}) {
    const response = await request(`/messages?${encode(range)}`);
    const frame = await response.json();
    if (!response.ok) throw new Rejected(frame.detail, frame.code ?? response.status);
    return { id: frame.id, more: !!frame.more, entries: entriesOf(frame) };
  }
  const room = Object.assign(new EventTarget(), {
    username,
    post: (message, fields) => ask({ username, message, ...fields }),
    edit: (id, message) => ask({ username, message, replaces: id }),
    remove: (id) => ask({ type: "remove", id }),
    retry: (label) => find(label)?.error && submit({ ...find(label), error: undefined }),
    discard(label) {
      tell("discard", label);
      discard(label);
    },
    page,
    async older(limit = 50) {
      const add = (page) => log.prepend(page) && emit("older", page);
      if (log.more) paging ??= page({ before: log.first, limit }).then(add).finally(() => (paging = undefined));
      await paging;
    },
    typing() {
      if (!leads) return tell("typing");
      if (Date.now() - typed < 3000 || !is("online")) return;
      typed = Date.now();
      send({ type: "typing", username });
    },
    reconnect: () => wake(0),
    snapshot() {
      if (shown) return shown;
      const messages = log.entries.filter(({ replaces }) => !replaces);
      const { last, more } = log;
      return (shown = { ...status, error, messages, last, more, outbox: missing(), presence, typing: [...typists] });
    },
    subscribe(call) {
      room.addEventListener("change", call);
      return () => room.removeEventListener("change", call);
    },
    async *[Symbol.asyncIterator]() {
      for (let seen; !error; ) {
        const fresh = log.entries.slice(log.entries.findLastIndex(({ id }) => id === seen) + 1);
        if (!fresh.length) await change();
        for (const entry of fresh) {
          seen = entry.id;
          yield entry;
        }
      }
      if (is("rejected")) throw error;
    },
    stop: () => setStatus({ state: "stopped" }),
  });

  const on = (target, type, call) => target?.addEventListener?.(type, call, { signal: stopped.signal });
  const leader = { add, discard, hello, wake, typing: room.typing };
  const follower = { add, discard, welcome, follow, receive };
  on(channel, "message", ({ data: [name, ...given] }) => (leads ? leader : follower)[name]?.(...given));
  on(globalThis, "online", () => wake());
  on(globalThis.document, "visibilitychange", () => document.hidden || wake());
  on(globalThis, "pagehide", leave);
  on(globalThis, "pageshow", ({ persisted }) => persisted && enter());
  on(signal, "abort", room.stop);
  storage.list(key).then(add).catch(ignore);
  if (signal?.aborted) room.stop();
  else enter();
  return room;
}

/** A user of one server. */
export class Client {
  /** @param {string} [url] @param {import("./chatd.d.ts").Options} [options] */
  constructor(url = globalThis.location.origin, options = {}) {
    this.url = url.replace(/^ws/, "http").replace(/\/$/, "");
    this.options = options;
    this.rooms = new Map();
  }
  /** Join a room, or return it if this client is in it. @returns {import("./chatd.d.ts").Room} */
  room(name = "main") {
    const known = this.rooms.get(name);
    if (known && !known.snapshot().error) return known;
    const room = join(`${this.url}/rooms/${name}`, this.options);
    this.rooms.set(name, room);
    return room;
  }
  stop() {
    for (const room of this.rooms.values()) room.stop();
  }
}
