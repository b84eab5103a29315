import { existsSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { z } from "zod";
import { ABI_VERSION } from "../bus/mod.ts";
import type { NativeEndpoint, Shard, ShardStats } from "../bus/mod.ts";
import { borrow, ERROR_BYTES, fixed, textOf, unwrap } from "./abi.ts";
import type { Bytes } from "./abi.ts";
import { KernelError, KernelLibraryError } from "./errors.ts";
import type {
  CacheChoice,
  DeviceInfo,
  KernelLibrary,
  Lane,
  OpenShardOptions,
  ShardChoices,
  ShardHandle,
  Tuning,
} from "./kernels.ts";
import { LANE_SYMBOLS, NativeLane } from "./native_lane.ts";
import type { LaneSymbols } from "./native_lane.ts";

/**
 * The C ABI. Every function but the first returns a count ≥ 0 or a negative error code, and then has written a u32 length
 * and so many bytes of UTF-8 text to `err`. Buffers are borrowed for the call only; integers are little-endian.
 */
const SYMBOLS = {
  // int32_t lutra_abi_version(void);
  lutra_abi_version: { parameters: [], result: "i32" },
  // int32_t lutra_device_info(uint8_t *out, size_t out_len, uint8_t *err, size_t err_len);
  lutra_device_info: { parameters: ["buffer", "usize", "buffer", "usize"], result: "i32" },
  // int32_t lutra_measure_bandwidth(uint32_t threads, uint32_t mebibytes, double *out, size_t out_len, uint8_t *err, size_t err_len);
  lutra_measure_bandwidth: {
    parameters: ["u32", "u32", "buffer", "usize", "buffer", "usize"],
    result: "i32",
    nonblocking: true,
  },
  // int32_t lutra_shard_open(const uint8_t *descriptor, size_t descriptor_len, const uint64_t *progress, size_t progress_len,
  //   uint32_t *handle, size_t handle_len, uint8_t *err, size_t err_len);
  lutra_shard_open: {
    parameters: ["buffer", "usize", "buffer", "usize", "buffer", "usize", "buffer", "usize"],
    result: "i32",
    nonblocking: true,
  },
  // int32_t lutra_shard_forward(uint32_t handle, const uint8_t *batch, size_t batch_len, const uint8_t *input, size_t input_len,
  //   const int32_t *stop, size_t stop_len, uint8_t *output, size_t output_len, uint32_t *written, size_t written_len, uint8_t *err, size_t err_len);
  lutra_shard_forward: {
    parameters: [
      "u32",
      "buffer",
      "usize",
      "buffer",
      "usize",
      "buffer",
      "usize",
      "buffer",
      "usize",
      "buffer",
      "usize",
      "buffer",
      "usize",
    ],
    result: "i32",
    nonblocking: true,
  },
  // int32_t lutra_shard_truncate(uint32_t handle, uint32_t seq, uint32_t length, uint8_t *err, size_t err_len);
  lutra_shard_truncate: { parameters: ["u32", "u32", "u32", "buffer", "usize"], result: "i32" },
  // int32_t lutra_shard_stats(uint32_t handle, uint8_t *out, size_t out_len, uint8_t *err, size_t err_len);
  lutra_shard_stats: { parameters: ["u32", "buffer", "usize", "buffer", "usize"], result: "i32" },
  // int32_t lutra_shard_close(uint32_t handle, uint8_t *err, size_t err_len);
  lutra_shard_close: { parameters: ["u32", "buffer", "usize"], result: "i32" },
  // int32_t lutra_unpack(uint32_t ggml_type, const uint8_t *src, size_t src_len, float *out, size_t out_len, uint32_t rows, uint32_t cols, uint8_t *err, size_t err_len);
  lutra_unpack: {
    parameters: ["u32", "buffer", "usize", "buffer", "usize", "u32", "u32", "buffer", "usize"],
    result: "i32",
  },
  // int32_t lutra_matmul(uint32_t ggml_type, const uint8_t *src, size_t src_len, uint32_t rows, uint32_t cols, const float *x, size_t x_len, uint32_t n,
  //   float *y, size_t y_len, uint32_t threads, const uint8_t *isa, size_t isa_len, uint8_t *err, size_t err_len);
  lutra_matmul: {
    parameters: [
      "u32",
      "buffer",
      "usize",
      "u32",
      "u32",
      "buffer",
      "usize",
      "u32",
      "buffer",
      "usize",
      "u32",
      "buffer",
      "usize",
      "buffer",
      "usize",
    ],
    result: "i32",
  },
  // int32_t lutra_tune(const uint8_t *request, size_t request_len, uint8_t *out, size_t out_len, uint8_t *err, size_t err_len);
  lutra_tune: {
    parameters: ["buffer", "usize", "buffer", "usize", "buffer", "usize"],
    result: "i32",
    nonblocking: true,
  },
  ...LANE_SYMBOLS,
} as const satisfies Deno.ForeignLibraryInterface;

type Symbols = Deno.DynamicLibrary<typeof SYMBOLS>["symbols"];

const JSON_BYTES = 1 << 14;
const REPORT_BYTES = 1 << 22;
/** Milliseconds between two looks at a shard's progress. */
const PROGRESS_MS = 100;

const deviceInfoSchema = z.object({
  isa: z.string(),
  available: z.array(z.string()),
  cores: z.number().int().positive(),
});
const statsSchema = z.object({
  kvBlocksTotal: z.number(),
  kvBlocksFree: z.number(),
  blockTokens: z.number().int().positive(),
  weightBytes: z.number(),
  cachedBytes: z.number(),
  sequences: z.number(),
  weightBytesPerToken: z.number(),
});

const planSchema = z.object({
  /** The most rows of activations that it is for; `null`: any number. */
  most: z.number().nullable(),
  kernel: z.string(),
  /** Rows of activations that the kernel takes at once. */
  width: z.number(),
  /** Bytes of activations that meet all weights before the next do. */
  blockBytes: z.number(),
});
const tuningReportSchema = z.object({
  cpu: z.string(),
  isa: z.string(),
  threads: z.number(),
  /** The file that the choices are kept in. */
  store: z.string().nullable(),
  /** Spent on measuring. */
  seconds: z.number(),
  choices: z.array(z.object({
    type: z.string(),
    /** At most as many as are measured. */
    rows: z.number(),
    cols: z.number(),
    origin: z.enum(["measured", "stored", "rule"]),
    form: z.string(),
    /** Up to so many rows of activations one thread computes alone; `null`: the rule's number. */
    inlineRows: z.number().nullable(),
    plans: z.array(planSchema),
  })),
  trials: z.array(z.object({
    type: z.string(),
    rows: z.number(),
    cols: z.number(),
    /** Rows of activations. */
    batch: z.number(),
    form: z.string(),
    kernel: z.string(),
    width: z.number(),
    blockBytes: z.number(),
    /** On one thread. */
    inline: z.boolean(),
    /** Median of a product, with the preparation of its activations. */
    seconds: z.number(),
    /** Against the rule's choice, in the same rounds. */
    ratio: z.number(),
    chosen: z.boolean(),
  })),
  /** What went wrong; it costs time only. */
  warnings: z.array(z.string()),
});
/** What was measured, and what was chosen. */
export type TuningReport = z.infer<typeof tuningReportSchema>;

/** Matrices to measure kernels for. */
export interface TuningRequest extends ShardChoices {
  readonly tune: Tuning;
  readonly cache: CacheChoice | null;
  /** Bytes of the model's file. */
  readonly bytes: number;
  /** The most important first, with GGML's types: the time for measuring may not suffice for all. */
  readonly matrices: readonly { readonly type: number; readonly rows: number; readonly cols: number }[];
}

/** Options of {@linkcode loadKernels}. */
export interface LoadKernelsOptions {
  /** The library's file. Default: the environment variable `LUTRA_KERNELS`, else where `deno task build` leaves it. */
  path?: string;
}

/** The kernel library with its functions for tests and benchmarks. */
export interface LoadedKernels extends KernelLibrary {
  /** The file it was loaded from. */
  readonly path: string;
  /** Measures kernels as a shard of these matrices would, and keeps the choices. */
  tune(request: TuningRequest): Promise<TuningReport>;
  /** Packs a matrix of `rows × cols` in blocks of GGML type `type`, and unpacks it. */
  unpack(type: number, source: Uint8Array, rows: number, cols: number): Float32Array;
  /** `y[n × rows] = x[n × cols] · Wᵀ`. `isa`: default the best. */
  matmul(
    type: number,
    source: Uint8Array,
    rows: number,
    cols: number,
    x: Float32Array,
    options?: { threads?: number; isa?: string },
  ): Float32Array;
}

const loaded = new Map<string, LoadedKernels>();

/**
 * Opens the kernel library, once per file and process. It is never closed: a call in flight would lose the code it runs.
 *
 * @throws {KernelLibraryError} when it is missing or of another ABI version.
 */
export function loadKernels(options: LoadKernelsOptions = {}): LoadedKernels {
  const path = options.path ?? Deno.env.get("LUTRA_KERNELS") ?? defaultPath();
  const known = loaded.get(path);
  if (known !== undefined) return known;
  let symbols: Symbols;
  try {
    symbols = Deno.dlopen(path, SYMBOLS).symbols;
  } catch (cause) {
    if (cause instanceof Deno.errors.NotCapable) {
      throw new KernelLibraryError(`the kernel library ${path} needs the permission --allow-ffi=${path}`, { cause });
    }
    const problem = existsSync(path) ? "cannot be opened" : "is not there";
    throw new KernelLibraryError(`the kernel library ${path} ${problem}: run \`deno task build\``, { cause });
  }
  const version = symbols.lutra_abi_version();
  if (version !== ABI_VERSION) {
    throw new KernelLibraryError(
      `the kernel library ${path} has ABI version ${version}, not ${ABI_VERSION}: run \`deno task build\``,
    );
  }
  const library = new Library(symbols, path);
  loaded.set(path, library);
  return library;
}

function defaultPath(): string {
  const name = { windows: "lutra_kernels.dll", darwin: "liblutra_kernels.dylib" }[Deno.build.os as string] ??
    "liblutra_kernels.so";
  return fileURLToPath(new URL(`../kernels/target/release/${name}`, import.meta.url));
}

function readJson<T>(schema: z.ZodType<T>, call: (out: Bytes, err: Bytes) => number): T {
  const out = fixed(JSON_BYTES);
  const err = fixed(ERROR_BYTES);
  const length = unwrap(call(out, err), err);
  return schema.parse(JSON.parse(new TextDecoder().decode(out.subarray(0, length))));
}

class Library implements LoadedKernels {
  readonly abiVersion = ABI_VERSION;
  readonly path: string;
  readonly #symbols: Symbols;

  constructor(symbols: Symbols, path: string) {
    this.#symbols = symbols;
    this.path = path;
  }

  deviceInfo(): DeviceInfo {
    return readJson(
      deviceInfoSchema,
      (out, err) => this.#symbols.lutra_device_info(out, BigInt(out.byteLength), err, BigInt(err.byteLength)),
    );
  }

  async measureBandwidth(threads: number, mebibytes: number): Promise<number> {
    const out = fixed(8);
    const err = fixed(ERROR_BYTES);
    const code = await this.#symbols.lutra_measure_bandwidth(
      threads,
      mebibytes,
      out,
      BigInt(out.byteLength),
      err,
      BigInt(err.byteLength),
    );
    unwrap(code, err);
    return new DataView(out.buffer).getFloat64(0, true);
  }

  async openShard(shard: Shard, choices: ShardChoices, options: OpenShardOptions = {}): Promise<ShardHandle> {
    const descriptor = new TextEncoder().encode(JSON.stringify({ ...shard, ...choices }));
    const handle = fixed(4);
    const err = fixed(ERROR_BYTES);
    const progress = new BigUint64Array(new ArrayBuffer(16));
    const { onProgress, onNote } = options;
    const look = () => {
      const total = Number(Atomics.load(progress, 1));
      if (total > 0) onProgress?.(Math.min(1, Number(Atomics.load(progress, 0)) / total));
    };
    const timer = onProgress === undefined ? undefined : setInterval(look, PROGRESS_MS);
    let code: number;
    try {
      code = await this.#symbols.lutra_shard_open(
        descriptor,
        BigInt(descriptor.byteLength),
        progress,
        BigInt(progress.byteLength),
        handle,
        BigInt(handle.byteLength),
        err,
        BigInt(err.byteLength),
      );
    } finally {
      clearInterval(timer);
    }
    if (unwrap(code, err) > 0) onNote?.(textOf(err));
    return new Handle(this.#symbols, new DataView(handle.buffer).getUint32(0, true));
  }

  async tune(request: TuningRequest): Promise<TuningReport> {
    const json = new TextEncoder().encode(JSON.stringify(request));
    const out = fixed(REPORT_BYTES);
    const err = fixed(ERROR_BYTES);
    const code = await this.#symbols.lutra_tune(
      json,
      BigInt(json.byteLength),
      out,
      BigInt(out.byteLength),
      err,
      BigInt(err.byteLength),
    );
    return tuningReportSchema.parse(JSON.parse(new TextDecoder().decode(out.subarray(0, unwrap(code, err)))));
  }

  unpack(type: number, source: Uint8Array, rows: number, cols: number): Float32Array {
    const src = borrow(source);
    const out = new Float32Array(new ArrayBuffer(4 * rows * cols));
    const err = fixed(ERROR_BYTES);
    const code = this.#symbols.lutra_unpack(
      type,
      src,
      BigInt(src.byteLength),
      out,
      BigInt(out.byteLength),
      rows,
      cols,
      err,
      BigInt(err.byteLength),
    );
    unwrap(code, err);
    return out;
  }

  matmul(
    type: number,
    source: Uint8Array,
    rows: number,
    cols: number,
    x: Float32Array,
    options: { threads?: number; isa?: string } = {},
  ): Float32Array {
    const n = Math.floor(x.length / cols);
    const src = borrow(source);
    const input = borrow(x);
    const y = new Float32Array(new ArrayBuffer(4 * n * rows));
    const isa = new TextEncoder().encode(options.isa ?? "");
    const err = fixed(ERROR_BYTES);
    const code = this.#symbols.lutra_matmul(
      type,
      src,
      BigInt(src.byteLength),
      rows,
      cols,
      input,
      BigInt(input.byteLength),
      n,
      y,
      BigInt(y.byteLength),
      options.threads ?? 1,
      isa,
      BigInt(isa.byteLength),
      err,
      BigInt(err.byteLength),
    );
    unwrap(code, err);
    return y;
  }
}

