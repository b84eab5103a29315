//! Weights: source blocks as the model file has them, and the canonical packed form that kernels read.
//!
//! A packed matrix is a sequence of tiles; a tile holds `tile_rows` whole rows as one sequential stream of groups along k.
//! A group holds sub-scales, if it has any, the codes of all rows interleaved as its `Codes` says (`planes`, `fields`,
//! `trits`), then the scales of the rows (`scales`): the order in which kernels want them. Rows beyond the matrix in its last
//! tile have zero codes and zero scales. Every source type converts without loss, to each of its candidate forms: `unpack_row`
//! gives the bits that `dequantize` gives.

mod buffer;
mod codebooks;
pub(crate) mod fields;
pub(crate) mod grouped;
mod planes;
#[cfg(test)]
mod reference;
pub(crate) mod scales;
mod source;
pub(crate) mod ternary;
pub(crate) mod trits;

use crate::bandwidth::Reading;
use crate::dispatch::Kernels;
use crate::error::{Error, Result};
use crate::ops::f16_to_f32;
use crate::pool::Pool;
pub(crate) use buffer::Buffer;
use scales::RowScales;
use source::Block;
pub use source::{dequantize, SourceType};
pub(crate) use source::{e8m0_half, IQ1_VALUES, IQ2_VALUES, IQ3_S_VALUES, IQ3_XXS_VALUES, IQ4_NL_VALUES, MXFP4_VALUES};
use std::fmt;

/// Rows in a tile of bit planes, the largest there is.
pub(crate) const PLANE_TILE: usize = 32;
/// Rows in a tile of other codes and of floats.
pub(crate) const FIELD_TILE: usize = 16;
/// The largest group of any form.
pub(crate) const MAX_GROUP: usize = 256;
/// The most subs of a group.
pub(crate) const MAX_SUBS: usize = 16;

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
    /// No codes and no groups: k-major, `FIELD_TILE` rows side by side.
    Float(FloatKind),
    /// Unsigned codes of n = 1 … 4 bits as bit planes, for table lookup (`planes`).
    Planes(u8),
    /// Unsigned codes of n = 1 … 6 bits, or signed bytes (8), for dot products (`fields`).
    Fields(u8),
    /// Base-3 digits, five a byte, as a fraction (`trits`).
    Trits,
    /// Base-3 digits, five a byte, as an index (`trits`).
    IndexedTrits,
}

/// What a code is worth before scaling.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Values {
    /// The code plus this.
    Offset(i8),
    /// An entry of IQ4_NL's table.
    Iq4Nl,
    /// An entry of MXFP4's table, doubled.
    Mxfp4,
    /// An entry of these types' tables, in units of `Values::unit`.
    Iq1,
    Iq2,
    Iq3Xxs,
    Iq3S,
}

impl Values {
    /// What codes are worth, in `unit`s, if that is no sum.
    pub(crate) const fn table(self) -> Option<&'static [i8; 16]> {
        match self {
            Values::Offset(_) => None,
            Values::Iq4Nl => Some(&IQ4_NL_VALUES),
            Values::Mxfp4 => Some(&MXFP4_VALUES),
            Values::Iq1 => Some(&IQ1_VALUES),
            Values::Iq2 => Some(&IQ2_VALUES),
            Values::Iq3Xxs => Some(&IQ3_XXS_VALUES),
            Values::Iq3S => Some(&IQ3_S_VALUES),
        }
    }

    /// What a value of 1 multiplies d by, a power of two: products of a half float with it are exact.
    pub(crate) const fn unit(self) -> f32 {
        match self {
            Values::Iq1 | Values::Iq2 => 0.125,
            Values::Iq3Xxs => 0.5,
            _ => 1.0,
        }
    }
}

/// What turns the values of a group into weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ScaleKind {
    /// Float weights have none.
    None,
    /// d·value, d an f16 of the group.
    F16,
    /// d·value + m, both f16 of the group.
    F16Min,
    /// d·(value − z), an f16 and 4 bits of the group.
    F16Zero4,
    /// d·(value + 128 − z), an f16 and a byte of the group.
    F16Zero8,
    /// As F16Zero4 with an f32 for d.
    F32Zero4,
    /// As F16Zero8 with an f32 for d.
    F32Zero8,
    /// 2^(e − 128)·value, e a byte of the group.
    E8M0,
    /// d·value, one f32 for the whole matrix.
    Tensor,
    /// (d·s)·value − (dmin·m): f16 d and dmin of the group, s and m of 4 bits for every 16 weights.
    Sub4Min,
    /// The same with s and m of 6 bits for every 32 weights.
    Sub6Min,
    /// (d·(s − 32))·value, s of 6 bits for every 16 weights.
    Sub6,
    /// The same with s for every 32 weights.
    Sub6Of32,
    /// (d·s)·value, s a signed byte for every 16 weights.
    Sub8,
}

