//! The device's end.

use bowline::framing::{
    FrameContext, FrameEncoder as _, FrameReceiver, Framed, Pairing, Unclaimed,
};
use bowline::{CloseReason, Reactor, Transport, UnixTransport};

use super::framing::{MAX_DESCRIPTORS, VhostUserFramer, VhostUserHeader};
use super::messages::{VhostUserRequest, features, write_config};

/// A protocol of a device, for a listener or a connector.
pub fn back_end<D>(device: D) -> Framed<VhostUserFramer, BackEnd<D>> {
    let back_end = BackEnd {
        device,
        acknowledges: false,
    };
    Framed::new(VhostUserFramer::new(), back_end)
        .pairing(Pairing::Claimed(Unclaimed::Close))
        .max_descriptors(MAX_DESCRIPTORS)
}

/// A device. All the promises of [`Protocol`](bowline::Protocol) hold.
pub trait VhostUserDevice<T: UnixTransport + ?Sized>: 'static {
    /// The front-end asks for something, with its descriptors. It waits for the answer, if
    /// there is one, and asks nothing else meanwhile.
    ///
    /// Whatever was given before stays the device's until it drops it: a new call, kick or
    /// table of memory takes the place of the one before.
    fn request_received(
        &mut self,
        cx: &mut BackEndContext<'_, T>,
        request: VhostUserRequest,
    ) -> VhostUserAnswer;

    /// The front-end is gone, and with it the guest, as a rule. Called once, last. Rings are
    /// to be stopped.
    fn connection_lost(&mut self, reactor: &mut Reactor, reason: &CloseReason) {
        let _ = (reactor, reason);
    }
}

/// What a device says to a request.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum VhostUserAnswer {
    /// It was done. Said only if it is asked for, and for no request that has an answer of
    /// its own: then the connection ends.
    Done,
    /// It was not done. The number is not 0. Where it cannot be said, the connection ends.
    Failed(u64),
    /// Features, or a number.
    Value(u64),
    /// The next entry of a ring.
    Vring {
        /// The ring.
        index: u32,
        /// The entry.
        number: u32,
    },
    /// A part of the configuration: as many bytes as were asked for. None mean that it
    /// cannot be read.
    Config(Vec<u8>),
}

/// What a device can reach in its callback.
#[derive(Debug)]
pub struct BackEndContext<'a, T: ?Sized> {
    /// The connection's transport.
    pub transport: &'a mut T,
    /// The reactor that drives it, to watch what kicks.
    pub reactor: &'a mut Reactor,
}

/// The receiver of [`back_end`].
#[derive(Debug)]
pub struct BackEnd<D> {
    device: D,
    /// The feature was chosen by which requests are acknowledged.
    acknowledges: bool,
}

impl<D> BackEnd<D> {
    /// The device.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// The device.
    pub fn device_mut(&mut self) -> &mut D {
        &mut self.device
    }
}

type Cx<'a, T> = FrameContext<'a, T, VhostUserFramer>;

impl<T, D> FrameReceiver<T, VhostUserFramer> for BackEnd<D>
where
    T: UnixTransport + ?Sized,
    D: VhostUserDevice<T>,
{
    fn frame_received(&mut self, cx: &mut Cx<'_, T>, frame: &[u8]) {
        let (header, payload) = VhostUserHeader::of(frame);
        let descriptors = cx.framing.descriptors();
        let request = match VhostUserRequest::read(header.request, payload, descriptors) {
            Some(request) if !header.is_reply => request,
            _ => {
                let number = header.request;
                log::warn!(target: "bowline::peers", "request {number} is malformed");
                return cx.transport.abort_connection();
            }
        };
        let has_answer = request.has_answer();
        if let VhostUserRequest::SetProtocolFeatures(chosen) = request {
            self.acknowledges = chosen & features::PROTOCOL_REPLY_ACK != 0;
        }
        let config = match request {
            VhostUserRequest::GetConfig { offset, flags, .. } => Some((offset, flags)),
            _ => None,
        };
        let mut own = BackEndContext {
            transport: &mut *cx.transport,
            reactor: &mut *cx.reactor,
        };
        let answer = self.device.request_received(&mut own, request);
        let is_awaited = header.needs_reply && self.acknowledges;
        let value = |value: u64| Some(value.to_ne_bytes().to_vec());
        let payload = match (answer, has_answer) {
            (VhostUserAnswer::Value(it), true) => value(it),
            (VhostUserAnswer::Vring { index, number }, true) => {
                Some([index.to_ne_bytes(), number.to_ne_bytes()].concat())
            }
            (VhostUserAnswer::Config(bytes), true) if bytes.is_empty() => Some(bytes),
            (VhostUserAnswer::Config(bytes), true) => {
                config.map(|(offset, flags)| write_config(offset, flags, &bytes))
            }
            (VhostUserAnswer::Done, false) if is_awaited => value(0),
            (VhostUserAnswer::Failed(error), false) if is_awaited => value(error.max(1)),
            (VhostUserAnswer::Done, false) => return,
            (answer, _) => {
                let number = header.request;
                log::warn!(target: "bowline::peers", "request {number}: {answer:?} cannot be said");
                None
            }
        };
        match payload {
            Some(payload) => reply(cx, header.request, &payload),
            None => cx.transport.abort_connection(),
        }
    }

    fn connection_lost(&mut self, cx: &mut Cx<'_, T>, reason: &CloseReason) {
        self.device.connection_lost(cx.reactor, reason);
    }
}

fn reply<T: Transport + ?Sized>(cx: &mut Cx<'_, T>, request: u32, payload: &[u8]) {
    let header = VhostUserHeader {
        request,
        is_reply: true,
        needs_reply: false,
    };
    let sent = VhostUserFramer::new().send_to(cx.transport, &header, payload);
    if sent.is_err() {
        cx.transport.abort_connection();
    }
}
