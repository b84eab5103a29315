/**
 * Models as Hugging Face's libraries keep them: a folder with `config.json`, `tokenizer.json` and safetensors. They are read
 * as if they were GGUF: the same keys, names and shapes, so that there is one way from there.
 *
 * @module
 */
import { readFileSync, statSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import { z } from "zod";
import type { ModelShape } from "./catalogue.ts";
import { TokenizerError, UnsupportedModelError } from "./errors.ts";
import type { GgufFile, GgufValue, TensorInfo } from "./gguf.ts";
import { tokenizerOfJson } from "./hugging_face_tokenizer.ts";
import { readSafetensorsFolder } from "./safetensors.ts";
import type { Tokenizer } from "./tokenizer.ts";

const count = z.number().int().min(1);
const ids = z.union([z.number().int().transform((id) => [id]), z.array(z.number().int())]);
const rope = z.looseObject({
  rope_type: z.string().optional(),
  type: z.string().optional(),
  factor: z.number().optional(),
});
const configSchema = z.looseObject({
  model_type: z.string(),
  _name_or_path: z.string().nullish(),
  hidden_size: count,
  num_hidden_layers: count,
  num_attention_heads: count,
  num_key_value_heads: count.nullish(),
  head_dim: count.nullish(),
  intermediate_size: count,
  vocab_size: count.nullish(),
  max_position_embeddings: count,
  rms_norm_eps: z.number(),
  hidden_act: z.string().nullish(),
  rope_theta: z.number().nullish(),
  rope_scaling: rope.nullish(),
  rope_parameters: rope.extend({ rope_theta: z.number().optional() }).nullish(),
  tie_word_embeddings: z.boolean().nullish(),
  sliding_window: z.number().nullish(),
  use_sliding_window: z.boolean().nullish(),
  quantization_config: z.looseObject({ quant_method: z.string().optional() }).nullish(),
  eos_token_id: ids.nullish(),
});

/** GGUF's name of each architecture. */
const ARCHITECTURES: Readonly<Record<string, string>> = {
  llama: "llama",
  mistral: "llama",
  qwen2: "qwen2",
  qwen3: "qwen3",
};
/** GGUF's numbers of types that need no conversion. */
const TYPES: Readonly<Record<string, number>> = { F32: 0, F16: 1, BF16: 30 };
const TENSORS: Readonly<Record<string, string>> = {
  "model.embed_tokens": "token_embd",
  "model.norm": "output_norm",
  "lm_head": "output",
};
const LAYER_TENSORS: Readonly<Record<string, string>> = {
  "input_layernorm": "attn_norm",
  "self_attn.q_proj": "attn_q",
  "self_attn.k_proj": "attn_k",
  "self_attn.v_proj": "attn_v",
  "self_attn.o_proj": "attn_output",
  "self_attn.q_norm": "attn_q_norm",
  "self_attn.k_norm": "attn_k_norm",
  "post_attention_layernorm": "ffn_norm",
  "mlp.gate_proj": "ffn_gate",
  "mlp.up_proj": "ffn_up",
  "mlp.down_proj": "ffn_down",
};

/** A folder's model, as a GGUF would describe it, and its tokenizer. */
export interface FolderModel {
  readonly gguf: GgufFile;
  readonly tokenizer: Tokenizer;
}

/** Whether a path is a folder that holds a model. */
export function isModelFolder(path: string): boolean {
  return statSync(path, { throwIfNoEntry: false })?.isDirectory() === true;
}

/**
 * Reads a model's folder: everything but its weights.
 *
 * @throws {ModelError} naming what is missing, malformed or not supported.
 */
export function readModelFolder(folder: string): FolderModel {
  const config = checkedConfig(required(folder, "config.json"));
  const { quantization_config: quantized, model_type: kind } = config;
  const architecture = Object.hasOwn(ARCHITECTURES, kind) ? ARCHITECTURES[kind]! : undefined;
  if (architecture === undefined) {
    throw new UnsupportedModelError(
      `model_type ${JSON.stringify(kind)} is not supported in safetensors; there are ${
        Object.keys(ARCHITECTURES).join(", ")
      }`,
    );
  }
  if (quantized !== null && quantized !== undefined) {
    throw new UnsupportedModelError(
      `safetensors quantised by ${
        quantized.quant_method ?? "an unnamed method"
      } are not supported yet; take a GGUF of it`,
    );
  }
  const tensors = tensorsOf(folder, config.tie_word_embeddings === true);
  const generation = optional(folder, "generation_config.json") as { eos_token_id?: unknown } | undefined;
  const tokenizerConfig = optional(folder, "tokenizer_config.json");
  const tokenizer = tokenizerOfJson(required(folder, "tokenizer.json"), {
    config: tokenizerConfig,
    eosIds: ids.safeParse(generation?.eos_token_id).data ?? config.eos_token_id ?? [],
  });
  const template = templateOf(folder, tokenizerConfig);
  const metadata = metadataOf(config, architecture);
  if (template !== undefined) metadata.set("tokenizer.chat_template", template);
  const path = [...new Set([...tensors.values()].map(({ file }) => file))];
  if (path.length !== 1) {
    throw new UnsupportedModelError(`${folder} has its tensors in ${path.length} files; only one can be run yet`);
  }
  return {
    gguf: {
      path: path[0]!,
      version: 0,
      size: statSync(path[0]!).size,
      alignment: 1,
      metadata,
      tensors: new Map([...tensors].map(([name, { file: _, ...info }]) => [name, info])),
      dataOffset: Math.min(...[...tensors.values()].map(({ offset }) => offset)),
      rotaryHalves: true,
    },
    tokenizer,
  };
}

function checkedConfig(json: unknown): z.infer<typeof configSchema> {
  const parsed = configSchema.safeParse(json);
  if (parsed.success) return parsed.data;
  const [issue] = parsed.error.issues;
  throw new UnsupportedModelError(`config.json: ${issue?.path.join(".") || "it"} is wrong: ${issue?.message}`, {
    cause: parsed.error,
  });
}

function metadataOf(config: z.infer<typeof configSchema>, architecture: string): Map<string, GgufValue> {
  const metadata = new Map<string, GgufValue>([["general.architecture", architecture]]);
  const set = (key: string, value: GgufValue | null | undefined) => {
    if (value !== null && value !== undefined) metadata.set(`${architecture}.${key}`, value);
  };
  if ((config.hidden_act ?? "silu") !== "silu") {
    throw new UnsupportedModelError(`hidden_act is ${config.hidden_act}, not silu`);
  }
  const { sliding_window: window, max_position_embeddings: context } = config;
  if (config.use_sliding_window !== false && window !== null && window !== undefined && window < context) {
    throw new UnsupportedModelError(
      `sliding_window is ${window}: sliding windows are not supported in safetensors yet`,
    );
  }
  set("block_count", config.num_hidden_layers);
  set("embedding_length", config.hidden_size);
  set("attention.head_count", config.num_attention_heads);
  set("attention.head_count_kv", config.num_key_value_heads);
  set("attention.key_length", config.head_dim);
  set("attention.value_length", config.head_dim);
  set("feed_forward_length", config.intermediate_size);
  set("context_length", context);
  set("attention.layer_norm_rms_epsilon", config.rms_norm_eps);
  set("rope.freq_base", config.rope_parameters?.rope_theta ?? config.rope_theta);
  const scaling = config.rope_parameters ?? config.rope_scaling;
  const type = scaling?.rope_type ?? scaling?.type ?? "default";
  if (type !== "default") {
    if (type !== "linear") throw new UnsupportedModelError(`rope scaling ${type} is not supported in safetensors yet`);
    set("rope.scaling.type", "linear");
    set("rope.scaling.factor", scaling?.factor);
  }
  return metadata;
}

type FolderTensor = TensorInfo & { readonly file: string };

/** The tensors by GGUF's names; one that has none keeps its own, and is refused later. */
function tensorsOf(folder: string, tied: boolean): Map<string, FolderTensor> {
  const out = new Map<string, FolderTensor>();
  for (const { name, dtype, shape, file, offset, bytes } of readSafetensorsFolder(folder).values()) {
    // Tables that can be computed, and a head that is the embedding again.
    if (name.endsWith(".rotary_emb.inv_freq") || (tied && name === "lm_head.weight")) continue;
    const [, stem = "", ending = ""] = /^(.*)\.(weight|bias)$/.exec(name) ?? [];
    const [, layer, role = ""] = /^model\.layers\.(\d+)\.(.*)$/.exec(stem) ?? [];
    const known = layer === undefined
      ? Object.hasOwn(TENSORS, stem) ? TENSORS[stem] : undefined
      : Object.hasOwn(LAYER_TENSORS, role)
      ? `blk.${Number(layer)}.${LAYER_TENSORS[role]}`
      : undefined;
    const type = Object.hasOwn(TYPES, dtype) ? TYPES[dtype] : undefined;
    if (type === undefined) {
      throw new UnsupportedModelError(
        `tensor ${name} has type ${dtype}; supported are ${Object.keys(TYPES).join(", ")}`,
      );
    }
    const gguf = known === undefined ? name : `${known}.${ending}`;
    out.set(gguf, { name: gguf, type, shape: [...shape].reverse(), offset, bytes, file });
  }
  if (out.size === 0) throw new UnsupportedModelError(`${folder} has no tensors`);
  return out;
}

function templateOf(folder: string, tokenizerConfig: unknown): string | undefined {
  const path = join(folder, "chat_template.jinja");
  if (statSync(path, { throwIfNoEntry: false })?.isFile() === true) return readFileSync(path, "utf8");
  const { chat_template: template } = (tokenizerConfig ?? {}) as { chat_template?: unknown };
  if (typeof template === "string") return template;
  // Several by name: the one for tools takes plain conversations too.
  const named = z.array(z.object({ name: z.string(), template: z.string() })).safeParse(template).data ?? [];
  return (named.find(({ name }) => name === "tool_use") ?? named.find(({ name }) => name === "default"))?.template;
}

function optional(folder: string, name: string): unknown {
  const path = join(folder, name);
  if (statSync(path, { throwIfNoEntry: false }) === undefined) return undefined;
  const text = readFileSync(path, "utf8");
  try {
    return JSON.parse(text) ?? undefined;
  } catch (cause) {
    throw new UnsupportedModelError(`${path} is no JSON`, { cause });
  }
}

function required(folder: string, name: string): unknown {
  const value = optional(folder, name);
  if (value !== undefined) return value;
  const message = `${folder} has no ${name}`;
  throw name === "tokenizer.json" ? new TokenizerError(message) : new UnsupportedModelError(message);
}

/**
 * The shape that a `config.json` tells, for plans without weights.
 *
 * @throws {UnsupportedModelError} naming what is missing or not supported.
 */
export function shapeOfConfig(path: string): ModelShape {
  const config = checkedConfig(required(dirname(path), basename(path)));
  const { model_type: kind, head_dim: headDim } = config;
  if (!Object.hasOwn(ARCHITECTURES, kind)) {
    throw new UnsupportedModelError(
      `model_type ${JSON.stringify(kind)} is not known; there are ${Object.keys(ARCHITECTURES).join(", ")}`,
    );
  }
  const { vocab_size: vocab } = config;
  if (vocab === null || vocab === undefined) throw new UnsupportedModelError(`${path} has no vocab_size`);
  return {
    architecture: ARCHITECTURES[kind]!,
    layers: config.num_hidden_layers,
    embedding: config.hidden_size,
    heads: config.num_attention_heads,
    kvHeads: config.num_key_value_heads ?? config.num_attention_heads,
    ...(headDim === null || headDim === undefined ? {} : { headDim }),
    feedForward: config.intermediate_size,
    vocab,
    context: config.max_position_embeddings,
    ...(config.tie_word_embeddings === true ? { tied: true } : {}),
  };
}
