import { BusError } from "../bus/mod.ts";
import type { Bus, Hello, Shard, StageStatus, WeightsRef } from "../bus/mod.ts";
import { Deployment } from "./deployment.ts";
import type { DeploymentState, DeviceShare, WorkerLoading } from "./deployment.ts";
import { BusAwayError, ClusterError, PlacementError, QueueFullError } from "./errors.ts";
import type { LoadError } from "./errors.ts";
import { hangs, Membership } from "./membership.ts";
import type { Pipeline, StepRunner } from "./pipeline.ts";
import { predict, stageCosts } from "./placement.ts";
import type { Device, ModelCost, PlacedStage } from "./placement.ts";
import { LEAST_SHARE, placeReplicas, predictReplicas } from "./replicas.ts";
import type { Replica } from "./replicas.ts";
import { Scheduler } from "./scheduler.ts";
import type { HandedJob, Job, SchedulerOptions, SchedulerStats } from "./scheduler.ts";
import { askToMeasure, deviceOf } from "./speed.ts";
import type { Probe } from "./speed.ts";
import { Telemetry } from "./telemetry.ts";

/** Options of {@linkcode Fleet}. */
export interface FleetOptions {
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
  /** Exactly so many stages, in one replica. */
  shards?: number;
  /** Requests that run at once, for which the model is placed; see `ReplicasOptions`. */
  streams?: number;
  /** What the orchestrator before has left: who belonged to the cluster, and where the model lay in which epoch. */
  former?: { members: readonly string[]; epoch: number; replicas?: readonly Replica[] };
  /** Workers to wait for at first. */
  workers: number;
  patient: boolean;
  workerTimeoutMs: number;
  loadTimeoutMs: number;
  stepTimeoutMs: number;
  /** Silence after which a worker is lost; absent: never. */
  lostMs?: number;
  recoveryTimeoutMs: number;
  unload: boolean;
  scheduler: SchedulerOptions;
  /** Told of the replicas that serve, whenever others do. */
  onServing: (epoch: number, replicas: readonly Replica[]) => void;
  /** Told which share of the model is loaded, 0 to 1, and how far each worker is. */
  onLoading: (fraction: number, workers: readonly WorkerLoading[]) => void;
  log: (message: string) => void;
}

/** A replica of the model: who has it loaded, and who puts its micro-batches together. */
interface Member {
  readonly deployment: Deployment;
  readonly scheduler: Scheduler;
  /** What it has taken; empty while it has nothing. */
  claimed: Replica;
  /** What it is to take first, and what it had when it served last. */
  reserved: Replica | undefined;
  last: Replica | undefined;
}

/** How a replica does. */
export interface ReplicaStatus {
  readonly state: DeploymentState;
  readonly epoch: number;
  readonly running: number;
  readonly waiting: number;
  readonly pipeline: Pipeline | undefined;
}

/** A change that disturbs requests must make the devices concerned so much faster. */
const WORTH = 0.9;
/** A worker that did not load is left out for so long, twice as long each further time; one that was not heard of, shortly. */
const SUSPECT_MS = 5000;
const MOST_SUSPECT_MS = 300_000;
const SILENT_MS = 500;
const TICK_MS = 250;
const MOST_PLACEMENTS = 64;
/** Milliseconds that those are waited for who belonged to the cluster before. */
const FORMER_MS = 2500;
/** The time to a worker counts as another one when it has changed by this factor: placements shall not follow every ping. */
const HOP_CHANGE = 2;
/** Milliseconds between two pings of every worker, where workers send heartbeats. */
const PING_MS = 1000;
/** A token that is computed together with others takes this share of one alone: weights are read once for all. */
const TOGETHER = 1 / 6;
/** Tokens that answers are taken to have, as few say when they will end. */
const ANSWER_TOKENS = 128;
/** Times that a request may lose a replica without a token between them. */
const MOST_HANDED = 4;
/** The order in which replicas speak for all. */
const FOREMOST: readonly DeploymentState[] = ["serving", "recovering", "loading", "unavailable", "waiting", "closed"];
const NO_COUNTS = { steps: 0, prefillTokens: 0, decodeTokens: 0, reusedTokens: 0, preemptions: 0 };

/** Stands for the pipeline before there is one; the scheduler pauses then. */
const NO_RUNNER: StepRunner = {
  stages: 1,
  kvBlocks: 0,
  blockTokens: 1,
  run: () => Promise.reject(new ClusterError("there is no pipeline")),
  release: () => {},
};

