//! The programs of the README and of the guide, as whoever copies them runs them:
//! twice in a row, each ended with SIGTERM.

#[path = "support/mod.rs"]
mod support;

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use rustix::process::{Pid, Signal, kill_process};

use crate::support::DescriptorLedger;

/// How long a step may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The blocks of code of a page, each behind what its fence says.
fn blocks(page: &Path) -> Vec<(String, String)> {
    let text = fs::read_to_string(root().join(page)).unwrap();
    // Every second piece is between two fences.
    let inside = text.split("\n```").skip(1).step_by(2);
    inside
        .map(|block| block.split_once('\n').expect("a block"))
        .map(|(fence, code)| (fence.to_owned(), code.to_owned()))
        .collect()
}

/// The only block of code that contains `mark`, with what the page hides.
fn program(page: &str, mark: &str) -> String {
    let blocks = blocks(Path::new(page));
    let mut found = blocks.iter().filter(|(_, code)| code.contains(mark));
    let (_, code) = found.next().expect("it has it");
    assert!(found.next().is_none(), "several contain {mark}");
    let shown = |line: &str| {
        line.trim_start()
            .strip_prefix("# ")
            .unwrap_or(line)
            .trim_end_matches('#')
            .to_owned()
    };
    let code: Vec<String> = code.lines().map(shown).collect();
    let code = code.join("\n");
    match code.contains("fn main()") {
        true => code,
        // As rustdoc does.
        false => format!("fn main() -> Result<(), Box<dyn std::error::Error>> {{\n{code}\n}}"),
    }
}

/// Compiles a program against the library that this test was built with.
fn compile(code: &str, directory: &Path) -> PathBuf {
    match try_to_compile(code, directory) {
        Ok(program) => program,
        Err(errors) => panic!("{}", errors.last().expect("the library is built")),
    }
}

/// What the compiler said otherwise, by each library that there is.
fn try_to_compile(code: &str, directory: &Path) -> Result<PathBuf, Vec<String>> {
    let (source, program) = (directory.join("program.rs"), directory.join("program"));
    fs::write(&source, code).unwrap();
    let executable = std::env::current_exe().unwrap();
    let deps = executable.parent().unwrap();
    let mut libraries: Vec<(SystemTime, PathBuf)> = fs::read_dir(deps)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            name.starts_with("libbowline-") && name.ends_with(".rlib")
        })
        .map(|path| (fs::metadata(&path).unwrap().modified().unwrap(), path))
        .collect();
    libraries.sort();
    let mut errors = Vec::new();
    // Others are of other features; the one of this test may not be the last.
    for (_, library) in libraries.iter().rev() {
        let output = Command::new("rustc")
            .args(["--edition=2024", "--crate-name=program", "-o"])
            .args([&program, &source])
            .arg("--extern")
            .arg(format!("bowline={}", library.display()))
            .arg("-L")
            .arg(format!("dependency={}", deps.display()))
            .args(["--cfg", "feature=\"signals\""])
            .output()
            .expect("rustc");
        if output.status.success() {
            return Ok(program);
        }
        errors.push(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    Err(errors)
}

fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(began.elapsed() < PATIENCE, "{what}");
        thread::park_timeout(Duration::from_millis(5));
    }
}

/// A client of either kind.
trait Client: Read + Write {}
impl Client for UnixStream {}
impl Client for TcpStream {}

/// The children of a process, as the kernel shows them.
fn children(pid: u32) -> Vec<u32> {
    let listed = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let listed = listed.unwrap_or_default();
    let numbers = listed.split_whitespace();
    numbers.map(|pid| pid.parse().unwrap()).collect()
}

