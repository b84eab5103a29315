import assert from "node:assert/strict";
import {
  BusClosedError,
  NoRespondersError,
  PayloadTooLargeError,
  RequestTimeoutError,
  SubjectError,
} from "./errors.ts";
import { InProcessBus } from "./in_process.ts";

const bytes = (...values: number[]) => new Uint8Array(values);

Deno.test("InProcessBus: delivery is asynchronous, ordered over all subscribers, and of copies", async () => {
  const bus = new InProcessBus();
  const seen: string[] = [];
  bus.subscribe("a", (m) => {
    seen.push(`first ${m.data[0]}`);
    m.data[0] = 99;
  });
  bus.subscribe("*", (m) => seen.push(`second ${m.subject} ${m.data[0]}`));
  const data = bytes(1);
  bus.publish("a", data);
  data[0] = 2;
  bus.publish("b", data);
  data[0] = 3;
  assert.deepEqual(seen, []);
  await bus.flush();
  assert.deepEqual(seen, ["first 1", "second a 1", "second b 2"]);
  await bus.close();
});

Deno.test("InProcessBus: what handlers throw is reported and breaks nothing", async () => {
  const errors: string[] = [];
  const bus = new InProcessBus({ onError: (error, subject) => errors.push(`${subject}: ${(error as Error).message}`) });
  let delivered = 0;
  bus.subscribe("a", () => {
    throw new Error("sync");
  });
  bus.subscribe("a", async () => {
    await Promise.resolve();
    throw new Error("async");
  });
  bus.subscribe("a", () => delivered++);
  bus.publish("a", bytes());
  await bus.flush();
  await Promise.resolve();
  assert.equal(delivered, 1);
  assert.deepEqual(errors, ["a: sync", "a: async"]);
  await bus.close();
});

Deno.test("InProcessBus: a publishing handler does not starve timers", async () => {
  const bus = new InProcessBus();
  bus.subscribe("a", () => bus.publish("a", bytes()));
  bus.publish("a", bytes());
  await new Promise((resolve) => setTimeout(resolve, 5));
  await bus.close();
});

Deno.test("InProcessBus: an ended subscription gets nothing more, not even what was queued", async () => {
  const bus = new InProcessBus();
  let delivered = 0;
  const subscription = bus.subscribe("a", () => delivered++);
  bus.publish("a", bytes());
  subscription.unsubscribe();
  subscription.unsubscribe();
  await bus.flush();
  assert.equal(delivered, 0);
  assert.equal(bus.subscriptions, 0);
  await bus.close();
});

Deno.test("InProcessBus: request gets the answer, and leaves no subscription", async () => {
  const bus = new InProcessBus();
  const service = bus.subscribe("double", (m) => m.respond(bytes(m.data[0]! * 2)));
  const answers = await Promise.all([1, 2, 3].map((n) => bus.request("double", bytes(n))));
  assert.deepEqual(answers.map((m) => m.data[0]), [2, 4, 6]);
  assert.equal(bus.subscriptions, 1);
  service.unsubscribe();
  await assert.rejects(bus.request("double", bytes(1)), NoRespondersError);
  assert.equal(bus.subscriptions, 0);
  await bus.close();
});

Deno.test("InProcessBus: request times out, aborts and ends with the bus", async () => {
  const bus = new InProcessBus();
  bus.subscribe("mute", () => {});
  await assert.rejects(bus.request("mute", bytes(), { timeoutMs: 1 }), RequestTimeoutError);
  const controller = new AbortController();
  const aborted = bus.request("mute", bytes(), { signal: controller.signal });
  controller.abort(new Error("left"));
  await assert.rejects(aborted, /left/);
  await assert.rejects(bus.request("mute", bytes(), { signal: controller.signal }), /left/);
  assert.equal(bus.subscriptions, 1);
  const closed = bus.request("mute", bytes());
  await bus.close();
  await assert.rejects(closed, BusClosedError);
});

Deno.test("InProcessBus: too large, malformed and late messages are refused", async () => {
  const bus = new InProcessBus({ maxPayload: 4 });
  bus.publish("a", new Uint8Array(4));
  assert.throws(() => bus.publish("a", new Uint8Array(5)), PayloadTooLargeError);
  assert.throws(() => bus.publish("a.*", bytes()), SubjectError);
  assert.throws(() => bus.subscribe("a..b", () => {}), SubjectError);
  await assert.rejects(bus.request("a", new Uint8Array(5)), PayloadTooLargeError);
  assert.equal(bus.subscriptions, 0);
  await bus.close();
  await bus.close();
  await bus.flush();
  assert.throws(() => bus.publish("a", bytes()), BusClosedError);
  assert.throws(() => bus.subscribe("a", () => {}), BusClosedError);
  await assert.rejects(bus.request("a", bytes()), BusClosedError);
});

Deno.test("InProcessBus: close drops what is undelivered", async () => {
  const bus = new InProcessBus();
  let delivered = 0;
  bus.subscribe("a", () => delivered++);
  bus.publish("a", bytes());
  const flushed = bus.flush();
  await bus.close();
  await flushed;
  assert.equal(delivered, 0);
});
