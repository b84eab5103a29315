/** Several replicas of a model, with workers that send heartbeats and lose their connection. */
import assert from "node:assert/strict";
import { InProcessBus } from "../bus/mod.ts";
import type { Bus, BusMessage, PublishOptions, RequestOptions, Subscription } from "../bus/mod.ts";
import { continuation, fakeModel, settled } from "../tests/fakes/cluster.ts";
import { FakeKernels } from "../tests/fakes/kernels.ts";
import type { FakeKernelsOptions } from "../tests/fakes/kernels.ts";
import { Worker } from "../worker/worker.ts";
import type { WorkerOptions } from "../worker/worker.ts";
import { Engine } from "./engine.ts";
import type { EngineOptions } from "./engine.ts";
import type { GenerateRequest } from "./request.ts";
import { modelCost } from "./served_model.ts";

/** A device's way to the bus, which can be cut without a word. */
class Cable implements Bus {
  cut = false;
  readonly #bus: InProcessBus;
  constructor(bus: InProcessBus) {
    this.#bus = bus;
  }
  get maxPayload() {
    return this.#bus.maxPayload;
  }
  get state() {
    return this.#bus.state;
  }
  publish(subject: string, data: Uint8Array, options?: PublishOptions): void {
    if (!this.cut) this.#bus.publish(subject, data, options);
  }
  subscribe(subject: string, handler: (message: BusMessage) => void): Subscription {
    return this.#bus.subscribe(subject, (message) => {
      if (!this.cut) handler({ ...message, respond: (data) => this.cut || message.respond(data) });
    });
  }
  request(subject: string, data: Uint8Array, options?: RequestOptions): Promise<BusMessage> {
    return this.#bus.request(subject, data, options);
  }
  flush(): Promise<void> {
    return this.#bus.flush();
  }
  watch(): Subscription {
    return this.#bus.watch();
  }
  close(): Promise<void> {
    return Promise.resolve();
  }
}

const LOST_MS = 300;
const { layers } = modelCost(fakeModel().description, { type: "f16", tokens: 8192 });
const LAYER_BYTES = layers[0]!.memoryBytes;

/** Devices and an orchestrator. */
class Site {
  readonly bus = new InProcessBus();
  readonly told: string[] = [];
  readonly kernels = new Map<string, FakeKernels>();
  readonly #cables = new Map<string, Cable>();
  readonly #workers: Worker[] = [];
  #engine: Engine | undefined;

  async work(
    id: string,
    options: Partial<Omit<WorkerOptions, "kernels">> & { kernels?: FakeKernelsOptions } = {},
  ): Promise<Worker> {
    const { kernels: kernelOptions, ...rest } = options;
    // So slow that its tokens take a while: what is broken is broken in their midst.
    const kernels = new FakeKernels(kernelOptions ?? { beforeLayer: () => new Promise((done) => setTimeout(done, 0)) });
    const cable = new Cable(this.bus);
    this.kernels.set(id, kernels);
    this.#cables.set(id, cable);
    const worker = await Worker.start({
      ...{ bus: cable, id, memoryBytes: 1e9, bandwidthGBps: 10, heartbeatMs: 20, log: () => {} },
      ...rest,
      kernels,
    });
    this.#workers.push(worker);
    return worker;
  }

  /** Pulls a worker's cable. */
  cut(id: string): void {
    this.#cables.get(id)!.cut = true;
  }

