//! Block types of model files, as they are stored: ggml's, bitnet.cpp's I2_S and Lutra's own.

use super::{codebooks, FloatKind, MAX_GROUP, MAX_SUBS};
use crate::error::{Error, Result};
use crate::ops::{bf16_to_f32, f16_to_f32};

/// A tensor type of the file, by its id there. `d` and `m` are f16.
#[allow(non_camel_case_types)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum SourceType {
    F32 = 0,
    F16 = 1,
    /// 32 weights d·(q − 8): d, then 16 bytes; weight i in the low nibble of byte i, weight 16 + i in the high one.
    Q4_0 = 2,
    /// 32 weights d·q + m: d, m, nibbles as in Q4_0.
    Q4_1 = 3,
    /// 32 weights d·(q − 16): d, 32 bits of fifth bits, nibbles as in Q4_0.
    Q5_0 = 6,
    /// 32 weights d·q + m: d, m, fifth bits, nibbles.
    Q5_1 = 7,
    /// 32 weights d·q: d, then 32 signed bytes.
    Q8_0 = 8,
    /// 256 weights in 16 subs (d·s)·q − (dmin·m), q of 2 bits: 16 bytes of s and m (4 bits each), 64 bytes of q, d, dmin.
    Q2_K = 10,
    /// 256 weights in 16 subs (d·(s − 32))·(q − 4), q of 3 bits: 32 bytes of third bits, 64 of the others, 12 of s, d.
    Q3_K = 11,
    /// 256 weights in 8 subs (d·s)·q − (dmin·m), q of 4 bits: d, dmin, 12 bytes of s and m (6 bits each), 128 of q.
    Q4_K = 12,
    /// As Q4_K with q of 5 bits: d, dmin, s and m, 32 bytes of fifth bits, 128 of the others.
    Q5_K = 13,
    /// 256 weights in 16 subs (d·s)·(q − 32), q of 6 bits: 128 bytes of low nibbles, 64 of high bits, 16 signed s, d.
    Q6_K = 14,
    /// 256 weights in 8 subs (d·(2s + 1)/8)·v, v ±8, ±25 or ±43: d, then for each sub four bytes, each the entry of a codebook
    /// (8 weights), and a word of 4·7 bits of signs and 4 bits of s.
    IQ2_XXS = 16,
    /// The same in 16 subs: d, 32 words of a 9-bit entry and 7 bits of signs, 8 bytes of s.
    IQ2_XS = 17,
    /// 256 weights in 8 subs (d·(2s + 1)/4)·v, v ±4 … ±62: d, 64 bytes, each an entry (4 weights), then for each sub a word of
    /// signs and s as in IQ2_XXS.
    IQ3_XXS = 18,
    /// 256 weights in 8 subs (d·(2s + 1))·(t + δ), t a trit, δ ±1/8 for a sub: d, 32 bytes of entries (8 weights), for each sub
    /// a word of 4·3 upper bits of entries, 3 bits of s and the sign of δ.
    IQ1_S = 19,
    /// 32 weights d·table(q): as Q4_0 with a table of 16 values.
    IQ4_NL = 20,
    /// 256 weights in 8 subs (d·(2s + 1))·v, v ±1, ±3 … ±15: d, 64 bytes of entries (4 weights), 8 of their ninth bits, 32 of
    /// signs, 4 of s.
    IQ3_S = 21,
    /// As IQ2_XS: d, 32 bytes of entries, 32 of signs, 8 of the entries' upper two bits, 8 of s.
    IQ2_S = 22,
    /// 256 weights in 8 subs (d·(s − 32))·table(q) with IQ4_NL's table: d, 2 bytes of the upper two bits of s, 4 of the lower
    /// four, 128 of q.
    IQ4_XS = 23,
    /// 256 weights in 16 subs (d·(2s + 1))·(t + δ), δ ±1/8 for 8 weights: 32 bytes of entries, 16 of their upper three bits and
    /// the sign of δ, four words of four s of 3 bits and, above them, four bits of d.
    IQ1_M = 29,
    BF16 = 30,
    /// 256 weights d·(t − 1): 48 bytes of five trits, 4 bytes of four trits, d.
    TQ1_0 = 34,
    /// 256 weights d·(q − 1): 64 bytes of four 2-bit codes, d.
    TQ2_0 = 35,
    /// bitnet.cpp's: 128 weights d·(q − 1) in 32 bytes of four 2-bit codes, first in the highest bits; behind the tensor's
    /// blocks 32 bytes that begin with its f32 scale d.
    I2_S = 36,
    /// 32 weights d·table(q), an FP4 (E2M1) table; a byte e with d = 2^(e − 128), nibbles as in Q4_0.
    MXFP4 = 39,
    /// Lutra's: 128 weights d·q + m, q of 1 bit: d, m, then a little-endian stream of bits.
    L1 = 1001,
    /// The same with q of 2 bits.
    L2 = 1002,
    /// The same with q of 3 bits.
    L3 = 1003,
    /// Lutra's: 32 weights d·(q − z), q of 2 bits: d, a byte whose low bits are z, then a little-endian stream of bits. What
    /// GPTQ and AWQ become (`layout`).
    Z2_32 = 2032,
    Z2_64 = 2064,
    Z2_128 = 2128,
    /// The same with q of 3 bits.
    Z3_32 = 3032,
    Z3_64 = 3064,
    Z3_128 = 3128,
    /// The same with q of 4 bits.
    Z4_32 = 4032,
    Z4_64 = 4064,
    Z4_128 = 4128,
    /// The same with q of 8 bits.
    Z8_32 = 8032,
    Z8_64 = 8064,
    Z8_128 = 8128,
    /// As Z2_32 with an f32 for d, and so on.
    Z2_32F = 12032,
    Z3_32F = 13032,
    Z4_32F = 14032,
    Z8_32F = 18032,
}

