/** What the page says about people and the connection. Nothing here touches the document. */
import { nameOf } from "./text.js";

/** Join names as a sentence does; above three it counts the rest. */
export function namesOf(names) {
  const shown = names.length > 3 ? [...names.slice(0, 2), `${names.length - 2} others`] : names;
  return shown.length < 2 ? shown.join("") : `${shown.slice(0, -1).join(", ")} and ${shown.at(-1)}`;
}

/** Return who types, apart from this user; empty if nobody does. Each name has its own direction (UAX #9, FSI, PDI). */
export function typingWords(names, me) {
  const others = names.filter((name) => name !== me).map((name) => `\u2068${nameOf(name)}\u2069`);
  return others.length ? `${namesOf(others)} ${others.length > 1 ? "are" : "is"} typing…` : "";
}

/** Return how many connections a room has. */
export const countWords = (count) => (count === 1 ? "1 connection" : `${count} connections`);

/** Return the state of the connection, as it is announced. */
export function stateWords({ state, error, reason }) {
  if (state === "online") return "Online";
  if (state === "connecting") return "Connecting";
  if (state === "waiting") return "Offline, reconnecting";
  if (state === "stopped") return "Left the room";
  return refusalWords(error?.code) ?? `The server refused this page: ${reason ?? error?.message}`;
}

function refusalWords(code) {
  return {
    401: "Your sign-in is not valid, or has expired.",
    403: "You may not enter this room.",
    404: "This server does not have this room.",
  }[code];
}

/** Return the time until the next attempt, which is not announced. */
export function countdownWords({ state, retryAt }, now) {
  if (state !== "waiting") return "";
  const seconds = Math.ceil((retryAt - now) / 1000);
  return seconds > 0 ? ` in ${seconds} s` : "";
}
