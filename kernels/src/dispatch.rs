//! Which instruction set runs. `available()` lists every set of kernels this machine can run, `select()` picks one; the
//! pointers in a set are then called once per operation on a whole slice or tile, never per block.

use crate::arch;
use crate::error::{Error, Result};
use crate::matmul::TileKernel;
use crate::ops::FloatOps;
use crate::pack::{PackedForm, SourceType};
use crate::quantize::{Quantize, Tabling};
use std::fmt;

/// Raised when kernels become faster or slower: what was measured of others counts no more.
pub(crate) const KERNELS_VERSION: u32 = 8;

/// An instruction set with kernels of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    Portable,
    Avx2,
    Avx512,
    Amx,
    Neon,
    NeonDotprod,
}

impl Isa {
    /// The name in `LUTRA_ISA`, in descriptors and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Amx => "amx",
            Isa::Neon => "neon",
            Isa::NeonDotprod => "neon-dotprod",
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A kernel for the tiles of a form; a form may have several. All give the same bits: which is used is a matter of speed.
#[derive(Clone, Copy, Debug)]
pub struct Variant {
    /// Unique among the form's kernels; what reports and the tuner's store call it by.
    pub name: &'static str,
    pub(crate) tile: TileKernel,
    /// Consecutive tiles that it takes at once at most.
    pub(crate) tiles: usize,
    /// Rows of activations to give it at once that are worth trying, the usual number first, which is the most.
    pub(crate) widths: &'static [usize],
    /// Whether it reads lookup tables (`quantize::Tabling`).
    pub tables: bool,
    /// Whether it reads blocks of scales (`matmul::Block`).
    pub(crate) blocks: bool,
}

/// The kernels of one instruction set.
///
/// The pointers are unsafe functions that may need the instruction set: a `Kernels` outside `arch` is only had from
/// `available()` or `select()`, which have checked that the machine has it.
pub struct Kernels {
    pub isa: Isa,
    /// The set's own kernels for tiles of this form, the usual one first.
    pub(crate) variants: fn(PackedForm) -> &'static [Variant],
    /// The form that is best for a type as far as is known without measuring.
    pub(crate) preferred: fn(SourceType) -> PackedForm,
    /// `quantize::quantize_portable`, with the requirements on lengths stated there.
    pub(crate) quantize: Quantize,
    /// What its look-up kernels look up.
    pub(crate) tabling: Tabling,
    pub(crate) ops: FloatOps,
    /// Reads every byte of the slice at full width; the result only keeps the reads alive.
    pub(crate) read: unsafe fn(&[u64]) -> u64,
}

impl fmt::Debug for Kernels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Kernels({})", self.isa)
    }
}

impl Kernels {
    /// The form to pack a type into for these kernels.
    pub fn form(&self, ty: SourceType) -> PackedForm {
        (self.preferred)(ty)
    }

    /// Whether these kernels have one of their own for the form, rather than portable's.
    pub fn has_kernel(&self, form: PackedForm) -> bool {
        !(self.variants)(form).is_empty()
    }

    /// The kernels for tiles of this form, the usual one first; portable's where the set has none of its own.
    pub fn variants(&self, form: PackedForm) -> &'static [Variant] {
        match (self.variants)(form) {
            [] => arch::portable::variants(form),
            own => own,
        }
    }
}

/// Every set of kernels that this machine can run, portable first, best last.
pub fn available() -> Vec<&'static Kernels> {
    let mut sets: Vec<&'static Kernels> = vec![&arch::portable::KERNELS];
    #[cfg(target_arch = "x86_64")]
    sets.extend(
        [arch::x86_64::avx2::kernels(), arch::x86_64::avx512::kernels(), arch::x86_64::amx::kernels()]
            .into_iter()
            .flatten(),
    );
    #[cfg(target_arch = "aarch64")]
    sets.extend(arch::aarch64::neon::kernels().into_iter().chain(arch::aarch64::dotprod::kernels()));
    sets
}

/// The set of this name, or the best one for `None`. The environment variable `LUTRA_ISA` takes the place of `None`.
pub fn select(name: Option<&str>) -> Result<&'static Kernels> {
    let sets = available();
    let fallback = std::env::var("LUTRA_ISA").ok().filter(|value| !value.is_empty());
    match name.or(fallback.as_deref()) {
        None => Ok(sets[sets.len() - 1]),
        Some(name) => sets.iter().copied().find(|set| set.isa.name() == name).ok_or_else(|| {
            let names: Vec<_> = sets.iter().map(|set| set.isa.name()).collect();
            Error::unsupported(format!(
                "instruction set {name:?} is unknown or not usable here; available: {}",
                names.join(", ")
            ))
        }),
    }
}
