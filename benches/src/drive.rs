//! User-space instructions per message: a single process in which the writes
//! of the peers and the turns of the server alternate, under callgrind, which
//! collects only inside [`server_turn`]. The same to the unit in every run.

use std::io::{self, ErrorKind};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::Command;

use crate::external;
use crate::peers::{self, Family, Job, Peer, Server, Wait};
use crate::report::Measure;
use crate::sys;

const CONNECTIONS: usize = 64;
/// Rounds before counting begins, for memory to be there: a run of these alone
/// is subtracted.
const WARM_UP: usize = 10;

/// One turn of the server; callgrind knows it by its name.
#[inline(never)]
pub(crate) fn server_turn(server: &mut dyn Server) -> io::Result<()> {
    server.turn(Wait::No)
}

/// The process that is counted: `rounds` messages on each connection. Answers how often the
/// server had a turn, and how often memory was asked for in those turns, after the warm-up.
pub(crate) fn drive(peer: Peer, job: Job, rounds: usize) -> io::Result<[u64; 2]> {
    let (mut server, address) = match job.family {
        Family::Udp => {
            let socket = UdpSocket::bind("127.0.0.1:0")?;
            let address = socket.local_addr()?;
            (peers::build(peer, job, Some(socket.into()))?, Some(address))
        }
        _ => (peers::build(peer, job, None)?, None),
    };
    let mut clients = Vec::new();
    let listener = TcpListener::bind("127.0.0.1:0")?;
    for _ in 0..CONNECTIONS {
        if let Some(address) = address {
            let client = sys::connect_udp(address.port())?;
            sys::set_nonblocking(client.as_raw_fd())?;
            clients.push(client);
            continue;
        }
        let (client, served): (OwnedFd, OwnedFd) = match job.family {
            Family::Packets => sys::packet_pair()?,
            Family::Tcp => {
                let client = TcpStream::connect(listener.local_addr()?)?;
                let (served, _) = listener.accept()?;
                (client.into(), served.into())
            }
            _ => {
                let (client, served) = UnixStream::pair()?;
                (client.into(), served.into())
            }
        };
        for socket in [&client, &served] {
            sys::set_nonblocking(socket.as_raw_fd())?;
            if job.family == Family::Tcp {
                sys::set_no_delay(socket.as_raw_fd())?;
            }
        }
        server.adopt(served)?;
        clients.push(client);
    }
    let (mut turns, mut allocations) = (0, 0);
    for number in 0..WARM_UP + rounds {
        let message = vec![number as u8; job.message];
        for client in &clients {
            sys::send(client.as_raw_fd(), &message)?;
        }
        for client in &clients {
            let mut answer = vec![0; job.message];
            loop {
                match sys::receive(client.as_raw_fd(), &mut answer) {
                    Ok(length) => {
                        assert!(answer[..length] == message, "wrong answer");
                        break;
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {
                        let before = sys::allocations();
                        server_turn(&mut *server)?;
                        if number >= WARM_UP {
                            turns += 1;
                            allocations += sys::allocations() - before;
                        }
                    }
                    Err(error) => return Err(error),
                }
            }
        }
    }
    Ok([turns, allocations])
}

/// What one message costs that is no instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cost {
    Allocations,
    /// Of the server, without those of its clients, which the process makes too.
    SystemCalls,
}

/// The cost of each message of one peer; nothing without strace.
pub(crate) fn count_cost(
    peer: Peer,
    job: Job,
    rounds: usize,
    cost: Cost,
) -> io::Result<Option<f64>> {
    let (warm, all) = (traced(peer, job, 0)?, traced(peer, job, rounds)?);
    let (Some((_, before)), Some(([turns, allocations], after))) = (warm, all) else {
        return Ok(None);
    };
    let messages = (rounds * CONNECTIONS) as f64;
    Ok(Some(match cost {
        Cost::Allocations => allocations as f64 / messages,
        // A client sends once and receives once for each message, and once more in vain
        // before each turn of the server.
        Cost::SystemCalls => (after as f64 - before as f64 - turns as f64) / messages - 2.0,
    }))
}

/// What the process to be counted says, and how many system calls it makes.
fn traced(peer: Peer, job: Job, rounds: usize) -> io::Result<Option<([u64; 2], u64)>> {
    let program = external::program(peer)?;
    let output = Command::new("strace")
        // How often the threads that close sockets wake each other differs.
        .args([
            "-f",
            "-c",
            "-S",
            "name",
            "-U",
            "calls",
            "-e",
            "trace=!futex",
        ])
        .arg(program.get_program())
        .args(["drive", peer.name(), job.task.name(), job.family.name()])
        .args([job.message.to_string(), rounds.to_string()])
        .output();
    let output = match output {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        output => output?,
    };
    let table = String::from_utf8_lossy(&output.stderr);
    let said = String::from_utf8_lossy(&output.stdout);
    let wrong = || io::Error::other(format!("{said}{table}"));
    let number = |it: &str| it.parse::<u64>().ok();
    let sum = table
        .lines()
        .find_map(|line| line.trim().strip_suffix("total"));
    let mut said = said.split_whitespace().filter_map(number);
    match (
        said.next(),
        said.next(),
        sum.and_then(|sum| number(sum.trim())),
    ) {
        (Some(turns), Some(allocations), Some(calls)) => Ok(Some(([turns, allocations], calls))),
        _ => Err(wrong()),
    }
}

/// Instructions for each message of one peer; nothing without valgrind.
pub(crate) fn count_instructions(
    peer: Peer,
    job: Job,
    rounds: usize,
) -> io::Result<Vec<(Measure, f64)>> {
    let server_turn = |rounds: usize| {
        let arguments = [
            "drive",
            peer.name(),
            job.task.name(),
            job.family.name(),
            &job.message.to_string(),
            &rounds.to_string(),
        ];
        let function = match peer {
            // In C.
            Peer::Libuv => "server_turn",
            _ => "*drive::server_turn*",
        };
        collected(peer, function, &arguments.map(String::from))
    };
    let warm = server_turn(0)?;
    let all = server_turn(rounds)?;
    Ok(match (warm, all) {
        (Some(warm), Some(all)) => {
            let each = (all - warm) as f64 / (rounds * CONNECTIONS) as f64;
            vec![(Measure::Instructions, each)]
        }
        _ => Vec::new(),
    })
}

/// How many instructions a peer's program takes with `arguments` inside of one
/// function; nothing without valgrind.
pub(crate) fn collected(
    peer: Peer,
    function: &str,
    arguments: &[String],
) -> io::Result<Option<u64>> {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(format!("--toggle-collect={function}"))
        .arg(external::program(peer)?.get_program())
        .args(arguments)
        .output();
    let output = match output {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        output => output?,
    };
    let text = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(io::Error::other(text.into_owned()));
    }
    let count = text
        .lines()
        .find_map(|line| line.split_once("Collected :"))
        .and_then(|(_, count)| count.trim().parse().ok());
    Ok(count)
}
