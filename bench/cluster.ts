/**
 * The `bench:cluster` task: how a pipeline over two workers compares with one worker and with the theory.
 *
 * A real nats-server and real workers, each bound to a core and in a network namespace of its own; what lies between them is a
 * pair of veth with 1 Gbit/s, or for a delay a relay. The orchestrator (this process) and the server are bound to nothing.
 *
 * @module
 */
import { Command, Option } from "commander";
import { integer } from "../cli/options.ts";
import { loadModel } from "../model/mod.ts";
import type { LoadedModel } from "../model/mod.ts";
import type { Engine } from "../orchestrator/mod.ts";
import { buildRelay, FaultCluster } from "../tests/faults/harness.ts";
import { modelFile } from "./model_file.ts";
import { record } from "./record.ts";
import type { ClusterRow } from "./rows.ts";
import { median } from "./stats.ts";
import { SHAPES, SYNTHETIC_TYPES } from "./synthetic_model.ts";
import { describeCluster } from "./tables.ts";

const PREFILL_TOKENS = 512;
/** Tokens of a stream before and while it is measured. */
const WARM_TOKENS = 8;
const STREAMS = 4;
/** Short answers that tell the hop cost, and their tokens. */
const HOP_ANSWERS = 9;
const HOP_TOKENS = 12;

/** Prompts that have no beginning in common. */
let prompts = 0;
function prompt(tokens: number, vocab: number): number[] {
  const seed = ++prompts;
  return Array.from({ length: tokens }, (_, i) => (seed * 7919 + i * 104_729) % vocab);
}

const GREEDY = { temperature: 0, penaltyLastN: 0 } as const;

/** Tokens a second of so many streams. */
async function decode(engine: Engine, streams: number, tokens: number): Promise<number> {
  const { vocab } = engine.model.description.hyper;
  const times: number[][] = await Promise.all(
    Array.from({ length: streams }, async () => {
      const own: number[] = [];
      const promptTokens = prompt(16, vocab);
      const request = { promptTokens, maxTokens: WARM_TOKENS + tokens, ignoreEos: true, sampling: GREEDY };
      for await (const { type } of engine.generate(request)) if (type === "token") own.push(performance.now());
      return own;
    }),
  );
  const begin = Math.max(...times.map((own) => own[WARM_TOKENS - 1]!));
  const end = Math.min(...times.map((own) => own.at(-1)!));
  return (1000 * times.flat().filter((time) => time > begin && time <= end).length) / (end - begin);
}

/** Tokens a second of a prompt, to its first answer token. */
async function prefill(engine: Engine): Promise<number> {
  const promptTokens = prompt(PREFILL_TOKENS, engine.model.description.hyper.vocab);
  const begin = performance.now();
  for await (const _ of engine.generate({ promptTokens, maxTokens: 1, sampling: GREEDY })) { /* one token */ }
  return (1000 * PREFILL_TOKENS) / (performance.now() - begin);
}

/**
 * What a token of one stream takes beyond the kernels for each hop, there being as many as stages: the median over the tokens of
 * short answers, and the mean over whole answers.
 */
async function hopCost(engine: Engine): Promise<{ hop_ms: number; hop_mean_ms: number }> {
  const { vocab } = engine.model.description.hyper;
  const { stages } = engine.stats();
  const hops: number[] = [];
  const means: number[] = [];
  for (let i = 0; i < HOP_ANSWERS; i++) {
    const begin = performance.now();
    const times: number[] = [];
    const request = { promptTokens: prompt(1, vocab), maxTokens: HOP_TOKENS, ignoreEos: true, sampling: GREEDY };
    for await (const { type } of engine.generate(request)) if (type === "token") times.push(performance.now());
    // One micro-batch each; all clocks measure durations only.
    const kernels = (await engine.query()).map(({ recentMs }) => recentMs.slice(-HOP_TOKENS));
    const kernelMs = times.map((_, token) => kernels.reduce((sum, ms) => sum + ms[token]!, 0));
    const perHop = (ms: number) => ms / stages.length;
    for (let token = 1; token < HOP_TOKENS; token++) {
      hops.push(perHop(times[token]! - times[token - 1]! - kernelMs[token]!));
    }
    means.push(perHop(times.at(-1)! - begin - kernelMs.reduce((sum, ms) => sum + ms, 0)) / HOP_TOKENS);
  }
  return { hop_ms: median(hops), hop_mean_ms: median(means) };
}

