/**
 * Holds every architecture to logits that `transformers` computed (`fixtures/architectures.py` made them and the models):
 * prefill at once, and token by token through the KV cache, on one shard and on two. Run as a program it writes the results
 * to `architectures.md`.
 *
 * @module
 */
import { join } from "node:path";
import { argmax, maxDifference, relativeError, sameBits, startCluster } from "./cluster.ts";
import type { LocalClusterOptions } from "../cli/local_cluster.ts";
import { fixture, repoPath } from "./data.ts";

/** A model and its logits. */
export interface Golden {
  name: string;
  file: string;
  /** `general.architecture`. */
  architecture: string;
  /** The class of `transformers`. */
  model: string;
  /** What this model has that others lack. */
  shows: string;
  /** Context that it is served with. */
  context: number;
  tokens: number[];
  logits: string;
  /** Largest difference of a logit; 0 where activations are rounded to 8 bits (see `a8Bound` in `golden_test.ts`). */
  tolerance: number;
}

/** All of them. */
export const goldens: readonly Golden[] = JSON.parse(Deno.readTextFileSync(fixture("architectures/goldens.json")));

/** How a model's logits compare. */
export interface Comparison {
  /** Largest difference of a logit at prefill, and at decode. */
  prefill: number;
  decode: number;
  /** Root mean square of the difference over the logits' spread. */
  relative: number;
  /** The same of single rows: their median. */
  medianRow: number;
  /** Whether prefill on one shard and decode on two gave the same bits. */
  same: boolean;
  /** Rows whose largest logit is another. */
  otherArgmax: number;
  rows: number;
}

/** Computes the logits of a golden's tokens; `beside`: while other requests run. */
export async function logitsOf(
  golden: Golden,
  options: LocalClusterOptions & { chunk?: number; beside?: boolean; path?: string } = {},
): Promise<Float32Array> {
  const { chunk, beside, path = fixture(`architectures/${golden.file}`), ...rest } = options;
  await using cluster = await startCluster(path, { kvType: "f32", context: golden.context, ...rest });
  const { tokens } = golden;
  const requests = beside === true ? [tokens.slice(5, 20), tokens, tokens.slice(30, 47)] : [tokens];
  const all = await Promise.all(
    requests.map((ids) => cluster.engine.logits(ids, chunk === undefined ? {} : { chunk })),
  );
  return all[requests.indexOf(tokens)]!;
}

/** Calls `use` with the folder that `transformers` saved of a golden's model, with a tokenizer, which these models have none of. */
export async function withFolder<T>({ file }: Golden, use: (folder: string) => Promise<T>): Promise<T> {
  const folder = await Deno.makeTempDir({ prefix: "lutra-folder-" });
  try {
    const source = fixture(`architectures/${file.replace(/\.gguf$/, "")}`);
    for (const { name } of Deno.readDirSync(source)) Deno.copyFileSync(join(source, name), join(folder, name));
    Deno.copyFileSync(fixture("tokenizers/llama3.json"), join(folder, "tokenizer.json"));
    return await use(folder);
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}

function median(values: number[]): number {
  return values.sort((a, b) => a - b)[values.length >> 1]!;
}

/** Prefill on one shard and decode on two, against the golden; of the model at `path`, or its GGUF. */
export async function compare(
  golden: Golden,
  options: LocalClusterOptions & { path?: string } = {},
): Promise<Comparison> {
  const expected = new Float32Array(Deno.readFileSync(fixture(`architectures/${golden.logits}`)).buffer);
  const rows = golden.tokens.length;
  const vocab = expected.length / rows;
  const prefill = await logitsOf(golden, options);
  const decode = await logitsOf(golden, { ...options, shards: 2, chunk: 1 });
  let otherArgmax = 0;
  for (let i = 0; i < rows; i++) if (argmax(prefill, i, vocab) !== argmax(expected, i, vocab)) otherArgmax++;
  return {
    prefill: maxDifference(prefill, expected),
    decode: maxDifference(decode, expected),
    relative: relativeError(prefill, expected),
    medianRow: median(Array.from({ length: rows }, (_, i) => {
      const [found, wanted] = [prefill, expected].map((logits) => logits.subarray(i * vocab, (i + 1) * vocab));
      return relativeError(found!, wanted!);
    })),
    same: sameBits(prefill, decode),
    otherArgmax,
    rows,
  };
}

if (import.meta.main) {
  const rows: string[] = [];
  for (const golden of goldens) {
    const { prefill, decode, relative, same, otherArgmax, rows: tokens } = await compare(golden);
    const folder = await withFolder(golden, (path) => compare(golden, { path }));
    const a16 = golden.tolerance > 0 ? undefined : (await compare(golden, { activations: "a16" })).relative;
    const cells = [
      golden.name,
      `\`${golden.architecture}\``,
      golden.model,
      golden.shows,
      `${tokens} of ${golden.context}`,
      prefill.toExponential(1),
      decode.toExponential(1),
      relative.toExponential(1) + (a16 === undefined ? "" : ` (16 bits: ${a16.toExponential(1)})`),
      `${tokens - otherArgmax}/${tokens}`,
      same ? "yes" : "no",
      folder.decode.toExponential(1),
    ];
    console.log(cells.join("  "));
    rows.push(`| ${cells.join(" | ")} |`);
  }
  const text = `# Architectures against transformers

Written by \`deno task architectures\`: largest difference of any logit between Lutra and \`transformers\` (float32) on tiny models with
random weights, at prefill on one shard and token by token through the KV cache on two; the relative error, in units of the
logits' spread; rows with the same largest logit; whether both ways gave the same bits. All that of the model as GGUF; the last column
is the difference at decode of the folder with safetensors that \`transformers\` saves. Bound: 1e-3, and for low-bit weights, whose
activations are rounded to 8 bits, a relative error of 3.8 %, of the row in the middle where there are experts: rounding may choose
another one. With 16 bits none is, and the bound is 256 times as narrow.

| model | architecture | class | shows | tokens of context | prefill | decode | relative | same argmax | same bits | folder |
| ----- | ------------ | ----- | ----- | ----------------- | ------- | ------ | -------- | ----------- | --------- | ------ |
${rows.join("\n")}
`;
  await Deno.writeTextFile(repoPath("tests", "architectures.md"), text);
  Deno.exit(); // the library stays open
}
