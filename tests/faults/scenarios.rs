//! What is running while a call fails: small, and the same each time.

use std::cell::Cell;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream as StdUnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::time::{Duration, Instant};

use bowline::handoff::pool::{Pool, PoolEvent, PoolSettings, spawn_command};
use bowline::policies::Backoff;
use bowline::process::spawn_with_descriptors;
use bowline::{
    Address, AfterReadClosed, AnyConnection as _, BuildContext, CloseReason, ConnectError, Context,
    Factory, ListenerHandle, ProducerKind, Protocol, Reactor, ReceivedDescriptors, StaleSocket,
    TcpStream, Transport, Transports, Turn, UnixStream, UnixTransport,
};
use bowline::{Tcp, Unix};

use crate::journal;
use crate::peers::{Farewell, Peer, pattern};
use crate::support::faults::Faults;

/// How long a scenario may take. Loaded machines do not come near it, and what
/// the library retries by a timer it does within a second.
const DEADLINE: Duration = Duration::from_secs(20);
/// A loop that makes more turns per second than this does not wait.
const MOST_TURNS_PER_SECOND: u128 = 1_000;
/// What the work of a scenario itself takes at the most.
const WORKING_TURNS: u128 = 2_000;

pub(crate) type Scenario = fn(&Faults, &Path) -> Run;

pub(crate) const ALL: [(&str, Scenario); 7] = [
    ("servers", servers),
    ("clients", clients),
    ("time", time),
    ("moving", moving),
    ("ends", ends),
    ("children", children),
    ("workers", workers),
];

/// What a scenario came to.
#[derive(Debug, Default)]
pub(crate) struct Run {
    /// Everything happened that happens without a fault.
    pub(crate) is_complete: bool,
    /// What must not happen, with any fault.
    pub(crate) violations: Vec<String>,
}

/// How often protocols and factories were told what.
#[derive(Debug, Default)]
struct Tally {
    made: Cell<usize>,
    lost: Cell<usize>,
    /// Connections given back whole; their protocols are not told of an end.
    returned: Cell<usize>,
    failed: Cell<usize>,
    ended: Cell<usize>,
    fired: Cell<usize>,
}

fn count(cell: &Cell<usize>) {
    cell.set(cell.get() + 1);
}

/// Sends everything back, descriptors with the bytes they came with.
struct Echo {
    tally: Rc<Tally>,
    is_over: bool,
}

impl Echo {
    fn new(tally: &Rc<Tally>) -> Self {
        Self {
            tally: Rc::clone(tally),
            is_over: false,
        }
    }

    fn made<T: Transport>(&self, cx: &mut Context<'_, T>) {
        count(&self.tally.made);
        let me = cx.transport.handle();
        cx.transport
            .register_producer(me.into(), ProducerKind::Push)
            .expect("it is the first one");
    }

    fn lost(&mut self, reason: &CloseReason) {
        assert!(!self.is_over, "told of its end twice");
        self.is_over = true;
        count(&self.tally.lost);
        if !reason.is_clean() {
            journal::note(format!("{reason}: {reason:?}"));
        }
    }
}

impl Protocol<TcpStream> for Echo {
    fn connection_made(&mut self, cx: &mut Context<'_, TcpStream>) {
        self.made(cx);
    }

    fn data_received(&mut self, cx: &mut Context<'_, TcpStream>, data: &[u8]) {
        cx.transport.write(data);
    }

    fn read_connection_lost(&mut self, cx: &mut Context<'_, TcpStream>) -> AfterReadClosed {
        cx.transport.unregister_producer();
        AfterReadClosed::LoseConnection
    }

    fn connection_lost(&mut self, _: &mut Context<'_, TcpStream>, reason: &CloseReason) {
        self.lost(reason);
    }
}

impl Protocol<UnixStream> for Echo {
    fn connection_made(&mut self, cx: &mut Context<'_, UnixStream>) {
        self.made(cx);
    }

    fn data_received(&mut self, cx: &mut Context<'_, UnixStream>, data: &[u8]) {
        cx.transport.write(data);
    }

    fn descriptors_received(
        &mut self,
        cx: &mut Context<'_, UnixStream>,
        descriptors: &mut ReceivedDescriptors<'_>,
        data: &[u8],
    ) {
        let back: Vec<_> = descriptors.map(Into::into).collect();
        if let Err(refused) = cx.transport.write_with_descriptors(data, back) {
            journal::note(refused.to_string());
        }
    }

