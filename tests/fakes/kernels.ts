/**
 * A kernel library for tests: no weights, but every property that the rest relies on. Hidden states depend on all tokens
 * before, layer by layer, so that a lost, repeated or reordered message changes the tokens; the split over shards, the
 * batch and the chunking do not. What the real library would refuse, it refuses with the same codes, and it notes misuse.
 *
 * @module
 */
import { ABI_VERSION, decodeBatch, decodeSample, MAX_TOP_LOGPROBS } from "../../bus/mod.ts";
import type { SampleParameters, Shard, ShardStats } from "../../bus/mod.ts";
import { KernelError, KernelErrorCode } from "../../worker/errors.ts";
import type { DeviceInfo, KernelLibrary, OpenShardOptions, ShardChoices, ShardHandle } from "../../worker/kernels.ts";

const BLOCK = 32;

/** Mixes two 24-bit numbers (exact in f32) to one. */
function mix(a: number, b: number): number {
  let x = (Math.imul(a + 0x9e3779, 0x85ebca6b) ^ Math.imul(b + 0x7f4a7c, 0xc2b2ae35)) >>> 0;
  x ^= x >>> 15;
  x = Math.imul(x, 0x2c1b3c6d) >>> 0;
  x ^= x >>> 12;
  return (x >>> 0) & 0xff_ffff;
}

/** Options of {@linkcode FakeKernels}. */
export interface FakeKernelsOptions {
  /** Called before each layer with its index; may delay or throw. */
  beforeLayer?: (layer: number) => Promise<void> | void;
  /** What `openShard` tells of its progress. */
  progress?: readonly number[];
  /** What it tells of its cache. */
  note?: string;
}

/** The library. */
export class FakeKernels implements KernelLibrary {
  readonly abiVersion = ABI_VERSION;
  /** All shards ever opened. */
  readonly shards: FakeShard[] = [];
  readonly options: FakeKernelsOptions;

  constructor(options: FakeKernelsOptions = {}) {
    this.options = options;
  }

  deviceInfo(): DeviceInfo {
    return { isa: "fake", available: ["fake"], cores: 1 };
  }

  measureBandwidth(): Promise<number> {
    return Promise.resolve(10);
  }

  openShard(shard: Shard, _choices: ShardChoices, told: OpenShardOptions = {}): Promise<FakeShard> {
    if (shard.path.includes("missing")) {
      return Promise.reject(new KernelError(KernelErrorCode.io, `${shard.path}: no such file`));
    }
    for (const fraction of this.options.progress ?? []) told.onProgress?.(fraction);
    if (this.options.note !== undefined) told.onNote?.(this.options.note);
    const opened = new FakeShard(shard, this.options);
    this.shards.push(opened);
    return Promise.resolve(opened);
  }
}

/** A sequence's state: per position the layers' outputs, and the token ids. */
interface FakeSequence {
  tokens: number[];
  /** Per layer of the shard, the running state after each position. */
  states: number[][];
}

/** An open shard. */
export class FakeShard implements ShardHandle {
  readonly shard: Shard;
  readonly sequences = new Map<number, FakeSequence>();
  /** Calls that the real library forbids or that would block the thread. */
  readonly misuse: string[] = [];
  /** Tokens of every forward pass, and the number of entries that sampled. */
  readonly forwards: { tokens: number; sampled: number; seqs: number[] }[] = [];
  closed = false;
  #running = false;
  readonly #options: FakeKernelsOptions;
  readonly #blocks: number;

  constructor(shard: Shard, options: FakeKernelsOptions) {
    this.shard = shard;
    this.#options = options;
    this.#blocks = Math.ceil(shard.kv.tokens / BLOCK);
  }

  async forward(bytes: Uint8Array, input: Uint8Array, stop: Int32Array, output: Uint8Array): Promise<number> {
    this.#check("forward");
    this.#running = true;
    try {
      return await this.#forward(bytes, input, stop, output);
    } finally {
      this.#running = false;
    }
  }

  truncate(seq: number, length: number): void {
    this.#check("truncate");
    const sequence = this.sequences.get(seq);
    if (sequence === undefined) return;
    if (length === 0) this.sequences.delete(seq);
    else cut(sequence, length);
  }

