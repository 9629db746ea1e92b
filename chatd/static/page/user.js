/**
 * Who the user is. Without tokens a person chooses a name. With tokens the name is a claim of the token, which comes in
 * the fragment of the address or in a cookie that only the server reads.
 */
import { nameOf } from "./text.js";

const MOST = 30; // characters of a name, as the schema counts them

/** Return why a name is not possible, in one sentence; empty if it is. */
export function whyNotName(name) {
  if (!name) return "Type a name.";
  if (nameOf(name) !== name) return "Type a name that people can see.";
  const length = [...name].length;
  return length > MOST ? `A name has ${MOST} characters at most, and this one has ${length}.` : "";
}

/** Return the claims of a JSON Web Token, which only the server verifies; empty if it has none. */
export function claimsOf(token) {
  try {
    const text = atob(token.split(".")[1].replaceAll("-", "+").replaceAll("_", "/"));
    return JSON.parse(new TextDecoder().decode(Uint8Array.from(text, (char) => char.charCodeAt(0)))) ?? {};
  } catch {
    return {};
  }
}

/** Separate a token from the fragment of an address: `#token=…`, alone or among other parts. */
export function splitFragment(hash) {
  const parts = hash.replace(/^#/, "").split("&");
  const token = parts.find((part) => part.startsWith("token="))?.slice(6).replaceAll("%2E", ".");
  const rest = parts.filter((part) => part && !part.startsWith("token=")).join("&");
  return { token, rest: rest && `#${rest}` };
}

/** Return the address at which a person signs in, and which leads back to a page. */
export function signInUrl(login, page) {
  const url = new URL(login, page);
  const back = new URL(page);
  back.hash = "";
  url.searchParams.set("return_to", back.href);
  return url.href;
}
