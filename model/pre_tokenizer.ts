/** How a BPE splits a text into words. */
export interface PreTokenizer {
  /** The words; joined they are the text, but for the white space that `whitespace` drops. */
  split(text: string): string[];
  /** Whether a word that is a token is taken whole, whatever the merges say. */
  readonly ignoreMerges: boolean;
  /** Whether merges work on bytes in GPT-2's alphabet; otherwise on characters, with `▁` for spaces, as SentencePiece's do. */
  readonly byteLevel: boolean;
  /** Whether BOS goes before a text when the file does not say. */
  readonly addBos: boolean;
  /** What the user should know: the name was unknown, and what stands in for it. */
  readonly warning?: string;
}

/** A step of splitting: a pattern, or what no backtracking pattern does in linear time. */
type Step = string | ((text: string) => string[]);

interface Recipe {
  /** Each splits what the one before left; what a pattern does not match stays whole. */
  readonly steps: readonly Step[];
  readonly names: readonly string[];
  readonly ignoreMerges?: boolean;
  readonly addBos?: boolean;
  readonly byteLevel?: boolean;
}

// The pieces that most patterns share. `\s` and `\S` are replaced below; `(?i:…)` needs V8 12.5.
const ENGLISH = String.raw`(?i:'s|'t|'re|'ve|'m|'ll|'d)`;
const LETTERS = String.raw`[^\r\n\p{L}\p{N}]?\p{L}+`;
const SYMBOLS = String.raw` ?[^\s\p{L}\p{N}]+[\r\n]*`;
const SPACES = String.raw`\s*[\r\n]+|\s+(?!\S)|\s+`;
const GPT2 = String.raw`'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`;
const LLAMA3 = String.raw`${ENGLISH}|${LETTERS}|\p{N}{1,3}|${SYMBOLS}|${SPACES}`;
const QWEN2 = String.raw`${ENGLISH}|${LETTERS}|\p{N}|${SYMBOLS}|${SPACES}`;
/** Words of one case each (`iPhone` is `i` and `Phone`), with what may follow them. */
const cased = (after: string) => {
  const [head, upper, lower] = [
    String.raw`[^\r\n\p{L}\p{N}]?`,
    String.raw`[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]`,
    String.raw`[\p{Ll}\p{Lm}\p{Lo}\p{M}]`,
  ];
  return `${head}${upper}*${lower}+${after}|${head}${upper}+${lower}*${after}`;
};
const GPT4O_REST = String.raw` ?[^\s\p{L}\p{N}]+[\r\n/]*|${SPACES}`;
const GPT4O = String.raw`${cased(`${ENGLISH}?`)}|\p{N}{1,3}|${GPT4O_REST}`;
const DEEPSEEK3 = String.raw`[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_${"`"}{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+`;
const BLOOM = String.raw` ?[^(\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+`;
const DIGIT = String.raw`\p{N}`;
const LINES = String.raw`[^\n]+|\n+`;

/** A class of the code points listed in hexadecimal. */
const among = (ranges: string) =>
  `[${ranges.split(/\s+/).map((r) => r.split("-").map((end) => `\\u{${end}}`).join("-")).join("")}]`;
/** Letters with case, as DeepSeek-LLM lists them. */
const DEEPSEEK_LETTERS = among(
  `41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376-377 37B-37D 37F 386 388-38A 38C 38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556
  10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D
  1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126
  2128 212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183-2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2-2CF3 A640-A66D A680-A69B A722-A76F A771-A787
  A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943`,
);
const DEEPSEEK_PUNCTUATION = among("21-2F 3A-7E FF01-FF0F FF1A-FF5E 2018-201F 3000-3002");
const DEEPSEEK_SCRIPTS = among("4E00-9FA5 0800-4E00 AC00-D7FF");
const IDEOGRAPHS = among("4E00-9FA5 3040-309F 30A0-30FF");
const AFMOE_SCRIPTS = among(
  `4E00-9FFF 3400-4DBF F900-FAFF 3040-309F 30A0-30FF FF65-FF9F 2F00-2FDF 0E40-0E7F 0E80-0EFF 1780-17FF 1000-109F AA60-AA7F
  A9E0-A9FF AC00-D7AF 1100-11FF`,
);
const YOUTU_SCRIPTS = [
  "AC00-D7A3 3131-318E",
  "FF01 2026 201C-201D 2018-2019 2014 FF1A FF1B FF0C 3001-303F FE30-FE4F",
  "3105-312F",
  "4E00-9FA5 3040-309F 30A0-30FF",
].map((ranges) => `${among(ranges)}+`).join("|");

/**
 * Splits runs of digits into threes counted from their end, as `\d{1,3}(?=(?:\d{3})*…)` does in quadratic time.
 *
 * @param digit What is a digit.
 * @param unlessBefore A run before this stays whole.
 */
