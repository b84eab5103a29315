import { WireError } from "./errors.ts";

/** Bytes of an answer to a probe before those that were sent. */
export const PROBE_HEADER_BYTES = 8;

/** The answer to a probe: the device's clock (milliseconds since 1970) and what was sent. */
export function encodeProbeReply(clockMs: number, data: Uint8Array): Uint8Array<ArrayBuffer> {
  const reply = new Uint8Array(PROBE_HEADER_BYTES + data.byteLength);
  new DataView(reply.buffer).setFloat64(0, clockMs, true);
  reply.set(data, PROBE_HEADER_BYTES);
  return reply;
}

/**
 * The device's clock in an answer to a probe.
 *
 * @throws {WireError} when it is none, or not as long as what was sent.
 */
export function decodeProbeReply(data: Uint8Array, sentBytes: number): number {
  if (data.byteLength !== PROBE_HEADER_BYTES + sentBytes) {
    throw new WireError(`an answer of ${data.byteLength} bytes to a probe of ${sentBytes}`);
  }
  const clock = new DataView(data.buffer, data.byteOffset).getFloat64(0, true);
  if (!Number.isFinite(clock)) throw new WireError("an answer to a probe without a time");
  return clock;
}
