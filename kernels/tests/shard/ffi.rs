//! The C ABI as a foreign caller uses and misuses it.

use super::model::{encode, floats, Model, Part, Random, Run, GREEDY, RUN};
use lutra_kernels::batch::SampleParameters;
use lutra_kernels::ffi::*;
use lutra_kernels::Error;
use serde_json::Value;
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

/// A code and the error's text.
pub type Outcome = std::result::Result<i32, (i32, String)>;

pub fn call(f: impl FnOnce(*mut u8, usize) -> i32) -> Outcome {
    let mut err = [0xaa; 512];
    let code = f(err.as_mut_ptr(), err.len());
    if code >= 0 {
        return Ok(code);
    }
    let n = u32::from_le_bytes(err[..4].try_into().unwrap()) as usize;
    Err((code, String::from_utf8(err[4..4 + n].to_vec()).unwrap()))
}

pub fn open(descriptor: &Value) -> std::result::Result<u32, (i32, String)> {
    let json = descriptor.to_string();
    let mut handle = [0; 4];
    // SAFETY: every buffer is as long as is said.
    call(|err, n| unsafe { lutra_shard_open(json.as_ptr(), json.len(), null(), 0, handle.as_mut_ptr(), 4, err, n) })?;
    Ok(u32::from_le_bytes(handle))
}

pub fn forward(handle: u32, batch: &[u8], input: &[u8], stop: Option<&AtomicI32>, out: &mut [u8]) -> Outcome {
    let mut written = [0; 4];
    // SAFETY: as above.
    call(|err, n| unsafe { forward_into(handle, batch, input, stop, out, &mut written, err, n) })?;
    Ok(u32::from_le_bytes(written) as i32)
}

/// `lutra_shard_forward` with buffers as long as the slices.
///
/// # Safety
///
/// `err` has `n` bytes.
#[allow(clippy::too_many_arguments)]
pub unsafe fn forward_into(
    handle: u32,
    batch: &[u8],
    input: &[u8],
    stop: Option<&AtomicI32>,
    out: &mut [u8],
    written: &mut [u8; 4],
    err: *mut u8,
    n: usize,
) -> i32 {
    let (stop, stop_len) = stop.map_or((null(), 0), |s| (s.as_ptr() as *const u8, 4));
    lutra_shard_forward(
        handle,
        batch.as_ptr(),
        batch.len(),
        input.as_ptr(),
        input.len(),
        stop,
        stop_len,
        out.as_mut_ptr(),
        out.len(),
        written.as_mut_ptr(),
        written.len(),
        err,
        n,
    )
}

pub fn close(handle: u32) -> Outcome {
    // SAFETY: as above.
    call(|err, n| unsafe { lutra_shard_close(handle, err, n) })
}

fn truncate(handle: u32, seq: u32, length: u32) -> Outcome {
    // SAFETY: as above.
    call(|err, n| unsafe { lutra_shard_truncate(handle, seq, length, err, n) })
}

fn stats(handle: u32) -> std::result::Result<Value, (i32, String)> {
    let mut out = [0; 1024];
    // SAFETY: as above.
    let n = call(|err, n| unsafe { lutra_shard_stats(handle, out.as_mut_ptr(), out.len(), err, n) })?;
    Ok(serde_json::from_slice(&out[..n as usize]).unwrap())
}

fn tiny() -> Model {
    Model::fixture("llama-tiny-f32.gguf")
}

