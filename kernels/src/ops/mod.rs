//! Elementwise operations and reductions on f32 slices.
//!
//! Each is written once, over `Vector`, in a file of its own, and entered through a pointer of `Kernels`. Reductions use
//! `LANES` virtual lanes: element i goes to lane i mod 16, lanes are added as (i) + (i + 8), then by `Vector::reduce_add`.
//! A tail is padded with zeros, so the order depends on the length alone.

mod activation;
pub(crate) mod attention;
mod dot;
mod elementwise;
mod exp;
mod half;
mod norm;
mod reduce;
mod rope;

pub use activation::Activation;
pub(crate) use half::{bf16_to_f32, f16_to_f32, f32_to_f16};
pub use rope::RopeStyle;

use crate::arch::vector::Vector;
use crate::dispatch::Kernels;

/// Virtual lanes of a reduction.
pub const LANES: usize = 16;

/// One instruction set's float operations, as pointers to instances of the generic functions.
///
/// Every function is unsafe to call because the machine must have the instruction set, and because slices that go
/// together must have the same length; the public functions here check the latter.
pub(crate) struct FloatOps {
    pub add: unsafe fn(&mut [f32], &[f32]),
    pub scale: unsafe fn(&mut [f32], f32),
    pub activate: unsafe fn(&mut [f32], &[f32], Activation),
    pub softcap: unsafe fn(&mut [f32], f32),
    pub exp: unsafe fn(&mut [f32], f32),
    pub rms_norm: unsafe fn(&[f32], &[f32], f32, &mut [f32]),
    #[allow(clippy::type_complexity)] // four slices and a number
    pub layer_norm: unsafe fn(&[f32], &[f32], &[f32], f32, &mut [f32]),
    pub dot: unsafe fn(&[f32], &[f32]) -> f32,
    pub dot_f16: unsafe fn(&[f32], &[u16]) -> f32,
    pub axpy: unsafe fn(&mut [f32], f32, &[f32]),
    pub axpy_f16: unsafe fn(&mut [f32], f32, &[u16]),
    pub max: unsafe fn(&[f32]) -> f32,
    pub sum: unsafe fn(&[f32]) -> f32,
    pub to_f16: unsafe fn(&[f32], &mut [u16]),
    pub from_f16: unsafe fn(&[u16], &mut [f32]),
    pub rope: unsafe fn(&mut [f32], &[f32], &[f32], RopeStyle),
    pub to_q8: unsafe fn(&[f32], &mut [i8]) -> f32,
    pub attend: unsafe fn(&attention::Task, &mut attention::Work, &mut [f32]),
    pub merge: unsafe fn(usize, &mut [f32], &[f32]),
}

/// The generic functions under the names of `FloatOps`' fields.
pub(crate) mod generic {
    pub(crate) use super::activation::{activate, softcap};
    pub(crate) use super::attention::{attend, merge, to_q8};
    pub(crate) use super::dot::{axpy, axpy_f16, dot, dot_f16};
    pub(crate) use super::elementwise::{add, scale};
    pub(crate) use super::exp::exp;
    pub(crate) use super::half::{from_f16, to_f16};
    pub(crate) use super::norm::{layer_norm, rms_norm};
    pub(crate) use super::reduce::{max, sum};
    pub(crate) use super::rope::rope;
}

