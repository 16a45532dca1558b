//! The framings of `bowline-peers`: what they find does not depend on how the bytes were
//! cut, what is read from a frame does not panic, and what is encoded is decoded. What is no
//! stream of frames, notices and consoles, is judged as its rules say. The two ends of
//! vhost-user that are asked are given whatever a peer sends, with descriptors, and leave
//! none open.

#![no_main]

use std::cell::RefCell;
use std::fs::File;
use std::io::{IoSlice, Read as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::time::Duration;

use bowline::framing::{Decoded, FrameBuffer, FrameEncoder, Framer, FramingError};
use bowline::{Protocol, Reactor, ReceivedDescriptors, Transports as _, Unix, UnixStream};
use bowline_peers::dbus::{DbusFramer, DbusMessage};
use bowline_peers::haproxy::{GetsocksFramer, GetsocksPart, ListenerName, SockpairFramer};
use bowline_peers::imsg::{Imsg, ImsgDialect, ImsgFramer, ImsgHeader};
use bowline_peers::node::NodeFramer;
use bowline_peers::notify::{DescriptorStore, Notice};
use bowline_peers::oci::{Console, ConsoleError, LABEL_LIMIT};
use bowline_peers::varlink::{VarlinkCall, VarlinkFramer, VarlinkReply};
use bowline_peers::vhost_user::{
    BackEndContext, VhostUserAnswer, VhostUserDevice, VhostUserFramer, VhostUserHeader,
    VhostUserRequest, back_end, front_end_channel,
};
use bowline_peers::wayland::{WaylandFramer, WaylandHeader};

type Outcome = (Vec<(Vec<u8>, Option<usize>)>, Option<FramingError>);

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let [kind, limit, step, input @ ..] = data else {
        return;
    };
    let step = usize::from(*step).max(1);
    let limit = usize::from(*limit);
    let getsocks = |part| move || GetsocksFramer::new(part);
    match kind % 18 {
        0 => imsg(ImsgFramer::new(ImsgDialect::Legacy), limit, input, step),
        1 => imsg(ImsgFramer::new(ImsgDialect::Current), limit, input, step),
        2 => imsg(
            ImsgFramer::learning(ImsgDialect::Legacy),
            limit,
            input,
            step,
        ),
        3 => compare(getsocks(GetsocksPart::Request), input, step, |_| ()),
        4 => compare(getsocks(GetsocksPart::Count), input, step, |_| ()),
        5 => {
            compare(getsocks(GetsocksPart::Records), input, step, |frame| {
                encode_again(
                    GetsocksFramer::new(GetsocksPart::Records),
                    &ListenerName::of(frame),
                    b"",
                );
            });
        }
        6 => compare(|| SockpairFramer, input, step, |_| ()),
        7 => compare(DbusFramer::of_lines, input, step, |_| ()),
        8 => compare(
            || VarlinkFramer::new().with_max_length(limit),
            input,
            step,
            |frame| {
                encode_again(VarlinkFramer::new(), &(), frame);
                let _ = (
                    VarlinkCall::parse(frame).is_ok(),
                    VarlinkReply::parse(frame).is_ok(),
                );
            },
        ),
        9 => {
            let make = || DbusFramer::of_messages().with_max_length(4_096);
            compare(make, input, step, |frame| {
                let message = DbusMessage::parse(frame).expect("it was found to be one");
                assert!(message.body.len() < frame.len());
            });
        }
        10 => compare(
            || VhostUserFramer::new().with_max_payload(limit),
            input,
            step,
            |frame| {
                let (header, payload) = VhostUserHeader::of(frame);
                encode_again(VhostUserFramer::new(), &header, payload);
            },
        ),
        11 => compare(
            || WaylandFramer::new().with_max_length(4 * limit),
            input,
            step,
            |frame| {
                let (header, arguments) = WaylandHeader::of(frame);
                encode_again(WaylandFramer::new(), &header, arguments);
            },
        ),
        12 => notices(input, step),
        13 => console(input, step),
        14 => {
            let make = || VhostUserFramer::of_back_end().with_max_payload(limit);
            compare(make, input, step, |frame| {
                let (header, payload) = VhostUserHeader::of(frame);
                encode_again(VhostUserFramer::of_back_end(), &header, payload);
            });
        }
        15 => converse(back_end(Device), input),
        16 => {
            let asked = |_: &mut Reactor, request| {
                drop(request);
                Err(1)
            };
            converse(front_end_channel(asked), input);
        }
        _ => compare(
            || NodeFramer::new().with_max_length(limit),
            input,
            step,
            |frame| {
                encode_again(NodeFramer::new(), &(), frame);
            },
        ),
    }
});

fn imsg(framer: ImsgFramer, limit: usize, input: &[u8], step: usize) {
    let make = || framer.clone().with_max_length(16 + limit);
    compare(make, input, step, |frame| {
        let Imsg { header, data } = Imsg::of(frame);
        encode_again::<_, ImsgHeader>(framer.clone(), &header, data);
    });
}

/// What was read is a frame again, and a whole one.
fn encode_again<F, H>(mut framer: F, header: &H, payload: &[u8])
where
    F: Framer + FrameEncoder<Header = H>,
{
    let mut frame = Vec::new();
    framer
        .encode(header, payload, 0, &mut frame)
        .expect("it was received");
    let length = frame.len();
    match framer.decode(&frame) {
        Ok(Decoded::Frame { consumed, .. }) => assert_eq!(consumed, length),
        other => panic!("{other:?} of {frame:?}"),
    }
}

