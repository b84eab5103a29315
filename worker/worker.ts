import { basename, dirname, join } from "node:path";
import {
  BusError,
  clusterSubjects,
  controlRequestSchema,
  decodeBatch,
  decodeJson,
  decodeMessage,
  diagnosisRequestSchema,
  encodeFailure,
  encodeJson,
  encodeMessage,
  encodeProbeReply,
  entryTable,
  LUTRA_VERSION,
  PROBE_HEADER_BYTES,
  shardTensors,
  WIRE_VERSION,
  WireError,
} from "../bus/mod.ts";
import type {
  Bus,
  BusMessage,
  ControlReply,
  ControlRequest,
  Finding,
  Hello,
  Loading,
  Shard,
  Stage as StageSpec,
  Subscription,
  WeightsRef,
} from "../bus/mod.ts";
import { KernelError, KernelErrorCode, WorkerError } from "./errors.ts";
import type { KernelLibrary, Lane, ShardChoices, ShardHandle, Tuning } from "./kernels.ts";
import { measureSpeed } from "./measure.ts";
import { Stage } from "./stage.ts";
import type { Left, QueuedStep } from "./stage.ts";
import { WeightStore } from "../weights/mod.ts";
import type { Span } from "../weights/mod.ts";

/** Options of {@linkcode Worker.start}. */
export interface WorkerOptions {
  bus: Bus;
  kernels: KernelLibrary;
  /** Letters, digits, `_` and `-`; unique in the cluster and the same after a restart. */
  id: string;
  /** @default {"local"} */
  cluster?: string;
  /** Threads of a shard. Default: all cores. */
  threads?: number;
  /** Instruction set. Default: the best. */
  isa?: string;
  /** Whether threads are bound to cores. @default {"none"} */
  pin?: "none" | "cores";
  /** Cache of packed weights on disk. Default: none. */
  cache?: ShardChoices["cache"];
  /** Whether kernels are measured on this device; without a cache never unasked. @default {"auto"} */
  tune?: Tuning;
  /** Bytes offered for weights and KV cache. Default: the memory available now. */
  memoryBytes?: number;
  /**
   * Measured memory read bandwidth in GB/s; `"measure"` measures it before the announcement, which takes about a second.
   * Default: not known, and workers count as equally fast.
   */
  bandwidthGBps?: number | "measure";
  /** Whether it measures how fast it is when an orchestrator asks. @default {false} */
  measure?: boolean;
  /** Whether a stage gets a connection of its own inside the kernel library, where that can be had. @default {true} */
  lane?: boolean;
  /** Milliseconds between heartbeats; 0 sends none, as within one process. @default {0} */
  heartbeatMs?: number;
  /** Where this device has the file that the orchestrator names. Default: under the same path. */
  resolvePath?: (path: string) => string;
  /** Looks at this device when it is asked how it is, and for a model's file there. Default: it does not answer. */
  diagnose?: (model: string | undefined) => Promise<Finding[]>;
  /**
   * Where weights that this device lacks are kept, and how many bytes; see `WeightStoreOptions` in `weights/store.ts`. Default: it
   * must have the file.
   */
  weights?: { cache: string; maxBytes: number; share?: boolean };
  /** Told when an orchestrator refuses this worker, and why. Default: it is logged. */
  onRefused?: (reason: string) => void;
  /** Told of dropped messages, of each kind the first, second, fourth, eighth…, and of a cache's troubles. Default: `console.warn`. */
  log?: (message: string) => void;
}

/** Reasons to drop a message. */
type DropReason = "malformed" | "epoch" | "duplicate" | "overflow";

const MAX_QUEUED = 1024;
const BANDWIDTH_MEBIBYTES = 256;
/** Milliseconds between two announcements of how far fetching is. */
const TELL_MS = 200;

/**
 * One device: announces itself, holds the stages it is told to, and computes their micro-batches one at a time, in the
 * order in which they arrive. No message from the bus can end it.
 */
