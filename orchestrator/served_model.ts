import type { Shard } from "../bus/mod.ts";
import type { LayerCost, ModelCost, PlacedStage } from "./placement.ts";
import type { ModelDescription, TensorRef } from "../model/mod.ts";

/** What all shards of a deployment share. */
export interface ShardSettings {
  /** The model file, as the workers name it. */
  readonly path: string;
  readonly kv: Shard["kv"];
  readonly maxBatch: number;
  /** Most tokens of a sequence. */
  readonly context: number;
}

/** Packed weights take at most so much more than the file's. */
const PACKED_RATIO = 1.02;

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
  const weights = (tensors: Iterable<TensorRef>) => {
    let bytes = 0;
    for (const tensor of tensors) bytes += tensor.bytes * PACKED_RATIO;
    return bytes;
  };
  const layers = description.layers.map((layer): LayerCost => {
    const readBytes = weights(Object.values(layer));
    return { memoryBytes: readBytes + kvBytes, readBytes };
  });
  const head = weights([description.head.norm, description.head.output]);
  return { layers, embeddingBytes: weights([description.embedding]), head: { memoryBytes: head, readBytes: head } };
}

/** The shard of a stage. Every field is named, so that what else a description may hold stays at home. */
export function shardOf(
  description: ModelDescription,
  { first, end }: Pick<PlacedStage, "first" | "end">,
  settings: ShardSettings,
): Shard {
  const { hyper } = description;
  const { rope } = hyper;
  return {
    path: settings.path,
    kv: settings.kv,
    maxBatch: settings.maxBatch,
    hyper: {
      layers: hyper.layers,
      embedding: hyper.embedding,
      heads: hyper.heads,
      kvHeads: hyper.kvHeads,
      headDim: hyper.headDim,
      feedForward: hyper.feedForward,
      vocab: hyper.vocab,
      context: settings.context,
      rmsEps: hyper.rmsEps,
      rope: { base: rope.base, dims: rope.dims, style: rope.style },
    },
    first,
    end,
    embedding: first === 0 ? tensorOf(description.embedding) : null,
    head: end === hyper.layers
      ? { norm: tensorOf(description.head.norm), output: tensorOf(description.head.output) }
      : null,
    layers: description.layers.slice(first, end).map((layer) => ({
      attnNorm: tensorOf(layer.attnNorm),
      q: tensorOf(layer.q),
      k: tensorOf(layer.k),
      v: tensorOf(layer.v),
      o: tensorOf(layer.o),
      ffnNorm: tensorOf(layer.ffnNorm),
      gate: tensorOf(layer.gate),
      up: tensorOf(layer.up),
      down: tensorOf(layer.down),
    })),
  };
}

function tensorOf({ name, type, shape, offset, bytes }: TensorRef): NonNullable<Shard["embedding"]> {
  return { name, type, shape: [...shape], offset, bytes };
}
