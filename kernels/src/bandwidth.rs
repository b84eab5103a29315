//! How fast this machine's memory can be read: what kernels are compared with, and what placement divides layers by.
//!
//! No single way of reading is the fastest everywhere: how far the processor looks ahead by itself differs. So there are
//! several, and the fastest counts; a kernel's share of it is then no better than the kernel is.

use crate::arch::{prefetch, LINE};
use crate::dispatch::Kernels;
use crate::error::Result;
use crate::pack::Buffer;
use crate::pool::Pool;
use std::hint::black_box;
use std::time::Instant;

const PASSES: usize = 3;
/// Bytes read between two rounds of prefetching: a few lines, or they wait for each other.
const STEP: usize = 1024;

/// A way of reading memory at full width.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reading {
    /// One stream, looked ahead by the processor alone.
    Plain,
    /// One stream, its lines asked for so many bytes ahead.
    Ahead(usize),
    /// So many streams side by side.
    Streams(usize),
}

impl Reading {
    pub const ALL: [Reading; 4] = [Reading::Plain, Reading::Ahead(1024), Reading::Ahead(2048), Reading::Streams(4)];

    /// Reads every whole word of `bytes` on this thread.
    pub fn read(self, ks: &Kernels, bytes: &[u8]) {
        self.steps(bytes, |bytes| {
            // SAFETY: every bit pattern is a u64; `align_to` splits correctly. `ks` is usable on this machine.
            black_box(unsafe { (ks.read)(bytes.align_to::<u64>().1) });
        });
    }

    /// Calls `read` on every part of `bytes` once, in the order of this way.
    #[inline(always)]
    fn steps(self, bytes: &[u8], mut read: impl FnMut(&[u8])) {
        match self {
            Reading::Plain => read(bytes),
            Reading::Ahead(distance) => {
                for step in bytes.chunks(STEP) {
                    for line in (0..step.len()).step_by(LINE) {
                        prefetch::<1>(step.as_ptr().wrapping_add(distance + line));
                    }
                    read(step);
                }
            }
            Reading::Streams(n) => {
                let part = (bytes.len() / n).next_multiple_of(STEP).max(STEP);
                for at in (0..part).step_by(STEP) {
                    for stream in bytes.chunks(part).filter(|stream| at < stream.len()) {
                        read(&stream[at..stream.len().min(at + STEP)]);
                    }
                }
            }
        }
    }
}

/// Read bandwidth in GB/s (10⁹ bytes a second): the best of several passes, each way of reading, of all the pool's threads
/// over `bytes` of memory, which should be several times the last cache. Weights live in the same kind of memory.
pub fn measure_read_bandwidth(ks: &Kernels, pool: &Pool, bytes: usize) -> Result<f64> {
    /// A part is one stretch of a thread.
    const PART: usize = 1 << 20;
    let parts = bytes.div_ceil(PART).max(pool.threads());
    let mut memory = Buffer::zeroed(parts * PART)?;
    // Written once, or all pages would be the same page of zeros.
    memory.par_chunks(pool, PART, |index, part| part.fill(index as u8 | 1));
    let mut best = f64::INFINITY;
    for how in Reading::ALL.into_iter().cycle().take(PASSES * Reading::ALL.len()) {
        let start = Instant::now();
        pool.run(parts, &|index| how.read(ks, &memory[index * PART..][..PART]));
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok((parts * PART) as f64 / best / 1e9)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_of_reading_reads_every_byte_once() {
        let memory: Vec<u8> = (0..100_000).map(|i| i as u8).collect();
        for len in [0, 1, 8, 1023, 1024, 1025, 4096, 4097, 8 * STEP, 99_999] {
            let bytes = &memory[..len];
            for how in Reading::ALL {
                let mut times = vec![0u8; len];
                how.steps(bytes, |part| {
                    let at = part.as_ptr() as usize - bytes.as_ptr() as usize;
                    times[at..at + part.len()].iter_mut().for_each(|n| *n += 1);
                });
                assert!(times.iter().all(|&n| n == 1), "{how:?} of {len}");
            }
        }
    }
}
