import { basename } from "node:path";
import { BpeTokenizer } from "./bpe.ts";
import { ChatTemplate } from "./chat_template.ts";
import { describeModel } from "./description.ts";
import type { ModelDescription } from "./description.ts";
import { TokenizerError } from "./errors.ts";
import { readGguf } from "./gguf.ts";
import type { GgufFile } from "./gguf.ts";
import { Metadata } from "./metadata.ts";
import { SpmTokenizer } from "./spm.ts";
import { StreamDecoder } from "./stream_decoder.ts";
import { TokenType } from "./tokenizer.ts";
import type { Tokenizer } from "./tokenizer.ts";

/** A model file with all that can be known without its weights. */
export interface LoadedModel {
  readonly path: string;
  /** The file's name without its ending. */
  readonly id: string;
  readonly gguf: GgufFile;
  readonly description: ModelDescription;
  readonly tokenizer: Tokenizer;
  readonly chatTemplate: ChatTemplate;
}

/** Names of tokens that end a turn, in files that only name one end token. */
const END_NAMES = [
  "<|eot_id|>",
  "<|im_end|>",
  "<|end|>",
  "<end_of_turn>",
  "<|endoftext|>",
  "<|eom_id|>",
  "</s>",
  "<EOT>",
];

/**
 * The tokenizer that a GGUF describes.
 *
 * @throws {TokenizerError} when there is none, or one that is not supported.
 */
export function tokenizerOf(gguf: GgufFile): Tokenizer {
  const m = new Metadata(gguf);
  const model = m.string("tokenizer.ggml.model");
  const tokens = m.strings("tokenizer.ggml.tokens");
  if (model === undefined || tokens === undefined) throw new TokenizerError("the file has no vocabulary");
  const perToken = (key: string, values: readonly number[] | undefined) => {
    if (values !== undefined && values.length !== tokens.length) {
      throw new TokenizerError(`${key} has ${values.length} entries for ${tokens.length} tokens`);
    }
    return values;
  };
  const types = perToken("tokenizer.ggml.token_type", m.numbers("tokenizer.ggml.token_type")) ??
    tokens.map(() => TokenType.normal);
  const id = (name: string) => {
    const value = m.integer(`tokenizer.ggml.${name}_token_id`);
    if (value !== undefined && value >= tokens.length) {
      throw new TokenizerError(
        `tokenizer.ggml.${name}_token_id ${value} is outside the vocabulary of ${tokens.length}`,
      );
    }
    return value;
  };
  const spm = model === "llama";
  const eosId = id("eos") ?? (spm ? 2 : undefined);
  const ends = END_NAMES.map((name) => tokens.indexOf(name)).filter((i) => i >= 0 && types[i] === TokenType.control);
  const eosIds = new Set([eosId, id("eot"), id("eom"), ...ends].filter((i) => i !== undefined));
  const vocabulary = {
    tokens,
    types,
    scores: perToken("tokenizer.ggml.scores", m.numbers("tokenizer.ggml.scores")),
    merges: m.strings("tokenizer.ggml.merges"),
    pre: m.string("tokenizer.ggml.pre") ?? "default",
    bosId: id("bos") ?? (spm ? 1 : undefined),
    eosId,
    unknownId: id("unknown") ?? (spm ? 0 : undefined),
    eosIds,
    addBos: m.boolean("tokenizer.ggml.add_bos_token") ?? spm,
    addEos: m.boolean("tokenizer.ggml.add_eos_token") ?? false,
    addSpacePrefix: m.boolean("tokenizer.ggml.add_space_prefix") ?? spm,
  };
  if (spm) return new SpmTokenizer(vocabulary);
  if (model === "gpt2") return new BpeTokenizer(vocabulary);
  throw new TokenizerError(
    `tokenizer.ggml.model is ${JSON.stringify(model)}; supported are llama (SPM) and gpt2 (BPE)`,
  );
}

/** Stands in for the tokenizer of a file that has none: it fails when it is asked for text. */
class MissingTokenizer implements Tokenizer {
  readonly eosIds: ReadonlySet<number> = new Set();
  readonly vocabSize: number;
  readonly #error: TokenizerError;

  constructor(vocabSize: number, error: TokenizerError) {
    this.vocabSize = vocabSize;
    this.#error = error;
  }
  encode(): number[] {
    throw this.#error;
  }
  decode(): string {
    throw this.#error;
  }
  tokenBytes(): Uint8Array {
    throw this.#error;
  }
  tokenText(id: number): string {
    return `[${id}]`;
  }
  isSpecial(): boolean {
    return true; // so that streams of ids, with no text, work
  }
  stream(): StreamDecoder {
    return new StreamDecoder(this, { skipSpecial: true, stripLeadingSpace: false });
  }
}

/**
 * Reads a model file: everything but its weights.
 *
 * @throws {GgufError} when it is no valid GGUF.
 * @throws {UnsupportedModelError} when Lutra cannot run it.
 */
export function loadModel(path: string): Promise<LoadedModel> {
  return Promise.resolve().then(() => {
    const gguf = readGguf(path);
    const description = describeModel(gguf);
    let tokenizer: Tokenizer;
    try {
      tokenizer = tokenizerOf(gguf);
    } catch (error) {
      if (!(error instanceof TokenizerError) || gguf.metadata.has("tokenizer.ggml.tokens")) throw error;
      tokenizer = new MissingTokenizer(description.hyper.vocab, error);
    }
    const metadata = new Metadata(gguf);
    const token = (id: number | undefined) => id === undefined ? undefined : tokenizer.tokenText(id);
    const chatTemplate = new ChatTemplate(metadata.string("tokenizer.chat_template"), {
      bos: token(tokenizer.bosId),
      eos: token([...tokenizer.eosIds][0]),
    });
    return { path, id: basename(path).replace(/\.gguf$/, ""), gguf, description, tokenizer, chatTemplate };
  });
}
