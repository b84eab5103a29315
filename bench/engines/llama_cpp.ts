/**
 * llama.cpp as an {@linkcode Engine}: the shared libraries of the npm package that `peer_package.ts` installs, called
 * through their C interface (llama.h and ggml-cpu.h of llama.cpp 0.5.0).
 *
 * ```sh
 * deno run -A bench/engines/llama_cpp.ts LIBRARIES [VARIANT]
 * ```
 *
 * Settings are those that are best for it: weights repacked (extra buffer types: AMX tiles, or rows interleaved), not
 * mapped; a thread pool that lives as long as the model, as its own benchmark has, instead of threads started for every
 * token; flash attention left to its own choice; a sequence's cache its own.
 *
 * @module
 */
import { readdirSync } from "node:fs";
import { join } from "node:path";
import { serve, token } from "./engine.ts";
import type { Engine, EngineInfo, LoadRequest, MeasureRequest } from "./engine.ts";

/** The version that the layouts below are of. */
const VERSION = "0.5.0";

type Kind = "i32" | "u32" | "f32" | "bool" | "pointer" | "usize";
type Field = readonly [name: string, kind: Kind, initial?: number];

// struct llama_model_params
const MODEL_PARAMS: readonly Field[] = [
  ["devices", "pointer"],
  ["tensor_buft_overrides", "pointer"],
  ["n_gpu_layers", "i32", -1],
  ["split_mode", "i32", 1],
  ["load_mode", "i32", -1],
  ["lazy_mode", "i32", 1],
  ["main_gpu", "i32"],
  ["tensor_split", "pointer"],
  ["progress_callback", "pointer"],
  ["progress_callback_user_data", "pointer"],
  ["kv_overrides", "pointer"],
  ["vocab_only", "bool", 0],
  ["check_tensors", "bool", 0],
  ["use_extra_bufts", "bool", 1],
  ["no_host", "bool", 0],
  ["no_alloc", "bool", 0],
  ["load_mtp", "bool", 0],
];

// struct llama_context_params
const CONTEXT_PARAMS: readonly Field[] = [
  ["n_ctx", "u32", 512],
  ["n_batch", "u32", 2048],
  ["n_ubatch", "u32", 512],
  ["n_seq_max", "u32", 1],
  ["n_rs_seq", "u32"],
  ["n_outputs_max", "u32"],
  ["n_outputs_max_per_seq", "u32", 1],
  ["n_threads", "i32"],
  ["n_threads_batch", "i32"],
  ["ctx_type", "i32"],
  ["rope_scaling_type", "i32", -1],
  ["pooling_type", "i32", -1],
  ["attention_type", "i32", -1],
  ["flash_attn_type", "i32", -1],
  ["rope_freq_base", "f32"],
  ["rope_freq_scale", "f32"],
  ["yarn_ext_factor", "f32"],
  ["yarn_attn_factor", "f32"],
  ["yarn_beta_fast", "f32"],
  ["yarn_beta_slow", "f32"],
  ["yarn_orig_ctx", "u32"],
  ["defrag_thold", "f32"],
  ["cb_eval", "pointer"],
  ["cb_eval_user_data", "pointer"],
  ["type_k", "i32", 1],
  ["type_v", "i32", 1],
  ["abort_callback", "pointer"],
  ["abort_callback_data", "pointer"],
  ["embeddings", "bool", 0],
  ["offload_kqv", "bool", 1],
  ["no_perf", "bool", 1],
  ["op_offload", "bool", 1],
  ["swa_full", "bool", 1],
  ["kv_unified", "bool", 0],
  ["samplers", "pointer"],
  ["n_samplers", "usize"],
  ["ctx_other", "pointer"],
];

// struct llama_batch
const BATCH: readonly Field[] = [
  ["n_tokens", "i32"],
  ["token", "pointer"],
  ["embd", "pointer"],
  ["pos", "pointer"],
  ["n_seq_id", "pointer"],
  ["seq_id", "pointer"],
  ["logits", "pointer"],
];

const SIZES: Readonly<Record<Kind, number>> = { i32: 4, u32: 4, f32: 4, bool: 1, pointer: 8, usize: 8 };

