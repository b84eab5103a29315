/**
 * A shard's description: what the kernel library must know of a model, in the same words for every architecture. Its twin is
 * `kernels/src/descriptor.rs`, which checks all of it again, and the tensors' shapes against the numbers.
 *
 * What is absent is not done: no bias, no window, no norm.
 *
 * @module
 */
import { z } from "zod";

const u32 = z.number().int().min(0).max(0xffff_ffff);
const count = z.number().int().positive().max(0xffff_ffff);
const size = z.number().int().nonnegative();
const positive = z.number().positive();

const storedSchema = z.strictObject({
  name: z.string().max(256),
  /** GGML type id of what is stored. */
  type: u32,
  /** Columns first, then rows for a matrix, then matrices. */
  shape: z.array(count).min(1).max(4),
  /** 0: the shard's `path`; from 1 on one of its `files`. @default 0 */
  file: u32.optional(),
  /** From the file's begin. */
  offset: size,
  /** Of what is stored there. */
  bytes: size,
});
const layouts = [
  /** Floats, columns one after the other. */
  z.strictObject({ kind: z.literal("transposed") }),
  /**
   * GPTQ's; the tensor's own place has the codes. `group` columns after the other share a group, or all if it is 0; with `index`,
   * which says the group of each, `group` is what most have. `zero` is added to stored zero points.
   */
  z.strictObject({
    kind: z.literal("gptq"),
    bits: u32,
    zero: z.union([z.literal(0), z.literal(1)]),
    group: u32,
    scales: storedSchema,
    zeros: storedSchema,
    index: storedSchema.optional(),
  }),
  /** AWQ's "gemm", likewise. */
  z.strictObject({ kind: z.literal("awq"), group: u32, scales: storedSchema, zeros: storedSchema }),
  /** BitNet's, four rows a byte: weights are multiplied with `scale`, one number, or with `inverse` divided by it. */
  z.strictObject({ kind: z.literal("quarters"), scale: storedSchema.optional(), inverse: z.boolean() }),
  /** Floats, to be rounded to −1, 0 and 1 times their mean magnitude. */
  z.strictObject({ kind: z.literal("ternarised") }),
] as const;
/** Of `of` stored rows, `block` ones of every `stride`, from `first` on. */
const rowsSchema = z.strictObject({ of: count, first: u32, block: count, stride: count }).optional();
const partSchema = storedSchema.extend({
  rows: rowsSchema,
  layout: z.discriminatedUnion("kind", layouts).optional(),
});
const tensorSchema = storedSchema.extend({
  /** Which rows it takes of those stored; all if absent. */
  rows: rowsSchema,
  /** How it is stored if not as rows of blocks; of `parts` nothing is at its own place, and `bytes` are those of all. */
  layout: z.discriminatedUnion("kind", [
    ...layouts,
    z.strictObject({ kind: z.literal("parts"), parts: z.array(partSchema).min(1).max(4096) }),
  ]).optional(),
});
/** A tensor in a model's file. */
export type TensorRef = z.infer<typeof tensorSchema>;
/** How a file keeps a tensor. */
export type TensorLayout = NonNullable<TensorRef["layout"]>;

/** Bytes that the rows of a tensor take of what is stored. */
export function storedBytes({ shape, bytes, rows, layout }: TensorRef): number {
  if (layout?.kind === "parts") return layout.parts.reduce((sum, part) => sum + storedBytes(part), 0);
  const grouped = layout?.kind === "gptq" || layout?.kind === "awq";
  const all = bytes + (grouped ? layout.scales.bytes + layout.zeros.bytes : 0);
  return rows === undefined ? all : all / rows.of * (shape[1] ?? 1);
}

/**
 * Bytes of a tensor's rows in blocks that the kernels pack, at most. An f16 is taken to hold every scale in BF16, as it nearly
 * always does.
 */
export function tensorBytes(tensor: TensorRef): number {
  const { shape, layout } = tensor;
  switch (layout?.kind) {
    case "parts":
      return layout.parts.reduce((sum, part) => sum + tensorBytes(part), 0);
    case "gptq":
    case "awq": { // `kernels/src/pack/grouped.rs` chooses
      const [cols, rows = 1] = shape as [number, number];
      const [bits, group] = [layout.kind === "awq" ? 4 : layout.bits, layout.group === 0 ? cols : layout.group];
      const wide = layout.scales.type === 0; // F32, which an f16 may hold or not
      const padded = (wide ? [32] : [128, 64, 32]).map((size) =>
        Math.ceil(cols / group) * Math.ceil(group / size) * ((wide ? 5 : 3) + size * bits / 8)
      );
      return rows * Math.min(4 * cols, ...padded);
    }
    case "ternarised":
      return shape.reduce((a, b) => a * b, 1) / 4;
    default:
      return storedBytes(tensor);
  }
}

