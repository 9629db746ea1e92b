/** The regions of the page: F6 moves between them, and on a narrow screen a button shows each panel. */

/** Return the next of some regions, or the one before; the first one if none has the focus. */
export function nextOf(regions, current, backwards) {
  const place = regions.indexOf(current);
  if (place < 0) return regions[0];
  return regions[(place + (backwards ? regions.length - 1 : 1)) % regions.length];
}

/** Make the panels: each a `panel` with its `button`. `regions` have an `element` and a `focus` function. */
export function createPanels(panels, regions, leave) {
  const isShown = (element) => element.checkVisibility?.() ?? element.offsetParent !== null;
  function set(panel, open) {
    panel.panel.toggleAttribute("data-open", open);
    panel.button.setAttribute("aria-expanded", String(open));
  }
  function close(focus) {
    for (const panel of panels) {
      if (!panel.panel.hasAttribute("data-open")) continue;
      set(panel, false);
      if (focus) panel.button.focus();
    }
  }
  for (const panel of panels) {
    panel.button.addEventListener("click", () => {
      const open = !panel.panel.hasAttribute("data-open");
      close(false);
      set(panel, open);
      if (open) panel.panel.focus();
    });
    panel.panel.querySelector(".title button").addEventListener("click", () => close(true));
  }
  document.addEventListener("pointerdown", ({ target }) => {
    if (!panels.some(({ panel, button }) => panel.contains(target) || button.contains(target))) close(false);
  });
  document.addEventListener("keydown", (event) => {
    if (document.querySelector("dialog[open]")) return;
    if (event.key === "F6") {
      event.preventDefault();
      const shown = regions.filter(({ element }) => isShown(element));
      const isActive = ({ element }) => element.contains(document.activeElement);
      let region = shown.find(isActive);
      for (const _ of shown) {
        region = nextOf(shown, region, event.shiftKey);
        region.focus();
        if (isActive(region)) return; // another one has nothing to focus yet
      }
    } else if (event.key === "Escape") {
      if (panels.some(({ panel }) => panel.hasAttribute("data-open"))) close(true);
      else leave();
    }
  });
  return { close: () => close(false) };
}
