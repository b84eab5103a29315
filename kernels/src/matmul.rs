//! Matrix products `y = x·Wᵀ`: prepared activations × packed weights, tile by tile over the pool.
//!
//! Low-bit weights: activations are int8 per group, the product of a group is an exact integer, and groups are added in
//! order, `acc = fma(d_w·d_a, isum, acc)`. Float weights: f32 activations, four accumulators per row over k mod 4, each
//! by fma in order, combined as (a0 + a1) + (a2 + a3).

use crate::arch::vector::Vector;
use crate::dispatch::{Kernels, Variant};
use crate::pack::{Codes, PackedForm, PackedMatrix, FIELD_TILE, PLANE_TILE};
use crate::pool::{portion, Pool};
use crate::quantize::{quantize16, Line};
use std::cell::RefCell;
use std::ops::Range;

/// Activation rows that a tile kernel takes at once.
pub(crate) const BATCH: usize = 64;

/// Activation rows whose scales and sums of a group may lie together (`Block`).
pub(crate) const BLOCK: usize = 16;

/// A group of neighbouring activation rows.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(crate) struct Block {
    pub scales: [f32; BLOCK],
    /// Σ a, exact: no sum of int8 codes of a group is as large as 2^24.
    pub sums: [f32; BLOCK],
}

impl Block {
    const ZERO: Block = Block { scales: [0.0; BLOCK], sums: [0.0; BLOCK] };
}

/// Codes behind the last activation that kernels may read; they meet digits of 0.
pub(crate) const ACTIVATION_PAD: usize = 16;

/// How a product runs: of consequence for its speed alone. The default is the rule where nothing was measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Which of `Kernels::variants` of the form.
    pub variant: usize,
    /// The most activation rows given to the kernel at once; more than the kernel takes counts as what it takes.
    pub width: usize,
    /// Bytes of prepared activations that meet all tiles before the next do: what should stay in a core's L2 cache while
    /// weights pass by.
    pub block_bytes: usize,
}

impl Default for Plan {
    fn default() -> Self {
        Plan { variant: 0, width: usize::MAX, block_bytes: 256 << 10 }
    }
}

impl Plan {
    /// Panics if `ks` has no such variant.
    fn variant(self, ks: &Kernels, form: PackedForm) -> &'static Variant {
        ks.variants(form)
            .get(self.variant)
            .unwrap_or_else(|| panic!("{ks:?} has no variant {} of {form:?}", self.variant))
    }
}

/// What a tile kernel reads. `codes`, `scales`, `sums` and `tables` are of the form's `act_group`, row-major, and hold at
/// least `first + count` rows of `k`, `codes` `ACTIVATION_PAD` more (their lengths are checked in `matmul`).
#[derive(Clone, Copy)]
pub(crate) struct TileArgs<'a> {
    pub form: PackedForm,
    /// Tiles, one after the other.
    pub tile: &'a [u8],
    pub tiles: usize,
    pub k: usize,
    pub first: usize,
    /// 1 ..= BATCH.
    pub count: usize,
    pub x: &'a [f32],
    pub codes: &'a [i8],
    pub scales: &'a [f32],
    /// Σ a of each group.
    pub sums: &'a [i32],
    /// Σ a of each sub; empty for forms without.
    pub sub_sums: &'a [i16],
    /// The matrix's scale, for `ScaleKind::Tensor`.
    pub scale: f32,
    /// `Tabling::lines` for each group.
    pub tables: &'a [Line],
    /// Scales and sums once more, every group of the first `BLOCK` rows, then of the next; of whole blocks alone.
    pub blocks: &'a [Block],
}

/// `out[j][row]`, for activation row `first + j`, the rows of all tiles; those from `PLANE_TILE` on, which are of a second tile of
/// planes, in `out[BATCH + j]`.
pub(crate) type TileOut = [[f32; PLANE_TILE]; 2 * BATCH];

/// Rows begin in lines of the cache.
#[repr(align(64))]
struct Aligned(TileOut);

thread_local! {
    /// What kernels write to. Kept, as making it anew, 16 KiB of zeros, takes a few per cent of a small product's time.
    static OUT: RefCell<Aligned> = const { RefCell::new(Aligned([[0.0; PLANE_TILE]; 2 * BATCH])) };
}