/**
 * Serves a model from as many replicas as the devices make worth it. It tells each {@linkcode Deployment} which devices it may have,
 * begins another one with devices that nobody needs, and brings every job to the replica that should finish it first. The jobs of a
 * replica that cannot go on are the others' at once, which compute them anew from their token ids.
 */
export class Fleet {
  readonly membership: Membership;
  readonly telemetry: Telemetry;
  readonly #options: FleetOptions;
  readonly #members: Member[] = [];
  readonly #timer: ReturnType<typeof setInterval> | undefined;
  readonly #ready = Promise.withResolvers<void>();
  /** Workers that did not load: how often in a row, and until when they are left out. */
  readonly #suspects = new Map<string, { times: number; until: number }>();
  /** The session in which a worker was asked to measure its speed, and those that do. */
  readonly #asked = new Map<string, string>();
  readonly #measuring = new Map<string, Promise<void>>();
  readonly #stop = new AbortController();
  /** Milliseconds to workers and back, as far as placement goes. */
  readonly #hops = new Map<string, number>();
  /** How {@linkcode placeReplicas} lays the model on devices, or why it does not. */
  readonly #placements = new Map<string, readonly Replica[] | PlacementError>();
  /** Replicas of the orchestrator before that can be had again: their workers may hold their layers still. */
  #former: Replica[] = [];
  #epoch: number;
  #count = 0;
  /** What replicas have done that are no more. */
  #past = { ...NO_COUNTS, recoveries: 0 };
  #lastRecoveryMs: number | null = null;
  /** Jobs that have lost a replica: with how many tokens, and how often with so many. */
  readonly #handed = new WeakMap<Job, { length: number; times: number }>();
  #closing: Promise<void> | undefined;

