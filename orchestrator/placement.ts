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
  /** Of these and of the head, what is held once by a device that has both: the matrix that they share. @default {0} */
  readonly tiedBytes?: number;
  /** What the last stage holds and reads besides its layers. */
  readonly head: LayerCost;
}

/** A device that offers itself. */
export interface Device {
  readonly id: string;
  /** Bytes offered for weights and KV cache. */
  readonly memoryBytes: number;
  /** Memory read bandwidth in GB/s; `null` counts as the median of the others. It counts where nothing else was measured. */
  readonly bandwidthGBps: number | null;
  /** Measured seconds for a token in the model's last layer and in its head; other layers take as much for a byte. */
  readonly speed?: { readonly layerSeconds: number; readonly headSeconds: number } | null;
  /** Seconds of a message to it and of its answer. Default: as for all. */
  readonly hopSeconds?: number;
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
  /** Seconds that a message takes from one stage to the next, where a device does not say its own. @default {0.0004} */
  hopSeconds?: number;
}

/** Seconds of a hop through a NATS server in a wired network. */
export const HOP_SECONDS = 4e-4;
/** What a split may cost one stream, against the best single device. */
const ONE_STREAM = 0.95;
/** Devices whose measured speeds differ by less count as equally fast: measurements do. */
const ALIKE = 1.08;
/** … and hops by less, as equally long. */
const ALIKE_HOPS = 1.5;
/** What rounding may make of equal times. */
const ROUNDING = 1 + 1e-9;
/** Sets of devices that are looked at; beyond, the fastest device comes first in every split. */
const MAX_SETS = 512;

/**
 * Splits the layers into contiguous ranges, one per device used, so that the slowest stage is as fast as can be, no device
 * holds more than it offers, and, where the whole model fits some device, one stream has at least {@linkcode ONE_STREAM} of the
 * speed that the best such device alone would give it. A stage's time is what its device was measured to take for a byte of a
 * layer, and for the head, or where it was not, the bytes that it reads for a token over its bandwidth; one stream passes all
 * stages and as many hops. Among equally fast splits the one wins that is best for one stream.
 *
 * @throws {PlacementError} with every device's share when the model does not fit.
 */
export function place(cost: ModelCost, devices: readonly Device[], options: PlaceOptions = {}): PlacedStage[] {
  const { shards, hopSeconds = HOP_SECONDS } = options;
  const layers = cost.layers.length;
  if (devices.length === 0) throw new PlacementError("there are no workers");
  if (shards !== undefined && (!Number.isInteger(shards) || shards < 1 || shards > layers)) {
    throw new PlacementError(`${shards} shards are asked for; a model of ${layers} layers can have 1 to ${layers}`);
  }
  const splitter = new Splitter(cost, devices, hopSeconds);
  const found = shards === undefined
    ? splitter.fastest(undefined, bestSingle(cost, devices, hopSeconds) / ONE_STREAM)
    : shards <= devices.length
    ? splitter.fastest(shards)
    : splitter.fastest(Math.min(devices.length, layers)) ?? splitter.fastest(undefined);
  if (found === undefined) throw new PlacementError(shortfall(cost, devices, shards));
  while (shards !== undefined && found.length < shards) divideLargest(found);
  return found;
}

/**
 * Tokens per second of a split, as far as layers, head and hops go: of one stream, and of so many that all stages are busy,
 * without batching.
 */
export function predict(
  cost: ModelCost,
  devices: readonly Device[],
  stages: readonly PlacedStage[],
  hopSeconds = HOP_SECONDS,
): { oneStream: number; manyStreams: number } {
  const lengths = hopsOf(devices, hopSeconds);
  const hops = new Map(devices.map(({ id }, i) => [id, lengths[i]!]));
  const once = stageCosts(cost, devices, stages)
    .reduce((sum, { seconds }, i) => sum + seconds + hops.get(stages[i]!.worker)!, 0);
  return { oneStream: 1 / once, manyStreams: 1 / slowestStage(cost, devices, stages) };
}

/** Seconds for a token on the fastest device that holds the whole model; infinite when none does. */
function bestSingle(cost: ModelCost, devices: readonly Device[], hopSeconds: number): number {
  const whole = rangeCosts(cost)(0, cost.layers.length);
  const paces = pacesOf(cost, devices);
  const hops = hopsOf(devices, hopSeconds);
  let best = Infinity;
  devices.forEach((device, i) => {
    if (whole.memoryBytes > device.memoryBytes) return;
    best = Math.min(best, secondsOf(whole, paces[i]!) + hops[i]!);
  });
  return best;
}

