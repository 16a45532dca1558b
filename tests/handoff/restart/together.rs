//! Programs that start at the same moment, or in the middle of what others do: one of
//! them serves. Each is a process of its own.

use std::fmt;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{self, Child, Command, Stdio};
use std::time::{Duration, Instant};
use std::{fs, thread};

use bowline::handoff::restart::{
    Listeners, Program, Restart, RestartError, RestartSettings, Start,
};
use bowline::{Address, Context, Protocol, Reactor, Transport, Transports, Unix};

use super::client::DEADLINE;
use crate::support::DescriptorLedger;
use crate::support::figures::{Bound, Figures, scaled};

/// Says that a process is a runner, and with which number.
const NUMBER: &str = "BOWLINE_RUNNER";
/// What is before its answers: the harness says things too.
const MARK: &str = "runner: ";
/// What a program in [`How::Waits`] waits for, in the directory of its control socket.
const GO_ON: &str = "go-on";

// The runner: a process that is a program again and again.

/// What it is to do, in one line.
struct Order {
    directory: PathBuf,
    /// Where the program listens.
    address: String,
    /// How long after it was told to go, so that two come to the same step.
    delay: Duration,
    how: How,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    /// As it should.
    Well,
    /// Hangs when it is to listen.
    Hangs,
    /// Waits when it is to listen, until it may go on.
    Waits,
    /// Looks once only.
    LooksOnce,
}

impl How {
    const ALL: [Self; 4] = [Self::Well, Self::Hangs, Self::Waits, Self::LooksOnce];
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let directory = self.directory.display();
        let (address, delay, how) = (&self.address, self.delay.as_nanos(), self.how);
        write!(f, "{directory} {address} {delay} {}", how as usize)
    }
}

impl Order {
    fn parse(line: &str) -> Self {
        let words: Vec<_> = line.split_whitespace().collect();
        let number = |word: &str| word.parse::<u64>().unwrap();
        Self {
            directory: words[0].into(),
            address: words[1].into(),
            delay: Duration::from_nanos(number(words[2])),
            how: How::ALL[number(words[3]) as usize],
        }
    }
}

/// One line to whoever has started us.
fn say(text: &str) {
    let mut out = io::stderr().lock();
    let _ = out.write_all(format!("{MARK}{text}\n").as_bytes());
}

/// The program that it is.
struct Runs {
    number: usize,
    address: String,
    how: How,
    go_on: PathBuf,
}

impl Program for Runs {
    fn listen(&mut self, reactor: &mut Reactor, listeners: &mut Listeners<'_>) -> io::Result<()> {
        match self.how {
            How::Hangs => {
                say("hangs");
                loop {
                    thread::park();
                }
            }
            How::Waits => {
                say("waits");
                while !self.go_on.exists() {
                    thread::yield_now();
                }
            }
            How::Well | How::LooksOnce => {}
        }
        let number = self.number;
        let factory = move |_: &Address| Names(number);
        listeners.listen(reactor, "names", Unix::at(&*self.address), factory)?;
        Ok(())
    }

    fn serving(&mut self, _: &mut Reactor, start: Start) {
        say(match start {
            Start::Cold => "cold",
            _ => "took over",
        });
    }

    fn not_started(&mut self, _: &mut Reactor, error: &RestartError) {
        say(&format!("not started: {error}"));
    }

    fn successor_failed(&mut self, _: &mut Reactor, error: &RestartError) {
        say(&format!("goes on: {error}"));
    }

    fn handed_over(&mut self, _: &mut Reactor, _: Duration) {
        say("handed over");
    }
}

/// Says to each client who it is.
struct Names(usize);

impl<T: Transport> Protocol<T> for Names {
    fn data_received(&mut self, cx: &mut Context<'_, T>, _: &[u8]) {
        cx.transport.write(&[self.0 as u8]);
        cx.transport.lose_connection();
    }
}

/// Hears when to go, and when it is over.
struct Signals {
    number: usize,
    order: Order,
    restart: Option<Restart>,
}

impl<T: Transport> Protocol<T> for Signals {
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        for signal in data {
            match signal {
                b'g' => self.begin(cx.reactor),
                _ => {
                    let looks = self.restart.take().map_or(0, |restart| restart.looks());
                    say(&format!("ended after {looks}"));
                    let _ = cx.reactor.stop_now();
                }
            }
        }
    }
}

