//! Several rows of activations at once: the codes of up to 256 k of a tile are decoded to signed bytes once, in memory that
//! stays in the L1 cache, and all activations pass by in blocks whose sums fill the registers.
//!
//! A line of decoded values has four neighbouring k of the tile's 16 rows, as the codes have. With dot products one instruction
//! multiplies a register of it, four rows, with four activations; without, products are summed as halves as long as those hold
//! them. Offsets and zero points are in the values, and of Q2_K the sub-scales too: 3·15 fits a byte. Of all others the sum of
//! a sub is multiplied by its scale. So a group's sum is the integer that every other kernel has.
//!
//! What limits is how many of these instructions a cycle takes, two of 16 products on a Cortex-A76, one of 8 on an A72, and with
//! groups of 32 the four that turn four sums into parts of floats, for every eight of the former.

use super::neon::{add_products, as_bytes, broadcast, products, sdot, Rows};
use crate::arch::dot::{self, Dot};
use crate::dispatch::Variant;
use crate::matmul::{TileArgs, TileKernel, TileOut, BATCH};
use crate::pack::fields::{UNIT, WORD};
use crate::pack::{Codes, PackedForm, ScaleKind, Values, FIELD_TILE};
use std::arch::aarch64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

/// The variant that this kernel is. It leaves fewer rows than `LEAST` to the form's other one.
pub(super) const fn variant(tile: TileKernel) -> Variant {
    Variant { name: "panel", tile, tiles: 1, widths: &[BATCH, 32, 16], tables: false, blocks: false }
}

/// Fewer rows of activations do not make up for decoding.
pub(super) const LEAST: usize = 4;

/// k that are decoded at once: no group is larger.
const CHUNK: usize = 256;
/// Subs of a chunk at most.
const SUBS: usize = CHUNK / 16;
/// Registers of a line.
const REGISTERS: usize = FIELD_TILE / 4;

/// A chunk of a tile.
#[repr(align(64))]
pub(super) struct Panel {
    /// Four neighbouring k of each row in a line.
    values: [[i8; WORD]; CHUNK / 4],
    /// What the sums of subs, as `Multiply` has them, are multiplied by, and minima of four subs of each row in a line.
    sub_scales: [[i32; FIELD_TILE]; SUBS],
    sub_minima: [[i8; WORD]; SUBS / 4],
    /// Of each group.
    scales: [[f32; FIELD_TILE]; CHUNK / UNIT],
    minima: [[f32; FIELD_TILE]; CHUNK / UNIT],
}

/// Decodes group `g` of a chunk, whose first byte is at `group`.
///
/// # Safety
///
/// The machine has NEON, a group of the decoder's form is at `group`, and `panel` may be written to.
type Decode = unsafe fn(args: &TileArgs, group: *const u8, g: usize, panel: *mut Panel);

/// Adds the products of the chunk's groups with rows `first + j ..` of the activations to `out`.
///
/// # Safety
///
/// The machine has the instructions, `args` is as `dot::check` wants it, and the groups of the form that this multiplies are in
/// `panel`.
pub(super) type Multiply = unsafe fn(args: &TileArgs, chunk: Range<usize>, panel: *const Panel, out: &mut TileOut);

/// How sums become products, for `Multiply`: sums of groups as they are; with a minimum of the group; with minima of the subs;
/// sums of subs by their scales; these with minima of the subs.
pub(super) const FLAT: u8 = 0;
pub(super) const FLAT_MIN: u8 = 1;
pub(super) const SCALED_MINIMA: u8 = 2;
pub(super) const SUB: u8 = 3;
pub(super) const SUB_MINIMA: u8 = 4;

const fn has_subs(kind: u8) -> bool {
    matches!(kind, SUB | SUB_MINIMA)
}