/** What each stage of a split holds, in bytes, and the seconds that it takes for a token. */
export function stageCosts(
  cost: ModelCost,
  devices: readonly Device[],
  stages: readonly PlacedStage[],
): { memoryBytes: number; seconds: number }[] {
  const range = rangeCosts(cost);
  const paces = pacesOf(cost, devices);
  return stages.map(({ worker, first, end }) => {
    const own = range(first, end);
    const at = devices.findIndex((device) => device.id === worker);
    return { memoryBytes: own.memoryBytes, seconds: secondsOf(own, paces[at]!) };
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

/** Devices that are alike. */
interface Kind {
  readonly ids: readonly string[];
  readonly memoryBytes: number;
  readonly pace: Pace;
  /** Seconds of a hop to it. */
  readonly hop: number;
}

/** The last stage of the best split of some first layers over some devices. */
interface Best {
  /** Seconds of all stages with their hops. */
  readonly sum: number;
  readonly kind: number;
  readonly from: number;
  /** The set of devices without this one. */
  readonly before: number;
}

/** Finds splits, by dynamic programming over sets of devices and the first layers that they hold. */
class Splitter {
  readonly #layers: number;
  readonly #kinds: readonly Kind[];
  /** A set is the number of devices of each kind, of which one of kind `i` counts `#weights[i]`. */
  readonly #weights: readonly number[];
  readonly #sets: number;
  /** Too many sets: kinds come in the order of their speed, each device once. */
  readonly #ordered: boolean;
  /** Of every kind, seconds of a token in layers `from` to `to`, at `from · (layers + 1) + to`; infinite where memory lacks. */
  readonly #times: readonly Float64Array[];

  constructor(cost: ModelCost, devices: readonly Device[], hopSeconds: number) {
    this.#layers = cost.layers.length;
    const paces = pacesOf(cost, devices);
    const hops = hopsOf(devices, hopSeconds);
    const kinds = new Map<string, Kind & { ids: string[] }>();
    devices.forEach(({ id, memoryBytes }, i) => {
      const [pace, hop] = [paces[i]!, hops[i]!];
      const key = `${memoryBytes} ${pace.layerByte} ${pace.head} ${hop}`;
      const kind = kinds.get(key) ?? { ids: [], memoryBytes, pace, hop };
      kind.ids.push(id);
      kinds.set(key, kind);
    });
    let sets = 1;
    for (const { ids } of kinds.values()) sets *= ids.length + 1;
    this.#ordered = sets > MAX_SETS;
    if (this.#ordered) {
      this.#kinds = devices.map(({ id, memoryBytes }, i) => ({
        ...{ ids: [id], memoryBytes, pace: paces[i]!, hop: hops[i]! },
      })).sort((a, b) => a.pace.layerByte - b.pace.layerByte);
      // A set is the last device of the order and, when their number matters, how many there are.
      this.#sets = (devices.length + 1) * (devices.length + 1);
      this.#weights = [];
    } else {
      this.#kinds = [...kinds.values()];
      let weight = 1;
      this.#weights = this.#kinds.map(({ ids }) => {
        const own = weight;
        weight *= ids.length + 1;
        return own;
      });
      this.#sets = sets;
    }
    const range = rangeCosts(cost);
    this.#times = this.#kinds.map(({ memoryBytes, pace }) => {
      const times = new Float64Array((this.#layers + 1) ** 2).fill(Infinity);
      for (let from = 0; from < this.#layers; from++) {
        for (let to = from + 1; to <= this.#layers; to++) {
          const own = range(from, to);
          if (own.memoryBytes > memoryBytes) break; // a longer range needs still more
          times[from * (this.#layers + 1) + to] = secondsOf(own, pace);
        }
      }
      return times;
    });
  }

  /**
   * The split with the fastest slowest stage, of exactly `count` stages or any number, on which one stream takes at most
   * `most` seconds; `undefined` when there is none.
   */
  fastest(count: number | undefined, most = Infinity): PlacedStage[] | undefined {
    const times = new Set<number>();
    for (const own of this.#times) own.forEach((time) => time < Infinity && times.add(time));
    const limits = Float64Array.from(times).sort();
    // Rounding must not forbid the single device that the limit comes from, nor tell equal times apart.
    const within = most * ROUNDING;
    let found: PlacedStage[] | undefined;
    let [low, high] = [0, limits.length - 1];
    while (low <= high) {
      const middle = found === undefined && high === limits.length - 1 ? high : (low + high) >> 1;
      const split = this.#split(limits[middle]! * ROUNDING, count);
      if (split !== undefined && split.sum <= within) {
        found = split.stages;
        high = middle - 1;
      } else {
        if (found === undefined) return undefined; // not even without a limit
        low = middle + 1;
      }
    }
    return found;
  }

  /** Whether there is any split, of `count` stages or any number. */
  fits(count: number | undefined): boolean {
    return this.#split(Infinity, count) !== undefined;
  }

  /** The split that is fastest for one stream among those without a stage slower than `limit` seconds. */
  #split(limit: number, count: number | undefined): { sum: number; stages: PlacedStage[] } | undefined {
    const layers = this.#layers;
    const best: (Best | undefined)[][] = Array.from({ length: this.#sets }, () => []);
    best[0]![0] = { sum: 0, kind: -1, from: 0, before: 0 };
    const most = count ?? layers;
    let winner: { set: number; sum: number } | undefined;
    for (let set = 0; set < this.#sets; set++) {
      const row = best[set]!;
      const whole = row[layers];
      const size = this.#size(set);
      if (whole !== undefined && (count === undefined || size === count) && whole.sum < (winner?.sum ?? Infinity)) {
        winner = { set, sum: whole.sum };
      }
      if (size >= most) continue;
      for (const [kind, next] of this.#nexts(set)) {
        const following = best[next]!;
        const times = this.#times[kind]!;
        const { hop } = this.#kinds[kind]!;
        for (let from = 0; from < layers; from++) {
          const prior = row[from];
          if (prior === undefined) continue;
          for (let to = from + 1; to <= layers; to++) {
            const time = times[from * (layers + 1) + to]!;
            if (time > limit || time === Infinity) break; // a longer range is slower still, or needs still more memory
            const sum = prior.sum + time + hop;
            if (sum < (following[to]?.sum ?? Infinity)) following[to] = { sum, kind, from, before: set };
          }
        }
      }
    }
    if (winner === undefined) return undefined;
    const stages: { kind: number; first: number; end: number }[] = [];
    for (let { set } = winner, to = layers; to > 0;) {
      const { kind, from, before } = best[set]![to]!;
      stages.unshift({ kind, first: from, end: to });
      [set, to] = [before, from];
    }
    const used = this.#kinds.map(() => 0);
    return {
      sum: winner.sum,
      stages: stages.map(({ kind, first, end }) => ({ worker: this.#kinds[kind]!.ids[used[kind]!++]!, first, end })),
    };
  }

  /** Devices in a set. */
  #size(set: number): number {
    if (this.#ordered) return Math.floor(set / (this.#kinds.length + 1));
    return this.#kinds.reduce((sum, _, kind) => sum + this.#used(set, kind), 0);
  }

  #used(set: number, kind: number): number {
    return Math.floor(set / this.#weights[kind]!) % (this.#kinds[kind]!.ids.length + 1);
  }

  /** The sets with one device more, all of higher number, and its kind. */
  #nexts(set: number): [kind: number, set: number][] {
    if (this.#ordered) {
      const stride = this.#kinds.length + 1;
      const [size, last] = [Math.floor(set / stride), set % stride];
      return this.#kinds.map((_, kind): [number, number] => [kind, (size + 1) * stride + kind + 1])
        .filter(([kind]) => kind >= last);
    }
    return this.#kinds.map((_, kind): [number, number] => [kind, set + this.#weights[kind]!])
      .filter(([kind]) => this.#used(set, kind) < this.#kinds[kind]!.ids.length);
  }
}

/** What some layers cost; the head's bytes are in `memoryBytes` and in `headBytes`. */
interface RangeCost extends LayerCost {
  readonly headBytes: number;
}

/** Bytes that one device holds of the whole model. */
export function wholeBytes(cost: ModelCost): number {
  return rangeCosts(cost)(0, cost.layers.length).memoryBytes;
}

/** Cost of layers `from` to `to` (exclusive), with embedding and head where they belong. */
function rangeCosts(cost: ModelCost): (from: number, to: number) => RangeCost {
  const memory = [0];
  const read = [0];
  for (const layer of cost.layers) {
    memory.push(memory.at(-1)! + layer.memoryBytes);
    read.push(read.at(-1)! + layer.readBytes);
  }
  const { tiedBytes: tied = 0 } = cost;
  return (from, to) => {
    const first = from === 0 ? cost.embeddingBytes : 0;
    const last = to === cost.layers.length ? cost.head : { memoryBytes: 0, readBytes: 0 };
    return {
      memoryBytes: memory[to]! - memory[from]! + first + last.memoryBytes -
        (from === 0 && last === cost.head ? tied : 0),
      readBytes: read[to]! - read[from]!,
      headBytes: last.readBytes,
    };
  };
}

/** How fast a device is. */
interface Pace {
  /** Seconds for a byte that a layer reads. */
  readonly layerByte: number;
  /** Seconds of the head. */
  readonly head: number;
}

function secondsOf({ readBytes, headBytes }: RangeCost, { layerByte, head }: Pace): number {
  return readBytes * layerByte + (headBytes > 0 ? head : 0);
}

/**
 * How fast each device is. Kernels do more than read: devices that were not measured count as so many times slower than their
 * bandwidth says as the measured ones are.
 */
function pacesOf({ layers, head }: ModelCost, devices: readonly Device[]): Pace[] {
  const bandwidth = medianOf(devices.map((device) => device.bandwidthGBps).filter((value) => value !== null)) ?? 1;
  const byBandwidth = devices.map((device) => 1 / ((device.bandwidthGBps ?? bandwidth) * 1e9));
  const layerBytes = layers.at(-1)!.readBytes;
  const measured = devices.map(({ speed }) =>
    speed == null || layerBytes === 0
      ? undefined
      : { layerByte: speed.layerSeconds / layerBytes, head: speed.headSeconds }
  );
  const slower =
    medianOf(measured.flatMap((pace, i) => pace === undefined ? [] : [pace.layerByte / byBandwidth[i]!])) ?? 1;
  const levelled = level(measured.filter((pace) => pace !== undefined), ({ layerByte }) => layerByte, ALIKE);
  return measured.map((pace, i) => {
    if (pace !== undefined) return levelled.get(pace)!;
    const layerByte = slower * byBandwidth[i]!;
    return { layerByte, head: head.readBytes * layerByte };
  });
}

/** Seconds to each device and back. */
function hopsOf(devices: readonly Device[], hopSeconds: number): number[] {
  const hops = devices.map((device) => ({ seconds: device.hopSeconds ?? hopSeconds }));
  const levelled = level(hops, ({ seconds }) => seconds, ALIKE_HOPS);
  return hops.map((hop) => levelled.get(hop)!.seconds);
}

/** Which stands for which: of those that differ by less than a factor, the one in the middle stands for all. */
function level<T>(items: readonly T[], of: (item: T) => number, factor: number): Map<T, T> {
  const sorted = [...items].sort((a, b) => of(a) - of(b));
  const levelled = new Map<T, T>();
  for (let first = 0; first < sorted.length;) {
    let end = first;
    while (end < sorted.length && of(sorted[end]!) <= factor * of(sorted[first]!)) end++;
    for (let i = first; i < end; i++) levelled.set(sorted[i]!, sorted[(first + end) >> 1]!);
    first = end;
  }
  return levelled;
}

/** The upper of the two in the middle; `undefined` of nothing. */
function medianOf(values: readonly number[]): number | undefined {
  return [...values].sort((a, b) => a - b)[values.length >> 1];
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
  const more = extraOfEach(cost, devices, shards);
  return `the model with its KV cache needs ${bytes(needed)} of memory; ${each.join("; ")}: ${missing}, ` +
    `${bytes(more)} more on ${devices.length === 1 ? "it" : "each"} would do`;
}

/** Bytes that every device lacks, by which the model would fit: the least of the same for all, within a thousandth. */
function extraOfEach(cost: ModelCost, devices: readonly Device[], shards: number | undefined): number {
  const fits = (extra: number) =>
    new Splitter(cost, devices.map((device) => ({ ...device, memoryBytes: device.memoryBytes + extra })), 0)
      .fits(shards === undefined ? undefined : Math.min(shards, devices.length));
  let [low, high] = [0, rangeCosts(cost)(0, cost.layers.length).memoryBytes];
  while (high - low > Math.max(1, 1e-3 * high)) {
    const middle = (low + high) / 2;
    if (fits(middle)) high = middle;
    else low = middle;
  }
  return high;
}

function bytes(count: number): string {
  if (count >= 1e9) return `${(count / 1e9).toFixed(2)} GB`;
  if (count >= 1e6) return `${(count / 1e6).toFixed(1)} MB`;
  return `${Math.ceil(count / 1e3)} kB`;
}
