//! The same logits, bit for bit, on every instruction set, with any threads, split, chunks and neighbours in the batch.

use super::model::{assert_bits, floats, shared, Model, Part, Random, Run, GREEDY, RUN};
use crate::numerics_tests::stride;
use lutra_kernels::available;
use lutra_kernels::batch::SampleParameters;

const FIXTURES: [&str; 7] = [
    "llama-tiny-f32",
    "llama-tiny-f16",
    "llama-tiny-bf16",
    "llama-q-Q4_0",
    "llama-q-Q8_0",
    "llama-q-TQ1_0",
    "llama-q-TQ2_0",
];

/// The fixtures, and the real model where it is.
fn models() -> Vec<(String, Model)> {
    let mut models: Vec<_> =
        FIXTURES.iter().map(|name| (name.to_string(), Model::fixture(&format!("{name}.gguf")))).collect();
    for kind in ["f32", "f16", "Q4_0", "Q8_0"] {
        let name = format!("stories260K-{kind}");
        models.extend(shared(&format!("models/{name}.gguf")).map(|path| (name, Model::open(path))));
    }
    // Not all of them where they would take long: for emulators.
    models.into_iter().step_by(stride()).collect()
}

#[test]
fn logits_do_not_depend_on_how_they_are_computed() {
    for (name, model) in models() {
        let tokens = Random(7).tokens(70, model.size("vocab"));
        let layers = model.size("layers");
        for kv in ["f32", "f16", "q8"] {
            if kv == "q8" && !matches!(&name[..], "llama-tiny-f32" | "stories260K-Q4_0") {
                continue; // what the cache holds does not depend on the weights' type
            }
            let plain = Run { isa: Some("portable"), kv, ..RUN };
            let expected = model.shards(1, plain).logits(1, &tokens, tokens.len());
            assert!(expected.iter().all(|l| l.is_finite()), "{name}");
            for ks in available() {
                let isa = ks.isa.name();
                // Threads, shards, chunks. Portable code is slow, and its loops are the same: it does not repeat all.
                let cases: &[(usize, usize, &[usize])] = match (isa, kv) {
                    ("portable", "f32") => &[(2, layers, &[7])],
                    ("portable", _) => &[(3, 2, &[64])],
                    _ => &[
                        (1, 1, &[1, 7, 64, 70]),
                        (2, 1, &[7, 70]),
                        (3, 1, &[64]),
                        (1, 2, &[64]),
                        (2, layers, &[7, 70]),
                    ],
                };
                for &(threads, count, chunks) in cases {
                    let shards = model.shards(count, Run { isa: Some(isa), threads, ..plain });
                    for (seq, &chunk) in chunks.iter().enumerate() {
                        let what =
                            format!("{name}, KV {kv}, {isa}, {threads} threads, {count} shards, chunks of {chunk}");
                        assert_bits(&shards.logits(seq as u32, &tokens, chunk), &expected, &what);
                    }
                }
            }
        }
    }
}

#[test]
fn neighbours_in_the_batch_do_not_show() {
    for (name, model) in models() {
        let vocab = model.size("vocab");
        let mut random = Random(11);
        let sequences: Vec<Vec<u32>> = (0..5).map(|i| random.tokens(20 + 11 * i, vocab)).collect();
        for shards in [1, 2] {
            let alone: Vec<_> =
                sequences.iter().map(|tokens| model.shards(shards, RUN).logits(3, tokens, tokens.len())).collect();
            let together = model.shards(shards, Run { threads: 2, ..RUN });
            let mut found = vec![Vec::new(); sequences.len()];
            // Chunks of changing sizes: prefill beside decode, sequences that start late and end early.
            while found.iter().zip(&sequences).any(|(f, s)| f.len() < s.len() * vocab) {
                let mut parts = Vec::new();
                for (i, tokens) in sequences.iter().enumerate() {
                    let pos = found[i].len() / vocab;
                    let count = [0, 1, 1, 9][random.below(4)].min(tokens.len() - pos);
                    if count > 0 {
                        parts.push(Part::new(i as u32, pos, &tokens[pos..pos + count]).logits());
                    }
                }
                if parts.is_empty() {
                    continue;
                }
                let logits = floats(&together.forward(&parts).unwrap());
                let mut logits = &logits[..];
                for part in &parts {
                    let (own, rest) = logits.split_at(part.tokens.len() * vocab);
                    found[part.seq as usize].extend_from_slice(own);
                    logits = rest;
                }
            }
            for (i, (found, alone)) in found.iter().zip(&alone).enumerate() {
                assert_bits(found, alone, &format!("{name}, sequence {i}, {shards} shards"));
            }
        }
    }
}

