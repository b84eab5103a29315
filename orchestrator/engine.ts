import { EventQueue } from "./event_queue.ts";
import type {
  Bus,
  ClusterStatus,
  ClusterStore,
  EntryResult,
  Hello,
  HolderState,
  Lease,
  SampleParameters,
  Shard,
  StageStatus,
  Subscription,
  WeightsRef,
} from "../bus/mod.ts";
import {
  BusError,
  clusterSubjects,
  encodeJson,
  ENTRY_BYTES,
  HEADER_BYTES,
  LeaseHeldError,
  NoRespondersError,
  RequestTimeoutError,
  SAMPLE_BYTES,
} from "../bus/mod.ts";
import { StopMatcher } from "../model/mod.ts";
import type { LoadedModel } from "../model/mod.ts";
import { describeLoading } from "./deployment.ts";
import type { DeploymentState, WorkerLoading } from "./deployment.ts";
import { ClusterError, ContextLengthError, EngineClosedError, LoadingError, RequestError } from "./errors.ts";
import { Fleet } from "./fleet.ts";
import type { FleetOptions } from "./fleet.ts";
import type { PlacedStage } from "./placement.ts";
import type { Replica } from "./replicas.ts";
import { checkRequest, checkTokens, MAX_LOGIT_BIASES } from "./request.ts";
import type { CheckedRequest, GenerateEvent, GenerateRequest } from "./request.ts";
import type { Job, SchedulerOptions, SchedulerStats } from "./scheduler.ts";
import { modelCost, shardOf } from "./served_model.ts";
import { probeOf } from "./speed.ts";
import type { Probe } from "./speed.ts";

/** Options of {@linkcode Engine.start}. */
export interface EngineOptions {
  bus: Bus;
  model: LoadedModel;
  /** @default {"local"} */
  cluster?: string;
  /** Exactly so many stages, in one replica. Default: as many replicas and stages as give most tokens. */
  shards?: number;
  /**
   * Requests that run at once, for which the model is placed: with 1 in one pipeline, else in replicas where these give more.
   * Default: many.
   */
  streams?: number;
  /** Workers to wait for; more may be used. @default {1} */
  workers?: number;
  /** Most tokens of a request, prompt and answer. Default: the model's context, but at most 8192. */
  context?: number;
  /** Element type of the KV cache. @default {"f16"} */
  kvType?: Shard["kv"]["type"];
  /** Bits that activations are rounded to before low-bit weights multiply them. @default {"a8"} */
  activations?: NonNullable<Shard["activations"]>;
  /** Tokens that the KV cache holds, over all requests. Default: 8192, or the context when that is longer. */
  kvTokens?: number;
  /** Most tokens of a micro-batch. @default {256} */
  maxBatch?: number;
  /** Most requests computed at the same time. @default {64} */
  maxRunning?: number;
  /** Most requests waiting besides. @default {256} */
  maxQueued?: number;
  /** Most answers whose keys and values stay cached, for requests that begin with the same tokens. @default {32} */
  maxKept?: number;
  /** Milliseconds to wait for workers. @default {10000} */
  workerTimeoutMs?: number;
  /** Wait on when the model does not fit the workers at first, or one cannot load it: others may come. @default {false} */
  patient?: boolean;
  /**
   * The model's file by its content, for workers that do not have it: somebody must give its chunks (`WeightSource`). Default: all
   * workers have it, under its path.
   */
  weights?: WeightsRef;
  /**
   * Whether workers fetch, beside their layers and with the least of haste, those that they would take over from any that is lost:
   * it costs room on their disks, and spares the transfer after a loss. @default {false}
   */
  standby?: boolean;
  /** Milliseconds that a worker may load without getting any further. @default {600000} */
  loadTimeoutMs?: number;
  /** Milliseconds that a micro-batch may take through all stages. @default {120000} */
  stepTimeoutMs?: number;
  /** Told from time to time which share of the model is loaded, 0 to 1, and how far each worker is. */
  onLoading?: (fraction: number, workers: readonly WorkerLoading[]) => void;
  /**
   * Milliseconds without a heartbeat after which a worker is lost. Default: never, as workers of the same process send none.
   */
  lostMs?: number;
  /** Milliseconds that requests wait for a lost worker to be replaced before they fail. @default {10000} */
  recoveryTimeoutMs?: number;
  /** Have the workers close their shards at the end, rather than keep them for who comes next. @default {true} */
  unload?: boolean;
  /** Told of workers lost and placements made, one line each. Default: nothing. */
  log?: (message: string) => void;
  /** What outlives the members of the cluster. Default: nothing does. */
  store?: ClusterStore | undefined;
  /** Ends the start. */
  signal?: AbortSignal;
}

