/** Where the articles of a window are in the scroller, and how what one reads stays in its place. */
import { search } from "./window.js";

const NEAR = 2; // pixels from the end that count as the end

export class Viewport {
  #shim = 0; // pixels, less than one
  #held; // what one reads, and its distance from the top

  constructor(scroller, feed) {
    Object.assign(this, { scroller, feed });
  }

  /** The pixels below what is visible; at most `NEAR` at the end. */
  get below() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroller;
    const below = scrollHeight - scrollTop - clientHeight;
    return below <= NEAR ? 0 : below;
  }

  /** Return the places of the first and the last visible article. */
  visible(rows) {
    const { top, bottom } = this.scroller.getBoundingClientRect();
    const rect = (at) => rows[at].node.getBoundingClientRect();
    const first = Math.max(Math.min(search(rows.length, (at) => rect(at).bottom > top), rows.length - 1), 0);
    return { first, last: Math.max(search(rows.length, (at) => rect(at).top >= bottom) - 1, first) };
  }

  #top = (article) => article.text.getBoundingClientRect().top - this.scroller.getBoundingClientRect().top;

  /** Hold the text of an article, which is what one reads. */
  hold(article) {
    this.#held = article && { article, top: this.#top(article) };
  }

  /** Put the held text where it was. The feed takes the parts of pixels that no scroller can. */
  restore() {
    const { article, top } = this.#held ?? {};
    if (!article?.text.isConnected) return;
    this.scroller.scrollTop += this.#top(article) - top;
    const rest = this.#top(article) - top;
    if (Math.abs(rest) < 0.01 || Math.abs(rest) >= 1) return; // none, or an end of the list
    const shim = this.#shim - rest;
    this.scroller.scrollTop -= Math.floor(shim);
    this.#shim = shim - Math.floor(shim);
    this.feed.style.paddingBlockStart = `${this.#shim}px`;
  }

  toEnd() {
    this.scroller.scrollTop = this.scroller.scrollHeight;
  }
}
