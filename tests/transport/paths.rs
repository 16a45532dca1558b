//! Who has the path of a UNIX socket: one program at a time, for as long as its socket is
//! open, however it begins and ends.

#![allow(clippy::print_stdout, reason = "how its processes talk to each other")]

use std::fs::{self, File};
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{
    UnixDatagram as StdUnixDatagram, UnixListener as StdUnixListener, UnixStream as StdUnixStream,
};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Barrier, Mutex};

use bowline::endpoint::Listen as _;
use bowline::error::{ListenError, ListenStep};
use bowline::process::monotonic_microseconds;
use bowline::{
    Address, Context, Datagram, DatagramProtocol, DatagramTransport, Packet, PacketProtocol,
    PacketTransport, Protocol, Reactor, StaleSocket, Transport, Transports, UnixAddress,
};
use bowline::{Tcp, Unix, UnixDatagram, UnixSeqpacket};
use rustix::fs::{FlockOperation, flock};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, socket_with};

use crate::harness::{Doorman, Log};
use crate::support::figures::scaled;
use crate::support::own_process::in_own_process;
use crate::support::{DEADLINE, DescriptorLedger, run_until, run_until_quiet};

/// Names the variable that says what a second process of this test is to do.
const ROLE: &str = "BOWLINE_TEST_PATHS";

struct Echo;

impl<T: Transport> Protocol<T> for Echo {
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        cx.transport.write(data);
    }
}

fn leave_dead(path: &Path) {
    drop(StdUnixListener::bind(path).unwrap());
}

/// Whether a client that connects to `path` arrives at `listener`.
fn is_reached(path: &Path, listener: OwnedFd) -> bool {
    let client = StdUnixStream::connect(path);
    // Non-blocking, as the reactor's.
    client.is_ok() && StdUnixListener::from(listener).accept().is_ok()
}

/// Has `starters` threads take a path at the same moment, `rounds` times. Each round
/// finds what the one before has left: a dead socket, or nothing where `is_fresh`.
#[track_caller]
fn race(starters: usize, rounds: usize, is_fresh: bool) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let (gate, is_over) = (Barrier::new(starters + 1), AtomicBool::new(false));
    let results = Mutex::new(Vec::new());
    let start = || {
        loop {
            gate.wait();
            if is_over.load(SeqCst) {
                return;
            }
            let bound = Unix::at(&*path).bind();
            results.lock().unwrap().push(bound);
            gate.wait();
        }
    };
    let fault = std::thread::scope(|scope| {
        for _ in 0..starters {
            scope.spawn(start);
        }
        let mut fault = None;
        for round in 0..rounds {
            if is_fresh {
                let _ = fs::remove_file(&path);
            }
            gate.wait();
            gate.wait();
            let results = std::mem::take(&mut *results.lock().unwrap());
            fault = what_is_wrong(&path, results);
            if fault.is_some() {
                fault = fault.map(|fault| format!("round {round} of {starters}: {fault}"));
                break;
            }
        }
        is_over.store(true, SeqCst);
        gate.wait();
        fault
    });
    assert_eq!(fault, None);
}

fn what_is_wrong(path: &Path, results: Vec<Result<OwnedFd, ListenError>>) -> Option<String> {
    let (won, lost): (Vec<_>, Vec<_>) = results.into_iter().partition(Result::is_ok);
    let is_taken = |error: &ListenError| error.error.kind() == ErrorKind::AddrInUse;
    if let Some(error) = lost
        .iter()
        .filter_map(|it| it.as_ref().err())
        .find(|it| !is_taken(it))
    {
        return Some(format!("{error:?}"));
    }
    let listeners: Vec<_> = won.into_iter().filter_map(Result::ok).collect();
    match <[OwnedFd; 1]>::try_from(listeners) {
        Ok([listener]) => {
            let is_reached = is_reached(path, listener);
            (!is_reached).then(|| "who listens is not reached".into())
        }
        Err(listeners) => Some(format!("{} listen", listeners.len())),
    }
}

/// Contract L-24, L-25, W-44: where a dead listener has left its file.
#[test]
fn of_several_threads_that_take_a_dead_sockets_path_one_listens() {
    let ledger = DescriptorLedger::open();
    race(2, scaled(500, 100_000), false);
    race(4, scaled(500, 100_000), false);
    ledger.assert_balanced();
}

/// Contract L-24, W-44: where there is nothing, what another has just bound looks dead.
#[test]
fn of_several_threads_that_take_a_free_path_one_listens() {
    let ledger = DescriptorLedger::open();
    race(2, scaled(500, 100_000), true);
    race(4, scaled(500, 100_000), true);
    ledger.assert_balanced();
}

impl<T: PacketTransport> PacketProtocol<T> for Echo {
    fn packet_received(&mut self, _: &mut Context<'_, T>, _: &mut Packet<'_>) {}
}

