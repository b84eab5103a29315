//! A shard's description: the one JSON that the kernels read. Parsed and checked completely before anything is allocated.
//!
//! It says of every architecture what the forward pass must know, in the same words: which norms, products and options a
//! layer has. Its twin is `bus/shard.ts`.

use crate::cores::Pin;
use crate::error::{Error, Result};
use crate::matmul::Precision;
use crate::ops::Activation;
pub use crate::ops::RopeStyle;
use crate::pack::SourceType;
use crate::weight_cache::CacheChoice;
use serde::Deserialize;

/// Bounds on a model's dimensions, far above any real model: products of two fit `usize` and a KV position is cheap.
const MAX_DIMENSION: usize = 1 << 24;
const MAX_LAYERS: usize = 4096;
const MAX_EXPERTS: usize = 4096;
/// Bound on the floats of one activation buffer: maxBatch × the widest row.
const MAX_ACTIVATIONS: usize = 1 << 30;

/// A tensor in a model's file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorRef {
    pub name: String,
    /// GGML type id of what is stored.
    #[serde(rename = "type")]
    pub kind: u32,
    /// Columns, then rows for a matrix, then matrices.
    pub shape: Vec<usize>,
    /// 0: the descriptor's `path`; from 1 on one of its `files`.
    #[serde(default)]
    pub file: usize,
    /// From the file's begin.
    pub offset: u64,
    /// Of what is stored there.
    pub bytes: u64,
    /// Which rows it takes of those stored; all if absent.
    #[serde(default)]
    pub rows: Option<Rows>,
    /// How it is stored if not as rows of blocks.
    #[serde(default)]
    pub layout: Option<Layout>,
}

/// Of `of` rows, `block` ones of every `stride`, from `first` on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rows {
    pub of: usize,
    pub first: usize,
    pub block: usize,
    pub stride: usize,
}

/// How a file may keep a matrix.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", rename_all_fields = "camelCase", tag = "kind")]
pub enum Layout {
    /// Floats, columns one after the other.
    Transposed,
    /// `pack::grouped`'s GPTQ; what is stored at the tensor's own place are the codes. `group` columns after the other share a
    /// group, or all if it is 0, unless `index` says the group of each. `zero` is added to stored zero points.
    Gptq {
        bits: usize,
        zero: u32,
        group: usize,
        scales: Box<TensorRef>,
        zeros: Box<TensorRef>,
        index: Option<Box<TensorRef>>,
    },
    /// `pack::grouped`'s AWQ, likewise.
    Awq { group: usize, scales: Box<TensorRef>, zeros: Box<TensorRef> },
    /// `pack::ternary`'s quarters: weights are multiplied with `scale`, one number, or with `inverse` divided by it.
    Quarters { scale: Option<Box<TensorRef>>, inverse: bool },
    /// Floats, to be rounded as `pack::ternary::ternarised` does.
    Ternarised,
    /// Nothing is stored at the tensor's own place: these follow each other.
    Parts { parts: Vec<TensorRef> },
}

/// A matrix with what is done to its product: `y = scale·(W·x) + bias`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Linear {
    pub weight: TensorRef,
    pub bias: Option<TensorRef>,
    /// One number.
    pub scale: Option<TensorRef>,
}

/// A norm, of the model's kind.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Norm {
    pub weight: TensorRef,
    pub bias: Option<TensorRef>,
}

/// What changes the angles of a rotary embedding whose context was extended.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", rename_all_fields = "camelCase", tag = "kind")]
pub enum RopeScaling {
    /// Positions are divided by `factor` (arXiv:2306.15595).
    Linear { factor: f64 },
    /// The base grows with the context served beyond the `original` one ("dynamic NTK").
    Ntk { factor: f64, original: usize },
    /// Linear for slow pairs, none for fast ones, mixed between (arXiv:2309.00071). `attention` multiplies cosines and sines.
    Yarn { factor: f64, original: usize, beta_fast: f64, beta_slow: f64, attention: f64 },
    /// As YaRN, by wavelengths (Llama 3.1's `rope_type`).
    Llama3 { factor: f64, low: f64, high: f64, original: usize },
    /// The frequency of every pair is divided by its own factor.
    Factors { factors: TensorRef },
    /// Such factors in two sets, one for contexts up to the `original` one (arXiv:2402.13753).
    Longrope { short: Factors, long: Factors, original: usize, attention: f64 },
}

