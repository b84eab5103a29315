//! A shard's packed weights, as read from the model file.

use crate::descriptor::{self, Descriptor, TensorRef};
use crate::error::{Error, Result};
use crate::mapping::ModelFile;
use crate::pack::{dequantize, PackedMatrix};
use crate::pool::Pool;
use crate::shard::Progress;
use crate::tune::Tuner;
use crate::weight_cache::{Cache, CacheReport, Source};
use std::cell::RefCell;
use std::sync::Arc;

/// All that a shard holds of the model.
pub(super) struct Weights {
    pub embedding: Option<Arc<PackedMatrix>>,
    pub head: Option<Head>,
    pub layers: Vec<Layer>,
}

/// What makes logits of the last hidden state.
pub(super) struct Head {
    pub norm: Vec<f32>,
    /// May be the embedding.
    pub output: Arc<PackedMatrix>,
}

pub(super) struct Layer {
    pub attn_norm: Vec<f32>,
    pub q: PackedMatrix,
    pub k: PackedMatrix,
    pub v: PackedMatrix,
    pub o: PackedMatrix,
    pub ffn_norm: Vec<f32>,
    pub gate: PackedMatrix,
    pub up: PackedMatrix,
    pub down: PackedMatrix,
}

/// Where tensors come from and what packs them.
struct Loader<'a, 't> {
    file: ModelFile,
    cache: Cache,
    pool: &'a Pool,
    tuner: &'a RefCell<Tuner<'t>>,
}

impl Loader<'_, '_> {
    fn matrix(&self, t: &TensorRef) -> Result<PackedMatrix> {
        let ty = t.source_type()?;
        let (rows, cols) = (t.shape[1], t.shape[0]);
        let source = Source { ty, rows, cols, offset: t.offset, bytes: self.file.tensor(t)? };
        let form = self.tuner.borrow_mut().form(ty, rows, cols);
        self.cache.matrix(form, source, self.file.file(), self.pool).map_err(|e| named(t, e))
    }

    fn vector(&self, t: &TensorRef) -> Result<Vec<f32>> {
        let mut out = vec![0.0; t.shape[0]];
        dequantize(t.source_type()?, self.file.tensor(t)?, &mut out).map_err(|e| named(t, e))?;
        Ok(out)
    }

    fn layer(&self, l: &descriptor::Layer) -> Result<Layer> {
        Ok(Layer {
            attn_norm: self.vector(&l.attn_norm)?,
            q: self.matrix(&l.q)?,
            k: self.matrix(&l.k)?,
            v: self.matrix(&l.v)?,
            o: self.matrix(&l.o)?,
            ffn_norm: self.vector(&l.ffn_norm)?,
            gate: self.matrix(&l.gate)?,
            up: self.matrix(&l.up)?,
            down: self.matrix(&l.down)?,
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
        let loader = Loader { file: ModelFile::open(&d.path)?, cache: Cache::new(d.cache.as_ref()), pool, tuner };
        progress.begin(d.layers.len() + d.embedding.iter().count() + d.head.iter().count());
        let embedding = d.embedding.as_ref().map(|t| loader.matrix(t).map(Arc::new)).transpose()?;
        progress.advance(embedding.iter().count());
        let output = |t: &TensorRef| match (&embedding, &d.embedding) {
            (Some(packed), Some(e)) if e.offset == t.offset && e.kind == t.kind && e.shape == t.shape => {
                Ok(packed.clone())
            }
            _ => loader.matrix(t).map(Arc::new),
        };
        let head = match &d.head {
            Some(h) => Some(Head { norm: loader.vector(&h.norm)?, output: output(&h.output)? }),
            None => None,
        };
        progress.advance(head.iter().count());
        let mut layers = Vec::with_capacity(d.layers.len());
        for layer in &d.layers {
            layers.push(loader.layer(layer)?);
            progress.advance(1);
        }
        Ok((Self { embedding, head, layers }, loader.cache.close()))
    }

    /// Bytes that a pass over one token reads, the embedding's row aside.
    pub fn pass_bytes(&self) -> usize {
        let head = self.head.as_ref().map_or(0, |h| 4 * h.norm.len() + h.output.bytes());
        self.layers.iter().map(Layer::bytes).sum::<usize>() + head
    }

    /// Bytes of the embedding that are not the head's too, and of one of its rows.
    pub fn table_bytes(&self) -> (usize, usize) {
        let Some(table) = &self.embedding else { return (0, 0) };
        let tied = self.head.as_ref().is_some_and(|h| Arc::ptr_eq(&h.output, table));
        (if tied { 0 } else { table.bytes() }, table.bytes() / table.rows.max(1))
    }
}

impl Layer {
    fn bytes(&self) -> usize {
        [&self.q, &self.k, &self.v, &self.o, &self.gate, &self.up, &self.down].iter().map(|m| m.bytes()).sum::<usize>()
            + 4 * (self.attn_norm.len() + self.ffn_norm.len())
    }
}
