/**
 * What kernels cost on Arm, without an Arm machine: the instructions that one product executes, as qemu logs them, timed by
 * llvm-mca's models of a Cortex-A72 (Raspberry Pi 4) and a Neoverse N1, which is a Cortex-A76 (Raspberry Pi 5; llvm-mca
 * silently takes an A57 for the name `cortex-a76`). Reads hit the first cache. The whole kernel counts, its scales included, but
 * neither the rounding of activations nor the making of tables.
 *
 * `deno run -A bench/mca.ts [--record] [TYPE…]`; needs Debian's llvm-19 beside what `.ci/arm64` installs.
 *
 * @module
 */
import { mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { z } from "zod";
import { cacheFolder } from "./cache.ts";

const ROOT = fileURLToPath(new URL("..", import.meta.url));
const TARGET = join(ROOT, "kernels/target/arm64");
const PROGRAM = join(TARGET, "aarch64-unknown-linux-gnu/release/examples/one_product");

/**
 * The processors, the sets of kernels that they run, and how many bytes a cycle each of a board's four cores can have of its
 * memory at best: 12 GB/s at 2.4 GHz, 5 GB/s at 1.8 GHz.
 */
const CPUS = [
  { cpu: "neoverse-n1", board: "Pi 5", sets: ["neon-dotprod", "neon"], features: "+dotprod", memory: 1.25 },
  { cpu: "cortex-a72", board: "Pi 4", sets: ["neon"], features: "", memory: 0.7 },
] as const;

const PRODUCTS: readonly (readonly [type: string, codes: string])[] = [
  ["L1", "planes1"],
  ["L1", "fields1"],
  ["L2", "planes2"],
  ["L2", "fields2"],
  ["L3", "planes3"],
  ["L3", "fields3"],
  ["Q4_0", "planes4"],
  ["Q4_0", "fields4"],
  ["TQ2_0", "planes2"],
  ["TQ2_0", "fields2"],
  ["TQ1_0", "trits"],
  ["Q2_K", "fields2"],
  ["Q3_K", "fields3"],
  ["Q4_K", "fields4"],
  ["Q6_K", "fields6"],
  ["Q8_0", "fields8"],
  ["IQ4_NL", "fields4"],
  ["F16", "floatf16"],
];
const BATCHES = [1, 8, 32];

/** One kernel on one processor. A weight counts once for each row of activations. */
export interface McaRow {
  readonly type: string;
  readonly codes: string;
  readonly isa: string;
  readonly cpu: string;
  readonly batch: number;
  readonly weights: number;
  /** Of a packed weight. */
  readonly bytes: number;
  readonly instructions: number;
  readonly cycles: number;
}

async function output(command: string, args: readonly string[]): Promise<string> {
  const { success, stdout, stderr } = await new Deno.Command(command, { args: [...args] }).output();
  if (!success) throw new Error(`${command} ${args.join(" ")} failed: ${new TextDecoder().decode(stderr)}`);
  return new TextDecoder().decode(stdout);
}

/**
 * An instruction as llvm-mca reads it: targets of jumps and pages do not matter to it, but must be within reach, and calls are
 * jumps, as it takes the functions, whose instructions follow, for 100 cycles.
 */
export function withoutTargets(instruction: string): string {
  const text = instruction.split("<")[0]!.replace(/^bl(r?)\s/, "b$1 ");
  return /^(b|b\.\w+|cbn?z|tbn?z|adrp?)\s/.test(text) ? text.replace(/0x[0-9a-f]+\s*$/, "#4096") : text.trim();
}

/** Kernels' functions: where each starts and how long it is. */
async function functions(): Promise<[start: number, length: number][]> {
  const kernels = /lutra_kernels\S*aarch64\S*(flat|nested|trits|bits_tile|float_f16|panel|multiply|decode_)/;
  const lines = (await output("llvm-nm-19", ["-S", PROGRAM])).split("\n").filter((line) => kernels.test(line));
  return lines.map((line) => line.split(" ").slice(0, 2).map((hex) => parseInt(hex, 16)) as [number, number]);
}

/** The program's instructions by address. */
async function disassembly(): Promise<Map<number, string>> {
  const found = new Map<number, string>();
  for (const line of (await output("llvm-objdump-19", ["-d", "--no-show-raw-insn", PROGRAM])).split("\n")) {
    const match = /^\s*([0-9a-f]+):\s+(.*)$/.exec(line);
    if (match !== null) found.set(parseInt(match[1]!, 16), withoutTargets(match[2]!.replaceAll("\t", " ")));
  }
  return found;
}

const summarySchema = z.object({
  CodeRegions: z.tuple([z.object({ SummaryView: z.object({ TotalCycles: z.number(), Instructions: z.number() }) })]),
});

/** Builds the kernels and times every product on every processor. */
export async function measure(types: readonly string[]): Promise<McaRow[]> {
  const build = ["--", "cargo", "build", "--quiet", "--release", "--manifest-path", "kernels/Cargo.toml"];
  await output(join(ROOT, ".ci/arm64"), [...build, "--example", "one_product"]);
  const [ranges, instructions] = await Promise.all([functions(), disassembly()]);
  const folder = cacheFolder("mca", crypto.randomUUID());
  const tasks = PRODUCTS.filter(([type]) => types.length === 0 || types.includes(type)).flatMap(([type, codes]) =>
    ["neon-dotprod", "neon"].flatMap((isa) => BATCHES.map((batch) => ({ type, codes, isa, batch })))
  );
  const rows: McaRow[][] = [];
  const measureNext = async () => {
    for (let i = rows.length; i < tasks.length; i = rows.length) {
      rows[i] = [];
      const { type, codes, isa, batch } = tasks[i]!;
      const product = [type, codes, isa, String(batch)];
      const log = join(folder, `log-${i}`);
      const qemu = (options: readonly string[]) =>
        output("qemu-aarch64-static", [
          "-cpu",
          "max",
          "-L",
          "/usr/aarch64-linux-gnu",
          "-D",
          log,
          ...options,
          PROGRAM,
          ...product,
        ]);
      await qemu(["-d", "page"]);
      // The first mapping is the program's.
      const base = parseInt(/^([0-9a-f]{16})-/m.exec(readFileSync(log, "utf8"))?.[1] ?? "", 16);
      const filter = ranges.map(([start, length]) => `${base + start}+${length}`).join(",");
      const said = await qemu(["-singlestep", "-d", "exec,nochain", "-dfilter", filter]);
      const [, weights, bytes] = /^(\d+) weights of (\S+) bytes/.exec(said)!.map(Number) as [number, number, number];
      const executed = readFileSync(log, "utf8").matchAll(/^Trace \d+: \w+ \[\w+\/(\w+)\//gm);
      const lines = [...executed].map(([, pc]) => instructions.get(parseInt(pc!, 16) - base));
      if (lines.length === 0 || lines.includes(undefined)) throw new Error(`no trace of ${product.join(" ")}`);
      rmSync(log);
      const listing = join(folder, `listing-${i}.s`);
      writeFileSync(listing, `${lines.join("\n")}\n`);
      for (const { cpu, sets, features } of CPUS) {
        if (!(sets as readonly string[]).includes(isa)) continue;
        const options = ["-mtriple=aarch64", `-mcpu=${cpu}`, `-mattr=${features}`, "-iterations=1", "-json"];
        const json = JSON.parse(await output("llvm-mca-19", [...options, listing]));
        const [{ SummaryView }] = summarySchema.parse(json).CodeRegions;
        rows[i]!.push({
          ...{ type, codes, isa, cpu, batch, weights, bytes },
          instructions: SummaryView.Instructions,
          cycles: SummaryView.TotalCycles,
        });
      }
    }
  };
  try {
    await Promise.all(Array.from({ length: navigator.hardwareConcurrency }, measureNext));
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
  return rows.flat();
}

/**
 * Tables of cycles per weight and of weights per cycle for each processor and set, and for a batch of 1 of the cycles that a
 * board's memory takes for the weight's bytes.
 */
export function describe(rows: readonly McaRow[]): string {
  const columns = CPUS.flatMap(({ cpu, board, sets }) =>
    sets.map((isa) => ({ cpu, isa, name: `${cpu} (${board}), ${isa}` }))
  );
  const cell = (row: McaRow | undefined) =>
    row === undefined ? "" : `${(row.cycles / row.weights).toFixed(3)} (${(row.weights / row.cycles).toFixed(1)})`;
  const table = (line: (name: string, header: boolean) => readonly string[]) => {
    const header = line("", true);
    const names = [...new Set(rows.map((row) => `${row.type} | ${row.codes}`))];
    return [
      `| type | codes | ${header.join(" | ")} |`,
      `| --- | --- | ${header.map(() => "---:").join(" | ")} |`,
      ...names.map((name) => `| ${name} | ${line(name, false).join(" | ")} |`),
      "",
    ];
  };
  const lines = BATCHES.flatMap((batch) => [
    `Batch ${batch}:`,
    "",
    ...table((name, header) => {
      const cells = columns.map((column) =>
        header ? column.name : cell(
          rows.find((r) =>
            `${r.type} | ${r.codes}` === name && r.cpu === column.cpu && r.isa === column.isa && r.batch === batch
          ),
        )
      );
      if (batch > 1) return cells;
      const bytes = rows.find((r) => `${r.type} | ${r.codes}` === name)?.bytes ?? 0;
      const memory = CPUS.map((cpu) => header ? `memory of a ${cpu.board}` : (bytes / cpu.memory).toFixed(3));
      return [...cells, ...memory];
    }),
  ]);
  return lines.join("\n");
}

if (import.meta.main) {
  const types = Deno.args.filter((arg) => arg !== "--record");
  const rows = await measure(types);
  const table = describe(rows);
  console.log(table);
  if (Deno.args.includes("--record")) {
    const date = new Date().toISOString().slice(0, 10);
    const path = join(ROOT, "bench/results", `arm-mca-${date}`);
    const llvm = /LLVM version \S+/.exec(await output("llvm-mca-19", ["--version"]))?.[0];
    mkdirSync(join(ROOT, "bench/results"), { recursive: true });
    writeFileSync(`${path}.json`, `${JSON.stringify({ date, llvm, rows }, undefined, 1)}\n`);
    const head = `# Arm by llvm-mca, ${date}\n\nCycles per weight (weights per cycle), ${llvm}. How to read this:`;
    writeFileSync(`${path}.md`, `${head}\n[bench/README.md](../README.md#arm).\n\n${table}`);
  }
}
