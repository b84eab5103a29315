import { encodeBatch, ENTRY_BYTES, HEADER_BYTES, sampleBytes } from "../bus/mod.ts";
import type { BatchEntry, EntryResult, SampleParameters } from "../bus/mod.ts";
import { ClusterError, QueueFullError } from "./errors.ts";
import type { StepRunner } from "./pipeline.ts";

/**
 * What is to be computed: a sequence of tokens, from which tokens are sampled or whose logits are read. The job keeps
 * nothing on the workers; the scheduler may compute its tokens anew at any time.
 */
export interface Job {
  /** All tokens so far. The scheduler appends what is sampled. */
  readonly tokens: number[];
  /** How to sample after the last token; absent: the logits of all tokens are wanted. */
  readonly sample?: SampleParameters;
  /** Most tokens that there may be, sampled ones included; absent: not known. */
  readonly most?: number;
  /** Most tokens per micro-batch, besides the scheduler's own bounds. */
  readonly chunk?: number;
  /** Takes a sampled token, which is in `tokens` already; false ends the job. */
  onToken?(sampled: NonNullable<EntryResult["sampled"]>): boolean;
  /** Takes logits of the tokens from `pos` on. May come twice for a position, with the same values. */
  onLogits?(pos: number, logits: Float32Array): void;
  /** All logits came. */
  onDone?(): void;
  /** Takes the reason why the job ends early. */
  onError(error: Error): void;
}

/** A job that one scheduler has given up for another. */
export interface HandedJob {
  readonly job: Job;
  /** Order of arrival at the first one. */
  readonly age: number;
}

/** Jobs that came, to all schedulers: they may change places. */
let arrivals = 0;

/** Bounds of the scheduler. */
export interface SchedulerOptions {
  /** Most tokens of a micro-batch. */
  maxBatch: number;
  /** Most sequences in the KV cache. */
  maxRunning: number;
  /** Most jobs waiting for a place. */
  maxQueued: number;
  /** Most sequences that stay in the KV cache after their end, for jobs that begin with the same tokens. */
  maxKept: number;
  /** Bytes of a message, and of a token's hidden state in one. */
  maxPayload: number;
  hiddenBytes: number;
  vocab: number;
}

/** How the scheduler does. Counts are since the start. */
export interface SchedulerStats {
  /** Jobs in the KV cache, and waiting for a place. */
  running: number;
  waiting: number;
  /** Micro-batches on their way. */
  inFlight: number;
  kvBlocksTotal: number;
  kvBlocksUsed: number;
  /** Sequences that stay in the KV cache after their end, and their blocks; they make room when it is needed. */
  kept: number;
  kvBlocksKept: number;
  /** Micro-batches sent. */
  steps: number;
  /** Tokens computed in chunks, and one by one. */
  prefillTokens: number;
  decodeTokens: number;
  /** Tokens of prompts that were in the KV cache already. */
  reusedTokens: number;
  /** Sequences that had to make room and were computed anew. */
  preemptions: number;
}

/** Prompt tokens that may ride with decoding sequences, so that these do not wait long. */
const PREFILL_BESIDE_DECODE = 64;
/** So many micro-batches may leave out waiting prefill for want of room. */
const PREFILL_PATIENCE = 4;

/**
 * So many tokens of a sequence follow each other without this side: the last stage sends each straight to the first. Meanwhile
 * micro-batches cannot be put together anew, and what comes after an answer's end is computed in vain.
 */
const CHAIN = 4;
/** A kept sequence is worth its place to a job that has so many tokens in common with it … */
const LEAST_REUSED = 16;
/** … and this share of it: the rest, which others might go on with, is lost. */
const REUSED_SHARE = 0.5;
/** Prompts are cut in so many chunks for each stage, so that a pipeline fills and empties in a small part of their time … */
const CHUNKS_PER_STAGE = 6;
/** … as far as chunks keep so many tokens: kernels do more with tokens that come together. */
const LEAST_CHUNK = 32;
const CHUNK_STEP = 16;

