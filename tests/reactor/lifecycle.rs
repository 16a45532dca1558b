//! Starting, stopping, triggers, and reactors inside other loops.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bowline::error::{ReactorError, RunError, TriggerError};
use bowline::lifecycle::{Hold, Phase, SystemEvent, TriggerId};
use bowline::{Reactor, Transports, Turn};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::support::{DEADLINE, DescriptorLedger, Record, Recorder, run_until, socketpair};
use crate::{Notes, PANIC};

const PHASES: [Phase; 3] = [Phase::Before, Phase::During, Phase::After];

fn stop_soon(reactor: &mut Reactor) {
    reactor.call_soon(|reactor| reactor.stop().unwrap());
}

/// Contract R-01, W-41.
#[test]
fn stop_and_crash_are_refused_unless_running() {
    let _alone = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    assert_eq!(reactor.stop(), Err(ReactorError::NotRunning));
    assert_eq!(reactor.crash(), Err(ReactorError::NotRunning));
    let second = Rc::new(Cell::new(None));
    let seen = Rc::clone(&second);
    reactor.call_soon(move |reactor| {
        reactor.stop().unwrap();
        assert!(reactor.is_stopping());
        seen.set(Some(reactor.stop()));
    });
    reactor.add_trigger(Phase::After, SystemEvent::Shutdown, |reactor| {
        assert_eq!(reactor.stop(), Ok(()), "it stops, as it was asked to");
    });
    reactor.run().unwrap();
    assert_eq!(second.get(), Some(Ok(())));
    assert_eq!(reactor.stop(), Err(ReactorError::NotRunning));
    assert_eq!(reactor.crash(), Err(ReactorError::NotRunning));
    assert_eq!(reactor.statistics().panics, 0);
}

/// Contract.
#[test]
fn triggers_run_by_phase_then_in_the_order_added() {
    let _alone = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let notes = Notes::new();
    for event in [SystemEvent::Shutdown, SystemEvent::Startup] {
        for number in 0..2 {
            for phase in PHASES.into_iter().rev() {
                reactor.add_trigger(phase, event, notes.noting((event, phase, number)));
            }
        }
    }
    stop_soon(&mut reactor);
    reactor.run().unwrap();
    let mut wanted = Vec::new();
    for event in [SystemEvent::Startup, SystemEvent::Shutdown] {
        for phase in PHASES {
            wanted.extend([(event, phase, 0), (event, phase, 1)]);
        }
    }
    assert_eq!(notes.all(), wanted);
    // Once each: a second run has none left.
    stop_soon(&mut reactor);
    reactor.run().unwrap();
    assert_eq!(notes.len(), wanted.len());
}

/// Contract R-02.
#[test]
fn stop_returns_before_any_shutdown_trigger_runs() {
    let _alone = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let notes = Notes::new();
    for phase in PHASES {
        reactor.add_trigger(phase, SystemEvent::Shutdown, notes.noting("trigger"));
    }
    let stopping = notes.clone();
    reactor.call_soon(move |reactor| {
        reactor.stop().unwrap();
        stopping.push("stop returned");
    });
    reactor.call_soon(notes.noting("rest of the turn"));
    reactor.run().unwrap();
    assert_eq!(
        notes.all(),
        [
            "stop returned",
            "rest of the turn",
            "trigger",
            "trigger",
            "trigger"
        ]
    );
}

/// It stops in order, and the first reason is what `run` answers, once.
#[test]
fn run_answers_why_the_program_cannot_go_on() {
    let _alone = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let notes = Notes::new();
    reactor.add_trigger(Phase::After, SystemEvent::Shutdown, notes.noting("stopped"));
    reactor.call_soon(|reactor| {
        reactor.fail(io::Error::new(io::ErrorKind::AddrInUse, "no port"));
        assert!(reactor.is_stopping());
        reactor.fail(io::Error::other("nor anything else"));
    });
    let error = reactor.run().unwrap_err();
    assert_eq!(error.to_string(), "cannot go on: no port");
    assert_eq!(io::Error::from(error).kind(), io::ErrorKind::AddrInUse);
    assert_eq!(notes.all(), ["stopped"]);
    stop_soon(&mut reactor);
    reactor.run().unwrap();
}

