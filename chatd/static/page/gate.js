/** What stands in the place of the composer while one cannot write: the reason, and what helps. */
import { make, makeButton } from "./elements.js";

/** Make the gate; `element` is shown while it is shut, and `composer` while it is open. */
export function createGate(element, composer) {
  const focus = () => (element.querySelector("a, button") ?? element).focus();
  function set(shut) {
    const focused = (shut ? composer : element).contains(document.activeElement);
    element.hidden = !shut;
    composer.hidden = shut;
    if (!focused) return;
    if (shut) focus();
    else composer.querySelector("textarea").focus();
  }
  return {
    focus,
    get shut() {
      return !element.hidden;
    },
    open() {
      if (!element.hidden) set(false);
    },
    /** Show words, with a link to an address or with a button that acts. */
    close(words, { link, href, button, act } = {}) {
      const parts = [make("p", "", words)];
      if (link) parts.push(Object.assign(make("a", "", link), { href }));
      if (button) parts.push(makeButton("", button, act));
      element.replaceChildren(...parts);
      set(true);
    },
  };
}
