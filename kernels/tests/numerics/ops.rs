//! Float operations: every instruction set gives portable's bits, and they are near the exact values.

use super::{assert_same, same, Random};
use lutra_kernels::ops::{self, Activation, RopeStyle};
use lutra_kernels::{available, select, Kernels};

const LENGTHS: [usize; 14] = [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 172, 1000];

/// Values of a kind: ordinary, large and small, or any bits.
fn values(kind: usize, n: usize, random: &mut Random) -> Vec<f32> {
    (0..n)
        .map(|_| match kind {
            0 => random.float() * 4.0,
            1 => random.float() * [1e-38, 1e-20, 1.0, 100.0, 1e20, 1e38][random.below(6)],
            _ => f32::from_bits(random.word() as u32),
        })
        .collect()
}

/// Everything an operation gives, as one list.
fn all_ops(ks: &Kernels, x: &[f32], y: &[f32], half: &[u16]) -> Vec<(&'static str, Vec<f32>)> {
    let n = x.len();
    let on = |f: &dyn Fn(&mut [f32])| {
        let mut out = x.to_vec();
        f(&mut out);
        out
    };
    let mut normed = vec![0.0; n];
    ops::rms_norm(ks, x, y, 1e-5, &mut normed);
    let mut layer_normed = vec![0.0; n];
    ops::layer_norm(ks, x, y, Some(y), 1e-5, &mut layer_normed);
    let mut halves = vec![0u16; n];
    ops::to_f16(ks, x, &mut halves);
    let mut floats = vec![0.0; n];
    ops::from_f16(ks, half, &mut floats);
    let mut codes = vec![0i8; n];
    let scale = ops::to_q8(ks, x, &mut codes);
    let angles = n / 2;
    vec![
        ("add", on(&|x| ops::add(ks, x, y))),
        ("scale", on(&|x| ops::scale(ks, x, 1.7))),
        ("silu", on(&|x| ops::activate(ks, Activation::Silu, x, Some(y)))),
        ("gelu", on(&|x| ops::activate(ks, Activation::Gelu, x, Some(y)))),
        ("gelu tanh", on(&|x| ops::activate(ks, Activation::GeluTanh, x, None))),
        ("relu", on(&|x| ops::activate(ks, Activation::Relu, x, None))),
        ("relu squared", on(&|x| ops::activate(ks, Activation::ReluSquared, x, Some(y)))),
        ("softcap", on(&|x| ops::softcap(ks, x, 30.0))),
        ("exp", on(&|x| ops::exp(ks, x, 0.3))),
        ("softmax", on(&|x| ops::softmax(ks, x))),
        ("rms_norm", normed),
        ("layer_norm", layer_normed),
        ("dot", vec![ops::dot(ks, x, y)]),
        ("dot_f16", vec![ops::dot_f16(ks, x, half)]),
        ("axpy", on(&|x| ops::axpy(ks, x, 0.37, y))),
        ("axpy_f16", on(&|x| ops::axpy_f16(ks, x, 0.37, half))),
        ("max", vec![ops::max(ks, x)]),
        ("sum", vec![ops::sum(ks, x)]),
        ("to_f16", halves.into_iter().map(f32::from).collect()),
        ("from_f16", floats),
        ("to_q8", codes.into_iter().map(f32::from).chain([scale]).collect()),
        ("rope norm", on(&|x| ops::rope(ks, x, &y[..angles], &y[angles..2 * angles], RopeStyle::Norm))),
        ("rope neox", on(&|x| ops::rope(ks, x, &y[..angles], &y[angles..2 * angles], RopeStyle::Neox))),
    ]
}

#[test]
fn every_instruction_set_gives_portables_bits() {
    let mut random = Random(6);
    let portable = select(Some("portable")).unwrap();
    for n in LENGTHS {
        for kind in 0..3 {
            let (x, y) = (values(kind, n, &mut random), values(kind, n, &mut random));
            let half: Vec<u16> = (0..n).map(|_| random.word() as u16).collect();
            let expected = all_ops(portable, &x, &y, &half);
            for ks in available() {
                for ((name, got), (_, expected)) in all_ops(ks, &x, &y, &half).iter().zip(&expected) {
                    assert_same(got, expected, &format!("{} {name} of {n}, kind {kind}", ks.isa));
                }
            }
        }
    }
}

