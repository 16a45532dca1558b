//! Child processes of the simulated kernel: a number, a status, signals, and descriptors.

use std::collections::BTreeSet;
use std::io;

use bowline_reactor::signal::{SIGCONT, SIGKILL};
use bowline_reactor::{Interest, Readiness};

use super::{Cause, Holder, SimulatedKernel, SocketId, State, Watch};
use crate::sys;

/// The signals that stop a process and cannot be caught.
const SIGSTOP: i32 = 19;

/// The signals that do nothing unless a process handles them: SIGCHLD, SIGURG, SIGWINCH.
const IGNORED: [i32; 3] = [17, 23, 28];

/// The first process id.
const FIRST_PID: u32 = 1_000;

/// A process. What it does is up to a test.
#[derive(Debug)]
pub(super) struct SimulatedProcess {
    pid: u32,
    /// The process that leads its group.
    group: u32,
    pub(super) holders: usize,
    /// The status that wait(2) tells, once it has exited.
    status: Option<i32>,
    was_waited_for: bool,
    is_stopped: bool,
    /// The signal that it dies by when it goes on.
    dies_by: Option<i32>,
    /// Signals that it handles itself.
    traps: BTreeSet<i32>,
    /// Those of them that have come.
    pending: Vec<i32>,
    /// Its descriptors by number.
    pipes: Vec<(u32, SocketId, Holder)>,
    pub(super) watch: Option<Watch>,
}

impl SimulatedProcess {
    /// Whether nothing is left of it. Whoever leads no group was started by a process
    /// that does not wait for it, and is waited for at once.
    fn is_gone(&self) -> bool {
        self.status.is_some() && (self.was_waited_for || self.group != self.pid)
    }

    /// A pidfd is readable once its process has exited.
    pub(super) fn readiness(&self) -> Readiness {
        let interest = self.watch.as_ref().map(|watch| watch.interest);
        let wants_reading = matches!(interest, Some(Interest::Readable | Interest::Both));
        match wants_reading && self.status.is_some() {
            true => Readiness::READABLE,
            false => Readiness::EMPTY,
        }
    }
}

impl SimulatedKernel {
    /// Starts a process that has the given ends of pipes by number, and leads a group.
    pub(in crate::testing) fn start_process(&self, pipes: &[(u32, SocketId)]) -> SocketId {
        let pipes = pipes
            .iter()
            .map(|(number, id)| (*number, *id, self.hold(*id)));
        let pipes = pipes.collect();
        let mut state = self.state.borrow_mut();
        state.add_process(None, pipes)
    }

    /// Has a process start another one of its group, with copies of its descriptors.
    pub(in crate::testing) fn fork_process(&self, parent: SocketId) -> io::Result<SocketId> {
        let (group, pipes) = {
            let mut state = self.state.borrow_mut();
            let process = state.living(parent)?;
            (process.group, process.pipes.clone())
        };
        let pipes = pipes.into_iter();
        let copies = pipes.map(|(number, id, _)| (number, id, self.hold(id)));
        let copies = copies.collect();
        Ok(self.state.borrow_mut().add_process(Some(group), copies))
    }

    pub(in crate::testing) fn pid_of(&self, id: SocketId) -> Option<u32> {
        self.state.borrow().children.get(&id).map(|it| it.pid)
    }

    /// The end that a living process has under a number.
    pub(in crate::testing) fn pipe_of_process(
        &self,
        id: SocketId,
        number: u32,
    ) -> io::Result<SocketId> {
        let mut state = self.state.borrow_mut();
        let process = state.living(id)?;
        if process.is_stopped {
            return Err(sys::simulated::would_block());
        }
        let found = process.pipes.iter().find(|(it, ..)| *it == number);
        found
            .map(|(_, pipe, _)| *pipe)
            .ok_or_else(sys::simulated::not_open_for_that)
    }

    /// Has a process close one of its descriptors.
    pub(in crate::testing) fn close_in_process(&self, id: SocketId, number: u32) -> io::Result<()> {
        let mut state = self.state.borrow_mut();
        let process = state.living(id)?;
        let place = process.pipes.iter().position(|(it, ..)| *it == number);
        let place = place.ok_or_else(sys::simulated::not_open_for_that)?;
        let (_, pipe, holder) = process.pipes.remove(place);
        state.let_go_of_pipe(pipe, holder);
        state.note::<()>(41, id, &Ok(number as usize));
        Ok(())
    }

    /// Ends a process with a status of wait(2). Does nothing if it has exited.
    pub(in crate::testing) fn end_process(&self, id: SocketId, status: i32) {
        let mut state = self.state.borrow_mut();
        state.end_process(id, status);
    }

    /// The status, if it has exited; it is waited for by that.
    pub(in crate::testing) fn wait_for(&self, id: SocketId) -> io::Result<Option<i32>> {
        let mut state = self.state.borrow_mut();
        let process = state.children.get_mut(&id);
        let process = process.ok_or_else(sys::simulated::no_process)?;
        process.was_waited_for |= process.status.is_some();
        Ok(process.status)
    }

