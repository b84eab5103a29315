//! Lanes: see `crate::lane`. Other systems than Unix lack these symbols.

use super::{buffer, count, guard, input, output, Registry, SHARDS};
use crate::error::Error;
use crate::lane::{Armed, Control, Event, Lane, Place};
use std::time::Duration;

static LANES: Registry<Lane> = Registry::new("lane");

/// What [`lutra_lane_step`] returns beside errors.
pub const STEP_WOKEN: i32 = 0;
pub const STEP_MESSAGE: i32 = 1;
pub const STEP_DONE: i32 = 2;
pub const STEP_FAILED: i32 = 3;

/// Where a server is.
#[derive(serde::Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Address {
    hostname: String,
    port: u16,
    timeout_ms: u32,
}

/// Connects to a NATS server (`Address`, JSON), writes the lane's handle, and to `info` what the server says of itself, JSON.
///
/// # Safety
/// Each pointer is valid for its length.
#[no_mangle]
pub unsafe extern "C" fn lutra_lane_open(
    address: *const u8,
    address_len: usize,
    info: *mut u8,
    info_len: usize,
    handle: *mut u8,
    handle_len: usize,
    err: *mut u8,
    err_len: usize,
) -> i32 {
    guard(err, err_len, || {
        // SAFETY: the caller's.
        let json = unsafe { input(address, address_len, "address")? };
        let address: Address =
            serde_json::from_slice(json).map_err(|e| Error::argument(format!("the address is malformed: {e}")))?;
        let timeout = Duration::from_millis(address.timeout_ms.into());
        let (lane, greeting) = Lane::open(&address.hostname, address.port, timeout)?;
        // SAFETY: the caller's.
        unsafe { output(info, info_len, greeting.as_bytes(), "info")? };
        if handle.is_null() || handle_len < 4 {
            return Err(Error::argument("handle needs 4 bytes"));
        }
        let number = LANES.add(lane)?;
        // SAFETY: the caller's.
        unsafe { output(handle, handle_len, &number.to_le_bytes(), "handle")? };
        count(greeting.len())
    })
}

/// Sends CONNECT and SUB, as protocol lines that end with a PING, and waits for the server's consent. Payloads may have
/// `most_payload` bytes.
///
/// # Safety
/// Each pointer is valid for its length.
#[no_mangle]
pub unsafe extern "C" fn lutra_lane_join(
    handle: u32,
    hello: *const u8,
    hello_len: usize,
    most_payload: u32,
    timeout_ms: u32,
    err: *mut u8,
    err_len: usize,
) -> i32 {
    guard(err, err_len, || {
        // SAFETY: the caller's.
        let hello = unsafe { input(hello, hello_len, "hello")? };
        LANES.get(handle)?.join(hello, most_payload as usize, Duration::from_millis(timeout_ms.into()))?;
        Ok(0)
    })
}

