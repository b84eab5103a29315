//! AMX (Sapphire Rapids and later): int8 tiles for every 16 activation rows, AVX-512 for the rest.
//!
//! A packed tile has four neighbouring k of its 16 rows side by side in 64 bytes, which is one row of a tile register's second
//! operand. So the codes of up to 256 k are decoded to bytes once, in memory that stays in the L1 cache, and all activations,
//! which are the first operand as `quantize` left them, pass by: one instruction adds the products of 16 rows, 16 columns and
//! 64 k (32 where groups are that small) to i32 sums. Sub-scales are multiplied into the codes; a product of more than 8 bits
//! becomes two digits, 256·high + low, each an operand of its own. So a group of 256 leaves the tile registers once, and the
//! sums are integers as exact as in every other kernel: |Σ low·a| ≤ 256·255·127 < 2^23, and in all at most
//! 256·127·(128·32) < 2^31, as no code times its sub-scale is larger than 128·32.
//!
//! The instructions are inline assembly, since their intrinsics are not stable. Nothing else uses tile registers, so what one
//! block of assembly leaves in them the next finds there.

use super::avx512::{self, flat, nested, trits, Rows};
use crate::arch::dot::{self, dot_table, Dot};
use crate::dispatch::{Isa, Kernels, Variant};
use crate::matmul::{TileArgs, TileOut, BATCH, BLOCK};
use crate::pack::fields::{UNIT, WORD};
use crate::pack::{Codes, PackedForm, ScaleKind, Values, FIELD_TILE, PLANE_TILE};
use std::arch::asm;
use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::OnceLock;

/// The set, if this machine can run it and its kernel lets this process.
pub(crate) fn kernels() -> Option<&'static Kernels> {
    static USABLE: OnceLock<bool> = OnceLock::new();
    let usable = *USABLE.get_or_init(|| avx512::kernels().is_some() && has_instructions() && is_permitted());
    usable.then_some(&KERNELS)
}

fn has_instructions() -> bool {
    const TILE_AND_INT8: u32 = 1 << 24 | 1 << 25;
    __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & TILE_AND_INT8 == TILE_AND_INT8
}

/// Tile registers are saved for those processes alone that asked. A Linux that does not know them refuses.
#[cfg(target_os = "linux")]
fn is_permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: the call takes two integers and touches no memory of ours.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn is_permitted() -> bool {
    false
}

static KERNELS: Kernels = Kernels { isa: Isa::Amx, variants, ..avx512::SET };

const TILES: Variant =
    Variant { name: "tiles", tile, tiles: 1, widths: &[BATCH, 32, 16], tables: false, blocks: false };
/// Of `small_groups`.
const TILES_OF_SMALL: Variant = Variant { blocks: true, ..TILES };

fn variants(form: PackedForm) -> &'static [Variant] {
    match decoder(form) {
        Some(_) if reads_blocks(form) => with_tiles_of_small(form),
        Some(_) => with_tiles(form),
        None => avx512::variants(form),
    }
}

dot_table!(with_tiles, Rows, Codes::IndexedTrits, TILES);
dot_table!(with_tiles_of_small, Rows, Codes::IndexedTrits, TILES_OF_SMALL);

/// k that are decoded at once: no group is larger.
const CHUNK: usize = 256;

/// Tiles of weights that are decoded together, at most.
const MOST_TILES: usize = <Rows as Dot>::TILES;

/// A chunk of a tile.
#[repr(align(64))]
struct Operand {
    /// Products of codes and sub-scales, four k of each row in a line: signed bytes, or the low of two digits, unsigned.
    low: [[u8; WORD]; CHUNK / 4],
    /// The other digit, signed.
    high: [[u8; WORD]; CHUNK / 4],
    /// Of each group.
    scales: [__m512; CHUNK / UNIT],
    minima: [__m512; CHUNK / UNIT],
    /// Minima of subs 2i and 2i + 1 as halves of each row's lane.
    sub_minima: [__m512i; CHUNK / UNIT],
}

/// Decodes group `g` of a chunk, whose first byte is at `group`.
///
/// # Safety
///
/// The machine has AVX-512, a group of the decoder's form is at `group`, and `operand` may be written to.
type Decode = unsafe fn(args: &TileArgs, group: *const u8, g: usize, operand: *mut Operand);

