//! NEON without dot products (Cortex-A72, as in a Raspberry Pi 4), and what the set with them shares.
//!
//! Tile kernels keep four rows to a vector of i32 or f32. Bounds of every narrow sum are proved where it is made; for all
//! of them activations are −127 ..= 127.

#![allow(clippy::needless_range_loop)] // planes, halves and quarters are places in several arrays at once

use super::panel::{self, panel_kernels};
use crate::arch::dot::{dot_kernels, dot_table, Dot, AHEAD};
use crate::arch::prefetch;
use crate::arch::vector::Vector;
use crate::dispatch::{Isa, Kernels, Variant};
use crate::matmul::{float_tile, TileArgs, TileKernel, TileOut};
use crate::ops::float_ops;
use crate::pack::{Codes, FloatKind, PackedForm, ScaleKind, SourceType, Values, PLANE_TILE as TILE};
use crate::quantize::{group_scale, Line, Table, Tabling};
use std::arch::aarch64::*;
use std::arch::asm;

/// The set, if this machine can run it.
pub(crate) fn kernels() -> Option<&'static Kernels> {
    std::arch::is_aarch64_feature_detected!("neon").then_some(&KERNELS)
}

static KERNELS: Kernels = Kernels {
    isa: Isa::Neon,
    variants,
    preferred,
    quantize,
    tabling: Tabling::of_fours(build_tables),
    ops: float_ops!(Lanes, "neon"),
    read,
};

/// Lookup for one bit only: a product takes as long however few the bits, with two as long as lookup or, for many rows of
/// activations, less.
pub(super) fn preferred(ty: SourceType) -> PackedForm {
    let candidates = PackedForm::candidates(ty);
    let planes = candidates.iter().find(|form| form.codes == Codes::Planes(1));
    *planes.unwrap_or(&candidates[0])
}

pub(super) fn variants(form: PackedForm) -> &'static [Variant] {
    const fn float(tile: TileKernel) -> Variant {
        Variant { name: "float", tile, tiles: 1, widths: &[8], tables: false, blocks: false }
    }
    match form.codes {
        Codes::Float(FloatKind::F32) => const { &[float(float_f32)] },
        Codes::Float(FloatKind::F16) => const { &[float(float_f16)] },
        Codes::Float(FloatKind::Bf16) => const { &[float(float_bf16)] },
        Codes::Planes(_) => bits_variants(form),
        _ if panel::decoder(form, false).is_some() => with_panels(form),
        _ => dot_variants(form),
    }
}

dot_kernels!(Rows<false>, "neon");
dot_table!(dot_variants, Rows<false>, Codes::Trits);
panel_kernels!(false, "neon");
dot_table!(with_panels, Rows<false>, Codes::Trits, PANEL);

// ---------------------------------------------------------------------------------------------------- float lanes

/// Four half floats, exactly; a NaN becomes quiet.
#[inline(always)]
unsafe fn from_halves(halves: uint16x4_t) -> float32x4_t {
    let out;
    // SAFETY: NEON has the instruction; its intrinsic's type is not stable.
    asm!("fcvtl {out:v}.4s, {halves:v}.4h", out = lateout(vreg) out, halves = in(vreg) halves,
        options(pure, nomem, nostack, preserves_flags));
    out
}

/// Rounds to half floats, ties to even.
#[inline(always)]
unsafe fn to_halves(floats: float32x4_t) -> uint16x4_t {
    let out;
    // SAFETY: as in `from_halves`. The rounding mode is Rust's default.
    asm!("fcvtn {out:v}.4h, {floats:v}.4s", out = lateout(vreg) out, floats = in(vreg) floats,
        options(pure, nomem, nostack, preserves_flags));
    out
}

/// Eight floats in two registers.
#[derive(Clone, Copy)]
pub(crate) struct Lanes(float32x4_t, float32x4_t);

