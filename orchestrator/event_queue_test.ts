import assert from "node:assert/strict";
import { EventQueue } from "./event_queue.ts";

Deno.test("EventQueue: gives events in order, before and after they are asked for, then ends", async () => {
  const queue = new EventQueue<number>(() => {});
  queue.push(1);
  const early = [queue.next(), queue.next(), queue.next(), queue.next()];
  queue.push(2);
  queue.push(3);
  queue.end();
  queue.push(4);
  queue.fail(new Error("late"));
  assert.deepEqual((await Promise.all(early)).map((result) => result.value), [1, 2, 3, undefined]);
  assert.equal((await queue.next()).done, true);
});

Deno.test("EventQueue: a failure drops what is kept, comes once, and then it is over", async () => {
  for (const waiting of [false, true]) {
    const queue = new EventQueue<number>(() => {});
    const early = waiting ? [queue.next(), queue.next()] : [];
    if (!waiting) queue.push(1);
    queue.fail(new Error("broken"));
    queue.fail(new Error("again"));
    await assert.rejects(early[0] ?? queue.next(), /broken/);
    assert.equal((await (early[1] ?? queue.next())).done, true);
    assert.equal((await queue.next()).done, true);
  }
});

Deno.test("EventQueue: leaving the loop, throwing in it and disposing call onReturn and end every wait", async () => {
  let left = 0;
  const queue = () => {
    const fresh = new EventQueue<number>(() => left++);
    fresh.push(1);
    fresh.push(2);
    return fresh;
  };
  for await (const _ of queue()) break;
  await assert.rejects(async () => {
    for await (const _ of queue()) throw new Error("consumer");
  }, /consumer/);
  {
    await using disposed = queue();
    await disposed.next();
  }
  await assert.rejects(queue().throw(new Error("thrown")), /thrown/);
  assert.equal(left, 4);
  const waits = new EventQueue<number>(() => {});
  const next = waits.next();
  await waits.return();
  assert.equal((await next).done, true);
  waits.push(1);
  assert.equal((await waits.next()).done, true);
});
