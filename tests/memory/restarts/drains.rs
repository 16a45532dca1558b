//! Whole runs from a seed of a server that ends gracefully again and again, replaced by a
//! successor or started anew, while clients make requests on connections that they keep:
//! whole ones and halves, several at a time, without reading the answers, into the last
//! instant of a connection. Work takes time, events come late, the service manager is
//! slow, full, away or made anew, several start at the same moment. What ends a process
//! in time loses no request that had arrived, and serves nobody new meanwhile.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bowline::handoff::restart::{Listeners, Program, Restart, RestartError, RestartSettings};
use bowline::handoff::systemd::Notifier;
use bowline::lifecycle::{Phase, SystemEvent};
use bowline::process::ChildProcess;
use bowline::testing::{
    Delivery, KernelSettings, Memory, MemoryHandle, MemoryStream, ProcessId, Random,
    SimulatedKernel, Simulation, SocketId,
};
use bowline::time::Clock;
use bowline::{
    Address, AnyConnection as _, AtDrain, CloseReason, Context, GracefulStop, Protocol, Reactor,
    Transport,
};

use super::{MANAGER, Manager, SERVICE};
use crate::seeds::{System, every_seed};
use crate::support::figures::{Bound, Figures, scaled};
use crate::support::{DescriptorLedger, Staged};

const fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

/// How long the last word may take, to another process, and to a manager without room.
const FAREWELLS: [Duration; 2] = [ms(1_000), ms(5_000)];

/// A request is the client's number and its own, and so is the answer.
const LENGTH: usize = 8;
type Request = [u8; LENGTH];

fn request(client: usize, number: u32) -> Request {
    let words = [(client as u32).to_le_bytes(), number.to_le_bytes()];
    words.concat().try_into().expect("eight")
}

/// How it goes out of its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Exit {
    /// Within its time.
    InTime,
    /// Its time was over, or was cut short.
    Cut,
    /// It was killed.
    Killed,
    /// It was not started, or killed by whoever had started it.
    Declined,
}

/// A process of the server.
#[derive(Default)]
struct LifeState {
    process: Option<ProcessId>,
    restart: Option<Restart>,
    exit: Option<Exit>,
    /// Since when it drains, and until when at the longest.
    drains: Option<(Instant, Instant)>,
    connections: usize,
    /// When the last of them ended.
    last_end: Option<Instant>,
    /// It has said why it is not started.
    is_declined: bool,
    /// It was told not to wait.
    is_hurried: bool,
}

#[derive(Clone, Default)]
struct Life(Rc<RefCell<LifeState>>);

impl Life {
    fn is_over(&self) -> bool {
        self.0.borrow().exit.is_some()
    }

    fn restart(&self) -> Option<Restart> {
        self.0.borrow().restart.clone()
    }

    /// Notes since when it drains, and until when.
    fn note_drain(&self, reactor: &Reactor) {
        if let Some(until) = reactor.stop_deadline() {
            let drains = &mut self.0.borrow_mut().drains;
            let since = drains.map_or(reactor.now(), |(since, _)| since);
            *drains = Some((since, until));
        }
    }

    fn is_draining(&self) -> bool {
        self.0.borrow().drains.is_some()
    }

    fn serves(&self) -> bool {
        let is_serving = self.restart().is_some_and(|it| it.is_serving());
        is_serving && !self.is_draining() && !self.is_over()
    }
}

impl ChildProcess for Life {
    fn pid(&self) -> u32 {
        std::process::id()
    }

    fn kill(&mut self) -> io::Result<()> {
        self.0.borrow_mut().is_declined = true;
        Ok(())
    }

    fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        Ok(self.is_over().then(|| ExitStatus::from_raw(0)))
    }
}

/// A client, which has so many requests to make, on one connection after the other.
struct Client {
    wanted: u32,
    /// The next that it has not made yet, and those that are to be made again.
    next: u32,
    again: Vec<u32>,
    answered: BTreeSet<u32>,
    /// Made on the present connection, and not answered.
    open: Vec<u32>,
    /// What is left of a request that was made in part.
    rest: Vec<u8>,
    handle: Option<MemoryHandle>,
    /// The other end of its connection.
    server_end: Option<SocketId>,
    is_paused: bool,
}

