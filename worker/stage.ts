import {
  decodeBatch,
  decodeSample,
  encodeBatch,
  encodeMessage,
  ENTRY_BYTES,
  entryTable,
  filterBatch,
  HEADER_BYTES,
  maxResultBytes,
  MOST_RECENT_STEPS,
  sampledBytes,
  writeHeader,
} from "../bus/mod.ts";
import type { DecodedBatch, Hello, Stage as StageSpec, StageStatus, Subscription } from "../bus/mod.ts";
import { KernelError, KernelErrorCode, WorkerError } from "./errors.ts";
import type { Armed, Lane, LaneEvent, ShardHandle } from "./kernels.ts";
import { RecentSet, SeenSteps } from "./seen_steps.ts";

/** Which step a micro-batch is, and how many follow from it. */
interface ChainPlace {
  readonly step: number;
  readonly chain: number;
}

/** A micro-batch in a stage's queue. */
export interface QueuedStep extends ChainPlace {
  readonly batch: DecodedBatch;
  /** Hidden states, aligned to 4 bytes. */
  readonly payload: Uint8Array;
}

/** What comes of a micro-batch. */
export interface Computed {
  /** For what comes next: WORK for the next stage, or a RESULT from the last. It lies in a buffer that the next call reuses. */
  readonly message: Uint8Array;
  /** From the last stage: WORK for the first, that goes on with the tokens sampled. */
  readonly following?: Uint8Array;
}

/** What a lane leaves to be done: a message that came, or a micro-batch that failed, or, without an error, that was given up. */
export type Left =
  | LaneEvent & { readonly type: "message" }
  | { readonly type: "left"; readonly item: QueuedStep; readonly error?: KernelError };

/** A micro-batch as a lane can have it: its sequences go on by a token each. */
interface Foreseen {
  readonly batch: DecodedBatch;
  readonly seqs: readonly number[];
  readonly armed: Armed;
}

const EMPTY = encodeBatch([]);
/** A place that a lane puts in. */
const ANY: ChainPlace = { step: 0, chain: 1 };
/** Micro-batches that are foreseen at once. */
const MOST_FORESEEN = 8;

/**
 * A stage of the pipeline within one epoch: an open shard and what is known of its sequences and steps. {@linkcode Worker}
 * queues, and computes one micro-batch at a time.
 */
export class Stage {
  readonly spec: StageSpec;
  readonly epoch: number;
  readonly handle: ShardHandle;
  readonly seen = new SeenSteps();
  /** Where its messages come: by the bus, or by a lane. */
  subscription: Subscription | undefined;
  lane: Lane | undefined;
  /** Micro-batches waiting. */
  queued = 0;
  steps = 0;
  tokens = 0;
  busyMs = 0;
  readonly #maxPayload: number;
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
  /** The oldest first; no two have a sequence in common. */
  #foreseen: readonly Foreseen[] = [];
  /** What the lane waits for, or computes, now. */
  #armed: readonly Foreseen[] | undefined;
  #message = new Uint8Array(new ArrayBuffer(1 << 12));

  /**
   * @param maxPayload Bytes that a message may have.
   * @param former The stage that had the same shard open before: how fast it was is known.
   */
  constructor(spec: StageSpec, epoch: number, handle: ShardHandle, maxPayload: number, former?: Stage) {
    this.spec = spec;
    this.epoch = epoch;
    this.handle = handle;
    this.#maxPayload = maxPayload;
    if (former !== undefined) this.#msPerToken = former.#msPerToken;
  }

