import type { Architecture } from "../architecture.ts";

/** As llama, with layer norms; StableLM 2 12B has norms of each head of Q and K, and no second norm, as its parts are parallel. */
export const stablelm: Architecture = {
  name: "stablelm",
  models: "StableLM 3B and 2, Stable Code",
  norm: "layer",
  norms: ["attnNorm"],
  optionalNorms: ["qNorm", "kNorm", "ffnNorm"],
  activation: "silu",
  gated: true,
  parallel: (file) => !file.has("blk.0.ffn_norm.weight"),
  rope: "neox",
};
