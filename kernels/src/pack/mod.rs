//! Weights: source blocks as the model file has them, and the canonical packed form that kernels read.
//!
//! A packed matrix is a sequence of tiles; a tile holds `tile_rows` whole rows as one sequential stream of groups along k.
//! A group holds the codes of all rows interleaved as its `Codes` says (`bits`, `int8`, `trits`), then one scale per row.
//! Rows beyond the matrix in its last tile have zero codes and zero scales. Every source type converts without loss:
//! `unpack_row` gives the bits that `dequantize` gives.

mod bits;
mod buffer;
mod int8;
mod source;
mod trits;

use crate::error::{Error, Result};
use crate::ops::f16_to_f32;
use crate::pool::Pool;
pub(crate) use buffer::Buffer;
pub use source::{dequantize, SourceType};
use std::fmt;

/// Rows in a tile of low-bit weights.
pub(crate) const TILE: usize = 32;
/// The largest group of any form.
pub(crate) const MAX_GROUP: usize = 256;
/// Rows in a tile of float weights.
pub(crate) const FLOAT_TILE: usize = 16;

/// Float weights, kept as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FloatKind {
    F32,
    F16,
    Bf16,
}

/// How the codes of a group are laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Codes {
    /// No codes and no groups: k-major, `FLOAT_TILE` rows side by side.
    Float(FloatKind),
    /// Unsigned codes of n bits as bit planes, for table lookup (`bits`).
    Bits(u8),
    /// Signed bytes, four k of a row side by side (`int8`).
    Int8,
    /// Base-3 digits, five a byte (`trits`).
    Trits5,
}

/// What turns a group's codes into weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ScaleKind {
    /// Float weights have none.
    None,
    /// weight = f16 scale · (code + offset).
    F16,
}

/// The layout of a packed matrix: all that a kernel is chosen by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PackedForm {
    pub codes: Codes,
    /// Weights that share a scale, along k; 1 for floats.
    pub group: u16,
    /// Added to a code before scaling.
    pub offset: i8,
    pub scale: ScaleKind,
    /// Activations that share a scale; 0 if they stay f32. A multiple of `group`.
    pub act_group: u16,
}

impl PackedForm {
    pub fn of(ty: SourceType) -> PackedForm {
        let float =
            |kind| PackedForm { codes: Codes::Float(kind), group: 1, offset: 0, scale: ScaleKind::None, act_group: 0 };
        let grouped =
            |codes, group, offset| PackedForm { codes, group, offset, scale: ScaleKind::F16, act_group: group };
        match ty {
            SourceType::F32 => float(FloatKind::F32),
            SourceType::F16 => float(FloatKind::F16),
            SourceType::BF16 => float(FloatKind::Bf16),
            SourceType::Q4_0 => grouped(Codes::Bits(4), 32, -8),
            SourceType::Q8_0 => grouped(Codes::Int8, 32, 0),
            SourceType::TQ1_0 => grouped(Codes::Trits5, 256, -1),
            SourceType::TQ2_0 => grouped(Codes::Bits(2), 256, -1),
        }
    }

    /// Rows interleaved in a tile.
    pub fn tile_rows(self) -> usize {
        match self.codes {
            Codes::Float(_) => FLOAT_TILE,
            _ => TILE,
        }
    }

    /// Bytes of one group's codes, for all rows of a tile.
    pub(crate) fn group_code_bytes(self) -> usize {
        match self.codes {
            Codes::Float(FloatKind::F32) => 4 * FLOAT_TILE,
            Codes::Float(FloatKind::F16 | FloatKind::Bf16) => 2 * FLOAT_TILE,
            Codes::Bits(n) => self.group as usize / 8 * n as usize * TILE,
            Codes::Int8 => self.group as usize * TILE,
            Codes::Trits5 => trits::words(self.group as usize) * 4 * TILE,
        }
    }

    /// Bytes of one group for all rows of a tile.
    pub(crate) fn group_tile_bytes(self) -> usize {
        self.group_code_bytes()
            + match self.scale {
                ScaleKind::None => 0,
                ScaleKind::F16 => 2 * TILE,
            }
    }

    /// Bytes of a tile of `cols` columns, a multiple of the group.
    fn tile_bytes(self, cols: usize) -> Option<usize> {
        (cols / self.group as usize).checked_mul(self.group_tile_bytes())
    }

    /// The scale of a row of a tile's group.
    pub(crate) fn scale_of(self, group: &[u8], row: usize) -> f32 {
        let at = self.group_code_bytes() + 2 * row;
        f16_to_f32(u16::from_le_bytes([group[at], group[at + 1]]))
    }

    /// Writes one row's codes (as `source` gives them: unsigned for `Bits` and `Trits5`, two's complement for `Int8`) and
    /// scale into a zeroed group of a tile.
    fn put(self, group: &mut [u8], row: usize, codes: &[u8], scale: u16) {
        match self.codes {
            Codes::Bits(n) => bits::put(group, n, row, codes),
            Codes::Int8 => int8::put(group, row, codes),
            Codes::Trits5 => trits::put(group, row, codes),
            Codes::Float(_) => unreachable!("float weights have no codes"),
        }
        let at = self.group_code_bytes() + 2 * row;
        group[at..at + 2].copy_from_slice(&scale.to_le_bytes());
    }

