//! A packed matrix in a file.
//!
//! Little-endian: `MAGIC`; the address (32 bytes); rows, columns, bytes of data (u64 each); the matrix's scale (f32);
//! the number of chunks (u32); XXH3 of every chunk of data (u64); XXH3 of all so far (u64); zeros up to a multiple of 4096; the data.

use super::files::{read_at, write_at};
use super::{Digest, CHUNK};
use crate::pack::{packed_bytes, Buffer, PackedForm, PackedMatrix};
use crate::pool::Pool;
use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::sync::Mutex;
use std::time::SystemTime;
use xxhash_rust::xxh3::xxh3_64;

const MAGIC: [u8; 8] = *b"LutraPW1";
const ALIGN: usize = 4096;

/// All before the data, without the zeros.
fn header(address: &Digest, [rows, cols, len]: [usize; 3], scale: f32, sums: &[u64]) -> Vec<u8> {
    let mut header = [&MAGIC[..], address].concat();
    for n in [rows, cols, len] {
        header.extend((n as u64).to_le_bytes());
    }
    header.extend(scale.to_le_bytes());
    header.extend((sums.len() as u32).to_le_bytes());
    header.extend(sums.iter().flat_map(|sum| sum.to_le_bytes()));
    let sum = xxh3_64(&header);
    header.extend(sum.to_le_bytes());
    header
}

/// Bytes before the scale.
const FIXED: usize = MAGIC.len() + 32 + 3 * 8;

/// Writes a matrix to a new file.
pub(super) fn write(file: &File, address: &Digest, matrix: &PackedMatrix, pool: &Pool) -> io::Result<()> {
    let data = matrix.data();
    let count = data.len().div_ceil(CHUNK);
    let shape = [matrix.rows, matrix.cols, data.len()];
    let start = header(address, shape, 0.0, &vec![0; count]).len().next_multiple_of(ALIGN);
    file.set_len((start + data.len()) as u64)?;
    let results: Vec<Mutex<io::Result<u64>>> = (0..count).map(|_| Mutex::new(Ok(0))).collect();
    pool.run(count, &|i| {
        let chunk = &data[i * CHUNK..data.len().min((i + 1) * CHUNK)];
        let written = write_at(file, chunk, (start + i * CHUNK) as u64).map(|()| xxh3_64(chunk));
        *results[i].lock().expect("no panic while it is held") = written;
    });
    let sums = results.into_iter().map(|sum| sum.into_inner().expect("as above"));
    let header = header(address, shape, matrix.scale(), &sums.collect::<io::Result<Vec<_>>>()?);
    write_at(file, &header, 0)
}

/// Reads the matrix of this address; `None` if there is none. Any other file there is an error.
///
/// It is read into anonymous memory, by all threads at once, rather than mapped: a mapped file is in pages of 4 KiB, and products
/// then read it at 25 instead of 31 GB/s (one thread, measured), always; reading it once costs less than packing. Nor can
/// a file that another process cuts short end this one with SIGBUS.
pub(super) fn read(
    path: &Path,
    address: &Digest,
    form: PackedForm,
    rows: usize,
    cols: usize,
    pool: &Pool,
) -> io::Result<Option<PackedMatrix>> {
    let bad = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
    match fs::metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Ok(meta) if meta.is_file() => {}
        Ok(_) => return Err(bad("no regular file".into())), // opening a pipe would wait for its writer
        Err(e) => return Err(e),
    }
    let file = match File::open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None), // deleted by another process just now
        file => file?,
    };
    let len = packed_bytes(form, rows, cols).map_err(|e| bad(e.message))?;
    let count = len.div_ceil(CHUNK);
    let mut found = vec![0; FIXED + 8 + 8 * count + 8];
    let start = found.len().next_multiple_of(ALIGN);
    let file_len = file.metadata()?.len();
    if file_len != (start + len) as u64 {
        return Err(bad(format!("it has {file_len} bytes, not {}", start + len)));
    }
    read_at(&file, &mut found, 0)?;
    let scale = f32::from_le_bytes(found[FIXED..][..4].try_into().expect("4 bytes"));
    let sums = found[FIXED + 8..][..8 * count].chunks_exact(8);
    let sums: Vec<u64> = sums.map(|sum| u64::from_le_bytes(sum.try_into().expect("8 bytes"))).collect();
    if found != header(address, [rows, cols, len], scale, &sums) {
        return Err(bad("its head is another matrix's, or damaged".into()));
    }
    let mut data = Buffer::zeroed(len).map_err(|e| bad(e.message))?;
    let failure = Mutex::new(None);
    data.par_chunks(pool, CHUNK, |i, chunk| {
        let done = read_at(&file, chunk, (start + i * CHUNK) as u64);
        let done = done.and_then(|()| match xxh3_64(chunk) {
            sum if sum == sums[i] => Ok(()),
            _ => Err(bad(format!("MiB {i} is damaged"))),
        });
        if let Err(e) = done {
            *failure.lock().expect("no panic while it is held") = Some(e);
        }
    });
    if let Some(e) = failure.into_inner().expect("as above") {
        return Err(e);
    }
    let _ = file.set_modified(SystemTime::now()); // when it was used last; where that is refused it ages sooner
    PackedMatrix::from_data(form, rows, cols, scale, data).map(Some).map_err(|e| bad(e.message))
}
