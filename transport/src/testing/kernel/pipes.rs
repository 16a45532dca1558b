//! Pipes and FIFOs of the simulated kernel.
//!
//! What is modelled, and where it comes from: the pages of a pipe, which writes fill and
//! reads empty (`pipe_write`, `pipe_read`), what is reported of its ends (`pipe_poll`) and
//! when (`pipe_release`, `wake_up_partner`), and who may open a FIFO (`fifo_open`).

use std::collections::VecDeque;
use std::io::{self, IoSlice};

use bowline_reactor::{Interest, Readiness};

use super::{Cause, Failing, Holder, PAGE, SimulatedKernel, SocketId, State, Watch};
use crate::sys;

/// The name of a pipe in its kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct PipeId(u64);

/// What an end of a pipe was opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::testing) struct OpenedFor {
    pub(in crate::testing) reads: bool,
    pub(in crate::testing) writes: bool,
}

/// What a call on an end would wait for, as poll(2) says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::testing) struct PolledPipe {
    /// A read would find bytes, or the end.
    pub(in crate::testing) has_bytes: bool,
    pub(in crate::testing) has_room: bool,
    /// Nobody writes any more who did.
    pub(in crate::testing) is_hung_up: bool,
    pub(in crate::testing) has_no_reader: bool,
    pub(in crate::testing) unread: usize,
}

/// A pipe, as long as one has it open, or for ever if it has a name.
#[derive(Debug)]
pub(super) struct SimulatedPipe {
    /// The path of a FIFO.
    name: Option<String>,
    pages: VecDeque<Page>,
    most_pages: usize,
    readers: usize,
    writers: usize,
    /// How often it was opened for writing.
    openings: u64,
}

/// A page of a pipe, filled up to the length of `bytes`.
#[derive(Debug)]
struct Page {
    bytes: Vec<u8>,
    /// How far it was read.
    start: usize,
}

/// An open end of a pipe, which several may hold.
#[derive(Debug)]
pub(super) struct OpenPipe {
    pipe: PipeId,
    way: OpenedFor,
    pub(super) holders: usize,
    /// How often the pipe was opened for writing by the time of which no end is told.
    told_from: u64,
    pub(super) watch: Option<Watch>,
    pub(super) failing: Failing,
}

impl SimulatedKernel {
    /// Makes a pipe; the ends for reading and for writing.
    pub(in crate::testing) fn make_pipe(&self) -> (SocketId, SocketId) {
        let mut state = self.state.borrow_mut();
        let pipe = state.add_pipe(None);
        let both = [(true, false), (false, true)]
            .map(|(reads, writes)| state.add_open_pipe(pipe, OpenedFor { reads, writes }, 0));
        state.note::<()>(30, both[0], &Ok(0));
        (both[0], both[1])
    }

    /// Makes a FIFO. Nobody has it open yet.
    ///
    /// # Errors
    ///
    /// `AlreadyExists` if there is one of that name.
    pub fn make_fifo(&self, name: &str) -> io::Result<()> {
        let mut state = self.state.borrow_mut();
        if state.fifo_called(name).is_some() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        state.add_pipe(Some(name.to_owned()));
        Ok(())
    }

    /// Opens a FIFO, as open(2) does with `O_NONBLOCK`.
    pub(in crate::testing) fn open_fifo_for(
        &self,
        name: &str,
        way: OpenedFor,
    ) -> io::Result<SocketId> {
        let mut state = self.state.borrow_mut();
        state.reap();
        let result = state.open_fifo(name, way);
        let noted = result.as_ref().map(|id| id.0 as usize);
        state.note(31, SocketId(0), &noted);
        result
    }

    pub(in crate::testing) fn read_pipe(&self, id: SocketId, buf: &mut [u8]) -> io::Result<usize> {
        let mut state = self.state.borrow_mut();
        state.reap();
        let result = state.read_pipe(id, buf);
        state.note(32, id, &result);
        result
    }

