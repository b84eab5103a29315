//! Random input to the packers and to every function of the C ABI, in buffers of exactly the length said, so that under
//! AddressSanitizer (`.ci/asan`) a byte read or written beyond them ends the run. What is right must come out right, what is
//! wrong must be refused with a code and a text.
//!
//! `LUTRA_FUZZ_SECONDS` is the time of each test (1), `LUTRA_FUZZ_SEED` where they begin (1); a failure names its seed.

use super::numerics_tests::same;
use super::shard_tests::ffi::forward_into;
use super::shard_tests::model::{self, encode, Model, Part, Random, Run, GREEDY};
use lutra_kernels::batch::SampleParameters;
use lutra_kernels::ffi::*;
use lutra_kernels::{available, dequantize, pack_as, Error, PackedForm, Pool, SourceType};
use serde_json::{json, Value};
use std::path::PathBuf;
use std::ptr::null;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|e| panic!("{name}: {e}")))
}

/// Calls `f` with one seed after the other until the time is over, at least 20 times.
fn fuzz(f: impl Fn(&mut Random)) {
    let end = Instant::now() + Duration::from_secs(setting("LUTRA_FUZZ_SECONDS", 1));
    struct Seed(u64);
    impl Drop for Seed {
        fn drop(&mut self) {
            if std::thread::panicking() {
                eprintln!("failed with LUTRA_FUZZ_SEED={}", self.0);
            }
        }
    }
    let first = setting("LUTRA_FUZZ_SEED", 1);
    let mut seed = Seed(first);
    while seed.0 < first + 20 || Instant::now() < end {
        f(&mut Random(seed.0.wrapping_mul(0x2545_f491_4f6c_dd1d)));
        seed.0 += 1;
    }
}

fn bytes(random: &mut Random, n: usize) -> Vec<u8> {
    // NaN, infinities, zeros and ones are likelier than by chance: whole stretches of them.
    let fill = [None, None, Some(0x00), Some(0xff), Some(0x7f), Some(0x80), Some(0x7c)][random.below(7)];
    (0..n).map(|i| fill.filter(|_| i / 64 % 3 != 0).unwrap_or_else(|| random.word() as u8)).collect()
}

fn any_type(random: &mut Random) -> SourceType {
    SourceType::ALL[random.below(SourceType::ALL.len())]
}

fn all_same(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(&a, &b)| same(a, b))
}

/// A code, or the code and text of an error, whose buffer has any length.
fn call(random: &mut Random, f: impl FnOnce(*mut u8, usize) -> i32) -> Result<i32, i32> {
    let mut err = vec![0xaa; [0, 3, 4, 9, 300][random.below(5)]];
    let code = f(err.as_mut_ptr(), err.len());
    assert_ne!(code, Error::PANIC, "{}", String::from_utf8_lossy(&err));
    if code < 0 && err.len() >= 4 {
        let n = u32::from_le_bytes(err[..4].try_into().unwrap()) as usize;
        assert!(std::str::from_utf8(&err[4..4 + n]).is_ok());
        assert!(err.len() < 300 || n > 0);
    }
    if code < 0 {
        Err(code)
    } else {
        Ok(code)
    }
}

