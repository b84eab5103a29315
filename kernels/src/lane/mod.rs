//! A stage's own connection to the NATS server: micro-batches that were foreseen come and go by it without JavaScript.
//!
//! A token of one stream waits for every hop. A pass has just read hundreds of megabytes of weights, so whatever runs next finds
//! nothing in the caches; from the kernels' end to a message sent, and from its receipt to the kernels' begin, Deno takes 0.3 to
//! 0.4 ms each, most of it in waiting for its own text. Here the thread that computes also reads and writes the socket.
//!
//! What a stage does is decided in JavaScript all the same. While it waits it arms what it foresees: the next micro-batch of a
//! sequences byte for byte apart from tokens and hidden states, and all that is to be sent once it was computed. A message that fits
//! is computed and passed on; then JavaScript is told. Whatever else comes is JavaScript's to take.

mod armed;
mod protocol;

use crate::error::{Error, Result};
pub use armed::{Armed, Place};
use protocol::{begin_publish, check_subject, Incoming, Op};
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering::SeqCst};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

/// How long a message may wait for a socket that takes nothing: the other end is gone.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// After a micro-batch was sent.
const NAP: Duration = Duration::from_millis(1);
/// Bytes that may lie here unread: what the server holds beyond is the server's trouble.
const MOST_WAITING: usize = 64 << 20;
/// Longest payload before [`Lane::join`] says what the server allows.
const FIRST_LIMIT: usize = 1 << 20;

/// The subscription by which micro-batches come.
pub const WORK: u32 = 1;

/// What JavaScript and a [`Lane::step`] tell each other while it runs.
#[repr(C)]
pub struct Control {
    /// Not 0: the pass that runs ends before its next layer.
    pub stop: AtomicI32,
    /// Not 0: the call returns as soon as no pass runs.
    pub attention: AtomicI32,
    /// The armed micro-batch that is computed; -1 while none is.
    pub running: AtomicI32,
    /// When that began, in milliseconds since the call did.
    pub began: AtomicI32,
}

/// How a [`Lane::step`] ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// Attention was asked for.
    Woken,
    /// A message of so many bytes, by that subscription, is there that was not armed.
    Message { subscription: u32, size: usize },
    /// An armed micro-batch was computed, in `time`, and passed on.
    Done { index: usize, place: Place, time: Duration },
    /// It came, and could not be computed.
    Failed { index: usize, place: Place, time: Duration, error: Error },
}

/// The connection. One thread at a time makes steps; the other calls are any thread's.
pub struct Lane {
    /// Never blocks.
    socket: TcpStream,
    /// A byte in the second is seen by whoever waits.
    wakes: (UnixStream, UnixStream),
    incoming: Mutex<Incoming>,
    /// What the socket did not take yet.
    outgoing: Mutex<Vec<u8>>,
    /// The message of the step that is made.
    message: Mutex<Vec<u8>>,
    closed: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn lost(what: impl Into<String>) -> Error {
    Error::new(Error::LOST, what)
}

impl Lane {
    /// Connects, and returns what the server says of itself, JSON.
    pub fn open(host: &str, port: u16, timeout: Duration) -> Result<(Self, String)> {
        let end = Instant::now() + timeout;
        let mut refused = lost(format!("{host} has no address"));
        for address in (host, port).to_socket_addrs()? {
            let left = end.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            match TcpStream::connect_timeout(&address, left) {
                Ok(socket) => return Self::over(socket)?.greeted(end),
                Err(error) => refused = lost(format!("{address}: {error}")),
            }
        }
        Err(refused)
    }

    fn over(socket: TcpStream) -> Result<Self> {
        socket.set_nodelay(true)?;
        socket.set_nonblocking(true)?;
        let wakes = UnixStream::pair()?;
        wakes.0.set_nonblocking(true)?;
        wakes.1.set_nonblocking(true)?;
        Ok(Lane {
            socket,
            wakes,
            incoming: Mutex::new(Incoming::new(FIRST_LIMIT)),
            outgoing: Mutex::default(),
            message: Mutex::default(),
            closed: AtomicBool::new(false),
        })
    }

    fn greeted(self, end: Instant) -> Result<(Self, String)> {
        let info = self.await_reply(end, |op, bytes| match op {
            Op::Info(range) => Some(String::from_utf8_lossy(&bytes[range.clone()]).into_owned()),
            _ => None,
        })?;
        Ok((self, info))
    }

    /// Sends `hello`, which ends with a PING, and waits for the server's consent. Payloads have at most `limit` bytes.
    pub fn join(&self, hello: &[u8], limit: usize, timeout: Duration) -> Result<()> {
        lock(&self.incoming).limit = limit;
        self.send(hello)?;
        // A message is as good a sign as the reply, which may come after it.
        self.await_reply(Instant::now() + timeout, |op, _| matches!(op, Op::Pong | Op::Message(..)).then_some(()))
    }