#[test]
fn failure_before_the_run_ends_it_and_by_hand_it_is_asked_for() {
    let _alone = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    reactor.fail(io::Error::other("too early"));
    let error = reactor.run().unwrap_err();
    assert_eq!(error.to_string(), "cannot go on: too early");
    reactor.start().unwrap();
    reactor.call_soon(|reactor| reactor.fail(io::Error::other("by hand")));
    while reactor.turn(Some(Duration::ZERO)) == Turn::Continue {}
    assert_eq!(reactor.take_failure().unwrap().to_string(), "by hand");
    assert!(reactor.take_failure().is_none());
}

/// Contract R-07.
#[test]
fn running_is_false_before_the_startup_and_true_until_after_the_shutdown() {
    let _alone = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let notes = Notes::new();
    for event in [SystemEvent::Startup, SystemEvent::Shutdown] {
        for phase in PHASES {
            let notes = notes.clone();
            reactor.add_trigger(phase, event, move |reactor| {
                notes.push(reactor.is_running())
            });
        }
    }
    stop_soon(&mut reactor);
    assert!(!reactor.is_running());
    reactor.run().unwrap();
    assert!(!reactor.is_running());
    assert_eq!(notes.all(), [false, true, true, true, true, true]);
}

/// Contract R-08.
#[test]
fn call_when_running_runs_after_the_startup_or_in_this_turn() {
    let _alone = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let notes = Notes::new();
    reactor.call_when_running(notes.noting("first"));
    let second = notes.clone();
    let turns = Rc::new(Cell::new((0, 0)));
    let seen = Rc::clone(&turns);
    reactor.call_when_running(move |reactor| {
        assert!(reactor.is_running());
        second.push("second");
        let (at_once, turn) = (second.noting("at once"), reactor.statistics().turns);
        reactor.call_when_running(move |reactor| {
            seen.set((turn, reactor.statistics().turns));
            at_once(reactor);
        });
        second.push("not inside");
        stop_soon(reactor);
    });
    reactor.run().unwrap();
    assert_eq!(notes.all(), ["first", "second", "not inside", "at once"]);
    let (asked, called) = turns.get();
    assert_eq!(asked, called, "in another turn");
}

/// Contract R-04.
#[test]
fn hold_keeps_the_event_in_its_first_phase_while_the_loop_turns() {
    let _alone = DescriptorLedger::open();
    for event in [SystemEvent::Startup, SystemEvent::Shutdown] {
        let mut reactor = Reactor::new().unwrap();
        let notes = Notes::new();
        let taken = Rc::new(RefCell::new(None::<Hold>));
        let (hold, before) = (Rc::clone(&taken), notes.clone());
        reactor.add_trigger(Phase::Before, event, move |reactor| {
            before.push("before");
            // Two holds, of which one goes at once.
            drop(reactor.hold(event));
            *hold.borrow_mut() = Some(reactor.hold(event));
            let (hold, released) = (Rc::clone(&hold), before.clone());
            reactor.call_later(Duration::from_millis(2), move |_| {
                released.push("released");
                hold.borrow_mut().take();
            });
        });
        reactor.add_trigger(Phase::Before, event, notes.noting("before too"));
        reactor.add_trigger(Phase::During, event, notes.noting("during"));
        let after = notes.clone();
        reactor.add_trigger(Phase::After, event, move |reactor| {
            after.push("after");
            let _ = reactor.stop();
        });
        if event == SystemEvent::Shutdown {
            stop_soon(&mut reactor);
        }
        reactor.run().unwrap();
        assert_eq!(
            notes.all(),
            ["before", "before too", "released", "during", "after"],
            "{event:?}"
        );
    }
}

