/** Who is in the room, and who types. */
import { nameOf } from "./text.js";
import { countWords, typingWords } from "./words.js";

/** Return the list as one of names. */
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
export function createPeople({ count, list, typing, button }) {
  return {
    show({ presence, typing: names }, me) {
      const words = presence ? countWords(presence.count) : "";
      count.textContent = presence && !presence.users ? `${words}, too many to list` : words;
      fill(list, (presence?.users ?? []).map(nameOf));
      button.textContent = presence ? `People (${presence.users?.length ?? presence.count})` : "People";
      const sentence = typingWords(names, me);
      if (typing.textContent !== sentence) typing.textContent = sentence;
    },
  };
}
