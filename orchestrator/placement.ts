import { PlacementError } from "./errors.ts";

/** What a layer costs a device. */
export interface LayerCost {
  /** Bytes held: packed weights and KV cache. */
  readonly memoryBytes: number;
  /** Bytes read to decode one token. */
  readonly readBytes: number;
}

/** What a model costs. */
export interface ModelCost {
  readonly layers: readonly LayerCost[];
  /** Bytes that the first stage holds besides its layers. */
  readonly embeddingBytes: number;
  /** What the last stage holds and reads besides its layers. */
  readonly head: LayerCost;
}

/** A device that offers itself. */
export interface Device {
  readonly id: string;
  /** Bytes offered for weights and KV cache. */
  readonly memoryBytes: number;
  /** Memory read bandwidth in GB/s; `null` counts as the median of the others. */
  readonly bandwidthGBps: number | null;
}

/** A stage of the pipeline: layers `first` to `end` (exclusive) on a worker. */
export interface PlacedStage {
  readonly worker: string;
  readonly first: number;
  readonly end: number;
}

/** Options of {@linkcode place}. */
export interface PlaceOptions {
  /**
   * Exactly so many stages, at most one per layer; more than there are devices puts several on one. Default: as many devices
   * as make the slowest stage fastest.
   */
  shards?: number;
}

/** So many devices are tried in every order; of more, the fastest come first. */
const MAX_PERMUTED = 8;

/**
 * Splits the layers into contiguous ranges, one per device used, so that the slowest stage is as fast as can be and no
 * device holds more than it offers. A stage's time is the bytes it reads for a token over its device's bandwidth. Among
 * equally fast splits the one with fewest stages wins, then the one that uses and orders devices as they are given.
 *
 * @throws {PlacementError} with every device's share when the model does not fit.
 */
export function place(cost: ModelCost, devices: readonly Device[], options: PlaceOptions = {}): PlacedStage[] {
  const { shards } = options;
  const layers = cost.layers.length;
  if (devices.length === 0) throw new PlacementError("there are no workers");
  if (shards !== undefined && (!Number.isInteger(shards) || shards < 1 || shards > layers)) {
    throw new PlacementError(`${shards} shards are asked for; a model of ${layers} layers can have 1 to ${layers}`);
  }
  const found = shards === undefined || shards <= devices.length
    ? split(cost, devices, shards)
    : split(cost, devices, Math.min(devices.length, layers)) ?? split(cost, devices, undefined);
  if (found === undefined) throw new PlacementError(shortfall(cost, devices, shards));
  while (shards !== undefined && found.length < shards) divideLargest(found);
  return found;
}

/** What each stage of a split holds, in bytes, and the seconds that it takes for a token as far as reading weights goes. */
export function stageCosts(
  cost: ModelCost,
  devices: readonly Device[],
  stages: readonly PlacedStage[],
): { memoryBytes: number; seconds: number }[] {
  const range = rangeCosts(cost);
  const bandwidths = knownBandwidths(devices);
  return stages.map(({ worker, first, end }) => {
    const { memoryBytes, readBytes } = range(first, end);
    const at = devices.findIndex((device) => device.id === worker);
    return { memoryBytes, seconds: readBytes / (bandwidths[at]! * 1e9) };
  });
}

/** Seconds that the slowest device of a split takes for a token: its stages take turns. */
export function slowestStage(cost: ModelCost, devices: readonly Device[], stages: readonly PlacedStage[]): number {
  const perWorker = new Map<string, number>();
  stageCosts(cost, devices, stages).forEach(({ seconds }, i) => {
    const { worker } = stages[i]!;
    perWorker.set(worker, (perWorker.get(worker) ?? 0) + seconds);
  });
  return Math.max(...perWorker.values());
}

/** Cuts the stage with most layers in two, both on its device. */
function divideLargest(stages: PlacedStage[]): void {
  const sizes = stages.map(({ first, end }) => end - first);
  const at = sizes.indexOf(Math.max(...sizes));
  const { worker, first, end } = stages[at]!;
  const middle = first + Math.ceil((end - first) / 2);
  stages.splice(at, 1, { worker, first, end: middle }, { worker, first: middle, end });
}

interface Best {
  time: number;
  device: number;
  from: number;
}

