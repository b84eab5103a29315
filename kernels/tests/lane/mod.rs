//! A lane against a server that the tests play: what goes over the socket byte for byte, and what becomes of it when the server
//! misbehaves.

use super::shard_tests::ffi::{call, close, forward, open, Outcome};
use super::shard_tests::model::{encode, Model, Part, Random, GREEDY, RUN};
use lutra_kernels::ffi::*;
use lutra_kernels::lane::{Armed, Control, Event, Lane, Place};
use lutra_kernels::{Error, Result};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicI32, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

const SECOND: Duration = Duration::from_secs(1);
const HEADER: usize = 24;
/// Of the messages that come.
const STEP: u32 = 0x1234_5678;
const CHAIN: u8 = 3;
const PLACE: Place = Place { step: STEP, chain: CHAIN };

/// The server's end of a connection.
struct Server(BufReader<TcpStream>);

impl Server {
    /// A lane that has joined, and its server.
    fn joined() -> (Lane, Server) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = thread::spawn(move || {
            let mut server = Server::accept(&listener, b"INFO {\"version\":\"2.9\"} \r\n");
            assert_eq!(
                (server.line(), server.line(), server.line()),
                ("CONNECT {}".into(), "SUB s 1".into(), "PING".into())
            );
            server.send(b"PONG\r\n");
            server
        });
        let (lane, info) = Lane::open("127.0.0.1", port, SECOND).unwrap();
        assert_eq!(info, "{\"version\":\"2.9\"}");
        lane.join(b"CONNECT {}\r\nSUB s 1\r\nPING\r\n", 1 << 20, SECOND).unwrap();
        (lane, server.join().unwrap())
    }

    fn accept(listener: &TcpListener, greeting: &[u8]) -> Server {
        let (socket, _) = listener.accept().unwrap();
        socket.set_read_timeout(Some(10 * SECOND)).unwrap();
        let mut server = Server(BufReader::new(socket));
        server.send(greeting);
        server
    }

    fn send(&mut self, bytes: &[u8]) {
        self.0.get_mut().write_all(bytes).unwrap();
    }

    fn message(&mut self, payload: &[u8]) {
        let text = [format!("MSG s 1 {}\r\n", payload.len()).as_bytes(), payload, b"\r\n"].concat();
        self.send(&text);
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        line.trim_end().to_string()
    }

    /// A message that the lane publishes.
    fn published(&mut self) -> (String, Vec<u8>) {
        let line = self.line();
        let words: Vec<&str> = line.split(' ').collect();
        assert_eq!((words.len(), words[0]), (3, "PUB"), "{line}");
        let mut payload = vec![0; words[2].parse::<usize>().unwrap() + 2];
        self.0.read_exact(&mut payload).unwrap();
        assert_eq!(payload.split_off(payload.len() - 2), b"\r\n");
        (words[1].to_string(), payload)
    }
}

/// What a step says of a message of so many bytes.
fn message(size: usize) -> Event {
    Event::Message { subscription: 1, size }
}

fn control() -> Control {
    Control {
        stop: AtomicI32::new(0),
        attention: AtomicI32::new(0),
        running: AtomicI32::new(-1),
        began: AtomicI32::new(0),
    }
}

/// A message as in `bus/wire.ts`: its number stands for magic, version, kind and epoch.
fn wire(number: u8, batch: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut header = [number; HEADER];
    header[8..12].copy_from_slice(&STEP.to_le_bytes());
    header[20..].copy_from_slice(&[0, CHAIN, 0, 0]);
    header[12..16].copy_from_slice(&(batch.len() as u32).to_le_bytes());
    header[16..20].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    [&header, batch, payload].concat()
}

/// What is armed, as JavaScript writes it.
#[derive(Clone, Default)]
struct Plan {
    payload: u32,
    output: u32,
    tokens: (u32, u32),
    passes: u32,
    expected: Vec<u8>,
    next: String,
    head: Vec<u8>,
    first: String,
    follows: Vec<u8>,
    sampled: (u32, u32),
}

