/** `deno task faults --runs N --json`: runs the fault matrix and prints a row for every fault. */
import { Command } from "commander";
import { runFaults } from "./matrix.ts";

const { runs, json, only } = new Command("faults")
  .description("break a cluster in the midst of answers, and count the tokens that it costs")
  .option("--runs <n>", "runs of every fault", Number, 1)
  .option("--only <fault...>", "these faults alone")
  .option("--json", "print JSON lines")
  .parse(Deno.args, { from: "user" }).opts<{ runs: number; json?: boolean; only?: string[] }>();
let failed = false;
for await (const row of runFaults(runs, only)) {
  failed ||= row.lost + row.repeated + row.changed > 0;
  if (json === true) console.log(JSON.stringify(row));
  else {
    const { fault, lost, repeated, changed, detect_ms, recover_ms } = row;
    const tokens = `${lost} lost, ${repeated} repeated, ${changed} changed`;
    console.log(`${fault}: ${runs} runs, ${tokens}; noticed ≤ ${detect_ms} ms, recovered ≤ ${recover_ms} ms`);
  }
}
Deno.exit(failed ? 1 : 0);