    pub(in crate::testing) fn write_pipe(
        &self,
        id: SocketId,
        pieces: &[IoSlice<'_>],
    ) -> io::Result<usize> {
        let mut state = self.state.borrow_mut();
        state.reap();
        let result = state.write_pipe(id, pieces);
        state.note(33, id, &result);
        result
    }

    /// What poll(2) says of an end.
    pub(in crate::testing) fn poll_pipe(&self, id: SocketId) -> io::Result<PolledPipe> {
        let mut state = self.state.borrow_mut();
        state.reap();
        let (open, pipe) = state.open_pipe(id)?;
        let is_hung_up = open.way.reads && pipe.writers == 0 && open.told_from != pipe.openings;
        Ok(PolledPipe {
            has_bytes: open.way.reads && (!pipe.pages.is_empty() || is_hung_up),
            // As for bytes: an error makes it ready too.
            has_room: open.way.writes && (pipe.pages.len() < pipe.most_pages || pipe.readers == 0),
            is_hung_up,
            has_no_reader: open.way.writes && pipe.readers == 0,
            unread: pipe.unread(),
        })
    }

    /// What an end was opened for, and the path of its FIFO. `None` if it is no end of a
    /// pipe.
    pub(in crate::testing) fn way_of_pipe(
        &self,
        id: SocketId,
    ) -> Option<(OpenedFor, Option<String>)> {
        let mut state = self.state.borrow_mut();
        let (open, pipe) = state.open_pipe(id).ok()?;
        Some((open.way, pipe.name.clone()))
    }

    /// How many ends of pipes are open.
    pub fn open_pipes(&self) -> usize {
        let mut state = self.state.borrow_mut();
        state.reap();
        state.open_pipes.len()
    }
}

impl SimulatedPipe {
    fn unread(&self) -> usize {
        let unread = |page: &Page| page.bytes.len() - page.start;
        self.pages.iter().map(unread).sum()
    }
}

impl State {
    fn add_pipe(&mut self, name: Option<String>) -> PipeId {
        let id = PipeId(self.new_id().0);
        self.pipes.insert(
            id,
            SimulatedPipe {
                name,
                pages: VecDeque::new(),
                most_pages: self.settings.pipe_size / PAGE,
                readers: 0,
                writers: 0,
                openings: 0,
            },
        );
        id
    }

    fn add_open_pipe(&mut self, pipe: PipeId, way: OpenedFor, told_from: u64) -> SocketId {
        let id = self.new_id();
        if let Some(pipe) = self.pipes.get_mut(&pipe) {
            pipe.readers += usize::from(way.reads);
            pipe.writers += usize::from(way.writes);
            pipe.openings += u64::from(way.writes);
        }
        self.open_pipes.insert(
            id,
            OpenPipe {
                pipe,
                way,
                holders: 0,
                told_from,
                watch: None,
                failing: Failing::default(),
            },
        );
        id
    }

    fn fifo_called(&self, name: &str) -> Option<PipeId> {
        let mut all = self.pipes.iter();
        let found = all.find(|(_, pipe)| pipe.name.as_deref() == Some(name));
        found.map(|(id, _)| *id)
    }

    fn open_fifo(&mut self, name: &str, way: OpenedFor) -> io::Result<SocketId> {
        let id = self.fifo_called(name).ok_or_else(sys::simulated::no_file)?;
        let pipe = self.pipes.get(&id).ok_or_else(sys::simulated::no_file)?;
        let (readers, writers) = (pipe.readers, pipe.writers);
        if way.writes && !way.reads && readers == 0 {
            return Err(sys::simulated::nobody_reads());
        }
        // Who reads is told of no end before a writer has come.
        let told_from = match writers {
            0 if !way.writes => pipe.openings,
            _ => u64::MAX,
        };
        let end = self.add_open_pipe(id, way, told_from);
        if way.writes && writers == 0 || way.reads && readers == 0 {
            self.raise_ends(id, Cause::Any, |way| way.reads, Some(end));
        }
        Ok(end)
    }

