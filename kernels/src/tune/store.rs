//! Choices kept on disk: a JSON file for each kind of processor, instruction set, number of threads and version of the kernels.
//!
//! What is in it is not trusted: a file that is not what this library would write counts as empty, an entry that names what
//! this library does not have counts as missing. Files are replaced whole. A lock lets one process measure at a time, since
//! two would disturb each other; without it nothing breaks.

use super::{form_name, Choice, Shape, CLASSES};
use crate::cache;
use crate::dispatch::{Kernels, KERNELS_VERSION};
use crate::matmul::Plan;
use crate::pack::PackedForm;
use serde::{Deserialize, Serialize};
use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Of this format.
const VERSION: u32 = 1;
/// No file of ours is larger: some 600 bytes a shape.
const MOST_BYTES: u64 = 4 << 20;

#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Contents {
    version: u32,
    key: Key,
    entries: Vec<Entry>,
}

/// What measurements hold for.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Key {
    cpu: String,
    isa: String,
    kernels: u32,
    threads: usize,
}

#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Entry {
    #[serde(rename = "type")]
    ty: String,
    rows: usize,
    cols: usize,
    ring_bytes: usize,
    form: String,
    inline_rows: Option<usize>,
    plans: Vec<StoredPlan>,
}

#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct StoredPlan {
    kernel: String,
    width: usize,
    block_bytes: usize,
}

pub(super) struct Store {
    path: PathBuf,
    contents: Contents,
}

/// Held while a process measures.
pub(super) struct Lock {
    _file: File,
}

