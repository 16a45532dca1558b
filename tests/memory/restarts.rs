//! Whole runs from a seed of a program that is restarted while it serves:
//! successors that its processes start or that come by themselves, that cannot
//! listen, refuse connections, die at any point or hang; processes that serve and
//! die; a service manager that is slow, full, away or made anew; a kernel that cuts, delays and fails. The restart is that of
//! `bowline::handoff::restart`, as it is, and so are the listeners. Connections live
//! through several processes, each of which goes on where the last one was.

mod cuts;
mod drains;

use std::cell::RefCell;
use std::fmt::Write as _;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::rc::Rc;
use std::time::Duration;

use bowline::handoff::restart::{
    Listeners, Movable, MoveTicket, Moved, Packed, Program, Restart, RestartError, RestartSettings,
    Start,
};
use bowline::handoff::systemd::Notifier;
use bowline::process::ChildProcess;
use bowline::testing::{
    Delivery, KernelSettings, Memory, MemoryDatagrams, MemoryHandle, MemorySocket, MemoryStream,
    Points, ProcessId, Random, SimulatedKernel, Simulation,
};
use bowline::{
    Address, AfterReadClosed, AnyConnection as _, CloseReason, Context, Protocol, Reactor,
    Transport,
};

use crate::seeds::{System, every_seed};
use crate::support::figures::{Bound, Figures, scaled};
use crate::support::{DescriptorLedger, Staged};

/// Where processes die.
const POINTS: [&str; 7] = [
    "listening",
    "started",
    "failed",
    "packed",
    "moved",
    "serving",
    "made",
];
/// What the program listens on.
const SERVICE: &str = "service";
/// Where the service manager is, and how many notices it has room for.
const MANAGER: &str = "manager";
const ROOM: usize = 3;
/// Longer than any run.
const FOREVER: Duration = Duration::from_secs(1_000_000);
/// A client says first which one it is.
const NAME_BYTES: usize = 4;

/// A client's connection, as seen from above.
struct Job {
    /// How much is sent, and comes back, in all.
    length: usize,
    sent: usize,
    received: usize,
    client: MemoryHandle,
    /// Which processes have had it, one after the other.
    had_by: Vec<usize>,
    /// How many processes had been killed when it connected.
    killed_before: usize,
    /// Whether everything came back, once it has come to an end.
    outcome: Option<bool>,
}

#[derive(Default)]
struct World {
    jobs: Vec<Job>,
    lives: Vec<Life>,
    wrong: Vec<String>,
    killed: usize,
    taken_over: usize,
    moved: usize,
    /// Who has come to serve, one after the other, and whether it took over.
    successions: Vec<(usize, bool)>,
    /// How many have looked again for somebody who hands over.
    looked_again: usize,
    /// And in vain.
    gave_up: usize,
    /// Whether channels break, so that nobody hears that the other has told the manager.
    has_breaks: bool,
    untold: usize,
    /// How many had died when somebody was last seen to serve.
    deaths_before: Option<usize>,
}

impl World {
    /// How many were killed, or have died at a point of theirs.
    fn deaths(&self) -> usize {
        let states = self.lives.iter().map(|life| life.state.borrow());
        states
            .filter(|state| state.is_dead && !state.has_exited)
            .count()
    }

    /// Who took over from it, if somebody has and was told so.
    fn heir_of(&self, number: usize) -> Option<&Life> {
        let mut later = self.successions.iter().skip_while(|it| it.0 != number);
        let (heir, has_taken_over) = later.nth(1)?;
        has_taken_over.then(|| &self.lives[*heir])
    }
}

type Shared = Rc<RefCell<World>>;

/// A process of the program, as the run, its starter and its own code see it.
#[derive(Clone)]
struct Life {
    number: usize,
    /// Started by the one that served, which can end it.
    is_child: bool,
    state: Rc<RefCell<LifeState>>,
}

