//! What a forked child does with its parent's connections and listeners.

#![allow(unsafe_code)]

use std::cell::Cell;
use std::io::{PipeReader, PipeWriter, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bowline_protocol::{Address, CloseReason, Context, Protocol, Transport, TransportHandle};
use bowline_reactor::Reactor;

use crate::{Pipe, Tcp, Transports, Unix};

#[derive(Clone, Default)]
struct Echo(Rc<Cell<u32>>, Rc<Cell<Option<TransportHandle>>>);

impl<T: Transport> Protocol<T> for Echo {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        self.1.set(Some(cx.transport.handle()));
    }
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        cx.transport.write(data);
    }
    fn connection_lost(&mut self, _: &mut Context<'_, T>, _: &CloseReason) {
        self.0.set(self.0.get() + 1);
    }
}

/// Runs `child` in a forked process; whether it came to its end.
fn in_a_fork(child: impl FnOnce()) -> bool {
    // SAFETY: the child has this thread only. It calls the allocator, which the C
    // library makes usable after a fork, and locks nothing that another thread could
    // have had.
    match unsafe { libc::fork() } {
        0 => {
            // SAFETY: takes a number; should anything hang, it ends the child.
            unsafe { libc::alarm(10) };
            let is_over = catch_unwind(AssertUnwindSafe(child)).is_ok();
            // SAFETY: ends the child without what is the parent's to be done.
            unsafe { libc::_exit(i32::from(!is_over)) }
        }
        pid => {
            let mut status = 0;
            // SAFETY: the status is written to a place that outlives the call.
            let waited = unsafe { libc::waitpid(pid, &mut status, 0) };
            waited == pid && status == 0
        }
    }
}

trait Peer: Read + Write {
    fn limit(&self);
}

impl Peer for TcpStream {
    fn limit(&self) {
        self.set_nonblocking(true).expect("a socket");
    }
}

impl Peer for UnixStream {
    fn limit(&self) {
        self.set_nonblocking(true).expect("a socket");
    }
}

fn echoes(reactor: &mut Reactor, peer: &mut dyn Peer) -> bool {
    peer.limit();
    if peer.write_all(b"?").is_err() {
        return false;
    }
    for _ in 0..1_000 {
        reactor.turn(Some(Duration::from_millis(10)));
        match peer.read(&mut [0; 8]) {
            Ok(count) => return count == 1,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(_) => return false,
        }
    }
    false
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").map_or(0, |it| it.count())
}

fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (listener.accept().unwrap().0, peer)
}

/// The child serves what it keeps, whose file and sockets the parent goes on with as if
/// nothing had been.
#[test]
fn a_forked_child_serves_what_it_keeps_and_harms_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let mut reactor = Reactor::new().unwrap();
    let lost = Echo::default();
    let served = lost.clone();
    let unix = Unix::at(&*path);
    let unix = reactor
        .listen(unix, move |_: &Address| served.clone())
        .unwrap();
    let served = lost.clone();
    let tcp = Tcp::at(([127, 0, 0, 1], 0).into());
    let tcp = reactor
        .listen(tcp, move |_: &Address| served.clone())
        .unwrap();
    let (ours, mut kept_peer) = tcp_pair();
    let kept = reactor.adopt(Tcp, ours.into(), lost.clone()).unwrap();
    let (ours, mut other_peer) = UnixStream::pair().unwrap();
    let other = reactor.adopt(Unix, ours.into(), lost.clone()).unwrap();
    reactor.start().unwrap();
    // Far enough that it is waited for, however late this thread comes to run: what is
    // due already needs no timer of the kernel.
    reactor.call_later(Duration::from_millis(200), |_| {});
    reactor.turn(Some(Duration::from_secs(5)));
    assert!(echoes(&mut reactor, &mut kept_peer));
    assert!(echoes(&mut reactor, &mut other_peer));

    let mut copy = Some(reactor);
    let ended = in_a_fork(|| {
        let mut reactor = copy.take().expect("it is there");
        let before = open_descriptors();
        reactor
            .after_fork(&[unix.token(), kept.token()])
            .expect("it is forked");
        // A listener, a connection, and the parent's timer.
        assert_eq!(open_descriptors(), before - 3);
        assert!(reactor.get(other).is_none() && reactor.get(tcp).is_none());
        assert!(echoes(&mut reactor, &mut kept_peer));
        let mut client = UnixStream::connect(&path).expect("it listens");
        assert!(echoes(&mut reactor, &mut client));
        // Would be a reset, and the end of the parent's too.
        reactor.get(kept).expect("kept").abort_connection();
        reactor.turn(Some(Duration::ZERO));
        assert!(reactor.get(kept).is_none());
        assert_eq!(lost.0.get(), 1, "and nobody else was told");
        reactor.get(unix).expect("kept").stop_listening();
        reactor.turn(Some(Duration::ZERO));
        drop(reactor);
    });
    assert!(ended);
    let mut reactor = copy.take().expect("the parent's");
    assert!(path.exists());
    assert!(echoes(&mut reactor, &mut kept_peer));
    assert!(echoes(&mut reactor, &mut other_peer));
    let mut client = UnixStream::connect(&path).unwrap();
    assert!(echoes(&mut reactor, &mut client));
    let address = reactor.get(tcp).unwrap().address().as_inet().unwrap();
    let mut client = TcpStream::connect(address).unwrap();
    assert!(echoes(&mut reactor, &mut client));
    assert_eq!(lost.0.get(), 0);
    drop(reactor);
    assert!(!path.exists());
}

