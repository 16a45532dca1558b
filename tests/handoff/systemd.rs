//! The interfaces of systemd: against its own `systemd-socket-activate`, and
//! against a receiver of notices of ours.

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::time::{Duration, Instant};

use bowline::handoff::systemd::{self, ActivationError, Notice, Notifier, Watchdog};
use bowline::process::{
    describe_socket, own_pidfd_inode, spawn_with_descriptors, spawn_with_listen_fds, take_granted,
};
use bowline::testing::ManualClock;
use bowline::{Address, Context, Protocol, Reactor, Transport, Transports, UnixAddress};
use bowline::{Tcp, Unix};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use crate::support::{DEADLINE, DescriptorLedger, eventually, run_until};

/// Says to the test that it is the program that was activated.
const ACTIVATED: &str = "BOWLINE_TEST_ACTIVATED";

/// Killed when the test fails.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Answers every connection with its own name, and stops the loop.
struct Name(&'static str);

impl<T: Transport> Protocol<T> for Name {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        cx.transport.write(self.0.as_bytes());
        cx.transport.lose_connection();
    }

    fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {}
}

/// What runs under `systemd-socket-activate`.
fn activated() {
    let mut reactor = Reactor::new().expect("epoll");
    let mut inherited = systemd::inherited().expect("what systemd announces");
    let names: Vec<_> = inherited.names().map(str::to_owned).collect();
    assert_eq!(names, ["tcp", "unix", "spare"]);
    let again = systemd::inherited().expect("nothing is wrong with it");
    assert!(again.is_empty(), "each is given out once: {again:?}");

    let tcp = Address::Inet(([127, 0, 0, 1], 0).into());
    // By name and address: nothing else fits.
    assert!(inherited.claim_listener("unix", &tcp).is_none());
    assert!(inherited.claim_listener("web", &tcp).is_none());
    let fd = inherited.claim_listener("tcp", &tcp).expect("port 0 fits");
    assert!(is_close_on_exec(&fd));
    reactor
        .listen(Tcp::listening(fd), |_: &Address| Name("tcp"))
        .expect("a listener");
    let fd = inherited.claim("unix").expect("announced");
    reactor
        .listen(Unix::listening(fd), |_: &Address| Name("unix"))
        .expect("a listener");
    assert_eq!(inherited.names().collect::<Vec<_>>(), ["spare"]);
    drop(inherited);
    // Until it is killed.
    reactor.run().expect("it does not run yet");
}

fn is_close_on_exec(fd: &OwnedFd) -> bool {
    let flags = rustix::io::fcntl_getfd(fd).expect("open");
    flags.contains(rustix::io::FdFlags::CLOEXEC)
}

/// E-12, W-73, by systemd's own program: claimed by name and address, taken once,
/// close-on-exec.
#[test]
fn sockets_of_systemd_are_claimed_by_name() {
    if std::env::var_os(ACTIVATED).is_some() {
        return activated();
    }
    let Some(program) = program("systemd-socket-activate") else {
        return;
    };
    let _ledger = DescriptorLedger::open();
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = |name: &str| directory.path().join(name).display().to_string();
    // Free a moment ago.
    let port = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr());
    let port = port.expect("loopback").to_string();
    let child = Command::new(program)
        .args(["-l", &port, "-l", &path("unix"), "-l", &path("spare")])
        .args(["--fdname=tcp:unix:spare", "-E", &format!("{ACTIVATED}=1")])
        .arg(std::env::current_exe().expect("Linux knows"))
        .args(["--exact", "--nocapture"])
        .arg("systemd::sockets_of_systemd_are_claimed_by_name")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let child = Killed(child.expect("starts"));
    let mut answer = String::new();
    let mut stream = eventually(DEADLINE, || TcpStream::connect(&port));
    stream.set_read_timeout(Some(DEADLINE)).expect("a socket");
    stream.read_to_string(&mut answer).expect("answers");
    assert_eq!(answer, "tcp");
    answer.clear();
    let mut stream = UnixStream::connect(path("unix")).expect("it listens");
    stream.set_read_timeout(Some(DEADLINE)).expect("a socket");
    stream.read_to_string(&mut answer).expect("answers");
    assert_eq!(answer, "unix");
    // Nobody claimed it: closed there, so that nobody waits in its queue for ever.
    eventually(DEADLINE, || match UnixStream::connect(path("spare")) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(()),
        other => Err(io::Error::other(format!("{other:?}"))),
    });
    drop(child);
}

