//! x86-64: AVX2 with FMA and F16C, AVX-512 with VNNI and VBMI, AMX.

pub(crate) mod amx;
pub(crate) mod avx2;
pub(crate) mod avx512;
mod lookup;