/// What the 4-bit codes of IQ4_NL are worth (ggml's `kvalues_iq4nl`).
pub(crate) const IQ4_NL_VALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];
/// Twice the E2M1 values of MXFP4.
pub(crate) const MXFP4_VALUES: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// Half of 2^(e − 127): the factor of doubled E2M1 values.
pub(crate) fn e8m0_half(e: u8) -> f32 {
    f32::from_bits(if e < 2 { 0x0020_0000 << e } else { (e as u32 - 1) << 23 })
}

/// Of IQ1's codes, eight times the values: trits and, from 4 on, those with δ below zero.
pub(crate) const IQ1_VALUES: [i8; 16] = [-7, 1, 9, 0, -9, -1, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// Of IQ2's codes: a codebook's digits, and from 4 on the negative ones.
pub(crate) const IQ2_VALUES: [i8; 16] = [8, 25, 43, 0, -8, -25, -43, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// Of IQ3_XXS's codes, half the values, from 8 on the negative ones.
pub(crate) const IQ3_XXS_VALUES: [i8; 16] = [2, 6, 10, 14, 18, 22, 26, 31, -2, -6, -10, -14, -18, -22, -26, -31];
/// Of IQ3_S's codes.
pub(crate) const IQ3_S_VALUES: [i8; 16] = [1, 3, 5, 7, 9, 11, 13, 15, -1, -3, -5, -7, -9, -11, -13, -15];

impl SourceType {
    pub const ALL: [SourceType; 45] = [
        SourceType::F32,
        SourceType::F16,
        SourceType::Q4_0,
        SourceType::Q4_1,
        SourceType::Q5_0,
        SourceType::Q5_1,
        SourceType::Q8_0,
        SourceType::Q2_K,
        SourceType::Q3_K,
        SourceType::Q4_K,
        SourceType::Q5_K,
        SourceType::Q6_K,
        SourceType::IQ2_XXS,
        SourceType::IQ2_XS,
        SourceType::IQ3_XXS,
        SourceType::IQ1_S,
        SourceType::IQ4_NL,
        SourceType::IQ3_S,
        SourceType::IQ2_S,
        SourceType::IQ4_XS,
        SourceType::IQ1_M,
        SourceType::BF16,
        SourceType::TQ1_0,
        SourceType::TQ2_0,
        SourceType::I2_S,
        SourceType::MXFP4,
        SourceType::L1,
        SourceType::L2,
        SourceType::L3,
        SourceType::Z2_32,
        SourceType::Z2_64,
        SourceType::Z2_128,
        SourceType::Z3_32,
        SourceType::Z3_64,
        SourceType::Z3_128,
        SourceType::Z4_32,
        SourceType::Z4_64,
        SourceType::Z4_128,
        SourceType::Z8_32,
        SourceType::Z8_64,
        SourceType::Z8_128,
        SourceType::Z2_32F,
        SourceType::Z3_32F,
        SourceType::Z4_32F,
        SourceType::Z8_32F,
    ];

    /// The type with this id in a GGUF file.
    pub fn from_ggml(id: u32) -> Result<Self> {
        let known = Self::ALL.into_iter().find(|ty| *ty as u32 == id);
        known.ok_or_else(|| Error::unsupported(format!("tensor type {id} is not supported")))
    }

    /// Bits of q and weights in a block of types d·(q − z), by their ids.
    pub(crate) fn zero_point(self) -> Option<(usize, usize)> {
        let id = self as usize;
        (id >= 2000).then_some((id / 1000 % 10, id % 1000))
    }

    /// Whether d of types d·(q − z) is an f32.
    pub(crate) fn has_wide_scale(self) -> bool {
        self as usize >= 10_000
    }

    /// The type d·(q − z) with these.
    pub(crate) fn with_zero_point(bits: usize, group: usize, wide: bool) -> Option<Self> {
        Self::ALL.into_iter().find(|ty| ty.zero_point() == Some((bits, group)) && ty.has_wide_scale() == wide)
    }

    /// Where z is in a block of types d·(q − z); codes follow.
    pub(crate) fn zero_at(self) -> usize {
        if self.has_wide_scale() {
            4
        } else {
            2
        }
    }

    /// Weights in a block.
    pub fn block_elements(self) -> usize {
        use SourceType::*;
        if let Some((_, group)) = self.zero_point() {
            return group;
        }
        match self {
            F32 | F16 | BF16 => 1,
            Q4_0 | Q4_1 | Q5_0 | Q5_1 | Q8_0 | IQ4_NL | MXFP4 => 32,
            I2_S | L1 | L2 | L3 => 128,
            Q2_K | Q3_K | Q4_K | Q5_K | Q6_K | TQ1_0 | TQ2_0 => 256,
            IQ1_S | IQ1_M | IQ2_XXS | IQ2_XS | IQ2_S | IQ3_XXS | IQ3_S | IQ4_XS => 256,
            _ => unreachable!("the ids of all others say it"),
        }
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        use SourceType::*;
        if let Some((bits, group)) = self.zero_point() {
            return self.zero_at() + 1 + bits * group / 8;
        }
        match self {
            F32 => 4,
            F16 | BF16 => 2,
            Q4_0 | IQ4_NL => 18,
            MXFP4 => 17,
            Q4_1 | L1 => 20,
            Q5_0 => 22,
            Q5_1 => 24,
            Q8_0 => 34,
            I2_S => 32,
            L2 => 36,
            L3 => 52,
            TQ1_0 => 54,
            TQ2_0 => 66,
            Q2_K => 84,
            Q3_K => 110,
            Q4_K => 144,
            Q5_K => 176,
            Q6_K => 210,
            IQ1_S => 50,
            IQ1_M => 56,
            IQ2_XXS => 66,
            IQ2_XS => 74,
            IQ2_S => 82,
            IQ3_XXS => 98,
            IQ3_S => 110,
            IQ4_XS => 136,
            _ => unreachable!("the ids of all others say it"),
        }
    }

    /// Bytes of a row of `cols` weights, which must be whole blocks.
    pub fn row_bytes(self, cols: usize) -> Result<usize> {
        let block = self.block_elements();
        if cols == 0 || cols % block != 0 {
            return Err(Error::argument(format!("a row of {cols} weights is not made of {self:?} blocks of {block}")));
        }
        let bytes = (cols / block).checked_mul(self.block_bytes());
        bytes.ok_or_else(|| Error::argument(format!("a row of {cols} weights is too long")))
    }

    /// Bytes behind the rows of a tensor.
    pub fn trailer_bytes(self) -> usize {
        if self == SourceType::I2_S {
            32
        } else {
            0
        }
    }

    /// Bytes of a tensor.
    pub fn tensor_bytes(self, rows: usize, cols: usize) -> Result<usize> {
        let bytes = self.row_bytes(cols)?.checked_mul(rows).and_then(|bytes| bytes.checked_add(self.trailer_bytes()));
        bytes.ok_or_else(|| Error::argument(format!("{rows} rows of {cols} weights are too many")))
    }

    /// A tensor for measurements: every byte is 0x20 ..= 0x3f, so that floats, half floats and exponents of any type, and products
    /// with them, are neither subnormal, which would be slow, nor infinite.
    pub fn arbitrary(self, rows: usize, cols: usize) -> Result<Vec<u8>> {
        let mut state = 1u32;
        let mut byte = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            0x20 | (state >> 27) as u8
        };
        Ok((0..self.tensor_bytes(rows, cols)?).map(|_| byte()).collect())
    }
}

/// One float weight.
pub(crate) fn float(kind: FloatKind, bytes: &[u8]) -> f32 {
    match kind {
        FloatKind::F32 => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
        FloatKind::F16 => f16_to_f32(u16::from_le_bytes([bytes[0], bytes[1]])),
        FloatKind::Bf16 => bf16_to_f32(u16::from_le_bytes([bytes[0], bytes[1]])),
    }
}

const POWERS_OF_3: [u8; 5] = [1, 3, 9, 27, 81];

/// Trit `n` of a TQ1_0 byte, as ggml reads it, for every byte value.
pub(super) fn tq1_trit(byte: u8, n: usize) -> u8 {
    ((byte.wrapping_mul(POWERS_OF_3[n]) as u16 * 3) >> 8) as u8
}

/// A block of a quantised type taken apart.
pub(super) struct Block {
    /// Codes in the order of k: unsigned, or two's complement for Q8_0 and, less 128, for Z8.
    pub codes: [u8; MAX_GROUP],
    /// Bits of the scale d (f16; the exponent for MXFP4).
    pub scale: u16,
    /// The same of types whose d is an f32.
    pub wide_scale: u32,
    /// Bits of m, or of dmin; or z.
    pub min: u16,
    /// s and m of the subs: s unsigned, with 128 added for Q6_K; of the IQ types 2s + 1, with 32 added.
    pub sub_scales: [u8; MAX_SUBS],
    pub sub_mins: [u8; MAX_SUBS],
}

/// 6-bit scale and min of sub j of Q4_K and Q5_K.
pub(super) fn scale_min_6(bytes: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        (bytes[j] & 63, bytes[j + 4] & 63)
    } else {
        (bytes[j + 4] & 15 | bytes[j - 4] >> 6 << 4, bytes[j + 4] >> 4 | bytes[j] >> 6 << 4)
    }
}