    fn read_connection_lost(&mut self, cx: &mut Context<'_, UnixStream>) -> AfterReadClosed {
        cx.transport.unregister_producer();
        AfterReadClosed::LoseConnection
    }

    fn connection_lost(&mut self, _: &mut Context<'_, UnixStream>, reason: &CloseReason) {
        self.lost(reason);
    }
}

/// Builds them, and is told how attempts end.
struct Echoes(Rc<Tally>);

impl Factory for Echoes {
    type Protocol = Echo;

    fn build_protocol(&mut self, _: &mut BuildContext<'_>, _: &Address) -> Option<Echo> {
        Some(Echo::new(&self.0))
    }

    fn connection_failed(&mut self, _: &mut BuildContext<'_>, error: &ConnectError) {
        count(&self.0.failed);
        journal::note(error.to_string());
    }

    fn connection_lost(&mut self, _: &mut BuildContext<'_>, _: &CloseReason) {
        count(&self.0.ended);
    }
}

/// A reactor whose calls may fail, and everything around it.
struct Stage<'a> {
    faults: &'a Faults,
    reactor: Reactor,
    tally: Rc<Tally>,
    started: Instant,
    turns: u128,
    run: Run,
}

impl<'a> Stage<'a> {
    /// Sets it up; without a reactor there is nothing to see.
    fn set_up(faults: &'a Faults) -> Result<Self, Run> {
        match faults.during(Reactor::new) {
            Ok(mut reactor) => {
                reactor.start().expect("it was made just now");
                Ok(Self {
                    faults,
                    reactor,
                    tally: Rc::default(),
                    started: Instant::now(),
                    turns: 0,
                    run: Run::default(),
                })
            }
            Err(error) => {
                journal::note(error.to_string());
                Err(Run::default())
            }
        }
    }

    /// Makes calls that may fail; an error is taken down.
    fn attempt<R, E: std::fmt::Debug>(
        &mut self,
        call: impl FnOnce(&mut Reactor) -> Result<R, E>,
    ) -> Option<R> {
        let reactor = &mut self.reactor;
        let result = self.faults.during(|| call(reactor));
        result
            .map_err(|error| journal::note(format!("{error:?}")))
            .ok()
    }

    fn violated(&mut self, what: &str) {
        let tally = &self.tally;
        self.run.violations.push(format!(
            "{what} after {:?} and {} turns: {tally:?}, {:?}",
            self.started.elapsed(),
            self.turns,
            self.reactor
        ));
    }

    fn turn(&mut self) -> bool {
        let reactor = &mut self.reactor;
        let turn = self
            .faults
            .during(|| reactor.turn(Some(Duration::from_millis(20))));
        self.turns += 1;
        turn != Turn::Stopped
    }

    /// Turns the reactor, and lets the peers do theirs, until `is_done`.
    fn play(
        &mut self,
        peers: &mut Vec<Peer>,
        mut is_done: impl FnMut(&mut Self, &mut Vec<Peer>) -> bool,
    ) {
        let started = Instant::now();
        loop {
            peers.iter_mut().for_each(Peer::step);
            if is_done(self, peers) || !self.run.violations.is_empty() {
                return;
            }
            let elapsed = started.elapsed();
            if elapsed > DEADLINE {
                return self.violated("a hang");
            }
            let most = WORKING_TURNS + elapsed.as_millis() * MOST_TURNS_PER_SECOND / 1_000;
            if self.turns > most {
                return self.violated("a spin");
            }
            self.turn();
        }
    }

    /// Until no peer is left, and no connection.
    fn play_to_the_end(&mut self, peers: &mut Vec<Peer>) {
        self.play(peers, |stage, peers| {
            let tally = &stage.tally;
            peers.iter().all(Peer::is_done)
                && tally.made.get() == tally.lost.get() + tally.returned.get()
        });
    }

    /// Stops everything and looks at what is left.
    fn take_down(mut self, peers: &[Peer], is_complete: bool) -> Run {
        self.run.is_complete = is_complete && self.run.violations.is_empty();
        if self.reactor.stop().is_ok() {
            let mut turns = 0;
            while self.turn() && turns < 100 {
                turns += 1;
            }
            if turns == 100 {
                self.violated("does not stop");
            }
        }
        if self.reactor.statistics().panics > 0 {
            self.violated("a panic");
        }
        if self.tally.made.get() != self.tally.lost.get() + self.tally.returned.get() {
            self.violated("not told of its end");
        }
        if !peers.iter().all(Peer::is_unharmed) {
            self.violated("wrong bytes");
        }
        let Self {
            faults,
            reactor,
            run,
            ..
        } = self;
        faults.during(|| drop(reactor));
        run
    }
}

