/**
 * Writes safetensors for tests: single files, and a llama GGUF as the folder that `transformers` would have it in.
 *
 * @module
 */
import { join } from "node:path";
import { Metadata } from "../model/metadata.ts";
import { readGguf } from "../model/mod.ts";
import { fixture } from "./data.ts";

/** A tensor to write. */
export interface SafetensorData {
  dtype: string;
  shape: readonly number[];
  data: Uint8Array;
}

/** The bytes of a safetensors file. `header` may change its table before it is written. */
export function writeSafetensors(
  tensors: Readonly<Record<string, SafetensorData>>,
  header: (table: Record<string, unknown>) => unknown = (table) => table,
): Uint8Array<ArrayBuffer> {
  const table: Record<string, unknown> = { __metadata__: { format: "pt" } };
  let at = 0;
  for (const [name, { dtype, shape, data }] of Object.entries(tensors)) {
    table[name] = { dtype, shape, data_offsets: [at, at += data.length] };
  }
  const json = new TextEncoder().encode(JSON.stringify(header(table)));
  const out = new Uint8Array(8 + json.length + at);
  new DataView(out.buffer).setBigUint64(0, BigInt(json.length), true);
  out.set(json, 8);
  at = 8 + json.length;
  for (const { data } of Object.values(tensors)) {
    out.set(data, at);
    at += data.length;
  }
  return out;
}

const NAMES: readonly (readonly [RegExp, string])[] = [
  [/^token_embd/, "model.embed_tokens"],
  [/^output_norm/, "model.norm"],
  [/^output\b/, "lm_head"],
  [/^blk\.(\d+)\.attn_norm/, "model.layers.$1.input_layernorm"],
  [/^blk\.(\d+)\.ffn_norm/, "model.layers.$1.post_attention_layernorm"],
  [/^blk\.(\d+)\.attn_output/, "model.layers.$1.self_attn.o_proj"],
  [/^blk\.(\d+)\.attn_([qkv])/, "model.layers.$1.self_attn.$2_proj"],
  [/^blk\.(\d+)\.ffn_(\w+)/, "model.layers.$1.mlp.$2_proj"],
];

/** Rows of Q or K from GGUF's interleaved pairs to halves. */
function unpermuted(data: Uint8Array, rows: number, heads: number): Uint8Array {
  const [bytes, half] = [data.length / rows, rows / heads / 2];
  const out = new Uint8Array(data.length);
  for (let head = 0; head < heads; head++) {
    for (let pair = 0; pair < half; pair++) {
      for (const part of [0, 1]) {
        const from = (head * 2 * half + 2 * pair + part) * bytes;
        out.set(data.subarray(from, from + bytes), (head * 2 * half + part * half + pair) * bytes);
      }
    }
  }
  return out;
}

/** Writes the model of a llama fixture (F32, F16 or BF16) into a folder, with one of the small tokenizers. */
export function writeModelFolder(name: string, folder: string, config: Record<string, unknown> = {}): void {
  const gguf = readGguf(fixture(name));
  const file = Deno.readFileSync(fixture(name));
  const metadata = new Metadata(gguf);
  const key = (k: string) => metadata.number(`llama.${k}`);
  const heads = key("attention.head_count")!;
  const kvHeads = key("attention.head_count_kv")!;
  const tensors: Record<string, SafetensorData> = {};
  for (const { name, type, shape, offset, bytes } of gguf.tensors.values()) {
    const [pattern, replacement] = NAMES.find(([pattern]) => pattern.test(name))!;
    let data: Uint8Array = file.slice(offset, offset + bytes);
    const role = /attn_([qk])\./.exec(name)?.[1];
    if (role !== undefined) data = unpermuted(data, shape[1]!, role === "q" ? heads : kvHeads);
    tensors[name.replace(pattern, replacement)] = {
      dtype: ({ 0: "F32", 1: "F16", 30: "BF16" } as Record<number, string>)[type]!,
      shape: [...shape].reverse(),
      data,
    };
  }
  Deno.writeFileSync(join(folder, "model.safetensors"), writeSafetensors(tensors));
  const json = {
    model_type: "llama",
    hidden_size: key("embedding_length"),
    num_hidden_layers: key("block_count"),
    num_attention_heads: heads,
    num_key_value_heads: kvHeads,
    intermediate_size: key("feed_forward_length"),
    max_position_embeddings: key("context_length"),
    rms_norm_eps: key("attention.layer_norm_rms_epsilon"),
    rope_theta: key("rope.freq_base") ?? 10000,
    eos_token_id: 2,
    ...config,
  };
  Deno.writeTextFileSync(join(folder, "config.json"), JSON.stringify(json));
  Deno.copyFileSync(fixture("tokenizers/llama3.json"), join(folder, "tokenizer.json"));
}

