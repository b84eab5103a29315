import type { HyperParameters } from "../../bus/shard.ts";
import type { Architecture, ModelFile } from "../architecture.ts";

const embeddingScale = (h: HyperParameters) => Math.sqrt(h.embedding);
const attentionScale = (file: ModelFile, h: HyperParameters, layersOfOdd: number) => {
  const odd = h.layers === layersOfOdd ? 1 / Math.sqrt(h.embedding / h.heads) : undefined;
  const scale = file.positive("attention.scale") ?? odd;
  return scale === undefined ? {} : { attentionScale: scale };
};

/** As llama, with tanh-GELU and an embedding scaled by √width. The files' norm weights hold the 1 that Gemma adds. */
export const gemma: Architecture = {
  name: "gemma",
  models: "Gemma 1, CodeGemma",
  norm: "rms",
  norms: ["attnNorm", "ffnNorm"],
  activation: "gelu-tanh",
  gated: true,
  rope: "neox",
  extras: (_, h) => ({ embeddingScale: embeddingScale(h) }),
};

/** Norms before and after each part, a window in every second layer, soft caps. */
export const gemma2: Architecture = {
  ...gemma,
  name: "gemma2",
  models: "Gemma 2",
  norms: ["attnNorm", "attnPostNorm", "ffnNorm", "ffnPostNorm"],
  window: { every: 2 },
  extras: (file: ModelFile, h) => ({
    embeddingScale: embeddingScale(h),
    // Gemma 2 27B alone, which GGUFs do not say.
    ...attentionScale(file, h, 46),
    attentionSoftcap: file.positive("attn_logit_softcapping") ?? 50,
    logitSoftcap: file.positive("final_logit_softcapping") ?? 30,
  }),
};

/** Norms of Q and K instead of soft caps; five of six layers have a window, with a rotary base of its own. */
export const gemma3: Architecture = {
  ...gemma,
  name: "gemma3",
  models: "Gemma 3 (text)",
  norms: ["attnNorm", "qNorm", "kNorm", "attnPostNorm", "ffnNorm", "ffnPostNorm"],
  window: { every: 6 },
  windowRopeBase: 10000,
  extras: (file: ModelFile, h) => {
    const logitSoftcap = file.positive("final_logit_softcapping");
    return {
      embeddingScale: embeddingScale(h),
      // Gemma 3 27B alone, which GGUFs do not say.
      ...attentionScale(file, h, 62),
      ...(logitSoftcap === undefined ? {} : { logitSoftcap }),
    };
  },
};
