import { TokenizerError } from "./errors.ts";
import { StreamDecoder } from "./stream_decoder.ts";

/** Options of {@linkcode Tokenizer.encode}. */
export interface EncodeOptions {
  /** Add the tokens that the model wants around a text, such as BOS. @default {true} */
  addSpecial?: boolean;
  /** Take special tokens written in the text for themselves. @default {false} */
  parseSpecial?: boolean;
}

/** Options of {@linkcode Tokenizer.decode} and {@linkcode Tokenizer.stream}. */
export interface DecodeOptions {
  /** Leave special tokens out. @default {true} */
  skipSpecial?: boolean;
}

/** Text that comes token by token; see {@linkcode StreamDecoder}. */
export interface TextStream {
  push(id: number): string;
  flush(): string;
}

/** Between text and token ids. */
export interface Tokenizer {
  readonly vocabSize: number;
  readonly bosId?: number;
  /** Tokens that end an answer. */
  readonly eosIds: ReadonlySet<number>;
  /** What the user should know of this vocabulary. */
  readonly warnings: readonly string[];
  encode(text: string, options?: EncodeOptions): number[];
  decode(ids: readonly number[], options?: DecodeOptions): string;
  /** The bytes that a token stands for; none for a special token. */
  tokenBytes(id: number): Uint8Array;
  /** The token as the vocabulary writes it. */
  tokenText(id: number): string;
  /** Decodes token by token, complete characters only. */
  stream(options?: DecodeOptions): TextStream;
}

/** What stands for a space in vocabularies of characters. */
export const SPACE = "\u2581";
const encoder = new TextEncoder();

/** Token types of GGUF's `tokenizer.ggml.token_type`. */
export const TokenType = { normal: 1, unknown: 2, control: 3, userDefined: 4, unused: 5, byte: 6 } as const;

/** What a model says of its vocabulary, checked. */
export interface Vocabulary {
  readonly tokens: readonly string[];
  readonly types: readonly number[];
  readonly scores: readonly number[] | undefined;
  readonly merges: readonly string[] | undefined;
  readonly bosId: number | undefined;
  readonly eosId: number | undefined;
  readonly unknownId: number | undefined;
  readonly eosIds: ReadonlySet<number>;
  readonly addBos: boolean;
  readonly addEos: boolean;
  readonly addSpacePrefix: boolean;
  /** Whether a text that begins with a space gets none before it. */
  readonly keepsFirstSpace: boolean;
  /** Unigram: runs of spaces become one. */
  readonly removeExtraSpaces: boolean;
  /** Unigram: SentencePiece's compiled table of what to write for which characters. */
  readonly charsMap: Uint8Array | undefined;
  /** Special tokens that swallow the white space before (`left`) or behind them. */
  readonly strip: { readonly left: ReadonlySet<number>; readonly right: ReadonlySet<number> };
}

/** What all kinds of tokenizer share: special tokens, BOS and EOS, decoding. */
export abstract class VocabularyTokenizer implements Tokenizer {
  readonly vocabSize: number;
  readonly bosId?: number;
  readonly eosIds: ReadonlySet<number>;
  /** What the user should know of this vocabulary. */
  readonly warnings: readonly string[] = [];
  protected readonly vocabulary: Vocabulary;
  protected readonly ids: ReadonlyMap<string, number>;
  /** Matches the special tokens, longest first; `undefined` without any. */
  readonly #special: RegExp | undefined;
  readonly #userDefined: RegExp | undefined;

  constructor(vocabulary: Vocabulary) {
    this.vocabulary = vocabulary;
    this.vocabSize = vocabulary.tokens.length;
    if (vocabulary.bosId !== undefined) this.bosId = vocabulary.bosId;
    this.eosIds = vocabulary.eosIds;
    const ids = new Map<string, number>();
    // The first of equal tokens counts.
    vocabulary.tokens.forEach((token, id) => {
      if (!ids.has(token)) ids.set(token, id);
    });
    this.ids = ids;
    const ofType = (...types: number[]) =>
      vocabulary.tokens.filter((token, id) => token !== "" && types.includes(vocabulary.types[id]!));
    this.#special = anyOf(ofType(TokenType.control, TokenType.userDefined, TokenType.unknown));
    this.#userDefined = anyOf(ofType(TokenType.userDefined));
  }