/** Each on a core of its own. */
const DEVICES = { core: (index: number) => index, memoryGB: 8 };
/** Tokens of a micro-batch, as engines have them unless told otherwise. */
const MAX_BATCH = 256;

interface Flags {
  shape: string;
  type: string;
  delays: number[];
  tokens: number;
  rounds: number;
  json?: boolean;
  record?: boolean;
}

const program = new Command("bench:cluster")
  .description("Compare a pipeline over two workers with one worker and with the theory (Linux, as root).")
  .addOption(new Option("--shape <name>", "the model's").choices(Object.keys(SHAPES)).default("even-1b"))
  .addOption(new Option("--type <name>", "of all its matrices").choices([...SYNTHETIC_TYPES]).default("Q4_0"))
  .option("--delays <list>", "milliseconds one way between a worker and the server", numbers, [0, 0.15, 0.5, 2.5])
  .option("--tokens <n>", "tokens of a stream that are measured", integer(8), 48)
  .option("--rounds <n>", "measurements, of which the median counts", integer(1), 3)
  .option("--json", "print rows as lines of JSON")
  .option("--record", "write the results to bench/results");

function numbers(text: string): number[] {
  return text.split(",").map(Number);
}

/** A measurement of one worker and of two, in turns: what else the machine does meets both alike. */
async function inTurns(rounds: number, measure: (engine: Engine) => Promise<number>, one: Engine, two: Engine) {
  const pairs: { one: number; two: number }[] = [];
  for (let i = 0; i < rounds; i++) pairs.push({ one: await measure(one), two: await measure(two) });
  const of = (value: (pair: { one: number; two: number }) => number) => median(pairs.map(value));
  return { one: of((pair) => pair.one), two: of((pair) => pair.two), ratio: of((pair) => pair.two / pair.one) };
}