#[derive(Default)]
struct LifeState {
    process: Option<ProcessId>,
    /// Let go of with the process: it owns the program, which has a way to it.
    restart: Option<Restart>,
    is_killed: bool,
    has_exited: bool,
    is_dead: bool,
    /// Exits when it has no connection any more.
    is_leaving: bool,
    is_suspended: bool,
    /// It was at some time.
    was_suspended: bool,
    notifier: Option<Rc<Notifier>>,
    /// The manager has taken all that it had said when it came to serve.
    has_told: bool,
    /// The manager took too long for it.
    is_untold: bool,
    /// It died before it served.
    was_taking_over: bool,
    connections: usize,
}

impl LifeState {
    fn has_left(&self) -> bool {
        self.is_leaving && self.connections == 0
    }
}

impl Life {
    fn restart(&self) -> Option<Restart> {
        self.state.borrow().restart.clone()
    }

    /// Whether it serves, as it sees that.
    fn serves(&self) -> bool {
        let is_alive = !self.state.borrow().is_dead;
        is_alive && self.restart().is_some_and(|restart| restart.is_serving())
    }

    /// Whether nothing that it said of handing over waits for the manager, or the
    /// manager took too long for it.
    fn has_told_of_heir(&self) -> bool {
        let state = self.state.borrow();
        let notifier = state.notifier.as_ref();
        let is_waiting = notifier.is_some_and(|it| it.waiting() > 0);
        !is_waiting || state.is_untold || state.was_suspended
    }

    /// Whether the manager knows that it serves, or took too long, or hears of it from
    /// the kernel: it is dead. What it says later, of restarts of its own, is not what
    /// its predecessor waits for; nor are its own heirs, for which it waits itself.
    fn is_known(&self) -> bool {
        let state = self.state.borrow();
        let notifier = state.notifier.as_ref();
        // One that has just died is attached no more.
        let is_dead = !notifier.is_some_and(|it| it.is_attached());
        state.has_told || is_dead || state.is_untold || state.was_suspended
    }

    /// Notes when the manager knows of all that it has said by now.
    fn watch_manager(&self, reactor: &mut Reactor) {
        let notifier = self.state.borrow().notifier.clone();
        let Some(notifier) = notifier else { return };
        let state = Rc::clone(&self.state);
        let watched = notifier.when_sent(reactor, FOREVER, move |_, result| {
            state.borrow_mut().has_told = result.is_ok();
        });
        watched.expect("it is attached");
    }

    fn leave(&self) {
        self.state.borrow_mut().is_leaving = true;
    }
}

/// The starter's side of it.
struct Child(Life);

impl ChildProcess for Child {
    /// In a simulation all are one process.
    fn pid(&self) -> u32 {
        std::process::id()
    }

    /// It dies some time later, as processes do.
    fn kill(&mut self) -> io::Result<()> {
        self.0.state.borrow_mut().is_killed = true;
        Ok(())
    }

    fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        let is_dead = self.0.state.borrow().is_dead;
        Ok(is_dead.then(|| ExitStatus::from_raw(9)))
    }
}

/// What each process is.
#[derive(Clone)]
struct Server {
    life: Life,
    shared: Shared,
    points: Points,
    kernel: SimulatedKernel,
    /// It cannot listen.
    is_broken: bool,
    /// It knows no connections of others.
    is_foreign: bool,
    /// So many of a hundred connections want to stay.
    stays_percent: u8,
}

impl Server {
    fn echo(&self) -> Echo {
        self.life.state.borrow_mut().connections += 1;
        Echo {
            server: self.clone(),
            seen: 0,
            name: [0; NAME_BYTES],
            unread: Vec::new(),
            has_ended: false,
            ticket: None,
        }
    }

    /// It serves, or is not going to.
    fn note_looks(&self) {
        let looks = self.life.restart().map_or(0, |restart| restart.looks());
        self.shared.borrow_mut().looked_again += usize::from(looks > 1);
    }

    fn note_had(&self, name: [u8; NAME_BYTES]) {
        let world = &mut *self.shared.borrow_mut();
        let number = u32::from_le_bytes(name) as usize;
        let Some(job) = world.jobs.get_mut(number) else {
            return world.wrong.push(format!("there is no client {number}"));
        };
        if job.had_by.last() != Some(&self.life.number) {
            job.had_by.push(self.life.number);
        }
    }
}

