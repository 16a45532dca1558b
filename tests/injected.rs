//! System calls that fail as they rarely do: injected by `strace`, from outside.
//!
//! Each case runs in this test binary, started again under strace.

#![allow(clippy::print_stdout, reason = "how its processes talk to each other")]

#[path = "policies/capture.rs"]
mod capture;
#[path = "support/mod.rs"]
mod support;

use std::cell::Cell;
use std::env;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as StdUnixAddress, UnixStream as Client};
use std::process::{Command, Output, Stdio};
use std::rc::Rc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use bowline::lifecycle::{Phase, SystemEvent};
use bowline::{
    Address, Context, Datagram, DatagramProtocol, DatagramTransport, Packet, PacketProtocol,
    PacketTransport, Protocol, Reactor, Transport, Transports, UnixAddress, UnixDatagram,
    UnixSeqpacket,
};
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, setrlimit};

use crate::support::{DEADLINE, Record, Recorder, open_descriptors, run_until, run_until_quiet};

/// Names the variable that says which case the second process is.
const CASE: &str = "BOWLINE_TEST_INJECTED";

/// Runs a case in a process in which strace makes calls fail.
#[track_caller]
fn run(case: &str, strace: &[&str]) {
    let (trace, output) = traced(case, strace);
    let injected = trace.lines().filter(|line| line.contains("(INJECTED)"));
    assert!(
        injected.count() > 0,
        "nothing was injected; may strace trace here?\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert_success(case, &output);
}

#[track_caller]
fn assert_success(case: &str, output: &Output) {
    assert!(
        output.status.success(),
        "{case}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Runs a case under strace; what that wrote, and how the case ended.
#[track_caller]
fn traced(case: &str, strace: &[&str]) -> (String, Output) {
    let log = tempfile::NamedTempFile::new().unwrap();
    let output = Command::new("strace")
        .arg("-f")
        .arg("-o")
        .arg(log.path())
        .args(strace)
        .arg(env::current_exe().unwrap())
        .args(["--exact", "case", "--ignored", "--nocapture"])
        .env(CASE, case)
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| {
            panic!(
                "CANNOT RUN strace, which this test needs ({error}): install the package `strace`"
            )
        });
    (fs::read_to_string(log.path()).unwrap(), output)
}

/// Contract L-05, L-04: one is refused, those behind it are served in the same turn; that
/// nobody else waits is no word in the log.
#[test]
fn accept_that_fails_with_eperm_goes_on_with_the_next() {
    run(
        "one connection",
        &["-e", "inject=accept4:error=EPERM:when=1..2"],
    );
}

/// Contract L-06: the one that was aborted is gone, the others are served.
#[test]
fn accept_that_fails_with_econnaborted_goes_on_with_the_next() {
    run(
        "one connection",
        &["-e", "inject=accept4:error=ECONNABORTED:when=1..2"],
    );
}

/// Contract L-05: it counts against the batch, so that others have their turn.
#[test]
fn accept_that_fails_without_end_does_not_keep_the_loop() {
    run(
        "a thousand failures",
        &["-e", "inject=accept4:error=EPERM:when=1..1000"],
    );
}

/// Contract L-06, G-07, M-06, W-49: told once, tried again by a timer, and nobody is
/// lost.
#[test]
fn accept_that_fails_for_want_of_memory_is_tried_again() {
    for error in ["ENOBUFS", "ENOMEM"] {
        let inject = format!("inject=accept4:error={error}:when=1..2");
        run(&format!("shortage {error}"), &["-e", &inject]);
    }
}

/// Contract L-06, L-07, G-06, G-07, M-06, W-49: as when the process has none, the reserve
/// sheds one; whatever the log does with its line, the reserve is there again by then.
#[test]
fn accept_that_fails_for_want_of_files_in_the_system_sheds_one() {
    run(
        "shortage ENFILE",
        &["-e", "inject=accept4:error=ENFILE:when=1"],
    );
}

/// Contract L-09, G-07.
#[test]
fn accept_that_fails_for_an_unknown_reason_is_logged_and_tried_again() {
    run(
        "shortage EREMOTEIO",
        &["-e", "inject=accept4:error=EREMOTEIO:when=1..2"],
    );
}

/// Contract L-08: whether the one to be shed can be accepted or not.
#[test]
fn the_reserve_is_taken_again_although_nobody_was_shed() {
    run(
        "nobody to shed",
        &["-e", "inject=accept4:error=EMFILE:when=1..2"],
    );
}

/// Contract L-08, G-08: it listens all the same, and takes one when it can.
#[test]
fn a_reserve_that_cannot_be_opened_is_logged_and_tried_again() {
    for error in ["EMFILE", "ENOENT"] {
        let inject = format!("inject=openat:error={error}:when=1");
        run(
            &format!("no reserve {error}"),
            &["-P", "/dev/null", "-e", &inject],
        );
    }
}

/// Contract R-40: a turn in which nothing happens, and no word about it.
#[test]
fn poll_that_is_interrupted_is_an_empty_turn() {
    run(
        "interrupted",
        &["-e", "inject=epoll_wait:error=EINTR:when=2..4"],
    );
}

/// Contract R-40: the loop goes on.
#[test]
fn poll_that_fails_is_logged() {
    run(
        "poll fails",
        &["-e", "inject=epoll_wait:error=EINVAL:when=2..4"],
    );
}

/// Contract R-40: by a real signal. A process that is stopped and continued has
/// its poll interrupted without any handler (signal(7)).
#[test]
fn poll_that_a_signal_interrupts_is_an_empty_turn() {
    let mut child = Command::new(env::current_exe().unwrap())
        .args(["--exact", "case", "--ignored", "--nocapture"])
        .env(CASE, "stopped")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (line, lines) = mpsc::channel();
    let output = BufReader::new(child.stdout.take().unwrap());
    let reading = thread::spawn(move || {
        for text in output.lines().map_while(Result::ok) {
            let _ = line.send(text);
        }
    });
    let pid = Pid::from_child(&child);
    let await_line = |wanted: &str, patience: Duration| {
        let began = Instant::now();
        while let Some(left) = patience.checked_sub(began.elapsed()) {
            match lines.recv_timeout(left) {
                Ok(text) if text.contains(wanted) => return true,
                Ok(_) => {}
                Err(_) => return false,
            }
        }
        false
    };
    assert!(await_line("waiting", DEADLINE));
    let began = Instant::now();
    loop {
        kill_process(pid, Signal::STOP).unwrap();
        while !fs::read_to_string(format!("/proc/{}/stat", child.id()))
            .unwrap()
            .contains(") T ")
        {
            thread::yield_now();
        }
        kill_process(pid, Signal::CONT).unwrap();
        // Unless it was on its way into the poll.
        if await_line("empty turn", Duration::from_millis(200)) {
            break;
        }
        assert!(began.elapsed() < DEADLINE, "no poll was ever interrupted");
    }
    drop(child.stdin.take());
    assert!(await_line("nothing was logged, and it went on", DEADLINE));
    assert!(child.wait().unwrap().success());
    reading.join().unwrap();
}

/// Contract L-22, W-45: in every way in which a listener can end. The other way round a
/// successor could take the path over in between, with the same number for its file
/// even, and lose it.
#[test]
fn the_file_of_a_listener_is_removed_before_its_socket_is_closed() {
    for kind in ["stream", "packets", "datagrams"] {
        for how in ["drop", "stop", "crash", "panic", "never-turned"] {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("socket");
            let case = format!("path {} {how} {kind}", path.display());
            let (trace, output) = traced(&case, &["-e", "trace=bind,unlink,close"]);
            assert_success(&case, &output);
            let (_, bound) = trace.split_once("bind(").expect("it binds");
            let (descriptor, after) = bound.split_once(',').expect("it binds");
            // A line ends here where a call of another thread comes in between.
            let place = |what: String| {
                let places = [")", " <unfinished"].map(|end| after.find(&format!("{what}{end}")));
                places.into_iter().flatten().min()
            };
            let removed = place(format!("unlink(\"{}\"", path.display()));
            let removed = removed.unwrap_or_else(|| panic!("{kind} {how}: not removed\n{trace}"));
            let closed = place(format!("close({descriptor}"));
            // Datagrams nobody has read can make a close wait, so a thread closes their
            // socket. The end of the process may come before that.
            let is_left = closed.is_none() && kind == "datagrams";
            let is_later = closed.is_some_and(|closed| removed < closed);
            assert!(is_later || is_left, "{kind} {how}: closed first\n{trace}");
        }
    }
}

/// Contract L-21, W-46: between bind(2) and listen(2), so that nobody ever connects to a
/// socket of another mode, and by the socket's own descriptor before that, so that it is
/// never wider.
#[test]
fn the_mode_of_a_file_is_set_before_anybody_can_connect() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let case = format!("path {} drop stream", path.display());
    // An older strace has no name for fchmodat2.
    let (trace, output) = traced(&case, &["-e", "trace=all"]);
    assert_success(&case, &output);
    let calls: Vec<_> = trace
        .lines()
        .filter_map(|line| line.split_once('(')?.0.split_whitespace().last())
        .filter_map(|call| match call {
            "chmod" | "fchmod" | "fchmodat" | "bind" | "listen" => Some(call),
            "fchmodat2" | "syscall_0x1c4" => Some("fchmodat2"),
            _ => None,
        })
        .skip_while(|call| *call != "fchmod")
        .collect();
    // The umask has taken something from it in between.
    let with_proc = ["fchmod", "bind", "fchmodat2", "chmod", "listen"];
    let is_right = calls == ["fchmod", "bind", "fchmodat2", "listen"] || calls == with_proc;
    assert!(is_right, "{calls:?}");
}

/// Contract L-25, W-44: whoever dies on the way to a path leaves nothing that keeps the next
/// from it.
#[test]
fn a_program_that_is_killed_while_it_takes_a_path_stops_nobody() {
    let calls = [
        ("socket", 1..=3),
        ("fchmod", 1..=1),
        ("bind", 1..=3),
        ("flock", 1..=2),
        ("connect", 1..=4),
        ("unlink", 1..=1),
        ("fchmodat2", 1..=1),
        ("listen", 1..=1),
    ];
    for (call, times) in calls {
        for time in times {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("socket");
            drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
            let case = format!("path {} drop stream", path.display());
            let inject = format!("inject={call}:signal=KILL:when={time}");
            let (trace, output) = traced(&case, &["-e", &inject]);
            let said = String::from_utf8_lossy(&output.stderr);
            if said.contains("invalid system call") {
                println!("NOT RUN: this strace is older than {call}");
                continue;
            }
            assert!(
                trace.contains("+++ killed by SIGKILL +++"),
                "{call} {time}: not killed\n{trace}{said}"
            );
            let (_, output) = traced(&case, &["-e", "trace=none"]);
            assert_success(&format!("after {call} {time}"), &output);
        }
    }
}

/// Contract L-24, W-44: one that has found a socket dead and has not removed it yet keeps
/// the others from doing so, which would have it remove a living one then.
#[test]
fn a_program_that_removes_a_dead_socket_has_others_wait_for_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let case = format!("path {} drop stream", path.display());
    // As long as one that is not kept from it needs, many times over.
    let inject = "inject=unlink:delay_enter=1000000:when=1";
    let its = case.clone();
    // That its file is gone at the end is not asserted here: we may have the path by then.
    let slow = thread::spawn(move || traced(&its, &["-e", inject]));
    let began = Instant::now();
    while !is_in_unlink(&case) {
        assert!(began.elapsed() < DEADLINE && !slow.is_finished());
        thread::yield_now();
    }
    let mut reactor = Reactor::new().unwrap();
    let listener = reactor.listen_unix(&*path, |_: &Address| Recorder::default());
    slow.join().unwrap();
    // The first may have ended before we looked, and have left the path to us.
    assert_eq!(listener.is_ok(), path.exists(), "{listener:?}");
}