#[test]
fn a_shard_lives_through_the_c_abi() {
    let model = tiny();
    let vocab = model.size("vocab");
    let tokens = Random(31).tokens(40, vocab);
    let expected = model.shards(1, RUN).logits(1, &tokens, 40);
    let (first, second) = (open(&model.descriptor(0, 2, RUN)).unwrap(), open(&model.descriptor(2, 5, RUN)).unwrap());
    // Buffers at odd addresses, and longer than needed.
    let batch = encode(&[Part::new(8, 0, &tokens).logits()]);
    let unaligned = [vec![0], batch.clone()].concat();
    let mut states = vec![0; 2 + 40 * model.size("embedding") * 4];
    let n = states.len() - 2;
    assert_eq!(forward(first, &unaligned[1..], &[], None, &mut states[1..]).unwrap() as usize, n);
    let mut out = vec![0x55; 3 + 40 * vocab * 4 + 8];
    assert_eq!(
        forward(second, &unaligned[1..], &states[1..1 + n], None, &mut out[3..]).unwrap(),
        40 * vocab as i32 * 4
    );
    let logits = floats(&out[3..3 + 160 * vocab]);
    super::model::assert_bits(&logits, &expected, "through the C ABI");
    assert_eq!(out[out.len() - 8..], [0x55; 8], "written beyond the results");

    let before = stats(first).unwrap();
    assert_eq!((&before["sequences"], &before["blockTokens"]), (&1.into(), &32.into()));
    assert_eq!(before["kvBlocksTotal"].as_u64().unwrap() - before["kvBlocksFree"].as_u64().unwrap(), 2);
    truncate(first, 8, 32).unwrap();
    truncate(first, 77, 0).unwrap();
    assert_eq!(stats(first).unwrap()["kvBlocksFree"], 31);
    truncate(first, 8, 0).unwrap();
    assert_eq!(stats(first).unwrap()["sequences"], 0);

    close(first).unwrap();
    for stale in [first, 0, u32::MAX] {
        assert_eq!(forward(stale, &batch, &[], None, &mut states).unwrap_err().0, Error::BAD_HANDLE);
        assert_eq!(truncate(stale, 0, 0).unwrap_err().0, Error::BAD_HANDLE);
        assert_eq!(stats(stale).unwrap_err().0, Error::BAD_HANDLE);
        assert_eq!(close(stale).unwrap_err().0, Error::BAD_HANDLE);
    }
    close(second).unwrap();
}

#[test]
fn a_token_reads_layers_head_and_one_row() {
    // A float matrix is padded to 16 rows, which the fixture's are multiples of; its output matrix may be the embedding.
    let model = tiny();
    let (d, ff, vocab) = (model.size("embedding"), model.size("feedForward"), model.size("vocab"));
    let kv = model.size("kvHeads") * model.size("headDim");
    let layer = 4 * (2 * d * d + 2 * d * kv + 3 * d * ff + 2 * d);
    let (whole, middle) = (open(&model.descriptor(0, 5, RUN)).unwrap(), open(&model.descriptor(1, 3, RUN)).unwrap());
    let stats_of = |handle| {
        let stats = stats(handle).unwrap();
        (stats["weightBytes"].as_u64().unwrap() as usize, stats["weightBytesPerToken"].as_u64().unwrap() as usize)
    };
    assert_eq!(stats_of(middle), (2 * layer, 2 * layer));
    let (bytes, per_token) = stats_of(whole);
    assert_eq!(per_token, 5 * layer + 4 * d + 4 * d * vocab + 4 * d);
    assert!(bytes == per_token - 4 * d || bytes == per_token - 4 * d + 4 * d * vocab, "{bytes}");
    close(whole).unwrap();
    close(middle).unwrap();
}

