/**
 * The list of messages. The document has a window of them, which moves as one scrolls; what one reads stays where it is.
 * Each change reads the layout, writes the document, and corrects the position once.
 */
import { Article, make } from "./article.js";
import { announcement, begins, firstUnread, isMessage, pair, timeOf } from "./groups.js";
import { formats } from "./text.js";
import { around, epochOf, follow, indexOf, numberOf, reserve, search, slide } from "./window.js";

const PAGE = 100; // entries of an older page
const QUIET = 1000; // the milliseconds in which new messages are collected for one announcement
const NEAR = 2; // pixels from the end that count as the end
const LEAVE = 300; // the milliseconds after a wheel in which the end does not hold the list
const LEAP = 10; // messages that PageUp and PageDown skip
const KEYS = { ArrowUp: -1, ArrowDown: 1, PageUp: -LEAP, PageDown: LEAP, Home: -Infinity, End: Infinity };

/** The list of messages. */
export class MessageList {
  #room;
  #username;
  #announce;
  #tools;
  #closed = new AbortController();
  #observer;
  #timers = new Set();

  #snapshot; // the newest
  #posts = []; // what the outbox shows at the end of the list
  #changes = new Map(); // unsent edits and removals by the ids of their messages
  #entries = new WeakMap(); // what posts will become
  #heads = new Map(); // the newest numbers when posts were made, by label
  #labels = new Map(); // the labels of messages whose posts are still in the outbox, by id
  #acks = new Map(); // and of those whose posts just left it

  #window = { start: 0, end: 0 };
  #rows = []; // the articles of the window
  #articles = new Map(); // and all in the document, by key
  #current; // the article that was focused last
  #stop; // the article that the Tab key reaches
  #byNode = new WeakMap(); // articles by their elements
  #opened = Date.now();
  #planned = false; // a check of the window is due

  #shim = 0; // pixels, less than one
  #atEnd = true;
  #leaving = false; // a wheel turns upwards, so the end does not hold the list
  #far = false; // the end is more than a screen away
  #fresh = 0; // new messages of others below
  #head = 0; // the number of the newest message
  #epoch; // undefined until there is a history
  #seen; // the id of the newest message that was in sight
  #look; // the number after which messages are unread, until the first one is found
  #unread; // the number of the first unread message
  #unspoken = []; // what is announced soon
  #loading = false;
  #failed = false;

