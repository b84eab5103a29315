//! NEON with dot products (Cortex-A76 and later, as in a Raspberry Pi 5): one instruction for four k of four rows.
//!
//! Its intrinsics are not stable yet: `neon::Rows` has the instructions as assembler. All else is NEON's.

use super::neon::{self, Lanes};
use super::panel::{self, panel_kernels};
use crate::arch::dot::{dot_kernels, dot_table};
use crate::dispatch::{Isa, Kernels, Variant};
use crate::matmul::{TileArgs, TileOut};
use crate::ops::float_ops;
use crate::pack::{Codes, PackedForm};
use crate::quantize::Tabling;

/// The set, if this machine can run it.
pub(crate) fn kernels() -> Option<&'static Kernels> {
    std::arch::is_aarch64_feature_detected!("dotprod").then_some(&KERNELS)
}

static KERNELS: Kernels = Kernels {
    isa: Isa::NeonDotprod,
    variants,
    preferred: neon::preferred,
    quantize: neon::quantize,
    tabling: Tabling::of_fours(neon::build_tables),
    ops: float_ops!(Lanes, "neon"),
    read: neon::read,
};

fn variants(form: PackedForm) -> &'static [Variant] {
    match form.codes {
        Codes::Float(_) | Codes::Planes(_) => neon::variants(form),
        _ if panel::decoder(form, true).is_some() => with_panels(form),
        _ => dot_variants(form),
    }
}

dot_kernels!(neon::Rows<true>, "neon,dotprod");
dot_table!(dot_variants, neon::Rows<true>, Codes::Trits);
panel_kernels!(true, "neon,dotprod");
dot_table!(with_panels, neon::Rows<true>, Codes::Trits, PANEL);
