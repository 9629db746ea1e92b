/**
 * chatd.js, the client of a chatd server for browsers and Node. docs/clients.md explains its use, docs/protocol.md the
 * protocol, and chatd.d.ts the types.
 *
 * A room is a log of numbered entries, and a client is a cursor in it. `createCore` makes that cursor: a state machine
 * that takes frames and events, and tells its host what to do. It has no I/O, clock or randomness. `createRoom` is the
 * host: it connects, keeps time and stores the outbox. Three links carry the same frames: a WebSocket, a stream of
 * events with POST where no WebSocket opens, and another tab. The tab that holds the Web Lock is the leader. It alone
 * is connected, and answers the other tabs as a server does.
 *
 * A post stays in the outbox, even over reloads, until the server answers. Each connection sends it again under its
 * first label, so the server stores it once. One post is in flight at a time, so posts keep their order.
 */
/** @typedef {import("./chatd.d.ts").Entry} Entry */

const CONNECT = 10; // seconds, as all of these: the limit of an attempt to connect
const ANSWER = 10; // the limit of an answer
const IDLE = 45; // the silence after which the client probes the server
const SLEPT = 5; // a timer that is so late shows that the machine slept
const TYPING = 5; // how long a name is shown as typing
const STREAM = 600; // how long a stream lasts until a WebSocket is tried again
const FINAL_CODES = [1002, 1003, 1007, 1008, 1009]; // they blame the client, which would fail again
const TEMPORARY = [408, 425, 429, 500, 502, 503, 504];
const PROBE = "probe"; // a label that no post has

/** The refusal of a client or a request; `code` is that of the error or the close frame, or the HTTP status. */
export class Rejected extends Error {
  constructor(message, code) {
    super(message);
    this.code = code;
  }
}
/** The end of a room, or of a post, by its user. The server may have stored the post. */
export class ClientStopped extends Error {}

const epochOf = (id) => id?.split("-")[0];
const numberOf = (id) => (id ? Number(id.split("-")[1]) : 0);
const before = (id, count) => `${epochOf(id)}-${numberOf(id) - count}`;

/** @returns {Entry[]} the entries of a history frame */
export function entriesOf({ id: end, data, replaces = {}, replaced = {}, removed = [] }) {
  return data.map((one, place) => {
    const id = before(end, data.length - 1 - place);
    const n = numberOf(id);
    return { id, data: one, replaces: replaces[n], replaced: replaced[n], removed: removed.includes(n) };
  });
}

/** Return the seconds until a JSON Web Token should be renewed; undefined if it states no time or has expired. */
export function secondsToRenewal(token, now) {
  try {
    const left = JSON.parse(atob(token.split(".")[1].replace(/-/g, "+").replace(/_/g, "/"))).exp - now;
    return left > 0 ? Math.min(Math.max(left - Math.min(60, left / 2), 1), 86400) : undefined;
  } catch {
    return undefined;
  }
}

/**
 * Make the state machine of a client in a room, whose last id may be known.
 * @param {import("./chatd.d.ts").Host} host
 * @param {string} [last]
 * @returns {import("./chatd.d.ts").Core}
 */
