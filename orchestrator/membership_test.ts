import assert from "node:assert/strict";
import { clusterSubjects, encodeJson, InProcessBus, WIRE_VERSION } from "../bus/mod.ts";
import type { Hello } from "../bus/mod.ts";
import { Membership, WORKER_ABI_VERSION } from "./membership.ts";

const { hello: subject, discover } = clusterSubjects("local");

function hello(id: string, change: Partial<Hello> = {}): Uint8Array {
  return encodeJson({
    type: "hello",
    id,
    state: "ready",
    session: "a-0",
    epoch: 0,
    versions: { abi: WORKER_ABI_VERSION, wire: WIRE_VERSION },
    capabilities: { isa: "fake", cores: 1, memoryBytes: 1, bandwidthGBps: null },
    work: { queued: 0, runningMs: null, expectedMs: null },
    ...change,
  });
}

Deno.test("Membership: finds those that are there, and waits for those to come", async () => {
  const bus = new InProcessBus();
  const worker = bus.subscribe(discover, () => bus.publish(subject, hello("a", { epoch: 7 })));
  const membership = new Membership(bus, "local");
  assert.deepEqual((await membership.waitFor(1, { timeoutMs: 1000 })).map((w) => w.id), ["a"]);
  assert.equal(membership.newestEpoch, 7);
  setTimeout(() => bus.publish(subject, hello("b")), 2);
  assert.deepEqual((await membership.waitFor(2, { timeoutMs: 1000 })).map((w) => w.id), ["a", "b"]);
  worker.unsubscribe();
  membership.close();
  assert.equal(bus.subscriptions, 0);
  await bus.close();
});

Deno.test("Membership: a wait ends with the reason, refused versions named, or with its signal", async () => {
  const bus = new InProcessBus();
  const membership = new Membership(bus, "local");
  bus.publish(subject, hello("old", { versions: { abi: 9, wire: 1 } }));
  bus.publish(subject, Uint8Array.of(1));
  await assert.rejects(membership.waitFor(1, { timeoutMs: 5 }), {
    name: "ClusterError",
    message:
      `0 of 1 workers are there after 0.005 s; refused: old has wire version 1 and ABI version 9, not ${WIRE_VERSION} and ${WORKER_ABI_VERSION}`,
  });
  const controller = new AbortController();
  const waiting = membership.waitFor(1, { timeoutMs: 1000, signal: controller.signal });
  setTimeout(() => controller.abort(new Error("enough")), 1);
  await assert.rejects(waiting, /enough/);
  membership.close();
  await bus.close();
});

Deno.test("Membership: tells who leaves", async () => {
  const bus = new InProcessBus();
  const left: string[] = [];
  const membership = new Membership(bus, "local", { onLeave: (id) => left.push(id) });
  for (const message of [hello("a"), hello("b"), hello("a", { state: "leaving" }), hello("c", { state: "leaving" })]) {
    bus.publish(subject, message);
  }
  await bus.flush();
  assert.deepEqual(left, ["a"]);
  assert.deepEqual(membership.workers.map((w) => w.id), ["b"]);
  membership.close();
  await bus.close();
});
