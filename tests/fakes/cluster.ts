/**
 * For tests: a model without weights, and an engine over workers with the fake kernel library.
 *
 * @module
 */
import assert from "node:assert/strict";
import { InProcessBus } from "../../bus/mod.ts";
import type { PublishOptions } from "../../bus/mod.ts";
import type { LoadedModel, Tokenizer } from "../../model/mod.ts";
import { fakeContinuation, FakeKernels, fakeShard } from "./kernels.ts";
import type { FakeKernelsOptions } from "./kernels.ts";
import { Worker } from "../../worker/worker.ts";
import { Engine } from "../../orchestrator/engine.ts";
import type { EngineOptions } from "../../orchestrator/engine.ts";
import type { GenerateEvent } from "../../orchestrator/request.ts";

/** A bus that loses one message between stages or of results: the `lose`th from now on. */
export class LossyBus extends InProcessBus {
  lose = 0;
  override publish(subject: string, data: Uint8Array, options?: PublishOptions): void {
    if (/stage|results/.test(subject) && this.lose > 0 && --this.lose === 0) return;
    super.publish(subject, data, options);
  }
}

/** Ids of the fake vocabulary; 0 ends a sequence. */
export const VOCAB = 97;
const LAYERS = 6;

/** Token `n` reads `n `, in two halves of UTF-8 where it is divisible by 7, so that characters span tokens. */
const tokenizer: Tokenizer = {
  vocabSize: VOCAB,
  eosIds: new Set([0]),
  warnings: [],
  encode: (text) => text.split(" ").filter((word) => word !== "").map(Number),
  decode: (ids) => ids.map((id) => `${id} `).join(""),
  tokenBytes: (id) => new TextEncoder().encode(`${id} `),
  tokenText: (id) => `${id} `,
  stream() {
    let held = "";
    return {
      push(id) {
        held += `${id} `;
        if (id % 7 === 0) return "";
        const text = held;
        held = "";
        return text;
      },
      flush() {
        const text = held;
        held = "";
        return text;
      },
    };
  },
};

/** The model. */
export function fakeModel(options: { context?: number; embedding?: number } = {}): LoadedModel {
  const shard = fakeShard({ ...options, layers: LAYERS, vocab: VOCAB });
  const { hyper, embedding, head, layers } = shard;
  const description = { architecture: "fake", hyper, embedding, head, layers, parameters: 1 };
  return { path: "fake.gguf", id: "fake", description, tokenizer } as unknown as LoadedModel;
}

/** The tokens that follow a prompt. */
export function continuation(prompt: readonly number[], count: number, seed?: bigint): number[] {
  const sample = { temperature: seed === undefined ? 0 : 1, seed: seed ?? 0n, logitBias: new Map() };
  return fakeContinuation({ layers: LAYERS, vocab: VOCAB }, prompt, count, sample);
}

/** An engine on workers of its own. */
export interface FakeCluster {
  readonly bus: InProcessBus;
  readonly engine: Engine;
  readonly kernels: FakeKernels;
  readonly workers: readonly Worker[];
  /** Sequences in the KV caches of all shards, those that are kept after their end included. */
  sequences(): number;
  /** Closes all and checks that nothing was misused or stays. */
  end(): Promise<void>;
}

/** Starts a {@linkcode FakeCluster}. */
export async function fakeCluster(
  options:
    & Partial<Omit<EngineOptions, "bus">>
    & { workerCount?: number; bus?: InProcessBus; kernels?: FakeKernelsOptions } = {},
): Promise<FakeCluster> {
  const { workerCount = 1, bus = new InProcessBus(), kernels: kernelOptions, ...engineOptions } = options;
  const kernels = new FakeKernels(kernelOptions);
  const workers: Worker[] = [];
  for (let i = 0; i < workerCount; i++) {
    workers.push(await Worker.start({ bus, kernels, id: `w${i}`, memoryBytes: 1e9, log: () => {} }));
  }
  const close = async () => {
    for (const worker of workers) await worker.close();
    assert.equal(bus.subscriptions, 0, "subscriptions left");
    await bus.close();
  };
  let engine: Engine;
  try {
    engine = await Engine.start({ bus, model: fakeModel(), ...engineOptions });
  } catch (error) {
    await close();
    throw error;
  }
  const sequences = () => kernels.shards.reduce((sum, shard) => sum + shard.sequences.size, 0);
  return {
    bus,
    engine,
    kernels,
    workers,
    sequences,
    async end() {
      await bus.flush(); // releases on their way
      await settled(() => engine.stats().kvBlocksUsed === 0); // what follows from an answer's last token is on its way
      assert.equal(engine.stats().running + engine.stats().waiting, 0, "requests are left");
      const { kept, stages } = engine.stats();
      await settled(() => sequences() === kept * stages.length);
      await engine.close();
      await close();
      for (const shard of kernels.shards) {
        assert.deepEqual(shard.misuse, []);
        assert(shard.closed);
      }
    },
  };
}

/** Resolves when `condition` holds; fails after two seconds. */
export async function settled(condition: () => boolean): Promise<void> {
  for (let i = 0; !condition(); i++) {
    assert(i < 1000, `never came true: ${condition}`);
    await new Promise((resolve) => setTimeout(resolve, 2));
  }
}

/** Reads an answer to its end. */
export async function read(events: AsyncIterable<GenerateEvent>): Promise<{
  ids: number[];
  text: string;
  done: GenerateEvent & { type: "done" };
}> {
  const ids: number[] = [];
  let text = "";
  let done: GenerateEvent & { type: "done" } | undefined;
  for await (const event of events) {
    assert.equal(done, undefined, "an event after the last");
    if (event.type === "done") done = event;
    else {
      ids.push(event.id);
      text += event.text;
    }
  }
  assert(done !== undefined, "no last event");
  return { ids, text, done };
}
