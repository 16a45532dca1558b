//! Descriptors beside bytes that a layer has changed: each comes with the bytes it was
//! sent with.

use std::cell::RefCell;
use std::fs::File;
use std::io::Read;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use bowline::endpoint::{Adopt as _, Connect as _, Listen as _};
use bowline::testing::{Memory, SimulatedKernel};
use bowline::{
    Address, CloseReason, Context, Protocol, Reactor, ReceivedDescriptors, Transports, Unix,
    UnixTransport, UnixTransportHandle,
};
use bowline_outside::Settings;

use crate::harness::passing;
use crate::support::{DescriptorLedger, run_until, run_until_quiet};

/// What came in one callback: the bytes, and what each descriptor has in it.
type Come = Rc<RefCell<Vec<(Vec<u8>, Vec<String>)>>>;

#[derive(Clone, Default)]
struct End {
    come: Come,
    handle: Rc<RefCell<Option<UnixTransportHandle>>>,
    lost: Rc<RefCell<Option<String>>>,
    limit: Option<NonZeroUsize>,
}

impl<T: UnixTransport> Protocol<T> for End {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        cx.transport.set_read_limit(self.limit);
        self.handle.replace(Some(cx.transport.unix_handle()));
    }

    fn data_received(&mut self, _: &mut Context<'_, T>, data: &[u8]) {
        self.come.borrow_mut().push((data.to_vec(), Vec::new()));
    }

    fn descriptors_received(
        &mut self,
        _: &mut Context<'_, T>,
        descriptors: &mut ReceivedDescriptors<'_>,
        data: &[u8],
    ) {
        let read = |fd: OwnedFd| {
            let mut text = String::new();
            File::from(fd).read_to_string(&mut text).unwrap();
            text
        };
        let texts = descriptors.map(read).collect();
        self.come.borrow_mut().push((data.to_vec(), texts));
    }

    fn connection_lost(&mut self, _: &mut Context<'_, T>, reason: &CloseReason) {
        self.lost.replace(Some(reason.to_string()));
    }
}

/// A pipe with this in it.
fn holding(text: &str) -> OwnedFd {
    let (reading, writing) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    rustix::io::write(&writing, text.as_bytes()).unwrap();
    reading
}

/// Two ends of ours, on each other.
fn joined(reactor: &mut Reactor, path: &Path, limit: Option<NonZeroUsize>) -> (End, End) {
    let end = |limit| End {
        limit,
        ..End::default()
    };
    let (sender, receiver) = (end(None), end(limit));
    let mut one = Some(receiver.clone());
    let here = Unix::at(path).layer(passing(Settings::default()));
    reactor
        .listen(here, move |_: &Address| one.take().expect("one"))
        .unwrap();
    let mut one = Some(sender.clone());
    let there = Unix::to(path).layer(passing(Settings::default()));
    reactor
        .connect(there, move |_: &Address| one.take().expect("one"))
        .unwrap();
    run_until(reactor, |_| {
        sender.handle.borrow().is_some() && receiver.handle.borrow().is_some()
    });
    (sender, receiver)
}

fn sender_of<'a>(reactor: &'a mut Reactor, end: &End) -> &'a mut dyn UnixTransport {
    let handle = end.handle.borrow().expect("made");
    reactor.get(handle).expect("connected")
}

#[test]
fn each_message_has_exactly_its_descriptors() {
    let _ledger = DescriptorLedger::open();
    let directory = tempfile::tempdir().unwrap();
    let mut reactor = Reactor::new().unwrap();
    let (sender, receiver) = joined(&mut reactor, &directory.path().join("s"), None);
    let transport = sender_of(&mut reactor, &sender);
    let mut expected = Vec::new();
    for number in 0..200 {
        let plain = vec![b'p'; number * 37 % 500];
        let _ = transport.write(&plain);
        let message = vec![b'm'; 1 + number * 91 % 20_000];
        let texts: Vec<String> = (0..1 + number % 3)
            .map(|n| format!("{number}.{n}"))
            .collect();
        let descriptors = texts.iter().map(|text| holding(text).into()).collect();
        transport
            .write_with_descriptors(&message, descriptors)
            .unwrap();
        expected.push((plain.len(), message.len(), texts));
    }
    let all: usize = expected
        .iter()
        .map(|(plain, message, _)| plain + message)
        .sum();
    run_until(&mut reactor, |_| {
        let come = receiver.come.borrow();
        come.iter().map(|(data, _)| data.len()).sum::<usize>() == all
    });
    // Where descriptors come, there begins their message.
    let mut begins = 0;
    let mut expected = expected.into_iter();
    let mut next_at = 0;
    for (data, texts) in receiver.come.take() {
        if !texts.is_empty() {
            let (plain, message, wanted) = expected.next().expect("no more than were sent");
            assert_eq!((begins, &texts), (next_at + plain, &wanted));
            next_at += plain + message;
        }
        begins += data.len();
    }
    assert!(expected.next().is_none());
    drop(reactor);
}

