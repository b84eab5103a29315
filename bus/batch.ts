import { WireError } from "./errors.ts";

/**
 * The micro-batch: what one forward pass computes, in the bytes that the kernel library reads. Little-endian:
 *
 * ```text
 * u32 entries
 * per entry:               u32 sequence, position, tokens, flags (bit 0 SAMPLE after the last token, bit 1 LOGITS of every token)
 * u32 token id             of every token, entry after entry
 * per entry with SAMPLE:   f32 temperature, u32 top k, f32 top p, f32 min p, f32 repeat, f32 presence, f32 frequency penalty,
 *                          i32 penalty last n, u32 prompt length, u32 seed low, u32 seed high, u32 top logprobs, u32 biases,
 *                          biases × (u32 token id, f32 bias)
 * ```
 */
export interface BatchEntry {
  /** Sequence number, u32. A sequence may occur once in a batch. */
  readonly seq: number;
  /** Position of the first token, counted from 0. */
  readonly pos: number;
  /** One token or more. */
  readonly tokens: ArrayLike<number>;
  /** When given, a token is sampled after the last one. */
  readonly sample?: SampleParameters;
  /** Whether the logits of all tokens are wanted. */
  readonly logits?: boolean;
}

/** How the last stage chooses a token. Every field travels with every sampled entry, so that stages hold no request state. */
export interface SampleParameters {
  /** 0 takes the most probable token. */
  readonly temperature: number;
  /** Keep so many of the most probable tokens; 0 keeps all. */
  readonly topK: number;
  /** Keep the most probable tokens up to this cumulative probability; 1 keeps all. */
  readonly topP: number;
  /** Drop tokens less probable than this share of the most probable one; 0 keeps all. */
  readonly minP: number;
  /** Divides (multiplies, if negative) the logits of tokens seen, prompt included; 1 is none. */
  readonly repeatPenalty: number;
  /** Subtracted from the logits of tokens generated before. */
  readonly presencePenalty: number;
  /** Subtracted as often as the token was generated before. */
  readonly frequencyPenalty: number;
  /** How many of the last tokens the penalties look at; -1 is all. */
  readonly penaltyLastN: number;
  /** Tokens of the prompt: those after it count as generated. */
  readonly promptLength: number;
  /** With the position, all the randomness there is (64 bits). */
  readonly seed: bigint;
  /** How many alternatives to report with log-probabilities (0 to 20); absent: none, nor that of the chosen token. */
  readonly topLogprobs?: number | undefined;
  /** Added to the logits of these token ids. */
  readonly logitBias: ReadonlyMap<number, number>;
}

/** Most alternatives that {@linkcode SampleParameters.topLogprobs} may ask for. */
export const MAX_TOP_LOGPROBS = 20;
/** Bytes of an entry in the table. */
export const ENTRY_BYTES = 16;
/** Bytes of sample parameters without biases. */
export const SAMPLE_BYTES = 52;

const FLAG_SAMPLE = 1;
const FLAG_LOGITS = 2;
const NO_LOGPROBS = 0xffff_ffff;

/** An entry of a decoded batch. */
export interface DecodedEntry {
  readonly seq: number;
  readonly pos: number;
  /** Number of tokens, at least 1. */
  readonly tokenCount: number;
  /** Index of the entry's first token among all tokens of the batch. */
  readonly firstToken: number;
  /** Whether a token is sampled. */
  readonly sampled: boolean;
  /** Whether the logits of all tokens are wanted. */
  readonly logits: boolean;
  /** Byte range of the sample parameters in the batch; empty without. */
  readonly sampleStart: number;
  readonly sampleEnd: number;
  /** Alternatives asked for; 0 without. */
  readonly topLogprobs: number;
}

/** A batch whose every length was checked. */
export interface DecodedBatch {
  /** The bytes decoded. */
  readonly bytes: Uint8Array;
  readonly entries: readonly DecodedEntry[];
  /** Token ids of all entries. */
  readonly tokens: Uint32Array;
}

/** Bytes of `sample` in a batch. */
export function sampleBytes(sample: SampleParameters): number {
  return SAMPLE_BYTES + 8 * sample.logitBias.size;
}

