import { EventQueue } from "./event_queue.ts";
import type { Bus, EntryResult, SampleParameters, Shard, StageStatus } from "../bus/mod.ts";
import { ENTRY_BYTES, HEADER_BYTES, SAMPLE_BYTES } from "../bus/mod.ts";
import { StopMatcher } from "../model/mod.ts";
import type { LoadedModel } from "../model/mod.ts";
import { ClusterError, ContextLengthError, EngineClosedError, RequestError } from "./errors.ts";
import { Membership } from "./membership.ts";
import { Pipeline } from "./pipeline.ts";
import { place } from "./placement.ts";
import type { PlacedStage } from "./placement.ts";
import { checkRequest, checkTokens, MAX_LOGIT_BIASES } from "./request.ts";
import type { CheckedRequest, GenerateEvent, GenerateRequest } from "./request.ts";
import { Scheduler } from "./scheduler.ts";
import type { Job, SchedulerStats } from "./scheduler.ts";
import { modelCost, shardOf } from "./served_model.ts";

/** Options of {@linkcode Engine.start}. */
export interface EngineOptions {
  bus: Bus;
  model: LoadedModel;
  /** @default {"local"} */
  cluster?: string;
  /** Exactly so many stages. Default: as many workers as make the slowest stage fastest. */
  shards?: number;
  /** Workers to wait for; more may be used. @default {1} */
  workers?: number;
  /** Most tokens of a request, prompt and answer. Default: the model's context, but at most 8192. */
  context?: number;
  /** Element type of the KV cache. @default {"f16"} */
  kvType?: Shard["kv"]["type"];
  /** Tokens that the KV cache holds, over all requests. Default: 8192, or the context when that is longer. */
  kvTokens?: number;
  /** Most tokens of a micro-batch. @default {256} */
  maxBatch?: number;
  /** Most requests computed at the same time. @default {64} */
  maxRunning?: number;
  /** Most requests waiting besides. @default {256} */
  maxQueued?: number;
  /** Milliseconds to wait for workers. @default {10000} */
  workerTimeoutMs?: number;
  /** Milliseconds that workers may take to open their shards. @default {600000} */
  loadTimeoutMs?: number;
  /** Milliseconds that a micro-batch may take through all stages. @default {120000} */
  stepTimeoutMs?: number;
  /** Told from time to time which share of the model is loaded, 0 to 1. */
  onLoading?: (fraction: number) => void;
  /** Ends the start. */
  signal?: AbortSignal;
}

/** How the engine does. */
export interface EngineStats extends SchedulerStats {
  readonly contextLength: number;
  readonly epoch: number;
  /** The stages with what their shards hold. */
  readonly stages: readonly (PlacedStage & { weightBytes: number; weightBytesPerToken: number })[];
}

const DEFAULT_CONTEXT = 8192;

/**
 * Answers requests with a model that lies on workers. It finds them on the bus, places the model, and pipelines the tokens
 * of all requests through them.
 *
 * @example
 * ```ts ignore
 * const engine = await Engine.start({ bus, model });
 * const promptTokens = model.tokenizer.encode("Once upon a time");
 * for await (const event of engine.generate({ promptTokens })) {
 *   if (event.type === "token") console.log(event.text);
 * }
 * await engine.close();
 * ```
 */
export class Engine {
  readonly model: LoadedModel;
  /** Most tokens of a request, prompt and answer. */
  readonly contextLength: number;
  readonly #bus: Bus;
  readonly #membership: Membership;
  readonly #pipeline: Pipeline;
  readonly #scheduler: Scheduler;
  #failure: ClusterError | undefined;
  #closing: Promise<void> | undefined;

