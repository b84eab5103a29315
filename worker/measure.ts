import { mkdtemp, open, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { decodeBatch, encodeBatch, maxResultBytes, shardTensors } from "../bus/mod.ts";
import type { BatchEntry, Shard, Speed } from "../bus/mod.ts";
import { WorkerError } from "./errors.ts";
import type { KernelLibrary, ShardChoices, ShardHandle } from "./kernels.ts";

/**
 * Each run is repeated for so long, in milliseconds, and so often, of which the fastest time counts: what else the device does for a
 * moment does not show, but a quota does, as Linux portions out processor time in half of that.
 */
const WINDOW_MS = 200;
const WINDOWS = 3;
/** Bytes of the floats that are 1, per GGML type. */
const ONES: Readonly<Record<number, readonly number[]>> = {
  0: [0, 0, 0x80, 0x3f], // F32
  1: [0, 0x3c], // F16
  30: [0x80, 0x3f], // BF16
};
/** Longer than any norm or bias, in bytes. */
const MOST_ONES = 1 << 22;
const GREEDY = {
  ...{ temperature: 0, topK: 0, topP: 1, minP: 0, repeatPenalty: 1, presencePenalty: 0, frequencyPenalty: 0 },
  ...{ penaltyLastN: 0, promptLength: 1, seed: 0n, logitBias: new Map<number, number>() },
} as const;

/**
 * How fast this device is with a shard of one layer and the head, of which no weights are needed: its tensors are read from a file
 * that is made for it and holds zeros, and ones where numbers are multiplied or divided by.
 *
 * @param memoryBytes Of which the weights may take half.
 * @throws {WorkerError | KernelError} when it cannot be measured.
 */
export async function measureSpeed(
  kernels: KernelLibrary,
  shard: Shard,
  choices: ShardChoices,
  memoryBytes: number,
): Promise<Pick<Speed, "msPerLayer" | "msHead">> {
  const folder = await mkdtemp(join(tmpdir(), "lutra-probe-"));
  try {
    const path = join(folder, "weights");
    await writeBlank(path, shard, memoryBytes / 2);
    const handle = await kernels.openShard({ ...shard, path }, choices);
    try {
      const layer = await timeToken(handle, shard, {});
      const all = shard.head === null ? layer : await timeToken(handle, shard, { sample: GREEDY });
      const layers = shard.end - shard.first;
      if (!(layer > 0)) throw new WorkerError(`a layer took ${layer} ms by this device's clock: it cannot be measured`);
      return { msPerLayer: layer / layers, msHead: Math.max(0, all - layer) };
    } finally {
      handle.close();
    }
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
}

/** A file of the shard's tensors, with holes where they are zero. */
async function writeBlank(path: string, shard: Shard, most: number): Promise<void> {
  const tensors = shardTensors(shard);
  const size = tensors.reduce((end, { offset, bytes }) => Math.max(end, offset + bytes), 0);
  if (size > most) {
    throw new WorkerError(`a layer and the head of ${size} bytes are too much to be measured within ${most} bytes`);
  }
  const file = await open(path, "w");
  try {
    await file.truncate(size);
    for (const { type, shape, offset, bytes } of tensors) {
      const one = shape.length === 1 ? ONES[type] : undefined;
      if (one === undefined || bytes > MOST_ONES) continue;
      const data = Uint8Array.from({ length: bytes }, (_, i) => one[i % one.length]!);
      await file.write(data, 0, bytes, offset);
    }
  } finally {
    await file.close();
  }
}

/** Milliseconds for a token. */
async function timeToken(
  handle: ShardHandle,
  shard: Shard,
  what: Pick<BatchEntry, "sample">,
): Promise<number> {
  const { embedding, vocab } = shard.hyper;
  const batch = encodeBatch([{ seq: 0, pos: 0, tokens: [0], ...what }]);
  const input = new Float32Array(shard.embedding === null ? embedding : 0).map((_, i) => (i % 7 - 3) / 8);
  const output = new Uint8Array(shard.head === null ? 4 * embedding : maxResultBytes(decodeBatch(batch), vocab));
  const stop = new Int32Array(new ArrayBuffer(4));
  const run = async () => {
    await handle.forward(batch, new Uint8Array(input.buffer), stop, output);
    handle.truncate(0, 0);
  };
  await run(); // touches the memory
  let best = Infinity;
  for (let window = 0; window < WINDOWS; window++) {
    const begin = performance.now();
    let [runs, ms] = [0, 0];
    while (ms < WINDOW_MS) {
      await run();
      runs++;
      ms = performance.now() - begin;
    }
    best = Math.min(best, ms / runs);
  }
  return best;
}