    /// Longest payload.
    pub fn limit(&self) -> usize {
        lock(&self.incoming).limit
    }

    /// Reads until `wanted` finds what it wants. A message stays where it is.
    fn await_reply<T>(&self, end: Instant, wanted: impl Fn(&Op, &[u8]) -> Option<T>) -> Result<T> {
        loop {
            let mut incoming = lock(&self.incoming);
            while let Some((op, length)) = incoming.peek()? {
                if let Op::Err(text) = &op {
                    return Err(lost(format!("the server refuses: {text}")));
                }
                let found = wanted(&op, incoming.bytes());
                let is_message = matches!(op, Op::Message(..));
                if !is_message {
                    incoming.consume(length);
                }
                match found {
                    Some(found) => return Ok(found),
                    None if is_message => return Err(lost("the server sends a message before it was joined")),
                    None => {}
                }
            }
            drop(incoming);
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(lost("the server does not answer"));
            }
            self.wait(libc::POLLIN, Some(left))?;
            self.receive()?;
        }
    }

    /// Waits for an armed micro-batch, computes it with `forward` (batch, payload, output) and sends what comes of it, or says
    /// what else has come.
    pub fn step(
        &self,
        control: &Control,
        armed: &mut [Armed],
        mut forward: impl FnMut(&[u8], &[u8], &mut [u8]) -> Result<usize>,
    ) -> Result<Event> {
        let begun = Instant::now();
        let mut message = match self.message.try_lock() {
            Ok(message) => message,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(), // it is written anew
            Err(TryLockError::WouldBlock) => return Err(Error::argument("another step is made on this lane")),
        };
        loop {
            if control.attention.swap(0, SeqCst) != 0 {
                return Ok(Event::Woken);
            }
            let Some(next) = self.next_message()? else {
                self.wait(libc::POLLIN, None)?;
                self.receive()?;
                continue;
            };
            let mut incoming = lock(&self.incoming);
            let Some((Op::Message(subscription, range), length)) = incoming.peek()? else { continue };
            let fits = |a: &Armed| subscription == WORK && a.fits(&incoming.bytes()[range.clone()]);
            let Some(index) = armed.iter().position(fits) else { return Ok(next) };
            // Either this sees that attention is asked for, or who asks sees that this runs.
            control.began.store(begun.elapsed().as_millis().min(i32::MAX as u128) as i32, SeqCst);
            control.running.store(index as i32, SeqCst);
            if control.attention.swap(0, SeqCst) != 0 {
                control.running.store(-1, SeqCst);
                return Ok(Event::Woken);
            }
            // Others may read on meanwhile.
            message.clear();
            message.extend_from_slice(&incoming.bytes()[range]);
            incoming.consume(length);
            drop(incoming);
            let place = Armed::place(&message);
            let start = Instant::now();
            let mut time = Duration::ZERO;
            let outcome = armed[index].compute(&message, |batch, payload, output| {
                let outcome = forward(batch, payload, output);
                time = start.elapsed();
                outcome
            });
            control.running.store(-1, SeqCst);
            return match outcome {
                Ok([first, rest]) => {
                    // In two: the server wakes the first stage before it wakes the orchestrator, who has time.
                    self.send(first)?;
                    self.send(rest)?;
                    // What was sent may lie in a queue of the system's still, and JavaScript's turn would come before it on this
                    // core: without this nap a hop takes 0.05 ms more in the median. The next message ends it.
                    self.wait(libc::POLLIN, Some(NAP))?;
                    Ok(Event::Done { index, place, time })
                }
                Err(error) => Ok(Event::Failed { index, place, time, error }),
            };
        }
    }

    /// The message that is next, once all of it is here; answers the server's pings on the way to it.
    fn next_message(&self) -> Result<Option<Event>> {
        let mut incoming = lock(&self.incoming);
        while let Some((op, length)) = incoming.peek()? {
            match op {
                Op::Message(subscription, range) => {
                    return Ok(Some(Event::Message { subscription, size: range.len() }));
                }
                Op::Err(text) => return Err(lost(format!("the server says: {text}"))),
                Op::Ping => self.send(b"PONG\r\n")?,
                Op::Info(_) | Op::Pong | Op::Ok => {}
            }
            incoming.consume(length);
        }
        Ok(None)
    }

