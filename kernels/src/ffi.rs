//! The C ABI: the only exported symbols.
//!
//! Every function returns a number ≥ 0 or a negative code (`Error`), and in that case writes to `err` a `u32` length and
//! so many bytes of UTF-8 text. Buffers belong to the caller and are used during the call only; null is fine where the
//! length is 0. No panic leaves a function. Shards and lanes are known by handles that are never reused while the process lives.

#[cfg(unix)]
mod lane;

use crate::descriptor::Descriptor;
use crate::dispatch::{available, select};
use crate::error::{Error, Result};
use crate::matmul::{matmul, Activations};
use crate::pack::{pack, SourceType};
use crate::pool::Pool;
use crate::shard::{Progress, Shard};
use std::collections::BTreeMap;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

#[cfg(unix)]
pub use lane::*;

/// Version of this interface, and of what it computes: the same version means the same bits.
pub const ABI_VERSION: i32 = 4;

/// What is open, by handle.
struct Registry<T> {
    kind: &'static str,
    last: AtomicU32,
    open: Mutex<BTreeMap<u32, Arc<T>>>,
}

impl<T> Registry<T> {
    const fn new(kind: &'static str) -> Self {
        Registry { kind, last: AtomicU32::new(0), open: Mutex::new(BTreeMap::new()) }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, Arc<T>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, value: T) -> Result<u32> {
        let last = self.last.fetch_update(Relaxed, Relaxed, |last| last.checked_add(1));
        let handle = last.map_err(|_| Error::new(Error::EXHAUSTED, "all handles are used up"))? + 1;
        self.lock().insert(handle, Arc::new(value));
        Ok(handle)
    }

    /// It stays alive until the last call on it ends, closed or not.
    fn get(&self, handle: u32) -> Result<Arc<T>> {
        self.lock().get(&handle).cloned().ok_or_else(|| self.unknown(handle))
    }

    /// Takes it off the list; it ends with the last call on it.
    fn remove(&self, handle: u32) -> Result<Arc<T>> {
        self.lock().remove(&handle).ok_or_else(|| self.unknown(handle))
    }

    fn unknown(&self, handle: u32) -> Error {
        Error::new(Error::BAD_HANDLE, format!("no {} has handle {handle}", self.kind))
    }
}

static SHARDS: Registry<Shard> = Registry::new("shard");

/// Runs `f`, and turns its error or panic into a code and a text.
fn guard(err: *mut u8, err_len: usize, f: impl FnOnce() -> Result<i32>) -> i32 {
    let outcome = catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|panic| {
        let text = panic
            .downcast_ref::<&str>()
            .map(|s| (*s).to_string())
            .or_else(|| panic.downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "unknown".to_string());
        Err(Error::new(Error::PANIC, format!("the kernel library panicked, which is a bug: {text}")))
    });
    match outcome {
        Ok(value) => value,
        Err(error) => {
            // SAFETY: the caller vouches for err_len bytes at err.
            unsafe { tell(err, err_len, &error.message) };
            error.code.min(-1)
        }
    }
}

/// Writes a text, cut to what fits, behind its length.
///
/// # Safety
/// `err` is valid for `err_len` bytes, or null.
unsafe fn tell(err: *mut u8, err_len: usize, text: &str) {
    if err.is_null() || err_len < 4 {
        return;
    }
    let mut n = text.len().min(err_len - 4).min(u32::MAX as usize);
    while !text.is_char_boundary(n) {
        n -= 1;
    }
    // SAFETY: the caller vouches for err_len bytes at err, and 4 + n ≤ err_len.
    unsafe {
        core::ptr::copy_nonoverlapping((n as u32).to_le_bytes().as_ptr(), err, 4);
        core::ptr::copy_nonoverlapping(text.as_ptr(), err.add(4), n);
    }
}

/// # Safety
/// `p` is valid for `len` bytes, or null.
unsafe fn input<'a>(p: *const u8, len: usize, what: &str) -> Result<&'a [u8]> {
    if len == 0 {
        return Ok(&[]);
    }
    if p.is_null() || len > isize::MAX as usize {
        return Err(Error::argument(format!("{what} is null or too long")));
    }
    // SAFETY: the caller's.
    Ok(unsafe { core::slice::from_raw_parts(p, len) })
}

