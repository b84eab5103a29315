//! NEON with dot products (Cortex-A76 and later, as in a Raspberry Pi 5): one instruction for four k of four rows.
//!
//! Its intrinsics are not stable yet: `neon::Rows` has the instructions as assembler. All else is NEON's.

use super::neon::{self, Lanes};
use crate::arch::dot::{dot_kernels, dot_table};
use crate::dispatch::{Isa, Kernels, Variant};
use crate::matmul::{TileArgs, TileOut};
use crate::ops::float_ops;
use crate::pack::{Codes, PackedForm, SourceType};

/// The set, if this machine can run it.
pub(crate) fn kernels() -> Option<&'static Kernels> {
    std::arch::is_aarch64_feature_detected!("dotprod").then_some(&KERNELS)
}

static KERNELS: Kernels = Kernels {
    isa: Isa::NeonDotprod,
    variants,
    preferred,
    quantize: neon::quantize,
    build_tables: neon::build_tables,
    ops: float_ops!(Lanes, "neon"),
    read: neon::read,
};

/// Lookup for one bit only: a dot product of codes takes a mask and the product itself, however few their bits.
fn preferred(ty: SourceType) -> PackedForm {
    neon::with_planes_up_to(1, ty)
}

fn variants(form: PackedForm) -> &'static [Variant] {
    match form.codes {
        Codes::Float(_) | Codes::Planes(_) => neon::variants(form),
        _ => dot_variants(form),
    }
}

dot_kernels!(neon::Rows<true>, "neon,dotprod");
dot_table!(dot_variants, neon::Rows<true>, Codes::Trits);
