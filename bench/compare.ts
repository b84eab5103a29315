import type { EngineInfo, MeasureRequest } from "./engines/engine.ts";
import type { PeerRow } from "./rows.ts";
import { correlation, median } from "./stats.ts";

/** What an engine's process is asked to compare two of them. */
export interface Measurable {
  measure(request: Omit<MeasureRequest, "type">): Promise<number[]>;
  logits(tokens: number[]): Promise<number[]>;
  bandwidth(mebibytes: number): Promise<number | null>;
}

/** The engines do not compute the same function of the same file. */
export class DisagreementError extends Error {
  override readonly name = "DisagreementError";
}

/** What a phase feeds: tokens a step to each of so many sequences, which hold so many. */
const SHAPES: Readonly<Record<PeerRow["phase"], Pick<MeasureRequest, "batch" | "tokens" | "context">>> = {
  decode: { batch: 1, tokens: 1, context: 64 },
  batch: { batch: 8, tokens: 1, context: 64 },
  prefill: { batch: 1, tokens: 256, context: 0 },
};

/** Most sequences of a phase, and most tokens of each: what an engine has to make room for. */
export const ROOM = { sequences: 8, length: 256 } as const;

/** The least correlation of logits at which two engines count as agreeing; they differ in how they round activations. */
const AGREEMENT = 0.95;

/** @throws {DisagreementError} when the logits after a few tokens have little in common. */
export async function checkAgreement(lutra: Measurable, peer: Measurable): Promise<void> {
  const tokens = [1, 17, 290, 5];
  const [a, b] = [await lutra.logits(tokens), await peer.logits(tokens)];
  const agreement = a.length === b.length ? correlation(a, b) : NaN;
  if (!(agreement >= AGREEMENT)) {
    throw new DisagreementError(
      `Lutra and its peer give different logits: their correlation is ${
        agreement.toFixed(3)
      }, not ${AGREEMENT} or more`,
    );
  }
}

/** Memory that the bandwidth is measured on: more than caches hold of it from one pass to the next. */
const MEBIBYTES = 1024;
/** Most rounds where a single step lasts longer than a measurement should. */
const LONG_ROUNDS = 3;

/** Options of {@linkcode comparePhase}. */
export interface CompareOptions {
  readonly type: string;
  readonly phase: PeerRow["phase"];
  readonly threads: number;
  /** Measurements of each engine, alternating. */
  readonly rounds: number;
  /** About how long a measurement lasts, in seconds; a step at least. */
  readonly seconds: number;
  /** What Lutra said of itself. */
  readonly info: EngineInfo;
}

/**
 * Measures both engines in turns, each round the other one first, so that a machine that others use as well treats both
 * alike. A round gives the median of its steps, and the speed told is that of the rounds' median.
 */
export async function comparePhase(lutra: Measurable, peer: Measurable, options: CompareOptions): Promise<PeerRow> {
  const { type, phase, threads, rounds, seconds, info } = options;
  const shape = SHAPES[phase];
  const once = { ...shape, warmUp: 0, steps: 1 };
  const bandwidths: (number | null)[] = [];
  const readMemory = async () => {
    if (phase !== "prefill") bandwidths.push(await lutra.bandwidth(MEBIBYTES));
  };
  await readMemory();
  // The first step opens caches and wakes threads; it also tells how many fit a measurement, roughly.
  let slower = 0;
  for (const engine of [lutra, peer]) slower = Math.max(slower, (await engine.measure(once))[0]!);
  const long = slower > seconds;
  // One at the least: the other engine, or the memory's measurement, has had the cores and the caches till now.
  const warmUp = long ? 1 : 2;
  const room = shape.tokens > 1 ? Infinity : ROOM.length - shape.context - warmUp;
  const steps = Math.max(1, Math.min(Math.floor(seconds / slower), room, 64));
  const times: Record<"lutra" | "peer", number[]> = { lutra: [], peer: [] };
  const measure = async (name: "lutra" | "peer") => {
    const engine = name === "lutra" ? lutra : peer;
    times[name].push(median(await engine.measure({ ...shape, warmUp, steps })));
  };
  for (let round = 0; round < (long ? Math.min(rounds, LONG_ROUNDS) : rounds); round++) {
    const order = round % 2 === 0 ? ["lutra", "peer"] as const : ["peer", "lutra"] as const;
    for (const name of order) await measure(name);
  }
  const tokens = shape.batch * shape.tokens;
  const [own, other] = [median(times.lutra), median(times.peer)];
  await readMemory();
  const known = bandwidths.filter((gbps) => gbps !== null);
  const bandwidth = known.length === 0 ? null : Math.max(...known);
  const gbps = phase === "prefill" || info.bytesPerStep === undefined ? null : info.bytesPerStep / own / 1e9;
  return {
    type,
    phase,
    threads,
    batch: tokens,
    lutra: tokens / own,
    peer: tokens / other,
    ratio: other / own,
    gbps,
    bandwidth,
    share: gbps === null || bandwidth === null ? null : gbps / bandwidth,
  };
}
