import assert from "node:assert/strict";
import { busConformance } from "../tests/bus_conformance.ts";
import { PayloadTooLargeError } from "./errors.ts";
import { InProcessBus } from "./in_process.ts";

busConformance("InProcessBus", { open: (options) => Promise.resolve(new InProcessBus(options)) });

Deno.test("InProcessBus: delivery has one order over all subscribers", async () => {
  const bus = new InProcessBus();
  const seen: string[] = [];
  bus.subscribe("a", (m) => seen.push(`first ${m.data[0]}`));
  bus.subscribe("*", (m) => seen.push(`second ${m.subject} ${m.data[0]}`));
  bus.publish("a", Uint8Array.of(1));
  bus.publish("b", Uint8Array.of(2));
  await bus.flush();
  assert.deepEqual(seen, ["first 1", "second a 1", "second b 2"]);
  await bus.close();
});

Deno.test("InProcessBus: the largest message can be set", async () => {
  const bus = new InProcessBus({ maxPayload: 4 });
  bus.publish("a", new Uint8Array(4));
  assert.throws(() => bus.publish("a", new Uint8Array(5)), PayloadTooLargeError);
  await bus.close();
});