impl Plan {
    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for word in [self.payload, self.output, self.tokens.0, self.tokens.1, self.passes] {
            bytes.extend(word.to_le_bytes());
        }
        for part in [&self.expected[..], self.next.as_bytes(), &self.head, self.first.as_bytes(), &self.follows] {
            bytes.extend((part.len() as u32).to_le_bytes());
            bytes.extend(part);
        }
        bytes.extend(self.sampled.0.to_le_bytes());
        bytes.extend(self.sampled.1.to_le_bytes());
        bytes
    }
}

fn list(plans: &[Plan]) -> Vec<u8> {
    let mut bytes = (plans.len() as u32).to_le_bytes().to_vec();
    plans.iter().for_each(|plan| bytes.extend(plan.encode()));
    bytes
}

fn arm(plans: &[Plan]) -> Result<Vec<Armed>> {
    Armed::parse_all(&list(plans), 1 << 20)
}

/// A stage in the middle: two tokens in an 8-byte table, 6 bytes of states come and go.
fn middle(number: u8) -> Plan {
    let expected = wire(number, b"tabletab\0\0\0\0\0\0\0\0samples", b"");
    // Whatever it says of step and chain.
    let expected =
        [&expected[..8], &[7; 4], &expected[12..16], &6u32.to_le_bytes(), &[0, 9, 0, 0], &expected[24..]].concat();
    let mut head = expected.clone();
    head[4] = 99;
    Plan {
        payload: 6,
        output: 6,
        tokens: (HEADER as u32 + 8, 2),
        passes: 1,
        expected,
        next: "n".into(),
        head,
        ..Plan::default()
    }
}

#[test]
fn what_was_armed_is_computed_and_passed_on() {
    let (lane, mut server) = Server::joined();
    let mut armed = arm(&[middle(1), middle(2)]).unwrap();
    let come = wire(2, b"tabletabAAAABBBBsamples", b"inputs");
    server.message(&come);
    let (one, control) = ([0u8; 1], control());
    let event = lane
        .step(&control, &mut armed, |batch, payload, output| {
            assert_eq!((batch, payload), (&b"tabletabAAAABBBBsamples"[..], &b"inputs"[..]));
            assert_eq!(control.running.load(SeqCst), 1);
            output.copy_from_slice(b"result");
            thread::sleep(Duration::from_millis(20));
            Ok(6)
        })
        .unwrap();
    assert!(
        matches!(event, Event::Done { index: 1, place: PLACE, time } if time >= Duration::from_millis(20)),
        "{event:?}"
    );
    assert_eq!(control.running.load(SeqCst), -1);
    let mut sent = come.clone();
    sent[4] = 99;
    sent[HEADER + 23..].copy_from_slice(b"result");
    assert_eq!(server.published(), ("n".into(), sent));
    // Nothing else was sent: an answer to a ping comes next.
    server.send(b"PING\r\n");
    server.message(&one);
    assert_eq!(lane.step(&control, &mut armed, |_, _, _| unreachable!()).unwrap(), message(1));
    assert_eq!(server.line(), "PONG");
}