  private constructor(
    parts: { bus: Bus; model: LoadedModel; membership: Membership; pipeline: Pipeline; scheduler: Scheduler },
    context: number,
  ) {
    this.model = parts.model;
    this.#bus = parts.bus;
    this.#membership = parts.membership;
    this.#pipeline = parts.pipeline;
    this.#scheduler = parts.scheduler;
    this.contextLength = Math.min(context, this.#scheduler.capacity);
  }

  /**
   * Waits for workers, places the model, and has them load it.
   *
   * @throws {PlacementError} when it does not fit.
   * @throws {ClusterError} when workers are missing or cannot load it.
   * @throws {RequestError} when an option is out of range.
   */
  static async start(options: EngineOptions): Promise<Engine> {
    const { bus, model, cluster = "local", signal } = options;
    const { description } = model;
    const { hyper } = description;
    const context = integer("context", options.context ?? Math.min(hyper.context, DEFAULT_CONTEXT), 2, hyper.context);
    const kvTokens = integer("kvTokens", options.kvTokens ?? Math.max(context, DEFAULT_CONTEXT), 2);
    const maxBatch = integer("maxBatch", options.maxBatch ?? 256, 1, 1 << 16);
    const maxRunning = integer("maxRunning", options.maxRunning ?? 64, 1);
    const maxQueued = integer("maxQueued", options.maxQueued ?? 256, 0);
    const hiddenBytes = 4 * hyper.embedding;
    // So that one token of any request always fits a message.
    const leastPayload = HEADER_BYTES + 4 + ENTRY_BYTES + 4 + SAMPLE_BYTES + 8 * MAX_LOGIT_BIASES + hiddenBytes;
    if (leastPayload > bus.maxPayload) {
      throw new RequestError(`the bus takes ${bus.maxPayload} bytes; this model needs messages of ${leastPayload}`);
    }

    let engine: Engine | undefined;
    const loaded = new Map<string, number>();
    const membership = new Membership(bus, cluster, {
      onLeave: (id) => {
        if (engine !== undefined) engine.#onLeave(id);
      },
      onLoading: (id, fraction) => {
        if (engine !== undefined || !loaded.has(id)) return;
        loaded.set(id, fraction);
        options.onLoading?.([...loaded.values()].reduce((sum, share) => sum + share, 0) / loaded.size);
      },
    });
    try {
      const workers = await membership.waitFor(integer("workers", options.workers ?? 1, 1), {
        timeoutMs: options.workerTimeoutMs ?? 10_000,
        signal,
      });
      const kv = { type: options.kvType ?? "f16", tokens: kvTokens } as const;
      const devices = workers.map(({ id, capabilities }) => ({ id, ...capabilities }));
      const placement = place(
        modelCost(description, kv),
        devices,
        options.shards === undefined ? {} : { shards: options.shards },
      );
      for (const { worker } of placement) loaded.set(worker, 0);
      const settings = { path: model.path, kv, maxBatch, context };
      const pipeline = await Pipeline.load({
        bus,
        cluster,
        orchestrator: crypto.randomUUID(),
        epoch: membership.newestEpoch + 1,
        placement,
        shards: placement.map((stage) => shardOf(description, stage, settings)),
        loadTimeoutMs: options.loadTimeoutMs ?? 600_000,
        stepTimeoutMs: options.stepTimeoutMs ?? 120_000,
        signal,
      });
      const scheduler = new Scheduler(pipeline, {
        maxBatch,
        maxRunning,
        maxQueued,
        maxPayload: bus.maxPayload,
        hiddenBytes,
        vocab: hyper.vocab,
      });
      engine = new Engine({ bus, model, membership, pipeline, scheduler }, context);
      return engine;
    } catch (error) {
      membership.close();
      throw error;
    }
  }

  /**
   * Continues a prompt. The request is queued at once; what the consumer has not taken yet is kept, so that a slow one holds
   * up nobody. Breaking out of the loop, or aborting the signal, ends it on the workers at once; the loop then ends with
   * the signal's reason.
   *
   * @throws {RequestError | ContextLengthError} when the request is malformed or its prompt too long.
   * @throws {QueueFullError} when as many requests wait as may.
   * @throws {ClusterError} (from the iterator) when a stage fails.
   */
  generate(request: GenerateRequest, options: { signal?: AbortSignal } = {}): AsyncIterableIterator<GenerateEvent> {
    const { signal } = options;
    this.#checkOpen();
    const checked = checkRequest(request, {
      vocab: this.model.description.hyper.vocab,
      contextLength: this.contextLength,
    });
    signal?.throwIfAborted();
    const finish = () => signal?.removeEventListener("abort", abort);
    const events = new EventQueue<GenerateEvent>(() => {
      finish();
      this.#scheduler.cancel(job);
    });
    const abort = () => {
      finish();
      this.#scheduler.cancel(job);
      events.fail(signal?.reason);
    };
    const answer = new Answer(this.model, checked, events, finish);
    const job: Job = {
      tokens: [...checked.promptTokens],
      sample: sampleParameters(checked),
      onToken: (sampled) => answer.take(sampled),
      onError: (error) => {
        finish();
        events.fail(error);
      },
    };
    this.#scheduler.add(job);
    signal?.addEventListener("abort", abort);
    return events;
  }

  /**
   * The logits of all tokens, `tokens.length × vocab`: those at row `i` predict token `i + 1`.
   *
   * @param options.chunk Most tokens computed together. Default: what fits a message.
   */
  logits(tokens: readonly number[], options: { chunk?: number; signal?: AbortSignal } = {}): Promise<Float32Array> {
    const { vocab } = this.model.description.hyper;
    const { signal } = options;
    return new Promise((resolve, reject) => {
      this.#checkOpen();
      signal?.throwIfAborted();
      const checked = checkTokens(tokens, vocab);
      if (checked.length > this.contextLength) throw new ContextLengthError(checked.length, this.contextLength);
      if (HEADER_BYTES + 4 + ENTRY_BYTES + 4 * vocab > this.#bus.maxPayload) {
        throw new RequestError(`logits of ${vocab} tokens do not fit a message of ${this.#bus.maxPayload} bytes`);
      }
      const all = new Float32Array(checked.length * vocab);
      const finish = () => signal?.removeEventListener("abort", abort);
      const abort = () => {
        finish();
        this.#scheduler.cancel(job);
        reject(signal?.reason);
      };
      const job: Job = {
        tokens: checked,
        ...(options.chunk === undefined ? {} : { chunk: integer("chunk", options.chunk, 1) }),
        onLogits: (pos, logits) => all.set(logits, pos * vocab),
        onDone: () => {
          finish();
          resolve(all);
        },
        onError: (error) => {
          finish();
          reject(error);
        },
      };
      this.#scheduler.add(job);
      signal?.addEventListener("abort", abort);
    });
  }

  /** How it does. */
  stats(): EngineStats {
    const { placement, status, epoch } = this.#pipeline;
    const stages = placement.map((stage, i) => {
      const { weightBytes, weightBytesPerToken } = status[i]!.stats;
      return { ...stage, weightBytes, weightBytesPerToken };
    });
    return { ...this.#scheduler.stats, contextLength: this.contextLength, epoch, stages };
  }

  /** Asks the workers how their stages do, first stage first. */
  query(): Promise<StageStatus[]> {
    return this.#pipeline.query();
  }

  /** Ends all requests with {@linkcode EngineClosedError} and has the workers close their shards. */
  close(): Promise<void> {
    this.#closing ??= (async () => {
      this.#scheduler.close(new EngineClosedError());
      this.#membership.close();
      await this.#pipeline.close();
    })();
    return this.#closing;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  /** Why it answers no more; `undefined` while it does. */
  get failure(): ClusterError | undefined {
    return this.#closing === undefined ? this.#failure : new EngineClosedError();
  }

  #checkOpen(): void {
    const { failure } = this;
    if (failure !== undefined) throw failure;
  }

