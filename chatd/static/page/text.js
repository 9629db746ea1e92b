/** What a message is as text: links, names, days and times. Nothing here touches the document. */

const LONGEST = 2000; // characters of a link; longer ones stay text
// Controls of direction and characters without width end an address, because they could make it look like another.
const ADDRESS = /\bhttps?:\/\/[^\s<>"`\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]+/giu;
const PAIRS = { ")": "(", "]": "[", "}": "{" };
const TRAILING = /[.,:;!?'*~|…»”’、。，！？：；）」』】》]/u;
const LOOKS_LATIN = /[\p{Script=Cyrillic}\p{Script=Greek}\p{Script=Armenian}\p{Script=Cherokee}\p{Script=Lisu}]/u;
const INVISIBLE = /[\p{C}\p{Z}\p{M}\u115f\u1160\u3164\uffa0\u2800]/gu;

/** Return the length of an address without the punctuation of the sentence around it. */
function lengthOf(address) {
  const open = { ")": 0, "]": 0, "}": 0 }; // how many more brackets are opened than closed
  for (const one of address) {
    if (one in open) open[one] -= 1;
    for (const close in PAIRS) if (PAIRS[close] === one) open[close] += 1;
  }
  let length = address.length;
  for (; length; length -= 1) {
    const last = address[length - 1];
    if (open[last] < 0) open[last] += 1;
    else if (!TRAILING.test(last)) break;
  }
  return length;
}

/** Return the URL of an address; undefined if it is not safe to follow. */
function urlOf(address) {
  if (address.length > LONGEST || !URL.canParse(address)) return undefined;
  const url = new URL(address);
  const safe = (url.protocol === "http:" || url.protocol === "https:") && !url.username && !url.password;
  return safe && url.hostname ? url : undefined;
}

/** Return an address as it is shown: letters that look Latin in a Latin name are shown in their ASCII form. */
function shown(address, url) {
  const host = /^https?:\/\/([^/?#]*)/iu.exec(address)?.[1] ?? "";
  const confusing = LOOKS_LATIN.test(host) && /[a-z]/iu.test(host);
  return confusing ? address.replace(host, () => url.host) : address;
}

/**
 * Split a text into parts; those that are links have an `href`. It takes linear time.
 * @returns {{text: string, href?: string}[]}
 */
export function partsOf(text) {
  const parts = [];
  let end = 0;
  for (const { 0: found, index } of text.matchAll(ADDRESS)) {
    const address = found.slice(0, lengthOf(found));
    const url = urlOf(address);
    if (!url) continue;
    if (index > end) parts.push({ text: text.slice(end, index) });
    parts.push({ text: shown(address, url), href: url.href });
    end = index + address.length;
  }
  if (end < text.length) parts.push({ text: text.slice(end) });
  return parts;
}

/** Return a name as it is shown: one that nobody could see gets a word. */
export const nameOf = (name) => (String(name ?? "").replace(INVISIBLE, "") ? String(name) : "(no name)");

const two = (number) => String(number).padStart(2, "0");

/** Return the local day of a time, as 2026-01-31. */
export function dayOf(time) {
  const date = new Date(time);
  return `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())}`;
}

/** Return functions that write days and times in a language; `words` is the language of the page. */
export function formats(words = "en", languages = []) {
  const dialect = languages.find((one) => one.split("-")[0] === words.split("-")[0]) ?? words;
  const day = { weekday: "long", day: "numeric", month: "long" };
  const thisYear = new Intl.DateTimeFormat(dialect, day);
  const otherYear = new Intl.DateTimeFormat(dialect, { ...day, year: "numeric" });
  const time = new Intl.DateTimeFormat(languages[0], { timeStyle: "short" });
  const full = new Intl.DateTimeFormat(dialect, { dateStyle: "full", timeStyle: "medium" });
  const guard = (format) => (at) => (Number.isNaN(at) ? "" : format(at));
  return {
    time: guard((at) => time.format(at)),
    full: guard((at) => full.format(at)),
    /** "Today", "Yesterday" or the date, at the time `now`. */
    day(at, now) {
      if (Number.isNaN(at)) return "";
      const date = new Date(now);
      if (dayOf(at) === dayOf(date)) return "Today";
      const year = date.getFullYear();
      date.setDate(date.getDate() - 1);
      if (dayOf(at) === dayOf(date)) return "Yesterday";
      return (new Date(at).getFullYear() === year ? thisYear : otherYear).format(at);
    },
  };
}
