//! Successors that were started here: real processes, which do nothing but run until
//! they are killed. What they would say is said by hand.

use std::io::{IoSliceMut, PipeReader, PipeWriter, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::rc::Rc;
use std::time::Instant;

use bowline::handoff::channel::Role;
use bowline::handoff::restart::RestartError;
use bowline::process::ChildProcess;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

use super::wire::{Hand, ready, serving, take, taken};
use super::{REAP, Server, Stage, Staged, ms};
use crate::pool::raw::send_bytes;
use crate::support::{DEADLINE, row};

/// One that runs until it is killed, or nobody holds it any more.
pub(super) struct Sleeper {
    pub(super) pid: u32,
    input: PipeWriter,
    output: PipeReader,
}

impl Sleeper {
    /// What it would say is said by the test, which the kernel takes for it.
    pub(super) fn start(stage: &mut Stage, server: &Server) -> Self {
        Self::start_as(stage, server, |child| Box::new(Ours(child)))
    }

    fn start_as(
        stage: &mut Stage,
        server: &Server,
        seen_as: impl FnOnce(Child) -> Box<dyn ChildProcess>,
    ) -> Self {
        let (stdin, input) = std::io::pipe().expect("a pipe");
        let (output, stdout) = std::io::pipe().expect("a pipe");
        let mut command = Command::new("cat");
        command.stdin(stdin).stdout(stdout);
        let pid = start_as(stage, server, command, seen_as);
        Self { pid, input, output }
    }

    /// Whether it was not killed: it does not answer even if it is not dead yet.
    pub(super) fn lives(&mut self) -> bool {
        self.input.write_all(b"?").is_ok() && matches!(self.output.read(&mut [0]), Ok(1))
    }
}

/// A command that is not to be started.
fn never() -> Command {
    Command::new("false")
}

fn kill(pid: u32) {
    let pid = Pid::from_raw(pid.cast_signed()).expect("not 0");
    kill_process(pid, Signal::KILL).expect("ours");
}

/// One that ends at once, so.
fn exits(code: i32) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", &format!("exit {code}")]);
    command
}

/// Starts it; its number.
fn start(stage: &mut Stage, server: &Server, command: Command) -> u32 {
    start_as(stage, server, command, |child| Box::new(child))
}

fn start_as(
    stage: &mut Stage,
    server: &Server,
    mut command: Command,
    seen_as: impl FnOnce(Child) -> Box<dyn ChildProcess>,
) -> u32 {
    let mut pid = 0;
    server
        .restart
        .start_successor_with(&mut stage.reactor, || {
            let child = command.spawn()?;
            pid = child.id();
            Ok(seen_as(child))
        })
        .expect("it serves");
    pid
}

/// A child that goes by the number of the test's own process, whose connections are its.
struct Ours(Child);

impl ChildProcess for Ours {
    fn pid(&self) -> u32 {
        std::process::id()
    }

    fn kill(&mut self) -> std::io::Result<()> {
        self.0.kill()
    }

    fn try_wait(&mut self) -> std::io::Result<Option<ExitStatus>> {
        self.0.try_wait()
    }

    fn exit_descriptor(&mut self) -> std::io::Result<Option<Rc<OwnedFd>>> {
        self.0.exit_descriptor()
    }
}

/// A process of whose end the kernel does not tell.
struct Untold(Child);

impl ChildProcess for Untold {
    fn pid(&self) -> u32 {
        std::process::id()
    }

    fn kill(&mut self) -> std::io::Result<()> {
        self.0.kill()
    }

    fn try_wait(&mut self) -> std::io::Result<Option<ExitStatus>> {
        self.0.try_wait()
    }
}

/// The children of this thread.
fn children() -> Vec<u32> {
    let all = std::fs::read_to_string("/proc/thread-self/children").expect("Linux has it");
    all.split_ascii_whitespace()
        .map(|pid| pid.parse().expect("a number"))
        .collect()
}

/// Whether it is neither gone nor a zombie.
fn runs(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat
        .rsplit(") ")
        .next()
        .and_then(|rest| rest.chars().next());
    !matches!(state, None | Some('Z' | 'X'))
}

