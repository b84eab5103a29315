//! Scales in the stream: sub-scales before the codes of a group; d, then m (or dmin) of every row behind them.
//!
//! Sub-scales come in words of 4 bytes per row, rows in order. Subs 4t … 4t + 3 are quad t; within a quad, byte `BYTE_OF[i]`
//! is sub i's, so that bytes 0 and 2 (as 16-bit halves) are neighbours, and so are 1 and 3. Their words:
//! - `Sub4Min`: word t has s in the low and m in the high nibbles of quad t.
//! - `Sub6Min`: words 0 and 1 the same with the low four bits of s and m; word 2 the upper two bits, s then m, quad 0 in its
//!   low nibbles and quad 1 in its high ones.
//! - `Sub6`: words 0 and 1 the low four bits of quads 2t (low nibbles) and 2t + 1 (high ones); word 2 the upper two bits of quad
//!   t at bit 2t.
//! - `Sub6Of32`: word 0 the low four bits of quads 0 and 1, word 1 the upper two bits, likewise.
//! - `Sub8`: word t has the bytes of quad t.
//!
//! Zero points follow d: four bits of every row, of even rows in the low nibbles; of 8 bits then the upper four likewise.

use super::source::Block;
use super::{PackedForm, ScaleKind, MAX_SUBS};
use crate::ops::f16_to_f32;
use crate::pack::source::e8m0_half;

/// The byte of a quad's word that sub i of the quad has.
const BYTE_OF: [usize; 4] = [0, 2, 1, 3];

impl ScaleKind {
    /// Weights that share a sub-scale, or `group` if there are no subs.
    pub(crate) fn sub(self, group: usize) -> usize {
        match self {
            ScaleKind::Sub4Min | ScaleKind::Sub6 | ScaleKind::Sub8 => 16,
            ScaleKind::Sub6Min | ScaleKind::Sub6Of32 => 32,
            _ => group,
        }
    }

    /// Words of sub-scales.
    pub(crate) fn words(self) -> usize {
        match self {
            ScaleKind::Sub4Min | ScaleKind::Sub8 => 4,
            ScaleKind::Sub6 | ScaleKind::Sub6Min => 3,
            ScaleKind::Sub6Of32 => 2,
            _ => 0,
        }
    }

    /// What is stored of a sub-scale is this more than its value.
    pub(crate) fn bias(self) -> i32 {
        match self {
            ScaleKind::Sub6 | ScaleKind::Sub6Of32 => 32,
            ScaleKind::Sub8 => 128,
            _ => 0,
        }
    }

    fn has_min(self) -> bool {
        matches!(self, ScaleKind::F16Min | ScaleKind::Sub4Min | ScaleKind::Sub6Min)
    }

    /// Bytes of d of kinds that zero points follow.
    fn d_bytes(self) -> usize {
        if matches!(self, ScaleKind::F32Zero4 | ScaleKind::F32Zero8) {
            4
        } else {
            2
        }
    }

    /// Bytes of the sub-scales of `rows` rows.
    pub(crate) fn sub_bytes(self, rows: usize) -> usize {
        4 * rows * self.words()
    }

    /// Bytes of all scales of a group of `rows` rows.
    pub(crate) fn bytes(self, rows: usize) -> usize {
        match self {
            ScaleKind::None | ScaleKind::Tensor => 0,
            ScaleKind::E8M0 => rows,
            ScaleKind::F16Zero4 | ScaleKind::F32Zero4 => self.d_bytes() * rows + rows / 2,
            ScaleKind::F16Zero8 | ScaleKind::F32Zero8 => (self.d_bytes() + 1) * rows,
            _ => self.sub_bytes(rows) + rows * if self.has_min() { 4 } else { 2 },
        }
    }
}

/// What turns a row's codes of a group into weights.
pub(crate) struct RowScales {
    /// Times the values' unit.
    pub d: f32,
    /// m or dmin; 0 if the kind has none.
    pub min: f32,
    /// What is taken off every value; 0 if the kind has none.
    pub zero: i32,
    /// s and m of the subs, `bias` taken off.
    pub sub_scales: [i32; MAX_SUBS],
    pub sub_mins: [i32; MAX_SUBS],
}

/// Byte `BYTE_OF[i]` of word t of a row.
fn byte(rows: usize, row: usize, t: usize, i: usize) -> usize {
    (t * rows + row) * 4 + BYTE_OF[i]
}