/// What decodes a form, how its sums become products, and over how many fours of k a sum may go. `None` if panels do not serve
/// the form, as where without dot products the sum of a sub does not fit a half.
pub(super) fn decoder(form: PackedForm, dotprod: bool) -> Option<(Decode, u8, usize)> {
    use dot::{E8M0, F16, F16_MIN, F16_ZERO4, F32_ZERO4, SUB4_MIN, SUB6, SUB6_MIN, SUB6_OF_32, SUB8, TENSOR};
    use dot::{IQ1, IQ2, IQ3_S, IQ3_XXS, IQ4_NL, MXFP4};
    use ScaleKind as S;
    let group = form.group as usize;
    if group == 0 || group % UNIT != 0 || group > CHUNK {
        return None;
    }
    let (decode, kind, step): (Decode, u8, usize) = match (form.codes, form.values, form.scale) {
        (Codes::Fields(1), Values::Offset(_), S::F16Min) => (decode_flat::<1, F16_MIN>, FLAT_MIN, 0),
        (Codes::Fields(2), Values::Offset(_), S::F16) => (decode_flat::<2, F16>, FLAT, 0),
        (Codes::Fields(2), Values::Offset(_), S::Tensor) => (decode_flat::<2, TENSOR>, FLAT, 0),
        (Codes::Fields(2), Values::Offset(_), S::F16Min) => (decode_flat::<2, F16_MIN>, FLAT_MIN, 0),
        (Codes::Fields(3), Values::Offset(_), S::F16Min) => (decode_flat::<3, F16_MIN>, FLAT_MIN, 0),
        (Codes::Fields(4), Values::Offset(_), S::F16) => (decode_flat::<4, F16>, FLAT, 0),
        (Codes::Fields(4), Values::Offset(_), S::F16Min) => (decode_flat::<4, F16_MIN>, FLAT_MIN, 0),
        (Codes::Fields(4), Values::Iq4Nl, S::F16) => (decode_flat::<IQ4_NL, F16>, FLAT, 0),
        (Codes::Fields(4), Values::Mxfp4, S::E8M0) => (decode_flat::<MXFP4, E8M0>, FLAT, 0),
        (Codes::Fields(5), Values::Offset(_), S::F16) => (decode_flat::<5, F16>, FLAT, 0),
        (Codes::Fields(5), Values::Offset(_), S::F16Min) => (decode_flat::<5, F16_MIN>, FLAT_MIN, 0),
        (Codes::Fields(8), Values::Offset(_), S::F16) => (decode_flat::<8, F16>, FLAT, 0),
        (Codes::Fields(2), Values::Offset(_), S::F16Zero4) => (decode_flat::<2, F16_ZERO4>, FLAT, 0),
        (Codes::Fields(3), Values::Offset(_), S::F16Zero4) => (decode_flat::<3, F16_ZERO4>, FLAT, 0),
        (Codes::Fields(4), Values::Offset(_), S::F16Zero4) => (decode_flat::<4, F16_ZERO4>, FLAT, 0),
        (Codes::Fields(2), Values::Offset(_), S::F32Zero4) => (decode_flat::<2, F32_ZERO4>, FLAT, 0),
        (Codes::Fields(3), Values::Offset(_), S::F32Zero4) => (decode_flat::<3, F32_ZERO4>, FLAT, 0),
        (Codes::Fields(4), Values::Offset(_), S::F32Zero4) => (decode_flat::<4, F32_ZERO4>, FLAT, 0),
        (Codes::Fields(2), Values::Offset(_), S::Sub4Min) => (decode_nested::<2, SUB4_MIN, 16>, SCALED_MINIMA, 0),
        (Codes::Fields(3), Values::Offset(_), S::Sub6) => (decode_nested::<3, SUB6, 16>, SUB, 16),
        (Codes::Fields(4), Values::Offset(_), S::Sub6Min) => (decode_nested::<4, SUB6_MIN, 32>, SUB_MINIMA, 32),
        (Codes::Fields(5), Values::Offset(_), S::Sub6Min) if dotprod => {
            (decode_nested::<5, SUB6_MIN, 32>, SUB_MINIMA, 32)
        }
        (Codes::Fields(5), Values::Offset(_), S::Sub6Min) => (decode_nested::<5, SUB6_MIN, 16>, SUB_MINIMA, 16),
        (Codes::Fields(6), Values::Offset(_), S::Sub8) => (decode_nested::<6, SUB8, 16>, SUB, 16),
        (Codes::Trits, Values::Offset(_), S::F16) => (decode_trits, FLAT, 0),
        (Codes::Fields(3), Values::Iq1, S::Sub6Of32) => (decode_nested::<IQ1, SUB6_OF_32, 32>, SUB, 32),
        (Codes::Fields(3), Values::Iq1, S::Sub6) => (decode_nested::<IQ1, SUB6, 16>, SUB, 16),
        (Codes::Fields(3), Values::Iq2, S::Sub6Of32) => (decode_nested::<IQ2, SUB6_OF_32, 32>, SUB, 32),
        (Codes::Fields(3), Values::Iq2, S::Sub6) => (decode_nested::<IQ2, SUB6, 16>, SUB, 16),
        (Codes::Fields(4), Values::Iq3Xxs, S::Sub6Of32) => (decode_nested::<IQ3_XXS, SUB6_OF_32, 32>, SUB, 32),
        (Codes::Fields(4), Values::Iq3S, S::Sub6Of32) => (decode_nested::<IQ3_S, SUB6_OF_32, 32>, SUB, 32),
        (Codes::Fields(4), Values::Iq4Nl, S::Sub6Of32) => (decode_nested::<IQ4_NL, SUB6_OF_32, 32>, SUB, 32),
        _ => return None,
    };
    let largest = match form.scale {
        S::F16Zero4 | S::F32Zero4 => 16,
        S::Sub4Min => 3 * 15,
        _ => form.largest_value() as usize,
    };
    let steps = match kind {
        SUB | SUB_MINIMA => step / 4,
        _ if dotprod => 8,
        _ => [8, 4, 2].into_iter().find(|steps| fits(steps * largest)).unwrap_or(1),
    };
    // No such form is in use.
    let served = dotprod || fits(steps * largest) && (kind != FLAT_MIN || steps >= 4);
    served.then_some((decode, kind, steps))
}