impl Program for Server {
    fn listen(&mut self, reactor: &mut Reactor, listeners: &mut Listeners<'_>) -> io::Result<()> {
        self.points.pass("listening");
        if self.is_broken {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let server = self.clone();
        let factory = move |_: &Address| server.echo();
        listeners.listen(reactor, SERVICE, Memory::at(&self.kernel, SERVICE), factory)?;
        Ok(())
    }

    fn serving(&mut self, reactor: &mut Reactor, start: Start) {
        self.life.watch_manager(reactor);
        self.note_looks();
        let world = &mut *self.shared.borrow_mut();
        let has_taken_over = matches!(start, Start::TookOver { .. });
        world.successions.push((self.life.number, has_taken_over));
        world.deaths_before = Some(world.deaths());
        if has_taken_over {
            world.taken_over += 1;
        } else {
            let number = self.life.number;
            let others = world.lives.iter().filter(|it| it.number != number);
            let serve: Vec<_> = others
                .filter(|it| it.serves())
                .map(|it| it.number)
                .collect();
            if !serve.is_empty() {
                let line = format!("process {number} started cold beside {serve:?}");
                world.wrong.push(line);
            }
        }
        self.points.pass("started");
    }

    fn not_started(&mut self, _: &mut Reactor, error: &RestartError) {
        self.note_looks();
        let world = &mut *self.shared.borrow_mut();
        world.gave_up += usize::from(matches!(error, RestartError::LookedInVain { .. }));
        if !world.lives.iter().any(Life::serves) {
            // It was the last that held the listener.
            world.killed += 1;
        }
        self.points.pass("failed");
        self.life.leave();
    }

    fn manager_not_told(&mut self, _: &mut Reactor, _: &RestartError) {
        self.life.state.borrow_mut().is_untold = true;
        self.shared.borrow_mut().untold += 1;
    }

    fn handed_over(&mut self, _: &mut Reactor, _: Duration) {
        let world = &mut *self.shared.borrow_mut();
        let heir = world.heir_of(self.life.number);
        let is_known = self.life.has_told_of_heir() && heir.is_none_or(Life::is_known);
        if !is_known && !world.has_breaks {
            let line = format!("{} ends before the manager knows", self.life.number);
            world.wrong.push(line);
        }
        self.life.leave();
    }

    fn takes(&self, kind: &str) -> bool {
        kind == Echo::KIND && !self.is_foreign
    }

    fn connection_moved(&mut self, reactor: &mut Reactor, moved: Moved) {
        self.shared.borrow_mut().moved += 1;
        let Packed { state, unread, .. } = moved.packed;
        let mut echo = self.echo();
        let (seen, name) = state.split_at(8);
        echo.seen = u64::from_le_bytes(seen.try_into().expect("eight")) as usize;
        echo.name.copy_from_slice(name);
        echo.unread = unread;
        if echo.seen >= NAME_BYTES {
            self.note_had(echo.name);
        }
        self.points.pass("moved");
        let socket = MemorySocket::from_descriptor(moved.fd).expect("it stands for one");
        let adopted = socket.adopt_with(reactor, echo, moved.unsent);
        adopted.expect("a slot");
    }
}

/// Sends back what comes, each byte changed by its place in the stream.
struct Echo {
    server: Server,
    seen: usize,
    name: [u8; NAME_BYTES],
    /// Brought along, and not seen yet.
    unread: Vec<u8>,
    has_ended: bool,
    ticket: Option<MoveTicket>,
}

fn changed(byte: u8, place: usize) -> u8 {
    byte ^ (place as u8).rotate_left(3)
}

impl Protocol<MemoryStream> for Echo {
    fn connection_made(&mut self, cx: &mut Context<'_, MemoryStream>) {
        self.server.points.pass("made");
        let handle = cx.transport.handle();
        if let Some(restart) = self.server.life.restart() {
            self.ticket = Some(restart.movable::<MemoryStream, Self>(handle));
        }
        cx.transport.push_back(std::mem::take(&mut self.unread));
    }

    fn data_received(&mut self, cx: &mut Context<'_, MemoryStream>, data: &[u8]) {
        self.server.points.pass("serving");
        let mut answer = Vec::with_capacity(data.len());
        for byte in data {
            if let Some(place) = self.name.get_mut(self.seen) {
                *place = *byte;
            }
            answer.push(changed(*byte, self.seen));
            self.seen += 1;
        }
        if self.seen >= NAME_BYTES {
            self.server.note_had(self.name);
        }
        cx.transport.write(&answer);
    }