/// Moves the time in steps until the process is reaped; it ends in real time.
#[track_caller]
pub(super) fn reap(stage: &mut Stage, pid: u32) {
    let started = Instant::now();
    while children().contains(&pid) {
        assert!(started.elapsed() < DEADLINE, "{pid} does not end");
        stage.advance(REAP);
        std::thread::yield_now();
    }
    // It may have ended before its end was watched, or in the middle of the last turn.
    stage.settle();
}

#[test]
fn child_that_ends_before_it_asks_is_a_failure_with_its_status() {
    let (mut stage, server) = Stage::serving();
    let mut failed = 0;
    for code in [0, 3] {
        let _row = row(code);
        let pid = start(&mut stage, &server, exits(code));
        assert!(server.restart.is_under_way());
        reap(&mut stage, pid);
        assert!(!server.restart.is_under_way());
        failed += 1;
        assert_eq!(server.restart.successors_failed(), failed);
        let ended = "goes on: successor ended before it took over: exit status";
        assert_eq!(server.events(), [format!("{ended}: {code}")]);
    }
}

/// Contract X-12: whoever waits for all children of a program waits for this one too.
#[test]
fn child_that_somebody_else_has_waited_for_is_a_failure() {
    let (mut stage, server) = Stage::serving();
    // It is not asked for while it is started, which would be the first to wait.
    let mut command = Command::new("sh");
    command.args(["-c", "read _"]).stdin(Stdio::piped());
    let mut child = command.spawn().expect("a shell");
    let input = child.stdin.take();
    let number = Pid::from_raw(child.id().cast_signed());
    server
        .restart
        .start_successor_with(&mut stage.reactor, || Ok(Box::new(child)))
        .expect("it serves");
    drop(input);
    waitpid(number, WaitOptions::empty()).expect("ours");
    stage.advance(REAP);
    assert_eq!(server.events(), ["goes on: the other process is gone"]);
    assert!(!server.restart.is_under_way());
    stage.advance(ms(10_000));
    assert_eq!(server.events(), [""; 0]);
}

#[test]
fn child_of_whose_end_the_kernel_does_not_tell_is_asked_every_so_often() {
    let (mut stage, server) = Stage::serving();
    let child = exits(0).spawn().expect("a shell");
    let pid = child.id();
    let started = Instant::now();
    while runs(pid) {
        assert!(started.elapsed() < DEADLINE, "it does not end");
        std::thread::yield_now();
    }
    server
        .restart
        .start_successor_with(&mut stage.reactor, || Ok(Box::new(Untold(child))))
        .expect("it serves");
    stage.advance(REAP - ms(1));
    assert_eq!(server.events(), [""; 0]);
    stage.advance(ms(1));
    assert_eq!(server.events().len(), 1);
}

#[test]
fn child_that_does_not_ask_in_time_is_killed() {
    let (mut stage, server) = Stage::serving();
    let mut child = Sleeper::start(&mut stage, &server);
    stage.advance(ms(2_999));
    assert!(child.lives());
    stage.advance(ms(1));
    reap(&mut stage, child.pid);
    let late = ["goes on: the other process took too long"];
    assert_eq!(server.events(), late);
    assert!(server.restart.is_serving() && !server.restart.is_under_way());
}

/// The limit of one that has ended is not that of the next.
#[test]
fn each_child_has_its_own_time_to_ask() {
    let mut stage = Stage::new();
    let server = stage.begin("old", &["web"]);
    let first = start(&mut stage, &server, exits(0));
    stage.advance(ms(1_000));
    reap(&mut stage, first);
    server.events();
    let mut second = Sleeper::start(&mut stage, &server);
    stage.advance(ms(2_999));
    assert!(second.lives() && server.restart.is_under_way());
    stage.advance(ms(1));
    reap(&mut stage, second.pid);
    assert_eq!(server.events().len(), 1);
}

#[test]
fn child_that_has_asked_has_the_time_of_its_steps() {
    let (mut stage, server) = Stage::serving();
    let mut child = Sleeper::start(&mut stage, &server);
    let hand = stage.successor(child.pid);
    stage.say_all(&hand, [take(0), taken(0)]);
    // Longer than it had to ask.
    stage.advance(ms(4_999));
    assert!(child.lives());
    assert_eq!(server.events(), [""; 0]);
    stage.say_all(&hand, [ready(), serving()]);
    assert_eq!(server.events(), ["handed over"]);
    // It is on its own now.
    stage.advance(ms(3_000));
    assert!(child.lives());
    kill(child.pid);
    reap(&mut stage, child.pid);
}

