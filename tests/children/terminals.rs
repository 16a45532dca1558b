//! Children on a terminal of their own.

use std::cell::RefCell;
use std::process::Command;
use std::rc::Rc;
use std::time::Duration;

use bowline::process::{ChildCommand, ProcessHandle, SpawnStep, TerminalSize};
use bowline::{Reactor, Transport, Transports};

use crate::harness::{Record, Script, assert_nothing_left, sh, spawn, stream};
use crate::support::{
    DescriptorLedger, Record as PlainRecord, Recorder, is_missing, run_until, run_until_quiet,
};

fn size(rows: u16, columns: u16) -> TerminalSize {
    TerminalSize::default().rows(rows).columns(columns)
}

/// one stream both ways, told as of 1; the end after both the exit and the hang-up.
#[test]
fn a_terminal_is_one_stream_and_controls_its_child() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let script = Script::new().made(|cx| {
        let all = cx.process.streams();
        assert_eq!(all.iter().map(|it| it.0).collect::<Vec<_>>(), [0, 1, 2]);
        assert!(all.iter().all(|(_, handle)| *handle == all[0].1));
        // They are the whole terminal.
        assert!(!cx.close_stdin() && !cx.close_stdout() && !cx.close_stderr());
    });
    let record = script.record();
    // Reads a line from the terminal by its name, says its session and process group.
    let child = "test -t 0 && test -t 1 && test -t 2 || exit 9; \
                 cut -d' ' -f1,5,6,8 /proc/$$/stat; stty size; read line </dev/tty; \
                 echo \"got $line\" >&2; exit 3";
    let command = ChildCommand::new(sh(child)).terminal(size(33, 111));
    let process = spawn(&mut reactor, command, script);
    let pid = reactor.get(process).unwrap().pid();
    run_until(&mut reactor, |_| record.text(1).contains("33 111"));
    let first = record.text(1).lines().next().unwrap().to_owned();
    assert_eq!(
        first,
        format!("{pid} {pid} {pid} {pid}"),
        "session, group, foreground"
    );
    let _ = stream(&mut reactor, process, 0).write(b"a line\n");
    run_until(&mut reactor, |_| record.is_over());
    // The terminal echoes what was typed.
    assert!(
        record.text(1).ends_with("a line\r\ngot a line\r\n"),
        "{:?}",
        record.text(1)
    );
    assert_eq!(record.statuses()[1].code(), Some(3));
    assert_eq!(record.count("lost 1, closed cleanly"), 1);
    assert_eq!(record.count("lost"), 1);
    assert_nothing_left(&reactor);
}

/// what is said otherwise is otherwise.
#[test]
fn standard_error_can_be_a_pipe_beside_a_terminal() {
    let _ledger = DescriptorLedger::open();
    let script = Script::new();
    let child = "test -t 2 && exit 9; echo error >&2; echo output; exit 0";
    let command = ChildCommand::new(sh(child))
        .terminal(size(24, 80))
        .read_from(2);
    let record = crate::harness::run(command, script);
    assert_eq!(
        (record.text(1), record.text(2)),
        ("output\r\n".into(), "error\n".into())
    );
    let command = ChildCommand::new(sh("echo on 5 >&5; test -t 0 || exit 7"))
        .terminal(size(24, 80))
        .null(0)
        .null(1)
        .null(2)
        .terminal_at(5);
    let record = crate::harness::run(command, Script::new());
    assert_eq!(record.text(5), "on 5\r\n", "as of the lowest number");
    assert_eq!(record.statuses()[1].code(), Some(7));
}

/// It hangs up: the child is told by SIGHUP, and ends.
#[test]
fn closing_a_terminal_hangs_up() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let script = Script::new();
    let record = script.record();
    let command = ChildCommand::new(sh("echo; exec cat")).terminal(size(24, 80));
    let process = spawn(&mut reactor, command, script);
    run_until(&mut reactor, |_| !record.data(1).is_empty());
    stream(&mut reactor, process, 1).lose_connection();
    run_until(&mut reactor, |_| record.is_over());
    assert_eq!(record.statuses()[1].signal(), Some(1));
    assert_nothing_left(&reactor);
}

