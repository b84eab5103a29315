//! The KV cache: capacity, sequences, and that errors change nothing.

use super::model::{assert_bits, encode, floats, Model, Part, Random, Run, RUN};
use lutra_kernels::descriptor::KvType;
use lutra_kernels::kv::KvCache;
use lutra_kernels::Error;
use std::sync::atomic::AtomicI32;

#[test]
fn blocks_are_counted_and_come_back() {
    let mut kv = KvCache::new(KvType::F16, 100, 2, 2, 16).unwrap();
    assert_eq!((kv.blocks_total(), kv.blocks_free()), (4, 4));
    let tokens = [5; 200];
    kv.extend(&[(1, 0, &tokens[..33]), (2, 0, &tokens[..32])]).unwrap();
    assert_eq!((kv.blocks_free(), kv.sequences()), (1, 2));
    let full = |kv: &mut KvCache, parts: &[(u32, usize, &[u32])]| kv.extend(parts).err().map(|e| e.code);
    assert_eq!(full(&mut kv, &[(1, 33, &tokens[..31]), (2, 32, &tokens[..33])]), Some(Error::EXHAUSTED));
    assert_eq!(full(&mut kv, &[(3, 1, &tokens[..1])]), Some(Error::SEQUENCE_GAP));
    assert_eq!((kv.blocks_free(), kv.get(1).unwrap().tokens.len()), (1, 33));
    // What one sequence gives back, another may take in the same batch.
    kv.extend(&[(3, 0, &tokens[..64]), (1, 2, &tokens[..1])]).unwrap();
    assert_eq!((kv.blocks_free(), kv.get(1).unwrap().tokens.len()), (0, 3));
    kv.truncate(3, 0);
    kv.truncate(7, 0);
    kv.truncate(1, 4);
    assert_eq!((kv.blocks_free(), kv.sequences()), (2, 2));
}

#[test]
fn roll_back_restores_lengths_and_blocks() {
    let mut random = Random(3);
    let mut kv = KvCache::new(KvType::F32, 40 * 32, 1, 1, 4).unwrap();
    let tokens = random.tokens(400, 1000);
    for _ in 0..2000 {
        let mut parts: Vec<(u32, usize, &[u32])> = Vec::new();
        for seq in 0..6 {
            let len = kv.get(seq).map_or(0, |s| s.tokens.len());
            if random.below(2) == 0 {
                let pos = if random.below(2) == 0 { len } else { random.below(len + 1) };
                parts.push((seq, pos, &tokens[..1 + random.below(200)]));
            }
        }
        let before: Vec<_> = (0..6).map(|seq| kv.get(seq).cloned()).collect();
        let free = kv.blocks_free();
        match kv.extend(&parts) {
            Ok(undo) => {
                let mut held: Vec<u32> = (0..6).filter_map(|seq| kv.get(seq)).flat_map(|s| s.blocks.clone()).collect();
                assert_eq!(held.len() + kv.blocks_free(), kv.blocks_total());
                held.sort_unstable();
                held.dedup();
                assert_eq!(held.len() + kv.blocks_free(), kv.blocks_total(), "a block has two owners");
                if random.below(3) > 0 {
                    continue;
                }
                kv.roll_back(undo);
            }
            Err(e) => assert_eq!(e.code, Error::EXHAUSTED),
        }
        assert_eq!(kv.blocks_free(), free);
        for (seq, before) in (0..6).zip(before) {
            let after = kv.get(seq);
            assert_eq!(after.map(|s| (&s.tokens, &s.blocks)), before.as_ref().map(|s| (&s.tokens, &s.blocks)));
        }
    }
}

