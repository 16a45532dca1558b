//! A connection on which two processes exchange messages and descriptors: the
//! handshake, and the protocol that delivers each message with exactly its
//! descriptors.
//!
//! [`Channel`] is a [`Protocol`] for any [`UnixTransport`]: one end of a
//! socketpair, or a connection to a socket with a name. It cuts the stream by
//! [`framing`](bowline_protocol::framing) and drives a [`ChannelReceiver`]. Messages
//! are written with [`wire::send`], from any callback. [`wire`] describes their bytes.
//!
//! # The handshake
//!
//! Each side first asks the kernel who is at the other end ([`Users`]). It begins with
//! a [`Hello`], without waiting for the other's. Both judge by the same rule, so no
//! further answer is needed. They use the highest version that both know, and each has
//! to be what the other expects ([`Role`]). A side that does not agree ends the
//! connection, and tells its receiver why
//! ([`channel_lost`](ChannelReceiver::channel_lost)).
//!
//! # Deadlines
//!
//! The other's hello has a deadline ([`ChannelSettings::handshake_timeout`]), and so
//! has every frame that has begun to arrive ([`ChannelSettings::frame_timeout`]).
//! Sending never waits. The time for an answer is up to the receiver.
//!
//! # Examples
//!
//! ```
//! use std::os::unix::net::UnixStream;
//!
//! use bowline::handoff::channel::{
//!     Channel, ChannelReceiver, ChannelSettings, Peer, Role,
//! };
//! use bowline::handoff::wire::{
//!     self, Incoming, Message, PayloadReader, PayloadWriter, WireError,
//! };
//! use bowline::{Context, Reactor, Transports, UnixTransport};
//!
//! /// The one message of this set: a descriptor, and what it is called.
//! struct Named(String);
//!
//! impl Message for Named {
//!     fn kind(&self) -> u16 {
//!         0x8000
//!     }
//!     fn encode(&self, payload: &mut PayloadWriter<'_>) {
//!         payload.string(&self.0);
//!     }
//!     fn decode(kind: u16, _: u16, payload: &mut PayloadReader<'_>) -> Result<Self, WireError> {
//!         match kind {
//!             0x8000 => payload.string().map(Self),
//!             kind => Err(WireError::UnknownKind { kind }),
//!         }
//!     }
//! }
//!
//! struct Giver;
//!
//! impl<T: UnixTransport> ChannelReceiver<T> for Giver {
//!     type Message = Named;
//!
//!     fn channel_made(&mut self, cx: &mut Context<'_, T>, _: &Peer) {
//!         let file = std::fs::File::open("/proc/self/comm").expect("Linux has it");
//!         if let Err(error) = wire::send(cx.transport, &Named("comm".into()), vec![file.into()]) {
//!             println!("{error}"); // it has the descriptor
//!         }
//!     }
//!
//!     fn message_received(&mut self, _: &mut Context<'_, T>, _: Incoming<Named>) {}
//! }
//!
//! struct Taker;
//!
//! impl<T: UnixTransport> ChannelReceiver<T> for Taker {
//!     type Message = Named;
//!
//!     fn message_received(&mut self, cx: &mut Context<'_, T>, incoming: Incoming<Named>) {
//!         println!("{}: {:?}", incoming.message.0, incoming.descriptors);
//!         # assert_eq!(incoming.descriptors.len(), 1);
//!         cx.reactor.stop().expect("it runs: this is a callback");
//!     }
//! }
//!
//! const GIVER: Role = Role(0x8000);
//! const TAKER: Role = Role(0x8001);
//!
//! let (left, right) = UnixStream::pair()?;
//! let mut reactor = Reactor::new()?;
//! let settings = ChannelSettings::new(GIVER, TAKER);
//! reactor.adopt_unix_stream(left.into(), Channel::new(settings, Giver))?;
//! let settings = ChannelSettings::new(TAKER, GIVER);
//! reactor.adopt_unix_stream(right.into(), Channel::new(settings, Taker))?;
//! reactor.run()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod socket;

