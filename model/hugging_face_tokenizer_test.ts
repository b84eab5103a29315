import assert from "node:assert/strict";
import { fixture, shared } from "../tests/data.ts";
import { randomNumbers } from "../tests/gguf_writer.ts";
import { ModelError, TokenizerError } from "./errors.ts";
import { tokenizerOfJson } from "./hugging_face_tokenizer.ts";

interface Case {
  text: string;
  ids: number[];
}
const golden: { own: { file: string; cases: Case[] }[]; smollm2: Case[] } = JSON.parse(
  Deno.readTextFileSync(fixture("hugging-face-golden.json")),
);

for (const { file, cases } of golden.own) {
  Deno.test(`tokenizerOfJson: ${file} gives the ids of tokenizers, and back`, () => {
    const tokenizer = tokenizerOfJson(JSON.parse(Deno.readTextFileSync(fixture(file))));
    assert.deepEqual(tokenizer.warnings, []);
    for (const { text, ids } of cases) {
      assert.deepEqual(tokenizer.encode(text), ids, JSON.stringify(text));
      const unknown = ids.includes(0) || text.includes("<tool>") || text.includes("\u2581");
      // Metaspace writes a text and the same behind a space alike.
      if (!unknown) assert.equal(tokenizer.decode(ids), file.includes("unigram") ? text.replace(/^ /, "") : text);
    }
  });
}

Deno.test({
  name: "tokenizerOfJson: SmolLM2's own file gives the ids of tokenizers, and back",
  ignore: shared.absent,
  fn() {
    const read = (name: string) => JSON.parse(Deno.readTextFileSync(shared.path(`tokenizers/smollm2/${name}`)));
    const tokenizer = tokenizerOfJson(read("tokenizer.json"), { config: read("tokenizer_config.json"), eosIds: [2] });
    assert.deepEqual(tokenizer.warnings, []);
    assert.equal(tokenizer.vocabSize, 49152);
    assert.ok(tokenizer.eosIds.has(2));
    for (const { text, ids } of golden.smollm2) {
      assert.deepEqual(tokenizer.encode(text, { addSpecial: false }), ids, JSON.stringify(text));
      assert.equal(tokenizer.decode(ids), text);
    }
    assert.equal(tokenizer.encode("<|im_start|>a", { parseSpecial: true })[0], 1);
  },
});

Deno.test("tokenizerOfJson: an unknown pattern is not run, but named", () => {
  const json = JSON.parse(Deno.readTextFileSync(fixture("tokenizers/llama3.json")));
  json.pre_tokenizer.pretokenizers[0].pattern.Regex = "(a+)+$";
  const tokenizer = tokenizerOfJson(json);
  assert.match(tokenizer.warnings.join(), /\(a\+\)\+\$.*"default"/);
  assert.equal(tokenizer.decode(tokenizer.encode("a".repeat(1000) + "!")), "a".repeat(1000) + "!");
});

Deno.test("tokenizerOfJson: what it cannot be is refused", () => {
  const says = (json: unknown, pattern: RegExp) =>
    assert.throws(() => tokenizerOfJson(json), (error) => {
      assert.ok(error instanceof TokenizerError);
      assert.match(error.message, pattern);
      return true;
    });
  says(null, /tokenizer\.json/);
  says({ model: {} }, /vocab/);
  says({ model: { type: "WordPiece", vocab: {} } }, /"WordPiece"; there are BPE and Unigram/);
  says({ model: { type: "BPE", vocab: { a: 1e12 }, merges: [] } }, /vocab/);
  says({ model: { type: "BPE", vocab: { a: -1 }, merges: [] } }, /vocab/);
  says({ model: { type: "BPE", vocab: { a: 0 }, merges: [] } }, /neither/);
  says({ model: { type: "Unigram", vocab: [["a", 0]] } }, /unknown_token_id/);
  says({ model: { type: "Unigram", vocab: [["a", 0]], unk_id: 9 } }, /unk/);
});

Deno.test("tokenizerOfJson: mutated files are read or refused, nothing else", () => {
  const seeds = golden.own.map(({ file }) => Deno.readTextFileSync(fixture(file)));
  const random = randomNumbers(20261125);
  const values = ["null", "[]", "{}", "-1", "4294967296", '"x"', "true", "1e999", "[[]]"];
  let read = 0, refused = 0;
  for (let i = 0; i < 1200; i++) {
    // Half are broken in their bytes, half in a value somewhere.
    let text = seeds[random() % seeds.length]!;
    for (let n = 1 + random() % 3; n > 0; n--) {
      const at = random() % text.length;
      if (random() % 2 === 0) text = text.slice(0, at) + String.fromCharCode(32 + random() % 95) + text.slice(at + 1);
      else {
        const colon = text.indexOf(":", random() % 4 === 0 ? at : at % 1500);
        const end = /[,}\]]/.exec(text.slice(colon + 1))?.index ?? 0;
        text = text.slice(0, colon + 1) + values[random() % values.length]! + text.slice(colon + 1 + end);
      }
    }
    let json: unknown;
    try {
      json = JSON.parse(text);
    } catch {
      continue;
    }
    try {
      const tokenizer = tokenizerOfJson(json);
      tokenizer.decode(tokenizer.encode("The otter \u00e9 \u{1f9a6} <tool>", { parseSpecial: true }));
      read++;
    } catch (error) {
      assert.ok(error instanceof ModelError, `mutation ${i}: ${(error as Error).stack}`);
      refused++;
    }
  }
  assert.ok(read > 100 && refused > 50, `${read} read, ${refused} refused`);
});
