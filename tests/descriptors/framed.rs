//! Frames with exactly their descriptors, over a real socket.

use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use bowline::framing::{FrameContext, FrameReceiver, Framed, LengthPrefixedFramer};
use bowline::{PassedDescriptor, Reactor, ReceivedDescriptors, Transports, UnixStream};

use crate::peer::{Identity, files, identities, send_message, shrink_send_buffer, transport};
use crate::support::{DescriptorLedger, Recorder, run_until, run_until_quiet, socketpair};

const FRAMES: usize = 400;

type Frames = Rc<RefCell<Vec<(Vec<u8>, Vec<Identity>)>>>;

/// Keeps each frame with what its descriptors are.
struct Collector(Frames);

impl FrameReceiver<UnixStream, LengthPrefixedFramer> for Collector {
    fn frame_received(
        &mut self,
        _: &mut FrameContext<'_, UnixStream, LengthPrefixedFramer>,
        frame: &[u8],
    ) {
        self.0.borrow_mut().push((frame.to_vec(), Vec::new()));
    }

    fn frame_with_descriptors(
        &mut self,
        _: &mut FrameContext<'_, UnixStream, LengthPrefixedFramer>,
        frame: &[u8],
        descriptors: &mut ReceivedDescriptors<'_>,
    ) {
        let taken: Vec<OwnedFd> = descriptors.collect();
        let frame = (frame.to_vec(), identities(&taken));
        self.0.borrow_mut().push(frame);
    }
}

/// From none to many, in no simple rhythm.
fn count_of(number: usize) -> usize {
    match number % 11 {
        0 | 4 | 5 => 0,
        1 => 16,
        other => other / 2,
    }
}

fn length_of(number: usize) -> usize {
    match number % 7 {
        0 => 0,
        1 => 1,
        2 => 40_000,
        other => number * other,
    }
}

/// Its reads are limited, so that there are many of them after the write that failed.
#[test]
fn frames_of_a_peer_that_is_gone_are_complete_although_a_send_fails() {
    let ledger = DescriptorLedger::open();
    {
        let arrived = Frames::default();
        let mut reactor = Reactor::new().unwrap();
        let (ours, theirs) = socketpair();
        let framed =
            Framed::with_descriptors(LengthPrefixedFramer::u32(), Collector(Rc::clone(&arrived)));
        let handle = reactor.adopt_unix_stream(ours.into(), framed).unwrap();
        reactor.turn(Some(std::time::Duration::ZERO));
        transport(&mut reactor, handle).pause_producing();
        let mut expected = Vec::new();
        for number in 0..20_u8 {
            let (sent, known) = files(usize::from(number) % 3);
            send_message(&theirs, &[0, 0, 0, 2, number, number], &sent);
            expected.push((vec![number; 2], known));
        }
        drop(theirs);
        transport(&mut reactor, handle).write(b"too late");
        run_until_quiet(&mut reactor);
        assert!(arrived.borrow().is_empty());
        transport(&mut reactor, handle).resume_producing();
        run_until(&mut reactor, |reactor| reactor.get(handle).is_none());
        assert_eq!(*arrived.borrow(), expected);
    }
    ledger.assert_balanced();
}

#[test]
fn each_frame_has_exactly_its_descriptors() {
    let ledger = DescriptorLedger::open();
    {
        let (all, known) = files(37);
        let all: Vec<_> = all.into_iter().map(Rc::new).collect();
        let arrived = Frames::default();
        let mut reactor = Reactor::new().unwrap();
        let (ours, theirs) = socketpair();
        shrink_send_buffer(&ours);
        let sender = reactor
            .adopt_unix_stream(ours.into(), Recorder::default())
            .unwrap();
        let framed =
            Framed::with_descriptors(LengthPrefixedFramer::u32(), Collector(Rc::clone(&arrived)));
        reactor.adopt_unix_stream(theirs.into(), framed).unwrap();

        let mut expected = Vec::new();
        let mut next = 0;
        for number in 0..FRAMES {
            let body = vec![number as u8; length_of(number)];
            let length = u32::try_from(body.len()).unwrap();
            let message = [&length.to_be_bytes()[..], &body].concat();
            let chosen: Vec<usize> = (next..next + count_of(number))
                .map(|at| at % all.len())
                .collect();
            next += chosen.len();
            let passed = chosen
                .iter()
                .map(|at| PassedDescriptor::shared(&all[*at]))
                .collect();
            transport(&mut reactor, sender)
                .write_with_descriptors(&message, passed)
                .unwrap();
            expected.push((body, chosen.iter().map(|at| known[*at]).collect()));
        }
        run_until(&mut reactor, |_| arrived.borrow().len() == FRAMES);
        for (number, (arrived, expected)) in arrived.borrow().iter().zip(&expected).enumerate() {
            assert!(arrived == expected, "frame {number}");
        }
    }
    ledger.assert_balanced();
}
