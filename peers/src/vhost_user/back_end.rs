//! The device's end.

use bowline::framing::{
    FrameContext, FrameEncoder as _, FrameReceiver, Framed, Pairing, Unclaimed,
};
use bowline::{CloseReason, Linger, PassedDescriptor, Reactor, UnixTransport};

use super::codec::{bytes, pair, write_config, write_inflight};
use super::framing::{MAX_DESCRIPTORS, VhostUserFramer, VhostUserHeader};
use super::messages::{InflightRegion, VhostUserRequest, features};

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
#[derive(Debug)]
#[non_exhaustive]
pub enum VhostUserAnswer {
    /// It was done. Said only if it is asked for, or to [`VhostUserRequest::SetLogBase`]. For
    /// a request that has another answer, the connection ends.
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
    /// Memory in which the device notes what it is about.
    Inflight {
        /// What it is.
        region: InflightRegion,
        /// The memory: a memfd, as a rule. The device keeps one of its own.
        fd: PassedDescriptor,
    },
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
    /// An answer of its own.
    Answer,
    /// That it was done, whether or not it was asked for.
    Log,
    Config {
        offset: u32,
        flags: u32,
    },
}

type Payload = (Vec<u8>, Option<PassedDescriptor>);

/// What is replied: nothing, where nobody waits for it. An error for what cannot be said.
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
