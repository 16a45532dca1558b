//! Receipt at every boundary: each descriptor that was sent is delivered or
//! closed, and a loss is said.

use std::io::IoSlice;
use std::os::fd::AsFd;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::{Passed, in_child, open_descriptors, print_figures, stream_pair};
use crate::sys::msg::receive_with_room;
use crate::sys::{
    Ancillary, CONTROL_BUFFER_BYTES, ControlBuffer, MAX_DESCRIPTORS, receive,
    send_with_descriptors, set_pass_credentials, set_pass_pidfd,
};

/// How many are sent; the last is one too many.
const COUNTS: [usize; 12] = [0, 1, 2, 15, 16, 17, 63, 64, 65, 252, 253, 254];

/// Reliability T-2: every number of descriptors in every size of the control
/// buffer.
#[test]
fn every_count_in_every_room_is_delivered_or_closed() {
    in_child(
        "sweep::every_count_in_every_room_is_delivered_or_closed",
        || {
            let (mut combinations, mut astray) = (0, 0);
            let (near, far) = stream_pair();
            let mut control = ControlBuffer::new();
            let mut ancillary = Ancillary::new();
            for count in COUNTS {
                for room in (0..=1100).step_by(4) {
                    let before = open_descriptors();
                    let mut passed = Passed::new();
                    let copies = vec![passed.borrow(); count];
                    let mut scratch = ControlBuffer::new();
                    let sent = send_with_descriptors(
                        near.as_fd(),
                        &[IoSlice::new(b"x")],
                        &copies,
                        &mut scratch,
                    );
                    if count > MAX_DESCRIPTORS {
                        assert!(sent.is_err(), "{count} descriptors were sent");
                        combinations += 1;
                        continue;
                    }
                    assert_eq!(sent.unwrap(), 1);
                    passed.let_go();
                    let received = receive_with_room(
                        far.as_fd(),
                        &mut [0; 8],
                        &mut control,
                        room,
                        &mut ancillary,
                    )
                    .unwrap();
                    let delivered = ancillary.descriptors.len();
                    assert_eq!(
                        received.control_truncated,
                        delivered < count,
                        "{delivered} of {count} in {room}"
                    );
                    // The kernel's rule, padding included.
                    assert_eq!(delivered, count.min(room.saturating_sub(16) / 4));
                    assert_eq!(passed.is_open_somewhere(), delivered > 0);
                    ancillary.clear();
                    astray += usize::from(passed.is_open_somewhere());
                    drop(passed);
                    assert_eq!(open_descriptors(), before, "{count} in {room}");
                    combinations += 1;
                }
            }
            print_figures(&format!("T-2: combinations = {combinations} (= 3312)"));
            print_figures(&format!(
                "T-2: neither delivered nor closed = {astray} (= 0)"
            ));
            assert_eq!((combinations, astray), (3312, 0));
        },
    );
}

/// Reliability T-3: descriptors lost for want of room, in the buffer and in the
/// table, beside credentials and a pidfd.
#[test]
fn every_truncation_is_said_and_leaks_nothing() {
    in_child("sweep::every_truncation_is_said_and_leaks_nothing", || {
        const REPEATS: usize = 10_000;
        let (near, far) = stream_pair();
        set_pass_credentials(far.as_fd(), true).unwrap();
        set_pass_pidfd(far.as_fd(), true).unwrap();
        let mut control = ControlBuffer::new();
        let mut ancillary = Ancillary::new();
        let (mut lost, mut said) = (0, 0);
        let limits = getrlimit(Resource::Nofile);
        // A pipe at a low number, so that those that come get the highest.
        let mut passed = Passed::many(64);
        passed.truncate(1);
        let before = open_descriptors();
        let mut random = 1_u64;
        for _ in 0..REPEATS {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let draw = (random >> 33) as usize;
            let count = 1 + draw % 17;
            let is_table = (draw / 17).is_multiple_of(2);
            let copies = vec![passed[0].borrow(); count];
            let mut scratch = ControlBuffer::new();
            let data = [IoSlice::new(b"x")];
            send_with_descriptors(near.as_fd(), &data, &copies, &mut scratch).unwrap();
            if is_table {
                // From none to more than enough. The directory's listing took
                // one of those that `before` counts.
                let free = (draw / 64 % (count + 4)) as u64;
                let limit = Rlimit {
                    current: Some(before as u64 - 1 + free),
                    ..limits
                };
                setrlimit(Resource::Nofile, limit).unwrap();
                receive(far.as_fd(), &mut [0; 8], &mut control, &mut ancillary)
            } else {
                let room = (draw / 64 % (160 + count * 4)).min(CONTROL_BUFFER_BYTES);
                receive_with_room(far.as_fd(), &mut [0; 8], &mut control, room, &mut ancillary)
            }
            .map(|received| {
                let is_lost = ancillary.descriptors.len() < count;
                lost += usize::from(is_lost);
                said += usize::from(is_lost && received.control_truncated);
                // Said without a loss only where something beside was lost: the
                // pidfd or the credentials.
                let is_whole = ancillary.pidfd.is_some() && ancillary.credentials.is_some();
                assert!(is_lost || !received.control_truncated || !is_whole);
            })
            .unwrap();
            setrlimit(Resource::Nofile, limits).unwrap();
            ancillary.clear();
        }
        let leaked = open_descriptors() - before;
        print_figures(&format!("T-3: receipts = {REPEATS} (>= 10000)"));
        print_figures(&format!("T-3: truncations said = {said} (= {lost})"));
        print_figures(&format!("T-3: descriptors leaked = {leaked} (= 0)"));
        assert!(lost > REPEATS / 4, "{lost} lost");
        assert_eq!((said, leaked), (lost, 0));
    });
}
