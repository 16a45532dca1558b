//! The protocol around the messages.

use std::collections::VecDeque;
use std::fmt;
use std::os::fd::OwnedFd;

use bowline::framing::{
    EncodeError, FrameContext, FrameDescriptors, FrameEncoder as _, FrameReceiver, Framed,
    FramingError, Pairing, Questions, SendFrameError, SendFrameErrorKind,
};
use bowline::policies::Timeout;
use bowline::{CloseReason, PassedDescriptor, Reactor, Transports, UnixTransport};
use serde::Serialize;
use serde_json::value::RawValue;

use super::message::{VarlinkCall, VarlinkFramer, VarlinkReply};
use super::{Varlink, VarlinkRole, VarlinkSettings};
use crate::refused::refusal;

/// What a program does with the messages of one connection.
///
/// The callbacks are never called from inside each other, like all callbacks of bowline.
/// `cx` sends messages, and gives access to the transport and the reactor.
pub trait VarlinkHandler<T: UnixTransport>: Sized + 'static {
    /// The connection has been made. A client may call from now on.
    fn ready(&mut self, cx: &mut VarlinkContext<'_, '_, T, Self>) {
        let _ = cx;
    }

    /// A method of the service was called. Answer the call with [`VarlinkContext::reply`]
    /// or [`reply_error`](VarlinkContext::reply_error), now or later, unless it is oneway.
    /// Later calls wait until then, since answers are sent in the order of the calls.
    ///
    /// The descriptors of the call are in [`VarlinkContext::descriptors`]; those that are
    /// left there are closed. By default the answer is that there is no such method.
    fn call_received(&mut self, cx: &mut VarlinkContext<'_, '_, T, Self>, call: &VarlinkCall<'_>) {
        #[derive(Serialize)]
        struct Unknown<'a> {
            method: &'a str,
        }
        if !call.oneway {
            let method = Unknown {
                method: call.method,
            };
            let name = "org.varlink.service.MethodNotFound";
            // Where nothing can be sent, nobody waits for it.
            let _ = cx.reply_error(name, &method);
        }
    }

    /// Bytes have arrived after an upgrade. They are not varlink.
    fn raw_data_received(&mut self, cx: &mut VarlinkContext<'_, '_, T, Self>, data: &[u8]) {
        let _ = (cx, data);
    }

    /// A descriptor has arrived after an upgrade.
    ///
    /// # Errors
    ///
    /// A handler that does not want the descriptor returns it. By default it is returned.
    fn raw_descriptor_received(
        &mut self,
        cx: &mut VarlinkContext<'_, '_, T, Self>,
        fd: OwnedFd,
    ) -> Result<(), OwnedFd> {
        let _ = cx;
        Err(fd)
    }

    /// The peer has broken the protocol, and the connection is aborted.
    /// [`connection_lost`](Self::connection_lost) follows. Logged by default.
    fn failed(&mut self, cx: &mut VarlinkContext<'_, '_, T, Self>, error: &FramingError) {
        let peer = cx.frame.transport.peer();
        log::warn!(target: "bowline::peers", "varlink with {peer}: {error}; aborting the connection");
    }

    /// The connection has ended. Called once, last. The calls without an answer have been
    /// told [`VarlinkAnswer::Lost`] before.
    fn connection_lost(&mut self, reactor: &mut Reactor, reason: &CloseReason) {
        let _ = (reactor, reason);
    }
}

/// The outcome of a call.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum VarlinkAnswer<'a> {
    /// An answer. Its [`error`](VarlinkReply::error) says whether it is an error, and its
    /// [`continues`](VarlinkReply::continues) whether more answers follow.
    Reply(&'a VarlinkReply<'a>),
    /// No answer arrived [in time](VarlinkSettings::call_deadline). The connection is
    /// aborted, since nobody could tell which call a later answer is for.
    TimedOut,
    /// The connection has ended.
    Lost,
}

