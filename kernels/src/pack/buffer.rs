//! Zeroed memory for weights, aligned to cache lines; large buffers on huge pages where the system has them (fewer TLB
//! misses: a fifth more read bandwidth).

use crate::error::{Error, Result};
use crate::pool::Pool;
use std::alloc::{alloc_zeroed, dealloc, Layout};
use std::ops::Deref;
use std::ptr::NonNull;

const LINE: usize = 64;
#[cfg(target_os = "linux")]
const HUGE_PAGE: usize = 2 << 20;

pub(crate) struct Buffer {
    start: NonNull<u8>,
    len: usize,
    memory: Memory,
}

enum Memory {
    Heap(Layout),
    #[cfg(target_os = "linux")]
    Map {
        base: *mut libc::c_void,
        len: usize,
    },
}

// SAFETY: the buffer owns its memory alone; shared access only reads.
unsafe impl Send for Buffer {}
// SAFETY: as above.
unsafe impl Sync for Buffer {}

impl Buffer {
    pub fn zeroed(len: usize) -> Result<Buffer> {
        #[cfg(target_os = "linux")]
        if len >= HUGE_PAGE {
            return Self::mapped(len);
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

    #[cfg(target_os = "linux")]
    fn mapped(len: usize) -> Result<Buffer> {
        // Room to start on a huge page's boundary.
        let map_len = len.checked_add(HUGE_PAGE).ok_or_else(|| Self::failed(len))?;
        let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new anonymous mapping at an address of the system's choice touches no other memory.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), map_len, access, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(Self::failed(len));
        }
        let skip = base.align_offset(HUGE_PAGE).min(HUGE_PAGE);
        // SAFETY: skip ≤ HUGE_PAGE, so skip + len lies within the mapping. The advice may be refused; nothing depends on it.
        let start = unsafe {
            libc::madvise(base.byte_add(skip), len, libc::MADV_HUGEPAGE);
            NonNull::new_unchecked(base.byte_add(skip).cast::<u8>())
        };
        Ok(Buffer { start, len, memory: Memory::Map { base, len: map_len } })
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
            Memory::Map { base, len } => {
                // SAFETY: the whole mapping made in `mapped`, not used any more.
                unsafe { libc::munmap(base, len) };
            }
        }
    }
}