  async serve(options: Partial<EngineOptions> = {}): Promise<Engine> {
    return this.#engine = await Engine.start({
      ...{ bus: this.bus, model: fakeModel(), lostMs: LOST_MS, unload: false },
      log: (text) => this.told.push(text),
      ...options,
    });
  }

  async end(): Promise<void> {
    await this.#engine?.close();
    for (const cable of this.#cables.values()) cable.cut = false;
    for (const worker of this.#workers) await worker.close();
    assert.equal(this.bus.subscriptions, 0);
    await this.bus.close();
    for (const [id, { shards }] of this.kernels) {
      for (const shard of shards) assert.deepEqual([shard.misuse, shard.closed], [[], true], id);
    }
  }
}

function test(name: string, fn: (site: Site) => Promise<void>): void {
  Deno.test(`Fleet: ${name}`, async () => {
    const site = new Site();
    await fn(site);
    await site.end();
  });
}

const requests = (count: number, maxTokens: number): GenerateRequest[] =>
  Array.from({ length: count }, (_, n) => ({
    ...{ promptTokens: Array.from({ length: 5 + n }, (_, i) => 1 + (7 * n + 3 * i) % 90), maxTokens, ignoreEos: true },
    sampling: n % 2 === 0 ? { temperature: 0 } : { temperature: 1, seed: BigInt(n) },
  }));

const right = ({ promptTokens, maxTokens, sampling }: GenerateRequest) =>
  continuation(promptTokens, maxTokens!, sampling?.seed);

/** Runs requests, and something else when the first of them has come so far. */
async function answer(engine: Engine, all: readonly GenerateRequest[], after = Infinity, act = () => {}) {
  let seen = 0;
  const answers = await Promise.all(all.map(async (request) => {
    const ids: number[] = [];
    for await (const event of engine.generate(request)) {
      if (event.type !== "token") continue;
      ids.push(event.id);
      if (++seen === after) act();
    }
    return ids;
  }));
  answers.forEach((ids, n) => assert.deepEqual(ids, right(all[n]!), `request ${n}`));
}

/** The workers of each replica that serves, in their order. */
const replicas = (engine: Engine): string[] => {
  const all: string[] = [];
  for (const { replica, worker } of engine.stats().stages) {
    all[replica] = all[replica] === undefined ? worker : `${all[replica]},${worker}`;
  }
  return all.filter((_, i) => engine.clusterStatus().replicas[i]!.state === "serving");
};

/** The same in no particular order: which of equal boards comes first is up to what they were measured to do. */
const members = (engine: Engine): string[] => replicas(engine).map((workers) => workers.split(",").sort().join());

/** Tokens that each worker's shards have sampled. */
const sampled = (site: Site, id: string) =>
  site.kernels.get(id)!.shards.flatMap(({ forwards }) => forwards).reduce((sum, { sampled }) => sum + sampled, 0);

test("boards that each hold the model are replicas, which share the streams; one stream has the fastest", async (site) => {
  // So slow that hops are nothing beside it.
  for (const id of ["a", "b", "c"]) await site.work(id, { bandwidthGBps: id === "b" ? 2e-9 : 1e-9 });
  const engine = await site.serve({ workers: 3 });
  await settled(() => replicas(engine).length === 3);
  assert.deepEqual(replicas(engine)[0], "b");
  for (const request of requests(3, 10)) await answer(engine, [request]);
  assert.deepEqual(["a", "c"].map((id) => sampled(site, id)), [0, 0], "one stream at a time is the fastest's");
  await answer(engine, requests(8, 20));
  const [a, b, c] = ["a", "b", "c"].map((id) => sampled(site, id) / 20);
  assert(a! >= 1 && c! >= 1 && b! - 1.5 > Math.max(a!, c!), `${a} ${b} ${c}: in the fastest most, but not all`);
  const status = engine.clusterStatus();
  assert.deepEqual(status.replicas.map(({ state }) => state), ["serving", "serving", "serving"]);
  assert.deepEqual(
    status.workers.map(({ id, replica, layers }) => [id, status.replicas[replica!]!.state, layers]),
    ["a", "b", "c"].map((id) => [id, "serving", [[0, 6]]]),
  );
  assert.equal(new Set(status.replicas.map(({ epoch }) => epoch)).size, 3, "each has epochs of its own");
});

test("boards that come while the first measures itself are measured, too, before any is chosen", async (site) => {
  const paced = (ms: number) => ({ beforeLayer: () => new Promise<void>((resolve) => setTimeout(resolve, ms)) });
  await site.work("slow", { measure: true, kernels: paced(30) });
  let late: Promise<unknown> | undefined;
  setTimeout(() => late = site.work("fast", { measure: true, kernels: paced(5) }), 50);
  const engine = await site.serve();
  await late;
  await settled(() => replicas(engine).length === 2);
  assert.deepEqual(replicas(engine), ["fast", "slow"]);
  const measured = engine.clusterStatus().workers.map(({ msPerLayer }) => msPerLayer);
  assert(measured.every((ms) => ms !== null), `${measured}`);
});

test("a request goes where an earlier one has left its beginning", async (site) => {
  for (const id of ["a", "b"]) await site.work(id);
  const engine = await site.serve({ workers: 2 });
  await settled(() => replicas(engine).length === 2);
  const [long, other] = [700, 30].map((length) => Array.from({ length }, (_, i) => (i * 31 + length) % 90));
  const ask = (promptTokens: number[]): GenerateRequest => ({
    ...{ promptTokens, maxTokens: 8, ignoreEos: true, sampling: { temperature: 0 } },
  });
  // Both at once: one each.
  await answer(engine, [ask(other!), ask(long!)]);
  const before = engine.stats().reusedTokens;
  const turn = [...long!, ...right(ask(long!)), 3, 4, 5];
  await answer(engine, [ask(turn)]);
  assert.equal(engine.stats().reusedTokens - before, 707);
  // Beside another stream there, too, as computing it anew would take longer.
  await answer(engine, [ask(turn), ask([...turn, 9])]);
  assert(engine.stats().reusedTokens - before > 2 * 707, `${engine.stats().reusedTokens - before}`);
});

for (const way of ["silent", "leaves", "drains"] as const) {
  test(`a replica whose worker ${way} hands its requests to the others in their midst, none of which notice`, async (site) => {
    const workers = new Map<string, Worker>();
    for (const id of ["a", "b", "c"]) workers.set(id, await site.work(id));
    const engine = await site.serve({ workers: 3 });
    await settled(() => replicas(engine).length === 3);
    const opened = () => [...site.kernels.values()].map(({ shards }) => shards.length);
    let gone: Promise<unknown> | undefined;
    await answer(engine, requests(9, 60), 90, () => {
      if (way === "silent") site.cut("b");
      else gone = way === "leaves" ? workers.get("b")!.close() : workers.get("b")!.drain(2000);
    });
    await gone;
    if (way === "drains") assert.equal(await gone, true, "it was not let go");
    assert.deepEqual(replicas(engine).sort(), ["a", "c"]);
    assert.deepEqual(opened(), [1, 1, 1], "a replica was loaded anew");
    assert.equal(engine.clusterStatus().recoveries, 1, site.told.join("\n"));
    assert(site.told.some((text) => /^3 requests go on with another replica$/.test(text)), site.told.join("\n"));
    await answer(engine, requests(4, 10));
  });
}

test("a worker that comes later makes another replica while streams run, and takes those that wait", async (site) => {
  await site.work("a");
  const engine = await site.serve({ maxRunning: 2 });
  let late: Promise<unknown> | undefined;
  await answer(engine, requests(8, 60), 20, () => late = site.work("b"));
  await late;
  assert.deepEqual(replicas(engine), ["a", "b"]);
  assert.equal(engine.clusterStatus().recoveries, 0, "a running answer was disturbed");
  assert(sampled(site, "b") >= 2 * 60, `${sampled(site, "b")} tokens there`);
  assert.equal(sampled(site, "a") + sampled(site, "b"), 8 * 60, "a token was computed twice");
  await site.work("c");
  await settled(() => replicas(engine).length === 3);
  await new Promise((resolve) => setTimeout(resolve, 500));
  assert.equal(engine.clusterStatus().recoveries, 0, "replicas were disturbed by one beside them");
});

test("when all are lost at once, requests wait for the first that comes back; what comes late from the lost counts for nothing", async (site) => {
  for (const id of ["a", "b"]) await site.work(id);
  const engine = await site.serve({ workers: 2 });
  await settled(() => replicas(engine).length === 2);
  await answer(engine, requests(4, 60), 60, () => {
    for (const id of ["a", "b"]) site.cut(id);
    setTimeout(() => site.work("c"), 2 * LOST_MS);
  });
  assert.deepEqual(replicas(engine), ["c"]);
  assert.equal(engine.clusterStatus().replicas.length, 1);
});

test("a request that ends every worker that computes it is given to four, not to all", async (site) => {
  const ids = ["a", "b", "c", "d", "e", "f"];
  let deadly = false;
  let ended = 0;
  for (const id of ids) {
    const beforeLayer = (layer: number) => {
      if (!deadly || layer < 5) return;
      if (ended++ < ids.length) site.cut(id);
      return new Promise<void>((resolve) => setTimeout(resolve, 20));
    };
    await site.work(id, { kernels: { beforeLayer } });
  }
  const engine = await site.serve({ workers: ids.length });
  await settled(() => replicas(engine).length === ids.length);
  deadly = true;
  await assert.rejects(answer(engine, requests(1, 10)), {
    name: "ClusterError",
    message: /4 replicas were lost while they computed the same token of this request/,
  });
  deadly = false;
  assert.equal(ended, 4);
  await answer(engine, requests(4, 10));
});

test("a lost message is one replica's affair", async (site) => {
  for (const id of ["a", "b"]) await site.work(id);
  const engine = await site.serve({ workers: 2, lostMs: 60_000 });
  await settled(() => replicas(engine).length === 2);
  const publish = site.bus.publish.bind(site.bus);
  let lose = 30;
  site.bus.publish = (subject, data, options) => {
    if (!/results$/.test(subject) || --lose !== 0) publish(subject, data, options);
  };
  await answer(engine, requests(4, 40));
  await settled(() => replicas(engine).length === 2);
  assert.equal(site.told.filter((text) => /a message was lost/.test(text)).length, 1, site.told.join("\n"));
  assert.deepEqual([...site.kernels.values()].map(({ shards }) => shards.length), [1, 1], "layers were loaded anew");
});

test("after a lost message it goes on at once where its layers are, whoever has come meanwhile", async (site) => {
  const half = { memoryBytes: Math.floor(4.5 * LAYER_BYTES), bandwidthGBps: 1e-9 };
  for (const id of ["a", "b"]) await site.work(id, half);
  const engine = await site.serve({ workers: 2, lostMs: 60_000 });
  const opened = () => ["a", "b"].map((id) => site.kernels.get(id)!.shards.length);
  const publish = site.bus.publish.bind(site.bus);
  let lose = 0;
  site.bus.publish = (subject, data, options) => {
    if (!/results$/.test(subject) || --lose !== 0) publish(subject, data, options);
  };
  const running = answer(engine, requests(4, 60), 20, () => lose = 40);
  await site.work("c", half); // with it the layers would lie otherwise
  await settled(() => engine.clusterStatus().recoveries > 0);
  assert.deepEqual([replicas(engine), opened()], [["a,b"], [1, 1]], "layers were loaded anew");
  await running;
  await settled(() => members(engine).join() === "a,b,c"); // when nothing runs
  await answer(engine, requests(4, 10));
});

test("boards that hold the model only together are one replica beside one that holds it alone; another finds its place when nothing runs", async (site) => {
  const half = { memoryBytes: Math.floor(4.5 * LAYER_BYTES), bandwidthGBps: 1e-9 };
  for (const id of ["a", "b"]) await site.work(id, half);
  await site.work("whole", { bandwidthGBps: 1e-9 });
  const engine = await site.serve({ workers: 3 });
  await settled(() => replicas(engine).length === 2);
  assert.deepEqual(replicas(engine).sort(), ["a,b", "whole"]);
  await answer(engine, requests(6, 20));
  // Alone it does not hold the model: it joins one of them when nothing runs there.
  await site.work("c", half);
  await settled(() => replicas(engine).some((workers) => workers.includes("c")));
  await answer(engine, requests(6, 20));
  site.cut("whole");
  await answer(engine, requests(6, 60));
  await settled(() => members(engine).join() === "a,b,c");
  await answer(engine, requests(6, 20));
});

test("for one stream at a time it is one pipeline; cancels and closing reach all replicas", async (site) => {
  for (const id of ["a", "b"]) await site.work(id, { bandwidthGBps: 1e-9 });
  const one = await site.serve({ workers: 2, streams: 1 });
  assert.deepEqual(one.stats().stages.map(({ replica, worker }) => [replica, worker]), [[0, "a"], [0, "b"]]);
  await answer(one, requests(2, 10));
  await one.close();
  const engine = await site.serve({ workers: 2 });
  await settled(() => replicas(engine).length === 2);
  const events = requests(4, 500).map((request) => engine.generate(request));
  for (const each of events) await each.next();
  for (const each of events.slice(0, 2)) await each.return!();
  assert.deepEqual([engine.stats().running, engine.stats().waiting], [2, 0]);
  await engine.close();
  for (const each of events.slice(2)) {
    await assert.rejects(async () => {
      for await (const _ of each);
    }, { name: "EngineClosedError" });
  }
});

test("the next orchestrator finds every replica's shard still loaded", async (site) => {
  for (const id of ["a", "b"]) await site.work(id);
  const first = await site.serve({ workers: 2 });
  await settled(() => replicas(first).length === 2);
  await answer(first, requests(4, 10));
  await first.close();
  const second = await site.serve({ workers: 2 });
  await settled(() => replicas(second).length === 2);
  assert(second.stats().epoch > 2);
  await answer(second, requests(4, 10));
  assert.deepEqual([...site.kernels.values()].map(({ shards }) => shards.length), [1, 1]);
});
