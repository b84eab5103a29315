import type { Architecture } from "../architecture.ts";

/** Ternary weights, with norms of what the two last products of each part multiply. */
export const bitnet: Architecture = {
  name: "bitnet",
  models: "bitnet_b1_58 (1bitLLM)",
  norm: "rms",
  norms: ["attnNorm", "attnSubNorm", "ffnNorm", "ffnSubNorm"],
  activation: "silu",
  gated: true,
  rope: "neox",
};

/** The same with squared ReLU. */
export const bitnetB158: Architecture = {
  ...bitnet,
  name: "bitnet-b1.58",
  aliases: ["bitnet-25"],
  models: "BitNet b1.58 2B4T",
  activation: "relu-squared",
};
