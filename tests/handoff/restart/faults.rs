//! Whatever goes wrong with a successor, its predecessor serves on (T-30).

use std::fs;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use rustix::process::{Pid, Signal, kill_process};

use super::client::{DEADLINE, Server, took};
use super::hung::HAS_ALL;
use super::server::{KILLED_WITH, LIMIT, LOOKS_ONCE};
use crate::support::figures::{Bound, Figures};
use crate::support::{DescriptorLedger, eventually};

/// Clients that ask again and again, each time on a new connection.
struct Load {
    is_over: Arc<AtomicBool>,
    clients: Vec<thread::JoinHandle<Result<usize, String>>>,
}

impl Load {
    fn start(server: &Server) -> Self {
        let is_over = Arc::new(AtomicBool::new(false));
        let mut clients = Vec::new();
        for name in ["one", "two"] {
            let address = fs::read_to_string(server.path(name)).expect("it listens");
            let is_over = Arc::clone(&is_over);
            clients.push(thread::spawn(move || {
                let mut count = 0;
                while !is_over.load(Ordering::Relaxed) {
                    ask(&address).map_err(|error| format!("request {count}: {error}"))?;
                    count += 1;
                }
                Ok(count)
            }));
        }
        Self { is_over, clients }
    }

    /// Ends; nothing may have failed.
    #[track_caller]
    fn finish(self) -> usize {
        self.is_over.store(true, Ordering::Relaxed);
        let counts = self.clients.into_iter().map(|client| {
            let result = client.join().expect("does not panic");
            result.unwrap_or_else(|error| panic!("{error}"))
        });
        counts.sum()
    }
}

