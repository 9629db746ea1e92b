/** What the page says about people and the connection. Nothing here touches the document. */
import { nameOf } from "./text.js";

/** Join names as a sentence does; above three it counts the rest. */
export function namesOf(names) {
  const shown = names.length > 3 ? [...names.slice(0, 2), `${names.length - 2} others`] : names;
  return shown.length < 2 ? shown.join("") : `${shown.slice(0, -1).join(", ")} and ${shown.at(-1)}`;
}

/** Return who types; empty if nobody does. Each name has its own direction (UAX #9, FSI, PDI). */
export function typingWords(names) {
  const isolated = names.map((name) => `\u2068${name}\u2069`);
  return names.length ? `${namesOf(isolated)} ${names.length > 1 ? "are" : "is"} typing…` : "";
}

/** Return how many connections a room has. */
export const countWords = (count) => (count === 1 ? "1 connection" : `${count} connections`);

/** Return the state of the connection, as it is announced; `offline` is true since a connection was lost. */
export function stateWords({ state, error, reason }, offline = false) {
  if (state === "online") return "Online";
  if (state === "rejected") return `Rejected: ${reasonOf(error, reason)}`;
  if (state === "stopped") return "Left the room";
  return offline ? "Offline, reconnecting" : "Connecting";
}

const REASONS = {
  401: "the sign-in is not valid, or has expired",
  403: "you may not enter this room",
  404: "this server does not have this room",
  1009: "a message was too large",
};

/** Return why the server refused this page: its own words, if the close frame has some. */
function reasonOf(error, reason) {
  const told = /^closed with \d+ (.+)$/s.exec(reason ?? error?.message)?.[1];
  return REASONS[error?.code] ?? told ?? reason ?? error?.message ?? "the server gave no reason";
}

/** Return what helps after a refusal with a code; `tokens` is true if the server knows users by tokens. */
export function remedyWords(code, tokens) {
  if (code === 401) return tokens ? "What you have not sent yet stays here." : "This server asks for a sign-in.";
  if (code === 404) return "Open another room.";
  if (code === 403 || code === 1008) return "Open another room, or ask the people who run this server.";
  return "Try again. If that does not help, reload the page.";
}

/** Return the time until the next attempt, which is not announced. */
export function countdownWords({ state, retryAt }, now) {
  if (state !== "waiting") return "";
  const seconds = Math.ceil((retryAt - now) / 1000);
  return seconds > 0 ? ` in ${seconds} s` : "";
}
