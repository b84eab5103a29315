//! Tests of the numerics through the crate's public interface: what packing keeps, that every instruction set and thread
//! count gives the same bits, and that those bits are the specified ones.

mod attention;
mod goldens;
mod matmul;
mod ops;
mod pack;
mod pool;

use lutra_kernels::SourceType;

/// SplitMix64: seeded, the same everywhere.
pub struct Random(pub u64);

impl Random {
    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.word() % n as u64) as usize
    }

    pub fn tokens(&mut self, n: usize, vocab: usize) -> Vec<u32> {
        (0..n).map(|_| self.below(vocab) as u32).collect()
    }

    /// In −1 .. 1.
    pub fn float(&mut self) -> f32 {
        (self.word() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.float()).collect()
    }

    pub fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.word() as u8).collect()
    }
}

/// Of the longest loops only every n-th case is run: `LUTRA_TEST_STRIDE`, for emulators.
pub fn stride() -> usize {
    std::env::var("LUTRA_TEST_STRIDE").map_or(1, |n| n.parse().expect("LUTRA_TEST_STRIDE is a number"))
}

/// The same bits, or NaN both: which NaN comes out of NaNs is not specified.
pub fn same(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan()
}

#[track_caller]
pub fn assert_same(a: &[f32], b: &[f32], what: &str) {
    assert_eq!(a.len(), b.len(), "{what}: lengths");
    for (i, (&x, &y)) in a.iter().zip(b).enumerate() {
        assert!(same(x, y), "{what}: element {i} is {x:?} ({:08x}) and {y:?} ({:08x})", x.to_bits(), y.to_bits());
    }
}

/// Where a block's f16 scale d is, and its m or dmin if it has one; `None` for types with other scales or none.
fn scale_at(ty: SourceType) -> Option<(usize, Option<usize>)> {
    use SourceType::*;
    match ty {
        F32 | F16 | BF16 | MXFP4 | I2_S | IQ1_M | Z2_32F | Z3_32F | Z4_32F | Z8_32F => None,
        Q4_0 | Q5_0 | Q8_0 | IQ4_NL | IQ4_XS | IQ1_S | IQ2_XXS | IQ2_XS | IQ2_S | IQ3_XXS | IQ3_S => Some((0, None)),
        Q4_1 | Q5_1 | Q4_K | Q5_K | L1 | L2 | L3 => Some((0, Some(2))),
        Q2_K => Some((80, Some(82))),
        Q3_K => Some((108, None)),
        Q6_K => Some((208, None)),
        TQ1_0 => Some((52, None)),
        TQ2_0 => Some((64, None)),
        _ => Some((0, None)),
    }
}

/// A block's d and, if it has one, its m or dmin, as bits of half floats.
pub fn scales(ty: SourceType, block: &[u8]) -> Option<(u16, Option<u16>)> {
    let half = |at: usize| u16::from_le_bytes([block[at], block[at + 1]]);
    if ty == SourceType::IQ1_M {
        return Some(((0..4).fold(0, |d, i| d | (half(48 + 2 * i) >> 12) << (4 * i)), None));
    }
    scale_at(ty).map(|(d, min)| (half(d), min.map(half)))
}

/// Gives a block another d and m, if it has them.
pub fn set_scales(ty: SourceType, block: &mut [u8], d: u16, m: u16) {
    if ty == SourceType::IQ1_M {
        for i in 0..4 {
            block[49 + 2 * i] = block[49 + 2 * i] & 15 | ((d >> (4 * i)) as u8) << 4;
        }
    } else if let Some((at, min)) = scale_at(ty) {
        block[at..at + 2].copy_from_slice(&d.to_le_bytes());
        if let Some(at) = min {
            block[at..at + 2].copy_from_slice(&m.to_le_bytes());
        }
    }
}

/// Whether blocks begin with an f32 scale.
pub fn has_wide_scale(ty: SourceType) -> bool {
    matches!(ty, SourceType::Z2_32F | SourceType::Z3_32F | SourceType::Z4_32F | SourceType::Z8_32F)
}

pub fn is_float(ty: SourceType) -> bool {
    matches!(ty, SourceType::F32 | SourceType::F16 | SourceType::BF16)
}

/// How source bytes are made.
#[derive(Clone, Copy, Debug)]
pub enum Weights {
    /// Random codes, scales around 0.01, floats in −1 .. 1.
    Sane,
    /// Random bytes throughout: scales and floats may be NaN, infinite, subnormal.
    Hostile,
    /// This byte throughout, but for a scale of 1 and a minimum of 0.
    Fill(u8),
}

/// Source bytes of a tensor of `count` weights, whole blocks.
pub fn source(ty: SourceType, count: usize, weights: Weights, random: &mut Random) -> Vec<u8> {
    let len = ty.tensor_bytes(1, count).unwrap();
    let mut bytes = match weights {
        Weights::Fill(byte) => vec![byte; len],
        _ => random.bytes(len),
    };
    if let Weights::Hostile = weights {
        return bytes;
    }
    let fill = matches!(weights, Weights::Fill(_));
    // 2^-7 and below, either sign.
    let small = |random: &mut Random| (random.word() & 0x83ff) as u16 | 0x2000;
    for block in bytes.chunks_exact_mut(ty.block_bytes()) {
        match (ty, scales(ty, block)) {
            (_, Some(_)) if fill => set_scales(ty, block, 0x3c00, 0),
            (_, Some(_)) => {
                let d = small(random);
                set_scales(ty, block, d, small(random));
            }
            (ty, _) if has_wide_scale(ty) => {
                let d = if fill { 1.0 } else { random.float() / 64.0 };
                block[..4].copy_from_slice(&d.to_le_bytes());
            }
            (SourceType::MXFP4, _) => block[0] = if fill { 128 } else { 118 + random.below(6) as u8 },
            (SourceType::F32, _) if !fill => block.copy_from_slice(&random.float().to_le_bytes()),
            // Of the top bits: a half float of exponent 2^-15 .. 2^0, a bfloat16 of the value.
            (SourceType::F16, _) if !fill => block.copy_from_slice(&(random.word() as u16 & 0xbbff).to_le_bytes()),
            (SourceType::BF16, _) if !fill => {
                block.copy_from_slice(&((random.float().to_bits() >> 16) as u16).to_le_bytes())
            }
            _ => {}
        }
    }
    if ty == SourceType::I2_S {
        let at = len - 32;
        bytes[at..at + 4].copy_from_slice(&if fill { 1f32 } else { random.float() / 64.0 }.to_le_bytes());
    }
    bytes
}
