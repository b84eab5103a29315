//! Causal grouped-query attention of a micro-batch over the KV cache: how it is divided into work.
//!
//! A piece of work is one KV head and a tile of neighbouring tokens of a sequence: keys and values are read once for all of
//! the tile's tokens and heads. Where there are few such pieces, each is divided by ranges of positions, which are
//! always computed by themselves and merged in order (`ops::attention`) by the thread that finishes the last of them. So how
//! work is divided does not show in the result.
//!
//! Each thread has a share of neighbouring pieces, so that it asks for the next one's beginning at the end of each, and before the
//! first (`Plan::first`); who is done takes pieces from the end of others' shares.

use crate::dispatch::Kernels;
use crate::kv::{KvCache, Slot, BLOCK_TOKENS};
use crate::ops;
use crate::ops::attention::{padded, partial_len, Task, Work, RANGE};
use crate::pool::{portion, Pool};
use std::cell::RefCell;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

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
    /// What this is a part of, and the place of the ranges' results among partial results; `None` if all ranges are here.
    part_of: Option<(usize, usize)>,
}

/// A piece that was divided.
struct Divided {
    /// Place of its results, one range's after the other.
    partials: Range<usize>,
    parts: usize,
    /// Parts that are not finished.
    left: AtomicUsize,
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
    queries: Vec<f32>,
    slots: Vec<Slot>,
    visible: Vec<Range<usize>>,
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
                    let whole = len..len + seen.len() * size;
                    for first in seen.clone().step_by(some) {
                        let ranges = first..seen.end.min(first + some);
                        let part_of = Some((divided.len(), len));
                        len += ranges.len() * size;
                        pieces.push(Piece { rows: tile.clone(), head, ranges, part_of });
                    }
                    let parts = seen.len().div_ceil(some);
                    divided.push(Divided { partials: whole, parts, left: AtomicUsize::new(parts) });
                } else {
                    pieces.push(Piece { rows: tile.clone(), head, ranges: seen.clone(), part_of: None });
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
        self.divided.iter().for_each(|divided| divided.left.store(divided.parts, Ordering::Relaxed));
        partials.resize(self.partials.max(partials.len()), 0.0);
        let (target, partial) = (Shared(out.as_mut_ptr()), Shared(partials.as_mut_ptr()));
        pool.run(threads, &|thread| {
            thread_local!(static SCRATCH: RefCell<Scratch> = RefCell::default());
            SCRATCH.with_borrow_mut(|scratch| {
                // Who has none left takes of the others'.
                let take = || (0..threads).find_map(|i| self.shares[(thread + i) % threads].take(i == 0));
                while let Some((index, on)) = take() {
                    let piece = &self.pieces[index];
                    let next = self.pieces.get(index + 1).filter(|_| on);
                    let size = partial_len(piece.rows.len() * group, dim);
                    match piece.part_of {
                        Some((whole, at)) => {
                            // SAFETY: pieces have places of their own, within the length just set.
                            let parts = unsafe { partial.slice(at, piece.ranges.len() * size) };
                            let mut parts = parts.chunks_exact_mut(size);
                            past.compute(ks, piece, next, rows, q, wide, scratch, |part| {
                                parts.next().expect("a place for each range").copy_from_slice(part);
                            });
                            // Acquires what the other parts' threads released when they had written theirs.
                            let Divided { partials, left, .. } = &self.divided[whole];
                            if left.fetch_sub(1, Ordering::AcqRel) == 1 {
                                // SAFETY: all parts are written, and this thread alone was the last.
                                let all = unsafe { partial.slice(partials.start, partials.len()) };
                                let (total, parts) = all.split_at_mut(size);
                                parts
                                    .chunks_exact(size)
                                    .for_each(|part| ops::merge(ks, piece.rows.len() * group, total, part));
                                // SAFETY: these heads of these rows are the divided piece's alone.
                                unsafe { finish(ks, piece, total, dim, wide, target) };
                            }
                        }
                        None => {
                            let mut total = std::mem::take(&mut scratch.total);
                            total.clear();
                            past.compute(ks, piece, next, rows, q, wide, scratch, |part| {
                                if total.is_empty() {
                                    total.extend_from_slice(part);
                                } else {
                                    ops::merge(ks, piece.rows.len() * group, &mut total, part);
                                }
                            });
                            // SAFETY: these heads of these rows are this piece's alone.
                            unsafe { finish(ks, piece, &total, dim, wide, target) };
                            scratch.total = total;
                        }
                    }
                }
            });
        });
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

impl Past<'_> {
    /// Computes a piece, `next` behind which is likely to be the thread's next; `each` gets the ranges' results in order.
    #[allow(clippy::too_many_arguments)]
    fn compute(
        &self,
        ks: &Kernels,
        piece: &Piece,
        next: Option<&Piece>,
        rows: &[(usize, usize)],
        q: &[f32],
        wide: usize,
        scratch: &mut Scratch,
        mut each: impl FnMut(&[f32]),
    ) {
        let (dim, kv_heads) = (self.kv.head_dim(), self.kv.kv_heads());
        let group = wide / (kv_heads * dim);
        let Scratch { queries, slots, visible, part, work, .. } = scratch;
        queries.clear();
        visible.clear();
        for row in piece.rows.clone() {
            queries.extend_from_slice(&q[row * wide + piece.head * group * dim..][..group * dim]);
            visible.push(self::visible(self.window, rows[row].1));
        }
        ops::scale(ks, queries, self.scale);
        let blocks = self.blocks[rows[piece.rows.start].0];
        let end = visible.last().map_or(0, |seen| seen.end.div_ceil(BLOCK_TOKENS));
        assert!(end <= blocks.len(), "attend: {} blocks of {end}", blocks.len());
        part.resize(partial_len(visible.len() * group, dim), 0.0);
        let behind = next.map(|next| {
            let blocks = self.blocks[rows[next.rows.start].0];
            self.kv.slot(blocks[next.ranges.start * BLOCKS], self.layer, next.head)
        });
        for range in piece.ranges.clone() {
            slots.clear();
            let slot = |&block: &u32| self.kv.slot(block, self.layer, piece.head);
            let last = end.min((range + 1) * BLOCKS);
            slots.extend(blocks[range * BLOCKS..last].iter().map(slot));
            let task = Task {
                kind: self.kv.kind(),
                dim,
                group,
                queries,
                visible,
                start: range * RANGE,
                slots,
                next: if range + 1 < piece.ranges.end { Some(slot(&blocks[last])) } else { behind },
                soft_cap: self.soft_cap,
            };
            // SAFETY: `ks` is usable on this machine. The slots are the cache's, and hold what the tokens see, as the caller
            // promises; if not, they hold other numbers.
            unsafe { (ks.ops.attend)(&task, work, part) };
            each(part);
        }
    }
}

/// Divides a piece's sums into the output.
///
/// # Safety
///
/// `out` has `wide` floats of every row, and nobody else uses the piece's heads and rows of it.
unsafe fn finish(ks: &Kernels, piece: &Piece, total: &[f32], dim: usize, wide: usize, out: Shared) {
    let rows = total.len() / (2 + padded(dim));
    let group = rows / piece.rows.len();
    for i in 0..rows {
        let at = (piece.rows.start + i / group) * wide + (piece.head * group + i % group) * dim;
        // SAFETY: the caller's.
        let out = unsafe { out.slice(at, dim) };
        out.copy_from_slice(&total[2 * rows + i * padded(dim)..][..dim]);
        ops::scale(ks, out, 1.0 / total[rows + i]);
    }
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