/// Rows of which nothing is asked are skipped in the last layer; the others must not notice, nor later tokens.
#[test]
fn what_is_asked_does_not_show() {
    for (name, model) in models() {
        let vocab = model.size("vocab");
        let tokens = Random(13).tokens(40, vocab);
        let expected = model.shards(1, RUN).logits(1, &tokens, 40);
        let quiet = model.shards(1, RUN);
        assert!(quiet.forward(&[Part::new(1, 0, &tokens[..30])]).unwrap().is_empty(), "{name}");
        let parameters = SampleParameters { top: Some(20), ..GREEDY };
        let parts = [
            Part::new(2, 0, &tokens[..7]),
            Part::new(1, 30, &tokens[30..39]).sample(&parameters),
            Part::new(3, 0, &tokens[..5]).sample(&GREEDY).logits(),
        ];
        let out = quiet.forward(&parts).unwrap();
        let (sampled, logits) = out.split_at(12 + 160 + 12);
        assert_bits(&floats(logits), &expected[..5 * vocab], &name);
        let word = |i: usize| u32::from_le_bytes(sampled[4 * i..4 * i + 4].try_into().unwrap());
        let row = &expected[38 * vocab..39 * vocab];
        let best = (0..vocab).rev().max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap();
        assert_eq!([word(0), word(2), word(3)], [best as u32, 20, best as u32], "{name}");
        assert_eq!(word(1), word(4), "{name}: log-probability of the chosen token");
        let sum: f64 = row.iter().map(|&l| f64::from(l - row[best]).exp()).sum();
        assert!((f64::from(f32::from_bits(word(1))) + sum.ln()).abs() < 1e-5, "{name}");
        let last = floats(&quiet.forward(&[Part::new(1, 39, &tokens[39..]).logits()]).unwrap());
        assert_bits(&last, &expected[39 * vocab..], &name);
    }
}

#[test]
fn going_back_and_again_gives_the_same() {
    for kv in ["f16", "f32", "q8"] {
        let model = Model::fixture("llama-tiny-f32.gguf");
        let (vocab, run) = (model.size("vocab"), Run { kv, ..RUN });
        let mut random = Random(17);
        let tokens = random.tokens(90, vocab);
        let expected = model.shards(1, run).logits(1, &tokens, 90);
        let shards = model.shards(2, run);
        let others = random.tokens(70, vocab);
        shards.forward(&[Part::new(1, 0, &tokens[..50]), Part::new(2, 0, &others[..20])]).unwrap();
        // Twice the same, then another continuation, then the right one from within a block.
        for _ in 0..2 {
            let again = shards.forward(&[Part::new(1, 40, &tokens[40..50]).logits()]).unwrap();
            assert_bits(&floats(&again), &expected[40 * vocab..50 * vocab], "again");
        }
        shards.forward(&[Part::new(1, 33, &others)]).unwrap();
        let right =
            shards.forward(&[Part::new(2, 20, &others[20..]), Part::new(1, 33, &tokens[33..]).logits()]).unwrap();
        assert_bits(&floats(&right), &expected[33 * vocab..], "after another continuation");
        shards.shards.iter().for_each(|s| s.truncate(1, 64));
        let right = shards.forward(&[Part::new(1, 64, &tokens[64..]).logits()]).unwrap();
        assert_bits(&floats(&right), &expected[64 * vocab..], "after truncation");
    }
}

#[test]
fn sampling_is_the_same_everywhere() {
    let model = Model::fixture("llama-q-TQ2_0.gguf");
    let prompt = Random(19).tokens(12, model.size("vocab"));
    let parameters = SampleParameters {
        temperature: 0.9,
        top_p: 0.95,
        min_p: 0.01,
        repeat_penalty: 1.1,
        presence_penalty: 0.2,
        frequency_penalty: 0.1,
        prompt_len: 12,
        seed: 0x1234_5678_9abc_def0,
        ..GREEDY
    };
    let generate = |shards: usize, run| {
        let shards = model.shards(shards, run);
        let mut tokens = prompt.clone();
        let mut pos = 0;
        while tokens.len() < 60 {
            let next = shards.next(1, pos, &tokens[pos..], &parameters);
            pos = tokens.len();
            tokens.push(next);
        }
        // A rebuilt sequence draws the same token.
        assert_eq!(shards.next(2, 0, &tokens[..59], &parameters), tokens[59]);
        tokens
    };
    let expected = generate(1, Run { isa: Some("portable"), ..RUN });
    for ks in available() {
        for (shards, threads) in [(1, 1), (2, 2), (5, 3)] {
            let run = Run { isa: Some(ks.isa.name()), threads, ..RUN };
            assert_eq!(generate(shards, run), expected, "{}, {shards} shards", ks.isa);
        }
    }
}
