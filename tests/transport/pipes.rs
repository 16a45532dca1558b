//! Connections on what is no socket. What they have in common with all others is the
//! suite's to show (`stream`).

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixDatagram, UnixStream as StdUnixStream};
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::time::Duration;

use bowline::error::AdoptErrorKind;
use bowline::{
    Detached, FileAddress, Pipe, PipeStream, Reactor, TransportHandle, Transports, WriteStatus,
};
use rustix::fs::{CWD, FileType, Mode, OFlags, fcntl_getfl, fcntl_setfl, mknodat};
use rustix::pipe::{PipeFlags, pipe_with};
use tempfile::TempDir;

use crate::harness::{Script, pattern, raw_terminal, terminal};
use crate::support::{DescriptorLedger, Record, is_missing, run_until, run_until_quiet};

fn pipe() -> (OwnedFd, OwnedFd) {
    let (reading, writing) = io::pipe().unwrap();
    (reading.into(), writing.into())
}

fn fifo() -> (TempDir, std::path::PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("fifo");
    mknodat(CWD, &path, FileType::Fifo, Mode::RWXU, 0).unwrap();
    (directory, path)
}

/// Opens for reading and writing, so that opening waits for nobody.
fn open_both(path: &std::path::Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

fn open_to_read(path: &std::path::Path) -> File {
    let nonblocking = OFlags::NONBLOCK.bits().cast_signed();
    let mut options = File::options();
    options.read(true).custom_flags(nonblocking);
    options.open(path).unwrap()
}

fn adopt(reactor: &mut Reactor, fd: impl Into<OwnedFd>, script: Script) -> TransportHandle {
    reactor.adopt(Pipe, fd.into(), script).unwrap()
}

#[track_caller]
fn write(reactor: &mut Reactor, handle: TransportHandle, data: &[u8]) -> WriteStatus {
    reactor.get(handle).expect("connected").write(data)
}

/// X-25, X-26.
#[test]
fn a_reading_end_refuses_writes_and_ends_with_its_last_writer() {
    let ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let (reading, writing) = pipe();
    let script = Script::new().keep_writing();
    let record = script.record();
    let handle = adopt(&mut reactor, reading, script);
    assert_eq!(
        write(&mut reactor, handle, b"where to?"),
        WriteStatus::Refused
    );
    let mut writing = File::from(writing);
    let other = writing.try_clone().unwrap();
    writing.write_all(b"some").unwrap();
    drop(writing);
    run_until(&mut reactor, |_| record.data() == b"some");
    run_until_quiet(&mut reactor);
    assert!(!record.is_lost());
    drop(other);
    // There is nothing to go on with, whatever the protocol would.
    run_until(&mut reactor, |_| record.is_lost());
    assert_eq!(
        record.summary(),
        ["made", "data 4", "read closed", "lost closed cleanly"]
    );
    drop(reactor);
    ledger.assert_balanced();
}

#[test]
fn a_writing_end_closes_its_half_and_with_that_ends() {
    let ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let (reading, writing) = pipe();
    let script = Script::new();
    let record = script.record();
    let handle = adopt(&mut reactor, writing, script);
    let sent = pattern(1 << 20);
    assert_eq!(write(&mut reactor, handle, &sent), WriteStatus::Full);
    reactor.get(handle).unwrap().lose_write_connection();
    run_until_quiet(&mut reactor);
    assert_eq!(record.summary(), ["made"]);
    let mut received = Vec::new();
    let mut reading = File::from(reading);
    let mut buffer = vec![0; 65_536];
    while received.len() < sent.len() {
        let count = reading.read(&mut buffer).unwrap();
        received.extend_from_slice(&buffer[..count]);
        reactor.turn(Some(Duration::ZERO));
    }
    assert!(received == sent);
    run_until(&mut reactor, |_| record.is_lost());
    assert_eq!(
        record.summary(),
        ["made", "write closed", "lost closed cleanly"]
    );
    assert_eq!(reading.read(&mut buffer).unwrap(), 0);
    drop((reactor, reading));
    ledger.assert_balanced();
}

/// X-18: nothing was written for a long time. Of a pair, what has come is delivered.
#[test]
fn the_loss_of_the_reader_is_told_without_a_write() {
    let ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let (reading, writing) = pipe();
    let script = Script::new();
    let record = script.record();
    adopt(&mut reactor, writing, script);
    run_until_quiet(&mut reactor);
    drop(reading);
    run_until(&mut reactor, |_| record.is_lost());
    assert_eq!(record.summary(), ["made", "lost connection lost"]);

    let (reading, theirs) = pipe();
    let (their_reading, writing) = pipe();
    let script = Script::new().made(|cx| cx.transport.pause_producing());
    let record = script.record();
    let pair = reactor
        .adopt(Pipe::pair(), (reading, writing), script)
        .unwrap();
    let mut theirs = File::from(theirs);
    theirs.write_all(b"before").unwrap();
    run_until_quiet(&mut reactor);
    drop(their_reading);
    run_until_quiet(&mut reactor);
    assert_eq!(record.summary(), ["made", "broken reading"]);
    assert_eq!(write(&mut reactor, pair, b"no"), WriteStatus::Refused);
    reactor.get(pair).unwrap().resume_producing();
    run_until(&mut reactor, |_| record.is_lost());
    assert_eq!(record.data(), b"before");
    drop((reactor, theirs));
    ledger.assert_balanced();
}

/// W-66: with the flag, without it, read and full. A call that would block holds the
/// test up.
#[test]
fn o_nonblock_is_neither_changed_nor_relied_upon() {
    let ledger = DescriptorLedger::open();
    for is_set in [false, true] {
        let (directory, path) = fifo();
        let (master, other) = raw_terminal();
        let (held, held_terminal) = raw_terminal();
        let (near, far) = StdUnixStream::pair().unwrap();
        let (one, two) = (pipe(), pipe());
        let both: Vec<OwnedFd> = vec![master, held_terminal.into(), near.into()];
        let ends = vec![one.0, open_to_read(&path).into()];
        let full = vec![two.1, open_both(&path).into()];
        let mut reactor = Reactor::new().unwrap();
        let copies: Vec<_> = [&both, &ends, &full]
            .into_iter()
            .flatten()
            .map(|fd| fd.try_clone().unwrap())
            .collect();
        let set = |fd: &OwnedFd| {
            let flags = fcntl_getfl(fd).unwrap();
            let flags = match is_set {
                true => flags | OFlags::NONBLOCK,
                false => flags - OFlags::NONBLOCK,
            };
            fcntl_setfl(fd, flags).unwrap();
        };
        copies.iter().for_each(set);
        let flags = || copies.iter().map(|fd| fcntl_getfl(fd).unwrap());
        let before: Vec<_> = flags().collect();
        for fd in ends {
            reactor.adopt(Pipe::reading(), fd, Script::new()).unwrap();
        }
        for fd in full.into_iter() {
            let handle = reactor.adopt(Pipe::writing(), fd, Script::new()).unwrap();
            let _ = write(&mut reactor, handle, &vec![1; 1 << 20]);
        }
        for fd in both {
            let handle = adopt(&mut reactor, fd, Script::new());
            let _ = write(&mut reactor, handle, &vec![1; 1 << 20]);
        }
        run_until_quiet(&mut reactor);
        assert_eq!(flags().collect::<Vec<_>>(), before, "while it goes on");
        drop(reactor);
        assert_eq!(flags().collect::<Vec<_>>(), before, "afterwards");
        drop((copies, one.1, two.0, other, held, far, directory));
    }
    ledger.assert_balanced();
}

#[test]
fn a_fifo_ends_with_its_writers_and_not_before_the_first() {
    let ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let (directory, path) = fifo();
    let script = Script::new();
    let record = script.record();
    let handle = adopt(&mut reactor, open_to_read(&path), script);
    let peer = reactor.get(handle).unwrap().peer();
    let known = peer.as_file().and_then(FileAddress::as_path);
    assert_eq!(known, Some(&*path.canonicalize().unwrap()));
    run_until_quiet(&mut reactor);
    assert_eq!(record.summary(), ["made"], "nobody has opened it");
    let mut first = File::options().write(true).open(&path).unwrap();
    first.write_all(b"one ").unwrap();
    run_until(&mut reactor, |_| record.data() == b"one ");
    // The hang-up is taken back before it was noticed.
    drop(first);
    let mut second = File::options().write(true).open(&path).unwrap();
    second.write_all(b"two").unwrap();
    run_until(&mut reactor, |_| record.data() == b"one two");
    run_until_quiet(&mut reactor);
    assert!(!record.is_lost());
    drop(second);
    run_until(&mut reactor, |_| record.is_lost());

    // With a writing end of our own it has no end.
    let script = Script::new();
    let record = script.record();
    let own = open_both(&path).into();
    reactor.adopt(Pipe::reading(), own, script).unwrap();
    for _ in 0..3 {
        let mut writer = File::options().write(true).open(&path).unwrap();
        writer.write_all(b"x").unwrap();
        drop(writer);
        run_until_quiet(&mut reactor);
    }
    assert_eq!(record.data(), b"xxx");
    assert!(!record.is_lost());
    drop((reactor, directory));
    ledger.assert_balanced();
}

/// Each read takes one packet, and the poller says so once.
#[test]
fn packets_of_a_pipe_are_all_read() {
    let ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let (reading, writing) = pipe_with(PipeFlags::DIRECT | PipeFlags::CLOEXEC).unwrap();
    for _ in 0..5 {
        rustix::io::write(&writing, b"packet").unwrap();
    }
    let script = Script::new();
    let record = script.record();
    adopt(&mut reactor, reading, script);
    run_until_quiet(&mut reactor);
    assert_eq!(record.pieces(), [6; 5]);
    drop((reactor, writing));
    ledger.assert_balanced();
}

/// R-35, W-40, M-10: epoll takes none of these.
#[test]
fn files_are_always_ready_and_take_no_more_than_their_turn() {
    let ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let all = pattern(4 << 20);
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&all).unwrap();
    io::Seek::rewind(&mut file).unwrap();
    let turns = Rc::new(Cell::new(0));
    let script = Script::new();
    let record = script.record();
    let handle = adopt(&mut reactor, file, script);
    while !record.is_lost() {
        let seen = Rc::clone(&turns);
        reactor.call_soon(move |_| seen.set(seen.get() + 1));
        let before = record.data().len();
        reactor.turn(Some(Duration::ZERO));
        let budget = reactor.transport_budgets().read_bytes + 65_536;
        assert!(record.data().len() - before <= budget);
    }
    assert!(record.data() == all, "not all arrived");
    assert!(turns.get() > 4, "it took the turn from others");
    assert!(reactor.get(handle).is_none());

    // A pause is one, and does not spin.
    let script = Script::new().made(|cx| cx.transport.pause_producing());
    let record = script.record();
    let paused = adopt(&mut reactor, File::open("/proc/self/exe").unwrap(), script);
    run_until_quiet(&mut reactor);
    assert!(reactor.is_idle());
    assert_eq!(record.summary(), ["made"]);
    let detached = detach(&mut reactor, paused);
    let handle = reactor.reattach::<PipeStream, _>(detached).unwrap();
    reactor.get(handle).unwrap().resume_producing();
    run_until(&mut reactor, |_| record.is_lost());
    assert!(record.data().starts_with(b"\x7fELF"));

    let out = tempfile::NamedTempFile::new().unwrap();
    for target in [File::create("/dev/null").unwrap(), out.reopen().unwrap()] {
        let script = Script::new();
        let record = script.record();
        let handle = adopt(&mut reactor, target, script);
        let _ = write(&mut reactor, handle, &all);
        reactor.get(handle).unwrap().lose_connection();
        run_until(&mut reactor, |_| record.is_lost());
        assert_eq!(record.summary(), ["made", "lost closed cleanly"]);
    }
    assert!(std::fs::read(out.path()).unwrap() == all);
    let null = Script::new();
    let record = null.record();
    adopt(&mut reactor, File::open("/dev/null").unwrap(), null);
    run_until(&mut reactor, |_| record.is_lost());
    assert_eq!(record.data(), b"");
    drop((reactor, out));
    ledger.assert_balanced();
}

