//! The servers that are measured: how each is started, restarted and ended, and which
//! processes it has.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use bowline::handoff::pool::Accepting;

use crate::load::{TICK, TICK_EVERY, TICKS};
use crate::sys;
use crate::with_bowline::{self, Options, Style};

/// How long a server may take to come up, or to go.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long its workers may take to have answered each.
const SETTLES_WITHIN: Duration = Duration::from_secs(3);

const NODE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/peers/jobs/node_cluster.js");
const PYTHON_PATH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/peers/jobs");
/// What peers/jobs/setup makes.
const GUNICORN: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../target/jobs-venv/bin/gunicorn"
);

/// The same.
const HYPER: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../target/jobs-hyper/release/bowline-bench-hyper"
);
const HYPER_LOCK: &str = include_str!("../../../peers/jobs/hyper/Cargo.lock");

/// Who serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Peer {
    /// A pool that passes connections, whose connections move in a restart.
    Bowline,
    /// The same without moves: who asks is told, and the rest ends.
    BowlineStays,
    /// A pool whose workers accept by themselves, with moves.
    BowlineAccepting,
    Nginx,
    /// With a queue for each worker.
    NginxReuseport,
    Haproxy,
    Gunicorn,
    Node,
    /// One process with threads, restarted by the crate ecdysis.
    Hyper,
    /// Processes with listeners of their own under a supervisor.
    Naive,
}

impl Peer {
    pub(crate) const ALL: [Self; 10] = [
        Self::Bowline,
        Self::BowlineStays,
        Self::BowlineAccepting,
        Self::Nginx,
        Self::NginxReuseport,
        Self::Haproxy,
        Self::Gunicorn,
        Self::Node,
        Self::Hyper,
        Self::Naive,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Bowline => "bowline",
            Self::BowlineStays => "bowline, no moves",
            Self::BowlineAccepting => "bowline, workers accept",
            Self::Nginx => "nginx",
            Self::NginxReuseport => "nginx reuseport",
            Self::Haproxy => "HAProxy",
            Self::Gunicorn => "gunicorn",
            Self::Node => "Node cluster",
            Self::Hyper => "hyper, ecdysis",
            Self::Naive => "naive reuseport",
        }
    }

    /// As `--peers` takes it.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Bowline => "bowline",
            Self::BowlineStays => "bowline-stays",
            Self::BowlineAccepting => "bowline-accepting",
            Self::Nginx => "nginx",
            Self::NginxReuseport => "nginx-reuseport",
            Self::Haproxy => "haproxy",
            Self::Gunicorn => "gunicorn",
            Self::Node => "node",
            Self::Hyper => "hyper",
            Self::Naive => "naive",
        }
    }

    /// Whether it has workers of which one can die or stop. HAProxy, and hyper as it is
    /// here, is one process with threads.
    pub(crate) fn has_workers(self) -> bool {
        !matches!(self, Self::Haproxy | Self::Hyper)
    }

    /// Whether the process stays that was started, and others come and go.
    fn has_master(self) -> bool {
        !matches!(
            self,
            Self::Bowline | Self::BowlineStays | Self::BowlineAccepting | Self::Hyper
        )
    }

    fn style(self) -> Style {
        Style {
            accepting: match self {
                Self::BowlineAccepting => Accepting::ByWorkers,
                _ => Accepting::ByPool,
            },
            moves: self != Self::BowlineStays,
        }
    }

    /// What is missing for it to run.
    pub(crate) fn missing(self) -> Option<String> {
        let needs = |program: &str, how: &str| match runs(program) {
            true => None,
            false => Some(format!("there is no {program} ({how})")),
        };
        match self {
            Self::Nginx | Self::NginxReuseport => {
                needs("nginx", "Debian: apt-get install nginx-light")
            }
            Self::Haproxy => needs("haproxy", "Debian: apt-get install haproxy"),
            Self::Node => needs("node", "Debian: apt-get install nodejs"),
            Self::Gunicorn => needs(GUNICORN, "benches/peers/jobs/setup installs it"),
            Self::Hyper => needs(HYPER, "benches/peers/jobs/setup builds it"),
            _ => None,
        }
    }
}