/// A factor for every pair: in the file, or here.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub enum Factors {
    Values(Vec<f32>),
    Tensor(TensorRef),
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rope {
    pub base: f64,
    pub dims: usize,
    pub style: RopeStyle,
    pub scaling: Option<RopeScaling>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NormKind {
    /// x / √(mean(x²) + eps) · weight
    Rms,
    /// (x − mean) / √(variance + eps) · weight + bias
    Layer,
}

/// The kind of every norm.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NormOptions {
    pub kind: NormKind,
    pub eps: f32,
    /// Added to the weights of every norm.
    #[serde(default)]
    pub offset: f32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Gating {
    Softmax,
    Sigmoid,
}

/// How mixtures of experts choose.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct MoeOptions {
    pub experts: usize,
    /// Experts that a token goes to.
    pub used: usize,
    pub feed_forward: usize,
    /// Width of the expert that all tokens go to.
    pub shared_feed_forward: Option<usize>,
    pub gating: Gating,
    /// Whether the weights of the chosen are divided by their sum.
    pub normalise: bool,
    pub scale: Option<f32>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Hyper {
    pub layers: usize,
    pub embedding: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub feed_forward: usize,
    pub vocab: usize,
    pub context: usize,
    pub norm: NormOptions,
    pub activation: Activation,
    /// Whether attention and feed-forward both start from the layer's input.
    #[serde(default)]
    pub parallel: bool,
    /// Layers name theirs by its place.
    pub ropes: Vec<Rope>,
    pub moe: Option<MoeOptions>,
    pub embedding_scale: Option<f32>,
    /// Default: 1 / √headDim.
    pub attention_scale: Option<f32>,
    /// `c·tanh(x / c)` of attention scores.
    pub attention_softcap: Option<f32>,
    /// Of what a layer adds to the hidden state.
    pub residual_scale: Option<f32>,
    pub logit_scale: Option<f32>,
    pub logit_softcap: Option<f32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvType {
    F16,
    F32,
    /// Signed bytes, with an f32 scale for every key and value of a head.
    Q8,
}

impl KvType {
    pub(crate) fn element_bytes(self) -> usize {
        match self {
            KvType::F16 => 2,
            KvType::F32 => 4,
            KvType::Q8 => 1,
        }
    }

    /// Bytes beside the elements of a key or value.
    pub(crate) fn scale_bytes(self) -> usize {
        match self {
            KvType::F16 | KvType::F32 => 0,
            KvType::Q8 => 4,
        }
    }
}

/// Whether kernels are measured on this device (`tune`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tuning {
    /// Fixed rules.
    #[default]
    Off,
    /// What is stored; what is not is measured for large models, within a few seconds.
    Auto,
    /// All is measured anew.
    Force,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kv {
    #[serde(rename = "type")]
    pub kind: KvType,
    /// Over all sequences.
    pub tokens: usize,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Head {
    pub norm: Norm,
    pub output: Linear,
}

/// `down(activation(gate·x) · up·x)`, or `down(activation(up·x))` without gate.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Mlp {
    pub gate: Option<Linear>,
    pub up: Linear,
    /// Of what `down` multiplies.
    pub sub_norm: Option<Norm>,
    pub down: Linear,
}

/// A mixture of experts: tensors of all of them, one matrix after the other.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Moe {
    pub router: Linear,
    pub gate: Option<TensorRef>,
    pub up: TensorRef,
    pub down: TensorRef,
    pub shared: Option<Mlp>,
    /// One row: the shared expert's weight is the sigmoid of its product.
    pub shared_gate: Option<Linear>,
}

/// A layer. What is absent is not done; without `ffnNorm` the feed-forward of a parallel layer takes `attnNorm`'s result.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Layer {
    pub attn_norm: Option<Norm>,
    pub q: Linear,
    pub k: Linear,
    pub v: Linear,
    /// Of every head (the same weights, or a row of them each), or, with a weight per element of the row, of the whole row.
    pub q_norm: Option<Norm>,
    pub k_norm: Option<Norm>,
    /// Which of `ropes` rotates queries and keys; absent: none.
    pub rope: Option<usize>,
    /// Positions that a token sees, its own included; absent: all.
    pub window: Option<usize>,
    /// Of what `o` multiplies.
    pub attn_sub_norm: Option<Norm>,
    pub o: Linear,
    /// Of `o`'s product.
    pub attn_post_norm: Option<Norm>,
    pub ffn_norm: Option<Norm>,
    /// One of the two.
    pub mlp: Option<Mlp>,
    pub moe: Option<Moe>,
    /// Of the feed-forward's result.
    pub ffn_post_norm: Option<Norm>,
}

