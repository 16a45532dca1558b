//! Whatever panics while a panic is dealt with costs what panicked, and no more.

use std::any::Any;
use std::borrow::Cow;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;
use std::time::{Duration, Instant};

use bowline::descriptor::{Descriptor, Next, Panic, Readiness};
use bowline::error::ThreadCallError;
use bowline::lifecycle::{Phase, SystemEvent};
use bowline::time::PeriodicEnd;
use bowline::{
    Address, BuildContext, CloseReason, Context, Factory, Producer, ProducerKind, ProducerRef,
    Protocol, Reactor, Transport, Transports, UnixAddress, UnixStream,
};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream as Client;

use crate::support::{DEADLINE, DescriptorLedger, Record, Recorder, run_until, socketpair};

/// Panics when it is dropped, with another that does so too.
struct Bomb(u32);

impl Drop for Bomb {
    fn drop(&mut self) {
        if self.0 > 0 {
            resume_unwind(Box::new(Self(self.0 - 1)));
        }
    }
}

/// Has a test fail, rather than hang, out of whose loop such a value comes.
fn safely(test: impl FnOnce()) {
    if let Err(payload) = catch_unwind(AssertUnwindSafe(test)) {
        if payload.is::<Bomb>() {
            std::mem::forget(payload);
            panic!("a panic left the loop");
        }
        resume_unwind(payload);
    }
}

fn explode<R>() -> R {
    resume_unwind(Box::new(Bomb(2)))
}

/// What panics beside the callback itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Beside {
    /// The payload of the panic, when it is dropped: always.
    Nothing,
    LogPrefix,
    ConnectionLost,
    DropOfTheProtocol,
    DropOfTheProducer,
    AllOfThem,
}

const BESIDES: [Beside; 6] = [
    Beside::Nothing,
    Beside::LogPrefix,
    Beside::ConnectionLost,
    Beside::DropOfTheProtocol,
    Beside::DropOfTheProducer,
    Beside::AllOfThem,
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Made,
    Data,
    ReadLost,
    BoxedProducer,
    Called,
    Lost,
}

const PLACES: [Place; 6] = [
    Place::Made,
    Place::Data,
    Place::ReadLost,
    Place::BoxedProducer,
    Place::Called,
    Place::Lost,
];

struct Victim {
    place: Place,
    beside: Beside,
    lost: Rc<Cell<u32>>,
    _bomb: Option<Bomb>,
}

impl Victim {
    fn new(place: Place, beside: Beside, lost: &Rc<Cell<u32>>) -> Self {
        let drops = matches!(beside, Beside::DropOfTheProtocol | Beside::AllOfThem);
        Self {
            place,
            beside,
            lost: Rc::clone(lost),
            _bomb: drops.then(|| Bomb(2)),
        }
    }

    fn is_beside(&self, beside: Beside) -> bool {
        self.beside == beside || self.beside == Beside::AllOfThem
    }
}

struct Source(#[expect(dead_code, reason = "dropped")] Option<Bomb>);

impl Producer for Source {
    fn pause_producing(&mut self, _: &mut Context<'_, dyn Transport>) {
        explode()
    }
    fn resume_producing(&mut self, _: &mut Context<'_, dyn Transport>) {
        explode()
    }
    fn stop_producing(&mut self, _: &mut Context<'_, dyn Transport>) {
        explode()
    }
}

impl<T: Transport> Protocol<T> for Victim {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        match self.place {
            Place::Made => explode(),
            Place::BoxedProducer => {
                let bomb = self.is_beside(Beside::DropOfTheProducer).then(|| Bomb(2));
                let producer = ProducerRef::Boxed(Box::new(Source(bomb)));
                cx.transport
                    .register_producer(producer, ProducerKind::Pull)
                    .expect("there is none");
            }
            Place::Lost => cx.transport.abort_connection(),
            _ => {}
        }
    }

    fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {
        if self.place == Place::Data {
            explode()
        }
    }

    fn read_connection_lost(&mut self, _: &mut Context<'_, T>) -> bowline::AfterReadClosed {
        explode()
    }

    fn connection_lost(&mut self, _: &mut Context<'_, T>, _: &CloseReason) {
        self.lost.set(self.lost.get() + 1);
        if self.place == Place::Lost || self.is_beside(Beside::ConnectionLost) {
            explode()
        }
    }

    fn log_prefix(&self) -> Cow<'_, str> {
        if self.is_beside(Beside::LogPrefix) {
            explode()
        } else {
            "Victim".into()
        }
    }
}

/// A neighbour that is served is how one sees that the loop goes on.
struct Neighbour(Client);

impl Neighbour {
    fn new(reactor: &mut Reactor) -> Self {
        struct Echo;
        impl<T: Transport> Protocol<T> for Echo {
            fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
                cx.transport.write(data);
            }
        }
        let (ours, theirs) = socketpair();
        reactor.adopt_unix_stream(ours.into(), Echo).unwrap();
        theirs.set_nonblocking(true).unwrap();
        Self(theirs)
    }

    #[track_caller]
    fn is_served(&mut self, reactor: &mut Reactor) {
        self.0.write_all(b"x").unwrap();
        run_until(reactor, |_| matches!(self.0.read(&mut [0]), Ok(1)));
    }
}

