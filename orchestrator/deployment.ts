import { BusError, clusterSubjects, controlReplySchema, decodeJson, encodeJson } from "../bus/mod.ts";
import type { Bus, Hello, Loading, Shard, Stage, Subscription, WeightsRef } from "../bus/mod.ts";
import { BusAwayError, ClusterError, LoadError } from "./errors.ts";
import { hangs } from "./membership.ts";
import type { Membership } from "./membership.ts";
import { LONGEST_MS } from "./longest.ts";
import { Pipeline } from "./pipeline.ts";
import type { PlacedStage } from "./placement.ts";
import type { Replica } from "./replicas.ts";

/** Where a deployment is in its life; see {@linkcode clusterStatusSchema}. */
export type DeploymentState = "waiting" | "loading" | "serving" | "recovering" | "unavailable" | "closed";

/** Which devices a {@linkcode Deployment} may have, among others. */
export interface DeviceShare {
  /**
   * Takes devices, instead of those it had, and says how the model lies on them.
   *
   * @param anew Not as before, though that could be.
   * @throws {PlacementError} when it does not fit those that nobody else has.
   */
  claim(anew: boolean): Replica;
  /** Gives them up. */
  release(): void;
  /** How the model would lie, once or several times, on its devices and those that nobody has, if that were worth a change. */
  better(): readonly Replica[] | undefined;
  /** How it would lie without a worker that it has; `undefined` when it could not. */
  without(worker: string): Replica | undefined;
  /** Whether other deployments serve, so that nothing need wait for this one. */
  spare(): boolean;
  /** Leaves a worker that did not load out for a while. */
  suspect(error: LoadError): void;
  /** An epoch that no worker has seen yet. */
  nextEpoch(): number;
}

/** Options of {@linkcode Deployment}. */
export interface DeploymentOptions {
  bus: Bus;
  cluster: string;
  /** Whom the results are for: a name as in subjects, no other deployment's. */
  orchestrator: string;
  membership: Membership;
  devices: DeviceShare;
  /** Resolves when devices are there to begin with. Default: they are. */
  gather?: (signal: AbortSignal) => Promise<void>;
  shardOf: (stage: PlacedStage) => Shard;
  /** The model's file, for workers that lack it. Default: all have it. */
  weights?: WeightsRef;
  /** Whether workers fetch the layers that they would take over from any that is lost. */
  standby: boolean;
  /** Whether to wait on when the model does not fit at first, or a worker cannot load it: others may come. */
  patient: boolean;
  /** Milliseconds that a worker may load without getting any further. */
  loadTimeoutMs: number;
  stepTimeoutMs: number;
  /** Whether workers send heartbeats. */
  heartbeats: boolean;
  /** Milliseconds that requests wait for a lost worker to be replaced before they fail. */
  recoveryTimeoutMs: number;
  /** Close the stages at the end. */
  unload: boolean;
  /** Whether nothing runs, so that a new placement disturbs nobody. */
  idle: () => boolean;
  /** Told when the pipeline cannot go on; the next one comes with `onUp`, or none with `onEnd`. */
  onDown: (reason: ClusterError) => void;
  onUp: (pipeline: Pipeline) => void;
  /** Told that no pipeline can be had with the workers that are there. */
  onUnavailable: (reason: ClusterError) => void;
  /** Told that it has ended, as others serve and there are no devices for this one. */
  onEnd: () => void;
  /** Told how far its workers are that load. */
  onLoading: () => void;
  /** Told of what happens, one line each. */
  log: (message: string) => void;
}

/** How far a worker is with its stages. */
export interface WorkerLoading extends Loading {
  readonly worker: string;
}

/** How far workers are; `begun`: this one has told. */
type LoadingWorkers = Map<string, { loading: Loading | undefined; begun: boolean; since: number }>;

/** A message is lost when for so long, and longer than the slowest of the recent steps took, no worker has done anything … */
const LOST_MS = 800;
/** … before the first result, when it is not known how long messages take, for so long. */
const LOST_FIRST_MS = 3000;
/** A better placement waits for a moment without requests for so long at most. */
const REPLAN_MS = 30_000;
/** Losses in a row without a micro-batch done between them, after which requests are given up. */
const MOST_FRUITLESS = 4;
const TICK_MS = 250;

/**
 * Keeps a model served by the devices that it may have: it has it loaded, watches over the workers and the messages, and begins a new
 * epoch with a new placement when something is lost. What it cannot see is what runs: that is brought over by its owner, from
 * token ids. It ends when it can have no devices and others serve.
 */
