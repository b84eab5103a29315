/**
 * `config.json` in the words of GGUF: which architecture a `model_type` is, and its hyper-parameters.
 *
 * @module
 */
import { z } from "zod";
import type { Activation } from "../bus/shard.ts";
import { ARCHITECTURES } from "./architectures/mod.ts";
import { UnsupportedModelError } from "./errors.ts";
import type { GgufValue } from "./gguf.ts";

const count = z.number().int().min(1).max(2 ** 31);
const ids = z.union([z.number().int().transform((id) => [id]), z.array(z.number().int())]);
const factors = z.array(z.number()).max(1 << 15);
const rope = z.looseObject({
  rope_type: z.string().nullish(),
  type: z.string().nullish(),
  rope_theta: z.number().nullish(),
  partial_rotary_factor: z.number().nullish(),
  factor: z.number().nullish(),
  original_max_position_embeddings: z.number().nullish(),
  attention_factor: z.number().nullish(),
  low_freq_factor: z.number().nullish(),
  high_freq_factor: z.number().nullish(),
  beta_fast: z.number().nullish(),
  beta_slow: z.number().nullish(),
  short_factor: factors.nullish(),
  long_factor: factors.nullish(),
});
type Rope = z.infer<typeof rope>;

const quantizationSchema = z.looseObject({
  quant_method: z.string().nullish(),
  // GPTQ
  bits: z.number().nullish(),
  group_size: z.number().int().min(-1).nullish(),
  checkpoint_format: z.string().nullish(),
  format: z.string().nullish(),
  // AWQ
  w_bit: z.number().nullish(),
  q_group_size: z.number().int().min(-1).nullish(),
  version: z.string().nullish(),
  // BitNet
  linear_class: z.string().nullish(),
  quantization_mode: z.string().nullish(),
  use_rms_norm: z.boolean().nullish(),
  modules_to_not_convert: z.array(z.string()).nullish(),
});
/** How a folder's matrices are quantised. */
export type Quantization = z.infer<typeof quantizationSchema>;

const configSchema = z.looseObject({
  model_type: z.string(),
  hidden_size: count.nullish(),
  n_embd: count.nullish(),
  num_hidden_layers: count.nullish(),
  n_layer: count.nullish(),
  num_attention_heads: count.nullish(),
  n_head: count.nullish(),
  num_key_value_heads: count.nullish(),
  num_kv_heads: count.nullish(),
  multi_query: z.boolean().nullish(),
  new_decoder_architecture: z.boolean().nullish(),
  head_dim: count.nullish(),
  intermediate_size: count.nullish(),
  ffn_hidden_size: count.nullish(),
  n_inner: count.nullish(),
  moe_intermediate_size: count.nullish(),
  vocab_size: count.nullish(),
  max_position_embeddings: count.nullish(),
  n_positions: count.nullish(),
  rms_norm_eps: z.number().nullish(),
  layer_norm_eps: z.number().nullish(),
  layer_norm_epsilon: z.number().nullish(),
  norm_epsilon: z.number().nullish(),
  hidden_act: z.string().nullish(),
  hidden_activation: z.string().nullish(),
  activation_function: z.string().nullish(),
  activation: z.string().nullish(),
  rope_theta: z.number().nullish(),
  rope_local_base_freq: z.number().nullish(),
  partial_rotary_factor: z.number().nullish(),
  original_max_position_embeddings: z.number().nullish(),
  rope_scaling: rope.nullish(),
  rope_parameters: rope.extend({ full_attention: rope.nullish(), sliding_attention: rope.nullish() }).nullish(),
  tie_word_embeddings: z.boolean().nullish(),
  sliding_window: z.number().nullish(),
  use_sliding_window: z.boolean().nullish(),
  layer_types: z.array(z.string()).max(4096).nullish(),
  num_local_experts: count.nullish(),
  num_experts: count.nullish(),
  num_experts_per_tok: count.nullish(),
  norm_topk_prob: z.boolean().nullish(),
  query_pre_attn_scalar: z.number().nullish(),
  attn_logit_softcapping: z.number().nullish(),
  final_logit_softcapping: z.number().nullish(),
  quantization_config: quantizationSchema.nullish(),
  eos_token_id: ids.nullish(),
});
/** A checked `config.json`. */
export type Config = z.infer<typeof configSchema>;