/// What to decode a form with, and what multiplies the result. `None` if tiles do not serve it.
fn decoder(form: PackedForm) -> Option<(Decode, Multiply)> {
    use dot::{E8M0, F16, F16_MIN, SUB4_MIN, SUB6, SUB6_MIN, SUB6_OF_32, SUB8, TENSOR};
    use dot::{IQ1, IQ2, IQ3_S, IQ3_XXS, IQ4_NL, MXFP4};
    use ScaleKind as S;
    if CHUNK % form.group as usize != 0 || form.group as usize % UNIT != 0 {
        return None;
    }
    Some(match (form.codes, form.values, form.scale) {
        (Codes::Fields(1), Values::Offset(_), S::F16Min) => (decode_flat::<1, F16_MIN>, multiply::<1, OF_GROUP>),
        (Codes::Fields(2), Values::Offset(_), S::F16) => (decode_flat::<2, F16>, multiply::<1, NONE>),
        (Codes::Fields(2), Values::Offset(_), S::Tensor) => (decode_flat::<2, TENSOR>, multiply::<1, NONE>),
        (Codes::Fields(2), Values::Offset(_), S::F16Min) => (decode_flat::<2, F16_MIN>, multiply::<1, OF_GROUP>),
        (Codes::Fields(3), Values::Offset(_), S::F16Min) => (decode_flat::<3, F16_MIN>, multiply::<1, OF_GROUP>),
        (Codes::Fields(4), Values::Offset(_), S::F16) => (decode_flat::<4, F16>, multiply::<1, NONE>),
        (Codes::Fields(4), Values::Offset(_), S::F16Min) => (decode_flat::<4, F16_MIN>, multiply::<1, OF_GROUP>),
        (Codes::Fields(4), Values::Iq4Nl, S::F16) => (decode_flat::<IQ4_NL, F16>, multiply::<1, NONE>),
        (Codes::Fields(4), Values::Mxfp4, S::E8M0) => (decode_flat::<MXFP4, E8M0>, multiply::<1, NONE>),
        (Codes::Fields(5), Values::Offset(_), S::F16) => (decode_flat::<5, F16>, multiply::<1, NONE>),
        (Codes::Fields(5), Values::Offset(_), S::F16Min) => (decode_flat::<5, F16_MIN>, multiply::<1, OF_GROUP>),
        (Codes::Fields(8), Values::Offset(_), S::F16) => (decode_flat::<8, F16>, multiply::<1, NONE>),
        (Codes::Fields(2), Values::Offset(_), S::Sub4Min) => (decode_nested::<2, SUB4_MIN>, multiply::<1, OF_SUBS>),
        (Codes::Fields(3), Values::Offset(_), S::Sub6) => (decode_nested::<3, SUB6>, multiply::<2, NONE>),
        (Codes::Fields(4), Values::Offset(_), S::Sub6Min) => (decode_nested::<4, SUB6_MIN>, multiply::<2, OF_SUBS>),
        (Codes::Fields(5), Values::Offset(_), S::Sub6Min) => (decode_nested::<5, SUB6_MIN>, multiply::<2, OF_SUBS>),
        (Codes::Fields(6), Values::Offset(_), S::Sub8) => (decode_nested::<6, SUB8>, multiply::<2, NONE>),
        (Codes::Fields(3), Values::Iq1, S::Sub6Of32) => (decode_nested::<IQ1, SUB6_OF_32>, multiply::<2, NONE>),
        (Codes::Fields(3), Values::Iq1, S::Sub6) => (decode_nested::<IQ1, SUB6>, multiply::<2, NONE>),
        (Codes::Fields(3), Values::Iq2, S::Sub6Of32) => (decode_nested::<IQ2, SUB6_OF_32>, multiply::<2, NONE>),
        (Codes::Fields(3), Values::Iq2, S::Sub6) => (decode_nested::<IQ2, SUB6>, multiply::<2, NONE>),
        (Codes::Fields(4), Values::Iq3Xxs, S::Sub6Of32) => (decode_nested::<IQ3_XXS, SUB6_OF_32>, multiply::<2, NONE>),
        (Codes::Fields(4), Values::Iq3S, S::Sub6Of32) => (decode_nested::<IQ3_S, SUB6_OF_32>, multiply::<2, NONE>),
        (Codes::Fields(4), Values::Iq4Nl, S::Sub6Of32) => (decode_nested::<IQ4_NL, SUB6_OF_32>, multiply::<2, NONE>),
        (Codes::IndexedTrits, Values::Offset(_), S::F16) => (decode_trits, multiply::<1, NONE>),
        _ => return None,
    })
}