/// Whether what strace runs for this case is about to remove a file.
fn is_in_unlink(case: &str) -> bool {
    let pids = |listed: String| {
        listed
            .split_whitespace()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let children_of = |path: String| {
        let tasks = fs::read_dir(path).into_iter().flatten().flatten();
        tasks
            .filter_map(|task| fs::read_to_string(task.path().join("children")).ok())
            .flat_map(pids)
            .collect::<Vec<_>>()
    };
    let straces = children_of("/proc/self/task".into());
    let traced = straces
        .iter()
        .flat_map(|strace| children_of(format!("/proc/{strace}/task")))
        // Not that of another test.
        .filter(|pid| {
            let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            String::from_utf8_lossy(&environment).contains(case)
        });
    let unlink = format!("{} ", libc::SYS_unlink);
    traced.into_iter().any(|pid| {
        let tasks = fs::read_dir(format!("/proc/{pid}/task"));
        tasks.into_iter().flatten().flatten().any(|task| {
            let call = fs::read_to_string(task.path().join("syscall"));
            call.is_ok_and(|call| call.starts_with(&unlink))
        })
    })
}

#[test]
#[ignore = "a case of the other tests, which run it in a process of its own"]
fn case() {
    let Ok(case) = env::var(CASE) else {
        return;
    };
    capture::start();
    let case: Vec<_> = case.splitn(2, ' ').collect();
    match case.as_slice() {
        ["one", _] => one_connection(),
        ["a", _] => a_thousand_failures(),
        ["shortage", error] => shortage(error),
        ["nobody", _] => nobody_to_shed(),
        ["no", reserve] => no_reserve(reserve),
        ["interrupted"] => polls_that_fail(false),
        ["poll", _] => polls_that_fail(true),
        ["stopped"] => stopped(),
        ["path", how] => a_path(how),
        other => panic!("no case {other:?}"),
    }
}

/// Listens on a path, is reached, and ends.
fn a_path(arguments: &str) {
    let words: Vec<_> = arguments.split(' ').collect();
    let [path, how, kind] = words.as_slice() else {
        panic!("{arguments}");
    };
    let run = || {
        // As with most programs: the umask takes something from the mode.
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
        let mut reactor = Reactor::new().unwrap();
        let is_reached = Rc::new(Cell::new(false));
        let stop = listen_as(kind, &mut reactor, path, &is_reached);
        match *how {
            "never-turned" => {}
            _ => run_until(&mut reactor, |_| is_reached.get()),
        }
        match *how {
            "stop" => {
                stop(&mut reactor);
                run_until_quiet(&mut reactor);
            }
            "crash" => {
                reactor.call_later(Duration::ZERO, |reactor| reactor.crash().unwrap());
                reactor.run().unwrap();
            }
            "panic" => panic!("as asked"),
            _ => {}
        }
    };
    let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
    assert_eq!(ended.is_err(), *how == "panic");
    assert!(!std::path::Path::new(path).exists());
}

/// Says that somebody has reached it.
#[derive(Clone)]
struct Reached(Rc<Cell<bool>>);

impl<T: Transport> Protocol<T> for Reached {
    fn connection_made(&mut self, _: &mut Context<'_, T>) {
        self.0.set(true);
    }
    fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {}
}

impl<T: PacketTransport> PacketProtocol<T> for Reached {
    fn connection_made(&mut self, _: &mut Context<'_, T>) {
        self.0.set(true);
    }
    fn packet_received(&mut self, _: &mut Context<'_, T>, _: &mut Packet<'_>) {}
}

impl<T: DatagramTransport> DatagramProtocol<T> for Reached {
    fn datagram_received(&mut self, _: &mut Context<'_, T>, _: &mut Datagram<'_>) {
        self.0.set(true);
    }
}

/// Listens with a socket of that kind, which somebody reaches. The answer stops it.
fn listen_as(
    kind: &str,
    reactor: &mut Reactor,
    path: &str,
    is_reached: &Rc<Cell<bool>>,
) -> Box<dyn FnOnce(&mut Reactor)> {
    let reached = Reached(Rc::clone(is_reached));
    match kind {
        "stream" => {
            let build = move |_: &Address| reached.clone();
            let listener = reactor.listen_unix(path, build).unwrap();
            drop(Client::connect(path).unwrap());
            Box::new(move |reactor| reactor.get(listener).unwrap().stop_listening())
        }
        "packets" => {
            let build = move |_: &Address| reached.clone();
            let listener = reactor.listen(UnixSeqpacket::at(path), build).unwrap();
            let client = rustix::net::socket_with(
                rustix::net::AddressFamily::UNIX,
                rustix::net::SocketType::SEQPACKET,
                rustix::net::SocketFlags::CLOEXEC,
                None,
            );
            let address = rustix::net::SocketAddrUnix::new(path).unwrap();
            rustix::net::connect(client.unwrap(), &address).unwrap();
            Box::new(move |reactor| reactor.get(listener).unwrap().stop_listening())
        }
        "datagrams" => {
            let socket = reactor.listen(UnixDatagram::at(path), reached).unwrap();
            let client = std::os::unix::net::UnixDatagram::unbound().unwrap();
            client.send_to(b"?", path).unwrap();
            Box::new(move |reactor| reactor.get(socket).unwrap().stop_listening())
        }
        other => panic!("no kind {other}"),
    }
}

/// A listener with clients that wait at it.
struct Stage {
    reactor: Reactor,
    record: Record,
    clients: Vec<Client>,
    name: Vec<u8>,
}

impl Stage {
    fn new() -> Self {
        let mut reactor = Reactor::new().unwrap();
        let record = Record::default();
        let recorder = Recorder::new(&record);
        let name = format!("bowline-injected-{}", std::process::id()).into_bytes();
        reactor
            .listen_unix(UnixAddress::Abstract(name.clone()), move |_: &Address| {
                recorder.clone()
            })
            .unwrap();
        let mut stage = Self {
            reactor,
            record,
            clients: Vec::new(),
            name,
        };
        stage.connect(3);
        stage
    }

    fn connect(&mut self, clients: usize) {
        let address = StdUnixAddress::from_abstract_name(&self.name).unwrap();
        let connect = |_| Client::connect_addr(&address).unwrap();
        self.clients.extend((0..clients).map(connect));
    }

    fn accepted(&self) -> usize {
        self.record
            .summary()
            .iter()
            .filter(|it| *it == "made")
            .count()
    }

    #[track_caller]
    fn run_until_accepted(&mut self, wanted: usize) {
        let record = self.record.clone();
        run_until(&mut self.reactor, |_| {
            record.summary().iter().filter(|it| *it == "made").count() == wanted
        });
    }
}

/// How many descriptors are the reserve, or look like it.
fn reserves() -> usize {
    let is_null = |fd: &&i32| {
        let file = fs::read_link(format!("/proc/thread-self/fd/{fd}"));
        file.is_ok_and(|path| path.as_os_str() == "/dev/null")
    };
    open_descriptors().iter().filter(is_null).count()
}

/// The first two accepts fail, each on account of one connection.
fn one_connection() {
    let mut stage = Stage::new();
    stage.reactor.turn(Some(DEADLINE));
    stage.reactor.turn(Some(Duration::ZERO));
    // At once, without a timer.
    assert_eq!(stage.accepted(), 3);
    assert_eq!(stage.reactor.delayed_calls().count(), 0);
    assert_eq!(
        capture::lines("DEBUG")
            .iter()
            .filter(|it| it.contains(" accept: "))
            .count(),
        2
    );
    assert!(capture::lines("WARN").is_empty());
    assert_eq!(stage.reactor.descriptor_counts().shed, 0);
}

fn a_thousand_failures() {
    let mut stage = Stage::new();
    let others = Rc::new(Cell::new(0));
    let seen = Rc::clone(&others);
    stage
        .reactor
        .call_every(Duration::ZERO, move |_, _| seen.set(seen.get() + 1));
    stage.run_until_accepted(3);
    // 100 accepts in a turn.
    assert!(others.get() >= 10, "{} turns for others", others.get());
}

/// Accepts that cannot go on at present.
fn shortage(error: &str) {
    let mut stage = Stage::new();
    let is_of_files = error == "ENFILE";
    let text = match error {
        "ENOBUFS" => "short of resources, trying again: No buffer space available (os error 105)",
        "ENOMEM" => "short of resources, trying again: Cannot allocate memory (os error 12)",
        "ENFILE" => "short of resources, trying again: Too many open files in system (os error 23)",
        "EREMOTEIO" => "accept failed, trying again: Remote I/O error (os error 121)",
        other => panic!("no error {other}"),
    };
    let with_reserve = reserves();
    let reserve_was_back = Rc::new(Cell::new(0));
    let seen = Rc::clone(&reserve_was_back);
    capture::watch(move |line| {
        if line.contains("gave up the reserve") {
            seen.set(reserves());
        }
    });
    // A connection that is there is not disturbed meanwhile.
    let (ours, mut theirs) = support::socketpair();
    let other = Record::default();
    stage
        .reactor
        .adopt_unix_stream(ours.into(), Recorder::new(&other))
        .unwrap();
    run_until(&mut stage.reactor, |_| !capture::lines(text).is_empty());
    assert_eq!(stage.accepted(), 0, "the batch has ended");
    assert_eq!(stage.reactor.delayed_calls().count(), 1);
    theirs.write_all(b"undisturbed").unwrap();
    run_until(&mut stage.reactor, |_| other.data() == b"undisturbed");
    stage.run_until_accepted(if is_of_files { 2 } else { 3 });
    // One line for all of the shortage, with the address.
    let lines = capture::lines(text);
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].starts_with("WARN: "), "{lines:?}");
    assert!(lines[0].contains("@bowline-injected-"), "{lines:?}");
    let shed = capture::lines("gave up the reserve to close unnamed").len();
    assert_eq!(shed, usize::from(is_of_files));
    let expected = if is_of_files { with_reserve } else { 0 };
    assert_eq!(reserve_was_back.get(), expected, "logged without a reserve");
    assert_eq!(stage.reactor.descriptor_counts().shed as usize, shed);
    // It is open as before.
    let accepted = stage.accepted();
    stage.connect(1);
    stage.run_until_accepted(accepted + 1);
    if is_of_files {
        stage.clients[0].set_read_timeout(Some(DEADLINE)).unwrap();
        assert_eq!(stage.clients[0].read(&mut [0]).unwrap(), 0);
    }
}

