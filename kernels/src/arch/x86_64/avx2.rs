//! AVX2 with FMA and F16C (Haswell, Zen and later).
//!
//! Tile kernels keep eight rows to a vector of i32 or f32. Bounds of every narrow sum are proved where it is made; for all
//! of them activations are −127 ..= 127.

#![allow(clippy::needless_range_loop)] // planes, halves and quarters are places in several arrays at once

use crate::arch::dot::{dot_kernels, dot_table, Dot, AHEAD};
use crate::arch::vector::Vector;
use crate::dispatch::{Isa, Kernels, Variant};
use crate::matmul::{float_tile, TileArgs, TileKernel, TileOut};
use crate::ops::float_ops;
use crate::pack::{Codes, FloatKind, PackedForm, ScaleKind, SourceType, Values, PLANE_TILE as TILE};
use crate::quantize::{group_scale, Line, Table, Tabling};
use std::arch::x86_64::*;

/// The set, if this machine can run it.
pub(crate) fn kernels() -> Option<&'static Kernels> {
    let usable =
        is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
    usable.then_some(&KERNELS)
}

static KERNELS: Kernels = Kernels {
    isa: Isa::Avx2,
    variants,
    preferred,
    quantize,
    tabling: Tabling::of_fours(build_tables),
    ops: float_ops!(Lanes, "avx2,fma,f16c"),
    read,
};

/// Lookup for one and two bits, where it is faster than the three instructions that stand for a dot product here.
fn preferred(ty: SourceType) -> PackedForm {
    let candidates = PackedForm::candidates(ty);
    let planes = candidates.iter().find(|form| matches!(form.codes, Codes::Planes(1 | 2)));
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
        _ => dot_variants(form),
    }
}

dot_kernels!(Rows, "avx2,fma,f16c");
dot_table!(dot_variants, Rows, Codes::Trits);

// ---------------------------------------------------------------------------------------------------- float lanes

/// Eight floats in a register.
#[derive(Clone, Copy)]
pub(crate) struct Lanes(__m256);

impl Vector for Lanes {
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Lanes(_mm256_set1_ps(value))
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        Lanes(_mm256_loadu_ps(from))
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        _mm256_storeu_ps(to, self.0);
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        Lanes(_mm256_cvtph_ps(_mm_loadu_si128(from.cast())))
    }
    #[inline(always)]
    unsafe fn store_f16(self, to: *mut u16) {
        _mm_storeu_si128(to.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0));
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
        Lanes(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide)))
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self {
        Lanes(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast()))))
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        Lanes(_mm256_add_ps(self.0, other.0))
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        Lanes(_mm256_sub_ps(self.0, other.0))
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        Lanes(_mm256_mul_ps(self.0, other.0))
    }
    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        Lanes(_mm256_div_ps(self.0, other.0))
    }
    #[inline(always)]
    unsafe fn fma(self, factor: Self, addend: Self) -> Self {
        Lanes(_mm256_fmadd_ps(self.0, factor.0, addend.0))
    }
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        Lanes(_mm256_max_ps(self.0, other.0)) // MAXPS is defined as the trait asks, NaN and ±0 included
    }
    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        Lanes(_mm256_min_ps(self.0, other.0))
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        Lanes(_mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0))
    }
    #[inline(always)]
    unsafe fn exp2_integer(self) -> Self {
        let biased = _mm256_add_epi32(_mm256_cvtps_epi32(self.0), _mm256_set1_epi32(127));
        Lanes(_mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased)))
    }
    #[inline(always)]
    unsafe fn reduce_add(self) -> f32 {
        let four = _mm_add_ps(_mm256_castps256_ps128(self.0), _mm256_extractf128_ps::<1>(self.0));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
    }
    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        _mm_prefetch::<_MM_HINT_T0>(at.cast());
    }
    #[inline(always)]
    unsafe fn reduce_max(self) -> f32 {
        let four = _mm_max_ps(_mm256_castps256_ps128(self.0), _mm256_extractf128_ps::<1>(self.0));
        let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
    }
}

/// # Safety
///
/// `TileKernel`'s, as for every tile kernel below.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn float_f32(args: &TileArgs, out: &mut TileOut) {
    float_tile::<Lanes, 0>(args, out);
}