fn tcp_address(reactor: &mut Reactor, listener: ListenerHandle) -> Option<SocketAddr> {
    match reactor.get(listener)?.address() {
        Address::Inet(address) => Some(address),
        _ => None,
    }
}

/// Descriptors to pass: pipes are as good as any.
fn messages(count: usize, each: usize) -> Vec<Vec<OwnedFd>> {
    let fd = || StdUnixStream::pair().expect("a pair").0.into();
    (0..count)
        .map(|_| (0..each).map(|_| fd()).collect())
        .collect()
}

/// Listeners of both kinds, with clients that send little, much, and
/// descriptors.
fn servers(faults: &Faults, folder: &Path) -> Run {
    let mut stage = match Stage::set_up(faults) {
        Ok(stage) => stage,
        Err(run) => return run,
    };
    let path = folder.join("socket");
    let _ = std::fs::remove_file(&path);
    let tally = Rc::clone(&stage.tally);
    let tcp = stage.attempt(|reactor| {
        reactor.listen_tcp(([127, 0, 0, 1], 0).into(), Echoes(Rc::clone(&tally)))
    });
    let unix = stage.attempt(|reactor| {
        reactor.listen(
            Unix::at(&*path).mode(0o660).stale(StaleSocket::Remove),
            Echoes(Rc::clone(&tally)),
        )
    });
    let mut peers = Vec::new();
    // The kernel's own queue holds them until they are accepted.
    if let Some(address) = tcp.and_then(|tcp| tcp_address(&mut stage.reactor, tcp)) {
        for _ in 0..4 {
            peers.push(Peer::tcp(address).echoes(200));
        }
        peers.push(Peer::tcp(address).echoes(400_000));
        peers.push(Peer::tcp(address).echoes(20).then(Farewell::Close));
    }
    if unix.is_some() {
        peers.push(Peer::unix(&path).echoes(300_000));
        peers.push(Peer::unix(&path).passes(messages(12, 2)));
        peers.push(
            Peer::unix(&path)
                .passes(messages(1, 1))
                .then(Farewell::Close),
        );
    }
    stage.play_to_the_end(&mut peers);
    for listener in [tcp, unix].into_iter().flatten() {
        if let Some(listener) = stage.reactor.get(listener) {
            listener.stop_listening();
        }
    }
    stage.turn();
    let is_complete = peers.len() == 9 && peers.iter().all(Peer::is_satisfied);
    stage.take_down(&peers, is_complete)
}

/// Attempts to connect, of both kinds and to where nobody listens.
fn clients(faults: &Faults, folder: &Path) -> Run {
    let mut stage = match Stage::set_up(faults) {
        Ok(stage) => stage,
        Err(run) => return run,
    };
    let path = folder.join("peer");
    let _ = std::fs::remove_file(&path);
    let tcp = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let unix = UnixListener::bind(&path).expect("a listener");
    tcp.set_nonblocking(true).expect("a socket");
    unix.set_nonblocking(true).expect("a socket");
    let somebody = tcp.local_addr().expect("bound");
    // A port that was free a moment ago.
    let nobody = TcpListener::bind("127.0.0.1:0").and_then(|gone| gone.local_addr());
    let nobody = nobody.expect("a listener");

    let tally = Rc::clone(&stage.tally);
    let factory = || Echoes(Rc::clone(&tally));
    stage.attempt(|reactor| {
        reactor.connect_tcp(somebody, factory())?;
        reactor.connect_tcp(nobody, factory())?;
        reactor.connect_unix(&*path, factory())?;
        reactor.connect_unix(&*path, factory())?;
        reactor.connect_unix(&*folder.join("nothing"), factory())
    });
    let mut peers = Vec::new();
    stage.play(&mut peers, |stage, peers| {
        while let Ok((stream, _)) = tcp.accept() {
            peers.push(Peer::on_tcp(stream).echoes(5_000));
        }
        while let Ok((stream, _)) = unix.accept() {
            stream.set_nonblocking(true).expect("a socket");
            let peer = Peer::on(stream);
            peers.push(if peers.len() % 2 == 0 {
                peer.echoes(5_000)
            } else {
                peer.passes(messages(2, 1))
            });
        }
        let tally = &stage.tally;
        tally.failed.get() + tally.ended.get() == 5 && peers.iter().all(Peer::is_done)
    });
    let tally = &stage.tally;
    let is_complete = (tally.failed.get(), tally.ended.get()) == (2, 3)
        && peers.len() == 3
        && peers.iter().all(Peer::is_satisfied);
    stage.take_down(&peers, is_complete)
}

