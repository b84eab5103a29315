import { ENTRY_BYTES, MAX_TOP_LOGPROBS } from "./batch.ts";
import type { DecodedBatch } from "./batch.ts";
import { WireError } from "./errors.ts";

/**
 * What travels every micro-batch: a header of 24 bytes and two parts, little-endian.
 *
 * ```text
 * u16 magic 0x544c   u8 version   u8 kind   u32 epoch   u32 step   u32 batch bytes   u32 payload bytes   u32 flags
 * ```
 *
 * - WORK (to a stage): the batch, and the hidden states (f32, a row per token; none for the first stage).
 *   `flags` may have, in bits 8 to 15, how many micro-batches follow from this one: the last stage sends the tokens that it
 *   samples straight to the first as the next step, beside the RESULT.
 * - RESULT (to the orchestrator): the batch's entry table alone, and what was computed; with the ERROR flag the payload is
 *   the reason as JSON. Any stage may send one.
 *
 * The epoch names one placement of the model: messages of another epoch are of no account. Steps number the micro-batches
 * of an epoch, so that a message received twice is recognised.
 */
export const WIRE_VERSION = 4;
/** Bytes of the header. */
export const HEADER_BYTES = 24;

const MAGIC = 0x544c;
const KINDS = { work: 1, result: 2 } as const;
const FLAG_ERROR = 1;
/** Where the number of micro-batches that follow lies in the flags of WORK. */
const CHAIN_SHIFT = 8;
/** Most micro-batches that may follow from one. */
export const MAX_CHAIN = 255;

/** What a message is. */
export type WireKind = keyof typeof KINDS;

/** The header's fields. */
export interface WireHeader {
  readonly kind: WireKind;
  readonly epoch: number;
  readonly step: number;
  readonly batchBytes: number;
  readonly payloadBytes: number;
  /** Whether the payload is the reason of a failure. */
  readonly error?: boolean;
  /** Of WORK: how many micro-batches follow from this one; absent: none. */
  readonly chain?: number;
}

/** A message whose lengths were checked. The parts are views of it. */
export interface WireMessage {
  readonly kind: WireKind;
  readonly epoch: number;
  readonly step: number;
  readonly error: boolean;
  readonly chain: number;
  readonly batch: Uint8Array;
  readonly payload: Uint8Array;
}

/** Writes a header to the first 24 bytes of `into`. */
export function writeHeader(into: Uint8Array, header: WireHeader): void {
  const view = new DataView(into.buffer, into.byteOffset, HEADER_BYTES);
  view.setUint16(0, MAGIC, true);
  view.setUint8(2, WIRE_VERSION);
  view.setUint8(3, KINDS[header.kind]);
  view.setUint32(4, header.epoch, true);
  view.setUint32(8, header.step, true);
  view.setUint32(12, header.batchBytes, true);
  view.setUint32(16, header.payloadBytes, true);
  view.setUint32(20, (header.error === true ? FLAG_ERROR : 0) | ((header.chain ?? 0) << CHAIN_SHIFT), true);
}

/** A whole message. */
export function encodeMessage(
  header: Pick<WireHeader, "kind" | "epoch" | "step" | "error" | "chain">,
  batch: Uint8Array,
  payload: Uint8Array,
): Uint8Array<ArrayBuffer> {
  const message = new Uint8Array(HEADER_BYTES + batch.byteLength + payload.byteLength);
  writeHeader(message, { ...header, batchBytes: batch.byteLength, payloadBytes: payload.byteLength });
  message.set(batch, HEADER_BYTES);
  message.set(payload, HEADER_BYTES + batch.byteLength);
  return message;
}

/**
 * Splits a message.
 *
 * @throws {WireError} and nothing else, whatever the bytes.
 */
export function decodeMessage(data: Uint8Array): WireMessage {
  if (data.byteLength < HEADER_BYTES) throw new WireError(`message of ${data.byteLength} bytes has no header`);
  const view = new DataView(data.buffer, data.byteOffset, data.byteLength);
  const magic = view.getUint16(0, true);
  if (magic !== MAGIC) throw new WireError(`message begins with ${magic.toString(16)}, not ${MAGIC.toString(16)}`);
  const version = view.getUint8(2);
  if (version !== WIRE_VERSION) throw new WireError(`message has wire version ${version}, not ${WIRE_VERSION}`);
  const code = view.getUint8(3);
  const kind = code === KINDS.work ? "work" : code === KINDS.result ? "result" : undefined;
  if (kind === undefined) throw new WireError(`message has unknown kind ${code}`);
  const batchBytes = view.getUint32(12, true);
  const payloadBytes = view.getUint32(16, true);
  const flags = view.getUint32(20, true);
  if (HEADER_BYTES + batchBytes + payloadBytes !== data.byteLength) {
    throw new WireError(`message of ${data.byteLength} bytes announces ${batchBytes} + ${payloadBytes}`);
  }
  const allowed = kind === "work" ? MAX_CHAIN << CHAIN_SHIFT : FLAG_ERROR;
  if ((flags & ~allowed) !== 0) throw new WireError(`unknown flags ${flags}`);
  return {
    kind,
    epoch: view.getUint32(4, true),
    step: view.getUint32(8, true),
    error: (flags & FLAG_ERROR) !== 0,
    chain: flags >>> CHAIN_SHIFT,
    batch: data.subarray(HEADER_BYTES, HEADER_BYTES + batchBytes),
    payload: data.subarray(HEADER_BYTES + batchBytes),
  };
}

