//! Matrices as GPTQ and AWQ keep them: codes, zero points and scales in a tensor each, `d·(q − z)`, a scale and a zero point for
//! every row of a group of columns.
//!
//! Both keep int32 words of fields from the lowest bits on. GPTQ: `qweight` has a stream of codes along the columns for
//! every row, words of all rows side by side; `qzeros` a stream along the rows for every group. AWQ ("gemm"): both are
//! streams along the rows, for every column and every group, and of eight rows those with even places come first.
//!
//! GPTQ's act-order (`g_idx`) spreads the columns of a group. Packed rows have them together: `Arrangement::order` says which
//! column stands at each place, and whoever multiplies gathers activations alike. Groups of other sizes than the types' are padded:
//! a place that names the column before it once more has the weight 0. Scales that no f16 holds go to types with f32 ones,
//! and groups so small that padding would be larger than floats, to F32. All of it is exact.

use super::source::SourceType;
use crate::error::{Error, Result};
use crate::ops::{f16_to_f32, f32_to_f16};
use crate::pool::Pool;
use std::sync::Mutex;

/// Rows that are unpacked together: what reading a line of words gives.
const ROWS: usize = 16;
/// The place of each of eight rows in an AWQ word.
const AWQ_PLACES: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// Where fields lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `zero` is what is added to stored zero points, modulo 2^bits: 1, or 0 in `gptq_v2`.
    Gptq {
        bits: usize,
        zero: u32,
    },
    Awq,
}

/// A stored matrix of `rows` × `cols`.
#[derive(Debug)]
pub struct Grouped<'a> {
    pub format: Format,
    pub rows: usize,
    pub cols: usize,
    /// int32 words, little-endian.
    pub codes: &'a [u8],
    pub zeros: &'a [u8],
    /// `rows` for every group.
    pub scales: Vec<f32>,
    /// The group of every column.
    pub groups: Vec<u32>,
}

/// How a matrix is packed.
#[derive(Debug, PartialEq, Eq)]
pub struct Arrangement {
    pub ty: SourceType,
    /// Weights of a row, those that pad it included.
    pub cols: usize,
    /// The column at every place, if that is another one.
    pub order: Option<Vec<u32>>,
}

impl Format {
    pub fn bits(self) -> usize {
        match self {
            Format::Gptq { bits, .. } => bits,
            Format::Awq => 4,
        }
    }

    /// Bytes of the codes of a matrix; `None` if they are no whole words.
    pub fn code_bytes(self, rows: usize, cols: usize) -> Option<usize> {
        match self {
            Format::Gptq { bits, .. } => words(cols, bits)?.checked_mul(4 * rows),
            Format::Awq => words(rows, 4)?.checked_mul(4 * cols),
        }
    }

    /// Bytes of the zero points of so many groups.
    pub fn zero_bytes(self, rows: usize, groups: usize) -> Option<usize> {
        words(rows, self.bits())?.checked_mul(4 * groups)
    }
}

/// Words of a stream of `count` fields, if they are whole ones.
fn words(count: usize, bits: usize) -> Option<usize> {
    let all = count.checked_mul(bits)?;
    (all % 32 == 0).then_some(all / 32)
}

/// Word `i` of int32s.
fn word(bytes: &[u8], i: usize) -> u32 {
    u32::from_le_bytes(bytes[4 * i..][..4].try_into().expect("4 bytes"))
}

