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
import { GGML_TYPES } from "../model/ggml_types.ts";

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
  /** A TinyLlama with a head that weighs next to nothing, as a larger model's does: it can be split evenly. */
  "even-1b": {
    embedding: 2048,
    layers: 22,
    heads: 32,
    kvHeads: 4,
    feedForward: 5632,
    vocab: 4096,
    context: 2048,
  },
  "smollm-135m": { embedding: 576, layers: 30, heads: 9, kvHeads: 3, feedForward: 1536, vocab: 49152, context: 2048 },
};

/** How random bytes become a block of sane values. */
interface BlockKind {
  /** Root mean square of a block's values under a scale of 1. */
  readonly rms: number;
  /** Where its f16 scale lies. */
  readonly scale?: number;
  /** Where its f16 minimum lies, and that as a multiple of the scale which makes the mean about 0. */
  readonly min?: readonly [at: number, ratio: number];
  /** What its code bytes may be, when not all: maps a random byte to one. */
  readonly codes?: Uint8Array;
}

/** Bytes of four 2-bit codes of which none is 3, as ternary types have them. */
const TERNARY = Uint8Array.from({ length: 256 }, (_, byte) => {
  const digit = (power: number) => Math.floor((byte % 81) / power) % 3;
  return digit(1) | (digit(3) << 2) | (digit(9) << 4) | (digit(27) << 6);
});
/** Bytes of five trits as TQ1_0 writes them. */
const FIVE_TRITS = Uint8Array.from({ length: 256 }, (_, byte) => Math.ceil(((byte % 243) * 256) / 243));

const KINDS: Readonly<Record<string, BlockKind>> = {
  F16: { rms: 1, scale: 0 },
  Q4_0: { rms: 4.6, scale: 0 },
  Q4_1: { rms: 4.6, scale: 0, min: [2, -7.5] },
  Q5_0: { rms: 9.2, scale: 0 },
  Q5_1: { rms: 9.2, scale: 0, min: [2, -15.5] },
  Q8_0: { rms: 74, scale: 0 },
  Q2_K: { rms: 14, scale: 80, min: [82, 1.5] },
  Q3_K: { rms: 43, scale: 108 },
  Q4_K: { rms: 258, scale: 0, min: [2, 7.5] },
  Q5_K: { rms: 527, scale: 0, min: [2, 15.5] },
  Q6_K: { rms: 1366, scale: 208 },
  IQ4_NL: { rms: 69, scale: 0 },
  MXFP4: { rms: 4.6 },
  TQ1_0: { rms: 0.82, scale: 52, codes: FIVE_TRITS },
  TQ2_0: { rms: 0.82, scale: 64, codes: TERNARY },
  I2_S: { rms: 0.82, codes: TERNARY },
  L1: { rms: 0.5, scale: 0, min: [2, -0.5] },
  L2: { rms: 1.12, scale: 0, min: [2, -1.5] },
  L3: { rms: 2.29, scale: 0, min: [2, -3.5] },
};

/** Types that only Lutra knows. */
export const OWN_TYPES: readonly string[] = ["I2_S", "L1", "L2", "L3"];
/** Types that {@linkcode writeSyntheticModel} can write. */
export const SYNTHETIC_TYPES: readonly string[] = Object.keys(KINDS);

const GGML = new Map([...GGML_TYPES.values()].map((type) => [type.name, type]));

/** Bits of the half float nearest to `x`. */
function half(x: number): number {
  const exponent = Math.max(-14, Math.floor(Math.log2(Math.abs(x))));
  const bits = Math.round(Math.abs(x) * 2 ** (10 - exponent)) + (exponent + 14) * 1024; // a carry goes to the exponent
  return (x < 0 ? 0x8000 : 0) | bits;
}

