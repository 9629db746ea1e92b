/**
 * The regions of the page: F6 moves between them. On a narrow page a button shows a panel over the rest, which is inert
 * until the panel is closed.
 */

/** Return the next of some regions, or the one before; the first one if none has the focus. */
export function nextOf(regions, current, backwards) {
  const place = regions.indexOf(current);
  if (place < 0) return regions[0];
  return regions[(place + (backwards ? regions.length - 1 : 1)) % regions.length];
}

const isShown = (element) => element.checkVisibility?.() ?? element.offsetParent !== null;

/** Return what a panel covers; the headings and landmarks stay for screen readers. */
function besides(panel) {
  const around = [...document.body.children].filter((one) => one !== panel && !one.matches("dialog, #announcer"));
  const controls = (landmark) => [...landmark.children].filter((part) => !part.querySelector("h1"));
  return around.flatMap((one) => (one.matches("header, main") ? controls(one) : one));
}

/** Make the panels: each a `panel` with its `button`. `regions` have an `element` and a `focus` function. */
export function createPanels(panels, regions, leave) {
  let open;
  let still = []; // what is inert behind it
  function show(next) {
    open = next;
    for (const { panel, button } of panels) {
      panel.toggleAttribute("data-open", panel === open?.panel);
      button.setAttribute("aria-expanded", String(panel === open?.panel));
    }
    for (const element of still) element.inert = false;
    still = open ? besides(open.panel) : [];
    for (const element of still) element.inert = true;
  }
  function close(focus) {
    const { button } = open ?? {};
    show(undefined);
    if (focus) button?.focus();
  }
  for (const panel of panels) {
    panel.closer = panel.panel.querySelector(".title button");
    panel.closer.addEventListener("click", () => close(true));
    // What the panel does not cover belongs to it too, so a touch beside it only closes it.
    panel.panel.addEventListener("click", ({ target, clientX }) => {
      const { left, right } = panel.panel.getBoundingClientRect();
      if (open && target === panel.panel && (clientX < left || clientX > right)) close(true);
    });
    panel.button.addEventListener("click", () => {
      show(panel);
      panel.panel.focus();
    });
  }
  addEventListener("resize", () => open && !isShown(open.closer) && close(false)); // the page is wide now
  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.isComposing || document.querySelector("dialog[open]")) return;
    if (event.key === "F6" && !event.ctrlKey && !event.altKey && !event.metaKey) {
      event.preventDefault();
      const shown = regions.filter(({ element }) => isShown(element) && (!open || element === open.panel));
      const isActive = ({ element }) => element.contains(document.activeElement);
      let region = shown.find(isActive);
      for (const _ of shown) {
        region = nextOf(shown, region, event.shiftKey);
        region.focus();
        if (isActive(region)) return; // another one has nothing to focus yet
      }
    } else if (event.key === "Escape") {
      if (open) close(true);
      else leave();
    }
  });
  return { close };
}