#[test]
fn nulls_short_buffers_and_bad_texts_are_errors() {
    let shard = open(&tiny().descriptor(0, 5, RUN)).unwrap();
    let batch = encode(&[Part::new(1, 0, &[1, 2]).sample(&GREEDY)]);
    let mut out = [0; 64];
    let mut err = [0; 256];
    // SAFETY: nulls come with a length that must not be believed, the others are as long as is said.
    unsafe {
        let (e, n) = (err.as_mut_ptr(), err.len());
        assert_eq!(lutra_abi_version(), ABI_VERSION);
        assert_eq!(lutra_device_info(null_mut(), 100, e, n), Error::INVALID_ARGUMENT);
        assert_eq!(lutra_device_info(out.as_mut_ptr(), 3, e, n), Error::INVALID_ARGUMENT);
        assert_eq!(lutra_device_info(out.as_mut_ptr(), 3, null_mut(), 0), Error::INVALID_ARGUMENT);
        assert_eq!(lutra_device_info(out.as_mut_ptr(), 3, e, 3), Error::INVALID_ARGUMENT);
        assert_eq!(lutra_shard_open(null(), 10, null(), 0, out.as_mut_ptr(), 4, e, n), Error::INVALID_ARGUMENT);
        assert_eq!(lutra_shard_open(null(), 0, null(), 0, out.as_mut_ptr(), 4, e, n), Error::INVALID_ARGUMENT);
        assert_eq!(lutra_shard_open(b"{}".as_ptr(), 2, null(), 0, null_mut(), 4, e, n), Error::INVALID_ARGUMENT);
        assert_eq!(lutra_shard_open(b"{}".as_ptr(), 2, null(), 0, out.as_mut_ptr(), 3, e, n), Error::INVALID_ARGUMENT);
        assert_eq!(
            lutra_shard_open(b"\xff{".as_ptr(), 2, null(), 0, out.as_mut_ptr(), 4, e, n),
            Error::INVALID_ARGUMENT
        );
        let (b, bn, o) = (batch.as_ptr(), batch.len(), out.as_mut_ptr());
        let mut w = [0u8; 4];
        let w = w.as_mut_ptr();
        let stop = AtomicI32::new(0);
        let s = stop.as_ptr() as *const u8;
        for (batch, bn, input, input_len, stop, out, out_len, written, written_len) in [
            (null(), bn, null(), 0, s, o, 64, w, 4),
            (null(), 0, null(), 0, s, o, 64, w, 4),
            (b, bn, null(), 8, s, o, 64, w, 4),
            (b, bn, o.cast_const(), 4, s, null_mut(), 64, w, 4),
            (b, bn, null(), 0, s.add(1), o, 64, w, 4),
            (b, bn, null(), 0, s, null_mut(), 64, w, 4),
            (b, bn, null(), 0, s, o, 11, w, 4),
            (b, bn, null(), 0, s, null_mut(), 0, w, 4),
            (b, bn, null(), 0, s, o, 64, null_mut(), 4),
            (b, bn, null(), 0, s, o, 64, w, 3),
        ] {
            let code = lutra_shard_forward(
                shard,
                batch,
                bn,
                input,
                input_len,
                stop,
                4,
                out,
                out_len,
                written,
                written_len,
                e,
                n,
            );
            assert_eq!(code, Error::INVALID_ARGUMENT);
        }
        assert_eq!(stats(shard).unwrap()["sequences"], 0);
        assert_eq!(lutra_shard_forward(shard, b, bn, null(), 0, null(), 0, o, 12, w, 4, null_mut(), 0), 0);
        assert_eq!(lutra_shard_stats(shard, null_mut(), 0, e, n), Error::INVALID_ARGUMENT);
        assert_eq!(lutra_measure_bandwidth(0, 1, o, 8, e, n), Error::INVALID_ARGUMENT);
    }
    // An empty batch is no work.
    assert_eq!(forward(shard, &[0; 4], &[], None, &mut []).unwrap(), 0);
    let text = forward(shard, &[1, 0, 0, 0], &[], None, &mut []).unwrap_err().1;
    assert!(text.contains("entries"), "{text}");
    close(shard).unwrap();
}

#[test]
fn long_texts_are_cut_between_characters() {
    let mut descriptor = tiny().descriptor(0, 5, RUN);
    descriptor["isa"] = "ü".repeat(2000).into();
    let json = descriptor.to_string();
    for n in 4..80 {
        let mut err = vec![0; n + 1];
        let mut handle = [0; 4];
        // SAFETY: every buffer is as long as is said.
        let code = unsafe {
            lutra_shard_open(json.as_ptr(), json.len(), null(), 0, handle.as_mut_ptr(), 4, err.as_mut_ptr(), n)
        };
        assert!(code < 0);
        let len = u32::from_le_bytes(err[..4].try_into().unwrap()) as usize;
        assert!(len <= n - 4);
        std::str::from_utf8(&err[4..4 + len]).unwrap();
        assert_eq!(err[n], 0);
    }
}

