//! The examples, with the programs that they are for.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use bowline::Reactor;

use crate::haproxy;
use crate::imsg::tmux;
use crate::programs::{PATIENCE, Program, has};

fn example(name: &str) -> Command {
    let mut path = std::env::current_exe().expect("Linux knows");
    path.pop();
    if path.ends_with("deps") {
        path.pop();
    }
    path.extend([Path::new("examples"), &PathBuf::from(name)]);
    assert!(
        path.exists(),
        "{} is missing: cargo build --examples",
        path.display()
    );
    Command::new(path)
}

#[test]
fn tmux_command_runs_what_tmux_would() {
    if !has("tmux", "tmux") {
        return;
    }
    let directory = tempfile::tempdir().expect("a folder");
    let socket = directory.path().join("socket");
    let mut reactor = Reactor::new().expect("a reactor");
    let mut server = Program::start(&mut tmux(&socket, &["-D"]));
    server.wait_for_listener(&mut reactor, &socket);
    let mut run = |words: &[&str]| {
        let mut command = example("tmux_command");
        command.arg("--socket").arg(&socket).arg("--").args(words);
        Program::start(&mut command).end(&mut reactor)
    };
    let (is_well, said) = run(&["new-session", "-d", "-s", "ours", "sleep 1000"]);
    assert!(is_well, "{said}");
    let (is_well, said) = run(&["list-sessions", "-F", "#{session_name}"]);
    assert!(is_well, "{said}");
    assert_eq!(said, "ours\n");
    let (is_well, said) = run(&["kill-session", "-t", "nobody"]);
    assert!(!is_well, "tmux says so with its exit code");
    assert!(said.contains("can't find session"), "{said}");
    assert!(run(&["kill-session", "-t", "ours"]).0);
}

/// Asks over connections of its own, until told to stop; counts the answers of each.
struct Load {
    is_over: Arc<AtomicBool>,
    counts: Arc<[AtomicUsize; 2]>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Load {
    fn start(port: u16) -> Self {
        let is_over = Arc::new(AtomicBool::new(false));
        let counts = Arc::new([AtomicUsize::new(0), AtomicUsize::new(0)]);
        let thread = |_| {
            let (is_over, counts) = (Arc::clone(&is_over), Arc::clone(&counts));
            thread::spawn(move || {
                while !is_over.load(Ordering::Relaxed) {
                    let answer = ask(port);
                    let by_us = answer.ends_with("served by bowline\n");
                    assert!(by_us || answer.ends_with("served by haproxy"), "{answer:?}");
                    counts[usize::from(by_us)].fetch_add(1, Ordering::Relaxed);
                }
            })
        };
        let threads = (0..8).map(thread).collect();
        Self {
            is_over,
            counts,
            threads,
        }
    }

    /// How many were answered by HAProxy, and by us.
    fn answered(&self) -> [usize; 2] {
        [0, 1].map(|by| self.counts[by].load(Ordering::Relaxed))
    }

    fn end(self) {
        self.is_over.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().expect("each was answered");
        }
    }
}

