//! Dequantised values that another implementation (the `gguf` Python package) reads from the same blocks.

use super::assert_same;
use lutra_kernels::{dequantize, pack_as, PackedForm, Pool, SourceType};
use std::path::{Path, PathBuf};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures")
}

#[test]
fn blocks_mean_what_gguf_says() {
    let read = |name: &str| std::fs::read(fixtures().join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
    let bytes = read("dequant-golden.bin");
    let index: serde_json::Value = serde_json::from_slice(&read("dequant-golden.json")).unwrap();
    let pool = Pool::new(2);
    let mut tested = vec![];
    for entry in index.as_array().unwrap() {
        let slice = |field: &str| {
            let number = |i: usize| entry[field][i].as_u64().unwrap() as usize;
            &bytes[number(0)..number(0) + number(1)]
        };
        let ty = SourceType::from_ggml(entry["ggml"].as_u64().unwrap() as u32).unwrap();
        let expected: Vec<f32> =
            slice("values").chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        let mut values = vec![0f32; expected.len()];
        dequantize(ty, slice("source"), &mut values).unwrap();
        assert_same(&values, &expected, &format!("{ty:?} dequantised"));
        for form in PackedForm::candidates(ty) {
            let packed = pack_as(form, ty, slice("source"), 1, expected.len(), &pool).unwrap();
            packed.unpack_row(0, &mut values);
            assert_same(&values, &expected, &format!("{ty:?} packed as {form:?} and unpacked"));
        }
        tested.push(ty);
    }
    for ty in SourceType::ALL {
        assert!(tested.contains(&ty), "no golden for {ty:?}");
    }
}