/// Stopped, full, refused: the sequences continue as if nothing had been asked.
#[test]
fn errors_change_no_sequence() {
    let model = Model::fixture("llama-tiny-f32.gguf");
    let vocab = model.size("vocab");
    let mut random = Random(23);
    let (tokens, others) = (random.tokens(64, vocab), random.tokens(100, vocab));
    for kv in ["f16", "f32", "q8"] {
        let run = Run { kv, kv_tokens: 128, ..RUN };
        let expected = model.shards(1, run).logits(1, &tokens, 64);
        let shards = model.shards(1, run);
        let shard = &shards.shards[0];
        shards.forward(&[Part::new(1, 0, &tokens[..60])]).unwrap();
        let free = shard.stats().kv_blocks_free;
        let stopped = AtomicI32::new(1);
        let mut room = vec![0; 1 << 20];
        let attempts = [
            vec![Part::new(1, 60, &others[..3]), Part::new(2, 0, &others[..20])],
            vec![Part::new(1, 10, &others[..70])],
            vec![Part::new(1, 0, &others[..5]), Part::new(2, 0, &others[..96])],
            vec![Part::new(1, 35, &others[..1])],
        ];
        for parts in &attempts {
            let code = shard.forward(&encode(parts), &[], Some(&stopped), &mut room).unwrap_err().code;
            assert_eq!(code, Error::STOPPED);
            assert_eq!(shard.stats().kv_blocks_free, free);
        }
        let refused = [
            (vec![Part::new(1, 61, &others[..1])], Error::SEQUENCE_GAP),
            (vec![Part::new(1, 3, &others[..1]), Part::new(2, 1, &others[..1])], Error::SEQUENCE_GAP),
            (vec![Part::new(1, 30, &others[..66]), Part::new(2, 0, &others[..64])], Error::EXHAUSTED),
            (vec![Part::new(1, 0, &others[..1]), Part::new(1, 1, &others[..1])], Error::INVALID_ARGUMENT),
            (vec![Part::new(1, 0, &[vocab as u32])], Error::INVALID_ARGUMENT),
            (vec![Part::new(1, 200, &others[..57])], Error::INVALID_ARGUMENT),
        ];
        for (parts, code) in &refused {
            assert_eq!(shard.forward(&encode(parts), &[], None, &mut room).unwrap_err().code, *code);
        }
        let short = shard.forward(&encode(&[Part::new(1, 60, &tokens[60..]).logits()]), &[], None, &mut room[..100]);
        let short = short.unwrap_err();
        assert_eq!(short.code, Error::INVALID_ARGUMENT);
        assert!(short.message.contains(&(4 * 4 * vocab).to_string()), "{}", short.message);
        assert_eq!((shard.stats().kv_blocks_free, shard.stats().sequences), (free, 1));
        let logits = floats(&shards.forward(&[Part::new(1, 60, &tokens[60..]).logits()]).unwrap());
        assert_bits(&logits, &expected[60 * vocab..], &format!("KV {kv}"));
    }
}

#[test]
fn nan_states_are_an_error_and_change_nothing() {
    let model = Model::fixture("llama-tiny-f32.gguf");
    let (layers, d) = (model.size("layers"), model.size("embedding"));
    let tail = super::model::open(&model.descriptor(layers - 2, layers, RUN)).unwrap();
    let batch = encode(&[Part::new(1, 0, &[1, 2, 3]).sample(&super::model::GREEDY)]);
    let mut out = [0; 64];
    for value in [f32::NAN, f32::INFINITY] {
        let states: Vec<u8> = vec![value; 3 * d].iter().flat_map(|x| x.to_le_bytes()).collect();
        let error = tail.forward(&batch, &states, None, &mut out).unwrap_err();
        assert_eq!(error.code, Error::INVALID_DATA);
        assert_eq!(tail.stats().sequences, 0);
    }
    let states: Vec<u8> = vec![0.5f32; 3 * d].iter().flat_map(|x| x.to_le_bytes()).collect();
    assert_eq!(tail.forward(&batch, &states, None, &mut out).unwrap(), 12);
}

/// An error found after K and V were written: what they overwrote comes back, also in blocks that went to another sequence.
#[test]
fn late_errors_restore_what_was_overwritten() {
    let model = Model::fixture("llama-tiny-f32.gguf");
    let (layers, d, vocab) = (model.size("layers"), model.size("embedding"), model.size("vocab"));
    let bytes = |values: Vec<f32>| -> Vec<u8> { values.iter().flat_map(|x| x.to_le_bytes()).collect() };
    let mut random = Random(43);
    let good = bytes((0..70 * d).map(|_| (random.word() >> 40) as f32 / (1 << 24) as f32 - 0.5).collect());
    let split = 69 * d * 4;
    let tokens = vec![1; 70];
    for kv in ["f16", "f32", "q8"] {
        let run = Run { kv, kv_tokens: 128, ..RUN };
        let open = || super::model::open(&model.descriptor(layers - 2, layers, run)).unwrap();
        let mut out = vec![0; vocab * 4];
        let mut last = |shard: &lutra_kernels::shard::Shard| {
            let batch = encode(&[Part::new(1, 69, &tokens[69..]).logits()]);
            shard.forward(&batch, &good[split..], None, &mut out).unwrap();
            floats(&out)
        };
        let first = encode(&[Part::new(1, 0, &tokens[..69])]);
        let (clean, shard) = (open(), open());
        clean.forward(&first, &good[..split], None, &mut []).unwrap();
        shard.forward(&first, &good[..split], None, &mut []).unwrap();
        let expected = last(&clean);
        for (pos, count, other) in [(69, 1, 3), (68, 1, 30), (40, 30, 1), (5, 3, 64), (0, 1, 64)] {
            // Logits alone would be handed over as they are: sampling needs them finite.
            let sampled = Part::new(2, 0, &tokens[..other]).sample(&super::model::GREEDY);
            let bad = bytes(vec![f32::NAN; (count + other) * d]);
            let batch = encode(&[Part::new(1, pos, &tokens[..count]), sampled]);
            let code = shard.forward(&batch, &bad, None, &mut [0; 12]).unwrap_err().code;
            assert_eq!(code, Error::INVALID_DATA);
            assert_bits(&last(&shard), &expected, &format!("KV {kv}, position {pos}"));
            shard.truncate(1, 69);
        }
    }
}