/// A `FloatOps` whose functions are the generic ones over a vector type, compiled with the given target features.
macro_rules! float_ops {
    ($vector:ty $(, $features:literal)?) => {
        $crate::ops::float_ops!(@ $vector, [$($features)?],
            add(x: &mut [f32], y: &[f32]) -> ();
            scale(x: &mut [f32], factor: f32) -> ();
            activate(x: &mut [f32], up: &[f32], kind: $crate::ops::Activation) -> ();
            softcap(x: &mut [f32], cap: f32) -> ();
            exp(x: &mut [f32], shift: f32) -> ();
            rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) -> ();
            layer_norm(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) -> ();
            dot(a: &[f32], b: &[f32]) -> f32;
            dot_f16(a: &[f32], b: &[u16]) -> f32;
            axpy(acc: &mut [f32], a: f32, v: &[f32]) -> ();
            axpy_f16(acc: &mut [f32], a: f32, v: &[u16]) -> ();
            max(x: &[f32]) -> f32;
            sum(x: &[f32]) -> f32;
            to_f16(x: &[f32], out: &mut [u16]) -> ();
            from_f16(x: &[u16], out: &mut [f32]) -> ();
            rope(x: &mut [f32], cos: &[f32], sin: &[f32], style: $crate::ops::RopeStyle) -> ();
            to_q8(x: &[f32], codes: &mut [i8]) -> f32;
            attend(task: &$crate::ops::attention::Task, work: &mut $crate::ops::attention::Work, out: &mut [f32]) -> ();
            merge(rows: usize, total: &mut [f32], part: &[f32]) -> ();
        )
    };
    (@ $vector:ty, $features:tt, $($name:ident ( $($arg:ident : $ty:ty),* ) -> $out:ty;)*) => {
        $crate::ops::FloatOps {
            $($name: $crate::ops::float_ops!(@one $vector, $features, $name, ($($arg : $ty),*), $out),)*
        }
    };
    (@one $vector:ty, [$($features:literal)?], $name:ident, ($($arg:ident : $ty:ty),*), $out:ty) => {{
        /// # Safety
        ///
        /// `FloatOps`'.
        $(#[target_feature(enable = $features)])?
        unsafe fn $name($($arg: $ty),*) -> $out {
            $crate::ops::generic::$name::<$vector>($($arg),*)
        }
        $name
    }};
}
pub(crate) use float_ops;

/// The eight elements from `i`, those beyond the slice as zeros.
#[inline(always)]
pub(crate) unsafe fn load_or_zeros<V: Vector>(x: &[f32], i: usize) -> V {
    if i + 8 <= x.len() {
        V::load(x.as_ptr().add(i))
    } else {
        let mut padded = [0f32; 8];
        for (to, &from) in padded.iter_mut().zip(x.get(i..).unwrap_or(&[])) {
            *to = from;
        }
        V::load(padded.as_ptr())
    }
}

/// As `load_or_zeros`, from half floats.
#[inline(always)]
pub(crate) unsafe fn load_f16_or_zeros<V: Vector>(x: &[u16], i: usize) -> V {
    if i + 8 <= x.len() {
        V::load_f16(x.as_ptr().add(i))
    } else {
        let mut padded = [0u16; 8];
        for (to, &from) in padded.iter_mut().zip(x.get(i..).unwrap_or(&[])) {
            *to = from;
        }
        V::load_f16(padded.as_ptr())
    }
}

/// Stores lanes from `i` on, as many as the slice has.
#[inline(always)]
pub(crate) unsafe fn store_within<V: Vector>(v: V, x: &mut [f32], i: usize) {
    if i + 8 <= x.len() {
        v.store(x.as_mut_ptr().add(i));
    } else {
        let mut padded = [0f32; 8];
        v.store(padded.as_mut_ptr());
        for (to, from) in x[i..].iter_mut().zip(padded) {
            *to = from;
        }
    }
}

// The public functions: lengths are checked, and `ks` is usable on this machine by the way it was had (see `Kernels`).

/// x += y.
pub fn add(ks: &Kernels, x: &mut [f32], y: &[f32]) {
    assert_eq!(x.len(), y.len());
    // SAFETY: see above.
    unsafe { (ks.ops.add)(x, y) }
}

/// x *= factor.
pub fn scale(ks: &Kernels, x: &mut [f32], factor: f32) {
    // SAFETY: see above.
    unsafe { (ks.ops.scale)(x, factor) }
}

/// x = kind(x), times `up` if there is one. Beside infinities and NaN, values too large for the function's formula may give
/// NaN.
pub fn activate(ks: &Kernels, kind: Activation, x: &mut [f32], up: Option<&[f32]>) {
    let up = up.inspect(|up| assert_eq!(x.len(), up.len())).unwrap_or(&[]);
    // SAFETY: see above.
    unsafe { (ks.ops.activate)(x, up, kind) }
}

/// x = cap · tanh(x / cap).
pub fn softcap(ks: &Kernels, x: &mut [f32], cap: f32) {
    // SAFETY: see above.
    unsafe { (ks.ops.softcap)(x, cap) }
}

/// x = e^(x − shift), within 1 unit in the last place for the rounded difference; NaN stays NaN.
pub fn exp(ks: &Kernels, x: &mut [f32], shift: f32) {
    // SAFETY: see above.
    unsafe { (ks.ops.exp)(x, shift) }
}

