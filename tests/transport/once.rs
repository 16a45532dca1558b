//! One connection and no more.

use std::cell::RefCell;
use std::io::Read as _;
use std::os::unix::net::UnixStream;
use std::rc::Rc;

use bowline::{
    Address, CloseReason, ConnectError, Context, Once, Protocol, Reactor, Tcp, Transport,
    Transports, Unix,
};

use crate::support::{DescriptorLedger, run_until};

type Notes = Rc<RefCell<Vec<String>>>;

struct Noting(Notes);

impl<T: Transport> Protocol<T> for Noting {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        self.0.borrow_mut().push("made".into());
        cx.transport.write(b"hello");
    }

    fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {}

    fn connection_lost(&mut self, _: &mut Context<'_, T>, reason: &CloseReason) {
        self.0.borrow_mut().push(reason.to_string());
    }
}

#[test]
fn exactly_one_is_accepted_and_whoever_waits_behind_is_closed() {
    let _ledger = DescriptorLedger::open();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let mut reactor = Reactor::new().unwrap();
    let notes = Notes::default();
    let once = Once::new(Noting(Rc::clone(&notes)));
    let listener = reactor.listen(Unix::at(path.clone()), once).unwrap();
    let mut clients: Vec<_> = (0..5)
        .map(|_| UnixStream::connect(&path).unwrap())
        .collect();
    run_until(&mut reactor, |reactor| {
        reactor.get(listener).is_none() && !notes.borrow().is_empty()
    });
    assert!(!path.exists());
    let mut word = [0; 5];
    clients[0].read_exact(&mut word).unwrap();
    assert_eq!(&word, b"hello");
    for client in &mut clients[1..] {
        let end = client.read(&mut word);
        assert!(end.is_err() || end.unwrap() == 0);
    }
    assert_eq!(*notes.borrow(), ["made"]);
    drop(clients);
    run_until(&mut reactor, |_| notes.borrow().len() == 2);
}

#[test]
fn one_connection_is_made_with_this_protocol() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let (client, server) = (Notes::default(), Notes::default());
    let once = Once::new(Noting(Rc::clone(&server)));
    let listener = reactor
        .listen(Tcp::at(([127, 0, 0, 1], 0).into()), once)
        .unwrap();
    let Address::Inet(address) = reactor.get(listener).unwrap().address() else {
        unreachable!("it is of TCP");
    };
    let once = Once::new(Noting(Rc::clone(&client)))
        .on_failure(|_, _, error| unreachable!("it was made: {error}"));
    let connector = reactor.connect(Tcp::to(address), once).unwrap();
    run_until(&mut reactor, |_| {
        !client.borrow().is_empty() && !server.borrow().is_empty()
    });
    // Another attempt has no protocol left.
    reactor.get(connector).unwrap().connect();
    run_until(&mut reactor, |_| client.borrow().len() == 1);
}

#[test]
fn an_attempt_that_fails_gives_its_protocol_back() {
    let _ledger = DescriptorLedger::open();
    let directory = tempfile::tempdir().unwrap();
    let mut reactor = Reactor::new().unwrap();
    let notes = Notes::default();
    let failed = Rc::clone(&notes);
    let once = Once::new(Noting(Rc::clone(&notes))).on_failure(
        move |cx, protocol, error: &ConnectError| {
            assert!(cx.connector().is_some());
            assert_eq!(Rc::strong_count(&protocol.0), 3);
            failed.borrow_mut().push(error.to_string());
        },
    );
    let nobody = directory.path().join("nobody");
    reactor.connect(Unix::to(nobody.clone()), once).unwrap();
    run_until(&mut reactor, |_| !notes.borrow().is_empty());
    // Nobody has to be told.
    let once = Once::new(Noting(Rc::clone(&notes)));
    let connector = reactor.connect(Unix::to(nobody), once).unwrap();
    run_until(&mut reactor, |reactor| reactor.get(connector).is_none());
    assert_eq!(notes.borrow().len(), 1);
    assert_eq!(Rc::strong_count(&notes), 1);
}
