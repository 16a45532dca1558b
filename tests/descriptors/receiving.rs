//! Receiving: one by one, or grouped with the bytes of the same read.

use std::cell::RefCell;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

use bowline::Unix;
use bowline::error::SendDescriptorErrorKind;
use bowline::{
    Address, AnyConnection as _, Context, DescriptorLimits, Protocol, Reactor, ReceivedDescriptors,
    Transport, Transports, UnixStream,
};

use crate::peer::{
    BytesOnly, Identity, OneByOne, Seen, adopt, capture_log, file, files, identities, identity,
    logged, send, send_message, transport,
};
use crate::support::{DescriptorLedger, Record, Recorder, run_until, run_until_quiet};

/// The bytes of a read, and what its descriptors are.
type Read = (Vec<u8>, Vec<Identity>);

/// Keeps each read as it was.
struct Reads(Rc<RefCell<Vec<Read>>>);

impl Protocol<UnixStream> for Reads {
    fn data_received(&mut self, _: &mut Context<'_, UnixStream>, data: &[u8]) {
        self.0.borrow_mut().push((data.to_vec(), Vec::new()));
    }

    fn descriptors_received(
        &mut self,
        _: &mut Context<'_, UnixStream>,
        descriptors: &mut ReceivedDescriptors<'_>,
        data: &[u8],
    ) {
        let taken: Vec<OwnedFd> = descriptors.collect();
        self.0
            .borrow_mut()
            .push((data.to_vec(), identities(&taken)));
    }
}

/// S-24, S-25.
#[test]
fn descriptors_come_one_by_one_in_order_before_the_bytes() {
    let ledger = DescriptorLedger::open();
    {
        let seen = Seen::default();
        let kept = Rc::new(RefCell::new(Vec::new()));
        let mut reactor = Reactor::new().unwrap();
        let (_, peer) = adopt(
            &mut reactor,
            OneByOne::new(&seen, {
                let kept = Rc::clone(&kept);
                move |_, fd| {
                    kept.borrow_mut().push(fd);
                    Ok(())
                }
            }),
        );
        let (sent, expected) = files(3);
        send_message(&peer, b"abc", &sent);
        run_until_quiet(&mut reactor);
        assert_eq!(
            seen.all(),
            ["descriptor", "descriptor", "descriptor", "data abc"]
        );
        assert_eq!(identities(&kept.borrow()), expected);
    }
    ledger.assert_balanced();
}

/// S-29.
#[test]
fn plain_bytes_sent_earlier_are_glued_in_front_and_later_ones_never_behind() {
    let ledger = DescriptorLedger::open();
    {
        let reads = Rc::new(RefCell::new(Vec::new()));
        let mut reactor = Reactor::new().unwrap();
        let (_, peer) = adopt(&mut reactor, Reads(Rc::clone(&reads)));
        let (sent, expected) = files(3);
        send_message(&peer, b"aaaa", &[]);
        send_message(&peer, b"B", &sent[..1]);
        send_message(&peer, b"cccc", &[]);
        send_message(&peer, b"D", &sent[1..]);
        send_message(&peer, b"eeee", &[]);
        run_until_quiet(&mut reactor);
        let expected = [
            (b"aaaaB".to_vec(), expected[..1].to_vec()),
            (b"ccccD".to_vec(), expected[1..].to_vec()),
            (b"eeee".to_vec(), Vec::new()),
        ];
        assert_eq!(*reads.borrow(), expected);
    }
    ledger.assert_balanced();
}

/// Reads frames of a header, one byte that says how long the body is, and the
/// body, which comes with its descriptors; no read goes further than that.
struct Frames {
    reads: Rc<RefCell<Vec<Read>>>,
    needed: usize,
    in_body: bool,
    frame: Vec<u8>,
    descriptors: Vec<OwnedFd>,
}

impl Frames {
    fn take(&mut self, cx: &mut Context<'_, UnixStream>, data: &[u8]) {
        assert!(data.len() <= self.needed, "a read went too far");
        self.frame.extend_from_slice(data);
        self.needed -= data.len();
        if self.needed == 0 {
            self.in_body = !self.in_body;
            if self.in_body {
                self.needed = self.frame.pop().expect("one byte").into();
            } else {
                let descriptors = std::mem::take(&mut self.descriptors);
                let frame = std::mem::take(&mut self.frame);
                self.reads
                    .borrow_mut()
                    .push((frame, identities(&descriptors)));
                self.needed = 1;
            }
        }
        cx.transport.set_read_limit(NonZeroUsize::new(self.needed));
    }
}

