//! Plain Rust for any machine, written to be read rather than to be fast: the oracle of the other instruction sets.

use super::vector::Vector;
use crate::dispatch::{Isa, Kernels, Variant};
use crate::matmul::{float_tile, TileArgs, TileKernel, TileOut, BATCH};
use crate::ops::{bf16_to_f32, f16_to_f32, f32_to_f16, float_ops};
use crate::pack::{Codes, FloatKind, PackedForm, ScaleKind, MAX_GROUP};
use crate::quantize::{build_tables_portable, quantize_portable, Tabling};

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
    variants,
    preferred: PackedForm::of,
    quantize: quantize_portable,
    tabling: Tabling::of_fours(build_tables_portable),
    ops: float_ops!(Lanes),
    read: |words| words.iter().fold(0, |sum, word| sum ^ word),
};

/// The kernel for any form, plainly.
pub(crate) fn variants(form: PackedForm) -> &'static [Variant] {
    const fn plain(tile: TileKernel) -> Variant {
        Variant { name: "plain", tile, tiles: 1, widths: &[8], tables: false, blocks: false }
    }
    match form.codes {
        Codes::Float(FloatKind::F32) => const { &[plain(float_tile::<Lanes, 0>)] },
        Codes::Float(FloatKind::F16) => const { &[plain(float_tile::<Lanes, 1>)] },
        Codes::Float(FloatKind::Bf16) => const { &[plain(float_tile::<Lanes, 2>)] },
        _ => const { &[plain(grouped)] },
    }
}

/// Rows one after the other, groups in order: `acc = fma(d·d_a, Σ s·(Σ value·a), acc)`, s being 1 without subs, then with
/// minima `acc = fma(m·d_a, Σ a, acc)`, or `acc = fma(dmin·d_a, −Σ m·(Σ a), acc)` with subs.
fn grouped(args: &TileArgs, out: &mut TileOut) {
    let form = args.form;
    let size = form.group as usize;
    let (groups, sub) = (args.k / size, form.scale.sub(size));
    let mut values = [0i32; MAX_GROUP];
    let values = &mut values[..size];
    for row in 0..form.tile_rows() {
        let mut acc = [0f32; BATCH];
        for (g, group) in args.tile.chunks_exact(form.group_tile_bytes()).enumerate() {
            let scales = form.get(group, row, args.scale, values);
            for (i, acc) in (args.first..args.first + args.count).zip(&mut acc) {
                let a = &args.codes[i * args.k + g * size..][..size];
                let (mut sum, mut mins) = (0i32, 0i32);
                for (j, (values, a)) in values.chunks_exact(sub).zip(a.chunks_exact(sub)).enumerate() {
                    let dot: i32 = values.iter().zip(a).map(|(&w, &a)| w * a as i32).sum();
                    let activations: i32 = a.iter().map(|&a| a as i32).sum();
                    sum += dot * scales.sub_scales[j];
                    mins += activations * scales.sub_mins[j];
                }
                let d_a = args.scales[i * groups + g];
                *acc = (scales.d * d_a).mul_add(sum as f32, *acc);
                match form.scale {
                    ScaleKind::F16Min => {
                        let activations: i32 = a.iter().map(|&a| a as i32).sum();
                        *acc = (scales.min * d_a).mul_add(activations as f32, *acc);
                    }
                    ScaleKind::Sub4Min | ScaleKind::Sub6Min => {
                        *acc = (scales.min * d_a).mul_add(-mins as f32, *acc);
                    }
                    _ => {}
                }
            }
        }
        for (out, acc) in out.iter_mut().zip(acc).take(args.count) {
            out[row] = acc;
        }
    }
}
