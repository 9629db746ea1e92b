/** The question before a message is removed, which nobody can undo. */

/** Make the function that asks, and calls what it is given after a yes. `focus()` finds a place for a lost focus. */
export function createRemoval({ dialog, keep }, { focus }) {
  let remove;
  dialog.addEventListener("close", () => {
    if (dialog.returnValue === "remove") remove();
    const { activeElement: focused, body } = document;
    if (focused === body || dialog.contains(focused)) focus(); // the article was drawn again meanwhile
  });
  return (act) => {
    remove = act;
    dialog.returnValue = ""; // Escape does not change it
    dialog.showModal();
    keep.focus();
  };
}
