//! What the integration tests share: a reactor with a deadline, protocols that
//! record what they are told, and the count of open descriptors.

// Each test binary uses a part of it.
#![allow(dead_code, unused_imports)]

pub(crate) mod faults;
pub(crate) mod figures;
pub(crate) mod own_process;
pub(crate) mod peers;
mod staged;
mod table;
pub(crate) mod waiting;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fmt::{Debug, Display};
use std::fs;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::rc::Rc;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use bowline::testing::ManualClock;
use bowline::time::Clock;
use bowline::{
    CloseReason, Context, Packet, PacketProtocol, PacketTransport, Protocol, Reactor,
    ReceivedDescriptors, Remains, Transport, TransportHandle,
};

pub(crate) use self::staged::{Staged, settle, staged};

/// How long any test may take.
pub(crate) const DEADLINE: Duration = Duration::from_secs(10);

/// Time that a test moves, while the loop waits for other processes as it would in any
/// other: with [`ManualClock`] alone it does not, as long as anything is due some time.
#[derive(Clone)]
pub(crate) struct Moved(pub(crate) ManualClock);

impl Clock for Moved {
    fn now(&self) -> Instant {
        self.0.now()
    }
}

/// Turns the reactor until `is_done` or the deadline, which is a failure.
#[track_caller]
pub(crate) fn run_until(reactor: &mut Reactor, is_done: impl FnMut(&mut Reactor) -> bool) {
    run_until_within(DEADLINE, reactor, &"", is_done);
}

/// As [`run_until`], for what may take longer; `seen` is said too when it did not happen.
#[track_caller]
pub(crate) fn run_until_within(
    limit: Duration,
    reactor: &mut Reactor,
    seen: &dyn Debug,
    mut is_done: impl FnMut(&mut Reactor) -> bool,
) {
    let started = Instant::now();
    while !is_done(reactor) {
        assert!(
            started.elapsed() < limit,
            "nothing more happened within {limit:?}: {seen:?} {reactor:?}"
        );
        reactor.turn(Some(Duration::from_millis(50)));
    }
}

/// Turns the reactor until it has had nothing to do for a moment: for tests
/// that something does *not* happen.
pub(crate) fn run_until_quiet(reactor: &mut Reactor) {
    run_until_quiet_for(reactor, Duration::from_millis(5));
}

/// As [`run_until_quiet`], for three turns that wait so long. Where all that can happen is
/// in this process, [`settle`] needs no wait.
pub(crate) fn run_until_quiet_for(reactor: &mut Reactor, wait: Duration) {
    let mut quiet = 0;
    while quiet < 3 {
        let before = reactor.statistics();
        reactor.turn(Some(wait));
        let after = reactor.statistics();
        let is_quiet = reactor.is_idle() && before.events == after.events;
        quiet = if is_quiet { quiet + 1 } else { 0 };
    }
}

/// Asks again until it works, or the limit: for what no event announces.
#[track_caller]
pub(crate) fn eventually<T, E: Display>(
    limit: Duration,
    mut attempt: impl FnMut() -> Result<T, E>,
) -> T {
    let started = Instant::now();
    loop {
        match attempt() {
            Ok(value) => return value,
            Err(error) => assert!(started.elapsed() < limit, "{error}"),
        }
        std::thread::yield_now();
    }
}

/// The row of a table that a test is at; said if it fails there, whatever fails.
#[must_use = "it is said when this is dropped"]
pub(crate) struct Row(String);

pub(crate) fn row(row: impl Debug) -> Row {
    Row(format!("{row:?}"))
}

impl Drop for Row {
    #[allow(clippy::print_stderr, reason = "what a failed test has to say")]
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("in the row {}", self.0);
        }
    }
}

/// The threads of pools in this process, as the system sees them.
pub(crate) fn pool_threads() -> usize {
    fs::read_dir("/proc/self/task")
        .expect("Linux has it")
        .filter_map(|task| fs::read_to_string(task.ok()?.path().join("comm")).ok())
        .filter(|name| name.trim() == "bowline-pool")
        .count()
}

