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
