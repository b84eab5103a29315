import { TokenizerError } from "./errors.ts";
import { mergePieces } from "./merge.ts";
import type { PreTokenizer } from "./pre_tokenizer.ts";
import { SPACE, TokenType, VocabularyTokenizer } from "./tokenizer.ts";
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

/**
 * BPE: a text is split into words by the model's pre-tokenizer, and each word's bytes are merged by rank. Gemma 4 and its
 * like merge characters instead, with `▁` for spaces, and fall back to byte tokens.
 */
export class BpeTokenizer extends VocabularyTokenizer {
  readonly stripsLeadingSpace: boolean;
  readonly #ranks: ReadonlyMap<string, number>;
  readonly #pre: PreTokenizer;
  readonly #bytes: readonly (number | undefined)[];
  readonly #cache = new Map<string, readonly number[]>();
  override readonly warnings: readonly string[];

  constructor(vocabulary: Vocabulary, pre: PreTokenizer) {
    super(vocabulary);
    const { merges } = vocabulary;
    if (merges === undefined) throw new TokenizerError("tokenizer.ggml.merges is missing");
    const ranks = new Map<string, number>();
    // The first of equal merges counts.
    for (let rank = merges.length - 1; rank >= 0; rank--) ranks.set(merges[rank]!, rank);
    this.#ranks = ranks;
    this.#pre = pre;
    this.stripsLeadingSpace = !pre.byteLevel && vocabulary.addSpacePrefix;
    this.#bytes = pre.byteLevel ? [] : this.byteTokens();
    this.warnings = pre.warning === undefined ? [] : [pre.warning];
  }

  protected encodeText(text: string, first: boolean): number[] {
    const out: number[] = [];
    const prefix = first && this.stripsLeadingSpace && this.prefixes(text) ? SPACE : "";
    const spelt = this.#pre.byteLevel ? text : prefix + text.replaceAll(" ", SPACE);
    for (const word of this.#pre.split(spelt)) for (const id of this.#encodeWord(word)) out.push(id);
    return out;
  }

  #encodeWord(word: string): readonly number[] {
    const known = this.#cache.get(word);
    if (known !== undefined) return known;
    const { byteLevel, ignoreMerges } = this.#pre;
    let letters = word;
    if (byteLevel) {
      letters = "";
      for (const byte of encoder.encode(word)) letters += ALPHABET[byte]!;
    }
    // Line breaks of Gemma 4 have tokens but no merges.
    const whole = ignoreMerges || (!byteLevel && word.startsWith("\n")) ? this.ids.get(letters) : undefined;
    const ids: number[] = [];
    if (whole !== undefined) ids.push(whole);
    else {
      for (const piece of mergePieces([...letters], (a, b) => this.#ranks.get(`${a} ${b}`))) {
        const id = this.ids.get(piece);
        if (id !== undefined) ids.push(id);
        else if (byteLevel) {
          for (const letter of piece) ids.push(this.#known(this.ids.get(letter), BYTE_OF.get(letter)!));
        } else for (const byte of encoder.encode(piece)) ids.push(this.#known(this.#bytes[byte], byte));
      }
    }
    if (this.#cache.size >= CACHE_WORDS) this.#cache.clear();
    if (word.length <= 64) this.#cache.set(word, ids);
    return ids;
  }

  #known(id: number | undefined, byte: number): number {
    const known = id ?? this.vocabulary.unknownId;
    if (known === undefined) throw new TokenizerError(`the vocabulary has no token for byte ${byte}`);
    return known;
  }

  protected override spelling(token: string, type: number | undefined): Uint8Array {
    if (type === TokenType.userDefined) return encoder.encode(token);
    if (!this.#pre.byteLevel) return encoder.encode(token.replaceAll(SPACE, " "));
    const bytes: number[] = [];
    for (const character of token) {
      const byte = BYTE_OF.get(character);
      if (byte === undefined) return encoder.encode(token); // a token that is not in the alphabet stands for itself
      bytes.push(byte);
    }
    return new Uint8Array(bytes);
  }
}