/// The offset in every byte.
#[inline(always)]
unsafe fn offset(form: PackedForm) -> __m512i {
    match form.values {
        Values::Offset(offset) => _mm512_set1_epi8(offset),
        _ => _mm512_setzero_si512(),
    }
}

#[inline(always)]
unsafe fn put(lines: *mut [[u8; WORD]; CHUNK / 4], line: usize, bytes: __m512i) {
    _mm512_store_si512(lines.cast::<__m512i>().add(line), bytes);
}

/// # Safety
///
/// `Decode`'s, for a form of these codes and scales.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi,avx2,fma,f16c")]
unsafe fn decode_flat<const CODES: u8, const SCALE: u8>(
    args: &TileArgs,
    group: *const u8,
    g: usize,
    operand: *mut Operand,
) {
    let units = args.form.group as usize / UNIT;
    let offset = offset(args.form);
    for unit in 0..units {
        let at = group.add(unit * dot::width(CODES) * WORD);
        dot::prefetch::<Rows, 1>(at, dot::width(CODES));
        let codes = dot::decode::<Rows, CODES>(at);
        for i in 0..8 {
            let line = (g * units + unit) * 8 + i;
            put(&raw mut (*operand).low, line, _mm512_add_epi8(codes[i], offset));
        }
    }
    decode_scales::<SCALE>(args, group.add(units * dot::width(CODES) * WORD), g, operand);
}

/// Scales and minima of a group, which are at `scales`.
#[inline(always)]
unsafe fn decode_scales<const SCALE: u8>(args: &TileArgs, scales: *const u8, g: usize, operand: *mut Operand) {
    dot::prefetch::<Rows, 1>(scales, 1);
    (*operand).scales[g] = dot::scale::<Rows, SCALE>(args, scales, 0);
    if SCALE == dot::F16_MIN || dot::has_sub_minima(SCALE) {
        (*operand).minima[g] = Rows::load_half(scales.add(2 * FIELD_TILE));
    }
}

/// # Safety
///
/// `Decode`'s, for a form of trits with an f16 scale.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi,avx2,fma,f16c")]
unsafe fn decode_trits(args: &TileArgs, group: *const u8, g: usize, operand: *mut Operand) {
    let lines = args.form.group as usize / 4;
    let words = lines.div_ceil(5);
    let offset = offset(args.form);
    for word in 0..words {
        let at = group.add(word * WORD);
        dot::prefetch::<Rows, 1>(at, 1);
        let digits = Rows::digits(Rows::load(at));
        // The last word's digits beyond the group have no place.
        for i in 0..5.min(lines - 5 * word) {
            put(&raw mut (*operand).low, g * lines + 5 * word + i, _mm512_add_epi8(digits[i], offset));
        }
    }
    decode_scales::<{ dot::F16 }>(args, group.add(words * WORD), g, operand);
}

