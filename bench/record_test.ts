import assert from "node:assert/strict";
import { readdirSync, readFileSync, rmSync } from "node:fs";
import { hostname } from "node:os";
import { dirname, join } from "node:path";
import { loadKernels } from "../worker/mod.ts";
import { drawBars } from "./plot.ts";
import { record, resultsSchema, slug } from "./record.ts";
import type { CostRow, KernelRow, PeerRow } from "./rows.ts";
import { costFits, describePeer } from "./tables.ts";

loadKernels(); // before the test, as it is never closed

const peer: PeerRow = {
  type: "Q4_0",
  phase: "decode",
  threads: 2,
  batch: 1,
  lutra: 50,
  peer: 40,
  ratio: 1.25,
  gbps: 25,
  bandwidth: 30,
  share: 25 / 30,
};
const kernel: KernelRow = {
  form: "Q4_0",
  codes: "fields4",
  kernel: "dot",
  preferred: true,
  isa: "avx512",
  threads: 2,
  batch: 1,
  bits: 4.5,
  gweights: 44,
  gbps: 25,
  bandwidth: 30,
  share: 25 / 30,
  cachedGweights: 60,
};
const cost: CostRow[] = [1, 2, 3, 4].map((bits) => ({
  isa: "avx512",
  kernel: "lookup",
  bits,
  nanoseconds: 0.001 + 0.002 * bits,
}));

Deno.test("record: parts of a day come together in one file, with tables and drawings, and nothing tells the machine's name", () => {
  const folder = Deno.makeTempDirSync();
  try {
    const path = record({ peer: { shape: "tiny", builds: ["lutra avx512"], rounds: 3, rows: [peer] } }, folder);
    assert.equal(
      record({ kernels: { mebibytes: 1024, rounds: 7, rows: [kernel], cost, fits: costFits(cost) } }, folder),
      path,
    );
    const results = resultsSchema.parse(JSON.parse(readFileSync(path, "utf8")));
    assert.deepEqual([results.peer?.rows, results.kernels?.rows], [[peer], [kernel]]);
    assert.equal(results.kernels?.fits[0]?.slope.toFixed(6), "2.000000");
    const names = readdirSync(folder).sort();
    assert.deepEqual(names.map((name) => name.replace(/^.*\d{4}-\d\d-\d\d/, "")), [
      "-cost.svg",
      "-peer.svg",
      "-shares.svg",
      ".json",
      ".md",
    ]);
    const all = names.map((name) => readFileSync(join(folder, name), "utf8"));
    for (const text of all) {
      assert.ok(!text.includes(hostname()) && !text.includes(dirname(folder)) && !/NaN|undefined/.test(text));
    }
    assert.match(all[4]!, /avx512 lookup: 2\.00 ps\/weight for each bit, and 1\.00 ps\/weight/);
    for (const name of names.slice(0, 3)) assert.ok(all[4]!.includes(`](${name})`));
  } finally {
    rmSync(folder, { recursive: true });
  }
});

Deno.test("slug: a processor's name as part of a file's", () => {
  assert.equal(slug("Intel(R) Xeon(R) Processor"), "intel-xeon-processor");
  assert.equal(slug("  "), "unknown");
});

Deno.test("drawBars: bars are as long as their values, and names cannot break the drawing", () => {
  const svg = drawBars("a < b & c", ["one", "two"], [{ label: "<x>", values: [1, null] }, {
    label: "y",
    values: [null, 2],
  }]);
  const widths = [...svg.matchAll(/width="([\d.]+)" height="11" fill/g)].map((match) => Number(match[1]));
  const [first, second] = widths.filter((width) => width !== 11);
  assert.equal(first! * 2, second);
  assert.ok(svg.includes("a &lt; b &amp; c") && svg.includes("&lt;x&gt;") && !svg.includes("<x>"));
});

Deno.test("describePeer: shares as percent, and blanks where memory does not limit", () => {
  const lines = describePeer([peer, { ...peer, phase: "prefill", gbps: null, bandwidth: null, share: null }]);
  assert.match(lines[1]!, /1\.25 +25\.0 +30\.0 +83 %$/);
  assert.match(lines[2]!, /1\.25$/);
});
