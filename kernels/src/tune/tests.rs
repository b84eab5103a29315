//! The tuner with a clock of the tests' own, and stores as others may leave them.

use super::race::Setting;
use super::*;
use crate::dispatch::Variant;
use crate::{available, matmul, matmul_by, pack_as, select, Activations, Result};
use std::cell::RefCell;
use std::fs;
use std::path::Path;
use std::rc::Rc;

/// A clock that says what the test wants.
#[derive(Default)]
struct Account {
    calls: Vec<(Shape, Setting)>,
    spent: f64,
}

struct Fake<F> {
    account: Rc<RefCell<Account>>,
    seconds: F,
}

impl<F: FnMut(Shape, &Setting) -> f64> Measure for Fake<F> {
    fn seconds(&mut self, shape: Shape, setting: &Setting) -> Result<f64> {
        let seconds = (self.seconds)(shape, setting);
        let mut account = self.account.borrow_mut();
        account.calls.push((shape, *setting));
        account.spent += seconds;
        Ok(seconds)
    }
    fn spent(&self) -> f64 {
        self.account.borrow().spent
    }
    fn forget(&mut self) {}
}

fn tuner<'a>(tuning: Tuning, seconds: impl FnMut(Shape, &Setting) -> f64 + 'a) -> (Tuner<'a>, Rc<RefCell<Account>>) {
    let account = Rc::new(RefCell::new(Account::default()));
    let ks = available().into_iter().next_back().unwrap();
    (Tuner::with(ks, 2, tuning, RING_BYTES, Box::new(Fake { account: account.clone(), seconds })), account)
}

/// Seconds of a product of so many rows where all candidates are alike.
fn alike(shape: Shape, setting: &Setting) -> f64 {
    1e-13 * (shape.rows * shape.cols * setting.n) as f64
}

fn scratch(name: &str) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("lutra-tune-{name}-{}", std::process::id()));
    let _ = fs::remove_dir_all(&folder);
    folder
}

const ROWS: usize = 2048;
const COLS: usize = 2048;
const TY: SourceType = SourceType::Q4_0;

/// What a tuner with this clock chooses for the matrix.
fn chosen(seconds: impl FnMut(Shape, &Setting) -> f64) -> Choice {
    let (mut tuner, _) = tuner(Tuning::Auto, seconds);
    tuner.form(TY, ROWS, COLS);
    let (_, choice, origin) = tuner.choices.pop().unwrap();
    assert_eq!((origin, tuner.warnings), (Origin::Measured, vec![]));
    choice
}

fn usual() -> Choice {
    Choice::usual(available()[available().len() - 1], TY)
}

/// The same but for how the widest is written.
fn same(choice: &Choice, other: &Choice) -> bool {
    let ks = available()[available().len() - 1];
    let widest = |choice: &Choice, plan: Plan| ks.variants(choice.form)[plan.variant].widths[0];
    let plain = |choice: &Choice| choice.plans.map(|plan| Plan { width: plan.width.min(widest(choice, plan)), ..plan });
    choice.form == other.form && choice.inline_rows == other.inline_rows && plain(choice) == plain(other)
}

#[test]
fn the_rule_stays_unless_something_is_better_by_three_per_cent() {
    assert!(same(&chosen(alike), &usual()));
    // A width below the batch, and whose it is.
    let variants = available()[available().len() - 1].variants(usual().form);
    let narrow = |of: &Variant| of.widths.iter().copied().find(|&width| width < 8);
    let found = variants.iter().enumerate().find_map(|(i, of)| narrow(of).map(|width| (i, width)));
    let Some((variant, width)) = found else { return }; // portable alone: nothing to choose from
    for (factor, wins) in [(0.98, false), (0.96, true), (1.1, false)] {
        let choice = chosen(|shape, setting| {
            let own = setting.form == usual().form
                && setting.n == 8
                && (setting.plan.variant, setting.plan.width) == (variant, width);
            alike(shape, setting) * if own { factor } else { 1.0 }
        });
        let mut expected = usual();
        if wins {
            expected.plans[2] = Plan { variant, width, ..expected.plans[2] };
        }
        assert!(same(&choice, &expected), "{factor}: {choice:?}");
    }
    // Rounds of very different speed, as on a machine that others use: it is the ratio within a round that counts.
    let mut calls = 0;
    let choice = chosen(|shape, setting| {
        calls += 1;
        alike(shape, setting) * [1.0, 7.0, 0.4][calls / 40 % 3]
    });
    assert_eq!(choice.form, usual().form);
}

