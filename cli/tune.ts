import type { Command } from "commander";
import { readGguf } from "../model/mod.ts";
import type { GgufFile } from "../model/mod.ts";
import { loadKernels } from "../worker/mod.ts";
import type { TuningReport } from "../worker/mod.ts";
import { table } from "./inspect.ts";
import { cacheChoice, integer } from "./options.ts";

interface TuneFlags {
  threads?: number;
  isa?: string;
  cache: boolean;
  json?: boolean;
}

/** Adds the command `tune`. */
export function addTune(program: Command): void {
  program.command("tune")
    .description("measure which kernels suit this device and a model's matrices, and keep the choice")
    .argument("<model>", "a GGUF file")
    .option("--threads <n>", "threads of a worker (default: the cores)", integer(1))
    .option("--isa <name>", "instruction set of the kernels (default: the best)")
    .option("--no-cache", "only show the measurements")
    .option("--json", "print JSON")
    .action(async (path: string, flags: TuneFlags) => {
      const gguf = readGguf(path);
      const kernels = loadKernels();
      const report = await kernels.tune({
        threads: flags.threads ?? kernels.deviceInfo().cores,
        isa: flags.isa ?? null,
        tune: "force",
        cache: flags.cache ? cacheChoice() : null,
        bytes: gguf.size,
        matrices: matrices(gguf),
      });
      console.log(flags.json === true ? JSON.stringify(report) : describe(report));
    });
}

/** The different matrices, those first of which there is most. */
function matrices(gguf: GgufFile): { type: number; rows: number; cols: number }[] {
  const found = new Map<string, { type: number; rows: number; cols: number; bytes: number }>();
  for (const { type, shape, bytes } of gguf.tensors.values()) {
    const [cols, rows] = shape;
    if (cols === undefined || rows === undefined) continue;
    const key = `${type} ${rows} ${cols}`;
    const matrix = found.get(key) ?? { type, rows, cols, bytes: 0 };
    matrix.bytes += bytes;
    found.set(key, matrix);
  }
  const sorted = [...found.values()].sort((a, b) => b.bytes - a.bytes);
  return sorted.map(({ type, rows, cols }) => ({ type, rows, cols }));
}

function kibibytes(bytes: number): string {
  return `${Math.round(bytes / 1024)} KiB`;
}

function describe(report: TuningReport): string {
  const trials = report.trials.map((t) => [
    `${t.chosen ? "*" : " "} ${t.type} ${t.rows} × ${t.cols}`,
    `${t.batch}`,
    t.form,
    t.kernel,
    `${t.width}`,
    kibibytes(t.blockBytes),
    t.inline ? "1" : `${report.threads}`,
    (1e6 * t.seconds).toFixed(1),
    ((t.rows * t.cols * t.batch) / t.seconds / 1e9).toFixed(1),
    t.ratio.toFixed(3),
  ]);
  const choices = report.choices.map((c) => {
    const plans = c.plans.map(({ most, kernel, width, blockBytes }) =>
      most === null ? `${kernel} × ${width} in ${kibibytes(blockBytes)}` : `${kernel} × ${width}`
    );
    return [
      `${c.type} ${c.rows} × ${c.cols}`,
      c.origin,
      c.form,
      c.inlineRows === null ? "" : `${c.inlineRows}`,
      ...plans,
    ];
  });
  const most = report.choices[0]?.plans.map(({ most }, i, plans) => {
    const least = (plans[i - 1]?.most ?? 0) + 1;
    return most === null ? `batch ${least}–` : most === least ? `batch ${most}` : `batch ${least}–${most}`;
  }) ?? [];
  return [
    ...table(["matrix", "batch", "form", "kernel", "rows", "block", "threads", "µs", "Gw/s", "ratio"], trials),
    "",
    ...table(["matrix", "", "form", "alone", ...most], choices),
    "",
    `${report.isa}, ${report.threads} threads, ${
      report.seconds.toFixed(1)
    } s; ratios are to the rule's choice. ${report.cpu}`,
    report.store === null ? "not kept" : `kept in ${report.store}`,
    ...report.warnings.map((warning) => `warning: ${warning}`),
  ].join("\n");
}
