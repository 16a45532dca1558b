//! The framings of bowline-peers beside what their fields usually take, in one run: D-Bus
//! beside zbus, sd-bus and libdbus; Wayland beside wayland-server and libwayland;
//! vhost-user beside the loop of the crate vhost.
//!
//! ```text
//! cd benches/protocols && cargo run --release
//!     --quick          a short form
//!     --rounds N       how often each is measured
//!     --only TEXT      works with this in their name
//!     --instructions   what callgrind counts in user space for one message, and no times
//! ```
//!
//! Each peer is a process of its own, on another CPU than the generator, which is one for
//! all and checks every answer. What is measured is the CPU time of the peer's process, of
//! all its threads, for one message; rounds go by turns, and what is shown is the median of
//! them, and the median of the ratios within each round. Receives and system calls are
//! counted once more under strace(1).
//!
//! The peers in C are compiled here, where their headers are: Debian's libsystemd-dev,
//! libdbus-1-dev, libwayland-dev. One that is missing is named.

mod dbus;
mod generator;
mod peer;
mod vhost_user;
mod wayland;

use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;

use peer::{Peer, Process, Tool};

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

/// Something that a peer is asked to do.
struct Work {
    name: &'static str,
    /// What a peer is started as.
    kind: &'static str,
    /// How many times it is done in a round.
    times: usize,
    /// How many messages it is to do it once.
    messages: usize,
    /// Connects to a peer, and makes what does it so many times.
    connect: fn(&Process, &Work) -> Outcome<Box<dyn Session>>,
    /// What `connect` is to know: descriptors, calls at once.
    detail: (usize, usize),
}

/// A generator that is connected to a peer.
trait Session {
    /// Does the work so many times, and waits for the last answer.
    fn run(&mut self, times: usize) -> Outcome;
}

fn main() -> Outcome {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    if let ["serve", peer, kind, socket, name] = *arguments {
        return serve(peer, kind, Path::new(socket), name);
    }
    let (mut rounds, mut only, mut part) = (9, "", 1);
    let mut compare: fn(&Work, &[&Peer], usize, usize, &Path) -> Outcome = compare;
    let mut rest = &arguments[..];
    while !rest.is_empty() {
        rest = match rest {
            ["--quick", rest @ ..] => {
                (rounds, part) = (3, 4);
                rest
            }
            ["--rounds", number, rest @ ..] => {
                rounds = number.parse()?;
                rest
            }
            ["--only", text, rest @ ..] => {
                only = text;
                rest
            }
            ["--instructions", rest @ ..] => {
                compare = compare_instructions;
                rest
            }
            _ => return Err("usage: [--quick] [--rounds N] [--only TEXT] [--instructions]".into()),
        };
    }
    let scratch = tempfile::tempdir()?;
    for (protocol, peers, works) in [
        ("D-Bus", dbus::PEERS, dbus::WORKS),
        ("Wayland", wayland::PEERS, wayland::WORKS),
        ("vhost-user", vhost_user::PEERS, vhost_user::WORKS),
    ] {
        let is_wanted = |work: &&Work| work.name.contains(only) || protocol == only;
        let works: Vec<_> = works.iter().filter(is_wanted).collect();
        if works.is_empty() {
            continue;
        }
        let peers: Vec<_> = peers.iter().filter(|peer| peer.is_there()).collect();
        head(protocol, &peers);
        for work in works {
            compare(work, &peers, rounds, part, scratch.path())?;
        }
    }
    Ok(())
}

fn serve(peer: &str, kind: &str, socket: &Path, name: &str) -> Outcome {
    match (kind, peer) {
        ("dbus-peer" | "dbus-bus", _) => dbus::serve(peer, kind, socket, name),
        ("wayland", _) => wayland::serve(peer, socket),
        _ => vhost_user::serve(peer, socket),
    }
}