impl Client {
    fn has_more(&self) -> bool {
        (self.answered.len() as u32) < self.wanted
    }
}

#[derive(Default)]
struct World {
    lives: Vec<Life>,
    clients: Vec<Client>,
    /// Which process has accepted a socket.
    accepted_by: BTreeMap<SocketId, usize>,
    /// How often a request was answered; more than once if an answer did not arrive.
    served: BTreeMap<Request, u32>,
    /// What was lost with a connection, and by whom.
    lost: Vec<(String, Option<usize>)>,
    wrong: Vec<String>,
    restarts: usize,
    stops: usize,
    cuts: usize,
    goodbyes: usize,
    requests: usize,
    /// How many had been killed when nobody was left the last time.
    killed: usize,
}

type Shared = Rc<RefCell<World>>;

/// What each process is.
struct Server {
    number: usize,
    life: Life,
    shared: Shared,
    kernel: SimulatedKernel,
}

impl Program for Server {
    fn listen(&mut self, reactor: &mut Reactor, listeners: &mut Listeners<'_>) -> io::Result<()> {
        let (number, life) = (self.number, self.life.clone());
        let (shared, kernel) = (Rc::clone(&self.shared), self.kernel.clone());
        let factory = move |_: &Address| {
            life.0.borrow_mut().connections += 1;
            Answers {
                number,
                life: life.clone(),
                shared: Rc::clone(&shared),
                kernel: kernel.clone(),
                part: Vec::new(),
                at_work: Rc::default(),
            }
        };
        listeners.listen(reactor, SERVICE, Memory::at(&self.kernel, SERVICE), factory)?;
        Ok(())
    }

    fn not_started(&mut self, _: &mut Reactor, _: &RestartError) {
        self.life.0.borrow_mut().is_declined = true;
    }

    // `handed_over` is the default: a graceful stop.
}

/// Answers each request after the time that its work takes.
struct Answers {
    number: usize,
    life: Life,
    shared: Shared,
    kernel: SimulatedKernel,
    /// The beginning of a request.
    part: Vec<u8>,
    /// How many have no answer yet.
    at_work: Rc<Cell<usize>>,
}

impl Answers {
    fn serve(&self, cx: &mut Context<'_, MemoryStream>, request: Request) {
        *self.shared.borrow_mut().served.entry(request).or_default() += 1;
        let work = self
            .kernel
            .choose(|random| [0, 0, 0, 40, 700][random.below(5)]);
        if work == 0 {
            cx.transport.write(&request);
            return;
        }
        self.at_work.update(|count| count + 1);
        let (at_work, handle) = (Rc::clone(&self.at_work), cx.transport.handle());
        cx.reactor.call_later(ms(work), move |reactor| {
            at_work.update(|count| count - 1);
            if let Some(transport) = reactor.get(handle) {
                transport.write(&request);
            }
        });
    }
}

impl Protocol<MemoryStream> for Answers {
    fn connection_made(&mut self, cx: &mut Context<'_, MemoryStream>) {
        let socket = cx.transport.socket_id();
        let world = &mut *self.shared.borrow_mut();
        world.accepted_by.insert(socket, self.number);
        let deadline = cx.reactor.stop_deadline();
        let is_taken = self.life.restart().is_some_and(|it| it.has_handed_over());
        if deadline.is_some() && is_taken {
            let line = format!("{} accepts, and has handed over", self.number);
            world.wrong.push(line);
        }
    }

    fn data_received(&mut self, cx: &mut Context<'_, MemoryStream>, data: &[u8]) {
        self.part.extend_from_slice(data);
        while let Some((first, rest)) = self.part.split_first_chunk::<LENGTH>() {
            let (first, rest) = (*first, rest.to_vec());
            self.part = rest;
            self.serve(cx, first);
        }
    }

    fn draining(&mut self, _: &mut Context<'_, MemoryStream>) -> AtDrain {
        self.shared.borrow_mut().goodbyes += 1;
        AtDrain::LoseWhenIdle
    }

    fn is_idle(&self) -> bool {
        self.part.is_empty() && self.at_work.get() == 0
    }

