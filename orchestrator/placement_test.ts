import assert from "node:assert/strict";
import { PlacementError } from "./errors.ts";
import { place } from "./placement.ts";
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

/** Time of the slowest stage; `undefined` when a device holds more than it offers. */
function slowest(cost: ModelCost, devices: readonly Device[], stages: readonly PlacedStage[]): number | undefined {
  let worst = 0;
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
    worst = Math.max(worst, read / (device.bandwidthGBps ?? 1));
  }
  return worst;
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

Deno.test("place: as good as brute force, with and without a number of shards", () => {
  const next = random(3);
  let refused = 0;
  for (let round = 0; round < 150; round++) {
    const layers = 1 + next(6);
    const cost: ModelCost = {
      layers: Array.from({ length: layers }, () => ({ memoryBytes: 1 + next(20), readBytes: 1 + next(20) })),
      embeddingBytes: next(20),
      head: { memoryBytes: next(30), readBytes: next(30) },
    };
    const devices: Device[] = Array.from({ length: 1 + next(4) }, (_, i) => ({
      id: `d${i}`,
      memoryBytes: next(100),
      bandwidthGBps: 1 + next(5),
    }));
    const all = [...everySplit(layers, devices)];
    for (const shards of [undefined, 1 + next(Math.min(devices.length, layers))]) {
      const times = all.filter((stages) => shards === undefined || stages.length === shards)
        .map((stages) => slowest(cost, devices, stages)).filter((time) => time !== undefined);
      if (times.length === 0) {
        refused++;
        assert.throws(() => place(cost, devices, shards === undefined ? {} : { shards }), PlacementError);
        continue;
      }
      const stages = place(cost, devices, shards === undefined ? {} : { shards });
      assert.equal(slowest(cost, devices, stages), Math.min(...times), `round ${round}`);
      if (shards !== undefined) assert.equal(stages.length, shards);
    }
  }
  assert(refused > 10 && refused < 200, `${refused} refused`);
});

Deno.test("place: twice as fast takes twice as many layers", () => {
  const devices = [
    { id: "slow", memoryBytes: 1e9, bandwidthGBps: 5 },
    { id: "fast", memoryBytes: 1e9, bandwidthGBps: 10 },
  ];
  const stages = place(uniform(12), devices);
  assert.deepEqual(
    new Map(stages.map(({ worker, first, end }) => [worker, end - first])),
    new Map([["slow", 4], ["fast", 8]]),
  );
});

Deno.test("place: equal devices keep their order; an unknown bandwidth counts as the median", () => {
  const devices = ["a", "b", "c"].map((id) => ({ id, memoryBytes: 1e9, bandwidthGBps: null }));
  const expected = [{ worker: "a", first: 0, end: 2 }, { worker: "b", first: 2, end: 4 }, {
    worker: "c",
    first: 4,
    end: 6,
  }];
  assert.deepEqual(place(uniform(6), devices), expected);
  const known = devices.map((device, i) => i === 1 ? device : { ...device, bandwidthGBps: 7 });
  assert.deepEqual(place(uniform(6), known), expected);
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
      "pi-5 offers 3.00 GB, room for 3 of 8 layers: 3.00 GB are missing",
  });
  assert.throws(() => place(uniform(5, 1e9), devices, { shards: 1 }), /no split into 1 contiguous ranges/);
  assert.throws(() => place(uniform(5), []), /no workers/);
});

Deno.test("place: many devices are placed within reason", () => {
  const next = random(5);
  const devices = Array.from({ length: 24 }, (_, i) => ({ id: `d${i}`, memoryBytes: 100, bandwidthGBps: 1 + next(9) }));
  const cost = uniform(80);
  for (const shards of [undefined, 20]) {
    const stages = place(cost, devices, shards === undefined ? {} : { shards });
    assert(slowest(cost, devices, stages) !== undefined);
    assert.equal(stages[0]!.first, 0);
    assert.equal(stages.at(-1)!.end, 80);
    stages.slice(1).forEach((stage, i) => assert.equal(stage.first, stages[i]!.end));
    if (shards !== undefined) assert.equal(stages.length, shards);
  }
});