/// A contiguous range of a model's layers, with embedding and head if it is at that end.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Descriptor {
    pub path: String,
    /// Names of further files in the same folder.
    #[serde(default)]
    pub files: Vec<String>,
    pub threads: usize,
    #[serde(default)]
    pub pin: Pin,
    pub isa: Option<String>,
    /// Where packed weights are kept; nowhere if absent.
    #[serde(default)]
    pub cache: Option<CacheChoice>,
    #[serde(default)]
    pub tune: Tuning,
    pub kv: Kv,
    #[serde(default)]
    pub activations: Precision,
    /// Most tokens of a micro-batch.
    pub max_batch: usize,
    pub hyper: Hyper,
    pub first: usize,
    /// Exclusive.
    pub end: usize,
    pub embedding: Option<TensorRef>,
    /// Added to the embedding: a row per position.
    pub positions: Option<TensorRef>,
    pub head: Option<Head>,
    pub layers: Vec<Layer>,
}

impl Descriptor {
    /// Reads and checks a description; only the tensors' place in the file remains for the mapping to check.
    pub fn parse(json: &[u8]) -> Result<Self> {
        let d: Descriptor =
            serde_json::from_slice(json).map_err(|e| Error::argument(format!("shard description: {e}")))?;
        d.check()?;
        Ok(d)
    }

