//! The cache against its enemies: damage, strangers, changed models, full disks, other processes.

use super::*;
use std::io::{Read, Seek, SeekFrom, Write};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

const TY: SourceType = SourceType::Q4_K;
const ROWS: usize = 100;
const COLS: usize = 256 * 40;

/// A folder of its own, deleted at the end.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Folder {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("lutra-weights-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let dir = std::env::temp_dir().join(name);
        fs::create_dir_all(&dir).unwrap();
        Folder(dir)
    }

    fn choice(&self, max_bytes: u64) -> CacheChoice {
        CacheChoice { dir: Some(self.0.join("cache")), max_bytes }
    }

    /// A model's file of one tensor.
    fn model(&self, bytes: &[u8]) -> File {
        let path = self.0.join("model");
        fs::write(&path, bytes).unwrap();
        File::options().read(true).write(true).open(path).unwrap()
    }

    fn files(&self, kind: &str) -> Vec<PathBuf> {
        let files = fs::read_dir(self.0.join("cache").join(kind)).map(|dir| dir.map(|file| file.unwrap().path()));
        let mut files: Vec<_> = files.map(Iterator::collect).unwrap_or_default();
        files.sort();
        files
    }

    fn entry(&self) -> PathBuf {
        let files = self.files("weights");
        assert_eq!(files.len(), 1, "{files:?}");
        files[0].clone()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn source_bytes(ty: SourceType, seed: u32) -> Vec<u8> {
    let len = ty.tensor_bytes(ROWS, COLS).unwrap();
    (0..len as u32).map(|i| (i.wrapping_mul(0x9e37_79b1) ^ seed.wrapping_mul(0x85eb_ca6b)).to_be_bytes()[0]).collect()
}

/// Loads the tensor once, however new its file is, and returns what the cache has to say.
fn load(choice: &CacheChoice, model: &File, ty: SourceType, bytes: &[u8]) -> CacheReport {
    load_as(choice, model, ty, bytes, PackedForm::of(ty))
}

fn cached(cache: &Cache, form: PackedForm, ty: SourceType, file: &File, bytes: &[u8], pool: &Pool) -> PackedMatrix {
    let parts = [Part { file: (0, file), offset: 0, bytes }];
    let source = Source { ty, rows: ROWS, cols: COLS, parts: &parts, how: "" };
    cache.matrix(form, source, || Ok(bytes.into()), pool).unwrap()
}

fn load_as(choice: &CacheChoice, model: &File, ty: SourceType, bytes: &[u8], form: PackedForm) -> CacheReport {
    let pool = Pool::new(2);
    let cache = Cache::with(Some(choice), 0, Duration::ZERO);
    let matrix = cached(&cache, form, ty, model, bytes, &pool);
    let expected = pack_as(form, ty, bytes, ROWS, COLS, &pool).unwrap();
    assert!(matrix.data() == expected.data(), "{ty:?}: other bytes than packing gives");
    assert_eq!(matrix.scale().to_bits(), expected.scale().to_bits());
    cache.close()
}

const NOTHING: CacheReport = CacheReport { read: 0, notes: vec![] };

#[test]
fn the_second_load_reads_what_the_first_has_packed() {
    for ty in [SourceType::Q4_K, SourceType::I2_S, SourceType::F16] {
        let folder = Folder::new();
        let (bytes, choice) = (source_bytes(ty, 1), folder.choice(1 << 30));
        let model = folder.model(&bytes);
        assert_eq!(load(&choice, &model, ty, &bytes), NOTHING);
        let again = load(&choice, &model, ty, &bytes);
        assert!(again.read > bytes.len() as u64 * 9 / 10 && again.notes.is_empty(), "{again:?}");
        // The same content under another name and inode.
        let copy = folder.0.join("copy");
        fs::write(&copy, &bytes).unwrap();
        assert_eq!(load(&choice, &File::open(copy).unwrap(), ty, &bytes), again);
        assert_eq!(folder.files("digests").len(), 2);
    }
}

#[test]
fn another_form_type_shape_or_content_is_another_entry() {
    let folder = Folder::new();
    let (choice, ty) = (folder.choice(1 << 30), SourceType::Q4_0);
    let bytes = source_bytes(ty, 1);
    let model = folder.model(&bytes);
    let [fields, planes] = PackedForm::candidates(ty)[..] else { panic!("two forms") };
    for form in [fields, planes] {
        assert_eq!(load_as(&choice, &model, ty, &bytes, form), NOTHING);
    }
    // IQ4_NL's blocks are Q4_0's with another meaning.
    assert_eq!(load(&choice, &model, SourceType::IQ4_NL, &bytes), NOTHING);
    let mut other = bytes.clone();
    other[77_777] ^= 1;
    assert_eq!(load(&choice, &folder.model(&other), ty, &other), NOTHING);
    assert_eq!(folder.files("weights").len(), 4);
    let digest = digests::digest(&bytes, &Pool::new(2));
    let shaped = |rows, cols, how| address(&[digest], fields, Source { ty, rows, cols, parts: &[], how }).unwrap();
    assert_ne!(shaped(ROWS, COLS, ""), shaped(2 * ROWS, COLS / 2, ""));
    assert_ne!(shaped(ROWS, COLS, ""), shaped(ROWS, COLS, "transposed"));
    assert_eq!(digest, digests::digest(&bytes, &Pool::new(5)));
}

#[test]
fn every_kind_of_damage_is_noticed_and_repaired() {
    let folder = Folder::new();
    let (bytes, choice) = (source_bytes(TY, 1), folder.choice(1 << 30));
    let model = folder.model(&bytes);
    load(&choice, &model, TY, &bytes);
    let good = fs::read(folder.entry()).unwrap();
    let changed = |at: usize| {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        bad
    };
    let mut bad = vec![vec![], vec![0; good.len()], b"stranger".to_vec(), [&good[..], b"x"].concat()];
    bad.extend([1, 7, 8, 40, 4095, 4096, good.len() / 2, good.len() - 1].map(|len| good[..len].to_vec()));
    // Magic, address, rows, columns, length, scale, count, a chunk's sum, the head's sum; the data's ends and middle.
    bad.extend([0, 8, 39, 40, 48, 56, 64, 68, 72, 80, 4096, good.len() / 2, good.len() - 1].map(changed));
    for (case, bad) in bad.into_iter().enumerate() {
        fs::write(folder.entry(), bad).unwrap();
        let report = load(&choice, &model, TY, &bytes);
        assert!(report.read == 0 && report.notes.len() == 1 && report.notes[0].contains("anew"), "{case}: {report:?}");
        assert!(fs::read(folder.entry()).unwrap() == good, "{case}: not repaired");
    }
    // Another matrix's entry under this name: whole and sound, and foreign.
    let other = source_bytes(TY, 2);
    let elsewhere = Folder::new();
    load(&elsewhere.choice(1 << 30), &elsewhere.model(&other), TY, &other);
    fs::copy(elsewhere.entry(), folder.entry()).unwrap();
    assert_eq!(load(&choice, &model, TY, &bytes).notes.len(), 1);
    // A folder in its place cannot be repaired, and does no harm either.
    let entry = folder.entry();
    fs::remove_file(&entry).unwrap();
    fs::create_dir(&entry).unwrap();
    let report = load(&choice, &model, TY, &bytes);
    assert_eq!((report.read, report.notes.len()), (0, 2), "{report:?}");
}

#[test]
fn damaged_digests_are_computed_anew() {
    let folder = Folder::new();
    let (bytes, choice) = (source_bytes(TY, 1), folder.choice(1 << 30));
    let model = folder.model(&bytes);
    load(&choice, &model, TY, &bytes);
    let [path] = &folder.files("digests")[..] else { panic!("one file of digests") };
    let good = fs::read(path).unwrap();
    for (case, bad) in [vec![], good[..good.len() - 1].to_vec(), vec![0; good.len()], [&good[..], &good[..48]].concat()]
        .into_iter()
        .chain((0..good.len()).step_by(5).map(|at| {
            let mut bad = good.clone();
            bad[at] ^= 1;
            bad
        }))
        .enumerate()
    {
        fs::write(path, bad).unwrap();
        let report = load(&choice, &model, TY, &bytes);
        assert!(report.read > 0 && report.notes.len() == 1, "{case}: {report:?}");
        assert!(fs::read(path).unwrap() == good, "{case}: not repaired");
    }
}

#[test]
fn a_model_that_changes_gets_no_entry_of_its_old_content() {
    let folder = Folder::new();
    let (old, choice) = (source_bytes(TY, 1), folder.choice(1 << 30));
    let mut model = folder.model(&old);
    load(&choice, &model, TY, &old);
    // Written in place, as long as before, and its time of modification put back.
    let before = model.metadata().unwrap().modified().unwrap();
    std::thread::sleep(Duration::from_millis(20)); // a tick of the file system's clock
    let new = source_bytes(TY, 9);
    model.seek(SeekFrom::Start(0)).unwrap();
    model.write_all(&new).unwrap();
    model.set_modified(before).unwrap();
    assert_eq!(load(&choice, &model, TY, &new), NOTHING);
    // Changed between hashing and keeping: nothing is kept.
    let pool = Pool::new(1);
    fs::remove_dir_all(folder.0.join("cache")).unwrap();
    let cache = Cache::with(Some(&choice), 0, Duration::ZERO);
    let open = cache.open.get_or_init(|| cache.open()).as_ref().unwrap();
    let part = Part { file: (0, &model), offset: 0, bytes: &new };
    assert!(open.borrow_mut().digest(part, &pool, &mut vec![]).is_some());
    std::thread::sleep(Duration::from_millis(20));
    model.write_all(b"appended").unwrap();
    cached(&cache, PackedForm::of(TY), TY, &model, &new, &pool);
    assert_eq!(cache.close(), NOTHING);
    assert_eq!((folder.files("weights").len(), folder.files("digests").len()), (0, 0));
    // Too new to tell.
    let cache = Cache::with(Some(&choice), 0, Duration::from_secs(600));
    cached(&cache, PackedForm::of(TY), TY, &model, &new, &pool);
    assert_eq!(cache.close(), NOTHING);
    assert_eq!((folder.files("weights").len(), folder.files("digests").len()), (0, 0));
}

#[test]
fn the_longest_unused_entries_go_first() {
    let folder = Folder::new();
    let choice = folder.choice(1 << 30);
    let mut named = vec![];
    for seed in 0..4 {
        let bytes = source_bytes(TY, seed);
        let known = folder.files("weights");
        load(&choice, &folder.model(&bytes), TY, &bytes);
        named.extend(folder.files("weights").into_iter().filter(|file| !known.contains(file)));
    }
    let size = fs::metadata(&named[0]).unwrap().len();
    for (age, file) in [(300, &named[0]), (400, &named[1]), (200, &named[2]), (100, &named[3])] {
        let used = SystemTime::now() - Duration::from_secs(age);
        File::options().write(true).open(file).unwrap().set_modified(used).unwrap();
    }
    let dir = folder.0.join("cache/weights");
    fs::write(dir.join("a-stranger"), "x").unwrap();
    let part = dir.join("dead.1-1.part");
    fs::write(&part, "x").unwrap();
    // Used again: the oldest becomes the newest.
    let bytes = source_bytes(TY, 1);
    assert!(load(&choice, &folder.model(&bytes), TY, &bytes).read > 0);
    make_room(&dir, 2 * size + size / 2).unwrap();
    let left = folder.files("weights");
    assert!(left.contains(&named[1]) && left.contains(&named[3]) && !left.contains(&named[0]), "{left:?}");
    assert!(!left.contains(&named[2]) && left.contains(&dir.join("a-stranger")) && left.contains(&part));
    File::options().write(true).open(&part).unwrap().set_modified(SystemTime::now() - 2 * ABANDONED).unwrap();
    make_room(&dir, 0).unwrap();
    assert_eq!(folder.files("weights"), [dir.join("a-stranger")]);
    // A matrix that is larger than the whole cache is not written at all.
    assert_eq!(load(&folder.choice(size / 2), &folder.model(&bytes), TY, &bytes), NOTHING);
    assert_eq!(folder.files("weights"), [dir.join("a-stranger")]);
}

#[test]
fn what_cannot_be_written_is_a_note() {
    let folder = Folder::new();
    let bytes = source_bytes(TY, 1);
    let model = folder.model(&bytes);
    // A file where the folder should be.
    let choice = CacheChoice { dir: Some(folder.0.join("model")), max_bytes: 1 << 30 };
    let report = load(&choice, &model, TY, &bytes);
    assert!(report.notes.len() == 1 && report.notes[0].contains("no cache"), "{report:?}");
    // A full disk, met while writing: nothing is left behind.
    let path = folder.0.join("entry");
    let full = replace_by(&path, |mut file| {
        file.write_all(b"half")?;
        Err(io::ErrorKind::StorageFull.into())
    });
    assert_eq!(full.unwrap_err().kind(), io::ErrorKind::StorageFull);
    #[cfg(target_os = "linux")]
    {
        let packed = pack_as(PackedForm::of(TY), TY, &bytes, ROWS, COLS, &Pool::new(2)).unwrap();
        let device = File::options().write(true).open("/dev/full").unwrap();
        assert!(entry::write(&device, &[0; 32], &packed, &Pool::new(2)).is_err());
    }
    let names: Vec<_> = fs::read_dir(&folder.0).unwrap().map(|file| file.unwrap().file_name()).collect();
    assert_eq!(names, ["model"]);
}

#[test]
fn many_loads_at_once_agree() {
    let folder = Folder::new();
    let (bytes, choice) = (source_bytes(TY, 1), folder.choice(1 << 30));
    let model = folder.model(&bytes);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..6 {
                    let report = load(&choice, &model, TY, &bytes);
                    assert!(report.notes.is_empty(), "{report:?}");
                }
            });
        }
        // Deleted under their eyes.
        scope.spawn(|| {
            for _ in 0..20 {
                let _ = make_room(&folder.0.join("cache/weights"), 0);
                std::thread::sleep(Duration::from_millis(3));
            }
        });
    });
    load(&choice, &model, TY, &bytes);
    let mut head = [0; 8];
    File::open(folder.entry()).unwrap().read_exact(&mut head).unwrap();
    assert_eq!(&head, b"LutraPW1");
}
