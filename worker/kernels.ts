import type { NativeEndpoint, Shard, ShardStats } from "../bus/mod.ts";
import type { KernelError } from "./errors.ts";

/** A device as the kernel library sees it. */
export interface DeviceInfo {
  /** Instruction set in use. */
  readonly isa: string;
  /** All usable ones. */
  readonly available: readonly string[];
  /** Cores that this process may use. */
  readonly cores: number;
}

/**
 * Whether kernels are measured: `off`: fixed rules; `auto`: what the cache has, and what it lacks is measured for models
 * from 64 MiB on, within about three seconds once; `force`: all is measured anew. No choice changes a result.
 */
export type Tuning = "off" | "auto" | "force";

/** What a device chooses for its shards. */
export interface ShardChoices {
  /** Threads of the shard's pool, the calling one included. */
  readonly threads: number;
  /** Instruction set; `null` takes the best. */
  readonly isa: string | null;
  /** `"cores"` binds each thread to a core, the fastest first (Linux). @default {"none"} */
  readonly pin?: "none" | "cores";
  /**
   * Whether packed weights are kept on disk for the next start: in `dir`, by default the user's cache folder (`LUTRA_CACHE`
   * names another), and in all at most so many bytes, of which those go first that were not used for longest.
   */
  readonly cache?: CacheChoice | null;
  /** @default {"off"} */
  readonly tune?: Tuning;
}

/** Where packed weights and measurements are kept, and how many bytes of weights. */
export interface CacheChoice {
  readonly dir?: string;
  readonly maxBytes: number;
}

/** Options of {@linkcode KernelLibrary.openShard}. */
export interface OpenShardOptions {
  /** Told from time to time how much is done, 0 to 1. */
  onProgress?: (fraction: number) => void;
  /** Told of troubles that only cost time: a damaged cache, a full disk. */
  onNote?: (text: string) => void;
}

/**
 * The kernel library as a worker uses it. {@linkcode loadKernels} gives the real one; tests give a fake.
 */
export interface KernelLibrary {
  /** Version of the C ABI. */
  readonly abiVersion: number;
  /** @throws {KernelError} */
  deviceInfo(): DeviceInfo;
  /** Memory read bandwidth in GB/s, over a buffer of `mebibytes`. */
  measureBandwidth(threads: number, mebibytes: number): Promise<number>;
  /**
   * Packs a shard's weights, or reads them from the cache.
   *
   * @throws {KernelError} naming the tensor, when the file is not what the description says.
   */
  openShard(shard: Shard, choices: ShardChoices, options?: OpenShardOptions): Promise<ShardHandle>;
}

/** An open shard. One `forward` at a time; the other calls wait for it, blocking, so make them between two. */
export interface ShardHandle {
  /**
   * Computes a micro-batch.
   *
   * @param batch The bytes of `encodeBatch`.
   * @param input Hidden states, f32, a row per token; empty for a shard with embedding.
   * @param stop Set to 1 with `Atomics.store` to give up before the next layer.
   * @param output Receives hidden states, or results from a shard with head.
   * @returns Bytes written to `output`.
   * @throws {KernelError} after which no sequence has changed.
   */
  forward(batch: Uint8Array, input: Uint8Array, stop: Int32Array, output: Uint8Array): Promise<number>;
  /** Forgets a sequence from position `length` on; 0 frees it. A sequence it does not know is fine. */
  truncate(seq: number, length: number): void;
  /**
   * Opens a {@linkcode Lane} of this shard; absent where the kernel library has none.
   *
   * @param subjects Where its micro-batches come, and what else it shall hear in order with them.
   * @param maxPayload Bytes of the longest one.
   * @throws {KernelError | BusConnectError} when there is no connection to be had.
   */
  readonly openLane?:
    | ((endpoint: NativeEndpoint, subjects: readonly string[], maxPayload: number) => Promise<Lane>)
    | undefined;
  /** What it holds. */
  stats(): ShardStats;
  /** Frees it. */
  close(): void;
}

/**
 * A micro-batch that is foreseen, and what is to be sent when it was computed. In all headers step and chain are put in as they
 * come.
 */
export interface Armed {
  /** The message without its payload, as it will come but for its tokens: where these lie in it, and how many. */
  readonly expected: Uint8Array;
  readonly tokensAt: number;
  readonly tokenCount: number;
  readonly payloadBytes: number;
  /** Where the output goes, and all of its message before the output; that is as long as is said here, and nothing else. */
  readonly next: string;
  readonly head: Uint8Array;
  readonly outputBytes: number;
  /** Whether `head` is `expected` with another header: the tokens that come are put in both. */
  readonly passes: boolean;
  /** A message that goes first while a chain goes on, with the tokens that are sampled in their place. */
  readonly follows?: {
    readonly subject: string;
    readonly message: Uint8Array;
    readonly tokensAt: number;
    readonly tokenCount: number;
  };
}

/** An armed micro-batch that came, and the milliseconds that the kernels took. */
interface Came {
  readonly index: number;
  readonly step: number;
  readonly chain: number;
  readonly ms: number;
}

/** How a step of a lane ended. */
export type LaneEvent =
  | { readonly type: "woken" }
  /** Another message came; `subject` is of those that the lane was opened for. */
  | { readonly type: "message"; readonly subject: number; readonly data: Uint8Array }
  | Came & { readonly type: "done" }
  | Came & { readonly type: "failed"; readonly error: KernelError };

/**
 * A stage's own connection to the bus's server, inside the kernel library: a micro-batch that was foreseen comes, is computed and
 * goes on while JavaScript sleeps.
 */
export interface Lane {
  /**
   * Waits for a message, and computes it if it is armed. One call at a time, and no other call of the shard meanwhile.
   *
   * @throws {KernelError} with code `lost` when the connection is.
   */
  step(armed: readonly Armed[]): Promise<LaneEvent>;
  /** The armed micro-batch that is being computed, and since when, as `performance.now()` counts. */
  readonly running: { readonly index: number; readonly since: number } | undefined;
  /** Gives up what is being computed. */
  stop(): void;
  /** Has a step return as soon as nothing is being computed. */
  wake(): void;
  /**
   * Sends a copy of `data`, in order with what steps send.
   *
   * @throws {KernelError} when the connection is lost.
   */
  publish(subject: string, data: Uint8Array): void;
  /** Reads what has come, as the server would hold it only for so long; during long passes from time to time. */
  readAhead(): void;
  /** Ends the connection, and a step with an error. Resolves when nothing is being sent any more. */
  close(): Promise<void>;
}
