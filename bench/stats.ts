/** The middle one of sorted values, or the mean of the two in the middle. Throws a `RangeError` without values. */
export function median(values: readonly number[]): number {
  if (values.length === 0) throw new RangeError("no values have no median");
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 === 1 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2;
}

/** A line `slope·x + intercept`. */
export interface Line {
  readonly slope: number;
  readonly intercept: number;
}

/** The line of least squares through points; at least two different `x`. */
export function fitLine(points: readonly (readonly [x: number, y: number])[]): Line {
  const n = points.length;
  const mean = (index: 0 | 1) => points.reduce((sum, point) => sum + point[index], 0) / n;
  const [x0, y0] = [mean(0), mean(1)];
  let xy = 0, xx = 0;
  for (const [x, y] of points) {
    xy += (x - x0) * (y - y0);
    xx += (x - x0) ** 2;
  }
  if (!(xx > 0)) throw new RangeError("a line needs two different places");
  return { slope: xy / xx, intercept: y0 - (xy / xx) * x0 };
}

/** Pearson's correlation of two equally long series. */
export function correlation(a: readonly number[], b: readonly number[]): number {
  if (a.length !== b.length || a.length === 0) throw new RangeError(`${a.length} values against ${b.length}`);
  const mean = (values: readonly number[]) => values.reduce((sum, x) => sum + x, 0) / values.length;
  const [ma, mb] = [mean(a), mean(b)];
  let ab = 0, aa = 0, bb = 0;
  for (let i = 0; i < a.length; i++) {
    const [x, y] = [a[i]! - ma, b[i]! - mb];
    ab += x * y;
    aa += x * x;
    bb += y * y;
  }
  return ab / Math.sqrt(aa * bb);
}