use std::borrow::Cow;
use std::cell::Cell;
use std::error::Error;
use std::fmt;
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use bowline_protocol::framing::{
    FrameContext, FrameReceiver, Framed, FramingError, Pairing, Unclaimed,
};
use bowline_protocol::policies::Timeout;
use bowline_protocol::{
    AfterReadClosed, AfterTruncation, AtDrain, CloseReason, Context, Credentials, Protocol,
    UnixTransport,
};
use bowline_reactor::Description;
use bowline_transport::effective_user;

pub use self::socket::ChannelSocket;
use crate::log;
use crate::wire::{
    self, Incoming, MAX_DESCRIPTORS, MAX_PAYLOAD, Message, PayloadReader, PayloadWriter, WireError,
    WireFramer, decode_payload,
};

/// Gets the messages of a channel.
///
/// As with [`Protocol`], no callback is ever made from inside another one.
pub trait ChannelReceiver<T: UnixTransport + ?Sized>: 'static {
    /// The messages that the peer may send.
    type Message: Message;

    /// The two sides agree. Called once, before any message is delivered.
    /// Messages that are sent earlier are encoded without knowing the peer's version.
    fn channel_made(&mut self, cx: &mut Context<'_, T>, peer: &Peer) {
        let _ = (cx, peer);
    }

    /// A message has arrived, with its descriptors. Not called while the transport is
    /// paused, nor after it is closed.
    fn message_received(&mut self, cx: &mut Context<'_, T>, incoming: Incoming<Self::Message>);

    /// Descriptors have left. See [`Protocol::descriptors_sent`].
    fn descriptors_sent(&mut self, cx: &mut Context<'_, T>, count: usize) {
        let _ = (cx, count);
    }

    /// The peer has closed its side. See [`Protocol::read_connection_lost`].
    fn read_channel_lost(&mut self, cx: &mut Context<'_, T>) -> AfterReadClosed {
        let _ = cx;
        AfterReadClosed::EndConnection
    }

    /// The reactor stops gracefully. See [`Protocol::draining`]. By default nobody
    /// waits for a channel and it goes on until the end, since it serves something
    /// that is waited for elsewhere.
    fn draining(&mut self, cx: &mut Context<'_, T>) -> AtDrain {
        let _ = cx;
        AtDrain::DoNotWait
    }

    /// The channel has ended. Called once and last, also if it never was
    /// [made](Self::channel_made). `error` is set if the channel itself found something
    /// wrong. `reason` tells how the connection ended.
    fn channel_lost(
        &mut self,
        cx: &mut Context<'_, T>,
        error: Option<&ChannelError>,
        reason: &CloseReason,
    ) {
        let _ = (cx, error, reason);
    }

    /// Adds what the receiver says of itself to who
    /// [looks into](bowline_reactor::Reactor::descriptors) the reactor. The channel has
    /// said already who is at its other end. By default that is all.
    fn describe(&self, description: &mut Description) {
        let _ = description;
    }
}

/// The part that a process plays in a channel. Each side says its own and expects a
/// certain other. Programs may use numbers from 0x8000 on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Role(pub u16);

impl Role {
    /// Accepts connections, and passes them to workers.
    pub const DISPATCHER: Self = Self(1);
    /// Serves connections that were passed to it.
    pub const WORKER: Self = Self(2);
    /// Runs, and is going to be replaced.
    pub const PREDECESSOR: Self = Self(3);
    /// Takes over from a predecessor.
    pub const SUCCESSOR: Self = Self(4);
    /// Keeps descriptors for others.
    pub const HOLDER: Self = Self(5);
    /// Gives descriptors to a holder, and gets them back.
    pub const CLIENT: Self = Self(6);

    /// One word, or the number of a program's own role.
    fn name(self) -> Cow<'static, str> {
        Cow::Borrowed(match self {
            Self::DISPATCHER => "dispatcher",
            Self::WORKER => "worker",
            Self::PREDECESSOR => "predecessor",
            Self::SUCCESSOR => "successor",
            Self::HOLDER => "holder",
            Self::CLIENT => "client",
            Self(number) => return Cow::Owned(number.to_string()),
        })
    }
}