/** A C struct's fields in bytes. */
class Struct {
  readonly bytes: Uint8Array<ArrayBuffer>;
  readonly #view: DataView;
  readonly #at = new Map<string, readonly [number, Kind]>();

  constructor(fields: readonly Field[], bytes?: Uint8Array<ArrayBuffer>) {
    let end = 0;
    for (const [name, kind] of fields) {
      const at = Math.ceil(end / SIZES[kind]) * SIZES[kind];
      this.#at.set(name, [at, kind]);
      end = at + SIZES[kind];
    }
    this.bytes = bytes ?? new Uint8Array(new ArrayBuffer(Math.ceil(end / 8) * 8));
    this.#view = new DataView(this.bytes.buffer, this.bytes.byteOffset);
    // A library of another version would read other fields: its own defaults tell.
    for (const [name, , initial] of bytes === undefined ? [] : fields) {
      if (initial !== undefined && this.get(name) !== initial) {
        throw new Error(`llama.cpp's field ${name} is ${this.get(name)}, not ${initial}: it is not version ${VERSION}`);
      }
    }
  }

  get(name: string): number {
    const [at, kind] = this.#at.get(name)!;
    if (kind === "bool") return this.#view.getUint8(at);
    if (kind === "f32") return this.#view.getFloat32(at, true);
    return kind === "u32" ? this.#view.getUint32(at, true) : this.#view.getInt32(at, true);
  }

  set(name: string, value: number | bigint): void {
    const [at, kind] = this.#at.get(name)!;
    if (kind === "bool") this.#view.setUint8(at, Number(value));
    else if (SIZES[kind] === 8) this.#view.setBigUint64(at, BigInt(value), true);
    else this.#view.setInt32(at, Number(value), true);
  }
}

const struct = (fields: readonly Field[]) => ({ struct: fields.map(([, kind]) => kind) } as const);

/** The file of a library whose version is in its name. */
function find(folder: string, start: string): string {
  const name = readdirSync(folder).find((file) => file.startsWith(start) && /\.(so|dylib)/.test(file));
  if (name === undefined) throw new Error(`${folder} has no ${start}`);
  return join(folder, name);
}

/** The build of the processor's kernels that is best here by the libraries' own score, or the one named. */
function cpuLibrary(folder: string, variant: string | undefined): string {
  const prefix = "libggml-cpu-";
  const files = readdirSync(folder).filter((file) => file.startsWith(prefix));
  if (files.length === 0) return find(folder, "libggml-cpu");
  let best = { score: 0, path: "" };
  for (const file of files) {
    const path = join(folder, file);
    if (variant !== undefined) {
      if (file.slice(prefix.length).startsWith(`${variant}.`)) return path;
      continue;
    }
    const score = Deno.dlopen(path, { ggml_backend_score: { parameters: [], result: "i32" } }).symbols
      .ggml_backend_score();
    if (score > best.score) best = { score, path };
  }
  if (best.score === 0) throw new Error(`none of ${files.join(", ")} is ${variant ?? "for this machine"}`);
  return best.path;
}