/// One request on one connection.
fn ask(address: &str) -> io::Result<()> {
    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect(address)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.write_all(b"\0\0\0\x02ehi")?;
    let mut answer = [0; 15];
    stream.read_exact(&mut answer)?;
    if &answer[..7] != b"\0\0\0\x0aEhi" {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok(())
}

/// Reliability T-30: each of the ways in which a successor can fail: the old one
/// goes on, says why, has the descriptors it had, and is replaced by the next that
/// is good.
#[test]
fn successor_that_fails_leaves_the_old_process_serving() {
    let _ledger = DescriptorLedger::open();
    let server = Server::start();
    let old = server.pid();
    let mut client = server.connect_tcp("one");
    client.echo(b"before");
    let descriptors = server.descriptors();
    let load = Load::start(&server);
    let mut failed = 0;
    for (fault, says) in [
        (
            "crashes at once",
            "goes on: successor ended before it took over",
        ),
        (
            "exits early",
            "goes on: successor ended before it took over: exit status: 0",
        ),
        (
            "crashes while it listens",
            "goes on: the other process is gone",
        ),
        ("cannot listen", "goes on: the other process gave up"),
        (
            "is of another format",
            "goes on: predecessor is of another format",
        ),
        ("is never ready", "goes on: the other process took too long"),
        (HAS_ALL, "goes on: the other process took too long"),
        ("never asks", "goes on: the other process took too long"),
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
        let before = server.log().matches(says).count();
        server.signal(Signal::HUP);
        let hangs = says.ends_with("took too long");
        if hangs {
            let child = server.child_of(old);
            server.wait_for(&format!("{child} hangs"));
            server.hurry();
        }
        let told = server.until(|log| {
            let said = log.lines().filter(|line| line.contains(says)).nth(before);
            said.map(str::to_owned)
        });
        // Each step has its limit, and so has the whole. Nobody is cut off before it.
        let took = took(&told);
        assert!(took < LIMIT * 8, "{fault}: {told}");
        assert!(!hangs || took >= LIMIT, "{fault}: {told}");
        assert_eq!(server.pid(), old, "{fault}");
        client.echo(fault.as_bytes());
        // Connections of the load come and go; between them it is what it was.
        eventually(DEADLINE, || {
            let now = server.descriptors();
            let spare = now.abs_diff(descriptors);
            (spare <= 4)
                .then_some(())
                .ok_or_else(|| format!("{fault}: {now} of {descriptors}"))
        });
        failed += 1;
    }
    server.set_fault("");
    server.restart();
    assert_ne!(server.pid(), old);
    assert_eq!(client.ask_pid().expect("it has moved"), server.pid());
    let requests = load.finish();
    let log = server.log();
    assert!(!log.contains("nonsense"), "{log}");
    // The load ends with the first request that fails.
    Figures::of("T-30")
        .must(
            "ways to fail that left the old one serving",
            failed,
            Bound::Exactly,
            10,
        )
        .must(
            "requests meanwhile, none of which failed",
            requests,
            Bound::AtLeast,
            100,
        );
}

/// The old process says who the new one is, since systemd listens to the main
/// process only; when it all came to nothing, that it is ready again.
#[test]
fn service_manager_is_told_who_serves() {
    let _ledger = DescriptorLedger::open();
    let (server, manager) = Server::start_managed();
    let receive = || {
        let mut bytes = [0; 256];
        let length = manager.recv(&mut bytes).expect("a notice");
        String::from_utf8_lossy(&bytes[..length]).into_owned()
    };
    assert_eq!(receive(), "READY=1\n");
    server.set_fault("exits early");
    server.signal(Signal::HUP);
    assert!(receive().starts_with("RELOADING=1\nMONOTONIC_USEC="));
    assert_eq!(receive(), "READY=1\n");
    server.set_fault("");
    server.restart();
    assert!(receive().starts_with("RELOADING=1\nMONOTONIC_USEC="));
    assert_eq!(receive(), format!("MAINPID={}\n", server.pid()));
    assert_eq!(receive(), "READY=1\n");
}

/// Reliability T-30, contract X-21 and W-62: there is nothing to start.
#[test]
fn successor_whose_program_is_missing_leaves_the_old_process_serving() {
    let _ledger = DescriptorLedger::open();
    let server = Server::start();
    let old = server.pid();
    fs::write(server.path("program"), "/nonexistent/program").expect("ours");
    server.signal(Signal::HUP);
    server.wait_for(&format!("{old} no restart: cannot start the successor"));
    server.connect_tcp("two").echo(b"still there");
    assert_eq!(server.pid(), old);
    fs::remove_file(server.path("program")).expect("ours");
    server.restart();
    server.connect_tcp("two").echo(b"still there");
}

/// Reliability T-30: two at once.
#[test]
fn second_successor_at_a_time_is_refused() {
    let _ledger = DescriptorLedger::open();
    let mut server = Server::start();
    let old = server.pid();
    server.set_fault("is never ready");
    server.signal(Signal::HUP);
    // Another is started while the first is being served.
    let hanging = server.child_of(old);
    server.wait_for(&format!("{hanging} hangs"));
    server.set_fault("");
    server.signal(Signal::HUP);
    server.wait_for(&format!(
        "{old} no restart: another successor is being served"
    ));
    server.set_fault(LOOKS_ONCE);
    let refused = server.start_stranger();
    server.wait_for(&format!(
        "{refused} not started: looked for a predecessor once: \
         predecessor serves another successor"
    ));
    assert_eq!(server.pid(), old);
    // One that looks again takes over when the first has not made it.
    server.set_fault("");
    let stranger = server.start_stranger();
    server.hurry();
    server.wait_for(&format!("{old} goes on: the other process took too long"));
    server.wait_for(&format!("{stranger} took over from {old} "));
    server.wait_for(&format!("{old} handed over"));
    server.connect_unix().echo(b"served by the stranger");
}

/// Reliability T-30: a successor that is killed at any moment before it has
/// everything: the old process goes on with all connections, those it had and new
/// ones.
#[test]
fn killing_the_successor_at_random_moments_loses_no_connection() {
    const KILLS: usize = 20;
    let _ledger = DescriptorLedger::open();
    let (mut killed, mut rounds) = (0, 0);
    // How many requests one client makes while a restart goes on: what the kills are
    // spread over.
    let mut length = {
        let server = Server::start();
        server.set_fault("takes no connections");
        let mut client = server.connect_unix();
        server.signal(Signal::HUP);
        let _ = server.child_of(server.pid());
        let mut count = 0;
        while !server.log().contains(" handed over") {
            client.echo(b"passes the time");
            count += 1;
        }
        count
    };
    while killed < KILLS {
        let server = Server::start();
        let old = server.pid();
        // Those that have moved die with it, and are another story.
        server.set_fault("takes no connections");
        let mut clients: Vec<_> = (0..20).map(|_| server.connect_unix()).collect();
        server.signal(Signal::HUP);
        let child = server.child_of(old);
        // Some more time for each: what so many requests take.
        for _ in 0..length * killed / KILLS {
            clients[0].echo(b"passes the time");
        }
        let pid = Pid::from_raw(child.cast_signed()).expect("not 0");
        let _ = kill_process(pid, Signal::KILL);
        let goes_on = server.until(|log| {
            let has_ended = log.contains(&format!("{old} handed over"));
            let goes_on = log.contains(&format!("{old} goes on"));
            (has_ended || goes_on).then_some(goes_on)
        });
        rounds += 1;
        if goes_on {
            killed += 1;
            clients.push(server.connect_tcp("one"));
            clients.push(server.connect_unix());
        } else {
            // Too late: this time, the restart took less.
            length = length * 9 / 10;
        }
        for client in &mut clients {
            assert_eq!(client.ask_pid().expect("an answer"), old);
        }
        assert!(rounds < 10 * KILLS, "{killed} of {rounds} in time");
    }
    Figures::of("T-30").must("killed in time", killed, Bound::Exactly, KILLS);
}

/// Reliability T-30: the same while connections move: those that had become its own die
/// with it, all of a message or none, and are told of it; whoever had not is served on,
/// with every byte. It is killed before, between and in the middle of messages.
#[test]
fn killing_the_successor_while_connections_move_takes_only_its_own() {
    const BATCH: usize = 64;
    const CLIENTS: usize = 4 * BATCH;
    let _ledger = DescriptorLedger::open();
    let (mut rounds, mut died, mut kept, mut torn, mut others) = (0, 0, 0, 0, 0);
    for own in [0, 1, 63, 64, 65, 100, 127, 128, 160, 191, 192, 255] {
        let server = Server::start();
        let old = server.pid();
        let mut clients: Vec<_> = (0..CLIENTS).map(|_| server.connect_unix()).collect();
        clients.iter_mut().for_each(|client| client.echo(b"before"));
        // Each in the middle of something.
        for client in &mut clients {
            client.begin(b'e', b"half of it", None);
        }
        server.set_fault(&format!("{KILLED_WITH}{own}"));
        server.signal(Signal::HUP);
        server.wait_for(&format!("{old} goes on: the other process is gone"));
        let mut lost = 0;
        for client in &mut clients {
            // Whoever is still there has lost nothing.
            match client.try_end().and_then(|()| client.receive()) {
                Ok(answer) => {
                    assert_eq!(answer, b"half of it");
                    assert_eq!(client.ask_pid().expect("an answer"), old);
                    kept += 1;
                }
                Err(_) => lost += 1,
            }
        }
        rounds += 1;
        died += lost;
        torn += usize::from(lost % BATCH != 0);
        // Those of earlier messages were its own, and of this one at most.
        let own = own / BATCH * BATCH;
        others += lost.saturating_sub(own + BATCH);
        assert!(lost >= own, "{lost} of {own}: who serves them?");
        let mut new = server.connect_tcp("one");
        assert_eq!(new.ask_pid().expect("an answer"), old);
    }
    Figures::of("T-30")
        .must("killed while connections move", rounds, Bound::Exactly, 12)
        .must(
            "connections that were its own and died",
            died,
            Bound::AtLeast,
            16 * BATCH,
        )
        .must(
            "connections that were not, and were kept",
            kept,
            Bound::AtLeast,
            20 * BATCH,
        )
        .must(
            "connections lost that were not its own",
            others,
            Bound::Exactly,
            0,
        )
        .must(
            "messages of which some fared differently",
            torn,
            Bound::Exactly,
            0,
        );
}
