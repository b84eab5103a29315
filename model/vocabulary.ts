import { BpeTokenizer } from "./bpe.ts";
import { TokenizerError } from "./errors.ts";
import type { GgufFile } from "./gguf.ts";
import { Metadata } from "./metadata.ts";
import { preTokenizer } from "./pre_tokenizer.ts";
import { SpmTokenizer } from "./spm.ts";
import { TokenType } from "./tokenizer.ts";
import type { Tokenizer, Vocabulary } from "./tokenizer.ts";
import { UnigramTokenizer } from "./unigram.ts";

/** Names of tokens that end a turn, in files that only name one end token (llama.cpp's list). */
const END_NAMES: ReadonlySet<string> = new Set([
  ..."<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s>".split(
    " ",
  ),
  ..."<|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response>".split(" "),
  ..."<\uff5cend\u2581of\u2581sentence\uff5c> [e~[ <|fim_pad|> <|fim_repo|> <|file_sep|>".split(" "),
]);

/**
 * The tokens that end an answer. In files that say `<|return|>` and `<|call|>` (gpt-oss) or `<|calls|>` and `<|flush|>`
 * (Solar), `<|end|>` ends a part of one only; where `<|tool_response>` is, `</s>` is plain HTML (Gemma 4).
 *
 * @param declared What the model itself names.
 */
export function endTokens(
  tokens: readonly string[],
  types: readonly number[],
  declared: readonly (number | undefined)[],
): Set<number> {
  const named = new Map<string, number>();
  tokens.forEach((token, id) => {
    if (END_NAMES.has(token) && types[id] === TokenType.control) named.set(token, id);
  });
  const has = (...names: string[]) => names.every((name) => named.has(name));
  if (has("<|return|>", "<|call|>") || has("<|calls|>", "<|flush|>")) named.delete("<|end|>");
  if (has("<|tool_response>")) named.delete("</s>");
  return new Set([...declared, ...named.values()].filter((id) => id !== undefined));
}

/** What a `tokenizer.ggml.model` implies where the file does not say. */
const MODELS: Readonly<
  Record<string, { bos?: number; eos?: number; unknown?: number; addBos?: boolean; addEos?: boolean; spaces?: boolean }>
> = {
  "llama": { bos: 1, eos: 2, unknown: 0, addBos: true, spaces: true },
  "gpt2": {},
  "gemma4": {},
  "t5": { eos: 1, unknown: 2, addEos: true },
};

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
  const defaults = Object.hasOwn(MODELS, model) ? MODELS[model] : undefined;
  if (defaults === undefined) {
    throw new TokenizerError(
      `tokenizer.ggml.model is ${
        JSON.stringify(model)
      }; supported are llama (SPM), gpt2 and gemma4 (BPE) and t5 (Unigram)`,
    );
  }
  const perToken = (key: string, values: readonly number[] | undefined) => {
    if (values !== undefined && values.length !== tokens.length) {
      throw new TokenizerError(`${key} has ${values.length} entries for ${tokens.length} tokens`);
    }
    return values;
  };
  const types = typesOf(
    tokens,
    perToken("tokenizer.ggml.token_type", m.numbers("tokenizer.ggml.token_type")) ?? tokens.map(() => TokenType.normal),
  );
  const id = (name: string) => {
    const value = m.integer(`tokenizer.ggml.${name}_token_id`);
    if (value !== undefined && value >= tokens.length) {
      throw new TokenizerError(
        `tokenizer.ggml.${name}_token_id ${value} is outside the vocabulary of ${tokens.length}`,
      );
    }
    return value;
  };
  const bpe = model === "gpt2" || model === "gemma4";
  const preName = model === "gemma4" ? "gemma4" : m.string("tokenizer.ggml.pre") ?? "default";
  let pre = preTokenizer(preName);
  if (preName === "whitespace" && m.boolean("tokenizer.ggml.normalizer.lowercase") === true) {
    const { split } = pre;
    pre = { ...pre, split: (text) => split(text.toLowerCase()) };
  }
  const eosId = id("eos") ?? defaults.eos;
  const vocabulary: Vocabulary = {
    tokens,
    types,
    scores: perToken("tokenizer.ggml.scores", m.numbers("tokenizer.ggml.scores")),
    merges: m.strings("tokenizer.ggml.merges"),
    bosId: id("bos") ?? defaults.bos,
    eosId,
    unknownId: id("unknown") ?? defaults.unknown,
    eosIds: endTokens(tokens, types, [eosId, id("eot"), id("eom")]),
    addBos: m.boolean("tokenizer.ggml.add_bos_token") ?? (bpe ? pre.addBos : defaults.addBos ?? false),
    addEos: m.boolean("tokenizer.ggml.add_eos_token") ?? defaults.addEos ?? false,
    addSpacePrefix: m.boolean("tokenizer.ggml.add_space_prefix") ?? defaults.spaces ?? false,
    keepsFirstSpace: false,
    removeExtraSpaces: m.boolean("tokenizer.ggml.remove_extra_whitespaces") ?? false,
    charsMap: m.bytes("tokenizer.ggml.precompiled_charsmap"),
    strip: { left: new Set(), right: strippedRight(m.string("general.name") ?? "", tokens, types) },
  };
  if (bpe) return new BpeTokenizer(vocabulary, pre);
  return model === "llama" ? new SpmTokenizer(vocabulary) : new UnigramTokenizer(vocabulary);
}

/** Tokens that only look like control tokens are ones, whatever the file says; gpt-oss's channel marks are text. */
function typesOf(tokens: readonly string[], types: readonly number[]): readonly number[] {
  const { control, normal, userDefined } = TokenType;
  const marks = ["<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"];
  return types.map((type, id) => {
    const token = tokens[id]!;
    if (marks.includes(token)) return userDefined;
    const looks = token.startsWith("<|") && token.endsWith("|>") && END_NAMES.has(token);
    return looks && (type === normal || type === userDefined) ? control : type;
  });
}

/** GGUF has no key for it: Phi 3's special tokens swallow the white space behind them, but for these. */
function strippedRight(name: string, tokens: readonly string[], types: readonly number[]): Set<number> {
  const out = new Set<number>();
  if (!/phi-?3/i.test(name)) return out;
  const { control, userDefined, unknown } = TokenType;
  tokens.forEach((token, id) => {
    const special = token === "</s>" || [control, userDefined, unknown].some((type) => type === types[id]);
    if (special && !["<unk>", "<s>", "<|endoftext|>"].includes(token)) out.add(id);
  });
  return out;
}
