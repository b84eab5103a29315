import { BusError, decodeJson, WireError } from "../bus/mod.ts";
import type { Bus, WeightsRef } from "../bus/mod.ts";
import type { ChunkFiles } from "./chunk_files.ts";
import { WeightsError } from "./errors.ts";
import { CHUNK_BYTES, chunkCount, HASH_BYTES, Manifest } from "./manifest.ts";
import { encodeWish, modelSubjects, offerSchema } from "./protocol.ts";
import type { Offer, Wish } from "./protocol.ts";
import { pause, YIELD } from "./source.ts";

/** Options of {@linkcode fetchManifest} and {@linkcode fetchChunks}. */
export interface FetchOptions {
  bus: Bus;
  cluster: string;
  signal?: AbortSignal;
  /** Whether tokens are on their way, which weights then yield to. Default: never. */
  busy?: () => boolean;
  /** Milliseconds without a chunk after which it is given up. @default {60000} */
  patienceMs?: number;
  log?: (message: string) => void;
}

/** Milliseconds to wait for offers, and before asking again when there are none. */
const OFFERS_MS = 100;
const AGAIN_MS = 300;
/**
 * Milliseconds for an answer: at first as many as a chunk takes at 1 Mbit/s with others before it, then so many times as long as the
 * slowest took of late, but never so few that a busy device would seem dead.
 */
const ANSWER_MS = 10_000;
const PATIENCE = 8;
const LEAST_ANSWER_MS = 3000;
/** Milliseconds after which is asked again who has what: others may have it by now. */
const ROUND_MS = 5000;
/** Milliseconds for which a source is left alone that did not answer, or sent damaged bytes. */
const SILENT_MS = 1000;
const DAMAGED_MS = 5000;
/** Times that a chunk may come damaged. */
const MOST_DAMAGED = 3;
/** Chunks asked for at the same time, of one source and of all. */
const LANES_OF_SOURCE = 2;
const LANES = 4;

/** Asks who has chunks of a file. */
async function offers({ bus, cluster, signal }: FetchOptions, root: string): Promise<Offer[]> {
  const subjects = modelSubjects(cluster, root);
  const inbox = subjects.answer(crypto.randomUUID());
  const found: Offer[] = [];
  const subscription = bus.subscribe(inbox, (message) => {
    try {
      found.push(decodeJson(offerSchema, message.data));
    } catch (error) {
      if (!(error instanceof WireError)) throw error; // anybody may publish here
    }
  });
  try {
    bus.publish(subjects.who, new Uint8Array(), { reply: inbox });
    await bus.flush();
    await pause(OFFERS_MS, signal);
  } finally {
    subscription.unsubscribe();
  }
  return found;
}

async function ask(
  { bus, cluster, signal }: FetchOptions,
  root: string,
  source: string,
  wish: Wish,
  timeoutMs = ANSWER_MS,
): Promise<Uint8Array<ArrayBuffer>> {
  const subject = modelSubjects(cluster, root).source(source);
  const options = { timeoutMs, ...(signal === undefined ? {} : { signal }) };
  return (await bus.request(subject, encodeWish(wish), options)).data.slice();
}

/**
 * Fetches the manifest of a model.
 *
 * @throws {WeightsError} when nobody has it.
 */
