//! What an idle connection costs in user space, slots included.

#![allow(
    unsafe_code,
    reason = "an allocator that counts cannot be written without"
)]
#![allow(clippy::print_stderr, reason = "a figure is to be seen")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream as StdTcpStream};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use bowline::{Address, Context, Protocol, Reactor, Transport, Transports, Unix};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Counts what is allocated at the moment.
struct Counting;

static BYTES: AtomicUsize = AtomicUsize::new(0);
/// The same as the C library's allocator rounds it: eight bytes for itself,
/// in steps of sixteen.
static ROUNDED: AtomicUsize = AtomicUsize::new(0);

fn rounded(size: usize) -> usize {
    (size + 8).next_multiple_of(16).max(32)
}

// SAFETY: every call goes to the system's allocator as it is; `realloc` is left
// to the default, which calls these.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        BYTES.fetch_add(layout.size(), Relaxed);
        ROUNDED.fetch_add(rounded(layout.size()), Relaxed);
        // SAFETY: the caller's promises, passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        BYTES.fetch_sub(layout.size(), Relaxed);
        ROUNDED.fetch_sub(rounded(layout.size()), Relaxed);
        // SAFETY: the caller's promises, passed on.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const CONNECTIONS: usize = 10_000;
/// What one connection may ask for.
const MOST_BYTES_TCP: usize = 165;
const MOST_BYTES_UNIX: usize = 170;
/// What it may take, with what the allocator adds.
const MOST_TAKEN: usize = 190;
/// Holds the address to connect to, in the process that holds the other ends.
const CONNECT_TO: &str = "BOWLINE_TEST_CONNECT_TO";
const DEADLINE: Duration = Duration::from_secs(60);

struct Echo;

impl<T: Transport> Protocol<T> for Echo {
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        cx.transport.write(data);
    }
}

#[test]
fn idle_connections_cost_little() {
    if raise_descriptor_limit() < CONNECTIONS as u64 + 100 {
        eprintln!("SKIPPED: the limit of descriptors is too low for {CONNECTIONS} connections");
        return;
    }
    if let Ok(address) = std::env::var(CONNECT_TO) {
        return match address.parse::<SocketAddr>() {
            Ok(address) => hold_the_other_ends(|| StdTcpStream::connect(address)),
            Err(_) => hold_the_other_ends(|| StdUnixStream::connect(&address)),
        };
    }
    let directory = tempfile::tempdir().unwrap();
    measure("TCP", MOST_BYTES_TCP, |reactor| {
        let any = ([127, 0, 0, 1], 0).into();
        let listener = reactor.listen_tcp(any, |_: &Address| Echo).unwrap();
        let address = reactor.get(listener).unwrap().address();
        address.as_inet().unwrap().to_string()
    });
    measure("UNIX", MOST_BYTES_UNIX, |reactor| {
        let path = directory.path().join("socket");
        let endpoint = Unix::at(Path::new(&path)).backlog(CONNECTIONS as u32);
        reactor.listen(endpoint, |_: &Address| Echo).unwrap();
        path.display().to_string()
    });
}

fn raise_descriptor_limit() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    setrlimit(Resource::Nofile, raised).expect("up to the maximum is allowed");
    limit.maximum.unwrap_or(u64::MAX)
}

/// Connects, and exchanges a message on each connection when told to; ends
/// with its input.
fn hold_the_other_ends<S: Read + Write>(connect: impl Fn() -> std::io::Result<S>) {
    let mut connections: Vec<_> = (0..CONNECTIONS)
        .map(|_| connect().expect("it listens"))
        .collect();
    let mut input = std::io::stdin();
    let mut byte = [0];
    while input.read(&mut byte).expect("a pipe") > 0 {
        for connection in &mut connections {
            connection.write_all(b"hello").expect("connected");
            connection.read_exact(&mut [0; 5]).expect("it echoes");
        }
        std::io::stdout().write_all(b"\ndone\n").expect("a pipe");
    }
}

fn measure(kind: &str, most_bytes: usize, listen: impl FnOnce(&mut Reactor) -> String) {
    let mut reactor = Reactor::new().unwrap();
    let address = listen(&mut reactor);
    // What the first connection brings for all of them.
    let first: Box<dyn std::any::Any> = match address.parse::<SocketAddr>() {
        Ok(address) => Box::new(StdTcpStream::connect(address).unwrap()),
        Err(_) => Box::new(StdUnixStream::connect(&address).unwrap()),
    };
    run_until(&mut reactor, |reactor| reactor.registered() == 2);
    drop(first);
    run_until(&mut reactor, |reactor| reactor.registered() == 1);

    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "idle_connections_cost_little"])
        .args(["--nocapture", "--test-threads=1"])
        .env(CONNECT_TO, address)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut orders = child.stdin.take().unwrap();
    let mut answers = child.stdout.take().unwrap();
    let before = (BYTES.load(Relaxed), ROUNDED.load(Relaxed));
    let per_connection = || {
        let bytes = BYTES.load(Relaxed) - before.0;
        let rounded = ROUNDED.load(Relaxed) - before.1;
        (bytes.div_ceil(CONNECTIONS), rounded.div_ceil(CONNECTIONS))
    };
    run_until(&mut reactor, |reactor| {
        reactor.registered() == CONNECTIONS + 1
    });
    let fresh = per_connection();
    eprintln!(
        "{kind}, new connection: {} bytes asked for, {} taken",
        fresh.0, fresh.1
    );

    orders.write_all(b"x").unwrap();
    rustix::io::ioctl_fionbio(&answers, true).unwrap();
    let mut said = Vec::new();
    let mut room = [0; 256];
    run_until(&mut reactor, |_| {
        if let Ok(count) = answers.read(&mut room) {
            said.extend_from_slice(&room[..count]);
        }
        said.windows(4).any(|word| word == b"done")
    });
    drop(said);
    let used = per_connection();
    eprintln!(
        "{kind}, after an echo: {} bytes asked for, {} taken",
        used.0, used.1
    );

    drop(orders);
    run_until(&mut reactor, |reactor| reactor.registered() == 1);
    assert!(child.wait().unwrap().success());
    for (asked, taken) in [fresh, used] {
        assert!(asked <= most_bytes, "{kind}: {asked} bytes per connection");
        assert!(taken <= MOST_TAKEN, "{kind}: {taken} bytes taken");
    }
}

#[track_caller]
fn run_until(reactor: &mut Reactor, mut is_done: impl FnMut(&mut Reactor) -> bool) {
    let started = Instant::now();
    while !is_done(reactor) {
        assert!(started.elapsed() < DEADLINE, "no end: {reactor:?}");
        reactor.turn(Some(Duration::from_millis(50)));
    }
}