/// 6-bit scale of sub j of Q3_K: low nibbles in bytes 0–7, the upper two bits in bytes 8–11.
pub(super) fn scale_6(bytes: &[u8], j: usize) -> u8 {
    let low = if j < 8 { bytes[j] & 15 } else { bytes[j - 8] >> 4 };
    low | (bytes[8 + j % 4] >> (2 * (j / 4)) & 3) << 4
}

/// 6-bit scale of sub j of an IQ4_XS block.
pub(super) fn iq4_scale(block: &[u8], j: usize) -> u8 {
    let high = u16::from_le_bytes([block[2], block[3]]) >> (2 * j) & 3;
    block[4 + j / 2] >> (4 * (j % 2)) & 15 | (high as u8) << 4
}

/// Where the signs and the scale of sub j of IQ2_XXS and IQ3_XXS are: the word's place.
pub(super) fn signs_at(ty: SourceType, j: usize) -> usize {
    if ty == SourceType::IQ2_XXS {
        6 + 8 * j
    } else {
        66 + 4 * j
    }
}

/// Bits of d of an IQ1_M block: the upper four bits of four words, first the lowest.
pub(super) fn iq1_m_scale(block: &[u8]) -> u16 {
    (0..4).fold(0, |d, i| d | (block[49 + 2 * i] as u16 >> 4) << (4 * i))
}

