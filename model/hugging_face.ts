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
import type { GgufFile } from "./gguf.ts";
import { checkedConfig, checkedQuantization, metadataOf } from "./hugging_face_config.ts";
import type { Quantization } from "./hugging_face_config.ts";
import { folderTensors, grownWarnings } from "./hugging_face_tensors.ts";
import { tokenizerOfJson } from "./hugging_face_tokenizer.ts";
import { readSafetensorsFolder } from "./safetensors.ts";
import type { Tokenizer } from "./tokenizer.ts";

const ids = z.union([z.number().int().transform((id) => [id]), z.array(z.number().int())]);

/** A folder's model, as a GGUF would describe it, and its tokenizer. */
export interface FolderModel {
  readonly gguf: GgufFile;
  readonly tokenizer: Tokenizer;
  /** What the user should know of its weights. */
  readonly warnings: readonly string[];
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
  const checked = checkedConfig(required(folder, "config.json"));
  const { config, type } = checked;
  const { path, files, tensors } = folderTensors(
    readSafetensorsFolder(folder),
    config,
    type,
    config.quantization_config ?? quantizationOf(folder),
  );
  const generation = optional(folder, "generation_config.json") as { eos_token_id?: unknown } | undefined;
  const tokenizerConfig = optional(folder, "tokenizer_config.json");
  const tokenizer = tokenizerOfJson(required(folder, "tokenizer.json"), {
    config: tokenizerConfig,
    eosIds: ids.safeParse(generation?.eos_token_id).data ?? config.eos_token_id ?? [],
  });
  const template = templateOf(folder, tokenizerConfig);
  const metadata = metadataOf(checked);
  if (template !== undefined) metadata.set("tokenizer.chat_template", template);
  const sizes = [path, ...files.map((name) => join(dirname(path), name))].map((file) => statSync(file).size);
  return {
    gguf: {
      path,
      files,
      version: 0,
      size: sizes.reduce((a, b) => a + b),
      alignment: 1,
      metadata,
      tensors,
      dataOffset: Math.min(...[...tensors.values()].map(({ offset }) => offset)),
      rotaryHalves: true,
      ...(type.normOffset === undefined ? {} : { normOffset: type.normOffset }),
    },
    tokenizer,
    warnings: grownWarnings(tensors.values()),
  };
}

/** What a quantiser's own file says: AutoGPTQ's, or AutoAWQ's. */
function quantizationOf(folder: string): Quantization | undefined {
  for (const [file, method] of [["quantize_config.json", "gptq"], ["quant_config.json", "awq"]] as const) {
    const json = optional(folder, file);
    if (json !== undefined) return { quant_method: method, ...checkedQuantization(json, file) };
  }
  return undefined;
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
  const checked = checkedConfig(required(dirname(path), basename(path)));
  const { config, architecture } = checked;
  const metadata = metadataOf(checked);
  const number = (key: string) => metadata.get(`${architecture}.${key}`) as number | undefined;
  const { vocab_size: vocab } = config;
  if (vocab === null || vocab === undefined) throw new UnsupportedModelError(`${path} has no vocab_size`);
  const heads = number("attention.head_count")!;
  const headDim = number("attention.key_length");
  const experts = number("expert_count");
  return {
    architecture,
    layers: number("block_count")!,
    embedding: number("embedding_length")!,
    heads,
    kvHeads: number("attention.head_count_kv") ?? heads,
    ...(headDim === undefined ? {} : { headDim }),
    feedForward: (experts === undefined ? undefined : config.moe_intermediate_size) ?? number("feed_forward_length")!,
    vocab,
    context: number("context_length")!,
    ...(config.tie_word_embeddings === true ? { tied: true } : {}),
    ...(experts === undefined ? {} : { experts: { count: experts, used: number("expert_used_count")! } }),
  };
}
