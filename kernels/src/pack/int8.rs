//! `Codes::Int8`: for every 4 consecutive k, four signed bytes per row, rows in order: what a 4-way dot product reads.

use super::TILE;

pub(super) fn put(group: &mut [u8], row: usize, codes: &[u8]) {
    for (step, four) in codes.chunks_exact(4).enumerate() {
        group[(step * TILE + row) * 4..][..4].copy_from_slice(four);
    }
}

/// The codes of a row of a group.
pub(super) fn get(group: &[u8], row: usize, codes: &mut [i32]) {
    for (step, four) in codes.chunks_exact_mut(4).enumerate() {
        for (code, &byte) in four.iter_mut().zip(&group[(step * TILE + row) * 4..][..4]) {
            *code = byte as i8 as i32;
        }
    }
}
