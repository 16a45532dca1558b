//! What a child begins with: descriptors, signals, environment, user; and what is said of
//! one that could not begin.

use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use bowline::process::{
    ChildCommand, CollectOutput, ProcessOutput, SpawnError, SpawnStep, take_granted,
};
use bowline::{Reactor, Transports};
use rustix::io::{FdFlags, fcntl_setfd};

use crate::harness::{Script, run, sh, shell, stream};
use crate::support::own_process::{
    in_own_process, in_own_process_with, leave_free, limit_descriptors,
};
use crate::support::{DescriptorLedger, run_until};

/// Prints the numbers of all descriptors of the shell, each with its file.
const LIST: &str =
    "for fd in /proc/$$/fd/*; do [ -L $fd ] && echo ${fd##*/} $(readlink $fd); done; true";

/// Runs a child for its output.
#[track_caller]
fn output(command: ChildCommand<'_>) -> ProcessOutput {
    let mut reactor = Reactor::new().unwrap();
    let output = std::rc::Rc::new(std::cell::RefCell::new(None));
    let collected = std::rc::Rc::clone(&output);
    let collect = CollectOutput::new(move |_, output| *collected.borrow_mut() = Some(output));
    reactor.spawn_process(command, collect).unwrap();
    run_until(&mut reactor, |_| output.borrow().is_some());
    output.take().unwrap()
}

