//! What only UNIX datagrams have: descriptors, who sends, files, and peers that have no
//! room.

use std::cell::Cell;
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixDatagram as StdUnixDatagram;
use std::rc::Rc;
use std::time::Instant;

use bowline::error::{ListenStep, SendDescriptorErrorKind, SendRefusal};
use bowline::process::is_passing_shortage;
use bowline::{
    Address, PassedDescriptor, QueueLimits, Reactor, SendStatus, StaleSocket, Transports,
    UnixAddress, UnixDatagram,
};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use crate::harness::{Kind, Plain, Script, get, of_unix, unix_options};
use crate::support::{DEADLINE, run_until, run_until_quiet};

fn pipe() -> (OwnedFd, OwnedFd) {
    let (reading, writing) = std::io::pipe().unwrap();
    (reading.into(), writing.into())
}

/// Whether nobody has the writing end any more.
fn is_closed(reading: OwnedFd) -> bool {
    rustix::io::ioctl_fionbio(&reading, true).unwrap();
    File::from(reading)
        .read(&mut [0])
        .is_ok_and(|count| count == 0)
}

fn send_with(socket: &Plain, data: &[u8], descriptors: &[OwnedFd]) {
    let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&borrowed)));
    let data = [std::io::IoSlice::new(data)];
    rustix::net::sendmsg(socket, &data, &mut control, SendFlags::empty()).unwrap();
}

#[test]
fn descriptors_come_with_the_datagram_they_were_sent_with() {
    let place = Kind::UnixAbstract.place();
    let mut reactor = Reactor::new().unwrap();
    let script = Script::new();
    let notes = script.notes();
    let (_, here) = place.listen(&mut reactor, script);
    let peer = place.plain();
    peer.connect(&here);
    for count in [1, 0, 3, 253] {
        let ends: Vec<_> = (0..count).map(|_| pipe()).collect();
        let (reading, writing): (Vec<_>, Vec<_>) = ends.into_iter().unzip();
        // No bytes and descriptors are a datagram too.
        let data = if count == 3 { &b""[..] } else { b"data" };
        if count == 0 {
            peer.send(data, &here);
        } else {
            send_with(&peer, data, &writing);
        }
        drop(writing);
        let wanted = notes.count() + 1;
        run_until(&mut reactor, |_| notes.count() == wanted);
        let received = notes.change(|told| told.received.pop().unwrap());
        assert_eq!(
            (received.data, received.descriptors.len()),
            (data.to_vec(), count)
        );
        assert!(!received.lost_descriptors);
        // They are the very ones, in order.
        for (reading, received) in reading.into_iter().zip(received.descriptors) {
            rustix::io::write(&received, b"x").unwrap();
            drop(received);
            let mut got = String::new();
            File::from(reading).read_to_string(&mut got).unwrap();
            assert_eq!(got, "x");
        }
    }
    let counts = reactor.descriptor_counts();
    assert_eq!((counts.received, counts.unclaimed), (257, 0));
}

#[test]
fn descriptors_that_nobody_takes_are_closed_and_counted() {
    let place = Kind::UnixAbstract.place();
    let mut reactor = Reactor::new().unwrap();
    let script = Script::new().leave_descriptors();
    let notes = script.notes();
    let (_, here) = place.listen(&mut reactor, script);
    let peer = place.plain();
    peer.connect(&here);
    let (reading, writing) = pipe();
    send_with(&peer, b"unwanted", &[writing]);
    run_until(&mut reactor, |_| notes.count() == 1);
    assert!(is_closed(reading));
    let counts = reactor.descriptor_counts();
    assert_eq!((counts.received, counts.unclaimed), (1, 1));
    // A callback that panics has taken none.
    let script = Script::new()
        .leave_descriptors()
        .on_datagram(|_, _, _| panic!("as it should"));
    let (_, there) = place.listen(&mut reactor, script);
    peer.connect(&there);
    let (reading, writing) = pipe();
    send_with(&peer, b"unwanted", &[writing]);
    run_until_quiet(&mut reactor);
    assert!(is_closed(reading));
    assert_eq!(reactor.descriptor_counts().unclaimed, 2);
}