/// The settings of one side of a channel.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ChannelSettings {
    /// The role of this side.
    pub role: Role,
    /// The role that the other side has to have.
    pub peer_role: Role,
    /// The versions of the message set that this side knows. The default is 1 only.
    pub versions: RangeInclusive<u16>,
    /// The users that may be at the other end. The default is [`Users::Same`].
    pub users: Users,
    /// The longest payload that is accepted, in bytes. The default is 1 MiB. The peer
    /// is told ([`Peer::max_payload`]).
    pub max_payload: usize,
    /// How long the other's hello may take. The default is 10 s.
    pub handshake_timeout: Duration,
    /// How long a frame may take from its first byte on. The default is 10 s.
    pub frame_timeout: Duration,
}

bowline_reactor::setters!(ChannelSettings {
    role: Role,
    peer_role: Role,
    versions: RangeInclusive<u16>,
    users: Users,
    max_payload: usize,
    handshake_timeout: Duration,
    frame_timeout: Duration,
});

impl ChannelSettings {
    /// The defaults, for a side that has `role` and expects `peer_role`.
    pub fn new(role: Role, peer_role: Role) -> Self {
        Self {
            role,
            peer_role,
            versions: 1..=1,
            users: Users::Same,
            max_payload: 1 << 20,
            handshake_timeout: Duration::from_secs(10),
            frame_timeout: Duration::from_secs(10),
        }
    }
}

/// The users that may be at the other end of a channel. The kernel says who made the
/// connection (`SO_PEERCRED`).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Users {
    /// The effective user of this process.
    Same,
    /// One of these.
    OneOf(Vec<u32>),
    /// Anyone who could reach the socket.
    Any,
}

/// The first message of either side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The lowest and the highest version of the message set that the side knows.
    pub versions: RangeInclusive<u16>,
    /// Its role.
    pub role: Role,
    /// Its process id, as it sees itself. For the kernel's word see
    /// [`Peer::credentials`].
    pub pid: u32,
    /// The longest payload that it accepts.
    pub max_payload: u32,
}

impl Hello {
    const KIND: u16 = 1;
    /// So that another program is told from another version: "bwln".
    const MAGIC: u32 = 0x6277_6c6e;
}

impl Message for Hello {
    fn kind(&self) -> u16 {
        Self::KIND
    }

    fn encode(&self, payload: &mut PayloadWriter<'_>) {
        payload.u32(Self::MAGIC);
        payload.u16(*self.versions.start());
        payload.u16(*self.versions.end());
        payload.u16(self.role.0);
        payload.u32(self.pid);
        payload.u32(self.max_payload);
    }

    fn decode(kind: u16, _: u16, payload: &mut PayloadReader<'_>) -> Result<Self, WireError> {
        if kind != Self::KIND {
            return Err(WireError::UnknownKind { kind });
        }
        if payload.u32()? != Self::MAGIC {
            return Err(WireError::Malformed { what: "hello" });
        }
        let hello = Self {
            versions: payload.u16()?..=payload.u16()?,
            role: Role(payload.u16()?),
            pid: payload.u32()?,
            max_payload: payload.u32()?,
        };
        // Later versions may say more.
        payload.rest();
        Ok(hello)
    }
}

/// The other end of a channel, and the version that both use.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Peer {
    /// The version of the message set that both use.
    pub version: u16,
    /// The peer's process id, by its own word.
    pub pid: u32,
    /// The longest payload that the peer accepts, in bytes.
    pub max_payload: usize,
    /// The process that made the connection, by the kernel's word. A socketpair was
    /// made by whoever made the pair.
    pub credentials: Option<Credentials>,
}

