//! Table lookup over bit planes with AVX-512: one instruction (VPERMB) looks up 64 bytes in a table of 64, so that an index is
//! of six bits, where other sets have tables of 16 for the four bits of a nibble.
//!
//! The planes are those that all sets read (`pack::planes`): a byte has one bit of each of eight k, an octet. Of a set of r = 1, 2
//! or 3 octets, the low six bits of each byte are an index as they stand, since VPERMB looks at no others; the upper two bits of
//! all r bytes together are one more. So 24 k take four lookups, and a group is sets of three octets and one of the rest.
//!
//! A table entry v is a subset sum of six activations, −762 ..= 762, as two bytes: v + `MOVED` = `BASE`·high + low with low ≤ 39
//! and high ≤ 38. `PENDING` = 6 lookups are added as bytes, ≤ 234.

#![allow(clippy::needless_range_loop)] // tiles, planes and rows of activations are places in several arrays at once

use super::avx512::Rows;
use crate::arch::dot::{check, Dot, NEAR};
use crate::dispatch::Variant;
use crate::matmul::{TileArgs, TileKernel, TileOut, BATCH};
use crate::pack::{Codes, PackedForm, ScaleKind, Values, PLANE_TILE as TILE};
use crate::quantize::{Line, Tabling};
use std::arch::asm;
use std::arch::x86_64::*;

/// What makes entries positive.
const MOVED: i32 = 6 * 127;
const BASE: i32 = 40;
/// Lookups that are added as bytes.
const PENDING: usize = 6;
/// Octets of a whole set.
const SET: usize = 3;

const _: () = {
    let most = 2 * MOVED;
    assert!(PENDING % 2 == 0 && PENDING as i32 * (BASE - 1) <= 255 && PENDING as i32 * (most / BASE) <= 255);
    // One multiply-add of unsigned bytes with (1, BASE) does not saturate.
    assert!(255 * (1 + BASE) <= i16::MAX as i32);
};

/// Lookups of a group.
const fn lookups(group: usize) -> usize {
    let octets = group / 8;
    let rest = octets % SET;
    octets / SET * (SET + 1) + if rest > 0 { rest + 1 } else { 0 }
}

/// For every lookup of a group a line of low and a line of high bytes.
pub(super) const SIXES: Tabling = Tabling { lines: |group| 2 * lookups(group), build };

/// # Safety
///
/// The machine has AVX-512; there are the lines that `SIXES` says.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn build(codes: &[i8], group: usize, lines: &mut [Line]) {
    assert!(group % 8 == 0 && codes.len() % group == 0 && lines.len() == codes.len() / group * 2 * lookups(group));
    let mut lines = lines.chunks_exact_mut(2);
    for group in codes.chunks_exact(group) {
        for set in group.chunks(8 * SET) {
            let mut uppers = 0;
            for (i, octet) in set.chunks_exact(8).enumerate() {
                let octet = octet.as_ptr().cast::<u64>().read_unaligned();
                uppers |= (octet >> 48) << (16 * i);
                table(octet, lines.next().expect("a table"));
            }
            table(uppers, lines.next().expect("a table"));
        }
    }
}

/// The table of the lower six bytes.
#[inline(always)]
unsafe fn table(codes: u64, lines: &mut [Line]) {
    /// Factors of codes `pair` and the next for entry 16·(i/8) + i%8: those in which bit 3 is clear, in the order in which
    /// packing puts them beside the others.
    const fn factors(pair: usize) -> [u8; 64] {
        let mut out = [0; 64];
        let mut i = 0;
        while i < 64 {
            let entry = i / 2 / 8 * 16 + i / 2 % 8;
            out[i] = (entry >> (pair + i % 2) & 1) as u8;
            i += 1;
        }
        out
    }
    static FACTORS: [[u8; 64]; 3] = [factors(0), factors(2), factors(4)];
    let mut clear = _mm512_set1_epi16(MOVED as i16);
    for (pair, factors) in FACTORS.iter().enumerate() {
        let two = _mm512_set1_epi16((codes >> (16 * pair)) as i16);
        let sums = _mm512_maddubs_epi16(_mm512_loadu_si512(factors.as_ptr().cast()), two);
        clear = _mm512_add_epi16(clear, sums);
    }
    let set = _mm512_add_epi16(clear, _mm512_set1_epi16((codes >> 24) as i8 as i16));
    // x / 40 = x·1639 >> 16 for every x ≤ 2·MOVED.
    let base = _mm512_set1_epi16(BASE as i16);
    let divide = _mm512_set1_epi16(1639);
    let highs = [_mm512_mulhi_epu16(clear, divide), _mm512_mulhi_epu16(set, divide)];
    let lows = [
        _mm512_sub_epi16(clear, _mm512_mullo_epi16(highs[0], base)),
        _mm512_sub_epi16(set, _mm512_mullo_epi16(highs[1], base)),
    ];
    for (line, [clear, set]) in lines.iter_mut().zip([lows, highs]) {
        _mm512_store_si512(line.0.as_mut_ptr().cast(), _mm512_packus_epi16(clear, set));
    }
}

