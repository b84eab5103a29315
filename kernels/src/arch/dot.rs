//! Tile kernels of dot products, written once over the few integer operations that instruction sets differ in.
//!
//! Codes come as `pack::fields` lays them out: a register has four neighbouring k of each of its rows, and one instruction (or
//! the few that stand for it) multiplies them with four activations and adds. So no sum ever goes across a row's lane, and
//! a tile is one sequential stream. All sums are exact in i32; their bounds are at `flat`, `nested` and `trits`.

use crate::matmul::{TileArgs, TileOut, ACTIVATION_PAD};
use crate::pack::fields::{UNIT, WORD};
use crate::pack::{Values, FIELD_TILE};

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
    /// Whether `dot` takes codes up to 255. Fields then need no shift for few activations: each is multiplied where it lies in
    /// its byte, and sums of the same place are shifted once per group.
    const PLACED: bool = false;
    /// Whether `pair` and `dot_pairs` are cheaper than two products of i32.
    const PAIRS: bool = false;
    /// Whether `digits` are negated: 0 ..= −2.
    const NEGATED_DIGITS: bool = false;
    /// Tiles that `flat` and `nested` multiply at once: with two, `flat` loads activations once for both. Then LANES are all rows
    /// of a tile.
    const TILES: usize = 1;

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
    /// Of each byte, the field from bit `n` on that `mask` covers when moved down.
    #[inline(always)]
    unsafe fn field(a: Self::Int, n: u32, mask: u8) -> Self::Int {
        Self::and(Self::shr(a, n), Self::splat(bytes(mask)))
    }
    /// Shifts 32-bit lanes right, copies of the sign coming in. With `PLACED`.
    #[inline(always)]
    unsafe fn sar(_a: Self::Int, _n: u32) -> Self::Int {
        unreachable!("only with PLACED")
    }
    /// Adds to each lane the dot product of its four codes, 0 ..= 127 (255 with `PLACED`), with the four signed bytes of `a`,
    /// −127 ..= 127.
    unsafe fn dot(acc: Self::Int, codes: Self::Int, a: i32) -> Self::Int;
    /// The same with signed bytes for codes; see `SIGNED_BIAS`.
    unsafe fn dot_signed(acc: Self::Int, weights: Self::Int, a: i32) -> Self::Int;
    /// `dot` of several registers, their codes at most `MOST`, with four activations each from `a` on.
    #[inline(always)]
    unsafe fn dots<const MOST: i32>(acc: Self::Int, codes: &[Self::Int], a: *const i8) -> Self::Int {
        let mut acc = acc;
        for (i, &codes) in codes.iter().enumerate() {
            acc = Self::dot(acc, codes, four(a.add(4 * i)));
        }
        acc
    }
    /// The same with signed bytes for codes.
    #[inline(always)]
    unsafe fn dots_signed(acc: Self::Int, weights: &[Self::Int], a: *const i8) -> Self::Int {
        let mut acc = acc;
        for (i, &weights) in weights.iter().enumerate() {
            acc = Self::dot_signed(acc, weights, four(a.add(4 * i)));
        }
        acc
    }
    /// Adds to each lane the dot product of its two halves, 0 ..= 255, with the two signed halves of `a`, ±127·32 at most.
    unsafe fn dot_halves(acc: Self::Int, halves: Self::Int, a: i32) -> Self::Int;
    /// The low half of `low`, and that of `high` above it. With `PAIRS`, as the next three.
    #[inline(always)]
    unsafe fn pair(_low: Self::Int, _high: Self::Int) -> Self::Int {
        unreachable!("only with PAIRS")
    }
    /// Adds to each lane the dot product of two pairs of signed halves.
    #[inline(always)]
    unsafe fn dot_pairs(_acc: Self::Int, _a: Self::Int, _b: Self::Int) -> Self::Int {
        unreachable!("only with PAIRS")
    }
    /// Differences of halves.
    #[inline(always)]
    unsafe fn sub_halves(_a: Self::Int, _b: Self::Int) -> Self::Int {
        unreachable!("only with PAIRS")
    }
    /// Of each lane, byte `BYTE` in both halves.
    #[inline(always)]
    unsafe fn both<const BYTE: u32>(_a: Self::Int) -> Self::Int {
        unreachable!("only with PAIRS")
    }
    /// `LANES` fields of 4 bits, each in a lane: of the first byte the low one first.
    unsafe fn nibbles(from: *const u8) -> Self::Int;
    /// The table's entries for index bytes 0 ..= 15.
    unsafe fn lookup(table: &'static [i8; 16], index: Self::Int) -> Self::Int;
    /// The five digits of bytes of trits, in the layout that the implementation's forms use.
    unsafe fn digits(bytes: Self::Int) -> [Self::Int; 5];
    /// With `PLACED`: the first four digits in two bits each from the lowest on, and the fifth in the upper two of its byte, whose
    /// others have anything.
    #[inline(always)]
    unsafe fn packed_digits(_bytes: Self::Int) -> [Self::Int; 2] {
        unreachable!("only with PLACED")
    }
    unsafe fn to_float(a: Self::Int) -> Self::Float;
    /// The same for magnitudes below 2^22.
    #[inline(always)]
    unsafe fn small_to_float(a: Self::Int) -> Self::Float {
        Self::to_float(a)
    }
    unsafe fn splat_float(value: f32) -> Self::Float;
    unsafe fn load_float(from: *const f32) -> Self::Float;
    /// Half floats, exactly.
    unsafe fn load_half(from: *const u8) -> Self::Float;
    unsafe fn mul_float(a: Self::Float, b: Self::Float) -> Self::Float;
    /// `a·b + c`, rounded once.
    unsafe fn fma(a: Self::Float, b: Self::Float, c: Self::Float) -> Self::Float;
    unsafe fn store(a: Self::Float, to: *mut f32);
    /// Asks for the line that holds this address, which need not be valid.
    #[inline(always)]
    unsafe fn prefetch(_from: *const u8) {}
    /// Asks for a line that `prefetch` has asked for to come nearer, where that goes only half the way.
    #[inline(always)]
    unsafe fn prefetch_near(_from: *const u8) {}
    /// Both for line `LINE` from `from` on, the first `ahead` bytes ahead; here among loads, if that is of consequence.
    #[inline(always)]
    unsafe fn prefetch_here<const LINE: usize>(from: *const u8, ahead: usize) {
        Self::prefetch(from.wrapping_add(ahead + LINE * WORD));
        Self::prefetch_near(from.wrapping_add(NEAR / Self::TILES + LINE * WORD));
    }
}

