/**
 * What travels rarely, as JSON: announcements of workers and requests to them.
 *
 * Subjects, `C` the cluster's name and `W` a worker's id:
 *
 * | subject | direction | content |
 * |---|---|---|
 * | `lutra.C.discover` | to all workers | empty: announce yourselves |
 * | `lutra.C.hello` | from a worker | {@linkcode Hello} |
 * | `lutra.C.worker.W.ctl` | to a worker | {@linkcode ControlRequest}, answered by {@linkcode ControlReply} |
 * | `lutra.C.worker.W.probe` | to a worker | anything; answered at once by its clock (f64, milliseconds since 1970) and the same bytes |
 * | `lutra.C.worker.W.diagnose` | to a worker | {@linkcode DiagnosisRequest}, answered by {@linkcode Diagnosis} |
 * | `lutra.C.worker.W.stage.S` | to stage `S`, which that worker holds | WORK |
 * | `lutra.C.orchestrator` | to the orchestrator that serves | empty; answered by {@linkcode ClusterStatus} |
 * | `lutra.C.orchestrator.O.results` | to orchestrator `O` | RESULT |
 * | `lutra.C.weights.R.…` | between all | weights of model `R` (see `weights/protocol.ts`) |
 *
 * @module
 */
import { gunzipSync, gzipSync } from "node:zlib";
import { z } from "zod";
import { WireError } from "./errors.ts";
import { shardSchema } from "./shard.ts";

const u32 = z.number().int().min(0).max(0xffff_ffff);
const count = z.number().int().positive().max(0xffff_ffff);
const size = z.number().int().nonnegative();
const fileBytes = z.number().int().positive();
/** One token of a subject. */
const name = z.string().regex(/^[A-Za-z0-9_-]{1,64}$/, "use up to 64 letters, digits, _ and -");
const subject = z.string().max(256);
const hash = z.string().regex(/^[0-9a-f]{64}$/, "use 64 hexadecimal digits");
const version = z.string().max(64);

/** The subjects of a cluster. Throws {@linkcode WireError} when `cluster` is no name. */
export function clusterSubjects(cluster: string): {
  discover: string;
  hello: string;
  control(worker: string): string;
  probe(worker: string): string;
  diagnose(worker: string): string;
  stage(worker: string, stage: number): string;
  orchestrator: string;
  results(orchestrator: string): string;
  /** What follows it, `weights/protocol.ts` says. */
  weights(root: string): string;
} {
  const root = `lutra.${checkName(cluster)}`;
  return {
    discover: `${root}.discover`,
    hello: `${root}.hello`,
    control: (worker) => `${root}.worker.${checkName(worker)}.ctl`,
    probe: (worker) => `${root}.worker.${checkName(worker)}.probe`,
    diagnose: (worker) => `${root}.worker.${checkName(worker)}.diagnose`,
    stage: (worker, stage) => `${root}.worker.${checkName(worker)}.stage.${stage}`,
    orchestrator: `${root}.orchestrator`,
    results: (orchestrator) => `${root}.orchestrator.${checkName(orchestrator)}.results`,
    weights: (file) => `${root}.weights.${checkName(file)}`,
  };
}

function checkName(value: string): string {
  if (!name.safeParse(value).success) {
    throw new WireError(`${JSON.stringify(value)} is no name: use up to 64 letters, digits, _ and -`);
  }
  return value;
}

/**
 * What every announcement has, of whatever version: so that one of another version is refused by name, not overlooked.
 */
export const anyHelloSchema = z.object({
  type: z.literal("hello"),
  id: name,
  versions: z.object({ abi: u32, wire: u32, lutra: version.optional() }),
});

/** How far a worker is with its stages. */
export const loadingSchema = z.strictObject({
  /** Weights on its disk are checked, fetched over the bus, or packed. */
  phase: z.enum(["checking", "fetching", "packing"]),
  /** Of this phase, 0 to 1. */
  share: z.number().min(0).max(1),
  /** Bytes that this phase is about; 0 when that is not known. */
  bytes: size,
  /** Milliseconds that the rest of this phase will take; `null` before that is known. */
  etaMs: z.number().nonnegative().nullable(),
});
/** How far a worker is with its stages. */
export type Loading = z.infer<typeof loadingSchema>;