export class Deployment {
  readonly #options: DeploymentOptions;
  readonly #watching: Subscription;
  readonly #stop = new AbortController();
  readonly #running: Promise<void>;
  readonly #ready = Promise.withResolvers<void>();
  /** What the kernel library had worked on each worker when it was found to do nothing more, and since when. */
  readonly #idle = new Map<string, { busyMs: number; since: number }>();
  #pipeline: Pipeline | undefined;
  /** The sessions of the pipeline's workers when it was loaded. */
  #sessions = new Map<string, string>();
  #state: DeploymentState = "waiting";
  #reason = "no workers yet";
  /** Ends the pipeline's watch. */
  #trouble: ((error: ClusterError) => void) | undefined;
  #fruitless = 0;
  #recoveries = 0;
  #lastRecoveryMs: number | null = null;
  #replanSince: number | undefined;
  /** Whether the next placement is to be another one. */
  #anew = false;
  /** While a placement is loaded, or its weights are fetched ahead: how far each worker is, and since when no further. */
  #loading: LoadingWorkers | undefined;
  /** While the weights of another placement are fetched: its workers, whether it is for a loss only, and what ends it. */
  #fetching: { workers: readonly string[]; standby: boolean; stop: AbortController; done: Promise<void> } | undefined;
  /** The placements whose weights were fetched ahead. */
  readonly #have = new Set<string>();