/// `CODES`: n for `Codes::Fields(n)` with an offset, or one of these for tables.
pub(crate) const IQ4_NL: u8 = 16;
pub(crate) const MXFP4: u8 = 17;
pub(crate) const IQ1: u8 = 18;
pub(crate) const IQ2: u8 = 19;
pub(crate) const IQ3_XXS: u8 = 20;
pub(crate) const IQ3_S: u8 = 21;

/// `SCALE`: the scale kinds.
pub(crate) const F16: u8 = 0;
pub(crate) const F16_MIN: u8 = 1;
pub(crate) const E8M0: u8 = 2;
pub(crate) const TENSOR: u8 = 3;
pub(crate) const SUB4_MIN: u8 = 4;
pub(crate) const SUB6_MIN: u8 = 5;
pub(crate) const SUB6: u8 = 6;
pub(crate) const SUB8: u8 = 7;
pub(crate) const SUB6_OF_32: u8 = 8;
pub(crate) const F16_ZERO4: u8 = 9;
pub(crate) const F16_ZERO8: u8 = 10;
pub(crate) const F32_ZERO4: u8 = 11;
pub(crate) const F32_ZERO8: u8 = 12;

/// How far ahead of its reads a kernel asks for weights: across the end of a 4 KiB page, where hardware prefetching stops, and
/// of a tile (the next follows it in memory; beyond the last there is nothing to fetch, which does no harm). Of tiles that are
/// read side by side each has its part of the distance.
pub(super) const AHEAD: usize = 4096;
/// The same for `prefetch_near`.
pub(super) const NEAR: usize = 1024;

/// Registers that the rows of a tile take at most.
const CHUNKS: usize = FIELD_TILE / 4;

/// Partial sums of a row of activations.
const SUMS: usize = 8;

/// Bits of a code.
#[inline(always)]
pub(super) const fn width(codes: u8) -> usize {
    match codes {
        IQ4_NL | MXFP4 | IQ3_XXS | IQ3_S => 4,
        IQ1 | IQ2 => 3,
        n => n as usize,
    }
}

/// What these codes are worth, for tables.
#[inline(always)]
pub(super) const fn table_values(codes: u8) -> Values {
    match codes {
        IQ4_NL => Values::Iq4Nl,
        MXFP4 => Values::Mxfp4,
        IQ1 => Values::Iq1,
        IQ2 => Values::Iq2,
        IQ3_XXS => Values::Iq3Xxs,
        IQ3_S => Values::Iq3S,
        _ => Values::Offset(0),
    }
}

/// The largest code of so many bits.
#[inline(always)]
const fn most(codes: u8) -> i32 {
    (1 << width(codes)) - 1
}

#[inline(always)]
const fn is_signed(codes: u8) -> bool {
    codes == 8 || table_values(codes).table().is_some()
}

/// Bytes of the scales behind the codes of a group.
#[inline(always)]
pub(super) const fn scale_bytes(scale: u8) -> usize {
    FIELD_TILE
        * match scale {
            TENSOR => 0,
            E8M0 => 1,
            F16 | SUB6 | SUB6_OF_32 | SUB8 => 2,
            F16_ZERO8 => 3,
            F16_ZERO4 => return FIELD_TILE * 5 / 2,
            F32_ZERO4 => return FIELD_TILE * 9 / 2,
            F32_ZERO8 => 5,
            _ => 4,
        }
}

/// Words of sub-scales.
#[inline(always)]
pub(super) const fn sub_words(scale: u8) -> usize {
    match scale {
        SUB4_MIN | SUB8 => 4,
        SUB6_MIN | SUB6 => 3,
        SUB6_OF_32 => 2,
        _ => 0,
    }
}

/// The same value in all four bytes.
#[inline(always)]
const fn bytes(value: u8) -> i32 {
    i32::from_le_bytes([value; 4])
}

/// Word `i` of a register's rows.
#[inline(always)]
unsafe fn word<D: Dot>(at: *const u8, i: usize) -> D::Int {
    D::load(at.add(i * WORD))
}

/// The bits of `m` in every byte.
#[inline(always)]
unsafe fn mask<D: Dot>(v: D::Int, m: u8) -> D::Int {
    D::and(v, D::splat(bytes(m)))
}

/// The codes at k = 4·s .. 4·s + 4 of a unit, 32 k. `at` points to the register's rows in the unit's first word.
#[inline(always)]
pub(super) unsafe fn code<D: Dot, const CODES: u8>(at: *const u8, s: usize) -> D::Int {
    // The lower part.
    let low = match CODES {
        1 => D::field(word::<D>(at, 0), s as u32, 1),
        2 | 3 | IQ1 | IQ2 => D::field(word::<D>(at, s / 4), 2 * (s % 4) as u32, 3),
        8 => word::<D>(at, s),
        _ if s % 2 == 0 => mask::<D>(word::<D>(at, s / 2), 15),
        _ => D::field(word::<D>(at, s / 2), 4, 15),
    };
    // The upper part, moved to where it belongs in the code.
    let code = match CODES {
        3 | IQ1 | IQ2 => D::or(low, mask::<D>(moved::<D>(word::<D>(at, 2), s, 2), 4)),
        5 => D::or(low, mask::<D>(moved::<D>(word::<D>(at, 4), s, 4), 16)),
        6 => D::or(low, mask::<D>(moved::<D>(word::<D>(at, 4 + s / 4), 2 * (s % 4), 4), 0x30)),
        _ => low,
    };
    match table_values(CODES).table() {
        Some(table) => D::lookup(table, code),
        None => code,
    }
}

/// Bit `from` of every lane at bit `to`.
#[inline(always)]
unsafe fn moved<D: Dot>(w: D::Int, from: usize, to: usize) -> D::Int {
    if from < to {
        D::shl(w, (to - from) as u32)
    } else {
        D::shr(w, (from - to) as u32)
    }
}

/// The codes of a unit, as `code` gives them.
#[inline(always)]
pub(super) unsafe fn decode<D: Dot, const CODES: u8>(at: *const u8) -> [D::Int; 8] {
    let mut out = [D::splat(0); 8];
    for (s, out) in out.iter_mut().enumerate() {
        *out = code::<D, CODES>(at, s);
    }
    out
}