/// # Safety
///
/// See `float_f32`.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn float_f16(args: &TileArgs, out: &mut TileOut) {
    float_tile::<Lanes, 1>(args, out);
}

/// # Safety
///
/// See `float_f32`.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn float_bf16(args: &TileArgs, out: &mut TileOut) {
    float_tile::<Lanes, 2>(args, out);
}

/// # Safety
///
/// The machine has AVX2.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn read(words: &[u64]) -> u64 {
    words.iter().fold(0, |sum, word| sum ^ word)
}

// ---------------------------------------------------------------------------------------------------- activations

#[inline(always)]
unsafe fn load(from: *const u8) -> __m256i {
    _mm256_loadu_si256(from.cast())
}

/// Sum of eight i32.
#[inline(always)]
unsafe fn sum_i32(v: __m256i) -> i32 {
    let four = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
    let two = _mm_add_epi32(four, _mm_shuffle_epi32::<0b01_00_11_10>(four));
    _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32::<0b10_11_00_01>(two)))
}

/// # Safety
///
/// The machine has AVX2; `group` is a multiple of 32, `x` and `codes` are whole groups of the same length, `scales` and
/// `sums` have one element per group.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn quantize(x: &[f32], group: usize, codes: &mut [i8], scales: &mut [f32], sums: &mut [i32]) {
    assert!(group > 0 && group % 32 == 0 && x.len() % group == 0 && codes.len() == x.len());
    let outputs = codes.chunks_exact_mut(group).zip(scales).zip(sums);
    for (x, ((codes, scale), sum)) in x.chunks_exact(group).zip(outputs) {
        let magnitude = _mm256_set1_epi32(0x7fff_ffff);
        let mut largest = _mm256_setzero_si256();
        for eight in x.chunks_exact(8) {
            largest = _mm256_max_epi32(largest, _mm256_and_si256(load(eight.as_ptr().cast()), magnitude));
        }
        let four = _mm_max_epi32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256::<1>(largest));
        let two = _mm_max_epi32(four, _mm_shuffle_epi32::<0b01_00_11_10>(four));
        let one = _mm_max_epi32(two, _mm_shuffle_epi32::<0b10_11_00_01>(two));
        let factor;
        (*scale, factor) = group_scale(_mm_cvtsi128_si32(one) as u32);
        if factor == 0.0 {
            codes.fill(0);
            *sum = 0;
            continue;
        }
        let factor = _mm256_set1_ps(factor);
        let mut total = _mm256_setzero_si256();
        for (x, codes) in x.chunks_exact(32).zip(codes.chunks_exact_mut(32)) {
            // |x·factor| ≤ 127·(1 + 2^−24)² < 127.5, so nothing saturates and −128 does not occur. Conversion rounds half
            // to even, the default mode that Rust code runs in.
            let mut quarters = [_mm256_setzero_si256(); 4];
            for (quarter, x) in quarters.iter_mut().zip(x.chunks_exact(8)) {
                *quarter = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x.as_ptr()), factor));
            }
            let low = _mm256_packs_epi32(quarters[0], quarters[1]);
            let high = _mm256_packs_epi32(quarters[2], quarters[3]);
            let in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
            let packed = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), in_order);
            _mm256_storeu_si256(codes.as_mut_ptr().cast(), packed);
            let pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), packed);
            total = _mm256_add_epi32(total, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
        }
        *sum = sum_i32(total);
    }
}

/// # Safety
///
/// The machine has AVX2; there is a table for every four codes.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn build_tables(codes: &[i8], _group: usize, lines: &mut [Line]) {
    let tables = Table::of_mut(lines);
    assert!(codes.len() == 4 * tables.len());
    // Four 0/1 factors for each of eight entries: 0–3 and 8–11, then 4–7 and 12–15, which packing puts into order.
    let factors = |entries: [i32; 8]| entries.map(|i| i & 1 | (i & 2) << 7 | (i & 4) << 14 | (i & 8) << 21);
    let first = load(factors([0, 1, 2, 3, 8, 9, 10, 11]).as_ptr().cast());
    let second = load(factors([4, 5, 6, 7, 12, 13, 14, 15]).as_ptr().cast());
    let ones = _mm256_set1_epi16(1);
    for (four, table) in codes.chunks_exact(4).zip(tables) {
        let four = _mm256_set1_epi32(four.as_ptr().cast::<i32>().read_unaligned());
        let first = _mm256_madd_epi16(_mm256_maddubs_epi16(first, four), ones);
        let second = _mm256_madd_epi16(_mm256_maddubs_epi16(second, four), ones);
        let sums = _mm256_packs_epi32(first, second);
        let low = _mm256_and_si256(sums, _mm256_set1_epi16(31));
        let high = _mm256_srli_epi16::<5>(_mm256_add_epi16(sums, _mm256_set1_epi16(512)));
        let bytes = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi16(low, high));
        _mm256_storeu_si256((table as *mut Table).cast(), bytes);
    }
}

