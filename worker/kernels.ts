import type { Shard, ShardStats } from "../bus/mod.ts";

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
  /** What it holds. */
  stats(): ShardStats;
  /** Frees it. */
  close(): void;
}
