//! The KV cache: blocks of 32 positions shared by all sequences of a shard.
//!
//! A block holds K and V of all the shard's layers for 32 positions: per layer and KV head 32 rows of K, then 32 of V. The
//! memory is one anonymous map that costs only what is touched.

use crate::descriptor::KvType;
use crate::error::{Error, Result};
use memmap2::MmapMut;
use std::collections::{HashMap, HashSet};

/// Positions of a block.
pub const BLOCK_TOKENS: usize = 32;

/// What a shard remembers of a sequence.
#[derive(Default, Debug, Clone)]
pub struct Sequence {
    /// Its token ids: as many as positions are cached.
    pub tokens: Vec<u32>,
    /// Its blocks, in order of position.
    pub blocks: Vec<u32>,
}

/// What [`KvCache::extend`] changed: (sequence, position, what was cut off).
pub struct Undo {
    parts: Vec<(u32, usize, Option<Saved>)>,
}

/// A sequence as it was, with the bytes of its blocks from the one of the cut on.
struct Saved {
    sequence: Sequence,
    bytes: Vec<u8>,
}

/// Blocks and who holds them.
pub struct KvCache {
    memory: MmapMut,
    kind: KvType,
    kv_heads: usize,
    head_dim: usize,
    block_bytes: usize,
    free: Vec<u32>,
    total: usize,
    sequences: HashMap<u32, Sequence>,
}

impl KvCache {
    /// Room for `tokens` positions, rounded up to blocks.
    pub fn new(kind: KvType, tokens: usize, layers: usize, kv_heads: usize, head_dim: usize) -> Result<Self> {
        let total = tokens.div_ceil(BLOCK_TOKENS);
        let element = match kind {
            KvType::F16 => 2,
            KvType::F32 => 4,
        };
        let too_large = || Error::new(Error::EXHAUSTED, format!("a KV cache of {tokens} tokens is too large"));
        let block_bytes = [2, layers, kv_heads, head_dim, element]
            .into_iter()
            .try_fold(BLOCK_TOKENS, usize::checked_mul)
            .ok_or_else(too_large)?;
        let bytes = block_bytes.checked_mul(total).filter(|&b| b <= isize::MAX as usize).ok_or_else(too_large)?;
        if total > u32::MAX as usize {
            return Err(too_large());
        }
        let memory = MmapMut::map_anon(bytes)
            .map_err(|e| Error::new(Error::EXHAUSTED, format!("KV cache of {bytes} bytes: {e}")))?;
        // The first blocks are handed out first.
        let free = (0..total as u32).rev().collect();
        Ok(Self { memory, kind, kv_heads, head_dim, block_bytes, free, total, sequences: HashMap::new() })
    }