/// # Safety
///
/// `Decode`'s, for a form of these codes and scales.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi,avx2,fma,f16c")]
unsafe fn decode_nested<const CODES: u8, const SCALE: u8>(
    args: &TileArgs,
    group: *const u8,
    g: usize,
    operand: *mut Operand,
) {
    let (sub, words) = (dot::sub(SCALE), dot::sub_words(SCALE));
    let offset = offset(args.form);
    dot::prefetch::<Rows, 1>(group, words);
    for quad in 0..CHUNK / sub / 4 {
        let (s, m) = dot::sub_scales::<Rows, SCALE>(group, quad);
        if dot::has_sub_minima(SCALE) {
            (*operand).sub_minima[2 * quad] = dot::halves::<Rows>(m, 0);
            (*operand).sub_minima[2 * quad + 1] = dot::halves::<Rows>(m, 1);
        }
        // In the order of the subs.
        let scales = [Rows::both::<0>(s), Rows::both::<2>(s), Rows::both::<1>(s), Rows::both::<3>(s)];
        for unit in 0..4 * sub / UNIT {
            let index = quad * 4 * sub / UNIT + unit;
            let at = group.add((words + index * dot::width(CODES)) * WORD);
            dot::prefetch::<Rows, 1>(at, dot::width(CODES));
            let codes = dot::decode::<Rows, CODES>(at);
            for i in 0..8 {
                let scale = scales[(unit * UNIT + 4 * i) / sub];
                let scale = _mm512_sub_epi16(scale, _mm512_set1_epi16(dot::bias(SCALE) as i16));
                let value = _mm512_add_epi8(codes[i], offset);
                // Of bytes 0 and 2, and of 1 and 3.
                let even = _mm512_mullo_epi16(_mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(value)), scale);
                let odd = _mm512_mullo_epi16(_mm512_srai_epi16::<8>(value), scale);
                const ODD: u64 = 0xaaaa_aaaa_aaaa_aaaa;
                let low = _mm512_mask_blend_epi8(ODD, even, _mm512_slli_epi16::<8>(odd));
                let high = _mm512_mask_blend_epi8(ODD, _mm512_srli_epi16::<8>(even), odd);
                put(&raw mut (*operand).low, index * 8 + i, low);
                if CODES != 2 {
                    put(&raw mut (*operand).high, index * 8 + i, high);
                }
            }
        }
    }
    decode_scales::<SCALE>(args, group.add((words + 8 * dot::width(CODES)) * WORD), g, operand);
    let unit = dot::table_values(CODES).unit();
    if unit != 1.0 {
        (*operand).scales[g] = _mm512_mul_ps((*operand).scales[g], _mm512_set1_ps(unit));
    }
}

/// `MINIMA`.
const NONE: u8 = 0;
const OF_GROUP: u8 = 1;
const OF_SUBS: u8 = 2;

/// Adds the products of a decoded chunk, groups `chunk` of each of the tiles, with the first `count` activation rows, a multiple
/// of `M`.
///
/// # Safety
///
/// The machine has AMX, the arguments are as `dot::check` wants them, with `args.first` a multiple of `M` and, if the form
/// `reads_blocks`, blocks of all `count` rows, `out` points to a `TileOut`, and of an operand for each tile everything is set
/// that `decoder` sets for the form's `chunk.len()` groups.
type Multiply = unsafe fn(args: &TileArgs, chunk: Range<usize>, operands: *const Operand, count: usize, out: *mut f32);

/// # Safety
///
/// `TileKernel`'s, for a form with a decoder.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi,avx2,fma,f16c")]
unsafe fn tile(args: &TileArgs, out: &mut TileOut) {
    let form = args.form;
    let groups = dot::check(args, 0, args.count);
    // Blocks of scales begin with every 16th row of all.
    let count = if args.first % M == 0 { args.count / M * M } else { 0 };
    let rest = args.count - count;
    if rest > 0 {
        let first = args.first + count;
        (avx512::variants(form)[0].tile)(&TileArgs { first, count: rest, ..*args }, out);
        out.copy_within(..rest, count);
    }
    if count == 0 {
        return;
    }
    assert!(args.tiles <= MOST_TILES);
    assert!(!reads_blocks(form) || args.blocks.len() >= (args.first + count) / M * groups);
    let (decode, multiply) = decoder(form).expect("only forms with a decoder have this kernel");
    for sums in &mut out[..count] {
        sums[..args.tiles * FIELD_TILE].fill(0.0);
    }
    // Not initialised as a whole: what a form has no use for is never written, nor read.
    let mut operands = MaybeUninit::<[Operand; MOST_TILES]>::uninit();
    let operands = operands.as_mut_ptr().cast::<Operand>();
    let config = Config::new(step(form));
    asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, preserves_flags, readonly));
    let (in_chunk, group_bytes) = (CHUNK / form.group as usize, form.group_tile_bytes());
    for first in (0..groups).step_by(in_chunk) {
        let chunk = first..groups.min(first + in_chunk);
        for t in 0..args.tiles {
            for g in chunk.clone() {
                let group = args.tile.as_ptr().add((t * groups + g) * group_bytes);
                decode(args, group, g - first, operands.add(t));
            }
        }
        multiply(args, chunk, operands, count, out.as_mut_ptr().cast());
    }
    asm!("tilerelease", options(nostack, preserves_flags));
}