interface Sequence {
  readonly job: Job;
  /** Order of arrival. */
  readonly age: number;
  /** Its number on the workers while it runs; a fresh one after every preemption. */
  seq: number;
  /** Tokens sent to the workers, and those of them that were there before it began. */
  computed: number;
  reused: number;
  blocks: number;
  /** Micro-batches on their way that hold some of its tokens. */
  inFlight: number;
  /** Micro-batch it was last part of. */
  lastStep: number;
}

/** A sequence that has ended, as it lies in the KV cache. */
interface Kept {
  readonly seq: number;
  readonly tokens: readonly number[];
  readonly blocks: number;
}

/** A micro-batch on its way, or several of which each follows from the one before. */
interface Step {
  readonly sequences: readonly { sequence: Sequence; seq: number }[];
  readonly decoding: boolean;
  /** Sequences that have ended with tokens on their way, to be kept when these have come. */
  readonly ended: Kept[];
}

/**
 * Continuous batching. Whenever a micro-batch may be sent it is put together anew: first one token each of the decoding
 * sequences, longest waiting first, then chunks of prompts, one request after the other.
 *
 * With N stages, at most N micro-batches hold decoding sequences, and each at most an N-th of them, so that all stages are
 * busy; one more is sent while nothing decodes, or when all of them are full. KV blocks are counted here: no stage is ever asked for more than it has.
 * When blocks run out the youngest sequence gives way. It loses nothing but time, as it is its token ids.
 *
 * A sequence that has ended stays in the KV cache until the room is needed: a job that begins with its tokens, as the next
 * turn of a conversation does, goes on from there.
 */
export class Scheduler {
  #runner: StepRunner;
  readonly #options: SchedulerOptions;
  /** By age. */
  #waiting: Sequence[] = [];
  #running: Sequence[] = [];
  readonly #bySeq = new Map<number, Sequence>();
  readonly #byJob = new Map<Job, Sequence>();
  /** Those that ended longest ago first. */
  readonly #kept: Kept[] = [];
  readonly #steps = new Set<Step>();
  #usedBlocks = 0;
  #nextSeq = 1;
  #awake = false;
  #starved = 0;
  #paused = false;
  #closed: Error | undefined;
  #counts = { steps: 0, prefillTokens: 0, decodeTokens: 0, reusedTokens: 0, preemptions: 0 };

  constructor(runner: StepRunner, options: SchedulerOptions) {
    this.#runner = runner;
    this.#options = options;
  }

  /** Most tokens that fit the KV cache when a sequence has it alone. */
  get capacity(): number {
    return this.#runner.kvBlocks * this.#runner.blockTokens;
  }

  /** How it does. */
  get stats(): SchedulerStats {
    return {
      running: this.#running.length,
      waiting: this.#waiting.length,
      inFlight: this.#steps.size,
      kvBlocksTotal: this.#runner.kvBlocks,
      kvBlocksUsed: this.#usedBlocks - this.#keptBlocks,
      kept: this.#kept.length,
      kvBlocksKept: this.#keptBlocks,
      ...this.#counts,
    };
  }

