//! Products: every instruction set gives portable's bits, and portable gives the specified ones.

use super::{assert_same, has_wide_scale, is_float, scales, set_scales, source, stride, Random, Weights};
use lutra_kernels::ops::Activation;
use lutra_kernels::{
    available, dequantize, matmul, matmul_all, matmul_by, matmul_gated, ops, pack, pack_as, select, Activations,
    Kernels, PackedForm, PackedMatrix, Plan, Pool, Precision, SourceType,
};

/// y = x·Wᵀ with activations prepared for this matrix alone.
fn product(ks: &Kernels, w: &PackedMatrix, x: &[f32], pool: &Pool) -> Vec<f32> {
    product_of(Precision::A8, ks, w, x, pool)
}

fn product_of(precision: Precision, ks: &Kernels, w: &PackedMatrix, x: &[f32], pool: &Pool) -> Vec<f32> {
    let n = x.len() / w.cols;
    let mut act = Activations::with_precision(precision);
    act.prepare(ks, x, n, w.cols, &[w.form], pool);
    let mut y = vec![f32::NAN; n * w.rows];
    matmul(ks, w, &act, &mut y, w.rows, pool);
    y
}

/// The specification, written from the source blocks: no packing, no tiles.
fn specified(ty: SourceType, src: &[u8], rows: usize, cols: usize, x: &[f32]) -> Vec<f32> {
    let block = ty.block_elements();
    let mut y = vec![];
    if is_float(ty) {
        let mut w = vec![0f32; rows * cols];
        dequantize(ty, src, &mut w).unwrap();
        for x in x.chunks_exact(cols) {
            for w in w.chunks_exact(cols) {
                let mut acc = [0f32; 4];
                for k in 0..cols {
                    acc[k % 4] = w[k].mul_add(x[k], acc[k % 4]);
                }
                y.push((acc[0] + acc[1]) + (acc[2] + acc[3]));
            }
        }
        return y;
    }
    // What the codes (times their sub-scales) are worth with d = 1 and m = 0, and the minima with d = 0 and m = 1. Values of some
    // types are fractions: their codes are those of a larger d, a power of two.
    let half = |bits: u16| {
        let mut value = [0f32];
        dequantize(SourceType::F16, &bits.to_le_bytes(), &mut value).unwrap();
        value[0]
    };
    let one = match ty {
        SourceType::IQ1_S | SourceType::IQ1_M => 0x4800,
        SourceType::IQ2_XXS | SourceType::IQ2_XS | SourceType::IQ2_S => 0x4800,
        SourceType::IQ3_XXS => 0x4000,
        _ => 0x3c00,
    };
    let (mut unit, mut minima) = (src.to_vec(), src.to_vec());
    let (mut ds, mut mins) = (vec![], vec![]);
    let blocks = unit.chunks_exact_mut(ty.block_bytes()).zip(minima.chunks_exact_mut(ty.block_bytes()));
    for (unit, minima) in blocks.take(rows * cols / block) {
        if ty == SourceType::MXFP4 {
            ds.push(2f64.powi(unit[0] as i32 - 128) as f32);
            unit[0] = 128;
        }
        if has_wide_scale(ty) {
            ds.push(f32::from_le_bytes(unit[..4].try_into().unwrap()));
            unit[..4].copy_from_slice(&1f32.to_le_bytes());
        }
        let Some((d, min)) = scales(ty, unit) else { continue };
        ds.push(half(d) / half(one));
        mins.extend(min.map(half));
        set_scales(ty, unit, one, 0);
        set_scales(ty, minima, 0, 0x3c00);
    }
    if ty == SourceType::I2_S {
        let at = unit.len() - 32;
        ds = vec![f32::from_le_bytes(unit[at..at + 4].try_into().unwrap()); rows * cols / block];
        unit[at..at + 4].copy_from_slice(&1f32.to_le_bytes());
    }
    let mut codes = vec![0f32; rows * cols];
    dequantize(ty, &unit, &mut codes).unwrap();
    let mut min_codes = vec![0f32; rows * cols];
    if !mins.is_empty() {
        dequantize(ty, &minima, &mut min_codes).unwrap();
    }
    for x in x.chunks_exact(cols) {
        let quantized: Vec<(f32, Vec<i32>)> = x
            .chunks_exact(block)
            .map(|x| {
                if !x.iter().all(|v| v.is_finite()) {
                    return (f32::NAN, vec![0; block]);
                }
                let largest = x.iter().fold(0f32, |m, v| m.max(v.abs()));
                if largest < 1e-30 {
                    return (0.0, vec![0; block]);
                }
                let factor = 127.0 / largest;
                (largest / 127.0, x.iter().map(|v| (v * factor).round_ties_even() as i32).collect())
            })
            .collect();
        for row in 0..rows {
            let mut acc = 0f32;
            for (g, (d, q)) in quantized.iter().enumerate() {
                let codes = &codes[row * cols + g * block..][..block];
                let sum: i32 = codes.iter().zip(q).map(|(&w, &a)| w as i32 * a).sum();
                acc = (ds[row * cols / block + g] * d).mul_add(sum as f32, acc);
                if !mins.is_empty() {
                    let codes = &min_codes[row * cols + g * block..][..block];
                    let sum: i32 = codes.iter().zip(q).map(|(&w, &a)| w as i32 * a).sum();
                    acc = (mins[row * cols / block + g] * d).mul_add(sum as f32, acc);
                }
            }
            y.push(acc);
        }
    }
    y
}

