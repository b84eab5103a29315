import type {
  HyperParameters,
  Layer,
  Linear,
  Mlp,
  Moe,
  MoeOptions,
  Norm,
  Rope,
  RopeScaling,
  Shard,
  TensorRef,
} from "../bus/shard.ts";
import { ModelFile, NORMS } from "./architecture.ts";
import type { Architecture, NormRole } from "./architecture.ts";
import { ARCHITECTURES } from "./architectures/mod.ts";
import { UnsupportedModelError } from "./errors.ts";
import { GGML_TYPES, ggmlTypeName } from "./ggml_types.ts";
import type { GgufFile } from "./gguf.ts";
import { Metadata } from "./metadata.ts";

export type { HyperParameters, Layer, TensorRef } from "../bus/shard.ts";

/** What the kernels need to know of a model. */
export interface ModelDescription {
  readonly architecture: string;
  readonly name?: string;
  readonly hyper: HyperParameters;
  readonly embedding: TensorRef;
  readonly positions?: TensorRef;
  readonly head: NonNullable<Shard["head"]>;
  readonly layers: readonly Layer[];
  /** Number of weights. */
  readonly parameters: number;
}

const BY_NAME: ReadonlyMap<string, Architecture> = new Map(
  ARCHITECTURES.flatMap((a) => [a.name, ...a.aliases ?? []].map((name): [string, Architecture] => [name, a])),
);
const MAX_LAYERS = 4096;

/**
 * Reads the model out of a GGUF.
 *
 * @throws {UnsupportedModelError} naming the architecture, key or tensor that cannot be used.
 */
export function describeModel(gguf: GgufFile): ModelDescription {
  const metadata = new Metadata(gguf);
  const name = metadata.required("general.architecture", metadata.string("general.architecture"));
  const architecture = BY_NAME.get(name);
  if (architecture === undefined) {
    throw new UnsupportedModelError(
      `architecture ${JSON.stringify(name)} is not supported; there is ${[...BY_NAME.keys()].join(", ")}`,
    );
  }
  const file = new ModelFile(gguf, name);
  const tensors = new Tensors(gguf);
  const window = windowOf(architecture, file);
  const ropes = ropesOf(architecture, file, tensors, gguf.rotaryHalves === true);
  const hyper = hyperOf(architecture, file, tensors, ropes, gguf.normOffset);
  const embedding = tensors.get("token_embd.weight", hyper.embedding, hyper.vocab);
  const positions = architecture.positions === true
    ? tensors.get("position_embd.weight", hyper.embedding, hyper.context)
    : undefined;
  const norm = tensors.norm("output_norm", hyper.embedding);
  const untied = gguf.tensors.has("output.weight");
  const output: Linear = untied
    ? tensors.linear("output", hyper.embedding, hyper.vocab)
    : { weight: embedding, ...tensors.rest("output", hyper.vocab) };
  const layers = Array.from({ length: hyper.layers }, (_, i): Layer => {
    const local = window !== undefined && window.local(i);
    return {
      ...layerOf(architecture, file, tensors, hyper, i),
      ...(ropes.length === 0 ? {} : { rope: local ? ropes.length - 1 : 0 }),
      ...(local ? { window: window.size } : {}),
    };
  });
  // A tensor left over would change the result if it were read: better no answer than a wrong one.
  const left = tensors.unused();
  if (left.length > 0) {
    throw new UnsupportedModelError(
      `tensor ${left[0]} is not understood (${left.length} such): ${
        JSON.stringify(name)
      } models are not known to have it`,
    );
  }
  let parameters = 0;
  for (const { shape } of gguf.tensors.values()) parameters += shape.reduce((a, b) => a * b, 1);
  const title = metadata.string("general.name");
  return {
    architecture: name,
    ...(title === undefined ? {} : { name: title }),
    hyper,
    embedding,
    ...(positions === undefined ? {} : { positions }),
    head: { norm, output },
    layers,
    parameters,
  };
}

/** The file's tensors, checked when they are asked for. */
class Tensors {
  readonly #gguf: GgufFile;
  readonly #used = new Set<string>();