/// A child that takes its parent's place takes the file as well.
#[test]
fn a_forked_child_owns_the_file_that_its_parent_disowns() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let mut reactor = Reactor::new().unwrap();
    let listener = reactor
        .listen(Unix::at(&*path), |_: &Address| Echo::default())
        .unwrap();
    let mut copy = Some(reactor);
    let ended = in_a_fork(|| {
        let mut reactor = copy.take().expect("it is there");
        reactor.after_fork(&[listener.token()]).expect("forked");
        let ours = reactor.get(listener).expect("kept");
        let file = ours.socket_file().expect("of a path");
        ours.own_socket_file(file).expect("it is there");
        drop(reactor);
        assert!(!path.exists());
    });
    assert!(ended && !path.exists());
}

/// The threads that close what strangers sent are the parent's. Others of the parent's
/// begin and end at any moment, which has std hold a lock that the child never gets.
#[test]
fn a_forked_child_closes_what_was_received_in_threads_of_its_own() {
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    let threads = [(); 8].map(|()| std::thread::spawn(|| {}));
                    let _ = threads.map(|it| it.join().is_ok());
                }
            });
        }
        let result = catch_unwind(closes_in_forks);
        is_over.store(true, Ordering::Relaxed);
        result.unwrap();
    });
}

fn closes_in_forks() {
    let close = || {
        let (theirs, mut ours) = UnixStream::pair().expect("there is room");
        ours.set_read_timeout(Some(Duration::from_secs(5)))
            .expect("a socket");
        crate::close_received(theirs.into());
        assert_eq!(ours.read(&mut [0]).ok(), Some(0));
    };
    close();
    // Whatever the parent's thread holds at the moment of the fork.
    for _ in 0..50 {
        let (theirs, _ours) = UnixStream::pair().unwrap();
        crate::close_received(theirs.into());
        assert!(in_a_fork(close));
    }
}

/// A socket that was made to reset is, whoever closes it last.
#[test]
fn what_a_forked_child_aborts_is_not_reset_when_the_parent_closes_it() {
    let mut reactor = Reactor::new().unwrap();
    let echo = Echo::default();
    let served = echo.clone();
    let tcp = Tcp::at(([127, 0, 0, 1], 0).into());
    let tcp = reactor
        .listen(tcp, move |_: &Address| served.clone())
        .unwrap();
    let address = reactor.get(tcp).unwrap().address().as_inet().unwrap();
    reactor.start().unwrap();
    let mut peer = TcpStream::connect(address).unwrap();
    assert!(echoes(&mut reactor, &mut peer));
    let accepted = echo.1.get().unwrap();
    let mut copy = Some(reactor);
    let ended = in_a_fork(|| {
        let mut reactor = copy.take().expect("it is there");
        reactor.after_fork(&[accepted.token()]).expect("forked");
        reactor.get(accepted).expect("kept").abort_connection();
        reactor.turn(Some(Duration::ZERO));
        assert_eq!(echo.0.get(), 1);
    });
    assert!(ended);
    let mut reactor = copy.take().expect("the parent's");
    assert!(echoes(&mut reactor, &mut peer));
    reactor.get(accepted).unwrap().lose_connection();
    reactor.turn(Some(Duration::ZERO));
    peer.set_nonblocking(false).unwrap();
    assert_eq!(peer.read(&mut [0]).unwrap(), 0, "an end, and no reset");
}

/// A connection over two pipes, and the other end of both.
fn over_two_pipes(reactor: &mut Reactor, echo: &Echo) -> (PipeReader, PipeWriter) {
    let (reading, theirs) = std::io::pipe().unwrap();
    let (ours, writing) = std::io::pipe().unwrap();
    let ends = (reading.into(), writing.into());
    reactor.adopt(Pipe::pair(), ends, echo.clone()).unwrap();
    (ours, theirs)
}