/// Whether groups are so small that `small_groups` multiplies them.
fn reads_blocks(form: PackedForm) -> bool {
    form.group <= 64
}

/// Activation rows of a tile. Fewer are not worth one: AVX-512's kernels multiply them as fast.
const M: usize = BLOCK;

/// # Safety
///
/// `Multiply`'s, for a form of so many digits and such minima.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi,avx2,fma,f16c")]
unsafe fn multiply<const DIGITS: usize, const MINIMA: u8>(
    args: &TileArgs,
    chunk: Range<usize>,
    operands: *const Operand,
    count: usize,
    out: *mut f32,
) {
    // Small groups leave their sums so often that floats are better kept in registers.
    if DIGITS == 1 && MINIMA != OF_SUBS && reads_blocks(args.form) {
        return small_groups::<MINIMA>(args, chunk, operands, count, out);
    }
    for t in 0..args.tiles {
        let (operand, out) = (operands.add(t), out.add(t * FIELD_TILE));
        let mut j = 0;
        while j < count {
            // As many tiles of activations meet a tile of weights as there are tiles for their sums.
            let left = count - j;
            j += if DIGITS == 1 && left >= 4 * M {
                block::<DIGITS, MINIMA, 4>(args, &chunk, operand, j, out)
            } else if left >= 2 * M {
                block::<DIGITS, MINIMA, 2>(args, &chunk, operand, j, out)
            } else {
                block::<DIGITS, MINIMA, 1>(args, &chunk, operand, j, out)
            };
        }
    }
}

/// Products that are under way while an older one is added, and places for their sums: what a tile register holds gets into
/// floats only through the cache, and so many products later it is there.
const LAG: usize = 3;
const PLACES: usize = 4;

/// `multiply` of groups that leave the tile registers after an instruction or two.
///
/// A product and its store take 33 cycles, whatever else goes on, and adding the sums takes longer: while tiles are busy,
/// 512-bit floats are converted and multiplied on one port. So the two go on side by side, floats stay in registers over a
/// chunk, and a group's scales are in one line (`Block`). The tiles of weights meet activations while these are in the L1 cache.
#[inline(always)]
unsafe fn small_groups<const MINIMA: u8>(
    args: &TileArgs,
    chunk: Range<usize>,
    operands: *const Operand,
    count: usize,
    out: *mut f32,
) {
    let mut places = MaybeUninit::<[Sums; PLACES]>::uninit();
    let places = places.as_mut_ptr().cast::<Sums>();
    let groups = args.k / args.form.group as usize;
    let (mut j, mut t, mut g, mut to) = (0, 0, 0, 0);
    // The next product, into the next place.
    macro_rules! multiply {
        () => {
            if j < count {
                integers::<1, 1>(args, chunk.start + g, args.first + j, operands.add(t), g, places.add(to));
                to = (to + 1) % PLACES;
                g += 1;
                if g == chunk.len() {
                    (g, t) = (0, t + 1);
                }
                if t == args.tiles {
                    (t, j) = (0, j + M);
                }
            }
        };
    }
    for _ in 0..LAG {
        multiply!();
    }
    let mut from = 0;
    for row in (0..count).step_by(M) {
        let blocks = args.blocks.as_ptr().add((args.first + row) / M * groups + chunk.start);
        for tile in 0..args.tiles {
            let (operand, out) = (operands.add(tile), out.add(row * PLANE_TILE + tile * FIELD_TILE));
            let mut acc = [_mm512_setzero_ps(); M];
            for m in 0..M {
                acc[m] = _mm512_loadu_ps(out.add(m * PLANE_TILE));
            }
            for group in 0..chunk.len() {
                multiply!();
                let block = &*blocks.add(group);
                let mut sums = places.add(from).cast::<__m512i>();
                // An address as such: with an index beside it the loads would be instructions of their own.
                asm!("/* {0} */", inout(reg) sums, options(nostack, preserves_flags));
                for m in 0..M {
                    let a = _mm512_set1_ps(block.scales[m]);
                    let sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums.add(m)));
                    acc[m] = _mm512_fmadd_ps(_mm512_mul_ps((*operand).scales[group], a), sum, acc[m]);
                    if MINIMA == OF_GROUP {
                        let sum = _mm512_set1_ps(block.sums[m]);
                        acc[m] = _mm512_fmadd_ps(_mm512_mul_ps((*operand).minima[group], a), sum, acc[m]);
                    }
                }
                from = (from + 1) % PLACES;
            }
            for m in 0..M {
                _mm512_storeu_ps(out.add(m * PLANE_TILE), acc[m]);
            }
        }
    }
}

