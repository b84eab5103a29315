//! Choosing a token from logits.
//!
//! Order, as in vLLM: bias, penalties, temperature, then top-k, top-p, min-p on the softmax. The random number of a token is
//! a hash of (seed, position): whoever computes the position draws the same token.

use crate::batch::SampleParameters;
use crate::error::{Error, Result};

/// A token and the natural logarithm of its probability.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenLogprob {
    pub id: u32,
    pub logprob: f32,
}

/// A chosen token with the alternatives asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    pub token: TokenLogprob,
    pub top: Vec<TokenLogprob>,
}

/// Chooses a token after `history` (all of the sequence's tokens; the new one's position is its length).
pub fn sample(logits: &mut [f32], p: &SampleParameters, history: &[u32]) -> Result<Sampled> {
    if logits.iter().any(|l| l.is_nan()) {
        return Err(Error::new(Error::INVALID_DATA, "the model computed NaN logits: are its weights damaged?"));
    }
    let normaliser = p.top.map(|_| log_sum_exp(logits));
    let top = match (p.top, normaliser) {
        (Some(n), Some(z)) => most_probable(logits, n as usize)
            .into_iter()
            .map(|(id, logit)| TokenLogprob { id, logprob: logprob(logit, z) })
            .collect(),
        _ => Vec::new(),
    };
    // Raw logits of few tokens are changed below; the chosen one's is needed for its log-probability.
    let raw = p.top.map(|_| logits.to_vec());
    for &(id, bias) in &p.bias {
        logits[id as usize] += bias;
    }
    penalise(logits, p, history);
    let id = if p.temperature == 0.0 { argmax(logits) } else { draw(logits, p, history.len()) };
    let logprob = match (raw, normaliser) {
        (Some(raw), Some(z)) => logprob(raw[id as usize], z),
        _ => 0.0,
    };
    Ok(Sampled { token: TokenLogprob { id, logprob }, top })
}

/// Repeat penalty on all tokens (CTRL, arXiv:1909.05858), presence and frequency penalty on generated ones, as OpenAI's.
fn penalise(logits: &mut [f32], p: &SampleParameters, history: &[u32]) {
    if p.repeat_penalty == 1.0 && p.presence_penalty == 0.0 && p.frequency_penalty == 0.0 {
        return;
    }
    let first = match p.penalty_last_n {
        n if n < 0 => 0,
        n => history.len().saturating_sub(n as usize),
    };
    let mut seen: std::collections::HashMap<u32, u32> = std::collections::HashMap::new();
    for (pos, &id) in history.iter().enumerate().skip(first) {
        *seen.entry(id).or_default() += u32::from(pos >= p.prompt_len as usize);
    }
    // Tokens are independent of each other, so the map's order does not matter.
    for (id, generated) in seen {
        let l = &mut logits[id as usize];
        *l = if *l > 0.0 { *l / p.repeat_penalty } else { *l * p.repeat_penalty };
        if generated > 0 {
            *l -= p.presence_penalty + p.frequency_penalty * generated as f32;
        }
    }
}

/// The largest logit's id; the lowest on ties.
fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (i, &l) in logits.iter().enumerate() {
        if l > logits[best] {
            best = i;
        }
    }
    best as u32
}

fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&l| libm::exp(f64::from(l - max))).sum();
    f64::from(max) + libm::log(sum)
}

fn logprob(logit: f32, normaliser: f64) -> f32 {
    (f64::from(logit) - normaliser) as f32
}

/// Larger logits first, lower ids first on ties.
fn by_rank(a: &(u32, f32), b: &(u32, f32)) -> core::cmp::Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// The `n` largest logits in order.
fn most_probable(logits: &[f32], n: usize) -> Vec<(u32, f32)> {
    let mut all: Vec<(u32, f32)> = (0..).zip(logits.iter().map(|&l| l + 0.0)).collect(); // no -0.0, which sorts below 0.0
    let n = n.min(all.len());
    if n == 0 {
        return Vec::new();
    }
    if n < all.len() {
        all.select_nth_unstable_by(n - 1, by_rank);
        all.truncate(n);
    }
    all.sort_unstable_by(by_rank);
    all
}

fn draw(logits: &[f32], p: &SampleParameters, position: usize) -> u32 {
    let k = if p.top_k == 0 { logits.len() } else { p.top_k as usize };
    // With top-p on and top-k off, the nucleus is nearly always among the first few hundred; widen until it is.
    let mut width = if p.top_p < 1.0 { k.min(256) } else { k };
    loop {
        let mut candidates = most_probable(logits, width);
        let max = candidates[0].1;
        if !max.is_finite() {
            return candidates[0].0; // all masked, or one infinitely likely
        }
        let weight = |l: f32| libm::exp(f64::from(l - max) / f64::from(p.temperature));
        let total: f64 = if k < logits.len() {
            most_probable_total(logits, k, &candidates, weight)
        } else {
            logits.iter().map(|&l| weight(l)).sum()
        };
        let mut cumulative = 0.0;
        let mut kept = 0;
        let mut weights = Vec::with_capacity(candidates.len());
        for &(_, l) in &candidates {
            let w = weight(l);
            // The first candidate always stays.
            if kept > 0 && ((p.top_p < 1.0 && cumulative >= f64::from(p.top_p) * total) || w < f64::from(p.min_p)) {
                break;
            }
            cumulative += w;
            weights.push(w);
            kept += 1;
        }
        if kept == width && width < k.min(logits.len()) {
            width = (width * 8).min(k);
            continue;
        }
        candidates.truncate(kept);
        let mut left = uniform(p.seed, position as u64) * cumulative;
        for (&(id, _), w) in candidates.iter().zip(weights) {
            left -= w;
            if left < 0.0 {
                return id;
            }
        }
        return candidates[kept - 1].0; // rounding left a little
    }
}

/// The weight of the `k` most probable tokens, summed in order of rank.
fn most_probable_total(logits: &[f32], k: usize, known: &[(u32, f32)], weight: impl Fn(f32) -> f64) -> f64 {
    if known.len() >= k.min(logits.len()) {
        known.iter().map(|&(_, l)| weight(l)).sum()
    } else {
        most_probable(logits, k).iter().map(|&(_, l)| weight(l)).sum()
    }
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