/// More than a pipe holds.
const LARGE: usize = 1 << 20;

/// Writes so much that it has to be told when there is room, and reads that.
fn sends_all(reactor: &mut Reactor, handle: TransportHandle, ours: &mut PipeReader) -> bool {
    reactor.turn(Some(Duration::ZERO));
    let transport = reactor.get(handle).expect("kept");
    transport.write(&vec![b'x'; LARGE]);
    let mut left = LARGE;
    while left > 0 {
        reactor.turn(Some(Duration::ZERO));
        match ours.read(&mut vec![0; 1 << 16]) {
            Ok(count) if count > 0 => left -= count,
            _ => return false,
        }
        // Without the reactor being asked for anything, beyond what the poller says.
        reactor.turn(Some(Duration::from_millis(100)));
    }
    true
}

/// What it is written to is watched anew like what it is read from, from the beginning and
/// when it has to wait: it was never told that there is room, nor that the reader has gone.
#[test]
fn a_forked_child_watches_both_descriptors_of_a_connection() {
    let mut reactor = Reactor::new().unwrap();
    let echo = Echo::default();
    let (mut ours, mut theirs) = over_two_pipes(&mut reactor, &echo);
    reactor.start().unwrap();
    theirs.write_all(b"?").unwrap();
    for _ in 0..3 {
        reactor.turn(Some(Duration::from_millis(10)));
    }
    assert_eq!(ours.read(&mut [0; 2]).unwrap(), 1);
    let handle = echo.1.get().unwrap();
    let mut copy = Some(reactor);
    let mut ours = Some(ours);
    let ended = in_a_fork(|| {
        let mut reactor = copy.take().expect("it is there");
        let mut ours = ours.take().expect("it is there");
        reactor.after_fork(&[handle.token()]).expect("forked");
        assert!(sends_all(&mut reactor, handle, &mut ours));
        theirs.write_all(b"!").expect("there is room");
        for _ in 0..3 {
            reactor.turn(Some(Duration::from_millis(10)));
        }
        assert_eq!(ours.read(&mut [0; 2]).ok(), Some(1), "and is read");
        assert_eq!(echo.0.get(), 0);
    });
    assert!(ended);
}

/// What the poller refuses is not asked for: the connection was dropped.
#[test]
fn a_forked_child_keeps_a_connection_on_a_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    let file = std::fs::File::create(&path).unwrap();
    let mut reactor = Reactor::new().unwrap();
    let echo = Echo::default();
    reactor
        .adopt(Pipe::writing(), file.into(), echo.clone())
        .unwrap();
    reactor.start().unwrap();
    reactor.turn(Some(Duration::ZERO));
    let handle = echo.1.get().unwrap();
    let mut copy = Some(reactor);
    let ended = in_a_fork(|| {
        let mut reactor = copy.take().expect("it is there");
        reactor.after_fork(&[handle.token()]).expect("forked");
        reactor.get(handle).expect("kept").write(b"the child's");
        reactor.turn(Some(Duration::ZERO));
        assert_eq!(echo.0.get(), 0);
    });
    assert!(ended);
    assert_eq!(std::fs::read(&path).unwrap(), b"the child's");
}

/// Contract E-13: whether threads run is found out otherwise where there is no /proc.
#[test]
fn variables_are_removed_without_proc_where_no_thread_runs() {
    const ALONE: &str = "BOWLINE_TEST_ALONE";
    if std::env::var_os(ALONE).is_some() {
        let directory = tempfile::tempdir().unwrap();
        assert!(in_a_fork(|| {
            rustix::process::chroot(directory.path()).expect("root");
            assert!(!std::path::Path::new("/proc").exists());
            let beside = std::thread::spawn(|| crate::remove_environment(&[ALONE]));
            let error = beside.join().expect("no panic").expect_err("threads run");
            assert_eq!(error.kind(), std::io::ErrorKind::Unsupported);
            assert!(std::env::var_os(ALONE).is_some());
            // It may not be gone at once.
            while crate::remove_environment(&[ALONE]).is_err() {
                std::thread::yield_now();
            }
            assert!(std::env::var_os(ALONE).is_none());
        }));
        return;
    }
    if !rustix::process::geteuid().is_root() {
        #[allow(clippy::print_stderr, reason = "a skipped test has to be seen")]
        return eprintln!("SKIPPED: only root may chroot");
    }
    // No other test has the lock of the environment when that one forks.
    let status = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--test-threads=1"])
        .arg(concat!(
            "sys::fork_tests::",
            "variables_are_removed_without_proc_where_no_thread_runs"
        ))
        .env(ALONE, "1")
        .stdout(std::process::Stdio::null())
        .status();
    assert!(status.unwrap().success());
}
