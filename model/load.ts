import { basename } from "node:path";
import { ChatTemplate } from "./chat_template.ts";
import { describeModel } from "./description.ts";
import type { ModelDescription } from "./description.ts";
import { ChatTemplateError, TokenizerError } from "./errors.ts";
import { readGguf } from "./gguf.ts";
import type { GgufFile } from "./gguf.ts";
import { isModelFolder, readModelFolder } from "./hugging_face.ts";
import { Metadata } from "./metadata.ts";
import { StreamDecoder } from "./stream_decoder.ts";
import type { Tokenizer } from "./tokenizer.ts";
import { tokenizerOf } from "./vocabulary.ts";

/** A model with all that can be known without its weights. */
export interface LoadedModel {
  /** The file with the weights. */
  readonly path: string;
  /** Names of further files with weights in the same folder. */
  readonly files: readonly string[];
  /** The name of the file, without its ending, or folder. */
  readonly id: string;
  readonly gguf: GgufFile;
  readonly description: ModelDescription;
  readonly tokenizer: Tokenizer;
  readonly chatTemplate: ChatTemplate;
  /** What the user should know: what the file lacks, and what stands in for it. */
  readonly warnings: readonly string[];
}

/** Stands in for the tokenizer of a file that has none: it fails when it is asked for text. */
class MissingTokenizer implements Tokenizer {
  readonly eosIds: ReadonlySet<number> = new Set();
  readonly warnings: readonly string[];
  readonly vocabSize: number;
  readonly #error: TokenizerError;

  constructor(vocabSize: number, error: TokenizerError) {
    this.vocabSize = vocabSize;
    this.#error = error;
    this.warnings = [`${error.message}: it takes and gives token ids only`];
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
 * Reads a model, a GGUF file or a folder with safetensors: everything but its weights.
 *
 * @throws {GgufError} when it is no valid GGUF.
 * @throws {UnsupportedModelError} when Lutra cannot run it.
 */
export function loadModel(path: string): Promise<LoadedModel> {
  return Promise.resolve().then(() => {
    const folder = isModelFolder(path) ? readModelFolder(path) : undefined;
    const gguf = folder?.gguf ?? readGguf(path);
    const description = describeModel(gguf);
    let tokenizer: Tokenizer;
    try {
      tokenizer = folder?.tokenizer ?? tokenizerOf(gguf);
    } catch (error) {
      if (!(error instanceof TokenizerError) || gguf.metadata.has("tokenizer.ggml.tokens")) throw error;
      tokenizer = new MissingTokenizer(description.hyper.vocab, error);
    }
    const metadata = new Metadata(gguf);
    const token = (id: number | undefined) => id === undefined ? undefined : tokenizer.tokenText(id);
    const tokens = { bos: token(tokenizer.bosId), eos: token([...tokenizer.eosIds][0]) };
    const warnings = [...tokenizer.warnings, ...folder?.warnings ?? []];
    let chatTemplate: ChatTemplate;
    try {
      chatTemplate = new ChatTemplate(metadata.string("tokenizer.chat_template"), tokens);
    } catch (error) {
      if (!(error instanceof ChatTemplateError)) throw error;
      warnings.push(`${error.message}: the model counts as one without`);
      chatTemplate = new ChatTemplate(undefined, tokens);
    }
    return {
      path: gguf.path,
      files: gguf.files ?? [],
      id: basename(path).replace(/(-00001-of-\d{5})?\.gguf$/, ""),
      gguf,
      description,
      tokenizer,
      chatTemplate,
      warnings,
    };
  });
}