/// s of sub j of an IQ1_M block.
pub(super) fn iq1_m_sub_scale(block: &[u8], j: usize) -> u8 {
    let word = u16::from_le_bytes([block[48 + j / 4 * 2], block[49 + j / 4 * 2]]);
    (word >> (3 * (j % 4)) & 7) as u8
}

impl Block {
    pub const EMPTY: Block = Block {
        codes: [0; MAX_GROUP],
        scale: 0,
        wide_scale: 0,
        min: 0,
        sub_scales: [0; MAX_SUBS],
        sub_mins: [0; MAX_SUBS],
    };

    /// Takes one block apart; what its type does not have stays as it was. Loops run over whole bytes with one shift each, so
    /// that compilers make vectors of them: packing is as fast as reading a model file should be.
    pub fn read(&mut self, ty: SourceType, block: &[u8]) {
        use SourceType::*;
        let block = &block[..ty.block_bytes()];
        let half = |at: usize| u16::from_le_bytes([block[at], block[at + 1]]);
        match ty {
            Q4_0 | IQ4_NL => {
                self.nibbles(&block[2..]);
                self.scale = half(0);
            }
            MXFP4 => {
                self.nibbles(&block[1..]);
                self.scale = block[0] as u16;
            }
            Q4_1 => {
                self.nibbles(&block[4..]);
                (self.scale, self.min) = (half(0), half(2));
            }
            Q5_0 => {
                self.nibbles(&block[6..]);
                self.fifth_bits(&block[2..6]);
                self.scale = half(0);
            }
            Q5_1 => {
                self.nibbles(&block[8..]);
                self.fifth_bits(&block[4..8]);
                (self.scale, self.min) = (half(0), half(2));
            }
            Q8_0 => {
                self.codes[..32].copy_from_slice(&block[2..34]);
                self.scale = half(0);
            }
            Q2_K => {
                for (codes, bytes) in self.codes.chunks_exact_mut(128).zip(block[16..80].chunks_exact(32)) {
                    shifted::<0, 3>(&mut codes[..32], bytes);
                    shifted::<2, 3>(&mut codes[32..64], bytes);
                    shifted::<4, 3>(&mut codes[64..96], bytes);
                    shifted::<6, 3>(&mut codes[96..], bytes);
                }
                for j in 0..16 {
                    (self.sub_scales[j], self.sub_mins[j]) = (block[j] & 15, block[j] >> 4);
                }
                (self.scale, self.min) = (half(80), half(82));
            }
            Q3_K => {
                for (codes, bytes) in self.codes.chunks_exact_mut(128).zip(block[32..96].chunks_exact(32)) {
                    shifted::<0, 3>(&mut codes[..32], bytes);
                    shifted::<2, 3>(&mut codes[32..64], bytes);
                    shifted::<4, 3>(&mut codes[64..96], bytes);
                    shifted::<6, 3>(&mut codes[96..], bytes);
                }
                self.bits_of_32s::<2>(&block[..32]);
                for j in 0..16 {
                    self.sub_scales[j] = scale_6(&block[96..108], j);
                }
                self.scale = half(108);
            }
            Q4_K | Q5_K => {
                let low = if ty == Q4_K { 16 } else { 48 };
                for (codes, bytes) in self.codes.chunks_exact_mut(64).zip(block[low..low + 128].chunks_exact(32)) {
                    shifted::<0, 15>(&mut codes[..32], bytes);
                    shifted::<4, 15>(&mut codes[32..], bytes);
                }
                if ty == Q5_K {
                    self.bits_of_32s::<4>(&block[16..48]);
                }
                for j in 0..8 {
                    (self.sub_scales[j], self.sub_mins[j]) = scale_min_6(&block[4..16], j);
                }
                (self.scale, self.min) = (half(0), half(2));
            }
            Q6_K => {
                let parts = block[..128].chunks_exact(64).zip(block[128..192].chunks_exact(32));
                for (codes, (low, high)) in self.codes.chunks_exact_mut(128).zip(parts) {
                    for l in 0..32 {
                        codes[l] = low[l] & 15 | (high[l] & 3) << 4;
                        codes[32 + l] = low[32 + l] & 15 | (high[l] >> 2 & 3) << 4;
                        codes[64 + l] = low[l] >> 4 | (high[l] >> 4 & 3) << 4;
                        codes[96 + l] = low[32 + l] >> 4 | (high[l] >> 6) << 4;
                    }
                }
                for j in 0..16 {
                    self.sub_scales[j] = block[192 + j].wrapping_add(128);
                }
                self.scale = half(208);
            }
            TQ1_0 => {
                // 32 bytes of five trits, 16 bytes of five, 4 bytes of four; trits of a part are the slow index.
                let mut codes = &mut self.codes[..];
                for (part, trits) in [(&block[..32], 5), (&block[32..48], 5), (&block[48..52], 4)] {
                    for n in 0..trits {
                        let (now, later) = codes.split_at_mut(part.len());
                        now.iter_mut().zip(part).for_each(|(code, &byte)| *code = tq1_trit(byte, n));
                        codes = later;
                    }
                }
                self.scale = half(52);
            }
            TQ2_0 => {
                for (codes, bytes) in self.codes.chunks_exact_mut(128).zip(block[..64].chunks_exact(32)) {
                    shifted::<0, 3>(&mut codes[..32], bytes);
                    shifted::<2, 3>(&mut codes[32..64], bytes);
                    shifted::<4, 3>(&mut codes[64..96], bytes);
                    shifted::<6, 3>(&mut codes[96..], bytes);
                }
                self.scale = half(64);
            }
            I2_S => {
                shifted::<6, 3>(&mut self.codes[..32], block);
                shifted::<4, 3>(&mut self.codes[32..64], block);
                shifted::<2, 3>(&mut self.codes[64..96], block);
                shifted::<0, 3>(&mut self.codes[96..128], block);
            }
            L1 | L2 | L3 => {
                match ty {
                    L1 => stream::<1>(&mut self.codes, &block[4..]),
                    L2 => stream::<2>(&mut self.codes, &block[4..]),
                    _ => stream::<3>(&mut self.codes, &block[4..]),
                }
                (self.scale, self.min) = (half(0), half(2));
            }
            IQ2_XXS | IQ3_XXS => {
                for j in 0..8 {
                    let at = signs_at(ty, j);
                    let word = half(at) as u32 | (half(at + 2) as u32) << 16;
                    for l in 0..4 {
                        let signs = codebooks::even_signs(word >> (7 * l));
                        if ty == IQ2_XXS {
                            self.put_eight(4 * j + l, codebooks::IQ2_XXS[block[2 + 8 * j + l] as usize], signs, 2);
                        } else {
                            let entry = |i: usize| codebooks::IQ3_XXS[block[2 + 8 * j + 2 * l + i] as usize];
                            self.put_eight(4 * j + l, join(entry(0), entry(1)), signs, 3);
                        }
                    }
                    self.sub_scales[j] = odd((word >> 28) as u8);
                }
                self.scale = half(0);
            }
            IQ2_XS => {
                for i in 0..32 {
                    let word = half(2 + 2 * i);
                    let signs = codebooks::even_signs(word as u32 >> 9);
                    self.put_eight(i, codebooks::IQ2_XS[(word & 511) as usize], signs, 2);
                }
                self.odd_scales(&block[66..74]);
                self.scale = half(0);
            }
            IQ2_S => {
                for i in 0..32 {
                    let high = block[66 + i / 4] >> (2 * (i % 4)) & 3;
                    let entry = block[2 + i] as usize | (high as usize) << 8;
                    self.put_eight(i, codebooks::IQ2_S[entry], block[34 + i], 2);
                }
                self.odd_scales(&block[74..82]);
                self.scale = half(0);
            }
            IQ3_S => {
                for i in 0..32 {
                    let high = (block[66 + i / 4] >> (2 * (i % 4))) as usize;
                    let low = codebooks::IQ3_S[block[2 + 2 * i] as usize | (high & 1) << 8];
                    let up = codebooks::IQ3_S[block[3 + 2 * i] as usize | (high & 2) << 7];
                    self.put_eight(i, join(low, up), block[74 + i], 3);
                }
                self.odd_scales(&block[106..110]);
                self.scale = half(0);
            }
            IQ4_XS => {
                for (codes, bytes) in self.codes.chunks_exact_mut(32).zip(block[8..136].chunks_exact(16)) {
                    shifted::<0, 15>(&mut codes[..16], bytes);
                    shifted::<4, 15>(&mut codes[16..], bytes);
                }
                for j in 0..8 {
                    self.sub_scales[j] = iq4_scale(block, j);
                }
                self.scale = half(0);
            }
            IQ1_S => {
                for j in 0..8 {
                    let word = half(34 + 2 * j);
                    let signs = if word & 0x8000 != 0 { 0xff } else { 0 };
                    for l in 0..4 {
                        let entry = block[2 + 4 * j + l] as usize | (word as usize >> (3 * l) & 7) << 8;
                        self.put_eight(4 * j + l, codebooks::IQ1[entry], signs, 2);
                    }
                    self.sub_scales[j] = odd((word >> 12 & 7) as u8);
                }
                self.scale = half(0);
            }
            IQ1_M => {
                for i in 0..32 {
                    let high = block[32 + i / 2] >> (4 * (i % 2));
                    let signs = if high & 8 != 0 { 0xff } else { 0 };
                    self.put_eight(i, codebooks::IQ1[block[i] as usize | (high as usize & 7) << 8], signs, 2);
                }
                for j in 0..16 {
                    self.sub_scales[j] = odd(iq1_m_sub_scale(block, j));
                }
                self.scale = iq1_m_scale(block);
            }
            F32 | F16 | BF16 => unreachable!("float weights are in no blocks"),
            _ => {
                let (bits, group) = ty.zero_point().expect("all others were named");
                let (codes, bytes) = (&mut self.codes[..group], &block[ty.zero_at() + 1..]);
                match bits {
                    2 => stream::<2>(codes, bytes),
                    3 => stream::<3>(codes, bytes),
                    4 => stream::<4>(codes, bytes),
                    _ => codes.iter_mut().zip(bytes).for_each(|(code, byte)| *code = byte ^ 0x80),
                }
                self.scale = half(0);
                self.wide_scale = wide_scale(block);
                self.min = zero_of(ty, block) as u16;
            }
        }
    }