/// Contract R-04.
#[test]
fn hold_on_one_event_does_not_hold_the_other() {
    let _alone = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let kept = reactor.hold(SystemEvent::Shutdown);
    let notes = Notes::new();
    let started = notes.clone();
    reactor.call_when_running(move |reactor| {
        started.push("running");
        reactor.stop().unwrap();
        reactor.call_later(Duration::from_millis(1), move |_| drop(kept));
    });
    reactor.run().unwrap();
    assert_eq!(notes.all(), ["running"]);
}

#[test]
fn stop_while_the_startup_is_held_stops() {
    let _alone = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let _hold = reactor.hold(SystemEvent::Startup);
    let notes = Notes::new();
    reactor.add_trigger(Phase::During, SystemEvent::Startup, notes.noting("started"));
    reactor.add_trigger(
        Phase::During,
        SystemEvent::Shutdown,
        notes.noting("stopped"),
    );
    stop_soon(&mut reactor);
    reactor.run().unwrap();
    assert_eq!(notes.all(), ["stopped"]);
}

/// Contract R-09.
#[test]
fn failing_trigger_does_not_spare_the_others() {
    let _alone = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let notes = Notes::new();
    for event in [SystemEvent::Startup, SystemEvent::Shutdown] {
        for phase in PHASES {
            reactor.add_trigger(phase, event, |_| panic!("{PANIC}"));
            reactor.add_trigger(phase, event, notes.noting((event, phase)));
        }
    }
    stop_soon(&mut reactor);
    reactor.run().unwrap();
    assert_eq!(notes.len(), 6);
    assert_eq!(reactor.statistics().panics, 6);
}

/// Contract R-10.
#[test]
fn removed_trigger_never_runs_and_is_removed_only_once() {
    let _alone = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let mut other = Reactor::new().unwrap();
    let notes = Notes::new();
    let removed = reactor.add_trigger(Phase::During, SystemEvent::Startup, notes.noting("removed"));
    let ran = reactor.add_trigger(Phase::During, SystemEvent::Startup, notes.noting("ran"));
    reactor.remove_trigger(removed).unwrap();
    assert_eq!(reactor.remove_trigger(removed), Err(TriggerError));
    assert_eq!(other.remove_trigger(ran), Err(TriggerError));
    stop_soon(&mut reactor);
    reactor.run().unwrap();
    assert_eq!(notes.all(), ["ran"]);
    assert_eq!(reactor.remove_trigger(ran), Err(TriggerError));
}

/// Contract R-10.
#[test]
fn trigger_may_remove_others_of_its_own_and_of_later_phases() {
    let _alone = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let notes = Notes::new();
    let victims = Rc::new(RefCell::new(Vec::<TriggerId>::new()));
    let (to_remove, own) = (Rc::clone(&victims), Rc::new(Cell::new(None)));
    let itself = Rc::clone(&own);
    let id = reactor.add_trigger(Phase::Before, SystemEvent::Shutdown, move |reactor| {
        for id in to_remove.borrow_mut().drain(..) {
            reactor.remove_trigger(id).unwrap();
        }
        let own: TriggerId = itself.get().expect("set before the run");
        assert_eq!(reactor.remove_trigger(own), Err(TriggerError));
    });
    own.set(Some(id));
    for phase in PHASES {
        let victim = reactor.add_trigger(phase, SystemEvent::Shutdown, notes.noting("victim"));
        victims.borrow_mut().push(victim);
        reactor.add_trigger(phase, SystemEvent::Shutdown, notes.noting("left"));
    }
    stop_soon(&mut reactor);
    reactor.run().unwrap();
    assert_eq!(notes.all(), ["left"; 3]);
    assert_eq!(reactor.statistics().panics, 0);
}

