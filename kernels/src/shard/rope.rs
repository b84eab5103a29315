//! Angles of the rotary position embedding.

/// Cosines and sines of the rotary embedding (arXiv:2104.09864), a row of `dims / 2` per position, grown as needed.
pub(super) struct RopeTable {
    /// Radians per position, of every pair.
    frequencies: Vec<f64>,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RopeTable {
    pub fn new(base: f64, dims: usize) -> Self {
        // `libm` gives the same bits on every platform; std's functions need not.
        let frequencies = (0..dims / 2).map(|i| libm::pow(base, -2.0 * i as f64 / dims as f64)).collect();
        Self { frequencies, cos: Vec::new(), sin: Vec::new() }
    }
    pub fn grow(&mut self, positions: usize) {
        for pos in self.cos.len() / self.frequencies.len()..positions {
            let angles = self.frequencies.iter().map(|f| pos as f64 * f);
            self.cos.extend(angles.clone().map(|a| libm::cos(a) as f32));
            self.sin.extend(angles.map(|a| libm::sin(a) as f32));
        }
    }
    pub fn row(&self, pos: usize) -> (&[f32], &[f32]) {
        let half = self.frequencies.len();
        let range = pos * half..(pos + 1) * half;
        (&self.cos[range.clone()], &self.sin[range])
    }
}
