//! x86-64: AVX2 with FMA and F16C.

pub(crate) mod avx2;
pub(crate) mod avx512;
