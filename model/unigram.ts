import { TokenizerError } from "./errors.ts";
import { SPACE, TokenType, VocabularyTokenizer } from "./tokenizer.ts";
import type { Vocabulary } from "./tokenizer.ts";

/** How much worse an unknown character is than the least probable token, as in SentencePiece. */
const UNKNOWN_PENALTY = 10;
/** How much longer a text may become when its characters are replaced; Unicode's NFKC makes up to 18 of one. */
const MAX_GROWTH = 32;
const encoder = new TextEncoder();

/**
 * SentencePiece's unigram model, T5's: of all ways to spell a text with tokens the most probable one, found in one pass over
 * the text (Kudo 2018, Viterbi). Texts are normalised first; a character in no token is one unknown token with its unknown
 * neighbours, or its bytes where the vocabulary has byte tokens.
 */
export class UnigramTokenizer extends VocabularyTokenizer {
  readonly stripsLeadingSpace: boolean;
  readonly #trie: Trie;
  readonly #scores: Float64Array;
  readonly #unknownScore: number;
  readonly #unknownId: number;
  readonly #bytes: readonly (number | undefined)[] | undefined;
  readonly #charsMap: CharsMap | undefined;

  constructor(vocabulary: Vocabulary) {
    super(vocabulary);
    const { scores, tokens, types, unknownId, charsMap } = vocabulary;
    if (scores === undefined) throw new TokenizerError("tokenizer.ggml.scores is missing");
    if (unknownId === undefined) throw new TokenizerError("tokenizer.ggml.unknown_token_id is missing");
    this.stripsLeadingSpace = vocabulary.addSpacePrefix;
    this.#unknownId = unknownId;
    this.#trie = new Trie();
    let least = Infinity;
    this.#scores = Float64Array.from(scores, (score, id) => {
      const type = types[id];
      if (type === TokenType.normal) least = Math.min(least, score);
      const spells = type === TokenType.normal || type === TokenType.userDefined || type === TokenType.unused;
      if (spells && tokens[id] !== "") this.#trie.add(tokens[id]!, id);
      return type === TokenType.userDefined ? 0 : score; // zero is the best there is: the logarithm of 1
    });
    this.#unknownScore = (Number.isFinite(least) ? least : 0) - UNKNOWN_PENALTY;
    const bytes = this.byteTokens();
    this.#bytes = bytes.includes(undefined) ? undefined : bytes;
    this.#charsMap = charsMap === undefined ? undefined : new CharsMap(charsMap);
  }

  protected encodeText(text: string, first: boolean): number[] {
    const spelt = this.#normalise(text, first);
    // At each position of the text: the best score of a spelling that ends there, with its last token and where that begins.
    const best = new Float64Array(spelt.length + 1).fill(-Infinity);
    const token = new Int32Array(spelt.length + 1);
    const from = new Int32Array(spelt.length + 1);
    best[0] = 0;
    for (let at = 0; at < spelt.length;) {
      const width = spelt.codePointAt(at)! > 0xffff ? 2 : 1;
      const here = best[at]!;
      const offer = (end: number, id: number, score: number) => {
        if (here + score > best[end]!) {
          best[end] = here + score;
          token[end] = id;
          from[end] = at;
        }
      };
      let known = false;
      this.#trie.each(spelt, at, (end, id) => {
        if (end === at + width) known = true;
        offer(end, id, this.#scores[id]!);
      });
      if (!known) offer(at + width, this.#unknownId, this.#unknownScore);
      at += width;
    }
    const out: number[] = [];
    let unknown = false; // unknown neighbours are one token
    for (let end = spelt.length; end > 0; end = from[end]!) {
      const id = token[end]!;
      if (id !== this.#unknownId) out.push(id);
      else if (this.#bytes !== undefined) {
        for (const byte of encoder.encode(spelt.slice(from[end], end)).reverse()) out.push(this.#bytes[byte]!);
      } else if (!unknown) out.push(id);
      unknown = id === this.#unknownId;
    }
    return out.reverse();
  }

  #normalise(text: string, first: boolean): string {
    const { removeExtraSpaces } = this.vocabulary;
    let spelt = this.#charsMap?.apply(text) ?? text;
    if (removeExtraSpaces) spelt = spelt.replaceAll(/ +/g, " ").replaceAll(/^ | $/g, "");
    if (first && spelt !== "" && this.prefixes(spelt)) spelt = ` ${spelt}`;
    return spelt.replaceAll(" ", SPACE);
  }
}

