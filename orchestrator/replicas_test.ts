import assert from "node:assert/strict";
import { PlacementError } from "./errors.ts";
import { place, predict } from "./placement.ts";
import type { Device, ModelCost } from "./placement.ts";
import { placeReplicas, predictReplicas } from "./replicas.ts";
import type { Replica } from "./replicas.ts";

function random(seed: number): (n: number) => number {
  let x = seed;
  return (n) => {
    x = (Math.imul(x, 1664525) + 1013904223) >>> 0;
    return Math.floor((x / 2 ** 32) * n);
  };
}

const uniform = (layers: number, bytes: number): ModelCost => ({
  layers: new Array(layers).fill({ memoryBytes: bytes, readBytes: bytes }),
  embeddingBytes: 0,
  head: { memoryBytes: 0, readBytes: 0 },
});

const device = (id: string, gigabytes: number, bandwidthGBps: number): Device => ({
  ...{ id, memoryBytes: 1e9 * gigabytes, bandwidthGBps },
});

const workers = (replicas: readonly Replica[]) => replicas.map((stages) => stages.map(({ worker }) => worker).join());

function near(a: number, b: number, what: string): void {
  assert(Math.abs(a - b) <= 1e-9 * Math.abs(b), `${what}: ${a} is not ${b}`);
}

/** All partitions of devices into sets; some devices may be in none. */
function* partitions(devices: readonly Device[]): Generator<Device[][]> {
  const [first, ...rest] = devices;
  if (first === undefined) return yield [];
  for (const others of partitions(rest)) {
    yield others;
    yield [[first], ...others];
    for (let i = 0; i < others.length; i++) {
      yield others.map((group, at) => at === i ? [first, ...group] : group);
    }
  }
}

Deno.test("placeReplicas: no partition of the devices gives more tokens, and one stream has what the best single device gives", () => {
  const next = random(11);
  let [several, refused, grouped] = [0, 0, 0];
  for (let round = 0; round < 60; round++) {
    const cost: ModelCost = {
      layers: Array.from({ length: 2 + next(4) }, () => ({ memoryBytes: 1 + next(20), readBytes: 1 + next(20) })),
      embeddingBytes: next(10),
      head: { memoryBytes: next(20), readBytes: next(20) },
    };
    const devices = Array.from({ length: 2 + next(3) }, (_, i) => ({
      ...{ id: `d${i}`, memoryBytes: 20 + 20 * next(6), bandwidthGBps: 1 + next(3) },
    }));
    const options = { hopSeconds: 1e-10 * next(10) };
    let most = 0;
    for (const groups of partitions(devices)) {
      try {
        const replicas = groups.map((group) => place(cost, group, options));
        if (replicas.length === 0) continue;
        // One far slower than the rest is left out on purpose.
        const rates = replicas.map((stages) => predict(cost, devices, stages).manyStreams);
        const fastest = Math.max(...rates);
        most = Math.max(most, rates.filter((rate) => rate >= 0.1 * fastest).reduce((sum, rate) => sum + rate, 0));
      } catch (error) {
        assert(error instanceof PlacementError);
      }
    }
    if (most === 0) {
      refused++;
      assert.throws(() => placeReplicas(cost, devices, options), PlacementError);
      continue;
    }
    const replicas = placeReplicas(cost, devices, options);
    const ids = replicas.flatMap((stages) => stages.map(({ worker }) => worker));
    assert.equal(new Set(ids).size, ids.length, "a device is in two replicas");
    const { manyStreams, oneStream } = predictReplicas(cost, devices, replicas, options);
    near(manyStreams, most, `round ${round}`);
    const alone = devices.flatMap((single) => {
      try {
        return [predict(cost, devices, place(cost, [single], options), options.hopSeconds).oneStream];
      } catch {
        return [];
      }
    });
    assert(oneStream >= 0.95 * Math.max(0, ...alone) * (1 - 1e-9), `round ${round}: one stream is slower`);
    near(oneStream, predict(cost, devices, replicas[0]!, options.hopSeconds).oneStream, "the best comes first");
    if (replicas.length > 1) several++;
    if (replicas.length > 1 && replicas.some((stages) => stages.length > 1)) grouped++;
  }
  assert(several > 20 && refused > 1 && grouped > 3, `${several} ${refused} ${grouped}`);
});

Deno.test("placeReplicas: on equal boards that hold it, a model lies on each; for one stream, it lies in one pipeline", () => {
  const cost = uniform(8, 0.5e9);
  const boards = ["a", "b", "c"].map((id) => device(id, 8, 10));
  assert.deepEqual(workers(placeReplicas(cost, boards)), ["a", "b", "c"]);
  for (const streams of [2, 3, 50]) assert.equal(placeReplicas(cost, boards, { streams }).length, 3);
  assert.deepEqual(placeReplicas(cost, boards, { streams: 1 }), [place(cost, boards)]);
  assert.deepEqual(placeReplicas(cost, boards, { shards: 2 }), [place(cost, boards, { shards: 2 })]);
  const { oneStream, manyStreams } = predictReplicas(cost, boards, placeReplicas(cost, boards), { hopSeconds: 0.01 });
  near(oneStream, 1 / 0.41, "4 GB at 10 GB/s, and a hop");
  near(manyStreams, 3 / 0.4, "three boards");
});

Deno.test("placeReplicas: a slower board serves by itself, one far slower not at all", () => {
  const cost = uniform(4, 1e9);
  const boards = [device("half", 8, 5), device("fast", 8, 10), device("slow", 8, 0.9)];
  assert.deepEqual(workers(placeReplicas(cost, boards)), ["fast", "half"]);
  const { tokensPerSecond } = predictReplicas(cost, boards, placeReplicas(cost, boards), { streams: 1, hopSeconds: 0 });
  near(tokensPerSecond, 2.5, "one stream has the fast one");
  const pair = predictReplicas(cost, boards, placeReplicas(cost, boards), { streams: 2, hopSeconds: 0 });
  near(pair.tokensPerSecond, 3.75, "the second has the other");
});

Deno.test("placeReplicas: boards that hold it only together are one replica; two pairs of them are two", () => {
  const cost = uniform(4, 1e9);
  const half = (id: string) => device(id, 2, 10);
  const boards = [half("a"), device("whole", 4, 10), half("b")];
  assert.deepEqual(workers(placeReplicas(cost, boards)), ["whole", "a,b"]);
  assert.deepEqual(workers(placeReplicas(cost, [...boards, half("c"), half("d")])), ["whole", "a,b", "c,d"]);
  // The half alone holds it not at all: beside the whole it doubles the speed.
  const two = [device("whole", 4, 10), half("a")];
  assert.deepEqual(placeReplicas(cost, two).map((stages) => stages.map(({ first, end }) => end - first)), [[2, 2]]);
  assert.throws(() => placeReplicas(cost, [half("a")]), PlacementError);
});

Deno.test("placeReplicas: many boards of all kinds are placed within reason", () => {
  const cost = uniform(32, 0.1e9);
  const boards = Array.from({ length: 16 }, (_, i) => device(`d${i}`, i % 2 === 0 ? 4 + i / 10 : 1, 5 + i / 10));
  const replicas = placeReplicas(cost, boards);
  assert.equal(replicas.filter((stages) => stages.length === 1).length, 8);
  // Of the small ones four hold it: two groups.
  assert.deepEqual(replicas.map((stages) => stages.length).sort(), [...new Array(8).fill(1), 4, 4]);
  const ids = replicas.flatMap((stages) => stages.map(({ worker }) => worker));
  assert.equal(new Set(ids).size, ids.length);
});
