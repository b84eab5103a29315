//! Block types of model files (ggml's), as they are stored.

use super::FloatKind;
use crate::error::{Error, Result};
use crate::ops::{bf16_to_f32, f16_to_f32};

/// A tensor type of the file, by its ggml id. Scales (`d`) are f16.
#[allow(non_camel_case_types)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum SourceType {
    F32 = 0,
    F16 = 1,
    /// 32 weights d·(q − 8): d, then 16 bytes; weight i in the low nibble of byte i, weight 16 + i in the high one.
    Q4_0 = 2,
    /// 32 weights d·q: d, then 32 signed bytes.
    Q8_0 = 8,
    BF16 = 30,
    /// 256 weights d·(t − 1): 48 bytes of five trits, 4 bytes of four trits, d.
    TQ1_0 = 34,
    /// 256 weights d·(q − 1): 64 bytes of four 2-bit codes, d.
    TQ2_0 = 35,
}

impl SourceType {
    pub const ALL: [SourceType; 7] = [
        SourceType::F32,
        SourceType::F16,
        SourceType::Q4_0,
        SourceType::Q8_0,
        SourceType::BF16,
        SourceType::TQ1_0,
        SourceType::TQ2_0,
    ];

    pub fn from_ggml(id: u32) -> Result<Self> {
        let known = Self::ALL.into_iter().find(|ty| *ty as u32 == id);
        known.ok_or_else(|| Error::unsupported(format!("tensor type {id} is not supported")))
    }

    /// Weights in a block.
    pub fn block_elements(self) -> usize {
        match self {
            SourceType::F32 | SourceType::F16 | SourceType::BF16 => 1,
            SourceType::Q4_0 | SourceType::Q8_0 => 32,
            SourceType::TQ1_0 | SourceType::TQ2_0 => 256,
        }
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        match self {
            SourceType::F32 => 4,
            SourceType::F16 | SourceType::BF16 => 2,
            SourceType::Q4_0 => 18,
            SourceType::Q8_0 => 34,
            SourceType::TQ1_0 => 54,
            SourceType::TQ2_0 => 66,
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
}

/// One float weight.
pub(super) fn float(kind: FloatKind, bytes: &[u8]) -> f32 {
    match kind {
        FloatKind::F32 => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
        FloatKind::F16 => f16_to_f32(u16::from_le_bytes([bytes[0], bytes[1]])),
        FloatKind::Bf16 => bf16_to_f32(u16::from_le_bytes([bytes[0], bytes[1]])),
    }
}

const POWERS_OF_3: [u8; 5] = [1, 3, 9, 27, 81];

/// Trit `n` of a TQ1_0 byte, as ggml reads it, for every byte value.
fn tq1_trit(byte: u8, n: usize) -> u8 {
    ((byte.wrapping_mul(POWERS_OF_3[n]) as u16 * 3) >> 8) as u8
}

/// Splits a block of a quantised type: its codes in the order of k (unsigned, or two's complement for Q8_0), and the bits
/// of its f16 scale.
pub(super) fn codes(ty: SourceType, block: &[u8], codes: &mut [u8]) -> u16 {
    let scale = |at: usize| u16::from_le_bytes([block[at], block[at + 1]]);
    match ty {
        SourceType::Q4_0 => {
            for (i, byte) in block[2..18].iter().enumerate() {
                codes[i] = byte & 15;
                codes[16 + i] = byte >> 4;
            }
            scale(0)
        }
        SourceType::Q8_0 => {
            codes.copy_from_slice(&block[2..34]);
            scale(0)
        }
        SourceType::TQ1_0 => {
            for (k, code) in codes.iter_mut().enumerate() {
                // 32 bytes of five trits, 16 bytes of five, 4 bytes of four; trits of a part are the slow index.
                let (byte, n) = match k {
                    0..160 => (k % 32, k / 32),
                    160..240 => (32 + (k - 160) % 16, (k - 160) / 16),
                    _ => (48 + (k - 240) % 4, (k - 240) / 4),
                };
                *code = tq1_trit(block[byte], n);
            }
            scale(52)
        }
        SourceType::TQ2_0 => {
            for (k, code) in codes.iter_mut().enumerate() {
                *code = block[k / 128 * 32 + k % 32] >> (2 * (k / 32 % 4)) & 3;
            }
            scale(64)
        }
        SourceType::F32 | SourceType::F16 | SourceType::BF16 => unreachable!("float weights have no codes"),
    }
}

/// The weights of whole source blocks, by ggml's own formulas and loops: the reference that packing is tested against.
pub fn dequantize(ty: SourceType, src: &[u8], out: &mut [f32]) -> Result<()> {
    let blocks = out.len() / ty.block_elements();
    if out.len() % ty.block_elements() != 0 || blocks.checked_mul(ty.block_bytes()) != Some(src.len()) {
        return Err(Error::argument(format!("{} bytes are not {} {ty:?} weights", src.len(), out.len())));
    }
    let half = |bytes: &[u8]| f16_to_f32(u16::from_le_bytes([bytes[0], bytes[1]]));
    for (b, y) in src.chunks_exact(ty.block_bytes()).zip(out.chunks_exact_mut(ty.block_elements())) {
        match ty {
            SourceType::F32 => y[0] = float(FloatKind::F32, b),
            SourceType::F16 => y[0] = float(FloatKind::F16, b),
            SourceType::BF16 => y[0] = float(FloatKind::Bf16, b),
            SourceType::Q4_0 => {
                let d = half(b);
                for j in 0..16 {
                    y[j] = d * ((b[2 + j] & 15) as i32 - 8) as f32;
                    y[j + 16] = d * ((b[2 + j] >> 4) as i32 - 8) as f32;
                }
            }
            SourceType::Q8_0 => {
                let d = half(b);
                for j in 0..32 {
                    y[j] = d * b[2 + j] as i8 as f32;
                }
            }
            SourceType::TQ1_0 => {
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
            SourceType::TQ2_0 => {
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
        }
    }
    Ok(())
}
