import { createHash } from "node:crypto";
import { constants } from "node:fs";
import { mkdir, open, readFile, rename, rm, stat, writeFile } from "node:fs/promises";
import type { FileHandle } from "node:fs/promises";
import { dirname, join, resolve } from "node:path";
import { z } from "zod";
import { ChunkSet } from "./chunk_set.ts";
import { WeightsError } from "./errors.ts";
import type { Manifest } from "./manifest.ts";

/** Chunks that are checked at the same time. */
const LANES = 4;

const noteSchema = z.strictObject({ identity: z.string(), checked: z.string() });

/** What tells whether files are the same: device, inode, size, times of modification and of change; of absent ones nothing. */
export async function identityOf(paths: readonly string[]): Promise<string> {
  const found = await Promise.all(paths.map((path) => stat(path, { bigint: true }).catch(() => undefined)));
  return found.map((file) =>
    file === undefined ? "" : [file.dev, file.ino, file.size, file.mtimeNs, file.ctimeNs].join(" ")
  ).join("\n");
}

/** Whether any of these files is there. */
export async function anyThere(paths: readonly string[]): Promise<boolean> {
  return (await identityOf(paths)).trim() !== "";
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
 * A model's files on disk that have some of the chunks that a manifest tells of, each at its place. Which they are is found by their
 * hashes; a note in the cache folder spares hashing them again as long as the files are the same.
 */
export class ChunkFiles {
  readonly paths: readonly string[];
  readonly manifest: Manifest;
  /** Those that are there. */
  readonly #files: readonly (FileHandle | undefined)[];
  readonly #mode: "own" | "fetched";
  readonly #note: string;
  readonly #checked: ChunkSet;
  /** The files' identity when all of `#checked` was right; `undefined` while chunks are being written. */
  #identity: string | undefined;

  private constructor(
    paths: readonly string[],
    manifest: Manifest,
    files: readonly (FileHandle | undefined)[],
    mode: "own" | "fetched",
    note: string,
    known: z.infer<typeof noteSchema>,
  ) {
    this.paths = paths;
    this.manifest = manifest;
    this.#files = files;
    this.#mode = mode;
    this.#note = note;
    this.#checked = new ChunkSet(manifest.chunks, Uint8Array.from(atob(known.checked), (char) => char.charCodeAt(0)));
    this.#identity = known.identity;
  }

  /**
   * Opens files of the manifest's lengths.
   *
   * @param paths One for each of the manifest's files.
   * @param cache The folder where notes are kept.
   * @param mode `own`: they are there, or some of them, and are only read; `fetched`: they are made where they are not, with holes,
   * and may be written to.
   * @throws {WeightsError} when that is not possible.
   */
  static async open(
    paths: readonly string[],
    manifest: Manifest,
    cache: string,
    mode: "own" | "fetched",
  ): Promise<ChunkFiles> {
    if (paths.length !== manifest.files.length) {
      throw new WeightsError(`${paths.length} files are named of a model in ${manifest.files.length}`);
    }
    const names = JSON.stringify([manifest.root, ...paths.map((path) => resolve(path))]);
    const note = join(cache, "checked", createHash("sha256").update(names).digest("hex"));
    const files: (FileHandle | undefined)[] = [];
    try {
      for (const [i, path] of paths.entries()) files.push(await openFile(path, manifest.files[i]!, mode));
      const identity = await identityOf(paths);
      const known = await readFile(note, "utf8").then((text) => noteSchema.parse(JSON.parse(text))).catch(() =>
        undefined
      );
      return new ChunkFiles(
        paths,
        manifest,
        files,
        mode,
        note,
        known?.identity === identity ? known : { identity, checked: "" },
      );
    } catch (error) {
      for (const file of files) await file?.close();
      throw error;
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
    if (await identityOf(this.paths) !== this.#identity) this.#checked.clear();
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

  /** Takes the files for whole: the manifest is of these very files. */
  trust(): void {
    for (let chunk = 0; chunk < this.manifest.chunks; chunk++) this.#checked.add(chunk);
  }

  /** The bytes of a chunk, as far as it is there. */
  async read(chunk: number): Promise<Uint8Array<ArrayBuffer> | undefined> {
    return this.#checked.has(chunk) ? await this.#at(chunk) : undefined;
  }

  /** Writes a chunk, whose bytes were checked. */
  async write(chunk: number, data: Uint8Array<ArrayBuffer>): Promise<void> {
    this.#identity = undefined;
    const { file, offset } = this.manifest.place(chunk);
    try {
      for (let at = 0; at < data.byteLength;) {
        at += (await this.#files[file]!.write(data, at, data.byteLength - at, offset + at)).bytesWritten;
      }
    } catch (cause) {
      throw troubleWith(this.paths[file]!, cause);
    }
    this.#checked.add(chunk);
  }

  /** Notes what was checked, once it is on the disk. */
  async save(): Promise<void> {
    if (this.#identity === undefined) await Promise.all(this.#files.map((file) => file?.sync()));
    this.#identity = await identityOf(this.paths);
    const checked = btoa(binary(this.#checked.toBytes()));
    await replaceFile(this.#note, JSON.stringify({ identity: this.#identity, checked }));
  }

  async close(): Promise<void> {
    for (const file of this.#files) await file?.close();
  }

  async #at(chunk: number): Promise<Uint8Array<ArrayBuffer> | undefined> {
    const { file, offset, bytes } = this.manifest.place(chunk);
    const data = new Uint8Array(bytes);
    const read = await this.#files[file]?.read(data, 0, bytes, offset);
    return read?.bytesRead === bytes ? data : undefined;
  }
}

/** Opens one of the files; `undefined` where this device does not have it. */
async function openFile(path: string, bytes: number, mode: "own" | "fetched"): Promise<FileHandle | undefined> {
  let file: FileHandle | undefined;
  try {
    if (mode === "own") {
      file = await open(path);
      const { size } = await file.stat();
      if (size !== bytes) throw new WeightsError(`${path} has ${size} bytes, not ${bytes}`);
      return file;
    }
    await mkdir(dirname(path), { recursive: true });
    file = await open(path, constants.O_RDWR | constants.O_CREAT, 0o644);
    if ((await file.stat()).size !== bytes) {
      await file.truncate(0);
      await file.truncate(bytes);
    }
    return file;
  } catch (cause) {
    await file?.close();
    // A device may have those of its layers alone; what Deno may not look at it has not.
    const { name, code } = cause as { name: string; code?: string };
    if (mode === "own" && (["ENOENT", "EACCES", "EPERM"].includes(code ?? "") || name === "NotCapable")) {
      return undefined;
    }
    throw troubleWith(path, cause);
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
