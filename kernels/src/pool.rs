//! A pool of threads for one shard: jobs are short (tens of microseconds) and follow each other closely, so threads spin
//! for a moment before they sleep.
//!
//! Work is divided statically: thread `t` of `T` takes parts `parts·t/T .. parts·(t+1)/T`, so that a thread meets the same
//! tiles of a matrix every time, as one contiguous stream.
//!
//! Between jobs memory is idle, but for the little that the caller does alone. So whoever waits asks for the beginning of what it is
//! going to read, if it was told (`Pool::expect`).
//!
//! A pinned pool's threads are bound to cores of their own; the calling thread, which belongs to others, only during a
//! session.

use crate::arch::{prefetch, LINE};
use crate::cores::{affinity, Affinity, Cores};
use crate::error::Result;
use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{catch_unwind, resume_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::*};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

/// How long an idle thread looks for the next job before it sleeps, when every thread can have a core.
const SPIN: Duration = Duration::from_micros(80);
/// The same when there are more threads than cores, and spinning would only take the core from whoever has work.
const SPIN_CROWDED: Duration = Duration::from_micros(2);

/// How much of what it expects a thread asks for at most: in the few microseconds between two jobs no more comes, and
/// second-level caches hold it beside what these jobs need.
const EXPECTED: usize = 128 << 10;