#[test]
fn what_is_not_open_for_it_comes_back() {
    let ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let (reading, writing) = pipe();
    let wrong = reactor.adopt(Pipe::writing(), reading, Script::new());
    let wrong = wrong.unwrap_err();
    assert!(matches!(wrong.kind, AdoptErrorKind::NotWritable));
    let reading = wrong.fd;
    let wrong = reactor.adopt(Pipe::reading(), writing, Script::new());
    let wrong = wrong.unwrap_err();
    assert!(matches!(wrong.kind, AdoptErrorKind::NotReadable));
    let swapped = (wrong.fd, reading);
    let wrong = reactor.adopt(Pipe::pair(), swapped, Script::new());
    assert!(matches!(
        wrong.unwrap_err().kind,
        AdoptErrorKind::NotReadable
    ));
    let directory = File::open("/").unwrap().into();
    let wrong = reactor.adopt(Pipe, directory, Script::new()).unwrap_err();
    assert!(matches!(wrong.kind, AdoptErrorKind::Os(_)), "{wrong}");
    drop(wrong);
    let datagrams = UnixDatagram::unbound().unwrap().into();
    let wrong = reactor.adopt(Pipe, datagrams, Script::new()).unwrap_err();
    assert!(matches!(wrong.kind, AdoptErrorKind::NotAStream));
    assert_eq!(reactor.registered(), 0);
    drop((wrong, reactor));
    ledger.assert_balanced();
}

