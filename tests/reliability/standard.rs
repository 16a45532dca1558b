//! Standard input and output of every sort.

use std::cell::Cell;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::process::{Child, Stdio as StdStdio};
use std::rc::Rc;
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bowline::{
    AfterReadClosed, CloseReason, Context, Protocol, Reactor, Stdio, Transport, Transports,
};
use rustix::fs::{OFlags, fcntl_getfl};
use rustix::termios::tcgetattr;

use crate::children::Peer;
use crate::stopped::{fifo, pattern, terminal};
use crate::support::figures::{Bound, Figures, is_full, scaled};
use crate::support::waiting::await_exit;
use crate::support::{DescriptorLedger, eventually, row, run_until_within};

/// How long one child may take on a busy machine.
const LONG: Duration = Duration::from_secs(60);

/// What standard input or output is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sort {
    File,
    Null,
    Pipe,
    Fifo,
    Terminal,
    Socket,
    Closed,
}

const SORTS: [Sort; 7] = [
    Sort::File,
    Sort::Null,
    Sort::Pipe,
    Sort::Fifo,
    Sort::Terminal,
    Sort::Socket,
    Sort::Closed,
];

/// What the child has of one of its streams, and what we have.
struct Ends {
    theirs: Option<OwnedFd>,
    ours: Option<OwnedFd>,
}

impl Ends {
    /// Of standard input, which brings `content` where it comes from somewhere.
    fn of_input(sort: Sort, content: &[u8]) -> Self {
        let (theirs, ours) = match sort {
            Sort::Closed => return Self::none(),
            Sort::Null => (File::open("/dev/null").unwrap().into(), None),
            Sort::File => {
                let mut file = tempfile::tempfile().unwrap();
                file.write_all(content).unwrap();
                file.rewind().unwrap();
                (file.into(), None)
            }
            Sort::Pipe => io::pipe().map(|(r, w)| (r.into(), Some(w.into()))).unwrap(),
            Sort::Fifo => {
                let (reading, writing) = fifo();
                (reading, Some(writing))
            }
            Sort::Terminal | Sort::Socket => Self::both_ways(sort),
        };
        Self {
            theirs: Some(theirs),
            ours,
        }
    }

    /// Of standard output.
    fn of_output(sort: Sort) -> Self {
        let (theirs, ours) = match sort {
            Sort::Closed => return Self::none(),
            Sort::Null => {
                let mut options = OpenOptions::new();
                (options.write(true).open("/dev/null").unwrap().into(), None)
            }
            Sort::File => {
                let file = tempfile::tempfile().unwrap();
                (file.try_clone().unwrap().into(), Some(file.into()))
            }
            Sort::Pipe => io::pipe().map(|(r, w)| (w.into(), Some(r.into()))).unwrap(),
            Sort::Fifo => {
                let (reading, writing) = fifo();
                (writing, Some(reading))
            }
            Sort::Terminal | Sort::Socket => Self::both_ways(sort),
        };
        Self {
            theirs: Some(theirs),
            ours,
        }
    }

    fn both_ways(sort: Sort) -> (OwnedFd, Option<OwnedFd>) {
        if sort == Sort::Terminal {
            let (master, terminal) = terminal();
            return (terminal, Some(master));
        }
        let (theirs, ours) = StdUnixStream::pair().unwrap();
        (theirs.into(), Some(ours.into()))
    }

    fn none() -> Self {
        Self {
            theirs: None,
            ours: None,
        }
    }
}

/// What others who hold an open file could notice of it: its flags, and the settings of
/// a terminal, which cannot be asked any more when it was hung up.
#[derive(Debug)]
struct AsFound(OFlags, Option<String>);

impl AsFound {
    fn of(fd: BorrowedFd<'_>) -> Self {
        let settings = tcgetattr(fd).ok().map(|it| format!("{it:?}"));
        Self(fcntl_getfl(fd).unwrap(), settings)
    }

    fn is_still(&self, fd: BorrowedFd<'_>) -> bool {
        let now = Self::of(fd);
        self.0 == now.0 && (now.1.is_none() || self.1 == now.1)
    }
}

/// A child that echoes its standard input to its standard output.
struct Echoing {
    child: Child,
    /// What the child was given, and how that was.
    given: Vec<(OwnedFd, AsFound)>,
    /// Feeds its input; answers with our end of that.
    feeding: Option<JoinHandle<OwnedFd>>,
    /// What it says on its standard error.
    said: Receiver<String>,
    written: Arc<Mutex<Vec<u8>>>,
    reading: Option<JoinHandle<()>>,
}

