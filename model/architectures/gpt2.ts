import type { Architecture } from "../architecture.ts";

/** Layer norms, biases, and a table of positions. */
export const gpt2: Architecture = {
  name: "gpt2",
  models: "GPT-2, DistilGPT2, Cerebras-GPT",
  norm: "layer",
  norms: ["attnNorm", "ffnNorm"],
  activation: "gelu-tanh",
  gated: false,
  positions: true,
};
