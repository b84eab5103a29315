//! Candidates of one shape against each other: which are worth measuring, in what order, and when one takes the place of the
//! rule's choice. Knows no clock: `Measure` says how long things took, and how much of the budget is used.

use super::{form_name, Choice, Shape, Trial, CLASSES, DECODE, INLINE_BYTES, PREFILL};
use crate::dispatch::Kernels;
use crate::error::Result;
use crate::matmul::Plan;
use crate::pack::PackedForm;

/// A candidate takes the rule's place if its time against the rule's is below this.
const GAIN: f64 = 0.97;
/// Counted rounds; fewer of products that take long, which one disturbance changes less.
const ROUNDS: usize = 7;
const ROUNDS_LONG: usize = 3;
const LONG: f64 = 0.01;
/// After two rounds, candidates whose better time is above the best by this factor are out.
const HOPELESS: f64 = 1.25;
/// Weights of the matrix that prefill is measured with: it is bound by computation, so that few are as good as many.
const PREFILL_WEIGHTS: usize = 1 << 20;
/// Block sizes to try, with so many rows of activations and the whole matrix: what they change is how often it is read.
const BLOCKS: [usize; 5] = [64 << 10, 128 << 10, 512 << 10, 1 << 20, 2 << 20];
const BLOCK_ROWS: usize = 256;
/// Bytes of a product beyond which several threads are better without asking.
const INLINE_MOST: usize = 1 << 20;

/// What is measured: a product of `n` rows of activations.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Setting {
    pub form: PackedForm,
    pub plan: Plan,
    pub n: usize,
    /// On the calling thread.
    pub inline: bool,
}

pub(super) trait Measure {
    /// Seconds of one product with a matrix of this shape, with the preparation of its activations.
    fn seconds(&mut self, shape: Shape, setting: &Setting) -> Result<f64>;
    /// Seconds that everything took so far.
    fn spent(&self) -> f64;
    /// Frees what was made for the shapes so far.
    fn forget(&mut self);
}

/// The choice for one shape, to be made within what is left of the budget.
pub(super) struct Race<'a> {
    pub ks: &'a Kernels,
    pub threads: usize,
    pub shape: Shape,
    /// Seconds, of `Measure::spent`.
    pub budget: f64,
}

/// A measured setting: median seconds, and median ratio to the first setting of the race in the same round.
#[derive(Clone, Copy)]
struct Time {
    seconds: f64,
    ratio: f64,
}

