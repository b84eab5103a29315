//! Plain Rust for any machine, written to be read rather than to be fast: the oracle of the other instruction sets.

use super::vector::Vector;
use crate::dispatch::{Isa, Kernels};
use crate::matmul::{float_tile, TileArgs, TileKernel, TileOut, BATCH};
use crate::ops::{bf16_to_f32, f16_to_f32, f32_to_f16, float_ops};
use crate::pack::{Codes, FloatKind, PackedForm, MAX_GROUP, TILE};
use crate::quantize::{build_tables_portable, quantize_portable};

/// Eight floats in an array.
#[derive(Clone, Copy)]
pub(crate) struct Lanes([f32; 8]);

impl Lanes {
    #[inline(always)]
    fn map2(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Lanes(std::array::from_fn(|i| f(self.0[i], other.0[i])))
    }
}

// No method needs anything of the machine: only the pointers' validity, promised by the caller, is used.
impl Vector for Lanes {
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Lanes([value; 8])
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        Lanes(std::array::from_fn(|i| *from.add(i)))
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        for (i, value) in self.0.into_iter().enumerate() {
            *to.add(i) = value;
        }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        Lanes(std::array::from_fn(|i| f16_to_f32(*from.add(i))))
    }
    #[inline(always)]
    unsafe fn store_f16(self, to: *mut u16) {
        for (i, value) in self.0.into_iter().enumerate() {
            *to.add(i) = f32_to_f16(value);
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        Lanes(std::array::from_fn(|i| bf16_to_f32(*from.add(i))))
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        self.map2(other, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        self.map2(other, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        self.map2(other, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        self.map2(other, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn fma(self, factor: Self, addend: Self) -> Self {
        Lanes(std::array::from_fn(|i| self.0[i].mul_add(factor.0[i], addend.0[i])))
    }
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        self.map2(other, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        self.map2(other, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        Lanes(self.0.map(f32::round_ties_even))
    }
    #[inline(always)]
    unsafe fn exp2_integer(self) -> Self {
        Lanes(self.0.map(|n| f32::from_bits((n as i32).wrapping_add(127).wrapping_shl(23) as u32)))
    }
}

pub(crate) static KERNELS: Kernels = Kernels {
    isa: Isa::Portable,
    tile,
    wants_tables: |_| false,
    quantize: quantize_portable,
    build_tables: build_tables_portable,
    ops: float_ops!(Lanes),
    read: |words| words.iter().fold(0, |sum, word| sum ^ word),
};

/// The kernel for any form, plainly.
pub(crate) fn tile(form: PackedForm) -> TileKernel {
    match form.codes {
        Codes::Float(FloatKind::F32) => float_tile::<Lanes, 0>,
        Codes::Float(FloatKind::F16) => float_tile::<Lanes, 1>,
        Codes::Float(FloatKind::Bf16) => float_tile::<Lanes, 2>,
        Codes::Bits(_) | Codes::Int8 | Codes::Trits5 => grouped,
    }
}

/// Rows one after the other, groups in order: `acc = fma(d_w·d_a, Σ (code + offset)·a, acc)`.
fn grouped(args: &TileArgs, out: &mut TileOut) {
    let form = args.form;
    let size = form.group as usize;
    let groups = args.k / size;
    let mut weights = [0i32; MAX_GROUP];
    let weights = &mut weights[..size];
    for row in 0..TILE {
        let mut acc = [0f32; BATCH];
        for (g, group) in args.tile.chunks_exact(form.group_tile_bytes()).enumerate() {
            form.get(group, row, weights);
            for (i, acc) in (args.first..args.first + args.count).zip(&mut acc) {
                let a = &args.codes[i * args.k + g * size..][..size];
                let sum: i32 = weights.iter().zip(a).map(|(&w, &a)| w * a as i32).sum();
                let scale = form.scale_of(group, row) * args.scales[i * groups + g];
                *acc = scale.mul_add(sum as f32, *acc);
            }
        }
        for (out, acc) in out.iter_mut().zip(acc).take(args.count) {
            out[row] = acc;
        }
    }
}
