//! Speed of products per packed form, instruction set, threads and batch, beside the read bandwidth of the same memory; and
//! what a weight costs by its bits when it is looked up. `deno task bench:kernels` runs it; see bench/README.md.
//!
//! `cargo run --release --example bench_kernels -- [--types Q4_0,…] [--isa avx512,…] [--threads 1,2] [--batch 1,8,256]
//! [--mebibytes 1024] [--rounds 5] [--all]`; prints lines of JSON, `{"row": …}` and `{"cost": …}`.
//!
//! A round reads the packed matrices once and multiplies them once, one after the other, so that both see the same pages and the
//! same state of a machine that other things may share; figures are medians over the rounds. The way of reading is the one
//! that was fastest over these matrices with as many threads. They must be larger than what caches can hold of them from one
//! pass to the next: processors of today have up to a gibibyte of last cache, and a virtual machine does not tell its share.
//! `cachedGweights` is of a matrix that stays in the second-level cache, one thread.

use lutra_kernels::bandwidth::Reading;
use lutra_kernels::pack::{Codes, PackedForm, PackedMatrix, ScaleKind, Values};
use lutra_kernels::{available, matmul_by, pack_as, Activations, Kernels, Plan, Pool, SourceType};
use std::time::Instant;

const COLS: usize = 2048;
/// Rows of a matrix that stays in the second-level cache.
const ROWS: usize = 256;
/// Bytes of a matrix of a model, about: so many that threads meet seldom, so few that its products stay in cache. Memory is
/// measured on as many of them as it takes.
const MATRIX_BYTES: usize = 16 << 20;
/// From this batch on arithmetic limits, not memory: the cached matrix serves.
const LARGE_BATCH: usize = 16;

struct Options {
    /// Every form that a type can have and every kernel of each, not only the usual ones.
    all: bool,
    types: Vec<SourceType>,
    isa: Vec<&'static Kernels>,
    threads: Vec<usize>,
    batch: Vec<usize>,
    mebibytes: usize,
    rounds: usize,
}

/// Ends the program over what it was told.
fn fail(message: std::fmt::Arguments) -> ! {
    eprintln!("bench_kernels: {message}");
    std::process::exit(2)
}

fn options() -> Options {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let mut o = Options {
        all: false,
        types: SourceType::ALL.into_iter().filter(|ty| *ty != SourceType::F32).collect(),
        isa: available().into_iter().skip(1).collect(),
        threads: if cores > 1 { vec![1, cores] } else { vec![1] },
        batch: vec![1, 8, 256],
        mebibytes: 1024,
        rounds: 5,
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        if arg == "--all" {
            o.all = true;
            continue;
        }
        let value = args.next().unwrap_or_else(|| fail(format_args!("{arg} takes a value")));
        let numbers = || value.split(',').map(number).collect::<Vec<usize>>();
        match arg.as_str() {
            "--types" => o.types = value.split(',').map(source_type).collect(),
            "--isa" => {
                let set = |name| available().into_iter().find(|ks| ks.isa.name() == name);
                let named = |name| set(name).unwrap_or_else(|| fail(format_args!("{name} is no instruction set here")));
                o.isa = value.split(',').map(named).collect();
            }
            "--threads" => o.threads = numbers(),
            "--batch" => o.batch = numbers(),
            "--mebibytes" => o.mebibytes = number(&value),
            "--rounds" => o.rounds = number(&value),
            _ => fail(format_args!("unknown option {arg}")),
        }
    }
    o
}

fn number(text: &str) -> usize {
    let number = text.parse().ok().filter(|&n| n > 0);
    number.unwrap_or_else(|| fail(format_args!("{text:?} is no number above 0")))
}

