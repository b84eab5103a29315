//! Activation functions and soft caps, made of the exponential alone: no library function, as those differ between systems.

use super::exp::exp_lanes;
use super::{load_or_zeros, store_within};
use crate::arch::vector::Vector;

/// What a feed-forward layer applies between its products.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Activation {
    /// x / (1 + e^−x)
    Silu,
    /// x·Φ(x), Φ the normal distribution function (arXiv:1606.08415).
    Gelu,
    /// Its approximation by tanh, of the same paper: x / (1 + e^−2u) with u = √(2/π)·(x + 0.044715·x³).
    GeluTanh,
    /// max(x, 0)
    Relu,
    /// max(x, 0)²
    ReluSquared,
}

/// `1 − Φ(a)` for a ≥ 0, within 3e-7 of the value relatively up to a = 10: erfc(z) = e^−z²·t·Q(t) with z = a/√2,
/// t = 1 / (1 + z/2), Q a polynomial fitted to t ∈ [1/6, 1] at Chebyshev nodes.
#[inline(always)]
unsafe fn upper_tail<V: Vector>(a: V) -> V {
    let z = a.mul(V::splat(std::f32::consts::FRAC_1_SQRT_2));
    let t = V::splat(1.0).div(z.fma(V::splat(0.5), V::splat(1.0)));
    let mut q = V::splat(-0.058_318_24);
    for c in [
        0.281_191_92,
        -0.480_802_7,
        0.271_470_84,
        -0.022_591_425,
        0.201_196_66,
        0.243_426_81,
        0.282_337_84,
        0.282_088_2,
    ] {
        q = q.fma(t, V::splat(c));
    }
    exp_lanes(V::zero().sub(z.mul(z))).mul(t.mul(q)).mul(V::splat(0.5))
}

#[inline(always)]
unsafe fn relu<V: Vector>(x: V) -> V {
    V::zero().max(x) // in this order NaN passes
}

/// `SILU` … `RELU_SQUARED` of eight values. Constants and no closures, which would be compiled without the instruction set.
#[inline(always)]
unsafe fn of<V: Vector, const KIND: u8>(x: V) -> V {
    let one = V::splat(1.0);
    match KIND {
        SILU => x.div(one.add(exp_lanes(V::zero().sub(x)))),
        GELU => {
            // x·Φ(x) = max(x, 0) − |x|·(1 − Φ(|x|)); where |x| exceeds 15 the second is 0, and infinity must not meet it.
            let a = V::splat(15.0).min(x.max(V::zero().sub(x)));
            relu(x).sub(a.mul(upper_tail(a)))
        }
        GELU_TANH => {
            let cubic = x.mul(x).fma(V::splat(0.044_715), one);
            // √(2/π) is 2/√π · 1/√2.
            let factor = -2.0 * std::f32::consts::FRAC_2_SQRT_PI * std::f32::consts::FRAC_1_SQRT_2;
            x.div(one.add(exp_lanes(x.mul(cubic).mul(V::splat(factor)))))
        }
        RELU => relu(x),
        _ => relu(x).mul(relu(x)),
    }
}

const SILU: u8 = 0;
const GELU: u8 = 1;
const GELU_TANH: u8 = 2;
const RELU: u8 = 3;
const RELU_SQUARED: u8 = 4;

#[inline(always)]
unsafe fn each<V: Vector, const KIND: u8>(x: &mut [f32], up: &[f32]) {
    for i in (0..x.len()).step_by(8) {
        let y = of::<V, KIND>(load_or_zeros::<V>(x, i));
        store_within(if up.is_empty() { y } else { y.mul(load_or_zeros(up, i)) }, x, i);
    }
}

/// `x = kind(x) · up`, or `kind(x)` where `up` is empty.
#[inline(always)]
pub(crate) unsafe fn activate<V: Vector>(x: &mut [f32], up: &[f32], kind: Activation) {
    match kind {
        Activation::Silu => each::<V, SILU>(x, up),
        Activation::Gelu => each::<V, GELU>(x, up),
        Activation::GeluTanh => each::<V, GELU_TANH>(x, up),
        Activation::Relu => each::<V, RELU>(x, up),
        Activation::ReluSquared => each::<V, RELU_SQUARED>(x, up),
    }
}

/// `x = cap·tanh(x / cap)`, tanh(y) being 1 − 2 / (1 + e^2y).
#[inline(always)]
pub(crate) unsafe fn softcap<V: Vector>(x: &mut [f32], cap: f32) {
    let (one, cap) = (V::splat(1.0), V::splat(cap));
    for i in (0..x.len()).step_by(8) {
        let y = load_or_zeros::<V>(x, i).div(cap);
        let tanh = one.sub(V::splat(2.0).div(one.add(exp_lanes(y.add(y)))));
        store_within(tanh.mul(cap), x, i);
    }
}
