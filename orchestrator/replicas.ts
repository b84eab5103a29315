import { PlacementError } from "./errors.ts";
import { place, predict, wholeBytes } from "./placement.ts";
import type { Device, ModelCost, PlacedStage, PlaceOptions } from "./placement.ts";

/** Options of {@linkcode placeReplicas}. */
export interface ReplicasOptions extends PlaceOptions {
  /**
   * Requests that run at once. With 1 the model lies in one pipeline, whose devices compute a prompt together. Default: so many that all
   * devices are busy.
   */
  streams?: number;
}

/** A replica: its stages, from the first layer to the last. */
export type Replica = readonly PlacedStage[];

/** A replica that serves less than this share of the fastest is not worth its memory and the requests that would wait for it. */
export const LEAST_SHARE = 0.1;
/** Sets of devices over which the best partition is looked for. */
const MAX_SETS = 64;
/** Beyond, groups that just hold the model are compared with one of all, and preferred at such a share of its rate. */
const EVEN = 0.95;
/** Rates that differ by less are the same. */
const SAME = 1e-9;

/**
 * Lays the model on devices once or several times, each time as {@linkcode place} does, so that all together give most tokens. Where
 * that is equal, as of devices alike that each hold the whole model, the split into more replicas wins: it has fewer hops, and
 * a loss concerns fewer requests. The replica that is fastest for one stream comes first; it has what {@linkcode place} promises it.
 *
 * For few kinds of devices all partitions are compared. Else each device that holds the whole model is a replica, and the others
 * are one together, or groups that just hold it.
 *
 * @throws {PlacementError} with every device's share when the model does not fit.
 */
export function placeReplicas(cost: ModelCost, devices: readonly Device[], options: ReplicasOptions = {}): Replica[] {
  const { streams = Infinity, ...placing } = options;
  const one = (): Replica[] => [place(cost, devices, placing)];
  if (placing.shards !== undefined || streams <= 1 || devices.length <= 1) return one();
  const rates = new Map<Replica, { oneStream: number; manyStreams: number }>();
  for (const replica of partition(cost, devices, placing)) {
    rates.set(replica, predict(cost, devices, replica, placing.hopSeconds));
  }
  const most = Math.max(...[...rates.values()].map(({ manyStreams }) => manyStreams));
  const replicas = [...rates].filter(([, { manyStreams }]) => manyStreams >= LEAST_SHARE * most)
    .sort(([, a], [, b]) => b.oneStream - a.oneStream).map(([replica]) => replica);
  // Of few streams a pipeline may make more.
  if (replicas.length > 1 && streams === Infinity) return replicas;
  const whole = one();
  const rate = (placement: readonly Replica[]) => predictReplicas(cost, devices, placement, options).tokensPerSecond;
  return replicas.length > 0 && rate(replicas) >= (1 - SAME) * rate(whole) ? replicas : whole;
}

/**
 * Tokens per second of replicas as {@linkcode predict} counts them: of one stream, on the replica that is best for it, of so many
 * that all are busy, and of `streams`, each on the replica to which it brings most.
 */
export function predictReplicas(
  cost: ModelCost,
  devices: readonly Device[],
  replicas: readonly Replica[],
  options: Pick<ReplicasOptions, "hopSeconds" | "streams"> = {},
): { oneStream: number; manyStreams: number; tokensPerSecond: number } {
  const { streams = Infinity, hopSeconds } = options;
  const rates = replicas.map((replica) => predict(cost, devices, replica, hopSeconds));
  const manyStreams = rates.reduce((sum, rate) => sum + rate.manyStreams, 0);
  const left = rates.map((rate) => rate.manyStreams);
  let tokensPerSecond = 0;
  for (let stream = 0; stream < streams && tokensPerSecond < (1 - SAME) * manyStreams; stream++) {
    const gains = rates.map(({ oneStream }, i) => Math.min(oneStream, left[i]!));
    const gain = Math.max(...gains);
    const at = gains.indexOf(gain);
    left[at]! -= gain;
    tokensPerSecond += gain;
  }
  return { oneStream: Math.max(...rates.map(({ oneStream }) => oneStream)), manyStreams, tokensPerSecond };
}

/** What is reached with some set of devices. */
interface Reached {
  readonly replicas: readonly Replica[];
  /** Sums over the replicas: tokens per second of many streams, and of one on each. */
  readonly many: number;
  readonly each: number;
}

