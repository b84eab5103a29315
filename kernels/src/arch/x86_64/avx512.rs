//! AVX-512 with VNNI and VBMI (Ice Lake, Zen 4 and later): 16 rows to a register, one instruction for four k of each.
//!
//! Float operations other than attention, and quantising, are AVX2's: eight lanes are the virtual vector anyway, and none of them
//! is what a token waits for.

use super::avx2::{self, Lanes};
use super::lookup;
use crate::arch::dot::{dot_kernels, dot_table, Dot, NEAR};
use crate::arch::vector::Vector;
use crate::dispatch::{Isa, Kernels, Variant};
use crate::matmul::{TileArgs, TileOut};
use crate::ops::attention::{attend, Task, Work};
use crate::ops::{float_ops, FloatOps};
use crate::pack::fields::WORD;
use crate::pack::{trits, Codes, PackedForm, SourceType};
use std::arch::asm;
use std::arch::x86_64::*;

/// The set, if this machine can run it.
pub(crate) fn kernels() -> Option<&'static Kernels> {
    let usable = avx2::kernels().is_some()
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni")
        && is_x86_feature_detected!("avx512vbmi");
    usable.then_some(&KERNELS)
}

static KERNELS: Kernels = SET;

pub(super) const SET: Kernels = Kernels {
    isa: Isa::Avx512,
    variants,
    preferred,
    quantize: avx2::quantize,
    tabling: lookup::SIXES,
    ops: FloatOps {
        attend: attend_wide,
        ..float_ops!(Lanes, "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi,avx2,fma,f16c")
    },
    read,
};

fn preferred(ty: SourceType) -> PackedForm {
    match ty {
        SourceType::TQ1_0 => PackedForm { codes: Codes::IndexedTrits, ..PackedForm::of(ty) },
        _ => PackedForm::of(ty),
    }
}

pub(super) fn variants(form: PackedForm) -> &'static [Variant] {
    match form.codes {
        Codes::Float(_) => avx2::variants(form),
        Codes::Planes(_) => lookup::variants(form),
        _ => dot_variants(form),
    }
}

dot_kernels!(Rows, "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi,avx2,fma,f16c");
dot_table!(dot_variants, Rows, Codes::IndexedTrits);

/// # Safety
///
/// The machine has AVX-512.
#[target_feature(enable = "avx512f")]
unsafe fn read(words: &[u64]) -> u64 {
    words.iter().fold(0, |sum, word| sum ^ word)
}

/// # Safety
///
/// `attend`'s, and the machine has the set.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi,avx2,fma,f16c")]
unsafe fn attend_wide(task: &Task, work: &mut Work, out: &mut [f32]) {
    attend::<Wide>(task, work, out);
}

/// Sixteen floats.
#[derive(Clone, Copy)]
struct Wide(__m512);

// SAFETY (of every method): the trait's.
impl Vector for Wide {
    const LANES: usize = 16;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Wide(_mm512_set1_ps(value))
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        Wide(_mm512_loadu_ps(from))
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        _mm512_storeu_ps(to, self.0);
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        Wide(_mm512_cvtph_ps(_mm256_loadu_si256(from.cast())))
    }
    #[inline(always)]
    unsafe fn store_f16(self, to: *mut u16) {
        _mm256_storeu_si256(to.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0));
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
        Wide(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)))
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self {
        Wide(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()))))
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        Wide(_mm512_add_ps(self.0, other.0))
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        Wide(_mm512_sub_ps(self.0, other.0))
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        Wide(_mm512_mul_ps(self.0, other.0))
    }
    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        Wide(_mm512_div_ps(self.0, other.0))
    }
    #[inline(always)]
    unsafe fn fma(self, factor: Self, addend: Self) -> Self {
        Wide(_mm512_fmadd_ps(self.0, factor.0, addend.0))
    }
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        Wide(_mm512_max_ps(self.0, other.0))
    }
    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        Wide(_mm512_min_ps(self.0, other.0))
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        Wide(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0))
    }
    #[inline(always)]
    unsafe fn exp2_integer(self) -> Self {
        let biased = _mm512_add_epi32(_mm512_cvtps_epi32(self.0), _mm512_set1_epi32(127));
        Wide(_mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased)))
    }
    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        _mm_prefetch::<_MM_HINT_T1>(at.cast());
    }
    #[inline(always)]
    unsafe fn reduce_max(self) -> f32 {
        _mm512_reduce_max_ps(self.0)
    }
}