#[test]
fn reductions_have_the_specified_order() {
    let mut random = Random(7);
    let ks = select(None).unwrap();
    for n in LENGTHS {
        let (a, b) = (random.floats(n), random.floats(n));
        let mut lanes = [0f32; 16];
        for i in 0..n {
            lanes[i % 16] = a[i].mul_add(b[i], lanes[i % 16]);
        }
        let v: Vec<f32> = (0..8).map(|i| lanes[i] + lanes[i + 8]).collect();
        let tree = ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
        assert!(same(ops::dot(ks, &a, &b), tree), "dot of {n}");
    }
}

#[test]
fn exp_is_accurate_from_underflow_to_overflow() {
    for ks in available() {
        let mut worst = 0f64;
        for i in -110_000..=95_000 {
            let x = i as f32 / 1000.0;
            let mut y = [x];
            ops::exp(ks, &mut y, 0.0);
            let exact = (x as f64).exp();
            if exact > f32::MAX as f64 * (1.0 + 6e-8) {
                assert_eq!(y[0], f32::INFINITY, "e^{x}");
            } else {
                // One unit in the last place of the result; of a subnormal one 2^-149.
                let unit = 2f64.powi(exact.log2().floor().max(-126.0) as i32 - 23);
                worst = worst.max((y[0] as f64 - exact).abs() / unit);
            }
        }
        assert!(worst <= 1.0, "{}: {worst} units", ks.isa);
        let mut special = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, f32::MAX, f32::MIN];
        ops::exp(ks, &mut special, 0.0);
        assert!(special[0].is_nan());
        assert_eq!(special[1..], [f32::INFINITY, 0.0, 1.0, 1.0, f32::INFINITY, 0.0]);
    }
}

#[test]
fn results_are_near_the_exact_ones() {
    let mut random = Random(8);
    let ks = select(None).unwrap();
    for n in LENGTHS {
        let (x, w) = (values(0, n, &mut random), values(0, n, &mut random));
        let near = |got: f32, exact: f64, size: f64, what: &str| {
            assert!((got as f64 - exact).abs() <= 2e-6 * size.max(exact.abs()), "{what} of {n}: {got} for {exact}");
        };
        let wide = |v: &[f32]| v.iter().map(|&v| v as f64).collect::<Vec<_>>();
        let (x64, w64) = (wide(&x), wide(&w));
        let mut out = vec![0.0; n];
        ops::rms_norm(ks, &x, &w, 1e-5, &mut out);
        let rms = (x64.iter().map(|v| v * v).sum::<f64>() / n as f64 + 1e-5).sqrt();
        for i in 0..n {
            near(out[i], x64[i] / rms * w64[i], 0.0, "rms_norm");
        }
        let products = || x64.iter().zip(&w64).map(|(a, b)| a * b);
        near(ops::dot(ks, &x, &w), products().sum(), products().map(f64::abs).sum(), "dot");
        near(ops::sum(ks, &x), x64.iter().sum(), x64.iter().map(|v| v.abs()).sum(), "sum");
        out.copy_from_slice(&x);
        ops::activate(ks, Activation::Silu, &mut out, Some(&w));
        for i in 0..n {
            near(out[i], x64[i] / (1.0 + (-x64[i]).exp()) * w64[i], 0.0, "silu");
        }
        ops::layer_norm(ks, &x, &w, Some(&x), 1e-5, &mut out);
        let mean = x64.iter().sum::<f64>() / n as f64;
        let deviation = (x64.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n as f64 + 1e-5).sqrt();
        for i in 0..n {
            near(out[i], (x64[i] - mean) / deviation * w64[i] + x64[i], 10.0, "layer_norm");
        }
        out.copy_from_slice(&x);
        ops::softmax(ks, &mut out);
        let total: f64 = x64.iter().map(|v| v.exp()).sum();
        for i in 0..n {
            near(out[i], x64[i].exp() / total, 0.0, "softmax");
        }
    }
}