/// Whether a half holds two sums of products of values, which add up to this, and activations.
fn fits(values: usize) -> bool {
    2 * 127 * values <= i16::MAX as usize
}

/// The offset in every byte.
#[inline(always)]
unsafe fn offset(form: PackedForm) -> int8x16_t {
    match form.values {
        Values::Offset(offset) => vdupq_n_s8(offset),
        _ => vdupq_n_s8(0),
    }
}

#[inline(always)]
unsafe fn put(panel: *mut Panel, line: usize, register: usize, values: int8x16_t) {
    vst1q_s8((&raw mut (*panel).values).cast::<i8>().add(line * WORD + 16 * register), values);
}

/// # Safety
///
/// `Decode`'s, for a form of these codes and scales.
#[target_feature(enable = "neon")]
unsafe fn decode_flat<const CODES: u8, const SCALE: u8>(
    args: &TileArgs,
    group: *const u8,
    g: usize,
    panel: *mut Panel,
) {
    let units = args.form.group as usize / UNIT;
    let scales = group.add(units * dot::width(CODES) * WORD);
    for register in 0..REGISTERS {
        let mut offset = offset(args.form);
        if dot::has_zeros(SCALE) {
            let zero = dot::zeros::<Rows<false>, SCALE>(scales, register);
            offset = vsubq_s8(offset, as_bytes(vmulq_n_s32(zero, 0x0101_0101)));
        }
        for unit in 0..units {
            let at = group.add(unit * dot::width(CODES) * WORD);
            if register == 0 {
                dot::prefetch::<Rows<false>, 1>(at, dot::width(CODES));
            }
            let codes = dot::decode::<Rows<false>, CODES>(at.add(16 * register));
            for i in 0..8 {
                put(panel, (g * units + unit) * 8 + i, register, vaddq_s8(as_bytes(codes[i]), offset));
            }
        }
    }
    decode_scales::<SCALE>(args, scales, g, 1.0, panel);
}

