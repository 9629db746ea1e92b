/** The one voice of the page for screen readers. Texts that come together are announced together, so none is lost. */
const PAUSE = 100; // milliseconds, after which the region is surely empty

/** Make the function that announces a text. A page that is hidden announces nothing. */
export function createAnnouncer(element) {
  let texts = [];
  return (text) => {
    if (document.hidden || !text) return;
    if (!texts.length) {
      element.textContent = "";
      setTimeout(() => {
        element.textContent = texts.join("\n");
        texts = [];
      }, PAUSE);
    }
    texts.push(text);
  };
}
