//! What is to be sent, and in which order.

use std::collections::VecDeque;
use std::fmt;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use bowline::framing::EncodeError;
use bowline::{PassedDescriptor, Transport, UnixTransport, WriteStatus};
use serde::de::IgnoredAny;

use super::handle::OutgoingHandle;

/// How often Node sends a handle again (`MAX_HANDLE_RETRANSMISSIONS`).
const MAX_RETRIES: u32 = 3;

/// How many bytes may wait behind a handle by default.
const MAX_QUEUED: usize = 16 << 20;

/// Why a message was not sent. Returns the handle that was to be sent with it.
#[derive(Debug)]
pub struct NodeSendError {
    /// The reason.
    pub kind: NodeSendErrorKind,
    /// The handle, if there was one.
    pub handle: Option<OutgoingHandle>,
}

/// Why a message was not sent.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NodeSendErrorKind {
    /// It is not JSON. A Node process that reads it ends.
    NotJson,
    /// It contains a line feed, between two tokens.
    LineFeed,
    /// The descriptor is neither a socket nor a pipe. A Node that receives it can abort.
    NotPassable,
    /// Too much waits behind a handle that the peer has not acknowledged.
    QueueFull,
    /// The transport refuses it.
    Transport,
}

impl fmt::Display for NodeSendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.kind {
            NodeSendErrorKind::NotJson => "message is no JSON",
            NodeSendErrorKind::LineFeed => "message has a line feed in it",
            NodeSendErrorKind::NotPassable => "descriptor is neither a socket nor a pipe",
            NodeSendErrorKind::QueueFull => "too much waits for an acknowledgement",
            NodeSendErrorKind::Transport => "the transport takes no message",
        })
    }
}

impl std::error::Error for NodeSendError {}

impl From<EncodeError> for NodeSendErrorKind {
    fn from(_: EncodeError) -> Self {
        Self::LineFeed
    }
}

/// Messages on their way: one handle at a time, and what was sent after it.
#[derive(Debug)]
pub(super) struct Outbox {
    in_flight: Option<HandleLine>,
    queue: VecDeque<Outgoing>,
    queued_bytes: usize,
    pub(super) max_queued: usize,
}

#[derive(Debug)]
enum Outgoing {
    Plain(Vec<u8>),
    Handle(HandleLine),
}

#[derive(Debug)]
struct HandleLine {
    line: Vec<u8>,
    /// It stays open until the peer has it.
    fd: Rc<OwnedFd>,
    retries: u32,
}

/// What happened to a handle that the peer refused.
pub(super) enum AfterRefusal {
    SentAgain,
    GivenUp,
}

impl Default for Outbox {
    fn default() -> Self {
        Self {
            in_flight: None,
            queue: VecDeque::new(),
            queued_bytes: 0,
            max_queued: MAX_QUEUED,
        }
    }
}

impl Outbox {
    pub(super) fn send(
        &mut self,
        transport: &mut (impl Transport + ?Sized),
        json: &str,
    ) -> Result<WriteStatus, NodeSendErrorKind> {
        check(json)?;
        let line = [json.as_bytes(), b"\n"].concat();
        if self.in_flight.is_none() {
            return Ok(transport.write_owned(line));
        }
        self.queue(Outgoing::Plain(line))
    }

    pub(super) fn send_handle(
        &mut self,
        transport: &mut (impl UnixTransport + ?Sized),
        json: &str,
        handle: OutgoingHandle,
    ) -> Result<WriteStatus, NodeSendError> {
        let refuse = |kind, handle| {
            let handle = Some(handle);
            Err(NodeSendError { kind, handle })
        };
        if let Err(kind) = check(json) {
            return refuse(kind, handle);
        }
        if !handle.is_passable() {
            return refuse(NodeSendErrorKind::NotPassable, handle);
        }
        let line = line_of(json, &handle);
        let OutgoingHandle { kind, fd } = handle;
        let fd = match fd {
            PassedDescriptor::Owned(fd) => Rc::new(fd),
            PassedDescriptor::Shared(fd) => fd,
        };
        let copy = Rc::clone(&fd);
        let retries = 0;
        let line = HandleLine { line, fd, retries };
        let sent = match self.in_flight {
            None => self.transmit(transport, line),
            Some(_) => self.queue(Outgoing::Handle(line)),
        };
        sent.map_err(|error| NodeSendError {
            kind: error,
            handle: Some(OutgoingHandle {
                kind,
                fd: Rc::try_unwrap(copy).map_or_else(PassedDescriptor::Shared, Into::into),
            }),
        })
    }