  constructor(options: DeploymentOptions) {
    this.#options = options;
    this.#watching = options.bus.watch((state) => {
      if (state === "connected") this.#trouble?.(new BusAwayError());
    });
    this.#ready.promise.catch(() => {});
    // Its owner knows it before it asks for anything.
    this.#running = Promise.resolve().then(() => this.#run());
  }

  /** Resolves when it serves for the first time; rejects when it cannot. */
  get ready(): Promise<void> {
    return this.#ready.promise;
  }

  get state(): DeploymentState {
    return this.#state;
  }

  /** Why it does not serve; empty while it does. */
  get reason(): string {
    return this.#reason;
  }

  get pipeline(): Pipeline | undefined {
    return this.#pipeline;
  }

  /** New placements after a loss, and milliseconds that the last took. */
  get recoveries(): { count: number; lastMs: number | null } {
    return { count: this.#recoveries, lastMs: this.#lastRecoveryMs };
  }

  /** Which share of its layers the workers that load have loaded, 0 to 1. */
  get loadedShare(): number {
    const shares = [...this.#loading ?? []].map(([, { loading, begun }]) => loading?.share ?? (begun ? 1 : 0));
    return shares.length === 0 ? 1 : shares.reduce((sum, share) => sum + share, 0) / shares.length;
  }

  /** How far the workers are that load. */
  get loading(): readonly WorkerLoading[] {
    return [...this.#loading ?? []].flatMap(([worker, { loading }]) =>
      loading === undefined ? [] : { worker, ...loading }
    );
  }

  /** Ends it. The workers keep their shards unless they are to be unloaded. */
  async close(): Promise<void> {
    if (this.#state === "closed") return await this.#running;
    this.#state = "closed";
    this.#reason = "closed";
    this.#stop.abort(new ClusterError("the deployment was closed"));
    this.#trouble?.(new ClusterError("the deployment was closed"));
    await this.#running;
    await this.#fetching?.done;
    this.#watching.unsubscribe();
    if (this.#pipeline === undefined) return;
    if (this.#options.unload) await this.#pipeline.close();
    else this.#pipeline.abandon();
  }

  #set(state: DeploymentState, reason: string): void {
    if (this.#state === "closed") return;
    this.#state = state;
    this.#reason = reason;
  }

  async #run(): Promise<void> {
    const { signal } = this.#stop;
    let since: number | undefined;
    while (!signal.aborted) {
      let pipeline: Pipeline | undefined;
      try {
        pipeline = await this.#deploy(since);
      } catch (error) {
        this.#set("unavailable", error instanceof Error ? error.message : String(error));
        this.#ready.reject(error);
        return;
      }
      const former = this.#pipeline;
      this.#pipeline = pipeline;
      if (former !== undefined) this.#letGo(former, pipeline);
      if (pipeline === undefined) return this.#end(since);
      if (since !== undefined) {
        this.#lastRecoveryMs = performance.now() - since;
        this.#recoveries++;
        this.#options.log(`goes on after ${Math.round(this.#lastRecoveryMs)} ms: ${describe(pipeline.placement)}`);
      } else this.#options.log(`serves: ${describe(pipeline.placement)}`);
      this.#set("serving", "");
      const watch = this.#watch(pipeline);
      this.#options.onUp(pipeline);
      this.#ready.resolve();
      const reason = await watch;
      if (signal.aborted) return;
      since = performance.now();
      this.#options.log(`${reason.message}: placing anew`);
      this.#set("recovering", reason.message);
      this.#fruitless = pipeline.completed > 0 ? 0 : this.#fruitless + 1;
      this.#options.onDown(reason);
      pipeline.abandon();
      if (this.#fruitless >= MOST_FRUITLESS) {
        this.#fruitless = 0;
        this.#options.onUnavailable(reason);
      }
    }
  }

  /** Has workers that are not used any more close the stages of the pipeline before; the epoch fences those that others use. */
  #letGo(former: Pipeline, present: Pipeline | undefined): void {
    const { membership } = this.#options;
    const unused = former.workers.filter((id) =>
      present?.workers.includes(id) !== true && membership.get(id) !== undefined
    );
    void former.unload(unused);
  }

  /** Ends for want of devices. */
  #end(since: number | undefined): void {
    if (this.#state === "closed") return;
    if (since !== undefined) {
      this.#lastRecoveryMs = performance.now() - since;
      this.#recoveries++;
      this.#options.log(`goes on after ${Math.round(this.#lastRecoveryMs)} ms with one replica less`);
    }
    this.#state = "closed";
    this.#watching.unsubscribe();
    this.#options.onEnd();
  }

  /** Resolves with a pipeline over the workers that it may have, as soon as there is one; with none when others serve. */
  async #deploy(since: number | undefined): Promise<Pipeline | undefined> {
    const options = this.#options;
    const { membership, devices, gather } = options;
    const { signal } = this.#stop;
    if (since === undefined && gather !== undefined) {
      this.#set("waiting", "waiting for workers");
      await gather(signal);
    }
    for (let told = false;;) {
      signal.throwIfAborted();
      let failure: ClusterError;
      try {
        return await this.#load(since);
      } catch (error) {
        signal.throwIfAborted();
        if (error instanceof BusError) failure = new ClusterError(`the bus failed: ${error.message}`, { cause: error });
        else if (error instanceof ClusterError) failure = error;
        else throw error;
      }
      devices.release();
      if (failure instanceof LoadError) devices.suspect(failure);
      if (devices.spare()) {
        if (since === undefined) options.log(`no further replica: ${failure.message}`);
        return undefined;
      }
      // At the start a refusal is the user's to know; later the others may do, or the refused one at another time.
      const silent = failure instanceof LoadError && failure.silent;
      if (since === undefined && !options.patient && !silent) throw failure;
      if (since === undefined && failure.message !== this.#reason) {
        this.#set("waiting", failure.message);
        options.log(failure.message);
      }
      if (failure instanceof LoadError) options.log(failure.message);
      if (since !== undefined && !told && performance.now() - since > options.recoveryTimeoutMs) {
        told = true;
        this.#set("unavailable", failure.message);
        options.log(`unavailable: ${failure.message}`);
        options.onUnavailable(failure);
      }
      membership.discover();
      await membership.change(100, signal);
    }
  }

  async #load(since: number | undefined): Promise<Pipeline> {
    const { bus, cluster, orchestrator, membership, devices, shardOf, weights, stepTimeoutMs } = this.#options;
    const placement = devices.claim(this.#anew);
    this.#anew = false;
    if (this.#state === "waiting" || this.#state === "unavailable") {
      this.#set("loading", "workers are loading the model");
    }
    const before = new Map(placement.map(({ worker }) => [worker, membership.get(worker)?.session ?? ""]));
    // A worker that is lost while it loads is not waited for.
    const gone = new AbortController();
    this.#sessions = before;
    const overdue = this.#follow(placement, since, (error) => gone.abort(error));
    this.#trouble = (error) => gone.abort(error);
    let pipeline: Pipeline;
    try {
      pipeline = await Pipeline.load({
        bus,
        cluster,
        orchestrator,
        epoch: devices.nextEpoch(),
        placement,
        shards: placement.map(shardOf),
        ...(weights === undefined ? {} : { weights }),
        stepTimeoutMs,
        signal: AbortSignal.any([this.#stop.signal, gone.signal]),
        onTrouble: (error) => this.#trouble?.(error),
      });
    } catch (error) {
      this.#sessions = new Map();
      throw error;
    } finally {
      this.#trouble = undefined;
      clearInterval(overdue);
      this.#loading = undefined;
    }
    return pipeline;
  }

  /**
   * Watches over workers that load: who gets no further is given up, and requests that wait for a placement after a loss
   * are told when it takes too long.
   */
  #follow(
    placement: readonly PlacedStage[],
    since: number | undefined,
    giveUp: (error: ClusterError) => void,
  ): ReturnType<typeof setInterval> {
    const { loadTimeoutMs, recoveryTimeoutMs, onUnavailable, log } = this.#options;
    const begun = performance.now();
    const loading: LoadingWorkers = this.#loading = new Map(
      placement.map(({ worker }) => [worker, { loading: undefined, begun: false, since: begun }]),
    );
    let told = this.#state !== "recovering";
    return setInterval(() => {
      const now = performance.now();
      // Those that are done say nothing: only a worker that tells how far it is can be seen to stand still.
      const started = [...loading].filter(([, state]) => state.loading !== undefined);
      const still = (started.length === 0 ? [...loading] : started).filter(([, { since }]) =>
        now - since > loadTimeoutMs
      );
      if (still.length > 0) {
        const [worker] = still[0]!;
        giveUp(new LoadError(`worker ${worker} did not load: it gets no further`, worker, false));
      }
      if (told || since === undefined || now - since < recoveryTimeoutMs) return;
      told = true;
      this.#set("loading", "workers are loading the layers of one that was lost");
      log(`requests are not held any longer: ${this.#reason}`);
      onUnavailable(new ClusterError(this.#reason));
    }, TICK_MS);
  }

  /** Resolves with the reason when the pipeline cannot, or shall not, go on. */
  async #watch(pipeline: Pipeline): Promise<ClusterError> {
    const { promise, resolve } = Promise.withResolvers<ClusterError>();
    this.#trouble = resolve;
    this.#replanSince = undefined;
    this.#idle.clear();
    const { heartbeats, standby, membership } = this.#options;
    const timer = heartbeats
      ? setInterval(() => {
        const reason = this.#still(pipeline) ?? this.#replan();
        if (reason !== undefined) resolve(reason);
        else if (standby) this.#standBy(pipeline);
      }, TICK_MS)
      : undefined;
    // Somebody may have gone, or begun anew, in the moment before.
    for (const [id, session] of this.#sessions) {
      if (membership.get(id)?.session !== session) resolve(new ClusterError(`worker ${id} is gone`));
    }
    const reason = await promise;
    clearInterval(timer);
    this.#fetching?.stop.abort(reason);
    this.#trouble = undefined;
    this.#sessions = new Map();
    return reason;
  }

  /** Whether a message was lost: nothing comes, and all workers tell again and again that they do nothing. */
  #still(pipeline: Pipeline): ClusterError | undefined {
    const still = pipeline.stillMs;
    const patience = pipeline.completed > 0
      ? Math.max(LOST_MS, pipeline.slowestMs)
      : LOST_FIRST_MS * 2 ** this.#fruitless;
    if (this.#options.bus.state === "disconnected" || still < patience) return undefined;
    const idle = pipeline.workers.every((id) => {
      const { since = Infinity } = this.#idle.get(id) ?? {};
      return performance.now() - this.#options.membership.seenMs(id) - since >= patience;
    });
    return idle ? new ClusterError(`a message was lost ${Math.round(still)} ms ago`) : undefined;
  }

  /** Takes the leave of a worker, its own or another's. */
  onLeave(id: string, reason: string): void {
    if (this.#fetching?.workers.includes(id) === true) this.#fetching.stop.abort(new ClusterError(reason));
    if (this.#sessions.has(id)) this.#trouble?.(new ClusterError(reason));
  }

  /** Takes the announcement of a worker, its own or another's. */
  onHello(hello: Hello): void {
    const { id, state, epoch, work, loading } = hello;
    const before = this.#loading?.get(id);
    if (before !== undefined && (loading !== undefined || before.loading !== undefined)) {
      const further = loading?.phase !== before.loading?.phase || loading?.share !== before.loading?.share;
      this.#loading!.set(id, { loading, begun: true, since: further ? performance.now() : before.since });
      this.#options.onLoading();
    }
    const pipeline = this.#pipeline;
    if (this.#state !== "serving" || pipeline === undefined || !this.#sessions.has(id)) return;
    if (epoch > pipeline.epoch) {
      this.#trouble?.(new ClusterError(`worker ${id} follows another orchestrator`));
      return;
    }
    const busyMs = work.stages.reduce((sum, stage) => sum + stage.busyMs, 0);
    const idle = work.queued === 0 && work.runningMs === null && this.#idle.get(id)?.busyMs === busyMs;
    if (!idle) this.#idle.set(id, { busyMs, since: performance.now() });
    if (hangs(hello)) {
      this.#trouble?.(new ClusterError(`worker ${id} hangs in a micro-batch for ${Math.round(work.runningMs!)} ms`));
    } else if (state === "draining") {
      const { devices } = this.#options;
      const left = devices.without(id);
      if (left === undefined ? !devices.spare() : !this.#ahead([left])) return; // it is needed still
      this.#trouble?.(new ClusterError(`worker ${id} wants to leave`));
    }
  }

  /** Whether workers that nobody has make it worth a new placement, at a moment that disturbs nobody. */
  #replan(): ClusterError | undefined {
    const { devices, idle } = this.#options;
    const better = devices.better();
    if (better === undefined || !this.#ahead(better)) return undefined;
    this.#replanSince ??= performance.now();
    if (!idle() && performance.now() - this.#replanSince < REPLAN_MS) return undefined;
    this.#anew = true;
    return new ClusterError("more workers make it faster");
  }

  /** Has the weights fetched for every placement that the loss of one worker would lead to, one after the other. */
  #standBy(pipeline: Pipeline): void {
    for (const lost of pipeline.workers) {
      const left = this.#options.devices.without(lost);
      if (left !== undefined && !this.#ahead([left], true)) return;
    }
  }

  /**
   * Whether workers have the weights of placements; else they fetch them, while the present one goes on.
   *
   * @param standby It is for a loss only: whatever else is to be fetched goes first, and when it cannot be had, so be it.
   */
  #ahead(replicas: readonly Replica[], standby = false): boolean {
    const { bus, cluster, devices, shardOf, weights, log } = this.#options;
    const placement = replicas.flat();
    const wanted = JSON.stringify(placement.map(({ worker, first, end }) => [worker, first, end]));
    if (weights === undefined || this.#have.has(wanted)) return true;
    if (this.#fetching !== undefined) {
      if (this.#fetching.standby && !standby) this.#fetching.stop.abort(new ClusterError("other weights go first"));
      return false;
    }
    const subjects = clusterSubjects(cluster);
    const stages = placement.map((stage, number): { worker: string; spec: Stage } => ({
      worker: stage.worker,
      spec: { stage: number, shard: shardOf(stage), weights, next: "" },
    }));
    const workers = [...new Set(placement.map(({ worker }) => worker))];
    log(`weights are fetched for ${describe(placement)}${standby ? ", should a worker be lost" : ""}`);
    const begun = performance.now();
    const loading: LoadingWorkers = new Map(
      workers.map((worker) => [worker, { loading: undefined, begun: false, since: begun }]),
    );
    this.#loading = loading;
    const stop = new AbortController();
    const ask = async (worker: string) => {
      const mine = stages.filter((stage) => stage.worker === worker).map(({ spec }) => spec);
      const message = await bus.request(subjects.control(worker), encodeJson({ type: "fetch", stages: mine }), {
        timeoutMs: LONGEST_MS,
        signal: stop.signal,
      });
      const reply = decodeJson(controlReplySchema, message.data);
      if (!reply.ok) throw new LoadError(`worker ${worker} did not fetch weights: ${reply.error}`, worker, false);
    };
    const done = Promise.all(workers.map(ask)).then(() => {
      this.#have.add(wanted);
    }, (error) => {
      if (stop.signal.aborted) return;
      stop.abort(error);
      log(error instanceof Error ? error.message : String(error));
      if (standby) this.#have.add(wanted);
      else if (error instanceof LoadError) devices.suspect(error);
    }).finally(() => {
      this.#fetching = undefined;
      if (this.#loading === loading) this.#loading = undefined;
    });
    this.#fetching = { workers, standby, stop, done };
    return false;
  }
}

/** How far workers are, in one line. */
export function describeLoading(workers: readonly WorkerLoading[]): string {
  return workers.map(({ worker, phase, share, bytes, etaMs }) => {
    const of = phase === "fetching" ? ` of ${(bytes / 1e6).toFixed(0)} MB` : "";
    const left = etaMs === null ? "" : `, ${Math.ceil(etaMs / 1000)} s left`;
    return `${worker} ${phase} ${Math.floor(100 * share)} %${of}${left}`;
  }).join("; ");
}

/** A placement in one line. */
function describe(placement: readonly PlacedStage[]): string {
  return placement.map(({ worker, first, end }) => `${worker} layers ${first}–${end - 1}`).join(", ");
}