export async function fetchManifest(
  { root, files }: WeightsRef,
  options: FetchOptions,
): Promise<Manifest> {
  const { signal, patienceMs = 60_000, bus } = options;
  checkPayload(bus);
  const hashes = new Uint8Array(HASH_BYTES * files.reduce((sum, bytes) => sum + chunkCount(bytes), 0));
  const deadline = performance.now() + patienceMs;
  let trouble = "nobody offers it: is the device on that has the model's file?";
  for (;;) {
    signal?.throwIfAborted();
    try {
      sources: for (const { source } of await offers(options, root)) {
        try {
          for (let at = 0, index = 0; at < hashes.byteLength; index++) {
            const piece = await ask(options, root, source, { kind: "hashes", index });
            if (piece.byteLength !== Math.min(CHUNK_BYTES, hashes.byteLength - at)) {
              trouble = `${source} answers with ${piece.byteLength} bytes`;
              continue sources;
            }
            hashes.set(piece, at);
            at += piece.byteLength;
          }
          const manifest = new Manifest(files, hashes);
          if (manifest.root === root) return manifest;
          trouble = `${source} sends hashes of another model`;
        } catch (error) {
          if (!(error instanceof BusError)) throw error;
          trouble = `${source}: ${error.message}`;
        }
      }
    } catch (error) {
      if (!(error instanceof BusError)) throw error;
      trouble = error.message;
    }
    if (performance.now() > deadline) throw new WeightsError(`the model's hashes cannot be fetched: ${trouble}`);
    await pause(AGAIN_MS, signal);
  }
}

/**
 * Fetches chunks into files, from all that have some of them. Every chunk is checked before it is written; one that comes damaged
 * is asked of others.
 *
 * @param onChunk Told of every chunk that is there.
 * @throws {WeightsError} when nobody has them, or the disk does not take them.
 */
export async function fetchChunks(
  file: ChunkFiles,
  chunks: readonly number[],
  options: FetchOptions & { onChunk?: (chunk: number) => void },
): Promise<void> {
  checkPayload(options.bus);
  await new Transfer(file, chunks, options).run();
}

function checkPayload({ maxPayload }: Bus): void {
  if (maxPayload >= CHUNK_BYTES) return;
  throw new WeightsError(
    `the NATS server takes messages of ${maxPayload} bytes; weights need ${CHUNK_BYTES}: raise its max_payload`,
  );
}

interface Source {
  readonly id: string;
  readonly ranges: readonly (readonly [number, number])[];
  /** Not to be asked any more in this round. */
  ended: boolean;
}

/** What {@linkcode fetchChunks} does. */
class Transfer {
  readonly #file: ChunkFiles;
  readonly #options: FetchOptions & { onChunk?: (chunk: number) => void };
  readonly #missing: Set<number>;
  readonly #asked = new Set<number>();
  /** Until when sources are left alone. */
  readonly #avoided = new Map<string, number>();
  /** Which sources sent a chunk damaged. */
  readonly #damaged = new Map<number, string[]>();
  #last = performance.now();
  /** Milliseconds that an answer takes at most, of late. */
  #slowest: number | undefined;
  #trouble = "nobody offers them: is a device on that has them?";
  #failure: unknown;

  constructor(
    file: ChunkFiles,
    chunks: readonly number[],
    options: FetchOptions & { onChunk?: (chunk: number) => void },
  ) {
    this.#file = file;
    this.#options = options;
    this.#missing = new Set(chunks);
  }

