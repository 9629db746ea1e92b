/** The parts of the page that need no document: names, tokens, rooms, words and regions. */
import assert from "node:assert/strict";
import { test } from "node:test";

const folder = new URL("../../../chatd/static/page/", import.meta.url);
const load = (name) => import(new URL(name, folder));
const { whyNotName, claimsOf, splitFragment, signInUrl } = await load("user.js");
const { whyNotRoom, roomAt, addressOf, remember } = await load("rooms.js");
const { namesOf, typingWords, stateWords, countdownWords, countWords } = await load("words.js");
const { lengthOf, lengthWords } = await load("composer.js");
const { nextOf } = await load("panels.js");
const { memory } = await load("memory.js");

const token = (claims) => `h.${Buffer.from(JSON.stringify(claims)).toString("base64url")}.s`;

test("a name has 1 to 30 characters, of which an emoji is one", () => {
  assert.equal(whyNotName("👋".repeat(30)), "");
  assert.match(whyNotName("👋".repeat(31)), /30 characters at most, and this one has 31/);
  assert.match(whyNotName(""), /Type a name/);
});

test("a name that nobody could see is not possible, and is shown as words", () => {
  for (const name of ["\u200b", "\u202e", "\u3164"]) {
    assert.match(whyNotName(name), /people can see/);
    assert.match(typingWords([name], "me"), /\(no name\)/);
  }
});

test("claims are read in UTF-8", () => assert.equal(claimsOf(token({ sub: "zoë ☕?>" })).sub, "zoë ☕?>"));

test("what is no token has no claims", () => {
  for (const text of ["", "a", "a.b.c", token(null), token(3)]) assert.equal(claimsOf(text).sub, undefined);
});

test("the token leaves the fragment, and the rest stays", () => {
  assert.deepEqual(splitFragment("#token=a.b-c_d"), { token: "a.b-c_d", rest: "" });
  assert.deepEqual(splitFragment("#x&token=a%2Eb&y=1"), { token: "a.b", rest: "#x&y=1" });
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

test("the user is not told that they type", () => {
  assert.equal(typingWords(["me"], "me"), "");
  assert.equal(typingWords(["ann", "me"], "me"), "\u2068ann\u2069 is typing…");
  assert.equal(typingWords(["ann", "bea"], "me"), "\u2068ann\u2069 and \u2068bea\u2069 are typing…");
});

test("each state has words, and the countdown is not among them", () => {
  const waiting = { state: "waiting", retryAt: 10_000 };
  assert.equal(stateWords(waiting), "Offline, reconnecting");
  assert.equal(countdownWords(waiting, 7_001), " in 3 s");
  assert.equal(countdownWords(waiting, 10_000), "");
  assert.equal(countdownWords({ state: "online" }, 0), "");
  assert.equal(stateWords({ state: "online" }), "Online");
  assert.match(stateWords({ state: "rejected", error: { code: 404 } }), /does not have this room/);
  assert.match(stateWords({ state: "rejected", error: { code: 1008, message: "banned" } }), /banned/);
  assert.equal(countWords(1), "1 connection");
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
