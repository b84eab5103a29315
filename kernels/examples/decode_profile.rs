//! Where the time of a decoded token goes, and what share of it the products alone would take.
//!
//! `cargo run --release --example decode_profile -- [--json] [--shape tinyllama-1.1b] [--type Q4_0] [--head-type Q4_0]
//! [--kv f16] [--context 2048] [--threads 1,2] [--isa avx512] [--rounds 24] [--batch 1]`
//!
//! Weights are arbitrary: a file of one layer stands for all, each of which is packed into memory of its own. The context is
//! filled by prefilling. Rounds alternate between decoding a token for each of `batch` sequences and the same products with nothing
//! between them; figures are medians (steps: means), shares are of the whole pass.

use lutra_kernels::descriptor::Descriptor;
use lutra_kernels::profile::Step;
use lutra_kernels::shard::Shard;
use lutra_kernels::SourceType;
use serde_json::{json, Value};
use std::io::Write;
use std::time::{Duration, Instant};

/// layers, embedding, heads, KV heads, feed-forward, vocabulary
const SHAPES: [(&str, [usize; 6]); 4] = [
    ("tinyllama-1.1b", [22, 2048, 32, 4, 5632, 32000]),
    ("bitnet-2b", [30, 2560, 20, 5, 6912, 128256]),
    ("smollm-135m", [30, 576, 9, 3, 1536, 49152]),
    ("llama-1b", [16, 2048, 32, 8, 8192, 128256]),
];
/// GGML's numbers.
const F32: u32 = 0;

struct Options {
    json: bool,
    shape: String,
    ty: String,
    head: Option<String>,
    kv: String,
    context: usize,
    threads: Vec<usize>,
    isa: Option<String>,
    rounds: usize,
    batch: usize,
}

fn options() -> Options {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let mut o = Options {
        json: false,
        shape: "tinyllama-1.1b".into(),
        ty: "Q4_0".into(),
        head: None,
        kv: "f16".into(),
        context: 2048,
        threads: vec![1, cores],
        isa: None,
        rounds: 24,
        batch: 1,
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().unwrap_or_else(|| panic!("{arg} takes a value"));
        let number = |text: String| text.parse().expect("a number");
        match arg.as_str() {
            "--json" => o.json = true,
            "--shape" => o.shape = value(),
            "--type" => o.ty = value(),
            "--head-type" => o.head = Some(value()),
            "--kv" => o.kv = value(),
            "--context" => o.context = number(value()),
            "--threads" => o.threads = value().split(',').map(|n| n.parse().expect("a number")).collect(),
            "--isa" => o.isa = Some(value()),
            "--rounds" => o.rounds = number(value()),
            "--batch" => o.batch = number(value()),
            _ => panic!("unknown option {arg}"),
        }
    }
    o.threads.dedup();
    o
}

/// GGML's number of a type, and what a tensor of it takes.
fn type_of(name: &str) -> (u32, SourceType) {
    (0..64)
        .filter_map(|id| Some((id, SourceType::from_ggml(id).ok()?)))
        .find(|(_, ty)| format!("{ty:?}") == name)
        .unwrap_or_else(|| panic!("no type {name}"))
}

/// Writes tensors one after the other.
struct Tensors<W> {
    file: W,
    offset: usize,
}

impl<W: Write> Tensors<W> {
    fn matrix(&mut self, ty: &str, cols: usize, rows: usize) -> Value {
        let (id, ty) = type_of(ty);
        let bytes = ty.arbitrary(rows, cols).expect("whole blocks");
        json!({"weight": self.put(id, &[cols, rows], &bytes)})
    }
    /// Small weights of a norm keep everything finite.
    fn norm(&mut self, cols: usize) -> Value {
        json!({"weight": self.put(F32, &[cols], &0.001f32.to_le_bytes().repeat(cols))})
    }
    fn put(&mut self, id: u32, shape: &[usize], bytes: &[u8]) -> Value {
        self.file.write_all(bytes).expect("room for the model file");
        let offset = self.offset;
        self.offset += bytes.len();
        json!({"name": "tensor", "type": id, "shape": shape, "offset": offset, "bytes": bytes.len()})
    }
}

