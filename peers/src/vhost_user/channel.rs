//! The channel on which a back-end sends requests.

use std::fmt;
use std::os::fd::OwnedFd;

use bowline::framing::{
    FrameContext, FrameEncoder as _, FrameReceiver, Framed, Pairing, Unclaimed,
};
use bowline::{CloseReason, Context, Reactor, UnixTransport, UnixTransportHandle};

use super::asking::Asking;
use super::codec::{Written, bytes, low, pair, value, words};
use super::framing::{MAX_DESCRIPTORS, VhostUserFramer, VhostUserHeader};
use super::front_end::{FrontEndError, FrontEndReply, Made, acknowledgement};
use super::messages::kind;

/// The numbers of the requests of back-ends, as in the specification.
pub(super) mod of_back_end {
    pub(crate) const FIRST: u32 = 1;
    pub(crate) const LAST: u32 = 8;
    pub(crate) const CONFIG_CHANGED: u32 = 2;
    pub(crate) const HOST_NOTIFIER: u32 = 3;
    pub(crate) const VRING_CALL: u32 = 4;
    pub(crate) const VRING_ERR: u32 = 5;
}

/// A request of a back-end.
#[derive(Debug)]
#[non_exhaustive]
pub enum BackEndRequest {
    /// The configuration of the device has changed. The front-end reads it again, maybe
    /// before it answers this.
    ConfigChanged,
    /// A page of the device to which the guest may write instead of kicking a ring. Without
    /// a descriptor, it may no longer do so.
    HostNotifier {
        /// The ring.
        index: u32,
        /// Its size in bytes.
        size: u64,
        /// Where it begins in the file.
        offset: u64,
        /// The memory.
        fd: Option<OwnedFd>,
    },
    /// Entries of a ring were used. Replaces the call eventfd.
    VringCall {
        /// The ring.
        index: u32,
    },
    /// A ring is broken. Replaces the error eventfd.
    VringErr {
        /// The ring.
        index: u32,
    },
    /// Any other request, unparsed.
    Other {
        /// Its number.
        request: u32,
        /// Its payload.
        payload: Vec<u8>,
        /// Its descriptors.
        descriptors: Vec<OwnedFd>,
    },
}

impl BackEndRequest {
    /// Parses a message. Returns `None` if its payload does not fit its request.
    fn read(
        request: u32,
        payload: &[u8],
        mut descriptors: impl Iterator<Item = OwnedFd>,
    ) -> Option<Self> {
        Some(match request {
            of_back_end::CONFIG_CHANGED => Self::ConfigChanged,
            of_back_end::HOST_NOTIFIER => {
                let [index, size, offset] = words(payload)?;
                Self::HostNotifier {
                    index: low(index) & 0xff,
                    size,
                    offset,
                    fd: descriptors.next(),
                }
            }
            of_back_end::VRING_CALL | of_back_end::VRING_ERR => {
                let index = low(value(payload)?);
                match request {
                    of_back_end::VRING_CALL => Self::VringCall { index },
                    _ => Self::VringErr { index },
                }
            }
            _ => Self::Other {
                request,
                payload: payload.to_vec(),
                descriptors: descriptors.take(MAX_DESCRIPTORS).collect(),
            },
        })
    }

    fn write(self) -> Written {
        match self {
            Self::ConfigChanged => Written::new(of_back_end::CONFIG_CHANGED, Vec::new()),
            Self::HostNotifier {
                index,
                size,
                offset,
                fd,
            } => {
                let flag = if fd.is_some() { 0 } else { kind::NO_DESCRIPTOR };
                let payload = bytes(&[u64::from(index | flag), size, offset]);
                Written::new(of_back_end::HOST_NOTIFIER, payload).with(fd)
            }
            Self::VringCall { index } => Written::new(of_back_end::VRING_CALL, pair(index, 0)),
            Self::VringErr { index } => Written::new(of_back_end::VRING_ERR, pair(index, 0)),
            Self::Other {
                request,
                payload,
                descriptors,
            } => Written::new(request, payload).with(descriptors),
        }
    }
}

fn framed<R>(receiver: R) -> Framed<VhostUserFramer, R> {
    Framed::new(VhostUserFramer::of_back_end(), receiver)
        .pairing(Pairing::Claimed(Unclaimed::Close))
        .max_descriptors(MAX_DESCRIPTORS)
}

/// Makes the protocol for the socket on which a device may send requests
/// ([`SetBackendReqFd`](super::VhostUserRequest::SetBackendReqFd)). `made` is called when
/// the socket is adopted. From then on, [`ask`](BackEndChannel::ask) sends requests. It is
/// reached with [`call_protocol`](bowline::Transports::call_protocol), for the type
/// [`BackEndChannel`].
pub fn back_end_channel(
    made: impl FnOnce(&mut Reactor, UnixTransportHandle) + 'static,
) -> Framed<VhostUserFramer, BackEndChannel> {
    framed(BackEndChannel {
        made: Some(Box::new(made)),
        asking: Asking::new(VhostUserFramer::of_back_end()),
    })
}

/// The receiver that [`back_end_channel`] puts into its [`Framed`].
pub struct BackEndChannel {
    made: Option<Made>,
    asking: Asking,
}