/// The layout of a packed matrix: all that a kernel is chosen by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PackedForm {
    pub codes: Codes,
    pub values: Values,
    /// Weights that share a scale, along k, and activations that do; 1 for floats. Otherwise a multiple of 32, or 256 for trits
    /// and with sub-scales.
    pub group: u16,
    pub scale: ScaleKind,
}

impl PackedForm {
    /// The form that a type packs into unless a measurement says otherwise.
    pub fn of(ty: SourceType) -> PackedForm {
        Self::candidates(ty)[0]
    }

    /// Every form that holds the type without loss.
    pub fn candidates(ty: SourceType) -> Vec<PackedForm> {
        use ScaleKind::*;
        use SourceType as T;
        let float =
            |kind| vec![PackedForm { codes: Codes::Float(kind), values: Values::Offset(0), group: 1, scale: None }];
        let fields = |n, values, group, scale| PackedForm { codes: Codes::Fields(n), values, group, scale };
        let one = |n, values, group, scale| vec![fields(n, values, group, scale)];
        let both = |n, values, group, scale| {
            let fields = fields(n, values, group, scale);
            vec![fields, PackedForm { codes: Codes::Planes(n), ..fields }]
        };
        let offset = Values::Offset;
        match ty {
            T::F32 => float(FloatKind::F32),
            T::F16 => float(FloatKind::F16),
            T::BF16 => float(FloatKind::Bf16),
            T::Q4_0 => both(4, offset(-8), 32, F16),
            T::Q4_1 => both(4, offset(0), 32, F16Min),
            T::Q5_0 => one(5, offset(-16), 32, F16),
            T::Q5_1 => one(5, offset(0), 32, F16Min),
            T::Q8_0 => one(8, offset(0), 32, F16),
            T::Q2_K => one(2, offset(0), 256, Sub4Min),
            T::Q3_K => one(3, offset(-4), 256, Sub6),
            T::Q4_K => one(4, offset(0), 256, Sub6Min),
            T::Q5_K => one(5, offset(0), 256, Sub6Min),
            T::Q6_K => one(6, offset(-32), 256, Sub8),
            T::IQ1_S => one(3, Values::Iq1, 256, Sub6Of32),
            T::IQ1_M => one(3, Values::Iq1, 256, Sub6),
            T::IQ2_XXS => one(3, Values::Iq2, 256, Sub6Of32),
            T::IQ2_XS | T::IQ2_S => one(3, Values::Iq2, 256, Sub6),
            T::IQ3_XXS => one(4, Values::Iq3Xxs, 256, Sub6Of32),
            T::IQ3_S => one(4, Values::Iq3S, 256, Sub6Of32),
            T::IQ4_XS => one(4, Values::Iq4Nl, 256, Sub6Of32),
            T::IQ4_NL => one(4, Values::Iq4Nl, 32, F16),
            T::MXFP4 => one(4, Values::Mxfp4, 32, E8M0),
            T::TQ1_0 => {
                let trits = PackedForm { codes: Codes::Trits, values: offset(-1), group: 256, scale: F16 };
                vec![trits, PackedForm { codes: Codes::IndexedTrits, ..trits }]
            }
            T::TQ2_0 => both(2, offset(-1), 256, F16),
            T::I2_S => one(2, offset(-1), 128, Tensor),
            T::L1 => both(1, offset(0), 128, F16Min),
            T::L2 => both(2, offset(0), 128, F16Min),
            T::L3 => both(3, offset(0), 128, F16Min),
            _ => {
                let (bits, group) = ty.zero_point().expect("all others were named");
                let scale = match (bits, ty.has_wide_scale()) {
                    (8, false) => F16Zero8,
                    (8, true) => F32Zero8,
                    (_, false) => F16Zero4,
                    (_, true) => F32Zero4,
                };
                one(bits as u8, offset(0), group as u16, scale)
            }
        }
    }

