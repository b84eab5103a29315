import {
  ABI_VERSION,
  anyHelloSchema,
  BusError,
  clusterSubjects,
  decodeJson,
  encodeJson,
  helloSchema,
  WIRE_VERSION,
  WireError,
} from "../bus/mod.ts";
import type { Bus, Hello, Subscription } from "../bus/mod.ts";
import { ClusterError } from "./errors.ts";
import { LONGEST_MS } from "./longest.ts";

/** A kernel hangs when a micro-batch takes so long at the least, and so many times as long as it should by those before. */
const HUNG_MS = 1500;
const HUNG_TIMES = 8;
/** … or so long, when none was before: weights may have to be read first. */
const HUNG_FIRST_MS = 200_000;

/** Whether a worker's micro-batch takes far longer than it should. */
export function hangs({ work: { runningMs, expectedMs } }: Hello): boolean {
  if (runningMs === null) return false;
  return runningMs > (expectedMs === null ? HUNG_FIRST_MS : Math.max(HUNG_MS, HUNG_TIMES * expectedMs));
}

/** Options of {@linkcode Membership}. */
export interface MembershipOptions {
  /**
   * Milliseconds of silence after which a worker counts as lost. Default: workers are never lost, as within one process.
   */
  lostMs?: number;
  /** Told when a worker is gone: it left, fell silent, or began anew and so lost what it held. */
  onLeave?: (id: string, reason: string) => void;
  /** Told of every announcement of a worker whose version fits. */
  onHello?: (hello: Hello) => void;
  /** Told once of each worker that is refused. */
  onRefuse?: (id: string, reason: string) => void;
}

/** Options of {@linkcode Membership.waitFor}. */
export interface WaitOptions {
  /** Milliseconds until {@linkcode ClusterError}. */
  timeoutMs: number;
  signal?: AbortSignal | undefined;
}

interface Member {
  hello: Hello;
  /** When it was heard of last, in milliseconds. */
  seen: number;
}

/** Which processes have borne a name: who is lost may still be heard of late. */
interface Bearers {
  /** The newest session. */
  session: string;
  /** The processes before its own, the newest last. */
  former: string[];
  /** Since when, and when last, one of them was heard of beside it; 0: never. */
  rivalSince: number;
  rivalSeen: number;
}

/** So many of them are remembered. */
const MOST_FORMER = 8;

/**
 * Who is there: what the workers announced, as far as their versions fit. A worker is lost when it is silent for long, but not for
 * the time in which this process heard nobody: while the bus is disconnected, or while it was itself held up.
 */
export class Membership {
  readonly #bus: Bus;
  readonly #subjects: ReturnType<typeof clusterSubjects>;
  readonly #subscriptions: Subscription[];
  readonly #options: MembershipOptions;
  readonly #workers = new Map<string, Member>();
  readonly #bearers = new Map<string, Bearers>();
  /** Workers of other versions, and why they are refused. */
  readonly #refused = new Map<string, string>();
  readonly #timer: ReturnType<typeof setInterval> | undefined;
  #lastTick = performance.now();
  /** The newest epoch that any worker, here or gone, has seen. */
  #newestEpoch = 0;
  #changed: (() => void)[] = [];

  constructor(bus: Bus, cluster: string, options: MembershipOptions = {}) {
    this.#bus = bus;
    this.#subjects = clusterSubjects(cluster);
    this.#options = options;
    this.#subscriptions = [
      bus.subscribe(this.#subjects.hello, (message) => this.#onHello(message.data)),
      bus.watch((state) => {
        if (state === "connected") this.discover();
      }),
    ];
    const { lostMs } = options;
    if (lostMs !== undefined) {
      const every = Math.max(10, lostMs / 8);
      this.#timer = setInterval(() => this.#tick(every, lostMs), every);
    }
  }