#[test]
fn tokens_that_are_sampled_go_straight_on() {
    let (lane, mut server) = Server::joined();
    let follows = wire(7, b"table\0\0\0\0\0\0\0\0\0\0\0\0end", b"");
    let plan = Plan {
        output: 12 + 28 + 12,
        head: wire(9, b"table", b""),
        next: "results".into(),
        first: "first.stage".into(),
        sampled: (HEADER as u32 + 5, 3),
        follows: follows.clone(),
        passes: 0,
        payload: 0,
        expected: wire(3, b"batch", b""),
        tokens: (0, 0),
    };
    let mut output = Vec::new();
    for (id, tops) in [(11u32, 0u32), (22, 2), (33, 0)] {
        output.extend([id, 0, tops].iter().flat_map(|word| word.to_le_bytes()));
        output.extend(vec![0xee; 8 * tops as usize]);
    }
    server.message(&wire(3, b"batch", b""));
    let event = lane
        .step(&control(), &mut arm(std::slice::from_ref(&plan)).unwrap(), |_, _, out| {
            out.copy_from_slice(&output);
            Ok(output.len())
        })
        .unwrap();
    assert!(matches!(event, Event::Done { index: 0, .. }));
    let mut sent = follows.clone();
    sent[8..12].copy_from_slice(&(STEP + 1).to_le_bytes());
    sent[21] = CHAIN - 1;
    for (i, id) in [11u32, 22, 33].into_iter().enumerate() {
        sent[HEADER + 5 + 4 * i..][..4].copy_from_slice(&id.to_le_bytes());
    }
    assert_eq!(server.published(), ("first.stage".into(), sent));
    let mut result = [&wire(9, b"table", b"")[..], &output].concat();
    assert_eq!(server.published(), ("results".into(), result.clone()));

    // At a chain's end nothing follows.
    let mut ends = wire(3, b"batch", b"");
    ends[21] = 0;
    ends[8..12].copy_from_slice(&[1, 2, 3, 4]);
    result[8..12].copy_from_slice(&[1, 2, 3, 4]);
    server.message(&ends);
    let event = lane.step(&control(), &mut arm(std::slice::from_ref(&plan)).unwrap(), |_, _, out| {
        out.copy_from_slice(&output);
        Ok(output.len())
    });
    assert!(matches!(event, Ok(Event::Done { place: Place { step: 0x0403_0201, chain: 0 }, .. })));
    assert_eq!(server.published(), ("results".into(), result));

    // Results that say other lengths than they have are not read beyond their end, and nothing goes out.
    output[8] = 200;
    server.message(&wire(3, b"batch", b""));
    let event = lane.step(&control(), &mut arm(&[plan]).unwrap(), |_, _, out| {
        out.copy_from_slice(&output);
        Ok(output.len())
    });
    assert!(matches!(event, Ok(Event::Failed { error, .. }) if error.code == Error::INVALID_DATA));
    server.send(b"PING\r\n");
    server.message(b"x");
    assert_eq!(lane.step(&control(), &mut [], |_, _, _| unreachable!()).unwrap(), message(1));
    assert_eq!(server.line(), "PONG");
}

#[test]
fn anything_else_is_left_to_the_caller() {
    let (lane, mut server) = Server::joined();
    let right = wire(1, b"tabletabAAAABBBBsamples", b"inputs");
    let mut others = vec![Vec::new(), right[..right.len() - 1].to_vec(), [&right[..], b"x"].concat(), vec![1; HEADER]];
    for at in (0..8).chain(12..21).chain(22..HEADER + 8).chain(HEADER + 16..HEADER + 23) {
        let mut other = right.clone();
        other[at] ^= 1;
        others.push(other);
    }
    let mut armed = arm(&[middle(1)]).unwrap();
    for other in &others {
        server.message(other);
        for _ in 0..2 {
            let event = lane.step(&control(), &mut armed, |_, _, _| unreachable!()).unwrap();
            assert_eq!(event, message(other.len()), "it stays until it is taken");
        }
        let mut taken = vec![0; other.len() + 3];
        assert_eq!(lane.take(&mut taken[..other.len().saturating_sub(1)]).is_err(), !other.is_empty());
        if !other.is_empty() {
            assert_eq!(lane.take(&mut taken).unwrap(), other.len());
        }
        assert_eq!(&taken[..other.len()], &other[..]);
        assert!(lane.take(&mut taken).is_err(), "it is taken once");
    }
    // What comes by another subscription never fits, and stays in its place.
    server.send(&[format!("MSG c 7 {}\r\n", right.len()).as_bytes(), &right, b"\r\n"].concat());
    server.message(&right);
    let event = lane.step(&control(), &mut armed, |_, _, _| unreachable!()).unwrap();
    assert_eq!(event, Event::Message { subscription: 7, size: right.len() });
    lane.take(&mut vec![0; right.len()]).unwrap();
    assert!(matches!(lane.step(&control(), &mut armed, |_, _, out| Ok(out.len())).unwrap(), Event::Done { .. }));
    let mut armed = arm(&[middle(1)]).unwrap();
    // And after all this the right one still fits.
    server.message(&right);
    let event = lane.step(&control(), &mut armed, |_, _, out| Ok(out.len())).unwrap();
    assert!(matches!(event, Event::Done { .. }));
}