impl Race<'_> {
    /// `None` if the budget does not suffice. `all` gets what was measured.
    pub fn run(&self, measure: &mut dyn Measure, all: &mut Vec<Trial>) -> Result<Option<Choice>> {
        let mut trials = Vec::new();
        let choice = self.choose(measure, &mut trials);
        if let Ok(Some(choice)) = &choice {
            trials.iter_mut().for_each(|trial| trial.chosen = self.is_chosen(trial, choice));
        }
        all.append(&mut trials);
        choice
    }

    fn choose(&self, measure: &mut dyn Measure, trials: &mut Vec<Trial>) -> Result<Option<Choice>> {
        let ks = self.ks;
        let usual = ks.form(self.shape.ty);
        let others =
            PackedForm::candidates(self.shape.ty).into_iter().filter(|&form| form != usual && ks.has_kernel(form));
        let forms: Vec<PackedForm> = std::iter::once(usual).chain(others).collect();
        // A plan and its time against the rule's, for every form.
        let Some(decode) = self.class(measure, trials, &forms, DECODE)? else { return Ok(None) };
        let Some(prefill) = self.class(measure, trials, &forms, PREFILL)? else { return Ok(None) };
        let cost = |i: usize| (decode[i].1 * decode[i].1 * prefill[i].1).cbrt();
        let best = (0..forms.len()).min_by(|&a, &b| cost(a).total_cmp(&cost(b))).unwrap_or(0);
        // The rule's form may have gained by a plan of its own.
        let best = if cost(best) < GAIN * cost(0) { best } else { 0 };
        let form = forms[best];
        let mut plans = [Plan::default(); CLASSES.len()];
        (plans[DECODE], plans[PREFILL]) = (decode[best].0, prefill[best].0);
        for class in DECODE + 1..PREFILL {
            let Some(few) = self.class(measure, trials, &[form], class)? else { return Ok(None) };
            plans[class] = few[0].0;
        }
        let Some(block_bytes) = self.block(measure, trials, form, plans[PREFILL])? else { return Ok(None) };
        plans[PREFILL].block_bytes = block_bytes;
        let Some(inline_rows) = self.inline(measure, trials, form, &plans)? else { return Ok(None) };
        Ok(Some(Choice { form, inline_rows, plans }))
    }

    fn is_chosen(&self, trial: &Trial, choice: &Choice) -> bool {
        let plan = choice.plans[CLASSES.iter().position(|&(most, _)| trial.batch <= most).unwrap_or(PREFILL)];
        let inline = choice.inline_rows.map_or(self.rule_inlines(trial.batch), |rows| trial.batch <= rows);
        trial.form == form_name(choice.form)
            && trial.kernel == self.ks.variants(choice.form)[plan.variant].name
            && trial.width == self.width(choice.form, plan).min(trial.batch)
            && (trial.batch < BLOCK_ROWS || trial.block_bytes == plan.block_bytes)
            && trial.inline == inline
    }

    fn width(&self, form: PackedForm, plan: Plan) -> usize {
        plan.width.min(self.ks.variants(form)[plan.variant].widths[0])
    }

    /// The best plan of each form for a class of batch sizes, and its time against the first form's usual plan.
    fn class(
        &self,
        measure: &mut dyn Measure,
        trials: &mut Vec<Trial>,
        forms: &[PackedForm],
        class: usize,
    ) -> Result<Option<Vec<(Plan, f64)>>> {
        let n = CLASSES[class].1;
        let mut shape = self.shape;
        if class == PREFILL {
            shape.rows = shape.rows.min((PREFILL_WEIGHTS / shape.cols).next_multiple_of(32).max(32));
        }
        let mut settings: Vec<Setting> = Vec::new();
        for &form in forms {
            for (variant, of) in self.ks.variants(form).iter().enumerate() {
                for (i, &width) in of.widths.iter().enumerate() {
                    // Widths from the batch on are all the same.
                    if i > 0 && of.widths[i - 1] <= n || i == 0 || width < n {
                        let plan = Plan { variant, width, ..Plan::default() };
                        settings.push(Setting { form, plan, n, inline: self.rule_inlines(n) });
                    }
                }
            }
        }
        let Some(times) = self.race(measure, trials, shape, &settings)? else { return Ok(None) };
        let best = forms.iter().map(|&form| {
            let own: Vec<usize> = (0..settings.len()).filter(|&i| settings[i].form == form).collect();
            let best = own.iter().copied().min_by(|&a, &b| times[a].ratio.total_cmp(&times[b].ratio)).unwrap_or(own[0]);
            let best = if times[best].ratio < GAIN * times[own[0]].ratio { best } else { own[0] };
            (settings[best].plan, times[best].ratio)
        });
        Ok(Some(best.collect()))
    }

    fn block(
        &self,
        measure: &mut dyn Measure,
        trials: &mut Vec<Trial>,
        form: PackedForm,
        plan: Plan,
    ) -> Result<Option<usize>> {
        let with = |block_bytes| Setting { form, plan: Plan { block_bytes, ..plan }, n: BLOCK_ROWS, inline: false };
        let settings: Vec<Setting> = std::iter::once(plan.block_bytes).chain(BLOCKS).map(with).collect();
        // Never to be had on a slow device; the rule is good enough there.
        let weights = |rows: usize| (rows * self.shape.cols) as f64;
        let known = trials.iter().find(|trial| trial.batch == CLASSES[PREFILL].1);
        let rate = known.map_or(0.0, |t| t.seconds / (weights(t.rows) * t.batch as f64));
        let once = rate * weights(self.shape.rows) * BLOCK_ROWS as f64;
        if once * (settings.len() * (ROUNDS_LONG + 1)) as f64 > self.budget / 3.0 {
            return Ok(Some(plan.block_bytes));
        }
        let Some(times) = self.race(measure, trials, self.shape, &settings)? else { return Ok(None) };
        Ok(Some(settings[winner(&times)].plan.block_bytes))
    }

    /// Up to how many rows the calling thread does a product alone; `Some(None)` if as many as the rule says.
    #[allow(clippy::option_option)]
    fn inline(
        &self,
        measure: &mut dyn Measure,
        trials: &mut Vec<Trial>,
        form: PackedForm,
        plans: &[Plan],
    ) -> Result<Option<Option<usize>>> {
        let (mut rows, mut as_ruled) = (0, true);
        for (&(most, n), &plan) in CLASSES.iter().zip(plans).take(PREFILL) {
            if self.threads == 1 || self.bytes() * n > INLINE_MOST {
                break;
            }
            let rule = self.rule_inlines(n);
            let settings = [rule, !rule].map(|inline| Setting { form, plan, n, inline });
            let Some(times) = self.race(measure, trials, self.shape, &settings)? else { return Ok(None) };
            let inline = settings[winner(&times)].inline;
            as_ruled &= inline == rule;
            if !inline {
                break;
            }
            rows = most;
        }
        Ok(Some((!as_ruled).then_some(rows)))
    }

    /// About the bytes of the packed matrix: they are the source's, within two per cent.
    fn bytes(&self) -> usize {
        self.shape.ty.tensor_bytes(self.shape.rows, self.shape.cols).unwrap_or(usize::MAX / 16)
    }

    fn rule_inlines(&self, n: usize) -> bool {
        self.bytes().saturating_mul(n) < INLINE_BYTES
    }

    /// Measures the settings in turns. `None` if the budget ends before there are enough rounds.
    fn race(
        &self,
        measure: &mut dyn Measure,
        trials: &mut Vec<Trial>,
        shape: Shape,
        settings: &[Setting],
    ) -> Result<Option<Vec<Time>>> {
        if settings.len() < 2 {
            return Ok(Some(vec![Time { seconds: 0.0, ratio: 1.0 }]));
        }
        let mut times: Vec<Vec<f64>> = vec![Vec::new(); settings.len()];
        let mut runs = vec![true; settings.len()];
        let mut rounds = ROUNDS;
        // Round 0 does not count: it makes matrices and wakes what sleeps.
        for round in 0.. {
            if round > rounds {
                break;
            }
            for i in 0..settings.len() {
                if measure.spent() >= self.budget {
                    return Ok(None);
                }
                if runs[i] {
                    let seconds = measure.seconds(shape, &settings[i])?.max(1e-9);
                    if round > 0 {
                        times[i].push(seconds);
                    } else if seconds > LONG {
                        rounds = ROUNDS_LONG;
                    }
                }
            }
            if round == 2 {
                let fastest = |times: &Vec<f64>| times.iter().copied().fold(f64::INFINITY, f64::min);
                let best = times.iter().map(fastest).fold(f64::INFINITY, f64::min);
                // The first is what the others are compared with.
                (1..settings.len()).for_each(|i| runs[i] = fastest(&times[i]) <= HOPELESS * best);
            }
        }
        let found: Vec<Time> = times
            .iter()
            .map(|own| Time {
                seconds: median(own.clone()),
                ratio: median(own.iter().zip(&times[0]).map(|(a, b)| a / b).collect()),
            })
            .collect();
        trials.extend(settings.iter().zip(&found).map(|(setting, time)| Trial {
            ty: format!("{:?}", shape.ty),
            rows: shape.rows,
            cols: shape.cols,
            batch: setting.n,
            form: form_name(setting.form),
            kernel: self.ks.variants(setting.form)[setting.plan.variant].name,
            width: self.width(setting.form, setting.plan).min(setting.n),
            block_bytes: setting.plan.block_bytes,
            inline: setting.inline,
            seconds: time.seconds,
            ratio: time.ratio,
            chosen: false,
        }));
        Ok(Some(found))
    }
}

/// The best, if it is better than the first by enough.
fn winner(times: &[Time]) -> usize {
    let best = (0..times.len()).min_by(|&a, &b| times[a].ratio.total_cmp(&times[b].ratio)).unwrap_or(0);
    if times[best].ratio < GAIN {
        best
    } else {
        0
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