fn runs(program: &str) -> bool {
    let mut command = Command::new(program);
    command.arg(
        if program.ends_with("nginx") || program.ends_with("haproxy") {
            "-v"
        } else {
            "--version"
        },
    );
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

/// What each says of its version, for the head of the table.
pub(crate) fn version(peer: Peer) -> Option<String> {
    let (program, argument) = match peer {
        Peer::Nginx => ("nginx", "-v"),
        Peer::Haproxy => ("haproxy", "-v"),
        Peer::Node => ("node", "--version"),
        Peer::Gunicorn => (GUNICORN, "--version"),
        Peer::Hyper => {
            let (hyper, ecdysis) = (locked("hyper")?, locked("ecdysis")?);
            return Some(format!("hyper {hyper} with ecdysis {ecdysis}"));
        }
        _ => return None,
    };
    let output = Command::new(program).arg(argument).output().ok()?;
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8(text).ok()?;
    let line = text.lines().next()?;
    let digits = line.find(|it: char| it.is_ascii_digit())?;
    let version = line[digits..].split([' ', '-', ')']).next()?;
    Some(format!("{} {version}", peer.name()))
}

/// The version of a crate that the server on hyper is built with.
fn locked(name: &str) -> Option<&'static str> {
    let name = format!("name = \"{name}\"\nversion = \"");
    let found = &HYPER_LOCK[HYPER_LOCK.find(&name)? + name.len()..];
    found.split('"').next()
}

/// One process of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    parent: u32,
    group: u32,
    state: char,
}

impl Process {
    fn all() -> Vec<Self> {
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        let named = entries.filter_map(|it| it.file_name().to_str()?.parse().ok());
        named.filter_map(Self::read).collect()
    }

    fn read(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name may have anything in it.
        let mut fields = stat[stat.rfind(')')? + 2..].split(' ');
        Some(Self {
            pid,
            state: fields.next()?.chars().next()?,
            parent: fields.next()?.parse().ok()?,
            group: fields.next()?.parse().ok()?,
        })
    }

    fn is_alive(self) -> bool {
        !matches!(self.state, 'Z' | 'X')
    }
}

/// A running server; dropping it ends all of its processes.
pub(crate) struct Server {
    peer: Peer,
    root: Child,
    directory: PathBuf,
    pub(crate) port: u16,
    ended: BTreeMap<u32, Duration>,
}

impl Server {
    /// Starts it with so many workers, and waits until it answers.
    pub(crate) fn start(peer: Peer, workers: usize) -> io::Result<Self> {
        // Taken again by the server in a moment; nobody else asks for this one so soon.
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let directory = std::env::temp_dir().join(format!("bowline-jobs-{port}"));
        fs::create_dir_all(&directory)?;
        let mut command = command(peer, workers, port, &directory)?;
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .process_group(0);
        let said = fs::File::create(directory.join("stderr"))?;
        let root = command.stderr(said).spawn()?;
        let server = Self {
            peer,
            root,
            directory,
            port,
            ended: BTreeMap::new(),
        };
        let began = Instant::now();
        while ask(port).is_err() {
            if began.elapsed() > PATIENCE {
                let said = fs::read_to_string(server.directory.join("stderr"));
                let said = said.unwrap_or_default();
                return Err(io::Error::other(format!("it does not answer: {said}")));
            }
            thread::sleep(Duration::from_millis(10));
        }
        server.settle(workers);
        Ok(server)
    }

    /// Waits until each worker has answered. Not for ever: there are servers where one does
    /// all while there is little to do.
    pub(crate) fn settle(&self, workers: usize) {
        let began = Instant::now();
        let mut answered = BTreeSet::new();
        while self.peer.has_workers() && began.elapsed() < SETTLES_WITHIN {
            answered.extend(ask(self.port));
            let there = self.workers();
            if there.len() >= workers && there.iter().all(|pid| answered.contains(pid)) {
                return;
            }
            thread::sleep(Duration::from_millis(2));
        }
    }

    fn processes(&self) -> impl Iterator<Item = Process> {
        let group = self.root.id();
        let all = Process::all().into_iter();
        all.filter(move |it| it.group == group && it.is_alive())
    }