/** A `model_type`. */
export interface FolderType {
  /** GGUF's name of the architecture. */
  readonly architecture: string | ((config: Config) => string);
  /** Fraction of a head that is rotated, where the configuration does not say. Default: 1. */
  readonly rotated?: number;
  /** Values that options must have if they are given: others change what layers do. */
  readonly only?: Readonly<Record<string, unknown>>;
  /** Tensors' names, beside those that all share (`hugging_face_tensors.ts`). */
  readonly names?: Readonly<Record<string, string>>;
  /** Whether matrices of layers are stored with columns first. */
  readonly transposed?: true;
  /** Added to the weights of norms. */
  readonly normOffset?: number;
  /** Whether the window of the configuration counts. */
  readonly window?: true;
}

/** Names of norms before and after each part. */
const SANDWICH = {
  "post_attention_layernorm": "post_attention_norm",
  "pre_feedforward_layernorm": "ffn_norm",
  "post_feedforward_layernorm": "post_ffw_norm",
} as const;

/** All that can be run. */
export const FOLDER_TYPES: Readonly<Record<string, FolderType>> = {
  llama: { architecture: "llama" },
  mistral: { architecture: "llama", window: true },
  mixtral: { architecture: "llama", window: true },
  qwen2: { architecture: "qwen2" },
  qwen2_moe: { architecture: "qwen2moe" },
  qwen3: { architecture: "qwen3" },
  qwen3_moe: { architecture: "qwen3moe" },
  phi: { architecture: "phi2", rotated: 0.5, only: { qk_layernorm: false } },
  phi3: { architecture: "phi3", window: true },
  gemma: { architecture: "gemma", normOffset: 1 },
  gemma2: { architecture: "gemma2", normOffset: 1, window: true, names: SANDWICH },
  gemma3_text: {
    architecture: "gemma3",
    normOffset: 1,
    window: true,
    names: SANDWICH,
    only: {
      use_bidirectional_attention: false,
      sliding_window_pattern: 6,
      _sliding_window_pattern: 6,
      attn_logit_softcapping: undefined,
    },
  },
  starcoder2: { architecture: "starcoder2", window: true },
  gpt2: {
    architecture: "gpt2",
    transposed: true,
    only: {
      reorder_and_upcast_attn: false,
      scale_attn_by_inverse_layer_idx: false,
      scale_attn_weights: true,
      add_cross_attention: false,
    },
  },
  stablelm: { architecture: "stablelm", rotated: 0.25 },
  falcon: {
    architecture: "falcon",
    names: { "ln_attn": "attn_norm_2", "ln_mlp": "attn_norm" },
    only: { alibi: false, parallel_attn: true, bias: false, apply_residual_connection_post_layernorm: false },
  },
  bitnet: { architecture: ({ hidden_act: act }) => act === "silu" ? "bitnet" : "bitnet-b1.58" },
};

const ACTIVATIONS: Readonly<Record<string, Activation>> = {
  silu: "silu",
  swish: "silu",
  gelu: "gelu",
  gelu_new: "gelu-tanh",
  gelu_fast: "gelu-tanh",
  gelu_pytorch_tanh: "gelu-tanh",
  relu: "relu",
  relu2: "relu-squared",
};

/**
 * Checks a `config.json`, and what of it must have a certain value.
 *
 * @throws {UnsupportedModelError} naming what is wrong.
 */
export function checkedConfig(json: unknown): { config: Config; type: FolderType; architecture: string } {
  const parsed = configSchema.safeParse(json);
  if (!parsed.success) {
    const [issue] = parsed.error.issues;
    throw new UnsupportedModelError(`config.json: ${issue?.path.join(".") || "it"} is wrong: ${issue?.message}`, {
      cause: parsed.error,
    });
  }
  const config = parsed.data;
  const { model_type: name } = config;
  const type = Object.hasOwn(FOLDER_TYPES, name) ? FOLDER_TYPES[name]! : undefined;
  if (type === undefined) {
    throw new UnsupportedModelError(
      `model_type ${JSON.stringify(name)} is not supported in safetensors; there are ${
        Object.keys(FOLDER_TYPES).join(", ")
      }`,
    );
  }
  for (const [key, value] of Object.entries(type.only ?? {})) {
    const found = config[key] ?? undefined;
    if (found !== undefined && found !== value) {
      throw new UnsupportedModelError(`config.json: ${key} is ${JSON.stringify(found)}, which ${name} cannot have yet`);
    }
  }
  const architecture = typeof type.architecture === "string" ? type.architecture : type.architecture(config);
  return { config, type, architecture };
}