  stats(): ShardStats {
    this.#check("stats");
    return {
      kvBlocksTotal: this.#blocks,
      kvBlocksFree: this.#blocks - this.#used(this.sequences.values()),
      blockTokens: BLOCK,
      weightBytes: 1000,
      cachedBytes: 0,
      sequences: this.sequences.size,
      weightBytesPerToken: 1000,
    };
  }

  close(): void {
    this.#check("close");
    this.closed = true;
    this.sequences.clear();
  }

  async #forward(bytes: Uint8Array, input: Uint8Array, stop: Int32Array, output: Uint8Array): Promise<number> {
    const batch = decodeBatch(bytes);
    const { hyper, first, end, embedding, head, maxBatch } = this.shard;
    const { tokens, entries } = batch;
    if (tokens.length > maxBatch) throw new KernelError(-1, `${tokens.length} tokens; the shard takes ${maxBatch}`);
    const width = hyper.embedding;
    if (input.byteLength !== (embedding === null ? 4 * width * tokens.length : 0)) {
      throw new KernelError(-1, `input has ${input.byteLength} bytes`);
    }
    // Work on copies: an error changes nothing.
    const next = new Map<number, FakeSequence>();
    for (const entry of entries) {
      const known = this.sequences.get(entry.seq);
      const sequence: FakeSequence = {
        tokens: [...known?.tokens ?? []],
        states: Array.from({ length: end - first }, (_, i) => [...known?.states[i] ?? []]),
      };
      if (entry.pos > sequence.tokens.length) {
        throw new KernelError(
          KernelErrorCode.sequenceGap,
          `sequence ${entry.seq} has ${sequence.tokens.length} tokens, not ${entry.pos}`,
        );
      }
      cut(sequence, entry.pos);
      for (let i = 0; i < entry.tokenCount; i++) {
        const id = tokens[entry.firstToken + i]!;
        if (id >= hyper.vocab) throw new KernelError(-1, `token ${id} is outside the vocabulary`);
        sequence.tokens.push(id);
      }
      if (sequence.tokens.length > hyper.context) {
        throw new KernelError(-1, `sequence ${entry.seq} exceeds the context`);
      }
      next.set(entry.seq, sequence);
    }
    if (this.#used(new Map([...this.sequences, ...next]).values()) > this.#blocks) {
      throw new KernelError(KernelErrorCode.exhausted, "no free KV block");
    }
    const rows = new Float32Array(tokens.length * width);
    if (embedding === null) rows.set(new Float32Array(input.slice().buffer));
    else tokens.forEach((id, i) => rows.fill(mix(id, 1), i * width, (i + 1) * width));
    for (let layer = first; layer < end; layer++) {
      await this.#options.beforeLayer?.(layer);
      if (Atomics.load(stop, 0) !== 0) throw new KernelError(KernelErrorCode.stopped, "stopped");
      for (const entry of entries) {
        const states = next.get(entry.seq)!.states[layer - first]!;
        for (let i = 0; i < entry.tokenCount; i++) {
          const row = (entry.firstToken + i) * width;
          const state = mix(mix(states.at(-1) ?? 0, rows[row]!), layer);
          states.push(state);
          rows.fill(mix(rows[row]!, state), row, row + width);
        }
      }
    }
    for (const [seq, sequence] of next) this.sequences.set(seq, sequence);
    this.forwards.push({
      tokens: tokens.length,
      sampled: entries.filter((entry) => entry.sampled).length,
      seqs: entries.map((entry) => entry.seq),
    });
    if (head === null) {
      output.set(new Uint8Array(rows.buffer));
      return rows.byteLength;
    }
    const view = new DataView(output.buffer, output.byteOffset, output.byteLength);
    let at = 0;
    for (const entry of entries) {
      const sample = decodeSample(batch, entry);
      if (sample === undefined) continue;
      const last = entry.firstToken + entry.tokenCount - 1;
      const id = choose(rows[last * width]!, next.get(entry.seq)!.tokens, sample, hyper.vocab);
      view.setUint32(at, id, true);
      view.setFloat32(at + 4, -0.5, true);
      view.setUint32(at + 8, entry.topLogprobs, true);
      at += 12;
      for (let i = 0; i < Math.min(entry.topLogprobs, MAX_TOP_LOGPROBS); i++, at += 8) {
        view.setUint32(at, (id + i) % hyper.vocab, true);
        view.setFloat32(at + 4, -0.5 - i, true);
      }
    }
    for (const entry of entries) {
      if (!entry.logits) continue;
      for (let i = 0; i < entry.tokenCount; i++) {
        const hidden = rows[(entry.firstToken + i) * width]!;
        for (let id = 0; id < hyper.vocab; id++, at += 4) view.setFloat32(at, mix(hidden, id), true);
      }
    }
    return at;
  }

  #used(sequences: Iterable<FakeSequence>): number {
    let blocks = 0;
    for (const { tokens } of sequences) blocks += Math.ceil(tokens.length / BLOCK);
    return blocks;
  }

  #check(call: string): void {
    if (this.closed) this.misuse.push(`${call} after close`);
    if (this.#running) this.misuse.push(`${call} during forward`);
  }
}