    fn read_connection_lost(&mut self, _: &mut Context<'_, MemoryStream>) -> AfterReadClosed {
        self.has_ended = true;
        AfterReadClosed::LoseConnection
    }
}

impl Movable for Echo {
    const KIND: &'static str = "echo";

    fn pack(&mut self) -> Option<Packed> {
        self.server.points.pass("packed");
        let stays = self
            .server
            .kernel
            .choose(|random| random.chance(self.server.stays_percent));
        if self.has_ended || stays {
            return None;
        }
        let mut state = (self.seen as u64).to_le_bytes().to_vec();
        state.extend(self.name);
        Some(Packed {
            state,
            ..Packed::default()
        })
    }

    fn unpack(&mut self, _: Packed) {}
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.server.life.state.borrow_mut().connections -= 1;
    }
}

/// Sends when it is told to, and checks what comes back.
struct Client {
    number: usize,
    shared: Shared,
}

fn request(number: usize, place: usize) -> u8 {
    let name = (number as u32).to_le_bytes();
    let filling = (place * 7 + number) as u8;
    name.get(place).copied().unwrap_or(filling)
}

impl Protocol<MemoryStream> for Client {
    fn data_received(&mut self, _: &mut Context<'_, MemoryStream>, data: &[u8]) {
        let world = &mut *self.shared.borrow_mut();
        let job = &mut world.jobs[self.number];
        for byte in data {
            let place = job.received;
            let is_right = *byte == changed(request(self.number, place), place) && place < job.sent;
            // The first says it all.
            if !is_right && world.wrong.is_empty() {
                let line = format!(
                    "client {}: wrong at {place}, had by {:?}",
                    self.number, job.had_by
                );
                world.wrong.push(line);
            }
            job.received += 1;
        }
    }

    fn connection_lost(&mut self, _: &mut Context<'_, MemoryStream>, _: &CloseReason) {
        let world = &mut *self.shared.borrow_mut();
        let job = &mut world.jobs[self.number];
        job.outcome = Some(job.received == job.length);
    }
}

/// The service manager: it reads always, slowly or not at all, or is not there.
struct Manager {
    receives: Option<MemoryDatagrams>,
    reads_percent: u8,
    heard: Vec<String>,
}

impl Manager {
    fn new() -> Self {
        Self {
            receives: None,
            reads_percent: 0,
            heard: Vec::new(),
        }
    }

    fn has_unread(&self) -> bool {
        let receives = self.receives.as_ref();
        receives.is_some_and(|receives| receives.waiting() > 0)
    }

    fn read(&mut self) {
        let datagram = self.receives.as_ref().and_then(MemoryDatagrams::receive);
        if let Some((text, _)) = datagram {
            let text = String::from_utf8(text).expect("text");
            self.heard.push(text);
        }
    }

    /// Goes on in another way; what it has not read is lost where it is made anew.
    fn change(&mut self, kernel: &SimulatedKernel, random: &mut Random) {
        match random.below(6) {
            0 => self.receives = None,
            1 => self.reads_percent = 0,
            2 => self.reads_percent = 5,
            _ => self.reads_percent = 100,
        }
        if random.chance(50) {
            self.be_there(kernel);
        }
    }

    fn be_there(&mut self, kernel: &SimulatedKernel) {
        if self.receives.is_none() {
            self.receives = Some(kernel.datagrams(MANAGER, ROOM).expect("nobody else"));
        }
    }
}

/// A run and who is in it.
struct Run {
    simulation: Simulation,
    shared: Shared,
    clients: ProcessId,
    manager: Manager,
    /// How the processes of this run are.
    has_manager: bool,
    broken_percent: u8,
    stays_percent: u8,
    random: Random,
}

impl Run {
    fn new(mut simulation: Simulation, seed: u64, random: &mut Random) -> Self {
        let clients = simulation.spawn().unwrap();
        Self {
            simulation,
            shared: Shared::default(),
            clients,
            manager: Manager::new(),
            has_manager: random.chance(75),
            broken_percent: [0, 0, 30][random.below(3)],
            stays_percent: [0, 20][random.below(2)],
            random: Random::new(seed.rotate_left(32)),
        }
    }

