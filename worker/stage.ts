import {
  decodeSample,
  encodeBatch,
  encodeMessage,
  ENTRY_BYTES,
  entryTable,
  filterBatch,
  HEADER_BYTES,
  maxResultBytes,
  sampledBytes,
  writeHeader,
} from "../bus/mod.ts";
import type { DecodedBatch, Hello, Stage as StageSpec, StageStatus, Subscription } from "../bus/mod.ts";
import { KernelError, KernelErrorCode, WorkerError } from "./errors.ts";
import type { ShardHandle } from "./kernels.ts";
import { RecentSet, SeenSteps } from "./seen_steps.ts";

/** A micro-batch in a stage's queue. */
export interface QueuedStep {
  readonly step: number;
  readonly batch: DecodedBatch;
  /** Hidden states, aligned to 4 bytes. */
  readonly payload: Uint8Array;
  /** Micro-batches that follow from this one. */
  readonly chain: number;
}

/** What comes of a micro-batch. */
export interface Computed {
  /** For what comes next: WORK for the next stage, or a RESULT from the last. It lies in a buffer that the next call reuses. */
  readonly message: Uint8Array;
  /** From the last stage: WORK for the first, that goes on with the tokens sampled. */
  readonly following?: Uint8Array;
}

const EMPTY = encodeBatch([]);
/** Micro-batches whose mean time is told. */
const RECENT_STEPS = 32;

/**
 * A stage of the pipeline within one epoch: an open shard and what is known of its sequences and steps. {@linkcode Worker}
 * queues, and computes one micro-batch at a time.
 */
export class Stage {
  readonly spec: StageSpec;
  readonly epoch: number;
  readonly handle: ShardHandle;
  readonly seen = new SeenSteps();
  subscription: Subscription | undefined;
  /** Micro-batches waiting. */
  queued = 0;
  steps = 0;
  tokens = 0;
  busyMs = 0;
  readonly #released = new RecentSet();
  /** Sequences that may have tokens in the KV cache. */
  readonly #sequences = new Set<number>();
  /** Released while a micro-batch runs: to be freed after it. */
  #doomed: number[] = [];
  /** Sequences of the micro-batch in the kernel library. */
  #running: readonly number[] | undefined;
  #begin = 0;
  /** Tokens of the micro-batch in the kernel library, and milliseconds for one, by the last ones. */
  #runningTokens = 0;
  #msPerToken: number | undefined;
  /** Milliseconds of the last micro-batches. */
  readonly #recentMs: number[] = [];
  readonly #stop = new Int32Array(new ArrayBuffer(4));
  #message = new Uint8Array(new ArrayBuffer(1 << 12));

  /** @param former The stage that had the same shard open before: how fast it was is known. */
  constructor(spec: StageSpec, epoch: number, handle: ShardHandle, former?: Stage) {
    this.spec = spec;
    this.epoch = epoch;
    this.handle = handle;
    if (former !== undefined) this.#msPerToken = former.#msPerToken;
  }

