/** What is new for this user: how many messages are below, where the unread ones begin, and what is announced. */
import { announcement, firstUnread } from "./groups.js";
import { epochOf, indexOf, numberOf } from "./window.js";

const QUIET = 1000; // the milliseconds in which messages are collected for one announcement

export class News {
  /** The number of the newest entry. */
  head = 0;
  /** The number of messages of others since the end was last in sight. */
  fresh = 0;
  /** The id of the newest entry when the end was last in sight. */
  seen;
  /** The number of the first unread message; undefined without one. */
  unread;
  #after; // the number after which messages are unread, until the first one is found
  #unspoken = [];

  /** `later(wait, call)` calls a function after milliseconds; `seen` is that of an earlier list of the room. */
  constructor({ username, announce, later, seen }) {
    Object.assign(this, { username, announce, later, seen });
    if (seen) this.#after = numberOf(seen);
  }

  /** Begin with a history that does not continue the last one. */
  restart(last) {
    if (epochOf(this.seen) !== epochOf(last)) this.#after = this.seen = undefined;
    this.head = numberOf(last);
    this.unread = undefined;
    this.#unspoken = [];
    this.fresh = 0;
  }

  /** Count and announce the messages that followed. */
  arrived(messages, last) {
    for (let at = indexOf(messages, this.head + 1); at < messages.length; at += 1) {
      if (messages[at].data.username === this.username) continue;
      if (!this.#unspoken.length) this.later(QUIET, () => this.#speak());
      this.#unspoken.push(messages[at]);
      this.fresh += 1;
    }
    this.head = numberOf(last);
  }

  #speak() {
    if (this.#unspoken.length) this.announce(announcement(this.#unspoken));
    this.#unspoken = [];
  }

  /** Find the first unread message. `present` is true if the user sees the page, with all messages. */
  find(messages, present) {
    if (this.#after === undefined || !this.head) return;
    this.unread = firstUnread(messages, this.#after, this.username);
    if (this.unread || present) this.#after = undefined;
  }

  /** The end is in sight. */
  read(last) {
    this.seen = last;
    this.fresh = 0;
  }

  /** The user looks away: what follows is unread, unless earlier messages are. */
  leave() {
    if (this.unread > numberOf(this.seen)) return;
    this.unread = undefined;
    this.#after = numberOf(this.seen);
  }
}
