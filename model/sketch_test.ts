import assert from "node:assert/strict";
import { MODEL_SHAPES } from "./catalogue.ts";
import { sketchModel } from "./sketch.ts";

/** Numbers of parameters that the models' makers tell. */
const PARAMETERS: Readonly<Record<string, number>> = {
  "tinyllama-1.1b": 1_100_048_384,
  "llama-2-7b": 6_738_415_616,
  "llama-2-13b": 13_015_864_320,
  "llama-2-70b": 68_976_648_192,
  "llama-3-8b": 8_030_261_248,
  "llama-3-70b": 70_553_706_496,
  "llama-3.2-1b": 1_235_814_400,
  "llama-3.2-3b": 3_212_749_824,
  "mistral-7b": 7_241_732_096,
  "mixtral-8x7b": 46_702_792_704,
  "qwen2.5-0.5b": 494_032_768,
  "qwen2.5-1.5b": 1_543_714_304,
  "qwen2.5-3b": 3_085_938_688,
  "qwen2.5-7b": 7_615_616_512,
  "qwen2.5-14b": 14_770_033_664,
  "qwen2.5-32b": 32_763_876_352,
  "qwen2.5-72b": 72_706_203_648,
  "qwen3-8b": 8_190_735_360,
  "bitnet-2b": 2_412_820_480,
};

Deno.test("sketchModel: every shape of the catalogue has as many parameters as its maker tells", () => {
  assert.deepEqual([...MODEL_SHAPES.keys()].sort(), Object.keys(PARAMETERS).sort());
  for (const [name, shape] of MODEL_SHAPES) {
    const description = sketchModel(name, shape, "F16");
    assert.equal(description.parameters, PARAMETERS[name], name);
    assert.equal(description.layers.length, shape.layers);
  }
});

Deno.test("sketchModel: bytes are those of the type; the head is finer, embeddings of ternary models are F16", () => {
  const llama = sketchModel("llama-2-7b", MODEL_SHAPES.get("llama-2-7b")!, "Q4_0");
  assert.equal(llama.layers[0]!.q.weight.bytes, 4096 * 4096 / 32 * 18);
  assert.equal(llama.embedding.bytes, 32000 * 4096 / 32 * 18);
  assert.equal(llama.head.output.weight.bytes, 32000 * 4096 / 256 * 210);
  assert.equal(sketchModel("x", MODEL_SHAPES.get("llama-2-7b")!, "F16").head.output.weight.bytes, 32000 * 4096 * 2);
  const bitnet = sketchModel("bitnet-2b", MODEL_SHAPES.get("bitnet-2b")!, "TQ1_0");
  assert.equal(bitnet.layers[0]!.o.weight.bytes, 2560 * 2560 / 256 * 54);
  assert.equal(bitnet.head.output.weight.bytes, 128256 * 2560 * 2);
  // 896 is no multiple of 256: the head is of Q8_0, and types of 256 are refused.
  const small = MODEL_SHAPES.get("qwen2.5-0.5b")!;
  assert.equal(sketchModel("x", { ...small, tied: false }, "Q4_0").head.output.weight.bytes, 151936 * 896 / 32 * 34);
  assert.throws(() => sketchModel("qwen2.5-0.5b", small, "Q4_K"), /rows of 896 weights, no multiple of Q4_K's 256/);
  assert.throws(() => sketchModel("x", small, "Q9"), /type Q9 is not supported; there are F32, /);
  assert.throws(() => sketchModel("x", { ...small, architecture: "rnn" }, "F16"), /architecture "rnn"/);
});
