/**
 * Reads what a GGUF file says: header, metadata and tensor table, never the tensors' data.
 *
 * The file may be hostile. Every count is held against the bytes that are left before anything is allocated for it, every
 * error names its field, and reading takes time and memory in proportion to the bytes before the tensor data.
 *
 * Source: the GGUF specification in ggml's docs (versions 2 and 3, little-endian).
 *
 * @module
 */
import { statSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import type { TensorRef } from "../bus/shard.ts";
import { GgufError } from "./errors.ts";
import { GGML_TYPES } from "./ggml_types.ts";

/** A metadata value. 64-bit integers that a number cannot hold exactly are bigints. */
export type GgufValue = string | number | bigint | boolean | readonly GgufValue[];

/** Where a tensor lies in the file. */
export interface TensorInfo {
  readonly name: string;
  /** GGML type id. */
  readonly type: number;
  /** Columns (contiguous) first. */
  readonly shape: readonly number[];
  /** The file that it is in: 0 is `path`, from 1 on one of `files`. Default: 0. */
  readonly file?: number | undefined;
  /** From the file's begin, in bytes. */
  readonly offset: number;
  readonly bytes: number;
  /** Which of the stored rows it has, and how they are stored; only in safetensors. */
  readonly rows?: TensorRef["rows"];
  readonly layout?: TensorRef["layout"];
}

/** What a GGUF file says. */
export interface GgufFile {
  readonly path: string;
  /** Names of further files of the model in the same folder. Default: none. */
  readonly files?: readonly string[];
  readonly version: number;
  /** The files' bytes. */
  readonly size: number;
  readonly alignment: number;
  readonly metadata: ReadonlyMap<string, GgufValue>;
  readonly tensors: ReadonlyMap<string, TensorInfo>;
  /** Where the tensors' data begins. */
  readonly dataOffset: number;
  /** Rotary pairs are a head's two halves whatever the architecture's GGUFs have, as in safetensors. */
  readonly rotaryHalves?: true;
  /** What is added to the weights of norms, if GGUFs of the architecture have it added already. */
  readonly normOffset?: number;
}

const MAX_DIMS = 4;
const MAX_ARRAY_DEPTH = 4;
const MAX_NAME_BYTES = 65_535;
const WINDOW = 1 << 20;
/** Bytes of a scalar, by type id; strings (8) and arrays (9) have none. */
const SCALAR_BYTES: Readonly<Record<number, number>> = {
  0: 1,
  1: 1,
  2: 2,
  3: 2,
  4: 4,
  5: 4,
  6: 4,
  7: 1,
  10: 8,
  11: 8,
  12: 8,
};
const STRING = 8;
const ARRAY = 9;

/** Reads forward through a window of the file. */
class Cursor {
  readonly size: number;
  readonly #read: (into: Uint8Array, at: number) => void;
  #window = new Uint8Array(0);
  #view = new DataView(this.#window.buffer);
  #start = 0;
  at = 0;
  readonly #text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

  constructor(size: number, read: (into: Uint8Array, at: number) => void) {
    this.size = size;
    this.#read = read;
  }

  get left(): number {
    return this.size - this.at;
  }

  /** Makes `bytes` available and returns their place in the window. */
  take(bytes: number, field: string): number {
    if (bytes > this.left) {
      throw new GgufError(field, this.at, `needs ${bytes} bytes, but the file ends after ${this.left}`);
    }
    if (this.at < this.#start || this.at + bytes > this.#start + this.#window.length) {
      this.#window = new Uint8Array(Math.min(this.left, Math.max(bytes, WINDOW)));
      this.#view = new DataView(this.#window.buffer);
      this.#start = this.at;
      this.#read(this.#window, this.at);
    }
    const place = this.at - this.#start;
    this.at += bytes;
    return place;
  }

  bytes(length: number, field: string): Uint8Array {
    const place = this.take(length, field);
    return this.#window.subarray(place, place + length);
  }

  u32(field: string): number {
    const place = this.take(4, field);
    return this.#view.getUint32(place, true);
  }

  /** A 64-bit count or offset; beyond 2^53 it cannot be right. */
  u64(field: string): number {
    const start = this.at;
    const place = this.take(8, field);
    const value = this.#view.getBigUint64(place, true);
    if (value > BigInt(Number.MAX_SAFE_INTEGER)) throw new GgufError(field, start, `${value} is impossibly large`);
    return Number(value);
  }

  string(field: string): string {
    const length = this.u64(`${field} length`);
    const start = this.at;
    const raw = this.bytes(length, field);
    try {
      return this.#text.decode(raw);
    } catch (cause) {
      throw new GgufError(field, start, "is not UTF-8", { cause });
    }
  }

  scalar(type: number, field: string): GgufValue {
    const start = this.at;
    const place = this.take(SCALAR_BYTES[type]!, field);
    const view = this.#view;
    switch (type) {
      case 0:
        return view.getUint8(place);
      case 1:
        return view.getInt8(place);
      case 2:
        return view.getUint16(place, true);
      case 3:
        return view.getInt16(place, true);
      case 4:
        return view.getUint32(place, true);
      case 5:
        return view.getInt32(place, true);
      case 6:
        return view.getFloat32(place, true);
      case 7: {
        const value = view.getUint8(place);
        if (value > 1) throw new GgufError(field, start, `a boolean is ${value}`);
        return value === 1;
      }
      case 10:
        return exact(view.getBigUint64(place, true));
      case 11:
        return exact(view.getBigInt64(place, true));
      default:
        return view.getFloat64(place, true);
    }
  }
}

function exact(value: bigint): number | bigint {
  const number = Number(value);
  return Number.isSafeInteger(number) ? number : value;
}

function readValue(cursor: Cursor, type: number, field: string, depth: number): GgufValue {
  if (type === STRING) return cursor.string(field);
  if (type !== ARRAY) {
    if (SCALAR_BYTES[type] === undefined) throw new GgufError(field, cursor.at - 4, `unknown value type ${type}`);
    return cursor.scalar(type, field);
  }
  if (depth >= MAX_ARRAY_DEPTH) {
    throw new GgufError(field, cursor.at, `arrays are nested deeper than ${MAX_ARRAY_DEPTH}`);
  }
  const elementType = cursor.u32(`${field} element type`);
  const count = cursor.u64(`${field} length`);
  // The least that an element takes: a string's length, or an array's type and length.
  const least = elementType === STRING ? 8 : elementType === ARRAY ? 12 : SCALAR_BYTES[elementType];
  if (least === undefined) throw new GgufError(field, cursor.at - 12, `unknown element type ${elementType}`);
  if (count > cursor.left / least) {
    throw new GgufError(field, cursor.at - 8, `${count} elements do not fit the ${cursor.left} bytes left`);
  }
  const values: GgufValue[] = [];
  for (let i = 0; i < count; i++) values.push(readValue(cursor, elementType, field, depth + 1));
  return values;
}

function readTensor(cursor: Cursor, index: number): Omit<TensorInfo, "bytes"> & { bytes: number; at: number } {
  const at = cursor.at;
  const nameLength = cursor.u64(`name length of tensor ${index}`);
  if (nameLength === 0 || nameLength > MAX_NAME_BYTES) {
    throw new GgufError(`name of tensor ${index}`, at, `has ${nameLength} bytes`);
  }
  cursor.at = at;
  const name = cursor.string(`name of tensor ${index}`);
  const field = `tensor ${JSON.stringify(name.slice(0, 64))}`;
  const dims = cursor.u32(`${field} dimensions`);
  if (dims < 1 || dims > MAX_DIMS) throw new GgufError(field, cursor.at - 4, `has ${dims} dimensions`);
  const shape: number[] = [];
  let elements = 1;
  for (let i = 0; i < dims; i++) {
    const dim = cursor.u64(`${field} dimension ${i}`);
    if (dim === 0) throw new GgufError(field, cursor.at - 8, `dimension ${i} is 0`);
    shape.push(dim);
    elements *= dim;
    if (elements > Number.MAX_SAFE_INTEGER) throw new GgufError(field, cursor.at - 8, "has impossibly many elements");
  }
  const type = cursor.u32(`${field} type`);
  const known = GGML_TYPES.get(type);
  if (known === undefined) throw new GgufError(field, cursor.at - 4, `has unknown type ${type}`);
  if (shape[0]! % known.elements !== 0) {
    throw new GgufError(
      field,
      cursor.at - 4,
      `${shape[0]} columns are no multiple of ${known.name}'s ${known.elements}`,
    );
  }
  const offset = cursor.u64(`${field} offset`);
  return {
    name,
    type,
    shape,
    offset,
    bytes: (elements / known.elements) * known.bytes + known.trailer,
    at: cursor.at - 8,
  };
}

/**
 * Reads a GGUF from any source of bytes.
 *
 * @param read Fills `into` with the bytes from `at` on, all of which lie within `size`.
 * @throws {GgufError} naming the field, and nothing else, whatever the bytes.
 */
export function parseGguf(path: string, size: number, read: (into: Uint8Array, at: number) => void): GgufFile {
  const cursor = new Cursor(size, read);
  const magic = cursor.bytes(4, "magic");
  if (String.fromCharCode(...magic) !== "GGUF") throw new GgufError("magic", 0, "the file is not GGUF");
  const version = cursor.u32("version");
  if (version > 0xffff) throw new GgufError("version", 4, "the file is big-endian, which is not supported");
  if (version !== 2 && version !== 3) {
    throw new GgufError("version", 4, `GGUF version ${version} is not supported (2, 3)`);
  }
  const tensorCount = cursor.u64("tensor count");
  const metadataCount = cursor.u64("metadata count");
  // The least that a tensor and a metadata entry take.
  if (tensorCount > cursor.left / 33) throw new GgufError("tensor count", 8, `${tensorCount} do not fit the file`);
  if (metadataCount > cursor.left / 13) {
    throw new GgufError("metadata count", 16, `${metadataCount} do not fit the file`);
  }

  const metadata = new Map<string, GgufValue>();
  for (let i = 0; i < metadataCount; i++) {
    const at = cursor.at;
    const key = cursor.string(`key of metadata ${i}`);
    if (key.length === 0 || key.length > MAX_NAME_BYTES) {
      throw new GgufError(`key of metadata ${i}`, at, "is empty or too long");
    }
    if (metadata.has(key)) throw new GgufError(key, at, "occurs twice");
    metadata.set(key, readValue(cursor, cursor.u32(`${key} type`), key, 0));
  }
  const alignment = metadata.get("general.alignment") ?? 32;
  if (
    typeof alignment !== "number" || alignment < 8 || alignment > 1 << 30 || !Number.isInteger(Math.log2(alignment))
  ) {
    throw new GgufError("general.alignment", cursor.at, `is ${alignment}, not a power of two from 8 on`);
  }

  const infos: (ReturnType<typeof readTensor>)[] = [];
  const tensors = new Map<string, TensorInfo>();
  for (let i = 0; i < tensorCount; i++) {
    const info = readTensor(cursor, i);
    if (tensors.has(info.name)) throw new GgufError(`tensor ${JSON.stringify(info.name)}`, info.at, "occurs twice");
    if (info.offset % alignment !== 0) {
      throw new GgufError(
        `tensor ${JSON.stringify(info.name)}`,
        info.at,
        `offset ${info.offset} is not aligned to ${alignment}`,
      );
    }
    infos.push(info);
    tensors.set(info.name, info);
  }
  const dataOffset = Math.ceil(cursor.at / alignment) * alignment;
  let end = 0;
  let before = "";
  for (const info of [...infos].sort((a, b) => a.offset - b.offset)) {
    const field = `tensor ${JSON.stringify(info.name)}`;
    if (info.offset < end) throw new GgufError(field, info.at, `overlaps tensor ${JSON.stringify(before)}`);
    end = info.offset + info.bytes;
    before = info.name;
    if (dataOffset + end > size) {
      throw new GgufError(
        field,
        info.at,
        `ends at byte ${dataOffset + end}, behind the file's ${size}: is it truncated?`,
      );
    }
  }
  for (const { name, type, shape, offset, bytes } of infos) {
    tensors.set(name, { name, type, shape, offset: dataOffset + offset, bytes });
  }
  return { path, version, size, alignment, metadata, tensors, dataOffset };
}

/** Names of all files of a model whose GGUF is split, the first of them first, by the name of any; `undefined`: it is no such name. */
export function splitNames(name: string): string[] | undefined {
  const [, stem, number, of] = /^(.*)-(\d{5})-of-(\d{5})\.gguf$/.exec(name) ?? [];
  if (stem === undefined || Number(number) < 1 || Number(number) > Number(of)) return undefined;
  return Array.from({ length: Number(of) }, (_, i) => `${stem}-${String(i + 1).padStart(5, "0")}-of-${of}.gguf`);
}

/**
 * Reads a GGUF file's header, metadata and tensor table; of a split model, of the first of its files, the tables of all.
 *
 * @throws {GgufError} when it is malformed, or another file of the model is missing or not of it.
 * @throws {Deno.errors.NotFound} and other I/O errors when it cannot be read.
 */
export function readGguf(path: string): GgufFile {
  const first = readOne(path);
  const count = first.metadata.get("split.count") ?? 0;
  if (typeof count !== "number" || count < 2) return first;
  const names = splitNames(basename(path));
  if (names?.length !== count) {
    throw new GgufError(
      "split.count",
      0,
      `${path} is one of ${count} files, but is not named NAME-00001-of-NNNNN.gguf`,
    );
  }
  if (basename(path) !== names[0] || first.metadata.get("split.no") !== 0) {
    throw new GgufError("split.no", 0, `${path} is not the first of the model's files: take ${names[0]}`);
  }
  const tensors = new Map(first.tensors);
  let { size } = first;
  for (const [number, name] of names.entries()) {
    if (number === 0) continue;
    const beside = join(dirname(path), name);
    if (statSync(beside, { throwIfNoEntry: false })?.isFile() !== true) {
      throw new GgufError(
        "split.count",
        0,
        `${name}, one of the model's ${count} files, is not beside ${basename(path)}`,
      );
    }
    const part = readOne(beside);
    if (part.metadata.get("split.count") !== count || part.metadata.get("split.no") !== number) {
      throw new GgufError("split.no", 0, `${name} does not say that it is file ${number + 1} of ${count}`);
    }
    size += part.size;
    for (const tensor of part.tensors.values()) {
      if (tensors.has(tensor.name)) {
        throw new GgufError(`tensor ${JSON.stringify(tensor.name)}`, 0, `of ${name} occurs twice`);
      }
      tensors.set(tensor.name, { ...tensor, file: number });
    }
  }
  const all = first.metadata.get("split.tensors.count") ?? tensors.size;
  if (all !== tensors.size) {
    throw new GgufError("split.tensors.count", 0, `is ${all}, but the ${count} files have ${tensors.size} tensors`);
  }
  return { ...first, files: names.slice(1), size, tensors };
}

function readOne(path: string): GgufFile {
  using file = Deno.openSync(path);
  const { size, isFile } = file.statSync();
  if (!isFile) throw new GgufError("file", 0, `${path} is no regular file`);
  return parseGguf(path, size, (into, at) => {
    file.seekSync(at, Deno.SeekMode.Start);
    for (let done = 0; done < into.length;) {
      const count = file.readSync(into.subarray(done));
      if (count === null) throw new GgufError("file", at + done, "became shorter while it was read");
      done += count;
    }
  });
}