/// Scales, times `unit`, and minima of a group, which are at `scales`.
#[inline(always)]
unsafe fn decode_scales<const SCALE: u8>(args: &TileArgs, scales: *const u8, g: usize, unit: f32, panel: *mut Panel) {
    dot::prefetch::<Rows<false>, 1>(scales, 1);
    for register in 0..REGISTERS {
        let mut d = dot::scale::<Rows<false>, SCALE>(args, scales, register);
        if unit != 1.0 {
            d = vmulq_n_f32(d, unit);
        }
        vst1q_f32((&raw mut (*panel).scales[g]).cast::<f32>().add(4 * register), d);
        if SCALE == dot::F16_MIN || dot::has_sub_minima(SCALE) {
            let min = Rows::<false>::load_half(scales.add(2 * (FIELD_TILE + 4 * register)));
            vst1q_f32((&raw mut (*panel).minima[g]).cast::<f32>().add(4 * register), min);
        }
    }
}

/// # Safety
///
/// `Decode`'s, for a form of trits with an f16 scale.
#[target_feature(enable = "neon")]
unsafe fn decode_trits(args: &TileArgs, group: *const u8, g: usize, panel: *mut Panel) {
    let lines = args.form.group as usize / 4;
    let words = lines.div_ceil(5);
    let offset = offset(args.form);
    for word in 0..words {
        let at = group.add(word * WORD);
        dot::prefetch::<Rows<false>, 1>(at, 1);
        for register in 0..REGISTERS {
            // Negated.
            let digits = Rows::<false>::digits(Rows::<false>::load(at.add(16 * register)));
            // The last word's digits beyond the group have no place.
            for i in 0..5.min(lines - 5 * word) {
                put(panel, g * lines + 5 * word + i, register, vsubq_s8(offset, as_bytes(digits[i])));
            }
        }
    }
    decode_scales::<{ dot::F16 }>(args, group.add(words * WORD), g, 1.0, panel);
}

/// Groups with subs, whose scales it writes for every `STEP` k: as many as subs have, or half.
///
/// # Safety
///
/// `Decode`'s, for a form of these codes and scales.
#[target_feature(enable = "neon")]
unsafe fn decode_nested<const CODES: u8, const SCALE: u8, const STEP: usize>(
    args: &TileArgs,
    group: *const u8,
    g: usize,
    panel: *mut Panel,
) {
    debug_assert!(g == 0);
    let (sub, words) = (dot::sub(SCALE), dot::sub_words(SCALE));
    let offset = offset(args.form);
    dot::prefetch::<Rows<false>, 1>(group, words);
    for quad in 0..CHUNK / sub / 4 {
        for register in 0..REGISTERS {
            let (s, m) = dot::sub_scales::<Rows<false>, SCALE>(group.add(16 * register), quad);
            // Subs 4·quad, + 2, + 1, + 3 of a row lie side by side; here they are in order.
            if dot::has_sub_minima(SCALE) {
                const ORDER: [u8; 16] = [0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15];
                let minima = vqtbl1q_s8(as_bytes(m), vld1q_u8(ORDER.as_ptr()));
                vst1q_s8((&raw mut (*panel).sub_minima).cast::<i8>().add(quad * WORD + 16 * register), minima);
            }
            for i in 0..4 {
                let byte = [0, 2, 1, 3][i];
                let scale = vandq_s32(Rows::<false>::shr(s, 8 * byte), vdupq_n_s32(255));
                let scale = vsubq_s32(scale, vdupq_n_s32(dot::bias(SCALE)));
                // For Q2_K.
                let factor = as_bytes(vmulq_n_s32(scale, 0x0101_0101));
                for k in (0..sub).step_by(16) {
                    if k % STEP == 0 && CODES != 2 {
                        let to = (&raw mut (*panel).sub_scales).cast::<i32>();
                        vst1q_s32(to.add(((4 * quad + i) * sub + k) / STEP * FIELD_TILE + 4 * register), scale);
                    }
                    let at = (4 * quad + i) * sub + k;
                    let unit = group.add((words + at / UNIT * dot::width(CODES)) * WORD);
                    if register == 0 && at % UNIT == 0 {
                        dot::prefetch::<Rows<false>, 1>(unit, dot::width(CODES));
                    }
                    for step in 0..4 {
                        let code = dot::code::<Rows<false>, CODES>(unit.add(16 * register), at % UNIT / 4 + step);
                        let mut value = vaddq_s8(as_bytes(code), offset);
                        if CODES == 2 {
                            value = vmulq_s8(value, factor);
                        }
                        put(panel, at / 4 + step, register, value);
                    }
                }
            }
        }
    }
    let scales = group.add((words + 8 * dot::width(CODES)) * WORD);
    decode_scales::<SCALE>(args, scales, g, dot::table_values(CODES).unit(), panel);
}

