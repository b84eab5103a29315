//! The tuner: which form, kernel and tile sizes are fastest on this device for each shape of matrix, batch size and number of
//! threads. Measured once (`bench`, `race`), kept in the cache folder (`store`), applied by every product (`Plans`).
//!
//! All candidates give the same bits, so a choice is of no consequence but time: a measurement may be wrong, a store lost. What
//! has not been measured follows fixed rules: `Kernels::form`, `Plan::default` and `INLINE_BYTES`.
//!
//! The form is one for all batch sizes, as weights are packed once. Decoding counts twice as much as prefill: a form takes the
//! place of the rule's if the cube root of (time at batch 1)² × (time at prefill), against the rule's form, is 3 % better.

mod bench;
mod race;
mod store;

use crate::descriptor::Tuning;
use crate::dispatch::{select, Kernels};
use crate::error::{Error, Result};
use crate::matmul::Plan;
use crate::pack::{PackedForm, PackedMatrix, SourceType};
use crate::pool::Pool;
use crate::weight_cache::CacheChoice;
use bench::Bench;
use race::{Measure, Race};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::Duration;
use store::Store;

/// Bytes below which a job is done sooner than a thread that waits for it joins in: some 3 µs of one thread's reading.
pub(crate) const INLINE_BYTES: usize = 64 << 10;
/// A model file of fewer bytes is not measured unasked: it answers at once, and gains little.
const LEAST_BYTES: u64 = 64 << 20;
/// Weights of one type that are cycled through, so that they come from memory as a large model's do.
const RING_BYTES: usize = 64 << 20;
/// Weights of a measured matrix; larger ones are like it.
const MOST_WEIGHTS: usize = 1 << 23;
/// Seconds of measuring, when nobody asked for it and when somebody did.
const SECONDS: f64 = 3.0;
const SECONDS_FORCED: f64 = 60.0;
/// How long another process may measure before this one goes on with the rules.
const PATIENCE: Duration = Duration::from_secs(5);

/// Batch sizes with a plan of their own: the most rows of a class, and the rows that it is measured with.
const CLASSES: [(usize, usize); 4] = [(1, 1), (4, 4), (8, 8), (usize::MAX, 64)];
const DECODE: usize = 0;
const PREFILL: usize = CLASSES.len() - 1;

/// A matrix as far as its speed depends on it; `rows` are no more than are measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub ty: SourceType,
    pub rows: usize,
    pub cols: usize,
}

impl Shape {
    fn new(ty: SourceType, rows: usize, cols: usize) -> Self {
        Shape { ty, rows: measured_rows(rows, cols), cols }
    }
}

/// Whole tiles of any form.
fn measured_rows(rows: usize, cols: usize) -> usize {
    rows.min((MOST_WEIGHTS / cols.max(1)).next_multiple_of(32).max(32))
}

/// How a matrix is packed and multiplied.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Choice {
    pub form: PackedForm,
    /// Products of at most so many activation rows are the calling thread's alone; `None`: those of few bytes.
    pub inline_rows: Option<usize>,
    /// One for each of `CLASSES`.
    pub plans: [Plan; CLASSES.len()],
}

impl Choice {
    fn usual(ks: &Kernels, ty: SourceType) -> Self {
        Choice { form: ks.form(ty), inline_rows: None, plans: Default::default() }
    }
}

/// The choices for a shard's matrices.
#[derive(Debug, Default)]
pub struct Plans(Vec<(Shape, Choice)>);

impl Plans {
    fn of(&self, w: &PackedMatrix) -> Option<&Choice> {
        let rows = measured_rows(w.rows, w.cols);
        let found =
            self.0.iter().find(|(shape, choice)| shape.cols == w.cols && shape.rows == rows && choice.form == w.form);
        found.map(|(_, choice)| choice)
    }

    /// How to multiply `n` rows of activations with a matrix.
    pub fn plan(&self, w: &PackedMatrix, n: usize) -> Plan {
        let class = CLASSES.iter().position(|&(most, _)| n <= most).unwrap_or(PREFILL);
        self.of(w).map_or_else(Plan::default, |choice| choice.plans[class])
    }

    /// Whether the calling thread should do that alone.
    pub fn is_inline(&self, w: &PackedMatrix, n: usize) -> bool {
        match self.of(w).and_then(|choice| choice.inline_rows) {
            Some(rows) => n <= rows,
            None => w.bytes().saturating_mul(n) < INLINE_BYTES,
        }
    }
}

