//! What the cache needs of the file system, as each kind of system has it.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// What tells whether a file is the same: device, inode, size, times of modification and of change (seconds, nanoseconds).
pub(super) type Identity = [u64; 7];

/// `None` on systems that have no time of change.
#[cfg(unix)]
pub(super) fn identity(file: &File) -> io::Result<Option<Identity>> {
    use std::os::unix::fs::MetadataExt;
    let m = file.metadata()?;
    let times = [m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec()].map(|t| t as u64);
    Ok(Some([m.dev(), m.ino(), m.size(), times[0], times[1], times[2], times[3]]))
}

#[cfg(not(unix))]
pub(super) fn identity(_file: &File) -> io::Result<Option<Identity>> {
    Ok(None)
}

/// Reads exactly `buf` at an offset.
pub(super) fn read_at(file: &File, buf: &mut [u8], offset: u64) -> io::Result<()> {
    #[cfg(unix)]
    return std::os::unix::fs::FileExt::read_exact_at(file, buf, offset);
    #[cfg(not(unix))]
    {
        let _ = (file, buf, offset);
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Writes all of `buf` at an offset.
pub(super) fn write_at(file: &File, buf: &[u8], offset: u64) -> io::Result<()> {
    #[cfg(unix)]
    return std::os::unix::fs::FileExt::write_all_at(file, buf, offset);
    #[cfg(not(unix))]
    {
        let _ = (file, buf, offset);
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Calls `f` with a new file, which then takes the place of `path` at once, or not at all. Unlike `cache::replace` it does not
/// wait for the disk.
pub(super) fn replace_by(path: &Path, f: impl FnOnce(&File) -> io::Result<()>) -> io::Result<()> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let temporary = path.with_extension(format!("{}-{}.part", std::process::id(), NEXT.fetch_add(1, Relaxed)));
    // Of a dead process that had the same number.
    let _ = fs::remove_file(&temporary);
    let file = File::options().write(true).create_new(true).open(&temporary)?;
    let done = f(&file).and_then(|()| fs::rename(&temporary, path));
    if done.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    done
}

/// Bytes that a folder's file system has left; `None` where that is not known.
#[cfg(unix)]
pub(super) fn free_bytes(dir: &Path) -> Option<u64> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(dir.as_os_str().as_bytes()).ok()?;
    let mut stat = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: the path ends with a zero, and `stat` has room for the result.
    if unsafe { libc::statvfs(path.as_ptr(), stat.as_mut_ptr()) } != 0 {
        return None;
    }
    // SAFETY: statvfs succeeded and has filled it.
    let stat = unsafe { stat.assume_init() };
    #[allow(clippy::unnecessary_cast)] // the fields' types differ by system
    (stat.f_bavail as u64).checked_mul(stat.f_frsize as u64)
}

#[cfg(not(unix))]
pub(super) fn free_bytes(_dir: &Path) -> Option<u64> {
    None
}
