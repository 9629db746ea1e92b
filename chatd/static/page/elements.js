/** Elements of the document, which hold texts and no markup. */

/** Make an element with a class and a text. */
export function make(tag, name, text) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text !== undefined) element.textContent = text;
  return element;
}

/** Make a button that acts. */
export function makeButton(name, text, act) {
  const button = make("button", name, text);
  button.type = "button";
  button.addEventListener("click", act);
  return button;
}

/** Set the text of an element, unless it has this text: a screen reader may read it again. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}
