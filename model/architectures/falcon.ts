import type { Architecture } from "../architecture.ts";

/** Layer norms, exact GELU, few KV heads; attention and feed-forward are parallel, from one norm or from one each. */
export const falcon: Architecture = {
  name: "falcon",
  models: "Falcon 7B, 40B and 11B",
  norm: "layer",
  norms: ["attnNorm"],
  optionalNorms: ["ffnNorm"],
  // With two norms, `attn_norm` is the feed-forward's.
  normNames: (file) => file.has("blk.0.attn_norm_2.weight") ? { attnNorm: "attn_norm_2", ffnNorm: "attn_norm" } : {},
  activation: "gelu",
  gated: false,
  parallel: () => true,
  rope: "neox",
};