  /** A worker that holds a stage leaves: what runs cannot go on. */
  #onLeave(id: string): void {
    if (this.#failure !== undefined || !this.#pipeline.placement.some((stage) => stage.worker === id)) return;
    this.#failure = new ClusterError(`worker ${id} left`);
    this.#pipeline.fail(this.#failure);
    this.#scheduler.close(this.#failure);
  }
}

/** The text and the end of an answer. */
class Answer {
  readonly #request: CheckedRequest;
  readonly #eosIds: ReadonlySet<number>;
  readonly #events: EventQueue<GenerateEvent>;
  readonly #finish: () => void;
  readonly #decoder: ReturnType<LoadedModel["tokenizer"]["stream"]>;
  readonly #stops: StopMatcher;
  #count = 0;

  constructor(model: LoadedModel, request: CheckedRequest, events: EventQueue<GenerateEvent>, finish: () => void) {
    this.#request = request;
    this.#eosIds = model.tokenizer.eosIds;
    this.#events = events;
    this.#finish = finish;
    this.#decoder = model.tokenizer.stream();
    this.#stops = new StopMatcher(request.stop);
  }

  /** Takes a token; false when it was the last. */
  take({ id, logprob, top }: NonNullable<EntryResult["sampled"]>): boolean {
    const { topLogprobs, maxTokens, ignoreEos, promptTokens } = this.#request;
    this.#count++;
    const eos = !ignoreEos && this.#eosIds.has(id);
    const last = eos || this.#count >= maxTokens;
    let { text, stop } = this.#stops.push(eos ? "" : this.#decoder.push(id));
    if (last && stop === undefined) {
      const rest = this.#stops.push(this.#decoder.flush());
      text += rest.text;
      stop = rest.stop;
      if (stop === undefined) text += this.#stops.flush();
    }
    this.#events.push({
      type: "token",
      id,
      text,
      ...(topLogprobs === undefined ? {} : { logprob, top: top.slice(0, topLogprobs) }),
    });
    if (!last && stop === undefined) return true;
    this.#events.push({
      type: "done",
      reason: eos || stop !== undefined ? "stop" : "length",
      ...(stop === undefined ? {} : { stopSequence: stop }),
      usage: { promptTokens: promptTokens.length, completionTokens: this.#count },
    });
    this.#events.end();
    this.#finish();
    return false;
  }
}

function sampleParameters({ sampling, promptTokens, topLogprobs }: CheckedRequest): SampleParameters {
  return {
    ...sampling,
    promptLength: promptTokens.length,
    ...(topLogprobs === undefined ? {} : { topLogprobs }),
  };
}

function integer(field: string, value: number, min: number, max = Number.MAX_SAFE_INTEGER): number {
  if (!Number.isInteger(value) || value < min || value > max) {
    const range = max === Number.MAX_SAFE_INTEGER ? `at least ${min}` : `${min} to ${max}`;
    throw new RequestError(`${field} is ${value}; it must be an integer, ${range}`);
  }
  return value;
}
