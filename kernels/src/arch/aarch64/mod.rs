//! 64-bit Arm: NEON, which every such processor has, and NEON with dot products; `panel` is both sets' kernel for several rows of
//! activations.

pub(crate) mod dotprod;
pub(crate) mod neon;
mod panel;
