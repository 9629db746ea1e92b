/**
 * Which messages are in the document: a window, from the index `start` up to but not including `end`. It moves when one
 * scrolls towards an edge, so that the document stays small. Nothing here touches the document.
 */

/** The most messages of a window. */
export const MOST = 300;
const STEP = 24; // how far a window moves at once
const JUMP = 100; // the size of a new window
const LEAST = 20; // messages that should exist beyond what one sees

export const numberOf = (id) => (id ? Number(id.split("-")[1]) : 0);
export const epochOf = (id) => id?.split("-")[0];

/** Return the smallest index from 0 to `length` of which a test is true; it is false below and true above. */
export function search(length, test) {
  let low = 0;
  for (let high = length; low < high; ) {
    const middle = (low + high) >> 1;
    if (test(middle)) high = middle;
    else low = middle + 1;
  }
  return low;
}

/** Return the index of the first message with this number or a higher one. */
export const indexOf = (messages, number) => search(messages.length, (at) => numberOf(messages[at].id) >= number);

/** Return a new window around an index. */
export function around(index, total) {
  const start = Math.max(Math.min(index - JUMP / 2, total - JUMP), 0);
  return { start, end: Math.min(start + JUMP, total) };
}

/** Return how many messages should exist on each side of the visible ones, from `first` to `last`. */
export function reserve({ first, last }) {
  const seen = last - first + 1;
  return Math.max(Math.min(Math.max(2 * seen, LEAST), Math.floor((MOST - seen - STEP - 1) / 2)), 0);
}

/** Return the window, moved by one step if the visible messages are too near to an edge. */
export function slide({ start, end }, total, visible) {
  const { first, last } = visible;
  const space = reserve(visible);
  if (start > 0 && first - start <= space) {
    start = Math.max(start - STEP, 0);
    end = Math.min(Math.max(Math.min(end, start + MOST), last + 1), total);
  } else if (end < total && end - 1 - last <= space) {
    end = Math.min(end + STEP, total);
    start = Math.min(Math.max(start, end - MOST), first);
  }
  return { start, end };
}

/** Return the window at the end of a list that has grown. */
export function follow({ start, end }, total) {
  if (total - end > JUMP) return around(total, total);
  return { start: Math.max(start, total - MOST), end: total };
}