/// Much of it, both ways, as fast as each side takes it.
#[test]
fn a_terminal_carries_any_length() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let line: Vec<u8> = [&[b'x'; 99][..], b"\n"].concat();
    let all = line.repeat(3_000);
    let count = all.len();
    let script = Script::new();
    let record = script.record();
    let child = format!("stty raw -echo; echo ready; head -c {count} | cksum; exit 0");
    let command = ChildCommand::new(sh(&child)).terminal(size(24, 80));
    let process = spawn(&mut reactor, command, script);
    run_until(&mut reactor, |_| record.text(1).contains("ready"));
    let _ = stream(&mut reactor, process, 0).write(&all);
    run_until(&mut reactor, |_| record.is_over());
    let mut sum = Command::new("cksum");
    sum.stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped());
    let mut sum = sum.spawn().unwrap();
    std::io::Write::write_all(&mut sum.stdin.take().unwrap(), &all).unwrap();
    let wanted = sum.wait_with_output().unwrap().stdout;
    let wanted = String::from_utf8(wanted).unwrap();
    assert!(
        record.text(1).contains(wanted.trim()),
        "{:?}",
        record.text(1)
    );
}

/// With a protocol of its own, and without any terminal the size is of nothing.
#[test]
fn a_terminal_has_a_protocol_of_its_own() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let output = PlainRecord::default();
    let script = Script::new();
    let record = script.record();
    let command = ChildCommand::new(sh("echo told; exit 0"));
    let command = command.terminal_with(size(24, 80), Recorder::new(&output));
    spawn(&mut reactor, command, script);
    run_until(&mut reactor, |_| record.is_over());
    assert_eq!(output.data(), b"told\r\n");
    assert_eq!(record.count("lost"), 0);
    assert!(output.is_lost());
    let script = Script::new().made(|cx| {
        let refused = cx.process.set_terminal_size(size(1, 1)).unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::NotConnected);
    });
    let record = script.record();
    spawn(&mut reactor, ChildCommand::new(sh("exit 0")), script);
    run_until(&mut reactor, |_| record.is_over());
    assert_eq!(reactor.statistics().panics, 0);
}

/// A terminal needs a session, and that is refused to who leads a group already.
#[test]
fn a_terminal_that_cannot_control_is_an_error() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let mut command = Command::new("true");
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    let command = ChildCommand::new(command).terminal(size(24, 80));
    let error = reactor.spawn_process(command, Script::new()).unwrap_err();
    assert_eq!(error.step, SpawnStep::Session);
}

/// A shell at which somebody types.
struct Bash {
    reactor: Reactor,
    process: ProcessHandle,
    record: Record,
    read: usize,
}

impl Bash {
    fn start(rows: u16, columns: u16) -> Self {
        let mut command = Command::new("bash");
        command.args(["--norc", "--noprofile", "-i"]);
        command
            .env("PS1", "$ ")
            .env("TERM", "dumb")
            .env_remove("PROMPT_COMMAND");
        // Else bash says where the cursor may paste.
        command.env("INPUTRC", "/dev/null");
        let mut reactor = Reactor::new().unwrap();
        let script = Script::new();
        let record = script.record();
        let command = ChildCommand::new(command).terminal(size(rows, columns));
        let process = spawn(&mut reactor, command, script);
        let mut this = Self {
            reactor,
            process,
            record,
            read: 0,
        };
        this.expect("$ ");
        this
    }

    /// Waits for some text behind what was waited for before; answers all up to it.
    #[track_caller]
    fn expect(&mut self, text: &str) -> String {
        let (record, read) = (self.record.clone(), self.read);
        run_until(&mut self.reactor, |_| record.text(1)[read..].contains(text));
        let all = record.text(1);
        let end = all[read..].find(text).unwrap() + text.len();
        self.read += end;
        all[read..read + end].to_owned()
    }

    #[track_caller]
    fn type_in(&mut self, keys: &str) {
        let _ = stream(&mut self.reactor, self.process, 0).write(keys.as_bytes());
    }

    /// Runs a command; what it has said.
    #[track_caller]
    fn run(&mut self, command: &str) -> String {
        self.type_in(&format!("{command}\n"));
        // Its echo.
        self.expect("\r\n");
        let said = self.expect("$ ");
        said.trim_end_matches("$ ").to_owned()
    }
}

