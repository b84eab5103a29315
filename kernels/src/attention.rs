//! Causal grouped-query attention of one token and head over the KV cache.
//!
//! Scores, maximum, exponentials, sum, weighted values: each in order of position, so that blocks, chunks and batches do
//! not show in the result.

use crate::descriptor::KvType;
use crate::dispatch::Kernels;
use crate::kv::{KvCache, BLOCK_TOKENS};
use crate::ops;

/// Scratch of one thread: a score per position.
#[derive(Default)]
pub struct Scratch {
    scores: Vec<f32>,
}

/// `out = softmax(q·Kᵀ · scale) · V` over positions `0..len` of `blocks`.
#[allow(clippy::too_many_arguments)]
pub fn attend(
    ks: &Kernels,
    kv: &KvCache,
    blocks: &[u32],
    layer: usize,
    kv_head: usize,
    len: usize,
    q: &[f32],
    scale: f32,
    scratch: &mut Scratch,
    out: &mut [f32],
) {
    let dim = q.len();
    scratch.scores.clear();
    scratch.scores.resize(len, 0.0);
    let scores = &mut scratch.scores[..];
    for (b, part) in scores.chunks_mut(BLOCK_TOKENS).enumerate() {
        let (k, _) = kv.rows(blocks[b], layer, kv_head);
        for (i, score) in part.iter_mut().enumerate() {
            // SAFETY: `rows` vouches for 32 rows of `dim` elements, aligned as the map's page and row sizes are.
            let dot = unsafe {
                match kv.kind() {
                    KvType::F16 => ops::dot_f16(ks, q, core::slice::from_raw_parts(k.cast::<u16>().add(i * dim), dim)),
                    KvType::F32 => ops::dot(ks, q, core::slice::from_raw_parts(k.cast::<f32>().add(i * dim), dim)),
                }
            };
            *score = dot * scale;
        }
    }
    let max = ops::max(ks, scores);
    ops::exp(ks, scores, max);
    let sum = ops::sum(ks, scores);
    out.fill(0.0);
    for (b, part) in scores.chunks(BLOCK_TOKENS).enumerate() {
        let (_, v) = kv.rows(blocks[b], layer, kv_head);
        for (i, &weight) in part.iter().enumerate() {
            // SAFETY: as above.
            unsafe {
                match kv.kind() {
                    KvType::F16 => {
                        ops::axpy_f16(ks, out, weight, core::slice::from_raw_parts(v.cast::<u16>().add(i * dim), dim));
                    }
                    KvType::F32 => {
                        ops::axpy(ks, out, weight, core::slice::from_raw_parts(v.cast::<f32>().add(i * dim), dim));
                    }
                }
            }
        }
    }
    ops::scale(ks, out, 1.0 / sum);
}