/// Multiplies tiles, as many as the kernel's `Variant` takes or fewer, with `count` rows of activations.
///
/// # Safety
///
/// The machine has the instruction set of the kernel's set, the kernel is the one for `args.form`, and the slices are as
/// long as `TileArgs` says.
pub(crate) type TileKernel = unsafe fn(args: &TileArgs, out: &mut TileOut);

/// Activations of one int8 group size.
struct Quantized {
    group: usize,
    /// Lines, so that rows of a multiple of 64 codes begin at one.
    codes: Vec<Line>,
    scales: Vec<f32>,
    sums: Vec<i32>,
    /// Sums of every 16 and of every 32 codes.
    sums16: Vec<i16>,
    sums32: Vec<i16>,
    tables: Vec<Line>,
    blocks: Vec<Block>,
    /// What of it belongs to the current activations.
    current: bool,
    has_tables: bool,
    has_blocks: bool,
}

/// To how many bits activations are rounded, a scale for each group of weights. Float weights take them as they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    #[default]
    A8,
    /// As two digits (`quantize::quantize16`), each a row of int8 activations to every kernel. Products of both are exact
    /// integers, groups are added in order for each, and y = high + low at the end.
    A16,
}

impl Precision {
    /// Rows of int8 activations that stand for one.
    fn digits(self) -> usize {
        match self {
            Precision::A8 => 1,
            Precision::A16 => 2,
        }
    }
}

/// Activations made ready for products: a reusable scratch.
#[derive(Default)]
pub struct Activations {
    precision: Precision,
    n: usize,
    k: usize,
    has_floats: bool,
    x: Vec<f32>,
    gathered: Vec<f32>,
    quantized: Vec<Quantized>,
}

/// A pointer that threads write through, each to places of its own.
#[derive(Clone, Copy)]
struct Shared<T>(*mut T);
// SAFETY: only moves the address; every use argues why its places are disjoint.
unsafe impl<T> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// # Safety
    ///
    /// `start .. start + len` lies within the slice that the pointer was made of, which is still borrowed mutably, and no
    /// other part of the job touches it.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)]
    unsafe fn slice(&self, start: usize, len: usize) -> &mut [T] {
        std::slice::from_raw_parts_mut(self.0.add(start), len)
    }
}

impl Activations {
    /// Rounded to 8 bits.
    pub fn new() -> Self {
        Self::default()
    }

    pub fn with_precision(precision: Precision) -> Self {
        Self { precision, ..Self::default() }
    }

    /// `prepare` with the columns of `x` in another order, if there is one: place i takes `order[i]`, below `k`; products are with
    /// weights of as many columns as there are places.
    #[allow(clippy::too_many_arguments)]
    pub fn prepare_in_order(
        &mut self,
        ks: &Kernels,
        x: &[f32],
        order: Option<&[u32]>,
        n: usize,
        k: usize,
        forms: &[PackedForm],
        pool: &Pool,
    ) {
        let Some(order) = order else { return self.prepare(ks, x, n, k, forms, pool) };
        let mut gathered = std::mem::take(&mut self.gathered);
        gathered.clear();
        x.chunks_exact(k).for_each(|x| gathered.extend(order.iter().map(|&from| x[from as usize])));
        self.prepare(ks, &gathered, n, order.len(), forms, pool);
        self.gathered = gathered;
    }

    /// Prepares `x` (n × k, row-major) for products with weights of `forms`, by any plan; several matrices share one call. `k`
    /// must be whole groups of every form.
    pub fn prepare(&mut self, ks: &Kernels, x: &[f32], n: usize, k: usize, forms: &[PackedForm], pool: &Pool) {
        assert!(n > 0 && k > 0 && n.checked_mul(k) == Some(x.len()), "prepare: {n} × {k} is not {}", x.len());
        (self.n, self.k) = (n, k);
        self.has_floats = forms.iter().any(|form| form.act_group() == 0);
        if self.has_floats {
            self.x.clear();
            self.x.extend_from_slice(x);
        }
        self.quantized.iter_mut().for_each(|q| q.current = false);
        for form in forms.iter().filter(|form| form.act_group() != 0) {
            let group = form.act_group();
            assert!(k % group == 0, "prepare: rows of {k} are not groups of {group}");
            let tables = ks.variants(*form).iter().any(|variant| variant.tables);
            let blocks = ks.variants(*form).iter().any(|variant| variant.blocks);
            let at = self.quantized.iter().position(|q| q.group == group).unwrap_or_else(|| {
                self.quantized.push(Quantized::new(group));
                self.quantized.len() - 1
            });
            self.quantized[at].prepare(ks, x, [n, k], self.precision, [tables, blocks], pool);
        }
    }
}

