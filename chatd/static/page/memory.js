/** What the browser remembers for this page. Where it keeps nothing, the page remembers until it is closed. */

/** Make a memory: `localStorage` is for all tabs, and `sessionStorage` for this one. */
export function memory(name) {
  const kept = new Map();
  const attempt = (act) => {
    try {
      return act(globalThis[name]);
    } catch {
      return undefined; // it is blocked or full
    }
  };
  return {
    get: (key) => kept.get(key) ?? attempt((storage) => storage.getItem(`chatd ${key}`)) ?? undefined,
    set(key, value) {
      kept.set(key, value);
      attempt((storage) => storage.setItem(`chatd ${key}`, value));
    },
    remove(key) {
      kept.delete(key);
      attempt((storage) => storage.removeItem(`chatd ${key}`));
    },
  };
}
