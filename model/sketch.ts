import { NORMS } from "./architecture.ts";
import type { Architecture, NormRole } from "./architecture.ts";
import { ARCHITECTURES } from "./architectures/mod.ts";
import type { ModelShape } from "./catalogue.ts";
import { describeModel } from "./description.ts";
import type { ModelDescription } from "./description.ts";
import { UnsupportedModelError } from "./errors.ts";
import { GGML_TYPES } from "./ggml_types.ts";
import type { GgmlType } from "./ggml_types.ts";
import type { GgufValue, TensorInfo } from "./gguf.ts";

const TYPES: ReadonlyMap<string, GgmlType> = new Map([...GGML_TYPES.values()].map((type) => [type.name, type]));
/** Types without which a model is as exact as with them, for heads: llama.cpp's quantiser keeps these. */
const HEAD_TYPE = "Q6_K";
/** Of embeddings and heads whose rows are no whole blocks of the type wanted. */
const ODD_TYPE = "Q8_0";
/** Ternary weights are trained; embeddings are not among them. */
const TERNARY = ["TQ1_0", "TQ2_0", "I2_S"];

/**
 * Describes a model that nobody has at hand, by its shape: all matrices of layers are of one type (GGML's name), embedding and head as
 * llama.cpp's quantiser makes them: the embedding of that type (of ternary models F16), the head of at least Q6_K.
 *
 * @throws {UnsupportedModelError} when the type is unknown, or rows are no whole blocks of it.
 */
export function sketchModel(name: string, shape: ModelShape, type: string): ModelDescription {
  const architecture = ARCHITECTURES.find((known) => known.name === shape.architecture);
  if (architecture === undefined) {
    throw new UnsupportedModelError(`architecture ${JSON.stringify(shape.architecture)} is not supported`);
  }
  const tensors = new Map<string, TensorInfo>();
  const add = (tensor: string, type: GgmlType, ...dims: number[]) => {
    const elements = dims.reduce((a, b) => a * b, 1);
    if (dims[0]! % type.elements !== 0) {
      throw new UnsupportedModelError(
        `${name} has rows of ${dims[0]} weights, no multiple of ${type.name}'s ${type.elements}: choose another type`,
      );
    }
    const bytes = elements / type.elements * type.bytes + type.trailer;
    tensors.set(tensor, { name: tensor, type: type.id, shape: dims, offset: 0, bytes });
  };
  const matrices = typeOf(type);
  const f32 = typeOf("F32");
  const { embedding: d, heads, kvHeads, feedForward: ff, vocab, experts } = shape;
  const headDim = shape.headDim ?? d / heads;
  const [wide, kvWide] = [heads * headDim, kvHeads * headDim];
  const whole = (wanted: GgmlType) => d % wanted.elements === 0 ? wanted : typeOf(ODD_TYPE);
  add("token_embd.weight", whole(TERNARY.includes(type) ? typeOf("F16") : matrices), d, vocab);
  add("output_norm.weight", f32, d);
  const bits = (type: GgmlType) => type.bytes / type.elements;
  const least = typeOf(HEAD_TYPE);
  if (shape.tied !== true) add("output.weight", whole(bits(matrices) > bits(least) ? matrices : least), d, vocab);
  const widths: Record<NormRole, number> = {
    ...{ attnNorm: d, qNorm: headDim, kNorm: headDim, attnSubNorm: wide, attnPostNorm: d },
    ...{ ffnNorm: d, ffnSubNorm: ff, ffnPostNorm: d },
  };
  for (let i = 0; i < shape.layers; i++) {
    const at = (part: string) => `blk.${i}.${part}`;
    for (const role of architecture.norms) add(at(`${NORMS[role]}.weight`), f32, widths[role]);
    for (const [part, rows] of [["q", wide], ["k", kvWide], ["v", kvWide]] as const) {
      add(at(`attn_${part}.weight`), matrices, d, rows);
      if (architecture.name === "qwen2") add(at(`attn_${part}.bias`), f32, rows);
    }
    add(at("attn_output.weight"), matrices, wide, d);
    if (experts !== undefined) add(at("ffn_gate_inp.weight"), f32, d, experts.count);
    const [suffix, count] = experts === undefined ? ["", []] : ["_exps", [experts.count]];
    if (architecture.gated) add(at(`ffn_gate${suffix}.weight`), matrices, d, ff, ...count);
    add(at(`ffn_up${suffix}.weight`), matrices, d, ff, ...count);
    add(at(`ffn_down${suffix}.weight`), matrices, ff, d, ...count);
  }
  const metadata = metadataOf(name, architecture, shape, headDim);
  return describeModel({ path: name, version: 3, size: 0, alignment: 32, dataOffset: 0, metadata, tensors });
}

function typeOf(name: string): GgmlType {
  const type = TYPES.get(name);
  if (type?.supported !== true) {
    const known = [...TYPES.values()].filter(({ supported }) => supported).map((type) => type.name).join(", ");
    throw new UnsupportedModelError(`type ${name} is not supported; there are ${known}`);
  }
  return type;
}

function metadataOf(
  name: string,
  architecture: Architecture,
  shape: ModelShape,
  headDim: number,
): ReadonlyMap<string, GgufValue> {
  const eps = `attention.layer_norm${architecture.norm === "rms" ? "_rms" : ""}_epsilon`;
  const keys: [string, GgufValue][] = [
    ["block_count", shape.layers],
    ["embedding_length", shape.embedding],
    ["attention.head_count", shape.heads],
    ["attention.head_count_kv", shape.kvHeads],
    ["attention.key_length", headDim],
    ["attention.value_length", headDim],
    ["feed_forward_length", shape.feedForward],
    ["context_length", shape.context],
    [eps, 1e-5],
  ];
  const { experts } = shape;
  if (experts !== undefined) keys.push(["expert_count", experts.count], ["expert_used_count", experts.used]);
  return new Map<string, GgufValue>([
    ["general.architecture", architecture.name],
    ["general.name", name],
    ...keys.map(([key, value]): [string, GgufValue] => [`${architecture.name}.${key}`, value]),
  ]);
}