#[test]
fn packed_weights_are_the_sources() {
    fuzz(|random| {
        let ty = any_type(random);
        let rows = 1 + random.below(70);
        let cols = (1 + random.below(if ty.block_elements() == 1 { 300 } else { 6 })) * ty.block_elements();
        let src = bytes(random, ty.tensor_bytes(rows, cols).unwrap());
        let mut expected = vec![0f32; rows * cols];
        dequantize(ty, &src, &mut expected).unwrap();
        let pool = Pool::new(1 + random.below(3));
        for form in PackedForm::candidates(ty) {
            let packed = pack_as(form, ty, &src, rows, cols, &pool).unwrap();
            let mut row = vec![0f32; cols];
            for (r, expected) in expected.chunks_exact(cols).enumerate() {
                packed.unpack_row(r, &mut row);
                assert!(all_same(&row, expected), "{form:?} {rows} × {cols}, row {r}");
            }
            // Too short, too long, and shapes that are not the source's.
            let cut = random.below(src.len());
            let long = [&src[..], &[0]].concat();
            for (src, rows, cols) in [
                (&src[..cut], rows, cols),
                (&long, rows, cols),
                (&src, rows + 1, cols),
                (&src, rows, 0),
                (&src, 0, cols),
            ] {
                assert!(pack_as(form, ty, src, rows, cols, &pool).is_err());
            }
            let wrong = PackedForm::of(any_type(random));
            let fits = PackedForm::candidates(ty).contains(&wrong);
            assert_eq!(pack_as(wrong, ty, &src, rows, cols, &pool).is_ok(), fits, "{ty:?} as {wrong:?}");
        }
    });
}

#[test]
fn products_and_unpacking_keep_to_their_buffers() {
    fuzz(|random| {
        let ty = any_type(random);
        let (rows, n) = (1 + random.below(40), 1 + random.below(10));
        let cols = (1 + random.below(if ty.block_elements() == 1 { 80 } else { 3 })) * ty.block_elements();
        let src = bytes(random, ty.tensor_bytes(rows, cols).unwrap());
        let x = bytes(random, 4 * n * cols);
        let mut results = vec![];
        for ks in available() {
            let (isa, mut y) = (ks.isa.name(), vec![0; 4 * n * rows]);
            let threads = 1 + random.below(3) as u32;
            // SAFETY: every buffer is as long as is said.
            let code = call(random, |err, err_len| unsafe {
                lutra_matmul(
                    ty as u32,
                    src.as_ptr(),
                    src.len(),
                    rows as u32,
                    cols as u32,
                    x.as_ptr(),
                    x.len(),
                    n as u32,
                    y.as_mut_ptr(),
                    y.len(),
                    threads,
                    isa.as_ptr(),
                    isa.len(),
                    err,
                    err_len,
                )
            });
            assert_eq!(code, Ok(0), "{ty:?} {rows} × {cols} × {n} {isa}");
            results.push(model::floats(&y));
        }
        assert!(results.iter().all(|y| all_same(y, &results[0])), "{ty:?} {rows} × {cols} × {n}");
        // Anything instead of what is right.
        let odd = |random: &mut Random, right: usize| {
            [right, right, right, right.wrapping_sub(1), right + 1, 0, 1 << 20, u32::MAX as usize][random.below(8)]
                as u32
        };
        let kind = [ty as u32, ty as u32, random.word() as u32, random.below(50) as u32][random.below(4)];
        let (r, c) = (odd(random, rows), odd(random, cols));
        let (src_len, room) = (random.below(src.len() + 1), random.below(4 * rows * cols + 9));
        let src_len = [src.len(), src_len][random.below(2)];
        let room = [4 * rows * cols, room][random.below(2)];
        let mut out = vec![0; room];
        let given = src[..src_len].to_vec();
        // SAFETY: as above.
        let code = call(random, |err, err_len| unsafe {
            lutra_unpack(kind, given.as_ptr(), given.len(), out.as_mut_ptr(), out.len(), r, c, err, err_len)
        });
        let right = SourceType::from_ggml(kind).and_then(|ty| ty.tensor_bytes(r as usize, c as usize)).ok();
        let enough = (r as usize).checked_mul(c as usize).is_some_and(|n| n <= room / 4);
        assert_eq!(code.is_ok(), r > 0 && c > 0 && right == Some(src_len) && enough, "{kind} {r} × {c}: {code:?}");
    });
}

struct Scene {
    model: Model,
    /// The model's file, cut or changed at random: a file of this process.
    damaged: PathBuf,
    bytes: Vec<u8>,
}