/// The kernels for a form of bit planes, if there are any.
pub(super) fn variants(form: PackedForm) -> &'static [Variant] {
    const fn lookup(tile: TileKernel, tiles: usize) -> Variant {
        Variant { name: "lookup", tile, tiles, widths: &[8], tables: true, blocks: false }
    }
    if !matches!((form.values, form.scale), (Values::Offset(_), ScaleKind::F16 | ScaleKind::F16Min)) {
        return &[];
    }
    if form.group % 32 != 0 || form.group > 256 {
        return &[];
    }
    match form.codes {
        Codes::Planes(1) => const { &[lookup(tile::<1, 1, 2, 2>, 2)] },
        Codes::Planes(2) => const { &[lookup(tile::<2, 2, 2, 2>, 2)] },
        Codes::Planes(3) => const { &[lookup(tile::<3, 3, 2, 1>, 2)] },
        Codes::Planes(4) => const { &[lookup(tile::<4, 2, 1, 2>, 1)] },
        _ => &[],
    }
}

/// `N` planes, in `Z` registers, of up to `T` tiles at once, `M` rows of activations at a time.
///
/// # Safety
///
/// `TileKernel`'s; the form is one that `variants` gives this instance for.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi,avx2,fma,f16c")]
unsafe fn tile<const N: usize, const Z: usize, const T: usize, const M: usize>(args: &TileArgs, out: &mut TileOut) {
    let mut j = 0;
    while j + M <= args.count {
        rows::<N, Z, T, M>(args, j, out);
        j += M;
    }
    while j < args.count {
        rows::<N, Z, T, 1>(args, j, out);
        j += 1;
    }
}

/// Sums of a group, the rows of `Z` registers with `M` rows of activations: in each register two planes of 32 rows.
struct Sums<const Z: usize, const M: usize> {
    low: [[__m512i; Z]; M],
    high: [[__m512i; Z]; M],
    /// Of rows 0–7 and 16–23 of both planes, and of rows 8–15 and 24–31.
    planes: [[[__m512i; 2]; Z]; M],
}

impl<const Z: usize, const M: usize> Sums<Z, M> {
    /// Looks up by each index; the tables of the next row of activations follow after `stride` lines. Then points to the next
    /// table.
    #[inline(always)]
    unsafe fn look_up(&mut self, indices: &[[__m512i; Z]], table: &mut *const Line, stride: usize) {
        for index in indices {
            for m in 0..M {
                let at = table.add(m * stride);
                let (low, high) = (_mm512_load_si512(at.cast()), _mm512_load_si512(at.add(1).cast()));
                for z in 0..Z {
                    self.low[m][z] = done(_mm512_add_epi8(self.low[m][z], _mm512_permutexvar_epi8(index[z], low)));
                    self.high[m][z] = done(_mm512_add_epi8(self.high[m][z], _mm512_permutexvar_epi8(index[z], high)));
                }
            }
            *table = table.add(2);
        }
    }

    /// Adds what is pending to the planes' sums.
    #[inline(always)]
    unsafe fn flush(&mut self) {
        let weights = _mm512_set1_epi16((BASE << 8 | 1) as i16);
        for m in 0..M {
            for z in 0..Z {
                let (low, high) = (self.low[m][z], self.high[m][z]);
                let even = _mm512_maddubs_epi16(_mm512_unpacklo_epi8(low, high), weights);
                let odd = _mm512_maddubs_epi16(_mm512_unpackhi_epi8(low, high), weights);
                self.planes[m][z][0] = _mm512_add_epi16(self.planes[m][z][0], even);
                self.planes[m][z][1] = _mm512_add_epi16(self.planes[m][z][1], odd);
                (self.low[m][z], self.high[m][z]) = (_mm512_setzero_si512(), _mm512_setzero_si512());
            }
        }
    }
}