impl Grouped<'_> {
    /// Checks the parts against each other, and says how the matrix is packed.
    pub fn arrangement(&self) -> Result<Arrangement> {
        let (bits, rows, cols) = (self.format.bits(), self.rows, self.cols);
        if !matches!(bits, 2 | 3 | 4 | 8) {
            return Err(Error::unsupported(format!("codes of {bits} bits are not supported; there are 2, 3, 4 and 8")));
        }
        let count = self.scales.len() / rows.max(1);
        let sizes = [
            (self.codes.len(), self.format.code_bytes(rows, cols)),
            (self.zeros.len(), self.format.zero_bytes(rows, count)),
        ];
        if rows == 0 || cols == 0 || self.scales.len() != count * rows || self.groups.len() != cols {
            return Err(Error::data(format!("{} scales are not those of {rows} rows", self.scales.len())));
        }
        if let Some((len, _)) = sizes.into_iter().find(|(len, expected)| Some(*len) != *expected) {
            return Err(Error::data(format!(
                "{len} bytes are not the codes or zero points of {rows} × {cols} weights"
            )));
        }
        if let Some(group) = self.groups.iter().find(|&&group| group as usize >= count) {
            return Err(Error::data(format!("a column is in group {group} of {count}")));
        }
        let mut order: Vec<u32> = (0..cols as u32).collect();
        order.sort_by_key(|&k| self.groups[k as usize]); // stable
        let members: Vec<&[u32]> =
            order.chunk_by(|&a, &b| self.groups[a as usize] == self.groups[b as usize]).collect();
        let wide = self.scales.iter().any(|&scale| !is_half(scale));
        let padded = [128, 64, 32].into_iter().filter_map(|size| {
            let ty = SourceType::with_zero_point(bits, size, wide)?;
            Some((ty, members.iter().map(|group| group.len().next_multiple_of(size)).sum::<usize>()))
        });
        let candidates = padded.chain([(SourceType::F32, cols)]);
        let bytes = |&(ty, cols): &(SourceType, usize)| ty.row_bytes(cols).expect("whole blocks");
        let (ty, places) = candidates.min_by_key(bytes).expect("there is F32");
        if ty == SourceType::F32 {
            return Ok(Arrangement { ty, cols, order: None });
        }
        let mut padded = Vec::with_capacity(places);
        for group in members {
            padded.extend_from_slice(group);
            let last = *group.last().expect("no group is empty");
            padded.resize(padded.len() + group.len().next_multiple_of(ty.block_elements()) - group.len(), last);
        }
        let moved = padded.iter().enumerate().any(|(place, &k)| place != k as usize);
        Ok(Arrangement { ty, cols: places, order: moved.then_some(padded) })
    }

    /// The rows that `rows` names, in blocks of the arrangement's type.
    pub fn blocks(&self, arrangement: &Arrangement, rows: &[usize], pool: &Pool) -> Result<Vec<u8>> {
        let row_bytes = arrangement.ty.row_bytes(arrangement.cols)?;
        let mut out = vec![0; arrangement.ty.tensor_bytes(rows.len(), arrangement.cols)?];
        let parts: Vec<_> = out.chunks_mut(ROWS * row_bytes).zip(rows.chunks(ROWS)).map(Mutex::new).collect();
        pool.run(parts.len(), &|i| {
            let mut part = parts[i].lock().expect("no panic while it is held");
            let (out, rows) = &mut *part;
            let mut codes = vec![0; rows.len() * self.cols];
            self.codes_of(rows, &mut codes);
            for ((out, codes), &row) in out.chunks_exact_mut(row_bytes).zip(codes.chunks_exact(self.cols)).zip(*rows) {
                self.write_row(arrangement, row, codes, out);
            }
        });
        drop(parts);
        Ok(out)
    }

    /// Codes of some rows, a byte each.
    fn codes_of(&self, rows: &[usize], codes: &mut [u8]) {
        let cols = self.cols;
        match self.format {
            Format::Gptq { bits, .. } => {
                let mask = (1u64 << bits) - 1;
                // Stretches of 32 columns are `bits` whole words; a last word may be followed by none.
                for first in (0..cols).step_by(32) {
                    for (&row, codes) in rows.iter().zip(codes.chunks_exact_mut(cols)) {
                        let at = |i: usize| word(self.codes, (first / 32 * bits + i) * self.rows + row) as u64;
                        let count = 32.min(cols - first);
                        let have = count * bits / 32;
                        let (mut stream, mut left, mut next) = (0u64, 0, 0);
                        for code in &mut codes[first..first + count] {
                            if left < bits && next < have {
                                stream |= at(next) << left;
                                (left, next) = (left + 32, next + 1);
                            }
                            *code = (stream & mask) as u8;
                            stream >>= bits;
                            left -= bits;
                        }
                    }
                }
            }
            Format::Awq => {
                for k in 0..cols {
                    for (&row, codes) in rows.iter().zip(codes.chunks_exact_mut(cols)) {
                        let word = word(self.codes, k * (self.rows / 8) + row / 8);
                        codes[k] = (word >> (4 * AWQ_PLACES[row % 8]) & 15) as u8;
                    }
                }
            }
        }
    }

    /// The zero point of a row of a group.
    fn zero(&self, group: usize, row: usize) -> u8 {
        let bits = self.format.bits();
        let first = group * (self.rows * bits / 32);
        match self.format {
            Format::Gptq { bits, zero } => {
                let (at, shift) = (row * bits / 32, row * bits % 32);
                let mut stream = word(self.zeros, first + at) as u64;
                if shift + bits > 32 {
                    stream |= (word(self.zeros, first + at + 1) as u64) << 32;
                }
                (((stream >> shift) as u32).wrapping_add(zero) & ((1 << bits) - 1)) as u8
            }
            Format::Awq => (word(self.zeros, first + row / 8) >> (4 * AWQ_PLACES[row % 8]) & 15) as u8,
        }
    }

    fn write_row(&self, arrangement: &Arrangement, row: usize, codes: &[u8], out: &mut [u8]) {
        let (ty, bits) = (arrangement.ty, self.format.bits());
        if ty == SourceType::F32 {
            for ((weight, &code), &group) in out.chunks_exact_mut(4).zip(codes).zip(&self.groups) {
                let zero = self.zero(group as usize, row);
                let scale = self.scales[group as usize * self.rows + row];
                weight.copy_from_slice(&(scale * (code as i32 - zero as i32) as f32).to_le_bytes());
            }
            return;
        }
        let size = ty.block_elements();
        for (g, block) in out.chunks_exact_mut(ty.block_bytes()).enumerate() {
            let column = |place: usize| arrangement.order.as_ref().map_or(place, |order| order[place] as usize);
            let group = self.groups[column(g * size)] as usize;
            let (scale, zero) = (self.scales[group * self.rows + row], self.zero(group, row));
            if ty.has_wide_scale() {
                block[..4].copy_from_slice(&scale.to_le_bytes());
            } else {
                block[..2].copy_from_slice(&f32_to_f16(scale).to_le_bytes());
            }
            block[ty.zero_at()] = zero;
            let code = |i: usize| {
                let (place, k) = (g * size + i, column(g * size + i));
                let pads = i > 0 && column(place - 1) == k;
                if pads {
                    zero as u64
                } else {
                    codes[k] as u64
                }
            };
            for (i, bytes) in block[ty.zero_at() + 1..].chunks_exact_mut(bits).enumerate() {
                let eight = (0..8).fold(0, |eight, j| eight | code(8 * i + j) << (bits * j));
                bytes.copy_from_slice(&eight.to_le_bytes()[..bits]);
            }
        }
    }
}

