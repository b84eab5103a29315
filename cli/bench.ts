import type { Command } from "commander";
import type { Engine } from "../orchestrator/mod.ts";
import { loadKernels } from "../worker/mod.ts";
import { bytes, table } from "./inspect.ts";
import { startLocalCluster } from "./local_cluster.ts";
import { clusterOptions, integer, withClusterOptions } from "./options.ts";
import type { ClusterFlags } from "./options.ts";

interface BenchFlags extends ClusterFlags {
  promptTokens: number;
  genTokens: number;
  batch: number;
  repetitions: number;
  bandwidthMib: number;
  json?: boolean;
}

/** Medians of one benchmark. */
export interface BenchResult {
  readonly model: string;
  readonly isa: string;
  readonly shards: number;
  /** Threads of each worker. */
  readonly threads: number;
  /** Sequences decoded together. */
  readonly batch: number;
  readonly promptTokens: number;
  readonly genTokens: number;
  readonly repetitions: number;
  /** Tokens per second, over all sequences. */
  readonly prefillTokS: number;
  readonly decodeTokS: number;
  /** Bytes of packed weights read per decode step, over all stages. */
  readonly weightBytesPerStep: number;
  /** GB/s at which weights are read while decoding. */
  readonly decodeGBps: number;
  /** Memory read bandwidth with as many threads, measured before and after in the same run, in GB/s. */
  readonly bandwidthGBps: number;
  /** decodeGBps / bandwidthGBps. Above 1 the weights come from the caches. */
  readonly share: number;
}

/** Adds the command `bench`. */
export function addBench(program: Command): void {
  const command = program.command("bench")
    .description("measure prefill and decode, and how near decoding comes to the memory's speed")
    .argument("<model>", "a GGUF file, a folder with safetensors, or hf:org/repo[:file] that was pulled")
    .option("--prompt-tokens <n>", "tokens of the prompt", integer(2), 128)
    .option("--gen-tokens <n>", "tokens to generate", integer(2), 64)
    .option("--batch <n>", "sequences at the same time", integer(1), 1)
    .option("--repetitions <n>", "counted runs, of which the median is told", integer(1), 5)
    .option(
      "--bandwidth-mib <n>",
      "memory that the bandwidth is measured on; several times the caches",
      integer(1),
      512,
    )
    .option("--json", "print JSON");
  withClusterOptions(command).action(async (path: string, flags: BenchFlags) => {
    const result = await bench(path, flags);
    console.log(flags.json === true ? JSON.stringify(result) : describe(result));
  });
}

async function bench(path: string, flags: BenchFlags): Promise<BenchResult> {
  const { promptTokens, genTokens, batch, repetitions } = flags;
  const kernels = loadKernels();
  const context = flags.context ?? promptTokens + genTokens;
  const kvTokens = batch * 32 * Math.ceil((context + 1) / 32);
  await using cluster = await startLocalCluster(path, { ...clusterOptions(flags), context, kvTokens });
  const { engine, threads } = cluster;
  const shards = engine.stats().stages.length;
  // Stages work one after the other on a single sequence: one stage's threads read at a time.
  const bandwidth = () => kernels.measureBandwidth(threads, flags.bandwidthMib);
  const before = await bandwidth();
  await measure(engine, flags); // warm-up
  const runs: { prefill: number; decode: number }[] = [];
  for (let i = 0; i < repetitions; i++) runs.push(await measure(engine, flags));
  const bandwidthGBps = Math.max(before, await bandwidth());
  const prefillTokS = median(runs.map((run) => run.prefill));
  const decodeTokS = median(runs.map((run) => run.decode));
  const weightBytesPerStep = engine.stats().stages.reduce((sum, stage) => sum + stage.weightBytesPerToken, 0);
  const decodeGBps = (weightBytesPerStep * (decodeTokS / batch)) / 1e9;
  return {
    model: engine.model.id,
    isa: flags.isa ?? kernels.deviceInfo().isa,
    shards,
    threads,
    batch,
    promptTokens,
    genTokens,
    repetitions,
    prefillTokS,
    decodeTokS,
    weightBytesPerStep,
    decodeGBps,
    bandwidthGBps,
    share: decodeGBps / bandwidthGBps,
  };
}

/** One run: `batch` prompts at once. Prefill ends when the last one has its first token; decoding is what follows. */
async function measure(engine: Engine, flags: BenchFlags): Promise<{ prefill: number; decode: number }> {
  const { promptTokens, genTokens, batch } = flags;
  const { vocab } = engine.model.description.hyper;
  const start = performance.now();
  let started = 0;
  let prefillEnd = start;
  let tokensBefore = 0;
  let tokens = 0;
  await Promise.all(Array.from({ length: batch }, async (_, i) => {
    // Ids that differ between sequences; what they say does not matter for the speed.
    const prompt = Array.from({ length: promptTokens }, (_, j) => (7 + 31 * i + 17 * j) % vocab);
    let first = true;
    const request = { promptTokens: prompt, maxTokens: genTokens, ignoreEos: true, sampling: { temperature: 0 } };
    for await (const event of engine.generate(request)) {
      if (event.type !== "token") continue;
      tokens++;
      if (!first) continue;
      first = false;
      if (++started === batch) {
        prefillEnd = performance.now();
        tokensBefore = tokens;
      }
    }
  }));
  const end = performance.now();
  return {
    prefill: (batch * promptTokens) / ((prefillEnd - start) / 1000),
    decode: (tokens - tokensBefore) / ((end - prefillEnd) / 1000),
  };
}

function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 === 1 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2;
}

function describe(r: BenchResult): string {
  return [
    `${r.model}: ${r.isa}, ${r.shards} × ${r.threads} threads, ${r.batch} at once, median of ${r.repetitions}`,
    "",
    ...table(["", "tokens", "tok/s", "GB/s", "of bandwidth"], [
      ["prefill", `${r.promptTokens}`, r.prefillTokS.toFixed(1), "", ""],
      ["decode", `${r.genTokens}`, r.decodeTokS.toFixed(1), r.decodeGBps.toFixed(2), `${(100 * r.share).toFixed(1)} %`],
    ]),
    "",
    `a decode step reads ${bytes(r.weightBytesPerStep)} of weights; memory gives ${r.bandwidthGBps.toFixed(1)} GB/s`,
  ].join("\n");
}