#[test]
fn a_pass_that_fails_sends_nothing() {
    let (lane, mut server) = Server::joined();
    let mut armed = arm(&[middle(1)]).unwrap();
    let come = wire(1, b"tabletabAAAABBBBsamples", b"inputs");
    for outcome in [Err(Error::new(Error::STOPPED, "stopped")), Ok(5)] {
        server.message(&come);
        let expected = outcome.as_ref().err().map_or(Error::INVALID_DATA, |error| error.code);
        let event = lane.step(&control(), &mut armed, |_, _, _| outcome.clone()).unwrap();
        assert!(matches!(event, Event::Failed { index: 0, error, .. } if error.code == expected));
    }
    server.message(&come);
    assert!(matches!(lane.step(&control(), &mut armed, |_, _, o| Ok(o.len())).unwrap(), Event::Done { .. }));
    assert_eq!(server.published().0, "n");
}

#[test]
fn who_waits_can_be_woken_and_ended() {
    let (lane, mut server) = Server::joined();
    let (control, mut armed) = (control(), arm(&[middle(1)]).unwrap());
    // Asked for before the call, and during it.
    control.attention.store(1, SeqCst);
    lane.wake();
    assert_eq!(lane.step(&control, &mut armed, |_, _, _| unreachable!()).unwrap(), Event::Woken);
    // Woken, an armed message is left for the next call.
    server.message(&wire(1, b"tabletabAAAABBBBsamples", b"inputs"));
    while !arrived(&lane) {}
    control.attention.store(1, SeqCst);
    assert_eq!(lane.step(&control, &mut armed, |_, _, _| unreachable!()).unwrap(), Event::Woken);
    assert!(matches!(lane.step(&control, &mut armed, |_, _, o| Ok(o.len())).unwrap(), Event::Done { .. }));
    thread::scope(|scope| {
        let waits = scope.spawn(|| lane.step(&control, &mut arm(&[middle(1)]).unwrap(), |_, _, _| unreachable!()));
        thread::sleep(Duration::from_millis(30));
        assert!(lane
            .step(&control, &mut [], |_, _, _| unreachable!())
            .is_err_and(|e| e.code == Error::INVALID_ARGUMENT));
        lane.wake(); // without a reason: it waits on
        thread::sleep(Duration::from_millis(30));
        assert!(!waits.is_finished());
        control.attention.store(1, SeqCst);
        lane.wake();
        assert_eq!(waits.join().unwrap().unwrap(), Event::Woken);
        let waits = scope.spawn(|| lane.step(&control, &mut [], |_, _, _| unreachable!()));
        thread::sleep(Duration::from_millis(30));
        lane.close();
        assert_eq!(waits.join().unwrap().unwrap_err().code, Error::LOST);
    });
    assert_eq!(lane.flush(), Ok(()));
    assert_eq!(lane.publish(b"a", b"b").unwrap_err().code, Error::LOST);
    assert_eq!(lane.step(&control, &mut [], |_, _, _| unreachable!()).unwrap_err().code, Error::LOST);
}

/// Reads, and tells whether a message is there.
fn arrived(lane: &Lane) -> bool {
    lane.read_ahead().unwrap();
    lane.take(&mut []).is_err_and(|e| e.message.contains("bytes"))
}

#[test]
fn what_comes_during_a_pass_is_read_and_kept() {
    let (lane, mut server) = Server::joined();
    let mut armed = arm(&[middle(1)]).unwrap();
    server.message(&wire(1, b"tabletabAAAABBBBsamples", b"inputs"));
    let large: Vec<u8> = (0..900_000u32).map(|i| (i * 7) as u8).collect();
    thread::scope(|scope| {
        scope.spawn(|| (0..8).for_each(|_| server.message(&large))); // more than a socket holds
        let event = lane.step(&control(), &mut armed, |_, _, output| {
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_millis(300) {
                lane.read_ahead().unwrap();
            }
            Ok(output.len())
        });
        assert!(matches!(event, Ok(Event::Done { .. })));
        for _ in 0..8 {
            assert_eq!(lane.step(&control(), &mut [], |_, _, _| unreachable!()).unwrap(), message(large.len()));
            let mut taken = vec![0; large.len()];
            lane.take(&mut taken).unwrap();
            assert!(taken == large);
        }
    });
}

