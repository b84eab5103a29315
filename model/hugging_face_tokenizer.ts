/**
 * The tokenizer of a `tokenizer.json`, as Hugging Face's library writes it: BPE over bytes or characters, and Unigram.
 *
 * The file says how to split by regular expressions of another engine, and it may be hostile: a pattern can take exponential
 * time. So none of them is run. Those of known models are recognised and their pre-tokenizer (see `pre_tokenizer.ts`) is used;
 * for others `default` stands in, with a warning.
 *
 * @module
 */
import { z } from "zod";
import { BpeTokenizer } from "./bpe.ts";
import { TokenizerError } from "./errors.ts";
import { characterPreTokenizer, preTokenizer } from "./pre_tokenizer.ts";
import type { PreTokenizer } from "./pre_tokenizer.ts";
import { TokenType } from "./tokenizer.ts";
import type { Tokenizer, Vocabulary } from "./tokenizer.ts";
import { UnigramTokenizer } from "./unigram.ts";
import { endTokens } from "./vocabulary.ts";

const MAX_TOKENS = 1 << 22;
const tokenId = z.number().int().nonnegative().lt(MAX_TOKENS);

/** A part of the pipeline: a `type`, and fields that depend on it. */
const part = z.looseObject({ type: z.string() });
type Part = z.infer<typeof part>;
const fileSchema = z.looseObject({
  added_tokens: z.array(z.looseObject({
    id: tokenId,
    content: z.string(),
    special: z.boolean().optional(),
    lstrip: z.boolean().optional(),
    rstrip: z.boolean().optional(),
  })).nullish(),
  normalizer: part.nullish(),
  pre_tokenizer: part.nullish(),
  post_processor: part.nullish(),
  model: z.looseObject({
    type: z.string().optional(), // old files leave BPE unsaid
    vocab: z.unknown(),
    merges: z.array(z.union([z.string(), z.tuple([z.string(), z.string()])])).optional(),
    unk_token: z.string().nullish(),
    unk_id: tokenId.nullish(),
    ignore_merges: z.boolean().nullish(),
    byte_fallback: z.boolean().nullish(),
  }),
});
const named = z.union([z.string(), z.looseObject({ content: z.string() }).transform((token) => token.content)]);
const configSchema = z.looseObject({
  bos_token: named.nullish(),
  eos_token: named.nullish(),
  add_bos_token: z.boolean().nullish(),
  add_eos_token: z.boolean().nullish(),
});

/** What the files beside a `tokenizer.json` say of it. */
export interface TokenizerSettings {
  /** `tokenizer_config.json`. */
  config?: unknown;
  /** Ids that end an answer, by `generation_config.json` or `config.json`. */
  eosIds?: readonly number[];
}

/**
 * The tokenizer of a parsed `tokenizer.json`.
 *
 * @throws {TokenizerError} when it is malformed or of a kind that is not supported.
 */