impl Vector for Lanes {
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Lanes(vdupq_n_f32(value), vdupq_n_f32(value))
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        Lanes(vld1q_f32(from), vld1q_f32(from.add(4)))
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        vst1q_f32(to, self.0);
        vst1q_f32(to.add(4), self.1);
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        Lanes(from_halves(vld1_u16(from)), from_halves(vld1_u16(from.add(4))))
    }
    #[inline(always)]
    unsafe fn store_f16(self, to: *mut u16) {
        vst1_u16(to, to_halves(self.0));
        vst1_u16(to.add(4), to_halves(self.1));
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        let wide = |from| vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(from)));
        Lanes(wide(from), wide(from.add(4)))
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self {
        let wide = vmovl_s8(vld1_s8(from));
        Lanes(vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))), vcvtq_f32_s32(vmovl_high_s16(wide)))
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        Lanes(vaddq_f32(self.0, other.0), vaddq_f32(self.1, other.1))
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        Lanes(vsubq_f32(self.0, other.0), vsubq_f32(self.1, other.1))
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        Lanes(vmulq_f32(self.0, other.0), vmulq_f32(self.1, other.1))
    }
    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        Lanes(vdivq_f32(self.0, other.0), vdivq_f32(self.1, other.1))
    }
    #[inline(always)]
    unsafe fn fma(self, factor: Self, addend: Self) -> Self {
        Lanes(vfmaq_f32(addend.0, self.0, factor.0), vfmaq_f32(addend.1, self.1, factor.1))
    }
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        // FMAX would give a NaN for a NaN on either side.
        let of = |a, b| vbslq_f32(vcgtq_f32(a, b), a, b);
        Lanes(of(self.0, other.0), of(self.1, other.1))
    }
    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        let of = |a, b| vbslq_f32(vcltq_f32(a, b), a, b);
        Lanes(of(self.0, other.0), of(self.1, other.1))
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        Lanes(vrndnq_f32(self.0), vrndnq_f32(self.1))
    }
    #[inline(always)]
    unsafe fn exp2_integer(self) -> Self {
        let of = |n| vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127))));
        Lanes(of(self.0), of(self.1))
    }
    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        prefetch::<1>(at);
    }
    #[inline(always)]
    unsafe fn reduce_add(self) -> f32 {
        let four = vaddq_f32(self.0, self.1);
        vpadds_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)))
    }
}

/// # Safety
///
/// `TileKernel`'s, as for every tile kernel below.
#[target_feature(enable = "neon")]
unsafe fn float_f32(args: &TileArgs, out: &mut TileOut) {
    float_tile::<Lanes, 0>(args, out);
}

/// # Safety
///
/// See `float_f32`.
#[target_feature(enable = "neon")]
unsafe fn float_f16(args: &TileArgs, out: &mut TileOut) {
    float_tile::<Lanes, 1>(args, out);
}

/// # Safety
///
/// See `float_f32`.
#[target_feature(enable = "neon")]
unsafe fn float_bf16(args: &TileArgs, out: &mut TileOut) {
    float_tile::<Lanes, 2>(args, out);
}

/// # Safety
///
/// The machine has NEON.
#[target_feature(enable = "neon")]
pub(super) unsafe fn read(words: &[u64]) -> u64 {
    words.iter().fold(0, |sum, word| sum ^ word)
}

// ---------------------------------------------------------------------------------------------------- activations

/// # Safety
///
/// The machine has NEON; `group` is a multiple of 32, `x` and `codes` are whole groups of the same length, `scales` and
/// `sums` have one element per group.
#[target_feature(enable = "neon")]
pub(super) unsafe fn quantize(x: &[f32], group: usize, codes: &mut [i8], scales: &mut [f32], sums: &mut [i32]) {
    assert!(group > 0 && group % 32 == 0 && x.len() % group == 0 && codes.len() == x.len());
    let outputs = codes.chunks_exact_mut(group).zip(scales).zip(sums);
    for (x, ((codes, scale), sum)) in x.chunks_exact(group).zip(outputs) {
        let mut largest = [vdupq_n_u32(0); 2];
        for eight in x.chunks_exact(8) {
            for (i, largest) in largest.iter_mut().enumerate() {
                let bits = vreinterpretq_u32_f32(vld1q_f32(eight.as_ptr().add(4 * i)));
                *largest = vmaxq_u32(*largest, vandq_u32(bits, vdupq_n_u32(0x7fff_ffff)));
            }
        }
        let factor;
        (*scale, factor) = group_scale(vmaxvq_u32(vmaxq_u32(largest[0], largest[1])));
        if factor == 0.0 {
            codes.fill(0);
            *sum = 0;
            continue;
        }
        let mut total = vdupq_n_s32(0);
        for (x, codes) in x.chunks_exact(16).zip(codes.chunks_exact_mut(16)) {
            // |x·factor| ≤ 127·(1 + 2^−24)² < 127.5, so nothing saturates and −128 does not occur.
            let quarter = |i: usize| vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x.as_ptr().add(4 * i)), factor));
            let low = vuzp1q_s16(vreinterpretq_s16_s32(quarter(0)), vreinterpretq_s16_s32(quarter(1)));
            let high = vuzp1q_s16(vreinterpretq_s16_s32(quarter(2)), vreinterpretq_s16_s32(quarter(3)));
            let packed = vuzp1q_s8(vreinterpretq_s8_s16(low), vreinterpretq_s8_s16(high));
            vst1q_s8(codes.as_mut_ptr(), packed);
            total = vpadalq_s16(total, vpaddlq_s8(packed));
        }
        *sum = vaddvq_s32(total);
    }
}

