//! The KV cache: blocks of 32 positions shared by all sequences of a shard.
//!
//! A block has a slot of each layer and KV head: keys by dimension, 32 positions next to each other, then values by position, 32
//! dimensions of all positions after the other, so that attention, which takes so many at a time, reads both in order.
//! With 8-bit codes the scales of the positions' keys, then of their values, follow. Slots of a layer and head lie together
//! in order of blocks, so that what attention reads is one stream. The memory is one anonymous map that costs only what is
//! touched: of each layer and head at least a huge page, where the system has them (attention at a context of 2048 takes an
//! eighth less time).

use crate::descriptor::KvType;
use crate::dispatch::Kernels;
use crate::error::{Error, Result};
use crate::ops;
use memmap2::MmapMut;
use std::cell::RefCell;
use std::collections::{HashMap, HashSet};

/// Positions of a block.
pub const BLOCK_TOKENS: usize = 32;
/// Dimensions of a value that lie together.
pub(crate) const VALUE_DIMS: usize = 32;

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

/// One layer's and head's keys and values of a block.
#[derive(Clone, Copy)]
pub(crate) struct Slot {
    /// `head_dim` × 32.
    pub keys: *const u8,
    /// For every `VALUE_DIMS` dimensions, fewer at the end, 32 × as many.
    pub values: *const u8,
    /// 32 each; only of `KvType::Q8`.
    pub key_scales: *const f32,
    pub value_scales: *const f32,
}

/// Blocks and who holds them.
pub struct KvCache {
    memory: MmapMut,
    kind: KvType,
    layers: usize,
    kv_heads: usize,
    head_dim: usize,
    slot_bytes: usize,
    free: Vec<u32>,
    total: usize,
    sequences: HashMap<u32, Sequence>,
}

impl KvCache {
    /// Room for `tokens` positions, rounded up to blocks.
    pub fn new(kind: KvType, tokens: usize, layers: usize, kv_heads: usize, head_dim: usize) -> Result<Self> {
        let total = tokens.div_ceil(BLOCK_TOKENS);
        let too_large = || Error::new(Error::EXHAUSTED, format!("a KV cache of {tokens} tokens is too large"));
        let slot_bytes = head_dim
            .checked_mul(kind.element_bytes())
            .and_then(|row| row.checked_add(kind.scale_bytes())?.checked_mul(2 * BLOCK_TOKENS))
            .ok_or_else(too_large)?;
        let block_bytes = layers.checked_mul(kv_heads).and_then(|n| n.checked_mul(slot_bytes)).ok_or_else(too_large)?;
        let bytes = block_bytes.checked_mul(total).filter(|&b| b <= isize::MAX as usize).ok_or_else(too_large)?;
        if total > u32::MAX as usize {
            return Err(too_large());
        }
        let memory = MmapMut::map_anon(bytes)
            .map_err(|e| Error::new(Error::EXHAUSTED, format!("KV cache of {bytes} bytes: {e}")))?;
        // May be refused; nothing depends on it.
        #[cfg(target_os = "linux")]
        let _ = memory.advise(memmap2::Advice::HugePage);
        // The first blocks are handed out first.
        let free = (0..total as u32).rev().collect();
        Ok(Self { memory, kind, layers, kv_heads, head_dim, slot_bytes, free, total, sequences: HashMap::new() })
    }

