//! What a batch asks for, and where in the output each answer goes.

use crate::batch::{Batch, Entry, SampleParameters};
use crate::sampling::Sampled;

/// Rows of an entry, its last ones, whose logits are needed.
pub(super) fn needed_rows(entry: &Entry) -> usize {
    match (entry.logits, &entry.sample) {
        (true, _) => entry.count,
        (false, Some(_)) => 1,
        (false, None) => 0,
    }
}

/// Bytes of a sampled token: id, log-probability, count of alternatives, and those.
pub(super) fn sampled_bytes(parameters: &SampleParameters, vocab: usize) -> usize {
    12 + 8 * vocab.min(parameters.top.unwrap_or(0) as usize)
}

/// Bytes that answer an entry.
pub(super) fn result_bytes(entry: &Entry, vocab: usize) -> Option<usize> {
    let logits = if entry.logits { entry.count.checked_mul(vocab)?.checked_mul(4)? } else { 0 };
    logits.checked_add(entry.sample.as_ref().map_or(0, |p| sampled_bytes(p, vocab)))
}

/// What a row is for, and where in the output that goes.
#[derive(Default, Clone, Copy)]
pub(super) struct Answer<'a> {
    pub logits: Option<usize>,
    /// Place, sequence, parameters.
    pub sample: Option<(usize, u32, &'a SampleParameters)>,
}

/// The needed rows in order. The output holds the sampled tokens of all entries, then the logits of all.
pub(super) fn answers(batch: &Batch, vocab: usize) -> Vec<Answer<'_>> {
    let mut rows: Vec<Answer<'_>> = Vec::new();
    let mut at = 0;
    for entry in &batch.entries {
        rows.resize(rows.len() + needed_rows(entry), Answer::default());
        if let Some(parameters) = &entry.sample {
            rows.last_mut().expect("a sampled entry needs its last row").sample = Some((at, entry.seq, parameters));
            at += sampled_bytes(parameters, vocab);
        }
    }
    let mut row = 0;
    for entry in &batch.entries {
        let needed = needed_rows(entry);
        if entry.logits {
            for answer in &mut rows[row..row + needed] {
                answer.logits = Some(at);
                at += 4 * vocab;
            }
        }
        row += needed;
    }
    rows
}

/// Writes a sampled token into `out`, which is `sampled_bytes` long.
pub(super) fn write(sampled: &Sampled, out: &mut [u8]) {
    let token = |t: &crate::sampling::TokenLogprob| [t.id, t.logprob.to_bits()];
    let words = token(&sampled.token).into_iter().chain([sampled.top.len() as u32]);
    for (bytes, word) in out.chunks_exact_mut(4).zip(words.chain(sampled.top.iter().flat_map(token))) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
}
