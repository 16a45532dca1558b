//! The monitor's end.

use std::collections::VecDeque;
use std::fmt;

use bowline::framing::{
    FrameContext, FrameEncoder as _, FrameReceiver, Framed, Pairing, Unclaimed,
};
use bowline::{
    CloseReason, Context, PassedDescriptor, Reactor, UnixTransport, UnixTransportHandle,
    WriteStatus,
};

use super::framing::{MAX_DESCRIPTORS, VhostUserFramer, VhostUserHeader};
use super::messages::{VhostUserRequest, features, high, low};

type Made = Box<dyn FnOnce(&mut Reactor, UnixTransportHandle)>;
type Then = Box<dyn FnOnce(&mut Reactor, Result<FrontEndReply, FrontEndError>)>;

/// A protocol that asks a device. `made` is called when the connection is there. From then
/// on, requests are made by [`ask`](FrontEnd::ask), through
/// [`call_protocol`](bowline::Transports::call_protocol) for a part of the type
/// [`FrontEnd`].
pub fn front_end(
    made: impl FnOnce(&mut Reactor, UnixTransportHandle) + 'static,
) -> Framed<VhostUserFramer, FrontEnd> {
    let front_end = FrontEnd {
        made: Some(Box::new(made)),
        outstanding: VecDeque::new(),
        acknowledged: false,
    };
    Framed::new(VhostUserFramer::new(), front_end)
        .pairing(Pairing::Claimed(Unclaimed::Close))
        .max_descriptors(MAX_DESCRIPTORS)
}

/// The receiver of [`front_end`].
pub struct FrontEnd {
    made: Option<Made>,
    /// Requests whose answer is to come, in order.
    outstanding: VecDeque<(u32, Then)>,
    /// The feature was chosen by which requests are acknowledged.
    acknowledged: bool,
}

/// What a device has answered.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FrontEndReply {
    /// The request was sent, and nothing is answered to it.
    Sent,
    /// It was done.
    Done,
    /// Features, or a number.
    Value(u64),
    /// A ring and its next entry.
    Vring {
        /// The ring.
        index: u32,
        /// The entry.
        number: u32,
    },
    /// The bytes of a configuration. None mean that the device cannot read it.
    Config(Vec<u8>),
}

/// Why there is no answer.
#[derive(Debug)]
#[non_exhaustive]
pub enum FrontEndError {
    /// The device has not done it, and says so by this number.
    Failed(u64),
    /// The request was not sent: it is too long, or the transport refuses. Its descriptors
    /// come back.
    NotSent(Vec<PassedDescriptor>),
    /// The device answers something else, and the connection ends.
    Malformed,
    /// The connection has ended.
    Lost,
}

impl fmt::Display for FrontEndError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed(error) => write!(f, "the device has failed: {error}"),
            Self::NotSent(_) => f.write_str("request cannot be sent"),
            Self::Malformed => f.write_str("answer belongs to another request"),
            Self::Lost => f.write_str("connection to the device has ended"),
        }
    }
}

impl std::error::Error for FrontEndError {}

type Cx<'a, T> = FrameContext<'a, T, VhostUserFramer>;

impl FrontEnd {
    /// Asks the device. `then` is called once, with its answer; in the order of requests.
    ///
    /// A request that has no answer of its own is acknowledged where both sides have
    /// chosen so ([`features::PROTOCOL_REPLY_ACK`]). Otherwise `then` is told, at once, that
    /// it was sent.
    pub fn ask<T: UnixTransport + ?Sized>(
        &mut self,
        cx: &mut Context<'_, T>,
        request: VhostUserRequest,
        then: impl FnOnce(&mut Reactor, Result<FrontEndReply, FrontEndError>) + 'static,
    ) {
        let then: Then = Box::new(then);
        let has_answer = request.has_answer();
        let chosen = match request {
            VhostUserRequest::SetProtocolFeatures(chosen) => Some(chosen),
            _ => None,
        };
        let (number, payload, descriptors) = request.write();
        let needs_reply = !has_answer && self.acknowledged;
        let header = VhostUserHeader {
            request: number,
            is_reply: false,
            needs_reply,
        };
        match send(cx, &header, &payload, descriptors) {
            Err(descriptors) => then(cx.reactor, Err(FrontEndError::NotSent(descriptors))),
            Ok(WriteStatus::Refused) => then(cx.reactor, Err(FrontEndError::Lost)),
            Ok(_) if has_answer || needs_reply => self.outstanding.push_back((number, then)),
            Ok(_) => then(cx.reactor, Ok(FrontEndReply::Sent)),
        }
        if let Some(chosen) = chosen {
            self.acknowledged = chosen & features::PROTOCOL_REPLY_ACK != 0;
        }
    }