impl Protocol<UnixStream> for Frames {
    fn connection_made(&mut self, cx: &mut Context<'_, UnixStream>) {
        cx.transport.set_read_limit(NonZeroUsize::new(1));
    }

    fn data_received(&mut self, cx: &mut Context<'_, UnixStream>, data: &[u8]) {
        self.take(cx, data);
    }

    fn descriptors_received(
        &mut self,
        cx: &mut Context<'_, UnixStream>,
        descriptors: &mut ReceivedDescriptors<'_>,
        data: &[u8],
    ) {
        self.descriptors.extend(descriptors);
        self.take(cx, data);
    }
}

#[test]
fn read_limit_delivers_a_message_with_exactly_its_descriptors() {
    let ledger = DescriptorLedger::open();
    {
        let reads = Rc::new(RefCell::new(Vec::new()));
        let mut reactor = Reactor::new().unwrap();
        let (_, peer) = adopt(
            &mut reactor,
            Frames {
                reads: Rc::clone(&reads),
                needed: 1,
                in_body: false,
                frame: Vec::new(),
                descriptors: Vec::new(),
            },
        );
        let mut expected = Vec::new();
        for round in 0..20usize {
            let (sent, identities) = files(round % 4);
            let body = vec![round as u8; 1 + round * 3];
            // Header and body in calls of their own, descriptors with either
            // byte of the header would belong to the body too.
            send_message(&peer, &[body.len() as u8], &[]);
            send_message(&peer, &body, &sent);
            expected.push((body, identities));
        }
        run_until(&mut reactor, |_| reads.borrow().len() == expected.len());
        assert_eq!(*reads.borrow(), expected);
    }
    ledger.assert_balanced();
}

/// S-30.
#[test]
fn message_read_in_pieces_has_its_descriptors_with_the_first() {
    let ledger = DescriptorLedger::open();
    {
        let reads = Rc::new(RefCell::new(Vec::new()));
        let mut reactor = Reactor::new().unwrap();
        let (handle, peer) = adopt(&mut reactor, Reads(Rc::clone(&reads)));
        transport(&mut reactor, handle).set_read_limit(NonZeroUsize::new(2));
        let (sent, expected) = files(2);
        send_message(&peer, b"abcde", &sent);
        run_until_quiet(&mut reactor);
        let expected = [
            (b"ab".to_vec(), expected),
            (b"cd".to_vec(), Vec::new()),
            (b"e".to_vec(), Vec::new()),
        ];
        assert_eq!(*reads.borrow(), expected);
    }
    ledger.assert_balanced();
}

/// S-45, W-10, where Twisted leaves them inheritable.
#[test]
fn received_descriptors_are_close_on_exec() {
    let ledger = DescriptorLedger::open();
    {
        let record = Record::default();
        let mut reactor = Reactor::new().unwrap();
        let (_, peer) = adopt(&mut reactor, Recorder::new(&record));
        send_message(&peer, b"x", &files(3).0);
        run_until_quiet(&mut reactor);
        let received = record.take_descriptors();
        assert_eq!(received.len(), 3);
        for fd in received {
            let flags = rustix::io::fcntl_getfd(fd).unwrap();
            assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        }
    }
    ledger.assert_balanced();
}

/// S-05, S-27, M-08.
#[test]
fn descriptors_are_delivered_although_the_sender_is_gone() {
    let ledger = DescriptorLedger::open();
    {
        let record = Record::default();
        let mut reactor = Reactor::new().unwrap();
        let (_, peer) = adopt(&mut reactor, Recorder::new(&record));
        let (sent, expected) = files(4);
        send_message(&peer, b"a", &sent[..1]);
        send_message(&peer, b"b", &sent[1..3]);
        send_message(&peer, b"c", &sent[3..]);
        drop((peer, sent));
        run_until(&mut reactor, |_| record.is_lost());
        assert_eq!(record.data(), b"abc");
        assert_eq!(identities(&record.take_descriptors()), expected);
        assert_eq!(record.summary().last().unwrap(), "lost closed cleanly");
    }
    ledger.assert_balanced();
}

