//! What differs between instruction sets, and nothing else.
//!
//! `vector` is the trait that float operations are written over, once; each sibling implements it and adds the kernels
//! that need their own instructions (tiles of low-bit weights, quantising, table building). `portable` is plain Rust and
//! the oracle: every other set must give the same bits. Callers reach all of it through `dispatch::Kernels`.

#[cfg(target_arch = "aarch64")]
pub(crate) mod aarch64;
pub(crate) mod dot;
pub(crate) mod portable;
pub(crate) mod vector;
#[cfg(target_arch = "x86_64")]
pub(crate) mod x86_64;

/// Bytes of a cache line, near enough.
pub(crate) const LINE: usize = 64;

/// Asks for the line at an address, which may be anywhere, to come into the cache of a level, 1 or 2: a prefetch never fails.
#[inline(always)]
pub(crate) fn prefetch<const LEVEL: u8>(at: *const u8) {
    const { assert!(LEVEL == 1 || LEVEL == 2) };
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE belongs to every x86-64, and a prefetch touches nothing.
    unsafe {
        use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0, _MM_HINT_T1};
        if LEVEL == 1 {
            _mm_prefetch::<_MM_HINT_T0>(at.cast());
        } else {
            _mm_prefetch::<_MM_HINT_T1>(at.cast());
        }
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: PRFM belongs to every 64-bit Arm, and touches nothing.
    unsafe {
        if LEVEL == 1 {
            std::arch::asm!("prfm pldl1keep, [{at}]", at = in(reg) at, options(nomem, nostack, preserves_flags));
        } else {
            std::arch::asm!("prfm pldl2keep, [{at}]", at = in(reg) at, options(nomem, nostack, preserves_flags));
        }
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = at;
}

#[cfg(test)]
mod tests {
    //! Forms that no source type of today packs into; `tests/numerics` has the others.

    use crate::matmul::BATCH;
    use crate::pack::{Codes, PackedForm, PackedMatrix, ScaleKind, SourceType, Values};
    use crate::{available, matmul_by, Activations, Plan, Pool};

    #[test]
    fn variants_are_what_the_registry_says() {
        for ty in SourceType::ALL {
            for (form, ks) in PackedForm::candidates(ty)
                .into_iter()
                .flat_map(|form| available().into_iter().map(move |ks| (form, ks)))
            {
                let variants = ks.variants(form);
                assert!(!variants.is_empty(), "{} {form:?}", ks.isa);
                for (i, variant) in variants.iter().enumerate() {
                    let widths = variant.widths;
                    let sorted = widths.windows(2).all(|two| two[0] > two[1]);
                    assert!(
                        sorted && widths[0] <= BATCH && widths.last() > Some(&0),
                        "{} {form:?} {variant:?}",
                        ks.isa
                    );
                    assert!(variants[..i].iter().all(|other| other.name != variant.name), "{} {form:?}", ks.isa);
                }
            }
        }
    }

    #[test]
    fn every_width_group_and_offset_gives_portables_bits() {
        let mut state = 1u64;
        let mut random = move || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            state >> 33
        };
        let pool = Pool::new(1);
        let planes = [1, 2, 3, 4].map(Codes::Planes);
        let fields = [1, 2, 3, 4, 5, 6, 8].map(Codes::Fields);
        for codes in planes.into_iter().chain(fields).chain([Codes::Trits, Codes::IndexedTrits]) {
            let (limit, offsets): (u64, &[i8]) = match codes {
                Codes::Planes(n) | Codes::Fields(n @ ..=6) => (1 << n, &[0, -1, -(1 << (n - 1)), 1]),
                Codes::Fields(_) => (256, &[0]),
                _ => (3, &[-1, 0]),
            };
            let kinds = offsets.iter().flat_map(|&offset| [(offset, ScaleKind::F16), (offset, ScaleKind::F16Min)]);
            let with_zeros: &[ScaleKind] = match codes {
                Codes::Fields(2..=4) => &[ScaleKind::F16Zero4, ScaleKind::F32Zero4],
                Codes::Fields(8) => &[ScaleKind::F16Zero8, ScaleKind::F32Zero8],
                _ => &[],
            };
            let kinds = kinds.chain(with_zeros.iter().map(|&scale| (0, scale)));
            for group in [32u16, 64, 96, 128, 256] {
                for (offset, scale) in kinds.clone() {
                    let form = PackedForm { codes, values: Values::Offset(offset), group, scale };
                    // Random codes; then the largest and the smallest throughout, against the largest activations.
                    for extreme in [None, Some(limit - 1), Some(0)] {
                        let cols = 2 * group as usize;
                        let mut codes = vec![0u8; 37 * cols];
                        codes.fill_with(|| extreme.unwrap_or_else(|| random() % limit) as u8);
                        let w = PackedMatrix::from_codes(form, 37, cols, &codes, 0x2e66, 0xad21);
                        // The last: 64 and 49 rows, for tiles 16 × 4, 16 × 2, 16 and a rest.
                        for n in [1, 2, 5, 11, 113] {
                            let mut x: Vec<f32> = vec![0.0; n * cols];
                            x.fill_with(|| random() as f32 / (1u64 << 30) as f32 - 1.0);
                            if extreme.is_some() {
                                x.fill([1.0, -1.0][n % 2]);
                            }
                            // 40 at once: the second 40 begin within a block of 16.
                            let widths: &[usize] = if n > 80 { &[usize::MAX, 40] } else { &[usize::MAX] };
                            let mut expected = None;
                            for ks in available() {
                                let variants = ks.variants(form).iter().enumerate();
                                for ((i, variant), &width) in
                                    variants.flat_map(|of| widths.iter().map(move |w| (of, w)))
                                {
                                    let plan = Plan { variant: i, width, ..Plan::default() };
                                    let (mut act, mut y) = (Activations::new(), vec![0f32; n * w.rows]);
                                    act.prepare(ks, &x, n, cols, &[form], &pool);
                                    matmul_by(plan, ks, &w, &act, &mut y, w.rows, &pool);
                                    let y: Vec<u32> = y.into_iter().map(f32::to_bits).collect();
                                    let expected = expected.get_or_insert_with(|| y.clone());
                                    let what = format!("{} {}", ks.isa, variant.name);
                                    assert_eq!(&y, expected, "{what} {form:?} × {n}, {width} at once, {extreme:?}");
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}