impl Signals {
    fn begin(&mut self, reactor: &mut Reactor) {
        let since = Instant::now();
        while since.elapsed() < self.order.delay {
            std::hint::spin_loop();
        }
        let mut settings = RestartSettings::new(&self.order.directory);
        if self.order.how == How::LooksOnce {
            settings.search = Duration::ZERO;
        }
        let runs = Runs {
            number: self.number,
            address: self.order.address.clone(),
            how: self.order.how,
            go_on: self.order.directory.join(GO_ON),
        };
        match Restart::begin(reactor, settings, runs) {
            Ok(restart) => self.restart = Some(restart),
            Err(error) => say(&format!("did not begin: {error}")),
        }
    }
}

/// No test, but what the tests of this file start: a program as often as it is told.
#[test]
fn runner_process() {
    let Ok(number) = std::env::var(NUMBER) else {
        return;
    };
    let number = number.parse().unwrap();
    let stdin = io::stdin().lock();
    let boss = UnixStream::from(
        std::os::fd::AsFd::as_fd(&stdin)
            .try_clone_to_owned()
            .unwrap(),
    );
    loop {
        let mut line = String::new();
        // Nothing follows before the answer, so that nothing is read too early.
        if BufReader::new(&boss).read_line(&mut line).unwrap() == 0 {
            process::exit(0);
        }
        let mut reactor = Reactor::new().unwrap();
        let signals = Signals {
            number,
            order: Order::parse(&line),
            restart: None,
        };
        let socket = OwnedFd::from(boss.try_clone().unwrap());
        reactor.adopt(Unix, socket, signals).unwrap();
        say("ready");
        reactor.run().unwrap();
        drop(reactor);
        boss.set_nonblocking(false).unwrap();
        say("closed");
    }
}

// The tests.

/// A runner, as the tests see it.
struct Runner {
    child: Child,
    boss: UnixStream,
    says: BufReader<UnixStream>,
}

impl Runner {
    fn start(number: usize) -> Self {
        let (boss, theirs) = UnixStream::pair().unwrap();
        let (says, errors) = UnixStream::pair().unwrap();
        says.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args([
                "--exact",
                "--nocapture",
                "restart::together::runner_process",
            ])
            .env(NUMBER, number.to_string())
            .env_remove("NOTIFY_SOCKET")
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::from(OwnedFd::from(errors)));
        Self {
            child: command.spawn().unwrap(),
            boss,
            says: BufReader::new(says),
        }
    }

    /// Tells it what it is to do when it is told to go.
    fn order(&mut self, order: &Order) {
        writeln!(self.boss, "{order}").unwrap();
        assert_eq!(self.hears(), "ready");
    }

    fn go(&mut self) {
        self.boss.write_all(b"g").unwrap();
    }

    /// What it says next.
    #[track_caller]
    fn hears(&mut self) -> String {
        loop {
            let mut line = String::new();
            let count = self.says.read_line(&mut line);
            assert!(count.is_ok_and(|count| count > 0), "it says nothing more");
            if let Some(text) = line.trim_end().strip_prefix(MARK) {
                return text.to_owned();
            }
        }
    }

    /// Ends what it does: what it still has said, and how often it has looked.
    fn end(&mut self) -> (Vec<String>, u32) {
        self.boss.write_all(b"e").unwrap();
        let mut said = Vec::new();
        let mut looks = 0;
        loop {
            let text = self.hears();
            match text.strip_prefix("ended after ") {
                Some(count) => looks = count.parse().unwrap(),
                None if text == "closed" => return (said, looks),
                None => said.push(text),
            }
        }
    }

    /// Begins with this order, and waits for what it says.
    fn begin(&mut self, order: &Order) -> String {
        self.order(order);
        self.go();
        self.hears()
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Where a program listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Path,
    Abstract,
}

/// A directory of its own, and an address.
struct Place {
    directory: tempfile::TempDir,
    kind: Kind,
}

impl Place {
    fn new(kind: Kind) -> Self {
        Self {
            directory: tempfile::tempdir().unwrap(),
            kind,
        }
    }

    fn control(&self) -> PathBuf {
        self.directory.path().join("control")
    }

    fn address(&self) -> String {
        let path = self.directory.path().join("names");
        match self.kind {
            Kind::Path => path.to_str().unwrap().to_owned(),
            Kind::Abstract => format!("@{}", path.display()),
        }
    }

    fn order(&self, how: How) -> Order {
        Order {
            directory: self.control(),
            address: self.address(),
            delay: Duration::ZERO,
            how,
        }
    }

    /// What a program has left that was killed.
    fn leave_stale_files(&self) {
        make_private(&self.control());
        drop(UnixListener::bind(self.control().join("control")).unwrap());
        if self.kind == Kind::Path {
            drop(UnixListener::bind(self.address()).unwrap());
        }
    }

    /// Who answers a client, if anybody does.
    fn who_serves(&self) -> Result<usize, String> {
        ask(&self.address()).map_err(|error| error.to_string())
    }
}