/// M-03.
#[test]
fn paused_transport_delivers_descriptors_when_it_reads_again() {
    let ledger = DescriptorLedger::open();
    {
        let record = Record::default();
        let mut reactor = Reactor::new().unwrap();
        let (handle, peer) = adopt(&mut reactor, Recorder::new(&record));
        transport(&mut reactor, handle).pause_producing();
        let (sent, expected) = files(5);
        for fd in sent {
            send_message(&peer, b"x", &[fd]);
        }
        run_until_quiet(&mut reactor);
        assert_eq!(record.summary(), ["made"]);
        transport(&mut reactor, handle).resume_producing();
        run_until_quiet(&mut reactor);
        assert_eq!(record.data(), b"xxxxx");
        assert_eq!(identities(&record.take_descriptors()), expected);
    }
    ledger.assert_balanced();
}

/// Sends three descriptors and bytes to a protocol that ends its connection
/// when the first comes.
#[track_caller]
fn assert_nothing_after(
    end: impl Fn(&mut Context<'_, UnixStream>) + 'static,
    expected: &[&str],
) -> (Reactor, Seen) {
    let seen = Seen::default();
    let mut reactor = Reactor::new().unwrap();
    let (_, peer) = adopt(
        &mut reactor,
        OneByOne::new(&seen, move |cx, _| {
            end(cx);
            Ok(())
        }),
    );
    send_message(&peer, b"abc", &files(3).0);
    run_until(&mut reactor, |_| seen.has("lost"));
    assert_eq!(seen.all(), expected);
    (reactor, seen)
}

/// S-35, W-12, where Twisted delivers the rest.
#[test]
fn nothing_is_delivered_after_a_close_inside_the_callback() {
    let ledger = DescriptorLedger::open();
    {
        let expected = ["descriptor", "lost closed cleanly; 0 unsent"];
        let (mut reactor, _) = assert_nothing_after(|cx| cx.transport.lose_connection(), &expected);
        assert_eq!(reactor.descriptor_counts().unclaimed, 2);
    }
    ledger.assert_balanced();
}

/// S-35, W-12, likewise.
#[test]
fn nothing_is_delivered_after_an_abort_inside_the_callback() {
    let ledger = DescriptorLedger::open();
    {
        let expected = ["descriptor", "lost aborted by us; 0 unsent"];
        let (mut reactor, _) =
            assert_nothing_after(|cx| cx.transport.abort_connection(), &expected);
        assert_eq!(reactor.descriptor_counts().unclaimed, 2);
    }
    ledger.assert_balanced();
}

/// S-34, W-11.
#[test]
fn panic_in_the_callback_closes_all_and_costs_the_connection() {
    let ledger = DescriptorLedger::open();
    {
        capture_log();
        let expected = ["descriptor", "lost a callback panicked; 0 unsent"];
        let (mut reactor, _) = assert_nothing_after(|_| panic!("meant to panic"), &expected);
        assert_eq!(reactor.statistics().panics, 1);
        let lines = logged(log::Level::Error, "meant to panic");
        assert_eq!(lines.len(), 1, "{lines:?}");
        assert_eq!(reactor.descriptor_counts().unclaimed, 2);
        assert_eq!(reactor.registered(), 0);
        // The loop goes on, and so does what it shares.
        let record = Record::default();
        let (_, peer) = adopt(&mut reactor, Recorder::new(&record));
        let (sent, expected) = files(2);
        send_message(&peer, b"next", &sent);
        run_until(&mut reactor, |_| record.data() == b"next");
        assert_eq!(identities(&record.take_descriptors()), expected);
    }
    ledger.assert_balanced();
}

/// S-31, G-01, W-14, with one log line per connection rather than per message.
#[test]
fn unwanted_descriptors_are_closed_with_one_warning_per_connection() {
    let ledger = DescriptorLedger::open();
    {
        capture_log();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let seen = Seen::default();
        let mut reactor = Reactor::new().unwrap();
        let protocol_seen = seen.clone();
        reactor
            .listen_unix(path.as_path(), move |_: &Address| BytesOnly {
                seen: protocol_seen.clone(),
            })
            .unwrap();
        let mut peers = Vec::new();
        for connection in 1..=2 {
            let peer = std::os::unix::net::UnixStream::connect(&path).unwrap();
            for _ in 0..4 {
                let (reader, writer) =
                    rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
                send_message(&peer, b"x", &[writer, file(), file()]);
                run_until_quiet(&mut reactor);
                assert_eq!(rustix::io::read(&reader, &mut [0; 4]).unwrap(), 0);
            }
            let warnings = logged(log::Level::Warn, "");
            assert_eq!(warnings.len(), connection, "{warnings:?}");
            let warning = &warnings[connection - 1];
            for part in ["bowline::descriptors", "BytesOnly", "closed 3", "unnamed"] {
                assert!(warning.contains(part), "{part} in {warning}");
            }
            assert!(warning.contains(path.to_str().unwrap()), "{warning}");
            peers.push(peer);
        }
        assert_eq!(seen.all(), ["data x"; 8]);
        assert_eq!(reactor.descriptor_counts().unclaimed, 24);
    }
    ledger.assert_balanced();
}

#[test]
fn descriptors_that_are_given_back_are_closed_and_the_others_kept() {
    let ledger = DescriptorLedger::open();
    {
        capture_log();
        let seen = Seen::default();
        let kept = Rc::new(RefCell::new(Vec::new()));
        let mut reactor = Reactor::new().unwrap();
        let (_, peer) = adopt(
            &mut reactor,
            OneByOne::new(&seen, {
                let kept = Rc::clone(&kept);
                let mut count = 0;
                move |_, fd| {
                    count += 1;
                    if count % 2 == 0 {
                        return Err(fd);
                    }
                    kept.borrow_mut().push(fd);
                    Ok(())
                }
            }),
        );
        let (sent, expected) = files(5);
        send_message(&peer, b"x", &sent);
        run_until_quiet(&mut reactor);
        let expected: Vec<_> = expected.iter().copied().step_by(2).collect();
        assert_eq!(identities(&kept.borrow()), expected);
        assert_eq!(reactor.descriptor_counts().unclaimed, 2);
        assert_eq!(logged(log::Level::Warn, "closed 2").len(), 1);
    }
    ledger.assert_balanced();
}

/// Takes the first descriptor of each read and leaves the rest.
struct First(Rc<RefCell<Vec<OwnedFd>>>);

impl Protocol<UnixStream> for First {
    fn data_received(&mut self, _: &mut Context<'_, UnixStream>, _: &[u8]) {}

    fn descriptors_received(
        &mut self,
        _: &mut Context<'_, UnixStream>,
        descriptors: &mut ReceivedDescriptors<'_>,
        data: &[u8],
    ) {
        assert_eq!((descriptors.len(), data), (4, &b"x"[..]));
        self.0.borrow_mut().extend(descriptors.next());
    }
}

#[test]
fn descriptors_left_in_the_group_are_closed() {
    let ledger = DescriptorLedger::open();
    {
        let kept = Rc::new(RefCell::new(Vec::new()));
        let mut reactor = Reactor::new().unwrap();
        let (_, peer) = adopt(&mut reactor, First(Rc::clone(&kept)));
        let (sent, expected) = files(4);
        send_message(&peer, b"x", &sent);
        run_until_quiet(&mut reactor);
        assert_eq!(identities(&kept.borrow()), expected[..1]);
        let counts = reactor.descriptor_counts();
        assert_eq!((counts.received, counts.unclaimed), (4, 3));
    }
    ledger.assert_balanced();
}

/// S-33.
#[test]
fn wrapper_forwards_descriptors() {
    let ledger = DescriptorLedger::open();
    {
        let record = Record::default();
        let mut reactor = Reactor::new().unwrap();
        let boxed: Box<dyn Protocol<UnixStream>> = Box::new(Recorder::new(&record));
        let (handle, peer) = adopt(&mut reactor, boxed);
        let (sent, expected) = files(2);
        send_message(&peer, b"boxed", &sent);
        run_until_quiet(&mut reactor);
        assert_eq!(identities(&record.take_descriptors()), expected);
        let it = transport(&mut reactor, handle);
        it.send_file_descriptor(file().into()).unwrap();
        it.write(b"x");
        run_until_quiet(&mut reactor);
        assert_eq!(
            record.summary(),
            ["made", "descriptor", "descriptor", "data 5", "sent 1"]
        );
    }
    ledger.assert_balanced();
}

/// Contract W-13.
#[test]
fn more_descriptors_in_one_read_than_allowed_end_the_connection() {
    let ledger = DescriptorLedger::open();
    {
        capture_log();
        let record = Record::default();
        let mut reactor = Reactor::new().unwrap();
        let (handle, peer) = adopt(&mut reactor, Recorder::new(&record));
        transport(&mut reactor, handle)
            .set_descriptor_limits(DescriptorLimits::default().received_per_read(2));
        send_message(&peer, b"ok", &files(2).0);
        run_until_quiet(&mut reactor);
        assert_eq!(record.take_descriptors().len(), 2);
        send_message(&peer, b"no", &files(3).0);
        run_until(&mut reactor, |_| record.is_lost());
        assert_eq!(record.data(), b"ok");
        assert!(record.take_descriptors().is_empty());
        let last = record.summary().pop().unwrap();
        assert_eq!(last, "lost peer sent more than 2 descriptors");
        assert_eq!(reactor.descriptor_counts().unclaimed, 3);
        let warnings = logged(log::Level::Warn, "does not take");
        assert!(warnings.is_empty(), "it does: {warnings:?}");
    }
    ledger.assert_balanced();
}

/// Contract W-13.
#[test]
fn more_descriptors_in_all_than_allowed_end_the_connection() {
    let ledger = DescriptorLedger::open();
    {
        let record = Record::default();
        let mut reactor = Reactor::new().unwrap();
        let (handle, peer) = adopt(&mut reactor, Recorder::new(&record));
        transport(&mut reactor, handle)
            .set_descriptor_limits(DescriptorLimits::default().received_in_all(5));
        send_message(&peer, b"ab", &files(3).0);
        send_message(&peer, b"cd", &files(2).0);
        run_until_quiet(&mut reactor);
        assert_eq!(record.take_descriptors().len(), 5);
        send_message(&peer, b"ef", &files(1).0);
        run_until(&mut reactor, |_| record.is_lost());
        assert_eq!(record.data(), b"abcd");
        let last = record.summary().pop().unwrap();
        assert_eq!(last, "lost peer sent more than 5 descriptors");
        assert!(record.take_descriptors().is_empty());
        assert_eq!(reactor.descriptor_counts().unclaimed, 1);
    }
    ledger.assert_balanced();
}

/// Contract W-15.
#[test]
fn transport_knows_who_is_at_the_other_end() {
    let ledger = DescriptorLedger::open();
    {
        let mut reactor = Reactor::new().unwrap();
        let (handle, _peer) = adopt(&mut reactor, Recorder::default());
        let it = transport(&mut reactor, handle);
        let credentials = it.peer_credentials().unwrap();
        assert_eq!(credentials.pid, Some(std::process::id()));
        assert_eq!(credentials.uid, rustix::process::geteuid().as_raw());
        assert_eq!(credentials.gid, rustix::process::getegid().as_raw());
        let pidfd = it.peer_pidfd().unwrap();
        let info = rustix::io::fcntl_getfd(&pidfd).unwrap();
        assert!(info.contains(rustix::io::FdFlags::CLOEXEC));
        // A living process: its descriptor is not readable.
        let mut polled = [rustix::event::PollFd::new(
            &pidfd,
            rustix::event::PollFlags::IN,
        )];
        let now = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        assert_eq!(rustix::event::poll(&mut polled, Some(&now)).unwrap(), 0);
    }
    ledger.assert_balanced();
}

#[test]
fn refusing_descriptors_in_the_kernel_gives_the_sender_an_error() {
    let ledger = DescriptorLedger::open();
    {
        let record = Record::default();
        let mut reactor = Reactor::new().unwrap();
        let (handle, peer) = adopt(&mut reactor, Recorder::new(&record));
        let it = transport(&mut reactor, handle);
        if let Err(error) = it.set_descriptors_accepted(false) {
            eprintln!("SKIPPED: this kernel cannot refuse descriptors: {error}");
            return;
        }
        let passed = file();
        let error = send(&peer, b"x", &[passed.as_fd()]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
        send_message(&peer, b"plain", &[]);
        run_until(&mut reactor, |_| record.data() == b"plain");
        transport(&mut reactor, handle)
            .set_descriptors_accepted(true)
            .unwrap();
        send_message(&peer, b"y", &[passed]);
        run_until(&mut reactor, |_| record.data() == b"plainy");
        assert_eq!(record.take_descriptors().len(), 1);
    }
    ledger.assert_balanced();
}

/// Reading looks for none any more, but not before those are read that were
/// there already.
#[test]
fn descriptors_sent_before_they_were_refused_are_delivered() {
    let ledger = DescriptorLedger::open();
    {
        let record = Record::default();
        let mut reactor = Reactor::new().unwrap();
        let (handle, peer) = adopt(&mut reactor, Recorder::new(&record));
        send_message(&peer, b"plain", &[]);
        send_message(&peer, b"x", &[file()]);
        send_message(&peer, b"y", &[file(), file()]);
        if let Err(error) = transport(&mut reactor, handle).set_descriptors_accepted(false) {
            eprintln!("SKIPPED: this kernel cannot refuse descriptors: {error}");
            return;
        }
        run_until(&mut reactor, |_| record.data() == b"plainxy");
        assert_eq!(record.take_descriptors().len(), 3);
        // Several times each way, each with a read that finds nothing more.
        for round in 1..4 {
            send_message(&peer, b"z", &[]);
            run_until(&mut reactor, |_| record.data().len() == 7 + 2 * round - 1);
            let it = transport(&mut reactor, handle);
            it.set_descriptors_accepted(true).unwrap();
            send_message(&peer, b"a", &[file()]);
            run_until(&mut reactor, |_| record.data().len() == 7 + 2 * round);
            assert_eq!(record.take_descriptors().len(), 1);
            let it = transport(&mut reactor, handle);
            it.set_descriptors_accepted(false).unwrap();
        }
    }
    ledger.assert_balanced();
}

#[test]
fn listener_that_refuses_descriptors_does_so_before_it_accepts() {
    let ledger = DescriptorLedger::open();
    {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let record = Record::default();
        let mut reactor = Reactor::new().unwrap();
        let recorder = Recorder::new(&record);
        let listening = reactor.listen(
            Unix::at(path.as_path()).accepts_descriptors(false),
            move |_: &Address| recorder.clone(),
        );
        if let Err(error) = listening {
            eprintln!("SKIPPED: this kernel cannot refuse descriptors: {error}");
            return;
        }
        let peer = std::os::unix::net::UnixStream::connect(&path).unwrap();
        let passed = file();
        for accepted in [false, true] {
            let error = send(&peer, b"x", &[passed.as_fd()]).unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
            send_message(&peer, b"plain", &[]);
            assert!(accepted || record.summary().is_empty());
            run_until_quiet(&mut reactor);
        }
        assert_eq!(record.data(), b"plainplain");
    }
    ledger.assert_balanced();
}

/// S-16.
#[test]
fn sending_to_a_peer_that_refuses_ends_the_connection_and_keeps_count() {
    let ledger = DescriptorLedger::open();
    {
        let seen = Seen::default();
        let mut reactor = Reactor::new().unwrap();
        let (ours, theirs) = crate::support::socketpair();
        let refusing = reactor
            .adopt_unix_stream(theirs.into(), Recorder::default())
            .unwrap();
        if let Err(error) = transport(&mut reactor, refusing).set_descriptors_accepted(false) {
            eprintln!("SKIPPED: this kernel cannot refuse descriptors: {error}");
            return;
        }
        let sender = reactor
            .adopt_unix_stream(ours.into(), OneByOne::new(&seen, |_, _| Ok(())))
            .unwrap();
        let passed = file();
        let expected = identity(&passed);
        let it = transport(&mut reactor, sender);
        it.send_file_descriptor(passed.try_clone().unwrap().into())
            .unwrap();
        it.write(b"x");
        run_until(&mut reactor, |_| seen.has("lost"));
        assert_eq!(seen.all(), ["lost connection lost; 1 unsent"]);
        assert_eq!(identity(&passed), expected);
    }
    ledger.assert_balanced();
}

#[test]
fn pause_inside_the_callback_holds_from_the_next_read_on() {
    let ledger = DescriptorLedger::open();
    {
        let seen = Seen::default();
        let mut reactor = Reactor::new().unwrap();
        let (handle, peer) = adopt(
            &mut reactor,
            OneByOne::new(&seen, |cx, _| {
                cx.transport.pause_producing();
                Ok(())
            }),
        );
        send_message(&peer, b"one", &files(2).0);
        send_message(&peer, b"two", &files(1).0);
        run_until_quiet(&mut reactor);
        assert_eq!(seen.all(), ["descriptor", "descriptor", "data one"]);
        transport(&mut reactor, handle).resume_producing();
        run_until_quiet(&mut reactor);
        assert_eq!(seen.all()[3..], ["descriptor", "data two"]);
    }
    ledger.assert_balanced();
}

/// S-28, M-08.
#[test]
fn descriptors_of_a_peer_that_is_gone_are_read_although_a_send_fails() {
    let ledger = DescriptorLedger::open();
    {
        let record = Record::default();
        let mut reactor = Reactor::new().unwrap();
        let (handle, peer) = adopt(&mut reactor, Recorder::new(&record));
        let mut expected = Vec::new();
        for _ in 0..20 {
            let (sent, identities) = files(2);
            send_message(&peer, b"x", &sent);
            expected.extend(identities);
        }
        drop(peer);
        let it = transport(&mut reactor, handle);
        it.send_file_descriptor(file().into()).unwrap();
        it.write(b"too late");
        run_until(&mut reactor, |_| record.is_lost());
        assert_eq!(record.data(), [b'x'; 20]);
        assert_eq!(identities(&record.take_descriptors()), expected);
    }
    ledger.assert_balanced();
}

/// What a test does to a transport, whichever it is.
type Change = fn(&mut dyn Transport);

/// W-28: they wait in the kernel, and the pause is no reason to lose them.
#[test]
fn descriptors_of_a_peer_that_is_gone_wait_for_a_reader_although_a_send_fails() {
    let ways: [(Change, Change); 2] = [
        (|it| it.pause_producing(), |it| it.resume_producing()),
        (|it| it.hold_reading(), |it| it.release_reading()),
    ];
    for (begin, end) in ways {
        let ledger = DescriptorLedger::open();
        {
            let record = Record::default();
            let mut reactor = Reactor::new().unwrap();
            let (handle, peer) = adopt(&mut reactor, Recorder::new(&record));
            begin(transport(&mut reactor, handle).as_dyn());
            let mut expected = Vec::new();
            for _ in 0..20 {
                let (sent, identities) = files(2);
                send_message(&peer, b"x", &sent);
                expected.extend(identities);
            }
            drop(peer);
            let it = transport(&mut reactor, handle);
            it.send_file_descriptor(file().into()).unwrap();
            it.write(b"too late");
            run_until_quiet(&mut reactor);
            assert_eq!(record.summary(), ["made", "broken everything"]);
            let it = transport(&mut reactor, handle);
            // Nothing more leaves, be it bytes or descriptors.
            let refused = it.send_file_descriptor(file().into()).unwrap_err();
            assert_eq!(refused.kind, SendDescriptorErrorKind::NotConnected);
            drop(refused);
            end(it.as_dyn());
            run_until(&mut reactor, |_| record.is_lost());
            assert_eq!(record.data(), [b'x'; 20]);
            assert_eq!(identities(&record.take_descriptors()), expected);
        }
        ledger.assert_balanced();
    }
}

/// S-26, S-27, S-32.
#[test]
fn credentials_beside_the_bytes_disturb_nothing() {
    let ledger = DescriptorLedger::open();
    {
        let record = Record::default();
        let mut reactor = Reactor::new().unwrap();
        let (ours, peer) = crate::support::socketpair();
        // As whoever made the socket may have asked for.
        rustix::net::sockopt::set_socket_passcred(&ours, true).unwrap();
        reactor
            .adopt_unix_stream(ours.into(), Recorder::new(&record))
            .unwrap();
        let (sent, expected) = files(253);
        send_message(&peer, b"plain", &[]);
        send_message(&peer, b"passed", &sent);
        send_message(&peer, b"more", &[]);
        run_until_quiet(&mut reactor);
        assert_eq!(record.data(), b"plainpassedmore");
        assert_eq!(identities(&record.take_descriptors()), expected);
        drop(peer);
        run_until(&mut reactor, |_| record.is_lost());
        assert_eq!(record.summary().last().unwrap(), "lost closed cleanly");
    }
    ledger.assert_balanced();
}