// ---------------------------------------------------------------------------------------------------- tiles

/// The scales of rows 8·quarter .. + 8 of a group times the activation's; their minima follow as further quarters.
#[inline(always)]
unsafe fn scales(args: &TileArgs, group: *const u8, quarter: usize, a: f32) -> __m256 {
    let at = group.add(args.form.group_code_bytes() + 16 * quarter);
    _mm256_mul_ps(_mm256_cvtph_ps(_mm_loadu_si128(at.cast())), _mm256_set1_ps(a))
}

/// Asks for the lines of `bytes` bytes that lie `AHEAD` of `from`.
#[inline(always)]
unsafe fn prefetch(from: *const u8, bytes: usize) {
    for line in (0..bytes).step_by(64) {
        _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(AHEAD + line).cast());
    }
}

/// Checks what tile kernels of grouped codes rely on; returns the number of groups.
#[inline(always)]
fn check(args: &TileArgs) -> usize {
    let groups = args.k / args.form.group as usize;
    let rows = args.first + args.count;
    assert!(
        args.k == groups * args.form.group as usize
            && args.tile.len() == groups * args.form.group_tile_bytes()
            && args.codes.len() >= rows * args.k
            && args.scales.len() >= rows * groups
            && args.sums.len() >= rows * groups
    );
    groups
}

/// Runs a kernel body for `count` rows, M at a time.
macro_rules! batched {
    ($args:ident, $out:ident, $($most:literal => $body:expr),+) => {{
        let mut j = 0;
        while j < $args.count {
            $(if $args.count - j >= $most {
                $body($args, j, $out);
                j += $most;
                continue;
            })+
        }
    }};
}

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
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn bits_tile<const N: usize, const NARROW: bool>(args: &TileArgs, out: &mut TileOut) {
    if N <= 2 {
        batched!(args, out, 2 => bits_rows::<N, NARROW, 2>, 1 => bits_rows::<N, NARROW, 1>);
    } else {
        batched!(args, out, 1 => bits_rows::<N, NARROW, 1>);
    }
}