#[test]
fn decoding_counts_twice_for_the_form() {
    let ks = available()[available().len() - 1];
    let Some(other) = PackedForm::candidates(TY).into_iter().find(|&form| form != usual().form && ks.has_kernel(form))
    else {
        return;
    };
    for (decode, prefill, wins) in [
        (0.9, 1.0, true),
        (0.9, 1.1, true),
        (0.9, 1.2, false),
        (0.98, 1.0, false),
        (1.0, 0.9, true),
        (1.02, 0.5, true),
        (1.2, 0.7, false),
    ] {
        let choice = chosen(|shape, setting| {
            let factor = if setting.n > 8 { prefill } else { decode };
            alike(shape, setting) * if setting.form == other { factor } else { 1.0 }
        });
        assert_eq!(choice.form == other, wins, "{decode} {prefill}");
    }
}

#[test]
fn blocks_and_one_thread_are_chosen_too() {
    let choice = chosen(|shape, setting| {
        alike(shape, setting) * if setting.plan.block_bytes == 1 << 20 && setting.n > 64 { 0.8 } else { 1.0 }
    });
    assert_eq!(choice.plans.map(|plan| plan.block_bytes), [256 << 10, 256 << 10, 256 << 10, 1 << 20]);

    // 64 × 256 of Q4_0 are 9216 bytes: the rule lets the calling thread do up to seven rows alone.
    for (until, expected) in [(0, Some(0)), (1, Some(1)), (4, None), (8, Some(8))] {
        let (mut tuner, account) = tuner(Tuning::Auto, |shape, setting| {
            alike(shape, setting) * if setting.inline == (setting.n <= until) { 0.5 } else { 1.0 }
        });
        tuner.form(TY, 64, 256);
        assert_eq!(tuner.choices[0].1.inline_rows, expected, "{until}");
        assert!(account.borrow().calls.iter().all(|(_, setting)| !setting.inline || setting.n <= 8));
        let (plans, _) = tuner.finish();
        let w = matrix(plans.0[0].1.form, 64, 256);
        for n in 1..20 {
            let most = if until == 4 { 7 } else { until };
            assert_eq!(plans.is_inline(&w, n), n <= most, "{until} {n}");
        }
    }
}

fn matrix(form: PackedForm, rows: usize, cols: usize) -> PackedMatrix {
    let source: Vec<u8> = (0..TY.tensor_bytes(rows, cols).unwrap()).map(|i| 0x20 | (i * 7 % 31) as u8).collect();
    pack_as(form, TY, &source, rows, cols, &Pool::new(1)).unwrap()
}

#[test]
fn plans_are_those_of_the_matrix_and_batch() {
    let ks = available()[available().len() - 1];
    let (mut tuner, _) = tuner(Tuning::Auto, |shape, setting| {
        let odd = setting.n == 4 && setting.plan.width == 2 && shape.cols == COLS;
        alike(shape, setting) * if odd { 0.5 } else { 1.0 }
    });
    let form = tuner.form(TY, ROWS, COLS);
    assert_eq!(tuner.form(TY, 128, 256), form);
    // Matrices of more weights than are measured are one shape.
    tuner.form(TY, 1 << 17, COLS);
    tuner.form(TY, 1 << 16, COLS);
    let (plans, report) = tuner.finish();
    assert_eq!(report.choices.len(), 3);
    let width = if ks.variants(form).iter().any(|of| of.widths.contains(&2)) { 2 } else { 8 };
    for (rows, cols, n, expected) in
        [(ROWS, COLS, 1, 8), (ROWS, COLS, 2, width), (ROWS, COLS, 4, width), (ROWS, COLS, 5, 8), (ROWS, COLS, 500, 8)]
    {
        assert_eq!(plans.plan(&matrix(form, rows, cols), n).width.min(8), expected, "{n}");
    }
    // Another form, another number of rows, of columns: nothing is known.
    assert_eq!(plans.plan(&matrix(form, ROWS - 16, COLS), 4), Plan::default());
    assert_eq!(plans.plan(&matrix(form, 128, 256), 4).width.min(8), 8);
    for other in PackedForm::candidates(TY).into_iter().filter(|&other| other != form) {
        assert_eq!(plans.plan(&matrix(other, ROWS, COLS), 4), Plan::default());
    }
}