/// Rows of activations: n × k.
fn activations(kind: usize, n: usize, k: usize, random: &mut Random) -> Vec<f32> {
    let mut x = random.floats(n * k);
    match kind {
        0 => {}
        1 => x.fill(0.0),
        // Every code is 127 or −127: the largest sums there are.
        2 => x.fill(1.0),
        3 => x.fill(-1.0),
        4 => x.iter_mut().enumerate().for_each(|(i, v)| *v = if i % 2 == 0 { 1.0 } else { -1.0 }),
        5 => x.iter_mut().enumerate().for_each(|(i, v)| *v = if i / 4 % 2 == 0 { 1.0 } else { -1.0 }),
        // Groups of very different size, and ones that vanish.
        6 => x.iter_mut().enumerate().for_each(|(i, v)| *v *= [1e30, 1.0, 1e-33, 1e-40, 1e-29][i / 32 % 5]),
        7 => x.iter_mut().enumerate().for_each(|(i, v)| *v = if i % 37 == 5 { f32::NAN } else { *v }),
        8 => x.iter_mut().enumerate().for_each(|(i, v)| *v = if i % 41 == 7 { f32::INFINITY } else { *v }),
        9 => x.iter_mut().enumerate().for_each(|(i, v)| *v = if i % 3 == 0 { f32::MAX } else { -f32::MAX }),
        // Halves between codes: rounding to even matters.
        10 => {
            x.iter_mut().enumerate().for_each(|(i, v)| *v = if i % 32 == 0 { 127.0 } else { (i % 200) as f32 - 99.5 })
        }
        _ => x.iter_mut().for_each(|v| *v = f32::from_bits(random.word() as u32)),
    }
    x
}
const KINDS: usize = 12;

fn shapes(ty: SourceType) -> &'static [(usize, usize)] {
    match ty.block_elements() {
        1 => &[(1, 1), (16, 3), (17, 4), (33, 5), (40, 64), (64, 172)],
        32 => &[(1, 32), (31, 64), (33, 96), (64, 160)],
        128 => &[(1, 128), (17, 384), (33, 256)],
        _ => &[(1, 256), (33, 512), (64, 768)],
    }
}

#[test]
fn portable_gives_the_specified_bits() {
    let mut random = Random(2);
    let (ks, pool) = (select(Some("portable")).unwrap(), Pool::new(1));
    for ty in SourceType::ALL {
        for &(rows, cols) in shapes(ty) {
            for kind in 0..KINDS {
                for weights in [Weights::Sane, Weights::Hostile] {
                    let src = source(ty, rows * cols, weights, &mut random);
                    let x = activations(kind, 2, cols, &mut random);
                    let expected = specified(ty, &src, rows, cols, &x);
                    for form in PackedForm::candidates(ty) {
                        let w = pack_as(form, ty, &src, rows, cols, &pool).unwrap();
                        let what = format!("{form:?} {rows}×{cols} {weights:?} activations {kind}");
                        assert_same(&product(ks, &w, &x, &pool), &expected, &what);
                    }
                }
            }
        }
    }
}

