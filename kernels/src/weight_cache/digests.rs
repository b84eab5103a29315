//! Digests of a model file's tensors, kept as long as the file is the same.
//!
//! A file counts as the same if its device, inode, size and times are. The time of change (ctime) is set by the system at
//! every write and cannot be set back, so that neither `cp -p` nor `rsync --times` onto the file pass unnoticed. Digests are
//! kept only of files whose times lie well before the first byte was hashed and are the same afterwards: a write at the
//! same tick of the file system's clock could not be told from the one before ("racy git").
//!
//! A digest is SHA-256 over the SHA-256s of a tensor's MiBs, so that all threads can hash.

use super::files::{identity, Identity};
use super::{hex, Digest, Part, CHUNK};
use crate::cache;
use crate::pool::Pool;
use sha2::{Digest as _, Sha256};
use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use xxhash_rust::xxh3::xxh3_64;

const MAGIC: [u8; 8] = *b"LutraSD1";
/// How long a file must not have changed; the coarsest clock of a file system (FAT's) has ticks of two seconds.
pub(super) const SETTLED: Duration = Duration::from_secs(3);
/// Bytes of a record: offset, length, digest.
const RECORD: usize = 8 + 8 + 32;
/// More tensors than any model has.
const MOST_RECORDS: u64 = 1 << 20;

pub(super) struct Digests {
    model: File,
    identity: Identity,
    /// Where they are kept.
    path: PathBuf,
    /// By offset and length.
    known: HashMap<(u64, u64), Digest>,
    changed: bool,
}

/// Whether the file has not changed for so long.
fn settled([_, _, _, mtime, mtime_nsec, ctime, ctime_nsec]: Identity, settled: Duration) -> bool {
    let Ok(now) = SystemTime::now().duration_since(UNIX_EPOCH) else { return false };
    let time = |seconds, nanos: u64| Duration::from_secs(seconds) + Duration::from_nanos(nanos);
    let changed = time(mtime, mtime_nsec).max(time(ctime, ctime_nsec));
    changed.checked_add(settled).is_some_and(|then| then <= now)
}

impl Digests {
    /// What is known of the file, of which nothing was read yet; `None` if it has changed within `settled_for`.
    pub fn load(
        dir: &Path,
        model: &File,
        settled_for: Duration,
        notes: &mut Vec<String>,
    ) -> io::Result<Option<Digests>> {
        let Some(identity) = identity(model)?.filter(|now| settled(*now, settled_for)) else { return Ok(None) };
        let words: Vec<u8> = identity.iter().flat_map(|word| word.to_le_bytes()).collect();
        let path = dir.join(hex(&Sha256::digest(&words).into()));
        let known = read(&path, identity).unwrap_or_else(|e| {
            if e.kind() != io::ErrorKind::NotFound {
                notes.push(format!("digests of a model are computed anew: {}: {e}", path.display()));
            }
            HashMap::new()
        });
        Ok(Some(Digests { model: model.try_clone()?, identity, path, known, changed: false }))
    }

    /// Whether the file is still the one that the digests are of.
    pub fn hold(&self) -> bool {
        identity(&self.model).is_ok_and(|now| now == Some(self.identity))
    }

    /// The digest of a tensor.
    pub fn of(&mut self, part: Part, pool: &Pool) -> Digest {
        let (offset, len) = (part.offset, part.bytes.len() as u64);
        *self.known.entry((offset, len)).or_insert_with(|| {
            self.changed = true;
            digest(part.bytes, pool)
        })
    }

    /// Keeps what was computed, if the file is still the same.
    pub fn save(&self) -> io::Result<()> {
        if !self.changed || !self.hold() {
            return Ok(());
        }
        // Other shards of the file may have been loaded meanwhile.
        let mut known = read(&self.path, self.identity).unwrap_or_default();
        known.extend(&self.known);
        let mut bytes = head(self.identity);
        for ((offset, len), digest) in known {
            bytes.extend(offset.to_le_bytes());
            bytes.extend(len.to_le_bytes());
            bytes.extend(digest);
        }
        bytes.extend(xxh3_64(&bytes).to_le_bytes());
        cache::replace(&self.path, &bytes)
    }
}

fn head(identity: Identity) -> Vec<u8> {
    MAGIC.into_iter().chain(identity.iter().flat_map(|word| word.to_le_bytes())).collect()
}

fn read(path: &Path, identity: Identity) -> io::Result<HashMap<(u64, u64), Digest>> {
    let bad = || io::Error::new(io::ErrorKind::InvalidData, "it is damaged");
    let meta = fs::metadata(path)?;
    let head = head(identity);
    if !meta.is_file() || meta.len() > head.len() as u64 + 8 + MOST_RECORDS * RECORD as u64 {
        return Err(bad());
    }
    let bytes = fs::read(path)?;
    let (bytes, sum) = bytes.split_last_chunk::<8>().ok_or_else(bad)?;
    let records = bytes.strip_prefix(&head[..]).ok_or_else(bad)?;
    if xxh3_64(bytes) != u64::from_le_bytes(*sum) || records.len() % RECORD != 0 {
        return Err(bad());
    }
    let word = |record: &[u8], at: usize| u64::from_le_bytes(record[at..at + 8].try_into().expect("8 bytes"));
    let records = records.chunks_exact(RECORD);
    Ok(records.map(|r| ((word(r, 0), word(r, 8)), r[16..].try_into().expect("32 bytes"))).collect())
}

pub(super) fn digest(bytes: &[u8], pool: &Pool) -> Digest {
    let parts: Vec<Mutex<Digest>> = bytes.chunks(CHUNK).map(|_| Mutex::new([0; 32])).collect();
    pool.run(parts.len(), &|i| {
        let chunk = &bytes[i * CHUNK..bytes.len().min((i + 1) * CHUNK)];
        *parts[i].lock().expect("no panic while it is held") = Sha256::digest(chunk).into();
    });
    let mut sha = Sha256::new();
    sha.update(b"lutra tensor\0");
    sha.update((bytes.len() as u64).to_le_bytes());
    for part in parts {
        sha.update(part.into_inner().expect("as above"));
    }
    sha.finalize().into()
}
