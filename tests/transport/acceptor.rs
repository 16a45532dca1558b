//! Accepted sockets as they are, passed on, and taken back from a dead worker.

use std::cell::RefCell;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream as StdTcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream as StdUnixStream};
use std::rc::Rc;

use bowline::error::AdoptErrorKind;
use bowline::{
    Address, BuildContext, CloseReason, Context, DescriptorLimits, PassedDescriptor, Protocol,
    Reactor, Transports, UnixTransport,
};
use bowline::{Tcp, Unix};

use crate::support::{DescriptorLedger, Record, Recorder, run_until, socketpair};

#[test]
fn acceptor_is_given_the_socket_unread() {
    let ledger = DescriptorLedger::open();
    {
        let mut reactor = Reactor::new().expect("a reactor");
        let accepted = Rc::new(RefCell::new(Vec::new()));
        let listener = reactor
            .accept(Tcp::at(([127, 0, 0, 1], 0).into()), {
                let accepted = Rc::clone(&accepted);
                move |_: &mut BuildContext<'_>, socket: OwnedFd, peer: &Address| {
                    accepted.borrow_mut().push((socket, peer.clone()));
                }
            })
            .expect("listens");
        let address = reactor.get(listener).expect("there").address();
        let mut client = StdTcpStream::connect(address.as_inet().expect("tcp")).expect("connects");
        client.write_all(b"hello").expect("writes");
        run_until(&mut reactor, |_| !accepted.borrow().is_empty());

        let (socket, peer) = accepted.borrow_mut().pop().expect("one");
        assert_eq!(peer.as_inet(), client.local_addr().ok());
        let mut socket = StdTcpStream::from(socket);
        socket.set_nonblocking(false).expect("a socket");
        let mut greeting = [0; 5];
        socket.read_exact(&mut greeting).expect("reads");
        assert_eq!(&greeting, b"hello");
    }
    ledger.assert_balanced();
}

#[test]
fn acceptor_can_pause_its_listener() {
    let _alone = DescriptorLedger::open();
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("socket");
    let mut reactor = Reactor::new().expect("a reactor");
    let accepted = Rc::new(RefCell::new(0));
    let listener = reactor
        .accept(Unix::at(path.as_path()), {
            let accepted = Rc::clone(&accepted);
            move |cx: &mut BuildContext<'_>, _: OwnedFd, _: &Address| {
                *accepted.borrow_mut() += 1;
                cx.listener().expect("its own").pause_accepting();
            }
        })
        .expect("listens");
    let clients: Vec<_> = (0..3)
        .map(|_| StdUnixStream::connect(&path).expect("connects"))
        .collect();
    for expected in 1..=clients.len() {
        run_until(&mut reactor, |_| *accepted.borrow() == expected);
        crate::support::run_until_quiet(&mut reactor);
        assert_eq!(*accepted.borrow(), expected);
        reactor.get(listener).expect("there").resume_accepting();
    }
}

#[test]
fn acceptor_on_a_listener_from_elsewhere() {
    let directory = tempfile::tempdir().expect("a directory");
    let ledger = DescriptorLedger::open();
    {
        let mut reactor = Reactor::new().expect("a reactor");
        let count = Rc::new(RefCell::new(0));
        let acceptor = || {
            let count = Rc::clone(&count);
            move |_: &mut BuildContext<'_>, _: OwnedFd, _: &Address| *count.borrow_mut() += 1
        };
        let tcp = TcpListener::bind("127.0.0.1:0").expect("listens");
        let address = tcp.local_addr().expect("bound");
        let path = directory.path().join("socket");
        let unix = UnixListener::bind(&path).expect("listens");
        reactor
            .accept_adopted(tcp.into(), acceptor())
            .expect("a TCP listener");
        reactor
            .accept_adopted(unix.into(), acceptor())
            .expect("a UNIX listener");
        let _tcp = StdTcpStream::connect(address).expect("connects");
        let _unix = StdUnixStream::connect(&path).expect("connects");
        run_until(&mut reactor, |_| *count.borrow() == 2);

        let (no_listener, _peer) = socketpair();
        let refused = reactor.accept_adopted(no_listener.into(), acceptor());
        let refused = refused.expect_err("it does not listen");
        assert!(matches!(refused.kind, AdoptErrorKind::NotListening));
        let file = File::open("/dev/null").expect("it is there");
        let refused = reactor.accept_adopted(file.into(), acceptor());
        let refused = refused.expect_err("it is no socket");
        assert!(matches!(refused.kind, AdoptErrorKind::NotASocket));
        assert!(path.exists(), "not ours to remove");
    }
    ledger.assert_balanced();
}