  async run(): Promise<void> {
    const { signal, patienceMs = 60_000 } = this.#options;
    while (this.#missing.size > 0) {
      signal?.throwIfAborted();
      if (this.#failure !== undefined) throw this.#failure;
      const sources = await this.#sources();
      if (sources.length > 0) await this.#round(sources);
      else {
        if (performance.now() - this.#last > patienceMs) {
          throw new WeightsError(
            `${this.#missing.size} chunks of ${this.#file.manifest.chunks} cannot be fetched: ${this.#trouble}`,
          );
        }
        await pause(AGAIN_MS, signal);
      }
    }
  }

  /** Some that have what is missing. */
  async #sources(): Promise<Source[]> {
    const now = performance.now();
    let found: Offer[];
    try {
      found = await offers(this.#options, this.#file.manifest.root);
    } catch (error) {
      if (!(error instanceof BusError)) throw error;
      this.#trouble = error.message;
      return [];
    }
    const able = found.filter(({ source }) => (this.#avoided.get(source) ?? 0) <= now)
      .map(({ source, ranges }): Source => ({ id: source, ranges, ended: false }))
      .filter((source) => this.#next(source) !== undefined);
    // Others at another time, so that not all ask the same ones.
    for (let i = able.length - 1; i > 0; i--) {
      const other = Math.floor(Math.random() * (i + 1));
      [able[i], able[other]] = [able[other]!, able[i]!];
    }
    return able.slice(0, LANES);
  }

  async #round(sources: readonly Source[]): Promise<void> {
    const { bus, signal } = this.#options;
    const lost = new AbortController();
    const watching = bus.watch((state) => {
      if (state === "connected") lost.abort(new BusError("the bus was away"));
    });
    const signals = [lost.signal, ...(signal === undefined ? [] : [signal])];
    const options = { ...this.#options, signal: AbortSignal.any(signals) };
    const lanes = Math.max(1, Math.min(LANES_OF_SOURCE, Math.floor(LANES / sources.length)));
    const until = performance.now() + ROUND_MS;
    try {
      await Promise.all(
        sources.flatMap((source) => Array.from({ length: lanes }, () => this.#lane(source, until, options))),
      );
    } finally {
      watching.unsubscribe();
    }
  }

  async #lane(source: Source, until: number, options: FetchOptions): Promise<void> {
    const { busy = () => false } = options;
    while (!source.ended && this.#failure === undefined && performance.now() < until) {
      const chunk = this.#next(source);
      if (chunk === undefined) return;
      const start = performance.now();
      this.#asked.add(chunk);
      try {
        await this.#take(source, chunk, options);
      } catch (error) {
        source.ended = true;
        if (this.#options.signal?.aborted === true) return;
        if (!(error instanceof BusError)) {
          this.#failure ??= error;
          return;
        }
        this.#trouble = `${source.id}: ${error.message}`;
        if (options.signal?.aborted !== true) this.#avoid(source, SILENT_MS);
        return;
      } finally {
        this.#asked.delete(chunk);
      }
      if (busy()) await pause(YIELD * (performance.now() - start), options.signal);
    }
  }

  /** Asks for a chunk, checks and writes it. */
  async #take(source: Source, chunk: number, options: FetchOptions): Promise<void> {
    const { manifest } = this.#file;
    const start = performance.now();
    const timeoutMs = this.#slowest === undefined
      ? ANSWER_MS
      : Math.min(ANSWER_MS, Math.max(LEAST_ANSWER_MS, PATIENCE * this.#slowest));
    const data = await ask(options, manifest.root, source.id, { kind: "chunk", index: chunk }, timeoutMs);
    this.#slowest = Math.max(0.95 * (this.#slowest ?? 0), performance.now() - start);
    if (data.byteLength === 0) {
      this.#trouble = `${source.id} has lost chunk ${chunk}`;
      return this.#avoid(source, DAMAGED_MS);
    }
    if (!await manifest.fits(chunk, data)) {
      const from = [...this.#damaged.get(chunk) ?? [], source.id];
      this.#damaged.set(chunk, from);
      this.#avoid(source, DAMAGED_MS);
      this.#trouble = `chunk ${chunk} comes damaged from ${[...new Set(from)].join(", ")}`;
      (options.log ?? console.warn)(`${this.#trouble}: it is asked for again`);
      if (from.length >= MOST_DAMAGED) {
        throw new WeightsError(`${this.#trouble}: check the model's file there, or let another device have it`);
      }
      return;
    }
    await this.#file.write(chunk, data);
    this.#missing.delete(chunk);
    this.#last = performance.now();
    options.signal?.throwIfAborted();
    this.#options.onChunk?.(chunk);
  }

  #avoid(source: Source, ms: number): void {
    source.ended = true;
    this.#avoided.set(source.id, performance.now() + ms);
  }

  /** The first chunk that is missing, asked of nobody, and there. */
  #next({ ranges }: Source): number | undefined {
    for (const chunk of this.#missing) {
      if (!this.#asked.has(chunk) && ranges.some(([first, end]) => chunk >= first && chunk < end)) return chunk;
    }
    return undefined;
  }
}