class Handle implements ShardHandle {
  readonly #symbols: Symbols;
  readonly #handle: number;
  readonly #written = fixed(4);
  readonly #forwardError = fixed(ERROR_BYTES);
  readonly #error = fixed(ERROR_BYTES);
  /** Keeps the buffers of the call in flight from the garbage collector. */
  #inFlight: readonly ArrayBufferView[] | undefined;

  constructor(symbols: Symbols, handle: number) {
    this.#symbols = symbols;
    this.#handle = handle;
  }

  async forward(batch: Uint8Array, input: Uint8Array, stop: Int32Array, output: Uint8Array): Promise<number> {
    if (this.#inFlight !== undefined) throw new KernelError(-1, "the shard computes another micro-batch");
    const err = this.#forwardError;
    const [batchBytes, inputBytes, stopBytes, outputBytes] = [
      borrow(batch),
      borrow(input),
      borrow(stop),
      borrow(output),
    ];
    this.#inFlight = [batchBytes, inputBytes, stopBytes, outputBytes];
    try {
      const code = await this.#symbols.lutra_shard_forward(
        this.#handle,
        batchBytes,
        BigInt(batchBytes.byteLength),
        inputBytes,
        BigInt(inputBytes.byteLength),
        stopBytes,
        BigInt(stopBytes.byteLength),
        outputBytes,
        BigInt(outputBytes.byteLength),
        this.#written,
        BigInt(this.#written.byteLength),
        err,
        BigInt(err.byteLength),
      );
      unwrap(code, err);
      return new DataView(this.#written.buffer).getUint32(0, true);
    } finally {
      this.#inFlight = undefined;
    }
  }

  /** Absent where the library has no lanes. */
  get openLane():
    | ((endpoint: NativeEndpoint, subjects: readonly string[], maxPayload: number) => Promise<Lane>)
    | undefined {
    if (this.#symbols.lutra_lane_open === null) return undefined;
    const symbols = this.#symbols as LaneSymbols;
    return (endpoint, subjects, maxPayload) => NativeLane.open(symbols, this.#handle, endpoint, subjects, maxPayload);
  }

  truncate(seq: number, length: number): void {
    const err = this.#error;
    unwrap(this.#symbols.lutra_shard_truncate(this.#handle, seq, length, err, BigInt(err.byteLength)), err);
  }

  stats(): ShardStats {
    return readJson(
      statsSchema,
      (out, err) =>
        this.#symbols.lutra_shard_stats(this.#handle, out, BigInt(out.byteLength), err, BigInt(err.byteLength)),
    );
  }

  close(): void {
    const err = this.#error;
    unwrap(this.#symbols.lutra_shard_close(this.#handle, err, BigInt(err.byteLength)), err);
  }
}