/// Contract, W-41.
#[test]
fn crash_ends_the_run_and_leaves_everything_as_it_is() {
    let ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let notes = Notes::new();
    for phase in PHASES {
        reactor.add_trigger(phase, SystemEvent::Shutdown, notes.noting("shutdown"));
    }
    let (ours, theirs) = socketpair();
    let record = Record::default();
    reactor
        .adopt_unix_stream(ours.into(), Recorder::new(&record))
        .unwrap();
    reactor.call_later(Duration::from_millis(2), notes.noting("timer"));
    reactor.call_soon(|reactor| reactor.crash().unwrap());
    reactor.run().unwrap();
    assert!(!reactor.is_running());
    assert_eq!(reactor.stop(), Err(ReactorError::NotRunning));
    assert_eq!(record.summary(), ["made"]);
    assert_eq!(reactor.registered(), 1);

    // It goes on where it was.
    io::Write::write_all(&mut &theirs, b"abc").unwrap();
    reactor.call_later(Duration::from_millis(4), |reactor| reactor.stop().unwrap());
    reactor.run().unwrap();
    assert_eq!(notes.all(), ["timer", "shutdown", "shutdown", "shutdown"]);
    assert_eq!(record.summary(), ["made", "data 3", "lost reactor stopped"]);
    drop((reactor, theirs));
    ledger.assert_balanced();
}

#[test]
fn crash_in_the_startup_lets_no_further_trigger_run() {
    let _alone = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let notes = Notes::new();
    reactor.add_trigger(Phase::During, SystemEvent::Startup, |reactor| {
        reactor.crash().unwrap();
    });
    reactor.add_trigger(Phase::After, SystemEvent::Startup, notes.noting("after"));
    reactor.run().unwrap();
    assert_eq!(notes.len(), 0);
}

/// Contract R-05, W-38.
#[test]
fn reactor_runs_again_after_it_was_stopped() {
    let ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    for round in 0..3 {
        let (ours, theirs) = socketpair();
        let record = Record::default();
        reactor
            .adopt_unix_stream(ours.into(), Recorder::new(&record))
            .unwrap();
        io::Write::write_all(&mut &theirs, b"abc").unwrap();
        let watched = record.clone();
        fn stop_at_data(reactor: &mut Reactor, record: Record) {
            if record.data().is_empty() {
                reactor.call_soon(|reactor| stop_at_data(reactor, record));
            } else {
                reactor.stop().unwrap();
            }
        }
        reactor.call_soon(|reactor| stop_at_data(reactor, watched));
        reactor.run().unwrap();
        assert_eq!(
            record.summary(),
            ["made", "data 3", "lost reactor stopped"],
            "round {round}"
        );
        assert_eq!(reactor.registered(), 0);
    }
    drop(reactor);
    ledger.assert_balanced();
}

/// After a crash, and in a reactor that is turned without having been started,
/// the state said idle: a callback could start a loop inside the loop.
/// Contract R-05.
#[test]
fn run_and_start_are_refused_inside_every_callback() {
    let _alone = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let refusals = Notes::new();
    let try_to_run = {
        let refusals = refusals.clone();
        move |reactor: &mut Reactor| {
            refusals.push(matches!(reactor.run(), Err(RunError::AlreadyRunning)));
            refusals.push(reactor.start() == Err(ReactorError::AlreadyRunning));
            if reactor.crash().is_ok() {
                refusals.push(matches!(reactor.run(), Err(RunError::AlreadyRunning)));
                refusals.push(reactor.start() == Err(ReactorError::AlreadyRunning));
            }
        }
    };
    // Not started.
    reactor.call_soon(try_to_run.clone());
    reactor.turn(Some(Duration::ZERO));
    assert_eq!(refusals.len(), 2);
    // Running, then crashed.
    reactor.call_soon(try_to_run.clone());
    reactor.run().unwrap();
    assert_eq!(refusals.len(), 6);
    // In a trigger.
    reactor.add_trigger(Phase::Before, SystemEvent::Startup, try_to_run);
    reactor.run().unwrap();
    assert_eq!(refusals.len(), 10);
    assert!(refusals.all().iter().all(|is_refused| *is_refused));
}

