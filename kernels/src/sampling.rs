//! Choosing a token from logits.
//!
//! Order: bias, penalties, temperature (0 takes the largest logit, the lowest id on ties), then top-k, top-p and min-p, each on
//! what the one before left. The random number of a token is a hash of (seed, position): whoever computes the position draws
//! the same token. Log-probabilities are of the logits as the model gave them.

use crate::batch::SampleParameters;
use crate::dispatch::Kernels;
use crate::error::{Error, Result};
use crate::ops;
use std::collections::HashMap;

/// A token and the natural logarithm of its probability.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenLogprob {
    pub id: u32,
    pub logprob: f32,
}

/// A chosen token with the most probable ones, as many as asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// `logprob` is 0 when none was asked for.
    pub token: TokenLogprob,
    pub top: Vec<TokenLogprob>,
}

/// Chooses a token after `history`, all of the sequence's tokens: the new one's position is its length. Changes `logits`.
///
/// Logits with a NaN, with +∞ or with nothing above −∞ are an error.
pub fn sample(ks: &Kernels, logits: &mut [f32], p: &SampleParameters, history: &[u32]) -> Result<Sampled> {
    let max = ops::max(ks, logits);
    if logits.iter().fold(false, |bad, l| bad | l.is_nan()) || !max.is_finite() {
        return Err(Error::data("the model computed logits that are not finite: are its weights damaged?"));
    }
    // Bias and penalties change logits below, so what is said of the raw ones is noted first.
    let normaliser = p.top.map(|_| log_sum_exp(ks, logits, max));
    let raw = p.top.map(|_| logits.to_vec());
    let probability = |id: u32| match (&raw, normaliser) {
        (Some(raw), Some(z)) => (f64::from(raw[id as usize]) - z) as f32,
        _ => 0.0,
    };
    let top = most_probable(logits, p.top.unwrap_or(0) as usize);
    let top = top.into_iter().map(|(id, _)| TokenLogprob { id, logprob: probability(id) }).collect();

    for &(id, bias) in &p.bias {
        let l = &mut logits[id as usize];
        *l = or_never(*l + bias);
    }
    penalise(logits, p, history);
    let id = if p.temperature == 0.0 { argmax(ks, logits) } else { draw(ks, logits, p, history.len()) };
    Ok(Sampled { token: TokenLogprob { id, logprob: probability(id) }, top })
}

/// −∞ for NaN: what ∞ − ∞ gives when a request's biases and penalties exceed f32.
fn or_never(logit: f32) -> f32 {
    if logit.is_nan() {
        f32::NEG_INFINITY
    } else {
        logit
    }
}

/// Repeat penalty on all tokens (CTRL, arXiv:1909.05858), presence and frequency penalty on generated ones, as OpenAI's.
fn penalise(logits: &mut [f32], p: &SampleParameters, history: &[u32]) {
    if p.repeat_penalty == 1.0 && p.presence_penalty == 0.0 && p.frequency_penalty == 0.0 {
        return;
    }
    let first = match usize::try_from(p.penalty_last_n) {
        Ok(n) => history.len().saturating_sub(n),
        Err(_) => 0,
    };
    // Token → how often it was generated.
    let mut seen: HashMap<u32, u32> = HashMap::new();
    for (pos, &id) in history.iter().enumerate().skip(first) {
        *seen.entry(id).or_default() += u32::from(pos >= p.prompt_len as usize);
    }
    // Tokens are independent of each other, so the map's order does not matter.
    for (id, generated) in seen {
        let l = &mut logits[id as usize];
        *l = if *l > 0.0 { *l / p.repeat_penalty } else { *l * p.repeat_penalty };
        if generated > 0 {
            *l = or_never(*l - (p.presence_penalty + p.frequency_penalty * generated as f32));
        }
    }
}

/// The largest logit's id; the lowest on ties.
fn argmax(ks: &Kernels, logits: &[f32]) -> u32 {
    let max = ops::max(ks, logits);
    // A chunk is compared as a whole: where to stop is asked once for all of its logits.
    const CHUNK: usize = 32;
    let has_max = |chunk: &[f32]| chunk.iter().fold(false, |found, &l| found | (l == max));
    let start = CHUNK * logits.chunks(CHUNK).position(has_max).unwrap_or(0);
    (start + logits[start..].iter().position(|&l| l == max).unwrap_or(0)) as u32
}

/// ln Σ e^l.
fn log_sum_exp(ks: &Kernels, logits: &[f32], max: f32) -> f64 {
    let mut weights = logits.to_vec();
    ops::exp(ks, &mut weights, max);
    f64::from(max) + libm::log(total(&weights))
}