export function tokenizerOfJson(json: unknown, settings: TokenizerSettings = {}): Tokenizer {
  const file = checked(fileSchema, json, "tokenizer.json");
  const config = checked(configSchema, settings.config ?? {}, "tokenizer_config.json");
  const { model } = file;
  const unigram = model.type === "Unigram";
  if (!unigram && model.type !== "BPE" && model.type !== undefined) {
    throw new TokenizerError(
      `tokenizer.json has a model of type ${JSON.stringify(model.type)}; there are BPE and Unigram`,
    );
  }
  const entries: [string, number, number][] = unigram ? scored(model.vocab) : numbered(model.vocab);
  const added = file.added_tokens ?? [];
  const size = Math.max(0, ...[entries.map(([, id]) => id), added.map(({ id }) => id)].map(greatest)) + 1;
  const tokens: string[] = new Array(size).fill("");
  const types: number[] = new Array(size).fill(TokenType.unused);
  const scores: number[] = new Array(size).fill(0);
  for (const [token, id, score] of entries) {
    tokens[id] = token;
    types[id] = model.byte_fallback === true && /^<0x[0-9A-F]{2}>$/.test(token) ? TokenType.byte : TokenType.normal;
    scores[id] = score;
  }
  const strip = { left: new Set<number>(), right: new Set<number>() };
  for (const { id, content, special, lstrip, rstrip } of added) {
    tokens[id] = content;
    types[id] = special === true ? TokenType.control : TokenType.userDefined;
    if (lstrip === true) strip.left.add(id);
    if (rstrip === true) strip.right.add(id);
  }
  const idOf = (token: string | null | undefined) => {
    const id = token === null || token === undefined ? -1 : tokens.indexOf(token);
    return id < 0 ? undefined : id;
  };
  const unknownId = unigram ? model.unk_id ?? undefined : idOf(model.unk_token);
  if (unknownId !== undefined && types[unknownId] === TokenType.normal) {
    types[unknownId] = TokenType.unknown;
  }
  if (unknownId !== undefined && unknownId >= size) {
    throw new TokenizerError(`tokenizer.json's unk_id ${unknownId} is outside the vocabulary of ${size}`);
  }
  const eosId = idOf(config.eos_token);
  const around = templateOf(file.post_processor ?? undefined);
  const steps = flatten(file.normalizer, "normalizers");
  const splits = flatten(file.pre_tokenizer, "pretokenizers");
  const metaspace = splits.find(({ type }) => type === "Metaspace");
  const base: Vocabulary = {
    tokens,
    types,
    scores: unigram ? scores : undefined,
    merges: model.merges?.map((merge) => typeof merge === "string" ? merge : merge.join(" ")),
    bosId: idOf(config.bos_token) ?? idOf(around.before),
    eosId: eosId ?? idOf(around.after),
    unknownId,
    eosIds: endTokens(tokens, types, [eosId, ...(settings.eosIds ?? []).filter((id) => id < size)]),
    addBos: around.known ? around.before !== undefined : config.add_bos_token ?? false,
    addEos: around.known ? around.after !== undefined : config.add_eos_token ?? false,
    addSpacePrefix: steps.some(({ type }) => type === "Prepend") ||
      (metaspace !== undefined && metaspace["prepend_scheme"] !== "never" && metaspace["add_prefix_space"] !== false),
    keepsFirstSpace: metaspace !== undefined,
    removeExtraSpaces: steps.some(({ type, pattern }) =>
      type === "Replace" && JSON.stringify(pattern) === JSON.stringify({ Regex: " {2,}" })
    ),
    charsMap: charsMapOf(steps),
    strip,
  };
  if (unigram) return new UnigramTokenizer(base);
  const ignoreMerges = model.ignore_merges === true;
  if (splits.some(({ type }) => type === "ByteLevel")) {
    return new BpeTokenizer(base, { ...splitterOf(splits), ignoreMerges });
  }
  const spaced = metaspace !== undefined || steps.some((s) => s.type === "Replace" && s["content"] === "\u2581");
  if (!spaced) throw new TokenizerError("tokenizer.json splits neither by bytes (ByteLevel) nor by ▁ (Metaspace)");
  return new BpeTokenizer(base, { ...characterPreTokenizer, ignoreMerges });
}

function checked<T extends z.ZodType>(schema: T, value: unknown, file: string): z.infer<T> {
  const parsed = schema.safeParse(value);
  if (parsed.success) return parsed.data;
  const [issue] = parsed.error.issues;
  throw new TokenizerError(`${file}: ${issue?.path.join(".") || "it"} is wrong: ${issue?.message}`, {
    cause: parsed.error,
  });
}

function greatest(ids: readonly number[]): number {
  return ids.reduce((a, b) => Math.max(a, b), 0);
}

function numbered(vocab: unknown): [string, number, number][] {
  const checkedVocab = checked(z.record(z.string(), tokenId), vocab, "tokenizer.json's model.vocab");
  return Object.entries(checkedVocab).map(([token, id]) => [token, id, 0]);
}

function scored(vocab: unknown): [string, number, number][] {
  const pairs = checked(
    z.array(z.tuple([z.string(), z.number()])).max(MAX_TOKENS),
    vocab,
    "tokenizer.json's model.vocab",
  );
  return pairs.map(([token, score], id) => [token, id, score]);
}

/** A sequence's parts, or the one part. */
function flatten(whole: Part | null | undefined, key: "normalizers" | "pretokenizers"): Part[] {
  if (whole === null || whole === undefined) return [];
  if (whole.type !== "Sequence") return [whole];
  return checked(z.array(part).max(64), whole[key], `tokenizer.json's ${key}`);
}

