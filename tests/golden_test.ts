/**
 * Logits and greedy tokens against independent engines: `transformers`, a float64 NumPy model and llama.cpp. All of them kept
 * the KV cache in float32, so it is here too; in F16, the default, it alone changes these logits by about 0.02.
 */
import assert from "node:assert/strict";
import { argmax, maxDifference, relativeError, startCluster } from "./cluster.ts";
import { fixture, shared } from "./data.ts";
import { floats, integers, readNpz } from "./npz.ts";
import { writeGguf } from "./gguf_writer.ts";
import type { Value } from "./gguf_writer.ts";
import { readGguf } from "../model/mod.ts";
import { DEFAULT_SAMPLING } from "../orchestrator/mod.ts";
import { loadKernels } from "../worker/mod.ts";

/**
 * Bound on the relative error (root mean square, of the logits' spread) that 8-bit activations may cause.
 *
 * A group of n activations is rounded in steps of max/127, an error uniform in ± half a step, whose root mean square is
 * max / (127·√12). With max ≈ 2.1σ over 32 roughly normal values and 2.8σ over 256, that is 0.5 % to 0.64 % of σ, and a
 * product's result inherits the ratio. A layer passes two such roundings in sequence in each of its two branches, so
 * L layers and the head add up to about 0.64 % · √(4L + 1), as independent errors do: 2.9 % for five layers. Attention and
 * SwiGLU may amplify, in random models above all, hence the factor 2. llama.cpp, which rounds activations alike, is 3.1 % off
 * these goldens for llama-q-Q8_0 and 3.2 % for llama-q-TQ2_0, as far as Lutra; in trained models both stay near 1 %.
 */
const a8Bound = (layers: number) => 2 * 0.0064 * Math.sqrt(4 * layers + 1);

interface Golden {
  file: string;
  tokens: number[];
  logits: string;
  shape: [number, number];
  tolerance: number;
}

const goldens: Golden[] = JSON.parse(Deno.readTextFileSync(fixture("goldens.json")));

for (const golden of goldens) {
  Deno.test(`fixture ${golden.file}: logits equal transformers'`, async () => {
    const expected = new Float32Array(Deno.readFileSync(fixture(golden.logits)).buffer);
    const [positions, vocab] = golden.shape;
    await using cluster = await startCluster(fixture(golden.file), { kvType: "f32" });
    const logits = await cluster.engine.logits(golden.tokens);
    assert.equal(logits.length, positions * vocab);
    if (golden.tolerance > 0) {
      const difference = maxDifference(logits, expected);
      assert.ok(difference <= golden.tolerance, `logits differ by ${difference}, more than ${golden.tolerance}`);
      for (let i = 0; i < positions; i++) {
        assert.equal(argmax(logits, i, vocab), argmax(expected, i, vocab), `row ${i}`);
      }
    } else {
      const bound = a8Bound(cluster.engine.model.description.hyper.layers);
      const error = relativeError(logits, expected);
      assert.ok(error <= bound, `relative error ${error} exceeds ${bound}`);
    }
  });
}

for (const golden of goldens.filter((golden) => golden.tolerance === 0)) {
  Deno.test(`fixture ${golden.file}: with activations of 16 bits logits equal transformers', on one shard and on two`, async () => {
    const expected = new Float32Array(Deno.readFileSync(fixture(golden.logits)).buffer);
    const options = { kvType: "f32", activations: "a16" } as const;
    await using one = await startCluster(fixture(golden.file), options);
    const logits = await one.engine.logits(golden.tokens);
    // A 256th of the rounding of 8 bits.
    const bound = a8Bound(one.engine.model.description.hyper.layers) / 256;
    const error = relativeError(logits, expected);
    assert.ok(error <= bound, `relative error ${error} exceeds ${bound}`);
    await using two = await startCluster(fixture(golden.file), { ...options, shards: 2 });
    assert.deepEqual(await two.engine.logits(golden.tokens), logits);
  });
}

const model = (type: string) => shared.path(`models/stories260K-${type}.gguf`);

Deno.test({
  name: "stories260K f32: logits within 1e-3 of transformers and NumPy at 128 positions",
  ignore: shared.absent,
}, async () => {
  const golden = readNpz(shared.path("golden/stories260K-f32.logits.npz"));
  const ids = integers(golden, "ids");
  assert.equal(ids.length, 128);
  await using cluster = await startCluster(model("f32"), { kvType: "f32" });
  const logits = await cluster.engine.logits(ids);
  for (const name of ["logits_transformers", "logits_numpy64"]) {
    const expected = floats(golden, name);
    const difference = maxDifference(logits, expected);
    console.log(`${name}: largest difference ${difference.toExponential(2)}`);
    assert.ok(difference <= 1e-3, `${name}: ${difference}`);
    for (let i = 0; i < ids.length; i++) {
      assert.equal(argmax(logits, i, 512), argmax(expected, i, 512), `${name} row ${i}`);
    }
  }
});

Deno.test({ name: "stories260K f16: logits within 2e-2 of the f32 goldens", ignore: shared.absent }, async () => {
  const golden = readNpz(shared.path("golden/stories260K-f32.logits.npz"));
  await using cluster = await startCluster(model("f16"), { kvType: "f32" });
  const logits = await cluster.engine.logits(integers(golden, "ids"));
  const difference = maxDifference(logits, floats(golden, "logits_numpy64"));
  console.log(`f16: largest difference ${difference.toExponential(2)}`);
  assert.ok(difference <= 2e-2, `${difference}`);
});