#[test]
fn descriptors_leave_with_their_own_datagram() {
    let place = Kind::UnixAbstract.place();
    let mut reactor = Reactor::new().unwrap();
    let receiver = Script::new();
    let notes = receiver.notes();
    let (_, there) = place.listen(&mut reactor, receiver);
    let sender = reactor
        .listen(UnixDatagram::at(UnixAddress::Unnamed), Script::new())
        .unwrap();
    let mut readings = Vec::new();
    let mut passed = |count: usize| -> Vec<PassedDescriptor> {
        let ends = (0..count).map(|_| pipe());
        ends.map(|(reading, writing)| {
            readings.push(reading);
            writing.into()
        })
        .collect()
    };
    let all = [(&b"none"[..], 0), (b"two", 2), (b"", 1), (b"many", 253)];
    for (data, count) in all {
        let descriptors = passed(count);
        let transport = unix_options(&mut reactor, sender);
        let status = transport.send_with_descriptors(data, Some(there.as_ref()), descriptors);
        assert_eq!(status.unwrap(), SendStatus::Ready);
    }
    assert_eq!(unix_options(&mut reactor, sender).unsent_descriptors(), 256);
    let too_many = passed(254);
    let transport = unix_options(&mut reactor, sender);
    let error = transport.send_with_descriptors(b"a", Some(there.as_ref()), too_many);
    let error = error.unwrap_err();
    assert_eq!(error.kind, SendDescriptorErrorKind::TooManyForOneMessage);
    assert_eq!(error.descriptors.len(), 254, "they come back");
    let error = transport.send_with_descriptors(b"a", None, Vec::new());
    assert_eq!(
        error.unwrap_err().kind,
        SendDescriptorErrorKind::Datagram(SendRefusal::NotConnected)
    );
    run_until(&mut reactor, |_| notes.count() == all.len());
    notes.told(|told| {
        for (received, (data, count)) in told.received.iter().zip(all) {
            assert_eq!(
                (&received.data[..], received.descriptors.len()),
                (data, count)
            );
        }
    });
    assert_eq!(reactor.descriptor_counts().passed, 256);
    assert_eq!(unix_options(&mut reactor, sender).unsent_descriptors(), 0);
}

#[test]
fn descriptors_that_never_left_are_closed_with_the_socket_or_come_back() {
    let place = Kind::UnixPath.place();
    let mut reactor = Reactor::new().unwrap();
    let script = Script::new();
    let notes = script.notes();
    let sender = place.address();
    let sender = reactor
        .listen(UnixDatagram::at(sender.as_unix().unwrap().clone()), script)
        .unwrap();
    let nowhere = place.address();
    let (_reading, writing) = pipe();
    unix_options(&mut reactor, sender)
        .send_with_descriptors(b"lost", Some(nowhere.as_ref()), vec![writing.into()])
        .unwrap();
    run_until(&mut reactor, |_| notes.told(|told| told.failed.len()) == 1);
    notes.told(|told| assert_eq!(told.failed[0].3, 1, "it came back"));
    // Waiting for a peer that does not read.
    let (full, reading) = fill(&place, &mut reactor, sender);
    unix_options(&mut reactor, sender).abort();
    run_until(&mut reactor, |_| notes.is_stopped());
    assert!(is_closed(reading));
    drop(full);
    assert_eq!(reactor.descriptor_counts().unsent, 2);
}

/// A peer whose queue is full, with a descriptor that waits for room there.
fn fill(
    place: &crate::harness::Place,
    reactor: &mut Reactor,
    sender: bowline::UnixDatagramHandle,
) -> (Plain, OwnedFd) {
    let peer = place.plain();
    let to = peer.address();
    let (reading, writing) = pipe();
    let transport = unix_options(reactor, sender);
    for _ in 0..100 {
        transport.send_to(b"fill", to.as_ref());
    }
    transport
        .send_with_descriptors(b"waits", Some(to.as_ref()), vec![writing.into()])
        .unwrap();
    run_until_quiet(reactor);
    let transport = unix_options(reactor, sender);
    assert!(
        transport.unsent_datagrams() > 0,
        "the peer has room for all"
    );
    (peer, reading)
}

