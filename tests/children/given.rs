//! What a child begins with: descriptors, signals, environment, user; and what is said of
//! one that could not begin.

use std::fs::{File, Permissions};
use std::io::{self, Seek, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use bowline::process::{
    ChildCommand, CollectOutput, ProcessOutput, SpawnError, SpawnStep, own_pidfd_inode,
    take_granted,
};
use bowline::{Reactor, Transports};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::WaitOptions;

use crate::harness::{Script, WAYS, Way, launched, run, sh, stream};
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
    for way in WAYS {
        let _ledger = DescriptorLedger::open();
        leads_where_it_was_said(way);
    }
}

fn leads_where_it_was_said(way: Way) {
    let given = file("given ");
    let script = Script::new().made(|cx| {
        let numbers: Vec<u32> = cx.process.streams().iter().map(|it| it.0).collect();
        assert_eq!(numbers, [3, 77]);
        let _ = cx.write_to_child(3, b"read ");
        assert!(cx.close_child_fd(3));
    });
    // A shell names one digit only.
    let command = way(sh("cat <&5 >&7; cat <&3 >&7; echo told >&7"))
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
    for way in WAYS {
        let _ledger = DescriptorLedger::open();
        numbers_may_be_in_use(way);
    }
}

fn numbers_may_be_in_use(way: Way) {
    let files: Vec<_> = ["a", "b", "c"].map(file).into_iter().collect();
    let at = |index: usize| u32::try_from(files[index].as_raw_fd()).unwrap();
    let stdin = io::stdin();
    let command = way(sh(LIST))
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
    for way in WAYS {
        let listing = stdout(way(sh(LIST)).write_to(4).read_from(8));
        assert_eq!(numbers(&listing), [0, 1, 2, 4, 8], "{listing}");
        assert_eq!(numbers(&stdout(way(sh(LIST)))), [0, 1, 2]);
    }
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
    for way in WAYS {
        let input = file("from a file");
        let listing = stdout(way(sh(LIST)).inherit(2).null(0));
        let ours = std::fs::read_link("/proc/thread-self/fd/2").unwrap();
        assert_eq!(Path::new(&target(&listing, 2)), ours);
        assert_eq!(target(&listing, 0), "/dev/null");
        let command = way(sh("cat; echo error >&2")).descriptor(0, input.as_fd());
        let both = output(command.duplicate(2, 1));
        assert_eq!(
            (&both.stdout[..], &both.stderr[..]),
            (&b"from a fileerror\n"[..], &b""[..])
        );
    }
}

/// what std's `Command` says, unchanged; and the same without a fork.
#[test]
fn environment_directory_and_arguments_are_the_commands() {
    let _ledger = DescriptorLedger::open();
    let mut command = Command::new("/usr/bin/env");
    command.env_clear().env("ONLY", "this one");
    assert_eq!(stdout(ChildCommand::new(command)), "ONLY=this one\n");
    let cleared = ChildCommand::program("/usr/bin/env").env("NOT", "this one");
    let cleared = cleared.env_clear().env("ONLY", "this one");
    assert_eq!(stdout(cleared), "ONLY=this one\n");
    for way in WAYS {
        let mut command = Command::new("/usr/bin/env");
        command.env("ANOTHER", "1").env_remove("HOME");
        let all = stdout(way(command));
        assert!(all.lines().any(|line| line == "ANOTHER=1"), "{all}");
        assert!(all.lines().any(|line| line.starts_with("PATH=")), "{all}");
        assert!(!all.lines().any(|line| line.starts_with("HOME=")), "{all}");

        let arguments = ["", "a b", "$HOME", "*", "\"'\\", "caf\u{e9}", "\n"];
        let mut command = sh("printf '%s.' \"$@\"; pwd; echo $0");
        command.arg("name").args(arguments).current_dir("/usr");
        let said = stdout(way(command));
        assert_eq!(said, format!("{}./usr\nname\n", arguments.join(".")));
    }
    let mut command = Command::new("sh");
    command
        .args(["-c", "cat /proc/$$/cmdline"])
        .arg0("another name");
    assert!(stdout(ChildCommand::new(command)).starts_with("another name\0-c\0"));
}

