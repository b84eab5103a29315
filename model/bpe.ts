import { TokenizerError } from "./errors.ts";
import { mergePieces } from "./merge.ts";
import { preTokenizer } from "./pre_tokenizer.ts";
import { TokenType, VocabularyTokenizer } from "./tokenizer.ts";
import type { Vocabulary } from "./tokenizer.ts";

const encoder = new TextEncoder();

/** GPT-2's alphabet: a printable character for every byte. */
const ALPHABET: readonly string[] = (() => {
  const printable = (b: number) => (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
  let extra = 256;
  return Array.from({ length: 256 }, (_, byte) => String.fromCodePoint(printable(byte) ? byte : extra++));
})();
const BYTE_OF: ReadonlyMap<string, number> = new Map(ALPHABET.map((character, byte) => [character, byte]));
/** Words whose tokens are remembered. */
const CACHE_WORDS = 16_384;

/** Byte-level BPE: a text is split into words by the model's pre-tokenizer, and each word's bytes are merged by rank. */
export class BpeTokenizer extends VocabularyTokenizer {
  readonly stripsLeadingSpace = false;
  readonly #ranks: ReadonlyMap<string, number>;
  readonly #split: (text: string) => string[];
  readonly #ignoreMerges: boolean;
  readonly #cache = new Map<string, readonly number[]>();

  constructor(vocabulary: Vocabulary) {
    super(vocabulary);
    const { merges, pre } = vocabulary;
    if (merges === undefined) throw new TokenizerError("tokenizer.ggml.merges is missing");
    this.#ranks = new Map(merges.map((merge, rank) => [merge, rank]));
    const { split, ignoreMerges } = preTokenizer(pre);
    this.#split = split;
    this.#ignoreMerges = ignoreMerges;
  }

  protected encodeText(text: string): number[] {
    const out: number[] = [];
    for (const word of this.#split(text)) for (const id of this.#encodeWord(word)) out.push(id);
    return out;
  }

  #encodeWord(word: string): readonly number[] {
    const known = this.#cache.get(word);
    if (known !== undefined) return known;
    let letters = "";
    for (const byte of encoder.encode(word)) letters += ALPHABET[byte]!;
    const whole = this.#ignoreMerges ? this.ids.get(letters) : undefined;
    const ids: number[] = [];
    if (whole !== undefined) ids.push(whole);
    else {
      for (const piece of mergePieces([...letters], (a, b) => this.#ranks.get(`${a} ${b}`))) {
        const id = this.ids.get(piece);
        if (id !== undefined) ids.push(id);
        else for (const letter of piece) ids.push(this.#letterId(letter));
      }
    }
    if (this.#cache.size >= CACHE_WORDS) this.#cache.clear();
    if (word.length <= 64) this.#cache.set(word, ids);
    return ids;
  }

  #letterId(letter: string): number {
    const id = this.ids.get(letter) ?? this.vocabulary.unknownId;
    if (id === undefined) throw new TokenizerError(`the vocabulary has no token for byte ${BYTE_OF.get(letter)}`);
    return id;
  }

  tokenBytes(id: number): Uint8Array {
    this.check(id);
    const token = this.vocabulary.tokens[id]!;
    switch (this.vocabulary.types[id]) {
      case TokenType.control:
        return new Uint8Array();
      case TokenType.userDefined:
        return encoder.encode(token);
      default: {
        const bytes: number[] = [];
        for (const character of token) {
          const byte = BYTE_OF.get(character);
          if (byte === undefined) return encoder.encode(token); // a token that is not in the alphabet stands for itself
          bytes.push(byte);
        }
        return new Uint8Array(bytes);
      }
    }
  }
}