    fn connection_lost(&mut self, cx: &mut Context<'_, MemoryStream>, reason: &CloseReason) {
        let state = &mut *self.life.0.borrow_mut();
        state.connections -= 1;
        state.last_end = Some(cx.reactor.now());
        let unanswered = self.at_work.get();
        if unanswered > 0 {
            let line = format!("{unanswered} at work: {reason}");
            let lost = (line, Some(self.number));
            self.shared.borrow_mut().lost.push(lost);
        }
    }
}

/// Checks the answers.
struct Asks {
    client: usize,
    shared: Shared,
    part: Vec<u8>,
}

impl Protocol<MemoryStream> for Asks {
    fn data_received(&mut self, _: &mut Context<'_, MemoryStream>, data: &[u8]) {
        let world = &mut *self.shared.borrow_mut();
        self.part.extend_from_slice(data);
        while let Some((answer, rest)) = self.part.split_first_chunk::<LENGTH>() {
            let (answer, rest) = (*answer, rest.to_vec());
            self.part = rest;
            let client = &mut world.clients[self.client];
            let open = client.open.iter();
            let Some(at) = open
                .map(|number| request(self.client, *number))
                .position(|it| it == answer)
            else {
                let line = format!("{}: an answer to what it did not ask", self.client);
                return world.wrong.push(line);
            };
            let number = client.open.remove(at);
            client.answered.insert(number);
        }
    }

    fn connection_lost(&mut self, _: &mut Context<'_, MemoryStream>, reason: &CloseReason) {
        let world = &mut *self.shared.borrow_mut();
        let client = &mut world.clients[self.client];
        client.handle = None;
        client.is_paused = false;
        client.rest.clear();
        let open = std::mem::take(&mut client.open);
        // What it had sent was not read: the kernel says so. What it sent later found
        // nobody, of which it may make another.
        let is_reset = matches!(reason, CloseReason::Lost(error)
            if error.kind() == io::ErrorKind::ConnectionReset);
        if is_reset && !open.is_empty() {
            let end = client.server_end;
            let by = end.and_then(|end| world.accepted_by.get(&end)).copied();
            let line = format!("client {} is reset with {open:?}", self.client);
            world.lost.push((line, by));
        }
        client.again.extend(open);
    }
}

/// A run and who is in it.
struct Run {
    simulation: Simulation,
    shared: Shared,
    asking: ProcessId,
    manager: Manager,
    has_manager: bool,
    /// How long a process drains at the longest.
    drain: Duration,
    random: Random,
}

impl Run {
    fn new(mut simulation: Simulation, seed: u64) -> Self {
        let asking = simulation.spawn().expect("descriptors");
        let mut random = Random::new(seed.rotate_left(16));
        Self {
            simulation,
            shared: Shared::default(),
            asking,
            manager: Manager::new(),
            has_manager: random.chance(50),
            drain: ms([1_500, 4_000, 30_000][random.below(3)]),
            random,
        }
    }

    fn lives(&self) -> Vec<Life> {
        self.shared.borrow().lives.clone()
    }

    fn add_lives(shared: &Shared, count: usize) -> Life {
        let world = &mut *shared.borrow_mut();
        let all = (0..count).map(|_| Life::default());
        world.lives.extend(all);
        world.lives.last().expect("at least one").clone()
    }

    fn start(&mut self, number: usize, life: &Life) {
        let process = self.simulation.spawn().expect("descriptors");
        life.0.borrow_mut().process = Some(process);
        let kernel = self.simulation.kernel().clone();
        let mut settings = RestartSettings::simulated("/simulated", &kernel).drain(self.drain);
        if self.has_manager {
            settings.notifier = Some(Rc::new(Notifier::simulated(&kernel, MANAGER)));
        }
        let server = Server {
            number,
            life: life.clone(),
            shared: Rc::clone(&self.shared),
            kernel,
        };
        let reactor = self.simulation.reactor(process).expect("it lives");
        let drains = life.clone();
        reactor.add_trigger(Phase::Before, SystemEvent::Shutdown, move |reactor| {
            drains.note_drain(reactor);
        });
        match Restart::begin(reactor, settings, server) {
            Ok(restart) => life.0.borrow_mut().restart = Some(restart),
            Err(_) => life.0.borrow_mut().is_declined = true,
        }
    }

