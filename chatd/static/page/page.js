/**
 * The page of a room. This module reads what the server says in the attributes of the document, and puts the parts
 * together: each shows one thing of the snapshot of the open room, once in a frame.
 */
import { Client } from "../chatd.js";
import { createAnnouncer } from "./announcer.js";
import { createComposer } from "./composer.js";
import { createGate } from "./gate.js";
import { memory } from "./memory.js";
import { MessageList } from "./messages.js";
import { createPanels } from "./panels.js";
import { createPeople } from "./people.js";
import { createRemoval } from "./removal.js";
import { addressOf, createRooms, MAIN, roomAt } from "./rooms.js";
import { createStatus } from "./status.js";
import { claimsOf, createIntroduction, signInUrl, splitFragment, whyNotName } from "./user.js";
import { indexOf, numberOf } from "./window.js";
import { remedyWords } from "./words.js";

const config = document.documentElement.dataset;
const maxName = Number(config.maxUsername);
const root = new URL("../../../", import.meta.url).href; // of the server, whose files are at static/VERSION/page/
const [forTab, forAll] = [memory("sessionStorage"), memory("localStorage")];
const element = (id) => document.getElementById(id);
const box = element("box");
// Where one touches, focus in a text opens the keyboard on the screen.
const touch = matchMedia("(hover: none) and (pointer: coarse)");

const JOINED = 4; // rooms; browsers open six streams of events to a server, and posts need one of them
const visited = new Map(); // by name, last visit last: the room of chatd.js, and the newest id that was in sight
const unsent = new Set(forAll.get("unsent")?.split(" ").filter(Boolean)); // rooms that have unsent messages
let client;
let me;
let open; // the room that is shown: its name, its room of chatd.js and its list
let due = false; // a frame is planned

// The parts

const announce = createAnnouncer(element("announcer"));
const gate = createGate(element("gate"), element("composer"));
const home = () => (gate.shut ? gate.focus() : box.focus());
const status = createStatus(
  { status: element("status"), countdown: element("countdown"), button: element("retry") },
  () => open.room.reconnect(),
  home,
);
const people = createPeople({
  count: element("count"),
  list: element("people-list"),
  typing: element("typing"),
  badge: element("badge"),
});
const rooms = createRooms(
  {
    list: element("room-list"),
    form: element("room-form"),
    input: element("room-name"),
    help: element("room-help"),
    storage: forAll,
  },
  { open: visit, href: (name) => addressOf(root, name), announce },
);
const composer = createComposer(
  {
    form: element("composer"),
    box,
    left: element("left"),
    editing: element("editing"),
    cancel: element("cancel"),
    storage: forTab,
    most: Number(config.maxMessage),
  },
  {
    post: (text) => open.room.post(text),
    change: (id, text) => open.room.edit(id, text),
    typed: () => open.room.typing(),
    lastOwn: () => open.room.snapshot().messages.findLast(canChange),
    announce,
  },
);
const panels = createPanels(
  [
    { panel: element("rooms"), button: element("show-rooms") },
    { panel: element("people"), button: element("show-people") },
  ],
  [
    { element: element("bar"), focus: () => barButton()?.focus() },
    { element: element("composer"), focus: () => box.focus() },
    { element: element("gate"), focus: gate.focus },
    { element: element("rooms"), focus: () => element("rooms").focus() },
    { element: element("messages"), focus: () => open?.list.focus() },
    { element: element("people"), focus: () => element("people").focus() },
  ],
  home,
);
const askToRemove = createRemoval(
  { dialog: element("removal"), keep: element("keep-message") },
  { focus: () => open.list.focus() },
);
/** The first button of the bar that is shown; a wide page may have none. */
const barButton = () =>
  [...element("bar").querySelectorAll("button")].find((button) => !button.disabled && button.getClientRects().length);

/** Only authors may change a message, and the server knows authors by their tokens. */
const canChange = ({ data, removed }) => !!config.tokens && !removed && data.username === me;

// The open room

function show() {
  due = false;
  const snapshot = open.room.snapshot();
  status.show(snapshot);
  people.show(snapshot, me);
  open.list.update(snapshot);
  noteUnsent();
  rooms.show(open.name, unreadIn, snapshot.error?.code !== 404);
  const unread = document.hidden ? unreadIn(open.name) : 0;
  document.title = `${unread ? `(${unread}) ` : ""}${open.name} · ${config.title}`;
  if (snapshot.error) refuse(snapshot.error);
  else gate.open();
}
function plan() {
  if (due) return;
  due = true;
  // A hidden page draws no frames, but its title counts.
  if (document.hidden) setTimeout(show);
  else requestAnimationFrame(show);
}
/** Return how many messages of others came to a room since its end was in sight. */
function unreadIn(name) {
  const { room, seen } = visited.get(name) ?? {};
  const last = open.name === name ? open.list.seen : seen;
  if (!last || !room) return 0;
  const { messages } = room.snapshot();
  return messages.slice(indexOf(messages, numberOf(last) + 1)).filter(({ data }) => data.username !== me).length;
}

