//! The clock: products of synthetic matrices, in turns, as a shard would make them.

use super::race::{Measure, Setting};
use super::Shape;
use crate::dispatch::Kernels;
use crate::error::Result;
use crate::matmul::{matmul_by, Activations};
use crate::pack::{pack_as, PackedForm, PackedMatrix};
use crate::pool::Pool;
use std::time::{Duration, Instant};

/// The least time over which products are repeated.
const SAMPLE: Duration = Duration::from_millis(2);

pub(super) struct Bench<'a> {
    ks: &'a Kernels,
    pool: &'a Pool,
    one: Pool,
    ring_bytes: usize,
    rings: Vec<Ring>,
    act: Activations,
    x: Vec<f32>,
    y: Vec<f32>,
    spent: Duration,
}

/// Copies of a matrix, taken one after the other: when the first one's turn comes again, caches hold others.
struct Ring {
    shape: Shape,
    copies: Vec<PackedMatrix>,
    next: usize,
}

impl<'a> Bench<'a> {
    pub fn new(ks: &'a Kernels, pool: &'a Pool, ring_bytes: usize) -> Self {
        Bench {
            ks,
            pool,
            one: Pool::new(1),
            ring_bytes,
            rings: Vec::new(),
            act: Activations::new(),
            x: Vec::new(),
            y: Vec::new(),
            spent: Duration::ZERO,
        }
    }

    /// The place of the shape's ring.
    fn ring(&mut self, shape: Shape, form: PackedForm, n: usize) -> Result<usize> {
        let known = self.rings.iter().position(|ring| ring.shape == shape && ring.copies[0].form == form);
        if let Some(at) = known {
            return Ok(at);
        }
        let Shape { ty, rows, cols } = shape;
        let source = ty.arbitrary(rows, cols)?;
        let first = pack_as(form, ty, &source, rows, cols, self.pool)?;
        // Long batches read weights seldom.
        let bytes = if n > 8 { self.ring_bytes / 4 } else { self.ring_bytes };
        let copies =
            (1..bytes / first.bytes().max(1)).map(|_| first.duplicate(self.pool)).collect::<Result<Vec<_>>>()?;
        self.rings.push(Ring { shape, copies: std::iter::once(first).chain(copies).collect(), next: 0 });
        Ok(self.rings.len() - 1)
    }

    fn time(&mut self, shape: Shape, setting: &Setting) -> Result<f64> {
        let (n, plan) = (setting.n, setting.plan);
        let at = self.ring(shape, setting.form, n)?;
        let value = |i: usize| ((i * 37 % 101) as f32 - 50.0) / 64.0;
        self.x.extend((self.x.len()..n * shape.cols).map(value));
        self.y.resize(self.y.len().max(n * shape.rows), 0.0);
        let pool = if setting.inline { &self.one } else { self.pool };
        let ring = &mut self.rings[at];
        let _awake = self.pool.session();
        let (start, mut count) = (Instant::now(), 0);
        while count == 0 || start.elapsed() < SAMPLE {
            let w = &ring.copies[ring.next];
            ring.next = (ring.next + 1) % ring.copies.len();
            self.act.prepare(self.ks, &self.x[..n * shape.cols], n, shape.cols, &[setting.form], self.pool);
            matmul_by(plan, self.ks, w, &self.act, &mut self.y, shape.rows, pool);
            count += 1;
        }
        Ok(start.elapsed().as_secs_f64() / count as f64)
    }
}

impl Measure for Bench<'_> {
    fn seconds(&mut self, shape: Shape, setting: &Setting) -> Result<f64> {
        let start = Instant::now();
        let seconds = self.time(shape, setting);
        self.spent += start.elapsed();
        seconds
    }

    fn spent(&self) -> f64 {
        self.spent.as_secs_f64()
    }

    fn forget(&mut self) {
        self.rings.clear();
    }
}