/// The kernel, for a form with a decoder.
///
/// # Safety
///
/// `TileKernel`'s; `multiply` is for what `decoder` says of the form, and the machine has its instructions.
pub(super) unsafe fn tile(args: &TileArgs, decode: Decode, multiply: Multiply, out: &mut TileOut) {
    let groups = dot::check(args, 0, args.count);
    assert!(args.tiles == 1);
    let (in_chunk, group_bytes) = (CHUNK / args.form.group as usize, args.form.group_tile_bytes());
    for sums in &mut out[..args.count] {
        sums[..FIELD_TILE].fill(0.0);
    }
    // Not initialised as a whole: what a form has no use for is never written, nor read.
    let mut panel = MaybeUninit::<Panel>::uninit();
    for first in (0..groups).step_by(in_chunk) {
        let chunk = first..groups.min(first + in_chunk);
        for g in chunk.clone() {
            decode(args, args.tile.as_ptr().add(g * group_bytes), g - first, panel.as_mut_ptr());
        }
        multiply(args, chunk, panel.as_ptr(), out);
    }
}

/// `Multiply` in blocks of as many rows as registers hold sums of.
#[inline(always)]
pub(super) unsafe fn multiply<const DOTPROD: bool, const KIND: u8, const STEPS: usize>(
    args: &TileArgs,
    chunk: Range<usize>,
    panel: *const Panel,
    out: &mut TileOut,
) {
    let mut j = 0;
    while j < args.count {
        match args.count - j {
            4.. if DOTPROD && has_subs(KIND) => {
                block::<DOTPROD, KIND, STEPS, 4, 2>(args, &chunk, panel, j, out);
                j += 4;
            }
            4.. if DOTPROD => {
                block::<DOTPROD, KIND, STEPS, 4, 4>(args, &chunk, panel, j, out);
                j += 4;
            }
            2.. => {
                block::<DOTPROD, KIND, STEPS, 2, 4>(args, &chunk, panel, j, out);
                j += 2;
            }
            _ => {
                block::<DOTPROD, KIND, STEPS, 1, 4>(args, &chunk, panel, j, out);
                j += 1;
            }
        }
    }
}