    /// Whether a process has neither exited nor been stopped.
    pub(in crate::testing) fn is_running(&self, id: SocketId) -> bool {
        let state = self.state.borrow();
        let process = state.children.get(&id);
        process.is_some_and(|it| it.status.is_none() && !it.is_stopped)
    }

    pub(in crate::testing) fn has_exited(&self, id: SocketId) -> bool {
        let state = self.state.borrow();
        let process = state.children.get(&id);
        process.is_none_or(|it| it.status.is_some())
    }

    /// Has a process handle a signal itself.
    pub(in crate::testing) fn trap_in(&self, id: SocketId, signal: i32) {
        if let Some(process) = self.state.borrow_mut().children.get_mut(&id) {
            process.traps.insert(signal);
        }
    }

    /// The signals that have come, and that the process handles itself.
    pub(in crate::testing) fn signals_in(&self, id: SocketId) -> Vec<i32> {
        let mut state = self.state.borrow_mut();
        let process = state.children.get_mut(&id);
        process.map_or_else(Vec::new, |it| std::mem::take(&mut it.pending))
    }

    /// Sends a signal to a process, or to the group that it leads.
    pub(in crate::testing) fn send_signal(
        &self,
        id: SocketId,
        signal: i32,
        to_group: bool,
    ) -> io::Result<()> {
        let mut state = self.state.borrow_mut();
        let result = state.send_signal(id, signal, to_group);
        state.note(42, id, &result.as_ref().map(|()| signal as usize));
        result
    }

    /// How many processes have not exited, or were not waited for.
    pub fn processes_left(&self) -> usize {
        let mut state = self.state.borrow_mut();
        state.reap();
        let processes = state.children.values();
        processes.filter(|it| !it.is_gone()).count()
    }
}

impl State {
    fn add_process(&mut self, group: Option<u32>, pipes: Vec<(u32, SocketId, Holder)>) -> SocketId {
        let id = self.new_id();
        let pid = FIRST_PID + id.0 as u32;
        self.children.insert(
            id,
            SimulatedProcess {
                pid,
                group: group.unwrap_or(pid),
                holders: 0,
                status: None,
                was_waited_for: false,
                is_stopped: false,
                dies_by: None,
                traps: BTreeSet::new(),
                pending: Vec::new(),
                pipes,
                watch: None,
            },
        );
        self.note::<()>(40, id, &Ok(0));
        id
    }

    fn living(&mut self, id: SocketId) -> io::Result<&mut SimulatedProcess> {
        let process = self.children.get_mut(&id);
        let process = process.filter(|it| it.status.is_none());
        process.ok_or_else(sys::simulated::no_process)
    }

    fn end_process(&mut self, id: SocketId, status: i32) {
        let Ok(process) = self.living(id) else {
            return;
        };
        process.status = Some(status);
        let pipes = std::mem::take(&mut process.pipes);
        for (_, pipe, holder) in pipes {
            self.let_go_of_pipe(pipe, holder);
        }
        self.note::<()>(43, id, &Ok(status as usize));
        self.raise(id, Cause::Arrival);
    }

    fn send_signal(&mut self, id: SocketId, signal: i32, to_group: bool) -> io::Result<()> {
        let process = self.children.get(&id);
        let pid = process.ok_or_else(sys::simulated::no_process)?.pid;
        let mut reached = Vec::new();
        for (other, process) in &self.children {
            let is_meant = match to_group {
                true => process.group == pid,
                false => *other == id,
            };
            // One that has exited is there until it was waited for.
            if is_meant && !process.is_gone() {
                reached.push(*other);
            }
        }
        if reached.is_empty() {
            return Err(sys::simulated::no_process());
        }
        for other in reached {
            self.deliver_signal(other, signal);
        }
        Ok(())
    }

    fn deliver_signal(&mut self, id: SocketId, signal: i32) {
        let Ok(process) = self.living(id) else {
            return;
        };
        match signal {
            0 => {}
            SIGSTOP => process.is_stopped = true,
            SIGKILL => self.end_process(id, SIGKILL),
            SIGCONT => {
                process.is_stopped = false;
                if process.traps.contains(&signal) {
                    process.pending.push(signal);
                }
                if let Some(signal) = process.dies_by {
                    self.end_process(id, signal);
                }
            }
            _ if process.traps.contains(&signal) => process.pending.push(signal),
            _ if IGNORED.contains(&signal) => {}
            _ if process.is_stopped => process.dies_by = process.dies_by.or(Some(signal)),
            _ => self.end_process(id, signal),
        }
    }

    /// Nobody can ask for it any more; it goes on by itself.
    pub(super) fn forget_child(&mut self, id: SocketId) {
        let is_over = self.children.get(&id).is_some_and(|it| it.status.is_some());
        if is_over
            && let Some(process) = self.children.remove(&id)
            && let Some(watch) = &process.watch
        {
            self.forget_event(id, watch);
        }
    }
}
