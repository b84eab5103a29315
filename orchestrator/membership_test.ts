import assert from "node:assert/strict";
import {
  ABI_VERSION,
  clusterSubjects,
  controlRequestSchema,
  decodeJson,
  encodeJson,
  InProcessBus,
  WIRE_VERSION,
} from "../bus/mod.ts";
import type { BusState, Hello, Subscription } from "../bus/mod.ts";
import { Membership } from "./membership.ts";

const { hello: subject, discover } = clusterSubjects("local");

function hello(id: string, change: Partial<Hello> = {}): Uint8Array {
  return encodeJson({
    type: "hello",
    id,
    state: "ready",
    session: "a-0",
    epoch: 0,
    versions: { abi: ABI_VERSION, wire: WIRE_VERSION, lutra: "0.1.0" },
    capabilities: { isa: "fake", cores: 1, memoryBytes: 1, bandwidthGBps: null, speed: null },
    work: { queued: 0, runningMs: null, expectedMs: null, stages: [] },
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
  bus.publish(subject, hello("old", { versions: { abi: 9, wire: 1, lutra: "9.0.0" } }));
  bus.publish(subject, Uint8Array.of(1));
  await assert.rejects(membership.waitFor(1, { timeoutMs: 5 }), {
    name: "ClusterError",
    message:
      `0 of 1 workers are there after 0.005 s; refused: old has wire version 1 and ABI version 9, not ${WIRE_VERSION} and ${ABI_VERSION}`,
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

/** A bus whose connection can be taken away. */
class FrailBus extends InProcessBus {
  now: BusState = "connected";
  readonly #watchers = new Set<(state: BusState) => void>();
  override get state(): BusState {
    return this.now;
  }
  override watch(handler?: (state: BusState) => void): Subscription {
    if (handler !== undefined) this.#watchers.add(handler);
    return { unsubscribe: () => void this.#watchers.delete(handler!) };
  }
  set(state: BusState): void {
    this.now = state;
    for (const watcher of this.#watchers) watcher(state);
  }
}

const pause = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));

Deno.test("Membership: a silent worker is lost, one that beats is not, and nobody is while the bus is away", async () => {
  const bus = new FrailBus();
  const left: string[] = [];
  const membership = new Membership(bus, "local", {
    lostMs: 200,
    onLeave: (id, reason) => left.push(`${id}: ${reason}`),
  });
  bus.publish(subject, hello("mute"));
  bus.publish(subject, hello("alive"));
  await bus.flush();
  const beat = setInterval(() => bus.publish(subject, hello("alive")), 20);
  while (left.length === 0) await pause(5);
  assert.deepEqual(left, ["mute: worker mute is silent for 0.2 s"]);
  assert.deepEqual(membership.workers.map((w) => w.id), ["alive"]);
  clearInterval(beat);
  bus.set("disconnected");
  await pause(450);
  assert.equal(left.length, 1, "nobody was to be heard");
  let asked = 0;
  const spy = bus.subscribe(discover, () => asked++);
  bus.set("connected");
  await bus.flush();
  assert.equal(asked, 1);
  while (left.length === 1) await pause(5);
  assert.match(left[1]!, /alive is silent/);
  spy.unsubscribe();
  membership.close();
  assert.equal(bus.subscriptions, 0);
  await bus.close();
});

Deno.test("Membership: a process that was held up does not take its own delay for others' silence", async () => {
  const bus = new InProcessBus();
  const left: string[] = [];
  const membership = new Membership(bus, "local", { lostMs: 200, onLeave: (id) => left.push(id) });
  bus.publish(subject, hello("a"));
  await bus.flush();
  const until = performance.now() + 500;
  while (performance.now() < until); // the event loop stands still
  await pause(0); // the overdue tick runs
  bus.publish(subject, hello("a"));
  await bus.flush();
  assert.deepEqual(left, []);
  membership.close();
  await bus.close();
});

Deno.test("Membership: a new session means that what was held is gone; two of one name are refused, and told so", async () => {
  const bus = new InProcessBus();
  const left: string[] = [];
  const told: string[] = [];
  const control = bus.subscribe(clusterSubjects("local").control("a"), (message) => {
    const request = decodeJson(controlRequestSchema, message.data);
    if (request.type === "refuse") told.push(request.reason);
  });
  const membership = new Membership(bus, "local", { onLeave: (id, reason) => left.push(`${id}: ${reason}`) });
  bus.publish(subject, hello("a", { session: "one-0" }));
  bus.publish(subject, hello("a", { session: "one-0", epoch: 4 }));
  await bus.flush();
  assert.deepEqual(left, []);
  bus.publish(subject, hello("a", { session: "two-0" }));
  await bus.flush();
  assert.deepEqual(left, ["a: worker a began anew"]);
  // What an earlier connection of the same process delivers late is of no account.
  bus.publish(subject, hello("a", { session: "two-10" }));
  for (const late of [0, 9]) bus.publish(subject, hello("a", { session: `two-${late}`, state: "draining" }));
  await bus.flush();
  assert.deepEqual(left.splice(1), ["a: worker a began anew"]);
  assert.deepEqual(membership.workers.map(({ session, state }) => [session, state]), [["two-10", "ready"]]);
  assert.equal(membership.newestEpoch, 4, "what it saw before counts still");
  // Without heartbeats nothing comes late.
  bus.publish(subject, hello("a", { session: "two-11" }));
  bus.publish(subject, hello("a", { session: "three-0" }));
  bus.publish(subject, hello("a", { session: "two-11" }));
  await bus.flush();
  await bus.flush();
  assert.deepEqual(membership.workers, []);
  assert.deepEqual(told, ["two workers call themselves a: give one another name with --id"]);
  control.unsubscribe();
  membership.close();
  await bus.close();
});

Deno.test("Membership: what a killed process has left in sockets does not drive out the one that follows it, but one that lives beside it does", async () => {
  const bus = new InProcessBus();
  const told: string[] = [];
  const membership = new Membership(bus, "local", { lostMs: 200, onRefuse: (_, reason) => told.push(reason) });
  const sessions = () => membership.workers.map(({ session }) => session);
  const say = async (...sessions: string[]) => {
    for (const session of sessions) bus.publish(subject, hello("a", { session }));
    await bus.flush();
  };
  await say("one-0");
  while (membership.workers.length > 0) await pause(5); // its link is down
  // Killed and started again, it is heard of before and among what was on its way, and once more after another restart.
  await say("two-0", "one-0", "one-0", "two-0", "one-1");
  bus.publish(subject, hello("a", { session: "one-1", state: "leaving" }));
  await say("three-0", "two-0", "one-0");
  assert.deepEqual(sessions(), ["three-0"]);
  for (let i = 0; i < 15; i++, await pause(20)) await say("three-0");
  await say("two-0", "three-0");
  assert.deepEqual([sessions(), told], [["three-0"], []], "long after is late as well");
  for (const until = performance.now() + 2000; told.length === 0; await pause(20)) {
    assert(performance.now() < until, "two of one name go unnoticed");
    await say("three-0", "two-0");
  }
  assert.match(told[0]!, /two workers call themselves a/);
  membership.close();
  await bus.close();
});

Deno.test("Membership: a worker of another wire version is refused by name, whatever else its announcement holds", async () => {
  const bus = new InProcessBus();
  const refused: string[] = [];
  const membership = new Membership(bus, "local", { onRefuse: (id, reason) => refused.push(`${id} | ${reason}`) });
  const malformed = { type: "hello", id: "other", versions: { abi: ABI_VERSION, wire: WIRE_VERSION } };
  bus.publish(subject, new TextEncoder().encode(JSON.stringify(malformed)));
  await bus.flush();
  assert.match(refused.pop()!, /^other \| other announces what cannot be \(state: /);
  const foreign = { type: "hello", id: "new", versions: { abi: 9, wire: 7 }, news: [1] };
  for (let i = 0; i < 2; i++) bus.publish(subject, new TextEncoder().encode(JSON.stringify(foreign)));
  await bus.flush();
  assert.equal(refused.length, 1);
  assert.match(refused[0]!, /^new \| new has wire version 7 and ABI version 9, not \d+ and \d+$/);
  assert.deepEqual([...membership.refused.keys()], ["other", "new"]);
  membership.close();
  await bus.close();
});