#[test]
fn what_the_socket_does_not_take_is_sent_later_and_in_order() {
    let (lane, mut server) = Server::joined();
    let large: Vec<u8> = (0..1_000_000u32).map(|i| (i * 13) as u8).collect();
    let mut count = 0;
    while lane.publish(b"a.b", &large).unwrap() == 0 {
        count += 1;
        assert!(count < 1000, "a socket takes no end of bytes");
    }
    server.message(&wire(1, b"tabletabAAAABBBBsamples", b"inputs"));
    thread::scope(|scope| {
        let reads = scope.spawn(|| {
            for _ in 0..=count {
                assert!(server.published() == ("a.b".into(), large.clone()));
            }
            assert_eq!(server.published().0, "n");
        });
        let event = lane.step(&control(), &mut arm(&[middle(1)]).unwrap(), |_, _, out| Ok(out.len()));
        assert!(matches!(event, Ok(Event::Done { .. })));
        lane.flush().unwrap();
        reads.join().unwrap();
    });
    for subject in [&b""[..], b"a b", b"a\r\nPUB b 0", "ä".as_bytes(), &[b'x'; 513]] {
        assert_eq!(lane.publish(subject, b"").unwrap_err().code, Error::INVALID_ARGUMENT);
    }
}

#[test]
fn a_server_that_ends_or_misbehaves_is_an_error_that_says_so() {
    let endings: [(&[u8], &str); 5] = [
        (b"", "ended the connection"),
        (b"MSG s 1 10\r\nabc", "ended the connection"),
        (b"-ERR 'Slow Consumer'\r\n", "Slow Consumer"),
        (b"MSG s 1 2000000\r\n", "2000000 bytes, and 1048576 may be"),
        (b"nonsense\r\n", "no NATS server has"),
    ];
    for (bytes, says) in endings {
        let (lane, mut server) = Server::joined();
        server.send(bytes);
        drop(server);
        let error = lane.step(&control(), &mut [], |_, _, _| unreachable!()).unwrap_err();
        assert!(error.code == Error::LOST && error.message.contains(says), "{error}");
    }
    let greetings: [(&[u8], &str); 4] = [
        (b"SSH-2.0-x\r\n", "no NATS server has"),
        (b"INFO {}\r\n-ERR 'Authorization Violation'\r\n", "refuses: Authorization Violation"),
        (b"INFO {}\r\n", "does not answer"),
        (b"", "does not answer"),
    ];
    for (greeting, says) in greetings {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = thread::spawn(move || Server::accept(&listener, greeting));
        let timeout = Duration::from_millis(200);
        let outcome = Lane::open("127.0.0.1", port, timeout).and_then(|(lane, _)| lane.join(b"PING\r\n", 100, timeout));
        let error = outcome.unwrap_err();
        assert!(error.code == Error::LOST && error.message.contains(says), "{error}");
        drop(server.join().unwrap());
    }
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    assert_eq!(Lane::open("127.0.0.1", free, SECOND).map(|_| ()).unwrap_err().code, Error::LOST);
}

#[test]
fn a_message_before_the_reply_is_not_lost() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = thread::spawn(move || {
        let mut server = Server::accept(&listener, b"INFO {}\r\n");
        server.line();
        server.message(b"early");
        server.send(b"PONG\r\n");
        server
    });
    let (lane, _) = Lane::open("127.0.0.1", port, SECOND).unwrap();
    lane.join(b"PING\r\n", 100, SECOND).unwrap();
    let _server = server.join().unwrap();
    assert_eq!(lane.step(&control(), &mut [], |_, _, _| unreachable!()).unwrap(), message(5));
}

