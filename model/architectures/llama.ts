import type { Architecture } from "../description.ts";
import { UnsupportedModelError } from "../errors.ts";

/** Llama 1 and 2, TinyLlama, and what else writes `llama` files: RMSNorm, rotary pairs, grouped-query attention, SwiGLU. */
export const llama: Architecture = {
  name: "llama",
  hyper(metadata, gguf) {
    const key = (name: string) => `llama.${name}`;
    const size = (name: string) => metadata.required(key(name), metadata.integer(key(name), 1));
    const layers = size("block_count");
    const embedding = size("embedding_length");
    const heads = size("attention.head_count");
    const kvHeads = metadata.integer(key("attention.head_count_kv"), 1) ?? heads;
    const headDim = metadata.integer(key("attention.key_length"), 1) ?? embedding / heads;
    if (!Number.isInteger(headDim)) {
      throw new UnsupportedModelError(`llama.embedding_length ${embedding} is no multiple of ${heads} heads`);
    }
    if (heads % kvHeads !== 0) {
      throw new UnsupportedModelError(`llama.attention.head_count ${heads} is no multiple of head_count_kv ${kvHeads}`);
    }
    const valueDim = metadata.integer(key("attention.value_length"), 1) ?? headDim;
    if (valueDim !== headDim) {
      throw new UnsupportedModelError(`llama.attention.value_length ${valueDim} is not ${headDim}`);
    }
    if (layers > 4096) throw new UnsupportedModelError(`llama.block_count ${layers} is impossibly large`);
    const scaling = metadata.string(key("rope.scaling.type"));
    const factor = metadata.number(key("rope.scaling.factor")) ?? metadata.number(key("rope.scale_linear")) ?? 1;
    if ((scaling !== undefined && scaling !== "none") && factor !== 1) {
      throw new UnsupportedModelError(`llama.rope.scaling.type ${JSON.stringify(scaling)} is not supported yet`);
    }
    const experts = metadata.integer(key("expert_count")) ?? 0;
    if (experts > 0) {
      throw new UnsupportedModelError(`llama.expert_count is ${experts}: mixtures of experts are not supported yet`);
    }
    const dims = metadata.integer(key("rope.dimension_count"), 2) ?? headDim;
    if (dims > headDim || dims % 2 !== 0) throw new UnsupportedModelError(`llama.rope.dimension_count is ${dims}`);
    const rmsEps = metadata.number(key("attention.layer_norm_rms_epsilon"));
    const base = metadata.number(key("rope.freq_base")) ?? 10000;
    if (!(base > 0)) throw new UnsupportedModelError(`llama.rope.freq_base is ${base}`);
    return {
      layers,
      embedding,
      heads,
      kvHeads,
      headDim,
      feedForward: size("feed_forward_length"),
      vocab: gguf.tensors.get("token_embd.weight")?.shape[1] ?? 0,
      context: size("context_length"),
      rmsEps: metadata.required(key("attention.layer_norm_rms_epsilon"), rmsEps),
      rope: { base, dims, style: "norm" },
    };
  },
  tensors: {
    embedding: "token_embd.weight",
    norm: "output_norm.weight",
    output: "output.weight",
    layer: {
      attnNorm: "blk.N.attn_norm.weight",
      q: "blk.N.attn_q.weight",
      k: "blk.N.attn_k.weight",
      v: "blk.N.attn_v.weight",
      o: "blk.N.attn_output.weight",
      ffnNorm: "blk.N.ffn_norm.weight",
      gate: "blk.N.ffn_gate.weight",
      up: "blk.N.ffn_up.weight",
      down: "blk.N.ffn_down.weight",
    },
  },
};