/// What a channel found wrong with its peer.
#[derive(Debug)]
#[non_exhaustive]
pub enum ChannelError {
    /// The bytes are no frame, or the frame came without the descriptors that it owns.
    Framing(FramingError),
    /// The frame is no message of the set.
    Wire(WireError),
    /// The peer did not begin with a hello.
    HelloExpected,
    /// The two sides have no version in common.
    NoCommonVersion {
        /// The versions that this side knows.
        ours: RangeInclusive<u16>,
        /// The versions that the peer knows.
        theirs: RangeInclusive<u16>,
    },
    /// The peer does not have the expected role.
    WrongRole {
        /// Its role.
        role: Role,
    },
    /// The peer belongs to another user.
    ForeignUser {
        /// The user.
        uid: u32,
    },
    /// The kernel did not say who the peer is.
    Credentials(io::Error),
    /// No hello came in time.
    HandshakeTimedOut,
    /// A frame began, and its end did not come in time.
    FrameTimedOut,
    /// The connection ended in the middle of a frame.
    CutShort,
}

impl fmt::Display for ChannelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Framing(error) => error.fmt(f),
            Self::Wire(error) => write!(f, "peer broke the framing: {error}"),
            Self::HelloExpected => f.write_str("peer did not begin with a hello"),
            Self::NoCommonVersion { ours, theirs } => write!(
                f,
                "no version in common: {} to {} here, {} to {} there",
                ours.start(),
                ours.end(),
                theirs.start(),
                theirs.end()
            ),
            Self::WrongRole { role } => write!(f, "peer has the unexpected role {}", role.0),
            Self::ForeignUser { uid } => write!(f, "peer belongs to user {uid}"),
            Self::Credentials(error) => write!(f, "cannot tell whose the peer is: {error}"),
            Self::HandshakeTimedOut => f.write_str("no hello in time"),
            Self::FrameTimedOut => f.write_str("frame did not become whole in time"),
            Self::CutShort => f.write_str("connection ended inside of a frame"),
        }
    }
}

impl Error for ChannelError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Framing(error) => Some(error),
            Self::Wire(error) => Some(error),
            Self::Credentials(error) => Some(error),
            _ => None,
        }
    }
}

/// The protocol of one end of a channel.
pub struct Channel<R> {
    framed: Framed<WireFramer, ChannelEnd<R>>,
}

type FrameCx<'a, T> = FrameContext<'a, T, WireFramer>;

/// What is done with the frames of a channel.
struct ChannelEnd<R> {
    settings: ChannelSettings,
    state: State,
    error: Option<ChannelError>,
    /// Limits the handshake, then each frame that has begun.
    limit: Timeout,
    limited: Rc<Cell<Limited>>,
    receiver: R,
}

#[derive(Debug)]
enum State {
    /// The peer's hello is awaited.
    Greeting {
        credentials: Option<Credentials>,
    },
    Made {
        version: u16,
        /// The peer's process.
        pid: u32,
    },
    Failed,
}

/// What the running limit is for, and whether it has passed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Limited {
    Nothing,
    Handshake,
    Frame,
    HandshakePassed,
    FramePassed,
}

impl<R> Channel<R> {
    /// Makes one end of a channel, which delivers to `receiver`.
    pub fn new(settings: ChannelSettings, receiver: R) -> Self {
        let limited = Rc::new(Cell::new(Limited::Nothing));
        let passed = Rc::clone(&limited);
        let limit = Timeout::with_action(move |reactor, transport| {
            let Some(transport) = reactor.get(transport) else {
                return;
            };
            passed.set(match passed.get() {
                Limited::Handshake => Limited::HandshakePassed,
                // While we do not read the peer cannot finish it.
                Limited::Frame if transport.is_reading_paused() => {
                    return passed.set(Limited::Nothing);
                }
                Limited::Frame => Limited::FramePassed,
                other => other,
            });
            transport.abort_connection();
        });
        let framer = WireFramer::new(settings.max_payload);
        let end = ChannelEnd {
            settings,
            state: State::Greeting { credentials: None },
            error: None,
            limit,
            limited,
            receiver,
        };
        // A frame that has begun has its own deadline, with descriptors or without.
        let framed = Framed::new(framer, end)
            .pairing(Pairing::Claimed(Unclaimed::Fail))
            .max_descriptors(MAX_DESCRIPTORS)
            .max_waiting(MAX_DESCRIPTORS)
            .descriptor_deadline(None);
        Self { framed }
    }