impl Echoing {
    /// One that is to receive `content`, wherever that comes from.
    fn start((input, output): (Ends, Ends), content: &[u8], is_read: bool) -> Self {
        // Which std cannot.
        let closes = match (&input.theirs, &output.theirs) {
            (Some(_), Some(_)) => "",
            (None, Some(_)) => "<&-",
            (Some(_), None) => ">&-",
            (None, None) => "<&- >&-",
        };
        let script = format!("exec \"$@\" {closes}");
        let expected = content.len().to_string();
        let mut command = Peer::command(&["sh", "-c", &script, "sh"], "stdio", &[&expected]);
        let given = [&input.theirs, &output.theirs].into_iter().flatten();
        let given = given.map(|fd| fd.try_clone().unwrap());
        let given = given.map(|fd| (fd.try_clone().unwrap(), AsFound::of(fd.as_fd())));
        let given = given.collect();
        let stdio = |fd: Option<OwnedFd>| fd.map_or_else(StdStdio::null, StdStdio::from);
        command
            .stdin(stdio(input.theirs))
            .stdout(stdio(output.theirs));
        let mut child = command.stderr(StdStdio::piped()).spawn().unwrap();
        let (said, errors) = (mpsc::channel(), child.stderr.take().unwrap());
        std::thread::spawn(move || {
            let lines = BufReader::new(errors).lines();
            lines
                .map_while(Result::ok)
                .all(|line| said.0.send(line).is_ok())
        });
        let content = content.to_vec();
        let written: Arc<Mutex<Vec<u8>>> = Arc::default();
        let kept = Arc::clone(&written);
        Self {
            child,
            given,
            feeding: input
                .ours
                .map(|fd| std::thread::spawn(move || feed(fd, &content))),
            said: said.1,
            written,
            reading: output
                .ours
                .filter(|_| is_read)
                .map(|fd| std::thread::spawn(move || keep(fd, &kept))),
        }
    }

    /// The number that it says next behind this word.
    fn hear(&mut self, word: &str) -> usize {
        loop {
            let line = self.said.recv_timeout(LONG).unwrap_or_else(|error| {
                let _ = self.child.kill();
                panic!("it does not say {word}: {error}");
            });
            if let Some(number) = line.strip_prefix(word) {
                return number.trim().parse().expect("a number");
            }
        }
    }

    /// Waits until all of `content` has come out.
    fn wait_for_output(&self, content: &[u8]) {
        eventually(LONG, || match has(&self.written.lock().unwrap(), content) {
            true => Ok(()),
            false => Err("it is not given back"),
        });
    }

    /// What it has had of a processor, in hundredths of a second.
    fn ticks(&self) -> u64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        let (_, fields) = stat.rsplit_once(')').expect("a name");
        let ticks = fields.split_whitespace().skip(11).take(2);
        ticks
            .map(|field| field.parse::<u64>().expect("a number"))
            .sum()
    }

    /// How many open files are not as they were given.
    fn changed(&self) -> usize {
        let is_changed = |(fd, found): &&(OwnedFd, AsFound)| !found.is_still(fd.as_fd());
        self.given.iter().filter(is_changed).count()
    }

    /// Waits for its end; whether it was one in order.
    fn end(mut self) -> bool {
        let status = await_exit(&mut self.child, LONG);
        self.given.clear();
        if let Some(reading) = self.reading {
            reading.join().unwrap();
        }
        status.success()
    }
}

/// Gives all of it to the child, and our end back.
fn feed(fd: OwnedFd, content: &[u8]) -> OwnedFd {
    let mut file = File::from(fd);
    file.write_all(content).expect("it reads");
    file.into()
}

/// Keeps what the child writes, to its end.
fn keep(fd: OwnedFd, written: &Mutex<Vec<u8>>) {
    let mut file = File::from(fd);
    let mut piece = vec![0; 65_536];
    // A terminal whose other side has gone says so by an error.
    while let Ok(count @ 1..) = file.read(&mut piece) {
        written.lock().unwrap().extend_from_slice(&piece[..count]);
    }
}

/// Whether `content` stands in `all`, which begins with some lines of others.
fn has(all: &[u8], content: &[u8]) -> bool {
    let beginning = &content[..content.len().min(32)];
    let Some(behind) = all.len().checked_sub(content.len()) else {
        return false;
    };
    content.is_empty()
        || (0..=behind).any(|at| all[at..].starts_with(beginning) && all[at..].starts_with(content))
}

/// What was seen of one child.
#[derive(Default)]
struct Seen {
    children: usize,
    bytes: usize,
    wrong: usize,
    changed: usize,
    unclean: usize,
    /// Of those whose input does not end yet, which have nothing to do.
    watched: usize,
    ticks: u64,
}

