//! A micro-batch as it comes over the C ABI: read once, every length checked, typed afterwards.
//!
//! Little-endian: `u32 entries`; per entry `u32 seq, pos, tokens, flags`; `u32` token ids; per sampled entry its parameters
//! (see [`SampleParameters`]).

use crate::error::{Error, Result};

/// Most alternatives that log-probabilities may be asked for.
pub const MAX_TOP: u32 = 20;
const FLAG_SAMPLE: u32 = 1;
const FLAG_LOGITS: u32 = 2;
const NO_LOGPROBS: u32 = u32::MAX;

/// How to choose a token. Field by field as on the wire.
#[derive(Debug, Clone, PartialEq)]
pub struct SampleParameters {
    pub temperature: f32,
    pub top_k: u32,
    pub top_p: f32,
    pub min_p: f32,
    pub repeat_penalty: f32,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    /// -1: all tokens.
    pub penalty_last_n: i32,
    pub prompt_len: u32,
    pub seed: u64,
    /// `None`: no log-probabilities wanted.
    pub top: Option<u32>,
    pub bias: Vec<(u32, f32)>,
}

/// Tokens of one sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    pub seq: u32,
    pub pos: u32,
    /// Range of the entry's tokens in [`Batch::tokens`].
    pub first: usize,
    pub count: usize,
    pub logits: bool,
    pub sample: Option<SampleParameters>,
}

/// A micro-batch.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    pub entries: Vec<Entry>,
    pub tokens: Vec<u32>,
}

pub(crate) struct Reader<'a> {
    /// What is read, for errors.
    name: &'static str,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    pub fn new(name: &'static str, bytes: &'a [u8]) -> Self {
        Reader { name, bytes, at: 0 }
    }
    pub fn bytes(&mut self, n: usize, what: &str) -> Result<&'a [u8]> {
        let Some(end) = self.at.checked_add(n).filter(|&end| end <= self.bytes.len()) else {
            return Err(Error::argument(format!("{} of {} bytes ends within {what}", self.name, self.bytes.len())));
        };
        let bytes = &self.bytes[self.at..end];
        self.at = end;
        Ok(bytes)
    }
    pub fn u32(&mut self, what: &str) -> Result<u32> {
        let bytes = self.bytes(4, what)?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }
    fn f32(&mut self, what: &str) -> Result<f32> {
        let value = f32::from_bits(self.u32(what)?);
        if value.is_finite() {
            Ok(value)
        } else {
            Err(Error::argument(format!("{what} is {value}")))
        }
    }
    pub fn left(&self) -> usize {
        self.bytes.len() - self.at
    }
}

impl Batch {
    /// Reads a micro-batch.
    ///
    /// `vocab` bounds token ids and biases, `context` positions, `max_tokens` the sum of tokens.
    pub fn parse(bytes: &[u8], vocab: u32, context: u32, max_tokens: usize) -> Result<Batch> {
        let mut r = Reader::new("batch", bytes);
        let count = r.u32("entry count")? as usize;
        if count > r.left() / 16 {
            return Err(Error::argument(format!("batch of {} bytes cannot hold {count} entries", bytes.len())));
        }
        let mut entries: Vec<Entry> = Vec::with_capacity(count);
        let mut flags_of = Vec::with_capacity(count);
        let mut seen = std::collections::HashSet::with_capacity(count);
        let mut total = 0usize;
        for i in 0..count {
            let (seq, pos) = (r.u32("entry")?, r.u32("entry")?);
            let (tokens, flags) = (r.u32("entry")?, r.u32("entry")?);
            if tokens == 0 {
                return Err(Error::argument(format!("entry {i} has no tokens")));
            }
            if flags & !(FLAG_SAMPLE | FLAG_LOGITS) != 0 {
                return Err(Error::argument(format!("entry {i} has unknown flags {flags:#x}")));
            }
            if !seen.insert(seq) {
                return Err(Error::argument(format!("sequence {seq} occurs twice in a batch")));
            }
            if pos.checked_add(tokens).is_none_or(|end| end > context) {
                return Err(Error::argument(format!(
                    "entry {i}: {tokens} tokens from position {pos} exceed the context of {context}"
                )));
            }
            let first = total;
            total += tokens as usize;
            if total > max_tokens {
                return Err(Error::argument(format!("batch has more than maxBatch = {max_tokens} tokens")));
            }
            entries.push(Entry {
                seq,
                pos,
                first,
                count: tokens as usize,
                logits: flags & FLAG_LOGITS != 0,
                sample: None,
            });
            flags_of.push(flags);
        }
        let mut tokens = Vec::with_capacity(total);
        for i in 0..total {
            let id = r.u32("token ids")?;
            if id >= vocab {
                return Err(Error::argument(format!("token {i} is {id}; the vocabulary has {vocab}")));
            }
            tokens.push(id);
        }
        for (entry, flags) in entries.iter_mut().zip(flags_of) {
            if flags & FLAG_SAMPLE != 0 {
                entry.sample = Some(SampleParameters::parse(&mut r, vocab)?);
            }
        }
        if r.left() != 0 {
            return Err(Error::argument(format!("batch has {} bytes too many", r.left())));
        }
        Ok(Batch { entries, tokens })
    }
}

impl SampleParameters {
    fn parse(r: &mut Reader<'_>, vocab: u32) -> Result<Self> {
        let temperature = r.f32("temperature")?;
        let top_k = r.u32("top_k")?;
        let top_p = r.f32("top_p")?;
        let min_p = r.f32("min_p")?;
        let repeat_penalty = r.f32("repeat_penalty")?;
        let presence_penalty = r.f32("presence_penalty")?;
        let frequency_penalty = r.f32("frequency_penalty")?;
        let penalty_last_n = r.u32("penalty_last_n")? as i32;
        let prompt_len = r.u32("prompt_len")?;
        let seed = u64::from(r.u32("seed")?) | (u64::from(r.u32("seed")?) << 32);
        let n_top = r.u32("n_top")?;
        let n_bias = r.u32("n_bias")? as usize;
        if temperature < 0.0 || repeat_penalty <= 0.0 {
            return Err(Error::argument(format!(
                "temperature {temperature} or repeat penalty {repeat_penalty} is out of range"
            )));
        }
        if n_top != NO_LOGPROBS && n_top > MAX_TOP {
            return Err(Error::argument(format!("{n_top} log-probabilities asked for; {MAX_TOP} may be")));
        }
        if n_bias > r.left() / 8 {
            return Err(Error::argument(format!("batch cannot hold {n_bias} biases")));
        }
        let mut bias = Vec::with_capacity(n_bias);
        for _ in 0..n_bias {
            let id = r.u32("bias")?;
            if id >= vocab {
                return Err(Error::argument(format!("bias of token {id}; the vocabulary has {vocab}")));
            }
            bias.push((id, r.f32("bias")?));
        }
        Ok(Self {
            temperature,
            top_k,
            top_p,
            min_p,
            repeat_penalty,
            presence_penalty,
            frequency_penalty,
            penalty_last_n,
            prompt_len,
            seed,
            top: (n_top != NO_LOGPROBS).then_some(n_top),
            bias,
        })
    }
}
