//! `Codes::Bits(n)`: bit planes for table lookup.
//!
//! For every 8 consecutive k (an octet) and every plane b there are 32 bytes, one per row of the tile in order: bit i of its low
//! nibble is bit b of the code at k = 8·octet + i, and bit i of its high nibble that at 8·octet + 4 + i. A nibble thus is
//! the index of a subset sum of four activations (`quantize::Table`).

use super::{Codes, PackedForm, TILE};

pub(super) fn put(group: &mut [u8], n: u8, row: usize, codes: &[u8]) {
    for (k, code) in codes.iter().enumerate() {
        for plane in 0..n as usize {
            group[(k / 8 * n as usize + plane) * TILE + row] |= (code >> plane & 1) << (k % 8);
        }
    }
}

pub(crate) fn code(form: PackedForm, group: &[u8], row: usize, k: usize) -> i32 {
    let Codes::Bits(n) = form.codes else { unreachable!("not bit planes") };
    let n = n as usize;
    let bit = |plane: usize| (group[(k / 8 * n + plane) * TILE + row] >> (k % 8) & 1) as i32;
    (0..n).map(|plane| bit(plane) << plane).sum()
}
