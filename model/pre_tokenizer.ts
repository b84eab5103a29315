import { TokenizerError } from "./errors.ts";

/** How a byte-level BPE splits a text into words. */
export interface PreTokenizer {
  /** The words; joined they are the text. */
  split(text: string): string[];
  /** Whether a word that is a token is taken whole, whatever the merges say. */
  readonly ignoreMerges: boolean;
}

const GPT2 = /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+/gu;
const LLAMA3 =
  /(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+/gu;
const QWEN2 =
  /(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+/gu;
const DIGIT = /\p{N}/gu;

/** Each pattern splits what the one before left; what a pattern does not match stays whole. */
const PATTERNS: Readonly<Record<string, { patterns: readonly RegExp[]; ignoreMerges?: boolean }>> = {
  "gpt-2": { patterns: [GPT2] },
  "default": { patterns: [/[\p{P}$+<=>^~|]+/gu, GPT2, /\p{N}+/gu, /[0-9][0-9][0-9]/g] },
  "llama-bpe": { patterns: [LLAMA3], ignoreMerges: true },
  "qwen2": { patterns: [QWEN2] },
  "falcon": { patterns: [/[\p{P}$+<=>^~|`]+/gu, GPT2, /[0-9][0-9][0-9]/g] },
  "starcoder": { patterns: [DIGIT, GPT2] },
};
const ALIASES: Readonly<Record<string, string>> = {
  "llama3": "llama-bpe",
  "llama-v3": "llama-bpe",
  "falcon3": "llama-bpe",
  "phi-2": "gpt-2",
  "mpt": "gpt-2",
  "olmo": "gpt-2",
  "jina-es": "gpt-2",
  "jina-de": "gpt-2",
  "smollm": "starcoder",
  "refact": "starcoder",
  "command-r": "starcoder",
  "codeshell": "starcoder",
  "deepseek-r1-qwen": "qwen2",
  "stablelm2": "qwen2",
};

function splitAll(texts: readonly string[], pattern: RegExp): string[] {
  const out: string[] = [];
  for (const text of texts) {
    let at = 0;
    for (const match of text.matchAll(pattern)) {
      if (match.index > at) out.push(text.slice(at, match.index));
      out.push(match[0]);
      at = match.index + match[0].length;
    }
    if (at < text.length) out.push(text.slice(at));
  }
  return out;
}

/**
 * The pre-tokenizer that `tokenizer.ggml.pre` names, with llama.cpp's patterns.
 *
 * @throws {TokenizerError} naming those there are.
 */
export function preTokenizer(name: string): PreTokenizer {
  const known = PATTERNS[ALIASES[name] ?? name];
  if (known === undefined) {
    const names = [...Object.keys(PATTERNS), ...Object.keys(ALIASES)].sort().join(", ");
    throw new TokenizerError(
      `tokenizer.ggml.pre is ${JSON.stringify(name)}, which is not supported; there are ${names}`,
    );
  }
  return {
    split: (text) => known.patterns.reduce<string[]>(splitAll, text === "" ? [] : [text]),
    ignoreMerges: known.ignoreMerges ?? false,
  };
}