    /// Codes 8·i … 8·i + 7: digits of a codebook, and their signs as the bit `sign`.
    fn put_eight(&mut self, i: usize, digits: u64, signs: u8, sign: u32) {
        let codes = digits | codebooks::BITS[signs as usize] << sign;
        self.codes[8 * i..8 * i + 8].copy_from_slice(&codes.to_le_bytes());
    }

    /// Scales 2s + 1 from nibbles.
    fn odd_scales(&mut self, bytes: &[u8]) {
        for (scales, &byte) in self.sub_scales.chunks_exact_mut(2).zip(bytes) {
            (scales[0], scales[1]) = (odd(byte & 15), odd(byte >> 4));
        }
    }

    /// Codes 0–15 from the low nibbles of 16 bytes, 16–31 from the high ones.
    fn nibbles(&mut self, bytes: &[u8]) {
        shifted::<0, 15>(&mut self.codes[..16], bytes);
        shifted::<4, 15>(&mut self.codes[16..32], bytes);
    }

    /// Adds the fifth bits of 32 codes, a bit each.
    fn fifth_bits(&mut self, bits: &[u8]) {
        for (codes, &byte) in self.codes.chunks_exact_mut(8).zip(bits) {
            for (i, code) in codes.iter_mut().enumerate() {
                *code |= (byte >> i & 1) << 4;
            }
        }
    }

