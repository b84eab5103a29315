//! A micro-batch that is known before it comes, but for its tokens, its hidden states, and its place in a chain.

use super::protocol::{begin_publish, check_subject};
use crate::batch::Reader;
use crate::error::{Error, Result};
use std::ops::Range;

/// Bytes of a WORK or RESULT message before its batch, and where its fields lie; see `bus/wire.ts`.
const HEADER_BYTES: usize = 24;
const STEP: Range<usize> = 8..12;
const BATCH_BYTES: Range<usize> = 12..16;
const FLAGS: Range<usize> = 20..24;
/// How many micro-batches follow, within the flags.
const CHAIN: usize = 21;

/// What is awaited, and what will be sent when it was computed.
pub struct Armed {
    /// Header and batch as they will come, apart from step, chain and tokens.
    expected: Vec<u8>,
    /// Where the batch's tokens lie in it.
    tokens: Range<usize>,
    payload_bytes: usize,
    /// All that will be sent: what follows for the first stage, if this is the last one, then the message that carries the output.
    frame: Vec<u8>,
    /// Where in the frame lie the header of what follows, the tokens sampled that go into it, each a `u32`, and its end.
    follows_at: Option<usize>,
    sampled_at: Range<usize>,
    follows_end: usize,
    /// Where the output's message and the output lie in the frame.
    head_at: usize,
    output: Range<usize>,
    /// Whether batch, tokens and chain go on with the output: the next stage needs them too.
    passes: bool,
}

/// What came, of which JavaScript does not know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub step: u32,
    pub chain: u8,
}

impl Armed {
    /// Reads a list of them, little-endian:
    ///
    /// ```text
    /// u32 count
    /// per micro-batch:
    ///   u32 payload bytes, output bytes, where its tokens begin, tokens, 1 if its tokens are passed on
    ///   expected: u32 bytes, and these: header and batch of the WORK message, whose step and chain may be others
    ///   subject:  u32 bytes, and these: where the output goes
    ///   head:     u32 bytes, and these: all of the output's message before the output; step and chain are put in
    ///   subject:  u32 bytes, and these: where chains go on
    ///   follows:  u32 bytes, and these: the WORK message with which they do, or none, step and chain as above; u32 where its
    ///             tokens begin, u32 tokens
    /// ```
    pub fn parse_all(bytes: &[u8], most_output: usize) -> Result<Vec<Self>> {
        let mut r = Reader::new("list of armed micro-batches", bytes);
        let count = r.u32("count")?;
        let mut all = Vec::new();
        for _ in 0..count {
            all.push(Self::parse(&mut r, most_output)?);
        }
        if r.left() != 0 {
            return Err(Error::argument(format!("{} bytes too many are armed", r.left())));
        }
        Ok(all)
    }

    fn parse(r: &mut Reader<'_>, most_output: usize) -> Result<Self> {
        let payload_bytes = r.u32("payload bytes")? as usize;
        let output_bytes = r.u32("output bytes")? as usize;
        let (at, count) = (r.u32("tokens")?, r.u32("tokens")?);
        let passes = r.u32("passes")? != 0;
        let expected = part(r)?.to_vec();
        let tokens = words(&expected, at, count)?;
        let batch_bytes = expected.get(BATCH_BYTES).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        if batch_bytes.map(|n| n as usize) != expected.len().checked_sub(HEADER_BYTES) {
            return Err(Error::argument("a batch is armed whose header gives another length"));
        }
        if output_bytes > most_output {
            return Err(Error::argument(format!("{output_bytes} bytes of output exceed a message")));
        }
        let (next, head) = (check_subject(part(r)?)?, part(r)?);
        let (first, follows) = (part(r)?, part(r)?);
        let sampled = words(follows, r.u32("sampled")?, r.u32("sampled")?)?;
        let mut frame = Vec::with_capacity(head.len() + output_bytes + follows.len() + 1024);
        let (mut follows_at, mut sampled_at) = (None, 0..0);
        if !follows.is_empty() {
            if follows.len() < HEADER_BYTES {
                return Err(Error::argument("what follows has no header"));
            }
            begin_publish(&mut frame, check_subject(first)?, follows.len());
            follows_at = Some(frame.len());
            sampled_at = frame.len() + sampled.start..frame.len() + sampled.end;
            frame.extend_from_slice(follows);
            frame.extend_from_slice(b"\r\n");
        }
        let follows_end = frame.len();
        if head.len() < HEADER_BYTES {
            return Err(Error::argument("the output's message has no header"));
        }
        // The batch goes on as it came, behind a header as long as its own.
        if passes && (head.len() != expected.len() || head[HEADER_BYTES..] != expected[HEADER_BYTES..]) {
            return Err(Error::argument("another batch is passed on than was armed"));
        }
        begin_publish(&mut frame, next, head.len() + output_bytes);
        let head_at = frame.len();
        frame.extend_from_slice(head);
        let output = frame.len()..frame.len() + output_bytes;
        frame.resize(output.end, 0);
        frame.extend_from_slice(b"\r\n");
        let tokens = if count == 0 { HEADER_BYTES..HEADER_BYTES } else { tokens };
        Ok(Armed {
            expected,
            tokens,
            payload_bytes,
            frame,
            follows_at,
            sampled_at,
            follows_end,
            head_at,
            output,
            passes,
        })
    }