/// The description of a whole model; its tensors are written to `path`.
fn describe(o: &Options, path: &std::path::Path) -> Value {
    let [layers, d, heads, kv_heads, ff, vocab] =
        SHAPES.iter().find(|(name, _)| *name == o.shape).unwrap_or_else(|| panic!("no shape {}", o.shape)).1;
    let dim = d / heads;
    let file = std::io::BufWriter::new(std::fs::File::create(path).expect("a model file"));
    let mut t = Tensors { file, offset: 0 };
    let layer = json!({
        "attnNorm": t.norm(d), "q": t.matrix(&o.ty, d, d), "k": t.matrix(&o.ty, d, kv_heads * dim),
        "v": t.matrix(&o.ty, d, kv_heads * dim), "rope": 0, "o": t.matrix(&o.ty, d, d), "ffnNorm": t.norm(d),
        "mlp": {"gate": t.matrix(&o.ty, d, ff), "up": t.matrix(&o.ty, d, ff), "down": t.matrix(&o.ty, ff, d)},
    });
    let head = o.head.as_ref().unwrap_or(&o.ty);
    let (embedding, output) = (t.matrix(head, d, vocab), t.matrix(head, d, vocab));
    let description = json!({
        "path": path, "threads": 1, "isa": o.isa, "maxBatch": 256,
        "kv": {"type": o.kv, "tokens": o.batch * o.context.next_multiple_of(32)},
        "hyper": {
            "layers": layers, "embedding": d, "heads": heads, "kvHeads": kv_heads, "headDim": dim, "feedForward": ff,
            "vocab": vocab, "context": o.context, "norm": {"kind": "rms", "eps": 1e-5}, "activation": "silu",
            "ropes": [{"base": 10000.0, "dims": dim, "style": "norm"}],
        },
        "first": 0, "end": layers, "embedding": embedding["weight"], "head": {"norm": t.norm(d), "output": output},
        "layers": vec![layer; layers],
    });
    t.file.flush().expect("room for the model file");
    description
}

/// `(sequence, position)` of each entry, which has `count` tokens and asks for the most probable next one.
fn batch(entries: &[(usize, usize)], count: usize, sample: bool) -> Vec<u8> {
    let mut words = vec![entries.len() as u32];
    for &(seq, pos) in entries {
        words.extend([seq as u32, pos as u32, count as u32, u32::from(sample)]);
    }
    words.extend((0..entries.len() * count).map(|i| i as u32 % 1000));
    for _ in entries.iter().filter(|_| sample) {
        words.extend([0f32.to_bits(), 0, 1f32.to_bits(), 0f32.to_bits(), 1f32.to_bits(), 0, 0, u32::MAX, 0, 0, 0]);
        words.extend([u32::MAX, 0]);
    }
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

fn forward(shard: &Shard, entries: &[(usize, usize)], count: usize, sample: bool) -> Duration {
    let batch = batch(entries, count, sample);
    let mut out = vec![0; if sample { 12 * entries.len() } else { 0 }];
    let start = Instant::now();
    shard.forward(&batch, &[], None, &mut out).expect("a forward pass");
    start.elapsed()
}

fn median(mut values: Vec<Duration>) -> f64 {
    values.sort();
    values[values.len() / 2].as_secs_f64() * 1e6
}

fn main() {
    let o = options();
    assert!(o.context > o.rounds + 1, "the context must hold the rounds");
    let folder = std::env::temp_dir().join(format!("lutra-profile-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    let mut description = describe(&o, &folder.join("model"));
    let shards: Vec<Shard> = o
        .threads
        .iter()
        .map(|&threads| {
            description["threads"] = json!(threads);
            let descriptor = Descriptor::parse(description.to_string().as_bytes()).expect("a description");
            Shard::open(&descriptor).expect("a shard")
        })
        .collect();
    std::fs::remove_dir_all(&folder).expect("the folder");
    for (shard, &threads) in shards.iter().zip(&o.threads) {
        let filled = o.context - o.rounds - 1;
        for seq in 0..o.batch {
            for pos in (0..filled).step_by(256) {
                forward(shard, &[(seq, pos)], 256.min(filled - pos), false);
            }
        }
        let entries = |pos| (0..o.batch).map(|seq| (seq, pos)).collect::<Vec<_>>();
        forward(shard, &entries(filled), 1, true);
        shard.profile().for_each(drop);
        let (mut passes, mut products) = (vec![], vec![]);
        for round in 1..=o.rounds {
            passes.push(forward(shard, &entries(filled + round), 1, true));
            products.push(shard.time_products(o.batch));
        }
        let (mean, pass, alone) =
            (passes.iter().sum::<Duration>().as_secs_f64() * 1e6 / o.rounds as f64, median(passes), median(products));
        let steps: Vec<(Step, f64)> =
            shard.profile().map(|(step, time)| (step, time.as_secs_f64() * 1e6 / o.rounds as f64)).collect();
        if o.json {
            let shares: serde_json::Map<_, _> =
                steps.iter().map(|(step, time)| (format!("{step:?}"), json!(time / mean))).collect();
            let row = json!({
                "shape": o.shape, "type": o.ty, "kv": o.kv, "context": o.context, "threads": threads, "batch": o.batch,
                "passUs": pass, "productsUs": alone, "ratio": alone / pass, "shares": shares,
            });
            println!("{row}");
            continue;
        }
        println!(
            "{} {} (KV {}, context {}, batch {}, {threads} threads): {:.1} tokens/s; products alone {:.1}% of a pass",
            o.shape,
            o.ty,
            o.kv,
            o.context,
            o.batch,
            o.batch as f64 * 1e6 / pass,
            100.0 * alone / pass
        );
        for (step, time) in &steps {
            let kind = if step.is_product() { "product" } else { "" };
            println!("  {:14} {time:9.0} µs {:6.1}% {kind}", format!("{step:?}"), 100.0 * time / mean);
        }
        let counted: f64 = steps.iter().map(|(_, time)| time).sum();
        println!("  {:14} {:9.0} µs {:6.1}%", "others", mean - counted, 100.0 * (1.0 - counted / mean));
    }
}
