//! Ternary matrices that files do not keep as blocks, made into I2_S.

use super::source::{float, SourceType};
use super::FloatKind;
use crate::error::{Error, Result};

/// Weights of an I2_S block.
const BLOCK: usize = 128;

/// Four rows a byte, of `rows` × `cols`: code q of row r of quarter i (`rows`/4 each) is at bits 2i of row r's byte, and worth
/// d·(q − 1). `transformers` calls it BitNet's packing.
#[derive(Debug)]
pub struct Quarters<'a> {
    pub rows: usize,
    pub cols: usize,
    pub codes: &'a [u8],
    pub scale: f32,
}

impl Quarters<'_> {
    /// The rows that `rows` names, as an I2_S tensor.
    pub fn blocks(&self, rows: &[usize]) -> Result<Vec<u8>> {
        let (quarter, cols) = (self.rows / 4, self.cols);
        if self.rows % 4 != 0 || quarter.checked_mul(cols) != Some(self.codes.len()) {
            let len = self.codes.len();
            return Err(Error::data(format!("{len} bytes are not {} × {cols} weights, four rows a byte", self.rows)));
        }
        i2_s(rows.len(), cols, self.scale, |i, k| {
            let row = rows[i];
            self.codes[row % quarter * cols + k] >> (2 * (row / quarter)) & 3
        })
    }
}

/// Float weights rounded as BitNet's layers round them while they run ("online"): s = 1/mean|w| of the whole matrix, then
/// round(w·s) within −1 … 1, worth 1/s.
pub fn ternarised(kind: FloatKind, src: &[u8], cols: usize, rows: &[usize]) -> Result<Vec<u8>> {
    let size = if kind == FloatKind::F32 { 4 } else { 2 };
    let count = src.len() / size;
    if cols == 0 || count == 0 || count % cols != 0 || rows.iter().any(|&row| row >= count / cols) {
        return Err(Error::data(format!("{} bytes are not rows of {cols} weights", src.len())));
    }
    let sum: f64 = src.chunks_exact(size).map(|w| float(kind, w).abs() as f64).sum();
    let scale = 1.0 / ((sum / count as f64) as f32).max(1e-5);
    i2_s(rows.len(), cols, 1.0 / scale, |i, k| {
        let w = float(kind, &src[(rows[i] * cols + k) * size..][..size]);
        ((w * scale).round_ties_even().clamp(-1.0, 1.0) as i8 + 1) as u8
    })
}

/// A tensor of the codes that `code(row, column)` gives.
fn i2_s(rows: usize, cols: usize, scale: f32, code: impl Fn(usize, usize) -> u8) -> Result<Vec<u8>> {
    let ty = SourceType::I2_S;
    let (row_bytes, len) = (ty.row_bytes(cols)?, ty.tensor_bytes(rows, cols)?);
    let mut out = vec![0; len];
    for (row, blocks) in out.chunks_exact_mut(row_bytes).take(rows).enumerate() {
        for (b, block) in blocks.chunks_exact_mut(ty.block_bytes()).enumerate() {
            for (j, byte) in block.iter_mut().enumerate() {
                *byte = (0..4).fold(0, |byte, n| byte << 2 | code(row, b * BLOCK + 32 * n + j));
            }
        }
    }
    let at = len - ty.trailer_bytes();
    out[at..at + 4].copy_from_slice(&scale.to_le_bytes());
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pack::dequantize;

    fn weights(bytes: &[u8], count: usize) -> Vec<f32> {
        let mut out = vec![0.0; count];
        dequantize(SourceType::I2_S, bytes, &mut out).unwrap();
        out
    }

    #[test]
    fn quarters_are_unpacked_as_transformers_does() {
        // Its docstring's example, the columns repeated: [[0b10100001, 0b00011000], [0b10010000, 0b00001010]].
        let row = |a: u8, b: u8| [a, b].repeat(64);
        let codes = [row(0b1010_0001, 0b0001_1000), row(0b1001_0000, 0b0000_1010)].concat();
        let quarters = Quarters { rows: 8, cols: 128, codes: &codes, scale: 0.5 };
        let all = [[0, -1], [-1, 1], [-1, 1], [-1, 1], [1, 0], [0, -1], [1, -1], [1, -1]];
        for rows in [(0..8).collect::<Vec<_>>(), vec![5, 0, 7]] {
            let out = weights(&quarters.blocks(&rows).unwrap(), rows.len() * 128);
            for (i, &row) in rows.iter().enumerate() {
                let expected: Vec<f32> = all[row].map(|w| w as f32 * 0.5).repeat(64);
                assert_eq!(out[i * 128..][..128], expected, "row {row}");
            }
        }
        assert!(Quarters { rows: 6, cols: 128, codes: &codes, scale: 1.0 }.blocks(&[0]).is_err());
        assert!(Quarters { rows: 8, cols: 64, codes: &codes[..128], scale: 1.0 }.blocks(&[0]).is_err());
    }

    #[test]
    fn floats_become_the_nearest_of_three() {
        let w: Vec<f32> = (0..256).map(|i| ((i * 37 % 101) as f32 - 50.0) / 40.0).collect();
        let src: Vec<u8> = w.iter().flat_map(|w| w.to_le_bytes()).collect();
        let mean = w.iter().map(|w| w.abs() as f64).sum::<f64>() / 256.0;
        let out = weights(&ternarised(FloatKind::F32, &src, 128, &[1, 0]).unwrap(), 256);
        for (i, &out) in out.iter().enumerate() {
            let w = w[(i + 128) % 256] as f64;
            let expected = if w.abs() < 0.5 * mean { 0.0 } else { mean.copysign(w) };
            assert!((out as f64 - expected).abs() < 1e-6 * mean, "{out} for {w}, mean {mean}");
        }
        assert!(ternarised(FloatKind::F32, &src, 128, &[2]).is_err());
        assert!(ternarised(FloatKind::F16, &src[..2], 128, &[]).is_err());
    }
}
