import { tensorBytes } from "../bus/mod.ts";
import type { Shard } from "../bus/mod.ts";
import type { LayerCost, ModelCost, PlacedStage } from "./placement.ts";
import { GGML_TYPES, PACKED_RATIO } from "../model/mod.ts";
import type { ModelDescription, TensorRef } from "../model/mod.ts";

/** What all shards of a deployment share. */
export interface ShardSettings {
  /** The model file, as the workers name it. */
  readonly path: string;
  /** Names of further files in its folder. */
  readonly files?: readonly string[];
  readonly kv: Shard["kv"];
  /** @default {"a8"} */
  readonly activations?: NonNullable<Shard["activations"]>;
  readonly maxBatch: number;
  /** Most tokens of a sequence. */
  readonly context: number;
}

/** Bytes that a key or value of `dim` numbers takes in the cache. */
function cachedBytes(type: Shard["kv"]["type"], dim: number): number {
  switch (type) {
    case "f16":
      return 2 * dim;
    case "f32":
      return 4 * dim;
    case "q8":
      return dim + 4; // and a scale
  }
}

/** What the model costs to hold and to read, for placement. */
export function modelCost(description: ModelDescription, kv: Shard["kv"]): ModelCost {
  const { hyper } = description;
  const kvBytes = 2 * kv.tokens * hyper.kvHeads * cachedBytes(kv.type, hyper.headDim);
  const { experts = 1, used = 1 } = hyper.moe ?? {};
  const layers = description.layers.map((layer): LayerCost => {
    const { moe, ...rest } = layer;
    const mixture = moe === undefined ? 0 : weightBytes([moe.gate, moe.up, moe.down]);
    const others = weightBytes([rest, moe?.router, moe?.shared, moe?.sharedGate]);
    return { memoryBytes: mixture + others + kvBytes, readBytes: mixture * used / experts + others };
  });
  const head = weightBytes(description.head);
  const embeddingBytes = weightBytes([description.embedding, description.positions]);
  const tied = description.embedding.name === description.head.output.weight.name;
  return {
    layers,
    embeddingBytes,
    head: { memoryBytes: head, readBytes: head },
    ...(tied ? { tiedBytes: weightBytes(description.embedding) } : {}),
  };
}

/** Bytes of all tensors in `part`, packed. */
function weightBytes(part: unknown): number {
  if (typeof part !== "object" || part === null) return 0;
  if ("bytes" in part) {
    const tensor = part as TensorRef;
    const type = GGML_TYPES.get(tensor.type);
    return tensorBytes(tensor) * (type === undefined ? PACKED_RATIO : type.packed / type.bytes);
  }
  return Object.values(part).reduce((sum: number, inner) => sum + weightBytes(inner), 0);
}

/** The shard of a stage. */
export function shardOf(
  description: ModelDescription,
  { first, end }: Pick<PlacedStage, "first" | "end">,
  settings: ShardSettings,
): Shard {
  const { hyper, embedding, positions, head, layers } = description;
  return {
    path: settings.path,
    ...(settings.files === undefined ? {} : { files: [...settings.files] }),
    kv: settings.kv,
    activations: settings.activations ?? "a8",
    maxBatch: settings.maxBatch,
    hyper: { ...hyper, context: settings.context },
    first,
    end,
    embedding: first === 0 ? embedding : null,
    ...(first === 0 && positions !== undefined ? { positions } : {}),
    head: end === hyper.layers ? head : null,
    layers: layers.slice(first, end),
  };
}
