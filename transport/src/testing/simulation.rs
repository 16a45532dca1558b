//! Several processes on one simulated kernel.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::panic::{self, AssertUnwindSafe};
use std::rc::Rc;
use std::time::{Duration, Instant};

use bowline_protocol::Protocol;
use bowline_reactor::testing::{ManualClock, ProcessDied};
use bowline_reactor::{Clock, Reactor};

use super::kernel::SimulatedKernel;
use super::peer::MemoryPeer;
use super::run_to_rest;
use super::socket::{MemoryHandle, MemorySocket, MemoryStream};

/// Processes that are connected with each other, on one kernel and one clock.
///
/// Each is a [`Reactor`] with everything that it owns. The kernel's seed chooses which
/// of the processes with work makes the next turn. It makes all other choices too: where
/// bytes are cut, the order of events, and which calls fail
/// ([`KernelSettings`](super::KernelSettings)). A run can be repeated from its seed, to
/// the last event. [`fingerprint`](SimulatedKernel::fingerprint) tells whether it was.
///
/// A process dies between two turns ([`kill`](Self::kill)), or in the middle of its code
/// when it passes a point ([`kill_at`](Self::kill_at)). From there on only its
/// destructors run, and no protocol is told. Its sockets close, and bytes that they have
/// not read or sent are lost. Bytes on their way from it arrive.
///
/// Connections pass from one process to another as descriptors do. They have to be
/// [detached](crate::Transports::detach), or made descriptors by
/// [`MemorySocket::into_descriptor`].
///
/// # Examples
///
/// A worker dies before it has answered. Its connection ends with it, and the client is
/// told:
///
/// ```
/// use bowline::testing::{Points, Simulation};
/// use bowline::{Context, Protocol, Transport};
///
/// struct Worker(Points);
///
/// impl<T: Transport> Protocol<T> for Worker {
///     fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
///         self.0.pass("request read");
///         cx.transport.write(data);
///     }
/// }
///
/// let mut simulation = Simulation::new(7);
/// let worker = simulation.spawn()?;
/// let protocol = Worker(simulation.points(worker));
/// let (_, client) = simulation.connect(worker, protocol)?;
/// simulation.kill_at(worker, "request read", 1);
///
/// client.send(b"first")?;
/// simulation.run();
/// assert_eq!(client.take().bytes, b"first");
/// assert!(simulation.is_alive(worker));
///
/// client.send(b"second")?;
/// simulation.run();
/// assert!(!simulation.is_alive(worker));
/// assert!(client.take().bytes.is_empty() && client.is_at_end());
/// # Ok::<(), std::io::Error>(())
/// ```
///
/// Feature `testing`.
pub struct Simulation {
    kernel: SimulatedKernel,
    clock: ManualClock,
    processes: Vec<Process>,
}

/// The name of a process of a [`Simulation`]. It is never used again.
///
/// Feature `testing`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProcessId(usize);

struct Process {
    /// `None` once it is dead.
    reactor: Option<Reactor>,
    is_suspended: bool,
    points: Points,
}

/// The points that the code of one process passes, by their names.
///
/// A program under test holds one of these, or has a trait of its own that does nothing
/// outside of tests.
///
/// Feature `testing`.
#[derive(Clone, Debug, Default)]
pub struct Points {
    plan: Rc<RefCell<DeathPlan>>,
}

#[derive(Debug, Default)]
struct DeathPlan {
    passed: BTreeMap<&'static str, usize>,
    /// Where to die, and at which passing from now on.
    deaths: Vec<(&'static str, usize)>,
}

impl Points {
    /// Says that the code passes this point. Does not return if the process dies here.
    ///
    /// # Panics
    ///
    /// If the process would die outside of a turn of its [`Simulation`].
    pub fn pass(&self, name: &'static str) {
        let mut plan = self.plan.borrow_mut();
        *plan.passed.entry(name).or_default() += 1;
        let mut dies = false;
        for (point, left) in &mut plan.deaths {
            if *point == name {
                dies |= *left == 0;
                *left = left.saturating_sub(1);
            }
        }
        drop(plan);
        if dies {
            // Not a panic: nothing is printed, and the loop does not catch it.
            panic::resume_unwind(Box::new(ProcessDied));
        }
    }