/// Code for tile `C`, a literal as assembly needs it; the loop around has constant bounds and is unrolled.
macro_rules! on_tile {
    ($tile:expr, $c:ident => $code:expr) => {
        match $tile {
            0 => {
                const $c: usize = 0;
                $code
            }
            1 => {
                const $c: usize = 1;
                $code
            }
            2 => {
                const $c: usize = 2;
                $code
            }
            _ => {
                const $c: usize = 3;
                $code
            }
        }
    };
}

/// k that one instruction multiplies.
#[inline(always)]
fn step(form: PackedForm) -> usize {
    if form.group % 64 == 0 {
        64
    } else {
        32
    }
}

/// What LDTILECFG reads.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Config {
    /// For steps of `k`. Tiles 0 to 3 are sums, 4 and 5 activations, 6 and 7 weights.
    fn new(k: usize) -> Config {
        let line = WORD as u16;
        let mut config = Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        config.row_bytes[..8].copy_from_slice(&[line, line, line, line, k as u16, k as u16, line, line]);
        config.rows[..6].fill(M as u8);
        config.rows[6..8].fill((k / 4) as u8);
        config
    }
}

/// The sums of a tile register, a line a row of activations.
#[repr(C, align(64))]
struct Sums([[i32; FIELD_TILE]; M]);

/// `T` tiles of activations, from row `j` on; returns their rows.
#[inline(always)]
unsafe fn block<const DIGITS: usize, const MINIMA: u8, const T: usize>(
    args: &TileArgs,
    chunk: &Range<usize>,
    operand: *const Operand,
    j: usize,
    out: *mut f32,
) -> usize {
    let mut sums = MaybeUninit::<[Sums; 4]>::uninit();
    let sums = sums.as_mut_ptr().cast::<Sums>();
    for g in 0..chunk.len() {
        integers::<DIGITS, T>(args, chunk.start + g, args.first + j, operand, g, sums);
        for t in 0..T {
            let sums = sums.add(t * DIGITS);
            for m in 0..M {
                let group = Group { row: args.first + j + t * M + m, index: chunk.start + g, in_chunk: g };
                let at = out.add((j + t * M + m) * PLANE_TILE);
                let sum = finish::<DIGITS, MINIMA>(args, operand, group, sums, m, _mm512_loadu_ps(at));
                _mm512_storeu_ps(at, sum);
            }
        }
    }
    M * T
}

/// A group of an activation row: its index in the row and in the chunk.
struct Group {
    row: usize,
    index: usize,
    in_chunk: usize,
}