/// A panicking `log_prefix`, or a payload that panics when it is dropped, left the
/// loop, of which no later turn did anything.
#[test]
fn what_panics_beside_a_callback_costs_the_same_connection() {
    safely(|| {
        let ledger = DescriptorLedger::open();
        for place in PLACES {
            for beside in BESIDES {
                let mut reactor = Reactor::new().unwrap();
                let mut neighbour = Neighbour::new(&mut reactor);
                reactor.start().unwrap();
                let lost = Rc::new(Cell::new(0));
                let (ours, mut theirs) = socketpair();
                let victim = Victim::new(place, beside, &lost);
                let handle = reactor.adopt_unix_stream(ours.into(), victim).unwrap();
                match place {
                    Place::ReadLost => drop(theirs),
                    Place::Called => {
                        let handle = reactor.get(handle).unwrap().handle();
                        reactor.call_protocol::<UnixStream, Victim>(handle, |_, _| explode());
                    }
                    _ => theirs.write_all(b"x").unwrap(),
                }
                run_until(&mut reactor, |reactor| {
                    !reactor.is_registered(handle.token())
                });
                assert_eq!(lost.get(), 1, "{place:?}, {beside:?}: told of its end once");
                neighbour.is_served(&mut reactor);
                let counts = reactor.descriptor_counts();
                assert_eq!(counts.opened, counts.closed + 1, "but the neighbour");
            }
        }
        ledger.assert_balanced();
    });
}

/// Where the connection was made by a connector, somebody waits to be told.
#[test]
fn connector_is_told_of_a_connection_that_panics_to_its_end() {
    safely(|| {
        struct Dial {
            lost: Rc<Cell<u32>>,
            stopped: Rc<Cell<u32>>,
            ended: Rc<Cell<u32>>,
        }
        impl Factory for Dial {
            type Protocol = Victim;
            fn build_protocol(&mut self, _: &mut BuildContext<'_>, _: &Address) -> Option<Victim> {
                Some(Victim::new(Place::Made, Beside::AllOfThem, &self.lost))
            }
            fn connection_lost(&mut self, _: &mut BuildContext<'_>, reason: &CloseReason) {
                assert!(matches!(reason, CloseReason::Panicked(_)), "{reason:?}");
                self.ended.set(self.ended.get() + 1);
                explode()
            }
            fn stopped(&mut self, _: &mut BuildContext<'_>) {
                self.stopped.set(self.stopped.get() + 1);
                explode()
            }
            fn log_prefix(&self) -> Cow<'_, str> {
                explode()
            }
        }
        let ledger = DescriptorLedger::open();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let mut reactor = Reactor::new().unwrap();
        let mut neighbour = Neighbour::new(&mut reactor);
        let record = Record::default();
        let recorder = Recorder::new(&record);
        let factory = move |_: &Address| recorder.clone();
        reactor
            .listen_unix(UnixAddress::Path(path.clone()), factory)
            .unwrap();
        let counts: [Rc<Cell<u32>>; 3] = Default::default();
        let [lost, stopped, ended] = counts.clone();
        let dial = Dial {
            lost,
            stopped,
            ended,
        };
        let connector = reactor.connect_unix(UnixAddress::Path(path), dial).unwrap();
        run_until(&mut reactor, |reactor| {
            record.is_lost() && !reactor.is_registered(connector.token())
        });
        assert_eq!(counts.map(|count| count.get()), [1, 1, 1]);
        neighbour.is_served(&mut reactor);
        drop((reactor, neighbour));
        ledger.assert_balanced();
    });
}