    /// Notes that the peer has the handle.
    pub(super) fn acknowledged(&mut self, transport: &mut (impl UnixTransport + ?Sized)) {
        if self.in_flight.take().is_some() {
            self.go_on(transport);
        }
    }

    /// Notes that the peer does not have it.
    pub(super) fn refused(
        &mut self,
        transport: &mut (impl UnixTransport + ?Sized),
    ) -> AfterRefusal {
        let Some(mut line) = self.in_flight.take() else {
            return AfterRefusal::SentAgain;
        };
        line.retries += 1;
        if line.retries <= MAX_RETRIES && self.transmit(transport, line).is_ok() {
            return AfterRefusal::SentAgain;
        }
        self.go_on(transport);
        AfterRefusal::GivenUp
    }

    /// Returns how many messages wait for an acknowledgement, including the message with
    /// the handle.
    pub(super) fn waiting(&self) -> usize {
        self.queue.len() + usize::from(self.in_flight.is_some())
    }

    fn go_on(&mut self, transport: &mut (impl UnixTransport + ?Sized)) {
        while self.in_flight.is_none()
            && let Some(next) = self.queue.pop_front()
        {
            self.queued_bytes -= next.len();
            match next {
                Outgoing::Plain(line) => drop(transport.write_owned(line)),
                Outgoing::Handle(line) => {
                    if let Err(error) = self.transmit(transport, line) {
                        log::warn!(target: "bowline::peers", "a handle was not sent: {error:?}");
                    }
                }
            }
        }
        if self.queue.is_empty() {
            self.queue = VecDeque::new();
        }
    }

    fn transmit(
        &mut self,
        transport: &mut (impl UnixTransport + ?Sized),
        line: HandleLine,
    ) -> Result<WriteStatus, NodeSendErrorKind> {
        let fd = vec![PassedDescriptor::shared(&line.fd)];
        let status = transport
            .write_with_descriptors(&line.line, fd)
            .map_err(|_| NodeSendErrorKind::Transport)?;
        self.in_flight = Some(line);
        Ok(status)
    }

    fn queue(&mut self, message: Outgoing) -> Result<WriteStatus, NodeSendErrorKind> {
        let bytes = self.queued_bytes + message.len();
        if bytes > self.max_queued {
            return Err(NodeSendErrorKind::QueueFull);
        }
        self.queued_bytes = bytes;
        self.queue.push_back(message);
        Ok(WriteStatus::Ready)
    }
}

impl Outgoing {
    fn len(&self) -> usize {
        match self {
            Self::Plain(line) => line.len(),
            Self::Handle(line) => line.line.len(),
        }
    }
}

fn check(json: &str) -> Result<(), NodeSendErrorKind> {
    if json.contains('\n') {
        return Err(NodeSendErrorKind::LineFeed);
    }
    match serde_json::from_str::<IgnoredAny>(json) {
        Ok(_) => Ok(()),
        Err(_) => Err(NodeSendErrorKind::NotJson),
    }
}

/// Makes the line, with its keys in Node's own order.
fn line_of(json: &str, handle: &OutgoingHandle) -> Vec<u8> {
    let kind = serde_json::to_string(handle.kind.name()).expect("text is JSON");
    let mut line = format!(r#"{{"cmd":"NODE_HANDLE","type":{kind},"msg":{json}"#);
    if let super::NodeHandleKind::Datagrams { is_ipv6 } = handle.kind {
        let version = if is_ipv6 { '6' } else { '4' };
        line.push_str(&format!(r#","dgramType":"udp{version}""#));
    }
    line.push_str("}\n");
    line.into_bytes()
}
