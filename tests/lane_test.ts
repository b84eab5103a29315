/**
 * Lanes from end to end: engine, nats-server, workers and kernel library as they are, against the same without lanes.
 *
 * @module
 */
import assert from "node:assert/strict";
import { createConnection, createServer } from "node:net";
import type { AddressInfo, Socket } from "node:net";
import { NatsBus } from "../bus/mod.ts";
import type { NatsServer } from "../bus/mod.ts";
import { loadModel } from "../model/mod.ts";
import { Engine } from "../orchestrator/mod.ts";
import type { EngineOptions, GenerateRequest } from "../orchestrator/mod.ts";
import { loadKernels, Worker } from "../worker/mod.ts";
import type { KernelLibrary, LaneEvent, WorkerOptions } from "../worker/mod.ts";
import { fixture } from "./data.ts";
import { read, settled } from "./fakes/cluster.ts";
import { nats } from "./nats.ts";

// Never closed, hence opened before any test: it is no test's leak.
loadKernels();

/** The kernel library, with a count of how lanes' steps end. */
function watched(): { kernels: KernelLibrary; ended: Record<LaneEvent["type"] | "lost", number> } {
  const ended = { woken: 0, message: 0, done: 0, failed: 0, lost: 0 };
  const inner = loadKernels();
  const kernels: KernelLibrary = {
    abiVersion: inner.abiVersion,
    deviceInfo: () => inner.deviceInfo(),
    measureBandwidth: (...args) => inner.measureBandwidth(...args),
    async openShard(...args) {
      const shard = await inner.openShard(...args);
      const open = shard.openLane!;
      Object.defineProperty(shard, "openLane", {
        value: async (...args: Parameters<typeof open>) => {
          const lane = await open(...args);
          const step = lane.step.bind(lane);
          lane.step = async (armed) => {
            try {
              const event = await step(armed);
              ended[event.type]++;
              return event;
            } catch (error) {
              ended.lost++;
              throw error;
            }
          };
          return lane;
        },
      });
      return shard;
    },
  };
  return { kernels, ended };
}

/** Workers with a connection each, and an engine over all of them. */
async function start(
  shards: number,
  options: Partial<EngineOptions> = {},
  worker: Partial<WorkerOptions> & { reach?: (bus: NatsBus, server: NatsServer) => unknown } = {},
) {
  const server = await nats.start();
  const { kernels, ended } = watched();
  const { reach, ...workerOptions } = worker;
  const connect = () => NatsBus.connect({ servers: server.url, name: "test", onError: () => {} });
  const log: string[] = [];
  const buses: NatsBus[] = [];
  const workers: Worker[] = [];
  for (let i = 0; i < shards; i++) {
    const bus = await connect();
    await reach?.(bus, server);
    buses.push(bus);
    const common = { threads: 1, memoryBytes: 1e9, heartbeatMs: 50, log: (text: string) => log.push(text) };
    workers.push(await Worker.start({ bus, kernels, id: `w${i}`, ...common, ...workerOptions }));
  }
  const bus = await connect();
  const model = await loadModel(fixture("llama-tiny-f32.gguf"));
  const engine = await Engine.start({ bus, model, shards, workers: shards, kvType: "f32", ...options });
  return {
    server,
    engine,
    workers,
    ended,
    log,
    /** Closes all, and checks that no sequence stays on a worker but those kept. */
    async end() {
      const held = async () => (await engine.query()).reduce((sum, { stats }) => sum + stats.sequences, 0);
      let left = Infinity;
      for (let i = 0; i < 200 && left > engine.stats().kept * shards; i++) {
        left = await held();
        await new Promise((resolve) => setTimeout(resolve, 5));
      }
      assert.equal(left, engine.stats().kept * shards, "sequences stay on the workers");
      await engine.close();
      for (const worker of workers) await worker.close();
      for (const bus of buses) {
        assert.equal(bus.subscriptions, 0);
        await bus.close();
      }
      await bus.close();
      await server.stop();
    },
  };
}