function open(folder: string, variant: string | undefined) {
  const cpuPath = cpuLibrary(folder, variant);
  const cpu = Deno.dlopen(cpuPath, {
    ggml_threadpool_new: { parameters: ["buffer"], result: "pointer" },
  }).symbols;
  const base = Deno.dlopen(find(folder, "libggml-base"), {
    ggml_threadpool_params_init: { parameters: ["buffer", "i32"], result: "void" },
  }).symbols;
  const ggml = Deno.dlopen(find(folder, "libggml."), {
    ggml_backend_load: { parameters: ["buffer"], result: "pointer" },
  }).symbols;
  const llama = Deno.dlopen(find(folder, "libllama."), {
    llama_backend_init: { parameters: [], result: "void" },
    llama_log_set: { parameters: ["function", "pointer"], result: "void" },
    llama_print_system_info: { parameters: [], result: "pointer" },
    llama_model_default_params: { parameters: [], result: struct(MODEL_PARAMS) },
    llama_context_default_params: { parameters: [], result: struct(CONTEXT_PARAMS) },
    llama_model_load_from_file: { parameters: ["buffer", struct(MODEL_PARAMS)], result: "pointer" },
    llama_init_from_model: { parameters: ["pointer", struct(CONTEXT_PARAMS)], result: "pointer" },
    llama_free: { parameters: ["pointer"], result: "void" },
    llama_attach_threadpool: { parameters: ["pointer", "pointer", "pointer"], result: "void" },
    llama_get_memory: { parameters: ["pointer"], result: "pointer" },
    llama_memory_seq_rm: { parameters: ["pointer", "i32", "i32", "i32"], result: "bool" },
    llama_decode: { parameters: ["pointer", struct(BATCH)], result: "i32" },
    llama_synchronize: { parameters: ["pointer"], result: "void" },
    llama_get_logits_ith: { parameters: ["pointer", "i32"], result: "pointer" },
    llama_model_get_vocab: { parameters: ["pointer"], result: "pointer" },
    llama_vocab_n_tokens: { parameters: ["pointer"], result: "i32" },
  }).symbols;
  return { cpuPath, cpu, base, ggml, llama };
}

const cString = (text: string) => new TextEncoder().encode(`${text}\0`);

/** A batch of the same number of tokens for each sequence, in memory of ours that lives as long as the batch. */
class Batch {
  readonly struct = new Struct(BATCH);
  readonly positions: Int32Array<ArrayBuffer>;
  readonly tokens: Int32Array<ArrayBuffer>;
  readonly #keep: readonly unknown[];

  constructor(readonly sequences: number, readonly perSequence: number) {
    const n = sequences * perSequence;
    const i32 = () => new Int32Array(new ArrayBuffer(4 * n));
    this.tokens = i32();
    this.positions = i32();
    const [counts, ids] = [i32().fill(1), i32()];
    const pointers = new BigUint64Array(new ArrayBuffer(8 * n));
    const logits = new Int8Array(new ArrayBuffer(n));
    const address = (data: ArrayBufferView<ArrayBuffer>) =>
      BigInt(Deno.UnsafePointer.value(Deno.UnsafePointer.of(data)));
    for (let i = 0; i < n; i++) {
      ids[i] = Math.floor(i / perSequence);
      pointers[i] = address(ids) + BigInt(4 * i);
      logits[i] = i % perSequence === perSequence - 1 ? 1 : 0;
    }
    this.struct.set("n_tokens", n);
    this.struct.set("token", address(this.tokens));
    this.struct.set("pos", address(this.positions));
    this.struct.set("n_seq_id", address(counts));
    this.struct.set("seq_id", address(pointers));
    this.struct.set("logits", address(logits));
    this.#keep = [counts, ids, pointers, logits];
  }
}

class LlamaCpp implements Engine {
  readonly #lib: ReturnType<typeof open>;
  #model: Deno.PointerValue = null;
  #pool: Deno.PointerValue = null;
  #context: Deno.PointerValue = null;
  #threads = 1;
  #vocab = 1;
  /** What the open context is for. */
  #shape = "";

  constructor(folder: string, variant: string | undefined) {
    this.#lib = open(folder, variant);
  }

