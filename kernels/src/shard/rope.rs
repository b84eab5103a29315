//! Angles of the rotary position embedding.

use crate::descriptor::{Rope, RopeScaling};
use crate::ops::RopeStyle;
use std::f64::consts::PI;

/// Cosines and sines of a rotary embedding (arXiv:2104.09864), a row of `dims / 2` per position, grown as needed.
pub(super) struct RopeTable {
    pub style: RopeStyle,
    /// Radians per position, of every pair.
    frequencies: Vec<f64>,
    /// What cosines and sines are multiplied by.
    attention: f64,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RopeTable {
    /// `factors`: those of `rope.scaling`, where it has some. `context`: most positions of a sequence.
    pub fn new(rope: &Rope, factors: &[f32], context: usize) -> Self {
        let (frequencies, attention) = frequencies(rope, factors, context);
        Self { style: rope.style, frequencies, attention, cos: Vec::new(), sin: Vec::new() }
    }

    pub fn grow(&mut self, positions: usize) {
        for pos in self.cos.len() / self.frequencies.len()..positions {
            let angles = self.frequencies.iter().map(|f| pos as f64 * f);
            // `libm` gives the same bits on every platform; std's functions need not.
            self.cos.extend(angles.clone().map(|a| (libm::cos(a) * self.attention) as f32));
            self.sin.extend(angles.map(|a| (libm::sin(a) * self.attention) as f32));
        }
    }

    pub fn row(&self, pos: usize) -> (&[f32], &[f32]) {
        let half = self.frequencies.len();
        let range = pos * half..(pos + 1) * half;
        (&self.cos[range.clone()], &self.sin[range])
    }
}

/// Radians per position of every pair, and what cosines and sines are multiplied by.
fn frequencies(rope: &Rope, factors: &[f32], context: usize) -> (Vec<f64>, f64) {
    let dims = rope.dims as f64;
    let plain = |base: f64| (0..rope.dims / 2).map(move |i| libm::pow(base, -2.0 * i as f64 / dims));
    let of_base = plain(rope.base);
    match &rope.scaling {
        None => (of_base.collect(), 1.0),
        Some(RopeScaling::Linear { factor }) => (of_base.map(|f| f / factor).collect(), 1.0),
        Some(RopeScaling::Ntk { factor, original }) => {
            let growth = (factor * context as f64 / *original as f64 - (factor - 1.0)).max(1.0);
            (plain(rope.base * libm::pow(growth, dims / (dims - 2.0))).collect(), 1.0)
        }
        Some(RopeScaling::Yarn { factor, original, beta_fast, beta_slow, attention }) => {
            // The pair that turns `rotations` times within the original context.
            let pair = |rotations: f64| {
                dims * libm::log(*original as f64 / (rotations * 2.0 * PI)) / (2.0 * libm::log(rope.base))
            };
            let low = pair(*beta_fast).floor().max(0.0);
            let high = pair(*beta_slow).ceil().min(dims - 1.0);
            let mixed = of_base.enumerate().map(|(i, f)| {
                let slow = ((i as f64 - low) / (high - low).max(0.001)).clamp(0.0, 1.0);
                f / factor * slow + f * (1.0 - slow)
            });
            (mixed.collect(), *attention)
        }
        Some(RopeScaling::Llama3 { factor, low, high, original }) => {
            let scaled = of_base.map(|f| {
                let turns = *original as f64 * f / (2.0 * PI);
                let keep = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                f / factor * (1.0 - keep) + f * keep
            });
            (scaled.collect(), 1.0)
        }
        Some(RopeScaling::Factors { .. }) => {
            (of_base.zip(factors).map(|(f, &factor)| f / f64::from(factor)).collect(), 1.0)
        }
        Some(RopeScaling::Longrope { attention, .. }) => {
            (of_base.zip(factors).map(|(f, &factor)| f / f64::from(factor)).collect(), *attention)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::descriptor::Factors;
    use std::path::Path;

    /// Of one variant, as `tests/fixtures/generate.py` writes it.
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Golden {
        kind: String,
        dims: usize,
        base: f64,
        context: usize,
        original: usize,
        factor: Option<f64>,
        beta_fast: Option<f64>,
        beta_slow: Option<f64>,
        low: Option<f64>,
        high: Option<f64>,
        factors: Option<Vec<f32>>,
        attention: f64,
        frequencies: Vec<f64>,
    }

    #[test]
    fn scaled_frequencies_are_those_of_transformers() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/rope-golden.json");
        let goldens: Vec<Golden> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let factors = || Factors::Values(vec![]);
        let mut kinds = std::collections::BTreeSet::new();
        for g in goldens {
            let (factor, original, attention) = (g.factor.unwrap_or(1.0), g.original, g.attention);
            let scaling = match g.kind.as_str() {
                "linear" => RopeScaling::Linear { factor },
                "ntk" => RopeScaling::Ntk { factor, original },
                "yarn" => {
                    let (beta_fast, beta_slow) = (g.beta_fast.unwrap(), g.beta_slow.unwrap());
                    RopeScaling::Yarn { factor, original, beta_fast, beta_slow, attention }
                }
                "llama3" => RopeScaling::Llama3 { factor, low: g.low.unwrap(), high: g.high.unwrap(), original },
                "longrope" => RopeScaling::Longrope { short: factors(), long: factors(), original, attention },
                other => panic!("no scaling {other}"),
            };
            let what = format!("{scaling:?} of {} pairs, base {}, context {}", g.dims / 2, g.base, g.context);
            let rope = Rope { base: g.base, dims: g.dims, style: RopeStyle::Neox, scaling: Some(scaling) };
            let (found, attention) = frequencies(&rope, g.factors.as_deref().unwrap_or(&[]), g.context);
            assert_eq!(attention, g.attention, "{what}");
            assert_eq!(found.len(), g.frequencies.len(), "{what}");
            for (i, (found, expected)) in found.iter().zip(&g.frequencies).enumerate() {
                // They compute in f32: powers, logarithms and quotients, a few units in the last place.
                let error = (found / expected - 1.0).abs();
                assert!(error < 3e-6, "{what}: pair {i} turns {found} radians, not {expected}");
            }
            kinds.insert(g.kind);
        }
        assert_eq!(kinds.into_iter().collect::<Vec<_>>(), ["linear", "llama3", "longrope", "ntk", "yarn"]);
    }
}