/** Waits until so many replicas serve. */
async function serving({ engine }: FaultCluster, count: number): Promise<void> {
  while (engine.clusterStatus().replicas.filter(({ state }) => state === "serving").length < count) {
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

/** Measures all rows, in the order in which they come. */
async function* measure(model: LoadedModel, { delays, tokens, rounds }: Flags): AsyncGenerator<ClusterRow> {
  const settings = { model, context: 1024, kvTokens: 8192, loadTimeoutMs: 120_000, lostMs: 5000 };
  const start = (stages: number, delayMs: number, lane = true) =>
    FaultCluster.start(stages, { ...settings, shards: stages }, { ...DEVICES, delayMs, lane });
  await using single = await start(1, 0);
  await decode(single.engine, 1, 8);
  /** What one worker needs for a token of each of some streams, in milliseconds. */
  const stepMs = new Map<number, number>();
  for (const streams of [1, STREAMS / 2, STREAMS]) {
    const values: number[] = [];
    for (let i = 0; i < rounds; i++) values.push(await decode(single.engine, streams, tokens));
    const tok_s = median(values);
    stepMs.set(streams, (1000 * streams) / tok_s);
    const ratio_one = tok_s * stepMs.get(1)! / 1000;
    const row = {
      phase: "decode",
      stages: 1,
      replicas: 1,
      batch: null,
      delay_ms: 0,
      ratio: 1,
      theory: 1,
      lane: true,
      hop_ms: null,
      hop_mean_ms: null,
    } as const;
    yield { ...row, streams, tok_s, ratio_one };
  }
  const one = stepMs.get(1)!;
  for (const delay_ms of delays) {
    await using cluster = await start(2, delay_ms);
    await decode(cluster.engine, 1, 8);
    const row = { stages: 2, replicas: 1, batch: null, delay_ms, lane: true, hop_ms: null, hop_mean_ms: null } as const;
    // Every message passes the server: two delays a hop.
    const hop = 2 * delay_ms;
    const decoding = (streams: number) =>
      inTurns(rounds, (engine) => decode(engine, streams, tokens), single.engine, cluster.engine);
    const alone = await decoding(1);
    yield {
      ...row,
      phase: "decode",
      streams: 1,
      tok_s: alone.two,
      ratio: alone.ratio,
      ratio_one: alone.ratio,
      theory: one / (one + 2 * hop),
      ...await hopCost(cluster.engine),
    };
    if (delay_ms === 0) {
      await using without = await start(2, delay_ms, false);
      await decode(without.engine, 1, 8);
      const { two: tok_s, ratio } = await inTurns(
        rounds,
        (engine) => decode(engine, 1, tokens),
        single.engine,
        without.engine,
      );
      const own = { phase: "decode", streams: 1, lane: false, theory: one / (one + 2 * hop) } as const;
      yield { ...row, ...own, tok_s, ratio, ratio_one: ratio, ...await hopCost(without.engine) };
    }
    const many = await decoding(STREAMS);
    const turn = stepMs.get(STREAMS / 2)! + 2 * hop;
    yield {
      ...row,
      phase: "decode",
      streams: STREAMS,
      tok_s: many.two,
      ratio: many.ratio,
      ratio_one: many.two * one / 1000,
      theory: stepMs.get(STREAMS)! / turn,
    };
    const prompts = await inTurns(rounds, prefill, single.engine, cluster.engine);
    yield {
      ...row,
      phase: "prefill",
      streams: 1,
      tok_s: prompts.two,
      ratio: prompts.ratio,
      ratio_one: prompts.ratio,
      theory: 2,
    };
    if (delay_ms > 0) continue;
    // One token a micro-batch: what pipelining alone gives, without batching, whose gain one worker has too.
    for (const [one, stages] of [[single, 1], [cluster, 2]] as const) {
      await one.shut();
      await one.open({ ...settings, shards: stages, workers: stages, maxBatch: 1 });
    }
    const unbatched = await decoding(STREAMS);
    yield {
      ...row,
      phase: "decode",
      streams: STREAMS,
      batch: 1,
      tok_s: unbatched.two,
      ratio: unbatched.ratio,
      ratio_one: unbatched.two * one / 1000,
      theory: 2,
    };
    // The same workers' cores with the whole model each.
    await using pair = await FaultCluster.start(2, { ...settings, maxBatch: 1 }, DEVICES);
    for (const batch of [1, null]) {
      if (batch === null) {
        for (const [cluster, shards] of [[single, { shards: 1 }], [pair, {}]] as const) {
          await cluster.shut();
          await cluster.open({ ...settings, ...shards, maxBatch: MAX_BATCH });
        }
      }
      await serving(pair, 2);
      await Promise.all([decode(single.engine, 1, 8), decode(pair.engine, 2, 8)]);
      for (const streams of batch === null ? [1, STREAMS] : [STREAMS]) {
        const { two: tok_s, ratio } = await inTurns(
          rounds,
          (engine) => decode(engine, streams, tokens),
          single.engine,
          pair.engine,
        );
        const theory = batch === 1 ? 2 : streams === 1 ? 1 : stepMs.get(STREAMS)! / stepMs.get(STREAMS / 2)!;
        const own = { phase: "decode", stages: 1, replicas: 2, streams, batch } as const;
        yield { ...row, ...own, tok_s, ratio, ratio_one: tok_s * one / 1000, theory };
      }
    }
  }
}

async function main(flags: Flags): Promise<void> {
  const path = modelFile(flags.shape, flags.type, flags.type);
  if (flags.delays.some((delay) => delay > 0)) await buildRelay();
  const rows: ClusterRow[] = [];
  for await (const row of measure(await loadModel(path), flags)) {
    rows.push(row);
    if (flags.json === true) console.log(JSON.stringify(row));
    else console.error(JSON.stringify(row));
  }
  if (flags.json !== true) console.log(describeCluster(rows).join("\n"));
  const { shape, type, rounds } = flags;
  if (flags.record === true) record({ cluster: { shape, type, rounds, rows } });
}

if (import.meta.main) {
  await main(program.parse(Deno.args, { from: "user" }).opts<Flags>());
  Deno.exit(0);
}