/// Writes a row's scales into the zeroed regions before and behind a group's codes.
pub(super) fn put(form: PackedForm, subs: &mut [u8], scales: &mut [u8], row: usize, block: &Block) {
    let (kind, rows) = (form.scale, form.tile_rows());
    for j in 0..form.group as usize / kind.sub(form.group as usize) {
        let (t, i) = (j / 4, j % 4);
        let (s, m) = (block.sub_scales[j], block.sub_mins[j]);
        match kind {
            ScaleKind::Sub4Min => subs[byte(rows, row, t, i)] = s | m << 4,
            ScaleKind::Sub6Min => {
                subs[byte(rows, row, t, i)] = s & 15 | m << 4;
                subs[byte(rows, row, 2, i)] |= (s >> 4 | m >> 4 << 2) << (4 * t);
            }
            ScaleKind::Sub6 => {
                subs[byte(rows, row, t / 2, i)] |= (s & 15) << (4 * (t % 2));
                subs[byte(rows, row, 2, i)] |= s >> 4 << (2 * t);
            }
            ScaleKind::Sub6Of32 => {
                subs[byte(rows, row, 0, i)] |= (s & 15) << (4 * t);
                subs[byte(rows, row, 1, i)] |= s >> 4 << (2 * t);
            }
            ScaleKind::Sub8 => subs[byte(rows, row, t, i)] = s,
            _ => {}
        }
    }
    match kind {
        ScaleKind::None | ScaleKind::Tensor => {}
        ScaleKind::E8M0 => scales[row] = block.scale as u8,
        ScaleKind::F16Zero4 | ScaleKind::F16Zero8 | ScaleKind::F32Zero4 | ScaleKind::F32Zero8 => {
            match kind.d_bytes() {
                4 => scales[4 * row..][..4].copy_from_slice(&block.wide_scale.to_le_bytes()),
                _ => scales[2 * row..][..2].copy_from_slice(&block.scale.to_le_bytes()),
            }
            let (at, shift) = (kind.d_bytes() * rows + row / 2, row % 2 * 4);
            scales[at] |= (block.min as u8 & 15) << shift;
            if matches!(kind, ScaleKind::F16Zero8 | ScaleKind::F32Zero8) {
                scales[at + rows / 2] |= (block.min as u8 >> 4) << shift;
            }
        }
        _ => {
            scales[2 * row..][..2].copy_from_slice(&block.scale.to_le_bytes());
            if kind.has_min() {
                scales[2 * (rows + row)..][..2].copy_from_slice(&block.min.to_le_bytes());
            }
        }
    }
}

/// A row's scales; `tensor` is the matrix's own.
pub(super) fn get(form: PackedForm, subs: &[u8], scales: &[u8], row: usize, tensor: f32) -> RowScales {
    let (kind, rows) = (form.scale, form.tile_rows());
    let mut r = RowScales { d: tensor, min: 0.0, zero: 0, sub_scales: [0; MAX_SUBS], sub_mins: [0; MAX_SUBS] };
    for j in 0..form.group as usize / kind.sub(form.group as usize) {
        let (t, i) = (j / 4, j % 4);
        let at = |word: usize| subs[byte(rows, row, word, i)] as i32;
        (r.sub_scales[j], r.sub_mins[j]) = match kind {
            ScaleKind::Sub4Min => (at(t) & 15, at(t) >> 4),
            ScaleKind::Sub6Min => {
                let high = at(2) >> (4 * t);
                (at(t) & 15 | (high & 3) << 4, at(t) >> 4 | (high >> 2 & 3) << 4)
            }
            ScaleKind::Sub6 => (at(t / 2) >> (4 * (t % 2)) & 15 | (at(2) >> (2 * t) & 3) << 4, 0),
            ScaleKind::Sub6Of32 => (at(0) >> (4 * t) & 15 | (at(1) >> (2 * t) & 3) << 4, 0),
            ScaleKind::Sub8 => (at(t), 0),
            _ => (1, 0),
        };
        r.sub_scales[j] -= kind.bias();
    }
    let half = |at: usize| f16_to_f32(u16::from_le_bytes([scales[at], scales[at + 1]]));
    match kind {
        ScaleKind::None | ScaleKind::Tensor => {}
        ScaleKind::E8M0 => r.d = e8m0_half(scales[row]),
        ScaleKind::F16Zero4 | ScaleKind::F16Zero8 | ScaleKind::F32Zero4 | ScaleKind::F32Zero8 => {
            r.d = match kind.d_bytes() {
                4 => f32::from_le_bytes(scales[4 * row..][..4].try_into().expect("4 bytes")),
                _ => half(2 * row),
            };
            let nibble = |at: usize| (scales[at + row / 2] >> (row % 2 * 4) & 15) as i32;
            let zeros = kind.d_bytes() * rows;
            r.zero = nibble(zeros);
            if matches!(kind, ScaleKind::F16Zero8 | ScaleKind::F32Zero8) {
                r.zero = (r.zero | nibble(zeros + rows / 2) << 4) - 128;
            }
        }
        _ => {
            r.d = half(2 * row) * form.values.unit();
            if kind.has_min() {
                r.min = half(2 * (rows + row));
            }
        }
    }
    r
}
