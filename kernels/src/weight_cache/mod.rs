//! Packed weights on disk, so that the next start need not pack them again.
//!
//! A matrix is a file of its own (`entry`), so that shards of any range of layers, of any number of processes, share them. Its
//! name is its address: SHA-256 of the source tensor's content, type and shape, and of the packed form. What a form means is
//! part of it as the packed bytes of a small probe matrix: a change of the layout changes every address by itself.
//!
//! The content's digest would have to be computed at every start, which reads the whole model and, without instructions for
//! SHA-256 (Raspberry Pi 4), takes longer than packing. So digests are kept too (`digests`), by what the file system tells of the
//! model's file (device, inode, size, times of modification and of change), as git's index does. The digest remains the
//! address: a copy, a renamed or a downloaded file of the same content finds the same entries, after it was hashed once.
//!
//! Nothing read is trusted. An entry says how long it is and what it holds, and every MiB of it has a checksum (XXH3; accidents
//! are to be noticed, and whoever may write here may change the kernels' library too); it is read, not mapped, into memory
//! whose size follows from the shape. Whatever does not fit is noted, and packed anew. That also stands in for `fsync`, which
//! on an SD card costs more than it saves: what a power cut leaves half-written fails its checksum. Writers make a file of
//! their own and rename it, so that any number of processes may read and write the same entries. A failure to write costs
//! nothing but the entry: it is noted, and nothing more is written for this shard.
//!
//! Small matrices are packed every time: that is done sooner than a file is opened. So is all of a file that was changed a moment
//! ago, and everything elsewhere than on Unix.

mod digests;
mod entry;
mod files;
#[cfg(test)]
mod tests;

use crate::cache;
use crate::error::Result;
use crate::pack::{pack_as, PackedForm, PackedMatrix, SourceType};
use crate::pool::Pool;
use digests::Digests;
use files::{free_bytes, replace_by};
use sha2::{Digest as _, Sha256};
use std::cell::{OnceCell, RefCell};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// A SHA-256.
type Digest = [u8; 32];

/// Source bytes from which on a matrix is worth a file: a millisecond of packing.
const SMALLEST: usize = 1 << 20;
/// Bytes that are checked, or hashed, together; the unit that threads share the work in.
const CHUNK: usize = 1 << 20;
/// Bytes that the cache leaves free in its file system.
const LEAVE_FREE: u64 = 1 << 30;
/// Age from which on a file that a writer left unfinished is nobody's.
const ABANDONED: Duration = Duration::from_secs(3600);

/// Where the cache lies, and how many bytes its entries may have.
#[derive(Debug, Clone, serde::Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct CacheChoice {
    /// Default: `cache::folder`.
    pub dir: Option<PathBuf>,
    pub max_bytes: u64,
}

/// The cache while one shard is loaded.
pub(crate) struct Cache {
    choice: Option<CacheChoice>,
    /// Opened for the first matrix that is worth it; `None`: there is none, everything is packed.
    open: OnceCell<Option<RefCell<Open>>>,
    smallest: usize,
    settled: Duration,
    notes: RefCell<Vec<String>>,
}

struct Open {
    entries: PathBuf,
    max_bytes: u64,
    digests: Digests,
    /// Bytes of this shard's entries, and of those the ones that were read.
    used: u64,
    read: u64,
    wrote: bool,
    writable: bool,
}

/// A matrix as the model's file has it.
#[derive(Clone, Copy)]
pub(crate) struct Source<'a> {
    pub ty: SourceType,
    pub rows: usize,
    pub cols: usize,
    /// Where `bytes` begins in the file.
    pub offset: u64,
    pub bytes: &'a [u8],
}

/// What a cache did for a shard.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct CacheReport {
    /// Packed bytes that needed no packing.
    pub read: u64,
    /// Troubles that cost time only, each a sentence.
    pub notes: Vec<String>,
}

impl Cache {
    pub fn new(choice: Option<&CacheChoice>) -> Cache {
        Self::with(choice, SMALLEST, digests::SETTLED)
    }

    fn with(choice: Option<&CacheChoice>, smallest: usize, settled: Duration) -> Cache {
        Cache { choice: choice.cloned(), open: OnceCell::new(), smallest, settled, notes: RefCell::default() }
    }

    fn open(&self, model: &File) -> Option<RefCell<Open>> {
        let mut notes = self.notes.borrow_mut();
        let open = Open::new(self.choice.as_ref()?, model, self.settled, &mut notes);
        open.unwrap_or_else(|e| {
            notes.push(format!("there is no cache of packed weights: {e}"));
            None
        })
        .map(RefCell::new)
    }