fn compare(work: &Work, peers: &[&Peer], rounds: usize, part: usize, scratch: &Path) -> Outcome {
    let bus = match work.kind {
        "dbus-bus" => Some(dbus::Bus::start(scratch)?),
        _ => None,
    };
    let bus = bus.as_ref();
    let start = |peer: &&Peer, tool| Process::start(peer, work.kind, scratch, bus, tool);
    let mut times: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    {
        let processes = peers.iter().map(|peer| start(peer, None));
        let processes = processes.collect::<Outcome<Vec<_>>>()?;
        let sessions = processes
            .iter()
            .map(|process| (work.connect)(process, work));
        let mut sessions = sessions.collect::<Outcome<Vec<_>>>()?;
        let count = (work.times / part).max(1);
        for session in &mut sessions {
            session.run(count / 4 + 1)?;
        }
        for _ in 0..rounds {
            for ((peer, process), session) in peers.iter().zip(&processes).zip(&mut sessions) {
                let before = process.cpu_time()?;
                session.run(count)?;
                let took = process.cpu_time()? - before;
                let each = took.as_nanos() as f64 / (count * work.messages) as f64;
                times.entry(peer.name).or_default().push(each);
            }
        }
    }
    let mut calls = BTreeMap::new();
    for peer in peers {
        calls.insert(peer.name, count(work, || start(peer, Some(Tool::Strace)))?);
    }
    row(work, peers, &times, &calls);
    Ok(())
}

/// The instructions of each for a message, and as ratios to those of the first.
fn compare_instructions(
    work: &Work,
    peers: &[&Peer],
    _: usize,
    _: usize,
    scratch: &Path,
) -> Outcome {
    let bus = match work.kind {
        "dbus-bus" => Some(dbus::Bus::start(scratch)?),
        _ => None,
    };
    let tool = Some(Tool::Callgrind);
    let mut ours = None;
    print!("| {} |", work.name);
    for peer in peers {
        let start = || Process::start(peer, work.kind, scratch, bus.as_ref(), tool);
        let its = count(work, start)?.1;
        let ratio = its / *ours.get_or_insert(its);
        print!(" {its:.0}, {ratio:.2} |");
    }
    println!();
    Ok(())
}

/// What a tool counts for a message: by what more messages take more.
fn count(work: &Work, start: impl Fn() -> Outcome<Process>) -> Outcome<(f64, f64)> {
    const TIMES: [usize; 2] = [20, 120];
    let mut counted = [(0, 0); 2];
    for (counted, times) in counted.iter_mut().zip(TIMES) {
        let process = start()?;
        let mut session = (work.connect)(&process, work)?;
        session.run(times)?;
        // It would end with its connection.
        *counted = process.end_and_count()?;
        drop(session);
    }
    let more = ((TIMES[1] - TIMES[0]) * work.messages) as f64;
    let [few, many] = counted;
    Ok((
        (many.0 as f64 - few.0 as f64) / more,
        (many.1 as f64 - few.1 as f64) / more,
    ))
}

fn head(protocol: &str, peers: &[&Peer]) {
    print!("\n| {protocol}, a message |");
    for peer in peers {
        print!(" {} |", peer.name);
    }
    print!("\n|---|");
    peers.iter().for_each(|_| print!("---|"));
    println!();
}

fn median(numbers: impl IntoIterator<Item = f64>) -> f64 {
    let mut numbers: Vec<_> = numbers.into_iter().collect();
    numbers.sort_unstable_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}

fn row(
    work: &Work,
    peers: &[&Peer],
    times: &BTreeMap<&str, Vec<f64>>,
    calls: &BTreeMap<&str, (f64, f64)>,
) {
    let ours = &times[peers[0].name];
    print!("| {} |", work.name);
    for peer in peers {
        let its = &times[peer.name];
        let ratio = median(its.iter().zip(ours).map(|(its, ours)| its / ours));
        let (receives, all) = calls[peer.name];
        let took = median(its.iter().copied());
        print!(" {took:.0} ns, {ratio:.2}; {receives:.2} of {all:.2} |");
    }
    println!();
}
