//! `Codes::Trits` and `Codes::IndexedTrits`: base-3 digits, five a byte, in words of 4 bytes (20 k) per row, rows in order.
//!
//! Digit n of the four bytes of word w are the codes at k = 20·w + 4·n + 0..4, so that a digit of a word meets four
//! neighbouring activations. Digits beyond the group's last k are 0.
//!
//! `Trits` keeps the digits as a binary fraction: digits d0…d4 make v = Σ d_n·3^(4−n), stored as ceil(256·v / 243);
//! multiplying by 3 carries out the first digit and leaves the fraction of the rest (as in ggml's TQ1_0).
//!
//! `IndexedTrits` is for lookup in tables of 64 bytes: with c = d0 + 3·d1 + 9·d2 + 27·d3 (0 … 80), c < 64 is stored as c | d4 << 6,
//! so that the upper two bits are the last digit as it stands. Where both are set, which that leaves, the lower six are an
//! index of the others: (c − 64) + 17·d4 (0 … 50).

use super::FIELD_TILE;

/// Words of a row in a group.
pub(crate) fn words(group: usize) -> usize {
    group.div_ceil(20)
}

/// Combinations of the first four digits that stand beside the last digit.
const BESIDE: u8 = 64;
/// How many others there are.
const OTHERS: u8 = 81 - BESIDE;
/// Their upper bits: their bytes are the largest.
pub(crate) const MARK: u8 = 3 << 6;

pub(super) const fn encode(indexed: bool, d: [u8; 5]) -> u8 {
    if !indexed {
        let value = (((d[0] as u32 * 3 + d[1] as u32) * 3 + d[2] as u32) * 3 + d[3] as u32) * 3 + d[4] as u32;
        return (value * 256).div_ceil(243) as u8;
    }
    let c = d[0] + 3 * d[1] + 9 * d[2] + 27 * d[3];
    if c < BESIDE {
        d[4] << 6 | c
    } else {
        MARK | (c - BESIDE + OTHERS * d[4])
    }
}

fn decode(indexed: bool, byte: u8) -> [u8; 5] {
    if !indexed {
        let mut rest = byte;
        return std::array::from_fn(|_| {
            let digit = (rest as u16 * 3 >> 8) as u8;
            rest = rest.wrapping_mul(3);
            digit
        });
    }
    let index = byte % BESIDE;
    let (c, last) = if byte < MARK { (index, byte >> 6) } else { (BESIDE + index % OTHERS, index / OTHERS) };
    [c % 3, c / 3 % 3, c / 9 % 3, c / 27 % 3, last]
}

/// For `IndexedTrits`: by a byte's lower six bits the first four digits, two bits each from the lowest on, if its upper two are
/// the last digit (0) and if both are set (1). Bytes that `encode` never makes have anything.
#[cfg(target_arch = "x86_64")]
pub(crate) static FIRST_DIGITS: [[u8; 64]; 2] = {
    let mut tables = [[0; 64]; 2];
    let mut index = 0;
    while index < 64 {
        let of = [index as u8, BESIDE + index as u8 % OTHERS];
        let mut i = 0;
        while i < 2 {
            let c = of[i];
            tables[i][index] = c % 3 | c / 3 % 3 << 2 | c / 9 % 3 << 4 | c / 27 % 3 << 6;
            i += 1;
        }
        index += 1;
    }
    tables
};

/// For `IndexedTrits`: by the lower six bits of a byte whose upper two are set, the last digit where those would have it.
#[cfg(target_arch = "x86_64")]
pub(crate) static LAST_DIGIT: [u8; 64] = {
    let mut table = [0; 64];
    let mut index = 0;
    while index < 64 {
        table[index] = (index as u8 / OTHERS) << 6;
        index += 1;
    }
    table
};

/// `encode` of every five digits, by Σ d_n·3^(4−n) as a fraction and by Σ d_n·3^n as an index.
static ENCODED: [[u8; 243]; 2] = {
    let mut tables = [[0; 243]; 2];
    let mut v = 0;
    while v < 243 {
        let d = [(v / 81) as u8, (v / 27 % 3) as u8, (v / 9 % 3) as u8, (v / 3 % 3) as u8, (v % 3) as u8];
        tables[0][v] = encode(false, d);
        tables[1][v] = encode(true, [d[4], d[3], d[2], d[1], d[0]]);
        v += 1;
    }
    tables
};

pub(super) fn put(group: &mut [u8], indexed: bool, row: usize, codes: &[u8]) {
    let table = &ENCODED[indexed as usize];
    for (words, codes) in group.chunks_exact_mut(4 * FIELD_TILE).zip(codes.chunks(20)) {
        // Digit n of the word's four bytes; no value exceeds its byte.
        let mut digits = [0u32; 5];
        for (digit, codes) in digits.iter_mut().zip(codes.chunks_exact(4)) {
            *digit = u32::from_le_bytes(codes.try_into().expect("4 codes"));
        }
        if indexed {
            digits.reverse();
        }
        let values = digits.into_iter().fold(0, |values, digit| values * 3 + digit).to_le_bytes();
        words[4 * row..][..4].copy_from_slice(&values.map(|v| table[v as usize]));
    }
}

/// The codes of a row of a group.
pub(super) fn get(group: &[u8], indexed: bool, row: usize, codes: &mut [i32]) {
    for (word, codes) in codes.chunks_mut(20).enumerate() {
        for (j, &byte) in group[(word * FIELD_TILE + row) * 4..][..4].iter().enumerate() {
            let digits = decode(indexed, byte);
            for (code, digit) in codes[j..].iter_mut().step_by(4).zip(digits) {
                *code = digit as i32;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_five_digits_survive_a_byte() {
        for v in 0..243u32 {
            let digits = [v / 81, v / 27 % 3, v / 9 % 3, v / 3 % 3, v % 3].map(|d| d as u8);
            for indexed in [false, true] {
                assert_eq!(decode(indexed, encode(indexed, digits)), digits, "{digits:?} {indexed}");
            }
        }
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn tables_have_the_digits() {
        for v in 0..243u32 {
            let digits = [v / 81, v / 27 % 3, v / 9 % 3, v / 3 % 3, v % 3].map(|d| d as u8);
            let byte = encode(true, digits);
            let (index, is_marked) = ((byte % 64) as usize, byte >= MARK);
            let four = FIRST_DIGITS[is_marked as usize][index];
            assert_eq!([four & 3, four >> 2 & 3, four >> 4 & 3, four >> 6], digits[..4], "{digits:?}");
            assert_eq!(if is_marked { LAST_DIGIT[index] } else { byte } >> 6, digits[4], "{digits:?}");
        }
    }
}
