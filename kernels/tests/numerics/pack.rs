//! What a source block holds comes out of the packed form with the same bits.

use super::{assert_same, source, Random, Weights};
use lutra_kernels::{dequantize, pack, pack_as, PackedForm, Pool, SourceType};

fn columns(ty: SourceType) -> &'static [usize] {
    match ty.block_elements() {
        1 => &[1, 2, 3, 5, 8, 64, 172],
        32 => &[32, 64, 96, 352],
        128 => &[128, 384],
        _ => &[256, 512, 1280],
    }
}

#[test]
fn unpack_gives_the_bits_of_dequantize() {
    let mut random = Random(1);
    let pools = [Pool::new(1), Pool::new(3)];
    for ty in SourceType::ALL {
        for &cols in columns(ty) {
            for rows in [1, 15, 16, 17, 32, 33, 100] {
                for weights in
                    [Weights::Sane, Weights::Hostile, Weights::Fill(0), Weights::Fill(0xff), Weights::Fill(0x80)]
                {
                    let src = source(ty, rows * cols, weights, &mut random);
                    let mut expected = vec![0f32; rows * cols];
                    dequantize(ty, &src, &mut expected).unwrap();
                    for form in PackedForm::candidates(ty) {
                        let packed = pack_as(form, ty, &src, rows, cols, &pools[rows % 2]).unwrap();
                        let mut row = vec![0f32; cols];
                        for (r, expected) in expected.chunks_exact(cols).enumerate() {
                            packed.unpack_row(r, &mut row);
                            assert_same(&row, expected, &format!("{form:?} {rows}×{cols} {weights:?} row {r}"));
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn every_byte_value_of_a_ternary_block_is_kept() {
    // One block per byte value: also those that no quantiser writes.
    for ty in [SourceType::TQ1_0, SourceType::TQ2_0] {
        let mut src = vec![];
        for byte in 0..=255u8 {
            src.extend(source(ty, 256, Weights::Fill(byte), &mut Random(0)));
        }
        let mut expected = vec![0f32; 256 * 256];
        dequantize(ty, &src, &mut expected).unwrap();
        assert!(expected.iter().all(|w| [-1.0, 0.0, 1.0, 2.0].contains(w)));
        for form in PackedForm::candidates(ty) {
            let packed = pack_as(form, ty, &src, 256, 256, &Pool::new(1)).unwrap();
            let mut row = vec![0f32; 256];
            for (r, expected) in expected.chunks_exact(256).enumerate() {
                packed.unpack_row(r, &mut row);
                assert_same(&row, expected, &format!("{form:?} byte {r}"));
            }
        }
    }
}

#[test]
fn packed_bytes_stay_within_two_percent_of_the_source() {
    use SourceType::*;
    for ty in SourceType::ALL {
        let (rows, cols) = (2048, 512);
        let src = source(ty, rows * cols, Weights::Fill(0), &mut Random(0));
        for form in PackedForm::candidates(ty) {
            let packed = pack_as(form, ty, &src, rows, cols, &Pool::new(1)).unwrap();
            let bits = packed.bytes() as f64 * 8.0 / (rows * cols) as f64;
            match ty {
                // What a codebook says of several weights at once is packed as a code of 3 or 4 bits each; placement
                // reckons with these numbers (`model/ggml_types.ts`).
                IQ1_S | IQ2_XXS => assert_eq!(bits, 106.0 / 32.0, "{form:?}"),
                IQ1_M | IQ2_XS | IQ2_S => assert_eq!(bits, 110.0 / 32.0, "{form:?}"),
                IQ3_XXS | IQ3_S => assert_eq!(bits, 138.0 / 32.0, "{form:?}"),
                TQ1_0 => assert!(bits <= 1.7, "{form:?}: {bits} bits a weight"),
                _ => assert!(packed.bytes() as f64 <= src.len() as f64 * 1.02, "{form:?}: {bits} bits a weight"),
            }
        }
    }
}

#[test]
fn wrong_sizes_are_errors() {
    let pool = Pool::new(1);
    let code = |result: lutra_kernels::Result<_>| result.map(|_: lutra_kernels::PackedMatrix| ()).unwrap_err().code;
    assert_eq!(code(pack(SourceType::Q4_0, &[0; 18], 1, 31, &pool)), -1);
    assert_eq!(code(pack(SourceType::Q4_0, &[0; 18], 2, 32, &pool)), -1);
    assert_eq!(code(pack(SourceType::F32, &[], 0, 32, &pool)), -1);
    assert_eq!(code(pack(SourceType::F32, &[], 1, 0, &pool)), -1);
    assert_eq!(code(pack(SourceType::F32, &[0; 4], usize::MAX, usize::MAX / 2, &pool)), -1);
    assert_eq!(SourceType::from_ggml(4).unwrap_err().code, -3);
    assert!(dequantize(SourceType::TQ2_0, &[0; 66], &mut [0.0; 255]).is_err());
    for ty in SourceType::ALL {
        assert_eq!(SourceType::from_ggml(ty as u32).unwrap(), ty);
    }
}