/** Requests of every kind, as many tokens as a chain has and more. */
function requests(vocab: number): GenerateRequest[] {
  return Array.from({ length: 12 }, (_, n) => ({
    promptTokens: Array.from({ length: 1 + (n * 13) % 40 }, (_, i) => (i * 7 + n) % vocab),
    maxTokens: 1 + (n * 11) % 40,
    sampling: n % 3 === 0
      ? { temperature: 0 }
      : { seed: BigInt(n), temperature: 1.1, repeatPenalty: 1.1, presencePenalty: 0.2, logitBias: new Map([[n, 2]]) },
    ...(n % 4 === 1 ? { topLogprobs: n % 8 } : {}),
    ignoreEos: true,
  }));
}

function test(name: string, fn: () => Promise<void>): void {
  Deno.test({ name: `lanes: ${name}`, ignore: nats.absent, fn });
}

/** Answers as they are without lanes. */
let expected: Promise<number[][]> | undefined;
function withoutLanes(): Promise<number[][]> {
  return expected ??= (async () => {
    const t = await start(1, {}, { lane: false });
    const answers: number[][] = [];
    for (const request of requests(t.engine.model.description.hyper.vocab)) {
      answers.push((await read(t.engine.generate(request))).ids);
    }
    assert.deepEqual(t.ended, { woken: 0, message: 0, done: 0, failed: 0, lost: 0 });
    await t.end();
    return answers;
  })();
}

for (const shards of [1, 2, 3]) {
  test(`the same tokens on ${shards} stages, one after the other and all at once, most of them foreseen`, async () => {
    const answers = await withoutLanes();
    const t = await start(shards);
    const all = requests(t.engine.model.description.hyper.vocab);
    for (const [i, request] of all.entries()) {
      const { ids } = await read(t.engine.generate(request));
      assert.deepEqual(ids, answers[i], `request ${i} alone`);
    }
    const tokens = all.reduce((sum, { maxTokens }) => sum + maxTokens!, 0);
    const { done, message } = t.ended;
    // What a prompt brings is not foreseen, nor what comes after an answer.
    assert(done > 0.8 * shards * (tokens - all.length), `${done} foreseen, ${message} not, of ${tokens} tokens`);
    await Promise.all(all.map(async (request, i) => {
      assert.deepEqual((await read(t.engine.generate(request))).ids, answers[i], `request ${i} in company`);
    }));
    assert.deepEqual(t.log, []);
    assert.equal(t.ended.lost, 0);
    await t.end();
  });
}

test("answers that are given up leave nothing behind, and disturb nobody", async () => {
  const answers = await withoutLanes();
  const t = await start(2);
  const all = requests(t.engine.model.description.hyper.vocab);
  await Promise.all(all.map(async (request, i) => {
    if (i % 3 !== 1) return assert.deepEqual((await read(t.engine.generate(request))).ids, answers[i]);
    const answer = t.engine.generate({ ...request, maxTokens: 500 });
    for (let token = 0; token < i; token++) await answer.next();
    await answer.return!();
  }));
  // One alone, in the midst of a chain.
  for (let i = 0; i < 10; i++) {
    const answer = t.engine.generate({ ...all[0]!, maxTokens: 500 });
    for (let token = 0; token < 3 + i; token++) await answer.next();
    await answer.return!();
  }
  assert.deepEqual((await read(t.engine.generate(all[3]!))).ids, answers[3]);
  assert.deepEqual(t.log, []);
  await t.end();
});

test("what is sent after a release finds its memory free: a short KV cache", async () => {
  const answers = await withoutLanes();
  const t = await start(2, { context: 96, kvTokens: 192, maxBatch: 48 });
  const all = requests(t.engine.model.description.hyper.vocab);
  for (let round = 0; round < 5; round++) {
    await Promise.all(all.map(async (request, i) => {
      assert.deepEqual((await read(t.engine.generate(request))).ids, answers[i], `request ${i}`);
    }));
  }
  assert(t.engine.stats().preemptions > 0, "the cache was long enough");
  assert.deepEqual(t.log, []);
  await t.end();
});

