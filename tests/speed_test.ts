/** How fast a device is with a model, measured without its weights, with the real kernel library. */
import assert from "node:assert/strict";
import { join } from "node:path";
import { loadModel } from "../model/mod.ts";
import { probeOf } from "../orchestrator/mod.ts";
import { loadKernels } from "../worker/mod.ts";
import { measureSpeed } from "../worker/measure.ts";
import { fixture, repoPath } from "./data.ts";

// Never closed, hence opened before any test: it is no test's leak.
const kernels = loadKernels();

const CHOICES = { threads: 1, isa: null, cache: null, tune: "off" } as const;
const kv = { type: "f16", tokens: 8192 } as const;

for (
  const name of [
    "architectures/bitnet-b1.58-I2_S.gguf",
    "folders/gptq-4-act-order",
    "folders/awq-group-48-f32",
    "folders/bitnet",
    "architectures/qwen3moe.gguf",
    "architectures/phi3-longrope.gguf",
  ]
) {
  Deno.test(`measureSpeed: ${name}'s last layer and head, of which it has no weights`, async () => {
    const folder = await Deno.makeTempDir({ prefix: "lutra-speed-" });
    try {
      let path = fixture(name);
      if (name.startsWith("folders")) {
        for (const { name: file } of Deno.readDirSync(path)) Deno.copyFileSync(join(path, file), join(folder, file));
        Deno.copyFileSync(fixture("tokenizers/llama3.json"), join(folder, "tokenizer.json"));
        path = folder;
      }
      const { description } = await loadModel(path);
      const { shard } = probeOf(description, { kv, context: 32 });
      const { msPerLayer, msHead } = await measureSpeed(kernels, shard, CHOICES, 1e9);
      assert(msPerLayer > 0 && msPerLayer < 1000 && msHead >= 0 && msHead < 1000, `${msPerLayer} and ${msHead} ms`);
    } finally {
      await Deno.remove(folder, { recursive: true });
    }
  });
}

Deno.test("probeOf: models whose layers are alike have the same, whatever lies elsewhere", async () => {
  const { description } = await loadModel(repoPath("models", "lutra-books-6M-TQ2_0.gguf"));
  const probe = probeOf(description, { kv, context: 512 });
  assert.equal(probeOf(structuredClone(description), { kv: { ...kv, tokens: 64 }, context: 512 }).probe, probe.probe);
  const moved = structuredClone(description);
  moved.head.norm.weight.offset += 64;
  assert.equal(probeOf(moved, { kv, context: 512 }).probe, probe.probe);
  moved.head.norm.weight.bytes += 64;
  assert.notEqual(probeOf(moved, { kv, context: 512 }).probe, probe.probe);
});
