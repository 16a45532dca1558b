//! `chat_nats`, with brokers that are killed and held, and members that vanish.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process};

use crate::support::peers::has_program;
use crate::{DEADLINE, Example, wait_until};

/// The broker's program, unless it is missing.
fn nats_server() -> Option<&'static str> {
    let found = ["/usr/sbin/nats-server", "/usr/bin/nats-server"];
    let found = found.into_iter().find(|path| Path::new(path).exists());
    if found.is_none() {
        let required = ["CI", "BOWLINE_INTEROP"].map(|name| std::env::var(name).ok());
        let text = "NOT RUN: nats-server is missing (Debian: apt-get install nats-server)\n";
        // Past the harness, which shows what passes to nobody.
        let _ = std::io::stderr().write_all(text.as_bytes());
        let is_required = required
            .iter()
            .flatten()
            .any(|it| it == "true" || it == "require");
        assert!(!is_required, "{text}");
    }
    found
}

/// A broker, which can be killed and started again where it was.
struct Broker<'a> {
    program: &'a str,
    port: String,
    folder: &'a Path,
    process: Child,
}

impl<'a> Broker<'a> {
    fn start(program: &'a str, folder: &'a Path) -> Self {
        let free = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let port = free.local_addr().expect("bound").port().to_string();
        drop(free);
        let process = run(program, &port, folder);
        Self {
            program,
            port,
            folder,
            process,
        }
    }

    fn kill(&mut self) {
        self.process.kill().expect("it runs");
        self.process.wait().expect("ours");
    }

    fn start_again(&mut self) {
        self.process = run(self.program, &self.port, self.folder);
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.process), signal).expect("it runs");
    }
}

impl Drop for Broker<'_> {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn run(program: &str, port: &str, folder: &Path) -> Child {
    Command::new(program)
        .args(["-js", "-a", "127.0.0.1", "-p", port, "-sd"])
        .arg(folder)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("it starts")
}

/// Starts a server; each time that it has no broker any more is to be received.
fn serve(arguments: &[&str]) -> (Example, Receiver<()>) {
    let (server, log) = Example::start_logging("chat_nats", arguments, "warn");
    let (sender, lost) = mpsc::channel();
    // It ends with the log, which ends with the server.
    thread::spawn(move || {
        let lines = BufReader::new(log).lines().map_while(Result::ok);
        for _ in lines.filter(|line| line.contains("the broker is away")) {
            let _ = sender.send(());
        }
    });
    (server, lost)
}

struct Member {
    stream: BufReader<TcpStream>,
    /// What it has heard, by number.
    heard: BTreeMap<u64, String>,
    /// The numbers of its own lines that are stored, in order.
    stored: Vec<u64>,
}

impl Member {
    fn come(server: &Example, name: &str) -> Self {
        Self::over(server.connect(), name)
    }

    fn over(stream: TcpStream, name: &str) -> Self {
        let mut member = Self {
            stream: BufReader::new(stream),
            heard: BTreeMap::new(),
            stored: Vec::new(),
        };
        member.say(&format!("{name} 0"));
        member
    }

    /// Comes back with what it had, at this server.
    fn come_back(&mut self, server: &Example, name: &str) {
        self.come_back_over(server.connect(), name);
    }

    fn come_back_over(&mut self, stream: TcpStream, name: &str) {
        self.stream = BufReader::new(stream);
        let last = self.heard.last_key_value().map_or(0, |(number, _)| *number);
        self.say(&format!("{name} {last}"));
    }

    fn say(&mut self, line: &str) {
        let line = format!("{line}\n");
        self.stream
            .get_mut()
            .write_all(line.as_bytes())
            .expect("written");
    }

    /// Takes the next line.
    #[track_caller]
    fn hear(&mut self, what: &str) {
        let mut line = String::new();
        let length = self.stream.read_line(&mut line).expect(what);
        assert!(length > 0, "the server has closed");
        self.note(line.trim_end());
    }