fn detach(reactor: &mut Reactor, handle: TransportHandle) -> Detached<Script> {
    let taken: Rc<RefCell<Option<Detached<Script>>>> = Rc::default();
    let result = Rc::clone(&taken);
    reactor.detach(handle, move |_, it| *result.borrow_mut() = it.ok());
    run_until(reactor, |_| taken.borrow().is_some());
    taken.take().expect("it was there")
}

#[test]
fn two_descriptors_are_taken_out_and_put_back() {
    let ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let (reading, theirs) = pipe();
    let (their_reading, writing) = pipe();
    let script = Script::new().data(|cx, data| {
        let _ = cx.transport.write(data);
    });
    let record = script.record();
    let handle = reactor
        .adopt(Pipe::pair(), (reading, writing), script)
        .unwrap();
    let _ = write(&mut reactor, handle, &pattern(100_000));
    run_until_quiet(&mut reactor);
    let detached = detach(&mut reactor, handle);
    assert!(detached.writing.is_some() && !detached.travels());
    assert_eq!(detached.unsent.len(), 100_000 - 65_536);
    let mut theirs = File::from(theirs);
    theirs.write_all(b"asked").unwrap();
    run_until_quiet(&mut reactor);
    assert_eq!(record.data(), b"");
    reactor.reattach::<PipeStream, _>(detached).unwrap();
    let mut received = vec![0; 100_005];
    let mut their_reading = File::from(their_reading);
    their_reading.read_exact(&mut received[..65_536]).unwrap();
    run_until_quiet(&mut reactor);
    their_reading.read_exact(&mut received[65_536..]).unwrap();
    assert!(received[..100_000] == pattern(100_000) && received.ends_with(b"asked"));
    drop((reactor, theirs, their_reading));
    ledger.assert_balanced();
}