/// # Safety
/// `p` is valid for `len` bytes that nothing else uses, or null.
unsafe fn buffer<'a>(p: *mut u8, len: usize, what: &str) -> Result<&'a mut [u8]> {
    if len == 0 {
        return Ok(&mut []);
    }
    if p.is_null() || len > isize::MAX as usize {
        return Err(Error::argument(format!("{what} is null or too long")));
    }
    // SAFETY: the caller's.
    Ok(unsafe { core::slice::from_raw_parts_mut(p, len) })
}

/// `rows × cols` floats in bytes, if a caller's buffer of `len` bytes holds them.
fn room(rows: usize, cols: usize, len: usize, what: &str) -> Result<()> {
    match rows.checked_mul(cols).and_then(|n| n.checked_mul(4)) {
        Some(needed) if needed <= len => Ok(()),
        _ => Err(Error::argument(format!("{what} has {len} bytes; {rows} × {cols} floats are needed"))),
    }
}

/// Copies `bytes` to a caller's buffer.
///
/// # Safety
/// `p` is valid for `len` bytes, or null.
unsafe fn output(p: *mut u8, len: usize, bytes: &[u8], what: &str) -> Result<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    if p.is_null() || len < bytes.len() {
        return Err(Error::argument(format!("{what} has {len} bytes; {} are needed", bytes.len())));
    }
    // SAFETY: the caller's, and the length was checked.
    unsafe { core::ptr::copy_nonoverlapping(bytes.as_ptr(), p, bytes.len()) };
    Ok(())
}

