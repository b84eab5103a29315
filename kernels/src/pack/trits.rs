//! `Codes::Trits5`: base-3 digits, five a byte, in words of 4 bytes (20 k) per row, rows in order.
//!
//! Digit n of the four bytes of word w are the codes at k = 20·w + 4·n + 0..4, so that a digit of a word meets four
//! neighbouring activations. A byte holds the digits as a binary fraction: digits d0…d4 make v = Σ d_n·3^(4−n), stored as
//! ceil(256·v / 243); multiplying by 3 carries out the first digit and leaves the fraction of the rest (as in ggml's
//! TQ1_0). Digits beyond the group's last k are 0.

use super::TILE;

/// Words of a row in a group.
pub(super) fn words(group: usize) -> usize {
    group.div_ceil(20)
}

/// A byte's first digit, and the byte of the rest.
fn first_digit(byte: u8) -> (i32, u8) {
    ((byte as i32 * 3) >> 8, byte.wrapping_mul(3))
}

fn encode(digits: [u8; 5]) -> u8 {
    let value = digits.iter().fold(0u32, |value, &digit| value * 3 + digit as u32);
    (value * 256).div_ceil(243) as u8
}

pub(super) fn put(group: &mut [u8], row: usize, codes: &[u8]) {
    for (word, codes) in codes.chunks(20).enumerate() {
        for (j, byte) in group[(word * TILE + row) * 4..][..4].iter_mut().enumerate() {
            *byte = encode(std::array::from_fn(|n| codes.get(4 * n + j).copied().unwrap_or(0)));
        }
    }
}

/// The codes of a row of a group.
pub(super) fn get(group: &[u8], row: usize, codes: &mut [i32]) {
    for (word, codes) in codes.chunks_mut(20).enumerate() {
        for (j, &byte) in group[(word * TILE + row) * 4..][..4].iter().enumerate() {
            let mut rest = byte;
            for code in codes[j..].iter_mut().step_by(4) {
                (*code, rest) = first_digit(rest);
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
            let mut rest = encode(digits);
            for (n, &digit) in digits.iter().enumerate() {
                let first;
                (first, rest) = first_digit(rest);
                assert_eq!(first, digit as i32, "value {v} digit {n}");
            }
        }
    }
}