/** The entry table of a batch, which a RESULT carries in its batch part. */
export function entryTable(batch: DecodedBatch): Uint8Array {
  return batch.bytes.subarray(0, 4 + batch.entries.length * ENTRY_BYTES);
}

/** Bytes of a sampled token in a RESULT, with so many alternatives: u32 id, f32 log-probability, u32 alternatives, and these. */
export function sampledBytes(alternatives: number): number {
  return 12 + 8 * alternatives;
}

/** Most bytes that the results of `batch` take. */
export function maxResultBytes(batch: DecodedBatch, vocab: number): number {
  let bytes = 0;
  for (const entry of batch.entries) {
    if (entry.sampled) bytes += sampledBytes(entry.topLogprobs);
    if (entry.logits) bytes += 4 * vocab * entry.tokenCount;
  }
  return bytes;
}

/** A token with its log-probability (natural logarithm, before temperature and truncation). */
export interface TokenLogprob {
  readonly id: number;
  readonly logprob: number;
}

/** What the last stage computed for an entry. */
export interface EntryResult {
  readonly seq: number;
  readonly pos: number;
  readonly tokenCount: number;
  /** The sampled token, if one was asked for, and the most probable ones as far as asked for. */
  readonly sampled?: TokenLogprob & { readonly top: readonly TokenLogprob[] };
  /** `tokenCount × vocab` logits, if asked for. */
  readonly logits?: Float32Array;
}

/**
 * Reads the results in a RESULT message.
 *
 * @throws {WireError} and nothing else, whatever the bytes.
 */
export function decodeResults(message: WireMessage, vocab: number): EntryResult[] {
  const table = new DataView(message.batch.buffer, message.batch.byteOffset, message.batch.byteLength);
  if (table.byteLength < 4) throw new WireError("result has no entry table");
  const count = table.getUint32(0, true);
  if (table.byteLength !== 4 + count * ENTRY_BYTES) {
    throw new WireError(`result's table of ${table.byteLength} bytes cannot hold ${count} entries`);
  }
  const { payload } = message;
  const view = new DataView(payload.buffer, payload.byteOffset, payload.byteLength);
  let at = 0;
  const take = (bytes: number, what: string) => {
    if (at + bytes > payload.byteLength) {
      throw new WireError(`result of ${payload.byteLength} bytes ends within ${what}`);
    }
    at += bytes;
    return at - bytes;
  };
  const results: { -readonly [K in keyof EntryResult]: EntryResult[K] }[] = [];
  for (let i = 0; i < count; i++) {
    const entry = 4 + i * ENTRY_BYTES;
    const flags = table.getUint32(entry + 12, true);
    if (flags > 3) throw new WireError(`result's entry ${i} has unknown flags ${flags}`);
    const result: (typeof results)[number] = {
      seq: table.getUint32(entry, true),
      pos: table.getUint32(entry + 4, true),
      tokenCount: table.getUint32(entry + 8, true),
    };
    results.push(result);
    if (!(flags & 1)) continue;
    const head = take(12, `token ${i}`);
    const tops = view.getUint32(head + 8, true);
    if (tops > MAX_TOP_LOGPROBS) throw new WireError(`result has ${tops} alternatives`);
    const top: TokenLogprob[] = [];
    for (let j = 0; j < tops; j++) {
      const pair = take(8, `alternative ${j} of token ${i}`);
      top.push({ id: view.getUint32(pair, true), logprob: view.getFloat32(pair + 4, true) });
    }
    result.sampled = { id: view.getUint32(head, true), logprob: view.getFloat32(head + 4, true), top };
  }
  for (let i = 0; i < count; i++) {
    const result = results[i]!;
    if (!(table.getUint32(4 + i * ENTRY_BYTES + 12, true) & 2)) continue;
    const start = take(4 * vocab * result.tokenCount, `logits ${i}`);
    result.logits = new Float32Array(payload.slice(start, at).buffer);
  }
  if (at !== payload.byteLength) throw new WireError(`result has ${payload.byteLength - at} bytes too many`);
  return results;
}

/** Why a stage could not compute a micro-batch. */
export interface StageFailure {
  /** Error code of the kernel library, or 0. */
  readonly code: number;
  readonly message: string;
  /** Id of the worker. */
  readonly worker: string;
  readonly stage: number;
}

/** A {@linkcode StageFailure} as the payload of a RESULT with the ERROR flag. */
export function encodeFailure(failure: StageFailure): Uint8Array<ArrayBuffer> {
  return new TextEncoder().encode(JSON.stringify(failure));
}

/** @throws {WireError} and nothing else, whatever the bytes. */
export function decodeFailure(payload: Uint8Array): StageFailure {
  let value: unknown;
  try {
    value = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(payload));
  } catch (cause) {
    throw new WireError("a failure is not JSON", { cause });
  }
  const { code, message, worker, stage } = (value ?? {}) as Record<string, unknown>;
  if (
    typeof code !== "number" || typeof message !== "string" || typeof worker !== "string" || typeof stage !== "number"
  ) {
    throw new WireError("a failure lacks code, message, worker or stage");
  }
  return { code, message, worker, stage };
}