    pub fn kind(&self) -> KvType {
        self.kind
    }
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }
    pub fn blocks_total(&self) -> usize {
        self.total
    }
    pub fn blocks_free(&self) -> usize {
        self.free.len()
    }
    pub fn sequences(&self) -> usize {
        self.sequences.len()
    }
    pub fn get(&self, seq: u32) -> Option<&Sequence> {
        self.sequences.get(&seq)
    }

    /// Forgets positions from `len` on; 0 forgets the sequence.
    pub fn truncate(&mut self, seq: u32, len: usize) {
        let Some(sequence) = self.sequences.get_mut(&seq) else { return };
        if len < sequence.tokens.len() {
            sequence.tokens.truncate(len);
        }
        let keep = sequence.tokens.len().div_ceil(BLOCK_TOKENS);
        while sequence.blocks.len() > keep {
            self.free.extend(sequence.blocks.pop());
        }
        if sequence.tokens.is_empty() {
            self.sequences.remove(&seq);
        }
    }

    /// Blocks that `extend` would need beyond what truncation to `pos` gives back; may be negative.
    fn need(&self, seq: u32, pos: usize, count: usize) -> isize {
        let held = self.sequences.get(&seq).map_or(0, |s| s.blocks.len());
        (pos + count).div_ceil(BLOCK_TOKENS) as isize - held as isize
    }

    /// Makes room for `(seq, pos, tokens)` of each sequence, all or nothing: sequences are cut to `pos`, get their blocks, and
    /// their token ids are noted. [`KvCache::roll_back`] undoes it.
    pub fn extend(&mut self, parts: &[(u32, usize, &[u32])]) -> Result<Undo> {
        let mut need = 0;
        for &(seq, pos, tokens) in parts {
            let len = self.sequences.get(&seq).map_or(0, |s| s.tokens.len());
            if pos > len {
                return Err(Error::new(
                    Error::SEQUENCE_GAP,
                    format!("sequence {seq} has {len} tokens; position {pos} would leave a gap"),
                ));
            }
            need += self.need(seq, pos, tokens.len());
        }
        if need > self.free.len() as isize {
            return Err(Error::exhausted(format!(
                "the KV cache of {} blocks lacks {} blocks",
                self.total,
                need - self.free.len() as isize
            )));
        }
        let undo = parts.iter().map(|&(seq, pos, _)| Ok((seq, pos, self.save(seq, pos)?))).collect::<Result<_>>()?;
        // Cut all first, so that what is given back is there for the others.
        for &(seq, pos, _) in parts {
            self.truncate(seq, pos);
        }
        for &(seq, pos, tokens) in parts {
            let sequence = self.sequences.entry(seq).or_default();
            sequence.tokens.extend_from_slice(tokens);
            while sequence.blocks.len() < (pos + tokens.len()).div_ceil(BLOCK_TOKENS) {
                sequence.blocks.push(self.free.pop().expect("counted above"));
            }
        }
        Ok(Undo { parts: undo })
    }

    /// Takes back an [`KvCache::extend`]: every sequence is again what it was.
    pub fn roll_back(&mut self, undo: Undo) {
        for &(seq, pos, _) in &undo.parts {
            self.truncate(seq, pos);
        }
        for (seq, pos, saved) in undo.parts {
            let Some(saved) = saved else { continue };
            let kept = pos.div_ceil(BLOCK_TOKENS);
            let again: HashSet<u32> = saved.sequence.blocks[kept..].iter().copied().collect();
            self.free.retain(|block| !again.contains(block));
            let blocks = &saved.sequence.blocks[pos / BLOCK_TOKENS..];
            for (&block, bytes) in blocks.iter().zip(saved.bytes.chunks_exact(self.block_bytes)) {
                let at = block as usize * self.block_bytes;
                self.memory[at..at + self.block_bytes].copy_from_slice(bytes);
            }
            self.sequences.insert(seq, saved.sequence);
        }
    }

    /// A copy of what cutting a sequence to `pos` lets others overwrite, if that is anything.
    fn save(&self, seq: u32, pos: usize) -> Result<Option<Saved>> {
        let Some(sequence) = self.sequences.get(&seq).filter(|s| pos < s.tokens.len()) else { return Ok(None) };
        let blocks = &sequence.blocks[pos / BLOCK_TOKENS..];
        let mut bytes = Vec::new();
        let size = blocks.len() * self.block_bytes;
        bytes.try_reserve_exact(size).map_err(|e| Error::exhausted(format!("{size} bytes for a copy: {e}")))?;
        for &block in blocks {
            bytes.extend_from_slice(&self.memory[block as usize * self.block_bytes..][..self.block_bytes]);
        }
        Ok(Some(Saved { sequence: sequence.clone(), bytes }))
    }

    /// Byte offset of K (V follows) of a layer and KV head in a block, and the bytes of one row.
    fn place(&self, block: u32, layer: usize, head: usize) -> (usize, usize) {
        let row = self.head_dim * if self.kind == KvType::F16 { 2 } else { 4 };
        (block as usize * self.block_bytes + (layer * self.kv_heads + head) * 2 * BLOCK_TOKENS * row, row)
    }

    /// The address of K and V rows of a block: 32 rows each, contiguous.
    pub fn rows(&self, block: u32, layer: usize, head: usize) -> (*const u8, *const u8) {
        let (at, row) = self.place(block, layer, head);
        assert!(at + 2 * BLOCK_TOKENS * row <= self.memory.len());
        // SAFETY: the assertion keeps both addresses inside the map.
        unsafe { (self.memory.as_ptr().add(at), self.memory.as_ptr().add(at + BLOCK_TOKENS * row)) }
    }

    /// The same, to be written.
    pub fn rows_mut(&mut self, block: u32, layer: usize, head: usize) -> (*mut u8, *mut u8) {
        let (at, row) = self.place(block, layer, head);
        assert!(at + 2 * BLOCK_TOKENS * row <= self.memory.len());
        // SAFETY: the assertion keeps both addresses inside the map.
        unsafe { (self.memory.as_mut_ptr().add(at), self.memory.as_mut_ptr().add(at + BLOCK_TOKENS * row)) }
    }
}