/// # Safety
///
/// The machine has NEON; `tables` has one table per four codes.
#[target_feature(enable = "neon")]
pub(super) unsafe fn build_tables(codes: &[i8], _group: usize, lines: &mut [Line]) {
    let tables = Table::of_mut(lines);
    assert!(codes.len() == 4 * tables.len());
    // Which of the lower eight entries have activation 0, 1, 2; the upper eight are those with activation 3.
    static BITS: [[i16; 8]; 3] = [[0, 1, 0, 1, 0, 1, 0, 1], [0, 0, 1, 1, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1, 1, 1]];
    let bit = |i: usize| vld1q_s16(BITS[i].as_ptr());
    for (four, table) in codes.chunks_exact(4).zip(tables) {
        let four = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four.as_ptr().cast::<i32>().read_unaligned())));
        let four = vget_low_s16(four);
        let mut first = vmulq_lane_s16::<0>(bit(0), four);
        first = vmlaq_lane_s16::<1>(first, bit(1), four);
        first = vmlaq_lane_s16::<2>(first, bit(2), four);
        let second = vaddq_s16(first, vdupq_lane_s16::<3>(four));
        let bytes = vuzp1q_u8(vreinterpretq_u8_s16(first), vreinterpretq_u8_s16(second));
        vst1q_u8(table.low.as_mut_ptr(), vandq_u8(bytes, vdupq_n_u8(31)));
        let high = |sums| vshrn_n_u16::<5>(vreinterpretq_u16_s16(vaddq_s16(sums, vdupq_n_s16(512))));
        vst1q_u8(table.high.as_mut_ptr(), vcombine_u8(high(first), high(second)));
    }
}

// ---------------------------------------------------------------------------------------------------- lookup

/// The lookup kernel for a form of bit planes, if there is one.
fn bits_variants(form: PackedForm) -> &'static [Variant] {
    const fn lookup(tile: TileKernel) -> Variant {
        Variant { name: "lookup", tile, tiles: 1, widths: &[8], tables: true, blocks: false }
    }
    let (Codes::Planes(n), Values::Offset(_)) = (form.codes, form.values) else { return &[] };
    if !matches!(form.scale, ScaleKind::F16 | ScaleKind::F16Min) || form.group % 32 != 0 || form.group > 256 {
        return &[];
    }
    // Whether a whole group's sum fits i16.
    let narrow = form.group as i32 * 127 * form.largest_value() <= i16::MAX as i32;
    match (n, narrow) {
        (1, false) => const { &[lookup(bits_tile::<1, false>)] },
        (2, false) => const { &[lookup(bits_tile::<2, false>)] },
        (3, false) => const { &[lookup(bits_tile::<3, false>)] },
        (4, false) => const { &[lookup(bits_tile::<4, false>)] },
        (1, true) => const { &[lookup(bits_tile::<1, true>)] },
        (2, true) => const { &[lookup(bits_tile::<2, true>)] },
        (3, true) => const { &[lookup(bits_tile::<3, true>)] },
        (4, true) => const { &[lookup(bits_tile::<4, true>)] },
        _ => &[],
    }
}

/// Table lookup over bit planes (bit-serial, after T-MAC, arXiv:2407.00088): cost linear in bits.
///
/// # Safety
///
/// `TileKernel`'s; the form is one that `bits_variants` gives this instance for.
#[target_feature(enable = "neon")]
unsafe fn bits_tile<const N: usize, const NARROW: bool>(args: &TileArgs, out: &mut TileOut) {
    let mut j = 0;
    while j < args.count {
        if N <= 2 && args.count - j >= 2 {
            bits_rows::<N, NARROW, 2>(args, j, out);
            j += 2;
        } else {
            bits_rows::<N, NARROW, 1>(args, j, out);
            j += 1;
        }
    }
}

/// Checks what the kernel relies on; returns the number of groups.
#[inline(always)]
fn check(args: &TileArgs, j: usize, m: usize) -> usize {
    let groups = args.k / args.form.group as usize;
    let rows = args.first + j + m;
    assert!(
        args.k == groups * args.form.group as usize
            && args.tile.len() == groups * args.form.group_tile_bytes()
            && j + m <= args.count
            && args.scales.len() >= rows * groups
            && args.sums.len() >= rows * groups
            && args.tables.len() >= rows * (args.k / 8)
    );
    groups
}

