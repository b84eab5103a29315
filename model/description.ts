import { llama } from "./architectures/llama.ts";
import { UnsupportedModelError } from "./errors.ts";
import { GGML_TYPES, ggmlTypeName } from "./ggml_types.ts";
import type { GgufFile, TensorInfo } from "./gguf.ts";
import { Metadata } from "./metadata.ts";

/** A tensor that a shard needs. */
export type TensorRef = TensorInfo;

/** The numbers that shape a model. */
export interface HyperParameters {
  readonly layers: number;
  /** Width of the hidden state. */
  readonly embedding: number;
  readonly heads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly feedForward: number;
  readonly vocab: number;
  /** Most tokens that the model was made for. */
  readonly context: number;
  readonly rmsEps: number;
  readonly rope: { readonly base: number; readonly dims: number; readonly style: "norm" | "neox" };
}

/** The tensors of a layer, by role. */
export interface LayerTensors {
  readonly attnNorm: TensorRef;
  readonly q: TensorRef;
  readonly k: TensorRef;
  readonly v: TensorRef;
  readonly o: TensorRef;
  readonly ffnNorm: TensorRef;
  readonly gate: TensorRef;
  readonly up: TensorRef;
  readonly down: TensorRef;
}

/** What the kernels need to know of a model. */
export interface ModelDescription {
  readonly architecture: string;
  readonly name?: string;
  readonly hyper: HyperParameters;
  readonly embedding: TensorRef;
  readonly head: { readonly norm: TensorRef; readonly output: TensorRef };
  readonly layers: readonly LayerTensors[];
  /** Number of weights. */
  readonly parameters: number;
}

/** How an architecture's files are read. One file in `architectures/` each. */
export interface Architecture {
  readonly name: string;
  hyper(metadata: Metadata, gguf: GgufFile): HyperParameters;
  /** Tensor names by role; `N` stands for the layer's number. */
  readonly tensors: {
    readonly embedding: string;
    readonly norm: string;
    /** Falls back to the embedding (tied weights). */
    readonly output: string;
    readonly layer: Readonly<Record<keyof LayerTensors, string>>;
  };
}

const ARCHITECTURES: ReadonlyMap<string, Architecture> = new Map([llama].map((a) => [a.name, a]));

/**
 * Reads the model out of a GGUF.
 *
 * @throws {UnsupportedModelError} naming the architecture, key or tensor that cannot be used.
 */
export function describeModel(gguf: GgufFile): ModelDescription {
  const metadata = new Metadata(gguf);
  const name = metadata.required("general.architecture", metadata.string("general.architecture"));
  const architecture = ARCHITECTURES.get(name);
  if (architecture === undefined) {
    throw new UnsupportedModelError(
      `architecture ${JSON.stringify(name)} is not supported; there is ${[...ARCHITECTURES.keys()].join(", ")}`,
    );
  }
  const own = architecture.hyper(metadata, gguf);
  const hyper = gguf.rotaryHalves === true ? { ...own, rope: { ...own.rope, style: "neox" as const } } : own;
  const { tensors: names } = architecture;
  const used = new Set<string>();
  const tensor = (key: string, ...shape: number[]): TensorRef => {
    const info = gguf.tensors.get(key);
    if (info === undefined) throw new UnsupportedModelError(`tensor ${key} is missing`);
    if (info.shape.length !== shape.length || info.shape.some((dim, i) => dim !== shape[i])) {
      throw new UnsupportedModelError(`tensor ${key} has shape ${info.shape.join(" × ")}, not ${shape.join(" × ")}`);
    }
    if (GGML_TYPES.get(info.type)?.supported !== true) {
      const types = [...GGML_TYPES.values()].filter((t) => t.supported).map((t) => t.name).join(", ");
      throw new UnsupportedModelError(`tensor ${key} has type ${ggmlTypeName(info.type)}; supported are ${types}`);
    }
    used.add(key);
    return info;
  };
  const { embedding: d, heads, kvHeads, headDim, feedForward: ff, vocab } = hyper;
  const [q, kv] = [heads * headDim, kvHeads * headDim];
  const embedding = tensor(names.embedding, d, vocab);
  const norm = tensor(names.norm, d);
  const output = gguf.tensors.has(names.output) ? tensor(names.output, d, vocab) : embedding;
  const layers = Array.from({ length: hyper.layers }, (_, i): LayerTensors => {
    const at = (role: keyof LayerTensors, ...shape: number[]) =>
      tensor(names.layer[role].replace("N", String(i)), ...shape);
    return {
      attnNorm: at("attnNorm", d),
      q: at("q", d, q),
      k: at("k", d, kv),
      v: at("v", d, kv),
      o: at("o", q, d),
      ffnNorm: at("ffnNorm", d),
      gate: at("gate", d, ff),
      up: at("up", d, ff),
      down: at("down", ff, d),
    };
  });
  // A tensor left over would change the result if it were read (a bias, say): better no answer than a wrong one.
  const left = [...gguf.tensors.keys()].filter((key) => !used.has(key));
  if (left.length > 0) throw new UnsupportedModelError(`tensor ${left[0]} is not understood (${left.length} such)`);
  let parameters = 0;
  for (const { shape } of gguf.tensors.values()) parameters += shape.reduce((a, b) => a * b, 1);
  const title = metadata.string("general.name");
  return {
    architecture: name,
    ...(title === undefined ? {} : { name: title }),
    hyper,
    embedding,
    head: { norm, output },
    layers,
    parameters,
  };
}