#[test]
fn every_instruction_set_gives_portables_bits() {
    let mut random = Random(3);
    let (portable, pool) = (select(Some("portable")).unwrap(), Pool::new(1));
    let fills = [0x00, 0x11, 0x55, 0x80, 0xaa, 0xff].map(Weights::Fill);
    let mut case = 0;
    for ty in SourceType::ALL {
        for &(rows, cols) in shapes(ty) {
            for kind in 0..KINDS {
                for weights in [Weights::Sane, Weights::Hostile].into_iter().chain(fills) {
                    case += 1;
                    if case % stride() != 0 {
                        continue;
                    }
                    let n = 1 + random.below(15);
                    let src = source(ty, rows * cols, weights, &mut random);
                    let x = activations(kind, n, cols, &mut random);
                    let w = pack(ty, &src, rows, cols, &pool).unwrap();
                    let expected = product(portable, &w, &x, &pool);
                    for form in PackedForm::candidates(ty) {
                        let w = pack_as(form, ty, &src, rows, cols, &pool).unwrap();
                        for ks in available() {
                            let what =
                                format!("{} {form:?} {rows}×{cols} {weights:?} activations {kind} × {n}", ks.isa);
                            assert_same(&product(ks, &w, &x, &pool), &expected, &what);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn sixteen_bits_give_portables_bits_everywhere() {
    let mut random = Random(31);
    let portable = select(Some("portable")).unwrap();
    for ty in SourceType::ALL {
        for (case, &(rows, cols)) in shapes(ty).iter().enumerate() {
            for kind in (0..KINDS).skip(case % stride()).step_by(stride()) {
                let n = 1 + random.below(11);
                let src = source(ty, rows * cols, Weights::Hostile, &mut random);
                let x = activations(kind, n, cols, &mut random);
                let expected = product_of(
                    Precision::A16,
                    portable,
                    &pack(ty, &src, rows, cols, &Pool::new(1)).unwrap(),
                    &x,
                    &Pool::new(1),
                );
                for form in PackedForm::candidates(ty) {
                    let w = pack_as(form, ty, &src, rows, cols, &Pool::new(1)).unwrap();
                    for ks in available() {
                        for threads in [1, 3] {
                            let y = product_of(Precision::A16, ks, &w, &x, &Pool::new(threads));
                            assert_same(&y, &expected, &format!("{} {form:?} activations {kind} × {n}", ks.isa));
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn sixteen_bits_lose_nothing_of_integers_up_to_32512() {
    let mut random = Random(32);
    let pool = Pool::new(1);
    for ty in SourceType::ALL {
        let (rows, cols, n) = (33, 512, 5);
        let src = source(ty, rows * cols, Weights::Sane, &mut random);
        let mut weights = vec![0f32; rows * cols];
        dequantize(ty, &src, &mut weights).unwrap();
        let w = pack(ty, &src, rows, cols, &pool).unwrap();
        // The largest in every group, so that d is 1 and q is the activation.
        let x: Vec<f32> = (0..n * cols)
            .map(|i| if i % 32 == 7 { 32512.0 } else { random.below(2 * 32512 + 1) as f32 - 32512.0 })
            .collect();
        let y = product_of(Precision::A16, available().last().unwrap(), &w, &x, &pool);
        for (x, y) in x.chunks_exact(cols).zip(y.chunks_exact(rows)) {
            for (w, &y) in weights.chunks_exact(cols).zip(y) {
                let exact: f64 = w.iter().zip(x).map(|(&w, &x)| w as f64 * x as f64).sum();
                // Only the scales and the sums of groups are rounded, at 2^-24 each; with 8 bits it would be 100 times more.
                let most = w.iter().fold(0f32, |most, w| most.max(w.abs())) as f64;
                let bound = 2e-6 * most * x.iter().map(|x| x.abs() as f64).sum::<f64>();
                assert!((y as f64 - exact).abs() <= bound, "{ty:?}: {y} for {exact} ± {bound}");
            }
        }
    }
}

#[test]
fn extreme_sums_are_exact() {
    // Weights of one sign against activations chosen to make every subset sum, plane and group as large as it can be; the
    // value is known without any kernel: rows × k × 127 × code × (1/127).
    let pool = Pool::new(1);
    for (ty, byte, code) in [
        (SourceType::TQ2_0, 0xffu8, 2.0),
        (SourceType::TQ2_0, 0x00, -1.0),
        (SourceType::Q4_0, 0x00, -8.0),
        (SourceType::Q4_0, 0xff, 7.0),
        (SourceType::Q8_0, 0x80, -128.0),
        (SourceType::Q8_0, 0x7f, 127.0),
        (SourceType::TQ1_0, 0xff, 1.0),
        (SourceType::TQ1_0, 0x00, -1.0),
        (SourceType::Q4_1, 0xff, 15.0),
        (SourceType::Q5_0, 0x00, -16.0),
        (SourceType::Q5_1, 0xff, 31.0),
        (SourceType::Q2_K, 0xff, 15.0 * 3.0),
        (SourceType::Q3_K, 0xff, 31.0 * 3.0),
        (SourceType::Q3_K, 0x00, -32.0 * -4.0),
        (SourceType::Q4_K, 0xff, 63.0 * 15.0),
        (SourceType::Q5_K, 0xff, 63.0 * 31.0),
        (SourceType::Q6_K, 0xff, -31.0),
        (SourceType::Q6_K, 0x00, 0.0),
        (SourceType::IQ4_NL, 0x00, -127.0),
        (SourceType::IQ4_NL, 0xff, 113.0),
        (SourceType::IQ4_XS, 0x00, -32.0 * -127.0),
        (SourceType::IQ4_XS, 0xff, 31.0 * 113.0),
        (SourceType::IQ3_XXS, 0x00, 0.25 * 4.0),
        (SourceType::IQ3_S, 0x00, 1.0),
        (SourceType::IQ2_XXS, 0x00, 1.0),
        (SourceType::IQ2_XS, 0xff, 31.0 / 8.0 * -43.0),
        (SourceType::IQ2_S, 0xff, 31.0 / 8.0 * -43.0),
        (SourceType::IQ1_S, 0x00, -1.0 + 0.125),
        (SourceType::IQ1_S, 0xff, 15.0 * (1.0 - 0.125)),
        (SourceType::IQ1_M, 0x00, -1.0 + 0.125),
        (SourceType::IQ1_M, 0xff, 15.0 * (1.0 - 0.125)),
        (SourceType::MXFP4, 0x77, 12.0),
        (SourceType::MXFP4, 0xff, -12.0),
        (SourceType::I2_S, 0xff, 2.0),
        (SourceType::L1, 0xff, 1.0),
        (SourceType::L2, 0xff, 3.0),
        (SourceType::L3, 0xff, 7.0),
    ] {
        let k = 512;
        let src = source(ty, 32 * k, Weights::Fill(byte), &mut Random(0));
        // Of rows one, and as many as some kernels take otherwise: by four, by two, and one.
        for (sign, n) in [(1.0f32, 1), (1.0, 7), (-1.0, 1), (-1.0, 7)] {
            let x = vec![127.0 * sign; n * k]; // d = 1, so that the product is the integer itself
            for ks in available() {
                let w = pack_as(ks.form(ty), ty, &src, 32, k, &pool).unwrap();
                let y = product(ks, &w, &x, &pool);
                let expected = k as f32 * 127.0 * code * sign;
                assert!(y.iter().all(|&v| v == expected), "{} {ty:?} {byte:#x}: {} for {expected}", ks.isa, y[0]);
            }
        }
    }
}

#[test]
fn threads_batches_and_shared_preparation_change_nothing() {
    let mut random = Random(4);
    let pools = [1, 2, 3, 8].map(Pool::new);
    for ty in SourceType::ALL {
        // More activations than one block holds, and no whole number of batches.
        let (rows, cols, n) = (70, 1024, 70);
        let src = source(ty, rows * cols, Weights::Sane, &mut random);
        let x = random.floats(n * cols);
        for ks in available() {
            let w = pack_as(ks.form(ty), ty, &src, rows, cols, &pools[1]).unwrap();
            let expected = product(ks, &w, &x, &pools[0]);
            for pool in &pools {
                let what = format!("{} {ty:?} {} threads", ks.isa, pool.threads());
                assert_same(&product(ks, &w, &x, pool), &expected, &what);
            }
            for (i, x) in x.chunks_exact(cols).enumerate() {
                let alone = product(ks, &w, x, &pools[1]);
                assert_same(&alone, &expected[i * rows..][..rows], &format!("{} {ty:?} row {i} alone", ks.isa));
            }
            // One scratch, used before for more rows and for other forms, and a wider output.
            let forms = SourceType::ALL.map(|ty| ks.form(ty));
            let mut act = Activations::new();
            act.prepare(ks, &random.floats(80 * 1280), 80, 1280, &forms, &pools[1]);
            act.prepare(ks, &x, n, cols, &forms, &pools[1]);
            let stride = rows + 5;
            let mut y = vec![7f32; (n - 1) * stride + rows];
            matmul(ks, &w, &act, &mut y, stride, &pools[2]);
            for (i, y) in y.chunks(stride).enumerate() {
                assert_same(&y[..rows], &expected[i * rows..][..rows], &format!("{} {ty:?} shared", ks.isa));
                assert!(y[rows..].iter().all(|&v| v == 7.0), "{} {ty:?} wrote between rows", ks.isa);
            }
        }
    }
}

#[test]
fn every_plan_gives_the_same_bits() {
    // What the tuner may choose, and more: each form, kernel, number of rows at once and block size.
    let mut random = Random(6);
    let pool = Pool::new(2);
    for ty in SourceType::ALL {
        let (rows, cols, n) = (49, 1024, 21);
        let src = source(ty, rows * cols, Weights::Sane, &mut random);
        let x = random.floats(n * cols);
        let portable = select(Some("portable")).unwrap();
        let expected = product(portable, &pack(ty, &src, rows, cols, &pool).unwrap(), &x, &pool);
        for form in PackedForm::candidates(ty) {
            let w = pack_as(form, ty, &src, rows, cols, &pool).unwrap();
            for ks in available().into_iter().filter(|ks| ks.isa != portable.isa) {
                for (variant, of) in ks.variants(form).iter().enumerate() {
                    for width in (0..=9).chain([16, usize::MAX]) {
                        for block_bytes in [0, 1, 5000, 16 << 10, 256 << 10, usize::MAX] {
                            let plan = Plan { variant, width, block_bytes };
                            let (mut act, mut y) = (Activations::new(), vec![0f32; n * rows]);
                            act.prepare(ks, &x, n, cols, &[form], &pool);
                            matmul_by(plan, ks, &w, &act, &mut y, rows, &pool);
                            assert_same(&y, &expected, &format!("{} {} {form:?} {plan:?}", ks.isa, of.name));
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn products_are_near_the_exact_ones() {
    // Against f64 on the dequantised weights. Rounding activations to 8 bits errs by at most d/2 each, d = max|x|/127 ≤ 1/127;
    // the f32 sums add no more than 1e-5 of Σ|w·x|.
    let mut random = Random(5);
    let pool = Pool::new(1);
    for ty in SourceType::ALL {
        let (rows, cols) = (40, 768);
        let src = source(ty, rows * cols, Weights::Sane, &mut random);
        let mut w = vec![0f32; rows * cols];
        dequantize(ty, &src, &mut w).unwrap();
        let x = random.floats(cols);
        for ks in available() {
            let packed = pack_as(ks.form(ty), ty, &src, rows, cols, &pool).unwrap();
            for (y, w) in product(ks, &packed, &x, &pool).into_iter().zip(w.chunks_exact(cols)) {
                let terms = || w.iter().zip(&x).map(|(&w, &x)| w as f64 * x as f64);
                let rounding: f64 = w.iter().map(|w| w.abs() as f64 / 254.0).sum();
                let quantized = if is_float(ty) { 0.0 } else { rounding };
                let bound = quantized + 1e-5 * terms().map(f64::abs).sum::<f64>();
                let exact: f64 = terms().sum();
                assert!((y as f64 - exact).abs() <= bound, "{} {ty:?}: {y} for {exact} ± {bound}", ks.isa);
            }
        }
    }
}

#[test]
fn selection_is_by_name() {
    assert_eq!(select(Some("portable")).unwrap().isa.name(), "portable");
    assert_eq!(available()[0].isa.name(), "portable");
    for ks in available() {
        assert_eq!(select(Some(ks.isa.name())).unwrap().isa, ks.isa);
    }
    let error = select(Some("mmx")).unwrap_err();
    assert!(error.code == -3 && error.message.contains("portable"), "{error}");
}

#[test]
#[should_panic(expected = "were not prepared")]
fn unprepared_activations_are_refused() {
    let (ks, pool) = (select(None).unwrap(), Pool::new(1));
    let src = source(SourceType::Q4_0, 64, Weights::Fill(0), &mut Random(0));
    let w = pack(SourceType::Q4_0, &src, 1, 64, &pool).unwrap();
    let mut act = Activations::new();
    act.prepare(ks, &[0.0; 64], 1, 64, &[lutra_kernels::PackedForm::of(SourceType::F32)], &pool);
    matmul(ks, &w, &act, &mut [0.0], 1, &pool);
}

/// Several matrices in one job, of different forms and heights: each gives what it gives alone.
#[test]
fn products_in_one_job_are_those_of_each_alone() {
    let mut random = Random(61);
    let cols = 512;
    let forms = [
        (SourceType::Q4_0, 33),
        (SourceType::Q6_K, 16),
        (SourceType::TQ2_0, 200),
        (SourceType::F16, 5),
        (SourceType::Q2_K, 64),
    ];
    for ks in available() {
        let pool = Pool::new(1);
        let matrices: Vec<PackedMatrix> = forms
            .iter()
            .map(|&(ty, rows)| {
                let src = source(ty, rows * cols, Weights::Sane, &mut random);
                pack_as(ks.form(ty), ty, &src, rows, cols, &pool).unwrap()
            })
            .collect();
        // A matrix that goes with each as the other half of a gated pair, of another form.
        let others: Vec<PackedMatrix> = forms
            .iter()
            .map(|&(_, rows)| {
                let src = source(SourceType::Q8_0, rows * cols, Weights::Sane, &mut random);
                pack(SourceType::Q8_0, &src, rows, cols, &pool).unwrap()
            })
            .collect();
        // More than one block of activations in the last case.
        for n in [1, 3, 9, 600] {
            if n > 9 && ks.isa == lutra_kernels::Isa::Portable {
                continue;
            }
            let x = random.floats(n * cols);
            let alone = |w: &PackedMatrix| product(ks, w, &x, &Pool::new(1));
            for threads in [1, 2, 3, 7] {
                let pool = Pool::new(threads);
                let mut act = Activations::new();
                let all: Vec<PackedForm> = matrices.iter().chain(&others).map(|w| w.form).collect();
                act.prepare(ks, &x, n, cols, &all, &pool);
                let mut found: Vec<Vec<f32>> = matrices.iter().map(|w| vec![f32::NAN; n * w.rows]).collect();
                let [a, b, c, d, e] = &mut found[..] else { unreachable!() };
                let [v, w, x, y, z] = &matrices[..] else { unreachable!() };
                let plan = Plan::default();
                let products = [(plan, v, a), (plan, w, b), (plan, x, c), (plan, y, d), (plan, z, e)];
                matmul_all(ks, products.map(|(plan, w, y)| (plan, w, &mut y[..])), &act, &pool);
                for (w, found) in matrices.iter().zip(&found) {
                    assert_same(found, &alone(w), &format!("{} {w:?} × {n}, {threads} threads", ks.isa));
                }
                for (w, other) in matrices.iter().zip(&others) {
                    let mut expected = alone(w);
                    ops::activate(ks, Activation::Silu, &mut expected, Some(&alone(other)));
                    let (mut y, mut scratch) = (vec![f32::NAN; n * w.rows], vec![f32::NAN; n * w.rows]);
                    let silu =
                        |ks: &Kernels, x: &mut [f32], up: &[f32]| ops::activate(ks, Activation::Silu, x, Some(up));
                    matmul_gated(ks, [w, other].map(|w| (plan, w)), silu, &act, &mut y, &mut scratch, &pool);
                    assert_same(&y, &expected, &format!("{} gated {w:?} × {n}, {threads} threads", ks.isa));
                }
            }
        }
    }
}
