//! Peers in processes of their own, so that their descriptors are not ours: the
//! test binary, told to be one.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixDatagram, UnixStream as StdUnixStream};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use bowline::testing::Random;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::peer::{file, raise_descriptor_limit, send};

const ROLE: &str = "BOWLINE_TEST_ROLE";

/// A peer. It ends when its input does.
pub(crate) struct Peer {
    child: Child,
    output: BufReader<ChildStdout>,
}

impl Peer {
    /// Starts one that is `role`, with words for it.
    pub(crate) fn start(role: &str, words: &[&str]) -> Self {
        let mut child = Self::command(&[], role, words)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Self { child, output }
    }

    /// What would start one, behind the words of a program that starts what it is given.
    pub(crate) fn command(by: &[&str], role: &str, words: &[&str]) -> Command {
        let own = std::env::current_exe().unwrap();
        let mut all = by.iter().map(OsStr::new).chain([own.as_os_str()]);
        let mut command = Command::new(all.next().expect("at least our own"));
        command
            .args(all)
            .args(["--exact", "children::child"])
            .args(["--nocapture", "--test-threads=1"])
            .env(ROLE, [&[role], words].concat().join(" "));
        command
    }

    /// Has it go on to what it does next.
    pub(crate) fn tell(&mut self) {
        let input = self.child.stdin.as_mut().expect("it is piped");
        input.write_all(b"\n").expect("it listens");
    }

    /// The numbers that it says next.
    pub(crate) fn numbers(&mut self) -> Vec<f64> {
        let mut line = String::new();
        loop {
            line.clear();
            assert!(self.output.read_line(&mut line).unwrap() > 0, "it is gone");
            if let Some(numbers) = line.trim().strip_prefix("says ") {
                return numbers.split(' ').map(|it| it.parse().unwrap()).collect();
            }
        }
    }

