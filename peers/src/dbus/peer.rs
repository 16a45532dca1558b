//! The protocol around the messages.

use std::fmt;
use std::num::NonZeroU32;

use bowline::framing::{
    EncodeError, FrameContext, FrameDescriptors, FrameReceiver, Framed, FramingError, Pairing,
    Questions, SendFrameError, SendFrameErrorKind, Unclaimed,
};
use bowline::policies::Timeout;
use bowline::process::effective_user;
use bowline::{CloseReason, Credentials, PassedDescriptor, Reactor, Transports, UnixTransport};

use super::auth::{ClientAuth, ServiceAuth, Step};
use super::message::{ByteOrder, DbusHeader, DbusKind, DbusMessage, string_body};
use super::{DbusFramer, DbusRole, DbusSettings};
use crate::refused::refusal;

/// What a program does with the messages of one connection.
///
/// The callbacks are never called from inside each other, like all callbacks of bowline.
/// `cx` sends messages, and gives access to the transport and the reactor.
pub trait DbusHandler<T: UnixTransport>: Sized + 'static {
    /// Whether the process at the other end may speak to this service. A service is asked
    /// this once a client has said who it is and the kernel has confirmed it. By default,
    /// processes of the same user and of root may.
    fn admits(&mut self, client: &Credentials) -> bool {
        client.uid == effective_user() || client.uid == 0
    }

    /// The connection is ready: messages can be sent from now on. On a bus,
    /// [`DbusContext::unique_name`] is known.
    ///
    /// A client that has negotiated descriptors with a peer has had a `Ping` answered
    /// before. The peer accepts no descriptors until it has read the end of the
    /// authentication.
    fn ready(&mut self, cx: &mut DbusContext<'_, '_, T, Self>) {
        let _ = cx;
    }

    /// A method was called. Answer the call with [`reply`](DbusContext::reply) or
    /// [`reply_error`](DbusContext::reply_error), now, or later with its
    /// [`caller`](DbusCaller::of). Its descriptors are in [`DbusContext::descriptors`];
    /// those that are left there are closed.
    ///
    /// `Ping` of `org.freedesktop.DBus.Peer` is answered without a call of this. By default
    /// the answer is that there is no such method.
    fn call_received(&mut self, cx: &mut DbusContext<'_, '_, T, Self>, call: &DbusMessage<'_>) {
        let caller = DbusCaller::of(call);
        let text = "there is no such method";
        // Where nothing can be sent, nobody waits for it.
        let _ = cx.reply_error(&caller, "org.freedesktop.DBus.Error.UnknownMethod", text);
    }

    /// A signal has arrived. Ignored by default.
    fn signal_received(&mut self, cx: &mut DbusContext<'_, '_, T, Self>, signal: &DbusMessage<'_>) {
        let _ = (cx, signal);
    }

    /// The peer has broken the protocol, or refuses us, and the connection is aborted.
    /// [`connection_lost`](Self::connection_lost) follows. Logged by default.
    fn failed(&mut self, cx: &mut DbusContext<'_, '_, T, Self>, error: &DbusError) {
        let peer = cx.frame.transport.peer();
        log::warn!(target: "bowline::peers", "D-Bus with {peer}: {error}; aborting the connection");
    }

    /// The connection has ended. Called once, last. The calls without an answer have been
    /// told [`DbusAnswer::Lost`] before.
    fn connection_lost(&mut self, reactor: &mut Reactor, reason: &CloseReason) {
        let _ = (reactor, reason);
    }
}

/// Why a connection cannot go on.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DbusError {
    /// The peer broke the framing, or a message violates the specification.
    Framing(FramingError),
    /// The authentication failed.
    Authentication {
        /// What is wrong, as a lower-case phrase.
        what: &'static str,
    },
    /// The authentication took longer than [allowed](DbusSettings::authentication_deadline).
    AuthenticationTimedOut,
    /// The bus did not give us a name.
    HelloRefused,
}

impl fmt::Display for DbusError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Framing(error) => error.fmt(f),
            Self::Authentication { what } => write!(f, "authentication failed: {what}"),
            Self::AuthenticationTimedOut => f.write_str("authentication took too long"),
            Self::HelloRefused => f.write_str("the bus refused to give a name"),
        }
    }
}

impl std::error::Error for DbusError {}

/// The outcome of a call.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum DbusAnswer<'a> {
    /// The results.
    Return(&'a DbusMessage<'a>),
    /// An error, from the callee or from the bus.
    Error(&'a DbusMessage<'a>),
    /// No answer arrived [in time](DbusSettings::call_deadline).
    TimedOut,
    /// The connection has ended.
    Lost,
}

