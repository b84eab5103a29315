import { BusError, clusterSubjects, controlReplySchema, decodeJson, encodeJson } from "../bus/mod.ts";
import type { Bus, Hello, Loading, Shard, Stage, Subscription, WeightsRef } from "../bus/mod.ts";
import { ClusterError, LoadError, PlacementError } from "./errors.ts";
import { Membership } from "./membership.ts";
import { LONGEST_MS } from "./longest.ts";
import { Pipeline } from "./pipeline.ts";
import { Telemetry } from "./telemetry.ts";
import { place, slowestStage, stageCosts } from "./placement.ts";
import type { Device, ModelCost, PlacedStage } from "./placement.ts";
import { askToMeasure, deviceOf } from "./speed.ts";
import type { Probe } from "./speed.ts";

/** Where a deployment is in its life; see {@linkcode clusterStatusSchema}. */
export type DeploymentState = "waiting" | "loading" | "serving" | "recovering" | "unavailable" | "closed";

/** Options of {@linkcode Deployment}. */
export interface DeploymentOptions {
  bus: Bus;
  cluster: string;
  /** Id of this orchestrator. */
  orchestrator: string;
  cost: ModelCost;
  /** What workers that send heartbeats measure their speed with. */
  probe: Probe;
  shardOf: (stage: PlacedStage) => Shard;
  /** The model's file, for workers that lack it. Default: all have it. */
  weights?: WeightsRef;
  /** Whether workers fetch the layers that they would take over from any that is lost. */
  standby: boolean;
  /** Exactly so many stages. */
  shards?: number;
  /** What the orchestrator before has left: who belonged to the cluster, and where the model lay in which epoch. */
  former?: { members: readonly string[]; epoch: number; placement?: readonly PlacedStage[] };
  /** Workers to wait for at first. */
  workers: number;
  /** Whether to wait on when the model does not fit at first, or a worker cannot load it: others may come. */
  patient: boolean;
  workerTimeoutMs: number;
  /** Milliseconds that a worker may load without getting any further. */
  loadTimeoutMs: number;
  stepTimeoutMs: number;
  /** Silence after which a worker is lost; absent: never. */
  lostMs?: number;
  /** Milliseconds that requests wait for a lost worker to be replaced before they fail. */
  recoveryTimeoutMs: number;
  /** Close the stages at the end. */
  unload: boolean;
  /** Whether nothing runs, so that a new placement disturbs nobody. */
  idle: () => boolean;
  /** Told when the pipeline cannot go on; the next one comes with `onUp`. */
  onDown: (reason: ClusterError) => void;
  onUp: (pipeline: Pipeline) => void;
  /** Told that no pipeline can be had with the workers that are there. */
  onUnavailable: (reason: ClusterError) => void;
  /** Told which share of the model is loaded, 0 to 1, and how far each worker is. */
  onLoading: (fraction: number, workers: readonly WorkerLoading[]) => void;
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
/** A kernel hangs when a micro-batch takes so long at the least, and so many times as long as it should by those before. */
const HUNG_MS = 1500;
const HUNG_TIMES = 8;
/** … or so long, when none was before: weights may have to be read first. */
const HUNG_FIRST_MS = 200_000;
/** A worker that did not load is left out for so long. */
const SUSPECT_MS = 5000;
/** A placement must be so much faster to be worth a change, and waits for a moment without requests for so long at most. */
const WORTH = 0.9;
const REPLAN_MS = 30_000;
/** Losses in a row without a micro-batch done between them, after which requests are given up. */
const MOST_FRUITLESS = 4;
const TICK_MS = 250;
const MOST_PLACEMENTS = 32;
/** Milliseconds that those are waited for who belonged to the cluster before. */
const FORMER_MS = 2500;
/** The time to a worker counts as another one when it has changed by this factor: placements shall not follow every ping. */
const HOP_CHANGE = 2;
/** Milliseconds between two pings of every worker, where workers send heartbeats. */
const PING_MS = 1000;

/**
 * Keeps a model served by whatever workers are there: it places the model, has it loaded, watches over the workers and the messages,
 * and begins a new epoch with a new placement when something is lost. What it cannot see is what runs: that is brought
 * over by its owner, from token ids.
 */
export class Deployment {
  readonly membership: Membership;
  readonly telemetry: Telemetry;
  readonly #options: DeploymentOptions;
  readonly #watching: Subscription;
  readonly #stop = new AbortController();
  readonly #running: Promise<void>;
  readonly #ready = Promise.withResolvers<void>();
  readonly #suspects = new Map<string, number>();
  /** The session in which a worker was asked to measure its speed, and those that do. */
  readonly #asked = new Map<string, string>();
  readonly #measuring = new Map<string, Promise<void>>();
  /** Milliseconds to workers and back, as far as placement goes. */
  readonly #hops = new Map<string, number>();
  /** What the kernel library had worked on each worker when it was found to do nothing more, and since when. */
  readonly #idle = new Map<string, { busyMs: number; since: number }>();
  #pipeline: Pipeline | undefined;
  /** The sessions of the pipeline's workers when it was loaded. */
  #sessions = new Map<string, string>();
  #state: DeploymentState = "waiting";
  #reason = "no workers yet";
  #epoch = 0;
  /** How {@linkcode place} lays the model on workers, or why it does not. */
  readonly #placements = new Map<string, readonly PlacedStage[] | PlacementError>();
  /** Ends the pipeline's watch. */
  #trouble: ((error: ClusterError) => void) | undefined;
  #fruitless = 0;
  #recoveries = 0;
  #lastRecoveryMs: number | null = null;
  #replanSince: number | undefined;
  /** While a placement is loaded, or its weights are fetched ahead: how far each worker is, and since when no further. */
  #loading: LoadingWorkers | undefined;
  /** While the weights of another placement are fetched: its workers, whether it is for a loss only, and what ends it. */
  #fetching: { workers: readonly string[]; standby: boolean; stop: AbortController; done: Promise<void> } | undefined;
  /** The placements whose weights were fetched ahead. */
  readonly #have = new Set<string>();

