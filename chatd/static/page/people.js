/** Who is in the room, and who types. */
import { nameOf } from "./text.js";
import { countWords, typingWords } from "./words.js";

/** Show names in a list, if they differ from those that it has. */
function fill(list, names) {
  if (names.join("\n") === [...list.children].map((item) => item.textContent).join("\n")) return;
  const items = names.map((name) => {
    const item = document.createElement("li");
    item.append(Object.assign(document.createElement("bdi"), { textContent: name }));
    return item;
  });
  list.replaceChildren(...items);
}

/** Make the display of the elements for the number, the names and those who type. */
export function createPeople({ count, list, typing, badge }) {
  return {
    show({ presence, typing: names }, me) {
      const words = presence ? countWords(presence.count) : "Not known while offline";
      set(count, presence && !presence.users ? `${words}, too many to list` : words);
      fill(list, (presence?.users ?? []).map(nameOf));
      set(badge, presence ? String(presence.users?.length ?? presence.count) : "");
      set(typing, typingWords(names.filter((name) => name !== me).map(nameOf)));
    },
  };
}
function set(element, text) {
  if (element.textContent !== text) element.textContent = text;
}