/// Rows `first + j .. + M` of the activations, `R` registers of a line at a time.
#[inline(always)]
unsafe fn block<const DOTPROD: bool, const KIND: u8, const STEPS: usize, const M: usize, const R: usize>(
    args: &TileArgs,
    chunk: &Range<usize>,
    panel: *const Panel,
    j: usize,
    out: &mut TileOut,
) {
    let (size, row) = (args.form.group as usize, args.first + j);
    let groups = args.k / size;
    for group in chunk.clone() {
        let g = group - chunk.start;
        let a = args.codes.as_ptr().add(row * args.k + group * size);
        for first in (0..REGISTERS).step_by(R) {
            let values = (&raw const (*panel).values).cast::<i8>().add(g * size / 4 * WORD + 16 * first);
            let sub_scales = (&raw const (*panel).sub_scales).cast::<i32>().add(4 * first);
            // Where no sums of subs are scaled, the sum is at most 256·128·127 < 2^22: added to the bits of 1.5·2^23 it counts
            // units in the last place.
            const BASE: f32 = 12_582_912.0;
            let start = if has_subs(KIND) { 0 } else { BASE.to_bits() as i32 };
            let sums = integers::<DOTPROD, KIND, STEPS, M, R>(start, a, args.k, size, values, sub_scales);
            let scales = (&raw const (*panel).scales[g]).cast::<f32>().add(4 * first);
            let minima = (&raw const (*panel).minima[g]).cast::<f32>().add(4 * first);
            for m in 0..M {
                let at = (row + m) * groups + group;
                let d_a = *args.scales.get_unchecked(at);
                let out = out.get_unchecked_mut(j + m).as_mut_ptr().add(4 * first);
                let minima_sums = if matches!(KIND, SCALED_MINIMA | SUB_MINIMA) {
                    let sub_minima = (&raw const (*panel).sub_minima).cast::<i8>().add(16 * first);
                    minima_sums::<DOTPROD, KIND, R>(args.sub_sums.as_ptr(), at, sub_minima)
                } else {
                    [vdupq_n_s32(0); R]
                };
                for r in 0..R {
                    let mut acc = vld1q_f32(out.add(4 * r));
                    let sum = if has_subs(KIND) {
                        vcvtq_f32_s32(sums[m][r])
                    } else {
                        vsubq_f32(vreinterpretq_f32_s32(sums[m][r]), vdupq_n_f32(BASE))
                    };
                    acc = vfmaq_f32(acc, vmulq_n_f32(vld1q_f32(scales.add(4 * r)), d_a), sum);
                    if matches!(KIND, FLAT_MIN | SCALED_MINIMA | SUB_MINIMA) {
                        let sum = if KIND == FLAT_MIN {
                            vdupq_n_f32(*args.sums.get_unchecked(at) as f32)
                        } else {
                            vcvtq_f32_s32(vnegq_s32(minima_sums[r]))
                        };
                        acc = vfmaq_f32(acc, vmulq_n_f32(vld1q_f32(minima.add(4 * r)), d_a), sum);
                    }
                    vst1q_f32(out.add(4 * r), acc);
                }
            }
        }
    }
}

/// Of `M` rows of activations, the first at `a`, and of `R` registers of values: the sums of a group of `size` k, added to `start`. Those of subs times their scales
/// are as large as `dot::nested` says.
#[inline(always)]
unsafe fn integers<const DOTPROD: bool, const KIND: u8, const STEPS: usize, const M: usize, const R: usize>(
    start: i32,
    a: *const i8,
    stride: usize,
    size: usize,
    values: *const i8,
    sub_scales: *const i32,
) -> [[int32x4_t; R]; M] {
    let mut totals = [[vdupq_n_s32(start); R]; M];
    if DOTPROD && !has_subs(KIND) {
        for k in (0..size).step_by(16) {
            dots::<M, R>(&mut totals, a.add(k), stride, values.add(k / 4 * WORD));
        }
        return totals;
    }
    for part in 0..size / (4 * STEPS) {
        let (a, values) = (a.add(part * 4 * STEPS), values.add(part * STEPS * WORD));
        let sub_scales = sub_scales.add(part * FIELD_TILE);
        if DOTPROD {
            let mut sums = [[vdupq_n_s32(0); R]; M];
            for k in (0..4 * STEPS).step_by(16) {
                dots::<M, R>(&mut sums, a.add(k), stride, values.add(k / 4 * WORD));
            }
            for r in 0..R {
                let scale = vld1q_s32(sub_scales.add(4 * r));
                for m in 0..M {
                    totals[m][r] = vmlaq_s32(totals[m][r], sums[m][r], scale);
                }
            }
        } else {
            let sums = halves::<STEPS, M, R>(a, stride, values);
            for r in 0..R {
                for m in 0..M {
                    let pairs = vpaddq_s16(sums[m][r][0], sums[m][r][1]);
                    totals[m][r] = if has_subs(KIND) {
                        vmlaq_s32(totals[m][r], vpaddlq_s16(pairs), vld1q_s32(sub_scales.add(4 * r)))
                    } else {
                        vpadalq_s16(totals[m][r], pairs)
                    };
                }
            }
        }
    }
    totals
}

