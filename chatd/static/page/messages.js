/**
 * The list of messages. The document has a window of them, which moves as one scrolls. What one reads keeps its place.
 * Each change reads the layout, writes the document, and corrects the position once.
 */
import { Article } from "./article.js";
import { make, makeButton, setText } from "./elements.js";
import { begins, isMessage, timeOf } from "./groups.js";
import { News } from "./news.js";
import { formats } from "./text.js";
import { Viewport } from "./viewport.js";
import { around, epochOf, follow, indexOf, numberOf, reserve, slide } from "./window.js";

const PAGE = 100; // entries of an older page
const LEAVE = 300; // the milliseconds after a wheel in which the end does not hold the list
const LEAP = 10; // messages that PageUp and PageDown skip
const KEYS = { ArrowUp: -1, ArrowDown: 1, PageUp: -LEAP, PageDown: LEAP, Home: -Infinity, End: Infinity };

/** The list of messages. */
export class MessageList {
  #room;
  #username;
  #announce;
  #news;
  #view;
  #tools;
  #closed = new AbortController();
  #observer;
  #timers = new Set();

  #snapshot; // the newest
  #posts = []; // what the outbox shows at the end of the list
  #changes = new Map(); // unsent edits and removals by the ids of their messages
  #entries = new WeakMap(); // what posts will become
  #sent = []; // the posts that just left the outbox
  #refused = new Set(); // the labels of posts whose refusal was announced

  #window = { start: 0, end: 0 };
  #rows = []; // the articles of the window
  #articles = new Map(); // and all in the document, by key
  #current; // the article that was focused last
  #stop; // the article that the Tab key reaches
  #byNode = new WeakMap(); // articles by their elements
  #opened = Date.now();
  #planned = false; // a check of the window is due