impl Quantized {
    fn new(group: usize) -> Self {
        Quantized {
            group,
            codes: Vec::new(),
            scales: Vec::new(),
            sums: Vec::new(),
            sums16: Vec::new(),
            sums32: Vec::new(),
            tables: Vec::new(),
            blocks: Vec::new(),
            current: false,
            has_tables: false,
            has_blocks: false,
        }
    }

    /// Of all rows, and what fills the last line.
    fn codes(&self) -> &[i8] {
        // SAFETY: lines are bytes and nothing else, one after the other.
        unsafe { std::slice::from_raw_parts(self.codes.as_ptr().cast(), self.codes.len() * Line::LEN) }
    }

    /// Makes `blocks` of `rows` rows of `groups`.
    fn gather(&mut self, rows: usize, groups: usize, pool: &Pool) {
        let whole = rows / BLOCK;
        self.blocks.resize(whole * groups, Block::ZERO);
        let (scales, sums, blocks) = (&self.scales, &self.sums, Shared(self.blocks.as_mut_ptr()));
        pool.run(whole, &|i| {
            // SAFETY: part i takes the groups of block i, within the length just set.
            let blocks = unsafe { blocks.slice(i * groups, groups) };
            for (m, row) in (i * BLOCK..(i + 1) * BLOCK).enumerate() {
                let of_row = row * groups..(row + 1) * groups;
                for (block, (&scale, &sum)) in blocks.iter_mut().zip(scales[of_row.clone()].iter().zip(&sums[of_row])) {
                    (block.scales[m], block.sums[m]) = (scale, sum as f32);
                }
            }
        });
    }

    fn prepare(
        &mut self,
        ks: &Kernels,
        x: &[f32],
        [n, k]: [usize; 2],
        precision: Precision,
        [tables, blocks]: [bool; 2],
        pool: &Pool,
    ) {
        let (quantize, build) = (!self.current, tables && !(self.current && self.has_tables));
        let gather = blocks && !(self.current && self.has_blocks);
        self.has_tables = tables || self.current && self.has_tables;
        self.has_blocks = blocks || self.current && self.has_blocks;
        self.current = true;
        if !quantize && !build && !gather {
            return;
        }
        // From here on lengths are those of all digits of a row.
        let (x_len, k) = (k, k * precision.digits());
        let (group, groups) = (self.group, k / self.group);
        let lines = groups * (ks.tabling.lines)(group);
        self.codes.resize((n * k + ACTIVATION_PAD).div_ceil(Line::LEN), Line::ZERO);
        self.scales.resize(n * groups, 0.0);
        self.sums.resize(n * groups, 0);
        // Only groups of 256 are of forms with subs.
        let (subs16, subs32) = if group == 256 { (k / 16, k / 32) } else { (0, 0) };
        self.sums16.resize(n * subs16, 0);
        self.sums32.resize(n * subs32, 0);
        if build {
            self.tables.resize(n * lines, Line::ZERO);
        }
        let codes = Shared(self.codes.as_mut_ptr().cast::<i8>());
        let scales = Shared(self.scales.as_mut_ptr());
        let sums = Shared(self.sums.as_mut_ptr());
        let (sums16, sums32) = (Shared(self.sums16.as_mut_ptr()), Shared(self.sums32.as_mut_ptr()));
        let tables = Shared(self.tables.as_mut_ptr());
        pool.run(n, &|i| {
            // SAFETY: part i takes row i of each, within the lengths just set. `ks` is usable here (see `Kernels`), and
            // the slices are of the lengths its functions ask for: k is whole groups, and groups are multiples of 4.
            unsafe {
                let codes = codes.slice(i * k, k);
                if quantize {
                    let (scales, sums) = (scales.slice(i * groups, groups), sums.slice(i * groups, groups));
                    let x = &x[i * x_len..][..x_len];
                    match precision {
                        Precision::A8 => (ks.quantize)(x, group, codes, scales, sums),
                        Precision::A16 => quantize16(x, group, codes, scales, sums),
                    }
                    let (sums16, sums32) = (sums16.slice(i * subs16, subs16), sums32.slice(i * subs32, subs32));
                    for (sum, codes) in sums16.iter_mut().zip(codes.chunks_exact(16)) {
                        *sum = codes.iter().map(|&a| a as i16).sum(); // ≤ 16·127
                    }
                    for (sum, two) in sums32.iter_mut().zip(sums16.chunks_exact(2)) {
                        *sum = two[0] + two[1];
                    }
                }
                if build {
                    (ks.tabling.build)(codes, group, tables.slice(i * lines, lines));
                }
            }
        });
        if gather {
            self.gather(n * precision.digits(), x_len / group, pool);
        }
    }
}

