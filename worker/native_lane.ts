import type { NativeEndpoint } from "../bus/mod.ts";
import { borrow, ERROR_BYTES, fixed, textOf, unwrap } from "./abi.ts";
import type { Bytes } from "./abi.ts";
import { KernelError, KernelErrorCode } from "./errors.ts";
import type { Armed, Lane, LaneEvent } from "./kernels.ts";

const BYTES = ["buffer", "usize"] as const;
const ERR = BYTES;

/** The C ABI of lanes; absent where the operating system has none. See `kernel_library.ts` for the conventions. */
export const LANE_SYMBOLS = {
  // int32_t lutra_lane_open(const uint8_t *address, size_t address_len, uint8_t *info, size_t info_len, uint32_t *handle,
  //   size_t handle_len, uint8_t *err, size_t err_len);
  lutra_lane_open: {
    parameters: [...BYTES, ...BYTES, ...BYTES, ...ERR],
    result: "i32",
    nonblocking: true,
    optional: true,
  },
  // int32_t lutra_lane_join(uint32_t handle, const uint8_t *hello, size_t hello_len, uint32_t most_payload, uint32_t timeout_ms,
  //   uint8_t *err, size_t err_len);
  lutra_lane_join: {
    parameters: ["u32", ...BYTES, "u32", "u32", ...ERR],
    result: "i32",
    nonblocking: true,
    optional: true,
  },
  // int32_t lutra_lane_step(uint32_t handle, uint32_t shard, const uint8_t *armed, size_t armed_len, const int32_t *control,
  //   size_t control_len, uint8_t *report, size_t report_len, uint8_t *err, size_t err_len);
  lutra_lane_step: {
    parameters: ["u32", "u32", ...BYTES, ...BYTES, ...BYTES, ...ERR],
    result: "i32",
    nonblocking: true,
    optional: true,
  },
  // int32_t lutra_lane_take(uint32_t handle, uint8_t *out, size_t out_len, uint8_t *err, size_t err_len);
  lutra_lane_take: { parameters: ["u32", ...BYTES, ...ERR], result: "i32", optional: true },
  // int32_t lutra_lane_publish(uint32_t handle, const uint8_t *subject, size_t subject_len, const uint8_t *data, size_t data_len,
  //   uint8_t *err, size_t err_len);
  lutra_lane_publish: { parameters: ["u32", ...BYTES, ...BYTES, ...ERR], result: "i32", optional: true },
  // int32_t lutra_lane_flush(uint32_t handle, uint8_t *err, size_t err_len);
  lutra_lane_flush: { parameters: ["u32", ...ERR], result: "i32", nonblocking: true, optional: true },
  // int32_t lutra_lane_read(uint32_t handle, uint8_t *err, size_t err_len);
  lutra_lane_read: { parameters: ["u32", ...ERR], result: "i32", optional: true },
  // int32_t lutra_lane_wake(uint32_t handle, uint8_t *err, size_t err_len);
  lutra_lane_wake: { parameters: ["u32", ...ERR], result: "i32", optional: true },
  // int32_t lutra_lane_close(uint32_t handle, uint8_t *err, size_t err_len);
  lutra_lane_close: { parameters: ["u32", ...ERR], result: "i32", optional: true },
} as const satisfies Deno.ForeignLibraryInterface;

type Optional = Deno.DynamicLibrary<typeof LANE_SYMBOLS>["symbols"];
/** The functions, where they are. */
export type LaneSymbols = { readonly [Name in keyof Optional]: NonNullable<Optional[Name]> };

/** What `lutra_lane_step` returns. */
const Step = { woken: 0, message: 1, done: 2 } as const;
/** Words of the step's control: see `Control` in `kernels/src/lane/mod.rs`. */
const Control = { stop: 0, attention: 1, running: 2, began: 3 } as const;

const TIMEOUT_MS = 5000;
/** Of a server's greeting, which names all servers of its cluster. */
const INFO_BYTES = 1 << 16;

/** A lane of the kernel library. */
export class NativeLane implements Lane {
  readonly #symbols: LaneSymbols;
  readonly #handle: number;
  readonly #shard: number;
  readonly #control = new Int32Array(new ArrayBuffer(16));
  readonly #report = fixed(32);
  readonly #stepError = fixed(ERROR_BYTES);
  readonly #flushError = fixed(ERROR_BYTES);
  readonly #error = fixed(ERROR_BYTES);
  /** Keeps what a step in flight uses from the garbage collector. */
  #inFlight: Bytes | undefined;
  #begun = 0;
  /** Sends what the socket did not take at once. */
  #flushing: Promise<void> | undefined;
  #closed = false;

  private constructor(symbols: LaneSymbols, handle: number, shard: number) {
    this.#symbols = symbols;
    this.#handle = handle;
    this.#shard = shard;
    this.#control[Control.running] = -1;
  }

