/** How an orchestrator begins and ends where the server has a store; where it is too old, this reports itself as ignored. */
import assert from "node:assert/strict";
import { NatsBus } from "../bus/mod.ts";
import { continuation, fakeModel, read, settled } from "../tests/fakes/cluster.ts";
import { FakeKernels } from "../tests/fakes/kernels.ts";
import { nats } from "../tests/nats.ts";
import { Worker } from "../worker/worker.ts";
import { Engine } from "./engine.ts";
import type { EngineOptions } from "./engine.ts";

const request = { promptTokens: [5, 6, 7], maxTokens: 20, sampling: { temperature: 0 }, ignoreEos: true };
const CLUSTER = "home";

function test(name: string, fn: (servers: string) => Promise<void>): void {
  Deno.test({
    name: `Engine: ${name}`,
    ignore: !nats.stores,
    async fn() {
      await using server = await nats.start({ jetstream: true });
      await fn(server.url);
    },
  });
}

/** A device of its own: bus, kernels, worker. */
async function device(servers: string, id: string) {
  const bus = await NatsBus.connect({ servers, onError: () => {} });
  const kernels = new FakeKernels();
  const worker = await Worker.start({
    ...{ bus, kernels, id, cluster: CLUSTER, memoryBytes: 1e9, bandwidthGBps: 10, heartbeatMs: 50, log: () => {} },
  });
  const member = bus.store(CLUSTER)!.join(id);
  return {
    kernels,
    async end() {
      await member[Symbol.asyncDispose]();
      await worker.close();
      await bus.close();
    },
  };
}

async function orchestrator(servers: string, options: Partial<EngineOptions> = {}) {
  const bus = await NatsBus.connect({ servers, onError: () => {} });
  const end = () => bus.close();
  try {
    const engine = await Engine.open({
      ...{ bus, model: fakeModel(), cluster: CLUSTER, lostMs: 5000, unload: false, store: bus.store(CLUSTER) },
      ...options,
    });
    return {
      engine,
      async end() {
        await engine.close();
        await bus.close();
      },
      /** As one that is killed: nothing is said, given up or released. */
      async die() {
        await bus.close();
        await engine.close();
      },
    };
  } catch (error) {
    await end();
    throw error;
  }
}

test("of two that start at once one serves, and the other says who does not", async (servers) => {
  const worker = await device(servers, "a");
  const both = await Promise.allSettled([orchestrator(servers), orchestrator(servers)]);
  const [one] = both.filter((result) => result.status === "fulfilled");
  const [other] = both.filter((result) => result.status === "rejected");
  assert(one !== undefined && other !== undefined, both.map(({ status }) => status).join());
  assert.match(other.reason.message, /cluster home is served already/);
  await one.value.engine.ready;
  assert.deepEqual((await read(one.value.engine.generate(request))).ids, continuation([5, 6, 7], 20));
  await one.value.end();
  const next = await orchestrator(servers);
  await next.engine.ready;
  await next.end();
  await worker.end();
});

test("the next one lays the model where it lay, and waits a moment for those who hold it", async (servers) => {
  const a = await device(servers, "a");
  let b = await device(servers, "b");
  const first = await orchestrator(servers, { shards: 2, workers: 2 });
  await first.engine.ready;
  const stages = first.engine.stats().stages.map(({ worker, first, end }) => [worker, first, end]);
  const { epoch } = first.engine.stats();
  await first.die();
  await b.end(); // away for a moment, as the orchestrator is
  const opening = orchestrator(servers, { shards: 2, workers: 1 });
  await new Promise((resolve) => setTimeout(resolve, 1000));
  b = await device(servers, "b");
  const second = await opening;
  await second.engine.ready;
  assert.deepEqual(second.engine.stats().stages.map(({ worker, first, end }) => [worker, first, end]), stages);
  assert(second.engine.stats().epoch > epoch);
  assert.equal(a.kernels.shards.length, 1, "its shard was opened anew");
  assert.deepEqual((await read(second.engine.generate(request))).ids, continuation([5, 6, 7], 20));
  await second.end();
  for (const worker of [a, b]) await worker.end();
});

test("the next one lays every replica where it lay, and one whose worker is gone anew", async (servers) => {
  const devices = [];
  for (const id of ["a", "b", "c", "d", "e"]) devices.push(await device(servers, id));
  const bus = await NatsBus.connect({ servers });
  const stages = (...workers: string[]) => workers.map((worker, i) => ({ worker, first: 3 * i, end: 3 * i + 3 }));
  const plan = { epoch: 7, model: "fake", replicas: [stages("d", "a"), stages("gone", "e"), stages("c", "b")] };
  await bus.store(CLUSTER)!.savePlan(plan);
  const { engine, end } = await orchestrator(servers);
  await engine.ready;
  await settled(() => engine.clusterStatus().replicas.filter(({ state }) => state === "serving").length === 3);
  const lain = engine.stats().stages.map(({ replica, worker }) => [replica, worker]);
  assert.deepEqual(lain, [[0, "d"], [0, "a"], [1, "c"], [1, "b"], [2, "e"]]);
  assert(engine.clusterStatus().replicas.every(({ epoch }) => epoch > 7));
  assert.deepEqual((await read(engine.generate(request))).ids, continuation([5, 6, 7], 20));
  const kept = async () =>
    (await bus.store(CLUSTER)!.plan())?.replicas.map((stages) => stages.map(({ worker }) => worker));
  for (let i = 0; JSON.stringify(await kept()) !== '[["d","a"],["c","b"],["e"]]'; i++) {
    assert(i < 100, JSON.stringify(await kept()));
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  await end();
  await bus.close();
  for (const worker of devices) await worker.end();
});

test("one whose lease another takes serves no longer, and says so", async (servers) => {
  const worker = await device(servers, "a");
  const first = await orchestrator(servers);
  await first.engine.ready;
  const bus = await NatsBus.connect({ servers });
  const lease = await bus.store(CLUSTER)!.acquire("rival", () => Promise.resolve("gone"));
  await settled(() => first.engine.failure !== undefined);
  assert.match(first.engine.failure!.message, /another orchestrator has taken over cluster home/);
  assert.throws(() => first.engine.generate(request), /has taken over/);
  await first.end();
  await lease.release();
  await bus.close();
  await worker.end();
});
