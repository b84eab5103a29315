import assert from "node:assert/strict";
import { rmSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { writeSyntheticModel } from "../synthetic_model.ts";
import { EngineProcess } from "./process.ts";

Deno.test("engines/lutra.ts: measures every phase of a model, and gives logits that depend on the tokens alone", async () => {
  const folder = Deno.makeTempDirSync();
  try {
    const path = join(folder, "model.gguf");
    const shape = { embedding: 256, layers: 2, heads: 4, kvHeads: 2, feedForward: 512, vocab: 96, context: 64 };
    writeSyntheticModel(path, { shape, type: "Q4_K" });
    const script = fileURLToPath(new URL("./lutra.ts", import.meta.url));
    await using engine = EngineProcess.start({
      name: "Lutra",
      command: Deno.execPath(),
      args: ["run", "-q", "-A", script],
    });
    const info = await engine.load({ path, threads: 1, sequences: 3, length: 32 });
    assert.ok(info.name === "lutra" && info.bytesPerStep! > 0 && (await engine.bandwidth(1))! > 0);
    const first = await engine.logits([5, 17, 2]);
    assert.ok(first.length === 96 && first.every(Number.isFinite));
    for (const [batch, tokens, context] of [[1, 1, 8], [3, 1, 8], [1, 32, 0], [1, 1, 4]] as const) {
      const seconds = await engine.measure({ batch, tokens, context, warmUp: 1, steps: 4 });
      assert.equal(seconds.length, 4);
    }
    assert.deepEqual(await engine.logits([5, 17, 2]), first);
  } finally {
    rmSync(folder, { recursive: true });
  }
});