    fn open_pipe(&mut self, id: SocketId) -> io::Result<(&mut OpenPipe, &mut SimulatedPipe)> {
        let closed = || io::Error::from(io::ErrorKind::NotConnected);
        let open = self.open_pipes.get_mut(&id).ok_or_else(closed)?;
        let pipe = self.pipes.get_mut(&open.pipe).ok_or_else(closed)?;
        Ok((open, pipe))
    }

    /// Whether nothing is ever waited for on this end any more.
    pub(super) fn is_pipe_over(&self, id: SocketId) -> bool {
        let Some(open) = self.open_pipes.get(&id) else {
            return false;
        };
        let pipe = self.pipes.get(&open.pipe);
        pipe.is_none_or(|pipe| pipe.readers == 0 || pipe.writers == 0)
    }

    fn read_pipe(&mut self, id: SocketId, buf: &mut [u8]) -> io::Result<usize> {
        let (open, _) = self.open_pipe(id)?;
        if !open.way.reads {
            return Err(sys::simulated::not_open_for_that());
        }
        if let Some(error) = open.failing.read() {
            if error.kind() == io::ErrorKind::WouldBlock {
                self.raise(id, Cause::Arrival);
            }
            return Err(error);
        }
        if let Some(error) = self.error_by_chance(id, Cause::Arrival) {
            return Err(error);
        }
        let is_over = self.is_pipe_over(id);
        let length = match is_over {
            true => buf.len(),
            false => self.cut(buf.len(), self.settings.largest_read),
        };
        let (open, pipe) = self.open_pipe(id)?;
        let name = open.pipe;
        if pipe.pages.is_empty() {
            return match pipe.writers {
                0 => Ok(0),
                _ => Err(sys::simulated::would_block()),
            };
        }
        let mut read = 0;
        let mut makes_room = false;
        while read < length
            && let Some(page) = pipe.pages.front_mut()
        {
            let unread = &page.bytes[page.start..];
            let count = unread.len().min(length - read);
            buf[read..read + count].copy_from_slice(&unread[..count]);
            read += count;
            page.start += count;
            if page.start == page.bytes.len() {
                makes_room |= pipe.pages.len() >= pipe.most_pages;
                pipe.pages.pop_front();
            }
        }
        let is_cut = read == length && length < buf.len() && !pipe.pages.is_empty();
        if makes_room {
            self.raise_ends(name, Cause::Room, |way| way.writes, None);
        }
        if is_cut {
            self.raise(id, Cause::Arrival);
        }
        Ok(read)
    }

    fn write_pipe(&mut self, id: SocketId, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        let (open, pipe) = self.open_pipe(id)?;
        if !open.way.writes {
            return Err(sys::simulated::not_open_for_that());
        }
        let name = open.pipe;
        if let Some(error) = open.failing.send() {
            if error.kind() == io::ErrorKind::WouldBlock {
                self.raise(id, Cause::Room);
            }
            return Err(error);
        }
        if pipe.readers == 0 {
            return Err(sys::simulated::broken_pipe());
        }
        if let Some(error) = self.error_by_chance(id, Cause::Room) {
            return Err(error);
        }
        let data: Vec<u8> = pieces.iter().flat_map(|piece| piece.to_vec()).collect();
        if data.is_empty() {
            return Ok(0);
        }
        // Up to PIPE_BUF bytes are written as one.
        let length = match data.len() <= PAGE {
            true => data.len(),
            false => PAGE.max(self.cut(data.len(), self.settings.largest_send)),
        };
        let (_, pipe) = self.open_pipe(id)?;
        let written = pipe.write(&data[..length]);
        // Even if nothing was: whoever polls is woken.
        self.raise_ends(name, Cause::Arrival, |way| way.reads, None);
        match written {
            0 => Err(sys::simulated::would_block()),
            _ => Ok(written),
        }
    }

