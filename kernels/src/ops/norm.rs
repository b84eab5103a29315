//! Norms.

use super::dot::dot;
use super::reduce::sum;
use super::{load_or_zeros, store_within};
use crate::arch::vector::Vector;

#[inline(always)]
pub(crate) unsafe fn rms_norm<V: Vector>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let mean = dot::<V>(x, x) / x.len() as f32;
    let scale = V::splat(1.0 / (mean + eps).sqrt());
    for i in (0..x.len()).step_by(8) {
        store_within(load_or_zeros::<V>(x, i).mul(scale).mul(load_or_zeros(weight, i)), out, i);
    }
}

/// Without bias where `bias` is empty.
#[inline(always)]
pub(crate) unsafe fn layer_norm<V: Vector>(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
    let mean = V::splat(sum::<V>(x) / x.len() as f32);
    for i in (0..x.len()).step_by(8) {
        store_within(load_or_zeros::<V>(x, i).sub(mean), out, i);
    }
    let variance = dot::<V>(out, out) / x.len() as f32;
    let scale = V::splat(1.0 / (variance + eps).sqrt());
    for i in (0..x.len()).step_by(8) {
        let normed = load_or_zeros::<V>(out, i).mul(scale);
        let bias = if bias.is_empty() { V::zero() } else { load_or_zeros(bias, i) };
        store_within(normed.fma(load_or_zeros(weight, i), bias), out, i);
    }
}