/// what std's way, which is execvp(3)'s, makes of a name is the measure: in directories of
/// `PATH` as the child has it, from the child's directory; the first that can be executed;
/// a script without a first line that names its interpreter.
#[test]
fn a_program_is_looked_for_in_the_same_way_with_and_without_a_fork() {
    let _ledger = DescriptorLedger::open();
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let script = |name: &str, text: &str, mode: u32| {
        std::fs::write(at(name), text).unwrap();
        std::fs::set_permissions(at(name), Permissions::from_mode(mode)).unwrap();
    };
    for name in ["first", "second", "third"] {
        std::fs::create_dir(at(name)).unwrap();
    }
    script("first/plain", "not to be executed", 0o644);
    script("second/plain", "echo second $0 $1", 0o755);
    script("third/plain", "#!/bin/sh\necho third $0 $1", 0o755);
    script("first/denied", "not to be executed", 0o644);
    script("second/bad", "#!/nonexistent/interpreter\n", 0o755);
    script("third/bad", "#!/bin/sh\necho third $0 $1", 0o755);
    std::os::unix::fs::symlink("loop", at("first/loop")).unwrap();
    let full = |names: &[&str]| {
        let all = names.iter().map(|it| at(it).display().to_string());
        all.collect::<Vec<_>>().join(":")
    };
    let paths = [
        full(&["first", "second", "third"]),
        full(&["third", "second"]),
        full(&["nowhere", "first"]),
        "first:second".into(),
        "second:".into(),
        ":third".into(),
        String::new(),
        "/dev/null:second".into(),
        // Longer than a name may be, and as long as a path may be.
        format!("/{}:second", "x".repeat(300)),
        format!("/{}:second", "x".repeat(4_094)),
    ];
    let names = [
        "plain",
        "denied",
        "bad",
        "loop",
        "./plain",
        "second/plain",
        "missing",
        "",
        "first",
    ];
    for path in &paths {
        for name in names {
            for directory in [folder.path().to_owned(), at("second")] {
                let mut command = Command::new(name);
                command.arg("one").env("PATH", path).current_dir(&directory);
                let [forked, launched] = WAYS.map(|way| found(way(copy_of(&command))));
                assert_eq!(
                    forked,
                    launched,
                    "{name:?} from {} in {path:?}",
                    directory.display()
                );
            }
        }
    }
    // The premise: not all is missing, and `PATH` counts.
    let in_order = |path: &str| {
        let mut command = Command::new("plain");
        command.env("PATH", path);
        found(launched(command)).unwrap()
    };
    assert!(in_order(&paths[0]).starts_with("second "));
    assert!(in_order(&paths[1]).starts_with("third "));
    let mut command = Command::new("denied");
    command.env("PATH", full(&["first", "second"]));
    assert_eq!(
        found(launched(command)),
        Err(Some(13)),
        "rather than that it is missing"
    );
    // An entry that is longer than any path is passed over. glibc's execvp(3) takes the place
    // after it for an empty entry, and runs what lies in the directory.
    for (directory, is_there) in [(folder.path().to_owned(), true), (at("second"), false)] {
        let mut command = Command::new("plain");
        let long = format!("/{}:second", "x".repeat(5_000));
        command.arg("one").env("PATH", long).current_dir(directory);
        let expected = if is_there {
            Ok("second second/plain one\n".to_owned())
        } else {
            Err(Some(2))
        };
        assert_eq!(found(launched(command)), expected);
    }
    // Where the child has no `PATH`, it is not ours that counts.
    let bare = ChildCommand::program("env").env_clear();
    assert_eq!(stdout(bare), "");
}

fn copy_of(command: &Command) -> Command {
    let mut copy = Command::new(command.get_program());
    copy.args(command.get_args());
    copy.envs(
        command
            .get_envs()
            .filter_map(|(name, value)| Some((name, value?))),
    );
    copy.current_dir(command.get_current_dir().expect("it is set"));
    copy
}

/// What it prints, or why it did not begin.
fn found(command: ChildCommand<'_>) -> Result<String, Option<i32>> {
    let mut reactor = Reactor::new().unwrap();
    let output = std::rc::Rc::new(std::cell::RefCell::new(None));
    let collected = std::rc::Rc::clone(&output);
    let collect = CollectOutput::new(move |_, output| *collected.borrow_mut() = Some(output));
    match reactor.spawn_process(command, collect) {
        Err(error) => Err(error.error.raw_os_error()),
        Ok(_) => {
            run_until(&mut reactor, |_| output.borrow().is_some());
            Ok(String::from_utf8(output.take().unwrap().stdout).unwrap())
        }
    }
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
        for way in WAYS {
            let childs = stdout(way(sh(SIGNALS)));
            assert!(
                childs.lines().count() == 2 && childs.lines().all(all_zero),
                "{childs}"
            );
        }
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
    for way in WAYS {
        let ledger = DescriptorLedger::open();
        says_at_which_step(way);
        ledger.assert_balanced();
    }
    // Only std's way has these.
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
    // Not in what std says of its command.
    for command in [
        ChildCommand::new(Command::new("t\0rue")),
        ChildCommand::program("t\0rue"),
        ChildCommand::program("true").arg("\0"),
        ChildCommand::program("true").args(["a", "b\0c"]),
        ChildCommand::program("true").env("A\0", "b"),
        ChildCommand::program("true").env("A", "\0"),
        ChildCommand::program("true").current_dir("/\0"),
    ] {
        let error = error_of(command);
        assert_eq!(
            (error.step, error.error.kind()),
            (SpawnStep::Prepare, io::ErrorKind::InvalidInput),
            "{error}"
        );
    }
}

