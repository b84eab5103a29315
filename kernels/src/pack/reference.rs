//! Packing as the formats and layouts are defined, a code and a bit at a time: what the packing that is used must agree with
//! to the byte.

use super::codebooks::{self, even_signs};
use super::fields::{parts, place, UNIT, WORD};
use super::planes::TILE;
use super::source::{
    iq1_m_scale, iq1_m_sub_scale, iq4_scale, scale_6, scale_min_6, signs_at, tq1_trit, wide_scale, zero_of, Block,
};
use super::trits::encode;
use super::*;

fn read(ty: SourceType, block: &[u8]) -> Block {
    use SourceType::*;
    let mut b = Block::EMPTY;
    let half = |at: usize| u16::from_le_bytes([block[at], block[at + 1]]);
    // 32 nibbles, the first 16 low; `fifth` has their upper bits.
    let mut nibbles = |bytes: &[u8], fifth: u32| {
        for i in 0..16 {
            b.codes[i] = bytes[i] & 15 | ((fifth >> i & 1) as u8) << 4;
            b.codes[16 + i] = bytes[i] >> 4 | ((fifth >> (16 + i) & 1) as u8) << 4;
        }
    };
    let word = |at: usize| u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
    match ty {
        Q4_0 | IQ4_NL => {
            nibbles(&block[2..], 0);
            b.scale = half(0);
        }
        MXFP4 => {
            nibbles(&block[1..], 0);
            b.scale = block[0] as u16;
        }
        Q4_1 => {
            nibbles(&block[4..], 0);
            (b.scale, b.min) = (half(0), half(2));
        }
        Q5_0 => {
            nibbles(&block[6..], word(2));
            b.scale = half(0);
        }
        Q5_1 => {
            nibbles(&block[8..], word(4));
            (b.scale, b.min) = (half(0), half(2));
        }
        Q8_0 => {
            b.codes[..32].copy_from_slice(&block[2..34]);
            b.scale = half(0);
        }
        Q2_K => {
            for k in 0..256 {
                b.codes[k] = block[16 + k / 128 * 32 + k % 32] >> (2 * (k / 32 % 4)) & 3;
            }
            for j in 0..16 {
                (b.sub_scales[j], b.sub_mins[j]) = (block[j] & 15, block[j] >> 4);
            }
            (b.scale, b.min) = (half(80), half(82));
        }
        Q3_K => {
            for k in 0..256 {
                let low = block[32 + k / 128 * 32 + k % 32] >> (2 * (k / 32 % 4)) & 3;
                b.codes[k] = low | (block[k % 32] >> (k / 32) & 1) << 2;
            }
            for j in 0..16 {
                b.sub_scales[j] = scale_6(&block[96..108], j);
            }
            b.scale = half(108);
        }
        Q4_K | Q5_K => {
            let (high, low) = if ty == Q4_K { (None, 16) } else { (Some(16), 48) };
            for k in 0..256 {
                b.codes[k] = block[low + k / 64 * 32 + k % 32] >> (4 * (k / 32 % 2)) & 15;
                if let Some(high) = high {
                    b.codes[k] |= (block[high + k % 32] >> (k / 32) & 1) << 4;
                }
            }
            for j in 0..8 {
                (b.sub_scales[j], b.sub_mins[j]) = scale_min_6(&block[4..16], j);
            }
            (b.scale, b.min) = (half(0), half(2));
        }
        Q6_K => {
            for k in 0..256 {
                let (part, l) = (k / 128, k % 128);
                let low = block[part * 64 + l % 64] >> (4 * (l / 64)) & 15;
                b.codes[k] = low | (block[128 + part * 32 + l % 32] >> (2 * (l / 32)) & 3) << 4;
            }
            for j in 0..16 {
                b.sub_scales[j] = block[192 + j].wrapping_add(128);
            }
            b.scale = half(208);
        }
        TQ1_0 => {
            for (k, code) in b.codes.iter_mut().enumerate() {
                // 32 bytes of five trits, 16 bytes of five, 4 bytes of four; trits of a part are the slow index.
                let (byte, n) = match k {
                    0..160 => (k % 32, k / 32),
                    160..240 => (32 + (k - 160) % 16, (k - 160) / 16),
                    _ => (48 + (k - 240) % 4, (k - 240) / 4),
                };
                *code = tq1_trit(block[byte], n);
            }
            b.scale = half(52);
        }
        TQ2_0 => {
            for k in 0..256 {
                b.codes[k] = block[k / 128 * 32 + k % 32] >> (2 * (k / 32 % 4)) & 3;
            }
            b.scale = half(64);
        }
        I2_S => {
            for k in 0..128 {
                b.codes[k] = block[k % 32] >> (6 - 2 * (k / 32)) & 3;
            }
        }
        L1 | L2 | L3 => {
            let n = ty as usize - 1000;
            for (k, code) in b.codes[..128].iter_mut().enumerate() {
                *code = (0..n).fold(0, |code, i| code | (block[4 + (n * k + i) / 8] >> ((n * k + i) % 8) & 1) << i);
            }
            (b.scale, b.min) = (half(0), half(2));
        }
        IQ2_XXS | IQ3_XXS => {
            for k in 0..256 {
                let signs = word(signs_at(ty, k / 32));
                b.codes[k] = if ty == IQ2_XXS {
                    digit(codebooks::IQ2_XXS[block[2 + k / 32 * 8 + k / 8 % 4] as usize], k % 8)
                } else {
                    digit(codebooks::IQ3_XXS[block[2 + k / 4] as usize] as u64, k % 4)
                };
                let negative = even_signs(signs >> (7 * (k / 8 % 4))) >> (k % 8) & 1;
                b.codes[k] |= negative << if ty == IQ2_XXS { 2 } else { 3 };
                b.sub_scales[k / 32] = 33 + 2 * (signs >> 28) as u8;
            }
            b.scale = half(0);
        }
        IQ2_XS => {
            for k in 0..256 {
                let word = half(2 + k / 8 * 2);
                let negative = even_signs(word as u32 >> 9) >> (k % 8) & 1;
                b.codes[k] = digit(codebooks::IQ2_XS[(word & 511) as usize], k % 8) | negative << 2;
                b.sub_scales[k / 16] = 33 + 2 * (block[66 + k / 32] >> (4 * (k / 16 % 2)) & 15);
            }
            b.scale = half(0);
        }
        IQ2_S => {
            for k in 0..256 {
                let entry = block[2 + k / 8] as usize | (block[66 + k / 32] as usize >> (k / 8 % 4 * 2) & 3) << 8;
                b.codes[k] = digit(codebooks::IQ2_S[entry], k % 8) | (block[34 + k / 8] >> (k % 8) & 1) << 2;
                b.sub_scales[k / 16] = 33 + 2 * (block[74 + k / 32] >> (4 * (k / 16 % 2)) & 15);
            }
            b.scale = half(0);
        }
        IQ3_S => {
            for k in 0..256 {
                let entry = block[2 + k / 4] as usize | (block[66 + k / 32] as usize >> (k / 4 % 8) & 1) << 8;
                b.codes[k] = digit(codebooks::IQ3_S[entry] as u64, k % 4) | (block[74 + k / 8] >> (k % 8) & 1) << 3;
                b.sub_scales[k / 32] = 33 + 2 * (block[106 + k / 64] >> (4 * (k / 32 % 2)) & 15);
            }
            b.scale = half(0);
        }
        IQ1_S => {
            for k in 0..256 {
                let word = half(34 + k / 32 * 2);
                let entry = block[2 + k / 8] as usize | (word as usize >> (k / 8 % 4 * 3) & 7) << 8;
                b.codes[k] = digit(codebooks::IQ1[entry], k % 8) | ((word >> 15) as u8) << 2;
                b.sub_scales[k / 32] = 33 + 2 * (word >> 12 & 7) as u8;
            }
            b.scale = half(0);
        }
        IQ1_M => {
            for k in 0..256 {
                let high = block[32 + k / 16] >> (k / 8 % 2 * 4);
                let entry = block[k / 8] as usize | (high as usize & 7) << 8;
                b.codes[k] = digit(codebooks::IQ1[entry], k % 8) | (high >> 3 & 1) << 2;
                b.sub_scales[k / 16] = 33 + 2 * iq1_m_sub_scale(block, k / 16);
            }
            b.scale = iq1_m_scale(block);
        }
        IQ4_XS => {
            for k in 0..256 {
                b.codes[k] = block[8 + k / 32 * 16 + k % 16] >> (k / 16 % 2 * 4) & 15;
                b.sub_scales[k / 32] = iq4_scale(block, k / 32);
            }
            b.scale = half(0);
        }
        F32 | F16 | BF16 => unreachable!("float weights are in no blocks"),
        _ => {
            let (n, group) = ty.zero_point().unwrap();
            let bytes = &block[ty.zero_at() + 1..];
            for (k, code) in b.codes[..group].iter_mut().enumerate() {
                *code = (0..n).fold(0, |code, i| code | (bytes[(n * k + i) / 8] >> ((n * k + i) % 8) & 1) << i);
                *code ^= if n == 8 { 128 } else { 0 };
            }
            (b.scale, b.wide_scale, b.min) = (half(0), wide_scale(block), zero_of(ty, block) as u16);
        }
    }
    b
}

