//! One product by one kernel, for tools that look at the instructions that it executes (`bench/mca.ts`).
//!
//! `one_product TYPE CODES ISA BATCH`, for example `one_product Q4_0 fields4 neon-dotprod 1`: 32 × 1024 weights, with batches
//! above 8 fewer columns, one thread.

use lutra_kernels::{matmul, pack_as, select, Activations, PackedForm, Pool, SourceType};

const ROWS: usize = 32;
/// Columns, at most, and columns times rows of activations.
const COLS: usize = 1024;
const PRODUCTS: usize = 8 * COLS;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let [_, ty, codes, isa, batch] = &args[..] else { panic!("usage: one_product TYPE CODES ISA BATCH") };
    let ty = SourceType::ALL.into_iter().find(|known| format!("{known:?}") == *ty).expect("a type");
    let name = |form: &PackedForm| format!("{:?}", form.codes).to_lowercase().replace(['(', ')'], "");
    let form = PackedForm::candidates(ty).into_iter().find(|form| name(form) == *codes).expect("a form of the type");
    let (ks, pool, n) = (select(Some(isa)).expect("a set"), Pool::new(1), batch.parse::<usize>().expect("a number"));
    let cols = COLS.min(PRODUCTS / n);
    assert!(ks.has_kernel(form), "{isa} has no kernel of its own for {form:?}");
    let src = vec![0; ty.tensor_bytes(ROWS, cols).expect("whole blocks")];
    let w = pack_as(form, ty, &src, ROWS, cols, &pool).expect("a packed matrix");
    let mut act = Activations::new();
    act.prepare(ks, &vec![1.0; n * cols], n, cols, &[form], &pool);
    let mut y = vec![0.0; n * ROWS];
    matmul(ks, &w, &act, &mut y, ROWS, &pool);
    println!("{} weights of {} bytes", ROWS * cols * n, w.bytes() as f64 / (ROWS * cols) as f64);
}