impl Scene {
    fn new(name: &str) -> Scene {
        let path = model::fixture(name);
        let damaged = std::env::temp_dir().join(format!("lutra-fuzz-{}-{name}", std::process::id()));
        Scene { bytes: std::fs::read(&path).unwrap(), model: Model::open(path), damaged }
    }

    /// A descriptor that is right, or wrong in one to three places.
    fn descriptor(&self, random: &mut Random) -> Vec<u8> {
        let layers = self.model.size("layers");
        let first = random.below(layers);
        let end = first + 1 + random.below(layers - first);
        let threads = 1 + random.below(3);
        let names: Vec<_> = available().iter().map(|ks| ks.isa.name()).collect();
        let run = Run {
            threads,
            isa: Some(names[random.below(names.len())]),
            kv: ["f16", "f32", "q8"][random.below(3)],
            kv_tokens: 1 + random.below(200),
            max_batch: 1 + random.below(40),
        };
        let mut d = self.model.descriptor(first, end, run);
        d["activations"] = json!(["a8", "a16"][random.below(2)]);
        if random.below(3) == 0 {
            let mut bytes = self.bytes.clone();
            bytes.truncate(random.below(bytes.len() + 1));
            std::fs::write(&self.damaged, bytes).unwrap();
            d["path"] = json!(self.damaged);
        }
        if random.below(3) == 0 {
            // Any type's blocks out of any place of the file: values of all kinds, in matrices of all kinds.
            let places = ["q", "k", "v", "o", "mlp/gate", "mlp/up", "mlp/down"];
            let place = format!("/layers/0/{}/weight", places[random.below(places.len())]);
            let tensor = d.pointer_mut(&place).expect("a dense layer");
            let ty = any_type(random);
            let (cols, rows) = (tensor["shape"][0].as_u64().unwrap(), tensor["shape"][1].as_u64().unwrap());
            let bytes = ty.tensor_bytes(rows as usize, cols as usize).unwrap_or(0);
            let offset = random.below(self.bytes.len().saturating_sub(bytes) + 1);
            (tensor["type"], tensor["bytes"], tensor["offset"]) = (json!(ty as u32), json!(bytes), json!(offset));
        }
        let mut text = d.to_string().into_bytes();
        if random.below(3) == 0 {
            for _ in 0..=random.below(3) {
                let at = random.below(text.len());
                match random.below(4) {
                    0 => text[at] = b"0123456789-.eE\"{}[],:nt"[random.below(23)],
                    1 => text.insert(at, random.word() as u8),
                    2 => drop(text.remove(at)),
                    _ => text.truncate(at.max(1)),
                }
            }
        }
        // What is allowed, but more than this test should take.
        match serde_json::from_slice::<Value>(&text) {
            Ok(d) if d["threads"].as_u64() > Some(4) || d["kv"]["tokens"].as_u64() > Some(5000) => vec![],
            _ => text,
        }
    }

    fn open(&self, random: &mut Random) -> Option<u32> {
        let json = self.descriptor(random);
        let progress = [const { AtomicU64::new(0) }; 2];
        let (at, len) = if random.below(2) == 0 { (null(), 0) } else { (progress.as_ptr().cast(), 16) };
        let mut handle = [0; 4];
        // SAFETY: every buffer is as long as is said.
        let opened = call(random, |err, n| unsafe {
            lutra_shard_open(json.as_ptr(), json.len(), at, len, handle.as_mut_ptr(), 4, err, n)
        });
        opened.ok().map(|_| u32::from_le_bytes(handle))
    }