    fn lives(&self) -> Vec<Life> {
        self.shared.borrow().lives.clone()
    }

    /// A process that is yet to be started.
    fn new_life(shared: &Shared, is_child: bool) -> Life {
        let world = &mut *shared.borrow_mut();
        let life = Life {
            number: world.lives.len(),
            is_child,
            state: Rc::default(),
        };
        world.lives.push(life.clone());
        life
    }

    fn start(&mut self, life: &Life) {
        let process = self.simulation.spawn().expect("descriptors");
        life.state.borrow_mut().process = Some(process);
        let kernel = self.simulation.kernel().clone();
        let mut settings = RestartSettings::simulated("/simulated", &kernel);
        settings.drain = FOREVER;
        if self.has_manager {
            let notifier = Rc::new(Notifier::simulated(&kernel, MANAGER));
            settings.notifier = Some(Rc::clone(&notifier));
            life.state.borrow_mut().notifier = Some(notifier);
        }
        let server = Server {
            life: life.clone(),
            shared: Rc::clone(&self.shared),
            points: self.simulation.points(process),
            kernel,
            is_broken: self.random.chance(self.broken_percent),
            is_foreign: self.random.chance(self.broken_percent / 2),
            stays_percent: self.stays_percent,
        };
        let reactor = self.simulation.reactor(process).expect("it lives");
        match Restart::begin(reactor, settings, server) {
            Ok(restart) => life.state.borrow_mut().restart = Some(restart),
            // As real ones do.
            Err(_) => life.state.borrow_mut().has_exited = true,
        }
    }

    /// The processes that serve, as they see it.
    fn serving(&self) -> Vec<Life> {
        let mut lives = self.lives();
        lives.retain(Life::serves);
        lives
    }

    fn add_client(&mut self, length: usize) {
        self.act();
        let kernel = self.simulation.kernel();
        let is_bound_only = kernel.is_listening(SERVICE) == Some(false);
        let Ok(socket) = kernel.connect(SERVICE) else {
            let serving = self.serving();
            let is_right = serving.is_empty() || is_bound_only;
            assert!(is_right, "{} serve", serving.len());
            return;
        };
        let number = self.shared.borrow().jobs.len();
        let client = Client {
            number,
            shared: Rc::clone(&self.shared),
        };
        let reactor = self.simulation.reactor(self.clients).expect("never dies");
        let client = socket.adopt(reactor, client).expect("a slot");
        let world = &mut *self.shared.borrow_mut();
        // Where the last that served has died, the queue is kept by one that has not got
        // everything, and goes when that hears of it.
        let is_orphan = !world.lives.iter().any(Life::serves)
            && world
                .deaths_before
                .is_some_and(|before| world.deaths() > before);
        let killed_before = world.killed.saturating_sub(usize::from(is_orphan));
        world.jobs.push(Job {
            length: length.max(NAME_BYTES),
            sent: 0,
            received: 0,
            client,
            had_by: Vec::new(),
            killed_before,
            outcome: None,
        });
    }

    /// Has a client send more, and the last of them close.
    fn prod(&mut self, number: usize, count: usize) {
        let (client, bytes, is_last) = {
            let world = &mut *self.shared.borrow_mut();
            let job = &mut world.jobs[number];
            let count = count.min(job.length - job.sent);
            let bytes: Vec<u8> = (job.sent..job.sent + count)
                .map(|place| request(number, place))
                .collect();
            job.sent += count;
            (job.client, bytes, job.sent == job.length)
        };
        if let Some(transport) = self.simulation.get(self.clients, client) {
            transport.write(&bytes);
            if is_last {
                transport.lose_write_connection();
            }
        }
    }

    /// Whether a process is about to take over that came by itself.
    fn has_stranger(&self) -> bool {
        self.lives().iter().any(|life| {
            let state = life.state.borrow();
            !life.is_child && !state.is_dead && !state.is_leaving && !life.serves()
        })
    }

