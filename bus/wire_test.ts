import assert from "node:assert/strict";
import { decodeBatch, decodeSample, encodeBatch, filterBatch } from "./batch.ts";
import type { BatchEntry, SampleParameters } from "./batch.ts";
import { WireError } from "./errors.ts";
import {
  decodeFailure,
  decodeMessage,
  decodeResults,
  encodeFailure,
  encodeMessage,
  entryTable,
  MAX_CHAIN,
  maxResultBytes,
} from "./wire.ts";

const sample: SampleParameters = {
  temperature: 0.5,
  topK: 40,
  topP: 0.75,
  minP: 0.25,
  repeatPenalty: 1.5,
  presencePenalty: -0.5,
  frequencyPenalty: 2,
  penaltyLastN: -1,
  promptLength: 7,
  seed: 0xfedc_ba98_7654_3210n,
  topLogprobs: 2,
  logitBias: new Map([[3, -1], [9, 100]]),
};
const { topLogprobs: _, ...plain } = sample;
const entries: BatchEntry[] = [
  { seq: 4, pos: 0, tokens: [1, 2, 3], sample },
  { seq: 0xffff_ffff, pos: 31, tokens: [7] },
  { seq: 5, pos: 2, tokens: [8, 9], sample: plain, logits: true },
];

/** Deterministic bytes for the fuzz tests (xorshift32). */
function random(seed: number): () => number {
  let x = seed;
  return () => {
    x ^= x << 13;
    x ^= x >>> 17;
    x ^= x << 5;
    return (x >>> 0) / 2 ** 32;
  };
}

Deno.test("encodeBatch: the bytes are those of the contract", () => {
  const bytes = encodeBatch([{ seq: 1, pos: 2, tokens: [3], sample: { ...sample, logitBias: new Map([[5, 1]]) } }]);
  const view = new DataView(bytes.buffer);
  const words = Array.from({ length: bytes.length / 4 }, (_, i) => view.getUint32(4 * i, true));
  assert.deepEqual(words.slice(0, 6), [1, 1, 2, 1, 1, 3]);
  assert.equal(view.getFloat32(24, true), 0.5);
  assert.equal(view.getInt32(24 + 28, true), -1);
  assert.deepEqual(words.slice(14), [7, 0x7654_3210, 0xfedc_ba98, 2, 1, 5, 0x3f80_0000]);
});

Deno.test("decodeBatch: returns what encodeBatch wrote, from unaligned bytes too", () => {
  const bytes = encodeBatch(entries);
  const shifted = new Uint8Array(bytes.length + 1);
  shifted.set(bytes, 1);
  for (const batch of [decodeBatch(bytes), decodeBatch(shifted.subarray(1))]) {
    assert.deepEqual([...batch.tokens], [1, 2, 3, 7, 8, 9]);
    assert.deepEqual(batch.entries.map((e) => [e.seq, e.pos, e.tokenCount, e.firstToken, e.sampled, e.logits]), [
      [4, 0, 3, 0, true, false],
      [0xffff_ffff, 31, 1, 3, false, false],
      [5, 2, 2, 4, true, true],
    ]);
    assert.deepEqual(batch.entries.map((e) => decodeSample(batch, e)), [sample, undefined, plain]);
    assert.equal(maxResultBytes(batch, 10), 12 + 16 + 12 + 80);
  }
});

Deno.test("decodeBatch: every damage has its message", () => {
  const cases: [edit: (bytes: Uint8Array, view: DataView) => Uint8Array | void, message: RegExp][] = [
    [() => new Uint8Array(3), /no entry count/],
    [(_, v) => v.setUint32(0, 0xffff_ffff, true), /cannot hold 4294967295 entries/],
    [(_, v) => v.setUint32(12, 0, true), /entry 0 has no tokens/],
    [(_, v) => v.setUint32(12, 0xffff_ffff, true), /cannot hold \d+ tokens/],
    [(_, v) => v.setUint32(16, 4, true), /unknown flags 4/],
    [(_, v) => v.setUint32(4, 5, true), /sequence 5 occurs twice/],
    [(b) => b.subarray(0, b.length - 1), /lacks its/],
    [(b) => Uint8Array.from([...b, 0]), /1 bytes too many/],
  ];
  for (const [edit, message] of cases) {
    const bytes = encodeBatch(entries);
    const edited = edit(bytes, new DataView(bytes.buffer)) ?? bytes;
    assert.throws(() => decodeBatch(edited), { name: "WireError", message });
  }
});