impl<T: DatagramTransport> DatagramProtocol<T> for Echo {
    fn datagram_received(&mut self, _: &mut Context<'_, T>, _: &mut Datagram<'_>) {}
}

/// Takes a path with a socket of some kind.
type Take = fn(&mut Reactor, &Path) -> Result<(), ListenError>;

/// Contract L-24, L-25, W-44: whatever kinds they are of, be a dead socket of another one
/// there or nothing.
#[test]
fn of_sockets_of_any_kinds_that_take_one_path_one_has_it() {
    let ledger = DescriptorLedger::open();
    let stream: Take = |reactor, path| reactor.listen(Unix::at(path), |_: &Address| Echo).map(drop);
    let packets: Take = |reactor, path| {
        let build = |_: &Address| Echo;
        reactor.listen(UnixSeqpacket::at(path), build).map(drop)
    };
    let datagrams: Take = |reactor, path| reactor.listen(UnixDatagram::at(path), Echo).map(drop);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let gate = Barrier::new(2);
    let start = |take: Take| {
        let mut reactor = Reactor::new().unwrap();
        gate.wait();
        let taken = take(&mut reactor, &path);
        // Until both have tried.
        gate.wait();
        taken.map_err(|error| error.error.kind())
    };
    let start = &start;
    for takers in [
        [datagrams, datagrams],
        [packets, packets],
        [stream, datagrams],
        [stream, packets],
        [packets, datagrams],
    ] {
        for round in 0..scaled(40, 10_000) {
            match round % 3 {
                0 => leave_dead(&path),
                1 => drop(StdUnixDatagram::bind(&path).unwrap()),
                _ => {}
            }
            let taken = std::thread::scope(|scope| {
                let threads = takers.map(|take| scope.spawn(move || start(take)));
                threads.map(|thread| thread.join().unwrap())
            });
            let failed: Vec<_> = taken.into_iter().filter_map(Result::err).collect();
            assert_eq!(failed, [ErrorKind::AddrInUse], "round {round}");
            assert!(!path.exists(), "round {round}: it has left its file");
        }
    }
    drop(directory);
    ledger.assert_balanced();
}

/// A process of its own that takes a path when it is told to.
struct Starter {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Starter {
    fn new(path: &Path) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--nocapture", "--test-threads=1"])
            .arg("paths::of_two_processes_that_take_one_path_one_listens")
            .env(ROLE, path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Self {
            orders: child.stdin.take().unwrap(),
            answers: BufReader::new(child.stdout.take().unwrap()),
            child,
        }
    }

    /// Takes the path again and again, at the times that it is told.
    fn run(path: PathBuf) {
        let mut kept = None;
        for order in std::io::stdin().lines().map_while(Result::ok) {
            drop(kept.take());
            let Ok(at) = order.parse::<u64>() else {
                println!("answer: let go");
                continue;
            };
            while monotonic_microseconds() < at {
                std::hint::spin_loop();
            }
            match Unix::at(&*path).bind() {
                Ok(listener) => {
                    kept = Some(listener);
                    println!("answer: listens");
                }
                Err(error) => println!("answer: {:?}", error.error.kind()),
            }
        }
    }

    fn order(&mut self, order: &str) {
        writeln!(self.orders, "{order}").unwrap();
    }

