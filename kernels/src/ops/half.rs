//! Half floats and bfloat16.

use super::{load_f16_or_zeros, load_or_zeros, store_within};
use crate::arch::vector::Vector;

/// The exact value of a half float. A NaN becomes quiet, as hardware makes it.
pub(crate) fn f16_to_f32(bits: u16) -> f32 {
    let sign = (bits as u32 & 0x8000) << 16;
    let exponent = bits as u32 >> 10 & 31;
    let mantissa = bits as u32 & 0x3ff;
    match (exponent, mantissa) {
        (0, _) => {
            // Zero or subnormal: mantissa · 2^−24, exact in f32.
            let magnitude = mantissa as f32 * f32::from_bits((127 - 24) << 23);
            f32::from_bits(sign | magnitude.to_bits())
        }
        (31, 0) => f32::from_bits(sign | 0x7f80_0000),
        (31, _) => f32::from_bits(sign | 0x7fc0_0000 | mantissa << 13),
        _ => f32::from_bits(sign | (exponent + 127 - 15) << 23 | mantissa << 13),
    }
}

/// The nearest half float, ties to even; magnitudes from 65520 up become infinite, NaN stays NaN (quiet).
pub(crate) fn f32_to_f16(value: f32) -> u16 {
    let bits = value.to_bits();
    let sign = (bits >> 16 & 0x8000) as u16;
    let magnitude = bits & 0x7fff_ffff;
    if magnitude > 0x7f80_0000 {
        return sign | 0x7e00 | (magnitude >> 13 & 0x3ff) as u16;
    }
    if magnitude >= 0x4780_0000 {
        return sign | 0x7c00; // 2^16 and above
    }
    // The bits to keep, and how many are dropped: 13, or more for what will be subnormal (below 2^−14).
    let exponent = magnitude >> 23;
    let (kept, dropped) = if exponent > 112 {
        (magnitude - (112 << 23), 13)
    } else {
        (magnitude & 0x7f_ffff | 0x80_0000, 126 - exponent)
    };
    if dropped > 24 {
        return sign; // below half of the smallest subnormal
    }
    let (floor, rest, tie) = (kept >> dropped, kept & ((1 << dropped) - 1), 1 << (dropped - 1));
    // A carry out of the mantissa raises the exponent, up to infinity, as it should.
    sign | (floor + (rest > tie || rest == tie && floor & 1 == 1) as u32) as u16
}

/// The exact value of a bfloat16.
pub(crate) fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits((bits as u32) << 16)
}

#[inline(always)]
pub(crate) unsafe fn to_f16<V: Vector>(x: &[f32], out: &mut [u16]) {
    for i in (0..x.len()).step_by(8) {
        let v = load_or_zeros::<V>(x, i);
        if i + 8 <= x.len() {
            v.store_f16(out.as_mut_ptr().add(i));
        } else {
            let mut padded = [0u16; 8];
            v.store_f16(padded.as_mut_ptr());
            for (to, from) in out[i..].iter_mut().zip(padded) {
                *to = from;
            }
        }
    }
}

#[inline(always)]
pub(crate) unsafe fn from_f16<V: Vector>(x: &[u16], out: &mut [f32]) {
    for i in (0..x.len()).step_by(8) {
        store_within(load_f16_or_zeros::<V>(x, i), out, i);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_float_survives_f32() {
        for bits in 0..=u16::MAX {
            let value = f16_to_f32(bits);
            let quiet = if value.is_nan() { bits | 0x200 } else { bits };
            assert_eq!(f32_to_f16(value), quiet);
        }
    }

    #[test]
    fn rounding_is_to_nearest_even_between_every_two_half_floats() {
        for bits in 0..0x7bffu16 {
            let (low, high) = (f16_to_f32(bits) as f64, f16_to_f32(bits + 1) as f64);
            let middle = ((low + high) / 2.0) as f32; // exact: one more bit of mantissa
            let even = if bits & 1 == 0 { bits } else { bits + 1 };
            assert_eq!(f32_to_f16(middle), even, "{middle:e}");
            assert_eq!(f32_to_f16(f32::from_bits(middle.to_bits() - 1)), bits, "below {middle:e}");
            assert_eq!(f32_to_f16(f32::from_bits(middle.to_bits() + 1)), bits + 1, "above {middle:e}");
            assert_eq!(f32_to_f16(-middle), even | 0x8000);
        }
        assert_eq!(f32_to_f16(65519.996), 0x7bff);
        assert_eq!(f32_to_f16(65520.0), 0x7c00);
        assert_eq!(f32_to_f16(f32::MAX), 0x7c00);
        assert_eq!(f32_to_f16(f32::from_bits(1)), 0);
    }
}
