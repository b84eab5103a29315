//! A shard's description: the one JSON that the kernels read. Parsed and checked completely before anything is allocated.

use crate::cores::Pin;
use crate::error::{Error, Result};
use crate::pack::SourceType;
use crate::weight_cache::CacheChoice;
use serde::Deserialize;

/// Bounds on a model's dimensions, far above any real model: products of two fit `usize` and a KV position is cheap.
const MAX_DIMENSION: usize = 1 << 24;
const MAX_LAYERS: usize = 4096;
/// Bound on the floats of one activation buffer: maxBatch × the widest row.
const MAX_ACTIVATIONS: usize = 1 << 30;

/// A tensor in the model file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorRef {
    pub name: String,
    /// GGML type id.
    #[serde(rename = "type")]
    pub kind: u32,
    /// Columns, then rows for a matrix.
    pub shape: Vec<usize>,
    /// From the file's begin.
    pub offset: u64,
    pub bytes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RopeStyle {
    /// Interleaved pairs.
    Norm,
    /// Halves.
    Neox,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rope {
    pub base: f64,
    pub dims: usize,
    pub style: RopeStyle,
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
    pub rms_eps: f32,
    pub rope: Rope,
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
    pub norm: TensorRef,
    pub output: TensorRef,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Layer {
    pub attn_norm: TensorRef,
    pub q: TensorRef,
    pub k: TensorRef,
    pub v: TensorRef,
    pub o: TensorRef,
    pub ffn_norm: TensorRef,
    pub gate: TensorRef,
    pub up: TensorRef,
    pub down: TensorRef,
}

/// A contiguous range of a model's layers, with embedding and head if it is at that end.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Descriptor {
    pub path: String,
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
    /// Most tokens of a micro-batch.
    pub max_batch: usize,
    pub hyper: Hyper,
    pub first: usize,
    /// Exclusive.
    pub end: usize,
    pub embedding: Option<TensorRef>,
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
        for (name, value, most) in [
            ("layers", h.layers, MAX_LAYERS),
            ("embedding", h.embedding, MAX_DIMENSION),
            ("heads", h.heads, 1 << 16),
            ("kvHeads", h.kv_heads, 1 << 16),
            ("headDim", h.head_dim, 1 << 16),
            ("feedForward", h.feed_forward, MAX_DIMENSION),
            ("vocab", h.vocab, MAX_DIMENSION),
            ("context", h.context, 1 << 28),
            ("rope.dims", h.rope.dims, 1 << 16),
            ("threads", self.threads, 1024),
            ("maxBatch", self.max_batch, 1 << 16),
            ("kv.tokens", self.kv.tokens, 1 << 30),
        ] {
            if value == 0 || value > most {
                return Err(Error::argument(format!("{name} is {value}; it must be 1 to {most}")));
            }
        }
        let wide = h.heads.saturating_mul(h.head_dim);
        if wide > MAX_DIMENSION {
            return Err(Error::argument(format!("heads {} × headDim {} exceed {MAX_DIMENSION}", h.heads, h.head_dim)));
        }
        let widest = wide.max(h.embedding).max(h.feed_forward);
        if self.max_batch > MAX_ACTIVATIONS / widest {
            return Err(Error::argument(format!("maxBatch {} is too large for rows of {widest}", self.max_batch)));
        }
        if h.heads % h.kv_heads != 0 {
            return Err(Error::argument(format!("heads {} are no multiple of kvHeads {}", h.heads, h.kv_heads)));
        }
        if h.rope.dims > h.head_dim || h.rope.dims % 2 != 0 {
            return Err(Error::argument(format!("rope.dims {} do not fit headDim {}", h.rope.dims, h.head_dim)));
        }
        if !(h.rms_eps.is_finite() && h.rms_eps > 0.0 && h.rope.base.is_finite() && h.rope.base > 0.0) {
            return Err(Error::argument("rmsEps and rope.base must be positive"));
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
        let (d, kv) = (h.embedding, h.kv_heads * h.head_dim);
        let q = wide;
        if let Some(t) = &self.embedding {
            t.check(d, Some(h.vocab))?;
        }
        if let Some(head) = &self.head {
            head.norm.check(d, None)?;
            head.output.check(d, Some(h.vocab))?;
        }
        for layer in &self.layers {
            for (tensor, cols, rows) in [
                (&layer.attn_norm, d, None),
                (&layer.q, d, Some(q)),
                (&layer.k, d, Some(kv)),
                (&layer.v, d, Some(kv)),
                (&layer.o, q, Some(d)),
                (&layer.ffn_norm, d, None),
                (&layer.gate, d, Some(h.feed_forward)),
                (&layer.up, d, Some(h.feed_forward)),
                (&layer.down, h.feed_forward, Some(d)),
            ] {
                tensor.check(cols, rows)?;
            }
        }
        Ok(())
    }
}

impl TensorRef {
    /// The tensor's type; the error names the tensor.
    pub fn source_type(&self) -> Result<SourceType> {
        SourceType::from_ggml(self.kind).map_err(|e| Error::new(e.code, format!("tensor {}: {}", self.name, e.message)))
    }

    fn check(&self, cols: usize, rows: Option<usize>) -> Result<()> {
        let expected: Vec<usize> = [Some(cols), rows].into_iter().flatten().collect();
        if self.shape != expected {
            return Err(Error::data(format!("tensor {} has shape {:?}, not {expected:?}", self.name, self.shape)));
        }
        let ty = self.source_type()?;
        let bytes = ty
            .tensor_bytes(rows.unwrap_or(1), cols)
            .map_err(|e| Error::new(e.code, format!("tensor {}: {}", self.name, e.message)))?;
        if bytes as u64 != self.bytes {
            return Err(Error::data(format!("tensor {} has {} bytes, not {bytes}", self.name, self.bytes)));
        }
        Ok(())
    }
}