/// Delayed calls, calls from elsewhere, and the loop's own waiting.
fn time(faults: &Faults, _: &Path) -> Run {
    let mut stage = match Stage::set_up(faults) {
        Ok(stage) => stage,
        Err(run) => return run,
    };
    let remote = stage.reactor.remote();
    for delay in [1, 2, 3] {
        let tally = Rc::clone(&stage.tally);
        stage
            .reactor
            .call_later(Duration::from_millis(delay), move |reactor| {
                count(&tally.fired);
                let tally = Rc::clone(&tally);
                reactor.call_soon(move |_| count(&tally.fired));
            });
    }
    let called = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let mut sent = 0;
    stage.play(&mut Vec::new(), |stage, _| {
        if sent < 3 {
            sent += 1;
            let called = std::sync::Arc::clone(&called);
            stage
                .faults
                .during(|| {
                    remote.call_from_thread(move |_| {
                        called.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    })
                })
                .expect("it is there");
            stage.faults.during(|| remote.wake());
        }
        stage.tally.fired.get() == 6 && called.load(std::sync::atomic::Ordering::Relaxed) == 3
    });
    let is_complete = stage.run.violations.is_empty();
    stage.take_down(&[], is_complete)
}

/// Sockets that come from elsewhere and go elsewhere.
fn moving(faults: &Faults, _: &Path) -> Run {
    let mut stage = match Stage::set_up(faults) {
        Ok(stage) => stage,
        Err(run) => return run,
    };
    let tally = Rc::clone(&stage.tally);
    let mut peers = Vec::new();
    let (ours, theirs) = crate::support::socketpair();
    peers.push(Peer::on(theirs).passes(messages(2, 2)).then(Farewell::Wait));
    let stream = stage
        .attempt(|reactor| reactor.adopt_unix_stream(ours.into(), Echo::new(&tally)))
        .and_then(|unix| Some(stage.reactor.get(unix)?.handle()));
    let listening = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let address = listening.local_addr().expect("bound");
    let listener = stage.attempt(|reactor| {
        reactor.listen(Tcp::listening(listening.into()), Echoes(Rc::clone(&tally)))
    });
    if listener.is_some() {
        peers.push(Peer::tcp(address).echoes(100));
    }
    stage.play(&mut peers, |_, peers| {
        peers.iter().skip(1).all(Peer::is_done)
            && (peers[0].is_done() || peers[0].descriptors.len() == 4)
    });
    // Both are taken out and put back; what is in the kernel stays there.
    if let Some(listener) = listener {
        let tally = Rc::clone(&tally);
        peers.push(Peer::tcp(address).echoes(100));
        stage
            .reactor
            .detach_listener(listener, move |reactor, detached| {
                let again = match detached {
                    Ok(fd) => reactor
                        .listen(Tcp::listening(fd), Echoes(tally))
                        .map_err(|error| error.to_string()),
                    Err(error) => Err(error.to_string()),
                };
                if let Err(error) = again {
                    journal::note(error);
                }
            });
    }
    if let Some(stream) = stream {
        let tally = Rc::clone(&tally);
        stage
            .reactor
            .detach::<Echo>(stream, move |reactor, detached| match detached {
                Ok(detached) => match reactor.reattach::<UnixStream, _>(detached) {
                    Ok(again) => {
                        let transport = reactor.get(again).expect("it was put there");
                        transport.write(&pattern(0));
                        transport.unregister_producer();
                        transport.lose_connection();
                    }
                    Err(error) => {
                        count(&tally.returned);
                        journal::note(format!("{:?}", error.kind));
                    }
                },
                Err(error) => journal::note(error.to_string()),
            });
    }
    stage.play_to_the_end(&mut peers);
    let is_complete = peers.len() == 3 && peers.iter().all(Peer::is_satisfied);
    stage.take_down(&peers, is_complete)
}

