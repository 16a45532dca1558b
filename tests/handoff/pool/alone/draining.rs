//! How a worker ends: asked to, by itself, or without its pool.

use std::cell::Cell;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::time::Duration;

use bowline::Reactor;
use bowline::handoff::channel::Role;
use bowline::handoff::pool::{
    FromWorker, Live, PassedConnection, ToWorker, Worker, WorkerRefusal, WorkerSettings,
};
use bowline::testing::ManualClock;

use super::super::raw::{Raw, dispatch, refused, tcp_pair};
use super::desk::{Desk, Told};
use super::{Staged, ms};
use crate::support::{DescriptorLedger, socketpair};

#[test]
fn a_worker_that_is_asked_to_end_serves_what_it_has_first() {
    let mut desk = Desk::new(WorkerSettings::default());
    // In one go: what was promised before is begun before.
    let (client, accepted) = socketpair();
    desk.pool
        .send(&dispatch(1, b""), &[accepted.as_fd()])
        .unwrap();
    drop(accepted);
    desk.drain(60_000);
    let within = Duration::from_secs(60);
    assert_eq!(
        desk.told(),
        [Told::Admit(0), Told::Serve(0), Told::Draining(within)]
    );
    assert_eq!(desk.said(), [FromWorker::Accepted { id: 1, live: 1 }]);
    desk.send([2]);
    let (reason, live) = (WorkerRefusal::Draining, 1);
    assert_eq!(desk.said(), [refused(2, reason, live)]);
    // Asked again, it goes on as it is.
    desk.drain(5);
    for _ in 0..100 {
        desk.jump(ms(10));
    }
    assert_eq!(desk.told(), []);
    desk.end_one();
    desk.jump(ms(10) - Duration::from_nanos(1));
    assert_eq!(desk.told(), []);
    desk.jump(Duration::from_nanos(1));
    assert_eq!(desk.told(), [Told::Drained]);
    // The channel ends with that.
    assert_eq!(desk.said(), [FromWorker::Load { live: 0 }]);
    assert_eq!(desk.pool.receive(), None);
    desk.jump(within);
    assert_eq!(desk.told(), [], "told once");
    drop(client);
}

/// It can close at once what it need not serve on.
#[test]
fn a_service_has_begun_everything_when_it_is_told_to_drain() {
    let mut desk = Desk::blocked(WorkerSettings::default());
    desk.send([100, 101]);
    desk.drain(60_000);
    assert_eq!(desk.told(), [Told::Admit(100), Told::Admit(101)]);
    desk.jump(ms(20));
    assert_eq!(desk.told(), []);
    while desk.service.kept.borrow().len() < 2 {
        desk.said();
        desk.jump(ms(2));
    }
    let within = Told::Draining(Duration::from_secs(60));
    let told = [Told::Serve(100), Told::Serve(101), within];
    assert_eq!(desk.told(), told);
    drop(desk);

    // Nor is it forgotten when the pool goes meanwhile.
    let mut desk = Desk::blocked(WorkerSettings::default());
    desk.send([100, 101]);
    desk.drain(60_000);
    desk.told();
    desk.pool.socket.shutdown(Shutdown::Both).unwrap();
    desk.settle();
    assert_eq!(desk.told(), told);
}

#[test]
fn one_that_has_nothing_ends_when_it_is_asked() {
    let mut desk = Desk::new(WorkerSettings::default());
    desk.drain(60_000);
    desk.jump(ms(10));
    let within = Duration::from_secs(60);
    assert_eq!(desk.told(), [Told::Draining(within), Told::Drained]);
    assert_eq!(desk.pool.receive(), None);
}

#[test]
fn connections_that_do_not_end_in_time_keep_no_worker() {
    let mut desk = Desk::new(WorkerSettings::default());
    desk.send([1]);
    // By itself.
    desk.worker.drain(&mut desk.reactor, ms(777));
    assert_eq!(
        desk.told(),
        [Told::Admit(1), Told::Serve(1)],
        "inside of the call"
    );
    desk.settle();
    assert_eq!(desk.told(), [Told::Draining(ms(777))]);
    desk.jump(ms(777) - Duration::from_nanos(1));
    assert_eq!(desk.told(), []);
    desk.jump(Duration::from_nanos(1));
    assert_eq!(desk.told(), [Told::Drained]);
    assert_eq!(desk.said().len(), 1);
    assert_eq!(desk.pool.receive(), None);
    assert_eq!(desk.worker.live(), 1);
}

#[test]
fn a_worker_without_its_pool_goes_on_for_a_while() {
    let mut settings = WorkerSettings::default();
    settings.orphaned_timeout = ms(4_000);
    let mut desk = Desk::new(settings);
    desk.send([1]);
    desk.told();
    desk.pool.socket.shutdown(Shutdown::Both).unwrap();
    desk.settle();
    assert_eq!(desk.told(), [Told::Draining(ms(4_000))]);
    desk.jump(ms(4_000) - Duration::from_nanos(1));
    assert_eq!(desk.told(), []);
    desk.jump(Duration::from_nanos(1));
    assert_eq!(desk.told(), [Told::Drained]);
}

#[test]
fn a_pool_that_says_no_hello_is_none() {
    let mut settings = WorkerSettings::default();
    settings.start_timeout = ms(900);
    let mut desk = Desk::silent(settings, |_| ());
    desk.jump(ms(900) - Duration::from_nanos(1));
    assert_eq!(desk.told(), []);
    desk.jump(Duration::from_nanos(1));
    assert_eq!(desk.told(), [Told::Draining(Duration::from_secs(30))]);
}

/// A closure is a service: what it says nothing of, a service does by itself.
#[test]
fn a_closure_serves_everything_and_the_reactor_stops_when_it_is_drained() {
    let _ledger = DescriptorLedger::open();
    let clock = ManualClock::new();
    let mut reactor = Reactor::with_clock(clock.clone()).unwrap();
    let (ours, theirs) = socketpair();
    let served = Rc::new(Cell::new(0));
    let counted = Rc::clone(&served);
    let serve = move |_: &mut Reactor, _: PassedConnection, _: Live| counted.set(counted.get() + 1);
    let settings = WorkerSettings::default();
    Worker::start(&mut reactor, ours, settings, serve).unwrap();
    let pool = Raw::new(theirs, Role::DISPATCHER);
    let (_client, accepted) = tcp_pair();
    pool.send(&dispatch(1, b""), &[accepted.as_fd()]).unwrap();
    pool.send(&ToWorker::Drain { within_ms: 1_000 }, &[])
        .unwrap();
    let left = Rc::new(Cell::new(200));
    pass_turns(&mut reactor, clock, Rc::clone(&left));
    reactor.run().unwrap();
    assert_ne!(left.get(), 0, "it did not stop by itself");
    assert_eq!(served.get(), 1);
}

/// Moves the time on by a millisecond with each turn of a running reactor, and stops
/// it when so many have passed.
fn pass_turns(reactor: &mut Reactor, clock: ManualClock, left: Rc<Cell<u32>>) {
    if left.get() == 0 {
        return reactor.stop().unwrap();
    }
    left.set(left.get() - 1);
    clock.advance(ms(1));
    reactor.call_soon(move |reactor| pass_turns(reactor, clock, left));
}