/// The sum, not to be broken up: the compiler would add in another order, for which registers do not suffice.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn done(mut sum: __m512i) -> __m512i {
    asm!("/* {} */", inout(zmm_reg) sum, options(pure, nomem, nostack, preserves_flags));
    sum
}

/// The bytes of an octet of two tiles: of each two planes, or of the last plane of both if their number is odd.
#[inline(always)]
unsafe fn octet<const N: usize, const Z: usize>(tiles: [*const u8; 2], octet: usize) -> [__m512i; Z] {
    let mut bytes = [_mm512_setzero_si512(); Z];
    for z in 0..Z {
        bytes[z] = if N % 2 == 1 && z == Z - 1 {
            let last = tiles.map(|tile| tile.wrapping_add((octet * N + N - 1) * TILE));
            let first = _mm512_castsi256_si512(_mm256_loadu_si256(last[0].cast()));
            _mm512_inserti64x4::<1>(first, _mm256_loadu_si256(last[1].cast()))
        } else {
            let (tile, pair) = if N == 4 { (tiles[0], z) } else { (tiles[z], 0) };
            _mm512_loadu_si512(tile.add((octet * N + 2 * pair) * TILE).cast())
        };
    }
    bytes
}

/// Asks for what lies ahead of so many bytes of tiles. Close by, and a few lines at a time: what is asked for takes the place of
/// tables in the first-level cache, and their loads wait behind many requests.
#[inline(always)]
unsafe fn ahead<const T: usize>(tiles: [*const u8; 2], at: usize, bytes: usize) {
    for tile in tiles.into_iter().take(T) {
        for line in (0..bytes).step_by(Line::LEN) {
            Rows::prefetch_near(tile.wrapping_add(NEAR / T + at + line));
        }
    }
}

/// The indices of a set of `R` octets from this one on: `R` + 1 of them.
#[inline(always)]
unsafe fn set<const N: usize, const Z: usize, const R: usize>(
    tiles: [*const u8; 2],
    first: usize,
) -> [[__m512i; Z]; SET + 1] {
    let mut index = [[_mm512_setzero_si512(); Z]; SET + 1];
    for i in 0..R {
        index[i] = octet::<N, Z>(tiles, first + i);
    }
    for z in 0..Z {
        // Bits of other bytes come along, to places that are overwritten or that the table does not depend on.
        const SELECT: i32 = 0xca;
        let mut uppers = _mm512_srli_epi16::<6>(index[0][z]);
        if R > 1 {
            let next = _mm512_srli_epi16::<4>(index[1][z]);
            uppers = _mm512_ternarylogic_epi32::<SELECT>(_mm512_set1_epi8(3), uppers, next);
        }
        if R > 2 {
            let next = _mm512_srli_epi16::<2>(index[2][z]);
            uppers = _mm512_ternarylogic_epi32::<SELECT>(_mm512_set1_epi8(15), uppers, next);
        }
        index[R][z] = uppers;
    }
    index
}

