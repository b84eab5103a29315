import assert from "node:assert/strict";
import { RecentSet, SeenSteps } from "./seen_steps.ts";

Deno.test("SeenSteps: each step counts once, in any near order, and the old count as seen", () => {
  const steps = new SeenSteps(4);
  const accepted = [0, 1, 1, 0, 3, 2, 2, 10, 6, 7, 7, 9, 3].map((step) => steps.add(step));
  assert.deepEqual(accepted, [true, true, false, false, true, true, false, true, false, true, false, true, false]);
});

Deno.test("SeenSteps: memory is bounded by the window", () => {
  const steps = new SeenSteps(8);
  for (let step = 0; step < 1000; step += 2) {
    assert(steps.add(step + 1));
    assert(steps.add(step));
    assert(steps.size <= 10, `${steps.size}`);
  }
});

Deno.test("RecentSet: forgets the oldest beyond its capacity", () => {
  const set = new RecentSet(2);
  [1, 2, 2, 3].forEach((n) => set.add(n));
  assert.deepEqual([1, 2, 3].map((n) => set.has(n)), [false, true, true]);
});
