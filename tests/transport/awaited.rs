//! Waiting for bytes to leave, for several connections to be taken apart, and for
//! children to end.

use std::any::TypeId;
use std::cell::{Cell, RefCell};
use std::io::{self, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::rc::Rc;
use std::time::Duration;

use bowline::error::{DetachError, NotSent};
use bowline::process::{ChildProcess, ChildWatch};
use bowline::testing::ManualClock;
use bowline::{
    Context, Producer, ProducerKind, ProducerRef, Reactor, Transport, Transports, WhenSent,
};

use crate::harness::{Kind, Link, Script, over_every_kind};
use crate::support::{DescriptorLedger, run_until, run_until_quiet, socketpair};

over_every_kind!(
    bytes_are_told_of_when_the_kernel_has_them,
    those_that_have_left_already_are_told_of_in_this_turn,
    those_that_never_leave_are_told_of_at_the_end,
    nobody_is_told_inside_of_a_callback,
    one_who_asks_at_the_end_is_told_too,
    awaiting_keeps_no_connection_open,
    awaiting_is_nothing_to_a_producer,
    a_panic_of_one_costs_nobody_else,
);

type Told = Rc<RefCell<Vec<(u64, Result<(), NotSent>)>>>;

fn tell(told: &Told, position: u64) -> WhenSent {
    let told = Rc::clone(told);
    Box::new(move |_, result| told.borrow_mut().push((position, result)))
}

fn bytes_are_told_of_when_the_kernel_has_them(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    let written = link.fill() as u64;
    let sent = link.transport().bytes_sent();
    let told = Told::default();
    // Not in their order.
    for position in [written, sent + 1, written - 1, sent] {
        let then = tell(&told, position);
        link.transport().when_sent(position, then);
    }
    link.turn();
    assert_eq!(told.take(), [(sent, Ok(()))]);
    link.settle();
    assert_eq!(told.take(), []);
    while link.transport().bytes_sent() < written {
        let before = link.transport().bytes_sent();
        let told_before = told.borrow().len();
        assert_eq!(told_before, usize::from(before > sent));
        link.peer_receives(1 << 16);
        link.turn();
    }
    let in_order = [sent + 1, written - 1, written].map(|position| (position, Ok(())));
    assert_eq!(told.take(), in_order);
    link.finish();
}

fn those_that_have_left_already_are_told_of_in_this_turn(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    let told = Told::default();
    let then = tell(&told, 0);
    link.transport().when_sent(0, then);
    assert_eq!(told.take(), []);
    link.turn();
    assert_eq!(told.take(), [(0, Ok(()))]);
    // Written and sent in the same turn.
    let _ = link.transport().write(b"ten bytes.");
    let then = tell(&told, 10);
    link.transport().when_sent(10, then);
    link.turn();
    assert_eq!(told.take(), [(10, Ok(()))]);
    // So much that it goes straight to the kernel.
    let _ = link.transport().write(&[b'x'; 20_000]);
    let then = tell(&told, 20_010);
    link.transport().when_sent(20_010, then);
    link.turn();
    assert_eq!(told.take(), [(20_010, Ok(()))]);
    link.finish();
}

fn those_that_never_leave_are_told_of_at_the_end(kind: Kind) {
    for is_detached in [false, true] {
        if is_detached && kind == Kind::Memory {
            continue;
        }
        let mut link = Link::new(kind, Script::new());
        let _ = link.transport().write(b"five!");
        let told = Told::default();
        for position in [5, 6] {
            let then = tell(&told, position);
            link.transport().when_sent(position, then);
        }
        link.turn();
        assert_eq!(told.take(), [(5, Ok(()))]);
        if is_detached {
            link.reactor
                .detach::<Script>(link.handle, |_, taken| drop(taken));
            link.turn();
        } else {
            link.peer_receives(5);
            link.transport().abort_connection();
            link.run_until_lost();
        }
        assert_eq!(told.take(), [(6, Err(NotSent { sent: 5 }))]);
        link.settle();
        assert_eq!(told.take(), []);
        link.finish();
    }
}

fn nobody_is_told_inside_of_a_callback(kind: Kind) {
    let depth = Rc::new(Cell::new(0));
    let told = Rc::new(Cell::new(0));
    let (inside, count) = (Rc::clone(&depth), Rc::clone(&told));
    let script = Script::new().data(move |cx, data| {
        inside.set(1);
        let _ = cx.transport.write(data);
        let position = cx.transport.bytes_sent() + cx.transport.unsent_bytes() as u64;
        let (inside, count) = (Rc::clone(&inside), Rc::clone(&count));
        let then: WhenSent = Box::new(move |_, result| {
            assert_eq!((inside.get(), result), (0, Ok(())));
            count.set(count.get() + 1);
        });
        cx.transport.when_sent(position, then);
        depth.set(0);
    });
    let mut link = Link::new(kind, script);
    link.peer().send(b"question");
    link.run_until(|_| told.get() == 1);
    assert_eq!(link.peer_receives(8), b"question");
    link.finish();
}

fn one_who_asks_at_the_end_is_told_too(kind: Kind) {
    let told = Told::default();
    let last = Rc::clone(&told);
    let script = Script::new().lost(move |cx, _| {
        for position in [3, 4] {
            let then = tell(&last, position);
            cx.transport.when_sent(position, then);
        }
    });
    let mut link = Link::new(kind, script);
    let _ = link.transport().write(b"all");
    link.peer_receives(3);
    link.close_peer();
    link.run_until_lost();
    assert_eq!(told.take(), [(3, Ok(())), (4, Err(NotSent { sent: 3 }))]);
    link.finish();
}

fn awaiting_keeps_no_connection_open(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    let told = Told::default();
    let then = tell(&told, 1);
    link.transport().when_sent(1, then);
    link.turn();
    link.transport().lose_connection();
    link.run_until_lost();
    assert_eq!(told.take(), [(1, Err(NotSent { sent: 0 }))]);
    link.finish();
}

/// Counts how often it is asked, and says how often it was told to stop.
struct Counts(Rc<Cell<u32>>);

impl Producer for Counts {
    fn resume_producing(&mut self, _: &mut Context<'_, dyn Transport>) {
        self.0.set(self.0.get() + 1);
    }
}

fn awaiting_is_nothing_to_a_producer(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    let told = Told::default();
    let resumed = Rc::new(Cell::new(0));
    let producer = ProducerRef::boxed(Counts(Rc::clone(&resumed)));
    link.transport()
        .register_producer(producer, ProducerKind::Push)
        .unwrap();
    let _ = link.transport().write(b"some");
    let then = tell(&told, 4);
    link.transport().when_sent(4, then);
    link.settle();
    assert_eq!((told.take(), resumed.get()), (vec![(4, Ok(()))], 0));
    // One that goes leaves whoever waits.
    let then = tell(&told, 8);
    link.transport().when_sent(8, then);
    link.transport().unregister_producer();
    let _ = link.transport().write(b"more");
    link.settle();
    assert_eq!((told.take(), resumed.get()), (vec![(8, Ok(()))], 0));
    link.finish();
}

fn a_panic_of_one_costs_nobody_else(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    let told = Told::default();
    let _ = link.transport().write(b"two");
    link.transport()
        .when_sent(3, Box::new(|_, _| panic!("on purpose")));
    let then = tell(&told, 3);
    link.transport().when_sent(3, then);
    link.settle();
    assert_eq!(told.take(), [(3, Ok(()))]);
    let _ = link.transport().write(b"on");
    assert_eq!(link.peer_receives(5), b"twoon");
    link.finish_after_panic();
}

#[test]
fn several_are_taken_apart_and_told_of_in_one_call_and_in_order() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let pairs: Vec<_> = (0..4).map(|_| socketpair()).collect();
    let (ours, mut theirs): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
    let handles: Vec<_> = ours
        .into_iter()
        .map(|ours| {
            let handle = reactor.adopt_unix_stream(ours.into(), Script::new());
            let handle = handle.unwrap();
            reactor.get(handle).unwrap().handle()
        })
        .collect();
    run_until_quiet(&mut reactor);
    drop(theirs.remove(1));
    run_until(&mut reactor, |reactor| reactor.get(handles[1]).is_none());
    theirs[2].write_all(b"stays in the socket").unwrap();
    let own = TypeId::of::<Script>();
    let parts = [
        (handles[0], own),
        (handles[1], own),
        (handles[2], TypeId::of::<String>()),
        (handles[3], own),
    ];
    let told = Rc::new(RefCell::new(Vec::new()));
    let result = Rc::clone(&told);
    let _ = reactor.get(handles[3]).unwrap().write(b"unsent");
    reactor.detach_all(parts, move |_, all| result.borrow_mut().push(all));
    reactor.turn(Some(Duration::ZERO));
    let mut calls = told.take();
    assert_eq!(calls.len(), 1);
    let mut all = calls.pop().unwrap().into_iter();
    let first = all.next().unwrap().expect("it was connected");
    assert!(first.downcast::<Script>().is_ok());
    assert!(matches!(all.next(), Some(Err(DetachError::Lost))));
    assert!(matches!(all.next(), Some(Err(DetachError::WrongProtocol))));
    let last = all.next().unwrap().expect("it was connected");
    let last = last.downcast::<String>().expect_err("it is no string");
    assert!((*last).downcast::<Script>().is_ok());
    assert!(all.next().is_none());
    // The one whose type was wrong goes on.
    assert!(reactor.get(handles[2]).is_some());

    let none: [(bowline::TransportHandle, TypeId); 0] = [];
    reactor.detach_all(none, move |_, all| told.borrow_mut().push(all));
    reactor.turn(Some(Duration::ZERO));
}

