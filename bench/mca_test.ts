import assert from "node:assert/strict";
import { describe, withoutTargets } from "./mca.ts";

Deno.test("withoutTargets: jumps and pages lose their targets, calls become jumps, other instructions lose nothing", () => {
  assert.equal(withoutTargets("b.ne 0x2b25c <kernel+0x2b4>"), "b.ne #4096");
  assert.equal(withoutTargets("cbz x22, 0x5632c <kernel>"), "cbz x22, #4096");
  assert.equal(withoutTargets("tbnz w8, #0x1f, 0x5632c <kernel>"), "tbnz w8, #0x1f, #4096");
  assert.equal(withoutTargets("adrp x8, 0x9f000 <table+0x10>"), "adrp x8, #4096");
  assert.equal(withoutTargets("bl 0x5632c <kernel>"), "b #4096");
  assert.equal(withoutTargets("blr x8"), "br x8");
  assert.equal(withoutTargets("and w8, w9, #0xffff"), "and w8, w9, #0xffff");
  assert.equal(withoutTargets("bic v0.8h, #0xff, lsl #8"), "bic v0.8h, #0xff, lsl #8");
});

Deno.test("describe: a row for each form, a column for each processor and set, empty where nothing was measured, and for memory", () => {
  const product = { type: "Q4_0", codes: "fields4", isa: "neon", batch: 1, weights: 1000, bytes: 0.5625 };
  const row = { ...product, instructions: 1, cycles: 125 };
  const lines = describe([{ ...row, cpu: "cortex-a72" }]).split("\n");
  assert.ok(lines.includes("| Q4_0 | fields4 |  |  | 0.125 (8.0) | 0.450 | 0.804 |"), lines.join("\n"));
  assert.ok(lines.includes("| Q4_0 | fields4 |  |  |  |"), "batch 8");
});
