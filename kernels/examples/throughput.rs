//! Speed of one product with a matrix in cache and one in memory, per form and instruction set, beside the read bandwidth
//! measured in the same run. Orders of magnitude on a machine that does other things too; `bench/` has the careful numbers.
//!
//! `cargo run --release --example throughput -- [threads] [mebibytes]`

use lutra_kernels::bandwidth::measure_read_bandwidth;
use lutra_kernels::{available, matmul, pack_as, select, Activations, Kernels, PackedMatrix, Pool, SourceType};
use std::time::{Duration, Instant};

/// The shortest of many runs, in seconds.
fn time(mut f: impl FnMut()) -> f64 {
    let (start, mut best) = (Instant::now(), f64::INFINITY);
    while start.elapsed() < Duration::from_millis(300) {
        let one = Instant::now();
        f();
        best = best.min(one.elapsed().as_secs_f64());
    }
    best
}

fn matrix(ks: &Kernels, ty: SourceType, rows: usize, cols: usize, pool: &Pool) -> PackedMatrix {
    // Scales and codes that are neither NaN nor all alike: the pattern does not matter to the time.
    let bytes = ty.tensor_bytes(rows, cols).expect("whole blocks");
    let src: Vec<u8> = (0..bytes).map(|i| (i * 37 % 61) as u8).collect();
    pack_as(ks.form(ty), ty, &src, rows, cols, pool).expect("a packed matrix")
}

fn product(ks: &Kernels, w: &PackedMatrix, n: usize, pool: &Pool) -> f64 {
    let x: Vec<f32> = (0..n * w.cols).map(|i| (i % 17) as f32 - 8.0).collect();
    let (mut act, mut y) = (Activations::new(), vec![0f32; n * w.rows]);
    act.prepare(ks, &x, n, w.cols, &[w.form], pool);
    (w.rows * w.cols * n) as f64 / time(|| matmul(ks, w, &act, &mut y, w.rows, pool)) / 1e9
}

fn main() {
    let mut args = std::env::args().skip(1).map(|arg| arg.parse::<usize>().expect("a number"));
    let (threads, mebibytes) = (args.next().unwrap_or(1), args.next().unwrap_or(512));
    let pool = Pool::new(threads);
    let best = select(None).expect("kernels");
    let bandwidth = measure_read_bandwidth(best, &pool, mebibytes << 20).expect("memory");
    println!("{threads} threads, {} reads {bandwidth:.1} GB/s", best.isa);
    println!("{:8} {:8} {:>9} {:>9} {:>9} {:>7} {:>7}", "type", "isa", "L2 Gw/s", "×256", "RAM Gw/s", "GB/s", "share");
    for ty in SourceType::ALL {
        for ks in available().into_iter().filter(|ks| ks.isa == best.isa || threads == 1) {
            let small = matrix(ks, ty, 256, 2048, &pool);
            let (cached, many) = (product(ks, &small, 1, &pool), product(ks, &small, 256, &pool));
            let bytes_per_weight = small.bytes() as f64 / (256.0 * 2048.0);
            print!("{:8} {:8} {cached:9.2} {many:9.2}", format!("{ty:?}"), ks.isa);
            if ks.isa == best.isa {
                let rows = ((mebibytes << 20) as f64 / bytes_per_weight / 2048.0) as usize;
                let large = product(ks, &matrix(ks, ty, rows, 2048, &pool), 1, &pool);
                let gbps = large * bytes_per_weight;
                print!(" {large:9.2} {gbps:7.1} {:6.0}%", 100.0 * gbps / bandwidth);
            }
            println!();
        }
    }
    let x: Vec<f32> = (0..2048).map(|i| (i % 17) as f32 - 8.0).collect();
    for ty in [SourceType::Q4_0, SourceType::TQ2_0, SourceType::TQ1_0] {
        let form = best.form(ty);
        let mut act = Activations::new();
        let seconds = time(|| act.prepare(best, &x, 1, 2048, &[form], &pool));
        println!("preparing 2048 activations for {ty:?}: {:.2} µs", seconds * 1e6);
    }
}
