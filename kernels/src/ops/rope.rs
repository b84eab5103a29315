//! Rotary position embedding.

use crate::arch::vector::Vector;

/// Which elements of a head form a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RopeStyle {
    /// Neighbours: 2i and 2i + 1.
    Norm,
    /// Halves: i and i + dims/2.
    Neox,
}

/// One element after the other; the compiler's vectors, if any, cannot change bits. `V` only says for which instruction
/// set.
#[inline(always)]
pub(crate) unsafe fn rope<V: Vector>(x: &mut [f32], cos: &[f32], sin: &[f32], style: RopeStyle) {
    #[inline(always)]
    fn rotate(a: &mut f32, b: &mut f32, cos: f32, sin: f32) {
        let (x, y) = (*a, *b);
        *a = x.mul_add(cos, -(y * sin));
        *b = x.mul_add(sin, y * cos);
    }
    let pairs = cos.len();
    let x = &mut x[..2 * pairs];
    let angles = cos.iter().zip(sin);
    match style {
        RopeStyle::Norm => {
            for (pair, (&cos, &sin)) in x.chunks_exact_mut(2).zip(angles) {
                let (a, b) = pair.split_at_mut(1);
                rotate(&mut a[0], &mut b[0], cos, sin);
            }
        }
        RopeStyle::Neox => {
            let (first, second) = x.split_at_mut(pairs);
            for ((a, b), (&cos, &sin)) in first.iter_mut().zip(second).zip(angles) {
                rotate(a, b, cos, sin);
            }
        }
    }
}
