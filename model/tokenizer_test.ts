import assert from "node:assert/strict";
import { fixture, shared } from "../tests/data.ts";
import { randomNumbers } from "../tests/gguf_writer.ts";
import { TokenizerError } from "./errors.ts";
import { readGguf } from "./gguf.ts";
import { loadModel, tokenizerOf } from "./load.ts";

for (const name of ["gpt-2", "falcon", "llama-spm", "phi-3"]) {
  Deno.test({
    name: `encode: ${name} gives llama.cpp's ids for its test strings, and back`,
    ignore: shared.absent,
    fn() {
      const path = shared.path(`tokenizers/ggml-vocab-${name}.gguf`);
      const tokenizer = tokenizerOf(readGguf(path));
      const texts = Deno.readTextFileSync(`${path}.inp`).split("\n__ggml_vocab_test__\n");
      const ids = Deno.readTextFileSync(`${path}.out`).split("\n");
      assert.ok(texts.length >= 46);
      texts.forEach((text, i) => {
        const expected = ids[i]!.trim().split(/\s+/).filter((id) => id !== "").map(Number);
        const encoded = tokenizer.encode(text, { addSpecial: false });
        assert.deepEqual(encoded, expected, JSON.stringify(text));
        assert.equal(tokenizer.decode(encoded), text);
      });
    },
  });
}

interface Golden {
  file: string;
  oracle: string;
  cases: { text: string; ids: number[] }[];
}

const goldens: Golden[] = JSON.parse(Deno.readTextFileSync(fixture("tokenizer-golden.json")));

for (const { file, oracle, cases } of goldens) {
  Deno.test(`encode: ${file} gives the ids of ${oracle}, and back`, async () => {
    const { tokenizer } = await loadModel(fixture(file));
    for (const { text, ids } of cases) {
      const encoded = tokenizer.encode(text, { addSpecial: false });
      assert.deepEqual(encoded, ids, JSON.stringify(text));
      assert.equal(tokenizer.decode(encoded), text);
    }
  });
}

Deno.test("encode: BOS where the model wants it, special tokens only where they are asked for", async () => {
  const { tokenizer: spm } = await loadModel(fixture("llama-q-Q4_0.gguf"));
  assert.equal(spm.encode("Hello")[0], 1);
  assert.notEqual(spm.encode("Hello", { addSpecial: false })[0], 1);
  const { tokenizer: bpe } = await loadModel(fixture("llama-tiny-f32.gguf"));
  const text = "a<|im_end|>b";
  assert.equal(bpe.encode(text, { parseSpecial: true }).length, 3);
  const plain = bpe.encode(text);
  assert.ok(plain.length > 3);
  assert.equal(bpe.decode(plain), text);
  assert.equal(bpe.decode(bpe.encode(text, { parseSpecial: true })), "ab");
  assert.equal(bpe.decode(bpe.encode(text, { parseSpecial: true }), { skipSpecial: false }), text);
});

Deno.test("encode: hundreds of kilobytes of one character, of spaces and of prose are no burden", async () => {
  for (const file of ["llama-q-Q4_0.gguf", "llama-tiny-f32.gguf"]) {
    const { tokenizer } = await loadModel(fixture(file));
    for (const piece of ["a", " ", "\u{1f9a6}", "The otter slid down the bank. "]) {
      const text = piece.repeat(Math.floor(300_000 / piece.length));
      assert.equal(tokenizer.decode(tokenizer.encode(text)), text);
    }
  }
});

Deno.test("stream: pieces never end within a character, and joined they are what decode gives", async () => {
  for (const file of ["llama-q-Q4_0.gguf", "llama-tiny-f32.gguf"]) {
    const { tokenizer } = await loadModel(fixture(file));
    const text = "läßt 日本語 🦦🏞️ e\u0301 …";
    const stream = tokenizer.stream();
    const pieces = tokenizer.encode(text).map((id) => stream.push(id));
    assert.equal(stream.flush(), "");
    assert.equal(pieces.join(""), text);
    for (const piece of pieces) {
      assert.ok(!piece.includes("\ufffd"));
      assert.ok(piece.isWellFormed(), "no half of a surrogate pair");
    }
    const random = randomNumbers(7);
    for (let round = 0; round < 200; round++) {
      const ids = Array.from({ length: random() % 40 }, () => random() % tokenizer.vocabSize);
      const each = tokenizer.stream();
      const joined = ids.map((id) => each.push(id)).join("") + each.flush();
      assert.equal(joined, tokenizer.decode(ids));
    }
  }
});

Deno.test("tokenText: ids outside the vocabulary are refused", async () => {
  const { tokenizer } = await loadModel(fixture("llama-tiny-f32.gguf"));
  for (const id of [-1, tokenizer.vocabSize, 1.5, NaN]) assert.throws(() => tokenizer.tokenBytes(id), TokenizerError);
});
