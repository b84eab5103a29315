//! How fast this machine's memory can be read: what kernels are compared with, and what placement divides layers by.

use crate::dispatch::Kernels;
use crate::error::Result;
use crate::pack::Buffer;
use crate::pool::Pool;
use std::time::Instant;

const PASSES: usize = 5;

/// Read bandwidth in GB/s (10⁹ bytes a second): the best of several passes of all the pool's threads over `bytes` of
/// memory, which should be several times the last cache. Weights live in the same kind of memory.
pub fn measure_read_bandwidth(ks: &Kernels, pool: &Pool, bytes: usize) -> Result<f64> {
    /// A part is one stream of a thread.
    const PART: usize = 1 << 20;
    let parts = bytes.div_ceil(PART).max(pool.threads());
    let mut memory = Buffer::zeroed(parts * PART)?;
    // Written once, or all pages would be the same page of zeros.
    memory.par_chunks(pool, PART, |index, part| part.fill(index as u8 | 1));
    let mut best = f64::INFINITY;
    for _ in 0..PASSES {
        let start = Instant::now();
        pool.run(parts, &|index| {
            let part = &memory[index * PART..][..PART];
            // SAFETY: every bit pattern is a u64; `align_to` splits correctly. `ks` is usable on this machine.
            let sum = unsafe { (ks.read)(part.align_to::<u64>().1) };
            std::hint::black_box(sum);
        });
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok((parts * PART) as f64 / best / 1e9)
}