/** Tokens by their characters. */
class Trie {
  /** A node's child by node and UTF-16 unit. Node 0 is the root. */
  readonly #children = new Map<number, number>();
  /** The token that ends at each node, or −1. */
  readonly #token: number[] = [-1];

  /** The first of equal tokens counts. */
  add(text: string, id: number): void {
    let node = 0;
    for (let i = 0; i < text.length; i++) {
      const key = node * 0x1_0000 + text.charCodeAt(i);
      let child = this.#children.get(key);
      if (child === undefined) this.#children.set(key, child = this.#token.push(-1) - 1);
      node = child;
    }
    if (this.#token[node] === -1) this.#token[node] = id;
  }

  /** Calls `found` for each token that `text` has from `at` on, shortest first. */
  each(text: string, at: number, found: (end: number, id: number) => void): void {
    let node: number | undefined = 0;
    for (let i = at; i < text.length; i++) {
      node = this.#children.get(node * 0x1_0000 + text.charCodeAt(i));
      if (node === undefined) return;
      if (this.#token[node]! >= 0) found(i + 1, this.#token[node]!);
    }
  }
}

/**
 * SentencePiece's `precompiled_charsmap`: which characters are written as which others. Its length in bytes, a double-array
 * trie (darts-clone) over UTF-8, then the replacements, each ended by a zero byte.
 */
class CharsMap {
  readonly #units: Uint32Array;
  readonly #replacements: Uint8Array;

  /** @throws {TokenizerError} when lengths do not fit. */
  constructor(bytes: Uint8Array) {
    const size = bytes.length < 4 ? Infinity : new DataView(bytes.buffer, bytes.byteOffset).getUint32(0, true);
    if (size % 4 !== 0 || size === 0 || 4 + size > bytes.length) {
      throw new TokenizerError(`precompiled_charsmap has ${bytes.length} bytes, too few for its trie`);
    }
    const view = new DataView(bytes.buffer, bytes.byteOffset + 4, size);
    this.#units = Uint32Array.from({ length: size / 4 }, (_, i) => view.getUint32(4 * i, true));
    this.#replacements = bytes.subarray(4 + size);
  }

  apply(text: string): string {
    const input = encoder.encode(text);
    const out: number[] = [];
    for (let at = 0; at < input.length;) {
      const match = this.#longest(input, at);
      if (match === undefined) {
        const width = input[at]! < 0x80 ? 1 : input[at]! < 0xe0 ? 2 : input[at]! < 0xf0 ? 3 : 4;
        for (let i = 0; i < width; i++) out.push(input[at + i]!);
        at += width;
      } else {
        for (let i = match.replacement; this.#byte(i) !== 0; i++) out.push(this.#byte(i));
        at += match.length;
        if (out.length > MAX_GROWTH * (input.length + 64)) {
          throw new TokenizerError("precompiled_charsmap makes a text impossibly long");
        }
      }
    }
    return new TextDecoder("utf-8", { ignoreBOM: true }).decode(Uint8Array.from(out));
  }

  /** The longest key that begins at `at`. A unit's fields are those of darts-clone's `DoubleArrayUnit`. */
  #longest(input: Uint8Array, at: number): { length: number; replacement: number } | undefined {
    let found: { length: number; replacement: number } | undefined;
    const offset = (unit: number) => (unit >>> 10) << ((unit & 0x200) >>> 6);
    let node = offset(this.#unit(0));
    for (let i = at; i < input.length && input[i] !== 0; i++) {
      node ^= input[i]!;
      const unit = this.#unit(node);
      if ((unit & 0x8000_00ff) !== input[i]!) break;
      node ^= offset(unit);
      if ((unit & 0x100) !== 0) found = { length: i + 1 - at, replacement: this.#unit(node) & 0x7fff_ffff };
    }
    return found;
  }

  #unit(index: number): number {
    const unit = this.#units[index];
    if (unit === undefined) throw new TokenizerError(`precompiled_charsmap refers to entry ${index}, behind its end`);
    return unit;
  }

  #byte(index: number): number {
    const byte = this.#replacements[index];
    if (byte === undefined) throw new TokenizerError("precompiled_charsmap refers to a replacement behind its end");
    return byte;
  }
}
