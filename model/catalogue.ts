/** The numbers that shape a model, and its architecture as GGUF names it. */
export interface ModelShape {
  readonly architecture: string;
  readonly layers: number;
  readonly embedding: number;
  readonly heads: number;
  readonly kvHeads: number;
  /** Default: `embedding / heads`. */
  readonly headDim?: number;
  readonly feedForward: number;
  readonly vocab: number;
  readonly context: number;
  /** Whether the head's matrix is the embedding's. */
  readonly tied?: boolean;
  readonly experts?: { readonly count: number; readonly used: number };
}

type Row = [
  name: string,
  architecture: string,
  layers: number,
  embedding: number,
  heads: number,
  kvHeads: number,
  feedForward: number,
  vocab: number,
  context: number,
  more?: Pick<ModelShape, "tied" | "experts" | "headDim">,
];

const tied = { tied: true } as const;
const ROWS: readonly Row[] = [
  ["tinyllama-1.1b", "llama", 22, 2048, 32, 4, 5632, 32000, 2048],
  ["llama-2-7b", "llama", 32, 4096, 32, 32, 11008, 32000, 4096],
  ["llama-2-13b", "llama", 40, 5120, 40, 40, 13824, 32000, 4096],
  ["llama-2-70b", "llama", 80, 8192, 64, 8, 28672, 32000, 4096],
  ["llama-3-8b", "llama", 32, 4096, 32, 8, 14336, 128256, 8192],
  ["llama-3-70b", "llama", 80, 8192, 64, 8, 28672, 128256, 8192],
  ["llama-3.2-1b", "llama", 16, 2048, 32, 8, 8192, 128256, 131072, tied],
  ["llama-3.2-3b", "llama", 28, 3072, 24, 8, 8192, 128256, 131072, tied],
  ["mistral-7b", "llama", 32, 4096, 32, 8, 14336, 32000, 32768],
  ["mixtral-8x7b", "llama", 32, 4096, 32, 8, 14336, 32000, 32768, { experts: { count: 8, used: 2 } }],
  ["qwen2.5-0.5b", "qwen2", 24, 896, 14, 2, 4864, 151936, 32768, tied],
  ["qwen2.5-1.5b", "qwen2", 28, 1536, 12, 2, 8960, 151936, 32768, tied],
  ["qwen2.5-3b", "qwen2", 36, 2048, 16, 2, 11008, 151936, 32768, tied],
  ["qwen2.5-7b", "qwen2", 28, 3584, 28, 4, 18944, 152064, 32768],
  ["qwen2.5-14b", "qwen2", 48, 5120, 40, 8, 13824, 152064, 32768],
  ["qwen2.5-32b", "qwen2", 64, 5120, 40, 8, 27648, 152064, 32768],
  ["qwen2.5-72b", "qwen2", 80, 8192, 64, 8, 29568, 152064, 32768],
  ["qwen3-8b", "qwen3", 36, 4096, 32, 8, 12288, 151936, 40960, { headDim: 128 }],
  ["bitnet-2b", "bitnet-b1.58", 30, 2560, 20, 5, 6912, 128256, 4096, tied],
];

/** Shapes of well-known models, for plans without a file. */
export const MODEL_SHAPES: ReadonlyMap<string, ModelShape> = new Map(
  ROWS.map(([name, architecture, layers, embedding, heads, kvHeads, feedForward, vocab, context, more]) => [
    name,
    { architecture, layers, embedding, heads, kvHeads, feedForward, vocab, context, ...more },
  ]),
);
