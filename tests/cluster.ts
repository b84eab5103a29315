/**
 * A cluster in one process for the end-to-end tests: the true path, orchestrator → bus → worker → kernel library.
 *
 * @module
 */
import { InProcessBus } from "../bus/mod.ts";
import { loadModel } from "../model/mod.ts";
import { Engine } from "../orchestrator/mod.ts";
import type { EngineOptions } from "../orchestrator/mod.ts";
import { loadKernels, Worker } from "../worker/mod.ts";

/** Options of {@linkcode startCluster}. */
export interface ClusterOptions extends Partial<Omit<EngineOptions, "bus" | "model">> {
  /** Threads of each worker. @default {1} */
  threads?: number;
  /** Instruction set. Default: the best. */
  isa?: string;
}

/** Starts a worker for each shard and an engine; `await using` closes all. */
export async function startCluster(
  path: string,
  options: ClusterOptions = {},
): Promise<AsyncDisposable & { engine: Engine }> {
  const { threads = 1, isa, shards = 1, ...rest } = options;
  const bus = new InProcessBus();
  const workers: Worker[] = [];
  for (let i = 0; i < shards; i++) {
    workers.push(
      await Worker.start({
        bus,
        kernels: loadKernels(),
        id: `test-${i}`,
        threads,
        bandwidthGBps: 10,
        ...(isa === undefined ? {} : { isa }),
      }),
    );
  }
  const engine = await Engine.start({ bus, model: await loadModel(path), shards, workers: shards, ...rest });
  return {
    engine,
    async [Symbol.asyncDispose]() {
      await engine.close();
      await Promise.all(workers.map((worker) => worker.close()));
      await bus.close();
    },
  };
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
