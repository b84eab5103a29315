//! Attention of a few query rows over a range of cached positions, with the running maximum and sum of online softmax
//! (arXiv:1805.02867, arXiv:2205.14135).
//!
//! The order of every sum is fixed by positions alone. Positions come in blocks of `BLOCK_TOKENS` and ranges of `RANGE`,
//! both counted from position 0.
//! - A score is one chain of fma over the head's dimensions; lanes of a vector are positions.
//! - A block with a score more than `SLACK` above the running maximum raises that to its largest, and what was summed is
//!   multiplied by e^(old − new). Then its weights e^(score − maximum), at least e^−44, are added: their sum in 16 lanes,
//!   position j to lane j mod 16, and each dimension of the result by one chain of fma in order of position; lanes of a vector
//!   are dimensions.
//! - A range starts anew and ends with the lanes added as `ops::dot` adds them. Ranges are merged in order (`merge`).
//!
//! So no lane meets another before a range ends, and any width of vector gives the same bits. Positions that a row does
//! not see add nothing; whatever is in their place is not used.

use super::exp::{exp_lanes, exp_weight};
use crate::arch::vector::{Vector, MAX_LANES};
use crate::arch::LINE;
use crate::descriptor::KvType;
use crate::kv::{Slot, BLOCK_TOKENS, VALUE_DIMS};
use std::ops::Range;

/// Positions that are summed by themselves before they are merged with others.
pub const RANGE: usize = 256;
/// Floats that a row of results is padded to: whole vectors, several at a time. As many dimensions of values lie together.
const PAD: usize = VALUE_DIMS;
/// Virtual lanes of the sum of weights.
const LANES: usize = super::LANES;
/// How far scores may lie above the running maximum before it is raised to theirs. Weights stay below e^8, and sums need seldom be
/// brought to another maximum, which the next block's would wait for.
const SLACK: f32 = 8.0;
/// Rows from which on a block is converted to f32 once, instead of by every few rows.
const CONVERTED: usize = 9;

/// Query rows, and the part of the cache that they look at.
pub(crate) struct Task<'a> {
    pub kind: KvType,
    pub dim: usize,
    /// Rows of a token: the heads that share the KV head.
    pub group: usize,
    /// A row of `dim` for each token and head, scaled.
    pub queries: &'a [f32],
    /// The positions that each token sees; starts and ends do not fall from one to the next.
    pub visible: &'a [Range<usize>],
    /// The position where the range begins, and its blocks as far as any token sees.
    pub start: usize,
    pub slots: &'a [Slot],
    /// The slot after those.
    pub next: Option<Slot>,
    /// c of `c · tanh(score / c)`.
    pub soft_cap: Option<f32>,
}

/// Floats of a row of results.
pub(crate) fn padded(dim: usize) -> usize {
    dim.next_multiple_of(PAD)
}

/// Floats that `attend` writes: each row's maximum, each row's sum of weights, each row's weighted values.
pub(crate) fn partial_len(rows: usize, dim: usize) -> usize {
    rows * (2 + padded(dim))
}

/// Scratch of one thread.
#[derive(Default)]
pub(crate) struct Work {
    lanes: Vec<f32>,
    weights: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
}

/// What a cache holds: something that vectors of floats are made of.
trait Element: Copy {
    const ZERO: Self;
    /// # Safety
    ///
    /// The vector's, for `V::LANES` elements.
    unsafe fn load<V: Vector>(from: *const Self) -> V;
    /// The first `n` elements, the rest zeros.
    ///
    /// # Safety
    ///
    /// The vector's, for the lesser of `n` and `V::LANES` elements.
    #[inline(always)]
    unsafe fn load_some<V: Vector>(from: *const Self, n: usize) -> V {
        if n >= V::LANES {
            return Self::load(from);
        }
        let mut some = [Self::ZERO; MAX_LANES];
        core::ptr::copy_nonoverlapping(from, some.as_mut_ptr(), n);
        Self::load(some.as_ptr())
    }
}

