/** The store on a real server; where the server is too old, what needs it reports itself as ignored. */
import assert from "node:assert/strict";
import { join } from "node:path";
import { nats } from "../tests/nats.ts";
import { storesKeys } from "./cluster_store.ts";
import type { ClusterStore, HolderState } from "./cluster_store.ts";
import { NatsBus } from "./nats.ts";

const TIMES = { lifeMs: 3000, renewMs: 500 };
const is = (answer: HolderState) => () => Promise.resolve(answer);
const pause = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));

function test(name: string, fn: () => Promise<void>): void {
  Deno.test({ name: `ClusterStore: ${name}`, ignore: !nats.stores, fn });
}

async function connect(servers: string, times = TIMES): Promise<{ bus: NatsBus; store: ClusterStore }> {
  const bus = await NatsBus.connect({ servers, onError: () => {} });
  const store = bus.store("home", times);
  assert(store !== undefined);
  return { bus, store };
}

Deno.test("storesKeys: from 2.11 on", () => {
  assert.deepEqual(["2.9.10", "2.10.99", "2.11.0", "2.15.2", "3.0.0", "unknown"].map(storesKeys), [
    ...[false, false, true, true, true, false],
  ]);
});

Deno.test({
  name: "ClusterStore: there is none without JetStream",
  ignore: nats.absent,
  async fn() {
    await using server = await nats.start();
    const bus = await NatsBus.connect({ servers: server.url });
    assert.equal(bus.store("home"), undefined);
    await bus.close();
  },
});

test("of several that want to serve at once one does; the next when it gives up, or is gone, or silent for long", async () => {
  await using server = await nats.start({ jetstream: true });
  const { bus, store } = await connect(server.url);
  let served = false;
  const asks = () => Promise.resolve<HolderState>(served ? "answers" : "gone");
  const all = await Promise.allSettled(["a", "b", "c", "d"].map(async (id) => {
    const lease = await store.acquire(id, asks);
    served = true;
    return lease;
  }));
  const won = all.filter((one) => one.status === "fulfilled");
  assert.equal(won.length, 1);
  for (const { reason } of all.filter((one) => one.status === "rejected")) assert.equal(reason.name, "LeaseHeldError");
  await assert.rejects(store.acquire("e", is("answers")), {
    name: "LeaseHeldError",
    message: /home is served already/,
  });
  await won[0]!.value.release();
  const other = await connect(server.url);
  const dead = [await other.store.acquire("f", is("gone"))];
  await other.bus.close(); // as one that is killed: without a word

  const started = performance.now();
  const next = await store.acquire("g", is("gone"));
  assert(performance.now() - started < TIMES.lifeMs, "it waited for the lease's end");
  await next.release();
  const mute = await connect(server.url);
  dead.push(await mute.store.acquire("h", is("gone")));
  await mute.bus.close();
  await (await store.acquire("i", is("silent"))).release(); // when the lease is over
  for (const lease of dead) await lease.release();
  await bus.close();
});

test("one that is renewed lasts, even when the server forgets it; one that another took is lost", async () => {
  // Slow enough for another to find the holder gone three times between two renewals.
  const slow = { lifeMs: 3000, renewMs: 1000 };
  let server = await nats.start({ jetstream: true });
  const { port } = server;
  const { bus, store } = await connect(server.url, slow);
  const lease = await store.acquire("a", is("gone"));
  let lost = false;
  void lease.lost.then(() => lost = true);
  await assert.rejects(store.acquire("b", is("answers")), { name: "LeaseHeldError" });
  server.kill("SIGKILL");
  await server.stop();
  server = await nats.start({ jetstream: true, port });
  const other = await connect(server.url, slow);
  while (bus.state !== "connected") await pause(20);
  await pause(4000);
  await assert.rejects(other.store.acquire("c", is("silent"), AbortSignal.timeout(1200)), { name: "TimeoutError" });
  await assert.rejects(other.store.acquire("c", is("answers")), { name: "LeaseHeldError" });
  assert.equal(lost, false);
  const taken = await other.store.acquire("d", is("gone"));
  await lease.lost;
  await lease.release(); // of no effect
  await assert.rejects(store.acquire("e", is("answers")), { name: "LeaseHeldError" });
  await taken.release();
  await bus.close();
  await other.bus.close();
  await server.stop();
});

test("members are those that join and do not leave or fall silent", async () => {
  await using server = await nats.start({ jetstream: true });
  const { bus, store } = await connect(server.url);
  const other = await connect(server.url);
  assert.deepEqual(await store.members(), []);
  const a = store.join("a");
  const b = other.store.join("b");
  while ((await store.members()).length < 2) await pause(20);
  await pause(3500);
  assert.deepEqual(await store.members(), ["a", "b"], "they are renewed");
  await a[Symbol.asyncDispose]();
  assert.deepEqual(await store.members(), ["b"]);
  await other.bus.close(); // as one that is killed
  await b[Symbol.asyncDispose]();
  assert.deepEqual(await store.members(), ["b"]);
  while ((await store.members()).length > 0) await pause(50);
  await bus.close();
});

test("the plan outlives who wrote it, and the server; what is no plan counts as none", async () => {
  const folder = await Deno.makeTempDir();
  const config = `jetstream { store_dir: ${JSON.stringify(join(folder, "store"))} }`;
  const plan = {
    epoch: 7,
    model: "m",
    replicas: [[{ worker: "a", first: 0, end: 3 }, { worker: "b", first: 3, end: 6 }]],
  };
  try {
    let server = await nats.start({ config });
    const one = await connect(server.url);
    assert.equal(await one.store.plan(), undefined);
    await one.store.savePlan(plan);
    await one.bus.close();
    await server.stop();
    server = await nats.start({ config });
    const two = await connect(server.url);
    assert.deepEqual(await two.store.plan(), plan);
    await two.store.savePlan({ ...plan, replicas: [] });
    assert.equal(await two.store.plan(), undefined);
    await two.bus.close();
    await server.stop();
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
});

test("a server that is away is told as such", async () => {
  const server = await nats.start({ jetstream: true });
  const { bus, store } = await connect(server.url);
  await server.stop();
  await assert.rejects(store.plan(), { name: "BusError", message: /the cluster's store fails/ });
  await bus.close();
});
