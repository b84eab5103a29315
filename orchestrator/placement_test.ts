import assert from "node:assert/strict";
import { PlacementError } from "./errors.ts";
import { place, predict, stageCosts } from "./placement.ts";
import type { Device, ModelCost, PlacedStage } from "./placement.ts";

function random(seed: number): (n: number) => number {
  let x = seed;
  return (n) => {
    x = (Math.imul(x, 1664525) + 1013904223) >>> 0;
    return Math.floor((x / 2 ** 32) * n);
  };
}

function uniform(layers: number, memoryBytes = 10, readBytes = 10): ModelCost {
  return {
    layers: Array.from({ length: layers }, () => ({ memoryBytes, readBytes })),
    embeddingBytes: 0,
    head: { memoryBytes: 0, readBytes: 0 },
  };
}

/** Seconds of the slowest stage, and of all; `undefined` when a device holds more than it offers. */
function times(
  cost: ModelCost,
  devices: readonly Device[],
  stages: readonly PlacedStage[],
): { slowest: number; sum: number } | undefined {
  let [slowest, sum] = [0, 0];
  const held = new Map<string, number>();
  for (const { worker, first, end } of stages) {
    const device = devices.find((candidate) => candidate.id === worker)!;
    let [memory, read] = [held.get(worker) ?? 0, 0];
    for (const layer of cost.layers.slice(first, end)) {
      memory += layer.memoryBytes;
      read += layer.readBytes;
    }
    if (first === 0) memory += cost.embeddingBytes;
    if (end === cost.layers.length) {
      memory += cost.head.memoryBytes;
      read += cost.head.readBytes;
    }
    if (memory > device.memoryBytes) return undefined;
    held.set(worker, memory);
    const seconds = read / ((device.bandwidthGBps ?? 1) * 1e9);
    slowest = Math.max(slowest, seconds);
    sum += seconds;
  }
  return { slowest, sum };
}

/** Every way to give contiguous ranges to different devices. */
function* everySplit(layers: number, devices: readonly Device[], from = 0): Generator<PlacedStage[]> {
  if (from === layers) return yield [];
  for (const { id } of devices) {
    const others = devices.filter((device) => device.id !== id);
    for (let end = from + 1; end <= layers; end++) {
      for (const rest of everySplit(layers, others, end)) yield [{ worker: id, first: from, end }, ...rest];
    }
  }
}

Deno.test("place: as good as brute force, with and without a number of shards, and never slow for one stream", () => {
  const next = random(3);
  let [refused, bound] = [0, 0];
  for (let round = 0; round < 200; round++) {
    const layers = 1 + next(6);
    const cost: ModelCost = {
      layers: Array.from({ length: layers }, () => ({ memoryBytes: 1 + next(20), readBytes: 1 + next(20) })),
      embeddingBytes: next(20),
      head: { memoryBytes: next(30), readBytes: next(30) },
    };
    const room = round % 2 === 0 ? 100 : 400;
    const devices: Device[] = Array.from({ length: 1 + next(4) }, (_, i) => ({
      id: `d${i}`,
      memoryBytes: next(room),
      bandwidthGBps: 1 + next(3),
    }));
    const hopSeconds = 1e-10 * next(20);
    const all = [...everySplit(layers, devices)].map((stages) => {
      const found = times(cost, devices, stages);
      return found === undefined
        ? undefined
        : { ...found, count: stages.length, sum: found.sum + stages.length * hopSeconds };
    }).filter((found) => found !== undefined);
    const single = Math.min(...all.filter(({ count }) => count === 1).map(({ sum }) => sum));
    for (const shards of [undefined, 1 + next(Math.min(devices.length, layers))]) {
      const options = { hopSeconds, ...(shards === undefined ? {} : { shards }) };
      const allowed = all.filter(({ count, sum }) =>
        shards === undefined ? sum <= single / 0.95 * (1 + 1e-9) : count === shards
      );
      if (allowed.length === 0) {
        refused++;
        assert.throws(() => place(cost, devices, options), PlacementError);
        continue;
      }
      const stages = place(cost, devices, options);
      const mine = times(cost, devices, stages)!;
      const best = Math.min(...allowed.map(({ slowest }) => slowest));
      near(mine.slowest, best, `round ${round}`);
      const ties = allowed.filter(({ slowest }) => slowest <= best * (1 + 1e-12));
      near(mine.sum + stages.length * hopSeconds, Math.min(...ties.map(({ sum }) => sum)), `round ${round}`);
      if (shards !== undefined) assert.equal(stages.length, shards);
      else if (Math.min(...all.map(({ slowest }) => slowest)) < best) bound++;
    }
  }
  assert(refused > 20 && refused < 200, `${refused} refused`);
  assert(bound > 10, `one stream's speed decided ${bound} times`);
});