/// Four activations.
#[inline(always)]
unsafe fn four(codes: *const i8) -> i32 {
    codes.cast::<i32>().read_unaligned()
}

/// Asks for the lines that lie ahead of these, of one of `T` tiles that are read side by side.
#[inline(always)]
pub(super) unsafe fn prefetch<D: Dot, const T: usize>(from: *const u8, lines: usize) {
    prefetch_over::<D, T>(from, lines, 0);
}

/// `prefetch` of lines that are followed by others `skip` bytes later.
#[inline(always)]
unsafe fn prefetch_over<D: Dot, const T: usize>(from: *const u8, lines: usize, skip: usize) {
    for line in 0..lines {
        D::prefetch(from.wrapping_add(AHEAD / T + skip + line * WORD));
        D::prefetch_near(from.wrapping_add(NEAR / T + line * WORD));
    }
}

/// Checks what the kernels rely on, and returns the number of groups.
#[inline(always)]
pub(super) fn check(args: &TileArgs, j: usize, n: usize) -> usize {
    let (form, rows) = (args.form, args.first + j + n);
    let groups = args.k / form.group as usize;
    let subs = args.k / form.scale.sub(form.group as usize);
    assert!(
        args.k == groups * form.group as usize
            && args.tile.len() == args.tiles * groups * form.group_tile_bytes()
            && j + n <= args.count
            && args.codes.len() >= rows * args.k + ACTIVATION_PAD
            && args.scales.len() >= rows * groups
            && args.sums.len() >= rows * groups
            && (form.scale.words() == 0 || args.sub_sums.len() >= rows * subs)
    );
    groups
}

/// d of a chunk's rows. `at` points to the scales behind the sub-scales.
#[inline(always)]
pub(super) unsafe fn scale<D: Dot, const SCALE: u8>(args: &TileArgs, at: *const u8, chunk: usize) -> D::Float {
    match SCALE {
        TENSOR => D::splat_float(args.scale),
        E8M0 => {
            let mut halves = [0f32; FIELD_TILE];
            for (row, half) in halves.iter_mut().enumerate().take(D::LANES) {
                *half = crate::pack::e8m0_half(*at.add(chunk * D::LANES + row));
            }
            D::load_float(halves.as_ptr())
        }
        // Scales lie at multiples of 4: codes before them are whole words, and so are groups.
        F32_ZERO4 | F32_ZERO8 => D::load_float(at.add(4 * D::LANES * chunk).cast()),
        _ => D::load_half(at.add(2 * D::LANES * chunk)),
    }
}

/// Rows `first + j .. + N`, groups with one scale, of `UNITS` units (0: as many as the form says), `T` tiles at once.
///
/// |Σ code·a| ≤ 256·128·127 < 2^22 or, signed with the bias or less a zero point, 256·255·127 on the way, far below 2^31, for
/// each group.
///
/// With two tiles a loaded activation serves both: for eight rows of activations loads would else be what limits. What the
/// one tile is ahead of the other in memory stays the same, so both are sequential streams; near its end a tile's stream goes
/// on behind the other tile.
#[inline(always)]
pub(crate) unsafe fn flat<
    D: Dot,
    const CODES: u8,
    const SCALE: u8,
    const UNITS: usize,
    const T: usize,
    const N: usize,
>(
    args: &TileArgs,
    j: usize,
    out: &mut TileOut,
) {
    let groups = check(args, j, N);
    let units = if UNITS > 0 { UNITS } else { args.form.group as usize / UNIT };
    let (size, unit_bytes) = (units * UNIT, width(CODES) * WORD);
    let group_bytes = units * unit_bytes + scale_bytes(SCALE);
    assert!(group_bytes == args.form.group_tile_bytes() && args.tiles == T && (T == 1 || D::LANES == FIELD_TILE));
    let correction = match args.form.values {
        _ if is_signed(CODES) => -D::SIGNED_BIAS,
        Values::Offset(offset) => offset as i32,
        _ => 0,
    };
    let placed = D::PLACED && N <= 2 && matches!(CODES, 1 | 2 | 4);
    let tile_bytes = groups * group_bytes;
    let mut acc = [[D::splat_float(0.0); CHUNKS]; N];
    for g in 0..groups {
        let group = args.tile.as_ptr().add(g * group_bytes);
        let scales = group.add(units * unit_bytes);
        let skip = if T > 1 && g * group_bytes + AHEAD / T >= tile_bytes { (T - 1) * tile_bytes } else { 0 };
        for chunk in 0..FIELD_TILE / D::LANES {
            let mut sums = [[[D::splat(0); SUMS]; T]; N];
            for (n, sums) in sums.iter_mut().enumerate() {
                let first = D::splat(correction * *args.sums.get_unchecked((args.first + j + n) * groups + g));
                for sums in sums {
                    sums[0] = first;
                }
            }
            for unit in 0..units {
                let at = group.add(unit * unit_bytes + chunk * D::LANES * 4);
                if chunk == 0 && T == 1 {
                    prefetch_over::<D, T>(at, width(CODES), skip);
                }
                // No closures in these functions: they would be compiled without the instruction set.
                let a = args.codes.as_ptr().add((args.first + j) * args.k + g * size + unit * UNIT);
                if placed {
                    for word in 0..width(CODES) {
                        let mut w = [D::splat(0); T];
                        for (t, w) in w.iter_mut().enumerate() {
                            *w = D::load(at.add(t * tile_bytes + word * WORD));
                            if T > 1 {
                                prefetch_over::<D, T>(at.add(t * tile_bytes + word * WORD), 1, skip);
                            }
                        }
                        for field in 0..8 / width(CODES) {
                            let field_mask = D::splat(bytes((most(CODES) << (field * width(CODES))) as u8));
                            let (sum, step) = (sum_of(CODES, T, word, field), word * 8 / width(CODES) + field);
                            for (t, &w) in w.iter().enumerate() {
                                let codes = D::and(w, field_mask);
                                for (n, sums) in sums.iter_mut().enumerate() {
                                    sums[t][sum] = D::dot(sums[t][sum], codes, four(a.add(n * args.k + 4 * step)));
                                }
                            }
                        }
                    }
                } else if T > 1 {
                    for step in 0..8 {
                        let mut w = [D::splat(0); T];
                        for (t, w) in w.iter_mut().enumerate() {
                            *w = code::<D, CODES>(at.add(t * tile_bytes), step);
                            // Requests in bursts would wait for each other.
                            for word in step * width(CODES) / 8..(step + 1) * width(CODES) / 8 {
                                prefetch_over::<D, T>(at.add(t * tile_bytes + word * WORD), 1, skip);
                            }
                        }
                        for (n, sums) in sums.iter_mut().enumerate() {
                            let a = four(a.add(n * args.k + 4 * step));
                            for (sums, &w) in sums.iter_mut().zip(&w) {
                                let sum = &mut sums[0];
                                *sum = if is_signed(CODES) { D::dot_signed(*sum, w, a) } else { D::dot(*sum, w, a) };
                            }
                        }
                    }
                } else {
                    let w = decode::<D, CODES>(at);
                    for (n, sums) in sums.iter_mut().enumerate() {
                        let sums = &mut sums[0];
                        // Two chains while registers last: a product's latency is that of several.
                        let chains = if N <= 2 { 2 } else { 1 };
                        for (i, w) in w.chunks_exact(8 / chains).enumerate() {
                            let (sum, a) = (&mut sums[i], a.add(n * args.k + UNIT / chains * i));
                            if is_signed(CODES) {
                                *sum = D::dots_signed(*sum, w, a);
                            } else {
                                *sum = match CODES {
                                    1 => D::dots::<1>(*sum, w, a),
                                    2 => D::dots::<3>(*sum, w, a),
                                    3 => D::dots::<7>(*sum, w, a),
                                    4 => D::dots::<15>(*sum, w, a),
                                    5 => D::dots::<31>(*sum, w, a),
                                    _ => D::dots::<63>(*sum, w, a),
                                };
                            }
                        }
                    }
                }
            }
            for t in 0..T {
                let scales = scales.add(t * tile_bytes);
                if chunk == 0 && SCALE != TENSOR {
                    prefetch_over::<D, T>(scales, 1, skip);
                }
                let d = scale::<D, SCALE>(args, scales, chunk);
                for (n, sums) in sums.iter().enumerate() {
                    let sums = &sums[t];
                    let at = (args.first + j + n) * groups + g;
                    let sum = if placed { placed_total::<D>(sums, width(CODES)) } else { D::add(sums[0], sums[1]) };
                    finish::<D, SCALE>(args, d, scales, chunk, at, sum, &mut acc[n][chunk + t]);
                }
            }
        }
    }
    store::<D, N>(&acc, T, j, out);
}

