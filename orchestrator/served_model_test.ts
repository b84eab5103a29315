import assert from "node:assert/strict";
import { controlRequestSchema, decodeJson, encodeJson, shardSchema } from "../bus/mod.ts";
import type { ControlRequest, TensorLayout } from "../bus/mod.ts";
import { fakeModel } from "../tests/fakes/cluster.ts";
import { wholeBytes } from "./placement.ts";
import { modelCost, shardOf } from "./served_model.ts";

type Expert = (TensorLayout & { kind: "parts" })["parts"][number];

const tensor = (name: string, bytes: number) => ({ name, type: 0, shape: [bytes / 4], offset: 64, bytes });
const fake = fakeModel().description;
/** Every tensor of `part`, 100 bytes long. */
function hundred(part: unknown): unknown {
  if (typeof part !== "object" || part === null) return part;
  if ("bytes" in part) return tensor("t", 100);
  return Object.fromEntries(Object.entries(part).map(([key, value]) => [key, hundred(value)]));
}
const layer = hundred(fake.layers[0]) as (typeof fake.layers)[number];
const description = {
  ...fake,
  hyper: { ...fake.hyper, kvHeads: 2, headDim: 8 },
  embedding: tensor("embedding", 1000),
  head: { norm: { weight: tensor("norm", 40) }, output: { weight: tensor("output", 2000) } },
  layers: fake.layers.map(() => layer),
};

Deno.test("modelCost: counts packed weights, KV cache, embedding and head", () => {
  const near = (a: number, b: number) => assert(Math.abs(a - b) < 1e-6, `${a} ${b}`);
  const cost = modelCost(description, { type: "f16", tokens: 64 });
  assert.equal(cost.layers.length, 6);
  near(cost.layers[0]!.readBytes, 900 * 1.02);
  near(cost.layers[0]!.memoryBytes, 900 * 1.02 + 2 * 64 * 2 * 8 * 2);
  near(modelCost(description, { type: "f32", tokens: 64 }).layers[0]!.memoryBytes, 900 * 1.02 + 2 * 64 * 2 * 8 * 4);
  near(modelCost(description, { type: "q8", tokens: 64 }).layers[0]!.memoryBytes, 900 * 1.02 + 2 * 64 * 2 * (8 + 4));
  near(cost.embeddingBytes, 1000 * 1.02);
  near(cost.head.memoryBytes, 2040 * 1.02);
  near(wholeBytes(cost), 6 * cost.layers[0]!.memoryBytes + 3040 * 1.02);
  // The head's matrix may be the embedding: one device holds it once.
  const head = { ...description.head, output: { weight: description.embedding } };
  const tied = modelCost({ ...description, head }, { type: "f16", tokens: 64 });
  near(tied.head.memoryBytes, 1040 * 1.02);
  near(wholeBytes(tied), 6 * cost.layers[0]!.memoryBytes + 1040 * 1.02);
});

Deno.test("modelCost: a token reads the experts it goes to, the device holds them all", () => {
  const moe = {
    router: { weight: tensor("router", 100) },
    gate: tensor("gate", 800),
    up: tensor("up", 800),
    down: tensor("down", 800),
  };
  const { mlp: _, ...rest } = layer;
  const cost = modelCost({
    ...description,
    hyper: { ...description.hyper, moe: { experts: 8, used: 2, feedForward: 4, gating: "softmax", normalise: true } },
    layers: fake.layers.map(() => ({ ...rest, moe })),
  }, { type: "f16", tokens: 64 });
  const kv = 2 * 64 * 2 * 8 * 2;
  assert(Math.abs(cost.layers[0]!.memoryBytes - (600 + 100 + 2400) * 1.02 - kv) < 1e-6);
  assert(Math.abs(cost.layers[0]!.readBytes - (600 + 100 + 600) * 1.02) < 1e-6);
});

Deno.test("shardOf: a request to hold 48 layers with 128 GPTQ experts each, all of them tensors of their own, fits a message", () => {
  let at = 0;
  const stored = (name: string, bytes: number) => {
    const file = Math.floor(at / 4e9);
    at += bytes;
    return { name, type: 26, shape: [768, 256], file, offset: at % 4e9, bytes };
  };
  const expert = (stem: string): Expert => ({
    ...stored(`${stem}.qweight`, 786_432),
    layout: {
      ...{ kind: "gptq", bits: 4, zero: 1, group: 128 },
      scales: stored(`${stem}.scales`, 24_576),
      zeros: stored(`${stem}.qzeros`, 6_144),
      index: stored(`${stem}.g_idx`, 8_192),
    },
  });
  const layers = fake.layers.slice(0, 1).flatMap(({ mlp: _, ...rest }) =>
    Array.from({ length: 48 }, (_, l) => {
      const stacked = (part: string) => ({
        ...tensor(`blk.${l}.ffn_${part}_exps.weight`, 1024),
        layout: {
          kind: "parts" as const,
          parts: Array.from({ length: 128 }, (_, e) => expert(`model.layers.${l}.mlp.experts.${e}.${part}_proj`)),
        },
      });
      const moe = { gate: stacked("gate"), up: stacked("up"), down: stacked("down") };
      return { ...rest, moe: { router: { weight: tensor(`router ${l}`, 100) }, ...moe } };
    })
  );
  const mixture = { ...description, hyper: { ...description.hyper, layers: 48 }, layers };
  const settings = { path: "m", files: ["b", "c"], kv: { type: "f16", tokens: 64 }, maxBatch: 8, context: 32 } as const;
  const shard = shardOf(mixture, { first: 0, end: 48 }, settings);
  const request: ControlRequest = { type: "load", epoch: 1, stages: [{ stage: 0, shard, next: "r" }], results: "r" };
  const text = JSON.stringify(request).length;
  const bytes = encodeJson(request);
  assert(text > 5 * 2 ** 20 && bytes.byteLength < 2 ** 20, `${text} bytes of text in ${bytes.byteLength}`);
  assert.deepEqual(decodeJson(controlRequestSchema, bytes), JSON.parse(JSON.stringify(request)));
});

Deno.test("shardOf: ranges hold their layers, and embedding and head where they belong; all pass the boundary", () => {
  const settings = { path: "m.gguf", kv: { type: "f16", tokens: 64 }, maxBatch: 8, context: 32 } as const;
  const shards = [[0, 2], [2, 5], [5, 6], [0, 6]].map(([first, end]) => {
    const shard = shardOf(description, { first: first!, end: end! }, settings);
    return decodeJson(shardSchema, new TextEncoder().encode(JSON.stringify(shard)));
  });
  assert.deepEqual(shards.map((s) => [s.layers.length, s.embedding !== null, s.head !== null]), [
    [2, true, false],
    [3, false, false],
    [1, false, true],
    [6, true, true],
  ]);
  assert.equal(shards[0]!.hyper.context, 32, "the context served, not the model's");
});