    /// Raises an event on those ends of a pipe that `is_meant` says, but not on `except`.
    fn raise_ends(
        &mut self,
        pipe: PipeId,
        cause: Cause,
        is_meant: impl Fn(OpenedFor) -> bool,
        except: Option<SocketId>,
    ) {
        let ends = self.open_pipes.iter();
        let ends =
            ends.filter(|(id, end)| end.pipe == pipe && is_meant(end.way) && Some(**id) != except);
        let all: Vec<_> = ends.map(|(id, _)| *id).collect();
        for id in all {
            self.raise(id, cause);
        }
    }

    pub(super) fn pipe_readiness(&self, id: SocketId) -> Readiness {
        let open = self.open_pipes.get(&id);
        let Some((open, pipe)) = open.and_then(|it| Some((it, self.pipes.get(&it.pipe)?))) else {
            return Readiness::EMPTY;
        };
        let interest = open.watch.as_ref().map(|watch| watch.interest);
        let wants_reading = matches!(interest, Some(Interest::Readable | Interest::Both));
        let wants_writing = matches!(interest, Some(Interest::Writable | Interest::Both));
        let mut readiness = Readiness::EMPTY;
        if wants_reading && open.way.reads && !pipe.pages.is_empty() {
            readiness |= Readiness::READABLE;
        }
        if wants_writing && open.way.writes && pipe.pages.len() < pipe.most_pages {
            readiness |= Readiness::WRITABLE;
        }
        if open.way.writes && pipe.readers == 0 {
            let is_alone = readiness.is_empty();
            if is_alone || readiness.intersects(Readiness::WRITABLE) {
                readiness |= Readiness::WRITE_CLOSED;
            }
            readiness |= Readiness::ERROR;
        }
        if open.way.reads && pipe.writers == 0 && open.told_from != pipe.openings {
            readiness |= Readiness::READ_CLOSED | Readiness::WRITE_CLOSED;
        }
        readiness
    }

    pub(super) fn close_pipe(&mut self, id: SocketId) {
        let Some(open) = self.open_pipes.remove(&id) else {
            return;
        };
        if let Some(watch) = &open.watch {
            self.forget_event(id, watch);
        }
        let Some(pipe) = self.pipes.get_mut(&open.pipe) else {
            return;
        };
        pipe.readers -= usize::from(open.way.reads);
        pipe.writers -= usize::from(open.way.writes);
        let (readers, writers) = (pipe.readers, pipe.writers);
        if readers == 0 && writers == 0 {
            // Nobody keeps what was in it.
            pipe.pages.clear();
            if pipe.name.is_none() {
                self.pipes.remove(&open.pipe);
            }
        } else if readers == 0 || writers == 0 {
            self.raise_ends(open.pipe, Cause::Any, |_| true, None);
        }
    }

    /// Lets go of an end that somebody holds without watching it.
    pub(super) fn let_go_of_pipe(&mut self, id: SocketId, holder: Holder) {
        self.unwatch(id, holder);
        self.let_go(id);
    }
}

impl SimulatedPipe {
    /// Puts as much of `data` into the pages as there is room for.
    fn write(&mut self, data: &[u8]) -> usize {
        let mut written = 0;
        // What does not fill a page may go behind what the last one has.
        let rest = data.len() % PAGE;
        if rest > 0
            && let Some(last) = self.pages.back_mut()
            && last.bytes.len() + rest <= PAGE
        {
            last.bytes.extend_from_slice(&data[..rest]);
            written = rest;
        }
        while written < data.len() && self.pages.len() < self.most_pages {
            let count = (data.len() - written).min(PAGE);
            self.pages.push_back(Page {
                bytes: data[written..written + count].to_vec(),
                start: 0,
            });
            written += count;
        }
        written
    }
}