/// It may hand over too, and end while the first process serves what is left there:
/// nobody else can wait for it.
#[test]
fn child_that_has_taken_over_is_reaped_when_it_ends() {
    for is_told in [true, false] {
        let _row = row(is_told);
        let (mut stage, server) = Stage::serving();
        let child = Command::new("sleep").arg("1000").spawn().expect("sleep");
        let pid = child.id();
        let process: Box<dyn ChildProcess> = match is_told {
            true => Box::new(Ours(child)),
            false => Box::new(Untold(child)),
        };
        let start = server
            .restart
            .start_successor_with(&mut stage.reactor, || Ok(process));
        start.expect("it serves");
        let hand = stage.successor(pid);
        stage.say_all(&hand, [take(0), taken(0), ready(), serving()]);
        assert_eq!(server.events(), ["handed over"]);
        kill(pid);
        reap(&mut stage, pid);
        stage.advance(ms(10_000));
        assert_eq!(server.events(), [""; 0], "it is nobody's failure");
        assert_eq!(server.restart.successors_failed(), 0);
    }
}

/// Whoever says that it is the child.
#[test]
fn only_the_child_is_served_while_there_is_one() {
    let (mut stage, server) = Stage::serving();
    let mut child = Sleeper::start_as(&mut stage, &server, |child| Box::new(child));
    for word in [child.pid, child.pid + 1, std::process::id()] {
        let stranger = stage.successor(word);
        stage.say(&stranger, &take(0));
        assert_eq!(stranger.hears(), ["refused 1", "lost"]);
        assert_eq!(server.events(), [""; 0]);
        assert!(child.lives());
    }
    kill(child.pid);
    reap(&mut stage, child.pid);
    assert_eq!(server.events().len(), 1);
}

#[test]
fn the_child_is_served_whatever_it_says_and_once() {
    let (mut stage, server) = Stage::serving();
    let mut child = Sleeper::start(&mut stage, &server);
    let hand = stage.successor(child.pid + 1);
    stage.say(&hand, &take(0));
    assert_eq!(hand.hears()[0], "offer 1 [1]");
    // Once.
    let again = stage.successor(child.pid);
    stage.say(&again, &take(0));
    assert_eq!(again.hears(), ["refused 1", "lost"]);
    assert!(child.lives());
    stage.hang_up(hand);
    reap(&mut stage, child.pid);
    assert_eq!(server.events(), ["goes on: the other process is gone"]);
}

/// Says to the test that it is to connect to this, to leave that to whoever has its
/// standard input, and to end.
const LEAVES: &str = "BOWLINE_TEST_LEAVES_ITS_CONNECTION";

#[test]
fn leaves_its_connection() {
    if let Some(path) = std::env::var_os(LEAVES) {
        let socket = StdUnixStream::connect(path).expect("it listens");
        let stdin = std::io::stdin().as_fd().try_clone_to_owned();
        let stdin = StdUnixStream::from(stdin.expect("a socket"));
        send_bytes(&stdin, b"!", &[socket.as_fd()]).expect("room");
    }
}

