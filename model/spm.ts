import { TokenizerError } from "./errors.ts";
import { mergePieces } from "./merge.ts";
import { SPACE, TokenType, VocabularyTokenizer } from "./tokenizer.ts";
import type { Vocabulary } from "./tokenizer.ts";

const encoder = new TextEncoder();

/**
 * SentencePiece's BPE as llama.cpp runs it: spaces become `▁`, neighbouring pieces are merged into the vocabulary's token of
 * highest score, and what is in no token falls back to bytes.
 */
export class SpmTokenizer extends VocabularyTokenizer {
  readonly stripsLeadingSpace: boolean;
  readonly #rank: ReadonlyMap<string, number>;
  readonly #bytes: readonly (number | undefined)[];

  constructor(vocabulary: Vocabulary) {
    super(vocabulary);
    const { scores, types, addSpacePrefix } = vocabulary;
    if (scores === undefined) throw new TokenizerError("tokenizer.ggml.scores is missing");
    this.stripsLeadingSpace = addSpacePrefix;
    this.#rank = new Map(
      [...this.ids].filter(([, id]) => types[id] !== TokenType.control && types[id] !== TokenType.byte)
        .map(([token, id]) => [token, -scores[id]!]),
    );
    this.#bytes = this.byteTokens();
  }

  protected encodeText(text: string, first: boolean): number[] {
    const prefixed = first && this.prefixes(text) ? ` ${text}` : text;
    const pieces = mergePieces([...prefixed.replaceAll(" ", SPACE)], (a, b) => this.#rank.get(a + b));
    const out: number[] = [];
    for (const piece of pieces) {
      const id = this.ids.get(piece);
      if (id !== undefined) out.push(id);
      else for (const byte of encoder.encode(piece)) out.push(this.#byteId(byte));
    }
    return out;
  }

  #byteId(byte: number): number {
    const id = this.#bytes[byte] ?? this.vocabulary.unknownId;
    if (id === undefined) throw new TokenizerError(`the vocabulary has no token for byte ${byte} and no unknown token`);
    return id;
  }
}
