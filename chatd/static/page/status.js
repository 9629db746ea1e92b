/** The state of the connection, in words. A change is announced once; the seconds that count down are not. */
import { countdownWords, stateWords } from "./words.js";

/** Make the display; `retry` is called when the user asks to connect now. */
export function createStatus({ status, countdown, button }, retry) {
  let shown;
  let timer;
  button.addEventListener("click", () => retry());
  function count() {
    clearTimeout(timer);
    countdown.textContent = countdownWords(shown, Date.now());
    if (shown.state === "waiting") timer = setTimeout(count, 1000 - ((Date.now() - shown.retryAt) % 1000 || 0));
  }
  return {
    show(snapshot) {
      shown = snapshot;
      const words = stateWords(snapshot);
      if (status.textContent !== words) status.textContent = words;
      document.body.dataset.state = snapshot.state;
      button.hidden = snapshot.state !== "waiting";
      count();
    },
  };
}