/// The turn used to nest, with callbacks inside the callback.
#[test]
fn turn_inside_a_callback_does_nothing() {
    let _alone = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let notes = Notes::new();
    let first = notes.clone();
    reactor.call_soon(move |reactor| {
        let turns = reactor.statistics().turns;
        assert_eq!(reactor.turn(Some(Duration::ZERO)), Turn::Continue);
        assert_eq!(reactor.turn(None), Turn::Continue);
        assert_eq!(reactor.statistics().turns, turns);
        first.push("first");
    });
    let second = notes.clone();
    reactor.call_soon(move |reactor| {
        second.push("second");
        reactor.stop().unwrap();
    });
    reactor.add_trigger(Phase::Before, SystemEvent::Startup, |reactor| {
        reactor.turn(Some(Duration::ZERO));
    });
    reactor.run().unwrap();
    assert_eq!(notes.all(), ["first", "second"]);
    assert_eq!(reactor.statistics().panics, 0);
    // And it goes on to turn afterwards.
    reactor.call_soon(notes.noting("third"));
    assert_eq!(reactor.turn(Some(Duration::ZERO)), Turn::Stopped);
    assert_eq!(notes.len(), 3);
}

/// Contract W-38.
#[test]
fn several_reactors_live_in_one_process_and_one_runs_inside_another() {
    let ledger = DescriptorLedger::open();
    let mut outer = Reactor::new().unwrap();
    let notes = Notes::new();
    let seen = notes.clone();
    outer.call_soon(move |outer| {
        let mut inner = Reactor::new().unwrap();
        let token_of = |reactor: &mut Reactor| {
            let (ours, _) = socketpair();
            let record = Record::default();
            let handle = reactor.adopt_unix_stream(ours.into(), Recorder::new(&record));
            handle.unwrap()
        };
        token_of(&mut inner);
        inner.call_later(Duration::from_millis(1), seen.noting("inner"));
        inner.call_later(Duration::from_millis(2), |inner| inner.stop().unwrap());
        inner.run().unwrap();
        seen.push("outer");
        outer.stop().unwrap();
    });
    outer.run().unwrap();
    assert_eq!(notes.all(), ["inner", "outer"]);
    let threads: Vec<_> = (0..4)
        .map(|_| {
            std::thread::spawn(|| {
                let mut reactor = Reactor::new().unwrap();
                reactor.call_later(Duration::from_millis(3), |reactor| reactor.stop().unwrap());
                reactor.run().unwrap();
                reactor.statistics().timers
            })
        })
        .collect();
    for thread in threads {
        assert_eq!(thread.join().unwrap(), 1);
    }
    drop(outer);
    ledger.assert_balanced();
}

/// Contract R-34.
#[test]
fn nothing_is_left_when_a_reactor_is_dropped_in_the_middle() {
    let ledger = DescriptorLedger::open();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let kept = Rc::new(());
    {
        let mut reactor = Reactor::new().unwrap();
        let record = Record::default();
        let recorder = Recorder::new(&record);
        let for_factory = (Rc::clone(&kept), recorder);
        let factory = move |_: &bowline::Address| {
            let _ = &for_factory.0;
            for_factory.1.clone()
        };
        reactor
            .listen_tcp(([127, 0, 0, 1], 0).into(), factory.clone())
            .unwrap();
        reactor
            .listen_unix(bowline::UnixAddress::Path(path.clone()), factory.clone())
            .unwrap();
        reactor
            .connect_unix(bowline::UnixAddress::Path(path.clone()), factory)
            .unwrap();
        let _timer = reactor.call_later(DEADLINE, |_| {});
        run_until(&mut reactor, |_| record.summary().len() >= 2);
        let client = record.handle(0);
        reactor.get(client).unwrap().write(b"unsent");
        reactor.turn(Some(Duration::from_millis(1)));
    }
    assert_eq!(Rc::strong_count(&kept), 1);
    assert!(!path.exists());
    ledger.assert_balanced();
}

/// Waits with poll(2) for the reactor's descriptor and its next deadline, as a
/// foreign loop does.
fn turn_in_foreign_loop(reactor: &mut Reactor) -> u32 {
    let left = reactor
        .next_deadline()
        .map(|deadline| deadline.saturating_duration_since(Instant::now()));
    let timeout = left.unwrap_or(DEADLINE).min(DEADLINE);
    let timeout = Timespec {
        tv_sec: timeout.as_secs() as i64,
        tv_nsec: timeout.subsec_nanos().into(),
    };
    let mut watched = [PollFd::from_borrowed_fd(reactor.as_fd(), PollFlags::IN)];
    poll(&mut watched, Some(&timeout)).unwrap();
    let mut turns = 0;
    loop {
        reactor.turn(Some(Duration::ZERO));
        turns += 1;
        if reactor.is_idle() {
            return turns;
        }
    }
}

