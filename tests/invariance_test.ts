/**
 * Invariant 1, same answer everywhere: the logits are the same bits on every instruction set, with any number of threads
 * and shards, in chunks of any size, alone or beside other requests.
 */
import assert from "node:assert/strict";
import { sameBits, startCluster } from "./cluster.ts";
import type { LocalClusterOptions } from "../cli/local_cluster.ts";
import { fixture, shared } from "./data.ts";
import { loadKernels } from "../worker/mod.ts";

const models = [
  { name: "llama-tiny-f32", path: fixture("llama-tiny-f32.gguf"), vocab: 320, length: 70, ignore: false },
  { name: "llama-tiny-bf16", path: fixture("llama-tiny-bf16.gguf"), vocab: 320, length: 70, ignore: false },
  { name: "llama-q-Q4_0", path: fixture("llama-q-Q4_0.gguf"), vocab: 320, length: 70, ignore: false },
  { name: "llama-q-TQ2_0", path: fixture("llama-q-TQ2_0.gguf"), vocab: 320, length: 70, ignore: false },
  ...["f16", "Q8_0", "Q4_0"].map((type) => ({
    name: `stories260K-${type}`,
    path: shared.path(`models/stories260K-${type}.gguf`),
    vocab: 512,
    length: 130,
    ignore: shared.absent,
  })),
];

for (const { name, path, vocab, length, ignore } of models) {
  Deno.test({ name: `${name}: the same bits however it is computed`, ignore }, async () => {
    const tokens = Array.from({ length }, (_, i) => (i * 97 + 5) % vocab);
    const others = [17, 64, 33].map((n, k) => Array.from({ length: n }, (_, i) => (i * 31 + k) % vocab));
    const compute = async (options: LocalClusterOptions, chunk: number | undefined, beside: boolean) => {
      await using cluster = await startCluster(path, options);
      const { engine } = cluster;
      const all = (beside ? [others[0]!, tokens, ...others.slice(1)] : [tokens]).map((ids) =>
        engine.logits(ids, chunk === undefined ? {} : { chunk })
      );
      return (await Promise.all(all))[beside ? 1 : 0]!;
    };
    const reference = await compute({ isa: "portable" }, undefined, false);
    assert.ok(reference.every(Number.isFinite));
    for (const isa of loadKernels().deviceInfo().available) {
      for (const threads of [1, 2]) {
        for (const shards of [1, 2, 5]) {
          for (const chunk of [undefined, 1, 7, 64]) {
            // Every value of every axis, and all pairs with the instruction set; not the whole product.
            const odd = [threads > 1, shards > 1, chunk !== undefined].filter(Boolean).length;
            if (odd > 1 && !(threads === 2 && shards === 5 && chunk === 7)) continue;
            for (const beside of odd === 0 || odd === 3 ? [false, true] : [false]) {
              const logits = await compute({ isa, threads, shards }, chunk, beside);
              const how = `${isa}, ${threads} threads, ${shards} shards, chunks ${chunk ?? "whole"}, beside ${beside}`;
              assert.ok(sameBits(logits, reference), `other bits with ${how}`);
            }
          }
        }
      }
    }
  });
}

Deno.test("sampled tokens: a seed gives the same tokens alone, among others and on two shards", async () => {
  const path = fixture("llama-q-Q4_0.gguf");
  const answers: number[][] = [];
  for (const { shards, beside } of [{ shards: 1, beside: 0 }, { shards: 1, beside: 7 }, { shards: 2, beside: 5 }]) {
    await using cluster = await startCluster(path, { shards });
    const generate = async (seed: bigint, first: number) => {
      const ids: number[] = [];
      const request = {
        promptTokens: [first, 40, 50, 60],
        maxTokens: 40,
        ignoreEos: true,
        sampling: { temperature: 1.1, topK: 0, topP: 0.98, minP: 0, repeatPenalty: 1.1, seed },
      };
      for await (const event of cluster.engine.generate(request)) if (event.type === "token") ids.push(event.id);
      return ids;
    };
    const all = [generate(42n, 30), ...Array.from({ length: beside }, (_, i) => generate(BigInt(i), 100 + i))];
    answers.push((await Promise.all(all))[0]!);
  }
  assert.equal(answers[0]!.length, 40);
  assert.ok(new Set(answers[0]).size > 5, "a random model at temperature 1.1 does not repeat itself");
  assert.deepEqual(answers[1], answers[0]);
  assert.deepEqual(answers[2], answers[0]);
});
