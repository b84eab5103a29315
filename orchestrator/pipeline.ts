import {
  BusError,
  clusterSubjects,
  controlReplySchema,
  decodeFailure,
  decodeJson,
  decodeMessage,
  decodeResults,
  encodeJson,
  encodeMessage,
  WireError,
} from "../bus/mod.ts";
import type {
  Bus,
  ControlReply,
  ControlRequest,
  EntryResult,
  Shard,
  StageStatus,
  Subscription,
  WeightsRef,
  WireMessage,
} from "../bus/mod.ts";
import { ClusterError, LoadError } from "./errors.ts";
import { LONGEST_MS } from "./longest.ts";
import type { PlacedStage } from "./placement.ts";

/** What the scheduler needs of a pipeline. */
export interface StepRunner {
  /** Stages that a micro-batch passes. */
  readonly stages: number;
  /** KV blocks of the stage that has fewest, and tokens of a block. */
  readonly kvBlocks: number;
  readonly blockTokens: number;
  /**
   * Sends a micro-batch (bytes of `encodeBatch`) through all stages. Micro-batches are computed in the order sent.
   *
   * @throws {ClusterError} when a stage refuses it, or the pipeline was given up.
   */
  run(batch: Uint8Array): Promise<EntryResult[]>;
  /**
   * As `run`, for a micro-batch whose entries all sample a token: the last stage sends these straight to the first, `links` − 1
   * times, and every time the results come here. Absent: this is not to be had.
   */
  readonly chain?: (batch: Uint8Array, links: number) => Promise<EntryResult[]>[];
  /** Cancels and frees sequences in all stages, ahead of queued micro-batches. */
  release(seqs: readonly number[]): void;
}

/** Options of {@linkcode Pipeline.load}. */
export interface PipelineOptions {
  bus: Bus;
  cluster: string;
  /** Id of this orchestrator; a name as in subjects. */
  orchestrator: string;
  /** Larger than any that the workers have seen. */
  epoch: number;
  placement: readonly PlacedStage[];
  /** The shard of each stage. */
  shards: readonly Shard[];
  /** The model's file, for workers that lack it. Default: all have it. */
  weights?: WeightsRef;
  /** Milliseconds that a micro-batch may take through all stages. */
  stepTimeoutMs: number;
  /**
   * Told when the pipeline cannot go on: messages are lost or malformed. The micro-batches concerned stay open until
   * {@linkcode Pipeline.fail}.
   */
  onTrouble: (error: ClusterError) => void;
  /** Ends the wait for workers that load. */
  signal: AbortSignal;
}

/** The kernel library's code for a position after the sequence's end: a message was lost. */
const SEQUENCE_GAP = -7;
/** Milliseconds that a worker may take to close its shards. */
const UNLOAD_TIMEOUT_MS = 10_000;

interface PendingStep {
  readonly resolve: (results: EntryResult[]) => void;
  readonly reject: (error: Error) => void;
  readonly timer: ReturnType<typeof setTimeout>;
  /** When it was sent. */
  sent: number;
  /** Steps that the last stage sends after it, and whether it is such a one itself. */
  readonly links: number;
  readonly follows: boolean;
}

/** One placement of a model on workers, for one epoch: its stages are loaded, and micro-batches run through them. */
export class Pipeline implements StepRunner {
  readonly epoch: number;
  readonly placement: readonly PlacedStage[];
  readonly #options: PipelineOptions;
  readonly #subjects: ReturnType<typeof clusterSubjects>;
  readonly #workers: readonly string[];
  readonly #vocab: number;
  readonly #subscription: Subscription;
  readonly #pending = new Map<number, PendingStep>();
  #nextStep = 0;
  #status: readonly StageStatus[] = [];
  #failure: ClusterError | undefined;
  #completed = 0;
  #lastProgress = performance.now();
  #slowestMs = 0;
  /** Milliseconds with micro-batches on their way, until the last time that none was. */
  #activeMs = 0;
  #activeSince = 0;

