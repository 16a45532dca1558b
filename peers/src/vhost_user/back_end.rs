//! The device: the back-end.

use bowline::framing::{
    FrameContext, FrameEncoder as _, FrameReceiver, Framed, Pairing, Unclaimed,
};
use bowline::{CloseReason, Linger, PassedDescriptor, Reactor, UnixTransport};

use super::codec::{bytes, pair, write_config, write_inflight};
use super::framing::{MAX_DESCRIPTORS, VhostUserFramer, VhostUserHeader};
use super::messages::{InflightRegion, VhostUserRequest, features};

/// Makes the protocol of a device, for a listener or a connector.
pub fn back_end<D>(device: D) -> Framed<VhostUserFramer, BackEnd<D>> {
    let back_end = BackEnd {
        device,
        acknowledges: false,
    };
    Framed::new(VhostUserFramer::new(), back_end)
        .pairing(Pairing::Claimed(Unclaimed::Close))
        .max_descriptors(MAX_DESCRIPTORS)
}

/// A device. Everything that [`Protocol`](bowline::Protocol) promises holds for it.
pub trait VhostUserDevice<T: UnixTransport + ?Sized>: 'static {
    /// The front-end sends a request, with its descriptors. If there is an answer, the
    /// front-end waits for it and sends nothing else meanwhile.
    ///
    /// The device owns what it was given until it drops it. A new call eventfd, kick
    /// eventfd or memory table replaces the previous one.
    /// table of memory takes the place of the one before.
    fn request_received(
        &mut self,
        cx: &mut BackEndContext<'_, T>,
        request: VhostUserRequest,
    ) -> VhostUserAnswer;

    /// The front-end is gone, and usually the guest as well. Called once, last. Stop the
    /// rings.
    fn connection_lost(&mut self, reactor: &mut Reactor, reason: &CloseReason) {
        let _ = (reactor, reason);
    }
}

/// The answer of a device to a request.
#[derive(Debug)]
#[non_exhaustive]
pub enum VhostUserAnswer {
    /// The request was done. This is sent only if the front-end wants an acknowledgement,
    /// or for [`VhostUserRequest::SetLogBase`]. If the request needs another answer, the
    /// connection ends.
    Done,
    /// The request failed. The number is not 0. If there is no way to send it, the
    /// connection ends.
    Failed(u64),
    /// Features, or another number.
    Value(u64),
    /// The next entry of a ring.
    Vring {
        /// The ring.
        index: u32,
        /// The entry.
        number: u32,
    },
    /// A part of the configuration: as many bytes as were requested. Empty if it cannot be
    /// read.
    Config(Vec<u8>),
    /// Memory in which the device records its requests in progress.
    Inflight {
        /// Its layout.
        region: InflightRegion,
        /// The memory, usually a memfd. The device keeps a descriptor of its own.
        fd: PassedDescriptor,
    },
}

/// What a device can use in its callback.
#[derive(Debug)]
pub struct BackEndContext<'a, T: ?Sized> {
    /// The connection's transport.
    pub transport: &'a mut T,
    /// The reactor, to watch the kick eventfds.
    pub reactor: &'a mut Reactor,
}

/// The receiver that [`back_end`] puts into its [`Framed`].
#[derive(Debug)]
pub struct BackEnd<D> {
    device: D,
    /// The feature was negotiated by which requests are acknowledged.
    acknowledges: bool,
}

impl<D> BackEnd<D> {
    /// Returns the device.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// Returns the device.
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
    fn connection_made(&mut self, cx: &mut Cx<'_, T>) {
        // A front-end is trusted with more: it can cut off the memory that a device has
        // mapped. So nothing is spent on what a socket among its descriptors could do.
        cx.transport.set_received_linger(Linger::Keep);
    }

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
        let asked = match request {
            VhostUserRequest::GetConfig { offset, flags, .. } => Asked::Config { offset, flags },
            VhostUserRequest::SetLogBase { .. } => Asked::Log,
            _ if has_answer => Asked::Answer,
            _ if header.needs_reply && self.acknowledges => Asked::Acknowledgement,
            _ => Asked::Nothing,
        };
        let mut own = BackEndContext {
            transport: &mut *cx.transport,
            reactor: &mut *cx.reactor,
        };
        let answer = self.device.request_received(&mut own, request);
        match payload_of(&asked, answer) {
            Ok(None) => {}
            Ok(Some((payload, fd))) => reply(cx, header.request, &payload, fd),
            Err(answer) => {
                let number = header.request;
                log::warn!(target: "bowline::peers", "request {number}: {answer:?} cannot be said");
                cx.transport.abort_connection();
            }
        }
    }

    fn connection_lost(&mut self, cx: &mut Cx<'_, T>, reason: &CloseReason) {
        self.device.connection_lost(cx.reactor, reason);
    }
}

/// What a front-end waits for.
enum Asked {
    Nothing,
    Acknowledgement,
    /// The answer of this request.
    Answer,
    /// An acknowledgement, even if none was asked for.
    Log,
    Config {
        offset: u32,
        flags: u32,
    },
}

type Payload = (Vec<u8>, Option<PassedDescriptor>);

/// Returns what to reply: `None` if nobody waits for it, an error if `answer` cannot be
/// sent.
fn payload_of(asked: &Asked, answer: VhostUserAnswer) -> Result<Option<Payload>, VhostUserAnswer> {
    use VhostUserAnswer as Answer;
    let plain = |payload| Ok(Some((payload, None)));
    match (answer, asked) {
        (Answer::Done, Asked::Nothing) => Ok(None),
        (Answer::Done, Asked::Acknowledgement | Asked::Log) => plain(bytes(&[0])),
        (Answer::Failed(error), Asked::Acknowledgement) => plain(bytes(&[error.max(1)])),
        (Answer::Value(it), Asked::Answer) => plain(bytes(&[it])),
        (Answer::Vring { index, number }, Asked::Answer) => plain(pair(index, number)),
        (Answer::Config(bytes), Asked::Config { .. }) if bytes.is_empty() => plain(bytes),
        (Answer::Config(bytes), Asked::Config { offset, flags }) => {
            plain(write_config(*offset, *flags, &bytes))
        }
        (Answer::Inflight { region, fd }, Asked::Answer) => {
            Ok(Some((write_inflight(&region), Some(fd))))
        }
        (answer, _) => Err(answer),
    }
}

fn reply<T: UnixTransport + ?Sized>(
    cx: &mut Cx<'_, T>,
    request: u32,
    payload: &[u8],
    fd: Option<PassedDescriptor>,
) {
    let header = VhostUserHeader {
        request,
        is_reply: true,
        needs_reply: false,
    };
    let framer = VhostUserFramer::new();
    let is_sent = match fd {
        None => framer.send_to(cx.transport, &header, payload).is_ok(),
        Some(fd) => framer
            .send_with_descriptors_to(cx.transport, &header, payload, vec![fd])
            .is_ok(),
    };
    if !is_sent {
        cx.transport.abort_connection();
    }
}