    fn check(&self) -> Result<()> {
        let h = &self.hyper;
        let within = |name: &str, value: usize, most: usize| match value {
            0 => Err(Error::argument(format!("{name} is 0; it must be 1 to {most}"))),
            _ if value > most => Err(Error::argument(format!("{name} is {value}; it must be 1 to {most}"))),
            _ => Ok(()),
        };
        for (name, value, most) in [
            ("layers", h.layers, MAX_LAYERS),
            ("embedding", h.embedding, MAX_DIMENSION),
            ("heads", h.heads, 1 << 16),
            ("kvHeads", h.kv_heads, 1 << 16),
            ("headDim", h.head_dim, 1 << 16),
            ("feedForward", h.feed_forward, MAX_DIMENSION),
            ("vocab", h.vocab, MAX_DIMENSION),
            ("context", h.context, 1 << 28),
            ("threads", self.threads, 1024),
            ("maxBatch", self.max_batch, 1 << 16),
            ("kv.tokens", self.kv.tokens, 1 << 30),
        ] {
            within(name, value, most)?;
        }
        let wide = h.heads.saturating_mul(h.head_dim);
        if wide > MAX_DIMENSION {
            return Err(Error::argument(format!("heads {} × headDim {} exceed {MAX_DIMENSION}", h.heads, h.head_dim)));
        }
        let mut widest = wide.max(h.embedding).max(h.feed_forward);
        if let Some(moe) = &h.moe {
            within("moe.experts", moe.experts, MAX_EXPERTS)?;
            within("moe.used", moe.used, moe.experts)?;
            within("moe.feedForward", moe.feed_forward, MAX_DIMENSION)?;
            let shared = moe.shared_feed_forward.unwrap_or(1);
            within("moe.sharedFeedForward", shared, MAX_DIMENSION)?;
            widest = widest.max(moe.feed_forward).max(shared).max(moe.experts);
        }
        if self.max_batch > MAX_ACTIVATIONS / widest {
            return Err(Error::argument(format!("maxBatch {} is too large for rows of {widest}", self.max_batch)));
        }
        if h.heads % h.kv_heads != 0 {
            return Err(Error::argument(format!("heads {} are no multiple of kvHeads {}", h.heads, h.kv_heads)));
        }
        for rope in &h.ropes {
            rope.check(h.head_dim)?;
        }
        if !h.norm.offset.is_finite() {
            return Err(Error::argument(format!("norm.offset is {}", h.norm.offset)));
        }
        for name in &self.files {
            if name.is_empty() || name.contains(['/', '\\', '\0', ':']) || name.starts_with('.') {
                return Err(Error::argument(format!("{name:?} is no name of a file beside {}", self.path)));
            }
        }
        for (name, value) in [
            ("norm.eps", Some(h.norm.eps)),
            ("embeddingScale", h.embedding_scale),
            ("attentionScale", h.attention_scale),
            ("attentionSoftcap", h.attention_softcap),
            ("residualScale", h.residual_scale),
            ("logitScale", h.logit_scale),
            ("logitSoftcap", h.logit_softcap),
            ("moe.scale", h.moe.as_ref().and_then(|moe| moe.scale)),
        ] {
            positive(name, value.unwrap_or(1.0).into())?;
        }
        if self.first >= self.end || self.end > h.layers || self.layers.len() != self.end - self.first {
            return Err(Error::argument(format!(
                "layers {}..{} of {} with {} descriptions",
                self.first,
                self.end,
                h.layers,
                self.layers.len()
            )));
        }
        if self.embedding.is_some() != (self.first == 0) || self.head.is_some() != (self.end == h.layers) {
            return Err(Error::argument(
                "the embedding belongs to the first layer's shard, the head to the last one's",
            ));
        }
        if let Some(t) = &self.embedding {
            t.check(&[h.embedding, h.vocab])?;
        }
        if let Some(t) = &self.positions {
            let rows = t.shape.get(1).copied().unwrap_or(0);
            if self.embedding.is_none() || rows < h.context {
                return Err(Error::argument(format!("tensor {} has {rows} positions for {}", t.name, h.context)));
            }
            t.check(&[h.embedding, rows])?;
        }
        if let Some(head) = &self.head {
            head.norm.check(h.embedding)?;
            head.output.check(h.embedding, h.vocab)?;
        }
        self.layers.iter().try_for_each(|layer| layer.check(h))
    }
}

fn positive(name: &str, value: f64) -> Result<()> {
    if value.is_finite() && value > 0.0 {
        return Ok(());
    }
    Err(Error::argument(format!("{name} is {value}; it must be positive")))
}

