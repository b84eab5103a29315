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
use std::borrow::Cow;
use std::cell::{OnceCell, RefCell};
use std::collections::HashMap;
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
    /// Where digests are kept, and those of each file; `None`: it has changed a moment ago.
    dir: PathBuf,
    settled: Duration,
    digests: HashMap<usize, Option<Digests>>,
    /// Bytes of this shard's entries, and of those the ones that were read.
    used: u64,
    read: u64,
    wrote: bool,
    writable: bool,
}

/// A matrix as the model's files have it.
#[derive(Clone, Copy)]
pub(crate) struct Source<'a> {
    /// What is packed.
    pub ty: SourceType,
    pub rows: usize,
    pub cols: usize,
    /// What it is made of.
    pub parts: &'a [Part<'a>],
    /// What it depends on beside; empty if the only part is packed as it is.
    pub how: &'a str,
}

/// Bytes of a file.
#[derive(Clone, Copy)]
pub(crate) struct Part<'a> {
    /// The file, and its number among the model's.
    pub file: (usize, &'a File),
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

    fn open(&self) -> Option<RefCell<Open>> {
        match Open::new(self.choice.as_ref()?, self.settled) {
            Ok(open) => Some(RefCell::new(open)),
            Err(e) => {
                self.notes.borrow_mut().push(format!("there is no cache of packed weights: {e}"));
                None
            }
        }
    }

    /// The packed matrix of a source: read if it is known, else packed, and kept for the next time. `make` gives the bytes that are
    /// packed.
    pub fn matrix<'a>(
        &self,
        form: PackedForm,
        source: Source,
        make: impl Fn() -> Result<Cow<'a, [u8]>>,
        pool: &Pool,
    ) -> Result<PackedMatrix> {
        let Source { ty, rows, cols, parts, .. } = source;
        let pack = || pack_as(form, ty, &make()?, rows, cols, pool);
        if ty.tensor_bytes(rows, cols)? < self.smallest {
            return pack();
        }
        let Some(open) = self.open.get_or_init(|| self.open()) else { return pack() };
        let (mut open, mut notes) = (open.borrow_mut(), self.notes.borrow_mut());
        let mut digests = Vec::with_capacity(parts.len());
        for &part in parts {
            match open.digest(part, pool, &mut notes) {
                Some(digest) => digests.push(digest),
                None => return pack(),
            }
        }
        let address = address(&digests, form, source)?;
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
            let saved = || open.digests.values().flatten().try_for_each(Digests::save);
            if let Err(e) = made_room.and_then(|()| saved()) {
                notes.push(format!("the cache of packed weights: {}: {e}", open.entries.display()));
            }
        }
        CacheReport { read, notes }
    }
}

impl Open {
    fn new(choice: &CacheChoice, settled: Duration) -> io::Result<Open> {
        let dir = choice.dir.clone().or_else(cache::folder);
        let dir = dir.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "there is no folder for it"))?;
        let (entries, dir) = (dir.join("weights"), dir.join("digests"));
        fs::create_dir_all(&entries)?;
        let (max_bytes, digests) = (choice.max_bytes, HashMap::new());
        Ok(Open { entries, max_bytes, dir, settled, digests, used: 0, read: 0, wrote: false, writable: true })
    }

    /// The digest of a part, if its file can be told from later ones.
    fn digest(&mut self, part: Part, pool: &Pool, notes: &mut Vec<String>) -> Option<Digest> {
        let (index, file) = part.file;
        let digests = self.digests.entry(index).or_insert_with(|| {
            Digests::load(&self.dir, file, self.settled, notes).unwrap_or_else(|e| {
                notes.push(format!("packed weights are not kept: {}: {e}", self.dir.display()));
                None
            })
        });
        digests.as_mut().map(|digests| digests.of(part, pool))
    }

    /// Writes an entry, if there is room for it.
    fn keep(&mut self, path: &Path, address: &Digest, matrix: &PackedMatrix, pool: &Pool) -> io::Result<()> {
        self.used += matrix.bytes() as u64;
        // A shard that is larger than the cache would only push its own entries out; a file that was written to after it
        // was hashed has other content than the address says.
        let held = self.digests.values().flatten().all(Digests::hold);
        if !self.writable || self.used > self.max_bytes || !held {
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

/// The address of a matrix whose parts have these digests, packed into `form`.
fn address(parts: &[Digest], form: PackedForm, Source { ty, rows, cols, how, .. }: Source) -> Result<Digest> {
    // More than a tile of rows and two blocks of columns, of bytes that are all different.
    let (probe_rows, probe_cols) = (form.tile_rows() + 1, 2 * ty.block_elements());
    let probe: Vec<u8> = (0..ty.tensor_bytes(probe_rows, probe_cols)?)
        .map(|i| (i as u32).wrapping_mul(0x9e37_79b1).to_be_bytes()[0])
        .collect();
    let probe = pack_as(form, ty, &probe, probe_rows, probe_cols, &Pool::new(1))?;
    let mut sha = Sha256::new();
    sha.update(b"lutra packed matrix\0");
    parts.iter().for_each(|part| sha.update(part));
    sha.update(how);
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