  constructor(options: FleetOptions) {
    this.#options = options;
    this.#epoch = options.former?.epoch ?? 0;
    const { bus, cluster, lostMs } = options;
    this.membership = new Membership(bus, cluster, {
      ...(lostMs === undefined ? {} : { lostMs }),
      onLeave: (id, reason) => {
        this.telemetry.forget(id);
        for (const { deployment } of [...this.#members]) deployment.onLeave(id, reason);
      },
      onHello: (hello) => {
        this.telemetry.take(hello, this.#holder(hello.id)?.deployment.pipeline);
        for (const { deployment } of [...this.#members]) deployment.onHello(hello);
      },
      onRefuse: (_, reason) => options.log(`refused: ${reason}`),
    });
    this.telemetry = new Telemetry(bus, cluster, lostMs === undefined ? 0 : PING_MS);
    this.#ready.promise.catch(() => {});
    const first = this.#add(undefined, (signal) => this.#gather(signal));
    first.deployment.ready.catch((error) => this.#ready.reject(error));
    if (lostMs !== undefined) this.#timer = setInterval(() => this.#spread(), TICK_MS);
  }

  /** Resolves when a replica serves for the first time; rejects when none can. */
  get ready(): Promise<void> {
    return this.#ready.promise;
  }

  /** Where the foremost replica is in its life, and why it does not serve. */
  get state(): { state: DeploymentState; reason: string } {
    if (this.#closing !== undefined) return { state: "closed", reason: "closed" };
    const { state, reason } = this.#foremost.deployment;
    return { state, reason };
  }

  /** All replicas, those that serve and those that would. */
  get replicas(): readonly ReplicaStatus[] {
    return this.#members.map(({ deployment: { state, pipeline }, scheduler }) => {
      const { running, waiting } = scheduler.stats;
      return { state, epoch: pipeline?.epoch ?? 0, running, waiting, pipeline };
    });
  }

  /** How far the workers are that load. */
  get loading(): readonly WorkerLoading[] {
    return this.#members.flatMap(({ deployment }) => deployment.loading);
  }

  /** Replicas placed anew or given up after a loss, and milliseconds that the last took. */
  get recoveries(): { count: number; lastMs: number | null } {
    const count = this.#members.reduce((sum, { deployment }) => sum + deployment.recoveries.count, 0);
    return { count: this.#past.recoveries + count, lastMs: this.#lastRecoveryMs };
  }

  /** Most tokens that fit the KV cache of every replica that serves; 0 before the first. */
  get capacity(): number {
    const all = this.#members.filter(({ deployment }) => deployment.pipeline !== undefined);
    return all.length === 0 ? 0 : Math.min(...all.map(({ scheduler }) => scheduler.capacity));
  }

  /** Sums over the replicas. */
  get stats(): SchedulerStats {
    const { recoveries: _, ...past } = this.#past;
    const none = { running: 0, waiting: 0, inFlight: 0, kvBlocksTotal: 0, kvBlocksUsed: 0, kept: 0, kvBlocksKept: 0 };
    return this.#members.reduce<SchedulerStats>((sum, { scheduler }) => added(sum, scheduler.stats), {
      ...none,
      ...past,
    });
  }

  /** Micro-batches on their way. */
  get inFlight(): number {
    return this.#members.reduce((sum, { deployment }) => sum + (deployment.pipeline?.inFlight ?? 0), 0);
  }

  /**
   * Queues a job at the replica that should finish it first.
   *
   * @throws {QueueFullError}
   */
  add(job: Job): void {
    const members = this.#byFinish(job);
    for (const [i, { scheduler }] of members.entries()) {
      try {
        return scheduler.add(job);
      } catch (error) {
        if (!(error instanceof QueueFullError) || i === members.length - 1) throw error;
      }
    }
  }

  /** Ends a job at once, on the workers too. Harmless when it has ended. */
  cancel(job: Job): void {
    for (const { scheduler } of this.#members) scheduler.cancel(job);
  }

  /** Ends all jobs with `error`, and goes on with new ones. */
  abort(error: Error): void {
    for (const { scheduler } of this.#members) scheduler.abort(error);
  }

  /** Asks the workers how their stages do, replica by replica, first stage first. */
  async query(): Promise<StageStatus[]> {
    return (await Promise.all(this.#members.map(({ deployment }) => deployment.pipeline?.query() ?? []))).flat();
  }

  /** Ends all jobs with `error`, and everything. The workers keep their shards unless they are to be unloaded. */
  close(error: Error): Promise<void> {
    this.#closing ??= (async () => {
      clearInterval(this.#timer);
      this.#stop.abort(error);
      for (const { scheduler } of this.#members) scheduler.close(error);
      await Promise.all(this.#members.map(({ deployment }) => deployment.close()));
      await Promise.all(this.#measuring.values());
      this.telemetry.close();
      this.membership.close();
    })();
    return this.#closing;
  }

  get #foremost(): Member {
    const rank = ({ deployment }: Member) => FOREMOST.indexOf(deployment.state);
    return [...this.#members].sort((a, b) => rank(a) - rank(b))[0]!;
  }

  /** Begins a replica. */
  #add(reserved: Replica | undefined, gather?: (signal: AbortSignal) => Promise<void>): Member {
    const { bus, cluster, orchestrator, shardOf, weights, standby, patient, lostMs, unload, log } = this.#options;
    const { loadTimeoutMs, stepTimeoutMs, recoveryTimeoutMs } = this.#options;
    const scheduler = new Scheduler(NO_RUNNER, this.#options.scheduler);
    scheduler.pause();
    const devices: DeviceShare = {
      claim: (anew) => this.#claim(member, anew),
      release: () => this.#release(member),
      better: () => this.#better(member),
      without: (worker) => this.#placed(this.#candidates(member).filter(({ id }) => id !== worker))[0],
      spare: () => this.#members.some((other) => other !== member && other.deployment.state === "serving"),
      suspect: (error) => this.#suspect(error),
      nextEpoch: () => this.#epoch = Math.max(this.#epoch, this.membership.newestEpoch) + 1,
    };
    const member: Member = {
      scheduler,
      ...{ claimed: reserved ?? [], reserved, last: undefined },
      deployment: new Deployment({
        ...{ bus, cluster, shardOf, standby, unload, log },
        patient: patient || gather === undefined,
        ...{ loadTimeoutMs, stepTimeoutMs, recoveryTimeoutMs },
        orchestrator: `${orchestrator}-${this.#count++}`,
        membership: this.membership,
        devices,
        ...(gather === undefined ? {} : { gather }),
        ...(weights === undefined ? {} : { weights }),
        heartbeats: lostMs !== undefined,
        idle: () => scheduler.load.jobs === 0,
        onDown: (reason) => {
          scheduler.pause();
          this.#release(member);
          this.#handOver(reason instanceof BusAwayError ? undefined : member);
        },
        onUp: (pipeline) => this.#onUp(member, pipeline),
        onUnavailable: (reason) => scheduler.abort(reason),
        onEnd: () => this.#onEnd(member),
        onLoading: () => this.#onLoading(),
      }),
    };
    this.#members.push(member);
    return member;
  }

  #onUp(member: Member, pipeline: Pipeline): void {
    const { deployment, scheduler } = member;
    member.last = member.claimed;
    scheduler.replace(pipeline);
    this.#lastRecoveryMs = deployment.recoveries.lastMs ?? this.#lastRecoveryMs;
    for (const id of pipeline.workers) this.#suspects.delete(id);
    this.#handOver();
    // What waits elsewhere may run here.
    for (const other of this.#members) {
      if (other.deployment !== deployment) this.#route(other.scheduler.handOver());
    }
    this.#ready.resolve();
    this.#tellServing();
    this.#spread();
  }

  #onEnd(member: Member): void {
    const { deployment, scheduler } = member;
    this.#members.splice(this.#members.indexOf(member), 1);
    this.#release(member);
    this.#route(scheduler.handOver());
    const { running: _, waiting: __, ...counts } = scheduler.stats;
    for (const key of Object.keys(NO_COUNTS) as (keyof typeof NO_COUNTS)[]) this.#past[key] += counts[key];
    this.#past.recoveries += deployment.recoveries.count;
    this.#lastRecoveryMs = deployment.recoveries.lastMs ?? this.#lastRecoveryMs;
    this.#tellServing();
  }

  #onLoading(): void {
    const loading = this.#members.filter(({ deployment }) => deployment.loading.length > 0);
    const share = loading.reduce((sum, { deployment }) => sum + deployment.loadedShare, 0) / loading.length;
    if (loading.length > 0) this.#options.onLoading(share, this.loading);
  }

  #tellServing(): void {
    const serving = this.#members.filter(({ deployment }) => deployment.state === "serving");
    const replicas = serving.map(({ claimed }) => claimed);
    if (replicas.length > 0) this.#options.onServing(this.#epoch, replicas);
  }

  // Jobs.

  /**
   * Brings the jobs of replicas that cannot go on to those that serve, if any does.
   *
   * @param lost The one that was lost just then, perhaps for one of its jobs.
   */
  #handOver(lost?: Member): void {
    if (!this.#members.some(({ deployment }) => deployment.state === "serving")) return;
    for (const member of this.#members) {
      if (member.deployment.state === "serving") continue;
      const handed = member.scheduler.handOver();
      if (handed.length > 0) this.#options.log(`${handed.length} requests go on with another replica`);
      this.#route(member === lost ? handed.filter((one) => this.#mayGoOn(one)) : handed);
    }
  }

  /** Whether a job has come further since it lost a replica before: one that ends every worker must not be given to all. */
  #mayGoOn({ job }: HandedJob): boolean {
    const { length } = job.tokens;
    const before = this.#handed.get(job);
    const times = before?.length === length ? before.times + 1 : 1;
    this.#handed.set(job, { length, times });
    if (times < MOST_HANDED) return true;
    job.onError(new ClusterError(`${times} replicas were lost while they computed the same token of this request`));
    return false;
  }

  #route(handed: readonly HandedJob[]): void {
    for (const one of handed) this.#byFinish(one.job)[0]!.scheduler.adopt(one);
  }

  /** The replicas that may take a job, the one that should finish it first foremost. */
  #byFinish(job: Job): Member[] {
    const serving = this.#members.filter(({ deployment }) => deployment.state === "serving");
    if (serving.length === 0) return [this.#foremost]; // it waits
    const { membership, telemetry } = this;
    // As they are now, not as placement, which shall not change for little, has them; a lost one is about to be noticed.
    const devices = membership.workers.map((hello) =>
      deviceOf(hello, this.#options.probe, telemetry.shortest(hello.id))
    );
    const finish = new Map(
      serving.map((member) => [member, isOn(member.claimed, devices) ? this.#seconds(member, devices, job) : Infinity]),
    );
    return serving.sort((a, b) => finish.get(a)! - finish.get(b)!);
  }

  /**
   * Seconds until a replica would have finished a job: the prompts before it and its own, without what is in the KV cache already,
   * then its answer beside those of the others.
   */
  #seconds({ scheduler, claimed }: Member, devices: readonly Device[], job: Job): number {
    const { oneStream, manyStreams } = predict(this.#options.cost, devices, claimed);
    const { jobs, promptTokens } = scheduler.load;
    const prompt = promptTokens + job.tokens.length - scheduler.reusable(job);
    const answer = Math.min(ANSWER_TOKENS, (job.most ?? Infinity) - job.tokens.length);
    // As many streams as stages find one each, all others share micro-batches.
    const { length: stages } = claimed;
    const turn = (1 + TOGETHER * Math.max(0, jobs + 1 - stages) / stages) / oneStream;
    return prompt * TOGETHER / manyStreams + answer * turn;
  }

  // Devices.

  #holder(worker: string): Member | undefined {
    return this.#members.find(({ claimed }) => claimed.some((stage) => stage.worker === worker));
  }

  /** Workers that a replica may have: its own, and those that nobody has. */
  #candidates(member: Member | undefined, draining = false): Hello[] {
    const now = performance.now();
    return this.membership.workers.filter((hello) => {
      const holder = this.#holder(hello.id);
      return (holder === undefined || holder === member) && (draining || hello.state === "ready") && !hangs(hello) &&
        (this.#suspects.get(hello.id)?.until ?? 0) <= now;
      // The same order after every restart, so that the same workers get the same layers, which they may hold already.
    }).sort((a, b) => a.id < b.id ? -1 : 1);
  }

  /** How the model would lie on workers; not at all when it does not fit. */
  #placed(workers: readonly Hello[]): readonly Replica[] {
    try {
      return this.#place(workers);
    } catch (error) {
      if (error instanceof PlacementError) return [];
      throw error;
    }
  }

  #place(workers: readonly Hello[]): readonly Replica[] {
    const { cost, shards, streams } = this.#options;
    const devices = workers.map((hello) => this.#device(hello));
    // The same workers are asked about again and again, and many take a while.
    const key = JSON.stringify(devices);
    let found = this.#placements.get(key);
    if (found === undefined) {
      try {
        found = placeReplicas(cost, devices, {
          ...(shards === undefined ? {} : { shards }),
          ...(streams === undefined ? {} : { streams }),
        });
      } catch (error) {
        if (!(error instanceof PlacementError)) throw error;
        found = error;
      }
      if (this.#placements.size >= MOST_PLACEMENTS) this.#placements.clear();
      this.#placements.set(key, found);
    }
    if (found instanceof PlacementError) throw found;
    return found;
  }

  #claim(member: Member, anew: boolean): Replica {
    const candidates = this.#candidates(member);
    const others = this.#members.filter((other) => other !== member && other.claimed.length > 0);
    if (candidates.length === 0 && others.length > 0) throw new PlacementError("its devices are lost or leave");
    // Whose layers are loaded still goes on at once; others may do better later.
    let replica = member.reserved ?? (anew ? undefined : member.last) ?? this.#former.shift();
    member.reserved = undefined;
    if (replica === undefined || !isOn(replica, candidates)) {
      try {
        replica = this.#place(candidates)[0]!;
      } catch (error) {
        // Who wants to leave is asked only when it cannot be done without.
        const all = this.#candidates(member, true);
        if (!(error instanceof PlacementError) || all.length === candidates.length) throw error;
        const serving = this.#members.some((other) => other !== member && other.deployment.state === "serving");
        if (serving) throw error;
        replica = this.#place(all)[0]!;
      }
    }
    member.claimed = replica;
    queueMicrotask(() => this.#spread());
    return replica;
  }

  #release(member: Member): void {
    member.claimed = [];
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

  /** All devices that are there: what they are like beside each other counts where one did not tell. */
  #devices(): Device[] {
    return this.membership.workers.map((hello) => this.#device(hello));
  }

  #better(member: Member): readonly Replica[] | undefined {
    const { cost, shards } = this.#options;
    const candidates = this.#candidates(member);
    const free = candidates.filter(({ id }) => this.#holder(id) === undefined);
    if (shards !== undefined || free.length === 0 || !isOn(member.claimed, candidates)) return undefined;
    // Newcomers show first how fast they are.
    void this.#measure(free);
    if (free.some(({ id }) => this.#measuring.has(id))) return undefined;
    const rate = (replicas: readonly Replica[]) => predictReplicas(cost, this.#devices(), replicas).manyStreams;
    const better = this.#placed(candidates);
    // Those that do for a replica by themselves disturb nobody.
    const beside = this.#isSeveral ? this.#placed(free) : [];
    return better.length > 0 && rate([member.claimed, ...beside]) <= WORTH * rate(better) ? better : undefined;
  }

  /** Whether there may be more replicas than one. */
  get #isSeveral(): boolean {
    const { shards, streams = Infinity } = this.#options;
    return shards === undefined && streams > 1;
  }

  /** Begins replicas on devices that nobody needs. */
  #spread(): void {
    const { bus, cost } = this.#options;
    // Over a bus that is away nothing begins; it may be closed before its users.
    if (this.#closing !== undefined || !this.#isSeveral || bus.state === "disconnected") return;
    // Who has nothing has the first choice.
    if (this.#members.some(({ claimed }) => claimed.length === 0)) return;
    for (const replica of this.#former.splice(0)) {
      if (isOn(replica, this.#candidates(undefined))) this.#add(replica);
    }
    const candidates = this.#candidates(undefined);
    if (candidates.length === 0) return;
    // Newcomers show first how fast they are.
    void this.#measure(candidates);
    if (candidates.some(({ id }) => this.#measuring.has(id))) return;
    const present = this.#members.map(({ claimed }) => claimed);
    for (const replica of this.#placed(candidates)) {
      // One that {@linkcode placeReplicas} would leave out beside the present ones is none.
      const rates = [...present, replica].map((one) => predict(cost, this.#devices(), one).manyStreams);
      if (rates.at(-1)! >= LEAST_SHARE * Math.max(...rates)) this.#add(replica);
    }
  }

  #suspect({ worker, silent }: LoadError): void {
    const times = (this.#suspects.get(worker)?.times ?? 0) + 1;
    const ms = silent ? SILENT_MS : Math.min(MOST_SUSPECT_MS, SUSPECT_MS * 2 ** (times - 1));
    this.#suspects.set(worker, { times, until: performance.now() + ms });
  }

  /** Waits for workers to begin with. */
  async #gather(signal: AbortSignal): Promise<void> {
    const { workers, workerTimeoutMs, bus, former } = this.#options;
    const { membership } = this;
    const deadline = performance.now() + workerTimeoutMs;
    for (;;) {
      const left = deadline - performance.now();
      if (left <= 0) throw new ClusterError(membership.missing(workers, workerTimeoutMs));
      try {
        await membership.waitFor(workers, { timeoutMs: left, signal });
        break;
      } catch (error) {
        if (!(error instanceof BusError) || signal.aborted) {
          if (left <= workerTimeoutMs && error instanceof ClusterError) {
            throw new ClusterError(membership.missing(workers, workerTimeoutMs));
          }
          throw error;
        }
        if (bus.state === "disconnected") await membership.change(100, signal);
      }
    }
    // Then a moment for all that are known to belong to the cluster, rather than place the model on who answers first.
    const { members = [], replicas = [] } = former ?? {};
    const until = performance.now() + FORMER_MS;
    for (const id of [...members, ...replicas.flat().map(({ worker }) => worker)]) {
      while (membership.get(id) === undefined && performance.now() < until) {
        await membership.change(until - performance.now(), signal);
      }
    }
    this.#former = this.#formerReplicas();
    if (this.#former.length > 0) return;
    // Others may have come while the first measured.
    for (let asked = -1; asked < this.#asked.size;) {
      asked = this.#asked.size;
      await this.#measure(this.#candidates(undefined));
    }
  }

  /** The replicas of the orchestrator before, those that can be had again. */
  #formerReplicas(): Replica[] {
    const { cost, shards, former } = this.#options;
    const devices = this.#candidates(undefined).map((hello) => this.#device(hello));
    const taken = new Set<string>();
    const able = (former?.replicas ?? []).filter((replica) => {
      const whole = replica.every(({ first, end }, i) => first === (replica[i - 1]?.end ?? 0) && end > first) &&
        replica.at(-1)?.end === cost.layers.length;
      if (!whole || (shards !== undefined && replica.length !== shards) || !isOn(replica, devices)) return false;
      if (replica.some(({ worker }) => taken.has(worker))) return false;
      const held = new Map<string, number>();
      stageCosts(cost, devices, replica).forEach(({ memoryBytes }, i) => {
        const { worker } = replica[i]!;
        held.set(worker, (held.get(worker) ?? 0) + memoryBytes);
      });
      if (devices.some(({ id, memoryBytes }) => (held.get(id) ?? 0) > memoryBytes)) return false;
      for (const { worker } of replica) taken.add(worker);
      return true;
    });
    return this.#isSeveral ? able : able.slice(0, 1);
  }
}

/** Whether all of a replica's workers are among these. */
function isOn(replica: Replica, workers: readonly { id: string }[]): boolean {
  return replica.every(({ worker }) => workers.some(({ id }) => id === worker));
}

function added(a: SchedulerStats, b: SchedulerStats): SchedulerStats {
  const sum = { ...a };
  for (const key of Object.keys(sum) as (keyof SchedulerStats)[]) sum[key] += b[key];
  return sum;
}