Deno.test("filterBatch: drops the sequences' entries, tokens, parameters and rows", () => {
  const batch = decodeBatch(encodeBatch(entries));
  const payload = Uint8Array.from([10, 11, 20, 21, 30, 31, 40, 41, 50, 51, 60, 61]);
  const same = filterBatch(batch, payload, () => false);
  assert.equal(same.batch, batch);
  assert.equal(same.payload, payload);
  for (const dropped of [[4], [5], [4, 0xffff_ffff], [0xffff_ffff], [4, 5, 0xffff_ffff]]) {
    const kept = entries.filter((entry) => !dropped.includes(entry.seq));
    const rows = new Map([[4, [10, 11, 20, 21, 30, 31]], [0xffff_ffff, [40, 41]], [5, [50, 51, 60, 61]]]);
    const filtered = filterBatch(batch, payload, (seq) => dropped.includes(seq));
    assert.deepEqual(filtered.batch.bytes, encodeBatch(kept));
    assert.deepEqual([...filtered.payload], kept.flatMap((entry) => rows.get(entry.seq)!));
  }
});

Deno.test("decodeMessage: returns what encodeMessage wrote and refuses the rest", () => {
  const batch = encodeBatch(entries);
  const payload = Uint8Array.from([1, 2, 3]);
  const bytes = encodeMessage({ kind: "work", epoch: 0xffff_ffff, step: 8 }, batch, payload);
  const message = decodeMessage(bytes);
  assert.deepEqual({ ...message, batch: [...message.batch], payload: [...message.payload] }, {
    kind: "work",
    epoch: 0xffff_ffff,
    step: 8,
    error: false,
    chain: 0,
    batch: [...batch],
    payload: [1, 2, 3],
  });
  const cases: [at: number, value: number, message: RegExp][] = [
    [0, 0, /begins with/],
    [2, 99, /wire version 99/],
    [3, 3, /unknown kind 3/],
    [12, 0xff, /announces/],
    [16, 0, /announces/],
    [20, 1, /unknown flags/],
    [23, 1, /unknown flags/],
  ];
  for (const [at, value, expected] of cases) {
    const damaged = bytes.slice();
    damaged[at] = value;
    assert.throws(() => decodeMessage(damaged), { name: "WireError", message: expected });
  }
  assert.throws(() => decodeMessage(bytes.subarray(0, 23)), /no header/);
  const chained = { epoch: 1, step: 2, chain: MAX_CHAIN } as const;
  assert.equal(decodeMessage(encodeMessage({ kind: "work", ...chained }, batch, payload)).chain, MAX_CHAIN);
  assert.throws(() => decodeMessage(encodeMessage({ kind: "result", ...chained }, batch, payload)), /unknown flags/);
});

/** The results of `entries` with vocab 2, as a last stage writes them. */
function results(): Uint8Array {
  const view = new DataView(new ArrayBuffer(12 + 16 + 12 + 16));
  const words = [[6, -0.5, 2], [6, -0.5], [1, -1], [9, -3, 0]];
  let at = 0;
  for (const word of words) {
    word.forEach((value, i) => {
      if (i === 1) view.setFloat32(at, value, true);
      else view.setUint32(at, value, true);
      at += 4;
    });
  }
  [1, 2, 3, 4].forEach((value, i) => view.setFloat32(at + 4 * i, value, true));
  return new Uint8Array(view.buffer);
}

