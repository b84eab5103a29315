//! A cable of a given length: two TUN devices, between which packets take so long. For tests and benchmarks of clusters, where
//! the kernel has no netem.
//!
//! `cargo run --release --example tun_relay -- OUTER INNER MICROSECONDS`
//!
//! Makes the devices OUTER and INNER, prints `ready`, and carries packets both ways until it is ended, with which the devices
//! go. Addresses, and the namespace that INNER belongs to, are the caller's matter. Linux, as root.

#[cfg(target_os = "linux")]
fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [outer, inner, delay] = args.as_slice() else {
        panic!("usage: tun_relay OUTER INNER MICROSECONDS");
    };
    let delay = std::time::Duration::from_micros(delay.parse().expect("microseconds"));
    relay::run(outer, inner, delay).expect("TUN devices");
}

#[cfg(not(target_os = "linux"))]
fn main() {
    panic!("TUN devices are Linux's");
}

#[cfg(target_os = "linux")]
mod relay {
    use std::collections::VecDeque;
    use std::fs::{File, OpenOptions};
    use std::io::{Error, Read, Write};
    use std::os::fd::AsRawFd;
    use std::sync::{Condvar, Mutex};
    use std::thread;
    use std::time::{Duration, Instant};

    /// Above any MTU.
    const PACKET_BYTES: usize = 1 << 16;
    /// A device that is not up yet, or down, refuses with an error.
    const DOWN: Duration = Duration::from_millis(1);

    fn device(name: &str) -> Result<File, Error> {
        let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
        // SAFETY: `ifreq` is plain data, for which zeros are valid.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        assert!(name.len() < request.ifr_name.len(), "{name} is too long for a device");
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
        // SAFETY: the file is open, and `request` lives through the call, which reads and writes no more than an `ifreq`.
        if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &mut request) } < 0 {
            return Err(Error::last_os_error());
        }
        Ok(file)
    }

    /// Has the calling thread wake up in time: first of all, and without the slack of 50 µs. As far as the system allows it.
    fn be_prompt() {
        // SAFETY: both calls concern the calling thread alone; `param` lives through the second.
        unsafe {
            libc::prctl(libc::PR_SET_TIMERSLACK, 1 as libc::c_ulong);
            let mut param: libc::sched_param = std::mem::zeroed();
            param.sched_priority = 1;
            libc::sched_setscheduler(0, libc::SCHED_FIFO, &param);
        }
    }

    struct Wire {
        packets: Mutex<VecDeque<(Instant, Vec<u8>)>>,
        came: Condvar,
    }

    fn read(mut from: &File, wire: &Wire, delay: Duration) {
        be_prompt();
        let mut buffer = vec![0; PACKET_BYTES];
        loop {
            match from.read(&mut buffer) {
                Ok(bytes) => {
                    let packet = (Instant::now() + delay, buffer[..bytes].to_vec());
                    wire.packets.lock().expect("no thread panics").push_back(packet);
                    wire.came.notify_one();
                }
                Err(_) => thread::sleep(DOWN),
            }
        }
    }

    fn write(mut to: &File, wire: &Wire) {
        be_prompt();
        loop {
            let (due, packet) = {
                let packets = wire.packets.lock().expect("no thread panics");
                let mut packets = wire.came.wait_while(packets, |p| p.is_empty()).expect("no thread panics");
                packets.pop_front().expect("not empty")
            };
            thread::sleep(due.saturating_duration_since(Instant::now()));
            let _ = to.write(&packet); // refused while the device is down: lost, as on a cable that is pulled
        }
    }

    /// Carries packets for ever.
    pub fn run(outer: &str, inner: &str, delay: Duration) -> Result<(), Error> {
        let ends = [device(outer)?, device(inner)?];
        println!("ready");
        let wires = [(); 2].map(|()| Wire { packets: Mutex::default(), came: Condvar::new() });
        let [there, back] = &wires;
        let [outer, inner] = &ends;
        thread::scope(|scope| {
            for (from, wire, to) in [(outer, there, inner), (inner, back, outer)] {
                scope.spawn(move || read(from, wire, delay));
                scope.spawn(move || write(to, wire));
            }
        });
        Ok(())
    }
}
