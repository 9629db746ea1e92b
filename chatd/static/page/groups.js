/** How messages are set: grouped, divided, and merged with the posts of the outbox. Nothing here touches the document. */
import { dayOf } from "./text.js";
import { indexOf, numberOf, search } from "./window.js";

const GROUP = 5 * 60_000; // the longest pause in a group, in milliseconds
const SKEW = 60_000; // how much the clock of the server may lag

export const timeOf = ({ data }) => Date.parse(data.timestamp);

/** Return whether a message begins a day, and whether it begins a group, of which the name is shown once. */
export function begins(entry, previous) {
  if (!previous) return { day: true, group: true };
  const [time, before] = [timeOf(entry), timeOf(previous)];
  const day = dayOf(time) !== dayOf(before);
  return { day, group: day || entry.data.username !== previous.data.username || !(Math.abs(time - before) <= GROUP) };
}

/** Return the number of the first message of another user after a number; undefined without one. */
export function firstUnread(messages, number, username) {
  for (let at = indexOf(messages, number + 1); at < messages.length; at += 1)
    if (messages[at].data.username !== username) return numberOf(messages[at].id);
  return undefined;
}

/** Return whether a post is a message, and not an edit or a removal. */
export const isMessage = ({ frame }) => !frame.replaces && !frame.type;

/**
 * Pair posts with the messages that they became. The server sends a message before its ack, so for a moment both exist.
 * Messages have no label. A post is the first message of its user with its text that is newer than the post.
 * @param {Map<string, number>} heads the number of the newest message when a post was made, by its label. A post of an
 *     earlier page has none: there the clock decides, until the ack comes.
 * @returns {Map<string, string>} the labels by the ids of the messages
 */
export function pair(posts, messages, heads) {
  const labels = new Map();
  for (const post of posts) {
    const { label, frame, at } = post;
    if (post.error || !isMessage(post)) continue;
    const head = heads.get(label);
    const isLate = (index) => !(timeOf(messages[index]) < at - SKEW);
    let index = head === undefined ? search(messages.length, isLate) : indexOf(messages, head + 1);
    for (; index < messages.length; index += 1) {
      const { id, data } = messages[index];
      if (data.username !== frame.username || data.message !== frame.message || labels.has(id)) continue;
      labels.set(id, label);
      break;
    }
  }
  return labels;
}

/** Return what is announced for new messages: the few in full, the many as a number. */
export function announcement(entries) {
  if (entries.length > 3) return `${entries.length} new messages`;
  const short = (text) => (text.length > 300 ? `${text.slice(0, 300)}…` : text);
  return entries.map(({ data }) => `${data.username}: ${short(String(data.message ?? ""))}`).join("\n");
}
