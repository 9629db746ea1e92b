/** The parts of the page that need no document: names, tokens, rooms, words and regions. */
import assert from "node:assert/strict";
import { test } from "node:test";

const folder = new URL("../../../chatd/static/page/", import.meta.url);
const load = (name) => import(new URL(name, folder));
const { whyNotName, claimsOf, splitFragment, signInUrl } = await load("user.js");
const { whyNotRoom, roomAt, addressOf, remember, stepIn } = await load("rooms.js");
const { namesOf, typingWords, stateWords, remedyWords, countdownWords, countWords } = await load("words.js");
const { lengthOf, lengthWords } = await load("composer.js");
const { nextOf } = await load("panels.js");
const { createAnnouncer } = await load("announcer.js");
const { memory } = await load("memory.js");
const { nameOf } = await load("text.js");

const token = (claims) => `h.${Buffer.from(JSON.stringify(claims)).toString("base64url")}.s`;

test("a name has as many characters as the schema allows, of which an emoji is one", () => {
  assert.equal(whyNotName("👋".repeat(30), 30), "");
  assert.match(whyNotName("👋".repeat(31), 30), /30 characters at most, and this one has 31/);
  assert.match(whyNotName(""), /Type a name/);
});

test("a name that nobody could see is not possible, and is shown as words", () => {
  for (const name of ["\u200b", "\u202e", "\u3164"]) {
    assert.match(whyNotName(name), /people can see/);
    assert.equal(nameOf(name), "(no name)");
  }
});

test("claims are read in UTF-8", () => assert.equal(claimsOf(token({ sub: "zoë ☕?>" })).sub, "zoë ☕?>"));

test("what is no token has no claims", () => {
  for (const text of ["", "a", "a.b.c", token(null), token(3)]) assert.equal(claimsOf(text).sub, undefined);
});

test("the token leaves the fragment, and the rest stays", () => {
  assert.deepEqual(splitFragment("#token=a.b-c_d"), { token: "a.b-c_d", rest: "" });
  assert.deepEqual(splitFragment("#x&token=a%2Eb&y=1"), { token: "a.b", rest: "#x&y=1" });
  assert.deepEqual(splitFragment("#token=a%2"), { token: "a%2", rest: "" });
  assert.deepEqual(splitFragment("#x"), { token: undefined, rest: "#x" });
  assert.deepEqual(splitFragment(""), { token: undefined, rest: "" });
  assert.deepEqual(splitFragment("#token=%E0%"), { token: "%E0%", rest: "" });
});

test("the sign-in leads back to the page without its fragment", () => {
  const url = new URL(signInUrl("https://app.example/login?a=1", "https://chat.example/rooms/team#x"));
  assert.equal(url.searchParams.get("return_to"), "https://chat.example/rooms/team");
  assert.equal(url.searchParams.get("a"), "1");
});

test("the address names the room, also below a path of a proxy", () => {
  for (const root of ["http://localhost:8085/", "https://example.com/chat/"]) {
    for (const name of ["main", "team-1"]) assert.equal(roomAt(root, addressOf(root, name)), name);
    assert.equal(addressOf(root, "main"), root);
    assert.equal(roomAt(root, `${root}rooms/team?x#y`), "team");
    for (const other of ["rooms/", "rooms/A", "rooms/a/b", "rooms/%20"]) assert.equal(roomAt(root, root + other), "main");
  }
});

test("names of rooms follow the rule of the server", () => {
  for (const name of ["a", "0", "a_-9", "x".repeat(64)]) assert.equal(whyNotRoom(name), "");
  for (const name of ["", "A", "a b", "é", "-a", "_a", "a/b", "x".repeat(65)]) assert.notEqual(whyNotRoom(name), "");
});

test("a room that is opened again comes first", () => {
  assert.deepEqual(remember(["a", "b", "c"], "c"), ["c", "a", "b"]);
  assert.equal(remember(Array.from({ length: 20 }, (_, place) => `r${place}`), "new").length, 20);
});

