/**
 * The tensors of a folder with safetensors by GGUF's names and shapes: matrices quantised by GPTQ, AWQ or BitNet, which take
 * several tensors, experts that are a tensor each, and fused ones whose rows are mixed, with what says so of them.
 *
 * @module
 */
import { basename } from "node:path";
import { storedBytes, tensorBytes } from "../bus/shard.ts";
import type { TensorLayout, TensorRef } from "../bus/shard.ts";
import { UnsupportedModelError } from "./errors.ts";
import type { TensorInfo } from "./gguf.ts";
import { kvHeadsOf } from "./hugging_face_config.ts";
import type { Config, FolderType, Quantization } from "./hugging_face_config.ts";
import type { SafetensorInfo } from "./safetensors.ts";

/** GGUF's numbers of types. */
const TYPES: Readonly<Record<string, number>> = { F32: 0, F16: 1, BF16: 30, U8: 24, I32: 26 };
const FLOATS = ["F32", "F16", "BF16"];
/** How many times a file's bytes a matrix may take in memory without a warning. */
const MUCH_MORE = 1.25;
/** Weights of a block of BitNet's kind in the kernels. */
const TERNARY_BLOCK = 128;

const TOP: Readonly<Record<string, string>> = {
  "embed_tokens": "token_embd",
  "wte": "token_embd",
  "word_embeddings": "token_embd",
  "wpe": "position_embd",
  "norm": "output_norm",
  "final_layernorm": "output_norm",
  "ln_f": "output_norm",
  "lm_head": "output",
};
/** Of layers; what architectures call otherwise is with them (`FolderType.names`). */
const LAYER: Readonly<Record<string, string>> = {
  "input_layernorm": "attn_norm",
  "ln_1": "attn_norm",
  "self_attn.q_proj": "attn_q",
  "self_attn.k_proj": "attn_k",
  "self_attn.v_proj": "attn_v",
  "self_attn.qkv_proj": "attn_qkv",
  "attn.c_attn": "attn_qkv",
  "self_attention.query_key_value": "attn_qkv",
  "self_attn.o_proj": "attn_output",
  "self_attn.dense": "attn_output",
  "attn.c_proj": "attn_output",
  "self_attention.dense": "attn_output",
  "self_attn.q_norm": "attn_q_norm",
  "self_attn.k_norm": "attn_k_norm",
  "self_attn.attn_sub_norm": "attn_sub_norm",
  "post_attention_layernorm": "ffn_norm",
  "ln_2": "ffn_norm",
  "mlp.gate_proj": "ffn_gate",
  "mlp.up_proj": "ffn_up",
  "mlp.gate_up_proj": "ffn_up",
  "mlp.fc1": "ffn_up",
  "mlp.c_fc": "ffn_up",
  "mlp.dense_h_to_4h": "ffn_up",
  "mlp.down_proj": "ffn_down",
  "mlp.fc2": "ffn_down",
  "mlp.c_proj": "ffn_down",
  "mlp.dense_4h_to_h": "ffn_down",
  "mlp.ffn_sub_norm": "ffn_sub_norm",
  "mlp.gate": "ffn_gate_inp",
  "block_sparse_moe.gate": "ffn_gate_inp",
  "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
  "mlp.shared_expert.up_proj": "ffn_up_shexp",
  "mlp.shared_expert.down_proj": "ffn_down_shexp",
  "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
};
/** Parts of an expert. */
const EXPERT: Readonly<Record<string, string>> = {
  gate_proj: "ffn_gate_exps",
  up_proj: "ffn_up_exps",
  down_proj: "ffn_down_exps",
  w1: "ffn_gate_exps",
  w3: "ffn_up_exps",
  w2: "ffn_down_exps",
};
/** Matrices of GPT-2, whose columns come first. */
const TRANSPOSED = /\.(attn_qkv|attn_output|ffn_up|ffn_down)\.weight$/;
/** Computed when needed, or causal masks. */
const IGNORED = /(?:\.rotary_emb\.inv_freq|(?:^|\.)h\.\d+\.attn\.(?:masked_)?bias)$/;

/** Tensors, and the files that they are in. */
export interface FolderTensors {
  readonly path: string;
  /** Names of the others. */
  readonly files: readonly string[];
  readonly tensors: Map<string, TensorInfo>;
}

interface Place {
  /** GGUF's name, without ending. */
  readonly name: string;
  /** Which of several tensors that are one in GGUF. */
  readonly part?: number;
}

