/**
 * Who the user is. Without tokens a person chooses a name. With tokens the name is a claim of the token, which comes in
 * the fragment of the address or in a cookie that only the server reads.
 */
import { nameOf } from "./text.js";

const UNSENT = "Some of your messages are not sent yet. Change your name when they are.";

/** Return why a name is not possible, in one sentence; empty if it is. The schema allows `most` characters. */
export function whyNotName(name, most) {
  if (!name) return "Type a name.";
  if (nameOf(name) !== name) return "Type a name that people can see.";
  const length = [...name].length;
  return length > most ? `A name has ${most} characters at most, and this one has ${length}.` : "";
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

/**
 * Make the function that asks for a name, in place of another one if that is given. `take(name)` is called with it, and
 * `isBusy()` returns whether the old name is still needed.
 */
export function createIntroduction({ dialog, heading, input, help, cancel, most }, { isBusy, take }) {
  let former;
  let chosen;
  function show(text, isFault) {
    help.textContent = text;
    help.classList.toggle("error", isFault);
    input.setAttribute("aria-invalid", String(isFault));
  }
  function ask(name) {
    former = name;
    chosen = undefined;
    heading.textContent = name ? "Change your name" : "What is your name?";
    cancel.hidden = !name;
    input.value = name ?? "";
    show("Everyone in the room sees it.", false);
    dialog.showModal();
    input.select();
  }
  dialog.querySelector("form").addEventListener("submit", (event) => {
    const name = input.value.trim();
    const busy = former && name !== former && isBusy();
    const fault = whyNotName(name, most) || (busy ? UNSENT : "");
    if (fault) {
      event.preventDefault();
      show(fault, true);
    } else chosen = name;
  });
  cancel.addEventListener("click", () => dialog.close());
  dialog.addEventListener("cancel", (event) => former || event.preventDefault());
  // Browsers close a dialog that one cancels twice, so the question is asked again.
  dialog.addEventListener("close", () => {
    if (chosen && chosen !== former) take(chosen);
    else if (!former) ask();
  });
  return ask;
}