    /// Processes come by themselves, at the same moment. All have the same number here, so
    /// that they would be taken for a child that somebody has started; and somebody who is
    /// stopped for so long that he fails one lets it believe that it is alone.
    fn add_strangers(&self, count: usize) {
        let is_quiet = self.lives().iter().all(|life| {
            let is_under_way = life.restart().is_some_and(|it| it.is_under_way());
            !is_under_way && !life.state.borrow().is_suspended
        });
        if is_quiet {
            self.start_some(count);
        }
    }

    /// So many start at the same moment.
    fn start_some(&self, count: usize) {
        for _ in 0..count {
            Self::new_life(&self.shared, false);
        }
    }

    fn suspend(&mut self, life: &Life, process: ProcessId) {
        // One that hangs and that nobody can end loses what it was given.
        if life.is_child || life.serves() && !self.has_stranger() {
            let state = &mut *life.state.borrow_mut();
            state.is_suspended = true;
            state.was_suspended = true;
            self.simulation.suspend(process);
        }
    }

    fn resume(&mut self) {
        for life in self.lives() {
            let state = &mut *life.state.borrow_mut();
            state.is_suspended = false;
            if let Some(process) = state.process {
                self.simulation.resume(process);
            }
        }
    }

    /// Has a process that serves start its successor.
    fn restart(&mut self, life: &Life) {
        if self.has_stranger() {
            return;
        }
        let process = life.state.borrow().process;
        let (Some(process), Some(restart)) = (process, life.restart()) else {
            return;
        };
        if let Some(reactor) = self.simulation.reactor(process) {
            let shared = Rc::clone(&self.shared);
            let start =
                || Ok(Box::new(Child(Self::new_life(&shared, true))) as Box<dyn ChildProcess>);
            // Where one is under way it is refused.
            let _ = restart.start_successor_with(reactor, start);
        }
    }

    fn is_over(&self) -> bool {
        let world = self.shared.borrow();
        world.jobs.iter().all(|job| job.outcome.is_some())
    }

    /// Where nobody is left, somebody has died since one of them served. One whose channel
    /// has broken may not know for a while that another serves, and dies.
    fn check_that_somebody_serves(&self) {
        let world = &mut *self.shared.borrow_mut();
        let deaths = world.deaths();
        let is_down = world.lives.iter().all(|life| life.state.borrow().is_dead);
        if !world.has_breaks && world.lives.iter().any(Life::serves) {
            world.deaths_before = Some(deaths);
        } else if is_down && world.deaths_before.take() == Some(deaths) {
            let line = "nobody serves, and nobody has died".to_owned();
            world.wrong.push(line);
        }
    }

    /// Has all clients send the rest, and whatever are under way come to its end.
    ///
    /// Nobody is told to die anew. But one that was told to die at some step may come
    /// to that step no sooner than the manager reads, which is now, and be the last one
    /// that served. Then the service is started again, as any service is; that it was
    /// for a death [is checked](Self::check_that_somebody_serves).
    fn end(&mut self) {
        for _ in 0..200 {
            for _ in 0..20 {
                self.advance(Duration::from_secs(1));
                if self.lives().iter().all(|life| life.state.borrow().is_dead) {
                    let count = 1 + self.random.below(3);
                    self.start_some(count);
                }
                let jobs = self.shared.borrow().jobs.len();
                (0..jobs).for_each(|job| self.prod(job, usize::MAX));
                if self.is_over() && !self.serving().is_empty() {
                    break;
                }
            }
            self.advance(Duration::from_secs(200));
            if self.is_over() && !self.serving().is_empty() {
                break;
            }
        }
    }

