//! Eight float lanes, the virtual vector of every float operation. An instruction set with other widths still provides
//! eight lanes (as two or a half of its registers), so that reductions keep their order.

/// Eight f32 lanes.
///
/// # Safety
///
/// For every method: the machine must have the instruction set of the implementation, and pointers must be valid for
/// eight elements (u16 pointers aligned to 2, f32 pointers to 4).
pub(crate) trait Vector: Copy {
    unsafe fn splat(value: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    /// Eight IEEE half floats, exactly; a NaN becomes quiet.
    unsafe fn load_f16(from: *const u16) -> Self;
    /// Rounds to half floats, ties to even.
    unsafe fn store_f16(self, to: *mut u16);
    /// Eight bfloat16, exactly.
    unsafe fn load_bf16(from: *const u16) -> Self;
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

    /// Lanes summed as ((0+4)+(2+6)) + ((1+5)+(3+7)).
    #[inline(always)]
    unsafe fn reduce_add(self) -> f32 {
        let mut v = [0f32; 8];
        self.store(v.as_mut_ptr());
        ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]))
    }

    #[inline(always)]
    unsafe fn zero() -> Self {
        Self::splat(0.0)
    }
}
