/** What a {@linkcode StreamDecoder} needs of a tokenizer. */
export interface TokenBytes {
  tokenBytes(id: number): Uint8Array;
  tokenText(id: number): string;
  isSpecial(id: number): boolean;
}

/**
 * Decodes token by token. Bytes wait until their character is complete, so that a piece never ends within one; bytes that
 * cannot become a character turn into U+FFFD. All pieces joined are the text.
 */
export class StreamDecoder {
  readonly #tokens: TokenBytes;
  readonly #skipSpecial: boolean;
  readonly #utf8 = new TextDecoder("utf-8", { ignoreBOM: true });
  readonly #text = new TextEncoder();
  #stripSpace: boolean;

  constructor(tokens: TokenBytes, options: { skipSpecial: boolean; stripLeadingSpace: boolean }) {
    this.#tokens = tokens;
    this.#skipSpecial = options.skipSpecial;
    this.#stripSpace = options.stripLeadingSpace;
  }

  /** Takes a token and returns the text that is complete with it. */
  push(id: number): string {
    const special = this.#tokens.isSpecial(id);
    if (special && this.#skipSpecial) return "";
    let bytes = special ? this.#text.encode(this.#tokens.tokenText(id)) : this.#tokens.tokenBytes(id);
    if (this.#stripSpace && bytes.length > 0 && !special) {
      if (bytes[0] === 0x20) bytes = bytes.subarray(1);
      this.#stripSpace = false;
    }
    return this.#utf8.decode(bytes, { stream: true });
  }

  /** Ends the text: bytes of an incomplete character become U+FFFD. */
  flush(): string {
    return this.#utf8.decode();
  }
}