/// Batches with random bytes and words changed: an answer or an error, and the shard goes on.
#[test]
fn mutated_batches_do_no_harm() {
    let model = tiny();
    let vocab = model.size("vocab");
    let run = Run { kv_tokens: 160, max_batch: 64, threads: 2, ..RUN };
    let shard = open(&model.descriptor(0, 5, run)).unwrap();
    let tail = open(&model.descriptor(4, 5, run)).unwrap();
    let mut random = Random(37);
    let mut out = vec![0; 64 * vocab * 4 + 4096];
    let mut codes = std::collections::BTreeMap::new();
    for round in 0..6000 {
        let parameters =
            SampleParameters { temperature: 0.8, top_p: 0.9, top: Some(5), bias: vec![(3, 1.0)], ..GREEDY };
        let parts: Vec<Part> = (0..1 + random.below(3))
            .map(|i| {
                let count = 1 + random.below(6);
                let tokens = random.tokens(count, vocab);
                let part = Part::new(i as u32, random.below(4), &tokens);
                let part = if random.below(2) == 0 { part.sample(&parameters) } else { part };
                if random.below(4) == 0 {
                    part.logits()
                } else {
                    part
                }
            })
            .collect();
        let mut batch = encode(&parts);
        for _ in 0..random.below(4) {
            let at = random.below(batch.len().max(1));
            match random.below(5) {
                0 if at < batch.len() => batch[at] = random.word() as u8,
                1 if at < batch.len() => batch[at] ^= 1 << random.below(8),
                2 => batch.truncate(at),
                3 => batch.extend((0..random.below(20)).map(|_| random.word() as u8)),
                _ => {
                    let word = [0, 1, 2, 33, 255, u32::MAX, 1 << 31, 0x7fc0_0000, 0x7f80_0000][random.below(9)];
                    if let Some(place) = batch.get_mut(at / 4 * 4..at / 4 * 4 + 4) {
                        place.copy_from_slice(&word.to_le_bytes());
                    }
                }
            }
        }
        let outcome = if round % 3 == 0 {
            let input: Vec<u8> = (0..random.below(8) * 256).map(|_| random.word() as u8).collect();
            forward(tail, &batch, &input, None, &mut out)
        } else {
            forward(shard, &batch, &[], None, &mut out)
        };
        let code = outcome.map_or_else(|(code, text)| (code, assert!(!text.is_empty())).0, |_| 0);
        assert!(code != Error::PANIC);
        *codes.entry(code).or_insert(0) += 1;
    }
    assert!(codes[&0] > 500 && codes[&Error::INVALID_ARGUMENT] > 500, "{codes:?}");
    println!("{codes:?}");
    // And now something sensible.
    for seq in 0..4 {
        truncate(shard, seq, 0).unwrap();
    }
    let n = forward(shard, &encode(&[Part::new(1, 0, &[1, 2, 3]).logits()]), &[], None, &mut out).unwrap() as usize;
    super::model::assert_bits(&floats(&out[..n]), &model.shards(1, RUN).logits(1, &[1, 2, 3], 3), "afterwards");
    close(shard).unwrap();
    close(tail).unwrap();
}

/// Closing, truncating, asking and stopping while others compute.
#[test]
fn calls_may_come_from_many_threads() {
    let model = tiny();
    let vocab = model.size("vocab");
    let tokens = Random(41).tokens(50, vocab);
    let expected = model.shards(1, RUN).logits(1, &tokens, 50);
    for round in 0..5 {
        let shard = open(&model.descriptor(0, 5, Run { threads: 2, kv_tokens: 4096, ..RUN })).unwrap();
        let stop = AtomicI32::new(0);
        std::thread::scope(|scope| {
            for seq in 0..4 {
                let (tokens, expected, stop) = (&tokens, &expected, &stop);
                scope.spawn(move || {
                    let batch = encode(&[Part::new(seq, 0, tokens).logits()]);
                    let mut out = vec![0; 50 * vocab * 4];
                    for _ in 0..10 {
                        match forward(shard, &batch, &[], Some(stop), &mut out) {
                            Ok(_) => super::model::assert_bits(&floats(&out), expected, "beside others"),
                            Err((code, text)) => {
                                assert!([Error::STOPPED, Error::BAD_HANDLE].contains(&code), "{code} {text}");
                            }
                        }
                        let _ = truncate(shard, seq, 0);
                        let _ = stats(shard);
                    }
                });
            }
            std::thread::sleep(std::time::Duration::from_millis(10 * round));
            stop.store(1, Ordering::Relaxed);
            std::thread::sleep(std::time::Duration::from_millis(3));
            stop.store(0, Ordering::Relaxed);
            close(shard).unwrap();
        });
        assert_eq!(stats(shard).unwrap_err().0, Error::BAD_HANDLE);
    }
}