/// x = softmax(x): e^(x − max) / Σ. NaN if nothing is above −∞.
pub fn softmax(ks: &Kernels, x: &mut [f32]) {
    let largest = max(ks, x);
    exp(ks, x, largest);
    let total = sum(ks, x);
    scale(ks, x, 1.0 / total);
}

/// out = x / sqrt(mean(x²) + eps) · weight.
pub fn rms_norm(ks: &Kernels, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    assert!(x.len() == weight.len() && x.len() == out.len());
    // SAFETY: see above.
    unsafe { (ks.ops.rms_norm)(x, weight, eps, out) }
}

/// out = (x − mean(x)) / sqrt(variance(x) + eps) · weight + bias.
pub fn layer_norm(ks: &Kernels, x: &[f32], weight: &[f32], bias: Option<&[f32]>, eps: f32, out: &mut [f32]) {
    assert!(x.len() == weight.len() && x.len() == out.len());
    let bias = bias.inspect(|bias| assert_eq!(x.len(), bias.len())).unwrap_or(&[]);
    // SAFETY: see above.
    unsafe { (ks.ops.layer_norm)(x, weight, bias, eps, out) }
}

/// Σ a·b.
pub fn dot(ks: &Kernels, a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    // SAFETY: see above.
    unsafe { (ks.ops.dot)(a, b) }
}

/// Σ a·b, b in half floats.
pub fn dot_f16(ks: &Kernels, a: &[f32], b: &[u16]) -> f32 {
    assert_eq!(a.len(), b.len());
    // SAFETY: see above.
    unsafe { (ks.ops.dot_f16)(a, b) }
}

/// acc += a·v, by fma.
pub fn axpy(ks: &Kernels, acc: &mut [f32], a: f32, v: &[f32]) {
    assert_eq!(acc.len(), v.len());
    // SAFETY: see above.
    unsafe { (ks.ops.axpy)(acc, a, v) }
}

/// acc += a·v, by fma, v in half floats.
pub fn axpy_f16(ks: &Kernels, acc: &mut [f32], a: f32, v: &[u16]) {
    assert_eq!(acc.len(), v.len());
    // SAFETY: see above.
    unsafe { (ks.ops.axpy_f16)(acc, a, v) }
}

/// The largest element; NaNs do not count, −∞ if there is none.
pub fn max(ks: &Kernels, x: &[f32]) -> f32 {
    // SAFETY: see above.
    unsafe { (ks.ops.max)(x) }
}

/// Σ x.
pub fn sum(ks: &Kernels, x: &[f32]) -> f32 {
    // SAFETY: see above.
    unsafe { (ks.ops.sum)(x) }
}

/// To half floats, rounded to nearest, ties to even.
pub fn to_f16(ks: &Kernels, x: &[f32], out: &mut [u16]) {
    assert_eq!(x.len(), out.len());
    // SAFETY: see above.
    unsafe { (ks.ops.to_f16)(x, out) }
}

/// From half floats, exactly.
pub fn from_f16(ks: &Kernels, x: &[u16], out: &mut [f32]) {
    assert_eq!(x.len(), out.len());
    // SAFETY: see above.
    unsafe { (ks.ops.from_f16)(x, out) }
}

/// Rotates the first `2·cos.len()` elements of a head, pair i by the angle whose cosine and sine are `cos[i]`, `sin[i]`.
pub fn rope(ks: &Kernels, x: &mut [f32], cos: &[f32], sin: &[f32], style: RopeStyle) {
    assert!(cos.len() == sin.len() && 2 * cos.len() <= x.len());
    // SAFETY: see above.
    unsafe { (ks.ops.rope)(x, cos, sin, style) }
}

/// To int8 codes, rounded to nearest, ties to even; returns their scale, max|x| / 127 (see `quantize` for NaN and infinity).
pub fn to_q8(ks: &Kernels, x: &[f32], codes: &mut [i8]) -> f32 {
    assert_eq!(x.len(), codes.len());
    // SAFETY: see above.
    unsafe { (ks.ops.to_q8)(x, codes) }
}

/// Adds attention's result over a later range of positions to that over those before.
pub(crate) fn merge(ks: &Kernels, rows: usize, total: &mut [f32], part: &[f32]) {
    assert_eq!(total.len(), part.len());
    // SAFETY: see above.
    unsafe { (ks.ops.merge)(rows, total, part) }
}