/// Where the program is; says so loudly where it is not.
fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        .map(|folder| folder.join(name))
        .find(|program| program.exists());
    if found.is_none() {
        assert!(
            std::env::var_os("CI").is_none() && std::env::var_os("BOWLINE_INTEROP").is_none(),
            "{name} is missing: apt-get install systemd"
        );
        // Straight to the terminal: the harness keeps what tests that pass print.
        let _ = io::stderr().write_all(
            format!("NOT RUN: {name} is missing (Debian: apt-get install systemd)\n").as_bytes(),
        );
    }
    found
}

/// A service manager, as far as notices go.
pub(crate) struct Manager {
    pub(crate) socket: UnixDatagram,
}

impl Manager {
    pub(crate) fn at_path(directory: &tempfile::TempDir) -> (Self, String) {
        let path = directory.path().join("notify");
        let socket = UnixDatagram::bind(&path).expect("binds");
        (Self { socket }, path.display().to_string())
    }

    /// A notice, with the descriptors that came along.
    #[track_caller]
    pub(crate) fn receive(&self) -> (String, Vec<OwnedFd>) {
        let wait = Some(DEADLINE);
        self.socket.set_read_timeout(wait).expect("a socket");
        self.try_receive().expect("a notice")
    }

    /// The next notice, if there is one; it is waited for only if the socket blocks.
    pub(crate) fn try_receive(&self) -> Option<(String, Vec<OwnedFd>)> {
        let mut bytes = [0; 8192];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let message = recvmsg(
            &self.socket,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        )
        .ok()?;
        let descriptors = ancillary
            .drain()
            .flat_map(|message| match message {
                RecvAncillaryMessage::ScmRights(descriptors) => descriptors.collect(),
                _ => Vec::new(),
            })
            .collect();
        let text = String::from_utf8(bytes[..message.bytes].to_vec());
        Some((text.expect("text"), descriptors))
    }
}

/// A manager at a path, and who notifies it.
fn notified() -> (tempfile::TempDir, Manager, Notifier) {
    let directory = tempfile::tempdir().expect("temporary directory");
    let (manager, path) = Manager::at_path(&directory);
    let notifier = Notifier::connect(&path).expect("it is there");
    (directory, manager, notifier)
}