/// Where a process listens for TCP.
fn port(pid: u32) -> Option<u16> {
    let sockets: Vec<String> = fs::read_dir(format!("/proc/{pid}/fd"))
        .ok()?
        .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
        .map(|link| link.to_string_lossy().into_owned())
        .collect();
    let table = fs::read_to_string(format!("/proc/{pid}/net/tcp")).ok()?;
    table.lines().find_map(|line| {
        let mut fields = line.split_whitespace().skip(1);
        let (local, state) = (fields.next()?, fields.nth(1)?);
        let inode = fields.nth(5)?;
        let is_its = state == "0A" && sockets.contains(&format!("socket:[{inode}]"));
        let (_, port) = local.split_once(':')?;
        is_its.then(|| u16::from_str_radix(port, 16).ok())?
    })
}

/// Whether a process that is not our child is there and has not ended.
fn runs(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The state is behind the name.
    let state = stat.rsplit_once(") ").map(|(_, rest)| rest.chars().next());
    !matches!(state, None | Some(None | Some('Z' | 'X')))
}

/// Runs a server, has an echo of it, ends it while the client is there.
fn run(program: &Path, connect: impl Fn(&Child) -> Option<Box<dyn Client>>) {
    let mut child: Child = Command::new(program).spawn().unwrap();
    let mut client = until("it does not listen", || {
        assert!(child.try_wait().unwrap().is_none(), "it has ended");
        connect(&child)
    });
    let mut answer = [0; 5];
    client.write_all(b"hello").unwrap();
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"hello");
    let workers = children(child.id());
    client.write_all(b"again").unwrap();
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"again", "what had arrived is answered");
    let status = until("it does not end", || child.try_wait().unwrap());
    assert!(status.success(), "{status}");
    for worker in workers {
        until("it leaves a worker behind", || {
            (!runs(worker)).then_some(())
        });
    }
}

/// Compiles a program of a page and has it tried twice in a row.
fn twice(
    page: &str,
    mark: &str,
    change: impl FnOnce(String, &str) -> String,
    once: impl Fn(&Path, &Path),
) {
    let ledger = DescriptorLedger::open();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().to_str().unwrap();
    let code = change(program(page, mark), path);
    let program = compile(&code, directory.path());
    for _ in 0..2 {
        once(&program, directory.path());
    }
    drop(directory);
    ledger.assert_balanced();
}

fn over_unix(program: &Path, socket: &Path) {
    run(program, |_| {
        Some(Box::new(UnixStream::connect(socket).ok()?))
    });
    assert!(!socket.exists(), "it has left its socket");
}

fn over_tcp(program: &Path) {
    run(program, |child| {
        let address = ("127.0.0.1", port(child.id())?);
        Some(Box::new(TcpStream::connect(address).ok()?))
    });
}

/// Puts each of `to` for what stands before it.
fn replaced(code: String, changes: &[(&str, &str)]) -> String {
    let change = |code: String, (from, to): &(&str, &str)| {
        assert!(code.contains(from), "{from}");
        code.replace(from, to)
    };
    changes.iter().fold(code, change)
}

#[test]
fn smallest_program_of_the_readme_runs_twice() {
    let change = |code, path: &str| {
        let socket = format!("{path}/echo.sock");
        replaced(code, &[("7007", "0"), ("/tmp/echo.sock", &socket)])
    };
    twice("README.md", "/tmp/echo.sock", change, |program, at| {
        over_unix(program, &at.join("echo.sock"));
        // The same program, at its other door.
        over_tcp(program);
    });
}

#[test]
fn program_of_the_readme_that_passes_a_file_runs_twice() {
    let same = |code, _: &str| code;
    twice("README.md", "struct Sender;", same, |program, _| {
        let output = Command::new(program).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let said = String::from_utf8_lossy(&output.stdout);
        assert_eq!(said.trim_end(), "your file: program");
    });
}

#[test]
fn program_of_the_guide_with_workers_runs_twice() {
    let change = |code, _: &str| replaced(code, &[("8080", "0")]);
    twice("src/guide/pools.md", "fn main()", change, |program, _| {
        over_tcp(program);
    });
}

