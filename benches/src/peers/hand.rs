//! One connection of the servers that are written by hand: what to do when it
//! is ready. Who says so is the business of `limit`, `mio` and `calloop`.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use super::{ECHO_MIXIN, RECEIVE, SEND, SINK, SOURCE, TEN};
use crate::sys::{Control, MAX_DESCRIPTORS};

const BUFFER_BYTES: usize = 65_536;
const PAGE_BYTES: usize = 4_096;
const WRITES: usize = 10;

pub(crate) trait Socket {
    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize>;
    fn send(&self, data: &[u8]) -> io::Result<usize>;
    fn raw(&self) -> RawFd;
}

/// For sockets that give no more than their descriptor.
macro_rules! socket_by_descriptor {
    ($type:ty) => {
        impl $crate::peers::hand::Socket for $type {
            #[inline]
            fn receive(&self, buffer: &mut [u8]) -> std::io::Result<usize> {
                $crate::sys::receive(self.raw(), buffer)
            }

            #[inline]
            fn send(&self, data: &[u8]) -> std::io::Result<usize> {
                $crate::sys::send(self.raw(), data)
            }

            #[inline]
            fn raw(&self) -> std::os::fd::RawFd {
                std::os::fd::AsRawFd::as_raw_fd(self)
            }
        }
    };
}
pub(super) use socket_by_descriptor;

socket_by_descriptor!(OwnedFd);

/// What all connections of a server share.
pub(crate) struct Scratch {
    bytes: Vec<u8>,
    start: usize,
    reply: Vec<u8>,
    control: Control,
    received: Vec<OwnedFd>,
    /// What is sent when descriptors are asked for.
    descriptor: File,
}

impl Scratch {
    pub(crate) fn new() -> io::Result<Self> {
        let bytes = vec![0; BUFFER_BYTES + PAGE_BYTES];
        let start = bytes.as_ptr().align_offset(PAGE_BYTES);
        Ok(Self {
            bytes,
            start,
            reply: Vec::new(),
            control: Control::new(),
            received: Vec::with_capacity(MAX_DESCRIPTORS),
            descriptor: File::open("/dev/null")?,
        })
    }
}

pub(crate) struct Connection<S, const TASK: u8> {
    pub(crate) socket: S,
    /// What the socket did not take.
    rest: Vec<u8>,
    /// Bytes or descriptors still to be sent, or received so far.
    count: usize,
}

/// What a connection wants after it was ready.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum After {
    Read,
    Write,
    Close,
}

/// How readiness is reported.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Trigger {
    /// Once; the peer has closed if the event says so.
    Edge { is_closed: bool },
    /// As long as it lasts: one read is enough.
    Level,
}

impl<S: Socket, const TASK: u8> Connection<S, TASK> {
    pub(crate) fn new(socket: S) -> Self {
        Self {
            socket,
            rest: Vec::new(),
            count: 0,
        }
    }

    #[inline]
    pub(crate) fn ready(&mut self, scratch: &mut Scratch, trigger: Trigger) -> After {
        match self.try_ready(scratch, trigger) {
            Ok(after) => after,
            Err(_) => After::Close,
        }
    }

    #[inline]
    fn try_ready(&mut self, scratch: &mut Scratch, trigger: Trigger) -> io::Result<After> {
        if !self.rest.is_empty() && !self.flush()? {
            return Ok(After::Write);
        }
        if (TASK == SOURCE || TASK == SEND) && self.count > 0 {
            return self.produce(scratch);
        }
        loop {
            let buffer = &mut scratch.bytes[scratch.start..scratch.start + BUFFER_BYTES];
            let taken = if TASK == ECHO_MIXIN || TASK == RECEIVE {
                let fd = self.socket.raw();
                scratch.control.receive(fd, buffer, &mut scratch.received)
            } else {
                self.socket.receive(buffer)
            };
            let length = match taken {
                Ok(0) => return self.ended(),
                Ok(length) => length,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(After::Read),
                Err(error) => return Err(error),
            };
            let had_ancillary = !scratch.received.is_empty();
            match TASK {
                SINK => self.count += length,
                SOURCE | SEND => {
                    let number = scratch.bytes[scratch.start..].first_chunk();
                    self.count = usize::from_le_bytes(*number.expect("64 KiB are more"));
                    return self.produce(scratch);
                }
                RECEIVE => {
                    self.count += scratch.received.len();
                    scratch.received.clear();
                }
                TEN => {
                    scratch.reply.clear();
                    for _ in 0..WRITES {
                        let data = &scratch.bytes[scratch.start..scratch.start + length];
                        scratch.reply.extend_from_slice(data);
                    }
                    if !self.send(&scratch.reply)? {
                        return Ok(After::Write);
                    }
                }
                _ => {
                    scratch.received.clear();
                    if !self.send(&scratch.bytes[scratch.start..scratch.start + length])? {
                        return Ok(After::Write);
                    }
                }
            }
            let is_drained = length < BUFFER_BYTES && !had_ancillary;
            match trigger {
                Trigger::Edge { is_closed: false } if is_drained => return Ok(After::Read),
                Trigger::Edge { .. } => {}
                Trigger::Level => return Ok(After::Read),
            }
        }
    }

    /// Sends, and keeps what was not taken; whether all was.
    #[inline]
    fn send(&mut self, data: &[u8]) -> io::Result<bool> {
        let sent = match self.socket.send(data) {
            Ok(sent) => sent,
            Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
            Err(error) => return Err(error),
        };
        if sent == data.len() {
            return Ok(true);
        }
        self.rest.extend_from_slice(&data[sent..]);
        // Room may have come up meanwhile.
        self.flush()
    }

    #[cold]
    fn flush(&mut self) -> io::Result<bool> {
        let mut start = 0;
        while start < self.rest.len() {
            match self.socket.send(&self.rest[start..]) {
                Ok(sent) => start += sent,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.rest.drain(..start);
                    return Ok(false);
                }
                Err(error) => return Err(error),
            }
        }
        self.rest = Vec::new();
        Ok(true)
    }

    fn produce(&mut self, scratch: &mut Scratch) -> io::Result<After> {
        while self.count > 0 {
            let sent = if TASK == SEND {
                let descriptors = [scratch.descriptor.as_raw_fd(); MAX_DESCRIPTORS];
                let count = self.count.min(MAX_DESCRIPTORS);
                let fd = self.socket.raw();
                let data = &scratch.bytes[scratch.start..scratch.start + count];
                scratch.control.send(fd, data, &descriptors[..count])
            } else {
                let count = self.count.min(BUFFER_BYTES);
                self.socket
                    .send(&scratch.bytes[scratch.start..scratch.start + count])
            };
            match sent {
                Ok(sent) => self.count -= sent,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(After::Write),
                Err(error) => return Err(error),
            }
        }
        Ok(After::Close)
    }

    #[cold]
    fn ended(&self) -> io::Result<After> {
        if TASK == SINK || TASK == RECEIVE {
            self.socket.send(&self.count.to_le_bytes())?;
        }
        Ok(After::Close)
    }
}