  /**
   * @param {HTMLElement} element
   * @param {object} options
   * @param {string} [options.seen] the `seen` of an earlier list of this room
   */
  constructor(element, { room, username, announce = () => {}, actions = {}, seen }) {
    Object.assign(this, { element });
    this.#room = room;
    this.#username = username;
    this.#announce = announce;
    this.#seen = seen;
    if (seen) this.#look = numberOf(seen);
    this.#tools = {
      formats: formats(document.documentElement.lang || "en", navigator.languages),
      can: (name, item) => this.#can(name, item, actions),
      act: (name, item) => this.#act(name, item, actions),
    };
    this.#build();
    this.#listen();
  }

  /** The id of the newest message that this user has seen. */
  get seen() {
    return this.#seen;
  }

  // The document

  #build() {
    this.scroller = make("div", "scroller");
    this.feed = make("div", "feed");
    this.top = make("p", "older");
    this.newest = make("button", "newest");
    this.feed.setAttribute("role", "feed");
    this.feed.setAttribute("aria-label", "Messages");
    this.newest.type = "button";
    this.newest.hidden = true;
    this.scroller.append(this.top, this.feed);
    this.element.replaceChildren(this.scroller, this.newest);
  }

  #listen() {
    const on = (target, type, call, more) => target.addEventListener(type, call, { signal: this.#closed.signal, ...more });
    on(this.scroller, "scroll", () => this.#scrolled(), { passive: true });
    on(this.scroller, "wheel", ({ deltaY }) => deltaY < 0 && this.#leaveEnd(), { passive: true });
    on(this.newest, "click", () => this.#goToEnd());
    on(this.feed, "keydown", (event) => this.#pressed(event));
    on(this.feed, "focusin", ({ target }) => this.#focused(target));
    on(this.feed, "focusout", () => this.#later(0, () => this.#dropAway()));
    on(document, "visibilitychange", () => this.#looked());
    on(this.#room, "outbox", () => this.#noteHeads());
    on(this.#room, "settle", ({ detail }) => detail.ack && this.#acks.set(detail.ack.id, detail.label));
    this.#observer = new ResizeObserver(() => (this.#atEnd ? this.#stick() : this.#plan()));
    this.#observer.observe(this.scroller);
    this.#observer.observe(this.feed);
    this.#renewDays();
  }

  #later(wait, call) {
    const timer = setTimeout(() => {
      this.#timers.delete(timer);
      call();
    }, wait);
    this.#timers.add(timer);
  }

  // Items: the messages, and then the posts of the outbox

  get #total() {
    return (this.#snapshot?.messages.length ?? 0) + this.#posts.length;
  }

  #entryAt(index) {
    const { messages } = this.#snapshot;
    return index < messages.length ? messages[index] : this.#entryOf(this.#posts[index - messages.length]);
  }

  #entryOf(post) {
    const { label, frame, at } = post;
    let entry = this.#entries.get(post);
    if (!entry) {
      const username = frame.username ?? this.#username;
      const data = { ...frame, username, message: frame.message ?? "", timestamp: new Date(at).toISOString() };
      this.#entries.set(post, (entry = { label, data }));
    }
    return entry;
  }

  /** Show the item at an index, if it differs from what its article shows. */
  #fill(article, index) {
    const entry = this.#entryAt(index);
    const previous = index ? this.#entryAt(index - 1) : undefined;
    const post = entry.id ? undefined : this.#posts[index - this.#snapshot.messages.length];
    const unread = !!entry.id && numberOf(entry.id) === this.#unread;
    const change = entry.id ? this.#changes.get(entry.id) : undefined;
    const known = article.item;
    const same = known?.entry === entry && known.previous === previous && known.unread === unread;
    if (same && known.change === change && known.error === post?.error) return;
    const { day, group } = begins(entry, previous);
    const own = entry.data.username === this.#username;
    const at = timeOf(entry);
    article.show({ entry, previous, at, own, day, group: group || unread, unread, post, error: post?.error, change });
  }

  #indexOf({ item: { entry, post } }) {
    const { messages } = this.#snapshot;
    return entry.id ? indexOf(messages, numberOf(entry.id)) : messages.length + Math.max(this.#posts.indexOf(post), 0);
  }

  // Changes

  /** Show a snapshot of the room; to be called at most once in a frame. */
  update(snapshot) {
    if (snapshot === this.#snapshot) return;
    const { messages, last, state } = snapshot;
    const first = this.#rows[0]?.item.entry.id;
    const [anchor, visible, size] = [this.#anchor(), this.#visible(), this.#rows.length];
    const known = new Set(this.#posts.map(({ label }) => label));
    if (state === "online" && this.#snapshot?.state !== "online") this.#failed = false;
    this.#snapshot = snapshot;
    this.#merge(snapshot);
    const start = first ? indexOf(messages, numberOf(first)) : 0;
    const fresh = epochOf(last) !== this.#epoch || (first && messages[start]?.id !== first);
    if (fresh) this.#restart(last);
    else this.#arrived(messages, last);
    this.#findUnread();
    const posted = this.#posts.some(({ label }) => !known.has(label) && this.#heads.has(label));
    if (posted && document.hasFocus()) this.#atEnd = true;
    const shift = start - this.#window.start;
    const moved = { start, end: Math.min(start + size, this.#total) };
    if (fresh || !first) this.#window = around(this.#total, this.#total);
    else if (this.#atEnd) this.#window = follow(moved, this.#total);
    else this.#window = slide(moved, this.#total, { first: visible.first + shift, last: visible.last + shift });
    this.#render(anchor);
    this.#acks.clear();
  }

  /** Separate the outbox into what is at the end of the list and what marks messages. */
  #merge({ messages, outbox }) {
    this.#labels = pair(outbox, messages, this.#heads);
    const arrived = new Set(this.#labels.values());
    const waits = (post) => !post.error && !isMessage(post);
    this.#posts = outbox.filter((post) => !waits(post) && !arrived.has(post.label));
    this.#changes = new Map(outbox.filter(waits).map((post) => [post.frame.replaces ?? post.frame.id, post]));
  }

  /** Begin again with another history. */
  #restart(last) {
    if (this.#epoch) this.#heads.clear();
    if (this.#epoch || epochOf(this.#seen) !== epochOf(last)) this.#look = undefined;
    this.#epoch = epochOf(last);
    this.#head = numberOf(last);
    this.#unread = this.#seen = undefined;
    this.#unspoken = [];
    this.#fresh = 0;
    this.#atEnd = true;
  }

  /** Count and announce what is new. */
  #arrived(messages, last) {
    for (let at = indexOf(messages, this.#head + 1); at < messages.length; at += 1) {
      if (messages[at].data.username === this.#username) continue;
      if (!this.#unspoken.length) this.#later(QUIET, () => this.#speak());
      this.#unspoken.push(messages[at]);
      this.#fresh += 1;
    }
    this.#head = numberOf(last);
  }

  #speak() {
    if (this.#unspoken.length) this.#announce(announcement(this.#unspoken));
    this.#unspoken = [];
  }

  #findUnread() {
    if (this.#look === undefined || !this.#epoch) return;
    const { messages, state } = this.#snapshot;
    this.#unread = firstUnread(messages, this.#look, this.#username);
    if (this.#unread || (state === "online" && !document.hidden)) this.#look = undefined;
  }

  /** Note the newest message when a post is made: the post can only become a later one. */
  #noteHeads() {
    const { outbox, last } = this.#room.snapshot();
    const labels = new Set(outbox.map(({ label }) => label));
    for (const label of this.#heads.keys()) if (!labels.has(label)) this.#heads.delete(label);
    for (const { label, at } of outbox)
      if (!this.#heads.has(label) && at >= this.#opened) this.#heads.set(label, numberOf(last));
  }

  // Layout: what is read before a change, and corrected after it

  /** Return the indices of the first and the last visible item. */
  #visible() {
    const { start } = this.#window;
    const rows = this.#rows;
    if (!rows.length) return { first: start, last: start };
    const { top, bottom } = this.scroller.getBoundingClientRect();
    const rect = (at) => rows[at].node.getBoundingClientRect();
    const first = Math.min(search(rows.length, (at) => rect(at).bottom > top), rows.length - 1);
    const last = Math.max(search(rows.length, (at) => rect(at).top >= bottom) - 1, first);
    return { first: start + first, last: start + last };
  }

  /** Return the text that one reads and its place; none at the end, where the newest message is read. */
  #anchor() {
    if (this.#atEnd || !this.#rows.length) return undefined;
    const article = this.#rows[this.#visible().first - this.#window.start];
    return { article, top: article.text.getBoundingClientRect().top };
  }

  /** Put the text that one reads where it was. The feed takes the parts of pixels that no scroller can. */
  #restore({ article, top }) {
    const moved = () => article.text.getBoundingClientRect().top - top;
    this.scroller.scrollTop += moved();
    const rest = moved();
    if (Math.abs(rest) < 0.01) return;
    const shim = this.#shim - rest;
    this.scroller.scrollTop -= Math.floor(shim);
    this.#shim = shim - Math.floor(shim);
    this.feed.style.paddingBlockStart = `${this.#shim}px`;
  }

  /** Bring the document to the window. */
  #render(anchor) {
    const active = this.#byNode.get(document.activeElement?.closest("article"));
    const place = this.#rows.indexOf(active);
    const rows = [];
    for (let index = this.#window.start; index < this.#window.end; index += 1) rows.push(this.#take(index));
    const wanted = new Set(rows);
    for (const [key, article] of this.#articles) {
      const keep = wanted.has(article) || (article === active && this.#exists(article));
      article.node.toggleAttribute("data-away", keep && !wanted.has(article));
      if (keep) continue;
      this.#articles.delete(key);
      article.node.remove();
    }
    this.#rows = rows;
    rows.forEach((article, at) => this.#fill(article, this.#window.start + at));
    this.#place(active);
    if (active && !this.#articles.has(active.key)) (rows[Math.min(Math.max(place, 0), rows.length - 1)]?.node ?? this.scroller).focus({ preventScroll: true });
    this.#setStop();
    this.#note();
    if (this.#atEnd) this.#stick();
    else if (anchor && wanted.has(anchor.article)) this.#restore(anchor);
    this.#plan();
  }

  /** Return the article of an item: its own, that of the post which became this message, or a new one. */
  #take(index) {
    const { id, label } = this.#entryAt(index);
    const key = id ?? label;
    const was = this.#acks.get(id) ?? this.#labels.get(id);
    let article = this.#articles.get(key);
    if (!article && (article = this.#articles.get(was))) this.#articles.delete(was);
    if (!article) {
      article = new Article(this.#tools);
      this.#byNode.set(article.node, article);
    }
    article.key = key;
    this.#articles.set(key, article);
    return article;
  }

  #exists({ key, item: { entry, post } }) {
    if (!entry.id) return this.#posts.includes(post);
    const { messages } = this.#snapshot;
    return messages[indexOf(messages, numberOf(key))]?.id === key;
  }

  /** Put the articles of the window in order, without touching the focused one. */
  #place(active) {
    const size = this.#epoch ? this.#head : -1;
    let next = this.feed.firstChild;
    for (const { node } of this.#rows) {
      if (next?.hasAttribute("data-away")) next = next.nextSibling;
      while (node === active?.node && next !== node) {
        const other = next;
        next = next.nextSibling;
        other.remove();
      }
      if (node === next) next = next.nextSibling;
      else this.feed.insertBefore(node, next);
      if (node.ariaSetSize !== `${size}`) node.ariaSetSize = size;
    }
  }

  #stick() {
    this.scroller.scrollTop = this.scroller.scrollHeight;
  }

  /** Check the window once the document is laid out. */
  #plan() {
    if (this.#planned) return;
    this.#planned = true;
    requestAnimationFrame(() => {
      this.#planned = false;
      if (!this.#closed.signal.aborted) this.#scrolled();
    });
  }

  /** Take a new position of the scroller: move the window, and read older messages near its beginning. */
  #scrolled() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroller;
    if (!this.#snapshot || !clientHeight) return;
    const left = scrollHeight - scrollTop - clientHeight;
    this.#atEnd = this.#window.end === this.#total && left <= NEAR && !this.#leaving;
    this.#far = this.#window.end < this.#total || left > clientHeight;
    const visible = this.#visible();
    const { start, end } = slide(this.#window, this.#total, visible);
    if (start !== this.#window.start || end !== this.#window.end) {
      const anchor = this.#anchor();
      this.#window = { start, end };
      this.#render(anchor);
    } else this.#note();
    if (!this.#current) this.#setStop(this.#rows[visible.last - start]);
    if (start === 0 && visible.first <= reserve(visible)) this.#older();
  }

  /** Note what is in sight, and state what is not. */
  #note() {
    if (this.#atEnd && !document.hidden) {
      this.#seen = this.#snapshot.last;
      this.#fresh = 0;
    }
    this.newest.hidden = this.#atEnd || !(this.#fresh || this.#far);
    const text = this.#fresh ? `${this.#fresh} new` : "Newest messages";
    if (this.newest.textContent !== text) this.newest.textContent = text;
    const { more, last, entries, messages } = this.#snapshot;
    const first = numberOf((entries ?? messages)[0]?.id);
    if (this.#loading) this.#state("Loading older messages…");
    else if (this.#failed) this.#state("Older messages did not load.", "Try again");
    else if (more || !last) this.#state("");
    else this.#state(first > 1 ? "Older messages are no longer stored." : "This is the beginning of the room.");
  }

  #state(text, again) {
    if (this.top.firstChild?.textContent === text) return;
    this.top.replaceChildren(text);
    if (!again) return;
    const button = make("button", "again", again);
    button.type = "button";
    button.addEventListener("click", () => {
      this.#failed = false;
      this.#older();
    });
    this.top.append(" ", button);
  }

  async #older() {
    const before = this.#snapshot;
    if (this.#loading || this.#failed || !before.more || !before.last) return;
    this.#loading = true;
    this.feed.ariaBusy = "true";
    this.#note();
    try {
      await this.#room.older(PAGE);
    } catch {
      this.#failed = true;
    }
    if (this.#closed.signal.aborted) return;
    this.#loading = false;
    this.feed.ariaBusy = "false";
    this.#note();
    if (this.#room.snapshot() !== before) this.#plan();
  }

  // What the user does

  /** Let go of the end: a smooth scroll begins with less than a pixel. */
  #leaveEnd() {
    if (!this.scroller.scrollTop) return;
    this.#atEnd = false;
    if (this.#leaving) return;
    this.#leaving = true;
    this.#later(LEAVE, () => {
      this.#leaving = false;
      this.#scrolled();
    });
  }

  #goToEnd() {
    this.#atEnd = true;
    if (this.#window.end < this.#total) this.#window = around(this.#total, this.#total);
    this.#rows.at(-1)?.node.focus({ preventScroll: true }); // the button disappears
    this.#render();
    this.#rows.at(-1)?.node.focus({ preventScroll: true });
  }

  #goTo(index) {
    if (index < this.#window.start || index >= this.#window.end) {
      this.#window = around(index, this.#total);
      this.#atEnd = false;
      this.#render();
    }
    const { node } = this.#rows[index - this.#window.start];
    node.focus({ preventScroll: true });
    node.scrollIntoView({ block: "nearest" });
  }

  #pressed(event) {
    const { key, target } = event;
    const article = this.#byNode.get(target.closest("article"));
    if (!article || event.ctrlKey || event.altKey || event.metaKey || event.shiftKey) return;
    if (key === "Escape" && target !== article.node) article.node.focus();
    else if (key in KEYS) this.#goTo(Math.min(Math.max(this.#indexOf(article) + KEYS[key], 0), this.#total - 1));
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  #focused(target) {
    this.#current = this.#byNode.get(target.closest("article"));
    this.#setStop(this.#current);
  }

  /** Choose the article that the Tab key reaches: the one focused last, or the last one in sight. */
  #setStop(article = this.#current) {
    if (this.#current && !this.#articles.has(this.#current.key)) this.#current = article = undefined;
    if (!article && this.#stop && !this.#atEnd && this.#articles.get(this.#stop.key) === this.#stop) return;
    article ??= this.#rows.at(-1);
    if (article === this.#stop) return;
    this.#stop?.setStop(false);
    this.#stop = article;
    article?.setStop(true);
  }

  /** Remove the article that was kept for its focus. */
  #dropAway() {
    for (const [key, { node }] of this.#articles) {
      if (!node.hasAttribute("data-away") || node.contains(document.activeElement)) continue;
      this.#articles.delete(key);
      node.remove();
    }
    this.#setStop();
  }

  /** Take note that the page was hidden or shown. */
  #looked() {
    if (!this.#snapshot) return;
    if (document.hidden) {
      if (this.#unread && numberOf(this.#seen) < this.#unread) return;
      this.#unread = undefined;
      this.#look = numberOf(this.#seen);
      this.#rows.forEach((article, at) => this.#fill(article, this.#window.start + at));
    }
    this.#plan();
  }

  #renewDays() {
    for (const article of this.#articles.values()) article.renewDay();
    const midnight = new Date();
    midnight.setHours(24, 0, 0, 0);
    this.#later(midnight - Date.now() + 1, () => this.#renewDays());
  }

  #can(name, { entry, post, error, change, own }, actions) {
    if (post) return !!error && (name === "retry" || name === "discard");
    if (entry.removed || change || !actions[name]) return false;
    return name === "reply" || (name !== "retry" && name !== "discard" && (actions.canChange?.(entry) ?? own));
  }

  #act(name, { entry, post }, actions) {
    if (actions[name]) actions[name](post ?? entry);
    else if (name === "retry") retry(this.#room, post);
    else this.#room.discard(post.label);
  }

  /** Focus the message that was focused last, or the last one in sight. */
  focus() {
    if (!this.#stop) return this.scroller.focus();
    this.#stop.node.focus({ preventScroll: true });
    this.#stop.node.scrollIntoView({ block: "nearest" });
  }

  /** Remove the list. */
  close() {
    this.#closed.abort();
    this.#observer.disconnect();
    for (const timer of this.#timers) clearTimeout(timer);
    this.element.replaceChildren();
  }
}

/** Post a refused post again, with its fields and a new label. */
function retry(room, { frame: { label, username, message, type, id, replaces, ...fields } }) {
  room.discard(label);
  if (type === "remove") room.remove(id);
  else if (replaces) room.edit(replaces, message);
  else room.post(message, fields);
}
