//! What a process protocol is told, and in which order.

use std::cell::RefCell;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::time::{Duration, Instant};

use bowline::error::CallError;
use bowline::process::{RunningChild, SignalError};
use bowline::signal::{SIGCONT, SIGHUP, SIGINT, SIGKILL, SIGSTOP, SIGTERM};
use bowline::{Reactor, Transports};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

use crate::harness::{Script, assert_nothing_left, is_there, run, sh, shell, spawn, stream};
use crate::support::{DescriptorLedger, run_until, run_until_quiet};

///
#[test]
fn a_child_has_three_pipes_and_its_protocol_is_told_in_order() {
    let _ledger = DescriptorLedger::open();
    let script = Script::new().made(|cx| {
        let numbers: Vec<u32> = cx.process.streams().iter().map(|it| it.0).collect();
        assert_eq!(numbers, [0, 1, 2]);
        assert!(!cx.process.has_exited());
        let _ = cx.write(b"in");
        assert!(cx.close_stdin());
    });
    let record = run(shell("cat; echo err >&2; exit 0"), script);
    assert_eq!(
        (record.text(1), record.text(2)),
        ("in".into(), "err\n".into())
    );
    let events = record.events();
    assert_eq!(events.len(), 6, "{events:?}");
    assert_eq!(events[0], "made");
    assert_eq!(events[5], "ended, exited with code 0");
    for event in [
        "lost 0, closed cleanly",
        "lost 1, closed cleanly",
        "lost 2, closed cleanly",
        "exited, exited with code 0",
    ] {
        assert_eq!(record.count(event), 1, "{event} in {events:?}");
    }
}

/// none of it is called before the call that starts it returns, and nothing comes
/// before its beginning, though it was read before.
#[test]
fn nothing_is_told_before_the_beginning() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    // Its notifications do not come in the turn in which they are asked for.
    let mut limits = reactor.limits();
    limits.notifications = 1;
    reactor.set_limits(limits);
    let script = Script::new();
    let record = script.record();
    spawn(&mut reactor, shell("echo much >&2; echo more"), script);
    assert_eq!(record.events(), [""; 0]);
    run_until(&mut reactor, |_| record.is_over());
    assert_eq!(record.events()[0], "made");
    assert_eq!(
        (record.text(1), record.text(2)),
        ("more\n".into(), "much\n".into())
    );
}

/// what a child leaves behind keeps its output open, and writes on.
#[test]
fn the_exit_is_told_when_it_happens_and_the_end_when_the_streams_have_ended() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let script = Script::new();
    let record = script.record();
    // The descendant waits for our end of its input.
    let command = shell("exec 3<&0; { cat <&3; echo last; } & exit 7").null(2);
    let process = spawn(&mut reactor, command, script);
    run_until(&mut reactor, |_| record.has_exited());
    run_until_quiet(&mut reactor);
    assert_eq!(record.events(), ["made", "exited, exited with code 7"]);
    let _ = stream(&mut reactor, process, 0).write(b"first ");
    stream(&mut reactor, process, 0).lose_connection();
    run_until(&mut reactor, |_| record.is_over());
    assert_eq!(record.text(1), "first last\n");
    let events = record.events();
    assert_eq!(events.len(), 5, "{events:?}");
    assert_eq!(events[4], "ended, exited with code 7");
    assert!(reactor.get(process).is_none());
    assert_nothing_left(&reactor);
}

///
#[test]
fn a_code_or_a_signal_is_how_it_ended_and_never_both() {
    let _ledger = DescriptorLedger::open();
    for (script, code, signal) in [
        ("exit 0", Some(0), None),
        ("exit 1", Some(1), None),
        ("exit 255", Some(255), None),
        ("kill -TERM $$", None, Some(SIGTERM)),
        ("kill -KILL $$", None, Some(SIGKILL)),
    ] {
        let statuses = run(shell(script), Script::new()).statuses();
        assert_eq!(statuses.len(), 2, "{script}");
        for status in statuses {
            assert_eq!((status.code(), status.signal()), (code, signal), "{script}");
            assert_eq!(status.is_success(), code == Some(0), "{script}");
        }
    }
}

/// Waits for the state of a child that proc_pid_stat(5) calls by this letter.
#[track_caller]
fn wait_for_state(pid: u32, state: char) {
    let began = Instant::now();
    loop {
        let status = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        if status.contains(&format!(") {state} ")) {
            return;
        }
        assert!(began.elapsed() < Duration::from_secs(10), "{status}");
        std::thread::yield_now();
    }
}

/// Has a child that stops itself run to its end.
#[track_caller]
fn go_on(pid: u32) {
    wait_for_state(pid, 'T');
    let pid = Pid::from_raw(pid.cast_signed()).unwrap();
    kill_process(pid, Signal::CONT).unwrap();
}

