//! A contiguous range of a model's layers: packed weights, KV cache and the forward pass.

mod answers;
mod progress;
mod rope;
mod weights;

use crate::attention::{attend, Past};
use crate::batch::Batch;
use crate::cores::Pin;
use crate::descriptor::{Descriptor, Hyper, RopeStyle};
use crate::dispatch::{select, Kernels};
use crate::error::{Error, Result};
use crate::kv::{KvCache, BLOCK_TOKENS};
use crate::matmul::{matmul_all, matmul_by, matmul_gated, Activations};
use crate::ops;
use crate::pack::PackedMatrix;
use crate::pool::Pool;
use crate::profile::{Profile, Step};
use crate::sampling::sample;
use crate::tune::{Plans, Report, Tuner, INLINE_BYTES};
use crate::weight_cache::CacheReport;
use answers::{answers, needed_rows, result_bytes, sampled_bytes, write};
pub use progress::Progress;
use rope::RopeTable;
use std::cell::RefCell;
use std::panic::{catch_unwind, resume_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use weights::{Head, Weights};

/// An open shard. Forward passes take turns.
pub struct Shard {
    ks: &'static Kernels,
    pool: Pool,
    /// Runs small jobs on the calling thread.
    inline: Pool,
    /// Bytes of weights that a pass over one token reads, the embedding's row aside.
    pass_bytes: usize,
    hyper: Hyper,
    max_batch: usize,
    weights: Weights,
    loaded: CacheReport,
    plans: Plans,
    tuning: Report,
    state: Mutex<State>,
}

/// What a forward pass changes.
struct State {
    kv: KvCache,
    rope: RopeTable,
    act: Activations,
    buffers: Buffers,
    profile: Profile,
}

#[derive(Default)]
struct Buffers {
    hidden: Vec<f32>,
    norm: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    attended: Vec<f32>,
    /// Attention's results of ranges.
    partials: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    delta: Vec<f32>,
    logits: Vec<f32>,
}

/// What a shard tells of itself.
#[derive(serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Stats {
    pub kv_blocks_total: usize,
    pub kv_blocks_free: usize,
    pub block_tokens: usize,
    pub weight_bytes: usize,
    /// Of these, bytes that the cache had packed.
    pub cached_bytes: u64,
    pub sequences: usize,
    pub weight_bytes_per_token: usize,
}

/// Bytes of a whole pass below which sleeping threads are not woken: some 150 µs of one thread's reading.
const SESSION_BYTES: usize = 4 << 20;

/// Logits that are computed at once, in bytes; rows beyond wait, whatever the batch asks for.
const LOGITS_BYTES: usize = 16 << 20;

/// A pointer that threads write disjoint parts through.
#[derive(Clone, Copy)]
struct Shared<T>(*mut T);
// SAFETY: every use hands each thread its own part.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}
impl<T> Shared<T> {
    /// # Safety
    /// The range lies in the buffer and no two threads' ranges overlap.
    #[allow(clippy::mut_from_ref)]
    unsafe fn part(&self, at: usize, len: usize) -> &mut [T] {
        // SAFETY: the caller's.
        unsafe { core::slice::from_raw_parts_mut(self.0.add(at), len) }
    }
}

impl Shard {
    /// Maps the file, packs the shard's tensors and reserves the KV cache.
    pub fn open(d: &Descriptor) -> Result<Self> {
        Self::open_watched(d, &Progress::default())
    }