function near(a: number, b: number, what: string): void {
  assert(Math.abs(a - b) <= 1e-9 * Math.abs(b), `${what}: ${a} is not ${b}`);
}

Deno.test("place: twice as fast takes twice as many layers, where one alone cannot hold the model", () => {
  const devices = [
    { id: "slow", memoryBytes: 100, bandwidthGBps: 5 },
    { id: "fast", memoryBytes: 100, bandwidthGBps: 10 },
  ];
  const stages = place(uniform(12), devices);
  assert.deepEqual(
    new Map(stages.map(({ worker, first, end }) => [worker, end - first])),
    new Map([["slow", 4], ["fast", 8]]),
  );
});

Deno.test("place: where the model fits the fastest, a slow one gets no layers; an equal one does, if hops cost little", () => {
  const two = (bandwidthGBps: number) => [
    { id: "a", memoryBytes: 1e12, bandwidthGBps: 10 },
    { id: "b", memoryBytes: 1e12, bandwidthGBps },
  ];
  const cost = uniform(8, 1e9, 1e9); // 0.1 s a layer on `a`, 0.8 s in all
  assert.deepEqual(place(cost, two(5)), [{ worker: "a", first: 0, end: 8 }]);
  assert.deepEqual(place(cost, two(10)).map(({ first, end }) => end - first), [4, 4]);
  // Of a stream's 0.8 s a hop more may cost 0.042 s.
  assert.equal(place(cost, two(10), { hopSeconds: 0.04 }).length, 2);
  assert.equal(place(cost, two(10), { hopSeconds: 0.045 }).length, 1);
  // 7 layers in 0.7 s and one in 0.11 s: 0.81 s instead of 0.8, but no more than that.
  assert.equal(place(cost, two(9)).length, 2);
  const { oneStream, manyStreams } = predict(cost, two(10), place(cost, two(10)), 0.01);
  near(oneStream, 1 / (0.8 + 2 * 0.01), "one stream passes both stages");
  near(manyStreams, 1 / 0.4, "many keep the slower busy");
});

/** Devices of equal bandwidth whose layers of {@linkcode uniform} take so many milliseconds. */
function measured(...layerMs: (number | null)[]): Device[] {
  return layerMs.map((ms, i) => ({
    ...{ id: `d${i}`, memoryBytes: 1e12, bandwidthGBps: 10 },
    speed: ms === null ? null : { layerSeconds: ms / 1000, headSeconds: 0 },
  }));
}

const shares = (stages: readonly PlacedStage[]) =>
  new Map(
    [...stages].sort((a, b) => a.worker < b.worker ? -1 : 1).map(({ worker, first, end }) => [worker, end - first]),
  );

Deno.test("place: what was measured counts, not the bandwidth: a device with a quarter of its cores' time gets fewer layers", () => {
  const stages = place(uniform(10), measured(4, 1), { shards: 2 });
  assert.deepEqual(shares(stages), new Map([["d0", 2], ["d1", 8]]));
  // Who was not measured counts as slow beside its bandwidth as those that were.
  const [, byBandwidth] = stageCosts(uniform(10), measured(4, null), [
    { worker: "d0", first: 0, end: 5 },
    { worker: "d1", first: 5, end: 10 },
  ]);
  near(byBandwidth!.seconds, 5 * 4e-3, "as d0");
});

Deno.test("place: layers that read more take longer, and the head takes what was measured", () => {
  const cost: ModelCost = {
    layers: [30, 10, 10].map((readBytes) => ({ memoryBytes: 1, readBytes })),
    embeddingBytes: 0,
    head: { memoryBytes: 1, readBytes: 1 },
  };
  const devices = measured(1, 1).map((device) => ({ ...device, speed: { layerSeconds: 0.001, headSeconds: 0.004 } }));
  const stages = [{ worker: "d0", first: 0, end: 2 }, { worker: "d1", first: 2, end: 3 }];
  const [first, last] = stageCosts(cost, devices, stages);
  near(first!.seconds, 0.004, "of which the last layer's bytes take 1 ms");
  near(last!.seconds, 0.005, "a layer and the head");
  const hops = devices.map((device, i) => ({ ...device, hopSeconds: i === 0 ? 0.001 : 0.01 }));
  near(predict(cost, hops, stages, 1).oneStream, 1 / (0.009 + 0.011), "each device has its own way");
  // Equally fast ones differ in their way: one stream wants the near one alone.
  assert.deepEqual(place(cost, [...hops].reverse(), { shards: 1 }).map(({ worker }) => worker), ["d0"]);
});