  /** The workers that are there, in the order they came. */
  get workers(): readonly Hello[] {
    return [...this.#workers.values()].map((member) => member.hello);
  }

  /** A worker that is there. */
  get(id: string): Hello | undefined {
    return this.#workers.get(id)?.hello;
  }

  /** Milliseconds since a worker was heard of. */
  seenMs(id: string): number {
    const member = this.#workers.get(id);
    return member === undefined ? Infinity : performance.now() - member.seen;
  }

  /** Who is refused, and why. */
  get refused(): ReadonlyMap<string, string> {
    return this.#refused;
  }

  /** The newest epoch that any worker has seen. */
  get newestEpoch(): number {
    return this.#newestEpoch;
  }

  /** Asks all workers to announce themselves. */
  discover(): void {
    try {
      this.#bus.publish(this.#subjects.discover, new Uint8Array());
    } catch (error) {
      if (!(error instanceof BusError)) throw error;
    }
  }

  /** Asks who is there and resolves when at least `count` workers are. */
  async waitFor(count: number, options: WaitOptions): Promise<readonly Hello[]> {
    const { timeoutMs, signal } = options;
    signal?.throwIfAborted();
    this.discover();
    // Two hops: the question and the answers of those that are in reach already.
    await this.#bus.flush();
    await this.#bus.flush();
    const deadline = Date.now() + timeoutMs;
    while (this.#workers.size < count) {
      await this.change(Math.max(0, deadline - Date.now()), signal);
      if (Date.now() >= deadline && this.#workers.size < count) throw new ClusterError(this.missing(count, timeoutMs));
    }
    return this.workers;
  }

  /** Resolves when a worker comes, goes or changes its state, or after `timeoutMs`. */
  change(timeoutMs: number, signal?: AbortSignal): Promise<void> {
    return new Promise((resolve, reject) => {
      const done = () => {
        clearTimeout(timer);
        signal?.removeEventListener("abort", abort);
        resolve();
      };
      const abort = () => {
        clearTimeout(timer);
        reject(signal?.reason);
      };
      if (signal?.aborted === true) return reject(signal.reason);
      const timer = setTimeout(done, Math.min(timeoutMs, LONGEST_MS));
      signal?.addEventListener("abort", abort, { once: true });
      this.#changed.push(done);
    });
  }

  /** Stops listening. */
  close(): void {
    clearInterval(this.#timer);
    for (const subscription of this.#subscriptions) subscription.unsubscribe();
    this.#wake();
  }

  /** How many workers are there, and who is refused. */
  missing(count: number, timeoutMs: number): string {
    const there = `${this.#workers.size} of ${count} workers are there after ${timeoutMs / 1000} s`;
    return this.#refused.size === 0 ? there : `${there}; refused: ${[...this.#refused.values()].join("; ")}`;
  }

  #wake(): void {
    for (const wake of this.#changed.splice(0)) wake();
  }

  #tick(every: number, lostMs: number): void {
    const now = performance.now();
    // This process was held up, and so were the announcements in its sockets; or nobody can be heard.
    const held = now - this.#lastTick - every;
    this.#lastTick = now;
    if (this.#bus.state === "disconnected" || held > every) {
      for (const member of this.#workers.values()) {
        member.seen += this.#bus.state === "disconnected" ? every + held : held;
      }
      return;
    }
    for (const [id, member] of [...this.#workers]) {
      if (now - member.seen > lostMs) this.#remove(id, `worker ${id} is silent for ${(lostMs / 1000).toFixed(1)} s`);
    }
  }

  #remove(id: string, reason: string): void {
    if (!this.#workers.delete(id)) return;
    this.#options.onLeave?.(id, reason);
    this.#wake();
  }

  #onHello(data: Uint8Array): void {
    let hello: Hello;
    let id: string | undefined;
    try {
      const any = decodeJson(anyHelloSchema, data);
      const { versions } = any;
      id = any.id;
      if (versions.wire !== WIRE_VERSION || versions.abi !== ABI_VERSION) {
        return this.#refuse(
          id,
          `${id} has wire version ${versions.wire} and ABI version ${versions.abi}, not ${WIRE_VERSION} and ${ABI_VERSION}`,
        );
      }
      hello = decodeJson(helloSchema, data);
    } catch (error) {
      if (!(error instanceof WireError)) throw error;
      if (id === undefined) return; // not a worker of ours
      const reason = `${id} announces what cannot be (${error.message}): run the same Lutra on both`;
      return this.#refuse(id, reason.slice(0, 1024));
    }
    const { session } = hello;
    this.#newestEpoch = Math.max(this.#newestEpoch, hello.epoch);
    if (!this.#isNewest(id, session)) return;
    if (hello.state === "leaving") {
      this.#refused.delete(id);
      return this.#remove(id, `worker ${id} left`);
    }
    const known = this.#workers.get(id);
    if (known === undefined) {
      this.#refused.delete(id);
      this.#workers.set(id, { hello, seen: performance.now() });
    } else {
      const { hello: before } = known;
      known.hello = hello;
      known.seen = performance.now();
      if (session !== before.session) this.#options.onLeave?.(id, `worker ${id} began anew`);
      else if (hello.state === before.state) {
        this.#options.onHello?.(hello);
        return;
      }
    }
    this.#options.onHello?.(hello);
    this.#wake();
  }

  /**
   * Whether a session is the newest of its name. What an earlier process or connection has left in sockets may come after it, at
   * once or when a link is up again; but who announces itself for as long as silence would take to be noticed lives beside the
   * newest one, and both are refused.
   */
  #isNewest(id: string, session: string): boolean {
    const known = this.#bearers.get(id);
    if (known === undefined) {
      this.#bearers.set(id, { session, former: [], rivalSince: 0, rivalSeen: 0 });
      return true;
    }
    if (isLater(known.session, session)) return false;
    const [before, process] = [known.session, session].map(processOf);
    if (!known.former.includes(process!)) {
      known.session = session;
      if (process !== before) known.former = [...known.former, before!].slice(-MOST_FORMER);
      return true;
    }
    const now = performance.now();
    const { lostMs = 0 } = this.#options;
    if (now - known.rivalSeen > lostMs) known.rivalSince = now;
    known.rivalSeen = now;
    if (now - known.rivalSince >= lostMs) {
      this.#refuse(id, `two workers call themselves ${id}: give one another name with --id`);
    }
    return false;
  }

  #refuse(id: string, reason: string): void {
    this.#remove(id, reason);
    if (this.#refused.get(id) === reason) return;
    this.#refused.set(id, reason);
    this.#options.onRefuse?.(id, reason);
    try {
      this.#bus.publish(this.#subjects.control(id), encodeJson({ type: "refuse", reason }));
    } catch (error) {
      if (!(error instanceof BusError)) throw error;
    }
    this.#wake();
  }
}

/** A session's process, and how often that had connected anew. */
function partsOf(session: string): [process: string, connection: number] {
  const at = session.lastIndexOf("-");
  return [session.slice(0, at), Number(session.slice(at + 1))];
}

function processOf(session: string): string {
  return partsOf(session)[0];
}

/** Whether a session is of the same process as another one, after a later reconnection. */
function isLater(session: string, other: string): boolean {
  const [[process, connection], [otherProcess, otherConnection]] = [partsOf(session), partsOf(other)];
  return process === otherProcess && connection > otherConnection;
}