/** How the engine does. */
export interface EngineStats extends SchedulerStats {
  readonly contextLength: number;
  readonly epoch: number;
  /** The stages of all replicas, with what their shards hold. */
  readonly stages: readonly (PlacedStage & { replica: number; weightBytes: number; weightBytesPerToken: number })[];
}

/** Tokens of a sequence, and of the cache, where nobody says how many. */
export const DEFAULT_CONTEXT = 8192;

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
  readonly #bus: Bus;
  readonly #orchestrator: string;
  readonly #probe: Probe;
  readonly #fleet: Fleet;
  readonly #context: number;
  readonly #service: Subscription;
  readonly #lease: Lease | undefined;
  #closing: Promise<void> | undefined;
  /** Why it serves no longer, though it was not closed. */
  #usurped: ClusterError | undefined;

  private constructor(options: EngineOptions, settings: Settings, { orchestrator, lease, former }: Accession) {
    const { bus, model, cluster = "local", store } = options;
    const { description } = model;
    this.model = model;
    this.#bus = bus;
    this.#orchestrator = orchestrator;
    this.#lease = lease;
    this.#context = settings.context;
    const kv = { type: options.kvType ?? "f16", tokens: settings.kvTokens } as const;
    const { activations = "a8" } = options;
    const shard = {
      path: model.path,
      files: model.files,
      kv,
      activations,
      maxBatch: settings.scheduler.maxBatch,
      context: settings.context,
    };
    this.#probe = probeOf(description, shard);
    this.#fleet = new Fleet({
      bus,
      cluster,
      orchestrator: this.#orchestrator,
      cost: modelCost(description, kv),
      probe: this.#probe,
      shardOf: (stage) => shardOf(description, stage, shard),
      ...(options.weights === undefined ? {} : { weights: options.weights }),
      standby: options.standby ?? false,
      ...(options.shards === undefined ? {} : { shards: options.shards }),
      ...(settings.streams === undefined ? {} : { streams: settings.streams }),
      workers: settings.workers,
      patient: options.patient ?? false,
      workerTimeoutMs: options.workerTimeoutMs ?? 10_000,
      loadTimeoutMs: options.loadTimeoutMs ?? 600_000,
      stepTimeoutMs: options.stepTimeoutMs ?? 120_000,
      ...(options.lostMs === undefined ? {} : { lostMs: options.lostMs }),
      recoveryTimeoutMs: options.recoveryTimeoutMs ?? 10_000,
      unload: options.unload ?? true,
      scheduler: settings.scheduler,
      onServing: (epoch, replicas) => this.#savePlan(store, epoch, replicas, options.log),
      ...former,
      onLoading: options.onLoading ?? (() => {}),
      log: options.log ?? (() => {}),
    });
    this.#service = bus.subscribe(
      clusterSubjects(cluster).orchestrator,
      (message) => message.respond(encodeJson(this.clusterStatus())),
    );
    void lease?.lost.then(() => {
      this.#usurped = new ClusterError(`another orchestrator has taken over cluster ${cluster}: end this one`);
      options.log?.(this.#usurped.message);
      this.#service.unsubscribe();
      void this.#fleet.close(this.#usurped);
    });
  }

  #savePlan(
    store: ClusterStore | undefined,
    epoch: number,
    serving: readonly Replica[],
    log: EngineOptions["log"],
  ): void {
    const replicas = serving.map((replica) => replica.map((stage) => ({ ...stage })));
    store?.savePlan({ epoch, model: this.model.id, replicas }).catch((error) => {
      if (!(error instanceof BusError)) throw error;
      log?.(error.message); // the next orchestrator will place anew
    });
  }

  /**
   * Waits for workers, places the model, and has them load it.
   *
   * @throws {PlacementError} when it does not fit.
   * @throws {ClusterError} when workers are missing or cannot load it, or another orchestrator serves the cluster.
   * @throws {RequestError} when an option is out of range.
   */
  static async start(options: EngineOptions): Promise<Engine> {
    const { signal } = options;
    const engine = await Engine.open(options);
    const { promise: aborted, reject } = Promise.withResolvers<never>();
    const abort = () => reject(signal?.reason);
    signal?.addEventListener("abort", abort);
    try {
      await Promise.race([engine.ready, aborted]);
      return engine;
    } catch (error) {
      await engine.close();
      throw error;
    } finally {
      signal?.removeEventListener("abort", abort);
    }
  }

  /**
   * As {@linkcode Engine.start}, but does not wait for workers: until {@linkcode Engine.ready} requests are refused with a
   * {@linkcode ClusterError} that tells how far it is.
   */
  static async open(options: EngineOptions): Promise<Engine> {
    options.signal?.throwIfAborted();
    const settings = checkOptions(options);
    const accession = await accede(options, options.cluster ?? "local");
    return new Engine(options, settings, accession);
  }

  /** Resolves when it can answer for the first time; rejects when it cannot. */
  get ready(): Promise<void> {
    return this.#fleet.ready;
  }

  /** Most tokens of a request, prompt and answer. */
  get contextLength(): number {
    const { capacity } = this.#fleet;
    return capacity === 0 ? this.#context : Math.min(this.#context, capacity);
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
      this.#fleet.cancel(job);
    });
    const abort = () => {
      finish();
      this.#fleet.cancel(job);
      events.fail(signal?.reason);
    };
    const answer = new Answer(this.model, checked, events, finish);
    const job: Job = {
      tokens: [...checked.promptTokens],
      most: checked.promptTokens.length + checked.maxTokens,
      sample: sampleParameters(checked),
      onToken: (sampled) => answer.take(sampled),
      onError: (error) => {
        finish();
        events.fail(error);
      },
    };
    this.#fleet.add(job);
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
        this.#fleet.cancel(job);
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
      this.#fleet.add(job);
      signal?.addEventListener("abort", abort);
    });
  }

  /** How it does. */
  stats(): EngineStats {
    const { stats, replicas } = this.#fleet;
    const stages = replicas.flatMap(({ pipeline }, replica) =>
      (pipeline?.placement ?? []).map((stage, i) => {
        const { weightBytes, weightBytesPerToken } = pipeline!.status[i]!.stats;
        return { replica, ...stage, weightBytes, weightBytesPerToken };
      })
    );
    const epoch = Math.max(0, ...replicas.map(({ epoch }) => epoch));
    return { ...stats, contextLength: this.contextLength, epoch, stages };
  }

  /** How the cluster does, with every replica and worker. */
  clusterStatus(): ClusterStatus {
    const { state: { state, reason }, stats: { running, waiting }, replicas, recoveries, membership, telemetry } =
      this.#fleet;
    const placed = (id: string) => {
      const holds = ({ pipeline }: typeof replicas[number]) => pipeline?.workers.includes(id) === true;
      // One that recovers may have lost it to one that serves.
      const serving = replicas.findIndex((replica) => replica.state === "serving" && holds(replica));
      const at = serving < 0 ? replicas.findIndex(holds) : serving;
      const stages = (replicas[at]?.pipeline?.placement ?? []).map((stage, number) => ({ ...stage, number }))
        .filter(({ worker }) => worker === id);
      const work = membership.get(id)?.work.stages ?? [];
      return {
        replica: at < 0 ? null : at,
        layers: stages.map(({ first, end }): [number, number] => [first, end]),
        stepMs: stages.map(({ number }) => work.find(({ stage }) => stage === number)?.stepMs ?? null),
        ...telemetry.of(id),
        loading: membership.get(id)?.loading ?? null,
      };
    };
    const unknown = { isa: "", cores: 0, memoryBytes: 0, bandwidthGBps: null, msPerLayer: null, msHead: null };
    const none = { ...unknown, seenMs: 0, queued: 0 };
    const measured = ({ speed, ...rest }: Hello["capabilities"]) => {
      const { msPerLayer, msHead } = speed?.probe === this.#probe.probe ? speed : unknown;
      return { ...rest, msPerLayer, msHead };
    };
    const placedIds = new Set(replicas.flatMap(({ pipeline }) => pipeline?.workers ?? []));
    const lost = [...placedIds].filter((id) => membership.get(id) === undefined);
    return {
      orchestrator: this.#orchestrator,
      model: this.model.id,
      state,
      reason,
      epoch: Math.max(0, ...replicas.map(({ epoch }) => epoch)),
      running,
      waiting,
      recoveries: recoveries.count,
      lastRecoveryMs: recoveries.lastMs,
      replicas: replicas.map(({ state, epoch, running, waiting }) => ({ state, epoch, running, waiting })),
      workers: [
        ...membership.workers.map(({ id, state, capabilities, work }) => ({
          id,
          state: state === "leaving" ? "lost" as const : state,
          ...measured(capabilities),
          seenMs: membership.seenMs(id),
          queued: work.queued,
          ...placed(id),
        })),
        ...lost.map((id) => ({ id, state: "lost" as const, ...none, ...placed(id) })),
        ...[...membership.refused.keys()].map((id) => ({ id, state: "refused" as const, ...none, ...placed(id) })),
      ],
    };
  }

  /** Asks the workers how their stages do, replica by replica, first stage first. */
  query(): Promise<StageStatus[]> {
    return this.#fleet.query();
  }

  /** Ends all requests with {@linkcode EngineClosedError} and has the workers close their shards, unless they shall keep them. */
  close(): Promise<void> {
    this.#closing ??= (async () => {
      this.#service.unsubscribe();
      await this.#fleet.close(new EngineClosedError());
      await this.#lease?.release();
    })();
    return this.#closing;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  /** Why it takes no requests; `undefined` while it does. During a short recovery it does: they wait. */
  get failure(): ClusterError | undefined {
    if (this.#closing !== undefined) return new EngineClosedError();
    if (this.#usurped !== undefined) return this.#usurped;
    const { state: { state, reason }, loading } = this.#fleet;
    if (state === "serving" || state === "recovering") return undefined;
    if (state !== "loading" || loading.length === 0) return new ClusterError(reason);
    const left = loading.map(({ etaMs }) => etaMs).filter((ms) => ms !== null);
    return new LoadingError(`${reason}: ${describeLoading(loading)}`, left.length === 0 ? null : Math.max(...left));
  }

  /** Whether tokens are on their way. */
  get busy(): boolean {
    return this.#fleet.inFlight > 0;
  }

  /** Where it is in its life, and how far the workers are that load. */
  get state(): { state: DeploymentState; loading: readonly WorkerLoading[] } {
    const { state: { state }, loading } = this.#fleet;
    return { state, loading };
  }

  #checkOpen(): void {
    const { failure } = this;
    if (failure !== undefined) throw failure;
  }
}