/// Rows `first + j .. + M` of the activations.
///
/// Sums of planes are halves, modulo 2^16, and exact because their true values fit: starting from −`MOVED` for every lookup, a
/// plane's sum over a group is a subset sum of ≤ 256 activations, |·| ≤ 256·127 = 32512. Planes are combined in i32.
///
/// Two tiles at once use a table twice, as long as it is in a register; a single tile counts as both.
#[inline(always)]
unsafe fn rows<const N: usize, const Z: usize, const T: usize, const M: usize>(
    args: &TileArgs,
    j: usize,
    out: &mut TileOut,
) {
    let groups = check(args, j, M);
    let (form, first) = (args.form, args.first + j);
    let size = form.group as usize;
    let has_min = form.scale == ScaleKind::F16Min;
    let code_bytes = size / 8 * N * TILE;
    let group_bytes = code_bytes + if has_min { 4 } else { 2 } * TILE;
    assert!(group_bytes == form.group_tile_bytes());
    let (octets, lines) = (size / 8, 2 * lookups(size));
    let stride = groups * lines;
    assert!(args.tables.len() >= (first + M) * stride && args.tiles <= T && size % 32 == 0 && size <= 256);
    let offset = match form.values {
        Values::Offset(offset) => offset as i32,
        _ => 0,
    };
    let tile_bytes = groups * group_bytes;
    let second = if args.tiles == 2 { tile_bytes } else { 0 };
    let start = _mm512_set1_epi16((lookups(size) as i32 * MOVED).wrapping_neg() as i16);
    let mut acc = [[[_mm512_setzero_ps(); 2]; T]; M];
    for g in 0..groups {
        let group = args.tile.as_ptr().add(g * group_bytes);
        let tiles = [group, group.add(second)];
        let mut table = args.tables.as_ptr().add(first * stride + g * lines);
        let zero = [[_mm512_setzero_si512(); Z]; M];
        let mut sums = Sums { low: zero, high: zero, planes: [[[start; 2]; Z]; M] };
        let (mut octet, mut pending) = (0, 0);
        while octet + SET <= octets {
            ahead::<T>(tiles, octet * N * TILE, SET * N * TILE);
            let index = set::<N, Z, SET>(tiles, octet);
            for two in [&index[..2], &index[2..]] {
                sums.look_up(two, &mut table, stride);
                pending += 2;
                if pending == PENDING {
                    sums.flush();
                    pending = 0;
                }
            }
            octet += SET;
        }
        ahead::<T>(tiles, octet * N * TILE, group_bytes - octet * N * TILE);
        match octets - octet {
            1 => sums.look_up(&set::<N, Z, 1>(tiles, octet)[..2], &mut table, stride),
            2 => {
                if pending + 3 > PENDING {
                    sums.flush();
                }
                sums.look_up(&set::<N, Z, 2>(tiles, octet)[..3], &mut table, stride);
            }
            _ => {}
        }
        sums.flush();
        for m in 0..M {
            let at = (first + m) * groups + g;
            let sum = *args.sums.get_unchecked(at);
            let a = _mm512_set1_ps(*args.scales.get_unchecked(at));
            let (correction, sum_of_a) = (_mm512_set1_epi32(offset * sum), _mm512_set1_ps(sum as f32));
            for t in 0..T {
                let scales = tiles[t].add(code_bytes);
                let d = scaled(scales, a);
                let min = if has_min { scaled(scales.add(2 * TILE), a) } else { d };
                for half in 0..2 {
                    let codes = combine::<N, Z, M>(&sums, m, t, half, correction);
                    let acc = &mut acc[m][t][half];
                    *acc = _mm512_fmadd_ps(d[half], _mm512_cvtepi32_ps(codes), *acc);
                    if has_min {
                        *acc = _mm512_fmadd_ps(min[half], sum_of_a, *acc);
                    }
                }
            }
        }
    }
    for m in 0..M {
        for t in 0..args.tiles.min(T) {
            let to = out[t * BATCH + j + m].as_mut_ptr();
            for half in 0..2 {
                let acc = acc[m][t][half];
                _mm256_storeu_ps(to.add(8 * half), _mm512_castps512_ps256(acc));
                let upper = _mm512_extractf64x4_pd::<1>(_mm512_castps_pd(acc));
                _mm256_storeu_ps(to.add(16 + 8 * half), _mm256_castpd_ps(upper));
            }
        }
    }
}

/// Σ (code + offset)·a of the rows of a half of tile `t`.
#[inline(always)]
unsafe fn combine<const N: usize, const Z: usize, const M: usize>(
    sums: &Sums<Z, M>,
    m: usize,
    t: usize,
    half: usize,
    correction: __m512i,
) -> __m512i {
    let mut total = correction;
    for pair in 0..N / 2 {
        // Both planes' sums of a row side by side.
        let rows = _mm512_set_epi16(
            31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17,
            1, 16, 0,
        );
        let z = if N == 4 { pair } else { t };
        let planes = _mm512_permutexvar_epi16(rows, sums.planes[m][z][half]);
        total = _mm512_dpwssd_epi32(total, planes, _mm512_set1_epi32(0x0002_0001 << (2 * pair)));
    }
    if N % 2 == 1 {
        let planes = sums.planes[m][Z - 1][half];
        let of_tile = if t == 0 { _mm512_castsi512_si256(planes) } else { _mm512_extracti64x4_epi64::<1>(planes) };
        let shift = _mm_cvtsi32_si128(N as i32 - 1);
        total = _mm512_add_epi32(total, _mm512_sll_epi32(_mm512_cvtepi16_epi32(of_tile), shift));
    }
    total
}