type Answered<T, H> =
    Box<dyn FnMut(&mut H, &mut VarlinkContext<'_, '_, T, H>, VarlinkAnswer<'_>) + 'static>;

struct Question<T: UnixTransport, H> {
    /// Taken out while it is called.
    answered: Option<Answered<T, H>>,
    upgrade: bool,
    more: bool,
}

/// A call that waits for the calls before it, since it has descriptors: a peer could assign
/// them to an earlier message.
struct Held<T: UnixTransport, H> {
    message: Vec<u8>,
    descriptors: Vec<PassedDescriptor>,
    question: Option<Question<T, H>>,
}

/// The receiver inside of a [`Framed`]: it keeps calls and answers in order, around a
/// [`VarlinkHandler`].
///
/// [`connection`](super::connection) makes the protocol of it.
pub struct VarlinkPeer<T: UnixTransport, H> {
    handler: H,
    state: State<T, H>,
}

struct State<T: UnixTransport, H> {
    role: VarlinkRole,
    settings: VarlinkSettings,
    questions: Questions<(), Question<T, H>>,
    held: VecDeque<Held<T, H>>,
    /// The call that waits for the answer of a service.
    current: Option<Current>,
    deadline: Timeout,
}

#[derive(Clone, Copy, Debug)]
struct Current {
    more: bool,
    upgrade: bool,
    /// Reading waits for the answer.
    is_paused: bool,
}

/// What a callback of a [`VarlinkHandler`] can use.
pub struct VarlinkContext<'c, 'f, T: UnixTransport, H> {
    frame: &'c mut FrameContext<'f, T, VarlinkFramer>,
    state: &'c mut State<T, H>,
}

impl<T: UnixTransport, H: VarlinkHandler<T>> VarlinkContext<'_, '_, T, H> {
    /// Returns the connection's transport. After an upgrade, what is written to it is sent
    /// as it is.
    pub fn transport(&mut self) -> &mut T {
        self.frame.transport
    }

    /// Returns the reactor.
    pub fn reactor(&mut self) -> &mut Reactor {
        self.frame.reactor
    }

    /// Returns the descriptors of the message that is being delivered, in order. The
    /// message usually refers to them by index.
    pub fn descriptors(&mut self) -> FrameDescriptors<'_> {
        self.frame.framing.descriptors()
    }

    /// Returns how many calls wait for an answer.
    pub fn waiting_calls(&self) -> usize {
        self.state.questions.len() + self.state.held.len()
    }

    /// Calls a method of the service. `answered` is called with the answer. For a call with
    /// [`more`](VarlinkCall::more), it is called with each answer, until one does not
    /// continue. For a oneway call it is never called.
    ///
    /// A call with descriptors is sent when those before it have been answered: a service
    /// could assign the descriptors to an earlier message. Later calls then wait behind it.
    ///
    /// # Errors
    ///
    /// The call cannot be encoded, there are more descriptors than
    /// [allowed](VarlinkSettings::max_descriptors), too many calls wait, or the transport
    /// refused. Nothing is sent, and the error returns the descriptors.
    pub fn call(
        &mut self,
        call: &VarlinkCall<'_>,
        descriptors: Vec<PassedDescriptor>,
        answered: impl FnMut(&mut H, &mut VarlinkContext<'_, '_, T, H>, VarlinkAnswer<'_>) + 'static,
    ) -> Result<(), SendFrameError> {
        if self.state.role == VarlinkRole::Service || self.waiting_calls() >= self.most_calls() {
            let what = match self.state.role {
                VarlinkRole::Service => "a service does not call",
                VarlinkRole::Client => "too many calls wait for their answer",
            };
            return Err(refusal(EncodeError::Malformed { what }, descriptors));
        }
        let message = self.encode(call, &descriptors);
        let message = match message {
            Ok(message) => message,
            Err(error) => return Err(refusal(error, descriptors)),
        };
        let question = call.wants_reply().then(|| Question {
            answered: Some(Box::new(answered)),
            upgrade: call.upgrade,
            more: call.more,
        });
        let has_to_wait = !descriptors.is_empty() && !self.state.questions.is_empty();
        if has_to_wait || !self.state.held.is_empty() {
            self.state.held.push_back(Held {
                message,
                descriptors,
                question,
            });
            return Ok(());
        }
        self.send(&message, descriptors)?;
        self.ask(question);
        Ok(())
    }

    /// Answers the call that was received last, and lets the next one in.
    ///
    /// # Errors
    ///
    /// As [`call`](Self::call). Also if no call waits for an answer.
    pub fn reply(
        &mut self,
        parameters: &impl Serialize,
        descriptors: Vec<PassedDescriptor>,
    ) -> Result<(), SendFrameError> {
        self.answer(None, parameters, false, descriptors)
    }

    /// Answers the call that was received last; more answers follow.
    ///
    /// # Errors
    ///
    /// As [`reply`](Self::reply). Also if the caller does not accept several answers.
    pub fn reply_and_continue(
        &mut self,
        parameters: &impl Serialize,
        descriptors: Vec<PassedDescriptor>,
    ) -> Result<(), SendFrameError> {
        self.answer(None, parameters, true, descriptors)
    }

    /// Answers the call that was received last with an error of this name.
    ///
    /// # Errors
    ///
    /// As [`reply`](Self::reply).
    pub fn reply_error(
        &mut self,
        name: &str,
        parameters: &impl Serialize,
    ) -> Result<(), SendFrameError> {
        self.answer(Some(name), parameters, false, Vec::new())
    }

    fn answer(
        &mut self,
        error: Option<&str>,
        parameters: &impl Serialize,
        continues: bool,
        descriptors: Vec<PassedDescriptor>,
    ) -> Result<(), SendFrameError> {
        let malformed = |what| EncodeError::Malformed { what };
        let Some(current) = self.state.current else {
            let what = "no call waits for an answer";
            return Err(refusal(malformed(what), descriptors));
        };
        if continues && !current.more {
            let what = "the caller takes one answer";
            return Err(refusal(malformed(what), descriptors));
        }
        let text = serde_json::to_string(parameters).and_then(RawValue::from_string);
        let Ok(text) = text else {
            let what = "parameters that are no JSON";
            return Err(refusal(malformed(what), descriptors));
        };
        let reply = VarlinkReply {
            error,
            parameters: Some(&*text),
            continues,
        };
        match self.encode(&reply, &descriptors) {
            Ok(message) => self.send(&message, descriptors)?,
            Err(error) => return Err(refusal(error, descriptors)),
        }
        if !continues {
            self.state.current = None;
            if current.upgrade && error.is_none() {
                self.frame.framing.set_raw_mode();
            }
            if current.is_paused {
                self.frame.transport.resume_producing();
            }
        }
        Ok(())
    }

    fn encode(
        &self,
        message: &impl Serialize,
        descriptors: &[PassedDescriptor],
    ) -> Result<Vec<u8>, EncodeError> {
        let (count, limit) = (descriptors.len(), self.state.settings.max_descriptors);
        if count > limit {
            return Err(EncodeError::TooManyDescriptors { count, limit });
        }
        let malformed = |_| EncodeError::Malformed {
            what: "a message that is no JSON",
        };
        let text = serde_json::to_vec(message).map_err(malformed)?;
        let mut out = Vec::new();
        self.frame
            .framing
            .framer()
            .encode(&(), &text, count, &mut out)?;
        Ok(out)
    }

    fn send(
        &mut self,
        message: &[u8],
        descriptors: Vec<PassedDescriptor>,
    ) -> Result<(), SendFrameError> {
        if descriptors.is_empty() {
            self.frame.transport.write(message);
            return Ok(());
        }
        let sent = self
            .frame
            .transport
            .write_with_descriptors(message, descriptors);
        sent.map(drop).map_err(|error| SendFrameError {
            kind: SendFrameErrorKind::Transport(error.kind),
            descriptors: error.descriptors,
        })
    }

    fn ask(&mut self, question: Option<Question<T, H>>) {
        let Some(question) = question else { return };
        let now = self.frame.reactor.now();
        let refused = self.state.questions.ask((), question, now);
        debug_assert!(refused.is_ok(), "as many wait as may");
        if self.state.questions.len() == 1 {
            self.restart_deadline();
        }
    }

    /// Restarts the time of the oldest call: it, or the call before it, was answered. A
    /// call that accepts several answers has no limit.
    fn restart_deadline(&mut self) {
        let first = self.state.questions.first();
        let deadline = self.state.settings.call_deadline;
        let deadline = deadline.filter(|_| first.is_some_and(|it| !it.more));
        self.state.deadline.set(self.frame, deadline);
    }

    fn most_calls(&self) -> usize {
        self.state.settings.max_waiting_calls
    }

    /// Sends the calls that waited for answers which have arrived.
    fn send_held(&mut self) {
        while let Some(next) = self.state.held.front() {
            if !next.descriptors.is_empty() && !self.state.questions.is_empty() {
                return;
            }
            let Some(next) = self.state.held.pop_front() else {
                return;
            };
            if let Err(error) = self.send(&next.message, next.descriptors) {
                let what = "a call that waited was not sent";
                log::warn!(target: "bowline::peers", "varlink: {what}: {error}");
                self.frame.transport.abort_connection();
            }
            // If it was not sent, it is lost with the connection.
            self.ask(next.question);
        }
    }
}

type Frame<'a, T> = FrameContext<'a, T, VarlinkFramer>;

impl<T: UnixTransport, H: VarlinkHandler<T>> VarlinkPeer<T, H> {
    pub(super) fn framed(
        role: VarlinkRole,
        settings: VarlinkSettings,
        handler: H,
    ) -> Varlink<T, H> {
        let framer = VarlinkFramer::new().with_max_length(settings.max_length);
        let most = settings.max_descriptors;
        let peer = Self {
            handler,
            state: State {
                role,
                questions: Questions::new(settings.max_waiting_calls),
                settings,
                held: VecDeque::new(),
                current: None,
                deadline: Timeout::with_action(|reactor, handle| {
                    reactor.call_protocol(handle, |framed: &mut Varlink<T, H>, cx| {
                        framed.call(cx, |peer: &mut Self, frame| peer.is_late(frame));
                    });
                }),
            },
        };
        Framed::new(framer, peer)
            .pairing(Pairing::ByLastByte)
            .max_descriptors(most)
    }

    /// Returns the handler of the program.
    pub fn handler(&self) -> &H {
        &self.handler
    }

    /// Returns the handler of the program.
    pub fn handler_mut(&mut self) -> &mut H {
        &mut self.handler
    }

    /// Calls `act` with the handler and the context of its callbacks. A timer gets here
    /// with `call_protocol` and [`Framed::call`].
    pub fn enter<A>(
        &mut self,
        frame: &mut Frame<'_, T>,
        act: impl FnOnce(&mut H, &mut VarlinkContext<'_, '_, T, H>) -> A,
    ) -> A {
        let state = &mut self.state;
        act(&mut self.handler, &mut VarlinkContext { frame, state })
    }

    fn fail(&mut self, frame: &mut Frame<'_, T>, error: &FramingError) {
        self.enter(frame, |handler, cx| handler.failed(cx, error));
        frame.transport.abort_connection();
    }

    fn is_late(&mut self, frame: &mut Frame<'_, T>) {
        self.end_calls(frame, VarlinkAnswer::TimedOut);
        frame.transport.abort_connection();
    }

    fn end_calls(&mut self, frame: &mut Frame<'_, T>, answer: VarlinkAnswer<'_>) {
        let held = std::mem::take(&mut self.state.held);
        let asked = self.state.questions.take_all();
        for question in asked.chain(held.into_iter().filter_map(|it| it.question)) {
            if let Some(mut answered) = question.answered {
                self.enter(frame, |handler, cx| answered(handler, cx, answer));
            }
        }
    }

    fn hear_call(&mut self, frame: &mut Frame<'_, T>, call: &VarlinkCall<'_>) {
        if !call.oneway {
            self.state.current = Some(Current {
                more: call.more,
                upgrade: call.upgrade,
                is_paused: false,
            });
        }
        self.enter(frame, |handler, cx| handler.call_received(cx, call));
        // Answers come in the order of calls: those behind it wait.
        if let Some(current) = &mut self.state.current {
            current.is_paused = true;
            frame.transport.pause_producing();
        }
    }

    fn hear_reply(&mut self, frame: &mut Frame<'_, T>, reply: &VarlinkReply<'_>) {
        let first = self.state.questions.first_mut();
        let may_come = first.as_ref().is_some_and(|it| it.more || !reply.continues);
        let Some(first) = first.filter(|_| may_come) else {
            let what = "an answer that nothing was asked for";
            return self.fail(frame, &FramingError::Malformed { what });
        };
        let mut answered = first.answered.take();
        let upgrade = first.upgrade && reply.error.is_none();
        if !reply.continues {
            self.state.questions.take_first();
        }
        if upgrade {
            frame.framing.set_raw_mode();
        }
        self.enter(frame, |handler, cx| {
            if let Some(answered) = &mut answered {
                answered(handler, cx, VarlinkAnswer::Reply(reply));
            }
            cx.send_held();
            cx.restart_deadline();
        });
        if reply.continues
            && let Some(first) = self.state.questions.first_mut()
        {
            first.answered = answered;
        }
    }
}

impl<T: UnixTransport, H: VarlinkHandler<T>> FrameReceiver<T, VarlinkFramer> for VarlinkPeer<T, H> {
    fn connection_made(&mut self, cx: &mut Frame<'_, T>) {
        self.enter(cx, |handler, cx| handler.ready(cx));
    }

    fn frame_received(&mut self, cx: &mut Frame<'_, T>, frame: &[u8]) {
        let heard = match self.state.role {
            VarlinkRole::Service => VarlinkCall::parse(frame).map(|call| self.hear_call(cx, &call)),
            VarlinkRole::Client => {
                VarlinkReply::parse(frame).map(|reply| self.hear_reply(cx, &reply))
            }
        };
        if let Err(error) = heard {
            self.fail(cx, &error);
        }
    }

    fn raw_data_received(&mut self, cx: &mut Frame<'_, T>, data: &[u8]) {
        self.enter(cx, |handler, cx| handler.raw_data_received(cx, data));
    }

    fn file_descriptor_received(
        &mut self,
        cx: &mut Frame<'_, T>,
        fd: OwnedFd,
    ) -> Result<(), OwnedFd> {
        self.enter(cx, |handler, cx| handler.raw_descriptor_received(cx, fd))
    }

    fn framing_failed(&mut self, cx: &mut Frame<'_, T>, error: FramingError, _: &[u8]) {
        self.fail(cx, &error);
    }

    fn connection_lost(&mut self, cx: &mut Frame<'_, T>, reason: &CloseReason) {
        self.state.deadline.cancel(cx.reactor);
        self.end_calls(cx, VarlinkAnswer::Lost);
        self.handler.connection_lost(cx.reactor, reason);
    }

    fn is_idle(&self) -> bool {
        self.state.questions.is_empty() && self.state.current.is_none()
    }

    fn connection_reattached(&mut self, cx: &mut Frame<'_, T>) {
        self.state.deadline.reattached(cx);
    }
}

impl<T: UnixTransport, H> fmt::Debug for VarlinkPeer<T, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VarlinkPeer")
            .field("role", &self.state.role)
            .field("questions", &self.state.questions)
            .field("current", &self.state.current)
            .finish_non_exhaustive()
    }
}

impl<T: UnixTransport, H> fmt::Debug for VarlinkContext<'_, '_, T, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VarlinkContext")
            .field("transport", &self.frame.transport.handle())
            .finish_non_exhaustive()
    }
}