fn make_private(directory: &Path) {
    fs::DirBuilder::new().mode(0o700).create(directory).unwrap();
}

fn ask(address: &str) -> io::Result<usize> {
    let address = match address.strip_prefix('@') {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(address)?,
    };
    let mut client = UnixStream::connect_addr(&address)?;
    client.set_read_timeout(Some(DEADLINE))?;
    client.write_all(b"?")?;
    let mut number = [0];
    client.read_exact(&mut number)?;
    Ok(number[0].into())
}

/// What the others have done when a program starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Before {
    /// One serves.
    Alive,
    /// It is killed in the same moment.
    JustGone,
    /// It was killed, and has left its files.
    StaleFile,
    /// Another is being served, which serves in the end.
    AnotherFirst,
    /// Another is being served, which does not make it.
    Refused,
    /// The same, and nobody waits for it.
    RefusedForGood,
}

/// Has the new one start, and the others do what they do in that moment.
fn begin_amid(before: Before, place: &Place, [old, other, new]: &mut [Runner; 3]) {
    match before {
        Before::Alive | Before::StaleFile => new.go(),
        Before::JustGone => {
            new.go();
            old.kill();
        }
        Before::AnotherFirst => {
            assert_eq!(other.begin(&place.order(How::Waits)), "waits");
            new.go();
            fs::write(place.control().join(GO_ON), "").unwrap();
            assert_eq!(other.hears(), "took over");
        }
        Before::Refused | Before::RefusedForGood => {
            assert_eq!(other.begin(&place.order(How::Hangs)), "hangs");
            new.go();
        }
    }
    if before == Before::Refused {
        // It has been refused by then, as a rule, and looks again.
        thread::yield_now();
        other.kill();
    }
}

/// Has runner 2 start before which runners 0 and 1 have done that. What it says first,
/// how often it has looked, and who serves then.
fn start_after(
    before: Before,
    kind: Kind,
    runners: &mut [Runner; 3],
    delay: Duration,
) -> (String, u32, Result<usize, String>) {
    let place = Place::new(kind);
    if before == Before::StaleFile {
        place.leave_stale_files();
    } else {
        assert_eq!(runners[0].begin(&place.order(How::Well)), "cold");
    }
    let how = match before {
        Before::RefusedForGood => How::LooksOnce,
        _ => How::Well,
    };
    let order = place.order(how);
    runners[2].order(&Order { delay, ..order });
    begin_amid(before, &place, runners);
    let [old, other, new] = runners;
    let said = new.hears();
    if before == Before::RefusedForGood {
        other.kill();
        assert_eq!(old.hears(), "goes on: the other process is gone");
    }
    let serves = place.who_serves();
    let (_, looks) = new.end();
    for (number, runner) in [(0, old), (1, other)] {
        let is_up = matches!(runner.child.try_wait(), Ok(None));
        match (number, before) {
            _ if !is_up => *runner = Runner::start(number),
            (0, Before::StaleFile) => {}
            (0, _) | (1, Before::AnotherFirst) => drop(runner.end()),
            _ => {}
        }
    }
    (said, looks, serves)
}

/// Whatever others have done or do when a program starts, it takes over,
/// or starts cold where nobody is left, or says why neither.
#[test]
fn one_that_starts_serves_whatever_others_do_meanwhile() {
    use Before::{AnotherFirst, JustGone, Refused, RefusedForGood, StaleFile};
    let ledger = DescriptorLedger::open();
    let mut runners = [0, 1, 2].map(Runner::start);
    for kind in [Kind::Path, Kind::Abstract] {
        for before in [
            Before::Alive,
            JustGone,
            StaleFile,
            AnotherFirst,
            Refused,
            RefusedForGood,
        ] {
            let mut most = 0;
            for round in 0..scaled(10, 100) {
                let delay = Duration::from_micros(round * 20);
                let (said, looks, serves) = start_after(before, kind, &mut runners, delay);
                let at = format!("{before:?}, {kind:?}, {round}: {said:?}, {looks} looks");
                let is_right = match before {
                    Before::Alive => said == "took over" && looks == 1,
                    StaleFile => said == "cold" && looks == 1,
                    JustGone => said == "cold" || said == "took over",
                    AnotherFirst => said == "took over",
                    Refused => said == "took over",
                    RefusedForGood => {
                        let why = "looked for a predecessor once: \
                                   predecessor serves another successor";
                        said == format!("not started: {why}") && looks == 1
                    }
                };
                assert!(is_right, "{at}");
                let wanted = if before == RefusedForGood { 0 } else { 2 };
                assert_eq!(serves, Ok(wanted), "{at}");
                most = most.max(looks);
            }
            if matches!(before, JustGone | AnotherFirst | Refused) {
                assert!(most > 1, "{before:?}, {kind:?}: never looked again");
            }
        }
    }
    drop(runners);
    ledger.assert_balanced();
}