/// Rows `first + j .. + M` of the activations.
///
/// A table entry v (a subset sum of four activations, −508 ..= 508) is looked up as two bytes, v = 32·(high − 16) + low, both
/// 0 ..= 31. Eight lookups, 32 k, are added as bytes: ≤ 8·31 = 248 fits. Then low + 32·high is added to halves, which is
/// modulo 2^16 and exact because the true value of what is made of them fits i16: starting from −16·32·8 = −4096 per 32 k,
/// - wide: a plane's sum over a group is a subset sum of ≤ 256 activations, |·| ≤ 256·127 = 32512; planes are combined in i32;
/// - narrow: the sum of the whole group, |Σ (code + offset)·a| ≤ group·127·max|code + offset| ≤ 32767 (`bits_variants` has
///   checked; 4 bits, offset −8, group 32: 32512), so planes are combined at once, whatever wraps on the way.
#[inline(always)]
unsafe fn bits_rows<const N: usize, const NARROW: bool, const M: usize>(args: &TileArgs, j: usize, out: &mut TileOut) {
    let groups = check(args, j, M);
    let size = args.form.group as usize;
    let group_bytes = args.form.group_tile_bytes();
    let first = args.first + j;
    let offset = match args.form.values {
        Values::Offset(offset) => offset as i32,
        _ => 0,
    };
    let nibble = vdupq_n_u8(15);
    let mut acc = [[vdupq_n_f32(0.0); TILE / 4]; M];
    for g in 0..groups {
        let group = args.tile.as_ptr().add(g * group_bytes);
        // What the entries' highs were moved by; narrow, of all planes at once, and the offset's share beside it.
        let moved = (size / 32 * 4096).wrapping_neg() as i32;
        let mut planes = [[[vdupq_n_u16(0); TILE / 8]; N]; M];
        // Of a single plane, registers suffice to sum the high bytes alone.
        let mut highs = [[vdupq_n_u16(0); TILE / 8]; M];
        for m in 0..M {
            let correction = offset * *args.sums.get_unchecked((first + m) * groups + g);
            for plane in 0..N {
                let start = match (NARROW, plane) {
                    // As `half_to_float` wants it.
                    (true, 0) => moved * ((1 << N) - 1) + correction + 0x8000,
                    (true, _) => break,
                    _ => moved,
                };
                planes[m][plane] = [vdupq_n_u16(start as u16); TILE / 8];
            }
        }
        for block in 0..size / 32 {
            let mut low = [[[vdupq_n_u8(0); 2]; N]; M];
            let mut high = [[[vdupq_n_u8(0); 2]; N]; M];
            let at = group.add(block * 4 * N * TILE);
            for line in (0..4 * N * TILE).step_by(64) {
                prefetch::<1>(at.wrapping_add(AHEAD + line));
            }
            for octet in 0..4 {
                let mut index = [[[vdupq_n_u8(0); 2]; 2]; N];
                for plane in 0..N {
                    for half in 0..2 {
                        let at = group.add(((block * 4 + octet) * N + plane) * TILE + 16 * half);
                        let bytes = vld1q_u8(at);
                        index[plane][half] = [vandq_u8(bytes, nibble), vshrq_n_u8::<4>(bytes)];
                    }
                }
                for m in 0..M {
                    for four in 0..2 {
                        let at = (first + m) * (args.k / 4) + (g * size + block * 32 + octet * 8) / 4 + four;
                        let table = Table::of(args.tables).get_unchecked(at);
                        let (lows, highs) = (vld1q_u8(table.low.as_ptr()), vld1q_u8(table.high.as_ptr()));
                        for plane in 0..N {
                            for half in 0..2 {
                                let index = index[plane][half][four];
                                let (low, high) = (&mut low[m][plane][half], &mut high[m][plane][half]);
                                *low = vaddq_u8(*low, vqtbl1q_u8(lows, index));
                                *high = vaddq_u8(*high, vqtbl1q_u8(highs, index));
                            }
                        }
                    }
                }
            }
            for m in 0..M {
                for plane in 0..N {
                    let (to, weight) = if NARROW { (0, 1 << plane) } else { (plane, 1) };
                    for half in 0..2 {
                        let (low, high) = (low[m][plane][half], high[m][plane][half]);
                        let sums = &mut planes[m][to][2 * half..2 * half + 2];
                        add_weighted(sums, low, weight);
                        if N == 1 {
                            add_weighted(&mut highs[m][2 * half..2 * half + 2], high, 1);
                        } else {
                            add_weighted(sums, high, 32 * weight);
                        }
                    }
                }
            }
        }
        if N == 1 {
            for m in 0..M {
                for (sum, high) in planes[m][0].iter_mut().zip(highs[m]) {
                    *sum = vaddq_u16(*sum, vshlq_n_u16::<5>(high));
                }
            }
        }
        let scales = group.add(args.form.group_code_bytes());
        let halves = |quarter: usize| from_halves(vld1_u16(scales.add(8 * quarter).cast()));
        for m in 0..M {
            let at = (first + m) * groups + g;
            let sum = *args.sums.get_unchecked(at);
            let a = *args.scales.get_unchecked(at);
            for quarter in 0..TILE / 4 {
                let total = if NARROW {
                    half_to_float(planes[m][0][quarter / 2], quarter % 2)
                } else {
                    let mut total = vdupq_n_s32(offset * sum);
                    for plane in 0..N {
                        let sums = vreinterpretq_s16_u16(planes[m][plane][quarter / 2]);
                        let sums = if quarter % 2 == 0 { vmovl_s16(vget_low_s16(sums)) } else { vmovl_high_s16(sums) };
                        total = vaddq_s32(total, vshlq_s32(sums, vdupq_n_s32(plane as i32)));
                    }
                    vcvtq_f32_s32(total)
                };
                let acc = &mut acc[m][quarter];
                *acc = vfmaq_f32(*acc, vmulq_n_f32(halves(quarter), a), total);
                if args.form.scale == ScaleKind::F16Min {
                    let min = vmulq_n_f32(halves(quarter + TILE / 4), a);
                    *acc = vfmaq_n_f32(*acc, min, sum as f32);
                }
            }
        }
    }
    for (m, acc) in acc.into_iter().enumerate() {
        for (quarter, acc) in acc.into_iter().enumerate() {
            vst1q_f32(out[j + m].as_mut_ptr().add(4 * quarter), acc);
        }
    }
}

