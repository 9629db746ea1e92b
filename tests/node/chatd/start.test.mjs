// What boot.js and about.js do in a browser, with doubles of its window and its document.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { runInNewContext } from "node:vm";

const STATIC = new URL("../../../chatd/static/", import.meta.url);
const FILES = "https://chat.example/team/static/0.1.0/page/";

/** Run a script of chatd/static in a page at an address. */
function run(name, address, { modules = true } = {}) {
  const heard = { load: [], error: [] };
  const listen = (type, listener) => heard[type].push(listener);
  const page = { left: null, places: [{ textContent: "?" }, { textContent: "?" }] };
  const document = {
    currentScript: modules ? { src: `${FILES}boot.js` } : undefined,
    getElementsByTagName: () => [{ src: "https://other.example/a.js" }, { src: `${FILES}boot.js` }],
    createElement: () => (modules ? { noModule: false } : {}),
    querySelectorAll: (selector) => (selector === ".url" ? page.places : []),
    addEventListener: listen,
  };
  const { protocol, host, pathname } = new URL(address);
  const location = { protocol, host, pathname, replace: (url) => (page.left = url) };
  const window = { addEventListener: listen };
  runInNewContext(readFileSync(new URL(name, STATIC), "utf8"), { document, location, window });
  page.tell = (type, event) => heard[type].forEach((listener) => listener(event));
  return page;
}

for (const [address, url] of [
  ["http://localhost:8085/about", "ws://localhost:8085/"],
  ["https://chat.example/about", "wss://chat.example/"],
  ["https://chat.example/team/about?x=y", "wss://chat.example/team/"],
  ["https://chat.example/team/rooms/about-us", "wss://chat.example/team/rooms/about-us"],
]) {
  test(`the instructions at ${address} name ${url}`, () => {
    const { places } = run("about.js", address);
    assert.deepEqual(places.map((place) => place.textContent), [url, url]);
  });
}

const ABOUT = "https://chat.example/team/about";
const boot = (options) => run("page/boot.js", "https://chat.example/team/rooms/a", options);

test("a browser without modules leaves for the instructions", () => {
  assert.equal(boot({ modules: false }).left, ABOUT);
  assert.equal(boot().left, null);
});

for (const [what, event, left] of [
  ["a script of the page that fails", { filename: `${FILES}page.js`, target: {} }, ABOUT],
  ["a script of the page that cannot be loaded", { target: { src: `${FILES}page.js` } }, ABOUT],
  ["a script of an extension that fails", { filename: "chrome-extension://x/y.js", target: {} }, null],
  ["a stylesheet that cannot be loaded", { target: { href: `${FILES}page.css` } }, null],
  ["an image of another host", { target: { src: "https://other.example/x.png" } }, null],
]) {
  test(`${what}: ${left ? "the instructions" : "the page stays"}`, () => {
    const page = boot();
    page.tell("load", { target: { type: "" } });
    page.tell("error", event);
    assert.equal(page.left, left);
  });
}

test("an error after the start leaves the page where it is", () => {
  const page = boot();
  page.tell("load", { target: { type: "module" } });
  page.tell("error", { filename: `${FILES}page.js`, target: {} });
  assert.equal(page.left, null);
});