    /// The process that is told to restart.
    fn master(&self) -> u32 {
        with_bowline::serving(&self.directory).unwrap_or_else(|| self.root.id())
    }

    /// Those that answer, and can be killed.
    pub(crate) fn workers(&self) -> Vec<u32> {
        let master = self.master();
        let children = self.processes().filter(|it| it.parent == master);
        children.map(|it| it.pid).collect()
    }

    /// Has it replaced, the way its own documentation says.
    pub(crate) fn restart(&self) -> io::Result<()> {
        let signal = match self.peer {
            Peer::Haproxy => sys::USR2,
            _ => sys::HUP,
        };
        sys::signal(self.master().cast_signed(), signal)
    }

    /// Those that a restart ends.
    pub(crate) fn generation(&self) -> Vec<u32> {
        let stays = self.peer.has_master().then(|| self.root.id());
        let all = self.processes().map(|it| it.pid);
        all.filter(|pid| Some(*pid) != stays).collect()
    }

    /// Whether so many are there who were not before, and among them the one to be told
    /// the next time.
    pub(crate) fn has_followed(&self, before: &[u32], workers: usize) -> bool {
        let is_new = |pid: &u32| !before.contains(pid);
        let has_master = self.peer.has_master() || is_new(&self.master());
        let wanted = if self.peer.has_workers() { workers } else { 1 };
        let new = self.generation().into_iter().filter(is_new);
        has_master && new.count() >= wanted
    }

    /// Whether all of these have ended.
    pub(crate) fn are_gone(pids: &[u32]) -> bool {
        let is_there = |pid: &u32| Process::read(*pid).is_some_and(Process::is_alive);
        !pids.iter().any(is_there)
    }