function threes(digit: string, unlessBefore?: string): (text: string) => string[] {
  // The look-behind lets a run be tried once, not from each of its digits.
  const end = unlessBefore === undefined ? "" : `(?!${digit}|${unlessBefore})`;
  const run = new RegExp(`(?<!${digit})${digit}+${end}`, "gu");
  return (text) =>
    splitBy(text, run, (digits) => {
      const all = [...digits]; // a digit may be a pair of surrogates
      const out = all.length % 3 === 0 ? [] : [all.slice(0, all.length % 3).join("")];
      for (let at = all.length % 3; at < all.length; at += 3) out.push(all.slice(at, at + 3).join(""));
      return out;
    });
}

/** Jais 2 takes spaces by powers of two: what Llama 3 leaves as one word without a newline at its end. */
function spacesByPowers(text: string): string[] {
  if (!/^\p{White_Space}*[^\P{White_Space}\r\n]$/u.test(text)) return [text];
  const out: string[] = [];
  for (let at = 0; at < text.length;) {
    const left = text.length - at;
    const size = [512, 256, 128, 64, 32, 16, 8, 4].find((n) => n <= left) ?? Math.min(left, 2);
    out.push(text.slice(at, at += size));
  }
  return out;
}

/**
 * The pre-tokenizers of llama.cpp's list (`llama-vocab.cpp`). Where its pattern only comes near the one that the model was
 * trained with, since its engine knows no case or script of letters, this is the one of training.
 */
