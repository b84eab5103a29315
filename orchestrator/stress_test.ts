import assert from "node:assert/strict";
import { continuation, fakeCluster, read, VOCAB } from "../tests/fakes/cluster.ts";

function random(seed: number): (n: number) => number {
  let x = seed;
  return (n) => {
    x = (Math.imul(x, 1664525) + 1013904223) >>> 0;
    return Math.floor((x / 2 ** 32) * n);
  };
}

const COMMON = Array.from({ length: 100 }, (_, i) => (i * 31) % VOCAB);
const pause = () => new Promise<void>((resolve) => setTimeout(resolve, 0));

for (const shards of [1, 2, 5]) {
  Deno.test(`Engine: 32 requests with cancels and a short KV cache give the reference's tokens on ${shards} shards`, async () => {
    const delay = random(shards);
    const t = await fakeCluster({
      shards,
      workerCount: Math.min(shards, 3),
      workers: Math.min(shards, 3),
      context: 160,
      kvTokens: 320,
      maxBatch: 24,
      maxRunning: 20,
      kernels: { beforeLayer: () => delay(20) === 0 ? pause() : undefined },
    });
    let cancelled = 0;
    const one = async (n: number) => {
      const next = random(100 * shards + n);
      // Some begin alike and end soon, so that what is kept of one is of use to another.
      const alike = n % 3 === 0;
      const own = Array.from({ length: 1 + next(alike ? 4 : 100) }, () => next(VOCAB));
      const promptTokens = [...COMMON.slice(0, alike ? 40 + next(40) : 0), ...own];
      const maxTokens = 1 + next(alike ? 20 : 160 - promptTokens.length);
      const seed = next(2) ? BigInt(next(1 << 20)) : undefined;
      const expected = continuation(promptTokens, maxTokens, seed);
      for (let i = next(4); i > 0; i--) await pause();
      const controller = new AbortController();
      const events = t.engine.generate({
        promptTokens,
        maxTokens,
        sampling: seed === undefined ? { temperature: 0 } : { temperature: 1, seed },
        ignoreEos: true,
      }, { signal: controller.signal });
      switch (n % 4) {
        case 0: { // leaves in the midst
          const leave = next(maxTokens);
          const ids: number[] = [];
          for await (const event of events) {
            if (event.type === "token") ids.push(event.id);
            if (ids.length > leave) break;
          }
          assert.deepEqual(ids, expected.slice(0, ids.length));
          cancelled++;
          break;
        }
        case 1: { // aborts at any time, perhaps before the first token
          const aborted = new Error("left");
          const leaving = (async () => {
            for (let i = next(30); i > 0; i--) await pause();
            controller.abort(aborted);
          })();
          const ids: number[] = [];
          try {
            for await (const event of events) if (event.type === "token") ids.push(event.id);
          } catch (error) {
            assert.equal(error, aborted);
            cancelled++;
          }
          await leaving;
          assert.deepEqual(ids, expected.slice(0, ids.length));
          break;
        }
        default:
          assert.deepEqual((await read(events)).ids, expected);
      }
    };
    for (let round = 0; round < 3; round++) {
      await Promise.all(Array.from({ length: 32 }, (_, n) => one(32 * round + n)));
    }
    // With few at a time what is kept lasts until another can use it.
    for (let n = 0; n < 32; n++) await Promise.all([one(999 + 3 * n), one(1000 + 3 * n)]);
    const stats = t.engine.stats();
    assert(stats.preemptions > 0, "the KV cache was never short: the test shows nothing");
    assert(stats.reusedTokens > 100, `${stats.reusedTokens} tokens were there already`);
    assert(cancelled > 20, `${cancelled} cancelled`);
    await t.end();
  });
}
