/**
 * What every transport of the bus must do, as tests: `in_process_test.ts` and `nats_test.ts` run them on theirs.
 *
 * @module
 */
import assert from "node:assert/strict";
import {
  BusClosedError,
  NoRespondersError,
  PayloadTooLargeError,
  RequestTimeoutError,
  SubjectError,
} from "../bus/mod.ts";
import type { Bus } from "../bus/mod.ts";

/** A transport under test. */
export interface TestBus extends Bus {
  /** Live subscriptions. */
  readonly subscriptions: number;
}

/** How the tests get one. */
export interface BusFactory {
  /** A fresh bus, apart from all others. */
  open(options: { onError?: (error: unknown, subject: string) => void }): Promise<TestBus>;
  ignore?: boolean;
}

const bytes = (...values: number[]) => new Uint8Array(values);

/** Declares the tests for a transport. */
export function busConformance(name: string, factory: BusFactory): void {
  const test = (what: string, fn: (bus: TestBus, errors: string[]) => Promise<void>) =>
    Deno.test({
      name: `${name}: ${what}`,
      ignore: factory.ignore ?? false,
      async fn() {
        const errors: string[] = [];
        const bus = await factory.open({
          onError: (error, subject) => errors.push(`${subject}: ${(error as Error).message}`),
        });
        try {
          await fn(bus, errors);
        } finally {
          await bus.close();
        }
      },
    });

  test("delivery is asynchronous, in order, and of copies", async (bus) => {
    const exact: string[] = [];
    const wild: string[] = [];
    bus.subscribe("a", (m) => {
      exact.push(`${m.data[0]}`);
      m.data[0] = 99;
    });
    bus.subscribe("*", (m) => wild.push(`${m.subject} ${m.data[0]}`));
    const data = bytes(1);
    bus.publish("a", data);
    data[0] = 2;
    bus.publish("b", data);
    data[0] = 3;
    bus.publish("a", data);
    data[0] = 4;
    assert.deepEqual([...exact, ...wild], []);
    await bus.flush();
    assert.deepEqual(exact, ["1", "3"]);
    assert.deepEqual(wild, ["a 1", "b 2", "a 3"]);
  });

  test("a thousand messages of one publisher arrive whole and in order", async (bus) => {
    const sizes = Array.from({ length: 1000 }, (_, i) => (i * 7919) % 5000);
    const seen: number[] = [];
    bus.subscribe("x.>", ({ data }) => {
      assert(data.every((value) => value === data.length % 251));
      seen.push(data.length);
    });
    for (const size of sizes) bus.publish(`x.${size % 3}.y`, new Uint8Array(size).fill(size % 251));
    await bus.flush();
    assert.deepEqual(seen, sizes);
  });

  test("a message of the largest size arrives", async (bus) => {
    let seen: Uint8Array | undefined;
    bus.subscribe("large", (m) => seen = m.data);
    const data = new Uint8Array(bus.maxPayload).map((_, i) => i * 31);
    bus.publish("large", data);
    await bus.flush();
    assert.deepEqual(seen, data);
  });

  test("patterns match as they say", async (bus) => {
    const seen: string[] = [];
    for (const pattern of ["a.b", "a.*", "a.>", "*.b.>"]) {
      bus.subscribe(pattern, ({ subject }) => seen.push(`${pattern} ${subject}`));
    }
    for (const subject of ["a", "a.b", "a.c", "a.b.c", "b.b.c.d"]) bus.publish(subject, bytes());
    await bus.flush();
    assert.deepEqual(
      seen.sort(),
      ["a.b a.b", "a.* a.b", "a.* a.c", "a.> a.b", "a.> a.c", "a.> a.b.c", "*.b.> a.b.c", "*.b.> b.b.c.d"].sort(),
    );
  });

  test("what handlers throw is reported and breaks nothing", async (bus, errors) => {
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
    bus.publish("a", bytes());
    await bus.flush();
    await bus.flush();
    assert.equal(delivered, 2);
    assert.deepEqual(errors.sort(), ["a: async", "a: async", "a: sync", "a: sync"]);
  });

  test("a publishing handler does not starve timers", async (bus) => {
    bus.subscribe("a", () => bus.publish("a", bytes()));
    bus.publish("a", bytes());
    await new Promise((resolve) => setTimeout(resolve, 5));
  });

  test("an ended subscription gets nothing more, not even what was published before", async (bus) => {
    let delivered = 0;
    const subscription = bus.subscribe("a", () => delivered++);
    bus.publish("a", bytes());
    subscription.unsubscribe();
    subscription.unsubscribe();
    await bus.flush();
    assert.equal(delivered, 0);
    assert.equal(bus.subscriptions, 0);
  });

  test("request gets the answer, and leaves no subscription", async (bus) => {
    const service = bus.subscribe("double", (m) => m.respond(bytes(m.data[0]! * 2)));
    const answers = await Promise.all([1, 2, 3].map((n) => bus.request("double", bytes(n))));
    assert.deepEqual(answers.map((m) => m.data[0]), [2, 4, 6]);
    assert.equal(bus.subscriptions, 1);
    service.unsubscribe();
    await assert.rejects(bus.request("double", bytes(1)), NoRespondersError);
    assert.equal(bus.subscriptions, 0);
  });

  test("a reply subject travels, and respond without one does nothing", async (bus) => {
    const seen: (string | undefined)[] = [];
    bus.subscribe("ask", (m) => {
      seen.push(m.reply);
      m.respond(bytes(7));
    });
    const answers: number[] = [];
    bus.subscribe("answers", (m) => answers.push(m.data[0]!));
    bus.publish("ask", bytes(), { reply: "answers" });
    bus.publish("ask", bytes());
    await bus.flush();
    await bus.flush();
    assert.deepEqual(seen, ["answers", undefined]);
    assert.deepEqual(answers, [7]);
  });

  test("request times out, aborts and ends with the bus", async (bus) => {
    bus.subscribe("mute", () => {});
    await assert.rejects(bus.request("mute", bytes(), { timeoutMs: 1 }), RequestTimeoutError);
    const controller = new AbortController();
    const aborted = bus.request("mute", bytes(), { signal: controller.signal });
    controller.abort(new Error("left"));
    await assert.rejects(aborted, /left/);
    await assert.rejects(bus.request("mute", bytes(), { signal: controller.signal }), /left/);
    assert.equal(bus.subscriptions, 1);
    const closed = bus.request("mute", bytes());
    const rejected = assert.rejects(closed, BusClosedError);
    await bus.close();
    await rejected;
  });

  test("too large, malformed and late messages are refused", async (bus) => {
    bus.publish("a", new Uint8Array(bus.maxPayload));
    const large = new Uint8Array(bus.maxPayload + 1);
    assert.throws(() => bus.publish("a", large), PayloadTooLargeError);
    for (const subject of ["a.*", "a.>", "a b", "", ".a"]) {
      assert.throws(() => bus.publish(subject, bytes()), SubjectError, subject);
    }
    assert.throws(() => bus.subscribe("a..b", () => {}), SubjectError);
    assert.throws(() => bus.publish("a", bytes(), { reply: "b c" }), SubjectError);
    await assert.rejects(bus.request("a", large), PayloadTooLargeError);
    assert.equal(bus.subscriptions, 0);
    assert.equal(bus.state, "connected");
    await bus.close();
    await bus.close();
    await bus.flush();
    assert.equal(bus.state, "disconnected");
    assert.throws(() => bus.publish("a", bytes()), BusClosedError);
    assert.throws(() => bus.subscribe("a", () => {}), BusClosedError);
    assert.throws(() => bus.watch(() => {}), BusClosedError);
    await assert.rejects(bus.request("a", bytes()), BusClosedError);
  });

  test("close drops what is undelivered", async (bus) => {
    let delivered = 0;
    bus.subscribe("a", () => delivered++);
    bus.publish("a", bytes());
    const flushed = bus.flush();
    await bus.close();
    await flushed;
    assert.equal(delivered, 0);
    assert.equal(bus.subscriptions, 0);
  });
}
