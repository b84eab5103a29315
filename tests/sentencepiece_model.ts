/**
 * Reads SentencePiece's own `tokenizer.model` as a converter to GGUF does: pieces, scores and types, for tests of vocabularies
 * that come in no other form.
 *
 * Source: `sentencepiece_model.proto` (pieces are field 1: text, score and type) and protobuf's wire format.
 *
 * @module
 */
import type { GgufFile } from "../model/mod.ts";

/** The fields of a protobuf message: numbers of varints, bytes of everything else. */
function* fields(bytes: Uint8Array): Generator<[number, number | Uint8Array]> {
  let at = 0;
  const varint = () => {
    let value = 0;
    for (let scale = 1;; scale *= 128) {
      const byte = bytes[at++]!;
      value += (byte & 127) * scale;
      if (byte < 128) return value;
    }
  };
  while (at < bytes.length) {
    const key = varint();
    const [field, type] = [key >>> 3, key & 7];
    if (type === 0) yield [field, varint()];
    else {
      const size = type === 2 ? varint() : type === 5 ? 4 : type === 1 ? 8 : Number.NaN;
      if (!(at + size <= bytes.length)) throw new Error(`protobuf: field ${field} of wire type ${type} is broken`);
      yield [field, bytes.subarray(at, at += size)];
    }
  }
}

/** The vocabulary as a GGUF of `tokenizer.ggml.model` "llama" would have it. */
export function readSentencePieceModel(path: string): GgufFile {
  const tokens: string[] = [], scores: number[] = [], types: number[] = [];
  for (const [field, piece] of fields(Deno.readFileSync(path))) {
    if (field !== 1 || !(piece instanceof Uint8Array)) continue;
    let [text, score, type] = ["", 0, 1];
    for (const [field, value] of fields(piece)) {
      if (field === 1 && value instanceof Uint8Array) text = new TextDecoder().decode(value);
      if (field === 2 && value instanceof Uint8Array) {
        score = new DataView(value.buffer, value.byteOffset).getFloat32(0, true);
      }
      if (field === 3 && typeof value === "number") type = value;
    }
    tokens.push(text);
    scores.push(score);
    types.push(type);
  }
  const metadata = new Map(Object.entries({
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": tokens,
    "tokenizer.ggml.scores": scores,
    "tokenizer.ggml.token_type": types,
  }));
  return { path, version: 3, size: 0, alignment: 32, metadata, tensors: new Map(), dataOffset: 0 };
}