impl Store {
    /// The store of this device in a folder, and what is wrong with it, if anything.
    pub fn open(folder: &Path, ks: &Kernels, threads: usize) -> (Store, Option<String>) {
        let key = Key { cpu: cpu(), isa: ks.isa.name().to_string(), kernels: KERNELS_VERSION, threads };
        let name = format!("{:016x}.json", hash(&[&key.cpu, &key.isa, &key.kernels.to_string(), &threads.to_string()]));
        let contents = Contents { version: VERSION, key, entries: Vec::new() };
        let mut store = Store { path: folder.join(name), contents };
        let problem = store.reload();
        (store, problem)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads what is on disk now; a store that is of no use counts as empty.
    pub fn reload(&mut self) -> Option<String> {
        let (entries, problem) = match self.read() {
            Ok(entries) => (entries, None),
            Err(reason) => (Vec::new(), Some(reason)),
        };
        self.contents.entries = entries;
        problem.map(|reason| format!("the measurements in {} are not used: {reason}", self.path.display()))
    }

    fn read(&self) -> Result<Vec<Entry>, String> {
        let file = match File::open(&self.path) {
            Ok(file) => file,
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(Vec::new()),
            Err(e) => return Err(e.to_string()),
        };
        let mut bytes = Vec::new();
        file.take(MOST_BYTES + 1).read_to_end(&mut bytes).map_err(|e| e.to_string())?;
        if bytes.len() as u64 > MOST_BYTES {
            return Err("the file is too large".into());
        }
        let contents: Contents = serde_json::from_slice(&bytes).map_err(|e| e.to_string())?;
        if contents.version != VERSION || contents.key != self.contents.key {
            return Err("they are of another device or version".into());
        }
        Ok(contents.entries)
    }

    fn position(&self, shape: Shape, ring_bytes: usize) -> Option<usize> {
        let ty = format!("{:?}", shape.ty);
        self.contents
            .entries
            .iter()
            .position(|e| e.ty == ty && e.rows == shape.rows && e.cols == shape.cols && e.ring_bytes == ring_bytes)
    }

    /// What was measured for a shape, if these kernels still have all of it.
    pub fn get(&self, ks: &Kernels, shape: Shape, ring_bytes: usize) -> Option<Choice> {
        let entry = &self.contents.entries[self.position(shape, ring_bytes)?];
        let form = PackedForm::candidates(shape.ty)
            .into_iter()
            .find(|&form| form_name(form) == entry.form && (ks.has_kernel(form) || form == ks.form(shape.ty)))?;
        let plans = entry.plans.iter().map(|plan| {
            let variant = ks.variants(form).iter().position(|variant| variant.name == plan.kernel)?;
            Some(Plan { variant, width: plan.width, block_bytes: plan.block_bytes })
        });
        let plans = plans.collect::<Option<Vec<_>>>()?.try_into().ok()?;
        Some(Choice { form, inline_rows: entry.inline_rows, plans })
    }

    /// Keeps a choice, beside what other processes have written meanwhile.
    pub fn put(&mut self, ks: &Kernels, shape: Shape, ring_bytes: usize, choice: &Choice) -> io::Result<()> {
        debug_assert_eq!(choice.plans.len(), CLASSES.len());
        let plans = choice.plans.iter().map(|plan| {
            let variant = &ks.variants(choice.form)[plan.variant];
            StoredPlan {
                kernel: variant.name.to_string(),
                width: plan.width.min(variant.widths[0]),
                block_bytes: plan.block_bytes,
            }
        });
        let entry = Entry {
            ty: format!("{:?}", shape.ty),
            rows: shape.rows,
            cols: shape.cols,
            ring_bytes,
            form: form_name(choice.form),
            inline_rows: choice.inline_rows,
            plans: plans.collect(),
        };
        self.reload();
        match self.position(shape, ring_bytes) {
            Some(at) => self.contents.entries[at] = entry,
            None => self.contents.entries.push(entry),
        }
        let mut json = serde_json::to_vec_pretty(&self.contents)?;
        json.push(b'\n');
        cache::replace(&self.path, &json)
    }

    /// The right to measure; `None` if another process keeps it for so long.
    pub fn lock(&self, patience: Duration) -> io::Result<Option<Lock>> {
        if let Some(folder) = self.path.parent() {
            fs::create_dir_all(folder)?;
        }
        let path = self.path.with_extension("lock");
        let file = File::options().create(true).truncate(false).write(true).open(path)?;
        let start = Instant::now();
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Some(Lock { _file: file })),
                Err(TryLockError::WouldBlock) if start.elapsed() >= patience => return Ok(None),
                Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(10)),
                // A file system without locks.
                Err(TryLockError::Error(e)) if e.kind() == ErrorKind::Unsupported => {
                    return Ok(Some(Lock { _file: file }))
                }
                Err(TryLockError::Error(e)) => return Err(e),
            }
        }
    }
}

/// The processor, in words that are the same on every start and others on another kind of processor.
pub(super) fn cpu() -> String {
    const NAMES: [&str; 9] = [
        "model name",
        "cpu family",
        "model",
        "stepping",
        "CPU implementer",
        "CPU variant",
        "CPU part",
        "CPU revision",
        "cache size",
    ];
    let mut lines: Vec<String> = Vec::new();
    for line in fs::read_to_string("/proc/cpuinfo").unwrap_or_default().lines() {
        let Some((name, value)) = line.split_once(':') else { continue };
        let line = format!("{} {}", name.trim(), value.trim());
        if NAMES.contains(&name.trim()) && !lines.contains(&line) {
            lines.push(line);
        }
    }
    if lines.is_empty() {
        // No Linux: what else differs between machines that share a home folder.
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        lines.push(format!("{} {} of {cores} cores", std::env::consts::OS, std::env::consts::ARCH));
    }
    lines.join(", ")
}

/// FNV-1a, 64 bits, of the texts with an end after each.
fn hash(texts: &[&str]) -> u64 {
    let bytes = texts.iter().flat_map(|text| text.bytes().chain([0]));
    bytes.fold(0xcbf2_9ce4_8422_2325, |h, byte| (h ^ byte as u64).wrapping_mul(0x0100_0000_01b3))
}
