/**
 * The `bench:peer` task: Lutra and llama.cpp on the same synthetic file, in one run, in turns.
 *
 * Both run in processes of their own, bound to as many cores as they have threads, and only one computes at a time. The
 * peer has its best settings: weights repacked, not mapped, on huge pages; see `engines/llama_cpp.ts`.
 *
 * @module
 */
import { rmSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { Command, Option } from "commander";
import { integer, number } from "../cli/options.ts";
import { checkAgreement, comparePhase, ROOM } from "./compare.ts";
import { peerLibraries } from "./engines/peer_package.ts";
import { EngineProcess } from "./engines/process.ts";
import type { EngineCommand } from "./engines/process.ts";
import { countsOf, listOf } from "./list_option.ts";
import { modelFile } from "./model_file.ts";
import { record } from "./record.ts";
import { PHASES } from "./rows.ts";
import type { PeerRow } from "./rows.ts";
import { describePeer } from "./tables.ts";
import { OWN_TYPES, SHAPES, SYNTHETIC_TYPES } from "./synthetic_model.ts";

const script = (name: string) => fileURLToPath(new URL(`./engines/${name}.ts`, import.meta.url));

/** The processes of both engines. */
export function engineCommands(threads: number): { lutra: EngineCommand; peer: EngineCommand } {
  const deno = (name: string, ...args: string[]) => ({
    command: Deno.execPath(),
    args: ["run", "-q", "-A", script(name), ...args],
    cores: threads,
  });
  return {
    lutra: { name: "Lutra", ...deno("lutra") },
    peer: {
      name: "llama.cpp",
      ...deno("llama_cpp", peerLibraries()),
      // Its weights on huge pages, as Lutra's are: a fifth faster than without.
      env: { GLIBC_TUNABLES: "glibc.malloc.hugetlb=1" },
    },
  };
}

const COMPARABLE = SYNTHETIC_TYPES.filter((type) => !OWN_TYPES.includes(type));

interface PeerFlags {
  types: string[];
  phases: PeerRow["phase"][];
  threads?: number[];
  shape: string;
  headType?: string;
  rounds: number;
  seconds: number;
  delete?: boolean;
  json?: boolean;
  record?: boolean;
}

const program = new Command("bench:peer")
  .description("Compare Lutra with llama.cpp, which is installed from npm into a cache folder once.")
  .option("--types <list>", `of ${COMPARABLE.join(",")}`, listOf(COMPARABLE), [
    "Q4_0",
    "Q4_K",
    "Q2_K",
    "TQ2_0",
    "TQ1_0",
  ])
  .option("--phases <list>", "decode, batch (8 sequences), prefill (256 tokens)", listOf(PHASES), [...PHASES])
  .option("--threads <list>", "numbers of threads (default: decode on one and on all cores, the rest on all)", countsOf)
  .addOption(new Option("--shape <name>", "the model's").choices(Object.keys(SHAPES)).default("tinyllama-1.1b"))
  .addOption(
    new Option("--head-type <type>", "of the head (default: what llama.cpp's quantiser takes)").choices(COMPARABLE),
  )
  .option("--rounds <n>", "measurements of each engine, in turns", integer(1), 5)
  .option("--seconds <s>", "about how long one lasts", number(0.001, 60), 0.4)
  .option("--delete", "delete the model files after use")
  .option("--json", "print rows as lines of JSON")
  .option("--record", "write the results to bench/results, and draw them");

async function main(flags: PeerFlags): Promise<void> {
  const { types, phases, shape, headType, rounds, seconds } = flags;
  const cores = navigator.hardwareConcurrency;
  const threadCounts = flags.threads ?? [...new Set([1, cores])];

  const rows: PeerRow[] = [];
  const builds = new Set<string>();
  for (const type of types) {
    const path = modelFile(shape, type, headType);
    for (const threads of threadCounts) {
      const wanted = phases.filter((phase) => flags.threads !== undefined || threads === cores || phase === "decode");
      if (wanted.length === 0) continue;
      const commands = engineCommands(threads);
      await using lutra = EngineProcess.start(commands.lutra);
      await using peer = EngineProcess.start(commands.peer);
      const request = { path, threads, ...ROOM };
      const infos = [await lutra.load(request), await peer.load(request)] as const;
      for (const { name, build } of infos) builds.add(`${name} ${build}`);
      await checkAgreement(lutra, peer);
      for (const phase of wanted) {
        const row = await comparePhase(lutra, peer, { type, phase, threads, rounds, seconds, info: infos[0] });
        rows.push(row);
        if (flags.json === true) console.log(JSON.stringify(row));
        else console.error(`${type} ${phase}, ${threads} threads: ${row.ratio.toFixed(2)} times llama.cpp`);
      }
    }
    if (flags.delete === true) rmSync(path);
  }
  if (!flags.json === true) {
    console.log(`${shape}, ${[...builds].join(", ")}, medians of ${rounds} rounds\n`);
    console.log(describePeer(rows).join("\n"));
  }
  if (flags.record === true) record({ peer: { shape, builds: [...builds], rounds, rows } });
}

if (import.meta.main) {
  try {
    await main(program.parse(Deno.args, { from: "user" }).opts<PeerFlags>());
  } catch (error) {
    if (!(error instanceof Error)) throw error;
    const { cause } = error;
    console.error(`error: ${error.message}${cause instanceof Error ? `\n${cause.message}` : ""}`);
    Deno.exit(1);
  }
}