/** Checks what a file says of quantisation. */
export function checkedQuantization(json: unknown, file: string): Quantization {
  const parsed = quantizationSchema.safeParse(json);
  if (parsed.success) return parsed.data;
  throw new UnsupportedModelError(`${file} is malformed: ${parsed.error.issues[0]?.message}`, { cause: parsed.error });
}

/** KV heads, of Falcon's two ways to say it too. */
export function kvHeadsOf(config: Config): number | undefined {
  if (config.model_type !== "falcon") return config.num_key_value_heads ?? undefined;
  const { multi_query: one, new_decoder_architecture: grouped, num_kv_heads: count } = config;
  return grouped === true ? count ?? undefined : one === false ? undefined : 1;
}

/**
 * The hyper-parameters under the names that GGUF gives them.
 *
 * @throws {UnsupportedModelError} naming what is missing or not supported.
 */
export function metadataOf(
  { config, type, architecture }: ReturnType<typeof checkedConfig>,
): Map<string, GgufValue> {
  const metadata = new Map<string, GgufValue>([["general.architecture", architecture]]);
  const set = (key: string, value: GgufValue | null | undefined) => {
    if (value !== null && value !== undefined) metadata.set(`${architecture}.${key}`, value);
  };
  const required = (name: string, value: number | null | undefined): number => {
    if (value === null || value === undefined) throw new UnsupportedModelError(`config.json: ${name} is missing`);
    return value;
  };
  const known = ARCHITECTURES.find(({ name }) => name === architecture)!;
  const embedding = required("hidden_size", config.hidden_size ?? config.n_embd);
  const heads = required("num_attention_heads", config.num_attention_heads ?? config.n_head);
  const context = config.max_position_embeddings ?? config.n_positions ??
    (config.model_type === "falcon" ? 2048 : undefined);
  set("block_count", required("num_hidden_layers", config.num_hidden_layers ?? config.n_layer));
  set("embedding_length", embedding);
  set("attention.head_count", heads);
  set("attention.head_count_kv", kvHeadsOf(config));
  set("attention.key_length", config.head_dim);
  set("attention.value_length", config.head_dim);
  const fourfold = ["gpt2", "falcon"].includes(config.model_type) ? 4 * embedding : undefined;
  const feedForward = config.intermediate_size ?? config.ffn_hidden_size ?? config.n_inner ?? fourfold;
  set("feed_forward_length", required("intermediate_size", feedForward));
  set("context_length", required("max_position_embeddings", context));
  const eps = config.rms_norm_eps ?? config.layer_norm_eps ?? config.layer_norm_epsilon ?? config.norm_epsilon;
  set(
    known.norm === "rms" ? "attention.layer_norm_rms_epsilon" : "attention.layer_norm_epsilon",
    required(known.norm === "rms" ? "rms_norm_eps" : "layer_norm_eps", eps),
  );

  // Gemma has always computed tanh-GELU, whatever `hidden_act` said.
  const gemma = architecture.startsWith("gemma");
  const act = config.hidden_activation ??
    (gemma ? undefined : config.hidden_act ?? config.activation_function ?? config.activation);
  if (act !== null && act !== undefined) {
    if ((Object.hasOwn(ACTIVATIONS, act) ? ACTIVATIONS[act] : undefined) !== known.activation) {
      throw new UnsupportedModelError(`hidden_act is ${act}, not ${known.activation}`);
    }
  }
  setWindow(config, type, known.window, required("max_position_embeddings", context), set);
  if (known.rope !== undefined) setRope(config, type, config.head_dim ?? embedding / heads, set);

  const experts = config.num_local_experts ?? config.num_experts;
  if (known.moe !== undefined && experts !== null && experts !== undefined) {
    set("expert_count", experts);
    set("expert_used_count", required("num_experts_per_tok", config.num_experts_per_tok));
    set("expert_weights_norm", config.norm_topk_prob);
  }
  if (gemma) {
    set("attn_logit_softcapping", config.attn_logit_softcapping);
    set("final_logit_softcapping", config.final_logit_softcapping);
    const scalar = config.query_pre_attn_scalar;
    if (scalar !== null && scalar !== undefined) set("attention.scale", 1 / Math.sqrt(scalar));
  }
  return metadata;
}

