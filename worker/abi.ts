import { KernelError } from "./errors.ts";

/** Bytes of a call's error text. */
export const ERROR_BYTES = 2048;

/** Bytes in memory of JavaScript's that stays where it is. */
export type Bytes = Uint8Array<ArrayBuffer>;

/** Bytes outside V8's movable heap, where small typed arrays would lie: a nonblocking call keeps their address. */
export function fixed(bytes: number): Bytes {
  return new Uint8Array(new ArrayBuffer(bytes));
}

/** Throws the error in `err` when `code` is one, else returns it. */
export function unwrap(code: number, err: Bytes): number {
  if (code >= 0) return code;
  throw new KernelError(code, textOf(err) || `kernel library error ${code}`);
}

/** The text that a call has written to `err`. */
export function textOf(err: Bytes): string {
  const length = Math.min(new DataView(err.buffer).getUint32(0, true), err.byteLength - 4);
  return new TextDecoder().decode(err.subarray(4, 4 + length));
}

/** The bytes of a typed array, as the FFI takes them. */
export function borrow(data: ArrayBufferView): Bytes {
  return new Uint8Array(data.buffer as ArrayBuffer, data.byteOffset, data.byteLength);
}