/// Contract W-55, D-10: nothing is lost, and a peer that does not read is waited for by
/// nobody else.
#[test]
fn a_peer_that_does_not_read_holds_up_nobody_else() {
    for kind in [Kind::UnixPath, Kind::UnixAbstract] {
        let place = kind.place();
        let mut reactor = Reactor::new().unwrap();
        let script = Script::echo();
        let notes = script.notes();
        let (handle, here) = place.listen(&mut reactor, script);
        let (lazy, honest) = (place.plain(), place.plain());
        // Answers for it, until there is no more room.
        let mut taken = 0_u32;
        let mut refused = 0;
        while refused < 10 {
            let status =
                get(&mut reactor, handle).send_to(&taken.to_ne_bytes(), lazy.address().as_ref());
            match status {
                SendStatus::Refused(why) => {
                    assert_eq!(why, SendRefusal::QueueFull);
                    refused += 1;
                }
                SendStatus::Ready | SendStatus::Full => taken += 1,
            }
            assert!(taken < 5_000, "it is held for ever");
            if taken.is_multiple_of(10) {
                run_until_quiet(&mut reactor);
            }
        }
        let waiting = get(&mut reactor, handle).unsent_datagrams();
        let share = QueueLimits::default().most / 8;
        assert_eq!(waiting, share, "no more than its share");
        // Others are served meanwhile, at once.
        let began = Instant::now();
        for number in 0..100_u8 {
            honest.send(&[number], &here);
            let mut answer = None;
            run_until(&mut reactor, |_| {
                answer = answer.take().or_else(|| honest.try_receive());
                answer.is_some()
            });
            assert_eq!(answer.unwrap().0, [number]);
        }
        assert!(began.elapsed() < DEADLINE / 2, "{:?}", began.elapsed());
        assert_eq!(notes.count(), 100);
        // All that was taken arrives once it is read, in order.
        let mut arrived = Vec::new();
        run_until(&mut reactor, |_| {
            arrived.extend(lazy.receive_all());
            arrived.len() as u32 >= taken
        });
        let expected: Vec<_> = (0..taken)
            .map(|number| number.to_ne_bytes().to_vec())
            .collect();
        assert_eq!(arrived, expected);
        run_until(&mut reactor, |_| notes.told(|told| told.resumed) >= 1);
        notes.told(|told| assert!(told.failed.is_empty()));
    }
}

#[test]
fn a_connected_socket_waits_for_room_by_an_event() {
    let place = Kind::UnixPath.place();
    let mut reactor = Reactor::new().unwrap();
    let peer = place.plain();
    let handle = place
        .connect(&mut reactor, &peer.address(), Script::new())
        .unwrap();
    for number in 0..200_u8 {
        assert!(get(&mut reactor, handle).send(&[number]).is_taken());
    }
    run_until_quiet(&mut reactor);
    assert!(get(&mut reactor, handle).unsent_datagrams() > 0);
    assert!(reactor.next_deadline().is_none(), "it waits by a timer");
    let mut arrived = Vec::new();
    run_until(&mut reactor, |_| {
        arrived.extend(peer.try_receive().map(|it| it.0));
        arrived.len() == 200
    });
    let expected: Vec<_> = (0..200_u8).map(|number| vec![number]).collect();
    assert_eq!(arrived, expected);
}

/// Contract W-15.
#[test]
fn who_sends_is_vouched_for_by_the_kernel() {
    let place = Kind::UnixPath.place();
    let mut reactor = Reactor::new().unwrap();
    let script = Script::new();
    let notes = script.notes();
    let address = place.address();
    let endpoint = UnixDatagram::at(address.as_unix().unwrap().clone())
        .credentials(true)
        .pidfds(true);
    let handle = reactor.listen(endpoint, script).unwrap();
    let here = unix_options(&mut reactor, handle).host();
    let peer = place.plain();
    peer.send(b"me", &here);
    peer.send(b"", &here);
    run_until(&mut reactor, |_| notes.count() == 2);
    notes.told(|told| {
        for received in &told.received {
            let credentials = received.credentials.unwrap();
            assert_eq!(credentials.pid, Some(std::process::id()));
            let own = rustix::process::geteuid().as_raw();
            assert_eq!(credentials.uid, own);
            let pidfd = received.pidfd.as_ref().unwrap();
            let info = fs::read_to_string(format!(
                "/proc/thread-self/fdinfo/{}",
                std::os::fd::AsRawFd::as_raw_fd(pidfd)
            ));
            let own = format!("Pid:\t{}", std::process::id());
            assert!(info.unwrap().contains(&own));
            assert!(received.descriptors.is_empty());
        }
    });
    // Nobody asks by default.
    let script = Script::new();
    let notes = script.notes();
    let (_, here) = place.listen(&mut reactor, script);
    peer.send(b"me", &here);
    run_until(&mut reactor, |_| notes.count() == 1);
    notes.told(|told| {
        assert_eq!(told.received[0].credentials, None);
        assert!(told.received[0].pidfd.is_none());
    });
}