thread_local! {
    /// Set while this thread works on a part; a nested `run` then runs inline instead of waiting for itself.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

type Function<'a> = &'a (dyn Fn(usize) + Sync);

#[derive(Clone, Copy)]
struct Job {
    function: Function<'static>,
    parts: usize,
}

/// Memory that a thread is going to read: no more than two numbers, as it is only asked for.
#[derive(Default)]
struct Expected {
    start: AtomicUsize,
    bytes: AtomicUsize,
}

/// What is alone on its cache line: every line that another core has written takes a worker a tenth of a microsecond.
#[derive(Default)]
#[repr(align(64))]
struct Apart<T>(T);

/// What a worker looks at until a job comes, and then reads: on one line.
#[derive(Default)]
struct Call {
    /// Number of jobs published; a worker runs once for every step.
    generation: AtomicUsize,
    /// Written by the caller before `generation` rises, read by workers after it did, and not touched again before
    /// `pending` has come back to 0.
    job: UnsafeCell<Option<Job>>,
    stop: AtomicBool,
}

/// What the caller looks at until all are done.
#[derive(Default)]
struct Return {
    /// Workers that have not finished the current job.
    pending: AtomicUsize,
    /// The caller sleeps (or is about to) until `pending` is 0.
    caller_sleeps: AtomicBool,
}

struct Shared {
    threads: usize,
    spin: Duration,
    /// Open sessions: while there are any, idle threads keep looking for jobs, however long. Stays 0 in crowded pools.
    sessions: AtomicUsize,
    call: Apart<Call>,
    end: Apart<Return>,
    /// Who is to be woken when it sleeps. Set before each sleep and not at each call: to count one more owner of a thread's handle,
    /// and one less, all workers would take turns at a line.
    caller: Mutex<Option<Thread>>,
    /// Worker `t + 1` sleeps (or is about to).
    asleep: Vec<AtomicBool>,
    /// What each thread asks for when it waits next, the caller first.
    expected: Vec<Apart<Expected>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `job` is the only field that is not Sync by itself; the protocol on `generation` and `pending` described there
// orders every access to it.
unsafe impl Sync for Shared {}
// SAFETY: as above; the function reference inside a job is Sync, hence may be sent.
unsafe impl Send for Shared {}

pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// One job at a time.
    turn: Mutex<()>,
    /// What the threads are bound to, if they are.
    pinned: Option<Cores>,
}

impl Pool {
    /// A pool of `threads` (at least 1), the calling thread counted: `threads − 1` are started. If the system refuses to
    /// start one, the pool has fewer.
    pub fn new(threads: usize) -> Pool {
        let wanted = threads.max(1);
        let cores = thread::available_parallelism().map_or(1, |n| n.get());
        // Threads wait for the final count before they start: it is in the shared state that they get.
        let (senders, receivers): (Vec<_>, Vec<_>) =
            (1..wanted).map(|_| std::sync::mpsc::sync_channel::<Arc<Shared>>(1)).unzip();
        let mut workers = Vec::new();
        for (index, receiver) in receivers.into_iter().enumerate() {
            let body = move || {
                if let Ok(shared) = receiver.recv() {
                    work(&shared, index + 1);
                }
            };
            match thread::Builder::new().name(format!("lutra-{}", index + 1)).spawn(body) {
                Ok(worker) => workers.push(worker),
                Err(_) => break,
            }
        }
        let shared = Arc::new(Shared {
            threads: workers.len() + 1,
            spin: if wanted > cores { SPIN_CROWDED } else { SPIN },
            sessions: AtomicUsize::new(0),
            call: Apart::default(),
            end: Apart::default(),
            caller: Mutex::new(None),
            asleep: workers.iter().map(|_| AtomicBool::new(false)).collect(),
            expected: (0..=workers.len()).map(|_| Apart::default()).collect(),
            panic: Mutex::new(None),
        });
        for sender in senders.iter().take(workers.len()) {
            let _ = sender.send(shared.clone());
        }
        Pool { shared, workers, turn: Mutex::new(()), pinned: None }
    }

    /// The same with every thread bound to a core, the fastest and least used ones.
    pub fn pinned(threads: usize) -> Result<Pool> {
        let mut pool = Pool::new(threads);
        let cores = Cores::take(pool.threads())?;
        let failure = Mutex::new(None);
        // As many parts as threads: part t is thread t's.
        pool.run(pool.threads(), &|thread| {
            if thread > 0 {
                if let Err(e) = Affinity::core(cores.of_threads()[thread]).apply() {
                    *lock(&failure) = Some(e);
                }
            }
        });
        if let Some(e) = lock(&failure).take() {
            return Err(e);
        }
        pool.pinned = Some(cores);
        Ok(pool)
    }

    /// The core of each thread, the caller's (during a session) first; empty if none is bound.
    pub fn cores(&self) -> &[usize] {
        self.pinned.as_ref().map_or(&[], |cores| cores.of_threads())
    }

    /// Threads that work on a job, the caller included.
    pub fn threads(&self) -> usize {
        self.shared.threads
    }

    /// Wakes all threads and keeps them awake until the session is dropped. Open one around jobs that follow each other with
    /// pauses: waking a sleeping thread takes tens of microseconds, on a virtual machine hundreds, and here it happens once,
    /// while the caller prepares the first job. Threads of a pool of more threads than cores sleep all the same. The calling
    /// thread of a pinned pool is bound to its core until the session ends.
    pub fn session(&self) -> Session<'_> {
        let shared = &*self.shared;
        let awake = !self.workers.is_empty() && shared.spin == SPIN;
        if awake {
            shared.sessions.fetch_add(1, SeqCst);
            self.wake();
        }
        // Where it cannot be bound it computes the same.
        let before = self.cores().first().and_then(|&core| {
            let before = affinity().ok()?;
            Affinity::core(core).apply().ok().map(|()| before)
        });
        Session { shared: awake.then_some(shared), before, this_thread: PhantomData }
    }

    /// Wakes the workers that sleep.
    fn wake(&self) {
        for (asleep, worker) in self.shared.asleep.iter().zip(&self.workers) {
            if asleep.load(SeqCst) && asleep.swap(false, SeqCst) {
                worker.thread().unpark();
            }
        }
    }

    /// Tells each thread what it is going to read in the job after the next one: `of(thread)`, an address and bytes. It begins to
    /// ask for it when its share of the next job is done.
    pub fn expect(&self, of: impl Fn(usize) -> (usize, usize)) {
        if self.workers.is_empty() {
            return; // nobody waits
        }
        for (thread, Apart(expected)) in self.shared.expected.iter().enumerate() {
            let (start, bytes) = of(thread);
            expected.start.store(start, Relaxed);
            expected.bytes.store(bytes.min(EXPECTED), Relaxed);
        }
    }

    /// Calls `f(part)` once for every `part < parts` and returns when all calls have. A panic in `f` ends the parts of its
    /// thread, and is raised here again after the other threads have finished theirs.
    pub fn run(&self, parts: usize, f: &(dyn Fn(usize) + Sync)) {
        if self.workers.is_empty() || parts <= 1 || INSIDE.get() {
            (0..parts).for_each(f);
            return;
        }
        let _turn = lock(&self.turn);
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. Workers use the reference only between the rise of `generation` and their
        // decrement of `pending`, and this function does not return, nor unwind, before `pending` is 0.
        let function = unsafe { std::mem::transmute::<Function<'_>, Function<'static>>(f) };
        let (Apart(call), Apart(end)) = (&shared.call, &shared.end);
        // SAFETY: no worker reads the job now: `pending` is 0, and all wait for `generation` to rise. `turn` excludes
        // other callers.
        unsafe { *call.job.get() = Some(Job { function, parts }) };
        end.pending.store(self.workers.len(), Relaxed);
        call.generation.fetch_add(1, SeqCst);
        self.wake();
        let own = share(shared, function, parts, 0);
        let asleep = || *lock(&shared.caller) = Some(thread::current());
        wait(shared, 0, || end.pending.load(Acquire) == 0, &end.caller_sleeps, asleep);
        let theirs = lock(&shared.panic).take();
        if let Some(panic) = own.err().or(theirs) {
            resume_unwind(panic);
        }
    }
}