    fn serving(&self) -> Option<Life> {
        self.lives().into_iter().find(Life::serves)
    }

    /// Whether somebody is about to serve.
    fn is_starting(&self) -> bool {
        self.lives().iter().any(|life| {
            let is_on_its_way = life.restart().is_none_or(|it| !it.is_serving());
            let has_been = life.restart().is_some_and(|it| it.has_handed_over());
            !life.is_over() && !life.0.borrow().is_declined && is_on_its_way && !has_been
        })
    }

    // What happens.

    /// Replaces who serves.
    fn restart(&mut self) {
        let Some(life) = self.serving().filter(|_| !self.is_starting()) else {
            return;
        };
        let (process, restart) = (life.0.borrow().process, life.restart());
        let (Some(process), Some(restart)) = (process, restart) else {
            return;
        };
        if let Some(reactor) = self.simulation.reactor(process) {
            let shared = Rc::clone(&self.shared);
            let start = || Ok(Box::new(Self::add_lives(&shared, 1)) as Box<dyn ChildProcess>);
            // One that is under way is one too many.
            let is_started = restart.start_successor_with(reactor, start).is_ok();
            self.shared.borrow_mut().restarts += usize::from(is_started);
        }
    }

    /// Ends who serves, and starts some at the same moment.
    fn stop(&mut self) {
        let Some(life) = self.serving().filter(|_| !self.is_starting()) else {
            return;
        };
        self.stop_gracefully(&life);
        let count = 1 + self.random.below(3);
        Self::add_lives(&self.shared, count);
    }

    fn stop_gracefully(&mut self, life: &Life) {
        let process = life.0.borrow().process.expect("it serves");
        let grace = ms([0, 100, 500][self.random.below(3)]);
        let how = GracefulStop::new().deadline(self.drain).grace(grace);
        if let Some(reactor) = self.simulation.reactor(process) {
            reactor.stop_gracefully(how).expect("it runs");
            self.shared.borrow_mut().stops += 1;
        }
    }

    /// Tells one that drains not to wait, or kills one.
    fn hurry(&mut self) {
        let lives = self.lives();
        let life = &lives[self.random.below(lives.len())];
        let process = life.0.borrow().process;
        let Some(process) = process.filter(|_| !life.is_over()) else {
            return;
        };
        if self.random.chance(30) {
            self.simulation.kill(process);
            return;
        }
        if life.is_draining()
            && let Some(reactor) = self.simulation.reactor(process)
        {
            life.0.borrow_mut().is_hurried = true;
            let _ = reactor.stop_now();
        }
    }

    fn add_client(&mut self) {
        let wanted = 1 + self.random.below(12) as u32;
        self.shared.borrow_mut().clients.push(Client {
            wanted,
            next: 0,
            again: Vec::new(),
            answered: BTreeSet::new(),
            open: Vec::new(),
            rest: Vec::new(),
            handle: None,
            server_end: None,
            is_paused: false,
        });
    }

    /// Connects a client that has none; where nobody listens, later.
    fn connect(&mut self, number: usize) {
        let kernel = self.simulation.kernel();
        let Ok(socket) = kernel.connect(SERVICE) else {
            return;
        };
        let end = kernel.connected(SERVICE).last().map(|(_, theirs)| *theirs);
        let asks = Asks {
            client: number,
            shared: Rc::clone(&self.shared),
            part: Vec::new(),
        };
        let reactor = self.simulation.reactor(self.asking).expect("never dies");
        let handle = socket.adopt(reactor, asks).expect("a slot");
        let client = &mut self.shared.borrow_mut().clients[number];
        client.handle = Some(handle);
        client.server_end = end;
    }

