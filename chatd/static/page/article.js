/** One message or one unsent post in the document. */
import { make, makeButton } from "./elements.js";
import { nameOf, partsOf } from "./text.js";
import { numberOf } from "./window.js";

let serial = 0; // makes the ids of elements unique

function timeElement(at, text, full) {
  const element = make("time", "time", text);
  element.dir = "auto";
  if (!Number.isNaN(at)) element.dateTime = new Date(at).toISOString();
  if (full) element.title = full;
  return element;
}

function textElement(text, removed) {
  const element = make("p", removed ? "text removed" : "text");
  element.dir = "auto";
  if (removed) element.textContent = "message removed";
  else
    for (const { text: words, href } of partsOf(text)) {
      if (!href) {
        element.append(words);
        continue;
      }
      const link = make("a", "", words);
      link.href = link.title = href;
      link.rel = "noopener noreferrer nofollow";
      link.target = "_blank";
      element.append(link);
    }
  return element;
}

/**
 * An article. Its `item` says what it shows:
 * `entry`, the message or what a post will become, `at`, its time, `own`, `day` and `group`, whether it begins one,
 * `unread`, whether the unread messages begin with it, `post`, the unsent post, `error`, the reason for which it was
 * refused, and `change`, the unsent edit or removal of the message.
 */
export class Article {
  /** `tools` are the formats, `act(name, item)`, and `can(name, item)`. */
  constructor(tools) {
    this.tools = tools;
    this.node = document.createElement("article");
    this.node.tabIndex = -1;
    this.id = `message-${(serial += 1)}`;
    this.stop = false;
  }

  /** Show an item in place of the last one. */
  show(item) {
    const { node, id, tools } = this;
    const { entry, at, own, day, group, unread, post, error, change } = item;
    const inside = node !== document.activeElement && node.contains(document.activeElement);
    this.item = item;
    const by = make("div", group ? "by" : "by visually-hidden");
    const name = make("bdi", "name", nameOf(entry.data.username));
    const time = timeElement(at, tools.formats.time(at), tools.formats.full(at));
    const text = textElement(String(change?.frame.message ?? entry.data.message ?? ""), entry.removed);
    by.append(name, " ", time);
    this.text = text;
    const body = make("div", "body");
    body.append(by, text);
    const dividers = this.#dividers(day, unread, at);
    const labels = [...dividers, name, text, time];
    for (const mark of marksOf(item)) {
      const element = make("span", "mark", mark);
      element.dir = "auto";
      labels.push(element);
      body.append(element);
    }
    const actions = make("div", "actions");
    for (const [name, word] of ACTIONS)
      if (tools.can(name, item)) actions.append(makeButton(name, word, () => tools.act(name, this.item)));
    if (actions.firstChild) body.append(actions);

    labels.forEach((element, place) => (element.id = `${id}-${place}`));
    node.setAttribute("aria-labelledby", labels.map((element) => element.id).join(" "));
    const classes = { own, group, pending: post && !error, failed: error };
    node.className = ["message", ...Object.keys(classes).filter((name) => classes[name])].join(" ");
    if (entry.id) node.setAttribute("aria-posinset", numberOf(entry.id));
    node.replaceChildren(...dividers, body);
    this.setStop(this.stop);
    if (inside) node.focus({ preventScroll: true });
  }

  #dividers(day, unread, at) {
    const all = [];
    this.dayTime = undefined;
    if (day) {
      const heading = make("h2", "day");
      this.dayTime = timeElement(at, this.tools.formats.day(at, Date.now()));
      heading.append(this.dayTime);
      all.push(heading);
    }
    if (unread) all.push(make("p", "unread", "New since you looked"));
    return all;
  }

  /** State the number of the newest message. */
  setSize(size) {
    if (size === this.size || !this.item.entry.id) return;
    this.size = size;
    this.node.setAttribute("aria-setsize", size);
  }

  /** Write the day again, because midnight has passed. */
  renewDay() {
    if (this.dayTime) this.dayTime.textContent = this.tools.formats.day(this.item.at, Date.now());
  }

  /** Make this the article, and its links and buttons those, which the Tab key reaches. */
  setStop(stop) {
    this.stop = stop;
    this.node.tabIndex = stop ? 0 : -1;
    for (const element of this.node.querySelectorAll("a, button")) element.tabIndex = stop ? 0 : -1;
  }
}

const ACTIONS = [
  ["retry", "Retry"],
  ["discard", "Discard"],
  ["reply", "Reply"],
  ["edit", "Edit"],
  ["remove", "Remove"],
];

/** Return the words below a message. */
function marksOf({ entry, post, error, change }) {
  if (post) {
    const what = { edit: "Edit not saved", remove: "Not removed", message: "Not sent" }[kindOf(post)];
    return [error ? `${what}: ${error.message}` : "Sending…"];
  }
  if (change) return [change.frame.type ? "Removing…" : "Saving…"];
  return entry.replaced && !entry.removed ? ["edited"] : [];
}

const kindOf = ({ frame }) => (frame.type ? "remove" : frame.replaces ? "edit" : "message");