/// it has exited before the loop runs.
#[test]
fn a_child_that_was_quick_is_waited_for_when_the_loop_runs() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let script = Script::new();
    let record = script.record();
    // It stops itself, so that it does not exit before it is watched.
    let process = spawn(
        &mut reactor,
        shell("kill -STOP $$; exit 3").null(0).null(1).null(2),
        script,
    );
    let pid = reactor.get(process).unwrap().pid();
    go_on(pid);
    wait_for_state(pid, 'Z');
    assert_eq!(record.events(), [""; 0]);
    run_until(&mut reactor, |_| record.is_over());
    let told = [
        "made",
        "exited, exited with code 3",
        "ended, exited with code 3",
    ];
    assert_eq!(record.events(), told);
    assert!(!is_there(pid), "it was waited for");
}

/// by the time that the exit is told, nothing waits for it any more, and it is no
/// zombie.
#[test]
fn a_child_was_waited_for_when_its_exit_is_told() {
    let _ledger = DescriptorLedger::open();
    let script = Script::new().exited(|cx| {
        assert!(!is_there(cx.process.pid()), "a zombie");
    });
    let record = run(shell("exit 0"), script);
    assert_eq!(record.count("exited"), 1);
}

/// as quiet as that, but that the end is told: how it ended is known since Linux
/// 6.15.
#[test]
fn a_child_that_somebody_else_has_waited_for_has_ended() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let script = Script::new();
    let record = script.record();
    let process = spawn(&mut reactor, shell("kill -STOP $$; exit 5"), script);
    let pid = reactor.get(process).unwrap().pid();
    go_on(pid);
    let pid = Pid::from_raw(pid.cast_signed()).unwrap();
    waitpid(Some(pid), WaitOptions::empty()).unwrap().unwrap();
    run_until(&mut reactor, |_| record.is_over());
    let end = record.events().pop().unwrap();
    let ends = [
        "ended, exited with code 5",
        "ended, exited, and nobody can tell how",
    ];
    assert!(ends.contains(&&*end), "{end}");
    assert_eq!((record.count("exited"), record.count("ended")), (1, 1));
    assert_nothing_left(&reactor);
}

/// each of the callbacks; the end is told all the same, once.
#[test]
fn a_callback_that_panics_costs_the_streams_and_not_the_end() {
    let ledger = DescriptorLedger::open();
    for place in ["made", "data", "lost", "exited", "ended"] {
        let script = Script::new();
        let record = script.record();
        let script = match place {
            "made" => script.made(|_| panic!("on purpose")),
            "data" => script.data(|_, _, _| panic!("on purpose")),
            "lost" => script.lost(|_| panic!("on purpose")),
            "exited" => script.exited(|_| panic!("on purpose")),
            _ => script.ended(|_| panic!("on purpose")),
        };
        let mut reactor = Reactor::new().unwrap();
        let process = spawn(&mut reactor, shell("echo some; cat"), script);
        if !matches!(place, "made" | "data") {
            run_until(&mut reactor, |_| record.text(1) == "some\n");
            stream(&mut reactor, process, 0).lose_connection();
        }
        // Without its streams the child ends by itself.
        run_until(&mut reactor, |_| record.is_over());
        run_until(&mut reactor, |reactor| reactor.registered() == 0);
        assert!(reactor.statistics().panics > 0, "{place}");
        assert_eq!(record.statuses().len(), 2, "{place}");
        assert_nothing_left(&reactor);
    }
    ledger.assert_balanced();
}

/// by the process's descriptor; a stopped child is none that has exited.
#[test]
fn signals_reach_a_child_until_it_has_exited() {
    let _ledger = DescriptorLedger::open();
    for signal in [SIGHUP, SIGINT, SIGKILL, SIGTERM] {
        let mut reactor = Reactor::new().unwrap();
        let refused = Rc::new(RefCell::new(Vec::new()));
        let (at_exit, at_end) = (Rc::clone(&refused), Rc::clone(&refused));
        let script = Script::new()
            .exited(move |cx| at_exit.borrow_mut().push(cx.process.signal_process(SIGHUP)))
            .ended(move |cx| at_end.borrow_mut().push(cx.process.kill()));
        let record = script.record();
        let process = spawn(&mut reactor, shell("echo; exec cat"), script);
        run_until(&mut reactor, |_| !record.data(1).is_empty());
        let transport = reactor.get(process).unwrap();
        transport.signal_process(SIGSTOP).unwrap();
        transport.signal_process(SIGCONT).unwrap();
        transport.signal_process(0).unwrap();
        assert!(matches!(
            transport.signal_process(999),
            Err(SignalError::Os(error)) if error.kind() == std::io::ErrorKind::InvalidInput
        ));
        assert!(matches!(
            transport.signal_group(SIGCONT),
            Err(SignalError::NoGroup)
        ));
        transport.signal_process(signal).unwrap();
        run_until(&mut reactor, |_| record.is_over());
        assert_eq!(record.statuses()[0].signal(), Some(signal));
        let refused = refused.take();
        assert_eq!(refused.len(), 2);
        for refusal in refused {
            assert!(matches!(refusal, Err(SignalError::ExitedAlready)));
        }
    }
}

