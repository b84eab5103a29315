import assert from "node:assert/strict";
import { clusterSubjects, encodeProbeReply, InProcessBus } from "../bus/mod.ts";
import type { Hello } from "../bus/mod.ts";
import { settled } from "../tests/fakes/cluster.ts";
import { Telemetry } from "./telemetry.ts";

function hello(id: string, epoch: number, ...busyMs: number[]): Hello {
  return {
    type: "hello",
    id,
    state: "ready",
    session: "a-0",
    epoch,
    versions: { abi: 1, wire: 1, lutra: "0" },
    capabilities: { isa: "fake", cores: 1, memoryBytes: 1, bandwidthGBps: null, speed: null },
    work: {
      ...{ queued: 0, runningMs: null, expectedMs: null },
      stages: busyMs.map((ms, stage) => ({ stage, stepMs: null, busyMs: ms })),
    },
  };
}

Deno.test("Telemetry: bubbles are the share of the pipeline's time in which a device did nothing, in this epoch, of late", () => {
  const bus = new InProcessBus();
  const telemetry = new Telemetry(bus, "local", 0);
  const bubble = () => telemetry.of("a").bubble;
  assert.deepEqual(telemetry.of("a"), { rttMs: null, bubble: null });
  telemetry.take(hello("a", 3, 100, 20), { epoch: 3, activeMs: 1000 });
  assert.equal(bubble(), null, "one sample is no span");
  telemetry.take(hello("a", 3, 110, 20), { epoch: 3, activeMs: 1050 });
  assert.equal(bubble(), null, "50 ms are too few");
  telemetry.take(hello("a", 3, 250, 70), { epoch: 3, activeMs: 1400 });
  assert.equal(bubble(), 0.5); // 200 of 400 ms
  for (let i = 0; i < 5; i++) telemetry.take(hello("a", 3, 250, 70), { epoch: 3, activeMs: 1400 });
  assert.equal(bubble(), 0.5, "without work it stays");
  for (let t = 1; t <= 30; t++) {
    telemetry.take(hello("a", 3, 250 + 900 * t, 70), { epoch: 3, activeMs: 1400 + 1000 * t });
  }
  assert(Math.abs(bubble()! - 0.1) < 1e-9, `${bubble()}: the last ten seconds alone count`);
  telemetry.take(hello("a", 2, 0), { epoch: 3, activeMs: 50_000 });
  assert(Math.abs(bubble()! - 0.1) < 1e-9, "a worker that is behind says nothing");
  telemetry.take(hello("a", 4, 0), { epoch: 4, activeMs: 0 });
  assert.equal(bubble(), null, "another epoch counts anew");
  telemetry.take(hello("a", 4, 260), { epoch: 4, activeMs: 200 });
  assert.equal(bubble(), 0, "a late heartbeat gives no negative share");
  telemetry.forget("a");
  assert.equal(bubble(), null);
  telemetry.close();
});

Deno.test("Telemetry: pings tell the way to a worker and back; silence and nonsense tell nothing", async () => {
  const bus = new InProcessBus();
  const { probe } = clusterSubjects("local");
  bus.subscribe(probe("a"), (message) => void setTimeout(() => message.respond(encodeProbeReply(1, message.data)), 30));
  bus.subscribe(probe("b"), (message) => message.respond(new Uint8Array(3)));
  const telemetry = new Telemetry(bus, "local", 5);
  for (const id of ["a", "b", "c"]) telemetry.take(hello(id, 0), undefined);
  await settled(() => telemetry.of("a").rttMs !== null);
  assert(telemetry.of("a").rttMs! >= 29, `${telemetry.of("a").rttMs} ms`);
  assert.equal(telemetry.of("b").rttMs, null);
  await settled(() => telemetry.shortest("a") !== null); // of three pings
  assert(telemetry.shortest("a")! >= 29 && telemetry.shortest("a")! <= telemetry.of("a").rttMs!);
  assert.equal(telemetry.of("c").rttMs, null);
  telemetry.close();
  await new Promise((resolve) => setTimeout(resolve, 50)); // for the answers that are on their way
  await bus.close();
});