test("workers answer how they are while a lane waits and while it computes", async () => {
  const t = await start(2);
  const idle = await t.engine.query();
  const [, many] = await Promise.all([
    read(t.engine.generate({ promptTokens: [1, 2], maxTokens: 60, ignoreEos: true })),
    (async () => {
      for (let i = 0; i < 40; i++) await t.engine.query();
      return await t.engine.query();
    })(),
  ]);
  assert(many.every(({ steps }, i) => steps > idle[i]!.steps));
  const after = await t.engine.query();
  for (const { recentMs, busyMs, steps, tokens } of after) {
    assert(recentMs.length === 32 && recentMs.every((ms) => ms > 0 && ms < busyMs), `${recentMs}`);
    assert(steps >= 60 && tokens >= 61);
  }
  await t.end();
});

/** A way to the server that can be cut. */
interface Bridge {
  readonly port: number;
  cut(): void;
  /** Sockets on both sides. */
  connections(): number;
  close(): void;
}

async function bridge(port: number): Promise<Bridge> {
  const sockets = new Set<Socket>();
  const listener = createServer((from) => {
    const to = createConnection(port, "127.0.0.1");
    for (const [socket, other] of [[from, to], [to, from]] as const) {
      sockets.add(socket);
      socket.on("error", () => {});
      socket.on("close", () => {
        sockets.delete(socket);
        other.destroy();
      });
    }
    from.pipe(to).pipe(from);
  });
  await new Promise<void>((resolve) => listener.listen(0, "127.0.0.1", resolve));
  return {
    port: (listener.address() as AddressInfo).port,
    cut: () => sockets.forEach((socket) => socket.destroy()),
    connections: () => sockets.size,
    close: () => listener.close(),
  };
}

test("one that is cut in the midst of answers costs no token, and the worker goes on without", async () => {
  const answers = await withoutLanes();
  let way: Bridge | undefined;
  const t = await start(2, { log: () => {} }, {
    reach: async (bus, server) => {
      way ??= await bridge(server.port);
      const { port } = way;
      const endpoint = bus.nativeEndpoint.bind(bus);
      bus.nativeEndpoint = () => ({ ...endpoint()!, port });
    },
  });
  assert.equal(way!.connections(), 4);
  let cut = false;
  await Promise.all(
    requests(t.engine.model.description.hyper.vocab).map(async (request, i) => {
      const ids: number[] = [];
      for await (const event of t.engine.generate(request)) {
        if (event.type !== "token") continue;
        ids.push(event.id);
        if (cut || ids.length < 12) continue;
        cut = true;
        way!.cut();
      }
      assert.deepEqual(ids, answers[i], `request ${i}`);
    }),
  );
  assert(cut && t.ended.done > 0 && t.ended.lost > 0, JSON.stringify(t.ended));
  assert(t.log.some((line) => /lost its lane, and goes on without one/.test(line)), t.log.join("\n"));
  await settled(() => way!.connections() === 0);
  way!.close();
  await t.end();
});

test("where there is none to be had, the worker says why and goes without", async () => {
  const answers = await withoutLanes();
  const free = await bridge(1);
  free.close();
  for (
    const [change, reason] of [
      [{ port: free.port }, /Connection refused/],
      [{ hello: () => "SUB\r\nPING\r\n" }, /the server refuses/],
    ] as const
  ) {
    const t = await start(2, {}, {
      reach: (bus) => {
        const endpoint = bus.nativeEndpoint.bind(bus);
        bus.nativeEndpoint = () => ({ ...endpoint()!, ...change });
      },
    });
    const request = requests(t.engine.model.description.hyper.vocab)[2]!;
    assert.deepEqual((await read(t.engine.generate(request))).ids, answers[2]);
    assert.equal(t.ended.done, 0);
    assert.equal(t.log.length, 2, t.log.join("\n"));
    for (const line of t.log) {
      assert.match(line, /has no lane, which makes hops longer/);
      assert.match(line, reason);
    }
    await t.end();
  }
});