  #atEnd = true;
  #leaving = false; // a wheel turns upwards, so the end does not hold the list
  #far = false; // the end is more than a screen away
  #epoch; // of the history shown; undefined until there is one
  #width; // of the feed
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
    this.#news = new News({ username, announce, seen, later: (wait, call) => this.#later(wait, call) });
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
    return this.#news.seen;
  }

  // The document

  #build() {
    this.scroller = make("div", "scroller");
    this.scroller.tabIndex = -1;
    this.feed = make("div", "feed");
    this.top = make("p", "older");
    this.newest = make("button", "newest");
    this.feed.setAttribute("role", "feed");
    this.feed.setAttribute("aria-label", "Messages");
    this.newest.type = "button";
    this.newest.hidden = this.feed.hidden = true;
    this.scroller.append(this.top, this.feed);
    this.element.replaceChildren(this.scroller, this.newest);
    this.#view = new Viewport(this.scroller, this.feed);
  }

  #listen() {
    const { signal } = this.#closed;
    const on = (target, type, call, passive) => target.addEventListener(type, call, { signal, passive });
    on(this.scroller, "scroll", () => this.#scrolled(), true);
    on(this.scroller, "wheel", ({ deltaY }) => deltaY < 0 && this.#leaveEnd(), true);
    on(this.newest, "click", () => this.#goToEnd());
    on(this.feed, "keydown", (event) => this.#pressed(event));
    on(this.feed, "focusin", ({ target }) => this.#focused(target));
    on(this.feed, "focusout", () => this.#later(0, () => this.#dropAway()));
    on(document, "visibilitychange", () => this.#looked());
    this.#observer = new ResizeObserver(() => this.#resized());
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
    const unread = !!entry.id && numberOf(entry.id) === this.#news.unread;
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
    if (entry.id) return indexOf(messages, numberOf(entry.id));
    return messages.length + Math.max(this.#posts.findIndex(({ label }) => label === post.label), 0);
  }

  // Changes

  /** Show a snapshot of the room; to be called at most once in a frame. */
  update(snapshot) {
    if (snapshot === this.#snapshot || this.#closed.signal.aborted) return;
    const { messages, outbox, last, state } = snapshot;
    const [top] = this.#rows;
    const visible = this.#hold();
    const { length: size } = this.#rows;
    const before = { posts: this.#posts, ...this.#snapshot };
    this.#snapshot = snapshot;
    this.#merge(outbox);
    // A post keeps its place when it becomes a message.
    const start = top?.item.entry.id ? this.#indexOf(top) : Math.min(this.#window.start, this.#total);
    const fresh = epochOf(last) !== this.#epoch || (top?.item.entry.id && !this.#exists(top));
    if (fresh) this.#restart(last);
    else this.#news.arrived(messages, last);
    this.#news.find(messages, state === "online" && !document.hidden);
    if (state === "online" && before.state !== "online") this.#failed = false;
    this.#compare(before.posts);
    const moved = { start, end: Math.min(start + size, this.#total) };
    if (fresh || !top) this.#window = around(this.#total, this.#total);
    else if (this.#atEnd) this.#window = follow(moved, this.#total);
    else this.#window = slide(moved, this.#total, { first: visible.first + start, last: visible.last + start });
    this.#render();
    this.#sent = [];
  }

  /** Separate the outbox into what is at the end of the list and what marks messages. */
  #merge(outbox) {
    const marks = (post) => !post.error && !isMessage(post);
    this.#posts = outbox.filter((post) => !marks(post));
    this.#changes = new Map(outbox.filter(marks).map((post) => [post.frame.replaces ?? post.frame.id, post]));
  }

  /** Find the posts that left the outbox, show a new one, and announce the refused ones. */
  #compare(before) {
    const labels = (posts) => new Set(posts.map(({ label }) => label));
    const [left, known] = [labels(this.#snapshot.outbox), labels(before)];
    this.#sent = before.filter(({ label }) => !left.has(label));
    const posted = this.#posts.some(({ label, at }) => at >= this.#opened && !known.has(label));
    if (posted && document.hasFocus()) this.#atEnd = true;
    for (const { label, error } of this.#posts) {
      if (error && !this.#refused.has(label)) this.#announce(`Not sent: ${error.message}`);
      if (error) this.#refused.add(label);
      else this.#refused.delete(label);
    }
  }

  /** Begin again with another history. */
  #restart(last) {
    this.#epoch = epochOf(last);
    this.#news.restart(last);
    this.#atEnd = true;
  }

  // Layout: what is read before a change, and corrected after it

  /** Hold what one reads in its place; return the places of the first and the last visible article. */
  #hold() {
    const visible = this.#view.visible(this.#rows);
    this.#view.hold(this.#atEnd ? undefined : this.#rows[visible.first]);
    return visible;
  }

  #resized() {
    const width = this.feed.clientWidth;
    if (this.#atEnd) this.#view.toEnd();
    else if (width !== this.#width) this.#view.restore();
    this.#width = width;
    this.#plan();
  }

  /** Bring the document to the window. */
  #render() {
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
    this.feed.hidden = !rows.length; // a feed has an article
    rows.forEach((article, at) => this.#fill(article, this.#window.start + at));
    this.#place(active);
    if (active && !this.#articles.has(active.key)) {
      const { node } = rows[Math.max(place, 0)] ?? rows.at(-1) ?? { node: this.scroller };
      node.focus({ preventScroll: true });
    }
    this.#setStop();
    this.#note();
    if (this.#atEnd) this.#view.toEnd();
    else this.#view.restore();
    this.#plan();
  }

  /** Return the article of an item: its own, that of the post which became this message, or a new one. */
  #take(index) {
    const { id, label, data } = this.#entryAt(index);
    const key = id ?? label;
    let article = this.#articles.get(key);
    if (!article && id && data.username === this.#username) {
      const post = this.#sent.find(({ label, frame }) => frame.message === data.message && this.#articles.has(label));
      article = this.#articles.get(post?.label);
      this.#articles.delete(post?.label);
    }
    if (!article) {
      article = new Article(this.#tools);
      this.#byNode.set(article.node, article);
    }
    article.key = key;
    this.#articles.set(key, article);
    return article;
  }

  #exists({ key, item: { entry, post } }) {
    if (!entry.id) return this.#posts.some(({ label }) => label === post.label);
    const { messages } = this.#snapshot;
    return messages[indexOf(messages, numberOf(key))]?.id === key;
  }

  /** Put the articles of the window in order, without touching the focused one. */
  #place(active) {
    const size = this.#epoch ? this.#news.head : -1;
    let next = this.feed.firstChild;
    for (const article of this.#rows) {
      const { node } = article;
      if (next?.hasAttribute("data-away")) next = next.nextSibling;
      while (node === active?.node && next !== node) {
        const other = next;
        next = next.nextSibling;
        other.remove();
      }
      if (node === next) next = next.nextSibling;
      else this.feed.insertBefore(node, next);
      article.setSize(size);
    }
  }

  /** Check the window in the next frame, once. */
  #plan() {
    if (this.#planned) return;
    this.#planned = true;
    requestAnimationFrame(() => {
      this.#planned = false;
      if (!this.#closed.signal.aborted) this.#check();
    });
  }

  #scrolled() {
    this.#locate();
    this.#plan();
  }

  #locate() {
    const { below } = this.#view;
    this.#atEnd = this.#window.end === this.#total && !below && !this.#leaving;
    this.#far = this.#window.end < this.#total || below > this.scroller.clientHeight;
  }

  /** Move the window to what is visible, and read older messages near its beginning. */
  #check() {
    if (!this.#snapshot || !this.scroller.clientHeight) return;
    this.#locate();
    const { start } = this.#window;
    const places = this.#hold();
    const visible = { first: places.first + start, last: places.last + start };
    const next = slide(this.#window, this.#total, visible);
    if (!this.#current) this.#setStop(this.#rows[places.last]);
    if (next.start !== start || next.end !== this.#window.end) {
      this.#window = next;
      this.#render();
    } else this.#note();
    if (next.start === 0 && visible.first <= reserve(visible)) this.#older();
  }

  /** Note what is in sight, and state what is not. */
  #note() {
    if (this.#atEnd && !document.hidden) this.#news.read(this.#snapshot.last);
    const { fresh } = this.#news;
    this.newest.hidden = this.#atEnd || !(fresh || this.#far);
    const text = fresh ? `${fresh} new` : "Newest messages";
    setText(this.newest, text);
    const { more, last, messages } = this.#snapshot;
    const first = numberOf(messages[0]?.id);
    if (this.#loading) this.#state("Loading older messages…");
    else if (this.#failed) this.#state("Older messages did not load.", "Try again");
    else if (more || !last) this.#state("");
    else this.#state(first > 1 ? "Older messages are no longer stored." : "This is the beginning of the room.");
  }

  #state(text, again) {
    if (this.top.firstChild?.textContent === text) return;
    this.top.replaceChildren(text);
    if (!again) return;
    const retry = () => {
      this.#failed = false;
      this.#older();
    };
    this.top.append(" ", makeButton("again", again, retry));
  }

  async #older() {
    const before = this.#snapshot;
    if (this.#loading || this.#failed || !before.more || !before.last) return;
    this.#loading = true;
    this.feed.setAttribute("aria-busy", true);
    this.#note();
    try {
      await this.#room.older(PAGE);
    } catch {
      this.#failed = true;
    }
    if (this.#closed.signal.aborted) return;
    this.#loading = false;
    this.feed.removeAttribute("aria-busy");
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
      this.#news.leave();
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
    else this.#room[name](post.label); // retry or discard
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
