//! The thread pool: every part once, panics passed on, nobody left hanging.

use lutra_kernels::Pool;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicUsize, Ordering::*};
use std::time::Duration;

#[test]
fn every_part_runs_once() {
    for threads in [0, 1, 2, 3, 16] {
        let pool = Pool::new(threads);
        assert_eq!(pool.threads(), threads.max(1));
        for parts in [0, 1, 2, 3, 7, 100] {
            let counts: Vec<_> = (0..parts).map(|_| AtomicUsize::new(0)).collect();
            pool.run(parts, &|part| {
                counts[part].fetch_add(1, Relaxed);
            });
            assert!(counts.iter().all(|count| count.load(Relaxed) == 1), "{threads} threads, {parts} parts");
        }
    }
}

#[test]
fn many_short_jobs_and_pauses_lose_no_wake_up() {
    let pool = Pool::new(4);
    let total = AtomicUsize::new(0);
    for job in 0..3000 {
        pool.run(8, &|part| {
            total.fetch_add(part, Relaxed);
        });
        if job % 500 == 0 {
            std::thread::sleep(Duration::from_millis(2)); // workers fall asleep
        }
    }
    assert_eq!(total.load(Relaxed), 3000 * 28);
}

#[test]
fn what_threads_expect_to_read_need_not_be_there() {
    let pool = Pool::new(3);
    let _awake = pool.session();
    let total = AtomicUsize::new(0);
    for job in 0..200 {
        let start = [0, usize::MAX - 100, job << 40, &total as *const AtomicUsize as usize][job % 4];
        pool.expect(|thread| (start, if thread == job % 3 { 0 } else { usize::MAX }));
        pool.run(7, &|part| {
            total.fetch_add(part, Relaxed);
        });
    }
    assert_eq!(total.load(Relaxed), 200 * 21);
}

#[test]
fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
    let pool = Pool::new(3);
    for bad in 0..9 {
        let done = AtomicUsize::new(0);
        let result = catch_unwind(AssertUnwindSafe(|| {
            pool.run(9, &|part| {
                if part == bad {
                    std::panic::panic_any(part);
                }
                done.fetch_add(1, Relaxed);
            });
        }));
        assert_eq!(result.unwrap_err().downcast_ref::<usize>(), Some(&bad));
        assert!(done.load(Relaxed) >= 6, "the other threads finish their parts");
    }
    let done = AtomicUsize::new(0);
    pool.run(9, &|_| {
        done.fetch_add(1, Relaxed);
    });
    assert_eq!(done.load(Relaxed), 9);
}

#[test]
fn callers_take_turns_and_nesting_runs_inline() {
    let pool = Pool::new(3);
    let total = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..100 {
                    pool.run(5, &|_| {
                        pool.run(2, &|_| {
                            total.fetch_add(1, Relaxed);
                        });
                    });
                }
            });
        }
    });
    assert_eq!(total.load(Relaxed), 4 * 100 * 5 * 2);
}

#[test]
fn callers_that_fell_asleep_are_woken_each_by_its_own_job() {
    let pool = Pool::new(2);
    let total = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for caller in 0..3u64 {
            let (pool, total) = (&pool, &total);
            scope.spawn(move || {
                for job in 0..60 {
                    // About as long as a caller looks before it sleeps, so that it is woken on its way there, too.
                    let pause = Duration::from_micros((job * 37 + caller * 11) % 240);
                    pool.run(2, &|part| {
                        if part == 1 {
                            std::thread::sleep(pause);
                        }
                        total.fetch_add(1, Relaxed);
                    });
                }
            });
        }
    });
    assert_eq!(total.load(Relaxed), 3 * 60 * 2);
}

#[test]
fn sessions_nest_end_and_change_no_result() {
    for threads in [1, 2, 3, 9] {
        let pool = Pool::new(threads);
        let done = AtomicUsize::new(0);
        let count = |_| {
            done.fetch_add(1, Relaxed);
        };
        for round in 0..20 {
            let outer = pool.session();
            pool.run(7, &count);
            {
                let _inner = pool.session();
                std::thread::sleep(Duration::from_micros(300)); // longer than idle threads stay awake by themselves
                pool.run(7, &count);
            }
            pool.run(7, &count);
            drop(outer);
            if round % 5 == 0 {
                std::thread::sleep(Duration::from_millis(2)); // all asleep
            }
            pool.run(7, &count);
        }
        assert_eq!(done.load(Relaxed), 20 * 4 * 7);
        drop(pool);
    }
}

#[test]
#[cfg(target_os = "linux")]
fn pinned_threads_have_the_cores_asked_for() {
    use std::sync::Mutex;
    let allowed = || {
        // SAFETY: a set of bits, as long as is said.
        unsafe {
            let mut set: libc::cpu_set_t = std::mem::zeroed();
            assert_eq!(libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set), 0);
            (0..libc::CPU_SETSIZE as usize).filter(|&core| libc::CPU_ISSET(core, &set)).collect::<Vec<_>>()
        }
    };
    let before = allowed();
    for threads in [1, 2, before.len(), before.len() + 2] {
        let pool = Pool::pinned(threads).unwrap();
        assert_eq!(pool.cores().len(), threads);
        assert!(pool.cores().iter().all(|core| before.contains(core)), "{:?} of {before:?}", pool.cores());
        let found: Vec<_> = (0..threads).map(|_| Mutex::new(vec![])).collect();
        for _ in 0..3 {
            let outer = pool.session();
            let inner = pool.session();
            pool.run(threads, &|thread| *found[thread].lock().unwrap() = allowed());
            for (thread, cores) in found.iter().enumerate() {
                assert_eq!(*cores.lock().unwrap(), [pool.cores()[thread]], "thread {thread} of {threads}");
            }
            drop(inner);
            assert_eq!(allowed(), [pool.cores()[0]]);
            drop(outer);
            assert_eq!(allowed(), before, "the caller is free again");
        }
    }
    assert_eq!(Pool::new(3).cores(), &[0usize; 0]);
}

#[test]
#[cfg(target_os = "linux")]
fn a_pinned_pool_has_no_core_twice_unless_there_are_too_few() {
    let all = Pool::pinned(64).unwrap().cores().iter().collect::<std::collections::HashSet<_>>().len();
    let one = Pool::pinned(1).unwrap();
    for threads in 1..=all {
        let pool = Pool::pinned(threads).unwrap();
        let own: std::collections::HashSet<_> = pool.cores().iter().collect();
        assert_eq!(own.len(), threads, "{:?} beside {:?}", pool.cores(), one.cores());
    }
}
