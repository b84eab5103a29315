import assert from "node:assert/strict";
import { loadKernels } from "../worker/mod.ts";
import { BenchError, benchKernels } from "./kernels.ts";

const kernels = loadKernels();
const profile = "dev"; // which cargo test has built

Deno.test("benchKernels: a tiny run gives a row for every type, number of threads and batch, and the cost of 1 to 4 bits", async () => {
  const { isa } = kernels.deviceInfo();
  const seen: string[] = [];
  const options = {
    types: "Q4_K,TQ1_0",
    isa,
    threads: [1, 2],
    batch: [1, 16],
    mebibytes: 1,
    rounds: 1,
    profile,
  } as const;
  const { rows, cost, fits } = await benchKernels(options, (row) => seen.push(row.form));
  assert.deepEqual(rows.map((row) => [row.form, row.threads, row.batch]), [
    ["Q4_K", 1, 1],
    ["Q4_K", 1, 16],
    ["Q4_K", 2, 1],
    ["Q4_K", 2, 16],
    ["TQ1_0", 1, 1],
    ["TQ1_0", 1, 16],
    ["TQ1_0", 2, 1],
    ["TQ1_0", 2, 16],
  ]);
  assert.equal(seen.length, rows.length);
  for (const row of rows) {
    assert.equal(row.isa, isa);
    assert.equal(row.share === null, row.batch === 16);
  }
  for (const kernel of new Set(cost.map((row) => row.kernel))) {
    const bits = cost.filter((row) => row.kernel === kernel).map((row) => row.bits);
    assert.deepEqual(bits, [1, 2, 3, 4].slice(0, bits.length));
    assert.equal(fits.filter((fit) => fit.kernel === kernel).length, bits.length > 1 ? 1 : 0);
  }
});

Deno.test("benchKernels: a run that fails is a BenchError", async () => {
  await assert.rejects(benchKernels({ types: "Q9_9", mebibytes: 1, rounds: 1, profile }), BenchError);
});
