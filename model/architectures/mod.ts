/**
 * The architectures that Lutra runs.
 *
 * @module
 */
import type { Architecture } from "../architecture.ts";
import { bitnet, bitnetB158 } from "./bitnet.ts";
import { falcon } from "./falcon.ts";
import { gemma, gemma2, gemma3 } from "./gemma.ts";
import { gpt2 } from "./gpt2.ts";
import { llama } from "./llama.ts";
import { phi2 } from "./phi2.ts";
import { phi3 } from "./phi3.ts";
import { qwen2, qwen2moe } from "./qwen2.ts";
import { qwen3, qwen3moe } from "./qwen3.ts";
import { stablelm } from "./stablelm.ts";
import { starcoder2 } from "./starcoder2.ts";

/** All of them. */
export const ARCHITECTURES: readonly Architecture[] = [
  llama,
  qwen2,
  qwen2moe,
  qwen3,
  qwen3moe,
  phi2,
  phi3,
  gemma,
  gemma2,
  gemma3,
  starcoder2,
  gpt2,
  stablelm,
  falcon,
  bitnet,
  bitnetB158,
];