#[test]
fn panic_of_an_acceptor_costs_one_connection() {
    let _alone = DescriptorLedger::open();
    let mut reactor = Reactor::new().expect("a reactor");
    let accepted = Rc::new(RefCell::new(Vec::new()));
    let listener = reactor
        .accept(Tcp::at(([127, 0, 0, 1], 0).into()), {
            let accepted = Rc::clone(&accepted);
            let mut is_first = true;
            move |_: &mut BuildContext<'_>, socket: OwnedFd, _: &Address| {
                assert!(!std::mem::take(&mut is_first), "meant to panic");
                accepted.borrow_mut().push(socket);
            }
        })
        .expect("listens");
    let address = reactor.get(listener).expect("there").address();
    let address = address.as_inet().expect("tcp");
    let mut first = StdTcpStream::connect(address).expect("connects");
    let _second = StdTcpStream::connect(address).expect("connects");
    run_until(&mut reactor, |_| accepted.borrow().len() == 1);
    assert_eq!(first.read(&mut [0]).expect("closed in order"), 0);
}

/// Passes on what it is given, and keeps what it could not.
struct Passer {
    to_send: Vec<OwnedFd>,
    reclaimed: Rc<RefCell<Vec<PassedDescriptor>>>,
    record: Record,
}

impl<T: UnixTransport> Protocol<T> for Passer {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        cx.transport
            .set_descriptor_limits(DescriptorLimits::default().per_message(1));
        for fd in self.to_send.drain(..) {
            cx.transport
                .send_file_descriptor(fd.into())
                .expect("there is room");
        }
        // One has a byte to travel with, two have none.
        cx.transport.write(b"c");
        assert!(cx.transport.reclaim_descriptors().is_empty());
    }

    fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {}

    fn connection_lost(&mut self, cx: &mut Context<'_, T>, reason: &CloseReason) {
        assert_eq!(cx.transport.unsent_descriptors(), 2);
        self.reclaimed
            .borrow_mut()
            .extend(cx.transport.reclaim_descriptors());
        assert_eq!(cx.transport.unsent_descriptors(), 2, "none left since");
        assert!(cx.transport.reclaim_descriptors().is_empty());
        self.record
            .push(crate::support::Event::Lost(reason.to_string()));
    }
}

#[test]
fn descriptors_that_never_left_can_be_reclaimed_at_the_end() {
    let ledger = DescriptorLedger::open();
    {
        let mut reactor = Reactor::new().expect("a reactor");
        let (ours, theirs) = socketpair();
        let reclaimed = Rc::new(RefCell::new(Vec::new()));
        let record = Record::default();
        let any_file = || File::open("/dev/null").expect("it is there").into();
        let to_send = std::iter::repeat_with(any_file).take(3).collect();
        reactor
            .adopt_unix_stream(
                ours.into(),
                Passer {
                    to_send,
                    reclaimed: Rc::clone(&reclaimed),
                    record: record.clone(),
                },
            )
            .expect("adopted");
        let receiver = Record::default();
        reactor
            .adopt_unix_stream(theirs.into(), Recorder::new(&receiver))
            .expect("adopted");
        run_until(&mut reactor, |_| receiver.data() == b"c");
        let worker = receiver.handle(0);
        reactor.get(worker).expect("there").abort_connection();
        run_until(&mut reactor, |_| record.is_lost());
        assert_eq!(receiver.take_descriptors().len(), 1);
        assert_eq!(reclaimed.borrow().len(), 2);
        assert_eq!(reactor.descriptor_counts().unsent, 0, "none was closed");
    }
    ledger.assert_balanced();
}
