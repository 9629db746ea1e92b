/** Who is in the room, and who types. */
import { make, setText } from "./elements.js";
import { nameOf } from "./text.js";
import { countWords, typingWords } from "./words.js";

/** Show names in a list, if they differ from those that it has. */
function fill(list, names) {
  if (names.join("\n") === [...list.children].map((item) => item.textContent).join("\n")) return;
  const items = names.map((name) => {
    const item = make("li");
    item.append(make("bdi", "", name));
    return item;
  });
  list.replaceChildren(...items);
}

/** Make the display of the elements for the number, the names and those who type. */
export function createPeople({ count, list, typing, badge }) {
  return {
    show({ presence, typing: names }, me) {
      const words = presence ? countWords(presence.count) : "Not known while offline";
      setText(count, presence && !presence.users ? `${words}, too many to list` : words);
      fill(list, (presence?.users ?? []).map(nameOf));
      setText(badge, presence ? String(presence.users?.length ?? presence.count) : "");
      setText(typing, typingWords(names.filter((name) => name !== me).map(nameOf)));
    },
  };
}
