import { createHash } from "node:crypto";
import { open } from "node:fs/promises";
import type { FileHandle } from "node:fs/promises";
import { WeightsError } from "./errors.ts";

/** Bytes of a chunk, the last one of a file excepted: two milliseconds of a link of 1 Gbit/s. */
export const CHUNK_BYTES = 1 << 18;
/** Bytes of a SHA-256. */
export const HASH_BYTES = 32;
/** More than any model's file has. */
const MOST_BYTES = 2 ** 40;

/** Where a chunk lies. */
export interface ChunkPlace {
  /** Number of the file. */
  readonly file: number;
  /** From the file's begin. */
  readonly offset: number;
  readonly bytes: number;
}

/**
 * What a model's files consist of: the SHA-256 of every chunk of {@linkcode CHUNK_BYTES}. Chunks are numbered file after file, and
 * the last one of each may be shorter.
 */
export class Manifest {
  /** Bytes of each file. */
  readonly files: readonly number[];
  /** The chunks' hashes, one after the other. */
  readonly hashes: Uint8Array<ArrayBuffer>;
  /** The model's address: a hash over the files' lengths and the chunks' hashes, as 64 hexadecimal digits. */
  readonly root: string;
  /** The first chunk of each file, and how many there are. */
  readonly #firsts: readonly number[];

  /** @throws {WeightsError} when there are not as many hashes as chunks. */
  constructor(files: readonly number[], hashes: Uint8Array<ArrayBuffer>) {
    const firsts = [0];
    for (const bytes of files) firsts.push(firsts.at(-1)! + chunkCount(bytes));
    if (hashes.byteLength !== HASH_BYTES * firsts.at(-1)!) {
      throw new WeightsError(`${hashes.byteLength} bytes of hashes for files of ${files.join(", ")} bytes`);
    }
    this.files = files;
    this.hashes = hashes;
    this.#firsts = firsts;
    const lengths = BigUint64Array.from([files.length, ...files], BigInt);
    this.root = createHash("sha256").update("lutra model files\0").update(lengths).update(hashes).digest("hex");
  }

  /** Chunks of all files. */
  get chunks(): number {
    return this.#firsts.at(-1)!;
  }

  /** The first chunk of a file. */
  firstChunk(file: number): number {
    return this.#firsts[file]!;
  }

  /** Where a chunk lies. */
  place(chunk: number): ChunkPlace {
    let [low, high] = [0, this.files.length - 1];
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (this.#firsts[middle]! <= chunk) low = middle;
      else high = middle - 1;
    }
    const offset = CHUNK_BYTES * (chunk - this.#firsts[low]!);
    return { file: low, offset, bytes: Math.min(CHUNK_BYTES, this.files[low]! - offset) };
  }

  /** Whether these are the bytes of that chunk. */
  async fits(chunk: number, data: Uint8Array<ArrayBuffer>): Promise<boolean> {
    if (data.byteLength !== this.place(chunk).bytes) return false;
    return equal(await sha256(data), this.hashes.subarray(HASH_BYTES * chunk, HASH_BYTES * (chunk + 1)));
  }
}

/**
 * Chunks of a file of so many bytes.
 *
 * @throws {WeightsError} when no file has so many.
 */
export function chunkCount(bytes: number): number {
  if (!Number.isSafeInteger(bytes) || bytes < 1 || bytes > MOST_BYTES) {
    throw new WeightsError(`a model file cannot have ${bytes} bytes`);
  }
  return Math.ceil(bytes / CHUNK_BYTES);
}

/** SHA-256, computed beside this thread. */
export async function sha256(data: Uint8Array<ArrayBuffer>): Promise<Uint8Array> {
  return new Uint8Array(await crypto.subtle.digest("SHA-256", data));
}

function equal(a: Uint8Array, b: Uint8Array): boolean {
  return a.byteLength === b.byteLength && a.every((byte, i) => byte === b[i]);
}

/** Chunks that are hashed at the same time. */
const LANES = 4;

/**
 * Hashes a model's files.
 *
 * @param onProgress Told from time to time how much is done, 0 to 1.
 * @throws {WeightsError} when one cannot be read.
 */
export async function hashFiles(
  paths: readonly string[],
  onProgress: (fraction: number) => void = () => {},
): Promise<Manifest> {
  const files: FileHandle[] = [];
  try {
    const sizes: number[] = [];
    for (const path of paths) {
      const file = await named(path, () => open(path));
      files.push(file);
      sizes.push((await named(path, () => file.stat())).size);
    }
    const places = sizes.flatMap((size, file) =>
      Array.from({ length: chunkCount(size) }, (_, i) => ({ file, offset: CHUNK_BYTES * i }))
    );
    const hashes = new Uint8Array(HASH_BYTES * places.length);
    let [next, done] = [0, 0];
    await Promise.all(Array.from({ length: LANES }, async () => {
      const buffer = new Uint8Array(CHUNK_BYTES);
      for (let chunk = next++; chunk < places.length; chunk = next++) {
        const { file, offset } = places[chunk]!;
        const data = buffer.subarray(0, Math.min(CHUNK_BYTES, sizes[file]! - offset));
        await named(paths[file]!, async () => {
          const { bytesRead } = await files[file]!.read(data, 0, data.byteLength, offset);
          if (bytesRead !== data.byteLength) throw new Error("it became shorter");
        });
        hashes.set(await sha256(data), HASH_BYTES * chunk);
        onProgress(++done / places.length);
      }
    }));
    return new Manifest(sizes, hashes);
  } finally {
    for (const file of files) await file.close();
  }
}

/** Names the file that cannot be read. */
async function named<T>(path: string, act: () => Promise<T>): Promise<T> {
  try {
    return await act();
  } catch (cause) {
    throw new WeightsError(`${path} cannot be read: ${(cause as Error).message}`, { cause });
  }
}