/** Longer than any device takes for a layer or a head, in milliseconds: what exceeds it was not measured. */
const MOST_MS = 60_000;
/** How fast a device is, by a short run of its kernels on a layer and a head of a model's shapes. */
export const speedSchema = z.strictObject({
  /** Which probe: see `probeOf` in `orchestrator/served_model.ts`. */
  probe: hash,
  /** Milliseconds for a token in the layer, and in the head with sampling. */
  msPerLayer: z.number().positive().max(MOST_MS),
  msHead: z.number().nonnegative().max(MOST_MS),
});
/** How fast a device is. */
export type Speed = z.infer<typeof speedSchema>;

/**
 * A worker tells that it is there, or leaves. Sent at start, on discovery, at every change, and as its heartbeat.
 */
export const helloSchema = z.strictObject({
  type: z.literal("hello"),
  id: name,
  /** `draining`: it wants to leave as soon as others have its layers; `leaving`: it is gone now. */
  state: z.enum(["ready", "draining", "leaving"]),
  /**
   * The process, and after the last `-` how often it has connected anew. Another one after every start and every
   * reconnection: with a new one, messages on their way or even the stages are gone.
   */
  session: name,
  /** The newest epoch it has seen; 0 before the first. */
  epoch: u32,
  /** While stages are being loaded, or their weights fetched ahead: how far that is. */
  loading: loadingSchema.optional(),
  versions: z.strictObject({ abi: u32, wire: u32, lutra: version }),
  capabilities: z.strictObject({
    isa: z.string().max(64),
    cores: count,
    /** Bytes that the worker offers for weights and KV cache. */
    memoryBytes: size,
    /** Measured memory read bandwidth in GB/s; `null` when not measured. */
    bandwidthGBps: z.number().positive().nullable(),
    /** What was measured last, when an orchestrator asked for it; `null` before. */
    speed: speedSchema.nullable(),
  }),
  /** What it does at the moment. */
  work: z.strictObject({
    /** Micro-batches waiting. */
    queued: size,
    /** Milliseconds that the running one has taken so far; `null` when none runs. */
    runningMs: z.number().nonnegative().nullable(),
    /** Milliseconds that it should take, by those before; `null` before the first. */
    expectedMs: z.number().nonnegative().nullable(),
    /** Of each stage that it holds: how long a micro-batch takes, and how long the kernel library has worked in this epoch. */
    stages: z.array(z.strictObject({
      stage: u32,
      /** Mean of the last ones in milliseconds; `null` before the first. */
      stepMs: z.number().nonnegative().nullable(),
      busyMs: z.number().nonnegative(),
    })).max(256),
  }),
});
/** A worker tells that it is there, or leaves. */
export type Hello = z.infer<typeof helloSchema>;

/** A model's files by their content: see `Manifest` in `weights/manifest.ts`. */
export const weightsRefSchema = z.strictObject({
  root: hash,
  /** Length of each, in the order in which tensors number them. */
  files: z.array(fileBytes).min(1).max(4096),
});
/** A model's files by their content. */
export type WeightsRef = z.infer<typeof weightsRefSchema>;

/** A stage that a worker is to hold. */
export const stageSchema = z.strictObject({
  /** Its number in the pipeline, from 0. */
  stage: u32,
  shard: shardSchema,
  /** The files that the shard names: a device that lacks them fetches its layers. Absent: their paths must do. */
  weights: weightsRefSchema.optional(),
  /** Where its output goes: to the next stage as WORK or, from the last one, as RESULT. */
  next: subject,
  /** Of the last stage: where the tokens that it samples go as WORK for the first, when they are to. */
  first: subject.optional(),
});
/** A stage that a worker is to hold. */
export type Stage = z.infer<typeof stageSchema>;

