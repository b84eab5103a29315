//! Causal grouped-query attention of a micro-batch over the KV cache: how it is divided into work.
//!
//! A piece of work is one KV head and a tile of neighbouring tokens of a sequence: keys and values are read once for all of
//! the tile's tokens and heads. Where there are few such pieces, each is divided by ranges of positions, which are
//! always computed by themselves and merged in order (`ops::attention`). So how work is divided does not show in the result.
//!
//! Each thread has a share of neighbouring pieces, so that it asks for the next one's beginning at the end of each, and before the
//! first (`Plan::first`); who is done takes pieces from the end of others' shares. Of a divided piece, the part whose turn it is
//! merges range after range into the total; one that is computed before its turn leaves its results to whoever merges the part
//! before it. So mostly nothing is written but totals: between two layers' attention weights have filled the caches, and whatever
//! is used then comes from memory.

use crate::dispatch::Kernels;
use crate::kv::{KvCache, Slot, BLOCK_TOKENS};
use crate::ops;
use crate::ops::attention::{padded, partial_len, Task, Work, RANGE};
use crate::pool::{portion, Pool};
use std::cell::RefCell;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicU8, AtomicUsize, Ordering};

/// Query rows (tokens × heads) of a tile, if a token has not more.
const TILE_ROWS: usize = 32;
/// Pieces of work that each thread should have: fewer are divided, each into neighbouring ranges.
const PIECES: usize = 8;

/// Blocks of a range.
const BLOCKS: usize = RANGE / BLOCK_TOKENS;

/// What queries attend to.
#[derive(Clone, Copy)]
pub struct Past<'a> {
    pub kv: &'a KvCache,
    pub layer: usize,
    /// Blocks of each sequence of the batch.
    pub blocks: &'a [&'a [u32]],
    /// What scores are multiplied by.
    pub scale: f32,
    /// c of `c · tanh(score / c)` (Gemma 2, arXiv:2408.00118).
    pub soft_cap: Option<f32>,
    /// Positions that a token sees at most, its own included.
    pub window: Option<usize>,
}

/// A KV head's share of a tile of tokens.
struct Piece {
    rows: Range<usize>,
    head: usize,
    ranges: Range<usize>,
    /// `None` if all ranges are here.
    part: Option<Part>,
}

/// What a piece is a part of.
struct Part {
    /// Index of what was divided.
    of: usize,
    /// Which of its parts.
    place: usize,
    /// Place of the ranges' results, one after the other, among partial results: for a part computed before its turn.
    results: usize,
    state: AtomicU8,
}

/// States of a part: its results are not there; they are; somebody merges them.
const OPEN: u8 = 0;
const WRITTEN: u8 = 1;
const TAKEN: u8 = 2;

impl Part {
    /// Whether the caller is the one to merge its results.
    fn claim(&self) -> bool {
        self.state.compare_exchange(WRITTEN, TAKEN, Ordering::SeqCst, Ordering::Relaxed).is_ok()
    }
}

/// A piece that was divided, into neighbours among all pieces.
struct Divided {
    /// The first of them.
    first: usize,
    parts: usize,
    /// Place of what is merged so far, among partial results.
    total: usize,
    /// The part that is merged next. Whoever computes it, or has claimed it, has the total for itself.
    turn: AtomicUsize,
}

/// Pieces that are left of a thread's share, which are neighbours: the first one's place in the low half, the end in the high half.
struct Share(AtomicU64);

impl Share {
    fn fill(&self, pieces: Range<usize>) {
        self.0.store(pieces.start as u64 | (pieces.end as u64) << 32, Ordering::Relaxed);
    }

    /// Takes a piece, and says whether the one behind it was left. The thread itself takes the first, so that it reads on where it
    /// was; others take the last.
    fn take(&self, own: bool) -> Option<(usize, bool)> {
        let parts = |both: u64| (both & 0xffff_ffff, both >> 32);
        let rest = |both| {
            let (first, end) = parts(both);
            (first < end).then(|| if own { both + 1 } else { both - (1 << 32) })
        };
        let (first, end) = parts(self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, rest).ok()?);
        Some(if own { (first as usize, first + 1 < end) } else { (end as usize - 1, false) })
    }
}

/// Scratch of one thread.
#[derive(Default)]
struct Scratch {
    /// First row and head whose queries these are.
    gathered: Option<(usize, usize)>,
    queries: Vec<f32>,
    visible: Vec<Range<usize>>,
    slots: Vec<Slot>,
    total: Vec<f32>,
    part: Vec<f32>,
    work: Work,
}

