//! A shard with measured choices: they are applied, kept, and change no bit.

use super::model::{self, encode, floats, open, Model, Part, Random, RUN};
use lutra_kernels::tune::{tune, Origin};
use lutra_kernels::{available, SourceType};
use serde_json::{json, Value};
use std::fs;
use std::path::{Path, PathBuf};

/// All logits of prompts that are computed together, of every batch size that has a plan, and of tokens after them.
fn logits(descriptor: &Value, vocab: usize) -> (Vec<u32>, lutra_kernels::tune::Report) {
    let shard = open(descriptor).unwrap();
    let mut random = Random(3);
    let mut bits = Vec::new();
    let mut past = [0; 8];
    for (seqs, len) in [(1, 18), (1, 1), (3, 1), (8, 1)] {
        let parts: Vec<Part> =
            (0..seqs).map(|seq| Part::new(seq as u32, past[seq], &random.tokens(len, vocab)).logits()).collect();
        past[..seqs].iter_mut().for_each(|past| *past += len);
        let mut out = vec![0; seqs * len * vocab * 4];
        shard.forward(&encode(&parts), &[], None, &mut out).unwrap();
        bits.extend(floats(&out).into_iter().map(f32::to_bits));
    }
    (bits, shard.tuning().clone())
}

fn stores(folder: &Path) -> Vec<PathBuf> {
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    files.filter(|path| path.extension().is_some_and(|e| e == "json")).collect()
}

#[test]
fn choices_are_applied_and_kept_and_change_no_bit() {
    let cache = std::env::temp_dir().join(format!("lutra-tuning-test-{}", std::process::id()));
    let _ = fs::remove_dir_all(&cache);
    let choice = json!({ "dir": cache, "maxBytes": 1 << 20 });
    let folder = cache.join("tuning");
    let (name, ty) = ("llama-q-Q4_0.gguf", SourceType::Q4_0);
    let best = available()[available().len() - 1].isa;
    // Portable is slow here and has nothing to choose between.
    for ks in available().into_iter().skip(1) {
        let what = format!("{name} {}", ks.isa);
        let model = Model::fixture(name);
        let with = |tune: &str| {
            let run = model::Run { threads: 2, isa: Some(ks.isa.name()), ..RUN };
            let mut descriptor = model.descriptor(0, model.size("layers"), run);
            descriptor["tune"] = json!(tune);
            descriptor["cache"] = choice.clone();
            logits(&descriptor, model.size("vocab"))
        };
        let _ = fs::remove_dir_all(&folder);
        let (expected, ruled) = with("off");
        assert!(ruled.choices.iter().all(|choice| choice.origin == Origin::Rule), "{what}");
        assert!(!folder.exists(), "{what}: a tuner that is off leaves traces");

        // Too small to be measured unasked.
        let (bits, report) = with("auto");
        assert!(bits == expected && report.choices.iter().all(|choice| choice.origin == Origin::Rule), "{what}");
        assert!(report.warnings.is_empty() && report.trials.is_empty(), "{what} {:?}", report.warnings);

        if ks.isa == best {
            let (bits, measured) = with("force");
            assert!(bits == expected, "{what}: measured choices change bits");
            assert!(measured.choices.iter().all(|choice| choice.origin == Origin::Measured), "{what}");
            assert!(measured.warnings.is_empty() && measured.seconds > 0.0, "{what} {:?}", measured.warnings);

            let (bits, stored) = with("auto");
            assert!(bits == expected, "{what}");
            assert_eq!(stored.choices.len(), measured.choices.len(), "{what}");
            for (stored, measured) in stored.choices.iter().zip(&measured.choices) {
                assert_eq!(stored.origin, Origin::Stored, "{what}");
                assert_eq!(format!("{:?}", stored.plans), format!("{:?}", measured.plans), "{what}");
                assert_eq!(stored.form, measured.form, "{what}");
            }
        }

        // Every choice that could be stored: what is in the file is what the shard does.
        let bytes = fs::metadata(model::fixture(name)).unwrap().len();
        let request = json!({
            "threads": 2, "isa": ks.isa.name(), "tune": "force", "bytes": bytes, "cache": choice,
            "matrices": [{ "type": 0, "rows": 16, "cols": 16 }],
        });
        tune(request.to_string().as_bytes()).unwrap();
        let [path] = &stores(&folder)[..] else { panic!("{what}: one store") };
        let mut store: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        let ring_bytes = store["entries"][0]["ringBytes"].clone();
        let forms = lutra_kernels::PackedForm::candidates(ty);
        for form in forms.into_iter().filter(|&form| ks.has_kernel(form)) {
            let name = format!("{:?}", form.codes).to_lowercase().replace(['(', ')'], "");
            for variant in ks.variants(form) {
                for (width, block_bytes, inline_rows) in [(1, 1, 0), (3, 1 << 30, 4), (8, 5000, 1 << 40)] {
                    let plan = json!({ "kernel": variant.name, "width": width, "blockBytes": block_bytes });
                    let own = ruled.choices.iter().filter(|choice| choice.ty == format!("{ty:?}"));
                    let entries = own.map(|choice| {
                        json!({
                            "type": choice.ty, "rows": choice.rows, "cols": choice.cols, "ringBytes": ring_bytes,
                            "form": name, "inlineRows": inline_rows, "plans": [plan, plan, plan, plan],
                        })
                    });
                    store["entries"] = entries.collect();
                    assert_ne!(store["entries"], json!([]));
                    fs::write(path, store.to_string()).unwrap();
                    let (bits, report) = with("auto");
                    assert!(bits == expected, "{what} {name} {} {width} {block_bytes}", variant.name);
                    for choice in report.choices.iter().filter(|choice| choice.ty == format!("{ty:?}")) {
                        assert_eq!((choice.origin, &choice.form), (Origin::Stored, &name), "{what}");
                        assert_eq!(choice.inline_rows, Some(inline_rows), "{what}");
                        let plan = &choice.plans[2];
                        assert_eq!((plan.kernel, plan.block_bytes), (variant.name, block_bytes), "{what}");
                        assert_eq!(plan.width, width, "{what}");
                    }
                }
            }
        }

        fs::write(path, "{").unwrap();
        let (bits, report) = with("auto");
        assert!(bits == expected && report.warnings.len() == 1, "{what} {:?}", report.warnings);
    }

    // What a request may not be.
    let request = |matrices: Value| {
        let request =
            json!({ "threads": 1, "isa": null, "tune": "force", "cache": null, "bytes": 9, "matrices": matrices });
        tune(request.to_string().as_bytes())
    };
    for bad in [
        json!([{ "type": 2, "rows": 64, "cols": 33 }]),
        json!([{ "type": 2, "rows": u64::MAX, "cols": 64 }]),
        json!([{ "type": 77, "rows": 64, "cols": 64 }]),
        json!([{ "type": 2, "rows": -1, "cols": 64 }]),
        json!(7),
    ] {
        assert!(request(bad.clone()).is_err_and(|e| e.code < 0), "{bad}");
    }
    fs::remove_dir_all(cache).unwrap();
}