    /// Rows interleaved in a tile.
    pub fn tile_rows(self) -> usize {
        match self.codes {
            Codes::Planes(_) => PLANE_TILE,
            _ => FIELD_TILE,
        }
    }

    /// Activations that share a scale; 0 if they stay f32.
    pub(crate) fn act_group(self) -> usize {
        match self.codes {
            Codes::Float(_) => 0,
            _ => self.group as usize,
        }
    }

    /// The largest magnitude of what a code is worth before scaling, zero points not counted.
    pub(crate) fn largest_value(self) -> i32 {
        let most = match self.codes {
            Codes::Planes(n) | Codes::Fields(n @ ..=6) => (1 << n) - 1,
            Codes::Trits | Codes::IndexedTrits => 2,
            Codes::Fields(_) | Codes::Float(_) => 128,
        };
        match self.values {
            Values::Offset(offset) => (offset as i32).abs().max(most + offset as i32),
            _ => 128, // signed bytes of a table
        }
    }

    /// Bytes of one group's codes, for all rows of a tile.
    pub(crate) fn group_code_bytes(self) -> usize {
        let group = self.group as usize;
        match self.codes {
            Codes::Float(FloatKind::F32) => 4 * FIELD_TILE,
            Codes::Float(FloatKind::F16 | FloatKind::Bf16) => 2 * FIELD_TILE,
            Codes::Planes(n) => group / 8 * n as usize * PLANE_TILE,
            Codes::Fields(n) => group / 8 * n as usize * FIELD_TILE,
            Codes::Trits | Codes::IndexedTrits => trits::words(group) * 4 * FIELD_TILE,
        }
    }

    /// Bytes of one group for all rows of a tile.
    pub(crate) fn group_tile_bytes(self) -> usize {
        self.group_code_bytes() + self.scale.bytes(self.tile_rows())
    }

    /// Bytes of a tile of `cols` columns, a multiple of the group.
    fn tile_bytes(self, cols: usize) -> Option<usize> {
        (cols / self.group as usize).checked_mul(self.group_tile_bytes())
    }

    /// Writes one row's block into a zeroed group of a tile.
    fn put(self, group: &mut [u8], row: usize, block: &Block) {
        let (subs, rest) = group.split_at_mut(self.scale.sub_bytes(self.tile_rows()));
        let (codes, scales) = rest.split_at_mut(self.group_code_bytes());
        let from = &block.codes[..self.group as usize];
        match self.codes {
            Codes::Planes(n) => planes::put(codes, n, row, from),
            Codes::Fields(n) => fields::put(codes, n, row, from),
            Codes::Trits => trits::put(codes, false, row, from),
            Codes::IndexedTrits => trits::put(codes, true, row, from),
            Codes::Float(_) => unreachable!("float weights have no codes"),
        }
        scales::put(self, subs, scales, row, block);
    }

    /// What a row of a tile's group is worth before scaling, and its scales; `tensor` is the matrix's.
    pub(crate) fn get(self, group: &[u8], row: usize, tensor: f32, values: &mut [i32]) -> RowScales {
        let (subs, rest) = group.split_at(self.scale.sub_bytes(self.tile_rows()));
        let (codes, scales) = rest.split_at(self.group_code_bytes());
        match self.codes {
            Codes::Planes(n) => planes::get(codes, n, row, values),
            Codes::Fields(n) => fields::get(codes, n, row, values),
            Codes::Trits => trits::get(codes, false, row, values),
            Codes::IndexedTrits => trits::get(codes, true, row, values),
            Codes::Float(_) => unreachable!("float weights have no codes"),
        }
        values.iter_mut().for_each(|value| {
            *value = match (self.values, self.values.table()) {
                (_, Some(table)) => table[*value as usize] as i32,
                _ if self.codes == Codes::Fields(8) => *value as i8 as i32,
                (Values::Offset(offset), _) => *value + offset as i32,
                _ => unreachable!("no table for {:?}", self.values),
            }
        });
        let scales = scales::get(self, subs, scales, row, tensor);
        values.iter_mut().for_each(|value| *value -= scales.zero);
        scales
    }
}

/// A weight matrix in the packed form, in memory of its own.
pub struct PackedMatrix {
    pub rows: usize,
    pub cols: usize,
    pub form: PackedForm,
    /// What `ScaleKind::Tensor` scales by.
    pub(crate) scale: f32,
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