/// Which partial sum a field of a word is added to: `placed_total` wants those of field f at f and at 4 + f, or with eight
/// fields at f. Two of a tile's are chains enough where there are two tiles.
#[inline(always)]
const fn sum_of(codes: u8, tiles: usize, word: usize, field: usize) -> usize {
    match codes {
        1 => field,
        _ if tiles > 1 => field,
        _ => field + 4 * (word % 2),
    }
}

/// Partial sums of fields that were multiplied in place: those of field f are 2^(f·width) times too large, each a multiple of
/// it, so that shifting is exact.
#[inline(always)]
unsafe fn placed_total<D: Dot>(sums: &[D::Int; SUMS], width: usize) -> D::Int {
    let mut total = D::splat(0);
    for f in (0..8 / width).rev() {
        let sum = if width == 1 { sums[f] } else { D::add(sums[f], sums[4 + f]) };
        total = if f + 1 == 8 / width { sum } else { D::add(D::sar(total, width as u32), sum) };
    }
    total
}

/// Whether groups have zero points.
#[inline(always)]
pub(super) const fn has_zeros(scale: u8) -> bool {
    matches!(scale, F16_ZERO4 | F32_ZERO4) || is_wide_zero(scale)
}

/// Zero points of a chunk's rows; `scales` is what is behind the codes.
#[inline(always)]
pub(super) unsafe fn zeros<D: Dot, const SCALE: u8>(scales: *const u8, chunk: usize) -> D::Int {
    let d_bytes = if matches!(SCALE, F32_ZERO4 | F32_ZERO8) { 4 } else { 2 };
    let zeros = scales.add(d_bytes * FIELD_TILE + D::LANES / 2 * chunk);
    if !is_wide_zero(SCALE) {
        return D::nibbles(zeros);
    }
    let zero = D::or(D::nibbles(zeros), D::shl(D::nibbles(zeros.add(FIELD_TILE / 2)), 4));
    D::sub(zero, D::splat(128)) // as the codes
}

/// Whether zero points have 8 bits.
#[inline(always)]
const fn is_wide_zero(scale: u8) -> bool {
    matches!(scale, F16_ZERO8 | F32_ZERO8)
}

/// acc = fma(d·d_a, sum − z·Σ a, acc), then for a minimum fma(m·d_a, Σ a, acc); `at` is the place of the activations' group.
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
    let sum = if has_zeros(SCALE) {
        let zero = zeros::<D, SCALE>(scales, chunk);
        D::sub(sum, D::mul(zero, D::splat(*args.sums.get_unchecked(at))))
    } else {
        sum
    };
    let sum = if is_wide_zero(SCALE) { D::to_float(sum) } else { D::small_to_float(sum) };
    *acc = D::fma(D::mul_float(d, a), sum, *acc);
    if SCALE == F16_MIN {
        let m = D::load_half(scales.add(2 * (FIELD_TILE + D::LANES * chunk)));
        let sum = D::splat_float(*args.sums.get_unchecked(at) as f32);
        *acc = D::fma(D::mul_float(m, a), sum, *acc);
    }
}

#[inline(always)]
unsafe fn store<D: Dot, const N: usize>(acc: &[[D::Float; CHUNKS]; N], tiles: usize, j: usize, out: &mut TileOut) {
    for (n, acc) in acc.iter().enumerate() {
        for (chunk, &acc) in acc.iter().enumerate().take(tiles * FIELD_TILE / D::LANES) {
            D::store(acc, out[j + n].as_mut_ptr().add(chunk * D::LANES));
        }
    }
}