#[test]
fn what_is_armed_wrongly_is_refused() {
    let wrong: [fn(&mut Plan); 11] = [
        |plan| plan.tokens = (HEADER as u32 + 20, 2),
        |plan| plan.tokens = (0, 2),
        |plan| plan.tokens = (u32::MAX, u32::MAX),
        |plan| plan.next = String::new(),
        |plan| plan.next = "a b".into(),
        |plan| (plan.first, plan.follows) = ("f".into(), b"x".to_vec()),
        |plan| plan.follows = vec![0; HEADER],
        |plan| plan.output = (1 << 20) + 1,
        |plan| plan.expected.truncate(HEADER + 3),
        |plan| plan.head.truncate(30),
        |plan| (plan.passes, plan.head) = (0, vec![0; HEADER - 1]),
    ];
    for (i, spoil) in wrong.into_iter().enumerate() {
        let mut plan = middle(1);
        spoil(&mut plan);
        assert_eq!(arm(&[plan]).err().map(|e| e.code), Some(Error::INVALID_ARGUMENT), "{i}");
    }
    let right = list(&[middle(1), middle(2)]);
    for cut in 0..right.len() {
        assert!(Armed::parse_all(&right[..cut], 1 << 20).is_err());
    }
    assert!(Armed::parse_all(&[&right[..], b"x"].concat(), 1 << 20).is_err());
    // Any word may be anything.
    let mut random = Random(5);
    for _ in 0..20_000 {
        let mut bytes = right.clone();
        for _ in 0..1 + random.below(3) {
            let at = random.below(bytes.len() / 4) * 4;
            let word = [random.word() as u32, random.below(200) as u32, u32::MAX, 1 << 31][random.below(4)];
            bytes[at..at + 4].copy_from_slice(&word.to_le_bytes());
        }
        if let Ok(mut armed) = Armed::parse_all(&bytes, 1 << 20) {
            let come = wire(1, b"tabletabAAAABBBBsamples", b"inputs");
            if let Some(armed) = armed.iter_mut().find(|a| a.fits(&come)) {
                let _ = armed.compute(&come, |_, _, out| Ok(out.len()));
            }
        }
    }
}

