//! Logits and greedy tokens against independent engines. (NumPy's archives are read by the tests in TypeScript.)

use super::model::{assert_bits, fixture, floats, open, shared, Model, Part, Random, Run, Shards, GREEDY, RUN};
use lutra_kernels::available;
use lutra_kernels::ffi::ABI_VERSION;
use serde_json::Value;
use xxhash_rust::xxh3::Xxh3Default;

/// The largest difference, and the root mean square of differences over that of the expected values' deviation from their mean.
fn errors(actual: &[f32], expected: &[f32]) -> (f64, f64) {
    assert!(actual.len() == expected.len() && actual.iter().all(|v| v.is_finite()));
    let differences = || actual.iter().zip(expected).map(|(a, b)| f64::from((a - b).abs()));
    let mean = expected.iter().map(|&b| f64::from(b)).sum::<f64>() / expected.len() as f64;
    let spread = expected.iter().map(|&b| (f64::from(b) - mean).powi(2)).sum::<f64>();
    (differences().fold(0.0, f64::max), (differences().map(|d| d * d).sum::<f64>() / spread).sqrt())
}

#[test]
fn fixtures_logits_equal_transformers() {
    let goldens: Value = serde_json::from_slice(&std::fs::read(fixture("goldens.json")).unwrap()).unwrap();
    for golden in goldens.as_array().unwrap() {
        let text = |key: &str| golden[key].as_str().unwrap();
        let model = Model::fixture(text("file"));
        let tokens: Vec<u32> =
            golden["tokens"].as_array().unwrap().iter().map(|t| t.as_u64().unwrap() as u32).collect();
        let expected = floats(&std::fs::read(fixture(text("logits"))).unwrap());
        let logits = model.shards(1, RUN).logits(1, &tokens, tokens.len());
        let (difference, relative) = errors(&logits, &expected);
        println!("{}: largest difference {difference:.2e}, relative {relative:.2e}", text("file"));
        match golden["tolerance"].as_f64().unwrap() {
            // Activations are rounded to 8 bits: tests/golden_test.ts derives this bound.
            0.0 => assert!(relative <= 2.0 * 0.0064 * (4.0 * model.size("layers") as f64 + 1.0).sqrt()),
            tolerance => assert!(difference <= tolerance),
        }
    }
}

#[test]
fn greedy_ids_equal_llama_cpp() {
    let Some(path) = shared("golden/stories260K-f32.llamacpp.json") else { return };
    let golden: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let ids = |key: &str| -> Vec<u32> {
        golden[key].as_array().unwrap().iter().map(|t| t.as_u64().unwrap() as u32).collect()
    };
    let (prompt, expected) = (ids("prompt_ids"), ids("greedy_ids"));
    let model = Model::open(shared("models/stories260K-f32.gguf").unwrap());
    for count in [1, 2, 5] {
        let shards = model.shards(count, RUN);
        let mut tokens = prompt.clone();
        let mut pos = 0;
        while tokens.len() < expected.len() {
            let next = shards.next(1, pos, &tokens[pos..], &GREEDY);
            pos = tokens.len();
            tokens.push(next);
        }
        assert_eq!(tokens, expected, "{count} shards");
    }
}

/// Every architecture and every kind of quantised folder (`tests/shards.ts` writes what the kernels are told of them).
#[test]
fn all_models_logits_equal_transformers_with_every_set_of_kernels() {
    let goldens: Value = serde_json::from_slice(&std::fs::read(fixture("shards.json")).unwrap()).unwrap();
    for golden in goldens.as_array().unwrap() {
        let name = golden["name"].as_str().unwrap();
        let tokens: Vec<u32> =
            golden["tokens"].as_array().unwrap().iter().map(|t| t.as_u64().unwrap() as u32).collect();
        let expected = floats(&std::fs::read(fixture(golden["logits"].as_str().unwrap())).unwrap());
        let mut first: Option<Vec<f32>> = None;
        for ks in available() {
            let mut descriptor = golden["shard"].clone();
            descriptor["path"] = fixture(descriptor["path"].as_str().unwrap()).to_str().unwrap().into();
            descriptor["threads"] = 1.into();
            descriptor["isa"] = ks.isa.to_string().into();
            let size = |key: &str| golden["shard"]["hyper"][key].as_u64().unwrap() as usize;
            let shards = Shards {
                shards: vec![open(&descriptor).unwrap_or_else(|e| panic!("{name}: {}", e.message))],
                embedding: size("embedding"),
                vocab: size("vocab"),
            };
            // The last ones by themselves, through the cache.
            let mut logits = shards.logits(1, &tokens[..tokens.len() - 4], tokens.len());
            for pos in tokens.len() - 4..tokens.len() {
                let part = Part::new(1, pos, &tokens[pos..pos + 1]).logits();
                logits.extend(floats(&shards.forward(&[part]).unwrap()));
            }
            let (difference, relative) = errors(&logits, &expected);
            match golden["tolerance"].as_f64() {
                Some(tolerance) => assert!(difference <= tolerance, "{name} {}: {difference}", ks.isa),
                None => assert!(relative <= golden["relative"].as_f64().unwrap(), "{name} {}: {relative}", ks.isa),
            }
            assert_bits(&logits, first.get_or_insert_with(|| logits.clone()), &format!("{name} {}", ks.isa));
        }
    }
}

/// Stages of one pipeline must compute alike, and workers are told apart by the ABI version alone.
#[test]
fn an_abi_version_has_the_bits_of_its_results() {
    /// When bits change for good reasons, raise the version, here and in `bus/version.ts`, and note what they are now.
    const RECORDED: (i32, u64) = (4, 0x4352b0f045ac7344);
    let mut digest = Xxh3Default::new();
    for name in ["llama-tiny-f16", "llama-q-Q4_0", "llama-q-Q8_0", "llama-q-TQ1_0", "llama-q-TQ2_0"] {
        let mut model = Model::fixture(&format!("{name}.gguf"));
        // Attention has several ranges to merge.
        model.hyper["context"] = 1024.into();
        let tokens = Random(11).tokens(600, model.size("vocab"));
        for kv in ["f32", "f16", "q8"] {
            for logit in model.shards(1, Run { kv, ..RUN }).logits(1, &tokens, 150) {
                digest.update(&logit.to_le_bytes());
            }
        }
    }
    assert_eq!((ABI_VERSION, digest.digest()), RECORDED);
}