/** The best split with `count` stages on different devices, or with any number of them. */
function split(cost: ModelCost, devices: readonly Device[], count: number | undefined): PlacedStage[] | undefined {
  const layers = cost.layers.length;
  const range = rangeCosts(cost);
  const bandwidths = knownBandwidths(devices);
  const time = (device: number, from: number, to: number) => {
    const { memoryBytes, readBytes } = range(from, to);
    return memoryBytes > devices[device]!.memoryBytes ? Infinity : readBytes / bandwidths[device]!;
  };
  // A state is a set of devices in use (or a prefix of the ordered ones, with a count) and the layers they cover.
  const chain: PlacedStage[] = [];
  if (devices.length <= MAX_PERMUTED) {
    const best: (Best | undefined)[][] = Array.from({ length: 1 << devices.length }, () => []);
    best[0]![0] = { time: 0, device: -1, from: 0 };
    let winner: { set: number; time: number; size: number } | undefined;
    for (let set = 1; set < best.length; set++) {
      const size = bits(set);
      if (size > (count ?? layers)) continue;
      for (let device = devices.length - 1; device >= 0; device--) {
        if (!(set & (1 << device))) continue;
        const before = best[set & ~(1 << device)]!;
        for (let to = size; to <= layers; to++) {
          for (let from = to - 1; from >= size - 1; from--) {
            const prior = before[from];
            if (prior === undefined) continue;
            const own = time(device, from, to);
            if (own === Infinity) break; // a longer range needs still more memory
            const slowest = Math.max(prior.time, own);
            if (slowest < (best[set]![to]?.time ?? Infinity)) best[set]![to] = { time: slowest, device, from };
          }
        }
      }
      const whole = best[set]![layers];
      if (whole === undefined || (count !== undefined && size !== count)) continue;
      if (
        winner === undefined || whole.time < winner.time || (whole.time === winner.time && size < winner.size)
      ) winner = { set, time: whole.time, size };
    }
    if (winner === undefined) return undefined;
    for (let set = winner.set, to = layers; to > 0;) {
      const { device, from } = best[set]![to]!;
      chain.unshift({ worker: devices[device]!.id, first: from, end: to });
      set &= ~(1 << device);
      to = from;
    }
    return chain;
  }
  const order = devices.map((_, i) => i).sort((a, b) => bandwidths[b]! - bandwidths[a]!);
  const most = Math.min(count ?? layers, devices.length);
  // best[n][to]: `to` layers on n of the devices seen so far; the chain of earlier stages is kept in `stages`.
  const best: ({ time: number; stages: PlacedStage[] } | undefined)[][] = Array.from({ length: most + 1 }, () => []);
  best[0]![0] = { time: 0, stages: [] };
  for (const device of order) {
    for (let n = most; n >= 1; n--) {
      for (let to = n; to <= layers; to++) {
        for (let from = to - 1; from >= n - 1; from--) {
          const prior = best[n - 1]![from];
          if (prior === undefined) continue;
          const slowest = Math.max(prior.time, time(device, from, to));
          if (slowest >= (best[n]![to]?.time ?? Infinity)) continue;
          const stage = { worker: devices[device]!.id, first: from, end: to };
          best[n]![to] = { time: slowest, stages: [...prior.stages, stage] };
        }
      }
    }
  }
  const whole = best.map((row) => row[layers]);
  const candidates = count === undefined ? whole : [whole[count]];
  let winner: { time: number; stages: PlacedStage[] } | undefined;
  for (const candidate of candidates) {
    if (candidate !== undefined && candidate.time < (winner?.time ?? Infinity)) winner = candidate;
  }
  return winner?.stages;
}

/** Cost of layers `from` to `to` (exclusive), with embedding and head where they belong. */
function rangeCosts(cost: ModelCost): (from: number, to: number) => LayerCost {
  const memory = [0];
  const read = [0];
  for (const layer of cost.layers) {
    memory.push(memory.at(-1)! + layer.memoryBytes);
    read.push(read.at(-1)! + layer.readBytes);
  }
  return (from, to) => {
    const first = from === 0 ? cost.embeddingBytes : 0;
    const last = to === cost.layers.length ? cost.head : { memoryBytes: 0, readBytes: 0 };
    return {
      memoryBytes: memory[to]! - memory[from]! + first + last.memoryBytes,
      readBytes: read[to]! - read[from]! + last.readBytes,
    };
  };
}

function knownBandwidths(devices: readonly Device[]): number[] {
  const known = devices.map((device) => device.bandwidthGBps).filter((value) => value !== null).sort((a, b) => a - b);
  const median = known[known.length >> 1] ?? 1;
  return devices.map((device) => device.bandwidthGBps ?? median);
}

function shortfall(cost: ModelCost, devices: readonly Device[], shards: number | undefined): string {
  const range = rangeCosts(cost);
  const layers = cost.layers.length;
  const needed = range(0, layers).memoryBytes;
  const offered = devices.reduce((sum, device) => sum + device.memoryBytes, 0);
  const each = devices.map(({ id, memoryBytes }) => {
    let most = 0;
    for (let from = 0; from < layers; from++) {
      let to = from;
      while (to < layers && range(from, to + 1).memoryBytes <= memoryBytes) to++;
      most = Math.max(most, to - from);
    }
    return `${id} offers ${bytes(memoryBytes)}, room for ${most} of ${layers} layers`;
  });
  const missing = needed > offered
    ? `${bytes(needed - offered)} are missing`
    : `no split into ${shards ?? "any number of"} contiguous ranges of layers fits`;
  return `the model with its KV cache needs ${bytes(needed)} of memory; ${each.join("; ")}: ${missing}`;
}

function bytes(count: number): string {
  if (count >= 1e9) return `${(count / 1e9).toFixed(2)} GB`;
  if (count >= 1e6) return `${(count / 1e6).toFixed(1)} MB`;
  return `${Math.ceil(count / 1e3)} kB`;
}

function bits(set: number): number {
  let count = 0;
  for (; set !== 0; set &= set - 1) count++;
  return count;
}