/** What a worker can be asked for. */
export const controlRequestSchema = z.discriminatedUnion("type", [
  /**
   * Hold exactly these stages from now on: others are closed, a shard that is open already is kept (its sequences are
   * freed), and messages of other epochs count for nothing. An epoch older than the newest seen is refused.
   */
  z.strictObject({ type: z.literal("load"), epoch: count, stages: z.array(stageSchema).max(256), results: subject }),
  /**
   * Fetch what these stages need of their weights, and go on computing meanwhile. Answered when it is there. The next load or
   * fetch ends it.
   */
  z.strictObject({ type: z.literal("fetch"), stages: z.array(stageSchema).max(256) }),
  /**
   * Measure how fast layers of a shard's shapes are, in a file without their weights, and announce it. Answered when that is done;
   * a worker that does not measure answers at once.
   */
  z.strictObject({ type: z.literal("measure"), probe: hash, shard: shardSchema }),
  /** Close all stages of this epoch. */
  z.strictObject({ type: z.literal("unload"), epoch: count }),
  /** Cancel and free sequences in all stages; overtakes queued work. Their numbers never come back within the epoch. */
  z.strictObject({ type: z.literal("release"), epoch: count, seqs: z.array(u32).max(65536) }),
  /** Tell what is held and how it goes. */
  z.strictObject({ type: z.literal("status") }),
  /** The orchestrator does not work with this worker. */
  z.strictObject({ type: z.literal("refuse"), reason: z.string().max(1024) }),
]);
/** What a worker can be asked for. */
export type ControlRequest = z.infer<typeof controlRequestSchema>;

const shardStatsSchema = z.object({
  kvBlocksTotal: size,
  kvBlocksFree: size,
  blockTokens: count,
  /** Packed weights, in bytes. */
  weightBytes: size,
  /** Of these, bytes that came from the cache of packed weights. */
  cachedBytes: size,
  /** Sequences with tokens in the KV cache. */
  sequences: size,
  /** Bytes read to decode one token. */
  weightBytesPerToken: size,
});
/** What a shard tells of itself. */
export type ShardStats = z.infer<typeof shardStatsSchema>;

/** Micro-batches whose times a stage tells. */
export const MOST_RECENT_STEPS = 32;

/** The stages' state in a {@linkcode ControlReply}. */
export const stageStatusSchema = z.strictObject({
  stage: u32,
  first: u32,
  end: count,
  stats: shardStatsSchema,
  /** Micro-batches waiting. */
  queued: size,
  /** Micro-batches and tokens computed. */
  steps: size,
  tokens: size,
  /** Milliseconds spent in the kernel library. */
  busyMs: z.number().nonnegative(),
  /** Of that, what the last micro-batches took each, the latest last. */
  recentMs: z.array(z.number().nonnegative()).max(MOST_RECENT_STEPS),
});
/** The state of a stage. */
export type StageStatus = z.infer<typeof stageStatusSchema>;

/** A worker's answer. */
export const controlReplySchema = z.discriminatedUnion("ok", [
  z.strictObject({
    ok: z.literal(true),
    epoch: u32,
    stages: z.array(stageStatusSchema),
    /** Messages dropped, by reason. */
    dropped: z.record(z.string(), size),
  }),
  /** `code` is the kernel library's, or 0. */
  z.strictObject({ ok: z.literal(false), code: z.number().int(), error: z.string() }),
]);
/** A worker's answer. */
export type ControlReply = z.infer<typeof controlReplySchema>;

/** `waiting` for workers, `loading`, `serving`, `recovering` from a loss, `unavailable` for want of workers, `closed`. */
const deploymentStateSchema = z.enum(["waiting", "loading", "serving", "recovering", "unavailable", "closed"]);