/** Depends on the hidden state, the seed, the position, and on where the prompt ended. */
function choose(hidden: number, tokens: readonly number[], sample: SampleParameters, vocab: number): number {
  for (const [id, bias] of sample.logitBias) if (bias >= 100) return id;
  const seed = sample.temperature === 0 ? 0 : Number(sample.seed & 0xff_ffffn);
  return mix(mix(hidden, seed), mix(tokens.length, sample.promptLength)) % vocab;
}

/** The tokens that follow `prompt`, computed by one shard without bus, batch or chunks: what every other way must give. */
export function fakeContinuation(
  hyper: { layers: number; vocab: number },
  prompt: readonly number[],
  count: number,
  sample: Pick<SampleParameters, "temperature" | "seed" | "logitBias">,
): number[] {
  const states = new Array<number>(hyper.layers).fill(0);
  const tokens: number[] = [];
  const feed = (id: number) => {
    tokens.push(id);
    let hidden = mix(id, 1);
    for (let layer = 0; layer < hyper.layers; layer++) {
      states[layer] = mix(mix(states[layer]!, hidden), layer);
      hidden = mix(hidden, states[layer]!);
    }
    return hidden;
  };
  let hidden = 0;
  for (const id of prompt) hidden = feed(id);
  const generated: number[] = [];
  while (generated.length < count) {
    const id = choose(hidden, tokens, { ...sample, promptLength: prompt.length } as SampleParameters, hyper.vocab);
    generated.push(id);
    hidden = feed(id);
  }
  return generated;
}

/** A description of layers `first` to `end` (exclusive) of `layers` for {@linkcode FakeKernels}. */
export function fakeShard(options: {
  first?: number;
  end?: number;
  layers?: number;
  vocab?: number;
  context?: number;
  embedding?: number;
  kvTokens?: number;
  maxBatch?: number;
  path?: string;
} = {}): Shard {
  const { layers = 6, first = 0, end = layers, vocab = 97, context = 4096, embedding = 4 } = options;
  const tensor = { name: "t", type: 0, shape: [1], offset: 0, bytes: 4 };
  const [weight, norm] = [{ weight: tensor }, { weight: tensor }];
  const mlp = { gate: weight, up: weight, down: weight };
  const layer = { attnNorm: norm, q: weight, k: weight, v: weight, o: weight, rope: 0, ffnNorm: norm, mlp };
  return {
    path: options.path ?? "fake.gguf",
    kv: { type: "f16", tokens: options.kvTokens ?? 4096 },
    maxBatch: options.maxBatch ?? 64,
    hyper: {
      layers,
      embedding,
      heads: 1,
      kvHeads: 1,
      headDim: embedding,
      feedForward: embedding,
      vocab,
      context,
      norm: { kind: "rms", eps: 1e-5 },
      activation: "silu",
      ropes: [{ base: 10000, dims: embedding, style: "norm" }],
    },
    first,
    end,
    embedding: first === 0 ? tensor : null,
    head: end === layers ? { norm, output: weight } : null,
    layers: Array.from({ length: end - first }, () => layer),
  };
}

function cut(sequence: FakeSequence, length: number): void {
  sequence.tokens.length = Math.min(sequence.tokens.length, length);
  for (const states of sequence.states) states.length = Math.min(states.length, length);
}
