/**
 * Writes `fixtures/shards.json`: what the kernels are told of every architecture's model and of every quantised folder, with
 * tokens and logits. So that the kernels' own tests can run them where there is no Deno: on 64-bit Arm, emulated.
 *
 *     deno run -A tests/shards.ts
 *
 * @module
 */
import { join } from "node:path";
import { loadModel } from "../model/mod.ts";
import { shardOf } from "../orchestrator/mod.ts";
import { goldens as architectures } from "./architectures.ts";
import { fixture } from "./data.ts";

/** A model for the kernels' tests. Paths are from `fixtures/`. */
interface ShardGolden {
  name: string;
  tokens: readonly number[];
  logits: string;
  /** Largest difference of a logit; or else largest relative error, where activations are rounded to 8 bits. */
  tolerance?: number;
  relative?: number;
  shard: ReturnType<typeof shardOf>;
}

/** The file's text. */
export async function shardGoldens(): Promise<string> {
  const folders: { name: string; tokens: number[] }[] = JSON.parse(
    Deno.readTextFileSync(fixture("folders/goldens.json")),
  );
  // What 8-bit activations may cost (golden_test.ts derives it).
  const relative = (layers: number) => 2 * 0.0064 * Math.sqrt(4 * layers + 1);
  const sources = [
    ...architectures.map(({ name, file, context, tokens, logits, tolerance }) => ({
      name: `${name}, context ${context}`,
      ...{ path: `architectures/${file}`, context, tokens, logits: `architectures/${logits}` },
      // With 16 bits: with 8 a router may choose another expert.
      ...(tolerance > 0
        ? { tolerance, activations: "a8" as const }
        : { relative: relative(2) / 256, activations: "a16" as const }),
    })),
    ...folders.map(({ name, tokens }) => ({
      ...{ name, path: `folders/${name}`, context: 64, tokens, logits: `folders/${name}.f32` },
      ...{ relative: relative(1), activations: "a8" as const },
    })),
  ];
  const goldens: ShardGolden[] = [];
  for (const { path, context, activations, ...rest } of sources) {
    const { description } = await loadShape(path);
    const [first, end] = [0, description.hyper.layers];
    const shard = shardOf(description, { first, end }, {
      path: path.startsWith("folders/") ? `${path}/model.safetensors` : path,
      ...{ kv: { type: "f32" as const, tokens: 128 }, activations, maxBatch: 128, context },
    });
    goldens.push({ ...rest, shard });
  }
  return `[\n${goldens.map((golden) => JSON.stringify(golden)).join(",\n")}\n]\n`;
}

/** A model of the fixtures; folders there have no tokenizer. */
async function loadShape(path: string) {
  if (!path.startsWith("folders/")) return await loadModel(fixture(path));
  const folder = await Deno.makeTempDir({ prefix: "lutra-folder-" });
  try {
    for (const name of ["config.json", "model.safetensors"]) {
      Deno.copyFileSync(join(fixture(path), name), join(folder, name));
    }
    Deno.copyFileSync(fixture("tokenizers/llama3.json"), join(folder, "tokenizer.json"));
    return await loadModel(folder);
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}

if (import.meta.main) Deno.writeTextFileSync(fixture("shards.json"), await shardGoldens());