#[test]
fn notices_reach_a_manager_at_a_path_and_in_the_abstract_namespace() {
    let _ledger = DescriptorLedger::open();
    let (_directory, manager, notifier) = notified();
    let notice = Notice::new().ready().status("serving").main_pid(7);
    notifier.send(&notice).expect("there is room");
    assert_eq!(manager.receive().0, "READY=1\nSTATUS=serving\nMAINPID=7\n");

    let name = format!("bowline-test-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(&name).expect("a name");
    let socket = UnixDatagram::bind_addr(&address).expect("binds");
    let manager = Manager { socket };
    let notifier = Notifier::connect(&format!("@{name}")).expect("it is there");
    notifier.send(&Notice::new().stopping()).expect("room");
    assert_eq!(manager.receive().0, "STOPPING=1\n");
}

#[test]
fn stored_descriptors_arrive_with_their_name_and_stay_ours() {
    let _ledger = DescriptorLedger::open();
    let (directory, manager, notifier) = notified();
    let mut file = tempfile::tempfile().expect("temporary file");
    file.write_all(b"state").expect("room");
    let notice = Notice::new().store("state").expect("a name");
    notifier
        .send_with(&notice, &[file.as_fd(), directory_of(&directory).as_fd()])
        .expect("room");
    let (text, descriptors) = manager.receive();
    assert_eq!(text, "FDSTORE=1\nFDNAME=state\n");
    assert_eq!(descriptors.len(), 2);
    let inode = |fd: &dyn Fn() -> rustix::fs::Stat| fd().st_ino;
    assert_eq!(
        inode(&|| rustix::fs::fstat(&descriptors[0]).expect("open")),
        inode(&|| rustix::fs::fstat(&file).expect("still ours")),
    );
    let notice = Notice::new().remove_stored("state").expect("a name");
    notifier.send(&notice).expect("room");
    assert_eq!(manager.receive().0, "FDSTOREREMOVE=1\nFDNAME=state\n");
}

fn directory_of(directory: &tempfile::TempDir) -> File {
    File::open(directory.path()).expect("readable")
}

/// The queue of a manager that does not read is short; waiting for it would be
/// up to whoever has other connections to serve.
#[test]
fn notice_that_finds_no_room_is_refused_at_once() {
    let _ledger = DescriptorLedger::open();
    let (_directory, manager, notifier) = notified();
    let error = loop {
        if let Err(error) = notifier.send(&Notice::new().ready()) {
            break error;
        }
    };
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    manager.receive();
    notifier.send(&Notice::new().ready()).expect("room again");
}

#[test]
fn barrier_is_passed_when_the_manager_closes_its_end_and_times_out_else() {
    let _ledger = DescriptorLedger::open();
    let (_directory, manager, notifier) = notified();
    let mut reactor = Reactor::new().expect("epoll");
    let results = Rc::new(RefCell::new(Vec::new()));
    let result = |results: &Rc<RefCell<Vec<_>>>| {
        let results = Rc::clone(results);
        move |_: &mut Reactor, result: io::Result<()>| {
            results
                .borrow_mut()
                .push(result.map_err(|error| error.kind()));
        }
    };
    notifier
        .barrier(&mut reactor, DEADLINE, result(&results))
        .expect("room");
    let (text, descriptors) = manager.receive();
    assert_eq!((text.as_str(), descriptors.len()), ("BARRIER=1\n", 1));
    reactor.turn(Some(Duration::ZERO));
    assert!(results.borrow().is_empty(), "the manager has not got there");
    drop(descriptors);
    run_until(&mut reactor, |_| results.borrow().len() == 1);

    let soon = Duration::from_millis(10);
    notifier
        .barrier(&mut reactor, soon, result(&results))
        .expect("room");
    let _kept = manager.receive();
    run_until(&mut reactor, |_| results.borrow().len() == 2);
    assert_eq!(*results.borrow(), [Ok(()), Err(io::ErrorKind::TimedOut)]);
    // What it was attached by goes with it.
    drop(notifier);
    run_until(&mut reactor, |reactor| reactor.registered() == 0);
}

#[test]
fn watchdog_is_fed_twice_in_each_interval() {
    let _ledger = DescriptorLedger::open();
    let (_directory, manager, notifier) = notified();
    manager.socket.set_nonblocking(true).expect("a socket");
    let notifier = Rc::new(notifier);
    let clock = ManualClock::new();
    let mut reactor = Reactor::with_clock(clock.clone()).expect("epoll");
    let interval = Duration::from_millis(1_001);
    let watchdog = Watchdog::start(&mut reactor, notifier, interval);
    let mut fed = |by: Duration| {
        clock.advance(by);
        reactor.turn(Some(Duration::ZERO));
        let mut bytes = [0; 64];
        let mut count = 0;
        while let Ok(length) = manager.socket.recv(&mut bytes) {
            assert_eq!(&bytes[..length], b"WATCHDOG=1\n");
            count += 1;
        }
        count
    };
    assert_eq!(fed(Duration::ZERO), 1, "at once");
    let nearly = interval / 2 - Duration::from_millis(1);
    for _ in 0..3 {
        assert_eq!(fed(nearly), 0);
        assert_eq!(fed(Duration::from_millis(1)), 1);
    }
    drop(watchdog);
    assert_eq!(fed(interval), 0);
}

/// Says to the test that it is the program that was given descriptors, and how.
const ROLE: &str = "BOWLINE_TEST_ROLE";

/// Starts this test again as the program that is given these, as systemd does: under
/// the numbers from 3 on, with the variables for its process. Whatever it asserts has
/// to hold.
#[track_caller]
fn give(test: &str, role: &str, names: Option<&str>, descriptors: &[BorrowedFd<'_>]) {
    let mut command = Command::new("sh");
    command
        // The number of the process that is to take them.
        .args(["-c", "export LISTEN_PID=$$; exec \"$@\"", "sh"])
        .arg(std::env::current_exe().expect("Linux knows"))
        .args(["--exact", "--nocapture", test])
        .env("LISTEN_FDS", descriptors.len().to_string())
        .env_remove("LISTEN_FDNAMES")
        .env(ROLE, role)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    if let Some(names) = names {
        command.env("LISTEN_FDNAMES", names);
    }
    let grants: Vec<_> = descriptors.iter().copied().zip(3..).collect();
    let child = spawn_with_descriptors(command, &grants).expect("starts");
    let output = child.wait_with_output().expect("ours");
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(output.status.success(), "{role}: {said}");
    assert!(said.contains("1 passed"), "{role}: it ran: {said}");
}

/// Listeners that nobody has to say the family of: IPv4, IPv6, UNIX.
fn listeners(directory: &tempfile::TempDir) -> [OwnedFd; 3] {
    [
        TcpListener::bind("127.0.0.1:0").expect("loopback").into(),
        TcpListener::bind("[::1]:0").expect("loopback").into(),
        UnixListener::bind(directory.path().join("web"))
            .expect("a path")
            .into(),
    ]
}

/// Serves one client of a listener, whatever it is.
fn serve(reactor: &mut Reactor, fd: OwnedFd) {
    let description = describe_socket(fd.as_fd()).expect("a socket");
    let address = description.address.expect("bound");
    let client = std::thread::spawn(move || {
        let mut answer = [0; 3];
        match address.as_inet() {
            Some(address) => TcpStream::connect(address)?.read_exact(&mut answer)?,
            None => {
                let path = address.as_unix().and_then(UnixAddress::as_path);
                UnixStream::connect(path.expect("a path"))?.read_exact(&mut answer)?;
            }
        }
        io::Result::Ok(answer)
    });
    // The family decides which of the two takes it; the other gives it back.
    let refused = reactor.listen(Unix::listening(fd), |_: &Address| Name("one"));
    if let Err(refused) = refused {
        reactor
            .listen(Tcp::listening(refused.fd), |_: &Address| Name("one"))
            .expect("a listener");
    }
    run_until(reactor, |_| client.is_finished());
    let answer = client.join().expect("no panic").expect("answered");
    assert_eq!(&answer, b"one");
}

/// E-12, E-14, W-73: of every family, by name; in their order where several have one
/// name, or where nobody gave any.
#[test]
fn listeners_of_every_family_are_claimed_by_name_or_in_order() {
    const TEST: &str = "systemd::listeners_of_every_family_are_claimed_by_name_or_in_order";
    if let Ok(role) = std::env::var(ROLE) {
        let mut inherited = systemd::inherited().expect("all is well");
        let names: Vec<_> = inherited.names().map(str::to_owned).collect();
        let claims = match role.as_str() {
            "named" => {
                assert_eq!(names, ["v4", "", "unix"]);
                // Not in the order in which they came.
                ["unix", "v4", ""]
            }
            _ => {
                assert_eq!(names, ["unknown"; 3]);
                ["unknown"; 3]
            }
        };
        assert!(inherited.claim("other").is_none());
        let mut reactor = Reactor::new().expect("epoll");
        let mut families = Vec::new();
        for name in claims {
            let fd = inherited.claim(name).expect("announced");
            let name = rustix::net::getsockname(&fd).expect("a socket");
            families.push(name.address_family());
            serve(&mut reactor, fd);
        }
        use rustix::net::AddressFamily as Family;
        let wanted = match role.as_str() {
            "named" => [Family::UNIX, Family::INET, Family::INET6],
            _ => [Family::INET, Family::INET6, Family::UNIX],
        };
        assert_eq!(families, wanted, "each once, the one of that name");
        assert!(inherited.is_empty());
        return;
    }
    let _ledger = DescriptorLedger::open();
    for (role, names) in [("named", Some("v4::unix")), ("unnamed", None)] {
        let directory = tempfile::tempdir().expect("temporary directory");
        let listeners = listeners(&directory);
        give(TEST, role, names, &listeners.each_ref().map(AsFd::as_fd));
    }
}

/// E-14: rather an error than descriptors under names of others, or none at all.
#[test]
fn names_that_do_not_match_are_an_error_and_nothing_is_taken() {
    const TEST: &str = "systemd::names_that_do_not_match_are_an_error_and_nothing_is_taken";
    if std::env::var_os(ROLE).is_some() {
        let error = systemd::inherited().expect_err("they do not match");
        assert!(
            matches!(
                error,
                ActivationError::NamesDoNotMatch { descriptors: 3, .. }
            ),
            "{error}"
        );
        // They are there, for whoever knows better.
        for number in 3..6 {
            take_granted(number).expect("nobody has it");
        }
        return;
    }
    let _ledger = DescriptorLedger::open();
    let directory = tempfile::tempdir().expect("temporary directory");
    let listeners = listeners(&directory);
    for names in ["", "one", "one:two", "one:two:three:four"] {
        give(
            TEST,
            names,
            Some(names),
            &listeners.each_ref().map(AsFd::as_fd),
        );
    }
}

/// What a child of ours finds announced.
fn announced_to_a_child() -> String {
    let script = "echo $LISTEN_PID-$LISTEN_FDS-$LISTEN_FDNAMES";
    let output = Command::new("sh").args(["-c", script]).output();
    let said = output.expect("starts").stdout;
    String::from_utf8(said).expect("text").trim_end().to_owned()
}

/// E-13: only what is meant for this process is taken, from number 3 on, and once.
/// Where other threads keep the variables from being removed they name this process,
/// so that no child takes them for its own. (That they are removed otherwise is seen
/// of a program without threads, in the tests of the examples.)
#[test]
fn announcement_is_for_one_process_and_is_taken_once() {
    const TEST: &str = "systemd::announcement_is_for_one_process_and_is_taken_once";
    if let Ok(role) = std::env::var(ROLE) {
        let pid = std::process::id().to_string();
        if role == "of another" {
            // Inherited further by somebody who did not look.
            let script = format!("LISTEN_PID={pid} exec \"$@\"");
            let status = Command::new("sh")
                .args(["-c", &script, "sh"])
                .arg(std::env::current_exe().expect("Linux knows"))
                .args(["--exact", "--nocapture", TEST])
                .env(ROLE, "the other")
                .status();
            assert!(status.expect("starts").success());
            return;
        }
        if role == "the other" {
            assert_ne!(std::env::var("LISTEN_PID"), Ok(pid));
            let inherited = systemd::inherited().expect("not ours");
            assert!(inherited.is_empty(), "{inherited:?}");
            return;
        }
        let inherited = systemd::inherited().expect("ours");
        assert_eq!(inherited.names().collect::<Vec<_>>(), ["a", "b", "c"]);
        let numbers = format!("{inherited:?}");
        for number in ["fd: 3", "fd: 4", "fd: 5"] {
            assert!(numbers.contains(number), "{numbers}");
        }
        assert_eq!(announced_to_a_child(), format!("{pid}-3-a:b:c"));
        let again = systemd::inherited().expect("nothing is wrong with it");
        assert!(again.is_empty(), "each is given out once: {again:?}");
        return;
    }
    let _ledger = DescriptorLedger::open();
    let directory = tempfile::tempdir().expect("temporary directory");
    let listeners = listeners(&directory);
    for role in ["ours", "of another"] {
        let descriptors = listeners.each_ref().map(AsFd::as_fd);
        give(TEST, role, Some("a:b:c"), &descriptors);
    }
}

/// Says to the test that it was given descriptors, and which way.
const GIVEN: &str = "BOWLINE_TEST_GIVEN";

/// What of them is wrong is said with its number.
#[test]
fn descriptors_that_cannot_be_taken_are_named() {
    if let Some(given) = std::env::var_os(GIVEN) {
        // By somebody else, before.
        let taken = (given == "taken").then(|| take_granted(4).expect("open"));
        let wanted = if given == "none" { 3 } else { 4 };
        let error = systemd::inherited().expect_err("one is missing");
        let ActivationError::Descriptor { number, .. } = error else {
            panic!("{error}");
        };
        assert_eq!(number, wanted);
        if taken.is_some() {
            let again = systemd::inherited().expect("an earlier call has them");
            assert!(again.is_empty(), "{again:?}");
        }
        return;
    }
    let _ledger = DescriptorLedger::open();
    for (given, open) in [
        ("none", "3<&- 4<&-"),
        ("one", "3</dev/null 4<&-"),
        ("taken", "3</dev/null 4</dev/null"),
    ] {
        // The number of the process that is to take them.
        let script = format!("export LISTEN_PID=$$; exec \"$@\" {open}");
        let status = Command::new("sh")
            .args(["-c", &script, "sh"])
            .arg(std::env::current_exe().expect("Linux knows"))
            .args(["--exact", "--nocapture"])
            .arg("systemd::descriptors_that_cannot_be_taken_are_named")
            .env("LISTEN_FDS", "2")
            .env(GIVEN, given)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status();
        assert!(status.expect("starts").success(), "{given}");
    }
}

/// Says to the test that it is the process that is to be watched.
const WATCHED: &str = "BOWLINE_TEST_WATCHED";

/// What the environment says is for the process that it names.
#[test]
fn watchdog_and_manager_are_found_in_the_environment() {
    if let Some(wanted) = std::env::var_os(WATCHED) {
        let mut reactor = Reactor::new().expect("epoll");
        let notifier = Notifier::from_environment().expect("an address");
        let Some(notifier) = notifier else {
            assert_eq!(wanted, "no manager");
            return;
        };
        let watchdog = Watchdog::from_environment(&mut reactor, Rc::new(notifier));
        let is_for_us = watchdog.as_ref().map(Watchdog::is_for_us);
        let expected = match wanted.to_str().expect("text") {
            "watched" | "watched by name" => Some(true),
            // It may take over from whom that names.
            "another is watched" => Some(false),
            _ => None,
        };
        assert_eq!(is_for_us, expected);
        return;
    }
    let _ledger = DescriptorLedger::open();
    let directory = tempfile::tempdir().expect("temporary directory");
    let (manager, path) = Manager::at_path(&directory);
    manager.socket.set_nonblocking(true).expect("a socket");
    for (wanted, notices) in [
        ("watched", 1),
        ("watched by name", 1),
        ("another is watched", 0),
        ("not watched", 0),
        ("no manager", 0),
    ] {
        let mut command = Command::new("sh");
        let names = match wanted {
            "watched by name" => "export WATCHDOG_PID=$$; ",
            // The parent of all this.
            "another is watched" => "export WATCHDOG_PID=$PPID; ",
            _ => "",
        };
        command
            .args(["-c", &format!("{names}exec \"$@\""), "sh"])
            .arg(std::env::current_exe().expect("Linux knows"))
            .args(["--exact", "--nocapture"])
            .arg("systemd::watchdog_and_manager_are_found_in_the_environment")
            .env_remove("WATCHDOG_PID")
            .env_remove("WATCHDOG_USEC")
            .env_remove("NOTIFY_SOCKET")
            .env(WATCHED, wanted)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        if wanted != "no manager" {
            command.env("NOTIFY_SOCKET", &path);
        }
        if wanted.contains("watched") && wanted != "not watched" {
            command.env("WATCHDOG_USEC", "1000000");
        }
        assert!(command.status().expect("starts").success(), "{wanted}");
        let mut received = 0;
        while manager.socket.recv(&mut [0; 64]).is_ok() {
            received += 1;
        }
        assert_eq!(received, notices, "{wanted}");
    }
}

#[test]
fn watchdog_is_fed_by_the_loop_until_it_is_dropped() {
    let _ledger = DescriptorLedger::open();
    let (_directory, manager, notifier) = notified();
    manager.socket.set_nonblocking(true).expect("a socket");
    let notifier = Rc::new(notifier);
    let mut reactor = Reactor::new().expect("epoll");
    let interval = Duration::from_millis(20);
    let watchdog = Watchdog::start(&mut reactor, notifier, interval);
    let mut received = 0;
    let started = Instant::now();
    run_until(&mut reactor, |_| {
        let mut bytes = [0; 64];
        while let Ok(length) = manager.socket.recv(&mut bytes) {
            assert_eq!(&bytes[..length], b"WATCHDOG=1\n");
            received += 1;
        }
        received == 5
    });
    // The first at once, then one in each half of the interval, never earlier.
    assert!(started.elapsed() >= interval * 2, "{:?}", started.elapsed());
    drop(watchdog);
    run_until(&mut reactor, |reactor| reactor.delayed_calls().count() == 0);
    assert!(manager.socket.recv(&mut [0; 64]).is_err(), "it has stopped");
}

/// Says to the test that it was started with `LISTEN_FDS`, and how.
const LISTENING: &str = "BOWLINE_TEST_LISTENING";

/// E-13: its own number has to be said to it, which nobody knows before it is there; and
/// what is for another process is not taken, whoever has inherited it.
#[test]
fn child_is_given_listeners_as_by_systemd() {
    if let Some(how) = std::env::var_os(LISTENING) {
        return given_listeners(how.to_str().expect("text"));
    }
    let _ledger = DescriptorLedger::open();
    let web = TcpListener::bind("127.0.0.1:0").expect("loopback");
    let admin = TcpListener::bind("127.0.0.1:0").expect("loopback");
    let descriptors = [(web.as_fd(), "web"), (admin.as_fd(), "admin")];
    let exe = std::env::current_exe().expect("Linux knows");
    for (how, script) in [
        ("itself", None),
        ("cleared", None),
        // The shell is the process that they are for; it has them, and its child too.
        ("a child of it", Some("\"$@\"; exit $?")),
        ("in place of it", Some("exec \"$@\"")),
    ] {
        let mut command = match script {
            None => Command::new(&exe),
            Some(script) => {
                let mut command = Command::new("sh");
                command.args(["-c", script, "sh"]).arg(&exe);
                command
            }
        };
        if how == "cleared" {
            command.env_clear();
        }
        command
            .args(["--exact", "--nocapture"])
            .arg("systemd::child_is_given_listeners_as_by_systemd")
            // Of somebody else.
            .env("LISTEN_PID", "1")
            .env("LISTEN_PIDFDID", "1")
            .env("RUST_LOG", "warn")
            .env(LISTENING, how)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let child = spawn_with_listen_fds(command, &descriptors).expect("starts");
        let output = child.wait_with_output().expect("ends");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{how}: {said}");
        let lines = said.matches("is for process").count();
        assert_eq!(lines, usize::from(how == "a child of it"), "{how}: {said}");
    }
    // What is wrong is said as of any child, and no name says more than one thing.
    let missing = spawn_with_listen_fds(Command::new("/nonexistent/program"), &descriptors);
    assert_eq!(
        missing.expect_err("not there").kind(),
        io::ErrorKind::NotFound
    );
    let colon = [(web.as_fd(), "a:b")];
    let refused = spawn_with_listen_fds(Command::new("true"), &colon);
    assert_eq!(
        refused.expect_err("two names").kind(),
        io::ErrorKind::InvalidInput
    );
}

fn given_listeners(how: &str) {
    let _ = env_logger::try_init();
    let cleared = std::env::var_os("PATH").is_none();
    assert_eq!(cleared, how == "cleared");
    let inode = std::env::var("LISTEN_PIDFDID").ok();
    let inherited = systemd::inherited().expect("nothing is wrong with it");
    let names: Vec<_> = inherited.names().map(str::to_owned).collect();
    if how == "a child of it" {
        assert!(names.is_empty(), "{names:?}");
        // Said once.
        assert!(systemd::inherited().expect("as before").is_empty());
    } else {
        assert_eq!(names, ["web", "admin"]);
        assert_eq!(inode, own_pidfd_inode().map(|inode| inode.to_string()));
    }
    drop_quietly(inherited);
}

/// It says what was not claimed, which is not what is counted.
fn drop_quietly(mut inherited: bowline::handoff::Inherited) {
    for name in ["web", "admin"] {
        inherited.claim(name);
    }
}

/// systemd's own library takes what a child of ours is given.
#[test]
fn library_of_systemd_takes_listeners_of_ours() {
    let Some(python) = program("python3") else {
        return;
    };
    let _ledger = DescriptorLedger::open();
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
    let script = "import ctypes, sys
try: library = ctypes.CDLL('libsystemd.so.0')
except OSError: sys.exit(77)
names = ctypes.POINTER(ctypes.c_char_p)()
count = library.sd_listen_fds_with_names(0, ctypes.byref(names))
print(count, *(names[at].decode() for at in range(max(count, 0))))";
    let mut command = Command::new(python);
    command.args(["-c", script]).stdout(Stdio::piped());
    let descriptors = [(listener.as_fd(), "web"), (listener.as_fd(), "b c")];
    let child = spawn_with_listen_fds(command, &descriptors).expect("starts");
    let output = child.wait_with_output().expect("ends");
    if output.status.code() == Some(77) {
        let _ = io::stderr().write_all(b"NOT RUN: libsystemd is missing\n");
        return;
    }
    assert_eq!(String::from_utf8_lossy(&output.stdout), "2 web b c\n");
}