/// Sixteen rows.
pub(super) struct Rows;

// SAFETY (of every method): the trait's.
impl Dot for Rows {
    type Int = __m512i;
    type Float = __m512;
    const LANES: usize = 16;
    /// VPDPBUSD takes unsigned weights: w + 128.
    const SIGNED_BIAS: i32 = 128;
    const PLACED: bool = true;
    const PAIRS: bool = true;
    const TILES: usize = 2;

    #[inline(always)]
    unsafe fn splat(value: i32) -> __m512i {
        _mm512_set1_epi32(value)
    }
    #[inline(always)]
    unsafe fn load(from: *const u8) -> __m512i {
        _mm512_loadu_si512(from.cast())
    }
    #[inline(always)]
    unsafe fn and(a: __m512i, b: __m512i) -> __m512i {
        _mm512_and_si512(a, b)
    }
    #[inline(always)]
    unsafe fn or(a: __m512i, b: __m512i) -> __m512i {
        _mm512_or_si512(a, b)
    }
    #[inline(always)]
    unsafe fn add(a: __m512i, b: __m512i) -> __m512i {
        _mm512_add_epi32(a, b)
    }
    #[inline(always)]
    unsafe fn sub(a: __m512i, b: __m512i) -> __m512i {
        _mm512_sub_epi32(a, b)
    }
    #[inline(always)]
    unsafe fn mul(a: __m512i, b: __m512i) -> __m512i {
        _mm512_mullo_epi32(a, b)
    }
    #[inline(always)]
    unsafe fn shl(a: __m512i, n: u32) -> __m512i {
        _mm512_sllv_epi32(a, _mm512_set1_epi32(n as i32))
    }
    #[inline(always)]
    unsafe fn shr(a: __m512i, n: u32) -> __m512i {
        _mm512_srlv_epi32(a, _mm512_set1_epi32(n as i32))
    }
    #[inline(always)]
    unsafe fn sar(a: __m512i, n: u32) -> __m512i {
        _mm512_srav_epi32(a, _mm512_set1_epi32(n as i32))
    }
    #[inline(always)]
    unsafe fn dot(acc: __m512i, codes: __m512i, a: i32) -> __m512i {
        _mm512_dpbusd_epi32(acc, codes, _mm512_set1_epi32(a))
    }
    #[inline(always)]
    unsafe fn dot_signed(acc: __m512i, weights: __m512i, a: i32) -> __m512i {
        let moved = _mm512_xor_si512(weights, _mm512_set1_epi8(-128));
        _mm512_dpbusd_epi32(acc, moved, _mm512_set1_epi32(a))
    }
    #[inline(always)]
    unsafe fn dot_halves(acc: __m512i, halves: __m512i, a: i32) -> __m512i {
        _mm512_dpwssd_epi32(acc, halves, _mm512_set1_epi32(a))
    }
    #[inline(always)]
    unsafe fn pair(low: __m512i, high: __m512i) -> __m512i {
        _mm512_or_si512(_mm512_and_si512(low, _mm512_set1_epi32(0xffff)), _mm512_slli_epi32::<16>(high))
    }
    #[inline(always)]
    unsafe fn dot_pairs(acc: __m512i, a: __m512i, b: __m512i) -> __m512i {
        _mm512_dpwssd_epi32(acc, a, b)
    }
    #[inline(always)]
    unsafe fn sub_halves(a: __m512i, b: __m512i) -> __m512i {
        _mm512_sub_epi16(a, b)
    }
    #[inline(always)]
    unsafe fn both<const BYTE: u32>(a: __m512i) -> __m512i {
        // 0x80 gives a zero.
        let of = |lane: u32| (0x8000_8000 | (4 * lane + BYTE) << 16 | (4 * lane + BYTE)) as i32;
        let lanes = _mm_setr_epi32(of(0), of(1), of(2), of(3));
        _mm512_shuffle_epi8(a, _mm512_broadcast_i32x4(lanes))
    }
    #[inline(always)]
    unsafe fn nibbles(from: *const u8) -> __m512i {
        let words = _mm512_set1_epi64(from.cast::<i64>().read_unaligned());
        let words = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1), words);
        let places = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
        _mm512_and_si512(_mm512_srlv_epi32(words, places), _mm512_set1_epi32(15))
    }
    #[inline(always)]
    unsafe fn lookup(table: &'static [i8; 16], index: __m512i) -> __m512i {
        let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
        _mm512_shuffle_epi8(table, index)
    }
    #[inline(always)]
    unsafe fn digits(bytes: __m512i) -> [__m512i; 5] {
        let [four, last] = Self::packed_digits(bytes);
        let three = _mm512_set1_epi8(3);
        [
            _mm512_and_si512(four, three),
            _mm512_and_si512(_mm512_srli_epi32::<2>(four), three),
            _mm512_and_si512(_mm512_srli_epi32::<4>(four), three),
            _mm512_and_si512(_mm512_srli_epi32::<6>(four), three),
            _mm512_and_si512(_mm512_srli_epi32::<6>(last), three),
        ]
    }
    /// `Codes::IndexedTrits`. VPERMB looks at the low six bits of an index, and with a mask leaves the other bytes as they are: 14
    /// instructions for 5 × 64 digits, with five to mask digits and five to multiply, and none of several operations.
    #[inline(always)]
    unsafe fn packed_digits(bytes: __m512i) -> [__m512i; 2] {
        let marked = _mm512_cmpge_epu8_mask(bytes, _mm512_set1_epi8(trits::MARK as i8));
        let beside = _mm512_permutexvar_epi8(bytes, _mm512_loadu_si512(trits::FIRST_DIGITS[0].as_ptr().cast()));
        let others = _mm512_loadu_si512(trits::FIRST_DIGITS[1].as_ptr().cast());
        let first = _mm512_mask_permutexvar_epi8(beside, marked, bytes, others);
        let last = _mm512_loadu_si512(trits::LAST_DIGIT.as_ptr().cast());
        [first, _mm512_mask_permutexvar_epi8(bytes, marked, bytes, last)]
    }
    #[inline(always)]
    unsafe fn to_float(a: __m512i) -> __m512 {
        _mm512_cvtepi32_ps(a)
    }
    #[inline(always)]
    unsafe fn splat_float(value: f32) -> __m512 {
        _mm512_set1_ps(value)
    }
    #[inline(always)]
    unsafe fn load_float(from: *const f32) -> __m512 {
        _mm512_loadu_ps(from)
    }
    #[inline(always)]
    unsafe fn load_half(from: *const u8) -> __m512 {
        _mm512_cvtph_ps(_mm256_loadu_si256(from.cast()))
    }
    #[inline(always)]
    unsafe fn mul_float(a: __m512, b: __m512) -> __m512 {
        _mm512_mul_ps(a, b)
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        _mm512_fmadd_ps(a, b, c)
    }
    #[inline(always)]
    unsafe fn prefetch(from: *const u8) {
        _mm_prefetch::<_MM_HINT_T1>(from.cast());
    }
    /// Into the first-level cache. One request alone does not do: early enough for memory it would fill that cache and its
    /// few buffers for lines to come.
    #[inline(always)]
    unsafe fn prefetch_near(from: *const u8) {
        _mm_prefetch::<_MM_HINT_T0>(from.cast());
    }
    /// Assembly, as the compiler moves the intrinsics of a loop to its end. For a group with sub-scales that is a burst of dozens,
    /// in which they wait for each other, and what follows for them.
    #[inline(always)]
    unsafe fn prefetch_here<const LINE: usize>(from: *const u8, ahead: usize) {
        asm!(
            "prefetcht1 [{from} + {ahead} + {line}]",
            "prefetcht0 [{from} + {near}]",
            from = in(reg) from,
            ahead = in(reg) ahead,
            line = const LINE * WORD,
            near = const NEAR / Self::TILES + LINE * WORD,
            options(nostack, preserves_flags, readonly)
        );
    }
    #[inline(always)]
    unsafe fn store(a: __m512, to: *mut f32) {
        _mm512_storeu_ps(to, a);
    }
}