    /// A copy in other memory.
    pub(crate) fn duplicate(&self, pool: &Pool) -> Result<PackedMatrix> {
        let mut data = Buffer::zeroed(self.data.len())?;
        data.par_chunks(pool, self.tile_bytes, |index, tile| tile.copy_from_slice(self.tile(index)));
        Ok(PackedMatrix { data, ..*self })
    }

    pub fn tiles(&self) -> usize {
        self.rows.div_ceil(self.form.tile_rows())
    }

    /// A matrix whose `data` was one's before.
    pub(crate) fn from_data(form: PackedForm, rows: usize, cols: usize, scale: f32, data: Buffer) -> Result<Self> {
        if packed_bytes(form, rows, cols)? != data.len() {
            return Err(Error::data(format!("{} bytes are not {rows} × {cols} weights in {form:?}", data.len())));
        }
        let tile_bytes = form.tile_bytes(cols).expect("the whole fits");
        Ok(PackedMatrix { rows, cols, form, scale, tile_bytes, data })
    }

    /// All tiles.
    pub(crate) fn data(&self) -> &[u8] {
        &self.data
    }

    /// What `ScaleKind::Tensor` scales by.
    pub(crate) fn scale(&self) -> f32 {
        self.scale
    }

    /// Reads every byte, as a product's threads share the tiles, and nothing else: what products are compared with.
    pub fn read(&self, how: Reading, ks: &Kernels, pool: &Pool) {
        pool.run(self.tiles(), &|index| how.read(ks, self.tile(index)));
    }

    /// The same rows `times` times over: for benchmarks, a large matrix at the price of a copy. The rows must be whole tiles.
    pub fn repeated(&self, times: usize, pool: &Pool) -> Result<PackedMatrix> {
        assert!(times > 0 && self.rows == self.tiles() * self.form.tile_rows(), "{self:?} ends within a tile");
        let mut data = Buffer::zeroed(times * self.bytes())?;
        data.par_chunks(pool, self.tile_bytes, |index, tile| tile.copy_from_slice(self.tile(index % self.tiles())));
        Ok(PackedMatrix { rows: times * self.rows, data, ..*self })
    }

    pub(crate) fn tile(&self, index: usize) -> &[u8] {
        self.tiles_from(index, 1)
    }

    /// Tiles `index .. + count`.
    pub(crate) fn tiles_from(&self, index: usize, count: usize) -> &[u8] {
        &self.data[index * self.tile_bytes..][..count * self.tile_bytes]
    }

    /// The weights of a row, with the bits that `dequantize` gives. Panics if `row` or the length of `out` is wrong.
    pub fn unpack_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows && out.len() == self.cols, "unpack_row: row {row} or length {}", out.len());
        let form = self.form;
        let tile = self.tile(row / form.tile_rows());
        let row = row % form.tile_rows();
        if let Codes::Float(kind) = form.codes {
            let size = form.group_code_bytes() / FIELD_TILE;
            for (value, column) in out.iter_mut().zip(tile.chunks_exact(form.group_code_bytes())) {
                *value = source::float(kind, &column[row * size..][..size]);
            }
            return;
        }
        let (size, sub) = (form.group as usize, form.scale.sub(form.group as usize));
        let mut codes = [0i32; MAX_GROUP];
        let codes = &mut codes[..size];
        for (weights, group) in out.chunks_exact_mut(size).zip(tile.chunks_exact(form.group_tile_bytes())) {
            let scales = form.get(group, row, self.scale, codes);
            for (j, (weights, values)) in weights.chunks_exact_mut(sub).zip(codes.chunks_exact(sub)).enumerate() {
                // As the formats' own formulas round: the sub-scale times d first, then the code, then the minimum.
                let (d, m) = match form.scale {
                    ScaleKind::Sub4Min | ScaleKind::Sub6Min => {
                        (scales.d * scales.sub_scales[j] as f32, -(scales.min * scales.sub_mins[j] as f32))
                    }
                    ScaleKind::Sub6 | ScaleKind::Sub6Of32 | ScaleKind::Sub8 => {
                        (scales.d * scales.sub_scales[j] as f32, 0.0)
                    }
                    _ => (scales.d, scales.min),
                };
                let has_min = matches!(form.scale, ScaleKind::Sub4Min | ScaleKind::Sub6Min | ScaleKind::F16Min);
                for (weight, &value) in weights.iter_mut().zip(values) {
                    *weight = if has_min { d * value as f32 + m } else { d * value as f32 };
                }
            }
        }
    }
}

