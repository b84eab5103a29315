/**
 * Times opening a model's shard: packing without a cache, packing and keeping, and reading what was kept.
 *
 * ```sh
 * deno run -A bench/load.ts MODEL.gguf [--threads 2] [--rounds 3]
 * ```
 *
 * The model's file is read once before, so that it is in the page cache; so are the cache's files after they were written.
 * What a cold disk adds is the same for all three, as packed weights are as large as the model's.
 *
 * @module
 */
import { statSync } from "node:fs";
import { parseArgs } from "node:util";
import { loadModel } from "../model/mod.ts";
import { shardOf } from "../orchestrator/served_model.ts";
import { loadKernels } from "../worker/mod.ts";
import type { ShardChoices } from "../worker/mod.ts";

const { values, positionals } = parseArgs({
  args: Deno.args,
  allowPositionals: true,
  options: { threads: { type: "string" }, rounds: { type: "string", default: "3" } },
});
const path = positionals[0];
if (path === undefined) {
  console.error("give a model's file");
  Deno.exit(2);
}
const model = await loadModel(path);
const kernels = loadKernels();
const { layers } = model.description.hyper;
const shard = shardOf(model.description, { first: 0, end: layers }, {
  path,
  kv: { type: "f16", tokens: 32 },
  maxBatch: 1,
  context: 32,
});
const threads = Number(values.threads ?? kernels.deviceInfo().cores);

/** Seconds to open, and bytes that came from the cache. */
async function open(
  cache: NonNullable<ShardChoices["cache"]> | null,
): Promise<{ seconds: number; cachedBytes: number }> {
  const start = performance.now();
  const handle = await kernels.openShard(shard, { threads, isa: null, cache }, {
    onNote: (text) => console.error(text),
  });
  const seconds = (performance.now() - start) / 1000;
  const { cachedBytes } = handle.stats();
  handle.close();
  return { seconds, cachedBytes };
}

const dir = Deno.makeTempDirSync({ prefix: "lutra-load-" });
try {
  const cache = { dir, maxBytes: 1e12 };
  const gigabytes = statSync(path).size / 1e9;
  await open(null);
  const rows: [string, number[]][] = [["packed", []], ["packed and kept", []], ["read from the cache", []]];
  for (let round = 0; round < Number(values.rounds); round++) {
    rows[0]![1].push((await open(null)).seconds);
    Deno.removeSync(dir, { recursive: true });
    rows[1]![1].push((await open(cache)).seconds);
    rows[2]![1].push((await open(cache)).seconds);
  }
  for (const [name, times] of rows) {
    const seconds = times.sort((a, b) => a - b)[times.length >> 1]!;
    console.log(`${name.padEnd(20)} ${seconds.toFixed(2)} s, ${(gigabytes / seconds).toFixed(2)} GB/s of the file`);
  }
} finally {
  Deno.removeSync(dir, { recursive: true });
}