/// X-22: what was written before is read first; the side that stays says `EIO`.
#[test]
fn the_end_of_a_terminal_is_clean() {
    let ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let (master, mut other) = raw_terminal();
    let script = Script::new();
    let record = script.record();
    adopt(&mut reactor, master, script);
    run_until_quiet(&mut reactor);
    let last = pattern(3_000);
    other.write_all(&last).unwrap();
    drop(other);
    run_until(&mut reactor, |_| record.is_lost());
    assert!(record.data() == last);
    let summary = record.summary();
    assert_eq!(
        summary[summary.len() - 2..],
        ["read closed", "lost closed cleanly"]
    );

    // And from the other side, which is hung up.
    let (master, other) = raw_terminal();
    let script = Script::new();
    let record = script.record();
    adopt(&mut reactor, other, script);
    run_until_quiet(&mut reactor);
    drop(master);
    run_until(&mut reactor, |_| record.is_lost());
    assert_eq!(
        record.summary(),
        ["made", "read closed", "lost closed cleanly"]
    );
    drop(reactor);
    ledger.assert_balanced();
}

/// The kernel takes some of it and says that it was hung up; a write of more would wait.
#[test]
fn writing_to_a_terminal_that_nobody_has_open_waits_for_nothing() {
    let ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let (master, other) = raw_terminal();
    let script = Script::new().made(|cx| cx.transport.pause_producing());
    let record = script.record();
    let handle = adopt(&mut reactor, master, script);
    run_until_quiet(&mut reactor);
    drop(other);
    let _ = write(&mut reactor, handle, &pattern(1 << 20));
    run_until_quiet(&mut reactor);
    assert_eq!(record.summary(), ["made"]);
    reactor.get(handle).unwrap().resume_producing();
    run_until(&mut reactor, |_| record.is_lost());
    assert_eq!(
        record.summary(),
        [
            "made",
            "reading resumed",
            "read closed",
            "lost closed cleanly"
        ]
    );
    drop(reactor);
    ledger.assert_balanced();
}

