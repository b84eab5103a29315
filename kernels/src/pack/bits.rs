//! `Codes::Bits(n)`: bit planes for table lookup.
//!
//! For every 8 consecutive k (an octet) and every plane b there are 32 bytes, one per row of the tile: bit i of its low
//! nibble is bit b of the code at k = 8·octet + i, and bit i of its high nibble that at 8·octet + 4 + i. A nibble thus is
//! the index of a subset sum of four activations (`quantize::Table`).
//!
//! Rows are interleaved within each half of a tile: byte 2i of a half is its row i, byte 2i + 1 its row 8 + i. Sums that
//! a kernel keeps per even and per odd byte are then rows in order.

use super::{Codes, PackedForm, TILE};

/// Where a row's byte is among a plane's 32.
#[inline(always)]
fn position(row: usize) -> usize {
    row / 16 * 16 + row % 8 * 2 + row / 8 % 2
}

pub(super) fn put(group: &mut [u8], n: u8, row: usize, codes: &[u8]) {
    for (k, code) in codes.iter().enumerate() {
        for plane in 0..n as usize {
            group[(k / 8 * n as usize + plane) * TILE + position(row)] |= (code >> plane & 1) << (k % 8);
        }
    }
}

pub(crate) fn code(form: PackedForm, group: &[u8], row: usize, k: usize) -> i32 {
    let Codes::Bits(n) = form.codes else { unreachable!("not bit planes") };
    let n = n as usize;
    let bit = |plane: usize| (group[(k / 8 * n + plane) * TILE + position(row)] >> (k % 8) & 1) as i32;
    (0..n).map(|plane| bit(plane) << plane).sum()
}