  constructor(gguf: GgufFile) {
    this.#gguf = gguf;
  }

  has(name: string): boolean {
    return this.#gguf.tensors.has(name);
  }

  /** The tensor, which must be there, of any shape. */
  any(name: string): TensorRef {
    const info = this.#gguf.tensors.get(name);
    if (info === undefined) throw new UnsupportedModelError(`tensor ${name} is missing`);
    if (info.layout === undefined && GGML_TYPES.get(info.type)?.supported !== true) {
      const types = [...GGML_TYPES.values()].filter((t) => t.supported).map((t) => t.name).join(", ");
      throw new UnsupportedModelError(`tensor ${name} has type ${ggmlTypeName(info.type)}; supported are ${types}`);
    }
    this.#used.add(name);
    return { ...info, shape: [...info.shape] };
  }

  get(name: string, ...shape: number[]): TensorRef {
    const tensor = this.any(name);
    if (tensor.shape.length !== shape.length || tensor.shape.some((dim, i) => dim !== shape[i])) {
      throw new UnsupportedModelError(`tensor ${name} has shape ${tensor.shape.join(" × ")}, not ${shape.join(" × ")}`);
    }
    return tensor;
  }

  /** What belongs to a product beside its matrix. */
  rest(name: string, rows: number): Omit<Linear, "weight"> {
    return {
      ...(this.has(`${name}.bias`) ? { bias: this.get(`${name}.bias`, rows) } : {}),
      ...(this.has(`${name}.scale`) ? { scale: this.get(`${name}.scale`, 1) } : {}),
    };
  }

  linear(name: string, cols: number, rows: number): Linear {
    return { weight: this.get(`${name}.weight`, cols, rows), ...this.rest(name, rows) };
  }

  /** One product whose rows are those of several: `rows` of each. */
  fused(name: string, cols: number, rows: readonly number[]): Linear[] {
    const { weight, bias, scale } = this.linear(name, cols, rows.reduce((a, b) => a + b));
    let first = 0;
    return rows.map((count) => {
      const part = {
        weight: rowsOf(weight, first, count),
        ...(bias === undefined ? {} : { bias: rowsOf(bias, first, count) }),
        ...(scale === undefined ? {} : { scale }),
      };
      first += count;
      return part;
    });
  }

  norm(name: string, ...shape: number[]): Norm {
    const weight = this.get(`${name}.weight`, ...shape);
    return this.has(`${name}.bias`) ? { weight, bias: this.get(`${name}.bias`, ...shape) } : { weight };
  }