    /// The same, telling how far it is.
    pub fn open_watched(d: &Descriptor, progress: &Progress) -> Result<Self> {
        let ks = select(d.isa.as_deref())?;
        let pool = match d.pin {
            Pin::None => Pool::new(d.threads),
            Pin::Cores => Pool::pinned(d.threads)?,
        };
        let file_bytes = std::fs::metadata(&d.path).map_or(0, |file| file.len());
        let tuner = RefCell::new(Tuner::new(ks, &pool, d.tune, d.cache.as_ref(), file_bytes));
        let (weights, mut loaded) = Weights::load(d, &pool, &tuner, progress)?;
        let (plans, tuning) = tuner.into_inner().finish();
        loaded.notes.extend(tuning.warnings.iter().cloned());
        let h = d.hyper.clone();
        let kv = KvCache::new(d.kv.kind, d.kv.tokens, weights.layers.len(), h.kv_heads, h.head_dim)?;
        let rope = RopeTable::new(h.rope.base, h.rope.dims);
        Ok(Self {
            ks,
            pool,
            inline: Pool::new(1),
            pass_bytes: weights.pass_bytes(),
            hyper: h,
            max_batch: d.max_batch,
            weights,
            loaded,
            plans,
            tuning,
            state: Mutex::new(State {
                kv,
                rope,
                act: Activations::new(),
                buffers: Buffers::default(),
                profile: Profile::default(),
            }),
        })
    }

    /// What went wrong while it was opened without keeping it from opening: troubles of the cache and the tuner.
    pub fn notes(&self) -> &[String] {
        &self.loaded.notes
    }

    /// How products were chosen.
    pub fn tuning(&self) -> &Report {
        &self.tuning
    }

    /// A panic inside a forward pass is rolled back like an error: the state stays usable.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets positions of a sequence from `len` on.
    pub fn truncate(&self, seq: u32, len: usize) {
        self.state().kv.truncate(seq, len);
    }

    /// Measures the steps of passes from now on, and returns the time spent on each since the last call.
    pub fn profile(&self) -> impl Iterator<Item = (Step, Duration)> {
        self.state().profile.take().into_iter()
    }

    /// The time that the products of a pass over `n` tokens take when nothing else is done between them: what passes are
    /// compared with.
    pub fn time_products(&self, n: usize) -> Duration {
        let (ks, h) = (self.ks, &self.hyper);
        let State { act, buffers: b, .. } = &mut *self.state();
        let mut time = Duration::ZERO;
        let _awake = self.pool.session();
        let mut products = |k: usize, matrices: &mut dyn Iterator<Item = &PackedMatrix>| {
            let matrices: Vec<_> = matrices.collect();
            let forms: Vec<_> = matrices.iter().map(|w| w.form).collect();
            act.prepare(ks, &vec![1.0; n * k], n, k, &forms, &self.pool);
            resize(&mut b.logits, n * matrices.iter().map(|w| w.rows).max().unwrap_or(0));
            let start = Instant::now();
            matrices.iter().for_each(|w| self.product(&self.pool, w, act, n, &mut b.logits));
            time += start.elapsed();
        };
        products(h.embedding, &mut self.weights.layers.iter().flat_map(|l| [&l.q, &l.k, &l.v, &l.gate, &l.up]));
        products(h.heads * h.head_dim, &mut self.weights.layers.iter().map(|l| &l.o));
        products(h.feed_forward, &mut self.weights.layers.iter().map(|l| &l.down));
        products(h.embedding, &mut self.weights.head.iter().map(|head| &*head.output));
        time
    }

    pub fn stats(&self) -> Stats {
        let (table, row) = self.weights.table_bytes();
        let state = self.state();
        Stats {
            kv_blocks_total: state.kv.blocks_total(),
            kv_blocks_free: state.kv.blocks_free(),
            block_tokens: BLOCK_TOKENS,
            weight_bytes: self.pass_bytes + table,
            cached_bytes: self.loaded.read,
            sequences: state.kv.sequences(),
            weight_bytes_per_token: self.pass_bytes + row,
        }
    }

