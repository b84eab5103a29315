import type { Architecture } from "../architecture.ts";

/** Llama and what copies it: RMSNorm, rotary pairs, grouped-query attention, SwiGLU, and Mixtral's experts. */
export const llama: Architecture = {
  name: "llama",
  models: "Llama 1 to 3, TinyLlama, SmolLM, Falcon 3, Mistral, Mixtral",
  norm: "rms",
  norms: ["attnNorm", "ffnNorm"],
  activation: "silu",
  gated: true,
  rope: "norm",
  window: "all",
  moe: { normalise: true },
};
