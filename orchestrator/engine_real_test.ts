/**
 * The engine with the real kernel library and real model files: what the fakes promise holds with them.
 *
 * @module
 */
import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { InProcessBus } from "../bus/mod.ts";
import { loadModel } from "../model/mod.ts";
import { fixture, shared } from "../tests/data.ts";
import { loadKernels, Worker } from "../worker/mod.ts";
import { Engine } from "./engine.ts";
import type { EngineOptions } from "./engine.ts";
import { read, settled } from "../tests/fakes/cluster.ts";

// Never closed, hence opened before any test: it is no test's leak.
loadKernels();

/** An engine on `shards` workers with a thread each. */
async function start(path: string, options: Partial<EngineOptions> & { threads?: number; isa?: string } = {}) {
  const { threads = 1, isa, ...engineOptions } = options;
  const bus = new InProcessBus();
  const model = await loadModel(path);
  const workers: Worker[] = [];
  for (let i = 0; i < (options.shards ?? 1); i++) {
    workers.push(
      await Worker.start({
        bus,
        kernels: loadKernels(),
        id: `w${i}`,
        threads,
        memoryBytes: 1e9,
        ...(isa === undefined ? {} : { isa }),
      }),
    );
  }
  const engine = await Engine.start({ bus, model, workers: workers.length, kvType: "f32", ...engineOptions });
  return {
    bus,
    model,
    engine,
    /** Closes all and checks that no shard holds a sequence but those kept, and no subscription stays. */
    async end() {
      const { kept, kvBlocksKept } = engine.stats();
      let held = Infinity;
      for (let i = 0; i < 200 && held > 0; i++) {
        await new Promise((resolve) => setTimeout(resolve, 5));
        held = (await engine.query()).reduce((sum, { stats }) => {
          return sum + stats.sequences - kept + stats.kvBlocksTotal - stats.kvBlocksFree - kvBlocksKept;
        }, 0);
      }
      assert.equal(held, 0, "more sequences or blocks stay on the workers than are kept");
      assert.equal(engine.stats().kvBlocksUsed, 0);
      await engine.close();
      for (const worker of workers) await worker.close();
      assert.equal(bus.subscriptions, 0);
      await bus.close();
    },
  };
}

const greedy = { temperature: 0 } as const;

for (const shards of [1, 2, 5]) {
  Deno.test({
    name: `Engine: stories260K gives llama.cpp's greedy tokens on ${shards} shards`,
    ignore: shared.absent,
    async fn() {
      const golden = JSON.parse(Deno.readTextFileSync(shared.path("golden/stories260K-f32.llamacpp.json")));
      const t = await start(shared.path("models/stories260K-f32.gguf"), { shards });
      const promptTokens: number[] = golden.prompt_ids;
      const expected: number[] = golden.greedy_ids.slice(promptTokens.length);
      const { ids, text } = await read(
        t.engine.generate({ promptTokens, maxTokens: expected.length, sampling: greedy, ignoreEos: true }),
      );
      assert.deepEqual(ids, expected);
      assert.equal((golden.prompt + text).trim(), golden.text.trim());
      await t.end();
    },
  });
}

const models = ["llama-tiny-f32", "llama-tiny-f16", "llama-q-Q4_0", "llama-q-Q8_0", "llama-q-TQ1_0", "llama-q-TQ2_0"];

Deno.test("Engine.logits: the same bits in every split, chunking, company, thread count and instruction set", async () => {
  const { available } = loadKernels().deviceInfo();
  for (const name of models) {
    let expected: Float32Array | undefined;
    let layers = 0;
    for (
      const options of [
        {},
        { threads: 2 },
        { shards: 2 },
        { shards: Infinity },
        { maxBatch: 5 },
        ...available.map((isa) => ({ isa })),
      ]
    ) {
      const shards = "shards" in options ? Math.min(options.shards!, layers) : 1;
      const t = await start(fixture(`${name}.gguf`), { ...options, shards, kvTokens: 512 });
      layers = t.model.description.hyper.layers;
      const { vocab } = t.model.description.hyper;
      const tokens = Array.from({ length: 70 }, (_, i) => (i * 37 + 11) % vocab);
      const company = t.engine.generate({ promptTokens: tokens.slice(0, 9), sampling: greedy, ignoreEos: true });
      await company.next();
      for (const chunk of [64, 1, 7]) {
        const logits = await t.engine.logits(tokens, { chunk });
        expected ??= logits;
        assert(logits.every((value) => Number.isFinite(value)));
        assert(
          Buffer.compare(Buffer.from(logits.buffer), Buffer.from(expected.buffer)) === 0,
          `${name} ${JSON.stringify(options)} in chunks of ${chunk}`,
        );
      }
      await company.return!();
      await t.end();
    }
  }
});

