//! A server as a process of its own, started fresh, on a CPU of its own.

use std::cell::RefCell;
use std::env;
use std::io::{self, Read};
use std::net::{TcpListener, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::external;
use crate::peers::{Family, Job, Peer, Task};
use crate::sys;

pub(crate) const SERVER_CPU: usize = 0;
pub(crate) const GENERATOR_CPU: usize = 1;

const BACKLOG: i32 = 4096;

/// Where a server listens.
#[derive(Debug)]
enum Address {
    Tcp(u16),
    Unix(PathBuf),
    Udp(u16),
    Packets(PathBuf),
    /// Our end of its pipe, until it is taken.
    Pipe(RefCell<Option<OwnedFd>>),
}

/// A running server; dropping it ends it.
pub(crate) struct ServerProcess {
    child: Child,
    output: ChildStdout,
    address: Address,
}

impl ServerProcess {
    pub(crate) fn start(peer: Peer, job: Job) -> io::Result<Self> {
        let (listener, address) = listen(job)?;
        if job.family.is_stream() {
            sys::set_backlog(listener.as_raw_fd(), BACKLOG)?;
            sys::set_nonblocking(listener.as_raw_fd())?;
        }
        let mut command = external::program(peer)?;
        command.arg("serve").arg(peer.name()).arg(job.task.name());
        command.arg(job.family.name()).arg(job.message.to_string());
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        sys::pin_child(&mut command, cpu_for(job.task));
        let mut child = sys::spawn_with_listener(&mut command, listener)?;
        let output = child.stdout.take().expect("it is piped");
        let mut server = Self {
            child,
            output,
            address,
        };
        // An interpreter takes its time.
        server.output.read_exact(&mut [0])?;
        Ok(server)
    }

    /// A blocking connection.
    pub(crate) fn connect(&self) -> io::Result<OwnedFd> {
        self.connect_from(1)
    }

    /// A blocking connection; over TCP from an address of many.
    pub(crate) fn connect_from(&self, source: u16) -> io::Result<OwnedFd> {
        match &self.address {
            Address::Tcp(port) => sys::connect_from(source, *port),
            Address::Unix(path) => Ok(UnixStream::connect(path)?.into()),
            Address::Udp(port) => sys::connect_udp(*port),
            Address::Packets(path) => sys::connect_for_packets(path),
            Address::Pipe(end) => {
                let end = end.borrow_mut().take();
                end.ok_or_else(|| io::ErrorKind::NotConnected.into())
            }
        }
    }

    /// Where it listens, if that is in the file system.
    pub(crate) fn path(&self) -> Option<&Path> {
        match &self.address {
            Address::Unix(path) => Some(path),
            _ => None,
        }
    }

    /// A connection, if not too many wait to be accepted.
    pub(crate) fn connect_at_once(&self) -> io::Result<OwnedFd> {
        match &self.address {
            Address::Tcp(port) => sys::connect_from(1, *port),
            Address::Unix(path) => sys::connect_unix_at_once(path),
            _ => self.connect(),
        }
    }

    pub(crate) fn cpu_time(&self) -> io::Result<Duration> {
        sys::cpu_time(self.child.id())
    }

    /// How many bytes the server has allocated.
    pub(crate) fn allocated(&mut self) -> io::Result<u64> {
        sys::signal_report(self.child.id())?;
        let mut bytes = [0; 8];
        self.output.read_exact(&mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// How many bytes its pipe had, which it says at the end.
    pub(crate) fn counted(&mut self) -> io::Result<usize> {
        let mut bytes = [0; 8];
        self.output.read_exact(&mut bytes)?;
        Ok(usize::from_le_bytes(bytes))
    }
}

/// One step after the other, in three processes: on two CPUs that would measure
/// how long a sleeping CPU takes to wake up, some ten times what there is to do.
fn cpu_for(task: Task) -> usize {
    match task {
        Task::Pass => GENERATOR_CPU,
        _ => SERVER_CPU,
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        // Gone already, or not: either way it is reaped.
        drop(self.child.kill());
        drop(self.child.wait());
        if let Address::Unix(path) | Address::Packets(path) = &self.address {
            drop(std::fs::remove_file(path));
        }
    }
}

fn listen(job: Job) -> io::Result<(OwnedFd, Address)> {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let path = || {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("bowline-bench-{}-{number}", std::process::id());
        env::temp_dir().join(name)
    };
    match job.family {
        Family::Tcp => {
            let listener = TcpListener::bind("127.0.0.1:0")?;
            sys::set_no_delay(listener.as_raw_fd())?;
            let port = listener.local_addr()?.port();
            Ok((listener.into(), Address::Tcp(port)))
        }
        Family::Unix => {
            let path = path();
            Ok((UnixListener::bind(&path)?.into(), Address::Unix(path)))
        }
        Family::Udp => {
            let socket = UdpSocket::bind("127.0.0.1:0")?;
            let port = socket.local_addr()?.port();
            Ok((socket.into(), Address::Udp(port)))
        }
        Family::Packets => {
            let path = path();
            let listener = sys::listen_for_packets(&path)?;
            sys::set_nonblocking(listener.as_raw_fd())?;
            Ok((listener, Address::Packets(path)))
        }
        Family::Pipe => {
            let (reading, writing) = io::pipe()?;
            let (theirs, ours) = match job.task {
                Task::Source => (OwnedFd::from(writing), OwnedFd::from(reading)),
                _ => (reading.into(), writing.into()),
            };
            Ok((theirs, Address::Pipe(RefCell::new(Some(ours)))))
        }
    }
}