function charsMapOf(steps: readonly Part[]): Uint8Array | undefined {
  const text = steps.find(({ type }) => type === "Precompiled")?.["precompiled_charsmap"];
  if (typeof text !== "string" || text === "") return undefined;
  try {
    return Uint8Array.fromBase64(text);
  } catch (cause) {
    throw new TokenizerError("tokenizer.json's precompiled_charsmap is no base64", { cause });
  }
}

/** The tokens that the template puts around a text. */
function templateOf(processor: Part | undefined): { known: boolean; before?: string; after?: string } {
  const all = processor?.type === "Sequence" && Array.isArray(processor["processors"])
    ? processor["processors"] as unknown[]
    : [processor];
  const piece = z.union([
    z.object({ SpecialToken: z.looseObject({ id: z.string() }) }),
    z.object({ Sequence: z.unknown() }),
  ]);
  const schema = z.looseObject({ type: z.literal("TemplateProcessing"), single: z.array(piece) });
  for (const one of all) {
    const parsed = schema.safeParse(one);
    if (!parsed.success) continue;
    const { single } = parsed.data;
    const at = single.findIndex((p) => "Sequence" in p);
    const special = (p: z.infer<typeof piece> | undefined) =>
      p !== undefined && "SpecialToken" in p ? p.SpecialToken.id : undefined;
    const [before, after] = [at > 0 ? special(single[at - 1]) : undefined, special(single[at + 1])];
    return { known: true, ...(before === undefined ? {} : { before }), ...(after === undefined ? {} : { after }) };
  }
  return { known: false };
}

/** How known models split, by what their files say, and the name that GGUF has for it. */
const KNOWN: ReadonlyMap<string, string> = (() => {
  const english = "(?i:'s|'t|'re|'ve|'m|'ll|'d)";
  const rest = String.raw` ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`;
  const words = String.raw`[^\r\n\p{L}\p{N}]?\p{L}+`;
  const [upper, lower] = [String.raw`[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]`, String.raw`[\p{Ll}\p{Lm}\p{Lo}\p{M}]`];
  const head = String.raw`[^\r\n\p{L}\p{N}]?`;
  const cased = (after: string) => `${head}${upper}*${lower}+${after}|${head}${upper}+${lower}*${after}`;
  const o200k = rest.replace(String.raw`[\r\n]*`, String.raw`[\r\n/]*`);
  const punctuation = "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+";
  return new Map([
    ["bytes", "gpt-2"],
    ["digits,bytes", "starcoder"],
    [String.raw`split ${english}|${words}|\p{N}{1,3}|${rest}`, "llama-bpe"],
    [String.raw`split ${english}|${words}|\p{N}|${rest}`, "qwen2"],
    [String.raw`split ${cased(`${english}?`)}|\p{N}{1,3}|${o200k}`, "gpt-4o"],
    [String.raw`split ${cased("")}|\p{N}|${o200k}`, "tekken"],
    [
      [
        String.raw`split \p{N}{1,3}`,
        "split [\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        String
          .raw`split ${punctuation}|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`,
      ].join(","),
      "deepseek-v3",
    ],
  ]);
})();

function splitterOf(splits: readonly Part[]): PreTokenizer {
  const steps = splits.flatMap((step): string[] => {
    switch (step.type) {
      case "ByteLevel":
        return step["use_regex"] === false ? [] : ["bytes"];
      case "Digits":
        return step["individual_digits"] === true ? ["digits"] : ["runs of digits"];
      case "Split": {
        const { pattern } = step as { pattern?: { Regex?: unknown } };
        return [`split ${typeof pattern?.Regex === "string" ? pattern.Regex : JSON.stringify(pattern)}`];
      }
      default:
        return [step.type];
    }
  });
  const name = KNOWN.get(steps.join(","));
  if (name !== undefined) return preTokenizer(name);
  return {
    ...preTokenizer("default"),
    warning:
      `how tokenizer.json splits texts (${steps.join(", ").slice(0, 200)}) is unknown; they are split as "default" ` +
      "does, which may cost quality",
  };
}
