/**
 * Lutra as an {@linkcode Engine}: one shard with all layers, one call of the kernel library a step, as a worker makes them.
 *
 * ```sh
 * deno run -A bench/engines/lutra.ts
 * ```
 *
 * @module
 */
import { encodeBatch, shardSchema } from "../../bus/mod.ts";
import type { BatchEntry, SampleParameters } from "../../bus/mod.ts";
import { loadModel } from "../../model/mod.ts";
import { loadKernels } from "../../worker/mod.ts";
import type { ShardHandle } from "../../worker/mod.ts";
import { serve, token } from "./engine.ts";
import type { Engine, EngineInfo, LoadRequest, MeasureRequest } from "./engine.ts";

/** The most probable token: what a step ends with, and the peer is not asked for. */
const GREEDY: SampleParameters = {
  temperature: 0,
  topK: 0,
  topP: 1,
  minP: 0,
  repeatPenalty: 1,
  presencePenalty: 0,
  frequencyPenalty: 0,
  penaltyLastN: 0,
  promptLength: 0,
  seed: 0n,
  logitBias: new Map(),
};
const NOTHING = new Uint8Array(new ArrayBuffer(0));

class Lutra implements Engine {
  readonly #stop = new Int32Array(new ArrayBuffer(4));
  #shard: ShardHandle | undefined;
  #vocab = 1;
  #threads = 1;
  #output = NOTHING;
  /** Tokens that the first sequences hold, all as many. */
  #held = { sequences: 0, length: 0 };

  async load({ path, threads, sequences, length }: LoadRequest): Promise<EngineInfo> {
    const kernels = loadKernels();
    this.#threads = threads;
    const { hyper, embedding, head, layers } = (await loadModel(path)).description;
    const shard = shardSchema.parse({
      path,
      kv: { type: "f16", tokens: sequences * Math.ceil((length + 1) / 32) * 32 },
      maxBatch: Math.max(length, sequences),
      hyper,
      first: 0,
      end: hyper.layers,
      embedding,
      head,
      layers,
    });
    this.#shard = await kernels.openShard(shard, { threads, isa: null });
    this.#vocab = hyper.vocab;
    this.#output = new Uint8Array(new ArrayBuffer(4 * hyper.vocab * length));
    return {
      name: "lutra",
      build: kernels.deviceInfo().isa,
      bytesPerStep: this.#shard.stats().weightBytesPerToken,
    };
  }

  async #forward(sequences: number, tokens: number, position: number): Promise<number> {
    const entries = Array.from({ length: sequences }, (_, seq): BatchEntry => ({
      seq,
      pos: position,
      tokens: Array.from({ length: tokens }, (_, i) => token(seq, position + i, this.#vocab)),
      sample: GREEDY,
    }));
    const start = performance.now();
    await this.#shard!.forward(encodeBatch(entries), NOTHING, this.#stop, this.#output);
    return (performance.now() - start) / 1000;
  }

  #truncate(sequences: number, length: number): void {
    for (let seq = 0; seq < sequences; seq++) this.#shard!.truncate(seq, length);
  }

  async measure({ batch: sequences, tokens, context, warmUp, steps }: MeasureRequest): Promise<number[]> {
    const held = this.#held;
    if (held.sequences !== sequences || held.length !== context) {
      this.#truncate(held.sequences, 0);
      this.#held = { sequences, length: context };
      for (let seq = 0; seq < sequences && context > 0; seq++) {
        // Sequence by sequence, as a batch holds no more tokens than the longest.
        const ids = Array.from({ length: context }, (_, i) => token(seq, i, this.#vocab));
        await this.#shard!.forward(encodeBatch([{ seq, pos: 0, tokens: ids }]), NOTHING, this.#stop, this.#output);
      }
    }
    const seconds: number[] = [];
    for (let step = 0; step < warmUp + steps; step++) {
      const time = await this.#forward(sequences, tokens, tokens > 1 ? context : context + step);
      if (step >= warmUp) seconds.push(time);
      if (tokens > 1) this.#truncate(sequences, context);
    }
    this.#truncate(sequences, context);
    return seconds;
  }

  async logits(tokens: readonly number[]): Promise<number[]> {
    this.#truncate(this.#held.sequences, 0);
    this.#held = { sequences: 0, length: 0 };
    const batch = encodeBatch([{ seq: 0, pos: 0, tokens, logits: true }]);
    const written = await this.#shard!.forward(batch, NOTHING, this.#stop, this.#output);
    this.#shard!.truncate(0, 0);
    return [...new Float32Array(this.#output.buffer, written - 4 * this.#vocab, this.#vocab)];
  }

  bandwidth(mebibytes: number): Promise<number> {
    return loadKernels().measureBandwidth(this.#threads, mebibytes);
  }
}

if (import.meta.main) await serve(new Lutra());
