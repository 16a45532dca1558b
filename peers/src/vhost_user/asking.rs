//! What the two ends that send requests have in common: a front-end, and a back-end on its
//! channel.

use std::os::fd::OwnedFd;

use bowline::framing::{FrameContext, FrameEncoder as _, Questions};
use bowline::{Context, PassedDescriptor, Reactor, UnixTransport, WriteStatus};

use super::codec::Written;
use super::framing::{VhostUserFramer, VhostUserHeader};
use super::front_end::{FrontEndError, FrontEndReply};

/// Called once, with the outcome of a request.
pub(super) type Then = Box<dyn FnOnce(&mut Reactor, Answer)>;
pub(super) type Answer = Result<FrontEndReply, FrontEndError>;

/// Requests that wait for an answer, in order.
pub(super) struct Asking {
    framer: VhostUserFramer,
    /// Each with the number of its request.
    questions: Questions<(), (u32, Then)>,
}

impl Asking {
    pub(super) fn new(framer: VhostUserFramer) -> Self {
        let questions = Questions::new(usize::MAX);
        Self { framer, questions }
    }

    /// Sends a request in one call, with the descriptors on its first byte. `then` is
    /// called at once if there is no answer.
    pub(super) fn ask<T: UnixTransport + ?Sized>(
        &mut self,
        cx: &mut Context<'_, T>,
        written: Written,
        (is_answered, needs_reply): (bool, bool),
        then: Then,
    ) {
        let header = VhostUserHeader {
            request: written.request,
            is_reply: false,
            needs_reply,
        };
        match self.send(cx, &header, &written.payload, written.descriptors) {
            Err(descriptors) => then(cx.reactor, Err(FrontEndError::NotSent(descriptors))),
            Ok(WriteStatus::Refused) => then(cx.reactor, Err(FrontEndError::Lost)),
            Ok(_) if is_answered || needs_reply => {
                let now = cx.reactor.now();
                let refused = self.questions.ask((), (written.request, then), now);
                debug_assert!(refused.is_ok(), "there is no limit");
            }
            Ok(_) => then(cx.reactor, Ok(FrontEndReply::Sent)),
        }
    }

    fn send<T: UnixTransport + ?Sized>(
        &self,
        cx: &mut Context<'_, T>,
        header: &VhostUserHeader,
        payload: &[u8],
        descriptors: Vec<PassedDescriptor>,
    ) -> Result<WriteStatus, Vec<PassedDescriptor>> {
        let framer = &self.framer;
        if descriptors.is_empty() {
            let sent = framer.send_to(cx.transport, header, payload);
            return sent.map_err(|_| Vec::new());
        }
        let sent = framer.send_with_descriptors_to(cx.transport, header, payload, descriptors);
        sent.map_err(|error| error.descriptors)
    }

    /// Passes an answer to the request that waits for it. The connection ends if the answer
    /// is to another request, or if `read` does not accept it.
    pub(super) fn answered<T: UnixTransport + ?Sized>(
        &mut self,
        cx: &mut FrameContext<'_, T, VhostUserFramer>,
        frame: &[u8],
        read: impl FnOnce(u32, &[u8], &mut dyn Iterator<Item = OwnedFd>) -> Option<Answer>,
    ) {
        let (header, payload) = VhostUserHeader::of(frame);
        // It is the answer to the oldest, or to none.
        let asked = self.questions.take_first();
        let is_asked = |(number, _): &(u32, Then)| header.is_reply && header.request == *number;
        let answer = match asked.as_ref().is_some_and(is_asked) {
            true => read(header.request, payload, &mut cx.framing.descriptors()),
            false => None,
        };
        let is_right = answer.is_some();
        if let Some((_, then)) = asked {
            then(cx.reactor, answer.unwrap_or(Err(FrontEndError::Malformed)));
        }
        if !is_right {
            cx.transport.abort_connection();
        }
    }

    pub(super) fn lost(&mut self, reactor: &mut Reactor) {
        for (_, then) in self.questions.take_all() {
            then(reactor, Err(FrontEndError::Lost));
        }
    }

    pub(super) fn outstanding(&self) -> usize {
        self.questions.len()
    }
}