/// The s and the m of quad t, four bytes a row in the order of `pack::scales` (m without meaning where there is none).
#[inline(always)]
pub(super) unsafe fn sub_scales<D: Dot, const SCALE: u8>(words: *const u8, t: usize) -> (D::Int, D::Int) {
    match SCALE {
        SUB4_MIN => {
            let w = word::<D>(words, t);
            (mask::<D>(w, 15), mask::<D>(D::shr(w, 4), 15))
        }
        SUB6_MIN => {
            let (low, high) = (word::<D>(words, t), D::shr(word::<D>(words, 2), 4 * t as u32));
            let s = D::or(mask::<D>(low, 15), D::shl(mask::<D>(high, 3), 4));
            (s, D::or(mask::<D>(D::shr(low, 4), 15), D::shl(mask::<D>(high, 12), 2)))
        }
        SUB6 => {
            let (low, high) =
                (D::shr(word::<D>(words, t / 2), 4 * (t % 2) as u32), D::shr(word::<D>(words, 2), 2 * t as u32));
            let s = D::or(mask::<D>(low, 15), D::shl(mask::<D>(high, 3), 4));
            (s, s)
        }
        SUB6_OF_32 => {
            let (low, high) = (D::shr(word::<D>(words, 0), 4 * t as u32), D::shr(word::<D>(words, 1), 2 * t as u32));
            let s = D::or(mask::<D>(low, 15), D::shl(mask::<D>(high, 3), 4));
            (s, s)
        }
        _ => (word::<D>(words, t), word::<D>(words, t)),
    }
}

/// Rows `first + j .. + N`, groups of 256 with sub-scales.
///
/// With s' stored (s plus the bias, 0 ..= 255), c the codes (0 ..= 63), b a sub's Σ a:
/// Σ s·(Σ (c + offset)·a) = Σ (s' − bias)·(Σ c·a) + offset·(Σ s'·b − bias·Σ b). The first sum is at most
/// 16 subs · 128 · 16·63·127 < 2.7·10^8, Σ s'·b at most 255·256·127 < 8.3·10^6, times 32 < 2.7·10^8: all fit i32.
/// For tables c is the value plus `SIGNED_BIAS`, −127 ..= 255, and the offset takes the bias away; |s| ≤ 32, s' ≤ 63: at most
/// 32·256·255·127 < 2.7·10^8, and 128·63·256·127 < 2.7·10^8.
///
/// Tiles that are given together are multiplied in turns, group by group: from two places in memory at once more is read ahead
/// than from one.
#[inline(always)]
pub(crate) unsafe fn nested<D: Dot, const CODES: u8, const SCALE: u8, const N: usize>(
    args: &TileArgs,
    j: usize,
    out: &mut TileOut,
) {
    let groups = check(args, j, N);
    let (size, tiles) = (256, args.tiles);
    assert!(args.form.group as usize == size);
    assert!(tiles == 1 || tiles == D::TILES && D::LANES == FIELD_TILE && tiles <= CHUNKS);
    let (subs, words) = (size / sub(SCALE), sub_words(SCALE));
    let group_bytes = (words + 8 * width(CODES)) * WORD + scale_bytes(SCALE);
    assert!(group_bytes == args.form.group_tile_bytes());
    let has_min = has_sub_minima(SCALE);
    assert!(!(is_signed(CODES) && has_min));
    let offset = match args.form.values {
        Values::Offset(offset) => offset as i32,
        _ => -D::SIGNED_BIAS,
    };
    let unit = table_values(CODES).unit();
    let tile_bytes = groups * group_bytes;
    let ahead = AHEAD / tiles;
    let mut acc = [[D::splat_float(0.0); CHUNKS]; N];
    for g in 0..groups {
        for place in 0..tiles * FIELD_TILE / D::LANES {
            // Of one tile a chunk of its rows, of several all.
            let (tile, chunk) = if D::LANES == FIELD_TILE { (place, 0) } else { (0, place) };
            let group = args.tile.as_ptr().add(tile * tile_bytes + g * group_bytes);
            let units = group.add(words * WORD);
            let scales = units.add(8 * width(CODES) * WORD);
            let rows = chunk * D::LANES * 4;
            let mut sums: Nested<D, N> = Nested {
                words: group.add(rows),
                units: units.add(rows),
                is_first: chunk == 0,
                ahead,
                skip: (tiles - 1) * tile_bytes,
                skip_from: args.tile.as_ptr().wrapping_add((tile + 1) * tile_bytes).wrapping_sub(ahead),
                a: args.codes.as_ptr().add((args.first + j) * args.k + g * size),
                a_stride: args.k,
                b: args.sub_sums.as_ptr().add(((args.first + j) * groups + g) * subs),
                b_stride: groups * subs,
                total: [D::splat(0); N],
                other: [D::splat(0); N],
            };
            if chunk == 0 {
                sums.prefetch(group, words);
            }
            quad::<D, CODES, SCALE, N, 0>(&mut sums);
            quad::<D, CODES, SCALE, N, 1>(&mut sums);
            if sub(SCALE) == 16 {
                quad::<D, CODES, SCALE, N, 2>(&mut sums);
                quad::<D, CODES, SCALE, N, 3>(&mut sums);
            }
            if chunk == 0 {
                sums.prefetch(scales, scale_bytes(SCALE).div_ceil(WORD));
            }
            let Nested { total, other, .. } = sums;
            let mut d = D::load_half(scales.add(2 * D::LANES * chunk));
            if unit != 1.0 {
                d = D::mul_float(d, D::splat_float(unit));
            }
            for n in 0..N {
                let at = (args.first + j + n) * groups + g;
                let a = D::splat_float(*args.scales.get_unchecked(at));
                let acc = &mut acc[n][place];
                if has_min {
                    let min = D::load_half(scales.add(2 * (FIELD_TILE + D::LANES * chunk)));
                    *acc = D::fma(D::mul_float(d, a), D::to_float(total[n]), *acc);
                    *acc = D::fma(D::mul_float(min, a), D::to_float(D::sub(D::splat(0), other[n])), *acc);
                } else {
                    let sums = bias(SCALE) * *args.sums.get_unchecked(at);
                    let rest = D::mul(D::sub(other[n], D::splat(sums)), D::splat(offset));
                    *acc = D::fma(D::mul_float(d, a), D::to_float(D::add(total[n], rest)), *acc);
                }
            }
        }
    }
    store::<D, N>(&acc, tiles, j, out);
}

