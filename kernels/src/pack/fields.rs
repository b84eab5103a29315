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
fn parts(n: u8) -> [usize; 2] {
    match n {
        3 => [2, 1],
        5 => [4, 1],
        6 => [4, 2],
        _ => [n as usize, 0],
    }
}

/// Where part `bits` of the code at k of a unit lies: its byte within the part's words, and its lowest bit.
fn place(bits: usize, row: usize, k: usize) -> (usize, usize) {
    let (step, fields) = (k / 4, 8 / bits);
    (step / fields * WORD + row * 4 + k % 4, step % fields * bits)
}

pub(super) fn put(group: &mut [u8], n: u8, row: usize, codes: &[u8]) {
    for (unit, codes) in group.chunks_exact_mut(n as usize * WORD).zip(codes.chunks_exact(UNIT)) {
        for (k, &code) in codes.iter().enumerate() {
            let (mut start, mut shift) = (0, 0);
            for bits in parts(n).into_iter().filter(|&bits| bits > 0) {
                let (at, bit) = place(bits, row, k);
                unit[start + at] |= ((code as usize >> shift & ((1 << bits) - 1)) << bit) as u8;
                (start, shift) = (start + bits * WORD, shift + bits);
            }
        }
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