/// Both ways at once, and far more than a terminal holds.
#[test]
fn terminals_carry_any_length_between_two_connections() {
    let ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let (master, other) = raw_terminal();
    let (here, there) = (Script::new(), Script::new());
    let records = [here.record(), there.record()];
    let ends = [
        adopt(&mut reactor, master, here),
        adopt(&mut reactor, other, there),
    ];
    let all = pattern(300_000);
    for end in ends {
        let _ = write(&mut reactor, end, &all);
    }
    run_until(&mut reactor, |_| {
        let is_there = |record: &Record| record.data().len() >= all.len();
        records.iter().all(is_there)
    });
    for record in records {
        assert!(record.data() == all);
    }
    drop(reactor);
    ledger.assert_balanced();
}

fn piped(command: &mut Command) -> (Child, (OwnedFd, OwnedFd)) {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let reading = child.stdout.take().unwrap().into();
    let writing = child.stdin.take().unwrap().into();
    (child, (reading, writing))
}

/// X-16, X-25: closing our half is the end of its input.
#[test]
fn cat_gives_everything_back() {
    let ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let (mut child, ends) = piped(&mut Command::new("cat"));
    let all = pattern(5 << 20);
    let script = Script::new();
    let record = script.record();
    let handle = reactor.adopt(Pipe::pair(), ends, script).unwrap();
    let _ = write(&mut reactor, handle, &all);
    reactor.get(handle).unwrap().lose_write_connection();
    run_until(&mut reactor, |_| record.is_lost());
    assert!(record.data() == all);
    let summary = record.summary();
    assert_eq!(summary.last().unwrap(), "lost closed cleanly");
    assert!(child.wait().unwrap().success());
    drop((reactor, child));
    ledger.assert_balanced();
}

#[test]
fn socat_speaks_through_a_terminal_and_pipes() {
    if is_missing("socat", "socat") {
        return;
    }
    let ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let (mut child, ends) = piped(Command::new("socat").args(["-", "EXEC:cat,pty,rawer"]));
    let script = Script::new();
    let record = script.record();
    let handle = reactor.adopt(Pipe::pair(), ends, script).unwrap();
    let all = pattern(4_000);
    let _ = write(&mut reactor, handle, &all);
    run_until(&mut reactor, |_| record.data().len() == all.len());
    assert!(record.data() == all);
    reactor.get(handle).unwrap().lose_connection();
    run_until(&mut reactor, |_| record.is_lost());
    child.wait().unwrap();
    drop((reactor, child));
    ledger.assert_balanced();
}

/// X-22. The terminal blocks, and is in other hands too, as one that was received.
#[test]
fn bash_runs_on_a_terminal() {
    if is_missing("bash", "bash") || is_missing("setsid", "util-linux") {
        return;
    }
    let ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let (master, terminal) = terminal();
    let stdio = || Stdio::from(terminal.try_clone().unwrap());
    let mut child = Command::new("setsid")
        .args(["--ctty", "--wait", "bash", "--norc", "--noprofile", "-i"])
        .env("PS1", "ready> ")
        .env_remove("PROMPT_COMMAND")
        .stdin(stdio())
        .stdout(stdio())
        .stderr(stdio())
        .spawn()
        .unwrap();
    drop(terminal);
    let script = Script::new();
    let record = script.record();
    let handle = adopt(&mut reactor, master, script);
    let has = |record: &Record, text: &str| String::from_utf8_lossy(&record.data()).contains(text);
    run_until(&mut reactor, |_| has(&record, "ready> "));
    let _ = write(
        &mut reactor,
        handle,
        b"test -t 0 && echo a $((6 * 7)) terminal\n",
    );
    run_until(&mut reactor, |_| has(&record, "a 42 terminal"));
    // Interrupted by the terminal, which is job control.
    let _ = write(&mut reactor, handle, b"echo on; read -r x\n");
    run_until(&mut reactor, |_| has(&record, "\ron\r"));
    let _ = write(&mut reactor, handle, b"\x03");
    // It drops what is typed ahead.
    run_until(&mut reactor, |_| {
        let text = String::from_utf8_lossy(&record.data()).into_owned();
        text.split_once("^C")
            .is_some_and(|(_, rest)| rest.contains("ready> "))
    });
    let _ = write(&mut reactor, handle, b"echo back $?\nexit\n");
    run_until(&mut reactor, |_| record.is_lost());
    assert!(has(&record, "back 130"), "{:?}", record.data());
    let summary = record.summary();
    assert_eq!(summary.last().unwrap(), "lost closed cleanly");
    child.wait().unwrap();
    drop((reactor, child));
    ledger.assert_balanced();
}