export class Worker {
  readonly id: string;
  readonly #options: WorkerOptions;
  readonly #bus: Bus;
  readonly #kernels: KernelLibrary;
  readonly #subjects: ReturnType<typeof clusterSubjects>;
  #capabilities: Hello["capabilities"];
  readonly #threads: number;
  readonly #dropped = new Map<DropReason, number>();
  readonly #subscriptions: Subscription[] = [];
  #stages: Stage[] = [];
  /** The newest epoch seen; messages of others are dropped. */
  #epoch = 0;
  /** The request whose stages are open; empty when none are. */
  #loaded = "";
  #results = "";
  #queue: { stage: Stage; item: QueuedStep }[] = [];
  /** The loop over the queue; ends when the queue is empty. */
  #loop: Promise<void> | undefined;
  /** What reads the lane, until the lane ends. */
  #serving: Promise<void> | undefined;
  /** Whether a lane is to be had: not after one that broke, until the bus has broken too. */
  #lanes: boolean;
  /** To be done when no micro-batch is in the kernel library. */
  #between: (() => void)[] = [];
  /** Load, unload and close happen one after the other. */
  #changes: Promise<void> = Promise.resolve();
  #state: Hello["state"] = "ready";
  readonly #start = crypto.randomUUID().slice(0, 8);
  /** Times that the bus was lost and found again. */
  #reconnections = 0;
  readonly #heartbeat: ReturnType<typeof setInterval> | undefined;
  #refused = "";
  /** While stages are being loaded: how far that is. */
  #loading: Loading | undefined;
  readonly #store: WeightStore | undefined;
  /** Ends what is being fetched. */
  #fetching: AbortController | undefined;
  /** The newest epoch that a load was asked for. */
  #wanted = 0;
  /** Told when no stage is open. */
  #onIdle: (() => void) | undefined;
  #closed = false;

