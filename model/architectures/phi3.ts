import type { Architecture } from "../architecture.ts";

/** As llama, with Q/K/V and gate/up in one tensor each, a window in some models, and LongRoPE in others. */
export const phi3: Architecture = {
  name: "phi3",
  models: "Phi 3, 3.5 and 4",
  norm: "rms",
  norms: ["attnNorm", "ffnNorm"],
  activation: "silu",
  gated: true,
  rope: "neox",
  window: "all",
};
