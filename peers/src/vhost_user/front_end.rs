//! The virtual machine monitor: the front-end.

use std::fmt;
use std::os::fd::OwnedFd;

use bowline::framing::{FrameContext, FrameReceiver, Framed, Pairing, Unclaimed};
use bowline::{
    CloseReason, Context, PassedDescriptor, Reactor, UnixTransport, UnixTransportHandle,
};

use super::asking::{Answer, Asking};
use super::codec::{high, low, read_inflight, value};
use super::framing::{MAX_DESCRIPTORS, VhostUserFramer};
use super::messages::{InflightRegion, VhostUserRequest, features};

pub(super) type Made = Box<dyn FnOnce(&mut Reactor, UnixTransportHandle)>;

/// Makes a protocol that sends requests to a device. `made` is called when the connection
/// is made. From then on, [`ask`](FrontEnd::ask) sends requests. It is reached with
/// [`call_protocol`](bowline::Transports::call_protocol), for the type [`FrontEnd`].
pub fn front_end(
    made: impl FnOnce(&mut Reactor, UnixTransportHandle) + 'static,
) -> Framed<VhostUserFramer, FrontEnd> {
    let front_end = FrontEnd {
        made: Some(Box::new(made)),
        asking: Asking::new(VhostUserFramer::new()),
        acknowledged: false,
    };
    Framed::new(VhostUserFramer::new(), front_end)
        .pairing(Pairing::Claimed(Unclaimed::Close))
        .max_descriptors(MAX_DESCRIPTORS)
}

/// The receiver that [`front_end`] puts into its [`Framed`].
pub struct FrontEnd {
    made: Option<Made>,
    asking: Asking,
    /// The feature was negotiated by which requests are acknowledged.
    acknowledged: bool,
}

/// The answer to a request.
#[derive(Debug)]
#[non_exhaustive]
pub enum FrontEndReply {
    /// The request was sent, and has no answer.
    Sent,
    /// The request was done.
    Done,
    /// Features, or another number.
    Value(u64),
    /// A ring and its next entry.
    Vring {
        /// The ring.
        index: u32,
        /// The entry.
        number: u32,
    },
    /// The bytes of the configuration. Empty if the device cannot read it.
    Config(Vec<u8>),
    /// Memory in which the device records its requests in progress. Keep it for the next
    /// device.
    Inflight {
        /// Its layout.
        region: InflightRegion,
        /// The memory.
        fd: OwnedFd,
    },
}

/// Why a request was not answered, or has failed.
#[derive(Debug)]
#[non_exhaustive]
pub enum FrontEndError {
    /// The device has failed to do it, with this number.
    Failed(u64),
    /// The request was not sent: it is too long, or the transport refuses it. Returns the
    /// descriptors.
    NotSent(Vec<PassedDescriptor>),
    /// The answer does not fit the request, and the connection ends.
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
    /// Sends a request to the device. `then` is called once, with the answer, in the order
    /// of the requests.
    ///
    /// A request without an answer of its own is acknowledged if both sides have negotiated
    /// it ([`features::PROTOCOL_REPLY_ACK`]). Otherwise `then` is told at once that it was
    /// sent.
    pub fn ask<T: UnixTransport + ?Sized>(
        &mut self,
        cx: &mut Context<'_, T>,
        request: VhostUserRequest,
        then: impl FnOnce(&mut Reactor, Result<FrontEndReply, FrontEndError>) + 'static,
    ) {
        let has_answer = request.has_answer();
        let chosen = match request {
            VhostUserRequest::SetProtocolFeatures(chosen) => Some(chosen),
            _ => None,
        };
        let needs_reply = !has_answer && self.acknowledged;
        let awaited = (has_answer, needs_reply);
        self.asking
            .ask(cx, request.write(), awaited, Box::new(then));
        if let Some(chosen) = chosen {
            self.acknowledged = chosen & features::PROTOCOL_REPLY_ACK != 0;
        }
    }

    /// Returns how many answers are outstanding.
    pub fn outstanding(&self) -> usize {
        self.asking.outstanding()
    }
}

/// Parses an answer. Returns `None` if it does not fit its request.
fn read(
    request: u32,
    payload: &[u8],
    descriptors: &mut dyn Iterator<Item = OwnedFd>,
) -> Option<Answer> {
    use super::messages::kind;
    let value = || value(payload);
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
        kind::GET_INFLIGHT_FD => FrontEndReply::Inflight {
            region: read_inflight(payload)?,
            fd: descriptors.next()?,
        },
        // Some back-ends say where it is, some a number that means nothing.
        kind::SET_LOG_BASE => FrontEndReply::Done,
        _ => return acknowledgement(payload),
    }))
}

/// Parses the acknowledgement of a request that has no other answer.
pub(super) fn acknowledgement(payload: &[u8]) -> Option<Answer> {
    Some(match value(payload)? {
        0 => Ok(FrontEndReply::Done),
        error => Err(FrontEndError::Failed(error)),
    })
}

impl<T: UnixTransport + ?Sized> FrameReceiver<T, VhostUserFramer> for FrontEnd {
    fn connection_made(&mut self, cx: &mut Cx<'_, T>) {
        if let Some(made) = self.made.take() {
            made(cx.reactor, cx.transport.unix_handle());
        }
    }

    fn frame_received(&mut self, cx: &mut Cx<'_, T>, frame: &[u8]) {
        self.asking.answered(cx, frame, read);
    }

    fn connection_lost(&mut self, cx: &mut Cx<'_, T>, _: &CloseReason) {
        self.asking.lost(cx.reactor);
    }
}

impl fmt::Debug for FrontEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrontEnd")
            .field("outstanding", &self.asking.outstanding())
            .field("acknowledged", &self.acknowledged)
            .finish_non_exhaustive()
    }
}