Deno.test("place: the noise of measurements changes no split", () => {
  const next = random(11);
  const cost = uniform(22);
  const even = place(cost, measured(1, 1, 2));
  for (let round = 0; round < 50; round++) {
    const noisy = (ms: number) => ms * (1 + 0.035 * (next(2001) / 1000 - 1));
    assert.deepEqual(place(cost, measured(noisy(1), noisy(1), noisy(2))).map(size), even.map(size), `round ${round}`);
  }
});

function size({ first, end }: PlacedStage): number {
  return end - first;
}

Deno.test("place: equal devices keep their order; an unknown bandwidth counts as the median", () => {
  const devices = ["a", "b", "c"].map((id) => ({ id, memoryBytes: 2e9, bandwidthGBps: null }));
  const cost = uniform(6, 1e9, 1e9);
  const expected = [{ worker: "a", first: 0, end: 2 }, { worker: "b", first: 2, end: 4 }, {
    worker: "c",
    first: 4,
    end: 6,
  }];
  assert.deepEqual(place(cost, devices), expected);
  const known = devices.map((device, i) => i === 1 ? device : { ...device, bandwidthGBps: 7 });
  assert.deepEqual(place(cost, known), expected);
});

Deno.test("place: more shards than devices share devices, next to each other", () => {
  const one = [{ id: "a", memoryBytes: 100, bandwidthGBps: null }];
  const five = place(uniform(5), one, { shards: 5 });
  assert.deepEqual(five.map(({ first, end }) => [first, end]), [[0, 1], [1, 2], [2, 3], [3, 4], [4, 5]]);
  const two = ["a", "b"].map((id) => ({ id, memoryBytes: 1e9, bandwidthGBps: null }));
  assert.deepEqual(place(uniform(8), two, { shards: 3 }).map(({ worker }) => worker), ["a", "a", "b"]);
  assert.throws(
    () => place(uniform(5), one, { shards: 6 }),
    /6 shards are asked for; a model of 5 layers can have 1 to 5/,
  );
  assert.throws(() => place(uniform(5), one, { shards: 0 }), PlacementError);
});

Deno.test("place: a model that does not fit is refused with every device's share", () => {
  const devices = [
    { id: "pi-4", memoryBytes: 2e9, bandwidthGBps: 4 },
    { id: "pi-5", memoryBytes: 3e9, bandwidthGBps: 12 },
  ];
  assert.throws(() => place(uniform(8, 1e9), devices), {
    name: "PlacementError",
    message: "the model with its KV cache needs 8.00 GB of memory; pi-4 offers 2.00 GB, room for 2 of 8 layers; " +
      "pi-5 offers 3.00 GB, room for 3 of 8 layers: 3.00 GB are missing, 2.00 GB more on each would do",
  });
  assert.throws(() => place(uniform(5, 1e9), devices, { shards: 1 }), /no split into 1 contiguous ranges/);
  assert.throws(() => place(uniform(5), []), /no workers/);
});

Deno.test("place: many devices are placed within reason: alike ones exactly, others by their order", () => {
  const next = random(5);
  const alike = Array.from({ length: 24 }, (_, i) => ({
    ...{ id: `d${i}`, memoryBytes: 100, bandwidthGBps: i < 20 ? 5 : 10 },
  }));
  // 3 layers on each slow one and 6 on each fast one make 84; within any less time, 2 and 5 make 60.
  assert.equal(times(uniform(80), alike, place(uniform(80), alike))!.slowest, 6 / 10 * 10 / 1e9);
  const devices = Array.from({ length: 24 }, (_, i) => ({
    ...{ id: `d${i}`, memoryBytes: 100 + i, bandwidthGBps: 1 + next(9) + i / 100 },
  }));
  for (const shards of [undefined, 20]) {
    const stages = place(uniform(80), devices, shards === undefined ? {} : { shards });
    assert(times(uniform(80), devices, stages) !== undefined);
    assert.equal(stages[0]!.first, 0);
    assert.equal(stages.at(-1)!.end, 80);
    stages.slice(1).forEach((stage, i) => assert.equal(stage.first, stages[i]!.end));
    assert.equal(new Set(stages.map(({ worker }) => worker)).size, stages.length);
    if (shards !== undefined) assert.equal(stages.length, shards);
  }
});
