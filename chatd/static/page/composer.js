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
 * Make the composer. `post(text)` sends a message and `change(id, text)` an edit. `typed()` is called at each key.
 * `lastOwn()` returns the message that ArrowUp edits, if there is one.
 */
export function createComposer(
  { form, box, left, editing, cancel, storage, most },
  { post, change, typed, lastOwn, announce },
) {
  let room;
  let edited; // the id of the message that is edited
  let composing = false; // an input method is at work
  let counted = 0; // 1 while the rest is counted, and 2 when the text is too long
  let width;
  const key = () => (edited ? `edit ${room}` : `draft ${room}`);

  function grow() {
    box.style.blockSize = "auto";
    const { scrollHeight, offsetHeight, clientHeight } = box;
    if (scrollHeight) box.style.blockSize = `${scrollHeight + offsetHeight - clientHeight}px`;
  }
  function measure() {
    const length = lengthOf(box.value.trimEnd());
    const words = lengthWords(length, most);
    const level = length > most ? 2 : Number(!!words);
    left.textContent = words;
    left.classList.toggle("error", level === 2);
    box.setAttribute("aria-invalid", String(level === 2));
    if (level > counted) announce(words);
    counted = level;
    grow();
  }
  /** Keep what is typed, also over a reload, until it is sent. */
  function keep() {
    if (!edited && !box.value) return storage.remove(key());
    storage.set(key(), edited ? JSON.stringify({ id: edited, text: box.value }) : box.value);
  }
  function begin(id, text) {
    edited = id;
    editing.hidden = !id;
    box.value = text;
    measure();
  }
  const draft = () => begin(undefined, storage.get(`draft ${room}`) ?? "");
  /** Leave an edit, for the draft that was there before. */
  function stop() {
    if (edited) storage.remove(key());
    draft();
    box.focus();
  }
  function send() {
    const text = box.value.trimEnd();
    if (!text.trim()) return box.focus();
    if (lengthOf(text) > most) {
      announce(left.textContent);
      return box.focus();
    }
    if (edited) change(edited, text);
    else {
      post(text);
      storage.remove(key());
    }
    stop();
  }
  function edit({ id, data }) {
    begin(id, data.message);
    keep();
    box.focus();
    box.setSelectionRange(box.value.length, box.value.length);
  }
  function resume() {
    try {
      const { id, text } = JSON.parse(storage.get(`edit ${room}`));
      begin(id, text);
    } catch {
      draft();
    }
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  cancel.addEventListener("click", stop);
  box.addEventListener("compositionstart", () => (composing = true));
  box.addEventListener("compositionend", () => (composing = false));
  box.addEventListener("input", () => {
    keep();
    measure();
    if (box.value && !edited) typed();
  });
  box.addEventListener("keydown", (event) => {
    if (composing || event.isComposing || event.keyCode === 229) return;
    const plain = !event.shiftKey && !event.ctrlKey && !event.altKey && !event.metaKey;
    if (event.key === "Enter" && !event.shiftKey && !event.altKey) {
      event.preventDefault();
      send();
    } else if (event.key === "Escape" && edited) {
      event.preventDefault();
      stop();
    } else if (event.key === "ArrowUp" && plain && !box.value && !edited && lastOwn()) {
      event.preventDefault();
      edit(lastOwn());
    }
  });
  new ResizeObserver(() => {
    if (form.clientWidth === width) return;
    width = form.clientWidth;
    grow();
  }).observe(form);
  return {
    edit,
    /** Show what was typed for a room. */
    open(name) {
      room = name;
      box.setAttribute("placeholder", `Message to ${name}`);
      resume();
    },
  };
}