    fn forward(&self, handle: u32, random: &mut Random) {
        let vocab = self.model.size("vocab");
        let parameters = SampleParameters {
            temperature: [0.0, 0.7, f32::NAN][random.below(3)],
            top_k: random.below(400) as u32,
            top: Some(random.below(12) as u32),
            bias: vec![(random.below(vocab + 2) as u32, 1e9)],
            ..GREEDY
        };
        let parts: Vec<Part> = (0..random.below(4))
            .map(|i| {
                let count = random.below(9);
                let mut part = Part::new(i as u32, random.below(3), &random.tokens(count, vocab));
                part.logits = random.below(3) == 0;
                if random.below(2) == 0 {
                    part = part.sample(&parameters);
                }
                part
            })
            .collect();
        let mut batch = encode(&parts);
        let tokens: usize = parts.iter().map(|p| p.tokens.len()).sum();
        for _ in 0..[0, 0, 1, 2][random.below(4)] {
            let at = random.below(batch.len());
            match random.below(4) {
                0 => batch[at] = random.word() as u8,
                1 => batch.truncate(at.max(1)),
                2 => batch.extend(random.word().to_le_bytes()),
                _ => {
                    let word = [0, 1, 2, 33, u32::MAX, 1 << 31, 0x7fc0_0000][random.below(7)];
                    if let Some(place) = batch.get_mut(at / 4 * 4..at / 4 * 4 + 4) {
                        place.copy_from_slice(&word.to_le_bytes());
                    }
                }
            }
        }
        let states = 4 * tokens * self.model.size("embedding");
        let input_len = [0, 0, states, random.below(states + 9)][random.below(4)];
        let input = bytes(random, input_len);
        let mut out = vec![0; [states, 40 * (vocab * 4 + 200), random.below(5000)][random.below(3)]];
        let mut written = [0; 4];
        let stop = AtomicI32::new((random.below(9) == 0) as i32);
        // SAFETY: as above.
        let code = call(random, |err, n| unsafe {
            forward_into(handle, &batch, &input, Some(&stop), &mut out, &mut written, err, n)
        });
        if code.is_ok() {
            assert!(u32::from_le_bytes(written) as usize <= out.len());
        }
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.damaged);
    }
}

#[test]
fn shards_survive_any_caller() {
    let scenes = ["llama-tiny-f16.gguf", "llama-q-Q4_0.gguf", "llama-q-TQ1_0.gguf"].map(Scene::new);
    let opened = AtomicU64::new(0);
    fuzz(|random| {
        let scene = &scenes[random.below(scenes.len())];
        let Some(handle) = scene.open(random) else { return };
        opened.fetch_add(1, Relaxed);
        // Two callers at once, one of whom closes it under the other's eyes.
        let seeds = [random.word(), random.word()];
        std::thread::scope(|scope| {
            for seed in seeds {
                scope.spawn(move || {
                    let mut random = Random(seed);
                    for _ in 0..random.below(12) {
                        let handle = [handle, handle, handle, handle, random.word() as u32][random.below(5)];
                        let mut out = vec![0; random.below(600)];
                        let _ = match random.below(7) {
                            // SAFETY: as above.
                            0 => call(&mut random, |err, n| unsafe {
                                lutra_shard_stats(handle, out.as_mut_ptr(), out.len(), err, n)
                            }),
                            1 => {
                                let (seq, len) = (random.below(5) as u32, random.below(40) as u32);
                                // SAFETY: as above.
                                call(&mut random, |err, n| unsafe { lutra_shard_truncate(handle, seq, len, err, n) })
                            }
                            2 if seed % 2 == 0 => {
                                // SAFETY: as above.
                                call(&mut random, |err, n| unsafe { lutra_shard_close(handle, err, n) })
                            }
                            // SAFETY: as above.
                            3 => call(&mut random, |err, n| unsafe {
                                lutra_device_info(out.as_mut_ptr(), out.len(), err, n)
                            }),
                            _ => {
                                scene.forward(handle, &mut random);
                                Ok(0)
                            }
                        };
                    }
                });
            }
        });
        let mut close = || {
            // SAFETY: as above.
            call(random, |err, n| unsafe { lutra_shard_close(handle, err, n) })
        };
        let _ = close();
        assert_eq!(close(), Err(Error::BAD_HANDLE), "closed twice");
    });
    assert!(opened.load(Relaxed) > 0, "no shard was opened");
}