/** GGUF's place for a module; `undefined`: none. */
function placeOf(stem: string, names: Readonly<Record<string, string>>): Place | undefined {
  const plain = stem.replace(/^(?:model|transformer)\./, "");
  const [, layer, role = ""] = /^(?:layers|h)\.(\d+)\.(.*)$/.exec(plain) ?? [];
  const own = (table: Readonly<Record<string, string>>, key: string) =>
    Object.hasOwn(table, key) ? table[key] : undefined;
  if (layer === undefined) {
    const name = own(TOP, plain);
    return name === undefined ? undefined : { name };
  }
  const at = `blk.${Number(layer)}`;
  const [, expert, part = ""] = /^(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)$/.exec(role) ?? [];
  const stack = own(EXPERT, part);
  if (stack !== undefined) return { name: `${at}.${stack}`, part: Number(expert) };
  const [, which, head] = /^self_attn\.([qk])_layernorm\.norms\.(\d+)$/.exec(role) ?? [];
  if (head !== undefined) return { name: `${at}.attn_${which}_norm`, part: Number(head) };
  const name = own(names, role) ?? own(LAYER, role);
  return name === undefined ? undefined : { name: `${at}.${name}` };
}

/**
 * Names and lays out the tensors of a model.
 *
 * @throws {UnsupportedModelError} naming the tensor that cannot be used.
 */
export function folderTensors(
  stored: ReadonlyMap<string, SafetensorInfo>,
  config: Config,
  type: FolderType,
  quantization: Quantization | undefined,
): FolderTensors {
  const method = quantization?.quant_method ?? "gptq";
  if (!["gptq", "awq", "bitnet"].includes(method)) {
    throw new UnsupportedModelError(
      `safetensors quantised by ${method} are not supported; there are gptq, awq and bitnet. Take a GGUF of it`,
    );
  }
  const files = [...new Set([...stored.values()].map(({ file }) => file))];
  if (files.length === 0) throw new UnsupportedModelError("there are no tensors");
  const numbers = new Map(files.map((file, i) => [file, i]));
  const ref = ({ name, dtype, shape, file, offset, bytes }: SafetensorInfo): TensorRef => {
    const number = numbers.get(file)!;
    return {
      name,
      type: TYPES[dtype]!,
      shape: [...shape].reverse(),
      ...(number === 0 ? {} : { file: number }),
      offset,
      bytes,
    };
  };
  const tensors = new Map<string, TensorInfo>();
  const parts = new Map<string, TensorRef[]>();
  const put = (stem: string, ending: string, tensor: TensorRef) => {
    const place = placeOf(stem, type.names ?? {});
    // One that has no place keeps its name, and is refused later.
    const name = place === undefined ? tensor.name : `${place.name}.${ending}`;
    if (place?.part === undefined) {
      if (tensors.has(name)) throw new UnsupportedModelError(`tensor ${tensor.name} is ${name}, as another one is`);
      tensors.set(name, { ...tensor, name });
      return;
    }
    const list = parts.get(name) ?? [];
    if (list[place.part] !== undefined || place.part >= 4096) {
      throw new UnsupportedModelError(`tensor ${tensor.name} is there twice, or one of too many`);
    }
    list[place.part] = tensor;
    parts.set(name, list);
  };
  for (const [name, info] of stored) {
    if (IGNORED.test(name) || (config.tie_word_embeddings === true && name === "lm_head.weight")) continue;
    const [, stem = name, ending = ""] = /^(.*)\.(\w+)$/.exec(name) ?? [];
    if (ending === "qweight") {
      put(stem, "weight", quantised(stem, stored, quantization, ref));
    } else if (["qzeros", "g_idx", "scales"].includes(ending) && stored.has(`${stem}.qweight`)) {
      continue;
    } else if (ending === "weight_scale" && stored.get(`${stem}.weight`)?.dtype === "U8") {
      continue;
    } else if (ending === "weight" && info.dtype === "U8") {
      put(stem, ending, quarters(stem, info, stored, quantization, ref));
    } else {
      if (!FLOATS.includes(info.dtype)) {
        throw new UnsupportedModelError(
          `tensor ${name} has type ${info.dtype}; supported are ${
            FLOATS.join(", ")
          }, and matrices of GPTQ, AWQ and BitNet`,
        );
      }
      const tensor = ref(info);
      put(
        stem,
        ending === "weight_scale" ? "scale" : ending,
        isOnline(name, tensor, quantization) ? { ...tensor, layout: { kind: "ternarised" } } : tensor,
      );
    }
  }
  for (const [name, list] of parts) tensors.set(name, stacked(name, list));
  if (type.transposed === true) {
    for (const [name, tensor] of tensors) {
      if (TRANSPOSED.test(name)) tensors.set(name, transposed(tensor));
    }
  }
  if (config.model_type === "falcon") unmix(tensors, config);
  return { path: files[0]!, files: files.slice(1).map((file) => basename(file)), tensors };
}