/// Of its own program: std's child with its pipes, and one without any.
#[test]
fn a_child_that_std_has_started_is_adopted() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let mut command = sh("cat; exit 4");
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let child = command.spawn().unwrap();
    let script = Script::new().made(|cx| {
        let _ = cx.write(b"twice");
        cx.close_stdin();
    });
    let record = script.record();
    reactor.adopt_process(child.into(), script).unwrap();
    run_until(&mut reactor, |_| record.is_over());
    assert_eq!(
        (record.text(1), record.statuses()[1].code()),
        ("twice".into(), Some(4))
    );

    let script = Script::new();
    let record = script.record();
    let mut command = sh("exec cat >&2");
    command.stdin(Stdio::piped()).process_group(0);
    let mut child = command.spawn().unwrap();
    let _input = child.stdin.take();
    let running = RunningChild::new(child).leads_group();
    let process = reactor.adopt_process(running, script).unwrap();
    run_until_quiet(&mut reactor);
    assert_eq!(record.events(), ["made"]);
    reactor.get(process).unwrap().signal_group(SIGTERM).unwrap();
    run_until(&mut reactor, |_| record.is_over());
    assert_eq!(record.statuses()[1].signal(), Some(SIGTERM));
    assert_nothing_left(&reactor);
}

/// As that of a connection is.
#[test]
fn a_protocol_is_called_from_elsewhere_by_its_type() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let script = Script::new();
    let record = script.record();
    let process = spawn(&mut reactor, shell("cat"), script);
    let errors: Rc<RefCell<Vec<CallError>>> = Rc::default();
    let log = |errors: &Rc<RefCell<Vec<CallError>>>| {
        let errors = Rc::clone(errors);
        move |_: &mut Reactor, error| errors.borrow_mut().push(error)
    };
    reactor.call_process_protocol::<String>(process, |_, _| panic!("another"), log(&errors));
    reactor.call_process_protocol::<Script>(
        process,
        |_, cx| {
            let _ = cx.write(b"called");
            cx.close_stdin();
        },
        log(&errors),
    );
    run_until(&mut reactor, |_| record.is_over());
    assert_eq!(record.text(1), "called");
    reactor.call_process_protocol::<Script>(process, |_, _| panic!("gone"), log(&errors));
    run_until_quiet(&mut reactor);
    assert_eq!(errors.take(), [CallError::WrongProtocol, CallError::Lost]);
}

/// They are reaped in whatever order they end, each by itself: W-65.
#[test]
fn many_end_in_any_order_and_nothing_is_left_of_them() {
    let ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let mut all = Vec::new();
    for number in 0..20 {
        let script = Script::new();
        let record = script.record();
        let command = Command::new("cat");
        let command = bowline::process::ChildCommand::new(command);
        all.push((number, spawn(&mut reactor, command, script), record));
    }
    // Another child, which is not ours to wait for.
    let mut other = Command::new("true").spawn().unwrap();
    let pids: Vec<u32> = all
        .iter()
        .map(|(_, process, _)| reactor.get(*process).unwrap().pid())
        .collect();
    // Every third from the end is killed, the others come to their end.
    for (number, process, _) in all.iter().rev() {
        match number % 3 {
            0 => reactor.get(*process).unwrap().kill().unwrap(),
            _ => stream(&mut reactor, *process, 0).lose_connection(),
        }
    }
    run_until(&mut reactor, |_| {
        all.iter().all(|(_, _, record)| record.is_over())
    });
    for (number, _, record) in &all {
        let signal = (number % 3 == 0).then_some(SIGKILL);
        let statuses = record.statuses();
        assert_eq!(statuses.len(), 2);
        assert_eq!(statuses[1].signal(), signal, "{number}");
    }
    assert_nothing_left(&reactor);
    assert!(pids.into_iter().all(|pid| !is_there(pid)), "zombies");
    assert!(other.wait().unwrap().success(), "it was left to us");
    drop(reactor);
    ledger.assert_balanced();
}

/// With the reactor; the child goes on, unless it was said otherwise.
#[test]
fn a_stop_of_the_reactor_is_the_end_of_what_is_told() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let script = Script::new();
    let record = script.record();
    let process = spawn(&mut reactor, shell("cat; exec sleep 100"), script);
    let pid = reactor.get(process).unwrap().pid();
    reactor.call_later(Duration::from_millis(1), |reactor| reactor.stop().unwrap());
    reactor.run().unwrap();
    let events = record.events();
    let first = ["made"];
    assert_eq!(events[..1], first);
    assert_eq!(record.count("lost"), 3, "{events:?}");
    assert_eq!(record.count("exited"), 0, "{events:?}");
    let last = "ended, the reactor stopped before it exited";
    assert_eq!(events.last().unwrap(), last);
    assert!(is_there(pid), "it goes on");
    let pid = Pid::from_raw(pid.cast_signed()).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
    waitpid(Some(pid), WaitOptions::empty()).unwrap();
}