#[test]
fn the_kernel_refuses_descriptors_where_it_is_told_to() {
    let place = Kind::UnixAbstract.place();
    let mut reactor = Reactor::new().unwrap();
    let address = place.address();
    let script = Script::new();
    let endpoint = UnixDatagram::at(address.as_unix().unwrap().clone()).accepts_descriptors(false);
    let Ok(handle) = reactor.listen(endpoint, script) else {
        eprintln!("SKIPPED: this kernel refuses no descriptors");
        return;
    };
    let peer = StdUnixDatagram::unbound().unwrap();
    let peer = Plain::Unix(peer);
    peer.connect(&address);
    let (reading, writing) = pipe();
    let borrowed = [writing.as_fd()];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&borrowed)));
    let data = [std::io::IoSlice::new(b"a")];
    let sent = rustix::net::sendmsg(&peer, &data, &mut control, SendFlags::empty());
    assert_eq!(sent, Err(rustix::io::Errno::PERM));
    unix_options(&mut reactor, handle)
        .set_descriptors_accepted(true)
        .unwrap();
    send_with(&peer, b"a", &[writing]);
    drop(reading);
}

/// Contract D-20, D-21, W-46, W-59.
#[test]
fn the_file_has_the_permissions_asked_for_and_goes_with_the_socket() {
    let place = Kind::UnixPath.place();
    let mut reactor = Reactor::new().unwrap();
    for mode in [0o600, 0o666, 0o777] {
        let address = place.address();
        let path = address.as_unix().unwrap().as_path().unwrap().to_owned();
        let script = Script::new();
        let notes = script.notes();
        let endpoint = UnixDatagram::at(path.clone()).mode(mode);
        let handle = reactor.listen(endpoint, script).unwrap();
        let metadata = fs::metadata(&path).unwrap();
        assert!(metadata.file_type().is_socket());
        assert_eq!(metadata.permissions().mode() & 0o777, mode);
        unix_options(&mut reactor, handle).stop_listening();
        run_until(&mut reactor, |_| notes.is_stopped());
        assert!(!path.exists());
    }
}

/// Contract D-21, W-59.
#[test]
fn the_file_of_a_dead_socket_is_taken_over_and_that_of_a_live_one_is_not() {
    let place = Kind::UnixPath.place();
    let mut reactor = Reactor::new().unwrap();
    let address = place.address();
    let path = address.as_unix().unwrap().as_path().unwrap().to_owned();
    drop(StdUnixDatagram::bind(&path).unwrap());
    assert!(path.exists(), "std leaves it");
    let endpoint = UnixDatagram::at(path.clone()).stale(StaleSocket::Refuse);
    let error = reactor.listen(endpoint, Script::new()).unwrap_err();
    assert_eq!(error.error.kind(), ErrorKind::AddrInUse);
    let script = Script::new();
    let notes = script.notes();
    let handle = reactor
        .listen(UnixDatagram::at(path.clone()), script)
        .unwrap();
    let error = reactor
        .listen(UnixDatagram::at(path.clone()), Script::new())
        .unwrap_err();
    assert_eq!(
        (error.step, error.error.kind()),
        (ListenStep::Bind, ErrorKind::AddrInUse)
    );
    let peer = place.plain();
    peer.send(b"still there", &address);
    run_until(&mut reactor, |_| notes.count() == 1);
    // One that another has put there meanwhile is left alone.
    fs::remove_file(&path).unwrap();
    let successor = StdUnixDatagram::bind(&path).unwrap();
    unix_options(&mut reactor, handle).stop_listening();
    run_until(&mut reactor, |_| notes.is_stopped());
    assert!(path.exists());
    drop(successor);
}

