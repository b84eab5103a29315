import assert from "node:assert/strict";
import { join } from "node:path";
import { GGML_TYPES, loadModel } from "../model/mod.ts";
import { loadKernels } from "../worker/mod.ts";
import { SYNTHETIC_TYPES, writeSyntheticModel } from "./synthetic_model.ts";

const kernels = loadKernels();
const shape = { embedding: 256, layers: 1, heads: 4, kvHeads: 2, feedForward: 512, vocab: 64, context: 32 };

for (const type of SYNTHETIC_TYPES) {
  Deno.test(`writeSyntheticModel: ${type} makes a model whose weights are of root mean square 1 / √columns, around 0`, async () => {
    const folder = Deno.makeTempDirSync();
    try {
      const path = join(folder, "model.gguf");
      const bytes = writeSyntheticModel(path, { shape, type });
      const file = Deno.readFileSync(path);
      assert.equal(file.byteLength, bytes);
      const { gguf } = await loadModel(path);
      for (const name of ["token_embd.weight", "output.weight", "blk.0.ffn_down.weight", "blk.0.attn_k.weight"]) {
        const tensor = gguf.tensors.get(name)!;
        const [cols, rows] = tensor.shape as [number, number];
        const source = file.subarray(tensor.offset, tensor.offset + tensor.bytes);
        const weights = kernels.unpack(tensor.type, source, rows, cols);
        const mean = weights.reduce((sum, w) => sum + w, 0) / weights.length;
        const rms = Math.sqrt(weights.reduce((sum, w) => sum + w * w, 0) / weights.length) * Math.sqrt(cols);
        const label = `${name} ${GGML_TYPES.get(tensor.type)!.name}: rms ${rms}, mean ${mean}`;
        assert.ok(rms > 0.6 && rms < 1.6, label);
        assert.ok(Math.abs(mean) * Math.sqrt(cols) < 0.3, label);
      }
    } finally {
      Deno.removeSync(folder, { recursive: true });
    }
  });
}

Deno.test("writeSyntheticModel: refuses a type it does not know, and rows of no whole blocks", () => {
  const path = join(Deno.makeTempDirSync(), "model.gguf");
  assert.throws(() => writeSyntheticModel(path, { shape, type: "IQ1_S" }), /type IQ1_S is unknown/);
  const narrow = { ...shape, embedding: 96, heads: 2, kvHeads: 1 };
  assert.throws(() => writeSyntheticModel(path, { shape: narrow, type: "Q2_K" }), /no multiple of a block/);
});
