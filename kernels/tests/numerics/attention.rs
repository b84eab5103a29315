//! Attention: portable code follows the specified order, every instruction set, thread count and division gives its bits,
//! and those are near the exact values, in every type of cache.

use super::{assert_same, stride, Random};
use lutra_kernels::attention::{Past, Plan};
use lutra_kernels::descriptor::KvType;
use lutra_kernels::kv::{KvCache, BLOCK_TOKENS};
use lutra_kernels::{available, ops, select, Isa, Kernels, Pool};

const TYPES: [KvType; 3] = [KvType::F32, KvType::F16, KvType::Q8];

#[derive(Clone, Copy, Debug)]
struct Case {
    kv: KvType,
    dim: usize,
    kv_heads: usize,
    group: usize,
    /// Tokens of two sequences; the second's are every second block's.
    len: [usize; 2],
    soft_cap: Option<f32>,
    window: Option<usize>,
}

/// What is attended to: keys and values of layer 1, position by position and head by head.
struct Sequences {
    kv: KvCache,
    keys: [Vec<f32>; 2],
    values: [Vec<f32>; 2],
}

impl Case {
    fn wide(&self) -> usize {
        self.kv_heads * self.group * self.dim
    }

    fn fill(&self, ks: &Kernels, size: f32, random: &mut Random) -> Sequences {
        let mut kv = KvCache::new(self.kv, self.len[0] + self.len[1] + 64, 2, self.kv_heads, self.dim).unwrap();
        // Every slot holds something that must not show: NaN.
        let rest = vec![f32::NAN; self.dim];
        for block in 0..kv.blocks_total() as u32 {
            for place in 0..2 * self.kv_heads * BLOCK_TOKENS {
                let (layer, head) = (place % 2, place / 2 % self.kv_heads);
                // SAFETY: one thread.
                unsafe { kv.writer().store(ks, block, layer, head, place / 2 / self.kv_heads, &rest, &rest) };
            }
        }
        let tokens = vec![1; self.len[0].max(self.len[1])];
        let mut done = [0, 0];
        while done != self.len {
            for i in 0..2 {
                let next = (done[i] + BLOCK_TOKENS).min(self.len[i]);
                if next > done[i] {
                    kv.extend(&[(i as u32, done[i], &tokens[done[i]..next])]).unwrap();
                }
                done[i] = next;
            }
        }
        let mut sequences = Sequences { kv, keys: [vec![], vec![]], values: [vec![], vec![]] };
        let width = self.kv_heads * self.dim;
        for i in 0..2 {
            let mut rows = || random.floats(self.len[i] * width).iter().map(|x| x * size).collect::<Vec<_>>();
            (sequences.keys[i], sequences.values[i]) = (rows(), rows());
            let blocks = sequences.kv.get(i as u32).map(|s| s.blocks.clone()).unwrap_or_default();
            for position in 0..self.len[i] {
                for head in 0..self.kv_heads {
                    let at = position * width + head * self.dim..position * width + (head + 1) * self.dim;
                    let (k, v) = (&sequences.keys[i][at.clone()], &sequences.values[i][at]);
                    let block = blocks[position / BLOCK_TOKENS];
                    // SAFETY: one thread.
                    unsafe { sequences.kv.writer().store(ks, block, 1, head, position % BLOCK_TOKENS, k, v) };
                }
            }
        }
        sequences
    }

    fn scale(&self) -> f32 {
        1.0 / (self.dim as f32).sqrt()
    }

    fn attend(&self, ks: &Kernels, s: &Sequences, rows: &[(usize, usize)], q: &[f32], pool: &Pool) -> Vec<f32> {
        let blocks: Vec<&[u32]> = (0..2).map(|i| s.kv.get(i).map_or(&[][..], |s| &s.blocks)).collect();
        let Case { soft_cap, window, .. } = *self;
        let past = Past { kv: &s.kv, layer: 1, blocks: &blocks, scale: self.scale(), soft_cap, window };
        let mut out = vec![f32::NAN; q.len()];
        let plan = Plan::new(&s.kv, rows, self.group, window, pool.threads());
        plan.attend(ks, past, rows, q, &mut out, &mut Vec::new(), pool);
        out
    }