for (const shards of [1, 2, 5]) {
  Deno.test(`Engine: 32 concurrent requests on ${shards} shards, with cancels and a short KV cache, answer as alone`, async () => {
    const alone = await start(fixture("llama-tiny-f32.gguf"), {});
    const { vocab } = alone.model.description.hyper;
    const requests = Array.from({ length: 32 }, (_, n) => ({
      promptTokens: Array.from({ length: 1 + (n * 13) % 60 }, (_, i) => (i * 7 + n) % vocab),
      maxTokens: 10 + (n * 11) % 50,
      sampling: n % 2 ? greedy : { seed: BigInt(n), temperature: 1.2, repeatPenalty: 1.1, presencePenalty: 0.3 },
      ignoreEos: true,
    }));
    const expected: number[][] = [];
    for (const request of requests) expected.push((await read(alone.engine.generate(request))).ids);
    await alone.end();

    const t = await start(fixture("llama-tiny-f32.gguf"), {
      shards,
      context: 128,
      kvTokens: 384,
      maxBatch: 48,
      maxRunning: 16,
    });
    await Promise.all(requests.map(async (request, n) => {
      const events = t.engine.generate(request);
      if (n % 4 > 0) return assert.deepEqual((await read(events)).ids, expected[n], `request ${n}`);
      const ids: number[] = [];
      for await (const event of events) {
        if (event.type === "token") ids.push(event.id);
        if (ids.length > n) break;
      }
      assert.deepEqual(ids, expected[n]!.slice(0, ids.length));
    }));
    assert(t.engine.stats().preemptions > 0, "the KV cache was never short");
    await settled(() => t.engine.stats().running === 0);
    await t.end();
  });
}

for (const shards of [1, 3]) {
  Deno.test(`Engine: what begins as an answer before goes on from its keys and values on ${shards} shards, to the same tokens`, async () => {
    const t = await start(fixture("llama-tiny-f32.gguf"), { shards, context: 256 });
    const fresh = await start(fixture("llama-tiny-f32.gguf"), { context: 256, maxKept: 0 });
    const { vocab } = t.model.description.hyper;
    const sampling = { temperature: 1, seed: 3n, repeatPenalty: 1.1 };
    const prompt = Array.from({ length: 50 }, (_, i) => (i * 7) % vocab);
    const say = async (promptTokens: number[]) => {
      const request = { promptTokens, maxTokens: 30, sampling, ignoreEos: true };
      const { ids } = await read(t.engine.generate(request));
      assert.deepEqual(ids, (await read(fresh.engine.generate(request))).ids);
      return ids;
    };
    const first = await say(prompt);
    assert.equal(t.engine.stats().reusedTokens, 0);
    const turn = [...prompt, ...first, 9, 8, 7];
    await say(turn); // the next turn: all but the last sampled token is there
    assert.equal(t.engine.stats().reusedTokens, 79);
    await say(turn); // the same again: its last token is computed anew
    assert.equal(t.engine.stats().reusedTokens, 79 + 82);
    await say([...turn.slice(0, 70), 1, 2, 3]); // parts in the midst of a block
    assert.equal(t.engine.stats().reusedTokens, 79 + 82 + 70);
    await say([...turn.slice(0, 20), 4]); // too little in common
    assert.equal(t.engine.stats().reusedTokens, 79 + 82 + 70);
    assert.equal(t.engine.stats().kept, 2);
    await t.end();
    await fresh.end();
  });
}

Deno.test("Engine: log-probabilities are those of the logits", async () => {
  const t = await start(fixture("llama-tiny-f32.gguf"));
  const { vocab } = t.model.description.hyper;
  const promptTokens = [3, 1, 4, 1, 5];
  const logits = (await t.engine.logits(promptTokens)).subarray(4 * vocab);
  const max = Math.max(...logits);
  const total = Math.log(logits.reduce((sum, value) => sum + Math.exp(value - max), 0)) + max;
  const order = [...logits.keys()].sort((a, b) => logits[b]! - logits[a]! || a - b);
  const events = t.engine.generate({
    promptTokens,
    maxTokens: 1,
    sampling: { temperature: 0.7, seed: 4n },
    topLogprobs: 5,
  });
  const { value } = await events.next();
  assert(value.type === "token");
  assert.deepEqual(value.top!.map((t: { id: number }) => t.id), order.slice(0, 5));
  for (const { id, logprob } of [...value.top!, { id: value.id, logprob: value.logprob! }]) {
    assert(Math.abs(logprob - (logits[id]! - total)) < 1e-4, `${logprob} ${logits[id]! - total}`);
  }
  await read(events);
  await t.end();
});

Deno.test("Engine.start: a file that is gone is named", async () => {
  const model = await loadModel(fixture("llama-tiny-f32.gguf"));
  const bus = new InProcessBus();
  const worker = await Worker.start({ bus, kernels: loadKernels(), id: "w", threads: 1, memoryBytes: 1e9 });
  await assert.rejects(Engine.start({ bus, model: { ...model, path: "/nowhere.gguf" } }), {
    name: "LoadError",
    message: /worker w did not load: .*nowhere\.gguf/,
  });
  await worker.close();
  await bus.close();
});