/** Encodes a micro-batch. The values are the caller's to check; the kernel library checks them again. */
export function encodeBatch(entries: readonly BatchEntry[]): Uint8Array<ArrayBuffer> {
  let bytes = 4;
  for (const { tokens, sample } of entries) {
    bytes += ENTRY_BYTES + 4 * tokens.length + (sample === undefined ? 0 : sampleBytes(sample));
  }
  const view = new DataView(new ArrayBuffer(bytes));
  let at = 0;
  const u32 = (value: number) => {
    view.setUint32(at, value, true);
    at += 4;
  };
  const f32 = (value: number) => {
    view.setFloat32(at, value, true);
    at += 4;
  };
  u32(entries.length);
  for (const { seq, pos, tokens, sample, logits } of entries) {
    u32(seq);
    u32(pos);
    u32(tokens.length);
    u32((sample === undefined ? 0 : FLAG_SAMPLE) | (logits === true ? FLAG_LOGITS : 0));
  }
  for (const { tokens } of entries) for (let i = 0; i < tokens.length; i++) u32(tokens[i]!);
  for (const { sample } of entries) {
    if (sample === undefined) continue;
    f32(sample.temperature);
    u32(sample.topK);
    f32(sample.topP);
    f32(sample.minP);
    f32(sample.repeatPenalty);
    f32(sample.presencePenalty);
    f32(sample.frequencyPenalty);
    u32(sample.penaltyLastN); // two's complement of an i32
    u32(sample.promptLength);
    u32(Number(sample.seed & 0xffff_ffffn));
    u32(Number((sample.seed >> 32n) & 0xffff_ffffn));
    u32(sample.topLogprobs ?? NO_LOGPROBS);
    u32(sample.logitBias.size);
    for (const [id, bias] of sample.logitBias) {
      u32(id);
      f32(bias);
    }
  }
  return new Uint8Array(view.buffer);
}

/**
 * Reads a micro-batch and checks that its lengths add up, that no sequence occurs twice and no unknown flag is set.
 *
 * @throws {WireError} and nothing else, whatever the bytes.
 */
export function decodeBatch(bytes: Uint8Array): DecodedBatch {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const size = bytes.byteLength;
  if (size < 4) throw new WireError(`batch of ${size} bytes has no entry count`);
  const count = view.getUint32(0, true);
  let at = 4 + count * ENTRY_BYTES;
  if (at > size) throw new WireError(`batch of ${size} bytes cannot hold ${count} entries`);
  let total = 0;
  const sequences = new Set<number>();
  for (let i = 0; i < count; i++) {
    const entry = 4 + i * ENTRY_BYTES;
    const seq = view.getUint32(entry, true);
    const tokens = view.getUint32(entry + 8, true);
    const flags = view.getUint32(entry + 12, true);
    if (tokens === 0) throw new WireError(`entry ${i} has no tokens`);
    if (flags > (FLAG_SAMPLE | FLAG_LOGITS)) throw new WireError(`entry ${i} has unknown flags ${flags}`);
    if (sequences.has(seq)) throw new WireError(`sequence ${seq} occurs twice in a batch`);
    sequences.add(seq);
    total += tokens;
  }
  if (at + 4 * total > size) throw new WireError(`batch of ${size} bytes cannot hold ${total} tokens`);
  const tokens = new Uint32Array(total);
  for (let i = 0; i < total; i++) tokens[i] = view.getUint32(at + 4 * i, true);
  at += 4 * total;
  const entries: DecodedEntry[] = [];
  for (let i = 0, firstToken = 0; i < count; i++) {
    const entry = 4 + i * ENTRY_BYTES;
    const flags = view.getUint32(entry + 12, true);
    const tokenCount = view.getUint32(entry + 8, true);
    const sampleStart = at;
    let topLogprobs = 0;
    if (flags & FLAG_SAMPLE) {
      if (at + SAMPLE_BYTES > size) throw new WireError(`entry ${i} lacks its sample parameters`);
      const top = view.getUint32(at + 44, true);
      const biases = view.getUint32(at + 48, true);
      if (top !== NO_LOGPROBS && top > MAX_TOP_LOGPROBS) throw new WireError(`entry ${i} asks for ${top} logprobs`);
      topLogprobs = top === NO_LOGPROBS ? 0 : top;
      at += SAMPLE_BYTES + 8 * biases;
      if (at > size) throw new WireError(`entry ${i} lacks its ${biases} biases`);
    }
    entries.push({
      seq: view.getUint32(entry, true),
      pos: view.getUint32(entry + 4, true),
      tokenCount,
      firstToken,
      sampled: (flags & FLAG_SAMPLE) !== 0,
      logits: (flags & FLAG_LOGITS) !== 0,
      sampleStart,
      sampleEnd: at,
      topLogprobs,
    });
    firstToken += tokenCount;
  }
  if (at !== size) throw new WireError(`batch has ${size - at} bytes too many`);
  return { bytes, entries, tokens };
}