fn says_at_which_step(way: Way) {
    let given = file("given");
    let plain = |program: &str| way(Command::new(program));
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
    let error = error_of(way(command));
    assert_eq!(
        (error.step, error.error.kind()),
        (SpawnStep::Directory, io::ErrorKind::NotFound)
    );
    let mut command = Command::new(missing);
    command.current_dir("/usr");
    assert_eq!(error_of(way(command)).step, SpawnStep::Program);
    for command in [
        plain("true").inherit(3),
        plain("true").duplicate(3, 4),
        plain("true").terminal_at(3),
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
}

/// with no number left for its pidfd either, where nothing else takes one.
#[test]
fn a_child_that_needs_no_descriptor_starts_when_none_is_free() {
    let name = "a_child_that_needs_no_descriptor_starts_when_none_is_free";
    in_own_process(module_path!(), name, || {
        let mut reactor = Reactor::new().unwrap();
        // So that the program has numbers of its own, which is not of this test.
        let taken: Vec<File> = (0..32).map(|_| File::open("/dev/null").unwrap()).collect();
        let script = Script::new();
        let record = script.record();
        let command = ChildCommand::program("/bin/sh").args(["-c", "exit 7"]);
        let command = command.inherit(0).inherit(1).inherit(2);
        leave_free(0);
        reactor.spawn_process(command, script).unwrap();
        run_until(&mut reactor, |_| record.is_over());
        limit_descriptors(1_024);
        assert_eq!(record.statuses()[1].code(), Some(7));
        assert_eq!(reactor.registered(), 0);
        drop(taken);
    });
}

/// nobody is left to be waited for: of those that could not begin, and of those that ran.
#[test]
fn no_zombie_is_left_of_a_child_that_could_not_begin() {
    let name = "no_zombie_is_left_of_a_child_that_could_not_begin";
    in_own_process(module_path!(), name, || {
        for way in WAYS {
            let mut elsewhere = Command::new("true");
            elsewhere.current_dir("/nonexistent");
            for command in [Command::new("/nonexistent"), elsewhere] {
                error_of(way(command));
                let left = rustix::process::wait(WaitOptions::NOHANG);
                assert_eq!(left.unwrap_err(), rustix::io::Errno::CHILD);
            }
            assert!(output(way(sh("exit 0"))).status.is_success());
            let left = rustix::process::wait(WaitOptions::NOHANG);
            assert_eq!(left.unwrap_err(), rustix::io::Errno::CHILD);
        }
    });
}

/// at whichever descriptor it runs out of numbers.
#[test]
fn a_want_of_descriptors_is_an_error_and_leaves_nothing() {
    let name = "a_want_of_descriptors_is_an_error_and_leaves_nothing";
    in_own_process(module_path!(), name, || {
        let ledger = DescriptorLedger::open();
        let mut reactor = Reactor::new().unwrap();
        let mut started = 0;
        for (way, free) in WAYS
            .into_iter()
            .flat_map(|way| (0..16).map(move |it| (way, it)))
        {
            leave_free(free);
            let script = Script::new();
            let record = script.record();
            let command = way(Command::new("cat")).read_from(4);
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
        assert!((2..32).contains(&started), "{started}");
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
    for way in WAYS {
        let _ledger = DescriptorLedger::open();
        let mut command = Command::new(std::env::current_exe().unwrap());
        let name = "given::a_child_takes_what_it_was_given";
        command.args(["--exact", name, "--test-threads=1"]);
        command.env("BOWLINE_TEST_TAKES", "1").stdout(Stdio::null());
        let record = run(
            way(command).read_from(NUMBER).null(1).null(2),
            Script::new(),
        );
        assert_eq!(record.text(NUMBER), "taken");
    }
}

/// As service managers give them.
#[test]
fn listeners_are_given_as_systemd_does() {
    const SAYS: &str =
        "[ $LISTEN_PID = $$ ] && echo $LISTEN_FDS $LISTEN_FDNAMES && env | grep -c ^LISTEN_";
    for way in WAYS {
        let _ledger = DescriptorLedger::open();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut command = sh(SAYS);
        command
            .env("LISTEN_FDNAMES", "an old one")
            .env("LISTEN_PID", "1");
        let command = way(command).listen_fds(&[(listener.as_fd(), "web")]);
        let said = stdout(command);
        let count = if own_pidfd_inode().is_some() { 4 } else { 3 };
        assert_eq!(said, format!("1 web\n{count}\n"));
    }
}