/// This binary, as the other process of a test: the one named `name`.
fn role(name: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(ROLE, "1");
    command
}

const ROLE: &str = "BOWLINE_TEST_STDIO";

/// X-25, X-26, X-27, M-10, W-66: both are files, and the process writes on by itself.
#[test]
fn standard_streams_are_a_connection() {
    let ledger = DescriptorLedger::open();
    let mut input = tempfile::tempfile().unwrap();
    input.write_all(b"asked\n").unwrap();
    io::Seek::rewind(&mut input).unwrap();
    let mut output = tempfile::tempfile().unwrap();
    let status = role("pipes::echoes_its_standard_input")
        .stdin(input)
        .stdout(output.try_clone().unwrap())
        .status();
    assert!(status.unwrap().success());
    let mut text = String::new();
    io::Seek::rewind(&mut output).unwrap();
    output.read_to_string(&mut text).unwrap();
    let (_, after) = text.split_once("asked\n").expect("echoed");
    assert!(after.contains("1 passed"), "what was written later: {text}");
    drop(output);
    ledger.assert_balanced();
}

/// The other process of the test above; does nothing by itself.
#[test]
fn echoes_its_standard_input() {
    if std::env::var_os(ROLE).is_none() {
        return;
    }
    let mut reactor = Reactor::new().unwrap();
    let flags = || fcntl_getfl(io::stdout().as_fd()).unwrap();
    let before = flags();
    let script = Script::new()
        .data(|cx, data| {
            let _ = cx.transport.write(data);
        })
        .read_closed(|_| bowline::AfterReadClosed::LoseConnection);
    let record = script.record();
    reactor.adopt(bowline::Stdio, (), script).unwrap();
    run_until(&mut reactor, |_| record.is_lost());
    assert_eq!(
        record.summary(),
        ["made", "data 6", "read closed", "lost closed cleanly"]
    );
    assert_eq!(flags(), before);
}

/// A half-close is seen by who reads, although the process goes on.
#[test]
fn a_half_close_of_standard_output_is_its_end() {
    let ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let (mut child, ends) = piped(&mut role("pipes::closes_its_standard_output"));
    let script = Script::new().keep_writing();
    let record = script.record();
    let handle = reactor.adopt(Pipe::pair(), ends, script).unwrap();
    run_until(&mut reactor, |_| {
        let data = record.data();
        record.count(|it| matches!(it, crate::support::Event::ReadClosed)) == 1
            && data.ends_with(b"the last words")
    });
    assert!(child.try_wait().unwrap().is_none(), "it has not ended");
    reactor.get(handle).unwrap().lose_connection();
    run_until(&mut reactor, |_| record.is_lost());
    assert!(child.wait().unwrap().success());
    drop((reactor, child));
    ledger.assert_balanced();
}

/// The other process of the test above; does nothing by itself.
#[test]
fn closes_its_standard_output() {
    if std::env::var_os(ROLE).is_none() {
        return;
    }
    let mut reactor = Reactor::new().unwrap();
    let script = Script::new().made(|cx| {
        let _ = cx.transport.write(b"the last words");
        cx.transport.lose_write_connection();
    });
    let record = script.record();
    reactor.adopt(bowline::Stdio, (), script).unwrap();
    run_until(&mut reactor, |_| record.is_lost());
}