impl Element for f32 {
    const ZERO: f32 = 0.0;
    #[inline(always)]
    unsafe fn load<V: Vector>(from: *const f32) -> V {
        V::load(from)
    }
}

/// A half float.
impl Element for u16 {
    const ZERO: u16 = 0;
    #[inline(always)]
    unsafe fn load<V: Vector>(from: *const u16) -> V {
        V::load_f16(from)
    }
}

impl Element for i8 {
    const ZERO: i8 = 0;
    #[inline(always)]
    unsafe fn load<V: Vector>(from: *const i8) -> V {
        V::load_i8(from)
    }
}

/// Computes what the rows see of the range; `out` has `partial_len`. A row that sees nothing has a sum of 0.
///
/// # Safety
///
/// The slots are of the task's kind and dimension, with values stored at every position that a token sees.
#[inline(always)]
pub(crate) unsafe fn attend<V: Vector>(task: &Task, work: &mut Work, out: &mut [f32]) {
    match task.kind {
        KvType::F32 => range::<V, f32>(task, work, out),
        KvType::F16 => range::<V, u16>(task, work, out),
        KvType::Q8 => range::<V, i8>(task, work, out),
    }
}

/// The rows' results so far.
struct Rows<'a> {
    max: &'a mut [f32],
    /// `LANES` each.
    lanes: &'a mut [f32],
    /// `BLOCK_TOKENS` each: scores, then weights.
    weights: &'a mut [f32],
    /// `padded(dim)` each.
    sums: &'a mut [f32],
}

#[inline(always)]
unsafe fn range<V: Vector, E: Element>(task: &Task, work: &mut Work, out: &mut [f32]) {
    let (dim, group, tokens) = (task.dim, task.group, task.visible.len());
    let rows = tokens * group;
    assert!(task.queries.len() == rows * dim && out.len() == partial_len(rows, dim) && V::LANES <= MAX_LANES);
    let (max, rest) = out.split_at_mut(rows);
    let (totals, sums) = rest.split_at_mut(rows);
    max.fill(f32::NEG_INFINITY);
    sums.fill(0.0);
    work.lanes.clear();
    work.lanes.resize(rows * LANES, 0.0);
    work.weights.resize((rows * BLOCK_TOKENS).max(work.weights.len()), 0.0);
    let mut rows = Rows { max, lanes: &mut work.lanes, weights: &mut work.weights, sums };
    for (b, slot) in task.slots.iter().enumerate() {
        let begin = task.start + b * BLOCK_TOKENS;
        let within = |position: usize| position.saturating_sub(begin).min(BLOCK_TOKENS);
        let bounds = |token: usize| within(task.visible[token].start)..within(task.visible[token].end);
        // The tokens that see something of the block are neighbours.
        let Some(first) = (0..tokens).find(|&t| !bounds(t).is_empty()) else { continue };
        let count = (first..tokens).take_while(|&t| !bounds(t).is_empty()).count();
        let seeing = first..first + count;
        let (keys, values) = (slot.keys.cast::<E>(), slot.values.cast::<E>());
        // The next slot is asked for along the way, place by place; where there is none, this one again.
        let next = task.slots.get(b + 1).or(task.next.as_ref()).unwrap_or(slot);
        let (next_keys, next_values) = (next.keys.cast::<E>(), next.values.cast::<E>());
        if count * group < CONVERTED || size_of::<E>() == size_of::<f32>() {
            block::<V, E>(task, slot, [keys, values], [next_keys, next_values], seeing, bounds, &mut rows);
        } else {
            work.keys.resize((dim * BLOCK_TOKENS).max(work.keys.len()), 0.0);
            work.values.resize((dim * BLOCK_TOKENS).max(work.values.len()), 0.0);
            convert::<V, E>(keys, dim * BLOCK_TOKENS, &mut work.keys, next_keys);
            convert::<V, E>(values, dim * BLOCK_TOKENS, &mut work.values, next_values);
            let converted = [work.keys.as_ptr(), work.values.as_ptr()];
            block::<V, f32>(task, slot, converted, converted, seeing, bounds, &mut rows);
        }
    }
    for (total, lanes) in totals.iter_mut().zip(rows.lanes.chunks_exact(LANES)) {
        let v: [f32; 8] = std::array::from_fn(|i| lanes[i] + lanes[i + 8]);
        *total = ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
    }
}

