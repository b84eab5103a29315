//! Which cores threads are bound to, where that is asked for.
//!
//! The fastest cores come first, as Linux tells of them: `cpu_capacity` (big.LITTLE), then the highest clock; of the hardware
//! threads of a core the first ones before any second one, which would only share its units. Within the process, pools take
//! the cores that fewest others have, so that two shards do not sit on the same ones.

use crate::error::{Error, Result};
use std::cmp::Reverse;
use std::collections::HashMap;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// How a shard's threads are bound.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pin {
    /// The system moves them as it likes.
    #[default]
    None,
    /// Each to a core.
    Cores,
}

/// Threads bound to each core.
static USED: Mutex<Option<HashMap<usize, usize>>> = Mutex::new(None);

fn used() -> MutexGuard<'static, Option<HashMap<usize, usize>>> {
    USED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Cores taken for threads, thread 0's first; given back when dropped.
pub(crate) struct Cores(Vec<usize>);

impl Cores {
    /// Takes `count`, one more than once only if there are fewer.
    pub fn take(count: usize) -> Result<Cores> {
        let ranked = fastest_first(Path::new("/sys/devices/system/cpu"), &affinity()?.cores());
        let mut guard = used();
        let used = guard.get_or_insert_with(HashMap::new);
        let mut taken: Vec<usize> = Vec::with_capacity(count);
        for _ in 0..count {
            let users = |core: &usize| {
                let own = taken.iter().filter(|other| *other == core).count();
                (own, used.get(core).copied().unwrap_or(0))
            };
            let core =
                ranked.iter().copied().min_by_key(users).ok_or_else(|| Error::unsupported("there is no core"))?;
            *used.entry(core).or_insert(0) += 1;
            taken.push(core);
        }
        Ok(Cores(taken))
    }

    pub fn of_threads(&self) -> &[usize] {
        &self.0
    }
}

impl Drop for Cores {
    fn drop(&mut self) {
        if let Some(used) = used().as_mut() {
            for core in &self.0 {
                used.entry(*core).and_modify(|count| *count -= 1);
            }
        }
    }
}

/// `allowed` in the order in which they are to be used; `root` is where Linux describes them.
fn fastest_first(root: &Path, allowed: &[usize]) -> Vec<usize> {
    let text = |core: usize, name: &str| std::fs::read_to_string(root.join(format!("cpu{core}/{name}")));
    let number = |core, name| text(core, name).ok().and_then(|text| text.trim().parse::<u64>().ok()).unwrap_or(0);
    let rank = |core: usize| {
        let siblings = list(&text(core, "topology/thread_siblings_list").unwrap_or_default());
        siblings.iter().filter(|sibling| **sibling < core && allowed.contains(sibling)).count()
    };
    let mut cores: Vec<_> = allowed
        .iter()
        .map(|&core| {
            let (capacity, clock) = (number(core, "cpu_capacity"), number(core, "cpufreq/cpuinfo_max_freq"));
            (rank(core), Reverse(capacity), Reverse(clock), core)
        })
        .collect();
    cores.sort();
    cores.into_iter().map(|(.., core)| core).collect()
}

/// Numbers of a list like `0-3,8`.
fn list(text: &str) -> Vec<usize> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse().ok()?..=last.parse().ok()?)
    };
    text.trim().split(',').filter_map(range).flatten().collect()
}

/// The cores that a thread may run on.
#[derive(Clone, Copy)]
pub(crate) struct Affinity(#[cfg(target_os = "linux")] libc::cpu_set_t);

#[cfg(target_os = "linux")]
impl Affinity {
    pub fn core(core: usize) -> Affinity {
        // SAFETY: a set of bits, of which all 0 is the empty one; CPU_SET checks its bounds.
        unsafe {
            let mut set = std::mem::zeroed();
            libc::CPU_SET(core, &mut set);
            Affinity(set)
        }
    }

    pub fn cores(&self) -> Vec<usize> {
        // SAFETY: `core` lies within the set.
        (0..libc::CPU_SETSIZE as usize).filter(|&core| unsafe { libc::CPU_ISSET(core, &self.0) }).collect()
    }

    /// Binds the calling thread.
    pub fn apply(&self) -> Result<()> {
        // SAFETY: the set is as long as is said.
        match unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &self.0) } {
            0 => Ok(()),
            _ => Err(failed("a thread cannot be bound to its core")),
        }
    }
}