/// What came of a race.
#[derive(Debug)]
struct Race {
    /// What each has said until the end, and how often it has looked.
    said: Vec<Vec<String>>,
    looks: Vec<u32>,
    /// Who answers a client when all have said something.
    serves: Result<usize, String>,
}

impl Race {
    fn has_said(&self, number: usize, text: &str) -> bool {
        self.said[number].iter().any(|it| it == text)
    }

    fn count(&self, text: &str) -> usize {
        let all = 0..self.said.len();
        all.filter(|number| self.has_said(*number, text)).count()
    }

    /// One starts cold, each of the others takes over from another, and the last one of
    /// them serves.
    fn is_right(&self) -> bool {
        let others = self.said.len() - 1;
        let mut all = 0..self.said.len();
        let last = all.find(|number| !self.has_said(*number, "handed over"));
        let mut texts = self.said.iter().flatten();
        self.count("cold") == 1
            && self.count("took over") == others
            && self.count("handed over") == others
            && texts.all(|text| ["cold", "took over", "handed over"].contains(&&**text))
            && self.serves.as_ref().ok() == last.as_ref()
    }
}

/// Has all runners start at once.
fn race(runners: &mut [Runner], directory: &Path, round: usize) -> Race {
    let (control, names) = (directory.join("c"), directory.join("n"));
    if round.is_multiple_of(2) {
        make_private(&control);
        for path in [control.join("control"), names.clone()] {
            drop(UnixListener::bind(path).unwrap());
        }
    }
    let address = match round % 4 {
        0 | 1 => names.to_str().unwrap().to_owned(),
        _ => format!("@{}", names.display()),
    };
    for (number, runner) in runners.iter_mut().enumerate() {
        // Up to 50 us apart, each ahead as often as the other.
        let delay = (round * 7 + number * 23) % 51;
        runner.order(&Order {
            directory: control.clone(),
            address: address.clone(),
            delay: Duration::from_micros(delay as u64),
            how: How::Well,
        });
    }
    runners.iter_mut().for_each(Runner::go);
    let (mut said, serves) = hear_all(runners, &address);
    let mut looks = Vec::new();
    for (said, runner) in said.iter_mut().zip(runners) {
        let (rest, looked) = runner.end();
        said.extend(rest);
        looks.push(looked);
    }
    Race {
        said,
        looks,
        serves,
    }
}

/// What each says until all but one of those that came to serve have handed over, and who
/// serves then.
fn hear_all(runners: &mut [Runner], address: &str) -> (Vec<Vec<String>>, Result<usize, String>) {
    let mut said: Vec<_> = runners.iter_mut().map(|it| vec![it.hears()]).collect();
    // Nobody accepts any more but the last one.
    let serves = ask(address).map_err(|error| error.to_string());
    for (number, runner) in runners.iter_mut().enumerate() {
        let has_served = matches!(&*said[number][0], "cold" | "took over");
        if has_served && serves.as_ref().ok() != Some(&number) {
            while said[number].last().is_none_or(|text| text != "handed over") {
                said[number].push(runner.hears());
            }
        }
    }
    (said, serves)
}

/// Contract L-24, W-44, Reliability T-37: one starts cold, the others take over from it and
/// from each other, and the last one is reached. Without what a program that was killed
/// has left, and with it.
#[test]
fn of_programs_that_start_at_once_one_serves() {
    let ledger = DescriptorLedger::open();
    let base = tempfile::tempdir().unwrap();
    let mut runners: Vec<_> = (0..4).map(Runner::start).collect();
    let (mut wrong, mut close) = (0, 0);
    let races = scaled(200, 100_000);
    for round in 0..races {
        let directory = base.path().join(round.to_string());
        fs::create_dir(&directory).unwrap();
        // Two as a rule, which come closest to each other here.
        let count = [2, 2, 2, 3, 2, 2, 2, 4][round / 4 % 8];
        let race = race(&mut runners[..count], &directory, round);
        close += usize::from(race.looks.iter().any(|looks| *looks > 1));
        if !race.is_right() {
            wrong += 1;
            eprintln!("race {round}: {race:?}");
        }
        fs::remove_dir_all(directory).unwrap();
    }
    drop((runners, base));
    Figures::of("T-37")
        .must(
            "races of programs that start at once",
            races,
            Bound::Exactly,
            races,
        )
        .must("of them that one did not win", wrong, Bound::Exactly, 0)
        .must(
            "of them in which one looked again",
            close,
            Bound::AtLeast,
            races / 50,
        );
    ledger.assert_balanced();
}