fn nobody_to_shed() {
    let before = reserves();
    let mut stage = Stage::new();
    assert_eq!(reserves(), before + 1);
    run_until(&mut stage.reactor, |_| {
        !capture::lines("short of").is_empty()
    });
    assert_eq!(reserves(), before + 1, "it is there again");
    stage.run_until_accepted(3);
    assert_eq!(stage.reactor.descriptor_counts().shed, 0);
    assert!(capture::lines("gave up the reserve").is_empty());
}

/// The first attempt to open the reserve fails.
fn no_reserve(reserve: &str) {
    let text = match reserve {
        "reserve EMFILE" => "cannot take a reserve descriptor: Too many open files",
        _ => "cannot take a reserve descriptor: No such file or directory",
    };
    let before = reserves();
    let mut stage = Stage::new();
    assert_eq!(reserves(), before);
    let lines = capture::lines(text);
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].starts_with("WARN: "), "{lines:?}");
    // It listens all the same.
    stage.run_until_accepted(3);
    // The alarm, which the retry will want, is a descriptor too.
    stage.reactor.call_later(Duration::from_millis(1), |_| {});
    run_until(&mut stage.reactor, |reactor| {
        reactor.delayed_calls().count() == 0
    });
    stage.connect(2);

    // Without descriptors nobody can be shed, and nothing is lost.
    let highest = *open_descriptors().last().unwrap();
    let fillers: Vec<_> = (0..)
        .map(|_| stage.clients[0].try_clone().unwrap())
        .take(highest as usize + 1 - open_descriptors().len())
        .collect();
    let limit = getrlimit(Resource::Nofile);
    let none_left = Rlimit {
        current: Some(highest as u64 + 1),
        maximum: limit.maximum,
    };
    setrlimit(Resource::Nofile, none_left).unwrap();
    run_until(&mut stage.reactor, |_| {
        !capture::lines("short of").is_empty()
    });
    assert_eq!(stage.accepted(), 3);
    setrlimit(Resource::Nofile, limit).unwrap();
    stage.run_until_accepted(5);
    assert_eq!(stage.reactor.descriptor_counts().shed, 0);
    // With the next look, there is a reserve.
    assert_eq!(reserves(), before + 1);
    assert_eq!(
        capture::lines("there is a reserve descriptor again").len(),
        1
    );
    assert_eq!(capture::lines("cannot take a reserve").len(), 1);
    drop(fillers);
}