/// Packs a matrix given as the file has it (`ty.tensor_bytes(rows, cols)` bytes) into the type's usual form.
pub fn pack(ty: SourceType, src: &[u8], rows: usize, cols: usize, pool: &Pool) -> Result<PackedMatrix> {
    pack_as(PackedForm::of(ty), ty, src, rows, cols, pool)
}

/// Packs a matrix into one of `PackedForm::candidates(ty)`.
pub fn pack_as(
    form: PackedForm,
    ty: SourceType,
    src: &[u8],
    rows: usize,
    cols: usize,
    pool: &Pool,
) -> Result<PackedMatrix> {
    if !PackedForm::candidates(ty).contains(&form) {
        return Err(Error::argument(format!("{ty:?} weights do not pack into {form:?}")));
    }
    let row_bytes = ty.row_bytes(cols)?;
    if rows == 0 || ty.tensor_bytes(rows, cols)? != src.len() {
        return Err(Error::argument(format!("{rows} × {cols} {ty:?} weights do not take {} bytes", src.len())));
    }
    let scale = if form.scale == ScaleKind::Tensor { source::tensor_scale(src) } else { 1.0 };
    let mut data = Buffer::zeroed(packed_bytes(form, rows, cols)?)?;
    let tile_bytes = form.tile_bytes(cols).expect("the whole fits");
    data.par_chunks(pool, tile_bytes, |index, tile| {
        let first = index * form.tile_rows();
        let end = rows.min(first + form.tile_rows());
        pack_tile(ty, form, &src[first * row_bytes..end * row_bytes], row_bytes, tile);
    });
    Ok(PackedMatrix { rows, cols, form, scale, tile_bytes, data })
}

/// Bytes of a packed matrix of whole groups.
pub(crate) fn packed_bytes(form: PackedForm, rows: usize, cols: usize) -> Result<usize> {
    let bytes = form.tile_bytes(cols).and_then(|tile| tile.checked_mul(rows.div_ceil(form.tile_rows())));
    bytes.ok_or_else(|| Error::exhausted(format!("{rows} × {cols} weights are too large to pack")))
}

/// Packs the rows of a tile. A stretch of columns of every row comes after the other, so that what is written stays in the
/// first-level cache until all rows have written their parts of its lines.
fn pack_tile(ty: SourceType, form: PackedForm, src: &[u8], row_bytes: usize, tile: &mut [u8]) {
    const STRETCH: usize = 8 << 10;
    let (group, block) = (form.group_tile_bytes(), ty.block_bytes());
    let groups = (STRETCH / group).max(1);
    let mut parts = Block::EMPTY;
    for (stretch, tile) in tile.chunks_mut(groups * group).enumerate() {
        for (row, src) in src.chunks_exact(row_bytes).enumerate() {
            let src = src[stretch * groups * block..].chunks_exact(block).zip(tile.chunks_exact_mut(group));
            if let Codes::Float(_) = form.codes {
                src.for_each(|(value, column)| column[row * block..][..block].copy_from_slice(value));
                continue;
            }
            for (block, group) in src {
                parts.read(ty, block);
                form.put(group, row, &parts);
            }
        }
    }
}

impl PackedMatrix {
    /// A matrix of any form without subs, for tests and benchmarks: codes row-major, one d and one m (f16 bits) for all.
    pub fn from_codes(form: PackedForm, rows: usize, cols: usize, codes: &[u8], d: u16, m: u16) -> Self {
        let tile_bytes = form.tile_bytes(cols).unwrap();
        let mut data = Buffer::zeroed(rows.div_ceil(form.tile_rows()) * tile_bytes).unwrap();
        data.par_chunks(&Pool::new(1), tile_bytes, |index, tile| {
            let first = index * form.tile_rows();
            for row in first..rows.min(first + form.tile_rows()) {
                let groups = tile.chunks_exact_mut(form.group_tile_bytes());
                for (group, codes) in groups.zip(codes[row * cols..][..cols].chunks_exact(form.group as usize)) {
                    let wide_scale = f16_to_f32(d).to_bits();
                    let mut block = Block { scale: d, wide_scale, min: m, ..Block::EMPTY };
                    block.codes[..codes.len()].copy_from_slice(codes);
                    form.put(group, row - first, &block);
                }
            }
        });
        PackedMatrix { rows, cols, form, scale: 1.0, tile_bytes, data }
    }
}