    /// The receiver.
    pub fn receiver(&self) -> &R {
        &self.framed.receiver().receiver
    }

    /// The receiver, to be changed from outside by
    /// [`call_protocol`](bowline_transport::Transports::call_protocol).
    pub fn receiver_mut(&mut self) -> &mut R {
        &mut self.framed.receiver_mut().receiver
    }
}

impl<R> ChannelEnd<R> {
    fn hello(&self) -> Hello {
        let max = self.settings.max_payload.min(MAX_PAYLOAD);
        Hello {
            versions: self.settings.versions.clone(),
            role: self.settings.role,
            pid: std::process::id(),
            max_payload: max as u32,
        }
    }

    /// Asks the kernel who is there.
    fn check_user<T: UnixTransport + ?Sized>(
        &self,
        transport: &T,
    ) -> Result<Option<Credentials>, ChannelError> {
        let credentials = match transport.peer_credentials() {
            Ok(credentials) => credentials,
            Err(_) if self.settings.users == Users::Any => return Ok(None),
            Err(error) => return Err(ChannelError::Credentials(error)),
        };
        let is_allowed = match &self.settings.users {
            Users::Same => credentials.uid == effective_user(),
            Users::OneOf(users) => users.contains(&credentials.uid),
            Users::Any => true,
        };
        if is_allowed {
            Ok(Some(credentials))
        } else {
            Err(ChannelError::ForeignUser {
                uid: credentials.uid,
            })
        }
    }

    /// A frame is whole, with its descriptors, or without those that were lost.
    fn deliver<T>(
        &mut self,
        cx: &mut FrameCx<'_, T>,
        frame: &[u8],
        lost: usize,
    ) -> Result<(), ChannelError>
    where
        T: UnixTransport + ?Sized,
        R: ChannelReceiver<T>,
    {
        if self.limited.get() == Limited::Frame {
            self.limit_nothing(cx);
        }
        let descriptors: Vec<OwnedFd> = cx.framing.descriptors().collect();
        let (kind, payload) = wire::kind_and_payload(frame).map_err(ChannelError::Wire)?;
        let mut cx = cx.as_context();
        match self.state {
            State::Greeting { credentials } => {
                if kind != Hello::KIND || !descriptors.is_empty() {
                    return Err(ChannelError::HelloExpected);
                }
                let theirs = decode_payload(kind, 0, payload).map_err(ChannelError::Wire)?;
                let peer = agree(&self.settings, &theirs, credentials)?;
                self.state = State::Made {
                    version: peer.version,
                    pid: peer.pid,
                };
                self.limit.cancel(cx.reactor);
                self.limited.set(Limited::Nothing);
                self.receiver.channel_made(&mut cx, &peer);
            }
            State::Made { version, .. } => {
                let message = decode_payload(kind, version, payload).map_err(ChannelError::Wire)?;
                let incoming = Incoming {
                    message,
                    descriptors,
                    lost,
                };
                self.receiver.message_received(&mut cx, incoming);
            }
            State::Failed => {}
        }
        Ok(())
    }

    fn limit_nothing<T: ?Sized>(&mut self, cx: &mut FrameCx<'_, T>) {
        self.limited.set(Limited::Nothing);
        self.limit.cancel(cx.reactor);
    }

    fn fail<T: UnixTransport + ?Sized>(&mut self, cx: &mut FrameCx<'_, T>, error: ChannelError) {
        self.error = Some(error);
        self.state = State::Failed;
        cx.transport.abort_connection();
    }
}

/// Whether a channel has failed while the other end, for all that is known, is there.
pub(crate) fn has_broken(error: Option<&ChannelError>, reason: &CloseReason) -> bool {
    !matches!(reason, CloseReason::ReactorStopped) && !has_peer_ended(error, reason)
}

