//! Zeroed memory for weights, aligned to cache lines; large buffers on huge pages where the system has them (fewer TLB
//! misses: a fifth more read bandwidth). Buffers share mappings, as the part of a huge page at each end would be small pages,
//! 5 % of a decode step with the matrices of a small model.

use crate::arch::LINE;
use crate::error::{Error, Result};
use crate::pool::Pool;
use std::alloc::{alloc_zeroed, dealloc, Layout};
use std::ops::Deref;
use std::ptr::NonNull;

pub(crate) struct Buffer {
    start: NonNull<u8>,
    len: usize,
    memory: Memory,
}

enum Memory {
    Heap(Layout),
    /// Unmapped with the last buffer that lies there.
    #[cfg(target_os = "linux")]
    Map {
        _map: std::sync::Arc<map::Map>,
    },
}

#[cfg(target_os = "linux")]
mod map {
    use std::ptr::NonNull;
    use std::sync::{Arc, Mutex, PoisonError, Weak};

    const HUGE_PAGE: usize = 2 << 20;
    /// Bytes that buffers share; half of it or more is a buffer's own. What is not touched takes no memory.
    const SHARED: usize = 64 << 20;

    /// An anonymous mapping, zeroed, on huge pages if the system likes.
    pub struct Map {
        base: *mut libc::c_void,
        mapped: usize,
        start: NonNull<u8>,
        len: usize,
    }

    // SAFETY: the mapping belongs to this alone until it is dropped; its bytes belong to buffers, each to one.
    unsafe impl Send for Map {}
    // SAFETY: as above.
    unsafe impl Sync for Map {}

    impl Map {
        fn new(len: usize) -> Option<Map> {
            // Room to start on a huge page's boundary.
            let mapped = len.checked_add(HUGE_PAGE)?;
            let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            // SAFETY: a new anonymous mapping at an address of the system's choice touches no other memory.
            let base = unsafe { libc::mmap(std::ptr::null_mut(), mapped, access, flags, -1, 0) };
            if base == libc::MAP_FAILED {
                return None;
            }
            let skip = base.align_offset(HUGE_PAGE).min(HUGE_PAGE);
            // SAFETY: skip ≤ HUGE_PAGE, so skip + len lies within the mapping. The advice may be refused; nothing depends on it.
            let start = unsafe {
                libc::madvise(base.byte_add(skip), len, libc::MADV_HUGEPAGE);
                NonNull::new_unchecked(base.byte_add(skip).cast::<u8>())
            };
            Some(Map { base, mapped, start, len })
        }
    }

    impl Drop for Map {
        fn drop(&mut self) {
            // SAFETY: the whole mapping made in `new`, whose buffers are gone.
            unsafe { libc::munmap(self.base, self.mapped) };
        }
    }

    /// `len` bytes of a mapping that nobody had before, or `None` if the system has none. `len` is a multiple of cache lines.
    pub fn take(len: usize) -> Option<(Arc<Map>, NonNull<u8>)> {
        /// The newest shared mapping, as long as a buffer lies there, and how much of it is taken.
        static NEWEST: Mutex<(Weak<Map>, usize)> = Mutex::new((Weak::new(), 0));
        if len >= SHARED / 2 {
            let map = Arc::new(Map::new(len)?);
            let start = map.start;
            return Some((map, start));
        }
        let mut newest = NEWEST.lock().unwrap_or_else(PoisonError::into_inner);
        let map = match newest.0.upgrade() {
            Some(map) if map.len - newest.1 >= len => map,
            _ => {
                let map = Arc::new(Map::new(SHARED)?);
                *newest = (Arc::downgrade(&map), 0);
                map
            }
        };
        // SAFETY: taken + len ≤ the mapping's length.
        let start = unsafe { map.start.add(newest.1) };
        newest.1 += len;
        Some((map, start))
    }
}

// SAFETY: the buffer owns its memory alone; shared access only reads.
unsafe impl Send for Buffer {}
// SAFETY: as above.
unsafe impl Sync for Buffer {}

impl Buffer {
    pub fn zeroed(len: usize) -> Result<Buffer> {
        /// Smaller ones are left to the heap, which reuses their memory.
        #[cfg(target_os = "linux")]
        const LARGE: usize = 128 << 10;
        #[cfg(target_os = "linux")]
        if len >= LARGE {
            let taken = len.checked_next_multiple_of(LINE).and_then(map::take);
            let (map, start) = taken.ok_or_else(|| Self::failed(len))?;
            return Ok(Buffer { start, len, memory: Memory::Map { _map: map } });
        }
        Self::heap(len)
    }

    fn failed(len: usize) -> Error {
        Error::exhausted(format!("no memory for {len} bytes of weights"))
    }

    fn heap(len: usize) -> Result<Buffer> {
        let layout = Layout::from_size_align(len.max(1), LINE).map_err(|_| Self::failed(len))?;
        // SAFETY: the layout has a size above 0.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(|| Self::failed(len))?;
        Ok(Buffer { start, len, memory: Memory::Heap(layout) })
    }

    /// Calls `f(index, chunk)` for every chunk of `size` bytes (the last may be shorter), spread over the pool.
    pub fn par_chunks(&mut self, pool: &Pool, size: usize, f: impl Fn(usize, &mut [u8]) + Sync) {
        assert!(size > 0, "chunks of no bytes");
        let (base, len) = (self.start.as_ptr() as usize, self.len);
        pool.run(len.div_ceil(size), &|index| {
            let at = index * size;
            // SAFETY: chunk `index` lies within the buffer, which is borrowed mutably here, and the pool hands out every
            // index once.
            f(index, unsafe { std::slice::from_raw_parts_mut((base + at) as *mut u8, size.min(len - at)) });
        });
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `start` is valid for `len` initialised bytes as long as the buffer lives.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        match self.memory {
            // SAFETY: allocated with this layout, and not used any more.
            Memory::Heap(layout) => unsafe { dealloc(self.start.as_ptr(), layout) },
            #[cfg(target_os = "linux")]
            Memory::Map { .. } => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_share_no_byte_and_are_zeroed_whatever_was_there_before() {
        let pool = Pool::new(2);
        let sizes = [1, 100, 200 << 10, (128 << 10) + 1, 3 << 20, 40 << 20, 31 << 20, 31 << 20, 200 << 10];
        for _ in 0..2 {
            let mut buffers: Vec<Buffer> = sizes.iter().map(|&len| Buffer::zeroed(len).unwrap()).collect();
            for (i, buffer) in buffers.iter_mut().enumerate() {
                assert!(buffer.len() == sizes[i] && buffer.as_ptr().align_offset(LINE) == 0);
                assert!(buffer.iter().all(|&byte| byte == 0), "buffer {i}");
                buffer.par_chunks(&pool, 1 << 20, |_, bytes| bytes.fill(i as u8 + 1));
            }
            buffers.remove(4);
            let again = Buffer::zeroed(3 << 20).unwrap();
            assert!(again.iter().all(|&byte| byte == 0));
            for (i, buffer) in buffers.iter().enumerate() {
                let value = if i < 4 { i + 1 } else { i + 2 } as u8;
                assert!(buffer.iter().all(|&byte| byte == value), "buffer {i}");
            }
        }
        assert!(Buffer::zeroed(usize::MAX).is_err());
        assert!(Buffer::zeroed(usize::MAX - LINE).is_err());
    }
}
