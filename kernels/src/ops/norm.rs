//! Root-mean-square normalisation.

use super::{generic::dot, load_or_zeros, store_within};
use crate::arch::vector::Vector;

#[inline(always)]
pub(crate) unsafe fn rms_norm<V: Vector>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let mean = dot::<V>(x, x) / x.len() as f32;
    let scale = V::splat(1.0 / (mean + eps).sqrt());
    for i in (0..x.len()).step_by(8) {
        store_within(load_or_zeros::<V>(x, i).mul(scale).mul(load_or_zeros(weight, i)), out, i);
    }
}