  /** How long the running micro-batch has taken, and should take; `undefined` when none runs. */
  get running(): { runningMs: number; expectedMs: number | null } | undefined {
    if (this.#running === undefined) return undefined;
    return {
      runningMs: performance.now() - this.#begin,
      expectedMs: this.#msPerToken === undefined
        ? null
        : Math.max(this.#msPerToken * this.#runningTokens, ...this.#recentMs),
    };
  }

  /** What heartbeats tell of it. */
  get work(): Hello["work"]["stages"][number] {
    const recent = this.#recentMs;
    return {
      stage: this.spec.stage,
      stepMs: recent.length === 0 ? null : recent.reduce((sum, ms) => sum + ms, 0) / recent.length,
      busyMs: this.busyMs + (this.#running === undefined ? 0 : performance.now() - this.#begin),
    };
  }

  /**
   * Cancels and frees sequences: entries for them in queued and later micro-batches are dropped, and a running micro-batch
   * that has no other sequences is stopped.
   */
  release(seqs: readonly number[]): void {
    for (const seq of seqs) this.#released.add(seq);
    if (this.#running === undefined) return this.#free(seqs);
    for (const seq of seqs) this.#doomed.push(seq);
    if (this.#running.every((seq) => this.#released.has(seq))) this.interrupt();
  }

  /** Gives up the running micro-batch. */
  interrupt(): void {
    if (this.#running !== undefined) Atomics.store(this.#stop, 0, 1);
  }

  /** Frees all sequences. Not while a micro-batch runs. */
  freeAll(): void {
    this.#free([...this.#sequences]);
  }

  /**
   * Computes a micro-batch.
   *
   * @throws {KernelError | WorkerError}
   */
  async compute(item: QueuedStep, maxPayload: number): Promise<Computed> {
    const { shard } = this.spec;
    const { batch, payload } = filterBatch(item.batch, item.payload, (seq) => this.#released.has(seq));
    let passed = this.#passed(batch);
    let written = 0;
    let following: Following | undefined;
    if (batch.entries.length > 0) {
      const row = 4 * shard.hyper.embedding;
      const expected = shard.embedding === null ? row * batch.tokens.length : 0;
      if (payload.byteLength !== expected) {
        throw new WorkerError(
          `step ${item.step} brings ${payload.byteLength} bytes of hidden states for ${batch.tokens.length} tokens, not ${expected}`,
        );
      }
      const capacity = shard.head === null ? row * batch.tokens.length : maxResultBytes(batch, shard.hyper.vocab);
      const size = HEADER_BYTES + passed.byteLength + capacity;
      if (size > maxPayload) {
        throw new WorkerError(`step ${item.step} gives ${size} bytes; the bus takes ${maxPayload}`);
      }
      this.#reserve(size);
      const output = this.#message.subarray(HEADER_BYTES + passed.byteLength, size);
      const seqs = batch.entries.map((entry) => entry.seq);
      for (const seq of seqs) this.#sequences.add(seq);
      Atomics.store(this.#stop, 0, 0);
      this.#running = seqs;
      this.#begin = performance.now();
      this.#runningTokens = batch.tokens.length;
      try {
        const running = this.handle.forward(batch.bytes, payload, this.#stop, output);
        // What is known already is written while the kernels compute: when they are done, nothing else shall take time.
        this.#frame(item, passed, capacity);
        if (shard.head !== null && item.chain > 0) following = new Following(item, this.epoch, batch);
        written = await running;
      } catch (error) {
        const stopped = error instanceof KernelError && error.code === KernelErrorCode.stopped;
        if (!stopped || !seqs.every((seq) => this.#released.has(seq))) throw error;
        passed = EMPTY;
        following = undefined;
      } finally {
        this.#running = undefined;
        const ms = performance.now() - this.#begin;
        this.busyMs += ms;
        this.#recentMs.push(ms);
        if (this.#recentMs.length > RECENT_STEPS) this.#recentMs.shift();
        this.#msPerToken = 0.8 * (this.#msPerToken ?? ms / batch.tokens.length) + 0.2 * ms / batch.tokens.length;
        this.#free(this.#doomed.splice(0));
      }
      if (written > capacity) throw new WorkerError(`the kernel library wrote ${written} bytes of ${capacity}`);
      this.tokens += batch.tokens.length;
    }
    this.steps++;
    this.#frame(item, passed, written);
    const end = HEADER_BYTES + passed.byteLength + written;
    const message = this.#message.subarray(0, end);
    if (shard.head === null || item.chain === 0) return { message };
    following ??= new Following(item, this.epoch, undefined);
    return { message, following: following.withResults(message.subarray(end - written)) };
  }

  /** Writes all of a message but its payload. */
  #frame({ step, chain }: QueuedStep, passed: Uint8Array, payloadBytes: number): void {
    const last = this.spec.shard.head !== null;
    const sizes = { batchBytes: passed.byteLength, payloadBytes };
    const header = { kind: last ? "result" : "work", epoch: this.epoch, step, ...sizes } as const;
    writeHeader(this.#message, last ? header : { ...header, chain });
    this.#message.set(passed, HEADER_BYTES);
  }

  /** The state for the orchestrator. Not while a micro-batch runs. */
  status(): StageStatus {
    const { stage, shard: { first, end } } = this.spec;
    const { queued, steps, tokens, busyMs } = this;
    return { stage, first, end, stats: this.handle.stats(), queued, steps, tokens, busyMs };
  }

  /** What of the batch the next one needs: all, or for the orchestrator the table alone. */
  #passed(batch: DecodedBatch): Uint8Array {
    return this.spec.shard.head === null ? batch.bytes : entryTable(batch);
  }

  #reserve(size: number): void {
    if (this.#message.byteLength >= size) return;
    this.#message = new Uint8Array(new ArrayBuffer(2 ** Math.ceil(Math.log2(size))));
  }

  #free(seqs: readonly number[]): void {
    for (const seq of seqs) {
      if (this.#sequences.delete(seq)) this.handle.truncate(seq, 0);
    }
  }
}

/** The next step of a chain: WORK for the tokens that are sampled. It goes on without any too, as steps are awaited. */
class Following {
  readonly #message: Uint8Array<ArrayBuffer>;
  /** Where the token ids lie in it. */
  readonly #tokens: number;
  readonly #count: number;

  /** @param batch The micro-batch from whose results the tokens come; `undefined` when there are none. */
  constructor({ step, chain }: QueuedStep, epoch: number, batch: DecodedBatch | undefined) {
    const entries = (batch?.entries ?? []).flatMap((entry) => {
      const sample = decodeSample(batch!, entry);
      return sample === undefined ? [] : [{ seq: entry.seq, pos: entry.pos + entry.tokenCount, tokens: [0], sample }];
    });
    const header = { kind: "work", epoch, step: step + 1, chain: chain - 1 } as const;
    this.#message = encodeMessage(header, encodeBatch(entries), new Uint8Array());
    this.#count = entries.length;
    this.#tokens = HEADER_BYTES + 4 + ENTRY_BYTES * entries.length;
  }

  /** @param results The payload of a RESULT: the sampled tokens, in the order of the entries, come first. */
  withResults(results: Uint8Array): Uint8Array {
    const from = new DataView(results.buffer, results.byteOffset, results.byteLength);
    const into = new DataView(this.#message.buffer);
    for (let i = 0, at = 0; i < this.#count; i++) {
      into.setUint32(this.#tokens + 4 * i, from.getUint32(at, true), true);
      at += sampledBytes(from.getUint32(at + 8, true));
    }
    return this.#message;
  }
}