    /// The packed matrix of a tensor of `model`: read if it is known, else packed, and kept for the next time.
    pub fn matrix(&self, form: PackedForm, source: Source, model: &File, pool: &Pool) -> Result<PackedMatrix> {
        let Source { ty, rows, cols, bytes, .. } = source;
        let pack = || pack_as(form, ty, bytes, rows, cols, pool);
        if bytes.len() < self.smallest {
            return pack();
        }
        let Some(open) = self.open.get_or_init(|| self.open(model)) else { return pack() };
        let (mut open, mut notes) = (open.borrow_mut(), self.notes.borrow_mut());
        let address = address(&open.digests.of(source, pool), form, source)?;
        let path = open.entries.join(hex(&address));
        match entry::read(&path, &address, form, rows, cols, pool) {
            Ok(Some(matrix)) => {
                open.used += matrix.bytes() as u64;
                open.read += matrix.bytes() as u64;
                return Ok(matrix);
            }
            Ok(None) => {}
            Err(e) => notes.push(format!("a cached matrix is packed anew: {}: {e}", path.display())),
        }
        let matrix = pack()?;
        if let Err(e) = open.keep(&path, &address, &matrix, pool) {
            open.writable = false;
            notes.push(format!("packed weights are not kept: {}: {e}", path.display()));
        }
        Ok(matrix)
    }

    /// Keeps the digests that were computed, and makes room. To be called when all is loaded.
    pub fn close(self) -> CacheReport {
        let mut notes = self.notes.into_inner();
        let mut read = 0;
        if let Some(open) = self.open.into_inner().flatten().map(RefCell::into_inner) {
            read = open.read;
            let made_room = if open.wrote { make_room(&open.entries, open.max_bytes) } else { Ok(()) };
            if let Err(e) = made_room.and(open.digests.save()) {
                notes.push(format!("the cache of packed weights: {}: {e}", open.entries.display()));
            }
        }
        CacheReport { read, notes }
    }
}

impl Open {
    fn new(choice: &CacheChoice, model: &File, settled: Duration, notes: &mut Vec<String>) -> io::Result<Option<Open>> {
        let dir = choice.dir.clone().or_else(cache::folder);
        let dir = dir.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "there is no folder for it"))?;
        let (entries, digests) = (dir.join("weights"), dir.join("digests"));
        fs::create_dir_all(&entries)?;
        let digests = Digests::load(&digests, model, settled, notes)?;
        Ok(digests.map(|digests| Open {
            entries,
            max_bytes: choice.max_bytes,
            digests,
            used: 0,
            read: 0,
            wrote: false,
            writable: true,
        }))
    }

    /// Writes an entry, if there is room for it.
    fn keep(&mut self, path: &Path, address: &Digest, matrix: &PackedMatrix, pool: &Pool) -> io::Result<()> {
        self.used += matrix.bytes() as u64;
        // A shard that is larger than the cache would only push its own entries out; a file that was written to after it
        // was hashed has other content than the address says.
        if !self.writable || self.used > self.max_bytes || !self.digests.hold() {
            return Ok(());
        }
        if free_bytes(&self.entries).is_some_and(|free| free < LEAVE_FREE + matrix.bytes() as u64) {
            return Err(io::Error::new(io::ErrorKind::StorageFull, "the file system is nearly full"));
        }
        replace_by(path, |file| entry::write(file, address, matrix, pool))?;
        self.wrote = true;
        Ok(())
    }
}

/// The address of a matrix whose source has this digest, packed into `form`.
fn address(source: &Digest, form: PackedForm, Source { ty, rows, cols, .. }: Source) -> Result<Digest> {
    // More than a tile of rows and two blocks of columns, of bytes that are all different.
    let (probe_rows, probe_cols) = (form.tile_rows() + 1, 2 * ty.block_elements());
    let probe: Vec<u8> = (0..ty.tensor_bytes(probe_rows, probe_cols)?)
        .map(|i| (i as u32).wrapping_mul(0x9e37_79b1).to_be_bytes()[0])
        .collect();
    let probe = pack_as(form, ty, &probe, probe_rows, probe_cols, &Pool::new(1))?;
    let mut sha = Sha256::new();
    sha.update(b"lutra packed matrix\0");
    sha.update(source);
    for n in [ty as usize, rows, cols] {
        sha.update((n as u64).to_le_bytes());
    }
    sha.update(format!("{form:?}\0"));
    sha.update(probe.data());
    Ok(sha.finalize().into())
}

fn hex(digest: &Digest) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Deletes the entries that were longest not used until the rest has at most `max_bytes`, and what writers that died have left.
fn make_room(dir: &Path, max_bytes: u64) -> io::Result<()> {
    let now = SystemTime::now();
    let (mut entries, mut total) = (vec![], 0);
    for file in fs::read_dir(dir)? {
        // Another process may have deleted it meanwhile.
        let Ok((file, meta)) = file.and_then(|file| Ok((file.path(), file.metadata()?))) else { continue };
        let Ok(used) = meta.modified() else { continue };
        let name = file.file_name().and_then(|name| name.to_str()).unwrap_or("");
        if name.ends_with(".part") {
            if now.duration_since(used).is_ok_and(|age| age > ABANDONED) {
                let _ = fs::remove_file(&file);
            }
        } else if meta.is_file() && name.len() == 64 && name.bytes().all(|b| b.is_ascii_hexdigit()) {
            total += meta.len();
            entries.push((used, meta.len(), file));
        }
    }
    entries.sort();
    for (_, len, file) in entries {
        if total <= max_bytes {
            break;
        }
        match fs::remove_file(&file) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => total -= len,
        }
    }
    Ok(())
}
