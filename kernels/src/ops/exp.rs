//! The exponential. No library function: those differ between systems.

use super::{load_or_zeros, store_within};
use crate::arch::vector::Vector;

/// (n, e^r within rounding) of x = n · ln 2 + r, n a whole number and |r| ≤ 0.3466: a polynomial of degree 7, r in two parts.
#[inline(always)]
unsafe fn parts<V: Vector>(x: V) -> (V, V) {
    let n = x.mul(V::splat(std::f32::consts::LOG2_E)).round();
    // ln 2 in two parts; the first has few enough bits that n times it is exact.
    let r = n.fma(V::splat(-0.693_359_4), x);
    let r = n.fma(V::splat(2.121_944_4e-4), r);
    // Minimax coefficients of Cephes' expf (S. L. Moshier), then 1 + r.
    let mut p = V::splat(1.987_569_1e-4);
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5, 1.0, 1.0] {
        p = p.fma(r, V::splat(c));
    }
    (n, p)
}

/// e^x within 1 unit in the last place. 2^n is multiplied in two exact halves, which lets the result overflow to infinity and
/// underflow through subnormals to 0 where it should.
#[inline(always)]
pub(super) unsafe fn exp_lanes<V: Vector>(x: V) -> V {
    // Beyond these the result is 0 or infinite already. Written so that NaN passes: `max` and `min` give the second.
    let x = V::splat(-105.0).max(x);
    let x = V::splat(90.0).min(x);
    let (n, p) = parts(x);
    let half = n.mul(V::splat(0.5)).round();
    p.mul(half.exp2_integer()).mul(n.sub(half).exp2_integer())
}

/// The same bits for x from −44 to 0, or NaN; below, e^−44 (8·10^−20): next to weights whose sum is at least 1 that is nothing,
/// and sums stay clear of subnormals, which are slow.
#[inline(always)]
pub(super) unsafe fn exp_weight<V: Vector>(x: V) -> V {
    let (n, p) = parts(V::splat(-44.0).max(x));
    p.mul(n.exp2_integer())
}

#[inline(always)]
pub(crate) unsafe fn exp<V: Vector>(x: &mut [f32], shift: f32) {
    for i in (0..x.len()).step_by(8) {
        store_within(exp_lanes(load_or_zeros::<V>(x, i).sub(V::splat(shift))), x, i);
    }
}