  get #keptBlocks(): number {
    return this.#kept.reduce((sum, { blocks }) => sum + blocks, 0);
  }

  /**
   * Queues a job, whose tokens never exceed {@linkcode Scheduler.capacity}.
   *
   * @throws {QueueFullError}
   */
  add(job: Job): void {
    if (this.#closed !== undefined) throw this.#closed;
    const sequence = this.#queue({ job, age: arrivals++ });
    this.#admit();
    // While it pauses those that ran wait too, and are no reason to refuse anybody.
    if (this.#waiting.length > this.#options.maxQueued + (this.#paused ? this.#options.maxRunning : 0)) {
      this.#forget(sequence);
      throw new QueueFullError(this.#options.maxQueued);
    }
    this.#wake();
  }

  #queue({ job, age }: HandedJob): Sequence {
    const sequence = { job, age, seq: 0, computed: 0, reused: 0, blocks: 0, inFlight: 0, lastStep: -1 };
    insert(this.#waiting, sequence);
    this.#byJob.set(job, sequence);
    return sequence;
  }

  /** Takes a job from another scheduler, whatever the bounds: it was let in there. */
  adopt(handed: HandedJob): void {
    if (this.#closed !== undefined) return handed.job.onError(this.#closed);
    this.#queue(handed);
    this.#wake();
  }

  /** Gives up all jobs that hold no place in the KV cache (while it pauses: all) for another scheduler, oldest first. */
  handOver(): HandedJob[] {
    const handed = this.#waiting.splice(0).map(({ job, age }) => ({ job, age }));
    for (const { job } of handed) this.#byJob.delete(job);
    return handed;
  }

  /** How much there is to do: jobs, and the tokens of their prompts that are to be computed. */
  get load(): { jobs: number; promptTokens: number } {
    const sequences = [...this.#byJob.values()];
    const prompts = sequences.filter((sequence) => !decodes(sequence)).map(remaining);
    return { jobs: sequences.length, promptTokens: prompts.reduce((sum, tokens) => sum + tokens, 0) };
  }

  /** How many of a job's tokens it would find in the KV cache. */
  reusable(job: Job): number {
    return this.#bestKept(job, Infinity)?.common ?? 0;
  }

  /** Ends a job at once, on the workers too. Harmless when it has ended, or is another scheduler's. */
  cancel(job: Job): void {
    const sequence = this.#byJob.get(job);
    if (sequence === undefined) return;
    if (sequence.seq !== 0) this.#keep(sequence);
    this.#forget(sequence);
    this.#wake();
  }

  /** Ends all jobs with `error`, and refuses new ones. */
  close(error: Error): void {
    if (this.#closed !== undefined) return;
    this.#closed = error;
    for (const sequence of [...this.#byJob.values()]) this.#fail(sequence, error);
  }

  /** Ends all jobs with `error`, and goes on with new ones. */
  abort(error: Error): void {
    for (const sequence of [...this.#byJob.values()]) this.#fail(sequence, error);
  }

  /**
   * Takes all sequences off the pipeline and sends no more, until {@linkcode Scheduler.replace}. What the pipeline may still
   * answer is of no account.
   */
  pause(): void {
    if (this.#paused) return;
    this.#paused = true;
    for (const sequence of [...this.#running].reverse()) this.#suspend(sequence);
    while (this.#kept.length > 0) this.#dropKept();
    for (const step of this.#steps) this.#dropEnded(step);
    this.#steps.clear();
  }

  /**
   * Goes on with another pipeline: every running sequence is computed anew there from its token ids. What the former one
   * may still answer is of no account. No sequence may be longer than the new {@linkcode Scheduler.capacity}.
   */
  replace(runner: StepRunner): void {
    this.pause();
    this.#paused = false;
    this.#runner = runner;
    this.#nextSeq = 1;
    this.#wake();
  }

  /** Schedules once what happens in this turn of the event loop has happened. */
  #wake(): void {
    if (this.#awake) return;
    this.#awake = true;
    queueMicrotask(() => {
      this.#awake = false;
      if (this.#closed === undefined && !this.#paused) this.#schedule();
    });
  }

  #schedule(): void {
    this.#admit();
    for (;;) {
      const decoding = this.#running.filter(decodes).length;
      if (this.#steps.size >= this.#mostSteps(decoding)) return;
      const entries = this.#compose(decoding);
      if (entries.length === 0) return;
      this.#send(entries);
    }
  }

  /**
   * How many micro-batches may be on their way: one more than there are stages hides the ways between them, but is not worth
   * smaller micro-batches.
   */
  #mostSteps(decoding: number): number {
    const { stages } = this.#runner;
    return decoding > 0 && decoding <= stages * this.#options.maxBatch ? stages : stages + 1;
  }

  /** Lets waiting jobs in, oldest first, as long as their tokens find room beside those of the others. */
  #admit(): void {
    if (this.#paused) return;
    const { kvBlocks } = this.#runner;
    let promised = 0;
    for (const sequence of this.#running) promised += Math.max(sequence.blocks, this.#blocksFor(sequence));
    for (;;) {
      const next = this.#waiting[0];
      if (next === undefined || this.#running.length >= this.#options.maxRunning) return;
      const blocks = this.#blocksFor(next);
      if (blocks > kvBlocks) {
        this.#fail(next, this.#tooLong(next));
        continue;
      }
      if (promised + blocks > kvBlocks) return;
      this.#waiting.shift();
      if (!this.#reuse(next, kvBlocks - promised)) next.seq = this.#nextSeq++;
      promised += Math.max(next.blocks, blocks);
      this.#bySeq.set(next.seq, next);
      insert(this.#running, next);
    }
  }

  /** Lets a job go on with the kept sequence that has most of its tokens, if that is worth it and has at most `most` blocks. */
  #reuse(sequence: Sequence, most: number): boolean {
    const best = this.#bestKept(sequence.job, most);
    if (best === undefined) return false;
    const { kept, common } = best;
    this.#kept.splice(this.#kept.indexOf(kept), 1);
    // The workers cut it to the first token that is computed.
    sequence.seq = kept.seq;
    sequence.blocks = kept.blocks;
    sequence.computed = sequence.reused = common;
    this.#counts.reusedTokens += common;
    return true;
  }

  #bestKept({ tokens, sample }: Job, most: number): { kept: Kept; common: number } | undefined {
    if (sample === undefined) return undefined; // all its logits are wanted
    let best: { kept: Kept; common: number } | undefined;
    for (const kept of this.#kept) {
      // One token at least is computed: the next is sampled after it.
      const common = Math.min(commonLength(kept.tokens, tokens), tokens.length - 1);
      if (common < LEAST_REUSED || common < REUSED_SHARE * kept.tokens.length || kept.blocks > most) continue;
      if (common > (best?.common ?? 0)) best = { kept, common };
    }
    return best;
  }

  /** Frees what ended within a step that comes to nothing. */
  #dropEnded(step: Step): void {
    for (const kept of step.ended.splice(0)) {
      this.#kept.unshift(kept);
      this.#dropKept();
    }
  }

  /** Frees the kept sequence that ended longest ago. */
  #dropKept(): void {
    const kept = this.#kept.shift()!;
    this.#usedBlocks -= kept.blocks;
    this.#runner.release([kept.seq]);
  }

  /** Blocks for a sequence's tokens and the one to come. */
  #blocksFor({ job }: Sequence): number {
    const next = job.sample === undefined ? 0 : 1;
    return Math.ceil((job.tokens.length + next) / this.#runner.blockTokens);
  }

  #tooLong({ job }: Sequence): ClusterError {
    return new ClusterError(
      `a sequence of ${job.tokens.length} tokens and the next exceeds the KV cache of ${this.capacity}`,
    );
  }

  /** Puts a micro-batch together; empty when nothing can be sent now. */
  #compose(decoding: number): Chosen[] {
    const { stages } = this.#runner;
    const batch = new BatchRoom(this.#options, stages);
    const byService = [...this.#running].sort((a, b) => a.lastStep - b.lastStep || a.age - b.age);
    const prefills = byService.filter((sequence) => !decodes(sequence) && remaining(sequence) > 0);
    const prefillFirst = prefills.length > 0 && this.#starved >= PREFILL_PATIENCE;
    if (prefillFirst) this.#choosePrefill(batch, prefills, Math.ceil(this.#options.maxBatch / 2));
    const groups = [...this.#steps].filter((step) => step.decoding).length;
    if (groups < this.#mostSteps(decoding)) {
      const share = Math.ceil(decoding / stages);
      for (const sequence of byService) {
        if (batch.decoding >= share) break;
        if (decodes(sequence) && remaining(sequence) === 1) this.#choose(batch, sequence, 1, true);
      }
    }
    if (!prefillFirst) {
      this.#choosePrefill(batch, prefills, decoding > 0 ? PREFILL_BESIDE_DECODE : this.#chunk(prefills));
    }
    if (prefills.length === 0 || batch.chosen.some((choice) => !choice.decoding)) this.#starved = 0;
    else if (batch.chosen.length > 0) this.#starved++;
    return batch.chosen;
  }

  /** Tokens of a micro-batch that computes nothing but prompts. */
  #chunk(prefills: readonly Sequence[]): number {
    const { stages } = this.#runner;
    if (stages === 1) return Infinity;
    const tokens = prefills.reduce((sum, { job, reused }) => sum + job.tokens.length - reused, 0);
    const even = Math.ceil(tokens / (CHUNKS_PER_STAGE * stages));
    return Math.max(LEAST_CHUNK, Math.ceil(even / CHUNK_STEP) * CHUNK_STEP);
  }

  /** Fills the batch with chunks of prompts, those served longest ago first. */
  #choosePrefill(batch: BatchRoom, prefills: readonly Sequence[], most: number): void {
    let left = most;
    for (const sequence of prefills) {
      if (left <= 0) return;
      const count = Math.min(left, remaining(sequence), sequence.job.chunk ?? Infinity);
      left -= this.#choose(batch, sequence, count, false);
    }
  }

  /** Adds up to `count` tokens of a sequence, as far as batch and KV cache have room, and returns how many. */
  #choose(batch: BatchRoom, sequence: Sequence, count: number, decoding: boolean): number {
    if (sequence.seq === 0) return 0; // gave way while this batch was put together
    let tokens = batch.fit(sequence, count);
    if (tokens === 0) return 0;
    const { blockTokens, kvBlocks } = this.#runner;
    const blocks = () => Math.ceil((sequence.computed + tokens) / blockTokens) - sequence.blocks;
    while (blocks() > kvBlocks - this.#usedBlocks) {
      if (this.#kept.length > 0) {
        this.#dropKept();
        continue;
      }
      const youngest = this.#running.findLast((other) => other.blocks > 0 && !batch.has(other));
      if (youngest !== undefined && youngest.age > sequence.age) {
        this.#suspend(youngest);
        this.#counts.preemptions++;
        continue;
      }
      // Older ones have the rest: take what the blocks at hand hold, or wait for them.
      tokens = (kvBlocks - this.#usedBlocks + sequence.blocks) * blockTokens - sequence.computed;
      if (tokens > 0) break;
      if (this.#usedBlocks === sequence.blocks) {
        this.#fail(sequence, this.#tooLong(sequence));
        this.#wake();
      }
      return 0;
    }
    const more = blocks();
    sequence.blocks += more;
    this.#usedBlocks += more;
    batch.add(sequence, tokens, decoding);
    return tokens;
  }

  #send(chosen: readonly Chosen[]): void {
    const number = this.#counts.steps++;
    const entries = chosen.map(({ sequence, tokens, decoding }): BatchEntry => {
      const { job, seq, computed: pos } = sequence;
      const end = pos + tokens;
      sequence.computed = end;
      sequence.inFlight++;
      sequence.lastStep = number;
      this.#counts[decoding ? "decodeTokens" : "prefillTokens"] += tokens;
      return {
        seq,
        pos,
        tokens: job.tokens.slice(pos, end),
        ...(job.sample === undefined ? { logits: true } : end === job.tokens.length ? { sample: job.sample } : {}),
      };
    });
    const step: Step = {
      sequences: chosen.map(({ sequence }) => ({ sequence, seq: sequence.seq })),
      decoding: chosen.some((choice) => choice.decoding),
      ended: [],
    };
    this.#steps.add(step);
    const links = this.#chainLinks(chosen);
    const batch = encodeBatch(entries);
    const all = links > 1 ? this.#runner.chain!(batch, links) : [this.#runner.run(batch)];
    for (const [i, results] of all.entries()) {
      results.then(
        (results) => this.#onResults(step, results, i === all.length - 1),
        (error: Error) => this.#onStepError(step, error),
      ).catch((error) => this.close(new ClusterError("the scheduler failed", { cause: error })));
    }
  }

  /** How many micro-batches may follow each other from this one; takes the blocks for them. */
  #chainLinks(chosen: readonly Chosen[]): number {
    if (this.#runner.chain === undefined || this.#runner.stages === 1) return 1;
    // A prompt that waits may ride with the next micro-batch.
    if (this.#running.some((sequence) => !decodes(sequence) && remaining(sequence) > 0)) return 1;
    const { blockTokens, kvBlocks } = this.#runner;
    let links = CHAIN;
    for (const { sequence: { job } } of chosen) links = Math.min(links, (job.most ?? 0) - job.tokens.length);
    if (links < 2) return 1;
    const more = ({ computed, blocks }: Sequence) =>
      Math.max(0, Math.ceil((computed + links - 1) / blockTokens) - blocks);
    const needed = chosen.reduce((sum, { sequence }) => sum + more(sequence), 0);
    if (needed > kvBlocks - this.#usedBlocks) return 1;
    for (const { sequence } of chosen) sequence.blocks += more(sequence);
    this.#usedBlocks += needed;
    return links;
  }

  /** Takes what a micro-batch gives; `last`: none follows from it. */
  #onResults(step: Step, results: readonly EntryResult[], last: boolean): void {
    if (!this.#steps.has(step)) return; // of a pipeline that was replaced
    if (last) this.#steps.delete(step);
    const bySeq = new Map(results.map((result) => [result.seq, result]));
    for (const { sequence, seq } of step.sequences) {
      if (this.#bySeq.get(seq) !== sequence) continue; // released meanwhile
      if (last) sequence.inFlight--;
      const result = bySeq.get(seq);
      if (result === undefined) this.#fail(sequence, new ClusterError("a stage lost a sequence"));
      else this.#take(sequence, result, step);
      if (!last && this.#bySeq.get(seq) === sequence) {
        sequence.computed++; // the token sampled is on its way
        this.#counts.decodeTokens++;
      }
    }
    if (last) this.#kept.push(...step.ended.splice(0));
    while (this.#kept.length > this.#options.maxKept) this.#dropKept();
    this.#wake();
  }

  #take(sequence: Sequence, { pos, tokenCount, sampled, logits }: EntryResult, step: Step): void {
    const { job } = sequence;
    if (logits !== undefined) {
      job.onLogits?.(pos, logits);
      if (pos + tokenCount === job.tokens.length) {
        this.#forget(sequence);
        job.onDone?.();
      }
    }
    if (sampled === undefined) return;
    if (pos + tokenCount !== job.tokens.length || sampled.id >= this.#options.vocab) {
      return this.#fail(sequence, new ClusterError(`a stage sampled token ${sampled.id} after position ${pos}`));
    }
    job.tokens.push(sampled.id);
    let goOn: boolean | undefined;
    try {
      goOn = job.onToken?.(sampled);
    } catch (error) {
      return this.#fail(sequence, error as Error);
    }
    if (goOn === true) return;
    this.#keep(sequence, step);
    this.#forget(sequence);
  }

  /** A stage failed, or was not heard of: the requests of the micro-batch fail. */
  #onStepError(step: Step, error: Error): void {
    if (!this.#steps.delete(step)) return;
    this.#dropEnded(step);
    for (const { sequence, seq } of step.sequences) {
      if (this.#bySeq.get(seq) === sequence) this.#fail(sequence, error);
    }
    this.#wake();
  }

  #fail(sequence: Sequence, error: Error): void {
    this.#forget(sequence);
    sequence.job.onError(error);
  }

  /** Leaves an ended sequence in the KV cache; when nothing but `chain` holds tokens of it, as soon as that has come. */
  #keep(sequence: Sequence, chain?: Step): void {
    const { job, seq, computed, blocks, inFlight } = sequence;
    const following = inFlight === 1 && chain !== undefined && this.#steps.has(chain);
    if ((inFlight > 0 && !following) || computed < LEAST_REUSED || this.#options.maxKept === 0) return;
    (following ? chain.ended : this.#kept).push({ seq, tokens: job.tokens.slice(0, computed), blocks });
    this.#bySeq.delete(seq);
    this.#running = this.#running.filter((other) => other !== sequence);
    sequence.seq = 0;
    if (this.#kept.length > this.#options.maxKept) this.#dropKept();
  }

  /** Ends a sequence here and on the workers. */
  #forget(sequence: Sequence): void {
    this.#byJob.delete(sequence.job);
    this.#waiting = this.#waiting.filter((other) => other !== sequence);
    this.#evict(sequence);
  }

  /** Sends a running sequence back to the queue, with its token ids. */
  #suspend(sequence: Sequence): void {
    this.#evict(sequence);
    insert(this.#waiting, sequence);
  }

  /** Takes a sequence off the workers. */
  #evict(sequence: Sequence): void {
    if (!this.#bySeq.delete(sequence.seq)) return;
    this.#running = this.#running.filter((other) => other !== sequence);
    this.#usedBlocks -= sequence.blocks;
    this.#runner.release([sequence.seq]);
    sequence.seq = 0;
    sequence.blocks = 0;
    sequence.computed = sequence.reused = 0;
    sequence.inFlight = 0;
  }
}

interface Chosen {
  readonly sequence: Sequence;
  readonly tokens: number;
  readonly decoding: boolean;
}

/** A micro-batch being filled, with what its messages still have room for. */
class BatchRoom {
  readonly chosen: Chosen[] = [];
  decoding = 0;
  readonly #options: SchedulerOptions;
  #tokens: number;
  /** Bytes left of the batch with hidden states, and of the result. */
  #workBytes: number;
  #resultBytes: number;
  readonly #hiddenBytes: number;

  constructor(options: SchedulerOptions, stages: number) {
    this.#options = options;
    this.#tokens = options.maxBatch;
    this.#workBytes = options.maxPayload - HEADER_BYTES - 4;
    this.#resultBytes = this.#workBytes;
    this.#hiddenBytes = stages > 1 ? options.hiddenBytes : 0;
  }

  has(sequence: Sequence): boolean {
    return this.chosen.some((choice) => choice.sequence === sequence);
  }

  /** How many of `count` tokens fit. */
  fit(sequence: Sequence, count: number): number {
    const cost = this.#cost(sequence);
    return Math.max(
      0,
      Math.min(
        count,
        this.#tokens,
        Math.floor((this.#workBytes - cost.entry) / cost.token),
        cost.logits === 0
          ? (this.#resultBytes >= cost.result ? Infinity : 0)
          : Math.floor((this.#resultBytes - cost.result) / cost.logits),
      ),
    );
  }

  add(sequence: Sequence, tokens: number, decoding: boolean): void {
    const cost = this.#cost(sequence);
    this.chosen.push({ sequence, tokens, decoding });
    this.#tokens -= tokens;
    this.#workBytes -= cost.entry + cost.token * tokens;
    this.#resultBytes -= cost.result + cost.logits * tokens;
    if (decoding) this.decoding++;
  }

  #cost({ job: { sample } }: Sequence): { entry: number; token: number; result: number; logits: number } {
    return {
      entry: ENTRY_BYTES + (sample === undefined ? 0 : sampleBytes(sample)),
      token: 4 + this.#hiddenBytes,
      result: ENTRY_BYTES + (sample === undefined ? 0 : 12 + 8 * (sample.topLogprobs ?? 0)),
      logits: sample === undefined ? 4 * this.#options.vocab : 0,
    };
  }
}

function remaining(sequence: Sequence): number {
  return sequence.job.tokens.length - sequence.computed;
}

/** How many tokens two sequences begin with in common. */
function commonLength(a: readonly number[], b: readonly number[]): number {
  const most = Math.min(a.length, b.length);
  let length = 0;
  while (length < most && a[length] === b[length]) length++;
  return length;
}

/** Whether nothing but its newest token is to be computed, or it waits for the next. */
function decodes(sequence: Sequence): boolean {
  const left = remaining(sequence);
  return sequence.job.sample !== undefined && (left === 0 || (left === 1 && sequence.inFlight === 0));
}

/** Inserts by age. */
function insert(sequences: Sequence[], sequence: Sequence): void {
  const at = sequences.findIndex((other) => other.age > sequence.age);
  sequences.splice(at < 0 ? sequences.length : at, 0, sequence);
}