    /// Says a line, and waits until it is stored; whether it was, before the connection
    /// has ended.
    fn is_stored(&mut self, line: &str) -> bool {
        let before = self.stored.len();
        if writeln!(self.stream.get_mut(), "{line}").is_err() {
            return false;
        }
        while self.stored.len() == before {
            let mut heard = String::new();
            match self.stream.read_line(&mut heard) {
                Ok(1..) if heard.ends_with('\n') => self.note(heard.trim_end()),
                _ => return false,
            }
        }
        true
    }

    fn note(&mut self, line: &str) {
        if let Some(number) = line.strip_prefix("+ ") {
            self.stored.push(number.parse().expect("a number"));
        } else if let Some((number, text)) = line.split_once(' ')
            && let Ok(number) = number.parse::<u64>()
        {
            let last = self.heard.last_key_value().map(|(number, _)| *number);
            assert!(
                last.is_none_or(|last| last < number),
                "{number} after {last:?}"
            );
            self.heard.insert(number, text.to_owned());
        }
    }

    #[track_caller]
    fn hear_until(&mut self, what: &str, is_so: impl Fn(&Self) -> bool) {
        let began = Instant::now();
        while !is_so(self) {
            assert!(began.elapsed() < DEADLINE, "{what}");
            self.hear(what);
        }
    }
}

#[test]
fn chat_over_nats_loses_no_line_that_was_acknowledged() {
    const LINES: usize = 200;
    let Some(program) = nats_server() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let mut broker = Broker::start(program, folder.path());
    let nats = format!("tcp:host=127.0.0.1:port={}", broker.port);
    let arguments = ["--listen", "tcp:host=127.0.0.1:port=0", "--nats", &nats];
    let (here, lost_here) = serve(&arguments);
    let (there, lost_there) = serve(&arguments);
    let both_lose_it = |what: &str| {
        lost_here.recv_timeout(DEADLINE).expect(what);
        lost_there.recv_timeout(DEADLINE).expect(what);
    };
    // What is told from here on is of the stop that follows.
    let both_have_it = |ann: &Member, bob: &mut Member| {
        let last = *ann.stored.last().expect("some");
        bob.hear_until("bob hears", |bob| bob.heard.contains_key(&last));
        for lost in [&lost_here, &lost_there] {
            lost.try_iter().for_each(drop);
        }
    };
    let mut ann = Member::come(&here, "ann");
    let mut bob = Member::come(&there, "bob");
    for number in 0..LINES {
        match number {
            // Its lines wait at the server, and are said again.
            50 => {
                both_have_it(&ann, &mut bob);
                broker.kill();
                both_lose_it("the broker has ended");
            }
            60 => broker.start_again(),
            // Open connections, and nobody at the other end.
            100 => {
                both_have_it(&ann, &mut bob);
                broker.signal(Signal::STOP);
            }
            110 => {
                both_lose_it("the broker says nothing");
                broker.signal(Signal::CONT);
            }
            // In the middle of what it had not read.
            150 => {
                bob.hear_until("bob hears", |bob| bob.heard.len() >= 20);
                bob.come_back(&here, "bob");
            }
            _ => {}
        }
        ann.say(&format!("line {number}"));
        // As many as may wait without being stored.
        let owed = number + 1;
        if !(50..60).contains(&number) && !(100..110).contains(&number) {
            ann.hear_until("lines are stored", |ann| ann.stored.len() + 12 > owed);
        }
    }
    ann.hear_until("all is stored", |ann| ann.stored.len() == LINES);
    // The stored lines, as their author and as another member of another server has them.
    let last = *ann.stored.last().expect("some");
    for member in [&mut ann, &mut bob] {
        member.hear_until("all is heard", |member| member.heard.contains_key(&last));
        for (line, number) in member.stored.clone().into_iter().enumerate() {
            let expected = format!("ann: line {line}");
            assert_eq!(member.heard.get(&number), Some(&expected));
        }
    }
    let heard: Vec<&u64> = ann
        .stored
        .iter()
        .filter(|it| bob.heard.contains_key(it))
        .collect();
    assert_eq!(heard.len(), LINES, "of what was acknowledged");
    assert_eq!(bob.heard.len(), LINES, "nothing came twice");
    // A server that begins later has all of them too.
    let late = Example::start("chat_nats", &arguments);
    let mut eve = Member::come(&late, "eve");
    eve.hear_until("all is kept", |eve| eve.heard.len() == LINES);
    assert_eq!(eve.heard, bob.heard);
    for server in [here, there, late] {
        server.stop();
    }
    let mut rest = Vec::new();
    eve.stream.read_to_end(&mut rest).expect("to the end");
    drop(broker);
    assert!(fs::read_dir(folder.path()).is_ok_and(|mut files| files.next().is_some()));
}

