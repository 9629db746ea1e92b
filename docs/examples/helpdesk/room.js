// The page of a room. It shows what the snapshot of chatd.js holds, as text and never as HTML.

const { chat, room: name, user, role } = document.body.dataset;
const url = new URL(chat, location.href).href.replace(/\/$/, "");
const { Client } = await import(`${url}/static/chatd.js`);
const [state, people, older, messages, outbox, typing, form, cancel, problem] = [
  "state", "people", "older", "messages", "outbox", "typing", "post", "cancel", "problem",
].map((id) => document.getElementById(id));

async function token() {
  const response = await fetch("/token", { method: "POST" });
  if (response.status === 401) location.assign("/"); // the session has ended
  if (!response.ok) throw new Error(`no token: ${response.status}`);
  return response.text();
}
const room = new Client(url, { username: user, token }).room(name);

// What is shown

const items = new Map(); // the elements of messages, by id
let editing; // the id of the message whose text is in the form
let seen; // the newest id of which the application knows that it was seen

function make(tag, text) {
  const element = document.createElement(tag);
  element.textContent = text;
  return element;
}
function press(element, act) {
  element.addEventListener("click", () => act().catch((error) => (problem.textContent = error.message)));
  return element;
}
const button = (text, act) => press(make("button", text), act);
function fill(item, { id, data, removed }) {
  item.title = new Date(data.timestamp).toLocaleString();
  item.replaceChildren(make("b", data.username), make("span", data.message));
  item.classList.toggle("removed", !!removed);
  if (removed) return;
  if (data.username === user) item.append(button("Edit", async () => edit(id, data.message)));
  if (data.username === user || role === "agent") item.append(button("Remove", () => room.remove(id)));
  if (data.username !== user && role === "agent") item.append(button("Mute", () => mute(data.username)));
}
function show() {
  const now = room.snapshot();
  state.textContent = now.error?.message ?? now.state;
  people.textContent = now.presence?.users?.join(", ") ?? now.presence?.count ?? "";
  typing.textContent = now.typing.filter((one) => one !== user).map((one) => `${one} is typing`).join(", ");
  older.hidden = !now.more;
  now.messages.forEach((entry, place) => {
    const item = items.get(entry.id) ?? document.createElement("li");
    if (item.entry !== entry) fill(item, (item.entry = entry));
    if (item !== messages.children[place]) messages.insertBefore(item, messages.children[place] ?? null);
    items.set(entry.id, item);
  });
  while (messages.children.length > now.messages.length) {
    items.delete(messages.lastChild.entry.id);
    messages.lastChild.remove();
  }
  outbox.replaceChildren(
    ...now.outbox.map(({ label, frame, error }) => {
      const item = make("li", `${frame.message ?? "Remove"} (${error?.message ?? "sending"})`);
      if (error) item.append(button("Discard", async () => room.discard(label)));
      return item;
    }),
  );
  if (now.last && now.last !== seen && !document.hidden) {
    seen = now.last;
    fetch("/seen", { method: "POST", body: `${name} ${seen}` }).catch(() => (seen = undefined));
  }
}

// What the person does

function edit(id, text) {
  editing = id;
  cancel.hidden = !id;
  form.elements.text.value = text;
  form.elements.text.focus();
}
async function mute(username) {
  const response = await fetch("/mute", { method: "POST", body: username });
  if (!response.ok) throw new Error(await response.text());
}
form.addEventListener("submit", (event) => {
  event.preventDefault();
  const { value } = form.elements.text;
  if (editing) room.edit(editing, value);
  else room.post(value);
  edit(undefined, "");
});
form.addEventListener("input", () => room.typing());
press(cancel, async () => edit(undefined, ""));
press(older, () => room.older());
document.addEventListener("visibilitychange", show);
room.subscribe(show);
show();
