//! A process protocol that records what it is told, and does what a test wants.

use std::cell::RefCell;
use std::process::Command;
use std::rc::Rc;

use bowline::process::{
    ChildCommand, ProcessContext, ProcessHandle, ProcessProtocol, ProcessStatus,
};
use bowline::{AtDrain, CloseReason, Reactor, Transport, Transports};

use crate::support::{in_short, run_until};

/// What a [`Script`] was told, in short.
#[derive(Clone, Default)]
pub(crate) struct Record {
    events: Rc<RefCell<Vec<Event>>>,
    statuses: Rc<RefCell<Vec<ProcessStatus>>>,
}

pub(crate) enum Event {
    Data(u32, Vec<u8>),
    Other(String),
}

impl Record {
    fn push(&self, text: impl Into<String>) {
        self.events.borrow_mut().push(Event::Other(text.into()));
    }

    /// The events but for the data, in order.
    pub(crate) fn events(&self) -> Vec<String> {
        let events = self.events.borrow();
        let others = events.iter().filter_map(|event| match event {
            Event::Other(text) => Some(text.clone()),
            Event::Data(..) => None,
        });
        others.collect()
    }

    /// All bytes that came under a number.
    pub(crate) fn data(&self, wanted: u32) -> Vec<u8> {
        let events = self.events.borrow();
        let pieces = events.iter().filter_map(|event| match event {
            Event::Data(number, data) if *number == wanted => Some(data.as_slice()),
            _ => None,
        });
        pieces.collect::<Vec<_>>().concat()
    }

    /// What it was told of the exit, and of the end.
    pub(crate) fn statuses(&self) -> Vec<ProcessStatus> {
        self.statuses.borrow().clone()
    }

    pub(crate) fn text(&self, number: u32) -> String {
        String::from_utf8_lossy(&self.data(number)).into_owned()
    }

    /// How often it was told something that begins so.
    pub(crate) fn count(&self, beginning: &str) -> usize {
        let events = self.events();
        events.iter().filter(|it| it.starts_with(beginning)).count()
    }

    pub(crate) fn has_exited(&self) -> bool {
        self.count("exited") > 0
    }

    pub(crate) fn is_over(&self) -> bool {
        self.count("ended") > 0
    }

    /// The place of the first that begins so, data included.
    #[track_caller]
    pub(crate) fn place(&self, beginning: &str) -> usize {
        let events = self.events();
        let found = events.iter().position(|it| it.starts_with(beginning));
        found.unwrap_or_else(|| panic!("no {beginning} in {events:?}"))
    }
}

