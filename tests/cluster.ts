/**
 * A cluster in one process for the end-to-end tests, the true path: orchestrator → bus → worker → kernel library; and how
 * logits are compared.
 *
 * @module
 */
import { startLocalCluster } from "../cli/local_cluster.ts";
import type { LocalCluster, LocalClusterOptions } from "../cli/local_cluster.ts";
import { loadKernels } from "../worker/mod.ts";

// The library is never closed (see kernel_library.ts): opened before any test, it is no test's leak.
loadKernels();

/** Starts a cluster whose workers have one thread each unless told otherwise; `await using` closes it. */
export function startCluster(path: string, options: LocalClusterOptions = {}): Promise<LocalCluster> {
  return startLocalCluster(path, { threads: 1, ...options });
}

/** The id of the largest of `vocab` logits at row `row`; the lowest on ties. */
export function argmax(logits: Float32Array, row: number, vocab: number): number {
  let best = 0;
  for (let i = 1; i < vocab; i++) if (logits[row * vocab + i]! > logits[row * vocab + best]!) best = i;
  return best;
}

/** Largest absolute difference. */
export function maxDifference(a: Float32Array, b: Float32Array): number {
  if (a.length !== b.length) throw new Error(`${a.length} values against ${b.length}`);
  let most = 0;
  for (let i = 0; i < a.length; i++) {
    const difference = Math.abs(a[i]! - b[i]!);
    if (!(difference <= most)) most = difference; // NaN counts as a difference
  }
  return most;
}

/** Root mean square of the difference over that of `b`'s deviation from its mean. */
export function relativeError(a: Float32Array, b: Float32Array): number {
  let mean = 0;
  for (const x of b) mean += x / b.length;
  let difference = 0, spread = 0;
  for (let i = 0; i < b.length; i++) {
    difference += (a[i]! - b[i]!) ** 2;
    spread += (b[i]! - mean) ** 2;
  }
  return Math.sqrt(difference / spread);
}

/** Whether two arrays hold the same bits. */
export function sameBits(a: Float32Array, b: Float32Array): boolean {
  const [x, y] = [a, b].map((array) => new Uint32Array(array.buffer, array.byteOffset, array.length));
  return x!.length === y!.length && x!.every((word, i) => word === y![i]);
}