type Ends = Rc<RefCell<Vec<io::Result<ExitStatus>>>>;

fn watch(reactor: &mut Reactor, process: Box<dyn ChildProcess>) -> (ChildWatch, Ends) {
    let ends = Ends::default();
    let told = Rc::clone(&ends);
    let watch = ChildWatch::start(reactor, process, move |_, status| {
        told.borrow_mut().push(status);
    });
    (watch, ends)
}

fn reads_to_the_end() -> Child {
    Command::new("cat")
        .stdin(Stdio::piped())
        .spawn()
        .expect("cat")
}

/// A process of whose end the kernel does not tell.
struct Untold(Child, Rc<Cell<u32>>);

impl ChildProcess for Untold {
    fn pid(&self) -> u32 {
        self.0.id()
    }

    fn kill(&mut self) -> io::Result<()> {
        self.0.kill()
    }

    fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        self.1.set(self.1.get() + 1);
        self.0.try_wait()
    }
}

#[test]
fn the_end_of_a_child_is_told_once_with_how_it_ended() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let mut child = reads_to_the_end();
    let input = child.stdin.take();
    let pid = child.id();
    let (watch, ends) = watch(&mut reactor, Box::new(child));
    assert_eq!((watch.pid(), watch.has_ended()), (pid, false));
    run_until_quiet(&mut reactor);
    assert_eq!(ends.borrow().len(), 0);
    drop(input);
    run_until(&mut reactor, |_| !ends.borrow().is_empty());
    assert!(watch.has_ended() && watch.kill().is_ok());
    let ends = ends.take();
    assert!(matches!(&ends[..], [Ok(status)] if status.success()));
    assert_eq!(reactor.registered(), 0);
}