  static async open(
    symbols: LaneSymbols,
    shard: number,
    { hostname, port, hello }: NativeEndpoint,
    subjects: readonly string[],
    maxPayload: number,
  ): Promise<NativeLane> {
    const address = new TextEncoder().encode(JSON.stringify({ hostname, port, timeoutMs: TIMEOUT_MS }));
    const [info, handle, err] = [fixed(INFO_BYTES), fixed(4), fixed(ERROR_BYTES)];
    /** From the garbage collector. */
    const kept = [address, info, handle, err];
    const length = await symbols.lutra_lane_open(...sized(address), ...sized(info), ...sized(handle), ...sized(err));
    const greeting = new TextDecoder().decode(info.subarray(0, unwrap(length, err)));
    const lane = new NativeLane(symbols, new DataView(handle.buffer).getUint32(0, true), shard);
    try {
      const lines = new TextEncoder().encode(hello(greeting, subjects));
      kept.push(lines);
      unwrap(await symbols.lutra_lane_join(lane.#handle, ...sized(lines), maxPayload, TIMEOUT_MS, ...sized(err)), err);
      return lane;
    } catch (error) {
      await lane.close();
      throw error;
    } finally {
      kept.length = 0;
    }
  }

  get running(): { index: number; since: number } | undefined {
    const index = Atomics.load(this.#control, Control.running);
    return index < 0 ? undefined : { index, since: this.#begun + Atomics.load(this.#control, Control.began) };
  }

  async step(armed: readonly Armed[]): Promise<LaneEvent> {
    if (this.#inFlight !== undefined) throw new KernelError(-1, "the lane makes another step");
    this.#inFlight = encodeArmed(armed);
    this.#begun = performance.now();
    Atomics.store(this.#control, Control.stop, 0);
    const [report, err] = [this.#report, this.#stepError];
    let code: number;
    try {
      code = await this.#symbols.lutra_lane_step(
        this.#handle,
        this.#shard,
        ...sized(this.#inFlight),
        ...sized(borrow(this.#control)),
        ...sized(report),
        ...sized(err),
      );
    } finally {
      this.#inFlight = undefined;
      Atomics.store(this.#control, Control.running, -1); // after a panic it may be set still
    }
    unwrap(code, err);
    if (code === Step.woken) return { type: "woken" };
    const view = new DataView(report.buffer);
    if (code === Step.message) {
      const subject = view.getUint32(20, true) - 1;
      return { type: "message", subject, data: this.#take(view.getUint32(16, true)) };
    }
    const came = {
      index: view.getUint32(0, true),
      ms: Number(view.getBigUint64(8, true)) / 1e6,
      step: view.getUint32(24, true),
      chain: view.getUint32(28, true),
    };
    if (code === Step.done) return { type: "done", ...came };
    return { type: "failed", ...came, error: new KernelError(view.getInt32(4, true), textOf(err)) };
  }

  #take(bytes: number): Uint8Array {
    const data = fixed(bytes);
    this.#call((err) => this.#symbols.lutra_lane_take(this.#handle, ...sized(data), ...sized(err)));
    return data;
  }

  stop(): void {
    Atomics.store(this.#control, Control.stop, 1);
  }

  wake(): void {
    if (this.#closed) return;
    Atomics.store(this.#control, Control.attention, 1);
    this.#call((err) => this.#symbols.lutra_lane_wake(this.#handle, ...sized(err)));
  }

  publish(subject: string, data: Uint8Array): void {
    if (this.#closed) throw new KernelError(KernelErrorCode.lost, "the lane was closed");
    const to = new TextEncoder().encode(subject);
    const left = this.#call((err) =>
      this.#symbols.lutra_lane_publish(this.#handle, ...sized(to), ...sized(borrow(data)), ...sized(err))
    );
    if (left > 0) this.#flushing ??= this.#flush();
  }

  async #flush(): Promise<void> {
    // That the lane is lost the next step tells.
    await this.#symbols.lutra_lane_flush(this.#handle, ...sized(this.#flushError));
    this.#flushing = undefined;
  }

  readAhead(): void {
    if (!this.#closed) this.#call((err) => this.#symbols.lutra_lane_read(this.#handle, ...sized(err)));
  }

  async close(): Promise<void> {
    if (!this.#closed) {
      this.#closed = true;
      this.stop();
      this.#call((err) => this.#symbols.lutra_lane_close(this.#handle, ...sized(err)));
    }
    await this.#flushing;
  }

  #call(call: (err: Bytes) => number): number {
    const err = this.#error;
    return unwrap(call(err), err);
  }
}

/** A buffer with its length, as the C ABI takes both. */
function sized(bytes: Bytes): [Bytes, bigint] {
  return [bytes, BigInt(bytes.byteLength)];
}

/** The list of `Armed::parse_all` in `kernels/src/lane/armed.rs`. */
function encodeArmed(armed: readonly Armed[]): Bytes {
  const text = new TextEncoder();
  const parts: { words: number[]; bytes: Uint8Array }[] = [{ words: [armed.length], bytes: new Uint8Array() }];
  const part = (bytes: Uint8Array, words: number[] = []) => parts.push({ words: [...words, bytes.byteLength], bytes });
  for (const { payloadBytes, outputBytes, tokensAt, tokenCount, passes, expected, next, head, follows } of armed) {
    part(expected, [payloadBytes, outputBytes, tokensAt, tokenCount, passes ? 1 : 0]);
    part(text.encode(next));
    part(head);
    part(text.encode(follows?.subject ?? ""));
    part(follows?.message ?? new Uint8Array());
    parts.push({ words: [follows?.tokensAt ?? 0, follows?.tokenCount ?? 0], bytes: new Uint8Array() });
  }
  const list = fixed(parts.reduce((sum, { words, bytes }) => sum + 4 * words.length + bytes.byteLength, 0));
  const view = new DataView(list.buffer);
  let at = 0;
  for (const { words, bytes } of parts) {
    for (const word of words) {
      view.setUint32(at, word, true);
      at += 4;
    }
    list.set(bytes, at);
    at += bytes.byteLength;
  }
  return list;
}