/// Makes a step of shard `shard`: waits until
///
/// - [`STEP_DONE`]: a micro-batch of `armed` (`Armed::parse_all`) came, was computed, and passed on;
/// - [`STEP_FAILED`]: one came that could not be computed; `err` says why;
/// - [`STEP_MESSAGE`]: another message is there for [`lutra_lane_take`];
/// - [`STEP_WOKEN`]: attention was asked for.
///
/// `report` receives `u32` index of the micro-batch, `i32` error code, `u64` nanoseconds of the pass, `u32` bytes of the message
/// and `u32` its subscription; `u32` step and `u32` chain of the micro-batch.
/// `control` is a `Control`; who sets its attention calls [`lutra_lane_wake`] afterwards. A negative code means that the lane is
/// lost, or an argument was wrong.
///
/// # Safety
/// Each pointer is valid for its length; `control` is aligned for an i32, and others access it atomically only.
#[no_mangle]
pub unsafe extern "C" fn lutra_lane_step(
    handle: u32,
    shard: u32,
    armed: *const u8,
    armed_len: usize,
    control: *const u8,
    control_len: usize,
    report: *mut u8,
    report_len: usize,
    err: *mut u8,
    err_len: usize,
) -> i32 {
    guard(err, err_len, || {
        let lane = LANES.get(handle)?;
        let shard = SHARDS.get(shard)?;
        if control.is_null() || control_len < size_of::<Control>() || control.align_offset(4) != 0 {
            return Err(Error::argument("control needs 16 aligned bytes"));
        }
        // SAFETY: not null, long enough and aligned; any bits are four i32; others access it atomically.
        let control = unsafe { &*control.cast::<Control>() };
        // SAFETY: the caller's.
        let (armed, report) = unsafe { (input(armed, armed_len, "armed")?, buffer(report, report_len, "report")?) };
        let report = report.get_mut(..32).ok_or_else(|| Error::argument("report needs 32 bytes"))?;
        let mut armed = Armed::parse_all(armed, lane.limit())?;
        let event = lane.step(control, &mut armed, |batch, payload, output| {
            shard.forward(batch, payload, Some(&control.stop), output)
        })?;
        let mut tell = |index: usize, code: i32, time: Duration, Place { step, chain }: Place| {
            report[..4].copy_from_slice(&(index as u32).to_le_bytes());
            report[4..8].copy_from_slice(&code.to_le_bytes());
            report[8..16].copy_from_slice(&(time.as_nanos() as u64).to_le_bytes());
            report[24..28].copy_from_slice(&step.to_le_bytes());
            report[28..].copy_from_slice(&u32::from(chain).to_le_bytes());
        };
        Ok(match event {
            Event::Woken => STEP_WOKEN,
            Event::Message { subscription, size } => {
                report[16..20].copy_from_slice(&(size as u32).to_le_bytes());
                report[20..24].copy_from_slice(&subscription.to_le_bytes());
                STEP_MESSAGE
            }
            Event::Done { index, place, time } => {
                tell(index, 0, time, place);
                STEP_DONE
            }
            Event::Failed { index, place, time, error } => {
                tell(index, error.code, time, place);
                // SAFETY: the caller's.
                unsafe { super::tell(err, err_len, &error.message) };
                STEP_FAILED
            }
        })
    })
}

/// Takes the message that a step told of, and returns its length.
///
/// # Safety
/// Each pointer is valid for its length.
#[no_mangle]
pub unsafe extern "C" fn lutra_lane_take(
    handle: u32,
    out: *mut u8,
    out_len: usize,
    err: *mut u8,
    err_len: usize,
) -> i32 {
    guard(err, err_len, || {
        // SAFETY: the caller's.
        count(LANES.get(handle)?.take(unsafe { buffer(out, out_len, "out")? })?)
    })
}

/// Publishes `data` to `subject` as far as that can be done at once, and returns how many bytes
/// [`lutra_lane_flush`] has to send.
///
/// # Safety
/// Each pointer is valid for its length.
#[no_mangle]
pub unsafe extern "C" fn lutra_lane_publish(
    handle: u32,
    subject: *const u8,
    subject_len: usize,
    data: *const u8,
    data_len: usize,
    err: *mut u8,
    err_len: usize,
) -> i32 {
    guard(err, err_len, || {
        // SAFETY: the caller's.
        let (subject, data) = unsafe { (input(subject, subject_len, "subject")?, input(data, data_len, "data")?) };
        count(LANES.get(handle)?.publish(subject, data)?)
    })
}

/// Waits until all that was published is sent.
///
/// # Safety
/// `err` is valid for `err_len` bytes.
#[no_mangle]
pub unsafe extern "C" fn lutra_lane_flush(handle: u32, err: *mut u8, err_len: usize) -> i32 {
    guard(err, err_len, || LANES.get(handle)?.flush().map(|()| 0))
}

/// Reads what has come, as a long pass keeps a step from doing it.
///
/// # Safety
/// `err` is valid for `err_len` bytes.
#[no_mangle]
pub unsafe extern "C" fn lutra_lane_read(handle: u32, err: *mut u8, err_len: usize) -> i32 {
    guard(err, err_len, || LANES.get(handle)?.read_ahead().map(|()| 0))
}

/// Has a step look at its `control`.
///
/// # Safety
/// `err` is valid for `err_len` bytes.
#[no_mangle]
pub unsafe extern "C" fn lutra_lane_wake(handle: u32, err: *mut u8, err_len: usize) -> i32 {
    guard(err, err_len, || {
        LANES.get(handle)?.wake();
        Ok(0)
    })
}

/// Ends a lane, and the calls that wait for it, with an error.
///
/// # Safety
/// `err` is valid for `err_len` bytes.
#[no_mangle]
pub unsafe extern "C" fn lutra_lane_close(handle: u32, err: *mut u8, err_len: usize) -> i32 {
    guard(err, err_len, || {
        LANES.remove(handle)?.close();
        Ok(0)
    })
}