    /// Takes the message that [`Event::Message`] told of.
    pub fn take(&self, into: &mut [u8]) -> Result<usize> {
        let mut incoming = lock(&self.incoming);
        let Some((Op::Message(_, range), length)) = incoming.peek()? else {
            return Err(Error::argument("no message is there to be taken"));
        };
        let size = range.len();
        let into = into.get_mut(..size).ok_or_else(|| Error::argument(format!("the message has {size} bytes")))?;
        into.copy_from_slice(&incoming.bytes()[range]);
        incoming.consume(length);
        Ok(size)
    }

    /// Sends a message as far as the socket takes it, and returns how many bytes are left for [`Lane::flush`].
    pub fn publish(&self, subject: &[u8], data: &[u8]) -> Result<usize> {
        let subject = check_subject(subject)?;
        let mut outgoing = lock(&self.outgoing);
        begin_publish(&mut outgoing, subject, data.len());
        outgoing.extend_from_slice(data);
        outgoing.extend_from_slice(b"\r\n");
        self.write(&mut outgoing)?;
        Ok(outgoing.len())
    }

    /// Waits until all that was published is sent.
    pub fn flush(&self) -> Result<()> {
        let end = Instant::now() + WRITE_TIMEOUT;
        loop {
            // Others publish while this waits.
            let mut outgoing = lock(&self.outgoing);
            self.write(&mut outgoing)?;
            if outgoing.is_empty() {
                return Ok(());
            }
            drop(outgoing);
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(lost("the server takes nothing any more"));
            }
            self.wait(libc::POLLOUT, Some(left))?;
        }
    }

    /// Reads what has come, so that the server need not hold it during a long pass.
    pub fn read_ahead(&self) -> Result<()> {
        self.receive()?;
        self.wake();
        Ok(())
    }

    /// Has a [`Lane::step`] look at its [`Control`].
    pub fn wake(&self) {
        // A full pipe wakes as well.
        let _ = (&self.wakes.1).write(&[0]);
    }

    /// Ends the connection, and whatever waits for it with an error.
    pub fn close(&self) {
        self.closed.store(true, SeqCst);
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
        self.wake();
    }

    /// Sends all of `bytes`, behind what was published before.
    fn send(&self, bytes: &[u8]) -> Result<()> {
        let mut outgoing = lock(&self.outgoing);
        let sent = if outgoing.is_empty() { self.write_some(bytes)? } else { 0 };
        if sent == bytes.len() {
            return Ok(());
        }
        outgoing.extend_from_slice(&bytes[sent..]);
        drop(outgoing);
        self.flush()
    }

    fn write(&self, outgoing: &mut Vec<u8>) -> Result<()> {
        let sent = self.write_some(outgoing)?;
        outgoing.drain(..sent);
        Ok(())
    }

    fn write_some(&self, bytes: &[u8]) -> Result<usize> {
        let mut sent = 0;
        while sent < bytes.len() {
            match (&self.socket).write(&bytes[sent..]) {
                Ok(n) => sent += n,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(lost(format!("sending failed: {error}"))),
            }
        }
        Ok(sent)
    }

    /// Reads all that has come.
    fn receive(&self) -> Result<()> {
        let mut incoming = lock(&self.incoming);
        loop {
            if incoming.bytes().len() >= MOST_WAITING {
                return Ok(());
            }
            let room = incoming.room();
            let size = room.len();
            match (&self.socket).read(room) {
                Ok(0) => return Err(lost("the server ended the connection")),
                Ok(n) => {
                    incoming.came(n);
                    if n < size {
                        return Ok(()); // nearly always all; if not, whoever waits next does not wait
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(lost(format!("receiving failed: {error}"))),
            }
        }
    }

    /// Waits until the socket is ready for `events`, somebody wakes this, or the time is over.
    fn wait(&self, events: libc::c_short, timeout: Option<Duration>) -> Result<()> {
        let (socket, wake) = (self.socket.as_raw_fd(), self.wakes.0.as_raw_fd());
        let mut fds =
            [(socket, events), (wake, libc::POLLIN)].map(|(fd, events)| libc::pollfd { fd, events, revents: 0 });
        let millis = timeout.map_or(-1, |t| t.as_micros().div_ceil(1000).min(i32::MAX as u128) as i32);
        // SAFETY: two structs, and their number.
        let ready = unsafe { libc::poll(fds.as_mut_ptr(), 2, millis) };
        if ready < 0 {
            let error = std::io::Error::last_os_error();
            if error.kind() != ErrorKind::Interrupted {
                return Err(error.into());
            }
        }
        if fds[1].revents != 0 {
            while matches!((&self.wakes.0).read(&mut [0; 64]), Ok(64)) {}
        }
        if self.closed.load(SeqCst) {
            return Err(lost("the lane was closed"));
        }
        Ok(())
    }
}
