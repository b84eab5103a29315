import type { Command } from "commander";
import { modelPath } from "./hub/reference.ts";
import { ggmlTypeName, isModelFolder, loadModel, readGguf, readModelFolder } from "../model/mod.ts";
import type { GgufFile, GgufValue, LoadedModel, ModelDescription } from "../model/mod.ts";
import { DEFAULT_CONTEXT, modelCost, wholeBytes } from "../orchestrator/mod.ts";

/** Adds the command `inspect`. */
export function addInspect(program: Command): void {
  program.command("inspect")
    .description("say what a GGUF file holds, whether Lutra can run it or not")
    .argument("<model>", "a GGUF file, a folder with safetensors, or hf:org/repo[:file] that was pulled")
    .option("--tensors", "list every tensor")
    .option("--json", "print JSON")
    .action(async (path: string, flags: { tensors?: boolean; json?: boolean }) => {
      const file = modelPath(path);
      const gguf = isModelFolder(file) ? readModelFolder(file).gguf : readGguf(file);
      let model: LoadedModel | undefined;
      let reason: string | undefined;
      try {
        model = await loadModel(file);
      } catch (error) {
        reason = (error as Error).message;
      }
      if (flags.json === true) console.log(JSON.stringify(asJson(gguf, model, reason, flags.tensors === true)));
      else console.log(asText(gguf, model, reason, flags.tensors === true));
    });
}

/** What the model takes of a machine's memory, by default. */
function memoryOf(description: ModelDescription) {
  const bytes = (tokens: number) => Math.ceil(wholeBytes(modelCost(description, { type: "f16", tokens })));
  const weights = bytes(0);
  return { weights, cache: bytes(DEFAULT_CONTEXT) - weights, cachedTokens: DEFAULT_CONTEXT };
}

/** Of all tensors. */
function bitsPerWeight(rows: readonly TypeRow[]): number {
  const sum = (of: (row: TypeRow) => number) => rows.reduce((sum, row) => sum + of(row), 0);
  return 8 * sum((row) => row.bytes) / Math.max(1, sum((row) => row.elements));
}

/** Whether and how a conversation comes to the model. */
function templateOf({ chatTemplate, gguf }: LoadedModel): "none" | "malformed" | "with tools" | "without tools" {
  if (chatTemplate.isFallback) return gguf.metadata.has("tokenizer.chat_template") ? "malformed" : "none";
  return chatTemplate.takesTools ? "with tools" : "without tools";
}

interface TypeRow {
  type: string;
  tensors: number;
  elements: number;
  bytes: number;
}

function byType(gguf: GgufFile): TypeRow[] {
  const rows = new Map<string, TypeRow>();
  for (const tensor of gguf.tensors.values()) {
    const type = ggmlTypeName(tensor.type);
    const row = rows.get(type) ?? { type, tensors: 0, elements: 0, bytes: 0 };
    row.tensors++;
    row.elements += tensor.shape.reduce((a, b) => a * b, 1);
    row.bytes += tensor.bytes;
    rows.set(type, row);
  }
  return [...rows.values()].sort((a, b) => b.bytes - a.bytes);
}

function asJson(gguf: GgufFile, model: LoadedModel | undefined, reason: string | undefined, tensors: boolean) {
  const types = byType(gguf);
  const plain = (value: GgufValue): unknown =>
    typeof value === "bigint" ? value.toString() : Array.isArray(value) ? value.map(plain) : value;
  return {
    path: gguf.path,
    version: gguf.version,
    bytes: gguf.size,
    supported: model !== undefined,
    ...(reason === undefined ? {} : { reason }),
    ...(model === undefined ? {} : {
      architecture: model.description.architecture,
      hyper: model.description.hyper,
      parameters: model.description.parameters,
      vocabulary: model.tokenizer.vocabSize,
      chatTemplate: templateOf(model),
      memory: memoryOf(model.description),
      warnings: model.warnings,
    }),
    bitsPerWeight: bitsPerWeight(types),
    metadata: Object.fromEntries([...gguf.metadata].map(([key, value]) => [key, plain(value)])),
    types,
    ...(tensors ? { tensors: [...gguf.tensors.values()].map((t) => ({ ...t, type: ggmlTypeName(t.type) })) } : {}),
  };
}

function asText(gguf: GgufFile, model: LoadedModel | undefined, reason: string | undefined, tensors: boolean) {
  const types = byType(gguf);
  const format = gguf.version === 0 ? "safetensors" : `GGUF version ${gguf.version}`;
  const lines = [`${gguf.path}: ${format}, ${bytes(gguf.size)}, ${gguf.tensors.size} tensors`];
  if (model !== undefined) {
    const { description } = model;
    const h = description.hyper;
    const { weights, cache, cachedTokens } = memoryOf(description);
    lines.push(
      `${description.name ?? "no name"}: ${description.architecture}, ${
        (description.parameters / 1e6).toFixed(1)
      } M parameters of ${bitsPerWeight(types).toFixed(2)} bits`,
      `  ${h.layers} layers of ${h.embedding}, ${h.heads} heads of ${h.headDim} on ${h.kvHeads} KV heads, ` +
        `feed-forward ${h.feedForward}, vocabulary ${h.vocab}, context ${h.context}`,
      ...(h.moe === undefined ? [] : [`  ${h.moe.used} of ${h.moe.experts} experts are used`]),
      `  chat template: ${templateOf(model)}`,
      `  needs ${bytes(weights)} of memory for weights, and ${bytes(cache)} for a cache of ${cachedTokens} tokens`,
      ...model.warnings.map((warning) => `  warning: ${warning}`),
    );
  } else lines.push(`Lutra cannot run it: ${reason}`);
  lines.push(
    "",
    ...table(
      ["type", "tensors", "elements", "bytes", "bits/weight"],
      types.map((
        r,
      ) => [r.type, `${r.tensors}`, `${r.elements}`, bytes(r.bytes), ((8 * r.bytes) / r.elements).toFixed(2)]),
    ),
  );
  lines.push("", "metadata");
  for (const [key, value] of gguf.metadata) lines.push(`  ${key} = ${short(value)}`);
  if (tensors) {
    lines.push(
      "",
      ...table(
        ["tensor", "type", "shape", "bytes"],
        [...gguf.tensors.values()].map((t) => [t.name, ggmlTypeName(t.type), t.shape.join(" × "), `${t.bytes}`]),
      ),
    );
  }
  return lines.join("\n");
}

/** A value on one line, whatever the file put there: control characters are escaped. */
function short(value: GgufValue): string {
  if (Array.isArray(value)) {
    return `[${value.slice(0, 4).map(short).join(", ")}${value.length > 4 ? `, … ${value.length}` : ""}]`;
  }
  if (typeof value !== "string") return String(value);
  const text = JSON.stringify(value);
  return text.length > 100 ? `${text.slice(0, 97)}…"` : text;
}

/** Bytes with a unit. */
export function bytes(n: number): string {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (n >= 1000 && unit + 1 < units.length) {
    n /= 1000;
    unit++;
  }
  return `${unit === 0 ? n : n.toPrecision(4)} ${units[unit]}`;
}

/** Columns padded to their widest cell; all but the first flush right. */
export function table(head: readonly string[], rows: readonly (readonly string[])[]): string[] {
  const widths = head.map((title, i) => Math.max(title.length, ...rows.map((row) => row[i]!.length)));
  const line = (row: readonly string[]) =>
    row.map((cell, i) => i === 0 ? cell.padEnd(widths[i]!) : cell.padStart(widths[i]!)).join("  ").trimEnd();
  return [line(head), ...rows.map(line)];
}
