/**
 * Writes a GGUF of a real model's shape with random weights, for benchmarks: speed depends on shapes and tensor types, not
 * on what the weights say. Blocks are random bytes with sane scales, so types that no package can quantise work too.
 *
 * ```sh
 * deno run --allow-read --allow-write bench/synthetic_model.ts --shape tinyllama-1.1b --type Q4_0 --out /path/model.gguf
 * ```
 *
 * The file has no vocabulary (`tokenizer.ggml.model` = `no_vocab`): give it token ids.
 *
 * @module
 */
import { parseArgs } from "node:util";

/** Shape of a llama-architecture model. */
export interface ModelShape {
  readonly embedding: number;
  readonly layers: number;
  readonly heads: number;
  readonly kvHeads: number;
  readonly feedForward: number;
  readonly vocab: number;
  readonly context: number;
}

/** Shapes of models that people run. */
export const SHAPES: Readonly<Record<string, ModelShape>> = {
  "tinyllama-1.1b": {
    embedding: 2048,
    layers: 22,
    heads: 32,
    kvHeads: 4,
    feedForward: 5632,
    vocab: 32000,
    context: 2048,
  },
  "bitnet-2b": {
    embedding: 2560,
    layers: 30,
    heads: 20,
    kvHeads: 5,
    feedForward: 6912,
    vocab: 128256,
    context: 4096,
  },
  "smollm-135m": { embedding: 576, layers: 30, heads: 9, kvHeads: 3, feedForward: 1536, vocab: 49152, context: 2048 },
};

/** A block type: where its f16 scales (and minima) lie, and the root mean square of its codes under a scale of 1. */
interface BlockType {
  readonly ggml: number;
  readonly elements: number;
  readonly bytes: number;
  readonly scales: readonly number[];
  readonly minima?: readonly number[];
  readonly rms: number;
}

const TYPES: Readonly<Record<string, BlockType>> = {
  F16: { ggml: 1, elements: 1, bytes: 2, scales: [0], rms: 1 },
  Q4_0: { ggml: 2, elements: 32, bytes: 18, scales: [0], rms: 4.6 },
  Q4_1: { ggml: 3, elements: 32, bytes: 20, scales: [0], minima: [2], rms: 4.6 },
  Q5_0: { ggml: 6, elements: 32, bytes: 22, scales: [0], rms: 9.2 },
  Q5_1: { ggml: 7, elements: 32, bytes: 24, scales: [0], minima: [2], rms: 9.2 },
  Q8_0: { ggml: 8, elements: 32, bytes: 34, scales: [0], rms: 74 },
  Q2_K: { ggml: 10, elements: 256, bytes: 84, scales: [80], minima: [82], rms: 14 },
  Q3_K: { ggml: 11, elements: 256, bytes: 110, scales: [108], rms: 43 },
  Q4_K: { ggml: 12, elements: 256, bytes: 144, scales: [0], minima: [2], rms: 290 },
  Q5_K: { ggml: 13, elements: 256, bytes: 176, scales: [0], minima: [2], rms: 580 },
  Q6_K: { ggml: 14, elements: 256, bytes: 210, scales: [208], rms: 1360 },
  IQ4_NL: { ggml: 20, elements: 32, bytes: 18, scales: [0], rms: 70 },
  TQ1_0: { ggml: 34, elements: 256, bytes: 54, scales: [52], rms: 0.82 },
  TQ2_0: { ggml: 35, elements: 256, bytes: 66, scales: [64], rms: 1.22 },
};

/** Bits of the IEEE half float nearest to a positive normal `x`, rounded towards zero. */
function half(x: number): number {
  const exponent = Math.max(-14, Math.min(15, Math.floor(Math.log2(x))));
  return ((exponent + 15) << 10) | Math.min(1023, Math.floor((x / 2 ** exponent - 1) * 1024));
}