/// Half of eight i16, given 0x8000 too large: below the upper half of 2^23's bits, it counts units in the last place.
#[inline(always)]
unsafe fn half_to_float(halves: uint16x8_t, half: usize) -> float32x4_t {
    const BASE: f32 = 8_388_608.0;
    let top = vdupq_n_u16((BASE.to_bits() >> 16) as u16);
    let moved = if half == 0 { vzip1q_u16(halves, top) } else { vzip2q_u16(halves, top) };
    vsubq_f32(vreinterpretq_f32_u16(moved), vdupq_n_f32(BASE + 32_768.0))
}

/// Adds bytes times 1 ..= 256, a power of two, to halves.
#[inline(always)]
unsafe fn add_weighted(sums: &mut [uint16x8_t], bytes: uint8x16_t, weight: usize) {
    match weight {
        1 => {
            sums[0] = vaddw_u8(sums[0], vget_low_u8(bytes));
            sums[1] = vaddw_high_u8(sums[1], bytes);
        }
        256 => {
            sums[0] = vaddq_u16(sums[0], vshll_n_u8::<8>(vget_low_u8(bytes)));
            sums[1] = vaddq_u16(sums[1], vshll_high_n_u8::<8>(bytes));
        }
        _ => {
            let weight = vdupq_n_u8(weight as u8);
            sums[0] = vmlal_u8(sums[0], vget_low_u8(bytes), vget_low_u8(weight));
            sums[1] = vmlal_high_u8(sums[1], bytes, weight);
        }
    }
}

// ---------------------------------------------------------------------------------------------------- dot products

/// Four rows; with or without the instructions for dot products.
pub(super) struct Rows<const DOTPROD: bool>;

#[inline(always)]
pub(super) fn as_bytes(v: int32x4_t) -> int8x16_t {
    // SAFETY: every bit pattern is valid for both.
    unsafe { vreinterpretq_s8_s32(v) }
}

#[inline(always)]
fn as_unsigned(v: int32x4_t) -> uint8x16_t {
    // SAFETY: as above.
    unsafe { vreinterpretq_u8_s32(v) }
}

/// Adds products of four bytes of each lane with four of `a`, those in 32-bit lane `lane`.
#[inline(always)]
pub(super) unsafe fn sdot(acc: int32x4_t, w: int32x4_t, a: int8x16_t, lane: usize) -> int32x4_t {
    macro_rules! by_lane {
        ($lane:literal) => {{
            let mut acc = acc;
            // SAFETY: only called with DOTPROD, so that the machine has the instruction.
            asm!(concat!("sdot {acc:v}.4s, {w:v}.16b, {a:v}.4b[", $lane, "]"), acc = inout(vreg) acc, w = in(vreg) w,
                a = in(vreg) a, options(pure, nomem, nostack, preserves_flags));
            acc
        }};
    }
    match lane {
        0 => by_lane!(0),
        1 => by_lane!(1),
        2 => by_lane!(2),
        _ => by_lane!(3),
    }
}