export function createCore({ now, random, arm, connect, send, close, emit }, last) {
  const view = { state: "connecting", last, entries: [], more: !!last, outbox: [], typing: new Set() };
  const timers = new Map(); // when to call which functions
  const forgets = new Map(); // functions that end the typing of a name
  let attempts = 0;
  let paced = false; // the server named the time of the next attempt
  let probed = false;
  let sent; // the label of the post in flight

  // Time

  const deadline = () => Math.min(...timers.values());
  /** Call a function once, later; undefined cancels that, and so does the end of the connection. */
  function after(seconds, call) {
    timers.delete(call);
    if (seconds !== undefined) timers.set(call, now() + seconds);
    arm(deadline());
  }
  /** Do what is due. */
  function tick() {
    for (const [call, at] of [...timers]) if (at <= now() && timers.delete(call)) call();
  }

  // Connections

  function setState(state) {
    if (view.error) return;
    view.state = state;
    emit("state", state);
  }
  function disconnect() {
    timers.clear();
    view.typing.clear();
    view.presence = sent = undefined;
    close();
  }
  function start() {
    if (view.error) return;
    disconnect();
    probed = true; // a server that stays silent is given up
    after(CONNECT, silent);
    setState("connecting");
    if (!view.error) connect(view.last); // unless a listener has stopped the room
  }
  /** End for good. */
  function end(state, error) {
    if (view.error) return;
    disconnect();
    Object.assign(view, { state, error });
    emit("state", state);
  }
  /** Take the end of a connection or of an attempt, and reconnect later if that may succeed. */
  function lost({ reason, code = 0, retryAfter }) {
    if (view.error) return;
    const expired = code === 1008 && reason.includes("token has expired");
    const refused = code >= 400 && code < 600 && !TEMPORARY.includes(code);
    if (refused || (FINAL_CODES.includes(code) && !expired)) return end("rejected", new Rejected(reason, code));
    disconnect();
    paced = retryAfter !== undefined;
    const wait = retryAfter ?? random() * Math.min(2 ** attempts++, 30);
    after(wait, start);
    emit("disconnect", { reason, wait });
    setState("waiting");
  }
  /** Take the state of the leader, in another tab. */
  function follow({ state, error }) {
    if (state === "online") return start();
    if (error) return end(state, new Rejected(error.message, error.code));
    disconnect();
    setState(state);
  }
  /** The network or the machine is back: connect soon, or check the connection. */
  function wake() {
    if (view.state === "online") probe();
    else if (view.state === "waiting" && !paced) after(random(), start);
  }
  function heard() {
    probed = false;
    after(IDLE, silent);
  }
  function probe() {
    probed = true;
    after(ANSWER, silent);
    send({ type: "history", limit: 1, label: PROBE });
  }
  function silent() {
    if (probed) lost({ reason: "the server did not answer in time" });
    else probe();
  }

  // Frames

  /** Take a frame, as text or parsed, and return it parsed. */
  function receive(text) {
    if (view.error) return undefined;
    try {
      const frame = typeof text === "string" ? JSON.parse(text) : text;
      heard();
      if (view.state !== "online" && frame.type !== "history") throw new Error(`a ${frame.type} before the history`);
      if (handlers[frame.type]) handlers[frame.type](frame);
      else emit(frame.type, frame.data);
      return frame;
    } catch (error) {
      lost({ reason: `the server broke the protocol: ${error.message}` });
      return undefined;
    }
  }
  const handlers = {
    message: ({ type, ...entry }) => append([entry], entry.id),
    history(frame) {
      if (frame.label) return; // the answer to a probe
      const online = view.state === "online";
      if (online && frame.resumed !== false) throw new Error("a second history is no fresh start");
      const entries = frame.entries ?? entriesOf(frame);
      if (frame.resumed && view.last) append(entries, frame.id);
      else {
        Object.assign(view, { entries, more: !!frame.more, last: frame.id });
        emit("history", { entries: [...entries], more: view.more });
      }
      attempts = 0;
      sent = undefined; // the acks of a lost log never arrive
      if (!online) setState("online");
      sendNext();
    },
    ack: (frame) => answered(frame.label, () => discard(frame.label, frame)),
    error: ({ label, message, code, retry_after = 1 }) =>
      answered(label, (post) => {
        if (code === "RATE_LIMITED" || code === "UNAVAILABLE") return after(retry_after, sendNext);
        post.error = { message, code };
        emit("refuse", post);
      }),
    presence({ data: { count, users, join, leave } }) {
      const here = view.presence?.users?.filter((name) => !leave?.includes(name));
      view.presence = { count, users: join ? here?.concat(join).sort() : users };
      emit("presence", view.presence);
    },
    typing({ data }) {
      for (const name of data.users) {
        if (!forgets.has(name)) forgets.set(name, () => view.typing.delete(name) && emit("typing", [...view.typing]));
        view.typing.add(name);
        after(TYPING, forgets.get(name));
      }
      emit("typing", [...view.typing]);
    },
    token() {}, // a new token is in force
  };
  function append(entries, end) {
    if (view.last && before(end, entries.length) !== view.last) throw new Error(`${end} does not follow ${view.last}`);
    view.last = end;
    view.entries.push(...entries);
    for (const entry of entries) {
      edit(entry);
      forgets.get(entry.data.username)?.();
    }
    if (entries.length) emit("entries", { entries });
  }
  /** Put the text of an edit in place of the old one; a removal also erases the earlier edits. */
  function edit({ id, data, replaces, removed }) {
    if (!replaces) return;
    const { entries } = view;
    const change = (place, fields) => {
      const { username, timestamp } = entries[place].data;
      entries[place] = { ...entries[place], ...fields, removed, data: { ...data, username, timestamp } };
    };
    const place = numberOf(replaces) - numberOf(entries[0].id);
    if (entries[place] && numberOf(entries[place].replaced) < numberOf(id)) change(place, { replaced: id });
    if (removed) entries.forEach((entry, place) => entry.replaces === replaces && change(place));
  }
  /** Add an older page, unless it does not end at the oldest entry. */
  function prepend(page) {
    const { entries } = view;
    if (page.entries.length && before(entries[0]?.id ?? before(view.last, -1), 1) !== page.id) return;
    view.more = page.more;
    entries.unshift(...page.entries);
    entries.forEach(edit);
    emit("older", page);
  }
  /** Return the history frame for another tab, which has the entries up to an id; undefined if it has newer ones. */
  function welcome(last) {
    if (epochOf(last) === epochOf(view.last) && numberOf(last) > numberOf(view.last)) return undefined;
    const place = view.entries.findLastIndex(({ id }) => id === last);
    const resumed = last && (place >= 0 || last === view.last);
    const entries = last === view.last ? [] : view.entries.slice(resumed ? place + 1 : -100);
    const more = view.more || entries.length < view.entries.length;
    return { type: "history", id: view.last, resumed, more, entries };
  }

  // Posts

  function post(...posts) {
    const known = view.outbox.map(({ label }) => label);
    view.outbox.push(...posts.filter(({ label }) => !known.includes(label)));
    view.outbox.sort((one, other) => one.at - other.at);
    emit("outbox");
    sendNext();
  }
  /** Remove a post from the outbox. */
  function discard(label, ack) {
    view.outbox = view.outbox.filter((post) => post.label !== label);
    emit("settle", { label, ack });
  }
  function sendNext() {
    const next = view.outbox.find(({ error }) => !error);
    if (!next || sent || view.state !== "online" || timers.has(sendNext)) return;
    sent = next.label;
    after(ANSWER, silent); // a post without an answer leads to a probe
    send(next.frame);
  }
  function answered(label, act) {
    if (sent === label) sent = undefined;
    const post = view.outbox.find((post) => post.label === label);
    if (post) act(post);
    sendNext();
  }

  return { view, start, lost, end, follow, wake, heard, receive, prepend, welcome, post, discard, after, deadline, tick };
}

