/**
 * What tells one architecture from another, as data. A file in `architectures/` each; {@linkcode describeModel} reads it.
 *
 * GGUF names tensors alike in all architectures, so that most of it needs no saying: a product's `bias` and `scale`, fused
 * or separate Q/K/V and gate/up, experts, an untied head, and factors of the rotary embedding are used where the file has
 * them. What no architecture's description accounts for is refused.
 *
 * @module
 */
import type { Activation, HyperParameters } from "../bus/shard.ts";
import { UnsupportedModelError } from "./errors.ts";
import type { GgufFile } from "./gguf.ts";
import { Metadata } from "./metadata.ts";

/** Norms of a layer by role, and the tensor's name in the layer. */
export const NORMS = {
  attnNorm: "attn_norm",
  qNorm: "attn_q_norm",
  kNorm: "attn_k_norm",
  attnSubNorm: "attn_sub_norm",
  attnPostNorm: "post_attention_norm",
  ffnNorm: "ffn_norm",
  ffnSubNorm: "ffn_sub_norm",
  ffnPostNorm: "post_ffw_norm",
} as const;

/** A norm's place in a layer. */
export type NormRole = keyof typeof NORMS;

/** Options that the kernels know beside those with a field of their own in {@linkcode Architecture}. */
export type Extras = Pick<
  HyperParameters,
  "embeddingScale" | "attentionScale" | "attentionSoftcap" | "residualScale" | "logitScale" | "logitSoftcap"
>;

/** How an architecture's files are read, and what its layers do. */
export interface Architecture {
  /** `general.architecture`, which is also the prefix of its keys. */
  readonly name: string;
  /** Other names of the same. */
  readonly aliases?: readonly string[];
  /** What people know that is written so. */
  readonly models: string;
  readonly norm: "rms" | "layer";
  /** Norms that every layer has. */
  readonly norms: readonly NormRole[];
  /** Norms that only some models' layers have. */
  readonly optionalNorms?: readonly NormRole[];
  /** Where a model's files name norms otherwise. */
  normNames?(file: ModelFile): Partial<Record<NormRole, string>>;
  readonly activation: Activation;
  /** Whether the feed-forward multiplies what it activates with another product. */
  readonly gated: boolean;
  /** Whether attention and feed-forward both start from the layer's input. Default: they do not. */
  parallel?(file: ModelFile): boolean;
  /** Pairs of the rotary embedding; absent: none. */
  readonly rope?: "norm" | "neox";
  /** Whether there is a table of positions. */
  readonly positions?: boolean;
  /** Layers with a sliding window, if the file names its size: all, or all but every `every`-th. */
  readonly window?: "all" | { readonly every: number };
  /** The rotary base of layers with a window, unscaled; absent: as in the others. */
  readonly windowRopeBase?: number;
  /** For mixtures of experts: whether the chosen ones' weights are divided by their sum. */
  readonly moe?: { readonly normalise: boolean };
  extras?(file: ModelFile, hyper: HyperParameters): Extras;
}

/** A model file's keys, under the architecture's prefix, and its tensors. */
export class ModelFile {
  readonly metadata: Metadata;
  readonly #gguf: GgufFile;
  readonly #prefix: string;

  constructor(gguf: GgufFile, prefix: string) {
    this.#gguf = gguf;
    this.#prefix = prefix;
    this.metadata = new Metadata(gguf);
  }

  /** The key's full name. */
  key(name: string): string {
    return `${this.#prefix}.${name}`;
  }

  /** An integer from 1 on, which must be there. */
  size(name: string): number {
    return this.metadata.required(this.key(name), this.metadata.integer(this.key(name), 1));
  }

  integer(name: string, min = 0): number | undefined {
    return this.metadata.integer(this.key(name), min);
  }

  number(name: string): number | undefined {
    return this.metadata.number(this.key(name));
  }

  /** A number above 0, if it is there. */
  positive(name: string): number | undefined {
    const value = this.number(name);
    if (value !== undefined && !(value > 0)) throw new UnsupportedModelError(`${this.key(name)} is ${value}`);
    return value;
  }

  boolean(name: string): boolean | undefined {
    return this.metadata.boolean(this.key(name));
  }

  /** Numbers above 0. */
  positives(name: string): readonly number[] | undefined {
    const values = this.metadata.numbers(this.key(name));
    const wrong = values?.find((value) => !(value > 0));
    if (wrong !== undefined) throw new UnsupportedModelError(`${this.key(name)} has ${wrong}`);
    return values;
  }

  string(name: string): string | undefined {
    return this.metadata.string(this.key(name));
  }

  /** Whether there is a tensor of that name. */
  has(tensor: string): boolean {
    return this.#gguf.tensors.has(tensor);
  }
}
