import { clusterSubjects, decodeJson, helloSchema, WIRE_VERSION, WireError } from "../bus/mod.ts";
import type { Bus, Hello, Subscription } from "../bus/mod.ts";
import { ClusterError } from "./errors.ts";

/** The C ABI version of the workers that this orchestrator works with. */
export const WORKER_ABI_VERSION = 2;

/** Options of {@linkcode Membership}. */
export interface MembershipOptions {
  /** Told when a worker says that it leaves. */
  onLeave?: (id: string) => void;
  /** Told which share of its stages a worker has loaded, 0 to 1. */
  onLoading?: (id: string, fraction: number) => void;
}

/** Options of {@linkcode Membership.waitFor}. */
export interface WaitOptions {
  /** Milliseconds until {@linkcode ClusterError}. */
  timeoutMs: number;
  signal?: AbortSignal | undefined;
}

/** Who is there: what the workers announced, as far as their versions fit. */
export class Membership {
  readonly #bus: Bus;
  readonly #discover: string;
  readonly #subscription: Subscription;
  readonly #onLeave: (id: string) => void;
  readonly #onLoading: (id: string, fraction: number) => void;
  readonly #workers = new Map<string, Hello>();
  /** Workers of other versions, and why they are refused. */
  readonly #refused = new Map<string, string>();
  #changed: (() => void)[] = [];

  constructor(bus: Bus, cluster: string, options: MembershipOptions = {}) {
    const subjects = clusterSubjects(cluster);
    this.#bus = bus;
    this.#discover = subjects.discover;
    this.#onLeave = options.onLeave ?? (() => {});
    this.#onLoading = options.onLoading ?? (() => {});
    this.#subscription = bus.subscribe(subjects.hello, (message) => this.#onHello(message.data));
  }

  /** The workers that are there, in the order they came. */
  get workers(): readonly Hello[] {
    return [...this.#workers.values()];
  }

  /** The newest epoch that any worker has seen. */
  get newestEpoch(): number {
    return Math.max(0, ...this.workers.map((worker) => worker.epoch));
  }

  /** Asks who is there and resolves when at least `count` workers are. */
  async waitFor(count: number, options: WaitOptions): Promise<readonly Hello[]> {
    const { timeoutMs, signal } = options;
    signal?.throwIfAborted();
    this.#bus.publish(this.#discover, new Uint8Array());
    // Two hops: the question and the answers of those that are in reach already.
    await this.#bus.flush();
    await this.#bus.flush();
    const deadline = Date.now() + timeoutMs;
    while (this.#workers.size < count) {
      await this.#change(Math.max(0, deadline - Date.now()), signal);
      if (Date.now() >= deadline && this.#workers.size < count) throw new ClusterError(this.#missing(count, timeoutMs));
    }
    return this.workers;
  }

  /** Stops listening. */
  close(): void {
    this.#subscription.unsubscribe();
    for (const wake of this.#changed.splice(0)) wake();
  }

  /** Resolves at the next announcement, or after `timeoutMs`. */
  #change(timeoutMs: number, signal: AbortSignal | undefined): Promise<void> {
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
      const timer = setTimeout(done, timeoutMs);
      signal?.addEventListener("abort", abort, { once: true });
      this.#changed.push(done);
    });
  }

  #onHello(data: Uint8Array): void {
    let hello: Hello;
    try {
      hello = decodeJson(helloSchema, data);
    } catch (error) {
      if (error instanceof WireError) return; // not a worker of ours
      throw error;
    }
    const { id, versions } = hello;
    if (hello.state === "leaving") {
      this.#refused.delete(id);
      if (this.#workers.delete(id)) this.#onLeave(id);
    } else if (versions.wire !== WIRE_VERSION || versions.abi !== WORKER_ABI_VERSION) {
      this.#workers.delete(id);
      this.#refused.set(
        id,
        `${id} has wire version ${versions.wire} and ABI version ${versions.abi}, not ${WIRE_VERSION} and ${WORKER_ABI_VERSION}`,
      );
    } else {
      this.#refused.delete(id);
      this.#workers.set(id, hello);
      if (hello.loading !== undefined) this.#onLoading(id, hello.loading);
    }
    for (const wake of this.#changed.splice(0)) wake();
  }

  #missing(count: number, timeoutMs: number): string {
    const there = `${this.#workers.size} of ${count} workers are there after ${timeoutMs / 1000} s`;
    return this.#refused.size === 0 ? there : `${there}; refused: ${[...this.#refused.values()].join("; ")}`;
  }
}