    /// The specification, number by number.
    fn specified(&self, s: &Sequences, (sequence, position): (usize, usize), q: &[f32]) -> Vec<f32> {
        let portable = select(Some("portable")).unwrap();
        let exp = |x: f32| {
            let mut x = [x];
            ops::exp(portable, &mut x, 0.0);
            x[0]
        };
        let weight = |x: f32| exp(if x < -44.0 { -44.0 } else { x });
        let (dim, width) = (self.dim, self.kv_heads * self.dim);
        let mut out = vec![];
        for (h, q) in q.chunks_exact(dim).enumerate() {
            // What the cache holds, and its scale.
            let held = |rows: &[f32], j: usize| {
                let x = &rows[j * width + h / self.group * dim..][..dim];
                match self.kv {
                    KvType::F32 => (x.to_vec(), 1.0),
                    KvType::F16 => {
                        let (mut half, mut x32) = (vec![0; dim], vec![0.0; dim]);
                        ops::to_f16(portable, x, &mut half);
                        ops::from_f16(portable, &half, &mut x32);
                        (x32, 1.0)
                    }
                    KvType::Q8 => {
                        let mut codes = vec![0; dim];
                        let scale = ops::to_q8(portable, x, &mut codes);
                        (codes.iter().map(|&c| f32::from(c)).collect(), scale)
                    }
                }
            };
            let first = self.window.map_or(0, |w| (position + 1).saturating_sub(w));
            let mut total: Option<(f32, f32, Vec<f32>)> = None;
            for range in (0..=position).step_by(256) {
                let (mut max, mut lanes, mut sums) = (f32::NEG_INFINITY, [0f32; 16], vec![0f32; dim]);
                let mut seen = false;
                for block in (range..(range + 256).min(position + 1)).step_by(32) {
                    let see: Vec<usize> = (block..block + 32).filter(|j| (first..=position).contains(j)).collect();
                    if see.is_empty() {
                        continue;
                    }
                    seen = true;
                    let score = |&j: &usize| {
                        let (k, scale) = held(&s.keys[sequence], j);
                        let mut score = 0f32;
                        for d in 0..dim {
                            score = k[d].mul_add(q[d] * self.scale(), score);
                        }
                        score *= scale;
                        match self.soft_cap {
                            Some(cap) => cap * (1.0 - 2.0 / (exp(score / cap * 2.0) + 1.0)),
                            None => score,
                        }
                    };
                    let scores: Vec<f32> = see.iter().map(score).collect();
                    let largest = scores.iter().fold(max, |m, &s| if s > m { s } else { m });
                    if largest > max + 8.0 {
                        let factor = weight(max - largest);
                        lanes.iter_mut().chain(&mut sums).for_each(|x| *x *= factor);
                        max = largest;
                    }
                    for (&j, score) in see.iter().zip(scores) {
                        let weight = weight(score - max);
                        lanes[j % 16] += weight;
                        let (v, scale) = held(&s.values[sequence], j);
                        for d in 0..dim {
                            sums[d] = v[d].mul_add(weight * scale, sums[d]);
                        }
                    }
                }
                if !seen {
                    continue;
                }
                let v: Vec<f32> = (0..8).map(|i| lanes[i] + lanes[i + 8]).collect();
                let sum = ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
                total = Some(match total {
                    None => (max, sum, sums),
                    Some((m, t, values)) => {
                        let both = if max > m { max } else { m };
                        let (a, b) = (weight(m - both), weight(max - both));
                        let add = |x: f32, y: f32| y.mul_add(b, x * a);
                        (both, add(t, sum), values.iter().zip(&sums).map(|(&x, &y)| add(x, y)).collect())
                    }
                });
            }
            let (_, sum, values) = total.unwrap();
            out.extend(values.iter().map(|x| x * (1.0 / sum)));
        }
        out
    }

