//! A shard's packed weights, as read from the model file.

use super::layout::Stored;
use crate::descriptor::{self, Descriptor, Factors, Layout, RopeScaling, TensorRef};
use crate::error::{Error, Result};
use crate::mapping::ModelFiles;
use crate::pack::{dequantize, pack, PackedMatrix, SourceType};
use crate::pool::Pool;
use crate::shard::Progress;
use crate::tune::Tuner;
use crate::weight_cache::{Cache, CacheReport, Part, Source};
use std::borrow::Cow;
use std::cell::RefCell;
use std::sync::Arc;

/// All that a shard holds of the model.
pub(super) struct Weights {
    pub embedding: Option<Arc<PackedMatrix>>,
    /// A row per position, added to the embedding.
    pub positions: Option<Arc<PackedMatrix>>,
    pub head: Option<Head>,
    pub layers: Vec<Layer>,
    /// Factors of every rotary embedding; empty where it has none.
    pub rope_factors: Vec<Vec<f32>>,
}

/// A norm's weights; `bias` may be empty.
pub(super) struct Norm {
    pub weight: Vec<f32>,
    pub bias: Vec<f32>,
    /// Elements that are normalised together.
    pub group: usize,
}

/// `y = scale·(W·x) + bias`.
pub(super) struct Linear {
    pub w: Arc<PackedMatrix>,
    pub bias: Option<Vec<f32>>,
    pub scale: Option<f32>,
    /// Which of `x` each column multiplies, if not the one at its place. Those of linears that share `x` are the same one if they
    /// are equal.
    pub order: Option<Arc<[u32]>>,
}

/// Whether these take activations in the same order.
pub(super) fn same_order<'a>(linears: impl IntoIterator<Item = &'a Linear>) -> bool {
    let mut orders = linears.into_iter().map(|l| l.order.as_ref().map(Arc::as_ptr));
    let first = orders.next();
    orders.all(|order| Some(order) == first)
}

/// Gives equal orders one memory.
fn share_orders(linears: &mut [&mut Linear]) {
    for i in 1..linears.len() {
        let (before, rest) = linears.split_at_mut(i);
        let equal = before.iter().find(|l| l.order == rest[0].order);
        if let Some(equal) = equal {
            rest[0].order = equal.order.clone();
        }
    }
}

/// What makes logits of the last hidden state.
pub(super) struct Head {
    pub norm: Norm,
    /// Its matrix may be the embedding.
    pub output: Linear,
}

pub(super) struct Mlp {
    pub gate: Option<Linear>,
    pub up: Linear,
    pub sub_norm: Option<Norm>,
    pub down: Linear,
}

pub(super) struct Moe {
    /// In F32, whatever the file has: a rounding here could choose another expert.
    pub router: Linear,
    pub experts: Vec<Mlp>,
    /// The expert that all tokens go to.
    pub shared: Option<Mlp>,
    /// One row, in F32: the shared expert's weight is the sigmoid of its product.
    pub shared_gate: Option<Linear>,
}

pub(super) enum FeedForward {
    Mlp(Mlp),
    Moe(Moe),
}

impl FeedForward {
    /// What is multiplied first, if it is large.
    pub fn first(&self) -> Option<&Linear> {
        match self {
            FeedForward::Mlp(mlp) => Some(mlp.gate.as_ref().unwrap_or(&mlp.up)),
            FeedForward::Moe(_) => None,
        }
    }
}

pub(super) struct Layer {
    pub attn_norm: Option<Norm>,
    pub q: Linear,
    pub k: Linear,
    pub v: Linear,
    pub q_norm: Option<Norm>,
    pub k_norm: Option<Norm>,
    pub rope: Option<usize>,
    pub window: Option<usize>,
    pub attn_sub_norm: Option<Norm>,
    pub o: Linear,
    pub attn_post_norm: Option<Norm>,
    pub ffn_norm: Option<Norm>,
    pub ffn: FeedForward,
    pub ffn_post_norm: Option<Norm>,
}

/// Where tensors come from and what packs them.
struct Loader<'a, 't> {
    files: ModelFiles<'a>,
    cache: Cache,
    pool: &'a Pool,
    tuner: &'a RefCell<Tuner<'t>>,
    /// Added to the weights of norms.
    norm_offset: f32,
}