#[test]
fn the_budget_bounds_what_is_measured() {
    // Ever slower devices, until nothing can be measured at all.
    for cost in [0.001, 0.01, 0.1, 1.0, 10.0] {
        let (mut tuner, account) = tuner(Tuning::Auto, |_, _| cost);
        for rows in (32..).step_by(32).take(100) {
            tuner.form(TY, rows, COLS);
        }
        let (calls, spent) = (account.borrow().calls.len(), account.borrow().spent);
        assert!(spent < SECONDS + cost && calls as f64 <= SECONDS / cost + 1.0, "{cost}: {calls} calls, {spent} s");
        assert!(calls > 0);
        for (_, choice, origin) in &tuner.choices {
            assert!(*origin == Origin::Measured || same(choice, &usual()), "{choice:?}");
        }
        let unmeasured = tuner.choices.iter().filter(|(.., origin)| *origin == Origin::Rule).count();
        assert!(unmeasured > 0 && tuner.choices.len() == 100);
    }
    let (mut off, account) = tuner(Tuning::Off, alike);
    off.form(TY, ROWS, COLS);
    assert_eq!(account.borrow().calls.len(), 0);
    // What cannot be packed is no matter for the tuner.
    let (mut auto, account) = tuner(Tuning::Auto, alike);
    for (rows, cols) in [(0, COLS), (ROWS, 0), (ROWS, 33)] {
        auto.form(TY, rows, cols);
    }
    assert_eq!(account.borrow().calls.len(), 0);
    assert!(auto.warnings.is_empty());
}

#[test]
fn small_models_are_not_measured_unasked() {
    let (ks, pool) = (select(None).unwrap(), Pool::new(1));
    let cache = CacheChoice { dir: Some(scratch("small")), max_bytes: 0 };
    let measures = |tuning, cache, bytes| Tuner::new(ks, &pool, tuning, cache, bytes).measures;
    assert!(!measures(Tuning::Auto, Some(&cache), 6_000_000) && !measures(Tuning::Off, Some(&cache), 1 << 40));
    assert!(measures(Tuning::Auto, Some(&cache), 600_000_000) && measures(Tuning::Force, Some(&cache), 1));
    // Nor where it would have to be done at every start.
    assert!(!measures(Tuning::Auto, None, 600_000_000) && measures(Tuning::Force, None, 1));
}

/// A tuner with a store, and what it says of one shape.
fn with_store(folder: &Path, tuning: Tuning, narrow: f64) -> (Choice, Origin, Vec<String>, usize) {
    let (mut tuner, account) = tuner(tuning, move |shape, setting| {
        alike(shape, setting) * if setting.n == 8 && setting.plan.width == 4 { narrow } else { 1.0 }
    });
    tuner.open_store(folder.to_path_buf());
    tuner.form(TY, ROWS, COLS);
    let (_, choice, origin) = tuner.choices.pop().unwrap();
    let calls = account.borrow().calls.len();
    (choice, origin, tuner.warnings, calls)
}

fn file(folder: &Path) -> PathBuf {
    let files: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.into_iter().find(|path| path.extension().is_some_and(|e| e == "json")).unwrap()
}

