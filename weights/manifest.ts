import { createHash } from "node:crypto";
import { open } from "node:fs/promises";
import { WeightsError } from "./errors.ts";

/** Bytes of a chunk, the last one of a file excepted: two milliseconds of a link of 1 Gbit/s. */
export const CHUNK_BYTES = 1 << 18;
/** Bytes of a SHA-256. */
export const HASH_BYTES = 32;
/** More than any model's file has. */
const MOST_BYTES = 2 ** 40;

/** What a file consists of: the SHA-256 of every chunk of {@linkcode CHUNK_BYTES}. */
export class Manifest {
  /** Bytes of the file. */
  readonly bytes: number;
  /** The chunks' hashes, one after the other. */
  readonly hashes: Uint8Array<ArrayBuffer>;
  /** The file's address: a hash over its length and the chunks' hashes, as 64 hexadecimal digits. */
  readonly root: string;

  /** @throws {WeightsError} when there are not as many hashes as chunks. */
  constructor(bytes: number, hashes: Uint8Array<ArrayBuffer>) {
    if (hashes.byteLength !== HASH_BYTES * chunkCount(bytes)) {
      throw new WeightsError(`${hashes.byteLength} bytes of hashes for a file of ${bytes} bytes`);
    }
    this.bytes = bytes;
    this.hashes = hashes;
    const length = new Uint8Array(8);
    new DataView(length.buffer).setBigUint64(0, BigInt(bytes), true);
    this.root = createHash("sha256").update("lutra model file\0").update(length).update(hashes).digest("hex");
  }

  /** Chunks of the file. */
  get chunks(): number {
    return chunkCount(this.bytes);
  }

  /** Bytes of a chunk. */
  chunkBytes(chunk: number): number {
    return Math.min(CHUNK_BYTES, this.bytes - CHUNK_BYTES * chunk);
  }

  /** Whether these are the bytes of that chunk. */
  async fits(chunk: number, data: Uint8Array<ArrayBuffer>): Promise<boolean> {
    if (data.byteLength !== this.chunkBytes(chunk)) return false;
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
 * Hashes a file.
 *
 * @param onProgress Told from time to time how much is done, 0 to 1.
 * @throws {WeightsError} when it cannot be read.
 */
export async function hashFile(path: string, onProgress: (fraction: number) => void = () => {}): Promise<Manifest> {
  try {
    const file = await open(path);
    try {
      const { size } = await file.stat();
      const count = chunkCount(size);
      const hashes = new Uint8Array(HASH_BYTES * count);
      let next = 0;
      let done = 0;
      await Promise.all(Array.from({ length: LANES }, async () => {
        const buffer = new Uint8Array(CHUNK_BYTES);
        for (let chunk = next++; chunk < count; chunk = next++) {
          const offset = CHUNK_BYTES * chunk;
          const data = buffer.subarray(0, Math.min(CHUNK_BYTES, size - offset));
          const { bytesRead } = await file.read(data, 0, data.byteLength, offset);
          if (bytesRead !== data.byteLength) throw new Error("it became shorter");
          hashes.set(await sha256(data), HASH_BYTES * chunk);
          onProgress(++done / count);
        }
      }));
      return new Manifest(size, hashes);
    } finally {
      await file.close();
    }
  } catch (cause) {
    if (cause instanceof WeightsError) throw cause;
    throw new WeightsError(`${path} cannot be read: ${(cause as Error).message}`, { cause });
  }
}
