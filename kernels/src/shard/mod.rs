//! A contiguous range of a model's layers: packed weights, KV cache and the forward pass.

mod answers;
mod feed_forward;
mod layout;
mod progress;
mod rope;
mod weights;

use crate::attention::{Past, Plan};
use crate::batch::Batch;
use crate::cores::Pin;
use crate::descriptor::{Descriptor, Hyper, NormKind};
use crate::dispatch::{select, Kernels};
use crate::error::{Error, Result};
use crate::kv::{KvCache, BLOCK_TOKENS};
use crate::matmul::{matmul_all, matmul_by, share_of, Activations};
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
use weights::{same_order, FeedForward, Head, Linear, Mlp, Norm, Weights};

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
    ropes: Vec<RopeTable>,
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
    experts: feed_forward::Buffers,
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
        let file_bytes = files_bytes(d);
        let tuner = RefCell::new(Tuner::new(ks, &pool, d.tune, d.cache.as_ref(), file_bytes));
        let (weights, mut loaded) = Weights::load(d, &pool, &tuner, progress)?;
        let (plans, tuning) = tuner.into_inner().finish();
        loaded.notes.extend(tuning.warnings.iter().cloned());
        let h = d.hyper.clone();
        let kv = KvCache::new(d.kv.kind, d.kv.tokens, weights.layers.len(), h.kv_heads, h.head_dim)?;
        let ropes = h.ropes.iter().zip(&weights.rope_factors);
        let ropes = ropes.map(|(rope, factors)| RopeTable::new(rope, factors, h.context)).collect();
        Ok(Self {
            ks,
            pool,
            inline: Pool::new(1),
            pass_bytes: weights.pass_bytes(h.moe.as_ref().map_or(0, |moe| moe.used)),
            hyper: h,
            max_batch: d.max_batch,
            weights,
            loaded,
            plans,
            tuning,
            state: Mutex::new(State {
                kv,
                ropes,
                act: Activations::with_precision(d.activations),
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
        let mut products = |matrices: &mut dyn Iterator<Item = &PackedMatrix>| {
            let matrices: Vec<_> = matrices.collect();
            for alike in matrices.chunk_by(|a, b| a.cols == b.cols) {
                let (k, forms) = (alike[0].cols, alike.iter().map(|w| w.form).collect::<Vec<_>>());
                act.prepare(ks, &vec![1.0; n * k], n, k, &forms, &self.pool);
                resize(&mut b.logits, n * alike.iter().map(|w| w.rows).max().unwrap_or(0));
                let start = Instant::now();
                alike.iter().for_each(|w| self.product(&self.pool, w, act, n, &mut b.logits));
                time += start.elapsed();
            }
        };
        let layers = &self.weights.layers;
        // A token's experts are as good as any.
        let used = h.moe.as_ref().map_or(0, |moe| moe.used);
        let mlps: Vec<&Mlp> = layers
            .iter()
            .flat_map(|l| match &l.ffn {
                FeedForward::Mlp(mlp) => vec![mlp],
                FeedForward::Moe(moe) => moe.experts.iter().take(used).chain(&moe.shared).collect(),
            })
            .collect();
        products(&mut layers.iter().flat_map(|l| [&*l.q.w, &l.k.w, &l.v.w]));
        for mlp in mlps {
            products(&mut mlp.gate.iter().chain([&mlp.up]).map(|l| &*l.w));
            products(&mut [&*mlp.down.w].into_iter());
        }
        products(&mut layers.iter().map(|l| &*l.o.w));
        products(&mut self.weights.head.iter().map(|head| &*head.output.w));
        time
    }

    pub fn stats(&self) -> Stats {
        let (table, row) = self.weights.table_bytes();
        let state = self.state();
        Stats {
            kv_blocks_total: state.kv.blocks_total(),
            kv_blocks_free: state.kv.blocks_free(),
            block_tokens: BLOCK_TOKENS,
            weight_bytes: self.weights.bytes() + table,
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
        let (wide, kv_wide) = (h.heads * dim, h.kv_heads * dim);
        let ks = self.ks;
        let State { kv, ropes, act, buffers: b, profile } = state;
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
        let positions = rows.iter().map(|&(_, pos)| pos + 1).max().unwrap_or(0);
        ropes.iter_mut().for_each(|rope| rope.grow(positions));
        let blocks: Vec<Vec<u32>> =
            batch.entries.iter().map(|e| kv.get(e.seq).expect("extended before").blocks.clone()).collect();
        let blocks: Vec<&[u32]> = blocks.iter().map(|blocks| &blocks[..]).collect();

        resize(&mut b.hidden, n * d);
        resize(&mut b.delta, n * d);
        match &self.weights.embedding {
            Some(table) => {
                let (out, row) = (Shared(b.hidden.as_mut_ptr()), Shared(b.delta.as_mut_ptr()));
                pool.run(n, &|i| {
                    // SAFETY: row i of each is this part's own.
                    let (out, row) = unsafe { (out.part(i * d, d), row.part(i * d, d)) };
                    table.unpack_row(batch.tokens[i] as usize, out);
                    if let Some(scale) = h.embedding_scale {
                        ops::scale(ks, out, scale);
                    }
                    if let Some(positions) = &self.weights.positions {
                        positions.unpack_row(rows[i].1, row);
                        ops::add(ks, out, row);
                    }
                });
            }
            None => {
                for (x, bytes) in b.hidden.iter_mut().zip(input.chunks_exact(4)) {
                    *x = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
                }
            }
        }

        profile.end(Step::Input);

        let mut plan: Option<Plan> = None;
        for (index, layer) in self.weights.layers.iter().enumerate() {
            if stop.is_some_and(|flag| flag.load(Ordering::Relaxed) != 0) {
                return Err(Error::new(Error::STOPPED, "stopped"));
            }
            self.norm(pool, layer.attn_norm.as_ref(), &b.hidden[..n * d], d, &mut b.norm);
            profile.end(Step::Norm);
            resize(&mut b.q, n * wide);
            resize(&mut b.k, n * kv_wide);
            resize(&mut b.v, n * kv_wide);
            // Rows see the same in every layer, but for windows.
            let cached: usize = rows.iter().map(|&(_, pos)| layer.window.unwrap_or(pos + 1).min(pos + 1)).sum();
            let pool_here = self.pool_for(pool, cached * wide * 8);
            let plan_for = |rows: &[(usize, usize)], kv: &KvCache| {
                Plan::new(kv, rows, h.heads / h.kv_heads, layer.window, pool_here.threads())
            };
            let kept = plan.take().filter(|plan| plan.fits(n, layer.window));
            let attention = kept.unwrap_or_else(|| plan_for(&rows, kv));
            pool.expect(|thread| attention.first(kv, index, &blocks, &rows, thread));
            let mut parts = [(&layer.q, &mut b.q[..]), (&layer.k, &mut b.k[..]), (&layer.v, &mut b.v[..])];
            let linears = parts.each_ref().map(|(l, _)| *l);
            if same_order(linears) {
                let forms = linears.map(|l| l.w.form);
                act.prepare_in_order(ks, &b.norm[..n * d], layer.q.order.as_deref(), n, d, &forms, pool);
                profile.end(Step::Quantize);
                let bytes = linears.iter().map(|l| l.w.bytes()).sum::<usize>();
                let products = parts.each_mut().map(|(l, y)| (self.plans.plan(&l.w, n), &*l.w, &mut **y));
                matmul_all(ks, products, act, self.pool_for(pool, bytes * n));
            } else {
                for (l, y) in &mut parts {
                    self.prepare(pool, l, &b.norm[..n * d], n, act);
                    self.product(pool, &l.w, act, n, y);
                }
            }
            parts.iter_mut().for_each(|(l, y)| self.rest(l, n, y));
            profile.end(Step::QueryKeyValue);

            let rope = layer.rope.map(|rope| &ropes[rope]);
            let (q, k) = (Shared(b.q.as_mut_ptr()), Shared(b.k.as_mut_ptr()));
            let (v, writer) = (&b.v[..n * kv_wide], kv.writer());
            pool.run(n, &|i| {
                // SAFETY: row i of each is this part's own.
                let (q, k) = unsafe { (q.part(i * wide, wide), k.part(i * kv_wide, kv_wide)) };
                for (x, norm) in [(&mut *q, &layer.q_norm), (&mut *k, &layer.k_norm)] {
                    if let Some(norm) = norm {
                        self.norm_row(norm, x);
                    }
                    if let Some(rope) = rope {
                        let (cos, sin) = rope.row(rows[i].1);
                        x.chunks_exact_mut(dim).for_each(|head| ops::rope(ks, head, cos, sin, rope.style));
                    }
                }
                let (e, pos) = rows[i];
                let block = blocks[e][pos / BLOCK_TOKENS];
                for (head, (k, v)) in k.chunks_exact(dim).zip(v[i * kv_wide..].chunks_exact(dim)).enumerate() {
                    // SAFETY: every row is another position of a sequence, and a block belongs to one sequence.
                    unsafe { writer.store(ks, block, index, head, pos % BLOCK_TOKENS, k, v) };
                }
            });

            profile.end(Step::Store);
            // The last layer's K and V are all that rows need of which nothing is asked.
            if index + 1 == self.weights.layers.len() && self.weights.head.is_some() {
                let needed: Vec<usize> =
                    batch.entries.iter().flat_map(|e| e.first + e.count - needed_rows(e)..e.first + e.count).collect();
                for (to, &from) in needed.iter().enumerate() {
                    b.hidden.copy_within(from * d..(from + 1) * d, to * d);
                    b.norm.copy_within(from * d..(from + 1) * d, to * d);
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
                scale: h.attention_scale.unwrap_or(1.0 / (dim as f32).sqrt()),
                soft_cap: h.attention_softcap,
                window: layer.window,
            };
            self.expect(pool, Some(&layer.o));
            let (q, attended) = (&b.q[..n * wide], &mut b.attended[..n * wide]);
            let attention = if attention.fits(n, layer.window) { attention } else { plan_for(&rows, kv) };
            attention.attend(ks, past, &rows, q, attended, &mut b.partials, pool_here);
            plan = Some(attention);
            profile.end(Step::Attention);
            self.norm_in_place(pool, layer.attn_sub_norm.as_ref(), &mut b.attended[..n * wide], wide);
            self.prepare(pool, &layer.o, &b.attended[..n * wide], n, act);
            profile.end(Step::Quantize);
            self.expect(pool, layer.ffn.first());
            self.linear(pool, &layer.o, act, n, &mut b.delta);
            profile.end(Step::Output);
            self.norm_in_place(pool, layer.attn_post_norm.as_ref(), &mut b.delta[..n * d], d);

            // A parallel layer's feed-forward starts from the hidden state before attention is added.
            if !h.parallel {
                self.add(&mut b.hidden[..n * d], &mut b.delta[..n * d]);
            }
            profile.end(Step::Residual);
            if layer.ffn_norm.is_some() || !h.parallel {
                self.norm(pool, layer.ffn_norm.as_ref(), &b.hidden[..n * d], d, &mut b.norm);
            }
            profile.end(Step::Norm);
            if h.parallel {
                self.add(&mut b.hidden[..n * d], &mut b.delta[..n * d]);
            }
            let head = self.weights.head.as_ref().map(|head| &head.output);
            let next = self.weights.layers.get(index + 1).map(|layer| &layer.q).or(head);
            self.feed_forward(pool, &layer.ffn, next, act, n, b, profile);
            self.norm_in_place(pool, layer.ffn_post_norm.as_ref(), &mut b.delta[..n * d], d);
            self.add(&mut b.hidden[..n * d], &mut b.delta[..n * d]);
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
            self.norm(pool, Some(norm), &b.hidden[i * at_once * d..][..n * d], d, &mut b.norm);
            profile.end(Step::Norm);
            self.prepare(pool, output, &b.norm[..n * d], n, act);
            profile.end(Step::Quantize);
            self.linear(pool, output, act, n, &mut b.logits);
            profile.end(Step::Head);
            let (logits, out) = (Shared(b.logits.as_mut_ptr()), Shared(out.as_mut_ptr()));
            self.pool_for(pool, n * vocab * 16).run(n, &|i| {
                // SAFETY: row i is this part's own.
                let logits = unsafe { logits.part(i * vocab, vocab) };
                if let Some(scale) = self.hyper.logit_scale {
                    ops::scale(ks, logits, scale);
                }
                if let Some(cap) = self.hyper.logit_softcap {
                    ops::softcap(ks, logits, cap);
                }
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

    /// Prepares the `n` rows of `x` for `l`'s product.
    fn prepare(&self, pool: &Pool, l: &Linear, x: &[f32], n: usize, act: &mut Activations) {
        act.prepare_in_order(self.ks, x, l.order.as_deref(), n, x.len() / n, &[l.w.form], pool);
    }

    /// Tells the pool's threads that the product after their next job is the one with `l`.
    fn expect(&self, pool: &Pool, l: Option<&Linear>) {
        let Some(l) = l else { return };
        pool.expect(|thread| {
            let share = share_of(&l.w, thread, pool.threads());
            (share.as_ptr() as usize, share.len())
        });
    }

    /// `y = x · Wᵀ` for the `n` rows of activations in `act`.
    fn product(&self, pool: &Pool, w: &PackedMatrix, act: &Activations, n: usize, y: &mut [f32]) {
        let pool = if self.plans.is_inline(w, n) { &self.inline } else { pool };
        matmul_by(self.plans.plan(w, n), self.ks, w, act, y, w.rows, pool);
    }

    /// `y = scale·(x · Wᵀ) + bias` for the `n` rows of activations in `act`.
    fn linear(&self, pool: &Pool, l: &Linear, act: &Activations, n: usize, y: &mut Vec<f32>) {
        resize(y, n * l.w.rows);
        self.product(pool, &l.w, act, n, y);
        self.rest(l, n, y);
    }

    /// What is left of `linear` behind the product.
    fn rest(&self, l: &Linear, n: usize, y: &mut [f32]) {
        for y in y[..n * l.w.rows].chunks_exact_mut(l.w.rows) {
            if let Some(scale) = l.scale {
                ops::scale(self.ks, y, scale);
            }
            if let Some(bias) = &l.bias {
                ops::add(self.ks, y, bias);
            }
        }
    }

    /// Normalises rows of `width`, or copies them where there is no norm.
    fn norm(&self, pool: &Pool, norm: Option<&Norm>, x: &[f32], width: usize, out: &mut Vec<f32>) {
        resize(out, x.len());
        out[..x.len()].copy_from_slice(x);
        self.norm_in_place(pool, norm, &mut out[..x.len()], width);
    }

    fn norm_in_place(&self, pool: &Pool, norm: Option<&Norm>, x: &mut [f32], width: usize) {
        let Some(norm) = norm else { return };
        let (n, x) = (x.len() / width, Shared(x.as_mut_ptr()));
        // SAFETY: row i is this part's own.
        pool.run(n, &|i| self.norm_row(norm, unsafe { x.part(i * width, width) }));
    }

    /// Normalises each group of a row; groups have weights of their own, or share them.
    fn norm_row(&self, norm: &Norm, row: &mut [f32]) {
        thread_local!(static INPUT: RefCell<Vec<f32>> = RefCell::default());
        let eps = self.hyper.norm.eps;
        INPUT.with_borrow_mut(|input| {
            for (i, x) in row.chunks_exact_mut(norm.group).enumerate() {
                let at = i * norm.group % norm.weight.len();
                let range = at..at + norm.group;
                input.clear();
                input.extend_from_slice(x);
                match self.hyper.norm.kind {
                    NormKind::Rms => ops::rms_norm(self.ks, input, &norm.weight[range.clone()], eps, x),
                    NormKind::Layer => {
                        let bias = (!norm.bias.is_empty()).then(|| &norm.bias[range.clone()]);
                        ops::layer_norm(self.ks, input, &norm.weight[range.clone()], bias, eps, x);
                    }
                }
            }
        });
    }

    /// Adds what a part of a layer gave to the hidden state.
    fn add(&self, hidden: &mut [f32], delta: &mut [f32]) {
        if let Some(scale) = self.hyper.residual_scale {
            ops::scale(self.ks, delta, scale);
        }
        ops::add(self.ks, hidden, delta);
    }
}

/// Bytes of the model's files, as far as they are here.
fn files_bytes(d: &Descriptor) -> u64 {
    let path = std::path::Path::new(&d.path);
    let all = std::iter::once(path.to_path_buf()).chain(d.files.iter().map(|name| path.with_file_name(name)));
    all.filter_map(|path| std::fs::metadata(path).ok()).map(|file| file.len()).sum()
}

/// Grows a buffer without clearing what is overwritten anyway.
fn resize(buffer: &mut Vec<f32>, len: usize) {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
}