  private constructor(options: PipelineOptions) {
    this.#options = options;
    this.epoch = options.epoch;
    this.placement = options.placement;
    this.#subjects = clusterSubjects(options.cluster);
    this.#workers = [...new Set(options.placement.map((stage) => stage.worker))];
    this.#vocab = options.shards[0]!.hyper.vocab;
    this.#subscription = options.bus.subscribe(
      this.#subjects.results(options.orchestrator),
      (message) => this.#onResult(message.data),
    );
  }

  /**
   * Has every worker open its shards.
   *
   * @throws {LoadError} naming the worker and its reason.
   */
  static async load(options: PipelineOptions): Promise<Pipeline> {
    const pipeline = new Pipeline(options);
    try {
      await pipeline.#load();
      return pipeline;
    } catch (error) {
      // Not awaited: a worker that is gone would hold up the next attempt, and the others' stages are fenced by its epoch.
      pipeline.abandon();
      throw error;
    }
  }

  get stages(): number {
    return this.placement.length;
  }

  /** The stages' state when they were loaded. */
  get status(): readonly StageStatus[] {
    return this.#status;
  }

  get kvBlocks(): number {
    return Math.min(...this.#status.map((stage) => stage.stats.kvBlocksTotal));
  }

  get blockTokens(): number {
    return this.#status[0]!.stats.blockTokens;
  }

  /** Micro-batches that came back. */
  get completed(): number {
    return this.#completed;
  }

  /** Milliseconds since a micro-batch was sent or came back; 0 when none is on its way. */
  get stillMs(): number {
    return this.#pending.size === 0 ? 0 : performance.now() - this.#lastProgress;
  }

  /** The slowest of the recent micro-batches, in milliseconds. */
  get slowestMs(): number {
    return this.#slowestMs;
  }

  /** Milliseconds so far in which micro-batches were on their way. */
  get activeMs(): number {
    return this.#activeMs + (this.#pending.size === 0 ? 0 : performance.now() - this.#activeSince);
  }

  /** Micro-batches on their way. */
  get inFlight(): number {
    return this.#pending.size;
  }

  run(batch: Uint8Array): Promise<EntryResult[]> {
    return this.#send(batch, 1)[0]!;
  }

  readonly chain = (batch: Uint8Array, links: number): Promise<EntryResult[]>[] => this.#send(batch, links);

  #send(batch: Uint8Array, links: number): Promise<EntryResult[]>[] {
    const failure = this.#failure;
    if (failure !== undefined) return Array.from({ length: links }, () => Promise.reject(failure));
    const first = this.#nextStep;
    this.#lastProgress = performance.now();
    if (this.#pending.size === 0) this.#activeSince = this.#lastProgress;
    const results = Array.from({ length: links }, (_, i) => this.#expect(links - 1 - i, i > 0));
    const { bus, epoch } = this.#options;
    try {
      const subject = this.#subjects.stage(this.placement[0]!.worker, 0);
      const header = { kind: "work", epoch, step: first, chain: links - 1 } as const;
      bus.publish(subject, encodeMessage(header, batch, new Uint8Array()));
    } catch (cause) {
      this.#options.onTrouble(new ClusterError(`step ${first} could not be sent`, { cause }));
    }
    return results;
  }

  /** Expects the next step's result. */
  #expect(links: number, follows: boolean): Promise<EntryResult[]> {
    const step = this.#nextStep++;
    const { stepTimeoutMs } = this.#options;
    const { promise, resolve, reject } = Promise.withResolvers<EntryResult[]>();
    const timer = setTimeout(
      () => this.#options.onTrouble(new ClusterError(`no result of step ${step} within ${stepTimeoutMs} ms`)),
      stepTimeoutMs,
    );
    this.#pending.set(step, { resolve, reject, timer, sent: this.#lastProgress, links, follows });
    return promise;
  }

  release(seqs: readonly number[]): void {
    if (seqs.length === 0 || this.#failure !== undefined) return;
    for (const worker of this.#workers) this.#tell(worker, { type: "release", epoch: this.epoch, seqs: [...seqs] });
  }

  /** Gives up: what is on its way and what comes later is rejected with `error`. */
  fail(error: ClusterError): void {
    if (this.#failure !== undefined) return;
    this.#failure = error;
    for (const step of [...this.#pending.keys()]) this.#settle(step)?.reject(error);
  }

  /** Asks the stages how they are, first stage first. */
  async query(): Promise<StageStatus[]> {
    const replies = await Promise.all(this.#workers.map((worker) => this.#ask(worker, { type: "status" }, 5000)));
    return replies.flatMap((reply) => reply.stages).sort((a, b) => a.stage - b.stage);
  }

  /** Closes all stages. Workers that do not answer are left to themselves. */
  async close(): Promise<void> {
    this.abandon();
    await this.unload(this.#workers);
  }

  /** Gives up, and leaves the workers their shards: who comes next may want them. */
  abandon(): void {
    this.fail(new ClusterError("the pipeline was closed"));
    this.#subscription.unsubscribe();
  }

  /** Has some of the workers close their stages. Those that do not answer are left to themselves. */
  async unload(workers: readonly string[]): Promise<void> {
    const request = { type: "unload", epoch: this.epoch } as const;
    await Promise.allSettled(workers.map((worker) => this.#ask(worker, request, UNLOAD_TIMEOUT_MS)));
  }

  /** The workers that hold a stage. */
  get workers(): readonly string[] {
    return this.#workers;
  }

  async #load(): Promise<void> {
    const { placement, shards, weights, orchestrator } = this.#options;
    const results = this.#subjects.results(orchestrator);
    const stages = placement.map(({ worker }, stage) => {
      const following = placement[stage + 1];
      const next = following === undefined ? results : this.#subjects.stage(following.worker, stage + 1);
      const first = following === undefined && stage > 0
        ? { first: this.#subjects.stage(placement[0]!.worker, 0) }
        : {};
      const spec = { stage, shard: shards[stage]!, ...(weights === undefined ? {} : { weights }), next, ...first };
      return { worker, spec };
    });
    const replies = await Promise.allSettled(this.#workers.map((worker) => {
      const mine = stages.filter((stage) => stage.worker === worker).map((stage) => stage.spec);
      return this.#ask(worker, { type: "load", epoch: this.epoch, stages: mine, results }, LONGEST_MS);
    }));
    const errors = replies.filter((reply) => reply.status === "rejected").map((reply) => reply.reason);
    if (errors.length > 0) throw errors.find((error) => error instanceof LoadError) ?? errors[0];
    this.#status = replies.flatMap((reply) => reply.status === "fulfilled" ? reply.value.stages : [])
      .sort((a, b) => a.stage - b.stage);
    if (this.#status.length !== placement.length) {
      throw new ClusterError(`${this.#status.length} of ${placement.length} stages are loaded`);
    }
  }

  async #ask(worker: string, request: ControlRequest, timeoutMs: number): Promise<ControlReply & { ok: true }> {
    const { bus, signal } = this.#options;
    let reply: ControlReply;
    try {
      const options = request.type === "load" ? { timeoutMs, signal } : { timeoutMs };
      const message = await bus.request(this.#subjects.control(worker), encodeJson(request), options);
      reply = decodeJson(controlReplySchema, message.data);
    } catch (cause) {
      if (!(cause instanceof BusError)) throw cause;
      throw new LoadError(`worker ${worker} did not ${request.type}: ${cause.message}`, worker, true, { cause });
    }
    if (!reply.ok) throw new LoadError(`worker ${worker} did not ${request.type}: ${reply.error}`, worker, false);
    return reply;
  }

  /** Sends a request whose answer is of no account. */
  #tell(worker: string, request: ControlRequest): void {
    try {
      this.#options.bus.publish(this.#subjects.control(worker), encodeJson(request));
    } catch (cause) {
      if (!(cause instanceof BusError)) throw cause;
      this.#options.onTrouble(new ClusterError(`the bus failed: ${cause.message}`, { cause }));
    }
  }

  #onResult(data: Uint8Array): void {
    let message: WireMessage;
    try {
      message = decodeMessage(data);
    } catch (error) {
      if (error instanceof WireError) return; // anybody may publish here
      throw error;
    }
    if (message.kind !== "result" || message.epoch !== this.epoch) return;
    const pending = this.#pending.get(message.step);
    if (pending === undefined) return; // received twice, or too late
    try {
      if (message.error) {
        const { worker, stage, code, message: reason } = decodeFailure(message.payload);
        const error = new ClusterError(`stage ${stage} on worker ${worker} failed: ${reason}`);
        // What a kernel refuses it refuses again. That a stage lacks a message, or could not pass one on, is no fault of the requests.
        if (code === 0 || code === SEQUENCE_GAP) return this.#options.onTrouble(error);
        // Nothing follows.
        for (let i = 0; i <= pending.links; i++) this.#settle(message.step + i)?.reject(error);
        return;
      }
      if (pending.follows && this.#pending.has(message.step - 1)) { // sent before, on the same connection
        return this.#options.onTrouble(new ClusterError(`the result of step ${message.step - 1} was lost`));
      }
      const results = decodeResults(message, this.#vocab);
      this.#settle(message.step);
      this.#completed++;
      this.#lastProgress = performance.now();
      const following = pending.links === 0 ? undefined : this.#pending.get(message.step + 1);
      if (following !== undefined) following.sent = this.#lastProgress;
      this.#slowestMs = Math.max(0.95 * this.#slowestMs, this.#lastProgress - pending.sent);
      pending.resolve(results);
    } catch (error) {
      if (!(error instanceof WireError)) throw error;
      this.#options.onTrouble(new ClusterError(`a stage sent a malformed result: ${error.message}`, { cause: error }));
    }
  }

  /** Takes a step off the list. */
  #settle(step: number): PendingStep | undefined {
    const pending = this.#pending.get(step);
    if (pending === undefined) return undefined;
    clearTimeout(pending.timer);
    this.#pending.delete(step);
    if (this.#pending.size === 0) this.#activeMs += performance.now() - this.#activeSince;
    return pending;
  }
}