/// A matrix, and its columns' order if it is another one.
type Ordered = (Arc<PackedMatrix>, Option<Arc<[u32]>>);

impl Loader<'_, '_> {
    fn matrix(&self, t: &TensorRef) -> Result<Ordered> {
        let stored = Stored::find(&self.files, t).map_err(|e| named(t, e))?;
        let Stored { ty, rows, cols, parts, how, order, .. } = &stored;
        let source = Source { ty: *ty, rows: *rows, cols: *cols, parts, how };
        let form = self.tuner.borrow_mut().form(*ty, *rows, *cols);
        let packed =
            self.cache.matrix(form, source, || stored.blocks(self.pool), self.pool).map_err(|e| named(t, e))?;
        Ok((Arc::new(packed), order.as_deref().map(Arc::from)))
    }

    /// A matrix whose columns stand as they are.
    fn table(&self, t: &TensorRef) -> Result<Arc<PackedMatrix>> {
        match self.matrix(t)? {
            (w, None) => Ok(w),
            _ => Err(named(t, Error::unsupported("a table's columns are out of order"))),
        }
    }

    /// All of a tensor's weights; columns in the order that comes with them.
    fn ordered_floats(&self, t: &TensorRef) -> Result<(Vec<f32>, Option<Vec<u32>>)> {
        if let Some(Layout::Parts { parts }) = &t.layout {
            let parts: Vec<_> = parts.iter().map(|part| self.floats(part)).collect::<Result<_>>()?;
            return Ok((parts.concat(), None));
        }
        let read = || {
            let stored = Stored::find(&self.files, t)?;
            let mut out = vec![0.0; stored.rows * stored.cols];
            dequantize(stored.ty, &stored.blocks(self.pool)?, &mut out)?;
            Ok((out, stored.order))
        };
        read().map_err(|e| named(t, e))
    }

    fn floats(&self, t: &TensorRef) -> Result<Vec<f32>> {
        match self.ordered_floats(t)? {
            (values, None) => Ok(values),
            _ => Err(named(t, Error::unsupported("its columns are out of order"))),
        }
    }

    fn with(&self, (w, order): Ordered, l: &descriptor::Linear) -> Result<Linear> {
        let bias = l.bias.as_ref().map(|t| self.floats(t)).transpose()?;
        let scale = l.scale.as_ref().map(|t| self.floats(t)).transpose()?;
        Ok(Linear { w, bias, scale: scale.map(|scale| scale[0]), order })
    }

    fn linear(&self, l: &descriptor::Linear) -> Result<Linear> {
        self.with(self.matrix(&l.weight)?, l)
    }

    /// In F32, from any type.
    fn exact(&self, l: &descriptor::Linear) -> Result<Linear> {
        let t = &l.weight;
        let (values, order) = self.ordered_floats(t)?;
        let bytes: Vec<u8> = values.into_iter().flat_map(f32::to_le_bytes).collect();
        let (rows, cols) = (t.shape[1], order.as_ref().map_or(t.shape[0], Vec::len));
        let w = pack(SourceType::F32, &bytes, rows, cols, self.pool).map_err(|e| named(t, e))?;
        self.with((Arc::new(w), order.map(Arc::from)), l)
    }

    fn norm(&self, n: &descriptor::Norm) -> Result<Norm> {
        let bias = n.bias.as_ref().map(|t| self.floats(t)).transpose()?.unwrap_or_default();
        let mut weight = self.floats(&n.weight)?;
        weight.iter_mut().for_each(|w| *w += self.norm_offset);
        Ok(Norm { weight, bias, group: n.weight.shape[0] })
    }

    fn maybe(&self, n: &Option<descriptor::Norm>) -> Result<Option<Norm>> {
        n.as_ref().map(|n| self.norm(n)).transpose()
    }

    fn mlp(&self, m: &descriptor::Mlp) -> Result<Mlp> {
        let mut gate = m.gate.as_ref().map(|gate| self.linear(gate)).transpose()?;
        let mut up = self.linear(&m.up)?;
        share_orders(&mut gate.iter_mut().chain([&mut up]).collect::<Vec<_>>());
        Ok(Mlp { gate, up, sub_norm: self.maybe(&m.sub_norm)?, down: self.linear(&m.down)? })
    }