impl Rope {
    fn check(&self, head_dim: usize) -> Result<()> {
        let dims = self.dims;
        if dims == 0 || dims > head_dim || dims % 2 != 0 {
            return Err(Error::argument(format!("rope.dims {dims} do not fit headDim {head_dim}")));
        }
        positive("rope.base", self.base)?;
        let numbers: &[(&str, f64)] = match &self.scaling {
            None => &[],
            Some(RopeScaling::Linear { factor }) => &[("factor", *factor)],
            Some(RopeScaling::Ntk { factor, original }) => &[("factor", *factor), ("original", *original as f64)],
            Some(RopeScaling::Yarn { factor, original, beta_fast, beta_slow, attention }) => &[
                ("factor", *factor),
                ("original", *original as f64),
                ("betaFast", *beta_fast),
                ("betaSlow", *beta_slow),
                ("attention", *attention),
            ],
            Some(RopeScaling::Llama3 { factor, low, high, original }) => {
                &[("factor", *factor), ("low", *low), ("high", high - low), ("original", *original as f64)]
            }
            Some(RopeScaling::Factors { factors }) => {
                factors.check(&[dims / 2])?;
                &[]
            }
            Some(RopeScaling::Longrope { short, long, original, attention }) => {
                short.check(dims / 2)?;
                long.check(dims / 2)?;
                &[("original", *original as f64), ("attention", *attention)]
            }
        };
        numbers.iter().try_for_each(|(name, value)| positive(&format!("rope.scaling.{name}"), *value))
    }
}

impl Layer {
    fn check(&self, h: &Hyper) -> Result<()> {
        let (d, dim) = (h.embedding, h.head_dim);
        let (wide, kv_wide) = (h.heads * dim, h.kv_heads * dim);
        for (linear, cols, rows) in
            [(&self.q, d, wide), (&self.k, d, kv_wide), (&self.v, d, kv_wide), (&self.o, wide, d)]
        {
            linear.check(cols, rows)?;
        }
        for (norm, width) in [
            (&self.attn_norm, d),
            (&self.attn_sub_norm, wide),
            (&self.attn_post_norm, d),
            (&self.ffn_norm, d),
            (&self.ffn_post_norm, d),
        ] {
            norm.as_ref().map_or(Ok(()), |norm| norm.check(width))?;
        }
        for (norm, heads) in [(&self.q_norm, h.heads), (&self.k_norm, h.kv_heads)] {
            let Some(norm) = norm else { continue };
            match norm.weight.shape[..] {
                [width] if width == heads * dim => norm.check(width)?,
                [_, _] => {
                    norm.weight.check(&[dim, heads])?;
                    norm.bias.as_ref().map_or(Ok(()), |bias| bias.check(&[dim, heads]))?;
                }
                _ => norm.check(dim)?,
            }
        }
        if self.rope.is_some_and(|rope| rope >= h.ropes.len()) || self.window == Some(0) {
            return Err(Error::argument("a layer's rope or window is none"));
        }
        match (&self.mlp, &self.moe, &h.moe) {
            (Some(mlp), None, _) => mlp.check(d, h.feed_forward),
            (None, Some(moe), Some(options)) => moe.check(d, options),
            _ => Err(Error::argument("a layer has one of mlp and moe, and moe needs the model's options")),
        }
    }
}

impl Mlp {
    fn check(&self, d: usize, ff: usize) -> Result<()> {
        self.gate.as_ref().map_or(Ok(()), |gate| gate.check(d, ff))?;
        self.up.check(d, ff)?;
        self.sub_norm.as_ref().map_or(Ok(()), |norm| norm.check(ff))?;
        self.down.check(ff, d)
    }
}

impl Moe {
    fn check(&self, d: usize, options: &MoeOptions) -> Result<()> {
        let MoeOptions { experts, feed_forward: ff, .. } = *options;
        self.router.check(d, experts)?;
        self.gate.as_ref().map_or(Ok(()), |gate| gate.check(&[d, ff, experts]))?;
        self.up.check(&[d, ff, experts])?;
        self.down.check(&[ff, d, experts])?;
        match (&self.shared, options.shared_feed_forward) {
            (Some(shared), Some(ff)) => shared.check(d, ff)?,
            (None, None) => {}
            _ => return Err(Error::argument("a shared expert needs moe.sharedFeedForward")),
        }
        self.shared_gate.as_ref().map_or(Ok(()), |gate| gate.check(d, 1))
    }
}

impl Linear {
    fn check(&self, cols: usize, rows: usize) -> Result<()> {
        self.weight.check(&[cols, rows])?;
        self.bias.as_ref().map_or(Ok(()), |bias| bias.check(&[rows]))?;
        self.scale.as_ref().map_or(Ok(()), |scale| scale.check(&[1]))
    }
}

