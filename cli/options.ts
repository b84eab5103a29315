import { InvalidArgumentError, Option } from "commander";
import type { Command } from "commander";
import type { SamplingOptions } from "../orchestrator/mod.ts";
import type { CacheChoice, Tuning } from "../worker/mod.ts";
import type { LocalClusterOptions } from "./local_cluster.ts";

/** Parses an integer from `min` on. */
export function integer(min: number): (text: string) => number {
  return (text) => {
    const value = Number(text);
    if (!/^-?\d+$/.test(text) || !Number.isSafeInteger(value) || value < min) {
      throw new InvalidArgumentError(`It must be an integer from ${min} on.`);
    }
    return value;
  };
}

/** Parses a number between `min` and `max`. */
export function number(min: number, max: number): (text: string) => number {
  return (text) => {
    const value = Number(text);
    if (text.trim() === "" || !(value >= min && value <= max)) {
      throw new InvalidArgumentError(`It must be a number from ${min} to ${max}.`);
    }
    return value;
  };
}

/** How a model is loaded, as the command line says it. */
export interface ClusterFlags {
  shards?: number;
  threads?: number;
  context?: number;
  kvType?: "f16" | "f32" | "q8";
  activations?: "a8" | "a16";
  isa?: string;
  pin?: boolean;
  /** False: `--no-cache`. */
  cache?: boolean;
  tune?: Tuning;
}

/** Adds the options of {@linkcode ClusterFlags}. */
export function withClusterOptions(command: Command): Command {
  return command
    .option("--shards <n>", "split the layers over n workers", integer(1))
    .option("--threads <n>", "threads of each worker (default: the cores, divided by the shards)", integer(1))
    .option("--context <tokens>", "most tokens of prompt and answer (default: the model's, at most 8192)", integer(2))
    .addOption(
      new Option("--kv-type <type>", "element type of the KV cache").choices(["f16", "f32", "q8"]).default("f16"),
    )
    .addOption(
      new Option(
        "--activations <bits>",
        "round what low-bit weights multiply to 8 bits, or to 16: exacter, up to half as fast",
      )
        .choices(["a8", "a16"]).default("a8"),
    )
    .option("--isa <name>", "instruction set of the kernels (default: the best)")
    .option("--pin", "bind each thread to a core, the fastest first (Linux)")
    .option("--no-cache", "do not keep packed weights and measured choices of kernels on disk for the next start")
    .addOption(
      new Option("--tune <mode>", "measure kernels: once and for large models only, never, or anew")
        .choices(["auto", "off", "force"]).default("auto"),
    );
}

/** Bytes of packed weights that are kept on disk, unless `LUTRA_CACHE_GB` says otherwise. */
const CACHE_BYTES = 16e9;

/**
 * The cache of packed weights: in the folder that the environment names (`LUTRA_CACHE`, `XDG_CACHE_HOME`), of at most
 * `LUTRA_CACHE_GB` × 10⁹ bytes.
 */
export function cacheChoice(): CacheChoice {
  const text = Deno.env.get("LUTRA_CACHE_GB") ?? "";
  const gigabytes = Number(text);
  if (!(gigabytes >= 0 && gigabytes <= 1e6)) {
    throw new InvalidArgumentError("LUTRA_CACHE_GB must be a number of gigabytes.");
  }
  return { maxBytes: text === "" ? CACHE_BYTES : Math.round(1e9 * gigabytes) };
}

/** The cluster's options that the flags stand for. */
export function clusterOptions(flags: ClusterFlags): LocalClusterOptions {
  const { shards, threads, context, kvType, activations, isa, pin, cache, tune } = flags;
  return {
    cache: cache === false ? null : cacheChoice(),
    ...(shards === undefined ? {} : { shards }),
    ...(threads === undefined ? {} : { threads }),
    ...(context === undefined ? {} : { context }),
    ...(kvType === undefined ? {} : { kvType }),
    ...(activations === undefined ? {} : { activations }),
    ...(isa === undefined ? {} : { isa }),
    ...(pin === true ? { pin: "cores" } : {}),
    ...(tune === undefined ? {} : { tune }),
  };
}

/** How tokens are chosen, as the command line says it. */
export interface SamplingFlags {
  temperature?: number;
  topK?: number;
  topP?: number;
  minP?: number;
  repeatPenalty?: number;
  seed?: number;
}

/** Adds the options of {@linkcode SamplingFlags}. */
export function withSamplingOptions(command: Command): Command {
  return command
    .option("--temperature <x>", "0 always takes the most probable token (default: 0.8)", number(0, 100))
    .option("--top-k <n>", "choose among the n most probable tokens, 0: all (default: 40)", integer(0))
    .option("--top-p <x>", "… that make up this probability (default: 0.95)", number(0, 1))
    .option("--min-p <x>", "… at least this probable beside the best (default: 0.05)", number(0, 1))
    .option("--repeat-penalty <x>", "make repetition less probable, 1: do not (default: 1)", number(0.001, 1000))
    .option("--seed <n>", "the same seed gives the same answer (default: random)", integer(0));
}

/** The sampling that the flags stand for. */
export function samplingOptions(flags: SamplingFlags): Partial<SamplingOptions> {
  const { temperature, topK, topP, minP, repeatPenalty, seed } = flags;
  return {
    ...(temperature === undefined ? {} : { temperature }),
    ...(topK === undefined ? {} : { topK }),
    ...(topP === undefined ? {} : { topP }),
    ...(minP === undefined ? {} : { minP }),
    ...(repeatPenalty === undefined ? {} : { repeatPenalty }),
    ...(seed === undefined ? {} : { seed: BigInt(seed) }),
  };
}
