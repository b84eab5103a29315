/**
 * The `bench:kernels` task: products of every packed form alone (kernels/examples/bench_kernels.rs), as a table, rows of JSON
 * or a record.
 *
 * @module
 */
import { fileURLToPath } from "node:url";
import { Command } from "commander";
import { z } from "zod";
import { integer } from "../cli/options.ts";
import { lines } from "./engines/engine.ts";
import { countsOf } from "./list_option.ts";
import { record } from "./record.ts";
import { costRowSchema, kernelRowSchema } from "./rows.ts";
import type { CostFit, CostRow, KernelRow } from "./rows.ts";
import { costFits, describeCost, describeFits, describeKernels } from "./tables.ts";

const lineSchema = z.union([z.strictObject({ row: kernelRowSchema }), z.strictObject({ cost: costRowSchema })]);

/** The program could not be built, failed, or printed what it should not. */
export class BenchError extends Error {
  override readonly name = "BenchError";
}

/** What to measure; the program's defaults stand for what is absent. */
export interface KernelOptions {
  types?: string;
  isa?: string;
  threads?: readonly number[];
  batch?: readonly number[];
  mebibytes: number;
  rounds: number;
  all?: boolean;
  /** How it is built; figures of the dev profile say nothing. @default {"release"} */
  profile?: "release" | "dev";
}

/** Builds and runs the program; `onRow` hears of each row as it comes. @throws {BenchError} */
export async function benchKernels(
  options: KernelOptions,
  onRow: (row: KernelRow) => void = () => {},
): Promise<{ rows: KernelRow[]; cost: CostRow[]; fits: CostFit[] }> {
  const { types, isa, threads, batch, mebibytes, rounds, all, profile = "release" } = options;
  const manifest = fileURLToPath(new URL("../kernels/Cargo.toml", import.meta.url));
  const args = ["--mebibytes", `${mebibytes}`, "--rounds", `${rounds}`];
  if (types !== undefined) args.push("--types", types);
  if (isa !== undefined) args.push("--isa", isa);
  if (threads !== undefined) args.push("--threads", threads.join(","));
  if (batch !== undefined) args.push("--batch", batch.join(","));
  if (all === true) args.push("--all");
  const build = [
    "run",
    "--profile",
    profile,
    "--locked",
    "--quiet",
    "--manifest-path",
    manifest,
    "--example",
    "bench_kernels",
  ];
  const child = new Deno.Command("cargo", { args: [...build, "--", ...args], stdout: "piped", stderr: "inherit" })
    .spawn();
  const [rows, cost]: [KernelRow[], CostRow[]] = [[], []];
  for await (const line of lines(child.stdout)) {
    let parsed;
    try {
      parsed = lineSchema.parse(JSON.parse(line));
    } catch (cause) {
      child.kill();
      await child.status;
      throw new BenchError(`bench_kernels printed a line that is no row: ${line.slice(0, 200)}`, { cause });
    }
    if ("row" in parsed) {
      rows.push(parsed.row);
      onRow(parsed.row);
    } else cost.push(parsed.cost);
  }
  const { success, code } = await child.status;
  if (!success) throw new BenchError(`bench_kernels failed with code ${code}; its own words are above`);
  return { rows, cost, fits: costFits(cost) };
}

interface Flags extends KernelOptions {
  json?: boolean;
  record?: boolean;
}

if (import.meta.main) {
  const flags = new Command("bench:kernels")
    .description("Measure products of every packed form alone, beside the memory's read bandwidth.")
    .option("--types <list>", "types of the weights, as Q4_0,TQ1_0 (default: all)")
    .option("--isa <list>", "instruction sets (default: all of this machine but portable)")
    .option("--threads <list>", "numbers of threads (default: one and all cores)", countsOf)
    .option("--batch <list>", "activation rows (default: 1,8,256)", countsOf)
    .option("--mebibytes <n>", "memory that matrices take together; several times the caches", integer(1), 1024)
    .option("--rounds <n>", "readings and products, in turns", integer(1), 5)
    .option("--all", "every form of a type and every kernel of a form, not the usual ones alone")
    .option(
      "--json",
      "print rows as lines of JSON; then the cost law's (nanoseconds a weight) and its lines (picoseconds)",
    )
    .option("--record", "write the results to bench/results, and draw them")
    .parse(Deno.args, { from: "user" }).opts<Flags>();
  try {
    const { rows, cost, fits } = await benchKernels(flags, (row) => {
      if (flags.json === true) return console.log(JSON.stringify(row));
      // All types take a quarter of an hour: show that it goes on.
      const { form, codes, kernel, isa, threads, batch, gweights } = row;
      console.error(
        `${form} ${codes} ${kernel}, ${isa}, ${threads} threads, batch ${batch}: ${gweights.toFixed(1)} Gweights/s`,
      );
    });
    if (flags.json === true) { for (const row of [...cost, ...fits]) console.log(JSON.stringify(row)); }
    else console.log([...describeKernels(rows), "", ...describeCost(cost), "", ...describeFits(fits)].join("\n"));
    if (flags.record === true) {
      record({ kernels: { mebibytes: flags.mebibytes, rounds: flags.rounds, rows, cost, fits } });
    }
  } catch (error) {
    if (!(error instanceof BenchError)) throw error;
    console.error(`error: ${error.message}`);
    Deno.exit(1);
  }
}
