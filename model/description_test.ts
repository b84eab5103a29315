import assert from "node:assert/strict";
import { tinyLlama, writeGguf } from "../tests/gguf_writer.ts";
import type { Value, WriterTensor } from "../tests/gguf_writer.ts";
import { describeModel } from "./description.ts";
import { UnsupportedModelError } from "./errors.ts";
import { parseGguf } from "./gguf.ts";

type Parts = { metadata: [string, Value][]; tensors: WriterTensor[] };

function describe(change: (parts: Parts) => void) {
  const parts = tinyLlama();
  change(parts);
  const bytes = writeGguf(parts.metadata, parts.tensors);
  const read = (into: Uint8Array, at: number) => into.set(bytes.subarray(at, at + into.length));
  return describeModel(parseGguf("test.gguf", bytes.length, read));
}

function set(key: string, value: Value | undefined) {
  return ({ metadata }: Parts) => {
    const at = metadata.findIndex(([name]) => name === key);
    if (at >= 0) metadata.splice(at, 1);
    if (value !== undefined) metadata.push([key, value]);
  };
}

Deno.test("describeModel: hyper-parameters and tensors by role; a missing head is the embedding", () => {
  const { hyper, head, embedding, layers, parameters } = describe(() => {});
  assert.deepEqual(hyper, {
    layers: 1,
    embedding: 8,
    heads: 2,
    kvHeads: 2,
    headDim: 4,
    feedForward: 16,
    vocab: 260,
    context: 64,
    norm: { kind: "rms", eps: Math.fround(1e-5) },
    activation: "silu",
    ropes: [{ base: 10000, dims: 4, style: "norm" }],
  });
  assert.deepEqual(head.output, { weight: embedding });
  assert.equal(layers[0]!.mlp!.gate!.weight.name, "blk.0.ffn_gate.weight");
  assert.equal(parameters, 8 * 260 + 3 * 8 + 4 * 64 + 3 * 128);
});

for (
  const [what, change, message] of [
    [
      "an unknown architecture",
      set("general.architecture", { string: "mamba" }),
      /"mamba" is not supported; there is llama/,
    ],
    ["no architecture", set("general.architecture", undefined), /no general.architecture/],
    ["a missing key", set("llama.block_count", undefined), /no llama.block_count/],
    ["a key of the wrong type", set("llama.block_count", { string: "1" }), /llama.block_count is not an integer/],
    ["zero heads", set("llama.attention.head_count", { u32: 0 }), /head_count is not an integer from 1/],
    ["heads that do not divide", set("llama.attention.head_count", { u32: 3 }), /no multiple of 3 heads/],
    ["KV heads that do not divide", set("llama.attention.head_count_kv", { u32: 3 }), /head_count_kv 3/],
    ["more layers than tensors", set("llama.block_count", { u32: 2 }), /tensor blk\.1\.attn_q\.weight is missing/],
    [
      "another width than the tensors'",
      set("llama.embedding_length", { u32: 16 }),
      /token_embd\.weight has shape 8 × 260/,
    ],
    ["rope scaling", ({ metadata }: Parts) => {
      metadata.push(["llama.rope.scaling.type", { string: "su" }], ["llama.rope.scaling.factor", { f32: 4 }]);
    }, /scaling.type "su" is not supported; there is linear, yarn, longrope/],
    ["experts without tensors", set("llama.expert_count", { u32: 8 }), /ffn_up_exps\.weight is missing/],
    ["experts one by one", (parts: Parts) => {
      set("llama.expert_count", { u32: 8 })(parts);
      parts.tensors.push({ name: "blk.0.ffn_up.0.weight", shape: [8, 16], type: 0, data: new Uint8Array(512) });
    }, /blk\.0\.ffn_up\.0\.weight holds one expert alone.*convert the model again/],
    ["a type without kernels", ({ tensors }: Parts) => {
      const norm = tensors.find((t) => t.name === "output_norm.weight")!;
      [norm.type, norm.data] = [24, new Uint8Array(8)];
    }, /output_norm\.weight has type I8; supported are/],
    ["a tensor that would be ignored", ({ tensors }: Parts) => {
      tensors.push({ name: "blk.0.attn_q_norm.weight", shape: [4], type: 0, data: new Uint8Array(16) });
    }, /attn_q_norm\.weight is not understood/],
  ] as const
) {
  Deno.test(`describeModel: ${what} is refused by name`, () => {
    assert.throws(() => describe(change), (error: unknown) => {
      assert.ok(error instanceof UnsupportedModelError);
      assert.match(error.message, message);
      return true;
    });
  });
}