  constructor(options: DeploymentOptions) {
    this.#options = options;
    this.#epoch = options.former?.epoch ?? 0;
    const { lostMs } = options;
    this.membership = new Membership(options.bus, options.cluster, {
      ...(lostMs === undefined ? {} : { lostMs }),
      onLeave: (id, reason) => {
        this.telemetry.forget(id);
        if (this.#fetching?.workers.includes(id) === true) this.#fetching.stop.abort(new ClusterError(reason));
        if (this.#sessions.has(id)) this.#trouble?.(new ClusterError(reason));
      },
      onHello: (hello) => this.#onHello(hello),
      onRefuse: (_, reason) => options.log(`refused: ${reason}`),
    });
    this.telemetry = new Telemetry(options.bus, options.cluster, lostMs === undefined ? 0 : PING_MS);
    this.#watching = options.bus.watch((state) => {
      if (state === "connected") this.#trouble?.(new ClusterError("the bus was away: messages may be lost"));
    });
    this.#ready.promise.catch(() => {});
    this.#running = this.#run();
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
    this.telemetry.close();
    this.membership.close();
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
      let pipeline: Pipeline;
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

  /** Has workers that are not used any more close the stages of the pipeline before. */
  #letGo(former: Pipeline, present: Pipeline): void {
    const unused = former.workers.filter((id) =>
      !present.workers.includes(id) && this.membership.get(id) !== undefined
    );
    void former.unload(unused);
  }

  /** Resolves with a pipeline over the workers that are there, as soon as there is one. */
  async #deploy(since: number | undefined): Promise<Pipeline> {
    const options = this.#options;
    const { membership } = this;
    const { signal } = this.#stop;
    if (since === undefined) {
      await this.#waitForWorkers();
      await this.#waitForFormer();
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
      // At the start a refusal is the user's to know; later the others may do, or the refused one at another time.
      const silent = failure instanceof LoadError && failure.silent;
      if (since === undefined && !options.patient && !silent) throw failure;
      if (since === undefined && failure.message !== this.#reason) {
        this.#set("waiting", failure.message);
        options.log(failure.message);
      }
      if (failure instanceof LoadError) {
        this.#suspects.set(failure.worker, performance.now() + (failure.silent ? 500 : SUSPECT_MS));
        options.log(failure.message);
      }
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

  async #waitForWorkers(): Promise<void> {
    const { workers, workerTimeoutMs, bus } = this.#options;
    const { signal } = this.#stop;
    this.#set("waiting", "waiting for workers");
    const deadline = performance.now() + workerTimeoutMs;
    for (;;) {
      const left = deadline - performance.now();
      if (left <= 0) throw new ClusterError(this.membership.missing(workers, workerTimeoutMs));
      try {
        await this.membership.waitFor(workers, { timeoutMs: left, signal });
        return;
      } catch (error) {
        if (!(error instanceof BusError) || signal.aborted) {
          if (left <= workerTimeoutMs && error instanceof ClusterError) {
            throw new ClusterError(this.membership.missing(workers, workerTimeoutMs));
          }
          throw error;
        }
        if (bus.state === "disconnected") await this.membership.change(100, signal);
      }
    }
  }

  /** Waits a moment for all that are known to belong to the cluster, rather than place the model on who answers first. */
  async #waitForFormer(): Promise<void> {
    const { members = [], placement = [] } = this.#options.former ?? {};
    const deadline = performance.now() + FORMER_MS;
    for (const id of [...members, ...placement.map(({ worker }) => worker)]) {
      while (this.membership.get(id) === undefined && performance.now() < deadline) {
        await this.membership.change(deadline - performance.now(), this.#stop.signal);
      }
    }
  }

