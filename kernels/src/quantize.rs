//! Activations to int8, and the lookup tables made of them.
//!
//! A group of activations becomes `a ≈ d·q`: d = max|a|/127 in f32, q = a·(127/max|a|) rounded half to even, so |q| ≤ 127.
//! Two kinds of groups have q = 0 throughout: those with a NaN or an infinity, whose d is NaN so that the product shows it,
//! and those below `SMALLEST`, whose d is 0.

/// Groups whose largest magnitude is below this count as zero: 127/max|a| would come near the end of f32's range.
pub const SMALLEST: f32 = 1e-30;

/// All 16 subset sums of four neighbouring int8 activations: entry i is the sum of those whose bit is set in i, in
/// −508 ..= 508, as `32·(high − 16) + low` with both in 0 ..= 31, so that eight of either can be added as bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(32))]
pub(crate) struct Table {
    pub low: [u8; 16],
    pub high: [u8; 16],
}

impl Table {
    /// The two tables of every line.
    pub fn of(lines: &[Line]) -> &[Table] {
        // SAFETY: a line is as large as two tables and aligned to more; tables are bytes and nothing else.
        unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), 2 * lines.len()) }
    }

    /// See `of`.
    pub fn of_mut(lines: &mut [Line]) -> &mut [Table] {
        // SAFETY: as there; the borrow is mutable.
        unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), 2 * lines.len()) }
    }
}

/// A line of the cache: of codes, or of lookup tables, which are two `Table`s or what else the look-up kernels of an instruction
/// set want.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(crate) struct Line(pub [u8; Line::LEN]);

impl Line {
    pub const LEN: usize = 64;
    pub const ZERO: Line = Line([0; Line::LEN]);
}

/// The lookup tables of one instruction set.
#[derive(Clone, Copy)]
pub(crate) struct Tabling {
    /// Lines of the tables of a group of so many activations.
    pub lines: fn(group: usize) -> usize,
    /// Makes the tables of whole groups. Unsafe only in that the machine must have the instruction set.
    pub build: unsafe fn(codes: &[i8], group: usize, lines: &mut [Line]),
}

impl Tabling {
    /// `Table`s, whatever the group.
    pub const fn of_fours(build: unsafe fn(codes: &[i8], group: usize, lines: &mut [Line])) -> Self {
        Tabling { lines: |group| group / 8, build }
    }
}

/// (scale d, factor 127/max|a|) of a group, from the bits of its largest magnitude. The bits of magnitudes order like the
/// magnitudes, with infinity and NaN on top.
#[inline(always)]
pub(crate) fn group_scale(largest_bits: u32) -> (f32, f32) {
    let largest = f32::from_bits(largest_bits);
    if !largest.is_finite() {
        (f32::NAN, 0.0)
    } else if largest < SMALLEST {
        (0.0, 0.0)
    } else {
        (largest / 127.0, 127.0 / largest)
    }
}

/// Quantises `x`, whole groups of a multiple of 32, into `codes` as long as `x`, and `scales` and `sums` (Σ q), one per group.
/// Unsafe only in that the machine must have the instruction set.
pub(crate) type Quantize = unsafe fn(x: &[f32], group: usize, codes: &mut [i8], scales: &mut [f32], sums: &mut [i32]);

/// A `Quantize`.
pub(crate) fn quantize_portable(x: &[f32], group: usize, codes: &mut [i8], scales: &mut [f32], sums: &mut [i32]) {
    let outputs = codes.chunks_exact_mut(group).zip(scales).zip(sums);
    for (x, ((codes, scale), sum)) in x.chunks_exact(group).zip(outputs) {
        let largest = x.iter().map(|v| v.to_bits() & 0x7fff_ffff).max().unwrap_or(0);
        let factor;
        (*scale, factor) = group_scale(largest);
        for (code, v) in codes.iter_mut().zip(x) {
            // NaN (0 · infinity) becomes 0 by the rules of `as`.
            *code = if factor == 0.0 { 0 } else { (v * factor).round_ties_even().clamp(-127.0, 127.0) as i8 };
        }
        *sum = codes.iter().map(|&q| q as i32).sum();
    }
}

/// Of 16-bit activations: q = 255·high + low, both −127 ..= 127, so that kernels of int8 activations multiply each, exactly.
pub(crate) const DIGIT: i32 = 255;
/// The largest such q.
pub const LARGEST_16: i32 = 127 * DIGIT + 127;

/// Quantises `x`, whole groups, to 16 bits: `a ≈ d·q`, q = a / d rounded half to even, |q| ≤ `LARGEST_16`, d the least f32 of 16
/// significant bits with d·`LARGEST_16` ≥ max|a|, so that 255·d is exact too. The first half of each output is of the high
/// digits (their scale 255·d), the second of the low ones. Groups of zeros are as with 8 bits.
pub(crate) fn quantize16(x: &[f32], group: usize, codes: &mut [i8], scales: &mut [f32], sums: &mut [i32]) {
    let groups = x.len() / group;
    assert!(x.len() == groups * group && codes.len() == 2 * x.len());
    assert!(scales.len() == 2 * groups && sums.len() == 2 * groups);
    let (high, low) = codes.split_at_mut(x.len());
    for (g, x) in x.chunks_exact(group).enumerate() {
        let largest = f32::from_bits(x.iter().map(|v| v.to_bits() & 0x7fff_ffff).max().unwrap_or(0));
        let d = match largest {
            v if !v.is_finite() => f32::NAN,
            v if v < SMALLEST => 0.0,
            v => f32::from_bits(((v / LARGEST_16 as f32).to_bits() + 0xff) & !0xff),
        };
        (scales[g], scales[groups + g]) = (d * DIGIT as f32, d);
        let factor = if d > 0.0 { 1.0 / d } else { 0.0 };
        let places = g * group..(g + 1) * group;
        let (high, low) = (&mut high[places.clone()], &mut low[places]);
        for ((v, high), low) in x.iter().zip(&mut *high).zip(&mut *low) {
            let most = LARGEST_16 as f32;
            let q = if factor == 0.0 { 0 } else { (v * factor).round_ties_even().clamp(-most, most) as i32 };
            let rest = (q + 127).rem_euclid(DIGIT) - 127;
            (*high, *low) = (((q - rest) / DIGIT) as i8, rest as i8);
        }
        sums[g] = high.iter().map(|&q| q as i32).sum();
        sums[groups + g] = low.iter().map(|&q| q as i32).sum();
    }
}

/// One table per four codes.
pub(crate) fn build_tables_portable(codes: &[i8], _group: usize, lines: &mut [Line]) {
    for (four, table) in codes.chunks_exact(4).zip(Table::of_mut(lines)) {
        for i in 0..16 {
            let sum: i16 = (0..4).filter(|bit| i >> bit & 1 == 1).map(|bit| four[bit] as i16).sum();
            table.low[i] = (sum & 31) as u8;
            table.high[i] = ((sum >> 5) + 16) as u8;
        }
    }
}
