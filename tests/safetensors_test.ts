import assert from "node:assert/strict";
import { join } from "node:path";
import { loadModel, ModelError, SafetensorsError, TokenizerError, UnsupportedModelError } from "../model/mod.ts";
import { KernelError, loadKernels } from "../worker/mod.ts";
import { argmax, maxDifference, relativeError, sameBits, startCluster } from "./cluster.ts";
import { fixture } from "./data.ts";
import { randomNumbers } from "./gguf_writer.ts";
import { modelCost, shardOf, wholeBytes } from "../orchestrator/mod.ts";
import { shardSchema } from "../bus/mod.ts";
import { writeModelFolder, writeSafetensors } from "./safetensors_writer.ts";

interface Golden {
  file: string;
  tokens: number[];
  logits: string;
  shape: [number, number];
  tolerance: number;
}
const goldens: Golden[] = JSON.parse(Deno.readTextFileSync(fixture("goldens.json")));

async function withFolder(use: (folder: string) => Promise<void>): Promise<void> {
  const folder = await Deno.makeTempDir({ prefix: "lutra-folder-" });
  try {
    await use(folder);
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}

for (const type of ["f32", "f16", "bf16"]) {
  const golden = goldens.find(({ file }) => file === `llama-tiny-${type}.gguf`)!;
  Deno.test(`safetensors ${type}: a folder gives transformers' logits, on one shard and on two`, () =>
    withFolder(async (folder) => {
      writeModelFolder(golden.file, folder);
      const expected = new Float32Array(Deno.readFileSync(fixture(golden.logits)).buffer);
      const [positions, vocab] = golden.shape;
      for (const shards of [1, 2]) {
        await using cluster = await startCluster(folder, { kvType: "f32", shards });
        const logits = await cluster.engine.logits(golden.tokens);
        const difference = maxDifference(logits, expected);
        assert.ok(difference <= golden.tolerance, `logits differ by ${difference}, more than ${golden.tolerance}`);
        for (let i = 0; i < positions; i++) assert.equal(argmax(logits, i, vocab), argmax(expected, i, vocab));
      }
    }));
}

const quantised: { name: string; tokens: number[] }[] = JSON.parse(
  Deno.readTextFileSync(fixture("folders/goldens.json")),
);
for (const { name, tokens } of quantised) {
  Deno.test(`safetensors ${name}: the logits of its weights dequantised by their formula, the same bits everywhere`, () =>
    withFolder(async (folder) => {
      for (const { name: file } of Deno.readDirSync(fixture(`folders/${name}`))) {
        Deno.copyFileSync(fixture(`folders/${name}/${file}`), join(folder, file));
      }
      Deno.copyFileSync(fixture("tokenizers/llama3.json"), join(folder, "tokenizer.json"));
      const expected = new Float32Array(Deno.readFileSync(fixture(`folders/${name}.f32`)).buffer);
      // What 8-bit activations may cost a model of one layer (golden_test.ts derives it), and a 256th of it for 16 bits.
      const bound = 2 * 0.0064 * Math.sqrt(4 + 1);
      for (const [activations, most] of [["a8", bound], ["a16", bound / 256]] as const) {
        let first: Float32Array | undefined;
        for (const isa of loadKernels().deviceInfo().available) {
          await using cluster = await startCluster(folder, { kvType: "f32", activations, isa });
          const logits = await cluster.engine.logits(tokens);
          const error = relativeError(logits, expected);
          assert.ok(error <= most, `${isa} ${activations}: relative error ${error} exceeds ${most}`);
          assert.ok(sameBits(logits, first ??= logits), isa);
        }
      }
    }));
}

Deno.test("loadModel: a folder's tokenizer, template and end tokens are read", () =>
  withFolder(async (folder) => {
    writeModelFolder("llama-tiny-f32.gguf", folder);
    Deno.writeTextFileSync(
      join(folder, "tokenizer_config.json"),
      JSON.stringify({
        bos_token: { content: "<s>" },
        eos_token: "</s>",
        chat_template: "{{ bos_token }}{{ messages[0].content }}",
      }),
    );
    Deno.writeTextFileSync(join(folder, "generation_config.json"), JSON.stringify({ eos_token_id: [2, 5] }));
    const model = await loadModel(folder);
    assert.equal(model.chatTemplate.render([{ role: "user", content: "Hi" }]), "<s>Hi");
    assert.deepEqual([...model.tokenizer.eosIds].sort(), [2, 5]);
    assert.equal(model.path, join(folder, "model.safetensors"));
    assert.equal(model.tokenizer.encode("Hi")[0], 1);
  }));

Deno.test("loadModel: a folder that cannot be run says which part is wrong", () =>
  withFolder(async (folder) => {
    const refused = (type: abstract new (...args: never[]) => Error, message: RegExp) =>
      assert.rejects(loadModel(folder), (error) => {
        assert.ok(error instanceof type, String(error));
        assert.match(error.message, message);
        return true;
      });
    await refused(UnsupportedModelError, /has no config\.json/);
    const write = (config: object) =>
      writeModelFolder("llama-tiny-f32.gguf", folder, config as Record<string, unknown>);
    for (
      const [config, message] of [
        [{ model_type: "otter" }, /"otter" is not supported in safetensors; there are llama/],
        [{ hidden_size: "64" }, /hidden_size is wrong/],
        [{ quantization_config: { quant_method: "fp8" } }, /quantised by fp8 are not supported; there are gptq, awq/],
        [{ quantization_config: { quant_method: "compressed-tensors" } }, /quantised by compressed-tensors are not/],
        [{ quantization_config: { quant_method: "auto-round" } }, /quantised by auto-round are not supported/],
        [{ quantization_config: { quant_method: 4 } }, /quantization_config.quant_method is wrong/],
        [{ rope_scaling: { rope_type: "llama3", factor: 8 } }, /rope scaling llama3 has no low_freq_factor/],
        [{ rope_scaling: { rope_type: "dynamic", factor: 8 } }, /rope scaling dynamic is not supported/],
        [{ rope_scaling: { rope_type: "longrope", original_max_position_embeddings: 8 } }, /has no short_factor/],
        [{ layer_types: ["sliding_attention"] }, /layer 0 has sliding_attention, not full_attention/],
        [{ model_type: "falcon", alibi: true }, /alibi is true, which falcon cannot have yet/],
        [{ sliding_window: 16 }, /sliding_window is 16/],
        [{ hidden_act: "gelu" }, /hidden_act is gelu/],
        [{ num_hidden_layers: 4 }, /not understood/],
        [{ num_hidden_layers: 6 }, /blk\.5\.attn_q\.weight is missing/],
      ] as const
    ) {
      write(config);
      await refused(UnsupportedModelError, message);
    }
    write({});
    Deno.removeSync(join(folder, "tokenizer.json"));
    await refused(TokenizerError, /has no tokenizer\.json/);
    write({});
    Deno.writeTextFileSync(join(folder, "config.json"), "{");
    await refused(UnsupportedModelError, /is no JSON/);
    write({});
    Deno.writeFileSync(join(folder, "model.safetensors"), new Uint8Array(20));
    await refused(SafetensorsError, /header is no JSON/);
    Deno.writeFileSync(
      join(folder, "model.safetensors"),
      writeSafetensors({ "model.norm.weight": { dtype: "I64", shape: [1], data: new Uint8Array(8) } }),
    );
    await refused(UnsupportedModelError, /model\.norm\.weight has type I64/);
  }));

Deno.test("loadModel: a quantised folder in another layout is refused by its name, and one that grows says how much", () =>
  withFolder(async (folder) => {
    const load = (name: string, quantization: object) => {
      const source = fixture(`folders/${name}`);
      const config = JSON.parse(Deno.readTextFileSync(join(source, "config.json")));
      Object.assign(config.quantization_config, quantization);
      Deno.writeTextFileSync(join(folder, "config.json"), JSON.stringify(config));
      Deno.copyFileSync(join(source, "model.safetensors"), join(folder, "model.safetensors"));
      Deno.copyFileSync(fixture("tokenizers/llama3.json"), join(folder, "tokenizer.json"));
      return loadModel(folder);
    };
    for (
      const [name, quantization, message] of [
        ["gptq-2", { checkpoint_format: "marlin" }, /qweight is in format marlin; there are gptq and gptq_v2/],
        ["gptq-2", { quant_method: "awq" }, /does not fit its scales/],
        ["awq", { version: "gemv" }, /in AWQ's gemv layout; only gemm is supported/],
        ["awq", { quant_method: "bitnet" }, /qweight is not BitNet's/],
        ["bitnet", { use_rms_norm: true }, /norms within BitNet's linear layers/],
        ["bitnet", { quant_method: "gptq" }, /its configuration is not BitNet's/],
      ] as const
    ) {
      await assert.rejects(load(name, quantization), (error) => {
        assert.ok(error instanceof UnsupportedModelError, String(error));
        assert.match(error.message, message);
        return true;
      });
    }
    assert.deepEqual((await load("gptq-4-act-order", {})).warnings, []);
    const { warnings } = await load("gptq-8-group-4", {});
    assert.match(
      warnings.join(),
      /small or odd groups \(7, the first is blk\.0\.\w+\.weight\) take [\d.]+ MB of memory, [\d.]+ MB in/,
    );
  }));

for (const { name } of quantised) {
  Deno.test(`modelCost: ${name} takes no more memory than placement reckons with`, () =>
    withFolder(async (folder) => {
      for (const file of ["config.json", "model.safetensors"]) {
        Deno.copyFileSync(fixture(`folders/${name}/${file}`), join(folder, file));
      }
      Deno.copyFileSync(fixture("tokenizers/llama3.json"), join(folder, "tokenizer.json"));
      const { description, path } = await loadModel(folder);
      const [first, end] = [0, description.hyper.layers];
      const settings = { path, kv: { type: "f16" as const, tokens: 32 }, maxBatch: 4, context: 32 };
      const handle = await loadKernels().openShard(shardOf(description, { first, end }, settings), {
        threads: 1,
        isa: null,
      });
      const { weightBytes } = handle.stats();
      handle.close();
      const reckoned = wholeBytes(modelCost(description, { type: "f16", tokens: 0 }));
      // Scales that no f16 holds are not foreseen in BF16: 2 bytes for 32 weights.
      const most = reckoned * (name.includes("bf16") ? 1.1 : 1);
      assert.ok(weightBytes <= most && weightBytes > reckoned * 0.8, `${weightBytes} bytes, reckoned with ${reckoned}`);
    }));
}

Deno.test("loadModel: a config.json with any value anywhere loads into the kernels, or is refused with an error of its kind", () =>
  withFolder(async (folder) => {
    const below = randomNumbers(20261126);
    const text = "9".repeat(100_000);
    const values = [null, true, 0, 1, -1, 3, 0.5, 1e-320, 2 ** 31, 2 ** 53, 1e308, "", "x", text, [], [1], [[]], {}, {
      a: 1,
    }];
    const sources = ["architectures", "folders"].flatMap((kind) =>
      [...Deno.readDirSync(fixture(kind))].filter(({ isDirectory }) => isDirectory).map(({ name }) => `${kind}/${name}`)
    );
    const outcome = { opened: 0, refused: 0 };
    const wrong: string[] = [];
    for (const source of sources.sort()) {
      for (const { name } of Deno.readDirSync(fixture(source))) {
        Deno.copyFileSync(fixture(`${source}/${name}`), join(folder, name));
      }
      Deno.copyFileSync(fixture("tokenizers/llama3.json"), join(folder, "tokenizer.json"));
      const good = JSON.parse(Deno.readTextFileSync(join(folder, "config.json")));
      // In every object in it, a value for every key.
      const objects = (value: unknown, path: string[] = []): string[][] =>
        typeof value !== "object" || value === null ? [] : Object.entries(value).flatMap(([key, inner]) => [
          [...path, key],
          ...objects(inner, [...path, key]),
        ]);
      for (
        const path of [...objects(good), ["sliding_window"], ["head_dim"], ["quantization_config"]]
      ) {
        const config = structuredClone(good);
        const last = path.at(-1)!;
        const object = path.slice(0, -1).reduce((object, key) => object[key], config);
        object[last] = values[below() % values.length];
        Deno.writeTextFileSync(join(folder, "config.json"), JSON.stringify(config));
        const what = `${source}: ${path.join(".")} = ${JSON.stringify(object[last]).slice(0, 40)}`;
        try {
          const { description, path: file, files } = await loadModel(folder);
          const { hyper } = description;
          const settings = { path: file, files, kv: { type: "f32" as const, tokens: 32 }, maxBatch: 4 };
          const shard = shardOf(description, { first: 0, end: hyper.layers }, {
            ...settings,
            context: Math.min(hyper.context, 32),
          });
          assert.ok(shardSchema.safeParse(shard).success, what);
          const handle = await loadKernels().openShard(shard, { threads: 1, isa: null });
          handle.close();
          outcome.opened++;
        } catch (error) {
          if (!(error instanceof ModelError || error instanceof KernelError)) wrong.push(`${what}: ${error}`);
          outcome.refused++;
        }
      }
      for (const { name } of [...Deno.readDirSync(folder)]) Deno.removeSync(join(folder, name));
    }
    assert.deepEqual(wrong, []);
    assert.ok(outcome.opened > 300 && outcome.refused > 300, JSON.stringify(outcome));
  }));

Deno.test("loadModel: a folder whose files are damaged anywhere loads, or is refused with an error of its kind", () =>
  withFolder(async (folder) => {
    let state = 1;
    const below = (n: number) => (state = (Math.imul(state, 1664525) + 1013904223) >>> 0) % n;
    const sources = ["folders/gptq-4-act-order", "folders/awq", "folders/bitnet", "architectures/mixtral"];
    for (const source of sources) {
      const names = [...Deno.readDirSync(fixture(source))].map(({ name }) => name);
      for (const name of names) Deno.copyFileSync(fixture(`${source}/${name}`), join(folder, name));
      Deno.copyFileSync(fixture("tokenizers/llama3.json"), join(folder, "tokenizer.json"));
      await loadModel(folder);
      for (let i = 0; i < 250; i++) {
        const name = names[i % names.length]!;
        const good = Deno.readFileSync(fixture(`${source}/${name}`));
        const bad = good.slice(0, below(20) === 0 ? below(good.length) : good.length);
        for (let n = 0; n <= below(3) && bad.length > 0; n++) {
          // Most damage where lengths, names, types and shapes are.
          const at = below(Math.min(bad.length, 4096));
          bad[at] = below(2) === 0 ? below(256) : "0123456789-[]{},:eE".charCodeAt(below(19));
        }
        Deno.writeFileSync(join(folder, name), bad);
        try {
          await loadModel(folder);
        } catch (error) {
          assert.ok(error instanceof ModelError, `${source}/${name}, case ${i}: ${error}`);
        }
        Deno.writeFileSync(join(folder, name), good);
      }
      for (const { name } of [...Deno.readDirSync(folder)]) Deno.removeSync(join(folder, name));
    }
  }));
