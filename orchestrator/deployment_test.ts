/** The deployment with workers that send heartbeats: what they alone can tell. */
import assert from "node:assert/strict";
import { InProcessBus } from "../bus/mod.ts";
import { continuation, fakeModel, LossyBus, read, settled } from "../tests/fakes/cluster.ts";
import { FakeKernels } from "../tests/fakes/kernels.ts";
import { Worker } from "../worker/worker.ts";
import type { WorkerOptions } from "../worker/worker.ts";
import { Engine } from "./engine.ts";
import { modelCost } from "./served_model.ts";

const request = { promptTokens: [5, 6, 7], maxTokens: 40, sampling: { temperature: 0 }, ignoreEos: true };

const startWorker = (bus: InProcessBus, id: string, options: Partial<WorkerOptions> = {}) =>
  Worker.start({
    bus,
    kernels: new FakeKernels(),
    id,
    memoryBytes: 1e9,
    bandwidthGBps: 10,
    heartbeatMs: 20,
    log: () => {},
    ...options,
  });

Deno.test("Deployment: a message that is lost is noticed by workers that do nothing, long before the step's limit", async () => {
  const bus = new LossyBus();
  const workers = [await startWorker(bus, "a"), await startWorker(bus, "b")];
  const told: string[] = [];
  const engine = await Engine.start({
    ...{ bus, model: fakeModel(), workers: 2, shards: 2, lostMs: 60_000 },
    log: (text) => told.push(text),
  });
  for (const lose of [5, 6]) { // to the second stage, and to the orchestrator
    bus.lose = lose;
    assert.deepEqual((await read(engine.generate(request))).ids, continuation([5, 6, 7], 40));
  }
  assert.equal(told.filter((text) => /a message was lost/.test(text)).length, 2, told.join("\n"));
  await engine.close();
  for (const worker of workers) await worker.close();
  assert.equal(bus.subscriptions, 0);
  await bus.close();
});

Deno.test("Deployment: a kernel that hangs is noticed in two seconds by what it should take, and its worker is left out", async () => {
  const bus = new InProcessBus();
  const gate = Promise.withResolvers<void>();
  let layers = 0;
  const hanging = new FakeKernels({ beforeLayer: () => ++layers === 60 ? gate.promise : undefined });
  const bad = await startWorker(bus, "a", { kernels: hanging });
  const workers = [await startWorker(bus, "b"), await startWorker(bus, "c")];
  const told: { text: string; at: number }[] = [];
  const engine = await Engine.start({
    ...{ bus, model: fakeModel(), workers: 3, shards: 2, lostMs: 60_000 },
    log: (text) => told.push({ text, at: performance.now() }),
  });
  assert.deepEqual(engine.stats().stages.map(({ worker }) => worker), ["a", "b"]);
  const begin = performance.now();
  assert.deepEqual((await read(engine.generate(request))).ids, continuation([5, 6, 7], 40));
  const noticed = told.find(({ text }) => /worker a hangs in a micro-batch/.test(text));
  assert(noticed !== undefined && noticed.at - begin < 4000, JSON.stringify(told));
  assert.deepEqual(engine.stats().stages.map(({ worker }) => worker), ["b", "c"]);
  gate.resolve();
  await engine.close();
  for (const worker of [bad, ...workers]) await worker.close();
  assert.equal(bus.subscriptions, 0);
  await bus.close();
});

Deno.test("Deployment: a worker that comes later gets its share when nothing runs", async () => {
  const bus = new InProcessBus();
  // So slow that hops are nothing beside it, and the second cannot hold the model alone.
  const bandwidthGBps = 1e-9;
  const { layers } = modelCost(fakeModel().description, { type: "f16", tokens: 8192 });
  const memoryBytes = Math.floor(4.5 * layers[0]!.memoryBytes);
  const first = await startWorker(bus, "a", { bandwidthGBps });
  const engine = await Engine.start({ bus, model: fakeModel(), lostMs: 60_000 });
  assert.deepEqual(engine.stats().stages.map((stage) => stage.worker), ["a"]);
  const events = engine.generate({ ...request, maxTokens: 3000 });
  await events.next();
  const late = await startWorker(bus, "b", { bandwidthGBps, memoryBytes });
  await read(events);
  assert.equal(engine.clusterStatus().recoveries, 0, "a running answer was disturbed");
  await settled(() => engine.stats().stages.length === 2 && engine.failure === undefined);
  assert.deepEqual((await read(engine.generate(request))).ids, continuation([5, 6, 7], 40));
  assert.deepEqual(engine.clusterStatus().workers.map(({ id, layers }) => [id, layers.length]), [["a", 1], ["b", 1]]);
  await engine.close();
  for (const worker of [first, late]) await worker.close();
  assert.equal(bus.subscriptions, 0);
  await bus.close();
});

Deno.test("Deployment: who is measured to be slower gets fewer layers, and a gain as small as noise moves none", async () => {
  const bus = new InProcessBus();
  // A kernel library whose layers take so long.
  const paced = (ms: number) =>
    new FakeKernels({ beforeLayer: () => new Promise((resolve) => setTimeout(resolve, ms)) });
  const workers: Worker[] = [];
  const start = async (id: string, ms: number, options: Partial<WorkerOptions> = {}) => {
    workers.push(await startWorker(bus, id, { kernels: paced(ms), measure: true, ...options }));
  };
  const { layers } = modelCost(fakeModel().description, { type: "f16", tokens: 8192 });
  const memoryBytes = Math.floor(5.5 * layers[0]!.memoryBytes); // none holds the model alone
  await start("a", 30, { memoryBytes });
  await start("b", 9, { memoryBytes });
  const engine = await Engine.start({ bus, model: fakeModel(), workers: 2, lostMs: 60_000 });
  const held = () =>
    new Map(engine.clusterStatus().workers.map(({ id, layers: [range] }) => [id, range && range[1] - range[0]]));
  assert(held().get("b")! >= 2 * held().get("a")!, JSON.stringify([...held()]));
  const status = engine.clusterStatus().workers;
  assert(status.every(({ msPerLayer, msHead }) => msPerLayer! > 8 && msHead !== null), JSON.stringify(status));
  const { epoch } = engine.stats();
  // One that is as slow as the slow one gains little: nothing is moved.
  await start("c", 60, { memoryBytes });
  await settled(() => engine.clusterStatus().workers.find(({ id }) => id === "c")?.msPerLayer != null);
  await new Promise((resolve) => setTimeout(resolve, 1000));
  assert.equal(engine.stats().epoch, epoch);
  // A fast one is worth it.
  await start("d", 8, { memoryBytes });
  await settled(() => engine.stats().epoch > epoch && engine.failure === undefined);
  assert(held().get("d")! >= 2, JSON.stringify([...held()]));
  await engine.close();
  for (const worker of workers) await worker.close();
  assert.equal(bus.subscriptions, 0);
  await bus.close();
});
