//! Lutra's kernels: low-bit matrix products, the other tensor operations, and a layer shard's forward pass.
//!
//! Knows tensors and the model file it maps; knows no clients and no JSON but descriptors, and of the network a socket to the bus
//! alone (`lane`), which knows no tensors.
//! Weights come from a mapped file, are repacked once (`pack`), and stay here; activations and tokens come in and go out
//! through the C ABI (`ffi`), one call per micro-batch.
//!
//! Layers, lowest first: `arch` (vectors and tile kernels of each instruction set) → `dispatch` (which set runs) →
//! `ops`, `quantize`, `matmul` (operations on slices) → `attention`, `kv`, `sampling`, `shard` → `ffi`.
//!
//! Results are the same bits on every instruction set and thread count: integer sums are exact, and every float
//! reduction has one order, defined where the operation is.

#![warn(clippy::undocumented_unsafe_blocks)]

mod arch;
pub mod bandwidth;
pub mod cache;
pub mod cores;
pub mod dispatch;
pub mod error;
pub mod matmul;
pub mod ops;
pub mod pack;
pub mod pool;
pub mod quantize;
pub mod tune;

pub mod attention;
pub mod batch;
pub mod descriptor;
pub mod ffi;
pub mod kv;
#[cfg(unix)]
pub mod lane;
pub mod mapping;
pub mod profile;
pub mod sampling;
pub mod shard;
pub mod weight_cache;

pub use dispatch::{available, select, Isa, Kernels, Variant};
pub use error::{Error, Result};
pub use matmul::{matmul, matmul_all, matmul_by, matmul_gated, Activations, Plan, Precision};
pub use pack::{dequantize, pack, pack_as, PackedForm, PackedMatrix, SourceType};
pub use pool::Pool;

// Tests through the public interface. They are modules all the same: for each crate of tests all kernels would be compiled once
// more, which takes longer than the tests do.
#[cfg(test)]
extern crate self as lutra_kernels;
#[cfg(test)]
#[path = "../tests/fuzz/mod.rs"]
mod fuzz_tests;
#[cfg(all(test, unix))]
#[path = "../tests/lane/mod.rs"]
mod lane_tests;
#[cfg(test)]
#[path = "../tests/numerics/mod.rs"]
mod numerics_tests;
#[cfg(test)]
#[path = "../tests/shard/mod.rs"]
mod shard_tests;