    /// Adds bit `TO` of 256 codes: bit i of byte l is that of code 32·i + l.
    fn bits_of_32s<const TO: u32>(&mut self, bytes: &[u8]) {
        for (i, codes) in self.codes.chunks_exact_mut(32).enumerate() {
            for (code, &byte) in codes.iter_mut().zip(bytes) {
                *code |= (byte >> i & 1) << TO;
            }
        }
    }
}

/// 2s + 1 as it is stored.
fn odd(s: u8) -> u8 {
    32 + (2 * s + 1)
}

fn join(low: u32, high: u32) -> u64 {
    low as u64 | (high as u64) << 32
}

/// As many codes as there is room for: `byte >> SHIFT & MASK`.
#[inline(always)]
fn shifted<const SHIFT: u32, const MASK: u8>(codes: &mut [u8], bytes: &[u8]) {
    codes.iter_mut().zip(bytes).for_each(|(code, &byte)| *code = byte >> SHIFT & MASK);
}

/// Codes of N bits from a little-endian stream of bits; eight codes are N whole bytes.
fn stream<const N: usize>(codes: &mut [u8], bytes: &[u8]) {
    for (codes, bytes) in codes.chunks_exact_mut(8).zip(bytes.chunks_exact(N)) {
        let mut word = [0; 4];
        word[..N].copy_from_slice(bytes);
        let word = u32::from_le_bytes(word);
        for (i, code) in codes.iter_mut().enumerate() {
            *code = (word >> (N * i)) as u8 & ((1 << N) - 1);
        }
    }
}

/// z of a block of q − z.
pub(super) fn zero_of(ty: SourceType, block: &[u8]) -> i32 {
    let (bits, _) = ty.zero_point().expect("a type with zero points");
    block[ty.zero_at()] as i32 & ((1 << bits) - 1)
}

/// Bits of d of a block of types whose d is an f32.
pub(super) fn wide_scale(block: &[u8]) -> u32 {
    u32::from_le_bytes([block[0], block[1], block[2], block[3]])
}

/// The f32 scale of an I2_S tensor of these bytes.
pub(super) fn tensor_scale(src: &[u8]) -> f32 {
    let at = src.len() - SourceType::I2_S.trailer_bytes();
    f32::from_le_bytes([src[at], src[at + 1], src[at + 2], src[at + 3]])
}