/// Against exact values at points of the real line; Φ by its power series near 0 and its continued fraction beyond.
#[test]
fn activations_are_accurate_from_tail_to_tail() {
    fn phi(x: f64) -> f64 {
        let density = (-x * x / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
        let a = x.abs();
        let upper = if a < 3.0 {
            let (mut term, mut sum) = (a, a);
            for n in 1..100 {
                term *= a * a / (2 * n + 1) as f64;
                sum += term;
            }
            0.5 - density * sum
        } else {
            density / (1..200).rev().fold(a, |fraction, n| a + n as f64 / fraction)
        };
        if x > 0.0 {
            1.0 - upper
        } else {
            upper
        }
    }
    assert!((phi(1.0) - 0.841_344_746_068_543).abs() < 1e-14 && (phi(-4.0) - 3.167_124_183_311_99e-5).abs() < 1e-17);
    type Exact = fn(f64) -> f64;
    let tanh_gelu: Exact =
        |x| 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh());
    let cases: [(Activation, Exact); 5] = [
        (Activation::Silu, |x| x / (1.0 + (-x).exp())),
        (Activation::Gelu, |x| x * phi(x)),
        (Activation::GeluTanh, tanh_gelu),
        (Activation::Relu, |x| x.max(0.0)),
        (Activation::ReluSquared, |x| x.max(0.0).powi(2)),
    ];
    let ks = select(None).unwrap();
    for i in -2000..=2000 {
        let x = i as f32 / 100.0;
        for (kind, exact) in cases {
            let mut y = [x];
            ops::activate(ks, kind, &mut y, None);
            let exact = exact(f64::from(x));
            assert!(
                (f64::from(y[0]) - exact).abs() <= 4e-7 * exact.abs().max(1.0),
                "{kind:?}({x}): {} for {exact}",
                y[0]
            );
        }
        let mut y = [10.0 * x];
        ops::softcap(ks, &mut y, 30.0);
        let exact = 30.0 * (f64::from(10.0 * x) / 30.0).tanh();
        assert!((f64::from(y[0]) - exact).abs() <= 6e-6, "softcap({}): {} for {exact}", 10.0 * x, y[0]);
    }
    let mut special = [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MAX, -1e30, 0.0];
    ops::activate(ks, Activation::Gelu, &mut special, None);
    assert_eq!((special[0], special[1], special[3], special[4], special[5]), (f32::INFINITY, 0.0, f32::MAX, 0.0, 0.0));
    assert!(special[2].is_nan());
    let mut special = [f32::INFINITY, f32::NEG_INFINITY, 1e30];
    ops::softcap(ks, &mut special, 50.0);
    assert_eq!(special, [50.0, -50.0, 50.0]);
}

#[test]
fn max_passes_over_nan() {
    for ks in available() {
        let mut x = vec![f32::NAN; 20];
        assert_eq!(ops::max(ks, &x), f32::NEG_INFINITY);
        for i in 0..20 {
            x[i] = -(i as f32);
            assert_eq!(ops::max(ks, &x), 0.0);
        }
        assert_eq!(ops::max(ks, &[]), f32::NEG_INFINITY);
    }
}

#[test]
fn rope_rotates_pairs_and_leaves_the_rest() {
    let ks = select(None).unwrap();
    let (cos, sin) = ([0.0, 1.0], [1.0, 0.0]); // a quarter turn, none
    let mut x = [1.0, 2.0, 3.0, 4.0, 5.0];
    ops::rope(ks, &mut x, &cos, &sin, RopeStyle::Norm);
    assert_eq!(x, [-2.0, 1.0, 3.0, 4.0, 5.0]);
    let mut x = [1.0, 2.0, 3.0, 4.0, 5.0];
    ops::rope(ks, &mut x, &cos, &sin, RopeStyle::Neox);
    assert_eq!(x, [-3.0, 2.0, 1.0, 4.0, 5.0]);
}
