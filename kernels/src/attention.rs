//! Causal grouped-query attention of one token over the KV cache.
//!
//! Scores, maximum, exponentials, sum, weighted values: each in order of position and for each head by itself, so that
//! blocks, chunks, batches and how heads are grouped do not show in the result.

use crate::descriptor::KvType;
use crate::dispatch::Kernels;
use crate::kv::{KvCache, BLOCK_TOKENS};
use crate::ops;

/// Scratch of one thread.
#[derive(Default)]
pub struct Scratch {
    /// Of each head, a score per position.
    scores: Vec<f32>,
    /// Rows of a block as f32.
    rows: Vec<f32>,
}

/// What a token attends to: positions `0..len` of `blocks`, as one layer's KV head keeps them.
#[derive(Clone, Copy)]
pub struct Past<'a> {
    pub kv: &'a KvCache,
    pub blocks: &'a [u32],
    pub layer: usize,
    pub kv_head: usize,
    pub len: usize,
}

impl Past<'_> {
    /// K (or V) rows of block `b` within `len`, as f32.
    fn rows<'s>(&'s self, ks: &Kernels, b: usize, dim: usize, values: bool, scratch: &'s mut Vec<f32>) -> &'s [f32] {
        let (k, v) = self.kv.rows(self.blocks[b], self.layer, self.kv_head);
        let (rows, n) = (if values { v } else { k }, BLOCK_TOKENS.min(self.len - b * BLOCK_TOKENS) * dim);
        match self.kv.kind() {
            // SAFETY: `KvCache::rows` vouches for 32 rows of `dim` elements; the map begins at a page, and offsets in it
            // are multiples of 32 elements.
            KvType::F32 => unsafe { core::slice::from_raw_parts(rows.cast::<f32>(), n) },
            KvType::F16 => {
                scratch.resize(BLOCK_TOKENS * dim, 0.0);
                // SAFETY: as above.
                ops::from_f16(ks, unsafe { core::slice::from_raw_parts(rows.cast::<u16>(), n) }, &mut scratch[..n]);
                &scratch[..n]
            }
        }
    }
}

/// `out = softmax(q·Kᵀ · scale) · V` of heads that share a KV head; `q` and `out` hold them one after the other.
///
/// Panics if `dim`, the cache's head dimension, does not divide both, or the blocks are fewer than `len` needs.
pub fn attend(ks: &Kernels, past: Past<'_>, dim: usize, q: &[f32], scale: f32, scratch: &mut Scratch, out: &mut [f32]) {
    assert!(dim == past.kv.head_dim() && q.len() % dim == 0 && q.len() == out.len() && past.len > 0);
    let Scratch { scores, rows } = scratch;
    let len = past.len;
    scores.clear();
    scores.resize(q.len() / dim * len, 0.0);
    let blocks = len.div_ceil(BLOCK_TOKENS);
    for b in 0..blocks {
        let keys = past.rows(ks, b, dim, false, rows);
        for (q, scores) in q.chunks_exact(dim).zip(scores.chunks_exact_mut(len)) {
            for (key, score) in keys.chunks_exact(dim).zip(&mut scores[b * BLOCK_TOKENS..]) {
                *score = ops::dot(ks, q, key) * scale;
            }
        }
    }
    out.fill(0.0);
    for scores in scores.chunks_exact_mut(len) {
        let max = ops::max(ks, scores);
        ops::exp(ks, scores, max);
    }
    for b in 0..blocks {
        let values = past.rows(ks, b, dim, true, rows);
        for (out, weights) in out.chunks_exact_mut(dim).zip(scores.chunks_exact(len)) {
            for (value, &weight) in values.chunks_exact(dim).zip(&weights[b * BLOCK_TOKENS..]) {
                ops::axpy(ks, out, weight, value);
            }
        }
    }
    for (out, weights) in out.chunks_exact_mut(dim).zip(scores.chunks_exact(len)) {
        ops::scale(ks, out, 1.0 / ops::sum(ks, weights));
    }
}