fn compare<F: Framer>(make: impl Fn() -> F, input: &[u8], step: usize, look: impl Fn(&[u8])) {
    let whole = decode(make(), [input], &look);
    assert_eq!(
        decode(make(), input.chunks(step), &look),
        whole,
        "in pieces"
    );
    let bytes = decode(make(), input.chunks(1), &look);
    assert_eq!(bytes, whole, "byte for byte");
}

fn decode<'a, F: Framer>(
    framer: F,
    pieces: impl IntoIterator<Item = &'a [u8]>,
    look: &impl Fn(&[u8]),
) -> Outcome {
    let mut buffer = FrameBuffer::new(framer);
    let mut frames = Vec::new();
    for mut piece in pieces {
        loop {
            let found = match buffer.next_frame(&mut piece) {
                Ok(Some(frame)) => frame.to_vec(),
                Ok(None) => break,
                Err(error) => return (frames, Some(error)),
            };
            look(&found);
            let claims = buffer.framer().claims(&found);
            frames.push((found, claims));
        }
    }
    (frames, None)
}

fn null() -> OwnedFd {
    File::open("/dev/null").expect("Linux has it").into()
}

/// Messages to a manager, between bytes that are in no text, each with so many descriptors.
fn notices(input: &[u8], count: usize) {
    const MOST: usize = 3;
    let mut store = DescriptorStore::new(MOST);
    for message in input.split(|byte| *byte == 0xff) {
        let Ok(notice) = Notice::parse(message) else {
            continue;
        };
        notice.said().for_each(drop);
        let again = Notice::parse(notice.as_str().as_bytes());
        assert_eq!(again.as_ref(), Ok(&notice));
        let (before, count) = (store.len(), count % 4);
        let applied = store.apply(&notice, (0..count).map(|_| null()).collect());
        let closed = applied.refused + applied.duplicates + applied.unclaimed;
        assert_eq!(applied.stored + closed, count);
        assert_eq!(store.len(), before + applied.stored - applied.removed);
        assert!(store.len() <= MOST);
    }
}

/// A console is what comes with exactly one descriptor, a terminal, and a label that ends.
fn console(input: &[u8], step: usize) {
    thread_local!(static TERMINAL: OwnedFd = {
        let terminal = File::options().read(true).write(true).open("/dev/ptmx");
        terminal.expect("Linux has it").into()
    });
    let label = input.repeat(step);
    let [count, is_terminal] = [step % 3, step / 3 % 2];
    let new = |_| match is_terminal {
        0 => null(),
        _ => TERMINAL.with(|it| it.try_clone().expect("a number is free")),
    };
    let mut descriptors: Vec<_> = (0..count).map(new).collect();
    let console = Console::of(&label, &mut ReceivedDescriptors::new(&mut descriptors));
    match console {
        Ok(console) => {
            assert!(count == 1 && is_terminal == 1 && label.len() < LABEL_LIMIT);
            assert_eq!(console.label(), label);
        }
        Err(ConsoleError::NotOne { count: came }) => assert!(count != 1 && came == count),
        Err(ConsoleError::LongLabel) => assert!(label.len() >= LABEL_LIMIT),
        Err(ConsoleError::Wrong(_)) => assert_eq!(is_terminal, 0),
        Err(error) => panic!("{error}"),
    }
}

/// Says of each request that it was done, and closes what came with it.
struct Device;

impl VhostUserDevice<UnixStream> for Device {
    fn request_received(
        &mut self,
        _: &mut BackEndContext<'_, UnixStream>,
        _: VhostUserRequest,
    ) -> VhostUserAnswer {
        VhostUserAnswer::Done
    }
}

/// Gives a protocol whatever a peer sends: pieces, each with so many descriptors. The peer
/// reads what is answered, and goes. Then none is open that was not before.
fn converse(protocol: impl Protocol<UnixStream>, mut input: &[u8]) {
    thread_local!(static REACTOR: RefCell<Reactor> =
        RefCell::new(Reactor::new().expect("a reactor")));
    REACTOR.with_borrow_mut(|reactor| {
        let before = lowest_free();
        let (ours, peer) = StdUnixStream::pair().expect("a number is free");
        ours.set_nonblocking(true).expect("a socket");
        peer.set_nonblocking(true).expect("a socket");
        let handle = reactor
            .adopt(Unix, ours.into(), protocol)
            .expect("a socket");
        while let &[count, length, ref behind @ ..] = input {
            let (piece, behind) = behind.split_at(behind.len().min(length.into()));
            input = behind;
            let descriptors: Vec<_> = (0..count % 4).map(|_| null()).collect();
            send(&peer, piece, &descriptors);
            settle(reactor);
            let _ = (&peer).read(&mut [0; 4_096]);
        }
        drop(peer);
        settle(reactor);
        assert!(reactor.get(handle).is_none(), "it ends with its peer");
        assert_eq!(lowest_free(), before, "something is open");
    });
}

fn settle(reactor: &mut Reactor) {
    for _ in 0..4 {
        reactor.turn(Some(Duration::ZERO));
    }
}

/// The lowest number that is free, which the kernel gives next.
fn lowest_free() -> i32 {
    null().as_raw_fd()
}

fn send(peer: &StdUnixStream, bytes: &[u8], descriptors: &[OwnedFd]) {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !borrowed.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&borrowed));
    }
    // It may have ended.
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    let _ = sendmsg(peer, &[IoSlice::new(bytes)], &mut control, flags);
}