#[test]
fn matrices_are_checked() {
    let weights: Vec<u8> = (0..32 * 32).flat_map(|i| (i as f32).to_le_bytes()).collect();
    let x: Vec<u8> = [1.0f32; 64].iter().flat_map(|x| x.to_le_bytes()).collect();
    let mut y = [0; 2 * 32 * 4];
    let mut run = |kind, rows, cols, x: &[u8], n, y_len, threads, isa: &str| {
        // SAFETY: as above, and y_len ≤ the length of y.
        call(|err, len| unsafe {
            lutra_matmul(
                kind,
                weights.as_ptr(),
                weights.len(),
                rows,
                cols,
                x.as_ptr(),
                x.len(),
                n,
                y.as_mut_ptr(),
                y_len,
                threads,
                isa.as_ptr(),
                isa.len(),
                err,
                len,
            )
        })
    };
    run(0, 32, 32, &x, 2, 256, 2, "").unwrap();
    run(0, 32, 32, &[], 0, 0, 1, "portable").unwrap();
    for outcome in [
        run(0, 32, 33, &x, 2, 256, 1, ""),
        run(0, 32, 32, &x, 1, 256, 1, ""),
        run(0, 32, 32, &x, 2, 255, 1, ""),
        run(0, 32, 32, &x, u32::MAX, 256, 1, ""),
        run(0, 32, 32, &x, 2, 256, 0, ""),
        run(0, 32, 32, &x, 2, 256, 1, "mmx"),
        run(7, 32, 32, &x, 2, 256, 1, ""),
        run(8, 32, 32, &x, 2, 256, 1, ""),
        run(0, 0, 32, &x, 2, 256, 1, ""),
        run(0, u32::MAX, u32::MAX, &x, 2, 256, 1, ""),
    ] {
        assert!([Error::INVALID_ARGUMENT, Error::INVALID_DATA, Error::UNSUPPORTED].contains(&outcome.unwrap_err().0));
    }
    let mut out = [0; 32 * 32 * 4];
    let mut unpack = |rows, cols, len| {
        // SAFETY: as above, and len ≤ the length of out.
        call(|err, n| unsafe {
            lutra_unpack(0, weights.as_ptr(), weights.len(), out.as_mut_ptr(), len, rows, cols, err, n)
        })
    };
    unpack(32, 32, 4096).unwrap();
    unpack(64, 16, 4096).unwrap();
    assert!(unpack(32, 32, 4095).is_err() && unpack(32, 31, 4096).is_err() && unpack(u32::MAX, 1, 4096).is_err());
    unpack(32, 32, 4096).unwrap();
    assert_eq!(out[..], weights[..]);
}

#[test]
fn opening_tells_how_far_it_is_and_what_its_cache_lacks() {
    let descriptor = tiny().descriptor(1, 4, RUN);
    let open = |descriptor: &Value, progress: (*const u8, usize)| {
        let json = descriptor.to_string();
        let mut handle = [0; 4];
        let mut err = [0; 512];
        // SAFETY: every buffer is as long as is said.
        let code = unsafe {
            let (err, n) = (err.as_mut_ptr(), err.len());
            lutra_shard_open(json.as_ptr(), json.len(), progress.0, progress.1, handle.as_mut_ptr(), 4, err, n)
        };
        let n = u32::from_le_bytes(err[..4].try_into().unwrap()) as usize;
        let text = String::from_utf8(err[4..4 + n].to_vec()).unwrap();
        if code >= 0 {
            close(u32::from_le_bytes(handle)).unwrap();
        }
        (code, text)
    };
    let progress = [const { AtomicU64::new(7) }; 3];
    let at = progress.as_ptr() as *const u8;
    assert_eq!(open(&descriptor, (at, 16)), (0, String::new()));
    assert_eq!(progress.each_ref().map(|n| n.load(Ordering::Relaxed)), [3, 3, 7]);
    for (at, len) in [(null(), 16), (at, 15), (at.wrapping_add(1), 16)] {
        assert_eq!(open(&descriptor, (at, len)).0, Error::INVALID_ARGUMENT);
    }
    // A folder that cannot be made matters only to a model with a matrix that is worth an entry.
    let no_folder = serde_json::json!({"dir": concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"), "maxBytes": 1 << 20});
    let mut cached = descriptor.clone();
    cached["cache"] = no_folder.clone();
    assert_eq!(open(&cached, (null(), 0)), (0, String::new()));
    let bundled = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/lutra-books-6M-TQ2_0.gguf");
    let mut large = Model::open(bundled.into()).descriptor(0, 1, RUN);
    large["cache"] = no_folder;
    let (code, text) = open(&large, (null(), 0));
    assert!(code == 1 && text.contains("no cache"), "{code} {text}");
    cached["cache"] = serde_json::json!({"maxBytes": -1});
    assert_eq!(open(&cached, (null(), 0)).0, Error::INVALID_ARGUMENT);
}
