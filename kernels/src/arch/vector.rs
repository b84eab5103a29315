//! Eight float lanes, the virtual vector of every float operation. An instruction set with other widths still provides
//! eight lanes (as two or a half of its registers), so that reductions keep their order.

/// The most lanes of any vector.
pub(crate) const MAX_LANES: usize = 16;

/// `LANES` f32 lanes.
///
/// # Safety
///
/// For every method: the machine must have the instruction set of the implementation, and pointers must be valid for
/// `LANES` elements (u16 pointers aligned to 2, f32 pointers to 4).
pub(crate) trait Vector: Copy {
    /// 8; or 16, of a vector that only serves operations in which lanes do not meet (`ops::attention`).
    const LANES: usize = 8;

    unsafe fn splat(value: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    /// IEEE half floats, exactly; a NaN becomes quiet.
    unsafe fn load_f16(from: *const u16) -> Self;
    /// Rounds to half floats, ties to even.
    unsafe fn store_f16(self, to: *mut u16);
    /// bfloat16, exactly.
    unsafe fn load_bf16(from: *const u16) -> Self;
    /// Signed bytes, exactly.
    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self {
        let mut v = [0f32; MAX_LANES];
        for (i, v) in v.iter_mut().enumerate().take(Self::LANES) {
            *v = f32::from(*from.add(i));
        }
        Self::load(v.as_ptr())
    }
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn sub(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    unsafe fn div(self, other: Self) -> Self;
    /// `self · factor + addend`, rounded once.
    unsafe fn fma(self, factor: Self, addend: Self) -> Self;
    /// `self > other ? self : other`: a NaN on either side gives `other`.
    unsafe fn max(self, other: Self) -> Self;
    /// `self < other ? self : other`: a NaN on either side gives `other`.
    unsafe fn min(self, other: Self) -> Self;
    /// To the nearest integer, ties to even.
    unsafe fn round(self) -> Self;
    /// 2^self for integers −126 ≤ self ≤ 127. Any value for other input.
    unsafe fn exp2_integer(self) -> Self;

    /// Eight lanes summed as ((0+4)+(2+6)) + ((1+5)+(3+7)).
    #[inline(always)]
    unsafe fn reduce_add(self) -> f32 {
        assert!(Self::LANES == 8);
        let mut v = [0f32; 8];
        self.store(v.as_mut_ptr());
        ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]))
    }

    /// Asks for the cache line of an address, which need not be valid.
    #[inline(always)]
    unsafe fn prefetch(_at: *const u8) {}

    /// The largest lane, none of them NaN; of zeros any.
    #[inline(always)]
    unsafe fn reduce_max(self) -> f32 {
        let mut v = [f32::NEG_INFINITY; MAX_LANES];
        self.store(v.as_mut_ptr());
        let mut width = Self::LANES;
        while width > 1 {
            width /= 2;
            for i in 0..width {
                v[i] = if v[i + width] > v[i] { v[i + width] } else { v[i] };
            }
        }
        v[0]
    }

    #[inline(always)]
    unsafe fn zero() -> Self {
        Self::splat(0.0)
    }
}