interface Settings {
  readonly context: number;
  readonly kvTokens: number;
  readonly workers: number;
  readonly streams: number | undefined;
  readonly scheduler: SchedulerOptions;
}

function checkOptions({ bus, model, ...options }: EngineOptions): Settings {
  const { hyper } = model.description;
  const context = integer("context", options.context ?? Math.min(hyper.context, DEFAULT_CONTEXT), 2, hyper.context);
  const hiddenBytes = 4 * hyper.embedding;
  // So that one token of any request always fits a message.
  const leastPayload = HEADER_BYTES + 4 + ENTRY_BYTES + 4 + SAMPLE_BYTES + 8 * MAX_LOGIT_BIASES + hiddenBytes;
  if (leastPayload > bus.maxPayload) {
    throw new RequestError(`the bus takes ${bus.maxPayload} bytes; this model needs messages of ${leastPayload}`);
  }
  return {
    context,
    kvTokens: integer("kvTokens", options.kvTokens ?? Math.max(context, DEFAULT_CONTEXT), 2),
    workers: integer("workers", options.workers ?? 1, 1),
    streams: options.streams === undefined ? undefined : integer("streams", options.streams, 1),
    scheduler: {
      maxBatch: integer("maxBatch", options.maxBatch ?? 256, 1, 1 << 16),
      maxRunning: integer("maxRunning", options.maxRunning ?? 64, 1),
      maxQueued: integer("maxQueued", options.maxQueued ?? 256, 0),
      maxKept: integer("maxKept", options.maxKept ?? 32, 0),
      maxPayload: bus.maxPayload,
      hiddenBytes,
      vocab: hyper.vocab,
    },
  };
}

