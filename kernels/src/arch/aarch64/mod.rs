//! 64-bit Arm: NEON, which every such processor has, and NEON with dot products.

pub(crate) mod dotprod;
pub(crate) mod neon;