/// The caller of a method, which an answer needs. Keep it to answer later.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DbusCaller {
    serial: NonZeroU32,
    sender: Option<String>,
    no_reply: bool,
    order: ByteOrder,
}

impl DbusCaller {
    /// Returns the caller of this call.
    pub fn of(call: &DbusMessage<'_>) -> Self {
        Self {
            serial: call.serial,
            sender: call.header.sender.map(String::from),
            no_reply: call.header.no_reply,
            order: call.order,
        }
    }

    /// Whether the caller waits for an answer.
    pub fn wants_reply(&self) -> bool {
        !self.no_reply
    }
}

type Answered<T, H> =
    Box<dyn FnOnce(&mut H, &mut DbusContext<'_, '_, T, H>, DbusAnswer<'_>) + 'static>;

/// The receiver inside of a [`Framed`]: it does the authentication, the serials and the
/// calls, around a [`DbusHandler`].
///
/// [`connection`](super::connection) makes the protocol of it.
pub struct DbusPeer<T: UnixTransport, H> {
    handler: H,
    state: State<T, H>,
}

struct State<T: UnixTransport, H> {
    phase: Phase,
    role: DbusRole,
    settings: DbusSettings,
    /// Both sides pass descriptors.
    descriptors: bool,
    serial: NonZeroU32,
    questions: Questions<NonZeroU32, Answered<T, H>>,
    unique_name: String,
    deadline: Timeout,
    /// A buffer for the heads of messages.
    head: Vec<u8>,
}

#[derive(Debug)]
enum Phase {
    Service(ServiceAuth),
    Client(ClientAuth),
    Messages,
    Over,
}

/// What a callback of a [`DbusHandler`] can use.
pub struct DbusContext<'c, 'f, T: UnixTransport, H> {
    frame: &'c mut FrameContext<'f, T, DbusFramer>,
    state: &'c mut State<T, H>,
}

impl<T: UnixTransport, H: DbusHandler<T>> DbusContext<'_, '_, T, H> {
    /// Returns the connection's transport.
    pub fn transport(&mut self) -> &mut T {
        self.frame.transport
    }

    /// Returns the reactor.
    pub fn reactor(&mut self) -> &mut Reactor {
        self.frame.reactor
    }

    /// Returns the name that the bus has given us, such as `:1.7`; empty without a bus.
    pub fn unique_name(&self) -> &str {
        &self.state.unique_name
    }

    /// Whether both sides pass descriptors.
    pub fn passes_descriptors(&self) -> bool {
        self.state.descriptors
    }

    /// Returns how many calls wait for an answer.
    pub fn waiting_calls(&self) -> usize {
        self.state.questions.len()
    }

    /// Returns the descriptors of the message that is being delivered.
    pub fn descriptors(&mut self) -> FrameDescriptors<'_> {
        self.frame.framing.descriptors()
    }

    /// Calls a method. `answered` is called once, with the outcome.
    ///
    /// The values in `body` have the types of the header's signature, in the byte order of
    /// this machine. A value of the type `h` in it is an index into `descriptors`.
    ///
    /// # Errors
    ///
    /// - A field of the header is malformed.
    /// - There are more descriptors than [allowed](DbusSettings::max_descriptors), or there
    ///   are some and the peer accepts none.
    /// - Too many calls wait.
    /// - The transport refused.
    ///
    /// Nothing is sent, `answered` is dropped, and the error returns the descriptors.
    pub fn call(
        &mut self,
        header: &DbusHeader<'_>,
        body: &[u8],
        descriptors: Vec<PassedDescriptor>,
        answered: impl FnOnce(&mut H, &mut DbusContext<'_, '_, T, H>, DbusAnswer<'_>) + 'static,
    ) -> Result<(), SendFrameError> {
        if self.state.questions.is_full() {
            let what = "too many calls wait for their answer";
            return Err(refusal(EncodeError::Malformed { what }, descriptors));
        }
        let serial = self.send_in(ByteOrder::NATIVE, header, body, descriptors)?;
        let now = self.frame.reactor.now();
        let refused = self.state.questions.ask(serial, Box::new(answered), now);
        debug_assert!(refused.is_ok(), "there is room");
        if self.state.questions.len() == 1 {
            let deadline = self.state.settings.call_deadline;
            self.state.deadline.set(self.frame, deadline);
        }
        Ok(())
    }

    /// Sends a message that has no answer: a signal, or a call with
    /// [`no_reply`](DbusHeader::no_reply). Returns its serial.
    ///
    /// # Errors
    ///
    /// As [`call`](Self::call).
    pub fn send(
        &mut self,
        header: &DbusHeader<'_>,
        body: &[u8],
        descriptors: Vec<PassedDescriptor>,
    ) -> Result<NonZeroU32, SendFrameError> {
        self.send_in(ByteOrder::NATIVE, header, body, descriptors)
    }

    /// Answers a call with results of these types. Nothing is sent if the caller wants no
    /// answer.
    ///
    /// # Errors
    ///
    /// As [`call`](Self::call).
    pub fn reply(
        &mut self,
        to: &DbusCaller,
        signature: &str,
        body: &[u8],
        descriptors: Vec<PassedDescriptor>,
    ) -> Result<(), SendFrameError> {
        let header = DbusHeader {
            reply_serial: Some(to.serial),
            destination: to.sender.as_deref(),
            signature,
            no_reply: true,
            ..DbusHeader::of(DbusKind::Return)
        };
        match to.no_reply {
            true => Ok(()),
            false => self.send(&header, body, descriptors).map(drop),
        }
    }

    /// Answers a call with an error of this name, and a text for people.
    ///
    /// # Errors
    ///
    /// As [`call`](Self::call).
    pub fn reply_error(
        &mut self,
        to: &DbusCaller,
        name: &str,
        text: &str,
    ) -> Result<(), SendFrameError> {
        let header = DbusHeader {
            reply_serial: Some(to.serial),
            destination: to.sender.as_deref(),
            error_name: Some(name),
            signature: "s",
            no_reply: true,
            ..DbusHeader::of(DbusKind::Error)
        };
        match to.no_reply {
            true => Ok(()),
            false => {
                let body = string_body(ByteOrder::NATIVE, text);
                self.send(&header, &body, Vec::new()).map(drop)
            }
        }
    }

    /// Sends a message like [`send`](Self::send), in the given byte order. It is for tests
    /// of peers.
    ///
    /// # Errors
    ///
    /// As [`call`](Self::call).
    pub fn send_in(
        &mut self,
        order: ByteOrder,
        header: &DbusHeader<'_>,
        body: &[u8],
        descriptors: Vec<PassedDescriptor>,
    ) -> Result<NonZeroU32, SendFrameError> {
        let state = &mut *self.state;
        let (count, serial) = (descriptors.len(), state.serial);
        if !matches!(state.phase, Phase::Messages) {
            let what = "a message before the authentication has ended";
            return Err(refusal(EncodeError::Malformed { what }, descriptors));
        }
        let limit = match state.descriptors {
            true => state.settings.max_descriptors,
            false => 0,
        };
        if count > limit {
            let error = EncodeError::TooManyDescriptors { count, limit };
            return Err(refusal(error, descriptors));
        }
        let mut head = std::mem::take(&mut state.head);
        let encoded = header.encode(order, serial, body.len(), count, &mut head);
        if let Err(error) = encoded {
            return Err(refusal(error, descriptors));
        }
        let sent = if count == 0 {
            self.frame.transport.write_sequence(&[&head, body]);
            Ok(())
        } else {
            head.extend(body);
            let sent = self
                .frame
                .transport
                .write_with_descriptors(&head, descriptors);
            sent.map(drop).map_err(|error| SendFrameError {
                kind: SendFrameErrorKind::Transport(error.kind),
                descriptors: error.descriptors,
            })
        };
        if head.capacity() <= KEPT_HEAD {
            self.state.head = head;
        }
        sent?;
        // It is never 0.
        self.state.serial = serial.checked_add(1).unwrap_or(NonZeroU32::MIN);
        Ok(serial)
    }
}

/// How many bytes a connection keeps for the heads of its messages.
const KEPT_HEAD: usize = 1_024;

type Frame<'a, T> = FrameContext<'a, T, DbusFramer>;

impl<T: UnixTransport, H: DbusHandler<T>> DbusPeer<T, H> {
    pub(super) fn framed(role: DbusRole, settings: DbusSettings, handler: H) -> super::Dbus<T, H> {
        let phase = match role {
            DbusRole::Service => Phase::Service(ServiceAuth::new(
                settings.guid.clone(),
                settings.max_descriptors > 0,
            )),
            DbusRole::Bus | DbusRole::Client => {
                Phase::Client(ClientAuth::new(settings.max_descriptors > 0))
            }
        };
        let framer = DbusFramer::of_lines().with_max_length(settings.max_length);
        let (most, deadline) = (settings.max_descriptors, settings.descriptor_deadline);
        let questions = Questions::new(settings.max_waiting_calls);
        let peer = Self {
            handler,
            state: State {
                phase,
                role,
                settings,
                descriptors: false,
                serial: NonZeroU32::MIN,
                questions,
                unique_name: String::new(),
                deadline: Timeout::with_action(|reactor, handle| {
                    reactor.call_protocol(handle, |framed: &mut super::Dbus<T, H>, cx| {
                        framed.call(cx, |peer: &mut Self, frame| peer.is_late(frame));
                    });
                }),
                head: Vec::new(),
            },
        };
        Framed::new(framer, peer)
            .pairing(Pairing::Claimed(Unclaimed::Fail))
            .max_descriptors(most)
            .descriptor_deadline(deadline)
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
        act: impl FnOnce(&mut H, &mut DbusContext<'_, '_, T, H>) -> A,
    ) -> A {
        let state = &mut self.state;
        act(&mut self.handler, &mut DbusContext { frame, state })
    }

    fn fail(&mut self, frame: &mut Frame<'_, T>, error: &DbusError) {
        self.state.phase = Phase::Over;
        self.enter(frame, |handler, cx| handler.failed(cx, error));
        frame.transport.abort_connection();
    }

    /// Handles a line of the authentication.
    fn hear_line(&mut self, frame: &mut Frame<'_, T>, line: &[u8]) {
        let step = match &mut self.state.phase {
            Phase::Client(auth) => auth.line(line),
            Phase::Service(auth) => {
                let peer = frame.transport.peer_credentials();
                auth.line(line, |user| {
                    peer.is_ok_and(|peer| {
                        user.is_none_or(|user| user == peer.uid) && self.handler.admits(&peer)
                    })
                })
            }
            Phase::Messages | Phase::Over => return,
        };
        match step {
            Step::Say(line) => {
                frame.transport.write(line.as_bytes());
            }
            Step::Begin { say, descriptors } => {
                frame.transport.write(say.as_bytes());
                self.begin(frame, descriptors);
            }
            Step::Fail(what) => self.fail(frame, &DbusError::Authentication { what }),
        }
    }

    fn begin(&mut self, frame: &mut Frame<'_, T>, descriptors: bool) {
        frame.framing.framer_mut().begin_messages();
        self.state.deadline.cancel(frame.reactor);
        self.state.phase = Phase::Messages;
        self.state.descriptors = descriptors;
        match self.state.role {
            DbusRole::Bus => self.say_hello(frame),
            DbusRole::Client if descriptors => self.ping(frame),
            _ => self.enter(frame, |handler, cx| handler.ready(cx)),
        }
    }

    /// Asks the bus for a name.
    fn say_hello(&mut self, frame: &mut Frame<'_, T>) {
        let hello = DbusHeader::call("/org/freedesktop/DBus", "Hello")
            .interface("org.freedesktop.DBus")
            .destination("org.freedesktop.DBus");
        self.ask_first(frame, &hello, |handler, cx, answer| match answer {
            DbusAnswer::Return(message) if message.error_text().is_some() => {
                let name = message.error_text().unwrap_or_default();
                name.clone_into(&mut cx.state.unique_name);
                handler.ready(cx);
            }
            DbusAnswer::Lost => {}
            _ => {
                handler.failed(cx, &DbusError::HelloRefused);
                cx.state.phase = Phase::Over;
                cx.frame.transport.abort_connection();
            }
        });
    }

    /// Waits until the service has read the last line. Until then it accepts no
    /// descriptors: sd-bus ends the connection if one arrives in the read in which the
    /// lines end, and libdbus loses it. Any answer will do.
    fn ping(&mut self, frame: &mut Frame<'_, T>) {
        let ping = DbusHeader::call("/", "Ping").interface("org.freedesktop.DBus.Peer");
        self.ask_first(frame, &ping, |handler, cx, answer| {
            if !matches!(answer, DbusAnswer::Lost) {
                handler.ready(cx);
            }
        });
    }

    fn ask_first(
        &mut self,
        frame: &mut Frame<'_, T>,
        header: &DbusHeader<'_>,
        answered: impl FnOnce(&mut H, &mut DbusContext<'_, '_, T, H>, DbusAnswer<'_>) + 'static,
    ) {
        let asked = self.enter(frame, |_, cx| cx.call(header, &[], Vec::new(), answered));
        debug_assert!(asked.is_ok(), "it is well-formed: {asked:?}");
    }

    /// Ends what has taken too long: the oldest call, or the authentication.
    fn is_late(&mut self, frame: &mut Frame<'_, T>) {
        if !matches!(self.state.phase, Phase::Messages) {
            return self.fail(frame, &DbusError::AuthenticationTimedOut);
        }
        let Some(deadline) = self.state.settings.call_deadline else {
            return;
        };
        let late = self
            .state
            .questions
            .take_late(deadline, frame.reactor.now());
        for answered in late {
            self.enter(frame, |handler, cx| {
                answered(handler, cx, DbusAnswer::TimedOut)
            });
        }
        self.wait_for_oldest(frame);
    }

    /// Sets the deadline of the call that has waited longest.
    fn wait_for_oldest(&mut self, frame: &mut Frame<'_, T>) {
        let now = frame.reactor.now();
        let oldest = self.state.questions.oldest();
        let left = oldest.zip(self.state.settings.call_deadline);
        let left = left
            .map(|(asked, deadline)| deadline.saturating_sub(now.saturating_duration_since(asked)));
        self.state.deadline.set(frame, left);
    }

    fn answer(&mut self, frame: &mut Frame<'_, T>, serial: NonZeroU32, answer: DbusAnswer<'_>) {
        if let Some(answered) = self.state.questions.take(&serial) {
            self.enter(frame, |handler, cx| answered(handler, cx, answer));
        }
    }

    fn hear(&mut self, frame: &mut Frame<'_, T>, message: &DbusMessage<'_>) {
        let header = &message.header;
        match (header.kind, header.reply_serial) {
            (DbusKind::Call, _) if is_ping(header) => {
                let caller = DbusCaller::of(message);
                // Where nothing can be sent, nobody waits for it.
                let _ = self.enter(frame, |_, cx| cx.reply(&caller, "", &[], Vec::new()));
            }
            (DbusKind::Call, _) => self.enter(frame, |handler, cx| {
                handler.call_received(cx, message);
            }),
            (DbusKind::Signal, _) => self.enter(frame, |handler, cx| {
                handler.signal_received(cx, message);
            }),
            (DbusKind::Return, Some(serial)) => {
                self.answer(frame, serial, DbusAnswer::Return(message));
            }
            (DbusKind::Error, Some(serial)) => {
                self.answer(frame, serial, DbusAnswer::Error(message));
            }
            _ => {}
        }
    }
}

fn is_ping(header: &DbusHeader<'_>) -> bool {
    header.interface == Some("org.freedesktop.DBus.Peer") && header.member == Some("Ping")
}

impl<T: UnixTransport, H: DbusHandler<T>> FrameReceiver<T, DbusFramer> for DbusPeer<T, H> {
    fn connection_made(&mut self, cx: &mut Frame<'_, T>) {
        let deadline = self.state.settings.authentication_deadline;
        self.state.deadline.set(cx, Some(deadline));
        if let Phase::Client(_) = self.state.phase {
            let first = ClientAuth::first(effective_user());
            cx.transport.write(first.as_bytes());
        }
    }

    fn frame_received(&mut self, cx: &mut Frame<'_, T>, frame: &[u8]) {
        if !cx.framing.framer().is_of_messages() {
            return self.hear_line(cx, frame);
        }
        match cx.framing.framer().message(frame) {
            Ok(message) if message.descriptors > 0 && !self.state.descriptors => {
                let what = "descriptors that were not agreed on";
                self.fail(cx, &DbusError::Framing(FramingError::Malformed { what }));
            }
            Ok(message) => self.hear(cx, &message),
            Err(error) => self.fail(cx, &DbusError::Framing(error)),
        }
    }

    fn framing_failed(&mut self, cx: &mut Frame<'_, T>, error: FramingError, _: &[u8]) {
        self.fail(cx, &DbusError::Framing(error));
    }

    fn connection_lost(&mut self, cx: &mut Frame<'_, T>, reason: &CloseReason) {
        self.state.phase = Phase::Over;
        self.state.deadline.cancel(cx.reactor);
        for answered in self.state.questions.take_all() {
            self.enter(cx, |handler, cx| answered(handler, cx, DbusAnswer::Lost));
        }
        self.handler.connection_lost(cx.reactor, reason);
    }

    fn is_idle(&self) -> bool {
        self.state.questions.is_empty()
    }

    fn connection_reattached(&mut self, cx: &mut Frame<'_, T>) {
        self.state.deadline.reattached(cx);
    }
}

impl<T: UnixTransport, H> fmt::Debug for DbusPeer<T, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DbusPeer")
            .field("phase", &self.state.phase)
            .field("role", &self.state.role)
            .field("waiting_calls", &self.state.questions.len())
            .finish_non_exhaustive()
    }
}

impl<T: UnixTransport, H> fmt::Debug for DbusContext<'_, '_, T, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DbusContext")
            .field("transport", &self.frame.transport.handle())
            .field("phase", &self.state.phase)
            .finish_non_exhaustive()
    }
}