/// job control, the size and its change, what `stty` says, keys that are signals.
#[test]
fn bash_has_job_control_on_a_terminal() {
    let _ledger = DescriptorLedger::open();
    if is_missing("bash", "bash") || is_missing("stty", "coreutils") {
        return;
    }
    let mut bash = Bash::start(40, 90);
    assert_eq!(bash.run("stty size").trim(), "40 90");
    let settings = bash.run("stty -a");
    for word in [
        "rows 40",
        "columns 90",
        "isig",
        "icanon",
        "intr = ^C",
        "susp = ^Z",
    ] {
        assert!(settings.contains(word), "{word} in {settings}");
    }
    // Resized, and told so.
    assert_eq!(bash.run("trap 'echo winch' WINCH").trim(), "");
    let handle = bash.process;
    bash.reactor
        .get(handle)
        .unwrap()
        .set_terminal_size(size(50, 132))
        .unwrap();
    bash.type_in("\n");
    bash.expect("winch");
    bash.expect("$ ");
    run_until_quiet(&mut bash.reactor);
    bash.read = bash.record.text(1).len();
    assert_eq!(bash.run("stty size").trim(), "50 132");
    bash.run("trap - WINCH");

    // Ctrl-Z stops what is in the foreground, and the shell goes on.
    // Once that has spoken the terminal is its own. Before, nobody echoes.
    bash.type_in("sh -c 'echo re\"\"ady; exec cat'\n");
    bash.expect("ready\r\n");
    bash.type_in("echoed by cat\n");
    bash.expect("echoed by cat\r\n");
    bash.expect("echoed by cat\r\n");
    bash.type_in("\x1a");
    bash.expect("Stopped");
    bash.expect("$ ");
    let jobs = bash.run("jobs");
    assert!(jobs.contains("[1]+") && jobs.contains("Stopped"), "{jobs}");
    bash.type_in("fg\n");
    bash.expect("exec cat'\r\n");
    // It is in the foreground again when it answers.
    bash.type_in("again\n");
    bash.expect("again\r\n");
    bash.expect("again\r\n");
    // Ctrl-C ends it by a signal.
    bash.type_in("\x03");
    bash.expect("$ ");
    assert_eq!(bash.run("echo $?").trim(), "130");
    let said = bash.run("sleep 1000 & echo started");
    assert!(said.contains("started"), "{said}");
    bash.run("kill %1; wait");
    // Ctrl-D is the end of the input.
    bash.type_in("\x04");
    let record = bash.record.clone();
    run_until(&mut bash.reactor, |_| record.is_over());
    assert!(
        record.statuses()[1].code().is_some(),
        "{:?}",
        record.events()
    );
    assert_nothing_left(&bash.reactor);
}

/// The whole session goes when the terminal does: what bash had in the background too.
#[test]
fn a_time_limit_ends_a_terminal() {
    let _ledger = DescriptorLedger::open();
    if is_missing("bash", "bash") {
        return;
    }
    let mut bash = Bash::start(24, 80);
    let handle = bash.process;
    // An interactive bash does not mind a SIGTERM.
    let grace = Duration::from_millis(50);
    bash.reactor.get(handle).unwrap().terminate_within(grace);
    let record = bash.record.clone();
    run_until(&mut bash.reactor, |_| record.is_over());
    assert_eq!(record.statuses()[1].signal(), Some(9));
    assert_nothing_left(&bash.reactor);
}

/// A protocol that another connection has: the two are joined by hand, as a server of
/// terminals does it.
#[test]
fn a_terminal_is_joined_with_a_socket() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let (ours, theirs) = crate::support::socketpair();
    let input: Rc<RefCell<Option<ProcessHandle>>> = Rc::default();
    let forwards = Forwards(Rc::clone(&input));
    let socket = reactor.adopt_unix_stream(ours.into(), forwards).unwrap();
    let socket = reactor.get(socket).unwrap().handle();
    let script = Script::new()
        .data(move |cx, _, data| {
            let _ = cx.get(socket).unwrap().write(data);
        })
        .ended(move |cx| cx.get(socket).unwrap().lose_connection());
    let record = script.record();
    let command = ChildCommand::new(sh("read word; echo $word backwards; exit 0"));
    let command = command.terminal(size(24, 80));
    let process = spawn(&mut reactor, command, script);
    input.replace(Some(process));
    std::io::Write::write_all(&mut &theirs, b"say\n").unwrap();
    run_until(&mut reactor, |_| record.is_over());
    run_until(&mut reactor, |reactor| reactor.registered() == 0);
    theirs.set_nonblocking(false).unwrap();
    let mut said = String::new();
    std::io::Read::read_to_string(&mut &theirs, &mut said).unwrap();
    assert_eq!(said, "say\r\nsay backwards\r\n");
}

struct Forwards(Rc<RefCell<Option<ProcessHandle>>>);

impl<T: Transport> bowline::Protocol<T> for Forwards {
    fn data_received(&mut self, cx: &mut bowline::Context<'_, T>, data: &[u8]) {
        let process = self.0.borrow().expect("it was started");
        let stream = cx.reactor.get(process).and_then(|it| it.stream(0));
        if let Some(stream) = stream.and_then(|it| cx.reactor.get(it)) {
            let _ = stream.write(data);
        }
    }
}