    /// The CPU time of all its processes, of those too that have ended and were seen here.
    pub(crate) fn cpu_time(&mut self) -> Duration {
        for process in self.processes().collect::<Vec<_>>() {
            if let Ok(time) = sys::cpu_time(process.pid) {
                self.ended.insert(process.pid, time);
            }
        }
        self.ended.values().sum()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = sys::signal(-self.root.id().cast_signed(), sys::KILL);
        let _ = self.root.wait();
        // Those that have no parent any more.
        let began = Instant::now();
        while self.processes().next().is_some() && began.elapsed() < PATIENCE {
            let _ = sys::signal(-self.root.id().cast_signed(), sys::KILL);
            thread::sleep(Duration::from_millis(5));
        }
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// Which process answers.
fn ask(port: u16) -> io::Result<u32> {
    let mut socket = TcpStream::connect(("127.0.0.1", port))?;
    socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    socket.write_all(b"GET / HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    socket.read_to_string(&mut answer)?;
    let body = answer.strip_prefix("HTTP/1.1 200");
    let body = body.and_then(|rest| rest.split("\r\n\r\n").nth(1));
    let by = body.and_then(|body| body.trim_end().parse().ok());
    by.ok_or_else(|| io::Error::other(answer))
}

fn command(peer: Peer, workers: usize, port: u16, directory: &Path) -> io::Result<Command> {
    let workers_text = workers.to_string();
    match peer {
        Peer::Bowline | Peer::BowlineStays | Peer::BowlineAccepting => Options {
            port,
            workers,
            style: peer.style(),
            directory: directory.to_owned(),
        }
        .command(),
        Peer::Naive => {
            let mut command = Command::new(std::env::current_exe()?);
            command.args(["naive", &port.to_string(), &workers_text]);
            Ok(command)
        }
        Peer::Hyper => {
            let mut command = Command::new(HYPER);
            let every = TICK_EVERY.as_millis().to_string();
            command.arg(port.to_string()).arg(directory);
            command.args([&TICKS.to_string(), &every, TICK]);
            Ok(command)
        }
        Peer::Nginx => nginx(workers, port, directory, ""),
        Peer::NginxReuseport => nginx(workers, port, directory, " reuseport"),
        Peer::Haproxy => haproxy(workers, port, directory),
        Peer::Node => {
            let mut command = Command::new("node");
            let every = TICK_EVERY.as_millis().to_string();
            command.args([NODE, &port.to_string(), &workers_text]);
            command.args([&TICKS.to_string(), &every, TICK]);
            Ok(command)
        }
        Peer::Gunicorn => {
            let mut command = Command::new(GUNICORN);
            command
                .args(["--workers", &workers_text, "--bind"])
                .arg(format!("127.0.0.1:{port}"))
                .args(["--worker-class", "gthread", "--threads", "64"])
                .args(["--keep-alive", "60", "--backlog", "4096"])
                .args(["--log-level", "critical", "--pythonpath", PYTHON_PATH])
                .args(["--worker-tmp-dir", "/dev/shm", "--no-control-socket"])
                .arg("gunicorn_app:application")
                .env("JOBS_TICKS", TICKS.to_string())
                .env("JOBS_TICK_MS", TICK_EVERY.as_millis().to_string())
                .env("JOBS_TICK", TICK)
                .env("PYTHONDONTWRITEBYTECODE", "1");
            Ok(command)
        }
    }
}

fn nginx(workers: usize, port: u16, directory: &Path, options: &str) -> io::Result<Command> {
    let streams = stream_backend()?;
    let place = directory.display();
    let configuration = format!(
        "daemon off; worker_processes {workers}; user root; pid {place}/pid;
error_log {place}/error.log crit;
worker_rlimit_nofile 65536;
events {{ worker_connections 16384; }}
http {{
  access_log off; keepalive_timeout 60s; keepalive_requests 1000000000;
  client_body_temp_path {place}/body; proxy_temp_path {place}/proxy;
  fastcgi_temp_path {place}/fastcgi; uwsgi_temp_path {place}/uwsgi;
  scgi_temp_path {place}/scgi;
  default_type text/plain;
  server {{
    listen 127.0.0.1:{port} backlog=4096{options};
    location = / {{ return 200 \"$pid\\n\"; }}
    location = /stream {{
      proxy_pass http://127.0.0.1:{streams}; proxy_http_version 1.1; proxy_buffering off;
    }}
  }}
}}
"
    );
    let file = directory.join("nginx.conf");
    fs::write(&file, configuration)?;
    let mut command = Command::new("nginx");
    command.arg("-p").arg(directory).arg("-c").arg(file);
    command.arg("-e").arg(directory.join("error.log"));
    Ok(command)
}

fn haproxy(workers: usize, port: u16, directory: &Path) -> io::Result<Command> {
    let streams = stream_backend()?;
    let place = directory.display();
    let configuration = format!(
        "global
  nbthread {workers}
  maxconn 8000
  stats socket {place}/admin level admin expose-fd listeners
defaults
  mode http
  timeout client 60s
  timeout server 60s
  timeout connect 5s
  timeout http-keep-alive 60s
frontend web
  bind 127.0.0.1:{port} backlog 4096
  http-request return status 200 content-type text/plain lf-string \"%pid\\n\" if {{ path / }}
  default_backend streams
backend streams
  server one 127.0.0.1:{streams}
"
    );
    let file = directory.join("haproxy.cfg");
    fs::write(&file, configuration)?;
    let mut command = Command::new("haproxy");
    command.args(["-W", "-f"]).arg(file);
    command.arg("-p").arg(directory.join("pid"));
    Ok(command)
}

/// What proxies pass the request for a stream on to: a thread for each.
fn stream_backend() -> io::Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    thread::spawn(move || {
        for socket in listener.incoming().flatten() {
            // The proxy has gone, when it fails.
            thread::spawn(move || stream(&socket));
        }
    });
    Ok(port)
}

fn stream(mut socket: &TcpStream) -> io::Result<()> {
    socket.set_nodelay(true)?;
    loop {
        let mut lines = BufReader::new(socket);
        let mut line = String::new();
        while line != "\r\n" {
            line.clear();
            if lines.read_line(&mut line)? == 0 {
                return Ok(());
            }
        }
        socket.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")?;
        for _ in 0..TICKS {
            thread::sleep(TICK_EVERY);
            let chunk = format!("{:x}\r\n{TICK}\r\n", TICK.len());
            socket.write_all(chunk.as_bytes())?;
        }
        socket.write_all(b"0\r\n\r\n")?;
    }
}