impl Norm {
    fn check(&self, width: usize) -> Result<()> {
        self.weight.check(&[width])?;
        self.bias.as_ref().map_or(Ok(()), |bias| bias.check(&[width]))
    }
}

impl Factors {
    fn check(&self, count: usize) -> Result<()> {
        match self {
            Factors::Tensor(t) => t.check(&[count]),
            Factors::Values(values) if values.len() == count => Ok(()),
            Factors::Values(values) => {
                Err(Error::argument(format!("{} factors for {count} pairs of a rotary embedding", values.len())))
            }
        }
    }
}

impl Rows {
    /// The place of every row among those stored.
    pub fn places(self, count: usize) -> impl Iterator<Item = usize> {
        (0..count).map(move |row| self.first + row / self.block * self.stride + row % self.block)
    }

    fn check(self, count: usize) -> Result<()> {
        let bad = || Error::argument(format!("{count} rows are not {self:?}"));
        if self.block == 0 || self.block > self.stride || count == 0 {
            return Err(bad());
        }
        let last = ((count - 1) / self.block)
            .checked_mul(self.stride)
            .and_then(|at| at.checked_add(self.first)?.checked_add((count - 1) % self.block));
        last.filter(|&last| last < self.of).map(|_| ()).ok_or_else(bad)
    }
}

impl TensorRef {
    /// The tensor's type; the error names the tensor.
    pub fn source_type(&self) -> Result<SourceType> {
        SourceType::from_ggml(self.kind).map_err(|e| Error::new(e.code, format!("tensor {}: {}", self.name, e.message)))
    }

    /// Whether both are the same whole tensor, stored as it is.
    pub(crate) fn same_place(&self, other: &TensorRef) -> bool {
        let whole = |t: &TensorRef| t.layout.is_none() && t.rows.is_none();
        let place = |t: &TensorRef| (t.file, t.offset, t.kind);
        whole(self) && whole(other) && place(self) == place(other) && self.shape == other.shape
    }

    fn check(&self, expected: &[usize]) -> Result<()> {
        if self.shape != expected {
            return Err(Error::data(format!("tensor {} has shape {:?}, not {expected:?}", self.name, self.shape)));
        }
        let named = |e: Error| Error::new(e.code, format!("tensor {}: {}", self.name, e.message));
        let rows = expected[1..].iter().try_fold(1usize, |rows, &n| rows.checked_mul(n));
        let rows = rows.ok_or_else(|| named(Error::data("it has too many rows")))?;
        if let Some(Layout::Parts { parts }) = &self.layout {
            let (count, inner) = match expected {
                [inner @ .., count] if !inner.is_empty() => (*count, inner),
                _ => return Err(named(Error::data("a vector has no parts"))),
            };
            if self.rows.is_some() || parts.len() != count {
                return Err(named(Error::data(format!("it has {} parts, not {count}", parts.len()))));
            }
            return parts.iter().try_for_each(|part| match part.layout {
                Some(Layout::Parts { .. }) => Err(named(Error::data("a part has parts"))),
                _ => part.check(inner),
            });
        }
        if let Some(rows_of) = self.rows {
            rows_of.check(rows).map_err(named)?;
        }
        let stored = self.rows.map_or(rows, |rows| rows.of);
        let bytes = match &self.layout {
            // What these need is checked with all parts at hand, when they are taken apart.
            Some(Layout::Gptq { .. } | Layout::Awq { .. } | Layout::Quarters { .. }) => return Ok(()),
            _ => self.source_type()?.tensor_bytes(stored, expected[0]).map_err(named)?,
        };
        if bytes as u64 != self.bytes {
            return Err(Error::data(format!("tensor {} has {} bytes, not {bytes}", self.name, self.bytes)));
        }
        Ok(())
    }
}