/** xoshiro128**, filling whole buffers; the benchmark must not wait for a cryptographic generator. */
function randomFiller(seed: number): (words: Uint32Array) => void {
  let a = seed >>> 0, b = 0x9e3779b9, c = 0x243f6a88, d = 0xb7e15162;
  return (words) => {
    for (let i = 0; i < words.length; i++) {
      const r = Math.imul(b, 5);
      words[i] = Math.imul((r << 7) | (r >>> 25), 9);
      const t = b << 9;
      c ^= a, d ^= b, b ^= c, a ^= d, c ^= t, d = (d << 11) | (d >>> 21);
    }
  };
}

/** Appends values in GGUF's encoding. */
class Writer {
  readonly #chunks: Uint8Array[] = [];
  bytes = 0;
  raw(data: Uint8Array): void {
    this.#chunks.push(data);
    this.bytes += data.byteLength;
  }
  u32(value: number): void {
    this.raw(new Uint8Array(new Uint32Array([value]).buffer));
  }
  u64(value: number): void {
    this.raw(new Uint8Array(new BigUint64Array([BigInt(value)]).buffer));
  }
  string(text: string): void {
    const data = new TextEncoder().encode(text);
    this.u64(data.byteLength);
    this.raw(data);
  }
  value(key: string, value: string | number | { f32: number }): void {
    this.string(key);
    if (typeof value === "string") {
      this.u32(8);
      this.string(value);
    } else if (typeof value === "number") {
      this.u32(4);
      this.u32(value);
    } else {
      this.u32(6);
      this.raw(new Uint8Array(new Float32Array([value.f32]).buffer));
    }
  }
  pad(alignment: number): void {
    this.raw(new Uint8Array((alignment - (this.bytes % alignment)) % alignment));
  }
  *[Symbol.iterator](): Iterator<Uint8Array> {
    yield* this.#chunks;
  }
}

/** Options of {@linkcode writeSyntheticModel}. */
export interface SyntheticOptions {
  readonly shape: ModelShape;
  /** Type of the blocks' matrices, as GGML names it. */
  readonly type: string;
  /** Type of embedding and head. @default {"Q8_0"} for ternary types, else `type` */
  readonly headType?: string;
  /** @default {1} */
  readonly seed?: number;
  /** Number of layers, when not the shape's. */
  readonly layers?: number;
}