    /// Matrix `i` of a tensor of several.
    fn expert(&self, t: &TensorRef, i: usize) -> Result<Linear> {
        if let Some(Layout::Parts { parts }) = &t.layout {
            let (w, order) = self.matrix(&parts[i])?;
            return Ok(Linear { w, bias: None, scale: None, order });
        }
        let stored = Stored::find(&self.files, t).map_err(|e| named(t, e))?;
        let (ty, rows, cols) = (stored.ty, t.shape[1], t.shape[0]);
        if ty.trailer_bytes() != 0 || !matches!(stored.blocks(self.pool), Ok(Cow::Borrowed(_))) {
            return Err(Error::data(format!("tensor {}: {ty:?} holds one matrix only, no experts", t.name)));
        }
        let size = ty.tensor_bytes(rows, cols)?;
        let Part { file, offset, bytes } = stored.parts[0];
        let part = Part { file, offset: offset + (i * size) as u64, bytes: &bytes[i * size..][..size] };
        let source = Source { ty, rows, cols, parts: &[part], how: "" };
        let form = self.tuner.borrow_mut().form(ty, rows, cols);
        let packed = self.cache.matrix(form, source, || Ok(Cow::Borrowed(part.bytes)), self.pool);
        Ok(Linear { w: Arc::new(packed.map_err(|e| named(t, e))?), bias: None, scale: None, order: None })
    }

    fn moe(&self, m: &descriptor::Moe) -> Result<Moe> {
        let expert = |i| {
            let mut gate = m.gate.as_ref().map(|t| self.expert(t, i)).transpose()?;
            let mut up = self.expert(&m.up, i)?;
            share_orders(&mut gate.iter_mut().chain([&mut up]).collect::<Vec<_>>());
            Ok(Mlp { gate, up, sub_norm: None, down: self.expert(&m.down, i)? })
        };
        Ok(Moe {
            router: self.exact(&m.router)?,
            experts: (0..m.up.shape[2]).map(expert).collect::<Result<_>>()?,
            shared: m.shared.as_ref().map(|shared| self.mlp(shared)).transpose()?,
            shared_gate: m.shared_gate.as_ref().map(|gate| self.exact(gate)).transpose()?,
        })
    }

    fn layer(&self, l: &descriptor::Layer) -> Result<Layer> {
        let (mut q, mut k, mut v) = (self.linear(&l.q)?, self.linear(&l.k)?, self.linear(&l.v)?);
        share_orders(&mut [&mut q, &mut k, &mut v]);
        Ok(Layer {
            attn_norm: self.maybe(&l.attn_norm)?,
            q,
            k,
            v,
            q_norm: self.maybe(&l.q_norm)?,
            k_norm: self.maybe(&l.k_norm)?,
            rope: l.rope,
            window: l.window,
            attn_sub_norm: self.maybe(&l.attn_sub_norm)?,
            o: self.linear(&l.o)?,
            attn_post_norm: self.maybe(&l.attn_post_norm)?,
            ffn_norm: self.maybe(&l.ffn_norm)?,
            ffn: match (&l.mlp, &l.moe) {
                (Some(mlp), _) => FeedForward::Mlp(self.mlp(mlp)?),
                (None, Some(moe)) => FeedForward::Moe(self.moe(moe)?),
                (None, None) => return Err(Error::argument("a layer has no feed-forward")),
            },
            ffn_post_norm: self.maybe(&l.ffn_post_norm)?,
        })
    }
}

fn named(t: &TensorRef, e: Error) -> Error {
    Error::new(e.code, format!("tensor {}: {}", t.name, e.message))
}