    fn answer(&mut self) -> String {
        loop {
            let mut line = String::new();
            assert!(self.answers.read_line(&mut line).unwrap() > 0, "it ended");
            if let Some((_, answer)) = line.trim().split_once("answer: ") {
                return answer.to_owned();
            }
        }
    }
}

/// Contract L-24, L-25, W-44.
#[test]
fn of_two_processes_that_take_one_path_one_listens() {
    if let Some(path) = std::env::var_os(ROLE) {
        return Starter::run(path.into());
    }
    let ledger = DescriptorLedger::open();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let mut starters = [Starter::new(&path), Starter::new(&path)];
    for round in 0..scaled(200, 100_000) {
        if round % 2 == 0 {
            let _ = fs::remove_file(&path);
        }
        let at = (monotonic_microseconds() + 200).to_string();
        starters.iter_mut().for_each(|it| it.order(&at));
        let answers = starters.each_mut().map(Starter::answer);
        let mut sorted = answers.clone();
        sorted.sort();
        assert_eq!(sorted, ["AddrInUse", "listens"], "round {round}");
        assert!(StdUnixStream::connect(&path).is_ok(), "round {round}");
        starters.iter_mut().for_each(|it| it.order("let go"));
        starters.iter_mut().for_each(|it| drop(it.answer()));
    }
    for mut starter in starters {
        drop(starter.orders);
        assert!(starter.child.wait().unwrap().success());
    }
    drop(directory);
    ledger.assert_balanced();
}

/// Contract W-44: alive is whatever a process has, listening or not, of any type; and
/// asking is no connection.
#[test]
fn a_socket_that_does_not_listen_is_alive() {
    let ledger = DescriptorLedger::open();
    let directory = tempfile::tempdir().unwrap();
    let mut reactor = Reactor::new().unwrap();
    for kind in [SocketType::STREAM, SocketType::SEQPACKET, SocketType::DGRAM] {
        let path = directory.path().join(format!("{}", kind.as_raw()));
        let bound = socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap();
        bind(&bound, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        let error = reactor.listen_unix(&*path, |_: &Address| Echo).unwrap_err();
        assert_eq!(
            (error.step, error.error.kind()),
            (ListenStep::Bind, ErrorKind::AddrInUse),
            "{kind:?}"
        );
        assert!(path.exists(), "{kind:?}: a live socket's file was removed");
        drop(bound);
        reactor.listen_unix(&*path, |_: &Address| Echo).unwrap();
    }
    // One that takes nothing from anybody but its peer.
    let path = directory.path().join("connected");
    let one = StdUnixDatagram::bind(&path).unwrap();
    let other = StdUnixDatagram::bind(directory.path().join("other")).unwrap();
    one.connect(directory.path().join("other")).unwrap();
    reactor.listen_unix(&*path, |_: &Address| Echo).unwrap_err();
    assert!(path.exists());
    drop((reactor, one, other, directory));
    ledger.assert_balanced();
}

/// Where nothing is to be removed no lock is needed, and nobody waits for one.
#[test]
fn a_directory_that_somebody_has_locked_keeps_only_dead_sockets() {
    let ledger = DescriptorLedger::open();
    let directory = tempfile::tempdir().unwrap();
    let (free, dead) = (directory.path().join("free"), directory.path().join("dead"));
    leave_dead(&dead);
    let lock = File::open(directory.path()).unwrap();
    flock(&lock, FlockOperation::LockExclusive).unwrap();
    let mut reactor = Reactor::new().unwrap();
    reactor.listen_unix(&*free, |_: &Address| Echo).unwrap();
    let error = reactor
        .listen(
            Unix::at(&*dead).stale(StaleSocket::Refuse),
            |_: &Address| Echo,
        )
        .unwrap_err();
    assert_eq!(error.error.kind(), ErrorKind::AddrInUse);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| Unix::at(&*dead).bind());
        flock(&lock, FlockOperation::Unlock).unwrap();
        assert!(is_reached(&dead, waiting.join().unwrap().unwrap()));
    });
    drop((lock, reactor, directory));
    ledger.assert_balanced();
}

/// What the directory does not allow is said, and nothing is done by halves.
#[test]
fn a_dead_socket_that_may_not_be_removed_is_named() {
    let name = "a_dead_socket_that_may_not_be_removed_is_named";
    in_own_process(module_path!(), name, || {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        leave_dead(&path);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        let sticky = fs::Permissions::from_mode(0o1777);
        fs::set_permissions(directory.path(), sticky).unwrap();
        if !rustix::process::geteuid().is_root() {
            return println!("NOT RUN: it takes a second user");
        }
        let user = rustix::process::Uid::from_raw(65_533);
        rustix::thread::set_thread_res_uid(user, user, user).unwrap();
        let error = Unix::at(&*path).bind().unwrap_err();
        assert_eq!(error.step, ListenStep::RemoveStale);
        assert_eq!(error.error.kind(), ErrorKind::PermissionDenied);
        assert!(error.to_string().contains("dead socket"), "{error}");
        assert!(path.exists());
    });
}

/// Contract L-25: a program that was killed is started again as it was, with the
/// defaults.
#[test]
fn a_program_that_was_killed_can_be_started_again() {
    if let Some(path) = std::env::var_os(ROLE) {
        let mut reactor = Reactor::new().unwrap();
        reactor
            .listen_unix(PathBuf::from(path), |_: &Address| Echo)
            .unwrap();
        return reactor.run().unwrap();
    }
    let ledger = DescriptorLedger::open();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    for _ in 0..3 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--nocapture"])
            .arg("paths::a_program_that_was_killed_can_be_started_again")
            .env(ROLE, &path)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let began = std::time::Instant::now();
        let mut client = loop {
            if let Ok(client) = StdUnixStream::connect(&path) {
                break client;
            }
            assert!(began.elapsed() < DEADLINE && child.try_wait().unwrap().is_none());
            std::thread::yield_now();
        };
        client.write_all(b"?").unwrap();
        client.read_exact(&mut [0]).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(path.exists(), "it was to leave its file");
    }
    drop(directory);
    ledger.assert_balanced();
}