/// Adds the products of 16 k.
#[inline(always)]
unsafe fn dots<const M: usize, const R: usize>(
    sums: &mut [[int32x4_t; R]; M],
    a: *const i8,
    stride: usize,
    values: *const i8,
) {
    let mut activations = [vdupq_n_s8(0); M];
    for m in 0..M {
        activations[m] = vld1q_s8(a.add(m * stride));
    }
    // LLVM would not unroll it.
    dots_of::<0, M, R>(sums, &activations, values);
    dots_of::<1, M, R>(sums, &activations, values);
    dots_of::<2, M, R>(sums, &activations, values);
    dots_of::<3, M, R>(sums, &activations, values);
}

/// Adds the products of a line and of the four activations in lane `I`.
#[inline(always)]
unsafe fn dots_of<const I: usize, const M: usize, const R: usize>(
    sums: &mut [[int32x4_t; R]; M],
    activations: &[int8x16_t; M],
    values: *const i8,
) {
    for r in 0..R {
        let w = vreinterpretq_s32_s8(vld1q_s8(values.add(I * WORD + 16 * r)));
        for m in 0..M {
            sums[m][r] = sdot(sums[m][r], w, activations[m], I);
        }
    }
}

/// Sums of products of `STEPS` fours of k, without dot products: halves of the first two rows, and of the others.
#[inline(always)]
unsafe fn halves<const STEPS: usize, const M: usize, const R: usize>(
    a: *const i8,
    stride: usize,
    values: *const i8,
) -> [[[int16x8_t; 2]; R]; M] {
    let mut sums = [[[vdupq_n_s16(0); 2]; R]; M];
    halves_of::<true, M, R>(&mut sums, a, stride, values);
    for step in 1..STEPS {
        halves_of::<false, M, R>(&mut sums, a.add(4 * step), stride, values.add(step * WORD));
    }
    sums
}

/// Adds the products of a line and of four activations, the first that there are if `IS_FIRST`.
#[inline(always)]
unsafe fn halves_of<const IS_FIRST: bool, const M: usize, const R: usize>(
    sums: &mut [[[int16x8_t; 2]; R]; M],
    a: *const i8,
    stride: usize,
    values: *const i8,
) {
    let mut activations = [vdupq_n_s8(0); M];
    for m in 0..M {
        let four = a.add(m * stride).cast::<i32>().read_unaligned();
        activations[m] = vreinterpretq_s8_s32(vdupq_n_s32(four));
    }
    for r in 0..R {
        let w = vld1q_s8(values.add(16 * r));
        for m in 0..M {
            sums[m][r] =
                if IS_FIRST { products(w, activations[m]) } else { add_products(sums[m][r], w, activations[m]) };
        }
    }
}