/// Contract D-22.
#[test]
fn a_peer_that_is_not_there_is_told_at_once_and_one_that_goes_is_told_later() {
    for kind in [Kind::UnixPath, Kind::UnixAbstract] {
        let place = kind.place();
        let mut reactor = Reactor::new().unwrap();
        let nobody = place.address();
        let error = place
            .connect(&mut reactor, &nobody, Script::new())
            .unwrap_err();
        assert_eq!((error.step, &error.address), (ListenStep::Connect, &nobody));
        assert_eq!(reactor.registered(), 0);
        let peer = place.plain();
        let script = Script::new();
        let notes = script.notes();
        let handle = place
            .connect(&mut reactor, &peer.address(), script)
            .unwrap();
        get(&mut reactor, handle).send(b"arrives");
        run_until_quiet(&mut reactor);
        drop(peer);
        get(&mut reactor, handle).send(b"does not");
        run_until(&mut reactor, |_| notes.told(|told| told.failed.len()) == 1);
        run_until(&mut reactor, |_| notes.told(|told| told.refused.len()) == 1);
        notes.told(|told| {
            let (data, to, error, _) = &told.failed[0];
            assert_eq!((&data[..], to), (&b"does not"[..], &None));
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
            assert_eq!(told.refused, [ErrorKind::ConnectionRefused]);
            assert!(told.stopped.is_empty(), "the socket stays");
        });
        // And talks with another.
        let next = place.plain();
        get(&mut reactor, handle)
            .connect(next.address().as_ref())
            .unwrap();
        get(&mut reactor, handle).send(b"hello");
        run_until(&mut reactor, |_| next.try_receive().is_some());
    }
}

/// Contract D-19.
#[test]
fn a_socket_without_a_name_sends_and_cannot_be_answered() {
    let place = Kind::UnixPath.place();
    let mut reactor = Reactor::new().unwrap();
    let answers = Rc::new(Cell::new(None));
    let answer = Rc::clone(&answers);
    let script = Script::new().on_datagram(move |transport, _, datagram| {
        answer.set(Some(transport.send_to(b"answer", datagram.from)));
    });
    let notes = script.notes();
    let (_, here) = place.listen(&mut reactor, script);
    let to = here.as_unix().unwrap().clone();
    let nameless = reactor
        .connect(UnixDatagram::to(to.clone()), Script::new())
        .unwrap();
    unix_options(&mut reactor, nameless).send(b"who?");
    run_until(&mut reactor, |_| notes.count() == 1);
    let from = notes.told(|told| told.received[0].from.clone());
    assert_eq!(from, Address::Unix(UnixAddress::Unnamed));
    let refused = SendStatus::Refused(SendRefusal::BadAddress);
    assert_eq!(answers.take(), Some(refused));
    // The kernel gives a name if it is asked to.
    let endpoint = UnixDatagram::to(to).bind_address(UnixAddress::Unnamed);
    let script = Script::new();
    let answered = script.notes();
    let named = reactor.connect(endpoint, script).unwrap();
    let handle = of_unix(&mut reactor, named);
    assert!(matches!(
        get(&mut reactor, handle).host(),
        Address::Unix(UnixAddress::Abstract(_))
    ));
    unix_options(&mut reactor, named).send(b"who?");
    run_until(&mut reactor, |_| answered.data() == [b"answer"]);
    // What cannot be a name is refused.
    let long = UnixAddress::Abstract(vec![1; 108]);
    let transport = get(&mut reactor, handle);
    assert_eq!(transport.send_to(b"a", (&long).into()), refused);
}

#[test]
fn a_long_datagram_needs_room_and_then_arrives_whole() {
    let place = Kind::UnixPath.place();
    let mut reactor = Reactor::new().unwrap();
    let script = Script::new();
    let notes = script.notes();
    let address = place.address();
    let endpoint = UnixDatagram::at(address.as_unix().unwrap().clone()).max_datagram(200_000);
    reactor.listen(endpoint, script).unwrap();
    let sender = reactor
        .listen(UnixDatagram::at(UnixAddress::Unnamed), Script::new())
        .unwrap();
    let data: Vec<u8> = (0..=255).cycle().take(150_000).collect();
    for _ in 0..6 {
        let transport = unix_options(&mut reactor, sender);
        assert!(transport.send_to(&data, address.as_ref()).is_taken());
    }
    run_until(&mut reactor, |_| notes.count() == 6);
    notes.told(|told| assert!(told.received.iter().all(|it| it.data == data)));
    let shortage = std::io::Error::from(ErrorKind::NotFound);
    assert!(!is_passing_shortage(&shortage));
}