/// Contract L-21, W-46: neither a mode that the umask takes something from nor a dead
/// socket needs /proc.
#[test]
fn without_proc_one_listens_all_the_same() {
    let name = "without_proc_one_listens_all_the_same";
    in_own_process(module_path!(), name, || {
        if !rustix::process::geteuid().is_root() {
            return println!("NOT RUN: only root may chroot");
        }
        let directory = tempfile::tempdir().unwrap();
        let mut reactor = Reactor::new().unwrap();
        // The way back.
        let root = File::open("/").unwrap();
        rustix::process::chroot(directory.path()).unwrap();
        std::env::set_current_dir("/").unwrap();
        assert!(!Path::new("/proc").exists());
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
        for mode in [0o666, 0o600, 0o755] {
            let path = PathBuf::from(format!("/{mode:o}"));
            leave_dead(&path);
            reactor
                .listen(Unix::at(&*path).mode(mode), |_: &Address| Echo)
                .unwrap();
            let found = path.metadata().unwrap().permissions().mode();
            assert_eq!(found & 0o7777, mode, "{mode:o}");
            let mut client = StdUnixStream::connect(&path).unwrap();
            client.set_nonblocking(true).unwrap();
            client.write_all(b"?").unwrap();
            run_until(&mut reactor, |_| client.read(&mut [0]).is_ok());
        }
        drop(reactor);
        rustix::process::fchdir(&root).unwrap();
        rustix::process::chroot(".").unwrap();
    });
}

/// What a listener owns by number only is not its own by another's.
#[test]
fn owning_a_file_again_does_not_remove_it() {
    let ledger = DescriptorLedger::open();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let mut reactor = Reactor::new().unwrap();
    let listener = reactor
        .listen_unix(&*path, Doorman::new(&Log::default()))
        .unwrap();
    let ours = reactor.get(listener).unwrap();
    let file = ours.socket_file().unwrap();
    // As a process that was forked does, and goes on in its parent's place.
    ours.own_socket_file(file).unwrap();
    assert!(path.exists());
    assert_eq!(ours.socket_file(), Some(file));
    ours.stop_listening();
    run_until_quiet(&mut reactor);
    assert!(!path.exists());
    drop((reactor, directory));
    ledger.assert_balanced();
}

/// A listener that is made only to be given away needs neither a reactor nor an
/// acceptor. Its file is whose it is given to.
#[test]
fn a_listener_can_be_made_to_be_given_away() {
    let ledger = DescriptorLedger::open();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let mut reactor = Reactor::new().unwrap();
    let tcp = Tcp::at(([127, 0, 0, 1], 0).into()).bind().unwrap();
    let unix = Unix::at(&*path).bind().unwrap();
    assert!(
        rustix::io::fcntl_getfd(tcp.as_fd())
            .unwrap()
            .contains(rustix::io::FdFlags::CLOEXEC)
    );
    let tcp = reactor
        .listen(Tcp::listening(tcp), |_: &Address| Echo)
        .unwrap();
    let unix = reactor
        .listen(Unix::listening(unix), |_: &Address| Echo)
        .unwrap();
    let address = reactor.get(tcp).unwrap().address().as_inet().unwrap();
    let mut clients = (
        std::net::TcpStream::connect(address).unwrap(),
        StdUnixStream::connect(&path).unwrap(),
    );
    clients.0.write_all(b"?").unwrap();
    clients.1.write_all(b"?").unwrap();
    clients.0.set_nonblocking(true).unwrap();
    clients.1.set_nonblocking(true).unwrap();
    run_until(&mut reactor, |_| clients.0.read(&mut [0]).is_ok());
    run_until(&mut reactor, |_| clients.1.read(&mut [0]).is_ok());
    reactor.get(unix).unwrap().stop_listening();
    run_until_quiet(&mut reactor);
    assert!(path.symlink_metadata().unwrap().file_type().is_socket());
    drop((reactor, clients, directory));
    ledger.assert_balanced();
}

/// As systemd, Go and ss(8) write them.
#[test]
fn a_name_with_an_at_sign_is_abstract_and_makes_no_file() {
    let ledger = DescriptorLedger::open();
    let name = format!("@bowline-at-{}", std::process::id());
    let mut reactor = Reactor::new().unwrap();
    let listener = reactor.listen_unix(&*name, |_: &Address| Echo).unwrap();
    let address = reactor.get(listener).unwrap().address();
    assert_eq!(
        address,
        Address::Unix(UnixAddress::Abstract(name.as_bytes()[1..].into()))
    );
    assert!(!Path::new(&name).exists());
    let unnamed = reactor
        .listen_unix(UnixAddress::Unnamed, |_: &Address| Echo)
        .unwrap();
    let address = reactor.get(unnamed).unwrap().address();
    let Some(UnixAddress::Abstract(chosen)) = address.as_unix() else {
        panic!("the kernel chose {address}");
    };
    assert_eq!(chosen.len(), 5);
    drop(reactor);
    ledger.assert_balanced();
}
