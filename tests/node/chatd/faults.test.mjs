// chatd.js under faults: a proxy cuts connections at random bytes, tabs close, and the server is killed and drained.
import assert from "node:assert/strict";
import { test } from "node:test";
import WebSocket from "ws";
import { Client } from "../../../chatd/static/chatd.js";
import { Blocked, proxy, seeded, serve, stored, tabbed, until } from "./server.mjs";

const POSTS = 12; // of each writer, in each of the phases

for (const Socket of [WebSocket, Blocked])
  for (const seed of [1, 2, 3])
    test(`${Socket.name}: nothing is lost or doubled, seed ${seed}`, { timeout: 60_000 }, async (t) => {
      const random = seeded(seed);
      t.mock.method(Math, "random", () => 0.02 * random()); // the pauses of the clients are short
      let server = await serve(t);
      let faults = 0;
      const { url } = await proxy(t, () => server.port, (data) => {
        if (random() > 0.05) return data;
        faults += 1;
        return data.subarray(0, Math.floor(random() * data.length));
      });
      const join = (username, options) => {
        const client = new Client(url, { username, WebSocket: Socket, locks: null, ...options });
        t.after(() => client.stop());
        const room = client.room("a");
        const seen = [];
        for (const type of ["history", "entries"])
          room.addEventListener(type, ({ detail }) => seen.push(...detail.entries.map(({ data }) => data.message)));
        const sent = [];
        const wrong = [];
        room.subscribe(() => {
          const { messages, outbox } = room.snapshot();
          const shown = [...messages.map(({ data }) => data.message), ...outbox.map(({ frame }) => frame.message)];
          for (const text of new Set([...sent, ...shown]))
            if (shown.filter((one) => one === text).length !== 1) wrong.push(text);
        });
        return { room, seen, wrong, sent };
      };
      const shared = tabbed();
      const tabs = ["tab 1", "tab 2", "tab 3"].map(() => join("ann", shared));
      const writers = [...tabs, join("bob"), join("cy")];
      const promises = [];
      const post = () =>
        writers.forEach(({ room, sent }, who) => {
          for (let count = 0; count < POSTS; count += 1) {
            const text = `${who} ${sent.length}`;
            sent.push(text);
            promises.push(room.post(text).then(({ id }) => [text, Number(id.split("-")[1])]));
          }
        });
      const [, , , { room: bob }] = writers;
      const arrived = (share) => until(bob, ({ messages }) => messages.length > share * POSTS * writers.length);

      post();
      await arrived(0.5);
      await server.kill();
      post();
      server = await serve(t, server);
      await arrived(1.5);
      await server.stop();
      post();
      server = await serve(t, server);
      await arrived(2.5);
      const acks = await Promise.all(promises);
      tabs[0].room.stop(); // the leader
      promises.length = 0;
      writers.shift();
      post();
      acks.push(...(await Promise.all(promises)));

      const all = (await stored(server.url, "a")).map(({ message }) => message);
      const sent = [...tabs[0].sent, ...writers.flatMap(({ sent }) => sent)];
      assert.deepEqual(all.toSorted(), sent.toSorted(), "each is stored once");
      for (const [text, number] of acks) assert.equal(all[number - 1], text);
      for (const { room, seen, wrong, sent } of writers) {
        await until(room, ({ messages, outbox }) => messages.length === all.length && !outbox.length);
        assert.deepEqual(seen, all, "each is seen once, in order");
        assert.deepEqual(wrong, [], "each is a message or in the outbox, and never both");
        assert.deepEqual(room.snapshot().messages.map(({ data }) => data.message), all);
        assert.deepEqual(all.filter((text) => sent.includes(text)), sent);
      }
      assert.ok(faults >= 10, `${faults} cuts`);
    });
