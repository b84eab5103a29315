//! Where the time of forward passes goes, step by step. Off unless asked for: a pass then only tests a flag per step.

use std::time::{Duration, Instant};

/// A kind of work in a forward pass, in the order of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Rows of the embedding, or hidden states from the shard before.
    Input,
    /// The norms of layers and head.
    Norm,
    /// Activations to int8, and lookup tables.
    Quantize,
    QueryKeyValue,
    /// Rotary embedding of queries and keys; keys and values into the cache.
    Store,
    Attention,
    Output,
    /// Results of a layer's halves added to the hidden states.
    Residual,
    /// Gate and up, and the activation function.
    GateUp,
    Down,
    /// The product with the output matrix.
    Head,
    /// Choosing tokens, writing logits or hidden states out.
    Answer,
}

impl Step {
    pub const ALL: [Step; 12] = [
        Step::Input,
        Step::Norm,
        Step::Quantize,
        Step::QueryKeyValue,
        Step::Store,
        Step::Attention,
        Step::Output,
        Step::Residual,
        Step::GateUp,
        Step::Down,
        Step::Head,
        Step::Answer,
    ];

    /// Whether the step is a product with weights.
    pub fn is_product(self) -> bool {
        matches!(self, Step::QueryKeyValue | Step::Output | Step::GateUp | Step::Down | Step::Head)
    }
}

/// Time spent on each step.
#[derive(Default)]
pub(crate) struct Profile {
    on: bool,
    last: Option<Instant>,
    spent: [Duration; Step::ALL.len()],
}

impl Profile {
    /// Turns measuring on, and returns what was measured since it was.
    pub fn take(&mut self) -> [(Step, Duration); Step::ALL.len()] {
        self.on = true;
        let spent = std::mem::take(&mut self.spent);
        Step::ALL.map(|step| (step, spent[step as usize]))
    }

    /// A pass begins.
    pub fn begin(&mut self) {
        self.last = self.on.then(Instant::now);
    }

    /// What was done since the last call was `step`.
    #[inline]
    pub fn end(&mut self, step: Step) {
        if let Some(last) = &mut self.last {
            let now = Instant::now();
            self.spent[step as usize] += now - std::mem::replace(last, now);
        }
    }
}
