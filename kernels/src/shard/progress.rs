//! How far a shard's loading is, for others to watch.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Two counters: parts done, and parts in all (0 before that is known). As callers of the C ABI hold it.
#[derive(Debug, Default)]
#[repr(C)]
pub struct Progress {
    done: AtomicU64,
    total: AtomicU64,
}

impl Progress {
    pub(super) fn begin(&self, total: usize) {
        self.done.store(0, Relaxed);
        self.total.store(total as u64, Relaxed);
    }

    pub(super) fn advance(&self, parts: usize) {
        self.done.fetch_add(parts as u64, Relaxed);
    }

    /// Parts done, and in all.
    pub fn get(&self) -> (u64, u64) {
        (self.done.load(Relaxed), self.total.load(Relaxed))
    }
}