Deno.test({ name: "stories260K f32: greedy ids equal llama.cpp's", ignore: shared.absent }, async () => {
  const golden = JSON.parse(Deno.readTextFileSync(shared.path("golden/stories260K-f32.llamacpp.json")));
  for (const shards of [1, 2]) {
    await using cluster = await startCluster(model("f32"), { shards, kvType: "f32" });
    const { engine } = cluster;
    const promptTokens = engine.model.tokenizer.encode(golden.prompt);
    assert.deepEqual(promptTokens, golden.prompt_ids);
    const ids = [...promptTokens];
    let text = engine.model.tokenizer.decode(promptTokens, { skipSpecial: true });
    const maxTokens = golden.greedy_ids.length - promptTokens.length;
    for await (
      const event of engine.generate({ promptTokens, maxTokens, sampling: { ...DEFAULT_SAMPLING, temperature: 0 } })
    ) {
      if (event.type === "token") {
        ids.push(event.id);
        text += event.text;
      }
    }
    assert.deepEqual(ids, golden.greedy_ids);
    assert.equal(text.trimStart(), golden.text.trimStart());
  }
});

/** The model with every tensor written out as F32: the same values, computed without rounding activations. */
async function dequantised(path: string): Promise<string> {
  const gguf = readGguf(path);
  const kernels = loadKernels();
  const file = Deno.readFileSync(path);
  const tensors = [...gguf.tensors.values()].map(({ name, type, shape, offset, bytes }) => {
    const [cols, rows = 1] = [shape[0]!, shape[1]];
    const values = kernels.unpack(type, file.slice(offset, offset + bytes), rows, cols);
    return { name, type: 0, shape: [...shape], data: new Uint8Array(values.buffer as ArrayBuffer) };
  });
  const metadata = [...gguf.metadata].flatMap(([key, value]): [string, Value][] => {
    if (typeof value === "string") return [[key, { string: value }]];
    if (typeof value !== "number" || !key.startsWith("llama.")) return [];
    return [[key, Number.isInteger(value) && !/epsilon|freq_base/.test(key) ? { u32: value } : { f32: value }]];
  });
  const target = await Deno.makeTempFile({ suffix: ".gguf" });
  await Deno.writeFile(target, writeGguf(metadata.filter(([key]) => !key.startsWith("tokenizer.")), tensors));
  return target;
}

for (const type of ["Q4_0", "Q8_0"]) {
  Deno.test({
    name: `stories260K ${type}: logits against the float result of its dequantised weights`,
    ignore: shared.absent,
  }, async () => {
    const ids = integers(readNpz(shared.path("golden/stories260K-f32.logits.npz")), "ids");
    const path = await dequantised(model(type));
    try {
      await using low = await startCluster(model(type), { kvType: "f32" });
      await using float = await startCluster(path, { kvType: "f32" });
      const error = relativeError(await low.engine.logits(ids), await float.engine.logits(ids));
      console.log(`${type}: relative error against its dequantised weights ${error.toExponential(2)}`);
      assert.ok(error <= a8Bound(5), `relative error ${error} exceeds ${a8Bound(5)}`);
    } finally {
      await Deno.remove(path);
    }
  });

  Deno.test(
    { name: `stories260K ${type}: argmax and logits against llama.cpp's golden`, ignore: shared.absent },
    async () => {
      const golden = readNpz(shared.path(`golden/stories260K-${type}.llamacpp.npz`));
      const ids = integers(golden, "ids");
      const expected = floats(golden, "logits");
      await using cluster = await startCluster(model(type), { kvType: "f32" });
      const logits = await cluster.engine.logits(ids);
      // Both engines round activations, each in its own way: errors add as squares.
      const error = relativeError(logits, expected);
      console.log(`${type}: relative error against llama.cpp ${error.toExponential(2)}`);
      assert.ok(error <= Math.SQRT2 * a8Bound(5), `relative error ${error}`);
      for (let i = 0; i < ids.length; i++) assert.equal(argmax(logits, i, 512), argmax(expected, i, 512), `row ${i}`);
    },
  );
}

/** A trained ternary model, two other engines' logits of it, and how near independent engines come (the data's MANIFEST). */
for (
  const [type, oracle, tolerance] of [
    ["f16", "numpy-f32", 2e-2],
    ["tq1_0", "llamacpp", 6e-2],
    ["tq2_0", "llamacpp", 6e-2],
  ] as const
) {
  Deno.test({
    name: `micro-lm-pro ${type}: logits within ${tolerance} of ${oracle}'s, the same argmax, on one shard and on two`,
    ignore: shared.absent,
  }, async () => {
    const of = type === "f16" ? "micro-lm-pro" : `micro-lm-pro-${type}`;
    const golden = readNpz(shared.path(`golden/${of}.${oracle}.npz`));
    const ids = integers(golden, "ids");
    const expected = floats(golden, "logits");
    assert.equal(ids.length, 20);
    const path = shared.path(`models/micro-lm-pro-${type}.gguf`);
    await using one = await startCluster(path, { kvType: "f32" });
    const logits = await one.engine.logits(ids);
    const vocab = expected.length / ids.length;
    const difference = maxDifference(logits, expected);
    console.log(`${type}: largest difference ${difference.toExponential(2)}`);
    assert.ok(difference <= tolerance, `${difference}`);
    for (let i = 0; i < ids.length; i++) assert.equal(argmax(logits, i, vocab), argmax(expected, i, vocab), `row ${i}`);
    await using two = await startCluster(path, { kvType: "f32", shards: 2 });
    assert.deepEqual(await two.engine.logits(ids), logits);
  });
}
