//! The pool's own process dies: its workers go on with what they have, and
//! nobody is left waiting for somebody who is gone.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream as StdTcpStream};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bowline::Tcp;
use bowline::handoff::pool::{PassedConnection, Pool};
use bowline::{Address, BuildContext, Reactor, Transports};

use super::process::{Script, die, scripted, settings, turn_until_serving};
use crate::support::DescriptorLedger;
use crate::support::figures::{Bound, Figures, scaled};

/// Says to a process that it is a pool, and at which step it dies.
const STEP: &str = "BOWLINE_TEST_DISPATCHER";
const LOG: &str = "BOWLINE_TEST_DISPATCHER_LOG";

/// What is before its address in what it prints.
const ADDRESS: &str = "address ";

const PATIENCE: Duration = Duration::from_secs(60);

/// Where it dies, with the first connection after those that stay.
const STEPS: [&str; 4] = ["accepted", "dispatched", "sent", "answered"];

/// How many connections it has before.
const STAYING: u64 = 3;

/// Reliability T-26: whoever was waiting is answered or sees the end, and what a
/// worker had taken, it serves on.
#[test]
fn killed_pools_leave_nobody_waiting_and_their_workers_serving() {
    if let Ok(step) = std::env::var(STEP) {
        dispatcher(&step);
    }
    let ledger = DescriptorLedger::open();
    let rounds = scaled(1, 25);
    let (mut clients, mut limbo, mut lost, mut longest) = (0, 0, 0, Duration::ZERO);
    for _ in 0..rounds {
        for step in STEPS {
            let seen = round(step);
            clients += seen.clients;
            limbo += seen.limbo;
            lost += seen.staying_lost;
            longest = longest.max(seen.longest);
        }
    }
    Figures::of("T-26")
        .must("pools killed", rounds * STEPS.len(), Bound::AtLeast, 4)
        .must(
            "clients waiting",
            clients,
            Bound::AtLeast,
            rounds * STEPS.len(),
        )
        .must("left waiting", limbo, Bound::Exactly, 0)
        .must(
            "connections that workers had, and lost",
            lost,
            Bound::Exactly,
            0,
        )
        .measured(
            "longest wait of a client for its answer or end",
            longest.as_secs_f64() * 1e3,
            "ms",
            Bound::Below,
            1_000.0,
        );
    ledger.assert_balanced();
}

#[derive(Default)]
struct Seen {
    clients: usize,
    limbo: usize,
    staying_lost: usize,
    longest: Duration,
}

fn round(step: &str) -> Seen {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let (mut pool, address) = start(step, &directory.path().join("served"));
    let mut staying: Vec<_> = (0..STAYING).map(|_| ask(address, "stay 1")).collect();
    let workers: Vec<u32> = staying
        .iter_mut()
        .map(|stream| answer(stream).expect("it lives"))
        .collect();

    // It dies with the first of these; the others are at whatever step. Whoever was let
    // in counts, also if it was gone before anything could be said.
    let waiting: Vec<_> = (0..10)
        .filter_map(|number| {
            let mut stream = StdTcpStream::connect(address).ok()?;
            let _ = stream.write_all(format!("{number}\n").as_bytes());
            Some(stream)
        })
        .collect();
    let status = pool.wait().expect("ours");
    assert_eq!(status.code(), None, "it was to be killed: {status}");
    let died = Instant::now();
    let mut seen = Seen {
        clients: waiting.len(),
        ..Seen::default()
    };
    for mut stream in waiting {
        let mut rest = Vec::new();
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
        // An answer, an end or a reset; but not silence.
        let result = stream.read_to_end(&mut rest);
        let is_silent = result.is_err_and(|error| {
            matches!(
                error.kind(),
                std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
            )
        });
        seen.limbo += usize::from(is_silent);
        seen.longest = seen.longest.max(died.elapsed());
    }
    for (stream, worker) in staying.iter_mut().zip(&workers) {
        let asked = stream.write_all(b"stay 2\n");
        let by_the_same = asked.is_ok() && answer(stream) == Some(*worker);
        seen.staying_lost += usize::from(!by_the_same);
    }
    drop(staying);
    // With nothing left to serve they end.
    let began = Instant::now();
    while workers.iter().any(|worker| is_running(*worker)) {
        assert!(
            began.elapsed() < PATIENCE,
            "workers without a pool and connections"
        );
        std::thread::yield_now();
    }
    seen
}

fn start(step: &str, log: &Path) -> (Child, SocketAddr) {
    let mut child = Command::new(std::env::current_exe().expect("Linux knows"))
        .args(["--exact", "--nocapture", "--test-threads=1"])
        .arg("pool::sender::killed_pools_leave_nobody_waiting_and_their_workers_serving")
        .env(STEP, step)
        .env(LOG, log)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("it starts");
    let out = BufReader::new(child.stdout.take().expect("piped"));
    let address = out
        .lines()
        .find_map(|line| Some(line.expect("text").split_once(ADDRESS)?.1.to_owned()));
    let address = address.expect("it says where it listens");
    (child, address.parse().expect("an address"))
}

fn ask(address: SocketAddr, what: &str) -> StdTcpStream {
    let mut stream = StdTcpStream::connect(address).expect("it listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
    stream
        .write_all(format!("{what}\n").as_bytes())
        .expect("it listens");
    stream
}

/// Reads an answer: who gave it.
fn answer(stream: &mut StdTcpStream) -> Option<u32> {
    let mut line = Vec::new();
    let mut byte = [0];
    while stream.read(&mut byte).ok()? == 1 && byte != *b"\n" {
        line.push(byte[0]);
    }
    let line = String::from_utf8(line).ok()?;
    line.split_once(' ')?.1.parse().ok()
}

fn is_running(process: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{process}/stat"))
        .is_ok_and(|stat| !stat.contains(") Z "))
}

/// The process that is killed.
fn dispatcher(step: &str) -> ! {
    let log = std::env::var_os(LOG).expect("it was given");
    let mut reactor = Reactor::new().expect("a reactor");
    let pool = Pool::start(
        &mut reactor,
        settings(2),
        scripted(log.into(), |_| Script::Serve),
    );
    turn_until_serving(&mut reactor, &pool);
    let (dispatching, step) = (pool, step.to_owned());
    let mut accepted = 0;
    let acceptor = move |cx: &mut BuildContext<'_>, socket: OwnedFd, _: &Address| {
        accepted += 1;
        let is_last = accepted > STAYING;
        if is_last && step == "accepted" {
            die();
        }
        dispatching.dispatch(cx.reactor, PassedConnection::new(socket));
        if is_last && step == "dispatched" {
            die();
        }
        if is_last && step == "sent" {
            // After the channels were written.
            cx.reactor.defer(|_| die());
        }
        if is_last && step == "answered" {
            wait_for_answer(cx.reactor, dispatching.clone());
        }
    };
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let listener = reactor.accept(Tcp::at(any), acceptor);
    let address = reactor
        .get(listener.expect("listens"))
        .expect("it listens")
        .address();
    let mut out = std::io::stdout();
    writeln!(out, "{ADDRESS}{address}").expect("it is read");
    loop {
        reactor.turn(None);
    }
}

/// Dies as soon as the pool has the answer to one more.
fn wait_for_answer(reactor: &mut Reactor, pool: Pool) {
    if pool.statistics().acknowledged > STAYING {
        die();
    }
    reactor.call_soon(|reactor| wait_for_answer(reactor, pool));
}