/** Several tensors as one. */
function stacked(name: string, list: readonly TensorRef[]): TensorInfo {
  const [first] = list;
  const missing = Array.from(list).findIndex((part) => part === undefined);
  if (first === undefined || missing >= 0) {
    throw new UnsupportedModelError(`tensor ${name} has no part ${Math.max(missing, 0)}`);
  }
  const other = list.find(({ shape }) => shape.join() !== first.shape.join());
  if (other !== undefined) {
    throw new UnsupportedModelError(`tensor ${other.name} has another shape than ${first.name}`);
  }
  return {
    name,
    type: first.type,
    shape: [...first.shape, list.length],
    offset: 0,
    bytes: list.reduce((sum, { bytes }) => sum + bytes, 0),
    layout: {
      kind: "parts",
      parts: list.map((part) => ({
        ...part,
        layout: part.layout as Exclude<TensorLayout, { kind: "parts" }> | undefined,
      })),
    },
  };
}

/** GPTQ's or AWQ's matrix. Bits follow from the shapes, which differ between modules of some files. */
function quantised(
  stem: string,
  stored: ReadonlyMap<string, SafetensorInfo>,
  quantization: Quantization | undefined,
  ref: (info: SafetensorInfo) => TensorRef,
): TensorRef {
  const method = quantization?.quant_method ?? "gptq";
  const fail = (message: string) => new UnsupportedModelError(`tensor ${stem}.qweight ${message}`);
  if (quantization === undefined) throw fail("is quantised, but neither config.json nor quantize_config.json says how");
  if (method === "bitnet") throw fail("is not BitNet's");
  const part = (ending: string, dims: number, ...types: string[]) => {
    const info = stored.get(`${stem}.${ending}`);
    if (info === undefined) throw fail(`has no ${ending}`);
    if (!types.includes(info.dtype) || info.shape.length !== dims) {
      throw new UnsupportedModelError(
        `tensor ${info.name} is ${info.dtype} of ${info.shape.join(" × ")}, which is not understood`,
      );
    }
    return info;
  };
  const codes = part("qweight", 2, "I32");
  const scales = part("scales", 2, ...FLOATS);
  const zeros = part("qzeros", 2, "I32");
  const [count, rows] = [scales.shape[0]!, scales.shape[1]!];
  const shape = (cols: number) => [cols, rows];
  const groupOf = (cols: number, size: number | null | undefined) => {
    const configured = size === null || size === undefined || size <= 0 ? cols : size;
    // Rules by modules' names (`dynamic`) may have changed it.
    const group = Math.ceil(cols / configured) === count ? configured : cols / count;
    if (!Number.isInteger(group)) throw fail(`has ${count} groups, not those of ${configured} columns`);
    return group >= cols ? 0 : group;
  };
  const parts = { scales: ref(scales), zeros: ref(zeros) };
  if (method === "awq") {
    const version = (quantization.version ?? quantization.format ?? "gemm").toLowerCase();
    if (version !== "gemm") throw fail(`is in AWQ's ${version} layout; only gemm is supported`);
    const [cols, words] = [codes.shape[0]!, codes.shape[1]!];
    if (words * 8 !== rows || zeros.shape[0] !== count || zeros.shape[1] !== words) {
      throw fail("does not fit its scales: only codes of 4 bits are supported");
    }
    const group = groupOf(cols, quantization.group_size ?? quantization.q_group_size);
    return { ...ref(codes), shape: shape(cols), layout: { kind: "awq", group, ...parts } };
  }
  const format = quantization.checkpoint_format ?? quantization.format ?? "gptq";
  if (format !== "gptq" && format !== "gptq_v2") throw fail(`is in format ${format}; there are gptq and gptq_v2`);
  const bits = zeros.shape[1]! * 32 / rows;
  const cols = codes.shape[0]! * 32 / bits;
  if (![2, 3, 4, 8].includes(bits) || !Number.isInteger(cols) || codes.shape[1] !== rows || zeros.shape[0] !== count) {
    throw fail("does not fit its scales and zero points: only codes of 2, 3, 4 and 8 bits are supported");
  }
  const index = stored.get(`${stem}.g_idx`);
  const ordered = index !== undefined && index.shape[0] !== 0;
  if (ordered && (index.dtype !== "I32" || index.shape.join() !== `${cols}`)) {
    throw new UnsupportedModelError(
      `tensor ${index.name} is ${index.dtype} of ${index.shape.join(" × ")}, not I32 of ${cols}`,
    );
  }
  const group = ordered ? Math.ceil(cols / count) : groupOf(cols, quantization.group_size);
  const zero = format === "gptq" ? 1 : 0;
  const layout = { kind: "gptq", bits, zero, group, ...parts, ...(ordered ? { index: ref(index) } : {}) } as const;
  return { ...ref(codes), shape: shape(cols), layout };
}

