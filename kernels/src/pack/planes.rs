//! `Codes::Planes(n)`: bit planes for table lookup.
//!
//! For every 8 consecutive k (an octet) and every plane b there are 32 bytes, one per row of the tile in order: bit i of its low
//! nibble is bit b of the code at k = 8·octet + i, and bit i of its high nibble that at 8·octet + 4 + i. A nibble thus is
//! the index of a subset sum of four activations (`quantize::Table`).

pub(super) use super::PLANE_TILE as TILE;

pub(super) fn put(group: &mut [u8], n: u8, row: usize, codes: &[u8]) {
    for (octet, codes) in group.chunks_exact_mut(n as usize * TILE).zip(codes.chunks_exact(8)) {
        let codes = u64::from_le_bytes(codes.try_into().expect("8 codes"));
        for (b, plane) in octet.chunks_exact_mut(TILE).enumerate() {
            // Bit 0 of byte i of the product's first factor comes to bit 56 + i; no two of the other partial products meet.
            plane[row] = ((codes >> b & 0x0101_0101_0101_0101).wrapping_mul(0x0102_0408_1020_4080) >> 56) as u8;
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