/// Whether a channel has ended because the other end did, be it with its process, in
/// the middle of a message maybe; and did not break here.
pub(crate) fn has_peer_ended(error: Option<&ChannelError>, reason: &CloseReason) -> bool {
    if !matches!(error, None | Some(ChannelError::CutShort)) {
        return false;
    }
    match reason {
        CloseReason::Done => true,
        CloseReason::Lost(error) => matches!(
            error.kind(),
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
        ),
        _ => false,
    }
}

/// The rule by which both sides judge: what follows from two hellos.
fn agree(
    ours: &ChannelSettings,
    theirs: &Hello,
    credentials: Option<Credentials>,
) -> Result<Peer, ChannelError> {
    let version = *ours.versions.end().min(theirs.versions.end());
    if !ours.versions.contains(&version) || !theirs.versions.contains(&version) {
        return Err(ChannelError::NoCommonVersion {
            ours: ours.versions.clone(),
            theirs: theirs.versions.clone(),
        });
    }
    if theirs.role != ours.peer_role {
        return Err(ChannelError::WrongRole { role: theirs.role });
    }
    Ok(Peer {
        version,
        pid: theirs.pid,
        max_payload: MAX_PAYLOAD.min(theirs.max_payload as usize),
        credentials,
    })
}

impl<T, R> FrameReceiver<T, WireFramer> for ChannelEnd<R>
where
    T: UnixTransport + ?Sized,
    R: ChannelReceiver<T>,
{
    fn connection_made(&mut self, cx: &mut FrameCx<'_, T>) {
        let credentials = match self.check_user(cx.transport) {
            Ok(credentials) => credentials,
            Err(error) => return self.fail(cx, error),
        };
        self.state = State::Greeting { credentials };
        if let Err(error) = wire::send(cx.transport, &self.hello(), Vec::new()) {
            // Lost already, which the end is going to say.
            log::debug!(target: log::HANDOFF, "cannot greet: {error}");
        }
        self.limited.set(Limited::Handshake);
        let timeout = self.settings.handshake_timeout;
        self.limit.set(cx, Some(timeout));
    }

    fn frame_received(&mut self, cx: &mut FrameCx<'_, T>, frame: &[u8]) {
        if let Err(error) = self.deliver(cx, frame, 0) {
            self.fail(cx, error);
        }
    }

    fn frame_truncated(&mut self, cx: &mut FrameCx<'_, T>, frame: &[u8]) {
        if let Err(error) = self.deliver(cx, frame, wire::claims(frame)) {
            self.fail(cx, error);
        }
    }

    /// Gives a frame that has begun its time.
    fn read_delivered(&mut self, cx: &mut FrameCx<'_, T>) {
        if cx.framing.rest_len() > 0 && self.limited.get() == Limited::Nothing {
            self.limited.set(Limited::Frame);
            let timeout = self.settings.frame_timeout;
            self.limit.set(cx, Some(timeout));
        }
    }

    fn framing_failed(&mut self, cx: &mut FrameCx<'_, T>, error: FramingError, _: &[u8]) {
        self.fail(cx, ChannelError::Framing(error));
    }

    fn descriptors_truncated(&mut self, _: &mut FrameCx<'_, T>, _: usize) -> AfterTruncation {
        AfterTruncation::KeepConnection
    }

    fn descriptors_sent(&mut self, cx: &mut FrameCx<'_, T>, count: usize) {
        self.receiver.descriptors_sent(&mut cx.as_context(), count);
    }

    fn read_connection_lost(&mut self, cx: &mut FrameCx<'_, T>) -> AfterReadClosed {
        if cx.framing.rest_len() > 0 {
            self.error.get_or_insert(ChannelError::CutShort);
        }
        self.receiver.read_channel_lost(&mut cx.as_context())
    }

    fn draining(&mut self, cx: &mut FrameCx<'_, T>) -> AtDrain {
        self.receiver.draining(&mut cx.as_context())
    }

    fn connection_reattached(&mut self, cx: &mut FrameCx<'_, T>) {
        self.limit.reattached(cx);
    }

    fn connection_lost(&mut self, cx: &mut FrameCx<'_, T>, reason: &CloseReason) {
        match self.limited.get() {
            Limited::HandshakePassed => self.error = Some(ChannelError::HandshakeTimedOut),
            Limited::FramePassed => self.error = Some(ChannelError::FrameTimedOut),
            Limited::Nothing | Limited::Handshake | Limited::Frame => {}
        }
        self.limit_nothing(cx);
        let error = self.error.as_ref();
        self.receiver
            .channel_lost(&mut cx.as_context(), error, reason);
    }

    fn log_prefix(&self) -> Cow<'_, str> {
        Cow::Borrowed("Channel")
    }

    fn describe(&self, description: &mut Description) {
        let section = description.section("Channel");
        section
            .set("role", self.settings.role.name())
            .set("peer_role", self.settings.peer_role.name());
        match self.state {
            State::Greeting { .. } => section.set("state", "greeting"),
            State::Made { version, pid } => section
                .set("state", "made")
                .set("version", u64::from(version))
                .set("pid", pid),
            State::Failed => section.set("state", "failed"),
        };
        self.receiver.describe(description);
    }
}