impl Seen {
    /// Has a child echo from one sort to the other.
    fn through(&mut self, input: Sort, output: Sort, length: usize) {
        let _row = row((input, output, length));
        let all = pattern();
        let content: Vec<u8> = all.iter().copied().cycle().take(length).collect();
        // From these comes nothing.
        let content = match input {
            Sort::Null | Sort::Closed => &[],
            _ => content.as_slice(),
        };
        let ends = (Ends::of_input(input, content), Ends::of_output(output));
        let file = ends.1.ours.as_ref().filter(|_| output == Sort::File);
        let file = file.map(|fd| File::from(fd.try_clone().unwrap()));
        let mut child = Echoing::start(ends, content, output != Sort::File);
        let received = child.hear("received ");
        if child.reading.is_some() {
            child.wait_for_output(content);
        }
        self.changed += child.changed();
        if let Some(feeding) = child.feeding.take() {
            let ours = feeding.join().unwrap();
            let is_watched = match is_full() {
                true => length <= 1,
                false => (input, output) == (Sort::Pipe, Sort::Pipe),
            };
            if is_watched {
                self.watched += 1;
                self.ticks = self.ticks.max(idle(&child));
            }
            drop(ours);
        }
        child.hear("lost ");
        self.changed += child.changed();
        self.unclean += usize::from(!child.end());
        let mut is_right = received == content.len();
        if let Some(mut file) = file {
            let mut all = Vec::new();
            file.rewind().unwrap();
            file.read_to_end(&mut all).unwrap();
            is_right &= has(&all, content);
        }
        self.wrong += usize::from(!is_right);
        self.children += 1;
        self.bytes += content.len();
    }
}

/// What a child that has nothing to do has of a processor meanwhile.
fn idle(child: &Echoing) -> u64 {
    let (before, began) = (child.ticks(), Instant::now());
    while began.elapsed() < Duration::from_millis(500) {
        std::thread::park_timeout(Duration::from_millis(50));
    }
    child.ticks() - before
}

/// Reliability T-45: a process echoes its standard input to its standard output, each a
/// file, `/dev/null`, a pipe, a FIFO, a terminal, a socket, or closed. Every byte is there,
/// the end is clean and told once, and what is open elsewhere stays as it was.
#[test]
fn standard_streams_of_every_sort_are_served() {
    let _ledger = DescriptorLedger::open();
    let mut seen = Seen::default();
    for input in SORTS {
        for output in SORTS {
            if is_full() {
                for length in [0, 1, 65_536, 1_000_003] {
                    seen.through(input, output, length);
                }
            } else if input == Sort::Pipe || output == Sort::Pipe {
                seen.through(input, output, 100_003);
            }
        }
    }
    Figures::of("T-45")
        .must("children", seen.children, Bound::Exactly, scaled(13, 196))
        .must(
            "bytes through them",
            seen.bytes,
            Bound::AtLeast,
            scaled(900_000, 30_000_000),
        )
        .must(
            "with wrong bytes, or not all",
            seen.wrong,
            Bound::Exactly,
            0,
        )
        .must("without a clean end", seen.unclean, Bound::Exactly, 0)
        .must(
            "open files that were not left as found",
            seen.changed,
            Bound::Exactly,
            0,
        )
        .must(
            "watched while they wait",
            seen.watched,
            Bound::AtLeast,
            scaled(1, 50),
        )
        .measured(
            "processor of one that waits",
            seen.ticks as f64 * 2.0,
            "%",
            Bound::Below,
            5.0,
        );
}

/// Echoes, and says on standard error what came of it.
struct Echo {
    expected: usize,
    received: usize,
    ends: usize,
    is_over: Rc<Cell<bool>>,
}

#[allow(clippy::print_stderr, reason = "it is how the parent hears of it")]
impl<T: Transport> Protocol<T> for Echo {
    fn connection_made(&mut self, _: &mut Context<'_, T>) {
        if self.expected == 0 {
            eprintln!("received 0");
        }
    }

    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        cx.transport.write(data);
        self.received += data.len();
        if self.received >= self.expected {
            eprintln!("received {}", self.received);
        }
    }

    fn read_connection_lost(&mut self, _: &mut Context<'_, T>) -> AfterReadClosed {
        self.ends += 1;
        AfterReadClosed::LoseConnection
    }

    fn connection_lost(&mut self, _: &mut Context<'_, T>, reason: &CloseReason) {
        assert_eq!(
            (self.ends, reason.to_string().as_str()),
            (1, "closed cleanly")
        );
        eprintln!("lost {}", self.received);
        self.is_over.set(true);
    }
}

/// The other process of the test above.
pub(crate) fn echo(expected: usize) {
    let mut reactor = Reactor::new().unwrap();
    let is_over = Rc::default();
    let echo = Echo {
        expected,
        received: 0,
        ends: 0,
        is_over: Rc::clone(&is_over),
    };
    reactor.adopt(Stdio, (), echo).unwrap();
    run_until_within(LONG, &mut reactor, &"the end", |_| is_over.get());
    // The harness would go on to write.
    std::process::exit(0);
}
