import assert from "node:assert/strict";
import { fixture, shared } from "../tests/data.ts";
import { randomNumbers, writeGguf } from "../tests/gguf_writer.ts";
import type { Value } from "../tests/gguf_writer.ts";
import { readSentencePieceModel } from "../tests/sentencepiece_model.ts";
import { TokenizerError } from "./errors.ts";
import { parseGguf, readGguf } from "./gguf.ts";
import { tokenizerOfJson } from "./hugging_face_tokenizer.ts";
import { loadModel } from "./load.ts";
import type { Tokenizer } from "./tokenizer.ts";
import { tokenizerOf } from "./vocabulary.ts";

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

/** Ids of the same strings by vocabularies that came without them; see `generate_tokenizers.py`. */
const sharedGolden: Record<string, number[][]> = JSON.parse(Deno.readTextFileSync(fixture("shared-vocab-golden.json")));

for (const [name, ids] of Object.entries(sharedGolden)) {
  Deno.test({
    name: `encode: ${name} gives its own library's ids for llama.cpp's test strings, and back`,
    ignore: shared.absent,
    fn() {
      const tokenizer = name === "smollm2"
        ? tokenizerOfJson(JSON.parse(Deno.readTextFileSync(shared.path("tokenizers/smollm2/tokenizer.json"))))
        : tokenizerOf(readSentencePieceModel(shared.path(`tokenizers/${name}-tokenizer.model`)));
      const texts = Deno.readTextFileSync(shared.path("tokenizers/ggml-vocab-gpt-2.gguf.inp"))
        .split("\n__ggml_vocab_test__\n");
      assert.ok(texts.length >= 46);
      assert.equal(ids.length, texts.length);
      texts.forEach((text, i) => {
        const encoded = tokenizer.encode(text, { addSpecial: false });
        assert.deepEqual(encoded, ids[i], JSON.stringify(text));
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

interface VocabularyGolden {
  file: string;
  oracle: string;
  cases: { text: string; ids: number[]; decoded: string }[];
}

const vocabularies: VocabularyGolden[] = JSON.parse(Deno.readTextFileSync(fixture("vocab-golden.json")));

for (const { file, oracle, cases } of vocabularies) {
  Deno.test(`encode: ${file} gives the ids of ${oracle}, and its text`, () => {
    const tokenizer = tokenizerOf(readGguf(fixture(file)));
    assert.ok(cases.length > 80);
    for (const { text, ids, decoded } of cases) {
      const encoded = tokenizer.encode(text, { addSpecial: false });
      assert.deepEqual(encoded, ids, JSON.stringify(text));
      if (!/\u2047/.test(decoded)) assert.equal(tokenizer.decode(encoded), decoded);
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

Deno.test("encode: a hundred kilobytes of one character, of spaces and of prose are no burden", async () => {
  const { tokenizer: spm } = await loadModel(fixture("llama-q-Q4_0.gguf"));
  const { tokenizer: bpe } = await loadModel(fixture("llama-tiny-f32.gguf"));
  const characters = tokenizerOf(readGguf(fixture("vocab-character-bpe.gguf")));
  const unigram = tokenizerOf(readGguf(fixture("vocab-unigram-bytes.gguf")));
  for (const tokenizer of [spm, bpe, characters, unigram]) {
    for (const piece of ["a", " ", "\u{1f9a6}", "The otter slid down the bank. "]) {
      const text = piece.repeat(Math.floor(100_000 / piece.length));
      const decoded = tokenizer.decode(tokenizer.encode(text));
      // Unigram texts lose spaces that say nothing.
      assert.equal(decoded, tokenizer === unigram ? text.replace(/ +/g, " ").trim() : text);
    }
  }
});

/** A byte-level vocabulary of single letters with these tokens before them. */
function vocabulary(first: [string, number][], more: [string, Value][] = []): Tokenizer {
  const letters = [..."abcdefghijklmnopqrstuvwxyz<|>_/\u0120\u010a"].map((letter): [string, number] => [letter, 1]);
  const all = [...first, ...letters];
  const bytes = writeGguf([
    ["tokenizer.ggml.model", { string: "gpt2" }],
    ["tokenizer.ggml.tokens", { array: all.map(([token]) => ({ string: token })), of: 8 }],
    ["tokenizer.ggml.token_type", { array: all.map(([, type]) => ({ u32: type })), of: 4 }],
    ["tokenizer.ggml.merges", { array: [{ string: "a b" }], of: 8 }],
    ...more,
  ], []);
  return tokenizerOf(parseGguf("test", bytes.length, (into, at) => into.set(bytes.subarray(at, at + into.length))));
}
const pre = (name: string): [string, Value] => ["tokenizer.ggml.pre", { string: name }];

Deno.test("tokenizerOf: BOS and EOS as the file says, and else as the pre-tokenizer implies", () => {
  const ends: [string, Value][] = [["tokenizer.ggml.bos_token_id", { u32: 0 }], ["tokenizer.ggml.eos_token_id", {
    u32: 1,
  }]];
  const special: [string, number][] = [["<s>", 3], ["</s>", 3]];
  const ids = (...more: [string, Value][]) =>
    vocabulary(special, [...ends, ...more]).encode("a").map((i) => Math.min(i, 2));
  assert.deepEqual(ids(pre("gpt-2")), [2]);
  assert.deepEqual(ids(pre("llama-bpe")), [0, 2]);
  assert.deepEqual(ids(pre("tekken")), [0, 2]);
  assert.deepEqual(ids(pre("llama-bpe"), ["tokenizer.ggml.add_bos_token", { bool: 0 }]), [2]);
  assert.deepEqual(
    ids(pre("gpt-2"), ["tokenizer.ggml.add_bos_token", { bool: 1 }], ["tokenizer.ggml.add_eos_token", { bool: 1 }]),
    [0, 2, 1],
  );
});

Deno.test("tokenizerOf: an unknown pre-tokenizer warns, an unknown model is refused by name", () => {
  assert.deepEqual(vocabulary([], [pre("gpt-2")]).warnings, []);
  assert.match(vocabulary([], [pre("otter")]).warnings.join(), /"otter" is unknown/);
  const bytes = writeGguf([
    ["tokenizer.ggml.model", { string: "rwkv" }],
    ["tokenizer.ggml.tokens", { array: [{ string: "a" }], of: 8 }],
  ], []);
  const gguf = parseGguf("test", bytes.length, (into, at) => into.set(bytes.subarray(at, at + into.length)));
  assert.throws(() => tokenizerOf(gguf), /"rwkv"; supported are/);
});

Deno.test("tokenizerOf: words that white space parts are merged as characters, in lower case where the file says so", () => {
  const words: [string, number][] = [["ab", 1], ["中", 1], ["<unk>", 2]];
  const lower: [string, Value] = ["tokenizer.ggml.normalizer.lowercase", { bool: 1 }];
  const unknown: [string, Value] = ["tokenizer.ggml.unknown_token_id", { u32: 2 }];
  assert.deepEqual(vocabulary(words, [pre("whitespace"), lower]).encode(" AB\n中  ab "), [0, 1, 0]);
  assert.deepEqual(vocabulary(words, [pre("whitespace"), unknown]).encode("Q ab"), [2, 0]);
});

Deno.test("tokenizerOf: what ends an answer", () => {
  const of = (...tokens: [string, number][]) => [...vocabulary(tokens, [pre("gpt-2")]).eosIds].sort();
  assert.deepEqual(of(["<|im_start|>", 3], ["<|im_end|>", 3], ["</s>", 1]), [1]);
  assert.deepEqual(of(["<|im_end|>", 1]), [0], "it looks like a control token, so it is one");
  assert.deepEqual(of(["<|end|>", 3], ["<|return|>", 3], ["<|call|>", 3]), [1, 2]);
  assert.deepEqual(of(["<|tool_response>", 3], ["</s>", 3]), [0]);
});

Deno.test("encode: user-defined tokens in any text, special ones where asked for, and what they swallow", () => {
  const special: [string, number][] = [["<|x|>", 3], ["abc", 4], ["abcd", 4]];
  const plain = vocabulary(special, [pre("gpt-2")]);
  assert.deepEqual(plain.encode("abcd"), [2], "the longest counts");
  assert.deepEqual(plain.encode("abc").concat(plain.encode("<|x|>", { parseSpecial: true })), [1, 0]);
  assert.ok(plain.encode("<|x|>").length > 1);
  const phi = vocabulary(special, [pre("gpt-2"), ["general.name", { string: "Phi-3 mini" }]]);
  assert.deepEqual(phi.encode("<|x|> \n abc", { parseSpecial: true }), [0, 1]);
  assert.ok(plain.encode("<|x|> \n abc", { parseSpecial: true }).length > 2);
});

Deno.test("encode: thousands of special tokens are found in a long text", () => {
  const many = vocabulary(Array.from({ length: 6200 }, (_, i): [string, number] => [`<unused_${i.toString(16)}>`, 3]), [
    pre("gpt-2"),
  ]);
  const text = "<unused_".repeat(30_000) + "<unused_17ff>";
  const ids = many.encode(text, { parseSpecial: true });
  assert.equal(ids.at(-1), many.encode("<unused_17ff>", { parseSpecial: true })[0]);
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
