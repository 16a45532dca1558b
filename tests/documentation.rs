//! The programs of the README and of the guide, as whoever copies them runs them:
//! twice in a row, each ended with SIGTERM.

#[path = "support/mod.rs"]
mod support;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use rustix::process::{Pid, Signal, kill_process};

use crate::support::DescriptorLedger;

/// How long a step may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// The first block of code that contains `mark`, with what the page hides.
fn program(page: &str, mark: &str) -> String {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(page)).unwrap();
    let mut blocks = text.split("\n```");
    let block = blocks
        .find(|block| block.contains(mark))
        .expect("it has it");
    let (_, code) = block.split_once('\n').expect("a block");
    let shown = |line: &str| {
        line.strip_prefix("# ")
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
            return program;
        }
        assert!(
            library != &libraries[0].1,
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    panic!("the library is not there");
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

/// Runs it, has an echo of it, ends it while the client is there.
fn run(program: &Path, socket: &Path) {
    let mut child: Child = Command::new(program).spawn().unwrap();
    let mut client = until("it does not listen", || {
        assert!(child.try_wait().unwrap().is_none(), "it has ended");
        UnixStream::connect(socket).ok()
    });
    let mut answer = [0; 5];
    client.write_all(b"hello").unwrap();
    client.read_exact(&mut answer).unwrap();
    client.write_all(b"again").unwrap();
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"again", "what had arrived is answered");
    let status = until("it does not end", || child.try_wait().unwrap());
    assert!(status.success(), "{status}");
    assert!(!socket.exists(), "it has left its socket");
}

fn twice(page: &str, mark: &str, change: impl FnOnce(String, &str) -> String, socket: &str) {
    let ledger = DescriptorLedger::open();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().to_str().unwrap();
    let code = change(program(page, mark), path);
    let program = compile(&code, directory.path());
    let socket = directory.path().join(socket);
    for _ in 0..2 {
        run(&program, &socket);
    }
    drop(directory);
    ledger.assert_balanced();
}

#[test]
fn smallest_program_of_the_readme_runs_twice() {
    let change = |code: String, path: &str| {
        assert!(code.contains("7007") && code.contains("/tmp/echo.sock"));
        code.replace("7007", "0")
            .replace("/tmp/echo.sock", &format!("{path}/echo.sock"))
    };
    twice("README.md", "/tmp/echo.sock", change, "echo.sock");
}

#[test]
fn program_of_the_guide_that_can_be_restarted_runs_twice() {
    let change = |code: String, path: &str| {
        assert!(code.contains("[0, 0, 0, 0], 7)") && code.contains("/run/echo"));
        code.replace("[0, 0, 0, 0], 7)", "[127, 0, 0, 1], 0)")
            .replace("/run/echo", path)
    };
    twice(
        "src/guide/restarts.md",
        "/run/echo/socket",
        change,
        "socket",
    );
}