  private constructor(options: WorkerOptions, bandwidthGBps: number | null) {
    const device = options.kernels.deviceInfo();
    this.id = options.id;
    this.#options = options;
    this.#bus = options.bus;
    this.#kernels = options.kernels;
    this.#subjects = clusterSubjects(options.cluster ?? "local");
    this.#threads = options.threads ?? device.cores;
    this.#lanes = options.lane ?? true;
    this.#capabilities = {
      isa: options.isa ?? device.isa,
      cores: this.#threads,
      memoryBytes: options.memoryBytes ?? Deno.systemMemoryInfo().available,
      bandwidthGBps,
      speed: null,
    };
    const { weights, log } = options;
    if (weights !== undefined) {
      this.#store = new WeightStore({
        bus: this.#bus,
        cluster: options.cluster ?? "local",
        id: this.id,
        ...weights,
        busy: () => this.#loop !== undefined,
        ...(log === undefined ? {} : { log }),
      });
    }
    const control = this.#subjects.control(this.id);
    this.#subscriptions.push(
      this.#bus.subscribe(this.#subjects.discover, () => this.#announce()),
      this.#bus.subscribe(control, (message) => this.#onControl(message)),
      this.#bus.subscribe(this.#subjects.probe(this.id), (message) => this.#onProbe(message)),
      ...(options.diagnose === undefined
        ? []
        : [this.#bus.subscribe(this.#subjects.diagnose(this.id), (message) => this.#onDiagnose(message))]),
      this.#bus.watch((state) => {
        // Without an end of its own a lane would wait for a server that is not there any more.
        if (state === "disconnected") return this.#stages.forEach((stage) => void stage.lane?.close());
        this.#lanes = options.lane ?? true;
        this.#reconnections++;
        this.#announce();
      }),
    );
    this.#announce();
    const { heartbeatMs = 0 } = options;
    if (heartbeatMs > 0) {
      this.#heartbeat = setInterval(() => {
        this.#announce();
        for (const stage of this.#stages) if (stage.running !== undefined) this.#readAhead(stage);
      }, heartbeatMs);
    }
  }

  /** Starts a worker and announces it. */
  static async start(options: WorkerOptions): Promise<Worker> {
    let bandwidth = options.bandwidthGBps ?? null;
    if (bandwidth === "measure") {
      const threads = options.threads ?? options.kernels.deviceInfo().cores;
      bandwidth = await options.kernels.measureBandwidth(threads, BANDWIDTH_MEBIBYTES);
    }
    return new Worker(options, bandwidth);
  }

  /** Stages that it holds. */
  get stages(): number {
    return this.#stages.length;
  }

  /**
   * Asks for leave, and goes on computing until others have its layers or `timeoutMs` is over; then closes.
   *
   * @returns Whether it held nothing any more when it left.
   */
  async drain(timeoutMs: number): Promise<boolean> {
    if (!this.#closed && this.#stages.length > 0) {
      this.#state = "draining";
      const { promise, resolve } = Promise.withResolvers<void>();
      const timer = setTimeout(resolve, timeoutMs);
      this.#onIdle = resolve;
      this.#announce();
      await promise;
      clearTimeout(timer);
      this.#onIdle = undefined;
    }
    const idle = this.#stages.length === 0;
    await this.close();
    return idle;
  }

  /** Announces its leave, gives up what it computes, and closes its shards. */
  async close(): Promise<void> {
    if (this.#closed) return await this.#changes;
    this.#closed = true;
    clearInterval(this.#heartbeat);
    for (const subscription of this.#subscriptions) subscription.unsubscribe();
    this.#state = "leaving";
    this.#announce();
    this.#fetching?.abort(new WorkerError(`worker ${this.id} leaves`));
    await this.#change(() => this.#closeStages());
    await this.#store?.close();
  }

  #announce(): void {
    const running = this.#stages.map((stage) => stage.running).find((run) => run !== undefined);
    const hello: Hello = {
      type: "hello",
      id: this.id,
      state: this.#state,
      session: `${this.#start}-${this.#reconnections}`,
      epoch: this.#epoch,
      ...(this.#loading === undefined ? {} : { loading: this.#loading }),
      versions: { abi: this.#kernels.abiVersion, wire: WIRE_VERSION, lutra: LUTRA_VERSION },
      capabilities: this.#capabilities,
      work: {
        queued: this.#queue.length,
        runningMs: running?.runningMs ?? null,
        expectedMs: running?.expectedMs ?? null,
        stages: this.#stages.map((stage) => stage.work),
      },
    };
    try {
      this.#bus.publish(this.#subjects.hello, encodeJson(hello));
    } catch (error) {
      if (!(error instanceof BusError)) throw error; // the bus may be closed before its users
    }
  }

  // Control.

  #onControl(message: BusMessage): void {
    let request: ControlRequest;
    try {
      request = decodeJson(controlRequestSchema, message.data);
    } catch (error) {
      if (!(error instanceof WireError)) throw error;
      this.#drop("malformed", error.message);
      return message.respond(encodeJson(refusal(error)));
    }
    if (request.type === "release") return this.#release(request, message);
    if (request.type === "refuse") {
      if (request.reason !== this.#refused) this.#onRefused(request.reason);
      this.#refused = request.reason;
      return;
    }
    if (request.type === "fetch") {
      this.#fetch(request.stages, "ahead").then(() => this.#status()).catch(refusal)
        .then((reply) => message.respond(encodeJson(reply)))
        .catch((error) => this.#log(`worker ${this.id} could not answer: ${error}`));
      return;
    }
    if (request.type === "load" && request.epoch > this.#wanted) {
      // What another epoch waits for is of no account any more; what has come of it stays.
      this.#wanted = request.epoch;
      this.#fetching?.abort(new WorkerError(`epoch ${request.epoch} begins`));
    }
    const act = request.type === "load"
      ? () => this.#load(request)
      : request.type === "unload"
      ? () => this.#unload(request.epoch)
      : request.type === "measure"
      ? () => this.#measure(request)
      : () => Promise.resolve();
    this.#change(act).then(() => this.#status()).catch(refusal).then((reply) => message.respond(encodeJson(reply)))
      .catch((error) => this.#log(`worker ${this.id} could not answer: ${error}`));
  }

  /** Answers whether or not a micro-batch runs: how long that takes is the way alone. */
  #onProbe(message: BusMessage): void {
    const size = PROBE_HEADER_BYTES + message.data.byteLength;
    if (size > this.#bus.maxPayload) return this.#drop("malformed", `a probe of ${message.data.byteLength} bytes`);
    message.respond(encodeProbeReply(Date.now(), message.data));
  }

  async #onDiagnose(message: BusMessage): Promise<void> {
    let findings: Finding[];
    try {
      const { model } = decodeJson(diagnosisRequestSchema, message.data);
      const path = model === null ? undefined : this.#options.resolvePath?.(model) ?? model;
      findings = await this.#options.diagnose!(path);
    } catch (error) {
      if (error instanceof WireError) return this.#drop("malformed", error.message);
      const detail = error instanceof Error ? error.message : String(error);
      findings = [{ check: "device", state: "failed", detail, fix: "run it with -P=worker" }];
    }
    if (!this.#closed) message.respond(encodeJson({ findings }));
  }

  #onRefused(reason: string): void {
    if (this.#options.onRefused !== undefined) this.#options.onRefused(reason);
    else this.#log(`worker ${this.id} is refused: ${reason}`);
  }

  /** Runs `act` after all changes before it. */
  #change(act: () => Promise<void>): Promise<void> {
    const done = this.#changes.then(act);
    this.#changes = done.catch(() => {});
    return done;
  }

  #release({ epoch, seqs }: { epoch: number; seqs: number[] }, message: BusMessage): void {
    if (epoch !== this.#epoch) return this.#drop("epoch", `release of epoch ${epoch}`);
    for (const stage of this.#stages) stage.release(seqs);
    if (message.reply !== undefined) this.#status().then((reply) => message.respond(encodeJson(reply)), () => {});
  }

  async #load(request: ControlRequest & { type: "load" }): Promise<void> {
    if (this.#closed) throw new WorkerError(`worker ${this.id} leaves`);
    const { epoch } = request;
    if (epoch < this.#epoch) throw new WorkerError(`epoch ${epoch} is over; worker ${this.id} is in ${this.#epoch}`);
    const content = JSON.stringify(request);
    if (content === this.#loaded) return; // received twice
    if (epoch === this.#epoch && this.#loaded !== "") throw new WorkerError(`epoch ${epoch} has other stages already`);
    this.#epoch = epoch;
    this.#loaded = "";
    this.#results = request.results;
    await this.#fence();
    const paths = await this.#fetch(request.stages, request.epoch);
    const spare = this.#stages;
    this.#stages = [];
    const opened: Stage[] = [];
    const begun = performance.now();
    try {
      // First free what is not wanted any more, then open: both may not fit at once.
      const kept = request.stages.map((wanted) => {
        const at = spare.findIndex((stage) => sameShard(stage.spec, wanted));
        return at < 0 ? undefined : spare.splice(at, 1)[0];
      });
      for (const stage of spare.splice(0)) stage.handle.close();
      spare.push(...kept.filter((stage) => stage !== undefined));
      for (const [i, wanted] of request.stages.entries()) {
        const keep = kept[i];
        let handle: ShardHandle;
        if (keep === undefined) {
          const { isa = null, pin = "none", cache = null, tune = "auto" } = this.#options;
          handle = await this.#kernels.openShard(
            placed(wanted.shard, paths[i]!),
            { threads: this.#threads, isa, pin, cache, tune },
            {
              onProgress: (fraction) => {
                const share = (i + fraction) / request.stages.length;
                const etaMs = share > 0 ? (performance.now() - begun) * (1 - share) / share : null;
                this.#loading = { phase: "packing", share, bytes: 0, etaMs };
                this.#announce();
              },
              onNote: (text) => this.#log(`worker ${this.id}: ${text}`),
            },
          );
        } else {
          keep.freeAll();
          spare.splice(spare.indexOf(keep), 1);
          handle = keep.handle;
        }
        opened.push(new Stage(wanted, epoch, handle, this.#bus.maxPayload, keep));
      }
      // Only one stage can have the kernel library to itself.
      if (opened.length === 1) opened[0]!.lane = await this.#openLane(opened[0]!);
      for (const stage of opened) if (stage.lane === undefined) this.#subscribe(stage);
    } catch (error) {
      for (const stage of [...opened, ...spare]) {
        stage.subscription?.unsubscribe();
        await stage.lane?.close();
        stage.handle.close();
      }
      throw error;
    } finally {
      this.#loading = undefined;
    }
    this.#stages = opened;
    this.#loaded = content;
    for (const stage of opened) if (stage.lane !== undefined) this.#serving = this.#serve(stage, stage.lane);
  }

  #subscribe(stage: Stage): void {
    const subject = this.#subjects.stage(this.id, stage.spec.stage);
    stage.subscription = this.#bus.subscribe(subject, ({ data }) => this.#onWork(stage, data));
  }

  /**
   * Sees to it that the weights of stages are on this device, and returns the paths of each one's files.
   *
   * @param purpose The epoch that they are loaded for, or `ahead`.
   */
  async #fetch(stages: readonly StageSpec[], purpose: number | "ahead"): Promise<(readonly string[])[]> {
    const store = this.#store;
    const own = stages.map(({ shard: { path, files = [] } }) => {
      const first = this.#options.resolvePath?.(path) ?? path;
      return [first, ...files.map((name) => join(dirname(first), name))];
    });
    if (store === undefined || stages.every(({ weights }) => weights === undefined)) return own;
    this.#fetching?.abort(new WorkerError("other weights are wanted"));
    const ending = this.#fetching = new AbortController();
    // It may have been superseded while it waited for its turn.
    if (purpose !== "ahead" && purpose < this.#wanted) ending.abort(new WorkerError(`epoch ${this.#wanted} begins`));
    if (this.#closed) ending.abort(new WorkerError(`worker ${this.id} leaves`));
    let told = 0;
    const models = new Map<string, { ref: WeightsRef; paths: readonly string[]; spans: Span[] }>();
    stages.forEach(({ shard, weights }, i) => {
      if (weights === undefined || this.#stages.some((stage) => sameShard(stage.spec, stages[i]!))) return;
      const model = models.get(weights.root);
      if (model === undefined) models.set(weights.root, { ref: weights, paths: own[i]!, spans: shardTensors(shard) });
      else model.spans.push(...shardTensors(shard));
    });
    const found = new Map<string, readonly string[]>();
    try {
      for (const [root, { ref, paths, spans }] of models) {
        const at = await store.provide(ref, paths, spans, {
          signal: ending.signal,
          onProgress: ({ phase, done, total, etaMs }) => {
            this.#loading = { phase, share: total === 0 ? 1 : done / total, bytes: total, etaMs };
            const now = performance.now();
            if (now - told < TELL_MS) return;
            told = now;
            this.#announce();
          },
        });
        found.set(root, at);
      }
    } finally {
      if (this.#fetching === ending) {
        this.#fetching = undefined;
        this.#loading = undefined;
      }
    }
    return stages.map(({ weights }, i) => found.get(weights?.root ?? "") ?? own[i]!);
  }

  /** Measures how fast it is, and announces it; what was measured already it knows. */
  async #measure({ probe, shard }: ControlRequest & { type: "measure" }): Promise<void> {
    if (this.#options.measure !== true || this.#closed || this.#capabilities.speed?.probe === probe) return;
    const { isa = null, pin = "none", tune = "auto" } = this.#options;
    const choices = { threads: this.#threads, isa, pin, cache: null, tune };
    const speed = await measureSpeed(this.#kernels, shard, choices, this.#capabilities.memoryBytes);
    this.#capabilities = { ...this.#capabilities, speed: { probe, ...speed } };
    this.#announce();
  }

  async #unload(epoch: number): Promise<void> {
    if (epoch !== this.#epoch) throw new WorkerError(`worker ${this.id} is in epoch ${this.#epoch}, not ${epoch}`);
    await this.#closeStages();
  }

  async #closeStages(): Promise<void> {
    await this.#fence();
    for (const stage of this.#stages.splice(0)) stage.handle.close();
    this.#loaded = "";
    this.#onIdle?.();
  }

  /** Ends all work: no more messages, an empty queue, nothing in the kernel library. */
  async #fence(): Promise<void> {
    const lanes = this.#stages.map((stage) => {
      stage.subscription?.unsubscribe();
      stage.interrupt();
      stage.queued = 0;
      const { lane } = stage;
      stage.lane = undefined; // its end is no loss
      return lane?.close();
    });
    this.#queue = [];
    await Promise.all(lanes);
    await this.#serving;
    await this.#loop;
  }

  /** Asked between two micro-batches, as the kernel library would block the thread meanwhile. */
  #status(): Promise<ControlReply> {
    return new Promise((resolve, reject) => {
      const answer = () => {
        try {
          resolve({
            ok: true,
            epoch: this.#epoch,
            stages: this.#stages.map((stage) => stage.status()),
            dropped: Object.fromEntries(this.#dropped),
          });
        } catch (error) {
          reject(error);
        }
      };
      if (this.#loop === undefined && !this.#stages.some((stage) => stage.armed)) return answer();
      this.#between.push(answer);
      for (const stage of this.#stages) stage.wake();
    });
  }

  // Lanes.

  /** The lane of a stage; `undefined` where there is none to be had. */
  async #openLane(stage: Stage): Promise<Lane | undefined> {
    const endpoint = this.#lanes ? this.#bus.nativeEndpoint?.() : undefined;
    if (endpoint === undefined) return undefined;
    const subjects = [this.#subjects.stage(this.id, stage.spec.stage), this.#subjects.control(this.id)];
    try {
      return await stage.handle.openLane?.(endpoint, subjects, this.#bus.maxPayload);
    } catch (error) {
      if (!(error instanceof KernelError || error instanceof BusError)) throw error;
      this.#lanes = false;
      this.#log(`worker ${this.id} has no lane, which makes hops longer: ${error.message}`);
      return undefined;
    }
  }

  /** Does what the lane leaves to be done, until it ends. */
  async #serve(stage: Stage, lane: Lane): Promise<void> {
    while (stage.lane === lane) {
      let left: Left | undefined;
      try {
        left = await stage.next(lane);
      } catch (error) {
        this.#onLaneLost(stage, lane, error);
      }
      for (const act of this.#between.splice(0)) act();
      if (stage.lane !== lane) break;
      if (left?.type === "message") {
        if (left.subject === 0) this.#onWork(stage, left.data);
        else this.#onOrderedControl(left.data);
      } else if (left?.error !== undefined) this.#fail(stage, left.item, left.error);
      else if (left !== undefined) this.#enqueue(stage, left.item);
      await this.#loop;
    }
  }

  /**
   * Takes a request as it stands among micro-batches. The bus brings it too, and often earlier, as a cancel shall overtake; but the
   * two connections know no order, and what is sent after a release relies on the memory that it frees.
   */
  #onOrderedControl(data: Uint8Array): void {
    let request: ControlRequest;
    try {
      request = decodeJson(controlRequestSchema, data);
    } catch (error) {
      if (!(error instanceof WireError)) throw error;
      return; // the bus brought it as well
    }
    if (request.type !== "release" || request.epoch !== this.#epoch) return;
    for (const stage of this.#stages) stage.release(request.seqs);
  }

  /** Goes on by the bus. Messages may be lost: the orchestrator is told, as if the bus had been lost. */
  #onLaneLost(stage: Stage, lane: Lane, error: unknown): void {
    if (stage.lane !== lane) return; // a fence's doing
    stage.lane = undefined;
    void lane.close();
    this.#lanes = false;
    const detail = error instanceof Error ? error.message : String(error);
    this.#log(`worker ${this.id} lost its lane, and goes on without one: ${detail}`);
    try {
      this.#subscribe(stage);
    } catch (error) {
      if (!(error instanceof BusError)) throw error;
      return; // the bus is closed
    }
    if (this.#bus.state === "disconnected") return; // it will be told when it is there again
    this.#reconnections++;
    this.#announce();
  }

  #readAhead({ lane }: Stage): void {
    try {
      lane?.readAhead();
    } catch (error) {
      if (!(error instanceof KernelError)) throw error; // that it is lost the next step tells
    }
  }

  // Work.

  #onWork(stage: Stage, message: Uint8Array): void {
    let item: QueuedStep;
    try {
      // The kernel library reads f32 and u32 in place; some transports deliver at odd addresses.
      const data = message.byteOffset % 4 === 0 ? message : message.slice();
      const { kind, epoch, step, chain, batch, payload } = decodeMessage(data);
      if (kind !== "work") throw new WireError(`a ${kind} message is no work`);
      if (epoch !== stage.epoch) return this.#drop("epoch", `step ${step} of epoch ${epoch}`);
      item = { step, chain, batch: decodeBatch(batch), payload };
    } catch (error) {
      if (!(error instanceof WireError)) throw error;
      return this.#drop("malformed", error.message);
    }
    if (!stage.seen.add(item.step)) return this.#drop("duplicate", `step ${item.step}`);
    this.#enqueue(stage, item);
  }

  #enqueue(stage: Stage, item: QueuedStep): void {
    if (this.#queue.length >= MAX_QUEUED) return this.#drop("overflow", `step ${item.step}`);
    stage.queued++;
    this.#queue.push({ stage, item });
    this.#loop ??= this.#run();
  }

  async #run(): Promise<void> {
    for (let next = this.#queue.shift(); next !== undefined; next = this.#queue.shift()) {
      const { stage, item } = next;
      stage.queued--;
      try {
        const { message, following } = await stage.compute(item);
        if (stage.epoch === this.#epoch && !this.#closed) {
          const { lane, spec: { next, first } } = stage;
          const way = lane ?? this.#bus;
          if (first !== undefined && following !== undefined) way.publish(first, following);
          way.publish(next, message);
        }
      } catch (error) {
        this.#fail(stage, item, error);
      }
      for (const act of this.#between.splice(0)) act();
    }
    this.#loop = undefined;
  }

  /** Tells the orchestrator why a micro-batch ends here. */
  #fail(stage: Stage, item: QueuedStep, error: unknown): void {
    if (stage.epoch !== this.#epoch || this.#closed) return; // interrupted by a fence
    try {
      const failure = encodeFailure({
        // That it could not be sent is no fault of the request's.
        code: error instanceof KernelError && error.code !== KernelErrorCode.lost ? error.code : 0,
        message: error instanceof Error ? error.message : String(error),
        worker: this.id,
        stage: stage.spec.stage,
      });
      const header = { kind: "result", epoch: stage.epoch, step: item.step, error: true } as const;
      this.#bus.publish(this.#results, encodeMessage(header, entryTable(item.batch), failure));
    } catch (cause) {
      this.#log(`worker ${this.id} could not report ${error}: ${cause}`);
    }
  }

  #drop(reason: DropReason, detail: string): void {
    const times = (this.#dropped.get(reason) ?? 0) + 1;
    this.#dropped.set(reason, times);
    if ((times & (times - 1)) === 0) {
      this.#log(`worker ${this.id} dropped a message (${reason}, ${times} so far): ${detail}`);
    }
  }

  #log(message: string): void {
    (this.#options.log ?? console.warn)(message);
  }
}

/** Whether two stages hold the same layers of the same file. */
function sameShard(a: StageSpec, b: StageSpec): boolean {
  return JSON.stringify([a.shard, a.weights]) === JSON.stringify([b.shard, b.weights]);
}

/** A shard whose files lie elsewhere. */
function placed(shard: Shard, [path, ...files]: readonly string[]): Shard {
  return { ...shard, path: path!, ...(files.length === 0 ? {} : { files: files.map((file) => basename(file)) }) };
}

function refusal(error: unknown): ControlReply {
  return {
    ok: false,
    code: error instanceof KernelError ? error.code : 0,
    error: error instanceof Error ? error.message : String(error),
  };
}