impl Weights {
    /// Maps the file and packs the shard's tensors into the forms that the tuner chooses, or reads them packed; `progress` counts
    /// embedding, head and layers.
    pub fn load(
        d: &Descriptor,
        pool: &Pool,
        tuner: &RefCell<Tuner<'_>>,
        progress: &Progress,
    ) -> Result<(Self, CacheReport)> {
        let h = &d.hyper;
        let files = ModelFiles::new(&d.path, &d.files);
        let loader = Loader { files, cache: Cache::new(d.cache.as_ref()), pool, tuner, norm_offset: h.norm.offset };
        progress.begin(d.layers.len() + d.embedding.iter().count() + d.head.iter().count());
        let embedding = d.embedding.as_ref().map(|t| loader.table(t)).transpose()?;
        let positions = d.positions.as_ref().map(|t| loader.table(t)).transpose()?;
        progress.advance(embedding.iter().count());
        let output = |t: &TensorRef| match (&embedding, &d.embedding) {
            (Some(packed), Some(e)) if e.same_place(t) => Ok((packed.clone(), None)),
            _ => loader.matrix(t),
        };
        let head = match &d.head {
            Some(h) => {
                let output = loader.with(output(&h.output.weight)?, &h.output)?;
                Some(Head { norm: loader.norm(&h.norm)?, output })
            }
            None => None,
        };
        progress.advance(head.iter().count());
        let factors = h.ropes.iter().map(|rope| match &rope.scaling {
            Some(RopeScaling::Factors { factors }) => loader.floats(factors),
            Some(RopeScaling::Longrope { short, long, original, .. }) => {
                match if h.context > *original { long } else { short } {
                    Factors::Tensor(t) => loader.floats(t),
                    Factors::Values(values) => Ok(values.clone()),
                }
            }
            _ => Ok(Vec::new()),
        });
        let rope_factors = factors.collect::<Result<Vec<_>>>()?;
        if rope_factors.iter().flatten().any(|&factor| !(factor.is_finite() && factor > 0.0)) {
            return Err(Error::data("a factor of a rotary embedding is not positive"));
        }
        let mut layers = Vec::with_capacity(d.layers.len());
        for layer in &d.layers {
            layers.push(loader.layer(layer)?);
            progress.advance(1);
        }
        Ok((Self { embedding, positions, head, layers, rope_factors }, loader.cache.close()))
    }

    /// Bytes held, but for the embedding's when it is not the head's too.
    pub fn bytes(&self) -> usize {
        let head = self.head.as_ref().map_or(0, |h| h.norm.bytes() + h.output.bytes());
        let positions = self.positions.as_ref().map_or(0, |table| table.bytes());
        self.layers.iter().map(|l| l.bytes(None)).sum::<usize>() + head + positions
    }

    /// Bytes that a pass over one token reads, the embedding's row aside; `used` experts of a mixture.
    pub fn pass_bytes(&self, used: usize) -> usize {
        let head = self.head.as_ref().map_or(0, |h| h.norm.bytes() + h.output.bytes());
        self.layers.iter().map(|l| l.bytes(Some(used))).sum::<usize>() + head
    }

    /// Bytes of the embedding that are not the head's too, and of one of its rows.
    pub fn table_bytes(&self) -> (usize, usize) {
        let Some(table) = &self.embedding else { return (0, 0) };
        let tied = self.head.as_ref().is_some_and(|h| Arc::ptr_eq(&h.output.w, table));
        (if tied { 0 } else { table.bytes() }, table.bytes() / table.rows.max(1))
    }
}

impl Norm {
    fn bytes(&self) -> usize {
        4 * (self.weight.len() + self.bias.len())
    }
}

impl Linear {
    fn bytes(&self) -> usize {
        self.w.bytes() + 4 * self.bias.as_ref().map_or(0, Vec::len)
    }
}

impl Mlp {
    fn bytes(&self) -> usize {
        self.gate.as_ref().map_or(0, Linear::bytes)
            + self.up.bytes()
            + self.down.bytes()
            + self.sub_norm.as_ref().map_or(0, Norm::bytes)
    }
}

impl Layer {
    /// Bytes of all experts, or of so many.
    fn bytes(&self, experts: Option<usize>) -> usize {
        let norms = [&self.attn_norm, &self.q_norm, &self.k_norm, &self.attn_sub_norm, &self.attn_post_norm];
        let norms = norms.into_iter().chain([&self.ffn_norm, &self.ffn_post_norm]).flatten().map(Norm::bytes);
        let ffn = match &self.ffn {
            FeedForward::Mlp(mlp) => mlp.bytes(),
            FeedForward::Moe(moe) => {
                moe.router.bytes()
                    + moe.experts.iter().take(experts.unwrap_or(usize::MAX)).map(Mlp::bytes).sum::<usize>()
                    + moe.shared.as_ref().map_or(0, Mlp::bytes)
                    + moe.shared_gate.as_ref().map_or(0, Linear::bytes)
            }
        };
        [&self.q, &self.k, &self.v, &self.o].iter().map(|l| l.bytes()).sum::<usize>() + norms.sum::<usize>() + ffn
    }
}
