//! `Codes::Int8`: for every 4 consecutive k, four signed bytes per row, rows in order: what a 4-way dot product reads.

use super::TILE;

#[inline(always)]
fn at(row: usize, k: usize) -> usize {
    k / 4 * 4 * TILE + row * 4 + k % 4
}

pub(super) fn put(group: &mut [u8], row: usize, codes: &[u8]) {
    for (k, &code) in codes.iter().enumerate() {
        group[at(row, k)] = code;
    }
}

pub(crate) fn code(group: &[u8], row: usize, k: usize) -> i32 {
    group[at(row, k)] as i8 as i32
}
