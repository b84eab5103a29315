/**
 * Writes GGUF files for tests, well-formed ones and, since every part is the caller's, others.
 *
 * @module
 */

/** A metadata value with its type. */
export type Value =
  | { u8: number }
  | { u32: number }
  | { f32: number }
  | { bool: number }
  | { u64: bigint }
  | { string: string }
  | { array: Value[]; of: number };

/** A tensor; `data` is as long as it says. */
export interface WriterTensor {
  name: string;
  shape: number[];
  type: number;
  data: Uint8Array;
  /** Offset in the data section. Default: behind the tensor before, aligned. */
  offset?: number;
}

const TYPE_IDS = { u8: 0, u32: 4, f32: 6, bool: 7, string: 8, array: 9, u64: 10 } as const;

/** The type id of a value. */
function typeId(value: Value): number {
  return TYPE_IDS[Object.keys(value).find((key) => key in TYPE_IDS) as keyof typeof TYPE_IDS];
}

function number(bytes: number, set: (view: DataView) => void): number[] {
  const view = new DataView(new ArrayBuffer(bytes));
  set(view);
  return [...new Uint8Array(view.buffer)];
}
const u32 = (x: number) => number(4, (v) => v.setUint32(0, x, true));
const u64 = (x: number | bigint) => number(8, (v) => v.setBigUint64(0, BigInt(x), true));
const text = (s: string) => {
  const bytes = new TextEncoder().encode(s);
  return [...u64(bytes.length), ...bytes];
};

function encodeValue(value: Value): number[] {
  if ("u8" in value) return [value.u8];
  if ("bool" in value) return [value.bool];
  if ("u32" in value) return u32(value.u32);
  if ("u64" in value) return u64(value.u64);
  if ("f32" in value) return number(4, (v) => v.setFloat32(0, value.f32, true));
  if ("string" in value) return text(value.string);
  return [...u32(value.of), ...u64(value.array.length), ...value.array.flatMap(encodeValue)];
}

/** The bytes of a GGUF file. */
export function writeGguf(
  metadata: readonly (readonly [string, Value])[],
  tensors: readonly WriterTensor[],
  options: { version?: number; alignment?: number; tensorCount?: bigint; metadataCount?: bigint } = {},
): Uint8Array<ArrayBuffer> {
  const { version = 3, alignment = 32 } = options;
  const head = [
    ...new TextEncoder().encode("GGUF"),
    ...u32(version),
    ...u64(options.tensorCount ?? tensors.length),
    ...u64(options.metadataCount ?? metadata.length),
  ];
  for (const [key, value] of metadata) head.push(...text(key), ...u32(typeId(value)), ...encodeValue(value));
  let end = 0;
  const places = tensors.map((tensor) => {
    const offset = tensor.offset ?? Math.ceil(end / alignment) * alignment;
    if (tensor.data.length > 0) end = Math.max(end, offset + tensor.data.length);
    head.push(...text(tensor.name), ...u32(tensor.shape.length), ...tensor.shape.flatMap(u64), ...u32(tensor.type));
    head.push(...u64(offset));
    return offset;
  });
  const start = Math.ceil(head.length / alignment) * alignment;
  const file = new Uint8Array(start + end);
  file.set(head);
  tensors.forEach((tensor, i) => {
    const at = start + places[i]!;
    if (at + tensor.data.length <= file.length) file.set(tensor.data, at);
  });
  return file;
}

/** A small llama of random F32 weights with a byte-fallback vocabulary; tensors and metadata to be changed by tests. */
export function tinyLlama(): { metadata: [string, Value][]; tensors: WriterTensor[] } {
  return syntheticLlama({ layers: 1, embedding: 8, feedForward: 16 });
}

/** As {@linkcode tinyLlama}, of any size. */
export function syntheticLlama(
  { layers, embedding, feedForward: ff }: { layers: number; embedding: number; feedForward: number },
): { metadata: [string, Value][]; tensors: WriterTensor[] } {
  const [heads, vocab] = [2, 260];
  const tokens = ["<unk>", "<s>", "</s>", ...Array.from({ length: 256 }, (_, i) => `<0x${hex(i)}>`), "\u2581a"];
  const types = tokens.map((_, i) => i === 0 ? 2 : i < 3 ? 3 : i < 259 ? 6 : 1);
  const metadata: [string, Value][] = [
    ["general.architecture", { string: "llama" }],
    ["llama.context_length", { u32: 64 }],
    ["llama.embedding_length", { u32: embedding }],
    ["llama.block_count", { u32: layers }],
    ["llama.feed_forward_length", { u32: ff }],
    ["llama.attention.head_count", { u32: heads }],
    ["llama.attention.layer_norm_rms_epsilon", { f32: 1e-5 }],
    ["tokenizer.ggml.model", { string: "llama" }],
    ["tokenizer.ggml.tokens", { array: tokens.map((string) => ({ string })), of: 8 }],
    ["tokenizer.ggml.scores", { array: tokens.map((_, i) => ({ f32: -i })), of: 6 }],
    ["tokenizer.ggml.token_type", { array: types.map((u) => ({ u32: u })), of: 4 }],
  ];
  const f32 = (name: string, ...shape: number[]): WriterTensor => {
    const data = new Float32Array(shape.reduce((a, b) => a * b, 1)).map((_, i) => Math.sin(i + name.length) / 4);
    return { name, shape, type: 0, data: new Uint8Array(data.buffer) };
  };
  const layer = (n: number) => [
    f32(`blk.${n}.attn_norm.weight`, embedding),
    ...["attn_q", "attn_k", "attn_v", "attn_output"].map((name) =>
      f32(`blk.${n}.${name}.weight`, embedding, embedding)
    ),
    f32(`blk.${n}.ffn_norm.weight`, embedding),
    f32(`blk.${n}.ffn_gate.weight`, embedding, ff),
    f32(`blk.${n}.ffn_up.weight`, embedding, ff),
    f32(`blk.${n}.ffn_down.weight`, ff, embedding),
  ];
  const tensors = [
    f32("token_embd.weight", embedding, vocab),
    f32("output_norm.weight", embedding),
    ...Array.from({ length: layers }, (_, n) => layer(n)).flat(),
  ];
  return { metadata, tensors };
}

function hex(byte: number): string {
  return byte.toString(16).padStart(2, "0").toUpperCase();
}

/** A stream of pseudo-random 32-bit numbers (mulberry32); the same seed gives the same numbers. */
export function randomNumbers(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = state;
    t = Math.imul(t ^ (t >>> 15), t | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return (t ^ (t >>> 14)) >>> 0;
  };
}