test("names are joined as in a sentence", () => {
  assert.equal(namesOf(["a"]), "a");
  assert.equal(namesOf(["a", "b"]), "a and b");
  assert.equal(namesOf(["a", "b", "c"]), "a, b and c");
  assert.equal(namesOf(["a", "b", "c", "d", "e"]), "a, b and 3 others");
});

test("those who type are named, each in its own direction", () => {
  assert.equal(typingWords([]), "");
  assert.equal(typingWords(["ann"]), "\u2068ann\u2069 is typing…");
  assert.equal(typingWords(["ann", "bea"]), "\u2068ann\u2069 and \u2068bea\u2069 are typing…");
});

test("each state has words, and the countdown is not among them", () => {
  const waiting = { state: "waiting", retryAt: 10_000 };
  assert.equal(stateWords(waiting, true), "Offline, reconnecting");
  assert.equal(countdownWords(waiting, 7_001), " in 3 s");
  assert.equal(countdownWords(waiting, 10_000), "");
  assert.equal(countdownWords({ state: "online" }, 0), "");
  assert.equal(stateWords({ state: "online" }), "Online");
  assert.equal(countWords(1), "1 connection");
});

test("an attempt to reconnect keeps the words, so it is not announced", () => {
  assert.equal(stateWords({ state: "connecting" }), "Connecting");
  assert.equal(stateWords({ state: "connecting" }, true), "Offline, reconnecting");
});

test("a refusal has its reason, and what helps", () => {
  const words = (code, reason) => stateWords({ state: "rejected", reason, error: { code, message: reason } });
  assert.equal(words(404, "refused with 404"), "Rejected: this server does not have this room");
  assert.equal(words(1008, "closed with 1008 banned: spam"), "Rejected: banned: spam");
  assert.equal(words(418, "refused with 418"), "Rejected: refused with 418");
  assert.match(remedyWords(401, true), /not sent yet stays/);
  assert.match(remedyWords(1008, true), /Open another room/);
  assert.match(remedyWords(1002, false), /Try again/);
});

test("the length is counted as the schema does, and shown near the limit", () => {
  assert.equal(lengthOf("👋a"), 2);
  assert.equal(lengthWords(399, 500), "");
  assert.equal(lengthWords(400, 500), "100 characters left");
  assert.equal(lengthWords(501, 500), "1 character too many");
});

test("F6 goes around the regions", () => {
  assert.equal(nextOf(["a", "b", "c"], "c", false), "a");
  assert.equal(nextOf(["a", "b", "c"], "a", true), "c");
  assert.equal(nextOf(["a", "b"], undefined, true), "a");
});

test("a memory that the browser blocks lasts as long as the page", () => {
  const kept = memory("no such storage");
  kept.set("name", "ann");
  assert.equal(kept.get("name"), "ann");
  kept.remove("name");
  assert.equal(kept.get("name"), undefined);
});

test("arrows go through a list, and stop at its ends", () => {
  assert.equal(stepIn(3, 0, "ArrowDown"), 1);
  assert.equal(stepIn(3, 2, "ArrowDown"), 2);
  assert.equal(stepIn(3, 0, "ArrowUp"), 0);
  assert.equal(stepIn(3, 0, "End"), 2);
  assert.equal(stepIn(3, 2, "Home"), 0);
  assert.equal(stepIn(3, 1, "x"), undefined);
});

test("texts that come together are announced together, and none while the page is hidden", (t) => {
  t.mock.timers.enable({ apis: ["setTimeout"] });
  const element = { textContent: "before" };
  globalThis.document = { hidden: false };
  t.after(() => delete globalThis.document);
  const announce = createAnnouncer(element);
  announce("one");
  announce("two");
  assert.equal(element.textContent, "");
  t.mock.timers.tick(1000);
  assert.equal(element.textContent, "one\ntwo");
  globalThis.document.hidden = true;
  announce("three");
  t.mock.timers.tick(1000);
  assert.equal(element.textContent, "one\ntwo");
});
