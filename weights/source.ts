import type { Bus, BusMessage, Subscription } from "../bus/mod.ts";
import { BusError, WireError } from "../bus/mod.ts";
import type { ChunkFiles } from "./chunk_files.ts";
import { CHUNK_BYTES } from "./manifest.ts";
import { decodeWish, modelSubjects } from "./protocol.ts";
import type { Offer, Wish } from "./protocol.ts";

/** Options of {@linkcode WeightSource}. */
export interface WeightSourceOptions {
  bus: Bus;
  cluster: string;
  /** Name of this device among the sources. */
  id: string;
  file: ChunkFiles;
  /** Whether tokens are on their way, which weights then yield to. Default: never. */
  busy?: () => boolean;
  log?: (message: string) => void;
}

/** Wishes that may wait; those who ask have two at a time. */
const MAX_WAITING = 256;
/** While tokens are on their way, a pause of so many times as long as the chunk before took: weights get a tenth of the time. */
export const YIELD = 9;

/**
 * Gives chunks of a model's files to whoever asks for them. One at a time, and the next only when the one before has reached the server:
 * so that a token that is published meanwhile waits for one chunk at the most, however many devices ask.
 */
export class WeightSource {
  readonly #options: WeightSourceOptions;
  readonly #subscriptions: Subscription[];
  readonly #waiting: { wish: Wish; message: BusMessage }[] = [];
  #loop: Promise<void> | undefined;
  #closed = false;
  #sent = 0;

  constructor(options: WeightSourceOptions) {
    this.#options = options;
    const { bus, cluster, id, file } = options;
    const subjects = modelSubjects(cluster, file.manifest.root);
    this.#subscriptions = [
      bus.subscribe(subjects.who, (message) => {
        const offer: Offer = { source: id, ranges: file.checked.ranges().slice(0, 65_536) };
        message.respond(new TextEncoder().encode(JSON.stringify(offer)));
      }),
      bus.subscribe(subjects.source(id), (message) => this.#onWish(message)),
    ];
  }

  /** Chunks sent. */
  get sent(): number {
    return this.#sent;
  }

  /** Stops giving, and closes the files. */
  async close(): Promise<void> {
    if (this.#closed) return await this.#loop;
    this.#closed = true;
    // Those who wait for it ask another at once.
    for (const { message } of this.#waiting.splice(0)) {
      try {
        message.respond(new Uint8Array());
      } catch (error) {
        if (!(error instanceof BusError)) throw error;
      }
    }
    for (const subscription of this.#subscriptions) subscription.unsubscribe();
    await this.#loop;
    await this.#options.file.close();
  }

  #onWish(message: BusMessage): void {
    let wish: Wish;
    try {
      wish = decodeWish(message.data);
    } catch (error) {
      if (error instanceof WireError) return; // anybody may publish here
      throw error;
    }
    if (this.#closed || this.#waiting.length >= MAX_WAITING) return; // it asks again, or another
    this.#waiting.push({ wish, message });
    this.#loop ??= this.#run();
  }

  async #run(): Promise<void> {
    const { bus, busy = () => false, log = console.warn } = this.#options;
    for (let next = this.#waiting.shift(); next !== undefined; next = this.#waiting.shift()) {
      const start = performance.now();
      try {
        const data = await this.#bytes(next.wish);
        next.message.respond(data ?? new Uint8Array());
        if (data !== undefined && next.wish.kind === "chunk") this.#sent++;
        await bus.flush();
      } catch (error) {
        if (!(error instanceof BusError)) log(`weights could not be read for another device: ${error}`);
      }
      if (!this.#closed && busy()) await pause(YIELD * (performance.now() - start));
    }
    this.#loop = undefined;
  }

  async #bytes({ kind, index }: Wish): Promise<Uint8Array<ArrayBuffer> | undefined> {
    const { file } = this.#options;
    if (kind === "chunk") return index < file.manifest.chunks ? await file.read(index) : undefined;
    const piece = file.manifest.hashes.subarray(CHUNK_BYTES * index, CHUNK_BYTES * (index + 1));
    return piece.byteLength === 0 ? undefined : piece;
  }
}

/** Resolves after so many milliseconds, or when the signal aborts. */
export function pause(ms: number, signal?: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    const done = () => {
      clearTimeout(timer);
      signal?.removeEventListener("abort", done);
      resolve();
    };
    const timer = setTimeout(done, ms);
    signal?.addEventListener("abort", done);
  });
}