/// How the attention of some rows is divided: the same for all layers that see as far.
pub struct Plan {
    /// Heads that share a KV head.
    group: usize,
    /// Each thread's share lies together.
    pieces: Vec<Piece>,
    divided: Vec<Divided>,
    shares: Vec<Share>,
    /// Floats of the ranges' results.
    partials: usize,
    rows: usize,
    window: Option<usize>,
}

impl Plan {
    /// For rows of sequences and positions, `group` heads to each KV head of `kv`, and `threads` threads.
    pub fn new(kv: &KvCache, rows: &[(usize, usize)], group: usize, window: Option<usize>, threads: usize) -> Self {
        let (dim, kv_heads) = (kv.head_dim(), kv.kv_heads());
        let tiles = tiles(rows, (TILE_ROWS / group).max(1));
        let pieces_wanted = PIECES * threads;
        let split = threads > 1 && tiles.len() * kv_heads < pieces_wanted;
        let (mut pieces, mut divided) = (Vec::new(), Vec::new());
        let mut len = 0;
        // The longest first.
        for tile in tiles.iter().rev() {
            let first = visible(window, rows[tile.start].1).start / RANGE;
            let seen = first..(rows[tile.end - 1].1 + 1).div_ceil(RANGE);
            for head in 0..kv_heads {
                if split && seen.len() > 1 {
                    let some = seen.len().div_ceil(pieces_wanted.div_ceil(tiles.len() * kv_heads));
                    let size = partial_len(tile.len() * group, dim);
                    let (of, first, total) = (divided.len(), pieces.len(), len);
                    len += size;
                    for (place, first) in seen.clone().step_by(some).enumerate() {
                        let ranges = first..seen.end.min(first + some);
                        let part = Part { of, place, results: len, state: AtomicU8::new(OPEN) };
                        // It is always the first part's turn.
                        len += if place == 0 { 0 } else { ranges.len() * size };
                        pieces.push(Piece { rows: tile.clone(), head, ranges, part: Some(part) });
                    }
                    divided.push(Divided { first, parts: pieces.len() - first, total, turn: AtomicUsize::new(0) });
                } else {
                    pieces.push(Piece { rows: tile.clone(), head, ranges: seen.clone(), part: None });
                }
            }
        }
        let shares = (0..threads).map(|_| Share(AtomicU64::new(0))).collect();
        Plan { group, pieces, divided, shares, partials: len, rows: rows.len(), window }
    }

    /// Whether it is the one for so many of the same rows, seeing as far.
    pub fn fits(&self, rows: usize, window: Option<usize>) -> bool {
        self.rows == rows && self.window == window
    }

    /// The pieces that a thread begins with.
    fn share(&self, thread: usize) -> Range<usize> {
        portion(self.pieces.len(), thread, self.shares.len())
    }

    /// Where lies what a thread reads first: address and bytes.
    pub(crate) fn first(
        &self,
        kv: &KvCache,
        layer: usize,
        blocks: &[&[u32]],
        rows: &[(usize, usize)],
        thread: usize,
    ) -> (usize, usize) {
        let share = if thread < self.shares.len() { self.share(thread) } else { 0..0 };
        let Some(piece) = self.pieces[share].first() else { return (0, 0) };
        let blocks = blocks[rows[piece.rows.start].0];
        let end = blocks.len().min(piece.ranges.end * BLOCKS);
        kv.stretch(&blocks[piece.ranges.start * BLOCKS..end], layer, piece.head)
    }

    /// `out = softmax(scale · q·Kᵀ) · V` for every row and head. `rows` has each row's sequence (an index of `past.blocks`) and
    /// position, all positions up to which are stored; `q` and `out` hold `heads · dim` floats a row. `partials` is scratch.
    ///
    /// Panics if lengths do not match, or the plan is of other rows.
    #[allow(clippy::too_many_arguments)]
    pub fn attend(
        &self,
        ks: &Kernels,
        past: Past<'_>,
        rows: &[(usize, usize)],
        q: &[f32],
        out: &mut [f32],
        partials: &mut Vec<f32>,
        pool: &Pool,
    ) {
        let (dim, kv_heads) = (past.kv.head_dim(), past.kv.kv_heads());
        let (group, threads) = (self.group, self.shares.len());
        let wide = kv_heads * group * dim;
        assert!(q.len() == rows.len() * wide && out.len() == q.len() && self.fits(rows.len(), past.window));
        for (thread, share) in self.shares.iter().enumerate() {
            share.fill(self.share(thread));
        }
        let parts = self.pieces.iter().filter_map(|piece| piece.part.as_ref());
        parts.for_each(|part| part.state.store(OPEN, Ordering::Relaxed));
        self.divided.iter().for_each(|divided| divided.turn.store(0, Ordering::Relaxed));
        partials.resize(self.partials.max(partials.len()), 0.0);
        let (out, partials) = (Shared(out.as_mut_ptr()), Shared(partials.as_mut_ptr()));
        let pass = Pass { plan: self, ks, past, rows, q, wide, out, partials };
        pool.run(threads, &|thread| {
            thread_local!(static SCRATCH: RefCell<Scratch> = RefCell::default());
            SCRATCH.with_borrow_mut(|scratch| {
                scratch.gathered = None;
                // Who has none left takes of the others'.
                let take = || (0..threads).find_map(|i| self.shares[(thread + i) % threads].take(i == 0));
                while let Some((index, on)) = take() {
                    pass.compute(&self.pieces[index], self.pieces.get(index + 1).filter(|_| on), scratch);
                }
            });
        });
    }
}