/// Σ w, in eight lanes: element i goes to lane i mod 8.
fn total(weights: &[f32]) -> f64 {
    let mut lanes = [0f64; 8];
    let eights = weights.chunks_exact(8);
    for (lane, &w) in lanes.iter_mut().zip(eights.remainder()) {
        *lane = f64::from(w);
    }
    for eight in eights {
        for (lane, &w) in lanes.iter_mut().zip(eight) {
            *lane += f64::from(w);
        }
    }
    lanes.iter().sum()
}

/// Larger logits first, lower ids first on ties.
fn by_rank(a: &(u32, f32), b: &(u32, f32)) -> core::cmp::Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// The `n` largest logits in order of rank. Most logits are only compared with the least one that is still kept.
fn most_probable(logits: &[f32], n: usize) -> Vec<(u32, f32)> {
    let n = n.min(logits.len());
    if n == 0 {
        return Vec::new();
    }
    let room = logits.len().min(2 * n + 256);
    let mut kept: Vec<(u32, f32)> = Vec::with_capacity(room);
    let mut floor = None;
    for (id, &l) in (0..).zip(logits) {
        // Who ties with the floor has the higher id.
        if floor.is_some_and(|floor| l <= floor) {
            continue;
        }
        kept.push((id, l + 0.0)); // no -0.0, which `total_cmp` puts below 0.0
        if kept.len() == room && room > n {
            kept.select_nth_unstable_by(n - 1, by_rank);
            kept.truncate(n);
            floor = Some(kept[n - 1].1);
        }
    }
    if kept.len() > n {
        kept.select_nth_unstable_by(n - 1, by_rank);
        kept.truncate(n);
    }
    kept.sort_unstable_by(by_rank);
    kept
}

/// Draws from the softmax of `logits / temperature`, cut by top-k, top-p and min-p. At least one token always stays.
fn draw(ks: &Kernels, logits: &[f32], p: &SampleParameters, position: usize) -> u32 {
    let max = ops::max(ks, logits);
    if !max.is_finite() {
        return argmax(ks, logits); // a bias beyond f32's range made one certain, or all impossible
    }
    // e^((l − max)/T): the most probable token has weight 1.
    let mut weights: Vec<f32> = logits.iter().map(|&l| (l - max) / p.temperature).collect();
    ops::exp(ks, &mut weights, 0.0);
    let min_p = p.min_p.min(1.0);
    let random = uniform(p.seed, position as u64);
    let vocab = logits.len();
    let k = if p.top_k == 0 { vocab } else { vocab.min(p.top_k as usize) };

    if k == vocab && p.top_p >= 1.0 {
        // Nothing asks for ranks: the order of ids does.
        weights.iter_mut().filter(|w| **w < min_p).for_each(|w| *w = 0.0);
        let sum = total(&weights);
        return pick((0..).zip(weights), random * sum);
    }
    let all = if k == vocab { total(&weights) } else { 0.0 };
    // With top-k off, the nucleus is nearly always among the first few hundred; widen until it is.
    let mut width = if k == vocab { vocab.min(256) } else { k };
    loop {
        let mut ranked: Vec<(u32, f32)> = most_probable(logits, width);
        ranked.iter_mut().for_each(|(id, value)| *value = weights[*id as usize]);
        let sum = if k == vocab { all } else { ranked.iter().map(|&(_, w)| f64::from(w)).sum() };
        let mut cumulative = 0.0;
        let mut kept = 0;
        for &(_, w) in &ranked {
            if kept > 0 && ((p.top_p < 1.0 && cumulative >= f64::from(p.top_p) * sum) || w < min_p) {
                break;
            }
            cumulative += f64::from(w);
            kept += 1;
        }
        if kept == width && width < k {
            width = k.min(width * 8);
            continue;
        }
        ranked.truncate(kept);
        return pick(ranked.into_iter(), random * cumulative);
    }
}

/// The token at `target` when the weights lie one after the other; the last one with any weight if rounding overshoots.
fn pick(tokens: impl Iterator<Item = (u32, f32)>, target: f64) -> u32 {
    let mut left = target;
    let mut last = 0;
    for (id, w) in tokens.filter(|&(_, w)| w > 0.0) {
        last = id;
        left -= f64::from(w);
        if left < 0.0 {
            break;
        }
    }
    last
}

/// A number in [0, 1) that only seed and position decide: two rounds of SplitMix64 (Steele et al., OOPSLA 2014).
pub fn uniform(seed: u64, position: u64) -> f64 {
    fn mix(mut z: u64) -> u64 {
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;
    let word = mix(mix(seed.wrapping_add(GAMMA)).wrapping_add(position.wrapping_add(1).wrapping_mul(GAMMA)));
    (word >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}
