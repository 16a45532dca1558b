//! What asks for more of itself without end has its share of a turn: each such thing
//! stops by itself far beyond its budget, so that a budget that is gone is a number in
//! a failure, and not a test that hangs.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use bowline::{Context, Protocol, Reactor, Transport, Transports};

use crate::support::{DescriptorLedger, socketpair};

/// Where everything here stops by itself.
const FAR_TOO_OFTEN: u32 = 20_000;

/// Counts calls, and how many of them the busiest turn had.
#[derive(Clone, Default)]
struct Calls(Rc<Cell<u32>>);

impl Calls {
    /// Counts one; whether to go on.
    fn add(&self) -> bool {
        self.0.set(self.0.get() + 1);
        self.0.get() < FAR_TOO_OFTEN
    }

    fn most_in_a_turn(&self, reactor: &mut Reactor) -> u32 {
        let mut most = 0;
        for _ in 0..10 {
            let before = self.0.get();
            reactor.turn(Some(Duration::ZERO));
            most = most.max(self.0.get() - before);
        }
        assert!(self.0.get() > 10, "it was not called on and on");
        most
    }
}

/// What a protocol does again in each of its calls.
struct Endless {
    calls: Calls,
    pushes_back: bool,
}

impl<T: Transport> Protocol<T> for Endless {
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        if self.calls.add() {
            if self.pushes_back {
                cx.transport.push_back(data.to_vec());
            } else {
                cx.transport.pause_producing();
                cx.transport.resume_producing();
            }
        }
    }

    fn reading_resumed(&mut self, cx: &mut Context<'_, T>) {
        if self.calls.add() {
            cx.transport.pause_producing();
            cx.transport.resume_producing();
        }
    }
}

fn connected(calls: &Calls, pushes_back: bool) -> (Reactor, std::os::unix::net::UnixStream) {
    let mut reactor = Reactor::new().unwrap();
    let (ours, theirs) = socketpair();
    let protocol = Endless {
        calls: calls.clone(),
        pushes_back,
    };
    reactor.adopt_unix_stream(ours.into(), protocol).unwrap();
    reactor.turn(Some(Duration::ZERO));
    std::io::Write::write_all(&mut &theirs, b"once").unwrap();
    (reactor, theirs)
}

/// Each counts as a read of 8 KiB, of a budget of 256.
#[test]
fn what_is_pushed_back_again_and_again_is_read_as_often_as_the_budget_says() {
    let ledger = DescriptorLedger::open();
    {
        let calls = Calls::default();
        let (mut reactor, _peer) = connected(&calls, true);
        // And the read that it began with.
        let most = calls.most_in_a_turn(&mut reactor);
        assert!(most <= 33, "{most} calls in one turn");
        let budgets = reactor.transport_budgets();
        reactor.set_transport_budgets(budgets.read_bytes(3 * 8_192));
        let most = calls.most_in_a_turn(&mut reactor);
        assert_eq!(most, 3);
    }
    ledger.assert_balanced();
}

#[test]
fn notices_that_bring_the_next_are_as_many_as_the_budget_says() {
    let ledger = DescriptorLedger::open();
    {
        let calls = Calls::default();
        let (mut reactor, _peer) = connected(&calls, false);
        let budgets = reactor.transport_budgets();
        reactor.set_transport_budgets(budgets.notices(5));
        // And the read that it began with.
        let most = calls.most_in_a_turn(&mut reactor);
        assert!(most <= 6, "{most} calls in one turn");
    }
    ledger.assert_balanced();
}

#[test]
fn calls_wait_for_the_next_turn_beyond_their_budget() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    reactor.set_limits(reactor.limits().calls(3));
    let (soon, remote) = (Calls::default(), Calls::default());
    let thread = reactor.remote();
    for _ in 0..7 {
        let calls = soon.clone();
        reactor.call_soon(move |_| {
            calls.add();
        });
    }
    let counted = std::sync::Arc::new(std::sync::atomic::AtomicU32::new(0));
    for _ in 0..7 {
        let counted = std::sync::Arc::clone(&counted);
        thread
            .call_from_thread(move |_| {
                counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            })
            .unwrap();
    }
    for expected in [3, 6, 7, 7] {
        reactor.turn(Some(Duration::ZERO));
        remote
            .0
            .set(counted.load(std::sync::atomic::Ordering::Relaxed));
        assert_eq!((soon.0.get(), remote.0.get()), (expected, expected));
    }
}

#[test]
fn notifications_that_bring_the_next_wait_for_the_next_turn_beyond_their_budget() {
    fn again(reactor: &mut Reactor, calls: Calls) {
        reactor.defer(move |reactor| {
            if calls.add() {
                again(reactor, calls);
            }
        });
    }
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    reactor.set_limits(reactor.limits().notifications(4));
    let calls = Calls::default();
    again(&mut reactor, calls.clone());
    assert_eq!(calls.most_in_a_turn(&mut reactor), 4);
}