    /// Has a client finish what it has begun, and make so many requests more, the last of
    /// them in part.
    fn ask(&mut self, number: usize, count: usize, in_part: bool) {
        let (handle, bytes) = {
            let world = &mut *self.shared.borrow_mut();
            let client = &mut world.clients[number];
            let Some(handle) = client.handle else { return };
            let mut bytes = std::mem::take(&mut client.rest);
            for _ in 0..count {
                let next = client.again.pop().or_else(|| {
                    let is_one = client.next < client.wanted;
                    client.next += u32::from(is_one);
                    is_one.then(|| client.next - 1)
                });
                let Some(next) = next else { break };
                client.open.push(next);
                bytes.extend(request(number, next));
                world.requests += 1;
            }
            if in_part && bytes.len() >= LENGTH {
                client.rest = bytes.split_off(bytes.len() - 3);
            }
            (handle, bytes)
        };
        if let Some(transport) = self.simulation.get(self.asking, handle) {
            transport.write(&bytes);
        }
    }

    /// Has everybody ask at the very moment at which something is due, the end of a grace
    /// say: the server may come to that before it hears of all of them.
    fn ask_at_the_last_moment(&mut self) {
        let clock = self.simulation.clock().clone();
        self.settle();
        // What is due far ahead comes nearer in several steps.
        for _ in 0..self.random.below(4) {
            if let Some(due) = self.simulation.next_deadline() {
                self.pass_to(due);
            }
        }
        let Some(due) = self.simulation.next_deadline() else {
            return;
        };
        clock.advance(due.saturating_duration_since(clock.now()));
        for number in 0..self.clients() {
            self.ask(number, 1, false);
        }
        // What they ask leaves first.
        if let Some(reactor) = self.simulation.reactor(self.asking) {
            reactor.turn(Some(Duration::ZERO));
        }
    }

    /// Has a client stop reading, or go on.
    fn pause(&mut self, number: usize, is_paused: bool) {
        let handle = {
            let client = &mut self.shared.borrow_mut().clients[number];
            client.is_paused = is_paused;
            client.handle
        };
        if let Some(transport) = handle.and_then(|it| self.simulation.get(self.asking, it)) {
            match is_paused {
                true => transport.pause_producing(),
                false => transport.resume_producing(),
            }
        }
    }

    fn clients(&self) -> usize {
        self.shared.borrow().clients.len()
    }

    fn has_open(&self) -> bool {
        self.shared.borrow().clients.iter().any(Client::has_more)
    }

    fn step(&mut self) {
        let clients = self.clients();
        let client = (clients > 0).then(|| self.random.below(clients));
        match (self.random.below(20), client) {
            (0 | 1, _) => self.add_client(),
            (2..=8, Some(client)) => {
                let count = 1 + self.random.below(3);
                let in_part = self.random.chance(15);
                self.ask(client, count, in_part);
            }
            (9, Some(client)) => {
                let is_paused = self.random.chance(40);
                self.pause(client, is_paused);
            }
            (10 | 11, _) => {
                let by = self.random.below(700) as u64;
                self.advance(ms(by));
            }
            (12, _) => {
                let by = self.random.below(6_000) as u64;
                self.advance(ms(by));
            }
            (13, _) => self.restart(),
            (14, _) => self.stop(),
            (15, _) if self.random.chance(20) => self.hurry(),
            (17 | 18, _) => self.ask_at_the_last_moment(),
            (16, _) => {
                let kernel = self.simulation.kernel().clone();
                self.manager.change(&kernel, &mut self.random);
            }
            _ => {
                for _ in 0..self.random.below(30) {
                    self.turn();
                }
            }
        }
    }

    /// Has all clients make the rest of their requests, and the last server end.
    fn end(&mut self) {
        let kernel = self.simulation.kernel().clone();
        self.manager.be_there(&kernel);
        self.manager.reads_percent = 100;
        for _ in 0..200 {
            if !self.has_open() {
                break;
            }
            for number in 0..self.clients() {
                self.pause(number, false);
                self.ask(number, usize::MAX, false);
            }
            self.advance(ms(1_000));
        }
        // Whoever is to take over has done so by then.
        self.advance(Duration::from_secs(100));
        if self.lives().iter().all(Life::is_over) {
            self.start_anew();
            self.settle();
        }
        let serving: Vec<_> = self.lives().into_iter().filter(Life::serves).collect();
        assert_eq!(serving.len(), 1, "serve");
        self.stop_gracefully(&serving[0]);
        self.advance(Duration::from_secs(100));
        assert!(self.lives().iter().all(Life::is_over), "somebody is left");
    }

    // The end of processes.