#[test]
fn choices_are_kept() {
    let folder = scratch("kept");
    let (first, origin, warnings, _) = with_store(&folder, Tuning::Auto, 0.5);
    assert_eq!((origin, warnings), (Origin::Measured, vec![]));
    let (second, origin, warnings, calls) = with_store(&folder, Tuning::Auto, 2.0);
    assert_eq!((origin, warnings, calls), (Origin::Stored, vec![], 0));
    assert!(same(&first, &second), "{first:?} {second:?}");
    // Unless asked to forget them.
    let (third, origin, ..) = with_store(&folder, Tuning::Force, 2.0);
    assert!(origin == Origin::Measured && same(&third, &usual()));
    let (fourth, origin, ..) = with_store(&folder, Tuning::Auto, 0.5);
    assert!(origin == Origin::Stored && same(&fourth, &usual()));
    // For other threads, nothing is known.
    let (store, problem) = Store::open(&folder, select(None).unwrap(), 3);
    assert!(problem.is_none() && store.path() != file(&folder));
    // A lock file and the store: no temporary files are left.
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 2);
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn a_store_that_is_of_no_use_is_made_again() {
    let folder = scratch("corrupt");
    with_store(&folder, Tuning::Auto, 0.5);
    let path = file(&folder);
    let good = fs::read_to_string(&path).unwrap();
    let value: serde_json::Value = serde_json::from_str(&good).unwrap();
    let changed = |at: &str, new: serde_json::Value| {
        let mut value = value.clone();
        *value.pointer_mut(at).unwrap_or_else(|| panic!("{at}")) = new;
        value.to_string().into_bytes()
    };
    let mut bad: Vec<Vec<u8>> = (0..good.len() - 1).step_by(97).map(|n| good.as_bytes()[..n].to_vec()).collect();
    bad.extend([
        vec![0; 5000],
        vec![0xff; 5000],
        vec![b'['; 100_000],
        vec![b' '; 5 << 20],
        b"{}".to_vec(),
        b"null".to_vec(),
    ]);
    bad.push(changed("/version", 2.into()));
    bad.push(changed("/version", "1".into()));
    bad.push(changed("/key/cpu", "another".into()));
    bad.push(changed("/key/threads", 64.into()));
    bad.push(changed("/key/kernels", 0.into()));
    bad.push(changed("/entries", serde_json::json!({})));
    bad.push(changed("/entries/0/rows", (-1).into()));
    bad.push(changed("/entries/0/rows", serde_json::json!(1e300)));
    bad.push(changed("/entries/0/plans", "dot".into()));
    bad.push(changed("/entries/0/plans/1/width", 1.5.into()));
    bad.push(changed("/entries/0", serde_json::json!({ "type": "Q4_0" })));
    for bytes in bad {
        fs::write(&path, &bytes).unwrap();
        let (_, origin, warnings, _) = with_store(&folder, Tuning::Auto, 0.5);
        let start = String::from_utf8_lossy(&bytes[..bytes.len().min(200)]).into_owned();
        assert!(origin == Origin::Measured && warnings.len() == 1, "{origin:?} {warnings:?}: {start}");
        assert!(warnings[0].contains("are not used"), "{warnings:?}");
        assert_eq!(fs::read_to_string(&path).unwrap(), good, "{start}");
    }
    // An entry that this library cannot follow is measured again, silently: another version may have written it.
    for (at, new) in [
        ("/entries/0/form", serde_json::json!("fields9")),
        ("/entries/0/plans/0/kernel", serde_json::json!("magic")),
        ("/entries/0/plans", serde_json::json!([])),
        ("/entries/0/type", serde_json::json!("Q9")),
        ("/entries/0/ringBytes", serde_json::json!(1)),
    ] {
        fs::write(&path, changed(at, new)).unwrap();
        let (choice, origin, warnings, _) = with_store(&folder, Tuning::Auto, 2.0);
        assert!(origin == Origin::Measured && warnings.is_empty() && same(&choice, &usual()), "{at} {warnings:?}");
    }
    // Numbers without sense are harmless: they are bounded where they are used.
    for width in [0, u32::MAX as u64] {
        fs::write(&path, changed("/entries/0/plans/0/width", width.into())).unwrap();
        let (choice, origin, ..) = with_store(&folder, Tuning::Auto, 2.0);
        assert_eq!((choice.plans[0].width as u64, origin), (width, Origin::Stored));
        let (ks, pool, w) = (select(None).unwrap(), Pool::new(1), matrix(choice.form, 33, 64));
        let (mut act, mut y, mut expected) = (Activations::new(), vec![0f32; 66], vec![0f32; 66]);
        act.prepare(ks, &[0.5; 128], 2, 64, &[w.form], &pool);
        matmul_by(Plan { block_bytes: width as usize, ..choice.plans[0] }, ks, &w, &act, &mut y, 33, &pool);
        matmul(ks, &w, &act, &mut expected, 33, &pool);
        assert_eq!(y, expected);
    }
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn without_a_store_it_is_measured_all_the_same() {
    // A file in the folder's place, and a folder in the file's.
    let folder = scratch("unwritable");
    fs::write(&folder, "").unwrap();
    let (_, origin, warnings, _) = with_store(&folder, Tuning::Auto, 0.5);
    assert_eq!(origin, Origin::Measured);
    assert!(warnings.iter().any(|w| w.contains("cannot be kept")), "{warnings:?}");
    fs::remove_file(&folder).unwrap();

    with_store(&folder, Tuning::Auto, 0.5);
    let path = file(&folder);
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    let (_, origin, warnings, _) = with_store(&folder, Tuning::Auto, 0.5);
    assert_eq!(origin, Origin::Measured);
    assert!(warnings.len() == 2 && warnings[1].contains("cannot be kept"), "{warnings:?}");
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn several_at_once_keep_everything_and_measure_in_turns() {
    let folder = scratch("several");
    // Locks and files are the same between threads as between processes: each tuner opens its own.
    std::thread::scope(|scope| {
        for i in 0..8usize {
            let folder = folder.clone();
            scope.spawn(move || {
                let (mut tuner, _) = tuner(Tuning::Auto, alike);
                tuner.patience = Duration::from_secs(600);
                tuner.open_store(folder);
                for j in 0..6 {
                    tuner.form(TY, 32 * (1 + (i + j) % 8), COLS);
                }
                assert!(tuner.warnings.is_empty(), "{:?}", tuner.warnings);
            });
        }
    });
    let (mut tuner, account) = tuner(Tuning::Auto, alike);
    tuner.open_store(folder.clone());
    for i in 1..=8 {
        tuner.form(TY, 32 * i, COLS);
    }
    assert!(tuner.choices.iter().all(|(.., origin)| *origin == Origin::Stored));
    assert_eq!(account.borrow().calls.len(), 0);
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn a_process_that_holds_the_lock_for_ever_costs_only_the_measurement() {
    let folder = scratch("held");
    let ks = available()[available().len() - 1];
    let (store, _) = Store::open(&folder, ks, 2);
    let held = store.lock(Duration::ZERO).unwrap().unwrap();
    let (mut tuner, account) = tuner(Tuning::Auto, alike);
    tuner.open_store(folder.clone());
    tuner.patience = Duration::ZERO;
    for rows in [32, 64] {
        tuner.form(TY, rows, COLS);
    }
    assert_eq!((account.borrow().calls.len(), tuner.warnings.len()), (0, 1), "{:?}", tuner.warnings);
    drop(held);
    assert!(store.lock(Duration::ZERO).unwrap().is_some());
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn whatever_is_chosen_the_bits_are_the_same() {
    // The real clock, and clocks that favour every twelfth measurement.
    let pool = Pool::new(2);
    let portable = select(Some("portable")).unwrap();
    let (rows, cols) = (70, 256);
    for ty in [SourceType::Q4_0, SourceType::TQ1_0, SourceType::TQ2_0, SourceType::L1, SourceType::F16] {
        let real = ty == SourceType::TQ2_0;
        let source: Vec<u8> = (0..ty.tensor_bytes(rows, cols).unwrap()).map(|i| 0x20 | (i * 11 % 31) as u8).collect();
        let x: Vec<f32> = (0..9 * cols).map(|i| (i * 31 % 77) as f32 / 50.0 - 0.7).collect();
        let product = |ks: &Kernels, form, plan: &dyn Fn(&PackedMatrix) -> Plan| -> Vec<u32> {
            let w = pack_as(form, ty, &source, rows, cols, &pool).unwrap();
            let (mut act, mut y) = (Activations::new(), vec![0f32; 9 * rows]);
            act.prepare(ks, &x, 9, cols, &[form], &pool);
            matmul_by(plan(&w), ks, &w, &act, &mut y, rows, &pool);
            y.into_iter().map(f32::to_bits).collect()
        };
        let expected = product(portable, portable.form(ty), &|_| Plan::default());
        for ks in available() {
            let bench = Box::new(Bench::new(ks, &pool, 1 << 18));
            let real = real.then(|| Tuner::with(ks, 2, Tuning::Force, 1 << 18, bench));
            let mut tuners: Vec<Tuner> = real.into_iter().collect();
            for favourite in 0..12 {
                let mut turn = 0;
                let account = Rc::default();
                let seconds = move |shape: Shape, setting: &Setting| {
                    turn += 1;
                    alike(shape, setting) * if turn % 12 == favourite { 0.3 } else { 1.0 }
                };
                tuners.push(Tuner::with(ks, 2, Tuning::Auto, 1 << 18, Box::new(Fake { account, seconds })));
            }
            for mut tuner in tuners {
                let form = tuner.form(ty, rows, cols);
                let (plans, report) = tuner.finish();
                assert_eq!(report.choices[0].origin, Origin::Measured, "{} {ty:?}", ks.isa);
                let y = product(ks, form, &|w| plans.plan(w, 9));
                assert_eq!(y, expected, "{} {ty:?} {:?}", ks.isa, report.choices);
            }
        }
    }
}