/// `matmul_by` the default plan.
pub fn matmul(ks: &Kernels, w: &PackedMatrix, act: &Activations, y: &mut [f32], y_stride: usize, pool: &Pool) {
    matmul_by(Plan::default(), ks, w, act, y, y_stride, pool);
}

/// `y[i·y_stride + row] = Σ_k w[row, k]·x[i, k]` for every row of `act` and of `w`; `y_stride ≥ w.rows`. Every plan gives the
/// same bits.
///
/// Panics if `act` was not prepared for `w`'s form and columns by the same kernels, if `ks` has no such plan, or if `y`
/// is too short.
pub fn matmul_by(
    plan: Plan,
    ks: &Kernels,
    w: &PackedMatrix,
    act: &Activations,
    y: &mut [f32],
    y_stride: usize,
    pool: &Pool,
) {
    run(&[Product::new(plan, ks, w, act, y, y_stride)], act.n, pool, &|_, _| {});
}

/// `matmul_by` with several matrices in one job of the pool, each with an output of its own, row-major without gaps.
pub fn matmul_all<const N: usize>(
    ks: &Kernels,
    products: [(Plan, &PackedMatrix, &mut [f32]); N],
    act: &Activations,
    pool: &Pool,
) {
    let products = products.map(|(plan, w, y)| Product::new(plan, ks, w, act, y, w.rows));
    run(&products, act.n, pool, &|_, _| {});
}

/// `y = activate(x·gateᵀ, x·upᵀ)` in one job of the pool; `activate` changes its first argument, element by element. `up`'s
/// product goes to `scratch`, which is as long as `y`.
pub fn matmul_gated(
    ks: &Kernels,
    [gate, up]: [(Plan, &PackedMatrix); 2],
    activate: impl Fn(&Kernels, &mut [f32], &[f32]) + Sync,
    act: &Activations,
    y: &mut [f32],
    scratch: &mut [f32],
    pool: &Pool,
) {
    let stride = gate.1.rows;
    assert!(stride == up.1.rows, "matmul_gated: {:?} and {:?}", gate.1, up.1);
    let products = [(gate, y), (up, scratch)].map(|((plan, w), y)| Product::new(plan, ks, w, act, y, stride));
    let (y, scratch) = (products[0].y, products[1].y);
    run(&products, act.n, pool, &|inputs, rows| {
        for i in inputs {
            let (start, len) = (i * stride + rows.start, rows.len());
            // SAFETY: within both by the check in `Product::new`. `run` has written these elements and leaves them to this
            // call alone.
            activate(ks, unsafe { y.slice(start, len) }, unsafe { scratch.slice(start, len) });
        }
    });
}

/// The rows of a product that are a thread's share: whole tiles, the largest's size whatever the form.
fn share(rows: usize, thread: usize, threads: usize) -> Range<usize> {
    let tiles = portion(rows.div_ceil(PLANE_TILE), thread, threads);
    (tiles.start * PLANE_TILE).min(rows)..(tiles.end * PLANE_TILE).min(rows)
}

/// Where a thread's share of a matrix lies: what it reads, in order.
pub(crate) fn share_of(w: &PackedMatrix, thread: usize, threads: usize) -> &[u8] {
    let (rows, tile) = (share(w.rows, thread, threads), w.form.tile_rows());
    w.tiles_from(rows.start / tile, rows.len().div_ceil(tile))
}

