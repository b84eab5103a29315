//! Descriptors: every field is checked, the error names it, and nothing is allocated for nonsense.

use super::model::{open, Model, Random, RUN};
use serde_json::{json, Value};

/// The error's text; a shard that opens is a failure.
#[track_caller]
fn refused(descriptor: &Value) -> String {
    match open(descriptor) {
        Ok(_) => panic!("opened: {descriptor}"),
        Err(e) => {
            assert!(e.code < 0);
            e.message
        }
    }
}

#[test]
fn each_wrong_field_is_named() {
    let model = Model::fixture("llama-tiny-f32.gguf");
    let good = model.descriptor(0, 5, RUN);
    open(&good).unwrap();
    let cases = [
        ("/path", json!("/nowhere/x.gguf"), "/nowhere/x.gguf"),
        ("/path", json!(env!("CARGO_MANIFEST_DIR")), "no regular file"),
        ("/path", json!(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")), "ends behind the file"),
        ("/threads", json!(0), "threads"),
        ("/threads", json!(1u64 << 40), "threads"),
        ("/isa", json!("mmx"), "portable"),
        ("/pin", json!("all"), "unknown variant"),
        ("/kv/type", json!("q4"), "q4"),
        ("/kv/tokens", json!(0), "kv.tokens"),
        ("/kv/tokens", json!(1u64 << 40), "kv.tokens"),
        ("/maxBatch", json!(0), "maxBatch"),
        ("/hyper/layers", json!(6), "head"),
        ("/hyper/layers", json!(u64::MAX), "layers"),
        ("/hyper/embedding", json!(63), "token_embd.weight"),
        ("/hyper/embedding", json!(1u64 << 60), "embedding"),
        ("/hyper/heads", json!(3), "heads"),
        ("/hyper/heads", json!(8), "attn_q"),
        ("/hyper/kvHeads", json!(0), "kvHeads"),
        ("/hyper/kvHeads", json!(4), "attn_k"),
        ("/hyper/headDim", json!(17), "attn_q"),
        ("/hyper/headDim", json!(65536), "attn_q"),
        ("/hyper/feedForward", json!(161), "ffn_gate"),
        ("/hyper/vocab", json!(321), "token_embd.weight"),
        ("/hyper/context", json!(0), "context"),
        ("/hyper/norm/eps", json!(-1e-5), "norm.eps"),
        ("/hyper/norm/eps", json!("1e-5"), "invalid type"),
        ("/hyper/ropes/0/base", json!(0), "rope.base"),
        ("/hyper/ropes/0/dims", json!(18), "rope.dims"),
        ("/hyper/ropes/0/dims", json!(15), "rope.dims"),
        ("/hyper/ropes/0/style", json!("yarn"), "yarn"),
        ("/first", json!(1), "layers 1..5"),
        ("/end", json!(u64::MAX), "layers"),
        ("/embedding", Value::Null, "embedding"),
        ("/head", Value::Null, "head"),
        ("/layers/2/ffnNorm/weight/shape", json!([65]), "blk.2.ffn_norm.weight"),
        ("/layers/2/ffnNorm/weight/shape", json!([64, 1]), "blk.2.ffn_norm.weight"),
        ("/layers/4/mlp/down/weight/type", json!(14), "blk.4.ffn_down.weight"),
        ("/layers/4/mlp/down/weight/type", json!(1), "blk.4.ffn_down.weight"),
        ("/layers/4/mlp/down/weight/type", json!(u32::MAX), "blk.4.ffn_down.weight"),
        ("/layers/0/q/weight/offset", json!(u64::MAX), "blk.0.attn_q.weight"),
        ("/layers/0/q/weight/offset", json!(1 << 20), "blk.0.attn_q.weight"),
        ("/layers/0/q/weight/offset", json!(-1), "invalid value"),
        ("/layers/0/v/weight/bytes", json!(0), "blk.0.attn_v.weight"),
        ("/layers/0/v/weight/bytes", json!(u64::MAX), "blk.0.attn_v.weight"),
        ("/layers", json!([]), "0 descriptions"),
        ("/kv/more", json!(1), "unknown field"),
        ("/layers/1/bias", json!(null), "unknown field"),
    ];
    for (at, value, names) in cases {
        let mut bad = good.clone();
        match bad.pointer_mut(at) {
            Some(place) => *place = value.clone(),
            None => {
                let (parent, key) = at.rsplit_once('/').unwrap();
                bad.pointer_mut(parent).unwrap()[key] = value.clone();
            }
        }
        let message = refused(&bad);
        assert!(message.contains(names), "{at} = {value}: {message}");
    }
    // Huge in proportion: one row per token of the batch would not fit any memory.
    let mut bad = good.clone();
    bad["maxBatch"] = json!(65536);
    bad["hyper"]["feedForward"] = json!(1 << 24);
    assert!(refused(&bad).contains("maxBatch"));
    let mut bad = good.clone();
    bad["kv"]["tokens"] = json!(1 << 30);
    bad["hyper"]["context"] = json!(1 << 28);
    if let Err(e) = open(&bad) {
        assert!(e.message.contains("KV cache"), "{e}");
    }
}

/// Fields and bytes of the JSON changed at random: an error or a shard, never a panic.
#[test]
fn mutated_descriptors_are_refused() {
    let model = Model::fixture("llama-tiny-f32.gguf");
    let good = model.descriptor(1, 2, RUN);
    let text = good.to_string().into_bytes();
    let mut random = Random(29);
    let mut refused = 0;
    for _ in 0..5000 {
        let mut bytes = text.clone();
        for _ in 0..=random.below(3) {
            if bytes.is_empty() {
                break;
            }
            let at = random.below(bytes.len());
            match random.below(4) {
                0 => bytes[at] = b"0123456789-.eE\"{}[],:nt"[random.below(23)],
                1 => bytes.insert(at, b"0123456789"[random.below(10)]),
                2 => drop(bytes.remove(at)),
                _ => bytes.truncate(at.max(1)),
            }
        }
        // A thousand threads are allowed, but not wanted here.
        match lutra_kernels::descriptor::Descriptor::parse(&bytes) {
            Ok(d) if d.threads <= 4 => drop(lutra_kernels::shard::Shard::open(&d).map_err(|_| refused += 1)),
            Ok(_) => {}
            Err(_) => refused += 1,
        }
    }
    assert!(refused > 4000, "{refused}");
}
