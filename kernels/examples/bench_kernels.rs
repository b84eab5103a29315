//! Speed of products per packed form, instruction set, threads and batch, beside the read bandwidth of the same memory.
//!
//! `cargo run --release --example bench_kernels -- [--json] [--types Q4_0,…] [--isa avx512,…] [--threads 1,2] [--batch 1,8,256]
//! [--mebibytes 512] [--rounds 7] [--all-forms]`
//!
//! A round reads the packed matrix once and multiplies it once, one after the other, so that both see the same pages and the
//! same state of a machine that other things may share; figures are medians over the rounds. `cached` figures are of a
//! matrix that stays in the second-level cache, one thread.

use lutra_kernels::{available, matmul, pack_as, Activations, Kernels, PackedForm, PackedMatrix, Pool, SourceType};
use std::time::Instant;

const COLS: usize = 2048;

struct Options {
    json: bool,
    all_forms: bool,
    types: Vec<SourceType>,
    isa: Vec<&'static Kernels>,
    threads: Vec<usize>,
    batch: Vec<usize>,
    mebibytes: usize,
    rounds: usize,
}

fn options() -> Options {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let mut o = Options {
        json: false,
        all_forms: false,
        types: SourceType::ALL.into_iter().filter(|ty| *ty != SourceType::F32).collect(),
        isa: available().into_iter().skip(1).collect(),
        threads: if cores > 1 { vec![1, cores] } else { vec![1] },
        batch: vec![1, 8, 256],
        mebibytes: 512,
        rounds: 7,
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut list = || -> Vec<String> {
            let value = args.next().unwrap_or_else(|| panic!("{arg} takes a value"));
            value.split(',').map(String::from).collect()
        };
        let numbers = |list: Vec<String>| list.iter().map(|n| n.parse().expect("a number")).collect::<Vec<usize>>();
        match arg.as_str() {
            "--json" => o.json = true,
            "--all-forms" => o.all_forms = true,
            "--types" => {
                let named =
                    |name: &String| SourceType::ALL.into_iter().find(|ty| format!("{ty:?}") == *name).expect("a type");
                o.types = list().iter().map(named).collect();
            }
            "--isa" => {
                let names = list();
                o.isa = available().into_iter().filter(|ks| names.iter().any(|name| name == ks.isa.name())).collect();
            }
            "--threads" => o.threads = numbers(list()),
            "--batch" => o.batch = numbers(list()),
            "--mebibytes" => o.mebibytes = numbers(list())[0],
            "--rounds" => o.rounds = numbers(list())[0],
            _ => panic!("unknown option {arg}"),
        }
    }
    o
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

fn matrix(form: PackedForm, ty: SourceType, rows: usize, pool: &Pool) -> PackedMatrix {
    // Neither NaN nor all alike: the values do not matter to the time.
    let bytes = ty.tensor_bytes(rows, COLS).expect("whole blocks");
    let src: Vec<u8> = (0..bytes).map(|i| (i * 37 % 61) as u8).collect();
    pack_as(form, ty, &src, rows, COLS, pool).expect("a packed matrix")
}

fn activations(ks: &Kernels, w: &PackedMatrix, n: usize, pool: &Pool) -> Activations {
    let x: Vec<f32> = (0..n * COLS).map(|i| (i % 17) as f32 - 8.0).collect();
    let mut act = Activations::new();
    act.prepare(ks, &x, n, COLS, &[w.form], pool);
    act
}

fn name(form: PackedForm) -> String {
    format!("{:?}", form.codes).to_lowercase().replace(['(', ')'], "")
}

fn main() {
    let o = options();
    if !o.json {
        println!(
            "{:8} {:13} {:7} {:>3} {:>5} {:>9} {:>7} {:>9} {:>6} {:>9}",
            "type", "codes", "isa", "thr", "batch", "Gw/s", "GB/s", "bandwidth", "share", "cached"
        );
    }
    for &ty in &o.types {
        for form in PackedForm::candidates(ty) {
            for ks in &o.isa {
                let preferred = ks.form(ty) == form;
                if !(preferred || o.all_forms && ks.has_kernel(form)) {
                    continue;
                }
                let one = Pool::new(1);
                let small = matrix(form, ty, 256, &one);
                let bits = small.bytes() as f64 * 8.0 / (256 * COLS) as f64;
                let rows = ((o.mebibytes << 20) as f64 / (bits / 8.0) / COLS as f64) as usize / 256 * 256;
                let most = Pool::new(o.threads.iter().copied().max().unwrap_or(1));
                let large = matrix(form, ty, rows, &most);
                for &threads in &o.threads {
                    let pool = Pool::new(threads);
                    let _awake = pool.session();
                    for &n in &o.batch {
                        let weights = (256 * COLS * n) as f64;
                        let act = activations(ks, &small, n, &one);
                        let mut y = vec![0f32; n * 256];
                        let times = (0..200 / n.min(20) + 5)
                            .map(|_| seconds(|| matmul(ks, &small, &act, &mut y, 256, &one)))
                            .collect();
                        let cached = weights / median(times) / 1e9;
                        // A batch that is limited by computation needs no large matrix.
                        let (w, repeat) = if n > 16 { (&small, 4) } else { (&large, 1) };
                        let mut y = vec![0f32; n * w.rows];
                        let (mut read, mut product) = (vec![], vec![]);
                        for _ in 0..o.rounds {
                            read.push(seconds(|| w.read(ks, &pool)));
                            let run = || (0..repeat).for_each(|_| matmul(ks, w, &act, &mut y, w.rows, &pool));
                            product.push(seconds(run) / repeat as f64);
                        }
                        let (read, product) = (median(read), median(product));
                        let gweights = (w.rows * COLS * n) as f64 / product / 1e9;
                        let (gbps, bandwidth) = (w.bytes() as f64 / product / 1e9, w.bytes() as f64 / read / 1e9);
                        let share = gbps / bandwidth;
                        if o.json {
                            let row = serde_json::json!({
                                "form": format!("{ty:?}"), "codes": name(form), "preferred": preferred, "bits": bits,
                                "isa": ks.isa.name(), "threads": threads, "batch": n, "gweights": gweights,
                                "gbps": gbps, "bandwidth": bandwidth, "share": share, "cachedGweights": cached,
                            });
                            println!("{row}");
                        } else {
                            let codes = name(form) + if preferred { "*" } else { "" };
                            println!(
                                "{:8} {codes:13} {:7} {threads:3} {n:5} {gweights:9.1} {gbps:7.1} {bandwidth:9.1} {:5.0}% {cached:9.1}",
                                format!("{ty:?}"),
                                ks.isa.name(),
                                100.0 * share
                            );
                        }
                    }
                }
            }
        }
    }
}