/// Waits until other threads have closed what peers have sent.
#[track_caller]
pub(crate) fn wait_for_closes() {
    let began = Instant::now();
    while bowline::process::descriptors_closing() > 0 {
        assert!(began.elapsed() < DEADLINE, "something is not closed");
        std::thread::yield_now();
    }
}

/// That there are none: a thread that has ended may be listed for a moment, and
/// what it had with it is closed only then.
#[track_caller]
pub(crate) fn assert_no_pool_threads() {
    let began = Instant::now();
    while pool_threads() > 0 {
        assert!(
            began.elapsed() < DEADLINE,
            "{} threads are left",
            pool_threads()
        );
        std::thread::yield_now();
    }
}

/// Whether a program is missing, which is said past the harness: that shows nothing of a
/// test that passes. Where the programs have to be there it is a failure. `package` is
/// Debian's.
pub(crate) fn is_missing(program: &str, package: &str) -> bool {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    if std::env::split_paths(&paths).any(|path| path.join(program).exists()) {
        return false;
    }
    let is_set = |name: &str, to: &str| std::env::var(name).is_ok_and(|it| it == to);
    let required = is_set("BOWLINE_INTEROP", "require") || is_set("CI", "true");
    assert!(!required, "CANNOT RUN {program}: apt-get install {package}");
    let text = format!("NOT RUN: {program} is missing (Debian: apt-get install {package})\n");
    let _ = std::io::stderr().write_all(text.as_bytes());
    true
}

/// The open descriptors of this test, compared before and after.
///
/// The test's thread gets a table of descriptors of its own, so tests in other threads
/// of the same process do not interfere, and run beside it. Every test that opens
/// descriptors has to make one, first of all: what was open before is not in the table.
/// What it then drops last is compared once more.
pub(crate) struct DescriptorLedger {
    before: BTreeSet<i32>,
    _company: Company,
}

/// Whether others run beside a test.
enum Company {
    Shared {
        _lock: RwLockReadGuard<'static, ()>,
    },
    None {
        _lock: RwLockWriteGuard<'static, ()>,
    },
}

static COMPANY: RwLock<()> = RwLock::new(());

impl DescriptorLedger {
    pub(crate) fn open() -> Self {
        let lock = COMPANY.read().unwrap_or_else(PoisonError::into_inner);
        Self::open_in(Company::Shared { _lock: lock })
    }

    /// For a test of what a process has but once: its signals, its threads, its limits,
    /// its environment. No other test that has a ledger runs meanwhile.
    pub(crate) fn alone() -> Self {
        let lock = COMPANY.write().unwrap_or_else(PoisonError::into_inner);
        // Those of the test before, which may have ended a moment ago.
        assert_no_pool_threads();
        Self::open_in(Company::None { _lock: lock })
    }

    fn open_in(company: Company) -> Self {
        table::have_own_table();
        Self {
            before: open_descriptors(),
            _company: company,
        }
    }

    /// Fails if other descriptors are open than when the ledger was opened.
    #[track_caller]
    pub(crate) fn assert_balanced(&self) {
        wait_for_closes();
        // What is there for a moment makes them more, and cannot make them the same.
        if listed_descriptors() == self.before {
            return;
        }
        let after = open_descriptors();
        let leaked: Vec<_> = after
            .difference(&self.before)
            .map(|fd| describe(*fd))
            .collect();
        let lost: Vec<_> = self.before.difference(&after).collect();
        assert!(
            leaked.is_empty() && lost.is_empty(),
            "leaked {leaked:?}, closed but not ours {lost:?}"
        );
    }
}

impl Drop for DescriptorLedger {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.assert_balanced();
        }
    }
}

/// The numbers of all descriptors that are open for longer than a moment. The C
/// library opens a file of its own when a thread allocates for the first time (glibc, to
/// count the processors), and a thread that the test has started may do so at any moment.
pub(crate) fn open_descriptors() -> BTreeSet<i32> {
    wait_for_closes();
    let mut seen = listed_descriptors();
    let mut times = 1;
    while times < 4 {
        std::thread::yield_now();
        let now = listed_descriptors();
        times = if now == seen { times + 1 } else { 1 };
        seen = now;
    }
    seen
}