/// See [`Pool::session`].
pub struct Session<'a> {
    /// `None` when threads may sleep.
    shared: Option<&'a Shared>,
    /// Where the calling thread might run before.
    before: Option<Affinity>,
    this_thread: PhantomData<*const ()>,
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        if let Some(shared) = self.shared {
            shared.sessions.fetch_sub(1, SeqCst);
        }
        if let Some(before) = self.before {
            let _ = before.apply();
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.call.0.stop.store(true, SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            let _ = worker.join();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Which of some parts are a thread's: as many for each, as near as may be.
pub(crate) fn portion(parts: usize, thread: usize, threads: usize) -> Range<usize> {
    let edge = |thread: usize| (parts as u128 * thread as u128 / threads as u128) as usize;
    edge(thread)..edge(thread + 1)
}

/// Computes thread `index`'s share of a job.
fn share(shared: &Shared, function: Function<'_>, parts: usize, index: usize) -> thread::Result<()> {
    INSIDE.set(true);
    let own = portion(parts, index, shared.threads);
    let result = catch_unwind(AssertUnwindSafe(|| own.for_each(function)));
    INSIDE.set(false);
    result
}

/// Waits until `done()`, spinning for a while (or as long as a session is open) and then, after `asleep()`, asleep. Whoever makes
/// `done` true must afterwards swap `sleeps` to false and unpark this thread if it was true. A stray unpark does no harm.
fn wait(shared: &Shared, index: usize, done: impl Fn() -> bool, sleeps: &AtomicBool, asleep: impl Fn()) {
    let Apart(expected) = &shared.expected[index];
    let (from, bytes) = (expected.start.load(Relaxed), expected.bytes.swap(0, Relaxed));
    for line in (0..bytes).step_by(LINE) {
        if done() {
            return;
        }
        prefetch::<2>(from.wrapping_add(line) as *const u8);
    }
    let mut start = None;
    loop {
        for _ in 0..64 {
            if done() {
                return;
            }
            std::hint::spin_loop();
        }
        if shared.sessions.load(Relaxed) > 0 {
            start = None;
        } else if start.get_or_insert_with(Instant::now).elapsed() > shared.spin {
            break;
        }
    }
    asleep();
    loop {
        // Sequentially consistent against the other side's "make done true, then swap sleeps": at least one of the two
        // sees the other, so that no wake-up is lost.
        sleeps.store(true, SeqCst);
        std::sync::atomic::fence(SeqCst);
        if done() {
            sleeps.store(false, SeqCst);
            return;
        }
        thread::park();
    }
}

fn work(shared: &Shared, index: usize) {
    let (Apart(call), Apart(end)) = (&shared.call, &shared.end);
    let mut seen = 0;
    loop {
        let called = || call.generation.load(SeqCst) != seen || call.stop.load(SeqCst);
        wait(shared, index, called, &shared.asleep[index - 1], || {});
        if call.generation.load(SeqCst) == seen {
            return; // stop
        }
        seen = seen.wrapping_add(1);
        // SAFETY: `generation` has risen for this job and this worker has not yet decremented `pending`, so the caller
        // does not write.
        let job = unsafe { *call.job.get() };
        if let Some(Job { function, parts }) = job {
            if let Err(panic) = share(shared, function, parts, index) {
                lock(&shared.panic).get_or_insert(panic);
            }
            // The caller may return and drop `f` from here on, and even call anew; then it does not sleep, or for the new job, and
            // wakes to look again.
            if end.pending.fetch_sub(1, SeqCst) == 1 && end.caller_sleeps.swap(false, SeqCst) {
                if let Some(caller) = &*lock(&shared.caller) {
                    caller.unpark();
                }
            }
        }
    }
}