#[test]
fn payload_of_any_call_may_panic_when_it_is_dropped() {
    safely(|| {
        let _alone = DescriptorLedger::open();
        let mut reactor = Reactor::new().unwrap();
        let mut neighbour = Neighbour::new(&mut reactor);
        for phase in [Phase::Before, Phase::During, Phase::After] {
            reactor.add_trigger(phase, SystemEvent::Startup, |_| explode());
            reactor.add_trigger(phase, SystemEvent::Shutdown, |_| explode());
        }
        reactor.call_when_running(|_| explode());
        reactor.start().unwrap();
        reactor.call_soon(|_| explode());
        reactor.defer(|_| explode());
        reactor.call_later(Duration::ZERO, |_| explode());
        reactor.remote().call_from_thread(|_| explode()).unwrap();
        let ended = Rc::new(Cell::new(0));
        let count = || {
            let ended = Rc::clone(&ended);
            move || ended.set(ended.get() + 1)
        };
        let (periodic_ended, thread_ended, dropped) = (count(), count(), count());
        let bomb = Bomb(2);
        let periodic = reactor.call_every(Duration::from_millis(1), move |_, _| {
            let _ = &bomb;
            explode()
        });
        periodic.on_end(&mut reactor, move |_, end| {
            assert_eq!(end, PeriodicEnd::Panicked);
            periodic_ended();
        });
        reactor.call_in_thread(explode::<()>, move |_, result| {
            assert!(matches!(result, Err(ThreadCallError::Panicked(_))));
            thread_ended();
            // With it the payload.
        });
        // What a thread brings is dropped there if nobody wants it.
        reactor.call_in_thread(
            || Bomb(2),
            move |_, result| {
                std::mem::forget(result);
                dropped();
            },
        );
        let cancelled = reactor.call_in_thread(|| Bomb(2), |_, _| unreachable!("cancelled"));
        cancelled.cancel(&mut reactor);
        // And here, if it was there already.
        let late = reactor.call_in_thread(|| Bomb(2), |_, _| unreachable!("cancelled"));
        let pool = reactor.thread_pool();
        let began = Instant::now();
        while pool.counts().queued > 0 || pool.counts().idle < pool.counts().threads {
            assert!(began.elapsed() < DEADLINE, "it does not come to an end");
            std::thread::yield_now();
        }
        assert!(late.cancel(&mut reactor));
        run_until(&mut reactor, |_| ended.get() == 3);
        neighbour.is_served(&mut reactor);
        // The thread of the pool is still there.
        let again = count();
        reactor.call_in_thread(
            || (),
            move |_, result| {
                result.unwrap();
                again();
            },
        );
        run_until(&mut reactor, |_| ended.get() == 4);
        reactor.stop().unwrap();
        while reactor.turn(Some(DEADLINE)) != bowline::Turn::Stopped {}
        assert_eq!(reactor.statistics().panics, 12);
    });
}

/// Nobody is left to be told: a process that ends is not to abort instead.
#[test]
fn what_a_reactor_owns_may_panic_when_it_is_dropped_with_it() {
    safely(|| {
        let ledger = DescriptorLedger::open();
        let mut reactor = Reactor::new().unwrap();
        let holding = || {
            let bomb = Bomb(2);
            move |_: &mut Reactor| drop(bomb)
        };
        let mut peers = Vec::new();
        for _ in 0..2 {
            reactor.call_soon(holding());
            reactor.defer(holding());
            reactor.call_later(Duration::from_secs(1), holding());
            reactor.add_trigger(Phase::After, SystemEvent::Shutdown, holding());
            let bomb = Bomb(2);
            let call = move |_: &mut Reactor| drop(bomb);
            reactor.remote().call_from_thread(call).unwrap();
            let (ours, theirs) = socketpair();
            let lost = Rc::default();
            let victim = Victim::new(Place::Called, Beside::AllOfThem, &lost);
            reactor.adopt_unix_stream(ours.into(), victim).unwrap();
            peers.push(theirs);
        }
        reactor.extension(|| Bomb(2));
        drop(reactor);
        for mut peer in peers {
            assert_eq!(peer.read(&mut [0]).unwrap(), 0, "its socket is closed");
        }
        ledger.assert_balanced();
    });
}

/// A descriptor of one's own that panics in everything, and removes itself.
#[test]
fn descriptor_that_panics_whatever_is_called_is_dropped() {
    safely(|| {
        struct Rotten {
            own: Rc<Cell<Option<bowline::descriptor::Token>>>,
            told: Rc<Cell<u32>>,
            _bomb: Bomb,
        }
        impl Descriptor for Rotten {
            fn ready(&mut self, _: &mut Reactor, _: Readiness) -> Next {
                explode()
            }
            fn attend(&mut self, reactor: &mut Reactor) -> Next {
                if let Some(own) = self.own.get() {
                    reactor.remove(own);
                }
                explode()
            }
            fn panicked(&mut self, _: &mut Reactor, _: Panic) -> Next {
                self.told.set(self.told.get() + 1);
                explode()
            }
            fn shutdown(&mut self, _: &mut Reactor) {
                explode()
            }
            fn facet(&mut self) -> &mut dyn Any {
                self
            }
            fn log_prefix(&self) -> Cow<'_, str> {
                explode()
            }
        }
        let _alone = DescriptorLedger::open();
        let mut reactor = Reactor::new().unwrap();
        let mut neighbour = Neighbour::new(&mut reactor);
        reactor.start().unwrap();
        for removes_itself in [false, true] {
            let (own, told) = (Rc::new(Cell::new(None)), Rc::new(Cell::new(0)));
            let rotten = Rotten {
                own: Rc::clone(&own),
                told: Rc::clone(&told),
                _bomb: Bomb(2),
            };
            let token = reactor.vacancy().unwrap().install(Box::new(rotten));
            own.set(removes_itself.then_some(token));
            reactor.notify(token);
            run_until(&mut reactor, |reactor| !reactor.is_registered(token));
            assert!((1..=4).contains(&told.get()), "told {} times", told.get());
            neighbour.is_served(&mut reactor);
        }
    });
}