/// A matrix, its kernel, and where its product goes.
struct Product<'a> {
    w: &'a PackedMatrix,
    kernel: TileKernel,
    /// Tiles that it takes at once.
    tiles: usize,
    /// Rows of `args` that stand for one of the activations.
    digits: usize,
    width: usize,
    block_bytes: usize,
    args: TileArgs<'a>,
    y: Shared<f32>,
    y_stride: usize,
}

impl<'a> Product<'a> {
    fn new(
        plan: Plan,
        ks: &Kernels,
        w: &'a PackedMatrix,
        act: &'a Activations,
        y: &'a mut [f32],
        y_stride: usize,
    ) -> Self {
        let (form, n, k) = (w.form, act.n, act.k);
        assert!(n > 0 && k == w.cols, "matmul: activations of {k} for {w:?}");
        let needed = (n - 1).checked_mul(y_stride).and_then(|before| before.checked_add(w.rows));
        assert!(y_stride >= w.rows && needed.is_some_and(|needed| needed <= y.len()), "matmul: output is too short");
        let variant = plan.variant(ks, form);
        let digits = if form.act_group() == 0 { 1 } else { act.precision.digits() };
        let rows = n * digits;
        let mut args = TileArgs {
            form,
            tile: &[],
            tiles: 0,
            k,
            first: 0,
            count: 0,
            x: &[],
            codes: &[],
            scales: &[],
            sums: &[],
            sub_sums: &[],
            scale: w.scale,
            tables: &[],
            blocks: &[],
        };
        if form.act_group() == 0 {
            assert!(act.has_floats, "matmul: activations were not prepared for {form:?}");
            args.x = &act.x[..n * k];
        } else {
            let prepared = act.quantized.iter().find(|q| q.current && q.group == form.act_group());
            let prepared = prepared.unwrap_or_else(|| panic!("matmul: activations were not prepared for {form:?}"));
            let groups = k / prepared.group;
            args.codes = &prepared.codes()[..rows * k + ACTIVATION_PAD];
            args.scales = &prepared.scales[..rows * groups];
            args.sums = &prepared.sums[..rows * groups];
            args.sub_sums = match form.scale.sub(prepared.group) {
                _ if form.scale.words() == 0 => &[],
                16 => &prepared.sums16[..rows * (k / 16)],
                _ => &prepared.sums32[..rows * (k / 32)],
            };
            if variant.tables {
                assert!(prepared.has_tables, "matmul: activations were prepared for other kernels");
                args.tables = &prepared.tables[..rows * groups * (ks.tabling.lines)(prepared.group)];
            }
            if variant.blocks {
                assert!(prepared.has_blocks, "matmul: activations were prepared for other kernels");
                args.blocks = &prepared.blocks[..rows / BLOCK * groups];
            }
        }
        // Of activations; the digits of one go together.
        let width = plan.width.min(variant.widths[0] / digits).max(1);
        let y = Shared(y.as_mut_ptr());
        Product {
            w,
            kernel: variant.tile,
            tiles: variant.tiles,
            digits,
            width,
            block_bytes: plan.block_bytes,
            args,
            y,
            y_stride,
        }
    }

    /// Activation rows that stay in cache.
    fn block(&self, n: usize) -> usize {
        let TileArgs { form, k, tables, .. } = self.args;
        let per_row = k * if form.act_group() == 0 { 4 } else { self.digits } + tables.len() / n * Line::LEN;
        (self.block_bytes / per_row).clamp(1, n).next_multiple_of(self.width)
    }
}