  /** The ids of a text without special tokens. `first`: nothing stands before it. */
  protected abstract encodeText(text: string, first: boolean): number[];
  /** Whether the decoded text of the first token loses its leading space. */
  abstract readonly stripsLeadingSpace: boolean;

  /** Whether a space goes before a text at its beginning. */
  protected prefixes(text: string): boolean {
    const { addSpacePrefix, keepsFirstSpace } = this.vocabulary;
    return addSpacePrefix && !(keepsFirstSpace && /^[ \u2581]/.test(text));
  }

  /** The token of each byte, for what no other token spells; `undefined` where there is none. */
  protected byteTokens(): (number | undefined)[] {
    const bytes: (number | undefined)[] = new Array(256).fill(undefined);
    this.vocabulary.tokens.forEach((token, id) => {
      const hex = /^<0x([0-9A-Fa-f]{2})>$/.exec(token)?.[1];
      if (this.vocabulary.types[id] === TokenType.byte && hex !== undefined) bytes[parseInt(hex, 16)] = id;
    });
    return bytes;
  }

  encode(text: string, options: EncodeOptions = {}): number[] {
    const { addSpecial = true, parseSpecial = false } = options;
    const { bosId, eosId, addBos, addEos, strip } = this.vocabulary;
    const out: number[] = [];
    if (addSpecial && addBos && bosId !== undefined) out.push(bosId);
    const pattern = parseSpecial ? this.#special : this.#userDefined;
    let at = 0;
    let first = true;
    const plain = (end: number) => {
      if (end > at) { for (const id of this.encodeText(text.slice(at, end), first)) out.push(id); }
    };
    if (pattern !== undefined) {
      for (const match of text.matchAll(pattern)) {
        const id = this.ids.get(match[0])!;
        plain(strip.left.has(id) ? at + text.slice(at, match.index).trimEnd().length : match.index);
        out.push(id);
        at = match.index + match[0].length;
        if (strip.right.has(id)) at += text.slice(at).search(/\S|$/);
        first = true; // llama.cpp: a text behind a special token begins anew
      }
    }
    plain(text.length);
    if (addSpecial && addEos && eosId !== undefined) out.push(eosId);
    return out;
  }

  decode(ids: readonly number[], options?: DecodeOptions): string {
    const stream = this.stream(options);
    let text = "";
    for (const id of ids) text += stream.push(id);
    return text + stream.flush();
  }

  tokenText(id: number): string {
    this.check(id);
    return this.vocabulary.tokens[id]!;
  }

  tokenBytes(id: number): Uint8Array {
    this.check(id);
    const token = this.vocabulary.tokens[id]!;
    const type = this.vocabulary.types[id];
    if (type === TokenType.control) return new Uint8Array();
    if (type === TokenType.byte) return new Uint8Array([parseInt(token.slice(3, 5), 16)]);
    return this.spelling(token, type);
  }

  /** What a token that stands for text writes: here SentencePiece's spaces, and its mark of what is unknown. */
  protected spelling(token: string, type: number | undefined): Uint8Array {
    return encoder.encode(type === TokenType.unknown ? "\u2047" : token.replaceAll(SPACE, " "));
  }

  /** Whether it is a control token, which no text contains. */
  isSpecial(id: number): boolean {
    this.check(id);
    const type = this.vocabulary.types[id];
    return type === TokenType.control || type === TokenType.unknown;
  }

  stream(options: DecodeOptions = {}): StreamDecoder {
    return new StreamDecoder(this, { skipSpecial: true, ...options, stripLeadingSpace: this.stripsLeadingSpace });
  }

  protected check(id: number): void {
    if (!Number.isInteger(id) || id < 0 || id >= this.vocabSize) {
      throw new TokenizerError(`token id ${id} is outside the vocabulary of ${this.vocabSize}`);
    }
  }
}

function anyOf(tokens: readonly string[]): RegExp | undefined {
  if (tokens.length === 0) return undefined;
  const escaped = [...tokens].sort((a, b) => b.length - a.length).map((t) =>
    t.replace(/[.*+?^${}()|[\]\\/-]/g, "\\$&")
  );
  return new RegExp(escaped.join("|"), "g");
}
