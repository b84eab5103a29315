import assert from "node:assert/strict";
import { correlation, fitLine, median } from "./stats.ts";

Deno.test("median: the middle one, or the mean of the two in the middle; the order given does not matter", () => {
  assert.equal(median([3]), 3);
  assert.equal(median([9, 1, 5]), 5);
  assert.equal(median([10, 9, 2, 1]), 5.5);
  assert.throws(() => median([]), RangeError);
  const values = [2, 1];
  median(values);
  assert.deepEqual(values, [2, 1]);
});

Deno.test("fitLine: points on a line give that line, others that of least squares", () => {
  assert.deepEqual(fitLine([[1, 5], [2, 7], [4, 11]]), { slope: 2, intercept: 3 });
  const { slope, intercept } = fitLine([[0, 0], [1, 2], [2, 1]]);
  assert.ok(Math.abs(slope - 0.5) < 1e-12 && Math.abs(intercept - 0.5) < 1e-12);
  assert.throws(() => fitLine([[1, 2], [1, 3]]), RangeError);
  assert.throws(() => fitLine([]), RangeError);
});

Deno.test("correlation: 1, −1, and NaN for what does not vary", () => {
  assert.ok(Math.abs(correlation([1, 2, 3], [10, 20, 30]) - 1) < 1e-12);
  assert.ok(Math.abs(correlation([1, 2, 3], [3, 2, 1]) + 1) < 1e-12);
  assert.ok(Number.isNaN(correlation([1, 1], [1, 2])));
  assert.throws(() => correlation([1], [1, 2]), RangeError);
});