/// Contract R-44, with something to wait for and with nothing.
#[test]
fn turn_without_time_does_not_wait() {
    let _alone = DescriptorLedger::open();
    for is_waiting in [false, true] {
        let mut reactor = Reactor::new().unwrap();
        if is_waiting {
            reactor.call_later(DEADLINE * 2, |_| {});
        }
        assert!(reactor.is_idle());
        let (remote, began) = (reactor.remote(), Instant::now());
        // What would end it otherwise.
        let rescue = std::thread::spawn(move || {
            std::thread::park_timeout(DEADLINE / 2);
            remote.wake();
        });
        reactor.turn(Some(Duration::ZERO));
        assert!(began.elapsed() < DEADLINE / 2, "it waited");
        rescue.thread().unpark();
        rescue.join().unwrap();
    }
}

/// Contract R-44.
#[test]
fn foreign_loop_drives_sockets_timers_and_wakeups() {
    let ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    reactor.start().unwrap();
    assert_eq!(reactor.start(), Err(ReactorError::AlreadyRunning));
    let (ours, theirs) = socketpair();
    let record = Record::default();
    reactor
        .adopt_unix_stream(ours.into(), Recorder::new(&record))
        .unwrap();
    let began = Instant::now();
    let ran = Rc::new(Cell::new(None));
    let seen = Rc::clone(&ran);
    reactor.call_later(Duration::from_millis(30), move |_| {
        seen.set(Some(Instant::now()))
    });
    // A callback left something to do: it is not idle, so it is turned.
    assert!(!reactor.is_idle());
    reactor.turn(Some(Duration::ZERO));

    io::Write::write_all(&mut &theirs, &vec![7; 150_000]).unwrap();
    turn_in_foreign_loop(&mut reactor);
    assert_eq!(record.data().len(), 150_000);
    assert_eq!(ran.get(), None);

    let remote = reactor.remote();
    let woken = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let wakes = std::sync::Arc::clone(&woken);
    let thread = std::thread::spawn(move || {
        let call = move |_: &mut Reactor| wakes.store(true, std::sync::atomic::Ordering::SeqCst);
        remote.call_from_thread(call).unwrap();
    });
    let mut waits = 0;
    while !woken.load(std::sync::atomic::Ordering::SeqCst) || ran.get().is_none() {
        turn_in_foreign_loop(&mut reactor);
        waits += 1;
        assert!(waits < 20, "waits in vain");
    }
    thread.join().unwrap();
    assert!(ran.get().unwrap() - began >= Duration::from_millis(30));

    reactor.stop().unwrap();
    assert!(!reactor.is_idle());
    assert_eq!(reactor.turn(Some(Duration::ZERO)), Turn::Stopped);
    assert_eq!(record.summary().last().unwrap(), "lost reactor stopped");
    drop((reactor, theirs));
    ledger.assert_balanced();
}

/// It was overwritten at the end of the turn.
#[test]
fn limit_of_events_set_inside_a_callback_holds() {
    let _alone = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    reactor.call_soon(|reactor| {
        let limits = reactor.limits().events(1);
        reactor.set_limits(limits);
    });
    reactor.turn(Some(Duration::ZERO));
    let mut peers = Vec::new();
    let record = Record::default();
    for _ in 0..3 {
        let (ours, theirs) = socketpair();
        reactor
            .adopt_unix_stream(ours.into(), Recorder::new(&record))
            .unwrap();
        io::Write::write_all(&mut &theirs, b"x").unwrap();
        peers.push(theirs);
    }
    for turn in 1..=3 {
        reactor.turn(Some(Duration::ZERO));
        assert_eq!(record.data().len(), turn);
    }
}