    /// In f64, of the floats that were stored.
    fn exact(&self, s: &Sequences, (sequence, position): (usize, usize), q: &[f32]) -> Vec<f64> {
        let (dim, width) = (self.dim, self.kv_heads * self.dim);
        let mut out = vec![];
        for (h, q) in q.chunks_exact(dim).enumerate() {
            let of = |rows: &[f32], j: usize, d: usize| f64::from(rows[j * width + h / self.group * dim + d]);
            let seen = self.window.map_or(0, |w| (position + 1).saturating_sub(w))..position + 1;
            let score = |j: usize| {
                let dot: f64 = (0..dim).map(|d| f64::from(q[d]) * of(&s.keys[sequence], j, d)).sum();
                let score = dot / (dim as f64).sqrt();
                self.soft_cap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
            };
            let scores: Vec<f64> = seen.clone().map(score).collect();
            let max = scores.iter().cloned().fold(f64::MIN, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
            let sum: f64 = weights.iter().sum();
            let value =
                |d: usize| seen.clone().zip(&weights).map(|(j, w)| w * of(&s.values[sequence], j, d)).sum::<f64>();
            out.extend((0..dim).map(|d| value(d) / sum));
        }
        out
    }
}

fn cases() -> Vec<Case> {
    let mut cases = vec![];
    for kv in TYPES {
        let case = Case { kv, dim: 64, kv_heads: 2, group: 4, len: [71, 40], soft_cap: None, window: None };
        cases.extend([
            case,
            Case { dim: 128, group: 1, len: [300, 33], ..case },
            Case { dim: 8, kv_heads: 1, group: 3, len: [515, 1], ..case },
            Case { dim: 80, kv_heads: 1, group: 8, len: [290, 256], ..case },
            Case { dim: 17, group: 5, len: [1, 32], ..case },
            Case { dim: 16, kv_heads: 1, group: 2, len: [600, 90], window: Some(70), ..case },
            Case { dim: 16, group: 1, len: [300, 90], window: Some(1), soft_cap: Some(0.5), ..case },
            Case { dim: 32, kv_heads: 3, group: 2, len: [280, 64], soft_cap: Some(2.0), ..case },
        ]);
    }
    cases
}

/// Every position of both sequences, in order.
fn all_rows(case: &Case) -> Vec<(usize, usize)> {
    (0..2).flat_map(|i| (0..case.len[i]).map(move |position| (i, position))).collect()
}

#[test]
fn attention_has_the_specified_order_everywhere() {
    let mut random = Random(41);
    for case in cases().into_iter().step_by(stride()) {
        let sequences: Vec<Sequences> = available().iter().map(|ks| case.fill(ks, 2.0, &mut Random(43))).collect();
        let rows = all_rows(&case);
        // Maxima rise rarely for every other row, and again and again for the rest.
        let size = |i: usize| if i / case.wide() % 2 == 0 { 3.0 } else { 60.0 };
        let q: Vec<f32> =
            random.floats(rows.len() * case.wide()).iter().enumerate().map(|(i, x)| size(i) * x).collect();
        let specified = |row: usize| {
            let q = &q[row * case.wide()..][..case.wide()];
            case.specified(&sequences[0], rows[row], q)
        };
        // Slow: the ends of blocks and ranges, and some others.
        let chosen: Vec<usize> = (0..rows.len())
            .filter(|&row| matches!(rows[row].1, 0 | 31 | 32 | 69..72 | 255 | 256 | 511 | 512 | 599) || row % 197 == 3)
            .collect();
        let expected: Vec<Vec<f32>> = chosen.iter().map(|&row| specified(row)).collect();
        for (ks, s) in available().iter().zip(&sequences) {
            // Portable code is slow, and how work is divided is the same: it does not repeat all.
            let portable = ks.isa == Isa::Portable;
            let runs: &[(usize, &[usize])] = if portable { &[(2, &[64])] } else { &[(1, &[5]), (3, &[1, 64])] };
            for &(threads, chunks) in runs {
                let pool = Pool::new(threads);
                let out = case.attend(ks, s, &rows, &q, &pool);
                for (&row, expected) in chosen.iter().zip(&expected) {
                    let what = format!("{case:?}, {}, {threads} threads, row {:?}", ks.isa, rows[row]);
                    assert_same(&out[row * case.wide()..][..case.wide()], expected, &what);
                }
                // Alone, in chunks, in another order.
                for &size in chunks {
                    for start in (0..rows.len()).step_by(size).filter(|start| size > 1 || start % 13 == 0) {
                        let end = rows.len().min(start + size);
                        let (some, q) = (&rows[start..end], &q[start * case.wide()..end * case.wide()]);
                        let found = case.attend(ks, s, some, q, &pool);
                        let what = format!("{case:?}, {}, {threads} threads, rows {start}..{end}", ks.isa);
                        assert_same(&found, &out[start * case.wide()..end * case.wide()], &what);
                    }
                }
                if portable {
                    continue;
                }
                let back: Vec<(usize, usize)> = rows.iter().rev().copied().collect();
                let reversed: Vec<f32> = q.chunks_exact(case.wide()).rev().flatten().copied().collect();
                let found = case.attend(ks, s, &back, &reversed, &pool);
                let found: Vec<f32> = found.chunks_exact(case.wide()).rev().flatten().copied().collect();
                assert_same(&found, &out, &format!("{case:?}, {}, {threads} threads, backwards", ks.isa));
            }
        }
    }
}

/// Parts of a divided piece come in any order: before their turn, in it, several at once.
#[test]
fn parts_are_merged_in_order_whoever_is_first() {
    let ks = select(None).unwrap();
    let case = Case { kv: KvType::F16, dim: 8, kv_heads: 1, group: 2, len: [3500, 1], soft_cap: None, window: None };
    let mut random = Random(53);
    let s = case.fill(ks, 2.0, &mut random);
    for rows in [&[(0, 3499)][..], &[(0, 3400), (0, 3401), (1, 0), (0, 1200)]] {
        let q = random.floats(rows.len() * case.wide());
        let expected = case.attend(ks, &s, rows, &q, &Pool::new(1));
        let blocks: Vec<&[u32]> = (0..2).map(|i| &*s.kv.get(i).unwrap().blocks).collect();
        let past =
            Past { kv: &s.kv, layer: 1, blocks: &blocks, scale: case.scale(), soft_cap: None, window: case.window };
        for threads in [2, 3, 5, 16] {
            let (pool, plan) = (Pool::new(threads), Plan::new(&s.kv, rows, case.group, None, threads));
            let mut partials = Vec::new();
            for _ in 0..400 {
                let mut out = vec![f32::NAN; q.len()];
                // What a call leaves must not show in the next.
                partials.fill(f32::NAN);
                plan.attend(ks, past, rows, &q, &mut out, &mut partials, &pool);
                assert_same(&out, &expected, &format!("{threads} threads, {rows:?}"));
            }
        }
    }
}

/// Rounding a key to x(1 + e) moves a score by at most scale·Σ|q·k|·|e|; codes of 8 bits are off by max|k|/254 each, which
/// moves a score by scale·Σ|q|·max|k|/254. A cap does not add to that. If no score moves by more than δ, a weight moves by a
/// factor within e^±2δ, hence the result by (e^2δ − 1)·max|v|, beside what rounding the values does.
#[test]
fn results_are_near_the_exact_ones_in_every_cache() {
    let mut random = Random(47);
    let ks = select(None).unwrap();
    for size in [0.1f32, 1.0, 4.0] {
        for case in cases().into_iter().step_by(stride()) {
            let s = case.fill(ks, size, &mut random);
            let rows = all_rows(&case);
            let q = random.floats(rows.len() * case.wide());
            let out = case.attend(ks, &s, &rows, &q, &Pool::new(1));
            let width = case.kv_heads * case.dim;
            let mut worst = 0f64;
            for (i, &row) in rows.iter().enumerate().filter(|(i, _)| i % 23 == 0) {
                let q = &q[i * case.wide()..][..case.wide()];
                let found = &out[i * case.wide()..][..case.wide()];
                let exact = case.exact(&s, row, q);
                for (h, q) in q.chunks_exact(case.dim).enumerate() {
                    let of =
                        |rows: &[f32], j: usize| rows[j * width + h / case.group * case.dim..][..case.dim].to_vec();
                    let largest = |x: &[f32]| x.iter().fold(0f64, |m, x| m.max(f64::from(x.abs())));
                    let (mut moved, mut value) = (0f64, 0f64);
                    for j in 0..=row.1 {
                        let k = of(&s.keys[row.0], j);
                        let products: f64 = q.iter().zip(&k).map(|(q, k)| f64::from(q * k).abs()).sum();
                        let queries: f64 = q.iter().map(|q| f64::from(q.abs())).sum();
                        // f32 sums of `dim` terms beside.
                        let rounded = match case.kv {
                            KvType::F32 => 0.0,
                            KvType::F16 => products * 2f64.powi(-11),
                            KvType::Q8 => queries * largest(&k) / 254.0,
                        };
                        let float = products * (case.dim + 4) as f64 * 2f64.powi(-24);
                        moved = moved.max((rounded + float) / (case.dim as f64).sqrt());
                        value = value.max(largest(&of(&s.values[row.0], j)));
                    }
                    // Of the cap's own arithmetic: a few units of the cap.
                    moved += f64::from(case.soft_cap.unwrap_or(0.0)) * 2f64.powi(-20);
                    let rounded = match case.kv {
                        KvType::F32 => 0.0,
                        KvType::F16 => 2f64.powi(-11),
                        KvType::Q8 => 1.0 / 254.0,
                    };
                    let float = (row.1 + 40) as f64 * 2f64.powi(-23);
                    let bound = value * ((2.0 * moved).exp_m1() + rounded + float) + 1e-7;
                    for d in h * case.dim..(h + 1) * case.dim {
                        let error = (f64::from(found[d]) - exact[d]).abs();
                        worst = worst.max(error / bound);
                        assert!(error <= bound, "{case:?} {row:?}: {} for {}, more than {bound}", found[d], exact[d]);
                    }
                }
            }
            // One position alone is its value.
            assert!(worst > 0.0 || case.window == Some(1), "{case:?}");
        }
    }
}

/// A NaN or an infinity among the seen keys or values shows; among others it does not.
#[test]
fn damage_shows_in_what_sees_it_and_nowhere_else() {
    for kv in TYPES {
        let case = Case { kv, dim: 16, kv_heads: 2, group: 2, len: [300, 40], soft_cap: None, window: Some(100) };
        for ks in available() {
            for (value, is_key) in [(f32::NAN, true), (f32::NAN, false), (f32::INFINITY, false)] {
                let mut random = Random(53);
                let mut s = case.fill(ks, 1.0, &mut random);
                let rows = all_rows(&case);
                let q = random.floats(rows.len() * case.wide());
                let pool = Pool::new(2);
                let clean = case.attend(ks, &s, &rows, &q, &pool);
                let block = s.kv.get(0).unwrap().blocks[140 / 32];
                let (good, bad) = (vec![0.5; 16], vec![value; 16]);
                let (k, v) = if is_key { (&bad, &good) } else { (&good, &bad) };
                // SAFETY: one thread.
                unsafe { s.kv.writer().store(ks, block, 1, 1, 140 % 32, k, v) };
                let damaged = case.attend(ks, &s, &rows, &q, &pool);
                for (i, &(sequence, position)) in rows.iter().enumerate() {
                    for head in 0..4 {
                        let at = i * case.wide() + head * 16..i * case.wide() + (head + 1) * 16;
                        if sequence == 0 && head >= 2 && (140..240).contains(&position) {
                            assert!(damaged[at].iter().all(|x| !x.is_finite()), "{kv:?} {} {position}", ks.isa);
                        } else {
                            assert_same(&damaged[at.clone()], &clean[at], &format!("{kv:?} {} {position}", ks.isa));
                        }
                    }
                }
            }
        }
    }
}
