/** A tensor type of a GGUF: GGML's, bitnet.cpp's I2_S, and Lutra's own group types (ids from 1001). */
export interface GgmlType {
  readonly id: number;
  readonly name: string;
  /** Elements and bytes of a block. */
  readonly elements: number;
  readonly bytes: number;
  /** Bytes behind the blocks of a tensor. */
  readonly trailer: number;
  /** Bytes that the kernels hold and read of a block, at most. */
  readonly packed: number;
  /** Whether the kernels compute with it. */
  readonly supported: boolean;
}

/** Types that only files have so far. */
const UNSUPPORTED = new Set([9, 15, 24, 25, 26, 27, 28, 40, 41]);

/** Packed weights take at most so much more than the file's, but for types with codebooks (the last column). */
export const PACKED_RATIO = 1.02;

const table: [number, string, number, number, number?, number?][] = [
  [0, "F32", 1, 4],
  [1, "F16", 1, 2],
  [2, "Q4_0", 32, 18],
  [3, "Q4_1", 32, 20],
  [6, "Q5_0", 32, 22],
  [7, "Q5_1", 32, 24],
  [8, "Q8_0", 32, 34],
  [9, "Q8_1", 32, 36],
  [10, "Q2_K", 256, 84],
  [11, "Q3_K", 256, 110],
  [12, "Q4_K", 256, 144],
  [13, "Q5_K", 256, 176],
  [14, "Q6_K", 256, 210],
  [15, "Q8_K", 256, 292],
  [16, "IQ2_XXS", 256, 66, 0, 106],
  [17, "IQ2_XS", 256, 74, 0, 110],
  [18, "IQ3_XXS", 256, 98, 0, 138],
  [19, "IQ1_S", 256, 50, 0, 106],
  [20, "IQ4_NL", 32, 18],
  [21, "IQ3_S", 256, 110, 0, 138],
  [22, "IQ2_S", 256, 82, 0, 110],
  [23, "IQ4_XS", 256, 136],
  [24, "I8", 1, 1],
  [25, "I16", 1, 2],
  [26, "I32", 1, 4],
  [27, "I64", 1, 8],
  [28, "F64", 1, 8],
  [29, "IQ1_M", 256, 56, 0, 110],
  [30, "BF16", 1, 2],
  [34, "TQ1_0", 256, 54],
  [35, "TQ2_0", 256, 66],
  [36, "I2_S", 128, 32, 32],
  [39, "MXFP4", 32, 17],
  [40, "NVFP4", 64, 36],
  [41, "Q1_0", 128, 18],
  [1001, "L1", 128, 20],
  [1002, "L2", 128, 36],
  [1003, "L3", 128, 52],
];

/** Every tensor type that a GGUF may hold, by id. */
export const GGML_TYPES: ReadonlyMap<number, GgmlType> = new Map(
  table.map(([id, name, elements, bytes, trailer = 0, packed = PACKED_RATIO * bytes]) => [
    id,
    { id, name, elements, bytes, trailer, packed, supported: !UNSUPPORTED.has(id) },
  ]),
);

/** The type's name, or its number when it is not known. */
export function ggmlTypeName(id: number): string {
  return GGML_TYPES.get(id)?.name ?? `type ${id}`;
}