/// `n` elements as f32; as many from `next` on are asked for.
#[inline(always)]
unsafe fn convert<V: Vector, E: Element>(from: *const E, n: usize, to: &mut [f32], next: *const E) {
    for i in (0..n).step_by(V::LANES) {
        prefetch::<V, E>(next, i / V::LANES);
        let v = E::load_some::<V>(from.add(i), n - i);
        if n - i >= V::LANES {
            v.store(to.as_mut_ptr().add(i));
        } else {
            let mut some = [0f32; MAX_LANES];
            v.store(some.as_mut_ptr());
            to[i..n].copy_from_slice(&some[..n - i]);
        }
    }
}

/// How much further than the next slot is asked for, whose memory the slot after it mostly follows: hardware prefetching then
/// meets the beginning of a page, where it has to start anew, before its lines are waited for (5 % of the time from memory).
const FURTHER: usize = 1024;

/// Asks for what lies at vector `p` of some from `next` on, if a line starts there: called beside loads of another slot's.
#[inline(always)]
unsafe fn prefetch<V: Vector, E: Element>(next: *const E, p: usize) {
    if p * V::LANES * size_of::<E>() % LINE == 0 {
        V::prefetch(next.wrapping_add(p * V::LANES).cast::<u8>().wrapping_add(FURTHER));
    }
}

/// Adds a block for the tokens of `seeing`, `bounds` of whose positions they see. Keys and values come with those of the slot
/// to ask for.
#[inline(always)]
unsafe fn block<V: Vector, E: Element>(
    task: &Task,
    slot: &Slot,
    [keys, values]: [*const E; 2],
    [next_keys, next_values]: [*const E; 2],
    seeing: Range<usize>,
    bounds: impl Fn(usize) -> Range<usize>,
    rows: &mut Rows,
) {
    let (dim, group) = (task.dim, task.group);
    let last = seeing.end * group;
    let mut row = seeing.start * group;
    while row < last {
        let queries = task.queries.as_ptr().add(row * dim);
        let weights = rows.weights.as_mut_ptr().add(row * BLOCK_TOKENS);
        row += match last - row {
            1 => scores::<V, E, 1>(queries, [keys, next_keys], dim, weights),
            2 => scores::<V, E, 2>(queries, [keys, next_keys], dim, weights),
            3 => scores::<V, E, 3>(queries, [keys, next_keys], dim, weights),
            8.. if most_rows::<V>() == 8 => scores::<V, E, 8>(queries, [keys, next_keys], dim, weights),
            _ => scores::<V, E, 4>(queries, [keys, next_keys], dim, weights),
        };
    }
    let mut row = seeing.start * group;
    while row < last {
        // Some rows that see the same, as many as `weigh` takes at once.
        let seen = bounds(row / group);
        let same = (row..last).take(most_rows::<V>()).take_while(|row| bounds(row / group) == seen).count();
        let same = if same < 8 { same.min(4) } else { 8 };
        soften::<V>(task, slot, seen.clone(), row..row + same, rows);
        let weights = rows.weights.as_ptr().add(row * BLOCK_TOKENS);
        let sums = rows.sums.as_mut_ptr().add(row * padded(dim));
        row += match same {
            1 => weigh::<V, E, 1>(weights, [values, next_values], dim, seen, sums),
            2 => weigh::<V, E, 2>(weights, [values, next_values], dim, seen, sums),
            3 => weigh::<V, E, 3>(weights, [values, next_values], dim, seen, sums),
            8 if most_rows::<V>() == 8 => weigh::<V, E, 8>(weights, [values, next_values], dim, seen, sums),
            _ => weigh::<V, E, 4>(weights, [values, next_values], dim, seen, sums),
        };
    }
}

