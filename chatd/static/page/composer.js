/** The field for a new message. What is typed stays with its room, until it is sent. */
const NEAR = 0.8; // the part of the longest message from which the rest is counted

/** Return the number of characters, as the schema of the server counts them. */
export const lengthOf = (text) => [...text].length;

/** Return what to state about the length of a text; empty while it is short. */
export function lengthWords(length, most) {
  const characters = (count) => (count === 1 ? "1 character" : `${count} characters`);
  if (length > most) return `${characters(length - most)} too many`;
  return length >= most * NEAR ? `${characters(most - length)} left` : "";
}

/**
 * Make the composer. `post(text)` sends a message and `change(entry, text)` an edit. `typed()` is called at each key.
 * `lastOwn()` returns the message that ArrowUp edits, if there is one.
 */
export function createComposer({ form, box, left, editing, cancel, storage, most }, { post, change, typed, lastOwn }) {
  let room;
  let entry; // the message that is edited
  let composing = false; // an input method is at work
  const key = () => `draft ${room}`;

  function measure() {
    const length = lengthOf(box.value);
    left.textContent = lengthWords(length, most);
    left.classList.toggle("error", length > most);
    box.setAttribute("aria-invalid", String(length > most));
    box.style.blockSize = "auto";
    box.style.blockSize = `${box.scrollHeight + 2}px`;
  }
  function fill(text) {
    box.value = text;
    measure();
  }
  function stop() {
    entry = undefined;
    editing.hidden = true;
    fill(storage.get(key()) ?? "");
    box.focus();
  }
  function send() {
    const text = box.value;
    if (!text.trim() || lengthOf(text) > most) return box.focus();
    if (entry) {
      change(entry, text);
      return stop();
    }
    post(text);
    storage.remove(key());
    fill("");
    box.focus();
  }
  function edit(message) {
    entry = message;
    editing.hidden = false;
    fill(message.data.message);
    box.focus();
    box.setSelectionRange(box.value.length, box.value.length);
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  cancel.addEventListener("click", stop);
  box.addEventListener("compositionstart", () => (composing = true));
  box.addEventListener("compositionend", () => (composing = false));
  box.addEventListener("input", () => {
    if (!entry) storage.set(key(), box.value);
    measure();
    if (box.value && !entry) typed();
  });
  box.addEventListener("keydown", (event) => {
    if (composing || event.isComposing || event.keyCode === 229) return;
    const plain = !event.shiftKey && !event.ctrlKey && !event.altKey && !event.metaKey;
    if (event.key === "Enter" && !event.shiftKey && !event.altKey) {
      event.preventDefault();
      send();
    } else if (event.key === "Escape" && entry) {
      event.stopPropagation();
      stop();
    } else if (event.key === "ArrowUp" && plain && !box.value && !entry && lastOwn()) {
      event.preventDefault();
      edit(lastOwn());
    }
  });
  return {
    edit,
    focus: () => box.focus(),
    /** Show what was typed for a room. */
    open(name) {
      room = name;
      entry = undefined;
      editing.hidden = true;
      box.setAttribute("placeholder", `Message to ${name}`);
      fill(storage.get(key()) ?? "");
    },
  };
}
