//! Logits and greedy tokens against independent engines. (NumPy's archives are read by the tests in TypeScript.)

use crate::model::{fixture, floats, shared, Model, GREEDY, RUN};
use serde_json::Value;

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
        assert_eq!(logits.len(), expected.len());
        let difference = logits.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        let mean = expected.iter().map(|&b| f64::from(b)).sum::<f64>() / expected.len() as f64;
        let squares = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
        let relative = (squares(&mut logits.iter().zip(&expected).map(|(a, b)| f64::from(a - b)))
            / squares(&mut expected.iter().map(|&b| f64::from(b) - mean)))
        .sqrt();
        println!("{}: largest difference {difference:.2e}, relative {relative:.2e}", text("file"));
        match golden["tolerance"].as_f64().unwrap() {
            // Activations are rounded to 8 bits: tests/golden_test.ts derives this bound.
            0.0 => assert!(relative <= 2.0 * 0.0064 * (4.0 * model.size("layers") as f64 + 1.0).sqrt()),
            tolerance => assert!(f64::from(difference) <= tolerance),
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
