//! Speed of packing, in GB/s of source bytes, per packed form and number of threads.
//!
//! `cargo run --release --example bench_pack -- [--types Q4_0,…] [--threads 1,2] [--mebibytes 64] [--rounds 5]`
//!
//! The source is in memory and the packed matrix in memory new from the system, as when a model's file is in the page cache;
//! figures are medians over the rounds.

use lutra_kernels::{pack_as, PackedForm, Pool, SourceType};
use std::time::Instant;

const COLS: usize = 2048;

fn main() {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let (mut types, mut threads) = (SourceType::ALL.to_vec(), vec![1, cores]);
    let (mut mebibytes, mut rounds) = (64, 5);
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let value = args.next().unwrap_or_else(|| panic!("{arg} takes a value"));
        let number = |text: &str| text.parse::<usize>().expect("a number");
        match arg.as_str() {
            "--types" => types.retain(|ty| value.split(',').any(|name| name == format!("{ty:?}"))),
            "--threads" => threads = value.split(',').map(number).collect(),
            "--mebibytes" => mebibytes = number(&value),
            "--rounds" => rounds = number(&value).max(1),
            _ => panic!("unknown option {arg}"),
        }
    }
    println!("{:8} {:22} {:>7} {:>6}", "type", "codes", "threads", "GB/s");
    for ty in types {
        let rows = ((mebibytes << 20) / ty.tensor_bytes(1, COLS).expect("whole blocks")).max(1);
        let src = ty.arbitrary(rows, COLS).expect("whole blocks");
        for form in PackedForm::candidates(ty) {
            for &threads in &threads {
                let pool = Pool::new(threads);
                let mut rates: Vec<f64> = (0..rounds)
                    .map(|_| {
                        let start = Instant::now();
                        pack_as(form, ty, &src, rows, COLS, &pool).expect("a packed matrix");
                        src.len() as f64 / start.elapsed().as_secs_f64() / 1e9
                    })
                    .collect();
                rates.sort_by(f64::total_cmp);
                let (ty, codes) = (format!("{ty:?}"), format!("{:?}", form.codes));
                println!("{ty:8} {codes:22} {threads:7} {:6.2}", rates[rounds / 2]);
            }
        }
    }
}