  /** The placement of the orchestrator before, if it can be had again: its workers hold their layers still. */
  #formerPlacement(devices: readonly Hello[]): PlacedStage[] | undefined {
    const { cost, shards, former } = this.#options;
    const placement = former?.placement;
    if (placement === undefined || (shards !== undefined && placement.length !== shards)) return undefined;
    const whole = placement.every(({ first, end }, i) => first === (placement[i - 1]?.end ?? 0) && end > first) &&
      placement.at(-1)?.end === cost.layers.length;
    const there = devices.map((hello) => this.#device(hello));
    if (!whole || !placement.every(({ worker }) => there.some(({ id }) => id === worker))) return undefined;
    const held = new Map<string, number>();
    stageCosts(cost, there, placement).forEach(({ memoryBytes }, i) => {
      const { worker } = placement[i]!;
      held.set(worker, (held.get(worker) ?? 0) + memoryBytes);
    });
    return there.every(({ id, memoryBytes }) => (held.get(id) ?? 0) <= memoryBytes) ? [...placement] : undefined;
  }

  /** Workers that may hold stages; those that want to leave only when it cannot be done without. */
  #candidates(): { devices: readonly Hello[]; all: readonly Hello[] } {
    const now = performance.now();
    const all = this.membership.workers.filter((hello) => (this.#suspects.get(hello.id) ?? 0) <= now && !hangs(hello))
      // The same order after every restart, so that the same workers get the same layers, which they may hold already.
      .sort((a, b) => a.id < b.id ? -1 : 1);
    return { all, devices: all.filter((worker) => worker.state === "ready") };
  }

  #device(hello: Hello): Device {
    const { id } = hello;
    const ms = this.telemetry.shortest(id);
    const known = this.#hops.get(id);
    if (ms !== null && !(known !== undefined && ms <= HOP_CHANGE * known && known <= HOP_CHANGE * ms)) {
      this.#hops.set(id, ms);
    }
    return deviceOf(hello, this.#options.probe, this.#hops.get(id) ?? null);
  }

  /** Has workers measure their speed, each once. One that does not counts by its bandwidth. */
  async #measure(workers: readonly Hello[]): Promise<void> {
    const { bus, cluster, probe, lostMs, log } = this.#options;
    if (lostMs === undefined) return;
    const { signal } = this.#stop;
    const ask = async (id: string) => {
      try {
        const trouble = await askToMeasure(bus, cluster, id, probe, signal);
        if (trouble !== undefined) log(`worker ${id} counts by its memory bandwidth: ${trouble}`);
      } catch (error) {
        if (!signal.aborted) throw error;
      } finally {
        this.#measuring.delete(id);
      }
    };
    for (const { id, session, capabilities } of workers) {
      if (capabilities.speed?.probe === probe.probe || this.#asked.get(id) === session) continue;
      this.#asked.set(id, session);
      this.#measuring.set(id, ask(id));
    }
    await Promise.all(workers.map(({ id }) => this.#measuring.get(id)));
  }

  #place(workers: readonly Hello[]): PlacedStage[] {
    const { cost, shards } = this.#options;
    const devices = workers.map((hello) => this.#device(hello));
    // The same workers are asked about again and again, and many take a while.
    const key = JSON.stringify(devices);
    let found = this.#placements.get(key);
    if (found === undefined) {
      try {
        found = place(cost, devices, shards === undefined ? {} : { shards });
      } catch (error) {
        if (!(error instanceof PlacementError)) throw error;
        found = error;
      }
      if (this.#placements.size >= MOST_PLACEMENTS) this.#placements.clear();
      this.#placements.set(key, found);
    }
    if (found instanceof PlacementError) throw found;
    return [...found];
  }

  async #load(since: number | undefined): Promise<Pipeline> {
    const { bus, cluster, orchestrator, shardOf, weights, stepTimeoutMs } = this.#options;
    let { all, devices } = this.#candidates();
    let placement = since === undefined ? this.#formerPlacement(devices) : undefined;
    if (placement === undefined && since === undefined) {
      // After a loss nobody waits for that.
      await this.#measure(devices);
      ({ all, devices } = this.#candidates());
    }
    try {
      placement ??= this.#place(devices);
    } catch (error) {
      if (!(error instanceof PlacementError) || all.length === devices.length) throw error;
      placement = this.#place(all);
    }
    const stages = placement;
    if (this.#state === "waiting" || this.#state === "unavailable") {
      this.#set("loading", "workers are loading the model");
    }
    this.#epoch = Math.max(this.#epoch, this.membership.newestEpoch) + 1;
    const before = new Map(stages.map(({ worker }) => [worker, this.membership.get(worker)?.session ?? ""]));
    // A worker that is lost while it loads is not waited for.
    const gone = new AbortController();
    this.#sessions = before;
    const overdue = this.#follow(stages, since, (error) => gone.abort(error));
    this.#trouble = (error) => gone.abort(error);
    let pipeline: Pipeline;
    try {
      pipeline = await Pipeline.load({
        bus,
        cluster,
        orchestrator,
        epoch: this.#epoch,
        placement: stages,
        shards: stages.map(shardOf),
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
    const timer = this.#options.lostMs === undefined ? undefined : setInterval(() => {
      const reason = this.#still(pipeline) ?? this.#replan(pipeline);
      if (reason !== undefined) resolve(reason);
      else if (this.#options.standby) this.#standBy(pipeline);
    }, TICK_MS);
    // Somebody may have gone, or begun anew, in the moment before.
    for (const [id, session] of this.#sessions) {
      if (this.membership.get(id)?.session !== session) resolve(new ClusterError(`worker ${id} is gone`));
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
      return performance.now() - this.membership.seenMs(id) - since >= patience;
    });
    return idle ? new ClusterError(`a message was lost ${Math.round(still)} ms ago`) : undefined;
  }

  #onHello(hello: Hello): void {
    const { id, state, epoch, work, loading } = hello;
    this.telemetry.take(hello, this.#pipeline);
    const before = this.#loading?.get(id);
    if (before !== undefined && (loading !== undefined || before.loading !== undefined)) {
      const further = loading?.phase !== before.loading?.phase || loading?.share !== before.loading?.share;
      this.#loading!.set(id, { loading, begun: true, since: further ? performance.now() : before.since });
      const shares = [...this.#loading!.values()].map(({ loading, begun }) => loading?.share ?? (begun ? 1 : 0));
      this.#options.onLoading(shares.reduce((sum, share) => sum + share, 0) / shares.length, this.loading);
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
    } else if (state === "draining" && this.#candidates().devices.length > 0) {
      try {
        if (!this.#ahead(this.#place(this.#candidates().devices))) return;
      } catch {
        return; // it is needed still
      }
      this.#trouble?.(new ClusterError(`worker ${id} wants to leave`));
    }
  }

  /** Whether workers that came since make it worth a new placement, at a moment that disturbs nobody. */
  #replan(pipeline: Pipeline): ClusterError | undefined {
    const { cost, shards, idle } = this.#options;
    const { devices } = this.#candidates();
    if (shards !== undefined || devices.every(({ id }) => this.#sessions.has(id))) return undefined;
    // Newcomers show first how fast they are.
    const newcomers = devices.filter(({ id }) => !this.#sessions.has(id));
    void this.#measure(newcomers);
    if (newcomers.some(({ id }) => this.#measuring.has(id))) return undefined;
    const all = devices.map((hello) => this.#device(hello));
    if (!pipeline.workers.every((id) => all.some((device) => device.id === id))) return undefined;
    const better = this.#place(devices);
    if (slowestStage(cost, all, better) > WORTH * slowestStage(cost, all, pipeline.placement)) return undefined;
    if (!this.#ahead(better)) return undefined;
    this.#replanSince ??= performance.now();
    if (!idle() && performance.now() - this.#replanSince < REPLAN_MS) return undefined;
    return new ClusterError("more workers make it faster");
  }

  /** Has the weights fetched for every placement that the loss of one worker would lead to, one after the other. */
  #standBy(pipeline: Pipeline): void {
    const { devices } = this.#candidates();
    for (const lost of pipeline.workers) {
      let placement: PlacedStage[];
      try {
        placement = this.#place(devices.filter(({ id }) => id !== lost));
      } catch (error) {
        if (!(error instanceof PlacementError)) throw error;
        continue; // the others have no room for it
      }
      if (!this.#ahead(placement, true)) return;
    }
  }

  /**
   * Whether workers have the weights of a placement; else they fetch them, while the present one goes on.
   *
   * @param standby It is for a loss only: whatever else is to be fetched goes first, and when it cannot be had, so be it.
   */
  #ahead(placement: readonly PlacedStage[], standby = false): boolean {
    const { bus, cluster, shardOf, weights, log } = this.#options;
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
      else if (error instanceof LoadError) this.#suspects.set(error.worker, performance.now() + SUSPECT_MS);
    }).finally(() => {
      this.#fetching = undefined;
      if (this.#loading === loading) this.#loading = undefined;
    });
    this.#fetching = { workers, standby, stop, done };
    return false;
  }
}

/** Whether a micro-batch takes far longer than it should. */
function hangs({ work: { runningMs, expectedMs } }: Hello): boolean {
  if (runningMs === null) return false;
  return runningMs > (expectedMs === null ? HUNG_FIRST_MS : Math.max(HUNG_MS, HUNG_TIMES * expectedMs));
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