/// Whether to have a request on the channel of a back-end acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acknowledged {
    /// It is acknowledged. Both sides must have negotiated
    /// [`PROTOCOL_REPLY_ACK`](super::features::PROTOCOL_REPLY_ACK).
    Yes,
    /// It is not. `then` is called when the request was sent.
    No,
}

impl BackEndChannel {
    /// Sends a request to the front-end. `then` is called once, with the answer, in the
    /// order of the requests.
    ///
    /// A front-end may send the device a request before it answers. So the device must not
    /// wait for `then`.
    pub fn ask<T: UnixTransport + ?Sized>(
        &mut self,
        cx: &mut Context<'_, T>,
        request: BackEndRequest,
        acknowledged: Acknowledged,
        then: impl FnOnce(&mut Reactor, Result<FrontEndReply, FrontEndError>) + 'static,
    ) {
        let awaited = (false, acknowledged == Acknowledged::Yes);
        self.asking
            .ask(cx, request.write(), awaited, Box::new(then));
    }

    /// Returns how many answers are outstanding.
    pub fn outstanding(&self) -> usize {
        self.asking.outstanding()
    }
}

type Cx<'a, T> = FrameContext<'a, T, VhostUserFramer>;

impl<T: UnixTransport + ?Sized> FrameReceiver<T, VhostUserFramer> for BackEndChannel {
    fn connection_made(&mut self, cx: &mut Cx<'_, T>) {
        if let Some(made) = self.made.take() {
            made(cx.reactor, cx.transport.unix_handle());
        }
    }

    fn frame_received(&mut self, cx: &mut Cx<'_, T>, frame: &[u8]) {
        let read =
            |_, payload: &[u8], _: &mut dyn Iterator<Item = OwnedFd>| acknowledgement(payload);
        self.asking.answered(cx, frame, read);
    }

    fn connection_lost(&mut self, cx: &mut Cx<'_, T>, _: &CloseReason) {
        self.asking.lost(cx.reactor);
    }
}

impl fmt::Debug for BackEndChannel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BackEndChannel")
            .field("outstanding", &self.asking.outstanding())
            .finish_non_exhaustive()
    }
}

/// Makes the protocol of a front-end for its end of the channel that it has given to a
/// back-end. `asked` is called for each request. If it returns an error, which is not 0,
/// that is sent if the back-end wants an acknowledgement.
pub fn front_end_channel<A>(asked: A) -> Framed<VhostUserFramer, FrontEndChannel<A>>
where
    A: FnMut(&mut Reactor, BackEndRequest) -> Result<(), u64> + 'static,
{
    framed(FrontEndChannel { asked })
}

/// The receiver that [`front_end_channel`] puts into its [`Framed`].
pub struct FrontEndChannel<A> {
    asked: A,
}

impl<T, A> FrameReceiver<T, VhostUserFramer> for FrontEndChannel<A>
where
    T: UnixTransport + ?Sized,
    A: FnMut(&mut Reactor, BackEndRequest) -> Result<(), u64> + 'static,
{
    fn frame_received(&mut self, cx: &mut Cx<'_, T>, frame: &[u8]) {
        let (header, payload) = VhostUserHeader::of(frame);
        let descriptors = cx.framing.descriptors();
        let request = match BackEndRequest::read(header.request, payload, descriptors) {
            Some(request) if !header.is_reply => request,
            _ => {
                let number = header.request;
                log::warn!(target: "bowline::peers", "request {number} is malformed");
                return cx.transport.abort_connection();
            }
        };
        let error = (self.asked)(cx.reactor, request).err();
        if header.needs_reply {
            let header = VhostUserHeader {
                is_reply: true,
                needs_reply: false,
                ..header
            };
            let payload = bytes(&[error.map_or(0, |it| it.max(1))]);
            let sent = VhostUserFramer::of_back_end().send_to(cx.transport, &header, &payload);
            debug_assert!(sent.is_ok(), "it is short");
        }
    }
}

impl<A> fmt::Debug for FrontEndChannel<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrontEndChannel").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn what_is_written_is_read() {
        use BackEndRequest as Request;
        let fd = || Some(File::open("/dev/null").unwrap().into());
        let notifier = |fd| Request::HostNotifier {
            index: 7,
            size: 4_096,
            offset: 8_192,
            fd,
        };
        for request in [
            Request::ConfigChanged,
            notifier(fd()),
            notifier(None),
            Request::VringCall { index: 3 },
            Request::VringErr { index: 4 },
            Request::Other {
                request: 99,
                payload: vec![1],
                descriptors: fd().into_iter().collect(),
            },
        ] {
            let shown = |request: &Request| {
                let text = format!("{request:?}");
                // Without the descriptors' numbers, which differ.
                let mut parts = text.split("OwnedFd { fd: ");
                let first = parts.next().unwrap_or_default().to_owned();
                let is_digit = |letter: char| letter.is_ascii_digit();
                parts.fold(first, |text, part| text + part.trim_start_matches(is_digit))
            };
            let before = shown(&request);
            let written = request.write();
            let given = written.descriptors.len();
            let fds = || (0..given).filter_map(|_| fd());
            let after = Request::read(written.request, &written.payload, fds()).expect(&before);
            assert_eq!(shown(&after), before);
            for length in 0..written.payload.len() {
                let cut = Request::read(written.request, &written.payload[..length], fds());
                assert!(
                    matches!(cut, None | Some(Request::Other { .. })),
                    "{before} {length}"
                );
            }
        }
    }
}
