//! Tile kernels of dot products, written once over the few integer operations that instruction sets differ in.
//!
//! Codes come as `pack::fields` lays them out: a register has four neighbouring k of each of its rows, and one instruction (or
//! the few that stand for it) multiplies them with four activations and adds. So no sum ever goes across a row's lane, and
//! a tile is one sequential stream. All sums are exact in i32; their bounds are at `flat`, `nested` and `trits`.

use crate::matmul::{TileArgs, TileOut};
use crate::pack::fields::{UNIT, WORD};
use crate::pack::{trits, Values, FIELD_TILE, IQ4_NL_VALUES, MXFP4_VALUES};

/// Registers of `LANES` rows: i32 lanes of which bytes are codes, and f32 lanes.
///
/// # Safety
///
/// For every method: the machine has the implementation's instruction set, and pointers are valid for what is read there.
pub(crate) trait Dot {
    type Int: Copy;
    type Float: Copy;
    /// Rows of a register; a divisor of `FIELD_TILE`, at least 4.
    const LANES: usize;
    /// `dot_signed` adds this times the four activations' sum.
    const SIGNED_BIAS: i32;

    unsafe fn splat(value: i32) -> Self::Int;
    unsafe fn load(from: *const u8) -> Self::Int;
    unsafe fn and(a: Self::Int, b: Self::Int) -> Self::Int;
    unsafe fn or(a: Self::Int, b: Self::Int) -> Self::Int;
    unsafe fn add(a: Self::Int, b: Self::Int) -> Self::Int;
    unsafe fn sub(a: Self::Int, b: Self::Int) -> Self::Int;
    /// The low 32 bits of products of i32.
    unsafe fn mul(a: Self::Int, b: Self::Int) -> Self::Int;
    /// Shifts 32-bit lanes, zeros coming in.
    unsafe fn shl(a: Self::Int, n: u32) -> Self::Int;
    unsafe fn shr(a: Self::Int, n: u32) -> Self::Int;
    /// Adds to each lane the dot product of its four codes, 0 ..= 127, with the four signed bytes of `a`, −127 ..= 127.
    unsafe fn dot(acc: Self::Int, codes: Self::Int, a: i32) -> Self::Int;
    /// The same with signed bytes for codes; see `SIGNED_BIAS`.
    unsafe fn dot_signed(acc: Self::Int, weights: Self::Int, a: i32) -> Self::Int;
    /// Adds to each lane the dot product of its two halves, 0 ..= 255, with the two signed halves of `a`, ±127·32 at most.
    unsafe fn dot_halves(acc: Self::Int, halves: Self::Int, a: i32) -> Self::Int;
    /// The table's entry for each byte, which is below 16.
    unsafe fn lookup(table: &'static [i8; 16], index: Self::Int) -> Self::Int;
    /// The five digits of the set's kind of trit codes (`Codes::Trits` or `IndexedTrits`).
    unsafe fn digits(bytes: Self::Int) -> [Self::Int; 5];

    unsafe fn to_float(a: Self::Int) -> Self::Float;
    unsafe fn splat_float(value: f32) -> Self::Float;
    unsafe fn load_float(from: *const f32) -> Self::Float;
    /// `LANES` half floats.
    unsafe fn load_half(from: *const u8) -> Self::Float;
    unsafe fn mul_float(a: Self::Float, b: Self::Float) -> Self::Float;
    /// `a·b + c`, rounded once.
    unsafe fn fma(a: Self::Float, b: Self::Float, c: Self::Float) -> Self::Float;
    unsafe fn store(a: Self::Float, to: *mut f32);
}

/// `CODES`: n for `Codes::Fields(n)` with an offset, or one of these for tables.
pub(crate) const IQ4_NL: u8 = 16;
pub(crate) const MXFP4: u8 = 17;

/// `SCALE`: the scale kinds.
pub(crate) const F16: u8 = 0;
pub(crate) const F16_MIN: u8 = 1;
pub(crate) const E8M0: u8 = 2;
pub(crate) const TENSOR: u8 = 3;
pub(crate) const SUB4_MIN: u8 = 4;
pub(crate) const SUB6_MIN: u8 = 5;
pub(crate) const SUB6: u8 = 6;
pub(crate) const SUB8: u8 = 7;

/// Registers that the rows of a tile take at most.
const CHUNKS: usize = FIELD_TILE / 4;

/// Bits of a code.
const fn width(codes: u8) -> usize {
    match codes {
        IQ4_NL | MXFP4 => 4,
        n => n as usize,
    }
}

const fn is_signed(codes: u8) -> bool {
    matches!(codes, 8 | IQ4_NL | MXFP4)
}

/// Partial sums of a row: enough chains to hide the latency of `dot`, while registers last.
const fn chains(n: usize) -> usize {
    match n {
        1 => 4,
        2 => 2,
        _ => 1,
    }
}

/// The same value in all four bytes.
const fn bytes(value: u8) -> i32 {
    i32::from_le_bytes([value; 4])
}

/// The codes of a unit, 32 k: register s has k = 4·s .. 4·s + 4. `at` points to the register's rows in the unit's first word.
#[inline(always)]
unsafe fn decode<D: Dot, const CODES: u8>(at: *const u8) -> [D::Int; 8] {
    let word = |i: usize| D::load(at.add(i * WORD));
    let mask = |v, m| D::and(v, D::splat(bytes(m)));
    let mut out = [D::splat(0); 8];
    // The lower part.
    match CODES {
        1 => {
            let w = word(0);
            for f in 0..8 {
                out[f] = mask(D::shr(w, f as u32), 1);
            }
        }
        2 | 3 => {
            for i in 0..2 {
                let w = word(i);
                for f in 0..4 {
                    out[4 * i + f] = mask(D::shr(w, 2 * f as u32), 3);
                }
            }
        }
        8 => {
            for i in 0..8 {
                out[i] = word(i);
            }
        }
        _ => {
            for i in 0..4 {
                let w = word(i);
                out[2 * i] = mask(w, 15);
                out[2 * i + 1] = mask(D::shr(w, 4), 15);
            }
        }
    }
    // The upper part, moved to where it belongs in the code.
    match CODES {
        3 => {
            let w = word(2);
            for f in 0..8 {
                let moved = if f < 2 { D::shl(w, 2 - f as u32) } else { D::shr(w, f as u32 - 2) };
                out[f] = D::or(out[f], mask(moved, 4));
            }
        }
        5 => {
            let w = word(4);
            for f in 0..8 {
                let moved = if f < 4 { D::shl(w, 4 - f as u32) } else { D::shr(w, f as u32 - 4) };
                out[f] = D::or(out[f], mask(moved, 16));
            }
        }
        6 => {
            for i in 0..2 {
                let w = word(4 + i);
                for f in 0..4 {
                    let moved = if f < 2 { D::shl(w, 4 - 2 * f as u32) } else { D::shr(w, 2 * f as u32 - 4) };
                    out[4 * i + f] = D::or(out[4 * i + f], mask(moved, 0x30));
                }
            }
        }
        IQ4_NL => out = out.map(|index| D::lookup(&IQ4_NL_VALUES, index)),
        MXFP4 => out = out.map(|index| D::lookup(&MXFP4_VALUES, index)),
        _ => {}
    }
    out
}

/// Four activations.
#[inline(always)]
unsafe fn four(codes: *const i8) -> i32 {
    codes.cast::<i32>().read_unaligned()
}

/// Checks what the kernels rely on, and returns the number of groups.
#[inline(always)]
fn check(args: &TileArgs, j: usize, n: usize) -> usize {
    let (form, rows) = (args.form, args.first + j + n);
    let groups = args.k / form.group as usize;
    let subs = args.k / form.scale.sub(form.group as usize);
    assert!(
        args.k == groups * form.group as usize
            && args.tile.len() == groups * form.group_tile_bytes()
            && j + n <= args.count
            && args.codes.len() >= rows * args.k
            && args.scales.len() >= rows * groups
            && args.sums.len() >= rows * groups
            && (form.scale.words() == 0 || args.sub_sums.len() >= rows * subs)
    );
    groups
}

/// d of a chunk's rows. `at` points to the scales behind the sub-scales.
#[inline(always)]
unsafe fn scale<D: Dot, const SCALE: u8>(args: &TileArgs, at: *const u8, chunk: usize) -> D::Float {
    match SCALE {
        TENSOR => D::splat_float(args.scale),
        E8M0 => {
            let mut halves = [0f32; FIELD_TILE];
            for (row, half) in halves.iter_mut().enumerate().take(D::LANES) {
                *half = crate::pack::e8m0_half(*at.add(chunk * D::LANES + row));
            }
            D::load_float(halves.as_ptr())
        }
        _ => D::load_half(at.add(2 * D::LANES * chunk)),
    }
}

/// Rows `first + j .. + N`, groups with one scale, of `UNITS` units (0: as many as the form says).
///
/// |Σ code·a| ≤ 256·127·127 or, signed with the bias, 256·255·127, far below 2^31, for each group.
#[inline(always)]
pub(crate) unsafe fn flat<D: Dot, const CODES: u8, const SCALE: u8, const UNITS: usize, const N: usize>(
    args: &TileArgs,
    j: usize,
    out: &mut TileOut,
) {
    let groups = check(args, j, N);
    let units = if UNITS > 0 { UNITS } else { args.form.group as usize / UNIT };
    let (size, unit_bytes) = (units * UNIT, width(CODES) * WORD);
    let group_bytes = args.form.group_tile_bytes();
    let correction = match args.form.values {
        _ if is_signed(CODES) => -D::SIGNED_BIAS,
        Values::Offset(offset) => offset as i32,
        _ => 0,
    };
    let mut acc = [[D::splat_float(0.0); CHUNKS]; N];
    for g in 0..groups {
        let group = args.tile.as_ptr().add(g * group_bytes);
        let scales = group.add(units * unit_bytes);
        for chunk in 0..FIELD_TILE / D::LANES {
            let mut sums = [[D::splat(0); 4]; N];
            for (n, sums) in sums.iter_mut().enumerate() {
                sums[0] = D::splat(correction * *args.sums.get_unchecked((args.first + j + n) * groups + g));
            }
            for unit in 0..units {
                let at = group.add(unit * unit_bytes);
                let w = decode::<D, CODES>(at.add(chunk * D::LANES * 4));
                for (n, sums) in sums.iter_mut().enumerate() {
                    let a = args.codes.as_ptr().add((args.first + j + n) * args.k + g * size + unit * UNIT);
                    for (s, &w) in w.iter().enumerate() {
                        let sum = &mut sums[s % chains(N)];
                        let a = four(a.add(4 * s));
                        *sum = if is_signed(CODES) { D::dot_signed(*sum, w, a) } else { D::dot(*sum, w, a) };
                    }
                }
            }
            let d = scale::<D, SCALE>(args, scales, chunk);
            for (n, sums) in sums.iter().enumerate() {
                let at = (args.first + j + n) * groups + g;
                finish::<D, SCALE>(args, d, scales, chunk, at, total::<D, N>(sums), &mut acc[n][chunk]);
            }
        }
    }
    store::<D, N>(&acc, j, out);
}

/// A row's partial sums together.
#[inline(always)]
unsafe fn total<D: Dot, const N: usize>(sums: &[D::Int; 4]) -> D::Int {
    match chains(N) {
        4 => D::add(D::add(sums[0], sums[1]), D::add(sums[2], sums[3])),
        2 => D::add(sums[0], sums[1]),
        _ => sums[0],
    }
}

/// acc = fma(d·d_a, sum, acc), then for a minimum fma(m·d_a, Σ a, acc); `at` is the place of the activations' group.
#[inline(always)]
unsafe fn finish<D: Dot, const SCALE: u8>(
    args: &TileArgs,
    d: D::Float,
    scales: *const u8,
    chunk: usize,
    at: usize,
    sum: D::Int,
    acc: &mut D::Float,
) {
    let a = D::splat_float(*args.scales.get_unchecked(at));
    *acc = D::fma(D::mul_float(d, a), D::to_float(sum), *acc);
    if SCALE == F16_MIN {
        let m = D::load_half(scales.add(2 * (FIELD_TILE + D::LANES * chunk)));
        let sum = D::splat_float(*args.sums.get_unchecked(at) as f32);
        *acc = D::fma(D::mul_float(m, a), sum, *acc);
    }
}

#[inline(always)]
unsafe fn store<D: Dot, const N: usize>(acc: &[[D::Float; CHUNKS]; N], j: usize, out: &mut TileOut) {
    for (n, acc) in acc.iter().enumerate() {
        for (chunk, &acc) in acc.iter().enumerate().take(FIELD_TILE / D::LANES) {
            D::store(acc, out[j + n].as_mut_ptr().add(chunk * D::LANES));
        }
    }
}

/// The s and the m of quad t, four bytes a row in the order of `pack::scales` (m without meaning where there is none).
#[inline(always)]
unsafe fn quad<D: Dot, const SCALE: u8>(words: *const u8, t: usize) -> (D::Int, D::Int) {
    let word = |i: usize| D::load(words.add(i * WORD));
    let mask = |v, m| D::and(v, D::splat(bytes(m)));
    match SCALE {
        SUB4_MIN => {
            let w = word(t);
            (mask(w, 15), mask(D::shr(w, 4), 15))
        }
        SUB6_MIN => {
            let (low, high) = (word(t), D::shr(word(2), 4 * t as u32));
            let s = D::or(mask(low, 15), D::shl(mask(high, 3), 4));
            (s, D::or(mask(D::shr(low, 4), 15), D::shl(mask(high, 12), 2)))
        }
        SUB6 => {
            let (low, high) = (D::shr(word(t / 2), 4 * (t % 2) as u32), D::shr(word(2), 2 * t as u32));
            let s = D::or(mask(low, 15), D::shl(mask(high, 3), 4));
            (s, s)
        }
        _ => (word(t), word(t)),
    }
}

/// Rows `first + j .. + N`, groups of 256 with sub-scales.
///
/// With s' stored (s plus the bias, 0 ..= 255), c the codes (0 ..= 63), b a sub's Σ a:
/// Σ s·(Σ (c + offset)·a) = Σ (s' − bias)·(Σ c·a) + offset·(Σ s'·b − bias·Σ b). The first sum is at most
/// 16 subs · 128 · 16·63·127 < 2.7·10^8, Σ s'·b at most 255·256·127 < 8.3·10^6, times 32 < 2.7·10^8: all fit i32.
#[inline(always)]
pub(crate) unsafe fn nested<D: Dot, const CODES: u8, const SCALE: u8, const N: usize>(
    args: &TileArgs,
    j: usize,
    out: &mut TileOut,
) {
    let groups = check(args, j, N);
    let kind = args.form.scale;
    let size = 256;
    assert!(args.form.group as usize == size);
    let (quads, sub) = if SCALE == SUB6_MIN { (2, 32) } else { (4, 16) };
    let (subs, words) = (size / sub, kind.words());
    let unit_bytes = width(CODES) * WORD;
    let group_bytes = args.form.group_tile_bytes();
    let has_min = matches!(SCALE, SUB4_MIN | SUB6_MIN);
    let bias = match SCALE {
        SUB6 => 32,
        SUB8 => 128,
        _ => 0,
    };
    let offset = match args.form.values {
        Values::Offset(offset) => offset as i32,
        _ => 0,
    };
    let mut acc = [[D::splat_float(0.0); CHUNKS]; N];
    for g in 0..groups {
        let group = args.tile.as_ptr().add(g * group_bytes);
        let units = group.add(words * WORD);
        let scales = units.add(8 * unit_bytes);
        for chunk in 0..FIELD_TILE / D::LANES {
            let rows = chunk * D::LANES * 4;
            let mut total = [D::splat(0); N];
            let mut other = [D::splat(0); N];
            for t in 0..quads {
                let (s, m) = quad::<D, SCALE>(group.add(rows), t);
                for unit in 0..sub / 8 {
                    let index = t * (sub / 8) + unit;
                    let w = decode::<D, CODES>(units.add(index * unit_bytes + rows));
                    for half in 0..UNIT / sub {
                        let byte = [0, 2, 1, 3][unit * (UNIT / sub) + half];
                        let mut s = D::and(D::shr(s, 8 * byte), D::splat(255));
                        if bias != 0 {
                            s = D::sub(s, D::splat(bias));
                        }
                        for (n, total) in total.iter_mut().enumerate() {
                            let a = args.codes.as_ptr().add((args.first + j + n) * args.k + g * size + index * UNIT);
                            let mut sum = D::splat(0);
                            for step in half * sub / 4..(half + 1) * sub / 4 {
                                sum = D::dot(sum, w[step], four(a.add(4 * step)));
                            }
                            *total = D::add(*total, D::mul(sum, s));
                        }
                    }
                }
                for pair in 0..2 {
                    let halves = D::and(D::shr(if has_min { m } else { s }, 8 * pair as u32), D::splat(0x00ff_00ff));
                    for (n, other) in other.iter_mut().enumerate() {
                        let at = (args.first + j + n) * groups * subs + g * subs + 4 * t + 2 * pair;
                        let sums = args.sub_sums.as_ptr().add(at).cast::<i32>().read_unaligned();
                        *other = D::dot_halves(*other, halves, sums);
                    }
                }
            }
            let d = D::load_half(scales.add(2 * D::LANES * chunk));
            for n in 0..N {
                let at = (args.first + j + n) * groups + g;
                let a = D::splat_float(*args.scales.get_unchecked(at));
                let acc = &mut acc[n][chunk];
                if has_min {
                    let min = D::load_half(scales.add(2 * (FIELD_TILE + D::LANES * chunk)));
                    *acc = D::fma(D::mul_float(d, a), D::to_float(total[n]), *acc);
                    *acc = D::fma(D::mul_float(min, a), D::to_float(D::sub(D::splat(0), other[n])), *acc);
                } else {
                    let sums = bias * *args.sums.get_unchecked(at);
                    let rest = D::mul(D::sub(other[n], D::splat(sums)), D::splat(offset));
                    *acc = D::fma(D::mul_float(d, a), D::to_float(D::add(total[n], rest)), *acc);
                }
            }
        }
    }
    store::<D, N>(&acc, j, out);
}

/// Rows `first + j .. + N` of trit codes with one f16 scale per group.
///
/// Digits are 0 ..= 2: |Σ digit·a| ≤ 256·2·127.
#[inline(always)]
pub(crate) unsafe fn trits<D: Dot, const N: usize>(args: &TileArgs, j: usize, out: &mut TileOut) {
    let groups = check(args, j, N);
    let size = args.form.group as usize;
    let (group_bytes, words) = (args.form.group_tile_bytes(), trits::words(size));
    let offset = match args.form.values {
        Values::Offset(offset) => offset as i32,
        _ => 0,
    };
    let mut acc = [[D::splat_float(0.0); CHUNKS]; N];
    for g in 0..groups {
        let group = args.tile.as_ptr().add(g * group_bytes);
        for chunk in 0..FIELD_TILE / D::LANES {
            let mut sums = [[D::splat(0); 4]; N];
            for (n, sums) in sums.iter_mut().enumerate() {
                sums[0] = D::splat(offset * *args.sums.get_unchecked((args.first + j + n) * groups + g));
            }
            for word in 0..words {
                let at = group.add(word * WORD);
                let digits = D::digits(D::load(at.add(chunk * D::LANES * 4)));
                // The last word may hold fewer digits.
                let steps = (size / 4 - 5 * word).min(5);
                for (n, sums) in sums.iter_mut().enumerate() {
                    let a = args.codes.as_ptr().add((args.first + j + n) * args.k + g * size + 20 * word);
                    if steps == 5 {
                        for (s, &digit) in digits.iter().enumerate() {
                            sums[s % chains(N)] = D::dot(sums[s % chains(N)], digit, four(a.add(4 * s)));
                        }
                    } else {
                        for (s, &digit) in digits.iter().enumerate().take(steps) {
                            sums[0] = D::dot(sums[0], digit, four(a.add(4 * s)));
                        }
                    }
                }
            }
            let scales = group.add(words * WORD);
            let d = D::load_half(scales.add(2 * D::LANES * chunk));
            for (n, sums) in sums.iter().enumerate() {
                let at = (args.first + j + n) * groups + g;
                finish::<D, F16>(args, d, scales, chunk, at, total::<D, N>(sums), &mut acc[n][chunk]);
            }
        }
    }
    store::<D, N>(&acc, j, out);
}

/// Runs a kernel for `count` rows, 8, 4, 2 or 1 at a time.
macro_rules! batched {
    ($args:ident, $out:ident, $kernel:ident $(, $generic:expr)*) => {{
        let mut j = 0;
        while j < $args.count {
            match $args.count - j {
                8.. => { $crate::arch::dot::$kernel::<Set $(, $generic)*, 8>($args, j, $out); j += 8 }
                4.. => { $crate::arch::dot::$kernel::<Set $(, $generic)*, 4>($args, j, $out); j += 4 }
                2.. => { $crate::arch::dot::$kernel::<Set $(, $generic)*, 2>($args, j, $out); j += 2 }
                _ => { $crate::arch::dot::$kernel::<Set $(, $generic)*, 1>($args, j, $out); j += 1 }
            }
        }
    }};
}
pub(crate) use batched;

/// Defines `fn dot_variants(PackedForm) -> &'static [Variant]` of a `Dot` type: every form's kernels, compiled with the features.
macro_rules! dot_kernels {
    ($set:ty, $features:literal, $trits:pat) => {
        type Set = $set;

        /// # Safety
        ///
        /// `TileKernel`'s, for a form of these codes and scales.
        #[target_feature(enable = $features)]
        unsafe fn flat<const CODES: u8, const SCALE: u8, const UNITS: usize>(args: &TileArgs, out: &mut TileOut) {
            $crate::arch::dot::batched!(args, out, flat, CODES, SCALE, UNITS);
        }

        /// # Safety
        ///
        /// See `flat`.
        #[target_feature(enable = $features)]
        unsafe fn nested<const CODES: u8, const SCALE: u8>(args: &TileArgs, out: &mut TileOut) {
            $crate::arch::dot::batched!(args, out, nested, CODES, SCALE);
        }

        /// # Safety
        ///
        /// See `flat`; the codes are this set's trits.
        #[target_feature(enable = $features)]
        unsafe fn trits(args: &TileArgs, out: &mut TileOut) {
            $crate::arch::dot::batched!(args, out, trits);
        }

        /// The kernels for a form of fields or trits.
        fn dot_variants(form: PackedForm) -> &'static [Variant] {
            use $crate::arch::dot::{E8M0, F16, F16_MIN, IQ4_NL, MXFP4, SUB4_MIN, SUB6, SUB6_MIN, SUB8, TENSOR};
            use $crate::pack::{Codes, ScaleKind as S, Values};
            const fn dot(tile: TileKernel) -> Variant {
                Variant { name: "dot", tile, widths: &[8, 4, 2, 1], tables: false }
            }
            match (form.codes, form.values, form.scale, form.group) {
                (Codes::Fields(1), Values::Offset(_), S::F16Min, _) => const { &[dot(flat::<1, F16_MIN, 0>)] },
                (Codes::Fields(2), Values::Offset(_), S::F16, _) => const { &[dot(flat::<2, F16, 0>)] },
                (Codes::Fields(2), Values::Offset(_), S::Tensor, _) => const { &[dot(flat::<2, TENSOR, 0>)] },
                (Codes::Fields(2), Values::Offset(_), S::F16Min, _) => const { &[dot(flat::<2, F16_MIN, 0>)] },
                (Codes::Fields(2), Values::Offset(_), S::Sub4Min, 256) => const { &[dot(nested::<2, SUB4_MIN>)] },
                (Codes::Fields(3), Values::Offset(_), S::F16Min, _) => const { &[dot(flat::<3, F16_MIN, 0>)] },
                (Codes::Fields(3), Values::Offset(_), S::Sub6, 256) => const { &[dot(nested::<3, SUB6>)] },
                (Codes::Fields(4), Values::Offset(_), S::F16, 32) => const { &[dot(flat::<4, F16, 1>)] },
                (Codes::Fields(4), Values::Offset(_), S::F16, _) => const { &[dot(flat::<4, F16, 0>)] },
                (Codes::Fields(4), Values::Offset(_), S::F16Min, _) => const { &[dot(flat::<4, F16_MIN, 0>)] },
                (Codes::Fields(4), Values::Offset(_), S::Sub6Min, 256) => const { &[dot(nested::<4, SUB6_MIN>)] },
                (Codes::Fields(4), Values::Iq4Nl, S::F16, 32) => const { &[dot(flat::<IQ4_NL, F16, 1>)] },
                (Codes::Fields(4), Values::Mxfp4, S::E8M0, 32) => const { &[dot(flat::<MXFP4, E8M0, 1>)] },
                (Codes::Fields(5), Values::Offset(_), S::F16, 32) => const { &[dot(flat::<5, F16, 1>)] },
                (Codes::Fields(5), Values::Offset(_), S::F16Min, 32) => const { &[dot(flat::<5, F16_MIN, 1>)] },
                (Codes::Fields(5), Values::Offset(_), S::Sub6Min, 256) => const { &[dot(nested::<5, SUB6_MIN>)] },
                (Codes::Fields(6), Values::Offset(_), S::Sub8, 256) => const { &[dot(nested::<6, SUB8>)] },
                (Codes::Fields(8), Values::Offset(_), S::F16, 32) => const { &[dot(flat::<8, F16, 1>)] },
                ($trits, Values::Offset(_), S::F16, _) => const { &[dot(trits)] },
                _ => &[],
            }
        }
    };
}
pub(crate) use dot_kernels;