/// Forwards to the framing.
impl<T, R> Protocol<T> for Channel<R>
where
    T: UnixTransport + ?Sized,
    R: ChannelReceiver<T>,
{
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        self.framed.connection_made(cx);
    }

    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        self.framed.data_received(cx, data);
    }

    fn file_descriptor_received(
        &mut self,
        cx: &mut Context<'_, T>,
        fd: OwnedFd,
    ) -> Result<(), OwnedFd> {
        self.framed.file_descriptor_received(cx, fd)
    }

    fn descriptors_truncated(&mut self, cx: &mut Context<'_, T>, count: usize) -> AfterTruncation {
        self.framed.descriptors_truncated(cx, count)
    }

    fn descriptors_sent(&mut self, cx: &mut Context<'_, T>, count: usize) {
        self.framed.descriptors_sent(cx, count);
    }

    fn read_connection_lost(&mut self, cx: &mut Context<'_, T>) -> AfterReadClosed {
        self.framed.read_connection_lost(cx)
    }

    fn draining(&mut self, cx: &mut Context<'_, T>) -> AtDrain {
        self.framed.draining(cx)
    }

    fn is_idle(&self) -> bool {
        Protocol::<T>::is_idle(&self.framed)
    }

    fn reading_resumed(&mut self, cx: &mut Context<'_, T>) {
        self.framed.reading_resumed(cx);
    }

    fn has_undelivered(&mut self) -> bool {
        Protocol::<T>::has_undelivered(&mut self.framed)
    }

    fn connection_reattached(&mut self, cx: &mut Context<'_, T>) {
        self.framed.connection_reattached(cx);
    }

    fn connection_secured(&mut self, cx: &mut Context<'_, T>) {
        self.framed.connection_secured(cx);
    }

    fn connection_lost(&mut self, cx: &mut Context<'_, T>, reason: &CloseReason) {
        self.framed.connection_lost(cx, reason);
    }

    fn log_prefix(&self) -> Cow<'_, str> {
        Protocol::<T>::log_prefix(&self.framed)
    }

    fn describe(&self, description: &mut Description) {
        Protocol::<T>::describe(&self.framed, description);
    }
}