  /** How long the running micro-batch has taken, and should take; `undefined` when none runs. */
  get running(): { runningMs: number; expectedMs: number | null } | undefined {
    const running = this.#busy;
    if (running === undefined) return undefined;
    return {
      runningMs: performance.now() - running.since,
      expectedMs: this.#msPerToken === undefined
        ? null
        : Math.max(this.#msPerToken * running.tokens, ...this.#recentMs),
    };
  }

  /** The micro-batch in the kernel library, whoever brought it there. */
  get #busy(): { since: number; tokens: number; seqs: readonly number[] } | undefined {
    if (this.#running !== undefined) {
      return { since: this.#begin, tokens: this.#runningTokens, seqs: this.#running };
    }
    const running = this.lane?.running;
    const foreseen = running === undefined ? undefined : this.#armed?.[running.index];
    if (running === undefined || foreseen === undefined) return undefined;
    return { since: running.since, tokens: foreseen.batch.tokens.length, seqs: foreseen.seqs };
  }

  /** What heartbeats tell of it. */
  get work(): Hello["work"]["stages"][number] {
    const recent = this.#recentMs;
    return {
      stage: this.spec.stage,
      stepMs: recent.length === 0 ? null : recent.reduce((sum, ms) => sum + ms, 0) / recent.length,
      busyMs: this.busyMs + (this.running?.runningMs ?? 0),
    };
  }

  /**
   * Cancels and frees sequences: entries for them in queued and later micro-batches are dropped, and a running micro-batch
   * that has no other sequences is stopped.
   */
  release(seqs: readonly number[]): void {
    for (const seq of seqs) this.#released.add(seq);
    this.#forget(seqs);
    if (this.#running === undefined && this.#armed === undefined) return this.#free(seqs);
    for (const seq of seqs) this.#doomed.push(seq);
    this.wake(); // before a look at what runs: either the lane sees this, or this sees what the lane has begun
    if (this.#busy?.seqs.every((seq) => this.#released.has(seq))) this.interrupt();
  }

  /** Gives up the running micro-batch. */
  interrupt(): void {
    if (this.#running !== undefined) Atomics.store(this.#stop, 0, 1);
    else if (this.lane?.running !== undefined) this.lane.stop();
  }

  /** Has {@linkcode Stage.next} return as soon as no micro-batch is in the kernel library. */
  wake(): void {
    if (this.#armed !== undefined) this.lane?.wake();
  }

  /** Whether the lane waits or computes: the shard is not to be touched. */
  get armed(): boolean {
    return this.#armed !== undefined;
  }

  /**
   * Waits on the lane; what was foreseen is computed there and passed on.
   *
   * @throws {KernelError} when the lane is lost.
   */
  async next(lane: Lane): Promise<Left | undefined> {
    const armed = this.#armed = this.#foreseen;
    let event: LaneEvent;
    try {
      event = await lane.step(armed.map((foreseen) => foreseen.armed));
    } finally {
      this.#armed = undefined;
      this.#free(this.#doomed.splice(0));
    }
    if (event.type === "woken") return undefined;
    if (event.type === "message") return event;
    const { step, chain } = event;
    const { batch, seqs } = armed[event.index]!;
    this.#forget(seqs);
    this.seen.add(step);
    this.#account(event.ms, batch.tokens.length);
    if (event.type === "failed") {
      // Given up as nobody wants it: it goes on without entries, as steps are awaited.
      const unwanted = event.error.code === KernelErrorCode.stopped && seqs.every((seq) => this.#released.has(seq));
      const item = { step, chain, batch, payload: new Uint8Array() };
      return { type: "left", item, ...(unwanted ? {} : { error: event.error }) };
    }
    this.steps++;
    this.tokens += batch.tokens.length;
    this.#foresee(batch);
    return undefined;
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
  async compute(item: QueuedStep): Promise<Computed> {
    const { shard } = this.spec;
    const { batch, payload } = filterBatch(item.batch, item.payload, (seq) => this.#released.has(seq));
    let passed = this.#passed(batch);
    let written = 0;
    let following: Following | undefined;
    if (batch.entries.length > 0) {
      const expected = this.#payloadBytes(batch);
      if (payload.byteLength !== expected) {
        throw new WorkerError(
          `step ${item.step} brings ${payload.byteLength} bytes of hidden states for ${batch.tokens.length} tokens, not ${expected}`,
        );
      }
      const capacity = this.#outputBytes(batch);
      const size = HEADER_BYTES + passed.byteLength + capacity;
      if (size > this.#maxPayload) {
        throw new WorkerError(`step ${item.step} gives ${size} bytes; the bus takes ${this.#maxPayload}`);
      }
      this.#reserve(size);
      const output = this.#message.subarray(HEADER_BYTES + passed.byteLength, size);
      const seqs = batch.entries.map((entry) => entry.seq);
      this.#forget(seqs);
      for (const seq of seqs) this.#sequences.add(seq);
      Atomics.store(this.#stop, 0, 0);
      this.#running = seqs;
      this.#begin = performance.now();
      this.#runningTokens = batch.tokens.length;
      try {
        const running = this.handle.forward(batch.bytes, payload, this.#stop, output);
        // What is known already is written while the kernels compute: when they are done, nothing else shall take time.
        this.#frame(this.#message, item, passed, capacity);
        if (shard.head !== null && item.chain > 0) following = new Following(item, this.epoch, batch);
        this.#foresee(batch);
        written = await running;
      } catch (error) {
        const stopped = error instanceof KernelError && error.code === KernelErrorCode.stopped;
        if (!stopped || !seqs.every((seq) => this.#released.has(seq))) throw error;
        passed = EMPTY;
        following = undefined;
      } finally {
        this.#running = undefined;
        this.#account(performance.now() - this.#begin, batch.tokens.length);
        this.#free(this.#doomed.splice(0));
      }
      if (written > capacity) throw new WorkerError(`the kernel library wrote ${written} bytes of ${capacity}`);
      this.tokens += batch.tokens.length;
    }
    this.steps++;
    this.#frame(this.#message, item, passed, written);
    const end = HEADER_BYTES + passed.byteLength + written;
    const message = this.#message.subarray(0, end);
    if (shard.head === null || item.chain === 0) return { message };
    following ??= new Following(item, this.epoch, undefined);
    return { message, following: following.withResults(message.subarray(end - written)) };
  }

  /** Bytes of hidden states that come with a batch. */
  #payloadBytes({ tokens }: DecodedBatch): number {
    const { embedding, hyper } = this.spec.shard;
    return embedding === null ? 4 * hyper.embedding * tokens.length : 0;
  }

  /** Most bytes that come of a batch. */
  #outputBytes(batch: DecodedBatch): number {
    const { head, hyper } = this.spec.shard;
    return head === null ? 4 * hyper.embedding * batch.tokens.length : maxResultBytes(batch, hyper.vocab);
  }

  /** Notes how long a micro-batch took. */
  #account(ms: number, tokens: number): void {
    this.busyMs += ms;
    this.#recentMs.push(ms);
    if (this.#recentMs.length > MOST_RECENT_STEPS) this.#recentMs.shift();
    this.#msPerToken = 0.8 * (this.#msPerToken ?? ms / tokens) + 0.2 * ms / tokens;
  }

  /** Prepares for the lane what comes when the sequences that sample in a micro-batch go on together. */
  #foresee(from: DecodedBatch): void {
    const { lane, epoch, spec: { next, first, shard } } = this;
    if (lane === undefined) return;
    const { message: expected, tokensAt, tokenCount } = new Following(ANY, epoch, from);
    const batch = decodeBatch(expected.subarray(HEADER_BYTES));
    const seqs = batch.entries.map((entry) => entry.seq);
    if (seqs.length === 0 || seqs.some((seq) => this.#released.has(seq))) return;
    // A vocabulary smaller than what is asked for makes results shorter than they may be.
    if (batch.entries.some((entry) => entry.topLogprobs > shard.hyper.vocab)) return;
    const [payloadBytes, outputBytes] = [this.#payloadBytes(batch), this.#outputBytes(batch)];
    writeHeader(expected, { kind: "work", epoch, step: 0, batchBytes: batch.bytes.byteLength, payloadBytes });
    const passed = this.#passed(batch);
    const head = new Uint8Array(HEADER_BYTES + passed.byteLength);
    if (head.byteLength + outputBytes > this.#maxPayload) return;
    this.#frame(head, ANY, passed, outputBytes);
    const follows = shard.head === null || first === undefined
      ? {}
      : { follows: { subject: first, ...new Following(ANY, epoch, batch) } };
    const sizes = { tokensAt, tokenCount, payloadBytes, outputBytes, passes: shard.head === null };
    this.#forget(seqs);
    this.#foreseen = [...this.#foreseen, { batch, seqs, armed: { expected, next, head, ...sizes, ...follows } }]
      .slice(-MOST_FORESEEN);
  }

  /** Sequences that do not go on as was foreseen, or have done so. */
  #forget(seqs: readonly number[]): void {
    this.#foreseen = this.#foreseen.filter((foreseen) => !foreseen.seqs.some((seq) => seqs.includes(seq)));
  }

  /** Writes all of a message but its payload. */
  #frame(into: Uint8Array, { step, chain }: ChainPlace, passed: Uint8Array, payloadBytes: number): void {
    const last = this.spec.shard.head !== null;
    const sizes = { batchBytes: passed.byteLength, payloadBytes };
    const header = { kind: last ? "result" : "work", epoch: this.epoch, step, ...sizes } as const;
    writeHeader(into, last ? header : { ...header, chain });
    into.set(passed, HEADER_BYTES);
  }

  /** The state for the orchestrator. Not while a micro-batch runs. */
  status(): StageStatus {
    const { stage, shard: { first, end } } = this.spec;
    const { queued, steps, tokens, busyMs } = this;
    const recentMs = [...this.#recentMs];
    return { stage, first, end, stats: this.handle.stats(), queued, steps, tokens, busyMs, recentMs };
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
  readonly message: Uint8Array<ArrayBuffer>;
  /** Where the token ids lie in it, and how many. */
  readonly tokensAt: number;
  readonly tokenCount: number;

  /** @param batch The micro-batch from whose results the tokens come; `undefined` when there are none. */
  constructor({ step, chain }: ChainPlace, epoch: number, batch: DecodedBatch | undefined) {
    const entries = (batch?.entries ?? []).flatMap((entry) => {
      const sample = decodeSample(batch!, entry);
      return sample === undefined ? [] : [{ seq: entry.seq, pos: entry.pos + entry.tokenCount, tokens: [0], sample }];
    });
    const header = { kind: "work", epoch, step: step + 1, chain: chain - 1 } as const;
    this.message = encodeMessage(header, encodeBatch(entries), new Uint8Array());
    this.tokenCount = entries.length;
    this.tokensAt = HEADER_BYTES + 4 + ENTRY_BYTES * entries.length;
  }

  /** @param results The payload of a RESULT: the sampled tokens, in the order of the entries, come first. */
  withResults(results: Uint8Array): Uint8Array {
    const from = new DataView(results.buffer, results.byteOffset, results.byteLength);
    const into = new DataView(this.message.buffer);
    for (let i = 0, at = 0; i < this.tokenCount; i++) {
      into.setUint32(this.tokensAt + 4 * i, from.getUint32(at, true), true);
      at += sampledBytes(from.getUint32(at + 8, true));
    }
    return this.message;
  }
}
