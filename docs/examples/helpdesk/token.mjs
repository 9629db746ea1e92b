// A token in Node, with nothing installed.
import { createHmac } from "node:crypto";
import { readFileSync } from "node:fs";

const key = readFileSync("jwt.key", "utf8").trim();
const encode = (value) => Buffer.from(JSON.stringify(value)).toString("base64url");

export function makeToken(name, rights) {
  const exp = Math.floor(Date.now() / 1000) + 600;
  const signed = `${encode({ alg: "HS256", typ: "JWT" })}.${encode({ sub: name, exp, chatd: rights })}`;
  return `${signed}.${createHmac("sha256", key).update(signed).digest("base64url")}`;
}
