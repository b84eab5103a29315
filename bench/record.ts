/**
 * Results of benchmarks in files: `bench/results/<machine>-<date>.json`, the same as tables in `.md`, and drawings in `.svg`.
 * A run adds its part to the file of the day. Nothing in them tells where a machine is or what it is called.
 *
 * @module
 */
import { existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { cpus } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { z } from "zod";
import project from "../deno.json" with { type: "json" };
import { loadKernels } from "../worker/mod.ts";
import { drawCostLaw, drawRatios, drawShares } from "./plot.ts";
import { clusterRowSchema, costFitSchema, costRowSchema, kernelRowSchema, peerRowSchema } from "./rows.ts";
import { describeCluster, describeCost, describeFits, describeKernels, describePeer } from "./tables.ts";

const peerPartSchema = z.strictObject({
  /** The model's shape. */
  shape: z.string(),
  /** Engines with version and instruction set. */
  builds: z.array(z.string()),
  rounds: z.number().int().positive(),
  rows: z.array(peerRowSchema),
});
const kernelsPartSchema = z.strictObject({
  /** Of the matrix that memory is read for. */
  mebibytes: z.number().int().positive(),
  rounds: z.number().int().positive(),
  rows: z.array(kernelRowSchema),
  cost: z.array(costRowSchema),
  fits: z.array(costFitSchema),
});
const clusterPartSchema = z.strictObject({
  /** The model's shape, and the type of its matrices. */
  shape: z.string(),
  type: z.string(),
  rounds: z.number().int().positive(),
  /** What is to be known of the run. */
  note: z.string().optional(),
  rows: z.array(clusterRowSchema),
});

/** A results file. */
export const resultsSchema = z.strictObject({
  machine: z.strictObject({ cpu: z.string(), cores: z.number().int().positive(), isa: z.string() }),
  date: z.iso.date(),
  versions: z.strictObject({ lutra: z.string(), deno: z.string(), os: z.string() }),
  peer: peerPartSchema.optional(),
  kernels: kernelsPartSchema.optional(),
  cluster: clusterPartSchema.optional(),
});
export type Results = z.infer<typeof resultsSchema>;

/** What one benchmark measured. */
export type Part = Pick<Results, "peer" | "kernels" | "cluster">;

/** A file name's part for a processor's name. */
export function slug(name: string): string {
  return name.toLowerCase().replace(/\((r|tm)\)/g, "").replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "") || "unknown";
}

/** The results as people read them. `drawings`: the names of the pictures' files. */
export function describeResults(results: Results, drawings: readonly string[]): string {
  const { machine, date, versions, peer, kernels, cluster } = results;
  const code = (lines: readonly string[]) => ["```text", ...lines, "```", ""];
  return [
    `# ${machine.cpu}, ${date}`,
    "",
    `${machine.cores} cores, ${machine.isa}; Lutra ${versions.lutra}, Deno ${versions.deno}, ${versions.os}. How to read this:`,
    "[bench/README.md](../README.md).",
    "",
    ...drawings.flatMap((name) => [`![${name}](${name})`, ""]),
    ...(peer === undefined ? [] : [
      "## Against llama.cpp",
      "",
      `${peer.shape}; ${peer.builds.join(", ")}; medians of ${peer.rounds} rounds.`,
      "",
      ...code(describePeer(peer.rows)),
    ]),
    ...(kernels === undefined ? [] : [
      "## Kernels alone",
      "",
      `Matrices of ${kernels.mebibytes} MiB, medians of ${kernels.rounds} rounds.`,
      "",
      ...code(describeKernels(kernels.rows)),
      "## The cost law",
      "",
      ...code([...describeCost(kernels.cost), "", ...describeFits(kernels.fits)]),
    ]),
    ...(cluster === undefined ? [] : [
      "## A cluster",
      "",
      `${cluster.shape} of ${cluster.type}, one thread a worker, medians of ${cluster.rounds} rounds. ${
        cluster.note ?? ""
      }`.trim(),
      "",
      ...code(describeCluster(cluster.rows)),
    ]),
  ].join("\n");
}

/** Adds a part to the results of this machine and day, writes and draws them, and returns the path of the JSON. */
export function record(part: Part, folder = fileURLToPath(new URL("./results", import.meta.url))): string {
  const cpu = cpus()[0]?.model ?? "unknown processor";
  const date = new Date().toISOString().slice(0, 10);
  const name = `${slug(cpu)}-${date}`;
  const path = join(folder, `${name}.json`);
  mkdirSync(folder, { recursive: true });
  const before: Part = existsSync(path) ? resultsSchema.parse(JSON.parse(readFileSync(path, "utf8"))) : {};
  const { isa, cores } = loadKernels().deviceInfo();
  const results: Results = {
    ...before,
    machine: { cpu, cores, isa },
    date,
    versions: { lutra: project.version, deno: Deno.version.deno, os: `${Deno.build.os} ${Deno.build.arch}` },
    ...part,
  };
  const drawings: [string, string][] = [];
  if (results.peer !== undefined) drawings.push([`${name}-peer.svg`, drawRatios(results.peer.rows)]);
  if (results.kernels !== undefined) {
    drawings.push([`${name}-shares.svg`, drawShares(results.kernels.rows)]);
    drawings.push([`${name}-cost.svg`, drawCostLaw(results.kernels.cost)]);
  }
  writeFileSync(path, `${JSON.stringify(results, undefined, 1)}\n`);
  writeFileSync(join(folder, `${name}.md`), describeResults(results, drawings.map(([file]) => file)));
  for (const [file, svg] of drawings) writeFileSync(join(folder, file), svg);
  console.error(`recorded in ${name}.json, .md and .svg`);
  return path;
}