/// A call of [`Plan::attend`].
struct Pass<'a> {
    plan: &'a Plan,
    ks: &'a Kernels,
    past: Past<'a>,
    rows: &'a [(usize, usize)],
    q: &'a [f32],
    /// Floats of a row.
    wide: usize,
    out: Shared,
    partials: Shared,
}

impl Pass<'_> {
    /// Query rows of a piece: its tokens' heads.
    fn queries(&self, piece: &Piece) -> usize {
        piece.rows.len() * self.plan.group
    }

    /// Computes a piece, `next` behind which is likely to be the thread's next.
    fn compute(&self, piece: &Piece, next: Option<&Piece>, scratch: &mut Scratch) {
        self.gather(piece, scratch);
        let size = partial_len(self.queries(piece), self.past.kv.head_dim());
        let Some(part) = &piece.part else {
            let mut total = std::mem::take(&mut scratch.total);
            total.resize(size, 0.0);
            self.sum(piece, next, scratch, &mut total);
            self.finish(piece, &total);
            scratch.total = total;
            return;
        };
        let whole = &self.plan.divided[part.of];
        // SAFETY: used only when it is this part's turn, below.
        let total = || unsafe { self.partials.slice(whole.total, size) };
        // Whoever gives the turn to this part sees that it is not written, so it stays this thread's.
        if whole.turn.load(Ordering::SeqCst) == part.place {
            let total = total();
            self.sum(piece, next, scratch, total);
            self.pass_on(piece, part, total);
            return;
        }
        // SAFETY: parts have places of their own, within the length that `attend` has seen to; nobody reads before it is written.
        let results = unsafe { self.partials.slice(part.results, piece.ranges.len() * size) };
        for (range, result) in piece.ranges.clone().zip(results.chunks_exact_mut(size)) {
            self.range(piece, range, next, scratch, result);
        }
        part.state.store(WRITTEN, Ordering::SeqCst);
        // Sequentially consistent against `pass_on`, which gives the turn and then looks: one of the two sees the other, and if both
        // do, one has it.
        if whole.turn.load(Ordering::SeqCst) == part.place && part.claim() {
            let total = total();
            self.merge(piece, part, total);
            self.pass_on(piece, part, total);
        }
    }

    /// After a part is merged: merges those behind it whose results are there, or finishes.
    fn pass_on(&self, piece: &Piece, part: &Part, total: &mut [f32]) {
        let whole = &self.plan.divided[part.of];
        for place in part.place + 1..whole.parts {
            whole.turn.store(place, Ordering::SeqCst);
            let piece = &self.plan.pieces[whole.first + place];
            let Some(part) = piece.part.as_ref().filter(|part| part.claim()) else { return };
            self.merge(piece, part, total);
        }
        self.finish(piece, total);
    }

    /// Merges a part's written results, which the caller has claimed.
    fn merge(&self, piece: &Piece, part: &Part, total: &mut [f32]) {
        // SAFETY: they are written, and will not be again in this call.
        let results = unsafe { self.partials.slice(part.results, piece.ranges.len() * total.len()) };
        for result in results.chunks_exact(total.len()) {
            ops::merge(self.ks, self.queries(piece), total, result);
        }
    }

    /// Computes a piece's ranges and merges them into the total, which the very first of them begins.
    fn sum(&self, piece: &Piece, next: Option<&Piece>, scratch: &mut Scratch, total: &mut [f32]) {
        let begins = piece.part.as_ref().is_none_or(|part| part.place == 0);
        for range in piece.ranges.clone() {
            if begins && range == piece.ranges.start {
                self.range(piece, range, next, scratch, total);
                continue;
            }
            let mut part = std::mem::take(&mut scratch.part);
            part.resize(total.len(), 0.0);
            self.range(piece, range, next, scratch, &mut part);
            ops::merge(self.ks, self.queries(piece), total, &part);
            scratch.part = part;
        }
    }

    /// Sees to it that the scratch has a piece's queries, and the positions that they see.
    fn gather(&self, piece: &Piece, scratch: &mut Scratch) {
        let wanted = Some((piece.rows.start, piece.head));
        if scratch.gathered == wanted {
            return;
        }
        scratch.gathered = wanted;
        let Scratch { queries, visible, .. } = scratch;
        queries.clear();
        visible.clear();
        let own = self.plan.group * self.past.kv.head_dim();
        for row in piece.rows.clone() {
            queries.extend_from_slice(&self.q[row * self.wide + piece.head * own..][..own]);
            visible.push(self::visible(self.past.window, self.rows[row].1));
        }
        ops::scale(self.ks, queries, self.past.scale);
    }

    /// Computes a range of a piece whose queries are gathered.
    fn range(&self, piece: &Piece, range: usize, next: Option<&Piece>, scratch: &mut Scratch, result: &mut [f32]) {
        let Past { kv, layer, blocks, soft_cap, .. } = self.past;
        let Scratch { queries, visible, slots, work, .. } = scratch;
        let own = blocks[self.rows[piece.rows.start].0];
        let end = visible.last().map_or(0, |seen| seen.end.div_ceil(BLOCK_TOKENS));
        assert!(end <= own.len(), "attend: {} blocks of {end}", own.len());
        let slot = |&block: &u32| kv.slot(block, layer, piece.head);
        let last = end.min((range + 1) * BLOCKS);
        slots.clear();
        slots.extend(own[range * BLOCKS..last].iter().map(slot));
        let behind = || {
            let next = next?;
            Some(kv.slot(blocks[self.rows[next.rows.start].0][next.ranges.start * BLOCKS], layer, next.head))
        };
        let task = Task {
            kind: kv.kind(),
            dim: kv.head_dim(),
            group: self.plan.group,
            queries,
            visible,
            start: range * RANGE,
            slots,
            next: if range + 1 < piece.ranges.end { Some(slot(&own[last])) } else { behind() },
            soft_cap,
        };
        // SAFETY: `ks` is usable on this machine. The slots are the cache's, and hold what the tokens see, as the caller of
        // `attend` promises; if not, they hold other numbers.
        unsafe { (self.ks.ops.attend)(&task, work, result) };
    }

    /// Divides a piece's total into the output.
    fn finish(&self, piece: &Piece, total: &[f32]) {
        let (group, dim) = (self.plan.group, self.past.kv.head_dim());
        let rows = self.queries(piece);
        for i in 0..rows {
            let at = (piece.rows.start + i / group) * self.wide + (piece.head * group + i % group) * dim;
            // SAFETY: these heads of these rows are the piece's alone, or the divided one's whose last part is merged.
            let out = unsafe { self.out.slice(at, dim) };
            out.copy_from_slice(&total[2 * rows + i * padded(dim)..][..dim]);
            ops::scale(self.ks, out, 1.0 / total[rows + i]);
        }
    }
}

/// Neighbouring rows of the same sequence, at most `most` together.
fn tiles(rows: &[(usize, usize)], most: usize) -> Vec<Range<usize>> {
    let mut tiles: Vec<Range<usize>> = Vec::new();
    for (i, &(sequence, position)) in rows.iter().enumerate() {
        match tiles.last_mut() {
            Some(tile) if tile.len() < most && rows[i - 1] == (sequence, position.wrapping_sub(1)) => tile.end += 1,
            _ => tiles.push(i..i + 1),
        }
    }
    tiles
}

/// What the token of a position sees.
fn visible(window: Option<usize>, position: usize) -> Range<usize> {
    window.map_or(0, |window| (position + 1).saturating_sub(window.max(1)))..position + 1
}

/// A pointer that threads write through, each to places of its own.
#[derive(Clone, Copy)]
struct Shared(*mut f32);
// SAFETY: only moves the address; every use argues why its places are disjoint.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// # Safety
    ///
    /// The place lies within the slice that the pointer was made of, and nothing else uses it.
    #[allow(clippy::mut_from_ref)]
    unsafe fn slice(&self, start: usize, len: usize) -> &mut [f32] {
        // SAFETY: the caller's.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), len) }
    }
}