    /// Whether a client may have lost its connection: somebody was killed who had it,
    /// or who had said that it has and came no further.
    fn may_be_lost(&self, job: &Job) -> bool {
        let world = self.shared.borrow();
        let mut killed = world.lives.iter().filter(|life| {
            let state = life.state.borrow();
            state.is_dead && !state.has_exited
        });
        if job.had_by.is_empty() && world.killed > job.killed_before {
            return true;
        }
        killed.any(|life| life.state.borrow().was_taking_over || job.had_by.contains(&life.number))
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
        for life in self.lives() {
            let process = life.state.borrow().process;
            let Some(process) = process else {
                self.start(&life);
                continue;
            };
            let is_alive = self.simulation.is_alive(process);
            let (exits, dies) = {
                let state = &mut *life.state.borrow_mut();
                state.has_exited |= is_alive && state.has_left();
                // A signal takes its time.
                (state.has_exited, state.is_killed && self.random.chance(30))
            };
            if exits || dies {
                self.simulation.kill(process);
            }
            if self.simulation.is_alive(process) {
                continue;
            }
            let restart = {
                let state = &mut *life.state.borrow_mut();
                if !std::mem::replace(&mut state.is_dead, true) && !state.has_exited {
                    self.shared.borrow_mut().killed += 1;
                }
                let restart = state.restart.take();
                state.notifier = None;
                state.was_taking_over |= restart
                    .as_ref()
                    .is_some_and(|restart| !restart.is_serving() && !restart.has_handed_over());
                restart
            };
            // With connections that it was about to move.
            drop(restart);
        }
        self.check_that_somebody_serves();
    }

    fn is_acting(&self) -> bool {
        // One that reads from time to time makes nobody wait for it.
        let is_reading = self.manager.reads_percent == 100 && self.manager.has_unread();
        is_reading
            || self.lives().iter().any(|life| {
                let state = life.state.borrow();
                let is_ending = state.is_killed || state.has_exited || state.has_left();
                state.process.is_none() || is_ending && !state.is_dead
            })
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        for life in self.lives() {
            let restart = life.state.borrow_mut().restart.take();
            drop(restart);
        }
    }
}

/// What a run leaves to be compared, and what was in it.
#[derive(Debug, PartialEq, Eq)]
struct Trace {
    fingerprint: u64,
    outcomes: String,
    killed: usize,
    taken_over: usize,
    moved: usize,
    looked_again: usize,
    gave_up: usize,
    answered: usize,
    untold: usize,
    heard: usize,
}

fn simulate(seed: u64) -> Trace {
    let mut random = Random::new(!seed);
    let kernel = SimulatedKernel::with_seed(seed);
    let lasting = [0, 0, 50, 500][random.below(4)];
    kernel.set_settings(
        KernelSettings::default()
            .send_buffer([4_608, 20_000, 212_992][random.below(3)])
            .cut_percent([0, 20, 60][random.below(3)])
            .delivery([Delivery::Batch, Delivery::OneAtATime, Delivery::Random][random.below(3)])
            .passing_errors_percent([0, 5, 30][random.below(3)])
            .lasting_errors_per_10_000(lasting)
            .bound_first_percent([0, 50, 100][random.below(3)]),
    );
    let simulation = Simulation::with_kernel(kernel.clone());
    let mut run = Run::new(simulation, seed, &mut random);
    run.shared.borrow_mut().has_breaks = lasting > 0;
    run.manager.change(&kernel, &mut random);
    run.start_some(1 + random.below(3));
    run.settle();
    for _ in 0..40 + random.below(80) {
        let lives = run.lives();
        let life = lives[random.below(lives.len())].clone();
        let process = life.state.borrow().process;
        let jobs = run.shared.borrow().jobs.len();
        match random.below(17) {
            16 => run.manager.change(&kernel, &mut random),
            0..3 => run.add_client(random.below(3_000)),
            3..8 => {
                for _ in 0..random.below(30) {
                    run.turn();
                }
            }
            8..11 if jobs > 0 => run.prod(random.below(jobs), random.below(1_000)),
            11 => {
                for life in run.serving() {
                    run.restart(&life);
                }
            }
            12 if random.chance(30) => run.add_strangers(1 + random.below(3)),
            13 => run.advance(Duration::from_millis(random.below(2_000) as u64)),
            14 if random.chance(30) => run.advance(Duration::from_secs(random.below(40) as u64)),
            15 => {
                let Some(process) = process else { continue };
                match random.below(8) {
                    0..3 => {
                        let point = POINTS[random.below(POINTS.len())];
                        run.simulation.kill_at(process, point, random.below(3));
                    }
                    3 => run.simulation.kill(process),
                    // Stopped for a while, which may be longer than the other bears.
                    4..6 => run.suspend(&life, process),
                    _ => run.resume(),
                }
            }
            _ => {}
        }
    }
    // From here on nobody is told to die, but those that were told may.
    run.broken_percent = 0;
    run.manager.be_there(&kernel);
    run.manager.reads_percent = 100;
    run.resume();
    run.end();

    assert_eq!(run.serving().len(), 1, "serve");
    for life in run.serving() {
        let state = life.state.borrow();
        let waiting = state.notifier.as_ref().map(|notifier| notifier.waiting());
        let wanted = run.has_manager.then_some(0);
        assert_eq!(waiting, wanted, "it is ready, and the manager reads");
    }
    let world = run.shared.borrow();
    assert!(world.wrong.is_empty(), "{:?}", world.wrong);
    assert_eq!(kernel.waiting(SERVICE), Some(0));
    let mut outcomes = String::new();
    let mut answered = 0;
    for (number, job) in world.jobs.iter().enumerate() {
        let had_by = &job.had_by;
        assert!(job.outcome.is_some(), "client {number} waits: {had_by:?}");
        let is_answered = job.outcome == Some(true);
        answered += usize::from(is_answered);
        assert!(
            is_answered || lasting > 0 || run.may_be_lost(job),
            "client {number} is lost although nobody was killed who had it: {had_by:?}"
        );
        write!(outcomes, "{:?}{had_by:?} ", job.outcome).expect("a string");
    }
    let untold = world.untold;
    let (killed, taken_over, moved) = (world.killed, world.taken_over, world.moved);
    let (looked_again, gave_up) = (world.looked_again, world.gave_up);
    drop(world);
    for process in run.simulation.processes() {
        if let Some(reactor) = run.simulation.reactor(process) {
            assert_eq!(reactor.statistics().panics, 0);
        }
    }
    let run_heard = run.manager.heard.len();
    drop(run);
    assert_eq!((kernel.open_sockets(), kernel.open_listeners()), (0, 0));
    Trace {
        fingerprint: kernel.fingerprint(),
        outcomes,
        killed,
        taken_over,
        moved,
        looked_again,
        gave_up,
        answered,
        untold,
        heard: run_heard,
    }
}