    /// Whether `message` is the one awaited. A sequence's position is in its batch: what was computed before never fits.
    pub fn fits(&self, message: &[u8]) -> bool {
        let (expected, tokens) = (&self.expected, &self.tokens);
        if message.len() != expected.len() + self.payload_bytes {
            return false;
        }
        let same = |range: Range<usize>| message[range.clone()] == expected[range];
        let flags = &message[FLAGS];
        same(0..STEP.start)
            && same(STEP.end..FLAGS.start)
            && (flags[0], flags[2], flags[3]) == (0, 0, 0)
            && same(HEADER_BYTES..tokens.start)
            && same(tokens.end..expected.len())
    }

    /// Where a message that fits stands in its chain.
    pub fn place(message: &[u8]) -> Place {
        let step = &message[STEP];
        Place { step: u32::from_le_bytes([step[0], step[1], step[2], step[3]]), chain: message[CHAIN] }
    }

    /// Computes `message`, which fits, and returns what is to be sent for it, the more urgent part first.
    pub fn compute(
        &mut self,
        message: &[u8],
        forward: impl FnOnce(&[u8], &[u8], &mut [u8]) -> Result<usize>,
    ) -> Result<[&[u8]; 2]> {
        let (start, payload) = message.split_at(self.expected.len());
        let Place { step, chain } = Self::place(message);
        let head = &mut self.frame[self.head_at..self.output.start];
        head[STEP].copy_from_slice(&message[STEP]);
        if self.passes {
            head[CHAIN] = chain;
            head[self.tokens.clone()].copy_from_slice(&message[self.tokens.clone()]);
        }
        let follows_at = self.follows_at.filter(|_| chain > 0);
        if let Some(at) = follows_at {
            let follows = &mut self.frame[at..at + HEADER_BYTES];
            follows[STEP].copy_from_slice(&step.wrapping_add(1).to_le_bytes());
            follows[CHAIN] = chain - 1;
        }
        let capacity = self.output.len();
        let written = forward(&start[HEADER_BYTES..], payload, &mut self.frame[self.output.clone()])?;
        if written != capacity {
            return Err(Error::data(format!("{written} bytes came of a micro-batch that should give {capacity}")));
        }
        if follows_at.is_none() {
            return Ok([&self.frame[self.follows_end..], &[]]);
        }
        // The output begins with the tokens sampled, each u32 id, f32 log-probability, u32 alternatives, and these, 8 bytes each.
        let mut at = self.output.start;
        for into in self.sampled_at.clone().step_by(4) {
            let word = |at: usize| Some(&self.frame[..self.output.end]).and_then(|output| output.get(at..at + 4));
            let (id, tops) =
                word(at).zip(word(at + 8)).ok_or_else(|| Error::data("fewer tokens were sampled than go on"))?;
            let (id, tops) = ([id[0], id[1], id[2], id[3]], u32::from_le_bytes([tops[0], tops[1], tops[2], tops[3]]));
            self.frame[into..into + 4].copy_from_slice(&id);
            at += 12 + 8 * tops as usize;
        }
        let (follows, rest) = self.frame.split_at(self.follows_end);
        Ok([follows, rest])
    }
}

fn part<'a>(r: &mut Reader<'a>) -> Result<&'a [u8]> {
    let bytes = r.u32("length of a part")? as usize;
    r.bytes(bytes, "a part")
}

/// `count` words from byte `at` on, if `bytes` has them behind a header.
fn words(bytes: &[u8], at: u32, count: u32) -> Result<Range<usize>> {
    if count == 0 {
        return Ok(0..0);
    }
    let start = at as usize;
    let end = (count as usize).checked_mul(4).and_then(|length| start.checked_add(length));
    match end {
        Some(end) if start >= HEADER_BYTES && end <= bytes.len() => Ok(start..end),
        _ => Err(Error::argument("tokens are armed that lie outside of the batch")),
    }
}