    /// Looks whether a process has ended, and whether it was right to.
    fn look(&mut self, number: usize, life: &Life) {
        let Some(process) = life.0.borrow().process.filter(|_| !life.is_over()) else {
            return;
        };
        let now = self.simulation.clock().now();
        let Some(reactor) = self.simulation.reactor(process) else {
            return self.bury(life, Exit::Killed);
        };
        life.note_drain(reactor);
        if reactor.is_running() {
            let state = life.0.borrow();
            if state.is_declined {
                drop(state);
                self.simulation.kill(process);
                self.bury(life, Exit::Declined);
            }
            return;
        }
        let cut = reactor.statistics().cut;
        self.simulation.kill(process);
        let is_hurried = life.0.borrow().is_hurried;
        let (since, until) = life.0.borrow().drains.expect("it has drained");
        let last_end = life.0.borrow().last_end;
        let farewell = FAREWELLS[usize::from(self.has_manager)];
        let exit = if cut == 0 { Exit::InTime } else { Exit::Cut };
        let is_right = match exit {
            _ if is_hurried => now <= until,
            Exit::Cut => now == until,
            // No later than its last connection, and its last word.
            _ => now <= last_end.map_or(since, |last| last.max(since)) + farewell,
        };
        let world = &mut *self.shared.borrow_mut();
        world.cuts += usize::from(exit == Exit::Cut);
        if !is_right {
            let [from, to, last] = [since, until, last_end.unwrap_or(since)].map(|it| {
                let ahead = it.saturating_duration_since(now);
                (ahead, now.saturating_duration_since(it))
            });
            let line = format!("{number} ended at {from:?} {to:?} {last:?} with {cut} cut");
            world.wrong.push(line);
        }
        drop(std::mem::take(&mut life.0.borrow_mut().restart));
        life.0.borrow_mut().exit = Some(exit);
    }

    /// Nobody is left, for which somebody has to have been killed since the last time: who
    /// was told to stop left others, who were started in the same moment.
    fn start_anew(&self) {
        let world = &mut *self.shared.borrow_mut();
        let exits = world.lives.iter().map(|life| life.0.borrow().exit);
        let killed = exits.filter(|it| *it == Some(Exit::Killed)).count();
        if std::mem::replace(&mut world.killed, killed) == killed {
            let line = "nobody serves, and nobody was killed".to_owned();
            world.wrong.push(line);
        }
        world.lives.push(Life::default());
    }

    fn bury(&self, life: &Life, exit: Exit) {
        let restart = life.0.borrow_mut().restart.take();
        life.0.borrow_mut().exit = Some(exit);
        drop(restart);
    }
}

impl System for Run {
    fn simulation(&mut self) -> &mut Simulation {
        &mut self.simulation
    }

    fn act(&mut self) {
        if self.manager.has_unread() && self.random.chance(self.manager.reads_percent) {
            self.manager.read();
        }
        for (number, life) in self.lives().iter().enumerate() {
            match life.0.borrow().process {
                Some(_) => {}
                None => continue,
            }
            self.look(number, life);
        }
        for (number, life) in self.lives().iter().enumerate() {
            let is_new = life.0.borrow().process.is_none() && !life.is_over();
            if is_new {
                self.start(number, life);
            }
        }
        if self.lives().iter().all(Life::is_over) && self.has_open() {
            self.start_anew();
        }
        for number in 0..self.clients() {
            let is_without = {
                let world = self.shared.borrow();
                let client = &world.clients[number];
                client.handle.is_none() && client.has_more()
            };
            if is_without {
                self.connect(number);
            }
        }
    }

    fn is_acting(&self) -> bool {
        let is_reading = self.manager.reads_percent == 100 && self.manager.has_unread();
        let is_new = |life: &Life| life.0.borrow().process.is_none() && !life.is_over();
        is_reading || self.lives().iter().any(is_new)
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        for life in self.lives() {
            let restart = life.0.borrow_mut().restart.take();
            drop(restart);
        }
    }
}

/// What a run leaves to be compared, and what was in it.
#[derive(Debug, PartialEq, Eq)]
struct Trace {
    fingerprint: u64,
    requests: usize,
    restarts: usize,
    stops: usize,
    in_time: usize,
    cuts: usize,
    goodbyes: usize,
    lost: usize,
}