  load({ path, threads }: LoadRequest): EngineInfo {
    const { llama, ggml, base, cpu, cpuPath } = this.#lib;
    const silent = new Deno.UnsafeCallback({ parameters: ["i32", "pointer", "pointer"], result: "void" }, () => {});
    if (Deno.env.get("LUTRA_PEER_LOG") === undefined) llama.llama_log_set(silent.pointer, null);
    llama.llama_backend_init();
    if (ggml.ggml_backend_load(cString(cpuPath)) === null) throw new Error(`${cpuPath} cannot be used`);
    const params = new Struct(MODEL_PARAMS, llama.llama_model_default_params());
    params.set("load_mode", 0);
    this.#model = llama.llama_model_load_from_file(cString(path), params.bytes);
    if (this.#model === null) throw new Error(`llama.cpp cannot load ${path}`);
    this.#vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(this.#model));
    this.#threads = threads;
    // struct ggml_threadpool_params: 512 bools and five words; its own initial values (polling 50 of 100, any core).
    const pool = new Uint8Array(new ArrayBuffer(1024));
    base.ggml_threadpool_params_init(pool, threads);
    this.#pool = cpu.ggml_threadpool_new(pool);
    const build = /libggml-cpu-?([\w.-]*)\.(so|dylib)/.exec(cpuPath)?.[1] || "native";
    return { name: "llama.cpp", build: `${VERSION} ${build}` };
  }

  /** Opens a context for these sequences, unless it is the one that is open; it is empty then. */
  #open(sequences: number, tokens: number): void {
    const shape = `${sequences} × ${tokens}`;
    if (shape === this.#shape) return;
    const { llama } = this.#lib;
    if (this.#context !== null) llama.llama_free(this.#context);
    const params = new Struct(CONTEXT_PARAMS, llama.llama_context_default_params());
    params.set("n_seq_max", sequences);
    params.set("n_ctx", sequences * Math.ceil(tokens / 256) * 256);
    params.set("n_threads", this.#threads);
    params.set("n_threads_batch", this.#threads);
    this.#context = llama.llama_init_from_model(this.#model, params.bytes);
    if (this.#context === null) throw new Error("llama.cpp cannot make a context");
    llama.llama_attach_threadpool(this.#context, this.#pool, this.#pool);
    this.#shape = shape;
  }

  #decode(batch: Batch, position: number): void {
    const { llama } = this.#lib;
    for (let i = 0; i < batch.tokens.length; i++) {
      batch.positions[i] = position + i % batch.perSequence;
      batch.tokens[i] = token(Math.floor(i / batch.perSequence), batch.positions[i]!, this.#vocab);
    }
    const code = llama.llama_decode(this.#context, batch.struct.bytes);
    if (code !== 0) throw new Error(`llama_decode gave ${code}`);
    llama.llama_synchronize(this.#context);
  }

  /** Forgets all sequences from `position` on. */
  #truncate(sequences: number, position: number): void {
    const memory = this.#lib.llama.llama_get_memory(this.#context);
    for (let seq = 0; seq < sequences; seq++) this.#lib.llama.llama_memory_seq_rm(memory, seq, position, -1);
  }

  measure({ batch: sequences, tokens, context, warmUp, steps }: MeasureRequest): number[] {
    const length = context + (tokens > 1 ? tokens : warmUp + steps);
    const fresh = this.#shape;
    this.#open(sequences, length);
    if (fresh !== this.#shape && context > 0) this.#decode(new Batch(sequences, context), 0);
    this.#truncate(sequences, context);
    const batch = new Batch(sequences, tokens);
    const seconds: number[] = [];
    for (let step = 0; step < warmUp + steps; step++) {
      const start = performance.now();
      this.#decode(batch, tokens > 1 ? context : context + step);
      if (step >= warmUp) seconds.push((performance.now() - start) / 1000);
      if (tokens > 1) this.#truncate(sequences, context);
    }
    return seconds;
  }

  logits(tokens: readonly number[]): number[] {
    this.#open(1, tokens.length);
    this.#truncate(1, 0);
    const batch = new Batch(1, tokens.length);
    tokens.forEach((id, i) => [batch.tokens[i], batch.positions[i]] = [id, i]);
    const { llama } = this.#lib;
    const code = llama.llama_decode(this.#context, batch.struct.bytes);
    if (code !== 0) throw new Error(`llama_decode gave ${code}`);
    const row = llama.llama_get_logits_ith(this.#context, -1);
    if (row === null) throw new Error("llama.cpp gives no logits");
    const logits = Deno.UnsafePointerView.getArrayBuffer(row, 4 * this.#vocab);
    this.#shape = ""; // its tokens are not those of `measure`
    return [...new Float32Array(logits)];
  }
}

if (import.meta.main) {
  const [folder, variant] = Deno.args;
  if (folder === undefined) throw new Error("give the folder of llama.cpp's libraries");
  await serve(new LlamaCpp(folder, variant));
}
