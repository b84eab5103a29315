/**
 * What a cluster knows beyond the lives of its members, in JetStream's key-value store, on servers that have it (2.11 and newer,
 * JetStream on): who serves it, which devices belong to it at the moment, and how the model lay on them last. Without one everything
 * works on heartbeats alone, and {@linkcode NatsBus.store} gives nothing.
 *
 * Keys of the bucket `lutra-C-live`, which are forgotten when nobody renews them: `lease` (the orchestrator's id) and `member.W` (the
 * worker's version of Lutra). Of the bucket `lutra-C`: `plan` ({@linkcode ClusterPlan}).
 *
 * @module
 */
import { Kvm } from "@nats-io/kv";
import type { KV, KvEntry } from "@nats-io/kv";
import { jetstream, JetStreamApiError } from "@nats-io/jetstream";
import type { NatsConnection } from "@nats-io/transport-node";
import { z } from "zod";
import { decodeJson } from "./control.ts";
import { BusClosedError, BusError, WireError } from "./errors.ts";
import { LUTRA_VERSION } from "./version.ts";

/** The first server whose JetStream is used. */
export const STORE_SERVER = [2, 11] as const;
/** Options of {@linkcode NatsClusterStore}. */
export interface StoreOptions {
  /** Milliseconds after which a lease or member that nobody renews is forgotten. @default {5000} */
  lifeMs?: number;
  /** Milliseconds between two renewals. @default {1200} */
  renewMs?: number;
}

/** Between two questions whether a holder that does not answer is gone, and how often. */
const GONE_MS = 300;
const GONE_TIMES = 2;
/** JetStream's codes for a value that another has changed. */
const WRONG_SEQUENCE: readonly number[] = [10071, 10164];
const TIMEOUT_MS = 1000;

const planSchema = z.strictObject({
  epoch: z.number().int().min(1).max(0xffff_ffff),
  model: z.string().max(4096),
  /** A pipeline after the other, each from the first layer to the last. */
  replicas: z.array(
    z.array(z.strictObject({ worker: z.string().max(64), first: z.number().int(), end: z.number().int() })).min(1)
      .max(256),
  ).min(1).max(256),
});
/** How a model lies on the workers. */
export type ClusterPlan = z.infer<typeof planSchema>;

/** Whether a cluster's orchestrator answers: it does, nobody is there, or somebody is silent. */
export type HolderState = "answers" | "gone" | "silent";

/** The right to serve a cluster. */
export interface Lease {
  /** Resolves when another has taken it, as may happen to a holder that was suspended or cut off. */
  readonly lost: Promise<void>;
  /** Gives it up, so that the next need not wait. */
  release(): Promise<void>;
}

/** Another orchestrator holds the lease. */
export class LeaseHeldError extends BusError {
  override name = "LeaseHeldError";
}

/** What outlives a cluster's members. All methods throw {@linkcode BusError} when the store cannot be reached. */
export interface ClusterStore {
  /**
   * Takes the lease to serve the cluster. One whose holder is gone is taken over at once; one whose holder is silent, when it is over.
   *
   * @param asks Whether the present holder answers.
   * @throws {LeaseHeldError} when it does.
   */
  acquire(holder: string, asks: () => Promise<HolderState>, signal?: AbortSignal): Promise<Lease>;
  /** The last plan, if one is known. */
  plan(): Promise<ClusterPlan | undefined>;
  savePlan(plan: ClusterPlan): Promise<void>;
  /** Tells that a worker belongs to the cluster, again and again until it is disposed of. */
  join(worker: string): AsyncDisposable;
  /** Workers that belong to it. */
  members(): Promise<string[]>;
}

/** Whether a server of this version has what the store needs. */
export function storesKeys(serverVersion: string): boolean {
  const [major = 0, minor = 0] = serverVersion.split(".").map(Number);
  return major > STORE_SERVER[0] || (major === STORE_SERVER[0] && minor >= STORE_SERVER[1]);
}

/** The store on a connection to a server that has one. */
export class NatsClusterStore implements ClusterStore {
  readonly #connection: NatsConnection;
  readonly #kvm: Kvm;
  readonly #cluster: string;
  readonly #lifeMs: number;
  readonly #renewMs: number;
  readonly #buckets = new Map<string, Promise<KV>>();

  constructor(connection: NatsConnection, cluster: string, options: StoreOptions = {}) {
    this.#connection = connection;
    this.#kvm = new Kvm(jetstream(connection, { timeout: TIMEOUT_MS }));
    this.#cluster = cluster;
    this.#lifeMs = options.lifeMs ?? 5000;
    this.#renewMs = options.renewMs ?? 1200;
  }

  async acquire(holder: string, asks: () => Promise<HolderState>, signal?: AbortSignal): Promise<Lease> {
    let gone = 0;
    let before = -1;
    for (;;) {
      signal?.throwIfAborted();
      // Even one whose lease went with the server's memory may serve still, and renew it in a moment.
      const answer = await asks();
      if (answer === "answers") throw new LeaseHeldError(`cluster ${this.#cluster} is served already`);
      let revision = await this.#unlessTaken(() => this.#live((kv) => kv.create("lease", holder)));
      if (revision === undefined) {
        const entry = await this.#live((kv) => kv.get("lease"));
        if (entry === null || entry.operation !== "PUT") continue; // it ended this moment
        if (holds(entry, holder)) return this.#hold(holder, entry.revision); // what seemed to fail was done
        gone = answer === "gone" && entry.revision === before ? gone + 1 : 0;
        before = entry.revision;
        if (gone >= GONE_TIMES) {
          revision = await this.#unlessTaken(() => this.#live((kv) => kv.update("lease", holder, entry.revision)));
        }
      }
      if (revision !== undefined) return this.#hold(holder, revision);
      await new Promise((resolve) => setTimeout(resolve, GONE_MS));
    }
  }