/** The outbox in IndexedDB. */
function database() {
  const settle = (ask) =>
    new Promise((resolve, reject) => {
      const request = ask();
      request.onsuccess = () => resolve(request.result);
      request.onerror = () => reject(request.error);
      request.onupgradeneeded = () => request.result.createObjectStore("outbox", { keyPath: "label" });
    });
  const opened = settle(() => indexedDB.open("chatd", 1));
  const run = (mode, ask) =>
    opened.then((known) => settle(() => ask(known.transaction("outbox", mode).objectStore("outbox"))));
  return {
    list: (key) => run("readonly", (all) => all.getAll()).then((posts) => posts.filter((post) => post.key === key)),
    put: (post) => run("readwrite", (all) => all.put(post)),
    delete: (label) => run("readwrite", (all) => all.delete(label)),
  };
}
const memory = { list: async () => [], put: async () => {}, delete: async () => {} };

/**
 * Make the host of a core: a member of the room at a URL.
 * @param {string} url
 * @param {import("./chatd.d.ts").Options} options
 * @returns {import("./chatd.d.ts").Room}
 */
function createRoom(url, options) {
  const { username, token, events = "presence,typing", signal, random = Math.random } = options;
  const { WebSocket = globalThis.WebSocket, fetch = globalThis.fetch } = options;
  const { locks = globalThis.navigator?.locks, BroadcastChannel = globalThis.BroadcastChannel } = options;
  const { storage = globalThis.indexedDB ? database() : memory } = options;
  const room = new EventTarget();
  const key = `chatd ${url} ${username}`;
  const stopped = new AbortController();
  const channel = locks && BroadcastChannel && new BroadcastChannel(key);
  const answers = new Map(); // the promises of this tab's posts, by label
  let link = {};
  let bearer; // the newest token
  let streams = false; // the last WebSocket did not open
  let leads = false;
  let release; // ends the lead
  let away = false; // the page is in the back/forward cache
  let paging, timer, shown, retryAt;
  let due = Infinity;
  let typed = 0; // when this user last typed, and last posted
  let newest = 0;
  const clock = () => performance.now() / 1000;

  const core = createCore(
    { now: clock, random, arm, connect, send: (frame) => link.send?.(frame), close: unlink, emit },
    options.last,
  );
  const { view } = core;

  // For the core

  function arm(at) {
    if (at >= due || view.error) return;
    clearTimeout(timer);
    due = at;
    const wait = Math.min(Math.max(at - clock(), 0), 10) * 1000; // short, so that a sleep is soon noticed
    const expected = Date.now() + wait;
    timer = setTimeout(() => {
      due = Infinity;
      if (Date.now() - expected > SLEPT * 1000) core.wake();
      core.tick();
      arm(core.deadline());
    }, wait);
  }
  function emit(type, detail) {
    shown = undefined;
    if (type === "disconnect") retryAt = Date.now() + detail.wait * 1000;
    if (type === "refuse") {
      storage.put({ ...detail }).catch(() => {});
      settle(detail.label, new Rejected(detail.error.message, detail.error.code));
    }
    if (type === "settle") {
      storage.delete(detail.label).catch(() => {});
      settle(detail.label, new ClientStopped("the post was discarded"), detail.ack);
    }
    if (type === "state" || type === "history") {
      if (leads && view.state !== "stopped") tellState();
      if (view.error) finish();
    }
    room.dispatchEvent(Object.assign(new Event(type), { detail }));
    room.dispatchEvent(new Event("change"));
  }
  function settle(label, error, ack) {
    const { resolve, reject } = answers.get(label) ?? {};
    answers.delete(label);
    if (ack) resolve?.({ id: ack.id, duplicate: !!ack.duplicate });
    else reject?.(error);
  }
  function finish() {
    clearTimeout(timer);
    stopped.abort();
    release?.();
    channel?.close();
    for (const label of [...answers.keys()]) settle(label, view.error);
  }

  // Links

  function unlink() {
    const old = link;
    link = {};
    old.close?.();
  }
  async function connect(last) {
    const mine = (link = { id: Math.random() });
    if (channel && !leads) return followLeader(last);
    try {
      bearer = await newToken();
      if (mine !== link) return;
      if (streams || !WebSocket) stream(mine, last);
      else open(mine, last);
    } catch (error) {
      if (mine === link) core.lost({ reason: error.message });
    }
  }
  const newToken = async () => (typeof token === "function" ? token() : token);
  const encode = (fields) => new URLSearchParams(Object.entries(fields).filter(([, value]) => value));
  const query = (last) => encode({ events, username, last_event_id: last });
  function open(mine, last) {
    const protocols = bearer ? ["chat.v1", `bearer.${bearer}`] : ["chat.v1"];
    streams = true; // until it opens
    const socket = new WebSocket(`${url.replace(/^http/, "ws")}?${query(last)}`, protocols);
    mine.send = (frame) => socket.send(JSON.stringify(frame));
    mine.close = () => socket.close();
    socket.onopen = () => {
      streams = false;
      renewLater();
    };
    socket.onmessage = ({ data }) => mine === link && receive(data);
    socket.onerror = () => {};
    socket.onclose = ({ code, reason }) => {
      if (mine !== link) return;
      if (streams) return stream(mine, last); // HTTP shows the status that a WebSocket conceals
      const seconds = /retry_after=([\d.]+)/.exec(reason)?.[1];
      core.lost({ code, reason: `closed with ${code} ${reason}`, retryAfter: seconds && Number(seconds) });
    };
  }
  function renewLater() {
    if (typeof token === "function") core.after(secondsToRenewal(bearer ?? "", Date.now() / 1000), renew);
  }
  async function renew() {
    const mine = link;
    bearer = await newToken().catch(() => bearer);
    if (mine !== link) return;
    if (view.state === "online") link.send({ type: "token", token: bearer, label: "token" });
    renewLater();
  }
  /** Send an HTTP request with the token, and once more with a new one. */
  async function request(path, init, again = typeof token === "function") {
    bearer ??= await newToken();
    const headers = { ...init?.headers, ...(bearer && { Authorization: `Bearer ${bearer}` }) };
    const limit = AbortSignal.timeout(ANSWER * 1000);
    const response = await fetch(url + path, { cache: "no-store", signal: limit, ...init, headers });
    if (response.status !== 401 || !again) return response;
    bearer = await newToken();
    return request(path, init, false);
  }
  const retryAfterOf = ({ headers }) => Number(headers.get("Retry-After") ?? undefined) || undefined;
  async function stream(mine, last) {
    const abort = new AbortController();
    let retryAfter;
    mine.close = () => abort.abort();
    mine.send = (frame) => frame.label && frame.label !== PROBE && deliver(frame, mine);
    const lost = (ending) => {
      if (view.state !== "online") streams = false;
      if (mine === link) core.lost(ending);
    };
    try {
      const response = await request(`/events?${query(last)}`, { signal: abort.signal });
      const { ok, status, headers } = response;
      if (!ok || !headers.get("Content-Type").startsWith("text/event-stream"))
        return lost({ code: status, reason: `refused with ${status}`, retryAfter: retryAfterOf(response) });
      core.after(STREAM, () => {
        streams = false;
        lost({ reason: "a WebSocket may open now", retryAfter: 0 });
      });
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      for (let text = ""; ; ) {
        const { done, value } = await reader.read();
        if (done) return lost({ reason: "the stream ended", retryAfter });
        const lines = (text + value).split("\n");
        text = lines.pop();
        if (mine === link) core.heard();
        for (const line of lines) {
          if (mine !== link) return;
          if (line.startsWith("data: ")) receive(line.slice(6));
          else if (line.startsWith("retry: ") && view.state === "online") retryAfter = Number(line.slice(7)) / 1000;
        }
      }
    } catch (error) {
      lost({ reason: error.message });
    }
  }
  /** Post over HTTP, and take the answer as a frame. */
  async function deliver(frame, mine) {
    const { type, id, label } = frame;
    const headers = { "Content-Type": "application/json", "Idempotency-Key": label };
    let answer = { type: "error", label, code: "UNAVAILABLE" };
    try {
      const response = await (type === "remove"
        ? request(`/messages/${id}`, { method: "DELETE", headers })
        : request("/messages", { method: "POST", headers, body: JSON.stringify(frame) }));
      if (response.status === 401) return mine === link && core.lost({ code: 401, reason: "the token was refused" });
      const body = await response.json();
      const code = TEMPORARY.includes(response.status) ? "UNAVAILABLE" : body.code;
      answer = response.ok ? body : { ...answer, message: body.detail, code, retry_after: retryAfterOf(response) };
    } catch {
      // The network failed, so the core sends the post again.
    }
    if (mine === link) receive(answer);
  }

  // Tabs

  const tell = (note) => channel?.postMessage(note);
  function tellState() {
    const { state, error } = view;
    tell({ status: { state, error: error && { message: error.message, code: error.code }, retryAt } });
  }
  function receive(text) {
    const frame = core.receive(text);
    if (leads && frame && frame.type !== "history") tell({ frame });
  }
  function followLeader(last) {
    const { id } = link;
    link.send = (frame) => (frame.label === PROBE ? core.heard() : tell({ frame, up: true }));
    tell({ hello: id, last });
  }
  function hear({ data: { hello, last, to, frame, up, status, discarded } }) {
    if (discarded) core.discard(discarded);
    else if (leads && hello) greet(hello, last);
    else if (leads && up) frame.label ? core.post(record(frame)) : link.send?.(frame);
    else if (leads || up || hello) return;
    else if (status) {
      retryAt = status.retryAt;
      core.follow(status);
    } else if (to ? to === link.id : view.state === "online") core.receive(frame);
  }
  function greet(to, last) {
    if (view.state !== "online") return tellState();
    const frame = core.welcome(last);
    if (frame) tell({ to, frame });
    if (view.presence) tell({ frame: { type: "presence", data: view.presence } });
  }
  function lead() {
    leads = true;
    core.start();
  }
  function enter() {
    away = false;
    if (!channel) return lead();
    const hold = (resolve) => {
      release = resolve;
      lead();
    };
    locks.request(key, { signal: stopped.signal }, () => away || new Promise(hold)).catch(() => {});
    core.start();
  }
  function leave() {
    away = true;
    leads = false;
    core.follow({ state: "waiting" });
    release?.();
  }

  // For the user

  function record(frame) {
    newest = Math.max(Date.now(), newest + 1);
    return { label: frame.label, key, at: newest, frame };
  }
  function ask(frame) {
    const label = [...crypto.getRandomValues(new Uint32Array(4))].map((part) => part.toString(36)).join("");
    const answer = new Promise((resolve, reject) => answers.set(label, { resolve, reject }));
    answer.catch(() => {}); // the snapshot shows it too, so nobody has to wait for it
    const post = record({ ...frame, label });
    if (view.error) settle(label, view.error);
    else {
      storage.put(post).catch(() => {});
      core.post(post);
    }
    return answer;
  }
  async function page(range = {}) {
    const response = await request(`/messages?${encode(range)}`);
    const page = await response.json();
    if (!response.ok) throw new Rejected(page.detail, page.code ?? response.status);
    return { id: page.id, more: !!page.more, entries: entriesOf(page) };
  }
  Object.assign(room, {
    post: (message, fields) => ask({ username, message, ...fields }),
    edit: (id, message) => ask({ username, message, replaces: id }),
    remove: (id) => ask({ type: "remove", id }),
    discard(label) {
      tell({ discarded: label });
      core.discard(label);
    },
    page,
    async older(limit = 50) {
      if (!view.more) return;
      const range = { before: view.entries[0]?.id ?? before(view.last, -1), limit };
      paging ??= page(range).then(core.prepend).finally(() => (paging = undefined));
      await paging;
    },
    typing() {
      if (Date.now() - typed < 3000 || view.state !== "online") return;
      typed = Date.now();
      link.send({ type: "typing", username });
    },
    snapshot() {
      if (shown) return shown;
      const { outbox, typing, entries } = view;
      const messages = entries.filter(({ replaces }) => !replaces);
      const copies = { outbox: [...outbox], typing: [...typing], entries: [...entries], messages };
      return (shown = { ...view, ...copies, retryAt });
    },
    subscribe(call) {
      room.addEventListener("change", call);
      return () => room.removeEventListener("change", call);
    },
    async *[Symbol.asyncIterator]() {
      let seen;
      while (!view.error) {
        const place = view.entries.findLastIndex(({ id }) => id === seen);
        for (const entry of view.entries.slice(place + 1)) yield ((seen = entry.id), entry);
        const changed = (resolve) => room.addEventListener("change", resolve, { once: true });
        if (view.entries.at(-1)?.id === seen && !view.error) await new Promise(changed);
      }
      if (view.state === "rejected") throw view.error;
    },
    stop: () => core.end("stopped", new ClientStopped("the room was stopped")),
  });

  const on = (target, type, call) => target?.addEventListener?.(type, call, { signal: stopped.signal });
  on(channel, "message", hear);
  on(globalThis, "online", core.wake);
  on(globalThis.document, "visibilitychange", () => document.hidden || core.wake());
  on(globalThis, "pagehide", leave);
  on(globalThis, "pageshow", ({ persisted }) => persisted && enter());
  on(signal, "abort", room.stop);
  storage.list(key).then((posts) => core.post(...posts)).catch(() => {});
  if (signal?.aborted) room.stop();
  else enter();
  return room;
}

/** A user of one server. */
export class Client {
  constructor(url = globalThis.location.origin, options = {}) {
    this.url = url.replace(/^ws/, "http").replace(/\/$/, "");
    this.options = options;
    this.rooms = new Map();
  }
  /** Join a room, or return it if this client is in it. */
  room(name = "main") {
    const known = this.rooms.get(name);
    if (known && !known.snapshot().error) return known;
    const room = createRoom(`${this.url}/rooms/${name}`, this.options);
    this.rooms.set(name, room);
    return room;
  }
  stop() {
    for (const room of this.rooms.values()) room.stop();
  }
}
