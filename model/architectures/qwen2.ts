import type { Architecture } from "../architecture.ts";

/** As llama, with biases of Q, K and V; pairs are halves. */
export const qwen2: Architecture = {
  name: "qwen2",
  models: "Qwen 2 and 2.5, QwQ, DeepSeek-R1-Distill-Qwen",
  norm: "rms",
  norms: ["attnNorm", "ffnNorm"],
  activation: "silu",
  gated: true,
  rope: "neox",
};

/** Qwen 2 with experts, of which one is every token's; weights of the chosen are not normalised. */
export const qwen2moe: Architecture = {
  ...qwen2,
  name: "qwen2moe",
  models: "Qwen 1.5 and 2 with experts",
  moe: { normalise: false },
};
