//! What differs between instruction sets, and nothing else.
//!
//! `vector` is the trait that float operations are written over, once; each sibling implements it and adds the kernels
//! that need their own instructions (tiles of low-bit weights, quantising, table building). `portable` is plain Rust and
//! the oracle: every other set must give the same bits. Callers reach all of it through `dispatch::Kernels`.

pub(crate) mod portable;
pub(crate) mod vector;
#[cfg(target_arch = "x86_64")]
pub(crate) mod x86_64;
