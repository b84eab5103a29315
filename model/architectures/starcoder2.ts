import type { Architecture } from "../architecture.ts";

/** Layer norms, biases, and a feed-forward without gate. */
export const starcoder2: Architecture = {
  name: "starcoder2",
  models: "StarCoder 2",
  norm: "layer",
  norms: ["attnNorm", "ffnNorm"],
  activation: "gelu-tanh",
  gated: false,
  rope: "neox",
  window: "all",
};