/// Adds products of signed bytes, of the lower and of the upper eight. As assembler, because from intrinsics LLVM makes 16-bit
/// multiplications, half as many at a time, where it sees that codes are not negative.
#[inline(always)]
pub(super) unsafe fn add_products(sums: [int16x8_t; 2], a: int8x16_t, b: int8x16_t) -> [int16x8_t; 2] {
    let [mut low, mut high] = sums;
    // SAFETY: NEON has the instructions.
    asm!("smlal {low:v}.8h, {a:v}.8b, {b:v}.8b", "smlal2 {high:v}.8h, {a:v}.16b, {b:v}.16b", low = inout(vreg) low,
        high = inout(vreg) high, a = in(vreg) a, b = in(vreg) b, options(pure, nomem, nostack, preserves_flags));
    [low, high]
}

/// Products of signed bytes; see `add_products`.
#[inline(always)]
pub(super) unsafe fn products(a: int8x16_t, b: int8x16_t) -> [int16x8_t; 2] {
    let (low, high);
    // SAFETY: NEON has the instructions.
    asm!("smull {low:v}.8h, {a:v}.8b, {b:v}.8b", "smull2 {high:v}.8h, {a:v}.16b, {b:v}.16b", low = out(vreg) low,
        high = lateout(vreg) high, a = in(vreg) a, b = in(vreg) b, options(pure, nomem, nostack, preserves_flags));
    [low, high]
}

/// The same value in every byte. As assembler, because LLVM would make the constant anew wherever it is used.
#[inline(always)]
unsafe fn limit<const VALUE: u8>() -> uint8x16_t {
    let out;
    // SAFETY: NEON has the instruction.
    asm!("movi {out:v}.16b, #{value}", out = lateout(vreg) out, value = const VALUE,
        options(pure, nomem, nostack, preserves_flags));
    out
}

/// Bytes times 3, of which the low 8 bits remain. As assembler, because of several LLVM makes multiplications, which take longer
/// and meet others that have no choice of units.
#[inline(always)]
unsafe fn tripled(bytes: uint8x16_t) -> uint8x16_t {
    let out;
    // SAFETY: NEON has the instructions.
    asm!("add {twice:v}.16b, {bytes:v}.16b, {bytes:v}.16b", "add {out:v}.16b, {twice:v}.16b, {bytes:v}.16b",
        twice = out(vreg) _, bytes = in(vreg) bytes, out = lateout(vreg) out,
        options(pure, nomem, nostack, preserves_flags));
    out
}

/// The four bytes in 32-bit lane `lane`, in every lane.
#[inline(always)]
pub(super) unsafe fn broadcast(a: int8x16_t, lane: usize) -> int8x16_t {
    let a = vreinterpretq_s32_s8(a);
    vreinterpretq_s8_s32(match lane {
        0 => vdupq_laneq_s32::<0>(a),
        1 => vdupq_laneq_s32::<1>(a),
        2 => vdupq_laneq_s32::<2>(a),
        _ => vdupq_laneq_s32::<3>(a),
    })
}

/// Activations: 4, 8, 12 or 16 from `from` on, and nothing beyond.
#[inline(always)]
unsafe fn activations(from: *const i8, fours: usize) -> int8x16_t {
    let two = |from: *const i8| vcombine_s8(vld1_s8(from), vdup_n_s8(0));
    let one = |from: *const i8| vsetq_lane_s32::<0>(from.cast::<i32>().read_unaligned(), vdupq_n_s32(0));
    match fours {
        1 => vreinterpretq_s8_s32(one(from)),
        2 => two(from),
        3 => vreinterpretq_s8_s64(vcopyq_laneq_s64::<1, 0>(
            vreinterpretq_s64_s8(two(from)),
            vreinterpretq_s64_s32(one(from.add(8))),
        )),
        _ => vld1q_s8(from),
    }
}

// SAFETY (of every method): the trait's.
impl<const DOTPROD: bool> Dot for Rows<DOTPROD> {
    type Int = int32x4_t;
    type Float = float32x4_t;
    const LANES: usize = 4;
    const SIGNED_BIAS: i32 = 0;
    const NEGATED_DIGITS: bool = !DOTPROD;