    /// How often the code has passed a point.
    pub fn passed(&self, name: &str) -> usize {
        self.plan.borrow().passed.get(name).copied().unwrap_or(0)
    }
}

impl Simulation {
    /// Makes a simulation without processes, on a kernel whose choices come from `seed`.
    pub fn new(seed: u64) -> Self {
        Self::with_kernel(SimulatedKernel::with_seed(seed))
    }

    /// Makes a simulation without processes, on a kernel that may have settings of its
    /// own.
    pub fn with_kernel(kernel: SimulatedKernel) -> Self {
        Self {
            kernel,
            clock: ManualClock::new(),
            processes: Vec::new(),
        }
    }

    /// Starts a process, with nothing in it.
    ///
    /// # Errors
    ///
    /// `EMFILE` if its reactor cannot be made.
    pub fn spawn(&mut self) -> io::Result<ProcessId> {
        let mut reactor = Reactor::with_clock(self.clock.clone())?;
        reactor.start().expect("it was made just now");
        self.processes.push(Process {
            reactor: Some(reactor),
            is_suspended: false,
            points: Points::default(),
        });
        Ok(ProcessId(self.processes.len() - 1))
    }

    /// Joins two protocols by a connection. Each is in a process, and both may be in the
    /// same one.
    ///
    /// # Errors
    ///
    /// `NotConnected` if one of the processes is dead.
    pub fn join(
        &mut self,
        first: (ProcessId, impl Protocol<MemoryStream>),
        second: (ProcessId, impl Protocol<MemoryStream>),
    ) -> io::Result<(MemoryHandle, MemoryHandle)> {
        let (one, other) = self.kernel.pair();
        Ok((
            self.put(first.0, one, first.1)?,
            self.put(second.0, other, second.1)?,
        ))
    }

    /// Puts a protocol on a connection whose other end is the caller's.
    ///
    /// # Errors
    ///
    /// `NotConnected` if the process is dead.
    pub fn connect(
        &mut self,
        process: ProcessId,
        protocol: impl Protocol<MemoryStream>,
    ) -> io::Result<(MemoryHandle, MemoryPeer)> {
        let (ours, theirs) = self.kernel.pair();
        let handle = self.put(process, ours, protocol)?;
        Ok((handle, MemoryPeer::new(theirs)))
    }

    fn put(
        &mut self,
        process: ProcessId,
        socket: MemorySocket,
        protocol: impl Protocol<MemoryStream>,
    ) -> io::Result<MemoryHandle> {
        match self.reactor(process) {
            Some(reactor) => socket.adopt(reactor, protocol),
            None => Err(io::Error::from(io::ErrorKind::NotConnected)),
        }
    }

    // Death.

    /// Ends a process between two turns.
    pub fn kill(&mut self, process: ProcessId) {
        self.bury(process.0);
    }

    /// Has a process die when it passes the point `name` for the `nth` time from now on.
    /// 0 is the next time.
    pub fn kill_at(&mut self, process: ProcessId, name: &'static str, nth: usize) {
        let points = &self.processes[process.0].points;
        points.plan.borrow_mut().deaths.push((name, nth));
    }

    /// The points of a process, for its code to pass.
    pub fn points(&self, process: ProcessId) -> Points {
        self.processes[process.0].points.clone()
    }

    /// Whether a process has not died.
    pub fn is_alive(&self, process: ProcessId) -> bool {
        self.processes[process.0].reactor.is_some()
    }

    /// Keeps a process from making turns until it is [resumed](Self::resume), as SIGSTOP
    /// does. Bytes that are sent to it wait, and its calls are late. It can still be
    /// killed.
    pub fn suspend(&mut self, process: ProcessId) {
        self.processes[process.0].is_suspended = true;
    }

    /// Lets a process make turns again.
    pub fn resume(&mut self, process: ProcessId) {
        self.processes[process.0].is_suspended = false;
    }