/** Makes blocks of `rms` 1 / √cols out of random bytes. */
function shapeBlocks(bytes: Uint8Array<ArrayBuffer>, type: string, cols: number): void {
  const kind = KINDS[type]!;
  const { bytes: size, trailer } = GGML.get(type)!;
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const end = bytes.byteLength - trailer;
  const value = 1 / (Math.sqrt(cols) * kind.rms);
  if (kind.codes !== undefined) { for (let at = 0; at < end; at++) bytes[at] = kind.codes[bytes[at]!]!; }
  if (type === "MXFP4") {
    const exponent = 128 + Math.round(Math.log2(value));
    for (let at = 0; at < end; at += size) bytes[at] = exponent - (bytes[at]! & 1);
  }
  if (type === "I2_S") view.setFloat32(end, value, true);
  if (type === "F16") {
    // Sign and low bits are random, the exponent is not.
    for (let at = 0; at < end; at += 2) view.setUint16(at, half(value) ^ (view.getUint16(at, true) & 0x80ff), true);
    return;
  }
  if (kind.scale === undefined) return;
  // Scales vary in their last bits, so that nothing can profit from their being equal.
  const scale = half(value);
  for (let at = kind.scale; at < end; at += size) view.setUint16(at, scale ^ (view.getUint16(at, true) & 15), true);
  if (kind.min === undefined) return;
  const [first, ratio] = kind.min;
  const min = half(value * ratio);
  for (let at = first; at < end; at += size) view.setUint16(at, min ^ (view.getUint16(at, true) & 15), true);
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
  /** Type of the head. Default: what llama.cpp's quantiser takes, Q6_K (Q8_0 with Q8_0, MXFP4 or rows of no whole blocks). */
  readonly headType?: string;
  /** Type of the embedding. Default: as there, `type`, but Q4_K with ternary types (and with those of Lutra alone). */
  readonly embeddingType?: string;
  /** @default {1} */
  readonly seed?: number;
  /** Number of layers, when not the shape's. */
  readonly layers?: number;
}

/** Writes the file and returns its bytes. */
export function writeSyntheticModel(path: string, options: SyntheticOptions): number {
  const { shape, type, seed = 1 } = options;
  const layers = options.layers ?? shape.layers;
  const { embedding, vocab, feedForward } = shape;
  const whole = embedding % 256 === 0;
  const high = type === "Q8_0" || type === "MXFP4" || !whole ? "Q8_0" : "Q6_K";
  const headType = options.headType ?? (type === "F16" ? type : high);
  const low = type.startsWith("TQ") || OWN_TYPES.includes(type);
  const embeddingType = options.embeddingType ?? (low ? (whole ? "Q4_K" : "Q8_0") : type);
  const kv = (embedding / shape.heads) * shape.kvHeads;
  type Tensor = { name: string; cols: number; rows: number; type: string };
  const matrix = (name: string, cols: number, rows: number, kind = type): Tensor => ({ name, cols, rows, type: kind });
  const tensors: Tensor[] = [
    matrix("token_embd.weight", embedding, vocab, embeddingType),
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
    const block = KINDS[t.type] === undefined ? undefined : GGML.get(t.type);
    if (block === undefined) throw new Error(`type ${t.type} is unknown; there are ${SYNTHETIC_TYPES.join(", ")}`);
    if (t.cols % block.elements !== 0) throw new Error(`${t.name}: ${t.cols} columns are no multiple of a block`);
    return (t.cols / block.elements) * block.bytes * t.rows + block.trailer;
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
    w.u32(t.type === "F32" ? 0 : GGML.get(t.type)!.id);
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
    shapeBlocks(new Uint8Array(words.buffer, 0, size(t)), t.type, t.cols);
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
      "embedding-type": { type: "string" },
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
    ...(values["embedding-type"] === undefined ? {} : { embeddingType: values["embedding-type"] }),
    ...(values.layers === undefined ? {} : { layers: Number(values.layers) }),
  });
  console.log(`${values.out}: ${(bytes / 1e6).toFixed(0)} MB`);
}