/// Any refusal, reset or empty answer is a failure.
fn ask(port: u16) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("it listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("it can");
    let request = b"GET / HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n";
    stream.write_all(request).expect("it reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("no reset");
    answer
}

#[test]
fn haproxy_is_taken_over_under_load_and_takes_back() {
    if !has("haproxy", "haproxy") {
        return;
    }
    let directory = tempfile::tempdir().expect("a folder");
    let stats = directory.path().join("stats");
    let port = haproxy::free_port();
    let configuration = haproxy::configuration(
        &format!(
            "stats socket {} mode 600 level admin expose-fd listeners",
            stats.display()
        ),
        &format!("  bind 127.0.0.1:{port}"),
    );
    let mut reactor = Reactor::new().expect("a reactor");
    let mut command = haproxy::haproxy(directory.path(), &configuration);
    let mut before = Program::start(&mut command);
    before.wait_for_listener(&mut reactor, &stats);
    let load = Load::start(port);
    let answered_by = |reactor: &mut Reactor, load: &Load, who: usize, program: &Program| {
        let enough = load.answered()[who] + 100;
        program.wait(reactor, "answers", |_| load.answered()[who] >= enough);
    };
    answered_by(&mut reactor, &load, 0, &before);

    let give = directory.path().join("give");
    let mut takeover = example("haproxy_takeover");
    takeover.arg("--stats").arg(&stats).arg("--give").arg(&give);
    takeover.arg("--stop").arg(before.pid().to_string());
    let mut takeover = Program::start(&mut takeover);
    takeover.wait_for(&mut reactor, &format!("serving 127.0.0.1:{port}"));
    before.end(&mut reactor);
    answered_by(&mut reactor, &load, 1, &takeover);

    let mut command = haproxy::haproxy(directory.path(), &configuration);
    let mut after = Program::start(command.arg("-x").arg(&give));
    takeover.wait_for(&mut reactor, "given");
    answered_by(&mut reactor, &load, 0, &after);
    let (is_well, said) = takeover.end(&mut reactor);
    assert!(is_well, "{said}");
    after.wait_for_listener(&mut reactor, &stats);
    load.end();
}

/// One line of what the program shows at `place`, where it was told to.
fn look(place: &str, request: &str) -> serde_json::Value {
    let mut stream = UnixStream::connect(place).expect("it listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("it can");
    writeln!(stream, "{request}").expect("it reads");
    let mut line = String::new();
    let mut answer = BufReader::new(stream);
    answer.read_line(&mut line).expect("it answers");
    serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"))
}

/// How many connections a program has made that listens at `place` for those who look.
fn connections_made(place: &str, kind: &str) -> u64 {
    let summary = look(place, "{\"get\":\"summary\"}");
    let made = summary["kinds"][kind]["made"].as_u64();
    made.unwrap_or_default()
}

/// The page that a program has said that it shows, and its metrics.
fn metrics_of(said: &str) -> String {
    let url = said
        .lines()
        .find_map(|it| it.strip_prefix("look inside at http://"));
    let url = url.unwrap_or_else(|| panic!("no page: {said}"));
    let (address, path) = url.split_once('/').expect("a URL");
    let get = |path: &str| {
        let mut stream = TcpStream::connect(address).expect("it listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("it can");
        write!(stream, "GET /{path} HTTP/1.1\r\nHost: here\r\n\r\n").expect("it reads");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("text");
        answer
    };
    let page = get(path);
    assert!(page.starts_with("HTTP/1.1 200 OK\r\n"), "{page:.200}");
    assert!(page.trim_end().ends_with("</html>"));
    get(&format!("{path}metrics"))
}

#[test]
fn haproxy_takeover_shows_what_is_inside_on_a_socket_and_on_a_page() {
    if !has("haproxy", "haproxy") {
        return;
    }
    let directory = tempfile::tempdir().expect("a folder");
    let stats = directory.path().join("stats");
    let socket = directory.path().join("inspect");
    let port = haproxy::free_port();
    let configuration = haproxy::configuration(
        &format!(
            "stats socket {} mode 600 level admin expose-fd listeners",
            stats.display()
        ),
        &format!("  bind 127.0.0.1:{port}"),
    );
    let mut reactor = Reactor::new().expect("a reactor");
    let mut command = haproxy::haproxy(directory.path(), &configuration);
    let mut before = Program::start(&mut command);
    before.wait_for_listener(&mut reactor, &stats);
    let listener = format!("factory=\"Framed\",local=\"127.0.0.1:{port}\"");
    let place = socket.to_str().expect("text");
    let mut take = |inspect: &str, asked: &mut dyn FnMut(&Program)| {
        let mut takeover = example("haproxy_takeover");
        takeover
            .arg("--stats")
            .arg(&stats)
            .args(["--inspect", inspect]);
        let takeover = Program::start(&mut takeover);
        takeover.wait_for(&mut reactor, &format!("serving 127.0.0.1:{port}"));
        asked(&takeover);
    };
    // HAProxy goes on to accept, from the same queue.
    let until_served_here = |served: &mut dyn FnMut() -> bool| {
        let asked = (0..1_000).find(|_| {
            ask(port);
            served()
        });
        assert!(asked.is_some(), "HAProxy has served them all");
    };
    take(place, &mut |takeover| {
        let summary = look(place, "{\"get\":\"summary\"}");
        assert_eq!(summary["pid"], takeover.pid(), "{summary}");
        let before = connections_made(place, "TCP");
        until_served_here(&mut || connections_made(place, "TCP") > before);
    });
    take("127.0.0.1:0", &mut |takeover| {
        let accepted = format!("bowline_accepted_total{{{listener}}} ");
        let count = |metrics: &str| {
            let mut lines = metrics.lines();
            let value = lines.find_map(|line| line.strip_prefix(&accepted));
            let value = value.unwrap_or_else(|| panic!("no {accepted} in {metrics}"));
            value.parse::<u64>().expect("a number")
        };
        let before = count(&metrics_of(&takeover.said()));
        until_served_here(&mut || count(&metrics_of(&takeover.said())) > before);
    });
}

/// A primary, which says what its workers do.
const PRIMARY: &str = "
const cluster = require('cluster');
process.execPath = process.argv[2];
if (process.argv[3] === 'share') cluster.schedulingPolicy = cluster.SCHED_NONE;
const [port, count, ...more] = process.argv.slice(4);
cluster.setupPrimary({ exec: 'worker', args: ['--listen', '127.0.0.1:' + port, ...more] });
cluster.on('online', (worker) => console.log('online', worker.process.pid));
cluster.on('listening', (worker, { address, port }) =>
    console.log('serves', worker.process.pid, address, port));
cluster.on('message', (worker, message) => console.log('says', JSON.stringify(message)));
cluster.on('exit', (worker, code, signal) => console.log('exit', worker.process.pid, code, signal));
const workers = Array.from({ length: count }, () => cluster.fork());
process.stdin.on('data', (text) => {
    if (`${text}`.includes('count')) workers.forEach((worker) => worker.send('how many'));
    if (`${text}`.includes('end')) {
        workers.forEach((worker) => worker.disconnect());
        process.stdin.destroy();
    }
});
";

#[test]
fn node_worker_serves_for_a_primary_in_either_way() {
    if !has("node", "nodejs") {
        return;
    }
    let directory = tempfile::tempdir().expect("a folder");
    let script = directory.path().join("primary.js");
    std::fs::write(&script, PRIMARY).expect("written");
    let worker = example("node_worker");
    let worker = worker.get_program().to_owned();
    let mut reactor = Reactor::new().expect("a reactor");
    for way in ["pass", "share"] {
        // Workers who ask for the same port share it.
        let port = haproxy::free_port();
        let mut command = Command::new("node");
        command
            .arg(&script)
            .arg(&worker)
            .args([way, &port.to_string(), "2"]);
        let mut primary = Program::start(&mut command);
        let address = format!("127.0.0.1 {port}");
        primary.wait(&mut reactor, "two that serve", |it| {
            it.said().matches(&address).count() == 2
        });
        let pids: Vec<u32> = pids_that_serve(&primary.said());
        let mut counts = [0; 2];
        let mut before = None;
        for _ in 0..40 {
            let answer = ask(port);
            let by = |pid: &u32| answer.ends_with(&format!("served by {pid}\n"));
            let by = pids.iter().position(by);
            counts[by.unwrap_or_else(|| panic!("{answer:?}: none of {pids:?}"))] += 1;
            before.get_or_insert_with(|| primary.open_descriptors());
        }
        if way == "pass" {
            assert_eq!(counts, [20, 20], "in turn");
            primary.tell("count\n");
            primary.wait(&mut reactor, "two counts", |it| {
                it.said().matches("says {\"served\":20}").count() == 2
            });
        }
        primary.wait_for_descriptors_at_most(&mut reactor, before.expect("of forty"));
        primary.tell("end\n");
        let (is_well, said) = primary.end(&mut reactor);
        assert!(is_well, "{said}");
        for pid in pids {
            assert!(said.contains(&format!("exit {pid} 0 null")), "{said}");
        }
    }
}

#[test]
fn node_worker_shows_what_is_inside_on_a_socket_and_on_a_page() {
    if !has("node", "nodejs") {
        return;
    }
    let directory = tempfile::tempdir().expect("a folder");
    let script = directory.path().join("primary.js");
    std::fs::write(&script, PRIMARY).expect("written");
    let socket = directory.path().join("inspect");
    let place = socket.to_str().expect("text");
    let worker = example("node_worker");
    let worker = worker.get_program();
    let mut reactor = Reactor::new().expect("a reactor");
    for (way, inspect) in [("pass", place), ("share", "127.0.0.1:0")] {
        let port = haproxy::free_port();
        let mut command = Command::new("node");
        command.arg(&script).arg(worker);
        command.args([way, &port.to_string(), "1", "--inspect", inspect]);
        let mut primary = Program::start(&mut command);
        primary.wait_for(&mut reactor, &format!("127.0.0.1 {port}"));
        let pid = pids_that_serve(&primary.said())[0];
        for _ in 0..3 {
            assert!(ask(port).ends_with(&format!("served by {pid}\n")));
        }
        if way == "pass" {
            // The three were passed, over the channel from the primary.
            let summary = look(place, "{\"get\":\"summary\"}");
            assert_eq!(summary["pid"], pid, "{summary}");
            assert_eq!(connections_made(place, "TCP"), 3);
            assert!(
                summary["descriptors"]["received"].as_u64() >= Some(3),
                "{summary}"
            );
        } else {
            let metrics = metrics_of(&primary.said());
            let accepted = format!("local=\"127.0.0.1:{port}\"}} 3\n");
            let mut lines = metrics.split_inclusive('\n');
            let is_it = |line: &str| line.starts_with("bowline_accepted_total{");
            assert!(
                lines.any(|line| is_it(line) && line.ends_with(&accepted)),
                "{metrics}"
            );
        }
        primary.tell("end\n");
        let (is_well, said) = primary.end(&mut reactor);
        assert!(is_well, "{said}");
        assert!(!socket.exists(), "it has left its socket behind");
    }
}

fn pids_that_serve(said: &str) -> Vec<u32> {
    said.lines()
        .filter_map(|line| line.strip_prefix("serves "))
        .map(|line| {
            line.split(' ')
                .next()
                .expect("a word")
                .parse()
                .expect("a number")
        })
        .collect()
}

#[test]
fn wayland_shm_shows_what_a_client_of_libwayland_draws() {
    if !has("weston-simple-shm", "weston") {
        return;
    }
    let directory = tempfile::tempdir().expect("a folder");
    let display = directory.path().join("display");
    let mut reactor = Reactor::new().expect("a reactor");
    let mut compositor = example("wayland_shm");
    compositor
        .arg("--display")
        .arg(&display)
        .args(["--frames", "20"]);
    let mut compositor = Program::start(&mut compositor);
    compositor.wait_for_listener(&mut reactor, &display);
    let client = || {
        let mut command = Command::new("weston-simple-shm");
        command.env("XDG_RUNTIME_DIR", directory.path());
        Program::start(command.env("WAYLAND_DISPLAY", &display))
    };
    // One after the other, and two at once: none leaves descriptors behind.
    let mut before = None;
    for round in 1..=3 {
        let frames = |program: &Program| program.said().matches("frame 250x250").count();
        let client = client();
        compositor.wait(&mut reactor, "frames", |it| frames(it) >= 3 * round);
        before.get_or_insert_with(|| compositor.open_descriptors());
        drop(client);
        let left = |it: &Program| it.said().matches("a client has left").count();
        compositor.wait(&mut reactor, "an end", |it| left(it) > round);
        let without = before.expect("of the first") - 1;
        compositor.wait_for_descriptors_at_most(&mut reactor, without);
    }
    let _clients = [client(), client()];
    let (is_well, said) = compositor.end(&mut reactor);
    assert!(is_well, "{said}");
    let sums: std::collections::BTreeSet<_> =
        said.lines().filter(|it| it.starts_with("frame")).collect();
    assert!(sums.len() > 3, "what is drawn moves: {sums:?}");
}

/// A boot sector: reads the sector behind it, writes that to the next one, and says what is
/// in it, by the serial port.
const BOOT: &[u8] = &[
    0x31, 0xc0, // xor ax, ax
    0x8e, 0xd8, // mov ds, ax
    0x8e, 0xc0, // mov es, ax
    0xbb, 0x00, 0x80, // mov bx, 0x8000
    0xb8, 0x01, 0x02, // mov ax, 0x0201: read one sector
    0xb9, 0x02, 0x00, // mov cx, 2: the second
    0x30, 0xf6, // xor dh, dh
    0xcd, 0x13, // int 0x13
    0xbb, 0x00, 0x80, // mov bx, 0x8000
    0xb8, 0x01, 0x03, // mov ax, 0x0301: write one sector
    0xb9, 0x03, 0x00, // mov cx, 3: the third
    0xcd, 0x13, // int 0x13
    0xbe, 0x00, 0x80, // mov si, 0x8000
    0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xac, // lodsb
    0x84, 0xc0, // test al, al
    0x74, 0x03, // jz to the end
    0xee, // out dx, al
    0xeb, 0xf8, // jmp to lodsb
    0xf4, // hlt
    0xeb, 0xfd, // jmp to hlt
];

#[test]
fn vhost_user_blk_boots_a_guest_of_qemu() {
    if !has("qemu-system-x86_64", "qemu-system-x86") {
        return;
    }
    let directory = tempfile::tempdir().expect("a folder");
    let (image, socket) = (
        directory.path().join("image"),
        directory.path().join("socket"),
    );
    let mut sectors = vec![0; 1 << 20];
    sectors[..BOOT.len()].copy_from_slice(BOOT);
    sectors[510..512].copy_from_slice(&[0x55, 0xaa]);
    let text = b"booted from bowline\n";
    sectors[512..512 + text.len()].copy_from_slice(text);
    std::fs::write(&image, &sectors).expect("written");
    let mut reactor = Reactor::new().expect("a reactor");
    let mut disk = example("vhost_user_blk");
    disk.arg("--socket").arg(&socket).arg("--image").arg(&image);
    let mut disk = Program::start(&mut disk);
    disk.wait_for_listener(&mut reactor, &socket);
    let left = |it: &Program| it.said().matches("the monitor has left").count();
    disk.wait(&mut reactor, "the end of who looked", |it| left(it) == 1);
    let before = disk.open_descriptors();
    for round in 2..4 {
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-machine", "pc,accel=tcg,memory-backend=mem", "-m", "64"])
            .args(["-object", "memory-backend-memfd,id=mem,size=64M,share=on"])
            .arg("-chardev")
            .arg(format!("socket,id=disk,path={}", socket.display()))
            .args([
                "-device",
                "vhost-user-blk-pci,chardev=disk,num-queues=1,bootindex=1",
            ])
            .args(["-nodefaults", "-display", "none", "-serial", "stdio"]);
        let guest = Program::start(&mut command);
        guest.wait_for(&mut reactor, "booted from bowline");
        assert!(
            disk.open_descriptors() > before,
            "it has the guest's memory"
        );
        drop(guest);
        disk.wait(&mut reactor, "an end", |it| left(it) == round);
        disk.wait_for_descriptors(&mut reactor, before);
        let written = std::fs::read(&image).expect("it is there");
        assert_eq!(
            written[1_024..1_024 + text.len()],
            *text,
            "what the guest has written"
        );
        // The next guest has to write it, too.
        std::fs::write(&image, &sectors).expect("written");
    }
}