/** Writes the file and returns its bytes. */
export function writeSyntheticModel(path: string, options: SyntheticOptions): number {
  const { shape, type, seed = 1 } = options;
  const layers = options.layers ?? shape.layers;
  const headType = options.headType ?? (type.startsWith("TQ") ? "Q8_0" : type);
  const { embedding, vocab, feedForward } = shape;
  const kv = (embedding / shape.heads) * shape.kvHeads;
  type Tensor = { name: string; cols: number; rows: number; type: string };
  const matrix = (name: string, cols: number, rows: number, kind = type): Tensor => ({ name, cols, rows, type: kind });
  const tensors: Tensor[] = [
    matrix("token_embd.weight", embedding, vocab, headType),
    matrix("output_norm.weight", embedding, 0, "F32"),
    matrix("output.weight", embedding, vocab, headType),
  ];
  for (let i = 0; i < layers; i++) {
    tensors.push(
      matrix(`blk.${i}.attn_norm.weight`, embedding, 0, "F32"),
      matrix(`blk.${i}.attn_q.weight`, embedding, embedding),
      matrix(`blk.${i}.attn_k.weight`, embedding, kv),
      matrix(`blk.${i}.attn_v.weight`, embedding, kv),
      matrix(`blk.${i}.attn_output.weight`, embedding, embedding),
      matrix(`blk.${i}.ffn_norm.weight`, embedding, 0, "F32"),
      matrix(`blk.${i}.ffn_gate.weight`, embedding, feedForward),
      matrix(`blk.${i}.ffn_up.weight`, embedding, feedForward),
      matrix(`blk.${i}.ffn_down.weight`, feedForward, embedding),
    );
  }
  const size = (t: Tensor): number => {
    if (t.type === "F32") return 4 * t.cols;
    const block = TYPES[t.type];
    if (block === undefined) throw new Error(`type ${t.type} is unknown; there are ${Object.keys(TYPES).join(", ")}`);
    if (t.cols % block.elements !== 0) throw new Error(`${t.name}: ${t.cols} columns are no multiple of a block`);
    return (t.cols / block.elements) * block.bytes * t.rows;
  };

  const w = new Writer();
  const metadata: [string, string | number | { f32: number }][] = [
    ["general.architecture", "llama"],
    ["general.name", `synthetic ${type}`],
    ["llama.context_length", shape.context],
    ["llama.embedding_length", embedding],
    ["llama.block_count", layers],
    ["llama.feed_forward_length", feedForward],
    ["llama.attention.head_count", shape.heads],
    ["llama.attention.head_count_kv", shape.kvHeads],
    ["llama.attention.layer_norm_rms_epsilon", { f32: 1e-5 }],
    ["llama.rope.dimension_count", embedding / shape.heads],
    ["llama.rope.freq_base", { f32: 10000 }],
    ["llama.vocab_size", vocab],
    ["tokenizer.ggml.model", "no_vocab"],
  ];
  w.raw(new TextEncoder().encode("GGUF"));
  w.u32(3);
  w.u64(tensors.length);
  w.u64(metadata.length);
  for (const [key, value] of metadata) w.value(key, value);
  let offset = 0;
  for (const t of tensors) {
    w.string(t.name);
    w.u32(t.rows === 0 ? 1 : 2);
    w.u64(t.cols);
    if (t.rows !== 0) w.u64(t.rows);
    w.u32(t.type === "F32" ? 0 : TYPES[t.type]!.ggml);
    w.u64(offset);
    offset += Math.ceil(size(t) / 32) * 32;
  }
  w.pad(32);

  const fill = randomFiller(seed);
  using file = Deno.openSync(path, { write: true, create: true, truncate: true });
  const write = (data: Uint8Array) => {
    for (let at = 0; at < data.byteLength;) at += file.writeSync(data.subarray(at));
  };
  for (const chunk of w) write(chunk);
  for (const t of tensors) {
    const padded = Math.ceil(size(t) / 32) * 32;
    if (t.type === "F32") {
      const norm = new Float32Array(padded / 4);
      norm.fill(1, 0, t.cols);
      write(new Uint8Array(norm.buffer));
      continue;
    }
    const words = new Uint32Array(padded / 4);
    fill(words);
    const view = new DataView(words.buffer);
    const block = TYPES[t.type]!;
    const scale = half(1 / (Math.sqrt(t.cols) * block.rms));
    for (let at = 0; at + block.bytes <= size(t); at += block.bytes) {
      // Scales vary in their last bits, so that nothing can profit from their being equal.
      for (const s of block.scales) view.setUint16(at + s, scale ^ (view.getUint16(at + s, true) & 0x3f), true);
      for (const m of block.minima ?? []) view.setUint16(at + m, scale ^ (view.getUint16(at + m, true) & 0x3f), true);
    }
    write(new Uint8Array(words.buffer));
  }
  return w.bytes + offset;
}

if (import.meta.main) {
  const { values } = parseArgs({
    args: Deno.args,
    options: {
      shape: { type: "string", default: "tinyllama-1.1b" },
      type: { type: "string", default: "Q4_0" },
      "head-type": { type: "string" },
      layers: { type: "string" },
      out: { type: "string" },
    },
  });
  const shape = SHAPES[values.shape];
  if (shape === undefined || values.out === undefined) {
    console.error(`give --out FILE and --shape ${Object.keys(SHAPES).join(" | ")}`);
    Deno.exit(2);
  }
  const bytes = writeSyntheticModel(values.out, {
    shape,
    type: values.type,
    ...(values["head-type"] === undefined ? {} : { headType: values["head-type"] }),
    ...(values.layers === undefined ? {} : { layers: Number(values.layers) }),
  });
  console.log(`${values.out}: ${(bytes / 1e6).toFixed(0)} MB`);
}