/** A matrix with what is done to its product: `y = scale·(W·x) + bias`; `scale` holds one number. */
const linearSchema = z.strictObject({
  weight: tensorSchema,
  bias: tensorSchema.optional(),
  scale: tensorSchema.optional(),
});
/** A matrix with what is done to its product. */
export type Linear = z.infer<typeof linearSchema>;

const normSchema = z.strictObject({ weight: tensorSchema, bias: tensorSchema.optional() });
/** A norm, of the model's kind. */
export type Norm = z.infer<typeof normSchema>;

/** A factor for every pair: in the file, or here. */
const factorsSchema = z.union([tensorSchema, z.array(positive).min(1).max(1 << 15)]);
const ropeScalingSchema = z.discriminatedUnion("kind", [
  /** Positions are divided by `factor`. */
  z.strictObject({ kind: z.literal("linear"), factor: positive }),
  /** The base grows with the context served beyond the original one ("dynamic NTK"). */
  z.strictObject({ kind: z.literal("ntk"), factor: positive, original: count }),
  /** Linear for slow pairs, none for fast ones, mixed between; `attention` multiplies cosines and sines. */
  z.strictObject({
    kind: z.literal("yarn"),
    factor: positive,
    original: count,
    betaFast: positive,
    betaSlow: positive,
    attention: positive,
  }),
  /** As YaRN, by wavelengths. */
  z.strictObject({ kind: z.literal("llama3"), factor: positive, low: positive, high: positive, original: count }),
  /** The frequency of every pair is divided by its own factor. */
  z.strictObject({ kind: z.literal("factors"), factors: tensorSchema }),
  /** Such factors in two sets, one for contexts up to the original one. */
  z.strictObject({
    kind: z.literal("longrope"),
    short: factorsSchema,
    long: factorsSchema,
    original: count,
    attention: positive,
  }),
]);
/** What changes the angles of a rotary embedding whose context was extended. */
export type RopeScaling = z.infer<typeof ropeScalingSchema>;

const ropeSchema = z.strictObject({
  base: positive,
  /** Elements of a head that are rotated, from its begin. */
  dims: count,
  /** Pairs are neighbours (`norm`) or lie half of `dims` apart (`neox`). */
  style: z.enum(["norm", "neox"]),
  scaling: ropeScalingSchema.optional(),
});
/** A rotary embedding. */
export type Rope = z.infer<typeof ropeSchema>;

/** What a feed-forward layer applies between its products; `gelu` is the exact one. */
export const activationSchema = z.enum(["silu", "gelu", "gelu-tanh", "relu", "relu-squared"]);
/** What a feed-forward layer applies between its products. */
export type Activation = z.infer<typeof activationSchema>;

const moeOptionsSchema = z.strictObject({
  experts: count,
  /** Experts that a token goes to. */
  used: count,
  feedForward: count,
  /** Width of the expert that all tokens go to. */
  sharedFeedForward: count.optional(),
  gating: z.enum(["softmax", "sigmoid"]),
  /** Whether the weights of the chosen are divided by their sum. */
  normalise: z.boolean(),
  scale: positive.optional(),
});
/** How mixtures of experts choose. */
export type MoeOptions = z.infer<typeof moeOptionsSchema>;

const hyperSchema = z.strictObject({
  layers: count,
  /** Width of the hidden state. */
  embedding: count,
  heads: count,
  kvHeads: count,
  headDim: count,
  feedForward: count,
  vocab: count,
  /** Most tokens of a sequence. */
  context: count,
  /** Every norm's kind: root mean square, or layer norm; `offset` is added to the weights of each. */
  norm: z.strictObject({ kind: z.enum(["rms", "layer"]), eps: positive, offset: z.number().optional() }),
  activation: activationSchema,
  /** Attention and feed-forward both start from the layer's input. */
  parallel: z.boolean().optional(),
  /** Layers name theirs by its place. */
  ropes: z.array(ropeSchema).max(8),
  moe: moeOptionsSchema.optional(),
  embeddingScale: positive.optional(),
  /** Default: 1 / √headDim. */
  attentionScale: positive.optional(),
  /** c·tanh(x / c) of attention scores. */
  attentionSoftcap: positive.optional(),
  /** Of what a layer adds to the hidden state. */
  residualScale: positive.optional(),
  logitScale: positive.optional(),
  logitSoftcap: positive.optional(),
});
/** The numbers that shape a model. */
export type HyperParameters = z.infer<typeof hyperSchema>;

