/**
 * Reads what a safetensors file says: the header's table of tensors, never their data. Files may be hostile: the header is
 * validated and every offset held against the file before anything is made of it.
 *
 * Source: the format's description in the safetensors repository (a 64-bit length, JSON, then the data).
 *
 * @module
 */
import { closeSync, fstatSync, openSync, readFileSync, readSync, statSync } from "node:fs";
import { join } from "node:path";
import { z } from "zod";
import { SafetensorsError } from "./errors.ts";

/** Where a tensor lies. */
export interface SafetensorInfo {
  readonly name: string;
  /** As the header has it, such as `BF16`. */
  readonly dtype: string;
  /** Rows first, as in PyTorch. */
  readonly shape: readonly number[];
  /** The file that it is in. */
  readonly file: string;
  /** From the file's begin, in bytes. */
  readonly offset: number;
  readonly bytes: number;
}

/** Bits of an element. */
const DTYPE_BITS: Readonly<Record<string, number>> = {
  ...{ BOOL: 8, U8: 8, I8: 8, F8_E5M2: 8, F8_E4M3: 8, F8_E8M0: 8 },
  ...{ I16: 16, U16: 16, F16: 16, BF16: 16, I32: 32, U32: 32, F32: 32, F64: 64, I64: 64, U64: 64 },
};
/** The format's own bound. */
const MAX_HEADER_BYTES = 100_000_000;
const SINGLE = "model.safetensors";
const INDEX = "model.safetensors.index.json";

const offset = z.number().int().nonnegative().max(Number.MAX_SAFE_INTEGER);
const tensorSchema = z.strictObject({
  dtype: z.string(),
  shape: z.array(offset).max(8),
  data_offsets: z.tuple([offset, offset]),
});
const indexSchema = z.looseObject({ weight_map: z.record(z.string(), z.string().regex(/^[\w.-]+\.safetensors$/)) });

/**
 * Reads a header.
 *
 * @param read Fills a buffer from a place in the file.
 * @throws {SafetensorsError} naming the tensor that is wrong.
 */
export function parseSafetensors(
  file: string,
  size: number,
  read: (into: Uint8Array, at: number) => void,
): Map<string, SafetensorInfo> {
  const fail = (what: string, message: string, options?: ErrorOptions) =>
    new SafetensorsError(file, what, message, options);
  if (size < 8) throw fail("header", `needs 8 bytes, but the file has ${size}`);
  const length = new Uint8Array(8);
  read(length, 0);
  const headerBytes = new DataView(length.buffer).getBigUint64(0, true);
  if (headerBytes > BigInt(Math.min(MAX_HEADER_BYTES, size - 8))) {
    throw fail("header", `has ${headerBytes} bytes, more than fit: is it a safetensors file?`);
  }
  const header = new Uint8Array(Number(headerBytes));
  read(header, 8);
  let table: unknown;
  try {
    table = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(header));
  } catch (cause) {
    throw fail("header", "is no JSON", { cause });
  }
  if (typeof table !== "object" || table === null || Array.isArray(table)) throw fail("header", "is no JSON object");
  const dataOffset = 8 + header.length;
  const tensors = new Map<string, SafetensorInfo>();
  for (const [name, entry] of Object.entries(table)) {
    if (name === "__metadata__") continue;
    const parsed = tensorSchema.safeParse(entry);
    if (!parsed.success) {
      const [issue] = parsed.error.issues;
      throw fail(`tensor ${name}`, `${issue?.path.join(".") ?? ""}: ${issue?.message}`, { cause: parsed.error });
    }
    const { dtype, shape, data_offsets: [begin, end] } = parsed.data;
    const bits = Object.hasOwn(DTYPE_BITS, dtype) ? DTYPE_BITS[dtype]! : undefined;
    if (bits === undefined) throw fail(`tensor ${name}`, `has the unknown type ${JSON.stringify(dtype)}`);
    const bytes = shape.reduce((a, b) => a * b, 1) * bits / 8;
    if (end - begin !== bytes) {
      throw fail(`tensor ${name}`, `has ${end - begin} bytes, but its shape ${shape.join(" × ")} needs ${bytes}`);
    }
    if (dataOffset + end > size) throw fail(`tensor ${name}`, `ends behind the file's ${size} bytes`);
    tensors.set(name, { name, dtype, shape, file, offset: dataOffset + begin, bytes });
  }
  const placed = [...tensors.values()].filter(({ bytes }) => bytes > 0).sort((a, b) => a.offset - b.offset);
  for (let i = 1; i < placed.length; i++) {
    const [before, after] = [placed[i - 1]!, placed[i]!];
    if (before.offset + before.bytes > after.offset) throw fail(`tensor ${after.name}`, `overlaps ${before.name}`);
  }
  return tensors;
}

/** Reads a file's header. */
export function readSafetensors(path: string): Map<string, SafetensorInfo> {
  const file = openSync(path, "r");
  try {
    return parseSafetensors(path, fstatSync(file).size, (into, at) => {
      for (let done = 0; done < into.length;) {
        const n = readSync(file, into, done, into.length - done, at + done);
        if (n === 0) throw new SafetensorsError(path, "header", "ends too early");
        done += n;
      }
    });
  } finally {
    closeSync(file);
  }
}

/**
 * The tensors of a model's folder: of its `model.safetensors`, or of the files that its index names.
 *
 * @throws {SafetensorsError} when a file is malformed or a tensor is not where the index says.
 */
export function readSafetensorsFolder(folder: string): Map<string, SafetensorInfo> {
  const index = join(folder, INDEX);
  if (statSync(index, { throwIfNoEntry: false }) === undefined) return readSafetensors(join(folder, SINGLE));
  let json: unknown;
  try {
    json = JSON.parse(readFileSync(index, "utf8"));
  } catch (cause) {
    throw new SafetensorsError(index, "index", "is no JSON", { cause });
  }
  const parsed = indexSchema.safeParse(json);
  if (!parsed.success) {
    throw new SafetensorsError(index, "weight_map", "is no list of tensors' files", { cause: parsed.error });
  }
  const { weight_map: places } = parsed.data;
  for (const name of new Set(Object.values(places))) {
    if (statSync(join(folder, name), { throwIfNoEntry: false })?.isFile() !== true) {
      throw new SafetensorsError(index, "weight_map", `names ${name}, which is not there`);
    }
  }
  const files = new Map([...new Set(Object.values(places))].map((name) => [name, readSafetensors(join(folder, name))]));
  const tensors = new Map<string, SafetensorInfo>();
  for (const [name, file] of Object.entries(places)) {
    const info = files.get(file)!.get(name);
    if (info === undefined) throw new SafetensorsError(index, `tensor ${name}`, `is not in ${file}`);
    tensors.set(name, info);
  }
  return tensors;
}