    /// How many answers are to come.
    pub fn outstanding(&self) -> usize {
        self.outstanding.len()
    }
}

/// Sends in one call, with the descriptors on the first byte.
fn send<T: UnixTransport + ?Sized>(
    cx: &mut Context<'_, T>,
    header: &VhostUserHeader,
    payload: &[u8],
    descriptors: Vec<PassedDescriptor>,
) -> Result<WriteStatus, Vec<PassedDescriptor>> {
    let framer = VhostUserFramer::new();
    if descriptors.is_empty() {
        let sent = framer.send_to(cx.transport, header, payload);
        return sent.map_err(|_| Vec::new());
    }
    let sent = framer.send_with_descriptors_to(cx.transport, header, payload, descriptors);
    sent.map_err(|error| error.descriptors)
}

/// What an answer says. `None` if it is not as its request has it.
fn read(request: u32, payload: &[u8]) -> Option<Result<FrontEndReply, FrontEndError>> {
    use super::messages::kind;
    let value = || Some(u64::from_ne_bytes(*payload.first_chunk()?));
    Some(Ok(match request {
        kind::GET_FEATURES
        | kind::GET_PROTOCOL_FEATURES
        | kind::GET_QUEUE_NUM
        | kind::GET_MAX_MEM_SLOTS => FrontEndReply::Value(value()?),
        kind::GET_VRING_BASE => FrontEndReply::Vring {
            index: low(value()?),
            number: high(value()?),
        },
        kind::GET_CONFIG if payload.is_empty() => FrontEndReply::Config(Vec::new()),
        kind::GET_CONFIG => FrontEndReply::Config(payload.get(12..)?.to_vec()),
        _ => match value()? {
            0 => FrontEndReply::Done,
            error => return Some(Err(FrontEndError::Failed(error))),
        },
    }))
}

impl<T: UnixTransport + ?Sized> FrameReceiver<T, VhostUserFramer> for FrontEnd {
    fn connection_made(&mut self, cx: &mut Cx<'_, T>) {
        if let Some(made) = self.made.take() {
            made(cx.reactor, cx.transport.unix_handle());
        }
    }

    fn frame_received(&mut self, cx: &mut Cx<'_, T>, frame: &[u8]) {
        let (header, payload) = VhostUserHeader::of(frame);
        let asked = self.outstanding.pop_front();
        let answer = match &asked {
            Some((number, _)) if header.is_reply && header.request == *number => {
                read(header.request, payload)
            }
            _ => None,
        };
        let is_right = answer.is_some();
        if let Some((_, then)) = asked {
            then(cx.reactor, answer.unwrap_or(Err(FrontEndError::Malformed)));
        }
        if !is_right {
            cx.transport.abort_connection();
        }
    }

    fn connection_lost(&mut self, cx: &mut Cx<'_, T>, _: &CloseReason) {
        for (_, then) in std::mem::take(&mut self.outstanding) {
            then(cx.reactor, Err(FrontEndError::Lost));
        }
    }
}

impl fmt::Debug for FrontEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrontEnd")
            .field("outstanding", &self.outstanding.len())
            .field("acknowledged", &self.acknowledged)
            .finish_non_exhaustive()
    }
}