fn source_type(name: &str) -> SourceType {
    let known = SourceType::ALL.into_iter().find(|ty| format!("{ty:?}").eq_ignore_ascii_case(name));
    known.unwrap_or_else(|| fail(format_args!("{name:?} is no type of weights")))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn seconds(f: impl FnOnce()) -> f64 {
    let start = Instant::now();
    f();
    start.elapsed().as_secs_f64()
}

fn activations(ks: &Kernels, form: PackedForm, n: usize, pool: &Pool) -> Activations {
    let x: Vec<f32> = (0..n * COLS).map(|i| (i % 17) as f32 - 8.0).collect();
    let mut act = Activations::new();
    act.prepare(ks, &x, n, COLS, &[form], pool);
    act
}

/// Seconds of a product with a matrix in cache, one thread: the median of many.
fn cached(plan: Plan, ks: &Kernels, w: &PackedMatrix, n: usize) -> f64 {
    let one = Pool::new(1);
    let act = activations(ks, w.form, n, &one);
    let mut y = vec![0f32; n * w.rows];
    let mut run = || seconds(|| matmul_by(plan, ks, w, &act, &mut y, w.rows, &one));
    let _warm_up: f64 = (0..5).map(|_| run()).sum();
    median((0..200 / n.min(20) + 5).map(|_| run()).collect())
}

/// Reads all matrices.
fn read(matrices: &[PackedMatrix], how: Reading, ks: &Kernels, pool: &Pool) {
    matrices.iter().for_each(|w| w.read(how, ks, pool));
}

/// The way of reading the matrices that is the fastest.
fn fastest(ks: &Kernels, matrices: &[PackedMatrix], pool: &Pool) -> Reading {
    let best = |how: Reading| (0..3).map(|_| seconds(|| read(matrices, how, ks, pool))).fold(f64::INFINITY, f64::min);
    let times = Reading::ALL.map(|how| (best(how), how));
    times.into_iter().min_by(|a, b| a.0.total_cmp(&b.0)).expect("there are some").1
}

fn bench_form(o: &Options, ks: &Kernels, ty: SourceType, form: PackedForm) {
    let usual = ks.form(ty) == form;
    if !(usual || o.all && ks.has_kernel(form)) {
        return;
    }
    let most = Pool::new(o.threads.iter().copied().max().unwrap_or(1));
    let source = ty.arbitrary(ROWS, COLS).expect("whole blocks");
    let small = pack_as(form, ty, &source, ROWS, COLS, &most).expect("a packed matrix");
    let matrix = || small.repeated((MATRIX_BYTES / small.bytes()).max(1), &most).expect("memory");
    let large: Vec<PackedMatrix> = (0..((o.mebibytes << 20) / MATRIX_BYTES).max(1)).map(|_| matrix()).collect();
    for &threads in &o.threads {
        let pool = Pool::new(threads);
        let _awake = pool.session();
        let how = fastest(ks, &large, &pool);
        for (variant, kernel) in ks.variants(form).iter().enumerate().take(if o.all { usize::MAX } else { 1 }) {
            let plan = Plan { variant, ..Plan::default() };
            for &n in &o.batch {
                let act = activations(ks, form, n, &pool);
                let memory_bound = n < LARGE_BATCH;
                let matrices = if memory_bound { &large[..] } else { std::slice::from_ref(&small) };
                let bytes: usize = matrices.iter().map(PackedMatrix::bytes).sum();
                let rows: usize = matrices.iter().map(|w| w.rows).sum();
                let repeat = if memory_bound { 1 } else { 4 };
                let mut y = vec![0f32; n * matrices[0].rows];
                let (mut reading, mut product) = (vec![], vec![]);
                for _ in 0..o.rounds {
                    if memory_bound {
                        reading.push(seconds(|| read(matrices, how, ks, &pool)));
                    }
                    let mut run = |w: &PackedMatrix| matmul_by(plan, ks, w, &act, &mut y, w.rows, &pool);
                    product
                        .push(seconds(|| (0..repeat).for_each(|_| matrices.iter().for_each(&mut run))) / repeat as f64);
                }
                let product = median(product);
                let gbps = bytes as f64 / product / 1e9;
                let bandwidth = memory_bound.then(|| bytes as f64 / median(reading) / 1e9);
                let row = serde_json::json!({
                    "form": format!("{ty:?}"),
                    "codes": format!("{:?}", form.codes).to_lowercase().replace(['(', ')'], ""),
                    "kernel": kernel.name,
                    "preferred": usual && variant == 0,
                    "isa": ks.isa.name(),
                    "threads": threads,
                    "batch": n,
                    "bits": small.bytes() as f64 * 8.0 / (ROWS * COLS) as f64,
                    "gweights": (rows * COLS * n) as f64 / product / 1e9,
                    "gbps": gbps,
                    "bandwidth": bandwidth,
                    "share": bandwidth.map(|bandwidth| gbps / bandwidth),
                    "cachedGweights": (ROWS * COLS * n) as f64 / cached(plan, ks, &small, n) / 1e9,
                });
                println!("{}", serde_json::json!({ "row": row }));
            }
        }
    }
}

/// Look-up kernels on forms that differ in nothing but the bits of a code.
fn cost_law(ks: &Kernels) {
    let form = |bits| PackedForm {
        codes: Codes::Planes(bits),
        values: Values::Offset(0),
        group: 128,
        scale: ScaleKind::F16Min,
    };
    for kernel in ks.variants(form(1)).iter().filter(|kernel| kernel.tables) {
        for bits in 1..=4u8 {
            let form = form(bits);
            let Some(variant) = ks.variants(form).iter().position(|other| other.name == kernel.name) else {
                continue; // a kernel for fewer bits only
            };
            let codes: Vec<u8> = (0..ROWS * COLS).map(|i| (i * 37 % 61) as u8 & ((1 << bits) - 1)).collect();
            let w = PackedMatrix::from_codes(form, ROWS, COLS, &codes, 0x2e66, 0xad21);
            let time = cached(Plan { variant, ..Plan::default() }, ks, &w, 1);
            let row = serde_json::json!({
                "isa": ks.isa.name(), "kernel": kernel.name, "bits": bits,
                "nanoseconds": time * 1e9 / (ROWS * COLS) as f64,
            });
            println!("{}", serde_json::json!({ "cost": row }));
        }
    }
}

fn main() {
    let o = options();
    for ks in &o.isa {
        cost_law(ks);
        for &ty in &o.types {
            PackedForm::candidates(ty).into_iter().for_each(|form| bench_form(&o, ks, ty, form));
        }
    }
}
