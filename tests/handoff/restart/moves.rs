//! Live connections move, with every byte and descriptor (T-31).

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::client::{Client, DEADLINE, Server};
use crate::support::figures::{Bound, Figures, is_full};
use crate::support::{DescriptorLedger, eventually};

/// How many connections, those that never rest beside them, and how many
/// restarts; another number of connections with `BOWLINE_MOVES=4000`.
fn sizes() -> (usize, usize, usize) {
    let wanted = std::env::var("BOWLINE_MOVES").ok();
    match wanted.and_then(|wanted| wanted.parse().ok()) {
        Some(wanted) => (wanted, wanted / 20, 20),
        None if is_full() => (10_000, 500, 20),
        None => (400, 40, 5),
    }
}

/// More bytes than a socket holds in both of its buffers.
const BIG: usize = 700_000;

/// Those with unsent bytes and descriptors are among so many: with all of them the
/// descriptors alone would be more than the 20,000 that a process may have.
const HEAVY: usize = 2_000;

/// Whether this one has unsent bytes there while it moves in this restart.
fn is_heavy(index: usize, restart: usize) -> bool {
    index < HEAVY && index % 4 < 2 && matches!((index + restart) % 10, 2 | 7)
}

/// Reliability T-31: everything that a connection can be in the middle of.
#[test]
fn live_connections_move_with_every_byte_and_descriptor() {
    let _ledger = DescriptorLedger::open();
    let (connections, never_resting, restarts) = sizes();
    let limit = getrlimit(Resource::Nofile);
    let most = Rlimit {
        current: limit.maximum,
        ..limit
    };
    setrlimit(Resource::Nofile, most).expect("up to the hard limit");

    let server = Server::start();
    // One that has taken over has a timer descriptor, which a cold one may not have
    // needed yet.
    server.restart();
    let descriptors = server.descriptors();
    let mut idle: Vec<Client> = (0..connections)
        .map(|index| match index % 2 {
            0 => server.connect_tcp("one"),
            _ => server.connect_unix(),
        })
        .collect();
    for (index, client) in idle.iter_mut().enumerate() {
        client.echo(&index.to_be_bytes());
    }
    let is_over = Arc::new(AtomicBool::new(false));
    let busy = {
        let clients: Vec<_> = (0..never_resting)
            .map(|_| server.connect_tcp("two"))
            .collect();
        let is_over = Arc::clone(&is_over);
        thread::spawn(move || keep_busy(clients, &is_over))
    };

    let mut moved = 0;
    for restart in 0..restarts {
        let kept: OwnedFd = tempfile::tempfile().expect("temporary file").into();
        for (index, client) in idle.iter_mut().enumerate() {
            let is_unix = index % 2 == 1;
            match (index + restart) % 10 {
                // In the middle of a frame.
                0 | 1 => client.begin(b'e', &[restart as u8; 1_000], None),
                // In the middle of one that came with a descriptor.
                3 | 5 if is_unix => client.begin(b'k', b"kept", Some(&kept)),
                // Unsent bytes there, and another request behind.
                _ if is_heavy(index, restart) => {
                    let length = (BIG as u32).to_be_bytes();
                    client.send(b'b', &length).expect("connected");
                    if is_unix {
                        // Descriptors wait behind the bytes.
                        for count in [3_u32, 0, 20] {
                            client.send(b'd', &count.to_be_bytes()).expect("connected");
                        }
                    }
                    client.send(b'e', b"behind").expect("connected");
                }
                _ => {}
            }
        }
        let line = server.restart();
        let count: usize = line
            .rsplit(' ')
            .next()
            .expect("a count")
            .parse()
            .expect("a count");
        moved += count;
        for (index, client) in idle.iter_mut().enumerate() {
            let is_unix = index % 2 == 1;
            match (index + restart) % 10 {
                0 | 1 => {
                    client.end();
                    assert_eq!(client.receive().expect("answer"), [restart as u8; 1_000]);
                }
                3 | 5 if is_unix => {
                    client.end();
                    client.receive().expect("answer");
                    client.send(b'g', b"").expect("connected");
                    let [back] = client.receive_kept().try_into().expect("one was kept");
                    assert!(is_same(&back, &kept));
                }
                _ if is_heavy(index, restart) => {
                    client.receive_pattern(BIG);
                    if is_unix {
                        for count in [3, 0, 20] {
                            client.receive_numbered(count);
                        }
                    }
                    assert_eq!(client.receive().expect("answer"), b"behind");
                }
                _ => {}
            }
            client.echo(&restart.to_be_bytes());
            client.assert_settled();
        }
    }
    let now = server.pid();
    for client in &mut idle {
        assert_eq!(client.ask_pid().expect("answer"), now, "it has not moved");
    }
    is_over.store(true, Ordering::Relaxed);
    let (rounds, mut pauses) = busy.join().expect("nothing lost");
    pauses.sort_unstable();
    let p99 = pauses[pauses.len() * 99 / 100];
    Figures::of("T-31")
        .must("restarts", restarts, Bound::AtLeast, 5)
        .must(
            "idle connections",
            idle.len(),
            Bound::AtLeast,
            if is_full() { 10_000 } else { 400 },
        )
        .must(
            "moves",
            moved,
            Bound::Exactly,
            restarts * (connections + never_resting),
        )
        .must(
            "requests in all on busy ones",
            rounds * never_resting,
            Bound::AtLeast,
            1,
        )
        .measured(
            "answer of a busy one, p99",
            p99.as_secs_f64() * 1e3,
            "ms",
            Bound::Below,
            250.0,
        )
        .remark(&format!(
            "{never_resting} busy ones; answers after {:.0?} at most; the sums of all streams are \
             right",
            pauses[pauses.len() - 1]
        ));
    // Clean in the last process: nothing is left of the connections, nor of moves.
    drop(idle);
    eventually(DEADLINE, || {
        let now = server.descriptors();
        (now == descriptors)
            .then_some(())
            .ok_or_else(|| format!("{now} of {descriptors}"))
    });
    setrlimit(Resource::Nofile, limit).expect("as it was");
}