/// The whole way of a chain through the C ABI, with a real shard: as many bits as without a lane.
#[test]
fn a_chain_through_the_c_abi_gives_the_same_bits() {
    let model = Model::fixture("llama-tiny-f32.gguf");
    let shard = open(&model.descriptor(0, 5, RUN)).unwrap();
    let prompt = Random(3).tokens(9, model.size("vocab"));
    // Without: token after token.
    let mut expected = Vec::new();
    let mut tokens = prompt.clone();
    for pos in [0, 9, 10, 11] {
        let mut out = [0; 12];
        forward(shard, &encode(&[Part::new(1, pos, &tokens[pos..]).sample(&GREEDY)]), &[], None, &mut out).unwrap();
        tokens.push(u32::from_le_bytes(out[..4].try_into().unwrap()));
        expected.push(out);
    }

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = serde_json::json!({
        "hostname": "127.0.0.1", "port": listener.local_addr().unwrap().port(), "timeoutMs": 1000,
    })
    .to_string();
    let server = thread::spawn(move || {
        let mut server = Server::accept(&listener, b"INFO {}\r\n");
        assert_eq!(server.line(), "PING");
        server.send(b"PONG\r\n");
        server
    });
    let (mut info, mut handle) = ([0; 64], [0; 4]);
    // SAFETY: here and below, every buffer is as long as is said.
    let opened = call(|err, n| unsafe {
        let (info, info_len) = (info.as_mut_ptr(), info.len());
        lutra_lane_open(address.as_ptr(), address.len(), info, info_len, handle.as_mut_ptr(), 4, err, n)
    });
    assert_eq!((opened, &info[..2]), (Ok(2), &b"{}"[..]));
    let lane = u32::from_le_bytes(handle);
    // SAFETY: as above.
    call(|err, n| unsafe { lutra_lane_join(lane, b"PING\r\n".as_ptr(), 6, 1 << 20, 1000, err, n) }).unwrap();
    let mut server = server.join().unwrap();
    let control = control();
    let mut report = [0; 32];
    let step = |armed: &[u8], report: &mut [u8]| -> Outcome {
        let at = control_at(&control);
        let (report, report_len) = (report.as_mut_ptr(), report.len());
        // SAFETY: as above.
        call(|err, n| unsafe {
            lutra_lane_step(lane, shard, armed.as_ptr(), armed.len(), at, 16, report, report_len, err, n)
        })
    };
    for (i, pos) in [9, 10, 11].into_iter().enumerate() {
        let batch = encode(&[Part::new(2, pos, &tokens[pos..=pos]).sample(&GREEDY)]);
        if i == 0 {
            // Another sequence that is as far.
            forward(shard, &encode(&[Part::new(2, 0, &prompt)]), &[], None, &mut []).unwrap();
        }
        let mut expected_batch = batch.clone();
        expected_batch[20..24].fill(0);
        let plan = Plan {
            output: 12,
            tokens: (HEADER as u32 + 20, 1),
            expected: wire(1, &expected_batch, b""),
            next: "r".into(),
            head: wire(5, b"", b""),
            ..Plan::default()
        };
        server.message(&wire(1, &batch, b""));
        assert_eq!(step(&list(&[plan]), &mut report), Ok(STEP_DONE));
        assert_eq!(report[24..], [&STEP.to_le_bytes()[..], &u32::from(CHAIN).to_le_bytes()].concat());
        assert_eq!(server.published(), ("r".into(), [&wire(5, b"", b"")[..], &expected[i + 1]].concat()));
    }
    // A token that the vocabulary lacks fails as it does without a lane, and JavaScript hears why.
    let plan = Plan {
        output: 12,
        tokens: (HEADER as u32 + 20, 1),
        expected: wire(1, &encode(&[Part::new(2, 12, &[0]).sample(&GREEDY)]), b""),
        next: "r".into(),
        head: wire(5, b"", b""),
        ..Plan::default()
    };
    server.message(&wire(1, &encode(&[Part::new(2, 12, &[1 << 30]).sample(&GREEDY)]), b""));
    assert_eq!(step(&list(&[plan]), &mut report), Ok(STEP_FAILED));
    assert_eq!(i32::from_le_bytes(report[4..8].try_into().unwrap()), Error::INVALID_ARGUMENT);

    server.message(b"other");
    assert_eq!(step(&list(&[]), &mut report), Ok(STEP_MESSAGE));
    assert_eq!(report[16..24], [5, 0, 0, 0, 1, 0, 0, 0]);
    let mut out = [0; 8];
    // SAFETY: as above.
    assert_eq!(call(|err, n| unsafe { lutra_lane_take(lane, out.as_mut_ptr(), 4, err, n) }).unwrap_err().0, -1);
    // SAFETY: as above.
    assert_eq!(call(|err, n| unsafe { lutra_lane_take(lane, out.as_mut_ptr(), 8, err, n) }), Ok(5));
    let (subject, data) = (b"a.b", b"data");
    // SAFETY: as above.
    let sent = call(|err, n| unsafe { lutra_lane_publish(lane, subject.as_ptr(), 3, data.as_ptr(), 4, err, n) });
    assert_eq!(sent, Ok(0));
    assert_eq!(server.published(), ("a.b".into(), data.to_vec()));
    for f in [lutra_lane_flush, lutra_lane_read, lutra_lane_wake] {
        // SAFETY: as above.
        assert_eq!(call(|err, n| unsafe { f(lane, err, n) }), Ok(0));
    }
    // What is wrong is refused, and the lane lives on.
    for (control_at, control_len, report_len) in
        [(std::ptr::null(), 16, 32), (out.as_ptr(), 8, 32), (control_at(&control), 16, 31)]
    {
        let armed = list(&[]);
        // SAFETY: as above.
        let refused = call(|err, n| unsafe {
            let (at, len) = (armed.as_ptr(), armed.len());
            lutra_lane_step(lane, shard, at, len, control_at, control_len, report.as_mut_ptr(), report_len, err, n)
        });
        assert_eq!(refused.unwrap_err().0, Error::INVALID_ARGUMENT);
    }
    // SAFETY: as above.
    assert_eq!(call(|err, n| unsafe { lutra_lane_close(lane, err, n) }), Ok(0));
    for f in [lutra_lane_flush, lutra_lane_read, lutra_lane_wake, lutra_lane_close] {
        // SAFETY: as above.
        assert_eq!(call(|err, n| unsafe { f(lane, err, n) }).unwrap_err().0, Error::BAD_HANDLE);
    }
    close(shard).unwrap();
}

fn control_at(control: &Control) -> *const u8 {
    std::ptr::from_ref(control).cast()
}
