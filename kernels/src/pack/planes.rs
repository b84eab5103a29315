//! `Codes::Planes(n)`: bit planes for table lookup.
//!
//! For every 8 consecutive k (an octet) and every plane b there are 32 bytes, one per row of the tile in order: bit i of its low
//! nibble is bit b of the code at k = 8·octet + i, and bit i of its high nibble that at 8·octet + 4 + i. A nibble thus is
//! the index of a subset sum of four activations (`quantize::Table`).

use super::PLANE_TILE as TILE;

pub(super) fn put(group: &mut [u8], n: u8, row: usize, codes: &[u8]) {
    for (k, code) in codes.iter().enumerate() {
        for plane in 0..n as usize {
            group[(k / 8 * n as usize + plane) * TILE + row] |= (code >> plane & 1) << (k % 8);
        }
    }
}

/// The codes of a row of a group.
pub(super) fn get(group: &[u8], n: u8, row: usize, codes: &mut [i32]) {
    for (octet, codes) in codes.chunks_exact_mut(8).enumerate() {
        codes.fill(0);
        for plane in 0..n as usize {
            let byte = group[(octet * n as usize + plane) * TILE + row] as i32;
            for (i, code) in codes.iter_mut().enumerate() {
                *code |= (byte >> i & 1) << plane;
            }
        }
    }
}