/** What the user should know of matrices that take much more memory than in their files. */
export function grownWarnings(tensors: Iterable<TensorInfo>): string[] {
  const grown = [...tensors].flatMap((tensor): TensorRef[] =>
    tensor.layout?.kind === "parts" ? tensor.layout.parts : [{ ...tensor, shape: [...tensor.shape] }]
  ).filter((tensor) => ["gptq", "awq"].includes(tensor.layout?.kind ?? ""))
    .filter((tensor) => tensorBytes(tensor) > MUCH_MORE * storedBytes(tensor));
  const [first] = grown;
  if (first === undefined) return [];
  const megabytes = (bytes: (tensor: TensorRef) => number) =>
    `${(grown.reduce((sum, tensor) => sum + bytes(tensor), 0) / 1e6).toFixed(1)} MB`;
  return [
    `matrices quantised in small or odd groups (${grown.length}, the first is ${first.name}) take ` +
    `${megabytes(tensorBytes)} of memory, ${
      megabytes(storedBytes)
    } in their files: groups are padded to 32, 64 or 128 columns`,
  ];
}

/** BitNet's matrix, four rows a byte. */
function quarters(
  stem: string,
  info: SafetensorInfo,
  stored: ReadonlyMap<string, SafetensorInfo>,
  quantization: Quantization | undefined,
  ref: (info: SafetensorInfo) => TensorRef,
): TensorRef {
  const scale = stored.get(`${stem}.weight_scale`);
  const [quarter = 0, cols = 0] = info.shape;
  if (quantization?.quant_method !== "bitnet" || info.shape.length !== 2) {
    throw new UnsupportedModelError(`tensor ${info.name} has type U8, and its configuration is not BitNet's`);
  }
  if (quantization.use_rms_norm === true) {
    throw new UnsupportedModelError("use_rms_norm is true: norms within BitNet's linear layers are not supported");
  }
  if (cols % TERNARY_BLOCK !== 0) {
    throw new UnsupportedModelError(`tensor ${info.name} has rows of ${cols}, no multiple of ${TERNARY_BLOCK}`);
  }
  if (scale !== undefined && (!FLOATS.includes(scale.dtype) || scale.bytes === 0)) {
    throw new UnsupportedModelError(`tensor ${scale.name} has type ${scale.dtype}, or is empty`);
  }
  return {
    ...ref(info),
    shape: [cols, 4 * quarter],
    layout: {
      kind: "quarters",
      ...(scale === undefined ? {} : { scale: ref({ ...scale, shape: scale.shape.length === 0 ? [1] : scale.shape }) }),
      // `bitlinear` stores 1/mean|w|, `autobitlinear` mean|w|.
      inverse: (quantization.linear_class ?? "bitlinear") !== "autobitlinear",
    },
  };
}

/** Whether a matrix is one that BitNet's layers round while they run. */
function isOnline(name: string, { shape }: TensorRef, quantization: Quantization | undefined): boolean {
  if (quantization?.quant_method !== "bitnet" || quantization.linear_class !== "autobitlinear") return false;
  if ((quantization.quantization_mode ?? "offline") !== "online" || shape.length !== 2) return false;
  return /\.layers\.\d+\./.test(name) &&
    !(quantization.modules_to_not_convert ?? []).some((kept) => name.includes(kept));
}

function transposed(tensor: TensorInfo): TensorInfo {
  const [rows, cols] = tensor.shape;
  if (tensor.layout !== undefined) return tensor; // quantisers store them like others
  return { ...tensor, shape: [cols ?? 1, rows ?? 1], layout: { kind: "transposed" } };
}

/** Falcon's fused tensors have the queries of each KV head, then its key and its value. */
function unmix(tensors: Map<string, TensorInfo>, config: Config): void {
  const heads = config.num_attention_heads ?? config.n_head ?? 0;
  const kvHeads = kvHeadsOf(config) ?? heads;
  if (kvHeads === 1) return; // as others: all queries, the key, the value
  for (const [name, tensor] of [...tensors]) {
    const [, at] = /^(blk\.\d+\.)attn_qkv\.weight$/.exec(name) ?? [];
    if (at === undefined) continue;
    const [cols = 0, of = 0] = tensor.shape;
    const [queries, dim] = [heads / kvHeads, of / (heads + 2 * kvHeads)];
    if (!Number.isInteger(queries) || !Number.isInteger(dim)) {
      throw new UnsupportedModelError(`tensor ${name} has ${of} rows for ${heads} heads on ${kvHeads} KV heads`);
    }
    const stride = (queries + 2) * dim;
    const take = (part: string, first: number, block: number) =>
      tensors.set(`${at}attn_${part}.weight`, {
        ...tensor,
        name: `${at}attn_${part}.weight`,
        shape: [cols, kvHeads * block],
        rows: { of, first, block, stride },
      });
    take("q", 0, queries * dim);
    take("k", queries * dim, dim);
    take("v", (queries + 1) * dim, dim);
    tensors.delete(name);
  }
}