/// Whether an f16 holds this exactly; NaNs count as one.
fn is_half(value: f32) -> bool {
    f16_to_f32(f32_to_f16(value)) == value || value.is_nan()
}

#[cfg(test)]
mod tests {
    //! Against words made a bit at a time, and weights from the formula.

    use super::*;
    use crate::pack::{dequantize, pack, PackedForm};

    struct Random(u64);
    impl Random {
        fn below(&mut self, n: usize) -> usize {
            self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((self.0 >> 33) % n as u64) as usize
        }
    }

    /// A stream of fields as int32 words.
    fn stream(fields: &[usize], bits: usize) -> Vec<u8> {
        let mut out = vec![0; fields.len() * bits / 8];
        for (i, field) in fields.iter().enumerate() {
            (0..bits)
                .filter(|bit| field >> bit & 1 == 1)
                .for_each(|bit| out[(i * bits + bit) / 8] |= 1 << ((i * bits + bit) % 8));
        }
        out
    }

    /// Rows of words, transposed.
    fn columns(rows: &[Vec<u8>]) -> Vec<u8> {
        (0..rows[0].len() / 4).flat_map(|i| rows.iter().flat_map(move |row| row[4 * i..4 * i + 4].to_vec())).collect()
    }

    /// Eight by eight, in the order that AWQ gives its nibbles.
    fn interleaved(fields: &[usize]) -> Vec<usize> {
        fields.chunks_exact(8).flat_map(|eight| [0, 2, 4, 6, 1, 3, 5, 7].map(|i| eight[i])).collect()
    }

