import { createHash } from "node:crypto";
import { constants } from "node:fs";
import { mkdir, open, readFile, rename, rm, stat, writeFile } from "node:fs/promises";
import type { FileHandle } from "node:fs/promises";
import { dirname, join, resolve } from "node:path";
import { z } from "zod";
import { ChunkSet } from "./chunk_set.ts";
import { WeightsError } from "./errors.ts";
import { CHUNK_BYTES } from "./manifest.ts";
import type { Manifest } from "./manifest.ts";

/** Chunks that are checked at the same time. */
const LANES = 4;

const noteSchema = z.strictObject({ identity: z.string(), checked: z.string() });

/** What tells whether a file is the same: device, inode, size, times of modification and of change. */
export async function identityOf(path: string): Promise<string> {
  const { dev, ino, size, mtimeNs, ctimeNs } = await stat(path, { bigint: true });
  return [dev, ino, size, mtimeNs, ctimeNs].join(" ");
}

/** Writes a file that others see whole or not at all. Its folder is made. */
export async function replaceFile(path: string, data: Uint8Array | string): Promise<void> {
  await mkdir(dirname(path), { recursive: true });
  const temporary = `${path}.${crypto.randomUUID()}.tmp`;
  try {
    await writeFile(temporary, data);
    await rename(temporary, path);
  } catch (error) {
    await rm(temporary, { force: true });
    throw error;
  }
}

/**
 * A file on disk that has some of the chunks that a manifest tells of, each at its place. Which they are is found by their
 * hashes; a note in the cache folder spares hashing them again as long as the file is the same.
 */
export class ChunkFile {
  readonly path: string;
  readonly manifest: Manifest;
  readonly #file: FileHandle;
  readonly #mode: "own" | "fetched";
  readonly #note: string;
  readonly #checked: ChunkSet;
  /** The file's identity when all of `#checked` was right; `""` while chunks are being written. */
  #identity: string;

  private constructor(
    path: string,
    manifest: Manifest,
    file: FileHandle,
    mode: "own" | "fetched",
    note: string,
    known: z.infer<typeof noteSchema>,
  ) {
    this.path = path;
    this.manifest = manifest;
    this.#file = file;
    this.#mode = mode;
    this.#note = note;
    this.#checked = new ChunkSet(manifest.chunks, Uint8Array.from(atob(known.checked), (char) => char.charCodeAt(0)));
    this.#identity = known.identity;
  }

  /**
   * Opens a file of the manifest's length.
   *
   * @param cache The folder where notes are kept.
   * @param mode `own`: it is there, and is only read; `fetched`: it is made where it is not, with holes, and may be written to.
   * @throws {WeightsError} when that is not possible.
   */
  static async open(path: string, manifest: Manifest, cache: string, mode: "own" | "fetched"): Promise<ChunkFile> {
    const key = createHash("sha256").update(`${manifest.root} ${resolve(path)}`).digest("hex");
    const note = join(cache, "checked", key);
    let file: FileHandle | undefined;
    try {
      if (mode === "fetched") {
        await mkdir(dirname(path), { recursive: true });
        file = await open(path, constants.O_RDWR | constants.O_CREAT, 0o644);
        if ((await file.stat()).size !== manifest.bytes) {
          await file.truncate(0);
          await file.truncate(manifest.bytes);
        }
      } else {
        file = await open(path);
        const { size } = await file.stat();
        if (size !== manifest.bytes) throw new WeightsError(`${path} has ${size} bytes, not ${manifest.bytes}`);
      }
      const identity = await identityOf(path);
      const known = await readFile(note, "utf8").then((text) => noteSchema.parse(JSON.parse(text))).catch(() =>
        undefined
      );
      return new ChunkFile(
        path,
        manifest,
        file,
        mode,
        note,
        known?.identity === identity ? known : { identity, checked: "" },
      );
    } catch (cause) {
      await file?.close();
      throw troubleWith(path, cause);
    }
  }

  /** The chunks that are known to be right. */
  get checked(): ChunkSet {
    return this.#checked;
  }

  /**
   * Finds which of these chunks the file lacks, or has damaged.
   *
   * @param onChecked Told of every chunk that was found right.
   */
  async lacks(
    chunks: readonly number[],
    { signal, onChecked }: { signal?: AbortSignal; onChecked?: (chunk: number) => void } = {},
  ): Promise<number[]> {
    if (await identityOf(this.path).catch(() => "") !== this.#identity) this.#checked.clear();
    const lacking: number[] = [];
    let next = 0;
    await Promise.all(Array.from({ length: LANES }, async () => {
      for (let i = next++; i < chunks.length; i = next++) {
        signal?.throwIfAborted();
        const chunk = chunks[i]!;
        if (!this.#checked.has(chunk)) {
          const data = await this.#at(chunk);
          const hole = data === undefined || (this.#mode === "fetched" && empty(data));
          if (hole || !await this.manifest.fits(chunk, data)) {
            lacking.push(chunk);
            continue;
          }
          this.#checked.add(chunk);
        }
        onChecked?.(chunk);
      }
    }));
    return lacking.sort((a, b) => a - b);
  }

  /** Takes the file for whole: its manifest is of this very file. */
  trust(): void {
    for (let chunk = 0; chunk < this.manifest.chunks; chunk++) this.#checked.add(chunk);
  }

  /** The bytes of a chunk, as far as it is there. */
  async read(chunk: number): Promise<Uint8Array<ArrayBuffer> | undefined> {
    return this.#checked.has(chunk) ? await this.#at(chunk) : undefined;
  }

  /** Writes a chunk, whose bytes were checked. */
  async write(chunk: number, data: Uint8Array<ArrayBuffer>): Promise<void> {
    this.#identity = "";
    try {
      for (let at = 0; at < data.byteLength;) {
        at += (await this.#file.write(data, at, data.byteLength - at, CHUNK_BYTES * chunk + at)).bytesWritten;
      }
    } catch (cause) {
      throw troubleWith(this.path, cause);
    }
    this.#checked.add(chunk);
  }

  /** Notes what was checked, once it is on the disk. */
  async save(): Promise<void> {
    if (this.#identity === "") await this.#file.sync();
    this.#identity = await identityOf(this.path);
    const checked = btoa(binary(this.#checked.toBytes()));
    await replaceFile(this.#note, JSON.stringify({ identity: this.#identity, checked }));
  }

  async close(): Promise<void> {
    await this.#file.close();
  }

  async #at(chunk: number): Promise<Uint8Array<ArrayBuffer> | undefined> {
    const data = new Uint8Array(this.manifest.chunkBytes(chunk));
    const { bytesRead } = await this.#file.read(data, 0, data.byteLength, CHUNK_BYTES * chunk);
    return bytesRead === data.byteLength ? data : undefined;
  }
}

/** Whether it may be a hole: zeros are sooner fetched than hashed. */
function empty(data: Uint8Array<ArrayBuffer>): boolean {
  const words = new BigUint64Array(data.buffer, 0, data.byteLength >> 3);
  return words.length > 0 && words.every((word) => word === 0n);
}

function binary(bytes: Uint8Array): string {
  let text = "";
  for (const byte of bytes) text += String.fromCharCode(byte);
  return text;
}

function troubleWith(path: string, cause: unknown): WeightsError {
  if (cause instanceof WeightsError) return cause;
  const { code, message } = cause as { code?: string; message: string };
  const advice = code === "ENOSPC" ? "the disk is full: make room, or let LUTRA_CACHE name another folder" : message;
  return new WeightsError(`${path} cannot be used: ${advice}`, { cause });
}
