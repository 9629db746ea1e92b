/** The state of the connection, in words. A change is announced once; the seconds and the attempts are not. */
import { setText } from "./elements.js";
import { countdownWords, stateWords } from "./words.js";

/** Make the display; `retry` is called when the user asks to connect now, and `leave` if that button disappears. */
export function createStatus({ status, countdown, button }, retry, leave) {
  let shown;
  let offline = false; // since the connection was lost
  let timer;
  button.addEventListener("click", () => retry());
  function count() {
    clearTimeout(timer);
    const now = Date.now();
    countdown.textContent = countdownWords(shown, now);
    if (shown.state === "waiting") timer = setTimeout(count, (shown.retryAt - now) % 1000 || 1000);
  }
  return {
    /** Begin again, for another room. */
    reset: () => (offline = false),
    show(snapshot) {
      shown = snapshot;
      offline = snapshot.state === "waiting" || (offline && snapshot.state === "connecting");
      setText(status, stateWords(snapshot, offline));
      document.body.dataset.state = offline ? "waiting" : snapshot.state;
      const focused = document.activeElement === button;
      button.hidden = !offline;
      if (focused && button.hidden) leave();
      count();
    },
  };
}
