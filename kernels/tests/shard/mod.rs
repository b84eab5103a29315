//! Tests of a layer shard: through `Shard`, and through the C ABI as a foreign caller would use it.

mod descriptor;
pub mod ffi;
mod golden;
mod invariance;
mod kv;
pub mod model;
mod sampling;
mod tuning;