    #[test]
    fn every_format_gives_the_weights_of_its_formula() {
        let (mut random, pool) = (Random(7), Pool::new(2));
        let formats = [2, 3, 4, 8].into_iter().flat_map(|bits| [0, 1].map(|zero| Format::Gptq { bits, zero }));
        for format in formats.chain([Format::Awq]) {
            let bits = format.bits();
            const SHAPES: [(usize, usize, usize); 13] = [
                (32, 32, 32),
                (64, 192, 64),
                (96, 256, 256),
                (32, 384, 128),
                (32, 160, 96),
                (64, 512, 512),
                (32, 96, 16),
                (32, 64, 8),
                (64, 160, 24),
                (32, 288, 127),
                (32, 32, 1),
                // Rows of no whole 32 columns: codes of 3 bits cannot have them.
                (32, 48, 20),
                (32, 80, 80),
            ];
            for (rows, cols, size) in
                SHAPES.into_iter().filter(|&(rows, cols, _)| format.code_bytes(rows, cols).is_some())
            {
                for (act_order, wide) in [(false, false), (true, false), (false, true), (true, true)] {
                    let count = cols.div_ceil(size);
                    let mut groups: Vec<u32> = (0..cols).map(|k| (k / size) as u32).collect();
                    if act_order {
                        (1..cols).rev().for_each(|i| groups.swap(i, random.below(i + 1)));
                    }
                    let mut field = |n: usize| (0..n).map(|_| random.below(1 << bits)).collect::<Vec<_>>();
                    let codes: Vec<Vec<usize>> = (0..rows).map(|_| field(cols)).collect();
                    let zeros: Vec<Vec<usize>> = (0..count).map(|_| field(rows)).collect();
                    let scales: Vec<f32> = (0..count * rows)
                        .map(|_| f16_to_f32(0x2000 + random.below(0x1000) as u16) * if wide { 1.1 } else { 1.0 })
                        .collect();
                    let (code_words, zero_words) = match format {
                        Format::Gptq { .. } => (
                            columns(&codes.iter().map(|row| stream(row, bits)).collect::<Vec<_>>()),
                            zeros.iter().flat_map(|row| stream(row, bits)).collect::<Vec<_>>(),
                        ),
                        Format::Awq => (
                            (0..cols)
                                .flat_map(|k| {
                                    stream(&interleaved(&codes.iter().map(|row| row[k]).collect::<Vec<_>>()), 4)
                                })
                                .collect(),
                            zeros.iter().flat_map(|row| stream(&interleaved(row), 4)).collect(),
                        ),
                    };
                    let grouped = Grouped {
                        format,
                        rows,
                        cols,
                        codes: &code_words,
                        zeros: &zero_words,
                        scales: scales.clone(),
                        groups: groups.clone(),
                    };
                    let arrangement = grouped.arrangement().unwrap();
                    let what =
                        format!("{format:?} {rows} × {cols}, groups of {size}, act-order {act_order}, wide {wide}");
                    let ty = arrangement.ty;
                    if size % 32 == 0 {
                        assert_eq!(arrangement.order.is_some(), act_order && count > 1, "{what}");
                        assert_eq!(arrangement.cols, cols, "{what}");
                    }
                    assert_eq!(ty.has_wide_scale(), wide && ty != SourceType::F32, "{what}");
                    // Never more than floats, and of groups that fit, no more than they need.
                    let row_bytes = ty.row_bytes(arrangement.cols).unwrap();
                    assert!(row_bytes <= 4 * cols, "{what}: {ty:?} × {}", arrangement.cols);
                    if size == 1 {
                        assert_eq!(ty, SourceType::F32, "{what}");
                    }
                    // Any choice of rows, in any order.
                    let chosen: Vec<usize> = (0..rows - 5).map(|i| (i * 7 + 3) % rows).collect();
                    let bytes = grouped.blocks(&arrangement, &chosen, &pool).unwrap();
                    let places = arrangement.cols;
                    let mut weights = vec![0f32; chosen.len() * places];
                    dequantize(ty, &bytes, &mut weights).unwrap();
                    let packed = pack(ty, &bytes, chosen.len(), places, &pool).unwrap();
                    assert_eq!(packed.form, PackedForm::of(ty));
                    let mut unpacked = vec![0f32; places];
                    for (i, (&row, weights)) in chosen.iter().zip(weights.chunks_exact(places)).enumerate() {
                        packed.unpack_row(i, &mut unpacked);
                        assert_eq!(unpacked, weights, "{what}");
                        let mut seen = vec![false; cols];
                        for (place, &weight) in weights.iter().enumerate() {
                            let k = arrangement.order.as_ref().map_or(place, |order| order[place] as usize);
                            if std::mem::replace(&mut seen[k], true) {
                                assert_eq!(weight, 0.0, "{what}: place {place} pads row {row}");
                                continue;
                            }
                            let group = groups[k] as usize;
                            let added = if let Format::Gptq { zero, .. } = format { zero as usize } else { 0 };
                            let zero = (zeros[group][row] + added) % (1 << bits);
                            let expected = scales[group * rows + row] * (codes[row][k] as f32 - zero as f32);
                            assert_eq!(weight, expected, "{what}: row {row}, column {k}");
                        }
                        assert!(seen.iter().all(|&seen| seen), "{what}: row {row}");
                    }
                }
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let words = vec![0; 4 * 8 * 32];
        let with = |bits, cols: usize, groups: Vec<u32>, scales: usize| {
            let format = Format::Gptq { bits, zero: 1 };
            let grouped = Grouped {
                format,
                rows: 32,
                cols,
                codes: &words[..format.code_bytes(32, cols).unwrap_or(0)],
                zeros: &words[..format.zero_bytes(32, scales / 32).unwrap_or(0)],
                scales: vec![0.0; scales],
                groups,
            };
            grouped.arrangement().map(|a| a.ty).map_err(|e| e.message)
        };
        assert_eq!(with(4, 32, vec![0; 32], 32), Ok(SourceType::Z4_32));
        assert!(with(5, 32, vec![0; 32], 32).unwrap_err().contains("5 bits"));
        assert!(with(4, 32, vec![1; 32], 32).unwrap_err().contains("group 1 of 1"));
        assert!(with(4, 32, vec![0; 31], 32).unwrap_err().contains("scales"));
        assert!(with(4, 32, vec![0; 32], 33).unwrap_err().contains("scales"));
        assert!(with(4, 31, vec![0; 31], 32).unwrap_err().contains("bytes are not"));
    }

    /// The arrays of a NumPy archive, by name: what follows their headers.
    fn arrays(archive: &[u8]) -> Vec<(String, Vec<u8>)> {
        let number = |at: usize, bytes: usize| {
            archive[at..at + bytes].iter().rev().fold(0usize, |value, &byte| value << 8 | byte as usize)
        };
        let mut out = vec![];
        let mut at = archive.windows(4).position(|four| four == b"PK\x01\x02").expect("a directory");
        while archive[at..].starts_with(b"PK\x01\x02") {
            let (method, size, local) = (number(at + 10, 2), number(at + 20, 4), number(at + 42, 4));
            let name = String::from_utf8_lossy(&archive[at + 46..][..number(at + 28, 2)]).into_owned();
            let data = &archive[local + 30 + number(local + 26, 2) + number(local + 28, 2)..][..size];
            let array = match method {
                0 => data.to_vec(),
                _ => miniz_oxide::inflate::decompress_to_vec(data).expect("deflated data"),
            };
            let header = 10 + usize::from(u16::from_le_bytes([array[8], array[9]]));
            out.push((name.trim_end_matches(".npy").to_owned(), array[header..].to_vec()));
            at += 46 + number(at + 28, 2) + number(at + 30, 2) + number(at + 32, 2);
        }
        out
    }

    /// AutoGPTQ's vectors: 256 × 256 codes of 4 bits in groups of 128, stored zero points one too small, and what its CUDA kernels gave.
    #[test]
    fn autogptqs_vectors_are_met() {
        use crate::{matmul, select, Activations, Precision};
        let data = std::env::var_os("LUTRA_DATA").map(std::path::PathBuf::from);
        let data = data.unwrap_or_else(|| concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/data").into());
        if !data.exists() {
            assert!(
                std::env::var("CI").as_deref() != Ok("true"),
                "CI needs the shared test data: set LUTRA_DATA to its folder"
            );
            println!("skipped: no shared test data in {}", data.display());
            return;
        }
        const SIZE: usize = 256;
        let pool = Pool::new(1);
        for name in ["HALF", "NO_HALF"] {
            let path = data.join(format!("quant/autogptq_REFERENCE_OLD_{name}_k256.npz"));
            let arrays = arrays(&std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display())));
            let array =
                |name: &str| &arrays.iter().find(|(own, _)| own == name).expect("an array of the archive").1[..];
            let halves = |name: &str| -> Vec<u16> {
                array(name).chunks_exact(2).map(|two| u16::from_le_bytes([two[0], two[1]])).collect()
            };
            let grouped = Grouped {
                format: Format::Gptq { bits: 4, zero: 1 },
                rows: SIZE,
                cols: SIZE,
                codes: array("qweight"),
                zeros: array("qzeros"),
                scales: halves("scales").into_iter().map(f16_to_f32).collect(),
                groups: (0..SIZE as u32).map(|k| k / 128).collect(),
            };
            let arrangement = grouped.arrangement().unwrap();
            assert_eq!(arrangement.order, None);
            let rows: Vec<usize> = (0..SIZE).collect();
            let blocks = grouped.blocks(&arrangement, &rows, &pool).unwrap();
            let w = pack(arrangement.ty, &blocks, SIZE, SIZE, &pool).unwrap();
            let x: Vec<f32> = halves("x").into_iter().map(f16_to_f32).collect();
            let ks = select(None).unwrap();
            let mut act = Activations::with_precision(Precision::A16);
            act.prepare(ks, &x, 1, SIZE, &[w.form], &pool);
            let mut y = vec![0f32; SIZE];
            matmul(ks, &w, &act, &mut y, SIZE, &pool);
            let expected = array("y_ref_cuda").chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap()));
            let worst = y.iter().zip(expected).map(|(&y, expected)| (y as f64 - expected).abs()).fold(0.0, f64::max);
            assert!(worst < 0.004, "{name}: {worst}");
            println!("{name}: {worst}");
        }
    }
}
