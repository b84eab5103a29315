import type { Architecture } from "../architecture.ts";

/** Layer norms and biases; attention and feed-forward take the same normed input; part of a head is rotated. */
export const phi2: Architecture = {
  name: "phi2",
  models: "Phi 1, 1.5 and 2",
  norm: "layer",
  norms: ["attnNorm"],
  activation: "gelu-tanh",
  gated: false,
  parallel: () => true,
  rope: "neox",
};