type Set = (key: string, value: GgufValue | null | undefined) => void;

function setWindow(
  config: Config,
  type: FolderType,
  window: "all" | { readonly every: number } | undefined,
  context: number,
  set: Set,
): void {
  const size = config.use_sliding_window === false ? undefined : config.sliding_window ?? undefined;
  const local = type.window === true && size !== undefined;
  if (local) set("attention.sliding_window", size);
  else if (size !== undefined && size > 0 && size < context) {
    throw new UnsupportedModelError(`sliding_window is ${size}: ${config.model_type} cannot have one yet`);
  }
  for (const [i, found] of (config.layer_types ?? []).entries()) {
    const sliding = local && (typeof window !== "object" || (i + 1) % window.every !== 0);
    const expected = sliding ? "sliding_attention" : "full_attention";
    if (found !== expected) {
      throw new UnsupportedModelError(`layer_types: layer ${i} has ${found}, not ${expected}, which cannot be run yet`);
    }
  }
}

function setRope(config: Config, type: FolderType, headDim: number, set: Set): void {
  const { rope_parameters: parameters, rope_scaling: old } = config;
  const full: Rope = parameters?.full_attention ?? parameters ?? old ?? {};
  // Before `rope_parameters`, Gemma 3's bases had other defaults.
  set(
    "rope.freq_base",
    full.rope_theta ?? config.rope_theta ?? (config.model_type === "gemma3_text" ? 1e6 : undefined),
  );
  set("rope.freq_base_swa", parameters?.sliding_attention?.rope_theta ?? config.rope_local_base_freq);
  const fraction = full.partial_rotary_factor ?? config.partial_rotary_factor ?? type.rotated ?? 1;
  if (fraction !== 1) set("rope.dimension_count", Math.floor(headDim * fraction));
  const kind = full.rope_type ?? full.type ?? "default";
  const sliding = parameters?.sliding_attention?.rope_type ?? "default";
  const unsupported = (why: string) => new UnsupportedModelError(`rope scaling ${kind} ${why}`);
  if (sliding !== "default") throw unsupported(`beside ${sliding} in layers with a window is not supported`);
  if (kind === "default") return;
  const need = (name: keyof Rope, value: number | null | undefined) => {
    if (value === null || value === undefined) throw unsupported(`has no ${name}`);
    return value;
  };
  const context = config.max_position_embeddings;
  const original = full.original_max_position_embeddings ?? config.original_max_position_embeddings;
  switch (kind) {
    case "linear":
      break;
    case "llama3":
      set("rope.scaling.low_freq_factor", need("low_freq_factor", full.low_freq_factor));
      set("rope.scaling.high_freq_factor", need("high_freq_factor", full.high_freq_factor));
      set("rope.scaling.original_context_length", need("original_max_position_embeddings", original));
      break;
    case "yarn": {
      const odd = ["mscale", "mscale_all_dim"].find((key) => (full[key] ?? undefined) !== undefined);
      if (odd !== undefined || full.truncate === false) throw unsupported(`with ${odd ?? "truncate"} is not supported`);
      const factor = need("factor", full.factor);
      set("rope.scaling.original_context_length", original ?? context);
      set("rope.scaling.yarn_beta_fast", full.beta_fast);
      set("rope.scaling.yarn_beta_slow", full.beta_slow);
      const attention = full.attention_factor ?? undefined;
      if (attention !== undefined) set("rope.scaling.attn_factor", attention / (1 + 0.1 * Math.log(factor)));
      break;
    }
    case "su":
    case "longrope": {
      const before = need("original_max_position_embeddings", original);
      for (const which of ["short", "long"] as const) {
        const values = full[`${which}_factor`] ?? undefined;
        if (values === undefined) throw unsupported(`has no ${which}_factor`);
        set(`rope.scaling.${which}_factors`, values);
      }
      const factor = (context ?? before) / before;
      const attention = full.attention_factor ?? (factor <= 1 ? 1 : Math.sqrt(1 + Math.log(factor) / Math.log(before)));
      set("rope.scaling.original_context_length", before);
      set("rope.scaling.attn_factor", attention);
      return set("rope.scaling.type", "longrope");
    }
    default:
      throw unsupported("is not supported in safetensors; there are linear, llama3, yarn, longrope");
  }
  set("rope.scaling.type", kind);
  set("rope.scaling.factor", need("factor", full.factor));
}