const RECIPES: readonly Recipe[] = [
  { names: ["default"], steps: [String.raw`[\p{P}$+<=>^~|]+`, GPT2, String.raw`\p{N}+`, "[0-9][0-9][0-9]"] },
  {
    names:
      "gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de jina-v1-en jina-v2-code roberta-bpe gigachat a.x-4.0 mellum \
modern-bert mpt olmo jais trillion granite-docling exaone4".split(" "),
    steps: [GPT2],
  },
  {
    names: "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano".split(" "),
    steps: [LLAMA3],
    ignoreMerges: true,
    addBos: true,
  },
  { names: ["dbrx", "smaug-bpe", "chatglm-bpe", "glm4"], steps: [LLAMA3] },
  { names: ["jais-2"], steps: [LLAMA3, spacesByPowers] },
  {
    names: "qwen2 deepseek-r1-qwen kormo f2llmv2 stablelm2 megrez hunyuan solar-open grok-2".split(" "),
    steps: [QWEN2],
  },
  {
    names: ["qwen35"],
    steps: [
      String.raw`${ENGLISH}|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|${SPACES}`,
    ],
  },
  { names: ["ufakzeka"], steps: [String.raw`${LETTERS}|\p{N}|${SYMBOLS}|${SPACES}`] },
  { names: ["laguna"], steps: [LINES, QWEN2] },
  {
    names: ["minicpm5"],
    steps: [String.raw`\p{N}{1,3}`, String.raw`${ENGLISH}|${LETTERS}|\p{N}+|${SYMBOLS}|${SPACES}`],
    ignoreMerges: true,
  },
  {
    names: ["seed-coder"],
    steps: [String.raw`${ENGLISH}|${LETTERS}|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|${SPACES}`],
  },
  {
    // Its possessive quantifiers give back nothing that the rest could match: plain ones do the same.
    names: ["bailingmoe", "bailingmoe2", "llada-moe"],
    steps: [
      String.raw`'(?i:[sdmt]|ll|ve|re)|${LETTERS}|\p{N}|${SYMBOLS}|\s*[\r\n]|\s+(?!\S)|\s+`,
    ],
  },
  {
    names: ["exaone-moe"],
    steps: [
      String
        .raw`${ENGLISH}|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+`,
    ],
  },
  { names: ["falcon"], steps: [String.raw`[\p{P}$+<=>^~|${"`"}]+`, GPT2, "[0-9][0-9][0-9]"] },
  {
    names: "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2".split(" "),
    steps: [DIGIT, GPT2],
  },
  {
    names: ["deepseek-llm"],
    steps: [
      "[\r\n]",
      String.raw`\s?${DEEPSEEK_LETTERS}+`,
      String.raw`\s?${DEEPSEEK_PUNCTUATION}+`,
      String.raw`(?<!\s)\s+$`, // `\s+$`, tried once a run
      `${DEEPSEEK_SCRIPTS}+`,
      String.raw`\p{N}+`,
    ],
  },
  {
    names: ["deepseek-coder"],
    steps: ["[\r\n]", String.raw`\s?\p{L}+`, String.raw`\s?\p{P}+`, `${DEEPSEEK_SCRIPTS}+`, DIGIT],
  },
  {
    names: ["deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"],
    steps: [
      String.raw`\p{N}{1,3}`,
      `${IDEOGRAPHS}+`,
      String.raw`${DEEPSEEK3}| ?[\p{P}\p{S}]+[\r\n]*|${SPACES}`,
    ],
  },
  {
    names: ["spark2_5"],
    steps: [
      String.raw`\p{N}{1,3}`,
      `${IDEOGRAPHS}+`,
      String.raw`${DEEPSEEK3}| ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+`,
      DIGIT,
    ],
  },
  {
    names: ["afmoe"],
    steps: [
      threes(DIGIT),
      `${AFMOE_SCRIPTS}+`,
      String.raw`${DEEPSEEK3}| ?[\p{P}\p{S}]+[\r\n]*|${SPACES}`,
    ],
  },
  {
    names: ["youtu"],
    steps: [YOUTU_SCRIPTS, String.raw`${cased(`${ENGLISH}?`)}|\p{N}|${GPT4O_REST}`],
    ignoreMerges: true,
  },
  { names: ["poro-chat", "bloom", "gpt3-finnish"], steps: [BLOOM] },
  { names: ["viking"], steps: [BLOOM, DIGIT] },
  {
    names: ["tekken"],
    steps: [String.raw`${cased("")}|\p{N}|${GPT4O_REST}`],
    ignoreMerges: true,
    addBos: true,
  },
  {
    names: ["chameleon"],
    steps: [
      "<sentinel:[0-9]+>",
      "IMGIMG[A-I]{1,4}Z",
      String.raw`[\t\n]|    |  `,
      DIGIT,
      String.raw`[\p{P}!-/:-@\[-${"`"}\x7b-~]`,
      GPT2,
    ],
    addBos: true,
  },
  { names: ["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"], steps: [GPT4O] },
  { names: ["granite-embed-multi-97m"], steps: [GPT4O], ignoreMerges: true },
  {
    names: ["tiny_aya", "cohere2moe"],
    steps: [threes(String.raw`\p{Nd}`, String.raw`[\p{L}\p{M}\p{N}\p{Pc}]`), GPT4O],
  },
  {
    names: ["kimi-k2"],
    steps: [
      String.raw`\p{Script=Han}+|${
        cased(`${ENGLISH}?`).replaceAll(/\[(\\p\{L[ul]\}[^\]]*)\]/g, String.raw`[[$1]--\p{Script=Han}]`)
      }|\p{N}{1,3}|${SYMBOLS}|${SPACES}`,
    ],
  },
  { names: ["superbpe"], steps: [String.raw`\p{N}+`, threes(String.raw`\p{Nd}`)] },
  { names: ["gemma4", "granite-embed-multi-311m"], steps: [LINES], byteLevel: false, addBos: true },
  { names: ["sarvam-moe"], steps: [LINES], byteLevel: false },
  // White space, of which ▁ stands for the usual one here, only parts words.
  { names: ["whitespace"], steps: [(text) => text.match(/[^\p{White_Space}▁]+/gu) ?? []], byteLevel: false },
];

/** Each name of {@linkcode preTokenizer} and the recipe that it stands for. */
const BY_NAME: ReadonlyMap<string, Recipe> = new Map(RECIPES.flatMap((r) => r.names.map((name) => [name, r] as const)));

/** Names that {@linkcode preTokenizer} knows. */
export const PRE_TOKENIZERS: readonly string[] = [...BY_NAME.keys()];

/** Compiles a pattern. JavaScript's `\s` has U+FEFF and lacks U+0085; those of training mean Unicode's white space. */
function compile(source: string): RegExp {
  const unicode = source.replaceAll("\\s", "\\p{White_Space}").replaceAll("\\S", "\\P{White_Space}");
  return new RegExp(unicode, unicode.includes("--") ? "gv" : "gu");
}

function splitBy(text: string, pattern: RegExp, pieces = (match: string) => [match]): string[] {
  const out: string[] = [];
  let at = 0;
  for (const match of text.matchAll(pattern)) {
    if (match.index > at) out.push(text.slice(at, match.index));
    for (const piece of pieces(match[0])) out.push(piece);
    at = match.index + match[0].length;
  }
  if (at < text.length) out.push(text.slice(at));
  return out;
}

/** Splits nothing: merges of characters run over the whole text, as SentencePiece's do. */
export const characterPreTokenizer: PreTokenizer = {
  split: (text) => text === "" ? [] : [text],
  ignoreMerges: false,
  byteLevel: false,
  addBos: false,
};

/**
 * The pre-tokenizer that `tokenizer.ggml.pre` names. An unknown name stands for `default`, with a warning, as most texts come
 * out the same.
 */
export function preTokenizer(name: string): PreTokenizer {
  const known = BY_NAME.get(name);
  const { steps, ignoreMerges = false, byteLevel = true, addBos = false } = known ?? BY_NAME.get("default")!;
  const split = steps.map((step) => {
    if (typeof step === "function") return step;
    const pattern = compile(step);
    return (text: string) => splitBy(text, pattern);
  });
  return {
    split: (text) => split.reduce<string[]>((texts, step) => texts.flatMap(step), text === "" ? [] : [text]),
    ignoreMerges,
    byteLevel,
    addBos,
    ...(known !== undefined ? {} : {
      warning: `tokenizer.ggml.pre ${JSON.stringify(name)} is unknown; texts are split as "default" does, ` +
        "which may cost quality",
    }),
  };
}