  async plan(): Promise<ClusterPlan | undefined> {
    const entry = await this.#kept((kv) => kv.get("plan"));
    if (entry === null || entry.operation !== "PUT") return undefined;
    try {
      return decodeJson(planSchema, entry.value);
    } catch (error) {
      if (error instanceof WireError) return undefined; // of another version: it will be written anew
      throw error;
    }
  }

  async savePlan(plan: ClusterPlan): Promise<void> {
    await this.#kept((kv) => kv.put("plan", JSON.stringify(plan)));
  }

  join(worker: string): AsyncDisposable {
    const key = `member.${worker}`;
    const tell = () =>
      this.#live((kv) => kv.put(key, LUTRA_VERSION)).catch((error) => {
        if (error instanceof BusClosedError) clearInterval(timer);
        else if (!(error instanceof BusError)) throw error; // the next may do
      });
    const timer = setInterval(() => last = tell(), this.#renewMs);
    let last: Promise<unknown> = tell();
    return {
      [Symbol.asyncDispose]: async () => {
        clearInterval(timer);
        await last;
        await this.#live((kv) => kv.delete(key)).catch(() => {}); // it is forgotten anyway
      },
    };
  }

  members(): Promise<string[]> {
    return this.#live(async (kv) => {
      // A key that is renewed meanwhile is listed again.
      const ids = new Set<string>();
      for await (const key of await kv.keys("member.*")) ids.add(key.slice("member.".length));
      return [...ids].sort();
    });
  }

  /** Renews a lease until it is released or lost. */
  #hold(holder: string, first: number): Lease {
    const { promise: lost, resolve } = Promise.withResolvers<void>();
    let revision = first;
    let over = false;
    let last: Promise<void> = Promise.resolve();
    const renew = async () => {
      let next = await this.#unlessTaken(() => this.#live((kv) => kv.update("lease", holder, revision))) ??
        // One that nobody took when it was over, or that went with the server's memory, is still free.
        await this.#unlessTaken(() => this.#live((kv) => kv.create("lease", holder)));
      if (next === undefined) {
        // A renewal that seemed to fail may have been done.
        const entry = await this.#live((kv) => kv.get("lease"));
        if (entry !== null && holds(entry, holder)) next = entry.revision;
      }
      if (over) return;
      if (next !== undefined) return void (revision = next);
      over = true;
      clearInterval(timer);
      resolve();
    };
    const timer = setInterval(() => {
      last = last.then(renew).catch((error) => {
        if (error instanceof BusClosedError) clearInterval(timer);
        else if (!(error instanceof BusError)) throw error; // the server is away: the next may do
      });
    }, this.#renewMs);
    return {
      lost,
      release: async () => {
        clearInterval(timer);
        await last;
        if (over) return;
        over = true;
        await this.#live((kv) => kv.delete("lease", { previousSeq: revision })).catch(() => {}); // it ends anyway
      },
    };
  }

  /** The revision that `write` gives; `undefined` when another has the key. */
  async #unlessTaken(write: () => Promise<number>): Promise<number | undefined> {
    try {
      return await write();
    } catch (error) {
      if (error instanceof BusError && isTaken(error.cause)) return undefined;
      throw error;
    }
  }

  #live<T>(act: (kv: KV) => Promise<T>): Promise<T> {
    return this.#with(`lutra-${this.#cluster}-live`, { history: 1, ttl: this.#lifeMs, storage: "memory" }, act);
  }

  #kept<T>(act: (kv: KV) => Promise<T>): Promise<T> {
    return this.#with(`lutra-${this.#cluster}`, { history: 1, storage: "file" }, act);
  }

  /** Acts on a bucket, which is made where it is not there; after trouble it is looked for anew. */
  async #with<T>(
    name: string,
    options: { history: number; ttl?: number; storage: "memory" | "file" },
    act: (kv: KV) => Promise<T>,
  ): Promise<T> {
    if (this.#connection.isClosed()) throw new BusClosedError("the bus is closed");
    try {
      let bucket = this.#buckets.get(name);
      if (bucket === undefined) {
        bucket = this.#kvm.create(name, { ...options, timeout: TIMEOUT_MS });
        this.#buckets.set(name, bucket);
      }
      return await act(await bucket);
    } catch (cause) {
      if (!isTaken(cause)) this.#buckets.delete(name);
      const reason = cause instanceof Error ? cause.message : String(cause);
      throw new BusError(`the cluster's store fails: ${reason}`, { cause });
    }
  }
}

function holds(entry: KvEntry, holder: string): boolean {
  return entry.operation === "PUT" && new TextDecoder().decode(entry.value) === holder;
}

function isTaken(error: unknown): boolean {
  return error instanceof JetStreamApiError && WRONG_SEQUENCE.includes(error.code);
}