    /// The same, where they may not be there yet: from a thread.
    pub(crate) fn numbers_later(mut self) -> std::thread::JoinHandle<(Self, Vec<f64>)> {
        std::thread::spawn(move || {
            let numbers = self.numbers();
            (self, numbers)
        })
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        // It ends by itself; one that does not is not waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[allow(clippy::print_stdout, reason = "it is how the parent hears of it")]
fn say(numbers: &[f64]) {
    let words: Vec<String> = numbers.iter().map(f64::to_string).collect();
    println!("\nsays {}", words.join(" "));
}

/// Waits until the parent says to go on, or has no more use for us.
fn wait_for_word() {
    let _ = std::io::stdin().read(&mut [0]);
}

#[test]
fn child() {
    let Ok(role) = std::env::var(ROLE) else {
        return;
    };
    raise_descriptor_limit();
    let words: Vec<&str> = role.split(' ').collect();
    match words[..] {
        ["flood", path, seconds] => flood(path, seconds.parse().unwrap()),
        ["echo", path, count] => echo(path, count.parse().unwrap()),
        ["park", path, count, descriptors] => {
            park(path, count.parse().unwrap(), descriptors.parse().unwrap());
        }
        ["greet", path, count] => greet(path, count.parse().unwrap()),
        ["stall", path, count] => stall(path, count.parse().unwrap()),
        ["flood-datagrams", "udp", address] => {
            let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
            socket.connect(address).unwrap();
            flood_datagrams(|datagram| socket.send(datagram));
        }
        ["flood-datagrams", "unix", path, own] => {
            let socket = UnixDatagram::bind(own).unwrap();
            flood_datagrams(|datagram| socket.send_to(datagram, path));
        }
        ["stdio", count] => crate::standard::echo(count.parse().unwrap()),
        _ => panic!("no role {role}"),
    }
}

/// Sends as many descriptors as a message holds, or fewer, with each byte, and
/// comes back whenever it is cut. Says how often, and the longest time in
/// milliseconds from a message over the limit to the cut.
fn flood(path: &str, seconds: f64) {
    let passed = file();
    let mut random = Random::new(u64::from(std::process::id()));
    let began = Instant::now();
    let (mut cut, mut longest) = (0, 0.0);
    while began.elapsed().as_secs_f64() < seconds {
        let Ok(socket) = StdUnixStream::connect(path) else {
            continue;
        };
        let mut sent = 0;
        let mut over_since = None;
        loop {
            let count = if random.chance(50) {
                253
            } else {
                1 + random.below(60)
            };
            match send(&socket, b"x", &vec![passed.as_fd(); count]) {
                Ok(_) => {
                    sent += count;
                    if sent > 64 {
                        over_since.get_or_insert_with(Instant::now);
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => std::thread::yield_now(),
                Err(_) => break,
            }
            if began.elapsed().as_secs_f64() > seconds + 10.0 {
                break;
            }
        }
        if let Some(since) = over_since {
            cut += 1;
            longest = f64::max(longest, since.elapsed().as_secs_f64() * 1e3);
        }
    }
    say(&[f64::from(cut), longest]);
    wait_for_word();
}

/// Sends datagrams, each with its number, as fast as they are taken, until it is told to
/// stop; then says how many were taken.
fn flood_datagrams(send: impl Fn(&[u8]) -> std::io::Result<usize>) {
    let mut sent = 0_u64;
    let is_told = || {
        let input = std::io::stdin();
        let mut watched = [PollFd::new(&input, PollFlags::IN)];
        let at_once = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        poll(&mut watched, Some(&at_once)).is_ok_and(|ready| ready > 0)
    };
    while !is_told() {
        for _ in 0..64 {
            let mut datagram = [sent as u8; 200];
            datagram[..8].copy_from_slice(&sent.to_be_bytes());
            match send(&datagram) {
                Ok(_) => sent += 1,
                // Of the host, for a moment.
                Err(error) if error.raw_os_error() == Some(Errno::NOBUFS.raw_os_error()) => {}
                Err(error) => panic!("{error}"),
            }
        }
    }
    wait_for_word();
    say(&[sent as f64]);
    wait_for_word();
}

/// Sends a byte and waits for it, `count` times, each on a connection of its own
/// that it keeps. Says the 99th percentile in milliseconds, and how many came
/// back.
fn echo(path: &str, count: usize) {
    let mut times = Vec::new();
    for _ in 0..count {
        let began = Instant::now();
        let mut socket = StdUnixStream::connect(path).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        if socket.write_all(b"y").is_ok() && matches!(socket.read(&mut [0]), Ok(1)) {
            times.push(began.elapsed().as_secs_f64() * 1e3);
        }
    }
    times.sort_by(f64::total_cmp);
    let p99 = times[times.len() * 99 / 100 - usize::from(times.len() >= 100)];
    say(&[p99, times.len() as f64]);
    wait_for_word();
}

/// Makes connections that each announce a frame and send `descriptors` with its
/// beginning only; and keeps them. First `count` that all are there before any of them
/// sends, then as many again of which each sends at once. Says when the first are there,
/// and when all have sent; goes on to each of the two when it is told to.
fn park(path: &str, count: usize, descriptors: usize) {
    let passed = file();
    let all = vec![passed.as_fd(); descriptors];
    let announce = |socket: &StdUnixStream| {
        // Whose user may have but few in flight waits until some were received.
        while let Err(error) = send(socket, &[0, 0, 0, 100, b'x'], &all) {
            let is_full = Errno::from_io_error(&error) == Some(Errno::TOOMANYREFS);
            assert!(is_full, "{error}");
            std::thread::yield_now();
        }
    };
    let connect = || StdUnixStream::connect(path).unwrap();
    let mut sockets: Vec<_> = (0..count).map(|_| connect()).collect();
    say(&[sockets.len() as f64]);
    wait_for_word();
    sockets.iter().for_each(announce);
    wait_for_word();
    for _ in 0..count {
        sockets.push(connect());
        announce(sockets.last().expect("this one"));
    }
    say(&[sockets.len() as f64]);
    wait_for_word();
}

/// Connects `count` times at once, then waits on each for a byte or the end, and
/// says how many got which.
fn greet(path: &str, count: usize) {
    let sockets: Vec<_> = (0..count)
        .map(|_| StdUnixStream::connect(path).unwrap())
        .collect();
    say(&[sockets.len() as f64]);
    let (mut greeted, mut closed) = (0, 0);
    for mut socket in &sockets {
        // Longer than the test has patience.
        socket
            .set_read_timeout(Some(Duration::from_secs(120)))
            .unwrap();
        match socket.read(&mut [0]) {
            Ok(1) => greeted += 1,
            Ok(_) => closed += 1,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => closed += 1,
            Err(_) => {}
        }
    }
    say(&[f64::from(greeted), f64::from(closed)]);
    wait_for_word();
}

/// Connects `count` times, sends a byte on each now and then, and never what
/// completes the handshake. Says when all are there, and then how many ended.
fn stall(path: &str, count: usize) {
    let mut sockets: Vec<_> = (0..count)
        .map(|_| StdUnixStream::connect(path).unwrap())
        .collect();
    say(&[sockets.len() as f64]);
    for socket in &sockets {
        socket.set_nonblocking(true).unwrap();
    }
    let mut ended = 0;
    let began = Instant::now();
    while ended < count && began.elapsed() < Duration::from_secs(60) {
        sockets.retain_mut(|socket| {
            let is_open = socket.write(b"z").is_ok();
            ended += usize::from(!is_open);
            is_open
        });
        // Slowly.
        let pause = Timespec {
            tv_sec: 0,
            tv_nsec: 200_000_000,
        };
        let _ = poll(&mut [], Some(&pause));
    }
    say(&[ended as f64]);
    wait_for_word();
}