/// Its keys, as those of connections that move, would be for whoever has its connection.
#[test]
fn process_that_is_gone_is_not_served_in_the_person_of_another() {
    let (mut stage, server) = Stage::serving();
    let (ours, theirs) = StdUnixStream::pair().expect("a pair");
    let mut command = Command::new(std::env::current_exe().expect("Linux knows"));
    let test = "restart::alone::children::leaves_its_connection";
    command.args(["--exact", test]).env(LEAVES, stage.control());
    command
        .stdin(OwnedFd::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let status = command.status().expect("it starts");
    assert!(status.success());
    // It would close what it was given, if it were not taken.
    drop(command);
    let hand = Hand::new(received(&ours).into());
    hand.greet(Role::SUCCESSOR, std::process::id(), 1 << 20);
    stage.settle();
    assert_eq!(hand.hears(), ["lost"]);
    assert_eq!(server.events(), [""; 0]);
    // Nobody's place is taken by it.
    let next = stage.successor(1);
    stage.say(&next, &take(0));
    assert_eq!(next.hears()[0], "offer 1 [1]");
    stage.hang_up(next);
}

/// The descriptor that was sent.
fn received(socket: &StdUnixStream) -> OwnedFd {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let bytes = &mut [IoSliceMut::new(&mut byte)];
    recvmsg(socket, bytes, &mut control, RecvFlags::CMSG_CLOEXEC).expect("it was sent");
    let fds = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    fds.expect("a descriptor")
}

#[test]
fn child_of_another_format_is_killed() {
    let (mut stage, server) = Stage::serving();
    let child = Sleeper::start(&mut stage, &server);
    let hand = stage.successor(child.pid);
    stage.say(&hand, &take(1));
    assert_eq!(hand.hears(), ["refused 2", "lost"]);
    reap(&mut stage, child.pid);
    let told = ["goes on: predecessor is of another format"];
    assert_eq!(server.events(), told);
}

/// The program is told when nothing is left of the child, so that it may start the
/// next at once.
#[test]
fn child_that_fails_is_killed_before_the_program_is_told() {
    let (mut stage, server) = Stage::serving();
    let child = Sleeper::start(&mut stage, &server);
    let hand = stage.successor(child.pid);
    stage.say(&hand, &take(0));
    // Not for the first reason only.
    stage.advance(ms(1_000));
    stage.hang_up(hand);
    reap(&mut stage, child.pid);
    let late = ["goes on: the other process took too long"];
    assert_eq!(server.events(), late);
    let next = start(&mut stage, &server, exits(0));
    reap(&mut stage, next);
    assert_eq!(server.events().len(), 1);
}

/// Its channel may outlive it for a moment: that tells what it was for.
#[test]
fn child_that_ends_with_its_channel_open_is_told_of_once() {
    let (mut stage, server) = Stage::serving();
    let child = Sleeper::start(&mut stage, &server);
    let hand = stage.successor(child.pid);
    stage.say(&hand, &take(0));
    kill(child.pid);
    let started = Instant::now();
    while runs(child.pid) {
        assert!(started.elapsed() < DEADLINE, "it does not end");
        std::thread::yield_now();
    }
    // The kernel may tell of it a moment later.
    reap(&mut stage, child.pid);
    assert_eq!(server.events(), [""; 0]);
    assert!(server.restart.is_under_way());
    stage.hang_up(hand);
    assert_eq!(server.events(), ["goes on: the other process is gone"]);
    stage.advance(ms(10_000));
    assert_eq!(server.events(), [""; 0]);
}

/// Contract X-21, of a program that is not there.
#[test]
fn no_child_is_started_where_there_is_no_use_for_one() {
    let mut stage = Stage::new();
    let settings = stage.settings();
    let server = stage.begin_only(settings, "old", &["web"]);
    let before = children();
    let refuses = |stage: &mut Stage, command| {
        let started = server.restart.start_successor(&mut stage.reactor, command);
        assert_eq!(children(), before);
        started.expect_err("no use").to_string()
    };
    let not_serving = RestartError::NotServing.to_string();
    assert_eq!(refuses(&mut stage, never()), not_serving);
    stage.settle();
    let missing = Command::new("/nonexistent/program");
    let not_found = std::io::Error::from_raw_os_error(2);
    assert_eq!(
        refuses(&mut stage, missing),
        format!("cannot start the successor: {not_found}")
    );
    assert_eq!(server.restart.successors_failed(), 1);
    assert!(!server.restart.is_under_way());
    // Another one is served.
    let hand = stage.successor(1);
    stage.say(&hand, &take(0));
    let busy = RestartError::Busy.to_string();
    assert_eq!(refuses(&mut stage, never()), busy);
    stage.hang_up(hand);
    // Another one was started.
    let child = Sleeper::start(&mut stage, &server);
    let again = server.restart.start_successor(&mut stage.reactor, never());
    assert_eq!(again.expect_err("one is there").to_string(), busy);
    stage.advance(ms(3_000));
    reap(&mut stage, child.pid);
}