/** `down(activation(gate·x) · up·x)`, or `down(activation(up·x))` without gate; `subNorm` of what `down` multiplies. */
const mlpSchema = z.strictObject({
  gate: linearSchema.optional(),
  up: linearSchema,
  subNorm: normSchema.optional(),
  down: linearSchema,
});
/** A feed-forward layer. */
export type Mlp = z.infer<typeof mlpSchema>;

const moeSchema = z.strictObject({
  router: linearSchema,
  /** Tensors of all experts, one matrix after the other. */
  gate: tensorSchema.optional(),
  up: tensorSchema,
  down: tensorSchema,
  shared: mlpSchema.optional(),
  /** One row: the shared expert's weight is the sigmoid of its product. */
  sharedGate: linearSchema.optional(),
});
/** A mixture of experts. */
export type Moe = z.infer<typeof moeSchema>;

const layerSchema = z.strictObject({
  attnNorm: normSchema.optional(),
  q: linearSchema,
  k: linearSchema,
  v: linearSchema,
  /** Of every head (the same weights, or a row of them each), or, with a weight per element of the row, of the row. */
  qNorm: normSchema.optional(),
  kNorm: normSchema.optional(),
  /** Which of `ropes` rotates queries and keys. */
  rope: u32.optional(),
  /** Positions that a token sees, its own included. */
  window: count.optional(),
  /** Of what `o` multiplies. */
  attnSubNorm: normSchema.optional(),
  o: linearSchema,
  /** Of `o`'s product. */
  attnPostNorm: normSchema.optional(),
  /** A parallel layer without takes `attnNorm`'s result. */
  ffnNorm: normSchema.optional(),
  /** One of the two. */
  mlp: mlpSchema.optional(),
  moe: moeSchema.optional(),
  /** Of the feed-forward's result. */
  ffnPostNorm: normSchema.optional(),
});
/** A layer. */
export type Layer = z.infer<typeof layerSchema>;

/** A contiguous range of a model's layers, as the kernel library opens it, less what the device chooses (threads, ISA). */
export const shardSchema = z.strictObject({
  /** The model file, as the worker's device names it. */
  path: z.string().min(1).max(4096),
  /** Names of further files in the same folder. */
  files: z.array(z.string().max(256).regex(/^[^./\\:\0][^/\\:\0]*$/, "use a file's name")).max(4095).optional(),
  /** KV cache: `tokens` over all sequences, rounded up to blocks. */
  kv: z.strictObject({ type: z.enum(["f16", "f32", "q8"]), tokens: count }),
  /** Bits that activations are rounded to, a scale for each group of weights. @default "a8" */
  activations: z.enum(["a8", "a16"]).optional(),
  /** Most tokens of a micro-batch. */
  maxBatch: count,
  hyper: hyperSchema,
  /** First layer, and the one after the last. */
  first: u32,
  end: count,
  /** Present in the first stage: its input is token ids. */
  embedding: tensorSchema.nullable(),
  /** Added to the embedding: a row per position. */
  positions: tensorSchema.optional(),
  /** Present in the last stage: its output is results. */
  head: z.strictObject({ norm: normSchema, output: linearSchema }).nullable(),
  layers: z.array(layerSchema).min(1).max(4096),
});
/** A contiguous range of a model's layers. */
export type Shard = z.infer<typeof shardSchema>;

/** All tensors that a shard is made of, where they are stored. */
export function shardTensors(shard: Shard): TensorRef[] {
  const found: TensorRef[] = [];
  const walk = (part: unknown) => {
    if (typeof part !== "object" || part === null) return;
    if ("offset" in part && "bytes" in part) {
      const tensor = part as TensorRef;
      if (tensor.layout?.kind !== "parts") found.push(tensor);
      walk(tensor.layout);
    } else for (const inner of Object.values(part)) walk(inner);
  };
  walk(shard);
  return found;
}