/// Writes more than anybody reads.
struct Talker {
    tally: Rc<Tally>,
    deadline: Option<Duration>,
}

impl Protocol<UnixStream> for Talker {
    fn connection_made(&mut self, cx: &mut Context<'_, UnixStream>) {
        count(&self.tally.made);
        cx.transport.write(&pattern(600_000));
        if let Some(deadline) = self.deadline {
            cx.transport.lose_connection_within(deadline);
        }
    }

    fn data_received(&mut self, cx: &mut Context<'_, UnixStream>, _: &[u8]) {
        cx.transport.abort_connection();
    }

    fn connection_lost(&mut self, _: &mut Context<'_, UnixStream>, reason: &CloseReason) {
        count(&self.tally.lost);
        journal::note(reason.to_string());
    }
}

/// Connections that end before everything is sent: by a deadline, an abort, the
/// end of the reactor.
fn ends(faults: &Faults, _: &Path) -> Run {
    let mut stage = match Stage::set_up(faults) {
        Ok(stage) => stage,
        Err(run) => return run,
    };
    let mut peers = Vec::new();
    for nth in 0..3 {
        let (ours, theirs) = crate::support::socketpair();
        let talker = Talker {
            tally: Rc::clone(&stage.tally),
            deadline: (nth == 0).then_some(Duration::from_millis(10)),
        };
        if stage
            .attempt(|reactor| reactor.adopt_unix_stream(ours.into(), talker))
            .is_some()
        {
            let peer = Peer::on(theirs).expects(600_000).without_reading();
            peers.push(if nth == 1 { peer.says(10) } else { peer });
        }
    }
    let adopted = peers.len();
    stage.play(&mut peers, |stage, _| stage.tally.lost.get() + 1 >= adopted);
    let before = stage.tally.lost.get();
    let is_complete = adopted == 3 && before == 2;
    peers.iter_mut().for_each(Peer::read_from_now_on);
    if adopted > before {
        stage.play(&mut peers, |_, peers| {
            peers.iter().filter(|peer| peer.is_done()).count() >= before
        });
    }
    stage.take_down(&peers, is_complete)
}

/// A child process with descriptors.
fn children(faults: &Faults, _: &Path) -> Run {
    let (one, other) = crate::support::socketpair();
    let mut command = Command::new("true");
    command.stdin(Stdio::null()).env_remove("LD_PRELOAD");
    let spawned: io::Result<_> =
        faults.during(|| spawn_with_descriptors(command, &[(one.as_fd(), 3), (other.as_fd(), 9)]));
    let mut run = Run::default();
    match spawned {
        Ok(mut child) => run.is_complete = child.wait().expect("ours").success(),
        Err(error) => journal::note(error.to_string()),
    }
    // What was granted is the caller's still.
    let is_whole = (&one).write_all(b"x").is_ok() && (&other).read_exact(&mut [0]).is_ok();
    if !is_whole {
        run.violations.push("what was granted is closed".into());
    }
    run
}

/// A worker process that ends at once, is waited for, and is not replaced before the
/// scenario is over.
fn workers(faults: &Faults, _: &Path) -> Run {
    let mut stage = match Stage::set_up(faults) {
        Ok(stage) => stage,
        Err(run) => return run,
    };
    let mut settings = PoolSettings::default();
    settings.workers = 1;
    settings.backoff = Backoff::new().first(Duration::from_secs(3_600));
    let spawn = spawn_command(|_| {
        // So that it lives when it is looked at for the first time.
        let mut command = Command::new("sleep");
        command.arg("0.02");
        command.stdin(Stdio::null()).env_remove("LD_PRELOAD");
        command
    });
    let reactor = &mut stage.reactor;
    let pool = faults.during(|| Pool::start(reactor, settings, spawn));
    let ended = Rc::new(Cell::new(None));
    let told = Rc::clone(&ended);
    pool.on_event(move |_, event| {
        if let PoolEvent::Exited { status, .. } = event {
            told.set(Some(status.is_some_and(|status| status.success())));
        }
    });
    // Without a process nothing more comes.
    stage.play(&mut Vec::new(), |_, _| {
        pool.statistics().started == 0 || ended.get().is_some()
    });
    let is_complete = ended.get() == Some(true);
    stage.take_down(&[], is_complete)
}
