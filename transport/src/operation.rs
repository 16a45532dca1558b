//! What an operator may ask of a descriptor from outside, with the feature `inspect`.

use std::fmt;
use std::rc::Rc;

use bowline_protocol::{Listener, WriteObserver};
use bowline_reactor::{Reactor, Token};

use crate::link::{Flags, Link};
use crate::log;
use crate::stream::StreamTransport;

/// How much of each piece is logged.
const SHOWN: usize = 256;

/// What an operator may ask of a descriptor. See
/// [`Transports::operate`](crate::Transports::operate).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Operation {
    /// A connection closes once everything was sent; a listener stops listening.
    Close,
    /// A connection ends at once.
    Abort,
    /// A listener accepts nothing for now. (A paused connection is its protocol's.)
    Pause,
    /// A listener accepts again.
    Resume,
    /// What a connection sends and receives is logged from now on, under
    /// `bowline::traffic`, at the level `info`: of each piece the length, and the first 256
    /// bytes. This takes the place of a
    /// [write observer](bowline_protocol::AnyConnection::set_write_observer).
    LogTraffic,
    /// It is logged no more.
    StopLogging,
}

/// Nobody did what an [`Operation`] asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OperateError {
    /// The descriptor is gone.
    Gone,
    /// It knows nothing of this operation.
    Unsupported,
}

impl fmt::Display for OperateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gone => "the descriptor is gone",
            Self::Unsupported => "the descriptor cannot do that",
        })
    }
}

impl std::error::Error for OperateError {}

/// The request that a descriptor is given.
pub(crate) struct OperationRequest {
    operation: Operation,
    is_done: bool,
}

impl OperationRequest {
    pub(crate) fn of_connection<T: StreamTransport>(&mut self, transport: &mut T) {
        self.is_done = true;
        match self.operation {
            Operation::Close => transport.lose_connection(),
            Operation::Abort => transport.abort_connection(),
            Operation::LogTraffic => {
                let token = transport.stream().link.token;
                transport.set_write_observer(Some(Rc::new(Sent(token))));
                transport.stream_mut().link.log_received(true);
            }
            Operation::StopLogging => {
                transport.set_write_observer(None);
                transport.stream_mut().link.log_received(false);
            }
            Operation::Pause | Operation::Resume => self.is_done = false,
        }
    }

    pub(crate) fn of_listener(&mut self, listener: &mut dyn Listener) {
        self.is_done = true;
        match self.operation {
            Operation::Close => listener.stop_listening(),
            Operation::Pause => listener.pause_accepting(),
            Operation::Resume => listener.resume_accepting(),
            _ => self.is_done = false,
        }
    }
}

pub(crate) fn operate(
    reactor: &mut Reactor,
    token: Token,
    operation: Operation,
    then: impl FnOnce(&mut Reactor, Result<(), OperateError>) + 'static,
) {
    reactor.enter(token, move |descriptor, reactor| {
        let mut request = OperationRequest {
            operation,
            is_done: false,
        };
        let (next, result) = match descriptor {
            None => (bowline_reactor::Next::Keep, Err(OperateError::Gone)),
            Some(descriptor) => {
                let next = descriptor.request(reactor, &mut request);
                let result = match request.is_done {
                    true => Ok(()),
                    false => Err(OperateError::Unsupported),
                };
                (next, result)
            }
        };
        // A call of its own, so that its panic does not end the connection.
        reactor.defer(move |reactor| then(reactor, result));
        next
    });
}

#[derive(Debug)]
struct Sent(Token);

impl WriteObserver for Sent {
    fn written(&self, data: &[u8]) {
        log_piece(self.0, "sends", data);
    }
}

fn log_piece(token: Token, verb: &str, data: &[u8]) {
    ::log::info!(
        target: log::TRAFFIC,
        "{token} {verb} {} bytes: {}",
        data.len(),
        data[..data.len().min(SHOWN)].escape_ascii(),
    );
}

impl Link {
    /// Has what is received logged. As long, each read counts as one after which there may
    /// be more: that keeps the question off the way of all others.
    fn log_received(&mut self, on: bool) {
        if on {
            let reads_on = self.has(Flags::READ_ON);
            self.cold().logs_received.get_or_insert(reads_on);
            self.set(Flags::READ_ON);
        } else if let Some(reads_on) = self.cold().logs_received.take()
            && !reads_on
            && !self.has(Flags::END_ARRIVED)
        {
            self.clear(Flags::READ_ON);
        }
    }

    /// Logs what was received, if that is wanted.
    #[cold]
    pub(crate) fn note_received(&self, data: &[u8]) {
        if self
            .cold_ref()
            .is_some_and(|cold| cold.logs_received.is_some())
        {
            log_piece(self.token, "received", data);
        }
    }
}