/// Rows that share what is loaded of keys and values: their sums must find registers.
#[inline(always)]
const fn most_rows<V: Vector>() -> usize {
    if V::LANES == 16 {
        8
    } else {
        4
    }
}

/// Scores of N rows with the block's keys; `P` vectors of positions at a time, so that eight chains hide the latency of fma
/// and registers last. Returns N.
#[inline(always)]
unsafe fn scores<V: Vector, E: Element, const N: usize>(
    q: *const f32,
    keys: [*const E; 2],
    dim: usize,
    out: *mut f32,
) -> usize {
    #[inline(always)]
    unsafe fn some<V: Vector, E: Element, const N: usize, const P: usize>(
        q: *const f32,
        [keys, next]: [*const E; 2],
        dim: usize,
        out: *mut f32,
    ) {
        for first in (0..BLOCK_TOKENS).step_by(P * V::LANES) {
            let mut acc = [[V::zero(); P]; N];
            for d in 0..dim {
                let at = d * BLOCK_TOKENS + first;
                let mut k = [V::zero(); P];
                for (p, k) in k.iter_mut().enumerate() {
                    prefetch::<V, E>(next.wrapping_add(at), p);
                    *k = E::load(keys.add(at + p * V::LANES));
                }
                for (n, acc) in acc.iter_mut().enumerate() {
                    let q = V::splat(*q.add(n * dim + d));
                    for (acc, k) in acc.iter_mut().zip(k) {
                        *acc = k.fma(q, *acc);
                    }
                }
            }
            for (n, acc) in acc.iter().enumerate() {
                for (p, acc) in acc.iter().enumerate() {
                    acc.store(out.add(n * BLOCK_TOKENS + first + p * V::LANES));
                }
            }
        }
    }
    if N <= 2 && V::LANES == 8 {
        some::<V, E, N, 4>(q, keys, dim, out);
    } else {
        some::<V, E, N, 2>(q, keys, dim, out);
    }
    N
}

/// The largest scores of a block, lane by lane.
#[inline(always)]
unsafe fn lane_max<V: Vector>(scores: &[f32]) -> V {
    let mut largest = V::splat(f32::NEG_INFINITY);
    for scores in scores.chunks_exact(V::LANES) {
        largest = V::load(scores.as_ptr()).max(largest);
    }
    largest
}