/// Computes products of the same `n` activation rows. A thread takes its share of the rows of every matrix, so that forms of
/// different weight balance and a thread meets the same tiles every time. `finish(i.., rows)` is called when a share is there
/// for activation rows `i..`, with the last matrix's rows; matrices of as many rows have the same shares.
fn run(products: &[Product], n: usize, pool: &Pool, finish: &(dyn Fn(Range<usize>, Range<usize>) + Sync)) {
    // Blocks of activations that stay in cache meet all tiles; a tile stays in cache while it meets the block.
    let block = products.iter().map(|p| p.block(n)).min().unwrap_or(n);
    let parts = pool.threads();
    for start in (0..n).step_by(block) {
        let inputs = start..n.min(start + block);
        pool.run(parts, &|part| {
            let mut rows_here = 0..0;
            OUT.with_borrow_mut(|Aligned(out)| {
                for p in products {
                    let tile_rows = p.args.form.tile_rows();
                    rows_here = share(p.w.rows, part, parts);
                    for row in rows_here.clone().step_by(tile_rows * p.tiles) {
                        let rows = (tile_rows * p.tiles).min(rows_here.end - row);
                        let tiles = rows.div_ceil(tile_rows);
                        let mut args = TileArgs { tile: p.w.tiles_from(row / tile_rows, tiles), tiles, ..p.args };
                        for first in inputs.clone().step_by(p.width) {
                            let count = p.width.min(inputs.end - first);
                            (args.first, args.count) = (first * p.digits, count * p.digits);
                            // SAFETY: `Product::new` had kernels that are usable on this machine, and cut the slices.
                            unsafe { (p.kernel)(&args, out) };
                            if p.digits == 2 {
                                for out in out.chunks_exact_mut(BATCH).take(rows.div_ceil(PLANE_TILE)) {
                                    for j in 0..count {
                                        out[j] = std::array::from_fn(|row| out[2 * j][row] + out[2 * j + 1][row]);
                                    }
                                }
                            }
                            for j in 0..count {
                                // SAFETY: within `y` by the check in `Product::new`; rows of this tile are written by this
                                // part alone, as edges are multiples of tiles.
                                let y = unsafe { p.y.slice((first + j) * p.y_stride + row, rows) };
                                for (y, out) in y.chunks_mut(PLANE_TILE).zip(out.chunks_exact(BATCH)) {
                                    y.copy_from_slice(&out[j][..y.len()]);
                                }
                            }
                        }
                    }
                }
            });
            finish(inputs.clone(), rows_here);
        });
    }
}

/// Float tiles over any vector; KIND 0, 1, 2 = F32, F16, BF16.
///
/// # Safety
///
/// `TileKernel`'s, and the machine has `V`'s instruction set.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // lanes and halves are places, not items
pub(crate) unsafe fn float_tile<V: Vector, const KIND: u8>(args: &TileArgs, out: &mut TileOut) {
    debug_assert!(matches!(args.form.codes, Codes::Float(_)));
    let size = if KIND == 0 { 4 } else { 2 };
    let k = args.k;
    assert!(args.tile.len() == k * FIELD_TILE * size && args.x.len() >= (args.first + args.count) * k);
    for (j, out) in out.iter_mut().enumerate().take(args.count) {
        let x = &args.x[(args.first + j) * k..][..k];
        let mut acc = [[V::zero(); 2]; 4];
        let fours = x.chunks_exact(4);
        let rest = fours.remainder();
        for (i, four) in fours.enumerate() {
            for lane in 0..4 {
                let value = V::splat(four[lane]);
                for half in 0..2 {
                    acc[lane][half] = weights::<V, KIND>(args, 4 * i + lane, half).fma(value, acc[lane][half]);
                }
            }
        }
        for (lane, &value) in rest.iter().enumerate() {
            for half in 0..2 {
                acc[lane][half] =
                    weights::<V, KIND>(args, k - rest.len() + lane, half).fma(V::splat(value), acc[lane][half]);
            }
        }
        for half in 0..2 {
            let sum = acc[0][half].add(acc[1][half]).add(acc[2][half].add(acc[3][half]));
            sum.store(out.as_mut_ptr().add(8 * half));
        }
    }
}

/// Eight weights of a float tile's column: rows 8·half .. + 8.
///
/// # Safety
///
/// `float_tile`'s, `column < args.k` and `half < 2`.
#[inline(always)]
unsafe fn weights<V: Vector, const KIND: u8>(args: &TileArgs, column: usize, half: usize) -> V {
    let size = if KIND == 0 { 4 } else { 2 };
    let at = args.tile.as_ptr().add((column * FIELD_TILE + half * 8) * size);
    match KIND {
        0 => V::load(at.cast()),
        1 => V::load_f16(at.cast()),
        _ => V::load_bf16(at.cast()),
    }
}
