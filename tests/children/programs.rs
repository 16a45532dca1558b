//! Programs as they are.

use std::cell::{Cell, RefCell};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::rc::Rc;
use std::time::Duration;

use bowline::framing::{FrameContext, FrameReceiver, Framed, LineFramer};
use bowline::process::{ChildCommand, Pidfd, ProcessSettings};
use bowline::{ProducerKind, Reactor, Transport, Transports};
use rustix::process::{Pid, Signal, kill_process};

use crate::harness::{Script, assert_nothing_left, is_there, pattern, run, spawn};
use crate::support::{DescriptorLedger, is_missing, run_until, run_until_quiet};

/// Two filters in a row, with what the first writes going to the second no faster than
/// that takes it.
#[test]
fn a_pipeline_of_gzip_gives_every_byte_back() {
    let _ledger = DescriptorLedger::open();
    if is_missing("gzip", "gzip") {
        return;
    }
    let mut reactor = Reactor::new().unwrap();
    let sent = pattern(8_000_000);

    let script = Script::new();
    let unpacked = script.record();
    let mut command = Command::new("gzip");
    command.arg("-dc");
    let command = ChildCommand::new(command);
    let second = spawn(&mut reactor, command, script);
    let sink = reactor.get(second).unwrap().stream(0).unwrap();

    let all = Rc::new(RefCell::new(
        sent.chunks(100_000)
            .map(<[u8]>::to_vec)
            .rev()
            .collect::<Vec<_>>(),
    ));
    let most = Rc::new(Cell::new(0));
    let (pieces, seen) = (Rc::clone(&all), Rc::clone(&most));
    let script = Script::new()
        .made(move |cx| {
            let process = cx.process.handle();
            let sink = cx.get(sink).unwrap();
            sink.register_producer(process.into(), ProducerKind::Push)
                .unwrap();
            let stdin = cx.stream(0).unwrap();
            stdin
                .register_producer(bowline::ProducerRef::Protocol, ProducerKind::Pull)
                .unwrap();
        })
        .resumed(move |cx| match pieces.borrow_mut().pop() {
            Some(piece) => {
                let _ = cx.write(&piece);
            }
            None => cx.stream(0).unwrap().stop_consuming(),
        })
        .data(move |cx, number, data| {
            assert_eq!(number, 1, "{}", String::from_utf8_lossy(data));
            let sink = cx.get(sink).unwrap();
            let _ = sink.write(data);
            seen.set(seen.get().max(sink.unsent_bytes()));
        })
        .ended(move |cx| cx.get(sink).unwrap().stop_consuming());
    let packed = script.record();
    let mut command = Command::new("gzip");
    command.args(["-1", "-c"]);
    spawn(&mut reactor, ChildCommand::new(command), script);
    run_until(&mut reactor, |_| packed.is_over() && unpacked.is_over());
    assert!(all.borrow().is_empty());
    assert!(unpacked.data(1) == sent);
    assert!(packed.data(1).len() < sent.len());
    assert!(packed.statuses()[1].is_success() && unpacked.statuses()[1].is_success());
    let bound = 65_536 + reactor.transport_budgets().read_bytes;
    assert!(most.get() <= bound, "{}", most.get());
    assert_nothing_left(&reactor);
}

/// `cat` for everything, 32 of them at once, each with its own bytes.
#[test]
fn many_cats_at_once_mix_nothing_up() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let records: Vec<_> = (0..32_usize)
        .map(|number| {
            let mut data = pattern(100_000);
            data.rotate_left(number * 997);
            let sent = data.clone();
            let script = Script::new().made(move |cx| {
                let _ = cx.write(&sent);
                cx.close_stdin();
            });
            let record = script.record();
            spawn(&mut reactor, ChildCommand::new(Command::new("cat")), script);
            (record, data)
        })
        .collect();
    run_until(&mut reactor, |_| {
        records.iter().all(|(record, _)| record.is_over())
    });
    for (record, data) in records {
        assert!(record.data(1) == data);
    }
    assert_nothing_left(&reactor);
}