/// A digit of a codebook's entry.
fn digit(entry: u64, k: usize) -> u8 {
    (entry >> (8 * k)) as u8
}

fn put_fields(group: &mut [u8], n: u8, row: usize, codes: &[u8]) {
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

fn put_planes(group: &mut [u8], n: u8, row: usize, codes: &[u8]) {
    for (k, code) in codes.iter().enumerate() {
        for plane in 0..n as usize {
            group[(k / 8 * n as usize + plane) * TILE + row] |= (code >> plane & 1) << (k % 8);
        }
    }
}

fn put_trits(group: &mut [u8], indexed: bool, row: usize, codes: &[u8]) {
    for (word, codes) in codes.chunks(20).enumerate() {
        for (j, byte) in group[(word * FIELD_TILE + row) * 4..][..4].iter_mut().enumerate() {
            *byte = encode(indexed, std::array::from_fn(|n| codes.get(4 * n + j).copied().unwrap_or(0)));
        }
    }
}

fn put(form: PackedForm, group: &mut [u8], row: usize, block: &Block) {
    let (subs, rest) = group.split_at_mut(form.scale.sub_bytes(form.tile_rows()));
    let (codes, scales) = rest.split_at_mut(form.group_code_bytes());
    let from = &block.codes[..form.group as usize];
    match form.codes {
        Codes::Planes(n) => put_planes(codes, n, row, from),
        Codes::Fields(n) => put_fields(codes, n, row, from),
        Codes::Trits => put_trits(codes, false, row, from),
        Codes::IndexedTrits => put_trits(codes, true, row, from),
        Codes::Float(_) => unreachable!("float weights have no codes"),
    }
    scales::put(form, subs, scales, row, block);
}

fn pack_row(ty: SourceType, form: PackedForm, src: &[u8], tile: &mut [u8], row: usize) {
    if let Codes::Float(_) = form.codes {
        let size = ty.block_bytes();
        for (value, column) in src.chunks_exact(size).zip(tile.chunks_exact_mut(form.group_code_bytes())) {
            column[row * size..][..size].copy_from_slice(value);
        }
        return;
    }
    for (block, group) in src.chunks_exact(ty.block_bytes()).zip(tile.chunks_exact_mut(form.group_tile_bytes())) {
        put(form, group, row, &read(ty, block));
    }
}

#[test]
fn packed_bytes_are_the_definitions() {
    let mut state = 3u64;
    let mut byte = move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 56) as u8
    };
    let pool = Pool::new(3);
    for ty in SourceType::ALL {
        for (rows, blocks) in [(1, 1), (15, 3), (17, 2), (33, 9), (70, 40)] {
            let cols = blocks * ty.block_elements();
            let mut src = vec![0; ty.tensor_bytes(rows, cols).unwrap()];
            src.fill_with(&mut byte);
            for form in PackedForm::candidates(ty) {
                let packed = pack_as(form, ty, &src, rows, cols, &pool).unwrap();
                let row_bytes = ty.row_bytes(cols).unwrap();
                for index in 0..packed.tiles() {
                    let mut tile = vec![0; packed.tile(index).len()];
                    let first = index * form.tile_rows();
                    for row in first..rows.min(first + form.tile_rows()) {
                        pack_row(ty, form, &src[row * row_bytes..][..row_bytes], &mut tile, row - first);
                    }
                    assert!(tile == packed.tile(index), "{ty:?} as {form:?}, {rows} × {cols}, tile {index}");
                }
            }
        }
    }
}