/// Scores of some rows that see the same to weights, with what was summed before brought to the same maximum. Each step is taken
/// for all rows before the next one: a row's alone would wait for every result.
#[inline(always)]
unsafe fn soften<V: Vector>(task: &Task, slot: &Slot, seen: Range<usize>, some: Range<usize>, rows: &mut Rows) {
    assert!(some.len() <= MAX_LANES);
    let at = |v: usize| v * V::LANES;
    let vectors = BLOCK_TOKENS / V::LANES;
    let scaled = task.kind == KvType::Q8;
    let weights = &mut rows.weights[some.start * BLOCK_TOKENS..some.end * BLOCK_TOKENS];
    for weights in weights.chunks_exact_mut(BLOCK_TOKENS) {
        if scaled || task.soft_cap.is_some() {
            for v in 0..vectors {
                let mut score = V::load(weights.as_ptr().add(at(v)));
                if scaled {
                    score = score.mul(V::load(slot.key_scales.add(at(v))));
                }
                if let Some(cap) = task.soft_cap {
                    // tanh(x) = 1 − 2 / (e^2x + 1)
                    let (cap, one) = (V::splat(cap), V::splat(1.0));
                    let e = exp_lanes(score.div(cap).mul(V::splat(2.0)));
                    score = cap.mul(one.sub(V::splat(2.0).div(e.add(one))));
                }
                score.store(weights.as_mut_ptr().add(at(v)));
            }
        }
        if seen.len() < BLOCK_TOKENS {
            weights[..seen.start].fill(f32::NEG_INFINITY);
            weights[seen.end..].fill(f32::NEG_INFINITY);
        }
    }
    // The most by which any row's largest score is too large. A score that is NaN is not greater, so a lane keeps what it had; it
    // shows in the weights.
    let mut above = V::splat(f32::NEG_INFINITY);
    for (weights, &max) in weights.chunks_exact(BLOCK_TOKENS).zip(&rows.max[some.clone()]) {
        above = lane_max::<V>(weights).sub(V::splat(max + SLACK)).max(above);
    }
    if above.reduce_max() > 0.0 {
        for (row, weights) in some.clone().zip(weights.chunks_exact(BLOCK_TOKENS)) {
            let (before, max) = (rows.max[row], lane_max::<V>(weights).reduce_max());
            if max > before + SLACK {
                let factor = exp_weight(V::splat(before - max));
                let lanes = &mut rows.lanes[row * LANES..][..LANES];
                let sums = &mut rows.sums[row * padded(task.dim)..][..padded(task.dim)];
                for place in lanes.chunks_exact_mut(V::LANES).chain(sums.chunks_exact_mut(V::LANES)) {
                    V::load(place.as_ptr()).mul(factor).store(place.as_mut_ptr());
                }
                rows.max[row] = max;
            }
        }
    }
    for (row, weights) in some.zip(weights.chunks_exact_mut(BLOCK_TOKENS)) {
        let max = V::splat(rows.max[row]);
        for v in 0..vectors {
            let place = weights.as_mut_ptr().add(at(v));
            exp_weight(V::load(place).sub(max)).store(place);
        }
        if seen.len() < BLOCK_TOKENS {
            weights[..seen.start].fill(0.0);
            weights[seen.end..].fill(0.0);
        }
        for v in 0..vectors {
            let place = weights.as_mut_ptr().add(at(v));
            let weight = V::load(place);
            let lane = rows.lanes.as_mut_ptr().add(row * LANES + at(v) % LANES);
            V::load(lane).add(weight).store(lane);
            if scaled {
                weight.mul(V::load(slot.value_scales.add(at(v)))).store(place);
            }
        }
    }
}

/// Adds the weighted values of the seen positions to N rows' sums. Returns N.
#[inline(always)]
unsafe fn weigh<V: Vector, E: Element, const N: usize>(
    weights: *const f32,
    [values, next]: [*const E; 2],
    dim: usize,
    seen: Range<usize>,
    sums: *mut f32,
) -> usize {
    /// `P` vectors of dimensions, of which `left` are the head's; WHOLE: all of them. Positions are `stride` apart, sums of rows
    /// `width`.
    #[inline(always)]
    unsafe fn some<V: Vector, E: Element, const N: usize, const P: usize, const WHOLE: bool>(
        weights: *const f32,
        [values, next]: [*const E; 2],
        [stride, width]: [usize; 2],
        left: usize,
        seen: Range<usize>,
        sums: *mut f32,
    ) {
        let mut acc = [[V::zero(); P]; N];
        for (n, acc) in acc.iter_mut().enumerate() {
            for (p, acc) in acc.iter_mut().enumerate() {
                *acc = V::load(sums.add(n * width + p * V::LANES));
            }
        }
        for j in seen {
            let mut v = [V::zero(); P];
            for (p, v) in v.iter_mut().enumerate() {
                prefetch::<V, E>(next.wrapping_add(j * stride), p);
                let from = values.wrapping_add(j * stride + p * V::LANES);
                *v = if WHOLE { E::load(from) } else { E::load_some(from, left.saturating_sub(p * V::LANES)) };
            }
            for (n, acc) in acc.iter_mut().enumerate() {
                let weight = V::splat(*weights.add(n * BLOCK_TOKENS + j));
                for (acc, v) in acc.iter_mut().zip(v) {
                    *acc = v.fma(weight, *acc);
                }
            }
        }
        for (n, acc) in acc.iter().enumerate() {
            for (p, acc) in acc.iter().enumerate() {
                acc.store(sums.add(n * width + p * V::LANES));
            }
        }
    }
    let wide = N <= 2 && V::LANES == 8;
    let step = if wide { 4 * V::LANES } else { 2 * V::LANES };
    for d in (0..dim).step_by(step) {
        // `VALUE_DIMS` dimensions of every position, then the next ones.
        let chunk = d / VALUE_DIMS * VALUE_DIMS;
        let at = chunk * BLOCK_TOKENS + d - chunk;
        let (values, sums, left) = ([values.add(at), next.wrapping_add(at)], sums.add(d), dim - d);
        let (apart, seen) = ([VALUE_DIMS.min(dim - chunk), padded(dim)], seen.clone());
        match (wide, left >= step) {
            (true, true) => some::<V, E, N, 4, true>(weights, values, apart, left, seen, sums),
            (true, false) => some::<V, E, N, 4, false>(weights, values, apart, left, seen, sums),
            (false, true) => some::<V, E, N, 2, true>(weights, values, apart, left, seen, sums),
            (false, false) => some::<V, E, N, 2, false>(weights, values, apart, left, seen, sums),
        }
    }
    N
}

