//! Tensors as files keep them, to the blocks that are packed.

use crate::descriptor::{Layout, Rows, TensorRef};
use crate::error::{Error, Result};
use crate::mapping::ModelFiles;
use crate::pack::grouped::{Arrangement, Format, Grouped};
use crate::pack::ternary::{ternarised, Quarters};
use crate::pack::{dequantize, FloatKind, SourceType};
use crate::pool::Pool;
use crate::weight_cache::Part;
use std::borrow::Cow;

/// A tensor's rows, of blocks of one type, before they are made.
pub(super) struct Stored<'a> {
    pub ty: SourceType,
    pub rows: usize,
    /// Weights of a row, which may be more than the tensor has (`pack::grouped`).
    pub cols: usize,
    /// The column at every place, if it is another one.
    pub order: Option<Vec<u32>>,
    pub parts: Vec<Part<'a>>,
    /// What the blocks depend on beside the parts; empty if the only part is the blocks.
    pub how: String,
    make: Make<'a>,
}

enum Make<'a> {
    AsIs(&'a [u8]),
    Rows(&'a [u8], Rows),
    Transposed(&'a [u8], Vec<usize>),
    Grouped(Grouped<'a>, Arrangement, Vec<usize>),
    Quarters(Quarters<'a>, Vec<usize>),
    Ternarised(&'a [u8], FloatKind, Vec<usize>),
}

fn float_kind(ty: SourceType) -> Result<FloatKind> {
    match ty {
        SourceType::F32 => Ok(FloatKind::F32),
        SourceType::F16 => Ok(FloatKind::F16),
        SourceType::BF16 => Ok(FloatKind::Bf16),
        _ => Err(Error::unsupported(format!("{ty:?} weights cannot be laid out so"))),
    }
}

/// The weights of a small tensor of floats.
pub(super) fn floats(files: &ModelFiles, t: &TensorRef) -> Result<Vec<f32>> {
    let (ty, bytes) = (t.source_type()?, files.tensor(t)?);
    let mut out = vec![0.0; bytes.len() / ty.block_bytes() * ty.block_elements()];
    dequantize(ty, bytes, &mut out)?;
    Ok(out)
}

/// The group of every column: as `index` says, or one after the other.
fn groups(files: &ModelFiles, index: Option<&TensorRef>, group: usize, cols: usize) -> Result<Vec<u32>> {
    match index {
        None => Ok((0..cols).map(|k| k.checked_div(group).unwrap_or(0) as u32).collect()),
        Some(t) => {
            Ok(files.tensor(t)?.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().expect("4 bytes"))).collect())
        }
    }
}

impl<'a> Stored<'a> {
    /// Finds a tensor of two dimensions or one, or of any number if it is stored as it is.
    pub fn find(files: &'a ModelFiles, t: &TensorRef) -> Result<Self> {
        let (cols, rows) = (t.shape[0], t.shape[1..].iter().product());
        let part = |t: &TensorRef| -> Result<Part<'a>> {
            let file = files.get(t.file)?;
            Ok(Part { file: (t.file, file.file()), offset: t.offset, bytes: file.tensor(t)? })
        };
        let first = part(t)?;
        let bytes = first.bytes;
        let selected = t.rows.unwrap_or(Rows { of: rows, first: 0, block: rows.max(1), stride: rows.max(1) });
        let places = || selected.places(rows).collect::<Vec<_>>();
        let grouped = |format,
                       group,
                       index: Option<&TensorRef>,
                       s: &TensorRef,
                       z: &TensorRef|
         -> Result<(Make<'a>, Vec<Part<'a>>)> {
            let grouped = Grouped {
                format,
                rows: selected.of,
                cols,
                codes: bytes,
                zeros: files.tensor(z)?,
                scales: floats(files, s)?,
                groups: groups(files, index, group, cols)?,
            };
            let arrangement = grouped.arrangement()?;
            let mut parts = vec![first, part(s)?, part(z)?];
            parts.extend(index.map(&part).transpose()?);
            Ok((Make::Grouped(grouped, arrangement, places()), parts))
        };
        let (make, parts, how) = match &t.layout {
            None => match t.rows {
                None => (Make::AsIs(bytes), vec![first], String::new()),
                Some(rows) => (Make::Rows(bytes, rows), vec![first], String::new()),
            },
            Some(Layout::Transposed) => (Make::Transposed(bytes, places()), vec![first], "transposed".into()),
            Some(Layout::Gptq { bits, zero, group, scales, zeros, index }) => {
                let format = Format::Gptq { bits: *bits, zero: *zero };
                let (make, parts) = grouped(format, *group, index.as_deref(), scales, zeros)?;
                (make, parts, format!("{format:?} {group}"))
            }
            Some(Layout::Awq { group, scales, zeros }) => {
                let (make, parts) = grouped(Format::Awq, *group, None, scales, zeros)?;
                (make, parts, format!("awq {group}"))
            }
            Some(Layout::Quarters { scale, inverse }) => {
                let found = scale.as_ref().map(|t| floats(files, t)).transpose()?;
                let scale = found.as_ref().map_or(Some(&1.0), |found| found.first());
                let scale = *scale.ok_or_else(|| Error::data("a scale is missing"))?;
                let scale = if *inverse { 1.0 / scale } else { scale };
                let quarters = Quarters { rows: selected.of, cols, codes: bytes, scale };
                (Make::Quarters(quarters, places()), vec![first], format!("quarters {}", scale.to_bits()))
            }
            Some(Layout::Ternarised) => {
                (Make::Ternarised(bytes, float_kind(t.source_type()?)?, places()), vec![first], "ternarised".into())
            }
            Some(Layout::Parts { .. }) => return Err(Error::data("it is in parts")),
        };
        let mut cols = cols;
        let (ty, order) = match &make {
            Make::AsIs(_) | Make::Rows(..) => (t.source_type()?, None),
            Make::Transposed(..) => {
                let ty = t.source_type()?;
                float_kind(ty)?;
                (ty, None)
            }
            Make::Grouped(_, arrangement, _) => {
                cols = arrangement.cols;
                (arrangement.ty, arrangement.order.clone())
            }
            Make::Quarters(..) | Make::Ternarised(..) => (SourceType::I2_S, None),
        };
        let how = t.rows.map_or(how.clone(), |rows| format!("{how} {rows:?}"));
        Ok(Stored { ty, rows, cols, order, parts, how, make })
    }

    /// The blocks.
    pub fn blocks(&self, pool: &Pool) -> Result<Cow<'a, [u8]>> {
        match &self.make {
            Make::AsIs(bytes) => Ok(Cow::Borrowed(bytes)),
            Make::Rows(bytes, rows) => {
                let size = self.ty.row_bytes(self.cols)?;
                if self.ty.trailer_bytes() != 0 {
                    return Err(Error::unsupported(format!("{:?} tensors cannot be split by rows", self.ty)));
                }
                let take = |row| bytes.get(row * size..(row + 1) * size);
                let taken: Option<Vec<&[u8]>> = rows.places(self.rows).map(take).collect();
                taken.map(|rows| Cow::Owned(rows.concat())).ok_or_else(|| Error::data("it has too few rows"))
            }
            Make::Transposed(bytes, places) => {
                let (size, of) = (self.ty.block_bytes(), bytes.len() / self.cols / self.ty.block_bytes());
                if places.iter().any(|&row| row >= of) {
                    return Err(Error::data("it has too few rows"));
                }
                let mut out = Vec::with_capacity(self.ty.tensor_bytes(self.rows, self.cols)?);
                for row in places {
                    (0..self.cols).for_each(|k| out.extend_from_slice(&bytes[(k * of + row) * size..][..size]));
                }
                Ok(Cow::Owned(out))
            }
            Make::Grouped(grouped, arrangement, places) => grouped.blocks(arrangement, places, pool).map(Cow::Owned),
            Make::Quarters(quarters, places) => quarters.blocks(places).map(Cow::Owned),
            Make::Ternarised(bytes, kind, places) => ternarised(*kind, bytes, self.cols, places).map(Cow::Owned),
        }
    }
}
