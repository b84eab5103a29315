import { mkdir, readdir, rm, stat, statfs } from "node:fs/promises";
import { basename, join, resolve } from "node:path";
import type { Bus, WeightsRef } from "../bus/mod.ts";
import { anyThere, ChunkFiles } from "./chunk_files.ts";
import { WeightsError } from "./errors.ts";
import { fetchChunks, fetchManifest } from "./fetch.ts";
import { CHUNK_BYTES } from "./manifest.ts";
import type { Manifest } from "./manifest.ts";
import { keepManifest, keptManifest } from "./manifest_cache.ts";
import { WeightSource } from "./source.ts";

/** Options of {@linkcode WeightStore}. */
export interface WeightStoreOptions {
  bus: Bus;
  cluster: string;
  /** Name of this device. */
  id: string;
  /** The cache folder. */
  cache: string;
  /** Bytes of fetched weights that are kept; those of other models go first, the longest unused before the rest. */
  maxBytes: number;
  /** Whether other devices may fetch from this one. @default {true} */
  share?: boolean;
  /** Whether tokens are on their way, which weights then yield to. Default: never. */
  busy?: () => boolean;
  log?: (message: string) => void;
}

/** How far {@linkcode WeightStore.provide} is. */
export interface WeightProgress {
  /** `checking` what is on the disk, or `fetching` the rest. */
  readonly phase: "checking" | "fetching";
  /** Bytes that are there, and that are needed. */
  readonly done: number;
  readonly total: number;
  /** Milliseconds that the rest will take at the present speed; `null` before it is known. */
  readonly etaMs: number | null;
}

/** Options of {@linkcode WeightStore.provide}. */
export interface ProvideOptions {
  signal?: AbortSignal;
  onProgress?: (progress: WeightProgress) => void;
}

/** A range of bytes in one of a model's files. */
export interface Span {
  /** Its number. @default {0} */
  readonly file?: number | undefined;
  readonly offset: number;
  readonly bytes: number;
}

/** Bytes that are left free on the disk. */
const LEAVE_FREE = 1e9;

/**
 * The parts of models that this device needs: its own files, where it has those that it needs and they are the same, or else files
 * with holes in the cache folder, whose missing chunks are fetched. What it has, others may fetch from it.
 */
export class WeightStore {
  readonly #options: WeightStoreOptions;
  readonly #sources = new Map<string, WeightSource>();
  /** One after the other: two would fetch the same. */
  #last: Promise<unknown> = Promise.resolve();
  #closed = false;
  #fetched = 0;

  constructor(options: WeightStoreOptions) {
    this.#options = options;
  }

  /** Chunks that were fetched, and those that were sent to others. */
  get traffic(): { fetched: number; sent: number } {
    return { fetched: this.#fetched, sent: [...this.#sources.values()].reduce((sum, { sent }) => sum + sent, 0) };
  }

  /**
   * Sees to it that ranges of a model's files are on this device.
   *
   * @param own Where this device may have the files themselves.
   * @returns The paths of files that have them, all in one folder.
   * @throws {WeightsError} when they cannot be had.
   */
  provide(
    ref: WeightsRef,
    own: readonly string[],
    spans: readonly Span[],
    options: ProvideOptions = {},
  ): Promise<readonly string[]> {
    const done = this.#last.then(() => this.#provide(ref, own, spans, options));
    this.#last = done.catch(() => {});
    return done;
  }

  /** Ends what it does for others. */
  async close(): Promise<void> {
    this.#closed = true;
    await this.#last;
    for (const source of this.#sources.values()) await source.close();
    this.#sources.clear();
  }

  async #provide(
    ref: WeightsRef,
    own: readonly string[],
    spans: readonly Span[],
    { signal, onProgress = () => {} }: ProvideOptions,
  ): Promise<readonly string[]> {
    signal?.throwIfAborted();
    const { cache, log = console.warn } = this.#options;
    const manifest = await this.#manifest(ref, signal);
    const chunks = chunksOf(spans, manifest);
    const total = chunks.reduce((sum, chunk) => sum + manifest.place(chunk).bytes, 0);
    let done = 0;
    let begun: { at: number; done: number } | undefined;
    const onChunk = (chunk: number) => {
      done += manifest.place(chunk).bytes;
      const rate = begun === undefined ? 0 : (done - begun.done) / (performance.now() - begun.at);
      const phase = begun === undefined ? "checking" : "fetching";
      onProgress({ phase, done, total, etaMs: rate > 0 ? (total - done) / rate : null });
    };
    const checking = { onChecked: onChunk, ...(signal === undefined ? {} : { signal }) };
    const file = await this.#own(own, manifest);
    let shared = false;
    if (file !== undefined) {
      try {
        const lacking = await file.lacks(chunks, checking);
        if (lacking.length === 0) {
          await this.#save(file);
          shared = await this.#share(file);
          return file.paths;
        }
      } finally {
        if (!shared) await file.close();
      }
      log(`${own.join(", ")}: not all that is needed of the model that is served: its layers are fetched`);
      done = 0;
    }
    const fetched = await ChunkFiles.open(fetchedPaths(cache, ref), manifest, cache, "fetched");
    try {
      const lacking = await fetched.lacks(chunks, checking);
      if (lacking.length > 0) await this.#makeRoom(ref.root, total, lacking.length * CHUNK_BYTES);
      else await this.#save(fetched);
      // Others get what comes as soon as it is there.
      shared = await this.#share(fetched);
      if (lacking.length === 0) return fetched.paths;
      begun = { at: performance.now(), done };
      onProgress({ phase: "fetching", done, total, etaMs: null });
      await fetchChunks(fetched, lacking, {
        ...this.#fetching(signal),
        onChunk: (chunk) => {
          this.#fetched++;
          onChunk(chunk);
        },
      }).finally(() => this.#save(fetched));
      return fetched.paths;
    } finally {
      if (!shared) await fetched.close();
    }
  }

  #fetching(signal: AbortSignal | undefined) {
    const { bus, cluster, busy, log } = this.#options;
    return {
      bus,
      cluster,
      ...(busy === undefined ? {} : { busy }),
      ...(log === undefined ? {} : { log }),
      ...(signal === undefined ? {} : { signal }),
    };
  }

  async #manifest(ref: WeightsRef, signal: AbortSignal | undefined): Promise<Manifest> {
    const { cache } = this.#options;
    const kept = await keptManifest(cache, ref);
    if (kept !== undefined) return kept;
    const manifest = await fetchManifest(ref, this.#fetching(signal));
    await this.#tell(keepManifest(cache, manifest));
    return manifest;
  }

  /** The device's own files, if they may be those that are meant. */
  async #own(paths: readonly string[], manifest: Manifest): Promise<ChunkFiles | undefined> {
    if (!await anyThere(paths)) return undefined;
    try {
      return await ChunkFiles.open(paths, manifest, this.#options.cache, "own");
    } catch (error) {
      if (!(error instanceof WeightsError)) throw error;
      (this.#options.log ?? console.warn)(`${error.message}: its layers are fetched`);
      return undefined;
    }
  }

  /** Notes what was checked; without a note it is checked again the next time. */
  async #save(file: ChunkFiles): Promise<void> {
    await this.#tell(file.save());
  }

  async #tell(done: Promise<void>): Promise<void> {
    try {
      await done;
    } catch (error) {
      const { cache, log = console.warn } = this.#options;
      log(`${cache}: ${(error as Error).message}`);
    }
  }