fn listed_descriptors() -> BTreeSet<i32> {
    let listing = fs::read_dir("/proc/thread-self/fd").expect("Linux has it");
    let listed: Vec<i32> = listing
        .map(|entry| entry.expect("readable").file_name())
        .map(|name| name.to_string_lossy().parse().expect("a number"))
        .collect();
    // One of them was the listing's own, and is closed by now.
    listed
        .into_iter()
        .filter(|fd| fs::read_link(format!("/proc/thread-self/fd/{fd}")).is_ok())
        .collect()
}

fn describe(fd: i32) -> String {
    let target = fs::read_link(format!("/proc/thread-self/fd/{fd}"));
    format!(
        "{fd} -> {}",
        target.map_or_else(|_| "?".into(), |path| path.display().to_string())
    )
}

/// What a [`Recorder`] was told, in order.
#[derive(Debug)]
pub(crate) enum Event {
    Made,
    Data(Vec<u8>),
    Descriptor,
    ReadClosed,
    WriteClosed,
    Paused,
    Resumed,
    Stopped,
    ReadingResumed,
    Draining,
    DescriptorsSent(usize),
    Broken(Remains),
    /// The reason in words, as [`CloseReason`] displays it.
    Lost(String),
}

/// The record of one or more recorders, and what they keep.
#[derive(Clone, Default)]
pub(crate) struct Record {
    shared: Rc<RefCell<Recorded>>,
}

#[derive(Default)]
pub(crate) struct Recorded {
    pub(crate) events: Vec<Event>,
    pub(crate) descriptors: Vec<OwnedFd>,
    pub(crate) handles: Vec<TransportHandle>,
}

impl Record {
    pub(crate) fn push(&self, event: Event) {
        self.shared.borrow_mut().events.push(event);
    }

    /// All bytes received, joined.
    pub(crate) fn data(&self) -> Vec<u8> {
        let recorded = self.shared.borrow();
        let pieces = recorded.events.iter().filter_map(|event| match event {
            Event::Data(data) => Some(data.as_slice()),
            _ => None,
        });
        pieces.collect::<Vec<_>>().concat()
    }

    /// The lengths of the pieces in which the bytes came.
    pub(crate) fn pieces(&self) -> Vec<usize> {
        let recorded = self.shared.borrow();
        let lengths = recorded.events.iter().filter_map(|event| match event {
            Event::Data(data) => Some(data.len()),
            _ => None,
        });
        lengths.collect()
    }

    /// The events in short form: consecutive data joined, for comparisons such
    /// as `["made", "data 3", "lost closed cleanly"]`.
    pub(crate) fn summary(&self) -> Vec<String> {
        let mut all = Vec::new();
        let mut bytes = 0;
        for event in &self.shared.borrow().events {
            if let Event::Data(data) = event {
                bytes += data.len();
                continue;
            }
            if bytes > 0 {
                all.push(format!("data {}", std::mem::take(&mut bytes)));
            }
            all.push(match event {
                Event::Made => "made".into(),
                Event::Data(_) => continue,
                Event::Descriptor => "descriptor".into(),
                Event::ReadClosed => "read closed".into(),
                Event::WriteClosed => "write closed".into(),
                Event::Paused => "paused".into(),
                Event::Resumed => "resumed".into(),
                Event::Stopped => "stopped".into(),
                Event::ReadingResumed => "reading resumed".into(),
                Event::Draining => "draining".into(),
                Event::DescriptorsSent(count) => format!("sent {count}"),
                Event::Broken(remains) => format!("broken {remains:?}").to_lowercase(),
                Event::Lost(reason) => format!("lost {}", in_short(reason)),
            });
        }
        if bytes > 0 {
            all.push(format!("data {bytes}"));
        }
        all
    }

    pub(crate) fn count(&self, matches: impl Fn(&Event) -> bool) -> usize {
        self.shared
            .borrow()
            .events
            .iter()
            .filter(|event| matches(event))
            .count()
    }

