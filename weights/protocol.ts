/**
 * How chunks travel. `C` is the cluster's name, `R` the root of a {@linkcode Manifest}, `S` a device that has some of its chunks:
 *
 * | subject | direction | content |
 * |---|---|---|
 * | `lutra.C.weights.R.who` | to all that have chunks | empty; each answers with an {@linkcode Offer} |
 * | `lutra.C.weights.R.source.S` | to one of them | what is wanted, u32 (0: hashes, 1: a chunk), and its number, u32; answered by its bytes, none when it has it not |
 * | `lutra.C.weights.R.answer.X` | to one that asked | an offer |
 *
 * Hashes are asked for in pieces of {@linkcode CHUNK_BYTES}, too. Little-endian.
 *
 * @module
 */
import { z } from "zod";
import { clusterSubjects, WireError } from "../bus/mod.ts";

const u32 = z.number().int().min(0).max(0xffff_ffff);
const offerSchema = z.strictObject({
  source: z.string().regex(/^[A-Za-z0-9_-]{1,64}$/),
  /** Ranges of chunks that it has, end exclusive. */
  ranges: z.array(z.tuple([u32, u32])).max(65_536),
});
/** What a device has of a model. */
export type Offer = z.infer<typeof offerSchema>;
export { offerSchema };

/** What is asked for, and its number. */
export interface Wish {
  readonly kind: "hashes" | "chunk";
  readonly index: number;
}

const KINDS = ["hashes", "chunk"] as const;

/** A wish as bytes. */
export function encodeWish({ kind, index }: Wish): Uint8Array<ArrayBuffer> {
  const data = new DataView(new ArrayBuffer(8));
  data.setUint32(0, KINDS.indexOf(kind), true);
  data.setUint32(4, index, true);
  return new Uint8Array(data.buffer);
}

/** @throws {WireError} when it is none. */
export function decodeWish(data: Uint8Array): Wish {
  if (data.byteLength !== 8) throw new WireError(`a wish of ${data.byteLength} bytes`);
  const view = new DataView(data.buffer, data.byteOffset);
  const kind = KINDS[view.getUint32(0, true)];
  if (kind === undefined) throw new WireError(`a wish of kind ${view.getUint32(0, true)}`);
  return { kind, index: view.getUint32(4, true) };
}

/** The subjects of a model. */
export function modelSubjects(cluster: string, root: string): {
  who: string;
  source(id: string): string;
  answer(id: string): string;
} {
  const base = clusterSubjects(cluster).weights(root);
  return { who: `${base}.who`, source: (id) => `${base}.source.${id}`, answer: (id) => `${base}.answer.${id}` };
}