/// Turns without end until its input ends.
fn stopped() {
    let mut reactor = Reactor::new().unwrap();
    let remote = reactor.remote();
    let has_ended = Rc::new(Cell::new(false));
    thread::spawn(move || {
        let _ = std::io::stdin().read(&mut [0]);
        remote
            .call_from_thread(|reactor| reactor.stop().unwrap())
            .unwrap();
    });
    reactor.start().unwrap();
    let seen = Rc::clone(&has_ended);
    reactor.add_trigger(Phase::After, SystemEvent::Shutdown, move |_| seen.set(true));
    println!("waiting");
    while !has_ended.get() {
        let before = reactor.statistics();
        reactor.turn(None);
        let after = reactor.statistics();
        if after.events == before.events && !has_ended.get() {
            println!("empty turn");
        }
    }
    assert_eq!(reactor.statistics().panics, 0);
    assert!(capture::lines("poll").is_empty());
    println!("nothing was logged, and it went on");
}

/// The second to the fourth poll.
fn polls_that_fail(is_logged: bool) {
    let mut reactor = Reactor::new().unwrap();
    let (ours, mut theirs) = support::socketpair();
    let record = Record::default();
    reactor
        .adopt_unix_stream(ours.into(), Recorder::new(&record))
        .unwrap();
    reactor.turn(Some(Duration::ZERO));
    let panics = reactor.statistics().panics;
    let events = reactor.statistics().events;
    theirs.write_all(b"later").unwrap();
    for _ in 0..3 {
        // They would wait without end if they were not cut short.
        reactor.turn(None);
        assert!(record.data().is_empty());
    }
    assert_eq!(reactor.statistics().events, events);
    assert_eq!(reactor.statistics().panics, panics);
    let logged = capture::lines("cannot poll: Invalid argument (os error 22)");
    assert_eq!(logged.len(), if is_logged { 3 } else { 0 });
    assert_eq!(capture::lines("ERROR").len(), logged.len());
    reactor.turn(None);
    assert_eq!(record.data(), b"later");
    run_until_quiet(&mut reactor);
}