    /// What a row of a tile's group is worth before scaling: code + offset of every weight.
    pub(crate) fn get(self, group: &[u8], row: usize, values: &mut [i32]) {
        match self.codes {
            Codes::Bits(n) => bits::get(group, n, row, values),
            Codes::Int8 => int8::get(group, row, values),
            Codes::Trits5 => trits::get(group, row, values),
            Codes::Float(_) => unreachable!("float weights have no codes"),
        }
        values.iter_mut().for_each(|value| *value += self.offset as i32);
    }
}

/// A weight matrix in the packed form, in memory of its own.
pub struct PackedMatrix {
    pub rows: usize,
    pub cols: usize,
    pub form: PackedForm,
    tile_bytes: usize,
    data: Buffer,
}

impl fmt::Debug for PackedMatrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PackedMatrix({} × {}, {:?})", self.rows, self.cols, self.form)
    }
}

impl PackedMatrix {
    /// Bytes that a product reads.
    pub fn bytes(&self) -> usize {
        self.data.len()
    }

    pub fn tiles(&self) -> usize {
        self.rows.div_ceil(self.form.tile_rows())
    }

    pub(crate) fn tile(&self, index: usize) -> &[u8] {
        &self.data[index * self.tile_bytes..][..self.tile_bytes]
    }

    /// The weights of a row, with the bits that `dequantize` gives. Panics if `row` or the length of `out` is wrong.
    pub fn unpack_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows && out.len() == self.cols, "unpack_row: row {row} or length {}", out.len());
        let form = self.form;
        let tile = self.tile(row / form.tile_rows());
        let row = row % form.tile_rows();
        if let Codes::Float(kind) = form.codes {
            let size = form.group_code_bytes() / FLOAT_TILE;
            for (value, column) in out.iter_mut().zip(tile.chunks_exact(form.group_code_bytes())) {
                *value = source::float(kind, &column[row * size..][..size]);
            }
            return;
        }
        let mut codes = [0i32; MAX_GROUP];
        let codes = &mut codes[..form.group as usize];
        let groups = tile.chunks_exact(form.group_tile_bytes());
        for (values, group) in out.chunks_exact_mut(form.group as usize).zip(groups) {
            let scale = form.scale_of(group, row);
            form.get(group, row, codes);
            for (value, &code) in values.iter_mut().zip(&*codes) {
                *value = scale * code as f32;
            }
        }
    }
}

/// Packs a matrix given as source rows, each of `ty.row_bytes(cols)` bytes.
pub fn pack(ty: SourceType, src: &[u8], rows: usize, cols: usize, pool: &Pool) -> Result<PackedMatrix> {
    let row_bytes = ty.row_bytes(cols)?;
    if rows == 0 || rows.checked_mul(row_bytes) != Some(src.len()) {
        return Err(Error::argument(format!("{rows} × {cols} {ty:?} weights do not take {} bytes", src.len())));
    }
    let form = PackedForm::of(ty);
    let tiles = rows.div_ceil(form.tile_rows());
    let too_large = || Error::exhausted(format!("{rows} × {cols} weights are too large to pack"));
    let tile_bytes = form.tile_bytes(cols).ok_or_else(too_large)?;
    let mut data = Buffer::zeroed(tiles.checked_mul(tile_bytes).ok_or_else(too_large)?)?;
    data.par_chunks(pool, tile_bytes, |index, tile| {
        let first = index * form.tile_rows();
        for row in first..rows.min(first + form.tile_rows()) {
            pack_row(ty, form, &src[row * row_bytes..][..row_bytes], tile, row - first);
        }
    });
    Ok(PackedMatrix { rows, cols, form, tile_bytes, data })
}

fn pack_row(ty: SourceType, form: PackedForm, src: &[u8], tile: &mut [u8], row: usize) {
    if let Codes::Float(_) = form.codes {
        let size = ty.block_bytes();
        for (value, column) in src.chunks_exact(size).zip(tile.chunks_exact_mut(form.group_code_bytes())) {
            column[row * size..][..size].copy_from_slice(value);
        }
        return;
    }
    let mut codes = [0u8; MAX_GROUP];
    let codes = &mut codes[..form.group as usize];
    for (block, group) in src.chunks_exact(ty.block_bytes()).zip(tile.chunks_exact_mut(form.group_tile_bytes())) {
        let scale = source::codes(ty, block, codes);
        form.put(group, row, codes, scale);
    }
}

#[cfg(test)]
impl PackedMatrix {
    /// A matrix of any form: codes row-major, one scale (f16 bits) for all.
    pub fn from_codes(form: PackedForm, rows: usize, cols: usize, codes: &[u8], scale: u16) -> Self {
        let tile_bytes = form.tile_bytes(cols).unwrap();
        let mut data = Buffer::zeroed(rows.div_ceil(TILE) * tile_bytes).unwrap();
        data.par_chunks(&Pool::new(1), tile_bytes, |index, tile| {
            let first = index * TILE;
            for row in first..rows.min(first + TILE) {
                let groups = tile.chunks_exact_mut(form.group_tile_bytes());
                for (group, codes) in groups.zip(codes[row * cols..][..cols].chunks_exact(form.group as usize)) {
                    form.put(group, row - first, codes, scale);
                }
            }
        });
        PackedMatrix { rows, cols, form, tile_bytes, data }
    }
}