  /** Names of those not asked for. */
  unused(): string[] {
    return [...this.#gguf.tensors.keys()].filter((name) => !this.#used.has(name));
  }
}

/** Rows of a matrix, or elements of a vector, as a tensor of their own. */
function rowsOf(tensor: TensorRef, first: number, count: number): TensorRef {
  const { shape: [width, of], rows, layout } = tensor;
  if (rows !== undefined || layout !== undefined) {
    if (rows !== undefined || layout?.kind === "parts" || of === undefined) {
      throw new UnsupportedModelError(`tensor ${tensor.name} cannot be split by rows`);
    }
    return { ...tensor, shape: [width!, count], rows: { of, first, block: count, stride: count } };
  }
  const { elements, bytes, trailer } = GGML_TYPES.get(tensor.type)!;
  const [cols, vector] = tensor.shape.length === 1 ? [1, true] : [tensor.shape[0]!, false];
  const row = (cols / elements) * bytes;
  if (!Number.isInteger(row) || trailer > 0) {
    throw new UnsupportedModelError(
      `tensor ${tensor.name} of type ${ggmlTypeName(tensor.type)} cannot be split by rows`,
    );
  }
  return {
    ...tensor,
    shape: vector ? [count] : [cols, count],
    offset: tensor.offset + first * row,
    bytes: count * row,
  };
}

function hyperOf(
  architecture: Architecture,
  file: ModelFile,
  tensors: Tensors,
  ropes: Rope[],
  normOffset: number | undefined,
): HyperParameters {
  const layers = file.size("block_count");
  if (layers > MAX_LAYERS) {
    throw new UnsupportedModelError(`${file.key("block_count")} ${layers} is impossibly large`);
  }
  const { heads, kvHeads, headDim, embedding } = headsOf(file);
  for (const { dims } of ropes) {
    if (dims > headDim || dims % 2 !== 0) {
      throw new UnsupportedModelError(`${file.key("rope.dimension_count")} is ${dims}`);
    }
  }
  const eps = `attention.layer_norm${architecture.norm === "rms" ? "_rms" : ""}_epsilon`;
  const moe = moeOf(architecture, file, tensors, layers);
  const hyper: HyperParameters = {
    layers,
    embedding,
    heads,
    kvHeads,
    headDim,
    feedForward: file.size("feed_forward_length"),
    vocab: tensors.any("token_embd.weight").shape[1] ?? 0,
    context: file.size("context_length"),
    norm: {
      kind: architecture.norm,
      eps: file.metadata.required(file.key(eps), file.positive(eps)),
      ...(normOffset === undefined ? {} : { offset: normOffset }),
    },
    activation: architecture.activation,
    ...(architecture.parallel?.(file) === true ? { parallel: true } : {}),
    ropes,
    ...(moe === undefined ? {} : { moe }),
  };
  return { ...hyper, ...architecture.extras?.(file, hyper) };
}

function headsOf(file: ModelFile): Pick<HyperParameters, "heads" | "kvHeads" | "headDim" | "embedding"> {
  const embedding = file.size("embedding_length");
  const heads = file.size("attention.head_count");
  const kvHeads = file.integer("attention.head_count_kv", 1) ?? heads;
  const headDim = file.integer("attention.key_length", 1) ?? embedding / heads;
  if (!Number.isInteger(headDim)) {
    throw new UnsupportedModelError(`${file.key("embedding_length")} ${embedding} is no multiple of ${heads} heads`);
  }
  if (heads % kvHeads !== 0) {
    throw new UnsupportedModelError(
      `${file.key("attention.head_count")} ${heads} is no multiple of head_count_kv ${kvHeads}`,
    );
  }
  const valueDim = file.integer("attention.value_length", 1) ?? headDim;
  if (valueDim !== headDim) {
    throw new UnsupportedModelError(`${file.key("attention.value_length")} ${valueDim} is not ${headDim}`);
  }
  return { heads, kvHeads, headDim, embedding };
}

/** The options of a mixture of experts, if the file has one. */
function moeOf(
  architecture: Architecture,
  file: ModelFile,
  tensors: Tensors,
  layers: number,
): MoeOptions | undefined {
  const experts = file.integer("expert_count") ?? 0;
  if (experts === 0) return undefined;
  if (architecture.moe === undefined) {
    throw new UnsupportedModelError(
      `${file.key("expert_count")} is ${experts}: such a model is not known to have experts`,
    );
  }
  const rows = (name: string) => {
    for (let i = 0; i < layers; i++) {
      if (tensors.has(`blk.${i}.${name}`)) return tensors.any(`blk.${i}.${name}`).shape[1];
    }
    return undefined;
  };
  const feedForward = rows("ffn_up_exps.weight");
  if (feedForward === undefined) {
    throw new UnsupportedModelError(
      tensors.has("blk.0.ffn_up.0.weight")
        ? "tensor blk.0.ffn_up.0.weight holds one expert alone, as files did before April 2024: convert the model again"
        : "tensor blk.0.ffn_up_exps.weight is missing",
    );
  }
  const shared = rows("ffn_up_shexp.weight");
  return {
    experts,
    used: file.size("expert_used_count"),
    feedForward,
    ...(shared === undefined ? {} : { sharedFeedForward: shared }),
    gating: "softmax",
    normalise: file.boolean("expert_weights_norm") ?? architecture.moe.normalise,
  };
}

/** The rotary embedding of most layers, then that of those with a window if it is another. */
function ropesOf(architecture: Architecture, file: ModelFile, tensors: Tensors, halves: boolean): Rope[] {
  if (architecture.rope === undefined) return [];
  const style = halves ? "neox" : architecture.rope;
  const { headDim } = headsOf(file);
  const dims = file.integer("rope.dimension_count", 2) ?? headDim;
  const scaling = scalingOf(file, tensors, dims);
  const base = file.positive("rope.freq_base") ?? 10000;
  const ropes: Rope[] = [{ base, dims, style, ...(scaling === undefined ? {} : { scaling }) }];
  if (architecture.windowRopeBase !== undefined) {
    ropes.push({ base: file.positive("rope.freq_base_swa") ?? architecture.windowRopeBase, dims, style });
  }
  return ropes;
}

function scalingOf(file: ModelFile, tensors: Tensors, dims: number): RopeScaling | undefined {
  const key = file.key("rope.scaling.type");
  const type = file.string("rope.scaling.type");
  const factor = file.positive("rope.scaling.factor") ?? file.positive("rope.scale_linear") ?? 1;
  const original = () => file.size("rope.scaling.original_context_length");
  const attention = file.positive("rope.scaling.attn_factor") ?? 1;
  const [short, long] = ["short", "long"].map((which) => file.positives(`rope.scaling.${which}_factors`));
  if (short !== undefined && long !== undefined) {
    return { kind: "longrope", short: [...short], long: [...long], original: original(), attention };
  }
  if (tensors.has("rope_factors_long.weight") || tensors.has("rope_factors_short.weight")) {
    const [long, short] = ["long", "short"].map((which) => tensors.get(`rope_factors_${which}.weight`, dims / 2));
    return { kind: "longrope", short: short!, long: long!, original: original(), attention };
  }
  if (tensors.has("rope_freqs.weight")) {
    return { kind: "factors", factors: tensors.get("rope_freqs.weight", dims / 2) };
  }
  if (type === undefined || type === "none" || factor === 1) return undefined;
  switch (type) {
    case "linear":
      return { kind: "linear", factor };
    case "yarn":
      return {
        kind: "yarn",
        factor,
        original: original(),
        betaFast: file.positive("rope.scaling.yarn_beta_fast") ?? 32,
        betaSlow: file.positive("rope.scaling.yarn_beta_slow") ?? 1,
        attention: attention * (1 + 0.1 * Math.log(factor)),
      };
    case "llama3": {
      const [low, high] = ["low", "high"].map((which) => file.positive(`rope.scaling.${which}_freq_factor`));
      return { kind: "llama3", factor, low: low ?? 1, high: high ?? 4, original: original() };
    }
    case "longrope":
      throw new UnsupportedModelError(`${key} is "longrope", but tensor rope_factors_long.weight is missing`);
    default:
      throw new UnsupportedModelError(
        `${key} ${JSON.stringify(type)} is not supported; there is linear, yarn, longrope`,
      );
  }
}

/** Which layers have a window, and its size. */
function windowOf(
  architecture: Architecture,
  file: ModelFile,
): { size: number; local(layer: number): boolean } | undefined {
  const size = architecture.window === undefined ? 0 : file.integer("attention.sliding_window") ?? 0;
  if (size === 0) return undefined;
  const { window } = architecture;
  return { size, local: (layer) => typeof window !== "object" || (layer + 1) % window.every !== 0 };
}

function layerOf(
  architecture: Architecture,
  file: ModelFile,
  tensors: Tensors,
  hyper: HyperParameters,
  index: number,
): Layer {
  const { embedding: d, heads, kvHeads, headDim } = hyper;
  const [wide, kvWide] = [heads * headDim, kvHeads * headDim];
  const at = (name: string) => `blk.${index}.${name}`;
  const names = { ...NORMS, ...architecture.normNames?.(file) };
  const wanted = (role: NormRole) =>
    architecture.norms.includes(role) ||
    architecture.optionalNorms?.includes(role) === true && tensors.has(at(`${names[role]}.weight`));
  const norm = <R extends NormRole>(role: R, ...shape: number[]) =>
    (wanted(role) ? { [role]: tensors.norm(at(names[role]), ...shape) } : {}) as { [K in R]?: Norm };
  /** Of each head, all with the same weights or each with its own, or of the whole row. */
  const headNorm = (role: "qNorm" | "kNorm", heads: number) => {
    const shape = wanted(role) ? tensors.any(at(`${names[role]}.weight`)).shape : [];
    const shapes = [[headDim, heads], [heads * headDim], [headDim]];
    return norm(role, ...shapes.find((s) => s.join() === shape.join()) ?? [headDim]);
  };
  const [q, k, v] = tensors.has(at("attn_qkv.weight"))
    ? tensors.fused(at("attn_qkv"), d, [wide, kvWide, kvWide])
    : [["q", wide] as const, ["k", kvWide] as const, ["v", kvWide] as const].map(([part, rows]) =>
      tensors.linear(at(`attn_${part}`), d, rows)
    );
  return {
    ...norm("attnNorm", d),
    q: q!,
    k: k!,
    v: v!,
    ...headNorm("qNorm", heads),
    ...headNorm("kNorm", kvHeads),
    ...norm("attnSubNorm", wide),
    o: tensors.linear(at("attn_output"), wide, d),
    ...norm("attnPostNorm", d),
    ...norm("ffnNorm", d),
    ...(hyper.moe !== undefined && tensors.has(at("ffn_gate_inp.weight"))
      ? { moe: moeLayer(architecture, tensors, hyper, hyper.moe, at) }
      : {
        mlp: {
          ...mlpOf(architecture, tensors, d, hyper.feedForward, at, ""),
          ...subNorm(norm("ffnSubNorm", hyper.feedForward)),
        },
      }),
    ...norm("ffnPostNorm", d),
  };
}

function subNorm({ ffnSubNorm }: { ffnSubNorm?: Norm }): { subNorm?: Norm } {
  return ffnSubNorm === undefined ? {} : { subNorm: ffnSubNorm };
}

function mlpOf(
  architecture: Architecture,
  tensors: Tensors,
  d: number,
  ff: number,
  at: (name: string) => string,
  suffix: string,
): Mlp {
  const [gate, up, down] = ["gate", "up", "down"].map((part) => at(`ffn_${part}${suffix}`));
  const last = { down: tensors.linear(down!, ff, d) };
  if (!architecture.gated) return { up: tensors.linear(up!, d, ff), ...last };
  if (tensors.has(`${gate!}.weight`)) {
    return { gate: tensors.linear(gate!, d, ff), up: tensors.linear(up!, d, ff), ...last };
  }
  const [first, second] = tensors.fused(up!, d, [ff, ff]);
  return { gate: first!, up: second!, ...last };
}

function moeLayer(
  architecture: Architecture,
  tensors: Tensors,
  { embedding: d }: HyperParameters,
  { experts, feedForward: ff, sharedFeedForward }: MoeOptions,
  at: (name: string) => string,
): Moe {
  const shared = at("ffn_gate_inp_shexp.weight");
  return {
    router: tensors.linear(at("ffn_gate_inp"), d, experts),
    gate: tensors.get(at("ffn_gate_exps.weight"), d, ff, experts),
    up: tensors.get(at("ffn_up_exps.weight"), d, ff, experts),
    down: tensors.get(at("ffn_down_exps.weight"), ff, d, experts),
    ...(sharedFeedForward === undefined
      ? {}
      : { shared: mlpOf(architecture, tensors, d, sharedFeedForward, at, "_shexp") }),
    ...(tensors.has(shared) ? { sharedGate: { weight: asRow(tensors.any(shared), d) } } : {}),
  };
}

/** A vector as a matrix of one row. */
function asRow(tensor: TensorRef, cols: number): TensorRef {
  if (tensor.shape.reduce((a, b) => a * b, 1) !== cols) {
    throw new UnsupportedModelError(`tensor ${tensor.name} has shape ${tensor.shape.join(" × ")}, not ${cols}`);
  }
  return { ...tensor, shape: [cols, 1] };
}