/// k of a sub.
#[inline(always)]
pub(super) const fn sub(scale: u8) -> usize {
    if matches!(scale, SUB6_MIN | SUB6_OF_32) {
        32
    } else {
        16
    }
}

/// Whether subs have minima.
#[inline(always)]
pub(super) const fn has_sub_minima(scale: u8) -> bool {
    matches!(scale, SUB4_MIN | SUB6_MIN)
}

/// What stored sub-scales are too large by.
#[inline(always)]
pub(super) const fn bias(scale: u8) -> i32 {
    match scale {
        SUB6 | SUB6_OF_32 => 32,
        SUB8 => 128,
        _ => 0,
    }
}

/// What `quad` reads of a group, and its sums.
struct Nested<D: Dot, const N: usize> {
    words: *const u8,
    units: *const u8,
    /// Whether these are the first rows of the lines, which ask for those ahead.
    is_first: bool,
    /// How far ahead they ask; from `skip_from` on, where that is beyond the tile, `skip` further, behind the others.
    ahead: usize,
    skip: usize,
    skip_from: *const u8,
    /// Codes and sub-sums of the first row of activations, and the steps to the next.
    a: *const i8,
    a_stride: usize,
    b: *const i16,
    b_stride: usize,
    /// Σ (s' − bias)·(Σ c·a).
    total: [D::Int; N],
    /// Σ m·b, or Σ s'·b where there are no minima.
    other: [D::Int; N],
}

impl<D: Dot, const N: usize> Nested<D, N> {
    /// Asks for what lies ahead of these lines, at most six.
    #[inline(always)]
    unsafe fn prefetch(&self, from: *const u8, lines: usize) {
        let ahead = self.ahead + if from >= self.skip_from { self.skip } else { 0 };
        macro_rules! each {
            ($($line:literal)*) => { $(if $line < lines { D::prefetch_here::<$line>(from, ahead); })* };
        }
        each!(0 1 2 3 4 5);
    }
}

/// Subs 4·Q .. 4·Q + 4. Q is a constant, so that every shift is one.
///
/// With `PAIRS`, sums of codes of up to 4 bits over 16 k, |Σ c·a| ≤ 16·15·127 = 30480, are halves: two of them are multiplied with
/// their scales (−32 ..= 255, halves too) at once.
#[inline(always)]
unsafe fn quad<D: Dot, const CODES: u8, const SCALE: u8, const N: usize, const Q: usize>(sums: &mut Nested<D, N>) {
    let (s, m) = sub_scales::<D, SCALE>(sums.words, Q);
    let unit_bytes = width(CODES) * WORD;
    let has_min = has_sub_minima(SCALE);
    let narrow = D::PAIRS && width(CODES) <= 4 && !is_signed(CODES);
    for pair in 0..2 {
        // Subs 4·Q + 2·pair and the next.
        for unit in 0..sub(SCALE) / 16 {
            let index = (4 * Q + 2 * pair) * sub(SCALE) / UNIT + unit;
            let at = sums.units.add(index * unit_bytes);
            if sums.is_first {
                sums.prefetch(at, width(CODES));
            }
            if narrow && sub(SCALE) == 16 {
                let w = decode::<D, CODES>(at);
                let mut scales = halves::<D>(s, pair);
                if bias(SCALE) != 0 {
                    scales = D::sub_halves(scales, D::splat(bias(SCALE) << 16 | bias(SCALE)));
                }
                for n in 0..N {
                    let a = sums.a.add(n * sums.a_stride + index * UNIT);
                    let low = D::dots::<15>(D::splat(0), &w[..4], a);
                    let high = D::dots::<15>(D::splat(0), &w[4..], a.add(UNIT / 2));
                    sums.total[n] = D::dot_pairs(sums.total[n], D::pair(low, high), scales);
                }
            } else if narrow {
                let scales = match 2 * pair + unit {
                    0 => D::both::<0>(s),
                    1 => D::both::<2>(s),
                    2 => D::both::<1>(s),
                    _ => D::both::<3>(s),
                };
                if D::PLACED && N <= 2 && CODES == 4 {
                    let mut low = [D::splat(0); N];
                    let mut high = [D::splat(0); N];
                    for word in 0..4 {
                        let w = D::load(at.add(word * WORD));
                        let fields = [D::and(w, D::splat(bytes(15))), D::and(w, D::splat(bytes(0xf0)))];
                        for n in 0..N {
                            let a = sums.a.add(n * sums.a_stride + index * UNIT + 8 * word);
                            low[n] = D::dot(low[n], fields[0], four(a));
                            high[n] = D::dot(high[n], fields[1], four(a.add(4)));
                        }
                    }
                    for n in 0..N {
                        let pair = D::pair(low[n], D::shr(high[n], 4));
                        sums.total[n] = D::dot_pairs(sums.total[n], pair, scales);
                    }
                } else {
                    let w = decode::<D, CODES>(at);
                    for n in 0..N {
                        let a = sums.a.add(n * sums.a_stride + index * UNIT);
                        let low = D::dots::<15>(D::splat(0), &w[..4], a);
                        let high = D::dots::<15>(D::splat(0), &w[4..], a.add(UNIT / 2));
                        sums.total[n] = D::dot_pairs(sums.total[n], D::pair(low, high), scales);
                    }
                }
            } else {
                let w = decode::<D, CODES>(at);
                for half in 0..UNIT / sub(SCALE) {
                    let byte = [0, 2, 1, 3][2 * pair + unit + half];
                    let mut s = D::and(D::shr(s, 8 * byte), D::splat(255));
                    if bias(SCALE) != 0 {
                        s = D::sub(s, D::splat(bias(SCALE)));
                    }
                    let w = &w[half * sub(SCALE) / 4..(half + 1) * sub(SCALE) / 4];
                    for n in 0..N {
                        let a = sums.a.add(n * sums.a_stride + index * UNIT + half * sub(SCALE));
                        let sum = if is_signed(CODES) {
                            D::dots_signed(D::splat(0), w, a)
                        } else {
                            D::dots::<63>(D::splat(0), w, a)
                        };
                        sums.total[n] = D::add(sums.total[n], D::mul(sum, s));
                    }
                }
            }
        }
        let scales = halves::<D>(if has_min { m } else { s }, pair);
        for n in 0..N {
            let b = sums.b.add(n * sums.b_stride + 4 * Q + 2 * pair).cast::<i32>().read_unaligned();
            sums.other[n] = D::dot_halves(sums.other[n], scales, b);
        }
    }
}

