//! What a NATS server sends to a client: lines that end with CR LF, of which MSG is followed by a payload.

use crate::error::{Error, Result};
use std::ops::Range;

/// Longest line that is waited for; a server's own limit is 4 KiB, and its INFO is longer only with hundreds of servers.
const MOST_LINE: usize = 1 << 16;
/// Bytes that are read at once: a hidden state has 4 to 32 KiB.
const READ_BYTES: usize = 1 << 16;

/// An operation of the server's. The ranges lie in what [`Incoming::bytes`] gives.
#[derive(Debug, PartialEq, Eq)]
pub enum Op {
    Info(Range<usize>),
    /// By which subscription, and its payload.
    Message(u32, Range<usize>),
    Ping,
    Pong,
    Ok,
    Err(String),
}

/// Bytes that came from the server and were not used yet.
pub struct Incoming {
    /// All of it may be written to; what came lies in `start..end`.
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    /// Longest payload.
    pub limit: usize,
}

impl Incoming {
    pub fn new(limit: usize) -> Self {
        Incoming { buffer: vec![0; READ_BYTES], start: 0, end: 0, limit }
    }

    /// What is here.
    pub fn bytes(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// Where the next bytes go: room for a good many.
    pub fn room(&mut self) -> &mut [u8] {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
        if self.buffer.len() - self.end < READ_BYTES {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
            // Doubled, so that a message of many reads is not copied at each.
            let wanted = if self.buffer.len() - self.end < READ_BYTES { 2 * self.buffer.len() } else { 0 };
            self.buffer.resize(wanted.max(self.buffer.len()), 0);
        }
        &mut self.buffer[self.end..]
    }

    /// Takes note that `n` bytes came into [`Incoming::room`].
    pub fn came(&mut self, n: usize) {
        self.end += n;
    }

    /// Forgets the first `n` bytes.
    pub fn consume(&mut self, n: usize) {
        self.start += n;
    }

    /// What comes next, and its length, once all of it is here.
    pub fn peek(&self) -> Result<Option<(Op, usize)>> {
        let bytes = self.bytes();
        let Some(line_end) = bytes.iter().take(MOST_LINE).position(|&b| b == b'\n') else {
            return if bytes.len() < MOST_LINE { Ok(None) } else { Err(malformed("a line without end")) };
        };
        let line = bytes[..line_end].strip_suffix(b"\r").ok_or_else(|| malformed("a line without CR"))?;
        let after = line_end + 1;
        let word_end = line.iter().position(|b| b" \t".contains(b)).unwrap_or(line.len());
        let rest = line[word_end..].trim_ascii();
        let op = match line[..word_end].to_ascii_uppercase().as_slice() {
            b"MSG" => {
                let mut words = rest.split(|b| b" \t".contains(b)).filter(|word| !word.is_empty());
                // Subject, subscription, perhaps where an answer is awaited, bytes.
                let count = words.clone().count();
                let (subscription, size) = (words.nth(1).and_then(number), words.next_back().and_then(number));
                let (Some(subscription), Some(size), 3..=4) = (subscription, size, count) else {
                    return Err(malformed("a message without its length"));
                };
                if size > self.limit {
                    return Err(malformed(&format!("a message of {size} bytes, and {} may be", self.limit)));
                }
                let end = after + size;
                if bytes.len() < end + 2 {
                    return Ok(None);
                }
                if &bytes[end..end + 2] != b"\r\n" {
                    return Err(malformed("a message that is longer than it says"));
                }
                return Ok(Some((Op::Message(subscription as u32, after..end), end + 2)));
            }
            b"INFO" => {
                let begin = line.len() - line[word_end..].trim_ascii_start().len();
                Op::Info(begin..begin + rest.len())
            }
            b"PING" => Op::Ping,
            b"PONG" => Op::Pong,
            b"+OK" => Op::Ok,
            b"-ERR" => Op::Err(String::from_utf8_lossy(rest).trim_matches('\'').to_string()),
            _ => return Err(malformed("an operation that no NATS server has")),
        };
        Ok(Some((op, after)))
    }
}

fn malformed(what: &str) -> Error {
    Error::new(Error::LOST, format!("the server sent {what}"))
}

/// A length in decimal digits.
fn number(digits: &[u8]) -> Option<usize> {
    if !(1..=9).contains(&digits.len()) || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    core::str::from_utf8(digits).ok()?.parse().ok()
}

/// Checks what a message is to be published to: anything but visible characters would begin another protocol line.
pub fn check_subject(subject: &[u8]) -> Result<&str> {
    if !(1..=512).contains(&subject.len()) || subject.iter().any(|b| !b.is_ascii_graphic()) {
        return Err(Error::argument("a subject is empty, too long, or has other characters than visible ones"));
    }
    core::str::from_utf8(subject).map_err(|_| Error::argument("a subject is no UTF-8"))
}

/// Begins a message to `subject`, a checked one; its `bytes` and CR LF are to follow.
pub fn begin_publish(into: &mut Vec<u8>, subject: &str, bytes: usize) {
    into.extend_from_slice(format!("PUB {subject} {bytes}\r\n").as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What comes of `bytes` in pieces of `size`.
    fn all(bytes: &[u8], size: usize, limit: usize) -> Result<Vec<(Op, Vec<u8>)>> {
        let mut incoming = Incoming::new(limit);
        let mut ops = Vec::new();
        for piece in bytes.chunks(size) {
            incoming.room()[..piece.len()].copy_from_slice(piece);
            incoming.came(piece.len());
            while let Some((op, length)) = incoming.peek()? {
                let part = match &op {
                    Op::Info(range) | Op::Message(_, range) => incoming.bytes()[range.clone()].to_vec(),
                    _ => Vec::new(),
                };
                ops.push((op, part));
                incoming.consume(length);
            }
        }
        Ok(ops)
    }

    #[test]
    fn operations_come_whole_however_they_are_cut() {
        let mut bytes =
            b"INFO {\"a\": 1} \r\nPING\r\nMSG a.b 12 5\r\nhe\r\no\r\n+OK\r\nmsg\ta.b  1 _INBOX.x 0\r\n\r\n".to_vec();
        bytes.extend_from_slice(b"-ERR 'Slow Consumer'\r\nPONG\r\nMSG s 1 200000\r\n");
        let large: Vec<u8> = (0..200_000).map(|i| i as u8).collect();
        bytes.extend_from_slice(&large);
        bytes.extend_from_slice(b"\r\nPING\r\n");
        for size in [1, 2, 3, 7, 64, 4096, READ_BYTES] {
            let ops = all(&bytes, size, 1 << 20).unwrap();
            let parts: Vec<&[u8]> = ops.iter().map(|(_, part)| &part[..]).collect();
            assert_eq!(parts[0], b"{\"a\": 1}");
            assert_eq!(ops[1].0, Op::Ping);
            assert!(matches!(ops[2].0, Op::Message(12, _)) && parts[2] == b"he\r\no");
            assert_eq!(ops[3].0, Op::Ok);
            assert!(matches!(ops[4].0, Op::Message(1, _)) && parts[4].is_empty());
            assert_eq!(ops[5].0, Op::Err("Slow Consumer".into()));
            assert_eq!(ops[6].0, Op::Pong);
            assert!(matches!(ops[7].0, Op::Message(1, _)) && parts[7] == large);
            assert_eq!(ops[8].0, Op::Ping);
            assert_eq!(ops.len(), 9);
        }
    }

    #[test]
    fn what_is_no_nats_is_refused() {
        for (bytes, says) in [
            (&b"HTTP/1.1 400 Bad Request\r\n"[..], "no NATS server has"),
            (b"PING\n", "without CR"),
            (b"MSG a 1\r\n", "without its length"),
            (b"MSG a 1 r x 4\r\nabcd\r\n", "without its length"),
            (b"MSG a 1 -4\r\n", "without its length"),
            (b"MSG a x 4\r\nabcd\r\n", "without its length"),
            (b"MSG 1 4\r\nabcd\r\n", "without its length"),
            (b"MSG a 1 99999999999999999999\r\n", "without its length"),
            (b"MSG a 1 101\r\n", "101 bytes, and 100 may be"),
            (b"MSG a 1 2\r\nabcd\r\n", "longer than it says"),
            (&[b'x'; MOST_LINE], "without end"),
        ] {
            let error = all(bytes, READ_BYTES, 100).unwrap_err();
            assert_eq!(error.code, Error::LOST);
            assert!(error.message.contains(says), "{}: {}", String::from_utf8_lossy(bytes), error.message);
        }
    }
}