/// Nobody has to keep the watch.
#[test]
fn a_child_is_reaped_though_its_watch_is_dropped() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let (watch, ends) = watch(&mut reactor, Box::new(reads_to_the_end()));
    watch.kill().unwrap();
    drop(watch);
    run_until(&mut reactor, |_| !ends.borrow().is_empty());
    assert!(
        ends.take()[0]
            .as_ref()
            .is_ok_and(|status| !status.success())
    );
}

#[test]
fn a_child_of_whose_end_nobody_tells_is_asked_as_often_as_was_said() {
    let _ledger = DescriptorLedger::open();
    let clock = ManualClock::new();
    let mut reactor = Reactor::with_clock(clock.clone()).unwrap();
    let asked = Rc::new(Cell::new(0));
    let mut child = reads_to_the_end();
    let _input = child.stdin.take();
    let child = Untold(child, Rc::clone(&asked));
    let (watch, ends) = watch(&mut reactor, Box::new(child));
    let pass = |reactor: &mut Reactor, milliseconds| {
        for _ in 0..milliseconds {
            clock.advance(Duration::from_millis(1));
            reactor.turn(Some(Duration::ZERO));
        }
    };
    pass(&mut reactor, 100);
    assert_eq!(asked.get(), 0, "before anybody wants it");
    watch.look(&mut reactor);
    pass(&mut reactor, 100);
    assert_eq!(asked.get(), 1);
    watch.look_every(&mut reactor, Duration::from_millis(10));
    pass(&mut reactor, 100);
    assert_eq!(asked.get(), 11);
    watch.look_every(&mut reactor, Duration::from_millis(50));
    pass(&mut reactor, 100);
    assert_eq!(asked.get(), 13);
    watch.kill().unwrap();
    while ends.borrow().is_empty() {
        pass(&mut reactor, 1);
        std::thread::yield_now();
    }
    let before = asked.get();
    pass(&mut reactor, 1_000);
    assert_eq!((asked.get(), ends.borrow().len()), (before, 1));
}