    pub fn kind(&self) -> KvType {
        self.kind
    }
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }
    pub fn kv_heads(&self) -> usize {
        self.kv_heads
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
            let slots: Vec<usize> = blocks.iter().flat_map(|&block| self.places(block)).collect();
            for (at, bytes) in slots.into_iter().zip(saved.bytes.chunks_exact(self.slot_bytes)) {
                self.memory[at..at + self.slot_bytes].copy_from_slice(bytes);
            }
            self.sequences.insert(seq, saved.sequence);
        }
    }

    /// A copy of what cutting a sequence to `pos` lets others overwrite, if that is anything.
    fn save(&self, seq: u32, pos: usize) -> Result<Option<Saved>> {
        let Some(sequence) = self.sequences.get(&seq).filter(|s| pos < s.tokens.len()) else { return Ok(None) };
        let blocks = &sequence.blocks[pos / BLOCK_TOKENS..];
        let mut bytes = Vec::new();
        let size = blocks.len() * self.layers * self.kv_heads * self.slot_bytes;
        bytes.try_reserve_exact(size).map_err(|e| Error::exhausted(format!("{size} bytes for a copy: {e}")))?;
        for at in blocks.iter().flat_map(|&block| self.places(block)) {
            bytes.extend_from_slice(&self.memory[at..at + self.slot_bytes]);
        }
        Ok(Some(Saved { sequence: sequence.clone(), bytes }))
    }

    /// Byte offset of a slot.
    fn place(&self, block: u32, layer: usize, head: usize) -> usize {
        assert!((block as usize) < self.total && layer < self.layers && head < self.kv_heads);
        ((layer * self.kv_heads + head) * self.total + block as usize) * self.slot_bytes
    }

    /// Byte offsets of all slots of a block.
    fn places(&self, block: u32) -> impl Iterator<Item = usize> {
        let (total, bytes, slots) = (self.total, self.slot_bytes, self.layers * self.kv_heads);
        (0..slots).map(move |slot| (slot * total + block as usize) * bytes)
    }

    /// Bytes of a slot's keys, as many as of its values.
    fn half_bytes(&self) -> usize {
        BLOCK_TOKENS * self.head_dim * self.kind.element_bytes()
    }

    /// Where the slots lie of the first of some blocks and of those after it that follow each other in memory: address and bytes.
    pub(crate) fn stretch(&self, blocks: &[u32], layer: usize, head: usize) -> (usize, usize) {
        let Some(&first) = blocks.first() else { return (0, 0) };
        let count = blocks.iter().zip(first..).take_while(|&(&block, next)| block == next).count();
        (self.slot(first, layer, head).keys as usize, count * self.slot_bytes)
    }

    pub(crate) fn slot(&self, block: u32, layer: usize, head: usize) -> Slot {
        let half = self.half_bytes();
        let slot = &self.memory[self.place(block, layer, head)..][..self.slot_bytes];
        let scales = slot[2 * half..].as_ptr().cast::<f32>();
        // `wrapping_add`: there are no scales but of `KvType::Q8`.
        Slot {
            keys: slot.as_ptr(),
            values: slot[half..].as_ptr(),
            key_scales: scales,
            value_scales: scales.wrapping_add(BLOCK_TOKENS),
        }
    }

    /// For writing from several threads.
    pub fn writer(&mut self) -> Writer<'_> {
        Writer { memory: self.memory.as_mut_ptr(), cache: self }
    }
}

/// Writes rows to the cache; who has one is the only one to use the cache.
pub struct Writer<'a> {
    /// The cache's.
    memory: *mut u8,
    cache: &'a KvCache,
}

// SAFETY: `store` says which places may be written at once, and nothing else is written.
unsafe impl Sync for Writer<'_> {}

impl Writer<'_> {
    /// Stores a key and a value of `head_dim` floats at a position's place in its block.
    ///
    /// 8-bit codes are within half of their scale, max|x| / 254, of the floats; half floats within 2^−11 of each.
    ///
    /// # Safety
    ///
    /// No two threads store to the same place of the same block, layer and head at once.
    #[allow(clippy::too_many_arguments)]
    pub unsafe fn store(
        &self,
        ks: &Kernels,
        block: u32,
        layer: usize,
        head: usize,
        position: usize,
        k: &[f32],
        v: &[f32],
    ) {
        thread_local!(static ROW: RefCell<(Vec<u16>, Vec<i8>)> = RefCell::default());
        let dim = self.cache.head_dim;
        assert!(position < BLOCK_TOKENS && k.len() == dim && v.len() == dim);
        let half = self.cache.half_bytes();
        // SAFETY: `place` is of a slot within the memory, which has two halves, and scales with 8-bit codes.
        let keys = unsafe { self.memory.add(self.cache.place(block, layer, head)) };
        // SAFETY: as above.
        let (values, scales) = unsafe { (keys.add(half), keys.add(2 * half)) };
        ROW.with_borrow_mut(|(halves, codes)| {
            for (is_key, x) in [(true, k), (false, v)] {
                let to = if is_key { keys } else { values };
                let place = |i: usize| {
                    if is_key {
                        return i * BLOCK_TOKENS + position;
                    }
                    let chunk = i / VALUE_DIMS * VALUE_DIMS;
                    chunk * BLOCK_TOKENS + position * VALUE_DIMS.min(dim - chunk) + i - chunk
                };
                // SAFETY: with i < dim and position < BLOCK_TOKENS places are less than dim · BLOCK_TOKENS, the elements of a half:
                // the largest is, of the last chunk of w dimensions, (dim − w) · 32 + 31 · w + w − 1. No other thread is there.
                unsafe {
                    match self.cache.kind {
                        KvType::F32 => x.iter().enumerate().for_each(|(i, x)| put(to, place(i), *x)),
                        KvType::F16 => {
                            halves.resize(dim, 0);
                            ops::to_f16(ks, x, halves);
                            halves.iter().enumerate().for_each(|(i, x)| put(to, place(i), *x));
                        }
                        KvType::Q8 => {
                            codes.resize(dim, 0);
                            let scale = ops::to_q8(ks, x, codes);
                            codes.iter().enumerate().for_each(|(i, x)| put(to, place(i), *x));
                            put(scales, position + if is_key { 0 } else { BLOCK_TOKENS }, scale);
                        }
                    }
                }
            }
        });
    }
}

/// Writes an element at a place counted in elements.
///
/// # Safety
///
/// The place is within what `to` points to, and nobody else uses it.
#[inline(always)]
unsafe fn put<T>(to: *mut u8, place: usize, element: T) {
    // SAFETY: the caller's.
    unsafe { to.cast::<T>().add(place).write_unaligned(element) }
}