/// `acc` and a group's product, row `m` of the sums.
#[inline(always)]
unsafe fn finish<const DIGITS: usize, const MINIMA: u8>(
    args: &TileArgs,
    operand: *const Operand,
    Group { row, index, in_chunk }: Group,
    sums: *const Sums,
    m: usize,
    acc: __m512,
) -> __m512 {
    let at = row * (args.k / args.form.group as usize) + index;
    let a = _mm512_set1_ps(*args.scales.get_unchecked(at));
    let line = sums.cast::<__m512i>().add(m);
    let mut sum = _mm512_load_si512(line);
    if DIGITS == 2 {
        sum = _mm512_add_epi32(sum, _mm512_slli_epi32::<8>(_mm512_load_si512(line.add(M))));
    }
    let mut acc = _mm512_fmadd_ps(_mm512_mul_ps((*operand).scales[in_chunk], a), _mm512_cvtepi32_ps(sum), acc);
    if MINIMA == OF_GROUP {
        let sum = _mm512_set1_ps(*args.sums.get_unchecked(at) as f32);
        acc = _mm512_fmadd_ps(_mm512_mul_ps((*operand).minima[in_chunk], a), sum, acc);
    }
    if MINIMA == OF_SUBS {
        let pairs = CHUNK / args.form.scale.sub(CHUNK) / 2;
        let b = args.sub_sums.as_ptr().cast::<i32>().add(at * pairs);
        let mut other = _mm512_setzero_si512();
        for pair in 0..pairs {
            let b = _mm512_set1_epi32(b.add(pair).read_unaligned());
            other = _mm512_dpwssd_epi32(other, (*operand).sub_minima[pair], b);
        }
        let other = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_setzero_si512(), other));
        acc = _mm512_fmadd_ps(_mm512_mul_ps((*operand).minima[in_chunk], a), other, acc);
    }
    acc
}

/// Σ code·a of group `group` of the rows, number `g` of the chunk, for `T` tiles of activations from `row` on.
#[inline(always)]
unsafe fn integers<const DIGITS: usize, const T: usize>(
    args: &TileArgs,
    group: usize,
    row: usize,
    operand: *const Operand,
    g: usize,
    sums: *mut Sums,
) {
    let (size, step) = (args.form.group as usize, step(args.form));
    let a = args.codes.as_ptr().add(row * args.k + group * size).cast::<u8>();
    let low = (&raw const (*operand).low).cast::<u8>().add(g * size / 4 * WORD);
    let high = (&raw const (*operand).high).cast::<u8>().add(g * size / 4 * WORD);
    for tile in 0..T * DIGITS {
        on_tile!(tile, C => asm!("tilezero tmm{c}", c = const C, options(nostack, preserves_flags)));
    }
    for k in (0..size).step_by(step) {
        load::<6>(low.add(k / 4 * WORD), WORD);
        if DIGITS == 2 {
            load::<7>(high.add(k / 4 * WORD), WORD);
        }
        for t in 0..T {
            let a = a.add(t * M * args.k + k);
            // In turns, so that one is loaded while the other is used.
            if t % 2 == 0 {
                load::<4>(a, args.k);
                products::<DIGITS, 4>(t * DIGITS);
            } else {
                load::<5>(a, args.k);
                products::<DIGITS, 5>(t * DIGITS);
            }
        }
    }
    for tile in 0..T * DIGITS {
        on_tile!(tile, C => asm!(
            "tilestored [{to} + {word} * 1], tmm{c}",
            to = in(reg) sums.add(tile),
            word = in(reg) WORD,
            c = const C,
            options(nostack, preserves_flags)
        ));
    }
}

#[inline(always)]
unsafe fn load<const TILE: usize>(from: *const u8, stride: usize) {
    asm!(
        "tileloadd tmm{tile}, [{from} + {stride} * 1]",
        from = in(reg) from,
        stride = in(reg) stride,
        tile = const TILE,
        options(nostack, preserves_flags, readonly)
    );
}

/// Adds activations × weights to the sums in tile `first` and, of a second digit, the next.
#[inline(always)]
unsafe fn products<const DIGITS: usize, const A: usize>(first: usize) {
    if DIGITS == 1 {
        on_tile!(first, C => asm!(
            "tdpbssd tmm{c}, tmm{a}, tmm6",
            c = const C, a = const A, options(nostack, preserves_flags)
        ));
    } else {
        on_tile!(first, C => asm!(
            "tdpbsud tmm{c}, tmm{a}, tmm6",
            c = const C, a = const A, options(nostack, preserves_flags)
        ));
        on_tile!(first + 1, C => asm!(
            "tdpbssd tmm{c}, tmm{a}, tmm7",
            c = const C, a = const A, options(nostack, preserves_flags)
        ));
    }
}