#[track_caller]
fn stdout(command: ChildCommand<'_>) -> String {
    let output = output(command);
    assert!(output.status.is_success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// A file of its own, that says `text`.
fn file(text: &str) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file.rewind().unwrap();
    file
}

fn numbers(listing: &str) -> Vec<u32> {
    let numbers = listing.lines().filter_map(|line| line.split(' ').next());
    let mut numbers: Vec<u32> = numbers.map(|number| number.parse().unwrap()).collect();
    numbers.sort_unstable();
    numbers
}

/// in both directions, and what is given.
#[test]
fn any_number_leads_where_it_was_said() {
    let _ledger = DescriptorLedger::open();
    let given = file("given ");
    let script = Script::new().made(|cx| {
        let numbers: Vec<u32> = cx.process.streams().iter().map(|it| it.0).collect();
        assert_eq!(numbers, [3, 77]);
        let _ = cx.write_to_child(3, b"read ");
        assert!(cx.close_child_fd(3));
    });
    // A shell names one digit only.
    let command = sh("cat <&5 >&7; cat <&3 >&7; echo told >&7");
    let command = ChildCommand::new(command)
        .write_to(3)
        .read_from(77)
        .descriptor(5, given.as_fd())
        .duplicate(7, 77)
        .null(0)
        .null(1)
        .null(2);
    let record = run(command, script);
    assert_eq!(record.text(77), "given read told\n");
    assert_eq!(record.count("lost"), 2);
}

/// swapped, overlapping, where it is already; and what this program has as its own
/// standard streams, which the child has had replaced by then.
#[test]
fn numbers_may_be_those_of_the_descriptors_that_are_given() {
    let _ledger = DescriptorLedger::open();
    let files: Vec<_> = ["a", "b", "c"].map(file).into_iter().collect();
    let at = |index: usize| u32::try_from(files[index].as_raw_fd()).unwrap();
    let stdin = io::stdin();
    let command = shell(LIST)
        .descriptor(at(1), files[0].as_fd())
        .descriptor(at(0), files[1].as_fd())
        .descriptor(at(2), files[2].as_fd())
        .descriptor(99, stdin.as_fd());
    let listing = stdout(command);
    let link = |number: i32| {
        let path = format!("/proc/thread-self/fd/{number}");
        std::fs::read_link(path).unwrap().display().to_string()
    };
    let own = |index: usize| link(files[index].as_raw_fd());
    for (number, file) in [
        (at(1), own(0)),
        (at(0), own(1)),
        (at(2), own(2)),
        (99, link(0)),
    ] {
        let line = format!("{number} {file}");
        assert!(listing.lines().any(|it| it == line), "{line}\n{listing}");
    }
}

/// X-04, W-64: whatever else is open here, close-on-exec or not, and whatever is made for
/// other children.
#[test]
fn a_child_has_what_it_was_given_and_nothing_else() {
    let _ledger = DescriptorLedger::open();
    let careless = file("careless");
    fcntl_setfd(&careless, FdFlags::empty()).unwrap();
    let mut reactor = Reactor::new().unwrap();
    let script = Script::new();
    let record = script.record();
    let other = ChildCommand::new(Command::new("cat")).read_from(9);
    let other = reactor.spawn_process(other, script).unwrap();
    let listing = stdout(shell(LIST).write_to(4).read_from(8));
    assert_eq!(numbers(&listing), [0, 1, 2, 4, 8], "{listing}");
    assert_eq!(numbers(&stdout(shell(LIST))), [0, 1, 2]);
    reactor.get(other).unwrap().kill().unwrap();
    run_until(&mut reactor, |_| record.is_over());
}

/// Standard streams: our own, nothing, one as the other.
#[test]
fn standard_streams_are_inherited_given_or_nothing() {
    let _ledger = DescriptorLedger::open();
    let target = |listing: &str, number: u32| {
        let mut lines = listing.lines();
        let line = lines.find_map(|line| line.strip_prefix(&format!("{number} ")));
        line.unwrap().to_owned()
    };
    let input = file("from a file");
    let listing = stdout(shell(LIST).inherit(2).null(0));
    let ours = std::fs::read_link("/proc/thread-self/fd/2").unwrap();
    assert_eq!(Path::new(&target(&listing, 2)), ours);
    assert_eq!(target(&listing, 0), "/dev/null");
    let command = shell("cat; echo error >&2").descriptor(0, input.as_fd());
    let both = output(command.duplicate(2, 1));
    assert_eq!(
        (&both.stdout[..], &both.stderr[..]),
        (&b"from a fileerror\n"[..], &b""[..])
    );
}

/// what std's `Command` says, unchanged.
#[test]
fn environment_directory_and_arguments_are_the_commands() {
    let _ledger = DescriptorLedger::open();
    let mut command = Command::new("/usr/bin/env");
    command.env_clear().env("ONLY", "this one");
    assert_eq!(stdout(ChildCommand::new(command)), "ONLY=this one\n");
    let mut command = Command::new("/usr/bin/env");
    command.env("ANOTHER", "1").env_remove("HOME");
    let all = stdout(ChildCommand::new(command));
    assert!(all.lines().any(|line| line == "ANOTHER=1"), "{all}");
    assert!(all.lines().any(|line| line.starts_with("PATH=")), "{all}");
    assert!(!all.lines().any(|line| line.starts_with("HOME=")), "{all}");

    let arguments = ["", "a b", "$HOME", "*", "\"'\\", "caf\u{e9}", "\n"];
    let mut command = sh("printf '%s.' \"$@\"; pwd; echo $0");
    command.arg("name").args(arguments).current_dir("/usr");
    let said = stdout(ChildCommand::new(command));
    assert_eq!(said, format!("{}./usr\nname\n", arguments.join(".")));
    let mut command = Command::new("sh");
    command
        .args(["-c", "cat /proc/$$/cmdline"])
        .arg0("another name");
    assert!(stdout(ChildCommand::new(command)).starts_with("another name\0-c\0"));
}

/// this test runs in a program that ignores one signal and blocks another, as its
/// children do that std starts.
#[test]
fn signals_have_their_default_effect_and_none_is_blocked() {
    const SIGNALS: &str = "grep -E '^Sig(Blk|Ign):' /proc/self/status";
    let prepare = |command: &mut Command| {
        let mut env = Command::new("env");
        env.args(["--ignore-signal=HUP,USR1,INT", "--block-signal=USR2,TERM"]);
        env.arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            env.env(name, value.unwrap_or_default());
        }
        *command = env;
    };
    let name = "signals_have_their_default_effect_and_none_is_blocked";
    in_own_process_with(module_path!(), name, prepare, || {
        let own = || {
            let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
            let of_signals =
                |line: &&str| line.starts_with("SigBlk:") || line.starts_with("SigIgn:");
            status
                .lines()
                .filter(of_signals)
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        // The premise.
        let before = own();
        let all_zero = |line: &str| line.ends_with("\t0000000000000000");
        assert!(
            before.len() == 2 && !before.iter().any(|it| all_zero(it)),
            "{before:?}"
        );
        let childs = stdout(shell(SIGNALS));
        assert!(
            childs.lines().count() == 2 && childs.lines().all(all_zero),
            "{childs}"
        );
        assert_eq!(own(), before);
    });
}

///
#[test]
fn user_and_groups_are_the_childs_alone() {
    let _ledger = DescriptorLedger::open();
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let mut command = sh("id -u; id -g; id -G");
    command.uid(65_534).gid(65_533);
    let said = stdout(ChildCommand::new(command));
    assert_eq!(said, "65534\n65533\n65533\n");
    assert!(rustix::process::geteuid().is_root());
}

fn error_of(command: ChildCommand<'_>) -> SpawnError {
    let mut reactor = Reactor::new().unwrap();
    let script = Script::new();
    let record = script.record();
    let error = reactor.spawn_process(command, script).unwrap_err();
    assert_eq!(reactor.registered(), 0);
    assert_eq!(record.events(), [""; 0]);
    error
}

/// W-62: whatever else was asked for, the call says it, with the step and the
/// reason; nothing is left, and what was given is open.
#[test]
fn a_child_that_could_not_begin_is_an_error_that_says_at_which_step() {
    let ledger = DescriptorLedger::open();
    let given = file("given");
    let plain = |program: &str| ChildCommand::new(Command::new(program));
    let missing = "/nonexistent/program";
    for command in [
        plain(missing),
        plain(missing).descriptor(3, given.as_fd()).read_from(4),
        plain(missing).null(0).null(1).null(2),
        plain(missing).terminal(Default::default()),
        plain(missing).in_own_group(),
        plain("no-such-program-in-the-path"),
    ] {
        let error = error_of(command);
        assert_eq!(error.step, SpawnStep::Program, "{error}");
        assert_eq!(error.error.kind(), io::ErrorKind::NotFound, "{error}");
    }
    let error = error_of(plain("/etc/passwd"));
    assert_eq!(
        (error.step, error.error.kind()),
        (SpawnStep::Program, io::ErrorKind::PermissionDenied)
    );
    assert_eq!(
        error.to_string(),
        "cannot start /etc/passwd: the program: Permission denied (os error 13)"
    );
    // As if the program were what is missing.
    let mut command = Command::new("true");
    command.current_dir("/nonexistent/directory");
    let error = error_of(ChildCommand::new(command));
    assert_eq!(
        (error.step, error.error.kind()),
        (SpawnStep::Directory, io::ErrorKind::NotFound)
    );
    let mut command = Command::new(missing);
    command.current_dir("/usr");
    assert_eq!(
        error_of(ChildCommand::new(command)).step,
        SpawnStep::Program
    );
    // A group leader cannot begin a session.
    let mut command = Command::new("true");
    command.process_group(0);
    let error = error_of(ChildCommand::new(command).terminal(Default::default()));
    assert_eq!(
        (error.step, error.error.kind()),
        (SpawnStep::Session, io::ErrorKind::PermissionDenied)
    );
    let mut command = Command::new("true");
    command.process_group(1);
    assert_eq!(error_of(ChildCommand::new(command)).step, SpawnStep::User);
    for command in [
        plain("true").inherit(3),
        plain("true").duplicate(3, 4),
        plain("true").terminal_at(3),
        plain("t\0rue"),
        plain("true").listen_fds(&[(given.as_fd(), "a:b")]),
    ] {
        let error = error_of(command);
        assert_eq!(
            (error.step, error.error.kind()),
            (SpawnStep::Prepare, io::ErrorKind::InvalidInput),
            "{error}"
        );
    }
    assert!(given.metadata().is_ok());
    drop(given);
    ledger.assert_balanced();
}

/// at whichever descriptor it runs out of numbers.
#[test]
fn a_want_of_descriptors_is_an_error_and_leaves_nothing() {
    let name = "a_want_of_descriptors_is_an_error_and_leaves_nothing";
    in_own_process(module_path!(), name, || {
        let ledger = DescriptorLedger::open();
        let mut reactor = Reactor::new().unwrap();
        let mut started = 0;
        for free in 0..16 {
            leave_free(free);
            let script = Script::new();
            let record = script.record();
            let command = ChildCommand::new(Command::new("cat")).read_from(4);
            let spawned = reactor.spawn_process(command, script);
            // To count anew takes a descriptor.
            limit_descriptors(1_024);
            match spawned {
                Ok(process) => {
                    started += 1;
                    stream(&mut reactor, process, 0).lose_connection();
                    run_until(&mut reactor, |_| record.is_over());
                }
                Err(error) => assert!(
                    matches!(error.step, SpawnStep::Prepare | SpawnStep::Fork),
                    "{free}: {error}"
                ),
            }
            assert_eq!(reactor.registered(), 0, "{free}");
        }
        assert!((1..16).contains(&started), "{started}");
        drop(reactor);
        ledger.assert_balanced();
    });
}

/// It takes what it was given by its number, as a program of bowline's.
#[test]
fn a_child_takes_what_it_was_given() {
    const NUMBER: u32 = 93;
    if std::env::var_os("BOWLINE_TEST_TAKES").is_some() {
        let mut taken = File::from(take_granted(NUMBER).unwrap());
        taken.write_all(b"taken").unwrap();
        return;
    }
    let _ledger = DescriptorLedger::open();
    let mut command = Command::new(std::env::current_exe().unwrap());
    let name = "given::a_child_takes_what_it_was_given";
    command.args(["--exact", name, "--test-threads=1"]);
    command.env("BOWLINE_TEST_TAKES", "1").stdout(Stdio::null());
    let command = ChildCommand::new(command).read_from(NUMBER).null(1).null(2);
    let record = run(command, Script::new());
    assert_eq!(record.text(NUMBER), "taken");
}

/// As service managers give them.
#[test]
fn listeners_are_given_as_systemd_does() {
    let _ledger = DescriptorLedger::open();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let command = sh("[ $LISTEN_PID = $$ ] && echo $LISTEN_FDS $LISTEN_FDNAMES");
    let command = ChildCommand::new(command).listen_fds(&[(listener.as_fd(), "web")]);
    assert_eq!(stdout(command), "1 web\n");
}