    /// Computes a micro-batch, writes hidden states, or results from a shard with head, to `out`, and returns their bytes.
    ///
    /// An error changes no sequence. `stop` becoming non-zero ends the call before the next layer, with an error.
    pub fn forward(&self, batch: &[u8], input: &[u8], stop: Option<&AtomicI32>, out: &mut [u8]) -> Result<usize> {
        let h = &self.hyper;
        let batch = Batch::parse(batch, h.vocab as u32, h.context as u32, self.max_batch)?;
        let tokens = batch.tokens.len();
        let states = tokens * h.embedding * 4;
        let expected = if self.weights.embedding.is_some() { 0 } else { states };
        if input.len() != expected {
            return Err(Error::argument(format!("input has {} bytes; {tokens} tokens take {expected}", input.len())));
        }
        let needed = match &self.weights.head {
            None => Some(states),
            Some(_) => batch.entries.iter().try_fold(0usize, |sum, e| sum.checked_add(result_bytes(e, h.vocab)?)),
        };
        let out = needed.and_then(|needed| out.get_mut(..needed)).ok_or_else(|| {
            let needed = needed.map_or("too many".to_string(), |n| n.to_string());
            Error::argument(format!("the output's buffer is too small; {needed} bytes are needed"))
        })?;
        let mut state = self.state();
        let parts: Vec<_> =
            batch.entries.iter().map(|e| (e.seq, e.pos as usize, &batch.tokens[e.first..e.first + e.count])).collect();
        let undo = state.kv.extend(&parts)?;
        let outcome = catch_unwind(AssertUnwindSafe(|| self.compute(&mut state, &batch, input, stop, out)));
        if !matches!(outcome, Ok(Ok(()))) {
            state.kv.roll_back(undo);
        }
        outcome.unwrap_or_else(|panic| resume_unwind(panic)).map(|()| out.len())
    }

