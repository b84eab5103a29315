import type { Architecture } from "../architecture.ts";

/** As llama, with norms of every head of Q and K; pairs are halves. */
export const qwen3: Architecture = {
  name: "qwen3",
  models: "Qwen 3",
  norm: "rms",
  norms: ["attnNorm", "qNorm", "kNorm", "ffnNorm"],
  activation: "silu",
  gated: true,
  rope: "neox",
};

/** Qwen 3 with experts; weights of the chosen are normalised. */
export const qwen3moe: Architecture = {
  ...qwen3,
  name: "qwen3moe",
  models: "Qwen 3 with experts",
  moe: { normalise: true },
};
