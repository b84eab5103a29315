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

/// Which digit of its byte k is.
pub(crate) fn digit(k: usize) -> usize {
    k % 20 / 4
}

#[inline(always)]
fn at(row: usize, k: usize) -> usize {
    (k / 20 * TILE + row) * 4 + k % 4
}

/// The byte that holds k.
pub(crate) fn byte(group: &[u8], row: usize, k: usize) -> u8 {
    group[at(row, k)]
}

/// Digit n of a byte.
pub(crate) fn trit(byte: u8, n: usize) -> i32 {
    let mut rest = byte;
    for _ in 0..n {
        rest = rest.wrapping_mul(3);
    }
    (rest as i32 * 3) >> 8
}

fn encode(digits: [u8; 5]) -> u8 {
    let value = digits.iter().fold(0u32, |value, &digit| value * 3 + digit as u32);
    (value * 256).div_ceil(243) as u8
}

pub(super) fn put(group: &mut [u8], row: usize, codes: &[u8]) {
    for start in (0..codes.len()).step_by(20) {
        for j in 0..4 {
            let digits = std::array::from_fn(|n| codes.get(start + 4 * n + j).copied().unwrap_or(0));
            group[at(row, start + j)] = encode(digits);
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
            let byte = encode(digits);
            for (n, &digit) in digits.iter().enumerate() {
                assert_eq!(trit(byte, n), digit as i32, "value {v} digit {n}");
            }
        }
    }
}