/// Of the calling thread.
#[cfg(target_os = "linux")]
pub(crate) fn affinity() -> Result<Affinity> {
    // SAFETY: a set of bits, as long as is said.
    unsafe {
        let mut set = std::mem::zeroed();
        match libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set) {
            0 => Ok(Affinity(set)),
            _ => Err(failed("the cores of this process are not known")),
        }
    }
}

#[cfg(target_os = "linux")]
fn failed(what: &str) -> Error {
    Error::unsupported(format!("{what}: {}", std::io::Error::last_os_error()))
}

#[cfg(not(target_os = "linux"))]
impl Affinity {
    pub fn core(_core: usize) -> Affinity {
        Affinity()
    }

    pub fn cores(&self) -> Vec<usize> {
        vec![]
    }

    pub fn apply(&self) -> Result<()> {
        Ok(())
    }
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn affinity() -> Result<Affinity> {
    Err(Error::unsupported("threads can be bound to cores on Linux only"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn fast_cores_come_first_and_second_threads_last() {
        let root = std::env::temp_dir().join(format!("lutra-cores-{}", std::process::id()));
        let order = |cores: &[(u64, u64, &str)], allowed: &[usize]| {
            let _ = fs::remove_dir_all(&root);
            for (core, (capacity, clock, siblings)) in cores.iter().enumerate() {
                let dir = root.join(format!("cpu{core}"));
                fs::create_dir_all(dir.join("topology")).unwrap();
                fs::create_dir_all(dir.join("cpufreq")).unwrap();
                if *capacity > 0 {
                    fs::write(dir.join("cpu_capacity"), format!("{capacity}\n")).unwrap();
                }
                if *clock > 0 {
                    fs::write(dir.join("cpufreq/cpuinfo_max_freq"), format!("{clock}\n")).unwrap();
                }
                fs::write(dir.join("topology/thread_siblings_list"), format!("{siblings}\n")).unwrap();
            }
            let order = fastest_first(&root, allowed);
            fs::remove_dir_all(&root).unwrap();
            order
        };
        // Four small cores, then four large ones.
        let small = |n| (530, 1_800_000, ["0", "1", "2", "3"][n]);
        let large = |n| (1024, 2_400_000, ["4", "5", "6", "7"][n]);
        let board: Vec<_> = (0..4).map(small).chain((0..4).map(large)).collect();
        assert_eq!(order(&board, &[0, 1, 2, 3, 4, 5, 6, 7]), [4, 5, 6, 7, 0, 1, 2, 3]);
        assert_eq!(order(&board, &[1, 2, 6]), [6, 1, 2]);
        // Two fast cores of two threads each and two slow ones: clocks alone tell.
        let (p, e) = (5_000_000, 3_800_000);
        let hybrid = [(0, p, "0-1"), (0, p, "0-1"), (0, p, "2,3"), (0, p, "2,3"), (0, e, "4"), (0, e, "5")];
        assert_eq!(order(&hybrid, &[0, 1, 2, 3, 4, 5]), [0, 2, 4, 5, 1, 3]);
        // The first thread of a core that may not be used leaves its second one the core.
        assert_eq!(order(&hybrid, &[1, 3, 4]), [1, 3, 4]);
        // A system that tells nothing.
        assert_eq!(fastest_first(Path::new("/nowhere"), &[2, 0, 1]), [0, 1, 2]);
        assert_eq!(list("0-2,5,x,7-"), [0, 1, 2, 5]);
    }
}