type Hook = Box<dyn FnMut(&mut ProcessContext<'_>)>;
type OnData = Box<dyn FnMut(&mut ProcessContext<'_>, u32, &[u8])>;

/// Records, and does what it is told to.
#[derive(Default)]
pub(crate) struct Script {
    record: Record,
    made: Option<Hook>,
    data: Option<OnData>,
    lost: Option<Hook>,
    exited: Option<Hook>,
    ended: Option<Hook>,
    resumed: Option<Hook>,
    draining: Option<AtDrain>,
}

impl Script {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn record(&self) -> Record {
        self.record.clone()
    }

    pub(crate) fn made(mut self, hook: impl FnMut(&mut ProcessContext<'_>) + 'static) -> Self {
        self.made = Some(Box::new(hook));
        self
    }

    pub(crate) fn data(
        mut self,
        hook: impl FnMut(&mut ProcessContext<'_>, u32, &[u8]) + 'static,
    ) -> Self {
        self.data = Some(Box::new(hook));
        self
    }

    pub(crate) fn lost(mut self, hook: impl FnMut(&mut ProcessContext<'_>) + 'static) -> Self {
        self.lost = Some(Box::new(hook));
        self
    }

    pub(crate) fn exited(mut self, hook: impl FnMut(&mut ProcessContext<'_>) + 'static) -> Self {
        self.exited = Some(Box::new(hook));
        self
    }

    pub(crate) fn ended(mut self, hook: impl FnMut(&mut ProcessContext<'_>) + 'static) -> Self {
        self.ended = Some(Box::new(hook));
        self
    }

    pub(crate) fn resumed(mut self, hook: impl FnMut(&mut ProcessContext<'_>) + 'static) -> Self {
        self.resumed = Some(Box::new(hook));
        self
    }

    pub(crate) fn draining(mut self, answer: AtDrain) -> Self {
        self.draining = Some(answer);
        self
    }
}

fn call(hook: &mut Option<Hook>, cx: &mut ProcessContext<'_>) {
    if let Some(hook) = hook {
        hook(cx);
    }
}

impl ProcessProtocol for Script {
    fn connection_made(&mut self, cx: &mut ProcessContext<'_>) {
        self.record.push("made");
        call(&mut self.made, cx);
    }

    fn child_data_received(&mut self, cx: &mut ProcessContext<'_>, number: u32, data: &[u8]) {
        let event = Event::Data(number, data.to_vec());
        self.record.events.borrow_mut().push(event);
        if let Some(hook) = &mut self.data {
            hook(cx, number, data);
        }
    }

    fn child_connection_lost(
        &mut self,
        cx: &mut ProcessContext<'_>,
        number: u32,
        reason: &CloseReason,
    ) {
        assert!(cx.stream(number).is_none(), "it is lost");
        self.record
            .push(format!("lost {number}, {}", in_short(reason)));
        call(&mut self.lost, cx);
    }

    fn process_exited(&mut self, cx: &mut ProcessContext<'_>, status: ProcessStatus) {
        assert!(cx.process.has_exited());
        self.record.statuses.borrow_mut().push(status);
        self.record.push(format!("exited, {status}"));
        call(&mut self.exited, cx);
    }

    fn process_ended(&mut self, cx: &mut ProcessContext<'_>, status: ProcessStatus) {
        self.record.statuses.borrow_mut().push(status);
        self.record.push(format!("ended, {status}"));
        call(&mut self.ended, cx);
    }

    fn draining(&mut self, _: &mut ProcessContext<'_>) -> AtDrain {
        self.record.push("draining");
        self.draining.unwrap_or(AtDrain::DoNotWait)
    }

    fn pause_producing(&mut self, _: &mut ProcessContext<'_>, number: u32) {
        self.record.push(format!("paused {number}"));
    }

    fn resume_producing(&mut self, cx: &mut ProcessContext<'_>, number: u32) {
        self.record.push(format!("resumed {number}"));
        call(&mut self.resumed, cx);
    }

    fn stop_producing(&mut self, _: &mut ProcessContext<'_>, number: u32) {
        self.record.push(format!("stopped {number}"));
    }
}

/// A shell that runs `script`.
pub(crate) fn sh(script: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", script]);
    command
}

/// A child that runs `script`, with pipes.
pub(crate) fn shell(script: &str) -> ChildCommand<'static> {
    launched(sh(script))
}

/// How a child comes about.
pub(crate) type Way = fn(Command) -> ChildCommand<'static>;

/// Both ways: with a fork, and without.
pub(crate) const WAYS: [Way; 2] = [ChildCommand::new, launched];

/// The same child without a fork. Nothing else can be seen in a command.
pub(crate) fn launched(command: Command) -> ChildCommand<'static> {
    let mut child = ChildCommand::program(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        child = match value {
            Some(value) => child.env(name, value),
            None => child.env_remove(name),
        };
    }
    match command.get_current_dir() {
        Some(directory) => child.current_dir(directory),
        None => child,
    }
}

#[track_caller]
pub(crate) fn spawn(
    reactor: &mut Reactor,
    command: ChildCommand<'_>,
    script: Script,
) -> ProcessHandle {
    reactor.spawn_process(command, script).expect("it starts")
}

/// Runs a child to its end; what it was told.
#[track_caller]
pub(crate) fn run(command: ChildCommand<'_>, script: Script) -> Record {
    let mut reactor = Reactor::new().expect("a reactor");
    let record = script.record();
    spawn(&mut reactor, command, script);
    run_until(&mut reactor, |_| record.is_over());
    run_until(&mut reactor, |reactor| reactor.registered() == 0);
    assert_nothing_left(&reactor);
    record
}

/// That a process, its streams and its timers are gone.
#[track_caller]
pub(crate) fn assert_nothing_left(reactor: &Reactor) {
    assert_eq!(reactor.registered(), 0, "descriptors");
    assert_eq!(reactor.delayed_calls().count(), 0, "delayed calls");
}

/// The transport of a stream.
#[track_caller]
pub(crate) fn stream(
    reactor: &mut Reactor,
    process: ProcessHandle,
    number: u32,
) -> &mut dyn Transport {
    let process = reactor.get(process).expect("it is there");
    let stream = process.stream(number).expect("it is open");
    reactor.get(stream).expect("it is open")
}

/// Whether a process is there, a zombie included.
pub(crate) fn is_there(pid: u32) -> bool {
    std::path::Path::new(&format!("/proc/{pid}")).exists()
}

/// Bytes in which a lost, doubled or moved piece shows.
pub(crate) fn pattern(length: usize) -> Vec<u8> {
    (0..length)
        .map(|at| (at ^ (at >> 8) ^ (at >> 16).wrapping_mul(31)) as u8)
        .collect()
}