    #[inline(always)]
    unsafe fn splat(value: i32) -> int32x4_t {
        vdupq_n_s32(value)
    }
    #[inline(always)]
    unsafe fn load(from: *const u8) -> int32x4_t {
        vreinterpretq_s32_u8(vld1q_u8(from))
    }
    #[inline(always)]
    unsafe fn and(a: int32x4_t, b: int32x4_t) -> int32x4_t {
        vandq_s32(a, b)
    }
    #[inline(always)]
    unsafe fn or(a: int32x4_t, b: int32x4_t) -> int32x4_t {
        vorrq_s32(a, b)
    }
    #[inline(always)]
    unsafe fn add(a: int32x4_t, b: int32x4_t) -> int32x4_t {
        vaddq_s32(a, b)
    }
    #[inline(always)]
    unsafe fn sub(a: int32x4_t, b: int32x4_t) -> int32x4_t {
        vsubq_s32(a, b)
    }
    #[inline(always)]
    unsafe fn mul(a: int32x4_t, b: int32x4_t) -> int32x4_t {
        vmulq_s32(a, b)
    }
    #[inline(always)]
    unsafe fn shl(a: int32x4_t, n: u32) -> int32x4_t {
        vshlq_s32(a, vdupq_n_s32(n as i32))
    }
    #[inline(always)]
    unsafe fn shr(a: int32x4_t, n: u32) -> int32x4_t {
        vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a), vdupq_n_s32(-(n as i32))))
    }
    #[inline(always)]
    unsafe fn field(a: int32x4_t, n: u32, mask: u8) -> int32x4_t {
        match n {
            0 => vandq_s32(a, vreinterpretq_s32_u8(vdupq_n_u8(mask))),
            // The topmost field: shifting bytes leaves nothing to mask.
            _ if mask == 0xff >> n => vreinterpretq_s32_u8(vshlq_u8(as_unsigned(a), vdupq_n_s8(-(n as i8)))),
            _ => vandq_s32(Self::shr(a, n), vreinterpretq_s32_u8(vdupq_n_u8(mask))),
        }
    }
    #[inline(always)]
    unsafe fn dot(acc: int32x4_t, codes: int32x4_t, a: i32) -> int32x4_t {
        Self::dot_signed(acc, codes, a)
    }
    /// Without the instruction: pairs of products, at most 2·128·127 = 32512, fit i16.
    #[inline(always)]
    unsafe fn dot_signed(acc: int32x4_t, weights: int32x4_t, a: i32) -> int32x4_t {
        if DOTPROD {
            return sdot(acc, weights, vreinterpretq_s8_s32(vdupq_n_s32(a)), 0);
        }
        let a = vreinterpretq_s8_s32(vdupq_n_s32(a));
        let [low, high] = products(as_bytes(weights), a);
        vpadalq_s16(acc, vpaddq_s16(low, high))
    }
    /// Without the instruction: pairs of products, at most 2·MOST·127, are added as halves as far as those hold them.
    #[inline(always)]
    unsafe fn dots<const MOST: i32>(acc: int32x4_t, codes: &[int32x4_t], a: *const i8) -> int32x4_t {
        if DOTPROD {
            return Self::dots_signed(acc, codes, a);
        }
        let mut acc = acc;
        let most = (i16::MAX as i32 / (2 * 127 * MOST)) as usize;
        let mut sums = [vdupq_n_s16(0); 2];
        for (at, four) in codes.chunks(4).enumerate() {
            let a = activations(a.add(16 * at), four.len());
            for (i, &codes) in four.iter().enumerate() {
                let (codes, a, before) = (as_bytes(codes), broadcast(a, i), 4 * at + i);
                if before > 0 && before % most == 0 {
                    acc = vpadalq_s16(acc, vpaddq_s16(sums[0], sums[1]));
                }
                sums = if before % most == 0 { products(codes, a) } else { add_products(sums, codes, a) };
            }
        }
        vpadalq_s16(acc, vpaddq_s16(sums[0], sums[1]))
    }
    #[inline(always)]
    unsafe fn dots_signed(acc: int32x4_t, weights: &[int32x4_t], a: *const i8) -> int32x4_t {
        let mut acc = acc;
        for (at, four) in weights.chunks(4).enumerate() {
            let a = activations(a.add(16 * at), four.len());
            for (i, &weights) in four.iter().enumerate() {
                acc = if DOTPROD {
                    sdot(acc, weights, a, i)
                } else {
                    let (weights, a) = (as_bytes(weights), broadcast(a, i));
                    let [low, high] = products(weights, a);
                    vpadalq_s16(acc, vpaddq_s16(low, high))
                };
            }
        }
        acc
    }
    #[inline(always)]
    unsafe fn dot_halves(acc: int32x4_t, halves: int32x4_t, a: i32) -> int32x4_t {
        let (halves, a) = (vreinterpretq_s16_s32(halves), vreinterpretq_s16_s32(vdupq_n_s32(a)));
        let low = vmull_s16(vget_low_s16(halves), vget_low_s16(a));
        vaddq_s32(acc, vpaddq_s32(low, vmull_high_s16(halves, a)))
    }
    #[inline(always)]
    unsafe fn nibbles(from: *const u8) -> int32x4_t {
        const PLACES: [i32; 4] = [0, -4, -8, -12];
        let halves = vdupq_n_u32(from.cast::<u16>().read_unaligned() as u32);
        let moved = vshlq_u32(halves, vld1q_s32(PLACES.as_ptr()));
        vandq_s32(vreinterpretq_s32_u32(moved), vdupq_n_s32(15))
    }
    #[inline(always)]
    unsafe fn lookup(table: &'static [i8; 16], index: int32x4_t) -> int32x4_t {
        vreinterpretq_s32_s8(vqtbl1q_s8(vld1q_s8(table.as_ptr()), as_unsigned(index)))
    }
    /// `Codes::Trits`: the high byte of 27·q is the first three digits, of 9 times the low byte the last two. On processors
    /// without dot products looking up takes longer than comparing, which gives −1 for true: a byte's first digit is 0 below
    /// 86, 1 below 171, else 2 (⌊3·q / 256⌋, for every q); times 3 brings up the next.
    #[inline(always)]
    unsafe fn digits(bytes: int32x4_t) -> [int32x4_t; 5] {
        if !DOTPROD {
            let mut q = as_unsigned(bytes);
            let mut out = [vdupq_n_s32(0); 5];
            for digit in &mut out {
                let (one, two) = (vcgtq_u8(q, limit::<85>()), vcgtq_u8(q, limit::<170>()));
                *digit = vreinterpretq_s32_u8(vaddq_u8(one, two));
                q = tripled(q);
            }
            return out;
        }
        static DIGITS: [[u8; 32]; 3] = {
            let mut tables = [[0; 32]; 3];
            let mut i = 0;
            while i < 27 {
                (tables[0][i], tables[1][i], tables[2][i]) = (i as u8 / 9, i as u8 / 3 % 3, i as u8 % 3);
                i += 1;
            }
            tables
        };
        let times = |q: uint8x16_t, n: u8| {
            let low = vreinterpretq_u8_u16(vmull_u8(vget_low_u8(q), vdup_n_u8(n)));
            let high = vreinterpretq_u8_u16(vmull_high_u8(q, vdupq_n_u8(n)));
            (vuzp2q_u8(low, high), vuzp1q_u8(low, high))
        };
        let (three, rest) = times(as_unsigned(bytes), 27);
        let (two, _) = times(rest, 9);
        let of_three = |table: &[u8; 32]| {
            vreinterpretq_s32_u8(vqtbl2q_u8(
                uint8x16x2_t(vld1q_u8(table.as_ptr()), vld1q_u8(table.as_ptr().add(16))),
                three,
            ))
        };
        let of_two = |table: &[u8; 32]| vreinterpretq_s32_u8(vqtbl1q_u8(vld1q_u8(table.as_ptr()), two));
        [of_three(&DIGITS[0]), of_three(&DIGITS[1]), of_three(&DIGITS[2]), of_two(&DIGITS[1]), of_two(&DIGITS[2])]
    }
    #[inline(always)]
    unsafe fn to_float(a: int32x4_t) -> float32x4_t {
        vcvtq_f32_s32(a)
    }
    /// Added to the bits of 1.5·2^23, an integer counts units in the last place: two short instructions for a long one.
    #[inline(always)]
    unsafe fn small_to_float(a: int32x4_t) -> float32x4_t {
        const BASE: f32 = 12_582_912.0;
        let moved = vaddq_s32(a, vdupq_n_s32(BASE.to_bits() as i32));
        vsubq_f32(vreinterpretq_f32_s32(moved), vdupq_n_f32(BASE))
    }
    #[inline(always)]
    unsafe fn splat_float(value: f32) -> float32x4_t {
        vdupq_n_f32(value)
    }
    #[inline(always)]
    unsafe fn load_float(from: *const f32) -> float32x4_t {
        vld1q_f32(from)
    }
    #[inline(always)]
    unsafe fn load_half(from: *const u8) -> float32x4_t {
        from_halves(vld1_u16(from.cast()))
    }
    #[inline(always)]
    unsafe fn mul_float(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        vmulq_f32(a, b)
    }
    #[inline(always)]
    unsafe fn fma(a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        vfmaq_f32(c, a, b)
    }
    #[inline(always)]
    unsafe fn prefetch(from: *const u8) {
        prefetch::<1>(from);
    }
    #[inline(always)]
    unsafe fn store(a: float32x4_t, to: *mut f32) {
        vst1q_f32(to, a);
    }
}
