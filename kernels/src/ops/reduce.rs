//! Largest element and sum.

use super::{load_or_zeros, LANES};
use crate::arch::vector::Vector;

#[inline(always)]
pub(crate) unsafe fn max<V: Vector>(x: &[f32]) -> f32 {
    let mut lanes = V::splat(f32::NEG_INFINITY);
    let whole = x.len() / 8 * 8;
    for i in (0..whole).step_by(8) {
        // An element that is NaN is not greater, so the lane keeps what it had.
        lanes = V::load(x.as_ptr().add(i)).max(lanes);
    }
    let mut all = [0f32; 8];
    lanes.store(all.as_mut_ptr());
    all.iter().chain(&x[whole..]).fold(f32::NEG_INFINITY, |m, &v| if v > m { v } else { m })
}

#[inline(always)]
pub(crate) unsafe fn sum<V: Vector>(x: &[f32]) -> f32 {
    let (mut low, mut high) = (V::zero(), V::zero());
    for i in (0..x.len()).step_by(LANES) {
        low = low.add(load_or_zeros(x, i));
        high = high.add(load_or_zeros(x, i + 8));
    }
    low.add(high).reduce_add()
}
