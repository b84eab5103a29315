/**
 * Reads NumPy `.npz` archives (ZIP of `.npy`, stored or deflated): enough for the golden files of the tests.
 *
 * Source: the NPY format version 1.0 and the ZIP application note (local headers are found through the central
 * directory, so archives written with data descriptors work too).
 *
 * @module
 */
import { inflateRawSync } from "node:zlib";

/** One array of an archive, in C order. */
export interface NpyArray {
  readonly shape: readonly number[];
  readonly data: Float32Array | Int32Array | BigInt64Array;
}

function parseNpy(name: string, bytes: Uint8Array): NpyArray {
  if (bytes[0] !== 0x93 || bytes[6] !== 1) throw new Error(`${name}: not an NPY 1.0 array`);
  const headerLength = bytes[8]! | (bytes[9]! << 8);
  const header = new TextDecoder().decode(bytes.subarray(10, 10 + headerLength));
  const descr = /'descr': '([^']+)'/.exec(header)?.[1];
  const shape = /'shape': \(([^)]*)\)/.exec(header)?.[1]?.split(",").filter((s) => s.trim() !== "").map(Number);
  if (descr === undefined || shape === undefined || /'fortran_order': True/.test(header)) {
    throw new Error(`${name}: unsupported NPY header ${header}`);
  }
  const body = new Uint8Array(bytes.subarray(10 + headerLength)).buffer;
  switch (descr) {
    case "<f4":
      return { shape, data: new Float32Array(body) };
    case "<i4":
      return { shape, data: new Int32Array(body) };
    case "<i8":
      return { shape, data: new BigInt64Array(body) };
    default:
      throw new Error(`${name}: unsupported dtype ${descr}`);
  }
}

/** Every array of the archive at `path`, by name without `.npy`. */
export function readNpz(path: string): Map<string, NpyArray> {
  const bytes = Deno.readFileSync(path);
  const view = new DataView(bytes.buffer);
  let end = bytes.length - 22;
  while (end >= 0 && view.getUint32(end, true) !== 0x06054b50) end--;
  if (end < 0) throw new Error(`${path}: no ZIP end record`);
  const arrays = new Map<string, NpyArray>();
  let at = view.getUint32(end + 16, true);
  for (let i = view.getUint16(end + 10, true); i > 0; i--) {
    const method = view.getUint16(at + 10, true);
    const compressed = view.getUint32(at + 20, true);
    const nameLength = view.getUint16(at + 28, true);
    const local = view.getUint32(at + 42, true);
    const name = new TextDecoder().decode(bytes.subarray(at + 46, at + 46 + nameLength));
    const start = local + 30 + view.getUint16(local + 26, true) + view.getUint16(local + 28, true);
    const raw = bytes.subarray(start, start + compressed);
    arrays.set(name.replace(/\.npy$/, ""), parseNpy(name, method === 8 ? inflateRawSync(raw) : raw));
    at += 46 + nameLength + view.getUint16(at + 30, true) + view.getUint16(at + 32, true);
  }
  return arrays;
}

/** The float array called `name`. */
export function floats(arrays: Map<string, NpyArray>, name: string): Float32Array {
  const array = arrays.get(name);
  if (!(array?.data instanceof Float32Array)) throw new Error(`no float32 array ${name}`);
  return array.data;
}

/** The integer array called `name`, as numbers. */
export function integers(arrays: Map<string, NpyArray>, name: string): number[] {
  const array = arrays.get(name);
  if (array === undefined || array.data instanceof Float32Array) throw new Error(`no integer array ${name}`);
  return Array.from(array.data as ArrayLike<number | bigint>, Number);
}
