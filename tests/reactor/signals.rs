//! Signals as callbacks. What ends the process is tried in one of its own: the
//! test binary runs itself again, with only [`child`].

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::Duration;

use bowline::lifecycle::SystemEvent;
use bowline::{GracefulStop, Reactor, SignalHandler};
use rustix::process::Signal;

use crate::support::waiting::await_exit;
use crate::support::{DEADLINE, DescriptorLedger, run_until};
use crate::{Notes, PANIC};

const CASE: &str = "BOWLINE_TEST_SIGNALS";

/// Sends it to this very thread: its handler has run when this returns. One sent to
/// the process may be handled by another thread, any time later.
fn raise(signal: Signal) {
    signal_hook::low_level::raise(signal.as_raw()).unwrap();
}

/// Runs one case of [`child`] in a process of its own.
fn run_child(case: &str) -> ExitStatus {
    // Its pipes would be seen by tests in other threads.
    let _alone = DescriptorLedger::open();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "signals::child", "--nocapture"])
        .env(CASE, case)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    await_exit(&mut child, DEADLINE)
}

/// Fails the case unless the process has ended by then.
fn await_death() -> ! {
    thread::sleep(DEADLINE / 2);
    panic!("survived the signal");
}

#[test]
fn child() {
    let Ok(case) = std::env::var(CASE) else {
        return;
    };
    let mut reactor = Reactor::new().unwrap();
    match case.as_str() {
        "stop" | "stop, then default" => {
            reactor.stop_on_signals().unwrap();
            reactor.call_when_running(|_| raise(Signal::TERM));
            reactor.run().unwrap();
            if case != "stop" {
                raise(Signal::TERM);
                await_death();
            }
        }
        "held, then again" => {
            reactor.stop_on_signals().unwrap();
            let hold = reactor.hold(SystemEvent::Shutdown);
            // Two in one turn are one wish.
            reactor.call_when_running(|_| {
                raise(Signal::TERM);
                raise(Signal::INT);
            });
            reactor.start().unwrap();
            run_until(&mut reactor, |reactor| reactor.is_stopping());
            for _ in 0..10 {
                reactor.turn(Some(Duration::from_millis(1)));
            }
            assert!(reactor.is_stopping());
            raise(Signal::TERM);
            run_until(&mut reactor, |reactor| !reactor.is_running());
            drop(hold);
        }
        "within" => {
            let how = GracefulStop::new().deadline(Duration::from_millis(20));
            reactor.stop_on_signals_with(how).unwrap();
            let hold = reactor.hold(SystemEvent::Shutdown);
            reactor.call_when_running(|_| raise(Signal::INT));
            reactor.run().unwrap();
            drop(hold);
        }
        "removed, then default" => {
            let handler = reactor
                .on_signals(&[Signal::TERM.as_raw()], |_, _| {})
                .unwrap();
            reactor.remove_signal_handler(handler);
            reactor.turn(Some(Duration::ZERO));
            raise(Signal::TERM);
            await_death();
        }
        "dropped, then default" => {
            reactor
                .on_signals(&[Signal::TERM.as_raw()], |_, _| {})
                .unwrap();
            drop(reactor);
            raise(Signal::TERM);
            await_death();
        }
        "refused, then default" => {
            assert!(
                reactor
                    .on_signals(&[Signal::TERM.as_raw(), 4_000], |_, _| {})
                    .is_err()
            );
            raise(Signal::TERM);
            await_death();
        }
        "before the run" => {
            let notes = Notes::new();
            let seen = notes.clone();
            let signals = [Signal::TERM.as_raw()];
            reactor
                .on_signals(&signals, move |reactor, _| {
                    seen.push("handled");
                    reactor.stop().unwrap();
                })
                .unwrap();
            raise(Signal::TERM);
            assert_eq!(notes.len(), 0, "a callback comes from the loop");
            let started = notes.clone();
            reactor.call_when_running(move |_| started.push("started"));
            reactor.run().unwrap();
            assert_eq!(notes.all(), ["started", "handled"]);
        }
        "nothing by itself" => {
            let before = caught();
            let seen = Notes::new();
            let during = seen.clone();
            // Whatever a loop has: calls, threads, a wake-up.
            let remote = reactor.remote();
            thread::spawn(move || remote.call_from_thread(|_| {}))
                .join()
                .unwrap()
                .unwrap();
            reactor.call_later(Duration::from_millis(1), move |reactor| {
                during.push(caught());
                reactor.stop().unwrap();
            });
            reactor.run().unwrap();
            assert_eq!(seen.all(), std::slice::from_ref(&before));
            assert_eq!(caught(), before);
            raise(Signal::TERM);
            await_death();
        }
        "installed anew" => {
            let notes = Notes::new();
            for round in 0..3 {
                let seen = notes.clone();
                let handler = reactor
                    .on_signals(&[Signal::TERM.as_raw()], move |_, _| seen.push(round))
                    .unwrap();
                raise(Signal::TERM);
                run_until(&mut reactor, |_| notes.len() > round);
                reactor.remove_signal_handler(handler);
                reactor.turn(Some(Duration::ZERO));
            }
            assert_eq!(notes.all(), [0, 1, 2]);
        }
        "one of two removed" => {
            let notes = Notes::new();
            let (seen, kept) = (notes.clone(), notes.clone());
            let signals = [Signal::TERM.as_raw()];
            let removed = reactor
                .on_signals(&signals, move |_, _| seen.push("removed"))
                .unwrap();
            let mut other = Reactor::new().unwrap();
            other
                .on_signals(&signals, move |_, _| kept.push("kept"))
                .unwrap();
            reactor.remove_signal_handler(removed);
            reactor.turn(Some(Duration::ZERO));
            raise(Signal::TERM);
            run_until(&mut other, |_| notes.len() == 1);
            assert_eq!(notes.all(), ["kept"]);
        }
        other => panic!("no case {other}"),
    }
}