#[test]
fn program_of_the_guide_that_can_be_restarted_runs_twice() {
    let change = |code, path: &str| {
        let changes = [
            ("[0, 0, 0, 0], 7)", "[127, 0, 0, 1], 0)"),
            ("/run/echo", path),
        ];
        replaced(code, &changes)
    };
    let page = "src/guide/restarts.md";
    twice(page, "/run/echo/socket", change, |program, at| {
        over_unix(program, &at.join("socket"));
    });
}

/// Says why, and ends with a failure, where another program has its port.
#[test]
fn programs_that_cannot_listen_say_why_and_end_with_a_failure() {
    let ledger = DescriptorLedger::open();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let here = format!("[127, 0, 0, 1], {port})");
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().to_str().unwrap();
    let programs = [
        (
            "README.md",
            "/tmp/echo.sock",
            vec![("7007", &*port), ("/tmp", path)],
        ),
        ("src/guide/pools.md", "fn main()", vec![("8080", &*port)]),
        (
            "src/guide/restarts.md",
            "/run/echo/socket",
            vec![("[0, 0, 0, 0], 7)", &*here), ("/run/echo", path)],
        ),
    ];
    for (page, mark, changes) in programs {
        let code = replaced(program(page, mark), &changes);
        let program = compile(&code, directory.path());
        let output = Command::new(program).output().unwrap();
        assert!(!output.status.success(), "{page}: {output:?}");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("ddress already in use"), "{page}: {said}");
    }
    drop((taken, directory));
    ledger.assert_balanced();
}

/// Programs that rustdoc does not run, and those that are whole, are run here: whoever
/// adds one finds no test of it, and writes it.
#[test]
fn every_whole_program_has_its_test() {
    // Not while another test counts descriptors.
    let _ledger = DescriptorLedger::open();
    let guide = fs::read_dir(root().join("src/guide")).unwrap();
    let mut pages: Vec<PathBuf> = guide.map(|entry| entry.unwrap().path()).collect();
    pages.push("README.md".into());
    let mut found = Vec::new();
    for page in &pages {
        let name = page.file_name().unwrap().to_string_lossy().into_owned();
        for (fence, code) in blocks(page) {
            if fence.contains("no_run") || code.contains("fn main()") {
                let mark = code.lines().find(|line| line.contains("struct "));
                found.push(format!("{name}: {}", mark.unwrap_or("settings only")));
            }
        }
    }
    found.sort();
    let tested = [
        "README.md: struct Echo;",
        "README.md: struct Sender;",
        "pools.md: struct Echo {",
        "restarts.md: settings only",
        "restarts.md: struct Echo;",
    ];
    assert_eq!(found, tested);
}

/// What most have written wrongly at first is answered in their words, not with a list
/// of types that happen to fit.
#[test]
fn errors_of_the_compiler_say_what_to_write() {
    let ledger = DescriptorLedger::open();
    let scratch = tempfile::tempdir().unwrap();
    let rows = [
        // A receiver of frames, as it is.
        (
            "|_: &Address| Lines",
            "`Lines` is not a protocol over",
            "`Framed::new(framer, receiver)`",
        ),
        (
            "Lines",
            "`Lines` does not build protocols over",
            "`|_: &Address| Echo`",
        ),
    ];
    for (factory, message, note) in rows {
        let code = format!(
            "use bowline::{{Address, Reactor, Transports}};
             struct Lines;
             fn main() {{
                 let address = ([127, 0, 0, 1], 0).into();
                 let _: Option<Address> = None;
                 let _ = Reactor::new().unwrap().listen_tcp(address, {factory});
             }}"
        );
        let errors = try_to_compile(&code, scratch.path()).expect_err("no protocol");
        let says = |text: &str| errors.iter().any(|error| error.contains(text));
        assert!(says(message) && says(note), "{}", errors.join("\n"));
    }
    drop(scratch);
    ledger.assert_balanced();
}