/** The sample parameters of an entry; `undefined` when it samples nothing. */
export function decodeSample(batch: DecodedBatch, entry: DecodedEntry): SampleParameters | undefined {
  if (!entry.sampled) return undefined;
  const view = new DataView(batch.bytes.buffer, batch.bytes.byteOffset + entry.sampleStart);
  const top = view.getUint32(44, true);
  const biases = view.getUint32(48, true);
  const logitBias = new Map<number, number>();
  for (let i = 0; i < biases; i++) {
    const at = SAMPLE_BYTES + 8 * i;
    logitBias.set(view.getUint32(at, true), view.getFloat32(at + 4, true));
  }
  return {
    temperature: view.getFloat32(0, true),
    topK: view.getUint32(4, true),
    topP: view.getFloat32(8, true),
    minP: view.getFloat32(12, true),
    repeatPenalty: view.getFloat32(16, true),
    presencePenalty: view.getFloat32(20, true),
    frequencyPenalty: view.getFloat32(24, true),
    penaltyLastN: view.getInt32(28, true),
    promptLength: view.getUint32(32, true),
    seed: BigInt(view.getUint32(36, true)) | (BigInt(view.getUint32(40, true)) << 32n),
    ...(top === NO_LOGPROBS ? {} : { topLogprobs: top }),
    logitBias,
  };
}

/**
 * The batch without the entries of some sequences, and the rows of `payload` (one per token, equally long) that stay.
 * Returns what it was given when nothing is dropped.
 */
export function filterBatch(
  batch: DecodedBatch,
  payload: Uint8Array,
  drop: (seq: number) => boolean,
): { batch: DecodedBatch; payload: Uint8Array } {
  const kept = batch.entries.filter((entry) => !drop(entry.seq));
  if (kept.length === batch.entries.length) return { batch, payload };
  const { bytes, tokens } = batch;
  const tokensAt = 4 + batch.entries.length * ENTRY_BYTES;
  const row = tokens.length === 0 ? 0 : Math.floor(payload.byteLength / tokens.length);
  const parts: Uint8Array[] = [new Uint8Array(new Uint32Array([kept.length]).buffer)];
  for (const entry of kept) {
    const at = 4 + batch.entries.indexOf(entry) * ENTRY_BYTES;
    parts.push(bytes.subarray(at, at + ENTRY_BYTES));
  }
  for (const { firstToken, tokenCount } of kept) {
    parts.push(bytes.subarray(tokensAt + 4 * firstToken, tokensAt + 4 * (firstToken + tokenCount)));
  }
  for (const { sampleStart, sampleEnd } of kept) parts.push(bytes.subarray(sampleStart, sampleEnd));
  const rows = kept.map(({ firstToken, tokenCount }) =>
    payload.subarray(row * firstToken, row * (firstToken + tokenCount))
  );
  return { batch: decodeBatch(concatenate(parts)), payload: concatenate(rows) };
}

function concatenate(parts: readonly Uint8Array[]): Uint8Array<ArrayBuffer> {
  const whole = new Uint8Array(parts.reduce((sum, part) => sum + part.byteLength, 0));
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.byteLength;
  }
  return whole;
}