    fn compute(
        &self,
        state: &mut State,
        batch: &Batch,
        input: &[u8],
        stop: Option<&AtomicI32>,
        out: &mut [u8],
    ) -> Result<()> {
        let h = &self.hyper;
        let (d, dim) = (h.embedding, h.head_dim);
        let (wide, kv_wide, ff) = (h.heads * dim, h.kv_heads * dim, h.feed_forward);
        let ks = self.ks;
        let State { kv, rope, act, buffers: b, profile } = state;
        let mut n = batch.tokens.len();
        if n == 0 {
            return Ok(());
        }

        // Small passes are the calling thread's alone.
        let pool = if self.pass_bytes.saturating_mul(n) < SESSION_BYTES { &self.inline } else { &self.pool };
        let _awake = pool.session();
        profile.begin();

        // Entry and position of every row.
        let mut rows: Vec<(usize, usize)> = Vec::with_capacity(n);
        for (e, entry) in batch.entries.iter().enumerate() {
            rows.extend((0..entry.count).map(|i| (e, entry.pos as usize + i)));
        }
        rope.grow(rows.iter().map(|&(_, pos)| pos + 1).max().unwrap_or(0));
        let blocks: Vec<Vec<u32>> =
            batch.entries.iter().map(|e| kv.get(e.seq).expect("extended before").blocks.clone()).collect();
        let blocks: Vec<&[u32]> = blocks.iter().map(|blocks| &blocks[..]).collect();

        resize(&mut b.hidden, n * d);
        match &self.weights.embedding {
            Some(table) => {
                let out = Shared(b.hidden.as_mut_ptr());
                // SAFETY: row i is this part's own.
                pool.run(n, &|i| table.unpack_row(batch.tokens[i] as usize, unsafe { out.part(i * d, d) }));
            }
            None => {
                for (x, bytes) in b.hidden.iter_mut().zip(input.chunks_exact(4)) {
                    *x = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
                }
            }
        }

        profile.end(Step::Input);

        for (index, layer) in self.weights.layers.iter().enumerate() {
            if stop.is_some_and(|flag| flag.load(Ordering::Relaxed) != 0) {
                return Err(Error::new(Error::STOPPED, "stopped"));
            }
            self.norm(pool, &b.hidden[..n * d], &layer.attn_norm, &mut b.norm, n);
            profile.end(Step::Norm);
            act.prepare(ks, &b.norm[..n * d], n, d, &[layer.q.form, layer.k.form, layer.v.form], pool);
            profile.end(Step::Quantize);
            resize(&mut b.q, n * wide);
            resize(&mut b.k, n * kv_wide);
            resize(&mut b.v, n * kv_wide);
            let products = [(&layer.q, &mut b.q[..]), (&layer.k, &mut b.k[..]), (&layer.v, &mut b.v[..])]
                .map(|(w, y)| (self.plans.plan(w, n), w, y));
            let bytes = products.iter().map(|(_, w, _)| w.bytes()).sum::<usize>();
            matmul_all(ks, products, act, self.pool_for(pool, bytes * n));
            profile.end(Step::QueryKeyValue);

            let style = h.rope.style;
            let (q, k) = (Shared(b.q.as_mut_ptr()), Shared(b.k.as_mut_ptr()));
            pool.run(n, &|i| {
                let (cos, sin) = rope.row(rows[i].1);
                // SAFETY: row i of each is this part's own.
                let heads = unsafe {
                    q.part(i * wide, wide)
                        .chunks_exact_mut(dim)
                        .chain(k.part(i * kv_wide, kv_wide).chunks_exact_mut(dim))
                };
                for head in heads {
                    rotate(ks, &mut head[..h.rope.dims], cos, sin, style);
                }
            });
            for (i, &(e, pos)) in rows.iter().enumerate() {
                let block = blocks[e][pos / BLOCK_TOKENS];
                for head in 0..h.kv_heads {
                    let at = i * kv_wide + head * dim;
                    kv.store(ks, block, index, head, pos % BLOCK_TOKENS, &b.k[at..at + dim], &b.v[at..at + dim]);
                }
            }

            profile.end(Step::Store);
            // The last layer's K and V are all that rows need of which nothing is asked.
            if index + 1 == self.weights.layers.len() && self.weights.head.is_some() {
                let needed: Vec<usize> =
                    batch.entries.iter().flat_map(|e| e.first + e.count - needed_rows(e)..e.first + e.count).collect();
                for (to, &from) in needed.iter().enumerate() {
                    b.hidden.copy_within(from * d..(from + 1) * d, to * d);
                    b.q.copy_within(from * wide..(from + 1) * wide, to * wide);
                    rows[to] = rows[from];
                }
                n = needed.len();
                rows.truncate(n);
                if n == 0 {
                    return Ok(());
                }
            }

            resize(&mut b.attended, n * wide);
            let past = Past {
                kv,
                layer: index,
                blocks: &blocks,
                scale: 1.0 / (dim as f32).sqrt(),
                soft_cap: None,
                window: None,
            };
            let cached: usize = rows.iter().map(|&(_, pos)| pos + 1).sum();
            let pool_here = self.pool_for(pool, cached * wide * 8);
            attend(ks, past, &rows, &b.q[..n * wide], &mut b.attended[..n * wide], &mut b.partials, pool_here);
            profile.end(Step::Attention);
            act.prepare(ks, &b.attended[..n * wide], n, wide, &[layer.o.form], pool);
            profile.end(Step::Quantize);
            resize(&mut b.delta, n * d);
            self.product(pool, &layer.o, act, n, &mut b.delta);
            profile.end(Step::Output);
            ops::add(ks, &mut b.hidden[..n * d], &b.delta[..n * d]);
            profile.end(Step::Residual);

            self.norm(pool, &b.hidden[..n * d], &layer.ffn_norm, &mut b.norm, n);
            profile.end(Step::Norm);
            act.prepare(ks, &b.norm[..n * d], n, d, &[layer.gate.form, layer.up.form], pool);
            profile.end(Step::Quantize);
            resize(&mut b.gate, n * ff);
            resize(&mut b.up, n * ff);
            let gated = [&layer.gate, &layer.up].map(|w| (self.plans.plan(w, n), w));
            let bytes = gated.iter().map(|(_, w)| w.bytes()).sum::<usize>();
            matmul_gated(ks, gated, ops::silu_mul, act, &mut b.gate, &mut b.up, self.pool_for(pool, bytes * n));
            profile.end(Step::GateUp);
            act.prepare(ks, &b.gate[..n * ff], n, ff, &[layer.down.form], pool);
            profile.end(Step::Quantize);
            self.product(pool, &layer.down, act, n, &mut b.delta);
            profile.end(Step::Down);
            ops::add(ks, &mut b.hidden[..n * d], &b.delta[..n * d]);
            profile.end(Step::Residual);
        }

        match &self.weights.head {
            None => {
                for (bytes, x) in out.chunks_exact_mut(4).zip(&b.hidden[..n * d]) {
                    bytes.copy_from_slice(&x.to_le_bytes());
                }
                profile.end(Step::Answer);
                Ok(())
            }
            Some(head) => self.results(pool, head, kv, act, b, profile, batch, out),
        }
    }