fn simulate(seed: u64) -> Trace {
    let _ = env_logger::try_init();
    let mut random = Random::new(!seed);
    let kernel = SimulatedKernel::with_seed(seed);
    // No errors that pass: a kernel that says "would block" of what is there takes the last
    // look for nothing.
    kernel.set_settings(
        KernelSettings::default()
            .send_buffer([4_608, 20_000, 212_992][random.below(3)])
            .cut_percent([0, 20, 60][random.below(3)])
            .delivery([Delivery::Batch, Delivery::OneAtATime, Delivery::Random][random.below(3)])
            .bound_first_percent([0, 50, 100][random.below(3)]),
    );
    let mut run = Run::new(Simulation::with_kernel(kernel.clone()), seed);
    Run::add_lives(&run.shared, 1 + random.below(3));
    run.settle();
    for _ in 0..60 + random.below(100) {
        run.step();
    }
    run.end();

    let world = run.shared.borrow();
    assert!(world.wrong.is_empty(), "{:?}", world.wrong);
    let exits: Vec<_> = world.lives.iter().map(|it| it.0.borrow().exit).collect();
    let harms = [Some(Exit::Cut), Some(Exit::Killed)];
    let has_harmed = exits.iter().any(|it| harms.contains(it));
    for (line, by) in &world.lost {
        let is_excused = match by {
            Some(number) => harms.contains(&exits[*number]),
            None => has_harmed,
        };
        assert!(is_excused, "{line}, by {by:?}: {exits:?}");
    }
    for (number, client) in world.clients.iter().enumerate() {
        assert!(!client.has_more(), "client {number} has no answer");
    }
    let twice = world.served.values().filter(|count| **count > 1).count();
    assert!(twice == 0 || has_harmed, "{twice} were done twice");
    let trace = Trace {
        fingerprint: kernel.fingerprint(),
        requests: world.requests,
        restarts: world.restarts,
        stops: world.stops,
        in_time: exits.iter().filter(|it| **it == Some(Exit::InTime)).count(),
        cuts: world.cuts,
        goodbyes: world.goodbyes,
        lost: world.lost.len(),
    };
    drop(world);
    drop(run);
    assert_eq!((kernel.open_sockets(), kernel.open_listeners()), (0, 0));
    trace
}

/// Reliability T-37: a process that is replaced, or is told to stop, ends with the last of
/// its connections, or at its deadline; no request that had arrived is lost by it, or done
/// twice, unless it was cut or killed; it accepts nobody meanwhile. `BOWLINE_SEED=7 cargo
/// test --test memory drains` replays one seed.
#[test]
fn every_seed_of_drains_loses_no_request_and_ends_in_time() {
    let ledger = DescriptorLedger::open();
    let mut sums = [0; 7];
    let counted = every_seed((300, 2_000), simulate, |trace: Trace| {
        let all = [
            trace.requests,
            trace.restarts,
            trace.stops,
            trace.in_time,
            trace.cuts,
            trace.goodbyes,
            trace.lost,
        ];
        for (sum, one) in sums.iter_mut().zip(all) {
            *sum += one;
        }
    });
    let Some((seeds, equal)) = counted else {
        return;
    };
    let [requests, restarts, stops, in_time, cuts, goodbyes, lost] = sums;
    Figures::of("T-37")
        .must("seeds of drains", seeds, Bound::AtLeast, scaled(300, 2_000))
        .must(
            "drains of a seed that went the same way again",
            equal,
            Bound::Exactly,
            seeds,
        )
        .must("requests made", requests, Bound::AtLeast, seeds * 10)
        .must("processes replaced", restarts, Bound::AtLeast, seeds)
        .must("processes told to stop", stops, Bound::AtLeast, seeds)
        .must("of them that ended in time", in_time, Bound::AtLeast, seeds)
        .must("of them that were cut", cuts, Bound::AtLeast, seeds / 10)
        .must("connections told to drain", goodbyes, Bound::AtLeast, seeds)
        .must(
            "losses by those that were cut or killed",
            lost,
            Bound::AtLeast,
            seeds / 20,
        );
    ledger.assert_balanced();
}
