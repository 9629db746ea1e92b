/** The rooms of this user, by the names in their addresses. */
import { make, setText } from "./elements.js";

const RECENT = 20; // rooms that are remembered
const NAME = /^[a-z0-9][a-z0-9_-]{0,63}$/;
export const MAIN = "main";

/** Return why a name of a room is not possible, in one sentence; empty if it is. */
export const whyNotRoom = (name) =>
  NAME.test(name) ? "" : "Use 1 to 64 lower-case letters, digits, _ and -, with a letter or digit first.";

/** Return the address of a room. */
export const addressOf = (root, name) => new URL(name === MAIN ? "." : `rooms/${name}`, root).href;

/** Return the room at an address. */
export function roomAt(root, address) {
  const path = new URL(address).pathname.slice(new URL(root).pathname.length);
  const name = /^rooms\/([^/]+)\/?$/.exec(path)?.[1];
  return name && !whyNotRoom(name) ? name : MAIN;
}

/** Put a room first in the list of recent ones. */
export const remember = (recent, name) => [name, ...recent.filter((other) => other !== name)].slice(0, RECENT);

/** Return the place in a list to which a key leads; undefined if the key is for something else. */
export function stepIn(length, place, key) {
  const next = { ArrowUp: place - 1, ArrowDown: place + 1, Home: 0, End: length - 1 }[key];
  return next === undefined ? undefined : Math.min(Math.max(next, 0), length - 1);
}

/** Make the list; `open(name)` is called when the user chooses a room, and `href(name)` returns its address. */
export function createRooms({ list, form, input, help, storage }, { open, href, announce }) {
  let recent = (storage.get("rooms") ?? "").split(" ").filter((name) => !whyNotRoom(name));
  let offered = []; // by the server
  const links = new Map();

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const name = input.value.trim();
    help.textContent = whyNotRoom(name);
    input.setAttribute("aria-invalid", String(!!help.textContent));
    if (help.textContent) {
      announce(help.textContent);
      return input.focus();
    }
    input.value = "";
    open(name);
  });
  list.addEventListener("keydown", (event) => {
    const anchors = [...list.querySelectorAll("a")];
    const next = anchors[stepIn(anchors.length, anchors.indexOf(event.target), event.key)];
    if (!next || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    next.focus();
  });
  function link(name) {
    const known = links.get(name);
    if (known) return known;
    const item = make("li");
    const anchor = Object.assign(make("a"), { href: href(name) });
    const unread = make("span", "unread-count");
    anchor.append(make("span", "", name), " ", unread);
    anchor.addEventListener("click", (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return; // it opens in another tab
      event.preventDefault();
      open(name);
    });
    item.append(anchor);
    links.set(name, { item, anchor, unread });
    return links.get(name);
  }
  return {
    /** Offer the rooms that the server lists. */
    offer(names) {
      offered = names;
    },
    /** Show a room as the one that is open, and how many messages are unread in the others. It may not exist. */
    show(current, unreadOf, exists) {
      if (exists ? recent[0] !== current : recent.includes(current)) {
        recent = exists ? remember(recent, current) : recent.filter((name) => name !== current);
        storage.set("rooms", recent.join(" "));
      }
      const names = [...new Set([MAIN, current, ...offered, ...recent])].sort();
      for (const name of names) {
        const { anchor, unread } = link(name);
        if (name === current) anchor.setAttribute("aria-current", "page");
        else anchor.removeAttribute("aria-current");
        const count = name === current ? 0 : unreadOf(name);
        setText(unread, count ? `${count} new` : "");
      }
      const items = names.map((name) => links.get(name).item);
      const same = items.length === list.children.length && items.every((item, place) => list.children[place] === item);
      if (!same) list.replaceChildren(...items);
    },
  };
}