function join(name) {
  const { room: known, seen } = visited.get(name) ?? {};
  const room = client.room(name); // another one if the server refused the last
  if (room !== known) room.subscribe(plan);
  visited.delete(name);
  visited.set(name, { room, seen });
  return { room, seen };
}
/** Remember the rooms with unsent messages, which are joined after a reload, whichever room is shown. */
function noteUnsent() {
  const before = [...unsent].join(" ");
  for (const [name, { room }] of visited) {
    const { state, outbox } = room?.snapshot() ?? {};
    if (outbox?.some(({ error }) => !error)) unsent.add(name);
    else if (state === "online") unsent.delete(name);
  }
  const names = [...unsent].join(" ");
  if (names !== before) forAll.set("unsent", names);
}
/** Show a room. The last few rooms stay joined: their unread messages are counted, and their posts sent. */
function enter(name) {
  if (open) {
    visited.get(open.name).seen = open.list.seen;
    open.list.close();
    announce(`Room ${name}`);
  }
  const { room, seen } = join(name);
  for (const [other, place] of [...visited].slice(0, -JOINED)) {
    if (unsent.has(other)) continue;
    place.room?.stop();
    place.room = undefined;
  }
  const actions = { canChange, retry: ({ label }) => room.retry(label), discard: ({ label }) => room.discard(label) };
  if (config.tokens) {
    const remove = ({ id }) => askToRemove(() => room.remove(id));
    Object.assign(actions, { edit: composer.edit, remove });
  }
  const list = new MessageList(element("messages"), { room, username: me, announce, actions, seen });
  open = { name, room, list };
  element("here").textContent = name;
  composer.open(name);
  status.reset();
  panels.close(false);
  show();
}
function visit(name) {
  panels.close(touch.matches);
  if (name !== open.name) {
    history.pushState(null, "", addressOf(root, name));
    enter(name);
  }
  if (!touch.matches) home();
}

/** Say why the server refused this page, and what helps. */
function refuse({ code }) {
  if (gate.shut) return;
  const expired = config.tokens && code === 401;
  const words = remedyWords(code, !!config.tokens);
  if (expired) {
    forTab.remove("token");
    askToSignIn(words, "Sign in again");
  } else if (code === 404 && open.name !== MAIN) gate.close(words, { button: "Open main", act: () => visit(MAIN) });
  else gate.close(words, { button: "Try again", act: () => enter(open.name) });
  announce(words);
}

// Who the user is

/** Return the token of this tab. The server refuses it beside one in a cookie, so the cookie takes precedence. */
const token = () => (config.username ? undefined : forTab.get("token"));

/** Take a token out of the address, where it would be seen and copied; return whether there was one. */
function takeToken() {
  const { token: given, rest } = splitFragment(location.hash);
  if (!given) return false;
  forTab.set("token", given);
  history.replaceState(null, "", location.href.split("#")[0] + rest);
  return true;
}
function askToSignIn(words, link) {
  if (config.login) gate.close(words, { link, href: signInUrl(config.login, location.href) });
  else gate.close(`${words} A link in your application opens this room for you.`.trim());
}

function begin(name) {
  me = name;
  element("my-name").textContent = name;
  client = new Client(root, { username: name, token: config.tokens && token() ? token : undefined });
  for (const room of unsent) join(room);
  enter(roomAt(root, location.href));
  if (config.tokens) listRooms();
  if (!touch.matches) home();
}
/** Offer the rooms that the token permits to read. */
async function listRooms() {
  const headers = token() ? { Authorization: `Bearer ${token()}` } : {};
  const response = await fetch(new URL("rooms", root), { headers }).catch(() => undefined);
  if (!response?.ok) return;
  rooms.offer((await response.json()).rooms.map(({ name }) => name));
  plan();
}
const introduce = createIntroduction(
  {
    dialog: element("introduction"),
    heading: element("introduction-title"),
    input: element("name"),
    help: element("name-help"),
    cancel: element("keep-name"),
    most: maxName,
  },
  {
    // What is unsent belongs to the name under which it was written.
    isBusy: () => [...visited.values()].some(({ room }) => room?.snapshot().outbox.length),
    take(name) {
      forAll.set("name", name);
      if (!me) begin(name);
      else location.reload(); // all tabs of a user share what is unsent
    },
  },
);

// The start

addEventListener("popstate", () => {
  const name = roomAt(root, location.href);
  if (open && name !== open.name) enter(name); // only the fragment may have changed
});
addEventListener("hashchange", () => takeToken() && location.reload());
document.addEventListener("visibilitychange", () => open && show());
takeToken();
if (config.tokens) {
  const claim = token() ? claimsOf(token())[config.tokens] : config.username;
  if (claim && typeof claim === "string") begin(claim);
  else {
    element("status").textContent = "Not signed in";
    askToSignIn(config.login ? "This room asks who you are." : "", "Sign in");
  }
} else {
  element("rename").hidden = false;
  element("rename").addEventListener("click", () => introduce(me));
  const name = forAll.get("name");
  if (name && !whyNotName(name, maxName)) begin(name);
  else introduce();
}
