//! Servers of datagrams and packets, programs on pipes, and parents of children: the
//! same for each peer, as in `peers`.
//!
//! A UDP server is given its socket, a server of packets its listener, a program its end
//! of a pipe. Datagrams are answered to their senders. One that counts says how many came
//! after each [`BURST`]; one that sends is asked for so many by a number.

mod bowline;
mod limit;
mod quinn;
mod tokio;

use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::time::Instant;

use super::{Family, Job, Peer, Server, elsewhere};
use crate::sys;

/// How many datagrams are sent before an answer.
pub(crate) const BURST: usize = 32;

/// How long the datagrams are that are only sent one way.
pub(crate) const DATAGRAM: usize = 1_200;

/// How many children there are at a time.
const CHILDREN: usize = 4;

const PROGRAM: &std::ffi::CStr = c"/bin/true";

/// Whether a peer takes part with this family.
pub(crate) fn can(peer: Peer, family: Family) -> bool {
    match peer {
        Peer::Limit | Peer::Bowline | Peer::Tokio => true,
        Peer::Quinn => family == Family::Udp,
        // Neither has sockets of packets.
        Peer::Libuv | Peer::Twisted => family != Family::Packets,
        Peer::Mio | Peer::Anchovy | Peer::Calloop => false,
    }
}

pub(crate) fn build(peer: Peer, job: Job, fd: Option<OwnedFd>) -> io::Result<Box<dyn Server>> {
    match peer {
        Peer::Limit => limit::build(job, fd),
        Peer::Bowline => bowline::build(job, fd),
        Peer::Tokio => tokio::build(job, fd),
        Peer::Quinn => quinn::build(job, fd),
        _ => Err(elsewhere()),
    }
}

/// Starts and reaps so many children; how many in a second, and the nanoseconds of CPU
/// time that each took here.
pub(crate) fn spawn(peer: Peer, count: usize) -> io::Result<[f64; 2]> {
    let before = (sys::own_cpu_time(), Instant::now());
    match peer {
        Peer::Limit => limit::spawn(count)?,
        Peer::Bowline => bowline::spawn(count)?,
        Peer::Tokio => tokio::spawn(count)?,
        _ => return Err(elsewhere()),
    }
    let cpu = sys::own_cpu_time() - before.0;
    let rate = count as f64 / before.1.elapsed().as_secs_f64();
    Ok([rate, cpu.as_nanos() as f64 / count as f64])
}

/// Says how many bytes a pipe had.
fn report(count: usize) {
    let mut output = io::stdout();
    let told = output.write_all(&count.to_le_bytes());
    told.and_then(|()| output.flush())
        .expect("the parent waits for it");
}

/// How many datagrams are asked for.
fn asked(data: &[u8]) -> usize {
    let number = data.first_chunk().expect("one number is sent");
    usize::from_le_bytes(*number)
}