    fn bury(&mut self, index: usize) {
        if let Some(reactor) = self.processes[index].reactor.take() {
            self.kernel.note_choice(usize::MAX - index);
            // A destructor that passes the point once more dies again.
            let dropped = panic::catch_unwind(AssertUnwindSafe(|| drop(reactor)));
            if let Err(payload) = dropped
                && !payload.is::<ProcessDied>()
            {
                panic::resume_unwind(payload);
            }
        }
    }

    // Running.

    /// Has one of the processes that have work make a turn. Returns whether there was
    /// one.
    pub fn turn(&mut self) -> bool {
        let now = self.clock.now();
        let mut ready = Vec::new();
        for (index, process) in self.processes.iter_mut().enumerate() {
            if let Some(reactor) = &mut process.reactor
                && !process.is_suspended
                && (!reactor.is_idle() || reactor.next_deadline().is_some_and(|due| due <= now))
            {
                ready.push(index);
            }
        }
        if ready.is_empty() {
            return false;
        }
        let chosen = ready[self.kernel.choose(|random| random.below(ready.len()))];
        self.kernel.note_choice(chosen);
        if let Some(reactor) = &mut self.processes[chosen].reactor {
            let turn = || reactor.turn(Some(Duration::ZERO));
            if let Err(payload) = panic::catch_unwind(AssertUnwindSafe(turn)) {
                if !payload.is::<ProcessDied>() {
                    panic::resume_unwind(payload);
                }
                self.bury(chosen);
            }
        }
        true
    }

    /// Runs until no process has anything left to do at the present time.
    ///
    /// # Panics
    ///
    /// After a million turns, since the processes do not come to rest.
    #[track_caller]
    pub fn run(&mut self) {
        run_to_rest(self, Self::turn);
    }

    /// Lets time pass. Each delayed call on the way runs at its own time. (To have the
    /// clock jump over them, advance the [clock](Self::clock).)
    ///
    /// # Panics
    ///
    /// As [`run`](Self::run).
    #[track_caller]
    pub fn advance(&mut self, by: Duration) {
        let end = self.clock.now() + by;
        self.run();
        while let Some(deadline) = self.next_deadline()
            && deadline <= end
        {
            self.pass_to(deadline);
        }
        self.pass_to(end);
    }

    #[track_caller]
    fn pass_to(&mut self, time: Instant) {
        let wait = time.saturating_duration_since(self.clock.now());
        self.clock.advance(wait);
        self.run();
    }

    /// When the next delayed call is due, in any process that is not suspended.
    pub fn next_deadline(&mut self) -> Option<Instant> {
        let running = self.processes.iter_mut();
        let running = running.filter(|process| !process.is_suspended);
        let reactors = running.filter_map(|process| process.reactor.as_mut());
        reactors.filter_map(|reactor| reactor.next_deadline()).min()
    }

    // What is in it.

    /// The reactor of a process, unless it is dead.
    pub fn reactor(&mut self, process: ProcessId) -> Option<&mut Reactor> {
        self.processes[process.0].reactor.as_mut()
    }

    /// A transport in a process, until its connection is lost.
    pub fn get(
        &mut self,
        process: ProcessId,
        transport: MemoryHandle,
    ) -> Option<&mut MemoryStream> {
        self.reactor(process)?.get(transport.handle())
    }

    /// The names of all processes, dead ones too.
    pub fn processes(&self) -> impl Iterator<Item = ProcessId> + use<> {
        (0..self.processes.len()).map(ProcessId)
    }

    /// The clock of all processes.
    pub fn clock(&self) -> &ManualClock {
        &self.clock
    }

    /// The kernel. Use it to change settings or to have calls fail.
    pub fn kernel(&self) -> &SimulatedKernel {
        &self.kernel
    }
}

impl fmt::Debug for Simulation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let alive = self.processes().filter(|process| self.is_alive(*process));
        f.debug_struct("Simulation")
            .field("processes", &self.processes.len())
            .field("alive", &alive.count())
            .field("kernel", &self.kernel)
            .finish_non_exhaustive()
    }
}