/// The weights of a tensor (or of whole blocks of a type without trailer), by the formulas and loops of ggml's own code: the
/// reference that packing is tested against.
pub fn dequantize(ty: SourceType, src: &[u8], out: &mut [f32]) -> Result<()> {
    use SourceType::*;
    let blocks = out.len() / ty.block_elements();
    let expected = blocks.checked_mul(ty.block_bytes()).and_then(|bytes| bytes.checked_add(ty.trailer_bytes()));
    if out.len() % ty.block_elements() != 0 || expected != Some(src.len()) {
        return Err(Error::argument(format!("{} bytes are not {} {ty:?} weights", src.len(), out.len())));
    }
    let half = |bytes: &[u8]| f16_to_f32(u16::from_le_bytes([bytes[0], bytes[1]]));
    let tensor = if ty == I2_S { tensor_scale(src) } else { 0.0 };
    for (b, y) in src.chunks_exact(ty.block_bytes()).zip(out.chunks_exact_mut(ty.block_elements())) {
        match ty {
            F32 => y[0] = float(FloatKind::F32, b),
            F16 => y[0] = float(FloatKind::F16, b),
            BF16 => y[0] = float(FloatKind::Bf16, b),
            Q4_0 => {
                let d = half(b);
                for j in 0..16 {
                    y[j] = d * ((b[2 + j] & 15) as i32 - 8) as f32;
                    y[j + 16] = d * ((b[2 + j] >> 4) as i32 - 8) as f32;
                }
            }
            Q4_1 => {
                let (d, m) = (half(b), half(&b[2..]));
                for j in 0..16 {
                    y[j] = d * (b[4 + j] & 15) as f32 + m;
                    y[j + 16] = d * (b[4 + j] >> 4) as f32 + m;
                }
            }
            Q5_0 => {
                let d = half(b);
                for j in 0..16 {
                    let low = (b[6 + j] & 15) | (b[2 + j / 8] >> (j % 8) & 1) << 4;
                    let high = (b[6 + j] >> 4) | (b[4 + j / 8] >> (j % 8) & 1) << 4;
                    y[j] = d * (low as i32 - 16) as f32;
                    y[j + 16] = d * (high as i32 - 16) as f32;
                }
            }
            Q5_1 => {
                let (d, m) = (half(b), half(&b[2..]));
                for j in 0..16 {
                    let low = (b[8 + j] & 15) | (b[4 + j / 8] >> (j % 8) & 1) << 4;
                    let high = (b[8 + j] >> 4) | (b[6 + j / 8] >> (j % 8) & 1) << 4;
                    y[j] = d * low as f32 + m;
                    y[j + 16] = d * high as f32 + m;
                }
            }
            Q8_0 => {
                let d = half(b);
                for j in 0..32 {
                    y[j] = d * b[2 + j] as i8 as f32;
                }
            }
            Q2_K => {
                let (d, min) = (half(&b[80..]), half(&b[82..]));
                let (mut at, mut sub) = (0, 0);
                for q in b[16..80].chunks_exact(32) {
                    for shift in [0, 2, 4, 6] {
                        for q in q.chunks_exact(16) {
                            let (dl, ml) = (d * (b[sub] & 15) as f32, min * (b[sub] >> 4) as f32);
                            for q in q {
                                y[at] = dl * (q >> shift & 3) as f32 - ml;
                                at += 1;
                            }
                            sub += 1;
                        }
                    }
                }
            }
            Q3_K => {
                let d = half(&b[108..]);
                let (mut at, mut sub, mut bit) = (0, 0, 1);
                for q in b[32..96].chunks_exact(32) {
                    for shift in [0, 2, 4, 6] {
                        for (q, high) in q.chunks_exact(16).zip(b[..32].chunks_exact(16)) {
                            let dl = d * (scale_6(&b[96..108], sub) as i32 - 32) as f32;
                            for (q, high) in q.iter().zip(high) {
                                y[at] = dl * ((q >> shift & 3) as i32 - if high & bit != 0 { 0 } else { 4 }) as f32;
                                at += 1;
                            }
                            sub += 1;
                        }
                        bit = u8::wrapping_shl(bit, 1);
                    }
                }
            }
            Q4_K | Q5_K => {
                let (d, min) = (half(b), half(&b[2..]));
                let (high, low) = if ty == Q4_K { (None, &b[16..144]) } else { (Some(&b[16..48]), &b[48..176]) };
                let mut at = 0;
                for (pair, q) in low.chunks_exact(32).enumerate() {
                    for upper in [0, 1] {
                        let (s, m) = scale_min_6(&b[4..16], 2 * pair + upper);
                        let (dl, ml) = (d * s as f32, min * m as f32);
                        for (l, q) in q.iter().enumerate() {
                            let fifth = high.map_or(0, |high| high[l] >> (2 * pair + upper) & 1);
                            y[at] = dl * ((q >> (4 * upper) & 15) | fifth << 4) as f32 - ml;
                            at += 1;
                        }
                    }
                }
            }
            Q6_K => {
                let d = half(&b[208..]);
                for part in 0..2 {
                    let (ql, qh, s) = (&b[64 * part..][..64], &b[128 + 32 * part..][..32], &b[192 + 8 * part..][..8]);
                    for l in 0..32 {
                        let codes = [
                            (ql[l] & 15) | (qh[l] & 3) << 4,
                            (ql[l + 32] & 15) | (qh[l] >> 2 & 3) << 4,
                            (ql[l] >> 4) | (qh[l] >> 4 & 3) << 4,
                            (ql[l + 32] >> 4) | (qh[l] >> 6) << 4,
                        ];
                        for (i, code) in codes.into_iter().enumerate() {
                            let scale = d * s[2 * i + l / 16] as i8 as f32;
                            y[128 * part + 32 * i + l] = scale * (code as i32 - 32) as f32;
                        }
                    }
                }
            }
            IQ4_NL => {
                let d = half(b);
                for j in 0..16 {
                    y[j] = d * IQ4_NL_VALUES[(b[2 + j] & 15) as usize] as f32;
                    y[j + 16] = d * IQ4_NL_VALUES[(b[2 + j] >> 4) as usize] as f32;
                }
            }
            MXFP4 => {
                let d = e8m0_half(b[0]);
                for j in 0..16 {
                    y[j] = d * MXFP4_VALUES[(b[1 + j] & 15) as usize] as f32;
                    y[j + 16] = d * MXFP4_VALUES[(b[1 + j] >> 4) as usize] as f32;
                }
            }
            IQ2_XXS | IQ3_XXS => {
                let d = half(b);
                for (j, y) in y.chunks_exact_mut(32).enumerate() {
                    let word = u32::from_le_bytes(b[signs_at(ty, j)..][..4].try_into().expect("4 bytes"));
                    let last = if ty == IQ2_XXS { 0.25 } else { 0.5 };
                    let dl = d * (0.5 + (word >> 28) as f32) * last;
                    for (k, y) in y.iter_mut().enumerate() {
                        let magnitude = if ty == IQ2_XXS {
                            digit(codebooks::IQ2_XXS[b[2 + 8 * j + k / 8] as usize], k % 8, &[8.0, 25.0, 43.0])
                        } else {
                            let entry = codebooks::IQ3_XXS[b[2 + 8 * j + k / 4] as usize] as u64;
                            digit(entry, k % 4, &[4.0, 12.0, 20.0, 28.0, 36.0, 44.0, 52.0, 62.0])
                        };
                        *y = dl * magnitude * sign(codebooks::even_signs(word >> (7 * (k / 8))), k % 8);
                    }
                }
            }
            IQ2_XS | IQ2_S => {
                let (d, scales) = (half(b), if ty == IQ2_XS { &b[66..74] } else { &b[74..82] });
                for (i, y) in y.chunks_exact_mut(8).enumerate() {
                    let dl = d * (0.5 + (scales[i / 4] >> (4 * (i / 2 % 2)) & 15) as f32) * 0.25;
                    let (entry, signs) = if ty == IQ2_XS {
                        let word = u16::from_le_bytes([b[2 + 2 * i], b[3 + 2 * i]]);
                        (codebooks::IQ2_XS[(word & 511) as usize], codebooks::even_signs(word as u32 >> 9))
                    } else {
                        let high = (b[66 + i / 4] >> (2 * (i % 4)) & 3) as usize;
                        (codebooks::IQ2_S[b[2 + i] as usize | high << 8], b[34 + i])
                    };
                    for (k, y) in y.iter_mut().enumerate() {
                        *y = dl * digit(entry, k, &[8.0, 25.0, 43.0]) * sign(signs, k);
                    }
                }
            }
            IQ3_S => {
                let d = half(b);
                for (k, y) in y.iter_mut().enumerate() {
                    let dl = d * (1 + 2 * (b[106 + k / 64] >> (4 * (k / 32 % 2)) & 15)) as f32;
                    let high = (b[66 + k / 32] >> (k / 4 % 8) & 1) as usize;
                    let entry = codebooks::IQ3_S[b[2 + k / 4] as usize | high << 8] as u64;
                    let magnitude = digit(entry, k % 4, &[1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0, 15.0]);
                    *y = dl * magnitude * sign(b[74 + k / 8], k % 8);
                }
            }
            IQ4_XS => {
                let d = half(b);
                for (j, (y, q)) in y.chunks_exact_mut(32).zip(b[8..].chunks_exact(16)).enumerate() {
                    let dl = d * (iq4_scale(b, j) as i32 - 32) as f32;
                    for (k, q) in q.iter().enumerate() {
                        y[k] = dl * IQ4_NL_VALUES[(q & 15) as usize] as f32;
                        y[k + 16] = dl * IQ4_NL_VALUES[(q >> 4) as usize] as f32;
                    }
                }
            }
            IQ1_S | IQ1_M => {
                let d = if ty == IQ1_S { half(b) } else { f16_to_f32(iq1_m_scale(b)) };
                for (i, y) in y.chunks_exact_mut(8).enumerate() {
                    let (low, high, negative, s) = if ty == IQ1_S {
                        let word = u16::from_le_bytes([b[34 + i / 4 * 2], b[35 + i / 4 * 2]]) as usize;
                        (b[2 + i], word >> (3 * (i % 4)) & 7, word & 0x8000 != 0, (word >> 12 & 7) as u8)
                    } else {
                        let high = (b[32 + i / 2] >> (4 * (i % 2))) as usize;
                        (b[i], high & 7, high & 8 != 0, iq1_m_sub_scale(b, i / 2))
                    };
                    let (dl, delta) = (d * (2 * s + 1) as f32, if negative { -0.125 } else { 0.125 });
                    for (k, y) in y.iter_mut().enumerate() {
                        *y = dl * (digit(codebooks::IQ1[low as usize | high << 8], k, &[-1.0, 0.0, 1.0]) + delta);
                    }
                }
            }
            TQ1_0 => {
                let d = half(&b[52..]);
                let mut at = 0;
                for (part, trits) in [(&b[..32], 5), (&b[32..48], 5), (&b[48..52], 4)] {
                    for n in 0..trits {
                        for &byte in part {
                            y[at] = d * (tq1_trit(byte, n) as i32 - 1) as f32;
                            at += 1;
                        }
                    }
                }
            }
            TQ2_0 => {
                let d = half(&b[64..]);
                let mut at = 0;
                for part in [&b[..32], &b[32..64]] {
                    for n in 0..4 {
                        for byte in part {
                            y[at] = d * ((byte >> (2 * n) & 3) as i32 - 1) as f32;
                            at += 1;
                        }
                    }
                }
            }
            I2_S => {
                for n in 0..4 {
                    for j in 0..32 {
                        y[32 * n + j] = tensor * ((b[j] >> (6 - 2 * n) & 3) as i32 - 1) as f32;
                    }
                }
            }
            L1 | L2 | L3 => {
                let (d, m, n) = (half(b), half(&b[2..]), ty as usize - 1000);
                let stream = u128::from_le_bytes; // 128 codes of n bits: n words of 128 bits
                let word = |i: usize| stream(b[4 + 16 * i..][..16].try_into().expect("16 bytes"));
                for (k, y) in y.iter_mut().enumerate() {
                    let bit = |i: usize| (word((n * k + i) / 128) >> ((n * k + i) % 128) & 1) as u32;
                    *y = d * (0..n).map(|i| bit(i) << i).sum::<u32>() as f32 + m;
                }
            }
            _ => {
                let (bits, _) = ty.zero_point().expect("all others were named");
                let d = if ty.has_wide_scale() { f32::from_bits(wide_scale(b)) } else { half(b) };
                let (z, codes) = (zero_of(ty, b), &b[ty.zero_at() + 1..]);
                for (k, y) in y.iter_mut().enumerate() {
                    let bit = |i: usize| (codes[i / 8] >> (i % 8) & 1) as i32;
                    *y = d * ((0..bits).map(|i| bit(bits * k + i) << i).sum::<i32>() - z) as f32;
                }
            }
        }
    }
    Ok(())
}

/// What digit k of a codebook's entry is worth.
fn digit(entry: u64, k: usize, values: &[f32]) -> f32 {
    values[(entry >> (8 * k) & 255) as usize]
}

fn sign(signs: u8, k: usize) -> f32 {
    if signs >> k & 1 != 0 {
        -1.0
    } else {
        1.0
    }
}