/// Reads that are smaller than frames.
#[test]
fn descriptors_come_with_their_first_byte_whatever_the_limit() {
    let _ledger = DescriptorLedger::open();
    let directory = tempfile::tempdir().unwrap();
    let mut reactor = Reactor::new().unwrap();
    let limit = NonZeroUsize::new(7);
    let (sender, receiver) = joined(&mut reactor, &directory.path().join("s"), limit);
    let transport = sender_of(&mut reactor, &sender);
    let _ = transport.write(b"0123456789");
    transport
        .write_with_descriptors(b"abcdefghij", vec![holding("it").into()])
        .unwrap();
    let come = Rc::clone(&receiver.come);
    run_until(&mut reactor, |_| {
        come.borrow()
            .iter()
            .map(|(data, _)| data.len())
            .sum::<usize>()
            == 20
    });
    let come: Vec<_> = come
        .take()
        .into_iter()
        .map(|(data, texts)| (String::from_utf8(data).unwrap(), texts.len()))
        .collect();
    let expected = [("0123456", 0), ("789", 0), ("abcdefg", 1), ("hij", 0)];
    assert_eq!(
        come,
        expected.map(|(data, count)| (data.to_string(), count))
    );
}

#[test]
fn a_floating_descriptor_rides_with_the_next_frame() {
    let _ledger = DescriptorLedger::open();
    let directory = tempfile::tempdir().unwrap();
    let mut reactor = Reactor::new().unwrap();
    let (sender, receiver) = joined(&mut reactor, &directory.path().join("s"), None);
    let transport = sender_of(&mut reactor, &sender);
    transport
        .send_file_descriptor(holding("one").into())
        .unwrap();
    transport
        .send_file_descriptor(holding("two").into())
        .unwrap();
    let _ = transport.write(b"both");
    run_until(&mut reactor, |_| !receiver.come.borrow().is_empty());
    assert_eq!(
        receiver.come.take(),
        [(b"both".to_vec(), vec!["one".to_string(), "two".into()])]
    );
}

/// A descriptor that is no frame's ends the connection and is closed, and so is what a
/// layer holds at the end.
#[test]
fn descriptors_of_half_a_frame_are_closed() {
    for way in ["held", "out of place"] {
        let _ledger = DescriptorLedger::open();
        let (ours, theirs) = StdUnixStream::pair().unwrap();
        let mut reactor = Reactor::new().unwrap();
        let end = End::default();
        let kind = Unix.layer(passing(Settings::default()));
        reactor.adopt(kind, ours.into(), end.clone()).unwrap();
        let file = File::open("/dev/null").unwrap();
        let mut room = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut send = |bytes: &[u8]| {
            let descriptors = [file.as_fd()];
            let mut control = rustix::net::SendAncillaryBuffer::new(&mut room);
            let rights = rustix::net::SendAncillaryMessage::ScmRights(&descriptors);
            assert!(control.push(rights));
            let data = [std::io::IoSlice::new(bytes)];
            let flags = rustix::net::SendFlags::empty();
            rustix::net::sendmsg(&theirs, &data, &mut control, flags).unwrap();
        };
        // A hello of eight bytes, of which six come.
        send(b"\x03\0\x08who");
        run_until_quiet(&mut reactor);
        if way == "out of place" {
            send(b"are");
            run_until(&mut reactor, |_| end.lost.borrow().is_some());
            let lost = end.lost.take().unwrap();
            assert!(
                lost.ends_with("descriptors in the middle of a frame"),
                "{lost}"
            );
        } else {
            drop(theirs);
            run_until(&mut reactor, |_| end.lost.borrow().is_some());
        }
        drop((reactor, file));
    }
}

#[test]
fn they_pass_on_the_simulated_kernel_too() {
    let _ledger = DescriptorLedger::open();
    let clock = bowline::testing::ManualClock::new();
    let mut reactor = Reactor::with_clock(clock).unwrap();
    let kernel = SimulatedKernel::new();
    let listener = kernel.listen("here").unwrap();
    let (sender, receiver) = (End::default(), End::default());
    let mut one = Some(receiver.clone());
    let here = listener.layer(passing(Settings::default()));
    reactor
        .listen(here, move |_: &Address| one.take().expect("one"))
        .unwrap();
    let mut one = Some(sender.clone());
    let there = Memory::to(&kernel, "here").layer(passing(Settings::default()));
    reactor
        .connect(there, move |_: &Address| one.take().expect("one"))
        .unwrap();
    while sender.handle.borrow().is_none() || receiver.handle.borrow().is_none() {
        reactor.turn(Some(Duration::ZERO));
    }
    let transport = sender_of(&mut reactor, &sender);
    let _ = transport.write(b"before");
    transport
        .write_with_descriptors(b"with", vec![holding("it").into()])
        .unwrap();
    while receiver.come.borrow().len() < 2 {
        reactor.turn(Some(Duration::ZERO));
    }
    let expected = [
        (b"before".to_vec(), vec![]),
        (b"with".to_vec(), vec!["it".to_string()]),
    ];
    assert_eq!(receiver.come.take(), expected);
}
