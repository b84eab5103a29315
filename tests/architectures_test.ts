/** Every architecture against `transformers` (see `architectures.ts`), and by itself: the same bits however it is computed. */
import assert from "node:assert/strict";
import { compare, goldens, logitsOf, withFolder } from "./architectures.ts";
import type { Comparison, Golden } from "./architectures.ts";
import { sameBits } from "./cluster.ts";
import { fixture, repoPath } from "./data.ts";
import { ARCHITECTURES, loadModel } from "../model/mod.ts";
import { loadKernels } from "../worker/mod.ts";

/** Twice two roundings per part and the head's, each of 0.64 %: golden_test.ts derives it. */
const A8_BOUND = 2 * 0.0064 * Math.sqrt(4 * 2 + 1);

/** Whether logits are transformers', however they were computed. */
function assertEqual(golden: Golden, comparison: Comparison): void {
  const { prefill, decode, relative, medianRow, same, otherArgmax } = comparison;
  assert.ok(same, "decode on two shards gives other bits than prefill on one");
  if (golden.tolerance > 0) {
    assert.ok(prefill <= golden.tolerance && decode <= golden.tolerance, `logits differ by ${prefill} and ${decode}`);
    assert.equal(otherArgmax, 0);
  } else {
    // Where two experts are nearly as good, a router may choose the other, and all of the row is different.
    const error = golden.shows.includes("experts") ? medianRow : relative;
    assert.ok(error <= A8_BOUND, `relative error ${error} exceeds ${A8_BOUND}`);
  }
}

for (const golden of goldens.filter(({ name }) => name === "mixtral" || name === "qwen2")) {
  Deno.test(`${golden.name}: a GGUF that is split gives the bits of the whole one, on one shard and on two`, async () => {
    const names = [...Deno.readDirSync(fixture("architectures"))].map(({ name }) => name);
    const first = names.find((name) => name.startsWith(`${golden.name}-00001-of-`))!;
    const path = fixture(`architectures/${first}`);
    const model = await loadModel(path);
    assert.equal(model.id, golden.name);
    assert.ok(model.files.length >= 2, model.files.join());
    const expected = await logitsOf(golden);
    for (const shards of [1, 2]) assert.ok(sameBits(await logitsOf(golden, { path, shards }), expected));
  });
}

for (const golden of goldens) {
  const name = `${golden.name}, context ${golden.context}`;

  Deno.test(`${name}: prefill and decode equal transformers'`, async () => {
    assertEqual(golden, await compare(golden));
  });

  Deno.test(`${name}: the folder that transformers saves gives its logits too`, async () => {
    assertEqual(golden, await withFolder(golden, (path) => compare(golden, { path })));
  });

  if (golden.tolerance === 0) {
    Deno.test(`${name}: with activations of 16 bits every row has transformers' logits`, async () => {
      const { relative, same } = await compare(golden, { activations: "a16" });
      assert.ok(same, "decode on two shards gives other bits than prefill on one");
      assert.ok(relative <= A8_BOUND / 256, `relative error ${relative} exceeds ${A8_BOUND / 256}`);
    });
  }

  Deno.test(`${name}: with a cache of 8 bits logits stay near transformers'`, async () => {
    const { same, medianRow } = await compare(golden, { kvType: "q8" });
    assert.ok(same, "decode on two shards gives other bits than prefill on one");
    // Keys and values are rounded once in each of two layers, and low-bit products' activations as above.
    const roundings = 2 * 2 + (golden.tolerance > 0 ? 0 : 4 * 2 + 1);
    const bound = 2 * 0.0064 * Math.sqrt(roundings);
    // Of a row in the middle: where two experts were nearly as good, a router may choose the other, and all is different.
    assert.ok(medianRow > 1e-5 && medianRow <= bound, `relative error ${medianRow} exceeds ${bound}`);
  });

  Deno.test(`${name}: the same bits on every instruction set, with threads, chunks and neighbours`, async () => {
    const reference = await logitsOf(golden, { isa: "portable", kvType: "f16" });
    for (const isa of loadKernels().deviceInfo().available) {
      const options = { isa, kvType: "f16", threads: 2, shards: 2, chunk: 7, beside: true } as const;
      assert.ok(sameBits(await logitsOf(golden, options), reference), isa);
    }
  });
}

Deno.test("architectures: each has a golden, a line in the README, and a recorded result", () => {
  const readme = Deno.readTextFileSync(repoPath("README.md"));
  const results = Deno.readTextFileSync(repoPath("tests", "architectures.md"));
  for (const { name, models } of ARCHITECTURES) {
    assert.ok(goldens.some((golden) => golden.architecture === name), `no golden for ${name}`);
    assert.ok(readme.includes(`\`${name}\``) && readme.includes(models), `the README does not list ${name}: ${models}`);
  }
  for (const { name } of goldens) assert.ok(results.includes(`\n| ${name} `), `no result of ${name}`);
});
