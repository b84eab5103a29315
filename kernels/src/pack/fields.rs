//! `Codes::Fields(n)`: codes side by side in words of 4 bytes per row, for dot products of four neighbouring k.
//!
//! A word of a tile has four bytes of every row, rows in order; byte j of a row's word has codes at k ≡ j (mod 4). In units of
//! 32 k, a part of b bits (1, 2, 4 or 8) takes b words; word w has 8/b fields, and field f (at bit b·f) is the code at
//! k = 4·(w·8/b + f) + j. Codes of 3, 5 and 6 bits have two parts, the lower one first: 2 + 1, 4 + 1, 4 + 2.

use super::FIELD_TILE;

/// k of a unit.
pub(crate) const UNIT: usize = 32;
/// Bytes of a word of all rows.
pub(crate) const WORD: usize = 4 * FIELD_TILE;

/// Widths of the parts of an n-bit code.
pub(super) fn parts(n: u8) -> [usize; 2] {
    match n {
        3 => [2, 1],
        5 => [4, 1],
        6 => [4, 2],
        _ => [n as usize, 0],
    }
}

/// Where part `bits` of the code at k of a unit lies: its byte within the part's words, and its lowest bit.
pub(super) fn place(bits: usize, row: usize, k: usize) -> (usize, usize) {
    let (step, fields) = (k / 4, 8 / bits);
    (step / fields * WORD + row * 4 + k % 4, step % fields * bits)
}

pub(super) fn put(group: &mut [u8], n: u8, row: usize, codes: &[u8]) {
    match n {
        1 => put_parts::<1, 0>(group, row, codes),
        2 => put_parts::<2, 0>(group, row, codes),
        3 => put_parts::<2, 1>(group, row, codes),
        4 => put_parts::<4, 0>(group, row, codes),
        5 => put_parts::<4, 1>(group, row, codes),
        6 => put_parts::<4, 2>(group, row, codes),
        8 => put_parts::<8, 0>(group, row, codes),
        _ => unreachable!("no fields of {n} bits"),
    }
}

/// Codes with a lower part of LOW bits and an upper one of HIGH (0: none).
fn put_parts<const LOW: usize, const HIGH: usize>(group: &mut [u8], row: usize, codes: &[u8]) {
    for (unit, codes) in group.chunks_exact_mut((LOW + HIGH) * WORD).zip(codes.chunks_exact(UNIT)) {
        // Four neighbouring codes at once, a byte each.
        let steps: [u32; 8] = std::array::from_fn(|i| u32::from_le_bytes(codes[4 * i..][..4].try_into().expect("4")));
        let (low, high) = unit.split_at_mut(LOW * WORD);
        put_part::<LOW>(low, row, &steps);
        if HIGH > 0 {
            put_part::<HIGH>(high, row, &steps.map(|step| step >> LOW));
        }
    }
}

fn put_part<const BITS: usize>(part: &mut [u8], row: usize, steps: &[u32; 8]) {
    // What a shift brings in from the byte above is masked off.
    let mask = 0x0101_0101 * ((1 << BITS) - 1);
    for (word, steps) in part.chunks_exact_mut(WORD).zip(steps.chunks_exact(8 / BITS)) {
        let fields = steps.iter().enumerate().fold(0, |word, (f, step)| word | (step & mask) << (BITS * f));
        word[4 * row..][..4].copy_from_slice(&fields.to_le_bytes());
    }
}

/// The codes of a row of a group.
pub(super) fn get(group: &[u8], n: u8, row: usize, codes: &mut [i32]) {
    for (unit, codes) in group.chunks_exact(n as usize * WORD).zip(codes.chunks_exact_mut(UNIT)) {
        for (k, code) in codes.iter_mut().enumerate() {
            let (mut start, mut shift) = (0, 0);
            *code = 0;
            for bits in parts(n).into_iter().filter(|&bits| bits > 0) {
                let (at, bit) = place(bits, row, k);
                *code |= (unit[start + at] as i32 >> bit & ((1 << bits) - 1)) << shift;
                (start, shift) = (start + bits * WORD, shift + bits);
            }
        }
    }
}
