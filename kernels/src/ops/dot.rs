//! Dot products, and their transpose (adding a multiple of a vector): what attention is made of.

use super::{load_f16_or_zeros, load_or_zeros, store_within, LANES};
use crate::arch::vector::Vector;

/// `LANES` accumulators over the products of two vectors given eight elements at a time.
#[inline(always)]
unsafe fn dot_by<V: Vector>(len: usize, a: impl Fn(usize) -> V, b: impl Fn(usize) -> V) -> f32 {
    let (mut low, mut high) = (V::zero(), V::zero());
    for i in (0..len).step_by(LANES) {
        low = a(i).fma(b(i), low);
        high = a(i + 8).fma(b(i + 8), high);
    }
    low.add(high).reduce_add()
}

#[inline(always)]
pub(crate) unsafe fn dot<V: Vector>(a: &[f32], b: &[f32]) -> f32 {
    dot_by::<V>(a.len(), |i| load_or_zeros(a, i), |i| load_or_zeros(b, i))
}

#[inline(always)]
pub(crate) unsafe fn dot_f16<V: Vector>(a: &[f32], b: &[u16]) -> f32 {
    dot_by::<V>(a.len(), |i| load_or_zeros(a, i), |i| load_f16_or_zeros(b, i))
}

#[inline(always)]
pub(crate) unsafe fn axpy<V: Vector>(acc: &mut [f32], a: f32, v: &[f32]) {
    for i in (0..acc.len()).step_by(8) {
        store_within(load_or_zeros::<V>(v, i).fma(V::splat(a), load_or_zeros(acc, i)), acc, i);
    }
}

#[inline(always)]
pub(crate) unsafe fn axpy_f16<V: Vector>(acc: &mut [f32], a: f32, v: &[u16]) {
    for i in (0..acc.len()).step_by(8) {
        store_within(load_f16_or_zeros::<V>(v, i).fma(V::splat(a), load_or_zeros(acc, i)), acc, i);
    }
}
