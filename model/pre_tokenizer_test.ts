import assert from "node:assert/strict";
import { fixture } from "../tests/data.ts";
import { PRE_TOKENIZERS, preTokenizer } from "./pre_tokenizer.ts";

interface Golden {
  strings: string[];
  /** By name, by string: the words' lengths. */
  words: Record<string, number[][]>;
}

const golden: Golden = JSON.parse(Deno.readTextFileSync(fixture("pre-tokenizer-golden.json")));

for (const [name, all] of Object.entries(golden.words)) {
  Deno.test(`preTokenizer: ${name} splits as tokenizers does with the pattern of training`, () => {
    const { split } = preTokenizer(name);
    golden.strings.forEach((text, i) => {
      let at = 0;
      const expected = all[i]!.map((length) => text.slice(at, at += length));
      assert.deepEqual(split(text), expected, JSON.stringify(text));
    });
  });
}

Deno.test("preTokenizer: every name splits without losing a character, a long run of anything too", () => {
  const pieces = ["a", " ", "1", "\n", "A", "a b ", "中", "\u0301", "!", "\0", "'s", "🦦", " \n", "Aa"];
  // What a backtracking engine tries from every position anew, unless the pattern prevents it.
  const tails = new Set([" ", "1"]);
  for (const name of PRE_TOKENIZERS) {
    const { split } = preTokenizer(name);
    for (const text of golden.strings) {
      const kept = name === "whitespace" ? text.replaceAll(/[\p{White_Space}▁]/gu, "") : text;
      assert.equal(split(text).join(""), kept);
    }
  }
  for (const name of Object.keys(golden.words)) {
    const { split } = preTokenizer(name);
    for (const piece of pieces) {
      const text = piece.repeat(Math.floor(60_000 / piece.length)) + (tails.has(piece) ? "x" : "");
      assert.equal(split(text).join(""), text);
    }
  }
});

Deno.test("preTokenizer: whitespace drops what parts its words, whatever white space it is", () => {
  const { split, byteLevel } = preTokenizer("whitespace");
  assert.deepEqual(split("▁中文 vectors,\u3000\n\t two\u0085x "), ["中文", "vectors,", "two", "x"]);
  assert.deepEqual([split(" \n"), split(""), byteLevel], [[], [], false]);
});

Deno.test("preTokenizer: an unknown name stands for default, with a warning that says so", () => {
  const unknown = preTokenizer("otter-3");
  assert.match(unknown.warning!, /"otter-3" is unknown.*"default"/);
  assert.deepEqual(unknown.split("it's 12345"), preTokenizer("default").split("it's 12345"));
  assert.equal(preTokenizer("default").warning, undefined);
});