/** Milliseconds in which a living orchestrator answers. */
const SECOND_MS = 1000;

/** What an orchestrator begins with. */
interface Accession {
  readonly orchestrator: string;
  readonly lease: Lease | undefined;
  /** What the one before has left. */
  readonly former: Pick<FleetOptions, "former">;
}

/**
 * Two orchestrators would take the workers from each other: the second is refused, by the lease where there is a store, else when
 * the first answers. One that was suspended for long is told apart by its silence; the epochs fence it off.
 */
async function accede(options: EngineOptions, cluster: string): Promise<Accession> {
  const { bus, model, store, signal, log = () => {} } = options;
  const orchestrator = crypto.randomUUID();
  const refused = (cause?: unknown) =>
    new ClusterError(`cluster ${cluster} is served already: choose another with --cluster, or end that one`, { cause });
  if (store !== undefined) {
    try {
      const lease = await store.acquire(orchestrator, () => asked(bus, cluster), signal);
      const [plan, members] = await Promise.all([store.plan(), store.members()]);
      const replicas = plan?.model === model.id ? plan.replicas : [];
      const former = { members, epoch: plan?.epoch ?? 0, replicas };
      return { orchestrator, lease, former: { former } };
    } catch (error) {
      if (error instanceof LeaseHeldError) throw refused(error);
      if (!(error instanceof BusError)) throw error;
      log(`${error.message}: heartbeats must do`);
    }
  }
  if (await asked(bus, cluster) === "answers") throw refused();
  return { orchestrator, lease: undefined, former: {} };
}

/** Whether an orchestrator answers in the cluster. */
async function asked(bus: Bus, cluster: string): Promise<HolderState> {
  try {
    await bus.request(clusterSubjects(cluster).orchestrator, new Uint8Array(), { timeoutMs: SECOND_MS });
    return "answers";
  } catch (error) {
    if (error instanceof NoRespondersError) return "gone";
    if (error instanceof RequestTimeoutError) return "silent";
    if (error instanceof BusError) throw new ClusterError(`the bus failed: ${error.message}`, { cause: error });
    throw error;
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