/// HAProxy in front of several machines.
struct Front {
    process: Child,
    port: u16,
}

impl Front {
    fn start(folder: &Path, servers: &[&str]) -> Self {
        let free = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let port = free.local_addr().expect("bound").port();
        drop(free);
        let mut text = format!(
            "defaults\n mode tcp\n timeout connect 2s\n timeout client 1h\n timeout server 1h\n\
             frontend chat\n bind 127.0.0.1:{port}\n default_backend machines\n\
             backend machines\n balance leastconn\n option redispatch\n retries 3\n"
        );
        for (number, server) in servers.iter().enumerate() {
            text += &format!(" server machine{number} {server} check inter 500ms\n");
        }
        let file = folder.join("haproxy.cfg");
        fs::write(&file, text).expect("written");
        let process = Command::new("haproxy")
            .arg("-db")
            .arg("-f")
            .arg(file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("it starts");
        let front = Self { process, port };
        wait_until("HAProxy listens", || front.try_connect().is_some());
        front
    }

    fn try_connect(&self) -> Option<TcpStream> {
        let stream = TcpStream::connect(("127.0.0.1", self.port)).ok()?;
        stream.set_read_timeout(Some(DEADLINE)).expect("a socket");
        Some(stream)
    }

    fn connect(&self) -> TcpStream {
        self.try_connect().expect("it listens")
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Machines behind HAProxy: one is killed, its members come back at the other by the same
/// address, and everybody gets every line that was acknowledged.
#[test]
fn members_behind_haproxy_miss_no_acknowledged_line_when_a_machine_is_gone() {
    const LINES: usize = 40;
    const NAMES: [&str; 4] = ["ann", "bob", "cay", "dan"];
    let Some(program) = nats_server() else { return };
    if !has_program("haproxy", "-v", "haproxy") {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let broker = Broker::start(program, folder.path());
    let nats = format!("tcp:host=127.0.0.1:port={}", broker.port);
    let arguments = ["--listen", "tcp:host=127.0.0.1:port=0", "--nats", &nats];
    let mut gone = Example::start("chat_nats", &arguments);
    let stays = Example::start("chat_nats", &arguments);
    let front = Front::start(folder.path(), &[&gone.address, &stays.address]);
    let mut members = NAMES.map(|name| Member::over(front.connect(), name));
    let mut acknowledged = BTreeMap::new();
    let mut came_back = 0;
    for number in 0..LINES {
        if number == LINES / 2 {
            gone.child.kill().expect("it runs");
            gone.child.wait().expect("ours");
        }
        for (member, name) in members.iter_mut().zip(NAMES) {
            let line = format!("line {number}");
            while !member.is_stored(&line) {
                came_back += 1;
                assert!(came_back < 100, "{name} is not served");
                member.come_back_over(front.connect(), name);
            }
            let stored = *member.stored.last().expect("it was");
            acknowledged.insert(stored, format!("{name}: {line}"));
        }
    }
    assert!(came_back > 0, "nobody was at the machine that is gone");
    let last = *acknowledged.last_key_value().expect("some").0;
    for member in &mut members {
        member.hear_until("all is heard", |member| member.heard.contains_key(&last));
        for (number, line) in &acknowledged {
            assert_eq!(member.heard.get(number), Some(line));
        }
    }
    assert_eq!(acknowledged.len(), LINES * NAMES.len());
    drop(front);
    stays.stop();
}