impl<R> fmt::Debug for Channel<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Channel")
            .field("settings", &self.framed.receiver().settings)
            .field("state", &self.framed.receiver().state)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(versions: RangeInclusive<u16>, role: Role) -> Hello {
        Hello {
            versions,
            role,
            pid: 1,
            max_payload: 100,
        }
    }

    #[test]
    fn the_highest_version_in_common_is_agreed_on() {
        let mut ours = ChannelSettings::new(Role::DISPATCHER, Role::WORKER);
        for (known, offered, agreed) in [
            (1..=1, 1..=1, Some(1)),
            (1..=3, 2..=5, Some(3)),
            (2..=5, 1..=3, Some(3)),
            (4..=5, 1..=3, None),
            (1..=3, 4..=5, None),
            // A range that contains nothing.
            (1..=3, RangeInclusive::new(3, 2), None),
        ] {
            ours.versions = known;
            let answer = agree(&ours, &hello(offered, Role::WORKER), None);
            assert_eq!(answer.ok().map(|peer| peer.version), agreed);
        }
    }

    #[test]
    fn another_role_is_refused() {
        let ours = ChannelSettings::new(Role::DISPATCHER, Role::WORKER);
        let answer = agree(&ours, &hello(1..=1, Role::DISPATCHER), None);
        assert!(matches!(answer, Err(ChannelError::WrongRole { role }) if role.0 == 1));
    }

    #[test]
    fn layout_of_a_hello_stays_as_it_is() {
        let mut frame = Vec::new();
        let said = Hello {
            versions: 2..=3,
            role: Role::WORKER,
            pid: 0x0405_0607,
            max_payload: 0x0809_0a0b,
        };
        wire::encode_frame(&said, 0, &mut frame).expect("it is short");
        assert_eq!(frame[..8], [0, 0, 0, 18, 0, 1, 1, 0]);
        assert_eq!(
            frame[8..],
            *b"bwln\0\x02\0\x03\0\x02\x04\x05\x06\x07\x08\x09\x0a\x0b"
        );
    }

    #[test]
    fn what_is_wrong_with_a_peer_is_said_with_its_reason() {
        let refused = io::Error::from(io::ErrorKind::NotConnected);
        let no_common = ChannelError::NoCommonVersion {
            ours: 1..=2,
            theirs: 3..=4,
        };
        let role = Role::HOLDER;
        let reason = refused.to_string();
        for (error, text, source) in [
            (
                ChannelError::Wire(WireError::Truncated),
                "peer broke the framing",
                Some("payload ends inside of a value"),
            ),
            (
                ChannelError::HelloExpected,
                "peer did not begin with a hello",
                None,
            ),
            (
                no_common,
                "no version in common: 1 to 2 here, 3 to 4 there",
                None,
            ),
            (
                ChannelError::WrongRole { role },
                "peer has the unexpected role 5",
                None,
            ),
            (
                ChannelError::ForeignUser { uid: 7 },
                "peer belongs to user 7",
                None,
            ),
            (
                ChannelError::Credentials(refused),
                "cannot tell whose the peer is",
                Some(&*reason),
            ),
            (ChannelError::HandshakeTimedOut, "no hello in time", None),
            (
                ChannelError::FrameTimedOut,
                "frame did not become whole in time",
                None,
            ),
            (
                ChannelError::CutShort,
                "connection ended inside of a frame",
                None,
            ),
        ] {
            let cause = source.map(|cause| format!(": {cause}"));
            assert_eq!(
                error.to_string(),
                format!("{text}{}", cause.unwrap_or_default())
            );
            let said = error.source().map(ToString::to_string);
            assert_eq!(said.as_deref(), source, "{text}");
        }
    }

    #[test]
    fn channel_is_named_in_the_log_and_printed_without_its_receiver() {
        struct Silent;
        impl<T: UnixTransport + ?Sized> ChannelReceiver<T> for Silent {
            type Message = Hello;
            fn message_received(&mut self, _: &mut Context<'_, T>, _: Incoming<Hello>) {}
        }
        let settings = ChannelSettings::new(Role::HOLDER, Role::CLIENT);
        let channel = Channel::new(settings, Silent);
        let prefix = Protocol::<dyn UnixTransport>::log_prefix(&channel);
        assert_eq!(prefix, "Channel");
        let printed = format!("{channel:?}");
        assert!(printed.starts_with("Channel { settings: "), "{printed}");
        assert!(printed.contains("state: Greeting"), "{printed}");
    }

    #[test]
    fn a_hello_of_a_later_version_may_say_more() {
        let mut frame = Vec::new();
        let said = hello(1..=9, Role::WORKER);
        wire::encode_frame(&said, 0, &mut frame).expect("it is short");
        frame.push(7);
        let heard: Hello = decode_payload(Hello::KIND, 0, &frame[8..]).expect("more is ignored");
        assert_eq!(heard, said);
    }
}