/// Bytes 0 and 2, or 1 and 3, of each lane as halves.
#[inline(always)]
pub(super) unsafe fn halves<D: Dot>(v: D::Int, pair: usize) -> D::Int {
    D::and(D::shr(v, 8 * pair as u32), D::splat(0x00ff_00ff))
}

/// Rows `first + j .. + N` of trit codes with one f16 scale per group.
///
/// Digits are 0 ..= 2, in place up to 128: |Σ digit·a| ≤ 256·128·127.
#[inline(always)]
pub(crate) unsafe fn trits<D: Dot, const SIZE: usize, const N: usize>(args: &TileArgs, j: usize, out: &mut TileOut) {
    let groups = check(args, j, N);
    let size = if SIZE > 0 { SIZE } else { args.form.group as usize };
    let words = size.div_ceil(20);
    let group_bytes = words * WORD + scale_bytes(F16);
    assert!(size == args.form.group as usize && group_bytes == args.form.group_tile_bytes() && args.tiles == 1);
    let offset = match args.form.values {
        Values::Offset(offset) => offset as i32,
        _ => 0,
    };
    let placed = D::PLACED && N <= 2;
    let mut acc = [[D::splat_float(0.0); CHUNKS]; N];
    for g in 0..groups {
        let group = args.tile.as_ptr().add(g * group_bytes);
        for chunk in 0..FIELD_TILE / D::LANES {
            // Of digits in place 0 to 3, of the fifth, which is in place 3 too.
            let mut sums = [[D::splat(0); 5]; N];
            for (n, sums) in sums.iter_mut().enumerate() {
                let offset = if D::NEGATED_DIGITS { -offset } else { offset };
                sums[0] = D::splat(offset * *args.sums.get_unchecked((args.first + j + n) * groups + g));
            }
            for word in 0..words {
                let at = group.add(word * WORD);
                if chunk == 0 {
                    prefetch::<D, 1>(at, 1);
                }
                let w = D::load(at.add(chunk * D::LANES * 4));
                let a = args.codes.as_ptr().add((args.first + j) * args.k + g * size + 20 * word);
                // The last word's digits beyond the group are 0, whatever activations they meet.
                if placed {
                    let [first, last] = D::packed_digits(w);
                    for step in 0..5 {
                        let digit = mask::<D>(if step < 4 { first } else { last }, 3 << (2 * step.min(3)));
                        for (n, sums) in sums.iter_mut().enumerate() {
                            sums[step] = D::dot(sums[step], digit, four(a.add(n * args.k + 4 * step)));
                        }
                    }
                } else {
                    let digits = D::digits(w);
                    for (n, sums) in sums.iter_mut().enumerate() {
                        sums[0] = D::dots::<2>(sums[0], &digits, a.add(n * args.k));
                    }
                }
            }
            if chunk == 0 {
                prefetch::<D, 1>(group.add(words * WORD), 1);
            }
            let scales = group.add(words * WORD);
            let d = D::load_half(scales.add(2 * D::LANES * chunk));
            for (n, sums) in sums.iter().enumerate() {
                let at = (args.first + j + n) * groups + g;
                let mut sum = sums[0];
                if placed {
                    sum = D::add(sums[3], sums[4]);
                    for step in (0..3).rev() {
                        sum = D::add(D::sar(sum, 2), sums[step]);
                    }
                }
                if D::NEGATED_DIGITS {
                    sum = D::sub(D::splat(0), sum);
                }
                finish::<D, F16>(args, d, scales, chunk, at, sum, &mut acc[n][chunk]);
            }
        }
    }
    store::<D, N>(&acc, 1, j, out);
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

/// Defines `flat`, `nested` and `trits` of a `Dot` type, compiled with the features.
macro_rules! dot_kernels {
    ($set:ty, $features:literal) => {
        type Set = $set;

        /// # Safety
        ///
        /// `TileKernel`'s, for a form of these codes and scales.
        #[target_feature(enable = $features)]
        pub(super) unsafe fn flat<const CODES: u8, const SCALE: u8, const UNITS: usize>(
            args: &TileArgs,
            out: &mut TileOut,
        ) {
            if <Set as $crate::arch::dot::Dot>::TILES == 2 && UNITS == 1 && args.tiles == 2 {
                $crate::arch::dot::batched!(args, out, flat, CODES, SCALE, UNITS, 2);
            } else {
                $crate::arch::dot::batched!(args, out, flat, CODES, SCALE, UNITS, 1);
            }
        }

        /// # Safety
        ///
        /// See `flat`.
        #[target_feature(enable = $features)]
        pub(super) unsafe fn nested<const CODES: u8, const SCALE: u8>(args: &TileArgs, out: &mut TileOut) {
            $crate::arch::dot::batched!(args, out, nested, CODES, SCALE);
        }

        /// # Safety
        ///
        /// See `flat`; the codes are this set's trits.
        #[target_feature(enable = $features)]
        pub(super) unsafe fn trits<const SIZE: usize>(args: &TileArgs, out: &mut TileOut) {
            $crate::arch::dot::batched!(args, out, trits, SIZE);
        }
    };
}
pub(crate) use dot_kernels;

/// Defines a function of this name: the kernels for a form of fields or of these trits, those that `dot_kernels!` defined of the set
/// behind others, which take as many tiles at once.
macro_rules! dot_table {
    ($name:ident, $set:ty, $trits:pat $(, $first:expr)*) => {
        fn $name(form: PackedForm) -> &'static [Variant] {
            use $crate::arch::dot::{E8M0, F16, F16_MIN, F16_ZERO4, F16_ZERO8, F32_ZERO4, F32_ZERO8, TENSOR};
            use $crate::arch::dot::{IQ1, IQ2, IQ3_S, IQ3_XXS, IQ4_NL, MXFP4};
            use $crate::arch::dot::{SUB4_MIN, SUB6, SUB6_MIN, SUB6_OF_32, SUB8};
            use $crate::pack::{Codes, ScaleKind as S, Values};
            const fn dot(tile: $crate::matmul::TileKernel) -> Variant {
                Variant { name: "dot", tile, tiles: 1, widths: &[8, 4, 2, 1], tables: false, blocks: false }
            }
            const fn paired(variant: Variant) -> Variant {
                Variant { tiles: <$set as $crate::arch::dot::Dot>::TILES, ..variant }
            }
            const fn pair(tile: $crate::matmul::TileKernel) -> Variant {
                paired(dot(tile))
            }
            match (form.codes, form.values, form.scale, form.group) {
                (Codes::Fields(1), Values::Offset(_), S::F16Min, _) => const { &[$($first,)* dot(flat::<1, F16_MIN, 0>)] },
                (Codes::Fields(2), Values::Offset(_), S::F16, _) => const { &[$($first,)* dot(flat::<2, F16, 0>)] },
                (Codes::Fields(2), Values::Offset(_), S::Tensor, _) => const { &[$($first,)* dot(flat::<2, TENSOR, 0>)] },
                (Codes::Fields(2), Values::Offset(_), S::F16Min, _) => const { &[$($first,)* dot(flat::<2, F16_MIN, 0>)] },
                (Codes::Fields(2), Values::Offset(_), S::Sub4Min, 256) => const { &[$(paired($first),)* pair(nested::<2, SUB4_MIN>)] },
                (Codes::Fields(3), Values::Offset(_), S::F16Min, _) => const { &[$($first,)* dot(flat::<3, F16_MIN, 0>)] },
                (Codes::Fields(3), Values::Offset(_), S::Sub6, 256) => const { &[$(paired($first),)* pair(nested::<3, SUB6>)] },
                (Codes::Fields(4), Values::Offset(_), S::F16, 32) => const { &[$(paired($first),)* pair(flat::<4, F16, 1>)] },
                (Codes::Fields(4), Values::Offset(_), S::F16, _) => const { &[$($first,)* dot(flat::<4, F16, 0>)] },
                (Codes::Fields(4), Values::Offset(_), S::F16Min, 32) => const { &[$(paired($first),)* pair(flat::<4, F16_MIN, 1>)] },
                (Codes::Fields(4), Values::Offset(_), S::F16Min, _) => const { &[$($first,)* dot(flat::<4, F16_MIN, 0>)] },
                (Codes::Fields(4), Values::Offset(_), S::Sub6Min, 256) => const { &[$(paired($first),)* pair(nested::<4, SUB6_MIN>)] },
                (Codes::Fields(3), Values::Iq1, S::Sub6Of32, 256) => const { &[$(paired($first),)* pair(nested::<IQ1, SUB6_OF_32>)] },
                (Codes::Fields(3), Values::Iq1, S::Sub6, 256) => const { &[$(paired($first),)* pair(nested::<IQ1, SUB6>)] },
                (Codes::Fields(3), Values::Iq2, S::Sub6Of32, 256) => const { &[$(paired($first),)* pair(nested::<IQ2, SUB6_OF_32>)] },
                (Codes::Fields(3), Values::Iq2, S::Sub6, 256) => const { &[$(paired($first),)* pair(nested::<IQ2, SUB6>)] },
                (Codes::Fields(4), Values::Iq3Xxs, S::Sub6Of32, 256) => const { &[$(paired($first),)* pair(nested::<IQ3_XXS, SUB6_OF_32>)] },
                (Codes::Fields(4), Values::Iq3S, S::Sub6Of32, 256) => const { &[$(paired($first),)* pair(nested::<IQ3_S, SUB6_OF_32>)] },
                (Codes::Fields(4), Values::Iq4Nl, S::Sub6Of32, 256) => const { &[$(paired($first),)* pair(nested::<IQ4_NL, SUB6_OF_32>)] },
                (Codes::Fields(4), Values::Iq4Nl, S::F16, 32) => const { &[$(paired($first),)* pair(flat::<IQ4_NL, F16, 1>)] },
                (Codes::Fields(4), Values::Mxfp4, S::E8M0, 32) => const { &[$(paired($first),)* pair(flat::<MXFP4, E8M0, 1>)] },
                (Codes::Fields(5), Values::Offset(_), S::F16, 32) => const { &[$(paired($first),)* pair(flat::<5, F16, 1>)] },
                (Codes::Fields(5), Values::Offset(_), S::F16Min, 32) => const { &[$(paired($first),)* pair(flat::<5, F16_MIN, 1>)] },
                (Codes::Fields(5), Values::Offset(_), S::Sub6Min, 256) => const { &[$(paired($first),)* pair(nested::<5, SUB6_MIN>)] },
                (Codes::Fields(2), Values::Offset(_), S::F16Zero4, _) => const { &[$($first,)* dot(flat::<2, F16_ZERO4, 0>)] },
                (Codes::Fields(3), Values::Offset(_), S::F16Zero4, _) => const { &[$($first,)* dot(flat::<3, F16_ZERO4, 0>)] },
                (Codes::Fields(4), Values::Offset(_), S::F16Zero4, _) => const { &[$($first,)* dot(flat::<4, F16_ZERO4, 0>)] },
                (Codes::Fields(8), Values::Offset(_), S::F16Zero8, _) => const { &[$($first,)* dot(flat::<8, F16_ZERO8, 0>)] },
                (Codes::Fields(2), Values::Offset(_), S::F32Zero4, _) => const { &[$($first,)* dot(flat::<2, F32_ZERO4, 0>)] },
                (Codes::Fields(3), Values::Offset(_), S::F32Zero4, _) => const { &[$($first,)* dot(flat::<3, F32_ZERO4, 0>)] },
                (Codes::Fields(4), Values::Offset(_), S::F32Zero4, _) => const { &[$($first,)* dot(flat::<4, F32_ZERO4, 0>)] },
                (Codes::Fields(8), Values::Offset(_), S::F32Zero8, _) => const { &[$($first,)* dot(flat::<8, F32_ZERO8, 0>)] },
                (Codes::Fields(6), Values::Offset(_), S::Sub8, 256) => const { &[$(paired($first),)* pair(nested::<6, SUB8>)] },
                (Codes::Fields(8), Values::Offset(_), S::F16, 32) => const { &[$(paired($first),)* pair(flat::<8, F16, 1>)] },
                ($trits, Values::Offset(_), S::F16, 256) => const { &[$($first,)* dot(trits::<256>)] },
                ($trits, Values::Offset(_), S::F16, _) => const { &[$($first,)* dot(trits::<0>)] },
                _ => &[],
            }
        }
    };
}
pub(crate) use dot_table;