/** What the orchestrator tells of the cluster. */
export const clusterStatusSchema = z.strictObject({
  orchestrator: name,
  model: z.string(),
  /** Of the foremost replica. */
  state: deploymentStateSchema,
  /** Why it does not serve; empty while it does. */
  reason: z.string(),
  epoch: u32,
  running: size,
  waiting: size,
  /** Placements made after a loss, and milliseconds that the last one took. */
  recoveries: size,
  lastRecoveryMs: z.number().nonnegative().nullable(),
  /** Those that serve, each with the whole model, and those that would: as `state`, `epoch`, `running` and `waiting` of all. */
  replicas: z.array(z.strictObject({ state: deploymentStateSchema, epoch: u32, running: size, waiting: size })),
  workers: z.array(z.strictObject({
    id: name,
    state: z.enum(["ready", "draining", "lost", "refused"]),
    /** Its replica, from 0; `null` when it holds none. */
    replica: size.nullable(),
    isa: z.string(),
    cores: size,
    memoryBytes: size,
    bandwidthGBps: z.number().nullable(),
    /** Milliseconds that it takes for a token in one of the model's layers and in the head, as measured; `null` if not. */
    msPerLayer: z.number().nullable(),
    msHead: z.number().nullable(),
    /** Milliseconds since it was heard of. */
    seenMs: z.number().nonnegative(),
    queued: size,
    /** Ranges of layers that it holds, end exclusive. */
    layers: z.array(z.tuple([u32, u32])),
    /** Milliseconds that a micro-batch takes in each of them, the mean of the last ones; `null` before the first. */
    stepMs: z.array(z.number().nonnegative().nullable()),
    /** Milliseconds from the orchestrator to it and back, the median of the last pings; `null` before the first. */
    rttMs: z.number().nonnegative().nullable(),
    /** Share of the time with micro-batches on their way in which it did nothing, of late; `null` without any. */
    bubble: z.number().min(0).max(1).nullable(),
    /** How far it is with its stages, or with weights ahead; `null` when it loads none. */
    loading: loadingSchema.nullable(),
  })),
});
/** What the orchestrator tells of the cluster. */
export type ClusterStatus = z.infer<typeof clusterStatusSchema>;

/** What is looked at on a device. */
export const diagnosisRequestSchema = z.strictObject({
  /** A model's file that should be there, as the orchestrator names it. */
  model: z.string().min(1).max(4096).nullable(),
});
/** What is looked at on a device. */
export type DiagnosisRequest = z.infer<typeof diagnosisRequestSchema>;

/** What was found, and what to do about it. */
export const findingSchema = z.strictObject({
  check: z.string().max(64),
  /** `warning`: it works, but slower or with less than it could. */
  state: z.enum(["ok", "warning", "failed"]),
  detail: z.string().max(4096),
  fix: z.string().max(4096).optional(),
});
/** What was found, and what to do about it. */
export type Finding = z.infer<typeof findingSchema>;

/** What was found on a device. */
export const diagnosisSchema = z.strictObject({ findings: z.array(findingSchema).max(64) });
/** What was found on a device. */
export type Diagnosis = z.infer<typeof diagnosisSchema>;

type Json = Hello | ControlRequest | ControlReply | ClusterStatus | DiagnosisRequest | Diagnosis;

/** Longer texts are compressed: the shard of a large mixture, whose experts are tensors of their own, would exceed a message. */
const MOST_PLAIN = 1 << 16;
/** A text that compresses to a message and is longer is no description. */
const MOST_TEXT = 1 << 26;
/** How gzip begins, unlike JSON. */
const GZIP = [0x1f, 0x8b] as const;

/** JSON as bytes, with gzip where it is long. */
export function encodeJson(value: Json): Uint8Array<ArrayBuffer> {
  const text = new TextEncoder().encode(JSON.stringify(value));
  return text.byteLength <= MOST_PLAIN ? text : new Uint8Array(gzipSync(text));
}

/**
 * Reads JSON of a known form, compressed or not.
 *
 * @throws {WireError} and nothing else, whatever the bytes; it names the field.
 */
export function decodeJson<T>(schema: z.ZodType<T>, data: Uint8Array): T {
  let value: unknown;
  try {
    const packed = data[0] === GZIP[0] && data[1] === GZIP[1];
    const text = packed ? gunzipSync(data, { maxOutputLength: MOST_TEXT }) : data;
    value = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(text));
  } catch (cause) {
    throw new WireError("message is not JSON", { cause });
  }
  const parsed = schema.safeParse(value);
  if (parsed.success) return parsed.data;
  const issues = parsed.error.issues.slice(0, 3).map((issue) =>
    `${issue.path.join(".") || "message"}: ${issue.message}`
  );
  throw new WireError(issues.join("; "), { cause: parsed.error });
}