/// Lines of several children, told apart by who they are: what a supervisor does.
#[test]
fn a_supervisor_has_the_lines_of_each_of_its_children() {
    struct Lines(usize, Rc<RefCell<Vec<(usize, String)>>>);
    impl<T: Transport> FrameReceiver<T, LineFramer> for Lines {
        fn frame_received(&mut self, _: &mut FrameContext<'_, T, LineFramer>, line: &[u8]) {
            let line = String::from_utf8_lossy(line).into_owned();
            self.1.borrow_mut().push((self.0, line));
        }
    }
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let lines = Rc::new(RefCell::new(Vec::new()));
    let ended: Vec<_> = (0..8)
        .map(|number| {
            let script = Script::new();
            let record = script.record();
            let framer = LineFramer::with_delimiter(b"\n".as_slice());
            let receiver = Lines(number, Rc::clone(&lines));
            let child = format!("for i in 1 2 3; do echo {number}.$i; echo err >&2; done");
            let command = crate::harness::shell(&child).null(0).duplicate(2, 1);
            let command = command.read_from_with(1, Framed::new(framer, receiver));
            spawn(&mut reactor, command, script);
            record
        })
        .collect();
    run_until(&mut reactor, |_| {
        ended.iter().all(|record| record.is_over())
    });
    let lines = lines.take();
    for number in 0..8 {
        let own: Vec<_> = lines
            .iter()
            .filter(|it| it.0 == number)
            .map(|it| &*it.1)
            .collect();
        let [a, b, c] = [1, 2, 3].map(|i| format!("{number}.{i}"));
        assert_eq!(own, [&*a, "err", &b, "err", &c, "err"]);
    }
}

/// The parent says where it listens and exits; what goes on is its child, a daemon, which
/// is asked for its keys and told to end.
#[test]
fn ssh_agent_daemonizes() {
    let _ledger = DescriptorLedger::open();
    if is_missing("ssh-agent", "openssh-client") || is_missing("ssh-add", "openssh-client") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("agent");
    let mut command = Command::new("ssh-agent");
    command.arg("-s").arg("-a").arg(&socket);
    let settings = ProcessSettings::default().streams_after_exit(Some(Duration::from_secs(5)));
    let command = ChildCommand::new(command).null(0).settings(settings);
    let record = run(command, Script::new());
    assert!(record.statuses()[1].is_success(), "{}", record.text(2));
    let said = record.text(1);
    let variable = |name: &str| {
        let start = said.find(&format!("{name}=")).expect("it says it") + name.len() + 1;
        said[start..].split(';').next().unwrap().to_owned()
    };
    assert_eq!(variable("SSH_AUTH_SOCK"), socket.to_string_lossy());
    let pid: u32 = variable("SSH_AGENT_PID").parse().unwrap();
    assert!(is_there(pid));
    let mut reactor = Reactor::new().unwrap();
    let daemon = Pidfd::open(pid).unwrap();
    let ended = Rc::new(Cell::new(false));
    let told = Rc::clone(&ended);
    bowline::process::ChildWatch::start(&mut reactor, Box::new(daemon), move |_, _| told.set(true));
    // It is there, and has none.
    assert_eq!(keys(&socket).code(), Some(1));
    run_until_quiet(&mut reactor);
    assert!(!ended.get());
    kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), Signal::TERM).unwrap();
    run_until(&mut reactor, |_| ended.get());
    assert_nothing_left(&reactor);
}

/// Asks an agent for its keys.
fn keys(socket: &Path) -> ExitStatus {
    let mut command = Command::new("ssh-add");
    command.arg("-l").env("SSH_AUTH_SOCK", socket);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command.status().unwrap()
}

/// In the foreground it is an ordinary child, which removes its socket when it is asked to
/// end.
#[test]
fn ssh_agent_is_supervised() {
    let _ledger = DescriptorLedger::open();
    if is_missing("ssh-agent", "openssh-client") || is_missing("ssh-add", "openssh-client") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("agent");
    let mut reactor = Reactor::new().unwrap();
    let mut command = Command::new("ssh-agent");
    command.arg("-D").arg("-a").arg(&socket);
    let script = Script::new();
    let record = script.record();
    let command = ChildCommand::new(command).null(0).in_own_group();
    let process = spawn(&mut reactor, command, script);
    run_until(&mut reactor, |_| record.text(1).contains("SSH_AUTH_SOCK"));
    // Once it answers it minds signals.
    assert_eq!(keys(&socket).code(), Some(1));
    reactor
        .get(process)
        .unwrap()
        .terminate_within(Duration::from_secs(10));
    run_until(&mut reactor, |_| record.is_over());
    assert!(!socket.exists(), "it was not killed: {:?}", record.events());
    assert_nothing_left(&reactor);
}