/// Rows `first + j .. + M` of the activations.
///
/// A table entry v (a subset sum of four activations, −508 ..= 508) is looked up as two bytes, v = 32·(high − 16) + low, both
/// 0 ..= 31. Eight lookups, 32 k, are added as bytes: ≤ 8·31 = 248 fits. Then low and high of a row are brought side by side
/// and one multiply-add makes low + 32·high ≤ 33·248 = 8184, an i16 exactly. What follows is modulo 2^16 and exact because
/// its true value fits i16: starting from −16·32·8 = −4096 per 32 k,
/// - wide: a plane's sum over a group is a subset sum of ≤ 256 activations, |·| ≤ 256·127 = 32512; planes are combined in i32;
/// - narrow: the sum of the whole group, |Σ (code + offset)·a| ≤ group·127·max|code + offset| ≤ 32767 (`bits_variants` has
///   checked; 4 bits, offset −8, group 32: 32512), so planes are combined in i16, whatever wraps on the way. A pair of planes
///   takes one accumulator: the upper one is multiplied by (2, 64), ≤ 16368.
#[inline(always)]
unsafe fn bits_rows<const N: usize, const NARROW: bool, const M: usize>(args: &TileArgs, j: usize, out: &mut TileOut) {
    let groups = check(args);
    let size = args.form.group as usize;
    let group_bytes = args.form.group_tile_bytes();
    let first = args.first + j;
    assert!(args.tables.len() >= (first + M) * (args.k / 8) && j + M <= args.count);
    let offset = match args.form.values {
        Values::Offset(offset) => offset as i32,
        _ => 0,
    };
    let nibble = _mm256_set1_epi8(15);
    let mut acc = [[_mm256_setzero_ps(); 4]; M];
    for g in 0..groups {
        let group = args.tile.as_ptr().add(g * group_bytes);
        let start = _mm256_set1_epi16((size / 32 * 4096).wrapping_neg() as i16);
        // Sums of a plane's group, rows 0–7 and 16–23, and rows 8–15 and 24–31.
        let mut planes = [[[start; 2]; N]; M];
        for block in 0..size / 32 {
            let mut low = [[_mm256_setzero_si256(); N]; M];
            let mut high = [[_mm256_setzero_si256(); N]; M];
            prefetch(group.add(block * 4 * N * TILE), 4 * N * TILE);
            for octet in 0..4 {
                let mut index = [[_mm256_setzero_si256(); 2]; N];
                for (plane, index) in index.iter_mut().enumerate() {
                    let bytes = load(group.add(((block * 4 + octet) * N + plane) * TILE));
                    *index = [_mm256_and_si256(bytes, nibble), _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), nibble)];
                }
                for m in 0..M {
                    for half in 0..2 {
                        let at = (first + m) * (args.k / 4) + (g * size + block * 32 + octet * 8) / 4 + half;
                        let table = Table::of(args.tables).as_ptr().add(at).cast::<__m128i>();
                        let low_table = _mm256_broadcastsi128_si256(_mm_load_si128(table));
                        let high_table = _mm256_broadcastsi128_si256(_mm_load_si128(table.add(1)));
                        for plane in 0..N {
                            let index = index[plane][half];
                            low[m][plane] = _mm256_add_epi8(low[m][plane], _mm256_shuffle_epi8(low_table, index));
                            high[m][plane] = _mm256_add_epi8(high[m][plane], _mm256_shuffle_epi8(high_table, index));
                        }
                    }
                }
            }
            for m in 0..M {
                for plane in 0..N {
                    // Narrow: planes 0 and 1 go to the first accumulator, 2 and 3 to the third.
                    let (to, weights) = match (NARROW, plane % 2) {
                        (true, 1) => (plane - 1, 64 << 8 | 2),
                        _ => (plane, 32 << 8 | 1),
                    };
                    let weights = _mm256_set1_epi16(weights);
                    let (low, high) = (low[m][plane], high[m][plane]);
                    let even = _mm256_maddubs_epi16(_mm256_unpacklo_epi8(low, high), weights);
                    let odd = _mm256_maddubs_epi16(_mm256_unpackhi_epi8(low, high), weights);
                    planes[m][to][0] = _mm256_add_epi16(planes[m][to][0], even);
                    planes[m][to][1] = _mm256_add_epi16(planes[m][to][1], odd);
                }
            }
        }
        for m in 0..M {
            let at = (first + m) * groups + g;
            let sum = *args.sums.get_unchecked(at);
            let (correction, sum_of_a) = (offset * sum, sum as f32);
            let a = *args.scales.get_unchecked(at);
            for pair in 0..2 {
                let mut sums = [_mm256_set1_epi32(correction); 2];
                if NARROW {
                    // Plane b has weight 2^b, and its start with it: the first accumulator began with plane 0's only.
                    let missing: usize = (0..N).map(|plane| 1 << plane).sum::<usize>();
                    let begun: usize = (0..N).step_by(2).map(|plane| 1 << plane).sum::<usize>();
                    let rest = ((missing - begun) * (size / 32 * 4096)).wrapping_neg() as i32;
                    let mut total = _mm256_set1_epi16(correction.wrapping_add(rest) as i16);
                    for plane in (0..N).step_by(2) {
                        let shift = _mm_cvtsi32_si128(plane as i32);
                        total = _mm256_add_epi16(total, _mm256_sll_epi16(planes[m][plane][pair], shift));
                    }
                    sums = [widen::<0>(total), widen::<1>(total)];
                } else {
                    for plane in 0..N {
                        let shift = _mm_cvtsi32_si128(plane as i32);
                        let sum = planes[m][plane][pair];
                        sums[0] = _mm256_add_epi32(sums[0], _mm256_sll_epi32(widen::<0>(sum), shift));
                        sums[1] = _mm256_add_epi32(sums[1], _mm256_sll_epi32(widen::<1>(sum), shift));
                    }
                }
                // Rows 8·pair .. + 8 are the lower half, rows 16 + 8·pair .. the upper.
                for (half, sum) in sums.into_iter().enumerate() {
                    let quarter = pair + 2 * half;
                    let scale = scales(args, group, quarter, a);
                    acc[m][quarter] = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(sum), acc[m][quarter]);
                    if args.form.scale == ScaleKind::F16Min {
                        let min = scales(args, group, quarter + TILE / 8, a);
                        acc[m][quarter] = _mm256_fmadd_ps(min, _mm256_set1_ps(sum_of_a), acc[m][quarter]);
                    }
                }
            }
        }
    }
    for (m, acc) in acc.into_iter().enumerate() {
        for (quarter, acc) in acc.into_iter().enumerate() {
            _mm256_storeu_ps(out[j + m].as_mut_ptr().add(8 * quarter), acc);
        }
    }
}