/// Σ m·b of the subs of a group, b the sum of a sub's activations, number `at` of all rows' groups. b is two digits, 128·high + low,
/// |low| ≤ 64 and, as |b| ≤ 32·127, |high| ≤ 32, so that sums are of bytes here, too.
#[inline(always)]
unsafe fn minima_sums<const DOTPROD: bool, const KIND: u8, const R: usize>(
    sub_sums: *const i16,
    at: usize,
    sub_minima: *const i8,
) -> [int32x4_t; R] {
    let subs = if KIND == SCALED_MINIMA { 16 } else { 8 };
    let b = sub_sums.add(at * subs);
    let (mut high, mut low) = ([vdupq_n_s32(0); R], [vdupq_n_s32(0); R]);
    for eight in (0..subs).step_by(8) {
        let b = vld1q_s16(b.add(eight));
        let high_digits = vrshrn_n_s16::<7>(b);
        let digits = vcombine_s8(high_digits, vsub_s8(vmovn_s16(b), vshl_n_s8::<7>(high_digits)));
        for i in 0..2 {
            for r in 0..R {
                let m = vld1q_s8(sub_minima.add((eight / 4 + i) * WORD + 16 * r));
                high[r] = dot_lane::<DOTPROD>(high[r], m, digits, i);
                low[r] = dot_lane::<DOTPROD>(low[r], m, digits, 2 + i);
            }
        }
    }
    for r in 0..R {
        low[r] = vaddq_s32(low[r], vshlq_n_s32::<7>(high[r]));
    }
    low
}

/// Adds products of four bytes of each lane with four digits, those in 32-bit lane `lane`.
#[inline(always)]
unsafe fn dot_lane<const DOTPROD: bool>(
    acc: int32x4_t,
    minima: int8x16_t,
    digits: int8x16_t,
    lane: usize,
) -> int32x4_t {
    if DOTPROD {
        return sdot(acc, vreinterpretq_s32_s8(minima), digits, lane);
    }
    let [low, high] = products(minima, broadcast(digits, lane));
    vpadalq_s16(acc, vpaddq_s16(low, high))
}

/// Defines `PANEL`, the variant of a set with or without dot products, compiled with the features.
macro_rules! panel_kernels {
    ($dotprod:literal, $features:literal) => {
        const PANEL: Variant = panel::variant(panel_tile);

        /// # Safety
        ///
        /// `TileKernel`'s, for a form with a decoder.
        #[target_feature(enable = $features)]
        unsafe fn panel_tile(args: &TileArgs, out: &mut TileOut) {
            use panel::{FLAT, FLAT_MIN, SCALED_MINIMA, SUB, SUB_MINIMA};
            if args.count < panel::LEAST {
                return (dot_variants(args.form)[0].tile)(args, out);
            }
            let (decode, kind, steps) = panel::decoder(args.form, $dotprod).expect("a decoder");
            let multiply: panel::Multiply = match (kind, steps) {
                (FLAT, 8) => multiply::<FLAT, 8>,
                (FLAT, 4) => multiply::<FLAT, 4>,
                (FLAT, 2) => multiply::<FLAT, 2>,
                (FLAT, 1) => multiply::<FLAT, 1>,
                (FLAT_MIN, 8) => multiply::<FLAT_MIN, 8>,
                (FLAT_MIN, 4) => multiply::<FLAT_MIN, 4>,
                (SCALED_MINIMA, 8) => multiply::<SCALED_MINIMA, 8>,
                (SCALED_MINIMA, 2) => multiply::<SCALED_MINIMA, 2>,
                (SUB, 8) => multiply::<SUB, 8>,
                (SUB, 4) => multiply::<SUB, 4>,
                (SUB_MINIMA, 8) => multiply::<SUB_MINIMA, 8>,
                (SUB_MINIMA, 4) => multiply::<SUB_MINIMA, 4>,
                _ => unreachable!("a decoder of {kind} and {steps}"),
            };
            panel::tile(args, decode, multiply, out);
        }

        /// # Safety
        ///
        /// `panel::Multiply`'s.
        #[target_feature(enable = $features)]
        unsafe fn multiply<const KIND: u8, const STEPS: usize>(
            args: &TileArgs,
            chunk: std::ops::Range<usize>,
            panel: *const panel::Panel,
            out: &mut TileOut,
        ) {
            panel::multiply::<$dotprod, KIND, STEPS>(args, chunk, panel, out);
        }
    };
}
pub(super) use panel_kernels;
