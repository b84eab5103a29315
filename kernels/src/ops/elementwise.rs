//! x += y, x *= a.

use super::{load_or_zeros, store_within};
use crate::arch::vector::Vector;

#[inline(always)]
pub(crate) unsafe fn add<V: Vector>(x: &mut [f32], y: &[f32]) {
    for i in (0..x.len()).step_by(8) {
        store_within(load_or_zeros::<V>(x, i).add(load_or_zeros(y, i)), x, i);
    }
}

#[inline(always)]
pub(crate) unsafe fn scale<V: Vector>(x: &mut [f32], factor: f32) {
    for i in (0..x.len()).step_by(8) {
        store_within(load_or_zeros::<V>(x, i).mul(V::splat(factor)), x, i);
    }
}