/// Half of sixteen i16 as i32.
#[inline(always)]
unsafe fn widen<const HALF: i32>(v: __m256i) -> __m256i {
    _mm256_cvtepi16_epi32(_mm256_extracti128_si256::<HALF>(v))
}

/// Eight rows.
struct Rows;

// SAFETY (of every method): the trait's.
impl Dot for Rows {
    type Int = __m256i;
    type Float = __m256;
    const LANES: usize = 8;
    const SIGNED_BIAS: i32 = 0;
    const PAIRS: bool = true;

    #[inline(always)]
    unsafe fn splat(value: i32) -> __m256i {
        _mm256_set1_epi32(value)
    }
    #[inline(always)]
    unsafe fn load(from: *const u8) -> __m256i {
        load(from)
    }
    #[inline(always)]
    unsafe fn and(a: __m256i, b: __m256i) -> __m256i {
        _mm256_and_si256(a, b)
    }
    #[inline(always)]
    unsafe fn or(a: __m256i, b: __m256i) -> __m256i {
        _mm256_or_si256(a, b)
    }
    #[inline(always)]
    unsafe fn add(a: __m256i, b: __m256i) -> __m256i {
        _mm256_add_epi32(a, b)
    }
    #[inline(always)]
    unsafe fn sub(a: __m256i, b: __m256i) -> __m256i {
        _mm256_sub_epi32(a, b)
    }
    #[inline(always)]
    unsafe fn mul(a: __m256i, b: __m256i) -> __m256i {
        _mm256_mullo_epi32(a, b)
    }
    #[inline(always)]
    unsafe fn shl(a: __m256i, n: u32) -> __m256i {
        _mm256_sllv_epi32(a, _mm256_set1_epi32(n as i32))
    }
    #[inline(always)]
    unsafe fn shr(a: __m256i, n: u32) -> __m256i {
        _mm256_srlv_epi32(a, _mm256_set1_epi32(n as i32))
    }
    /// A pair of products is at most 2·127·127 = 32258 and fits i16.
    #[inline(always)]
    unsafe fn dot(acc: __m256i, codes: __m256i, a: i32) -> __m256i {
        let pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi32(a));
        _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
    }
    /// Pairs of products, at most 2·MOST·127, are added as halves as far as those hold them.
    #[inline(always)]
    unsafe fn dots<const MOST: i32>(acc: __m256i, codes: &[__m256i], a: *const i8) -> __m256i {
        let mut acc = acc;
        let mut at = 0;
        for codes in codes.chunks((i16::MAX as i32 / (2 * 127 * MOST)) as usize) {
            let mut halves = _mm256_setzero_si256();
            for &codes in codes {
                let four = a.add(4 * at).cast::<i32>().read_unaligned();
                halves = _mm256_add_epi16(halves, _mm256_maddubs_epi16(codes, _mm256_set1_epi32(four)));
                at += 1;
            }
            acc = _mm256_add_epi32(acc, _mm256_madd_epi16(halves, _mm256_set1_epi16(1)));
        }
        acc
    }
    /// |w| as an unsigned byte times sign(w)·a: ≤ 128·127 even for w = −128 (|−128| is 128 as u8, and a is not −128), so a
    /// pair is ≤ 32512 and fits i16.
    #[inline(always)]
    unsafe fn dot_signed(acc: __m256i, weights: __m256i, a: i32) -> __m256i {
        let a = _mm256_sign_epi8(_mm256_set1_epi32(a), weights);
        let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), a);
        _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
    }
    #[inline(always)]
    unsafe fn dot_halves(acc: __m256i, halves: __m256i, a: i32) -> __m256i {
        _mm256_add_epi32(acc, _mm256_madd_epi16(halves, _mm256_set1_epi32(a)))
    }
    #[inline(always)]
    unsafe fn pair(low: __m256i, high: __m256i) -> __m256i {
        _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi32(0xffff)), _mm256_slli_epi32::<16>(high))
    }
    #[inline(always)]
    unsafe fn dot_pairs(acc: __m256i, a: __m256i, b: __m256i) -> __m256i {
        _mm256_add_epi32(acc, _mm256_madd_epi16(a, b))
    }
    #[inline(always)]
    unsafe fn sub_halves(a: __m256i, b: __m256i) -> __m256i {
        _mm256_sub_epi16(a, b)
    }
    #[inline(always)]
    unsafe fn both<const BYTE: u32>(a: __m256i) -> __m256i {
        // 0x80 gives a zero.
        let of = |lane: u32| (0x8000_8000 | (4 * lane + BYTE) << 16 | (4 * lane + BYTE)) as i32;
        let lanes = _mm_setr_epi32(of(0), of(1), of(2), of(3));
        _mm256_shuffle_epi8(a, _mm256_broadcastsi128_si256(lanes))
    }
    #[inline(always)]
    unsafe fn nibbles(from: *const u8) -> __m256i {
        let words = _mm256_set1_epi32(from.cast::<i32>().read_unaligned());
        let places = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
        _mm256_and_si256(_mm256_srlv_epi32(words, places), _mm256_set1_epi32(15))
    }
    #[inline(always)]
    unsafe fn lookup(table: &'static [i8; 16], index: __m256i) -> __m256i {
        _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast())), index)
    }
    /// `Codes::Trits`: a byte's first digit is 0 below 86, 1 below 171, else 2 (⌊3·q / 256⌋, for every q); times 3 brings up the
    /// next. Comparison is of signed bytes: everything is moved by 128, which multiplication by 3 keeps (3·128 ≡ 128 mod 256).
    #[inline(always)]
    unsafe fn digits(bytes: __m256i) -> [__m256i; 5] {
        let (one, two) =
            (_mm256_set1_epi8(86u8.wrapping_sub(128) as i8), _mm256_set1_epi8(171u8.wrapping_sub(128) as i8));
        let mut q = _mm256_xor_si256(bytes, _mm256_set1_epi8(-128));
        let mut out = [_mm256_setzero_si256(); 5];
        for digit in &mut out {
            let below = _mm256_add_epi8(_mm256_cmpgt_epi8(one, q), _mm256_cmpgt_epi8(two, q));
            *digit = _mm256_add_epi8(_mm256_set1_epi8(2), below);
            q = _mm256_add_epi8(q, _mm256_add_epi8(q, q));
        }
        out
    }
    #[inline(always)]
    unsafe fn to_float(a: __m256i) -> __m256 {
        _mm256_cvtepi32_ps(a)
    }
    #[inline(always)]
    unsafe fn splat_float(value: f32) -> __m256 {
        _mm256_set1_ps(value)
    }
    #[inline(always)]
    unsafe fn load_float(from: *const f32) -> __m256 {
        _mm256_loadu_ps(from)
    }
    #[inline(always)]
    unsafe fn load_half(from: *const u8) -> __m256 {
        _mm256_cvtph_ps(_mm_loadu_si128(from.cast()))
    }
    #[inline(always)]
    unsafe fn mul_float(a: __m256, b: __m256) -> __m256 {
        _mm256_mul_ps(a, b)
    }
    #[inline(always)]
    unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
        _mm256_fmadd_ps(a, b, c)
    }
    #[inline(always)]
    unsafe fn prefetch(from: *const u8) {
        _mm_prefetch::<_MM_HINT_T0>(from.cast());
    }
    #[inline(always)]
    unsafe fn store(a: __m256, to: *mut f32) {
        _mm256_storeu_ps(to, a);
    }
}