/// Adds what `attend` gave for a later range to what it gave for those before; both of `rows` rows.
///
/// With m the larger maximum, a = e^(max − m) and b = e^(part's max − m): sum · a, then fma(part's sum, b, ·), and values alike.
#[inline(always)]
pub(crate) unsafe fn merge<V: Vector>(rows: usize, total: &mut [f32], part: &[f32]) {
    assert!(total.len() == part.len() && rows > 0 && total.len() % rows == 0);
    let width = total.len() / rows - 2;
    assert!(width % V::LANES == 0 && V::LANES <= MAX_LANES);
    for first in (0..rows).step_by(V::LANES) {
        // As many rows at once as there are lanes; what lanes without a row hold is of no account.
        let some = V::LANES.min(rows - first);
        let lanes = |from: &[f32], at: usize| {
            let mut lanes = [0f32; MAX_LANES];
            lanes[..some].copy_from_slice(&from[at..][..some]);
            V::load(lanes.as_ptr())
        };
        let spread = |v: V| {
            let mut lanes = [0f32; MAX_LANES];
            v.store(lanes.as_mut_ptr());
            lanes
        };
        let (before, later) = (lanes(total, first), lanes(part, first));
        let max = later.max(before);
        let (a, b) = (exp_weight(before.sub(max)), exp_weight(later.sub(max)));
        let sums = spread(lanes(part, rows + first).fma(b, lanes(total, rows + first).mul(a)));
        let (max, a, b) = (spread(max), spread(a), spread(b));
        for i in 0..some {
            let row = first + i;
            let (sum, values) = (rows + row, 2 * rows + row * width);
            if part[sum] == 0.0 {
                continue; // saw nothing
            }
            if total[sum] == 0.0 {
                total[row] = part[row];
                total[sum] = part[sum];
                total[values..][..width].copy_from_slice(&part[values..][..width]);
                continue;
            }
            (total[row], total[sum]) = (max[i], sums[i]);
            let (a, b) = (V::splat(a[i]), V::splat(b[i]));
            for at in (values..values + width).step_by(V::LANES) {
                let place = total.as_mut_ptr().add(at);
                V::load(part.as_ptr().add(at)).fma(b, V::load(place).mul(a)).store(place);
            }
        }
    }
}

/// A row of a cached head as int8 codes; returns their scale. `quantize` has the rule for scales and rounding.
#[inline(always)]
pub(crate) unsafe fn to_q8<V: Vector>(x: &[f32], codes: &mut [i8]) -> f32 {
    // One element after the other: exact, so the compiler's vectors cannot change bits. `V` only says for which instruction set.
    let largest = x.iter().map(|v| v.to_bits() & 0x7fff_ffff).max().unwrap_or(0);
    let (scale, factor) = crate::quantize::group_scale(largest);
    for (code, v) in codes.iter_mut().zip(x) {
        *code = if factor == 0.0 { 0 } else { (v * factor).round_ties_even().clamp(-127.0, 127.0) as i8 };
    }
    scale
}