  /** Gives others what the file has, in place of what was given before; the source then closes it. False: not done. */
  async #share(file: ChunkFiles): Promise<boolean> {
    const { bus, cluster, id, share = true, busy, log } = this.#options;
    const { root } = file.manifest;
    await this.#sources.get(root)?.close();
    this.#sources.delete(root);
    if (!share || this.#closed) return false;
    this.#sources.set(
      root,
      new WeightSource({
        ...{ bus, cluster, id, file },
        ...(busy === undefined ? {} : { busy }),
        ...(log === undefined ? {} : { log }),
      }),
    );
    return true;
  }

  /** Deletes what was fetched of other models, the longest unused first, until there is room. */
  async #makeRoom(root: string, total: number, missing: number): Promise<void> {
    const { cache, maxBytes } = this.#options;
    const folder = join(cache, "fetched");
    await mkdir(folder, { recursive: true });
    const others: { path: string; used: number; bytes: number }[] = [];
    for (const name of await readdir(folder)) {
      if (name === root || !/^[0-9a-f]{64}$/.test(name) || this.#sources.has(name)) continue;
      const path = join(folder, name);
      others.push({ path, ...await roomOf(path) });
    }
    others.sort((a, b) => a.used - b.used);
    const free = async () => {
      const { bavail, bsize } = await statfs(folder);
      return bavail * bsize - LEAVE_FREE;
    };
    let kept = others.reduce((sum, { bytes }) => sum + bytes, total);
    for (const { path, bytes } of others) {
      if (kept <= maxBytes && await free() >= missing) break;
      await rm(path, { force: true, recursive: true });
      await rm(join(cache, "manifests", basename(path)), { force: true });
      kept -= bytes;
    }
    const left = await free();
    if (left >= missing) return;
    const gigabytes = (bytes: number) => (bytes / 1e9).toFixed(2);
    throw new WeightsError(
      `${resolve(folder)} has ${
        gigabytes(Math.max(0, left))
      } GB left beside a reserve of 1 GB, but this device's layers need ` +
        `${gigabytes(missing)} GB: make room, or let LUTRA_CACHE name a folder on another disk`,
    );
  }
}

/** Where what was fetched of a model lies: its files, by their numbers. */
export function fetchedPaths(cache: string, { root, files }: WeightsRef): string[] {
  return files.map((_, file) => join(cache, "fetched", root, `${file}`));
}

/** When a fetched model was written to last, and the bytes that it takes on the disk: holes take none. */
async function roomOf(folder: string): Promise<{ used: number; bytes: number }> {
  // Another process may delete it meanwhile.
  const names = await readdir(folder).catch(() => []);
  const files = await Promise.all(names.map((name) => stat(join(folder, name)).catch(() => undefined)));
  return {
    used: Math.max(0, ...files.map((file) => file?.mtimeMs ?? 0)),
    bytes: files.reduce((sum, file) => sum + 512 * (file?.blocks ?? 0), 0),
  };
}

/** The chunks that ranges of a model's files touch. */
export function chunksOf(spans: readonly Span[], manifest: Manifest): number[] {
  const chunks = new Set<number>();
  for (const { file = 0, offset, bytes } of spans) {
    const size = manifest.files[file];
    if (size === undefined) throw new WeightsError(`a tensor is in file ${file} of ${manifest.files.length}`);
    if (offset + bytes > size) {
      throw new WeightsError(`a tensor at ${offset} + ${bytes} bytes ends behind its file's ${size}`);
    }
    const first = manifest.firstChunk(file);
    const end = first + Math.ceil((offset + bytes) / CHUNK_BYTES);
    for (let chunk = first + Math.floor(offset / CHUNK_BYTES); chunk < end; chunk++) chunks.add(chunk);
  }
  return [...chunks].sort((a, b) => a - b);
}