/** The partition of devices into replicas that gives most tokens; none when the model fits no set of them. */
function partition(cost: ModelCost, devices: readonly Device[], options: PlaceOptions): readonly Replica[] {
  const needed = wholeBytes(cost);
  const alone = devices.filter(({ memoryBytes }) => memoryBytes >= needed);
  const others = devices.filter(({ memoryBytes }) => memoryBytes < needed);
  const single = ({ id }: Device): Replica => [{ worker: id, first: 0, end: cost.layers.length }];
  const together = (group: readonly Device[]): Replica | undefined => {
    if (group.reduce((sum, { memoryBytes }) => sum + memoryBytes, 0) < needed) return undefined;
    try {
      return place(cost, group, options);
    } catch (error) {
      if (error instanceof PlacementError) return undefined;
      throw error;
    }
  };
  // Each reaches all that its speed allows: a split could not give more.
  if (others.length === 0) return alone.map(single);
  const kinds = kindsOf(devices);
  const sets = kinds.reduce((product, { length }) => product * (length + 1), 1);
  if (sets > MAX_SETS) {
    const rate = (replicas: readonly Replica[]) =>
      replicas.reduce((sum, replica) => sum + predict(cost, devices, replica, options.hopSeconds).manyStreams, 0);
    const [one, several] = [[together(others) ?? []].filter(({ length }) => length > 0), gathered(others, together)];
    // Fewer hops are worth a little of what uneven groups cost.
    return [...alone.map(single), ...(rate(several) >= EVEN * rate(one) ? several : one)];
  }
  const weights: number[] = [];
  let weight = 1;
  for (const { length } of kinds) {
    weights.push(weight);
    weight *= length + 1;
  }
  const counts = (set: number) => kinds.map(({ length }, i) => Math.floor(set / weights[i]!) % (length + 1));
  /** The replica of each set of devices, by the first ones of every kind. */
  const groups = Array.from({ length: sets }, (_, set) => {
    const replica = together(counts(set).flatMap((count, i) => kinds[i]!.slice(0, count)));
    return replica === undefined ? undefined : { replica, rate: predict(cost, devices, replica, options.hopSeconds) };
  });
  const best: Reached[] = [{ replicas: [], many: 0, each: 0 }];
  for (let set = 1; set < sets; set++) {
    const own = counts(set);
    const lowest = own.findIndex((count) => count > 0);
    let reached = best[set - weights[lowest]!]!; // one stays without layers
    for (let part = 1; part <= set; part++) {
      const group = groups[part];
      const taken = counts(part);
      if (group === undefined || taken[lowest] === 0 || taken.some((count, i) => count > own[i]!)) continue;
      const rest = best[set - part]!;
      const many = rest.many + group.rate.manyStreams;
      const each = rest.each + group.rate.oneStream;
      const same = Math.abs(many - reached.many) <= SAME * many;
      if (same ? each > reached.each * (1 + SAME) : many > reached.many) {
        reached = { replicas: [...rest.replicas, group.replica], many, each };
      }
    }
    best[set] = reached;
  }
  return named(best.at(-1)!.replicas, kinds);
}

/** Groups of devices, in their order, that are just large enough; the last takes those that are left over. */
function gathered(devices: readonly Device[], together: (group: readonly Device[]) => Replica | undefined): Replica[] {
  const found: { group: Device[]; replica: Replica }[] = [];
  let group: Device[] = [];
  for (const device of devices) {
    group.push(device);
    const replica = together(group);
    if (replica === undefined) continue;
    found.push({ group, replica });
    group = [];
  }
  const last = found.pop();
  if (last === undefined) return [];
  return [...found.map(({ replica }) => replica), together([...last.group, ...group]) ?? last.replica];
}

/** Devices that are alike. */
function kindsOf(devices: readonly Device[]): Device[][] {
  const kinds = new Map<string, Device[]>();
  for (const device of devices) {
    const key = JSON.stringify({ ...device, id: "" });
    const kind = kinds.get(key);
    if (kind === undefined) kinds.set(key, [device]);
    else kind.push(device);
  }
  return [...kinds.values()];
}

/** Gives every replica devices of its own, where several name the first ones of a kind. */
function named(replicas: readonly Replica[], kinds: readonly (readonly Device[])[]): Replica[] {
  const left = kinds.map((kind) => kind.map(({ id }) => id));
  return replicas.map((replica) => {
    const given = new Map<string, string>();
    return replica.map(({ worker, ...layers }) => {
      const kind = kinds.findIndex((devices) => devices.some(({ id }) => id === worker));
      const id = given.get(worker) ?? left[kind]!.shift()!;
      given.set(worker, id);
      return { worker: id, ...layers };
    });
  });
}
