import { z } from "zod";

const positive = z.number().positive();
const count = z.number().int().positive();

/** What is compared with the peer. */
export const PHASES = ["decode", "batch", "prefill"] as const;

/** Lutra and the peer on one file, in one run. */
export const peerRowSchema = z.strictObject({
  /** Type of the weights, as GGML names it. */
  type: z.string(),
  /** One token after the other; tokens of several sequences at once; a prompt. */
  phase: z.enum(PHASES),
  threads: count,
  /** Tokens computed together. */
  batch: count,
  /** Tokens a second. */
  lutra: positive,
  peer: positive,
  /** lutra / peer. */
  ratio: positive,
  /** Bytes of weights that Lutra reads in a step over its time, in GB/s; null for prefill, which memory does not limit. */
  gbps: positive.nullable(),
  /** Read bandwidth with as many threads, measured in the same run, in GB/s. */
  bandwidth: positive.nullable(),
  /** gbps / bandwidth. */
  share: positive.nullable(),
});
export type PeerRow = z.infer<typeof peerRowSchema>;

/** A product of one packed form, alone. */
export const kernelRowSchema = z.strictObject({
  /** Type of the weights, and how their codes are laid out. */
  form: z.string(),
  codes: z.string(),
  /** The kernel's name, unique among those of the form and instruction set. */
  kernel: z.string(),
  /** Whether Lutra uses this form and kernel unless a measurement says otherwise. */
  preferred: z.boolean(),
  isa: z.string(),
  threads: count,
  /** Activation rows. */
  batch: count,
  /** Bits a weight, scales included. */
  bits: positive,
  /** 10⁹ weights × activation rows a second. */
  gweights: positive,
  /** Bytes of weights a second, in GB/s. */
  gbps: positive,
  /** GB/s at which the same bytes are read in the same run, the fastest way of reading; null where the matrix is small. */
  bandwidth: positive.nullable(),
  /** gbps / bandwidth. */
  share: positive.nullable(),
  /** 10⁹ weights × activation rows a second, one thread, of a matrix in the second-level cache. */
  cachedGweights: positive,
});
export type KernelRow = z.infer<typeof kernelRowSchema>;

/** The cost law: what a weight costs by its bits, in the second-level cache, one thread, one activation row. */
export const costRowSchema = z.strictObject({
  isa: z.string(),
  /** The kernel's name; kernels of one name differ in nothing but the bits. */
  kernel: z.string(),
  bits: count,
  /** Nanoseconds a weight. */
  nanoseconds: positive,
});
export type CostRow = z.infer<typeof costRowSchema>;

/** The line of least squares through a kernel's points of the cost law. */
export const costFitSchema = z.strictObject({
  isa: z.string(),
  kernel: z.string(),
  /** Picoseconds a weight for each bit. */
  slope: z.number(),
  /** Picoseconds a weight whatever the bits. */
  intercept: z.number(),
});
export type CostFit = z.infer<typeof costFitSchema>;

/** A pipeline over some workers, or several of them, against one worker. */
export const clusterRowSchema = z.strictObject({
  /** Tokens of answers; those of one prompt, to its first answer token. */
  phase: z.enum(["decode", "prefill"]),
  /** Each on a worker of its own. */
  stages: count,
  /** Pipelines, each with the whole model. */
  replicas: count.default(1),
  /** Requests at the same time. */
  streams: count,
  /** Most tokens computed together; null: as many as there are. */
  batch: count.nullable(),
  /** Milliseconds one way between each worker and the server. */
  delay_ms: z.number().nonnegative(),
  /** Tokens a second, over all streams. */
  tok_s: positive,
  /** Against one worker with as many streams, the same bound on micro-batches, and no delay. */
  ratio: positive,
  /** Against one worker with one stream. */
  ratio_one: positive,
  /** What the ratio is at best by ARCHITECTURE.md, from the measured times of one worker. */
  theory: positive,
  /** Whether workers could have a lane, a connection of the kernels' own. */
  lane: z.boolean().default(false),
  /** Milliseconds from stage to stage: what a token of one stream takes beyond its kernels, over its hops; median of all tokens. */
  hop_ms: z.number().nullable(),
  /** The same, over whole answers: with their beginnings, and the orchestrator between two chains. */
  hop_mean_ms: z.number().nullable().default(null),
});
export type ClusterRow = z.infer<typeof clusterRowSchema>;