/**
 * Writes a mixture of experts of the smallest size, each expert's matrices tensors of their own, in so many files that an index
 * names.
 */
export function writeMixtureFolder(
  folder: string,
  { layers, experts, files }: { layers: number; experts: number; files: number },
): void {
  const [d, vocab] = [32, 256];
  let x = 1;
  const noise = (elements: number) =>
    new Uint8Array(
      Float32Array.from({ length: elements }, () => {
        x = (Math.imul(x, 1664525) + 1013904223) >>> 0;
        return (x / 2 ** 32 - 0.5) / 2;
      }).buffer,
    );
  const tensors: [string, SafetensorData][] = [];
  const add = (name: string, ...shape: number[]) => {
    tensors.push([`${name}.weight`, { dtype: "F32", shape, data: noise(shape.reduce((a, b) => a * b, 1)) }]);
  };
  add("model.embed_tokens", vocab, d);
  for (let layer = 0; layer < layers; layer++) {
    const at = `model.layers.${layer}`;
    for (const norm of ["input_layernorm", "post_attention_layernorm"]) add(`${at}.${norm}`, d);
    for (const part of ["q", "k", "v", "o"]) add(`${at}.self_attn.${part}_proj`, d, d);
    for (const part of ["q", "k"]) add(`${at}.self_attn.${part}_norm`, d);
    add(`${at}.mlp.gate`, experts, d);
    for (let e = 0; e < experts; e++) {
      for (const part of ["gate", "up", "down"]) add(`${at}.mlp.experts.${e}.${part}_proj`, d, d);
    }
  }
  add("model.norm", d);
  add("lm_head", vocab, d);
  const places: Record<string, string> = {};
  for (let i = 0; i < files; i++) {
    const file = `model-0000${i + 1}-of-0000${files}.safetensors`;
    const own = tensors.slice(Math.floor(i / files * tensors.length), Math.floor((i + 1) / files * tensors.length));
    for (const [name] of own) places[name] = file;
    Deno.writeFileSync(join(folder, file), writeSafetensors(Object.fromEntries(own)));
  }
  Deno.writeTextFileSync(join(folder, "model.safetensors.index.json"), JSON.stringify({ weight_map: places }));
  const config = {
    ...{ model_type: "qwen3_moe", hidden_size: d, num_hidden_layers: layers, vocab_size: vocab, rms_norm_eps: 1e-6 },
    ...{ num_attention_heads: 1, num_key_value_heads: 1, head_dim: d, intermediate_size: d, moe_intermediate_size: d },
    ...{ num_experts: experts, num_experts_per_tok: 4, norm_topk_prob: true, decoder_sparse_step: 1 },
    ...{ mlp_only_layers: [], max_position_embeddings: 128, rope_theta: 10_000, eos_token_id: 2 },
  };
  Deno.writeTextFileSync(join(folder, "config.json"), JSON.stringify(config));
  Deno.copyFileSync(fixture("tokenizers/llama3.json"), join(folder, "tokenizer.json"));
}