/// One measured candidate.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Trial {
    #[serde(rename = "type")]
    pub ty: String,
    pub rows: usize,
    pub cols: usize,
    /// Rows of activations.
    pub batch: usize,
    pub form: String,
    pub kernel: &'static str,
    pub width: usize,
    pub block_bytes: usize,
    /// On one thread.
    pub inline: bool,
    /// Median time of a product with the preparation of its activations.
    pub seconds: f64,
    /// Against the rule's choice in the same rounds.
    pub ratio: f64,
    /// It is in the choice.
    pub chosen: bool,
}

/// Where a choice comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    Measured,
    Stored,
    /// Not measured.
    Rule,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ReportedPlan {
    /// The most rows of activations it is for; `None`: any number.
    pub most: Option<usize>,
    pub kernel: &'static str,
    pub width: usize,
    pub block_bytes: usize,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ReportedChoice {
    #[serde(rename = "type")]
    pub ty: String,
    /// At most those that are measured.
    pub rows: usize,
    pub cols: usize,
    pub origin: Origin,
    pub form: String,
    pub inline_rows: Option<usize>,
    pub plans: Vec<ReportedPlan>,
}

/// What a tuner did.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    pub cpu: String,
    pub isa: &'static str,
    pub threads: usize,
    /// The store's file.
    pub store: Option<PathBuf>,
    /// Spent on measuring.
    pub seconds: f64,
    pub choices: Vec<ReportedChoice>,
    pub trials: Vec<Trial>,
    /// What went wrong, in sentences for people; nothing depends on it but time.
    pub warnings: Vec<String>,
}

/// Chooses forms while weights are packed, measuring what is not known.
pub struct Tuner<'a> {
    ks: &'a Kernels,
    threads: usize,
    tuning: Tuning,
    measure: Box<dyn Measure + 'a>,
    /// Whether what is not stored is measured.
    measures: bool,
    /// Seconds that measuring may take.
    budget: f64,
    ring_bytes: usize,
    patience: Duration,
    store: Option<Store>,
    path: Option<PathBuf>,
    choices: Vec<(Shape, Choice, Origin)>,
    trials: Vec<Trial>,
    warnings: Vec<String>,
}

impl<'a> Tuner<'a> {
    /// For products of `pool`'s threads with weights from a model file of `bytes`. Without a cache nothing is kept, and
    /// nothing measured unasked.
    pub fn new(ks: &'a Kernels, pool: &'a Pool, tuning: Tuning, cache: Option<&CacheChoice>, bytes: u64) -> Self {
        let ring_bytes = usize::try_from(bytes).unwrap_or(RING_BYTES).clamp(1 << 20, RING_BYTES).next_power_of_two();
        let bench = Box::new(Bench::new(ks, pool, ring_bytes));
        let mut tuner = Self::with(ks, pool.threads(), tuning, ring_bytes, bench);
        let folder = cache.and_then(|cache| cache.dir.clone().or_else(crate::cache::folder));
        tuner.measures &= tuning == Tuning::Force || folder.is_some() && bytes >= LEAST_BYTES;
        if let (Some(folder), true) = (folder, tuning != Tuning::Off) {
            tuner.open_store(folder.join("tuning"));
        }
        tuner
    }

    fn with(
        ks: &'a Kernels,
        threads: usize,
        tuning: Tuning,
        ring_bytes: usize,
        measure: Box<dyn Measure + 'a>,
    ) -> Self {
        Tuner {
            ks,
            threads,
            tuning,
            measure,
            measures: tuning != Tuning::Off,
            budget: if tuning == Tuning::Force { SECONDS_FORCED } else { SECONDS },
            ring_bytes,
            patience: PATIENCE,
            store: None,
            path: None,
            choices: Vec::new(),
            trials: Vec::new(),
            warnings: Vec::new(),
        }
    }

    fn open_store(&mut self, folder: PathBuf) {
        let (store, problem) = Store::open(&folder, self.ks, self.threads);
        self.path = Some(store.path().to_path_buf());
        self.store = Some(store);
        self.warnings.extend(problem);
    }

    /// The form to pack a matrix into.
    pub fn form(&mut self, ty: SourceType, rows: usize, cols: usize) -> PackedForm {
        let shape = Shape::new(ty, rows, cols);
        if let Some((_, choice, _)) = self.choices.iter().find(|(known, ..)| *known == shape) {
            return choice.form;
        }
        let (choice, origin) = self.choose(shape).unwrap_or_else(|| (Choice::usual(self.ks, ty), Origin::Rule));
        let form = choice.form;
        self.choices.push((shape, choice, origin));
        form
    }