Deno.test("decodeResults: tokens, alternatives and logits find their sequences", () => {
  const batch = decodeBatch(encodeBatch(entries));
  const bytes = encodeMessage({ kind: "result", epoch: 1, step: 2 }, entryTable(batch), results());
  assert.deepEqual(decodeResults(decodeMessage(bytes), 2), [
    {
      seq: 4,
      pos: 0,
      tokenCount: 3,
      sampled: { id: 6, logprob: -0.5, top: [{ id: 6, logprob: -0.5 }, { id: 1, logprob: -1 }] },
    },
    { seq: 0xffff_ffff, pos: 31, tokenCount: 1 },
    { seq: 5, pos: 2, tokenCount: 2, sampled: { id: 9, logprob: -3, top: [] }, logits: Float32Array.of(1, 2, 3, 4) },
  ]);
  assert.throws(() => decodeResults(decodeMessage(bytes), 3), /ends within logits 2/);
  assert.throws(() => decodeResults(decodeMessage(bytes), 1), /8 bytes too many/);
});

Deno.test("decodeFailure: returns what encodeFailure wrote and refuses the rest", () => {
  const failure = { code: -4, message: "kv full — ü", worker: "a", stage: 2 };
  assert.deepEqual(decodeFailure(encodeFailure(failure)), failure);
  for (const text of ["", "null", "1", "[]", "{}", '{"code":1}']) {
    assert.throws(() => decodeFailure(new TextEncoder().encode(text)), WireError, text);
  }
  assert.throws(() => decodeFailure(Uint8Array.of(0xff)), WireError);
});

Deno.test("decoders: 20000 random and mutated messages give a value or a WireError", () => {
  const next = random(1);
  const int = (n: number) => Math.floor(next() * n);
  const batch = decodeBatch(encodeBatch(entries));
  const seeds = [
    encodeMessage({ kind: "work", epoch: 1, step: 1 }, batch.bytes, new Uint8Array(24)),
    encodeMessage({ kind: "result", epoch: 1, step: 1 }, entryTable(batch), results()),
    encodeMessage(
      { kind: "result", epoch: 1, step: 1, error: true },
      entryTable(batch),
      encodeFailure({ code: -1, message: "x", worker: "a", stage: 0 }),
    ),
  ];
  let accepted = 0;
  for (let round = 0; round < 20_000; round++) {
    let bytes: Uint8Array = seeds[int(3)]!.slice();
    if (round % 4 === 0) bytes = Uint8Array.from({ length: int(200) }, () => int(256));
    for (let n = int(4); n > 0 && bytes.length > 0; n--) {
      bytes[int(bytes.length)] = [0, 1, 0xff, 0x7f, 0x80, int(256)][int(6)]!;
    }
    if (int(5) === 0) bytes = bytes.subarray(0, int(bytes.length + 1));
    // Half of the time the header is made right again, so that damage reaches the decoders behind it.
    if (bytes.length >= 24 && int(2) === 0) {
      const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
      bytes.set(seeds[0]!.subarray(0, 3));
      const inner = Math.min(view.getUint32(12, true), bytes.length - 24);
      view.setUint32(12, inner, true);
      view.setUint32(16, bytes.length - 24 - inner, true);
    }
    for (
      const decode of [
        () => {
          const message = decodeMessage(bytes);
          if (message.error) return decodeFailure(message.payload);
          if (message.kind === "result") return decodeResults(message, 2);
          const decoded = decodeBatch(message.batch);
          decoded.entries.forEach((entry) => decodeSample(decoded, entry));
          return filterBatch(decoded, message.payload, (seq) => seq % 2 === 0);
        },
        () => decodeBatch(bytes),
      ]
    ) {
      try {
        decode();
        accepted++;
      } catch (error) {
        assert(error instanceof WireError, `round ${round}: ${error}`);
      }
    }
  }
  assert(accepted > 500, `only ${accepted} messages were accepted: the test does not reach far`);
});