/// Contract R-41.
#[test]
fn signal_is_a_callback_with_its_number() {
    let ledger = DescriptorLedger::alone();
    let mut reactor = Reactor::new().unwrap();
    let notes = Notes::new();
    let seen = notes.clone();
    let signals = [Signal::USR1.as_raw(), Signal::USR2.as_raw()];
    let handler: SignalHandler = reactor
        .on_signals(&signals, move |_, signal| seen.push(signal))
        .unwrap();
    for signal in [Signal::USR1, Signal::USR2, Signal::USR1] {
        let before = notes.len();
        raise(signal);
        run_until(&mut reactor, |_| notes.len() > before);
        assert_eq!(notes.all().last(), Some(&signal.as_raw()));
    }
    assert_eq!(notes.len(), 3);
    reactor.remove_signal_handler(handler);
    reactor.turn(Some(Duration::ZERO));
    assert_eq!(reactor.registered(), 0);
    drop(reactor);
    ledger.assert_balanced();
}

#[test]
fn failing_handler_is_called_for_the_next_signal_too() {
    let _alone = DescriptorLedger::alone();
    let mut reactor = Reactor::new().unwrap();
    let notes = Notes::new();
    let seen = notes.clone();
    reactor
        .on_signals(&[Signal::USR1.as_raw()], move |_, signal| {
            seen.push(signal);
            panic!("{PANIC}");
        })
        .unwrap();
    for count in 1..=2 {
        raise(Signal::USR1);
        run_until(&mut reactor, |_| notes.len() == count);
    }
}

#[test]
fn signal_wakes_a_loop_that_waits_without_end() {
    let _alone = DescriptorLedger::alone();
    let mut reactor = Reactor::new().unwrap();
    reactor
        .on_signals(&[Signal::USR2.as_raw()], |reactor, _| {
            reactor.stop().unwrap()
        })
        .unwrap();
    let sender = thread::spawn(|| raise(Signal::USR2));
    reactor.run().unwrap();
    sender.join().unwrap();
    assert_eq!(reactor.registered(), 0);
}

/// Contract R-41.
#[test]
fn term_stops_the_loop_in_an_orderly_way() {
    assert!(run_child("stop").success());
}

/// The signals that this process handles, a bit for each.
fn caught() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let caught = status.lines().find(|line| line.starts_with("SigCgt"));
    caught.unwrap().to_owned()
}

/// Contract R-42: from the call on, before the loop runs too; the callback itself comes
/// from the loop. Running installs nothing.
#[test]
fn handler_is_there_from_the_call_on_and_none_without_one() {
    let status = run_child("before the run");
    assert!(status.success(), "{status}");
    let status = run_child("nothing by itself");
    assert_eq!(status.signal(), Some(Signal::TERM.as_raw()), "{status}");
}

#[test]
fn second_signal_or_the_deadline_ends_what_a_hold_keeps() {
    assert!(run_child("held, then again").success());
    assert!(run_child("within").success());
}

/// Contract W-39.
#[test]
fn signal_has_its_default_effect_after_its_handler_is_gone() {
    for case in [
        "stop, then default",
        "removed, then default",
        "dropped, then default",
        "refused, then default",
    ] {
        let status = run_child(case);
        assert_eq!(
            status.signal(),
            Some(Signal::TERM.as_raw()),
            "{case}: {status}"
        );
    }
}

/// The default effect of the handler removed first stayed, and killed the
/// process although another handler had been installed since.
#[test]
fn handler_installed_after_another_was_removed_gets_the_signal() {
    for case in ["installed anew", "one of two removed"] {
        let status = run_child(case);
        assert!(status.success(), "{case}: {status}");
    }
}

#[test]
fn numbers_of_signals_are_those_of_the_system() {
    use bowline::signal;
    use rustix::process::Signal;

    for (ours, theirs) in [
        (signal::SIGHUP, Signal::HUP),
        (signal::SIGINT, Signal::INT),
        (signal::SIGQUIT, Signal::QUIT),
        (signal::SIGUSR1, Signal::USR1),
        (signal::SIGUSR2, Signal::USR2),
        (signal::SIGALRM, Signal::ALARM),
        (signal::SIGTERM, Signal::TERM),
        (signal::SIGCHLD, Signal::CHILD),
        (signal::SIGCONT, Signal::CONT),
        (signal::SIGKILL, Signal::KILL),
        (signal::SIGSTOP, Signal::STOP),
        (signal::SIGTSTP, Signal::TSTP),
        (signal::SIGWINCH, Signal::WINCH),
    ] {
        assert_eq!(ours, theirs.as_raw());
    }
}