/// Reliability T-37: a program is restarted again and again while it serves, and
/// dies at any point; nobody is refused while somebody serves, each connection goes
/// on where it was or is lost with a process that was killed, and one process serves
/// in the end; a seed does the same when run again. `BOWLINE_SEED=7 cargo test
/// --test memory restarts` replays one.
#[test]
fn every_seed_of_restarts_keeps_the_promises_and_repeats() {
    let ledger = DescriptorLedger::open();
    let (mut killed, mut taken_over, mut moved, mut answered) = (0, 0, 0, 0);
    let (mut looked_again, mut gave_up) = (0, 0);
    let (mut untold, mut heard) = (0, 0);
    let counted = every_seed((300, 2_000), simulate, |trace: Trace| {
        killed += trace.killed;
        taken_over += trace.taken_over;
        moved += trace.moved;
        looked_again += trace.looked_again;
        gave_up += trace.gave_up;
        answered += trace.answered;
        untold += trace.untold;
        heard += trace.heard;
    });
    let Some((seeds, equal)) = counted else {
        return;
    };
    Figures::of("T-37")
        .must(
            "seeds of restarts",
            seeds,
            Bound::AtLeast,
            scaled(300, 2_000),
        )
        .must(
            "restarts of a seed that went the same way again",
            equal,
            Bound::Exactly,
            seeds,
        )
        .must("processes killed", killed, Bound::AtLeast, seeds / 2)
        .must("restarts", taken_over, Bound::AtLeast, seeds)
        .must(
            "starts that looked again",
            looked_again,
            Bound::AtLeast,
            seeds / 4,
        )
        .must("of them in vain", gave_up, Bound::AtMost, looked_again / 10)
        .must("connections moved", moved, Bound::AtLeast, seeds)
        .must("clients answered", answered, Bound::AtLeast, seeds)
        .must(
            "notices that the manager read",
            heard,
            Bound::AtLeast,
            seeds,
        )
        .must(
            "notices that it took too long for",
            untold,
            Bound::AtLeast,
            1,
        );
    ledger.assert_balanced();
}