fn is_same(one: &impl AsFd, other: &impl AsFd) -> bool {
    let inode = |fd: &dyn AsFd| rustix::fs::fstat(fd.as_fd()).expect("open").st_ino;
    inode(one) == inode(other)
}

/// Requests without a pause on all of them; each answer is checked.
fn keep_busy(mut clients: Vec<Client>, is_over: &AtomicBool) -> (usize, Vec<Duration>) {
    let mut rounds = 0;
    let mut times = Vec::new();
    while !is_over.load(Ordering::Relaxed) {
        let asked: Vec<_> = clients
            .iter_mut()
            .map(|client| {
                client.send(b'e', &[rounds as u8; 300]).expect("connected");
                client
                    .send(b'b', &5_000_u32.to_be_bytes())
                    .expect("connected");
                Instant::now()
            })
            .collect();
        for (client, asked) in clients.iter_mut().zip(asked) {
            assert_eq!(client.receive().expect("answer"), [rounds as u8; 300]);
            client.receive_pattern(5_000);
            times.push(asked.elapsed());
        }
        rounds += 1;
    }
    (rounds, times)
}

/// The successor dies, or hangs, when it has connections and was not told to
/// serve them: they come back, in the middle of whatever they were at.
#[test]
fn connections_come_back_when_the_successor_fails_while_they_move() {
    let _ledger = DescriptorLedger::open();
    let server = Server::start();
    let mut clients: Vec<_> = (0..100).map(|_| server.connect_unix()).collect();
    for (fault, says) in [
        (
            "crashes while connections move",
            "goes on: the other process is gone",
        ),
        (
            "hangs while connections move",
            "goes on: the other process took too long",
        ),
    ] {
        server.set_fault(fault);
        let old = server.pid();
        let kept: OwnedFd = tempfile::tempfile().expect("temporary file").into();
        let big = (BIG as u32).to_be_bytes();
        for (index, client) in clients.iter_mut().enumerate() {
            match index % 3 {
                0 => client.begin(b'k', b"kept", Some(&kept)),
                1 => {
                    client.send(b'b', &big).expect("connected");
                    client.send(b'd', &5_u32.to_be_bytes()).expect("connected");
                }
                _ => {}
            }
        }
        server.signal(rustix::process::Signal::HUP);
        if fault.starts_with("hangs") {
            let child = server.child_of(old);
            server.wait_for(&format!("{child} hangs"));
            server.hurry();
        }
        server.wait_for(&format!("{old} {says}"));
        assert_eq!(server.pid(), old);
        for (index, client) in clients.iter_mut().enumerate() {
            match index % 3 {
                0 => {
                    client.end();
                    client.receive().expect("answer");
                    client.send(b'g', b"").expect("connected");
                    let [back] = client.receive_kept().try_into().expect("one was kept");
                    assert!(is_same(&back, &kept));
                }
                1 => {
                    client.receive_pattern(BIG);
                    client.receive_numbered(5);
                }
                _ => {}
            }
            assert_eq!(client.ask_pid().expect("answer"), old, "{fault}");
            client.assert_settled();
        }
        // New ones are served as well.
        server.connect_tcp("one").echo(fault.as_bytes());
    }
    server.set_fault("");
    server.restart();
    for client in &mut clients {
        assert_eq!(client.ask_pid().expect("answer"), server.pid());
    }
}

/// A successor of another kind leaves them where they are: served by the old
/// process, to their end.
#[test]
fn connections_that_the_successor_does_not_take_stay() {
    let _ledger = DescriptorLedger::open();
    let server = Server::start();
    let mut client = server.connect_unix();
    let old = client.ask_pid().expect("answer");
    client.begin(
        b'k',
        b"kept",
        Some(&tempfile::tempfile().expect("file").into()),
    );
    server.set_fault("takes no connections");
    let line = server.restart();
    assert!(line.ends_with(" with 0"), "{line}");
    client.end();
    client.receive().expect("answer");
    client.send(b'g', b"").expect("connected");
    assert_eq!(client.receive_kept().len(), 1);
    assert_eq!(client.ask_pid().expect("answer"), old);
    assert_ne!(server.connect_unix().ask_pid().expect("answer"), old);
}
