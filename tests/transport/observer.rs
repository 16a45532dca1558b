//! Who is told what is written.

use std::cell::RefCell;
use std::rc::Rc;

use bowline::{Context, Protocol, Reactor, Transport, Transports, WriteObserver, WriteStatus};

use crate::support::{DescriptorLedger, run_until_quiet, socketpair};

#[derive(Debug, Default)]
struct Seen(RefCell<Vec<u8>>);

impl WriteObserver for Seen {
    fn written(&self, data: &[u8]) {
        assert!(!data.is_empty());
        self.0.borrow_mut().extend_from_slice(data);
    }
}

struct Writes(Rc<Seen>);

impl<T: Transport> Protocol<T> for Writes {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        cx.transport.write(b"before ");
        cx.transport.set_write_observer(Some(self.0.clone()));
        cx.transport.write(b"one ");
        cx.transport.write(b"");
        cx.transport.write_sequence(&[b"two ", b"", b"three "]);
        cx.transport.write_owned(b"four ".to_vec());
    }

    fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {}
}

/// Every way to write, by whomever; what was refused was not written.
#[test]
fn an_observer_is_told_of_all_that_is_taken_in_order() {
    let ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let (ours, theirs) = socketpair();
    let seen = Rc::new(Seen::default());
    let handle = reactor
        .adopt_unix_stream(ours.into(), Writes(seen.clone()))
        .unwrap();
    run_until_quiet(&mut reactor);
    reactor.get(handle).unwrap().write(b"five ");
    reactor.get(handle).unwrap().set_write_observer(None);
    reactor.get(handle).unwrap().write(b"unseen ");
    let transport = reactor.get(handle).unwrap();
    transport.set_write_observer(Some(seen.clone()));
    transport.lose_write_connection();
    assert_eq!(transport.write(b"refused"), WriteStatus::Refused);
    let bytes = seen.0.borrow().clone();
    assert_eq!(
        String::from_utf8(bytes).unwrap(),
        "one two three four five "
    );
    drop((reactor, theirs));
    ledger.assert_balanced();
}