    /// Computes the logits of the rows that are left in `b.hidden`, some rows at a time, and answers what each entry asked.
    #[allow(clippy::too_many_arguments)]
    fn results(
        &self,
        pool: &Pool,
        head: &Head,
        kv: &KvCache,
        act: &mut Activations,
        b: &mut Buffers,
        profile: &mut Profile,
        batch: &Batch,
        out: &mut [u8],
    ) -> Result<()> {
        let (ks, d, vocab) = (self.ks, self.hyper.embedding, self.hyper.vocab);
        let Head { norm, output } = head;
        let rows = answers(batch, vocab);
        let failed = Mutex::new(None);
        let at_once = (LOGITS_BYTES / (4 * vocab)).max(1);
        for (i, rows) in rows.chunks(at_once).enumerate() {
            let n = rows.len();
            self.norm(pool, &b.hidden[i * at_once * d..][..n * d], norm, &mut b.norm, n);
            profile.end(Step::Norm);
            act.prepare(ks, &b.norm[..n * d], n, d, &[output.form], pool);
            profile.end(Step::Quantize);
            resize(&mut b.logits, n * vocab);
            self.product(pool, output, act, n, &mut b.logits);
            profile.end(Step::Head);
            let (logits, out) = (Shared(b.logits.as_mut_ptr()), Shared(out.as_mut_ptr()));
            self.pool_for(pool, n * vocab * 16).run(n, &|i| {
                // SAFETY: row i is this part's own.
                let logits = unsafe { logits.part(i * vocab, vocab) };
                // SAFETY: `answers` lays them one after the other, and `out` is as long as they are together.
                let place = |at, len| unsafe { out.part(at, len) };
                if let Some(at) = rows[i].logits {
                    for (bytes, x) in place(at, 4 * vocab).chunks_exact_mut(4).zip(&*logits) {
                        bytes.copy_from_slice(&x.to_le_bytes());
                    }
                }
                if let Some((at, seq, parameters)) = rows[i].sample {
                    let history = &kv.get(seq).expect("extended before").tokens;
                    match sample(ks, logits, parameters, history) {
                        Ok(sampled) => write(&sampled, place(at, sampled_bytes(parameters, vocab))),
                        Err(e) => *failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(e),
                    }
                }
            });
            profile.end(Step::Answer);
        }
        failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }

    /// `pool`, or the calling thread alone for a job that reads few bytes.
    fn pool_for<'a>(&'a self, pool: &'a Pool, bytes: usize) -> &'a Pool {
        if bytes < INLINE_BYTES {
            &self.inline
        } else {
            pool
        }
    }

    /// `y = x · Wᵀ` for the `n` rows of activations in `act`.
    fn product(&self, pool: &Pool, w: &PackedMatrix, act: &Activations, n: usize, y: &mut [f32]) {
        let pool = if self.plans.is_inline(w, n) { &self.inline } else { pool };
        matmul_by(self.plans.plan(w, n), self.ks, w, act, y, w.rows, pool);
    }

    fn norm(&self, pool: &Pool, x: &[f32], weight: &[f32], out: &mut Vec<f32>, n: usize) {
        let (ks, d, eps) = (self.ks, self.hyper.embedding, self.hyper.rms_eps);
        resize(out, n * d);
        let out = Shared(out.as_mut_ptr());
        // SAFETY: row i is this part's own.
        pool.run(n, &|i| ops::rms_norm(ks, &x[i * d..(i + 1) * d], weight, eps, unsafe { out.part(i * d, d) }));
    }
}

/// Grows a buffer without clearing what is overwritten anyway.
fn resize(buffer: &mut Vec<f32>, len: usize) {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
}

fn rotate(ks: &Kernels, x: &mut [f32], cos: &[f32], sin: &[f32], style: RopeStyle) {
    let style = match style {
        RopeStyle::Norm => ops::RopeStyle::Norm,
        RopeStyle::Neox => ops::RopeStyle::Neox,
    };
    ops::rope(ks, x, cos, sin, style);
}