/// 32 half floats times `a`, rows as in halves of `Sums::planes`.
#[inline(always)]
unsafe fn scaled(from: *const u8, a: __m512) -> [__m512; 2] {
    let rows = _mm512_setr_epi64(0, 1, 4, 5, 2, 3, 6, 7);
    let halves = _mm512_permutexvar_epi64(rows, _mm512_loadu_si512(from.cast()));
    let (first, second) = (_mm512_castsi512_si256(halves), _mm512_extracti64x4_epi64::<1>(halves));
    [_mm512_mul_ps(_mm512_cvtph_ps(first), a), _mm512_mul_ps(_mm512_cvtph_ps(second), a)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matmul::{matmul_by, Activations, Plan};
    use crate::pack::PackedMatrix;
    use crate::pool::Pool;

    #[test]
    fn tables_have_every_subset_sum() {
        let Some(ks) = crate::arch::x86_64::avx512::kernels() else { return };
        for group in (32..=256).step_by(32) {
            // The largest, the smallest, and both signs in turns.
            for kind in 0..4 {
                let value = |k: usize| [127, -127, [127, -127][k % 2], (k * 89 % 255) as i32 - 127][kind] as i8;
                let codes: Vec<i8> = (0..2 * group).map(value).collect();
                let mut lines = vec![Line::ZERO; 2 * (ks.tabling.lines)(group)];
                // SAFETY: the machine has the set, and these are its lines.
                unsafe { (ks.tabling.build)(&codes, group, &mut lines) };
                let mut tables = lines.chunks_exact(2);
                for group in codes.chunks_exact(group) {
                    for set in group.chunks(24) {
                        let octets = set.chunks_exact(8);
                        let uppers: Vec<i8> = octets.clone().flat_map(|octet| octet[6..].to_vec()).collect();
                        for six in octets.map(|octet| &octet[..6]).chain([&uppers[..]]) {
                            let table = tables.next().expect("a table");
                            for entry in 0..64 {
                                let sum: i32 = six.iter().enumerate().map(|(i, &a)| (entry >> i & 1) * a as i32).sum();
                                let [low, high] = [0, 1].map(|i| table[i].0[entry as usize] as i32);
                                assert_eq!(BASE * high + low - MOVED, sum, "{six:?} {entry}");
                                assert!(PENDING as i32 * low.max(high) <= 255, "{six:?} {entry}");
                            }
                        }
                    }
                }
                assert!(tables.next().is_none());
            }
        }
    }

    #[test]
    fn single_tiles_and_pairs_give_portables_bits() {
        let Some(ks) = crate::arch::x86_64::avx512::kernels() else { return };
        let portable = crate::available()[0];
        let pool = Pool::new(1);
        for bits in 1..=4 {
            for (group, scale) in [(32, ScaleKind::F16), (128, ScaleKind::F16Min), (256, ScaleKind::F16)] {
                let form = PackedForm { codes: Codes::Planes(bits), values: Values::Offset(-1), group, scale };
                let cols = 2 * group as usize;
                for rows in [1, 33, 65, 97] {
                    // The largest codes throughout, against the largest activations, and codes that differ.
                    for extreme in [true, false] {
                        let code = |i: usize| if extreme { 255 } else { (i * 97 % 251) as u8 } & ((1 << bits) - 1);
                        let codes: Vec<u8> = (0..rows * cols).map(code).collect();
                        let w = PackedMatrix::from_codes(form, rows, cols, &codes, 0x2e66, 0xad21);
                        let x: Vec<f32> = (0..5 * cols)
                            .map(|i| if extreme { [1.0, -1.0][i / cols % 2] } else { (i % 255) as f32 - 127.0 })
                            .collect();
                        let product = |ks| {
                            let (mut act, mut y) = (Activations::new(), vec![0f32; 5 * rows]);
                            act.prepare(ks, &x, 5, cols, &[form], &pool);
                            matmul_by(Plan::default(), ks, &w, &act, &mut y, rows, &pool);
                            y.into_iter().map(f32::to_bits).collect::<Vec<_>>()
                        };
                        assert_eq!(product(ks), product(portable), "{form:?} × {rows}, {extreme}");
                    }
                }
            }
        }
    }
}