    fn choose(&mut self, shape: Shape) -> Option<(Choice, Origin)> {
        // Rows that are no whole blocks are for packing to refuse.
        if self.tuning == Tuning::Off || shape.rows == 0 || shape.cols == 0 || shape.ty.row_bytes(shape.cols).is_err() {
            return None;
        }
        let stored = |store: &Option<Store>, ks, ring| store.as_ref().and_then(|store| store.get(ks, shape, ring));
        if self.tuning == Tuning::Auto {
            if let Some(choice) = stored(&self.store, self.ks, self.ring_bytes) {
                return Some((choice, Origin::Stored));
            }
        }
        if !self.measures || self.measure.spent() >= self.budget {
            return None;
        }
        let mut lock = None;
        if let Some(store) = &mut self.store {
            match store.lock(self.patience) {
                Ok(Some(held)) => lock = Some(held),
                Ok(None) => {
                    self.warnings.push("another process still measures: this one goes by the fixed rules".into());
                    self.measures = false;
                    return None;
                }
                Err(e) => self.lose_store(e),
            }
            // Whoever held the lock may have measured this very shape.
            if let (Some(_), Some(store), Tuning::Auto) = (&lock, &mut self.store, self.tuning) {
                store.reload();
                if let Some(choice) = stored(&self.store, self.ks, self.ring_bytes) {
                    return Some((choice, Origin::Stored));
                }
            }
        }
        let race = Race { ks: self.ks, threads: self.threads, shape, budget: self.budget };
        let outcome = race.run(&mut *self.measure, &mut self.trials);
        self.measure.forget();
        match outcome {
            Ok(Some(choice)) => {
                if let Some(store) = &mut self.store {
                    if let Err(e) = store.put(self.ks, shape, self.ring_bytes, &choice) {
                        self.lose_store(e);
                    }
                }
                Some((choice, Origin::Measured))
            }
            Ok(None) => None,
            Err(e) => {
                self.warnings.push(format!("measuring kernels failed: {}", e.message));
                self.measures = false;
                None
            }
        }
    }

    fn lose_store(&mut self, e: std::io::Error) {
        if let Some(store) = self.store.take() {
            self.warnings.push(format!("measurements cannot be kept in {}: {e}", store.path().display()));
        }
    }

    /// What was chosen, and an account of it.
    pub fn finish(self) -> (Plans, Report) {
        let choices = self.choices.iter().map(|(shape, choice, origin)| {
            let variants = self.ks.variants(choice.form);
            let plans = choice.plans.iter().zip(CLASSES).map(|(plan, (most, _))| ReportedPlan {
                most: (most != usize::MAX).then_some(most),
                kernel: variants[plan.variant].name,
                width: plan.width.min(variants[plan.variant].widths[0]),
                block_bytes: plan.block_bytes,
            });
            ReportedChoice {
                ty: format!("{:?}", shape.ty),
                rows: shape.rows,
                cols: shape.cols,
                origin: *origin,
                form: form_name(choice.form),
                inline_rows: choice.inline_rows,
                plans: plans.collect(),
            }
        });
        let report = Report {
            cpu: store::cpu(),
            isa: self.ks.isa.name(),
            threads: self.threads,
            choices: choices.collect(),
            store: self.path,
            seconds: self.measure.spent(),
            trials: self.trials,
            warnings: self.warnings,
        };
        (Plans(self.choices.into_iter().map(|(shape, choice, _)| (shape, choice)).collect()), report)
    }
}

/// Matrices to measure kernels for.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Request {
    pub threads: usize,
    pub isa: Option<String>,
    pub tune: Tuning,
    /// Where the measurements are kept; nowhere if absent.
    pub cache: Option<CacheChoice>,
    /// Of the model's file.
    pub bytes: u64,
    /// The most important first: the time for measuring may not suffice for all.
    pub matrices: Vec<Matrix>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Matrix {
    /// GGML type id.
    #[serde(rename = "type")]
    pub kind: u32,
    pub rows: usize,
    pub cols: usize,
}

/// Answers a `Request` in JSON.
pub fn tune(request: &[u8]) -> Result<Report> {
    let r: Request = serde_json::from_slice(request).map_err(|e| Error::argument(format!("tuning request: {e}")))?;
    if !(1..=1024).contains(&r.threads) || r.matrices.len() > 4096 {
        return Err(Error::argument("threads must be 1 to 1024 and matrices at most 4096"));
    }
    let (ks, pool) = (select(r.isa.as_deref())?, Pool::new(r.threads));
    let mut tuner = Tuner::new(ks, &pool, r.tune, r.cache.as_ref(), r.bytes);
    for m in &r.matrices {
        let ty = SourceType::from_ggml(m.kind)?;
        ty.tensor_bytes(m.rows, m.cols)?;
        tuner.form(ty, m.rows, m.cols);
    }
    Ok(tuner.finish().1)
}

/// A form's name among the candidates of its type.
fn form_name(form: PackedForm) -> String {
    format!("{:?}", form.codes).to_lowercase().replace(['(', ')'], "")
}

#[cfg(test)]
mod tests;