    pub(crate) fn is_lost(&self) -> bool {
        self.count(|event| matches!(event, Event::Lost(_))) > 0
    }

    pub(crate) fn take_descriptors(&self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.shared.borrow_mut().descriptors)
    }

    /// The transports whose connections were made, in order.
    pub(crate) fn handle(&self, index: usize) -> TransportHandle {
        self.shared.borrow().handles[index]
    }
}

/// What a reason or an error says first, without its cause.
pub(crate) fn in_short(error: impl Display) -> String {
    let text = error.to_string();
    text.split_once(": ")
        .map_or(&*text, |(what, _)| what)
        .into()
}

/// A protocol that records what it is told, and keeps the descriptors.
#[derive(Clone, Default)]
pub(crate) struct Recorder {
    pub(crate) record: Record,
}

impl Recorder {
    pub(crate) fn new(record: &Record) -> Self {
        Self {
            record: record.clone(),
        }
    }
}

impl<T: Transport> Protocol<T> for Recorder {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        self.record
            .shared
            .borrow_mut()
            .handles
            .push(cx.transport.handle());
        self.record.push(Event::Made);
    }

    fn data_received(&mut self, _: &mut Context<'_, T>, data: &[u8]) {
        self.record.push(Event::Data(data.to_vec()));
    }

    fn descriptors_received(
        &mut self,
        cx: &mut Context<'_, T>,
        descriptors: &mut ReceivedDescriptors<'_>,
        data: &[u8],
    ) {
        for fd in descriptors {
            self.record.shared.borrow_mut().descriptors.push(fd);
            self.record.push(Event::Descriptor);
        }
        self.data_received(cx, data);
    }

    fn descriptors_sent(&mut self, _: &mut Context<'_, T>, count: usize) {
        self.record.push(Event::DescriptorsSent(count));
    }

    fn write_connection_lost(&mut self, _: &mut Context<'_, T>) {
        self.record.push(Event::WriteClosed);
    }

    fn connection_broken(&mut self, _: &mut Context<'_, T>, remains: Remains) {
        self.record.push(Event::Broken(remains));
    }

    fn connection_lost(&mut self, _: &mut Context<'_, T>, reason: &CloseReason) {
        self.record.push(Event::Lost(reason.to_string()));
    }

    fn reading_resumed(&mut self, _: &mut Context<'_, T>) {
        self.record.push(Event::ReadingResumed);
    }

    fn pause_producing(&mut self, _: &mut Context<'_, T>) {
        self.record.push(Event::Paused);
    }

    fn resume_producing(&mut self, _: &mut Context<'_, T>) {
        self.record.push(Event::Resumed);
    }

    fn stop_producing(&mut self, _: &mut Context<'_, T>) {
        self.record.push(Event::Stopped);
    }
}

/// Records of packets what it records of a stream.
impl<T: PacketTransport> PacketProtocol<T> for Recorder {
    fn connection_made(&mut self, _: &mut Context<'_, T>) {
        self.record.push(Event::Made);
    }

    fn packet_received(&mut self, _: &mut Context<'_, T>, packet: &mut Packet<'_>) {
        for fd in &mut packet.descriptors {
            self.record.shared.borrow_mut().descriptors.push(fd);
            self.record.push(Event::Descriptor);
        }
        self.record.push(Event::Data(packet.data.to_vec()));
    }

    fn write_connection_lost(&mut self, _: &mut Context<'_, T>) {
        self.record.push(Event::WriteClosed);
    }

    fn connection_broken(&mut self, _: &mut Context<'_, T>) {
        self.record.push(Event::Broken(Remains::Everything));
    }

    fn connection_lost(&mut self, _: &mut Context<'_, T>, reason: &CloseReason) {
        self.record.push(Event::Lost(reason.to_string()));
    }
}

/// A non-blocking socketpair of std.
pub(crate) fn socketpair() -> (StdUnixStream, StdUnixStream) {
    let (ours, theirs) = StdUnixStream::pair().expect("socketpair");
    ours.set_nonblocking(true).expect("a socket");
    theirs.set_nonblocking(true).expect("a socket");
    (ours, theirs)
}