fn count(n: usize) -> Result<i32> {
    i32::try_from(n).map_err(|_| Error::argument("the result is too long"))
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

fn bytes_of(floats: &[f32]) -> Vec<u8> {
    floats.iter().flat_map(|x| x.to_le_bytes()).collect()
}

#[no_mangle]
pub extern "C" fn lutra_abi_version() -> i32 {
    ABI_VERSION
}

/// JSON of the device: instruction sets and cores.
///
/// # Safety
/// Each pointer is valid for its length.
#[no_mangle]
pub unsafe extern "C" fn lutra_device_info(out: *mut u8, out_len: usize, err: *mut u8, err_len: usize) -> i32 {
    guard(err, err_len, || {
        let names: Vec<&str> = available().iter().map(|ks| ks.isa.name()).collect();
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let json =
            serde_json::json!({ "isa": select(None)?.isa.name(), "available": names, "cores": cores }).to_string();
        // SAFETY: the caller's.
        unsafe { output(out, out_len, json.as_bytes(), "out")? };
        count(json.len())
    })
}

/// Memory read bandwidth in GB/s as an f64.
///
/// # Safety
/// Each pointer is valid for its length.
#[no_mangle]
pub unsafe extern "C" fn lutra_measure_bandwidth(
    threads: u32,
    mebibytes: u32,
    out: *mut u8,
    out_len: usize,
    err: *mut u8,
    err_len: usize,
) -> i32 {
    guard(err, err_len, || {
        if !(1..=1024).contains(&threads) || !(1..=65536).contains(&mebibytes) {
            return Err(Error::argument("threads must be 1 to 1024 and mebibytes 1 to 65536"));
        }
        let pool = Pool::new(threads as usize);
        let rate = crate::bandwidth::measure_read_bandwidth(select(None)?, &pool, (mebibytes as usize) << 20)?;
        // SAFETY: the caller's.
        unsafe { output(out, out_len, &rate.to_le_bytes(), "out")? };
        Ok(0)
    })
}

/// Opens a shard and writes its handle. `progress`, unless its length is 0, receives two `u64`s while the call runs: parts
/// done, and parts in all. Returns 1 instead of 0 when the shard is open but something went wrong that only costs time (its
/// cache of packed weights): then `err` says what, as for an error.
///
/// # Safety
/// Each pointer is valid for its length; `progress` is aligned for a u64, and others access it atomically only.
#[no_mangle]
pub unsafe extern "C" fn lutra_shard_open(
    descriptor: *const u8,
    descriptor_len: usize,
    progress: *const u8,
    progress_len: usize,
    handle: *mut u8,
    handle_len: usize,
    err: *mut u8,
    err_len: usize,
) -> i32 {
    guard(err, err_len, || {
        // SAFETY: the caller's.
        let json = unsafe { input(descriptor, descriptor_len, "descriptor")? };
        if handle.is_null() || handle_len < 4 {
            return Err(Error::argument("handle needs 4 bytes"));
        }
        let unwatched = Progress::default();
        let progress = if progress_len == 0 {
            &unwatched
        } else if progress.is_null() || progress_len < size_of::<Progress>() || progress.align_offset(8) != 0 {
            return Err(Error::argument("progress needs 16 aligned bytes"));
        } else {
            // SAFETY: not null, long enough and aligned; any bits are two u64; others access it atomically.
            unsafe { &*progress.cast::<Progress>() }
        };
        let shard = Shard::open_watched(&Descriptor::parse(json)?, progress)?;
        let notes = shard.notes().join("; ");
        let number = SHARDS.add(shard)?;
        // SAFETY: the caller's.
        unsafe { output(handle, handle_len, &number.to_le_bytes(), "handle")? };
        if notes.is_empty() {
            return Ok(0);
        }
        // SAFETY: the caller's.
        unsafe { tell(err, err_len, &notes) };
        Ok(1)
    })
}

/// Computes a micro-batch. `stop` may become non-zero meanwhile: then the call ends before the next layer.
///
/// # Safety
/// Each pointer is valid for its length; `stop` is aligned for an i32.
#[no_mangle]
pub unsafe extern "C" fn lutra_shard_forward(
    handle: u32,
    batch: *const u8,
    batch_len: usize,
    input_states: *const u8,
    input_len: usize,
    stop: *const u8,
    stop_len: usize,
    out: *mut u8,
    out_len: usize,
    written: *mut u8,
    written_len: usize,
    err: *mut u8,
    err_len: usize,
) -> i32 {
    guard(err, err_len, || {
        // SAFETY: the caller's.
        let (batch, states) = unsafe { (input(batch, batch_len, "batch")?, input(input_states, input_len, "input")?) };
        let stop = if stop.is_null() || stop_len < 4 {
            None
        } else if stop.align_offset(4) != 0 {
            return Err(Error::argument("stop is not aligned"));
        } else {
            // SAFETY: valid for 4 bytes and aligned; others access it atomically.
            Some(unsafe { &*stop.cast::<AtomicI32>() })
        };
        if written.is_null() || written_len < 4 {
            return Err(Error::argument("written needs 4 bytes"));
        }
        // SAFETY: the caller's.
        let out = unsafe { buffer(out, out_len.min(i32::MAX as usize), "output")? };
        let bytes = SHARDS.get(handle)?.forward(batch, states, stop, out)?;
        // SAFETY: the caller's.
        unsafe { output(written, written_len, &(bytes as u32).to_le_bytes(), "written")? };
        Ok(0)
    })
}

/// Forgets positions of a sequence from `length` on; 0 frees it.
///
/// # Safety
/// `err` is valid for `err_len` bytes.
#[no_mangle]
pub unsafe extern "C" fn lutra_shard_truncate(handle: u32, seq: u32, length: u32, err: *mut u8, err_len: usize) -> i32 {
    guard(err, err_len, || {
        SHARDS.get(handle)?.truncate(seq, length as usize);
        Ok(0)
    })
}

/// JSON of what the shard holds.
///
/// # Safety
/// Each pointer is valid for its length.
#[no_mangle]
pub unsafe extern "C" fn lutra_shard_stats(
    handle: u32,
    out: *mut u8,
    out_len: usize,
    err: *mut u8,
    err_len: usize,
) -> i32 {
    guard(err, err_len, || {
        let json = serde_json::to_string(&SHARDS.get(handle)?.stats()).map_err(|e| Error::argument(e.to_string()))?;
        // SAFETY: the caller's.
        unsafe { output(out, out_len, json.as_bytes(), "out")? };
        count(json.len())
    })
}

/// Measures kernels for matrices (`tune::Request`, JSON), and tells of it (`tune::Report`, JSON).
///
/// # Safety
/// Each pointer is valid for its length.
#[no_mangle]
pub unsafe extern "C" fn lutra_tune(
    request: *const u8,
    request_len: usize,
    out: *mut u8,
    out_len: usize,
    err: *mut u8,
    err_len: usize,
) -> i32 {
    guard(err, err_len, || {
        // SAFETY: the caller's.
        let report = crate::tune::tune(unsafe { input(request, request_len, "request")? })?;
        let json = serde_json::to_string(&report).map_err(|e| Error::argument(e.to_string()))?;
        // SAFETY: the caller's.
        unsafe { output(out, out_len, json.as_bytes(), "out")? };
        count(json.len())
    })
}

/// Closes a shard; a call in flight on it ends first.
///
/// # Safety
/// `err` is valid for `err_len` bytes.
#[no_mangle]
pub unsafe extern "C" fn lutra_shard_close(handle: u32, err: *mut u8, err_len: usize) -> i32 {
    guard(err, err_len, || {
        // Dropped outside the lock: unmapping takes a while.
        SHARDS.remove(handle).map(|_| 0)
    })
}

fn matrix(kind: u32, src: &[u8], rows: u32, cols: u32, pool: &Pool) -> Result<crate::pack::PackedMatrix> {
    let ty = SourceType::from_ggml(kind)?;
    let (rows, cols) = (rows as usize, cols as usize);
    if rows == 0 || cols == 0 || ty.tensor_bytes(rows, cols)? != src.len() {
        return Err(Error::argument(format!("{} bytes are no matrix of {rows} × {cols}", src.len())));
    }
    pack(ty, src, rows, cols, pool)
}

/// Packs a matrix and unpacks it, for tests.
///
/// # Safety
/// Each pointer is valid for its length.
#[no_mangle]
pub unsafe extern "C" fn lutra_unpack(
    kind: u32,
    src: *const u8,
    src_len: usize,
    out: *mut u8,
    out_len: usize,
    rows: u32,
    cols: u32,
    err: *mut u8,
    err_len: usize,
) -> i32 {
    guard(err, err_len, || {
        room(rows as usize, cols as usize, out_len, "out")?;
        // SAFETY: the caller's.
        let packed = matrix(kind, unsafe { input(src, src_len, "src")? }, rows, cols, &Pool::new(1))?;
        let mut values = vec![0.0; rows as usize * cols as usize];
        for (i, row) in values.chunks_exact_mut(cols as usize).enumerate() {
            packed.unpack_row(i, row);
        }
        // SAFETY: the caller's.
        unsafe { output(out, out_len, &bytes_of(&values), "out")? };
        Ok(0)
    })
}

/// `y[n × rows] = x[n × cols] · Wᵀ`, for tests and benchmarks.
///
/// # Safety
/// Each pointer is valid for its length.
#[no_mangle]
pub unsafe extern "C" fn lutra_matmul(
    kind: u32,
    src: *const u8,
    src_len: usize,
    rows: u32,
    cols: u32,
    x: *const u8,
    x_len: usize,
    n: u32,
    y: *mut u8,
    y_len: usize,
    threads: u32,
    isa: *const u8,
    isa_len: usize,
    err: *mut u8,
    err_len: usize,
) -> i32 {
    guard(err, err_len, || {
        // SAFETY: the caller's.
        let (src, x, isa) =
            unsafe { (input(src, src_len, "src")?, input(x, x_len, "x")?, input(isa, isa_len, "isa")?) };
        if !(1..=1024).contains(&threads) {
            return Err(Error::argument("threads must be 1 to 1024"));
        }
        room(n as usize, rows as usize, y_len, "y")?;
        let isa = core::str::from_utf8(isa).map_err(|_| Error::argument("isa is no UTF-8"))?;
        let ks = select((!isa.is_empty()).then_some(isa))?;
        let pool = Pool::new(threads as usize);
        let w = matrix(kind, src, rows, cols, &pool)?;
        let (n, rows, cols) = (n as usize, rows as usize, cols as usize);
        if n.checked_mul(cols).and_then(|f| f.checked_mul(4)) != Some(x.len()) {
            return Err(Error::argument(format!("x has {} bytes, not {n} × {cols} floats", x.len())));
        }
        if n == 0 {
            return Ok(0);
        }
        let mut act = Activations::new();
        act.prepare(ks, &floats(x), n, cols, &[w.form], &pool);
        let mut result = vec![0.0; n * rows];
        matmul(ks, &w, &act, &mut result, rows, &pool);
        // SAFETY: the caller's.
        unsafe { output(y, y_len, &bytes_of(&result), "y")? };
        Ok(0)
    })
}
