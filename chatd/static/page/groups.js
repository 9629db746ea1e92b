/** How messages are set: grouped, divided and announced. Nothing here touches the document. */
import { dayOf } from "./text.js";
import { indexOf, numberOf } from "./window.js";

const GROUP = 5 * 60_000; // the longest pause in a group, in milliseconds

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

/** Return what is announced for new messages: the few in full, the many as a number. */
export function announcement(entries) {
  if (entries.length > 3) return `${entries.length} new messages`;
  const short = (text) => (text.length > 300 ? `${text.slice(0, 300)}…` : text);
  return entries.map(({ data }) => `${data.username}: ${short(String(data.message ?? ""))}`).join("\n");
}
