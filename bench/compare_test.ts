import assert from "node:assert/strict";
import { comparePhase, ROOM } from "./compare.ts";
import type { Measurable } from "./compare.ts";
import type { MeasureRequest } from "./engines/engine.ts";

/** An engine that takes `seconds(n)` for its nth step, and writes down who was asked for what. */
function engine(log: string[], name: string, seconds: (step: number) => number): Measurable {
  let step = 0;
  return {
    measure: (request: Omit<MeasureRequest, "type">) => {
      assert.ok(
        request.context + (request.tokens > 1 ? request.tokens : request.warmUp + request.steps) <= ROOM.length,
      );
      log.push(name);
      return Promise.resolve(Array.from({ length: request.steps }, () => seconds(step++)));
    },
    logits: () => Promise.resolve([]),
    bandwidth: () => Promise.resolve(null),
  };
}

const options = { type: "Q4_0", threads: 2, rounds: 4, seconds: 0.1, info: { name: "", build: "" } } as const;

Deno.test("comparePhase: engines take turns, each round the other one first", async () => {
  const log: string[] = [];
  await comparePhase(engine(log, "l", () => 0.01), engine(log, "p", () => 0.02), { ...options, phase: "decode" });
  assert.equal(log.join(""), "lp" + "lppl".repeat(2)); // the first two are the warm-up
});

Deno.test("comparePhase: one slow step in ten changes nothing", async () => {
  const slowly = (step: number) => step % 10 === 5 ? 1 : 0.01;
  const row = await comparePhase(engine([], "l", slowly), engine([], "p", () => 0.02), { ...options, phase: "batch" });
  assert.equal(row.ratio, 2);
  assert.ok(Math.abs(row.lutra - 800) < 1e-9);
});

Deno.test("comparePhase: steps longer than a measurement are measured one by one, in three rounds at most", async () => {
  const log: string[] = [];
  const warmUps: number[] = [];
  const slow = engine(log, "l", () => 2);
  const watched: Measurable = {
    ...slow,
    measure: (request) => {
      warmUps.push(request.warmUp);
      return slow.measure(request);
    },
  };
  const row = await comparePhase(watched, engine(log, "p", () => 1), { ...options, phase: "prefill" });
  assert.equal(log.length, 8);
  assert.deepEqual(warmUps, [0, 1, 1, 1]); // the first tells only how long they take
  assert.equal(row.ratio, 0.5);
});

Deno.test("comparePhase: quick steps do not run out of the context", async () => {
  const row = await comparePhase(engine([], "l", () => 1e-5), engine([], "p", () => 1e-5), {
    ...options,
    phase: "decode",
  });
  assert.equal(row.ratio, 1);
});
